//! A backing of a few lines.

use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::poll::Time;
use dray_nvme::status::Status;
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Default)]
struct Inner {
    media: Vec<u8>,
    stable: Vec<u8>,
    late: bool,
    waiting: Vec<u64>,
}

/// Blocks of 512 bytes in memory, and what of them was flushed. Clones are the same blocks.
#[derive(Clone, Default)]
pub struct Plain(Arc<Mutex<Inner>>);

impl Plain {
    /// With `late` operations end in a later poll.
    pub fn new(blocks: usize, late: bool) -> Self {
        let bytes = vec![0xee; blocks * 512];
        Self(Arc::new(Mutex::new(Inner { stable: bytes.clone(), media: bytes, late, waiting: Vec::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no test panics while it holds this")
    }

    pub fn boxed(&self) -> Box<dyn Backing> {
        Box::new(self.clone())
    }

    pub fn media(&self) -> Vec<u8> {
        self.lock().media.clone()
    }

    pub fn stable(&self) -> Vec<u8> {
        self.lock().stable.clone()
    }

    pub fn is_flushed(&self) -> bool {
        let inner = self.lock();
        inner.media != inner.stable && inner.stable[8 * 512] == 0x5a
    }
}

impl Backing for Plain {
    fn info(&self) -> BackingInfo {
        let blocks = self.lock().media.len() as u64 / 512;
        BackingInfo { block_bytes: 512, blocks, volatile_cache: true, deallocated_reads_zero: true }
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let mut inner = self.lock();
        let (from, to) = (request.slba as usize * 512, (request.slba + request.blocks) as usize * 512);
        let mut at = from;
        match request.op {
            BackingOp::Read => {
                for piece in request.data {
                    piece.write(&inner.media[at..at + piece.len()]);
                    at += piece.len();
                }
            }
            BackingOp::Write { .. } => {
                for piece in request.data {
                    let range = at..at + piece.len();
                    piece.arena().read(piece.offset(), &mut inner.media[range]);
                    at += piece.len();
                }
            }
            BackingOp::WriteZeroes { .. } | BackingOp::Deallocate => inner.media[from..to].fill(0),
            BackingOp::WriteUncorrectable => return Submitted::Done(Status::INVALID_OPCODE),
            BackingOp::Flush => inner.stable = inner.media.clone(),
        }
        if inner.late {
            inner.waiting.push(request.tag);
            return Submitted::Pending;
        }
        Submitted::Done(Status::SUCCESS)
    }

    fn commit(&mut self) {}

    fn poll(&mut self, _: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        let ended = std::mem::take(&mut self.lock().waiting);
        ended.iter().for_each(|&tag| done(tag, Status::SUCCESS));
        ended.len()
    }

    fn in_flight(&self) -> usize {
        self.lock().waiting.len()
    }
}
