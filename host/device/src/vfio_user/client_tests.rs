//! The client against a small server in the same thread: it answers what is sent the moment it is sent, properly or not.

use super::client::{ClientConfig, ClientError, VfioUserClient};
use super::wire::{
    Capabilities, DeviceFeature, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, HEADER_BYTES, Header, IrqInfo, IrqSet, LogRange,
    LoggingReport, LoggingStart, MigData, RegionAccess, RegionInfo, SparseArea, SparseMmap, Version, command, dma, errno, feature,
    flags, irq, migration, region, state,
};
use crate::event::EventLine;
use crate::function::{Doorbell, Function};
use crate::memory::{Access, Arena, DmaBuffer, PAGE, Pages};
use crate::socket::{Stream, UnixSocket};
use crate::space::AddressSpace;
use dray_nvme::registers::offset;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use zerocopy::IntoBytes;

type Message = (Vec<u8>, Vec<OwnedFd>);

/// What the server makes of each command.
type Answer = Box<dyn FnMut(Header, &[u8], Vec<OwnedFd>) -> Option<Vec<Message>> + Send>;

/// A stream whose other end is a function.
struct Script {
    answer: Answer,
    sent: Vec<u8>,
    fds: Vec<OwnedFd>,
    coming: VecDeque<Message>,
    closed: bool,
    waker: OwnedFd,
}

impl Script {
    fn new(answer: Answer) -> Box<Self> {
        let waker = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).expect("eventfd");
        Box::new(Self { answer, sent: Vec::new(), fds: Vec::new(), coming: VecDeque::new(), closed: false, waker })
    }
}

impl Stream for Script {
    fn recv(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let Some((bytes, with)) = self.coming.front_mut() else {
            return if self.closed { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        };
        fds.append(with);
        let n = into.len().min(bytes.len());
        into[..n].copy_from_slice(&bytes[..n]);
        bytes.drain(..n);
        if bytes.is_empty() {
            self.coming.pop_front();
        }
        Ok(n)
    }

    fn send(&mut self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        // Little at a time, so that sending has to go on.
        let all: Vec<u8> = bytes.iter().flat_map(|slice| slice.iter().copied()).take(100).collect();
        self.sent.extend_from_slice(&all);
        self.fds.extend(fds.iter().map(|fd| fd.try_clone_to_owned().expect("descriptor")));
        while let Some((header, _)) = Header::take(&self.sent)
            && self.sent.len() >= header.size as usize
        {
            let message: Vec<u8> = self.sent.drain(..header.size as usize).collect();
            match (self.answer)(header, &message[HEADER_BYTES..], std::mem::take(&mut self.fds)) {
                Some(messages) => self.coming.extend(messages),
                None => self.closed = true,
            }
        }
        Ok(all.len())
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.waker.as_fd())
    }
}

const BAR_BYTES: u64 = 0x4000;
const VECTORS: u32 = 20;

/// How the server lends BAR0.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bar0 {
    Doorbells,
    Whole,
    Trapped,
}

/// A proper server's device.
struct Device {
    bar0: Bar0,
    bar: OwnedFd,
    capabilities: Capabilities,
    registers: BTreeMap<u64, u32>,
    config: Vec<u8>,
    unmasked: u32,
    maps: BTreeMap<u64, (DmaMap, OwnedFd)>,
    irq_messages: Vec<(u32, u32)>,
    lines: Vec<EventLine>,
    resets: u32,
    state: u32,
    stream: Vec<u8>,
    refuse: Vec<u16>,
    turned_down: u32,
}

type Shared = Arc<Mutex<Device>>;

