//! The packed byte formats of `wit/0.1/policy.wit`: fixed little-endian records without padding.
//!
//! Reading never fails: any bytes are some record, a rest shorter than a record is left out, and what a record says is judged by
//! [`Role::check`](crate::role::Role::check). Lists are read as chunks of known size, so that a loop over them has no bounds check
//! in it.

/// Bytes of a packed [`Range`].
pub const RANGE_BYTES: usize = 16;
/// Bytes of a packed [`Region`] of this host; the stride that `open` tells a policy.
pub const REGION_BYTES: usize = 32;
/// Bytes of a packed [`Extent`].
pub const EXTENT_BYTES: usize = 16;

/// Most blocks that one [`Range`] can name: 31 bits.
pub const MAX_RANGE_BLOCKS: u32 = (1 << 31) - 1;
/// Most blocks that one [`Extent`] can name: 30 bits.
pub const MAX_EXTENT_BLOCKS: u32 = (1 << 30) - 1;
/// [`Region::idle_ms`] of a region that never changed.
pub const NEVER: u32 = u32::MAX;

const DEALLOCATED: u32 = 1 << 31;

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A changed range, as a `cdq` policy returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First LBA.
    pub slba: u64,
    /// Logical blocks, at most [`MAX_RANGE_BLOCKS`], not 0's based; 0 = every block of the namespace.
    pub blocks: u32,
    /// The range was deallocated; its contents may be replaced by a deallocate.
    pub deallocated: bool,
    /// The namespace.
    pub nsid: u32,
}

impl Range {
    /// The record as bytes. Blocks above [`MAX_RANGE_BLOCKS`] do not fit and lose their upper bit: split first.
    #[inline]
    #[must_use]
    pub fn pack(self) -> [u8; RANGE_BYTES] {
        (u128::from(self.slba) | u128::from(self.upper_half()) << 64).to_le_bytes()
    }

    /// Bytes 15:8 of the record as one number: blocks, their flag, the namespace.
    #[inline]
    pub(crate) fn upper_half(self) -> u64 {
        let flag = if self.deallocated { DEALLOCATED } else { 0 };
        u64::from((self.blocks & MAX_RANGE_BLOCKS) | flag) | u64::from(self.nsid) << 32
    }

    /// The record that the bytes say.
    #[inline]
    #[must_use]
    pub fn unpack(bytes: &[u8; RANGE_BYTES]) -> Self {
        let blocks = u32_at(bytes, 8);
        Self {
            slba: u64_at(bytes, 0),
            blocks: blocks & MAX_RANGE_BLOCKS,
            deallocated: blocks & DEALLOCATED != 0,
            nsid: u32_at(bytes, 12),
        }
    }

    /// Appends the record.
    #[inline]
    pub fn push(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.pack());
    }

    /// Appends as many records as `blocks` needs (a queue entry can name 2^32 blocks, a range one less than 2^31); nothing for
    /// no blocks.
    #[inline]
    pub fn push_long(slba: u64, blocks: u64, deallocated: bool, nsid: u32, out: &mut Vec<u8>) {
        let (mut slba, mut left) = (slba, blocks);
        while left > 0 {
            let blocks = left.min(u64::from(MAX_RANGE_BLOCKS)) as u32;
            Self { slba, blocks, deallocated, nsid }.push(out);
            slba = slba.wrapping_add(u64::from(blocks));
            left -= u64::from(blocks);
        }
    }
}

/// The ranges in packed bytes.
#[inline]
pub fn ranges(bytes: &[u8]) -> impl ExactSizeIterator<Item = Range> + Clone + '_ {
    bytes.as_chunks::<RANGE_BYTES>().0.iter().map(Range::unpack)
}

/// An extent to copy, as a `copy` policy returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First LBA.
    pub slba: u64,
    /// Logical blocks, 1 to [`MAX_EXTENT_BLOCKS`].
    pub blocks: u32,
    /// How the payload should travel.
    pub compression: Compression,
    /// The namespace.
    pub nsid: u32,
}

