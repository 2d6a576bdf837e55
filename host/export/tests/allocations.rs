//! Rule 13 where clients attach: reads and writes by vfio-user, with mapped doorbells and with a message for each, and by
//! NVMe/TCP, with data in the capsule, by R2T and with digests, allocate nothing on the core that serves them once everything
//! has been used.
#![allow(missing_docs)]

use dray_controller::{ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{DmaBuffer, Pages, Segment};
use dray_device::poll::{Poll, Time};
use dray_device::random::SecureRandom;
use dray_device::slot::{Fence, Slot};
use dray_device::socket::{Stream, UnixSocket};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_device::vfio_user::client::{ClientConfig, VfioUserClient};
use dray_driver::nvme_tcp::{TcpConfig, TcpInitiator, TcpQueue, TcpState};
use dray_driver::{Driver, DriverConfig, QueuePair, QueuePairConfig};
use dray_export::hooks::NoMigration;
use dray_export::nvme_tcp::{DigestPolicy, ExportedSubsystem, HostAccess, Limits, Target, TargetConfig};
use dray_export::vfio_user::{Bar0Map, VfioUserConfig, VfioUserServer};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::tcp::pdu::Digests;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BLOCK: u32 = 512;
const BYTES: u64 = 8 << 20;
const VECTORS: u16 = 3;
/// Commands that are counted, and commands before them that bring everything into use.
const COMMANDS: u64 = 6_000;
const WARM_UP: u64 = 5_000;
const PATIENCE: Duration = Duration::from_secs(120);
const HOST: &str = "nqn.2014-08.org.example:h";
const NQN: &str = "nqn.2026-11.org.example:it";

fn subsystem() -> Subsystem {
    let controller = ControllerConfig {
        cntlid: 2,
        role: ControllerRole::Migratable,
        namespaces: vec![1],
        io_queues: 2,
        vectors: VECTORS,
        fence: Fence::default(),
    };
    let config = SubsystemConfig { controllers: vec![controller], ..SubsystemConfig::default() };
    let namespace = NamespaceConfig { nsid: 1, nguid: [1; 16], eui64: [1; 8], uuid: [1; 16], shared: true, write_protected: false };
    let backing = MemoryBacking::new(BYTES, BLOCK).expect("a backing");
    Subsystem::new(config, vec![(namespace, Box::new(backing))]).expect("a subsystem")
}

/// What serves, on a thread of its own that counts its allocations when told to.
struct Served {
    counting: Arc<AtomicBool>,
    counted: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn by(mut poll: impl FnMut(Time) -> u32 + Send + 'static) -> Self {
        let (counting, stop) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let counted = Arc::<AtomicU64>::default();
        let (count, until, found) = (Arc::clone(&counting), Arc::clone(&stop), Arc::clone(&counted));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Acquire) {
                let now = now();
                let mut work = 0;
                if count.load(Ordering::Acquire) {
                    found.fetch_add(allocation_counter::measure(|| work = poll(now)).count_total, Ordering::AcqRel);
                } else {
                    work = poll(now);
                }
                if work == 0 {
                    std::thread::yield_now();
                }
            }
        });
        Self { counting, counted, stop, thread: Some(thread) }
    }

    /// Allocations of the serving thread while `commands` run.
    fn count(&self, commands: impl FnOnce()) -> u64 {
        self.counting.store(true, Ordering::Release);
        commands();
        self.counting.store(false, Ordering::Release);
        self.counted.load(Ordering::Acquire)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.take().expect("once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "what serves has panicked");
    }
}

/// Time since the tests began: it never goes back for who is polled.
fn now() -> Time {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    Time(BEGAN.elapsed().as_nanos() as u64 + 1)
}

fn until<T>(what: &str, mut step: impl FnMut(Time) -> Option<T>) -> T {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Some(found) = step(now()) {
            return found;
        }
    }
    panic!("never: {what}");
}

