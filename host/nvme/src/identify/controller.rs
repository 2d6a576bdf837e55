//! Identify Controller (CNS 01h) and Identify Controller of the NVM command set (CNS 06h).

use crate::registers::Vs;
use bitfield_struct::bitfield;
use zerocopy::little_endian::U128;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// CMIC, Controller Multi-Path I/O and Namespace Sharing Capabilities (byte 76).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cmic {
    /// The subsystem may have more than one port.
    pub multi_port: bool,
    /// The subsystem may have more than one controller.
    pub multi_controller: bool,
    /// The controller is an SR-IOV virtual function.
    pub sriov: bool,
    /// Asymmetric namespace access reporting.
    pub ana: bool,
    #[bits(4)]
    __: u8,
}

/// OAES, Optional Asynchronous Events Supported (bytes 95:92).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oaes {
    __: u8,
    /// Attached namespace attribute notices.
    pub namespace_attribute: bool,
    /// Firmware activation notices.
    pub firmware_activation: bool,
    __: bool,
    /// Asymmetric namespace access change notices.
    pub ana_change: bool,
    #[bits(20)]
    __: u32,
}

/// CTRATT, Controller Attributes (bytes 99:96).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Ctratt {
    /// HIDS, 128-bit host identifier.
    pub hids: bool,
    #[bits(14)]
    __: u16,
    /// ELBAS, extended LBA formats.
    pub elbas: bool,
    __: u16,
}

open_value! {
    /// CNTRLTYPE, Controller Type (byte 111).
    ControllerType(u8) mask 0xFF {
        1 IO "I/O controller",
        2 DISCOVERY "discovery controller",
        3 ADMINISTRATIVE "administrative controller",
    }
}

/// OACS, Optional Admin Command Support (bytes 257:256).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oacs {
    /// Security Send and Receive.
    pub security: bool,
    /// Format NVM.
    pub format: bool,
    /// Firmware Commit and Image Download.
    pub firmware: bool,
    /// Namespace Management and Attachment.
    pub namespace_management: bool,
    /// Device Self-test.
    pub self_test: bool,
    /// Directives.
    pub directives: bool,
    /// NVMe-MI Send and Receive.
    pub nvme_mi: bool,
    /// Virtualization Management.
    pub virtualization: bool,
    /// DBCS, Doorbell Buffer Config.
    pub dbcs: bool,
    /// Get LBA Status.
    pub get_lba_status: bool,
    /// Command and Feature Lockdown.
    pub lockdown: bool,
    /// HMLMS, Host Managed Live Migration Support: this is a migration management controller.
    pub hmlms: bool,
    #[bits(4)]
    __: u8,
}

/// LPA, Log Page Attributes (byte 261).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Lpa {
    /// SMART / health information per namespace.
    pub smart_per_namespace: bool,
    /// Commands Supported and Effects log page.
    pub effects: bool,
    /// Extended data: offsets and large counts in Get Log Page.
    pub extended: bool,
    /// Telemetry log pages.
    pub telemetry: bool,
    #[bits(4)]
    __: u8,
}

/// ONCS, Optional NVM Command Support (bytes 521:520).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oncs {
    /// Compare.
    pub compare: bool,
    /// Write Uncorrectable.
    pub write_uncorrectable: bool,
    /// Dataset Management.
    pub dsm: bool,
    /// Write Zeroes.
    pub write_zeroes: bool,
    /// Save and Select of features.
    pub save_select: bool,
    /// Reservations.
    pub reservations: bool,
    /// Timestamp.
    pub timestamp: bool,
    /// Verify.
    pub verify: bool,
    /// Copy.
    pub copy: bool,
    #[bits(7)]
    __: u8,
}

/// VWC, Volatile Write Cache (byte 525).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vwc {
    /// A volatile write cache is present.
    pub present: bool,
    /// Flush with NSID FFFFFFFFh: 10b refused, 11b flushes all.
    #[bits(2)]
    pub flush_all: u8,
    #[bits(5)]
    __: u8,
}

/// TRATTR, Tracking Attributes (byte 576).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TrAttr {
    /// THMCS, Track Host Memory Changes Support.
    pub thmcs: bool,
    /// TUDCS, Track User Data Changes Support: logging into a UDMQ.
    pub tudcs: bool,
    /// MRTLL, Memory Range Tracking Length Limit: lengths must be powers of two.
    pub mrtll: bool,
    #[bits(5)]
    __: u8,
}

/// Power State Descriptor, 32 bytes: maximum power; the rest as it is.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PowerState {
    /// MP, Maximum Power in units that byte 3 bit 0 names (0: 10 mW).
    pub mp: u16,
    /// The other fields.
    pub rest: [u8; 30],
}
layout!(PowerState, 32);

