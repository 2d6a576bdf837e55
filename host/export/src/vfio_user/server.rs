//! The server of one function: takes one client at a time, and lives on without any.
//!
//! Requests are executed in the order of their arrival, one at a time. A request that has to wait (memory that is unmapped is
//! still used, a reset or a migration step is not through) withholds its reply, and everything behind it waits too. A client's
//! end takes its memory and its event lines away, and leaves the device as it is; the next client is served when nothing uses
//! the memory of the one before.

use super::connection::{Connection, Received, Request, Sent};
use super::counters::VfioUserCounters;
use super::dma::{Mapped, Windows};
use super::feature::{Answer, Migration};
use super::irq::Interrupts;
use super::pci::{Effect, PciIds};
use super::region::Regions;
use crate::hooks::MigrationHooks;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::slot::Slot;
use dray_device::socket::{MAX_FDS, Stream};
use dray_device::space::Unmapping;
use dray_device::vfio_user::wire::{
    Capabilities, DeviceInfo, DmaMap, DmaUnmap, Header, IrqInfo, IrqSet, MigData, MultiWrite, RegionAccess, RegionInfo,
    RegionIoFds, VERSION_MINOR, Version, WriteMulti, command, errno, irq, region,
};
use std::os::fd::{BorrowedFd, OwnedFd};
use zerocopy::IntoBytes;

/// Requests per poll.
const REQUESTS: u32 = 32;
/// Pieces of a request per poll.
const PIECES: u32 = 64;
/// Bytes that a data message may have besides its data.
const OVERHEAD: usize = 32;
/// How soon to look again while a reply is withheld.
const LOOK_AGAIN_US: u64 = 20;
/// How soon to look again at a client that does not read.
const BLOCKED_US: u64 = 200;
/// So long after a request the socket is looked at in each poll; then that often. A look is a system call, and a client whose
/// doorbells are mapped says nothing for hours.
const EAGER_US: u64 = 1_000;
const SOCKET_LOOK_US: u64 = 50;
/// How often to look whether the client has taken its memory away.
const MEMORY_LOOK_US: u64 = 1_000;

/// What of BAR0 a client may map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bar0Map {
    /// The page of doorbells, as one sparse area: they are polled, and registers are trapped.
    #[default]
    Doorbells,
    /// All of it, registers included: for clients that insist. A fall of CC.EN that is followed by a rise without a look at
    /// CSTS.RDY is not seen, and INTMS masks nothing.
    Whole,
    /// Nothing: every doorbell is a message, and the controller offers shadow doorbells.
    None,
}

/// Who may connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PeerPolicy {
    /// Whoever gets to the socket.
    #[default]
    Any,
    /// The user that this process runs as, by the socket's credentials: for a management controller.
    SameUser,
}

/// How a server is set up; fixed while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfioUserConfig {
    /// PCI identifiers.
    pub ids: PciIds,
    /// What of BAR0 a client may map.
    pub bar0: Bar0Map,
    /// MSI-X vectors, at most the slot's and 2,048; 0 = as many as the slot has.
    pub vectors: u16,
    /// Largest data of one message, bytes: 4 KiB to 16 MiB.
    pub max_data_bytes: u32,
    /// Descriptors taken with one message, 1 to 16.
    pub max_msg_fds: u32,
    /// DMA windows at a time, at most what an address space holds.
    pub max_dma_maps: u32,
    /// Bytes of the client's memory that may be mapped at a time: address space is the process's, and other clients need some.
    pub max_dma_bytes: u64,
    /// Who may connect.
    pub allow: PeerPolicy,
    /// Milliseconds that the reply to a reset waits for the controller at most; hypervisors give up after some seconds.
    pub reset_wait_ms: u32,
    /// Milliseconds in which a client must have got through VERSION: until then it keeps others out.
    pub handshake_ms: u32,
}

