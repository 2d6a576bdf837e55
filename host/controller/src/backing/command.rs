//! A namespace in a namespace of another controller: a drive of this machine, of its kernel, or of another machine.
//!
//! The blocks are reached over the command seam ([`CommandQueue`]), whoever is behind it. An operation becomes one command or
//! several (a device has limits of its own), and ends with the last of them, with the first status that is none of success: what a
//! device says (a reservation conflict, write protection, a media error) is what the guest is told.
//!
//! **Memory.** Data goes straight between the guest's memory and the device where that memory is mapped for it and lies as the
//! device wants it (PRPs). Where it is not, it goes through bounce buffers, a few per queue.
//!
//! **When memory goes.** A guest's memory may be taken away from the device only when no command reaches it any more:
//! [`UsesMemory`] is how whoever unmaps it knows.
//!
//! **When the queue dies** (its controller was reset), operations fail, unless somebody has said that there will be another queue
//! ([`CommandBacking::outlive_queue`]): then they wait for that, and are carried out from their beginning on it. Nobody has been told
//! how they ended, so that to write once more what was perhaps written changes nothing; the controller's reset is what makes sure
//! that nothing of the old queue comes later.
//!
//! Commands are sent by [`Backing::poll`], which is told the time that their time-outs begin at.

use super::{SizeError, check};
use arrayvec::ArrayVec;
use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::command::{CommandQueue, Completion, QueueLimits, SubmitError};
use dray_device::memory::{DmaBuffer, Segment};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::command::io::{DsmRange, MAX_BLOCKS};
use dray_nvme::status::Status;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::IntoBytes;

/// Most segments of one command; data in more pieces goes through a bounce buffer.
const MAX_SEGMENTS: usize = 520;
/// Most bytes of one bounce buffer.
const MAX_BOUNCE: usize = 128 << 10;

/// What is known of the namespace behind the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandBackingConfig {
    /// Its NSID at the device.
    pub nsid: u32,
    /// Bytes of a logical block, without metadata.
    pub block_bytes: u32,
    /// Logical blocks (NSZE).
    pub blocks: u64,
    /// The device has a volatile write cache (VWC).
    pub volatile_cache: bool,
    /// Deallocated blocks read as zeroes (DLFEAT).
    pub deallocated_reads_zero: bool,
    /// The device carries out Write Uncorrectable (ONCS).
    pub write_uncorrectable: bool,
    /// The device carries out Dataset Management (ONCS).
    pub deallocates: bool,
    /// The namespace is write protected (NSATTR).
    pub write_protected: bool,
}

/// Why a queue cannot be a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandBackingError {
    /// Its size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The bounce memory has not room for a single block, or the queue takes none.
    #[error("a block of {block_bytes} bytes goes into no transfer of at most {most} bytes")]
    NoRoom {
        /// Bytes of a block.
        block_bytes: u32,
        /// Bytes of the largest transfer, or of a bounce buffer.
        most: usize,
    },
    /// The queue is not dead, or its commands have not come back yet.
    #[error("the queue that it has is in use")]
    InUse,
}

/// Says when operations that began before some moment have ended. Clones are of the same backing.
#[derive(Clone, Debug, Default)]
pub struct UsesMemory {
    shared: Arc<Epochs>,
}

/// Operations are counted by the epoch that they began in, odd or even. An epoch begins when it is asked for and nothing of the one
/// before the last is under way.
#[derive(Debug, Default)]
struct Epochs {
    current: AtomicU64,
    asked: AtomicU64,
    /// Operations under way, of even and odd epochs.
    under_way: [AtomicU64; 2],
}

impl UsesMemory {
    /// From here on operations are waited for; the moment's name for [`is_over`](Self::is_over).
    #[must_use]
    pub fn mark(&self) -> u64 {
        let until = self.shared.current.load(Ordering::SeqCst) + 2;
        self.shared.asked.fetch_max(until, Ordering::SeqCst);
        until
    }

    /// Whether all that began before a moment has ended.
    #[must_use]
    pub fn is_over(&self, mark: u64) -> bool {
        let idle = self.shared.under_way.iter().all(|count| count.load(Ordering::SeqCst) == 0);
        idle || self.shared.current.load(Ordering::SeqCst) >= mark
    }

    fn begin(&self) -> u64 {
        let epoch = self.shared.current.load(Ordering::SeqCst);
        self.shared.under_way[(epoch & 1) as usize].fetch_add(1, Ordering::SeqCst);
        epoch
    }

