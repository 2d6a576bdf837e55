//! Controller properties: the registers of BAR0 (Base 2.3 §3.1.4) and the place of the doorbells.

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Byte offsets of the properties in BAR0 (Base 2.3 §3.1.4).
pub mod offset {
    /// Controller Capabilities, 8 bytes, read only.
    pub const CAP: u32 = 0x00;
    /// Version, 4 bytes, read only.
    pub const VS: u32 = 0x08;
    /// Interrupt Mask Set, 4 bytes; not used with MSI-X.
    pub const INTMS: u32 = 0x0C;
    /// Interrupt Mask Clear, 4 bytes; not used with MSI-X.
    pub const INTMC: u32 = 0x10;
    /// Controller Configuration, 4 bytes.
    pub const CC: u32 = 0x14;
    /// Controller Status, 4 bytes.
    pub const CSTS: u32 = 0x1C;
    /// NVM Subsystem Reset, 4 bytes; only [`super::NSSR_RESET`] acts.
    pub const NSSR: u32 = 0x20;
    /// Admin Queue Attributes, 4 bytes.
    pub const AQA: u32 = 0x24;
    /// Admin Submission Queue base address, 8 bytes.
    pub const ASQ: u32 = 0x28;
    /// Admin Completion Queue base address, 8 bytes.
    pub const ACQ: u32 = 0x30;
    /// Controller Memory Buffer Location, 4 bytes; 0 without a CMB.
    pub const CMBLOC: u32 = 0x38;
    /// Controller Memory Buffer Size, 4 bytes; 0 without a CMB.
    pub const CMBSZ: u32 = 0x3C;
    /// Boot Partition Information, 4 bytes.
    pub const BPINFO: u32 = 0x40;
    /// Boot Partition Read Select, 4 bytes.
    pub const BPRSEL: u32 = 0x44;
    /// Boot Partition Memory Buffer Location, 8 bytes.
    pub const BPMBL: u32 = 0x48;
    /// Controller Memory Buffer Memory Space Control, 8 bytes.
    pub const CMBMSC: u32 = 0x50;
    /// Controller Memory Buffer Status, 4 bytes.
    pub const CMBSTS: u32 = 0x58;
    /// Controller Memory Buffer Elasticity Buffer Size, 4 bytes.
    pub const CMBEBS: u32 = 0x5C;
    /// Controller Memory Buffer Sustained Write Throughput, 4 bytes.
    pub const CMBSWTP: u32 = 0x60;
    /// NVM Subsystem Shutdown, 4 bytes.
    pub const NSSD: u32 = 0x64;
    /// Controller Ready Timeouts, 4 bytes.
    pub const CRTO: u32 = 0x68;
    /// Persistent Memory Region Capabilities, 4 bytes: the first of the PMR block; 0 without a PMR.
    pub const PMRCAP: u32 = 0xE00;
    /// Persistent Memory Region Control, 4 bytes.
    pub const PMRCTL: u32 = 0xE04;
    /// Persistent Memory Region Status, 4 bytes.
    pub const PMRSTS: u32 = 0xE08;
    /// Persistent Memory Region Elasticity Buffer Size, 4 bytes.
    pub const PMREBS: u32 = 0xE0C;
    /// Persistent Memory Region Sustained Write Throughput, 4 bytes.
    pub const PMRSWTP: u32 = 0xE10;
    /// Persistent Memory Region Memory Space Control Lower, 4 bytes.
    pub const PMRMSCL: u32 = 0xE14;
    /// Persistent Memory Region Memory Space Control Upper, 4 bytes.
    pub const PMRMSCU: u32 = 0xE18;
    /// First doorbell: the admin submission queue's tail.
    pub const DOORBELLS: u32 = 0x1000;
}

/// What NSSR must be written with for a subsystem reset: "NVMe" (Base 2.3 §3.1.4).
pub const NSSR_RESET: u32 = 0x4E56_4D65;

/// What a 4-byte property reads as when the function is gone from the bus.
pub const DEVICE_GONE: u32 = 0xFFFF_FFFF;

/// Bytes of an admin or NVM submission queue entry, as a power of two: the value of CC.IOSQES.
pub const SQES: u8 = 6;

/// Bytes of an admin or NVM completion queue entry, as a power of two: the value of CC.IOCQES.
pub const CQES: u8 = 4;

