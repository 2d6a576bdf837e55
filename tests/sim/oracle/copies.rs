//! The copies: one of a block at a time, of everything that the log says has changed, flushed before anything relies on them,
//! and none tried for ever (rules 1 to 3, 8 and 11).

use super::super::event::{Side, Violation};
use super::serving::Serving;
use super::{Facts, violation, violation_at};
use dray_device::backing::BackingOp;
use std::collections::BTreeMap;

/// Failures of copies of one block in one migration, until it is copied or marked. One that is marked counts from the start only
/// when something has changed since it was last marked: each round tries it again, and only changes make rounds.
const MOST_FAILURES: u32 = 200;

/// An operation on the media.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Where.
    pub side: Side,
    /// Its number there.
    pub serial: u64,
    /// What.
    pub op: BackingOp,
    /// Which namespace, by its place in the facts.
    pub index: usize,
    /// First block.
    pub slba: u64,
    /// Blocks.
    pub blocks: u64,
    /// A guest has asked for it.
    pub guests: bool,
    began: u64,
}

impl Operation {
    /// As it begins; `guests`: a guest has asked for it.
    #[must_use]
    pub fn new(side: Side, serial: u64, op: BackingOp, index: usize, slba: u64, blocks: u64, guests: bool) -> Self {
        Self { side, serial, op, index, slba, blocks, guests, began: 0 }
    }

    fn writes(&self) -> bool {
        matches!(self.op, BackingOp::Write { .. } | BackingOp::WriteZeroes { .. } | BackingOp::Deallocate | BackingOp::WriteUncorrectable)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let place = (self.side, self.index) == (other.side, other.index);
        place && self.slba < other.slba + other.blocks && other.slba < self.slba + self.blocks
    }
}

/// When a block changed, and when its copy began and ended.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    changed: u64,
    began: u64,
    ended: u64,
    /// Its media could not be read alone: it is marked instead, until somebody writes it.
    unreadable: bool,
}

#[derive(Debug)]
struct Namespace {
    nsid: u32,
    blocks: Vec<Block>,
    /// By side: when the last write ended, and when the last flush began that has succeeded.
    written: [u64; 2],
    flushed: [u64; 2],
    /// When the log last named anything of it.
    named: u64,
}

/// All copies.
#[derive(Debug)]
pub struct Copies {
    clock: u64,
    namespaces: Vec<Namespace>,
    /// Everything has to be copied after this.
    everything: u64,
    flights: Vec<Operation>,
    failures: BTreeMap<(Side, usize, u64), u32>,
    /// When a block was last marked as unreadable at the destination, by namespace and LBA.
    marked: BTreeMap<(usize, u64), u64>,
}

impl Copies {
    /// Before any.
    #[must_use]
    pub fn new(facts: &Facts) -> Self {
        let namespace = |&(nsid, blocks, _): &(u32, u64, u32)| Namespace {
            nsid,
            blocks: vec![Block::default(); blocks as usize],
            written: [0; 2],
            flushed: [0; 2],
            named: 0,
        };
        let namespaces = facts.namespaces.iter().map(namespace).collect();
        Self { clock: 0, namespaces, everything: 0, flights: Vec::new(), failures: BTreeMap::new(), marked: BTreeMap::new() }
    }

    /// The place of a namespace.
    #[must_use]
    pub fn find(&self, nsid: u32) -> Option<usize> {
        self.namespaces.iter().position(|namespace| namespace.nsid == nsid)
    }

    /// Another event.
    pub fn tick(&mut self) {
        self.clock += 1;
    }

    /// A migration begins: nothing counts as copied.
    pub fn begins(&mut self) {
        self.everything = self.clock;
        self.failures.clear();
        self.marked.clear();
        for namespace in &mut self.namespaces {
            // What is marked stays marked until it is written.
            for block in &mut namespace.blocks {
                *block = Block { unreadable: block.unreadable, ..Block::default() };
            }
        }
    }

    /// The log is complete from here on, and has nothing of before.
    pub fn log_begins(&mut self) {
        self.everything = self.clock;
    }

    /// The log says that a range has changed; `None` = the whole namespace.
    pub fn changed(&mut self, index: usize, range: Option<(u64, u64)>) {
        let clock = self.clock;
        let Some(namespace) = self.namespaces.get_mut(index) else { return };
        namespace.named = clock;
        let count = namespace.blocks.len() as u64;
        let (slba, blocks) = range.unwrap_or((0, count));
        let end = slba.saturating_add(blocks).min(count);
        for block in &mut namespace.blocks[slba.min(end) as usize..end as usize] {
            block.changed = clock;
        }
    }

    /// An operation begins.
    ///
    /// # Errors
    /// When a copy of the same block is under way.
    pub fn began(&mut self, operation: Operation, serving: &Serving) -> Result<(), Violation> {
        let operation = Operation { began: self.clock, ..operation };
        if operation.writes() && is_copy(operation.side, serving) {
            let other = self.flights.iter().find(|other| other.writes() && other.overlaps(&operation));
            if let Some(other) = other {
                let nsid = self.namespaces[operation.index].nsid;
                let range = |o: &Operation| format!("LBA {} +{}", o.slba, o.blocks);
                let what = format!("NSID {nsid}: {} is written while {} is", range(&operation), range(other));
                return Err(violation_at("one copy of a block at a time", what, nsid, operation.slba.max(other.slba)));
            }
        }
        self.flights.push(operation);
        Ok(())
    }