/// Identify Controller, 4096 bytes (CNS 01h; Base 2.3 §5.2.13.2.1).
///
/// The live migration limits (bytes 587:570) read 0 on devices that do not tell them: 0 is "not told", not "none".
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyController {
    /// VID, PCI Vendor ID.
    pub vid: u16,
    /// SSVID, PCI Subsystem Vendor ID.
    pub ssvid: u16,
    /// SN, Serial Number, ASCII, space padded.
    pub sn: [u8; 20],
    /// MN, Model Number, ASCII, space padded.
    pub mn: [u8; 40],
    /// FR, Firmware Revision, ASCII, space padded.
    pub fr: [u8; 8],
    /// RAB, Recommended Arbitration Burst, 2^n.
    pub rab: u8,
    /// IEEE OUI, least significant byte first.
    pub ieee: [u8; 3],
    /// CMIC, multi-path and sharing.
    pub cmic: Cmic,
    /// MDTS, Maximum Data Transfer Size: 2^n minimum pages, 0 for no limit.
    pub mdts: u8,
    /// CNTLID, Controller ID.
    pub cntlid: u16,
    /// VER, Version.
    pub ver: Vs,
    /// RTD3R, RTD3 Resume Latency in µs.
    pub rtd3r: u32,
    /// RTD3E, RTD3 Entry Latency in µs.
    pub rtd3e: u32,
    /// OAES, optional asynchronous events.
    pub oaes: Oaes,
    /// CTRATT, attributes.
    pub ctratt: Ctratt,
    /// Reserved, 0, or newer fields.
    pub rsvd100: [u8; 11],
    /// CNTRLTYPE, Controller Type.
    pub cntrltype: ControllerType,
    /// FGUID, FRU Globally Unique Identifier.
    pub fguid: [u8; 16],
    /// CRDT1..CRDT3, Command Retry Delay Times in units of 100 ms.
    pub crdt: [u16; 3],
    /// Reserved, 0, or newer fields.
    pub rsvd134: [u8; 122],
    /// OACS, optional admin commands.
    pub oacs: Oacs,
    /// ACL, Abort Command Limit, 0's based.
    pub acl: u8,
    /// AERL, Asynchronous Event Request Limit, 0's based.
    pub aerl: u8,
    /// FRMW, Firmware Updates.
    pub frmw: u8,
    /// LPA, Log Page Attributes.
    pub lpa: Lpa,
    /// ELPE, Error Log Page Entries, 0's based.
    pub elpe: u8,
    /// NPSS, Number of Power States, 0's based.
    pub npss: u8,
    /// AVSCC, Admin Vendor Specific Command Configuration.
    pub avscc: u8,
    /// APSTA, Autonomous Power State Transition Attributes.
    pub apsta: u8,
    /// WCTEMP, Warning Composite Temperature in kelvins.
    pub wctemp: u16,
    /// CCTEMP, Critical Composite Temperature in kelvins.
    pub cctemp: u16,
    /// MTFA, Maximum Time for Firmware Activation in units of 100 ms.
    pub mtfa: u16,
    /// HMPRE, Host Memory Buffer Preferred Size in 4 KiB; 0 in a subsystem with a migration management controller.
    pub hmpre: u32,
    /// HMMIN, Host Memory Buffer Minimum Size in 4 KiB.
    pub hmmin: u32,
    /// TNVMCAP, Total NVM Capacity in bytes.
    pub tnvmcap: U128,
    /// UNVMCAP, Unallocated NVM Capacity in bytes.
    pub unvmcap: U128,
    /// Reserved, 0, or newer fields.
    pub rsvd312: [u8; 8],
    /// KAS, Keep Alive Support: granularity in units of 100 ms, 0 without.
    pub kas: u16,
    /// Reserved, 0, or newer fields.
    pub rsvd322: [u8; 190],
    /// SQES: required size in 3:0, maximum in 7:4, 2^n bytes.
    pub sqes: u8,
    /// CQES: required size in 3:0, maximum in 7:4, 2^n bytes.
    pub cqes: u8,
    /// MAXCMD, Maximum Outstanding Commands of a queue; 0 is not told.
    pub maxcmd: u16,
    /// NN, Number of Namespaces: the highest NSID.
    pub nn: u32,
    /// ONCS, optional NVM commands.
    pub oncs: Oncs,
    /// FUSES, Fused Operation Support: bit 0 Compare and Write.
    pub fuses: u16,
    /// FNA, Format NVM Attributes.
    pub fna: u8,
    /// VWC, Volatile Write Cache.
    pub vwc: Vwc,
    /// AWUN, Atomic Write Unit Normal in blocks, 0's based.
    pub awun: u16,
    /// AWUPF, Atomic Write Unit Power Fail in blocks, 0's based.
    pub awupf: u16,
    /// ICSVSCC, I/O Command Set Vendor Specific Command Configuration.
    pub icsvscc: u8,
    /// NWPC, Namespace Write Protection Capabilities.
    pub nwpc: u8,
    /// ACWU, Atomic Compare and Write Unit in blocks, 0's based.
    pub acwu: u16,
    /// OCFS, Optional Copy Formats Supported: bit n is format n.
    pub ocfs: u16,
    /// SGLS, SGL Support: 1:0 supported, 18 longer than the data allowed.
    pub sgls: u32,
    /// MNAN, Maximum Number of Allowed Namespaces.
    pub mnan: u32,
    /// Reserved, 0, or newer fields.
    pub rsvd544: [u8; 26],
    /// CMMRTD, Controller Maximum Memory Range Tracking Descriptors.
    pub cmmrtd: u16,
    /// NMMRTD, NVM Subsystem Maximum Memory Range Tracking Descriptors.
    pub nmmrtd: u16,
    /// MINMRTG, Minimum Memory Range Tracking Granularity, 2^n × 4 KiB.
    pub minmrtg: u8,
    /// MAXMRTG, Maximum Memory Range Tracking Granularity, 2^n × 4 KiB.
    pub maxmrtg: u8,
    /// TRATTR, Tracking Attributes.
    pub trattr: TrAttr,
    /// Reserved, 0.
    pub rsvd577: u8,
    /// MCUDMQ, Maximum Controller User Data Migration Queues.
    pub mcudmq: u16,
    /// MNSUDMQ, Maximum NVM Subsystem User Data Migration Queues.
    pub mnsudmq: u16,
    /// MCMR, Maximum CDQ Memory Ranges; 1 means contiguous only.
    pub mcmr: u16,
    /// NMCMR, NVM Subsystem Maximum CDQ Memory Ranges.
    pub nmcmr: u16,
    /// MCDQPC, Maximum Controller Data Queue PRP Count.
    pub mcdqpc: u16,
    /// Reserved, 0.
    pub rsvd588: [u8; 180],
    /// SUBNQN, NVM Subsystem NVMe Qualified Name, NUL-terminated UTF-8.
    pub subnqn: [u8; 256],
    /// Reserved, 0, and NVMe over Fabrics.
    pub rsvd1024: [u8; 1024],
    /// PSD0..PSD31, Power State Descriptors.
    pub psd: [PowerState; 32],
    /// Vendor specific.
    pub vs: [u8; 1024],
}
layout!(
    IdentifyController, 4096, sn @ 4, mn @ 24, fr @ 64, rab @ 72, cmic @ 76, mdts @ 77, cntlid @ 78, ver @ 80,
    rtd3r @ 84, oaes @ 92, ctratt @ 96, cntrltype @ 111, fguid @ 112, crdt @ 128, oacs @ 256, acl @ 258, frmw @ 260,
    npss @ 263, apsta @ 265, wctemp @ 266, hmpre @ 272, tnvmcap @ 280, unvmcap @ 296, kas @ 320, sqes @ 512,
    maxcmd @ 514, nn @ 516, oncs @ 520, fuses @ 522, vwc @ 525, awun @ 526, acwu @ 532, ocfs @ 534, sgls @ 536,
    mnan @ 540, cmmrtd @ 570, nmmrtd @ 572, minmrtg @ 574, maxmrtg @ 575, trattr @ 576, mcudmq @ 578, mnsudmq @ 580,
    mcmr @ 582, nmcmr @ 584, mcdqpc @ 586, rsvd588 @ 588, subnqn @ 768, psd @ 2048, vs @ 3072,
);
zeroed_default!(IdentifyController);

