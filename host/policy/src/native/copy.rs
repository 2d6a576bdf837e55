//! Orders the media: cold regions first and hot ones last, each in ascending LBA; as fast as the guest bears; and says when to
//! switch over.

use super::Settings;
use crate::packed::{self, Compression, Extent, MAX_EXTENT_BLOCKS, NEVER, Region};
use crate::role::{Copy, CopyAnswer, CopyRequest, MAX_EXTENTS, Then};
use crate::seam::{Fault, Opening, Policy};

const MIB: u64 = 1 << 20;
/// Classes of heat, coldest first.
const HEATS: u8 = 8;

/// The native `copy` policy. Settings: `batch-mib`, `look-us`, `p99-factor`, `p99-calm-us`, `floor-mib-per-s`, `aim-percent`,
/// `guest-floor-percent`.
#[derive(Debug)]
pub struct NativeCopy {
    block_bytes: u64,
    batch_blocks: u64,
    look_us: u32,
    order: Order,
    pace: Pace,
    settle: Settle,
}

/// What has been ordered in this round.
#[derive(Debug, Default)]
struct Order {
    round: Option<u32>,
    heat: Vec<u8>,
    done: Vec<bool>,
}

/// How fast to copy: cut when the guest's p99 suffers, raised again slowly.
#[derive(Debug)]
struct Pace {
    factor: u64,
    calm_us: u64,
    floor: u64,
    limit: u64,
    suffered: bool,
    changed_us: u64,
}

/// Whether rounds still shrink, and what to do when they do not.
#[derive(Debug)]
struct Settle {
    aim_percent: u64,
    guest_floor_percent: u64,
    start_left: u64,
    previous_left: Option<u64>,
    guest_peak: u64,
    guest_limit: u32,
    throttled_round: u32,
}

impl NativeCopy {
    /// Opens the policy.
    ///
    /// # Errors
    /// [`Fault::Refused`] for a setting that is unknown or out of bounds.
    pub fn open(opening: &Opening<Copy>) -> Result<Self, Fault> {
        let mut settings = Settings::of(&opening.setup);
        let batch = settings.number("batch-mib", 256, 1, 1 << 20);
        let look_us = settings.number("look-us", 20_000, 100, 10_000_000) as u32;
        let factor = settings.number("p99-factor", 4, 1, 1000);
        let calm_us = settings.number("p99-calm-us", 50, 0, 10_000_000);
        let floor = settings.number("floor-mib-per-s", 200, 1, 1 << 20);
        let aim_percent = settings.number("aim-percent", 10, 0, 100);
        let guest_floor_percent = settings.number("guest-floor-percent", 25, 1, 100);
        settings.finish()?;
        let largest = opening.setup.namespaces.iter().map(|namespace| namespace.block_bytes).max();
        let block_bytes = u64::from(largest.unwrap_or(512).max(1));
        Ok(Self {
            block_bytes,
            batch_blocks: (batch * MIB / block_bytes).max(1),
            look_us,
            order: Order::default(),
            pace: Pace { factor, calm_us, floor: floor * MIB, limit: 0, suffered: false, changed_us: 0 },
            settle: Settle {
                aim_percent,
                guest_floor_percent,
                start_left: 0,
                previous_left: None,
                guest_peak: 0,
                guest_limit: 0,
                throttled_round: 0,
            },
        })
    }
}

impl Policy<Copy> for NativeCopy {
    fn call(&mut self, request: &CopyRequest, answer: &mut CopyAnswer) -> Result<(), Fault> {
        if self.order.round != Some(request.round) {
            self.order.begin(request.round);
            self.settle.begin(request);
        }
        if request.left_blocks > request.queued_blocks && request.queued_blocks < self.batch_blocks / 2 {
            self.order.fill(request, self.batch_blocks, &mut answer.extents);
        }
        answer.bytes_per_s = self.pace.update(request, self.block_bytes);
        answer.guest_iops_limit = self.settle.throttle(request);
        answer.then = self.settle.wish(request);
        answer.wait_us = self.look_us;
        Ok(())
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        Ok(None)
    }
}

/// How soon a region is likely to change again: never changed, long ago, ..., just now and often.
fn heat(region: &Region) -> u8 {
    match region.idle_ms {
        NEVER => 0,
        10_000.. => 1,
        1_000.. => 2,
        100.. => 3,
        _ => match u64::from(region.changed) * 8 / u64::from(region.blocks.max(1)) {
            0 => 4,
            1..=3 => 5,
            4..=7 => 6,
            _ => 7,
        },
    }
}

impl Order {
    fn begin(&mut self, round: u32) {
        self.round = Some(round);
        self.done.clear();
    }

    /// Appends extents of regions not ordered in this round yet. Where all were, and nothing is queued any more, what is dirty
    /// is ordered again, held regions too: something has to go on.
    fn fill(&mut self, request: &CopyRequest, batch_blocks: u64, out: &mut Vec<u8>) {
        let regions = packed::regions(&request.regions);
        self.heat.clear();
        self.heat.extend(regions.clone().map(|region| heat(&region)));
        self.done.resize(regions.len(), false);
        self.pick(&request.regions, false, batch_blocks, out);
        if out.is_empty() && request.queued_blocks == 0 {
            self.done.fill(false);
            self.pick(&request.regions, true, batch_blocks, out);
        }
    }

