//! What each block may contain, and what a power cut may leave of it.
//!
//! A block has candidates: values that it may hold. A write's value is one from its submission. When the write is acknowledged,
//! every value whose own write had ended before this one was submitted is **superseded**. Values of writes that failed or were
//! lost stay possible until an acknowledged write follows; a lost one may still land until its guest's controller is disabled.
//! A read may return whatever was a candidate at some moment between its submission and its end, and tells which it was: what
//! was settled before the read and was not returned is **ruled out**.
//!
//! With a volatile cache a power cut may bring back what was superseded after the last flush was submitted. The destination has
//! everything durable when the record says "moved" (rule 3).
//!
//! Time here is the number of the event: what a guest has seen of an end is later than the end itself, and what it has sent is
//! earlier than its arrival, so whatever is concluded holds.

use super::super::content;
use super::super::event::{CommandId, End, Event, GuestId, Op, Side, Violation, owner_of};
use super::{Facts, violation, violation_at};
use dray_device::backing::BackingOp;
use dray_migration::RecordPhase;
use dray_nvme::status::{Status, StatusCodeType};
use std::collections::BTreeSet;

/// Not yet.
const NEVER: u64 = u64::MAX;

/// A value that a block may hold.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    value: CommandId,
    /// Who wrote it, and between when and when it may have reached the block.
    id: CommandId,
    submitted: u64,
    settled: u64,
    /// A read has shown, or an acknowledged write has made sure, that the block holds something else.
    ruled_out: u64,
    /// The same, of what is on its way to stable media: a flush that follows makes it final.
    superseded: u64,
    /// A power cut cannot bring it back, whatever was flushed.
    buried: bool,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// Empty = nobody has touched it.
    candidates: Vec<Candidate>,
    /// It may have been marked uncorrectable when it was moved.
    marked: bool,
}

#[derive(Debug)]
struct Namespace {
    nsid: u32,
    blocks: Vec<Block>,
    /// By side: what was superseded until then is gone for good.
    flushed: [u64; 2],
    /// By side: what was ruled out until then is gone for good.
    handed_over: [u64; 2],
    /// Blocks whose media has failed to be read.
    failed: BTreeSet<u64>,
    /// Blocks whose media has failed to be read alone, since the migration began.
    failed_alone: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Command {
    guest: GuestId,
    id: CommandId,
    op: Op,
    index: usize,
    slba: u64,
    blocks: u64,
    submitted: u64,
}

/// The model.
#[derive(Debug)]
pub struct Model {
    seed: u64,
    cached: bool,
    clock: u64,
    namespaces: Vec<Namespace>,
    commands: Vec<Command>,
    /// Writes that were lost and may still land.
    lost: Vec<Command>,
    /// Reads of the media under way: side, serial, namespace, blocks.
    reads: Vec<(Side, u64, usize, u64, u64)>,
    /// Where the migration goes from and to.
    ends: Option<(Side, Side)>,
}

impl Model {
    /// Before any command.
    #[must_use]
    pub fn new(facts: &Facts) -> Self {
        let namespace = |&(nsid, blocks, _): &(u32, u64, u32)| Namespace {
            nsid,
            blocks: vec![Block::default(); blocks as usize],
            flushed: [0; 2],
            handed_over: [0; 2],
            failed: BTreeSet::new(),
            failed_alone: BTreeSet::new(),
        };
        Self {
            seed: facts.seed,
            cached: facts.cached,
            clock: 0,
            namespaces: facts.namespaces.iter().map(namespace).collect(),
            commands: Vec::new(),
            lost: Vec::new(),
            reads: Vec::new(),
            ends: None,
        }
    }

