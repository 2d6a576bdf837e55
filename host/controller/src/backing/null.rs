//! A namespace that holds nothing, for measuring everything else.

use super::{SizeError, check};
use dray_device::backing::{Backing, BackingInfo, BackingRequest, Submitted};
use dray_device::poll::Time;
use dray_nvme::status::Status;

/// Every operation succeeds at once and moves no data: what is read stays as the guest's buffer was.
#[derive(Clone, Copy, Debug)]
pub struct NullBacking {
    blocks: u64,
    block_bytes: u32,
}

impl NullBacking {
    /// As if it had `bytes` in blocks of `block_bytes`.
    ///
    /// # Errors
    /// A size that cannot be.
    pub fn new(bytes: u64, block_bytes: u32) -> Result<Self, SizeError> {
        check(bytes, block_bytes)?;
        Ok(Self { blocks: bytes / u64::from(block_bytes), block_bytes })
    }
}

impl Backing for NullBacking {
    fn info(&self) -> BackingInfo {
        BackingInfo {
            block_bytes: self.block_bytes,
            blocks: self.blocks,
            volatile_cache: false,
            deallocated_reads_zero: false,
        }
    }

    #[inline]
    fn submit(&mut self, _request: &BackingRequest<'_>) -> Submitted {
        Submitted::Done(Status::SUCCESS)
    }

    fn commit(&mut self) {}

    fn poll(&mut self, _now: Time, _done: &mut dyn FnMut(u64, Status)) -> usize {
        0
    }

    fn in_flight(&self) -> usize {
        0
    }
}
