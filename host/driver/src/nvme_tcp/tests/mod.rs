//! The initiator against a scripted target, and a connection against PDUs that no target may send.

mod hostile;
mod target;

use super::*;
use crate::admin::AdminData;
use dray_device::command::{CommandQueue, Completion};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::random::SecureRandom;
use dray_nvme::auth::{AuthFailure, ControllerAuthConfig, Reason};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use target::{BLOCK, Target, Traits};

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:a-host";
const SUBSYSTEM: &str = "nqn.2026-01.example:a-subsystem";

struct Counting(u8);

impl SecureRandom for Counting {
    fn fill(&mut self, into: &mut [u8]) {
        self.0 = self.0.wrapping_add(1);
        into.fill(self.0);
    }
}

fn config(traits: &Traits) -> TcpConfig {
    TcpConfig { digests: traits.digests, ..TcpConfig::new(HOST, [3; 16], SUBSYSTEM) }
}

/// An initiator, its targets (one a connection), and time.
struct Bench {
    initiator: TcpInitiator,
    targets: Vec<Target>,
    traits: Traits,
    now: Time,
}

impl Bench {
    fn new(traits: Traits, config: TcpConfig) -> Self {
        let (target, stream) = Target::new(traits.clone());
        let initiator =
            TcpInitiator::connect(Time(0), config, stream, Box::new(Counting(0))).expect("the configuration is right");
        Self { initiator, targets: vec![target], traits, now: Time(0) }
    }

    fn step(&mut self) {
        self.now = self.now.after_us(200);
        let _progress = self.initiator.poll(self.now);
        self.targets.iter_mut().for_each(Target::poll);
    }

    fn settle(&mut self) -> TcpState {
        for _ in 0..2000 {
            self.step();
            if *self.initiator.state() != TcpState::Connecting {
                break;
            }
        }
        self.initiator.state().clone()
    }

    fn ready(traits: Traits) -> Self {
        let mut bench = Self::new(traits.clone(), config(&traits));
        assert_eq!(bench.settle(), TcpState::Ready);
        bench
    }

    fn open(&mut self, entries: u16) -> Result<TcpQueue, TcpError> {
        let (target, stream) = Target::new(self.traits.clone());
        self.targets.push(target);
        let ticket = self.initiator.open_queue(self.now, stream, entries)?;
        for _ in 0..2000 {
            self.step();
            if let Some(queue) = self.initiator.take_queue(ticket) {
                return queue;
            }
        }
        panic!("the queue does not open");
    }

    fn run(&mut self, queue: &mut TcpQueue, wanted: usize) -> Vec<Completion> {
        let mut ended = Vec::new();
        for _ in 0..5000 {
            self.step();
            queue.commit();
            queue.poll(self.now, &mut |completion| ended.push(completion));
            if ended.len() >= wanted {
                break;
            }
        }
        assert_eq!(ended.len(), wanted);
        ended
    }
}

fn memory(bytes: usize) -> DmaBuffer {
    DmaBuffer::allocate("test", bytes, Pages::Small).expect("memory")
}

fn bytes_of(buffer: &DmaBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.segment().read(&mut bytes);
    bytes
}

/// Writes `len` bytes in odd pieces, reads them back into others.
fn write_and_read(bench: &mut Bench, queue: &mut TcpQueue, len: usize) {
    let (from, to) = (memory(len), memory(len));
    let pattern: Vec<u8> = (0..len).map(|at| (at / 7) as u8 ^ (at >> 9) as u8).collect();
    from.segment().write(&pattern);
    let blocks = (len / BLOCK) as u32;
    // In order, but not in one piece: the second comes from another place than where the first ends.
    let cut = len / 2 / 4 * 4;
    let pieces = [from.part(0, cut).expect("a part"), from.part(cut, len - cut).expect("a part")];
    queue.submit(bench.now, &SubmissionEntry::write(1, 4, blocks), &pieces, 11).expect("room");
    assert_eq!(bench.run(queue, 1), [Completion { tag: 11, status: Status::SUCCESS, result: 0, unknown: false }]);
    let at = bench.targets.len() - 1;
    assert!(bench.targets[at].media[4 * BLOCK..4 * BLOCK + len] == pattern[..], "what was written");
    let cut = len / 3 / 4 * 4;
    let pieces = [to.part(cut, len - cut).expect("a part"), to.part(0, cut).expect("a part")];
    queue.submit(bench.now, &SubmissionEntry::read(1, 4, blocks), &pieces, 12).expect("room");
    assert!(!bench.run(queue, 1)[0].status.is_error());
    let (read, mut expected) = (bytes_of(&to), pattern.clone());
    expected.rotate_right(cut);
    assert!(read == expected, "what was read");
}