    /// Something happened; `owner` serves by the last durable record.
    ///
    /// # Errors
    /// What a guest, a power cut or a hand-over must not show.
    pub fn see(&mut self, event: &Event, owner: Side) -> Result<(), Violation> {
        self.clock += 1;
        match event {
            Event::Submitted { guest, id, op, nsid, slba, blocks } => {
                let Some(index) = self.find(*nsid) else { return Ok(()) };
                let submitted = self.clock;
                let command = Command { guest: *guest, id: *id, op: *op, index, slba: *slba, blocks: *blocks, submitted };
                self.submitted(&command);
            }
            Event::Ended { id, end, .. } => {
                let Some(at) = self.commands.iter().position(|command| command.id == *id) else { return Ok(()) };
                let command = self.commands.swap_remove(at);
                return self.ended(&command, end, owner);
            }
            Event::Disabled { guest } => self.disabled(*guest),
            Event::MediaBegan { side, serial, op: BackingOp::Read, nsid, slba, blocks } => {
                let Some(index) = self.find(*nsid) else { return Ok(()) };
                self.reads.push((*side, *serial, index, *slba, *blocks));
            }
            Event::MediaBegan { op: BackingOp::WriteUncorrectable, nsid, slba, blocks, .. } => {
                let Some(index) = self.find(*nsid) else { return Ok(()) };
                let mut lost = *slba..slba + blocks;
                if let Some(lba) = lost.find(|lba| !self.namespaces[index].failed.contains(lba)) {
                    let what = format!("NSID {nsid} LBA {lba} is marked as unreadable, and its media never failed");
                    return Err(violation_at("nothing becomes unreadable", what, *nsid, lba));
                }
            }
            Event::MediaEnded { side, serial, status } => self.media_ended(*side, *serial, *status),
            Event::Begins { from, to } => {
                self.ends = Some((*from, *to));
                self.namespaces.iter_mut().for_each(|namespace| namespace.failed_alone.clear());
            }
            Event::Over { .. } => self.ends = None,
            Event::RecordBegun(record) if record.phase == RecordPhase::Moved => {
                for namespace in &mut self.namespaces {
                    let to = owner_of(record).unwrap_or(owner);
                    (namespace.flushed[to], namespace.handed_over[to]) = (self.clock, self.clock);
                }
            }
            Event::RecordDurable(record) => match record.phase {
                RecordPhase::Moved => self.mark(true),
                RecordPhase::Copying | RecordPhase::Undone => self.mark(false),
                RecordPhase::Done => {}
            },
            Event::HandedOver { nsid, different } if !different.is_empty() => {
                let what = format!("NSID {nsid}: {} blocks differ at the hand-over, {:?}…", different.len(), &different[..different.len().min(8)]);
                return Err(violation_at("equal media", what, *nsid, different[0]));
            }
            Event::PowerCut => self.commands.clear(),
            Event::Restarted { serving } => self.power_cut(*serving, true),
            Event::SidePowerCut { side } if *side == owner => self.power_cut(*side, false),
            Event::Rest { nsid, values, .. } => {
                let Some(index) = self.find(*nsid) else { return Ok(()) };
                return self.returned(index, 0, self.clock, values, "at rest");
            }
            _ => {}
        }
        Ok(())
    }

    fn find(&self, nsid: u32) -> Option<usize> {
        self.namespaces.iter().position(|namespace| namespace.nsid == nsid)
    }

    /// The blocks of a range, each with its first candidate.
    fn range(&mut self, index: usize, slba: u64, blocks: u64) -> impl Iterator<Item = (u64, &mut Block)> {
        let seed = self.seed;
        let Namespace { nsid, blocks: all, .. } = &mut self.namespaces[index];
        let end = (slba.saturating_add(blocks) as usize).min(all.len());
        let range = &mut all[(slba as usize).min(end)..end];
        (slba..).zip(range).map(move |(lba, block)| {
            if block.candidates.is_empty() {
                let value = content::initial(seed, *nsid, lba);
                block.candidates.push(Candidate { value, ..Candidate::new(0, 0, 0) });
            }
            (lba, block)
        })
    }

    fn submitted(&mut self, command: &Command) {
        self.commands.push(*command);
        if command.op.writes() {
            let value = if matches!(command.op, Op::Write { .. }) { command.id } else { content::ZERO };
            let candidate = Candidate { value, ..Candidate::new(command.id, command.submitted, NEVER) };
            self.range(command.index, command.slba, command.blocks).for_each(|(_, block)| block.candidates.push(candidate));
        }
    }

