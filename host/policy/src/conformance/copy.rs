//! The suite of the `copy` role: bounds, and a small model of a migration that has to end.

use super::{Bench, Dice, Finding, setups};
use crate::packed::{self, Extent, NEVER, Region};
use crate::role::{Copy, CopyAnswer, CopyRequest, Then};
use crate::seam::{Factory, Opening, Setup};
use std::collections::VecDeque;

/// Runs the suite; an empty list is a pass.
pub fn suite_copy(factory: &mut dyn Factory<Copy>) -> Vec<Finding> {
    let mut bench = Bench::new(factory);
    for (name, setup) in setups() {
        bench.begin(format!("{name}, odd views"), Opening { setup: setup.clone(), extra: () });
        odd_views(&mut bench, &setup);
        if setup.namespaces.iter().map(|namespace| namespace.blocks).sum::<u64>() > MODEL_BLOCKS {
            continue;
        }
        for load in [Load::Idle, Load::Light, Load::Heavy] {
            bench.begin(format!("{name}, a migration under {load:?} load"), Opening { setup: setup.clone(), extra: () });
            let before = bench.findings.len();
            Model::new(&setup, load).run(&mut bench);
            if bench.findings.len() > before {
                // One migration that does not end is enough to know, and each takes long.
                return bench.findings;
            }
        }
    }
    bench.findings
}

/// Most blocks that the model keeps a bit for.
const MODEL_BLOCKS: u64 = 1 << 17;
/// Blocks that the model copies between two calls.
const STEP_BLOCKS: u64 = 4096;
/// Calls within which a migration has to end.
const MAX_CALLS: usize = 1000;
/// Calls in a row that may leave dirty blocks alone with nothing queued.
const MAX_IDLE_CALLS: usize = 100;

/// The regions of a set-up before anything was copied: each a power of two of blocks, the last of a namespace cut.
pub(super) fn layout(setup: &Setup) -> Vec<Region> {
    let total: u64 = setup.namespaces.iter().map(|namespace| namespace.blocks).sum();
    let size = total.div_ceil(u64::from(setup.regions.max(1))).next_power_of_two();
    let mut regions = Vec::new();
    for namespace in &setup.namespaces {
        let mut slba = 0;
        while slba < namespace.blocks {
            let blocks = size.min(namespace.blocks - slba) as u32;
            let nsid = namespace.nsid;
            regions.push(Region { slba, nsid, blocks, dirty: blocks, idle_ms: NEVER, first_copy_open: true, ..Region::default() });
            slba += u64::from(blocks);
        }
    }
    regions
}

/// Views with extreme numbers: whatever a host measures, the answer keeps its bounds.
fn odd_views(bench: &mut Bench<'_, Copy>, setup: &Setup) {
    let mut dice = Dice::new(setup.seed);
    let case = bench.case.clone();
    let mut request = CopyRequest::default();
    for step in 0..40u32 {
        bench.case = format!("{case} {step}");
        let extremes = [0, 1, u64::from(u32::MAX), u64::MAX, dice.next()];
        let mut any = || extremes[dice.below(5) as usize];
        request = CopyRequest {
            now_us: any(),
            unix_s: any() as i64,
            utc_offset_min: any() as i16,
            round: if step % 3 == 0 { step / 3 } else { any() as u32 },
            left_blocks: any(),
            queued_blocks: any(),
            dirtied_per_s: any(),
            copied_per_s: any(),
            peer_us: any() as u32,
            guest_p50_us: any() as u32,
            guest_p99_us: any() as u32,
            guest_p99_before_us: any() as u32,
            guest_iops: any() as u32,
            downtime_estimate_us: any() as u32,
            downtime_budget_us: any() as u32,
            may_throttle: step % 2 == 0,
            regions: Vec::new(),
        };
        for mut region in layout(setup) {
            region.dirty = dice.below(u64::from(region.blocks) + 1) as u32;
            region.changed = dice.next() as u32;
            region.idle_ms = [NEVER, 0, dice.next() as u32 % 20_000][dice.below(3) as usize];
            region.first_copy_open = dice.below(2) == 0;
            region.held = dice.below(4) == 0;
            region.push(&mut request.regions);
        }
        if step % 8 == 7 {
            request.regions.clear();
        }
        bench.ask(&request);
    }
    bench.case = case;
    bench.state(&request);
}

/// How much the guest of the model writes between two calls.
#[derive(Clone, Copy, Debug)]
enum Load {
    Idle,
    Light,
    Heavy,
}

/// A host with a guest, a map and a queue of extents; no clock, no device.
struct Model {
    regions: Vec<Region>,
    /// One flag a block, region after region.
    dirty: Vec<bool>,
    /// Where each region's flags begin.
    starts: Vec<usize>,
    queue: VecDeque<Extent>,
    dice: Dice,
    load: Load,
    now_us: u64,
    round: u32,
    /// Dirty blocks that the round has yet to copy.
    round_left: u64,
}

