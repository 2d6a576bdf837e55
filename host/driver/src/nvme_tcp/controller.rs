//! The admin side of an association: set-up, requests, keep alive, I/O queues.

use super::connection::{Connection, MOST_IN_CAPSULE};
use super::error::{TcpError, TcpFault};
use super::handshake::Handshake;
use super::queue::{Association, TcpQueue};
use super::requests::Requests;
use super::table::Shape;
use super::TcpConfig;
use crate::admin::{AdminAnswer, AdminData, Event, MAX_ADMIN_DATA, Ticket};
use crate::config::{queue_entries, timeout_ns};
use dray_device::command::SubmitError;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::random::SecureRandom;
use dray_device::socket::Stream;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::feature::{FeatureId, NumberOfQueues};
use dray_nvme::identify::{Cns, CommandSetId, IdentifyController, IdentifyControllerNvm};
use dray_nvme::registers::{CQES, Cap, Cc, Csts, SQES, ShutdownNotification, ShutdownStatus, Vs, offset};
use dray_nvme::tcp::fabrics::{CAPABILITIES_OFFSET, FabricsCapabilities};
use dray_nvme::tcp::{DISCOVERY_NQN, MAX_NQN};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// Most entries of the queues of an initiator.
const MOST_ENTRIES: u32 = 1024;
/// Most bytes that one Write Zeroes can cover: 65,536 blocks of 512 bytes.
const MOST_ZEROES: u64 = 32 << 20;
/// How often CSTS is read while it is waited for.
const STATUS_INTERVAL_NS: u64 = 1_000_000;
/// How soon a part that the stream holds up wants to be polled again.
const BLOCKED_NS: u64 = 100_000;

/// Where an initiator is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// Connecting, authenticating, enabling.
    Connecting,
    /// Requests are taken and queues are opened.
    Ready,
    /// CC.SHN was set, the controller has not finished yet.
    ShuttingDown,
    /// It is over.
    Failed(TcpError),
}

#[derive(Debug)]
enum Step {
    Handshake,
    Capabilities(Ticket),
    Version(Ticket),
    Enable(Ticket),
    /// Reads CSTS until it is as wanted.
    Await { ticket: Option<Ticket>, next: Time, until: Time, what: Awaited },
    Identify(Ticket),
    IdentifyNvm(Ticket),
    Queues(Ticket),
    Shutdown(Ticket),
    Idle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    Ready,
    ShutDown,
}

/// An I/O queue being opened: what to ask for it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpQueueTicket {
    qid: u16,
}

#[derive(Debug)]
struct Opening {
    qid: u16,
    connection: Option<Connection>,
    handshake: Handshake,
    outcome: Option<Result<(), TcpError>>,
}

/// A remote controller over NVMe/TCP: its admin queue. See the [module](super) for what it promises.
pub struct TcpInitiator {
    config: TcpConfig,
    random: Box<dyn SecureRandom>,
    connection: Connection,
    handshake: Option<Handshake>,
    requests: Requests,
    association: Arc<Association>,
    state: TcpState,
    step: Step,
    cntlid: u16,
    cap: Cap,
    version: Vs,
    identify: Option<Box<IdentifyController>>,
    identify_nvm: Option<Box<IdentifyControllerNvm>>,
    queues_granted: u16,
    next_qid: u16,
    openings: Vec<Opening>,
    next_keep_alive: Time,
    ended_at: Option<Time>,
}

impl std::fmt::Debug for TcpInitiator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpInitiator").field("state", &self.state).field("cntlid", &self.cntlid).finish_non_exhaustive()
    }
}

