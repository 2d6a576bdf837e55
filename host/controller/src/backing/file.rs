//! A namespace in a file, by io_uring.

use super::{SizeError, check};
use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::memory::{DmaBuffer, MemoryError, Pages, Segment};
use dray_device::poll::Time;
use dray_device::uring::{FileOp, FileRing, FileRingError};
use dray_nvme::status::Status;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// Shorter ranges are zeroed by writing zeroes. The filesystem's own zeroing waits for all direct writes under way, and leaves
/// unwritten extents behind, each of which costs a journal transaction when it is written next.
const ZERO_RANGE_FROM: u64 = 1 << 20;

/// Zeroes that are written at a time where the filesystem cannot zero a range by itself.
const ZERO_BYTES: usize = 256 << 10;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;
const EOPNOTSUPP: i32 = 95;
const ENOSYS: i32 = 38;
const EINVAL: i32 = 22;

/// Why a file cannot be a namespace.
#[derive(Debug, thiserror::Error)]
pub enum FileBackingError {
    /// Opening it, or the ring.
    #[error(transparent)]
    Ring(#[from] FileRingError),
    /// Its size cannot be read.
    #[error("cannot read the file's size: {0}")]
    Io(#[from] io::Error),
    /// Its size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Zeroes.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    op: BackingOp,
    slba: u64,
    blocks: u64,
    tag: u64,
    /// Blocks still to be zeroed by writing zeroes; 0 = not that.
    zero_left: u64,
}

/// Blocks in a file. Writes may sit in a cache until a flush (fdatasync); FUA writes are synchronous ones.
#[derive(Debug)]
pub struct FileBacking {
    ring: FileRing,
    info: BackingInfo,
    block_shift: u32,
    operations: Vec<Operation>,
    free: Vec<u32>,
    ended: Vec<(u64, io::Result<()>)>,
    /// Operations whose next piece found the ring full.
    stalled: Vec<u32>,
    zeroes: DmaBuffer,
    /// The filesystem refuses to zero ranges, or to make holes: zeroes are written instead.
    refuses: [bool; 2],
}

impl FileBacking {
    /// The whole of the file at `path`, in blocks of `block_bytes`; up to `depth` operations at a time.
    ///
    /// # Errors
    /// [`FileBackingError`].
    pub fn open(path: &Path, block_bytes: u32, depth: u32) -> Result<Self, FileBackingError> {
        let depth = depth.clamp(1, 1024);
        let ring = FileRing::open(path, depth)?;
        let bytes = ring.size()?;
        check(bytes, block_bytes)?;
        let info = BackingInfo {
            block_bytes,
            blocks: bytes / u64::from(block_bytes),
            volatile_cache: true,
            deallocated_reads_zero: true,
        };
        let idle = Operation { op: BackingOp::Flush, slba: 0, blocks: 0, tag: 0, zero_left: 0 };
        Ok(Self {
            ring,
            info,
            block_shift: block_bytes.trailing_zeros(),
            operations: vec![idle; depth as usize],
            free: (0..depth).rev().collect(),
            ended: Vec::with_capacity(depth as usize),
            stalled: Vec::with_capacity(depth as usize),
            zeroes: DmaBuffer::allocate("dray-zeroes", ZERO_BYTES, Pages::Small)?,
            refuses: [false; 2],
        })
    }

    /// Whether the page cache is passed by (O_DIRECT).
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.ring.is_direct()
    }

    /// Takes the file for this backing alone; false while another has it, or a killed process still has writes under way to it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_lock(&self) -> io::Result<bool> {
        self.ring.try_lock()
    }