#[test]
fn data_goes_both_ways() {
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        for (success_flag, cpda) in [(true, 0), (false, 7), (true, 31)] {
            let digests = Digests::new().with_header(header).with_data(data);
            let traits = Traits { digests, success_flag, cpda, ..Traits::default() };
            let mut bench = Bench::ready(traits);
            assert_eq!((bench.initiator.cntlid(), bench.initiator.queues_granted()), (7, 2));
            let mut queue = bench.open(32).expect("a queue");
            assert_eq!(queue.limits().depth, 31);
            // In the capsule; by one R2T; by many, in many PDUs.
            for len in [512, 4096, 4608, 1 << 20] {
                write_and_read(&mut bench, &mut queue, len);
            }
            let last = bench.targets.last_mut().expect("a target");
            assert!(last.seen.contains(&6), "H2CData was used");
        }
    }
}

#[test]
fn many_commands_are_outstanding_at_once() {
    let mut bench = Bench::ready(Traits::default());
    let mut queue = bench.open(64).expect("a queue");
    let buffer = memory(63 * 8192);
    for round in 0..20 {
        for at in 0..63u64 {
            let data = buffer.part(at as usize * 8192, 8192).expect("a part");
            data.write(&[at as u8 + round; 8192]);
            let entry = SubmissionEntry::write(1, at * 16, 16);
            queue.submit(bench.now, &entry, &[data], at).expect("room");
        }
        assert_eq!(queue.submit(bench.now, &SubmissionEntry::flush(1), &[], 0), Err(dray_device::command::SubmitError::Full));
        let mut tags: Vec<u64> = bench.run(&mut queue, 63).into_iter().map(|completion| completion.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..63).collect::<Vec<_>>());
    }
    assert!(bench.targets[1].media[..63 * 8192].chunks(8192).enumerate().all(|(at, piece)| piece == [at as u8 + 19; 8192]));
}

#[test]
fn errors_come_back_as_they_are() {
    let mut bench = Bench::ready(Traits::default());
    let mut queue = bench.open(8).expect("a queue");
    let buffer = memory(4096);
    queue.submit(bench.now, &SubmissionEntry::read(1, 1 << 40, 8), &[buffer.segment()], 1).expect("room");
    let ended = bench.run(&mut queue, 1);
    assert_eq!((ended[0].status, ended[0].unknown), (Status::LBA_OUT_OF_RANGE.with_dnr(), false));
    assert!(queue.fault().is_none());
    let long = memory(2 << 20);
    let submitted = queue.submit(bench.now, &SubmissionEntry::read(1, 0, 4096), &[long.segment()], 2);
    assert_eq!(submitted, Err(dray_device::command::SubmitError::BadData));
    let submitted = queue.submit(bench.now, &SubmissionEntry::flush(1), &[buffer.segment()], 2);
    assert_eq!(submitted, Err(dray_device::command::SubmitError::BadData));
}

