//! The NVMe/TCP target before hostile hosts: any PDUs, whole and broken, in any order and over several connections at once,
//! with digests, authentication, R2Ts, resets, hosts that stop reading, streams that end at any byte; a backing that is late,
//! busy or fails, and an operator who changes ANA states.
//!
//! Besides the form of every PDU that the target sends and, for connections that have sent nothing but whole PDUs, one answer
//! for every command and no more data than was asked for ([`crate::peer`]), it asserts that a host on another subsystem is
//! served within a bounded number of polls all the time; that the hostile ones never reach its namespace; that what waits to be
//! sent, connections and associations stay within their limits; that nothing is served before authentication; that every end of
//! a connection has a cause that the peer knows or a counter shows; and that when all hostile hosts have gone, theirs is as
//! good as new for the next.

mod steps;

use crate::input::Input;
use crate::media::{Manner, Media, Meddler};
use crate::pipe::Pipe;
use crate::peer::{Kind, Peer, icreq};
use dray_controller::{ControllerConfig, ControllerRole, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::poll::{Poll, Time};
use dray_device::random::SecureRandom;
use dray_device::slot::{Fence, Slot};
use dray_device::space::AddressSpace;
use dray_export::nvme_tcp::{AnaGroupConfig, Counters, ExportedSubsystem, HostAccess, Limits, Target, TargetConfig};
use dray_nvme::auth::{DhGroup, Secret};
use dray_nvme::command::{SglDescriptor, SubmissionEntry};
use dray_nvme::identify::{Cns, CommandSetId};
use dray_nvme::registers::{Csts, offset};
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::{self, ConnectAttributes};
use dray_nvme::tcp::pdu::Digests;
use dray_nvme::tcp::{AnaState, ConnectData, write_text};
use std::net::SocketAddr;
use zerocopy::IntoBytes;

const HOSTILE: &str = "nqn.2025-01.io.dray:hostile";
const QUIET: &str = "nqn.2025-01.io.dray:quiet";
/// Hosts of the hostile subsystem: without and with a secret. The third is not allowed.
const HOSTS: [&str; 3] = ["nqn.x:open", "nqn.x:secret", "nqn.x:nobody"];
const NEIGHBOUR: &str = "nqn.x:neighbour";
/// CNTLIDs that hosts see.
const CNTLIDS: [u16; 2] = [11, 12];
const NEIGHBOURS_CNTLID: u16 = 21;
const ENABLED: u64 = 0x0046_0001;

const BLOCKS: usize = 200;
const FILL: u8 = 0x3c;
const MOST_STEPS: usize = 150;
const MOST_PEERS: usize = 4;
/// Polls within which whatever is well has to happen.
const PATIENCE: usize = 1500;
/// Polls within which the neighbour's read ends, whatever others do.
const NEIGHBOURS_PATIENCE: usize = 60;
/// Commands of a controller under way at most.
const CONTEXTS: u16 = 16;
/// Bytes that may wait for one connection's client: what the target calls full, and one answer of each kind on top.
const MOST_QUEUED: usize = (64 << 10) + (128 << 10) + (12 << 10);

fn limits() -> Limits {
    Limits {
        connections: MOST_PEERS + 4,
        half_open: 3,
        queue_entries: 32,
        io_queues: 2,
        in_capsule_bytes: 4096,
        max_h2c_bytes: 4096,
        max_transfer_bytes: 16 << 10,
        pool_bytes: 32 << 10,
        ..Limits::default()
    }
}

struct Seeded(fastrand::Rng);

impl SecureRandom for Seeded {
    fn fill(&mut self, into: &mut [u8]) {
        self.0.fill(into);
    }
}

struct World {
    target: Target,
    subsystem: Subsystem,
    /// Namespaces 1 (the hostile hosts') and 2 (the neighbour's).
    media: [Media; 2],
    peers: Vec<Peer>,
    /// The neighbour's admin and I/O queue.
    neighbour: Vec<Peer>,
    secret: Secret,
    now: Time,
    /// C2HTermReqs seen, Connects refused, connections closed for no reason that their peer knows; and such reasons.
    terms: u64,
    refused: u64,
    unexplained: u64,
    /// An admin connection has ended or reset its controller, or a peer may have done so by bytes that nobody looked into.
    associations_ended: bool,
}

/// Runs one session.
///
/// # Panics
/// When a guarantee is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let bits = input.u8();
    let mut world = World::new();
    world.welcome_neighbour();
    if bits & 1 == 0 {
        world.begin(usize::from(bits >> 1 & 1), bits >> 2);
    }
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        world.step(&mut input);
        world.check();
    }
    world.settle();
    world.end();
}

