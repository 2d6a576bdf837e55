//! The log of changes: whatever a guest's write has changed is in the queue before the write ends (rule 6), and slots are given
//! back for entries that were there. Entries that lie, and events that are not asked for again, are objected to.

use super::super::event::{CommandId, End, Event, GuestId, Op, Side, Violation};
use super::violation;
use dray_device::backing::BackingOp;
use dray_device::poll::Time;
use dray_nvme::cdq::{Changed, Esa, UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_nvme::command::{
    AdminOpcode, CdqCdw10, CdqCreateCdw11, CdqDeleteCdw11, CdqFeatureCdw11, CdqSelect, FeaturesCdw10, MigrationSendCdw10,
    MigrationSendSelect, SubmissionEntry, SuspendCdw11, SuspendType, TrackSendCdw10, TrackSendLogCdw11, TrackSendSelect,
};
use dray_nvme::feature::FeatureId;
use zerocopy::FromBytes;

/// CNTLID of the first guest's controller; the others follow.
pub const FIRST_CNTLID: u16 = 2;
/// Virtual time that entries may lie in a live queue, and that events may stay unasked for, while the driver sends other commands.
const PATIENCE_US: u64 = 500_000;

/// A controller data queue.
#[derive(Debug)]
struct Queue {
    side: Side,
    id: u16,
    cntlid: u16,
    /// Slots; not known before its creation is answered.
    slots: Option<u32>,
    /// The slot of the first entry.
    first: u32,
    seen: u64,
    released: u64,
    /// Entries seen up to the last one that said that the queue is full.
    last: u64,
    head: u32,
    /// Logging runs since this event.
    since: Option<u64>,
    /// Logging has ended since it was last asked for: the answer, which may be late, does not say that it runs.
    over: bool,
    lying: Option<Time>,
}

/// A guest's command under way.
#[derive(Debug)]
struct Command {
    id: CommandId,
    guest: GuestId,
    op: Op,
    nsid: u32,
    slba: u64,
    blocks: u64,
    /// Side, queue and logging that it was sent under.
    log: Option<(Side, u16, u64)>,
    /// Blocks that no entry has named yet: from and to.
    unnamed: Vec<(u64, u64)>,
    /// The media was asked for exactly this.
    touched: bool,
}

/// Asynchronous event requests of one side.
#[derive(Clone, Copy, Debug, Default)]
struct Requests {
    outstanding: u32,
    none_since: Option<Time>,
}

/// What the log makes known.
pub enum News {
    /// Nothing.
    Nothing,
    /// Logging has begun; what was before is not in it.
    Begins(Side),
    /// A range, or a whole namespace, has changed.
    Changed(Side, u32, Option<(u64, u64)>),
}

/// All queues, and the commands that they are about.
#[derive(Debug, Default)]
pub struct Log {
    clock: u64,
    queues: Vec<Queue>,
    commands: Vec<Command>,
    /// Where each guest's slot points.
    pointed: Vec<Side>,
    requests: [Requests; 2],
}

impl Log {
    /// A guest has asked for exactly this read.
    #[must_use]
    pub fn is_guest_read(&self, nsid: u32, slba: u64, blocks: u64) -> bool {
        let read = |command: &Command| matches!(command.op, Op::Read | Op::Compare);
        self.commands.iter().any(|c| read(c) && (c.nsid, c.slba, c.blocks) == (nsid, slba, blocks))
    }

    /// Guests that there are.
    pub fn guests(&self) -> impl Iterator<Item = GuestId> {
        0..self.pointed.len()
    }

    /// Something happened.
    ///
    /// # Errors
    /// A change that is not in the log, a head where no entry was, entries or events that are left alone.
    pub fn see(&mut self, at: Time, event: &Event, owner: Side) -> Result<News, Violation> {
        self.clock += 1;
        match event {
            Event::Submitted { guest, id, op, nsid, slba, blocks } => {
                self.submitted(*guest, owner, Command::new(*id, *guest, *op, *nsid, *slba, *blocks));
            }
            Event::Ended { id, end, .. } => return self.ended(*id, end).map(|()| News::Nothing),
            Event::Pointed { guest, side } => {
                self.know(*guest, owner);
                self.pointed[*guest] = *side;
            }
            Event::MediaBegan { op, nsid, slba, blocks, .. } if *op != BackingOp::Read => self.touched(*nsid, *slba, *blocks),
            Event::CdqEntry { side, cdqid, cntlid, slot, bytes } => return Ok(self.entry(at, (*side, *cdqid, *cntlid, *slot), bytes)),
            Event::Admin { side, command } => return self.admin(at, *side, command).map(|()| News::Nothing),
            Event::AdminEnded { side, command, completion } => {
                if let Some(id) = deleted(command) {
                    self.forget(*side, id);
                } else if !completion.status().is_error() {
                    return Ok(self.admin_ended(*side, command, completion.dw0));
                }
            }
            Event::AsyncEvent { side, .. } => {
                let requests = &mut self.requests[*side];
                requests.outstanding = requests.outstanding.saturating_sub(1);
                if requests.outstanding == 0 {
                    requests.none_since = Some(at);
                }
            }
            Event::CdqUnmapped { side, cdqid } => self.forget(*side, *cdqid),
            Event::ManagementReset { side } | Event::SidePowerCut { side } => self.reset(*side),
            Event::PowerCut => {
                self.commands.clear();
                (0..2).for_each(|side| self.reset(side));
            }
            Event::Restarted { serving } => self.pointed.fill(*serving),
            _ => {}
        }
        Ok(News::Nothing)
    }

    /// Nothing more will happen.
    ///
    /// # Errors
    /// A command that has not ended.
    pub fn finish(&self) -> Result<(), Violation> {
        match self.commands.first() {
            Some(Command { guest, id, op, .. }) => Err(violation("every command ends", format!("guest {guest}: {op:?} {id:x}h has not"))),
            None => Ok(()),
        }
    }

    fn know(&mut self, guest: GuestId, owner: Side) {
        if self.pointed.len() <= guest {
            self.pointed.resize(guest + 1, owner);
        }
    }

    fn reset(&mut self, side: Side) {
        self.queues.retain(|queue| queue.side != side);
        self.requests[side] = Requests::default();
    }

    fn forget(&mut self, side: Side, id: u16) {
        self.queues.retain(|queue| (queue.side, queue.id) != (side, id));
    }

    fn interrupt(&mut self, which: impl Fn(&Queue) -> bool) {
        self.queues.iter_mut().filter(|queue| which(queue)).for_each(|queue| (queue.since, queue.over) = (None, true));
    }

    fn find(&mut self, side: Side, id: u16) -> Option<&mut Queue> {
        self.queues.iter_mut().find(|queue| (queue.side, queue.id) == (side, id))
    }

    fn submitted(&mut self, guest: GuestId, owner: Side, mut command: Command) {
        self.know(guest, owner);
        if command.op.writes() {
            let (side, cntlid) = (self.pointed[guest], FIRST_CNTLID + guest as u16);
            let queue = self.queues.iter().find(|queue| (queue.side, queue.cntlid) == (side, cntlid));
            command.log = queue.and_then(|queue| queue.since.map(|since| (side, queue.id, since)));
            if command.log.is_some() {
                command.unnamed.push((command.slba, command.slba + command.blocks));
            }
        }
        self.commands.push(command);
    }

    fn ended(&mut self, id: CommandId, end: &End) -> Result<(), Violation> {
        let Some(at) = self.commands.iter().position(|command| command.id == id) else { return Ok(()) };
        let command = self.commands.swap_remove(at);
        let Some((side, queue, since)) = command.log else { return Ok(()) };
        let logged = self.find(side, queue).is_some_and(|queue| queue.since == Some(since));
        let changed = match end {
            End::Done { .. } => true,
            End::Failed(_) => command.touched,
            End::Lost => false,
        };
        if !(logged && changed) || command.unnamed.is_empty() {
            return Ok(());
        }
        let Command { guest, op, nsid, unnamed, .. } = &command;
        let what = format!("guest {guest}: {op:?} {id:x}h has ended ({end:?}), and no entry names NSID {nsid} LBAs {unnamed:?}");
        Err(violation("the entry comes before the completion", what))
    }

    /// Only what is certainly this command's own operation counts.
    fn touched(&mut self, nsid: u32, slba: u64, blocks: u64) {
        let same = |c: &Command| c.op.writes() && (c.nsid, c.slba, c.blocks) == (nsid, slba, blocks);
        if self.commands.iter().filter(|command| same(command)).count() == 1 {
            self.commands.iter_mut().filter(|command| same(command)).for_each(|command| command.touched = true);
        }
    }

    fn entry(&mut self, at: Time, (side, id, cntlid, slot): (Side, u16, u16, u32), bytes: &[u8; UDMQ_ENTRY_BYTES]) -> News {
        let entry = UdmqEntry::read_from_bytes(bytes).unwrap_or_default();
        let clock = self.clock;
        if self.find(side, id).is_none() {
            self.queues.push(Queue::new(side, id, cntlid, None, slot));
        }
        if let Some(queue) = self.find(side, id) {
            queue.seen += 1;
            queue.lying.get_or_insert(at);
            match entry.esa() {
                // The log goes on after Resume.
                Esa::FIRST if queue.slots.is_some() => (queue.since, queue.over) = (queue.since.or(Some(clock)), false),
                esa if esa.is_last() => {
                    (queue.since, queue.over) = (None, true);
                    if esa == Esa::FULL {
                        queue.last = queue.seen;
                    }
                }
                _ => {}
            }
        }
        let (nsid, range) = match entry.changed() {
            Changed::Range { nsid, slba, blocks } => (nsid, Some((slba, blocks))),
            Changed::Namespace { nsid } => (nsid, None),
            Changed::Nothing | Changed::Unknown => return News::Nothing,
        };
        let (first, end) = range.map_or((0, u64::MAX), |(slba, blocks)| (slba, slba.saturating_add(blocks)));
        for command in self.commands.iter_mut().filter(|c| c.nsid == nsid && c.log.is_some_and(|log| (log.0, log.1) == (side, id))) {
            subtract(&mut command.unnamed, first, end);
        }
        News::Changed(side, nsid, range)
    }

    fn admin(&mut self, at: Time, side: Side, command: &SubmissionEntry) -> Result<(), Violation> {
        match command.admin_opcode() {
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                self.requests[side].outstanding += 1;
                self.requests[side].none_since = None;
                return Ok(());
            }
            AdminOpcode::SET_FEATURES if FeaturesCdw10::from_bits(command.cdw10).fid() == FeatureId::CONTROLLER_DATA_QUEUE => {
                self.head_moves(side, command)?;
            }
            AdminOpcode::CONTROLLER_DATA_QUEUE => {
                if let Some(id) = deleted(command) {
                    self.forget(side, id);
                }
            }
            AdminOpcode::TRACK_SEND => {
                let id = TrackSendLogCdw11::from_bits(command.cdw11).cdqid();
                let cdw10 = TrackSendCdw10::from_bits(command.cdw10);
                match (cdw10.sel(), cdw10.lact()) {
                    (TrackSendSelect::LOG_USER_DATA_CHANGES, 0) => self.interrupt(|queue| (queue.side, queue.id) == (side, id)),
                    (TrackSendSelect::LOG_USER_DATA_CHANGES, 1) => {
                        // A log that has ended goes on behind its last entry: before the host has given that back there is no
                        // room for more, and a device that takes the command all the same (section 16) logs nothing.
                        if let Some(queue) = self.find(side, id).filter(|queue| queue.released >= queue.last) {
                            queue.over = false;
                        }
                    }
                    _ => {}
                }
            }
            AdminOpcode::MIGRATION_SEND if MigrationSendCdw10::from_bits(command.cdw10).sel() == MigrationSendSelect::SUSPEND => {
                let cdw11 = SuspendCdw11::from_bits(command.cdw11);
                if cdw11.stype() == SuspendType::SUSPEND {
                    self.interrupt(|queue| (queue.side, queue.cntlid) == (side, cdw11.cntlid()));
                }
            }
            _ => {}
        }
        self.patience(at, side)
    }

    /// Set Features 21h: the head goes over entries that were there, never back.
    fn head_moves(&mut self, side: Side, command: &SubmissionEntry) -> Result<(), Violation> {
        let id = CdqFeatureCdw11::from_bits(command.cdw11).cdqid();
        let Some(queue) = self.find(side, id) else { return Ok(()) };
        let (Some(slots), head) = (queue.slots, command.cdw12) else { return Ok(()) };
        let steps = u64::from((head.wrapping_add(slots) - queue.head) % slots.max(1));
        let there = queue.seen - queue.released;
        if steps > there || head >= slots {
            let what = format!("CDQ {id} of side {side}: the head goes from slot {} to {head}, and {there} entries are there", queue.head);
            return Err(violation("only entries that were there are given back", what));
        }
        (queue.head, queue.released) = (head, queue.released + steps);
        if steps > 0 {
            queue.lying = None;
        }
        Ok(())
    }

    /// The driver works: then it does what it owes.
    fn patience(&self, at: Time, side: Side) -> Result<(), Violation> {
        let long = |since: &Time| at.us_since(*since) > PATIENCE_US;
        if self.requests[side].none_since.as_ref().is_some_and(long) {
            return Err(violation("events are asked for again", format!("side {side} has had no request outstanding for {PATIENCE_US} us")));
        }
        let lies = |queue: &&Queue| queue.side == side && queue.seen > queue.released && queue.lying.as_ref().is_some_and(long);
        match self.queues.iter().find(lies) {
            Some(queue) => {
                let what = format!("CDQ {} of side {side}: {} entries lie for {PATIENCE_US} us", queue.id, queue.seen - queue.released);
                Err(violation("entries are taken", what))
            }
            None => Ok(()),
        }
    }

    fn admin_ended(&mut self, side: Side, command: &SubmissionEntry, dw0: u32) -> News {
        let clock = self.clock;
        match command.admin_opcode() {
            AdminOpcode::CONTROLLER_DATA_QUEUE if CdqCdw10::from_bits(command.cdw10).sel() == CdqSelect::CREATE => {
                let (id, slots) = (dw0 as u16, command.cdw12 / (UDMQ_ENTRY_BYTES as u32 / 4));
                let cntlid = CdqCreateCdw11::from_bits(command.cdw11).cqs();
                match self.find(side, id) {
                    // Entries were there before the answer was.
                    Some(queue) if queue.slots.is_none() && queue.first == 0 => queue.slots = Some(slots),
                    _ => {
                        self.forget(side, id);
                        self.queues.push(Queue::new(side, id, cntlid, Some(slots), 0));
                    }
                }
                News::Nothing
            }
            AdminOpcode::TRACK_SEND => {
                let id = TrackSendLogCdw11::from_bits(command.cdw11).cdqid();
                let cdw10 = TrackSendCdw10::from_bits(command.cdw10);
                if cdw10.sel() != TrackSendSelect::LOG_USER_DATA_CHANGES || cdw10.lact() != 1 {
                    return News::Nothing;
                }
                if let Some(queue) = self.find(side, id).filter(|queue| !queue.over) {
                    queue.since = Some(clock);
                }
                News::Begins(side)
            }
            _ => News::Nothing,
        }
    }
}

