//! The target: its connections, polled in turn, and the controllers that it exports.

use super::association::{Connections, Env, Place, State};
use super::config::{DEFAULT_GROUPS, ExportedSubsystem, HostAccess, Limits, TargetConfig, TargetError};
use super::connection::{Connection, End, Link, Sink};
use super::counters::Counters;
use super::discovery::Catalogue;
use super::receive::{Fatal, Step};
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::random::SecureRandom;
use dray_device::socket::Stream;
use dray_nvme::auth::DhGroup;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::{self, status};
use dray_nvme::tcp::pdu::{CapsuleCmd, FatalError, field};
use dray_nvme::tcp::{AnaState, DISCOVERY_NQN, MAX_NQN};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

/// PDUs taken from one connection in a poll (the receive buffer bounds their bytes to 64 KiB).
const PDUS: u32 = 32;
/// Bytes that the commands taken from one connection in a poll move at most, but for the last: as many as their controller moves
/// in a poll. More would only wait there, each with a buffer of its own, and the buffers would not stay in the cache.
const BYTES: u64 = 64 << 10;
/// Steps (PDUs and pieces of data) of one connection in a poll.
const STEPS: u32 = 512;
/// A connection with nothing to receive so many times is asked more and more seldom, down to one poll in [`SELDOM`]. More looks than pass while
/// a host that has one command at a time makes its next.
const QUIET: u32 = 128;
const SELDOM: u32 = 32;

/// A subsystem without its controllers.
pub(super) struct Exported {
    pub(super) config: ExportedSubsystem,
    pub(super) ana_changes: u64,
    /// Every group can be read and written.
    accessible: bool,
}

impl Exported {
    fn new(config: ExportedSubsystem) -> Self {
        let mut exported = Self { config, ana_changes: 1, accessible: true };
        exported.look();
        exported
    }

    fn look(&mut self) {
        let good = |state| matches!(state, AnaState::OPTIMIZED | AnaState::NON_OPTIMIZED);
        self.accessible = self.config.ana_groups.iter().all(|group| good(group.state));
    }

    /// Whether a host may connect, and how it is listed.
    pub(super) fn access(&self, host: &str) -> Option<Option<&HostAccess>> {
        let listed = self.config.allowed_hosts.iter().find(|access| access.nqn == host);
        (listed.is_some() || self.config.allow_any_host).then_some(listed)
    }

    /// ANAGRPID of a namespace; 0 for none.
    pub(super) fn group_of(&self, nsid: u32) -> u32 {
        self.config.ana_groups.iter().find(|group| group.nsids.contains(&nsid)).map_or(0, |group| group.id)
    }

    /// The status that I/O to a namespace gets because of its ANA state.
    #[inline]
    pub(super) fn refusal(&self, nsid: u32) -> Option<Status> {
        if self.accessible {
            return None;
        }
        match self.config.ana_groups.iter().find(|group| group.nsids.contains(&nsid))?.state {
            AnaState::OPTIMIZED | AnaState::NON_OPTIMIZED => None,
            AnaState::PERSISTENT_LOSS => Some(Status::ANA_PERSISTENT_LOSS),
            AnaState::CHANGE => Some(Status::ANA_TRANSITION),
            _ => Some(Status::ANA_INACCESSIBLE),
        }
    }
}

/// Everything but the connections.
pub(super) struct Core {
    pub(super) exported: Vec<Exported>,
    /// The controllers of each subsystem.
    pub(super) places: Vec<Vec<Place>>,
    pub(super) discovery: bool,
    pub(super) limits: Limits,
    pub(super) groups: Vec<DhGroup>,
    pub(super) random: Box<dyn SecureRandom>,
    pub(super) counters: Counters,
    /// Generation of the discovery log.
    pub(super) generation: u64,
    pub(super) next_cntlid: u16,
}

/// An NVMe/TCP target. It has one owner, who polls it; and beside it, on the same core or another, the subsystems behind the
/// slots.
pub struct Target {
    core: Core,
    connections: Connections,
    /// Those in use.
    live: Vec<usize>,
    round: u32,
    draining: bool,
    now: Time,
    /// The last poll found nothing to do.
    rested: bool,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("connections", &self.live.len()).field("counters", &self.core.counters).finish_non_exhaustive()
    }
}