impl Default for VfioUserConfig {
    fn default() -> Self {
        Self {
            ids: PciIds::default(),
            bar0: Bar0Map::default(),
            vectors: 0,
            max_data_bytes: 1 << 20,
            max_msg_fds: MAX_FDS as u32,
            max_dma_maps: 1024,
            max_dma_bytes: 8 << 40,
            allow: PeerPolicy::default(),
            reset_wait_ms: 3_000,
            handshake_ms: 10_000,
        }
    }
}

/// Why a client is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Another client waits already.
    #[error("another client waits to be served")]
    Busy,
    /// It is not of the user that the policy wants, or does not say who it is.
    #[error("the client runs as another user")]
    WrongUser,
}

/// What a withheld reply waits for.
enum Work {
    Unmap(Option<Unmapping>),
    /// Migration hooks give the device back, then the function is reset.
    GiveBack,
    /// The function was reset, and the controller ends what it was doing.
    Quiet(Time),
    /// Arcs of the migration states.
    Arcs,
    /// The log of written pages.
    Log,
    /// The end of the migration stream: so many bytes are wanted.
    Stream(u32),
}

struct Pending {
    /// None: nobody waits for the reply.
    header: Option<Header>,
    payload: Vec<u8>,
    work: Work,
}

/// What a request has come to.
enum Outcome {
    Reply(Vec<u8>, Option<OwnedFd>),
    Later(Vec<u8>, Work),
}

impl Outcome {
    fn of(reply: &impl AsReply) -> Self {
        Self::Reply(reply.bytes().to_vec(), None)
    }

    fn empty() -> Self {
        Self::Reply(Vec::new(), None)
    }
}

/// A structure that is a reply.
trait AsReply {
    fn bytes(&self) -> &[u8];
}

impl<T: IntoBytes + zerocopy::Immutable> AsReply for T {
    fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// Serves the function in a slot to one client at a time.
pub struct VfioUserServer {
    slot: Slot,
    config: VfioUserConfig,
    regions: Regions,
    interrupts: Interrupts,
    windows: Windows,
    migration: Migration,
    hooks: Box<dyn MigrationHooks>,
    connection: Option<Connection>,
    waiting: Option<Box<dyn Stream>>,
    pending: Option<Pending>,
    /// Memory of a client that has gone.
    leaving: Vec<Unmapping>,
    /// When the client must have got through VERSION.
    greeting_ends: Time,
    /// When to look next whether the client has taken its memory away.
    next_look: Time,
    /// Until when the socket is looked at in each poll, and when to look next.
    eager_until: Time,
    next_receive: Time,
    counters: VfioUserCounters,
}

impl std::fmt::Debug for VfioUserServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioUserServer").field("config", &self.config).field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl VfioUserServer {
    /// Serves the function in `slot`, whose event lines and address space are from now on its clients'. Values of `config` that
    /// are outside their bounds are taken as the nearest bound.
    #[must_use]
    pub fn new(slot: Slot, config: VfioUserConfig, hooks: Box<dyn MigrationHooks>) -> Self {
        let vectors = if config.vectors == 0 { slot.vectors() } else { config.vectors };
        let config = VfioUserConfig {
            vectors: vectors.min(slot.vectors()).min(2048),
            max_data_bytes: config.max_data_bytes.clamp(4 << 10, 16 << 20),
            max_msg_fds: config.max_msg_fds.clamp(1, MAX_FDS as u32),
            max_dma_maps: config.max_dma_maps.clamp(1, dray_device::space::MAX_MAPPINGS as u32),
            ..config
        };
        slot.trap_doorbells(config.bar0 == Bar0Map::None);
        Self {
            regions: Regions::new(slot.clone(), config.ids, config.vectors, config.bar0),
            interrupts: Interrupts::new(slot.clone(), config.vectors),
            windows: Windows::new(config.max_dma_maps as usize, config.max_dma_bytes),
            migration: Migration::new(),
            slot,
            config,
            hooks,
            connection: None,
            waiting: None,
            pending: None,
            leaving: Vec::new(),
            greeting_ends: Time(0),
            next_look: Time(0),
            eager_until: Time(0),
            next_receive: Time(0),
            counters: VfioUserCounters::default(),
        }
    }

