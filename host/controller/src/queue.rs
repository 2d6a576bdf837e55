//! Submission and completion queues as their controller sees them (Base 2.3 §3.3.1, §4.1, §4.2).

use dray_device::bar::Bar;
use dray_device::memory::{Arena, DmaBuffer};
use dray_device::poll::Time;
use dray_device::space::SpaceReader;
use dray_nvme::command::{NvmOpcode, SubmissionEntry};
use crate::dptr::PAGE;
use crate::shadow::ShadowPages;
use dray_nvme::doorbell_buffer::{cq_head_offset, sq_tail_offset};
use dray_nvme::registers::{cq_head_doorbell, sq_tail_doorbell};
use dray_nvme::status::Status;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::IntoBytes;

/// Bytes of a submission queue entry.
pub(crate) const SQE_BYTES: usize = 64;
/// Bytes of a completion queue entry.
pub(crate) const CQE_BYTES: usize = 16;

/// Memory of a queue, held while the queue lives.
#[derive(Debug)]
pub(crate) struct QueueMemory {
    pub(crate) iova: u64,
    bytes: usize,
    /// All of it, or its first page.
    buffer: DmaBuffer,
    /// The pages behind that, where it lies in several mappings.
    further: Box<[DmaBuffer]>,
}

impl QueueMemory {
    /// The memory at `iova`. Its addresses are contiguous (CAP.CQR), but may still be several mappings: behind an IOMMU that a guest
    /// programs, each page is one.
    pub(crate) fn find(reader: &SpaceReader, iova: u64, bytes: usize, write: bool) -> Result<Self, Status> {
        if let Ok(buffer) = piece(reader, iova, bytes, write) {
            return Ok(Self { iova, bytes, buffer, further: Box::default() });
        }
        if !iova.is_multiple_of(PAGE as u64) {
            return Err(NO_MEMORY);
        }
        let pages = (0..bytes).step_by(PAGE);
        let page = |at: usize| piece(reader, iova.checked_add(at as u64).ok_or(NO_MEMORY)?, PAGE.min(bytes - at), write);
        let mut pages = pages.map(page);
        let buffer = pages.next().ok_or(NO_MEMORY)??;
        Ok(Self { iova, bytes, buffer, further: pages.collect::<Result<_, _>>()? })
    }

    /// Looks the memory up again after the address space has changed; `false` when it has gone.
    pub(crate) fn renew(&mut self, reader: &SpaceReader, write: bool) -> bool {
        Self::find(reader, self.iova, self.bytes, write).map(|found| *self = found).is_ok()
    }

    /// Where a byte of it is. Entries divide a page: each lies in one piece.
    #[inline]
    pub(crate) fn at(&self, offset: usize) -> (&Arena, usize) {
        if self.further.is_empty() { (self.buffer.arena(), self.buffer.offset() + offset) } else { self.in_page(offset) }
    }

    fn in_page(&self, offset: usize) -> (&Arena, usize) {
        let page = (offset / PAGE).checked_sub(1).and_then(|page| self.further.get(page)).unwrap_or(&self.buffer);
        (page.arena(), page.offset() + offset % PAGE)
    }
}

const NO_MEMORY: Status = Status::DATA_TRANSFER_ERROR.with_dnr();

/// Memory in one mapping.
pub(crate) fn piece(reader: &SpaceReader, iova: u64, bytes: usize, write: bool) -> Result<DmaBuffer, Status> {
    let segment = reader.lookup(iova, bytes, write).ok_or(NO_MEMORY)?;
    DmaBuffer::new(Arc::clone(segment.arena()), segment.offset(), bytes).ok_or(NO_MEMORY)
}

/// A doorbell value that cannot be (Base 2.3 §5.2.2.1, asynchronous event information 01h).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadDoorbell;

/// A submission queue.
#[derive(Debug)]
pub(crate) struct Sq {
    pub(crate) memory: QueueMemory,
    pub(crate) qid: u16,
    pub(crate) cqid: u16,
    /// Entries.
    pub(crate) size: u32,
    pub(crate) qprio: u8,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    /// The doorbell's value at the last look, legal or not.
    bell: u32,
    /// Where the doorbell is, if not in the BAR.
    pub(crate) shadow: Option<Arc<ShadowPages>>,
    /// The event index that was stored last.
    pub(crate) event: Option<u32>,
    /// Fetched and not posted.
    pub(crate) in_flight: u32,
    /// A Delete command waits for the queue to run dry.
    pub(crate) deleting: bool,
}

impl Sq {
    pub(crate) fn new(memory: QueueMemory, qid: u16, cqid: u16, size: u32, qprio: u8) -> Self {
        Self {
            memory,
            qid,
            cqid,
            size,
            qprio,
            head: 0,
            tail: 0,
            bell: 0,
            shadow: None,
            event: None,
            in_flight: 0,
            deleting: false,
        }
    }

    /// Where the queue goes on after a restore.
    pub(crate) fn set_position(&mut self, head: u32, tail: u32) {
        (self.head, self.tail, self.bell) = (head, tail, tail);
    }

