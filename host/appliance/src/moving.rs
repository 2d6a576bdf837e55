//! A migration as the appliance runs it, whoever the guest is: what it is made of, and its place on the polling core.

use crate::assembly::pages;
use crate::config::units::Span;
use crate::config::{Config, MediaError, Policy, Trust};
use crate::core::clock::{Clock, unix_seconds};
use crate::core::status::Status;
use dray_device::command::CommandQueue;
use dray_device::poll::{Poll, Progress, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::space::AddressSpace;
use dray_driver::{Driver, DriverConfig, DriverError, DriverState, QueuePair, QueuePairConfig};
use dray_migration::{
    CopyConfig, DriverMmc, EndId, FenceControl, Hooks, Ingredients, Limits, LocalDestination, LocalFeatures, Migration, MigrationConfig,
    Mmc, OnMediaError, Outcome, Owner, Policies, PolicySettings, ProgressView,
};
use dray_nvme::identify::IdentifyController;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How often a migration publishes its progress.
const PUBLISH_NS: u64 = 20_000_000;
/// How long a management controller may take to come up.
const MMC_PATIENCE_US: u64 = 10_000_000;
/// Entries of the I/O queues that the media is copied through.
pub const COPY_QUEUE: u16 = 128;
/// Transfers at a time: enough to keep a disk busy in the last round, whose blocks lie apart.
const TRANSFERS: usize = 64;

/// Why there is no migration.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum MovingError {
    /// A management controller.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A management controller failed on its way up.
    #[error("a management controller did not come up: {0}")]
    Failed(String),
    /// It took too long.
    #[error("a management controller did not come up in time")]
    Late,
}

/// What moves in one migration.
pub struct Plan {
    /// The migration's number.
    pub id: u64,
    /// The names of its ends in records.
    pub ends: [EndId; 2],
    /// CNTLIDs: source, destination.
    pub controllers: Vec<(u16, u16)>,
    /// NSIDs: source, destination.
    pub namespaces: Vec<(u32, u32)>,
    /// Seed of the policies.
    pub seed: u64,
    /// Most bytes per second of the copy, whatever the policy says; 0 = no limit.
    pub max_bytes_per_s: u64,
}

/// A migration's configuration, from the appliance's.
#[must_use]
pub fn migration_config(config: &Config, plan: Plan) -> MigrationConfig {
    let file = &config.file;
    let settings = |policy: &Policy| policy.settings.clone().into_iter().collect();
    let micros = |span: Span| span.0.as_micros();
    MigrationConfig {
        id: plan.id,
        ends: plan.ends,
        seed: plan.seed,
        namespaces: plan.namespaces,
        controllers: plan.controllers,
        cdq_slots: file.migration.cdq_slots,
        copy: CopyConfig {
            transfers: TRANSFERS,
            on_media_error: match file.migration.media_error {
                MediaError::Fail => OnMediaError::Fail,
                MediaError::Mark => OnMediaError::Mark,
            },
            ..CopyConfig::default()
        },
        max_bytes_per_s: plan.max_bytes_per_s,
        limits: Limits {
            max_rounds: file.migration.max_rounds,
            max_time_ms: u64::try_from(micros(file.migration.max_time) / 1000).unwrap_or(u64::MAX),
            downtime_budget_us: u32::try_from(micros(file.migration.downtime)).unwrap_or(u32::MAX),
            compare_budget_us: u64::try_from(micros(file.migration.compare)).unwrap_or(u64::MAX),
            ..Limits::default()
        },
        may_throttle: file.migration.throttle_guest,
        trust_drive: file.migration.trust == Trust::Drive,
        unix_s: unix_seconds(),
        settings: PolicySettings {
            cdq: settings(&file.policy.cdq),
            tracking: settings(&file.policy.tracking),
            copy: settings(&file.policy.copy),
        },
        ..MigrationConfig::default()
    }
}

/// The driver of a management controller, not yet up.
///
/// # Errors
/// [`DriverError`].
pub fn mmc_driver(config: &Config, management: &Slot) -> Result<Driver, DriverError> {
    Driver::new(management.function(), DriverConfig { pages: pages(config), ..DriverConfig::default() })
}

/// Brings a management controller up. The polling core runs already.
///
/// # Errors
/// [`MovingError`].
pub fn ready(driver: &mut Driver, clock: Clock) -> Result<(), MovingError> {
    until(clock, driver, |driver, _| driver.is_ready().then_some(Ok(())))
}

/// The management controller of a media move with an I/O queue to read the media through, and the address space of that.
///
/// # Errors
/// [`MovingError`].
pub fn reader(driver: Driver, clock: Clock) -> Result<(Box<dyn Mmc>, Box<dyn CommandQueue>, AddressSpace), MovingError> {
    let (driver, queue) = ready_to_copy(driver, clock)?;
    let space = driver.space().clone();
    Ok((Box::new(DriverMmc::new(driver, COPY_QUEUE)), Box::new(queue), space))
}

/// Brings a management controller up and gives it an I/O queue. The polling core runs already.
fn ready_to_copy(mut driver: Driver, clock: Clock) -> Result<(Driver, QueuePair), MovingError> {
    ready(&mut driver, clock)?;
    let mut ticket = None;
    let pair = until(clock, &mut driver, |driver, now| match &ticket {
        None => {
            let config = QueuePairConfig { entries: COPY_QUEUE, vector: None };
            ticket = driver.create_queue_pair(now, config).ok();
            None
        }
        Some(ticket) => driver.queue_pair(ticket).map(|pair| Ok(pair?)),
    })?;
    Ok((driver, pair))
}

