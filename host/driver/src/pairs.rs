//! Creating and deleting I/O queue pairs (Base 2.3 §5.3.1 to §5.3.4): the completion queue first, and last on the way out.

use crate::admin::{AdminData, Ticket};
use crate::config::{QueuePairConfig, queue_entries, timeout_ns};
use crate::driver::{Driver, DriverState};
use crate::error::DriverError;
use crate::link::PairShared;
use crate::queue::QueuePair;
use crate::ring::{MAX_ENTRIES, Ring, RingShape};
use dray_device::command::{Completion, SubmitError};
use dray_device::poll::Time;
use dray_device::space::MappedBuffer;
use dray_nvme::command::{MAX_BLOCKS, SubmissionEntry};
use dray_nvme::status::Status;
use std::sync::Arc;

/// Bytes that a Write Zeroes may cover when the controller sets no limit: 65,536 blocks of the smallest size.
const MOST_ZEROES: u64 = MAX_BLOCKS as u64 * 512;

/// Deletions that are tried before the identifier is given up until a reset.
const TRIES: u8 = 4;

/// A queue pair that is being created: what to ask for it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairTicket {
    serial: u32,
    qid: u16,
}

impl PairTicket {
    /// The queue identifier that the pair has, or was to have.
    #[must_use]
    pub fn qid(&self) -> u16 {
        self.qid
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    CreatingCq(Ticket),
    CreatingSq(Ticket),
    /// Both queues are there and nobody has asked for the pair yet.
    Created,
    /// The pair is in use.
    Live,
    /// To be deleted; `None` = the command is still to be sent. How often that was refused.
    DeletingSq(Option<Ticket>, u8),
    /// See there.
    DeletingCq(Option<Ticket>, u8),
    /// A deletion was refused again and again: the identifier and the memory are not used again before a reset.
    Stuck,
    /// Never came to be; kept until someone asks.
    Refused,
}

/// What became of a Delete I/O Submission or Completion Queue.
enum Deletion {
    Gone,
    Again,
    GivenUp,
}

impl Deletion {
    fn of(answer: &Completion, refused: u8) -> Self {
        match answer.status {
            _ if answer.unknown => Self::GivenUp,
            // A queue that the controller does not know is not there either.
            status if !status.is_error() || status.is(Status::INVALID_QID) => Self::Gone,
            _ if refused + 1 < TRIES => Self::Again,
            _ => Self::GivenUp,
        }
    }
}

/// What the driver knows of a pair. It holds the queues' memory until the controller has let go of it.
#[derive(Debug)]
pub(crate) struct PairRecord {
    pub(crate) shared: Arc<PairShared>,
    serial: u32,
    stage: Stage,
    config: QueuePairConfig,
    shape: RingShape,
    memory: Option<Arc<MappedBuffer>>,
    error: Option<DriverError>,
}

impl Driver {
    /// Begins to create a queue pair: its memory is allocated and mapped, the commands are on their way.
    ///
    /// # Errors
    /// [`SubmitError::Dead`] unless the driver is ready; [`SubmitError::Full`] when no queue identifier or no place in the
    /// admin queue is free; [`SubmitError::NotMapped`] when there is no memory for the queues.
    pub fn create_queue_pair(&mut self, now: Time, config: QueuePairConfig) -> Result<PairTicket, SubmitError> {
        if self.state != DriverState::Ready {
            return Err(SubmitError::Dead);
        }
        let used = |qid: u16| self.pairs.iter().any(|r| r.shared.qid == qid && r.memory.is_some());
        let qid = (1..=self.queues_granted).find(|qid| !used(*qid)).ok_or(SubmitError::Full)?;
        let most = self.cap.max_queue_entries().min(MAX_ENTRIES);
        let entries = queue_entries(u32::from(config.entries), 2, most.max(2));
        let shape = RingShape { entries, max_transfer: self.max_transfer };
        let memory = shape.memory(self.function.space(), self.config.pages).map_err(|_| SubmitError::NotMapped)?;
        let [_, cq] = shape.bases(&memory);
        let entry = SubmissionEntry::create_io_cq(qid, entries as u16 - 1, config.vector, cq);
        self.clear_shadow(qid);
        let ticket = self.request_described(now, &entry)?;
        self.pair_serial = self.pair_serial.wrapping_add(1);
        let serial = self.pair_serial;
        self.pairs.push(PairRecord {
            shared: Arc::new(PairShared::new(qid, Arc::clone(self.link()))),
            serial,
            stage: Stage::CreatingCq(ticket),
            config,
            shape,
            memory: Some(memory),
            error: None,
        });
        Ok(PairTicket { serial, qid })
    }

