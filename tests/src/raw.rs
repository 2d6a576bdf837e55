//! A guest without a driver: registers, queues and doorbells by hand, so that it can do what no driver does.

use crate::rig::{IO_QUEUES, World};
use dray_device::function::Function;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::slot::Slot;
use dray_device::space::AddressSpace;
use dray_nvme::command::{CompletionEntry, SubmissionEntry};
use dray_nvme::registers::{cq_head_doorbell, offset, sq_tail_doorbell};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::IntoBytes;

/// CC with EN, and entry sizes of 64 and 16 bytes.
pub const ENABLE: u32 = 0x0046_0001;
/// Bytes of the guest's memory.
pub const MEMORY_BYTES: usize = 8 << 20;
/// Rounds that a completion may take.
const PATIENCE_ROUNDS: usize = 200_000;
const PAGE: usize = 4096;

/// A submission and a completion queue of the same size, as the guest keeps them.
#[derive(Debug)]
pub struct RawQueue {
    qid: u16,
    sq: usize,
    cq: usize,
    entries: u32,
    /// Tail of the submission queue.
    pub tail: u32,
    /// Head of the completion queue.
    pub head: u32,
    phase: bool,
    cid: u16,
}

/// A guest with memory, registers and queues.
#[derive(Debug)]
pub struct RawGuest {
    /// The slot that it sits in.
    pub slot: Slot,
    /// Its function.
    pub function: Arc<dyn Function>,
    /// Its memory.
    pub memory: DmaBuffer,
    /// Where the controller finds that memory.
    pub iova: u64,
    next_page: usize,
}

impl RawGuest {
    /// A guest before a controller, which it has not enabled.
    ///
    /// # Panics
    /// Without memory, or without such a controller.
    #[must_use]
    pub fn new(world: &World, side: usize, cntlid: u16) -> Self {
        let space = AddressSpace::default();
        let memory = DmaBuffer::allocate("raw-guest", MEMORY_BYTES, Pages::Small).expect("memory");
        let iova = space.map(&memory, true).expect("mapped memory");
        let slot = Slot::new(space, IO_QUEUES + 1).expect("a slot");
        slot.point_at(&world.subsystems[side].plug(cntlid).expect("a controller of that CNTLID"));
        let function = slot.function();
        Self { slot, function, memory, iova, next_page: 0 }
    }

    /// `bytes` of fresh memory at a page: its offset.
    ///
    /// # Panics
    /// When the memory is used up.
    pub fn pages(&mut self, bytes: usize) -> usize {
        let at = self.next_page * PAGE;
        self.next_page += bytes.div_ceil(PAGE);
        assert!(self.next_page * PAGE <= MEMORY_BYTES, "the guest's memory is used up");
        at
    }

    /// The address of an offset in the guest's memory.
    #[must_use]
    pub fn address(&self, at: usize) -> u64 {
        self.iova + at as u64
    }

    /// CSTS.
    #[must_use]
    pub fn csts(&self) -> u32 {
        self.function.read32(offset::CSTS)
    }

    /// A queue pair in fresh memory; the controller does not know of it yet.
    pub fn queue(&mut self, qid: u16, entries: u32) -> RawQueue {
        let (sq, cq) = (self.pages(entries as usize * 64), self.pages(entries as usize * 16));
        RawQueue { qid, sq, cq, entries, tail: 0, head: 0, phase: true, cid: 0 }
    }

    /// Enables the controller with admin queues in fresh memory.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn enable(&mut self, world: &mut World) -> RawQueue {
        let admin = self.queue(0, 32);
        self.function.write32(offset::AQA, 31 << 16 | 31);
        self.function.write64(offset::ASQ, self.address(admin.sq));
        self.function.write64(offset::ACQ, self.address(admin.cq));
        self.function.write32(offset::CC, ENABLE);
        world.rounds(10);
        assert_eq!(self.csts(), 1, "the controller is ready");
        admin
    }

    /// Resets the controller.
    ///
    /// # Panics
    /// When CSTS.RDY does not fall.
    pub fn reset(&mut self, world: &mut World) {
        self.function.write32(offset::CC, 0);
        world.rounds(10);
        assert_eq!(self.csts() & 1, 0, "the controller is reset");
        self.next_page = 0;
        self.memory.arena().fill(0, MEMORY_BYTES, 0);
    }

    /// Creates an I/O queue pair.
    ///
    /// # Panics
    /// When it is refused.
    pub fn create(&mut self, world: &mut World, admin: &mut RawQueue, qid: u16, entries: u32) -> RawQueue {
        let queue = self.queue(qid, entries);
        let (sq, cq, size) = (self.address(queue.sq), self.address(queue.cq), entries as u16 - 1);
        for entry in [SubmissionEntry::create_io_cq(qid, size, None, cq), SubmissionEntry::create_io_sq(qid, size, qid, sq)] {
            let done = self.run(world, admin, &entry);
            assert!(!done.status().is_error(), "{done:?}");
        }
        queue
    }

    /// Puts a command into a queue, without its doorbell; the identifier it got.
    pub fn push(&self, queue: &mut RawQueue, entry: &SubmissionEntry) -> u16 {
        queue.cid = queue.cid.wrapping_add(1);
        let entry = entry.with_cid(queue.cid);
        self.memory.arena().write(queue.sq + queue.tail as usize * 64, entry.as_bytes());
        queue.tail = (queue.tail + 1) % queue.entries;
        queue.cid
    }

    /// Rings a submission queue's doorbell with the queue's tail.
    pub fn ring(&self, queue: &RawQueue) {
        self.ring_with(queue.qid, queue.tail);
    }

    /// Rings a submission queue's doorbell with any value.
    pub fn ring_with(&self, qid: u16, value: u32) {
        if let Some(bell) = self.function.doorbell(sq_tail_doorbell(qid, 0)) {
            bell.ring(value);
        }
    }

    /// Rings a completion queue's doorbell with any value.
    pub fn ring_head_with(&self, qid: u16, value: u32) {
        if let Some(bell) = self.function.doorbell(cq_head_doorbell(qid, 0)) {
            bell.ring(value);
        }
    }

    /// The next completion, if it is there. Its slot is not given back.
    pub fn pop(&self, queue: &mut RawQueue) -> Option<CompletionEntry> {
        let at = queue.cq + queue.head as usize * 16;
        let arena = self.memory.arena();
        if (arena.load32(at + 12, Ordering::Acquire) >> 16 & 1 == 1) != queue.phase {
            return None;
        }
        let mut entry = CompletionEntry::default();
        arena.read(at, entry.as_mut_bytes());
        queue.head += 1;
        if queue.head == queue.entries {
            (queue.head, queue.phase) = (0, !queue.phase);
        }
        Some(entry)
    }

    /// Runs one command to its end and gives its completion's slot back.
    ///
    /// # Panics
    /// When it does not end, or another one does.
    #[track_caller]
    pub fn run(&self, world: &mut World, queue: &mut RawQueue, entry: &SubmissionEntry) -> CompletionEntry {
        let cid = self.push(queue, entry);
        self.ring(queue);
        for _ in 0..PATIENCE_ROUNDS {
            world.rounds(1);
            if let Some(done) = self.pop(queue) {
                self.ring_head_with(queue.qid, queue.head);
                assert_eq!(done.cid, cid, "the completion of another command");
                return done;
            }
        }
        panic!("{entry:?} does not end");
    }
}
