//! The requests of an admin queue, whatever carries them: their data in pages of the driver's own, their answers until they are
//! asked for, and the asynchronous events that come between them.

use crate::admin::{AdminAnswer, AdminData, Event, Ticket};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::{DmaBuffer, MemoryError, PAGE, Pages, Segment};
use dray_nvme::event::AsyncEvent;
use dray_nvme::status::Status;
use std::collections::VecDeque;

/// Pages for data of requests under way; one bit each.
const PAGES: usize = 64;
/// Answers that wait for their owners, per command of the queue.
const ANSWERS_PER_COMMAND: usize = 4;
/// Buffers of answers kept for the next ones.
const SPARE_BUFFERS: usize = 4;
/// Events kept for the owner; more are counted and dropped.
const MAX_EVENTS: usize = 64;

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

/// A place for a request that is about to be sent; dropped, it was not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    index: usize,
    pages: u64,
    first_page: u32,
    bytes: u32,
    returns_data: bool,
}

impl Place {
    /// The tag of its command.
    pub(crate) fn tag(&self) -> u64 {
        self.index as u64
    }
}

/// The requests. A command's tag is the place of its request.
#[derive(Debug)]
pub(crate) struct Requests {
    memory: DmaBuffer,
    used: u64,
    places: Vec<Request>,
    serial: u32,
    spare: Vec<Vec<u8>>,
}

impl Requests {
    /// For a queue of `depth` commands. Their data goes through [`memory`](Self::memory).
    pub(crate) fn new(name: &str, depth: usize, pages: Pages) -> Result<Self, MemoryError> {
        let free =
            Request { serial: 0, stage: Stage::Free, pages: 0, first_page: 0, bytes: 0, returns_data: false, data: Vec::new() };
        Ok(Self {
            memory: DmaBuffer::allocate(name, PAGES * PAGE, pages)?,
            used: 0,
            places: vec![free; depth * ANSWERS_PER_COMMAND],
            serial: 0,
            spare: Vec::new(),
        })
    }

    pub(crate) fn memory(&self) -> &DmaBuffer {
        &self.memory
    }

    /// Finds a place, and pages for up to `limit` bytes of data, which are there when this returns.
    pub(crate) fn place(&self, data: AdminData<'_>, limit: usize) -> Result<Place, SubmitError> {
        let (bytes, returns_data) = match data {
            AdminData::None => (0, false),
            AdminData::In(bytes) => (bytes, true),
            AdminData::Out(from) => (from.len(), false),
        };
        let none = matches!(data, AdminData::None);
        if bytes > limit || (bytes == 0 && !none) {
            return Err(SubmitError::BadData);
        }
        let (pages, first_page) = if none { (0, 0) } else { row(self.used, bytes).ok_or(SubmitError::Full)? };
        let index = self.free_place().ok_or(SubmitError::Full)?;
        let place = Place { index, pages, first_page, bytes: bytes as u32, returns_data };
        if let Some(segment) = self.segment(&place) {
            segment.arena().fill(segment.offset(), segment.len(), 0);
            if let AdminData::Out(from) = data {
                segment.arena().write(segment.offset(), from);
            }
        }
        Ok(place)
    }

    /// The data of a place, in whole dwords, as controllers count them; none where there is no data.
    pub(crate) fn segment(&self, place: &Place) -> Option<Segment<'_>> {
        let bytes = place.bytes as usize;
        (bytes > 0).then(|| self.memory.part(place.first_page as usize * PAGE, bytes.next_multiple_of(4))).flatten()
    }

    /// The command was sent.
    pub(crate) fn sent(&mut self, place: Place) -> Ticket {
        let Place { index, pages, first_page, bytes, returns_data } = place;
        self.used |= pages;
        self.serial = self.serial.wrapping_add(1);
        let (serial, stage, data) = (self.serial, Stage::Sent, Vec::new());
        self.places[index] = Request { serial, stage, pages, first_page, bytes, returns_data, data };
        Ticket { index: index as u16, serial }
    }

    /// A free place; else the oldest answer that nobody has asked for gives its place up.
    fn free_place(&self) -> Option<usize> {
        let free = self.places.iter().position(|request| request.stage == Stage::Free);
        free.or_else(|| {
            let done = self.places.iter().enumerate().filter(|(_, request)| matches!(request.stage, Stage::Done(_)));
            done.min_by_key(|(_, request)| request.serial).map(|(index, _)| index)
        })
    }

    /// A command has ended: its pages are free; what the controller returned is copied out first.
    pub(crate) fn end(&mut self, completion: Completion) {
        let Some(request) = self.places.get_mut(completion.tag as usize) else { return };
        if request.returns_data && !completion.unknown && !completion.status.is_error() {
            request.data = self.spare.pop().unwrap_or_default();
            request.data.resize(request.bytes as usize, 0);
            self.memory.arena().read(self.memory.offset() + request.first_page as usize * PAGE, &mut request.data);
        }
        self.used &= !request.pages;
        (request.stage, request.pages) = (Stage::Done(completion), 0);
    }

    /// The answer, once it is there; an unknown outcome for a ticket whose place was given to another.
    pub(crate) fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        let request = self.places.get_mut(usize::from(ticket.index)).filter(|request| request.serial == ticket.serial);
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

    /// Takes the buffer of an answer back.
    pub(crate) fn recycle(&mut self, mut data: Vec<u8>) {
        if self.spare.len() < SPARE_BUFFERS && data.capacity() > 0 {
            data.clear();
            self.spare.push(data);
        }
    }

    /// Requests that the controller has not answered.
    pub(crate) fn outstanding(&self) -> usize {
        self.places.iter().filter(|request| request.stage == Stage::Sent).count()
    }
}

