//! The NVMe/TCP initiator of the driver against the NVMe/TCP target, over socket pairs, with a real subsystem behind it.

use dray_controller::{ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::backing::Backing;
use dray_device::command::{CommandQueue, Completion};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::random::SecureRandom;
use dray_device::slot::{Fence, Slot};
use dray_device::socket::{Stream, UnixSocket};
use dray_device::space::AddressSpace;
use dray_driver::AdminData;
use dray_driver::nvme_tcp::{DiscoveryReader, TcpConfig, TcpError, TcpInitiator, TcpQueue, TcpState};
use dray_export::nvme_tcp::{AnaGroupConfig, ExportedSubsystem, HostAccess, Limits, Target, TargetConfig};
use dray_nvme::auth::{AuthFailure, DhGroup, Hash, Reason, Secret};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IdentifyNamespace};
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::status;
use dray_nvme::tcp::pdu::Digests;
use dray_nvme::tcp::{AnaState, DISCOVERY_NQN, nqn};
use std::net::SocketAddr;
use zerocopy::FromBytes;

const NQN: &str = "nqn.2026-01.io.dray:far";
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:near";
const BLOCK: usize = 512;
const BLOCKS: u64 = 8192;

struct Seeded(fastrand::Rng);

impl SecureRandom for Seeded {
    fn fill(&mut self, into: &mut [u8]) {
        self.0.fill(into);
    }
}

fn random(seed: u64) -> Box<dyn SecureRandom> {
    Box::new(Seeded(fastrand::Rng::with_seed(seed)))
}

/// The far machine, and time.
struct Far {
    subsystem: Subsystem,
    target: Target,
    now: Time,
}

impl Far {
    fn new(limits: Limits, hosts: Vec<HostAccess>) -> Self {
        let controller = |index: u16| ControllerConfig {
            cntlid: index + 1,
            role: ControllerRole::Migratable,
            namespaces: vec![1],
            io_queues: 4,
            vectors: 1,
            fence: Fence::default(),
        };
        let config = SubsystemConfig { controllers: vec![controller(0), controller(1)], ..SubsystemConfig::default() };
        let namespace = NamespaceConfig {
            nsid: 1,
            nguid: [1; 16],
            eui64: [0; 8],
            uuid: [7; 16],
            shared: true,
            write_protected: false,
        };
        let backing: Box<dyn Backing> = Box::new(MemoryBacking::new(BLOCKS * BLOCK as u64, BLOCK as u32).expect("backing"));
        let subsystem = Subsystem::new(config, vec![(namespace, backing)]).expect("subsystem");
        let controllers = (1..3).map(|cntlid| {
            let slot = Slot::new(AddressSpace::default(), 1).expect("slot");
            slot.point_at(&subsystem.plug(cntlid).expect("plug"));
            (cntlid + 10, slot)
        });
        let exported = ExportedSubsystem {
            nqn: NQN.into(),
            serial: "FAR".into(),
            allowed_hosts: hosts,
            allow_any_host: false,
            digests: Default::default(),
            controllers: controllers.collect(),
            ana_groups: vec![AnaGroupConfig { id: 1, nsids: vec![1], state: AnaState::OPTIMIZED }],
        };
        let config = TargetConfig {
            subsystems: vec![exported],
            discovery: true,
            limits,
            dh_groups: vec![DhGroup::Ffdhe2048, DhGroup::Null],
            random: random(5),
        };
        let target = Target::new(config).expect("target");
        Self { subsystem, target, now: Time::from_us(1) }
    }

    fn stream(&mut self) -> Box<dyn Stream> {
        let (ours, theirs) = UnixSocket::pair().expect("pair");
        self.target.accept(Box::new(theirs), SocketAddr::from(([127, 0, 0, 1], 4420)));
        Box::new(ours)
    }

    fn poll(&mut self) {
        self.now = self.now.after_us(20);
        let _work = self.target.poll(self.now);
        let _work = self.subsystem.poll(self.now);
    }

    /// Until nobody is connected any more.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.poll();
            if self.target.is_idle() {
                return;
            }
        }
        panic!("{:?}", self.target);
    }

    fn connect(&mut self, config: TcpConfig) -> TcpInitiator {
        let stream = self.stream();
        let mut near = TcpInitiator::connect(self.now, config, stream, random(9)).expect("configuration");
        for _ in 0..100_000 {
            self.poll();
            let _work = near.poll(self.now);
            if *near.state() != TcpState::Connecting {
                break;
            }
        }
        near
    }

    fn open(&mut self, near: &mut TcpInitiator, entries: u16) -> TcpQueue {
        let stream = self.stream();
        let ticket = near.open_queue(self.now, stream, entries).expect("a queue");
        for _ in 0..100_000 {
            self.poll();
            let _work = near.poll(self.now);
            if let Some(queue) = near.take_queue(ticket) {
                return queue.expect("the queue opens");
            }
        }
        panic!("the queue does not open");
    }

    fn run(&mut self, near: &mut TcpInitiator, queue: &mut TcpQueue, wanted: usize) -> Vec<Completion> {
        let mut ended = Vec::new();
        for _ in 0..200_000 {
            queue.commit();
            self.poll();
            let _work = near.poll(self.now);
            queue.poll(self.now, &mut |completion| ended.push(completion));
            if ended.len() >= wanted {
                break;
            }
        }
        assert_eq!(ended.len(), wanted, "{:?} {:?}", queue.fault(), self.target.counters());
        ended
    }
}