#[test]
fn a_lost_connection_makes_outcomes_unknown_and_ends_the_association() {
    let mut bench = Bench::ready(Traits::default());
    let mut first = bench.open(8).expect("a queue");
    let mut second = bench.open(8).expect("a queue");
    assert!(matches!(bench.open(8), Err(TcpError::NoQueue(_))), "two were granted");
    bench.targets.pop();
    let buffer = memory(8192);
    bench.targets[1].silent = true;
    bench.targets[2].silent = true;
    for tag in [1, 2] {
        let data = buffer.part(0, 4096 * tag as usize).expect("a part");
        first.submit(bench.now, &SubmissionEntry::write(1, 0, 8 * tag as u32), &[data], tag).expect("room");
        second.submit(bench.now, &SubmissionEntry::flush(1), &[], tag).expect("room");
    }
    first.commit();
    second.commit();
    bench.step();
    assert_eq!((first.outstanding(), second.outstanding()), (2, 2));
    bench.targets.remove(1);
    let ended = bench.run(&mut first, 2);
    assert!(ended.iter().all(|completion| completion.unknown) && ended[0].tag != ended[1].tag);
    assert_eq!(first.fault(), Some(TcpFault::Closed));
    assert!(bench.run(&mut second, 2).iter().all(|completion| completion.unknown));
    assert_eq!(second.fault(), Some(TcpFault::AssociationLost));
    bench.step();
    let lost = TcpError::Connection { qid: 0, fault: TcpFault::AssociationLost };
    assert_eq!(*bench.initiator.state(), TcpState::Failed(lost));
    assert!(bench.initiator.quiet_at().expect("it has a keep alive") > bench.now.after_ms(20_000));
    let submitted = first.submit(bench.now, &SubmissionEntry::flush(1), &[], 9);
    assert_eq!((submitted, first.free()), (Err(dray_device::command::SubmitError::Dead), 0));
}

#[test]
fn a_command_that_is_not_answered_ends_the_association() {
    let mut bench = Bench::ready(Traits::default());
    let mut queue = bench.open(8).expect("a queue");
    bench.targets[1].silent = true;
    queue.submit(bench.now, &SubmissionEntry::flush(1), &[], 5).expect("room");
    queue.commit();
    bench.now = bench.now.after_ms(29_000);
    assert_eq!(queue.poll(bench.now, &mut |_| panic!("not yet")), 0);
    bench.now = bench.now.after_ms(2_000);
    let mut ended = Vec::new();
    queue.poll(bench.now, &mut |completion| ended.push(completion));
    assert!(ended.len() == 1 && ended[0].unknown && ended[0].tag == 5);
    assert!(matches!(queue.fault(), Some(TcpFault::TimedOut { .. })));
}

#[test]
fn it_keeps_alive_and_notices_when_nobody_answers() {
    let mut bench = Bench::ready(Traits::default());
    for _ in 0..4 {
        bench.now = bench.now.after_ms(7_600);
        bench.step();
        bench.step();
    }
    assert_eq!(bench.targets[0].keep_alives, 4);
    assert!(bench.initiator.is_ready());
    bench.targets[0].silent = true;
    for _ in 0..5 {
        bench.now = bench.now.after_ms(7_600);
        bench.step();
    }
    let state = bench.initiator.state().clone();
    assert!(matches!(state, TcpState::Failed(TcpError::Connection { fault: TcpFault::TimedOut { .. }, .. })), "{state:?}");
}

#[test]
fn requests_and_shutdown() {
    let mut bench = Bench::ready(Traits::default());
    let entry = SubmissionEntry::identify(dray_nvme::identify::Cns::CONTROLLER, 0, 0, Default::default());
    let ticket = bench.initiator.request(bench.now, &entry, AdminData::In(4096)).expect("room");
    assert!(bench.initiator.answer(ticket).is_none());
    bench.step();
    bench.step();
    let answer = bench.initiator.answer(ticket).expect("an answer");
    assert_eq!((answer.completion.status, answer.data.len(), answer.data[78]), (Status::SUCCESS, 4096, 7));
    bench.initiator.shutdown(bench.now);
    for _ in 0..50 {
        bench.step();
    }
    assert_eq!(*bench.initiator.state(), TcpState::Failed(TcpError::Stopped));
    assert!(bench.targets[0].closed);
}

#[test]
fn a_silent_or_disagreeing_target_is_given_up() {
    let traits = Traits::default();
    let mut bench = Bench::new(traits.clone(), config(&traits));
    bench.now = bench.now.after_ms(10_001);
    let _progress = bench.initiator.poll(bench.now);
    assert_eq!(*bench.initiator.state(), TcpState::Failed(TcpError::TimedOut("the connection")));
    // Digests were asked for and are not given.
    let without = Traits { digests: Digests::new(), ..traits.clone() };
    let mut bench = Bench::new(without, config(&traits));
    let fault = TcpFault::Parameters { offset: 11 };
    assert_eq!(bench.settle(), TcpState::Failed(TcpError::Connection { qid: 0, fault }));
}

