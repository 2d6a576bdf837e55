//! How fast: without a limit until the guest's latency suffers, then 30 % less, and 10 % more whenever it has recovered.

use crate::exports::dray::policy::copy::View;
use dray_policy_sdk::settings::Settings;

/// Between two changes of the rate: a change has to show first.
const CHANGE_US: u64 = 10_000;

/// The rate limit and what it reacts to.
#[derive(Debug)]
pub struct Pace {
    block_bytes: u64,
    factor: u64,
    calm_us: u64,
    floor: u64,
    /// Bytes per second; 0 = no limit.
    pub(crate) limit: u64,
    /// The last view was a bad one.
    suffered: bool,
    changed_us: u64,
}

impl Pace {
    pub(crate) fn new(settings: &mut Settings<'_>, block_bytes: u64) -> Self {
        Self {
            block_bytes,
            factor: settings.number("p99-factor", 4, 1, 1000),
            calm_us: settings.number("p99-calm-us", 50, 0, 10_000_000),
            floor: settings.number("floor-mib-per-s", 200, 1, 1 << 20) << 20,
            limit: 0,
            suffered: false,
            changed_us: 0,
        }
    }

    /// The limit from now on, in bytes per second; 0 = none.
    pub fn rate(&mut self, view: &View) -> u64 {
        let (p99, before) = (u64::from(view.guest_p99_us), u64::from(view.guest_p99_before_us));
        if p99 == 0 || before == 0 || view.now_us.saturating_sub(self.changed_us) < CHANGE_US {
            return self.limit;
        }
        let bound = (self.factor * before).max(self.calm_us);
        // The p99 of a short time is one command: two bad views in a row, then.
        let (suffered, suffers) = (self.suffered, p99 > bound);
        self.suffered = suffers;
        if suffers && suffered {
            self.cut(view);
        } else if p99 * 4 < bound * 3 && self.limit != 0 {
            self.raise(view);
        }
        self.limit
    }

    fn cut(&mut self, view: &View) {
        let now = if self.limit == 0 { self.measured(view) } else { self.limit };
        // A copy slower than the guest dirties, twice over, never ends.
        let floor = self.floor.max(view.dirtied_per_s.saturating_mul(2).saturating_mul(self.block_bytes));
        self.limit = (now - now / 10 * 3).max(floor);
        self.changed_us = view.now_us;
    }

    fn raise(&mut self, view: &View) {
        self.limit = self.limit.saturating_add(self.limit / 10);
        self.changed_us = view.now_us;
        let measured = self.measured(view);
        if measured > self.floor && measured < self.limit / 2 {
            // Something else bounds the copy; a limit that is never reached is none.
            self.limit = 0;
        }
    }

    fn measured(&self, view: &View) -> u64 {
        view.copied_per_s.saturating_mul(self.block_bytes)
    }
}
