//! Drains a user data migration queue: merges neighbouring ranges, gives everything back, looks again soon.

use super::Settings;
use crate::packed::{MAX_RANGE_BLOCKS, Range};
use crate::role::{Cdq, CdqAnswer, CdqRequest};
use crate::seam::{Fault, NamespaceInfo, Opening, Policy};
use crate::udmq;
use dray_nvme::cdq::{Changed, LbaMqa, UDMQ_ENTRY_BYTES, UDMQ_PHASE_MASK, UdmqEntry};

/// A range that grows. The empty one is followed by nothing: its limit is 0.
#[derive(Clone, Copy, Default)]
struct Run {
    slba: u64,
    end: u64,
    /// The end that it may have at most: of its namespace, and of what a record can say.
    limit: u64,
    nsid: u32,
    /// Byte 31 of its entries, which are ordinary ones.
    attributes: u8,
}

impl Run {
    /// Where an entry ends that lengthens the range: one of the same kind (all of byte 31 but the phase), next to it, not too long.
    #[inline]
    fn followed_by(&self, entry: &UdmqEntry) -> Option<u64> {
        let kind = (u8::from(entry.lbamqa) ^ self.attributes) & !UDMQ_PHASE_MASK;
        let end = self.end.saturating_add(u64::from(entry.nlb) + 1);
        let follows = (entry.slba == self.end) & (entry.nsid == self.nsid) & (kind == 0) & (end <= self.limit);
        follows.then_some(end)
    }

    #[inline]
    fn push(&self, ranges: &mut Vec<u8>) {
        if self.end > self.slba {
            let deallocated = LbaMqa::from(self.attributes).dlba();
            Range { slba: self.slba, blocks: (self.end - self.slba) as u32, deallocated, nsid: self.nsid }.push(ranges);
        }
    }
}

/// The native `cdq` policy. Settings: `batch-wait-us`, `batch-entries`.
#[derive(Debug)]
pub struct NativeCdq {
    namespaces: Vec<NamespaceInfo>,
    kind: u8,
    stride: u32,
    wait_us: u32,
    wait_entries: u32,
}

impl NativeCdq {
    /// Opens the policy for a queue.
    ///
    /// # Errors
    /// [`Fault::Refused`] for a setting that is unknown or out of bounds.
    pub fn open(opening: &Opening<Cdq>) -> Result<Self, Fault> {
        let mut settings = Settings::of(&opening.setup);
        let wait_us = settings.number("batch-wait-us", 1000, 0, 1_000_000) as u32;
        let batch = settings.number("batch-entries", 512, 0, 1 << 20) as u32;
        settings.finish()?;
        let queue = opening.extra;
        Ok(Self {
            namespaces: opening.setup.namespaces.clone(),
            kind: queue.kind,
            stride: queue.entry_bytes,
            wait_us,
            wait_entries: batch.min(queue.slots / 4),
        })
    }

    /// Merges the ordinary entries. Returns whether others were left to [`specials`](Self::specials).
    fn merge(&self, entries: impl Iterator<Item = UdmqEntry>, ranges: &mut Vec<u8>) -> bool {
        let mut place = self.namespaces.first().copied().unwrap_or(NOWHERE);
        let (mut run, mut special) = (Run::default(), false);
        for entry in entries {
            if let Some(end) = run.followed_by(&entry) {
                run.end = end;
                continue;
            }
            if is_special(&entry) {
                special = true;
                continue;
            }
            let UdmqEntry { nsid, slba, nlb, .. } = entry;
            if nsid != place.nsid {
                place = crate::checks::find(&self.namespaces, nsid).unwrap_or(NOWHERE);
            }
            if slba < place.blocks {
                run.push(ranges);
                let end = slba + (u64::from(nlb) + 1).min(place.blocks - slba);
                let limit = place.blocks.min(slba.saturating_add(u64::from(MAX_RANGE_BLOCKS)));
                run = Run { slba, end, limit, nsid, attributes: entry.lbamqa.into() };
            }
        }
        run.push(ranges);
        special
    }

    /// The entries that are more than one range: markers, whole namespaces, reserved values, ranges too long for a record. Their
    /// order among the others carries no meaning.
    #[cold]
    fn specials(&self, entries: impl Iterator<Item = UdmqEntry>, answer: &mut CdqAnswer) {
        for entry in entries.filter(is_special) {
            udmq::mark(&entry, &mut answer.marks);
            let Some(place) = crate::checks::find(&self.namespaces, entry.nsid) else { continue };
            let deallocated = entry.lbamqa.dlba();
            match entry.changed() {
                Changed::Range { nsid, slba, blocks } => {
                    let end = slba.saturating_add(blocks).min(place.blocks);
                    Range::push_long(slba, end.saturating_sub(slba), deallocated, nsid, &mut answer.ranges);
                }
                Changed::Namespace { nsid } => Range { slba: 0, blocks: 0, deallocated, nsid }.push(&mut answer.ranges),
                Changed::Nothing | Changed::Unknown => {}
            }
        }
    }

    fn drain(&self, entries: impl Iterator<Item = UdmqEntry> + Clone, answer: &mut CdqAnswer) {
        if self.merge(entries.clone(), &mut answer.ranges) {
            self.specials(entries, answer);
        }
    }
}

/// A namespace without blocks; none has NSID 0.
const NOWHERE: NamespaceInfo = NamespaceInfo { nsid: 0, blocks: 0, block_bytes: 0 };

/// More than a range that fits one record.
#[inline]
fn is_special(entry: &UdmqEntry) -> bool {
    !udmq::is_plain(entry) | (entry.nlb >= MAX_RANGE_BLOCKS)
}