    /// The tail doorbell as the guest has written it.
    #[inline]
    pub(crate) fn doorbell(&self, bar: &Bar) -> u32 {
        match &self.shadow {
            None => bar.load32(sq_tail_doorbell(self.qid, 0)),
            Some(pages) => pages.bell(sq_tail_offset(self.qid, 0)),
        }
    }

    /// Looks at the tail doorbell.
    #[inline]
    pub(crate) fn look(&mut self, bar: &Bar) -> Result<(), BadDoorbell> {
        let bell = self.doorbell(bar);
        if bell == self.bell {
            return Ok(());
        }
        self.bell = bell;
        if bell >= self.size {
            return Err(BadDoorbell);
        }
        self.tail = bell;
        Ok(())
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// A copy of the entry at the head. The guest may change its own at any time.
    #[inline]
    pub(crate) fn entry(&self) -> SubmissionEntry {
        let (arena, at) = self.memory.at(self.head as usize * SQE_BYTES);
        let mut entry = SubmissionEntry::default();
        arena.read(at, entry.as_mut_bytes());
        // Only an entry that is there: a free place is about to be written by the guest, who would have to fetch it back.
        let next = self.next();
        if next != self.tail {
            let (arena, at) = self.memory.at(next as usize * SQE_BYTES);
            arena.prefetch(at);
        }
        entry
    }

    /// The place behind the head.
    #[inline]
    fn next(&self) -> u32 {
        if self.head + 1 == self.size { 0 } else { self.head + 1 }
    }

    /// SLBA of the entry behind the head, if one is there and it is a read: a hint, whatever the guest makes of it.
    #[inline]
    pub(crate) fn next_read(&self) -> Option<u64> {
        let next = self.next();
        let (arena, at) = self.memory.at(next as usize * SQE_BYTES);
        let read = next != self.tail && arena.load8(at, Ordering::Relaxed) == NvmOpcode::READ.0;
        read.then(|| arena.load64(at + 40, Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn advance(&mut self) {
        self.head = self.next();
    }
}

/// A completion to be posted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) sqid: u16,
    pub(crate) cid: u16,
    pub(crate) status: Status,
    pub(crate) result: u64,
}

/// A completion queue.
#[derive(Debug)]
pub(crate) struct Cq {
    pub(crate) memory: QueueMemory,
    pub(crate) qid: u16,
    /// Entries.
    pub(crate) size: u32,
    pub(crate) ien: bool,
    pub(crate) vector: u16,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    /// The tag of the next entry.
    pub(crate) phase: bool,
    bell: u32,
    /// Where the doorbell is, if not in the BAR.
    pub(crate) shadow: Option<Arc<ShadowPages>>,
    /// The event index that was stored last.
    pub(crate) event: Option<u32>,
    /// Slots promised to fetched commands.
    reserved: u32,
    /// Submission queues that use it.
    pub(crate) users: u16,
    /// Entries posted since the last interrupt.
    pub(crate) unsignalled: u32,
    /// In the list of queues to be signalled.
    pub(crate) listed: bool,
    /// When the oldest of them must be signalled.
    pub(crate) deadline: Time,
}

impl Cq {
    pub(crate) fn new(memory: QueueMemory, qid: u16, size: u32, vector: Option<u16>) -> Self {
        Self {
            memory,
            qid,
            size,
            ien: vector.is_some(),
            vector: vector.unwrap_or(0),
            head: 0,
            tail: 0,
            phase: true,
            bell: 0,
            shadow: None,
            event: None,
            reserved: 0,
            users: 0,
            unsignalled: 0,
            listed: false,
            deadline: Time::NEVER,
        }
    }

    /// Where the queue goes on after a restore.
    pub(crate) fn set_position(&mut self, head: u32, tail: u32, phase: bool) {
        (self.head, self.bell, self.tail, self.phase) = (head, head, tail, phase);
    }

    fn used(&self) -> u32 {
        let span = self.tail + self.size - self.head;
        if span >= self.size { span - self.size } else { span }
    }

    /// Entries that the guest has not taken, as far as the last look at the doorbell tells.
    pub(crate) fn has_entries(&self) -> bool {
        self.head != self.tail
    }

    /// No slot can be promised, as far as the last look at the doorbell tells.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.used() + self.reserved + 1 >= self.size
    }

    /// Promises a slot to a command about to be fetched. Looks at the head doorbell only when the known room is used up.
    #[inline]
    pub(crate) fn reserve(&mut self, bar: &Bar) -> Result<bool, BadDoorbell> {
        if self.is_full() {
            self.look(bar)?;
            if self.is_full() {
                return Ok(false);
            }
        }
        self.reserved += 1;
        Ok(true)
    }

    /// Takes a promise back.
    #[inline]
    pub(crate) fn release(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// The head doorbell as the guest has written it.
    #[inline]
    pub(crate) fn doorbell(&self, bar: &Bar) -> u32 {
        match &self.shadow {
            None => bar.load32(cq_head_doorbell(self.qid, 0)),
            Some(pages) => pages.bell(cq_head_offset(self.qid, 0)),
        }
    }

    /// Looks at the head doorbell. A head that skips entries which were never posted is refused.
    pub(crate) fn look(&mut self, bar: &Bar) -> Result<(), BadDoorbell> {
        let bell = self.doorbell(bar);
        if bell == self.bell {
            return Ok(());
        }
        self.bell = bell;
        let step = |from: u32, to: u32| if to >= from { to - from } else { to + self.size - from };
        if bell >= self.size || step(self.head, bell) > self.used() {
            return Err(BadDoorbell);
        }
        self.head = bell;
        Ok(())
    }

    /// Writes an entry into a slot that was reserved; returns its I/O virtual address. DW2 and DW3 are one store, which comes
    /// last: who sees the phase tag sees the entry.
    #[inline]
    pub(crate) fn post(&mut self, ready: &Ready, sqhd: u32) -> u64 {
        let at = self.tail as usize * CQE_BYTES;
        let status = u32::from(ready.status.into_bits()) << 1 | u32::from(self.phase);
        let high = u64::from(sqhd & 0xffff)
            | u64::from(ready.sqid) << 16
            | u64::from(ready.cid) << 32
            | u64::from(status) << 48;
        let (arena, offset) = self.memory.at(at);
        arena.store64(offset, ready.result, Ordering::Relaxed);
        arena.store64(offset + 8, high, Ordering::Release);
        self.reserved = self.reserved.saturating_sub(1);
        self.unsignalled += 1;
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        self.memory.iova + at as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::memory::Pages;
    use dray_device::space::AddressSpace;

    #[test]
    fn a_head_that_skips_what_was_never_posted_is_refused() {
        let (space, bar) = (AddressSpace::default(), Bar::new().expect("bar"));
        let iova = space.map(&DmaBuffer::allocate("cq", 4096, Pages::Small).expect("memory"), true).expect("map");
        let memory = QueueMemory::find(&space.reader(), iova, 4 * CQE_BYTES, true).expect("memory");
        let mut cq = Cq::new(memory, 1, 4, None);
        let ready = Ready { sqid: 1, cid: 0, status: Status::SUCCESS, result: 0 };
        for _ in 0..3 {
            assert_eq!(cq.reserve(&bar), Ok(true));
            cq.post(&ready, 0);
        }
        assert_eq!(cq.reserve(&bar), Ok(false), "full");
        bar.store32(cq_head_doorbell(1, 0), 2);
        assert_eq!(cq.look(&bar), Ok(()));
        for bad in [0, 1, 4, u32::MAX] {
            bar.store32(cq_head_doorbell(1, 0), bad);
            assert_eq!(cq.look(&bar), Err(BadDoorbell), "{bad} with entries 2 to 3 unread");
        }
        assert_eq!(cq.reserve(&bar), Ok(true));
        assert_eq!(cq.reserve(&bar), Ok(true));
        assert_eq!(cq.reserve(&bar), Ok(false), "promised slots are taken");
    }

    #[test]
    fn a_queue_may_lie_in_several_mappings_and_in_all_of_them() {
        const IOVA: u64 = 1 << 20;
        let (space, bar) = (AddressSpace::default(), Bar::new().expect("bar"));
        let page = |nth: u64| {
            let memory = DmaBuffer::allocate("cq", PAGE, Pages::Small).expect("memory");
            space.map_at(IOVA + nth * PAGE as u64, &memory, true).expect("map");
            memory
        };
        let pages = [page(0), page(1)];
        // Two pages and a half: the third is not there yet.
        let entries = (2 * PAGE + PAGE / 2) / CQE_BYTES;
        assert_eq!(QueueMemory::find(&space.reader(), IOVA, entries * CQE_BYTES, true).err(), Some(NO_MEMORY));
        let last = page(2);
        let memory = QueueMemory::find(&space.reader(), IOVA, entries * CQE_BYTES, true).expect("memory");
        let mut cq = Cq::new(memory, 1, entries as u32, None);
        for result in 0..entries as u64 - 1 {
            assert_eq!(cq.reserve(&bar), Ok(true));
            let at = cq.post(&Ready { sqid: 1, cid: 0, status: Status::SUCCESS, result }, 0);
            assert_eq!(at, IOVA + result * CQE_BYTES as u64);
        }
        for (nth, memory) in pages.iter().chain([&last]).enumerate() {
            for slot in (0..PAGE / CQE_BYTES).filter(|slot| nth * PAGE / CQE_BYTES + slot < entries - 1) {
                let found = memory.arena().load64(memory.offset() + slot * CQE_BYTES, Ordering::Relaxed);
                assert_eq!(found, (nth * PAGE / CQE_BYTES + slot) as u64, "page {nth}, slot {slot}");
            }
        }
        // One that is not a page's cannot be scattered.
        assert!(QueueMemory::find(&space.reader(), IOVA + 64, PAGE, true).is_err());
    }
}