impl World {
    fn new() -> Self {
        let controller = |cntlid: u16| ControllerConfig {
            cntlid,
            role: ControllerRole::Migratable,
            namespaces: vec![if cntlid == 3 { 2 } else { 1 }],
            io_queues: 3,
            vectors: 1,
            fence: Fence::default(),
        };
        let config = SubsystemConfig {
            controllers: (1..=3).map(controller).collect(),
            max_queue_entries: 64,
            mdts: 2,
            contexts: CONTEXTS,
            jobs: 2,
            ..SubsystemConfig::default()
        };
        let meddler = Meddler::default();
        let media = [0, FILL].map(|byte| Media::new(BLOCKS, byte, 3 * usize::from(CONTEXTS), &meddler));
        media[1].rules(|rules| rules.read_only = true);
        let namespace = |nsid: u32| NamespaceConfig {
            nsid,
            nguid: [nsid as u8; 16],
            eui64: [nsid as u8; 8],
            uuid: [nsid as u8; 16],
            shared: nsid == 1,
            write_protected: false,
        };
        let namespaces = media.iter().zip(1..).map(|(media, nsid)| (namespace(nsid), media.backing())).collect();
        let subsystem = Subsystem::new(config, namespaces).expect("a subsystem");
        let slots: Vec<_> = (1..=3)
            .map(|cntlid| {
                let slot = Slot::without_lines(AddressSpace::default(), 1).expect("a slot");
                slot.point_at(&subsystem.plug(cntlid).expect("a controller"));
                slot
            })
            .collect();
        let secret = Secret::new(None, &[7; 32]).expect("a secret");
        let access = |nqn: &str, secret: Option<&Secret>| HostAccess {
            nqn: nqn.into(),
            secret: secret.cloned(),
            controller_secret: None,
        };
        let exported = |nqn: &str, hosts: Vec<HostAccess>, controllers: Vec<(u16, Slot)>, nsid: u32| ExportedSubsystem {
            nqn: nqn.into(),
            serial: "FUZZ".into(),
            allowed_hosts: hosts,
            allow_any_host: false,
            digests: Default::default(),
            controllers,
            ana_groups: vec![AnaGroupConfig { id: 1, nsids: vec![nsid], state: AnaState::OPTIMIZED }],
        };
        let hosts = vec![access(HOSTS[0], None), access(HOSTS[1], Some(&secret))];
        let hostile = vec![(CNTLIDS[0], slots[0].clone()), (CNTLIDS[1], slots[1].clone())];
        let config = TargetConfig {
            subsystems: vec![
                exported(HOSTILE, hosts, hostile, 1),
                exported(QUIET, vec![access(NEIGHBOUR, None)], vec![(NEIGHBOURS_CNTLID, slots[2].clone())], 2),
            ],
            discovery: true,
            limits: limits(),
            dh_groups: vec![DhGroup::Null],
            random: Box::new(Seeded(fastrand::Rng::with_seed(5))),
        };
        let target = Target::new(config).expect("a target");
        Self {
            target,
            subsystem,
            media,
            peers: Vec::new(),
            neighbour: Vec::new(),
            secret,
            now: Time(1_000),
            terms: 0,
            refused: 0,
            unexplained: 0,
            associations_ended: false,
        }
    }

    fn open(&mut self) -> Peer {
        let (ours, theirs) = Pipe::pair();
        self.target.accept(Box::new(theirs), SocketAddr::from(([127, 0, 0, 1], 4420)));
        Peer::new(ours)
    }

    /// Polls once; a microsecond passes.
    fn poll(&mut self) {
        self.now = self.now.after_us(1);
        let _progress = self.target.poll(self.now);
        let _progress = self.subsystem.poll(self.now);
        for at in 0..self.peers.len() {
            self.attend(at);
        }
    }

    /// One peer takes what has come for it.
    fn attend(&mut self, at: usize) {
        let peer = &mut self.peers[at];
        let (was_closed, had_ended) = (peer.closed, peer.terminated);
        let refused = peer.connects_refused;
        drop(peer.take());
        self.refused += peer.connects_refused - refused;
        self.terms += u64::from(peer.terminated && !had_ended);
        if peer.closed && !was_closed {
            let admin = peer.link.is_none_or(|(_, qid)| qid == 0);
            let known = peer.explained || peer.terminated;
            let of_association = self.associations_ended && peer.link.is_some();
            self.unexplained += u64::from(!known && !of_association);
            self.associations_ended |= admin;
        }
    }

    // The neighbour.