impl IdentifyController {
    /// Longest data transfer in bytes for a controller whose CAP.MPSMIN is `mpsmin`; `None` without a limit.
    pub fn max_transfer_bytes(&self, mpsmin: u8) -> Option<u64> {
        let shift = 12 + u32::from(mpsmin & 0xF) + u32::from(self.mdts);
        if self.mdts == 0 || shift > 63 {
            None
        } else {
            Some(1 << shift)
        }
    }

    /// SN without its padding; `None` if it is not ASCII.
    pub fn serial(&self) -> Option<&str> {
        ascii(&self.sn)
    }

    /// MN without its padding; `None` if it is not ASCII.
    pub fn model(&self) -> Option<&str> {
        ascii(&self.mn)
    }

    /// FR without its padding; `None` if it is not ASCII.
    pub fn firmware(&self) -> Option<&str> {
        ascii(&self.fr)
    }

    /// SUBNQN up to its NUL; `None` if it is not UTF-8.
    pub fn subsystem_nqn(&self) -> Option<&str> {
        let end = self
            .subnqn
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.subnqn.len());
        core::str::from_utf8(&self.subnqn[..end]).ok()
    }
}

/// Text of a padded ASCII field.
fn ascii(field: &[u8]) -> Option<&str> {
    let text = core::str::from_utf8(field)
        .ok()
        .filter(|text| text.is_ascii())?;
    Some(text.trim_end_matches(['\0', ' ']))
}

