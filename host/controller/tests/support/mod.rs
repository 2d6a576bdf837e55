//! A raw guest: registers and queues by hand, nothing clever.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use dray_controller::{
    ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig,
};
use dray_device::backing::Backing;
use dray_device::function::Function;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::space::AddressSpace;
use dray_nvme::command::{CompletionEntry, SubmissionEntry};
use dray_nvme::doorbell_buffer::{cq_head_offset, needs_doorbell_write, sq_tail_offset};
use dray_nvme::registers::{cq_head_doorbell, offset, sq_tail_doorbell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::IntoBytes;

pub const MMC: u16 = 1;
pub const MC: u16 = 2;
pub const BLOCKS: u64 = 8192;
pub const CC: u32 = 0x0046_0001;

pub struct Queue {
    pub sq: usize,
    pub cq: usize,
    pub entries: u32,
    pub tail: u32,
    pub head: u32,
    pub phase: bool,
    cid: u16,
}

pub struct Guest {
    pub slot: Slot,
    pub function: Arc<dyn Function>,
    pub memory: DmaBuffer,
    pub iova: u64,
    next_page: usize,
    pub queues: BTreeMap<u16, Queue>,
    /// Completions seen while waiting for others.
    pub strays: Vec<(u16, CompletionEntry)>,
    pub drain: bool,
}

pub struct World {
    pub subsystem: Subsystem,
    pub now: Time,
}

pub fn namespace(nsid: u32) -> NamespaceConfig {
    NamespaceConfig {
        nsid,
        nguid: [nsid as u8; 16],
        eui64: [nsid as u8; 8],
        uuid: [7; 16],
        shared: true,
        write_protected: false,
    }
}

pub fn controller(cntlid: u16, role: ControllerRole) -> ControllerConfig {
    ControllerConfig { cntlid, role, namespaces: vec![1], io_queues: 4, vectors: 5, fence: Fence::default() }
}

pub fn config() -> SubsystemConfig {
    SubsystemConfig {
        controllers: vec![controller(MMC, ControllerRole::Management), controller(MC, ControllerRole::Migratable)],
        ..SubsystemConfig::default()
    }
}

pub fn memory() -> Box<dyn Backing> {
    Box::new(MemoryBacking::new(BLOCKS * 512, 512).expect("backing"))
}

impl World {
    pub fn new() -> Self {
        Self::with(config(), vec![(namespace(1), memory())])
    }

    pub fn with(config: SubsystemConfig, namespaces: Vec<(NamespaceConfig, Box<dyn Backing>)>) -> Self {
        Self { subsystem: Subsystem::new(config, namespaces).expect("subsystem"), now: Time(1_000) }
    }

    pub fn poll(&mut self) {
        self.now = self.now.after_us(1);
        let _progress = self.subsystem.poll(self.now);
    }

    pub fn guest(&mut self, cntlid: u16) -> Guest {
        let guest = Guest::new();
        guest.slot.point_at(&self.subsystem.plug(cntlid).expect("controller"));
        guest
    }

    /// A guest whose controller is enabled.
    pub fn ready(&mut self, cntlid: u16) -> Guest {
        let mut guest = self.guest(cntlid);
        guest.enable(self);
        guest
    }
}

impl Guest {
    pub fn new() -> Self {
        let space = AddressSpace::default();
        let memory = DmaBuffer::allocate("guest", 16 << 20, Pages::Small).expect("memory");
        let iova = space.map(&memory, true).expect("map");
        let slot = Slot::new(space, 5).expect("slot");
        let function = slot.function();
        Self { slot, function, memory, iova, next_page: 0, queues: BTreeMap::new(), strays: Vec::new(), drain: true }
    }

    /// `bytes` of memory at a page: offset in the arena.
    pub fn pages(&mut self, bytes: usize) -> usize {
        let at = self.next_page * 4096;
        self.next_page += bytes.div_ceil(4096);
        assert!(at + bytes <= self.memory.len());
        at
    }

    pub fn address(&self, at: usize) -> u64 {
        self.iova + at as u64
    }

    pub fn put(&self, at: usize, bytes: &[u8]) {
        self.memory.arena().write(at, bytes);
    }

    pub fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.arena().read(at, &mut bytes);
        bytes
    }

    pub fn csts(&self) -> u32 {
        self.function.read32(offset::CSTS)
    }

    fn add_queue(&mut self, qid: u16, entries: u32) {
        let sq = self.pages(entries as usize * 64);
        let cq = self.pages(entries as usize * 16);
        self.put(sq, &vec![0; entries as usize * 64]);
        self.put(cq, &vec![0; entries as usize * 16]);
        self.queues.insert(qid, Queue { sq, cq, entries, tail: 0, head: 0, phase: true, cid: 0 });
    }

    pub fn start(&mut self) {
        self.queues.clear();
        self.strays.clear();
        self.add_queue(0, 32);
        let queue = &self.queues[&0];
        let (asq, acq) = (self.address(queue.sq), self.address(queue.cq));
        self.function.write32(offset::AQA, 31 << 16 | 31);
        self.function.write64(offset::ASQ, asq);
        self.function.write64(offset::ACQ, acq);
        self.function.write32(offset::CC, CC);
    }

    pub fn enable(&mut self, world: &mut World) {
        self.start();
        for _ in 0..10 {
            world.poll();
        }
        assert_eq!(self.csts(), 1, "ready");
    }

    pub fn create_pair(&mut self, world: &mut World, qid: u16, entries: u32, vector: Option<u16>) {
        self.add_queue(qid, entries);
        let (sq, cq) = (self.address(self.queues[&qid].sq), self.address(self.queues[&qid].cq));
        let size = (entries - 1) as u16;
        assert_ok(self.admin(world, SubmissionEntry::create_io_cq(qid, size, vector, cq)));
        assert_ok(self.admin(world, SubmissionEntry::create_io_sq(qid, size, qid, sq)));
    }

    /// Puts a command into a queue; the doorbell is another step.
    pub fn push(&mut self, qid: u16, entry: SubmissionEntry) -> u16 {
        let queue = self.queues.get_mut(&qid).expect("queue");
        queue.cid = queue.cid.wrapping_add(1);
        let cid = queue.cid;
        let entry = entry.with_cid(cid);
        let at = queue.sq + queue.tail as usize * 64;
        queue.tail = (queue.tail + 1) % queue.entries;
        self.memory.arena().write(at, entry.as_bytes());
        cid
    }

    pub fn ring(&self, qid: u16) {
        self.function.doorbell(sq_tail_doorbell(qid, 0)).unwrap().ring(self.queues[&qid].tail);
    }

    /// The next completion, if it is there.
    pub fn pop(&mut self, qid: u16) -> Option<CompletionEntry> {
        let queue = self.queues.get_mut(&qid).expect("queue");
        let at = queue.cq + queue.head as usize * 16;
        let arena = self.memory.arena();
        let word = arena.load32(at + 12, Ordering::Acquire);
        if (word >> 16 & 1 == 1) != queue.phase {
            return None;
        }
        let mut entry = CompletionEntry::default();
        arena.read(at, entry.as_mut_bytes());
        queue.head += 1;
        if queue.head == queue.entries {
            (queue.head, queue.phase) = (0, !queue.phase);
        }
        if self.drain {
            self.function.doorbell(cq_head_doorbell(qid, 0)).unwrap().ring(queue.head);
        }
        Some(entry)
    }

    pub fn wait(&mut self, world: &mut World, qid: u16, cid: u16) -> CompletionEntry {
        if let Some(at) = self.strays.iter().position(|(q, c)| *q == qid && c.cid == cid) {
            return self.strays.remove(at).1;
        }
        // By the clock: a file's operations end when the kernel says so, however often the controller is polled.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while std::time::Instant::now() < end {
            world.poll();
            while let Some(entry) = self.pop(qid) {
                if entry.cid == cid {
                    return entry;
                }
                self.strays.push((qid, entry));
            }
        }
        panic!("no completion of command {cid} in queue {qid}");
    }

    pub fn run(&mut self, world: &mut World, qid: u16, entry: SubmissionEntry) -> CompletionEntry {
        let cid = self.push(qid, entry);
        self.ring(qid);
        self.wait(world, qid, cid)
    }

    pub fn admin(&mut self, world: &mut World, entry: SubmissionEntry) -> CompletionEntry {
        self.run(world, 0, entry)
    }

    /// An admin command whose data of up to two pages comes back.
    pub fn admin_in(&mut self, world: &mut World, entry: SubmissionEntry, len: usize) -> (CompletionEntry, Vec<u8>) {
        let at = self.pages(len.max(1));
        let done = self.admin(world, entry.with_prps(self.address(at), self.address(at + 4096)));
        (done, self.get(at, len))
    }

    /// An admin command with data of up to two pages.
    pub fn admin_out(&mut self, world: &mut World, entry: SubmissionEntry, data: &[u8]) -> CompletionEntry {
        let at = self.pages(data.len().max(1));
        self.put(at, data);
        self.admin(world, entry.with_prps(self.address(at), self.address(at + 4096)))
    }

    /// Writes up to two pages.
    pub fn write(&mut self, world: &mut World, qid: u16, slba: u64, data: &[u8]) -> CompletionEntry {
        let at = self.pages(data.len());
        self.put(at, data);
        let entry = SubmissionEntry::write(1, slba, (data.len() / 512) as u32);
        self.run(world, qid, entry.with_prps(self.address(at), self.address(at + 4096)))
    }

    /// Reads up to two pages.
    pub fn read(&mut self, world: &mut World, qid: u16, slba: u64, blocks: u32) -> (CompletionEntry, Vec<u8>) {
        let at = self.pages(blocks as usize * 512);
        let entry = SubmissionEntry::read(1, slba, blocks);
        let done = self.run(world, qid, entry.with_prps(self.address(at), self.address(at + 4096)));
        (done, self.get(at, blocks as usize * 512))
    }
}

