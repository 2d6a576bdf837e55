//! The media under the simulated subsystems: a model that takes its time, ends out of order, fails where it is told to, and at a
//! power cut keeps, drops, reorders and tears what was not flushed.
//!
//! A block is not bytes here but the [`CommandId`] that its bytes decode to ([`content`]): what the controller writes is decoded,
//! what it reads is made again. Bytes that no command has written decode to `GARBAGE` and stay so.
//!
//! **The power's model.** Each block has what is durable, and the versions since: one for each write that ended and was not
//! flushed, or is under way. At a cut every block becomes, by itself, the durable version or any later one. So a write may be
//! dropped, a later write may survive an earlier one, and a write of many blocks may be torn between them; within a block it
//! is atomic (the subsystems report AWUPF 0: one block). Without a volatile cache there are such versions only while an
//! operation is under way: its end makes them durable, with an error too, if it touched the blocks all the same.

use super::content;
use super::event::{CommandId, Event, Side};
use super::fault::Fault;
use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::memory::Arena;
use dray_device::poll::Time;
use dray_nvme::status::Status;
use std::collections::BTreeMap;
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
    /// What it is counted as.
    pub fault: Fault,
}

/// What a power cut did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutEffect {
    /// Versions of blocks that are gone.
    pub dropped: u64,
    /// A later version stayed where an earlier one went.
    pub reordered: u64,
    /// Writes of several blocks that stayed in part.
    pub torn: u64,
}

/// Guest memory of an operation: arena, offset, bytes.
type Pieces = Vec<(Arc<Arena>, usize, usize)>;

struct Flight {
    serial: u64,
    tag: u64,
    due: Time,
    op: BackingOp,
    slba: u64,
    blocks: u64,
    data: Pieces,
    status: Status,
    effect: Effect,
}

/// What an operation does to the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// Nothing.
    None,
    /// It is still to be carried out, at its end.
    Due,
    /// It was carried out before its end.
    Done,
}

/// A version of a block that a cut may leave: the operation that made it, and what it holds.
#[derive(Clone, Copy)]
struct Version {
    lba: u64,
    serial: u64,
    id: CommandId,
}

struct State {
    side: Side,
    nsid: u32,
    block_bytes: u32,
    /// What reads see.
    blocks: Vec<CommandId>,
    /// What is durable.
    durable: Vec<CommandId>,
    /// What came since, oldest first.
    volatile: Vec<Version>,
    /// Versions are numbered as they are made, which is not the order of submission.
    versions: u64,
    random: fastrand::Rng,
    now: Time,
    latency_ns: (u64, u64),
    cached: bool,
    serial: u64,
    flights: Vec<Flight>,
    swallow: u32,
    swallowed: Vec<Flight>,
    slow: (u32, u64),
    failing: Vec<Failing>,
    events: Vec<Event>,
    took: Vec<Fault>,
    scratch: Vec<u8>,
    /// Lists of operations that have ended, for those to come.
    spare: Vec<Pieces>,
    ended: Vec<Flight>,
}

/// The disk of one namespace at one side. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state();
        f.debug_struct("SimDisk").field("side", &state.side).field("in_flight", &state.flights.len()).finish_non_exhaustive()
    }
}

fn writes(op: BackingOp) -> bool {
    matches!(op, BackingOp::Write { .. } | BackingOp::WriteZeroes { .. } | BackingOp::Deallocate | BackingOp::WriteUncorrectable)
}

fn force_unit_access(op: BackingOp) -> bool {
    matches!(op, BackingOp::Write { fua: true } | BackingOp::WriteZeroes { fua: true, .. })
}

