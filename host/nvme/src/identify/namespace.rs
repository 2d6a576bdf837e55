//! Identify Namespace (CNS 00h) and I/O Command Set Independent Identify Namespace (CNS 08h).

use bitfield_struct::bitfield;
use zerocopy::little_endian::U128;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// NSFEAT of Identify Namespace (byte 24).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nsfeat {
    /// THINP, thin provisioning.
    pub thinp: bool,
    /// NSABP, the namespace's own atomic write units hold.
    pub nsabp: bool,
    /// DAE, reading a deallocated or unwritten block can be an error.
    pub dae: bool,
    /// UIDREUSE, NGUID and EUI64 are never reused.
    pub uidreuse: bool,
    /// OPTPERF, NPWG, NPWA, NPDG, NPDA and NOWS are valid.
    pub optperf: bool,
    #[bits(3)]
    __: u8,
}

/// FLBAS, Formatted LBA Size (byte 26).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flbas {
    /// Bits 3:0 of the format's index.
    #[bits(4)]
    pub index_low: u8,
    /// Metadata follows the data of each block.
    pub metadata_inline: bool,
    /// Bits 5:4 of the format's index.
    #[bits(2)]
    pub index_high: u8,
    __: bool,
}

impl Flbas {
    /// Index into the LBA formats, 0..=63.
    pub const fn format_index(self) -> u8 {
        self.index_low() | self.index_high() << 4
    }
}

/// NMIC, Namespace Multi-path I/O and Namespace Sharing Capabilities (byte 30).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nmic {
    /// SHRNS: may be attached to two or more controllers at a time.
    pub shared: bool,
    #[bits(7)]
    __: u8,
}

/// DLFEAT, Deallocate Logical Block Features (byte 33).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Dlfeat {
    /// What a deallocated block reads as: 0 unknown, 1 zeroes, 2 ones.
    #[bits(3)]
    pub read_value: u8,
    /// Write Zeroes may deallocate (DEAC).
    pub write_zeroes_deallocates: bool,
    /// The guard of a deallocated block is a CRC.
    pub guard_crc: bool,
    #[bits(3)]
    __: u8,
}

/// One LBA format.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LbaFormat {
    /// MS, Metadata Size in bytes.
    pub ms: u16,
    /// LBADS, LBA Data Size: 2^n bytes, at least 9; 0 for an unused format.
    pub lbads: u8,
    /// RP, Relative Performance: 0 best.
    #[bits(2)]
    pub rp: u8,
    #[bits(6)]
    __: u8,
}

impl LbaFormat {
    /// Bytes of a logical block; `None` for an unused or impossible size.
    pub const fn block_bytes(self) -> Option<u32> {
        if self.lbads() >= 9 && self.lbads() <= 31 {
            Some(1 << self.lbads())
        } else {
            None
        }
    }
}

/// NSATTR, Namespace Attributes (byte 99).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nsattr {
    /// The namespace is write protected.
    pub write_protected: bool,
    #[bits(7)]
    __: u8,
}

