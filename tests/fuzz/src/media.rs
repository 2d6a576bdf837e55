//! The backing that the controller's targets put under a namespace: it checks every operation that it gets, ends it when and
//! how the input says, and rewrites guest memory while the controller is in the middle of a poll.

use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::memory::{Arena, DmaBuffer, Segment};
use dray_device::poll::Time;
use dray_nvme::status::Status;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a logical block.
pub const BLOCK: usize = 512;

/// Writes to guest memory that happen whenever the controller calls a backing: between two of its reads of one poll.
#[derive(Clone, Debug, Default)]
pub struct Meddler {
    writes: Arc<Mutex<VecDeque<(DmaBuffer, usize, Vec<u8>)>>>,
}

impl Meddler {
    /// Adds a write, to be made at one of the next calls. At most 64 wait.
    pub fn add(&self, memory: &DmaBuffer, at: usize, bytes: &[u8]) {
        let mut writes = lock(&self.writes);
        if writes.len() < 64 {
            writes.push_back((memory.clone(), at, bytes.to_vec()));
        }
    }

    /// Forgets what waits.
    pub fn clear(&self) {
        lock(&self.writes).clear();
    }

    fn strike(&self) {
        let write = lock(&self.writes).pop_front();
        if let Some((memory, at, bytes)) = write
            && let Some(place) = memory.part(at.min(memory.len()), bytes.len().min(memory.len() - at.min(memory.len())))
        {
            place.write(&bytes[..place.len()]);
        }
    }
}

/// How operations end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner(pub u8);

impl Manner {
    fn is_later(self) -> bool {
        self.0 & 3 == 1
    }
    fn is_busy(self) -> bool {
        self.0 & 3 == 2
    }
    fn fails(self) -> bool {
        self.0 & 3 == 3
    }
    fn is_newest_first(self) -> bool {
        self.0 & 4 != 0
    }
    fn holds(self) -> bool {
        self.0 & 8 != 0
    }
}

/// What may happen to a namespace.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// No operation but reads and flushes.
    pub read_only: bool,
    /// No operation at all.
    pub untouched: bool,
    /// Changes lie in one of these ranges of blocks, if there is a list: those that whole commands were about.
    pub ranges: Option<Vec<(u64, u64)>>,
    /// Memory that data may lie in: arena, first byte, the byte after the last, and whether reads may write it. Arenas that
    /// are not named are the controller's own.
    pub memory: Vec<(Arc<Arena>, usize, usize, bool)>,
}

/// A piece of memory that an operation holds.
type Piece = (Arc<Arena>, usize, usize);

#[derive(Debug)]
struct Pending {
    op: BackingOp,
    slba: u64,
    blocks: u64,
    data: Vec<Piece>,
    tag: u64,
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    manner: Manner,
    turn: bool,
    rules: Rules,
    pending: VecDeque<Pending>,
    most_pending: usize,
    meddler: Meddler,
}

