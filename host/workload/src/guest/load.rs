//! The load itself, over any command queues: what is due is submitted, what has ended is recorded and checked.

use super::GuestConfig;
use super::handle::{NO_WRITE, Shared, count};
use crate::ledger::Ledger;
use crate::tag::{BLOCK_BYTES, Block, Tag};
use crate::verify::window;
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::Segment;
use dray_device::poll::Time;
use dray_device::space::MappedBuffer;
use dray_nvme::command::SubmissionEntry;
use fastrand::Rng;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Commands submitted in one poll: 64 KiB of copying.
const MAX_SUBMITS: u32 = 16;
/// Random blocks tried before a command waits for the next poll.
const MAX_TRIES: u32 = 8;

/// A place for one outstanding command; its number is the command's tag.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    taken: bool,
    write: bool,
    index: u32,
    seq: u64,
    acked_before: u64,
    due: Time,
}

/// Everything but the queues, so that completions can be recorded while a queue is borrowed.
struct Core {
    shared: Arc<Shared>,
    memory: MappedBuffer,
    places: Vec<Place>,
    /// Free places of each queue.
    free: Vec<Vec<u32>>,
    /// A bit for each index of the ledger with a command outstanding, or with one of unknown end.
    busy: Vec<u64>,
    scratch: Block,
    outstanding: usize,
    depth: u16,
    nsid: u32,
    lbas_per_block: u32,
}

/// The load over its queues.
pub(super) struct Load<Q> {
    queues: Vec<Q>,
    core: Core,
    rng: Rng,
    interval_ns: u64,
    read_percent: u8,
    due: Option<Time>,
    next_queue: usize,
    dead: bool,
}

impl<Q: CommandQueue> Load<Q> {
    /// `memory` has a block for each place.
    pub(super) fn new(config: &GuestConfig, shared: Arc<Shared>, memory: MappedBuffer) -> Self {
        let slots = config.slots();
        // A guest that goes on with a ledger does not repeat what the one before it did.
        let before = (shared.ledger.next_seq() - 1) << 32;
        let rng = Rng::with_seed(crate::mix(shared.ledger.seed() ^ u64::from(shared.ledger.guest()) ^ before));
        let busy = vec![0; shared.ledger.blocks().len().div_ceil(64)];
        let core = Core {
            shared,
            memory,
            places: vec![Place::default(); slots],
            free: (0..config.queues).map(|_| Vec::with_capacity(usize::from(config.depth))).collect(),
            busy,
            scratch: Block::default(),
            outstanding: 0,
            depth: config.depth,
            nsid: config.nsid,
            lbas_per_block: 1,
        };
        Self {
            queues: Vec::with_capacity(usize::from(config.queues)),
            core,
            rng,
            interval_ns: config.interval_ns(),
            read_percent: config.read_percent,
            due: None,
            next_queue: 0,
            dead: false,
        }
    }

    /// New queues after a reset (or the first). Whatever the old ones had is over: a reset has ended it.
    pub(super) fn begin(&mut self, queues: Vec<Q>, lbas_per_block: u32) {
        self.core.recover();
        self.core.lbas_per_block = lbas_per_block;
        self.queues = queues;
        self.due = None;
        self.dead = false;
    }

    /// Gives the queues up; nothing may be outstanding.
    pub(super) fn end(&mut self) {
        self.queues.clear();
    }

    pub(super) fn outstanding(&self) -> usize {
        self.core.outstanding
    }

    /// A queue is dead: nothing can be submitted until [`Self::begin`].
    pub(super) fn is_dead(&self) -> bool {
        self.dead
    }

    /// When the next command is due; `None` while that is not known or commands are submitted as fast as they end.
    pub(super) fn due(&self) -> Option<Time> {
        self.due.filter(|_| self.interval_ns > 0)
    }

    /// Takes completions, then submits what is due if `submit` says so. Returns the number of commands.
    pub(super) fn poll(&mut self, now: Time, submit: bool) -> u32 {
        let mut work = 0;
        for queue in &mut self.queues {
            let core = &mut self.core;
            work += queue.poll(now, &mut |completion| core.complete(now, completion));
        }
        let mut work = u32::try_from(work).unwrap_or(u32::MAX);
        if submit && !self.dead {
            work = work.saturating_add(self.submit(now));
        }
        work
    }

    fn submit(&mut self, now: Time) -> u32 {
        let mut submitted = 0;
        while submitted < MAX_SUBMITS {
            let due = if self.interval_ns == 0 { now } else { *self.due.get_or_insert(now) };
            if due > now || !self.submit_one(now, due) {
                break;
            }
            self.due = Some(due.after_ns(self.interval_ns));
            submitted += 1;
        }
        if submitted > 0 {
            for queue in &mut self.queues {
                queue.commit();
            }
        }
        submitted
    }

    fn submit_one(&mut self, now: Time, due: Time) -> bool {
        let Some(queue) = self.pick_queue() else { return false };
        let Some(index) = self.pick_block() else { return false };
        let read = self.rng.u8(0..100) < self.read_percent;
        let Some(slot) = self.core.free[queue].pop() else { return false };
        match self.core.submit(&mut self.queues[queue], now, due, slot, index, read) {
            Ok(()) => true,
            Err(error) => {
                self.core.free[queue].push(slot);
                match error {
                    SubmitError::Full => {}
                    SubmitError::Dead => self.dead = true,
                    SubmitError::BadData | SubmitError::NotMapped => {
                        self.dead = true;
                        count(&self.core.shared.counters.errors);
                        self.core.shared.error(|| format!("a command was not taken: {error}"));
                    }
                }
                false
            }
        }
    }

