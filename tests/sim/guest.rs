//! A guest: drives its slot with the real driver, and says what it sends and what comes back.
//!
//! It knows nothing of migrations. Its commands overlap one another, and those of others in the same namespace, on purpose. A
//! write contains the command's own identifier (see [`content`](super::content)); what reads return is decoded and reported,
//! and judged by nobody here. Errors are reported and gone on from. After a reset, whoever made it, it brings its controller up
//! again; a driver that gave up is told to try again.

use super::content;
use super::event::{CommandId, End, Event, GuestId, Op};
use super::latencies::Latencies;
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::slot::Slot;
use dray_device::space::MappedBuffer;
use dray_driver::{Driver, DriverConfig, DriverState, PairTicket, QueuePair, QueuePairConfig};
use dray_migration::GuestSample;
use dray_nvme::command::{DsmRange, SubmissionEntry};
use dray_nvme::status::Status;
use zerocopy::IntoBytes;

/// Blocks of a region that take the hot commands, at its begin.
const HOT_BLOCKS: u64 = 24;
/// Virtual time after which a driver that gave up is told to try again, µs.
const RETRY_US: u64 = 1_000;
/// Virtual time between two looks for completions that the driver does not see, µs. Far less than any time-out.
const LOOK_US: u64 = 500;
/// Bytes of a completion queue entry; where its command identifier is.
const CQE_BYTES: usize = 16;
/// See there.
const CID_AT: usize = 12;
/// Tries after which the guest says that it has failed (and goes on trying).
const TRIES: u32 = 64;
/// The guest does not know what a block contains.
const UNKNOWN: CommandId = content::GARBAGE;

/// How many of a hundred commands are what; what is left of the hundred are reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Writes.
    pub write: u8,
    /// Writes with FUA.
    pub fua: u8,
    /// Write Zeroes.
    pub zeroes: u8,
    /// Dataset Management, deallocate.
    pub deallocate: u8,
    /// Flushes.
    pub flush: u8,
    /// Compares.
    pub compare: u8,
}

impl Default for Mix {
    fn default() -> Self {
        Self { write: 45, fua: 5, zeroes: 8, deallocate: 6, flush: 8, compare: 3 }
    }
}

/// What a guest does.
#[derive(Clone, Debug)]
pub struct GuestPlan {
    /// Decides everything that is left open.
    pub seed: u64,
    /// Who it is.
    pub guest: GuestId,
    /// Which guest in this slot, from 0: a machine that starts again has new guests, whose commands are new ones.
    pub life: u32,
    /// The regions that it uses: NSID, first block, blocks.
    pub namespaces: Vec<(u32, u64, u64)>,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Commands after which it stops.
    pub commands: u64,
    /// Commands outstanding, in all queues together.
    pub depth: u16,
    /// I/O queue pairs.
    pub queues: u16,
    /// Most blocks of a command with data; commands without have up to twice as many.
    pub max_blocks: u32,
    /// Time between two commands, ns, from and to.
    pub gap_ns: (u64, u64),
    /// How many of a hundred commands go to a region's first blocks.
    pub hot: u8,
    /// What the commands are.
    pub mix: Mix,
    /// Milliseconds that a command may take before it is aborted, and again before the controller is reset.
    pub io_timeout_ms: u32,
}

enum Stage {
    /// The controller is to become ready.
    Starting,
    /// Queue pairs are created.
    Connecting(Option<PairTicket>),
    /// Commands are sent.
    Running,
    /// The queues died: what was outstanding comes back.
    Draining,
}

#[derive(Clone, Copy)]
struct Command {
    id: CommandId,
    op: Op,
    region: usize,
    slba: u64,
    blocks: u32,
    since: Time,
    /// A write of this guest to one of its blocks was outstanding when it was sent.
    overlapped: bool,
}

/// What the guest believes of a block; only for what it compares with.
#[derive(Clone, Copy)]
struct Belief {
    value: CommandId,
    last: CommandId,
    writers: u16,
}

struct Region {
    nsid: u32,
    first: u64,
    blocks: u64,
    beliefs: Vec<Belief>,
}

/// A guest.
pub struct SimGuest {
    plan: GuestPlan,
    driver: Driver,
    random: fastrand::Rng,
    stage: Stage,
    pairs: Vec<QueuePair>,
    regions: Vec<Region>,
    data: MappedBuffer,
    /// Bytes of memory of a command.
    stride: usize,
    places: Vec<Option<Command>>,
    free: Vec<u16>,
    scratch: Vec<u8>,
    submitted: u64,
    ended: u64,
    due: Time,
    /// When it looks for unseen completions next.
    next_look: Time,
    stopping: bool,
    reset_asked: bool,
    /// CC.EN was cleared, CSTS.RDY has not followed.
    down: bool,
    retry: Option<Time>,
    tries: u32,
    latencies: Latencies,
}

