//! Admin commands (Base 2.3 §5): dispatch, asynchronous events, abort. The migration commands reach over controllers and are
//! carried out by the subsystem ([`crate::manage`]).

mod identify;
mod logs;
pub(crate) mod queues;
mod settings;

use crate::context::{Outcome, Work};
use crate::controller::Controller;
use crate::deviations::Deviation;
use crate::queue::Ready;
use crate::subsystem::Shared;
use dray_device::slot::Port;
use dray_nvme::command::{AbortCdw10, AbortDw0, AdminOpcode, FeaturesCdw10, Fuse, Psdt, SubmissionEntry};
use dray_nvme::event::{AsyncEvent, EventType};
use dray_nvme::feature::FeatureId;
use dray_nvme::log::{ErrorLogEntry, LogId};
use dray_nvme::command::StatusPhase;
use dray_nvme::status::Status;
use arrayvec::ArrayVec;
use std::collections::VecDeque;

/// AERL: most event requests outstanding, 0's based.
pub(crate) const AERL: u8 = 7;
/// Events kept while no request is there; more of one kind are one.
const MAX_EVENTS: usize = 160;
/// ELPE + 1.
pub(crate) const ERROR_ENTRIES: usize = 32;

/// An event to be reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    dw0: AsyncEvent,
    dw1: u32,
}

impl Event {
    pub(crate) fn new(kind: EventType, info: u8, lid: LogId) -> Self {
        Self { dw0: AsyncEvent::of(kind, info, lid), dw1: 0 }
    }

    /// A one-shot event of a controller data queue.
    pub(crate) fn one_shot(dw0: AsyncEvent, cdqid: u16) -> Self {
        Self { dw0, dw1: cdqid.into() }
    }

    fn bit(&self) -> u8 {
        1 << self.dw0.event_type().0
    }
}

/// What a controller's admin side remembers.
#[derive(Debug)]
pub(crate) struct AdminState {
    /// Identifiers of the outstanding event requests, oldest first.
    pub(crate) aers: ArrayVec<u16, 16>,
    events: VecDeque<Event>,
    /// Event types (bit n = type n) that were reported and whose log page was not read.
    pub(crate) masked: u8,
    /// Submission queues being deleted, and the commands that wait for it.
    pub(crate) deletes: Vec<(u16, u16)>,
    errors: VecDeque<ErrorLogEntry>,
    error_count: u64,
    /// NSIDs of the changed namespace list.
    pub(crate) changed: Vec<u32>,
}

impl AdminState {
    pub(crate) fn new() -> Self {
        Self {
            aers: ArrayVec::new(),
            events: VecDeque::with_capacity(MAX_EVENTS),
            masked: 0,
            deletes: Vec::new(),
            errors: VecDeque::with_capacity(ERROR_ENTRIES),
            error_count: 0,
            changed: Vec::new(),
        }
    }

    /// Queues an event; an equal one that waits stands for both.
    pub(crate) fn report(&mut self, event: Event) {
        if self.events.len() < MAX_EVENTS && !self.events.contains(&event) {
            self.events.push_back(event);
        }
    }

    /// Drops a pending one-shot event of a queue (Set Features 21h).
    pub(crate) fn discard(&mut self, event: Event) {
        self.events.retain(|waiting| *waiting != event);
    }

    /// Whether such an event waits to be reported.
    pub(crate) fn has(&self, event: &Event) -> bool {
        self.events.contains(event)
    }

    pub(crate) fn record_error(&mut self, ready: &Ready) {
        self.error_count += 1;
        if self.errors.len() == ERROR_ENTRIES {
            self.errors.pop_back();
        }
        self.errors.push_front(ErrorLogEntry {
            error_count: self.error_count,
            sqid: ready.sqid,
            cid: ready.cid,
            status: StatusPhase::new().with_status(ready.status),
            parameter_error_location: 0xffff,
            ..ErrorLogEntry::default()
        });
    }

    /// The log page of an event type was read with RAE = 0.
    fn unmask(&mut self, kind: EventType) {
        self.masked &= !(1 << kind.0);
    }
}

/// The result of an admin command: DW0 and DW1.
pub(crate) type AdminResult = Result<u64, Status>;

