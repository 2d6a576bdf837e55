//! Host memory tracking: the data of Track Send, track memory changes (Base 2.3 §5.2.28.1.2), and of Track Receive
//! (§5.2.27).

use bitfield_struct::bitfield;
use core::fmt;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The one version of both structures.
pub const TRACK_VERSION: u8 = 0;

/// Bytes of a tracking granule, 2^n × 4 KiB, or `None` if that does not fit 64 bits.
pub const fn granule_bytes(n: u16) -> Option<u64> {
    if n <= 51 { Some(4096 << n) } else { None }
}

/// Head of the Track Send, track memory changes, buffer: 8 bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TrackMemoryHeader {
    /// VER, [`TRACK_VERSION`].
    pub ver: u8,
    /// Reserved, 0.
    pub rsvd1: [u8; 2],
    /// RMRTG, Requested Memory Range Tracking Granularity, 2^n × 4 KiB.
    pub rmrtg: u8,
    /// RNMRTD, Requested Number of Memory Range Tracking Descriptors, a plain count.
    pub rnmrtd: u32,
}
layout!(TrackMemoryHeader, 8, rmrtg @ 3, rnmrtd @ 4);

/// A range to track: 12 bytes, after the head.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TrackMemoryDescriptor {
    /// SADDR, start address, a multiple of the granule.
    pub saddr: U64,
    /// LEN in granules.
    pub len: U32,
}
layout!(TrackMemoryDescriptor, 12, len @ 8);

/// Byte 1 of [`TrackReceiveHeader`].
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TrackReceiveFlags {
    /// MTR, More To Report.
    pub mtr: bool,
    /// SUSP: the controller was suspended. With MTR clear, nothing more changes until Resume.
    pub susp: bool,
    #[bits(6)]
    __: u8,
}

/// Head of what Track Receive returns: 16 bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TrackReceiveHeader {
    /// VER, [`TRACK_VERSION`].
    pub ver: u8,
    /// More to report; suspended.
    pub flags: TrackReceiveFlags,
    /// CNTLID of the migratable controller.
    pub cntlid: u16,
    /// NTMCD, Number of Tracked Memory Change Descriptors.
    pub ntmcd: u32,
    /// RPMPG, Reported Memory Page Granularity, 2^n × 4 KiB.
    pub rpmpg: u16,
    /// Reserved, 0.
    pub rsvd10: [u8; 6],
}
layout!(TrackReceiveHeader, 16, cntlid @ 2, ntmcd @ 4, rpmpg @ 8);

/// A range that changed: 16 bytes, after the head.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TrackReceiveDescriptor {
    /// SADDR, start address.
    pub saddr: U64,
    /// LEN in granules.
    pub len: U32,
    /// Reserved, 0.
    pub rsvd12: U32,
}
layout!(TrackReceiveDescriptor, 16, len @ 8);

/// Why a tracking buffer could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackError {
    /// The buffer is shorter than its head, or than the number of descriptors that its head names.
    Truncated,
    /// The version is not [`TRACK_VERSION`].
    UnsupportedVersion(u8),
}

impl fmt::Display for TrackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => f.write_str("memory tracking buffer ends before its descriptors"),
            Self::UnsupportedVersion(ver) => {
                write!(f, "memory tracking version {ver} is not supported")
            }
        }
    }
}

impl core::error::Error for TrackError {}

/// The first `count` descriptors of `bytes`.
fn descriptors<T: FromBytes + Immutable + KnownLayout>(
    bytes: &[u8],
    count: u32,
) -> Result<&[T], TrackError> {
    let count = usize::try_from(count).map_err(|_| TrackError::Truncated)?;
    <[T]>::ref_from_prefix_with_elems(bytes, count)
        .map(|(found, _)| found)
        .map_err(|_| TrackError::Truncated)
}

/// Reads a Track Send, track memory changes, buffer. Only lengths and the version are checked.
///
/// # Errors
/// [`TrackError`], for a short buffer or an unknown version.
pub fn parse_track_memory(
    bytes: &[u8],
) -> Result<(TrackMemoryHeader, &[TrackMemoryDescriptor]), TrackError> {
    let (header, rest) =
        TrackMemoryHeader::read_from_prefix(bytes).map_err(|_| TrackError::Truncated)?;
    if header.ver != TRACK_VERSION {
        return Err(TrackError::UnsupportedVersion(header.ver));
    }
    Ok((header, descriptors(rest, header.rnmrtd)?))
}

/// Reads what Track Receive returned. Only lengths and the version are checked.
///
/// # Errors
/// [`TrackError`], for a short buffer or an unknown version.
pub fn parse_track_receive(
    bytes: &[u8],
) -> Result<(TrackReceiveHeader, &[TrackReceiveDescriptor]), TrackError> {
    let (header, rest) =
        TrackReceiveHeader::read_from_prefix(bytes).map_err(|_| TrackError::Truncated)?;
    if header.ver != TRACK_VERSION {
        return Err(TrackError::UnsupportedVersion(header.ver));
    }
    Ok((header, descriptors(rest, header.ntmcd)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_checked_against_the_buffer() {
        let mut bytes = [0u8; 8 + 24];
        bytes[3] = 1;
        bytes[4] = 2;
        bytes[20] = 0x10;
        bytes[28] = 3;
        let (header, found) = parse_track_memory(&bytes).unwrap();
        assert_eq!((header.rmrtg, found.len()), (1, 2));
        assert_eq!((found[1].saddr.get(), found[1].len.get()), (0x10, 3));
        bytes[4] = 3;
        assert_eq!(parse_track_memory(&bytes), Err(TrackError::Truncated));
        bytes[4..8].fill(0xFF);
        assert_eq!(parse_track_memory(&bytes), Err(TrackError::Truncated));
        bytes[0] = 1;
        assert_eq!(
            parse_track_memory(&bytes),
            Err(TrackError::UnsupportedVersion(1))
        );
        assert_eq!(parse_track_receive(&[0; 15]), Err(TrackError::Truncated));
        assert_eq!(
            (granule_bytes(51), granule_bytes(52)),
            (Some(1 << 63), None)
        );
    }
}
