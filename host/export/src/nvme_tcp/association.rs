//! An exported controller and the association that has it: the host's commands on their way to the controller and back.

use super::connection::{Connection, Sink};
use super::counters::Counters;
use super::front::{Front, Purpose};
use super::identify::{PAGE, patch};
use super::plan::{Plan, fit_ranges};
use super::receive::Fatal;
use super::config::Limits;
use super::target::Exported;
use dray_device::poll::Time;
use dray_device::slot::Slot;
use dray_nvme::command::{AdminOpcode, CompletionEntry, SubmissionEntry};
use dray_nvme::event::{AsyncEvent, EventType, notice_info};
use dray_nvme::log::LogId;
use dray_nvme::registers::{Cc, ShutdownNotification, offset};
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::{DataDirection, direction, status};
use dray_nvme::tcp::pdu::{FatalError, field};
use dray_nvme::tcp::DataPdu;
use std::collections::VecDeque;

/// Bit of feature 0Bh: asymmetric namespace access change notices.
const ANA_NOTICE: u32 = 1 << 11;
/// Completions taken from one queue in a poll.
const BATCH: u32 = 64;

pub(super) type Connections = Vec<Option<Box<Connection>>>;

/// What handling a command needs besides.
pub(super) struct Env<'a> {
    pub(super) counters: &'a mut Counters,
    pub(super) limits: &'a Limits,
    pub(super) exported: &'a Exported,
    pub(super) now: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Active,
    /// The association is over; the controller is being reset.
    Ending,
}

/// Where a queue pair of the controller stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    None,
    Creating,
    Live,
    Deleting,
}

/// Who has the controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) nqn: String,
    pub(super) id: [u8; 16],
}

/// An exported controller.
pub(super) struct Place {
    pub(super) cntlid: u16,
    slot: Slot,
    pub(super) front: Option<Front>,
    pub(super) state: State,
    pub(super) host: Option<Host>,
    pub(super) kato_ms: u32,
    /// When the host last showed life, or had to begin or cease to.
    pub(super) alive: Time,
    /// The keep alive timer runs.
    pub(super) timed: bool,
    /// The connection of each queue.
    links: Vec<Option<usize>>,
    stages: Vec<Stage>,
    /// Commands that wait for memory.
    parked: VecDeque<(u16, u16)>,
    /// Queues to be deleted as soon as there is room for the command.
    deletes: Vec<u16>,
    /// CC.EN has fallen and the controller is not done with it.
    pub(super) resetting: bool,
    /// CC.SHN says that the controller is to shut down: it takes no more commands until it is reset.
    pub(super) stopping: bool,
    /// I/O connections are to be ended.
    hang_up: bool,
    pub(super) events: u32,
    ana_told: u64,
    /// An event request is being taken back, to report an ANA change with it.
    taking_back: bool,
}

impl Place {
    pub(super) fn new(cntlid: u16, slot: Slot, limits: &Limits) -> Self {
        let queues = usize::from(limits.io_queues) + 1;
        Self {
            cntlid,
            slot,
            front: None,
            state: State::Free,
            host: None,
            kato_ms: 0,
            alive: Time(0),
            timed: false,
            links: vec![None; queues],
            stages: vec![Stage::None; queues],
            parked: VecDeque::with_capacity(queues * usize::from(limits.queue_entries)),
            deletes: Vec::with_capacity(queues),
            resetting: false,
            stopping: false,
            hang_up: false,
            events: 0,
            ana_told: 0,
            taking_back: false,
        }
    }