impl TcpInitiator {
    /// Begins an association over a connected stream; polls take it further until [`Self::state`] is ready.
    ///
    /// # Errors
    /// [`TcpError::BadConfig`], [`TcpError::Memory`].
    pub fn connect(
        now: Time,
        config: TcpConfig,
        stream: Box<dyn Stream>,
        mut random: Box<dyn SecureRandom>,
    ) -> Result<Self, TcpError> {
        for nqn in [&config.host_nqn, &config.subsystem_nqn] {
            if nqn.len() > MAX_NQN || !nqn.starts_with("nqn.") || nqn.contains('\0') {
                return Err(TcpError::BadConfig("an NQN begins with \"nqn.\" and has at most 223 bytes"));
            }
        }
        if config.controller_secret.is_some() && config.secret.is_none() {
            return Err(TcpError::BadConfig("a secret of the controller needs one of the host"));
        }
        let entries = queue_entries(u32::from(config.admin_entries), 32, MOST_ENTRIES);
        // Data of admin commands up to 8 KiB may always go with the command (TCP 1.1 §3.4.1).
        let shape = Shape { depth: entries as usize - 1, max_transfer: MAX_ADMIN_DATA, in_capsule: 8 << 10 };
        let mut connection = Connection::new(stream, config.digests, shape, timeout_ns(config.admin_timeout_ms));
        let handshake = Handshake::begin(now, &mut connection, &config, 0, entries, config.cntlid, &mut *random)?;
        Ok(Self {
            random,
            connection,
            handshake: Some(handshake),
            requests: Requests::new(entries as usize)?,
            association: Arc::default(),
            state: TcpState::Connecting,
            step: Step::Handshake,
            cntlid: config.cntlid,
            cap: Cap::default(),
            version: Vs::default(),
            identify: None,
            identify_nvm: None,
            queues_granted: 0,
            next_qid: 1,
            openings: Vec::new(),
            next_keep_alive: Time::NEVER,
            ended_at: None,
            config,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &TcpState {
        &self.state
    }

    /// Whether requests are taken and queues are opened.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.state == TcpState::Ready
    }

    /// CNTLID of the controller.
    #[must_use]
    pub fn cntlid(&self) -> u16 {
        self.cntlid
    }

    /// CAP.
    #[must_use]
    pub fn capabilities(&self) -> Cap {
        self.cap
    }

    /// VS.
    #[must_use]
    pub fn version(&self) -> Vs {
        self.version
    }

    /// Identify Controller.
    #[must_use]
    pub fn identify(&self) -> Option<&IdentifyController> {
        self.identify.as_deref()
    }

    /// Identify Controller of the NVM command set, where the controller has it.
    #[must_use]
    pub fn identify_nvm(&self) -> Option<&IdentifyControllerNvm> {
        self.identify_nvm.as_deref()
    }

    /// I/O queues that the controller grants.
    #[must_use]
    pub fn queues_granted(&self) -> u16 {
        self.queues_granted
    }

    /// When commands of unknown outcome cannot take effect any more: the target has noticed the end of the association by then
    /// (twice KATO after it; Base 2.3 §9.6). `None` while the association lives, or if it has no keep alive.
    #[must_use]
    pub fn quiet_at(&self) -> Option<Time> {
        let ended = self.ended_at.filter(|_| self.config.kato_ms > 0)?;
        Some(ended.after_ms(2 * u64::from(self.config.kato_ms)))
    }

    /// Sends an admin command (or a fabrics one). `entry` carries everything but the identifier and the data pointer.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    pub fn request(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<Ticket, SubmitError> {
        if self.state != TcpState::Ready {
            return Err(SubmitError::Dead);
        }
        self.requests.request(now, &mut self.connection, entry, data)
    }

    /// The answer of a request, once; `None` while it is under way.
    pub fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        self.requests.answer(ticket)
    }

    /// The next asynchronous event. Its request has been posted again already.
    pub fn next_event(&mut self) -> Option<Event> {
        self.requests.next_event()
    }

    /// Events that came while nobody took the earlier ones.
    #[must_use]
    pub fn events_dropped(&self) -> u64 {
        self.requests.events_dropped()
    }

    /// Begins to open an I/O queue over a connected stream of its own. `entries` is rounded down to a power of two and to what
    /// the controller takes; one less than that many commands can be outstanding.
    ///
    /// # Errors
    /// [`TcpError::NoQueue`], [`TcpError::Memory`].
    pub fn open_queue(&mut self, now: Time, stream: Box<dyn Stream>, entries: u16) -> Result<TcpQueueTicket, TcpError> {
        if self.state != TcpState::Ready {
            return Err(TcpError::NoQueue("the association is not ready"));
        }
        if self.next_qid > self.queues_granted {
            return Err(TcpError::NoQueue("the controller grants no more"));
        }
        let qid = self.next_qid;
        let most = self.cap.max_queue_entries().clamp(2, MOST_ENTRIES);
        let told = self.identify.as_ref().map_or(0, |identify| u32::from(identify.maxcmd));
        let entries = queue_entries(u32::from(entries), 2, if told > 0 { most.min(told + 1).max(2) } else { most });
        let shape = self.io_shape(entries);
        let timeout = timeout_ns(self.config.io_timeout_ms);
        let mut connection = Connection::new(stream, self.config.digests, shape, timeout);
        let random = &mut *self.random;
        let handshake = Handshake::begin(now, &mut connection, &self.config, qid, entries, self.cntlid, random)?;
        self.next_qid += 1;
        self.openings.push(Opening { qid, connection: Some(connection), handshake, outcome: None });
        Ok(TcpQueueTicket { qid })
    }

