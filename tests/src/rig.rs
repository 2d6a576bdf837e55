//! A world in one thread: subsystems, and whoever drives them, polled in a seeded order under a virtual clock.
//!
//! A [`World`] owns the subsystems and the time. A [`Front`] is a slot with a driver on it; it is the test's own, so that a
//! migration can take its driver, and a slot can be pointed at another subsystem. Everything that takes time is a closure that
//! [`World::wait`] calls between polls of the subsystems, with a deadline in virtual time: nothing sleeps, and the same seed
//! polls in the same order.
//!
//! ```
//! use dray_tests::rig::{MIGRATABLE, Side, World};
//! let mut world = World::new(1, vec![Side::memory(4 << 20, 512)]);
//! let mut guest = world.front(0, MIGRATABLE);
//! let mut pair = guest.pair(&mut world, 64, None);
//! let data = guest.memory(4096);
//! let read = dray_nvme::command::SubmissionEntry::read(1, 0, 8);
//! assert!(!world.run(&mut guest, &mut pair, &read, &[data.buffer().segment()]).status.is_error());
//! ```

use dray_controller::{ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::command::Completion;
use dray_device::memory::{DmaBuffer, Pages, Segment};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_driver::{AdminAnswer, AdminData, Driver, DriverConfig, DriverState, QueuePair, QueuePairConfig};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// CNTLID of the management controller of every side.
pub const MANAGEMENT: u16 = 1;
/// CNTLID of its first migratable controller; the others follow.
pub const MIGRATABLE: u16 = 2;
/// The namespace of every side.
pub const NSID: u32 = 1;
/// I/O queue pairs of every controller.
pub const IO_QUEUES: u16 = 8;
/// Virtual time that anything may take, in microseconds.
const PATIENCE_US: u64 = 60_000_000;

/// What one subsystem is made of.
pub struct Side {
    /// Everything but the namespaces.
    pub config: SubsystemConfig,
    /// Namespaces and their backings.
    pub namespaces: Vec<(NamespaceConfig, Box<dyn Backing>)>,
}

impl Side {
    /// A management and a migratable controller over one namespace in memory.
    ///
    /// # Panics
    /// Without memory for it.
    #[must_use]
    pub fn memory(bytes: u64, block_bytes: u32) -> Self {
        Self::over(Box::new(MemoryBacking::new(bytes, block_bytes).expect("a backing in memory")))
    }

    /// A management and a migratable controller over one namespace.
    #[must_use]
    pub fn over(backing: Box<dyn Backing>) -> Self {
        let controllers = vec![
            Self::controller(MANAGEMENT, ControllerRole::Management, Vec::new()),
            Self::controller(MIGRATABLE, ControllerRole::Migratable, vec![NSID]),
        ];
        let config = SubsystemConfig { controllers, ..SubsystemConfig::default() };
        Self { config, namespaces: vec![(Self::namespace(NSID), backing)] }
    }

    /// Adds another migratable controller, with these namespaces.
    #[must_use]
    pub fn and_controller(mut self, cntlid: u16, namespaces: Vec<u32>) -> Self {
        self.config.controllers.push(Self::controller(cntlid, ControllerRole::Migratable, namespaces));
        self
    }

    /// Adds another namespace.
    #[must_use]
    pub fn and_namespace(mut self, nsid: u32, backing: Box<dyn Backing>) -> Self {
        self.namespaces.push((Self::namespace(nsid), backing));
        self
    }

    /// The fence of a controller.
    ///
    /// # Panics
    /// When there is no such controller.
    #[must_use]
    pub fn fence(&self, cntlid: u16) -> Fence {
        let found = self.config.controllers.iter().find(|c| c.cntlid == cntlid);
        found.expect("a controller of that CNTLID").fence.clone()
    }

    /// One controller.
    #[must_use]
    pub fn controller(cntlid: u16, role: ControllerRole, namespaces: Vec<u32>) -> ControllerConfig {
        let vectors = IO_QUEUES + 1;
        ControllerConfig { cntlid, role, namespaces, io_queues: IO_QUEUES, vectors, fence: Fence::new(false) }
    }

    /// One namespace, shared; the same at every side.
    #[must_use]
    pub fn namespace(nsid: u32) -> NamespaceConfig {
        let id = nsid as u8;
        NamespaceConfig {
            nsid,
            nguid: [0xd0 + id; 16],
            eui64: [0xe0 + id; 8],
            uuid: [0xf0 + id; 16],
            shared: true,
            write_protected: false,
        }
    }
}

/// Subsystems under one clock.
#[derive(Debug)]
pub struct World {
    /// The time of the next poll.
    pub now: Time,
    /// The subsystems, in the order of the sides they were made from.
    pub subsystems: Vec<Subsystem>,
    /// Nanoseconds that pass from one round of polls to the next, give or take a half.
    pub pace_ns: u64,
    /// Where time follows the machine's clock: since when.
    clock: Option<Instant>,
    random: fastrand::Rng,
}

impl World {
    /// A world over these sides.
    ///
    /// # Panics
    /// When a side's parts do not fit together.
    #[must_use]
    pub fn new(seed: u64, sides: Vec<Side>) -> Self {
        let make = |side: Side| Subsystem::new(side.config, side.namespaces).expect("a subsystem");
        let subsystems = sides.into_iter().map(make).collect();
        Self { now: Time::from_us(1), subsystems, pace_ns: 1_000, clock: None, random: fastrand::Rng::with_seed(seed) }
    }

    /// A world with one side in memory.
    #[must_use]
    pub fn small(seed: u64) -> Self {
        Self::new(seed, vec![Side::memory(8 << 20, 512)])
    }

    /// From now on time follows the machine's clock, for backings that the kernel serves: made-up time would run past every
    /// time-out while a disk is busy.
    pub fn follow_the_clock(&mut self) {
        self.clock = Instant::now().checked_sub(Duration::from_nanos(self.now.0));
    }

    /// One round: every subsystem and `step` once each, in an order of the seed's choosing; then time passes.
    pub fn round<T>(&mut self, mut step: impl FnMut(Time) -> T) -> T {
        let turns = self.subsystems.len() + 1;
        let first = self.random.usize(0..turns);
        let mut answer = None;
        for turn in 0..turns {
            match self.subsystems.get_mut((first + turn) % turns) {
                Some(subsystem) => {
                    let _progress = subsystem.poll(self.now);
                }
                None => answer = Some(step(self.now)),
            }
        }
        self.now = match self.clock {
            Some(start) => Time(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)),
            None => self.now.after_ns(self.random.u64(self.pace_ns / 2..=self.pace_ns * 3 / 2).max(1)),
        };
        answer.expect("the step has its turn")
    }

    /// Polls the subsystems alone, that many rounds.
    pub fn rounds(&mut self, count: usize) {
        for _ in 0..count {
            self.round(|_| ());
        }
    }

    /// Rounds until `step` gives something.
    ///
    /// # Panics
    /// When it gives nothing within a minute of the world's time.
    #[track_caller]
    pub fn wait<T>(&mut self, what: &str, mut step: impl FnMut(Time) -> Option<T>) -> T {
        let deadline = self.now.after_us(PATIENCE_US);
        while self.now < deadline {
            if let Some(found) = self.round(&mut step) {
                return found;
            }
        }
        panic!("{what}: nothing happened in {PATIENCE_US} us of the world's time");
    }

    /// A driver on a slot of its own, before a controller of one side, ready.
    #[track_caller]
    pub fn front(&mut self, side: usize, cntlid: u16) -> Front {
        self.front_with(side, cntlid, DriverConfig::default())
    }

    /// As [`front`](Self::front).
    ///
    /// # Panics
    /// When the driver does not become ready.
    #[track_caller]
    pub fn front_with(&mut self, side: usize, cntlid: u16, config: DriverConfig) -> Front {
        let slot = Slot::new(AddressSpace::default(), IO_QUEUES + 1).expect("a slot");
        slot.point_at(&self.subsystems[side].plug(cntlid).expect("a controller of that CNTLID"));
        let driver = Driver::new(slot.function(), config).expect("a driver");
        let mut front = Front { driver, slot };
        front.ready(self);
        front
    }

    /// Runs one I/O command to its end.
    ///
    /// # Panics
    /// When it is not taken, or does not end.
    #[track_caller]
    pub fn run(
        &mut self,
        front: &mut Front,
        pair: &mut QueuePair,
        entry: &SubmissionEntry,
        data: &[Segment<'_>],
    ) -> Completion {
        pair.submit(self.now, entry, data, u64::MAX).expect("the command is taken");
        pair.commit();
        self.wait("an I/O command", |now| {
            let _progress = front.driver.poll(now);
            let mut ended = None;
            pair.poll_with(now, |completion| ended = Some(completion));
            ended
        })
    }

    /// What the controllers of a side have done: the counters of one.
    ///
    /// # Panics
    /// When there is no such controller.
    #[must_use]
    pub fn counters(&self, side: usize, cntlid: u16) -> dray_controller::ControllerCounters {
        let mut counters = self.subsystems[side].counters();
        counters.find(|(id, _)| *id == cntlid).expect("a controller of that CNTLID").1
    }
}

/// A slot with a driver on it.
#[derive(Debug)]
pub struct Front {
    /// The driver of the slot's function.
    pub driver: Driver,
    /// The slot, to point at another controller.
    pub slot: Slot,
}

impl Front {
    /// Polls until the driver is ready.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ready(&mut self, world: &mut World) {
        world.wait("enabling a controller", |now| {
            let _progress = self.driver.poll(now);
            match self.driver.state() {
                DriverState::Failed(error) => panic!("the driver failed: {error}"),
                _ => self.driver.is_ready().then_some(()),
            }
        });
    }

    /// Runs an admin command to its end.
    ///
    /// # Panics
    /// When it is not taken, or does not end.
    #[track_caller]
    pub fn admin(&mut self, world: &mut World, entry: &SubmissionEntry, data: AdminData<'_>) -> AdminAnswer {
        let ticket = self.driver.request(world.now, entry, data).expect("the admin command is taken");
        world.wait("an admin command", |now| {
            let _progress = self.driver.poll(now);
            self.driver.answer(ticket)
        })
    }

    /// Runs an admin command without data; its status.
    #[track_caller]
    pub fn status(&mut self, world: &mut World, entry: &SubmissionEntry) -> Status {
        self.admin(world, entry, AdminData::None).completion.status
    }

    /// Runs an admin command without data that must succeed; its result.
    ///
    /// # Panics
    /// When it does not succeed.
    #[track_caller]
    pub fn ok(&mut self, world: &mut World, entry: &SubmissionEntry) -> u64 {
        let completion = self.admin(world, entry, AdminData::None).completion;
        assert!(!completion.status.is_error() && !completion.unknown, "{entry:?}: {completion:?}");
        completion.result
    }

    /// Runs an admin command that returns data and must succeed.
    ///
    /// # Panics
    /// When it does not succeed.
    #[track_caller]
    pub fn page(&mut self, world: &mut World, entry: &SubmissionEntry, len: usize) -> Vec<u8> {
        let answer = self.admin(world, entry, AdminData::In(len));
        assert!(!answer.completion.status.is_error(), "{entry:?}: {}", answer.completion.status);
        answer.data
    }

    /// A queue pair.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn pair(&mut self, world: &mut World, entries: u16, vector: Option<u16>) -> QueuePair {
        let config = QueuePairConfig { entries, vector };
        let ticket = self.driver.create_queue_pair(world.now, config).expect("the creation is taken");
        world.wait("creating a queue pair", |now| {
            let _progress = self.driver.poll(now);
            self.driver.queue_pair(&ticket).map(|pair| pair.expect("a queue pair"))
        })
    }

    /// Memory that the controller reaches, zeroed.
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn memory(&self, len: usize) -> MappedBuffer {
        let buffer = DmaBuffer::allocate("test-data", len, Pages::Small).expect("memory");
        MappedBuffer::new(self.driver.space(), buffer).expect("mapped memory")
    }
}

