//! A migration with a guest, on threads: what the demo and the benchmark run.
//!
//! One polling core has both subsystems (unless they are processes of their own: see [`crate::apart`]) and the migration, another
//! the guest. The caller's thread only looks and decides when
//! the next act begins: the guest settles, the migration runs, the guest goes on at the destination and resets its controller
//! once, everything stops.

use crate::assembly::{Machine, pages};
use crate::config::Config;
use crate::core::clock::Clock;
use crate::core::jobs::Worker;
use crate::core::reactor::{CoreDied, Part, Reactor};
use crate::core::records::RecordJournal;
use crate::core::status::Status;
use crate::moving::{Board, Fences, Moving, MovingError, Plan, ingredients, migration_config, mmc_driver};
use crate::policies::Seats;
use crate::recovery::{Records, RecoveryError};
use dray_controller::Subsystem;
use dray_device::function::Function;
use dray_device::poll::{Poll, Progress, Time};
use dray_device::slot::{Plug, Slot, SlotError};
use dray_device::space::AddressSpace;
use dray_driver::{Driver, DriverConfig, DriverError};
use dray_migration::copy::CopySetupError;
use dray_migration::{
    FenceControl, GuestSample, GuestSlot, GuestView, Hooks, Migration, Outcome, Owner, Policies, ProgressView, Report,
};
use dray_workload::guest::{Guest, GuestConfig, GuestError, GuestHandle, GuestSampler, GuestStage, Phase};
use dray_workload::ledger::Ledger;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// How often the caller looks.
const LOOK: Duration = Duration::from_millis(50);
/// How long a guest may take to come up, or to stop.
const GUEST_PATIENCE: Duration = Duration::from_secs(30);

/// What is run.
pub struct LiveSpec<'a> {
    /// The configuration: policies' settings, limits, where records are kept.
    pub config: &'a Config,
    /// The guest.
    pub guest: GuestConfig,
    /// What it writes, and where it keeps account.
    pub ledger: Arc<Ledger>,
    /// How long the guest runs before the migration, and again after it.
    pub settle: Duration,
    /// Whether the guest resets its controller at the destination.
    pub reset: bool,
    /// Most bytes per second of the copy, whatever the policy says; 0 = no limit.
    pub max_bytes_per_s: u64,
    /// Seed of the policies.
    pub seed: u64,
    /// The processors that the polling core and the guest are pinned to.
    pub pin: Option<(usize, usize)>,
    /// Set from outside to cancel.
    pub cancel: Arc<AtomicBool>,
}

/// Where a run begins.
pub struct Start {
    /// The durable records: they say which end serves. They are closed before anything is polled.
    pub records: Records,
    /// Where the run shows how far it is.
    pub status: Option<Status>,
}

/// What the caller sees while it runs.
#[derive(Clone, Debug)]
pub struct LiveView {
    /// Which act is on.
    pub act: Act,
    /// The migration's progress, from the second act on.
    pub migration: ProgressView,
    /// The guest's counters.
    pub guest: dray_workload::guest::Counters,
    /// The guest's figures since the last look.
    pub sample: dray_workload::guest::GuestSample,
    /// Since the run began.
    pub elapsed: Duration,
}

/// The acts of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The guest comes up and settles.
    Settling,
    /// The migration runs.
    Migrating,
    /// The guest goes on.
    After,
    /// Everything stops.
    Stopping,
}

/// What a run gave.
pub struct LiveReport {
    /// The migration's report.
    pub migration: Report,
    /// The guest's side.
    pub guest: GuestHandle,
    /// Time of the guest spent in each phase, and all else that it counts, is in `guest`; this is why it was no good, if so.
    pub guest_error: Option<String>,
    /// The guest found the same identity after its reset (true without a reset).
    pub same_identity: bool,
    /// A migration ran; it did not if the destination served already.
    pub migrated: bool,
    /// Who serves at the end.
    pub serving: Owner,
}

