//! One submission queue and its completion queue: entries in, completions out (Base 2.3 §3.3, §4.1, §4.2).
//!
//! Positions in the queues are counted without end in 64 bits; an index is the count's low bits and a phase tag the bit above
//! them. A command identifier is a slot of the context table with a small generation, so that a completion is found by one
//! array access and a stale one is told from a fresh one.

use crate::error::Fault;
use crate::iova::IovaCache;
use crate::prp::{ListMemory, PrpBuilder, PrpError, list_bytes};
use dray_device::command::{Completion, SubmitError};
use dray_device::function::Doorbell;
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages, Segment};
use dray_device::space::{AddressSpace, MappedBuffer};
use crate::sync::fence;
use dray_nvme::command::{Psdt, SubmissionEntry};
use dray_nvme::doorbell_buffer::{cq_head_offset, needs_doorbell_write, sq_tail_offset};
use dray_nvme::status::Status;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::IntoBytes;

/// Most entries of a queue: leaves four bits of a command identifier to the generation.
pub(crate) const MAX_ENTRIES: u32 = 4096;
const SQE_BYTES: usize = 64;
const CQE_BYTES: usize = 16;
const PAGE_MASK: u64 = PAGE as u64 - 1;

/// How large a ring is; `entries` is a power of two from 2 to [`MAX_ENTRIES`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingShape {
    pub(crate) entries: u32,
    pub(crate) max_transfer: usize,
}

impl RingShape {
    pub(crate) fn depth(self) -> usize {
        self.entries as usize - 1
    }

    fn cq_at(self) -> usize {
        (self.entries as usize * SQE_BYTES).next_multiple_of(PAGE)
    }

    fn lists_at(self) -> usize {
        self.cq_at() + (self.entries as usize * CQE_BYTES).next_multiple_of(PAGE)
    }

    /// Memory for both queues and a PRP list per command.
    pub(crate) fn bytes(self) -> usize {
        (self.lists_at() + self.depth() * list_bytes(self.max_transfer)).next_multiple_of(PAGE)
    }

    /// Allocates and maps the memory.
    pub(crate) fn memory(
        self,
        space: &AddressSpace,
        pages: Pages,
    ) -> Result<Arc<MappedBuffer>, crate::error::DriverError> {
        let buffer = DmaBuffer::allocate("dray-queue", self.bytes(), pages)?;
        Ok(Arc::new(MappedBuffer::new(space, buffer)?))
    }

    /// I/O virtual addresses of the submission and the completion queue.
    pub(crate) fn bases(self, memory: &MappedBuffer) -> [u64; 2] {
        [memory.iova(), memory.iova() + self.cq_at() as u64]
    }
}

/// What is remembered of a command.
#[derive(Clone, Copy, Debug, Default)]
struct Context {
    tag: u64,
    deadline_ns: u64,
    /// Its place in the submission queue.
    position: u64,
    cid: u16,
    busy: bool,
    aborted: bool,
}

/// Data of a command.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data<'a> {
    /// In these pieces. Whatever data pointer the entry carries is not used: it may be someone else's.
    Pieces(&'a [Segment<'a>]),
    /// The entry's own data pointer names memory of the driver's that outlives the command: a queue that is created.
    Described,
}

/// What a look over the deadlines found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overdue {
    /// The command should be aborted.
    Abort(u16),
    /// An abort was asked for and did not help.
    Lost(u16),
}

/// A queue pair's places in the shadow doorbells: the shadow page first, the event index page behind it.
#[derive(Debug)]
struct ShadowBells {
    memory: Arc<MappedBuffer>,
    /// Of the tail, of the head.
    at: [usize; 2],
}

impl ShadowBells {
    /// Stores a doorbell; returns whether the register must be written as well. The controller stores its event index and looks
    /// at the doorbell then, with a barrier between; this is the other way round, so that one of the two sees the other.
    fn store(&self, which: usize, new: u32, old: u32) -> bool {
        let (arena, at) = (self.memory.arena(), self.at[which]);
        arena.store32(at, new, Ordering::Release);
        fence(Ordering::SeqCst);
        needs_doorbell_write(arena.load32(at + PAGE, Ordering::Acquire), new as u16, old as u16)
    }
}

