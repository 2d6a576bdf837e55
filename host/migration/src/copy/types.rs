//! How the engine copies, what it counts, and why it stops.

use dray_device::command::SubmitError;
use dray_device::memory::MemoryError;
use dray_device::space::SpaceError;
use dray_nvme::status::Status;

/// Most bytes that one poll scans and starts.
pub const POLL_BYTES: usize = 32 << 10;
/// Most transfers.
pub const MAX_TRANSFERS: usize = 256;
/// Most blocks that may be marked as unreadable at the destination.
pub const MAX_UNCORRECTABLE: usize = 1024;
/// What to do with a block that cannot be copied after all retries (rule 11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMediaError {
    /// The migration fails; the source goes on serving.
    #[default]
    Fail,
    /// The block is marked by Write Uncorrectable at the destination and listed in the report.
    Mark,
}

/// How the engine copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyConfig {
    /// Transfers at a time, 1 to [`MAX_TRANSFERS`].
    pub transfers: usize,
    /// Bytes of one transfer at most; a multiple of 4 KiB.
    pub transfer_bytes: usize,
    /// Attempts of a transfer, then of each of its blocks; at least 1.
    pub attempts: u8,
    /// What becomes of a block that cannot be copied.
    pub on_media_error: OnMediaError,
}

impl Default for CopyConfig {
    fn default() -> Self {
        Self { transfers: 16, transfer_bytes: POLL_BYTES, attempts: 3, on_media_error: OnMediaError::Fail }
    }
}

/// Why the engine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CopySetupError {
    /// A size of the configuration is out of bounds, or larger than a device takes.
    #[error("{0}")]
    Config(String),
    /// No memory for the transfers.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device cannot reach the memory.
    #[error(transparent)]
    Space(#[from] SpaceError),
}

/// Why the engine has stopped for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The source's queue has died.
    #[error("the source can no longer be read")]
    SourceDead,
    /// A block cannot be copied.
    #[error("block {lba} of namespace {nsid} cannot be {what}: {status}")]
    Media {
        /// NSID at the source.
        nsid: u32,
        /// The block.
        lba: u64,
        /// What failed.
        what: &'static str,
        /// The last status.
        status: Status,
    },
    /// More blocks would have to be marked than the report can list.
    #[error("more than {MAX_UNCORRECTABLE} blocks cannot be copied")]
    TooMany,
    /// The destination did not flush.
    #[error("the destination cannot flush: {0}")]
    Flush(Status),
    /// A device does not take the commands that the configuration asks for.
    #[error("a device does not take a transfer: {0}")]
    Refused(SubmitError),
}

/// A block that is marked as unreadable at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uncorrectable {
    /// NSID at the source.
    pub nsid: u32,
    /// The block.
    pub lba: u64,
}

/// What the engine counted. Bytes, unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyStats {
    /// Written to the destination, zeroes included.
    pub copied: u64,
    /// Of those, zeroes.
    pub zero: u64,
    /// Of those, zeroes that were not sent, since the destination has proved to read zero.
    pub skipped: u64,
    /// Compared while suspended.
    pub compared: u64,
    /// Blocks of pieces that differed in the comparison.
    pub different_blocks: u64,
    /// Transfers tried again.
    pub retries: u64,
    /// Pieces whose checksum was taken.
    pub checksums: u64,
    /// Restarts of the destination.
    pub restarts: u64,
    /// From the submission of the last write to its completion, ns.
    pub write_ns: u64,
}