impl Controller {
    /// Executes an admin command. [`Outcome::Busy`] is an event request that waits.
    pub(crate) fn execute_admin(&mut self, entry: &SubmissionEntry, port: &Port, shared: &mut Shared) -> Outcome {
        let cdw0 = entry.cdw0;
        let opcode = entry.admin_opcode();
        if !self.supports(opcode) {
            return Status::INVALID_OPCODE.with_dnr().into();
        }
        if cdw0.fuse() != Fuse::NORMAL || cdw0.psdt() != Psdt::PRP {
            return Status::INVALID_FIELD.with_dnr().into();
        }
        if self.is_for_subsystem(entry) {
            self.management = Some(*entry);
            return Outcome::Pending;
        }
        let result = match opcode {
            AdminOpcode::IDENTIFY => self.identify(entry, shared),
            AdminOpcode::GET_LOG_PAGE => self.get_log_page(entry, shared),
            AdminOpcode::SET_FEATURES => self.set_features(entry, shared),
            AdminOpcode::GET_FEATURES => self.get_features(entry, shared),
            AdminOpcode::CREATE_IO_CQ => self.create_io_cq(entry, port),
            AdminOpcode::CREATE_IO_SQ => self.create_io_sq(entry, port),
            AdminOpcode::DELETE_IO_CQ => self.delete_io_cq(entry),
            AdminOpcode::DELETE_IO_SQ => return self.delete_io_sq(entry),
            AdminOpcode::ABORT => self.abort(entry, port),
            AdminOpcode::DOORBELL_BUFFER_CONFIG => self.doorbell_buffer_config(entry, port),
            _ => return self.async_event_request(entry),
        };
        match result {
            Ok(result) => Outcome::Done(Status::SUCCESS, result),
            Err(status) => status.into(),
        }
    }

    /// Whether an admin command exists on this controller.
    pub(crate) fn supports(&self, opcode: AdminOpcode) -> bool {
        match opcode {
            AdminOpcode::IDENTIFY
            | AdminOpcode::GET_LOG_PAGE
            | AdminOpcode::SET_FEATURES
            | AdminOpcode::GET_FEATURES
            | AdminOpcode::CREATE_IO_CQ
            | AdminOpcode::CREATE_IO_SQ
            | AdminOpcode::DELETE_IO_CQ
            | AdminOpcode::DELETE_IO_SQ
            | AdminOpcode::ABORT
            | AdminOpcode::ASYNC_EVENT_REQUEST => true,
            AdminOpcode::DOORBELL_BUFFER_CONFIG => self.offers_shadow(),
            AdminOpcode::NAMESPACE_ATTACHMENT | AdminOpcode::NAMESPACE_MANAGEMENT => self.attaches,
            AdminOpcode::TRACK_SEND
            | AdminOpcode::TRACK_RECEIVE
            | AdminOpcode::MIGRATION_SEND
            | AdminOpcode::MIGRATION_RECEIVE
            | AdminOpcode::CONTROLLER_DATA_QUEUE => self.is_manager(),
            _ => false,
        }
    }

    fn is_for_subsystem(&self, entry: &SubmissionEntry) -> bool {
        match entry.admin_opcode() {
            AdminOpcode::SET_FEATURES | AdminOpcode::GET_FEATURES => {
                let fid = FeaturesCdw10::from_bits(entry.cdw10).fid();
                self.is_manager() && matches!(fid, FeatureId::CONTROLLER_DATA_QUEUE | FeatureId::VENDOR_GUEST_LIMIT)
            }
            AdminOpcode::TRACK_SEND
            | AdminOpcode::TRACK_RECEIVE
            | AdminOpcode::MIGRATION_SEND
            | AdminOpcode::MIGRATION_RECEIVE
            | AdminOpcode::CONTROLLER_DATA_QUEUE
            | AdminOpcode::NAMESPACE_ATTACHMENT
            | AdminOpcode::NAMESPACE_MANAGEMENT => true,
            _ => false,
        }
    }

    /// Writes an admin command's data into guest memory.
    pub(crate) fn put_data(&mut self, entry: &SubmissionEntry, bytes: &[u8]) -> Result<(), Status> {
        let tracker = &mut self.engine.tracker;
        let seen = |iova, len| {
            if let Some(tracker) = tracker.as_mut() {
                tracker.written(iova, len);
            }
        };
        let pieces = crate::dptr::admin(&self.engine.reader, entry, bytes.len(), true, seen)?;
        crate::dptr::scatter(&pieces, bytes);
        Ok(())
    }