    fn call(&mut self, at: usize, entry: SubmissionEntry, data: &[u8], polls: usize) -> (Status, u64) {
        let connects = entry.cdw0.opcode() == fabrics::OPCODE && !data.is_empty();
        let kind = if connects { Kind::Connect(at as u16, 0) } else { Kind::Other };
        let cid = self.neighbour[at].command(entry, data, kind);
        for _ in 0..polls {
            self.poll();
            if let Some((command, status, result)) = self.neighbour[at].take().pop() {
                assert_eq!(command.entry.cdw0.cid(), cid, "the neighbour's answer");
                return (status, result);
            }
        }
        panic!("{entry:?} of the neighbour is not answered in {polls} polls");
    }

    /// Makes an association on a subsystem: two peers in `neighbour`, the controller enabled, one I/O queue.
    fn associate(&mut self, subsystem: &str, host: &str, cntlid: u16) {
        self.neighbour.clear();
        for qid in 0..2 {
            let mut peer = self.open();
            peer.send(&icreq(Digests::new().with_header(true).with_data(true), 0));
            self.neighbour.push(peer);
            let id = if qid == 0 { 0xffff } else { cntlid };
            let entry = SubmissionEntry::connect(qid, 32, ConnectAttributes::new().with_no_sq_flow_control(true), 0);
            for _ in 0..8 {
                self.poll();
                drop(self.neighbour[usize::from(qid)].take());
            }
            let (status, result) = self.call(usize::from(qid), entry, &connect_data(subsystem, host, id), PATIENCE);
            assert!(!status.is_error() && result as u16 == cntlid, "Connect of queue {qid}: {status:?} {result:#x}");
            if qid == 0 {
                let set = SubmissionEntry::property_set(offset::CC, false, ENABLED);
                assert!(!self.call(0, set, &[], PATIENCE).0.is_error(), "CC.EN");
                for round in 0.. {
                    assert!(round < PATIENCE, "CSTS.RDY does not follow CC.EN");
                    let (_, csts) = self.call(0, SubmissionEntry::property_get(offset::CSTS, false), &[], PATIENCE);
                    if Csts::from_bits(csts as u32).rdy() {
                        break;
                    }
                }
            }
        }
        let identify = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
        let (status, _) = self.call(0, identify.with_sgl(SglDescriptor::transport(4096)), &[], PATIENCE);
        assert!(!status.is_error(), "Identify: {status:?}");
    }

    fn welcome_neighbour(&mut self) {
        self.associate(QUIET, NEIGHBOUR, NEIGHBOURS_CNTLID);
    }

    fn neighbour_reads(&mut self) {
        let read = SubmissionEntry::read(2, 3, 4).with_sgl(SglDescriptor::transport(2048));
        let (status, _) = self.call(1, read, &[], NEIGHBOURS_PATIENCE);
        assert!(!status.is_error(), "the neighbour's read: {status:?}");
    }

    // The hostile hosts.

    /// An association of the hostile subsystem's to begin with.
    fn begin(&mut self, host: usize, digests: u8) {
        let digests = Digests::new().with_header(digests & 1 != 0).with_data(digests & 2 != 0);
        for qid in 0..2u16 {
            let mut peer = self.open();
            peer.send(&icreq(digests, 0));
            self.peers.push(peer);
            self.polls(8);
            let at = self.peers.len() - 1;
            self.connect(at, qid, HOSTILE, host, if qid == 0 { 0xffff } else { CNTLIDS[0] }, 32, 4);
            self.polls(8);
            for _ in 0..5 {
                if host == 0 || self.peers[at].closed {
                    break;
                }
                self.peers[at].authenticate(HOSTS[host], HOSTILE, &self.secret.clone(), None);
                self.polls(4);
            }
            if qid == 0 {
                self.peers[at].command(SubmissionEntry::property_set(offset::CC, false, ENABLED), &[], Kind::Other);
                self.polls(20);
            }
        }
    }

    fn connect(&mut self, at: usize, qid: u16, subsystem: &str, host: usize, cntlid: u16, entries: u32, attributes: u8) {
        let peer = &mut self.peers[at];
        if peer.link.is_none() && !peer.commands.iter().any(|command| matches!(command.kind, Kind::Connect(..))) {
            peer.connects_as(host == 1 && subsystem == HOSTILE);
            peer.stranger = host == 2 && subsystem == HOSTILE || subsystem == QUIET;
        }
        let entry = SubmissionEntry::connect(qid, entries, ConnectAttributes::from_bits(attributes), 0);
        peer.command(entry, &connect_data(subsystem, HOSTS[host], cntlid), Kind::Connect(qid, cntlid));
    }

    fn polls(&mut self, count: usize) {
        (0..count).for_each(|_| self.poll());
    }

    // What holds.

    fn check(&self) {
        let limits = limits();
        assert!(self.target.connections() <= limits.connections, "{} connections", self.target.connections());
        assert!(self.target.associations().count() <= 3, "associations");
        let most = self.target.most_queued_bytes();
        assert!(most <= MOST_QUEUED, "{most} bytes wait for one client");
    }