/// Identify Namespace, 4096 bytes (CNS 00h; NVMCS). All zero for a valid but inactive NSID.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// NSZE, Namespace Size in logical blocks.
    pub nsze: u64,
    /// NCAP, Namespace Capacity in logical blocks.
    pub ncap: u64,
    /// NUSE, Namespace Utilization in logical blocks.
    pub nuse: u64,
    /// NSFEAT, features.
    pub nsfeat: Nsfeat,
    /// NLBAF, Number of LBA Formats, 0's based.
    pub nlbaf: u8,
    /// FLBAS, the format in use.
    pub flbas: Flbas,
    /// MC, Metadata Capabilities.
    pub mc: u8,
    /// DPC, Data Protection Capabilities.
    pub dpc: u8,
    /// DPS, Data Protection Type Settings.
    pub dps: u8,
    /// NMIC, sharing.
    pub nmic: Nmic,
    /// RESCAP, Reservation Capabilities.
    pub rescap: u8,
    /// FPI, Format Progress Indicator.
    pub fpi: u8,
    /// DLFEAT, deallocated blocks.
    pub dlfeat: Dlfeat,
    /// NAWUN, Namespace Atomic Write Unit Normal in blocks, 0's based.
    pub nawun: u16,
    /// NAWUPF, Namespace Atomic Write Unit Power Fail in blocks, 0's based.
    pub nawupf: u16,
    /// NACWU, Namespace Atomic Compare and Write Unit in blocks, 0's based.
    pub nacwu: u16,
    /// NABSN, Namespace Atomic Boundary Size Normal in blocks, 0's based.
    pub nabsn: u16,
    /// NABO, Namespace Atomic Boundary Offset in blocks.
    pub nabo: u16,
    /// NABSPF, Namespace Atomic Boundary Size Power Fail in blocks, 0's based.
    pub nabspf: u16,
    /// NOIOB, Namespace Optimal I/O Boundary in blocks.
    pub noiob: u16,
    /// NVMCAP, NVM Capacity in bytes.
    pub nvmcap: U128,
    /// NPWG, Namespace Preferred Write Granularity in blocks, 0's based.
    pub npwg: u16,
    /// NPWA, Namespace Preferred Write Alignment in blocks, 0's based.
    pub npwa: u16,
    /// NPDG, Namespace Preferred Deallocate Granularity in blocks, 0's based.
    pub npdg: u16,
    /// NPDA, Namespace Preferred Deallocate Alignment in blocks, 0's based.
    pub npda: u16,
    /// NOWS, Namespace Optimal Write Size in blocks, 0's based.
    pub nows: u16,
    /// MSSRL, Maximum Single Source Range Length of Copy in blocks.
    pub mssrl: u16,
    /// MCL, Maximum Copy Length in blocks.
    pub mcl: u32,
    /// MSRC, Maximum Source Range Count of Copy, 0's based.
    pub msrc: u8,
    /// Reserved, 0, or newer fields.
    pub rsvd81: [u8; 11],
    /// ANAGRPID, ANA Group Identifier.
    pub anagrpid: u32,
    /// Reserved, 0.
    pub rsvd96: [u8; 3],
    /// NSATTR, attributes.
    pub nsattr: Nsattr,
    /// NVMSETID, NVM Set Identifier.
    pub nvmsetid: u16,
    /// ENDGID, Endurance Group Identifier.
    pub endgid: u16,
    /// NGUID, Namespace Globally Unique Identifier, big-endian.
    pub nguid: [u8; 16],
    /// EUI64, IEEE Extended Unique Identifier, big-endian.
    pub eui64: [u8; 8],
    /// LBAF0..LBAF63, LBA Formats.
    pub lbaf: [LbaFormat; 64],
    /// Vendor specific.
    pub vs: [u8; 3712],
}
layout!(
    IdentifyNamespace, 4096, nsfeat @ 24, flbas @ 26, nmic @ 30, dlfeat @ 33, nawun @ 34, noiob @ 46, nvmcap @ 48,
    npwg @ 64, nows @ 72, mssrl @ 74, mcl @ 76, msrc @ 80, anagrpid @ 92, nsattr @ 99, nvmsetid @ 100, endgid @ 102,
    nguid @ 104, eui64 @ 120, lbaf @ 128, vs @ 384,
);
zeroed_default!(IdentifyNamespace);
debug_fields!(IdentifyNamespace {
    nsze,
    ncap,
    nuse,
    nsfeat,
    nlbaf,
    flbas,
    nmic,
    dlfeat,
    nvmcap,
    mssrl,
    mcl,
    msrc,
    nsattr,
    nguid,
    eui64,
});

impl IdentifyNamespace {
    /// The LBA format in use. Its index has 6 bits, so there always is one; it may be unused.
    pub fn format(&self) -> LbaFormat {
        self.lbaf
            .get(usize::from(self.flbas.format_index()))
            .copied()
            .unwrap_or_default()
    }

    /// Bytes of a logical block; `None` if the format in use is unused or impossible.
    pub fn block_bytes(&self) -> Option<u32> {
        self.format().block_bytes()
    }
}

/// NSTAT, Namespace Status (CNS 08h byte 14).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nstat {
    /// NRDY, Namespace Ready.
    pub nrdy: bool,
    #[bits(7)]
    __: u8,
}

/// I/O Command Set Independent Identify Namespace, 4096 bytes (CNS 08h; Base 2.3 §5.2.13.2.8).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespaceIndependent {
    /// NSFEAT, Common Namespace Features.
    pub nsfeat: u8,
    /// NMIC, sharing.
    pub nmic: Nmic,
    /// RESCAP, Reservation Capabilities.
    pub rescap: u8,
    /// FPI, Format Progress Indicator.
    pub fpi: u8,
    /// ANAGRPID, ANA Group Identifier.
    pub anagrpid: u32,
    /// NSATTR, attributes.
    pub nsattr: Nsattr,
    /// Reserved, 0.
    pub rsvd9: u8,
    /// NVMSETID, NVM Set Identifier.
    pub nvmsetid: u16,
    /// ENDGID, Endurance Group Identifier.
    pub endgid: u16,
    /// NSTAT, status.
    pub nstat: Nstat,
    /// Reserved, 0, or newer fields.
    pub rsvd15: [u8; 4081],
}
layout!(IdentifyNamespaceIndependent, 4096, anagrpid @ 4, nsattr @ 8, nvmsetid @ 10, endgid @ 12, nstat @ 14);
zeroed_default!(IdentifyNamespaceIndependent);
debug_fields!(IdentifyNamespaceIndependent {
    nsfeat,
    nmic,
    rescap,
    fpi,
    anagrpid,
    nsattr,
    nvmsetid,
    endgid,
    nstat
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_size_of_the_format_in_use() {
        let mut id = IdentifyNamespace::default();
        assert_eq!(id.block_bytes(), None);
        id.lbaf[17] = LbaFormat::new().with_lbads(12);
        id.flbas = Flbas::from_bits(0x31);
        assert_eq!(
            (id.flbas.format_index(), id.block_bytes()),
            (17, Some(4096))
        );
        id.flbas = Flbas::from_bits(0xFF);
        assert_eq!(id.block_bytes(), None);
        assert_eq!(LbaFormat::from_bits(200 << 16).block_bytes(), None);
    }
}
