//! Admin commands through the kernel's NVMe driver (`/dev/nvme0`), for what is asked of a controller that the kernel has.
//!
//! One command at a time, and the caller waits: for tools. Admin commands as a part that is polled are io_uring passthrough's.
#![allow(unsafe_code)]

use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::path::Path;

/// Most bytes of data in one command.
const MAX_DATA: usize = 1 << 20;

/// struct nvme_passthru_cmd (linux/nvme_ioctl.h).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Passthrough {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    address: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

const _: () = assert!(size_of::<Passthrough>() == 72);

/// NVME_IOCTL_ADMIN_CMD.
struct AdminCommand<'a>(&'a mut Passthrough);

// SAFETY: the argument is the structure that the request reads and writes; what it points at is valid for as long as the call
// lasts, by the only place that makes one.
unsafe impl Ioctl for AdminCommand<'_> {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<Passthrough>(b'N', 0x41)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

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
        let mut command = Passthrough {
            opcode: entry.cdw0.opcode(),
            nsid: entry.nsid,
            cdw2: entry.cdw2,
            cdw3: entry.cdw3,
            address: if data.is_empty() { 0 } else { data.as_mut_ptr() as u64 },
            data_len: data.len() as u32,
            cdw10_15: [entry.cdw10, entry.cdw11, entry.cdw12, entry.cdw13, entry.cdw14, entry.cdw15],
            timeout_ms,
            ..Passthrough::default()
        };
        // SAFETY: the structure points at `data`, which is ours until the call returns.
        let status = unsafe { rustix::ioctl::ioctl(&self.file, AdminCommand(&mut command))? };
        Ok((Status::from_bits(status as u16), command.result))
    }
}