    /// Begins an association with its admin queue's connection.
    pub(super) fn begin(&mut self, connection: usize, host: Host, kato_ms: u32, env: &mut Env<'_>) -> Result<(), Status> {
        if self.state != State::Free {
            return Err(status::CONTROLLER_BUSY);
        }
        let front = match &mut self.front {
            Some(front) => front,
            none => match Front::new(&self.slot, env.limits) {
                Ok(front) => none.insert(front),
                Err(error) => {
                    tracing::error!(cntlid = self.cntlid, %error, "no association can be made");
                    return Err(status::CONTROLLER_BUSY);
                }
            },
        };
        let cap = front.cap().into_bits();
        if cap == 0 || cap == u64::MAX {
            return Err(status::CONTROLLER_BUSY);
        }
        if front.cc().en() || front.csts().rdy() {
            self.state = State::Ending;
            front.write_cc(Cc::new());
            return Err(status::CONTROLLER_BUSY);
        }
        front.forget_queues();
        self.links.fill(None);
        self.stages.fill(Stage::None);
        self.parked.clear();
        self.deletes.clear();
        (self.resetting, self.stopping, self.hang_up, self.taking_back) = (false, false, false, false);
        (self.events, self.ana_told) = (0, env.exported.ana_changes);
        self.links[0] = Some(connection);
        (self.host, self.kato_ms, self.alive, self.timed) = (Some(host), kato_ms, env.now, false);
        self.state = State::Active;
        env.counters.associations += 1;
        Ok(())
    }

    /// Whether an I/O queue can be connected now.
    pub(super) fn may_add_queue(&self, qid: u16) -> Result<(), Status> {
        let (Some(front), Some(stage)) = (&self.front, self.stages.get(usize::from(qid))) else {
            return Err(Status::INVALID_FIELD);
        };
        let serves = front.cc().en() && front.csts().rdy() && !self.resetting && !self.stopping;
        if serves && *stage == Stage::None { Ok(()) } else { Err(Status::COMMAND_SEQUENCE) }
    }

    /// Whether the association is this host's.
    pub(super) fn is_of(&self, host: &Host) -> bool {
        self.state == State::Active && self.host.as_ref() == Some(host)
    }

    /// Connects an I/O queue; the answer comes when the controller has made it.
    pub(super) fn add_queue(&mut self, connection: usize, qid: u16, entries: u16) -> Result<(), Status> {
        self.may_add_queue(qid)?;
        let index = usize::from(qid);
        let (Some(front), Some(stage)) = (&mut self.front, self.stages.get_mut(index)) else {
            return Err(Status::INVALID_FIELD);
        };
        if !front.prepare_queue(qid, entries) {
            return Err(Status::COMMAND_SEQUENCE);
        }
        let made = front.create_cq(qid).is_some_and(|entry| front.submit_own(Purpose::CreateCq(qid), entry));
        if !made {
            front.remove_queue(qid);
            return Err(status::CONTROLLER_BUSY);
        }
        *stage = Stage::Creating;
        self.links[index] = Some(connection);
        Ok(())
    }

    /// A connection of the association has ended; without its admin queue the association ends as well.
    pub(super) fn lost(&mut self, qid: u16, out: &mut super::send::Outbox, connections: &mut Connections) {
        let Some(front) = &mut self.front else { return };
        out.drain(|index| front.release(qid, index));
        let index = usize::from(qid);
        if let Some(link) = self.links.get_mut(index) {
            *link = None;
        }
        if qid == 0 {
            self.finish(connections);
            return;
        }
        self.parked.retain(|&(parked, _)| parked != qid);
        let commands = front.queue(qid).map_or(0, |queue| queue.commands.len());
        for command in 0..commands as u16 {
            if front.command(qid, command).is_some_and(|command| !command.submitted) {
                front.release(qid, command);
            }
        }
        if self.stages.get(index) == Some(&Stage::Live) {
            self.stages[index] = Stage::Deleting;
            self.deletes.push(qid);
        }
    }

    /// Ends the association: connections are closed, the controller is reset and free when it says so.
    pub(super) fn finish(&mut self, connections: &mut Connections) {
        if self.state != State::Active {
            return;
        }
        for link in self.links.iter_mut().filter_map(Option::take) {
            if let Some(Some(connection)) = connections.get_mut(link) {
                connection.abandon();
            }
        }
        if let Some(front) = &mut self.front {
            let cc = front.cc();
            front.write_cc(cc.with_en(false));
        }
        self.parked.clear();
        self.host = None;
        self.state = State::Ending;
    }