    fn pick(&mut self, regions: &[u8], held_too: bool, batch_blocks: u64, out: &mut Vec<u8>) {
        let mut batch = Batch { out, open: None, dirty: 0, extents: 0 };
        for class in 0..HEATS {
            for (index, region) in packed::regions(regions).enumerate() {
                if self.heat[index] != class || self.done[index] || region.dirty == 0 || region.held && !held_too {
                    continue;
                }
                if !batch.add(&region, batch_blocks) {
                    return batch.close();
                }
                self.done[index] = true;
            }
        }
        batch.close();
    }
}

/// The extents of one answer; neighbouring regions become one extent.
struct Batch<'a> {
    out: &'a mut Vec<u8>,
    open: Option<Extent>,
    dirty: u64,
    extents: usize,
}

impl Batch<'_> {
    /// Adds a region, unless the batch is full.
    fn add(&mut self, region: &Region, batch_blocks: u64) -> bool {
        // A region larger than one extent can name takes several.
        let pieces = region.blocks.div_ceil(MAX_EXTENT_BLOCKS) as usize;
        if self.dirty >= batch_blocks || self.extents + pieces > MAX_EXTENTS {
            return false;
        }
        self.dirty += u64::from(region.dirty);
        let (mut slba, mut left) = (region.slba, region.blocks);
        while left > 0 {
            let blocks = left.min(MAX_EXTENT_BLOCKS);
            self.append(Extent { slba, blocks, compression: Compression::PLAIN, nsid: region.nsid });
            slba = slba.saturating_add(u64::from(blocks));
            left -= blocks;
        }
        true
    }

    fn append(&mut self, next: Extent) {
        if let Some(open) = &mut self.open {
            let follows = open.nsid == next.nsid && open.slba.saturating_add(u64::from(open.blocks)) == next.slba;
            if follows && open.blocks + next.blocks <= MAX_EXTENT_BLOCKS {
                open.blocks += next.blocks;
                return;
            }
            open.push(self.out);
        }
        self.open = Some(next);
        self.extents += 1;
    }

    fn close(self) {
        if let Some(open) = self.open {
            open.push(self.out);
        }
    }
}

impl Pace {
    /// The rate limit in bytes per second, 0 = none. At most one change per 10 ms; a cut needs two bad views in a row, since the
    /// p99 of a short time is one command.
    fn update(&mut self, request: &CopyRequest, block_bytes: u64) -> u64 {
        let (p99, before) = (u64::from(request.guest_p99_us), u64::from(request.guest_p99_before_us));
        if p99 == 0 || before == 0 || request.now_us.saturating_sub(self.changed_us) < 10_000 {
            return self.limit;
        }
        let bound = (self.factor * before).max(self.calm_us);
        let suffers = p99 > bound;
        // Slower than the guest dirties, twice over, never ends.
        let floor = self.floor.max(request.dirtied_per_s.saturating_mul(2).saturating_mul(block_bytes));
        let measured = request.copied_per_s.saturating_mul(block_bytes);
        if suffers && self.suffered {
            let now = if self.limit == 0 { measured } else { self.limit };
            self.limit = (now - now / 10 * 3).max(floor);
            self.changed_us = request.now_us;
        } else if !suffers && self.limit != 0 && p99 * 4 < bound * 3 {
            self.limit = self.limit.saturating_add(self.limit / 10).max(floor);
            self.changed_us = request.now_us;
            // The copy no longer reaches the limit: something else bounds it.
            if measured.saturating_mul(2) < self.limit && measured > self.floor {
                self.limit = 0;
            }
        }
        self.suffered = suffers;
        self.limit
    }
}

impl Settle {
    fn begin(&mut self, request: &CopyRequest) {
        self.previous_left = (request.round > 0).then_some(self.start_left);
        self.start_left = request.left_blocks;
    }

    /// Another round is worth it only if this one began with less than half of what the last one began with.
    fn shrinks(&self) -> bool {
        self.previous_left.is_none_or(|previous| self.start_left.saturating_mul(2) < previous)
    }

    /// Switch over at once where the cost is a fraction of the budget; within the budget, when rounds no longer help.
    fn wish(&self, request: &CopyRequest) -> Then {
        let (estimate, budget) = (u64::from(request.downtime_estimate_us), u64::from(request.downtime_budget_us));
        let cheap = estimate.saturating_mul(100) <= budget * self.aim_percent;
        if estimate <= budget && (cheap || request.left_blocks == 0 || !self.shrinks()) {
            Then::SwitchOver
        } else {
            Then::GoOn
        }
    }

    /// The guest's limit in commands per second, 0 = none. Once per round that does not shrink, the guest is brought to where it
    /// dirties an eighth of what is copied, but never below its floor; it is let go only by the end of the migration.
    fn throttle(&mut self, request: &CopyRequest) -> u32 {
        if self.guest_limit == 0 {
            self.guest_peak = self.guest_peak.max(u64::from(request.guest_iops));
        }
        let over = request.downtime_estimate_us > request.downtime_budget_us;
        if !request.may_throttle {
            self.guest_limit = 0;
        } else if over && request.round >= 2 && request.round != self.throttled_round && !self.shrinks() {
            let wanted = u64::from(request.guest_iops).saturating_mul(request.copied_per_s / 8) / request.dirtied_per_s.max(1);
            let floor = (self.guest_peak * self.guest_floor_percent / 100).max(1);
            let current = if self.guest_limit == 0 { self.guest_peak } else { u64::from(self.guest_limit) };
            self.guest_limit = wanted.min(current).max(floor).min(u64::from(u32::MAX)) as u32;
            self.throttled_round = request.round;
        }
        self.guest_limit
    }
}

#[cfg(test)]
#[path = "copy_tests.rs"]
mod tests;
