//! Protocol data units (TCP 1.1 §3.6): fixed headers, the flags of the common header, and the errors that end a
//! connection.

use crate::command::{CompletionEntry, SubmissionEntry};
use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_value! {
    /// PDU-Type (TCP 1.1 §3.6.1).
    PduType(u8) mask 0xFF {
        0x00 IC_REQ "ICReq",
        0x01 IC_RESP "ICResp",
        0x02 H2C_TERM_REQ "H2CTermReq",
        0x03 C2H_TERM_REQ "C2HTermReq",
        0x04 CAPSULE_CMD "CapsuleCmd",
        0x05 CAPSULE_RESP "CapsuleResp",
        0x06 H2C_DATA "H2CData",
        0x07 C2H_DATA "C2HData",
        0x09 R2T "R2T",
        0x0A KD_REQ "KDReq",
        0x0B KD_RESP "KDResp",
    }
}

/// FLAGS of the common header (TCP 1.1 §3.6.1).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PduFlags {
    /// HDGSTF: a header digest follows the header.
    pub hdgst: bool,
    /// DDGSTF: a data digest follows the data.
    pub ddgst: bool,
    /// LAST_PDU: the last data PDU of an R2T (H2CData) or of a command (C2HData).
    pub last: bool,
    /// SUCCESS: this data completes the command, no CapsuleResp follows (C2HData).
    pub success: bool,
    #[bits(4)]
    __: u8,
}

/// Common header of every PDU, 8 bytes (TCP 1.1 §3.6.1).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CommonHeader {
    /// PDU-Type.
    pub pdu_type: PduType,
    /// FLAGS.
    pub flags: PduFlags,
    /// HLEN: bytes of the header, without its digest.
    pub hlen: u8,
    /// PDO: where the data begins, in bytes from the PDU's start; 0 without data.
    pub pdo: u8,
    /// PLEN: bytes of the whole PDU: header, digests, padding and data.
    pub plen: u32,
}
layout!(CommonHeader, 8, flags @ 1, hlen @ 2, pdo @ 3, plen @ 4);

/// Bytes of a digest (CRC-32C, least significant byte first; TCP 1.1 §3.3.1).
pub const DIGEST_BYTES: usize = 4;

/// DGST of ICReq and ICResp (TCP 1.1 §3.6.2.2).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Digests {
    /// HDGST_ENABLE: header digests.
    pub header: bool,
    /// DDGST_ENABLE: data digests.
    pub data: bool,
    #[bits(6)]
    __: u8,
}

/// ICReq, Initialize Connection Request, 128 bytes (TCP 1.1 §3.6.2.2).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IcReq {
    /// Common header: HLEN and PLEN are 128.
    pub ch: CommonHeader,
    /// PFV, PDU Format Version: 0.
    pub pfv: u16,
    /// HPDA, Host PDU Data Alignment: data to the host begins at multiples of 4 × (HPDA + 1) bytes, HPDA ≤ 31.
    pub hpda: u8,
    /// DGST: digests asked for.
    pub dgst: Digests,
    /// MAXR2T: R2Ts outstanding for a command at one time, 0's based.
    pub maxr2t: u32,
    /// Reserved, 0.
    pub rsvd16: [u8; 112],
}
layout!(IcReq, 128, pfv @ 8, hpda @ 10, dgst @ 11, maxr2t @ 12);
zeroed_default!(IcReq);
debug_fields!(IcReq {
    ch,
    pfv,
    hpda,
    dgst,
    maxr2t
});

/// ICResp, Initialize Connection Response, 128 bytes (TCP 1.1 §3.6.2.3).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IcResp {
    /// Common header: HLEN and PLEN are 128.
    pub ch: CommonHeader,
    /// PFV, PDU Format Version: 0.
    pub pfv: u16,
    /// CPDA, Controller PDU Data Alignment: data to the controller begins at multiples of 4 × (CPDA + 1) bytes.
    pub cpda: u8,
    /// DGST: digests in use from the next PDU on.
    pub dgst: Digests,
    /// MAXH2CDATA: most data bytes of one H2CData PDU, at least 4096, a multiple of 4.
    pub maxh2cdata: u32,
    /// Reserved, 0.
    pub rsvd16: [u8; 112],
}
layout!(IcResp, 128, pfv @ 8, cpda @ 10, dgst @ 11, maxh2cdata @ 12);
zeroed_default!(IcResp);
debug_fields!(IcResp {
    ch,
    pfv,
    cpda,
    dgst,
    maxh2cdata
});

