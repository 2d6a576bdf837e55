//! Rates: a token bucket that limits, and a meter that remembers how fast the copy is when nothing holds it back.

use dray_device::poll::Time;

const SECOND_NS: u128 = 1_000_000_000;

/// Limits bytes per second, with a burst of ten milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenBucket {
    /// Bytes per second; 0 = no limit.
    rate: u64,
    tokens: u64,
    filled: Time,
}

impl TokenBucket {
    /// Sets the limit in bytes per second; 0 = none.
    pub fn limit(&mut self, now: Time, rate: u64) {
        if rate != self.rate {
            self.refill(now);
            self.rate = rate;
            self.tokens = self.tokens.min(self.burst());
        }
    }

    /// The limit in bytes per second; 0 = none.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }

    fn burst(&self) -> u64 {
        (self.rate / 100).max(1)
    }

    fn refill(&mut self, now: Time) {
        let earned = u128::from(now.ns_since(self.filled)) * u128::from(self.rate) / SECOND_NS;
        if earned > 0 || self.rate == 0 {
            self.tokens = self.tokens.saturating_add(u64::try_from(earned).unwrap_or(u64::MAX)).min(self.burst());
            self.filled = now;
        }
    }

    /// Whether a transfer may start now: the bucket may go into debt by one transfer, which is paid back before the next.
    #[inline]
    pub fn may_start(&mut self, now: Time) -> bool {
        if self.rate == 0 {
            return true;
        }
        self.refill(now);
        self.tokens > 0
    }

    /// A transfer of that many bytes has started.
    #[inline]
    pub fn spend(&mut self, now: Time, bytes: u64) {
        if self.rate == 0 {
            return;
        }
        if bytes > self.tokens {
            // Debt: the bucket starts to fill only when it is paid.
            let debt_ns = u128::from(bytes - self.tokens) * SECOND_NS / u128::from(self.rate);
            self.filled = now.after_ns(u64::try_from(debt_ns).unwrap_or(u64::MAX));
            self.tokens = 0;
        } else {
            self.tokens -= bytes;
        }
    }

    /// When the next transfer may start.
    #[must_use]
    pub fn ready_at(&self) -> Time {
        if self.rate == 0 || self.tokens > 0 { Time(0) } else { self.filled.after_ns((SECOND_NS as u64 / self.rate) + 1) }
    }
}

/// How fast bytes are copied while there is something to copy: an average that forgets.
#[derive(Clone, Copy, Debug, Default)]
pub struct RateMeter {
    bytes: u64,
    busy_ns: u64,
}

/// Busy time after which the past counts half.
const HALF_NS: u64 = 50_000_000;

impl RateMeter {
    /// Counts bytes copied in a busy time.
    pub fn add(&mut self, bytes: u64, busy_ns: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.busy_ns = self.busy_ns.saturating_add(busy_ns);
        if self.busy_ns > 2 * HALF_NS {
            self.bytes /= 2;
            self.busy_ns /= 2;
        }
    }

    /// Bytes per second; `None` before anything was measured.
    #[must_use]
    pub fn per_second(&self) -> Option<u64> {
        (self.busy_ns > 0 && self.bytes > 0)
            .then(|| u64::try_from(u128::from(self.bytes) * SECOND_NS / u128::from(self.busy_ns)).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_keeps_its_rate_whatever_the_transfer() {
        for transfer in [512u64, 4096, 65_536, 1 << 20] {
            let mut bucket = TokenBucket::default();
            bucket.limit(Time(0), 100 << 20);
            let mut sent = 0;
            for us in 0..1_000_000u64 {
                let now = Time::from_us(us);
                if bucket.may_start(now) {
                    bucket.spend(now, transfer);
                    sent += transfer;
                }
            }
            let want = 100u64 << 20;
            let most = want + want / 50 + transfer;
            assert!((want * 95 / 100..=most).contains(&sent), "{transfer}: {sent}");
        }
    }

    #[test]
    fn no_limit_is_no_limit() {
        let mut bucket = TokenBucket::default();
        bucket.spend(Time(0), u64::MAX);
        assert!(bucket.may_start(Time(0)) && bucket.ready_at() == Time(0));
    }

    #[test]
    fn a_meter_forgets_the_past() {
        let mut meter = RateMeter::default();
        assert_eq!(meter.per_second(), None);
        meter.add(1000, 1_000_000_000);
        for _ in 0..200 {
            meter.add(10_000, 10_000_000);
        }
        let rate = meter.per_second().expect("measured");
        assert!((990_000..=1_010_000).contains(&rate), "{rate}");
    }
}