    fn end(&self, epoch: u64) {
        self.shared.under_way[(epoch & 1) as usize].fetch_sub(1, Ordering::SeqCst);
    }

    /// Goes on to the next epoch if someone waits for it and the last but one is over.
    fn turn(&self) {
        let current = self.shared.current.load(Ordering::Relaxed);
        if self.shared.asked.load(Ordering::Acquire) > current {
            let next = current + 1;
            if self.shared.under_way[(next & 1) as usize].load(Ordering::SeqCst) == 0 {
                self.shared.current.store(next, Ordering::SeqCst);
            }
        }
    }
}

#[derive(Debug)]
struct Operation {
    op: BackingOp,
    slba: u64,
    blocks: u64,
    tag: u64,
    /// Blocks for which commands were sent.
    sent: u64,
    /// Commands under way.
    commands: u32,
    status: Status,
    /// A command of it came back from a dead queue: it begins anew on another one.
    again: bool,
    /// The data's memory, held until the end.
    data: Vec<DmaBuffer>,
    epoch: u64,
}

/// One command of an operation.
#[derive(Clone, Copy, Debug, Default)]
struct Command {
    operation: u32,
    /// The bounce buffer that its data is in.
    bounce: Option<u16>,
    /// Where in the operation's data, in bytes.
    at: usize,
    bytes: usize,
}

/// Whether a command was sent.
enum Sent {
    Yes,
    /// The queue or the bounce buffers are full.
    Later,
    Failed(Status),
}

/// Blocks behind a command queue.
pub struct CommandBacking {
    queue: Box<dyn CommandQueue>,
    limits: QueueLimits,
    config: CommandBackingConfig,
    info: BackingInfo,
    operations: Vec<Operation>,
    free: Vec<u32>,
    /// Operations with commands still to be sent, the first one first.
    waiting: Vec<u32>,
    commands: Vec<Command>,
    free_commands: Vec<u32>,
    bounce: Vec<DmaBuffer>,
    free_bounce: Vec<u16>,
    /// Zeroes, where the device has no Write Zeroes.
    zeroes: DmaBuffer,
    ended: Vec<Completion>,
    uses: UsesMemory,
    bounced: u64,
    /// Bounce buffers of commands with unknown outcome, which a controller may reach until it has been reset.
    lost_bounce: Vec<u16>,
    hope: Hope,
}

/// What becomes of operations when their queue dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hope {
    /// They fail.
    None,
    /// They would wait for another one; this one is well.
    Idle,
    /// They wait for another one.
    Stranded,
    /// Nothing is sent any more: what waited has failed.
    GaveUp,
}