    /// The backing ends what it has, the peers read and give what they are asked for: every command of a sane peer is answered.
    fn settle(&mut self) {
        self.media[0].set_manner(Manner::default());
        self.target.set_ana_state(HOSTILE, None, AnaState::OPTIMIZED);
        self.peers.iter_mut().for_each(|peer| peer.reads = true);
        self.polls(20);
        for _ in 0..PATIENCE {
            let gave = self.peers.iter_mut().filter(|peer| peer.sane).any(|peer| peer.give(4096));
            self.poll();
            if !gave && self.missing().is_none() {
                break;
            }
        }
        // Those that end have been given time to read why.
        self.now = self.now.after_ms(limits().linger_ms + 1);
        self.polls(4);
        if let Some((at, what)) = self.missing() {
            let peer = &self.peers[at];
            panic!("never answered on {:?}: {what}; of {} commands; {:?}", peer.link, peer.commands.len(), self.target.counters());
        }
        self.neighbour_reads();
    }

    /// A command that has to be answered and is not yet.
    fn missing(&self) -> Option<(usize, String)> {
        let knows = |peer: &Peer| {
            let Some((cntlid, 1..)) = peer.link else { return true };
            self.peers.iter().any(|other| other.link == Some((cntlid, 0)) && other.sane && !other.closed)
        };
        self.peers.iter().enumerate().filter(|(_, peer)| peer.sane && !peer.closed && knows(peer)).find_map(|(at, peer)| {
            let missing = peer.commands.iter().find(|command| command.kind != Kind::Event && !command.may_vanish)?;
            Some((at, format!("{missing:?}")))
        })
    }

    /// All hostile hosts go: what was theirs is free, the counters add up, and the next host finds it as new.
    fn end(&mut self) {
        self.polls(2);
        let seen = (self.terms, self.refused, self.unexplained);
        self.peers.clear();
        for _ in 0..PATIENCE {
            self.now = self.now.after_ms(50);
            self.poll();
            if self.target.connections() == 2 && self.target.associations().count() == 1 {
                break;
            }
        }
        assert_eq!((self.target.connections(), self.target.associations().count()), (2, 1), "connections and associations left");
        let counters = self.target.counters();
        assert_eq!(counters.accepted - counters.closed, 2, "{counters:?}");
        judge_counters(&counters, seen);
        self.neighbour_reads();
        let neighbour = std::mem::take(&mut self.neighbour);
        // The controllers are reset when their association ends, and that takes a while.
        self.polls(50);
        let mut others = Vec::new();
        for cntlid in CNTLIDS {
            self.associate(HOSTILE, HOSTS[0], cntlid);
            let bytes = [cntlid as u8 ^ 0x5a; 512];
            let write = SubmissionEntry::write(1, 7, 1).with_sgl(SglDescriptor::in_capsule(0, 512));
            let written = self.write_own(write, &bytes);
            assert!(!written.is_error(), "the next host's write: {written:?}");
            assert_eq!(self.media[0].block(7), bytes, "what the next host wrote");
            others.append(&mut self.neighbour);
        }
        self.neighbour = neighbour;
        self.neighbour_reads();
        assert!(self.media[1].is_all(FILL), "the neighbour's namespace");
    }

    fn write_own(&mut self, entry: SubmissionEntry, data: &[u8]) -> Status {
        self.neighbour[1].command(entry, data, Kind::Other);
        for _ in 0..PATIENCE {
            self.poll();
            if let Some((_, status, _)) = self.neighbour[1].take().pop() {
                return status;
            }
        }
        panic!("the next host's write is not answered");
    }
}

/// What peers have seen is what the counters say.
fn judge_counters(counters: &Counters, (terms, refused, unexplained): (u64, u64, u64)) {
    assert!(counters.terminations >= terms, "{terms} C2HTermReqs: {counters:?}");
    assert!(counters.connects_refused >= refused, "{refused} Connects refused: {counters:?}");
    let causes = counters.refused
        + counters.evicted
        + counters.handshake_timeouts
        + counters.host_terminations
        + counters.stalled
        + counters.socket_errors
        + counters.keep_alive_expired
        + counters.idle_expired
        + counters.late_refusals
        + counters.authentication_failures;
    assert!(causes >= unexplained, "{unexplained} connections have ended without a cause: {counters:?}");
}

fn connect_data(subsystem: &str, host: &str, cntlid: u16) -> Vec<u8> {
    let mut data = ConnectData { hostid: [9; 16], cntlid, ..Default::default() };
    write_text(&mut data.subnqn, subsystem);
    write_text(&mut data.hostnqn, host);
    data.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_session_and_one_of_zeroes_are_well() {
        run(&[]);
        run(&[0; 200]);
        run(&[0xff; 200]);
    }
}