impl Device {
    fn new(bar0: Bar0) -> Self {
        let bar = memfd_create("bar", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&bar, BAR_BYTES).expect("size");
        let mut config = vec![0; 256];
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[1, 0x50]);
        // MSI-X: 20 vectors, masked as a function, the table in BAR4.
        config[0x50..0x58].copy_from_slice(&[0x11, 0, 19, 0x40, 4, 0, 0, 0]);
        Self {
            bar0,
            bar,
            capabilities: Capabilities { max_msg_fds: 8, max_data_xfer_size: 4096, max_dma_maps: 3, ..Capabilities::default() },
            registers: BTreeMap::from([(8, 0x2_0100)]),
            config,
            unmasked: 0,
            maps: BTreeMap::new(),
            irq_messages: Vec::new(),
            lines: Vec::new(),
            resets: 0,
            state: state::RUNNING,
            stream: Vec::new(),
            refuse: Vec::new(),
            turned_down: 0,
        }
    }

    fn shared(bar0: Bar0) -> Shared {
        Arc::new(Mutex::new(Self::new(bar0)))
    }

    fn answer(&mut self, header: Header, payload: &[u8], fds: Vec<OwnedFd>) -> Vec<Message> {
        if header.is_reply() {
            assert_eq!(header.failure(), Some(errno::ENOTSUP));
            self.turned_down += 1;
            return Vec::new();
        }
        let done = if self.refuse.contains(&header.command) { Err(errno::EINVAL) } else { self.carry_out(header, payload, fds) };
        match done {
            Ok((bytes, fds)) => vec![([header.reply(bytes.len()).as_bytes(), &bytes].concat(), fds)],
            Err(errno) => vec![(header.error_reply(errno).as_bytes().to_vec(), Vec::new())],
        }
    }

    fn carry_out(&mut self, header: Header, payload: &[u8], mut fds: Vec<OwnedFd>) -> Result<Message, u32> {
        let plain = |bytes: &[u8]| Ok((bytes.to_vec(), Vec::new()));
        match header.command {
            command::VERSION => {
                let (version, json) = Version::take(payload).expect("version");
                assert!(version.major == 0 && Capabilities::parse(json).expect("JSON").max_msg_fds == 16);
                plain(&[Version { major: 0, minor: 1 }.as_bytes(), &self.capabilities.to_json(true)].concat())
            }
            command::GET_INFO => {
                plain(DeviceInfo { argsz: 16, flags: 3, regions: region::COUNT, irqs: irq::COUNT }.as_bytes())
            }
            command::GET_REGION_INFO => self.region_info(&RegionInfo::take(payload).expect("region").0),
            command::GET_IRQ_INFO => {
                let (ask, _) = IrqInfo::take(payload).expect("irq");
                assert_eq!(ask.index, irq::MSIX);
                plain(IrqInfo { flags: IrqInfo::EVENTFD, count: VECTORS, ..ask }.as_bytes())
            }
            command::SET_IRQS => {
                let (set, _) = IrqSet::take(payload).expect("irqs");
                assert_eq!((set.count as usize, set.start as usize), (fds.len(), self.lines.len()));
                self.irq_messages.push((set.start, set.count));
                self.lines.extend(fds.into_iter().map(EventLine::from_fd));
                plain(&[])
            }
            command::DMA_MAP => {
                let (map, _) = DmaMap::take(payload).expect("map");
                self.maps.insert(map.address, (map, fds.remove(0)));
                plain(&[])
            }
            command::DMA_UNMAP => {
                let (unmap, _) = DmaUnmap::take(payload).expect("unmap");
                let (map, _) = self.maps.remove(&unmap.address).ok_or(errno::ENOENT)?;
                if map.size == unmap.size { plain(payload) } else { Err(errno::EINVAL) }
            }
            command::RESET => {
                self.resets += 1;
                plain(&[])
            }
            command::REGION_READ | command::REGION_WRITE => self.access(header.command, payload),
            _ => self.migrate(header.command, payload),
        }
    }

    fn region_info(&self, ask: &RegionInfo) -> Result<Message, u32> {
        let mut info = RegionInfo { argsz: 32, flags: RegionInfo::READ | RegionInfo::WRITE, ..*ask };
        match ask.index {
            region::BAR0 => info.size = BAR_BYTES,
            region::BAR4 => info.size = 0x1000,
            region::CONFIG => info.size = 256,
            region::VGA => return Err(errno::EINVAL),
            _ => info.flags = 0,
        }
        let fd = || vec![self.bar.try_clone().expect("descriptor")];
        match (ask.index, self.bar0) {
            (region::BAR0, Bar0::Whole) => {
                info.flags |= RegionInfo::MMAP;
                Ok((info.as_bytes().to_vec(), fd()))
            }
            (region::BAR0, Bar0::Doorbells) => {
                info.flags |= RegionInfo::MMAP | RegionInfo::CAPS;
                info.argsz = 64;
                if ask.argsz < 64 {
                    return Ok((info.as_bytes().to_vec(), Vec::new()));
                }
                info.cap_offset = 32;
                let sparse = SparseMmap { id: SparseMmap::ID, version: 1, next: 0, areas: 1, reserved: 0 };
                let area = SparseArea { offset: 0x1000, size: 0x1000 };
                Ok(([info.as_bytes(), sparse.as_bytes(), area.as_bytes()].concat(), fd()))
            }
            _ => Ok((info.as_bytes().to_vec(), Vec::new())),
        }
    }

    fn access(&mut self, command: u16, payload: &[u8]) -> Result<Message, u32> {
        let (access, data) = RegionAccess::take(payload).expect("access");
        let (at, count) = (access.offset as usize, access.count as usize);
        let mut bytes = vec![0; if command == command::REGION_READ { count } else { 0 }];
        match (access.region, command) {
            (region::BAR0, command::REGION_READ) if access.offset >= 0x1000 => return Err(errno::EINVAL),
            (region::BAR0, command::REGION_READ) => {
                bytes.copy_from_slice(&self.registers.get(&access.offset).copied().unwrap_or_default().to_le_bytes());
            }
            (region::BAR0, _) => drop(self.registers.insert(access.offset, u32::from_le_bytes(data.try_into().expect("word")))),
            (region::CONFIG, _) => {
                let there = self.config.get_mut(at..at + count).ok_or(errno::EINVAL)?;
                if command == command::REGION_READ { bytes.copy_from_slice(there) } else { there.copy_from_slice(data) }
            }
            (region::BAR4, command::REGION_WRITE) if at % 16 == 12 && data == [0; 4] => self.unmasked += 1,
            _ => return Err(errno::EINVAL),
        }
        Ok(([access.as_bytes(), &bytes].concat(), Vec::new()))
    }

    fn migrate(&mut self, command: u16, payload: &[u8]) -> Result<Message, u32> {
        let plain = |bytes: &[&[u8]]| Ok((bytes.concat(), Vec::new()));
        if command == command::MIG_DATA_READ {
            let (ask, _) = MigData::take(payload).expect("data");
            let n = (ask.size as usize).min(self.stream.len());
            let data: Vec<u8> = self.stream.drain(..n).collect();
            return plain(&[MigData { argsz: n as u32 + 8, size: n as u32 }.as_bytes(), &data]);
        }
        if command == command::MIG_DATA_WRITE {
            let (head, data) = MigData::take(payload).expect("data");
            if head.size as usize != data.len() || data.len() > 4096 {
                return Err(errno::EINVAL);
            }
            self.stream.extend_from_slice(data);
            return plain(&[]);
        }
        let (head, data) = DeviceFeature::take(payload).expect("feature");
        let get = head.flags & DeviceFeature::GET != 0;
        if head.flags & DeviceFeature::PROBE != 0 {
            return if head.index() == feature::MIGRATION && get { plain(&[payload]) } else { Err(errno::ENOTSUP) };
        }
        match head.index() {
            feature::MIGRATION => plain(&[head.as_bytes(), &(migration::STOP_COPY | migration::PRE_COPY).to_le_bytes()]),
            feature::MIG_DEVICE_STATE if get => plain(&[head.as_bytes(), &self.state.to_le_bytes(), &[0; 4]]),
            feature::MIG_DEVICE_STATE => {
                self.state = u32::from_le_bytes(*data.first_chunk().expect("state"));
                plain(&[payload])
            }
            feature::DMA_LOGGING_START => {
                let (start, ranges) = LoggingStart::take(data).expect("start");
                assert_eq!(ranges.len(), start.ranges as usize * 16);
                plain(&[head.as_bytes(), LoggingStart { page_size: 4096, ..start }.as_bytes(), ranges])
            }
            feature::DMA_LOGGING_STOP => plain(&[payload]),
            feature::DMA_LOGGING_REPORT => {
                let (ask, _) = LoggingReport::take(data).expect("report");
                assert_eq!(head.argsz as usize, 8 + 24 + ask.bitmap_bytes().expect("range"));
                plain(&[payload, &vec![0x5a; ask.bitmap_bytes().expect("range")]])
            }
            _ => Err(errno::EINVAL),
        }
    }
}

