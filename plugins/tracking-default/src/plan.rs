//! The plan of a round: the chunk of each region, and which regions wait.

use crate::dray::policy::types::Namespace;
use crate::exports::dray::policy::tracking::{Round, Setup};
use alloc::string::String;
use alloc::vec::Vec;
use dray_policy_sdk::packed::{Region, choice};
use dray_policy_sdk::settings::Settings;

/// The policy.
#[derive(Debug)]
pub struct Plan {
    namespaces: Vec<Namespace>,
    region_bytes: u32,
    min_bytes: u64,
    max_bytes: u64,
    hold_us: u64,
}

impl Plan {
    /// Reads the settings.
    ///
    /// # Errors
    /// A setting that is unknown or out of bounds.
    pub fn new(setup: &Setup) -> Result<Self, String> {
        let mut settings = Settings::of(&setup.settings);
        let min_bytes = settings.number("chunk-min-kib", 64, 4, 65_536) << 10;
        let max_bytes = settings.number("chunk-max-kib", 1024, 4, 65_536) << 10;
        let hold_us = settings.number("hold-us", 200, 0, 1_000_000);
        settings.finish()?;
        let mut namespaces = setup.namespaces.clone();
        namespaces.sort_unstable_by_key(|namespace| namespace.nsid);
        Ok(Self { namespaces, region_bytes: setup.region_bytes, min_bytes, max_bytes: max_bytes.max(min_bytes), hold_us })
    }

    /// One choice per region.
    pub fn round(&self, last: Option<&Round>, regions: &[u8]) -> Vec<u8> {
        let mut may_hold = self.may_hold(last);
        let plan = |region: Region<'_>| {
            let blocks = u64::from(region.blocks());
            let hold = is_hot(region) && blocks <= may_hold;
            if hold {
                may_hold -= blocks;
            }
            choice(self.chunk_log2(region), hold)
        };
        Region::all(regions, self.region_bytes).map(plan).collect()
    }

    /// How many blocks may be held. A held block is copied while the guest stands still: as many as the last round copied in
    /// `hold-us`, then. The full round tells nothing yet about who is hot.
    fn may_hold(&self, last: Option<&Round>) -> u64 {
        match last {
            Some(last) if last.number > 0 => {
                last.copied_blocks.saturating_mul(self.hold_us).checked_div(last.duration_us).unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// Where a half is dirty, neighbours nearly always are, and one long read is cheaper than many short ones; where an eighth
    /// is not, a long read would mostly carry what is clean.
    fn chunk_log2(&self, region: Region<'_>) -> u8 {
        let blocks = u64::from(region.blocks()).max(1);
        let bytes = match u64::from(region.dirty()) * 8 / blocks {
            0 => self.min_bytes,
            1..4 => (self.min_bytes * 4).min(self.max_bytes),
            _ => self.max_bytes,
        };
        let at = self.namespaces.binary_search_by_key(&region.nsid(), |namespace| namespace.nsid);
        let block_bytes = at.map_or(512, |at| self.namespaces[at].block_bytes.max(1));
        // A chunk is at most the region, and a power of two.
        (bytes / u64::from(block_bytes)).clamp(1, blocks).ilog2().min(24) as u8
    }
}

/// As many changes in a round as the region has blocks: what is copied now is old before the round ends.
fn is_hot(region: Region<'_>) -> bool {
    !region.is_open() && region.dirty() > 0 && region.changed() >= region.blocks().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(block_bytes: u32) -> Plan {
        let namespaces = vec![Namespace { nsid: 1, blocks: 1 << 30, block_bytes }];
        let settings = Vec::new();
        Plan::new(&Setup { migration: 1, seed: 1, now_us: 0, namespaces, regions: 4, region_bytes: 40, settings }).unwrap()
    }

    fn region(blocks: u32, dirty: u32, changed: u32, flags: u32) -> Vec<u8> {
        let mut bytes = vec![0; 40];
        for (at, value) in [(8, 1), (12, blocks), (16, dirty), (20, changed), (28, flags)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    fn last(number: u32) -> Round {
        Round { number, duration_us: 1000, copied_blocks: 1000, zero_blocks: 0, dirtied_blocks: 0 }
    }

    #[test]
    fn chunks_follow_how_much_is_dirty() {
        let regions = [region(1024, 512, 0, 0), region(1024, 511, 0, 0), region(1024, 127, 0, 0), region(9, 9, 0, 0)].concat();
        assert_eq!(plan(4096).round(None, &regions), [8, 6, 4, 3]);
        assert_eq!(plan(512).round(None, &region(1 << 20, 1 << 20, 0, 0)), [11]);
        assert_eq!(plan(4096).round(None, &region(0, 0, 0, 0)), [0]);
    }

    #[test]
    fn hot_regions_wait_within_what_downtime_can_bear() {
        let held = |last: Option<&Round>, one: Vec<u8>| {
            plan(4096).round(last, &one.repeat(10)).iter().filter(|choice| **choice & 0x80 != 0).count()
        };
        assert_eq!(held(Some(&last(1)), region(64, 64, 64, 0)), 3, "200 us of 1 block a us");
        assert_eq!(held(Some(&last(1)), region(64, 64, 63, 0)), 0, "not hot enough");
        assert_eq!(held(Some(&last(1)), region(64, 64, 99, 1)), 0, "first copy still open");
        assert_eq!(held(Some(&last(1)), region(64, 0, 99, 0)), 0, "nothing to copy");
        assert_eq!(held(Some(&last(0)), region(64, 64, 99, 0)), 0, "after the full round");
        assert_eq!(held(None, region(64, 64, 99, 0)), 0);
        assert_eq!(held(Some(&Round { duration_us: 0, ..last(1) }), region(64, 64, 99, 0)), 0);
    }
}