/// How the payload of an extent should travel: two bits, a wish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compression(pub u8);

impl Compression {
    /// As it is.
    pub const PLAIN: Self = Self(0);
    /// LZ4.
    pub const LZ4: Self = Self(1);
    /// Zstandard.
    pub const ZSTD: Self = Self(2);
}

impl Extent {
    /// The record as bytes. Blocks above [`MAX_EXTENT_BLOCKS`] do not fit and lose their upper bits: split first.
    #[inline]
    #[must_use]
    pub fn pack(self) -> [u8; EXTENT_BYTES] {
        let blocks = (self.blocks & MAX_EXTENT_BLOCKS) | u32::from(self.compression.0 & 3) << 30;
        (u128::from(self.slba) | u128::from(blocks) << 64 | u128::from(self.nsid) << 96).to_le_bytes()
    }

    /// The record that the bytes say.
    #[inline]
    #[must_use]
    pub fn unpack(bytes: &[u8; EXTENT_BYTES]) -> Self {
        let blocks = u32_at(bytes, 8);
        Self {
            slba: u64_at(bytes, 0),
            blocks: blocks & MAX_EXTENT_BLOCKS,
            compression: Compression((blocks >> 30) as u8),
            nsid: u32_at(bytes, 12),
        }
    }

    /// Appends the record.
    #[inline]
    pub fn push(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.pack());
    }
}

/// The extents in packed bytes.
#[inline]
pub fn extents(bytes: &[u8]) -> impl ExactSizeIterator<Item = Extent> + Clone + '_ {
    bytes.as_chunks::<EXTENT_BYTES>().0.iter().map(Extent::unpack)
}

/// The counters of one region, as the host shows them to `tracking` and `copy` policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First LBA.
    pub slba: u64,
    /// The namespace.
    pub nsid: u32,
    /// Its logical blocks: a power of two, but for the last region of a namespace.
    pub blocks: u32,
    /// Blocks left to copy, those queued already included.
    pub dirty: u32,
    /// Blocks reported as changed this round, saturating; a block that changed twice counts twice.
    pub changed: u32,
    /// Milliseconds since the last change; [`NEVER`] = it never changed.
    pub idle_ms: u32,
    /// The first copy is still open.
    pub first_copy_open: bool,
    /// Held for later by the tracking plan.
    pub held: bool,
}

impl Region {
    /// The record as bytes.
    #[inline]
    #[must_use]
    pub fn pack(self) -> [u8; REGION_BYTES] {
        let mut out = [0; REGION_BYTES];
        out[0..8].copy_from_slice(&self.slba.to_le_bytes());
        out[8..12].copy_from_slice(&self.nsid.to_le_bytes());
        out[12..16].copy_from_slice(&self.blocks.to_le_bytes());
        out[16..20].copy_from_slice(&self.dirty.to_le_bytes());
        out[20..24].copy_from_slice(&self.changed.to_le_bytes());
        out[24..28].copy_from_slice(&self.idle_ms.to_le_bytes());
        out[28] = u8::from(self.first_copy_open) | u8::from(self.held) << 1;
        out
    }

    /// The record that the bytes say; unknown flags are dropped.
    #[inline]
    #[must_use]
    pub fn unpack(bytes: &[u8; REGION_BYTES]) -> Self {
        Self {
            slba: u64_at(bytes, 0),
            nsid: u32_at(bytes, 8),
            blocks: u32_at(bytes, 12),
            dirty: u32_at(bytes, 16),
            changed: u32_at(bytes, 20),
            idle_ms: u32_at(bytes, 24),
            first_copy_open: bytes[28] & 1 != 0,
            held: bytes[28] & 2 != 0,
        }
    }

    /// Appends the record.
    #[inline]
    pub fn push(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.pack());
    }
}

