//! Controller data queues (Base 2.3 §8.1.7) and the entry of the user data migration queue (NVMCS, UDMQ entry type 0).

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a UDMQ entry of type 0.
pub const UDMQ_ENTRY_BYTES: usize = 32;

/// Dwords of a UDMQ entry of type 0: the unit that CDQSIZE must be a multiple of.
pub const UDMQ_ENTRY_DWORDS: u32 = 8;

/// The byte of a UDMQ entry that holds its phase bit.
pub const UDMQ_PHASE_BYTE: usize = 31;

/// The phase bit within that byte.
pub const UDMQ_PHASE_MASK: u8 = 1;

/// LBAMQF (Identify Controller NVM) of a controller whose UDMQ entries are of type 0.
pub const LBAMQF_TYPE_0: u8 = 0;

open_value! {
    /// QT, type of a controller data queue (Base 2.3 §5.2.4).
    QueueType(u8) mask 0xFF {
        0 UDMQ "user data migration queue",
    }
}

open_value! {
    /// ESA, Entry Special Attribute (NVMCS, UDMQ entry): whether this entry begins or ends the log.
    Esa(u8) mask 0x7 {
        0b000 ORDINARY "ordinary",
        0b001 FIRST "first",
        0b010 STOPPED "last, stopped",
        0b011 SUSPENDED "last, suspended",
        0b111 FULL "last, queue full",
    }
}

impl Esa {
    /// Whether no further entry follows this one until logging starts again. Reserved values are no end.
    pub const fn is_last(self) -> bool {
        matches!(self, Self::STOPPED | Self::SUSPENDED | Self::FULL)
    }
}

open_value! {
    /// LBACIR, which blocks the entry speaks of (NVMCS, UDMQ entry).
    LbaCir(u8) mask 0x3 {
        0b00 RANGE "range",
        0b01 ALL "whole namespace",
        0b10 NONE "no range",
        0b11 RESERVED "reserved",
    }
}

/// LBAMQA, the attribute byte of a UDMQ entry (byte 31).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LbaMqa {
    /// CDQP, phase bit: 1 in the first pass, inverted on every wrap.
    pub cdqp: bool,
    /// ESA, Entry Special Attribute.
    #[bits(3)]
    pub esa: Esa,
    __: bool,
    /// DLBA: the range was deallocated, otherwise modified.
    pub dlba: bool,
    /// LBACIR, which blocks changed.
    #[bits(2)]
    pub lbacir: LbaCir,
}

/// User data migration queue entry, type 0, 32 bytes (NVMCS, UDMQ entry).
#[derive(Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UdmqEntry {
    /// NSID of the namespace that changed.
    pub nsid: u32,
    /// NLB, Number of Logical Blocks, 0's based.
    pub nlb: u32,
    /// SLBA, first logical block.
    pub slba: u64,
    /// Reserved, 0.
    pub rsvd16: [u8; 15],
    /// Phase, special attribute, kind of change and of range.
    pub lbamqa: LbaMqa,
}
layout!(UdmqEntry, UDMQ_ENTRY_BYTES, nlb @ 4, slba @ 8, lbamqa @ UDMQ_PHASE_BYTE);

/// What a UDMQ entry says has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// `blocks` logical blocks (1..=2^32) of `nsid` from `slba`; the device's word, so `slba + blocks` may overflow.
    Range {
        /// Namespace.
        nsid: u32,
        /// First logical block.
        slba: u64,
        /// Number of logical blocks.
        blocks: u64,
    },
    /// Every logical block of the namespace.
    Namespace {
        /// Namespace.
        nsid: u32,
    },
    /// Nothing: the entry is a marker only.
    Nothing,
    /// LBACIR 11b: reserved, so what changed is unknown.
    Unknown,
}

impl UdmqEntry {
    /// An entry that reports `nlb0` + 1 blocks (NLB is 0's based) of `nsid` from `slba`, with phase bit 0.
    pub fn range(nsid: u32, slba: u64, nlb0: u32, deallocated: bool) -> Self {
        Self {
            nsid,
            nlb: nlb0,
            slba,
            lbamqa: LbaMqa::new().with_dlba(deallocated),
            ..Self::default()
        }
    }