const CONFIG: ClientConfig = ClientConfig { timeout_ms: 2000, vectors: 64, max_data: 1 << 20 };

fn proper(device: &Shared) -> Box<dyn Stream> {
    let device = Arc::clone(device);
    Script::new(Box::new(move |header, payload, fds| Some(device.lock().expect("lock").answer(header, payload, fds))))
}

fn connect(device: &Shared) -> Arc<VfioUserClient> {
    VfioUserClient::connect(proper(device), AddressSpace::default(), &CONFIG).expect("connect")
}

fn buffer(pages: usize) -> DmaBuffer {
    DmaBuffer::allocate("test", pages * PAGE, Pages::Small).expect("memory")
}

#[test]
fn registers_are_messages_and_doorbells_are_memory() {
    let device = Device::shared(Bar0::Doorbells);
    let client = connect(&device);
    assert_eq!((client.read32(8), client.read64(8)), (0x2_0100, 0x2_0100));
    client.write64(0x28, 0x1_0000_2000);
    assert_eq!(device.lock().expect("lock").registers[&0x2c], 1);
    let bell = client.doorbell(0x1008).expect("doorbell");
    assert!(matches!(&bell, Doorbell::Mapped { offset: 8, .. }));
    bell.ring(77);
    let file = device.lock().expect("lock").bar.try_clone().expect("descriptor");
    let bar = Arena::map_client(file, 0, BAR_BYTES as usize, Access::Read).expect("map");
    assert_eq!(bar.load32(0x1008, Ordering::Acquire), 77);
    let far = client.doorbell(0x2000).expect("inside the BAR, outside the area");
    far.ring(5);
    assert_eq!(device.lock().expect("lock").registers[&0x2000], 5);
    for outside in [0xffc, 0x1002, 0x4000, u32::MAX - 3, u32::MAX] {
        assert!(client.doorbell(outside).is_none(), "{outside:#x}");
    }
    assert!(client.look() && client.why_gone().is_none());
}

