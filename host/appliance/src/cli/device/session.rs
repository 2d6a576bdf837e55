//! One controller, driven by our driver on this thread for as long as someone looks at it.

use crate::core::clock::Clock;
use dray_controller::Subsystem;
use dray_device::command::SubmitError;
use dray_device::function::Function;
use dray_device::memory::Pages;
use dray_device::poll::{Poll, Time};
use dray_device::slot::Slot;
use dray_device::vfio::VfioFunction;
use dray_driver::{AdminData, Driver, DriverConfig, DriverState};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use miette::miette;
use std::sync::Arc;

/// How long anything may take: a controller in the same process answers in microseconds.
const PATIENCE_MS: u64 = 5_000;

/// A driver that is ready, and the subsystem behind it if that is in this process.
pub(super) struct Session<'a> {
    /// What this process has to poll besides the driver.
    subsystem: Option<&'a mut Subsystem>,
    driver: Driver,
    clock: Clock,
    name: String,
    /// A physical function, which the kernel may want back.
    physical: Option<Arc<VfioFunction>>,
}

/// What a controller answered.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// DW0 of the completion.
    pub(super) result: u32,
    /// What it returned; zeroes where it returned nothing.
    pub(super) data: Vec<u8>,
}

impl<'a> Session<'a> {
    /// Drives the controller behind `slot` until it is ready.
    pub(super) fn open(name: &str, subsystem: &'a mut Subsystem, slot: &Slot) -> miette::Result<Self> {
        Self::over(name, Some(subsystem), slot.function(), DriverConfig::default(), None)
    }

    /// Drives a controller that another process polls.
    pub(super) fn elsewhere(name: &str, function: Arc<dyn Function>) -> miette::Result<Self> {
        Self::over(name, None, function, DriverConfig::default(), None)
    }

    /// Drives a physical controller.
    pub(super) fn physical(name: &str, function: Arc<VfioFunction>, config: DriverConfig) -> miette::Result<Self> {
        Self::over(name, None, Arc::clone(&function) as Arc<dyn Function>, config, Some(function))
    }

    fn over(
        name: &str,
        subsystem: Option<&'a mut Subsystem>,
        function: Arc<dyn Function>,
        config: DriverConfig,
        physical: Option<Arc<VfioFunction>>,
    ) -> miette::Result<Self> {
        let driver = Driver::new(function, config).map_err(|error| miette!("{name}: {error}"))?;
        let mut session = Self { subsystem, driver, clock: Clock::new(), name: name.into(), physical };
        session.until("becoming ready", |driver, _| driver.is_ready().then_some(()))?;
        Ok(session)
    }

    /// The driver.
    pub(super) fn driver(&self) -> &Driver {
        &self.driver
    }

    /// The controller's name, SUBSYSTEM:CNTLID.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Polls both sides in turn until `step` has something.
    pub(super) fn until<T>(&mut self, what: &str, step: impl FnMut(&mut Driver, Time) -> Option<T>) -> miette::Result<T> {
        self.until_within(PATIENCE_MS, what, step)
    }

    /// The same for what takes longer.
    pub(super) fn until_within<T>(
        &mut self,
        patience_ms: u64,
        what: &str,
        mut step: impl FnMut(&mut Driver, Time) -> Option<T>,
    ) -> miette::Result<T> {
        let deadline = self.clock.now().after_ms(patience_ms);
        loop {
            let now = self.clock.now();
            let _both_are_polled_again = self.driver.poll(now);
            match &mut self.subsystem {
                Some(subsystem) => _ = subsystem.poll(now),
                // It may need this processor.
                None => std::thread::yield_now(),
            }
            if let Some(found) = step(&mut self.driver, now) {
                return Ok(found);
            }
            if self.physical.as_ref().is_some_and(|function| function.asked_to_leave()) {
                let help = "it is unplugged, its slot is powered off, or somebody unbinds it";
                return Err(miette!(help = help, "{}: the kernel wants the device back, during {what}", self.name));
            }
            if let DriverState::Failed(error) = self.driver.state() {
                return Err(miette!("{}: {what}: {error}", self.name));
            }
            if now >= deadline {
                return Err(miette!("{}: {what} took longer than {patience_ms} ms", self.name));
            }
        }
    }

    /// Which pages buffers for it are made of.
    pub(super) fn pages(&self) -> Pages {
        self.driver.pages()
    }

    /// The time that the session goes by.
    pub(super) fn now(&self) -> Time {
        self.clock.now()
    }

    /// The driver, to use it beyond asking.
    pub(super) fn driver_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }

    /// Sends an admin command without data that may take long; its result (DW0).
    pub(super) fn order(&mut self, what: &str, entry: &SubmissionEntry, patience_ms: u64) -> miette::Result<u32> {
        let ticket = self.until(what, |driver, now| match driver.request(now, entry, AdminData::None) {
            Err(SubmitError::Full) => None,
            other => Some(other),
        })?;
        let ticket = ticket.map_err(|error| miette!("{}: {what}: {error}", self.name))?;
        let answer = self.until_within(patience_ms, what, |driver, _| driver.answer(ticket))?;
        match answer.completion {
            completion if completion.unknown => Err(miette!("{}: {what}: the controller was reset", self.name)),
            completion if completion.status.is_error() => Err(miette!("{}: {what}: {}", self.name, completion.status)),
            completion => Ok(completion.result as u32),
        }
    }

    /// Sends an admin command that returns up to `bytes` bytes. The inner error is the controller's: it does not give that.
    pub(super) fn ask(&mut self, what: &str, entry: &SubmissionEntry, bytes: usize) -> miette::Result<Result<Answer, Status>> {
        let bytes = bytes.min(self.driver.admin_limit());
        let ticket = self.until(what, |driver, now| match driver.request(now, entry, AdminData::In(bytes)) {
            Err(SubmitError::Full) => None,
            other => Some(other),
        })?;
        let ticket = ticket.map_err(|error| miette!("{}: {what}: {error}", self.name))?;
        let mut answer = self.until(what, |driver, _| driver.answer(ticket))?;
        if answer.completion.unknown {
            return Err(miette!("{}: {what}: the controller was reset", self.name));
        }
        if answer.completion.status.is_error() {
            return Ok(Err(answer.completion.status));
        }
        answer.data.resize(bytes, 0);
        Ok(Ok(Answer { result: answer.completion.result as u32, data: answer.data }))
    }

    /// Shuts the controller down.
    pub(super) fn close(mut self) -> miette::Result<()> {
        let now = self.clock.now();
        self.driver.shutdown(now);
        self.until("shutting down", |driver, _| (*driver.state() == DriverState::Stopped).then_some(()))
    }
}
