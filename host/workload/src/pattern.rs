//! Content for disks that no guest has written yet.

use crate::mix;
use crate::tag::BLOCK_BYTES;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What a destination is filled with beforehand, so that a block that was never copied is no block of zeroes.
pub const STALE: u8 = 0xa5;

const CHUNK: usize = 1 << 20;

/// Makes the file `bytes` long and fills it with one byte.
///
/// # Errors
/// The filesystem's, a full disk among them.
pub fn fill_file(file: &File, bytes: u64, byte: u8) -> io::Result<()> {
    let chunk = vec![byte; CHUNK];
    file.set_len(bytes)?;
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(CHUNK as u64);
        file.write_all_at(&chunk[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// Content that looks like a disk in use: blocks of noise, each different, with some blocks of zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Seed of the noise.
    pub seed: u64,
    /// Hundredths of the blocks that are zero.
    pub zero_percent: u8,
}

impl Disk {
    /// Makes the content of a block (in units of [`BLOCK_BYTES`]); bytes behind the first [`BLOCK_BYTES`] stay as they are.
    pub fn block(&self, block: u64, into: &mut [u8]) {
        let key = mix(self.seed ^ mix(block.wrapping_add(1)));
        let zero = key % 100 < u64::from(self.zero_percent);
        for (word, bytes) in (0u64..).zip(into.chunks_mut(8).take(BLOCK_BYTES / 8)) {
            let value = if zero { 0 } else { mix(key.wrapping_add(word)) | 1 };
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_come_in_the_share_asked_for() {
        let disk = Disk { seed: 1, zero_percent: 30 };
        let mut bytes = [0; BLOCK_BYTES];
        let zero = (0..1000).filter(|block| {
            disk.block(*block, &mut bytes);
            bytes == [0; BLOCK_BYTES]
        });
        assert!((200..400).contains(&zero.count()));
        let mut other = bytes;
        Disk { zero_percent: 0, ..disk }.block(1, &mut bytes);
        Disk { zero_percent: 0, ..disk }.block(2, &mut other);
        assert_ne!(bytes, other);
    }
}