fn open_to_all() -> Vec<HostAccess> {
    vec![HostAccess { nqn: HOST.into(), secret: None, controller_secret: None }]
}

fn config() -> TcpConfig {
    TcpConfig::new(HOST, [3; 16], NQN)
}

fn memory(bytes: usize) -> DmaBuffer {
    DmaBuffer::allocate("initiator", bytes, Pages::Small).expect("memory")
}

/// Random writes and reads of all lengths, many at a time, against a model.
fn work(far: &mut Far, near: &mut TcpInitiator, queue: &mut TcpQueue, rounds: u32) {
    const PLACES: usize = 8;
    let most = queue.limits().max_transfer.min(256 << 10);
    let (from, to) = (memory(PLACES * most), memory(PLACES * most));
    let mut rng = fastrand::Rng::with_seed(u64::from(rounds));
    let mut model = vec![0u8; BLOCKS as usize * BLOCK];
    for _ in 0..rounds {
        let share = BLOCKS as usize / PLACES;
        let pieces: Vec<(usize, usize)> = (0..PLACES)
            .map(|place| {
                let blocks = rng.usize(1..=most.min(share * BLOCK) / BLOCK);
                (place * share + rng.usize(0..=share - blocks), blocks)
            })
            .collect();
        for (place, (slba, blocks)) in pieces.iter().enumerate() {
            let range = slba * BLOCK..(slba + blocks) * BLOCK;
            model[range.clone()].iter_mut().for_each(|byte| *byte = rng.u8(..));
            let data = from.part(place * most, range.len()).expect("a part");
            data.write(&model[range]);
            let entry = SubmissionEntry::write(1, *slba as u64, *blocks as u32);
            queue.submit(far.now, &entry, &[data], place as u64).expect("room");
        }
        assert!(far.run(near, queue, PLACES).iter().all(|completion| !completion.status.is_error() && !completion.unknown));
        for (place, (slba, blocks)) in pieces.iter().enumerate() {
            let data = to.part(place * most, blocks * BLOCK).expect("a part");
            let entry = SubmissionEntry::read(1, *slba as u64, *blocks as u32);
            queue.submit(far.now, &entry, &[data], place as u64).expect("room");
        }
        assert!(far.run(near, queue, PLACES).iter().all(|completion| !completion.status.is_error() && !completion.unknown));
        for (place, (slba, blocks)) in pieces.iter().enumerate() {
            let mut bytes = vec![0; blocks * BLOCK];
            to.part(place * most, bytes.len()).expect("a part").read(&mut bytes);
            assert!(bytes == model[slba * BLOCK..(slba + blocks) * BLOCK], "{blocks} blocks at {slba}");
        }
    }
}

#[test]
fn a_remote_namespace_is_written_and_read() {
    for (header, data) in [(false, false), (true, true)] {
        let mut far = Far::new(Limits::default(), open_to_all());
        let digests = Digests::new().with_header(header).with_data(data);
        let mut near = far.connect(TcpConfig { digests, ..config() });
        assert_eq!(*near.state(), TcpState::Ready);
        let entry = SubmissionEntry::identify(Cns::NAMESPACE, 1, 0, CommandSetId::default());
        let ticket = near.request(far.now, &entry, AdminData::In(4096)).expect("room");
        let mut queue = far.open(&mut near, 64);
        let answer = near.answer(ticket).expect("an answer");
        let namespace = IdentifyNamespace::read_from_bytes(&answer.data).expect("the page");
        assert_eq!(namespace.nsze, BLOCKS);
        work(&mut far, &mut near, &mut queue, 30);
        let zeroes = SubmissionEntry::write_zeroes(1, 0, 16, false);
        queue.submit(far.now, &zeroes, &[], 1).expect("room");
        queue.submit(far.now, &SubmissionEntry::flush(1), &[], 2).expect("room");
        assert!(far.run(&mut near, &mut queue, 2).iter().all(|completion| !completion.status.is_error()));
        let buffer = memory(8192);
        buffer.segment().write(&[1; 8192]);
        queue.submit(far.now, &SubmissionEntry::read(1, 0, 16), &[buffer.segment()], 3).expect("room");
        far.run(&mut near, &mut queue, 1);
        let mut bytes = vec![9; 8192];
        buffer.segment().read(&mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0));
        let behind = SubmissionEntry::read(1, BLOCKS, 1);
        let data = buffer.part(0, BLOCK).expect("a part");
        queue.submit(far.now, &behind, &[data], 4).expect("room");
        assert!(far.run(&mut near, &mut queue, 1)[0].status.is(Status::LBA_OUT_OF_RANGE));
        drop(queue);
    }
}