/// The ring.
#[derive(Debug)]
pub(crate) struct Ring {
    qid: u16,
    arena: Arc<Arena>,
    /// Held, so that the memory stays mapped.
    _memory: Arc<MappedBuffer>,
    mask: u64,
    shift: u32,
    sq_at: usize,
    cq_at: usize,
    lists_at: usize,
    lists_iova: u64,
    list_bytes: usize,
    max_transfer: usize,
    /// Commands written, announced by the doorbell, and known to be fetched.
    tail: u64,
    rung: u64,
    head: u64,
    /// Completions taken, and those of them that the head doorbell has told of.
    taken: u64,
    told: u64,
    /// Completions that may be taken before the head doorbell is rung; more than none only where nobody waits for interrupts.
    untold: u64,
    bells: [Doorbell; 2],
    shadow: Option<ShadowBells>,
    contexts: Box<[Context]>,
    free: Vec<u16>,
    iovas: IovaCache,
}

impl Ring {
    /// A ring over zeroed memory of its shape.
    pub(crate) fn new(
        qid: u16,
        shape: RingShape,
        memory: Arc<MappedBuffer>,
        bells: [Doorbell; 2],
        space: &AddressSpace,
    ) -> Self {
        let base = memory.buffer().offset();
        let contexts: Box<[Context]> =
            (0..shape.depth() as u16).map(|i| Context { cid: i, ..Context::default() }).collect();
        Self {
            qid,
            arena: Arc::clone(memory.arena()),
            mask: u64::from(shape.entries) - 1,
            shift: shape.entries.ilog2(),
            sq_at: base,
            cq_at: base + shape.cq_at(),
            lists_at: base + shape.lists_at(),
            lists_iova: memory.iova() + shape.lists_at() as u64,
            list_bytes: list_bytes(shape.max_transfer),
            max_transfer: shape.max_transfer,
            _memory: memory,
            tail: 0,
            rung: 0,
            head: 0,
            taken: 0,
            told: 0,
            untold: 0,
            bells,
            shadow: None,
            free: (0..contexts.len() as u16).rev().collect(),
            contexts,
            iovas: IovaCache::new(space),
        }
    }

    /// Rings through the shadow doorbells from now on; their memory is two pages.
    pub(crate) fn set_shadow(&mut self, memory: Arc<MappedBuffer>, dstrd: u8) {
        let base = memory.buffer().offset();
        let at = [sq_tail_offset(self.qid, dstrd), cq_head_offset(self.qid, dstrd)].map(|at| base + at as usize);
        self.shadow = Some(ShadowBells { memory, at });
    }

    /// The queue is polled and has no interrupt: the head doorbell is rung together with the next tail, by a poll that finds
    /// nothing, or when a quarter of the completion queue has been taken. The two doorbells share a line that the controller
    /// looks at all the time, and so it goes to and fro once for a command. A queue with an interrupt is told at once: a
    /// controller may hold the next interrupt back until it sees the head move.
    pub(crate) fn set_polled(&mut self) {
        self.untold = self.mask.div_ceil(4);
    }

    /// Tells the controller how far completions have been taken.
    #[inline]
    fn tell(&mut self) {
        if self.told != self.taken {
            let before = std::mem::replace(&mut self.told, self.taken);
            self.ring(1, self.taken, before);
        }
    }

    /// Moves a doorbell: 0 the tail, 1 the head.
    #[inline]
    fn ring(&self, which: usize, new: u64, old: u64) {
        let value = (new & self.mask) as u32;
        if let Some(shadow) = &self.shadow
            && !shadow.store(which, value, (old & self.mask) as u32)
        {
            return;
        }
        self.bells[which].ring(value);
    }

    /// Commands that can be submitted now.
    #[inline]
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Commands outstanding.
    #[inline]
    pub(crate) fn outstanding(&self) -> usize {
        self.contexts.len() - self.free.len()
    }

