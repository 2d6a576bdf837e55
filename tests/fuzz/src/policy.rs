//! Policies whose answers are any bytes, behind the guard, before the pump, the map and the copy.
//!
//! It asserts the host's guarantees. Complete: every range of an entry that was given back is dirty at that moment, whatever
//! the policy returned. Bounded: every answer that leaves the guard passes the role's checks, and checks of this target's own. Live: a policy that will not
//! drain does not keep the queue from being drained. Released only what was applied: never more than was shown. And of the copy:
//! a piece lies in its namespace, is dirty, is no longer than asked for; a sweep hands every dirty block out once.

use crate::input::Input;
use dray_device::poll::Time;
use dray_migration::extents::Extents;
use dray_migration::media::Geometry;
use dray_migration::{EntryQueue, Media, Pump, PumpLimits, QueueError};
use dray_nvme::cdq::{Changed, UdmqEntry};
use dray_policy::guard::{Guard, Limits};
use dray_policy::native::{Native, NativeFactory};
use dray_policy::packed::{Extent, Range};
use dray_policy::role::{
    Cdq, CdqAnswer, CdqQueue, CdqRequest, Copy, CopyAnswer, CopyRequest, MAX_EXTENTS, Marks, Role, RoundReport, Then, Tracking,
    TrackingAnswer, TrackingRequest,
};
use dray_policy::seam::{Exchange, Factory, Fault, Identity, Meter, Opening, Policy, Seat, Setup};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use zerocopy::FromBytes;

const MOST_STEPS: usize = 200;
/// Slots of the queue.
const SLOTS: u32 = 64;
/// Largest piece of a copy, in bytes.
const MOST_PIECE: usize = 32 << 10;
/// NSID, blocks, bytes of a block.
const NAMESPACES: [(u32, u64, u32); 2] = [(1, 5000, 512), (3, 333, 4096)];

/// What the policy does at its next calls.
#[derive(Clone, Default)]
struct Script(Arc<Mutex<Vec<u8>>>);