#[test]
fn small_limits_at_the_target_are_kept() {
    let limits = Limits {
        in_capsule_bytes: 0,
        max_h2c_bytes: 4096,
        max_transfer_bytes: 64 << 10,
        pool_bytes: 128 << 10,
        queue_entries: 32,
        ..Limits::default()
    };
    let mut far = Far::new(limits, open_to_all());
    let mut near = far.connect(config());
    assert_eq!(*near.state(), TcpState::Ready);
    let mut queue = far.open(&mut near, 1024);
    assert!(queue.limits().depth < 32 && queue.limits().max_transfer <= 64 << 10, "{:?}", queue.limits());
    work(&mut far, &mut near, &mut queue, 10);
}

#[test]
fn both_ends_authenticate() {
    let secret = Secret::new(Some(Hash::Sha384), &[0x5A; 48]).expect("a secret");
    let of_target = Secret::new(Some(Hash::Sha256), &[0xA5; 32]).expect("a secret");
    let hosts = vec![HostAccess {
        nqn: HOST.into(),
        secret: Some(secret.clone()),
        controller_secret: Some(of_target.clone()),
    }];
    let mut far = Far::new(Limits::default(), hosts);
    let right = TcpConfig { secret: Some(secret), controller_secret: Some(of_target.clone()), ..config() };
    let mut near = far.connect(right.clone());
    assert_eq!(*near.state(), TcpState::Ready);
    let mut queue = far.open(&mut near, 16);
    work(&mut far, &mut near, &mut queue, 3);
    drop((near, queue));
    far.settle();
    let near = far.connect(TcpConfig { secret: Some(of_target), ..right.clone() });
    let expected = TcpError::Authentication(AuthFailure::Peer(Reason::FAILED));
    assert_eq!(*near.state(), TcpState::Failed(expected));
    far.settle();
    let other = Secret::new(None, &[1; 32]).expect("a secret");
    let near = far.connect(TcpConfig { controller_secret: Some(other), ..right });
    let expected = TcpError::Authentication(AuthFailure::Own(Reason::FAILED));
    assert_eq!(*near.state(), TcpState::Failed(expected));
    far.settle();
    let near = far.connect(config());
    assert_eq!(*near.state(), TcpState::Failed(TcpError::SecretNeeded));
    assert_eq!(far.target.counters().authentication_failures, 2);
}

#[test]
fn a_host_that_is_not_allowed_is_refused() {
    let mut far = Far::new(Limits::default(), open_to_all());
    let near = far.connect(TcpConfig { host_nqn: "nqn.2026-01.example:other".into(), ..config() });
    let TcpState::Failed(TcpError::Refused { command: "Connect", status: refused }) = near.state() else {
        panic!("{:?}", near.state())
    };
    assert!(refused.is(status::INVALID_HOST), "{refused}");
}

#[test]
fn what_is_exported_is_discovered() {
    let mut far = Far::new(Limits::default(), open_to_all());
    let mut near = far.connect(TcpConfig { subsystem_nqn: DISCOVERY_NQN.into(), ..config() });
    assert_eq!(*near.state(), TcpState::Ready);
    let mut reader = DiscoveryReader::new();
    let entries = (0..1000).find_map(|_| {
        far.poll();
        let _work = near.poll(far.now);
        reader.poll(far.now, &mut near)
    });
    let entries = entries.expect("an end").expect("entries");
    assert!(entries.iter().any(|entry| nqn(&entry.subnqn) == Some(NQN)), "{entries:?}");
}

#[test]
fn an_association_that_was_shut_down_can_be_made_anew() {
    let mut far = Far::new(Limits::default(), open_to_all());
    for round in 0..5 {
        let mut near = far.connect(config());
        assert_eq!(*near.state(), TcpState::Ready, "round {round}");
        let mut queue = far.open(&mut near, 16);
        work(&mut far, &mut near, &mut queue, 1);
        if round % 2 == 0 {
            near.shutdown(far.now);
        } else {
            near.disconnect(far.now);
        }
        for _ in 0..1000 {
            far.poll();
            let _work = near.poll(far.now);
            queue.poll(far.now, &mut |_| ());
        }
        assert_eq!(*near.state(), TcpState::Failed(TcpError::Stopped));
        assert!(queue.is_dead());
        drop((near, queue));
        far.settle();
    }
}

#[test]
fn commands_of_a_target_that_goes_come_back_unknown() {
    let mut far = Far::new(Limits::default(), open_to_all());
    let mut near = far.connect(config());
    let mut queue = far.open(&mut near, 16);
    let buffer = memory(64 << 10);
    for tag in 0..10 {
        queue.submit(far.now, &SubmissionEntry::write(1, tag * 128, 128), &[buffer.segment()], tag).expect("room");
    }
    queue.commit();
    let Far { target, now, .. } = far;
    drop(target);
    let mut tags = Vec::new();
    for _ in 0..10 {
        let _work = near.poll(now);
        queue.poll(now, &mut |completion| {
            assert!(completion.unknown);
            tags.push(completion.tag);
        });
    }
    tags.sort_unstable();
    assert_eq!(tags, (0..10).collect::<Vec<_>>());
    assert!(matches!(near.state(), TcpState::Failed(TcpError::Connection { .. })));
}