    pub(crate) fn max_transfer(&self) -> usize {
        self.max_transfer
    }

    pub(crate) fn depth(&self) -> usize {
        self.contexts.len()
    }

    /// Writes a command into its place; the device sees it at the next [`commit`](Self::commit).
    #[inline]
    pub(crate) fn submit(
        &mut self,
        deadline_ns: u64,
        entry: &SubmissionEntry,
        data: Data<'_>,
        tag: u64,
    ) -> Result<(), SubmitError> {
        let Some(&index) = self.free.last() else { return Err(SubmitError::Full) };
        let dptr = match data {
            Data::Pieces([]) => [0; 2],
            Data::Pieces(pieces) => self.pointers(index, pieces)?,
            Data::Described => entry.dptr,
        };
        self.free.pop();
        let context = &mut self.contexts[usize::from(index)];
        context.cid = next_cid(context.cid, self.shift);
        context.tag = tag;
        context.deadline_ns = deadline_ns;
        context.position = self.tail;
        context.busy = true;
        context.aborted = false;
        let cid = context.cid;
        let entry = SubmissionEntry { cdw0: entry.cdw0.with_cid(cid).with_psdt(Psdt::PRP), dptr, ..*entry };
        self.arena.write(self.sq_at + (self.tail & self.mask) as usize * SQE_BYTES, entry.as_bytes());
        self.tail += 1;
        Ok(())
    }