    fn ended(&mut self, command: &Command, end: &End, owner: Side) -> Result<(), Violation> {
        let Command { op, index, slba, submitted, .. } = *command;
        match (end, op) {
            (End::Lost, _) if op.writes() => self.lost.push(*command),
            (End::Lost, _) => {}
            (End::Done { values }, Op::Read | Op::Compare) => return self.returned(index, slba, submitted, values, "read"),
            (End::Done { .. }, Op::Flush) => {
                let flushed = &mut self.namespaces[index].flushed[owner];
                *flushed = submitted.max(*flushed);
            }
            (End::Done { .. }, _) => self.acknowledged(command, owner),
            (End::Failed(status), _) => {
                self.settle(command);
                return self.failed(command, *status);
            }
        }
        Ok(())
    }

    /// Whatever the write does, it has done.
    fn settle(&mut self, command: &Command) {
        if !command.op.writes() {
            return;
        }
        let (clock, id) = (self.clock, command.id);
        for (_, block) in self.range(command.index, command.slba, command.blocks) {
            block.candidates.iter_mut().filter(|candidate| candidate.id == id).for_each(|candidate| candidate.settled = clock);
        }
    }

    fn acknowledged(&mut self, command: &Command, owner: Side) {
        self.settle(command);
        let (clock, cached) = (self.clock, self.cached);
        let durable = matches!(command.op, Op::Write { fua: true } | Op::WriteZeroes { fua: true, .. });
        // What no read under way and no power cut can ask for is forgotten.
        let oldest = self.commands.iter().map(|command| command.submitted).min().unwrap_or(NEVER);
        let flushed = self.namespaces[command.index].flushed;
        let kept_until = flushed[self.ends.map_or(owner, |(from, _)| from)];
        for (_, block) in self.range(command.index, command.slba, command.blocks) {
            block.marked = false;
            for candidate in block.candidates.iter_mut().filter(|candidate| candidate.settled < command.submitted) {
                candidate.ruled_out = candidate.ruled_out.min(clock);
                candidate.superseded = candidate.superseded.min(clock);
                candidate.buried |= durable || !cached;
            }
            block.candidates.retain(|c| c.ruled_out >= oldest || !(c.buried || c.superseded <= kept_until));
        }
    }

    /// A read, or somebody who looks at rest, has found these values.
    fn returned(&mut self, index: usize, slba: u64, since: u64, values: &[CommandId], how: &str) -> Result<(), Violation> {
        let (clock, cached, nsid) = (self.clock, self.cached, self.namespaces[index].nsid);
        // A power cut may bring a mark back that a write had ended.
        let marked = values.contains(&content::UNREADABLE);
        let marks = if marked { self.namespaces[index].failed.clone() } else { BTreeSet::new() };
        for ((lba, block), &value) in self.range(index, slba, values.len() as u64).zip(values) {
            if block.marked || value == content::UNREADABLE && marks.contains(&lba) {
                continue;
            }
            let was = |c: &&Candidate| c.value == value && c.ruled_out >= since;
            let Some(first) = block.candidates.iter().filter(was).map(|c| c.submitted).min() else {
                return Err(wrong(nsid, lba, block, value, how));
            };
            let settled = block.candidates.iter().filter(was).all(|c| c.settled < since);
            for candidate in block.candidates.iter_mut().filter(|c| c.value != value && c.ruled_out == NEVER) {
                if candidate.settled < since.max(first) {
                    candidate.ruled_out = clock;
                    if settled {
                        candidate.superseded = candidate.superseded.min(clock);
                        candidate.buried |= !cached;
                    }
                }
            }
        }
        Ok(())
    }