/// CAP, Controller Capabilities (Base 2.3 §3.1.4.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cap {
    /// Maximum Queue Entries Supported, 0's based, at least 1.
    pub mqes: u16,
    /// Contiguous Queues Required.
    pub cqr: bool,
    /// Arbitration Mechanism Supported beyond round robin: bit 0 weighted round robin, bit 1 vendor.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Timeout for CSTS.RDY to change, in units of 500 ms.
    pub to: u8,
    /// Doorbell Stride: 2^(2 + DSTRD) bytes.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported.
    pub nssrs: bool,
    /// Command Sets Supported: bit 0 NVM, bit 6 I/O command sets, bit 7 no I/O command set.
    pub css: u8,
    /// Boot Partition Support.
    pub bps: bool,
    /// Controller Power Scope.
    #[bits(2)]
    pub cps: u8,
    /// Memory Page Size Minimum: 2^(12 + MPSMIN) bytes.
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum: 2^(12 + MPSMAX) bytes.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported.
    pub pmrs: bool,
    /// Controller Memory Buffer Supported.
    pub cmbs: bool,
    /// NVM Subsystem Shutdown Supported.
    pub nsss: bool,
    /// Controller Ready With Media Support (CRMS bit 0).
    pub crwms: bool,
    /// Controller Ready Independent of Media Support (CRMS bit 1).
    pub crims: bool,
    /// NVM Subsystem Shutdown Enhancements Supported.
    pub nsses: bool,
    #[bits(2)]
    __: u8,
}

impl Cap {
    /// CSS bit of the NVM command set.
    pub const CSS_NVM: u8 = 1 << 0;
    /// CSS bit of "one or more I/O command sets".
    pub const CSS_IO_COMMAND_SETS: u8 = 1 << 6;
    /// CSS bit of "no I/O command set".
    pub const CSS_ADMIN_ONLY: u8 = 1 << 7;

    /// Most entries that an I/O queue may have, 1..=65536.
    pub const fn max_queue_entries(self) -> u32 {
        self.mqes() as u32 + 1
    }

    /// Longest time CSTS.RDY takes to follow CC.EN, in milliseconds.
    pub const fn ready_timeout_ms(self) -> u32 {
        self.to() as u32 * 500
    }

    /// Smallest memory page in bytes, the unit of MDTS.
    pub const fn min_page_bytes(self) -> u64 {
        1 << (12 + self.mpsmin() as u32)
    }

    /// Largest memory page in bytes.
    pub const fn max_page_bytes(self) -> u64 {
        1 << (12 + self.mpsmax() as u32)
    }
}

/// VS, Version (Base 2.3 §3.1.4.2). `Display` prints it as "2.0.0". Ordered by age.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, PartialOrd, Ord)]
pub struct Vs {
    /// Tertiary version number.
    pub ter: u8,
    /// Minor version number.
    pub mnr: u8,
    /// Major version number.
    pub mjr: u16,
}

impl Vs {
    /// Version 1.2.0.
    pub const V1_2: Self = Self::from_bits(0x0001_0200);
    /// Version 1.3.0.
    pub const V1_3: Self = Self::from_bits(0x0001_0300);
    /// Version 1.4.0.
    pub const V1_4: Self = Self::from_bits(0x0001_0400);
    /// Version 2.0.0.
    pub const V2_0: Self = Self::from_bits(0x0002_0000);
    /// Version 2.3.0.
    pub const V2_3: Self = Self::from_bits(0x0002_0300);
}

impl core::fmt::Display for Vs {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{}.{}", self.mjr(), self.mnr(), self.ter())
    }
}

open_value! {
    /// CC.CSS, I/O Command Set Selected (Base 2.3 §3.1.4.5).
    CommandSetSelected(u8) mask 0x7 {
        0 NVM "NVM command set",
        6 ALL "all supported I/O command sets",
        7 ADMIN_ONLY "admin command set only",
    }
}

open_value! {
    /// CC.SHN, Shutdown Notification (Base 2.3 §3.1.4.5).
    ShutdownNotification(u8) mask 0x3 {
        0 NONE "no shutdown",
        1 NORMAL "normal shutdown",
        2 ABRUPT "abrupt shutdown",
    }
}

open_value! {
    /// CSTS.SHST, Shutdown Status (Base 2.3 §3.1.4.6).
    ShutdownStatus(u8) mask 0x3 {
        0 NORMAL "normal operation",
        1 IN_PROGRESS "shutdown in progress",
        2 COMPLETE "shutdown complete",
    }
}

/// CC, Controller Configuration (Base 2.3 §3.1.4.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cc {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O Command Set Selected.
    #[bits(3)]
    pub css: CommandSetSelected,
    /// Memory Page Size: 2^(12 + MPS) bytes.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected: 0 round robin.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown Notification.
    #[bits(2)]
    pub shn: ShutdownNotification,
    /// I/O Submission Queue Entry Size, 2^n bytes; [`SQES`].
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size, 2^n bytes; [`CQES`].
    #[bits(4)]
    pub iocqes: u8,
    /// Controller Ready Independent of Media Enable.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

impl Cc {
    /// The memory page in bytes that PRPs are relative to.
    pub const fn page_bytes(self) -> u64 {
        1 << (12 + self.mps() as u32)
    }
}