    /// PRP1 and PRP2 of the data. Up to two pages in one piece need no list.
    #[inline]
    fn pointers(&mut self, index: u16, data: &[Segment<'_>]) -> Result<[u64; 2], SubmitError> {
        if let [only] = data
            && only.len() <= PAGE
            && !only.is_empty()
        {
            let iova = self.iovas.locate(only).ok_or(SubmitError::NotMapped)?;
            if iova & 3 != 0 || only.len() & 3 != 0 {
                return Err(SubmitError::BadData);
            }
            let first = PAGE - (iova & PAGE_MASK) as usize;
            return Ok([iova, if only.len() <= first { 0 } else { iova + first as u64 }]);
        }
        self.listed(index, data)
    }

    fn listed(&mut self, index: u16, data: &[Segment<'_>]) -> Result<[u64; 2], SubmitError> {
        let at = usize::from(index) * self.list_bytes;
        let list = ListMemory {
            arena: &self.arena,
            offset: self.lists_at + at,
            iova: self.lists_iova + at as u64,
            bytes: self.list_bytes,
        };
        let mut builder = PrpBuilder::new(list);
        let mut total = 0;
        for segment in data {
            total += segment.len();
            if segment.is_empty() || total > self.max_transfer {
                return Err(SubmitError::BadData);
            }
            let iova = self.iovas.locate(segment).ok_or(SubmitError::NotMapped)?;
            builder.push(iova, segment.len()).map_err(|_: PrpError| SubmitError::BadData)?;
        }
        if total & 3 != 0 {
            return Err(SubmitError::BadData);
        }
        Ok(builder.finish())
    }

    /// Announces everything submitted: one doorbell write, and one of the head where that was put off.
    #[inline]
    pub(crate) fn commit(&mut self) {
        if self.rung != self.tail {
            self.tell();
            let before = std::mem::replace(&mut self.rung, self.tail);
            self.ring(0, self.tail, before);
            // The controller has read the next place a round ago: it is fetched back while nothing waits for it.
            self.arena.prefetch_for_write(self.sq_at + (self.tail & self.mask) as usize * SQE_BYTES);
        }
    }

    /// Hands completions to `done` and, while the queue is `alive`, gives their places back with one doorbell write at most.
    /// After a fault nothing more is taken.
    #[inline]
    pub(crate) fn poll<F: FnMut(Completion)>(&mut self, alive: bool, done: &mut F) -> (usize, Option<Fault>) {
        let before = self.taken;
        let mut fault = None;
        loop {
            let at = self.cq_at + (self.taken & self.mask) as usize * CQE_BYTES;
            // DW3 carries the phase tag and is written last: nothing else of the entry is read before it.
            let dw3 = self.arena.load32(at + 12, Ordering::Acquire);
            if u64::from(dw3 >> 16) & 1 == (self.taken >> self.shift) & 1 {
                break;
            }
            let result = self.arena.load64(at, Ordering::Relaxed);
            let dw2 = self.arena.load32(at + 8, Ordering::Relaxed);
            match self.complete(dw2, dw3) {
                Ok((tag, status)) => {
                    self.taken += 1;
                    done(Completion { tag, status, result, unknown: false });
                }
                Err(found) => {
                    fault = Some(found);
                    break;
                }
            }
        }
        if alive && (self.taken == before || self.taken - self.told > self.untold) {
            self.tell();
        }
        ((self.taken - before) as usize, fault)
    }

    /// Checks a completion and frees its command.
    #[inline]
    fn complete(&mut self, dw2: u32, dw3: u32) -> Result<(u64, Status), Fault> {
        let (sqhd, sqid, cid) = (dw2 as u16, (dw2 >> 16) as u16, dw3 as u16);
        if sqid != self.qid {
            return Err(Fault::WrongQueue { sqid });
        }
        let index = u64::from(cid) & self.mask;
        let context = self.contexts.get_mut(index as usize).filter(|c| c.busy && c.cid == cid);
        let Some(context) = context else { return Err(Fault::UnknownCommand { cid }) };
        let advance = u64::from(sqhd).wrapping_sub(self.head) & self.mask;
        if u64::from(sqhd) > self.mask || advance > self.rung - self.head {
            return Err(Fault::QueueHead { sqhd });
        }
        if context.position >= self.head + advance {
            return Err(Fault::NotFetched { cid });
        }
        let status = Status::from_bits((dw3 >> 17) as u16);
        // Status code types 4 to 6 are reserved; success never gets here.
        if status.is_error() && matches!(status.sct().0, 4..=6) {
            return Err(Fault::ReservedStatus { status: status.into_bits() });
        }
        self.head += advance;
        context.busy = false;
        self.free.push(index as u16);
        Ok((context.tag, status))
    }

    /// Looks over the deadlines. An overdue command is reported for an abort and gets `grace_ns` more; one that has been
    /// reported before is lost, and the look ends.
    pub(crate) fn overdue(&mut self, now_ns: u64, grace_ns: u64, found: &mut dyn FnMut(Overdue)) {
        for context in self.contexts.iter_mut().filter(|c| c.busy && c.deadline_ns <= now_ns) {
            if context.aborted {
                found(Overdue::Lost(context.cid));
                return;
            }
            context.aborted = true;
            context.deadline_ns = now_ns.saturating_add(grace_ns);
            found(Overdue::Abort(context.cid));
        }
    }

    /// Gives every outstanding command back with an unknown outcome. The queue is dead.
    pub(crate) fn drain<F: FnMut(Completion)>(&mut self, done: &mut F) -> usize {
        let mut drained = 0;
        for (index, context) in self.contexts.iter_mut().enumerate().filter(|(_, c)| c.busy) {
            context.busy = false;
            self.free.push(index as u16);
            drained += 1;
            done(Completion { tag: context.tag, status: Status::ABORTED_SQ_DELETION, result: 0, unknown: true });
        }
        drained
    }

    /// The completion queue's memory.
    pub(crate) fn completions(&self) -> Option<Segment<'_>> {
        Segment::new(&self.arena, self.cq_at, (self.mask as usize + 1) * CQE_BYTES)
    }

    /// Tags and command identifiers of what is outstanding.
    pub(crate) fn identifiers(&self) -> impl Iterator<Item = (u64, u16)> + '_ {
        self.contexts.iter().filter(|c| c.busy).map(|c| (c.tag, c.cid))
    }
}

