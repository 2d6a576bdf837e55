//! Submission and completion queue entries (Base 2.3 §4.1, §4.2), and in the submodules the dwords and builders of
//! each command: [`admin`], [`io`], [`migration`].

pub mod admin;
pub mod io;
pub mod migration;
mod opcode;
mod sgl;

pub use admin::*;
pub use io::*;
pub use migration::*;
pub use opcode::{AdminOpcode, NvmOpcode};
pub use sgl::{SglDescriptor, SglIdentifier, SglType};

use crate::status::Status;
use bitfield_struct::bitfield;
use core::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// NSID that addresses all namespaces, where a command allows it.
pub const NSID_ALL: u32 = 0xFFFF_FFFF;

open_value! {
    /// FUSE, position in a fused operation (Base 2.3 §4.1.1).
    Fuse(u8) mask 0x3 {
        0 NORMAL "normal",
        1 FIRST "first of fused pair",
        2 SECOND "second of fused pair",
    }
}

open_value! {
    /// PSDT, PRP or SGL for Data Transfer (Base 2.3 §4.1.1).
    Psdt(u8) mask 0x3 {
        0 PRP "PRP",
        1 SGL_MPTR_BUFFER "SGL, metadata pointer is a buffer",
        2 SGL_MPTR_SGL "SGL, metadata pointer is an SGL",
    }
}

/// CDW0 of every command (Base 2.3 §4.1.1). The opcode's meaning depends on the queue: [`AdminOpcode`] or
/// [`NvmOpcode`].
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cdw0 {
    /// OPC, Opcode.
    pub opcode: u8,
    /// FUSE, Fused Operation.
    #[bits(2)]
    pub fuse: Fuse,
    #[bits(4)]
    __: u8,
    /// PSDT, PRP or SGL for Data Transfer.
    #[bits(2)]
    pub psdt: Psdt,
    /// CID, Command Identifier, unique among the commands outstanding on one submission queue.
    pub cid: u16,
}

/// Submission queue entry, 64 bytes (Base 2.3 §4.1.1).
#[derive(Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SubmissionEntry {
    /// Opcode, fuse, data pointer kind and command identifier.
    pub cdw0: Cdw0,
    /// NSID, Namespace Identifier; 0 where the command uses none.
    pub nsid: u32,
    /// Command dword 2.
    pub cdw2: u32,
    /// Command dword 3.
    pub cdw3: u32,
    /// MPTR, Metadata Pointer.
    pub mptr: u64,
    /// DPTR, Data Pointer: PRP1 and PRP2, or one SGL descriptor.
    pub dptr: [u64; 2],
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
}
layout!(SubmissionEntry, 64, nsid @ 4, mptr @ 16, dptr @ 24, cdw10 @ 40, cdw15 @ 60);

impl SubmissionEntry {
    /// An entry with this admin opcode and nothing else.
    pub fn admin(opcode: AdminOpcode) -> Self {
        Self {
            cdw0: Cdw0::new().with_opcode(opcode.0),
            ..Self::default()
        }
    }

    /// An entry with this NVM command set opcode and namespace, and nothing else.
    pub fn nvm(opcode: NvmOpcode, nsid: u32) -> Self {
        Self {
            cdw0: Cdw0::new().with_opcode(opcode.0),
            nsid,
            ..Self::default()
        }
    }

    /// The opcode, read as one of an admin queue.
    pub const fn admin_opcode(&self) -> AdminOpcode {
        AdminOpcode(self.cdw0.opcode())
    }

    /// The opcode, read as one of an I/O queue of the NVM command set.
    pub const fn nvm_opcode(&self) -> NvmOpcode {
        NvmOpcode(self.cdw0.opcode())
    }

    /// PRP1, PRP Entry 1.
    pub const fn prp1(&self) -> u64 {
        self.dptr[0]
    }

    /// PRP2, PRP Entry 2.
    pub const fn prp2(&self) -> u64 {
        self.dptr[1]
    }

    /// The data pointer read as an SGL descriptor; meaningful when PSDT says so.
    pub fn sgl(&self) -> SglDescriptor {
        SglDescriptor::from_dptr(self.dptr)
    }

    /// CDW10 and CDW11 as one number: SLBA or SDLBA of I/O commands, in logical blocks.
    pub const fn slba(&self) -> u64 {
        self.cdw10 as u64 | (self.cdw11 as u64) << 32
    }

    /// CDW12 and CDW13 as one number: the byte offset of Get Log Page and of the controller state commands.
    pub const fn offset(&self) -> u64 {
        self.cdw12 as u64 | (self.cdw13 as u64) << 32
    }

    /// The same command with another command identifier.
    pub fn with_cid(mut self, cid: u16) -> Self {
        self.cdw0.set_cid(cid);
        self
    }

