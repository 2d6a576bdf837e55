//! The vfio-user client: a PCI function behind a Unix socket as a backing of the device seam.
//!
//! The connection is a [`Stream`] that somebody connected. Everything the driver does with registers is a message and its reply;
//! doorbells are stores where the server lends their page, and messages otherwise. Memory is lent to the server as it is mapped
//! in the function's [`AddressSpace`]; interrupts come by eventfds. Requests are synchronous and each ends within the time given
//! at the start; a server that is late, gone, or breaks the protocol is not spoken to again: registers read all ones from then
//! on, as those of a function that was pulled out.
//!
//! Not here: reconnecting (a new client is made, and the controller initialised again), message access to memory for servers
//! that map nothing (their DMA_READ and DMA_WRITE are turned down), INTx and MSI, the ioeventfds of
//! DEVICE_GET_REGION_IO_FDS. Adjacent mappings are not joined: each is a DMA window of the server's.

use super::client_link::{Link, Request};
use super::client_region::{self, MappedArea};
use super::wire::{
    Capabilities, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionAccess, RegionInfo, VERSION_MINOR, Version, command, dma,
    irq, region,
};
use crate::event::EventLine;
use crate::function::{Doorbell, Function};
use crate::memory::PAGE;
use crate::socket::{MAX_FDS, Stream};
use crate::space::{AddressSpace, MAX_MAPPINGS, MapFollower, Mapping, SpaceError};
use dray_nvme::registers::offset;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use zerocopy::IntoBytes;

pub use super::client_link::ClientError;

/// Most bytes of a VERSION reply's payload.
const MAX_VERSION_BYTES: usize = 4096;
/// Most capabilities of the configuration space that are looked at.
const MAX_PCI_CAPABILITIES: u32 = 48;
/// Command register: memory space, bus master, no INTx (PCI 3.0 §6.2.2).
const PCI_COMMAND: u16 = 0x0406;
const PCI_CAP_MSIX: u8 = 0x11;

/// How a client behaves.
#[derive(Clone, Copy, Debug)]
pub struct ClientConfig {
    /// Milliseconds that a request may take in all.
    pub timeout_ms: u32,
    /// Most interrupt vectors to set up; 0 for a driver that polls.
    pub vectors: u16,
    /// Largest number of data bytes in one message that is taken.
    pub max_data: u32,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self { timeout_ms: 5000, vectors: 64, max_data: super::wire::DEFAULT_DATA_BYTES }
    }
}

/// One region, as the server describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Bits of [`RegionInfo`].
    pub flags: u32,
    /// Bytes; 0 = no such region.
    pub size: u64,
}

/// A function of a vfio-user server.
#[derive(Debug)]
pub struct VfioUserClient {
    me: Weak<Self>,
    link: Arc<Link>,
    space: AddressSpace,
    capabilities: Capabilities,
    max_data: u32,
    info: DeviceInfo,
    regions: Vec<Region>,
    /// The parts of BAR0 that are mapped.
    areas: Vec<MappedArea>,
    lines: Vec<EventLine>,
}

