//! The command seam: commands with a segment list, submitted and completed by polling.
//!
//! Queue pairs, io_uring passthrough and the NVMe/TCP initiator implement it; copying and physical backings need no more.

use crate::memory::Segment;
use crate::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use std::os::fd::BorrowedFd;

/// What a queue can take; fixed while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Commands that may be outstanding.
    pub depth: u32,
    /// Most bytes of data in one command.
    pub max_transfer: usize,
    /// Most bytes that one Write Zeroes may cover, 0 = the queue has none.
    pub max_write_zeroes: u64,
}

/// Why a command was not taken. Nothing of it has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many commands are outstanding as the queue takes: poll, then submit again.
    #[error("the queue is full")]
    Full,
    /// The data is longer than the device takes, or not aligned as it wants (a dword for PRPs).
    #[error("the data cannot be described to the device")]
    BadData,
    /// The memory is not mapped for the device.
    #[error("the data is not in memory that is mapped for the device")]
    NotMapped,
    /// The queue is dead (the device failed, was reset or has gone).
    #[error("the queue is dead")]
    Dead,
}

/// A command that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the submitter gave.
    pub tag: u64,
    /// The status field.
    pub status: Status,
    /// DW1:DW0 of the completion entry.
    pub result: u64,
    /// The outcome is not known: the queue died, or the command timed out, while the device had it. Its effect may still
    /// come until the device has been reset.
    pub unknown: bool,
}

/// A queue of commands.
pub trait CommandQueue: Send {
    /// What the queue can take.
    fn limits(&self) -> QueueLimits;

    /// Commands that can be submitted now.
    fn free(&self) -> usize;

    /// Takes a command. `entry` carries everything but the identifier and the data pointer; `data` is the memory, in order.
    /// The memory stays untouched by the caller until the completion. `now` starts the command's time-out.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError>;

    /// Lets the device see everything submitted since the last commit: one doorbell, one system call.
    fn commit(&mut self);

    /// Hands finished commands to `done` and returns how many there were. Every command that was taken comes back exactly
    /// once, with [`Completion::unknown`] set if nobody can say how it ended.
    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize;
    /// A descriptor that becomes readable when commands end, if there is one; else whoever waits has to poll.
    fn waker(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