    pub(super) fn property(&self, at: u32, wide: bool) -> Option<u64> {
        let front = self.front.as_ref()?;
        match (at, wide) {
            (offset::CAP, true) => Some(front.cap().with_mqes(front.max_entries().saturating_sub(1)).into_bits()),
            (offset::VS | offset::CC | offset::CSTS | offset::CRTO, false) => Some(front.read32(at).into()),
            _ => None,
        }
    }

    /// Property Set of CC.
    pub(super) fn set_cc(&mut self, cc: Cc, out_is_empty: bool) -> Result<(), Status> {
        let Some(front) = &mut self.front else { return Err(Status::INTERNAL_ERROR) };
        let before = front.cc();
        if cc.en() && !before.en() && (front.csts().rdy() || self.resetting || !out_is_empty) {
            // Memory of before may still be in use.
            return Err(Status::COMMAND_SEQUENCE);
        }
        if before.en() && !cc.en() {
            (self.resetting, self.hang_up) = (true, true);
        }
        self.stopping = cc.en() && cc.shn() != ShutdownNotification::NONE;
        front.write_cc(cc);
        Ok(())
    }

    /// Entries a queue may have.
    pub(super) fn max_entries(&self) -> u16 {
        self.front.as_ref().map_or(0, Front::max_entries)
    }

    /// A command of the host's that is none of fabrics. Says where the data in its capsule goes.
    #[inline]
    pub(super) fn command(
        &mut self,
        connection: &mut Connection,
        qid: u16,
        entry: &SubmissionEntry,
        in_capsule: u32,
        env: &mut Env<'_>,
    ) -> Result<Sink, Fatal> {
        let plan = self.plan(qid, entry, in_capsule, env);
        let cid = entry.cdw0.cid();
        match plan {
            Plan::Pass(changed, len) => self.pass(connection, qid, entry, changed, len, env),
            Plan::Answer(status, result) => {
                env.counters.commands_refused += u64::from(status.is_error());
                connection.respond(cid, status, result);
                Ok(Sink::Discard)
            }
            Plan::Data(bytes) => {
                connection.respond_data(cid, &bytes, 0);
                Ok(Sink::Discard)
            }
        }
    }

    /// Gives a command its place; what has no memory yet waits.
    #[inline]
    fn pass(
        &mut self,
        connection: &mut Connection,
        qid: u16,
        original: &SubmissionEntry,
        entry: SubmissionEntry,
        len: u32,
        env: &mut Env<'_>,
    ) -> Result<Sink, Fatal> {
        let Some(front) = &mut self.front else { return Err(Fatal::SEQUENCE) };
        // More commands than the queue has entries.
        let Some(index) = front.take(qid, Purpose::Host) else { return Err(Fatal::SEQUENCE) };
        let Some(command) = front.command(qid, index) else { return Err(Fatal::SEQUENCE) };
        (command.entry, command.len) = (entry, len);
        env.counters.commands += 1;
        if len > 0 && original.sgl().is_in_capsule() {
            return Ok(Sink::Memory { index, at: 0, r2t: false });
        }
        if self.parked.is_empty() && front.place(qid, index) {
            start(front, connection, qid, index);
        } else {
            self.parked.push_back((qid, index));
        }
        Ok(Sink::Discard)
    }

    /// Checks an H2CData against its R2T; says where its data goes.
    pub(super) fn data(&mut self, qid: u16, pdu: &DataPdu) -> Result<Sink, Fatal> {
        let command = self.front.as_mut().and_then(|front| front.command(qid, pdu.ttag));
        let Some(command) = command.filter(|command| command.receiving) else { return Err(Fatal::header(field::TTAG)) };
        if pdu.cccid != command.entry.cdw0.cid() {
            return Err(Fatal::header(field::CCCID));
        }
        let end = pdu.datao.checked_add(pdu.datal).filter(|&end| end <= command.asked);
        let Some(end) = end else { return Err(Fatal { fes: FatalError::DATA_OUT_OF_RANGE, fei: 0 }) };
        if pdu.datao != command.got {
            return Err(Fatal::header(field::DATAO));
        }
        if !pdu.datal.is_multiple_of(4) {
            return Err(Fatal::header(field::DATAL));
        }
        if pdu.ch.flags.last() != (end == command.asked) {
            return Err(Fatal::header(field::FLAGS));
        }
        Ok(Sink::Memory { index: pdu.ttag, at: pdu.datao, r2t: true })
    }