impl Script {
    fn set(&self, bytes: &[u8]) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = bytes.to_vec();
    }

    /// The bytes stay: the policy does the same until it is told otherwise.
    fn with<T>(&self, play: impl FnOnce(&mut Input<'_>) -> T) -> T {
        play(&mut Input::new(&self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// A role whose answers can be made of bytes.
trait Made: Role + Native {
    /// Asserts the bounds of an answer as the interface names them; the guard's own check is not asked.
    fn bounded(setup: &Setup, request: &Self::Request, answer: &Self::Answer);
    fn make(request: &Self::Request, answer: &mut Self::Answer, input: &mut Input<'_>);
}

fn nsid(input: &mut Input<'_>) -> u32 {
    match input.u8() {
        0..=159 => 1,
        160..=229 => 3,
        _ => input.number32(),
    }
}

/// Any bytes, in place of or behind records.
fn tail(into: &mut Vec<u8>, input: &mut Input<'_>) {
    let len = usize::from(input.u8().saturating_sub(200));
    into.extend_from_slice(input.bytes(len));
}

/// Asserts that blocks lie in a namespace that moves.
fn inside(setup: &Setup, nsid: u32, slba: u64, blocks: u32) {
    let size = setup.namespaces.iter().find(|namespace| namespace.nsid == nsid).map(|namespace| namespace.blocks);
    let size = size.unwrap_or_else(|| panic!("namespace {nsid} does not move"));
    assert!(u128::from(slba) + u128::from(blocks) <= size.into(), "{blocks} blocks at LBA {slba} leave namespace {nsid}");
}

impl Made for Cdq {
    fn bounded(setup: &Setup, request: &CdqRequest, answer: &CdqAnswer) {
        let (shown, count) = (request.entries.len() / 32, answer.ranges.len() / 16);
        assert!(answer.consumed as usize <= shown, "{} of {shown} entries consumed", answer.consumed);
        assert!(answer.ranges.len().is_multiple_of(16) && count <= shown * 4, "{count} ranges for {shown} entries");
        for range in answer.ranges.as_chunks().0.iter().map(Range::unpack) {
            inside(setup, range.nsid, range.slba, range.blocks);
        }
    }

    fn make(request: &CdqRequest, answer: &mut CdqAnswer, input: &mut Input<'_>) {
        let shown = (request.entries.len() / 32) as u32;
        answer.consumed = if input.flag() { input.number32() } else { shown.saturating_sub(u32::from(input.u8() & 3)) };
        let bits = input.u8();
        answer.marks = Marks {
            first: bits & 1 != 0,
            stopped: bits & 2 != 0,
            suspended: bits & 4 != 0,
            full: bits & 8 != 0,
            everything: bits & 0xf0 == 0xf0,
        };
        (answer.wait_us, answer.wait_entries) = (input.number32(), input.number32());
        for _ in 0..input.below(12) {
            let (nsid, slba, blocks) = (nsid(input), input.number(), input.number32());
            Range { slba, blocks, deallocated: input.flag(), nsid }.push(&mut answer.ranges);
        }
        tail(&mut answer.ranges, input);
    }
}

impl Made for Tracking {
    fn bounded(_: &Setup, request: &TrackingRequest, answer: &TrackingAnswer) {
        assert_eq!(answer.choices.len(), request.regions.len() / 32, "choices");
        for (region, choice) in dray_policy::packed::regions(&request.regions).zip(&answer.choices) {
            let chunk = 1u64 << (choice & 31);
            assert!(chunk <= 1 << 24 && chunk <= u64::from(region.blocks).next_power_of_two(), "{chunk} blocks of {region:?}");
            assert_eq!(choice & 0x60, 0, "reserved bits of a choice");
        }
    }

    fn make(request: &TrackingRequest, answer: &mut TrackingAnswer, input: &mut Input<'_>) {
        let shown = request.regions.len() / 32;
        let pattern = input.bytes(8);
        answer.choices.extend((0..shown).map(|i| pattern.get(i % pattern.len().max(1)).copied().unwrap_or(0) & 0x8f));
        if input.flag() {
            tail(&mut answer.choices, input);
        }
    }
}

impl Made for Copy {
    fn bounded(setup: &Setup, request: &CopyRequest, answer: &CopyAnswer) {
        let count = answer.extents.len() / 16;
        assert!(answer.extents.len().is_multiple_of(16) && count <= MAX_EXTENTS, "{count} extents");
        for extent in answer.extents.as_chunks().0.iter().map(Extent::unpack) {
            assert!(extent.blocks > 0, "an extent of no blocks");
            inside(setup, extent.nsid, extent.slba, extent.blocks);
        }
        let left = request.left_blocks > request.queued_blocks;
        let stays = count == 0 && answer.wait_us == 0 && answer.then == Then::GoOn;
        assert!(!(left && stays), "nothing to copy and no wait");
    }

    fn make(_: &CopyRequest, answer: &mut CopyAnswer, input: &mut Input<'_>) {
        for _ in 0..input.below(20) {
            let (nsid, slba, blocks) = (nsid(input), input.number(), input.number32() & ((1 << 30) - 1));
            let mut bytes = Extent { slba, blocks, nsid, ..Extent::unpack(&[0; 16]) }.pack();
            bytes[11] |= input.u8().saturating_sub(128) & 0xc0;
            answer.extents.extend_from_slice(&bytes);
        }
        tail(&mut answer.extents, input);
        (answer.bytes_per_s, answer.guest_iops_limit, answer.wait_us) = (input.number(), input.number32(), input.number32());
        answer.then = if input.flag() { Then::SwitchOver } else { Then::GoOn };
    }
}

struct Hostile {
    script: Script,
}

impl<R: Made> Policy<R> for Hostile {
    fn call(&mut self, request: &R::Request, answer: &mut R::Answer) -> Result<(), Fault> {
        self.script.with(|input| match input.u8() {
            255 => Err(Fault::Trap("unreachable".into())),
            254 => Err(Fault::Deadline),
            253 => Err(Fault::Memory),
            kind => {
                R::make(request, answer, input);
                if kind == 252 { Err(Fault::Malformed("halfway".into())) } else { Ok(()) }
            }
        })
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        self.script.with(|input| match input.bytes(usize::MAX).len() % 5 {
            0 => Ok(None),
            1 => Err(Fault::Trap("in save".into())),
            2 => Ok(Some(vec![1; dray_policy::seam::MAX_STATE_BYTES + 1])),
            len => Ok(Some(vec![1; len])),
        })
    }
}

struct Maker {
    identity: Identity,
    script: Script,
}

impl<R: Made> Factory<R> for Maker {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&mut self, _: &Opening<R>, _: Option<&[u8]>) -> Result<Box<dyn Policy<R>>, Fault> {
        let refuses = self.script.with(|input| input.u8() == 251);
        if refuses { Err(Fault::Refused("no".into())) } else { Ok(Box::new(Hostile { script: self.script.clone() })) }
    }
}

struct Counting(Mutex<u64>);

impl Meter for Counting {
    fn now_ns(&self) -> u64 {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now += 10;
        *now
    }
}

/// A guard around a hostile policy that keeps what it was opened with, to check its answers.
struct Checked<R: Made> {
    guard: Guard<R>,
    opening: Opening<R>,
}

impl<R: Made> Checked<R> {
    fn new(opening: Opening<R>, script: &Script, max_faults: u64) -> Self {
        let fallback = Box::new(NativeFactory::<R>::new());
        let limits = Limits { max_faults, save_every: 3, record_every: 2 };
        let mut guard = Guard::new(Box::new(maker(script)), fallback, Box::new(Counting(Mutex::new(0))), limits);
        guard.open(opening.clone());
        Self { guard, opening }
    }

    /// Another version may take over, if its trial goes well.
    fn swap(&mut self, script: &Script) {
        let _refused = self.guard.swap(Box::new(maker(script)));
    }

    fn ask_now(&mut self, request: R::Request) -> R::Answer {
        self.ask(Box::new(Exchange { request, ..Exchange::default() }));
        self.poll().expect("a guard answers in place").answer
    }
}

fn maker(script: &Script) -> Maker {
    Maker { identity: Identity { component: "hostile".into(), sha256: "00".into() }, script: script.clone() }
}

impl<R: Made> Seat<R> for Checked<R> {
    fn identity(&self) -> Identity {
        self.guard.identity()
    }
    fn open(&mut self, opening: Opening<R>) {
        self.guard.open(opening);
    }
    fn ask(&mut self, exchange: Box<Exchange<R>>) {
        self.guard.ask(exchange);
    }
    fn poll(&mut self) -> Option<Box<Exchange<R>>> {
        let exchange = self.guard.poll()?;
        let Opening { setup, extra } = &self.opening;
        let checked = R::check(setup, extra, &exchange.request, &exchange.answer);
        R::bounded(setup, &exchange.request, &exchange.answer);
        assert!(checked.is_ok(), "{checked:?} behind the guard: {:?}", exchange.answer);
        Some(exchange)
    }
    fn stats(&self) -> dray_policy::seam::SeatStats {
        self.guard.stats()
    }
}

/// A ring as its reader sees it, that remembers what was given back.
#[derive(Default)]
struct Ring {
    entries: VecDeque<[u8; 32]>,
    taken: usize,
    given: Vec<[u8; 32]>,
}

impl EntryQueue for Ring {
    fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        let n = max.min(self.entries.len() - self.taken);
        self.entries.range(self.taken..self.taken + n).for_each(|entry| into.extend_from_slice(entry));
        self.taken += n;
        n
    }
    fn waiting(&mut self) -> u32 {
        (self.entries.len() - self.taken) as u32
    }
    fn rewind(&mut self, entries: u32) {
        assert!(entries as usize <= self.taken, "{entries} shown again, {} were taken", self.taken);
        self.taken -= entries as usize;
    }
    fn give_back(&mut self, _: Time, entries: u32) -> Result<(), QueueError> {
        assert!(entries as usize <= self.taken, "{entries} given back, {} were shown", self.taken);
        self.given.extend(self.entries.drain(..entries as usize));
        self.taken -= entries as usize;
        Ok(())
    }
}

struct Bench {
    now: Time,
    media: Media,
    ring: Ring,
    pump: Pump,
    script: Script,
    cdq: Checked<Cdq>,
    tracking: Checked<Tracking>,
    copy: Checked<Copy>,
    extents: Extents,
    round: u32,
}

/// Runs one session.
///
/// # Panics
/// When a guarantee is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bench = Bench::new(&mut input);
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        bench.step(&mut input);
    }
    bench.end();
}

impl Bench {
    fn new(input: &mut Input<'_>) -> Self {
        let bits = input.u8();
        let geometries = NAMESPACES.map(|(source, blocks, block_bytes)| Geometry { source, destination: source, blocks, block_bytes });
        let media = Media::new(&geometries).expect("media");
        let setup = Setup {
            migration: 1,
            seed: 7,
            now_us: 0,
            namespaces: media.infos(),
            regions: media.regions() as u32,
            region_bytes: 32,
            settings: Vec::new(),
        };
        let kind = if bits & 1 == 0 { 0 } else { 0xc0 };
        let queue = CdqQueue { id: 0, kind, cntlid: 1, slots: SLOTS, entry_bytes: 32, phase_byte: 31, phase_mask: 1 };
        let script = Script::default();
        let most = if bits & 2 == 0 { u64::MAX } else { 3 };
        Self {
            now: Time(1_000),
            media,
            ring: Ring::default(),
            pump: Pump::new(queue, PumpLimits::default(), Time(0)),
            cdq: Checked::new(Opening { setup: setup.clone(), extra: queue }, &script, most),
            tracking: Checked::new(Opening { setup: setup.clone(), extra: () }, &script, most),
            copy: Checked::new(Opening { setup, extra: () }, &script, most),
            script,
            extents: Extents::default(),
            round: 0,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() & 15 {
            0..=2 => self.report(input),
            3..=5 => {
                let len = usize::from(input.u8());
                self.script.set(input.bytes(len));
            }
            6 | 7 => self.drain(),
            8 => self.now = self.now.after_us(input.number() % 10_000_000),
            9 => self.track(input),
            10 | 11 => self.order(input),
            12 => {
                self.copy_some(input.below(16));
            }
            13 => self.pump.hurry(input.flag()),
            14 => match input.below(3) {
                0 => self.cdq.swap(&self.script),
                1 => self.tracking.swap(&self.script),
                _ => self.copy.swap(&self.script),
            },
            _ => {
                let (at, slba, blocks) = (input.below(2), input.number(), input.number() % 4096);
                if let Some(namespace) = self.media.namespace(at) {
                    let size = namespace.geometry.blocks;
                    let slba = slba % size;
                    namespace.take(slba, blocks.min(size - slba));
                }
            }
        }
    }

    /// The controller posts entries, as far as there is room.
    fn report(&mut self, input: &mut Input<'_>) {
        for _ in 0..=input.below(20) {
            if self.ring.entries.len() + 1 >= SLOTS as usize {
                return;
            }
            let mut entry = [0; 32];
            entry[..4].copy_from_slice(&nsid(input).to_le_bytes());
            entry[4..8].copy_from_slice(&input.number32().to_le_bytes());
            entry[8..16].copy_from_slice(&input.number().to_le_bytes());
            entry[31] = if input.flag() { input.u8() } else { 1 };
            self.ring.entries.push_back(entry);
        }
    }

    fn drain(&mut self) {
        self.now = self.now.after_us(5);
        self.pump.poll(self.now, &mut self.ring, Some(&mut self.cdq), &mut self.media).expect("a queue that is there");
        let given = std::mem::take(&mut self.ring.given);
        if !self.pump.is_known() {
            return;
        }
        while self.media.fill_some() {}
        for bytes in given {
            let entry = UdmqEntry::read_from_bytes(&bytes).expect("32 bytes");
            for namespace in self.media.namespaces() {
                let (of, size) = (namespace.geometry.source, namespace.geometry.blocks);
                let (slba, blocks) = match entry.changed() {
                    Changed::Range { nsid, slba, blocks } if nsid == of => (slba, blocks),
                    Changed::Namespace { nsid } if nsid == of || nsid == u32::MAX => (0, size),
                    Changed::Unknown => (0, size),
                    _ => continue,
                };
                let end = slba.saturating_add(blocks).min(size);
                assert!(slba >= end || namespace.all_marked(slba, end - slba), "{entry:?} was given back and is not dirty");
            }
        }
    }

    fn track(&mut self, input: &mut Input<'_>) {
        self.round = self.round.wrapping_add(1);
        let mut request = TrackingRequest { now_us: self.now.0 / 1000, ..TrackingRequest::default() };
        let (number, duration_us) = (self.round, input.number());
        let (copied_blocks, zero_blocks, dirtied_blocks) = (input.number(), input.number(), input.number());
        request.last = input.flag().then_some(RoundReport { number, duration_us, copied_blocks, zero_blocks, dirtied_blocks });
        self.media.pack(self.now.0 as u32, &mut request.regions);
        let answer = self.tracking.ask_now(request);
        self.media.plan(&answer.choices);
        if input.flag() {
            self.media.begin_round();
        }
        if input.flag() {
            self.media.release_held();
        }
    }

    fn order(&mut self, input: &mut Input<'_>) {
        let mut request = CopyRequest {
            now_us: self.now.0 / 1000,
            round: self.round,
            left_blocks: self.media.dirty_blocks(),
            queued_blocks: self.extents.queued_blocks(&self.media),
            dirtied_per_s: input.number(),
            copied_per_s: input.number(),
            peer_us: input.number32(),
            guest_iops: input.number32(),
            downtime_estimate_us: input.number32(),
            downtime_budget_us: input.number32(),
            may_throttle: input.flag(),
            ..CopyRequest::default()
        };
        self.media.pack(self.now.0 as u32, &mut request.regions);
        let answer = self.copy.ask_now(request);
        self.extents.order(&answer.extents, &self.media);
    }

    /// Takes pieces as the engine does: clear, then read.
    fn copy_some(&mut self, most: usize) -> u64 {
        let mut copied = 0;
        for _ in 0..most {
            let Some(piece) = self.extents.next(&mut self.media, MOST_PIECE, &|_| None) else { break };
            let namespace = self.media.namespace(piece.namespace).expect("a namespace that moves");
            let geometry = namespace.geometry;
            assert!(piece.blocks > 0 && piece.end() <= geometry.blocks, "{piece:?} leaves its namespace");
            assert!(piece.blocks * u64::from(geometry.block_bytes) <= MOST_PIECE as u64, "{piece:?} is too long");
            assert!(namespace.all_marked(piece.slba, piece.blocks), "{piece:?} is not dirty");
            copied += piece.blocks;
            namespace.take(piece.slba, piece.blocks);
            namespace.copied(piece.slba, piece.blocks);
        }
        copied
    }

    /// The queue is drained whatever the policy does, and a sweep copies what is dirty, once.
    fn end(mut self) {
        for _ in 0..40 {
            self.now = self.now.after_us(20_000);
            self.drain();
        }
        assert!(self.ring.entries.is_empty(), "{} entries are left in the queue after 0.8 s", self.ring.entries.len());
        while self.media.fill_some() {}
        self.media.release_held();
        let dirty = self.media.dirty_blocks();
        self.extents.sweep();
        let mut copied = 0;
        for _ in 0..400 {
            copied += self.copy_some(64);
            if self.extents.is_exhausted(&self.media) {
                break;
            }
        }
        assert!(self.media.is_clean(), "{} of {dirty} dirty blocks are left by a sweep", self.media.dirty_blocks());
        assert!(copied <= dirty, "{copied} blocks copied, {dirty} were dirty");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_sessions_are_well() {
        run(&[]);
        run(&[0; 64]);
        run(&[0xff; 200]);
    }
}