#[test]
fn a_bar_is_mapped_wholly_or_not_at_all() {
    let client = connect(&Device::shared(Bar0::Whole));
    assert!(matches!(client.doorbell(0x1004), Some(Doorbell::Mapped { offset: 0x1004, .. })));
    assert!(matches!(client.doorbell(0x3ffc), Some(Doorbell::Mapped { .. })));
    let device = Device::shared(Bar0::Trapped);
    let client = connect(&device);
    let bell = client.doorbell(0x1004).expect("doorbell");
    assert!(matches!(bell, Doorbell::Trapped { .. }));
    bell.ring(3);
    assert_eq!(device.lock().expect("lock").registers[&0x1004], 3);
    // A doorbell holds its function.
    drop(client);
    bell.ring(4);
    assert_eq!(device.lock().expect("lock").registers[&0x1004], 4);
}

#[test]
fn interrupts_are_set_up_in_messages_that_the_server_takes() {
    let device = Device::shared(Bar0::Doorbells);
    let client = connect(&device);
    {
        let device = device.lock().expect("lock");
        assert_eq!(device.irq_messages, [(0, 8), (8, 8), (16, 4)]);
        assert_eq!((device.config[4], device.config[5], device.config[0x53], device.unmasked), (6, 4, 0x80, VECTORS));
        device.lines[17].signal();
    }
    assert_eq!(client.event_line(17).expect("line").take(), 1);
    assert!(client.event_line(20).is_none());
    client.reset().expect("reset");
    let device = device.lock().expect("lock");
    assert_eq!((device.resets, device.unmasked, device.irq_messages.len()), (1, 2 * VECTORS, 3));
}