    /// Data of a PDU under way.
    #[inline]
    pub(super) fn store(&self, qid: u16, index: u16, at: u32, bytes: &[u8]) {
        if let Some(front) = &self.front {
            front.write(qid, index, at, bytes);
        }
    }

    /// The data of a PDU is complete.
    #[inline]
    pub(super) fn stored(
        &mut self,
        connection: &mut Connection,
        (qid, index): (u16, u16),
        end: u32,
        (r2t, intact): (bool, bool),
        env: &mut Env<'_>,
    ) {
        let Some(front) = &mut self.front else { return };
        let Some(command) = front.command(qid, index) else { return };
        command.damaged |= !intact;
        env.counters.data_digest_errors += u64::from(!intact);
        let cid = command.entry.cdw0.cid();
        if r2t {
            command.got = end;
            if end < command.len {
                if end == command.asked {
                    command.asked = command.len.min(end + env.limits.max_h2c_bytes);
                    let (from, len) = (end, command.asked - end);
                    connection.ask(cid, index, from, len);
                }
                return;
            }
            command.receiving = false;
        }
        if command.damaged {
            front.release(qid, index);
            connection.respond_status(cid, Status::TRANSIENT_TRANSPORT);
            return;
        }
        let mut entry = command.entry;
        fit_ranges(&mut entry, &mut command.len, qid);
        front.submit(qid, index, entry);
    }

    /// Rings doorbells for what has been submitted since the last time.
    #[inline]
    pub(super) fn ring(&mut self) {
        if let Some(front) = &mut self.front {
            front.ring();
        }
    }

    /// Looks after the association and takes completions in; returns the work done.
    pub(super) fn poll(&mut self, connections: &mut Connections, env: &mut Env<'_>) -> u32 {
        if self.state == State::Free {
            return 0;
        }
        let Some(front) = &mut self.front else { return 0 };
        let (cc, csts) = (front.cc(), front.csts());
        if self.state == State::Ending {
            if !csts.rdy() || csts.is_gone() {
                front.forget_queues();
                self.state = State::Free;
                return 1;
            }
            return 0;
        }
        if csts.is_gone() {
            tracing::warn!(cntlid = self.cntlid, "the controller of an association has gone");
            self.finish(connections);
            return 1;
        }
        // The timer runs while the controller can be used (Base 2.3 §3.9): who authenticates or sets up has other limits.
        let runs = cc.en() && csts.rdy() && cc.shn() == ShutdownNotification::NONE;
        if runs != self.timed {
            (self.timed, self.alive) = (runs, env.now);
        }
        if env.now > self.deadline(env.limits) {
            if runs {
                tracing::warn!(cntlid = self.cntlid, kato_ms = self.kato_ms, "keep alive timer expired");
                env.counters.keep_alive_expired += 1;
            } else {
                tracing::warn!(cntlid = self.cntlid, "a host has kept a controller without enabling it");
                env.counters.idle_expired += 1;
            }
            self.finish(connections);
            return 1;
        }
        if std::mem::take(&mut self.hang_up) {
            for link in self.links[1..].iter_mut().filter_map(Option::take) {
                if let Some(Some(connection)) = connections.get_mut(link) {
                    connection.abandon();
                }
            }
        }
        if self.resetting {
            if !csts.rdy() {
                if let Some(front) = &mut self.front {
                    front.forget_queues();
                }
                self.stages.fill(Stage::None);
                self.parked.clear();
                self.deletes.clear();
                self.resetting = false;
            }
            return 0;
        }
        let work = self.completions(connections, env);
        self.unpark(connections);
        self.delete_queues();
        self.report_ana(env);
        self.ring();
        work
    }

