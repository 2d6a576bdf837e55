//! A controller behind an export: server and subsystem on one polling core of the appliance, whoever drives it on this thread.

use crate::load::{BLOCK, Load, MOST};
use crate::machine::{Cores, pin};
use crate::rig::{MIGRATABLE, NSID, Rig};
use crate::Failure;
use dray::config::Idle;
use dray::core::clock::Clock;
use dray::core::reactor::{Part, Reactor};
use dray_controller::Subsystem;
use dray_device::backing::Backing;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Progress, Time};
use dray_device::random::SecureRandom;
use dray_device::slot::Slot;
use dray_device::socket::{TcpSocket, UnixSocket};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_device::vfio_user::client::{ClientConfig, VfioUserClient};
use dray_driver::nvme_tcp::{TcpConfig, TcpInitiator, TcpQueue, TcpState};
use dray_driver::{Driver, DriverConfig, DriverState, QueuePair, QueuePairConfig};
use dray_export::hooks::NoMigration;
use dray_export::nvme_tcp::{ExportedSubsystem, HostAccess, Limits, Target, TargetConfig};
use dray_export::vfio_user::{VfioUserConfig, VfioUserServer};
use dray_nvme::tcp::pdu::Digests;
use rustix::time::{ClockId, clock_gettime};
use std::net::{TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const NQN: &str = "nqn.2026-01.io.dray:bench";
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:bench";
/// Entries of an I/O queue: more than the deepest row has commands.
const ENTRIES: u16 = 256;
/// Longest time that anything but a measured run may take.
const PATIENCE_MS: u64 = 20_000;

/// What stands before the controller.
enum Server {
    VfioUser(Box<VfioUserServer>),
    NvmeTcp(Box<Target>),
}

/// What the polling core polls.
pub struct Served {
    server: Server,
    subsystem: Subsystem,
    /// ns that the thread has run, where somebody wants to know.
    ran: Option<Arc<AtomicU64>>,
}

impl Poll for Served {
    fn poll(&mut self, now: Time) -> Progress {
        let progress = match &mut self.server {
            Server::VfioUser(server) => server.poll(now),
            Server::NvmeTcp(target) => target.poll(now),
        };
        let progress = progress.and(self.subsystem.poll(now));
        if let Some(ran) = &self.ran {
            let time = clock_gettime(ClockId::ThreadCPUTime);
            ran.store(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64, Ordering::Relaxed);
        }
        progress
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        match &self.server {
            Server::VfioUser(server) => server.wakers(visit),
            Server::NvmeTcp(target) => target.wakers(visit),
        }
        self.subsystem.wakers(visit);
    }
}

impl Part for Served {
    fn polls_memory(&self) -> bool {
        match &self.server {
            Server::VfioUser(server) => server.polls_doorbells(),
            Server::NvmeTcp(_) => false,
        }
    }
}

/// How the far side is run.
#[derive(Clone)]
pub struct Far {
    pub cores: Cores,
    pub idle: Idle,
    pub ran: Option<Arc<AtomicU64>>,
}

impl Far {
    /// A far side that spins, for rows that measure work.
    pub fn spinning(cores: Cores) -> Self {
        Self { cores, idle: Idle::Spin, ran: None }
    }

    fn start(&self, clock: Clock, server: Server, subsystem: Subsystem) -> Result<Reactor<Served>, Failure> {
        let part = Served { server, subsystem, ran: self.ran.clone() };
        // A thread starts where the one that starts it may run.
        pin(self.cores.second()?)?;
        let core = Reactor::start("bench-core", clock, self.idle, part);
        self.cores.pin_first()?;
        Ok(core?)
    }
}

fn wait<T>(clock: Clock, what: &str, mut step: impl FnMut(Time) -> Result<Option<T>, Failure>) -> Result<T, Failure> {
    let deadline = clock.now().after_ms(PATIENCE_MS);
    loop {
        let now = clock.now();
        if let Some(found) = step(now)? {
            return Ok(found);
        }
        if now > deadline {
            return Err(format!("{what}: nothing within {PATIENCE_MS} ms").into());
        }
    }
}

/// Stops the far side; it must have executed what was seen to end here.
fn stop(core: Reactor<Served>, ended: u64) -> Result<(), Failure> {
    let part = core.stop()?;
    let counters = part.subsystem.counters().find(|(cntlid, _)| *cntlid == MIGRATABLE);
    let executed = counters.map_or(0, |(_, counters)| counters.reads + counters.writes);
    if executed == ended { Ok(()) } else { Err(format!("{ended} commands ended here, the controller executed {executed}").into()) }
}

/// Our driver on a vfio-user client. The doorbells are mapped, the registers trapped.
pub struct OverVfioUser {
    pub queue: QueuePair,
    pub load: Load,
    _data: MappedBuffer,
    pub admin: Driver,
    core: Reactor<Served>,
}

impl OverVfioUser {
    pub fn new(far: &Far, backing: Box<dyn Backing>, disk: Option<DmaBuffer>) -> Result<Self, Failure> {
        let blocks = backing.info().blocks;
        let Rig { clock, subsystem } = Rig::new(backing)?;
        let slot = Slot::without_lines(AddressSpace::default(), 5)?;
        slot.point_at(&subsystem.plug(MIGRATABLE).ok_or("the rig has no such controller")?);
        let mut server = VfioUserServer::new(slot, VfioUserConfig::default(), Box::new(NoMigration));
        let (ours, theirs) = UnixSocket::pair()?;
        server.attach(Box::new(theirs))?;
        let core = far.start(clock, Server::VfioUser(Box::new(server)), subsystem)?;
        let config = ClientConfig { vectors: 0, ..ClientConfig::default() };
        let client = VfioUserClient::connect(Box::new(ours), AddressSpace::default(), &config)?;
        let config = DriverConfig { pages: Pages::PreferHuge, ..DriverConfig::default() };
        let mut admin = Driver::new(client, config)?;
        wait(clock, "enabling a controller", |now| {
            let _progress = admin.poll(now);
            match admin.state() {
                DriverState::Failed(error) => Err(error.clone().into()),
                _ => Ok(admin.is_ready().then_some(())),
            }
        })?;
        let ticket = admin.create_queue_pair(clock.now(), QueuePairConfig { entries: ENTRIES, vector: None })?;
        let queue = wait(clock, "creating a queue pair", |now| {
            let _progress = admin.poll(now);
            Ok(admin.queue_pair(&ticket).transpose()?)
        })?;
        let buffer = DmaBuffer::allocate("bench-data", MOST * BLOCK, Pages::PreferHuge)?;
        let data = MappedBuffer::new(admin.space(), buffer)?;
        let load = Load::new(clock, data.buffer().clone(), disk, (NSID, blocks));
        Ok(Self { queue, load, _data: data, admin, core })
    }

    /// Ends both sides; so many commands have ended.
    pub fn end(self, ended: u64) -> Result<(), Failure> {
        let Self { queue, load, _data, admin, core } = self;
        // What is unmapped is told to the server, which must be there.
        drop((queue, load, _data, admin));
        stop(core, ended)
    }
}

/// Bytes that are no secret: nobody authenticates here.
struct NoSecret(fastrand::Rng);

impl SecureRandom for NoSecret {
    fn fill(&mut self, into: &mut [u8]) {
        self.0.fill(into);
    }
}

fn random(seed: u64) -> Box<dyn SecureRandom> {
    Box::new(NoSecret(fastrand::Rng::with_seed(seed)))
}

/// Our initiator over loopback TCP, without digests.
pub struct OverTcp {
    pub queue: TcpQueue,
    pub load: Load,
    pub admin: TcpInitiator,
    pub core: Reactor<Served>,
}

impl OverTcp {
    pub fn new(far: &Far, backing: Box<dyn Backing>, disk: Option<DmaBuffer>) -> Result<Self, Failure> {
        let blocks = backing.info().blocks;
        let Rig { clock, subsystem } = Rig::new(backing)?;
        let slot = Slot::new(AddressSpace::default(), 1)?;
        slot.point_at(&subsystem.plug(MIGRATABLE).ok_or("the rig has no such controller")?);
        let exported = ExportedSubsystem {
            nqn: NQN.into(),
            serial: String::new(),
            allowed_hosts: vec![HostAccess { nqn: HOST.into(), secret: None, controller_secret: None }],
            allow_any_host: false,
            digests: Default::default(),
            controllers: vec![(MIGRATABLE, slot)],
            ana_groups: Vec::new(),
        };
        let limits = Limits { queue_entries: ENTRIES, io_queues: 1, ..Limits::default() };
        let config =
            TargetConfig { subsystems: vec![exported], discovery: false, limits, dh_groups: Vec::new(), random: random(1) };
        let mut target = Target::new(config)?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let mut connect = || -> Result<TcpSocket, Failure> {
            let ours = TcpSocket::new(TcpStream::connect(address)?)?;
            target.accept(Box::new(TcpSocket::new(listener.accept()?.0)?), address);
            Ok(ours)
        };
        let (first, second) = (connect()?, connect()?);
        let core = far.start(clock, Server::NvmeTcp(Box::new(target)), subsystem)?;
        let config = TcpConfig { digests: Digests::new(), ..TcpConfig::new(HOST, [3; 16], NQN) };
        let mut admin = TcpInitiator::connect(clock.now(), config, Box::new(first), random(2))?;
        wait(clock, "connecting", |now| {
            let _progress = admin.poll(now);
            match admin.state() {
                TcpState::Failed(error) => Err(error.clone().into()),
                state => Ok((*state == TcpState::Ready).then_some(())),
            }
        })?;
        let ticket = admin.open_queue(clock.now(), Box::new(second), ENTRIES)?;
        let queue = wait(clock, "opening a queue", |now| {
            let _progress = admin.poll(now);
            Ok(admin.take_queue(ticket).transpose()?)
        })?;
        let buffer = DmaBuffer::allocate("bench-data", MOST * BLOCK, Pages::PreferHuge)?;
        let load = Load::new(clock, buffer, disk, (NSID, blocks));
        Ok(Self { queue, load, admin, core })
    }

    /// Ends both sides; so many commands have ended.
    pub fn end(self, ended: u64) -> Result<(), Failure> {
        let Self { queue, load, admin, core } = self;
        drop((queue, load, admin));
        stop(core, ended)
    }
}