    /// The same command with PRP1 and PRP2 as its data pointer (PSDT 00b).
    pub fn with_prps(mut self, prp1: u64, prp2: u64) -> Self {
        self.cdw0.set_psdt(Psdt::PRP);
        self.dptr = [prp1, prp2];
        self
    }

    /// The same command with an SGL descriptor as its data pointer (PSDT 01b).
    pub fn with_sgl(mut self, sgl: SglDescriptor) -> Self {
        self.cdw0.set_psdt(Psdt::SGL_MPTR_BUFFER);
        self.dptr = sgl.into_dptr();
        self
    }

    /// The same command as part of a fused pair.
    pub fn with_fuse(mut self, fuse: Fuse) -> Self {
        self.cdw0.set_fuse(fuse);
        self
    }
}

impl fmt::Debug for SubmissionEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SQE {{ OPC {:02X}h, CID {:04X}h, NSID {:X}h",
            self.cdw0.opcode(),
            self.cdw0.cid(),
            self.nsid
        )?;
        if self.cdw0.fuse() != Fuse::NORMAL {
            write!(f, ", {}", self.cdw0.fuse())?;
        }
        write!(
            f,
            ", {} {:X}h {:X}h, CDW10..15",
            self.cdw0.psdt(),
            self.dptr[0],
            self.dptr[1]
        )?;
        for dword in [
            self.cdw10, self.cdw11, self.cdw12, self.cdw13, self.cdw14, self.cdw15,
        ] {
            write!(f, " {dword:08X}h")?;
        }
        f.write_str(" }")
    }
}

/// The upper half of completion DW3: phase tag and status (Base 2.3 §4.2.1).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct StatusPhase {
    /// P, Phase Tag: inverted on each pass through the queue.
    pub phase: bool,
    /// The status field.
    #[bits(15)]
    pub status: Status,
}

/// Completion queue entry, 16 bytes (Base 2.3 §4.2.1).
#[derive(Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CompletionEntry {
    /// DW0, command specific result.
    pub dw0: u32,
    /// DW1, command specific result; the CDQ identifier of a one-shot event.
    pub dw1: u32,
    /// SQHD, submission queue head when this entry was posted.
    pub sqhd: u16,
    /// SQID, the submission queue the command came from.
    pub sqid: u16,
    /// CID of the command that completed.
    pub cid: u16,
    /// Phase tag and status.
    pub status_phase: StatusPhase,
}
layout!(CompletionEntry, 16, dw1 @ 4, sqhd @ 8, sqid @ 10, cid @ 12, status_phase @ 14);

impl CompletionEntry {
    /// DW1 and DW0 as one number.
    pub const fn result64(&self) -> u64 {
        self.dw0 as u64 | (self.dw1 as u64) << 32
    }

    /// The status field.
    pub const fn status(&self) -> Status {
        self.status_phase.status()
    }

    /// The phase tag.
    pub const fn phase(&self) -> bool {
        self.status_phase.phase()
    }
}

impl fmt::Debug for CompletionEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CQE {{ SQID {}, CID {:04X}h, SQHD {}, P {}, {}, DW0 {:08X}h, DW1 {:08X}h }}",
            self.sqid,
            self.cid,
            self.sqhd,
            u8::from(self.phase()),
            self.status(),
            self.dw0,
            self.dw1
        )
    }
}

/// Low and high dword of a 64-bit operand.
const fn dwords(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

/// The 0's based form of a transfer length in dwords; 0 is sent as one dword, the shortest such a field can say.
const fn numd(dwords: u32) -> u32 {
    dwords.saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_sits_above_the_phase_tag() {
        let cqe = CompletionEntry {
            status_phase: StatusPhase::new()
                .with_phase(true)
                .with_status(Status::INVALID_CDQ.with_dnr()),
            dw0: 1,
            dw1: 2,
            ..Default::default()
        };
        let dw3 = u32::from_le_bytes(cqe.as_bytes()[12..].try_into().unwrap());
        assert_eq!(dw3, 1 << 16 | 0x37 << 17 | 1 << 25 | 1 << 31);
        assert_eq!(cqe.result64(), 0x2_0000_0001);
        assert!(cqe.phase() && cqe.status().is(Status::INVALID_CDQ));
    }

    #[test]
    fn cdw0_layout() {
        let sqe = SubmissionEntry::read(1, 0, 1)
            .with_cid(0xABCD)
            .with_fuse(Fuse::SECOND)
            .with_sgl(SglDescriptor::data_block(0x1000, 512));
        assert_eq!(sqe.cdw0.into_bits(), 0xABCD_4202);
        assert_eq!(sqe.sgl().length, 512);
        assert_eq!(sqe.as_bytes()[24..32], 0x1000u64.to_le_bytes());
    }
}
