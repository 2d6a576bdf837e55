//! The life of a guest: bring the controller up, identify, create queues, run, reset, stop.

use super::handle::{GuestHandle, GuestStage, Shared, count};
use super::load::Load;
use super::{GuestConfig, GuestError, Identity};
use crate::ledger::Ledger;
use crate::tag::BLOCK_BYTES;
use dray_device::command::SubmitError;
use dray_device::memory::DmaBuffer;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::space::MappedBuffer;
use dray_driver::{AdminData, Driver, DriverState, PairTicket, QueuePair, QueuePairConfig, Ticket};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IdentifyNamespace};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use zerocopy::FromBytes;

/// Bytes of an Identify data structure.
const IDENTIFY_BYTES: usize = 4096;

enum Stage {
    Starting,
    Identifying(Ticket),
    Connecting { pairs: Vec<QueuePair>, ticket: Option<PairTicket> },
    Running,
    Draining,
    ShuttingDown,
    Over(GuestStage),
}

/// A guest; see the module's text. It owns the driver of its function and is polled like everything else.
pub struct Guest {
    driver: Driver,
    config: GuestConfig,
    shared: Arc<Shared>,
    load: Load<QueuePair>,
    stage: Stage,
    /// Requests for a reset that have been taken up.
    resets_begun: u32,
    /// A reset that was asked for is under way.
    resetting: bool,
    lbas_per_block: u32,
    phase: usize,
    last_poll: Option<Time>,
}

impl Guest {
    /// A guest over a driver (ready or not) that writes the blocks of `ledger`.
    ///
    /// # Errors
    /// [`GuestError`] when the configuration makes no sense or there is no memory.
    pub fn new(driver: Driver, config: GuestConfig, ledger: Arc<Ledger>) -> Result<(Self, GuestHandle), GuestError> {
        config.check(ledger.blocks().len())?;
        let shared = Arc::new(Shared::new(ledger, config.slots()));
        let memory = DmaBuffer::allocate("dray-guest-data", config.slots() * BLOCK_BYTES, config.pages)?;
        let memory = MappedBuffer::new(driver.space(), memory)?;
        let load = Load::new(&config, Arc::clone(&shared), memory);
        let handle = GuestHandle { shared: Arc::clone(&shared) };
        let guest = Self {
            driver,
            config,
            shared,
            load,
            stage: Stage::Starting,
            resets_begun: 0,
            resetting: false,
            lbas_per_block: 1,
            phase: 0,
            last_poll: None,
        };
        Ok((guest, handle))
    }

    /// The driver, for what a guest's owner may want to ask it.
    #[must_use]
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    fn set_stage(&mut self, stage: Stage) {
        let shown = match &stage {
            Stage::Starting => GuestStage::Starting,
            Stage::Identifying(_) | Stage::Connecting { .. } => GuestStage::Identifying,
            Stage::Running => GuestStage::Running,
            Stage::Draining | Stage::ShuttingDown => GuestStage::Draining,
            Stage::Over(stage) => *stage,
        };
        self.stage = stage;
        self.shared.stage.store(shown as u8, Ordering::Release);
    }

    #[cold]
    fn fail(&mut self, error: &GuestError) {
        self.shared.error(|| error.to_string());
        self.load.end();
        self.set_stage(Stage::Over(GuestStage::Failed));
    }

    /// Time goes to the phase that was on; the handle's changes are taken over here.
    fn keep_time(&mut self, now: Time) {
        let shared = &self.shared;
        if let Some(last) = self.last_poll.replace(now) {
            let spent = &shared.phase_ns[self.phase];
            spent.store(spent.load(Ordering::Relaxed) + now.ns_since(last), Ordering::Relaxed);
        }
        self.phase = shared.phase();
        shared.now_ns.store(now.0, Ordering::Relaxed);
    }