    /// When the host must have shown life: its timeout, and the granularity of a second; or enabled the controller.
    pub(super) fn deadline(&self, limits: &Limits) -> Time {
        match self.state {
            State::Active if !self.timed => self.alive.after_ms(limits.idle_ms),
            State::Active if self.kato_ms != 0 => self.alive.after_ms(u64::from(self.kato_ms) + 1000),
            _ => Time::NEVER,
        }
    }

    fn completions(&mut self, connections: &mut Connections, env: &mut Env<'_>) -> u32 {
        let mut work = 0;
        let queues = self.front.as_ref().map_or(0, Front::queue_ids);
        for qid in 0..queues {
            let mut count = 0;
            while count < BATCH {
                let Some(front) = &mut self.front else { return work };
                if front.queue(qid).is_none_or(|queue| queue.in_flight == 0) {
                    break;
                }
                let Some(entry) = front.completion(qid) else { break };
                self.completed(qid, &entry, connections, env);
                count += 1;
            }
            if count > 0
                && let Some(front) = &self.front
            {
                front.ring_head(qid);
            }
            work += count;
        }
        work
    }

    #[inline]
    fn completed(&mut self, qid: u16, done: &CompletionEntry, connections: &mut Connections, env: &mut Env<'_>) {
        let Some(front) = &mut self.front else { return };
        let index = done.cid;
        let Some(command) = front.command(qid, index) else { return };
        let (entry, len, purpose) = (command.entry, command.len, command.purpose);
        if purpose != Purpose::Host {
            front.release(qid, index);
            self.own_completed(purpose, done.status(), connections, env.counters);
            return;
        }
        let link = self.links.get(usize::from(qid)).copied().flatten();
        let Some(Some(connection)) = link.and_then(|link| connections.get_mut(link)) else {
            front.release(qid, index);
            return;
        };
        if connection.terminated {
            front.release(qid, index);
            return;
        }
        let cid = entry.cdw0.cid();
        let (mut status, mut result) = (done.status(), done.result64());
        if self.taking_back
            && qid == 0
            && entry.admin_opcode() == AdminOpcode::ASYNC_EVENT_REQUEST
            && status.is(Status::ABORTED_BY_REQUEST)
        {
            self.taking_back = false;
            status = Status::SUCCESS;
            result = AsyncEvent::of(EventType::NOTICE, notice_info::ANA_CHANGE, LogId::ANA).into_bits().into();
        }
        if len == 0 || status.is_error() || direction(&entry) != DataDirection::ToHost {
            front.release(qid, index);
            connection.respond(cid, status, result);
            return;
        }
        if qid == 0 && entry.admin_opcode() == AdminOpcode::IDENTIFY {
            let mut page = [0; PAGE];
            front.read(qid, index, &mut page);
            patch(&entry, &mut page, env.exported, self.cntlid, env.limits);
            front.write(qid, index, 0, &page);
        }
        let omit = connection.may_omit_response(status, result);
        connection.data_header(cid, len, omit);
        front.pieces(qid, index, len, |offset, len| connection.out.data(offset, len));
        if connection.rules.digests.data() {
            connection.out.put(&front.crc(qid, index, len).to_le_bytes());
        }
        connection.out.done(index);
        if !omit {
            connection.respond(cid, status, result);
        }
    }

