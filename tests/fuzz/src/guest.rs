//! A party at a controller of ours: a slot, some memory, and everything that can be done with them, decoded from bytes.
//!
//! The memory is one arena, with pages at both ends that are never mapped:
//!
//! | pages of the arena | mapped at | |
//! |---|---|---|
//! | 0 | nowhere | must stay as it is |
//! | 1 to 32 | 10_0000h, the first eight at C0_0000h too | queues (two pages each, from the first), data, lists |
//! | 33 to 36 | 40_0000h, read-only | must stay as it is |
//! | 37 to 40 | 80_0000h | may be unmapped; must stay as it is once that is done |
//! | 41 | nowhere | must stay as it is |

use crate::input::Input;
use dray_device::function::Function;
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::slot::Slot;
use dray_device::space::{AddressSpace, Unmapping};
use dray_nvme::command::{Cdw0, CompletionEntry, SubmissionEntry};
use dray_nvme::registers::{cq_head_doorbell, offset, sq_tail_doorbell};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::{FromBytes, IntoBytes};

/// I/O virtual address of the memory that queues lie in.
pub const MAIN: u64 = 0x10_0000;
/// The same memory's first pages once more.
pub const ALIAS: u64 = 0xc0_0000;
/// Memory that the device may only read.
pub const READ_ONLY: u64 = 0x40_0000;
/// Memory that may be unmapped.
pub const EXTRA: u64 = 0x80_0000;
/// Pages at [`MAIN`].
pub const MAIN_PAGES: usize = 32;
/// Queues that have pages of their own: the admin queue and four others.
pub const QUEUES: usize = 5;
/// The first page of data.
pub const DATA_PAGE: usize = 2 * QUEUES;
/// Entries of a queue that the party creates itself.
pub const ENTRIES: u16 = 16;

const EXTRA_PAGES: usize = 4;
const ALL_PAGES: usize = 1 + MAIN_PAGES + 4 + EXTRA_PAGES + 1;
const READ_ONLY_PAGE: usize = 1 + MAIN_PAGES;
const EXTRA_PAGE: usize = READ_ONLY_PAGE + 4;
const CANARY: u8 = 0xa5;
/// CC with 64-byte and 16-byte entries, enabled.
const ENABLED: u32 = 0x0046_0001;

/// Whether the extra pages are mapped.
#[derive(Debug)]
enum Extra {
    Mapped,
    Leaving(Unmapping),
    /// Unmapped, and filled with the canary since.
    Gone,
}

/// A guest at its slot, or the host at a management controller's.
#[derive(Debug)]
pub struct Party {
    /// The slot.
    pub slot: Slot,
    /// The pages at [`MAIN`].
    pub memory: DmaBuffer,
    function: Arc<dyn Function>,
    arena: Arc<Arena>,
    extra: Extra,
    tails: [u16; QUEUES],
    heads: [u16; QUEUES],
    cid: u16,
    /// Data pointers that the input makes stay in the pages of data.
    pub data_only: bool,
}

impl Party {
    /// A party whose slot points nowhere yet.
    #[must_use]
    pub fn new() -> Self {
        let whole = DmaBuffer::allocate("fuzz-guest", ALL_PAGES * PAGE, Pages::Small).expect("memory");
        let pages = |first: usize, count: usize| whole.slice(first * PAGE, count * PAGE).expect("pages");
        let (memory, fixed, extra) = (pages(1, MAIN_PAGES), pages(READ_ONLY_PAGE, 4), pages(EXTRA_PAGE, EXTRA_PAGES));
        let arena = Arc::clone(whole.arena());
        for first in [0, READ_ONLY_PAGE, READ_ONLY_PAGE + 1, READ_ONLY_PAGE + 2, READ_ONLY_PAGE + 3, ALL_PAGES - 1] {
            arena.fill(first * PAGE, PAGE, CANARY);
        }
        let space = AddressSpace::default();
        space.map_at(MAIN, &memory, true).expect("map");
        space.map_at(ALIAS, &pages(1, 8), true).expect("map");
        space.map_at(READ_ONLY, &fixed, false).expect("map");
        space.map_at(EXTRA, &extra, true).expect("map");
        let slot = Slot::new(space, 4).expect("slot");
        let function = slot.function();
        Self {
            slot,
            memory,
            function,
            arena,
            extra: Extra::Mapped,
            tails: [0; QUEUES],
            heads: [0; QUEUES],
            cid: 0,
            data_only: false,
        }
    }

