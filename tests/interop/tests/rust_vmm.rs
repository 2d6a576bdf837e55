//! rust-vmm's `vfio_user`, the client inside cloud-hypervisor, drives our controller: it negotiates, maps memory, reads what the
//! function is, and behind it an NVMe host of a few lines writes and reads the namespace.
//!
//! The client looks at no reply's error, and takes a reset for granted where the device offers none (`resettable` is the wrong
//! way round in 0.1.7): what a request came to is asked of the device here.
#![allow(missing_docs)]

use dray_export::vfio_user::{Bar0Map, VfioUserConfig};
use dray_interop::{BLOCK, BYTES, SERIAL, Served, VECTORS};
use dray_nvme::command::{CompletionEntry, SubmissionEntry};
use dray_nvme::identify::Cns;
use dray_nvme::registers::{Cc, Csts, cq_head_doorbell, offset, sq_tail_doorbell};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use vfio_user::Client;
use zerocopy::{FromBytes, IntoBytes};

const CONFIG: u32 = 7;
const INTX: u32 = 0;
const MSIX: u32 = 2;
/// VFIO_IRQ_SET_DATA_NONE and _EVENTFD, VFIO_IRQ_SET_ACTION_UNMASK and _TRIGGER.
const NONE: u32 = 1;
const EVENTFD: u32 = 4;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;
/// The host's memory, as the device sees it.
const IOVA: u64 = 0x10_0000;
const MEMORY: u64 = 1 << 20;
/// Where queues (a page of submissions, a page of completions each) and data are in it.
const QUEUES: u64 = 0;
const DATA: u64 = 0x1_0000;
const ENTRIES: u16 = 16;

fn served(bar0: Bar0Map) -> Served {
    Served::start(VfioUserConfig { bar0, ..VfioUserConfig::default() })
}

#[track_caller]
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not {what} in time");
        std::thread::yield_now();
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

