//! What a batch of UDMQ entries says, as few ranges as possible.

use crate::dray::policy::types::Namespace;
use crate::exports::dray::policy::cdq::{Drained, Marks, Queue, Setup};
use alloc::string::String;
use alloc::vec::Vec;
use dray_policy_sdk::packed::{Attribute, Entry, RANGE_BLOCKS_MAX, Ranges, Scope, Scratch};
use dray_policy_sdk::settings::Settings;

/// The user data migration queue, the one queue type that the specification defines.
const UDMQ: u8 = 0;
/// Bytes of a UDMQ entry of type 0.
const ENTRY_BYTES: u32 = 32;

/// The policy, opened for one queue.
#[derive(Debug)]
pub struct Drain {
    namespaces: Namespaces,
    scratch: Scratch,
    kind: u8,
    entry_bytes: u32,
    wait_us: u32,
    wait_entries: u32,
}

impl Drain {
    /// Reads the settings.
    ///
    /// # Errors
    /// A setting that is unknown or out of bounds.
    pub fn new(setup: &Setup, queue: &Queue) -> Result<Self, String> {
        let mut settings = Settings::of(&setup.settings);
        let wait_us = settings.number("batch-wait-us", 1000, 0, 1_000_000) as u32;
        let batch = settings.number("batch-entries", 512, 0, 1 << 20) as u32;
        settings.finish()?;
        // A queue must never run full: a quarter of it is time to look, however large a batch would be liked.
        let wait_entries = batch.min(queue.slots / 4);
        let (namespaces, scratch) = (Namespaces::of(&setup.namespaces), Scratch::default());
        Ok(Self { namespaces, scratch, kind: queue.kind, entry_bytes: queue.entry_bytes, wait_us, wait_entries })
    }

    /// Answers one batch. All of it is given back: what is worth keeping is in the ranges.
    pub fn answer(&mut self, entries: &[u8], waiting: u32) -> Drained {
        let shown = entries.len().checked_div(self.entry_bytes as usize).unwrap_or(0);
        let mut marks = Marks::empty();
        let ranges = match (self.kind, self.entry_bytes) {
            // The usual stride as a constant: the loop is compiled for it.
            (UDMQ, ENTRY_BYTES) => self.ranges(Entry::all(entries, ENTRY_BYTES), &mut marks),
            (UDMQ, stride) => self.ranges(Entry::all(entries, stride), &mut marks),
            // A vendor's format says that something changed, and no more.
            _ => {
                marks.set(Marks::EVERYTHING, shown > 0);
                Ranges::default()
            }
        };
        let last = marks.intersects(Marks::STOPPED | Marks::SUSPENDED | Marks::FULL);
        let (wait_us, wait_entries) = if waiting > 0 || last { (0, 0) } else { (self.wait_us, self.wait_entries) };
        Drained { ranges: ranges.into_bytes(), consumed: shown as u32, marks, wait_us, wait_entries }
    }

    /// Merges the ordinary changes, then looks again for the others, if there are any. What lies outside the namespaces that
    /// move is left out: an answer may not name it.
    #[inline(always)]
    fn ranges<'a>(&mut self, entries: impl Iterator<Item = Entry<'a>> + Clone, marks: &mut Marks) -> Ranges {
        let mut merge = self.scratch.merge();
        let (mut namespace, mut special) = (NOWHERE, false);
        let mut rest = entries.clone();
        while let Some(entry) = merge.pass(&mut rest) {
            if is_special(&entry) {
                special = true;
                continue;
            }
            if entry.nsid() != namespace.nsid {
                namespace = self.namespaces.find(entry.nsid()).unwrap_or(NOWHERE);
            }
            if entry.slba() < namespace.blocks {
                merge.add(&entry, namespace.blocks);
            }
        }
        let mut ranges = merge.finish();
        if special {
            entries.filter(is_special).for_each(|entry| self.namespaces.special(&entry, &mut ranges, marks));
        }
        ranges
    }
}

/// A namespace without blocks; none has NSID 0.
const NOWHERE: Namespace = Namespace { nsid: 0, blocks: 0, block_bytes: 0 };

/// The namespaces that move, in ascending order.
#[derive(Debug)]
struct Namespaces(Vec<Namespace>);

impl Namespaces {
    fn of(given: &[Namespace]) -> Self {
        let mut namespaces = given.to_vec();
        namespaces.sort_unstable_by_key(|namespace| namespace.nsid);
        Self(namespaces)
    }

