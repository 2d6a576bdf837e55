//! When to switch over, and what to do about a guest that dirties faster than can be copied.

use crate::exports::dray::policy::copy::{Then, View};
use dray_policy_sdk::settings::Settings;

/// How the rounds develop.
#[derive(Debug)]
pub struct Settle {
    aim_percent: u64,
    guest_floor_percent: u64,
    /// Dirty blocks when this round began, and when the one before did.
    pub(crate) left: u64,
    pub(crate) left_before: Option<u64>,
    /// Most commands per second that the guest did while nothing held it.
    pub(crate) guest_peak: u64,
    /// Its limit; 0 = none.
    pub(crate) limit: u32,
    throttled_round: u32,
}

impl Settle {
    pub(crate) fn new(settings: &mut Settings<'_>) -> Self {
        Self {
            aim_percent: settings.number("aim-percent", 10, 0, 100),
            guest_floor_percent: settings.number("guest-floor-percent", 25, 1, 100),
            left: 0,
            left_before: None,
            guest_peak: 0,
            limit: 0,
            throttled_round: 0,
        }
    }

    /// A round begins.
    pub fn begin(&mut self, view: &View) {
        self.left_before = (view.round > 0).then_some(self.left);
        self.left = view.left_blocks;
    }

    /// This round began with less than half of what the last one began with: another may help as well.
    fn shrinks(&self) -> bool {
        self.left_before.is_none_or(|before| self.left.saturating_mul(2) < before)
    }

    /// Within the budget: at once where it costs a fraction of it, else when another round would not make it cheaper.
    pub fn wish(&self, view: &View) -> Then {
        let (estimate, budget) = (u64::from(view.downtime_estimate_us), u64::from(view.downtime_budget_us));
        let cheap = estimate * 100 <= budget * self.aim_percent;
        let settled = cheap || view.left_blocks == 0 || !self.shrinks();
        if estimate <= budget && settled { Then::SwitchOver } else { Then::GoOn }
    }

    /// The guest's limit in commands per second, 0 = none. Only where the configuration allows it and rounds do not shrink: to
    /// where it dirties an eighth of what is copied, once per round, never below its floor, and for the rest of the migration.
    pub fn guest_limit(&mut self, view: &View) -> u32 {
        if !view.may_throttle {
            return 0;
        }
        if self.limit == 0 {
            self.guest_peak = self.guest_peak.max(view.guest_iops.into());
        }
        let over = view.downtime_estimate_us > view.downtime_budget_us;
        if over && view.round >= 2 && view.round != self.throttled_round && !self.shrinks() {
            let wanted = u64::from(view.guest_iops).saturating_mul(view.copied_per_s / 8) / view.dirtied_per_s.max(1);
            let now = if self.limit == 0 { self.guest_peak } else { self.limit.into() };
            let floor = (self.guest_peak * self.guest_floor_percent / 100).max(1);
            self.limit = wanted.min(now).max(floor) as u32;
            self.throttled_round = view.round;
            dray_policy_sdk::log!(Info, "round {} does not shrink: the guest is held to {} IOPS", view.round, self.limit);
        }
        self.limit
    }
}