impl Target {
    /// A target without connections.
    ///
    /// # Errors
    /// [`TargetError`] when the configuration contradicts itself.
    pub fn new(config: TargetConfig) -> Result<Self, TargetError> {
        config.limits.check()?;
        let (mut exported, mut places) = (Vec::new(), Vec::<Vec<Place>>::new());
        for mut subsystem in config.subsystems {
            let nqn = &subsystem.nqn;
            if !nqn.starts_with("nqn.") || nqn.len() > MAX_NQN || nqn == DISCOVERY_NQN {
                return Err(TargetError::Nqn(nqn.clone()));
            }
            if exported.iter().any(|before: &Exported| before.config.nqn == *nqn) {
                return Err(TargetError::Duplicate(nqn.clone()));
            }
            let mut of_subsystem = Vec::<Place>::new();
            for (cntlid, slot) in std::mem::take(&mut subsystem.controllers) {
                if of_subsystem.iter().any(|place| place.cntlid == cntlid) {
                    return Err(TargetError::Duplicate(format!("controller {cntlid} of {nqn}")));
                }
                of_subsystem.push(Place::new(cntlid, slot, &config.limits));
            }
            places.push(of_subsystem);
            exported.push(Exported::new(subsystem));
        }
        let connections = (0..config.limits.connections).map(|_| None).collect();
        let core = Core {
            exported,
            places,
            discovery: config.discovery,
            limits: config.limits,
            groups: if config.dh_groups.is_empty() { DEFAULT_GROUPS.to_vec() } else { config.dh_groups },
            random: config.random,
            counters: Counters::default(),
            generation: 1,
            next_cntlid: 0,
        };
        Ok(Self { core, connections, live: Vec::new(), round: 0, draining: false, now: Time(0), rested: false })
    }

    /// Takes a connection; `local` is the address by which the client reached the target, which discovery tells others.
    /// One too many is refused, and the oldest half-open one makes room for a new one where those are too many.
    pub fn accept(&mut self, stream: Box<dyn Stream>, local: SocketAddr) {
        let half_open = |connection: &&mut Box<Connection>| connection.is_half_open();
        let waiting = self.connections.iter_mut().flatten().filter(half_open).count();
        if waiting >= self.core.limits.half_open {
            let oldest = self.connections.iter_mut().flatten().filter(half_open).min_by_key(|c| (c.accepted, c.id));
            if let Some(id) = oldest.map(|oldest| oldest.id) {
                self.core.counters.evicted += 1;
                self.close(id);
            }
        }
        let free = self.connections.iter().position(Option::is_none);
        let Some(id) = free.filter(|_| !self.draining) else {
            self.core.counters.refused += 1;
            return;
        };
        self.core.counters.accepted += 1;
        let connection = Connection::new(id, stream, local, &self.core.limits, self.now);
        self.connections[id] = Some(Box::new(connection));
        self.live.push(id);
    }

