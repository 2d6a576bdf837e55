//! The guest: a driver of its own on its slot's function, random tagged writes, and reads that are checked at once.
//!
//! **Load.** [`GuestConfig::rate`] writes a second, each of one block (4 KiB), to a random block of the ledger; of all commands
//! [`GuestConfig::read_percent`] are reads. The load is *open*: commands are due at fixed intervals, whether or not earlier
//! ones have ended, and a latency counts from the moment the command was due, so that a stall shows in every command that it
//! held up (no coordinated omission). With a rate of 0 the load is *closed*: as many commands as the queues take, latency from
//! the submission. The time of a completion is that of the poll that finds it.
//!
//! **Blocks.** A block has at most one command outstanding. So a read must find a write in `[acked, issued]` of the ledger, whole
//! and of this block. A write with an unknown end (its queue died) keeps its block until the controller has been reset; the block
//! then stays "issued, not acknowledged" and may be written again.
//!
//! **Life.** Starting → Identifying → Connecting → Running; a reset ([`GuestHandle::request_reset`]) drains, resets the
//! controller, identifies it again, compares the [`Identity`] with the first one, and goes on writing. When the controller
//! goes by itself, the driver brings it up again and the guest does the same; that is counted. [`GuestHandle::stop`] drains and
//! shuts the controller down. After a failed write the content of its block is undefined; it counts as an error.

mod handle;
mod identity;
mod life;
mod load;

pub use handle::{Counters, GuestHandle, GuestSample, GuestSampler, GuestStage, GuestStats, Phase, PhaseStats};
pub use identity::Identity;
pub use life::Guest;

use dray_device::command::SubmitError;
use dray_device::memory::{MemoryError, Pages};
use dray_device::space::SpaceError;

/// Most I/O queue pairs of a guest.
pub const MAX_QUEUES: u16 = 64;
/// Most commands outstanding in one queue.
pub const MAX_DEPTH: u16 = 1023;

/// What the guest does. Seed, number and target blocks are the ledger's.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Namespace.
    pub nsid: u32,
    /// Writes per second; 0 = as many as the queues take.
    pub rate: u32,
    /// Hundredths of the commands that are reads, 0 to 99.
    pub read_percent: u8,
    /// Commands outstanding in each queue, 1 to [`MAX_DEPTH`].
    pub depth: u16,
    /// I/O queue pairs, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Which pages the data buffers are made of.
    pub pages: Pages,
}

impl Default for GuestConfig {
    /// 2,000 writes a second beside 20 % reads, one queue of depth 8, namespace 1.
    fn default() -> Self {
        Self { nsid: 1, rate: 2000, read_percent: 20, depth: 8, queues: 1, pages: Pages::Small }
    }
}

impl GuestConfig {
    fn check(&self, blocks: usize) -> Result<(), GuestError> {
        let bad = |text| Err(GuestError::BadConfig(text));
        if self.depth == 0 || self.depth > MAX_DEPTH || self.queues == 0 || self.queues > MAX_QUEUES {
            return bad("queue depth or number of queues");
        }
        if self.read_percent > 99 {
            return bad("the share of reads leaves no writes");
        }
        if self.slots() >= blocks {
            return bad("more commands at once than blocks to write");
        }
        Ok(())
    }

    /// Commands outstanding in all.
    fn slots(&self) -> usize {
        usize::from(self.depth) * usize::from(self.queues)
    }

    /// Nanoseconds between two commands, reads included; 0 = no limit.
    fn interval_ns(&self) -> u64 {
        let writes_percent = 100 - u64::from(self.read_percent.min(99));
        if self.rate == 0 { 0 } else { (1_000_000_000 * writes_percent / 100 / u64::from(self.rate)).max(1) }
    }
}

/// Why a guest cannot be, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The configuration makes no sense.
    #[error("the guest cannot run so: {0}")]
    BadConfig(&'static str),
    /// The namespace does not fit the ledger.
    #[error("namespace {nsid} cannot be used: {reason}")]
    BadNamespace {
        /// The namespace.
        nsid: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// The controller grants fewer I/O queues than the configuration wants (feature 07h).
    #[error("the controller grants {granted} I/O queue pairs, {wanted} are wanted")]
    TooFewQueues {
        /// Queue pairs wanted.
        wanted: u16,
        /// Queue pairs granted.
        granted: u16,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The memory cannot be mapped for the device.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The driver gave up.
    #[error(transparent)]
    Driver(#[from] dray_driver::DriverError),
    /// A command was not taken.
    #[error("{what}: {error}")]
    Submit {
        /// Which command.
        what: &'static str,
        /// Why.
        error: SubmitError,
    },
}
