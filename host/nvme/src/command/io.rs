//! I/O commands of the NVM command set (NVMCS §3): dwords, ranges and builders.
//!
//! Builders take plain counts. A count that the 0's based field cannot hold (0, or more than the field's maximum)
//! leaves an entry with NSID 0, which a controller refuses with Invalid Namespace or Format: a wrong count never
//! becomes a command that touches other blocks than asked.

use super::{NvmOpcode, SubmissionEntry, dwords};
use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most logical blocks of one Read, Write, Compare, Verify, Write Zeroes or Write Uncorrectable.
pub const MAX_BLOCKS: u32 = 1 << 16;

/// Most ranges of one Dataset Management or Copy command.
pub const MAX_RANGES: u16 = 1 << 8;

/// CDW12 of Read, Write, Compare, Verify, Write Zeroes and Write Uncorrectable (NVMCS §3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RwCdw12 {
    /// NLB, Number of Logical Blocks, 0's based.
    pub nlb: u16,
    /// CETYPE, Command Extension Type.
    #[bits(4)]
    pub cetype: u8,
    /// DTYPE, Directive Type; Write only.
    #[bits(4)]
    pub dtype: u8,
    /// STC, Storage Tag Check.
    pub stc: bool,
    /// DEAC, Deallocate; Write Zeroes only.
    pub deac: bool,
    /// PRINFO, Protection Information: bits 2:0 PRCHK, bit 3 PRACT.
    #[bits(4)]
    pub prinfo: u8,
    /// FUA, Force Unit Access: on stable media before the completion.
    pub fua: bool,
    /// LR, Limited Retry.
    pub lr: bool,
}

impl RwCdw12 {
    /// Number of logical blocks, 1..=65536.
    pub const fn blocks(self) -> u32 {
        self.nlb() as u32 + 1
    }
}

/// CDW13 of Read and Write (NVMCS §3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RwCdw13 {
    /// DSM, dataset management hints.
    pub dsm: u8,
    __: u8,
    /// DSPEC, Directive Specific; Write only.
    pub dspec: u16,
}

/// CDW10 of Dataset Management (NVMCS §3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DsmCdw10 {
    /// NR, Number of Ranges, 0's based.
    pub nr: u8,
    #[bits(24)]
    __: u32,
}

/// CDW11 of Dataset Management (NVMCS §3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DsmCdw11 {
    /// IDR, Integral Dataset for Read; a hint.
    pub idr: bool,
    /// IDW, Integral Dataset for Write; a hint.
    pub idw: bool,
    /// AD, Attribute Deallocate.
    pub ad: bool,
    #[bits(29)]
    __: u32,
}

/// One range of Dataset Management, 16 bytes (NVMCS §3).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes; hints.
    pub attributes: u32,
    /// Length in logical blocks: a plain count, **not** 0's based.
    pub length: u32,
    /// SLBA, first logical block.
    pub slba: u64,
}
layout!(DsmRange, 16, length @ 4, slba @ 8);

/// CDW12 of Copy (NVMCS §3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CopyCdw12 {
    /// NR, Number of Ranges, 0's based.
    pub nr: u8,
    /// CDFT, Copy Descriptor Format.
    #[bits(4)]
    pub descfmt: u8,
    /// PRINFOR, protection information for the reads.
    #[bits(4)]
    pub prinfor: u8,
    #[bits(4)]
    __: u8,
    /// DTYPE, Directive Type.
    #[bits(4)]
    pub dtype: u8,
    #[bits(2)]
    __: u8,
    /// PRINFOW, protection information for the writes.
    #[bits(4)]
    pub prinfow: u8,
    /// FUA, Force Unit Access.
    pub fua: bool,
    /// LR, Limited Retry.
    pub lr: bool,
}

/// Source range of Copy, descriptor format 0, 32 bytes (NVMCS §3).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CopyRange0 {
    /// Reserved, 0.
    pub rsvd0: [u8; 8],
    /// SLBA, first logical block.
    pub slba: u64,
    /// NLB, Number of Logical Blocks, 0's based.
    pub nlb: u16,
    /// Reserved, 0.
    pub rsvd18: [u8; 6],
    /// Expected (initial) logical block reference tag.
    pub elbrt: u32,
    /// Expected logical block application tag.
    pub elbat: u16,
    /// Expected logical block application tag mask.
    pub elbatm: u16,
}
layout!(CopyRange0, 32, slba @ 8, nlb @ 16, elbrt @ 24, elbat @ 28, elbatm @ 30);

impl CopyRange0 {
    /// Number of logical blocks, 1..=65536.
    pub const fn blocks(&self) -> u32 {
        self.nlb as u32 + 1
    }
}

/// The 0's based form of `count`, or `None` if it is not in 1..=`max`.
const fn zero_based(count: u32, max: u32) -> Option<u32> {
    if count >= 1 && count <= max {
        Some(count - 1)
    } else {
        None
    }
}