impl std::fmt::Debug for CommandBacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommandBacking").field("config", &self.config).field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl CommandBacking {
    /// The namespace that `queue` reaches. `bounce` is memory that the device reaches too, page-aligned, a few hundred KiB: a part of
    /// it has zeroes, the rest is for data that the device cannot reach where it is.
    ///
    /// # Errors
    /// [`CommandBackingError`].
    pub fn new(queue: Box<dyn CommandQueue>, config: CommandBackingConfig, bounce: &DmaBuffer) -> Result<Self, CommandBackingError> {
        let limits = queue.limits();
        let block = config.block_bytes;
        check(config.blocks.saturating_mul(u64::from(block)), block)?;
        let most = limits.max_transfer.min(MAX_BOUNCE).min(bounce.len() / 2) / 4096 * 4096;
        if most < block as usize {
            return Err(CommandBackingError::NoRoom { block_bytes: block, most });
        }
        let mut pieces: Vec<_> = (0..bounce.len() / most).filter_map(|n| bounce.slice(n * most, most)).collect();
        let no_room = CommandBackingError::NoRoom { block_bytes: block, most: 0 };
        let zeroes = pieces.pop().filter(|_| !pieces.is_empty()).ok_or(no_room)?;
        zeroes.arena().fill(zeroes.offset(), zeroes.len(), 0);
        pieces.truncate(usize::from(u16::MAX));
        let depth = limits.depth.clamp(1, 1024);
        let idle = || Operation {
            op: BackingOp::Flush,
            slba: 0,
            blocks: 0,
            tag: 0,
            sent: 0,
            commands: 0,
            status: Status::SUCCESS,
            again: false,
            data: Vec::with_capacity(34),
            epoch: 0,
        };
        let info = BackingInfo {
            block_bytes: block,
            blocks: config.blocks,
            volatile_cache: config.volatile_cache,
            deallocated_reads_zero: config.deallocated_reads_zero,
        };
        Ok(Self {
            limits,
            info,
            operations: (0..depth).map(|_| idle()).collect(),
            free: (0..depth).rev().collect(),
            waiting: Vec::with_capacity(depth as usize),
            commands: vec![Command::default(); depth as usize],
            free_commands: (0..depth).rev().collect(),
            free_bounce: (0..pieces.len() as u16).rev().collect(),
            bounce: pieces,
            zeroes,
            ended: Vec::with_capacity(depth as usize),
            uses: UsesMemory::default(),
            bounced: 0,
            lost_bounce: Vec::new(),
            hope: Hope::None,
            queue,
            config,
        })
    }

    /// For whoever takes guests' memory away from the device.
    #[must_use]
    pub fn uses_memory(&self) -> UsesMemory {
        self.uses.clone()
    }

    /// From here on operations do not fail with their queue: they wait until there is [another](Self::replace_queue), or until
    /// somebody [gives up](Self::give_up).
    pub fn outlive_queue(&mut self) {
        self.hope = Hope::Idle;
    }

    /// Whether the queue is dead, all its commands have come back, and operations wait for another one.
    #[must_use]
    pub fn is_stranded(&self) -> bool {
        self.hope == Hope::Stranded && self.free_commands.len() == self.commands.len()
    }

    /// A queue in place of a dead one, to the same namespace. The controller was reset in between: nothing of the old queue takes
    /// effect any more, nothing reaches its memory.
    ///
    /// # Errors
    /// [`CommandBackingError`], when it takes less than the one before. Nothing has changed then.
    pub fn replace_queue(&mut self, queue: Box<dyn CommandQueue>) -> Result<(), CommandBackingError> {
        if !self.is_stranded() {
            return Err(CommandBackingError::InUse);
        }
        let limits = queue.limits();
        let most = self.zeroes.len();
        if limits.max_transfer < most {
            return Err(CommandBackingError::NoRoom { block_bytes: self.config.block_bytes, most: limits.max_transfer });
        }
        (self.queue, self.limits, self.hope) = (queue, limits, Hope::Idle);
        self.free_bounce.append(&mut self.lost_bounce);
        Ok(())
    }

    /// There will be no other queue: what waits for one fails, and what comes.
    pub fn give_up(&mut self) {
        self.hope = Hope::GaveUp;
    }

    /// The NSID at the device.
    #[must_use]
    pub fn nsid(&self) -> u32 {
        self.config.nsid
    }

    /// Commands whose data went through a bounce buffer.
    #[must_use]
    pub fn bounced(&self) -> u64 {
        self.bounced
    }

    /// Sends what can be sent.
    fn send_waiting(&mut self, now: Time) {
        let (mut at, mut any) = (0, false);
        while let Some(&index) = self.waiting.get(at) {
            let mut full = false;
            while let Some(operation) = self.operations.get(index as usize)
                && has_more(operation)
            {
                match self.send_one(now, index) {
                    Sent::Yes => any = true,
                    Sent::Later => {
                        full = true;
                        break;
                    }
                    Sent::Failed(status) => self.fail(index, status),
                }
            }
            if full {
                break;
            }
            at += 1;
        }
        self.waiting.drain(..at);
        if any {
            self.queue.commit();
        }
    }

    /// No more commands of an operation: it ends when those under way have.
    fn fail(&mut self, index: u32, status: Status) {
        let Some(operation) = self.operations.get_mut(index as usize) else { return };
        if !operation.status.is_error() {
            operation.status = status;
        }
        operation.sent = u64::MAX;
        if operation.commands == 0 {
            // Told with the next completions: nothing of it is at the device.
            self.ended.push(Completion { tag: u64::from(index) | ALONE, status, result: 0, unknown: false });
        }
    }

    /// Most blocks of one command.
    fn most_blocks(&self, op: BackingOp) -> u64 {
        let shift = self.config.block_bytes.trailing_zeros();
        let in_bytes = |bytes: u64| (bytes >> shift).clamp(1, u64::from(MAX_BLOCKS));
        match op {
            BackingOp::Read | BackingOp::Write { .. } => in_bytes(self.limits.max_transfer as u64),
            BackingOp::WriteZeroes { .. } if self.limits.max_write_zeroes > 0 => in_bytes(self.limits.max_write_zeroes),
            BackingOp::WriteZeroes { .. } => in_bytes(self.zeroes.len() as u64),
            BackingOp::WriteUncorrectable => u64::from(MAX_BLOCKS),
            BackingOp::Deallocate | BackingOp::Flush => u64::from(u32::MAX),
        }
    }

    fn send_one(&mut self, now: Time, index: u32) -> Sent {
        let Some(&slot) = self.free_commands.last() else { return Sent::Later };
        let Some(operation) = self.operations.get(index as usize) else { return Sent::Later };
        if self.hope == Hope::GaveUp {
            return Sent::Failed(Status::INTERNAL_ERROR);
        }
        let (op, shift) = (operation.op, self.config.block_bytes.trailing_zeros());
        let blocks = (operation.blocks - operation.sent.min(operation.blocks)).min(self.most_blocks(op));
        let slba = operation.slba + operation.sent;
        let mut command = Command { operation: index, bounce: None, at: (operation.sent as usize) << shift, bytes: 0 };
        let nsid = self.config.nsid;
        let tag = u64::from(slot);
        let outcome = match op {
            BackingOp::Read | BackingOp::Write { .. } => {
                command.bytes = (blocks as usize) << shift;
                let entry = transfer(op, nsid, slba, blocks as u32);
                self.send_data(now, &entry, &mut command, tag)
            }
            BackingOp::WriteZeroes { deallocate, fua } if self.limits.max_write_zeroes > 0 => {
                let entry = SubmissionEntry::write_zeroes(nsid, slba, blocks as u32, deallocate);
                self.queue.submit(now, &if fua { entry.with_fua() } else { entry }, &[], tag)
            }
            BackingOp::WriteZeroes { fua, .. } => {
                let entry = transfer(BackingOp::Write { fua }, nsid, slba, blocks as u32);
                let data = self.zeroes.part(0, (blocks as usize) << shift);
                data.map_or(Err(SubmitError::BadData), |data| self.queue.submit(now, &entry, &[data], tag))
            }
            BackingOp::Deallocate => self.send_range(now, slba, blocks, &mut command, tag),
            BackingOp::WriteUncorrectable => {
                self.queue.submit(now, &SubmissionEntry::write_uncorrectable(nsid, slba, blocks as u32), &[], tag)
            }
            BackingOp::Flush => self.queue.submit(now, &SubmissionEntry::flush(nsid), &[], tag),
        };
        match outcome {
            Ok(()) => {}
            Err(SubmitError::Full) => return Sent::Later,
            Err(SubmitError::Dead) if self.hope == Hope::Idle => {
                self.hope = Hope::Stranded;
                return Sent::Later;
            }
            Err(SubmitError::Dead) => return Sent::Failed(Status::INTERNAL_ERROR),
            Err(SubmitError::BadData | SubmitError::NotMapped) => return Sent::Failed(Status::DATA_TRANSFER_ERROR),
        }
        self.free_commands.pop();
        if let Some(place) = self.commands.get_mut(slot as usize) {
            *place = command;
        }
        if let Some(operation) = self.operations.get_mut(index as usize) {
            // A flush has no blocks.
            operation.sent += blocks.max(1);
            operation.commands += 1;
        }
        Sent::Yes
    }

    /// A transfer, straight to and from the guest's memory or through a bounce buffer.
    fn send_data(&mut self, now: Time, entry: &SubmissionEntry, command: &mut Command, tag: u64) -> Result<(), SubmitError> {
        let Some(operation) = self.operations.get(command.operation as usize) else { return Err(SubmitError::BadData) };
        if let Some(pieces) = pieces(&operation.data, command.at, command.bytes) {
            match self.queue.submit(now, entry, &pieces, tag) {
                Err(SubmitError::BadData | SubmitError::NotMapped) => {}
                other => return other,
            }
        }
        // The whole of it may be more than a buffer takes: the operation goes on behind what does.
        let most = self.bounce.first().map_or(0, DmaBuffer::len);
        if command.bytes > most {
            return self.send_part(now, entry, command, tag, most);
        }
        self.send_bounced(now, entry, command, tag)
    }

    fn send_bounced(&mut self, now: Time, entry: &SubmissionEntry, command: &mut Command, tag: u64) -> Result<(), SubmitError> {
        let Some(&number) = self.free_bounce.last() else { return Err(SubmitError::Full) };
        let Some(buffer) = self.bounce.get(usize::from(number)) else { return Err(SubmitError::Full) };
        let Some(operation) = self.operations.get(command.operation as usize) else { return Err(SubmitError::BadData) };
        if matches!(operation.op, BackingOp::Write { .. }) {
            copy(&operation.data, command.at, buffer, command.bytes, true);
        }
        let data = buffer.part(0, command.bytes).ok_or(SubmitError::BadData)?;
        self.queue.submit(now, entry, &[data], tag)?;
        self.free_bounce.pop();
        command.bounce = Some(number);
        self.bounced += 1;
        Ok(())
    }

    /// The first part of a transfer that no bounce buffer takes whole.
    fn send_part(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        command: &mut Command,
        tag: u64,
        most: usize,
    ) -> Result<(), SubmitError> {
        let shift = self.config.block_bytes.trailing_zeros();
        let blocks = most >> shift;
        let rest = (command.bytes >> shift) - blocks;
        command.bytes = blocks << shift;
        let mut part = *entry;
        part.cdw12 = entry.rw_cdw12().with_nlb((blocks - 1) as u16).into_bits();
        self.send_bounced(now, &part, command, tag)?;
        // The caller counts all of it as sent.
        if let Some(operation) = self.operations.get_mut(command.operation as usize) {
            operation.sent = operation.sent.wrapping_sub(rest as u64);
        }
        Ok(())
    }

    fn send_range(&mut self, now: Time, slba: u64, blocks: u64, command: &mut Command, tag: u64) -> Result<(), SubmitError> {
        let Some(&number) = self.free_bounce.last() else { return Err(SubmitError::Full) };
        let Some(buffer) = self.bounce.get(usize::from(number)) else { return Err(SubmitError::Full) };
        let range = DsmRange { attributes: 0, length: blocks as u32, slba };
        let data = buffer.part(0, size_of::<DsmRange>()).ok_or(SubmitError::BadData)?;
        data.write(range.as_bytes());
        let mut entry = SubmissionEntry::dsm(self.config.nsid, 1);
        entry.cdw11 = dray_nvme::command::io::DsmCdw11::new().with_ad(true).into_bits();
        self.queue.submit(now, &entry, &[data], tag)?;
        self.free_bounce.pop();
        command.bounce = Some(number);
        Ok(())
    }

    /// A command has ended; `Some` when its operation has.
    fn end(&mut self, completion: Completion) -> Option<(u64, Status)> {
        let Completion { tag, status, unknown, .. } = completion;
        let index = if tag & ALONE != 0 {
            (tag & !ALONE) as u32
        } else {
            let slot = tag as u32;
            let command = *self.commands.get(slot as usize)?;
            let operation = self.operations.get_mut(command.operation as usize)?;
            let again = unknown && matches!(self.hope, Hope::Idle | Hope::Stranded);
            if again {
                (operation.again, self.hope) = (true, Hope::Stranded);
            }
            // Nobody knows how it ended: no data of it is believed.
            let status = match unknown {
                true if again => Status::SUCCESS,
                true => Status::INTERNAL_ERROR,
                false => status,
            };
            if let Some(number) = command.bounce {
                if let Some(buffer) = self.bounce.get(usize::from(number))
                    && operation.op == BackingOp::Read
                    && !unknown
                    && !status.is_error()
                {
                    copy(&operation.data, command.at, buffer, command.bytes, false);
                }
                // A command of unknown outcome may still reach its buffer: it is not used again before a reset.
                if unknown { self.lost_bounce.push(number) } else { self.free_bounce.push(number) }
            }
            operation.commands = operation.commands.saturating_sub(1);
            if status.is_error() && !operation.status.is_error() {
                operation.status = status.code();
                operation.sent = u64::MAX;
            }
            self.free_commands.push(slot);
            command.operation
        };
        let operation = self.operations.get_mut(index as usize)?;
        if operation.again && operation.commands == 0 && !operation.status.is_error() {
            (operation.again, operation.sent) = (false, 0);
            // It may be there, if not all of it was sent.
            if !self.waiting.contains(&index) {
                self.waiting.push(index);
            }
            return None;
        }
        if operation.commands > 0 || has_more(operation) {
            return None;
        }
        operation.data.clear();
        self.uses.end(operation.epoch);
        self.free.push(index);
        Some((operation.tag, operation.status))
    }
}