    /// What data of operations may lie in: see [`crate::media::Rules`].
    #[must_use]
    pub fn places(&self) -> Vec<(Arc<Arena>, usize, usize, bool)> {
        let place = |first: usize, count: usize, writable| (Arc::clone(&self.arena), first * PAGE, (first + count) * PAGE, writable);
        vec![place(1, MAIN_PAGES, true), place(READ_ONLY_PAGE, 4, false), place(EXTRA_PAGE, EXTRA_PAGES, true)]
    }

    /// Asserts that nothing has written where nothing may.
    pub fn check(&self) {
        let is_canary = |page: usize| {
            let mut bytes = [0; PAGE];
            self.arena.read(page * PAGE, &mut bytes);
            bytes.iter().all(|b| *b == CANARY)
        };
        assert!(is_canary(0) && is_canary(ALL_PAGES - 1), "memory that was never mapped has changed");
        assert!((READ_ONLY_PAGE..READ_ONLY_PAGE + 4).all(is_canary), "memory mapped read-only has changed");
        if matches!(self.extra, Extra::Gone) {
            assert!((EXTRA_PAGE..EXTRA_PAGE + EXTRA_PAGES).all(is_canary), "memory has changed after its unmapping was done");
        }
    }

    /// Asserts that the controller's entries in the completion queues of the party's own are those of commands that it was
    /// given, in queues whose memory nobody else has written to.
    ///
    /// # Panics
    /// When there is another.
    pub fn check_completions(&self) {
        for qid in 0..QUEUES {
            for at in 0..usize::from(ENTRIES) {
                let bytes = self.get((2 * qid + 1) * PAGE + at * 16, 16);
                let entry = CompletionEntry::read_from_bytes(&bytes).expect("16 bytes");
                let known = entry.cid <= self.cid && usize::from(entry.sqid) == qid;
                assert!(entry.as_bytes() == [0; 16] || known, "{entry:?} in queue {qid} is no command's");
            }
        }
    }

    /// Entries in a completion queue that nobody else has written to since it was new, and that has not been filled once.
    #[must_use]
    pub fn completions(&self, qid: usize) -> usize {
        let slot = |at: u16| self.get((2 * qid + 1) * PAGE + usize::from(at) * 16, 16);
        (0..ENTRIES).filter(|at| slot(*at).iter().any(|byte| *byte != 0)).count()
    }

    /// Looks whether an unmapping is done.
    pub fn attend(&mut self) {
        if let Extra::Leaving(unmapping) = &self.extra
            && unmapping.is_done()
        {
            self.arena.fill(EXTRA_PAGE * PAGE, EXTRA_PAGES * PAGE, CANARY);
            self.extra = Extra::Gone;
        }
    }

    /// Takes the extra pages out of the address space, or puts them back.
    pub fn turn_extra(&mut self) {
        self.extra = match &self.extra {
            Extra::Mapped => Extra::Leaving(self.slot.space().unmap(EXTRA).expect("mapped")),
            Extra::Leaving(_) => return,
            Extra::Gone => {
                let pages = DmaBuffer::new(Arc::clone(&self.arena), EXTRA_PAGE * PAGE, EXTRA_PAGES * PAGE).expect("pages");
                self.slot.space().map_at(EXTRA, &pages, true).expect("free again");
                Extra::Mapped
            }
        };
    }

    /// The address of a page at [`MAIN`].
    #[must_use]
    pub fn page(&self, page: usize) -> u64 {
        MAIN + (page * PAGE) as u64
    }

    /// Writes bytes into the memory at [`MAIN`], as far as they fit.
    pub fn put(&self, at: usize, bytes: &[u8]) {
        let at = at.min(self.memory.len());
        let len = bytes.len().min(self.memory.len() - at);
        if let Some(place) = self.memory.part(at, len) {
            place.write(&bytes[..len]);
        }
    }

