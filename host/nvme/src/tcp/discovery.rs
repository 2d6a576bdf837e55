//! The discovery log page (Base 2.3 §5.2.12.3.1) and the asymmetric namespace access log page (§5.2.12.1.13).

use crate::event::{AsyncEvent, EventType};
use crate::log::LogId;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// LID of the discovery log page.
pub const DISCOVERY_LOG: LogId = LogId(0x70);

/// OAES bit, and bit of feature 0Bh: discovery log page change notices.
pub const DISCOVERY_CHANGE_NOTICE: u32 = 1 << 31;

/// The event that reports a changed discovery log page (notice, information F0h).
pub const DISCOVERY_CHANGE: AsyncEvent = AsyncEvent::of(EventType::NOTICE, 0xF0, DISCOVERY_LOG);

/// Header of the discovery log page, 1024 bytes; [`DiscoveryEntry`]s follow.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DiscoveryLogHeader {
    /// GENCTR, Generation Counter: changes with the page.
    pub genctr: u64,
    /// NUMREC, entries that follow.
    pub numrec: u64,
    /// RECFMT, Record Format: 0.
    pub recfmt: u16,
    /// Reserved, 0.
    pub rsvd18: [u8; 1006],
}
layout!(DiscoveryLogHeader, 1024, numrec @ 8, recfmt @ 16);
zeroed_default!(DiscoveryLogHeader);
debug_fields!(DiscoveryLogHeader {
    genctr,
    numrec,
    recfmt
});

open_value! {
    /// TRTYPE, Transport Type.
    TransportType(u8) mask 0xFF {
        1 RDMA "RDMA",
        2 FC "Fibre Channel",
        3 TCP "TCP",
        254 INTRA_HOST "intra-host",
    }
}

open_value! {
    /// ADRFAM, Address Family.
    AddressFamily(u8) mask 0xFF {
        1 IPV4 "IPv4",
        2 IPV6 "IPv6",
        254 INTRA_HOST "intra-host",
    }
}

open_value! {
    /// SUBTYPE, Subsystem Type.
    SubsystemType(u8) mask 0xFF {
        1 REFERRAL "referral to another discovery service",
        2 NVM "NVM subsystem",
        3 CURRENT_DISCOVERY "current discovery subsystem",
    }
}

/// Discovery log page entry, 1024 bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DiscoveryEntry {
    /// TRTYPE.
    pub trtype: TransportType,
    /// ADRFAM.
    pub adrfam: AddressFamily,
    /// SUBTYPE.
    pub subtype: SubsystemType,
    /// TREQ, Transport Requirements: bits 1:0 secure channel (0 not told, 1 required, 2 not required), bit 2 SQ flow control
    /// can be disabled.
    pub treq: u8,
    /// PORTID.
    pub portid: u16,
    /// CNTLID to ask for: FFFFh in the dynamic model, FFFEh in the static model.
    pub cntlid: u16,
    /// ASQSZ, most entries of an admin submission queue, at least 32.
    pub asqsz: u16,
    /// EFLAGS: bit 0 the same data at another port, bit 1 persistent connections to the discovery controller.
    pub eflags: u16,
    /// Reserved, 0.
    pub rsvd12: [u8; 20],
    /// TRSVCID, Transport Service Identifier: the TCP port in decimal.
    pub trsvcid: [u8; 32],
    /// Reserved, 0.
    pub rsvd64: [u8; 192],
    /// SUBNQN.
    pub subnqn: [u8; 256],
    /// TRADDR, Transport Address.
    pub traddr: [u8; 256],
    /// TSAS, Transport Specific Address Subtype: of TCP, byte 0 is SECTYPE (0 no security, 2 TLS 1.3).
    pub tsas: [u8; 256],
}
layout!(DiscoveryEntry, 1024, portid @ 4, cntlid @ 6, asqsz @ 8, trsvcid @ 32, subnqn @ 256, traddr @ 512, tsas @ 768);
zeroed_default!(DiscoveryEntry);
debug_fields!(DiscoveryEntry {
    trtype,
    adrfam,
    subtype,
    treq,
    portid,
    cntlid,
    asqsz
});

open_value! {
    /// Asymmetric namespace access state (Base 2.3 §8.1.1).
    AnaState(u8) mask 0xF {
        0x1 OPTIMIZED "optimized",
        0x2 NON_OPTIMIZED "non-optimized",
        0x3 INACCESSIBLE "inaccessible",
        0x4 PERSISTENT_LOSS "persistent loss",
        0xF CHANGE "change",
    }
}

/// Header of the asymmetric namespace access log page, 16 bytes; [`AnaGroup`]s follow, each with its NSIDs.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AnaLogHeader {
    /// CHGCNT, Change Count.
    pub chgcnt: u64,
    /// NAGD, Number of ANA Group Descriptors.
    pub ngrps: u16,
    /// Reserved, 0.
    pub rsvd10: [u8; 6],
}
layout!(AnaLogHeader, 16, ngrps @ 8);

/// ANA Group Descriptor, 32 bytes; NNSIDS NSIDs of 4 bytes follow (none with RGO).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AnaGroup {
    /// AGID, ANA Group Identifier, from 1.
    pub grpid: u32,
    /// NNSIDV, Number of NSID Values.
    pub nnsids: u32,
    /// CHGCNT of this group.
    pub chgcnt: u64,
    /// ANAS, the state.
    pub state: AnaState,
    /// Reserved, 0.
    pub rsvd17: [u8; 15],
}
layout!(AnaGroup, 32, nnsids @ 4, chgcnt @ 8, state @ 16);

/// Bit 0 of LSP in Get Log Page of ANA: RGO, return groups only.
pub const ANA_LSP_RGO: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_change_event_is_that_of_the_specification() {
        assert_eq!(DISCOVERY_CHANGE.into_bits(), 0x0070_F002);
        assert_eq!(AnaState(9).name(), None);
    }
}