    /// The pair, once it is there or has been refused; `None` while its creation is under way. It is given once.
    pub fn queue_pair(&mut self, ticket: &PairTicket) -> Option<Result<QueuePair, DriverError>> {
        let Some(at) = self.pairs.iter().position(|r| r.serial == ticket.serial) else {
            return Some(Err(DriverError::Reset));
        };
        let record = &mut self.pairs[at];
        match record.stage {
            Stage::Created => {
                record.stage = Stage::Live;
                Some(self.hand_out(at))
            }
            Stage::Refused => {
                let record = self.pairs.swap_remove(at);
                Some(Err(record.error.unwrap_or(DriverError::Reset)))
            }
            Stage::Live => Some(Err(DriverError::Reset)),
            _ => None,
        }
    }

    fn hand_out(&mut self, at: usize) -> Result<QueuePair, DriverError> {
        let bells = self.doorbells(self.pairs[at].shared.qid)?;
        let record = &self.pairs[at];
        let memory = record.memory.clone().ok_or(DriverError::Reset)?;
        let mut ring = Ring::new(record.shared.qid, record.shape, memory, bells, self.function.space());
        if let Some(shadow) = &self.shadow {
            ring.set_shadow(Arc::clone(shadow), self.cap.dstrd());
        }
        if record.config.vector.is_none() {
            ring.set_polled();
        }
        let line = record.config.vector.and_then(|vector| self.function.event_line(vector));
        let timeout = timeout_ns(self.config.io_timeout_ms);
        Ok(QueuePair::new(ring, Arc::clone(&record.shared), self.max_write_zeroes(), timeout, line))
    }

    /// Gives a pair back: both queues are deleted by later polls. (Dropping the pair does the same.)
    ///
    /// # Errors
    /// The pair itself while commands are outstanding: poll it until they have come back.
    pub fn delete_queue_pair(&mut self, now: Time, pair: QueuePair) -> Result<(), Box<QueuePair>> {
        if pair.outstanding() > 0 {
            return Err(Box::new(pair));
        }
        drop(pair);
        self.poll_pairs(now);
        Ok(())
    }

    /// Queue pairs that the controller has, those being created and deleted included.
    #[must_use]
    pub fn queue_pairs(&self) -> usize {
        self.pairs.iter().filter(|r| r.memory.is_some()).count()
    }

    fn max_write_zeroes(&self) -> u64 {
        if !self.identify.as_ref().is_some_and(|id| id.oncs.write_zeroes()) {
            return 0;
        }
        match self.identify_nvm.as_ref().map_or(0, |nvm| u32::from(nvm.wzsl)) {
            0 => MOST_ZEROES,
            wzsl => 1u64.checked_shl(12 + u32::from(self.cap.mpsmin()) + wzsl).map_or(MOST_ZEROES, |b| b.min(MOST_ZEROES)),
        }
    }

    /// Takes creations and deletions a step further.
    pub(crate) fn poll_pairs(&mut self, now: Time) -> u32 {
        let mut steps = 0;
        for at in 0..self.pairs.len() {
            if let Some(next) = self.next_stage(now, at) {
                self.pairs[at].stage = next;
                steps += 1;
            }
        }
        if steps > 0 {
            self.pairs.retain(|r| r.memory.is_some() || r.stage == Stage::Refused);
        }
        steps
    }

