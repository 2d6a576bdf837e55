//! Controller data queues that the kernel creates, by the interfaces that two series on the linux-nvme list propose (July 2025,
//! April 2026). **No released kernel has either**; this is behind the feature `kernel-cdq`, and its tests have a stand-in.
//!
//! The first series' ioctl allocates the ring in the kernel and returns a descriptor: reading copies new entries and gives
//! their slots back at once, closing deletes the queue. The second's takes memory of the caller's and an eventfd; the caller
//! sees phase tags and gives slots back by Set Features through admin passthrough. Of the second only names of fields are known,
//! not their order: [`MappedArgument`] is an assumption. A kernel with another structure answers ENOTTY or EINVAL, since the
//! structure's size is part of the request's number, and no queue comes about.
#![allow(unsafe_code)]

use crate::event::EventLine;
use crate::memory::DmaBuffer;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a queue is created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdqRequest {
    /// Slots.
    pub slots: u32,
    /// Bytes of an entry.
    pub entry_bytes: u32,
    /// CQS: the CNTLID of the controller to watch.
    pub cntlid: u16,
    /// MOS: the queue type.
    pub kind: u16,
    /// The byte of an entry that holds the phase tag.
    pub phase_byte: u32,
    /// The phase tag's bit in it.
    pub phase_mask: u8,
}

/// Reads entries of a queue that the kernel holds. Dropping it deletes the queue.
pub trait EntryReader: Send {
    /// Copies new entries to `into` (room for one at least, for the whole queue at most); returns the bytes, 0 = none. What was
    /// copied has been given back to the controller.
    ///
    /// # Errors
    /// The kernel's.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize>;
}

/// A queue of the first kind.
pub struct ReadQueue {
    /// CDQID.
    pub id: u16,
    /// Slots and bytes of an entry as the kernel's structure has them afterwards.
    pub slots: u32,
    /// See above.
    pub entry_bytes: u32,
    /// Its entries.
    pub reader: Box<dyn EntryReader>,
}

/// The kernel's side of a controller, for queues. [`CdqController`] is it; tests have others.
pub trait CdqKernel: Send {
    /// Creates a queue in the kernel's memory, to be read.
    ///
    /// # Errors
    /// The kernel's; ENOTTY where it has no such interface.
    fn create_read(&mut self, request: &CdqRequest) -> io::Result<ReadQueue>;

    /// Creates a queue in `memory`, which stays as it is until the queue was deleted; `wake` is signalled by the tail pointer
    /// trigger. Returns CDQID.
    ///
    /// # Errors
    /// As above.
    fn create_mapped(&mut self, request: &CdqRequest, memory: &DmaBuffer, wake: &EventLine) -> io::Result<u16>;

    /// Deletes such a queue.
    ///
    /// # Errors
    /// The kernel's; the controller may go on filling it then.
    fn delete_mapped(&mut self, id: u16) -> io::Result<()>;
}

/// The argument of the first series' ioctl.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReadArgument {
    /// Entries of the queue.
    pub entry_nr: u32,
    /// Bytes of each.
    pub entry_nbyte: u32,
    /// Out: CDQID.
    pub cdq_id: u16,
    /// CQS.
    pub cqs: u16,
    /// MOS.
    pub mos: u16,
    /// Not used.
    pub reserved: u16,
    /// The byte that holds the phase tag.
    pub cdqp_offset: u32,
    /// Its bit.
    pub cdqp_mask: u32,
    /// Out: the descriptor.
    pub read_fd: i32,
}
const _: () = assert!(size_of::<ReadArgument>() == 28);
const _: () = assert!(std::mem::offset_of!(ReadArgument, cdqp_offset) == 16);

/// The argument of the second series' ioctl: its fields by name, their order assumed. `size_nbyte` 0 with an `id` deletes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MappedArgument {
    /// The address of the ring.
    pub entries: u64,
    /// Its bytes.
    pub size_nbyte: u32,
    /// The eventfd of the tail pointer trigger, -1 = none.
    pub tpt_fd: i32,
    /// CQS.
    pub cqs: u16,
    /// MOS.
    pub mos: u16,
    /// Out: CDQID; in, to delete.
    pub id: u16,
    /// Not used.
    pub reserved: u16,
}
const _: () = assert!(size_of::<MappedArgument>() == 24);

