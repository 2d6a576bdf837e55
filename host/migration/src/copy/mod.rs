//! The copy engine: a fixed set of transfers, each reading from the source and writing to the destination.
//!
//! A transfer holds its range from before the read is submitted until the outcome of the write is known (rule 2). Its dirty bits
//! are cleared before the read (rule 1) and set again when it fails. Zeroes become Write Zeroes (rule 4). Errors are retried a
//! bounded number of times, then block by block, then the migration fails or the block is marked (rule 11). A transfer of
//! unknown outcome holds its range and its memory until the queue that carried it is dead.
//!
//! Start reading at [`Engine::poll`]; [`slot`] has what one transfer is.

mod slot;
mod types;

pub use types::{
    CopyConfig, CopyError, CopySetupError, CopyStats, MAX_TRANSFERS, MAX_UNCORRECTABLE, OnMediaError, POLL_BYTES, Uncorrectable,
};

use crate::destination::{Destination, DestinationOp, DestinationRequest};
use crate::extents::{Extents, Piece};
use crate::media::Media;
use crate::rate::{RateMeter, TokenBucket};
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use slot::{FLUSH_TAG, Slot, Stage, is_flush};
use xxhash_rust::xxh3::xxh3_64;

/// Words of the unflushed map that one poll clears after a flush.
const CLEAR_WORDS: usize = 4096;

/// What is done with what was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It is written to the destination.
    Copy,
    /// The destination is asked whether it has the same; what differs becomes dirty.
    Compare,
}

/// How the destination's flush goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flushing {
    No,
    /// To be submitted for namespaces from this one on; so many have not ended.
    Submitting { next: usize, open: usize },
    /// All flushed: the second map is being cleared.
    Clearing,
}

/// The copy engine.
pub struct Engine {
    source: Box<dyn CommandQueue>,
    destination: Box<dyn Destination>,
    config: CopyConfig,
    memory: MappedBuffer,
    slots: Vec<Slot>,
    /// Free slots; the last one freed is used first, since its memory is in the cache.
    free: Vec<u16>,
    /// Slots that are to be worked on: scanned, submitted again.
    ready: std::collections::VecDeque<u16>,
    ended: Vec<Completion>,
    purpose: Purpose,
    bucket: TokenBucket,
    meter: RateMeter,
    flushing: Flushing,
    flush_failed: Option<Status>,
    restarts_seen: u32,
    uncorrectable: Vec<Uncorrectable>,
    error: Option<CopyError>,
    stats: CopyStats,
    /// For the meter: the last poll, and whether transfers were under way then.
    metered: (Time, bool, u64),
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("in_flight", &self.in_flight()).field("stats", &self.stats).finish_non_exhaustive()
    }
}

/// Checksum of `len` bytes of an arena: XXH3-64 of each piece of 4 KiB, chained, so that a part of a transfer can be checked
/// while it arrives.
#[must_use]
pub fn checksum(arena: &Arena, offset: usize, len: usize) -> u64 {
    let mut sum = len as u64;
    arena.visit(offset, len, &mut |piece| {
        sum = (sum ^ xxh3_64(piece)).wrapping_mul(0x9e37_79b1_85eb_ca87).rotate_left(31);
    });
    sum
}

