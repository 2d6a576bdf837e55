//! Controllers that the kernel's driver owns, by io_uring passthrough: the third implementation of the command seam.
//!
//! [`PassthruQueue`] is a ring to a namespace's character device (`/dev/ngXnY`), [`PassthruDevice`] makes as many of them as there are
//! cores, [`PassthruAdmin`] sends admin commands to a controller's (`/dev/nvmeX`) in the shape of
//! [`Driver`](crate::Driver)'s. Any opcode goes, but those that would take the controller away from the kernel
//! ([`belongs_to_the_kernel`]). [`node`] tells devices apart and says what to name instead.
//!
//! The kernel resets the controller when a command does not end, and takes back what was under way: such commands come back with an
//! unknown outcome and the queue is dead, as a [`QueuePair`](crate::QueuePair) is after a reset. Open another then.
//!
//! Not here: asynchronous events and controller data queues, which the kernel keeps to itself, fused commands, SGLs of the caller's.

mod about;
mod admin;
mod device;
mod error;
pub mod node;
mod queue;
#[cfg(all(test, not(loom)))]
mod tests;

pub use about::NamespaceAbout;
pub use admin::PassthruAdmin;
pub use device::PassthruDevice;
pub use error::PassthruError;
pub use queue::{PassthruQueue, Use};

use dray_device::command::Completion;
use dray_device::passthru::Outcome;
use dray_nvme::command::AdminOpcode;

/// Limits and time-outs of passthrough; fixed while a queue lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassthruConfig {
    /// Commands that can be under way in one ring, 1 to 4,096.
    pub depth: u32,
    /// Most bytes of data in one command, whatever the device allows.
    pub max_transfer_bytes: usize,
    /// Milliseconds that a command may take before the kernel aborts it; 0 = the kernel's own (30 s for I/O, 60 s for admin).
    pub timeout_ms: u32,
    /// Look for completions at the device instead of taking its interrupts, where the device has queues for that (the kernel's
    /// `nvme.poll_queues`) and the kernel can.
    pub iopoll: bool,
    /// Register memory with the ring where the kernel can: [`PassthruQueue::register`].
    pub fixed: bool,
}

impl Default for PassthruConfig {
    fn default() -> Self {
        Self { depth: 128, max_transfer_bytes: 1 << 20, timeout_ms: 0, iopoll: false, fixed: true }
    }
}

/// Whether an admin command is the kernel's alone: queues are its own, event requests and keep-alives it sends by itself, and one
/// of ours would end in its resetting the controller.
#[must_use]
pub const fn belongs_to_the_kernel(opcode: AdminOpcode) -> bool {
    matches!(
        opcode,
        AdminOpcode::DELETE_IO_SQ
            | AdminOpcode::CREATE_IO_SQ
            | AdminOpcode::DELETE_IO_CQ
            | AdminOpcode::CREATE_IO_CQ
            | AdminOpcode::ABORT
            | AdminOpcode::ASYNC_EVENT_REQUEST
            | AdminOpcode::KEEP_ALIVE
            | AdminOpcode::DOORBELL_BUFFER_CONFIG
    )
}

/// An outcome as the command seam has it.
pub(crate) const fn completion(tag: u64, outcome: Outcome) -> Completion {
    match outcome {
        Outcome::Answered { status, result } => Completion { tag, status, result, unknown: false },
        Outcome::NotSent(fault) => Completion { tag, status: fault.status(), result: 0, unknown: false },
        Outcome::Unknown(fault) => Completion { tag, status: fault.status(), result: 0, unknown: true },
    }
}