/// `NVME_IOCTL_ADMIN_CDQ` of the first series.
pub const NVME_IOCTL_ADMIN_CDQ: Opcode = opcode::read::<ReadArgument>(b'N', 0x50);
/// The second series' request, by the same number.
pub const NVME_IOCTL_CDQ_MAPPED: Opcode = opcode::read_write::<MappedArgument>(b'N', 0x50);

/// A request whose argument the kernel reads and writes.
struct Exchange<'a, T>(Opcode, &'a mut T);

// SAFETY: the argument is a plain structure of the size that the request's number carries.
unsafe impl<T> Ioctl for Exchange<'_, T> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.0
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.1).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// A controller's character device (`/dev/nvmeX`).
#[derive(Debug)]
pub struct CdqController {
    file: OwnedFd,
}

impl CdqController {
    /// Over an open device.
    #[must_use]
    pub fn new(file: OwnedFd) -> Self {
        Self { file }
    }

    fn mapped(&self, argument: &mut MappedArgument) -> io::Result<()> {
        // SAFETY: the structure lives across the call; the ring that it names is held by the caller until the queue was deleted.
        Ok(unsafe { rustix::ioctl::ioctl(&self.file, Exchange(NVME_IOCTL_CDQ_MAPPED, argument)) }?)
    }
}

impl CdqKernel for CdqController {
    fn create_read(&mut self, request: &CdqRequest) -> io::Result<ReadQueue> {
        let mut argument = ReadArgument {
            entry_nr: request.slots,
            entry_nbyte: request.entry_bytes,
            cqs: request.cntlid,
            mos: request.kind,
            cdqp_offset: request.phase_byte,
            cdqp_mask: u32::from(request.phase_mask),
            read_fd: -1,
            ..ReadArgument::default()
        };
        // SAFETY: the structure lives across the call, and names no memory.
        unsafe { rustix::ioctl::ioctl(&self.file, Exchange(NVME_IOCTL_ADMIN_CDQ, &mut argument)) }?;
        if argument.read_fd < 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel returned no descriptor"));
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else has it.
        let file = unsafe { OwnedFd::from_raw_fd(argument.read_fd) };
        let reader = Box::new(Descriptor { file });
        Ok(ReadQueue { id: argument.cdq_id, slots: argument.entry_nr, entry_bytes: argument.entry_nbyte, reader })
    }

    fn create_mapped(&mut self, request: &CdqRequest, memory: &DmaBuffer, wake: &EventLine) -> io::Result<u16> {
        let bytes = request.slots.checked_mul(request.entry_bytes).filter(|bytes| *bytes as usize <= memory.len());
        let size_nbyte = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        let mut argument = MappedArgument {
            entries: memory.arena().address(memory.offset(), memory.len()) as u64,
            size_nbyte,
            tpt_fd: wake.as_fd().as_raw_fd(),
            cqs: request.cntlid,
            mos: request.kind,
            ..MappedArgument::default()
        };
        self.mapped(&mut argument)?;
        Ok(argument.id)
    }

    fn delete_mapped(&mut self, id: u16) -> io::Result<()> {
        self.mapped(&mut MappedArgument { id, tpt_fd: -1, ..MappedArgument::default() })
    }
}

struct Descriptor {
    file: OwnedFd,
}

impl EntryReader for Descriptor {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.file, into)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Pages;

    #[test]
    fn numbers_are_those_of_the_proposals() {
        // _IOR('N', 0x50, 28 bytes), _IOWR('N', 0x50, 24 bytes).
        assert_eq!((NVME_IOCTL_ADMIN_CDQ, NVME_IOCTL_CDQ_MAPPED), (0x801c_4e50, 0xc018_4e50));
    }

    #[test]
    fn a_kernel_without_the_interface_says_so() {
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("null");
        let mut kernel = CdqController::new(null.into());
        let request = CdqRequest { slots: 8, entry_bytes: 32, cntlid: 1, kind: 0, phase_byte: 31, phase_mask: 1 };
        let (memory, line) = (DmaBuffer::allocate("cdq", 4096, Pages::Small).expect("memory"), EventLine::new().expect("a line"));
        for refused in [
            kernel.create_read(&request).map(drop),
            kernel.create_mapped(&request, &memory, &line).map(drop),
            kernel.delete_mapped(1),
        ] {
            assert_eq!(refused.expect_err("no such ioctl").raw_os_error(), Some(25));
        }
        let large = CdqRequest { slots: 1 << 20, ..request };
        assert!(kernel.create_mapped(&large, &memory, &line).is_err_and(|e| e.kind() == io::ErrorKind::InvalidInput));
    }
}
