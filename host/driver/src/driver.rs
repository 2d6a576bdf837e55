//! The driver of one function: its state, its admin queue, its queue pairs.

use crate::admin::{Admin, AdminAnswer, AdminData, Event, RequestData, Ticket};
use crate::config::{DriverConfig, queue_entries, timeout_ns};
use crate::error::{DriverError, Fault};
use crate::init::Phase;
use crate::link::{Link, Orphan};
use crate::pairs::PairRecord;
use crate::ring::{MAX_ENTRIES, RingShape};
use dray_device::command::SubmitError;
use dray_device::event::EventLine;
use dray_device::function::Function;
use dray_device::memory::Pages;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{IdentifyController, IdentifyControllerNvm};
use dray_nvme::registers::{Cap, Csts, Vs, offset};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// How often CSTS is read while nothing is wrong, in nanoseconds: a read over PCIe costs a microsecond.
const HEALTH_NS: u64 = 10_000_000;
/// How often registers are looked at while the controller starts, in nanoseconds.
const WAIT_NS: u64 = 50_000;
/// Resets of the driver's own within [`CALM_NS`] before it gives up.
const MAX_RESETS: u32 = 3;
const CALM_NS: u64 = 10_000_000_000;

/// Where a driver is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverState {
    /// CC.EN is cleared, or about to be; CSTS.RDY is to follow.
    Resetting,
    /// CC.EN is set; CSTS.RDY is to follow.
    Enabling,
    /// The controller says what it is, and gets its set-up.
    Identifying,
    /// Everything works.
    Ready,
    /// CC.SHN is set; CSTS.SHST is to follow.
    ShuttingDown,
    /// The controller is shut down.
    Stopped,
    /// The driver gave up. [`Driver::reset`] tries again. While resets are forbidden the admin queue goes on where it can.
    Failed(DriverError),
}

/// The driver of one function. It owns the controller's registers and admin queue; queue pairs and controller data queues are
/// values of their own that die with the controller's reset.
#[derive(Debug)]
pub struct Driver {
    pub(crate) function: Arc<dyn Function>,
    pub(crate) config: DriverConfig,
    pub(crate) state: DriverState,
    pub(crate) phase: Phase,
    pub(crate) deadline: Option<Time>,
    pub(crate) cap: Cap,
    pub(crate) admin: Admin,
    pub(crate) admin_shape: RingShape,
    pub(crate) admin_memory: Arc<MappedBuffer>,
    pub(crate) identify: Option<Box<IdentifyController>>,
    pub(crate) identify_nvm: Option<Box<IdentifyControllerNvm>>,
    pub(crate) max_transfer: usize,
    pub(crate) queues_granted: u16,
    pub(crate) pairs: Vec<PairRecord>,
    pub(crate) pair_serial: u32,
    pub(crate) link: Arc<Link>,
    pub(crate) orphans: Vec<Orphan>,
    /// Shadow and event index page, while the controller has them.
    pub(crate) shadow: Option<Arc<MappedBuffer>>,
    pub(crate) generation: u32,
    calls_seen: u32,
    aborts: VecDeque<(u16, u16)>,
    aborts_sent: Vec<Ticket>,
    forbid_reset: bool,
    resets: u32,
    last_reset: Time,
    last_failure: Option<DriverError>,
    next_health: Time,
    line: Option<EventLine>,
}

