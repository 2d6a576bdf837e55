//! The vfio-user server before a hostile client: any messages, whole and broken, with any descriptors; DMA windows that come,
//! go and overlap, memory that its owner cuts short; region accesses, interrupts, resets, migration states and their stream,
//! the log of written pages; replies that are withheld; clients that stop reading, leave at any byte and come back; and NVMe
//! commands by way of all that.
//!
//! Besides the form of every reply and, for clients that have sent nothing but whole messages, one reply for every request, in
//! order and within the room that was offered ([`crate::vfio_client`]), it asserts that memory that was only lent for reading
//! never changes; that memory is not touched any more once it was unmapped or its client has gone; that windows stay within
//! their limit; that a client of another controller is served within a bounded number of polls all the time; that the hooks
//! of a migration are called in order; that the counters say what happened; and that the next client finds a controller that
//! identifies itself, writes and reads back.

mod steps;

use crate::input::Input;
use crate::media::{Manner, Media, Meddler};
use crate::pipe::Pipe;
use crate::vfio_client::Client;
use crate::vfio_hooks::Control;
use dray_controller::{ControllerConfig, ControllerRole, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::space::AddressSpace;
use dray_device::vfio_user::wire::{DmaMap, DmaUnmap, Header, RegionAccess, command, dma, region, state};
use dray_export::vfio_user::{Bar0Map, VfioUserConfig, VfioUserServer};
use dray_nvme::command::{CompletionEntry, SubmissionEntry};
use dray_nvme::identify::{Cns, CommandSetId};
use dray_nvme::registers::{cq_head_doorbell, offset, sq_tail_doorbell};
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zerocopy::{FromBytes, IntoBytes};

const PAGE: usize = 4096;
const BLOCKS: usize = 200;
const FILL: u8 = 0x3c;
const CONTEXTS: u16 = 16;
const VECTORS: u16 = 4;
const MOST_STEPS: usize = 150;
/// Polls within which whatever is well has to happen.
const PATIENCE: usize = 3000;
/// Polls within which the neighbour's request is answered.
const NEIGHBOURS_PATIENCE: usize = 20;
const MAX_MAPS: u32 = 8;
const MAX_DATA: u32 = 64 << 10;
const MAX_BYTES: u64 = 1 << 20;
const ENABLED: u32 = 0x0046_0001;
/// Pages of each file of the client's memory.
const PAGES: usize = 12;
/// Where honest windows begin, and how far apart they are.
const BASE: u64 = 0x10_0000;
const JSON: &[u8] = b"{\"capabilities\":{\
\"max_msg_fds\":16,\"max_data_xfer_size\":65536,\"pgsizes\":4096,\"write_multiple\":true}}\0";
const NO_FDS: &[u8] = b"{\"capabilities\":{\"max_msg_fds\":0}}                                                               \0";

/// A file of a client's memory.
struct Memory {
    fd: OwnedFd,
}

impl Memory {
    fn new() -> Self {
        let fd = rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&fd, (PAGES * PAGE) as u64).expect("size");
        let memory = Self { fd };
        memory.put(0, &vec![FILL; PAGES * PAGE]);
        memory
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        let _cut = rustix::io::pwrite(&self.fd, bytes, at as u64);
    }

    fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let got = rustix::io::pread(&self.fd, &mut bytes, at as u64).unwrap_or(0);
        bytes.truncate(got);
        bytes
    }

    fn is_all(&self, byte: u8) -> bool {
        self.get(0, PAGES * PAGE).iter().all(|b| *b == byte)
    }
}

/// A server with its slot, and whoever is its client.
struct Seat {
    server: VfioUserServer,
    client: Client,
    /// Written by the controller, and only lent for reading.
    memory: [Memory; 2],
    tails: [u32; 2],
    cid: u16,
}

struct World {
    subsystem: Subsystem,
    media: [Media; 2],
    /// The hostile client's, and the neighbour's.
    seats: [Seat; 2],
    control: Control,
    other_fds: Vec<OwnedFd>,
    now: Time,
    clients: u64,
    /// Whole requests of clients that were sane to their end, and those of the one that is there.
    broken: bool,
}