/// Bytes that differ from place to place and from seed to seed.
#[must_use]
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    bytes
}

/// What a [`HeldBacking`] and its [`Hold`] share.
#[derive(Debug, Default)]
struct Held {
    shut: bool,
    failing: Option<Status>,
    waiting: Vec<(u64, Status)>,
    /// Operations that have been submitted, in order: what and where.
    seen: Vec<(BackingOp, u64, u64)>,
}

/// Holds the operations of a [`HeldBacking`]. Clones are the same hold.
#[derive(Clone, Debug, Default)]
pub struct Hold {
    shared: Arc<Mutex<Held>>,
}

impl Hold {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on operations stay under way until [`open`](Self::open).
    pub fn shut(&self) {
        self.held().shut = true;
    }

    /// Operations end again, those that wait included.
    pub fn open(&self) {
        self.held().shut = false;
    }

    /// Operations that begin from now on touch the media and end with that status; `None` = they succeed.
    pub fn fail_with(&self, status: Option<Status>) {
        self.held().failing = status;
    }

    /// Operations that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.held().waiting.len()
    }

    /// Operations begun since the last call: what, first block, blocks.
    #[must_use]
    pub fn take_seen(&self) -> Vec<(BackingOp, u64, u64)> {
        std::mem::take(&mut self.held().seen)
    }
}