impl Engine {
    /// An engine that reads through `source`, whose device reaches the memory of `space`.
    ///
    /// # Errors
    /// [`CopySetupError`].
    pub fn new(
        source: Box<dyn CommandQueue>,
        space: &AddressSpace,
        mut destination: Box<dyn Destination>,
        config: CopyConfig,
    ) -> Result<Self, CopySetupError> {
        let CopyConfig { transfers, transfer_bytes, attempts, .. } = config;
        let most = source.limits().max_transfer.min(destination.limits().max_transfer);
        let transfer_bytes = transfer_bytes.min(most / PAGE * PAGE);
        if transfers == 0 || transfers > MAX_TRANSFERS || transfer_bytes == 0 || attempts == 0 {
            let what = format!("{transfers} transfers of {transfer_bytes} bytes with {attempts} attempts cannot be made");
            return Err(CopySetupError::Config(what));
        }
        let config = CopyConfig { transfer_bytes, ..config };
        let memory = DmaBuffer::allocate("dray-copy", transfers * transfer_bytes, Pages::PreferHuge)?;
        destination.attach(&memory)?;
        let memory = MappedBuffer::new(space, memory)?;
        let restarts_seen = destination.restarts();
        Ok(Self {
            source,
            destination,
            config,
            memory,
            slots: vec![Slot::default(); transfers],
            free: (0..transfers as u16).rev().collect(),
            ready: std::collections::VecDeque::with_capacity(transfers),
            ended: Vec::with_capacity(2 * transfers + 64),
            purpose: Purpose::Copy,
            bucket: TokenBucket::default(),
            meter: RateMeter::default(),
            flushing: Flushing::No,
            flush_failed: None,
            restarts_seen,
            uncorrectable: Vec::new(),
            error: None,
            stats: CopyStats::default(),
            metered: (Time(0), false, 0),
        })
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> &CopyStats {
        &self.stats
    }

    /// Why the engine has stopped, if it has.
    #[must_use]
    pub fn error(&self) -> Option<CopyError> {
        self.error
    }

    /// Blocks that are marked as unreadable at the destination.
    #[must_use]
    pub fn uncorrectable(&self) -> &[Uncorrectable] {
        &self.uncorrectable
    }

    /// Ranges that are held: reads and writes under way, or of unknown outcome.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Of those, the ones that may still write at the destination: all but reads that a lost source has left behind.
    #[must_use]
    pub fn may_write(&self) -> usize {
        let lost_read = |slot: &Slot| slot.stage == Stage::Held && slot.submitted == Time(0);
        self.slots.iter().filter(|slot| slot.stage != Stage::Free && !lost_read(slot)).count()
    }

    /// Blocks of those in flight.
    #[must_use]
    pub fn in_flight_blocks(&self) -> u64 {
        self.slots.iter().filter(|slot| slot.stage != Stage::Free).map(|slot| slot.piece.blocks).sum()
    }

    /// Bytes per second of the copy while there is something to copy and no limit.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.meter.per_second()
    }

    /// Limits the copy, bytes per second; 0 = no limit.
    pub fn limit(&mut self, now: Time, bytes_per_s: u64) {
        self.bucket.limit(now, bytes_per_s);
    }

    /// Copy or compare from now on. Only while nothing is in flight.
    pub fn set_purpose(&mut self, purpose: Purpose) {
        self.purpose = purpose;
    }

    /// The destination.
    pub fn destination(&mut self) -> &mut dyn Destination {
        self.destination.as_mut()
    }

    /// Begins a flush of the destination; only while nothing is in flight, so that it covers every write (rule 3).
    pub fn flush(&mut self) {
        if self.flushing == Flushing::No {
            self.flush_failed = None;
            self.flushing = Flushing::Submitting { next: 0, open: 0 };
        }
    }