impl Driver {
    /// A driver over `function`, in [`DriverState::Resetting`]; polling brings it to [`DriverState::Ready`]. All memory of the
    /// admin side is allocated and mapped here.
    ///
    /// # Errors
    /// [`DriverError::Memory`].
    pub fn new(function: Arc<dyn Function>, config: DriverConfig) -> Result<Self, DriverError> {
        let entries = queue_entries(u32::from(config.admin_entries), 8, MAX_ENTRIES);
        let admin_shape = RingShape { entries, max_transfer: crate::admin::MAX_ADMIN_DATA };
        let admin = Admin::new(function.space(), entries, timeout_ns(config.admin_timeout_ms), config.pages)?;
        let admin_memory = admin_shape.memory(function.space(), config.pages)?;
        let line = function.event_line(0);
        Ok(Self {
            function,
            config,
            state: DriverState::Resetting,
            phase: Phase::Appear,
            deadline: None,
            cap: Cap::new(),
            admin,
            admin_shape,
            admin_memory,
            identify: None,
            identify_nvm: None,
            max_transfer: 0,
            queues_granted: 0,
            pairs: Vec::new(),
            pair_serial: 0,
            link: Arc::default(),
            orphans: Vec::new(),
            shadow: None,
            generation: 0,
            calls_seen: 0,
            aborts: VecDeque::new(),
            aborts_sent: Vec::new(),
            forbid_reset: false,
            resets: 0,
            last_reset: Time::default(),
            last_failure: None,
            next_health: Time::default(),
            line,
        })
    }

    /// Where the driver is.
    #[must_use]
    pub fn state(&self) -> &DriverState {
        &self.state
    }

