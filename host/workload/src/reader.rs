//! Readers of the comparison: a disk's blocks, without any controller or driver of ours between.

use crate::tag::BLOCK_BYTES;
use dray_device::memory::Arena;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A disk that can be read in blocks of [`BLOCK_BYTES`].
pub trait BlockReader {
    /// Whole blocks there are.
    fn blocks(&self) -> u64;

    /// Reads from `block` on; `into` is whole blocks.
    ///
    /// # Errors
    /// When they cannot be read or are not all there.
    fn read(&mut self, block: u64, into: &mut [u8]) -> io::Result<()>;
}

/// Reads a raw image.
#[derive(Debug)]
pub struct FileReader {
    file: File,
    blocks: u64,
}

impl FileReader {
    /// Over a file, as long as it is now.
    ///
    /// # Errors
    /// When its length cannot be found out.
    pub fn new(file: File) -> io::Result<Self> {
        let blocks = file.metadata()?.len() / BLOCK_BYTES as u64;
        Ok(Self { file, blocks })
    }
}

impl BlockReader for FileReader {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn read(&mut self, block: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset(block)?)
    }
}

/// Reads a piece of shared memory from its beginning.
#[derive(Debug)]
pub struct ArenaReader(pub Arc<Arena>);

impl BlockReader for ArenaReader {
    fn blocks(&self) -> u64 {
        (self.0.len() / BLOCK_BYTES) as u64
    }

    fn read(&mut self, block: u64, into: &mut [u8]) -> io::Result<()> {
        let at = inside(offset(block)?, into.len(), self.0.len())?;
        self.0.read(at, into);
        Ok(())
    }
}

impl BlockReader for Vec<u8> {
    fn blocks(&self) -> u64 {
        (self.len() / BLOCK_BYTES) as u64
    }

    fn read(&mut self, block: u64, into: &mut [u8]) -> io::Result<()> {
        let at = inside(offset(block)?, into.len(), self.len())?;
        into.copy_from_slice(&self[at..at + into.len()]);
        Ok(())
    }
}

fn offset(block: u64) -> io::Result<u64> {
    block.checked_mul(BLOCK_BYTES as u64).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn inside(offset: u64, len: usize, all: usize) -> io::Result<usize> {
    let at = usize::try_from(offset).ok().filter(|at| *at <= all && len <= all - at);
    at.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