#[test]
fn a_table_of_interrupts_outside_every_bar_is_not_written() {
    // BAR4 has 4 KiB; 6 and 7 are no BARs, but indices of regions; the others have none.
    for table in [7u32, 6, 5, 0x1004, 0xfcc] {
        let device = Device::shared(Bar0::Doorbells);
        let header = [0xaa; 4];
        {
            let mut device = device.lock().expect("lock");
            device.config[12..16].copy_from_slice(&header);
            device.config[0x54..0x58].copy_from_slice(&table.to_le_bytes());
        }
        let config = ClientConfig { vectors: 4, ..CONFIG };
        let client = VfioUserClient::connect(proper(&device), AddressSpace::default(), &config).expect("connect");
        let device = device.lock().expect("lock");
        assert_eq!((device.unmasked, device.config[0x53], client.refusals()), (0, 0x80, 1), "{table:#x}");
        assert_eq!(device.config[12..16], header, "{table:#x}");
    }
}

#[test]
fn a_server_that_refuses_interrupts_is_polled() {
    for refused in [command::SET_IRQS, command::GET_IRQ_INFO, command::REGION_WRITE] {
        let device = Device::shared(Bar0::Doorbells);
        device.lock().expect("lock").refuse.push(refused);
        let client = connect(&device);
        assert_eq!(client.event_line(0).is_none(), refused != command::REGION_WRITE);
        assert!(!client.is_gone() && client.refusals() > 0);
    }
}

#[test]
fn memory_is_lent_while_it_is_mapped() {
    let device = Device::shared(Bar0::Doorbells);
    let client = connect(&device);
    let memory = buffer(4);
    let part = memory.slice(PAGE, 2 * PAGE - 100).expect("part");
    let iova = client.space().map(&part, true).expect("map");
    {
        let device = device.lock().expect("lock");
        let (map, fd) = &device.maps[&iova];
        assert_eq!((map.offset, map.size, map.flags), (PAGE as u64, 2 * PAGE as u64, dma::READ | dma::WRITE));
        let seen = Arena::map_client(fd.try_clone().expect("fd"), map.offset, PAGE, Access::ReadWrite).expect("map");
        seen.write(3, b"device");
    }
    let mut bytes = [0; 6];
    memory.arena().read(PAGE + 3, &mut bytes);
    assert_eq!(&bytes, b"device");
    let read_only = client.space().map(&memory, false).expect("map");
    assert_eq!(device.lock().expect("lock").maps[&read_only].0.flags, dma::READ);
    client.space().map(&memory, false).expect("a third");
    assert!(client.space().map(&memory, false).is_err(), "the server has three windows");
    let _unmapping = client.space().unmap(iova).expect("unmap");
    assert!(!device.lock().expect("lock").maps.contains_key(&iova));
    client.space().map(&part, true).expect("a window is free again");
    assert!(!client.is_gone());
}

#[test]
fn what_the_server_refuses_is_not_mapped_and_what_it_keeps_ends_the_connection() {
    let device = Device::shared(Bar0::Doorbells);
    let space = AddressSpace::default();
    let before = space.map(&buffer(1), true).expect("map");
    let client = VfioUserClient::connect(proper(&device), space, &CONFIG).expect("connect");
    assert!(device.lock().expect("lock").maps.contains_key(&before), "mapped before the client came");
    device.lock().expect("lock").refuse = vec![command::DMA_MAP, command::DMA_UNMAP];
    assert!(client.space().map(&buffer(1), true).is_err());
    assert!(!client.is_gone());
    let _unmapping = client.space().unmap(before).expect("unmap");
    assert!(client.is_gone(), "the server may go on writing there");
    client.space().map(&buffer(1), true).expect("nobody is there who could access it");
}