    /// An operation has ended.
    ///
    /// # Errors
    /// When the same copy has failed too often.
    pub fn ended(&mut self, side: Side, serial: u64, good: bool, serving: &Serving) -> Result<(), Violation> {
        let Some(at) = self.flights.iter().position(|flight| (flight.side, flight.serial) == (side, serial)) else { return Ok(()) };
        let operation = self.flights.swap_remove(at);
        let Some(namespace) = self.namespaces.get_mut(operation.index) else { return Ok(()) };
        let end = (operation.slba + operation.blocks).min(namespace.blocks.len() as u64);
        let range = operation.slba.min(end) as usize..end as usize;
        match operation.op {
            BackingOp::Flush if good => namespace.flushed[side] = namespace.flushed[side].max(operation.began),
            BackingOp::Flush => {}
            BackingOp::Read => {
                if !good && operation.blocks == 1 && serving.ends().is_some_and(|(from, _)| from == side) {
                    namespace.blocks[range].iter_mut().for_each(|block| block.unreadable = true);
                }
            }
            _ => {
                namespace.written[side] = self.clock;
                if good && is_copy(side, serving) {
                    for block in &mut namespace.blocks[range] {
                        *block = Block { began: operation.began, ended: self.clock, unreadable: false, ..*block };
                    }
                } else if good && side == serving.owner() {
                    namespace.blocks[range].iter_mut().for_each(|block| block.unreadable = false);
                }
            }
        }
        if good && operation.op == BackingOp::WriteUncorrectable && is_copy(side, serving) {
            self.was_marked(&operation);
        }
        // What guests ask for fails as often as they ask.
        let guests = operation.guests || operation.writes() && !is_copy(side, serving);
        if serving.ends().is_some() && !guests { self.count(&operation, good) } else { Ok(()) }
    }

    /// Blocks are marked at the destination: their copy has ended, with an error that is known.
    fn was_marked(&mut self, operation: &Operation) {
        let Operation { side, index, slba, blocks, .. } = *operation;
        let changed = self.namespaces[index].named.max(self.everything);
        for lba in slba..slba + blocks {
            if self.marked.insert((index, lba), self.clock).is_none_or(|before| changed > before) {
                self.failures.remove(&(1 - side, index, lba));
            }
        }
    }

    fn count(&mut self, operation: &Operation, good: bool) -> Result<(), Violation> {
        let Operation { side, index, slba, blocks, .. } = *operation;
        if good && self.failures.is_empty() || operation.op == BackingOp::Flush {
            return Ok(());
        }
        for lba in slba..slba + blocks {
            if good {
                self.failures.remove(&(side, index, lba));
                continue;
            }
            let failures = self.failures.entry((side, index, lba)).or_default();
            *failures += 1;
            if *failures > MOST_FAILURES {
                let nsid = self.namespaces[index].nsid;
                let what = format!("NSID {nsid} LBA {lba} has failed {failures} times at side {side}");
                return Err(violation_at("errors end", what, nsid, lba));
            }
        }
        Ok(())
    }

    /// A side's disks have lost what was not flushed; what was under way there has no effect any more.
    pub fn power_cut(&mut self, side: Side) {
        self.flights.retain(|flight| flight.side != side);
        for namespace in &mut self.namespaces {
            let flushed = namespace.flushed[side];
            for block in namespace.blocks.iter_mut().filter(|block| block.ended >= flushed) {
                block.began = 0;
            }
        }
    }

    /// Everything has started again.
    pub fn restarted(&mut self) {
        self.flights.clear();
    }

    /// The record says "moved" from here on.
    ///
    /// # Errors
    /// When something is not at the destination for good.
    pub fn moved(&self, to: Side) -> Result<(), Violation> {
        if let Some(flight) = self.flights.iter().find(|flight| flight.side == to && flight.writes()) {
            let what = format!("LBA {} +{} is being written at the destination when the record says moved", flight.slba, flight.blocks);
            return Err(violation("no copy in flight at the hand-over", what));
        }
        for namespace in &self.namespaces {
            let nsid = namespace.nsid;
            if namespace.written[to] > namespace.flushed[to] {
                return Err(violation("clean means flushed", format!("NSID {nsid} was not flushed at the destination behind its last write")));
            }
            let missing = |block: &Block| block.began <= block.changed.max(self.everything) && !block.unreadable;
            if let Some(lba) = namespace.blocks.iter().position(missing) {
                let Block { changed, began, .. } = namespace.blocks[lba];
                let log = self.everything;
                let what = format!("NSID {nsid} LBA {lba}: the log began at event {log} and named it at {changed}, its last copy began at {began}");
                return Err(violation_at("what changed is copied", what, nsid, lba as u64));
            }
        }
        Ok(())
    }
}

/// Whatever writes at the destination before the hand-over is a copy.
fn is_copy(side: Side, serving: &Serving) -> bool {
    serving.ends().is_some_and(|(from, to)| side == to && serving.owner() == from)
}

#[cfg(test)]
#[path = "copies_tests.rs"]
mod tests;