    fn send(&mut self, index: u32, data: &[Segment<'_>]) -> bool {
        let Some(operation) = self.operations.get_mut(index as usize) else { return false };
        let (slba, blocks) = (operation.slba, operation.blocks);
        let small = blocks << self.block_shift < ZERO_RANGE_FROM;
        let written = |hole: bool| self.refuses[usize::from(hole)] || operation.zero_left > 0 || (small && !hole);
        if zeroing(operation.op).is_some_and(written) {
            return self.send_zeroes(index);
        }
        let op = match operation.op {
            BackingOp::Read => FileOp::Read,
            BackingOp::Write { fua } => FileOp::Write { sync: fua },
            BackingOp::WriteZeroes { deallocate, .. } => FileOp::Zero { deallocate },
            BackingOp::Deallocate => FileOp::Zero { deallocate: true },
            BackingOp::Flush => FileOp::Flush,
            // A file has no place for marks that outlive this process.
            BackingOp::WriteUncorrectable => return false,
        };
        let shift = self.block_shift;
        self.ring.submit(op, slba << shift, blocks << shift, data, u64::from(index)).is_ok()
    }

    /// The next piece of a range that is zeroed by writing zeroes.
    fn send_zeroes(&mut self, index: u32) -> bool {
        let Some(operation) = self.operations.get_mut(index as usize) else { return false };
        if operation.zero_left == 0 {
            operation.zero_left = operation.blocks;
        }
        let blocks = operation.zero_left.min((ZERO_BYTES >> self.block_shift) as u64);
        let at = operation.slba + operation.blocks - operation.zero_left;
        let Some(data) = self.zeroes.part(0, (blocks << self.block_shift) as usize) else { return false };
        let sync = matches!(operation.op, BackingOp::WriteZeroes { fua: true, .. });
        let (from, len) = (at << self.block_shift, blocks << self.block_shift);
        self.ring.submit(FileOp::Write { sync }, from, len, &[data], u64::from(index)).is_ok()
    }

    /// `Some` when the operation has ended.
    fn step(&mut self, index: u32, result: &io::Result<()>) -> Option<Status> {
        let operation = self.operations.get_mut(index as usize)?;
        match result {
            Err(error) if operation.zero_left == 0 && refused(operation.op, error) => {
                self.refuses[usize::from(zeroing(operation.op) == Some(true))] = true;
            }
            Err(error) => return Some(status(operation.op, error)),
            Ok(()) if operation.zero_left > 0 => {
                operation.zero_left -= operation.zero_left.min((ZERO_BYTES >> self.block_shift) as u64);
                if operation.zero_left == 0 {
                    return Some(Status::SUCCESS);
                }
            }
            Ok(()) => {
                let BackingOp::WriteZeroes { fua: true, .. } = operation.op else { return Some(Status::SUCCESS) };
                // Zeroing by the filesystem is metadata: a flush makes it stable.
                operation.op = BackingOp::Flush;
            }
        }
        if !self.send(index, &[]) {
            self.stalled.push(index);
        }
        None
    }
}

/// Whether an operation zeroes, and if so whether by a hole.
fn zeroing(op: BackingOp) -> Option<bool> {
    match op {
        BackingOp::WriteZeroes { deallocate, .. } => Some(deallocate),
        BackingOp::Deallocate => Some(true),
        _ => None,
    }
}

fn refused(op: BackingOp, error: &io::Error) -> bool {
    zeroing(op).is_some() && matches!(error.raw_os_error(), Some(EOPNOTSUPP | ENOSYS | EINVAL))
}

fn status(op: BackingOp, error: &io::Error) -> Status {
    match (op, error.raw_os_error()) {
        (_, Some(ENOSPC | EDQUOT)) => Status::CAPACITY_EXCEEDED,
        (BackingOp::Read, _) => Status::UNRECOVERED_READ,
        (BackingOp::Write { .. } | BackingOp::WriteZeroes { .. }, _) => Status::WRITE_FAULT,
        _ => Status::INTERNAL_ERROR,
    }
}

impl Backing for FileBacking {
    fn info(&self) -> BackingInfo {
        self.info
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        if request.op == BackingOp::WriteUncorrectable {
            return Submitted::Done(Status::INVALID_OPCODE);
        }
        let Some(&index) = self.free.last() else { return Submitted::Busy };
        let Some(operation) = self.operations.get_mut(index as usize) else { return Submitted::Busy };
        let BackingRequest { op, slba, blocks, tag, .. } = *request;
        *operation = Operation { op, slba, blocks, tag, zero_left: 0 };
        if !self.send(index, request.data) {
            return Submitted::Busy;
        }
        self.free.pop();
        Submitted::Pending
    }

    fn commit(&mut self) {
        self.ring.commit();
    }

    fn poll(&mut self, _now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        for _ in 0..self.stalled.len() {
            let Some(index) = self.stalled.pop() else { break };
            if !self.send(index, &[]) {
                self.stalled.push(index);
                break;
            }
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.ring.poll(&mut |tag, result| ended.push((tag, result)));
        let mut count = 0;
        for (tag, result) in ended.drain(..) {
            let index = tag as u32;
            if let Some(status) = self.step(index, &result) {
                if let Some(operation) = self.operations.get(index as usize) {
                    done(operation.tag, status);
                }
                self.free.push(index);
                count += 1;
            }
        }
        self.ended = ended;
        self.ring.commit();
        count
    }

    fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.waker())
    }
}