#[test]
fn a_refused_register_reads_all_ones_and_nothing_ends() {
    let device = Device::shared(Bar0::Doorbells);
    let client = connect(&device);
    let before = client.refusals();
    assert_eq!(client.read32(0x1000), u32::MAX);
    assert!(!client.is_gone());
    assert_eq!((client.refusals(), client.read32(8)), (before + 1, 0x2_0100));
}

/// A proper server with something done before each reply from the moment the switch is on.
fn disturbed(
    device: &Shared,
    mut disturb: impl FnMut(Header, Vec<Message>) -> Option<Vec<Message>> + Send + 'static,
) -> Box<dyn Stream> {
    let device = Arc::clone(device);
    Script::new(Box::new(move |header, payload, fds| {
        let messages = device.lock().expect("lock").answer(header, payload, fds);
        disturb(header, messages)
    }))
}

#[test]
fn commands_of_the_server_are_turned_down() {
    let device = Device::shared(Bar0::Trapped);
    let stream = disturbed(&device, |header, mut messages| {
        if header.is_command() && header.command == command::REGION_READ {
            let access = DmaAccess { address: 0x1000, count: 8 };
            for (command, data) in [(command::DMA_READ, &[][..]), (command::DMA_WRITE, &[1; 8])] {
                let ask = Header::command(9, command, 16 + data.len());
                messages.insert(0, ([ask.as_bytes(), access.as_bytes(), data].concat(), Vec::new()));
            }
            let mut quiet = Header::command(9, command::DMA_READ, 0);
            quiet.flags |= flags::NO_REPLY;
            messages.insert(0, (quiet.as_bytes().to_vec(), Vec::new()));
        }
        Some(messages)
    });
    let config = ClientConfig { vectors: 0, ..CONFIG };
    let client = VfioUserClient::connect(stream, AddressSpace::default(), &config).expect("connect");
    assert_eq!(client.read32(8), 0x2_0100);
    assert_eq!((client.turned_down(), device.lock().expect("lock").turned_down), (3, 2));
}

#[test]
fn a_server_that_leaves_or_is_late_reads_all_ones() {
    for late in [false, true] {
        let device = Device::shared(Bar0::Doorbells);
        let stream = disturbed(&device, move |header, messages| match header.command {
            command::RESET if late => Some(Vec::new()),
            command::RESET => None,
            _ => Some(messages),
        });
        let config = ClientConfig { timeout_ms: 20, ..CONFIG };
        let client = VfioUserClient::connect(stream, AddressSpace::default(), &config).expect("connect");
        assert!(client.reset().is_err() && client.is_gone() && !client.look());
        assert_eq!((client.read32(8), client.read64(8)), (u32::MAX, u64::MAX));
        client.write32(8, 1);
        assert!(client.why_gone().expect("a reason").contains(if late { "20 ms" } else { "closed" }));
        client.space().map(&buffer(1), true).expect("nobody is told");
    }
}

#[test]
fn a_reply_that_is_not_the_one_awaited_ends_the_connection() {
    let spoil: [fn(&mut Vec<u8>); 5] = [
        |bytes| bytes[0] ^= 1,
        |bytes| bytes[2] ^= 1,
        |bytes| bytes[8] = 2,
        |bytes| bytes[4] -= 1,
        |bytes| bytes[4..8].fill(0xff),
    ];
    for (at, spoil) in spoil.into_iter().enumerate() {
        let stream = disturbed(&Device::shared(Bar0::Doorbells), move |header, mut messages| {
            if header.command == command::DEVICE_FEATURE {
                messages.iter_mut().for_each(|(bytes, _)| spoil(bytes));
            }
            Some(messages)
        });
        let client = VfioUserClient::connect(stream, AddressSpace::default(), &CONFIG).expect("connect");
        assert!(matches!(client.migration_ways(), Err(ClientError::Protocol(_))), "{at}");
        assert!(client.is_gone() && matches!(client.migration_ways(), Err(ClientError::Gone)));
    }
}