    fn io_shape(&self, entries: u32) -> Shape {
        let identify = self.identify.as_deref();
        let mdts = identify.and_then(|identify| identify.max_transfer_bytes(self.cap.mpsmin()));
        let mdts = mdts.map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        let fabrics = identify.and_then(|identify| identify.as_bytes().get(CAPABILITIES_OFFSET..)).unwrap_or(&[]);
        let in_capsule = match FabricsCapabilities::read_from_prefix(fabrics) {
            // Data elsewhere than behind the command is not for TCP.
            Ok((capabilities, _)) if capabilities.icdoff == 0 => {
                (capabilities.ioccsz as usize).saturating_mul(16).saturating_sub(size_of::<SubmissionEntry>())
            }
            _ => 0,
        };
        Shape {
            depth: entries as usize - 1,
            max_transfer: self.config.max_transfer_bytes.clamp(4096, 16 << 20).min(mdts),
            in_capsule: in_capsule.min(self.config.in_capsule_bytes).min(MOST_IN_CAPSULE),
        }
    }

    /// The queue, once it is open; `None` while it is being opened. A ticket is good for one answer.
    pub fn take_queue(&mut self, ticket: TcpQueueTicket) -> Option<Result<TcpQueue, TcpError>> {
        let Some(at) = self.openings.iter().position(|opening| opening.qid == ticket.qid) else {
            return Some(Err(TcpError::NoQueue("it was asked for before")));
        };
        self.openings[at].outcome.as_ref()?;
        let Opening { qid, connection, outcome, .. } = self.openings.swap_remove(at);
        let zeroes = self.max_write_zeroes();
        Some(match (outcome, connection) {
            (Some(Ok(())), Some(connection)) => {
                Ok(TcpQueue::new(qid, connection, Arc::clone(&self.association), zeroes))
            }
            (Some(Err(error)), _) => Err(error),
            _ => Err(TcpError::NoQueue("it was not opened")),
        })
    }

    fn max_write_zeroes(&self) -> u64 {
        if !self.identify.as_ref().is_some_and(|identify| identify.oncs.write_zeroes()) {
            return 0;
        }
        match self.identify_nvm.as_ref().map_or(0, |nvm| u32::from(nvm.wzsl)) {
            0 => MOST_ZEROES,
            wzsl => 1u64.checked_shl(12 + u32::from(self.cap.mpsmin()) + wzsl).map_or(MOST_ZEROES, |b| b.min(MOST_ZEROES)),
        }
    }

    /// Asks the controller to shut down (CC.SHN); the association ends when it has. Drain the queues first.
    pub fn shutdown(&mut self, now: Time) {
        if self.state != TcpState::Ready {
            return;
        }
        let cc = enabled().with_shn(ShutdownNotification::NORMAL);
        let entry = SubmissionEntry::property_set(offset::CC, false, u64::from(cc.into_bits()));
        match self.requests.request(now, &mut self.connection, &entry, AdminData::None) {
            Ok(ticket) => (self.step, self.state) = (Step::Shutdown(ticket), TcpState::ShuttingDown),
            Err(_) => self.end(now, TcpError::Stopped),
        }
    }

    /// Ends the association at once: every connection of it is closed with its next poll.
    pub fn disconnect(&mut self, now: Time) {
        self.end(now, TcpError::Stopped);
    }

    fn end(&mut self, now: Time, error: TcpError) {
        if matches!(self.state, TcpState::Failed(_)) {
            return;
        }
        self.ended_at = Some(now);
        self.association.lose();
        self.connection.fail(TcpFault::Ended);
        let requests = &mut self.requests;
        self.connection.poll(now, &mut |completion| requests.end(completion));
        (self.step, self.handshake) = (Step::Idle, None);
        self.next_keep_alive = Time::NEVER;
        self.state = TcpState::Failed(error);
    }