    fn step(&mut self, now: Time) -> Result<u32, GuestError> {
        let stopping = self.shared.stop.load(Ordering::Acquire);
        match &mut self.stage {
            Stage::Starting if stopping => self.shut_down(now),
            Stage::Starting => return self.start(now),
            Stage::Identifying(ticket) => {
                let ticket = *ticket;
                return self.identified(ticket);
            }
            Stage::Connecting { .. } => return self.connect(now),
            Stage::Running => return Ok(self.run(now, stopping)),
            Stage::Draining => return Ok(self.drain(now, stopping)),
            Stage::ShuttingDown if matches!(self.driver.state(), DriverState::Stopped) => {
                self.set_stage(Stage::Over(GuestStage::Stopped));
            }
            Stage::ShuttingDown | Stage::Over(_) => return Ok(0),
        }
        Ok(1)
    }

    fn start(&mut self, now: Time) -> Result<u32, GuestError> {
        if !self.driver.is_ready() {
            return Ok(0);
        }
        let entry = SubmissionEntry::identify(Cns::NAMESPACE, self.config.nsid, 0, CommandSetId::NVM);
        match self.driver.request(now, &entry, AdminData::In(IDENTIFY_BYTES)) {
            Ok(ticket) => {
                self.set_stage(Stage::Identifying(ticket));
                Ok(1)
            }
            Err(SubmitError::Full | SubmitError::Dead) => Ok(0),
            Err(error) => Err(GuestError::Submit { what: "Identify Namespace", error }),
        }
    }

    fn identified(&mut self, ticket: Ticket) -> Result<u32, GuestError> {
        let Some(answer) = self.driver.answer(ticket) else { return Ok(0) };
        if answer.completion.unknown {
            self.set_stage(Stage::Starting);
            return Ok(1);
        }
        let answer = answer.accepted("Identify Namespace")?;
        let bad = |reason: String| GuestError::BadNamespace { nsid: self.config.nsid, reason };
        let namespace = IdentifyNamespace::read_from_bytes(&answer.data)
            .map_err(|_| bad(format!("Identify returned {} bytes", answer.data.len())))?;
        let controller = self.driver.identify().ok_or_else(|| bad("the controller is not identified".to_owned()))?;
        let identity = Identity::new(controller, &namespace);
        self.lbas_per_block = lbas_per_block(&namespace, &self.shared.ledger).map_err(bad)?;
        self.compare_identity(identity);
        let (wanted, granted) = (self.config.queues, self.driver.queues_granted());
        if granted < wanted {
            return Err(GuestError::TooFewQueues { wanted, granted });
        }
        self.set_stage(Stage::Connecting { pairs: Vec::new(), ticket: None });
        Ok(1)
    }

    fn compare_identity(&self, identity: Identity) {
        let mut first = self.shared.identity.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.get_or_insert_with(|| identity.clone());
        let differences = first.differences(&identity);
        if !differences.is_empty() {
            count(&self.shared.counters.identity_changes);
            self.shared.error(|| format!("after a reset the disk is another one: {}", differences.join(", ")));
        }
    }

    fn connect(&mut self, now: Time) -> Result<u32, GuestError> {
        let Stage::Connecting { pairs, ticket } = &mut self.stage else { return Ok(0) };
        match ticket {
            Some(asked) => match self.driver.queue_pair(asked) {
                None => return Ok(0),
                Some(Ok(pair)) => {
                    pairs.push(pair);
                    *ticket = None;
                }
                // Reset meanwhile: from the start.
                Some(Err(_)) if !self.driver.is_ready() => {
                    self.set_stage(Stage::Starting);
                    return Ok(1);
                }
                Some(Err(error)) => return Err(error.into()),
            },
            None if pairs.len() < usize::from(self.config.queues) => {
                // One entry always stays empty, and sizes are powers of two.
                let entries = (self.config.depth + 1).next_power_of_two();
                match self.driver.create_queue_pair(now, QueuePairConfig { entries, vector: None }) {
                    Ok(asked) => *ticket = Some(asked),
                    Err(SubmitError::Full) => return Ok(0),
                    Err(SubmitError::Dead) => self.set_stage(Stage::Starting),
                    Err(error) => return Err(GuestError::Submit { what: "Create I/O Completion Queue", error }),
                }
            }
            None => {
                let pairs = std::mem::take(pairs);
                self.load.begin(pairs, self.lbas_per_block);
                if std::mem::take(&mut self.resetting) {
                    count(&self.shared.counters.resets);
                }
                self.set_stage(Stage::Running);
            }
        }
        Ok(1)
    }

