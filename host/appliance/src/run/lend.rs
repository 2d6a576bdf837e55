//! A controller data queue in another process's hands.

use crate::moving::{MovingError, ready, until};
use crate::core::clock::Clock;
use dray_device::poll::{Poll, Progress, Time};
use dray_driver::mmc::{self, Query};
use dray_driver::{CdqConfig, CdqError, CdqFormat, CdqOwner, CdqState, Driver};
use std::os::fd::OwnedFd;

/// Why a queue was not lent.
#[derive(Debug, thiserror::Error)]
pub enum LendFailure {
    /// The management controller.
    #[error(transparent)]
    Moving(#[from] MovingError),
    /// The queue.
    #[error(transparent)]
    Queue(#[from] CdqError),
    /// The controller refused.
    #[error("{0}")]
    Refused(String),
}

/// Which queue.
#[derive(Clone, Debug)]
pub struct LendSpec {
    /// The subsystem's name.
    pub subsystem: String,
    /// The controller that is logged.
    pub cntlid: u16,
    /// Slots.
    pub slots: u32,
}

/// How far the way back is.
enum Stage {
    Lent,
    /// Logging is to be stopped.
    Stop,
    Stopping(Query<()>),
    Deleting,
    Over,
}

/// A lent queue with the management controller that it was made with. Polled on the core until it is over.
pub struct Lent {
    spec: LendSpec,
    driver: Driver,
    owner: CdqOwner,
    id: u16,
    stage: Stage,
}

impl Lent {
    /// Makes the queue, starts logging into it and lends it; the polling core runs already. With it comes the reader's socket.
    ///
    /// # Errors
    /// [`LendFailure`].
    pub fn start(spec: LendSpec, mut driver: Driver, clock: Clock) -> Result<(Self, OwnedFd), LendFailure> {
        ready(&mut driver, clock)?;
        let config = CdqConfig { kind: 0, cntlid: spec.cntlid, slots: spec.slots, format: CdqFormat::UDMQ, arm_trigger: true };
        let mut owner = CdqOwner::create(&mut driver, clock.now(), config)?;
        let id = until(clock, &mut driver, |driver, now| {
            let _progress = owner.poll(driver, now);
            match owner.state() {
                CdqState::Live { id } => Some(Ok(Ok(id))),
                CdqState::Gone(reason) => Some(Ok(Err(LendFailure::Refused(format!("the queue was not created: {reason:?}"))))),
                _ => None,
            }
        })??;
        let mut query = None;
        until(clock, &mut driver, |driver, now| {
            let Some(query) = &query else {
                query = mmc::track_log(driver, now, id, true).ok();
                return None;
            };
            let answer: Result<(), mmc::MmcError> = Query::poll(query, driver)?;
            Some(Ok(answer.map_err(|error| LendFailure::Refused(format!("logging did not start: {error}")))))
        })??;
        let socket = owner.lend()?.into_socket();
        Ok((Self { spec, driver, owner, id, stage: Stage::Lent }, socket))
    }

    /// The subsystem's name.
    #[must_use]
    pub fn subsystem(&self) -> &str {
        &self.spec.subsystem
    }

    /// The controller that is logged.
    #[must_use]
    pub fn cntlid(&self) -> u16 {
        self.spec.cntlid
    }

    /// Whether the queue is deleted: the management controller is free.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    fn step(&mut self, now: Time) -> u32 {
        let (driver, owner) = (&mut self.driver, &mut self.owner);
        let before = std::mem::discriminant(&self.stage);
        match &self.stage {
            _ if matches!(owner.state(), CdqState::Gone(_)) => self.stage = Stage::Over,
            Stage::Lent if owner.is_lent() => {}
            Stage::Lent => self.stage = Stage::Stop,
            Stage::Stop => {
                if let Ok(query) = mmc::track_log(driver, now, self.id, false) {
                    self.stage = Stage::Stopping(query);
                }
            }
            // Whatever the answer is, the queue is deleted.
            Stage::Stopping(query) => {
                if query.poll(driver).is_some() {
                    owner.delete(driver, now);
                    self.stage = Stage::Deleting;
                }
            }
            Stage::Deleting | Stage::Over => {}
        }
        u32::from(std::mem::discriminant(&self.stage) != before)
    }
}

impl Poll for Lent {
    fn poll(&mut self, now: Time) -> Progress {
        let mut progress = self.driver.poll(now).and(self.owner.poll(&mut self.driver, now));
        while let Some(event) = self.driver.next_event() {
            // Events that are not the queue's concern nobody here.
            let _others = self.owner.on_event(&event);
        }
        let work = self.step(now);
        progress.work += work;
        if work > 0 { progress.and(Progress::busy(0)) } else { progress }
    }
}