    /// An entry that reports every block of `nsid`, with phase bit 0.
    pub fn whole_namespace(nsid: u32) -> Self {
        Self {
            nsid,
            lbamqa: LbaMqa::new().with_lbacir(LbaCir::ALL),
            ..Self::default()
        }
    }

    /// An entry without a range that marks the log's begin or end, with phase bit 0.
    pub fn marker(esa: Esa) -> Self {
        Self {
            lbamqa: LbaMqa::new().with_esa(esa).with_lbacir(LbaCir::NONE),
            ..Self::default()
        }
    }

    /// The same entry with its phase bit set to `phase`.
    pub fn with_phase(mut self, phase: bool) -> Self {
        self.lbamqa.set_cdqp(phase);
        self
    }

    /// The same entry with another special attribute, its range kept.
    pub fn with_esa(mut self, esa: Esa) -> Self {
        self.lbamqa.set_esa(esa);
        self
    }

    /// CDQP, the phase bit.
    pub const fn phase(&self) -> bool {
        self.lbamqa.cdqp()
    }

    /// ESA, Entry Special Attribute.
    pub const fn esa(&self) -> Esa {
        self.lbamqa.esa()
    }

    /// What the entry reports, whatever its special attribute: an end marker may carry a range.
    pub const fn changed(&self) -> Changed {
        match self.lbamqa.lbacir() {
            LbaCir::RANGE => Changed::Range {
                nsid: self.nsid,
                slba: self.slba,
                blocks: self.nlb as u64 + 1,
            },
            LbaCir::ALL => Changed::Namespace { nsid: self.nsid },
            LbaCir::NONE => Changed::Nothing,
            _ => Changed::Unknown,
        }
    }
}

impl core::fmt::Display for UdmqEntry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.esa())?;
        match self.changed() {
            Changed::Range { nsid, slba, blocks } => {
                write!(f, ", NSID {nsid} LBA {slba} +{blocks}")?
            }
            Changed::Namespace { nsid } => write!(f, ", NSID {nsid} whole namespace")?,
            Changed::Nothing => f.write_str(", no range")?,
            Changed::Unknown => f.write_str(", reserved LBACIR")?,
        }
        if self.lbamqa.dlba() {
            f.write_str(" deallocated")?;
        }
        write!(f, " (P {})", u8::from(self.phase()))
    }
}

impl core::fmt::Debug for UdmqEntry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "UDMQ {{ {self} }}")
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn reference_byte_31() {
        for (entry, one, zero) in [
            (UdmqEntry::marker(Esa::FIRST), 0x83, 0x82),
            (UdmqEntry::range(1, 0, 0, false), 0x01, 0x00),
            (UdmqEntry::range(1, 0, 0, true), 0x21, 0x20),
            (UdmqEntry::whole_namespace(1), 0x41, 0x40),
            (UdmqEntry::marker(Esa::STOPPED), 0x85, 0x84),
            (UdmqEntry::marker(Esa::SUSPENDED), 0x87, 0x86),
            (UdmqEntry::marker(Esa::FULL), 0x8F, 0x8E),
            (
                UdmqEntry::range(1, 0, 0, false).with_esa(Esa::FULL),
                0x0F,
                0x0E,
            ),
        ] {
            assert_eq!(
                entry.with_phase(true).as_bytes()[UDMQ_PHASE_BYTE],
                one,
                "{entry}"
            );
            assert_eq!(
                entry.with_phase(false).as_bytes()[UDMQ_PHASE_BYTE],
                zero,
                "{entry}"
            );
        }
    }

    #[test]
    fn entries_read_well_and_never_lie_about_their_range() {
        let entry = UdmqEntry::range(2, 100, u32::MAX, true).with_phase(true);
        assert_eq!(
            entry.changed(),
            Changed::Range {
                nsid: 2,
                slba: 100,
                blocks: 1 << 32
            }
        );
        assert_eq!(
            entry.to_string(),
            "ordinary, NSID 2 LBA 100 +4294967296 deallocated (P 1)"
        );
        assert_eq!(
            UdmqEntry {
                lbamqa: LbaMqa::from_bits(0xC0),
                ..entry
            }
            .changed(),
            Changed::Unknown
        );
        assert!(Esa::FULL.is_last() && !Esa::FIRST.is_last() && !Esa(0b101).is_last());
    }
}
