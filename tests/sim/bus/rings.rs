//! The two ends of the admin queues: the driver's, and the controller's.

use super::function::{BELLS_AT, CQ_AT, ENTRIES, Registers, SQ_AT};
use dray_device::function::Doorbell;
use dray_device::memory::DmaBuffer;
use dray_device::space::AddressSpace;
use dray_nvme::command::{CompletionEntry, StatusPhase, SubmissionEntry};
use std::sync::atomic::Ordering;
use zerocopy::{FromBytes, IntoBytes};

const SQE: usize = size_of::<SubmissionEntry>();
const CQE: usize = size_of::<CompletionEntry>();

fn memory(space: &AddressSpace, iova: u64, bytes: usize) -> Option<DmaBuffer> {
    let mapping = space.find(iova)?;
    mapping.memory.slice(usize::try_from(iova - mapping.iova).ok()?, bytes)
}

/// The driver's admin queues, read and written in the controller's place.
#[derive(Debug)]
pub(super) struct DriverEnd {
    sq: DmaBuffer,
    cq: DmaBuffer,
    sq_size: u32,
    cq_size: u32,
    sq_head: u32,
    cq_tail: u32,
    phase: bool,
}

impl DriverEnd {
    /// As AQA, ASQ and ACQ say; `None` where there is no such memory.
    pub(super) fn new(registers: &Registers) -> Option<Self> {
        let (aqa, asq, acq) = registers.queues();
        let (sq_size, cq_size) = (u32::from(aqa.asqs()) + 1, u32::from(aqa.acqs()) + 1);
        let space = registers.inner.space();
        Some(Self {
            sq: memory(space, asq, sq_size as usize * SQE)?,
            cq: memory(space, acq, cq_size as usize * CQE)?,
            sq_size,
            cq_size,
            sq_head: 0,
            cq_tail: 0,
            phase: true,
        })
    }

    /// The next command that the driver has rung the doorbell for.
    pub(super) fn next(&mut self, registers: &Registers) -> Option<SubmissionEntry> {
        let tail = registers.arena.load32(BELLS_AT, Ordering::Relaxed);
        if tail == self.sq_head || tail >= self.sq_size {
            return None;
        }
        let mut entry = SubmissionEntry::default();
        self.sq.arena().read(self.sq.offset() + self.sq_head as usize * SQE, entry.as_mut_bytes());
        self.sq_head = (self.sq_head + 1) % self.sq_size;
        Some(entry)
    }

    /// Posts a completion, as it is then; `None` without room for it.
    pub(super) fn post(&mut self, registers: &Registers, mut completion: CompletionEntry) -> Option<CompletionEntry> {
        let head = registers.arena.load32(BELLS_AT + 4, Ordering::Relaxed);
        if (self.cq_tail + 1) % self.cq_size == head % self.cq_size {
            return None;
        }
        completion.sqhd = self.sq_head as u16;
        completion.sqid = 0;
        completion.status_phase = StatusPhase::new().with_status(completion.status()).with_phase(self.phase);
        self.cq.arena().write(self.cq.offset() + self.cq_tail as usize * CQE, completion.as_bytes());
        self.cq_tail += 1;
        if self.cq_tail == self.cq_size {
            (self.cq_tail, self.phase) = (0, !self.phase);
        }
        Some(completion)
    }
}

/// The controller's admin queues, driven in the driver's place.
#[derive(Debug)]
pub(super) struct ControllerEnd {
    bells: [Doorbell; 2],
    tail: u32,
    head: u32,
    phase: bool,
}

impl ControllerEnd {
    pub(super) fn new(bells: [Doorbell; 2]) -> Self {
        Self { bells, tail: 0, head: 0, phase: true }
    }

    /// The controller was reset: its queues are empty.
    pub(super) fn reset(&mut self) {
        (self.tail, self.head, self.phase) = (0, 0, true);
    }

    /// Submits a command; the caller knows that there is room (as many identifiers as entries, less one).
    pub(super) fn submit(&mut self, registers: &Registers, entry: &SubmissionEntry) {
        registers.arena.write(SQ_AT + self.tail as usize * SQE, entry.as_bytes());
        self.tail = (self.tail + 1) % ENTRIES;
        self.bells[0].ring(self.tail);
    }

    /// The next completion.
    pub(super) fn next(&mut self, registers: &Registers) -> Option<CompletionEntry> {
        let mut bytes = [0; CQE];
        registers.arena.read(CQ_AT + self.head as usize * CQE, &mut bytes);
        let completion = CompletionEntry::read_from_bytes(&bytes).ok()?;
        if completion.phase() != self.phase {
            return None;
        }
        self.head += 1;
        if self.head == ENTRIES {
            (self.head, self.phase) = (0, !self.phase);
        }
        self.bells[1].ring(self.head);
        Some(completion)
    }
}
