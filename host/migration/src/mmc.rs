//! The two management controllers as the migration uses them: a trait over admin commands, events and controller data queues,
//! and its implementation over the polled driver.
//!
//! The trait keeps the state machine apart from any one way of reaching a controller (the polled driver today, a kernel-owned
//! controller by passthrough later) and lets it be tested against a controller of a few lines.

use crate::queue::{EntryQueue, QueueError};
use dray_device::command::{CommandQueue, SubmitError};
use dray_device::poll::{Poll, Progress, Time};
use dray_driver::{
    AdminData, CdqConfig, CdqFormat, CdqOwner, CdqState, Driver, DriverState, GoneReason, PairTicket, QueuePairConfig, Quirks, Ticket,
};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{IdentifyController, IdentifyControllerNvm};
use dray_nvme::status::Status;
use dray_policy::role::CdqQueue;

/// How an admin command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status field.
    pub status: Status,
    /// DW1:DW0 of the completion.
    pub result: u64,
    /// Nobody knows how it ended (the controller was reset or failed meanwhile).
    pub unknown: bool,
    /// What the controller returned.
    pub data: Vec<u8>,
}

/// An asynchronous event that does not belong to a controller data queue (Base 2.3 §5.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Type (2:0), information (15:8), log page (23:16).
    pub dw0: u32,
    /// The event's parameter.
    pub dw1: u32,
}

impl Notice {
    /// Namespaces were attached, detached or formatted (type 2, information 00h).
    #[must_use]
    pub fn namespace_changed(self) -> bool {
        self.dw0 & 7 == 2 && self.dw0 >> 8 & 0xff == 0
    }
}

/// Whether commands can be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not yet, or not again yet.
    Starting,
    /// Yes.
    Ready,
    /// Not any more.
    Failed(String),
}

/// What is known of a device's reports of changes (guarantee 1 of design section 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// On the tested list: what it reports is complete.
    Tested,
    /// Not on the list, or known to hide changes: its reports are a hint only.
    Hint(String),
}

/// A controller data queue's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueState {
    /// Being created.
    Creating,
    /// There.
    Live(CdqQueue),
    /// Deleted, or lost.
    Gone(String),
}

/// A management controller.
pub trait Mmc: Send {
    /// Moves the admin queue and the data queues on.
    fn poll(&mut self, now: Time) -> Progress;
    /// Whether commands can be sent.
    fn health(&self) -> Health;
    /// Identify Controller, once it is known.
    fn identify(&self) -> Option<&IdentifyController>;
    /// Identify Controller of the NVM command set, once it is known.
    fn identify_nvm(&self) -> Option<&IdentifyControllerNvm>;
    /// What is known of its reports.
    fn trust(&self) -> Trust;
    /// Whether it sets CSUP in the completion of Get Controller State; where it does not, the header's CSATTR is asked.
    fn reports_csup(&self) -> bool {
        true
    }
    /// Whether S0PT of a completion queue's state is the tag that is written next there, also while the tail is 0 (then the
    /// specification wants the other one).
    fn s0pt_is_next_phase(&self) -> bool {
        false
    }
    /// Most bytes of data in one admin command.
    fn admin_limit(&self) -> usize;

