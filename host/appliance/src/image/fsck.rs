//! The judge: `e2fsck -fn`.

use super::{ImageError, tools};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where the magic number of ext2 and its successors is: in the superblock at 1,024, 56 bytes in.
const MAGIC_AT: u64 = 1024 + 56;
const MAGIC: [u8; 2] = 0xef53u16.to_le_bytes();

/// What `e2fsck` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FsckVerdict {
    /// Nothing to complain about.
    Clean,
    /// The end of its complaints.
    Errors(String),
    /// There is no ext4 filesystem to look at; says why.
    Skipped(String),
}

/// Checks the filesystem of an image without changing it (`e2fsck -fn`).
///
/// # Errors
/// When the image cannot be read or the tool is missing; damage is a verdict.
pub fn fsck(path: &Path) -> Result<FsckVerdict, ImageError> {
    let mut magic = [0; 2];
    let file = File::open(path).map_err(ImageError::io(path))?;
    if file.read_exact_at(&mut magic, MAGIC_AT).is_err() || magic != MAGIC {
        return Ok(FsckVerdict::Skipped("no ext4 superblock".to_owned()));
    }
    let output = tools::run("e2fsck", |command| {
        command.arg("-fn").arg(path);
    })?;
    Ok(match output.status.code() {
        Some(0) => FsckVerdict::Clean,
        _ => FsckVerdict::Errors(tools::last_words(&output)),
    })
}
