//! The backing of a namespace whose file is not there: it has a size, so that the controller can be looked at, and no blocks.

use dray_device::backing::{Backing, BackingInfo, BackingRequest, Submitted};
use dray_device::poll::Time;
use dray_nvme::status::Status;

/// Says what the file's backing would say, and fails every operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct AbsentBacking(BackingInfo);

impl AbsentBacking {
    /// As if there were a file of `bytes` in blocks of `block_bytes`.
    pub(super) fn new(bytes: u64, block_bytes: u32) -> Self {
        let blocks = bytes / u64::from(block_bytes.max(1));
        Self(BackingInfo { block_bytes, blocks, volatile_cache: true, deallocated_reads_zero: true })
    }
}

impl Backing for AbsentBacking {
    fn info(&self) -> BackingInfo {
        self.0
    }

    fn submit(&mut self, _request: &BackingRequest<'_>) -> Submitted {
        Submitted::Done(Status::NAMESPACE_NOT_READY)
    }

    fn commit(&mut self) {}

    fn poll(&mut self, _now: Time, _done: &mut dyn FnMut(u64, Status)) -> usize {
        0
    }

    fn in_flight(&self) -> usize {
        0
    }
}