open_value! {
    /// FES, Fatal Error Status of H2CTermReq and C2HTermReq (TCP 1.1 §3.6.2.4, §3.6.2.5).
    FatalError(u16) mask 0xFFFF {
        0x01 INVALID_HEADER_FIELD "Invalid PDU Header Field",
        0x02 SEQUENCE "PDU Sequence Error",
        0x03 HEADER_DIGEST "Header Digest Error",
        0x04 DATA_OUT_OF_RANGE "Data Transfer Out of Range",
        0x05 LIMIT_EXCEEDED "R2T Limit or Data Transfer Limit Exceeded",
        0x06 UNSUPPORTED_PARAMETER "Unsupported Parameter",
    }
}

/// H2CTermReq or C2HTermReq without its data, 24 bytes (TCP 1.1 §3.6.2.4, §3.6.2.5). The data is the header of the PDU
/// in error, at most [`TermReq::MAX_DATA`] bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TermReq {
    /// Common header: HLEN is 24, PLEN 24..=152, no digests.
    pub ch: CommonHeader,
    /// FES, Fatal Error Status.
    pub fes: FatalError,
    /// FEI, Fatal Error Information, low and high half: the byte offset of the field in error
    /// ([`FatalError::INVALID_HEADER_FIELD`], [`FatalError::UNSUPPORTED_PARAMETER`]) or the digest that came
    /// ([`FatalError::HEADER_DIGEST`]).
    pub fei: [u16; 2],
    /// Reserved, 0.
    pub rsvd14: [u8; 10],
}
layout!(TermReq, 24, fes @ 8, fei @ 10);

impl TermReq {
    /// Most bytes of the header in error that follow.
    pub const MAX_DATA: usize = 128;

    /// A termination in the direction of `pdu_type`, `data` bytes of the header in error to follow (cut to 128).
    pub const fn new(pdu_type: PduType, fes: FatalError, fei: u32, data: usize) -> Self {
        let data = if data > Self::MAX_DATA { Self::MAX_DATA } else { data };
        Self {
            ch: CommonHeader {
                pdu_type,
                flags: PduFlags::new(),
                hlen: 24,
                pdo: 0,
                plen: 24 + data as u32,
            },
            fes,
            fei: [fei as u16, (fei >> 16) as u16],
            rsvd14: [0; 10],
        }
    }

    /// FEI as one number.
    pub const fn fei(&self) -> u32 {
        self.fei[0] as u32 | (self.fei[1] as u32) << 16
    }
}

/// CapsuleCmd without its in-capsule data, 72 bytes (TCP 1.1 §3.6.2.6).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CapsuleCmd {
    /// Common header: HLEN is 72.
    pub ch: CommonHeader,
    /// CCSQE, the submission queue entry.
    pub sqe: SubmissionEntry,
}
layout!(CapsuleCmd, 72, sqe @ 8);

/// CapsuleResp, 24 bytes (TCP 1.1 §3.6.2.7).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CapsuleResp {
    /// Common header: HLEN is 24.
    pub ch: CommonHeader,
    /// RCCQE, the completion queue entry; SQID and the phase tag are reserved.
    pub cqe: CompletionEntry,
}
layout!(CapsuleResp, 24, cqe @ 8);

/// H2CData or C2HData without its data, 24 bytes (TCP 1.1 §3.6.2.8, §3.6.2.9).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DataPdu {
    /// Common header: HLEN is 24.
    pub ch: CommonHeader,
    /// CCCID, Command Capsule CID.
    pub cccid: u16,
    /// TTAG, Transfer Tag of the R2T (H2CData); reserved in C2HData.
    pub ttag: u16,
    /// DATAO: where the data belongs, in bytes from the start of the command's data; a multiple of 4.
    pub datao: u32,
    /// DATAL: bytes of data; a multiple of 4.
    pub datal: u32,
    /// Reserved, 0.
    pub rsvd20: u32,
}
layout!(DataPdu, 24, cccid @ 8, ttag @ 10, datao @ 12, datal @ 16);