impl SimGuest {
    /// A guest in that slot.
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn new(plan: GuestPlan, slot: &Slot) -> Self {
        let bytes = plan.max_blocks as usize * plan.block_bytes as usize;
        let config = DriverConfig {
            admin_entries: 16,
            aers: 1,
            io_timeout_ms: plan.io_timeout_ms,
            // Somebody may clear CC.EN while it is being set: the guest must not wait as long as CAP.TO allows.
            ready_timeout_ms: plan.io_timeout_ms.saturating_mul(4),
            admin_timeout_ms: plan.io_timeout_ms.saturating_mul(4),
            io_queues: plan.queues,
            max_transfer_bytes: bytes,
            ..DriverConfig::default()
        };
        let driver = Driver::new(slot.function(), config).expect("a driver");
        let stride = bytes.max(512);
        let data = DmaBuffer::allocate("sim-guest", stride * usize::from(plan.depth), Pages::Small).expect("memory");
        let data = MappedBuffer::new(driver.space(), data).expect("mapped memory");
        let belief = Belief { value: UNKNOWN, last: 0, writers: 0 };
        let region = |&(nsid, first, blocks)| Region { nsid, first, blocks, beliefs: vec![belief; blocks as usize] };
        Self {
            random: fastrand::Rng::with_seed(plan.seed),
            stage: Stage::Starting,
            pairs: Vec::new(),
            regions: plan.namespaces.iter().map(region).collect(),
            driver,
            data,
            stride,
            places: vec![None; usize::from(plan.depth)],
            free: (0..plan.depth).rev().collect(),
            scratch: vec![0; stride],
            submitted: 0,
            ended: 0,
            due: Time::default(),
            next_look: Time::default(),
            stopping: false,
            reset_asked: false,
            down: false,
            retry: None,
            tries: 0,
            latencies: Latencies::default(),
            plan,
        }
    }

    /// Takes what has ended, sends what is due, brings the controller up.
    pub fn poll(&mut self, now: Time, events: &mut Vec<Event>) -> Progress {
        self.latencies.tick(now);
        let driver = self.driver.poll(now);
        while self.driver.next_event().is_some() {}
        let mut work = self.take_completions(now, events);
        if now >= self.next_look {
            self.next_look = now.after_us(LOOK_US);
            self.look_for_unseen(events);
        }
        work += self.watch_reset(events);
        work += match self.stage {
            Stage::Starting => self.start(now),
            Stage::Connecting(ticket) => self.connect(now, ticket),
            Stage::Running => self.run(now, events),
            Stage::Draining => self.drain(now),
        };
        let next = match (&self.stage, self.retry) {
            _ if work > 0 => Next::Now,
            (_, Some(retry)) => Next::At(retry),
            (Stage::Running, _) if self.may_submit() && !self.free.is_empty() => Next::At(self.due),
            _ => Next::OnWake,
        };
        Progress { work, next }.and(driver)
    }