#[test]
fn a_server_that_sends_a_byte_now_and_then_has_no_more_time() {
    let (ours, mut theirs) = UnixSocket::pair().expect("pair");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The header of a reply that is long, and then a byte for every byte that the timer lets through.
            let header = Header::command(1, command::VERSION, 0).reply(4000);
            let mut bytes = header.as_bytes().to_vec();
            let wait = rustix::time::Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
            while theirs.send(&[IoSlice::new(&bytes)], &[]).is_ok() {
                bytes = vec![0];
                rustix::event::poll(&mut [], Some(&wait)).expect("wait");
            }
        });
        let config = ClientConfig { timeout_ms: 50, ..CONFIG };
        let error = VfioUserClient::connect(Box::new(ours), AddressSpace::default(), &config).expect_err("late");
        assert!(matches!(error, ClientError::TimedOut(50)), "{error}");
    });
}

#[test]
fn a_server_that_takes_its_doorbells_away_is_gone() {
    let device = Device::shared(Bar0::Doorbells);
    let client = connect(&device);
    let bell = client.doorbell(0x1000).expect("doorbell");
    let file = std::fs::File::from(device.lock().expect("lock").bar.try_clone().expect("descriptor"));
    file.set_len(0).expect("truncate");
    bell.ring(1);
    assert!(client.is_gone());
    assert_eq!(client.read32(8), u32::MAX);
}

#[test]
fn versions_and_devices_that_cannot_be_driven_are_told() {
    let with = |change: fn(u16, &mut Vec<u8>)| {
        let stream = disturbed(&Device::shared(Bar0::Doorbells), move |header, mut messages| {
            messages.iter_mut().for_each(|(bytes, _)| change(header.command, bytes));
            Some(messages)
        });
        VfioUserClient::connect(stream, AddressSpace::default(), &CONFIG).expect_err("refused")
    };
    let version = |command, bytes: &mut Vec<u8>| {
        if command == command::VERSION {
            bytes[16] = 1;
        }
    };
    assert!(matches!(with(version), ClientError::Version { major: 1, minor: 1 }));
    let no_pci = |command, bytes: &mut Vec<u8>| {
        if command == command::GET_INFO {
            bytes[20] = 1;
        }
    };
    assert!(matches!(with(no_pci), ClientError::NoFunction(_)));
    let small = |command, bytes: &mut Vec<u8>| {
        if command == command::GET_REGION_INFO && bytes.len() >= 48 {
            bytes[16 + 16..16 + 24].fill(0);
        }
    };
    assert!(matches!(with(small), ClientError::NoFunction(_)));
    let beyond = |command, bytes: &mut Vec<u8>| {
        if command == command::GET_REGION_INFO && bytes.len() >= 48 {
            bytes[16 + 24..16 + 32].copy_from_slice(&0x3000u64.to_le_bytes());
        }
    };
    assert!(matches!(with(beyond), ClientError::Memory(_)), "an area behind the end of the file");
}

