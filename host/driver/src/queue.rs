//! I/O queue pairs: the command seam over a function's queues.

use crate::link::PairShared;
use crate::ring::{Data, Overdue, Ring};
use dray_device::command::{CommandQueue, Completion, QueueLimits, SubmitError};
use dray_device::event::EventLine;
use dray_device::memory::Segment;
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Longest extra time that an aborted command gets before its queue is given up, in nanoseconds.
const MOST_GRACE_NS: u64 = 5_000_000_000;

/// An I/O submission queue and its completion queue, owned by one thread at a time.
///
/// Every command that was taken comes back exactly once. When the driver resets the controller, or finds it gone, the queue is
/// dead: what is outstanding comes back with [`Completion::unknown`], and nothing is taken any more. Dropping the pair lets the
/// driver delete both queues at its next poll; what was outstanding is then never reported, so drain it first.
#[derive(Debug)]
pub struct QueuePair {
    ring: Ring,
    shared: Arc<PairShared>,
    limits: QueueLimits,
    line: Option<EventLine>,
    timeout_ns: u64,
    next_look_ns: u64,
    faulted: bool,
}

impl QueuePair {
    pub(crate) fn new(
        ring: Ring,
        shared: Arc<PairShared>,
        max_write_zeroes: u64,
        timeout_ns: u64,
        line: Option<EventLine>,
    ) -> Self {
        let limits = QueueLimits { depth: ring.depth() as u32, max_transfer: ring.max_transfer(), max_write_zeroes };
        Self { ring, shared, limits, line, timeout_ns, next_look_ns: 0, faulted: false }
    }

    /// Its queue identifier (both queues have the same).
    #[must_use]
    pub fn qid(&self) -> u16 {
        self.shared.qid
    }

    /// Commands outstanding.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.ring.outstanding()
    }

    /// Whether the queue takes no commands any more.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        !self.shared.is_live()
    }

    /// The line that the controller signals when it posts completions; `None` when interrupts are off.
    #[must_use]
    pub fn event_line(&self) -> Option<&EventLine> {
        self.line.as_ref()
    }

    /// Tag and command identifier of each outstanding command, for [`Driver::abort`](crate::Driver::abort).
    pub fn identifiers(&self) -> impl Iterator<Item = (u64, u16)> + '_ {
        self.ring.identifiers()
    }

    /// The memory of the completion queue, its entries 16 bytes each, for who wants to see what the controller posts there.
    /// Nothing is taken by looking.
    #[must_use]
    pub fn completion_memory(&self) -> Option<Segment<'_>> {
        self.ring.completions()
    }

    /// As [`CommandQueue::submit`], without a call through a table.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    #[inline]
    pub fn submit(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        data: &[Segment<'_>],
        tag: u64,
    ) -> Result<(), SubmitError> {
        if !self.shared.is_live() {
            return Err(SubmitError::Dead);
        }
        self.ring.submit(now.0.saturating_add(self.timeout_ns), entry, Data::Pieces(data), tag)
    }

    /// As [`CommandQueue::commit`]: one doorbell write for everything submitted.
    #[inline]
    pub fn commit(&mut self) {
        // A dead queue's doorbell may be another queue's by now.
        if self.shared.is_live() {
            self.ring.commit();
        }
    }

    /// As [`CommandQueue::poll`], with a consumer that the compiler sees.
    #[inline]
    pub fn poll_with<F: FnMut(Completion)>(&mut self, now: Time, mut done: F) -> usize {
        // Asked before the ring is read: what was posted before the queue died keeps its outcome.
        let dead = self.shared.is_dead();
        let mut count = 0;
        if !self.faulted {
            let (taken, fault) = self.ring.poll(!dead, &mut done);
            count = taken;
            if let Some(fault) = fault {
                self.faulted = true;
                self.shared.note_fault(fault);
            }
        }
        if dead {
            count += self.ring.drain(&mut done);
        } else if now.0 >= self.next_look_ns {
            self.look_at_deadlines(now);
        }
        count
    }

    /// Costs a pass over the context table, an eighth of the time-out apart.
    #[cold]
    fn look_at_deadlines(&mut self, now: Time) {
        self.next_look_ns = now.0.saturating_add(self.timeout_ns / 8).max(now.0.saturating_add(1));
        if self.faulted || self.ring.outstanding() == 0 {
            return;
        }
        let (shared, faulted) = (&self.shared, &mut self.faulted);
        self.ring.overdue(now.0, self.timeout_ns.min(MOST_GRACE_NS), &mut |found| match found {
            Overdue::Abort(cid) => shared.note_abort(cid),
            Overdue::Lost(cid) => {
                *faulted = true;
                shared.note_fault(crate::error::Fault::TimedOut { cid });
            }
        });
    }
}

impl CommandQueue for QueuePair {
    fn limits(&self) -> QueueLimits {
        self.limits
    }

    fn free(&self) -> usize {
        if self.shared.is_live() { self.ring.free() } else { 0 }
    }

    fn submit(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        data: &[Segment<'_>],
        tag: u64,
    ) -> Result<(), SubmitError> {
        Self::submit(self, now, entry, data, tag)
    }

    fn commit(&mut self) {
        Self::commit(self);
    }

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        self.poll_with(now, done)
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.line.as_ref().map(AsFd::as_fd)
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}
