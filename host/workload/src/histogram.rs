//! Latencies: fixed log-linear buckets of about 3 %, written by one thread without a lock, read by any.

use std::sync::atomic::{AtomicU64, Ordering};

/// Buckets of one power of two, as a power of two.
const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
/// Values from 2^40 ns (18 minutes) on share the last bucket.
const MAX_BITS: u32 = 40;
/// Buckets in all.
pub const BUCKETS: usize = (MAX_BITS - SUB_BITS + 1) as usize * SUB;

/// Counts of values in nanoseconds. One thread records; others may load at any time.
#[derive(Debug)]
pub struct Histogram {
    counts: Box<[AtomicU64]>,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts a value of `ns` nanoseconds. To be called by one thread alone: it costs plain loads and stores.
    #[inline]
    pub fn record(&self, ns: u64) {
        if let Some(count) = self.counts.get(bucket(ns)) {
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        if ns > self.max.load(Ordering::Relaxed) {
            self.max.store(ns, Ordering::Relaxed);
        }
    }

    /// Adds the counts so far to `counts`.
    pub fn add_to(&self, counts: &mut [u64; BUCKETS]) {
        for (sum, count) in counts.iter_mut().zip(&self.counts) {
            *sum += count.load(Ordering::Relaxed);
        }
    }

    /// The largest value so far, in nanoseconds.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max.load(Ordering::Relaxed)
    }
}

#[inline]
fn bucket(ns: u64) -> usize {
    if ns < SUB as u64 {
        return ns as usize;
    }
    let power = ns.ilog2();
    if power >= MAX_BITS {
        return BUCKETS - 1;
    }
    let shift = power - SUB_BITS;
    ((shift as usize + 1) << SUB_BITS) + ((ns >> shift) as usize - SUB)
}

/// The largest value that falls into a bucket, in nanoseconds.
fn upper(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let shift = (bucket >> SUB_BITS) as u32 - 1;
    (((bucket & (SUB - 1)) as u64 + SUB as u64 + 1) << shift) - 1
}

/// How many values were counted.
#[must_use]
pub fn total(counts: &[u64; BUCKETS]) -> u64 {
    counts.iter().sum()
}

/// The value in nanoseconds that `per_mille` thousandths of all values do not exceed (to the bucket's upper end); 0 without
/// values.
#[must_use]
pub fn quantile(counts: &[u64; BUCKETS], per_mille: u64) -> u64 {
    let all = u128::from(total(counts));
    let rank = (all * u128::from(per_mille.min(1000))).div_ceil(1000).max(1);
    let mut seen = 0u128;
    for (bucket, count) in counts.iter().enumerate() {
        seen += u128::from(*count);
        if seen >= rank {
            return upper(bucket);
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_without_gaps() {
        let mut last = 0;
        for ns in 0..5000 {
            let bucket = bucket(ns);
            assert!(bucket == last || bucket == last + 1, "{ns}");
            assert!(upper(bucket) >= ns && upper(bucket) <= ns + ns / 32 + 1, "{ns}: {}", upper(bucket));
            last = bucket;
        }
        for ns in (13..63).flat_map(|power| [(1u64 << power) - 1, 1 << power, (1 << power) + 1]) {
            let bucket = bucket(ns);
            assert!(bucket >= last && bucket < BUCKETS, "{ns}");
            assert!(ns >> MAX_BITS > 0 || (upper(bucket) >= ns && upper(bucket) <= ns + ns / 32), "{ns}: {}", upper(bucket));
            last = bucket;
        }
    }

    #[test]
    fn quantiles_come_from_the_counts() {
        let histogram = Histogram::default();
        for ns in 1..=1000 {
            histogram.record(ns * 1000);
        }
        let mut counts = [0; BUCKETS];
        assert_eq!(quantile(&counts, 500), 0);
        histogram.add_to(&mut counts);
        assert_eq!(total(&counts), 1000);
        for (per_mille, ns) in [(500, 500_000u64), (990, 990_000), (1000, 1_000_000)] {
            let found = quantile(&counts, per_mille);
            assert!(found >= ns && found <= ns + ns / 32 + 1, "{per_mille}: {found}");
        }
        assert_eq!(histogram.max(), 1_000_000);
    }
}
