//! The default `copy` policy: cold regions first and hot ones last, as fast as the guest bears, and over when another round
//! would not help.
//!
//! Three decisions, a module each: [`order`] (which regions next), [`pace`] (how fast), [`settle`] (when to switch over, and when to
//! slow the guest down). Here is what ties them to the interface, and the state that a successor gets.
//!
//! Settings: `batch-mib` (ordered at once), `look-us` (how often it wants to be asked), `p99-factor` and `p99-calm-us` (when the
//! guest suffers), `floor-mib-per-s` (never slower than that), `aim-percent` (of the downtime budget: cheap enough at once),
//! `guest-floor-percent` (of its own rate: what a throttled guest keeps).
#![cfg_attr(target_arch = "wasm32", no_std)]
extern crate alloc;

pub mod order;
pub mod pace;
pub mod settle;
mod state;

use alloc::{string::String, vec::Vec};
use dray_policy_sdk::State;
use dray_policy_sdk::settings::Settings;
use exports::dray::policy::copy::{Decision, Guest, Setup, View};
use order::Order;
use pace::Pace;
use settle::Settle;

dray_policy_sdk::policy!("copy-policy-with-state", Component);

static POLICY: State<Policy> = State::empty();
struct Component;

/// The three decisions together.
#[derive(Debug)]
pub struct Policy {
    region_bytes: u32,
    look_us: u32,
    round: Option<u32>,
    order: Order,
    pace: Pace,
    settle: Settle,
}

impl Policy {
    /// Reads the settings.
    ///
    /// # Errors
    /// A setting that is unknown or out of bounds.
    pub fn new(setup: &Setup) -> Result<Self, String> {
        let mut settings = Settings::of(&setup.settings);
        let largest = setup.namespaces.iter().map(|namespace| namespace.block_bytes).max();
        let block_bytes = u64::from(largest.unwrap_or(512).max(1));
        let policy = Self {
            region_bytes: setup.region_bytes,
            look_us: settings.number("look-us", 20_000, 100, 10_000_000) as u32,
            round: None,
            order: Order::new(&mut settings, block_bytes),
            pace: Pace::new(&mut settings, block_bytes),
            settle: Settle::new(&mut settings),
        };
        settings.finish()?;
        Ok(policy)
    }

    /// Answers one view.
    pub fn decide(&mut self, view: &View, regions: &[u8]) -> Decision {
        if self.round != Some(view.round) {
            self.round = Some(view.round);
            self.order.begin();
            self.settle.begin(view);
        }
        Decision {
            extents: self.order.next(view, regions, self.region_bytes),
            bytes_per_s: self.pace.rate(view),
            guest_iops_limit: self.settle.guest_limit(view),
            then: self.settle.wish(view),
            wait_us: self.look_us,
        }
    }
}

impl Guest for Component {
    fn open(setup: Setup) -> Result<(), String> {
        POLICY.set(Policy::new(&setup)?);
        Ok(())
    }

    fn next(view: View, regions: Vec<u8>) -> Decision {
        POLICY.with(|policy| policy.decide(&view, &regions))
    }
}

impl exports::dray::policy::state::Guest for Component {
    fn save() -> Vec<u8> {
        POLICY.with(|policy| policy.save())
    }

    fn load(bytes: Vec<u8>) -> Result<(), String> {
        POLICY.with(|policy| policy.load(&bytes))
    }
}

#[cfg(test)]
mod tests;