/// A backing whose operations never end at once, and not at all while its [`Hold`] is shut. What they do is done when they begin.
#[derive(Debug)]
pub struct HeldBacking {
    inner: MemoryBacking,
    hold: Hold,
}

impl HeldBacking {
    /// Blocks in memory, and the hold on them.
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn new(bytes: u64, block_bytes: u32) -> (Self, Hold) {
        let hold = Hold::default();
        let inner = MemoryBacking::new(bytes, block_bytes).expect("a backing in memory");
        (Self { inner, hold: hold.clone() }, hold)
    }
}

impl Backing for HeldBacking {
    fn info(&self) -> BackingInfo {
        BackingInfo { volatile_cache: true, ..self.inner.info() }
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let mut held = self.hold.held();
        held.seen.push((request.op, request.slba, request.blocks));
        let Submitted::Done(status) = self.inner.submit(request) else { return Submitted::Busy };
        let status = held.failing.unwrap_or(status);
        held.waiting.push((request.tag, status));
        Submitted::Pending
    }

    fn can_write_uncorrectable(&self) -> bool {
        true
    }

    fn commit(&mut self) {}

    fn poll(&mut self, _now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        let mut held = self.hold.held();
        if held.shut {
            return 0;
        }
        let ended = std::mem::take(&mut held.waiting);
        drop(held);
        ended.iter().for_each(|&(tag, status)| done(tag, status));
        ended.len()
    }

    fn in_flight(&self) -> usize {
        self.hold.waiting()
    }
}
