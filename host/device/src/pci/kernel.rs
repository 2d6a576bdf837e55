//! Admin commands through the kernel's NVMe driver (`/dev/nvme0`), for what is asked of a controller that the kernel has.
//!
//! One command at a time, and the caller waits: for tools. Admin commands as a part that is polled are io_uring passthrough's.

use crate::memory::{DmaBuffer, Pages};
use crate::passthru::{Outcome, UringCommand, ioctl};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use std::fs::File;
use std::io;
use std::path::Path;

/// Most bytes of data in one command.
const MAX_DATA: usize = 1 << 20;

/// A controller of the kernel's.
#[derive(Debug)]
pub struct KernelController {
    file: File,
}

impl KernelController {
    /// Opens a controller by its name (`nvme0`).
    ///
    /// # Errors
    /// The kernel's: it takes root.
    pub fn open(name: &str) -> io::Result<Self> {
        Ok(Self { file: File::open(Path::new("/dev").join(name))? })
    }

    /// Sends an admin command whose data goes from the controller into `data`, or from there to the controller, as its opcode
    /// says. The controller's status and the result; the kernel waits for `timeout_ms`.
    ///
    /// # Errors
    /// The kernel's: the controller is not live, or has gone.
    pub fn admin(&self, entry: &SubmissionEntry, data: &mut [u8], timeout_ms: u32) -> io::Result<(Status, u32)> {
        if data.len() > MAX_DATA {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut command = UringCommand::of(entry).ok_or(io::ErrorKind::InvalidInput)?;
        command.timeout_ms = timeout_ms;
        let memory = if data.is_empty() { None } else { Some(DmaBuffer::allocate("dray-kernel-admin", data.len(), Pages::Small)) };
        let memory = memory.transpose().map_err(io::Error::other)?;
        if let Some(memory) = &memory {
            memory.segment().write(data);
        }
        match ioctl::admin(&self.file, &command, memory.as_ref().map(DmaBuffer::segment)) {
            Outcome::Answered { status, result } => {
                if let Some(memory) = &memory {
                    memory.segment().read(data);
                }
                Ok((status, result as u32))
            }
            Outcome::NotSent(fault) | Outcome::Unknown(fault) => Err(io::Error::other(fault)),
        }
    }
}
