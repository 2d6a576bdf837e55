//! Reservations of a namespace (Base 2.3 §7.8, §8.1.24): the report.

use crate::command::{NvmOpcode, SubmissionEntry};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the extended report's header.
pub const REPORT_HEADER_BYTES: usize = 64;
/// Bytes of one registrant in the extended report.
pub const REGISTRANT_BYTES: usize = 64;

open_value! {
    /// RTYPE, what others may do.
    ReservationType(u8) mask 0xFF {
        0x00 NONE "none",
        0x01 WRITE_EXCLUSIVE "Write Exclusive",
        0x02 EXCLUSIVE_ACCESS "Exclusive Access",
        0x03 WRITE_EXCLUSIVE_REGISTRANTS "Write Exclusive - Registrants Only",
        0x04 EXCLUSIVE_ACCESS_REGISTRANTS "Exclusive Access - Registrants Only",
        0x05 WRITE_EXCLUSIVE_ALL "Write Exclusive - All Registrants",
        0x06 EXCLUSIVE_ACCESS_ALL "Exclusive Access - All Registrants",
    }
}

impl ReservationType {
    /// Whether registrants other than the holder may do what the holder may.
    #[must_use]
    pub const fn lets_registrants(self) -> bool {
        matches!(self.0, 3..=6)
    }

    /// Whether those that it keeps from writing may read.
    #[must_use]
    pub const fn lets_others_read(self) -> bool {
        matches!(self.0, 0 | 1 | 3 | 5)
    }
}

/// Header of the Reservation Status data structure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReservationHeader {
    /// GEN, counts changes of registrations.
    pub generation: u32,
    /// RTYPE.
    pub kind: ReservationType,
    /// REGCTL, number of registered controllers (or hosts), little-endian.
    pub registrants: [u8; 2],
    /// Reserved, 0.
    pub rsvd7: [u8; 2],
    /// PTPLS, persist through power loss.
    pub ptpls: u8,
    /// Reserved, 0.
    pub rsvd10: [u8; 14],
}
layout!(ReservationHeader, 24, kind @ 4, registrants @ 5, ptpls @ 9);

/// A registrant of the extended report (128-bit host identifiers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Registrant {
    /// CNTLID; FFFFh for one of a dynamic controller.
    pub cntlid: u16,
    /// RCSTS: bit 0 = it holds the reservation.
    pub status: u8,
    /// Reserved, 0.
    pub rsvd3: [u8; 5],
    /// RKEY, its key.
    pub key: u64,
    /// HOSTID.
    pub host: [u8; 16],
    /// Reserved, 0.
    pub rsvd32: [u8; 32],
}
layout!(Registrant, 64, status @ 2, key @ 8, host @ 16);

impl Registrant {
    /// Whether it holds the reservation.
    #[must_use]
    pub const fn holds(&self) -> bool {
        self.status & 1 != 0
    }
}

/// The registrants of an extended report: as many as its header says, or as the bytes hold.
pub fn registrants(bytes: &[u8]) -> impl Iterator<Item = Registrant> + '_ {
    let count = ReservationHeader::read_from_prefix(bytes).map_or(0, |(header, _)| u16::from_le_bytes(header.registrants));
    let (entries, _) = bytes.get(REPORT_HEADER_BYTES..).unwrap_or_default().as_chunks::<REGISTRANT_BYTES>();
    entries.iter().take(usize::from(count)).map(|bytes| zerocopy::transmute!(*bytes))
}

impl SubmissionEntry {
    /// Reservation Report (0Eh) in its extended form, `bytes` of it (a multiple of 4, at least 4).
    #[must_use]
    pub fn reservation_report(nsid: u32, bytes: u32) -> Self {
        Self { cdw10: (bytes / 4).saturating_sub(1), cdw11: 1, ..Self::nvm(NvmOpcode::RESERVATION_REPORT, nsid) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn a_report_keeps_to_its_count_and_its_bytes() {
        let mut report = [0u8; 64 + 128];
        report[4] = 3;
        report[5] = 9;
        report[64..67].copy_from_slice(&[5, 0, 1]);
        report[128] = 6;
        report[128 + 16] = 0xaa;
        let found: Vec<_> = registrants(&report).collect();
        assert_eq!(found.len(), 2, "as the bytes hold");
        assert_eq!((found[0].cntlid, found[0].holds(), found[1].cntlid, found[1].host[0]), (5, true, 6, 0xaa));
        report[5] = 1;
        assert_eq!(registrants(&report).count(), 1);
        assert_eq!(registrants(&report[..40]).count(), 0);
        assert_eq!((SubmissionEntry::reservation_report(1, 4096).cdw10, SubmissionEntry::reservation_report(1, 0).cdw10), (1023, 0));
    }

    #[test]
    fn kinds_say_who_may_what() {
        let kinds: Vec<_> = (0..8).map(ReservationType).map(|k| (k.lets_registrants(), k.lets_others_read())).collect();
        let wanted = [(false, true), (false, true), (false, false), (true, true), (true, false), (true, true), (true, false)];
        assert_eq!(kinds[..7], wanted);
        assert_eq!(kinds[7], (false, false), "an unknown kind lets nobody");
    }
}
