//! Which regions next: those that will not change again first, each kind in ascending LBA, so that the media is read in sequence.

use crate::exports::dray::policy::copy::View;
use alloc::vec::Vec;
use dray_policy_sdk::packed::{Compression, EXTENT_BLOCKS_MAX, Extents, Region};
use dray_policy_sdk::settings::Settings;

/// Extents that the host takes in one answer.
const MAX_EXTENTS: usize = 4096;
/// Classes of heat, coldest first.
const HEATS: u8 = 8;

/// What was ordered in this round.
#[derive(Debug)]
pub struct Order {
    batch_blocks: u64,
    /// A flag per region: ordered in this round already.
    pub(crate) ordered: Vec<bool>,
    heat: Vec<u8>,
}

impl Order {
    pub(crate) fn new(settings: &mut Settings<'_>, block_bytes: u64) -> Self {
        let batch_bytes = settings.number("batch-mib", 256, 1, 1 << 20) << 20;
        Self { batch_blocks: (batch_bytes / block_bytes).max(1), ordered: Vec::new(), heat: Vec::new() }
    }

    /// A round begins: everything dirty is to be ordered once.
    pub fn begin(&mut self) {
        self.ordered.clear();
    }

    /// The next extents, packed; none while enough is queued.
    pub fn next(&mut self, view: &View, regions: &[u8], stride: u32) -> Vec<u8> {
        if view.left_blocks <= view.queued_blocks || view.queued_blocks >= self.batch_blocks / 2 {
            return Vec::new();
        }
        self.heat.clear();
        self.heat.extend(Region::all(regions, stride).map(heat));
        self.ordered.resize(self.heat.len(), false);
        let batch = self.batch(regions, stride, false);
        if !batch.is_empty() || view.queued_blocks > 0 {
            return batch.into_bytes();
        }
        // All was ordered once and yet something is left: changes of this round, or regions that are held. Either way, go on.
        self.ordered.fill(false);
        self.batch(regions, stride, true).into_bytes()
    }

    fn batch(&mut self, regions: &[u8], stride: u32, held_too: bool) -> Extents {
        let mut extents = Extents::default();
        let (mut run, mut dirty) = (Run::default(), 0);
        for class in 0..HEATS {
            for (index, region) in Region::all(regions, stride).enumerate() {
                let skip = self.heat[index] != class || self.ordered[index] || region.dirty() == 0;
                if skip || region.is_held() && !held_too {
                    continue;
                }
                let pieces = region.blocks().div_ceil(EXTENT_BLOCKS_MAX) as usize;
                if dirty >= self.batch_blocks || extents.len() + run.pieces() + pieces > MAX_EXTENTS {
                    run.end(&mut extents);
                    return extents;
                }
                dirty += u64::from(region.dirty());
                self.ordered[index] = true;
                run.add(region, &mut extents);
            }
        }
        run.end(&mut extents);
        extents
    }
}

/// Neighbouring regions as one extent.
#[derive(Default)]
struct Run {
    nsid: u32,
    slba: u64,
    blocks: u64,
}

impl Run {
    fn add(&mut self, region: Region<'_>, extents: &mut Extents) {
        if region.nsid() != self.nsid || region.slba() != self.slba.saturating_add(self.blocks) {
            self.end(extents);
            (self.nsid, self.slba) = (region.nsid(), region.slba());
        }
        self.blocks += u64::from(region.blocks());
    }

    /// How many extents it will take.
    fn pieces(&self) -> usize {
        self.blocks.div_ceil(u64::from(EXTENT_BLOCKS_MAX)) as usize
    }

    fn end(&mut self, extents: &mut Extents) {
        extents.push(self.nsid, self.slba, self.blocks, Compression::Plain);
        self.blocks = 0;
    }
}

/// How soon a region is likely to change again: by how long it has been left alone, and the busiest by how much of it changed.
fn heat(region: Region<'_>) -> u8 {
    match region.idle_ms() {
        None => 0,
        Some(10_000..) => 1,
        Some(1_000..) => 2,
        Some(100..) => 3,
        Some(_) => match u64::from(region.changed()) * 8 / u64::from(region.blocks().max(1)) {
            0 => 4,
            1..4 => 5,
            4..8 => 6,
            _ => 7,
        },
    }
}