    fn poll_steps(&mut self, now: Time) -> Result<u32, TcpError> {
        let mut work = 0;
        if let Some(handshake) = &mut self.handshake {
            if !handshake.poll(now, &mut self.connection)? {
                return Ok(work);
            }
            self.cntlid = handshake.cntlid();
            self.handshake = None;
            self.step = Step::Capabilities(self.ask(now, &SubmissionEntry::property_get(offset::CAP, true), 0)?);
            work += 1;
        }
        let requests = &mut self.requests;
        work += self.connection.poll(now, &mut |completion| requests.end(completion)) as u32;
        if let Some(fault) = self.connection.fault() {
            return Err(TcpError::Connection { qid: 0, fault });
        }
        if self.association.is_lost() {
            return Err(TcpError::Connection { qid: 0, fault: TcpFault::AssociationLost });
        }
        while self.take_step(now)? {
            work += 1;
        }
        Ok(work)
    }

    fn ask(&mut self, now: Time, entry: &SubmissionEntry, bytes: usize) -> Result<Ticket, TcpError> {
        let data = if bytes > 0 { AdminData::In(bytes) } else { AdminData::None };
        self.requests.request(now, &mut self.connection, entry, data).map_err(|_| match self.connection.fault() {
            Some(fault) => TcpError::Connection { qid: 0, fault },
            None => TcpError::Unsupported("the admin queue takes no commands"),
        })
    }

    /// The answer of the step's command; `None` while it is under way.
    fn accepted(&mut self, ticket: Ticket, command: &'static str) -> Result<Option<AdminAnswer>, TcpError> {
        match self.requests.answer(ticket) {
            Some(answer) if answer.completion.status.is_error() => {
                Err(TcpError::Refused { command, status: answer.completion.status })
            }
            other => Ok(other),
        }
    }

    /// Whether there was something to do.
    fn take_step(&mut self, now: Time) -> Result<bool, TcpError> {
        let next = match self.step {
            Step::Handshake | Step::Idle => None,
            Step::Capabilities(ticket) => match self.accepted(ticket, "Property Get (CAP)")? {
                None => None,
                Some(answer) => {
                    self.cap = Cap::from_bits(answer.completion.result);
                    Some(Step::Version(self.ask(now, &SubmissionEntry::property_get(offset::VS, false), 0)?))
                }
            },
            Step::Version(ticket) => match self.accepted(ticket, "Property Get (VS)")? {
                None => None,
                Some(answer) => {
                    self.version = Vs::from_bits(answer.completion.result as u32);
                    let entry = SubmissionEntry::property_set(offset::CC, false, u64::from(enabled().into_bits()));
                    Some(Step::Enable(self.ask(now, &entry, 0)?))
                }
            },
            Step::Enable(ticket) => self.accepted(ticket, "Property Set (CC)")?.map(|_| {
                let ms = u64::from(self.cap.ready_timeout_ms().max(500));
                Step::Await { ticket: None, next: now, until: now.after_ms(ms), what: Awaited::Ready }
            }),
            Step::Await { ticket, next, until, what } => self.wait(now, ticket, next, until, what)?,
            Step::Identify(ticket) => match self.accepted(ticket, "Identify Controller")? {
                None => None,
                Some(answer) => Some(self.identified(now, &answer.data)?),
            },
            Step::IdentifyNvm(ticket) => match self.requests.answer(ticket) {
                None => None,
                Some(answer) => {
                    if !answer.completion.status.is_error() {
                        self.identify_nvm = IdentifyControllerNvm::read_from_prefix(&answer.data).ok().map(|(nvm, _)| Box::new(nvm));
                    }
                    let wanted = self.config.io_queues.max(1) - 1;
                    let value = NumberOfQueues::new().with_nsq(wanted).with_ncq(wanted).into_bits();
                    let entry = SubmissionEntry::set_features(FeatureId::NUMBER_OF_QUEUES, value, false);
                    Some(Step::Queues(self.ask(now, &entry, 0)?))
                }
            },
            Step::Queues(ticket) => self.accepted(ticket, "Set Features (Number of Queues)")?.map(|answer| {
                let granted = NumberOfQueues::from_bits(answer.completion.result as u32);
                self.queues_granted = granted.nsq().min(granted.ncq()).saturating_add(1).min(self.config.io_queues.max(1));
                self.ready(now)
            }),
            Step::Shutdown(ticket) => self.accepted(ticket, "Property Set (CC.SHN)")?.map(|_| {
                let until = now.after_ms(u64::from(self.config.connect_timeout_ms.max(1)));
                Step::Await { ticket: None, next: now, until, what: Awaited::ShutDown }
            }),
        };
        let moved = next.is_some();
        if let Some(next) = next {
            self.step = next;
        }
        Ok(moved)
    }