#[track_caller]
pub fn assert_ok(entry: CompletionEntry) -> CompletionEntry {
    assert!(!entry.status().is_error(), "{entry:?}");
    entry
}

impl Guest {
    /// Resets the controller and enables it with new queues.
    pub fn enable_after_reset(&mut self, world: &mut World) {
        self.function.write32(offset::CC, 0);
        world.poll();
        assert_eq!(self.csts() & 1, 0);
        self.enable(world);
    }
}

/// Shadow doorbells as a guest keeps them: two pages of its memory.
#[derive(Clone, Copy)]
pub struct Shadow {
    pub bells: usize,
    pub events: usize,
}

impl Shadow {
    pub fn configure(world: &mut World, guest: &mut Guest) -> Self {
        let bells = guest.pages(8192);
        guest.put(bells, &[0xee; 8192]);
        let shadow = Self { bells, events: bells + 4096 };
        assert_ok(guest.admin(world, shadow.command(guest)));
        // Heads go into the page from now on.
        guest.drain = false;
        shadow
    }

    pub fn command(self, guest: &Guest) -> SubmissionEntry {
        SubmissionEntry::doorbell_buffer_config(guest.address(self.bells), guest.address(self.events))
    }

    /// What the controller has stored: event indices of the tail and of the head.
    pub fn events(self, guest: &Guest, qid: u16) -> [u32; 2] {
        let arena = guest.memory.arena();
        [sq_tail_offset(qid, 0), cq_head_offset(qid, 0)].map(|at| arena.load32(self.events + at as usize, Ordering::Acquire))
    }

    pub fn bells(self, guest: &Guest, qid: u16) -> [u32; 2] {
        let arena = guest.memory.arena();
        [sq_tail_offset(qid, 0), cq_head_offset(qid, 0)].map(|at| arena.load32(self.bells + at as usize, Ordering::Acquire))
    }

    fn store(self, guest: &Guest, place: u32, new: u32) -> bool {
        let arena = guest.memory.arena();
        let old = arena.load32(self.bells + place as usize, Ordering::Acquire);
        arena.store32(self.bells + place as usize, new, Ordering::SeqCst);
        let event = arena.load32(self.events + place as usize, Ordering::SeqCst);
        needs_doorbell_write(event, new as u16, old as u16)
    }

    /// Stores the tail; whether the register must be written.
    pub fn tail(self, guest: &Guest, qid: u16) -> bool {
        self.store(guest, sq_tail_offset(qid, 0), guest.queues[&qid].tail)
    }

    /// Stores the head; whether the register must be written.
    pub fn head(self, guest: &Guest, qid: u16) -> bool {
        self.store(guest, cq_head_offset(qid, 0), guest.queues[&qid].head)
    }
}