    /// No flush is under way.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.flushing == Flushing::No
    }

    /// Gives source queue and destination back.
    #[must_use]
    pub fn into_parts(self) -> (Box<dyn CommandQueue>, Box<dyn Destination>) {
        (self.source, self.destination)
    }

    /// Takes what has ended, works on at most [`POLL_BYTES`] of it, and starts what `extents` hands out (nothing new without
    /// it). Returns how much was done.
    pub fn poll(&mut self, now: Time, media: &mut Media, extents: Option<&mut Extents>) -> u32 {
        self.measure(now);
        let mut work = self.take_ended(now, media);
        self.after_restart(media);
        work += self.work_on_ready(now, media);
        if let Some(extents) = extents
            && self.error.is_none()
            && self.flushing == Flushing::No
            && !self.destination.is_dead()
        {
            work += self.start(now, media, extents);
        }
        work += self.flush_some(now, media);
        if work > 0 {
            self.source.commit();
            self.destination.commit();
        }
        work
    }

    /// When a rate limit lets the next transfer start; `None` = at once.
    #[must_use]
    pub fn limited_until(&self, now: Time) -> Option<Time> {
        let at = self.bucket.ready_at();
        (at > now).then_some(at)
    }

    fn measure(&mut self, now: Time) {
        let (last, busy, copied) = self.metered;
        if busy && now > last && self.bucket.rate() == 0 {
            self.meter.add(self.stats.copied - copied, now.ns_since(last));
        }
        if now > last || !busy {
            self.metered = (now, self.in_flight() > 0, self.stats.copied);
        }
    }

    fn take_ended(&mut self, now: Time, media: &mut Media) -> u32 {
        let mut ended = std::mem::take(&mut self.ended);
        self.source.poll(now, &mut |completion| ended.push(completion));
        let reads = ended.len();
        self.destination.poll(now, &mut |completion| ended.push(completion));
        let work = ended.len() as u32;
        for (index, completion) in ended.drain(..).enumerate() {
            if index < reads {
                self.read_ended(&completion, media);
            } else if is_flush(completion.tag) {
                self.flush_ended(&completion);
            } else {
                self.write_ended(now, &completion, media);
            }
        }
        self.ended = ended;
        work
    }

    /// The slot that a completion is for, if it waits for it.
    fn slot_of(&self, tag: u64, stage: Stage) -> Option<usize> {
        let index = slot::index(tag);
        self.slots.get(index).filter(|slot| slot.stage == stage && slot.generation == slot::generation(tag)).map(|_| index)
    }

    fn read_ended(&mut self, completion: &Completion, media: &mut Media) {
        let Some(index) = self.slot_of(completion.tag, Stage::Reading) else { return };
        if completion.unknown {
            // The device may still write the memory: it stays with the slot. The source is lost, whoever has it decides.
            self.hold(index, media);
            self.error.get_or_insert(CopyError::SourceDead);
        } else if completion.status.is_error() {
            self.failed(index, completion.status, "read", media);
        } else {
            let piece = self.slots[index].piece;
            if let Some(namespace) = media.namespace(piece.namespace)
                && planted::on(Fault::ClearAfterRead)
                && self.purpose == Purpose::Copy
            {
                namespace.take(piece.slba, piece.blocks);
            }
            self.slots[index].stage = Stage::Read;
            self.ready.push_back(index as u16);
        }
    }

    fn write_ended(&mut self, now: Time, completion: &Completion, media: &mut Media) {
        let Some(index) = self.slot_of(completion.tag, Stage::Writing) else { return };
        if completion.unknown {
            self.hold(index, media);
            return;
        }
        if self.purpose == Purpose::Compare && completion.status.is(Status::COMPARE_FAILURE) {
            let piece = self.slots[index].part();
            if let Some(namespace) = media.namespace(piece.namespace) {
                namespace.mark_again(piece.slba, piece.blocks);
            }
            self.stats.different_blocks += piece.blocks;
        } else if completion.status.is_error() {
            self.failed(index, completion.status, "written", media);
            return;
        }
        self.stats.write_ns = now.ns_since(self.slots[index].submitted);
        self.part_done(index, media);
    }

    /// The part under way has been written.
    fn part_done(&mut self, index: usize, media: &mut Media) {
        let slot = &mut self.slots[index];
        let (piece, marking) = (slot.part(), slot.marking);
        let Some(namespace) = media.namespace(piece.namespace) else { return };
        let bytes = piece.blocks * u64::from(namespace.geometry.block_bytes);
        let nsid = namespace.geometry.source;
        if self.purpose == Purpose::Compare {
            self.stats.compared += bytes;
        } else {
            namespace.copied(piece.slba, piece.blocks);
            self.stats.copied += bytes;
            self.stats.zero += if slot.zero { bytes } else { 0 };
            self.uncorrectable.retain(|u| u.nsid != nsid || u.lba < piece.slba || u.lba >= piece.end());
            if marking {
                self.uncorrectable.push(Uncorrectable { nsid, lba: piece.slba });
            }
        }
        let slot = &mut self.slots[index];
        if slot.next_part() { self.again(index) } else { self.release(index) }
    }

    fn again(&mut self, index: usize) {
        self.slots[index].stage = Stage::Again;
        self.ready.push_back(index as u16);
    }

    fn release(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.free();
        self.free.push(index as u16);
    }

    /// The outcome is unknown: the range is dirty again, and held so that nothing else is copied there.
    fn hold(&mut self, index: usize, media: &mut Media) {
        let slot = &mut self.slots[index];
        slot.stage = Stage::Held;
        self.dirty_again(index, media);
    }

    fn dirty_again(&mut self, index: usize, media: &mut Media) {
        let piece = self.slots[index].piece;
        if let Some(namespace) = media.namespace(piece.namespace)
            && !planted::on(Fault::DirtyNotRestored)
        {
            namespace.mark_again(piece.slba, piece.blocks);
        }
    }

    /// A read or write has failed: dirty again, then tried again, whole or by blocks, or given up (rules 1 and 11).
    fn failed(&mut self, index: usize, status: Status, what: &'static str, media: &mut Media) {
        if !self.slots[index].is_past_first() {
            self.dirty_again(index, media);
        }
        let attempts = self.config.attempts;
        let slot = &mut self.slots[index];
        slot.attempts = slot.attempts.saturating_add(1);
        if (slot.attempts < attempts || planted::on(Fault::RetriedForEver)) && !slot.marking {
            self.stats.retries += 1;
            return self.again(index);
        }
        if slot.narrow() {
            self.stats.retries += 1;
            return self.again(index);
        }
        let part = slot.part();
        let nsid = media.namespaces().get(part.namespace).map_or(0, |n| n.geometry.source);
        let may_mark = self.config.on_media_error == OnMediaError::Mark
            && what == "read"
            && !self.slots[index].marking
            && self.purpose == Purpose::Copy
            && self.destination.limits().can_write_uncorrectable;
        if may_mark && self.uncorrectable.len() < MAX_UNCORRECTABLE {
            self.slots[index].marking = true;
            return self.again(index);
        }
        let error = if may_mark { CopyError::TooMany } else { CopyError::Media { nsid, lba: part.slba, what, status } };
        self.error.get_or_insert(error);
        self.dirty_again(index, media);
        self.release(index);
    }

    /// The destination has restarted: nothing of before is under way, and what it had not flushed may be lost (rule 3).
    fn after_restart(&mut self, media: &mut Media) {
        let restarts = self.destination.restarts();
        if restarts == self.restarts_seen {
            return;
        }
        self.restarts_seen = restarts;
        self.stats.restarts += 1;
        for index in 0..self.slots.len() {
            if matches!(self.slots[index].stage, Stage::Writing | Stage::Held) {
                self.dirty_again(index, media);
                self.release(index);
            }
        }
        for index in 0..media.namespaces().len() {
            if let Some(namespace) = media.namespace(index)
                && !planted::on(Fault::UnflushedNotMerged)
            {
                namespace.merge_unflushed();
            }
        }
        if self.flushing != Flushing::No {
            self.flushing = Flushing::No;
            self.flush_failed = Some(Status::ABORTED_SQ_DELETION);
        }
    }

    /// Whether the last flush failed, so that nothing counts as flushed by it.
    pub fn take_flush_failure(&mut self) -> Option<Status> {
        self.flush_failed.take()
    }

    fn work_on_ready(&mut self, now: Time, media: &mut Media) -> u32 {
        let (mut work, mut budget) = (0, POLL_BYTES as u64);
        for _ in 0..self.ready.len() {
            if budget == 0 {
                break;
            }
            let Some(index) = self.ready.pop_front().map(usize::from) else { break };
            let bytes = self.slots[index].part_bytes(media);
            let submitted = match self.slots[index].stage {
                Stage::Again if self.slots[index].marking => self.submit_mark(index, now, media),
                Stage::Again => self.submit_read(index, now, media),
                Stage::Read => self.submit_write(index, now, media),
                _ => Ok(()),
            };
            match submitted {
                Ok(()) => {
                    work += 1;
                    budget = budget.saturating_sub(bytes);
                }
                Err(error) => {
                    self.not_submitted(index, error, media);
                    break;
                }
            }
        }
        work
    }

    /// A slot could not go on: it waits, or its range is dirty again.
    fn not_submitted(&mut self, index: usize, error: SubmitError, media: &mut Media) {
        let reading = self.slots[index].stage == Stage::Again && !self.slots[index].marking;
        match error {
            SubmitError::Full => self.ready.push_front(index as u16),
            SubmitError::Dead => {
                if reading {
                    self.error.get_or_insert(CopyError::SourceDead);
                }
                self.dirty_again(index, media);
                self.release(index);
            }
            SubmitError::BadData | SubmitError::NotMapped => {
                self.error.get_or_insert(CopyError::Refused(error));
                self.dirty_again(index, media);
                self.release(index);
            }
        }
    }

    fn start(&mut self, now: Time, media: &mut Media, extents: &mut Extents) -> u32 {
        let (mut work, mut budget) = (0, POLL_BYTES as u64);
        // A queue that takes nothing while nothing is under way has died idle (its controller was reset): no command will say so.
        if self.source.free() == 0 && self.in_flight() == 0 {
            self.error.get_or_insert(CopyError::SourceDead);
            return 0;
        }
        while budget > 0 && self.source.free() > 0 && self.bucket.may_start(now) {
            let Some(&index) = self.free.last() else { break };
            let slots = &self.slots;
            let busy = |piece: &Piece| {
                let held = |slot: &&Slot| slot.stage != Stage::Free && slot.piece.overlaps(piece);
                let held = slots.iter().filter(|slot| held(slot) && !planted::on(Fault::TwoCopiesInFlight));
                held.map(|slot| slot.piece).min_by_key(|piece| piece.slba)
            };
            let Some(piece) = extents.next(media, self.config.transfer_bytes, &busy) else { break };
            self.free.pop();
            let slot = &mut self.slots[usize::from(index)];
            slot.begin(piece);
            let bytes = slot.part_bytes(media);
            if let Err(error) = self.submit_read(usize::from(index), now, media) {
                self.not_submitted(usize::from(index), error, media);
                break;
            }
            self.bucket.spend(now, bytes);
            budget = budget.saturating_sub(bytes);
            work += 1;
        }
        work
    }

    /// Clear, then read (rule 1).
    fn submit_read(&mut self, index: usize, now: Time, media: &mut Media) -> Result<(), SubmitError> {
        let slot = self.slots[index];
        let (piece, bytes) = (slot.part(), slot.part_bytes(media) as usize);
        let namespace = media.namespace(piece.namespace).ok_or(SubmitError::BadData)?;
        let blocks = u32::try_from(piece.blocks).map_err(|_| SubmitError::BadData)?;
        // Blocks of the piece that were copied one by one may have been dirtied again: those bits stay.
        let take = self.purpose == Purpose::Copy && !slot.is_past_first() && !planted::on(Fault::ClearAfterRead);
        let cleared = take && namespace.take(slot.piece.slba, slot.piece.blocks) > 0;
        let entry = SubmissionEntry::read(namespace.geometry.source, piece.slba, blocks);
        let data = self.memory.buffer().part(index * self.config.transfer_bytes, bytes).ok_or(SubmitError::BadData)?;
        let submitted = self.source.submit(now, &entry, &[data], slot::tag(index, slot.generation));
        let slot = &mut self.slots[index];
        match submitted {
            Ok(()) => slot.stage = Stage::Reading,
            Err(_) => {
                slot.stage = Stage::Again;
                if cleared {
                    self.dirty_again(index, media);
                }
            }
        }
        submitted
    }

    /// What was read is looked at once, while it is in the cache: zeroes, checksum; then it goes out.
    fn submit_write(&mut self, index: usize, now: Time, media: &mut Media) -> Result<(), SubmitError> {
        let slot = self.slots[index];
        let (piece, bytes) = (slot.part(), slot.part_bytes(media) as usize);
        let namespace = media.namespace(piece.namespace).ok_or(SubmitError::BadData)?;
        let data = self.memory.buffer().part(index * self.config.transfer_bytes, bytes).ok_or(SubmitError::BadData)?;
        let limits = self.destination.limits();
        let zero = self.purpose == Purpose::Copy && data.arena().is_zero(data.offset(), bytes);
        let nsid = namespace.geometry.destination;
        let proved = namespace.untouched(piece.slba, piece.blocks) && self.destination.reads_zero_proved(nsid);
        if zero && (proved || planted::on(Fault::ZeroesSkipped)) {
            self.slots[index].zero = true;
            self.stats.skipped += bytes as u64;
            self.part_done(index, media);
            return Ok(());
        }
        let op = if zero && bytes as u64 <= limits.max_write_zeroes {
            DestinationOp::WriteZeroes
        } else {
            self.stats.checksums += 1;
            let checksum = checksum(data.arena(), data.offset(), bytes);
            match self.purpose {
                Purpose::Copy => DestinationOp::Write { data, checksum },
                Purpose::Compare => DestinationOp::Compare { data, checksum },
            }
        };
        let request = DestinationRequest { nsid, slba: piece.slba, blocks: piece.blocks, op };
        self.destination.submit(now, &request, slot::tag(index, slot.generation))?;
        if !zero {
            namespace.written(piece.slba, piece.blocks);
        }
        let slot = &mut self.slots[index];
        (slot.stage, slot.submitted, slot.zero) = (Stage::Writing, now, zero);
        Ok(())
    }

    /// The block cannot be read: the destination is told that it cannot be read there either (rule 11).
    fn submit_mark(&mut self, index: usize, now: Time, media: &mut Media) -> Result<(), SubmitError> {
        let slot = self.slots[index];
        let piece = slot.part();
        let namespace = media.namespace(piece.namespace).ok_or(SubmitError::BadData)?;
        if !slot.is_past_first() {
            namespace.take(slot.piece.slba, slot.piece.blocks);
        }
        let op = DestinationOp::WriteUncorrectable;
        let request = DestinationRequest { nsid: namespace.geometry.destination, slba: piece.slba, blocks: piece.blocks, op };
        namespace.written(piece.slba, piece.blocks);
        let submitted = self.destination.submit(now, &request, slot::tag(index, slot.generation));
        match submitted {
            Ok(()) => (self.slots[index].stage, self.slots[index].submitted) = (Stage::Writing, now),
            Err(_) if !slot.is_past_first() => self.dirty_again(index, media),
            Err(_) => {}
        }
        submitted
    }

    fn flush_some(&mut self, now: Time, media: &mut Media) -> u32 {
        match self.flushing {
            Flushing::No => 0,
            Flushing::Submitting { .. } if planted::on(Fault::CleanBeforeFlushed) => {
                self.flushing = Flushing::Clearing;
                1
            }
            Flushing::Submitting { next, open } => {
                let Some(namespace) = media.namespaces().get(next) else {
                    if open == 0 {
                        self.flushing = if self.flush_failed.is_none() { Flushing::Clearing } else { Flushing::No };
                    }
                    return u32::from(open == 0);
                };
                let nsid = namespace.geometry.destination;
                let request = DestinationRequest { nsid, slba: 0, blocks: 0, op: DestinationOp::Flush };
                match self.destination.submit(now, &request, FLUSH_TAG) {
                    Ok(()) => self.flushing = Flushing::Submitting { next: next + 1, open: open + 1 },
                    Err(SubmitError::Full) => return 0,
                    Err(_) => {
                        self.flush_failed = Some(Status::ABORTED_SQ_DELETION);
                        self.flushing = Flushing::Submitting { next: usize::MAX, open };
                    }
                }
                1
            }
            Flushing::Clearing => {
                let all = (0..media.namespaces().len())
                    .all(|index| media.namespace(index).is_none_or(|namespace| namespace.flushed_some(CLEAR_WORDS)));
                if all {
                    self.flushing = Flushing::No;
                }
                1
            }
        }
    }

    fn flush_ended(&mut self, completion: &Completion) {
        let Flushing::Submitting { next, open } = self.flushing else { return };
        self.flushing = Flushing::Submitting { next, open: open.saturating_sub(1) };
        if completion.unknown || completion.status.is_error() {
            self.flush_failed = Some(completion.status);
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
