//! The real driver against the real controller, with the socket in between.

use crate::rig::{CONTROLLER, slot, subsystem};
use dray_controller::Subsystem;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::slot::Slot;
use dray_device::socket::UnixSocket;
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_device::vfio_user::client::{ClientConfig, VfioUserClient};
use dray_driver::{Driver, DriverConfig, DriverState, QueuePair, QueuePairConfig};
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::{Bar0Map, VfioUserConfig, VfioUserCounters, VfioUserServer};
use dray_nvme::command::SubmissionEntry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BYTES: usize = 64 << 10;

/// A server and its controller, polled by a thread of their own.
struct Backend {
    clients: Sender<UnixSocket>,
    stop: Arc<AtomicBool>,
    slot: Slot,
    thread: Option<JoinHandle<VfioUserCounters>>,
}

impl Backend {
    fn new(bar0: Bar0Map) -> Self {
        let (subsystem, slot) = (subsystem(), slot());
        slot.point_at(&subsystem.plug(CONTROLLER).expect("plug"));
        let config = VfioUserConfig { bar0, ..VfioUserConfig::default() };
        let server = VfioUserServer::new(slot.clone(), config, Box::new(NoMigration));
        let (clients, coming) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = Some(std::thread::spawn(move || serve(server, subsystem, &coming, &until)));
        Self { clients, stop, slot, thread }
    }

    fn connect(&self) -> Arc<VfioUserClient> {
        let (ours, theirs) = UnixSocket::pair().expect("pair");
        self.clients.send(theirs).expect("served");
        VfioUserClient::connect(Box::new(ours), AddressSpace::default(), &ClientConfig::default()).expect("connected")
    }

    fn end(mut self) -> VfioUserCounters {
        self.stop.store(true, Ordering::Release);
        self.thread.take().expect("once").join().expect("the server lives")
    }
}

fn serve(
    mut server: VfioUserServer,
    mut subsystem: Subsystem,
    coming: &Receiver<UnixSocket>,
    until: &AtomicBool,
) -> VfioUserCounters {
    let start = Instant::now();
    while !until.load(Ordering::Acquire) {
        let now = Time(start.elapsed().as_nanos() as u64);
        if let Ok(stream) = coming.try_recv() {
            server.attach(Box::new(stream)).expect("attached");
        }
        let work = server.poll(now).work + subsystem.poll(now).work;
        if work == 0 {
            std::thread::yield_now();
        }
    }
    server.counters()
}

struct Host {
    client: Arc<VfioUserClient>,
    driver: Driver,
    start: Instant,
}

impl Host {
    fn new(backend: &Backend) -> Self {
        Self::with(backend, DriverConfig::default())
    }

    fn with(backend: &Backend, config: DriverConfig) -> Self {
        let client = backend.connect();
        let driver = Driver::new(Arc::<VfioUserClient>::clone(&client), config).expect("driver");
        let mut host = Self { client, driver, start: Instant::now() };
        host.until("ready", |host, now| {
            let _progress = host.driver.poll(now);
            assert!(!matches!(host.driver.state(), DriverState::Failed(_)), "{:?}", host.driver.last_failure());
            host.driver.is_ready().then_some(())
        });
        host
    }

    fn until<T>(&mut self, what: &str, mut step: impl FnMut(&mut Self, Time) -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            let now = Time(self.start.elapsed().as_nanos() as u64);
            if let Some(result) = step(self, now) {
                return result;
            }
            std::thread::yield_now();
        }
        panic!("not {what} in time");
    }

    fn pair(&mut self, vector: Option<u16>) -> QueuePair {
        let ticket = self.driver.create_queue_pair(Time(0), QueuePairConfig { entries: 32, vector }).expect("asked");
        self.until("a queue pair", |host, now| {
            let _progress = host.driver.poll(now);
            host.driver.queue_pair(&ticket).map(|pair| pair.expect("created"))
        })
    }

    fn run(&mut self, pair: &mut QueuePair, entry: &SubmissionEntry, memory: &MappedBuffer) {
        pair.submit(Time(0), entry, &[memory.buffer().segment()], 7).expect("room");
        pair.commit();
        self.until("completed", |_, now| {
            let mut done = None;
            pair.poll_with(now, |completion| done = Some(completion));
            done.map(|completion| assert!(!completion.status.is_error() && !completion.unknown, "{completion:?}"))
        });
    }

    fn memory(&self, seed: u8) -> MappedBuffer {
        let buffer = DmaBuffer::allocate("data", BYTES, Pages::Small).expect("memory");
        let bytes: Vec<u8> = (0..BYTES).map(|i| (i / 512) as u8 ^ i as u8 ^ seed).collect();
        buffer.segment().write(&bytes);
        MappedBuffer::new(self.driver.space(), buffer).expect("mapped")
    }
}

