//! Scatter gather list descriptors (Base 2.3 §4.3.2).

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_value! {
    /// SGL descriptor type (Base 2.3 §4.3.2).
    SglType(u8) mask 0xF {
        0x0 DATA_BLOCK "data block",
        0x1 BIT_BUCKET "bit bucket",
        0x2 SEGMENT "segment",
        0x3 LAST_SEGMENT "last segment",
        0x4 KEYED_DATA_BLOCK "keyed data block",
        0x5 TRANSPORT_DATA_BLOCK "transport data block",
        0xF VENDOR "vendor specific",
    }
}

/// Byte 15 of an SGL descriptor.
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SglIdentifier {
    /// Descriptor sub type: 0 address, 1 offset.
    #[bits(4)]
    pub subtype: u8,
    /// Descriptor type.
    #[bits(4)]
    pub kind: SglType,
}

/// SGL descriptor, 16 bytes (Base 2.3 §4.3.2): data block, bit bucket, segment and last segment share this layout.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SglDescriptor {
    /// Address of the data or of the next segment.
    pub address: u64,
    /// Length in bytes; of a segment, a multiple of 16.
    pub length: u32,
    /// Reserved, 0.
    pub rsvd12: [u8; 3],
    /// Type and sub type.
    pub identifier: SglIdentifier,
}
layout!(SglDescriptor, 16, length @ 8, identifier @ 15);

impl SglDescriptor {
    fn new(kind: SglType, address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            rsvd12: [0; 3],
            identifier: SglIdentifier::new().with_kind(kind),
        }
    }

    /// A data block of `length` bytes.
    pub fn data_block(address: u64, length: u32) -> Self {
        Self::new(SglType::DATA_BLOCK, address, length)
    }

    /// A bit bucket: `length` bytes of the data read are dropped.
    pub fn bit_bucket(length: u32) -> Self {
        Self::new(SglType::BIT_BUCKET, 0, length)
    }

    /// A pointer to a segment that is not the last; `length` in bytes, a multiple of 16.
    pub fn segment(address: u64, length: u32) -> Self {
        Self::new(SglType::SEGMENT, address, length)
    }

    /// A pointer to the last segment; `length` in bytes, a multiple of 16.
    pub fn last_segment(address: u64, length: u32) -> Self {
        Self::new(SglType::LAST_SEGMENT, address, length)
    }

    /// Descriptor type.
    pub const fn kind(&self) -> SglType {
        self.identifier.kind()
    }

    /// Descriptor sub type.
    pub const fn subtype(&self) -> u8 {
        self.identifier.subtype()
    }

    /// The descriptor that the two words of a data pointer hold.
    pub fn from_dptr(dptr: [u64; 2]) -> Self {
        zerocopy::transmute!(dptr)
    }

    /// The descriptor as the two words of a data pointer.
    pub fn into_dptr(self) -> [u64; 2] {
        zerocopy::transmute!(self)
    }
}
