//! A client that says exactly what a test wants, and the server in the same thread.

use dray_controller::{
    ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig,
};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::socket::{Stream, UnixSocket};
use dray_device::space::AddressSpace;
use dray_device::vfio_user::wire::{Header, RegionAccess, command, flags, region};
use dray_export::hooks::{MigrationHooks, NoMigration};
use dray_export::vfio_user::{VfioUserConfig, VfioUserServer};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zerocopy::{FromBytes, IntoBytes};

pub const CONTROLLER: u16 = 2;
pub const VECTORS: u16 = 5;
pub const QEMU_JSON: &[u8] = b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"pgsizes\":4096,\
\"max_dma_maps\":65535,\"migration\":{\"pgsize\":4096,\"max_bitmap_size\":268435456},\"write_multiple\":true}}\0";

/// What a request came to besides success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// An error reply.
    Errno(u32),
    /// The server has disconnected.
    Closed,
    /// No reply yet.
    Nothing,
}

pub struct Rig {
    pub server: VfioUserServer,
    pub subsystem: Option<Subsystem>,
    pub client: UnixSocket,
    pub now: Time,
    id: u16,
}

pub fn subsystem() -> Subsystem {
    let controller = ControllerConfig {
        cntlid: CONTROLLER,
        role: ControllerRole::Migratable,
        namespaces: vec![1],
        io_queues: 4,
        vectors: VECTORS,
        fence: Fence::default(),
    };
    let config = SubsystemConfig { controllers: vec![controller], ..SubsystemConfig::default() };
    let namespace =
        NamespaceConfig { nsid: 1, nguid: [1; 16], eui64: [1; 8], uuid: [1; 16], shared: true, write_protected: false };
    let backing = MemoryBacking::new(4 << 20, 512).expect("backing");
    Subsystem::new(config, vec![(namespace, Box::new(backing))]).expect("subsystem")
}

pub fn slot() -> Slot {
    Slot::without_lines(AddressSpace::default(), VECTORS).expect("slot")
}

impl Rig {
    /// A server whose client has said VERSION; the slot is empty.
    pub fn new() -> Self {
        Self::with(VfioUserConfig::default(), Box::new(NoMigration))
    }

    pub fn with(config: VfioUserConfig, hooks: Box<dyn MigrationHooks>) -> Self {
        let mut rig = Self::raw(config, hooks);
        rig.hello().expect("version");
        rig
    }

    /// A server whose client has said nothing.
    pub fn raw(config: VfioUserConfig, hooks: Box<dyn MigrationHooks>) -> Self {
        let mut server = VfioUserServer::new(slot(), config, hooks);
        let (client, stream) = UnixSocket::pair().expect("pair");
        server.attach(Box::new(stream)).expect("attached");
        Self { server, subsystem: None, client, now: Time(1_000), id: 0 }
    }

    /// Puts a real controller into the slot.
    pub fn plug(&mut self) {
        let subsystem = subsystem();
        self.server.slot().point_at(&subsystem.plug(CONTROLLER).expect("plug"));
        self.subsystem = Some(subsystem);
        self.poll();
    }

    pub fn poll(&mut self) {
        self.now = self.now.after_us(10);
        let _progress = self.server.poll(self.now);
        if let Some(subsystem) = &mut self.subsystem {
            let _progress = subsystem.poll(self.now);
        }
    }

    /// Another client; the one before is dropped.
    pub fn reconnect(&mut self) {
        let (client, stream) = UnixSocket::pair().expect("pair");
        self.client = client;
        self.server.attach(Box::new(stream)).expect("attached");
    }

    pub fn hello(&mut self) -> Result<Vec<u8>, Failure> {
        let mut payload = vec![0, 0, 0, 0];
        payload.extend_from_slice(QEMU_JSON);
        self.ask(command::VERSION, &payload)
    }

    pub fn send(&mut self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let bytes = [header.as_bytes(), payload].concat();
        let mut sent = 0;
        while sent < bytes.len() {
            let fds = if sent == 0 { fds } else { &[] };
            match self.client.send(&[IoSlice::new(&bytes[sent..])], fds) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.poll(),
                Err(_) => return,
            }
        }
    }

    /// Sends a request and does not wait; returns its header.
    pub fn post(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Header {
        self.id = self.id.wrapping_add(1);
        let header = Header::command(self.id, command, payload.len());
        self.send(header, payload, fds);
        header
    }

    fn read(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>, polls: u32) -> Result<(), Failure> {
        let mut got = 0;
        for _ in 0..polls {
            match self.client.recv(&mut into[got..], fds) {
                Ok(0) if got < into.len() => return Err(Failure::Closed),
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.poll(),
                Err(_) => return Err(Failure::Closed),
            }
            if got == into.len() {
                return Ok(());
            }
        }
        Err(Failure::Nothing)
    }

    /// The next reply.
    pub fn reply(&mut self, polls: u32) -> Result<(Header, Vec<u8>, Vec<OwnedFd>), Failure> {
        let (mut bytes, mut fds) = ([0; 16], Vec::new());
        self.read(&mut bytes, &mut fds, polls)?;
        let header = Header::read_from_bytes(&bytes).expect("header");
        assert!(header.is_reply(), "{header:?}");
        let mut payload = vec![0; header.payload_len(64 << 20).expect("size")];
        if !payload.is_empty() {
            self.read(&mut payload, &mut fds, 100_000)?;
        }
        Ok((header, payload, fds))
    }

    pub fn ask_with(
        &mut self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), Failure> {
        let asked = self.post(command, payload, fds);
        let (header, payload, fds) = self.reply(1_000)?;
        assert_eq!((header.id, header.command), (asked.id, asked.command));
        match header.failure() {
            Some(errno) => {
                assert!(payload.is_empty() && fds.is_empty(), "an error reply is a header");
                Err(Failure::Errno(errno))
            }
            None => Ok((payload, fds)),
        }
    }

    pub fn ask(&mut self, command: u16, payload: &[u8]) -> Result<Vec<u8>, Failure> {
        self.ask_with(command, payload, &[]).map(|(payload, _)| payload)
    }

    /// A request without a reply.
    pub fn tell(&mut self, command: u16, payload: &[u8]) {
        self.id = self.id.wrapping_add(1);
        let mut header = Header::command(self.id, command, payload.len());
        header.flags |= flags::NO_REPLY;
        self.send(header, payload, &[]);
    }

    pub fn region_read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, Failure> {
        let access = RegionAccess { offset, region, count };
        let reply = self.ask(command::REGION_READ, access.as_bytes())?;
        assert_eq!(&reply[..16], access.as_bytes());
        Ok(reply[16..].to_vec())
    }

    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Failure> {
        let access = RegionAccess { offset, region, count: data.len() as u32 };
        let reply = self.ask(command::REGION_WRITE, &[access.as_bytes(), data].concat())?;
        assert_eq!(reply, access.as_bytes());
        Ok(())
    }

    pub fn register(&mut self, offset: u32) -> u32 {
        let bytes = self.region_read(region::BAR0, offset.into(), 4).expect("read");
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    }
}

/// Shared memory of whole pages.
pub fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("client", MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("size");
    fd
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

/// How often an eventfd was signalled.
pub fn signals(fd: &impl AsFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

pub fn errno(result: Result<impl std::fmt::Debug, Failure>) -> u32 {
    match result {
        Err(Failure::Errno(errno)) => errno,
        other => panic!("expected an error reply, got {other:?}"),
    }
}
