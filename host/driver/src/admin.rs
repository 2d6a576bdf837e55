//! The admin queue: requests with data through pages of the driver's own, and Asynchronous Event Requests.

use crate::error::{DriverError, Fault};
use crate::ring::{Data, Overdue, Ring};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::{DmaBuffer, PAGE, Pages, Segment};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::event::AsyncEvent;
use std::collections::VecDeque;

/// Most bytes of data in one admin command, where MDTS allows them.
pub const MAX_ADMIN_DATA: usize = 128 << 10;
/// Pages for data of requests under way; one bit each.
const BOUNCE_PAGES: usize = 64;
/// Answers that wait for their owners, per place in the admin queue.
const ANSWERS_PER_ENTRY: usize = 4;
/// Events kept for the owner; more are counted and dropped.
const MAX_EVENTS: usize = 64;
/// Buffers of answers kept for the next ones.
const SPARE_BUFFERS: usize = 4;
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Free,
    Sent,
    Done(Completion),
}

#[derive(Clone, Debug)]
struct Request {
    serial: u32,
    stage: Stage,
    /// Pages of its data while it is under way; no pages = none.
    pages: u64,
    first_page: u32,
    bytes: u32,
    returns_data: bool,
    data: Vec<u8>,
}

/// Pages that requests put their data into.
#[derive(Debug)]
struct Bounce {
    memory: MappedBuffer,
    used: u64,
    spare: Vec<Vec<u8>>,
}

impl Bounce {
    fn at(&self, first_page: u32) -> usize {
        self.memory.buffer().offset() + first_page as usize * PAGE
    }

    /// Frees a request's pages; what the controller returned is copied out first.
    fn finish(&mut self, request: &mut Request, completion: Completion) {
        if request.returns_data && !completion.unknown && !completion.status.is_error() {
            request.data = self.spare.pop().unwrap_or_default();
            request.data.resize(request.bytes as usize, 0);
            self.memory.arena().read(self.at(request.first_page), &mut request.data);
        }
        self.used &= !request.pages;
        (request.stage, request.pages) = (Stage::Done(completion), 0);
    }
}

/// The admin side's state; the ring is there while the controller is enabled.
#[derive(Debug)]
pub(crate) struct Admin {
    ring: Option<Ring>,
    requests: Vec<Request>,
    bounce: Bounce,
    serial: u32,
    aers_wanted: u8,
    aers_out: u8,
    events: VecDeque<Event>,
    events_dropped: u64,
    limit: usize,
    timeout_ns: u64,
    next_look_ns: u64,
}