impl Model {
    fn new(setup: &Setup, load: Load) -> Self {
        let regions = layout(setup);
        let mut starts = Vec::with_capacity(regions.len());
        let mut total = 0;
        for region in &regions {
            starts.push(total);
            total += region.blocks as usize;
        }
        let dice = Dice::new(setup.seed);
        let queue = VecDeque::new();
        Self { regions, dirty: vec![true; total], starts, queue, dice, load, now_us: 1000, round: 0, round_left: total as u64 }
    }

    fn run(&mut self, bench: &mut Bench<'_, Copy>) {
        let mut idle = 0;
        for _ in 0..MAX_CALLS {
            let request = self.view();
            let Some(answer) = bench.ask(&request) else { return };
            if answer.then == Then::SwitchOver && request.downtime_estimate_us <= request.downtime_budget_us {
                return bench.state(&request);
            }
            self.queue.extend(packed::extents(&answer.extents));
            idle = if self.queue.is_empty() && request.left_blocks > 0 { idle + 1 } else { 0 };
            if idle > MAX_IDLE_CALLS {
                return bench.found(format!("{} blocks left, nothing queued, and no extent in {idle} calls", request.left_blocks));
            }
            self.step(&answer);
        }
        bench.found(format!("no switch-over within {MAX_CALLS} calls; {} blocks left in round {}", self.left(), self.round));
    }

    fn left(&self) -> u64 {
        self.regions.iter().map(|region| u64::from(region.dirty)).sum()
    }

    fn view(&self) -> CopyRequest {
        let left = self.left();
        let queued = self.queue.iter().map(|extent| u64::from(extent.blocks)).sum::<u64>().min(left);
        let mut request = CopyRequest {
            now_us: self.now_us,
            round: self.round,
            left_blocks: left,
            queued_blocks: queued,
            dirtied_per_s: self.writes() * 1000,
            copied_per_s: STEP_BLOCKS * 1000,
            peer_us: 20,
            guest_p50_us: 10,
            guest_p99_us: 30,
            guest_p99_before_us: 20,
            guest_iops: self.writes() as u32 * 1000,
            downtime_estimate_us: (100 + left / 4).min(u64::from(u32::MAX)) as u32,
            downtime_budget_us: 1000,
            ..CopyRequest::default()
        };
        self.regions.iter().for_each(|region| region.push(&mut request.regions));
        request
    }

    fn writes(&self) -> u64 {
        match self.load {
            Load::Idle => 0,
            Load::Light => 5,
            Load::Heavy => STEP_BLOCKS / 8,
        }
    }

    /// A millisecond: copies from the queue, writes of the guest, perhaps the end of a round.
    fn step(&mut self, answer: &CopyAnswer) {
        self.now_us += 1000;
        let mut budget = STEP_BLOCKS;
        while budget > 0 {
            let Some(extent) = self.queue.pop_front() else { break };
            let taken = u64::from(extent.blocks).min(budget);
            budget -= taken;
            self.copy(extent.nsid, extent.slba, taken);
            if taken < u64::from(extent.blocks) {
                let blocks = extent.blocks - taken as u32;
                self.queue.push_front(Extent { slba: extent.slba + taken, blocks, ..extent });
            }
        }
        for region in &mut self.regions {
            region.idle_ms = region.idle_ms.saturating_add(1);
        }
        let throttled = if answer.guest_iops_limit == 0 { u64::MAX } else { u64::from(answer.guest_iops_limit) / 1000 };
        let blocks = self.dirty.len() as u64;
        for _ in 0..self.writes().min(throttled) {
            // The guest writes to the first sixteenth.
            let at = self.dice.below(blocks.div_ceil(16)) as usize;
            let region = &mut self.regions[self.starts.partition_point(|start| *start <= at) - 1];
            region.dirty += u32::from(!core::mem::replace(&mut self.dirty[at], true));
            region.changed = region.changed.saturating_add(1);
            region.idle_ms = 0;
        }
        if self.round_left == 0 || self.queue.is_empty() && self.left() == 0 {
            self.round += 1;
            self.round_left = self.left();
            self.regions.iter_mut().for_each(|region| region.changed = 0);
        }
    }

    fn copy(&mut self, nsid: u32, slba: u64, blocks: u64) {
        // Regions lie in ascending order of namespace and LBA.
        let first = self.regions.partition_point(|region| (region.nsid, region.slba + u64::from(region.blocks)) <= (nsid, slba));
        for (region, &start) in self.regions.iter_mut().zip(&self.starts).skip(first) {
            let from = slba.max(region.slba);
            let to = (slba + blocks).min(region.slba + u64::from(region.blocks));
            if region.nsid != nsid || from >= to {
                break;
            }
            region.first_copy_open &= to < region.slba + u64::from(region.blocks);
            for flag in &mut self.dirty[start + (from - region.slba) as usize..start + (to - region.slba) as usize] {
                let was = u32::from(core::mem::take(flag));
                region.dirty -= was;
                self.round_left -= u64::from(was).min(self.round_left);
            }
        }
    }
}
