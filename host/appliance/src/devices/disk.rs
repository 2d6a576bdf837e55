//! A namespace of a device read and written block by block, by the caller's thread: for what fills and compares disks.
//!
//! No controller of ours stands between, only the queue.

use super::DeviceBacking;
use crate::core::clock::Clock;
use dray_device::backing::{Backing, BackingOp, BackingRequest, Submitted};
use dray_device::memory::{DmaBuffer, MemoryError, Pages};
use dray_workload::reader::BlockReader;
use dray_workload::tag::BLOCK_BYTES;
use std::io;

/// Bytes of one operation.
const CHUNK: usize = 256 << 10;
/// How long one may take, in milliseconds.
const PATIENCE_MS: u64 = 60_000;

/// The disk.
#[derive(Debug)]
pub struct DeviceDisk {
    backing: DeviceBacking,
    buffer: DmaBuffer,
    clock: Clock,
}

impl DeviceDisk {
    /// Over a namespace that nobody else uses.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(backing: DeviceBacking) -> Result<Self, MemoryError> {
        Ok(Self { backing, buffer: DmaBuffer::allocate("dray-disk", CHUNK, Pages::Small)?, clock: Clock::new() })
    }

    /// Bytes in all, whole blocks of [`BLOCK_BYTES`].
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let info = self.backing.info();
        info.blocks * u64::from(info.block_bytes) / BLOCK_BYTES as u64 * BLOCK_BYTES as u64
    }

    fn operate(&mut self, op: BackingOp, at: u64, len: usize) -> io::Result<()> {
        let block = u64::from(self.backing.info().block_bytes);
        let (slba, blocks) = (at / block, len as u64 / block);
        let data = self.buffer.part(0, len).ok_or(io::ErrorKind::InvalidInput)?;
        let pieces = if matches!(op, BackingOp::Read | BackingOp::Write { .. }) { std::slice::from_ref(&data) } else { &[] };
        let request = BackingRequest { op, slba, blocks, data: pieces, tag: 0 };
        let mut ended = match self.backing.submit(&request) {
            Submitted::Done(status) => Some(status),
            Submitted::Pending => None,
            Submitted::Busy => return Err(io::ErrorKind::ResourceBusy.into()),
        };
        self.backing.commit();
        let deadline = self.clock.now().after_ms(PATIENCE_MS);
        while ended.is_none() {
            let now = self.clock.now();
            self.backing.poll(now, &mut |_, status| ended = Some(status));
            if now >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::hint::spin_loop();
        }
        match ended {
            Some(status) if status.is_error() => Err(io::Error::other(format!("at byte {at}: {status}"))),
            _ => Ok(()),
        }
    }

    /// Writes what `fill` makes of each chunk (the number of its first block of [`BLOCK_BYTES`], and its bytes), and flushes.
    ///
    /// # Errors
    /// The device's.
    pub fn write_all(&mut self, fill: &mut dyn FnMut(u64, &mut [u8])) -> io::Result<()> {
        let (bytes, mut chunk) = (self.bytes(), vec![0; CHUNK]);
        let mut at = 0;
        while at < bytes {
            let len = usize::try_from((bytes - at).min(CHUNK as u64)).unwrap_or(CHUNK);
            fill(at / BLOCK_BYTES as u64, &mut chunk[..len]);
            self.buffer.arena().write(0, &chunk[..len]);
            self.operate(BackingOp::Write { fua: false }, at, len)?;
            at += len as u64;
        }
        self.operate(BackingOp::Flush, 0, 0)
    }
}

impl BlockReader for DeviceDisk {
    fn blocks(&self) -> u64 {
        self.bytes() / BLOCK_BYTES as u64
    }

    fn read(&mut self, block: u64, into: &mut [u8]) -> io::Result<()> {
        for (nth, piece) in into.chunks_mut(CHUNK).enumerate() {
            let at = block * BLOCK_BYTES as u64 + (nth * CHUNK) as u64;
            self.operate(BackingOp::Read, at, piece.len())?;
            self.buffer.arena().read(0, piece);
        }
        Ok(())
    }
}
