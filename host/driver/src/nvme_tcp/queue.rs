//! I/O queues: the command seam over a connection.

use super::connection::Connection;
use super::error::TcpFault;
use dray_device::command::{CommandQueue, Completion, QueueLimits, SubmitError};
use dray_device::memory::Segment;
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the connections of an association know of each other.
#[derive(Debug, Default)]
pub(super) struct Association {
    lost: AtomicBool,
}

impl Association {
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }
}

/// An I/O queue of a remote controller, owned by one thread at a time.
///
/// Every command that was taken comes back exactly once. When the association ends, with whichever of its connections, the
/// queue is dead: what is outstanding comes back with [`Completion::unknown`], and nothing is taken any more. Dropping the queue
/// closes its connection, which ends the association at many targets: drop it last.
#[derive(Debug)]
pub struct TcpQueue {
    qid: u16,
    connection: Connection,
    association: Arc<Association>,
    limits: QueueLimits,
}

impl TcpQueue {
    pub(super) fn new(qid: u16, connection: Connection, association: Arc<Association>, max_write_zeroes: u64) -> Self {
        let shape = connection.shape();
        let limits = QueueLimits { depth: shape.depth as u32, max_transfer: shape.max_transfer, max_write_zeroes };
        Self { qid, connection, association, limits }
    }

    /// Its queue identifier.
    #[must_use]
    pub fn qid(&self) -> u16 {
        self.qid
    }

    /// Commands outstanding.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.connection.outstanding()
    }

    /// Why the queue is dead, once it is.
    #[must_use]
    pub fn fault(&self) -> Option<TcpFault> {
        self.connection.fault()
    }

    /// Whether the queue takes no commands any more.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.connection.fault().is_some() || self.association.is_lost()
    }

    /// Bytes wait that the stream did not take: poll again soon, no waker tells.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.connection.is_blocked()
    }

    /// The descriptor that becomes readable when the target has sent something.
    #[must_use]
    pub fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.connection.waker()
    }

    fn share_faults(&mut self) {
        if self.connection.fault().is_some() {
            self.association.lose();
        } else if self.association.is_lost() {
            self.connection.fail(TcpFault::AssociationLost);
        }
    }
}

impl CommandQueue for TcpQueue {
    fn limits(&self) -> QueueLimits {
        self.limits
    }

    fn free(&self) -> usize {
        if self.is_dead() { 0 } else { self.connection.free() }
    }

    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        if self.is_dead() {
            return Err(SubmitError::Dead);
        }
        self.connection.submit(now, None, entry, data, tag, true)
    }

    fn commit(&mut self) {
        self.connection.commit();
    }

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        self.share_faults();
        let count = self.connection.poll(now, done);
        self.share_faults();
        count
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Self::waker(self)
    }
}
