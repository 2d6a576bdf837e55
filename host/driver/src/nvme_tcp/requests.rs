//! Admin requests over a connection, event requests and Keep Alive.

use super::connection::Connection;
use super::error::TcpError;
use crate::admin::{AdminAnswer, AdminData, Event, MAX_ADMIN_DATA, Ticket};
use crate::requests::{self, Events};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::Pages;
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;

/// Tags of Asynchronous Event Requests and of Keep Alive.
const AER_TAG: u64 = 1 << 63;
const KEEP_ALIVE_TAG: u64 = 1 << 62;

/// The requests of an admin queue.
#[derive(Debug)]
pub(super) struct Requests {
    requests: requests::Requests,
    events: Events,
    keeping_alive: bool,
}

impl Requests {
    pub(super) fn new(depth: usize) -> Result<Self, TcpError> {
        let requests = requests::Requests::new("dray-tcp-admin", depth, Pages::Small)?;
        Ok(Self { requests, events: Events::new(), keeping_alive: false })
    }

    pub(super) fn request(
        &mut self,
        now: Time,
        connection: &mut Connection,
        entry: &SubmissionEntry,
        data: AdminData<'_>,
    ) -> Result<Ticket, SubmitError> {
        // One place for Keep Alive, and those of the event requests.
        let reserve = usize::from(self.events.missing()) + 1;
        if connection.fault().is_none() && connection.free() <= reserve {
            return Err(SubmitError::Full);
        }
        let place = self.requests.place(data, MAX_ADMIN_DATA.min(connection.shape().max_transfer))?;
        let segment = self.requests.segment(&place);
        connection.submit(now, None, entry, segment.as_slice(), place.tag(), false)?;
        connection.commit();
        Ok(self.requests.sent(place))
    }

    /// Takes what has ended.
    pub(super) fn end(&mut self, completion: Completion) {
        match completion.tag {
            KEEP_ALIVE_TAG => self.keeping_alive = false,
            AER_TAG => self.events.end(&completion),
            _ => self.requests.end(completion),
        }
    }

    pub(super) fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        self.requests.answer(ticket)
    }

    pub(super) fn set_aers(&mut self, wanted: u8) {
        self.events.want(wanted);
    }

    pub(super) fn post_aers(&mut self, now: Time, connection: &mut Connection) {
        while self.events.missing() > 0 {
            let entry = SubmissionEntry::async_event_request();
            if connection.submit(now, Some(Time::NEVER), &entry, &[], AER_TAG, false).is_err() {
                break;
            }
            self.events.posted();
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
        self.events.next()
    }

    pub(super) fn events_dropped(&self) -> u64 {
        self.events.dropped()
    }
}