    /// Whether the controller takes commands and queue pairs.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.state == DriverState::Ready
    }

    /// The failure that last made the driver reset the controller, or give up.
    #[must_use]
    pub fn last_failure(&self) -> Option<&DriverError> {
        self.last_failure.as_ref()
    }

    /// Counts the controller resets that this driver has made or found: queues of an older generation are gone.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Identify Controller (CNS 01h), once the driver has been ready.
    #[must_use]
    pub fn identify(&self) -> Option<&IdentifyController> {
        self.identify.as_deref()
    }

    /// Identify Controller of the NVM command set (CNS 06h, CSI 0), where the controller has it.
    #[must_use]
    pub fn identify_nvm(&self) -> Option<&IdentifyControllerNvm> {
        self.identify_nvm.as_deref()
    }

    /// CAP, as read at the last reset.
    #[must_use]
    pub fn capabilities(&self) -> Cap {
        self.cap
    }

    /// VS, read now.
    #[must_use]
    pub fn version(&self) -> Vs {
        Vs::from_bits(self.function.read32(offset::VS))
    }

    /// The function.
    #[must_use]
    pub fn function(&self) -> &Arc<dyn Function> {
        &self.function
    }

    /// The address space that data of commands must be mapped in.
    #[must_use]
    pub fn space(&self) -> &AddressSpace {
        self.function.space()
    }

    /// Which pages its queues are made of; buffers for it are best made of the same.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.config.pages
    }

    /// Most bytes of data in one admin command: MDTS, at most 128 KiB.
    #[must_use]
    pub fn admin_limit(&self) -> usize {
        self.admin.limit()
    }

    /// Whether the I/O queues' doorbells are shadow doorbells.
    #[must_use]
    pub fn has_shadow_doorbells(&self) -> bool {
        self.shadow.is_some() && self.state == DriverState::Ready
    }

    /// I/O queue pairs that the controller granted.
    #[must_use]
    pub fn queues_granted(&self) -> u16 {
        self.queues_granted
    }

    /// Sends an admin command. `entry` carries everything but the identifier and the data pointer; `data` goes through memory
    /// of the driver's own. It is announced at once.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    pub fn request(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        data: AdminData<'_>,
    ) -> Result<Ticket, SubmitError> {
        self.request_any(now, entry, RequestData::Through(data))
    }

    /// As [`request`](Self::request) for a command whose data pointer is a queue of ours.
    pub(crate) fn request_described(&mut self, now: Time, entry: &SubmissionEntry) -> Result<Ticket, SubmitError> {
        self.request_any(now, entry, RequestData::Described)
    }

    fn request_any(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        data: RequestData<'_>,
    ) -> Result<Ticket, SubmitError> {
        if !matches!(self.state, DriverState::Ready | DriverState::Failed(_)) {
            return Err(SubmitError::Dead);
        }
        self.admin.request(now.0, entry, data)
    }

    /// The answer of a request, once; `None` while it is under way. An answer that was given already, or never asked for
    /// while hundreds of others came, is an unknown one.
    pub fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        self.admin.answer(ticket)
    }

    /// Admin commands that the controller has not answered, whoever waits for them; event requests are not counted.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.admin.outstanding()
    }

    /// Takes the buffer of an answer back, for the next one.
    pub fn recycle(&mut self, data: Vec<u8>) {
        self.admin.recycle(data);
    }

    /// The next asynchronous event. Its request has been posted again already; reading the event's log page, which lets the
    /// type report again, is the caller's.
    pub fn next_event(&mut self) -> Option<Event> {
        self.admin.next_event()
    }

    /// Events that nobody took in time.
    #[must_use]
    pub fn events_dropped(&self) -> u64 {
        self.admin.events_dropped()
    }

    /// Asks the controller to abort a command (Base 2.3 §5.2.1). The command itself ends in its queue; the answer's result has
    /// bit 0 set if it was not aborted.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn abort(&mut self, now: Time, sqid: u16, cid: u16) -> Result<Ticket, SubmitError> {
        self.request(now, &SubmissionEntry::abort(sqid, cid), AdminData::None)
    }

    /// Resets the controller and brings it up again. All queue pairs and controller data queues die.
    pub fn reset(&mut self, now: Time) {
        self.resets = 0;
        self.begin_reset(now);
    }

    /// While a controller is suspended its management controller must not be reset, since that would end the suspension
    /// (Base 2.3 §8.1.13): with `forbid` set the driver never resets by itself. It reports [`DriverState::Failed`], gives
    /// the broken queue's commands back with unknown outcomes, and leaves everything else as it is.
    pub fn forbid_reset(&mut self, forbid: bool) {
        self.forbid_reset = forbid;
    }

    /// Shuts the controller down (Base 2.3 §3.6). All queue pairs die; [`DriverState::Stopped`] says that it is done.
    pub fn shutdown(&mut self, now: Time) {
        self.begin_shutdown(now);
    }

    /// The line of the admin queue's vector, for whoever sleeps. After a sleep that it ended, [`EventLine::take`] clears it
    /// (not needed where it is watched for edges).
    #[must_use]
    pub fn event_line(&self) -> Option<&EventLine> {
        self.line.as_ref()
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Something broke. Resets the controller if that is allowed, else gives up.
    pub(crate) fn fail(&mut self, now: Time, error: DriverError) {
        tracing::warn!(%error, "the controller failed");
        self.last_failure = Some(error.clone());
        if now.ns_since(self.last_reset) > CALM_NS {
            self.resets = 0;
        }
        // Fatal while it is being enabled: another reset is the cure that the specification names (Base 2.3 §9.5).
        let enabling = error == DriverError::Fatal && matches!(self.state, DriverState::Resetting | DriverState::Enabling);
        let may_reset = (self.state == DriverState::Ready || enabling) && !self.forbid_reset && error != DriverError::Gone;
        if may_reset && self.resets < MAX_RESETS {
            self.resets += 1;
            self.last_reset = now;
            self.begin_reset(now);
        } else {
            self.give_up(error);
        }
    }

    fn give_up(&mut self, error: DriverError) {
        match &error {
            // Only one queue is broken: the rest may be needed for the way back.
            DriverError::Protocol { qid, .. } if *qid != 0 && self.forbid_reset => {
                for record in self.pairs.iter_mut().filter(|r| r.shared.qid == *qid) {
                    record.shared.kill();
                }
            }
            _ => {
                if !self.forbid_reset && error != DriverError::Gone {
                    self.disable();
                }
                self.bury();
            }
        }
        self.phase = Phase::Idle;
        self.deadline = None;
        self.state = DriverState::Failed(error);
    }

    /// Looks whether the controller is there and well. RDY alone says nothing unless it is watched: it may be down for a moment while
    /// a slot is pointed at another controller.
    fn check_health(&mut self, now: Time) {
        self.next_health = now.after_ns(HEALTH_NS);
        let csts = Csts::from_bits(self.function.read32(offset::CSTS));
        if csts.is_gone() {
            self.fail(now, DriverError::Gone);
        } else if csts.cfs() {
            self.fail(now, DriverError::Fatal);
        } else if self.config.watch_ready && !csts.rdy() {
            self.fail(now, DriverError::Disabled);
        }
    }

    fn attend(&mut self, now: Time) {
        let calls = self.link.calls();
        if calls == self.calls_seen {
            return;
        }
        self.calls_seen = calls;
        self.orphans.append(&mut self.link.take_orphans());
        let mut broken = None;
        for record in &mut self.pairs {
            let qid = record.shared.qid;
            let notes = record.shared.take_notes();
            self.aborts.extend(notes.aborts.into_iter().map(|cid| (qid, cid)));
            broken = broken.or(notes.fault.map(|fault| DriverError::Protocol { qid, fault }));
        }
        if let Some(error) = broken {
            let error = self.diagnose(error);
            if matches!(self.phase, Phase::Idle) {
                self.fail(now, error);
            }
        }
    }

    /// A queue that stands still or talks nonsense may be a controller that has gone or failed.
    fn diagnose(&self, error: DriverError) -> DriverError {
        let csts = Csts::from_bits(self.function.read32(offset::CSTS));
        if csts.is_gone() {
            DriverError::Gone
        } else if csts.cfs() {
            DriverError::Fatal
        } else if !csts.rdy() {
            DriverError::Disabled
        } else {
            error
        }
    }

    fn send_aborts(&mut self, now: Time) {
        if self.aborts.is_empty() && self.aborts_sent.is_empty() {
            return;
        }
        let admin = &mut self.admin;
        self.aborts_sent.retain(|ticket| admin.answer(*ticket).is_none());
        let limit = self.identify.as_ref().map_or(1, |id| usize::from(id.acl) + 1);
        while self.aborts_sent.len() < limit
            && let Some(&(sqid, cid)) = self.aborts.front()
        {
            let Ok(ticket) = self.abort(now, sqid, cid) else { break };
            tracing::warn!(sqid, cid, "a command timed out and is aborted");
            self.aborts.pop_front();
            self.aborts_sent.push(ticket);
        }
    }

    pub(crate) fn forget_aborts(&mut self) {
        self.aborts.clear();
        self.aborts_sent.clear();
    }

    fn poll_admin(&mut self, now: Time) -> u32 {
        match self.admin.poll(now.0, &mut self.aborts) {
            Ok(count) => count as u32,
            // The reset under way is the cure: what the old queue still says must not end it.
            Err(_) if self.state == DriverState::Resetting => 0,
            Err(fault) => {
                self.admin_fault(now, fault);
                1
            }
        }
    }

    fn admin_fault(&mut self, now: Time, fault: Fault) {
        let error = self.diagnose(DriverError::Protocol { qid: 0, fault });
        self.fail(now, error);
    }
}

impl Poll for Driver {
    fn poll(&mut self, now: Time) -> Progress {
        self.attend(now);
        let mut work = self.poll_admin(now);
        let starting = !matches!(self.phase, Phase::Idle);
        if starting {
            work += self.step(now);
        } else if self.admin.is_started() && self.state == DriverState::Ready && now >= self.next_health {
            self.check_health(now);
        }
        if self.admin.is_started() && matches!(self.phase, Phase::Idle) {
            self.send_aborts(now);
            work += self.poll_pairs(now);
            work += self.poll_orphans(now);
        }
        let next = match (&self.phase, work) {
            (_, 1..) => Next::Now,
            (Phase::Idle, _) if self.state != DriverState::Ready => Next::OnWake,
            (Phase::Idle, _) => Next::At(self.next_health),
            _ => Next::At(now.after_ns(WAIT_NS)),
        };
        Progress { work, next }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        if let Some(line) = &self.line {
            visit(line.as_fd());
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The queues' memory goes away with the driver: the controller must not touch it any more. Where resets are
        // forbidden it is left alone; its accesses then end at addresses that are not mapped any more.
        if self.admin.is_started() && !self.forbid_reset {
            self.disable();
        }
        self.bury();
    }
}
