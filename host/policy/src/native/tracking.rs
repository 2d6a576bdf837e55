//! Plans a round: small chunks where little is dirty, large ones where much is, and nothing copied in vain.

use super::Settings;
use crate::packed::{self, Choice, Region};
use crate::role::{Tracking, TrackingAnswer, TrackingRequest};
use crate::seam::{Fault, NamespaceInfo, Opening, Policy};

/// The native `tracking` policy. Settings: `chunk-min-kib`, `chunk-max-kib`, `hold-us`.
#[derive(Debug)]
pub struct NativeTracking {
    namespaces: Vec<NamespaceInfo>,
    min_bytes: u64,
    max_bytes: u64,
    hold_us: u64,
}

impl NativeTracking {
    /// Opens the policy.
    ///
    /// # Errors
    /// [`Fault::Refused`] for a setting that is unknown or out of bounds.
    pub fn open(opening: &Opening<Tracking>) -> Result<Self, Fault> {
        let mut settings = Settings::of(&opening.setup);
        let min = settings.number("chunk-min-kib", 64, 4, 65_536);
        let max = settings.number("chunk-max-kib", 1024, 4, 65_536);
        let hold_us = settings.number("hold-us", 200, 0, 1_000_000);
        settings.finish()?;
        let namespaces = opening.setup.namespaces.clone();
        Ok(Self { namespaces, min_bytes: min << 10, max_bytes: max.max(min) << 10, hold_us })
    }

    /// A region that is mostly dirty is read in large chunks, one with few dirty blocks in small ones.
    fn chunk_log2(&self, region: &Region) -> u8 {
        let bytes = match u64::from(region.dirty) * 8 / u64::from(region.blocks.max(1)) {
            0 => self.min_bytes,
            1..=3 => self.min_bytes.saturating_mul(4).min(self.max_bytes),
            _ => self.max_bytes,
        };
        let block = crate::checks::find(&self.namespaces, region.nsid).map_or(512, |namespace| namespace.block_bytes.max(1));
        let blocks = (bytes / u64::from(block)).clamp(1, u64::from(region.blocks.max(1)));
        (blocks.ilog2() as u8).min(crate::MAX_CHUNK_LOG2)
    }

    /// Blocks that may be held: what the last round's rate copies in `hold-us`, since that is what a hold adds to the downtime.
    fn hold_budget(&self, request: &TrackingRequest) -> u64 {
        match &request.last {
            Some(last) if last.number > 0 && last.duration_us > 0 => {
                last.copied_blocks.saturating_mul(self.hold_us) / last.duration_us
            }
            _ => 0,
        }
    }
}

/// Each block changed again within one round: a copy of it now is a copy in vain.
fn is_hot(region: &Region) -> bool {
    region.dirty > 0 && !region.first_copy_open && region.changed >= region.blocks.max(1)
}

impl Policy<Tracking> for NativeTracking {
    fn call(&mut self, request: &TrackingRequest, answer: &mut TrackingAnswer) -> Result<(), Fault> {
        let mut budget = self.hold_budget(request);
        for region in packed::regions(&request.regions) {
            let hold = is_hot(&region) && u64::from(region.blocks) <= budget;
            if hold {
                budget -= u64::from(region.blocks);
            }
            Choice { chunk_log2: self.chunk_log2(&region), hold }.push(&mut answer.choices);
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::{Role, RoundReport};
    use crate::seam::Setup;

    fn plan(last: Option<RoundReport>, regions: &[Region]) -> Vec<Choice> {
        let setup = Setup {
            migration: 1,
            seed: 1,
            now_us: 0,
            namespaces: vec![NamespaceInfo { nsid: 1, blocks: 1 << 30, block_bytes: 4096 }],
            regions: regions.len() as u32,
            region_bytes: packed::REGION_BYTES as u32,
            settings: Vec::new(),
        };
        let mut request = TrackingRequest { now_us: 0, last, regions: Vec::new() };
        regions.iter().for_each(|region| region.push(&mut request.regions));
        let mut answer = TrackingAnswer::default();
        let mut policy = NativeTracking::open(&Opening { setup: setup.clone(), extra: () }).unwrap();
        policy.call(&request, &mut answer).unwrap();
        assert_eq!(Tracking::check(&setup, &(), &request, &answer), Ok(()));
        packed::choices(&answer.choices).collect()
    }

    fn region(blocks: u32, dirty: u32, changed: u32) -> Region {
        Region { slba: 0, nsid: 1, blocks, dirty, changed, idle_ms: 0, first_copy_open: false, held: false }
    }

    #[test]
    fn chunks_follow_how_much_is_dirty() {
        let logs: Vec<_> = plan(None, &[region(1024, 1024, 0), region(1024, 200, 0), region(1024, 5, 0), region(9, 9, 0)])
            .iter()
            .map(|choice| choice.chunk_log2)
            .collect();
        assert_eq!(logs, [8, 6, 4, 3]);
    }

    #[test]
    fn hot_regions_are_held_within_what_downtime_can_bear() {
        let last = RoundReport { number: 1, duration_us: 1000, copied_blocks: 1000, ..RoundReport::default() };
        let hot = region(64, 64, 100);
        let held = |last, regions: &[Region]| plan(last, regions).iter().filter(|choice| choice.hold).count();
        assert_eq!(held(Some(last), &[hot; 10]), 3);
        assert_eq!(held(Some(last), &[region(64, 64, 63); 10]), 0);
        assert_eq!(held(Some(last), &[Region { first_copy_open: true, ..hot }; 10]), 0);
        assert_eq!(held(None, &[hot; 10]), 0);
        assert_eq!(held(Some(RoundReport { number: 0, ..last }), &[hot; 10]), 0);
    }
}