    fn wait(
        &mut self,
        now: Time,
        ticket: Option<Ticket>,
        next: Time,
        until: Time,
        what: Awaited,
    ) -> Result<Option<Step>, TcpError> {
        let Some(ticket) = ticket else {
            if now < next {
                return Ok(None);
            }
            let ticket = self.ask(now, &SubmissionEntry::property_get(offset::CSTS, false), 0)?;
            return Ok(Some(Step::Await { ticket: Some(ticket), next, until, what }));
        };
        let Some(answer) = self.accepted(ticket, "Property Get (CSTS)")? else { return Ok(None) };
        let csts = Csts::from_bits(answer.completion.result as u32);
        match what {
            _ if csts.cfs() => Err(TcpError::Fatal),
            Awaited::ShutDown if csts.shst() == ShutdownStatus::COMPLETE => Err(TcpError::Stopped),
            Awaited::Ready if csts.rdy() => {
                let entry = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::default());
                Ok(Some(Step::Identify(self.ask(now, &entry, 4096)?)))
            }
            _ if now >= until => Err(TcpError::TimedOut("enabling or shutting down the controller")),
            _ => Ok(Some(Step::Await { ticket: None, next: now.after_ns(STATUS_INTERVAL_NS), until, what })),
        }
    }

    fn identified(&mut self, now: Time, data: &[u8]) -> Result<Step, TcpError> {
        let (identify, _) =
            IdentifyController::read_from_prefix(data).map_err(|_| TcpError::Unsupported("Identify Controller is too short"))?;
        if identify.cntlid != self.cntlid {
            return Err(TcpError::Unsupported("Identify Controller names another controller"));
        }
        let aers = self.config.aers.min(identify.aerl.saturating_add(1)).min(8);
        self.requests.set_aers(aers);
        self.identify = Some(Box::new(identify));
        if self.config.subsystem_nqn == DISCOVERY_NQN {
            return Ok(self.ready(now));
        }
        let entry = SubmissionEntry::identify(Cns::CONTROLLER_NVM, 0, 0, CommandSetId::default());
        Ok(Step::IdentifyNvm(self.ask(now, &entry, 4096)?))
    }

    fn ready(&mut self, now: Time) -> Step {
        self.state = TcpState::Ready;
        if self.config.kato_ms > 0 {
            self.next_keep_alive = now.after_ms(u64::from(self.config.kato_ms / 2));
        }
        Step::Idle
    }

    fn poll_openings(&mut self, now: Time) -> bool {
        let lost = self.association.is_lost();
        let mut busy = false;
        for opening in self.openings.iter_mut().filter(|opening| opening.outcome.is_none()) {
            let Some(connection) = &mut opening.connection else { continue };
            if lost {
                connection.fail(TcpFault::AssociationLost);
            }
            busy |= connection.is_blocked();
            match opening.handshake.poll(now, connection) {
                Ok(false) => {}
                Ok(true) => opening.outcome = Some(Ok(())),
                Err(error) => {
                    opening.connection = None;
                    opening.outcome = Some(Err(error));
                }
            }
        }
        busy
    }
}

impl Poll for TcpInitiator {
    fn poll(&mut self, now: Time) -> Progress {
        if matches!(self.state, TcpState::Failed(_)) {
            self.poll_openings(now);
            return Progress::IDLE;
        }
        let work = match self.poll_steps(now) {
            Ok(work) => work,
            Err(error) => {
                self.end(now, error);
                self.poll_openings(now);
                return Progress::busy(1);
            }
        };
        if now >= self.next_keep_alive {
            let kato = u64::from(self.config.kato_ms);
            self.next_keep_alive = now.after_ms((kato / 2).max(1));
            self.requests.keep_alive(now, &mut self.connection, kato * 1_000_000);
        }
        if self.state == TcpState::Ready {
            self.requests.post_aers(now, &mut self.connection);
        }
        let blocked = self.poll_openings(now) || self.connection.is_blocked();
        if work > 0 {
            return Progress::busy(work);
        }
        let waiting = matches!(self.step, Step::Await { ticket: None, .. });
        let soon = if blocked || waiting { now.after_ns(BLOCKED_NS) } else { now.after_ms(100) };
        Progress { work: 0, next: Next::At(soon.min(self.next_keep_alive)) }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        let openings = self.openings.iter().filter_map(|opening| opening.connection.as_ref());
        for connection in std::iter::once(&self.connection).chain(openings) {
            if let Some(waker) = connection.waker() {
                visit(waker);
            }
        }
    }
}

/// CC of an enabled controller.
fn enabled() -> Cc {
    Cc::new().with_en(true).with_iosqes(SQES).with_iocqes(CQES)
}