fn same(left: &MappedBuffer, right: &MappedBuffer) -> bool {
    dray_device::memory::Arena::equal(left.arena(), 0, right.arena(), 0, BYTES)
}

fn blocks(slba: u64, write: bool) -> SubmissionEntry {
    let count = (BYTES / 512) as u32;
    if write { SubmissionEntry::write(1, slba, count) } else { SubmissionEntry::read(1, slba, count) }
}

#[test]
fn a_driver_drives_the_controller_whatever_of_bar0_it_may_map() {
    for bar0 in [Bar0Map::Doorbells, Bar0Map::Whole, Bar0Map::None] {
        let backend = Backend::new(bar0);
        let mut host = Host::new(&backend);
        let mut pair = host.pair(Some(1));
        let (written, read) = (host.memory(1), host.memory(2));
        for round in 0..16 {
            host.run(&mut pair, &blocks(round * 128, true), &written);
            host.run(&mut pair, &blocks(round * 128, false), &read);
            assert!(same(&written, &read));
        }
        let line = pair.event_line().expect("a line").clone();
        assert!(line.take() > 0, "interrupts arrive");
        drop((written, read));
        assert_eq!(host.client.refusals(), 0);
        drop((pair, host));
        let counters = backend.end();
        assert_eq!((counters.refused, counters.broken_protocol), (0, 0), "{counters:?}");
        assert!(counters.maps > 3 && counters.unmaps >= 2, "{counters:?}");
    }
}

#[test]
fn what_one_client_wrote_the_next_one_reads() {
    let backend = Backend::new(Bar0Map::Doorbells);
    let mut host = Host::new(&backend);
    let mut pair = host.pair(None);
    let written = host.memory(3);
    host.run(&mut pair, &blocks(0, true), &written);
    // It dies with commands under way and its controller enabled.
    for tag in 0..20 {
        pair.submit(Time(0), &blocks(1024 + tag * 128, true), &[written.buffer().segment()], tag).expect("room");
    }
    pair.commit();
    drop((pair, host));
    let mut next = Host::new(&backend);
    let mut pair = next.pair(Some(2));
    let read = next.memory(4);
    next.run(&mut pair, &blocks(0, false), &read);
    assert!(same(&written, &read));
    assert!(!backend.slot.is_gone());
    drop((pair, next));
    let counters = backend.end();
    assert_eq!((counters.clients, counters.broken_protocol), (2, 0), "{counters:?}");
}

/// Requests that so many commands in a row cost, and the number of commands.
fn requests(bar0: Bar0Map, shadow_doorbells: bool) -> (u64, u64) {
    let backend = Backend::new(bar0);
    let mut host = Host::with(&backend, DriverConfig { shadow_doorbells, ..DriverConfig::default() });
    assert_eq!(host.driver.has_shadow_doorbells(), shadow_doorbells && bar0 == Bar0Map::None);
    let mut pair = host.pair(Some(1));
    let (written, read) = (host.memory(1), host.memory(2));
    let rounds = 200;
    for round in 0..rounds {
        let slba = round % 64 * 128;
        host.run(&mut pair, &blocks(slba, true), &written);
        host.run(&mut pair, &blocks(slba, false), &read);
        assert!(same(&written, &read));
        if round % 64 == 7 {
            // Idle for long: the controller asks for the register again.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    // After a reset everything is set up anew.
    drop(pair);
    host.driver.reset(Time(host.start.elapsed().as_nanos() as u64));
    host.until("ready again", |host, now| {
        let _progress = host.driver.poll(now);
        host.driver.is_ready().then_some(())
    });
    assert_eq!(host.driver.has_shadow_doorbells(), shadow_doorbells && bar0 == Bar0Map::None);
    let mut pair = host.pair(None);
    host.run(&mut pair, &blocks(0, false), &read);
    drop((pair, host));
    let counters = backend.end();
    assert_eq!((counters.broken_protocol, counters.refused), (0, 0), "{counters:?}");
    (counters.requests, 2 * rounds)
}

#[test]
fn shadow_doorbells_save_most_messages_where_doorbells_are_trapped() {
    let (with, commands) = requests(Bar0Map::None, true);
    let (without, _) = requests(Bar0Map::None, false);
    requests(Bar0Map::Doorbells, true);
    assert!(without >= 2 * commands, "{without} requests for {commands} commands");
    assert!(with + commands < without, "{with} requests with shadow doorbells, {without} without");
}
