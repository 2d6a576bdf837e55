//! Tagged blocks: each 512-byte sector says who wrote it, when (sequence number), and where it belongs.
//!
//! | bytes of a sector | what |
//! |---|---|
//! | 3:0 | magic number, "DTAG" |
//! | 7:4 | guest |
//! | 15:8 | sequence number of the write, from 1 |
//! | 23:16 | block number, in units of [`BLOCK_BYTES`] |
//! | 31:24 | index of the sector in the block |
//! | 39:32 | checksum of all other words, keyed with the seed |
//! | 511:40 | filling, made from seed, guest, sequence number, block and index |
//!
//! Everything follows from (seed, [`Tag`]), so a reader that knows the seed checks every bit.

use crate::mix;
use zerocopy::IntoBytes;

/// Bytes of a block: what the guest writes at once, and the unit of all block numbers in this crate.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of a sector, the smallest piece that a device writes whole.
pub const SECTOR_BYTES: usize = 512;
/// Sectors in a block.
pub const SECTORS: usize = BLOCK_BYTES / SECTOR_BYTES;

const WORDS: usize = SECTOR_BYTES / 8;
/// Words before the filling.
const HEAD: usize = 5;
const MAGIC: u32 = u32::from_le_bytes(*b"DTAG");
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Who wrote a block, when, and where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// The guest.
    pub guest: u32,
    /// Sequence number of the write, from 1.
    pub seq: u64,
    /// The block, in units of [`BLOCK_BYTES`].
    pub block: u64,
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "write {} of guest {} to block {}", self.seq, self.guest, self.block)
    }
}

/// What is in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// No sector claims to be tagged.
    Untagged,
    /// One write, every bit of it.
    Whole(Tag),
    /// Sectors of more than one write, or tagged beside untagged ones.
    Torn {
        /// The first tag found.
        first: Tag,
        /// The first sector that does not belong to it.
        sector: u8,
    },
    /// A sector claims to be tagged, but its bits are not those of its tag (or of this seed).
    Damaged {
        /// The sector.
        sector: u8,
    },
}

/// A block in the writer's own memory.
#[derive(Clone)]
pub struct Block([u64; SECTORS * WORDS]);

impl Default for Block {
    fn default() -> Self {
        Self([0; SECTORS * WORDS])
    }
}

impl Block {
    /// The block as bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The block as bytes to read into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_bytes()
    }

    /// Makes it the block that `tag` says, under `seed`.
    #[inline]
    pub fn write(&mut self, seed: u64, tag: Tag) {
        for (index, sector) in self.0.as_chunks_mut::<WORDS>().0.iter_mut().enumerate() {
            write_sector(seed, tag, index as u64, sector);
        }
    }

    /// What is in it, checked to the last bit.
    #[must_use]
    pub fn read(&self, seed: u64) -> Reading {
        let mut first: Option<Tag> = None;
        let mut untagged = None;
        for (index, sector) in self.0.as_chunks::<WORDS>().0.iter().enumerate() {
            let place = index as u8;
            if sector[0] as u32 != MAGIC {
                untagged = untagged.or(Some(place));
                continue;
            }
            let tag = Tag { guest: (sector[0] >> 32) as u32, seq: sector[1], block: sector[2] };
            let mut expected = [0; WORDS];
            write_sector(seed, tag, index as u64, &mut expected);
            if *sector != expected {
                return Reading::Damaged { sector: place };
            }
            match first {
                None => first = Some(tag),
                Some(first) if first != tag => return Reading::Torn { first, sector: place },
                Some(_) => {}
            }
        }
        match (first, untagged) {
            (None, _) => Reading::Untagged,
            (Some(tag), None) => Reading::Whole(tag),
            (Some(first), Some(sector)) => Reading::Torn { first, sector },
        }
    }
}

#[inline]
fn write_sector(seed: u64, tag: Tag, index: u64, sector: &mut [u64; WORDS]) {
    let who = u64::from(MAGIC) | u64::from(tag.guest) << 32;
    let key = mix(mix(seed ^ who) ^ mix(tag.seq.wrapping_add(STEP)) ^ mix(tag.block ^ !STEP).rotate_left(17) ^ index.wrapping_mul(STEP));
    // Words that a compiler can make side by side, two or four at a time: that is what keeps a block under 300 ns.
    let mut sum = 0u64;
    for (i, word) in sector[HEAD..].iter_mut().enumerate() {
        let value = key.wrapping_add((i as u64 + 1).wrapping_mul(STEP));
        *word = value ^ (value >> 29) ^ (value << 11);
        sum = sum.wrapping_add(*word);
    }
    [sector[0], sector[1], sector[2], sector[3]] = [who, tag.seq, tag.block, index];
    sector[4] = sum ^ key;
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag { guest: 3, seq: 77, block: 123_456 };

    fn block(tag: Tag) -> Block {
        let mut block = Block::default();
        block.write(9, tag);
        block
    }

    #[test]
    fn a_block_reads_back_under_its_seed_only() {
        let block = block(TAG);
        assert_eq!(block.read(9), Reading::Whole(TAG));
        assert_eq!(block.read(10), Reading::Damaged { sector: 0 });
        assert_eq!(Block::default().read(9), Reading::Untagged);
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let mut block = block(TAG);
        for byte in 0..BLOCK_BYTES {
            let bit = 1 << (byte % 8);
            block.bytes_mut()[byte] ^= bit;
            assert_ne!(block.read(9), Reading::Whole(TAG), "byte {byte}");
            block.bytes_mut()[byte] ^= bit;
        }
        assert_eq!(block.read(9), Reading::Whole(TAG));
    }

    #[test]
    fn torn_blocks_and_swapped_sectors_are_seen() {
        let other = Tag { seq: 78, ..TAG };
        let mut torn = block(TAG);
        torn.bytes_mut()[5 * SECTOR_BYTES..].copy_from_slice(&block(other).bytes()[5 * SECTOR_BYTES..]);
        assert_eq!(torn.read(9), Reading::Torn { first: TAG, sector: 5 });
        let mut half = Block::default();
        half.bytes_mut()[SECTOR_BYTES..].copy_from_slice(&block(TAG).bytes()[SECTOR_BYTES..]);
        assert_eq!(half.read(9), Reading::Torn { first: TAG, sector: 0 });
        let mut swapped = block(TAG);
        let (left, right) = swapped.bytes_mut().split_at_mut(SECTOR_BYTES);
        left.swap_with_slice(&mut right[..SECTOR_BYTES]);
        assert_eq!(swapped.read(9), Reading::Damaged { sector: 0 });
    }
}
