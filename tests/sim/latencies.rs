//! What a guest sees of its controller: latencies and rate since the last look.

use dray_device::poll::Time;
use dray_migration::GuestSample;

/// Latencies since the last sample, in quarters of powers of two.
#[derive(Debug)]
pub struct Latencies {
    counts: [u32; 256],
    before_us: u32,
    commands: u64,
    /// The last sample, and the last poll.
    since: Time,
    now: Time,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: [0; 256], before_us: 0, commands: 0, since: Time(0), now: Time(0) }
    }
}

impl Latencies {
    /// What the time is.
    pub fn tick(&mut self, now: Time) {
        self.now = now;
    }

    /// A command has ended, after so many nanoseconds.
    pub fn add(&mut self, ns: u64) {
        let ns = ns.max(4);
        let log = ns.ilog2();
        let bucket = (log << 2) as usize | (ns >> (log - 2) & 3) as usize;
        self.counts[bucket] += 1;
        self.commands += 1;
    }

    fn quantile_us(&self, per_mille: u64) -> u32 {
        let wanted = (self.commands * per_mille).div_ceil(1_000).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= wanted {
                let ns = (5 + (bucket as u128 & 3)) << (bucket >> 2).max(2) >> 2;
                return u32::try_from(ns.div_ceil(1_000)).unwrap_or(u32::MAX);
            }
        }
        0
    }

    /// What was seen since the last call.
    pub fn sample(&mut self) -> GuestSample {
        let [p50_us, p99_us] = [500, 990].map(|per_mille| self.quantile_us(per_mille));
        if self.before_us == 0 {
            self.before_us = p99_us;
        }
        let iops = (u128::from(self.commands) * 1_000_000_000).checked_div(u128::from(self.now.ns_since(self.since))).unwrap_or(0);
        let iops = u32::try_from(iops).unwrap_or(u32::MAX);
        *self = Self { before_us: self.before_us, since: self.now, now: self.now, ..Self::default() };
        GuestSample { p50_us, p99_us, p99_before_us: self.before_us, iops }
    }
}