/// Reads and writes of one to `most` blocks, several at a time.
fn run(
    commands: u64,
    most: u32,
    data: &DmaBuffer,
    mut submit: impl FnMut(Time, &SubmissionEntry, Segment) -> Result<(), SubmitError>,
    mut poll: impl FnMut(Time, &mut dyn FnMut(Completion)),
) {
    let mut random = fastrand::Rng::with_seed(1);
    let (mut sent, mut ended) = (0, 0);
    until("all commands end", |now| {
        for _ in 0..random.u32(0..8) {
            if sent == commands {
                break;
            }
            let blocks = random.u32(1..=most);
            let slba = random.u64(0..BYTES / u64::from(BLOCK) - u64::from(most));
            let piece = data.part(0, (blocks * BLOCK) as usize).expect("within the data");
            let write = random.bool();
            let entry = if write { SubmissionEntry::write(1, slba, blocks) } else { SubmissionEntry::read(1, slba, blocks) };
            match submit(now, &entry, piece) {
                Ok(()) => sent += 1,
                Err(SubmitError::Full) => break,
                Err(error) => panic!("{error}"),
            }
        }
        poll(now, &mut |completion| {
            assert!(!completion.status.is_error() && !completion.unknown, "{completion:?}");
            ended += 1;
        });
        (ended == commands).then_some(())
    });
}

/// A driver on a function behind a vfio-user socket.
struct Guest {
    driver: Driver,
    pair: QueuePair,
    data: MappedBuffer,
}

impl Guest {
    fn attach(stream: UnixSocket) -> Self {
        let client = VfioUserClient::connect(Box::new(stream), AddressSpace::default(), &ClientConfig::default()).expect("connected");
        let mut driver = Driver::new(client, DriverConfig::default()).expect("a driver");
        until("ready", |now| {
            let _progress = driver.poll(now);
            driver.is_ready().then_some(())
        });
        let ticket = driver.create_queue_pair(now(), QueuePairConfig { entries: 32, vector: Some(1) }).expect("asked");
        let pair = until("a queue pair", |now| {
            let _progress = driver.poll(now);
            driver.queue_pair(&ticket).map(|pair| pair.expect("created"))
        });
        let buffer = DmaBuffer::allocate("data", 64 << 10, Pages::Small).expect("memory");
        let data = MappedBuffer::new(driver.space(), buffer).expect("room");
        Self { driver, pair, data }
    }

    fn run(&mut self, commands: u64) {
        let Self { driver, pair, data } = self;
        let pair = std::cell::RefCell::new(pair);
        run(
            commands,
            64,
            data.buffer(),
            |now, entry, piece| {
                let mut pair = pair.borrow_mut();
                pair.submit(now, entry, &[piece], 7).map(|()| pair.commit())
            },
            |now, done| {
                let _progress = driver.poll(now);
                pair.borrow_mut().poll_with(now, done);
            },
        );
    }
}

#[test]
fn commands_by_vfio_user_allocate_nothing() {
    for bar0 in [Bar0Map::Doorbells, Bar0Map::Whole, Bar0Map::None] {
        let mut subsystem = subsystem();
        let slot = Slot::without_lines(AddressSpace::default(), VECTORS).expect("a slot");
        slot.point_at(&subsystem.plug(2).expect("a controller"));
        let config = VfioUserConfig { bar0, ..VfioUserConfig::default() };
        let mut server = VfioUserServer::new(slot, config, Box::new(NoMigration));
        let (ours, theirs) = UnixSocket::pair().expect("a pair");
        server.attach(Box::new(theirs)).expect("attached");
        let served = Served::by(move |now| server.poll(now).work + subsystem.poll(now).work);
        let mut guest = Guest::attach(ours);
        guest.run(WARM_UP);
        let counted = served.count(|| guest.run(COMMANDS));
        assert_eq!(counted, 0, "allocations with {bar0:?}");
    }
    // The counter counts.
    assert_eq!(allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1u64)))).count_total, 1);
}

