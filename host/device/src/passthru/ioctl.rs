//! The two ioctls that passthrough needs beside its ring: which namespace a device is, and an admin command by a namespace's device.
#![allow(unsafe_code)]

use super::abi::{NVME_IOCTL_ADMIN64_CMD, NVME_IOCTL_ID, PassthruCommand64, UringCommand};
use super::outcome::Outcome;
use crate::memory::Segment;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use std::ffi::c_void;
use std::os::fd::AsFd;

/// Asks for the NSID, which is the ioctl's return value.
struct NamespaceId;

// SAFETY: the ioctl takes no argument and touches no memory of ours.
unsafe impl Ioctl for NamespaceId {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        NVME_IOCTL_ID
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        u32::try_from(output).map_err(|_| Errno::INVAL)
    }
}

/// The NSID of a namespace's device.
///
/// # Errors
/// ENOTTY for what is no namespace of an NVMe controller; the kernel's others.
pub fn namespace_id(device: impl AsFd) -> rustix::io::Result<u32> {
    // SAFETY: the request neither reads nor writes memory.
    unsafe { rustix::ioctl::ioctl(device, NamespaceId) }
}

/// An admin command; the status is the ioctl's return value, the result comes back in the structure.
struct Admin<'a>(&'a mut PassthruCommand64);

// SAFETY: the argument is the structure that the request's number names; the memory that it points to is the caller's to vouch for.
unsafe impl Ioctl for Admin<'_> {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        NVME_IOCTL_ADMIN64_CMD
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

/// Sends an admin command by the device of a namespace or a controller and waits for its end. `data` is its memory.
pub fn admin(device: impl AsFd, command: &UringCommand, data: Option<Segment<'_>>) -> Outcome {
    let mut request = PassthruCommand64 { command: *command, result: 0 };
    (request.command.addr, request.command.data_len) = (0, 0);
    if let Some(data) = data {
        request.command.addr = data.arena().address(data.offset(), data.len()) as u64;
        request.command.data_len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    }
    (request.command.metadata, request.command.metadata_len) = (0, 0);
    // SAFETY: the structure lives across the call, its data lies within an arena that the segment borrows, and nothing of it is
    // used by the kernel when the call has returned.
    match unsafe { rustix::ioctl::ioctl(device, Admin(&mut request)) } {
        Ok(status) => Outcome::of(status, request.result),
        Err(errno) => Outcome::of(-errno.raw_os_error(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::outcome::HostFault;
    use super::*;

    #[test]
    fn what_is_no_nvme_device_says_so() {
        let null = std::fs::File::open("/dev/null").expect("null");
        assert_eq!(namespace_id(&null), Err(Errno::NOTTY));
        assert_eq!(admin(&null, &UringCommand::default(), None), Outcome::NotSent(HostFault::Unsupported(Errno::NOTTY)));
    }
}