fn signals(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

/// A queue pair of the host: where it stands.
#[derive(Default)]
struct Pair {
    qid: u16,
    tail: u16,
    head: u16,
    flipped: bool,
}

/// An NVMe host behind the client.
struct Host {
    client: Client,
    memory: File,
    cid: u16,
}

impl Host {
    fn connect(served: &Served) -> Self {
        let client = Client::new(served.path()).expect("negotiated, and every region described");
        let memory = rustix::fs::memfd_create("host", MemfdFlags::CLOEXEC).expect("memory");
        let memory = File::from(memory);
        memory.set_len(MEMORY).expect("its size");
        Self { client, memory, cid: 0 }
    }

    fn map(&mut self) {
        self.client.dma_map(0, IOVA, MEMORY, self.memory.as_raw_fd()).expect("mapped");
    }

    fn read32(&mut self, region: u32, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.client.region_read(region, at, &mut bytes).expect("read");
        u32::from_le_bytes(bytes)
    }

    /// The memory that the server shares for a place in BAR0, and where in its file that is.
    fn shared(&self, at: u32) -> Option<(&File, u64)> {
        let bar = self.client.region(0)?;
        let at = u64::from(at);
        let inside = bar.sparse_areas.iter().any(|area| (area.offset..area.offset + area.size).contains(&at));
        let of = bar.file_offset.as_ref().filter(|_| bar.sparse_areas.is_empty() || inside)?;
        Some((of.file(), of.start() + at))
    }

    fn register(&mut self, at: u32) -> u32 {
        let Some((file, place)) = self.shared(at) else { return self.read32(0, at.into()) };
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, place).expect("read");
        u32::from_le_bytes(bytes)
    }

    /// A register: in shared memory, where nobody is told, or by a message.
    fn set(&mut self, at: u32, bytes: &[u8]) {
        match self.shared(at) {
            Some((file, place)) => file.write_all_at(bytes, place).expect("stored"),
            None => self.client.region_write(0, at.into(), bytes).expect("written"),
        }
    }

    fn csts(&mut self) -> Csts {
        Csts::from_bits(self.register(offset::CSTS))
    }

    fn ring(&mut self, at: u32, value: u16) {
        self.set(at, &u32::from(value).to_le_bytes());
    }

    fn enable(&mut self) -> Pair {
        assert_eq!(self.csts().into_bits(), 0, "it is off");
        self.memory.write_all_at(&[0; 0x2000], QUEUES).expect("cleared");
        let entries = u32::from(ENTRIES - 1);
        self.set(offset::AQA, &(entries << 16 | entries).to_le_bytes());
        self.set(offset::ASQ, &(IOVA + QUEUES).to_le_bytes());
        self.set(offset::ACQ, &(IOVA + QUEUES + 0x1000).to_le_bytes());
        self.set(offset::CC, &Cc::new().with_en(true).with_iosqes(6).with_iocqes(4).into_bits().to_le_bytes());
        until("ready", || {
            let csts = self.csts();
            assert!(!csts.cfs(), "{csts:?}");
            csts.rdy().then_some(())
        });
        Pair::default()
    }

    /// A controller reset (CC.EN), which takes as long as CSTS.RDY says.
    fn disable(&mut self) {
        self.set(offset::CC, &[0; 4]);
        until("disabled", || (!self.csts().rdy()).then_some(()));
    }

    /// One command to its end; its DW0.
    fn run(&mut self, pair: &mut Pair, mut entry: SubmissionEntry) -> u32 {
        let base = QUEUES + u64::from(pair.qid) * 0x2000;
        self.cid += 1;
        entry.cdw0.set_cid(self.cid);
        self.memory.write_all_at(entry.as_bytes(), base + u64::from(pair.tail) * 64).expect("submitted");
        pair.tail = (pair.tail + 1) % ENTRIES;
        self.ring(sq_tail_doorbell(pair.qid, 0), pair.tail);
        let at = base + 0x1000 + u64::from(pair.head) * 16;
        let done = until("completed", || {
            let mut bytes = [0; 16];
            self.memory.read_exact_at(&mut bytes, at).expect("read");
            let done = CompletionEntry::read_from_bytes(&bytes).expect("16 bytes");
            (done.status_phase.phase() != pair.flipped).then_some(done)
        });
        assert_eq!((done.cid, done.sqid, done.sqhd), (self.cid, pair.qid, pair.tail));
        assert!(!done.status_phase.status().is_error(), "{done:?}");
        pair.head = (pair.head + 1) % ENTRIES;
        pair.flipped ^= pair.head == 0;
        self.ring(cq_head_doorbell(pair.qid, 0), pair.head);
        done.dw0
    }

    fn create(&mut self, admin: &mut Pair, qid: u16, vector: u16) -> Pair {
        let base = QUEUES + u64::from(qid) * 0x2000;
        self.memory.write_all_at(&[0; 0x2000], base).expect("cleared");
        self.run(admin, SubmissionEntry::create_io_cq(qid, ENTRIES - 1, Some(vector), IOVA + base + 0x1000));
        self.run(admin, SubmissionEntry::create_io_sq(qid, ENTRIES - 1, qid, IOVA + base));
        Pair { qid, ..Pair::default() }
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, DATA).expect("read");
        bytes
    }

    /// Blocks of random numbers are written and read back, over the end of the rings and back to their begin.
    fn write_and_read(&mut self, pair: &mut Pair, seed: u8) {
        let blocks = 4096 / BLOCK;
        for nth in 0..24u8 {
            let slba = u64::from(nth) * 37 % (BYTES / u64::from(BLOCK) - u64::from(blocks));
            let content: Vec<u8> = (0..4096u32).map(|at| (at * 7 + at / 256) as u8 ^ seed ^ nth).collect();
            let at = |mut entry: SubmissionEntry| {
                entry.dptr[0] = IOVA + DATA;
                entry
            };
            self.memory.write_all_at(&content, DATA).expect("content");
            self.run(pair, at(SubmissionEntry::write(1, slba, blocks)));
            self.memory.write_all_at(&[0; 4096], DATA).expect("cleared");
            self.run(pair, at(SubmissionEntry::read(1, slba, blocks)));
            assert!(self.data(4096) == content, "block {slba} came back as something else");
        }
    }
}

