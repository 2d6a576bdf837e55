//! The suite of the `tracking` role.

use super::{Bench, Dice, Finding, setups};
use crate::packed::{NEVER, Region};
use crate::role::{RoundReport, Tracking, TrackingRequest};
use crate::seam::{Factory, Opening, Setup};

/// Runs the suite; an empty list is a pass.
pub fn suite_tracking(factory: &mut dyn Factory<Tracking>) -> Vec<Finding> {
    let mut bench = Bench::new(factory);
    for (name, setup) in setups() {
        bench.begin(name, Opening { setup: setup.clone(), extra: () });
        rounds(&mut bench, &setup);
    }
    bench.findings
}

fn rounds(bench: &mut Bench<'_, Tracking>, setup: &Setup) {
    let mut dice = Dice::new(setup.seed);
    let case = bench.case.clone();
    let mut request = TrackingRequest::default();
    for round in 0..12u32 {
        bench.case = format!("{case}, round {round}");
        request.now_us += 1000 + dice.below(1_000_000);
        request.last = (round > 0).then(|| report(&mut dice, round));
        request.regions.clear();
        for mut region in super::copy::layout(setup) {
            if round > 0 {
                region.first_copy_open = dice.below(8) == 0;
                region.dirty = dice.below(u64::from(region.blocks) + 1) as u32;
                region.changed = [0, dice.next() as u32, region.blocks, u32::MAX][dice.below(4) as usize];
                region.idle_ms = [NEVER, 0, dice.next() as u32 % 100_000][dice.below(3) as usize];
                region.held = dice.below(4) == 0;
            }
            region.push(&mut request.regions);
        }
        bench.ask(&request);
    }
    // No regions at all, and regions of odd sizes: bounds hold all the same.
    request.regions.clear();
    bench.ask(&request);
    for blocks in [0, 1, 3, u32::MAX] {
        Region { blocks, dirty: u32::MAX, changed: u32::MAX, ..Region::default() }.push(&mut request.regions);
    }
    bench.ask(&request);
    bench.case = case;
    bench.state(&request);
}

fn report(dice: &mut Dice, round: u32) -> RoundReport {
    let extremes = [0, 1, u64::MAX, dice.below(1 << 20)];
    RoundReport {
        number: round - 1,
        duration_us: extremes[dice.below(4) as usize],
        copied_blocks: extremes[dice.below(4) as usize],
        zero_blocks: extremes[dice.below(4) as usize],
        dirtied_blocks: extremes[dice.below(4) as usize],
    }
}