    /// Sends an admin command; returns its ticket.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing was sent.
    fn request(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<u64, SubmitError>;
    /// The answer, once.
    fn answer(&mut self, ticket: u64) -> Option<Answer>;
    /// Admin commands that have not been answered, those included that nobody waits for any more; event requests are not counted.
    fn outstanding(&self) -> usize;
    /// The next event that belongs to no data queue.
    fn next_notice(&mut self) -> Option<Notice>;
    /// While set, the controller is not reset by whoever drives it (rule 9).
    fn forbid_reset(&mut self, forbid: bool);
    /// Resets the controller: its queues and data queues are gone, suspension it had asked for ends.
    fn reset(&mut self, now: Time);
    /// Changes with every reset.
    fn generation(&self) -> u32;

    /// Begins to create a user data migration queue of `slots` for a controller; returns its key.
    ///
    /// # Errors
    /// [`QueueError`].
    fn create_queue(&mut self, now: Time, cntlid: u16, slots: u32) -> Result<usize, QueueError>;
    /// How a queue is.
    fn queue_state(&self, key: usize) -> QueueState;
    /// Deletes a queue; its key may be used again.
    fn delete_queue(&mut self, now: Time, key: usize);
    /// Hands the queue to `with`, if it is there.
    fn with_queue(&mut self, key: usize, with: &mut dyn FnMut(&mut dyn EntryQueue));

    /// Begins to create an I/O queue, for a destination whose controller was reset.
    ///
    /// # Errors
    /// [`SubmitError`].
    fn create_io_queue(&mut self, now: Time) -> Result<(), SubmitError>;
    /// The I/O queue, once it is there; an error in words when it cannot be made.
    fn io_queue(&mut self) -> Option<Result<Box<dyn CommandQueue>, String>>;

    /// The driver, for its next use, where there is one; the data queues are deleted.
    fn into_driver(self: Box<Self>) -> Option<Driver> {
        None
    }
}

/// Why a queue is gone, in words.
fn gone(reason: GoneReason) -> String {
    match reason {
        GoneReason::Deleted => "it was deleted".to_owned(),
        GoneReason::Reset => "its controller was reset".to_owned(),
        GoneReason::NotCreated(status) => format!("it could not be created: {status}"),
        GoneReason::HeadRefused(status) => format!("the controller does not take slots back: {status}"),
    }
}

/// The polled driver as a management controller.
#[derive(Debug)]
pub struct DriverMmc {
    driver: Driver,
    queues: Vec<Option<OwnedQueue>>,
    tickets: Vec<Option<Ticket>>,
    io_entries: u16,
    io_ticket: Option<PairTicket>,
}

#[derive(Debug)]
struct OwnedQueue {
    owner: CdqOwner,
    cntlid: u16,
    slots: u32,
    format: CdqFormat,
}

impl DriverMmc {
    /// Wraps a driver. `io_entries` is the size of the I/O queue that replaces one lost by a reset.
    #[must_use]
    pub fn new(driver: Driver, io_entries: u16) -> Self {
        Self { driver, queues: Vec::new(), tickets: Vec::new(), io_entries, io_ticket: None }
    }

    /// The driver.
    pub fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

}

/// An owner and its driver together are the queue that the pump drains.
#[derive(Debug)]
pub struct DriverQueue<'a> {
    /// The queue's owner.
    pub owner: &'a mut CdqOwner,
    /// The driver that created it.
    pub driver: &'a mut Driver,
}

impl EntryQueue for DriverQueue<'_> {
    fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        self.owner.take(max, into)
    }

    fn waiting(&mut self) -> u32 {
        self.owner.waiting()
    }

    fn rewind(&mut self, entries: u32) {
        self.owner.rewind(entries);
    }

    fn give_back(&mut self, now: Time, entries: u32) -> Result<(), QueueError> {
        self.owner.give_back(self.driver, now, entries).map_err(|error| QueueError::Gone(error.to_string()))
    }
}

impl Mmc for DriverMmc {
    fn poll(&mut self, now: Time) -> Progress {
        let mut progress = self.driver.poll(now);
        for queue in self.queues.iter_mut().flatten() {
            progress = progress.and(queue.owner.poll(&mut self.driver, now));
        }
        progress
    }

    fn health(&self) -> Health {
        match self.driver.state() {
            DriverState::Ready => Health::Ready,
            DriverState::Failed(error) => Health::Failed(error.to_string()),
            DriverState::ShuttingDown | DriverState::Stopped => Health::Failed("the controller was shut down".to_owned()),
            _ => Health::Starting,
        }
    }

    fn identify(&self) -> Option<&IdentifyController> {
        self.driver.identify()
    }

    fn identify_nvm(&self) -> Option<&IdentifyControllerNvm> {
        self.driver.identify_nvm()
    }

    fn trust(&self) -> Trust {
        let Some(identify) = self.driver.identify() else { return Trust::Hint("not identified".to_owned()) };
        let quirks = Quirks::for_device(identify);
        let model = identify.model().unwrap_or("of no readable model");
        if quirks.hides_changes() {
            Trust::Hint(format!("drive {model} is known to hide changes"))
        } else if quirks.untested {
            Trust::Hint(format!("drive {model} is not on the tested list"))
        } else {
            Trust::Tested
        }
    }

    fn reports_csup(&self) -> bool {
        !self.driver.identify().is_some_and(|identify| Quirks::for_device(identify).csup_never_set)
    }