impl Policy<Cdq> for NativeCdq {
    fn call(&mut self, request: &CdqRequest, answer: &mut CdqAnswer) -> Result<(), Fault> {
        let shown = request.entries.len() / self.stride.max(1) as usize;
        answer.consumed = shown as u32;
        if !udmq::is_readable(self.kind, self.stride) {
            answer.marks.everything = shown > 0;
        } else if self.stride as usize == UDMQ_ENTRY_BYTES {
            self.drain(request.entries.as_chunks().0.iter().map(udmq::read), answer);
        } else {
            self.drain(udmq::entries(&request.entries, self.stride), answer);
        }
        let ends = answer.marks.stopped || answer.marks.suspended || answer.marks.full;
        if request.waiting == 0 && !ends {
            answer.wait_us = self.wait_us;
            answer.wait_entries = self.wait_entries;
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
    use crate::packed::{self, REGION_BYTES};
    use crate::role::{CdqQueue, Role};
    use crate::seam::Setup;
    use proptest::prelude::*;

    fn opening(kind: u8, namespaces: &[(u32, u64)]) -> Opening<Cdq> {
        let setup = Setup {
            migration: 1,
            seed: 1,
            now_us: 0,
            namespaces: namespaces.iter().map(|&(nsid, blocks)| NamespaceInfo { nsid, blocks, block_bytes: 512 }).collect(),
            regions: 1,
            region_bytes: REGION_BYTES as u32,
            settings: Vec::new(),
        };
        let extra = CdqQueue { id: 0, kind, cntlid: 1, slots: 1024, entry_bytes: 32, phase_byte: 31, phase_mask: 1 };
        Opening { setup, extra }
    }

    fn entry(nsid: u32, slba: u64, nlb: u32, attributes: u8) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[0..4].copy_from_slice(&nsid.to_le_bytes());
        bytes[4..8].copy_from_slice(&nlb.to_le_bytes());
        bytes[8..16].copy_from_slice(&slba.to_le_bytes());
        bytes[31] = attributes;
        bytes
    }

    fn drain(opening: &Opening<Cdq>, entries: &[[u8; 32]]) -> CdqAnswer {
        let request = CdqRequest { now_us: 1, entries: entries.concat(), waiting: 0 };
        let mut answer = CdqAnswer::default();
        NativeCdq::open(opening).unwrap().call(&request, &mut answer).unwrap();
        assert_eq!(Cdq::check(&opening.setup, &opening.extra, &request, &answer), Ok(()));
        assert_eq!(Cdq::omission(&opening.setup, &opening.extra, &request, &answer), None);
        answer
    }

    #[test]
    fn neighbours_become_one_range() {
        let entries = [entry(1, 0, 7, 1), entry(1, 8, 7, 1), entry(1, 16, 7, 0x21), entry(1, 40, 7, 1), entry(2, 48, 1, 0)];
        let answer = drain(&opening(0, &[(1, 1000), (2, 1000)]), &entries);
        let range = |slba, blocks, deallocated, nsid| Range { slba, blocks, deallocated, nsid };
        let want = [range(0, 16, false, 1), range(16, 8, true, 1), range(40, 8, false, 1), range(48, 2, false, 2)];
        assert_eq!(packed::ranges(&answer.ranges).collect::<Vec<_>>(), want);
        assert_eq!((answer.consumed, answer.wait_us, answer.wait_entries), (5, 1000, 256));
    }

    #[test]
    fn ranges_outside_are_cut_or_dropped() {
        let entries = [entry(1, 96, 7, 1), entry(1, u64::MAX, 7, 1), entry(9, 0, 7, 1), entry(9, 0, 0, 0x41)];
        let answer = drain(&opening(0, &[(1, 100)]), &entries);
        let all: Vec<_> = packed::ranges(&answer.ranges).collect();
        assert_eq!(all, [Range { slba: 96, blocks: 4, deallocated: false, nsid: 1 }]);
    }

    #[test]
    fn markers_are_told_and_looked_after_at_once() {
        let entries = [entry(0, 0, 0, 0x83), entry(1, 3, 0, 1), entry(1, 4, 0, 0x0f)];
        let answer = drain(&opening(0, &[(1, 100)]), &entries);
        assert!(answer.marks.first && answer.marks.full && !answer.marks.suspended);
        assert_eq!((answer.wait_us, packed::ranges(&answer.ranges).count()), (0, 2));
    }

    #[test]
    fn a_format_it_cannot_read_means_everything() {
        let answer = drain(&opening(0xc0, &[(1, 100)]), &[entry(1, 3, 0, 1)]);
        assert!(answer.marks.everything && answer.ranges.is_empty());
    }

    #[test]
    fn the_largest_entries_fit() {
        drain(&opening(0, &[(1, u64::MAX)]), &[entry(1, 0, u32::MAX, 1), entry(1, 1 << 32, u32::MAX, 1)]);
    }

    proptest! {
        #[test]
        fn any_entries_are_answered_validly(entries: Vec<[u8; 32]>, near: Vec<(u8, u8, u8, u8)>) {
            let near = near.into_iter().map(|(nsid, slba, nlb, kind)| entry(u32::from(nsid % 4), u64::from(slba), u32::from(nlb), kind));
            let entries: Vec<_> = entries.into_iter().chain(near).collect();
            drain(&opening(0, &[(1, 200), (2, u64::MAX)]), &entries);
            drain(&opening(0, &[(3, 100)]), &entries);
        }
    }
}