/// Asynchronous Event Requests that are kept outstanding, and the events that they have brought.
#[derive(Debug, Default)]
pub(crate) struct Events {
    wanted: u8,
    out: u8,
    events: VecDeque<Event>,
    dropped: u64,
}

impl Events {
    pub(crate) fn new() -> Self {
        Self { events: VecDeque::with_capacity(MAX_EVENTS), ..Self::default() }
    }

    /// How many requests are to be kept outstanding.
    pub(crate) fn want(&mut self, wanted: u8) {
        self.wanted = wanted;
    }

    /// How many are to be posted.
    pub(crate) fn missing(&self) -> u8 {
        self.wanted.saturating_sub(self.out)
    }

    /// One was posted.
    pub(crate) fn posted(&mut self) {
        self.out += 1;
    }

    /// The controller has none any more.
    pub(crate) fn lost(&mut self) {
        self.out = 0;
    }

    /// One has ended.
    pub(crate) fn end(&mut self, completion: &Completion) {
        self.out = self.out.saturating_sub(1);
        if completion.unknown {
            return;
        }
        if completion.status.is_error() {
            // The controller takes fewer than it said (1/05h), or none: it is not asked again.
            self.wanted = self.out;
        } else if self.events.len() < MAX_EVENTS {
            let dw0 = AsyncEvent::from_bits(completion.result as u32);
            self.events.push_back(Event { dw0, dw1: (completion.result >> 32) as u32 });
        } else {
            self.dropped += 1;
        }
    }

    pub(crate) fn next(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// Pages in a row for that many bytes: their bits, and the first.
fn row(used: u64, bytes: usize) -> Option<(u64, u32)> {
    let pages = bytes.div_ceil(PAGE) as u32;
    let mask = if pages >= 64 { u64::MAX } else { (1u64 << pages) - 1 };
    (0..=64 - pages.min(64)).find(|first| used & (mask << first) == 0).map(|first| (mask << first, first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_in_a_row() {
        assert_eq!(row(0, 1), Some((1, 0)));
        assert_eq!(row(0b1011, 2 * PAGE), Some((0b11_0000, 4)));
        assert_eq!(row(u64::MAX >> 1, PAGE), Some((1 << 63, 63)));
        assert_eq!(row(u64::MAX >> 1, PAGE + 1), None);
        assert_eq!(row(0, 64 * PAGE), Some((u64::MAX, 0)));
    }

    fn done(tag: u64) -> Completion {
        Completion { tag, status: Status::SUCCESS, result: 7, unknown: false }
    }

    #[test]
    fn data_goes_through_pages_and_is_answered_once() {
        let mut requests = Requests::new("test", 1, Pages::Small).expect("memory");
        let out = requests.place(AdminData::Out(&[1; 6000]), 8192).expect("room");
        let segment = requests.segment(&out).expect("data");
        let mut bytes = [9; 6000];
        segment.arena().read(segment.offset(), &mut bytes);
        assert_eq!((segment.len(), bytes), (6000, [1; 6000]));
        let out = requests.sent(out);
        let back = requests.place(AdminData::In(6), 8192).expect("room");
        let segment = requests.segment(&back).expect("data");
        assert_eq!((segment.len(), back.first_page), (8, 2), "behind the pages that are in use");
        segment.arena().write(segment.offset(), &[5; 8]);
        let tag = back.tag();
        let back = requests.sent(back);
        assert_eq!((requests.outstanding(), requests.answer(back)), (2, None));
        requests.end(done(tag));
        let answer = requests.answer(back).expect("there");
        assert_eq!((answer.data, answer.completion.result), (vec![5; 6], 7));
        assert!(requests.answer(back).is_some_and(|answer| answer.completion.unknown), "once");
        for bad in [AdminData::In(0), AdminData::In(8193), AdminData::Out(&[])] {
            assert_eq!(requests.place(bad, 8192).map(drop), Err(SubmitError::BadData));
        }
        // Answers that nobody asks for give way, requests under way do not.
        for _ in 0..20 {
            let place = requests.place(AdminData::None, 8192).expect("room");
            assert!(requests.segment(&place).is_none());
            let tag = place.tag();
            let _unasked = requests.sent(place);
            requests.end(done(tag));
        }
        assert_eq!((requests.outstanding(), requests.answer(out)), (1, None));
    }
}