/// Writes `text` into a space padded ASCII field (SN, MN, FR): what is too long is cut, what is not printable ASCII
/// becomes `?`.
pub fn write_ascii(field: &mut [u8], text: &str) {
    field.fill(b' ');
    for (to, from) in field.iter_mut().zip(text.chars()) {
        *to = if matches!(from, ' '..='~') {
            from as u8
        } else {
            b'?'
        };
    }
}

impl core::fmt::Debug for IdentifyController {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("IdentifyController")
            .field("sn", &self.serial())
            .field("mn", &self.model())
            .field("fr", &self.firmware())
            .field("subnqn", &self.subsystem_nqn())
            .field("cntlid", &self.cntlid)
            .field("ver", &self.ver)
            .field("mdts", &self.mdts)
            .field("nn", &self.nn)
            .field("oacs", &self.oacs)
            .field("oncs", &self.oncs)
            .field("trattr", &self.trattr)
            .finish_non_exhaustive()
    }
}

/// AOCS, Admin Optional Command Support of the NVM command set (CNS 06h bytes 19:18).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Aocs {
    /// RALBAS, Reporting Allocated LBA Supported: Get LBA Status can tell allocated blocks.
    pub ralbas: bool,
    #[bits(15)]
    __: u16,
}

/// Identify Controller of the NVM command set, 4096 bytes (CNS 06h, CSI 00h; NVMCS).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyControllerNvm {
    /// VSL, Verify Size Limit, 2^n minimum pages; 0 for no limit.
    pub vsl: u8,
    /// WZSL, Write Zeroes Size Limit, 2^n minimum pages; 0 for no limit.
    pub wzsl: u8,
    /// WUSL, Write Uncorrectable Size Limit, 2^n minimum pages; 0 for no limit.
    pub wusl: u8,
    /// DMRL, Dataset Management Ranges Limit; 0 for no limit.
    pub dmrl: u8,
    /// DMRSL, Dataset Management Range Size Limit in blocks; 0 for no limit.
    pub dmrsl: u32,
    /// DMSL, Dataset Management Size Limit in blocks; 0 for no limit.
    pub dmsl: u64,
    /// Reserved, 0, or newer fields.
    pub rsvd16: [u8; 2],
    /// AOCS, optional admin commands.
    pub aocs: Aocs,
    /// VER, version of the command set specification.
    pub ver: Vs,
    /// LBAMQF, LBA Migration Queue Format: 00h is [`crate::cdq::LBAMQF_TYPE_0`], C0h..FFh vendor specific.
    pub lbamqf: u8,
    /// Reserved, 0.
    pub rsvd25: [u8; 4071],
}
layout!(IdentifyControllerNvm, 4096, dmrsl @ 4, dmsl @ 8, aocs @ 18, ver @ 20, lbamqf @ 24);
zeroed_default!(IdentifyControllerNvm);
debug_fields!(IdentifyControllerNvm {
    vsl,
    wzsl,
    wusl,
    dmrl,
    dmrsl,
    dmsl,
    aocs,
    ver,
    lbamqf
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_limits() {
        let mut id = IdentifyController::default();
        write_ascii(&mut id.sn, "DRAY é1");
        assert_eq!((id.serial(), id.sn[19]), (Some("DRAY ?1"), b' '));
        id.subnqn[..3].copy_from_slice(b"nqn");
        assert_eq!(id.subsystem_nqn(), Some("nqn"));
        id.mn[0] = 0xFF;
        assert_eq!(id.model(), None);
        assert_eq!(id.max_transfer_bytes(0), None);
        id.mdts = 5;
        assert_eq!(id.max_transfer_bytes(0), Some(128 << 10));
        id.mdts = 255;
        assert_eq!(id.max_transfer_bytes(15), None);
        assert_eq!(
            Oacs::new().with_hmlms(true).with_dbcs(true).into_bits(),
            0x900
        );
        assert_eq!(Oncs::new().with_copy(true).into_bits(), 0x100);
        assert_eq!(Ctratt::new().with_elbas(true).into_bits(), 0x8000);
        assert_eq!(
            Oaes::new()
                .with_ana_change(true)
                .with_namespace_attribute(true)
                .into_bits(),
            0x900
        );
        assert_eq!(TrAttr::new().with_tudcs(true).into_bits(), 2);
    }
}