    /// A command that failed: some statuses no fault explains.
    fn failed(&self, command: &Command, status: Status) -> Result<(), Violation> {
        let Command { op, index, slba, blocks, id, .. } = *command;
        let namespace = &self.namespaces[index];
        if op == Op::Read && status.sct() == StatusCodeType::MEDIA {
            let marked = namespace.blocks.iter().skip(slba as usize).take(blocks as usize).any(|block| block.marked);
            if !marked && namespace.failed.range(slba..slba + blocks).next().is_none() {
                let what = format!("NSID {} LBA {slba} +{blocks} cannot be read ({status}), and its media never failed", namespace.nsid);
                return Err(violation_at("nothing becomes unreadable", what, namespace.nsid, slba));
            }
        }
        let refusals = [
            Status::INVALID_OPCODE,
            Status::INVALID_FIELD,
            Status::INVALID_NAMESPACE,
            Status::PRP_OFFSET_INVALID,
            Status::CID_CONFLICT,
            Status::LBA_OUT_OF_RANGE,
        ];
        if matches!(op, Op::Read | Op::Write { .. } | Op::Flush) && refusals.iter().any(|refusal| status.is(*refusal)) {
            return Err(violation("commands are taken", format!("{op:?} {id:x}h is refused: {status}")));
        }
        Ok(())
    }

    /// Nothing that this guest's controller was given before reaches the media any more.
    fn disabled(&mut self, guest: GuestId) {
        for command in std::mem::take(&mut self.lost) {
            if command.guest == guest {
                self.settle(&command);
            } else {
                self.lost.push(command);
            }
        }
    }

    fn media_ended(&mut self, side: Side, serial: u64, status: Status) {
        let Some(at) = self.reads.iter().position(|read| (read.0, read.1) == (side, serial)) else { return };
        let (_, _, index, slba, blocks) = self.reads.swap_remove(at);
        if status.is_error() {
            let namespace = &mut self.namespaces[index];
            namespace.failed.extend(slba..slba + blocks);
            if blocks == 1 && self.ends.is_some_and(|(from, _)| from == side) {
                namespace.failed_alone.insert(slba);
            }
        }
    }

    /// The namespaces were moved, or not after all: blocks that could not be read are as they are marked.
    fn mark(&mut self, moved: bool) {
        if self.ends.is_none() {
            return;
        }
        for namespace in &mut self.namespaces {
            for lba in &namespace.failed_alone {
                if let Some(block) = namespace.blocks.get_mut(*lba as usize) {
                    block.marked = moved;
                }
            }
        }
    }

    /// The power of the side that serves has gone; with `all` that of guests and controllers too.
    fn power_cut(&mut self, serving: Side, all: bool) {
        for namespace in &mut self.namespaces {
            let (flushed, handed_over) = (namespace.flushed[serving], namespace.handed_over[serving]);
            for block in &mut namespace.blocks {
                block.candidates.retain(|c| !all || !c.buried && c.superseded > flushed && c.ruled_out > handed_over);
                for candidate in &mut block.candidates {
                    if !candidate.buried && candidate.superseded > flushed && candidate.ruled_out > handed_over {
                        (candidate.ruled_out, candidate.superseded) = (NEVER, NEVER);
                    }
                    if all {
                        candidate.settled = candidate.settled.min(self.clock);
                    }
                }
            }
            if all {
                (namespace.flushed, namespace.handed_over) = ([self.clock; 2], [self.clock; 2]);
            }
        }
        if all {
            self.lost.clear();
            self.commands.clear();
            self.reads.clear();
            self.ends = None;
        }
    }
}

impl Candidate {
    fn new(id: CommandId, submitted: u64, settled: u64) -> Self {
        Self { value: 0, id, submitted, settled, ruled_out: NEVER, superseded: NEVER, buried: false }
    }
}

#[cold]
fn wrong(nsid: u32, lba: u64, block: &Block, value: CommandId, how: &str) -> Violation {
    let known = block.candidates.iter().any(|candidate| candidate.value == value);
    let rule = match value {
        content::GARBAGE => "blocks are whole",
        _ if known => "nothing is rolled back",
        _ => "nothing acknowledged is lost",
    };
    let may: Vec<_> = block.candidates.iter().filter(|c| c.ruled_out == NEVER).map(|c| format!("{:x}h", c.value)).collect();
    let what = format!("NSID {nsid} LBA {lba} contains {value:x}h {how}; it may contain {}", may.join(", "));
    violation_at(rule, what, nsid, lba)
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