impl VfioUserClient {
    /// Speaks with the server at the other end of `stream` until its function can be driven: version, regions, interrupts, the
    /// mappings of `space` that are there and those to come.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(stream: Box<dyn Stream>, space: AddressSpace, config: &ClientConfig) -> Result<Arc<Self>, ClientError> {
        let link = Arc::new(Link::new(stream, config.timeout_ms)?);
        let ours = Capabilities {
            max_msg_fds: MAX_FDS as u32,
            max_data_xfer_size: config.max_data.max(PAGE as u32),
            max_dma_maps: MAX_MAPPINGS as u32,
            ..Capabilities::default()
        };
        let capabilities = negotiate(&link, &ours)?;
        let info = link.call(
            &Request {
                reply: (16, 256),
                ..Request::new(command::GET_INFO, DeviceInfo { argsz: 16, ..DeviceInfo::default() }.as_bytes(), 0)
            },
            |payload, _| Ok(DeviceInfo::take(payload).ok_or(ClientError::Protocol("no device"))?.0),
        )?;
        if info.flags & DeviceInfo::PCI == 0 || info.regions == 0 {
            return Err(ClientError::NoFunction("is no PCI function"));
        }
        let (regions, areas) = look_at_regions(&link, info.regions.min(region::COUNT))?;
        let mut client = Self {
            me: Weak::new(),
            link,
            space,
            max_data: ours.max_data_xfer_size.min(capabilities.max_data_xfer_size),
            capabilities,
            info,
            regions,
            areas,
            lines: Vec::new(),
        };
        client.lines = client.set_lines(config.vectors)?;
        client.bring_up()?;
        client.follow_space()?;
        Ok(Arc::new_cyclic(|me| {
            client.me = me.clone();
            client
        }))
    }

    /// Whether nothing can be asked of the server any more. Costs a few loads; a server that has closed the connection is
    /// noticed at the next request, or by [`look`](Self::look).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.link.is_gone() || self.areas.iter().any(|area| area.arena.is_broken())
    }

    /// Why the connection ended, if it has.
    #[must_use]
    pub fn why_gone(&self) -> Option<&str> {
        let broken = self.areas.iter().any(|area| area.arena.is_broken());
        self.link.why().or(broken.then_some("the vfio-user server took its doorbells away"))
    }

    /// Takes what the server sent without being asked, or notices that it has closed the connection; does not wait. Says
    /// whether the server is still there.
    #[must_use]
    pub fn look(&self) -> bool {
        self.link.look() && !self.is_gone()
    }

    /// Readable when [`look`](Self::look) has something to do.
    #[must_use]
    pub fn waker(&self) -> BorrowedFd<'_> {
        self.link.socket()
    }

    /// Requests that the server has answered with an error, register accesses included.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.link.refused()
    }

    /// Commands of the server that were turned down.
    #[must_use]
    pub fn turned_down(&self) -> u64 {
        self.link.turned_down()
    }

    /// What the server said of itself.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The server's device.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// A region; see [`region`] for the indices.
    #[must_use]
    pub fn region(&self, index: u32) -> Region {
        self.regions.get(index as usize).copied().unwrap_or_default()
    }

    /// Largest number of data bytes in one message, in either direction.
    #[must_use]
    pub fn max_data(&self) -> u32 {
        self.max_data
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Reads bytes of a region, by messages.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the server does not have them; otherwise the connection's end.
    pub fn read_region(&self, index: u32, at: u64, into: &mut [u8]) -> Result<(), ClientError> {
        let mut from = at;
        for piece in into.chunks_mut(self.max_data as usize) {
            let access = RegionAccess { offset: from, region: index, count: piece.len() as u32 };
            let len = size_of::<RegionAccess>() + piece.len();
            self.link.call(&Request::new(command::REGION_READ, access.as_bytes(), len), |payload, _| {
                let (echo, data) = RegionAccess::take(payload).ok_or(ClientError::Protocol("a read without header"))?;
                if echo.count != access.count || data.len() != piece.len() {
                    return Err(ClientError::Protocol("the reply to another read"));
                }
                piece.copy_from_slice(data);
                Ok(())
            })?;
            from = from.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes bytes of a region, by messages.
    ///
    /// # Errors
    /// As [`read_region`](Self::read_region).
    pub fn write_region(&self, index: u32, at: u64, from: &[u8]) -> Result<(), ClientError> {
        let mut into = at;
        for piece in from.chunks(self.max_data as usize) {
            let access = RegionAccess { offset: into, region: index, count: piece.len() as u32 };
            let payload = [access.as_bytes(), piece];
            let request = Request { command: command::REGION_WRITE, payload, fds: &[], reply: (16, 16) };
            self.link.call(&request, |payload, _| match RegionAccess::take(payload) {
                Some((echo, _)) if echo.count == access.count => Ok(()),
                _ => Err(ClientError::Protocol("the reply to another write")),
            })?;
            into = into.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Sets as many interrupt vectors up as both have, in as many messages as the server's limit of descriptors asks for. A
    /// server that refuses them is polled.
    fn set_lines(&self, most: u16) -> Result<Vec<EventLine>, ClientError> {
        let at_once = (self.capabilities.max_msg_fds as usize).min(MAX_FDS);
        if most == 0 || at_once == 0 || self.info.irqs <= irq::MSIX {
            return Ok(Vec::new());
        }
        let ask = IrqInfo { argsz: 16, index: irq::MSIX, ..IrqInfo::default() };
        let request = Request::new(command::GET_IRQ_INFO, ask.as_bytes(), 16);
        let there = unless_refused(self.link.call(&request, |payload, _| {
            Ok(IrqInfo::take(payload).ok_or(ClientError::Protocol("no interrupts"))?.0)
        }))?;
        let Some(there) = there.filter(|info| info.flags & IrqInfo::EVENTFD != 0) else { return Ok(Vec::new()) };
        let count = there.count.min(u32::from(most));
        let lines = (0..count).map(|_| EventLine::new()).collect::<io::Result<Vec<_>>>()?;
        let mut start = 0;
        for chunk in lines.chunks(at_once) {
            let fds: Vec<BorrowedFd<'_>> = chunk.iter().map(AsFd::as_fd).collect();
            let flags = IrqSet::DATA_EVENTFD | IrqSet::TRIGGER;
            let set = IrqSet { argsz: 20, flags, index: irq::MSIX, start, count: chunk.len() as u32 };
            let request = Request { fds: &fds, ..Request::lax(command::SET_IRQS, set.as_bytes()) };
            if unless_refused(self.link.call(&request, |_, _| Ok(())))?.is_none() {
                return Ok(Vec::new());
            }
            start += chunk.len() as u32;
        }
        Ok(lines)
    }

    /// Lets the function access memory and raise interrupts, as far as it has configuration space. Servers differ in how much of
    /// it they have, so what they refuse is left.
    fn bring_up(&self) -> Result<(), ClientError> {
        if self.region(region::CONFIG).size < 64 {
            return Ok(());
        }
        unless_refused(self.write_region(region::CONFIG, 4, &PCI_COMMAND.to_le_bytes()))?;
        if self.lines.is_empty() {
            return Ok(());
        }
        unless_refused(self.enable_msix()).map(drop)
    }

    /// Turns MSI-X on, and unmasks the vectors in its table (PCI 3.0 §6.8.2).
    fn enable_msix(&self) -> Result<(), ClientError> {
        let Some(at) = self.find_msix()? else { return Ok(()) };
        let mut capability = [0; 8];
        self.read_region(region::CONFIG, at, &mut capability)?;
        let control = u16::from_le_bytes([capability[2], capability[3]]) & !(1 << 14) | 1 << 15;
        self.write_region(region::CONFIG, at + 2, &control.to_le_bytes())?;
        let table = u32::from_le_bytes([capability[4], capability[5], capability[6], capability[7]]);
        let (bar, table) = (table & 7, u64::from(table & !7));
        let vectors = (self.lines.len() as u64).min(u64::from(control & 0x7ff) + 1);
        if bar > region::BAR5 || table + 16 * vectors > self.region(bar).size {
            return Ok(());
        }
        for vector in 0..vectors {
            self.write_region(bar, table + 16 * vector + 12, &[0; 4])?;
        }
        Ok(())
    }

    fn find_msix(&self) -> Result<Option<u64>, ClientError> {
        let mut at = [0];
        self.read_region(region::CONFIG, 0x34, &mut at)?;
        for _ in 0..MAX_PCI_CAPABILITIES {
            let here = u64::from(at[0] & !3);
            if here < 64 {
                break;
            }
            let mut head = [0; 2];
            self.read_region(region::CONFIG, here, &mut head)?;
            if head[0] == PCI_CAP_MSIX {
                return Ok(Some(here));
            }
            at[0] = head[1];
        }
        Ok(None)
    }

    fn follow_space(&self) -> Result<(), ClientError> {
        let page = self.capabilities.pgsizes & self.capabilities.pgsizes.wrapping_neg();
        let follower = DmaFollower {
            link: Arc::clone(&self.link),
            left: self.capabilities.max_dma_maps,
            descriptors: self.capabilities.max_msg_fds > 0,
            page: page.max(PAGE as u64),
        };
        self.space.follow(Box::new(follower)).map_err(|error| match error {
            SpaceError::Device(error) => ClientError::Io(error),
            other => ClientError::Io(io::Error::other(other)),
        })
    }
}

impl Drop for VfioUserClient {
    fn drop(&mut self) {
        // The space may live on with others in it, and with it the follower.
        self.link.close(&ClientError::Gone);
    }
}

fn negotiate(link: &Link, ours: &Capabilities) -> Result<Capabilities, ClientError> {
    let version = Version { major: 0, minor: VERSION_MINOR };
    let json = ours.to_json(false);
    let payload = [version.as_bytes(), &json];
    let request = Request { command: command::VERSION, payload, fds: &[], reply: (4, MAX_VERSION_BYTES) };
    link.call(&request, |payload, _| {
        let (version, json) = Version::take(payload).ok_or(ClientError::Protocol("no version"))?;
        if version.major != 0 || version.minor > VERSION_MINOR {
            return Err(ClientError::Version { major: version.major, minor: version.minor });
        }
        let theirs = Capabilities::parse(json).map_err(|_| ClientError::Protocol("capabilities that are no JSON"))?;
        if theirs.max_data_xfer_size < 8 || theirs.pgsizes == 0 {
            return Err(ClientError::Protocol("capabilities that leave nothing to do"));
        }
        Ok(theirs)
    })
}

/// Every region, and the mapped parts of BAR0. A server may refuse to describe regions that it does not have.
fn look_at_regions(link: &Link, count: u32) -> Result<(Vec<Region>, Vec<MappedArea>), ClientError> {
    let mut regions = Vec::new();
    let mut areas = Vec::new();
    for index in 0..count {
        let described = unless_refused(client_region::describe(link, index))?.unwrap_or_default();
        regions.push(Region { flags: described.info.flags, size: described.info.size });
        if index == region::BAR0 {
            areas = client_region::map(described)?;
        }
    }
    let bar = regions.first().copied().unwrap_or_default();
    if bar.size < u64::from(offset::DOORBELLS) + 8 || bar.flags & RegionInfo::READ == 0 || bar.flags & RegionInfo::WRITE == 0 {
        return Err(ClientError::NoFunction("has no BAR0 with registers and doorbells"));
    }
    Ok((regions, areas))
}

fn unless_refused<T>(result: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ClientError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Function for VfioUserClient {
    fn read32(&self, offset: u32) -> u32 {
        let mut word = [0; 4];
        match self.read_region(region::BAR0, u64::from(offset), &mut word) {
            Ok(()) if !self.is_gone() => u32::from_le_bytes(word),
            _ => u32::MAX,
        }
    }

    fn write32(&self, offset: u32, value: u32) {
        // As on a bus, nobody hears of a write that was refused, or that nobody took; they are counted.
        let _refused = self.write_region(region::BAR0, u64::from(offset), &value.to_le_bytes());
    }

    fn doorbell(&self, at: u32) -> Option<Doorbell> {
        let end = u64::from(at) + 4;
        if at < offset::DOORBELLS || !at.is_multiple_of(4) || end > self.region(region::BAR0).size {
            return None;
        }
        let inside = |area: &&MappedArea| {
            area.arena.is_writable() && area.offset <= u64::from(at) && end <= area.offset + area.arena.len() as u64
        };
        if let Some(area) = self.areas.iter().find(inside) {
            let offset = usize::try_from(u64::from(at) - area.offset).ok()?;
            return Some(Doorbell::Mapped { arena: Arc::clone(&area.arena), offset });
        }
        Some(Doorbell::Trapped { function: self.me.upgrade()?, offset: at })
    }

    fn space(&self) -> &AddressSpace {
        &self.space
    }

    fn event_line(&self, vector: u16) -> Option<EventLine> {
        self.lines.get(usize::from(vector)).cloned()
    }

    fn reset(&self) -> io::Result<()> {
        self.link.call(&Request::lax(command::RESET, &[]), |_, _| Ok(()))?;
        Ok(self.bring_up()?)
    }
}

/// Tells the server of memory that comes and goes.
struct DmaFollower {
    link: Arc<Link>,
    /// DMA windows that the server has left.
    left: u32,
    /// The server takes descriptors.
    descriptors: bool,
    /// Bytes that windows are multiples of.
    page: u64,
}

impl DmaFollower {
    /// Bytes of a window: whole pages, as far as the memory has them.
    fn window(&self, mapping: &Mapping) -> u64 {
        let len = mapping.memory.len() as u64;
        let room = (mapping.memory.arena().len() - mapping.memory.offset()) as u64;
        Some(len.next_multiple_of(self.page)).filter(|&whole| whole <= room).unwrap_or(len)
    }

    fn map(&self, mapping: &Mapping) -> Result<(), ClientError> {
        let (arena, size) = (mapping.memory.arena(), self.window(mapping));
        let offset = arena.file_offset() + mapping.memory.offset() as u64;
        if self.left == 0 {
            return Err(ClientError::Limit("more DMA windows"));
        }
        if !self.descriptors {
            return Err(ClientError::Limit("descriptors"));
        }
        if [mapping.iova, offset].iter().any(|at| !at.is_multiple_of(self.page)) {
            return Err(ClientError::Limit("pages of that size"));
        }
        let flags = if mapping.writable { dma::READ | dma::WRITE } else { dma::READ };
        let map = DmaMap { argsz: 32, flags, offset, address: mapping.iova, size };
        let request = Request { fds: &[arena.as_fd()], ..Request::lax(command::DMA_MAP, map.as_bytes()) };
        self.link.call(&request, |_, _| Ok(()))
    }

    fn unmap(&self, mapping: &Mapping) -> Result<(), ClientError> {
        let unmap = DmaUnmap { argsz: 24, flags: 0, address: mapping.iova, size: self.window(mapping) };
        let request = Request::lax(command::DMA_UNMAP, unmap.as_bytes());
        self.link.call(&request, |_, _| Ok(()))
    }
}

impl MapFollower for DmaFollower {
    fn mapped(&mut self, mapping: &Mapping) -> io::Result<()> {
        // Nobody is there who could access it; others in the space need not suffer.
        if self.link.is_gone() {
            return Ok(());
        }
        self.map(mapping)?;
        self.left -= 1;
        Ok(())
    }

    fn unmapped(&mut self, mapping: &Mapping) {
        if self.link.is_gone() {
            return;
        }
        match self.unmap(mapping) {
            Ok(()) => self.left += 1,
            // It may go on writing there, and the memory is about to be used for something else.
            Err(error) => self.link.close(&error),
        }
    }
}