impl Command {
    fn new(id: CommandId, guest: GuestId, op: Op, nsid: u32, slba: u64, blocks: u64) -> Self {
        Self { id, guest, op, nsid, slba, blocks, log: None, unnamed: Vec::new(), touched: false }
    }
}

impl Queue {
    fn new(side: Side, id: u16, cntlid: u16, slots: Option<u32>, first: u32) -> Self {
        Self { side, id, cntlid, slots, first, seen: 0, released: 0, head: 0, last: 0, since: None, over: false, lying: None }
    }
}

/// The queue that a command deletes. However that ends, its memory is the driver's again.
fn deleted(command: &SubmissionEntry) -> Option<u16> {
    let deletes = command.admin_opcode() == AdminOpcode::CONTROLLER_DATA_QUEUE
        && CdqCdw10::from_bits(command.cdw10).sel() == CdqSelect::DELETE;
    deletes.then(|| CdqDeleteCdw11::from_bits(command.cdw11).cdqid())
}

/// Takes `first..end` out of ranges.
fn subtract(ranges: &mut Vec<(u64, u64)>, first: u64, end: u64) {
    let mut index = 0;
    while let Some(&(from, to)) = ranges.get(index) {
        if end <= from || to <= first {
            index += 1;
            continue;
        }
        ranges.swap_remove(index);
        // What is put back does not overlap, so it is passed over.
        if from < first {
            ranges.push((from, first));
        }
        if end < to {
            ranges.push((end, to));
        }
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