    /// What has been counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.core.counters
    }

    /// Connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.live.len()
    }

    /// Connections that have not got through Connect and authentication.
    #[must_use]
    pub fn half_open(&self) -> usize {
        self.connections.iter().flatten().filter(|connection| connection.is_half_open()).count()
    }

    /// Bytes that wait for the client that has most of them waiting; data that lies in an association's memory is not counted.
    #[must_use]
    pub fn most_queued_bytes(&self) -> usize {
        self.connections.iter().flatten().map(|connection| connection.out.queued()).max().unwrap_or(0)
    }

    /// The controllers that are in use: SUBNQN, CNTLID and the host's NQN.
    pub fn associations(&self) -> impl Iterator<Item = (&str, u16, &str)> {
        let both = self.core.exported.iter().zip(&self.core.places);
        both.flat_map(|(exported, places)| {
            places.iter().filter_map(|place| {
                let host = place.host.as_ref()?;
                Some((exported.config.nqn.as_str(), place.cntlid, host.nqn.as_str()))
            })
        })
    }

    /// Changes the state of an ANA group, or of all groups of the subsystem with `None`; hosts are told. Returns whether there
    /// is such a group.
    pub fn set_ana_state(&mut self, nqn: &str, group: Option<u32>, state: AnaState) -> bool {
        let Some(exported) = self.core.exported.iter_mut().find(|exported| exported.config.nqn == nqn) else { return false };
        let mut found = false;
        for of_group in exported.config.ana_groups.iter_mut().filter(|g| group.is_none_or(|group| g.id == group)) {
            of_group.state = state;
            found = true;
        }
        if found {
            exported.ana_changes += 1;
            exported.look();
        }
        found
    }

    /// Changes who may connect to a subsystem; hosts that are connected stay, discovery controllers tell theirs. Returns whether
    /// there is such a subsystem.
    pub fn set_hosts(&mut self, nqn: &str, allowed_hosts: Vec<HostAccess>, allow_any_host: bool) -> bool {
        let Some(exported) = self.core.exported.iter_mut().find(|exported| exported.config.nqn == nqn) else { return false };
        (exported.config.allowed_hosts, exported.config.allow_any_host) = (allowed_hosts, allow_any_host);
        self.core.generation += 1;
        true
    }

    /// Takes no more connections and ends those that there are; [`Target::is_idle`] says when all is over.
    pub fn drain(&mut self) {
        self.draining = true;
        for connection in self.connections.iter_mut().flatten() {
            connection.finish();
        }
    }

    /// No connection, and every controller is free.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.live.is_empty() && self.core.places.iter().flatten().all(|place| place.state == State::Free)
    }

    fn close(&mut self, id: usize) {
        let Some(mut connection) = self.connections.get_mut(id).and_then(Option::take) else { return };
        self.live.retain(|&live| live != id);
        self.core.counters.closed += 1;
        if let Link::Queue { subsystem, place, qid } = connection.link {
            self.core.places[subsystem][place].lost(qid, &mut connection.out, &mut self.connections);
        }
    }

    /// One connection's turn at receiving.
    fn receive(&mut self, id: usize, all: bool, now: Time) -> u32 {
        let round = self.round;
        let Some(slot) = self.connections.get_mut(id) else { return 0 };
        let Some(connection) = slot.as_mut() else { return 0 };
        let skip = !all && connection.quiet > QUIET && !round.wrapping_add(id as u32).is_multiple_of(SELDOM);
        if skip || connection.end == End::Now {
            return 0;
        }
        if !connection.is_listening() {
            return if connection.end == End::No { 0 } else { drop_rest(connection) };
        }
        let Some(mut connection) = slot.take() else { return 0 };
        let work = self.core.drive(&mut connection, now);
        self.connections[id] = Some(connection);
        work
    }

    /// One connection's turn at sending, and its time limits.
    fn send(&mut self, id: usize, now: Time) -> u32 {
        let Some(Some(connection)) = self.connections.get_mut(id) else { return 0 };
        let mut work = 0;
        if connection.end != End::Now && !connection.out.is_empty() {
            work += self.core.send(connection, now);
        } else {
            connection.progress = now;
        }
        let limits = &self.core.limits;
        let counters = &mut self.core.counters;
        match connection.end {
            End::No if now > connection.progress.after_ms(limits.stall_ms) => {
                counters.stalled += 1;
                connection.abandon();
            }
            End::No if connection.is_half_open() && now > connection.proof_deadline(limits) => {
                tracing::debug!(connection = id, "a client did not get through Connect and authentication in time");
                counters.handshake_timeouts += 1;
                connection.abandon();
            }
            End::Finishing => connection.end = End::Lingering(now.after_ms(limits.linger_ms)),
            End::Lingering(until) if now > until => connection.abandon(),
            _ => {}
        }
        if connection.end == End::Now {
            self.close(id);
            work += 1;
        }
        work
    }
}

/// Reads what a client still sends, so that what was sent to it last is not lost.
fn drop_rest(connection: &mut Connection) -> u32 {
    let mut bytes = [0; 4096];
    match connection.stream.recv(&mut bytes, &mut Vec::new()) {
        Ok(0) => connection.abandon(),
        Err(error) if !is_again(&error) => connection.abandon(),
        _ => {}
    }
    0
}