/// The harness's handle on a namespace's media.
#[derive(Clone, Debug)]
pub struct Media {
    state: Arc<Mutex<State>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Media {
    /// `blocks` blocks filled with `byte`, of which `most_pending` operations may be under way.
    #[must_use]
    pub fn new(blocks: usize, byte: u8, most_pending: usize, meddler: &Meddler) -> Self {
        let state = State {
            bytes: vec![byte; blocks * BLOCK],
            manner: Manner::default(),
            turn: false,
            rules: Rules::default(),
            pending: VecDeque::new(),
            most_pending,
            meddler: meddler.clone(),
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// The backing for the controller.
    #[must_use]
    pub fn backing(&self) -> Box<dyn Backing> {
        let blocks = (lock(&self.state).bytes.len() / BLOCK) as u64;
        Box::new(MediaBacking { state: Arc::clone(&self.state), blocks })
    }

    /// Says how operations end from now on.
    pub fn set_manner(&self, manner: Manner) {
        lock(&self.state).manner = manner;
    }

    /// Changes the rules.
    pub fn rules(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut lock(&self.state).rules);
    }

    /// A block's bytes.
    #[must_use]
    pub fn block(&self, at: usize) -> Vec<u8> {
        lock(&self.state).bytes[at * BLOCK..][..BLOCK].to_vec()
    }

    /// Whether all bytes are that one.
    #[must_use]
    pub fn is_all(&self, byte: u8) -> bool {
        lock(&self.state).bytes.iter().all(|b| *b == byte)
    }

    /// Operations under way that have data in memory.
    #[must_use]
    pub fn pending_with_data(&self) -> usize {
        lock(&self.state).pending.iter().filter(|pending| !pending.data.is_empty()).count()
    }

    /// Operations under way.
    #[must_use]
    pub fn pending(&self) -> usize {
        lock(&self.state).pending.len()
    }
}

impl State {
    fn judge(&self, op: BackingOp, slba: u64, blocks: u64, data: &[Piece]) {
        let rules = &self.rules;
        assert!(!rules.untouched, "{op:?} on a namespace that is not the guest's");
        if op == BackingOp::Flush {
            return;
        }
        let end = slba.checked_add(blocks).expect("a range that wraps");
        assert!(end as usize * BLOCK <= self.bytes.len(), "{op:?} of {blocks} blocks at {slba} leaves the namespace");
        if op != BackingOp::Read {
            assert!(!rules.read_only, "{op:?} of {blocks} blocks at {slba} of a write-protected namespace");
            let ranges = rules.ranges.as_deref();
            let named = ranges.is_none_or(|ranges| ranges.iter().any(|(from, to)| *from <= slba && end <= *to));
            assert!(named, "{op:?} of {blocks} blocks at {slba} is no command's: {ranges:?}");
        }
        if matches!(op, BackingOp::Read | BackingOp::Write { .. }) {
            let bytes: usize = data.iter().map(|(_, _, len)| len).sum();
            assert_eq!(bytes as u64, blocks * BLOCK as u64, "data of {op:?} at {slba}");
        }
        for (arena, at, len) in data {
            let known = || rules.memory.iter().filter(|place| Arc::ptr_eq(&place.0, arena));
            let own = known().next().is_none();
            let writes = op == BackingOp::Read;
            // Pieces of two mappings may have been joined, where they lie one behind the other in the arena.
            let (mut covered, end) = (*at, at + len);
            while covered < end
                && let Some(place) = known().find(|(_, from, to, writable)| (from..to).contains(&&covered) && (*writable || !writes))
            {
                covered = place.2;
            }
            let inside = covered >= end;
            assert!(own || inside, "{op:?} with data at {at:#x} + {len:#x}, which is not mapped for that");
        }
    }

    fn perform(&mut self, op: BackingOp, slba: u64, blocks: u64, data: &[Piece]) {
        self.judge(op, slba, blocks, data);
        if op == BackingOp::Flush {
            return;
        }
        let mut at = slba as usize * BLOCK;
        let end = at + blocks as usize * BLOCK;
        match op {
            BackingOp::Read | BackingOp::Write { .. } => {
                for (arena, offset, len) in data {
                    let segment = Segment::new(arena, *offset, *len).expect("a segment");
                    match op {
                        BackingOp::Read => segment.write(&self.bytes[at..at + len]),
                        _ => segment.read(&mut self.bytes[at..at + len]),
                    }
                    at += len;
                }
            }
            _ => self.bytes[at..end].fill(0),
        }
    }
}

struct MediaBacking {
    state: Arc<Mutex<State>>,
    blocks: u64,
}

impl Backing for MediaBacking {
    fn info(&self) -> BackingInfo {
        BackingInfo { block_bytes: BLOCK as u32, blocks: self.blocks, volatile_cache: true, deallocated_reads_zero: true }
    }

    fn can_write_uncorrectable(&self) -> bool {
        true
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let mut state = lock(&self.state);
        state.meddler.strike();
        let &BackingRequest { op, slba, blocks, tag, .. } = request;
        let data: Vec<Piece> = request.data.iter().map(|s| (Arc::clone(s.arena()), s.offset(), s.len())).collect();
        state.judge(op, slba, blocks, &data);
        state.turn = !state.turn;
        if state.manner.is_busy() && state.turn {
            return Submitted::Busy;
        }
        if state.manner.fails() && state.turn {
            return Submitted::Done(Status::INTERNAL_ERROR);
        }
        if state.manner.is_later() {
            state.pending.push_back(Pending { op, slba, blocks, data, tag });
            assert!(state.pending.len() <= state.most_pending, "{} operations under way", state.pending.len());
            return Submitted::Pending;
        }
        state.perform(op, slba, blocks, &data);
        Submitted::Done(Status::SUCCESS)
    }

    fn prefetch(&self, _slba: u64, _bytes: usize) {
        lock(&self.state).meddler.strike();
    }

    fn commit(&mut self) {
        lock(&self.state).meddler.strike();
    }

    fn poll(&mut self, _now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        let mut state = lock(&self.state);
        state.meddler.strike();
        let mut count = 0;
        while !state.manner.holds() && count < 4 {
            let newest = state.manner.is_newest_first();
            let next = if newest { state.pending.pop_back() } else { state.pending.pop_front() };
            let Some(Pending { op, slba, blocks, data, tag }) = next else { break };
            state.perform(op, slba, blocks, &data);
            done(tag, if state.manner.fails() { Status::INTERNAL_ERROR } else { Status::SUCCESS });
            count += 1;
        }
        count
    }

    fn in_flight(&self) -> usize {
        lock(&self.state).pending.len()
    }
}