/// R2T, Ready to Transfer, 24 bytes (TCP 1.1 §3.6.2.10).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct R2t {
    /// Common header: HLEN and PLEN (without digest) are 24.
    pub ch: CommonHeader,
    /// CCCID, Command Capsule CID.
    pub cccid: u16,
    /// TTAG, Transfer Tag, for the H2CData to carry.
    pub ttag: u16,
    /// R2TO: first byte asked for, from the start of the command's data.
    pub r2to: u32,
    /// R2TL: bytes asked for.
    pub r2tl: u32,
    /// Reserved, 0.
    pub rsvd20: u32,
}
layout!(R2t, 24, cccid @ 8, ttag @ 10, r2to @ 12, r2tl @ 16);

/// HLEN that a PDU type must have, or `None` for a type without a name (TCP 1.1 §3.6.2).
pub const fn header_bytes(pdu_type: PduType) -> Option<u8> {
    match pdu_type {
        PduType::IC_REQ | PduType::IC_RESP => Some(128),
        PduType::CAPSULE_CMD => Some(72),
        PduType::H2C_TERM_REQ
        | PduType::C2H_TERM_REQ
        | PduType::CAPSULE_RESP
        | PduType::H2C_DATA
        | PduType::C2H_DATA
        | PduType::R2T => Some(24),
        _ => None,
    }
}

/// Where the data of a PDU begins: behind a header of `hlen` bytes and, with `hdgst`, its digest, at the next multiple of
/// 4 × (`alignment` + 1) bytes (HPDA or CPDA; TCP 1.1 §3.6.1, PDO).
pub const fn data_offset(hlen: u8, hdgst: bool, alignment: u8) -> u32 {
    let end = hlen as u32 + if hdgst { DIGEST_BYTES as u32 } else { 0 };
    let unit = 4 * (alignment as u32 + 1);
    end.div_ceil(unit) * unit
}

/// Byte offsets of header fields, for FEI.
pub mod field {
    /// PDU-Type.
    pub const PDU_TYPE: u32 = 0;
    /// FLAGS.
    pub const FLAGS: u32 = 1;
    /// HLEN.
    pub const HLEN: u32 = 2;
    /// PDO.
    pub const PDO: u32 = 3;
    /// PLEN.
    pub const PLEN: u32 = 4;
    /// PFV of ICReq and ICResp.
    pub const PFV: u32 = 8;
    /// HPDA of ICReq, CPDA of ICResp.
    pub const PDA: u32 = 10;
    /// DGST of ICReq and ICResp.
    pub const DGST: u32 = 11;
    /// MAXH2CDATA of ICResp.
    pub const MAXH2CDATA: u32 = 12;
    /// CCCID of data PDUs, R2T.
    pub const CCCID: u32 = 8;
    /// TTAG of data PDUs, R2T.
    pub const TTAG: u32 = 10;
    /// DATAO of data PDUs, R2TO.
    pub const DATAO: u32 = 12;
    /// DATAL of data PDUs, R2TL.
    pub const DATAL: u32 = 16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_sit_where_the_transport_puts_them() {
        let term = TermReq::new(
            PduType::C2H_TERM_REQ,
            FatalError::HEADER_DIGEST,
            0x1234_5678,
            500,
        );
        assert_eq!(
            &term.as_bytes()[..14],
            &[3, 0, 24, 0, 152, 0, 0, 0, 3, 0, 0x78, 0x56, 0x34, 0x12]
        );
        assert_eq!(term.fei(), 0x1234_5678);
        assert_eq!(
            PduFlags::new().with_success(true).with_last(true).into_bits(),
            0b1100
        );
        assert_eq!(header_bytes(PduType(8)), None);
    }

    #[test]
    fn data_begins_aligned() {
        assert_eq!(data_offset(24, false, 0), 24);
        assert_eq!(data_offset(24, true, 0), 28);
        assert_eq!(data_offset(72, true, 31), 128);
        assert_eq!(data_offset(128, false, 31), 128);
        assert_eq!(data_offset(24, true, 1), 32);
    }
}
