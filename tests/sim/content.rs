//! What a block contains: the command that wrote it, in every word, together with the place that it was written to.
//!
//! A block of zeroes is [`ZERO`]. Anything else is the [`CommandId`] that wrote it, or [`GARBAGE`]: torn inside the block, of
//! another place, never written by anybody. Blocks are atomic (power-fail atomicity is one block), so garbage is never right.

use super::event::CommandId;

/// A block of zeroes.
pub const ZERO: CommandId = 0;
/// A block that nobody wrote as it is.
pub const GARBAGE: CommandId = u64::MAX;
/// A block that is marked as unreadable (Write Uncorrectable): it has no content.
pub const UNREADABLE: CommandId = u64::MAX - 1;
/// Identifiers of what blocks contain before any command are 1 to this.
pub const LAST_INITIAL: CommandId = 1 << 20;

/// Difference of neighbouring words.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ 0x2d35_8dcc_aa6c_78a5) * u128::from(b ^ 0x8bb8_4b93_962e_acc9);
    (product as u64) ^ ((product >> 64) as u64)
}

/// The second word of a block; the words behind it follow from it.
fn key(id: CommandId, nsid: u32, lba: u64) -> u64 {
    mix(mix(id, u64::from(nsid)), lba)
}

/// Writes what `id` leaves in that block; `block` is a whole block.
pub fn fill(id: CommandId, nsid: u32, lba: u64, block: &mut [u8]) {
    if id == ZERO {
        block.fill(0);
        return;
    }
    let mut word = key(id, nsid, lba);
    for chunk in block.as_chunks_mut::<8>().0 {
        *chunk = word.to_le_bytes();
        word = word.wrapping_add(STRIDE);
    }
    if let Some(first) = block.first_chunk_mut::<8>() {
        *first = id.to_le_bytes();
    }
}

/// Who wrote this block as it is. Every word is looked at.
#[must_use]
pub fn decode(block: &[u8], nsid: u32, lba: u64) -> CommandId {
    let words = block.as_chunks::<8>().0;
    let Some((first, rest)) = words.split_first() else { return GARBAGE };
    let id = u64::from_le_bytes(*first);
    let (mut word, step) = match id {
        ZERO => (0, 0),
        GARBAGE => return GARBAGE,
        id => (key(id, nsid, lba).wrapping_add(STRIDE), STRIDE),
    };
    let mut wrong = 0;
    for chunk in rest {
        wrong |= u64::from_le_bytes(*chunk) ^ word;
        word = word.wrapping_add(step);
    }
    if wrong == 0 { id } else { GARBAGE }
}

/// What a block contains before any command: zeroes in whole stretches, else something of the reserved range.
#[must_use]
pub fn initial(seed: u64, nsid: u32, lba: u64) -> CommandId {
    let namespace = mix(seed, u64::from(nsid));
    if mix(namespace, lba / 16).is_multiple_of(4) { ZERO } else { 1 + mix(namespace, lba) % LAST_INITIAL }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_says_who_wrote_it_and_where() {
        for bytes in [512, 4096] {
            let mut block = vec![0xa5; bytes];
            for id in [1, 77, LAST_INITIAL, 3 << 32 | 5] {
                fill(id, 1, 9, &mut block);
                assert_eq!(decode(&block, 1, 9), id);
                assert_eq!(decode(&block, 1, 10), GARBAGE, "another block");
                assert_eq!(decode(&block, 2, 9), GARBAGE, "another namespace");
            }
            fill(ZERO, 1, 9, &mut block);
            assert_eq!(decode(&block, 1, 9), ZERO);
        }
    }

    #[test]
    fn a_torn_block_is_garbage() {
        let (mut old, mut new) = ([0; 512], [0; 512]);
        fill(5, 1, 0, &mut old);
        fill(6, 1, 0, &mut new);
        for at in (8..512).step_by(8) {
            let mut torn = old;
            torn[..at].copy_from_slice(&new[..at]);
            assert_eq!(decode(&torn, 1, 0), GARBAGE);
            torn[at..].fill(0);
            assert_eq!(decode(&torn, 1, 0), GARBAGE);
        }
        assert_eq!(decode(&[0xff; 512], 1, 0), GARBAGE);
    }

    #[test]
    fn some_blocks_begin_as_zeroes() {
        let zeroes = (0..4096).filter(|lba| initial(7, 1, *lba) == ZERO).count();
        assert!((500..2000).contains(&zeroes), "{zeroes}");
        assert!((0..4096).all(|lba| initial(7, 1, lba) <= LAST_INITIAL));
    }
}