/// Marks the end of an operation none of whose commands is at the device.
const ALONE: u64 = 1 << 63;

/// Whether commands of an operation are still to be sent.
fn has_more(operation: &Operation) -> bool {
    operation.sent < operation.blocks.max(1)
}

fn transfer(op: BackingOp, nsid: u32, slba: u64, blocks: u32) -> SubmissionEntry {
    match op {
        BackingOp::Write { fua: true } => SubmissionEntry::write(nsid, slba, blocks).with_fua(),
        BackingOp::Write { fua: false } => SubmissionEntry::write(nsid, slba, blocks),
        _ => SubmissionEntry::read(nsid, slba, blocks),
    }
}

/// The memory of `bytes` bytes from `at`; `None` when these are too many pieces, or more than there is.
fn pieces(data: &[DmaBuffer], at: usize, bytes: usize) -> Option<ArrayVec<Segment<'_>, MAX_SEGMENTS>> {
    let (mut skip, mut left) = (at, bytes);
    let mut pieces = ArrayVec::new();
    for buffer in data {
        if left == 0 {
            break;
        }
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        let len = (buffer.len() - skip).min(left);
        pieces.try_push(buffer.part(skip, len)?).ok()?;
        (skip, left) = (0, left - len);
    }
    (left == 0).then_some(pieces)
}