#[test]
fn the_function_is_what_the_client_expects_of_a_pci_function() {
    let served = served(Bar0Map::Doorbells);
    let mut host = Host::connect(&served);
    let sizes: Vec<u64> = (0..9).map(|index| host.client.region(index).expect("described").size).collect();
    assert_eq!(sizes, [0x4000, 0, 0, 0, 0x1000, 0x1000, 0, 0x1000, 0]);
    let bar = host.client.region(0).expect("BAR0");
    assert_eq!(bar.flags, 0xf, "read, write, map, capabilities");
    let areas: Vec<_> = bar.sparse_areas.iter().map(|area| (area.offset, area.size)).collect();
    assert_eq!(areas, [(0x1000, 0x1000)], "the doorbells");
    let of = bar.file_offset.as_ref().expect("a descriptor");
    assert_eq!((of.start(), of.file().metadata().expect("a file").len()), (0, 0x4000));
    assert!((1..9).all(|index| host.client.region(index).is_some_and(|region| region.file_offset.is_none())));

    // Configuration space: an NVMe controller that lets its capabilities be found.
    assert_eq!(host.read32(CONFIG, 8) >> 8, 0x01_08_02);
    let (mut at, mut found) = (host.read32(CONFIG, 0x34) & 0xff, Vec::new());
    while at != 0 {
        let head = host.read32(CONFIG, at.into());
        found.push(head & 0xff);
        at = head >> 8 & 0xff;
    }
    assert_eq!(found, [0x01, 0x10, 0x11], "power management, PCI Express, MSI-X");
    // Its base addresses are sized as a hypervisor does it.
    host.client.region_write(CONFIG, 0x10, &u32::MAX.to_le_bytes()).expect("written");
    assert_eq!(host.read32(CONFIG, 0x10), 0xffff_c004);

    for index in 0..5 {
        let info = host.client.get_irq_info(index).expect("information");
        assert_eq!(info.index, index);
        assert_eq!((info.count, info.flags & 1), ([1, 0, VECTORS.into(), 1, 0][index as usize], 1), "by eventfd");
    }
    host.client.shutdown().expect("left");
    assert_eq!(served.end().refused, 0);
}

#[test]
fn a_host_writes_and_reads_however_bar0_is_mapped() {
    for bar0 in [Bar0Map::Doorbells, Bar0Map::Whole, Bar0Map::None] {
        let served = served(bar0);
        let mut host = Host::connect(&served);
        let bar = host.client.region(0).expect("BAR0");
        let mapped = (bar.file_offset.is_some(), bar.sparse_areas.len());
        assert_eq!(mapped, [(true, 1), (true, 0), (false, 0)][bar0 as usize], "{bar0:?}");
        host.map();
        let events: Vec<OwnedFd> = (0..VECTORS).map(|_| event()).collect();
        // One descriptor a message: the client says that it takes no more, and sends as many as it likes.
        let fds: Vec<i32> = events.iter().map(AsRawFd::as_raw_fd).collect();
        host.client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, VECTORS.into(), &fds).expect("set");

        let mut admin = host.enable();
        let mut identify = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, Default::default());
        identify.dptr[0] = IOVA + DATA;
        host.run(&mut admin, identify);
        let page = host.data(4096);
        assert_eq!(page[4..24].trim_ascii_end(), SERIAL.as_bytes(), "{bar0:?}");
        let mut pair = host.create(&mut admin, 1, 3);
        events.iter().for_each(|event| _ = signals(event));
        host.write_and_read(&mut pair, bar0 as u8);
        until("the last interrupt", || (signals(&events[3]) > 0).then_some(()));
        assert_eq!([0, 1, 2, 4].map(|vector: usize| signals(&events[vector])), [0; 4], "a queue's own vector alone");

        // Without its lines the function goes on, and says nothing.
        host.client.set_irqs(MSIX, NONE | TRIGGER, 0, 0, &[]).expect("off");
        host.write_and_read(&mut pair, 0x55);
        assert_eq!(events.iter().map(signals).sum::<u64>(), 0);
        host.client.shutdown().expect("left");
        let counters = served.end();
        assert_eq!((counters.refused, counters.broken_protocol, counters.maps, counters.stray_fds), (0, 0, 1, 0), "{bar0:?}");
    }
}

