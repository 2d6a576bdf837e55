//! The reading side of a controller data queue: new entries by phase tag (Base 2.3 §3.3.1.4, §8.1.7). Shared by the queue's
//! owner and by the process that it is lent to.

use crate::cdq::CdqFormat;
use crate::sync::fence;
use dray_device::memory::Arena;
use dray_device::planted::{self, Fault};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Slots whose phase tags are looked at together.
const GROUP: usize = 8;

/// Where entries are and which have been read. Places are counted without end; an index is a place modulo the slots, and the
/// phase tag flips with every pass.
#[derive(Debug)]
pub(crate) struct Entries {
    arena: Arc<Arena>,
    at: usize,
    slots: u32,
    format: CdqFormat,
    /// Places given back, read, and known to hold new entries.
    returned: u64,
    read: u64,
    seen: u64,
}

impl Entries {
    /// Entries from the place `from` on. The caller has checked that they lie within the arena.
    pub(crate) fn new(arena: Arc<Arena>, at: usize, slots: u32, format: CdqFormat, from: u64) -> Self {
        Self { arena, at, slots, format, returned: from, read: from, seen: from }
    }

    fn index(&self, place: u64) -> usize {
        (place % u64::from(self.slots)) as usize
    }

    /// Looks at up to `most` slots behind the last one known to be new, and no further than once around.
    #[inline]
    fn look(&mut self, most: u64) {
        let end = self.seen.saturating_add(most).min(self.returned + u64::from(self.slots));
        while self.seen < end {
            // Up to the end of the ring all new entries have the same phase tag.
            let index = self.index(self.seen);
            let run = (end - self.seen).min(u64::from(self.slots) - index as u64) as usize;
            let phase = (self.seen / u64::from(self.slots)).is_multiple_of(2);
            let new = self.count_phase(index, run, phase);
            self.seen += new as u64;
            if new < run {
                break;
            }
        }
        // Nothing else of the entries is read before their phase tags.
        fence(Ordering::Acquire);
    }

    /// How many of the `run` slots from `index` on have the phase tag, up to the first that has not.
    #[inline]
    fn count_phase(&self, index: usize, run: usize, phase: bool) -> usize {
        let CdqFormat { entry_bytes, phase_byte, phase_mask } = self.format;
        let (arena, stride) = (&*self.arena, entry_bytes as usize);
        let want = if phase { phase_mask } else { 0 };
        let first = self.at + index * stride + phase_byte as usize;
        let differing = |slot: usize| (arena.load8(first + slot * stride, Ordering::Relaxed) & phase_mask) ^ want;
        // Several at a time: one branch, and loads that do not wait for one another.
        let alike = |group: usize| (group..group + GROUP).fold(0, |seen, slot| seen | differing(slot)) == 0;
        let groups = (0..run / GROUP).take_while(|&group| alike(group * GROUP)).count();
        (groups * GROUP..run).find(|&slot| differing(slot) != 0).unwrap_or(run)
    }