/// Runs one session.
///
/// # Panics
/// When a guarantee is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let bits = input.u8();
    let mut world = World::new(bits);
    world.greet(1, JSON);
    world.begin(1);
    world.greet(0, if bits & 8 == 0 { JSON } else { NO_FDS });
    if bits & 16 == 0 {
        world.begin(0);
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
    fn new(bits: u8) -> Self {
        let controller = |cntlid: u16| ControllerConfig {
            cntlid,
            role: ControllerRole::Migratable,
            namespaces: vec![cntlid.into()],
            io_queues: 2,
            vectors: VECTORS,
            fence: Fence::default(),
        };
        let config = SubsystemConfig {
            controllers: vec![controller(1), controller(2)],
            max_queue_entries: 64,
            mdts: 3,
            contexts: CONTEXTS,
            jobs: 2,
            ..SubsystemConfig::default()
        };
        let meddler = Meddler::default();
        let media = [0, FILL].map(|byte| Media::new(BLOCKS, byte, 2 * usize::from(CONTEXTS), &meddler));
        let namespace = |nsid: u32| NamespaceConfig {
            nsid,
            nguid: [nsid as u8; 16],
            eui64: [nsid as u8; 8],
            uuid: [nsid as u8; 16],
            shared: false,
            write_protected: false,
        };
        let namespaces = media.iter().zip(1..).map(|(media, nsid)| (namespace(nsid), media.backing())).collect();
        let subsystem = Subsystem::new(config, namespaces).expect("a subsystem");
        let control = Control::default();
        let seats = [0u16, 1].map(|which| {
            let slot = Slot::without_lines(AddressSpace::default(), VECTORS).expect("a slot");
            slot.point_at(&subsystem.plug(which + 1).expect("a controller"));
            let bar0 = match bits & 3 {
                1 if which == 0 => Bar0Map::Whole,
                2 if which == 0 => Bar0Map::None,
                _ => Bar0Map::Doorbells,
            };
            let config = VfioUserConfig {
                bar0,
                max_data_bytes: MAX_DATA,
                max_dma_maps: MAX_MAPS,
                max_dma_bytes: MAX_BYTES,
                reset_wait_ms: 50,
                ..VfioUserConfig::default()
            };
            let hooks = if which == 0 { control.hooks() } else { Box::new(dray_export::hooks::NoMigration) };
            let server = VfioUserServer::new(slot, config, hooks);
            let (ours, _theirs) = Pipe::pair();
            Seat { server, client: Client::new(ours), memory: [Memory::new(), Memory::new()], tails: [0; 2], cid: 0 }
        });
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("an eventfd");
        let full = event();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).expect("a count");
        let other_fds = vec![event(), full, reader, writer];
        Self { subsystem, media, seats, control, other_fds, now: Time(1_000), clients: 0, broken: false }
    }

    fn poll(&mut self) {
        self.now = self.now.after_us(10);
        for seat in &mut self.seats {
            let _progress = seat.server.poll(self.now);
        }
        let _progress = self.subsystem.poll(self.now);
        for (header, payload, _) in self.seats[0].client.take() {
            if header.command == command::DMA_UNMAP && header.failure().is_none() && self.seats[0].server.dma_windows() == 0 {
                assert_eq!(self.media[0].pending_with_data(), 0, "operations on memory that was unmapped, and its owner told");
            }
            if header.command == command::MIG_DATA_READ && header.failure().is_none() {
                self.control.read(payload.get(8..).unwrap_or_default());
            }
        }
    }

    fn polls(&mut self, count: usize) {
        (0..count).for_each(|_| self.poll());
    }

    /// A new client with new memory; the one before has gone.
    fn greet(&mut self, who: usize, json: &[u8]) {
        let (ours, theirs) = Pipe::pair();
        let seat = &mut self.seats[who];
        seat.client = Client::new(ours);
        seat.memory = [Memory::new(), Memory::new()];
        seat.tails = [0; 2];
        if seat.server.attach(Box::new(theirs)).is_err() {
            return;
        }
        self.clients += u64::from(who == 0);
        let payload = [&[0; 4], json].concat();
        self.seats[who].client.takes_fds = json == JSON;
        self.seats[who].client.ask(command::VERSION, &payload, &[], false);
        if who == 0 {
            self.polls(4);
        }
    }

    /// Waits for the one reply that is missing.
    fn reply(&mut self, who: usize, polls: usize) -> (Header, Vec<u8>, Vec<OwnedFd>) {
        for _ in 0..polls {
            if who == 0 {
                // Not by `poll`, which drops replies.
                self.now = self.now.after_us(10);
                let _progress = self.seats[0].server.poll(self.now);
                let _progress = self.subsystem.poll(self.now);
            } else {
                self.poll();
            }
            if let Some(reply) = self.seats[who].client.take().pop() {
                return reply;
            }
            assert!(!self.seats[who].client.closed, "client {who} was disconnected: {:?}", self.seats[who].server.counters());
        }
        panic!("client {who} has no reply after {polls} polls: {:?}", self.seats[who].client.asked);
    }

    fn good(&mut self, who: usize, command: u16, payload: &[u8], fds: &[usize]) -> Vec<u8> {
        let seat = &mut self.seats[who];
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|&which| seat.memory[which].fd.as_fd()).collect();
        seat.client.ask(command, payload, &fds, false);
        let (header, payload, _) = self.reply(who, PATIENCE);
        assert!(header.failure().is_none(), "command {command} of client {who}: {header:?}");
        payload
    }

    fn map(&mut self, who: usize, which: usize) {
        let writable = if which == 0 { dma::WRITE } else { 0 };
        let (address, size) = (BASE + (which as u64) * 0x10_0000, (PAGES * PAGE) as u64);
        let map = DmaMap { argsz: 32, flags: dma::READ | writable, offset: 0, address, size };
        self.good(who, command::DMA_MAP, map.as_bytes(), &[which]);
    }

    fn write32(&mut self, who: usize, at: u32, value: u32) {
        let access = RegionAccess { offset: at.into(), region: region::BAR0, count: 4 };
        self.good(who, command::REGION_WRITE, &[access.as_bytes(), &value.to_le_bytes()].concat(), &[]);
    }

    fn read32(&mut self, who: usize, at: u32) -> u32 {
        let access = RegionAccess { offset: at.into(), region: region::BAR0, count: 4 };
        let reply = self.good(who, command::REGION_READ, access.as_bytes(), &[]);
        u32::from_le_bytes(reply[16..20].try_into().expect("four bytes"))
    }

    /// Memory, and an enabled controller with its admin queue in page 0 and 1 and an I/O queue pair in 2 and 3.
    fn begin(&mut self, who: usize) {
        self.map(who, 0);
        self.map(who, 1);
        self.write32(who, offset::AQA, 0x000f_000f);
        for (at, page) in [(offset::ASQ, 0), (offset::ACQ, 1)] {
            self.write32(who, at, (BASE + page * PAGE as u64) as u32);
            self.write32(who, at + 4, 0);
        }
        self.seats[who].memory[0].put(0, &[0; 4 * PAGE]);
        self.seats[who].tails = [0; 2];
        self.write32(who, offset::CC, ENABLED);
        self.until_csts(who, 1);
        let at = |page: u64| BASE + page * PAGE as u64;
        self.command(who, 0, &SubmissionEntry::create_io_cq(1, 15, None, at(3)));
        self.command(who, 0, &SubmissionEntry::create_io_sq(1, 15, 1, at(2)));
    }

    fn until_csts(&mut self, who: usize, ready: u32) {
        for _ in 0..PATIENCE {
            if self.read32(who, offset::CSTS) & 1 == ready {
                return;
            }
        }
        panic!("CSTS.RDY of client {who} does not become {ready}");
    }

    /// Puts a command into queue 0 or 1 by the client's own memory; returns its CID.
    fn put(&mut self, who: usize, queue: usize, entry: &SubmissionEntry) -> u16 {
        let seat = &mut self.seats[who];
        seat.cid = seat.cid.wrapping_add(1);
        let at = 2 * queue * PAGE + (seat.tails[queue] as usize % 16) * 64;
        seat.memory[0].put(at, entry.with_cid(seat.cid).as_bytes());
        seat.tails[queue] = (seat.tails[queue] + 1) % 16;
        seat.cid
    }

    /// Runs a command of a client that is served well.
    fn command(&mut self, who: usize, queue: usize, entry: &SubmissionEntry) -> CompletionEntry {
        let cid = self.put(who, queue, entry);
        let tail = self.seats[who].tails[queue];
        self.write32(who, sq_tail_doorbell(queue as u16, 0), tail);
        for _ in 0..PATIENCE {
            self.poll();
            let seat = &self.seats[who];
            let found = (0..16).find_map(|slot| {
                let bytes = seat.memory[0].get((2 * queue + 1) * PAGE + slot * 16, 16);
                let entry = CompletionEntry::read_from_bytes(&bytes).ok()?;
                (entry.cid == cid && bytes.iter().any(|b| *b != 0)).then_some((slot, entry))
            });
            if let Some((slot, done)) = found {
                self.write32(who, cq_head_doorbell(queue as u16, 0), (slot as u32 + 1) % 16);
                assert!(!done.status().is_error(), "{entry:?} of client {who}: {done:?}");
                return done;
            }
        }
        panic!("{entry:?} of client {who} in queue {queue} does not end");
    }

    /// The neighbour is answered, and now and then reads.
    fn neighbour(&mut self, reads: bool) {
        let access = RegionAccess { offset: offset::VS.into(), region: region::BAR0, count: 4 };
        self.seats[1].client.ask(command::REGION_READ, access.as_bytes(), &[], false);
        let (header, _, _) = self.reply(1, NEIGHBOURS_PATIENCE);
        assert!(header.failure().is_none(), "{header:?}");
        if reads {
            let page = BASE + 8 * PAGE as u64;
            self.seats[1].memory[0].put(8 * PAGE, &[0; 1024]);
            self.command(1, 1, &SubmissionEntry::read(2, 3, 2).with_prps(page, 0));
            assert_eq!(self.seats[1].memory[0].get(8 * PAGE, 1024), [FILL; 1024], "the neighbour's data");
        }
    }

    // What holds.

    fn check(&self) {
        let server = &self.seats[0].server;
        assert!(server.dma_windows() <= MAX_MAPS as usize, "{} windows", server.dma_windows());
        assert!(self.control.most_incoming() <= 16 << 20, "a state of {} bytes", self.control.most_incoming());
    }

    /// Backing and hooks end what they have, the client reads: every request has its reply.
    fn settle(&mut self) {
        self.media[0].set_manner(Manner::default());
        self.control.finish();
        self.seats[0].client.reads = true;
        for _ in 0..PATIENCE {
            self.poll();
            let client = &self.seats[0].client;
            if !client.sane || client.closed || client.asked.is_empty() {
                break;
            }
        }
        let client = &self.seats[0].client;
        let missing = client.asked.front().filter(|_| client.sane && !client.closed);
        assert!(missing.is_none(), "never answered: {missing:?} of {}", client.asked.len());
        self.unmapped_is_left();
        self.neighbour(true);
    }

    /// Once everything is unmapped and answered, memory stays as it is.
    fn unmapped_is_left(&mut self) {
        let client = &self.seats[0].client;
        if !client.sane || client.closed || self.seats[0].server.dma_windows() == 0 {
            return;
        }
        let all = DmaUnmap { argsz: 24, flags: dma::ALL, address: 0, size: 0 };
        self.seats[0].client.ask(command::DMA_UNMAP, all.as_bytes(), &[], false);
        for _ in 0..PATIENCE {
            self.poll();
            if self.seats[0].client.asked.is_empty() || self.seats[0].client.closed {
                break;
            }
        }
        if self.seats[0].client.closed {
            // Memory that was cut short before is noticed by and by.
            assert!(self.seats[0].server.counters().broken_memory > 0, "{:?}", self.seats[0].server.counters());
            return;
        }
        assert_eq!(self.seats[0].server.dma_windows(), 0, "windows after all were unmapped");
        rustix::fs::ftruncate(&self.seats[0].memory[0].fd, (PAGES * PAGE) as u64).expect("size");
        self.seats[0].memory[0].put(0, &[0x5b; PAGES * PAGE]);
        self.polls(20);
        assert!(self.seats[0].memory[0].is_all(0x5b), "memory that was unmapped has changed");
    }

    fn end(&mut self) {
        self.lost_memory();
        let counters = self.seats[0].server.counters();
        let ends = counters.left + counters.broken_protocol + counters.broken_memory + counters.handshake_timeouts;
        assert_eq!(ends, counters.clients, "clients that have gone: {counters:?}");
        assert!(counters.clients + counters.refused_busy <= self.clients, "{} clients: {counters:?}", self.clients);
        assert_eq!(counters.maps + counters.unusable_maps, counters.unmaps, "{counters:?}");
        assert!(counters.refused <= counters.requests && (self.broken || counters.broken_protocol == 0), "{counters:?}");
        // The device goes back to RUNNING by a reset, whatever came before.
        self.greet(0, JSON);
        self.reply_or_taken();
        self.good(0, command::RESET, &[], &[]);
        self.until_csts(0, 0);
        assert_eq!(self.seats[0].server.migration_state(), state::RUNNING, "after a reset");
        self.begin(0);
        let page = BASE + 8 * PAGE as u64;
        self.command(0, 0, &SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM).with_prps(page, 0));
        self.seats[0].memory[0].put(8 * PAGE, &[0x77; 512]);
        self.command(0, 1, &SubmissionEntry::write(1, 7, 1).with_prps(page, 0));
        assert_eq!(self.media[0].block(7), [0x77; 512], "what the next client wrote");
        self.command(0, 1, &SubmissionEntry::read(1, 7, 1).with_prps(page + PAGE as u64, 0));
        assert_eq!(self.seats[0].memory[0].get(9 * PAGE, 512), [0x77; 512], "what it read");
        self.neighbour(true);
        assert!(self.media[1].is_all(FILL), "the neighbour's namespace");
        assert!(self.seats[1].memory[1].is_all(FILL), "the neighbour's memory");
    }

    /// The reply to VERSION has been taken by a poll, or comes.
    fn reply_or_taken(&mut self) {
        for _ in 0..PATIENCE {
            if self.seats[0].client.asked.is_empty() {
                return;
            }
            self.poll();
        }
        panic!("the next client is not served: {:?}", self.seats[0].server.counters());
    }
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