fn is_again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl Core {
    /// Receives what has come on a connection, and handles what is whole.
    fn drive(&mut self, connection: &mut Connection, now: Time) -> u32 {
        let mut work = self.handle(connection, now);
        if work > 0 || !connection.is_listening() {
            // What was left over comes first; the buffer may have no room before it is handled.
            return work;
        }
        let mut fds = Vec::new();
        match connection.stream.recv(connection.inbox.room(), &mut fds) {
            Ok(0) => connection.abandon(),
            Ok(bytes) => {
                connection.quiet = 0;
                connection.inbox.filled(bytes);
                work = 1 + self.handle(connection, now);
            }
            Err(error) if is_again(&error) => connection.quiet = connection.quiet.saturating_add(1),
            Err(error) => {
                tracing::debug!(connection = connection.id, %error, "an NVMe/TCP connection has failed");
                self.counters.socket_errors += 1;
                connection.abandon();
            }
        }
        work
    }

    fn handle(&mut self, connection: &mut Connection, now: Time) -> u32 {
        let (mut pdus, mut steps, mut bytes) = (0, 0, 0);
        while pdus < PDUS && steps < STEPS && bytes < BYTES && connection.is_listening() {
            steps += 1;
            let step = connection.inbox.next(&connection.rules);
            let result = match step {
                Step::More => break,
                Step::Bytes(range) => {
                    self.take_bytes(connection, range);
                    continue;
                }
                Step::IcReq(request) => connection.initialize(&request),
                Step::Command { capsule, data } => {
                    bytes += u64::from(capsule.sqe.sgl().length);
                    self.command(connection, &capsule, data, now)
                }
                Step::Data(pdu) => match connection.link {
                    Link::Queue { subsystem, place, qid } if connection.connected => {
                        self.places[subsystem][place].data(qid, &pdu).map(|sink| connection.sink = sink)
                    }
                    _ => Err(Fatal::header(field::TTAG)),
                },
                Step::DataEnd { intact } => {
                    self.data_end(connection, intact, now);
                    Ok(())
                }
                Step::Term => {
                    self.counters.host_terminations += 1;
                    connection.abandon();
                    Ok(())
                }
                Step::Fatal(fatal) => Err(fatal),
            };
            pdus += 1;
            if let Err(fatal) = result {
                self.counters.terminations += 1;
                self.counters.header_digest_errors += u64::from(fatal.fes == FatalError::HEADER_DIGEST);
                connection.terminate(fatal);
            }
        }
        if let Link::Queue { subsystem, place, .. } = connection.link
            && pdus > 0
        {
            self.places[subsystem][place].ring();
        }
        pdus
    }

    #[inline]
    fn command(&mut self, connection: &mut Connection, capsule: &CapsuleCmd, data: u32, now: Time) -> Result<(), Fatal> {
        let entry = &capsule.sqe;
        connection.sink = Sink::Discard;
        if entry.cdw0.opcode() == fabrics::OPCODE {
            if data == 0 {
                self.fabrics(connection, entry, &[], now);
            } else {
                connection.pending = *entry;
                connection.small.clear();
                connection.sink = Sink::Small;
            }
            return Ok(());
        }
        self.no_fabrics(connection, entry, data, now)
    }

    #[inline]
    fn no_fabrics(&mut self, connection: &mut Connection, entry: &SubmissionEntry, data: u32, now: Time) -> Result<(), Fatal> {
        let cid = entry.cdw0.cid();
        if !connection.connected {
            connection.respond_status(cid, Status::COMMAND_SEQUENCE.with_dnr());
            return Ok(());
        }
        if !connection.authentication.is_open() {
            connection.respond_status(cid, status::AUTHENTICATION_REQUIRED.with_dnr());
            return Ok(());
        }
        if let Link::Queue { subsystem, place, qid } = connection.link {
            let exported = &self.exported[subsystem];
            let mut env = Env { counters: &mut self.counters, limits: &self.limits, exported, now };
            connection.sink = self.places[subsystem][place].command(connection, qid, entry, data, &mut env)?;
        } else if let Link::Discovery(mut controller) = std::mem::replace(&mut connection.link, Link::None) {
            let from = Catalogue { exported: &self.exported, generation: self.generation, limits: &self.limits };
            controller.execute(entry, connection, &from, now);
            connection.link = Link::Discovery(controller);
        }
        Ok(())
    }

    #[inline]
    fn take_bytes(&mut self, connection: &mut Connection, range: std::ops::Range<usize>) {
        let bytes = connection.inbox.bytes(range);
        match &mut connection.sink {
            Sink::Discard => {}
            Sink::Small => connection.small.extend_from_slice(bytes),
            Sink::Memory { index, at, .. } => {
                if let Link::Queue { subsystem, place, qid } = connection.link {
                    self.places[subsystem][place].store(qid, *index, *at, bytes);
                }
                *at += bytes.len() as u32;
            }
        }
    }

    #[inline]
    fn data_end(&mut self, connection: &mut Connection, intact: bool, now: Time) {
        match std::mem::replace(&mut connection.sink, Sink::Discard) {
            Sink::Discard => {}
            Sink::Small => {
                let (entry, data) = (connection.pending, std::mem::take(&mut connection.small));
                if intact {
                    self.fabrics(connection, &entry, &data, now);
                } else {
                    self.counters.data_digest_errors += 1;
                    connection.respond_status(entry.cdw0.cid(), Status::TRANSIENT_TRANSPORT);
                }
                connection.small = data;
            }
            Sink::Memory { index, at, r2t } => {
                let Link::Queue { subsystem, place, qid } = connection.link else { return };
                let exported = &self.exported[subsystem];
                let mut env = Env { counters: &mut self.counters, limits: &self.limits, exported, now };
                self.places[subsystem][place].stored(connection, (qid, index), at, (r2t, intact), &mut env);
            }
        }
    }

    fn send(&mut self, connection: &mut Connection, now: Time) -> u32 {
        let link = match connection.link {
            Link::Queue { subsystem, place, qid } => self.places[subsystem][place].front.as_mut().zip(Some(qid)),
            _ => None,
        };
        let sent = match link {
            Some((front, qid)) => connection.out.send(&mut *connection.stream, |index| front.release(qid, index)),
            None => connection.out.send(&mut *connection.stream, |_| {}),
        };
        match sent {
            Ok(0) => 0,
            Ok(_) => {
                connection.progress = now;
                1
            }
            Err(_) => {
                self.counters.socket_errors += 1;
                connection.abandon();
                1
            }
        }
    }

    /// Discovery controllers: events and keep alive.
    fn look_after(&mut self, connection: &mut Connection, now: Time) {
        let Link::Discovery(controller) = &mut connection.link else { return };
        if now > controller.deadline() {
            self.counters.keep_alive_expired += 1;
            connection.abandon();
            return;
        }
        if let Some((cid, result)) = controller.event(self.generation) {
            connection.respond(cid, Status::SUCCESS, result);
        }
    }
}