/// Polls a driver until `done` has something to say.
///
/// # Errors
/// [`MovingError`]: `done`'s, the driver's, or that it takes too long.
pub fn until<T>(
    clock: Clock,
    driver: &mut Driver,
    mut done: impl FnMut(&mut Driver, Time) -> Option<Result<T, MovingError>>,
) -> Result<T, MovingError> {
    let end = clock.now().after_us(MMC_PATIENCE_US);
    loop {
        let now = clock.now();
        if now >= end {
            return Err(MovingError::Late);
        }
        let _progress = driver.poll(now);
        if let DriverState::Failed(error) = driver.state() {
            return Err(MovingError::Failed(error.to_string()));
        }
        if let Some(result) = done(driver, now) {
            return result;
        }
    }
}

/// Both management controllers with their queues, the policies and the surroundings, as a migration takes them.
///
/// # Errors
/// [`MovingError`].
pub fn ingredients(mmcs: [Driver; 2], clock: Clock, policies: Policies, hooks: Hooks) -> Result<Ingredients, MovingError> {
    let [from, to] = mmcs;
    let (from, to) = (ready_to_copy(from, clock)?, ready_to_copy(to, clock)?);
    let features = local_features(to.0.identify());
    let (source_space, destination_space) = (from.0.space().clone(), to.0.space().clone());
    Ok(Ingredients {
        source: Box::new(DriverMmc::new(from.0, COPY_QUEUE)),
        source_queue: Box::new(from.1),
        source_space,
        destination: Box::new(DriverMmc::new(to.0, COPY_QUEUE)),
        media: Box::new(LocalDestination::new(Box::new(to.1), destination_space, features)),
        policies,
        hooks,
    })
}

/// What a destination can do, as its management controller says.
pub fn local_features(identify: Option<&IdentifyController>) -> LocalFeatures {
    let oncs = identify.map(|identify| identify.oncs).unwrap_or_default();
    LocalFeatures { compare: oncs.compare(), write_uncorrectable: oncs.write_uncorrectable(), reads_zero: false }
}

/// The fences of the controllers that move: the source's and the destination's of each pair.
pub struct Fences(pub Vec<[Fence; 2]>);

impl FenceControl for Fences {
    fn raise(&mut self, end: Owner) {
        self.0.iter().for_each(|pair| pair[end as usize].raise());
    }

    fn lower(&mut self, end: Owner) {
        self.0.iter().for_each(|pair| pair[end as usize].lower());
    }
}

/// What the polling core and whoever looks share of a migration.
#[derive(Default)]
pub struct Board {
    start: Mutex<Option<Box<Migration>>>,
    has_start: AtomicBool,
    cancel: AtomicBool,
    ended: AtomicBool,
    moved: AtomicBool,
    view: Mutex<ProgressView>,
}

impl Board {
    /// Hands a migration to the core, which begins it at its next poll.
    pub fn start(&self, migration: Box<Migration>) {
        self.cancel.store(false, Ordering::Relaxed);
        self.ended.store(false, Ordering::Relaxed);
        self.moved.store(false, Ordering::Relaxed);
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = ProgressView::default();
        *self.start.lock().unwrap_or_else(PoisonError::into_inner) = Some(migration);
        self.has_start.store(true, Ordering::Release);
    }

    /// Cancels it.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Whether it has ended, and the namespaces are at the destination.
    #[must_use]
    pub fn has_moved(&self) -> bool {
        self.has_ended() && self.moved.load(Ordering::Relaxed)
    }

    /// How far it was when it was published last.
    #[must_use]
    pub fn view(&self) -> ProgressView {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A migration's place on the polling core. An ended one is still polled: it owns both management controllers.
pub struct Moving {
    migration: Option<Box<Migration>>,
    board: Arc<Board>,
    published: Time,
    status: Option<Status>,
}

impl Moving {
    /// An empty place; `status` is the page that shows how far it is.
    #[must_use]
    pub fn new(board: Arc<Board>, status: Option<Status>) -> Self {
        Self { migration: None, board, published: Time(0), status }
    }

    /// Takes the migration out.
    pub fn take(&mut self) -> Option<Box<Migration>> {
        self.migration.take()
    }
}

impl Poll for Moving {
    fn poll(&mut self, now: Time) -> Progress {
        if self.migration.is_none() && self.board.has_start.swap(false, Ordering::AcqRel) {
            self.migration = self.board.start.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        let Some(migration) = &mut self.migration else { return Progress::IDLE };
        if self.board.cancel.load(Ordering::Relaxed) {
            migration.cancel();
        }
        let progress = migration.poll(now);
        if let Some(status) = &mut self.status {
            status.migration(migration);
        }
        if now.ns_since(self.published) >= PUBLISH_NS || *migration.outcome() != Outcome::Running {
            self.published = now;
            *self.board.view.lock().unwrap_or_else(PoisonError::into_inner) = migration.progress(now);
            self.board.moved.store(*migration.outcome() == Outcome::Moved, Ordering::Relaxed);
            self.board.ended.store(*migration.outcome() != Outcome::Running, Ordering::Release);
        }
        progress
    }
}
