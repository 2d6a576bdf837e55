//! A disk in memory that takes its time, ends out of order, fails where it is told to, and loses what it had not flushed.
//!
//! What an operation does is done when it begins or when it ends, as its seed chooses; with a write cache always when it ends.
//! [`Disk::power_loss`] takes back every write that has not been flushed.

use crate::rig::pattern;
use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::memory::{Arena, DmaBuffer, Pages};
use dray_device::poll::Time;
use dray_nvme::status::Status;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks that fail.
#[derive(Clone, Debug)]
pub struct Failing {
    /// Which.
    pub blocks: Range<u64>,
    /// Reads, or whatever writes.
    pub reads: bool,
    /// How many operations fail; `u32::MAX` = all.
    pub times: u32,
    /// What they end with.
    pub status: Status,
    /// They are carried out all the same.
    pub touches: bool,
}

/// An operation as it was submitted.
pub type Seen = (BackingOp, u64, u64);

struct Flight {
    tag: u64,
    due: Time,
    op: BackingOp,
    slba: u64,
    blocks: u64,
    data: Vec<(Arc<Arena>, usize, usize)>,
    status: Status,
    /// It is still to be done.
    open: bool,
}

impl Flight {
    fn writes(&self) -> bool {
        writes(self.op)
    }

    fn overlaps(&self, slba: u64, blocks: u64) -> bool {
        self.slba < slba + blocks && slba < self.slba + self.blocks
    }
}

fn writes(op: BackingOp) -> bool {
    matches!(op, BackingOp::Write { .. } | BackingOp::WriteZeroes { .. } | BackingOp::Deallocate | BackingOp::WriteUncorrectable)
}

struct State {
    memory: DmaBuffer,
    shift: u32,
    random: fastrand::Rng,
    now: Time,
    latency_ns: (u64, u64),
    cached: bool,
    flights: Vec<Flight>,
    /// What unflushed writes have replaced, oldest first: place and bytes.
    undo: VecDeque<(usize, Vec<u8>)>,
    /// How many of those were flushed ever.
    flushed: u64,
    failing: Vec<Failing>,
    /// Blocks that Write Uncorrectable has marked.
    marks: BTreeSet<u64>,
    swallow: u32,
    swallowed: Vec<Flight>,
    watched: bool,
    seen: Vec<Seen>,
    overlaps: u64,
    flushes: u64,
    lost: usize,
}

/// The disk as the test has it. Clones are the same disk.
#[derive(Clone)]
pub struct Disk {
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("in_flight", &self.state().flights.len()).finish_non_exhaustive()
    }
}