#[test]
fn a_migration_as_a_client_sees_it() {
    let device = Device::shared(Bar0::Doorbells);
    let client = connect(&device);
    assert_eq!(client.migration_ways().expect("ways"), migration::STOP_COPY | migration::PRE_COPY);
    assert!(client.feature_probe(feature::MIGRATION, DeviceFeature::GET).expect("probe"));
    assert!(!client.feature_probe(feature::MIGRATION, DeviceFeature::SET).expect("probe"));
    client.set_migration_state(state::STOP_COPY).expect("state");
    assert_eq!(client.migration_state().expect("state"), state::STOP_COPY);
    let data: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
    client.mig_write(&data).expect("write");
    let mut back = Vec::new();
    while client.mig_read(5000, &mut back).expect("read") == 4096 {}
    assert_eq!(back, data);
    let range = LogRange { iova: 0x10_0000, length: 0x10_0000 };
    assert_eq!(client.logging_start(0x1000, &[range]).expect("start"), 4096);
    assert_eq!(client.logging_report(range.iova, range.length, 4096).expect("report"), [0x5a; 32]);
    assert!(matches!(client.logging_report(0, 1 << 40, 4096), Err(ClientError::Limit(_))));
    assert!(matches!(client.logging_report(0, 0, 4096), Err(ClientError::Limit(_))));
    client.logging_stop().expect("stop");
    assert!(matches!(client.feature_get(99, &[], 8), Err(ClientError::Refused { errno: errno::EINVAL, .. })));
    assert!(!client.is_gone());
}

#[test]
fn over_a_socket_with_a_server_that_is_killed() {
    let (ours, mut theirs) = UnixSocket::pair().expect("pair");
    let device = Device::shared(Bar0::Doorbells);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut have, mut fds) = (Vec::new(), Vec::new());
            loop {
                let mut bytes = [0; 512];
                let mut ready = [rustix::event::PollFd::new(&theirs, rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut ready, None).expect("poll");
                match theirs.recv(&mut bytes, &mut fds) {
                    Ok(0) => return,
                    Ok(n) => have.extend_from_slice(&bytes[..n]),
                    Err(_) => continue,
                }
                while let Some((header, _)) = Header::take(&have)
                    && have.len() >= header.size as usize
                {
                    let message: Vec<u8> = have.drain(..header.size as usize).collect();
                    if header.command == command::RESET {
                        return;
                    }
                    let mut device = device.lock().expect("lock");
                    for (bytes, fds) in device.answer(header, &message[HEADER_BYTES..], std::mem::take(&mut fds)) {
                        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
                        assert_eq!(theirs.send(&[IoSlice::new(&bytes)], &fds).expect("send"), bytes.len());
                    }
                }
            }
        });
        let client = VfioUserClient::connect(Box::new(ours), AddressSpace::default(), &CONFIG).expect("connect");
        assert_eq!(client.read32(offset::VS), 0x2_0100);
        let iova = client.space().map(&buffer(3), true).expect("map");
        assert_eq!(device.lock().expect("lock").maps[&iova].0.size, 3 * PAGE as u64);
        device.lock().expect("lock").lines[19].signal();
        assert_eq!(client.event_line(19).expect("line").take(), 1);
        assert!(client.look());
        assert!(client.reset().is_err());
        server.join().expect("server");
    });
    drop(theirs);
}

#[test]
fn the_end_of_the_server_is_noticed_without_a_request() {
    let (ours, mut theirs) = UnixSocket::pair().expect("pair");
    let device = Device::shared(Bar0::Doorbells);
    // Everything that will be asked is answered before: the client takes replies in order.
    let config = ClientConfig { vectors: 0, timeout_ms: 1000, ..CONFIG };
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let stream = disturbed(&device, move |_, messages| {
        log.lock().expect("lock").extend(messages.iter().map(|(bytes, _)| bytes.clone()));
        Some(messages.into_iter().map(|(bytes, _)| (bytes, Vec::new())).collect())
    });
    drop(VfioUserClient::connect(stream, AddressSpace::default(), &config).expect("connect"));
    for bytes in asked.lock().expect("lock").iter() {
        theirs.send(&[IoSlice::new(bytes)], &[]).expect("send");
    }
    let client = VfioUserClient::connect(Box::new(ours), AddressSpace::default(), &config).expect("connect");
    assert!(client.look() && !client.is_gone());
    drop(theirs);
    let mut ready = [rustix::event::PollFd::from_borrowed_fd(client.waker(), rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut ready, None).expect("poll"), 1);
    assert!(!client.look() && client.is_gone());
}

#[path = "client_hostile_tests.rs"]
mod hostile;