fn with_auth(both: bool) -> (Traits, TcpConfig) {
    let host = Secret::new(Some(Hash::Sha256), &[0x5A; 32]).expect("a secret");
    let controller = both.then(|| Secret::new(None, &[0xA5; 48]).expect("a secret"));
    let auth = ControllerAuthConfig {
        host_nqn: HOST.to_owned(),
        subsystem_nqn: SUBSYSTEM.to_owned(),
        secret: host.clone(),
        controller_secret: controller.clone(),
        hashes: Vec::new(),
        groups: vec![DhGroup::Ffdhe2048],
    };
    let traits = Traits { auth: Some(auth), ..Traits::default() };
    let config = TcpConfig { secret: Some(host), controller_secret: controller, ..config(&traits) };
    (traits, config)
}

#[test]
fn every_connection_authenticates() {
    for both in [false, true] {
        let (traits, config) = with_auth(both);
        let mut bench = Bench::new(traits, config);
        assert_eq!(bench.settle(), TcpState::Ready);
        let mut queue = bench.open(8).expect("a queue");
        write_and_read(&mut bench, &mut queue, 4096);
    }
}

#[test]
fn authentication_that_fails_is_told_apart() {
    let (traits, config) = with_auth(true);
    let other = Secret::new(None, &[1; 32]).expect("a secret");
    let with = |change: &dyn Fn(&mut TcpConfig), traits: &Traits| {
        let mut config = config.clone();
        change(&mut config);
        let mut bench = Bench::new(traits.clone(), config);
        match bench.settle() {
            TcpState::Failed(error) => error,
            state => panic!("{state:?}"),
        }
    };
    let wrong = with(&|config| config.secret = Some(other.clone()), &traits);
    assert_eq!(wrong, TcpError::Authentication(AuthFailure::Peer(Reason::FAILED)));
    let wrong = with(&|config| config.controller_secret = Some(other.clone()), &traits);
    assert_eq!(wrong, TcpError::Authentication(AuthFailure::Own(Reason::FAILED)));
    let none = with(&|config| (config.secret, config.controller_secret) = (None, None), &traits);
    assert_eq!(none, TcpError::SecretNeeded);
    let open = Traits { auth: None, ..traits };
    assert_eq!(with(&|_| (), &open), TcpError::NotAuthenticated);
}

#[test]
fn a_discovery_log_is_read() {
    for count in [0, 1, 40] {
        let traits = Traits { discovery: count, ..Traits::default() };
        let config = TcpConfig { subsystem_nqn: dray_nvme::tcp::DISCOVERY_NQN.to_owned(), ..config(&traits) };
        let mut bench = Bench::new(traits, config);
        assert_eq!(bench.settle(), TcpState::Ready);
        let mut reader = DiscoveryReader::new();
        let entries = (0..100).find_map(|_| {
            bench.step();
            reader.poll(bench.now, &mut bench.initiator)
        });
        let entries = entries.expect("an end").expect("entries");
        assert!(entries.iter().enumerate().all(|(at, entry)| usize::from(entry.portid) == at) && entries.len() == count);
    }
    let traits = Traits { discovery: discovery::MAX_ENTRIES + 1, ..Traits::default() };
    let config = TcpConfig { subsystem_nqn: dray_nvme::tcp::DISCOVERY_NQN.to_owned(), ..config(&traits) };
    let mut bench = Bench::new(traits, config);
    bench.settle();
    let mut reader = DiscoveryReader::new();
    let outcome = (0..100).find_map(|_| {
        bench.step();
        reader.poll(bench.now, &mut bench.initiator)
    });
    assert!(matches!(outcome, Some(Err(TcpError::Unsupported(_)))), "too many entries");
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let (_, config) = with_auth(true);
    let refused = |change: &dyn Fn(&mut TcpConfig)| {
        let mut config = config.clone();
        change(&mut config);
        let (_target, stream) = Target::new(Traits::default());
        let outcome = TcpInitiator::connect(Time(0), config, stream, Box::new(Counting(0)));
        assert!(matches!(outcome, Err(TcpError::BadConfig(_))));
    };
    refused(&|config| config.secret = None);
    refused(&|config| config.host_nqn = "a host".to_owned());
    refused(&|config| config.subsystem_nqn = format!("nqn.{}", "x".repeat(220)));
    assert!(!format!("{config:?}").contains("165"), "secrets are not shown");
}
