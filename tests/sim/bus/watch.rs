//! Controller data queues as the bus sees them pass: found by their creation, read by phase tag, each entry once and in order.

use super::super::event::{Event, Side};
use dray_device::memory::DmaBuffer;
use dray_device::space::AddressSpace;
use dray_nvme::cdq::{Changed, Esa, UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_nvme::command::{CdqCreateCdw11, SubmissionEntry};
use zerocopy::{FromBytes, IntoBytes};

/// One queue.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) id: u16,
    pub(super) cntlid: u16,
    iova: u64,
    memory: DmaBuffer,
    slots: u32,
    next: u32,
    phase: bool,
    /// Entries shown, and those of them that the host has given back, counted without end.
    shown: u64,
    returned: u64,
}

impl Watch {
    /// The queue that a Create Controller Data Queue made; `None` where its memory is no single mapping (PC = 0).
    pub(super) fn new(space: &AddressSpace, create: &SubmissionEntry, id: u16) -> Option<Self> {
        let cdw11 = CdqCreateCdw11::from_bits(create.cdw11);
        let slots = create.cdw12 / (UDMQ_ENTRY_BYTES as u32 / 4);
        let mapping = space.find(create.prp1()).filter(|_| cdw11.pc())?;
        let from = usize::try_from(create.prp1() - mapping.iova).ok()?;
        let memory = mapping.memory.slice(from, slots as usize * UDMQ_ENTRY_BYTES)?;
        Some(Self { id, cntlid: cdw11.cqs(), iova: create.prp1(), memory, slots, next: 0, phase: true, shown: 0, returned: 0 })
    }

    /// Its memory is still where the controller was told.
    pub(super) fn is_mapped(&self, space: &AddressSpace) -> bool {
        space.find(self.iova).is_some_and(|mapping| std::sync::Arc::ptr_eq(mapping.memory.arena(), self.memory.arena()))
    }

    fn at(&self, slot: u32) -> usize {
        self.memory.offset() + slot as usize * UDMQ_ENTRY_BYTES
    }

    pub(super) fn entry(&self, slot: u32) -> UdmqEntry {
        let mut bytes = [0; UDMQ_ENTRY_BYTES];
        self.memory.arena().read(self.at(slot), &mut bytes);
        UdmqEntry::read_from_bytes(&bytes).unwrap_or_default()
    }

    /// Shows what is new. With `merge` two new entries in a row whose ranges lie together become their union first, both of
    /// them; true if that was done.
    pub(super) fn look(&mut self, side: Side, merge: bool, events: &mut Vec<Event>) -> bool {
        let mut merged = false;
        let mut before: Option<(u32, UdmqEntry)> = None;
        let first = events.len();
        for _ in 0..self.slots {
            let slot = self.next;
            let entry = self.entry(slot);
            if entry.phase() != self.phase {
                break;
            }
            self.next += 1;
            self.shown += 1;
            if self.next == self.slots {
                (self.next, self.phase) = (0, !self.phase);
            }
            let event = |bytes| Event::CdqEntry { side, cdqid: self.id, cntlid: self.cntlid, slot, bytes };
            let mut bytes = [0; 32];
            bytes.copy_from_slice(entry.as_bytes());
            if let Some((at, other)) = before.filter(|_| merge && !merged)
                && let Some((nlb, slba)) = union(&other, &entry)
            {
                merged = true;
                for (slot, entry) in [(at, &other), (slot, &entry)] {
                    let both = UdmqEntry { nlb, slba, ..*entry };
                    self.memory.arena().write(self.at(slot), both.as_bytes());
                    bytes.copy_from_slice(both.as_bytes());
                    if slot == at
                        && let Some(Event::CdqEntry { bytes: shown, .. }) = events[first..].last_mut()
                    {
                        *shown = bytes;
                    }
                }
            }
            events.push(event(bytes));
            before = Some((slot, entry));
        }
        merged
    }
}

impl Watch {
    /// The controller has taken a head. The slots before it are its own now, to write there what it likes: it does so at once,
    /// with ranges that nobody has changed. Phase tags stay as they are, so for a host that reads only what it has not given back
    /// there is nothing new. What was posted into these slots since is left alone; [`look`](Self::look) has seen it.
    pub(super) fn given_back(&mut self, head: u32) {
        let slots = u64::from(self.slots);
        if u64::from(head) >= slots {
            return;
        }
        let advance = (u64::from(head) + slots - self.returned % slots) % slots;
        let from = self.returned;
        self.returned = (from + advance).min(self.shown);
        for place in (from..self.returned).filter(|place| place + slots >= self.shown) {
            let slot = (place % slots) as u32;
            let entry = self.entry(slot);
            if matches!(entry.changed(), Changed::Range { .. }) {
                let wrong = UdmqEntry { nlb: 0, slba: u64::from(entry.slba == 0), ..entry };
                self.memory.arena().write(self.at(slot), wrong.as_bytes());
            }
        }
    }
}

/// NLB and SLBA of two plain entries together, if they are of one namespace and kind and leave less of a gap than they fill.
fn union(a: &UdmqEntry, b: &UdmqEntry) -> Option<(u32, u64)> {
    let plain = |entry: &UdmqEntry| entry.esa() == Esa::ORDINARY;
    let (Changed::Range { nsid, slba, blocks }, Changed::Range { nsid: other, slba: from, blocks: count }) =
        (a.changed(), b.changed())
    else {
        return None;
    };
    let start = slba.min(from);
    let end = (slba.checked_add(blocks)?).max(from.checked_add(count)?);
    let together = nsid == other && plain(a) && plain(b) && a.lbamqa.dlba() == b.lbamqa.dlba();
    let near = end - start <= 2 * (blocks + count);
    let nlb = u32::try_from(end - start - 1).ok()?;
    (together && near).then_some((nlb, start))
}