    /// A call: inlined it would take the registers of the loop that asks it once per namespace.
    #[inline(never)]
    fn find(&self, nsid: u32) -> Option<Namespace> {
        let at = self.0.binary_search_by_key(&nsid, |namespace| namespace.nsid).ok()?;
        self.0.get(at).copied()
    }

    /// Markers, whole namespaces, reserved values and ranges too long for one record; rare.
    #[cold]
    fn special(&self, entry: &Entry<'_>, ranges: &mut Ranges, marks: &mut Marks) {
        *marks |= match entry.attribute() {
            Attribute::Ordinary => Marks::empty(),
            Attribute::First => Marks::FIRST,
            Attribute::Stopped => Marks::STOPPED,
            Attribute::Suspended => Marks::SUSPENDED,
            Attribute::Full => Marks::FULL,
            Attribute::Reserved(_) => Marks::EVERYTHING,
        };
        marks.set(Marks::EVERYTHING, marks.contains(Marks::EVERYTHING) || entry.scope() == Scope::Reserved);
        let Some(namespace) = self.find(entry.nsid()) else { return };
        match entry.scope() {
            Scope::Range => {
                let end = entry.slba().saturating_add(entry.blocks()).min(namespace.blocks);
                ranges.push(entry.nsid(), entry.slba(), end.saturating_sub(entry.slba()), entry.deallocated());
            }
            Scope::Namespace => ranges.push_namespace(entry.nsid()),
            Scope::Nothing | Scope::Reserved => {}
        }
    }
}

