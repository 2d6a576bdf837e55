//! Where the copy goes: a trait, and the destination that is another controller of this machine.

use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{DmaBuffer, Segment};
use dray_device::poll::Time;
use dray_device::space::{AddressSpace, MappedBuffer, SpaceError};
use dray_nvme::command::SubmissionEntry;

/// What a destination can take; fixed while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationLimits {
    /// Most bytes of data in one operation.
    pub max_transfer: usize,
    /// Most bytes that one [`DestinationOp::WriteZeroes`] may cover; 0 = it has none.
    pub max_write_zeroes: u64,
    /// It can say whether its blocks equal given data.
    pub can_compare: bool,
    /// It can mark blocks as unreadable.
    pub can_write_uncorrectable: bool,
}

/// What is done to blocks of the destination.
#[derive(Clone, Copy, Debug)]
pub enum DestinationOp<'a> {
    /// Memory to blocks.
    Write {
        /// The data.
        data: Segment<'a>,
        /// Of the data: XXH3-64 by pieces of 4 KiB, see [`crate::copy::checksum`].
        checksum: u64,
    },
    /// The blocks read as zeroes afterwards (rule 4).
    WriteZeroes,
    /// The blocks cannot be read until they are written (rule 11).
    WriteUncorrectable,
    /// Whether the blocks equal the data; where they do not, it ends with Compare Failure.
    Compare {
        /// The data.
        data: Segment<'a>,
        /// Of the data, as for a write.
        checksum: u64,
    },
    /// What has ended before is on stable storage afterwards. The range is ignored.
    Flush,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct DestinationRequest<'a> {
    /// NSID at the destination.
    pub nsid: u32,
    /// First LBA.
    pub slba: u64,
    /// Logical blocks, not 0's based.
    pub blocks: u64,
    /// What to do.
    pub op: DestinationOp<'a>,
}

/// Where the copy goes: another controller here, later a peer.
pub trait Destination: Send {
    /// What it can take.
    fn limits(&self) -> DestinationLimits;

    /// Announces the memory that data will come from; it stays in place while the destination lives.
    ///
    /// # Errors
    /// When the destination cannot reach it.
    fn attach(&mut self, memory: &DmaBuffer) -> Result<(), SpaceError>;

    /// Operations that can be submitted now.
    fn free(&self) -> usize;

    /// Begins an operation; the memory stays untouched until it ends.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    fn submit(&mut self, now: Time, request: &DestinationRequest<'_>, tag: u64) -> Result<(), SubmitError>;

    /// Lets everything submitted since the last commit go.
    fn commit(&mut self);

    /// Hands ended operations to `done`; every one that was taken comes back once.
    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize;

    /// The destination has proved that every block of the namespace reads as zeroes, but for those written since.
    fn reads_zero_proved(&self, nsid: u32) -> bool;

    /// No operation can reach it any more, until it is [revived](Self::revive) or comes back by itself.
    fn is_dead(&self) -> bool;

    /// How often it has restarted: what it had taken and not flushed may be lost, and nothing of before is under way any more.
    fn restarts(&self) -> u32;

    /// A new queue to the same destination, after its controller was reset. A destination that has none ignores it.
    fn revive(&mut self, _queue: Box<dyn CommandQueue>) {}
}

/// What a local destination can do beyond writing (from Identify Controller's ONCS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalFeatures {
    /// Compare is supported.
    pub compare: bool,
    /// Write Uncorrectable is supported.
    pub write_uncorrectable: bool,
    /// Whoever made the namespaces has proved that they read as zeroes.
    pub reads_zero: bool,
}

/// A destination that is a controller of this machine, reached through a command queue.
pub struct LocalDestination {
    queue: Box<dyn CommandQueue>,
    space: AddressSpace,
    memory: Vec<MappedBuffer>,
    features: LocalFeatures,
    dead: bool,
    restarts: u32,
}

impl std::fmt::Debug for LocalDestination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalDestination").field("dead", &self.dead).field("restarts", &self.restarts).finish_non_exhaustive()
    }
}

impl LocalDestination {
    /// A destination over an I/O queue of the destination's management controller, whose memory is mapped in `space`.
    #[must_use]
    pub fn new(queue: Box<dyn CommandQueue>, space: AddressSpace, features: LocalFeatures) -> Self {
        Self { queue, space, memory: Vec::new(), features, dead: false, restarts: 0 }
    }
}

impl Destination for LocalDestination {
    fn limits(&self) -> DestinationLimits {
        let limits = self.queue.limits();
        DestinationLimits {
            max_transfer: limits.max_transfer,
            max_write_zeroes: limits.max_write_zeroes,
            can_compare: self.features.compare,
            can_write_uncorrectable: self.features.write_uncorrectable,
        }
    }

    fn attach(&mut self, memory: &DmaBuffer) -> Result<(), SpaceError> {
        self.memory.push(MappedBuffer::new(&self.space, memory.clone())?);
        Ok(())
    }

    fn free(&self) -> usize {
        self.queue.free()
    }

    fn submit(&mut self, now: Time, request: &DestinationRequest<'_>, tag: u64) -> Result<(), SubmitError> {
        let DestinationRequest { nsid, slba, blocks, op } = *request;
        let Ok(blocks) = u32::try_from(blocks) else { return Err(SubmitError::BadData) };
        if blocks > 1 << 16 || blocks == 0 && !matches!(op, DestinationOp::Flush) {
            return Err(SubmitError::BadData);
        }
        let submitted = match op {
            DestinationOp::Write { data, .. } => {
                self.queue.submit(now, &SubmissionEntry::write(nsid, slba, blocks), &[data], tag)
            }
            DestinationOp::Compare { data, .. } => {
                self.queue.submit(now, &SubmissionEntry::compare(nsid, slba, blocks), &[data], tag)
            }
            DestinationOp::WriteZeroes => {
                self.queue.submit(now, &SubmissionEntry::write_zeroes(nsid, slba, blocks, false), &[], tag)
            }
            DestinationOp::WriteUncorrectable => {
                self.queue.submit(now, &SubmissionEntry::write_uncorrectable(nsid, slba, blocks), &[], tag)
            }
            DestinationOp::Flush => self.queue.submit(now, &SubmissionEntry::flush(nsid), &[], tag),
        };
        self.dead |= submitted == Err(SubmitError::Dead);
        submitted
    }

    fn commit(&mut self) {
        self.queue.commit();
    }

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        let dead = &mut self.dead;
        self.queue.poll(now, &mut |completion| {
            // Whoever does not know how a command ended is about to be reset: nothing more is sent until then.
            *dead |= completion.unknown;
            done(completion);
        })
    }

    fn reads_zero_proved(&self, _nsid: u32) -> bool {
        self.features.reads_zero
    }

    fn is_dead(&self) -> bool {
        self.dead
    }

    fn restarts(&self) -> u32 {
        self.restarts
    }

    fn revive(&mut self, queue: Box<dyn CommandQueue>) {
        self.queue = queue;
        self.dead = false;
        self.restarts += 1;
    }
}