impl SubmissionEntry {
    /// A command over `blocks` blocks from `slba`; see the module comment for counts out of range.
    fn over_blocks(opcode: NvmOpcode, nsid: u32, slba: u64, blocks: u32) -> Self {
        let (cdw10, cdw11) = dwords(slba);
        let (nsid, nlb) = match zero_based(blocks, MAX_BLOCKS) {
            Some(nlb) => (nsid, nlb as u16),
            None => (0, 0),
        };
        Self {
            cdw10,
            cdw11,
            cdw12: RwCdw12::new().with_nlb(nlb).into(),
            ..Self::nvm(opcode, nsid)
        }
    }

    /// CDW12 read as that of [`RwCdw12`]'s commands.
    pub const fn rw_cdw12(&self) -> RwCdw12 {
        RwCdw12::from_bits(self.cdw12)
    }

    /// The same command with FUA set (Read, Write, Write Zeroes).
    pub fn with_fua(mut self) -> Self {
        self.cdw12 = self.rw_cdw12().with_fua(true).into();
        self
    }

    /// Read (02h) of `blocks` logical blocks (1..=65536).
    pub fn read(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::over_blocks(NvmOpcode::READ, nsid, slba, blocks)
    }

    /// Write (01h) of `blocks` logical blocks (1..=65536).
    pub fn write(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::over_blocks(NvmOpcode::WRITE, nsid, slba, blocks)
    }

    /// Write Zeroes (08h) over `blocks` logical blocks (1..=65536); `deac` asks to deallocate them.
    pub fn write_zeroes(nsid: u32, slba: u64, blocks: u32, deac: bool) -> Self {
        let mut entry = Self::over_blocks(NvmOpcode::WRITE_ZEROES, nsid, slba, blocks);
        entry.cdw12 = entry.rw_cdw12().with_deac(deac).into();
        entry
    }

    /// Write Uncorrectable (04h) over `blocks` logical blocks (1..=65536): reads fail until they are written again.
    pub fn write_uncorrectable(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::over_blocks(NvmOpcode::WRITE_UNCORRECTABLE, nsid, slba, blocks)
    }

    /// Compare (05h) of `blocks` logical blocks (1..=65536) with the data given.
    pub fn compare(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::over_blocks(NvmOpcode::COMPARE, nsid, slba, blocks)
    }

    /// Verify (0Ch) of `blocks` logical blocks (1..=65536): reads them without transferring data.
    pub fn verify(nsid: u32, slba: u64, blocks: u32) -> Self {
        Self::over_blocks(NvmOpcode::VERIFY, nsid, slba, blocks)
    }

    /// Flush (00h).
    pub fn flush(nsid: u32) -> Self {
        Self::nvm(NvmOpcode::FLUSH, nsid)
    }

    /// Dataset Management (09h) that deallocates `ranges` ranges (1..=256); the data is as many [`DsmRange`]s.
    pub fn dsm(nsid: u32, ranges: u16) -> Self {
        let (nsid, nr) = match zero_based(ranges as u32, MAX_RANGES as u32) {
            Some(nr) => (nsid, nr as u8),
            None => (0, 0),
        };
        Self {
            cdw10: DsmCdw10::new().with_nr(nr).into(),
            cdw11: DsmCdw11::new().with_ad(true).into(),
            ..Self::nvm(NvmOpcode::DATASET_MANAGEMENT, nsid)
        }
    }

    /// Copy (19h) to `sdlba` from `ranges` source ranges (1..=256) of format 0; the data is as many [`CopyRange0`]s.
    pub fn copy(nsid: u32, sdlba: u64, ranges: u16) -> Self {
        let (cdw10, cdw11) = dwords(sdlba);
        let (nsid, nr) = match zero_based(ranges as u32, MAX_RANGES as u32) {
            Some(nr) => (nsid, nr as u8),
            None => (0, 0),
        };
        Self {
            cdw10,
            cdw11,
            cdw12: CopyCdw12::new().with_nr(nr).into(),
            ..Self::nvm(NvmOpcode::COPY, nsid)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_become_zero_based_and_bad_ones_are_refused_by_any_controller() {
        let read = SubmissionEntry::read(1, 0x1_0000_0002, 65_536);
        assert_eq!(
            (read.nsid, read.cdw10, read.cdw11, read.cdw12),
            (1, 2, 1, 0xFFFF)
        );
        assert_eq!(
            (read.slba(), read.rw_cdw12().blocks()),
            (0x1_0000_0002, 65_536)
        );
        assert_eq!(SubmissionEntry::write(1, 0, 0).nsid, 0);
        assert_eq!(SubmissionEntry::write(1, 0, 65_537).nsid, 0);
        assert_eq!(SubmissionEntry::dsm(1, 256).cdw10, 0xFF);
        assert_eq!(
            (
                SubmissionEntry::dsm(1, 0).nsid,
                SubmissionEntry::copy(1, 0, 257).nsid
            ),
            (0, 0)
        );
    }

    #[test]
    fn flag_positions() {
        assert_eq!(SubmissionEntry::write_zeroes(1, 0, 1, true).cdw12, 1 << 25);
        assert_eq!(SubmissionEntry::write(1, 0, 1).with_fua().cdw12, 1 << 30);
        assert_eq!(SubmissionEntry::dsm(1, 1).cdw11, 4);
        assert_eq!(CopyCdw12::new().with_prinfow(0xF).into_bits(), 0xF << 26);
        assert_eq!(RwCdw12::new().with_stc(true).into_bits(), 1 << 24);
    }
}