fn is_special(entry: &Entry<'_>) -> bool {
    !entry.is_plain() || entry.blocks() > u64::from(RANGE_BLOCKS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(kind: u8, settings: &[(&str, &str)]) -> Result<Drain, String> {
        let namespace = |nsid, blocks| Namespace { nsid, blocks, block_bytes: 4096 };
        let setup = Setup {
            migration: 1,
            seed: 1,
            now_us: 0,
            namespaces: vec![namespace(5, 1 << 40), namespace(1, 100)],
            regions: 1,
            region_bytes: 32,
            settings: settings.iter().map(|&(key, value)| (key.into(), value.into())).collect(),
        };
        let queue = Queue { id: 0, kind, cntlid: 1, slots: 1024, entry_bytes: 32, phase_byte: 31, phase_mask: 1 };
        Drain::new(&setup, &queue)
    }

    fn entry(nsid: u32, slba: u64, nlb: u32, last: u8) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&nsid.to_le_bytes());
        bytes[4..8].copy_from_slice(&nlb.to_le_bytes());
        bytes[8..16].copy_from_slice(&slba.to_le_bytes());
        bytes[31] = last;
        bytes
    }

    fn packed(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
        let pack = |&(slba, blocks, nsid): &(u64, u32, u32)| {
            [&slba.to_le_bytes()[..], &blocks.to_le_bytes(), &nsid.to_le_bytes()].concat()
        };
        ranges.iter().flat_map(pack).collect()
    }

    #[test]
    fn neighbours_become_one_range_and_deallocations_stay_apart() {
        let batch = [entry(1, 0, 7, 1), entry(1, 8, 7, 0), entry(1, 16, 7, 0x21), entry(1, 40, 7, 1), entry(5, 48, 1, 0)];
        let answer = drain(UDMQ, &[]).unwrap().answer(&batch.concat(), 0);
        assert_eq!(answer.ranges, packed(&[(0, 16, 1), (16, 8 | 1 << 31, 1), (40, 8, 1), (48, 2, 5)]));
        assert_eq!((answer.consumed, answer.wait_us, answer.wait_entries), (5, 1000, 256));
    }

    #[test]
    fn what_lies_outside_is_cut_or_left_out() {
        let batch = [entry(1, 96, 7, 1), entry(1, u64::MAX, 7, 1), entry(9, 0, 7, 1), entry(9, 0, 0, 0x41), entry(1, 100, 0, 1)];
        assert_eq!(drain(UDMQ, &[]).unwrap().answer(&batch.concat(), 0).ranges, packed(&[(96, 4, 1)]));
    }

    #[test]
    fn the_longest_entry_takes_three_ranges() {
        let answer = drain(UDMQ, &[]).unwrap().answer(&entry(5, 0, u32::MAX, 1), 0);
        let longest = (1 << 31) - 1;
        assert_eq!(answer.ranges, packed(&[(0, longest, 5), (longest.into(), longest, 5), (2 * u64::from(longest), 2, 5)]));
    }

    #[test]
    fn markers_are_told_and_the_next_look_is_at_once() {
        let batch = [entry(0, 0, 0, 0x83), entry(1, 0, 0, 0x40), entry(1, 4, 0, 0x0f)];
        let answer = drain(UDMQ, &[]).unwrap().answer(&batch.concat(), 0);
        assert_eq!((answer.ranges, answer.marks), (packed(&[(0, 0, 1), (4, 1, 1)]), Marks::FIRST | Marks::FULL));
        assert_eq!((answer.wait_us, answer.wait_entries), (0, 0));
        assert_eq!(drain(UDMQ, &[]).unwrap().answer(&entry(1, 0, 0, 0xc0), 0).marks, Marks::EVERYTHING);
    }

    #[test]
    fn more_in_the_queue_means_no_waiting() {
        assert_eq!(drain(UDMQ, &[]).unwrap().answer(&entry(1, 0, 0, 1), 1).wait_us, 0);
        let slow = drain(UDMQ, &[("batch-wait-us", "900"), ("batch-entries", "4")]).unwrap().answer(&[], 0);
        assert_eq!((slow.wait_us, slow.wait_entries), (900, 4));
        assert!(drain(UDMQ, &[("batch", "1")]).is_err());
    }

    #[test]
    fn a_vendor_format_means_that_everything_may_have_changed() {
        let answer = drain(0xc0, &[]).unwrap().answer(&entry(1, 0, 0, 1), 0);
        assert_eq!((answer.marks, answer.ranges.len(), answer.consumed), (Marks::EVERYTHING, 0, 1));
    }

    /// What a batch means, entry by entry, with none of the shortcuts.
    fn meaning(entries: &[[u8; 32]], namespaces: &[(u32, u64)]) -> Vec<(u64, u32, u32)> {
        let mut ranges: Vec<(u64, u64, u32, bool)> = Vec::new();
        for bytes in entries {
            let entry = Entry::all(bytes, 32).next().unwrap();
            let Some(&(nsid, size)) = namespaces.iter().find(|&&(nsid, _)| nsid == entry.nsid()) else { continue };
            if is_special(&entry) || entry.slba() >= size {
                continue;
            }
            let blocks = entry.blocks().min(size - entry.slba());
            match ranges.last_mut() {
                Some((slba, length, of, dlba))
                    if *slba + *length == entry.slba()
                        && (*of, *dlba) == (nsid, entry.deallocated())
                        && *length + blocks <= u64::from(RANGE_BLOCKS_MAX) =>
                {
                    *length += blocks;
                }
                _ => ranges.push((entry.slba(), blocks, nsid, entry.deallocated())),
            }
        }
        ranges.into_iter().map(|(slba, blocks, nsid, dlba)| (slba, blocks as u32 | u32::from(dlba) << 31, nsid)).collect()
    }

    #[test]
    fn any_batch_is_answered_as_its_entries_one_by_one() {
        let namespaces = [(1, 100), (5, 1 << 40)];
        let mut drain = drain(UDMQ, &[]).unwrap();
        let mut state = 1_u64;
        let mut dice = |sides: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % sides
        };
        for _ in 0..2000 {
            let (mut next, mut batch) = (0, Vec::new());
            for _ in 0..dice(64) {
                let nsid = [1, 1, 1, 5, 5, 5, 5, 9][dice(8) as usize];
                let slba = if dice(4) > 0 { next } else { [dice(110), u64::MAX - dice(3), dice(1 << 40)][dice(3) as usize] };
                let nlb = [dice(9), dice(9), dice(9), (1 << 31) - 3 + dice(3), (1 << 30) + dice(2)][dice(5) as usize] as u32;
                // Ordinary entries of both phases, both kinds, with the reserved bit and without; a marker now and then.
                let last = [0, 1, 0x20, 0x21, 0x10, 0x82, 1, 1][dice(8) as usize];
                next = slba.wrapping_add(u64::from(nlb) + 1);
                batch.push(entry(nsid, slba, nlb, last));
            }
            // What is more than one range comes after the others.
            let want = packed(&meaning(&batch, &namespaces));
            let got = drain.answer(&batch.concat(), 0).ranges;
            assert_eq!(got.get(..want.len()), Some(&want[..]), "{batch:x?}");
            let specials: Vec<_> = batch.iter().filter(|bytes| Entry::all(*bytes, 32).any(|e| is_special(&e))).copied().collect();
            assert_eq!(got[want.len()..], drain.answer(&specials.concat(), 0).ranges);
        }
    }
}