    /// Brings a client. It is served at once if there is none; if the one that is being served has gone without its end having
    /// been seen yet, after that one; otherwise it is refused by a later poll.
    ///
    /// # Errors
    /// [`AttachError`]; the connection is closed.
    pub fn attach(&mut self, stream: Box<dyn Stream>) -> Result<(), AttachError> {
        if self.config.allow == PeerPolicy::SameUser {
            let own = rustix::process::geteuid().as_raw();
            if stream.peer_uid() != Some(own) {
                self.counters.refused_peers += 1;
                return Err(AttachError::WrongUser);
            }
        }
        if self.waiting.is_some() {
            self.counters.refused_busy += 1;
            return Err(AttachError::Busy);
        }
        self.waiting = Some(stream);
        Ok(())
    }

    /// Ends the client that is being served and the one that waits, as if they had left.
    pub fn detach(&mut self, now: Time) {
        self.waiting = None;
        if self.connection.is_some() {
            self.disconnect(now);
        }
    }

    /// What it has done.
    #[must_use]
    pub fn counters(&self) -> VfioUserCounters {
        self.counters
    }

    /// Whether a client is being served.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.connection.is_some()
    }

    /// Whether a client is being served that has not got through VERSION.
    #[must_use]
    pub fn is_half_open(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.client.is_none())
    }

    /// Whether no client is being served and no memory of one is in use.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.connection.is_none() && self.leaving.is_empty() && self.pending.is_none()
    }

    /// Whether the client rings doorbells in memory that it has mapped, which wakes nobody.
    #[must_use]
    pub fn polls_doorbells(&self) -> bool {
        self.connection.is_some() && self.config.bar0 != Bar0Map::None
    }

    /// DMA windows of the client.
    #[must_use]
    pub fn dma_windows(&self) -> usize {
        self.windows.len()
    }

    /// The migration state (`dray_device::vfio_user::wire::state`).
    #[must_use]
    pub fn migration_state(&self) -> u32 {
        self.migration.state()
    }

    /// What the migration plugs in.
    pub fn hooks(&mut self) -> &mut dyn MigrationHooks {
        &mut *self.hooks
    }

    /// The slot.
    #[must_use]
    pub fn slot(&self) -> &Slot {
        &self.slot
    }

    fn disconnect(&mut self, now: Time) {
        self.connection = None;
        self.interrupts.release();
        self.counters.unmaps += self.windows.len() as u64;
        self.leaving.extend(self.windows.clear(self.slot.space()));
        self.slot.space().change_owner();
        if let Some(pending) = &mut self.pending {
            pending.header = None;
        }
        if self.migration.client_left(&mut *self.hooks, now) && self.pending.is_none() {
            self.pending = Some(Pending { header: None, payload: Vec::new(), work: Work::Arcs });
        }
    }

    /// Looks whether the reply that is withheld may go.
    fn advance(&mut self, now: Time) -> bool {
        let Some(mut pending) = self.pending.take() else { return false };
        let result = match &mut pending.work {
            Work::Unmap(unmapping) => unmapping.as_ref().is_none_or(Unmapping::is_done).then_some(Ok(())),
            Work::GiveBack => match self.hooks.poll(now) {
                crate::hooks::HookState::Working => None,
                _ => self.reset_function(now).map(|until| pending.work = Work::Quiet(until)).err().map(Err),
            },
            Work::Quiet(until) => (self.regions.is_quiet() || now >= *until).then_some(Ok(())),
            Work::Arcs => self.migration.poll(&mut *self.hooks, &mut self.regions, now),
            Work::Log => {
                let reply = self.migration.poll_log(&mut *self.hooks, now);
                reply.map(|reply| reply.map(|reply| pending.payload = reply))
            }
            Work::Stream(size) => match self.migration.read(*size as usize, &mut *self.hooks, &self.regions) {
                Ok(None) if pending.header.is_some() => None,
                Ok(data) => {
                    pending.payload = data.map(stream_part).unwrap_or_default();
                    Some(Ok(()))
                }
                Err(errno) => Some(Err(errno)),
            },
        };
        match (result, pending.header) {
            (None, _) => {
                self.pending = Some(pending);
                return false;
            }
            (Some(Ok(())), Some(header)) => self.reply(header, pending.payload, None),
            (Some(Err(errno)), Some(header)) => self.refuse(header, errno),
            (Some(_), None) => {}
        }
        true
    }

    fn reply(&mut self, header: Header, payload: Vec<u8>, fd: Option<OwnedFd>) {
        if let Some(connection) = &mut self.connection
            && !header.no_reply()
        {
            connection.reply(header.reply(payload.len()), payload, fd);
        }
    }

    fn refuse(&mut self, header: Header, errno: u32) {
        self.counters.refused += 1;
        if let Some(connection) = &mut self.connection
            && !header.no_reply()
        {
            connection.reply(header.error_reply(errno), Vec::new(), None);
        }
    }

    /// Serves the client for a while; returns how much was done and whether it waits for the client.
    fn serve(&mut self, now: Time) -> (u32, bool) {
        if now < self.next_receive && self.connection.as_ref().is_some_and(|connection| !connection.is_sending()) {
            return (0, false);
        }
        let (mut requests, mut pieces) = (0, 0);
        while requests < REQUESTS && pieces < PIECES {
            let Some(connection) = &mut self.connection else { break };
            match connection.flush() {
                Sent::All => {}
                Sent::Blocked => return (requests, true),
                Sent::Gone => {
                    self.counters.left += 1;
                    self.disconnect(now);
                    break;
                }
            }
            if self.pending.is_some() {
                break;
            }
            let closing = std::mem::take(&mut connection.closing);
            match if closing { Received::Broken } else { connection.receive() } {
                Received::Nothing => {
                    if self.config.bar0 != Bar0Map::None && now >= self.eager_until {
                        self.next_receive = now.after_us(SOCKET_LOOK_US);
                    }
                    return (requests, true);
                }
                Received::Part => pieces += 1,
                Received::Request => {
                    let request = connection.take();
                    self.eager_until = now.after_us(EAGER_US);
                    requests += 1;
                    self.execute(request, now);
                }
                Received::Gone => {
                    self.counters.left += 1;
                    self.disconnect(now);
                }
                Received::Broken => {
                    self.counters.broken_protocol += 1;
                    self.disconnect(now);
                }
            }
        }
        (requests.max(pieces), false)
    }

    fn execute(&mut self, mut request: Request, now: Time) {
        self.counters.requests += 1;
        let header = request.header;
        let result = self.answer(&mut request, now);
        self.counters.stray_fds += request.fds.len() as u64;
        match result {
            Ok(Outcome::Reply(payload, fd)) => self.reply(header, payload, fd),
            Ok(Outcome::Later(payload, work)) => {
                self.pending = Some(Pending { header: Some(header), payload, work });
                self.advance(now);
            }
            Err(errno) => self.refuse(header, errno),
        }
        if let Some(connection) = &mut self.connection {
            connection.closing = connection.client.is_none();
            connection.recycle(request.payload);
        }
    }

    fn answer(&mut self, request: &mut Request, now: Time) -> Result<Outcome, u32> {
        let agreed = self.connection.as_ref().and_then(|connection| connection.client);
        let payload = &request.payload[..];
        let Some(client) = agreed else {
            return match request.header.command {
                command::VERSION if request.fds.is_empty() => self.version(payload),
                _ => Err(errno::EINVAL),
            };
        };
        match request.header.command {
            command::DMA_MAP => {
                let (map, _) = DmaMap::take(payload).ok_or(errno::EINVAL)?;
                match self.windows.map(self.slot.space(), &map, &mut request.fds)? {
                    Mapped::Usable => self.counters.maps += 1,
                    Mapped::Unusable => self.counters.unusable_maps += 1,
                    Mapped::Again => {}
                }
                Ok(Outcome::empty())
            }
            command::DMA_UNMAP => {
                let (unmap, _) = DmaUnmap::take(payload).ok_or(errno::EINVAL)?;
                let before = self.windows.len();
                let unmapping = self.windows.unmap(self.slot.space(), &unmap)?;
                self.counters.unmaps += (before - self.windows.len()) as u64;
                Ok(Outcome::Later(unmap.as_bytes().to_vec(), Work::Unmap(unmapping)))
            }
            command::GET_INFO => {
                let (info, _) = DeviceInfo::take(payload).ok_or(errno::EINVAL)?;
                if info.argsz < 16 {
                    return Err(errno::EINVAL);
                }
                let flags = DeviceInfo::RESET | DeviceInfo::PCI;
                Ok(Outcome::of(&DeviceInfo { argsz: 16, flags, regions: region::COUNT, irqs: irq::COUNT }))
            }
            command::GET_REGION_INFO => {
                let (info, _) = RegionInfo::take(payload).ok_or(errno::EINVAL)?;
                let (reply, fd) = self.regions.info(&info, client.max_msg_fds > 0)?;
                Ok(Outcome::Reply(reply, fd))
            }
            command::GET_REGION_IO_FDS => {
                let (fds, _) = RegionIoFds::take(payload).ok_or(errno::EINVAL)?;
                if fds.argsz < 16 || fds.index >= region::COUNT || fds.flags != 0 {
                    return Err(errno::EINVAL);
                }
                Ok(Outcome::of(&RegionIoFds { argsz: 16, flags: 0, index: fds.index, count: 0 }))
            }
            command::GET_IRQ_INFO => {
                let (info, _) = IrqInfo::take(payload).ok_or(errno::EINVAL)?;
                Ok(Outcome::of(&self.interrupts.info(&info)?))
            }
            command::SET_IRQS => {
                let (set, bools) = IrqSet::take(payload).ok_or(errno::EINVAL)?;
                if request.fds.len() > self.config.max_msg_fds as usize {
                    return Err(errno::EINVAL);
                }
                self.interrupts.set(&set, bools, &mut request.fds)?;
                Ok(Outcome::empty())
            }
            command::REGION_READ => self.region_read(payload, client.max_data_xfer_size),
            command::REGION_WRITE => self.region_write(payload, now),
            command::REGION_WRITE_MULTI if client.write_multiple => self.write_multiple(payload, now),
            command::RESET => self.begin_reset(Vec::new(), now),
            command::DEVICE_FEATURE => {
                let max = self.config.max_data_bytes as usize;
                match self.migration.feature(payload, max, &mut *self.hooks, &mut self.regions, now)? {
                    Answer::Reply(reply) => Ok(Outcome::Reply(reply, None)),
                    Answer::Later(reply) => Ok(Outcome::Later(reply, Work::Arcs)),
                    Answer::Log => Ok(Outcome::Later(Vec::new(), Work::Log)),
                }
            }
            command::MIG_DATA_READ => {
                let (data, _) = MigData::take(payload).ok_or(errno::EINVAL)?;
                let room = u64::from(data.argsz) >= u64::from(data.size) + 8;
                if !room || data.size > self.config.max_data_bytes.min(client.max_data_xfer_size) {
                    return Err(errno::EINVAL);
                }
                match self.migration.read(data.size as usize, &mut *self.hooks, &self.regions)? {
                    Some(part) => Ok(Outcome::Reply(stream_part(part), None)),
                    None => Ok(Outcome::Later(Vec::new(), Work::Stream(data.size))),
                }
            }
            command::MIG_DATA_WRITE => {
                let (data, bytes) = MigData::take(payload).ok_or(errno::EINVAL)?;
                if data.size as usize != bytes.len() || data.size > self.config.max_data_bytes {
                    return Err(errno::EINVAL);
                }
                self.migration.write(bytes)?;
                Ok(Outcome::empty())
            }
            _ => Err(errno::EINVAL),
        }
    }

    /// VERSION: the reply is not longer than the request, where that had capabilities, for clients that have no more room.
    fn version(&mut self, payload: &[u8]) -> Result<Outcome, u32> {
        let (version, text) = Version::take(payload).ok_or(errno::EINVAL)?;
        let client = Capabilities::parse(text).map_err(|_| errno::EINVAL)?;
        if version.major != 0 {
            return Err(errno::EINVAL);
        }
        let own = Capabilities {
            max_msg_fds: self.config.max_msg_fds,
            max_data_xfer_size: self.config.max_data_bytes,
            max_dma_maps: self.config.max_dma_maps,
            pgsizes: 4096,
            write_multiple: client.write_multiple,
        };
        let mut reply = Version { major: 0, minor: version.minor.min(VERSION_MINOR) }.as_bytes().to_vec();
        let fits = |json: &Vec<u8>| text.is_empty() || json.len() <= text.len();
        let answers = [own.to_json(false), own.to_json(true), b"{}\0".to_vec()];
        reply.extend(answers.into_iter().find(fits).unwrap_or_default());
        if let Some(connection) = &mut self.connection {
            connection.client = Some(client);
        }
        Ok(Outcome::Reply(reply, None))
    }

    /// The start of a reply to an access: doorbells may come this way, so nothing is allocated for it.
    fn begin(&mut self, access: &RegionAccess) -> Vec<u8> {
        match &mut self.connection {
            Some(connection) => connection.begin(access.as_bytes()),
            None => access.as_bytes().to_vec(),
        }
    }

    /// REGION_READ; `most` is what the client takes.
    fn region_read(&mut self, payload: &[u8], most: u32) -> Result<Outcome, u32> {
        let (access, _) = RegionAccess::take(payload).ok_or(errno::EINVAL)?;
        if access.count == 0 {
            return Ok(Outcome::empty());
        }
        if access.count > self.config.max_data_bytes.min(most) {
            return Err(errno::EINVAL);
        }
        let mut reply = self.begin(&access);
        self.regions.read(access.region, access.offset, access.count as usize, &mut reply)?;
        Ok(Outcome::Reply(reply, None))
    }

    fn region_write(&mut self, payload: &[u8], now: Time) -> Result<Outcome, u32> {
        let (access, data) = RegionAccess::take(payload).ok_or(errno::EINVAL)?;
        if data.len() != access.count as usize {
            return Err(errno::EINVAL);
        }
        if access.count == 0 {
            return Ok(Outcome::empty());
        }
        let effect = self.regions.write(access.region, access.offset, data)?;
        let reply = self.begin(&access);
        if effect == Effect::Reset { self.begin_reset(reply, now) } else { Ok(Outcome::Reply(reply, None)) }
    }

    /// REGION_WRITE_MULTI: in order, up to the first that is refused. A reset that one asks for comes after the others.
    fn write_multiple(&mut self, payload: &[u8], now: Time) -> Result<Outcome, u32> {
        let (head, mut rest) = WriteMulti::take(payload).ok_or(errno::EINVAL)?;
        let bytes = usize::try_from(head.count).ok().and_then(|count| count.checked_mul(size_of::<MultiWrite>()));
        if bytes != Some(rest.len()) {
            return Err(errno::EINVAL);
        }
        let (mut count, mut reset) = (0, false);
        while let Some((write, more)) = MultiWrite::take(rest) {
            let Some(data) = write.data.get(..write.count as usize) else { break };
            let Ok(effect) = self.regions.write(write.region, write.offset, data) else { break };
            reset |= effect == Effect::Reset;
            (count, rest) = (count + 1, more);
        }
        let reply = WriteMulti { count }.as_bytes().to_vec();
        if reset { self.begin_reset(reply, now) } else { Ok(Outcome::Reply(reply, None)) }
    }

    fn begin_reset(&mut self, reply: Vec<u8>, now: Time) -> Result<Outcome, u32> {
        if self.migration.begin_reset(&mut *self.hooks, now) {
            return Ok(Outcome::Later(reply, Work::GiveBack));
        }
        let until = self.reset_function(now)?;
        Ok(Outcome::Later(reply, Work::Quiet(until)))
    }

    fn reset_function(&mut self, now: Time) -> Result<Time, u32> {
        self.counters.resets += 1;
        self.regions.reset().map_err(|_| errno::EIO)?;
        Ok(now.after_ms(self.config.reset_wait_ms.into()))
    }

    /// Serves whoever waits, if nobody is there any more; `alive` = whoever is being served is known to be there.
    fn welcome(&mut self, alive: bool, now: Time) -> u32 {
        if self.waiting.is_some() && self.is_idle() {
            let limit = self.config.max_data_bytes as usize + OVERHEAD;
            self.connection = self.waiting.take().map(|stream| Connection::new(stream, limit));
            self.next_receive = Time(0);
            self.greeting_ends = now.after_ms(self.config.handshake_ms.into());
            self.counters.clients += 1;
            return 1;
        }
        if alive && self.waiting.take().is_some() {
            self.counters.refused_busy += 1;
            return 1;
        }
        0
    }
}

