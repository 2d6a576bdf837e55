//! The kernel's structures and numbers for NVMe passthrough (Linux `include/uapi/linux/nvme_ioctl.h`).

use dray_nvme::command::SubmissionEntry;
use rustix::ioctl::{Opcode, opcode};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The group of NVMe's ioctls.
const GROUP: u8 = b'N';

/// Returns the NSID of a namespace's device.
pub const NVME_IOCTL_ID: Opcode = opcode::none(GROUP, 0x40);
/// An admin command with a 64-bit result.
pub const NVME_IOCTL_ADMIN64_CMD: Opcode = opcode::read_write::<PassthruCommand64>(GROUP, 0x47);
/// An I/O command with one buffer.
pub const NVME_URING_CMD_IO: Opcode = opcode::read_write::<UringCommand>(GROUP, 0x80);
/// An I/O command with an array of `iovec`.
pub const NVME_URING_CMD_IO_VEC: Opcode = opcode::read_write::<UringCommand>(GROUP, 0x81);
/// An admin command with one buffer.
pub const NVME_URING_CMD_ADMIN: Opcode = opcode::read_write::<UringCommand>(GROUP, 0x82);
/// An admin command with an array of `iovec`.
pub const NVME_URING_CMD_ADMIN_VEC: Opcode = opcode::read_write::<UringCommand>(GROUP, 0x83);

/// Which of the controller's queues commands go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// I/O queues, by a namespace's device.
    Io,
    /// The admin queue, by a controller's device.
    Admin,
}

impl Channel {
    /// `cmd_op` of the submission entry.
    #[must_use]
    pub const fn operation(self, vectored: bool) -> u32 {
        match (self, vectored) {
            (Self::Io, false) => NVME_URING_CMD_IO,
            (Self::Io, true) => NVME_URING_CMD_IO_VEC,
            (Self::Admin, false) => NVME_URING_CMD_ADMIN,
            (Self::Admin, true) => NVME_URING_CMD_ADMIN_VEC,
        }
    }
}

/// `struct nvme_uring_cmd`: the command in a submission entry of io_uring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UringCommand {
    /// OPC. Its bit 0 says to the kernel that data goes to the device.
    pub opcode: u8,
    /// Must be 0: the kernel takes neither fused commands nor SGLs of the caller's.
    pub flags: u8,
    /// Must be 0.
    pub reserved1: u16,
    /// NSID; on a namespace's device its own.
    pub nsid: u32,
    /// Command dword 2.
    pub cdw2: u32,
    /// Command dword 3.
    pub cdw3: u32,
    /// The address of the metadata, 0 = none.
    pub metadata: u64,
    /// The address of the data, or of an array of `iovec`.
    pub addr: u64,
    /// Bytes of metadata.
    pub metadata_len: u32,
    /// Bytes of data, or how many `iovec`.
    pub data_len: u32,
    /// Command dword 10.
    pub cdw10: u32,
    /// Command dword 11.
    pub cdw11: u32,
    /// Command dword 12.
    pub cdw12: u32,
    /// Command dword 13.
    pub cdw13: u32,
    /// Command dword 14.
    pub cdw14: u32,
    /// Command dword 15.
    pub cdw15: u32,
    /// Milliseconds until the kernel aborts it, 0 = the kernel's own default.
    pub timeout_ms: u32,
    /// Must be 0.
    pub reserved2: u32,
}
const _: () = assert!(size_of::<UringCommand>() == 72);
const _: () = assert!(std::mem::offset_of!(UringCommand, metadata) == 16);
const _: () = assert!(std::mem::offset_of!(UringCommand, cdw10) == 40);
const _: () = assert!(std::mem::offset_of!(UringCommand, timeout_ms) == 64);

impl UringCommand {
    /// The command of an entry, without its data. The identifier and the pointers of the entry mean nothing here: the kernel has
    /// its own. `None` for a fused command or one whose data pointer is an SGL, which the kernel does not take.
    #[must_use]
    pub fn of(entry: &SubmissionEntry) -> Option<Self> {
        let word = entry.cdw0.into_bits();
        // FUSE, reserved bits and PSDT are the second byte.
        if word >> 8 & 0xff != 0 {
            return None;
        }
        Some(Self {
            opcode: entry.cdw0.opcode(),
            nsid: entry.nsid,
            cdw2: entry.cdw2,
            cdw3: entry.cdw3,
            cdw10: entry.cdw10,
            cdw11: entry.cdw11,
            cdw12: entry.cdw12,
            cdw13: entry.cdw13,
            cdw14: entry.cdw14,
            cdw15: entry.cdw15,
            ..Self::default()
        })
    }

    /// The 80 bytes of a 128-byte submission entry.
    #[must_use]
    pub fn bytes(&self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[..72].copy_from_slice(self.as_bytes());
        bytes
    }
}

/// `struct nvme_passthru_cmd64`: the command of the ioctls with a 64-bit result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PassthruCommand64 {
    /// The command; its last field is reserved here too.
    pub command: UringCommand,
    /// DW1:DW0 of the completion.
    pub result: u64,
}
const _: () = assert!(size_of::<PassthruCommand64>() == 80);
const _: () = assert!(std::mem::offset_of!(PassthruCommand64, result) == 72);

#[cfg(test)]
mod tests {
    use super::*;
    use dray_nvme::command::{Fuse, SglDescriptor};

    #[test]
    fn numbers_are_those_of_the_kernels_header() {
        // _IO('N', 0x40), _IOWR('N', 0x47, 80 bytes), _IOWR('N', 0x80 to 0x83, 72 bytes).
        let numbers = [NVME_IOCTL_ID, NVME_IOCTL_ADMIN64_CMD, Channel::Io.operation(false), Channel::Io.operation(true)];
        assert_eq!(numbers, [0x4e40, 0xc050_4e47, 0xc048_4e80, 0xc048_4e81]);
        assert_eq!([Channel::Admin.operation(false), Channel::Admin.operation(true)], [0xc048_4e82, 0xc048_4e83]);
    }

    #[test]
    fn a_command_has_the_entrys_dwords_where_the_kernel_looks() {
        let mut entry = SubmissionEntry::read(7, 0x1_2345_6789, 8).with_cid(0xffff).with_prps(1, 2);
        (entry.cdw2, entry.cdw3, entry.cdw15) = (0x22, 0x33, 0x0f0f);
        let mut command = UringCommand::of(&entry).expect("a plain command");
        (command.addr, command.data_len, command.timeout_ms) = (0x1000, 4096, 9);
        let bytes = command.bytes();
        let dword = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        assert_eq!([dword(0), dword(4), dword(8), dword(12)], [2, 7, 0x22, 0x33]);
        assert_eq!([dword(16), dword(20), dword(24), dword(28)], [0, 0, 0x1000, 0]);
        assert_eq!([dword(32), dword(36), dword(40), dword(44), dword(48)], [0, 4096, 0x2345_6789, 1, 7]);
        assert_eq!([dword(60), dword(64), dword(68), dword(72)], [0x0f0f, 9, 0, 0]);
    }

    #[test]
    fn fused_commands_and_sgls_are_not_taken() {
        let entry = SubmissionEntry::read(1, 0, 1);
        assert_eq!(UringCommand::of(&entry.with_fuse(Fuse::FIRST)), None);
        assert_eq!(UringCommand::of(&entry.with_sgl(SglDescriptor::data_block(0, 512))), None);
        assert!(UringCommand::of(&entry).is_some());
    }
}