impl Poll for Target {
    fn poll(&mut self, now: Time) -> Progress {
        // After a sleep every connection is asked: whoever woke the core may have been quiet for long.
        let slept = self.rested && now.us_since(self.now) > 5;
        self.now = now;
        self.round = self.round.wrapping_add(1);
        let mut work = 0;
        for (exported, places) in self.core.exported.iter().zip(&mut self.core.places) {
            let mut env = Env { counters: &mut self.core.counters, limits: &self.core.limits, exported, now };
            for place in places {
                work += place.poll(&mut self.connections, &mut env);
            }
        }
        // Backwards: a connection that ends here leaves the list.
        for at in (0..self.live.len()).rev() {
            let Some(&id) = self.live.get(at) else { continue };
            if let Some(connection) = &mut self.connections[id] {
                self.core.look_after(connection, now);
            }
            work += self.send(id, now);
        }
        // Last: what a command waits for longest is its answer, and looking for more costs a system call.
        for at in 0..self.live.len() {
            work += self.receive(self.live[at], slept, now);
        }
        self.rested = work == 0;
        if work > 0 {
            return Progress::busy(work);
        }
        let connections = self.live.iter().filter_map(|&id| self.connections[id].as_deref()).map(|connection| self.core.deadline(connection, now));
        let limits = &self.core.limits;
        let places = self.core.places.iter().flatten().map(|place| place.deadline(limits));
        let wake = connections.chain(places).fold(Time::NEVER, Time::min);
        if wake == Time::NEVER { Progress::IDLE } else { Progress { work: 0, next: Next::At(wake.after_ns(1)) } }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        for connection in self.connections.iter().flatten() {
            if let Some(waker) = connection.stream.waker() {
                visit(waker);
            }
        }
    }
}

impl Core {
    /// When a connection must be looked at, whatever comes.
    fn deadline(&self, connection: &Connection, now: Time) -> Time {
        let mut at = match &connection.link {
            Link::Discovery(controller) => controller.deadline(),
            _ => Time::NEVER,
        };
        if connection.is_half_open() {
            at = at.min(connection.proof_deadline(&self.limits));
        }
        if !connection.out.is_empty() {
            // The socket is full: there is no waker for room in it.
            at = at.min(now.after_us(100));
        }
        match connection.end {
            End::No => at,
            End::Lingering(until) => at.min(until),
            End::Finishing | End::Now => now,
        }
    }
}
