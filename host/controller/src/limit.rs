//! The guest limit: how many I/O commands per second a controller fetches (vendor feature C0h).

use dray_device::poll::Time;

/// A bucket may hold this much time, so that a limit of a few commands per millisecond is kept evenly.
const BURST_NS: u64 = 1_000_000;

/// A token bucket in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// Commands per second; 0 = none.
    rate: u32,
    cost_ns: u64,
    credit_ns: u64,
    last: Time,
}

impl Limit {
    pub(crate) const fn none() -> Self {
        Self { rate: 0, cost_ns: 0, credit_ns: 0, last: Time(0) }
    }

    pub(crate) fn set(&mut self, now: Time, rate: u32) {
        let cost_ns = if rate == 0 { 0 } else { (1_000_000_000 / u64::from(rate)).max(1) };
        *self = Self { rate, cost_ns, credit_ns: 0, last: now };
    }

    pub(crate) fn rate(&self) -> u32 {
        self.rate
    }

    /// How many of `want` commands may be fetched now.
    #[inline]
    pub(crate) fn allow(&mut self, now: Time, want: u32) -> u32 {
        if self.rate == 0 {
            return want;
        }
        let cap = BURST_NS.max(self.cost_ns);
        self.credit_ns = self.credit_ns.saturating_add(now.ns_since(self.last)).min(cap);
        self.last = now;
        u32::try_from(self.credit_ns / self.cost_ns).unwrap_or(want).min(want)
    }

    #[inline]
    pub(crate) fn used(&mut self, commands: u32) {
        self.credit_ns = self.credit_ns.saturating_sub(u64::from(commands) * self.cost_ns);
    }

    /// When the next command may be fetched, if none may now.
    pub(crate) fn next(&self, now: Time) -> Time {
        if self.rate == 0 || self.credit_ns >= self.cost_ns { Time::NEVER } else { now.after_ns(self.cost_ns - self.credit_ns) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_kept_over_time_and_no_limit_costs_nothing() {
        let mut limit = Limit::none();
        assert_eq!(limit.allow(Time(1), 32), 32);
        limit.set(Time(0), 10_000);
        let mut fetched = 0;
        for us in (0..100_000).step_by(7) {
            let now = Time::from_us(us);
            let allowed = limit.allow(now, 32);
            limit.used(allowed);
            fetched += allowed;
        }
        assert!((990..=1_000).contains(&fetched), "{fetched} in 100 ms");
    }
}