/// Copies between an operation's data and a bounce buffer.
fn copy(data: &[DmaBuffer], at: usize, bounce: &DmaBuffer, bytes: usize, into_bounce: bool) {
    let (mut skip, mut done) = (at, 0);
    for buffer in data {
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        let len = (buffer.len() - skip).min(bytes - done);
        let (theirs, ours) = ((buffer.arena(), buffer.offset() + skip), (bounce.arena(), bounce.offset() + done));
        let (from, into) = if into_bounce { (theirs, ours) } else { (ours, theirs) };
        dray_device::memory::Arena::copy(from.0, from.1, into.0, into.1, len);
        (skip, done) = (0, done + len);
        if done == bytes {
            break;
        }
    }
}

impl Backing for CommandBacking {
    fn info(&self) -> BackingInfo {
        self.info
    }

    fn is_write_protected(&self) -> bool {
        self.config.write_protected
    }

    fn can_write_uncorrectable(&self) -> bool {
        self.config.write_uncorrectable
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        match request.op {
            BackingOp::WriteUncorrectable if !self.config.write_uncorrectable => return Submitted::Done(Status::INVALID_OPCODE),
            // A hint that the device has no use for.
            BackingOp::Deallocate if !self.config.deallocates => return Submitted::Done(Status::SUCCESS),
            BackingOp::Flush if !self.config.volatile_cache => return Submitted::Done(Status::SUCCESS),
            _ => {}
        }
        let Some(&index) = self.free.last() else { return Submitted::Busy };
        let Some(operation) = self.operations.get_mut(index as usize) else { return Submitted::Busy };
        let BackingRequest { op, slba, blocks, tag, .. } = *request;
        let blocks = if op == BackingOp::Flush { 0 } else { blocks };
        (operation.op, operation.slba, operation.blocks, operation.tag) = (op, slba, blocks, tag);
        (operation.sent, operation.commands, operation.status, operation.again) = (0, 0, Status::SUCCESS, false);
        let owned = |piece: &Segment<'_>| DmaBuffer::new(Arc::clone(piece.arena()), piece.offset(), piece.len());
        operation.data.extend(request.data.iter().filter_map(owned));
        operation.epoch = self.uses.begin();
        self.free.pop();
        self.waiting.push(index);
        Submitted::Pending
    }

    fn commit(&mut self) {}

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        let mut ended = std::mem::take(&mut self.ended);
        self.queue.poll(now, &mut |completion| ended.push(completion));
        let mut count = 0;
        for completion in ended.drain(..) {
            if let Some((tag, status)) = self.end(completion) {
                done(tag, status);
                count += 1;
            }
        }
        self.ended = ended;
        if !self.waiting.is_empty() && self.hope != Hope::Stranded {
            self.send_waiting(now);
        }
        self.uses.turn();
        count
    }

    fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    fn is_polled_only(&self) -> bool {
        self.queue.waker().is_none()
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.queue.waker()
    }
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