    /// Commands are being sent.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.stage, Stage::Running) && !self.is_done()
    }

    /// All its commands have ended, or it was told to stop and they have; its controller is well.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let idle = self.outstanding() == 0 && matches!(self.stage, Stage::Running) && self.driver.is_ready();
        idle && !self.may_submit()
    }

    /// Sends nothing more.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Goes on for so many commands more, stopped or not.
    pub fn extend(&mut self, commands: u64) {
        self.plan.commands = self.submitted + commands;
        self.stopping = false;
    }

    /// Resets its controller as soon as that is up, commands outstanding or not.
    pub fn request_reset(&mut self) {
        self.reset_asked = true;
    }

    /// Commands sent.
    #[must_use]
    pub fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Commands that have ended, the lost ones included.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.ended
    }

    /// Commands outstanding.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// What it has seen of its controller since the last call.
    pub fn sample(&mut self) -> GuestSample {
        self.latencies.sample()
    }

    /// Its driver gave up again and again.
    #[must_use]
    pub fn failed(&self) -> Option<String> {
        match self.driver.state() {
            DriverState::Failed(error) if self.tries >= TRIES => Some(error.to_string()),
            _ => None,
        }
    }

    /// Where its driver is.
    #[must_use]
    pub fn driver_state(&self) -> &DriverState {
        self.driver.state()
    }

    fn may_submit(&self) -> bool {
        !self.stopping && self.submitted < self.plan.commands
    }

    /// CC.EN fell, then CSTS.RDY: what was outstanding has come back by now, as lost.
    fn watch_reset(&mut self, events: &mut Vec<Event>) -> u32 {
        match self.driver.state() {
            DriverState::Resetting => self.down = true,
            DriverState::Enabling | DriverState::Identifying | DriverState::Ready if self.down => {
                self.down = false;
                events.push(Event::Disabled { guest: self.plan.guest });
                return 1;
            }
            _ => {}
        }
        0
    }

    fn start(&mut self, now: Time) -> u32 {
        if self.driver.is_ready() {
            (self.retry, self.tries) = (None, 0);
            self.stage = Stage::Connecting(None);
            return 1;
        }
        if matches!(self.driver.state(), DriverState::Failed(_) | DriverState::Stopped) {
            let retry = *self.retry.get_or_insert(now.after_us(RETRY_US));
            if now >= retry {
                self.retry = None;
                self.tries += 1;
                self.driver.reset(now);
                return 1;
            }
        }
        0
    }

    fn connect(&mut self, now: Time, ticket: Option<PairTicket>) -> u32 {
        if std::mem::take(&mut self.reset_asked) {
            self.driver.reset(now);
        }
        if !self.driver.is_ready() {
            self.stage = Stage::Draining;
            return 1;
        }
        match ticket {
            Some(ticket) => match self.driver.queue_pair(&ticket) {
                None => return 0,
                Some(Ok(pair)) => {
                    self.pairs.push(pair);
                    self.stage = Stage::Connecting(None);
                }
                // Refused: from the start.
                Some(Err(_)) => {
                    self.driver.reset(now);
                    self.stage = Stage::Draining;
                }
            },
            None if self.pairs.len() < usize::from(self.plan.queues.min(self.driver.queues_granted()).max(1)) => {
                // One entry always stays empty, and sizes are powers of two.
                let entries = (self.plan.depth + 1).next_power_of_two();
                match self.driver.create_queue_pair(now, QueuePairConfig { entries, vector: None }) {
                    Ok(ticket) => self.stage = Stage::Connecting(Some(ticket)),
                    Err(_) => return 0,
                }
            }
            None => {
                self.due = now;
                self.stage = Stage::Running;
            }
        }
        1
    }

    fn run(&mut self, now: Time, events: &mut Vec<Event>) -> u32 {
        if std::mem::take(&mut self.reset_asked) {
            self.driver.reset(now);
        }
        if !self.driver.is_ready() || self.pairs.iter().any(QueuePair::is_dead) {
            self.stage = Stage::Draining;
            return 1;
        }
        let mut sent = 0;
        while now >= self.due && self.may_submit() && !self.free.is_empty() && self.send(now, events) {
            let (least, most) = self.plan.gap_ns;
            self.due = self.due.max(now).after_ns(self.random.u64(least..=most.max(least)));
            sent += 1;
        }
        if sent > 0 {
            self.pairs.iter_mut().for_each(QueuePair::commit);
        }
        sent
    }

    fn drain(&mut self, now: Time) -> u32 {
        if self.outstanding() > 0 {
            // A queue that died while the driver thinks that all is well.
            if self.driver.is_ready() {
                self.driver.reset(now);
                return 1;
            }
            return 0;
        }
        let dead = self.pairs.iter().any(QueuePair::is_dead);
        self.pairs.clear();
        if dead && self.driver.is_ready() {
            self.driver.reset(now);
        }
        self.stage = Stage::Starting;
        1
    }

    /// Sends one command; false when the queue does not take it.
    fn send(&mut self, now: Time, events: &mut Vec<Event>) -> bool {
        let Some(&place) = self.free.last() else { return false };
        let queue = self.random.usize(0..self.pairs.len());
        let limits = self.pairs[queue].limits();
        let most_data = (limits.max_transfer / self.plan.block_bytes as usize).max(1) as u32;
        let id = u64::from(self.plan.life) << 48 | (self.plan.guest as u64 + 1) << 32 | self.submitted;
        let mut command = self.choose(id, now, self.plan.max_blocks.min(most_data));
        if matches!(command.op, Op::WriteZeroes { .. }) {
            let most = limits.max_write_zeroes / u64::from(self.plan.block_bytes);
            command.blocks = command.blocks.min(most.min(u64::from(u32::MAX)) as u32);
            if command.blocks == 0 {
                return false;
            }
        }
        let (entry, bytes) = self.entry(&command, place);
        let data = self.data.buffer().part(usize::from(place) * self.stride, bytes);
        let data = data.as_ref().filter(|_| bytes > 0).map_or(&[][..], std::slice::from_ref);
        match self.pairs[queue].submit(now, &entry, data, u64::from(place)) {
            Ok(()) => {}
            Err(SubmitError::Full | SubmitError::Dead | SubmitError::BadData | SubmitError::NotMapped) => return false,
        }
        self.free.pop();
        self.submitted += 1;
        if command.op.writes() {
            command.overlapped = self.believe(&command, |belief| {
                let overlapped = belief.writers > 0;
                *belief = Belief { value: UNKNOWN, last: id, writers: belief.writers + 1 };
                overlapped
            });
        }
        let Command { op, slba, blocks, .. } = command;
        let nsid = self.regions[command.region].nsid;
        events.push(Event::Submitted { guest: self.plan.guest, id, op, nsid, slba, blocks: u64::from(blocks) });
        self.places[usize::from(place)] = Some(command);
        true
    }

    fn choose(&mut self, id: CommandId, now: Time, most_data: u32) -> Command {
        let region = self.random.usize(0..self.regions.len());
        let op = self.choose_op();
        let most = match op {
            Op::WriteZeroes { .. } | Op::Deallocate => self.plan.max_blocks * 2,
            _ => most_data,
        };
        // Small ones are more frequent.
        let wanted = self.random.u32(1..=most).min(self.random.u32(1..=most));
        let blocks = u64::from(wanted).min(self.regions[region].blocks);
        let last = self.regions[region].blocks - blocks;
        let last = if self.random.u8(0..100) < self.plan.hot { last.min(HOT_BLOCKS) } else { last };
        let slba = self.regions[region].first + self.random.u64(0..=last);
        let mut command =
            Command { id, op, region, slba, blocks: blocks as u32, since: now, overlapped: false };
        match op {
            Op::Flush => (command.slba, command.blocks) = (0, 0),
            Op::Compare => match self.known(&command) {
                0 => command.op = Op::Read,
                blocks => command.blocks = blocks,
            },
            _ => {}
        }
        command
    }

    fn choose_op(&mut self) -> Op {
        let Mix { write, fua, zeroes, deallocate, flush, compare } = self.plan.mix;
        let mut dice = self.random.u8(0..100);
        let mut is = |share: u8| {
            let hit = dice < share;
            dice = dice.saturating_sub(share);
            hit
        };
        if is(write) {
            Op::Write { fua: false }
        } else if is(fua) {
            Op::Write { fua: true }
        } else if is(zeroes) {
            Op::WriteZeroes { fua: self.random.u8(0..8) == 0, deallocate: self.random.bool() }
        } else if is(deallocate) {
            Op::Deallocate
        } else if is(flush) {
            Op::Flush
        } else if is(compare) {
            Op::Compare
        } else {
            Op::Read
        }
    }

    fn beliefs(&mut self, command: &Command) -> &mut [Belief] {
        let region = &mut self.regions[command.region];
        let at = (command.slba - region.first) as usize;
        &mut region.beliefs[at..at + command.blocks as usize]
    }

    /// Does something to what is believed of each block of a command; whether it was true of any.
    fn believe(&mut self, command: &Command, mut what: impl FnMut(&mut Belief) -> bool) -> bool {
        self.beliefs(command).iter_mut().fold(false, |any, belief| what(belief) | any)
    }

    /// Blocks from the command's first one on whose content the guest knows.
    fn known(&mut self, command: &Command) -> u32 {
        self.beliefs(command).iter().take_while(|belief| belief.value != UNKNOWN).count() as u32
    }

    /// The submission entry, and how many bytes of the place's memory go with it; what is written is there already.
    fn entry(&mut self, command: &Command, place: u16) -> (SubmissionEntry, usize) {
        let Command { op, slba, blocks, .. } = *command;
        let nsid = self.regions[command.region].nsid;
        let bytes = blocks as usize * self.plan.block_bytes as usize;
        match op {
            Op::Read => (SubmissionEntry::read(nsid, slba, blocks), bytes),
            Op::Write { fua } => {
                self.put(command, place, |id, _| id);
                let entry = SubmissionEntry::write(nsid, slba, blocks);
                (if fua { entry.with_fua() } else { entry }, bytes)
            }
            Op::Compare => {
                self.put(command, place, |_, believed| believed);
                (SubmissionEntry::compare(nsid, slba, blocks), bytes)
            }
            Op::WriteZeroes { fua, deallocate } => {
                let entry = SubmissionEntry::write_zeroes(nsid, slba, blocks, deallocate);
                (if fua { entry.with_fua() } else { entry }, 0)
            }
            Op::Deallocate => {
                let range = DsmRange { attributes: 0, length: blocks, slba };
                let range = range.as_bytes();
                if let Some(memory) = self.data.buffer().part(usize::from(place) * self.stride, range.len()) {
                    memory.write(range);
                }
                (SubmissionEntry::dsm(nsid, 1), range.len())
            }
            Op::Flush => (SubmissionEntry::flush(nsid), 0),
        }
    }

    /// Fills the place's memory, block by block, by the command's identifier and what is believed of the block.
    fn put(&mut self, command: &Command, place: u16, value: impl Fn(CommandId, CommandId) -> CommandId) {
        let size = self.plan.block_bytes as usize;
        let mut scratch = std::mem::take(&mut self.scratch);
        let nsid = self.regions[command.region].nsid;
        let blocks = scratch.chunks_exact_mut(size).zip(self.beliefs(command));
        for ((block, belief), lba) in blocks.zip(command.slba..) {
            content::fill(value(command.id, belief.value), nsid, lba, block);
        }
        let bytes = command.blocks as usize * size;
        if let Some(memory) = self.data.buffer().part(usize::from(place) * self.stride, bytes) {
            memory.write(&scratch[..bytes]);
        }
        self.scratch = scratch;
    }

    /// What the place's memory contains, decoded.
    fn values(&mut self, command: &Command, place: usize) -> Vec<CommandId> {
        let size = self.plan.block_bytes as usize;
        let bytes = command.blocks as usize * size;
        if let Some(memory) = self.data.buffer().part(place * self.stride, bytes) {
            memory.read(&mut self.scratch[..bytes]);
        }
        let nsid = self.regions[command.region].nsid;
        let blocks = self.scratch[..bytes].chunks_exact(size).zip(command.slba..);
        blocks.map(|(block, lba)| content::decode(block, nsid, lba)).collect()
    }

    fn take_completions(&mut self, now: Time, events: &mut Vec<Event>) -> u32 {
        let mut pairs = std::mem::take(&mut self.pairs);
        let mut count = 0;
        for pair in &mut pairs {
            count += pair.poll_with(now, |completion| self.end(now, completion, events));
        }
        self.pairs = pairs;
        count as u32
    }

    /// Right after completions were taken: whether one of what is still outstanding lies in its queue all the same. A queue that
    /// is dead is not read any more. Identifiers carry a generation, so an old completion is not taken for a new one.
    fn look_for_unseen(&self, events: &mut Vec<Event>) {
        for pair in self.pairs.iter().filter(|pair| !pair.is_dead() && pair.outstanding() > 0) {
            let Some(queue) = pair.completion_memory() else { continue };
            for at in (0..queue.len()).step_by(CQE_BYTES) {
                let mut cid = [0; 2];
                if let Some(field) = queue.part(at + CID_AT, cid.len()) {
                    field.read(&mut cid);
                }
                let cid = u16::from_le_bytes(cid);
                let command = pair.identifiers().find(|(_, outstanding)| *outstanding == cid);
                let command = command.and_then(|(place, _)| self.places.get(place as usize).copied().flatten());
                events.extend(command.map(|command| Event::Unseen { guest: self.plan.guest, id: command.id }));
            }
        }
    }

    fn end(&mut self, now: Time, completion: Completion, events: &mut Vec<Event>) {
        let place = completion.tag as usize;
        let Some(command) = self.places.get_mut(place).and_then(Option::take) else { return };
        self.free.push(place as u16);
        self.ended += 1;
        let done = !completion.unknown && !completion.status.is_error();
        let end = match command.op {
            _ if completion.unknown => End::Lost,
            _ if completion.status.is_error() => End::Failed(completion.status),
            Op::Read | Op::Compare => End::Done { values: self.values(&command, place) },
            _ => End::Done { values: Vec::new() },
        };
        if done {
            self.latencies.add(now.ns_since(command.since));
        }
        if command.op.writes() {
            let (id, certain) = (command.id, done && !command.overlapped);
            let value = if matches!(command.op, Op::Write { .. }) { id } else { content::ZERO };
            self.believe(&command, |belief| {
                belief.writers -= 1;
                if certain && belief.last == id {
                    belief.value = value;
                }
                false
            });
        }
        // Somebody else may write here too.
        if end == End::Failed(Status::COMPARE_FAILURE) {
            self.believe(&command, |belief| {
                belief.value = UNKNOWN;
                false
            });
        }
        events.push(Event::Ended { guest: self.plan.guest, id: command.id, end });
    }
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
