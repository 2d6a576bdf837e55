//! Admin requests over a connection: their data goes through pages of the initiator's own.

use super::connection::Connection;
use super::error::TcpError;
use crate::admin::{AdminAnswer, AdminData, Event, MAX_ADMIN_DATA, Ticket, place};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::{DmaBuffer, PAGE, Pages};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::event::AsyncEvent;
use dray_nvme::status::Status;
use std::collections::VecDeque;

/// Pages for data of requests under way; one bit each.
const PAGES: usize = 64;
/// Answers that wait for their owners, per command of the queue.
const ANSWERS_PER_COMMAND: usize = 4;
/// Events kept for the owner; more are counted and dropped.
const MAX_EVENTS: usize = 64;
/// Tags of Asynchronous Event Requests and of Keep Alive.
const AER_TAG: u64 = 1 << 63;
const KEEP_ALIVE_TAG: u64 = 1 << 62;

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
    pages: u64,
    first_page: u32,
    bytes: u32,
    returns_data: bool,
    data: Vec<u8>,
}

/// The requests of an admin queue.
#[derive(Debug)]
pub(super) struct Requests {
    memory: DmaBuffer,
    used: u64,
    requests: Vec<Request>,
    serial: u32,
    aers_wanted: u8,
    aers_out: u8,
    keeping_alive: bool,
    events: VecDeque<Event>,
    events_dropped: u64,
}

impl Requests {
    pub(super) fn new(depth: usize) -> Result<Self, TcpError> {
        let free =
            Request { serial: 0, stage: Stage::Free, pages: 0, first_page: 0, bytes: 0, returns_data: false, data: Vec::new() };
        Ok(Self {
            memory: DmaBuffer::allocate("dray-tcp-admin", PAGES * PAGE, Pages::Small)?,
            used: 0,
            requests: vec![free; depth * ANSWERS_PER_COMMAND],
            serial: 0,
            aers_wanted: 0,
            aers_out: 0,
            keeping_alive: false,
            events: VecDeque::with_capacity(MAX_EVENTS),
            events_dropped: 0,
        })
    }

    pub(super) fn request(
        &mut self,
        now: Time,
        connection: &mut Connection,
        entry: &SubmissionEntry,
        data: AdminData<'_>,
    ) -> Result<Ticket, SubmitError> {
        // One place for Keep Alive, and those of the event requests.
        let reserve = usize::from(self.aers_wanted.saturating_sub(self.aers_out)) + 1;
        if connection.fault().is_none() && connection.free() <= reserve {
            return Err(SubmitError::Full);
        }
        let (bytes, returns_data) = match data {
            AdminData::None => (0, false),
            AdminData::In(bytes) => (bytes, true),
            AdminData::Out(from) => (from.len(), false),
        };
        let none = matches!(data, AdminData::None);
        if bytes > MAX_ADMIN_DATA.min(connection.shape().max_transfer) || (bytes == 0 && !none) {
            return Err(SubmitError::BadData);
        }
        let (pages, first_page) = if none { (0, 0) } else { place(self.used, bytes).ok_or(SubmitError::Full)? };
        let index = self.free_request().ok_or(SubmitError::Full)?;
        let at = first_page as usize * PAGE;
        // Whole dwords, as controllers count them.
        let segment = self.memory.part(at, bytes.next_multiple_of(4)).ok_or(SubmitError::BadData)?;
        segment.arena().fill(segment.offset(), segment.len(), 0);
        if let AdminData::Out(from) = data {
            segment.arena().write(segment.offset(), from);
        }
        connection.submit(now, None, entry, if none { &[] } else { std::slice::from_ref(&segment) }, index as u64, false)?;
        connection.commit();
        self.used |= pages;
        self.serial = self.serial.wrapping_add(1);
        let (serial, bytes) = (self.serial, bytes as u32);
        self.requests[index] =
            Request { serial, stage: Stage::Sent, pages, first_page, bytes, returns_data, data: Vec::new() };
        Ok(Ticket { index: index as u16, serial })
    }

    /// A free place; else the oldest answer that nobody has asked for gives its place up.
    fn free_request(&self) -> Option<usize> {
        let free = self.requests.iter().position(|request| request.stage == Stage::Free);
        free.or_else(|| {
            let done = self.requests.iter().enumerate().filter(|(_, request)| matches!(request.stage, Stage::Done(_)));
            done.min_by_key(|(_, request)| request.serial).map(|(index, _)| index)
        })
    }

    /// Takes what has ended.
    pub(super) fn end(&mut self, completion: Completion) {
        if completion.tag == KEEP_ALIVE_TAG {
            self.keeping_alive = false;
        } else if completion.tag == AER_TAG {
            self.event(&completion);
        } else if let Some(request) = self.requests.get_mut(completion.tag as usize) {
            if request.returns_data && !completion.unknown && !completion.status.is_error() {
                request.data.resize(request.bytes as usize, 0);
                self.memory.arena().read(self.memory.offset() + request.first_page as usize * PAGE, &mut request.data);
            }
            self.used &= !request.pages;
            (request.stage, request.pages) = (Stage::Done(completion), 0);
        }
    }

    fn event(&mut self, completion: &Completion) {
        self.aers_out = self.aers_out.saturating_sub(1);
        if completion.unknown {
            return;
        }
        if completion.status.is_error() {
            // The controller takes fewer than it said, or none: it is not asked again.
            self.aers_wanted = self.aers_out;
        } else if self.events.len() < MAX_EVENTS {
            let dw0 = AsyncEvent::from_bits(completion.result as u32);
            self.events.push_back(Event { dw0, dw1: (completion.result >> 32) as u32 });
        } else {
            self.events_dropped += 1;
        }
    }

    pub(super) fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        let request = self.requests.get_mut(usize::from(ticket.index)).filter(|request| request.serial == ticket.serial);
        match request.map(|request| (request.stage, request)) {
            Some((Stage::Sent, _)) => None,
            Some((Stage::Done(completion), request)) => {
                request.stage = Stage::Free;
                Some(AdminAnswer { completion, data: std::mem::take(&mut request.data) })
            }
            _ => {
                let status = Status::ABORTED_SQ_DELETION;
                Some(AdminAnswer { completion: Completion { tag: 0, status, result: 0, unknown: true }, data: Vec::new() })
            }
        }
    }

    pub(super) fn set_aers(&mut self, wanted: u8) {
        self.aers_wanted = wanted;
    }

    pub(super) fn post_aers(&mut self, now: Time, connection: &mut Connection) {
        while self.aers_out < self.aers_wanted {
            let entry = SubmissionEntry::async_event_request();
            if connection.submit(now, Some(Time::NEVER), &entry, &[], AER_TAG, false).is_err() {
                break;
            }
            self.aers_out += 1;
            connection.commit();
        }
    }

    /// Sends Keep Alive, unless one is under way. It has `within_ns` to be answered.
    pub(super) fn keep_alive(&mut self, now: Time, connection: &mut Connection, within_ns: u64) {
        if !self.keeping_alive {
            let entry = SubmissionEntry::keep_alive();
            let deadline = Some(now.after_ns(within_ns));
            self.keeping_alive = connection.submit(now, deadline, &entry, &[], KEEP_ALIVE_TAG, false).is_ok();
            connection.commit();
        }
    }

    pub(super) fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(super) fn events_dropped(&self) -> u64 {
        self.events_dropped
    }
}