struct Seeded(fastrand::Rng);

impl SecureRandom for Seeded {
    fn fill(&mut self, into: &mut [u8]) {
        self.0.fill(into);
    }
}

fn random(seed: u64) -> Box<dyn SecureRandom> {
    Box::new(Seeded(fastrand::Rng::with_seed(seed)))
}

fn target(subsystem: &Subsystem) -> Target {
    let slot = Slot::without_lines(AddressSpace::default(), 1).expect("a slot");
    slot.point_at(&subsystem.plug(2).expect("a controller"));
    let exported = ExportedSubsystem {
        nqn: NQN.into(),
        serial: String::new(),
        allowed_hosts: vec![HostAccess { nqn: HOST.into(), secret: None, controller_secret: None }],
        allow_any_host: false,
        digests: DigestPolicy::AsAsked,
        controllers: vec![(2, slot)],
        ana_groups: Vec::new(),
    };
    let config = TargetConfig {
        subsystems: vec![exported],
        discovery: false,
        limits: Limits::default(),
        dh_groups: Vec::new(),
        random: random(5),
    };
    Target::new(config).expect("a target")
}

/// A host by NVMe/TCP.
struct Near {
    initiator: TcpInitiator,
    queue: TcpQueue,
    data: DmaBuffer,
}

impl Near {
    fn attach(admin: UnixSocket, io: UnixSocket, digests: Digests) -> Self {
        let config = TcpConfig { digests, ..TcpConfig::new(HOST, [3; 16], NQN) };
        let mut initiator = TcpInitiator::connect(now(), config, Box::new(admin), random(9)).expect("a configuration");
        until("connected", |now| {
            let _progress = initiator.poll(now);
            (*initiator.state() != TcpState::Connecting).then_some(())
        });
        let ticket = initiator.open_queue(now(), Box::new(io), 32).expect("a queue");
        let queue = until("a queue", |now| {
            let _progress = initiator.poll(now);
            initiator.take_queue(ticket)
        });
        let data = DmaBuffer::allocate("data", 256 << 10, Pages::Small).expect("memory");
        Self { initiator, queue: queue.expect("the queue opens"), data }
    }

    fn run(&mut self, commands: u64) {
        let Self { initiator, queue, data } = self;
        let queue = std::cell::RefCell::new(queue);
        run(
            commands,
            // From data in the capsule to several R2Ts.
            400,
            data,
            |now, entry, piece| {
                let mut queue = queue.borrow_mut();
                queue.submit(now, entry, &[piece], 7).map(|()| queue.commit())
            },
            |now, done| {
                let _progress = initiator.poll(now);
                queue.borrow_mut().poll(now, done);
            },
        );
    }
}

#[test]
fn commands_by_nvme_tcp_allocate_nothing() {
    for digests in [Digests::new(), Digests::new().with_header(true).with_data(true)] {
        let mut subsystem = subsystem();
        let mut target = target(&subsystem);
        // Connections are timed from the last poll on.
        let _progress = target.poll(now());
        let mut ends = (0..2).map(|_| {
            let (ours, theirs) = UnixSocket::pair().expect("a pair");
            let theirs: Box<dyn Stream> = Box::new(theirs);
            target.accept(theirs, SocketAddr::from(([127, 0, 0, 1], 4420)));
            ours
        });
        let (admin, io) = (ends.next().expect("one"), ends.next().expect("another"));
        drop(ends);
        let served = Served::by(move |now| target.poll(now).work + subsystem.poll(now).work);
        let mut near = Near::attach(admin, io, digests);
        near.run(WARM_UP);
        let mut own = 0;
        let counted = served.count(|| own = allocation_counter::measure(|| near.run(COMMANDS)).count_total);
        assert_eq!(counted, 0, "allocations of the target, {digests:?}");
        assert_eq!(own, 0, "allocations of the initiator, {digests:?}");
    }
}