    /// Reads an admin command's data from guest memory.
    pub(crate) fn get_data(&mut self, entry: &SubmissionEntry, into: &mut [u8]) -> Result<(), Status> {
        let pieces = crate::dptr::admin(&self.engine.reader, entry, into.len(), false, |_, _| {})?;
        crate::dptr::gather(&pieces, into);
        Ok(())
    }

    /// Abort (Base 2.3 §5.2.1): waiting event requests and jobs can be aborted; everything else ends by itself.
    fn abort(&mut self, entry: &SubmissionEntry, port: &Port) -> AdminResult {
        let cdw10 = AbortCdw10::from_bits(entry.cdw10);
        let (sqid, cid) = (cdw10.sqid(), cdw10.cid());
        if self.sqs.get(usize::from(sqid)).is_none_or(Option::is_none) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let not_aborted = AbortDw0::new().with_not_aborted(true).into_bits();
        if sqid == 0 {
            let Some(at) = self.admin.aers.iter().position(|&aer| aer == cid) else { return Ok(not_aborted.into()) };
            let done = Ready { sqid: 0, cid, status: Status::ABORTED_BY_REQUEST, result: 0 };
            if !self.reserve_admin(port) {
                return Ok(not_aborted.into());
            }
            self.admin.aers.remove(at);
            self.ready.push(done);
            return Ok(0);
        }
        let mut contexts = self.engine.contexts.iter_mut().filter(|c| !c.abandoned && c.sqid == sqid && c.cid == cid);
        let found = contexts.find_map(|context| match context.work {
            Work::Job(job) => Some(job),
            _ => None,
        });
        let aborted = found.is_some_and(|job| self.engine.jobs.abort(job));
        Ok(if aborted { 0 } else { not_aborted.into() })
    }

    /// A slot of the admin completion queue for something that was not fetched just now.
    fn reserve_admin(&mut self, port: &Port) -> bool {
        let Some((sq, cq)) = self.sqs[0].as_mut().zip(self.cqs[0].as_mut()) else { return false };
        let reserved = cq.reserve(port.bar()).unwrap_or(false);
        sq.in_flight += u32::from(reserved);
        reserved
    }

    /// Asynchronous Event Request (Base 2.3 §5.2.2).
    fn async_event_request(&mut self, entry: &SubmissionEntry) -> Outcome {
        if self.admin.aers.len() > usize::from(AERL) {
            return Status::AER_LIMIT.with_dnr().into();
        }
        self.admin.aers.push(entry.cdw0.cid());
        Outcome::Busy
    }

    /// Reports events and finishes queue deletions.
    pub(crate) fn admin_progress(&mut self, port: &Port) {
        if !self.admin.deletes.is_empty() {
            self.finish_deletes();
        }
        if self.admin.events.is_empty() || self.admin.aers.is_empty() || self.run != crate::controller::Run::Active {
            return;
        }
        if self.fence().is_up() {
            // The state that has left has these requests outstanding: behind the fence nothing is posted to the guest's queues.
            return;
        }
        let masked = self.admin.masked;
        let once = self.engine.deviating.is(Deviation::OneEventOnly);
        if once && masked & 1 << EventType::ONE_SHOT.0 != 0 {
            let one_shot = |event: &Event| event.dw0.event_type() == EventType::ONE_SHOT;
            let _noted = self.admin.events.iter().any(one_shot) && self.engine.deviating.does(Deviation::OneEventOnly);
        }
        let Some(at) = self.admin.events.iter().position(|event| masked & event.bit() == 0) else { return };
        if !self.reserve_admin(port) {
            return;
        }
        let Some(event) = self.admin.events.remove(at) else { return };
        let cid = self.admin.aers.remove(0);
        if event.dw0.event_type() != EventType::ONE_SHOT || once {
            self.admin.masked |= event.bit();
        }
        let result = u64::from(event.dw0.into_bits()) | u64::from(event.dw1) << 32;
        self.ready.push(Ready { sqid: 0, cid, status: Status::SUCCESS, result });
    }

    /// Another controller changed a namespace that this one has.
    pub(crate) fn namespace_changed(&mut self, nsid: u32) {
        if !self.admin.changed.contains(&nsid) {
            self.admin.changed.push(nsid);
        }
        if self.features.events.nsan() {
            let info = dray_nvme::event::notice_info::NAMESPACE_ATTRIBUTE;
            self.admin.report(Event::new(EventType::NOTICE, info, LogId::CHANGED_NAMESPACES));
        }
    }
}
