//! The namespace-backing seam: where a software controller's blocks are.

use crate::memory::Segment;
use crate::poll::Time;
use dray_nvme::status::Status;
use std::os::fd::BorrowedFd;

/// What a backing is; fixed while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingInfo {
    /// Bytes of a logical block: a power of two from 512 to 4,096.
    pub block_bytes: u32,
    /// Logical blocks.
    pub blocks: u64,
    /// Writes may sit in a cache until a flush.
    pub volatile_cache: bool,
    /// Deallocated blocks read as zeroes.
    pub deallocated_reads_zero: bool,
}

/// What is done to a range of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingOp {
    /// Blocks to memory.
    Read,
    /// Memory to blocks; with `fua` on stable storage before it ends.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Blocks read as zeroes afterwards; the space may be given back.
    WriteZeroes {
        /// The host would like the space given back.
        deallocate: bool,
        /// Force unit access.
        fua: bool,
    },
    /// The blocks' content is not needed any more.
    Deallocate,
    /// Reads of the blocks fail until they are written again. Durable as a write is, so that a restart of whoever drives the
    /// backing does not make stale content readable. Only where [`Backing::can_write_uncorrectable`] says so.
    WriteUncorrectable,
    /// Everything that ended before is on stable storage afterwards. The range is ignored.
    Flush,
}

/// One operation. The controller has checked the range and the length of the data.
#[derive(Debug)]
pub struct BackingRequest<'a> {
    /// What to do.
    pub op: BackingOp,
    /// First block.
    pub slba: u64,
    /// Blocks.
    pub blocks: u64,
    /// The data's memory, `blocks × block_bytes` in all, for reads and writes. May be any dword-aligned pieces.
    pub data: &'a [Segment<'a>],
    /// Given back at the end.
    pub tag: u64,
}

/// What became of a submitted operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It has ended.
    Done(Status),
    /// It is under way and ends in a later [`Backing::poll`]. The backing holds the memory (its arenas) until then.
    Pending,
    /// The backing takes no more now; nothing has happened.
    Busy,
}

/// Where the blocks of a namespace are.
pub trait Backing: Send {
    /// What the backing is.
    fn info(&self) -> BackingInfo;

    /// Begins an operation.
    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted;

    /// Whether nothing may be written to it: the namespace that is made over it is write protected.
    fn is_write_protected(&self) -> bool {
        false
    }

    /// Whether it carries out [`BackingOp::WriteUncorrectable`].
    fn can_write_uncorrectable(&self) -> bool {
        false
    }

    /// A hint: a transfer of these blocks may come next. Any range; it changes nothing.
    fn prefetch(&self, _slba: u64, _bytes: usize) {}

    /// Lets everything submitted since the last call go (one system call for many operations).
    fn commit(&mut self);

    /// Hands ended operations to `done`.
    fn poll(&mut self, now: Time, done: &mut dyn FnMut(u64, Status)) -> usize;

    /// Operations under way.
    fn in_flight(&self) -> usize;

    /// Whether the backing wants to be polled although nothing is under way: it has to let go of something.
    fn wants_poll(&self) -> bool {
        false
    }

    /// Whether nothing but [`poll`](Self::poll) tells that an operation has ended: while one is under way nobody may sleep.
    fn is_polled_only(&self) -> bool {
        false
    }

    /// A descriptor that becomes readable when operations end, if there is one.
    fn waker(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
