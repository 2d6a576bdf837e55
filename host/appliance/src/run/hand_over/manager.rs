//! An end's management controller, for everyone who has to do with a migration that is driven from outside: one driver behind a
//! lock, and admin commands one at a time.

use crate::core::clock::Clock;
use crate::moving::{self, MovingError};
use dray_device::command::{CommandQueue, SubmitError};
use dray_device::poll::{Progress, Time};
use dray_driver::{AdminData, Driver, QueuePair, QueuePairConfig};
use dray_migration::mmc::{Answer, Health, Notice, QueueState, Trust};
use dray_migration::{DriverMmc, EntryQueue, Mmc, QueueError};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{IdentifyController, IdentifyControllerNvm};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A management controller that several have. Clones are the same one.
#[derive(Clone)]
pub(in crate::run) struct SharedMmc {
    mmc: Arc<Mutex<DriverMmc>>,
    /// What does not change while the driver lives.
    identify: Option<Arc<IdentifyController>>,
    identify_nvm: Option<Arc<IdentifyControllerNvm>>,
}

impl SharedMmc {
    /// Brings a driver up. The polling core runs already.
    ///
    /// # Errors
    /// [`MovingError`].
    pub(super) fn start(mut driver: Driver, clock: Clock) -> Result<Self, MovingError> {
        moving::ready(&mut driver, clock)?;
        let identify = driver.identify().copied().map(Arc::new);
        let identify_nvm = driver.identify_nvm().copied().map(Arc::new);
        let mmc = Arc::new(Mutex::new(DriverMmc::new(driver, moving::COPY_QUEUE)));
        Ok(Self { mmc, identify, identify_nvm })
    }

    /// A queue to copy media through. The polling core runs already.
    ///
    /// # Errors
    /// [`MovingError`].
    pub(super) fn copy_queue(&self, clock: Clock) -> Result<QueuePair, MovingError> {
        let mut ticket = None;
        moving::until(clock, self.lock().driver(), |driver, now| match &ticket {
            None => {
                let config = QueuePairConfig { entries: moving::COPY_QUEUE, vector: None };
                ticket = driver.create_queue_pair(now, config).ok();
                None
            }
            Some(ticket) => driver.queue_pair(ticket).map(|pair| Ok(pair?)),
        })
    }

    /// The space that its queues are mapped in.
    pub(super) fn space(&self) -> dray_device::space::AddressSpace {
        self.lock().driver().space().clone()
    }

    /// Whether anybody else has it.
    pub(super) fn is_used(&self) -> bool {
        Arc::strong_count(&self.mmc) > 1
    }

    fn lock(&self) -> MutexGuard<'_, DriverMmc> {
        self.mmc.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mmc for SharedMmc {
    fn poll(&mut self, now: Time) -> Progress {
        self.lock().poll(now)
    }

    fn health(&self) -> Health {
        self.lock().health()
    }

    fn identify(&self) -> Option<&IdentifyController> {
        self.identify.as_deref()
    }

    fn identify_nvm(&self) -> Option<&IdentifyControllerNvm> {
        self.identify_nvm.as_deref()
    }

    fn trust(&self) -> Trust {
        self.lock().trust()
    }

    fn reports_csup(&self) -> bool {
        self.lock().reports_csup()
    }

    fn s0pt_is_next_phase(&self) -> bool {
        self.lock().s0pt_is_next_phase()
    }

    fn admin_limit(&self) -> usize {
        self.lock().admin_limit()
    }

    fn request(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<u64, SubmitError> {
        self.lock().request(now, entry, data)
    }

    fn answer(&mut self, ticket: u64) -> Option<Answer> {
        self.lock().answer(ticket)
    }

    fn outstanding(&self) -> usize {
        self.lock().outstanding()
    }

    fn next_notice(&mut self) -> Option<Notice> {
        self.lock().next_notice()
    }

    fn forbid_reset(&mut self, forbid: bool) {
        self.lock().forbid_reset(forbid);
    }

    fn reset(&mut self, now: Time) {
        self.lock().reset(now);
    }

    fn generation(&self) -> u32 {
        self.lock().generation()
    }

    fn create_queue(&mut self, now: Time, cntlid: u16, slots: u32) -> Result<usize, QueueError> {
        self.lock().create_queue(now, cntlid, slots)
    }

    fn queue_state(&self, key: usize) -> QueueState {
        self.lock().queue_state(key)
    }

    fn delete_queue(&mut self, now: Time, key: usize) {
        self.lock().delete_queue(now, key);
    }

    fn with_queue(&mut self, key: usize, with: &mut dyn FnMut(&mut dyn EntryQueue)) {
        self.lock().with_queue(key, with);
    }

    fn create_io_queue(&mut self, now: Time) -> Result<(), SubmitError> {
        self.lock().create_io_queue(now)
    }

    fn io_queue(&mut self) -> Option<Result<Box<dyn CommandQueue>, String>> {
        self.lock().io_queue()
    }
}

/// An admin command under way. It is polled until it is over: an answer that nobody takes is kept for ever.
#[derive(Debug)]
pub(super) struct Command {
    entry: SubmissionEntry,
    data: Data,
    ticket: Option<u64>,
}

/// Its data.
#[derive(Debug)]
pub(super) enum Data {
    None,
    In(usize),
    Out(Vec<u8>),
}

impl Command {
    pub(super) fn new(entry: SubmissionEntry, data: Data) -> Self {
        Self { entry, data, ticket: None }
    }

    /// `Some` when it is over; an error in words when it was not taken, or nobody knows how it ended.
    pub(super) fn poll(&mut self, now: Time, mmc: &mut dyn Mmc) -> Option<Result<Answer, String>> {
        let _progress = mmc.poll(now);
        let health = mmc.health();
        if self.ticket.is_none() && health == Health::Ready {
            let data = match &self.data {
                Data::None => AdminData::None,
                Data::In(bytes) => AdminData::In(*bytes),
                Data::Out(bytes) => AdminData::Out(bytes),
            };
            match mmc.request(now, &self.entry, data) {
                Ok(ticket) => self.ticket = Some(ticket),
                Err(SubmitError::Full) => {}
                Err(error) => return Some(Err(error.to_string())),
            }
        }
        let answer = self.ticket.and_then(|ticket| mmc.answer(ticket));
        match (answer, health) {
            (Some(answer), _) if answer.unknown => Some(Err("the management controller was reset meanwhile".to_owned())),
            (Some(answer), _) => Some(Ok(answer)),
            (None, Health::Failed(why)) => Some(Err(why)),
            (None, _) => None,
        }
    }
}