/// Why a run could not be.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum LiveError {
    /// A slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A device that is a backing.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Device(#[from] crate::devices::DeviceError),
    /// The guest.
    #[error("the guest: {0}")]
    Guest(#[from] GuestError),
    /// The management controllers.
    #[error(transparent)]
    Moving(#[from] MovingError),
    /// The migration's set-up.
    #[error("the migration cannot be set up: {0}")]
    Migration(#[from] CopySetupError),
    /// The durable records.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Records(#[from] RecoveryError),
    /// A thread.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// What happened.
        source: std::io::Error,
    },
    /// A core died.
    #[error(transparent)]
    Died(#[from] CoreDied),
    /// The migration set is empty or the two sides do not fit.
    #[error("{0}")]
    Set(String),
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> LiveError {
    let what = what.into();
    move |source| LiveError::Io { what, source }
}

/// What a guest and a migration need of the two ends, wherever these are.
pub struct Ends {
    /// What the guest drives.
    pub function: Arc<dyn Function>,
    /// Points that at one end or the other.
    pub slot: Box<dyn FnOnce(GuestHandle) -> Box<dyn GuestSlot>>,
    /// The fences before the controllers.
    pub fences: Box<dyn FenceControl>,
    /// The drivers of the management controllers, source first, not yet up.
    pub management: [Driver; 2],
    /// CNTLIDs: source, destination.
    pub controllers: (u16, u16),
    /// What this process has to poll.
    pub subsystems: Vec<Subsystem>,
    /// Called when the namespace has moved.
    pub moved: Box<dyn FnOnce()>,
    /// Kept until guest and migration have ended.
    pub keep: Box<dyn std::any::Any>,
}

/// The polling core's part.
struct CorePart {
    subsystems: Vec<Subsystem>,
    moving: Moving,
    pin: Option<usize>,
}

impl Poll for CorePart {
    fn poll(&mut self, now: Time) -> Progress {
        if let Some(cpu) = self.pin.take() {
            pin_to(cpu);
        }
        let mut progress = Progress::IDLE;
        for subsystem in &mut self.subsystems {
            progress = progress.and(subsystem.poll(now));
        }
        progress.and(self.moving.poll(now))
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        self.subsystems.iter().for_each(|subsystem| subsystem.wakers(visit));
    }
}

impl Part for CorePart {}

struct GuestPart {
    guest: Guest,
    handle: GuestHandle,
    pin: Option<usize>,
}

impl Poll for GuestPart {
    fn poll(&mut self, now: Time) -> Progress {
        if let Some(cpu) = self.pin.take() {
            pin_to(cpu);
        }
        self.guest.poll(now)
    }
}

impl Part for GuestPart {
    fn is_finished(&self) -> bool {
        self.handle.is_over()
    }
}

/// Pins the calling thread; where that is not allowed it runs unpinned.
pub fn pin_to(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    let _unpinned = rustix::thread::sched_setaffinity(None, &set);
}

/// The guest's slot, pointed from one plug to the other.
struct SwitchedSlot {
    slot: Slot,
    source: Plug,
    destination: Plug,
    guest: GuestHandle,
}

impl GuestSlot for SwitchedSlot {
    fn point_at_destination(&mut self, _cntlid: u16) {
        // The source is suspended: whatever the guest has outstanding now may end at the destination.
        self.guest.mark_suspend();
        self.slot.point_at(&self.destination);
    }

    fn point_at_source(&mut self, _cntlid: u16) {
        self.slot.point_at(&self.source);
        self.guest.clear_marks();
    }
}

/// The guest's own figures; a hypervisor's would come from its controller.
struct Figures(GuestSampler);

impl GuestView for Figures {
    fn sample(&mut self) -> GuestSample {
        let sample = self.0.sample();
        GuestSample { p50_us: sample.p50_us, p99_us: sample.p99_us, p99_before_us: sample.p99_before_us, iops: sample.iops }
    }
}

/// Runs a guest and a migration over new disks to their end: whatever was recorded of their namespaces is over.
///
/// # Errors
/// [`LiveError`] when it could not be set up or a thread died; a migration that was undone is a [`LiveReport`].
pub fn run(
    spec: &LiveSpec<'_>,
    source: Machine,
    destination: Machine,
    seats: Seats,
    look: &mut dyn FnMut(&LiveView),
) -> Result<LiveReport, LiveError> {
    let mut records = Records::open(spec.config)?;
    records.renew()?;
    run_from(spec, source, destination, seats, Start { records, status: None }, look)
}

/// Runs a guest, and a migration unless the destination serves already, from what the records say to their end. The machines have
/// been built with the fences that [`Records::is_fenced`] asks for.
///
/// # Errors
/// As [`run`].
pub fn run_from(
    spec: &LiveSpec<'_>,
    source: Machine,
    destination: Machine,
    seats: Seats,
    start: Start,
    look: &mut dyn FnMut(&LiveView),
) -> Result<LiveReport, LiveError> {
    run_with(spec, |serving| both_here(spec, source, destination, serving), seats, start, look)
}

/// Both ends in this process.
fn both_here(spec: &LiveSpec<'_>, source: Machine, destination: Machine, serving: Owner) -> Result<Ends, LiveError> {
    let (from, to) = match (source.migratable.as_slice(), destination.migratable.as_slice()) {
        ([from], [to]) => (from, to),
        _ => return Err(LiveError::Set("the demo moves one migratable controller at each side".into())),
    };
    if serving == Owner::Destination && !from.fence.is_up() {
        return Err(LiveError::Set("the destination serves, and the source was built without its fence".into()));
    }
    let slot = Slot::new(AddressSpace::default(), from.io_queues.max(to.io_queues).saturating_add(1))?;
    slot.point_at(if serving == Owner::Source { &from.plug } else { &to.plug });
    let (function, plugs) = (slot.function(), [from.plug.clone(), to.plug.clone()]);
    let switched = move |guest| {
        let [source, destination] = plugs;
        Box::new(SwitchedSlot { slot, source, destination, guest }) as Box<dyn GuestSlot>
    };
    Ok(Ends {
        function,
        slot: Box::new(switched),
        fences: Box::new(Fences(vec![[from.fence.clone(), to.fence.clone()]])),
        management: [mmc_driver(spec.config, &source.management.1)?, mmc_driver(spec.config, &destination.management.1)?],
        controllers: (from.cntlid, to.cntlid),
        subsystems: vec![source.subsystem, destination.subsystem],
        moved: Box::new(|| ()),
        keep: Box::new(()),
    })
}

/// As [`run_from`], with the ends that `ends` brings up once the records are closed: it is told which of them serves.
///
/// # Errors
/// As [`run`], and those of `ends`.
pub fn run_with(
    spec: &LiveSpec<'_>,
    ends: impl FnOnce(Owner) -> Result<Ends, LiveError>,
    seats: Seats,
    start: Start,
    look: &mut dyn FnMut(&LiveView),
) -> Result<LiveReport, LiveError> {
    let clock = Clock::new();
    let worker = Worker::start().map_err(io("the job worker"))?;
    let Start { mut records, status } = start;
    records.close()?;
    let serving = records.serving()?;
    let Ends { function, slot, fences, management, controllers, subsystems, moved: let_go, keep } = ends(serving)?;
    // Data of the guest, and of the copy, goes straight to and from devices that are backings.
    for space in [function.space(), management[0].space(), management[1].space()] {
        spec.config.devices.follow(space)?;
    }
    let driver = Driver::new(function, DriverConfig { pages: pages(spec.config), ..DriverConfig::default() })?;
    let (guest, handle) = Guest::new(driver, spec.guest.clone(), Arc::clone(&spec.ledger))?;
    take_up_marks(&handle, serving);
    let plan = Plan {
        id: records.next_migration(),
        ends: records.ends(),
        controllers: vec![controllers],
        namespaces: vec![(spec.guest.nsid, spec.guest.nsid)],
        seed: spec.seed,
        max_bytes_per_s: spec.max_bytes_per_s,
    };
    let config = migration_config(spec.config, plan);
    let jobs = worker.jobs().ok_or_else(|| LiveError::Set("the job worker has ended".into()))?;
    let journal = RecordJournal::new(records.into_stores(), Box::new(jobs));

    let board = Arc::new(Board::default());
    let idle = spec.config.file.core.idle;
    let (core_cpu, guest_cpu) = spec.pin.unzip();
    let core = CorePart {
        subsystems,
        moving: Moving::new(Arc::clone(&board), status.clone()),
        pin: core_cpu,
    };
    let core = Reactor::start("dray-core", clock, idle, core).map_err(io("the polling core"))?;
    let part = GuestPart { guest, handle: handle.clone(), pin: guest_cpu };
    let guest = Reactor::start("dray-guest", clock, idle, part).map_err(io("the guest's core"))?;

    let mut play = Play { spec, clock, board, handle: handle.clone(), sampler: handle.sampler(), status, look };
    let migrated = serving == Owner::Source;
    if migrated {
        play.settle(Act::Settling)?;
        let hooks = Hooks {
            slot: slot(handle.clone()),
            journal: Box::new(journal),
            fence: fences,
            guest: Box::new(Figures(handle.sampler())),
        };
        let policies = Policies { cdq: vec![seats.cdq], tracking: seats.tracking, copy: seats.copy };
        play.migrate(Box::new(Migration::new(config, ingredients(management, clock, policies, hooks)?, clock.now())?));
        if play.board.has_moved() {
            let_go();
        }
    } else {
        play.settle(Act::After)?;
    }
    let same_identity = play.afterwards()?;
    handle.stop();
    play.until(Act::Stopping, GUEST_PATIENCE, |handle, _| handle.is_over());
    drop(guest.stop()?);
    let mut part = core.stop()?;
    let report = part.moving.take().map(|migration| migration.report().clone()).unwrap_or_default();
    drop(part);
    drop(keep);
    let guest_error = handle.first_error();
    let serving = if moved(&report) { Owner::Destination } else { serving };
    Ok(LiveReport { migration: report, guest: handle, guest_error, same_identity, migrated, serving })
}

/// The ledger's marks of a switch-over, as the records say: there was one that holds, or there was none.
fn take_up_marks(handle: &GuestHandle, serving: Owner) {
    if serving == Owner::Source {
        return handle.clear_marks();
    }
    handle.set_phase(Phase::After);
    handle.ledger().recover_suspend_floor();
    if handle.ledger().resume_mark().is_none() {
        handle.mark_resume();
    }
}

/// The caller's side of a run.
struct Play<'a, 'b> {
    spec: &'a LiveSpec<'a>,
    clock: Clock,
    board: Arc<Board>,
    handle: GuestHandle,
    sampler: GuestSampler,
    status: Option<Status>,
    look: &'b mut dyn FnMut(&LiveView),
}

impl Play<'_, '_> {
    /// Looks until `done` says so or the time is over; says whether it was done.
    fn until(&mut self, act: Act, at_most: Duration, done: impl Fn(&GuestHandle, &Board) -> bool) -> bool {
        if let Some(status) = &self.status {
            status.act(act);
        }
        let end = self.clock.now().after_us(u64::try_from(at_most.as_micros()).unwrap_or(u64::MAX));
        loop {
            if done(&self.handle, &self.board) {
                return true;
            }
            let now = self.clock.now();
            if now >= end {
                return false;
            }
            let migration = self.board.view();
            let (guest, sample) = (self.handle.counters(), self.sampler.sample());
            (self.look)(&LiveView { act, migration, guest, sample, elapsed: Duration::from_nanos(now.0) });
            std::thread::sleep(LOOK.min(Duration::from_nanos(end.ns_since(now))));
        }
    }

    fn settle(&mut self, act: Act) -> Result<(), LiveError> {
        let up = self.until(act, GUEST_PATIENCE, |handle, _| {
            !matches!(handle.stage(), GuestStage::Starting | GuestStage::Identifying)
        });
        if !up || self.handle.stage() != GuestStage::Running {
            let why = self.handle.first_error().unwrap_or_else(|| "it did not come up in time".into());
            return Err(LiveError::Set(format!("the guest: {why}")));
        }
        let cancel = Arc::clone(&self.spec.cancel);
        self.until(act, self.spec.settle, move |handle, _| handle.is_over() || cancel.load(Ordering::Relaxed));
        Ok(())
    }

    fn migrate(&mut self, migration: Box<Migration>) {
        self.handle.set_phase(Phase::During);
        self.board.start(migration);
        let cancel = Arc::clone(&self.spec.cancel);
        self.until(Act::Migrating, Duration::MAX, move |_, board| {
            if cancel.load(Ordering::Relaxed) {
                board.cancel();
            }
            board.has_ended()
        });
        self.handle.mark_resume();
        self.handle.set_phase(Phase::After);
    }

    /// The guest goes on for a while; then it resets its controller. Says whether it found the same identity.
    fn afterwards(&mut self) -> Result<bool, LiveError> {
        let over = |handle: &GuestHandle, _: &Board| handle.is_over();
        self.until(Act::After, self.spec.settle, over);
        if !self.spec.reset || self.handle.is_over() {
            return Ok(!self.handle.is_over());
        }
        let resets = self.handle.counters().resets;
        self.handle.request_reset();
        let done = self.until(Act::After, GUEST_PATIENCE, |handle, _| {
            handle.is_over() || (handle.counters().resets > resets && handle.stage() == GuestStage::Running)
        });
        self.until(Act::After, self.spec.settle / 4, over);
        let counters = self.handle.counters();
        Ok(done && !self.handle.is_over() && counters.resets > resets && counters.identity_changes == 0)
    }
}

/// Whether the migration moved the namespace.
#[must_use]
pub fn moved(report: &Report) -> bool {
    report.outcome == Outcome::Moved
}

/// Where the files of a run are kept.
#[must_use]
pub fn ledger_path(config: &Config) -> PathBuf {
    config.path(&config.file.core.state).join("guest.ledger")
}