/// The reply to MIG_DATA_READ.
fn stream_part(mut data: Vec<u8>) -> Vec<u8> {
    let size = data.len() as u32;
    let mut reply = MigData { argsz: size + 8, size }.as_bytes().to_vec();
    reply.append(&mut data);
    reply
}

impl Poll for VfioUserServer {
    fn poll(&mut self, now: Time) -> Progress {
        if !self.leaving.is_empty() {
            self.leaving.retain(|unmapping| !unmapping.is_done());
        }
        if self.slot.is_gone() {
            self.interrupts.report_gone();
        }
        let mut work = u32::from(self.advance(now)) + u32::from(self.interrupts.look(now));
        let tends = self.migration.tend_log(&mut *self.hooks, now);
        if self.connection.is_some() && now >= self.next_look {
            self.next_look = now.after_us(MEMORY_LOOK_US);
            if self.windows.is_broken() {
                self.counters.broken_memory += 1;
                self.disconnect(now);
            }
        }
        if now > self.greeting_ends && self.is_half_open() {
            self.counters.handshake_timeouts += 1;
            self.disconnect(now);
        }
        let (served, alive) = self.serve(now);
        work += served + self.welcome(alive && self.connection.is_some(), now);
        let blocked = alive && self.connection.as_ref().is_some_and(Connection::is_sending);
        match () {
            () if work > 0 => Progress::busy(work),
            () if tends || self.pending.is_some() || !self.leaving.is_empty() => Progress::idle_until(now.after_us(LOOK_AGAIN_US)),
            () if blocked => Progress::idle_until(now.after_us(BLOCKED_US)),
            () if self.is_half_open() => Progress::idle_until(self.greeting_ends.after_ns(1)),
            () => Progress { work: 0, next: Next::OnWake },
        }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        // A client whose requests are not taken now would keep the core awake for nothing.
        let listening = |connection: &&Connection| self.pending.is_none() && !connection.is_sending();
        if let Some(waker) = self.connection.as_ref().filter(listening).and_then(Connection::waker) {
            visit(waker);
        }
        self.interrupts.wakers().for_each(visit);
    }
}