impl Disk {
    /// A disk of zeroes whose operations take a time in `latency_ns`.
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn new(seed: u64, bytes: u64, block_bytes: u32, latency_ns: (u64, u64)) -> Self {
        let memory = DmaBuffer::allocate("test-disk", bytes as usize, Pages::Small).expect("memory");
        let state = State {
            memory,
            shift: block_bytes.trailing_zeros(),
            random: fastrand::Rng::with_seed(seed),
            now: Time(0),
            latency_ns,
            cached: false,
            flights: Vec::new(),
            undo: VecDeque::new(),
            flushed: 0,
            failing: Vec::new(),
            marks: BTreeSet::new(),
            swallow: 0,
            swallowed: Vec::new(),
            watched: false,
            seen: Vec::new(),
            overlaps: 0,
            flushes: 0,
            lost: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The namespace's backing.
    #[must_use]
    pub fn backing(&self) -> Box<dyn Backing> {
        Box::new(DiskBacking { disk: self.clone() })
    }

    /// Fills it with one byte.
    pub fn fill(&self, byte: u8) {
        let state = self.state();
        state.memory.arena().fill(state.memory.offset(), state.memory.len(), byte);
    }

    /// Fills two thirds with noise and leaves the others as zeroes, in pieces of 256 KiB.
    pub fn fill_noise(&self, seed: u64) {
        const PIECE: usize = 256 << 10;
        let state = self.state();
        let noise = pattern(seed, PIECE);
        for (index, at) in (0..state.memory.len()).step_by(PIECE).enumerate() {
            let len = PIECE.min(state.memory.len() - at);
            if index % 3 != 1 {
                state.memory.arena().write(state.memory.offset() + at, &noise[..len]);
                state.memory.arena().write(state.memory.offset() + at, &(index as u64).to_le_bytes());
            }
        }
    }

    /// Everything that is on it, unflushed writes included.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let state = self.state();
        let mut bytes = vec![0; state.memory.len()];
        state.memory.segment().read(&mut bytes);
        bytes
    }

    /// Writes to the media past everybody.
    pub fn put(&self, at: usize, bytes: &[u8]) {
        let state = self.state();
        state.memory.arena().write(state.memory.offset() + at, bytes);
    }

    /// Whether writes sit in a cache until a flush.
    pub fn set_cached(&self, cached: bool) {
        self.state().cached = cached;
    }

    /// How long operations take from now on.
    pub fn set_latency_ns(&self, latency_ns: (u64, u64)) {
        self.state().latency_ns = latency_ns;
    }

    /// Lets operations fail.
    pub fn fail(&self, failing: Failing) {
        self.state().failing.push(failing);
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.state().failing.clear();
    }

    /// The next writes do not end until [`power_loss`](Self::power_loss) or [`give_back`](Self::give_back).
    pub fn swallow(&self, writes: u32) {
        self.state().swallow = writes;
    }

    /// Writes that were swallowed and have not come back.
    #[must_use]
    pub fn swallowed(&self) -> usize {
        self.state().swallowed.len()
    }

    /// What was swallowed is carried out, late as it is.
    pub fn give_back(&self) {
        let mut state = self.state();
        state.swallow = 0;
        let swallowed = std::mem::take(&mut state.swallowed);
        state.flights.extend(swallowed);
    }

    /// Operations are remembered from now on.
    pub fn watch(&self) {
        self.state().watched = true;
    }

    /// The operations since the last call, in the order of submission.
    #[must_use]
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }

    /// Writes that were submitted while another one to the same blocks was under way.
    #[must_use]
    pub fn overlaps(&self) -> u64 {
        self.state().overlaps
    }

    /// Flushes that have ended.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }

    /// Writes that have ended and are not flushed.
    #[must_use]
    pub fn unflushed(&self) -> usize {
        self.state().undo.len()
    }

    /// Writes that power losses have taken back.
    #[must_use]
    pub fn lost(&self) -> usize {
        self.state().lost
    }

    /// What was written and not flushed is gone; what is under way fails and does nothing.
    pub fn power_loss(&self) {
        let mut state = self.state();
        let undo = std::mem::take(&mut state.undo);
        state.lost += undo.len();
        state.flushed += undo.len() as u64;
        for (at, bytes) in undo.iter().rev() {
            state.memory.arena().write(*at, bytes);
        }
        let swallowed = std::mem::take(&mut state.swallowed);
        state.flights.extend(swallowed);
        for flight in &mut state.flights {
            (flight.open, flight.status, flight.due) = (false, Status::INTERNAL_ERROR, Time(0));
        }
    }
}

impl State {
    fn carry_out(&mut self, flight: &Flight) {
        if flight.op == BackingOp::Flush {
            // It covers what had ended when it began; `slba` has kept how many those were.
            while self.flushed < flight.slba && self.undo.pop_front().is_some() {
                self.flushed += 1;
            }
            self.flushes += 1;
            return;
        }
        let start = self.memory.offset() + ((flight.slba << self.shift) as usize);
        let len = (flight.blocks << self.shift) as usize;
        let arena = Arc::clone(self.memory.arena());
        if flight.writes() && self.cached {
            let mut before = vec![0; len];
            arena.read(start, &mut before);
            self.undo.push_back((start, before));
        }
        let blocks = flight.slba..flight.slba + flight.blocks;
        match flight.op {
            BackingOp::WriteUncorrectable => return self.marks.extend(blocks),
            op if writes(op) => self.marks.retain(|block| !blocks.contains(block)),
            _ => {}
        }
        match flight.op {
            BackingOp::Read | BackingOp::Write { .. } => {
                let mut at = start;
                for (other, offset, len) in &flight.data {
                    if flight.op == BackingOp::Read {
                        Arena::copy(&arena, at, other, *offset, *len);
                    } else {
                        Arena::copy(other, *offset, &arena, at, *len);
                    }
                    at += len;
                }
            }
            _ => arena.fill(start, len, 0),
        }
    }