    fn s0pt_is_next_phase(&self) -> bool {
        self.driver.identify().is_some_and(|identify| Quirks::for_device(identify).s0pt_is_next_phase)
    }

    fn admin_limit(&self) -> usize {
        self.driver.admin_limit()
    }

    fn request(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<u64, SubmitError> {
        let ticket = self.driver.request(now, entry, data)?;
        let index = match self.tickets.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.tickets.push(None);
                self.tickets.len() - 1
            }
        };
        self.tickets[index] = Some(ticket);
        Ok(index as u64)
    }

    fn answer(&mut self, ticket: u64) -> Option<Answer> {
        let place = self.tickets.get_mut(usize::try_from(ticket).ok()?)?;
        let answer = self.driver.answer((*place)?)?;
        *place = None;
        let completion = answer.completion;
        Some(Answer {
            status: completion.status,
            result: completion.result,
            unknown: completion.unknown,
            data: answer.data,
        })
    }

    fn outstanding(&self) -> usize {
        self.driver.outstanding()
    }

    fn next_notice(&mut self) -> Option<Notice> {
        while let Some(event) = self.driver.next_event() {
            let taken = self.queues.iter_mut().flatten().any(|queue| queue.owner.on_event(&event));
            if !taken {
                return Some(Notice { dw0: event.dw0.into(), dw1: event.dw1 });
            }
        }
        None
    }

    fn forbid_reset(&mut self, forbid: bool) {
        self.driver.forbid_reset(forbid);
    }

    fn reset(&mut self, now: Time) {
        self.driver.reset(now);
    }

    fn generation(&self) -> u32 {
        self.driver.generation()
    }

    fn create_queue(&mut self, now: Time, cntlid: u16, slots: u32) -> Result<usize, QueueError> {
        let format = CdqFormat::UDMQ;
        let config = CdqConfig { kind: 0, cntlid, slots, format, arm_trigger: true };
        let owner =
            CdqOwner::create(&mut self.driver, now, config).map_err(|error| QueueError::Gone(error.to_string()))?;
        let queue = Some(OwnedQueue { owner, cntlid, slots, format });
        match self.queues.iter().position(Option::is_none) {
            Some(index) => {
                self.queues[index] = queue;
                Ok(index)
            }
            None => {
                self.queues.push(queue);
                Ok(self.queues.len() - 1)
            }
        }
    }

    fn queue_state(&self, key: usize) -> QueueState {
        let Some(Some(queue)) = self.queues.get(key) else { return QueueState::Gone("deleted".to_owned()) };
        match queue.owner.state() {
            CdqState::Creating => QueueState::Creating,
            CdqState::Live { id } => QueueState::Live(CdqQueue {
                id,
                kind: 0,
                cntlid: queue.cntlid,
                slots: queue.slots,
                entry_bytes: queue.format.entry_bytes,
                phase_byte: queue.format.phase_byte,
                phase_mask: queue.format.phase_mask,
            }),
            CdqState::Deleting => QueueState::Gone("being deleted".to_owned()),
            CdqState::Gone(reason) => QueueState::Gone(gone(reason)),
        }
    }

    fn delete_queue(&mut self, _now: Time, key: usize) {
        // Dropping the owner deletes the queue: the driver sends the command at its next poll.
        if let Some(queue) = self.queues.get_mut(key) {
            *queue = None;
        }
    }

    fn with_queue(&mut self, key: usize, with: &mut dyn FnMut(&mut dyn EntryQueue)) {
        if let Some(Some(queue)) = self.queues.get_mut(key) {
            with(&mut DriverQueue { owner: &mut queue.owner, driver: &mut self.driver });
        }
    }

    fn create_io_queue(&mut self, now: Time) -> Result<(), SubmitError> {
        let config = QueuePairConfig { entries: self.io_entries, vector: None };
        self.io_ticket = Some(self.driver.create_queue_pair(now, config)?);
        Ok(())
    }

    fn io_queue(&mut self) -> Option<Result<Box<dyn CommandQueue>, String>> {
        let made = self.driver.queue_pair(self.io_ticket.as_ref()?)?;
        self.io_ticket = None;
        Some(match made {
            Ok(pair) => Ok(Box::new(pair)),
            Err(error) => Err(error.to_string()),
        })
    }

    fn into_driver(self: Box<Self>) -> Option<Driver> {
        Some(self.driver)
    }
}