impl SimDisk {
    /// A disk of zeroes.
    #[must_use]
    pub fn new(side: Side, nsid: u32, blocks: u64, block_bytes: u32, seed: u64) -> Self {
        let state = State {
            side,
            nsid,
            block_bytes,
            blocks: vec![content::ZERO; blocks as usize],
            durable: vec![content::ZERO; blocks as usize],
            volatile: Vec::new(),
            versions: 0,
            random: fastrand::Rng::with_seed(seed ^ (side as u64) << 32 ^ u64::from(nsid) << 40),
            now: Time(0),
            latency_ns: (2_000, 40_000),
            cached: false,
            // Operations are numbered over all namespaces of a side.
            serial: u64::from(nsid - 1) * 1_000_000,
            flights: Vec::new(),
            swallow: 0,
            swallowed: Vec::new(),
            slow: (0, 0),
            failing: Vec::new(),
            events: Vec::new(),
            took: Vec::new(),
            scratch: Vec::new(),
            spare: Vec::new(),
            ended: Vec::new(),
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The namespace's backing.
    #[must_use]
    pub fn backing(&self) -> Box<dyn Backing> {
        Box::new(SimBacking { disk: self.clone() })
    }

    /// Puts content on the disk, durable, past everybody.
    pub fn put(&self, content: impl Fn(u64) -> CommandId) {
        let mut state = self.state();
        state.blocks = (0..state.blocks.len() as u64).map(content).collect();
        state.durable = state.blocks.clone();
        state.volatile.clear();
    }

    /// What every block contains.
    #[must_use]
    pub fn decode_all(&self) -> Vec<CommandId> {
        self.state().blocks.clone()
    }

    /// The blocks in which two disks differ.
    #[must_use]
    pub fn different(&self, other: &Self) -> Vec<u64> {
        let (mine, theirs) = (self.state(), other.state());
        let pairs = mine.blocks.iter().zip(&theirs.blocks).enumerate();
        pairs.filter(|(_, (a, b))| a != b).map(|(lba, _)| lba as u64).collect()
    }

    /// How long operations take from now on.
    pub fn set_latency_ns(&self, latency_ns: (u64, u64)) {
        self.state().latency_ns = latency_ns;
    }

    /// Whether writes sit in a cache until a flush.
    pub fn set_cached(&self, cached: bool) {
        self.state().cached = cached;
    }

    /// Lets operations fail.
    pub fn fail(&self, failing: Failing) {
        self.state().failing.push(failing);
    }

    /// The next operations take so much longer.
    pub fn slow(&self, operations: u32, ns: u64) {
        self.state().slow = (operations, ns);
    }

    /// The next writes do not end until [`give_back`](Self::give_back) or a power cut.
    pub fn swallow(&self, writes: u32) {
        self.state().swallow = writes;
    }

    /// Writes that were swallowed and have not come back.
    #[must_use]
    pub fn swallowed(&self) -> usize {
        self.state().swallowed.len()
    }

    /// What was swallowed is carried out now, late as it is.
    pub fn give_back(&self) {
        let mut state = self.state();
        state.swallow = 0;
        let mut swallowed = std::mem::take(&mut state.swallowed);
        if !swallowed.is_empty() {
            state.took.push(Fault::LateWrite);
        }
        let now = state.now;
        swallowed.iter_mut().for_each(|flight| flight.due = now);
        state.flights.extend(swallowed);
    }

    /// Nothing is slow, swallowed or failing any more.
    pub fn heal(&self) {
        let mut state = self.state();
        state.failing.clear();
        state.slow = (0, 0);
        drop(state);
        self.give_back();
    }

    /// Takes what has begun and ended since the last call, and says when the next operation ends.
    pub fn take_events(&self, events: &mut Vec<Event>) -> Option<Time> {
        let mut state = self.state();
        events.append(&mut state.events);
        state.flights.iter().map(|flight| flight.due).min()
    }

    /// Faults that took effect since the last call.
    #[must_use]
    pub fn took(&self) -> Vec<Fault> {
        std::mem::take(&mut self.state().took)
    }

    /// The power goes: see the module's text. What is under way ends with an error, without another effect.
    pub fn power_cut(&self) -> CutEffect {
        let mut state = self.state();
        let state = &mut *state;
        // What is under way may have touched the media already.
        let mut swallowed = std::mem::take(&mut state.swallowed);
        state.swallow = 0;
        let mut flights = std::mem::take(&mut state.flights);
        flights.append(&mut swallowed);
        for flight in &mut flights {
            if std::mem::replace(&mut flight.effect, Effect::None) == Effect::Due && writes(flight.op) {
                state.carry_out(flight);
            }
            (flight.status, flight.due) = (Status::INTERNAL_ERROR, Time(0));
        }
        state.flights = flights;
        let effect = state.cut();
        state.took.extend((effect.dropped > 0).then_some(Fault::PowerDrops));
        state.took.extend((effect.reordered > 0).then_some(Fault::PowerReorders));
        state.took.extend((effect.torn > 0).then_some(Fault::PowerTears));
        effect
    }

    /// The process that drove it is gone: nothing is under way.
    pub fn forget_flights(&self) {
        let mut state = self.state();
        state.flights.clear();
        state.swallowed.clear();
        state.events.clear();
    }
}

impl State {
    fn cut(&mut self) -> CutEffect {
        let mut effect = CutEffect::default();
        // Of each write: blocks that stayed and that went.
        let mut parts: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        let all_or_none = self.random.u8(0..4);
        let mut blocks: BTreeMap<u64, Vec<Version>> = BTreeMap::new();
        for version in self.volatile.drain(..) {
            blocks.entry(version.lba).or_default().push(version);
        }
        for (lba, versions) in blocks {
            let kept = match all_or_none {
                0 => 0,
                1 => versions.len(),
                _ => self.random.usize(0..=versions.len()),
            };
            let durable = &mut self.durable[lba as usize];
            *durable = if kept == 0 { *durable } else { versions[kept - 1].id };
            self.blocks[lba as usize] = *durable;
            effect.dropped += (versions.len() - kept) as u64;
            for (index, version) in versions.iter().enumerate() {
                // What a later version has replaced has neither stayed nor gone.
                if index + 1 >= kept {
                    let part = parts.entry(version.serial).or_default();
                    if index + 1 == kept { part.0 += 1 } else { part.1 += 1 }
                }
            }
        }
        effect.torn = parts.values().filter(|(stayed, went)| *stayed > 0 && *went > 0).count() as u64;
        let first_gone = parts.iter().find(|(_, (stayed, _))| *stayed == 0).map(|(serial, _)| *serial);
        let last_kept = parts.iter().rfind(|(_, (stayed, _))| *stayed > 0).map(|(serial, _)| *serial);
        effect.reordered = u64::from(first_gone.zip(last_kept).is_some_and(|(gone, kept)| gone < kept));
        effect
    }

    fn carry_out(&mut self, flight: &Flight) {
        match flight.op {
            BackingOp::Flush => {
                // It covers what was there when it began; `slba` has kept how many versions those were.
                let covered = self.volatile.partition_point(|version| version.serial <= flight.slba);
                for version in self.volatile.drain(..covered) {
                    self.durable[version.lba as usize] = version.id;
                }
            }
            BackingOp::Read => self.read(flight),
            _ => self.write(flight),
        }
    }

    fn read(&mut self, flight: &Flight) {
        let size = self.block_bytes as usize;
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.resize(flight.blocks as usize * size, 0);
        for (index, block) in bytes.chunks_exact_mut(size).enumerate() {
            let lba = flight.slba + index as u64;
            content::fill(self.blocks[lba as usize], self.nsid, lba, block);
        }
        let mut at = 0;
        for (arena, offset, len) in &flight.data {
            arena.write(*offset, &bytes[at..at + len]);
            at += len;
        }
        self.scratch = bytes;
    }

    fn write(&mut self, flight: &Flight) {
        let size = self.block_bytes as usize;
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        for (arena, offset, len) in &flight.data {
            arena.read_append(*offset, *len, &mut bytes);
        }
        self.versions += 1;
        let version = self.versions;
        // Durable as it ends: by its own wish, or since there is no cache. Until then (see `poll`) a cut may leave it or not.
        let settles = flight.effect == Effect::Due && (!self.cached || force_unit_access(flight.op));
        for index in 0..flight.blocks {
            let lba = flight.slba + index;
            let id = match flight.op {
                BackingOp::Write { .. } => {
                    let at = index as usize * size;
                    content::decode(&bytes[at..at + size], self.nsid, lba)
                }
                BackingOp::WriteUncorrectable => content::UNREADABLE,
                _ => content::ZERO,
            };
            self.blocks[lba as usize] = id;
            if !settles {
                self.volatile.push(Version { lba, serial: version, id });
            }
        }
        self.scratch = bytes;
        if settles {
            self.settle(flight.slba, flight.blocks);
        }
    }

    /// What these blocks hold is durable.
    fn settle(&mut self, slba: u64, blocks: u64) {
        let range = slba as usize..(slba + blocks) as usize;
        self.durable[range.clone()].copy_from_slice(&self.blocks[range]);
        self.volatile.retain(|version| !(slba..slba + blocks).contains(&version.lba));
    }

    /// How an operation that begins now will end, and whether it is carried out.
    fn fate(&mut self, request: &BackingRequest<'_>) -> (Status, bool) {
        let reads = request.op == BackingOp::Read;
        let (first, end) = (request.slba, request.slba + request.blocks);
        if reads && self.blocks[first as usize..end as usize].contains(&content::UNREADABLE) {
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
        let (fate, fault) = ((failing.status, failing.touches), failing.fault);
        self.took.push(fault);
        fate
    }

    fn due(&mut self) -> Time {
        let (least, most) = self.latency_ns;
        let mut ns = self.random.u64(least..=most);
        if self.slow.0 > 0 {
            self.slow.0 -= 1;
            ns += self.slow.1;
            self.took.push(Fault::Slow);
        }
        self.now.after_ns(ns)
    }
}

/// The backing over a [`SimDisk`].
struct SimBacking {
    disk: SimDisk,
}

impl Backing for SimBacking {
    fn info(&self) -> BackingInfo {
        let state = self.disk.state();
        BackingInfo {
            block_bytes: state.block_bytes,
            blocks: state.blocks.len() as u64,
            volatile_cache: true,
            deallocated_reads_zero: true,
        }
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let mut state = self.disk.state();
        let state = &mut *state;
        let BackingRequest { op, slba, blocks, tag, .. } = *request;
        state.serial += 1;
        let serial = state.serial;
        state.events.push(Event::MediaBegan { side: state.side, serial, op, nsid: state.nsid, slba, blocks });
        let (status, touches) = state.fate(request);
        let due = state.due();
        let mut data = state.spare.pop().unwrap_or_default();
        data.extend(request.data.iter().map(|piece| (Arc::clone(piece.arena()), piece.offset(), piece.len())));
        let effect = if touches { Effect::Due } else { Effect::None };
        let mut flight = Flight { serial, tag, due, op, slba, blocks, data, status, effect };
        if op == BackingOp::Flush {
            flight.slba = state.versions;
        }
        if writes(op) && state.swallow > 0 {
            state.swallow -= 1;
            state.took.push(Fault::NeverEnds);
            state.swallowed.push(flight);
            return Submitted::Pending;
        }
        // What an operation does is done when it begins or when it ends. A cached write is done when it ends, or a flush that
        // began meanwhile would have to leave it out.
        if touches && !state.cached && op != BackingOp::Flush && state.random.bool() {
            flight.effect = Effect::Done;
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
        let mut guard = self.disk.state();
        let state = &mut *guard;
        state.now = now;
        if state.flights.iter().all(|flight| flight.due > now) {
            return 0;
        }
        let mut ended = std::mem::take(&mut state.ended);
        let mut index = 0;
        while index < state.flights.len() {
            if state.flights[index].due <= now {
                ended.push(state.flights.swap_remove(index));
            } else {
                index += 1;
            }
        }
        ended.sort_by_key(|flight| (flight.due, flight.serial));
        for flight in &ended {
            let through = !state.cached || force_unit_access(flight.op);
            match flight.effect {
                Effect::Due => state.carry_out(flight),
                // Whatever its status: what it has touched can be read, and there is nothing to lose it from.
                Effect::Done if writes(flight.op) && through => state.settle(flight.slba, flight.blocks),
                Effect::Done | Effect::None => {}
            }
            state.events.push(Event::MediaEnded { side: state.side, serial: flight.serial, status: flight.status });
        }
        drop(guard);
        ended.iter().for_each(|flight| done(flight.tag, flight.status));
        let count = ended.len();
        let mut state = self.disk.state();
        for mut flight in ended.drain(..) {
            flight.data.clear();
            state.spare.push(flight.data);
        }
        state.ended = ended;
        count
    }

    fn in_flight(&self) -> usize {
        let state = self.disk.state();
        state.flights.len() + state.swallowed.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_cache_a_power_cut_keeps_what_a_failed_operation_that_has_ended_left_to_be_read() {
        let failing = Failing {
            blocks: 0..8,
            reads: false,
            times: u32::MAX,
            status: Status::WRITE_FAULT,
            touches: true,
            fault: Fault::WriteFails,
        };
        let mut lost = false;
        for (seed, cached) in (0..64).map(|seed| (seed, false)).chain((0..64).map(|seed| (seed, true))) {
            let disk = SimDisk::new(0, 1, 8, 512, seed);
            disk.set_cached(cached);
            disk.put(|lba| content::initial(seed, 1, lba));
            disk.fail(failing.clone());
            let mut backing = disk.backing();
            let _pending = backing.submit(&BackingRequest { op: BackingOp::Deallocate, slba: 0, blocks: 8, tag: 0, data: &[] });
            let mut ended = Vec::new();
            backing.poll(Time::from_us(1_000), &mut |tag, status| ended.push((tag, status)));
            assert_eq!(ended, [(0, Status::WRITE_FAULT)]);
            assert_eq!(disk.decode_all(), [content::ZERO; 8], "seed {seed}");
            let effect = disk.power_cut();
            if cached {
                lost |= effect.dropped > 0;
            } else {
                assert_eq!(effect, CutEffect::default(), "seed {seed}");
                assert_eq!(disk.decode_all(), [content::ZERO; 8], "seed {seed}");
            }
        }
        assert!(lost, "a cache loses it now and then");
    }

    #[test]
    fn operations_of_a_side_have_numbers_of_their_own_whatever_the_namespace() {
        let mut seen = std::collections::BTreeSet::new();
        for nsid in 1..=3 {
            let disk = SimDisk::new(0, nsid, 8, 512, 1);
            let mut backing = disk.backing();
            for tag in 0..4 {
                let _pending = backing.submit(&BackingRequest { op: BackingOp::Flush, slba: 0, blocks: 0, tag, data: &[] });
            }
            let mut events = Vec::new();
            disk.take_events(&mut events);
            assert_eq!(events.len(), 4);
            for event in events {
                let Event::MediaBegan { serial, .. } = event else { panic!("{event:?}") };
                assert!(seen.insert(serial), "NSID {nsid}: #{serial}");
            }
        }
    }
}