/// The identifier with the next generation; FFFFh is left out (Base 2.3 §4.1.1 reserves it for the error log).
#[inline]
fn next_cid(cid: u16, shift: u32) -> u16 {
    let step = 1u32 << shift;
    let next = (u32::from(cid) + step) as u16;
    // All generation bits set: with the highest slot this would be FFFFh.
    if u32::from(next) >= 0x1_0000 - step { next & (step - 1) as u16 } else { next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_keep_their_slot_and_never_become_ffff() {
        for shift in 1..=12u32 {
            let slot = (1u16 << shift) - 1;
            let mut cid = slot;
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..1 << 16 {
                cid = next_cid(cid, shift);
                assert_ne!(cid, u16::MAX);
                assert_eq!(cid & slot, slot);
                seen.insert(cid);
            }
            assert_eq!(seen.len(), (1usize << (16 - shift)) - 1, "shift {shift}");
        }
    }

    /// A ring, its doorbells, and what the device has completed.
    struct Played {
        ring: Ring,
        bells: Arc<Arena>,
        completed: u64,
    }

    const ENTRIES: u32 = 16;

    impl Played {
        fn new(polled: bool) -> Self {
            let space = AddressSpace::default();
            let shape = RingShape { entries: ENTRIES, max_transfer: PAGE };
            let memory = shape.memory(&space, Pages::Small).expect("memory");
            let bells = Arena::new("bells", PAGE, Pages::Small).expect("memory");
            let bell = |offset| Doorbell::Mapped { arena: Arc::clone(&bells), offset };
            let mut ring = Ring::new(1, shape, memory, [bell(0), bell(4)], &space);
            if polled {
                ring.set_polled();
            }
            Self { ring, bells, completed: 0 }
        }

        fn head(&self) -> u32 {
            self.bells.load32(4, Ordering::Acquire)
        }

        fn submit(&mut self) {
            let entry = SubmissionEntry::read(1, 0, 1);
            self.ring.submit(0, &entry, Data::Described, 7).expect("room");
            self.ring.commit();
        }

        /// Completes the oldest command of those that were announced.
        fn complete(&mut self) {
            let n = self.completed;
            self.completed += 1;
            let place = self.ring.sq_at + (n & self.ring.mask) as usize * SQE_BYTES;
            let cid = self.ring.arena.load32(place, Ordering::Relaxed) >> 16;
            let phase = 1 ^ (n >> self.ring.shift) as u32 & 1;
            let at = self.ring.cq_at + (n & self.ring.mask) as usize * CQE_BYTES;
            let head = (self.completed & self.ring.mask) as u32;
            self.ring.arena.store32(at + 8, head | 1 << 16, Ordering::Relaxed);
            self.ring.arena.store32(at + 12, cid | phase << 16, Ordering::Release);
        }

        fn poll(&mut self) -> usize {
            let (taken, fault) = self.ring.poll(true, &mut |_| {});
            assert_eq!(fault, None);
            taken
        }
    }

    #[test]
    fn the_head_of_a_polled_queue_goes_with_the_next_tail_or_when_nothing_comes() {
        let mut played = Played::new(true);
        for n in 0..3 * ENTRIES {
            played.submit();
            assert_eq!(played.head(), n % ENTRIES, "told with the tail");
            played.complete();
            assert_eq!(played.poll(), 1);
            assert_eq!(played.head(), n % ENTRIES, "put off");
        }
        assert_eq!(played.poll(), 0);
        assert_eq!(played.head(), 3 * ENTRIES % ENTRIES, "told when nothing comes");
    }

    #[test]
    fn the_head_of_a_polled_queue_is_never_more_than_a_quarter_behind() {
        let mut played = Played::new(true);
        (0..ENTRIES - 1).for_each(|_| played.submit());
        for taken in 1..ENTRIES {
            played.complete();
            assert_eq!(played.poll(), 1);
            assert!(taken - played.head() <= ENTRIES / 4, "{taken} taken, {} told", played.head());
        }
    }

    #[test]
    fn the_head_of_a_queue_with_an_interrupt_is_told_at_once() {
        let mut played = Played::new(false);
        for n in 1..2 * ENTRIES {
            played.submit();
            played.complete();
            assert_eq!(played.poll(), 1);
            assert_eq!(played.head(), n % ENTRIES);
        }
    }
}