impl Admin {
    pub(crate) fn new(space: &AddressSpace, entries: u32, timeout_ns: u64) -> Result<Self, DriverError> {
        let bounce = DmaBuffer::allocate("dray-admin-data", BOUNCE_PAGES * PAGE, Pages::Small)?;
        let request =
            Request { serial: 0, stage: Stage::Free, pages: 0, first_page: 0, bytes: 0, returns_data: false, data: Vec::new() };
        Ok(Self {
            ring: None,
            requests: vec![request; entries as usize * ANSWERS_PER_ENTRY],
            bounce: Bounce { memory: MappedBuffer::new(space, bounce)?, used: 0, spare: Vec::new() },
            serial: 0,
            aers_wanted: 0,
            aers_out: 0,
            events: VecDeque::with_capacity(MAX_EVENTS),
            events_dropped: 0,
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
        let (requests, bounce) = (&mut self.requests, &mut self.bounce);
        ring.drain(&mut |completion| {
            if completion.tag & AER_TAG == 0 {
                end(requests, bounce, completion);
            }
        });
        self.aers_out = 0;
    }

    /// What identify said: data in one command, and how many event requests to keep outstanding.
    pub(crate) fn set_limits(&mut self, max_transfer: usize, aers: u8) {
        self.limit = max_transfer.min(MAX_ADMIN_DATA);
        self.aers_wanted = aers;
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
        let reserve = usize::from(self.aers_wanted.saturating_sub(self.aers_out));
        let ring = self.ring.as_mut().ok_or(SubmitError::Dead)?;
        if ring.free() <= reserve {
            return Err(SubmitError::Full);
        }
        let (bytes, returns_data) = match data {
            RequestData::Described | RequestData::Through(AdminData::None) => (0, false),
            RequestData::Through(AdminData::In(bytes)) => (bytes, true),
            RequestData::Through(AdminData::Out(from)) => (from.len(), false),
        };
        let none = matches!(data, RequestData::Described | RequestData::Through(AdminData::None));
        if bytes > self.limit || (bytes == 0 && !none) {
            return Err(SubmitError::BadData);
        }
        let (pages, first_page) = if none { (0, 0) } else { place(self.bounce.used, bytes).ok_or(SubmitError::Full)? };
        let index = free_request(&self.requests).ok_or(SubmitError::Full)?;
        let (at, arena) = (self.bounce.at(first_page), self.bounce.memory.arena());
        let whole = bytes.next_multiple_of(4);
        let segments = [Segment::new(arena, at, whole).ok_or(SubmitError::BadData)?];
        if !none {
            arena.fill(at, whole, 0);
        }
        if let RequestData::Through(AdminData::Out(from)) = data {
            arena.write(at, from);
        }
        let pieces = match data {
            RequestData::Described => Data::Described,
            RequestData::Through(AdminData::None) => Data::Pieces(&[]),
            RequestData::Through(_) => Data::Pieces(&segments),
        };
        ring.submit(now_ns.saturating_add(self.timeout_ns), entry, pieces, index as u64)?;
        ring.commit();
        self.bounce.used |= pages;
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let (bytes, stage, data) = (bytes as u32, Stage::Sent, Vec::new());
        self.requests[index] = Request { serial, stage, pages, first_page, bytes, returns_data, data };
        Ok(Ticket { index: index as u16, serial })
    }

    /// The answer, once it is there.
    /// Requests that the controller has not answered; event requests are not counted.
    pub(crate) fn outstanding(&self) -> usize {
        self.requests.iter().filter(|request| request.stage == Stage::Sent).count()
    }

    pub(crate) fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        let request = self.requests.get_mut(usize::from(ticket.index)).filter(|r| r.serial == ticket.serial);
        match request.map(|r| (r.stage, r)) {
            Some((Stage::Sent, _)) => None,
            Some((Stage::Done(completion), request)) => {
                request.stage = Stage::Free;
                Some(AdminAnswer { completion, data: std::mem::take(&mut request.data) })
            }
            _ => Some(lost()),
        }
    }

    pub(crate) fn recycle(&mut self, mut data: Vec<u8>) {
        if self.bounce.spare.len() < SPARE_BUFFERS && data.capacity() > 0 {
            data.clear();
            self.bounce.spare.push(data);
        }
    }

    pub(crate) fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn events_dropped(&self) -> u64 {
        self.events_dropped
    }

    /// Takes completions and posts event requests again.
    pub(crate) fn poll(&mut self, now_ns: u64, aborts: &mut VecDeque<(u16, u16)>) -> Result<usize, Fault> {
        let Some(ring) = self.ring.as_mut() else { return Ok(0) };
        let (requests, bounce, events) = (&mut self.requests, &mut self.bounce, &mut self.events);
        let (out, wanted, dropped) = (&mut self.aers_out, &mut self.aers_wanted, &mut self.events_dropped);
        let (count, fault) = ring.poll(true, &mut |completion| {
            if completion.tag & AER_TAG == 0 {
                return end(requests, bounce, completion);
            }
            *out -= 1;
            if completion.status.is_error() {
                // The controller takes fewer than it said (1/05h), or none: it is not asked again.
                *wanted = *out;
            } else if events.len() < MAX_EVENTS {
                let dw0 = AsyncEvent::from_bits(completion.result as u32);
                events.push_back(Event { dw0, dw1: (completion.result >> 32) as u32 });
            } else {
                *dropped += 1;
            }
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
        while self.aers_out < self.aers_wanted {
            let entry = SubmissionEntry::async_event_request();
            if ring.submit(u64::MAX, &entry, Data::Pieces(&[]), AER_TAG).is_err() {
                break;
            }
            self.aers_out += 1;
        }
        ring.commit();
    }
}

fn lost() -> AdminAnswer {
    let status = dray_nvme::status::Status::ABORTED_SQ_DELETION;
    AdminAnswer { completion: Completion { tag: 0, status, result: 0, unknown: true }, data: Vec::new() }
}

fn end(requests: &mut [Request], bounce: &mut Bounce, completion: Completion) {
    if let Some(request) = requests.get_mut(completion.tag as usize) {
        bounce.finish(request, completion);
    }
}

/// A free place; else the oldest answer that nobody has asked for gives its place up.
fn free_request(requests: &[Request]) -> Option<usize> {
    if let Some(free) = requests.iter().position(|r| r.stage == Stage::Free) {
        return Some(free);
    }
    let done = requests.iter().enumerate().filter(|(_, r)| matches!(r.stage, Stage::Done(_)));
    done.min_by_key(|(_, r)| r.serial).map(|(index, _)| index)
}

/// Pages in a row for that many bytes: their bits, and the first.
pub(crate) fn place(used: u64, bytes: usize) -> Option<(u64, u32)> {
    let pages = bytes.div_ceil(PAGE) as u32;
    let mask = if pages >= 64 { u64::MAX } else { (1u64 << pages) - 1 };
    (0..=64 - pages.min(64)).find(|first| used & (mask << first) == 0).map(|first| (mask << first, first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_in_a_row() {
        assert_eq!(place(0, 1), Some((1, 0)));
        assert_eq!(place(0b1011, 2 * PAGE), Some((0b11_0000, 4)));
        assert_eq!(place(u64::MAX >> 1, PAGE), Some((1 << 63, 63)));
        assert_eq!(place(u64::MAX >> 1, PAGE + 1), None);
        assert_eq!(place(0, 64 * PAGE), Some((u64::MAX, 0)));
    }
}
