//! An odd `copy` policy, to show who decides: highest LBA first, at full speed, switch over as soon as the budget allows.
#![cfg_attr(target_arch = "wasm32", no_std)]
extern crate alloc;

use alloc::{string::String, vec::Vec};
use dray_policy_sdk::State;
use dray_policy_sdk::packed::{Compression, Extents, Region};
use exports::dray::policy::copy::{Decision, Guest, Setup, Then, View};

dray_policy_sdk::policy!("copy-policy", Component);

/// The stride of a region record.
static STRIDE: State<u32> = State::empty();
struct Component;

impl Guest for Component {
    fn open(setup: Setup) -> Result<(), String> {
        STRIDE.set(setup.region_bytes);
        Ok(())
    }

    fn next(view: View, regions: Vec<u8>) -> Decision {
        STRIDE.with(|stride| decide(&view, &regions, *stride))
    }
}

/// Extents of one answer; the host takes no more than 4,096.
const MOST_EXTENTS: usize = 1024;

/// The regions with something to copy, the last one first.
fn decide(view: &View, regions: &[u8], stride: u32) -> Decision {
    let mut extents = Extents::default();
    if view.queued_blocks == 0 {
        let mut dirty: Vec<_> = Region::all(regions, stride).filter(|region| region.dirty() > 0).collect();
        dirty.sort_unstable_by_key(|region| core::cmp::Reverse((region.slba(), region.nsid())));
        for region in dirty.into_iter().take(MOST_EXTENTS) {
            extents.push(region.nsid(), region.slba(), region.blocks().into(), Compression::Plain);
        }
    }
    let then = if view.downtime_estimate_us <= view.downtime_budget_us { Then::SwitchOver } else { Then::GoOn };
    Decision { extents: extents.into_bytes(), bytes_per_s: 0, guest_iops_limit: 0, then, wait_us: 1000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_lba_comes_first() {
        let mut regions = vec![0_u8; 96];
        for (index, dirty) in [1_u8, 0, 1].into_iter().enumerate() {
            regions[index * 32] = index as u8 * 8;
            regions[index * 32 + 8] = 1;
            regions[index * 32 + 12] = 8;
            regions[index * 32 + 16] = dirty;
        }
        let mut view = View {
            now_us: 0,
            unix_s: 0,
            utc_offset_min: 0,
            round: 0,
            left_blocks: 2,
            queued_blocks: 0,
            dirtied_per_s: 0,
            copied_per_s: 0,
            peer_us: 0,
            guest_p50_us: 0,
            guest_p99_us: 0,
            guest_p99_before_us: 0,
            guest_iops: 0,
            downtime_estimate_us: 2,
            downtime_budget_us: 1,
            may_throttle: false,
        };
        let decision = decide(&view, &regions, 32);
        assert_eq!((decision.extents.len(), decision.extents[0], decision.extents[16]), (32, 16, 0));
        assert_eq!(decision.then, Then::GoOn);
        view.queued_blocks = 1;
        view.downtime_budget_us = 2;
        let decision = decide(&view, &regions, 32);
        assert_eq!((decision.extents.len(), decision.then), (0, Then::SwitchOver));
    }
}