/// CSTS, Controller Status (Base 2.3 §3.1.4.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Controller Fatal Status.
    pub cfs: bool,
    /// Shutdown Status.
    #[bits(2)]
    pub shst: ShutdownStatus,
    /// NVM Subsystem Reset Occurred; writing 1 clears it.
    pub nssro: bool,
    /// Processing Paused.
    pub pp: bool,
    /// Shutdown Type: 1 when SHST speaks of a subsystem shutdown.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

impl Csts {
    /// The register reads all ones: the function is gone.
    pub const fn is_gone(self) -> bool {
        self.into_bits() == DEVICE_GONE
    }
}

/// AQA, Admin Queue Attributes (Base 2.3 §3.1.4.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Aqa {
    /// Admin Submission Queue Size in entries, 0's based, 1..=4095.
    #[bits(12)]
    pub asqs: u16,
    #[bits(4)]
    __: u8,
    /// Admin Completion Queue Size in entries, 0's based, 1..=4095.
    #[bits(12)]
    pub acqs: u16,
    #[bits(4)]
    __: u8,
}

/// CRTO, Controller Ready Timeouts (Base 2.3 §3.1.4.22).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Crto {
    /// Controller Ready With Media Timeout, in units of 500 ms.
    pub crwmt: u16,
    /// Controller Ready Independent of Media Timeout, in units of 500 ms.
    pub crimt: u16,
}

/// BAR0 offset of doorbell `index` (even: submission tails, odd: completion heads).
const fn doorbell(index: u64, dstrd: u8) -> u32 {
    let offset = offset::DOORBELLS as u64 + index * (4 << (dstrd & 0xF));
    // Only a stride that no BAR has room for goes beyond 4 GiB; such an offset is outside every BAR.
    if offset > u32::MAX as u64 {
        u32::MAX
    } else {
        offset as u32
    }
}

/// BAR0 offset of submission queue `qid`'s tail doorbell; `dstrd` is CAP.DSTRD (its low 4 bits count). An offset that
/// does not fit 32 bits is returned as `u32::MAX`, which lies outside every BAR (Base 2.3 §3.1.4, doorbells).
pub const fn sq_tail_doorbell(qid: u16, dstrd: u8) -> u32 {
    doorbell(2 * qid as u64, dstrd)
}

/// BAR0 offset of completion queue `qid`'s head doorbell; see [`sq_tail_doorbell`].
pub const fn cq_head_doorbell(qid: u16, dstrd: u8) -> u32 {
    doorbell(2 * qid as u64 + 1, dstrd)
}

layout!(Cap, 8);
layout!(Vs, 4);
layout!(Cc, 4);
layout!(Csts, 4);
layout!(Aqa, 4);
layout!(Crto, 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doorbells_follow_the_stride_and_never_overflow() {
        assert_eq!(sq_tail_doorbell(0, 0), 0x1000);
        assert_eq!(cq_head_doorbell(0, 0), 0x1004);
        assert_eq!(sq_tail_doorbell(3, 0), 0x1018);
        assert_eq!(cq_head_doorbell(3, 2), 0x1000 + 7 * 16);
        assert_eq!(cq_head_doorbell(u16::MAX, 15), u32::MAX);
        assert_eq!(
            sq_tail_doorbell(1, 0xF0),
            0x1008,
            "only DSTRD's four bits count"
        );
    }

    #[test]
    fn register_fields_sit_where_the_specification_puts_them() {
        assert_eq!(Cap::new().with_to(0xFF).into_bits(), 0xFF << 24);
        assert_eq!(Cap::new().with_dstrd(0xF).into_bits(), 0xF << 32);
        assert_eq!(Cap::new().with_css(Cap::CSS_NVM).into_bits(), 1 << 37);
        assert_eq!(Cap::new().with_mpsmax(0xF).into_bits(), 0xF << 52);
        assert_eq!(Cap::new().with_crwms(true).into_bits(), 1 << 59);
        assert_eq!(Cap::new().with_nsses(true).into_bits(), 1 << 61);
        let cc = Cc::new()
            .with_en(true)
            .with_css(CommandSetSelected::ALL)
            .with_shn(ShutdownNotification::NORMAL)
            .with_iosqes(SQES)
            .with_iocqes(CQES);
        assert_eq!(cc.into_bits(), 0x0046_4061);
        assert_eq!(Csts::from_bits(0b1001).shst(), ShutdownStatus::COMPLETE);
        assert_eq!(
            Aqa::new().with_asqs(31).with_acqs(31).into_bits(),
            0x001F_001F
        );
        assert!(Vs::V1_4 < Vs::V2_0);
        assert!(Csts::from_bits(u32::MAX).is_gone());
    }
}
