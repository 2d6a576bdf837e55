//! What `dray device exercise` writes, and where: made of a seed alone, so that it can be said again what must be read.

/// Blocks of a scattered extent, at most.
const SCATTERED: u64 = 8;

/// A stream of numbers out of a seed (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// One below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

/// Blocks in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) lba: u64,
    pub(super) blocks: u32,
}

/// The content of a block: its address first, so that a block that landed elsewhere tells where it belongs.
pub(super) fn fill(block: &mut [u8], seed: u64, lba: u64) {
    let mut numbers = Numbers::new(seed ^ lba.wrapping_mul(0xd6e8_feb8_6659_fd93));
    for (at, word) in block.chunks_mut(8).enumerate() {
        let value = if at == 0 { lba } else { numbers.next() };
        word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
    }
}

/// The blocks of an extent that are not what was written there.
pub(super) fn differing(seen: &[u8], extent: Extent, block: usize, seed: u64) -> Vec<u64> {
    let mut wanted = vec![0; block];
    let blocks = (extent.lba..).zip(seen.chunks(block));
    let differs = |(lba, seen): (u64, &[u8])| {
        fill(&mut wanted, seed, lba);
        (seen != wanted).then_some(lba)
    };
    blocks.filter_map(differs).collect()
}

/// About `wanted` blocks of a namespace of `blocks`: half of them in one row, cut into extents of `most` blocks, the others
/// scattered over the rest in extents of a few, in no order. No block is in two.
pub(super) fn extents(seed: u64, blocks: u64, wanted: u64, most: u32) -> Vec<Extent> {
    let mut numbers = Numbers::new(seed);
    let wanted = wanted.clamp(1, blocks.max(1));
    let row = wanted.div_ceil(2).min(blocks);
    let first = numbers.below(blocks - row + 1);
    let mut all = Vec::new();
    let mut lba = first;
    while lba < first + row {
        let len = u64::from(most.max(1)).min(first + row - lba);
        all.push(Extent { lba, blocks: len as u32 });
        lba += len;
    }
    // Slots of a few blocks outside the row, a random part of each.
    let slot = SCATTERED.min(u64::from(most.max(1)));
    let mut slots: Vec<u64> = (0..blocks / slot).filter(|n| (n + 1) * slot <= first || n * slot >= first + row).collect();
    let mut left = wanted - row;
    while left > 0 && !slots.is_empty() {
        let at = slots.swap_remove(numbers.below(slots.len() as u64) as usize) * slot;
        let skip = numbers.below(slot);
        let len = (1 + numbers.below(slot - skip)).min(left);
        all.push(Extent { lba: at + skip, blocks: len as u32 });
        left -= len;
    }
    // In no order: contiguous and scattered writes mix.
    for at in (1..all.len()).rev() {
        all.swap(at, numbers.below(at as u64 + 1) as usize);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_block_is_written_twice_and_none_outside() {
        for (seed, blocks, wanted, most) in [(1, 1000, 400, 16), (2, 7, 7, 3), (3, 1, 1, 128), (4, 5000, 99_999, 1), (5, 64, 0, 4)] {
            let mut seen = HashSet::new();
            for extent in extents(seed, blocks, wanted, most) {
                assert!(extent.blocks >= 1 && extent.blocks <= most && extent.lba + u64::from(extent.blocks) <= blocks, "{extent:?}");
                for lba in extent.lba..extent.lba + u64::from(extent.blocks) {
                    assert!(seen.insert(lba), "{lba} twice");
                }
            }
            assert!(!seen.is_empty() && seen.len() as u64 >= wanted.min(blocks) / 2, "{} of {wanted}", seen.len());
        }
        assert_eq!(extents(9, 1000, 400, 16), extents(9, 1000, 400, 16));
        assert_ne!(extents(9, 1000, 400, 16), extents(10, 1000, 400, 16));
    }

    #[test]
    fn a_single_bit_is_found() {
        let extent = Extent { lba: 40, blocks: 4 };
        let mut seen = vec![0; 4 * 512];
        for (lba, block) in (40..).zip(seen.chunks_mut(512)) {
            fill(block, 7, lba);
        }
        assert!(differing(&seen, extent, 512, 7).is_empty());
        seen[2 * 512 + 511] ^= 1;
        assert_eq!(differing(&seen, extent, 512, 7), [42]);
        assert_eq!(differing(&seen, extent, 512, 8).len(), 4, "another seed's");
    }

    #[test]
    fn a_block_depends_on_its_place_and_on_the_seed() {
        let block = |seed, lba| {
            let mut block = [0u8; 512];
            fill(&mut block, seed, lba);
            block
        };
        assert_eq!(block(1, 7), block(1, 7));
        assert_ne!(block(1, 7)[8..], block(1, 8)[8..]);
        assert_ne!(block(1, 7), block(2, 7));
        assert_eq!(block(1, 7)[..8], 7u64.to_le_bytes());
    }
}
