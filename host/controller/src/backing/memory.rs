//! A namespace in memory.

use super::marks::Uncorrectable;
use super::{SizeError, check};
use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::memory::{Arena, DmaBuffer, MemoryError, Pages, Segment};
use dray_device::poll::Time;
use dray_nvme::status::Status;

/// Most bytes fetched ahead of a read. Writes gain nothing: a copy of whole lines does not read its destination.
const PREFETCH_BYTES: usize = 4096;
/// Ranges that Write Uncorrectable may mark.
const MAX_MARKS: usize = 1024;

/// Blocks in an arena. Every operation ends at once; nothing survives the process.
#[derive(Debug)]
pub struct MemoryBacking {
    memory: DmaBuffer,
    block_shift: u32,
    marks: Uncorrectable,
}

impl MemoryBacking {
    /// `bytes` of zeroes in blocks of `block_bytes`, in huge pages where there are any.
    ///
    /// # Errors
    /// A size that cannot be, or no memory.
    pub fn new(bytes: u64, block_bytes: u32) -> Result<Self, MemoryBackingError> {
        check(bytes, block_bytes)?;
        let len = usize::try_from(bytes).map_err(|_| MemoryError::BadLength(usize::MAX))?;
        Self::over(DmaBuffer::allocate("dray-namespace", len, Pages::PreferHuge)?.slice(0, len), block_bytes)
    }

    /// Blocks in memory that is there.
    ///
    /// # Errors
    /// A size that cannot be.
    pub fn with_memory(memory: DmaBuffer, block_bytes: u32) -> Result<Self, MemoryBackingError> {
        Self::over(Some(memory), block_bytes)
    }

    fn over(memory: Option<DmaBuffer>, block_bytes: u32) -> Result<Self, MemoryBackingError> {
        let memory = memory.ok_or(MemoryError::BadLength(0))?;
        check(memory.len() as u64, block_bytes)?;
        Ok(Self { memory, block_shift: block_bytes.trailing_zeros(), marks: Uncorrectable::new(MAX_MARKS) })
    }

    /// The blocks.
    #[must_use]
    pub fn memory(&self) -> &DmaBuffer {
        &self.memory
    }

    /// What marks do to an operation; `None` = it goes on.
    #[cold]
    fn marked(&mut self, request: &BackingRequest<'_>) -> Option<Status> {
        let (slba, blocks) = (request.slba, request.blocks);
        match request.op {
            BackingOp::Read => self.marks.touches(slba, blocks).then_some(Status::UNRECOVERED_READ),
            BackingOp::WriteUncorrectable if self.range(request).is_none() => Some(Status::LBA_OUT_OF_RANGE),
            BackingOp::WriteUncorrectable if self.marks.mark(slba, blocks) => Some(Status::SUCCESS),
            BackingOp::WriteUncorrectable => Some(Status::INTERNAL_ERROR),
            _ => {
                self.marks.clear(slba, blocks);
                None
            }
        }
    }

    #[inline]
    fn range(&self, request: &BackingRequest<'_>) -> Option<Segment<'_>> {
        let from = usize::try_from(request.slba << self.block_shift).ok()?;
        self.memory.part(from, usize::try_from(request.blocks << self.block_shift).ok()?)
    }
}

/// Why a memory backing cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryBackingError {
    /// Its size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl Backing for MemoryBacking {
    fn info(&self) -> BackingInfo {
        BackingInfo {
            block_bytes: 1 << self.block_shift,
            blocks: self.memory.len() as u64 >> self.block_shift,
            volatile_cache: false,
            deallocated_reads_zero: true,
        }
    }

    #[inline]
    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        if request.op == BackingOp::Flush {
            return Submitted::Done(Status::SUCCESS);
        }
        if (!self.marks.is_empty() || request.op == BackingOp::WriteUncorrectable)
            && let Some(status) = self.marked(request)
        {
            return Submitted::Done(status);
        }
        // The controller has checked the range; a mistake there must not become a panic here.
        let Some(range) = self.range(request) else { return Submitted::Done(Status::LBA_OUT_OF_RANGE) };
        let (arena, mut at) = (range.arena(), range.offset());
        match request.op {
            BackingOp::Read => {
                for piece in request.data {
                    Arena::copy(arena, at, piece.arena(), piece.offset(), piece.len());
                    at += piece.len();
                }
            }
            BackingOp::Write { .. } => {
                for piece in request.data {
                    Arena::copy(piece.arena(), piece.offset(), arena, at, piece.len());
                    at += piece.len();
                }
            }
            BackingOp::WriteZeroes { .. } | BackingOp::Deallocate => arena.fill(at, range.len(), 0),
            BackingOp::Flush | BackingOp::WriteUncorrectable => {}
        }
        Submitted::Done(Status::SUCCESS)
    }

    fn can_write_uncorrectable(&self) -> bool {
        true
    }

    #[inline]
    fn prefetch(&self, slba: u64, bytes: usize) {
        let Some(at) = slba.checked_mul(1 << self.block_shift).filter(|at| *at < self.memory.len() as u64) else { return };
        let at = self.memory.offset() + at as usize;
        for line in (0..bytes.min(PREFETCH_BYTES)).step_by(64) {
            self.memory.arena().prefetch(at + line);
        }
    }

    fn commit(&mut self) {}

    fn poll(&mut self, _now: Time, _done: &mut dyn FnMut(u64, Status)) -> usize {
        0
    }

    fn in_flight(&self) -> usize {
        0
    }
}
