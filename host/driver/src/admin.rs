//! The admin queue: requests and Asynchronous Event Requests over a ring.

use crate::error::{DriverError, Fault};
use crate::requests::{Events, Requests};
use crate::ring::{Data, Overdue, Ring};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::{PAGE, Pages};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::event::AsyncEvent;
use std::collections::VecDeque;

/// Most bytes of data in one admin command, where MDTS allows them.
pub const MAX_ADMIN_DATA: usize = 128 << 10;
/// Time that an aborted admin command gets, in nanoseconds.
const GRACE_NS: u64 = 5_000_000_000;
/// Tags from here on are Asynchronous Event Requests.
const AER_TAG: u64 = 1 << 63;

/// Data of an admin command.
#[derive(Clone, Copy, Debug)]
pub enum AdminData<'a> {
    /// None.
    None,
    /// The controller returns that many bytes; what it leaves out reads as zeroes.
    In(usize),
    /// The controller gets these bytes.
    Out(&'a [u8]),
}

/// Data of a request, or a data pointer that the entry carries itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RequestData<'a> {
    Through(AdminData<'a>),
    Described,
}

/// A request under way: what to ask for its answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(crate) index: u16,
    pub(crate) serial: u32,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminAnswer {
    /// Status and result; [`Completion::unknown`] if the controller was reset meanwhile (or the answer was left lying so long
    /// that its place was needed).
    pub completion: Completion,
    /// What the controller returned, for [`AdminData::In`] and success. [`Driver::recycle`](crate::Driver::recycle) takes it
    /// back.
    pub data: Vec<u8>,
}

impl AdminAnswer {
    /// The answer if the command succeeded.
    ///
    /// # Errors
    /// [`DriverError::Refused`], or [`DriverError::Reset`] when nobody knows.
    pub fn accepted(self, command: &'static str) -> Result<Self, DriverError> {
        if self.completion.unknown {
            Err(DriverError::Reset)
        } else if self.completion.status.is_error() {
            Err(DriverError::Refused { command, status: self.completion.status })
        } else {
            Ok(self)
        }
    }
}

/// An asynchronous event as it was reported (Base 2.3 §5.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Type, information and log page.
    pub dw0: AsyncEvent,
    /// The event's parameter; for one-shot events of a controller data queue the CDQID in bits 15:0.
    pub dw1: u32,
}

/// The admin side's state; the ring is there while the controller is enabled.
#[derive(Debug)]
pub(crate) struct Admin {
    ring: Option<Ring>,
    requests: Requests,
    /// Where the controller sees the data of requests.
    _mapping: MappedBuffer,
    events: Events,
    limit: usize,
    timeout_ns: u64,
    next_look_ns: u64,
}

impl Admin {
    pub(crate) fn new(space: &AddressSpace, entries: u32, timeout_ns: u64, pages: Pages) -> Result<Self, DriverError> {
        let requests = Requests::new("dray-admin-data", entries as usize, pages)?;
        Ok(Self {
            ring: None,
            _mapping: MappedBuffer::new(space, requests.memory().clone())?,
            requests,
            events: Events::new(),
            limit: PAGE,
            timeout_ns,
            next_look_ns: 0,
        })
    }

    /// The controller is about to be enabled with this ring.
    pub(crate) fn start(&mut self, ring: Ring) {
        self.ring = Some(ring);
    }

    pub(crate) fn is_started(&self) -> bool {
        self.ring.is_some()
    }

    /// Nothing is sent any more; everything under way ends with an unknown outcome.
    pub(crate) fn stop(&mut self) {
        let Some(mut ring) = self.ring.take() else { return };
        let requests = &mut self.requests;
        ring.drain(&mut |completion| {
            if completion.tag & AER_TAG == 0 {
                requests.end(completion);
            }
        });
        self.events.lost();
    }

    /// What identify said: data in one command, and how many event requests to keep outstanding.
    pub(crate) fn set_limits(&mut self, max_transfer: usize, aers: u8) {
        self.limit = max_transfer.min(MAX_ADMIN_DATA);
        self.events.want(aers);
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Sends a request.
    pub(crate) fn request(
        &mut self,
        now_ns: u64,
        entry: &SubmissionEntry,
        data: RequestData<'_>,
    ) -> Result<Ticket, SubmitError> {
        let reserve = usize::from(self.events.missing());
        let ring = self.ring.as_mut().ok_or(SubmitError::Dead)?;
        if ring.free() <= reserve {
            return Err(SubmitError::Full);
        }
        let through = match data {
            RequestData::Described => AdminData::None,
            RequestData::Through(data) => data,
        };
        let place = self.requests.place(through, self.limit)?;
        let segment = self.requests.segment(&place);
        let pieces = match data {
            RequestData::Described => Data::Described,
            RequestData::Through(_) => Data::Pieces(segment.as_slice()),
        };
        ring.submit(now_ns.saturating_add(self.timeout_ns), entry, pieces, place.tag())?;
        ring.commit();
        Ok(self.requests.sent(place))
    }

    /// Requests that the controller has not answered; event requests are not counted.
    pub(crate) fn outstanding(&self) -> usize {
        self.requests.outstanding()
    }

    /// The answer, once it is there.
    pub(crate) fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        self.requests.answer(ticket)
    }

    pub(crate) fn recycle(&mut self, data: Vec<u8>) {
        self.requests.recycle(data);
    }

    pub(crate) fn next_event(&mut self) -> Option<Event> {
        self.events.next()
    }

    pub(crate) fn events_dropped(&self) -> u64 {
        self.events.dropped()
    }

    /// Takes completions and posts event requests again.
    pub(crate) fn poll(&mut self, now_ns: u64, aborts: &mut VecDeque<(u16, u16)>) -> Result<usize, Fault> {
        let Some(ring) = self.ring.as_mut() else { return Ok(0) };
        let (requests, events) = (&mut self.requests, &mut self.events);
        let (count, fault) = ring.poll(true, &mut |completion| match completion.tag & AER_TAG {
            0 => requests.end(completion),
            _ => events.end(&completion),
        });
        if let Some(fault) = fault {
            return Err(fault);
        }
        self.post_aers();
        if now_ns >= self.next_look_ns {
            self.look_at_deadlines(now_ns, aborts)?;
        }
        Ok(count)
    }

    fn look_at_deadlines(&mut self, now_ns: u64, aborts: &mut VecDeque<(u16, u16)>) -> Result<(), Fault> {
        self.next_look_ns = now_ns.saturating_add((self.timeout_ns / 8).max(1));
        let Some(ring) = self.ring.as_mut() else { return Ok(()) };
        let mut lost = None;
        ring.overdue(now_ns, self.timeout_ns.min(GRACE_NS), &mut |found| match found {
            Overdue::Abort(cid) => aborts.push_back((0, cid)),
            Overdue::Lost(cid) => lost = Some(cid),
        });
        lost.map_or(Ok(()), |cid| Err(Fault::TimedOut { cid }))
    }

    fn post_aers(&mut self) {
        let Some(ring) = self.ring.as_mut() else { return };
        while self.events.missing() > 0 {
            let entry = SubmissionEntry::async_event_request();
            if ring.submit(u64::MAX, &entry, Data::Pieces(&[]), AER_TAG).is_err() {
                break;
            }
            self.events.posted();
        }
        ring.commit();
    }
}