    /// A command of the target's own has completed.
    fn own_completed(&mut self, purpose: Purpose, status: Status, connections: &mut Connections, counters: &mut Counters) {
        let Some(front) = &mut self.front else { return };
        let link = |links: &[Option<usize>], qid: u16| links.get(usize::from(qid)).copied().flatten();
        match purpose {
            Purpose::CreateCq(qid) => {
                let made = !status.is_error()
                    && front.create_sq(qid).is_some_and(|entry| front.submit_own(Purpose::CreateSq(qid), entry));
                if !made {
                    front.remove_queue(qid);
                    self.queue_failed(qid, connections, counters);
                }
            }
            Purpose::CreateSq(qid) if status.is_error() => {
                front.submit_own(Purpose::DeleteCq(qid), SubmissionEntry::delete_io_cq(qid));
                self.queue_failed(qid, connections, counters);
                self.stages[usize::from(qid)] = Stage::Deleting;
            }
            Purpose::CreateSq(qid) => {
                self.stages[usize::from(qid)] = Stage::Live;
                let connection = link(&self.links, qid).and_then(|at| connections.get_mut(at)).and_then(Option::as_mut);
                if let Some(connection) = connection {
                    connection.connect_succeeded();
                } else {
                    self.stages[usize::from(qid)] = Stage::Deleting;
                    self.deletes.push(qid);
                }
            }
            Purpose::DeleteSq(qid) => {
                front.submit_own(Purpose::DeleteCq(qid), SubmissionEntry::delete_io_cq(qid));
            }
            Purpose::DeleteCq(qid) => {
                front.remove_queue(qid);
                self.stages[usize::from(qid)] = Stage::None;
            }
            Purpose::Abort | Purpose::Host => {}
        }
    }

    fn queue_failed(&mut self, qid: u16, connections: &mut Connections, counters: &mut Counters) {
        self.stages[usize::from(qid)] = Stage::None;
        let link = self.links[usize::from(qid)].take();
        if let Some(Some(connection)) = link.and_then(|link| connections.get_mut(link)) {
            counters.connects_refused += 1;
            connection.connect_failed();
        }
    }

    fn delete_queues(&mut self) {
        let Some(front) = &mut self.front else { return };
        self.deletes.retain(|&qid| !front.submit_own(Purpose::DeleteSq(qid), SubmissionEntry::delete_io_sq(qid)));
    }

    /// Starts commands that waited for memory.
    fn unpark(&mut self, connections: &mut Connections) {
        let Some(front) = &mut self.front else { return };
        while let Some(&(qid, index)) = self.parked.front() {
            if front.command(qid, index).is_some() && !front.place(qid, index) {
                return;
            }
            self.parked.pop_front();
            let link = self.links.get(usize::from(qid)).copied().flatten();
            match link.and_then(|link| connections.get_mut(link)).and_then(Option::as_mut) {
                Some(connection) => start(front, connection, qid, index),
                None => front.release(qid, index),
            }
        }
    }

    /// Takes an event request back from the controller, to tell the host of an ANA change with it.
    fn report_ana(&mut self, env: &Env<'_>) {
        if self.ana_told == env.exported.ana_changes || self.taking_back {
            return;
        }
        let Some(front) = &mut self.front else { return };
        if self.events & ANA_NOTICE == 0 {
            self.ana_told = env.exported.ana_changes;
            return;
        }
        let waiting = front.queue(0).and_then(|queue| {
            queue.commands.iter().position(|command| {
                command.submitted
                    && command.purpose == Purpose::Host
                    && command.entry.admin_opcode() == AdminOpcode::ASYNC_EVENT_REQUEST
            })
        });
        let Some(index) = waiting else { return };
        if front.submit_own(Purpose::Abort, SubmissionEntry::abort(0, index as u16)) {
            self.taking_back = true;
            self.ana_told = env.exported.ana_changes;
        }
    }
}

/// Begins a command that has its memory: asks for its data, or gives it to the controller.
#[inline]
fn start(front: &mut Front, connection: &mut Connection, qid: u16, index: u16) {
    let max = connection.rules.max_h2c_data;
    let Some(command) = front.command(qid, index) else { return };
    let entry = command.entry;
    if command.len > 0 && direction(&entry) == DataDirection::ToController {
        command.receiving = true;
        command.asked = command.len.min(max);
        let asked = command.asked;
        connection.ask(entry.cdw0.cid(), index, 0, asked);
        return;
    }
    if qid == 0 && command.len > 0 && entry.admin_opcode() == AdminOpcode::GET_FEATURES {
        // The controller fills in as much as the feature has.
        let len = (command.len as usize).min(PAGE);
        front.write(qid, index, 0, &[0; PAGE][..len]);
    }
    front.submit(qid, index, entry);
}
