//! Where the blocks of a namespace are: memory, a file, another controller, nowhere.

mod command;
mod file;
mod marks;
mod memory;
mod null;

pub use command::{CommandBacking, CommandBackingConfig, CommandBackingError, UsesMemory};
pub use file::{FileBacking, FileBackingError};
pub use memory::{MemoryBacking, MemoryBackingError};
pub use null::NullBacking;

use thiserror::Error;

/// A size that no namespace can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// Not a power of two from 512 to 4,096.
    #[error("a block of {0} bytes: it must be 512, 1024, 2048 or 4096")]
    BlockBytes(u32),
    /// Nothing, or not whole blocks.
    #[error("{bytes} bytes are not a whole number of blocks of {block_bytes} bytes, at least one")]
    NotWholeBlocks {
        /// Bytes given.
        bytes: u64,
        /// Bytes of a block.
        block_bytes: u32,
    },
}

fn check(bytes: u64, block_bytes: u32) -> Result<(), SizeError> {
    if !block_bytes.is_power_of_two() || !(512..=4096).contains(&block_bytes) {
        return Err(SizeError::BlockBytes(block_bytes));
    }
    if bytes == 0 || !bytes.is_multiple_of(u64::from(block_bytes)) {
        return Err(SizeError::NotWholeBlocks { bytes, block_bytes });
    }
    Ok(())
}