/// The regions in packed bytes of this host's stride.
#[inline]
pub fn regions(bytes: &[u8]) -> impl ExactSizeIterator<Item = Region> + Clone + '_ {
    bytes.as_chunks::<REGION_BYTES>().0.iter().map(Region::unpack)
}

/// What the tracking plan says of one region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// log2 of the chunk in blocks, 0 to 31.
    pub chunk_log2: u8,
    /// The region is hot: hold it for later.
    pub hold: bool,
}

impl Choice {
    /// The record as its byte.
    #[inline]
    #[must_use]
    pub fn pack(self) -> u8 {
        (self.chunk_log2 & 0x1f) | u8::from(self.hold) << 7
    }

    /// The record that the byte says; bits 6:5 are dropped here and refused by the check.
    #[inline]
    #[must_use]
    pub fn unpack(byte: u8) -> Self {
        Self { chunk_log2: byte & 0x1f, hold: byte & 0x80 != 0 }
    }

    /// Appends the record.
    #[inline]
    pub fn push(self, out: &mut Vec<u8>) {
        out.push(self.pack());
    }
}

/// The choices in packed bytes.
#[inline]
pub fn choices(bytes: &[u8]) -> impl ExactSizeIterator<Item = Choice> + Clone + '_ {
    bytes.iter().map(|&byte| Choice::unpack(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layouts_are_those_of_the_interface() {
        let range = Range { slba: 0x0102_0304_0506_0708, blocks: 9, deallocated: true, nsid: 0x0a0b };
        assert_eq!(range.pack(), [8, 7, 6, 5, 4, 3, 2, 1, 9, 0, 0, 0x80, 0x0b, 0x0a, 0, 0]);
        let extent = Extent { slba: 1, blocks: 2, compression: Compression::ZSTD, nsid: 3 };
        assert_eq!(extent.pack(), [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0x80, 3, 0, 0, 0]);
        assert_eq!(Choice { chunk_log2: 8, hold: true }.pack(), 0x88);
        let region =
            Region { slba: 1, nsid: 2, blocks: 3, dirty: 4, changed: 5, idle_ms: NEVER, first_copy_open: false, held: true };
        let bytes = region.pack();
        assert_eq!([bytes[0], bytes[8], bytes[12], bytes[16], bytes[20], bytes[24], bytes[28]], [1, 2, 3, 4, 5, 0xff, 2]);
    }

    #[test]
    fn long_ranges_split_without_a_gap() {
        let mut out = Vec::new();
        Range::push_long(5, 1 << 32, false, 1, &mut out);
        let parts: Vec<_> = ranges(&out).collect();
        assert!(parts.len() <= crate::role::MAX_RANGES_PER_ENTRY);
        let mut at = 5;
        for part in parts {
            assert_eq!(part.slba, at);
            at += u64::from(part.blocks);
        }
        assert_eq!(at, 5 + (1 << 32));
    }

    proptest! {
        #[test]
        fn round_trips(bytes: [u8; 32]) {
            let (low, high) = bytes.split_at(16);
            let (low, high): ([u8; 16], [u8; 16]) = (low.try_into().unwrap(), high.try_into().unwrap());
            prop_assert_eq!(Range::unpack(&low).pack(), low);
            prop_assert_eq!(Extent::unpack(&high).pack(), high);
            let region = Region::unpack(&bytes);
            prop_assert_eq!(Region::unpack(&region.pack()), region);
        }

        #[test]
        fn any_bytes_are_read(bytes: Vec<u8>) {
            prop_assert_eq!(ranges(&bytes).count(), bytes.len() / RANGE_BYTES);
            prop_assert_eq!(extents(&bytes).count(), bytes.len() / EXTENT_BYTES);
            prop_assert_eq!(regions(&bytes).count(), bytes.len() / REGION_BYTES);
            prop_assert_eq!(choices(&bytes).count(), bytes.len());
        }
    }
}