    /// Reads from the memory at [`MAIN`].
    #[must_use]
    pub fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.part(at, len).expect("inside").read(&mut bytes);
        bytes
    }

    /// Zeroes the queues' pages and enables the controller with an admin queue there. What was outstanding is forgotten.
    pub fn enable(&mut self) {
        self.put(0, &[0; 2 * QUEUES * PAGE]);
        (self.tails, self.heads) = ([0; QUEUES], [0; QUEUES]);
        let size = u32::from(ENTRIES - 1);
        self.function.write32(offset::AQA, size << 16 | size);
        self.function.write64(offset::ASQ, self.page(0));
        self.function.write64(offset::ACQ, self.page(1));
        self.function.write32(offset::CC, ENABLED);
    }

    /// Clears CC.EN.
    pub fn disable(&self) {
        self.function.write32(offset::CC, 0);
    }

    /// CSTS.
    #[must_use]
    pub fn csts(&self) -> u32 {
        self.function.read32(offset::CSTS)
    }

    /// The commands that create I/O queue pair `qid` (from 1) in its own pages.
    #[must_use]
    pub fn pair_commands(&self, qid: u16) -> [SubmissionEntry; 2] {
        let page = 2 * usize::from(qid);
        [
            SubmissionEntry::create_io_cq(qid, ENTRIES - 1, Some(1), self.page(page + 1)),
            SubmissionEntry::create_io_sq(qid, ENTRIES - 1, qid, self.page(page)),
        ]
    }

    /// Puts a command into a queue's pages and returns its CID; the doorbell is another step.
    pub fn push(&mut self, qid: usize, entry: &SubmissionEntry) -> u16 {
        self.cid = self.cid.wrapping_add(1).max(1);
        let tail = self.tails[qid];
        let at = 2 * qid * PAGE + usize::from(tail) * 64;
        self.put(at, entry.with_cid(self.cid).as_bytes());
        self.tails[qid] = (tail + 1) % ENTRIES;
        self.cid
    }

    /// Rings a submission queue's doorbell with the tail, moved by `off`.
    pub fn ring(&self, qid: usize, off: u32) {
        if let Some(bell) = self.function.doorbell(sq_tail_doorbell(qid as u16, 0)) {
            bell.ring(u32::from(self.tails[qid]).wrapping_add(off));
        }
    }

    /// Gives all completion slots of a queue back that have the phase of the first pass or its inverse, whichever the newest
    /// has; moved by `off`.
    pub fn give_back(&mut self, qid: usize, off: u32) {
        let page = (2 * qid + 1) * PAGE;
        let phase = |at: u16| self.get(page + usize::from(at) * 16, 16)[14] & 1;
        let head = self.heads[qid];
        let mut at = (head + 1) % ENTRIES;
        while at != head && phase(at) == phase(head) {
            at = (at + 1) % ENTRIES;
        }
        self.heads[qid] = at;
        if let Some(bell) = self.function.doorbell(cq_head_doorbell(qid as u16, 0)) {
            bell.ring(u32::from(at).wrapping_add(off));
        }
    }

    /// The completion of `cid` in a queue that nobody else has written to since it was new; its slot is given back.
    pub fn completion(&mut self, qid: usize, cid: u16) -> Option<CompletionEntry> {
        let at = (2 * qid + 1) * PAGE;
        let slot = |i: u16| CompletionEntry::read_from_bytes(&self.get(at + usize::from(i) * 16, 16)).ok();
        let (index, entry) = (0..ENTRIES).find_map(|i| slot(i).filter(|entry| entry.cid == cid).map(|entry| (i, entry)))?;
        if let Some(bell) = self.function.doorbell(cq_head_doorbell(qid as u16, 0)) {
            bell.ring(u32::from((index + 1) % ENTRIES));
        }
        Some(entry)
    }

    /// An address of the input's choice: most often one that is mapped.
    pub fn address(&self, input: &mut Input<'_>) -> u64 {
        let word = usize::from(input.u16());
        let low = word & 0x1fff;
        if self.data_only {
            let page = DATA_PAGE + low % (MAIN_PAGES - DATA_PAGE);
            return self.page(page) + (low as u64 >> 5 & 3) * 4 * u64::from(word & 0x8000 != 0);
        }
        match word >> 13 {
            0 | 1 => self.page(low % MAIN_PAGES),
            2 => MAIN + (low * 16) as u64,
            3 => self.page(low % MAIN_PAGES) + (low as u64 >> 5) * 4,
            4 => READ_ONLY + (low % 4 * PAGE) as u64 + (low as u64 >> 5) * 4,
            5 => [ALIAS, EXTRA][low & 1] + ((low >> 1) % 8 * PAGE) as u64,
            6 => [MAIN + (MAIN_PAGES * PAGE) as u64, EXTRA + (EXTRA_PAGES * PAGE) as u64, u64::MAX][low % 3] - (low as u64 >> 2),
            _ => input.u64(),
        }
    }

    /// One of the things that need no command: registers, doorbells, memory. `which` says what.
    pub fn act(&mut self, which: u8, input: &mut Input<'_>) {
        match which % 8 {
            0 => {
                let at = [offset::CC, offset::AQA, offset::ASQ, offset::ASQ + 4, offset::ACQ, offset::ACQ + 4, offset::INTMS, offset::INTMC];
                let choice = input.below(12);
                let at = at.get(choice).copied().unwrap_or_else(|| u32::from(input.u16()) * 4);
                let value = match (at, input.flag()) {
                    (offset::CC, true) => ENABLED ^ 1 << (input.u8() & 31),
                    (offset::ASQ | offset::ACQ, true) => self.address(input) as u32,
                    _ => input.number32(),
                };
                self.function.write32(at, value);
            }
            1 => {
                let (qid, value) = (input.number16() % 600, input.number32());
                let bell = if input.flag() { cq_head_doorbell(qid, 0) } else { sq_tail_doorbell(qid, 0) };
                if let Some(bell) = self.function.doorbell(bell) {
                    bell.ring(value);
                }
            }
            2 => {
                let at = input.u16();
                let len = usize::from(input.u8() & 63) + 1;
                let at = if self.data_only { DATA_PAGE * PAGE + usize::from(at) } else { usize::from(at) * 2 };
                self.put(at, input.bytes(len));
            }
            3 => {
                // A list of addresses: PRPs.
                let at = usize::from(input.u8()) * 512;
                let count = usize::from(input.u8() & 15) + 1;
                let repeat = if input.flag() { 512 / count } else { 1 };
                let list: Vec<u8> = (0..count).flat_map(|_| self.address(input).to_le_bytes()).collect();
                self.put(self.data_place(at), &list.repeat(repeat));
            }
            4 => {
                // Descriptors: an SGL segment, or ranges of DSM and Copy.
                let at = usize::from(input.u8()) * 512;
                for i in 0..usize::from(input.u8() & 7) + 1 {
                    let mut descriptor = [0; 16];
                    descriptor[..8].copy_from_slice(&self.address(input).to_le_bytes());
                    descriptor[8..12].copy_from_slice(&input.number32().to_le_bytes());
                    descriptor[15] = input.u8();
                    self.put(self.data_place(at) + i * 16, &descriptor);
                }
            }
            5 => self.give_back(input.below(QUEUES), input.number32()),
            6 => self.turn_extra(),
            _ => {
                let at = usize::from(input.u8()) * 512;
                let (key, count) = (input.number(), input.below(32));
                let list: Vec<u8> = (0..count).flat_map(|_| [key, input.number()]).flat_map(u64::to_le_bytes).collect();
                self.put(self.data_place(at), &list);
            }
        }
    }

    fn data_place(&self, at: usize) -> usize {
        if self.data_only { DATA_PAGE * PAGE + at % ((MAIN_PAGES - DATA_PAGE) * PAGE) } else { at }
    }

    /// A data pointer of the input's choice.
    pub fn with_pointer(&self, entry: SubmissionEntry, input: &mut Input<'_>) -> SubmissionEntry {
        let (first, second) = (self.address(input), self.address(input));
        match input.u8() {
            0..=199 => entry.with_prps(first, second),
            kind => {
                // An SGL descriptor, whole or not.
                let length = u64::from(input.number32()) | u64::from(input.u8()) << 56;
                let bits = entry.cdw0.into_bits() | u32::from(kind & 3) << 14;
                SubmissionEntry { cdw0: Cdw0::from_bits(bits), dptr: [first, length], ..entry }
            }
        }
    }

    /// The first word of a completion queue's slot, for a second actor to rewrite.
    #[must_use]
    pub fn word(&self, at: usize) -> (Arc<Arena>, usize) {
        (Arc::clone(&self.arena), self.memory.offset() + at / 4 * 4 % self.memory.len())
    }

    /// Makes every address valid again and forgets the past: for the check that follows a session.
    pub fn heal(&mut self) {
        self.slot.function().reset().expect("a reset");
    }

    /// Stores a word with the order that a guest's processor has.
    pub fn store(place: &(Arc<Arena>, usize), value: u32) {
        place.0.store32(place.1, value, Ordering::Release);
    }
}

impl Default for Party {
    fn default() -> Self {
        Self::new()
    }
}