    /// How an operation that begins now will end, and whether it is carried out.
    fn fate(&mut self, request: &BackingRequest<'_>) -> (Status, bool) {
        let reads = request.op == BackingOp::Read;
        let (first, end) = (request.slba, request.slba + request.blocks);
        if reads && self.marks.range(first..end).next().is_some() {
            return (Status::UNRECOVERED_READ, false);
        }
        let hit = self.failing.iter_mut().find(|failing| {
            let kind = failing.reads == reads && (reads || writes(request.op));
            kind && failing.times > 0 && failing.blocks.start < end && first < failing.blocks.end
        });
        let Some(failing) = hit else { return (Status::SUCCESS, true) };
        if failing.times != u32::MAX {
            failing.times -= 1;
        }
        (failing.status, failing.touches)
    }
}

/// The backing over a [`Disk`].
struct DiskBacking {
    disk: Disk,
}

impl Backing for DiskBacking {
    fn info(&self) -> BackingInfo {
        let state = self.disk.state();
        BackingInfo {
            block_bytes: 1 << state.shift,
            blocks: state.memory.len() as u64 >> state.shift,
            volatile_cache: true,
            deallocated_reads_zero: true,
        }
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let mut state = self.disk.state();
        let BackingRequest { op, slba, blocks, tag, .. } = *request;
        if state.watched {
            state.seen.push((op, slba, blocks));
        }
        if writes(op) {
            let under_way = state.flights.iter().chain(&state.swallowed);
            let overlaps = under_way.filter(|flight| flight.writes() && flight.overlaps(slba, blocks)).count();
            state.overlaps += overlaps as u64;
        }
        let (status, touches) = state.fate(request);
        let (least, most) = state.latency_ns;
        let due = state.now.after_ns(state.random.u64(least..=most));
        let data = request.data.iter().map(|piece| (Arc::clone(piece.arena()), piece.offset(), piece.len())).collect();
        let mut flight = Flight { tag, due, op, slba, blocks, data, status, open: touches };
        if op == BackingOp::Flush {
            flight.slba = state.flushed + state.undo.len() as u64;
        }
        if writes(op) && state.swallow > 0 {
            state.swallow -= 1;
            state.swallowed.push(flight);
            return Submitted::Pending;
        }
        if flight.open && !state.cached && op != BackingOp::Flush && state.random.bool() {
            flight.open = false;
            state.carry_out(&flight);
        }
        state.flights.push(flight);
        Submitted::Pending
    }

    fn can_write_uncorrectable(&self) -> bool {
        true
    }

    fn commit(&mut self) {}

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        let mut state = self.disk.state();
        state.now = now;
        let mut ended = Vec::new();
        let mut index = 0;
        while index < state.flights.len() {
            if state.flights[index].due <= now {
                ended.push(state.flights.swap_remove(index));
            } else {
                index += 1;
            }
        }
        ended.sort_by_key(|flight| flight.due);
        for flight in ended.iter().filter(|flight| flight.open) {
            state.carry_out(flight);
        }
        drop(state);
        ended.iter().for_each(|flight| done(flight.tag, flight.status));
        ended.len()
    }

    fn in_flight(&self) -> usize {
        let state = self.disk.state();
        state.flights.len() + state.swallowed.len()
    }
}