    fn next_stage(&mut self, now: Time, at: usize) -> Option<Stage> {
        let record = &self.pairs[at];
        let qid = record.shared.qid;
        match record.stage {
            Stage::CreatingCq(ticket) => self.created_cq(now, at, ticket),
            Stage::CreatingSq(ticket) => {
                let answer = self.answer(ticket)?;
                Some(match answer.accepted("Create I/O Submission Queue") {
                    Ok(_) => Stage::Created,
                    Err(error) => {
                        self.pairs[at].error = Some(error);
                        Stage::DeletingCq(None, 0)
                    }
                })
            }
            Stage::Live if record.shared.is_abandoned() => Some(Stage::DeletingSq(None, 0)),
            Stage::DeletingSq(None, refused) => {
                let entry = SubmissionEntry::delete_io_sq(qid);
                self.request(now, &entry, AdminData::None).ok().map(|ticket| Stage::DeletingSq(Some(ticket), refused))
            }
            Stage::DeletingSq(Some(ticket), refused) => {
                let answer = self.answer(ticket)?.completion;
                Some(match Deletion::of(&answer, refused) {
                    Deletion::Gone => Stage::DeletingCq(None, 0),
                    Deletion::Again => Stage::DeletingSq(None, refused + 1),
                    Deletion::GivenUp => Stage::Stuck,
                })
            }
            Stage::DeletingCq(None, refused) => {
                let entry = SubmissionEntry::delete_io_cq(qid);
                self.request(now, &entry, AdminData::None).ok().map(|ticket| Stage::DeletingCq(Some(ticket), refused))
            }
            Stage::DeletingCq(Some(ticket), refused) => self.deleted_cq(at, ticket, refused),
            Stage::Created | Stage::Live | Stage::Stuck | Stage::Refused => None,
        }
    }

    fn created_cq(&mut self, now: Time, at: usize, ticket: Ticket) -> Option<Stage> {
        let answer = self.answer(ticket)?;
        let record = &mut self.pairs[at];
        if let Err(error) = answer.accepted("Create I/O Completion Queue") {
            (record.error, record.memory) = (Some(error), None);
            return Some(Stage::Refused);
        }
        let qid = record.shared.qid;
        let sq = record.memory.as_ref().map_or(0, |memory| record.shape.bases(memory)[0]);
        let entry = SubmissionEntry::create_io_sq(qid, record.shape.entries as u16 - 1, qid, sq);
        Some(match self.request_described(now, &entry) {
            Ok(ticket) => Stage::CreatingSq(ticket),
            Err(_) => {
                self.pairs[at].error = Some(DriverError::Reset);
                Stage::DeletingCq(None, 0)
            }
        })
    }

    fn deleted_cq(&mut self, at: usize, ticket: Ticket, refused: u8) -> Option<Stage> {
        let answer = self.answer(ticket)?.completion;
        match Deletion::of(&answer, refused) {
            Deletion::Gone => {}
            Deletion::Again => return Some(Stage::DeletingCq(None, refused + 1)),
            Deletion::GivenUp => return Some(Stage::Stuck),
        }
        let record = &mut self.pairs[at];
        record.memory = None;
        Some(if record.error.is_some() { Stage::Refused } else { Stage::Stuck })
    }

    /// The controller was reset or given up: all pairs are dead, and those being created never come.
    pub(crate) fn bury_pairs(&mut self) {
        for record in &mut self.pairs {
            record.shared.kill();
            record.memory = None;
            let unasked = matches!(record.stage, Stage::CreatingCq(_) | Stage::CreatingSq(_) | Stage::Created);
            if unasked || (record.error.is_some() && record.stage != Stage::Refused) {
                record.error.get_or_insert(DriverError::Reset);
                record.stage = Stage::Refused;
            }
        }
        self.pairs.retain(|r| r.stage == Stage::Refused);
    }
}