    /// The next queue in turn that takes a command.
    fn pick_queue(&mut self) -> Option<usize> {
        for _ in 0..self.queues.len() {
            let queue = self.next_queue % self.queues.len();
            self.next_queue = queue + 1;
            if !self.core.free[queue].is_empty() && self.queues[queue].free() > 0 {
                return Some(queue);
            }
        }
        None
    }

    /// A random block without a command outstanding.
    fn pick_block(&mut self) -> Option<usize> {
        let blocks = self.core.shared.ledger.blocks().len();
        (0..MAX_TRIES).map(|_| self.rng.usize(0..blocks)).find(|index| !self.core.is_busy(*index))
    }
}

impl Core {
    fn is_busy(&self, index: usize) -> bool {
        self.busy[index / 64] & (1 << (index % 64)) != 0
    }

    fn recover(&mut self) {
        self.busy.fill(0);
        self.places.fill(Place::default());
        self.outstanding = 0;
        for seq in &self.shared.outstanding {
            seq.store(NO_WRITE, Ordering::Release);
        }
        let depth = u32::from(self.depth);
        for (queue, free) in (0u32..).zip(&mut self.free) {
            free.clear();
            free.extend(queue * depth..(queue + 1) * depth);
        }
    }

    fn submit<Q: CommandQueue>(
        &mut self,
        queue: &mut Q,
        now: Time,
        due: Time,
        slot: u32,
        index: usize,
        read: bool,
    ) -> Result<(), SubmitError> {
        let place = slot as usize;
        let ledger: &Ledger = &self.shared.ledger;
        let acked_before = ledger.acked(index);
        let block = ledger.blocks()[index];
        let mut seq = 0;
        if !read {
            let outstanding = &self.shared.outstanding[place];
            seq = ledger.issue(index, |seq| outstanding.store(seq, Ordering::Relaxed));
            self.scratch.write(ledger.seed(), Tag { guest: ledger.guest(), seq, block });
        }
        let data = segment(&self.memory, place).ok_or(SubmitError::BadData)?;
        let slba = block * u64::from(self.lbas_per_block);
        let entry = if read {
            SubmissionEntry::read(self.nsid, slba, self.lbas_per_block)
        } else {
            data.write(self.scratch.bytes());
            SubmissionEntry::write(self.nsid, slba, self.lbas_per_block)
        };
        if let Err(error) = queue.submit(now, &entry, &[data], u64::from(slot)) {
            // The number stays used: the block is "issued, not acknowledged", which is true of what was before, too.
            self.shared.outstanding[place].store(NO_WRITE, Ordering::Release);
            return Err(error);
        }
        self.places[place] = Place { taken: true, write: !read, index: index as u32, seq, acked_before, due };
        self.busy[index / 64] |= 1 << (index % 64);
        self.outstanding += 1;
        Ok(())
    }

    fn complete(&mut self, now: Time, completion: Completion) {
        let shared = Arc::clone(&self.shared);
        let slot = usize::try_from(completion.tag).unwrap_or(usize::MAX);
        let Some(place) = self.places.get_mut(slot).filter(|place| place.taken) else {
            count(&shared.counters.errors);
            return shared.error(|| format!("a completion with tag {:#x}, which is not outstanding", completion.tag));
        };
        place.taken = false;
        let place = *place;
        self.outstanding -= 1;
        if completion.unknown {
            // Its effect may still come: place and block are held until the controller has been reset.
            return count(&shared.counters.unknown);
        }
        shared.latencies[shared.phase()].record(now.ns_since(place.due));
        if completion.status.is_error() {
            count(&shared.counters.errors);
            shared.error(|| {
                let what = if place.write { "write" } else { "read" };
                format!("{what} of block {}: {}", shared.ledger.blocks()[place.index as usize], completion.status)
            });
        } else if place.write {
            shared.ledger.acknowledge(place.index as usize, place.seq);
            count(&shared.counters.writes);
        } else {
            self.check_read(slot, &place);
        }
        shared.outstanding[slot].store(NO_WRITE, Ordering::Release);
        let index = place.index as usize;
        self.busy[index / 64] &= !(1 << (index % 64));
        if let Some(free) = self.free.get_mut(slot / usize::from(self.depth)) {
            free.push(slot as u32);
        }
    }

    fn check_read(&mut self, slot: usize, place: &Place) {
        let shared = &self.shared;
        if let Some(data) = segment(&self.memory, slot) {
            data.read(self.scratch.bytes_mut());
        }
        let ledger = &shared.ledger;
        let (block, issued) = (ledger.blocks()[place.index as usize], ledger.issued(place.index as usize));
        let reading = self.scratch.read(ledger.seed());
        count(&shared.counters.reads);
        if let Err(fault) = window(ledger.guest(), block, place.acked_before, issued, reading) {
            count(&shared.counters.mismatches);
            shared.error(|| format!("read of block {block}: {fault}"));
        }
    }
}

/// The data of a place.
fn segment(memory: &MappedBuffer, place: usize) -> Option<Segment<'_>> {
    memory.buffer().part(place * BLOCK_BYTES, BLOCK_BYTES)
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
