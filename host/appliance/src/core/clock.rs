//! The one place where time is read.

use dray_device::poll::Time;
use dray_policy::seam::Meter;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The appliance's monotonic clock. Copies tell the same time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// A clock that starts now.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// The time since its start.
    #[inline]
    #[must_use]
    pub fn now(&self) -> Time {
        Time(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

impl Meter for Clock {
    fn now_ns(&self) -> u64 {
        self.now().0
    }
}

/// Seconds since 1970 UTC, for policies that know of night and day.
#[must_use]
pub fn unix_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}