    fn run(&mut self, now: Time, stopping: bool) -> u32 {
        let asked = self.shared.resets_asked.load(Ordering::Acquire);
        let reset = asked != self.resets_begun;
        let lost = self.load.is_dead() || !self.driver.is_ready();
        if stopping || reset || lost {
            if !stopping && reset {
                self.resets_begun = asked;
                self.resetting = true;
            }
            self.set_stage(Stage::Draining);
        }
        self.load.poll(now, matches!(self.stage, Stage::Running))
    }

    fn drain(&mut self, now: Time, stopping: bool) -> u32 {
        let work = self.load.poll(now, false);
        if self.load.outstanding() > 0 {
            return work;
        }
        self.load.end();
        if stopping {
            self.shut_down(now);
        } else {
            if self.resetting {
                self.driver.reset(now);
            } else {
                count(&self.shared.counters.surprises);
                // A queue that died while the driver thinks that all is well: the reset makes sure that its writes are over.
                if self.driver.is_ready() {
                    self.driver.reset(now);
                }
            }
            self.set_stage(Stage::Starting);
        }
        work + 1
    }

    fn shut_down(&mut self, now: Time) {
        self.driver.shutdown(now);
        self.set_stage(Stage::ShuttingDown);
    }
}

impl Poll for Guest {
    fn poll(&mut self, now: Time) -> Progress {
        if matches!(self.stage, Stage::Over(_)) {
            return Progress::IDLE;
        }
        self.keep_time(now);
        let driver = self.driver.poll(now);
        while self.driver.next_event().is_some() {
            count(&self.shared.counters.events);
        }
        if let DriverState::Failed(error) = self.driver.state() {
            let error = GuestError::Driver(error.clone());
            self.fail(&error);
            return Progress::busy(1);
        }
        let work = self.step(now).unwrap_or_else(|error| {
            self.fail(&error);
            1
        });
        // Completions are found by polling alone, so nothing would wake a sleeper in time while commands are outstanding.
        let next = match &self.stage {
            Stage::Over(_) => Next::OnWake,
            Stage::Running if self.load.outstanding() == 0 => self.load.due().map_or(Next::Now, Next::At),
            _ => Next::Now,
        };
        Progress { work, next }.and(driver)
    }
}

/// LBAs in a block of ours, if the namespace has all blocks of the ledger.
fn lbas_per_block(namespace: &IdentifyNamespace, ledger: &Ledger) -> Result<u32, String> {
    let block_bytes = BLOCK_BYTES as u32;
    let lba_bytes = namespace
        .block_bytes()
        .filter(|bytes| *bytes > 0 && *bytes <= block_bytes && block_bytes.is_multiple_of(*bytes))
        .ok_or("its logical blocks are larger than 4 KiB, or it is not active")?;
    let lbas = block_bytes / lba_bytes;
    let last = ledger.sorted().last().map_or(0, |(block, _)| *block);
    match last.checked_add(1).and_then(|blocks| blocks.checked_mul(u64::from(lbas))) {
        Some(end) if end <= namespace.nsze => Ok(lbas),
        _ => Err(format!("it has {} logical blocks of {lba_bytes} bytes, and block {last} of 4 KiB is to be written", namespace.nsze)),
    }
}

#[cfg(test)]
#[path = "life_tests.rs"]
mod tests;