    /// Copies up to `max` new entries, oldest first, and returns how many.
    pub(crate) fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        let known = self.seen - self.read;
        if (max as u64) > known {
            self.look(max as u64 - known);
        }
        let count = (self.seen - self.read).min(max as u64) as usize;
        let bytes = self.format.entry_bytes as usize;
        let index = self.index(self.read);
        let run = count.min(self.slots as usize - index);
        self.arena.read_append(self.at + index * bytes, run * bytes, into);
        if count > run {
            self.arena.read_append(self.at, (count - run) * bytes, into);
        }
        self.read += count as u64;
        count
    }

    /// New entries behind what was read.
    pub(crate) fn waiting(&mut self) -> u32 {
        self.look(u64::from(self.slots));
        (self.seen - self.read) as u32
    }

    /// Whether something new waits; looks at one slot.
    #[inline]
    pub(crate) fn any(&mut self) -> bool {
        if self.seen == self.read {
            self.look(1);
        }
        self.seen > self.read
    }

    /// Entries read and not given back.
    pub(crate) fn taken(&self) -> u32 {
        (self.read - self.returned) as u32
    }

    /// Shows the last `count` read entries again (all that are not given back, at most).
    pub(crate) fn rewind(&mut self, count: u32) {
        self.read -= u64::from(count.min(self.taken()));
    }

    /// Gives read entries back; `false` if that many have not been read.
    pub(crate) fn give_back(&mut self, count: u32) -> bool {
        let enough = count <= self.taken();
        if enough {
            self.returned += u64::from(count);
        }
        enough
    }

    /// Takes a head index that another reader sends: it must lie behind new entries only. `false` if it does not.
    pub(crate) fn accept_head(&mut self, head: u32) -> bool {
        if head >= self.slots {
            return false;
        }
        let slots = u64::from(self.slots);
        let advance = (u64::from(head) + slots - self.returned % slots) % slots;
        self.look(slots);
        let honest = advance <= self.seen - self.returned;
        if honest {
            self.returned += advance;
            self.read = self.read.max(self.returned);
        }
        honest
    }

    /// The place up to which entries were given back.
    pub(crate) fn returned(&self) -> u64 {
        if planted::on(Fault::HeadBeforeCopied) { self.seen } else { self.returned }
    }

    /// The head pointer: the index up to which entries were given back.
    pub(crate) fn head(&self) -> u32 {
        self.index(self.returned()) as u32
    }

    /// The index after a place given back.
    pub(crate) fn after_head(&self) -> u32 {
        self.index(self.returned() + 1) as u32
    }

    /// Whether everything new was read and given back.
    pub(crate) fn is_drained(&mut self) -> bool {
        self.returned == self.read && !self.any()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::memory::Pages;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const FORMAT: CdqFormat = CdqFormat { entry_bytes: 12, phase_byte: 5, phase_mask: 0x10 };

    /// A controller: posts numbered entries with the phase tag.
    struct Writer {
        arena: Arc<Arena>,
        slots: u32,
        tail: u64,
    }

    impl Writer {
        fn post(&mut self, number: u32) {
            let at = (self.tail % u64::from(self.slots)) as usize * 12;
            let phase = (self.tail / u64::from(self.slots)).is_multiple_of(2);
            let mut entry = [0xcfu8; 12];
            entry[..4].copy_from_slice(&number.to_le_bytes());
            entry[5] = if phase { 0xff } else { 0xef };
            self.arena.write(at, &entry);
            self.tail += 1;
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Post(u8),
        Take(u8),
        Back(u8),
        Rewind(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            any::<u8>().prop_map(Step::Post),
            any::<u8>().prop_map(Step::Take),
            any::<u8>().prop_map(Step::Back),
            any::<u8>().prop_map(Step::Rewind),
        ]
    }

    proptest! {
        #[test]
        fn every_entry_is_seen_once_and_in_order(slots in 3u32..40, steps in prop::collection::vec(step(), 1..200)) {
            let arena = Arena::new("cdq", 4096, Pages::Small).expect("memory");
            let mut writer = Writer { arena: Arc::clone(&arena), slots, tail: 0 };
            let mut entries = Entries::new(arena, 0, slots, FORMAT, 0);
            // The model: numbers posted and not given back; how many of them were read.
            let (mut posted, mut read, mut next) = (VecDeque::<u32>::new(), 0usize, 0u32);
            for step in steps {
                match step {
                    Step::Post(n) => {
                        for _ in 0..n {
                            if posted.len() < slots as usize - 1 {
                                writer.post(next);
                                posted.push_back(next);
                                next += 1;
                            }
                        }
                    }
                    Step::Take(n) => {
                        let mut got = Vec::new();
                        let count = entries.take(usize::from(n), &mut got);
                        let expected: Vec<_> = posted.iter().skip(read).take(usize::from(n)).copied().collect();
                        let numbers: Vec<_> =
                            got.chunks(12).map(|e| u32::from_le_bytes([e[0], e[1], e[2], e[3]])).collect();
                        prop_assert_eq!(count, expected.len());
                        prop_assert_eq!(numbers, expected);
                        read += count;
                    }
                    Step::Back(n) => {
                        let fits = usize::from(n) <= read;
                        prop_assert_eq!(entries.give_back(u32::from(n)), fits);
                        if fits {
                            posted.drain(..usize::from(n));
                            read -= usize::from(n);
                        }
                    }
                    Step::Rewind(n) => {
                        entries.rewind(u32::from(n));
                        read -= usize::from(n).min(read);
                    }
                }
                prop_assert_eq!(entries.waiting() as usize, posted.len() - read);
                prop_assert_eq!(u64::from(entries.head()), entries.returned() % u64::from(slots));
            }
        }
    }

    #[test]
    fn a_head_from_elsewhere_lies_behind_new_entries_or_is_refused() {
        let arena = Arena::new("cdq", 4096, Pages::Small).expect("memory");
        let mut writer = Writer { arena: Arc::clone(&arena), slots: 8, tail: 0 };
        let mut entries = Entries::new(arena, 0, 8, FORMAT, 0);
        (0..3).for_each(|n| writer.post(n));
        assert!(!entries.accept_head(4) && !entries.accept_head(8) && !entries.accept_head(u32::MAX));
        assert!(entries.accept_head(2));
        assert_eq!((entries.head(), entries.waiting()), (2, 1));
        assert!(entries.accept_head(2), "nothing new is allowed");
        assert!(!entries.accept_head(1), "backwards");
    }
}
