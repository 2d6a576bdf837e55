//! When an appliance that ended by itself is started again.

use std::time::Duration;

/// After the first failure.
const FIRST: Duration = Duration::from_millis(500);
/// At most.
const MOST: Duration = Duration::from_secs(30);
/// Failures in a row, after which it is given up.
const FAILURES: u32 = 8;
/// One that ran for so long has not failed at its start.
const GOOD: Duration = Duration::from_secs(60);

/// Counts failures in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// It ended after so long. Returns how long to wait; `None` gives it up.
    pub fn ended(&mut self, ran: Duration) -> Option<Duration> {
        if ran >= GOOD {
            self.failures = 0;
        }
        self.failures += 1;
        (self.failures <= FAILURES).then(|| FIRST.saturating_mul(1 << (self.failures - 1)).min(MOST))
    }

    /// Failures in a row.
    #[must_use]
    pub fn failures(self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..8).map(|_| backoff.ended(Duration::from_secs(1)).expect("again").as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(backoff.ended(Duration::from_secs(59)), None);
        assert_eq!(backoff.ended(GOOD), Some(FIRST), "one that ran well counts anew");
    }
}