#[test]
fn a_host_without_msix_is_told_by_the_pin() {
    let served = served(Bar0Map::Doorbells);
    let mut host = Host::connect(&served);
    host.map();
    let (pin, resample) = (event(), event());
    host.client.set_irqs(INTX, EVENTFD | TRIGGER, 0, 1, &[pin.as_raw_fd()]).expect("set");
    host.client.set_irqs(INTX, EVENTFD | UNMASK, 0, 1, &[resample.as_raw_fd()]).expect("set");
    let mut admin = host.enable();
    let mut pair = host.create(&mut admin, 1, 0);
    for round in 0..8 {
        host.write_and_read(&mut pair, round);
        until("told", || (signals(&pin) > 0).then_some(()));
        // Everything is taken: the level has gone, and unmasking the pin brings nothing.
        match round % 2 {
            0 => host.client.set_irqs(INTX, NONE | UNMASK, 0, 1, &[]).expect("unmasked"),
            _ => rustix::io::write(&resample, &1u64.to_ne_bytes()).map(drop).expect("signalled"),
        }
        until("unmasked", || (!served.slot.pin().is_masked()).then_some(()));
        assert_eq!(signals(&pin), 0);
    }
    host.client.shutdown().expect("left");
    assert_eq!(served.end().refused, 0);
}

#[test]
fn a_host_that_has_all_of_bar0_mapped_sends_no_message_for_a_register() {
    let served = served(Bar0Map::Whole);
    let mut host = Host::connect(&served);
    host.map();
    for round in 0..20 {
        // CC.EN falls and rises again as soon as CSTS.RDY lets it.
        let mut admin = host.enable();
        let mut pair = host.create(&mut admin, 1, 0);
        host.write_and_read(&mut pair, round);
        host.disable();
    }
    // A controller that fails is disabled all the same: memory goes from under its queues.
    host.enable();
    host.client.dma_unmap(IOVA, MEMORY).expect("unmapped");
    until("failed", || host.csts().cfs().then_some(()));
    host.map();
    host.disable();
    let mut admin = host.enable();
    let mut pair = host.create(&mut admin, 1, 0);
    host.write_and_read(&mut pair, 77);
    host.client.shutdown().expect("left");
    let counters = served.end();
    // VERSION, GET_INFO, nine regions, maps and unmaps: nothing else.
    assert_eq!((counters.requests, counters.refused, counters.resets), (1 + 1 + 9 + 3, 0, 0));
}

#[test]
fn a_reset_turns_it_off_and_keeps_memory_and_lines() {
    let served = served(Bar0Map::Doorbells);
    let mut host = Host::connect(&served);
    host.map();
    let line = event();
    host.client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 1, &[line.as_raw_fd()]).expect("set");
    for round in 0..3 {
        let mut admin = host.enable();
        let mut pair = host.create(&mut admin, 1, 0);
        _ = signals(&line);
        host.write_and_read(&mut pair, round);
        until("an interrupt", || (signals(&line) > 0).then_some(()));
        host.client.reset().expect("reset");
        let registers = [offset::CC, offset::CSTS, offset::AQA, offset::ASQ].map(|at| host.register(at));
        assert_eq!(registers, [0; 4], "as after power-on, when the reply is there");
    }
    let counters = served.end();
    assert_eq!((counters.resets, counters.refused, counters.unmaps), (3, 0, 0));
}

#[test]
fn memory_that_is_unmapped_is_not_used_any_more() {
    let served = served(Bar0Map::Doorbells);
    let mut host = Host::connect(&served);
    host.map();
    let mut admin = host.enable();
    let mut pair = host.create(&mut admin, 1, 0);
    host.write_and_read(&mut pair, 1);
    host.client.dma_unmap(IOVA, MEMORY).expect("unmapped");
    assert!(served.slot.space().find(IOVA).is_none(), "gone when the reply is there");
    // Its queues are gone: it says so, and comes up again where memory is.
    until("failed", || host.csts().cfs().then_some(()));
    host.client.reset().expect("reset");
    host.map();
    let mut admin = host.enable();
    let mut pair = host.create(&mut admin, 1, 0);
    host.write_and_read(&mut pair, 2);
    let counters = served.end();
    assert_eq!((counters.maps, counters.unmaps), (2, 1));
}

#[test]
fn one_client_after_another_finds_the_device() {
    let served = served(Bar0Map::Doorbells);
    for seed in 0..3 {
        // The one before went without a word, its queues as they were.
        let mut host = Host::connect(&served);
        host.client.reset().expect("reset");
        host.map();
        let mut admin = host.enable();
        let mut pair = host.create(&mut admin, 1, 0);
        host.write_and_read(&mut pair, seed);
    }
    let counters = served.end();
    assert_eq!((counters.clients, counters.broken_protocol, counters.refused), (3, 0, 0));
}
