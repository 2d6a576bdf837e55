//! The driver's opponent: a function whose device side behaves until the input says otherwise.

use crate::input::Input;
use dray_device::event::EventLine;
use dray_device::function::{Doorbell, Function};
use dray_device::memory::{Arena, PAGE, Pages};
use dray_device::space::{AddressSpace, SpaceReader};
use dray_nvme::command::{AdminOpcode, CdqCdw10, CompletionEntry, StatusPhase, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{Cns, IdentifyController, write_ascii};
use dray_nvme::registers::{Aqa, Cap, Cc, Csts, ShutdownNotification, ShutdownStatus, offset};
use dray_nvme::status::Status;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of BAR0.
const BAR_BYTES: usize = 2 * PAGE;
/// Commands that the device keeps.
const MOST_HELD: usize = 4096;
/// Serial number of the device while it behaves.
pub const SERIAL: &str = "HONEST";

/// One queue pair as the device keeps it.
#[derive(Clone, Copy, Debug, Default)]
struct Pair {
    sq: u64,
    cq: u64,
    sq_entries: u32,
    cq_entries: u32,
    sq_head: u32,
    cq_tail: u32,
}

/// A controller data queue as the device keeps it.
#[derive(Clone, Copy, Debug)]
struct Ring {
    id: u16,
    base: u64,
    contiguous: bool,
    bytes: u64,
    tail: u64,
}

#[derive(Debug)]
struct Inner {
    bar: Arc<Arena>,
    registers: BTreeMap<u32, u32>,
    /// Values that the next reads of a register give instead.
    lies: VecDeque<(u32, u32)>,
    gone: bool,
    never_ready: bool,
    enabled: bool,
    queues: BTreeMap<u16, Pair>,
    aers: VecDeque<u16>,
    held: VecDeque<(u16, SubmissionEntry)>,
    last: Option<(u16, CompletionEntry)>,
    /// SQID and CID of every completion posted.
    posted: BTreeSet<(u16, u16)>,
    /// Memory was written to at will: completions may have come about that were never posted.
    scribbled: bool,
    rings: Vec<Ring>,
    page: Vec<u8>,
    state: Vec<u8>,
    reader: SpaceReader,
}

/// The function and the device behind it.
#[derive(Debug)]
pub struct Device {
    bar: Arc<Arena>,
    space: AddressSpace,
    line: EventLine,
    inner: Mutex<Inner>,
}

fn honest_page() -> Vec<u8> {
    let mut page = IdentifyController::default();
    write_ascii(&mut page.sn, SERIAL);
    (page.mdts, page.acl, page.aerl) = (5, 1, 3);
    page.oncs.set_write_zeroes(true);
    page.as_bytes().to_vec()
}

fn honest_registers() -> BTreeMap<u32, u32> {
    let cap = Cap::new().with_mqes(255).with_cqr(true).with_to(1).with_css(Cap::CSS_NVM).into_bits();
    [(offset::CAP, cap as u32), (offset::CAP + 4, (cap >> 32) as u32), (offset::VS, 0x2_0300)].into()
}

impl Device {
    /// A device that behaves.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let space = AddressSpace::default();
        let bar = Arena::new("fuzz-bar", BAR_BYTES, Pages::Small).expect("memory");
        let inner = Inner {
            bar: Arc::clone(&bar),
            registers: honest_registers(),
            lies: VecDeque::new(),
            gone: false,
            never_ready: false,
            enabled: false,
            queues: BTreeMap::new(),
            aers: VecDeque::new(),
            held: VecDeque::new(),
            last: None,
            posted: BTreeSet::new(),
            scribbled: false,
            rings: Vec::new(),
            page: honest_page(),
            state: vec![0; 256],
            reader: space.reader(),
        };
        Arc::new(Self { bar, space, line: EventLine::new().expect("a line"), inner: Mutex::new(inner) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on everything is as it should be.
    pub fn reform(&self) {
        let mut inner = self.lock();
        for (at, value) in honest_registers() {
            inner.registers.insert(at, value);
        }
        inner.lies.clear();
        (inner.gone, inner.never_ready) = (false, false);
        inner.page = honest_page();
        inner.follow_cc();
    }

    /// Takes in the commands that the doorbells announce; with `answer` they are all answered as they should be.
    pub fn work(&self, answer: bool) {
        let mut inner = self.lock();
        inner.reader.refresh();
        if !inner.enabled {
            return;
        }
        let qids: Vec<u16> = inner.queues.keys().copied().collect();
        for qid in qids {
            let bell = offset::DOORBELLS as usize + usize::from(qid) * 8;
            let tail = if bell + 4 <= BAR_BYTES { self.bar.load32(bell, Ordering::Acquire) } else { 0 };
            while let Some(entry) = inner.fetch(qid, tail) {
                inner.held.push_back((qid, entry));
            }
        }
        while answer {
            let Some((qid, entry)) = inner.held.pop_front() else { break };
            inner.answer(qid, &entry);
        }
    }

    /// Whether a completion with that SQID and CID may lie in the memory that the driver reads.
    #[must_use]
    pub fn may_have_ended(&self, sqid: u16, cid: u16) -> bool {
        let inner = self.lock();
        inner.scribbled || inner.posted.contains(&(sqid, cid))
    }

    /// Something that no device should do.
    pub fn misbehave(&self, input: &mut Input<'_>) {
        self.lock().misbehave(input);
        self.line.signal();
    }
}

impl Inner {
    fn register(&self, at: u32) -> u32 {
        self.registers.get(&at).copied().unwrap_or(0)
    }

    fn register64(&self, at: u32) -> u64 {
        u64::from(self.register(at)) | u64::from(self.register(at + 4)) << 32
    }

    /// CSTS as CC wants it.
    fn follow_cc(&mut self) {
        let cc = Cc::from_bits(self.register(offset::CC));
        if cc.en() != self.enabled && !self.never_ready {
            self.enabled = cc.en();
            self.bar.fill(0, BAR_BYTES, 0);
            self.queues.clear();
            self.aers.clear();
            self.held.clear();
            self.rings.clear();
            self.last = None;
            if cc.en() {
                let aqa = Aqa::from_bits(self.register(offset::AQA));
                let (sq, cq) = (self.register64(offset::ASQ), self.register64(offset::ACQ));
                let (sq_entries, cq_entries) = (u32::from(aqa.asqs()) + 1, u32::from(aqa.acqs()) + 1);
                self.queues.insert(0, Pair { sq, cq, sq_entries, cq_entries, ..Pair::default() });
            }
        }
        let shut = cc.en() && cc.shn() == ShutdownNotification::NORMAL;
        let status = if shut { ShutdownStatus::COMPLETE } else { ShutdownStatus::NORMAL };
        self.registers.insert(offset::CSTS, Csts::new().with_rdy(self.enabled).with_shst(status).into_bits());
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        if let Some(segment) = self.reader.lookup(at, into.len(), false) {
            segment.read(into);
        }
    }

    fn write(&self, at: u64, from: &[u8]) {
        if let Some(segment) = self.reader.lookup(at, from.len(), true) {
            segment.write(from);
        }
    }

    fn fetch(&mut self, qid: u16, tail: u32) -> Option<SubmissionEntry> {
        let pair = self.queues.get_mut(&qid)?;
        if pair.sq_entries == 0 || pair.sq_head == tail % pair.sq_entries || self.held.len() >= MOST_HELD {
            return None;
        }
        let at = pair.sq + u64::from(pair.sq_head) * 64;
        pair.sq_head = (pair.sq_head + 1) % pair.sq_entries;
        let mut bytes = [0; 64];
        self.read(at, &mut bytes);
        SubmissionEntry::read_from_bytes(&bytes).ok()
    }

    /// Posts an entry in the next slot with the right phase tag.
    fn post(&mut self, qid: u16, mut entry: CompletionEntry) {
        let Some(pair) = self.queues.get_mut(&qid).filter(|pair| pair.cq_entries > 0) else { return };
        let phase = (pair.cq_tail / pair.cq_entries).is_multiple_of(2);
        let at = pair.cq.wrapping_add(u64::from(pair.cq_tail % pair.cq_entries) * 16);
        pair.cq_tail = pair.cq_tail.wrapping_add(1);
        entry.status_phase = StatusPhase::new().with_phase(phase).with_status(entry.status());
        self.write(at, entry.as_bytes());
        self.posted.insert((entry.sqid, entry.cid));
        self.last = Some((qid, entry));
    }

    fn complete(&mut self, qid: u16, cid: u16, result: u64, status: Status) {
        let sqhd = self.queues.get(&qid).map_or(0, |pair| pair.sq_head as u16);
        let status_phase = StatusPhase::new().with_status(status);
        let (dw0, dw1) = (result as u32, (result >> 32) as u32);
        self.post(qid, CompletionEntry { dw0, dw1, sqhd, sqid: qid, cid, status_phase });
    }

    /// Answers a command as it should be.
    fn answer(&mut self, qid: u16, entry: &SubmissionEntry) {
        let cid = entry.cdw0.cid();
        if qid != 0 {
            return self.complete(qid, cid, 0, Status::SUCCESS);
        }
        let mut result = 0;
        let mut status = Status::SUCCESS;
        match entry.admin_opcode() {
            AdminOpcode::ASYNC_EVENT_REQUEST => return self.aers.push_back(cid),
            AdminOpcode::IDENTIFY => match Cns(entry.cdw10 as u8) {
                Cns::CONTROLLER => self.give(entry, 0, &self.page.clone()),
                _ => status = Status::INVALID_FIELD.with_dnr(),
            },
            AdminOpcode::SET_FEATURES if entry.cdw10 as u8 == FeatureId::NUMBER_OF_QUEUES.0 => result = 0x0003_0003,
            AdminOpcode::CREATE_IO_CQ => {
                let pair = Pair { cq: entry.prp1(), cq_entries: (entry.cdw10 >> 16) + 1, ..Pair::default() };
                self.queues.insert(entry.cdw10 as u16, pair);
            }
            AdminOpcode::CREATE_IO_SQ => {
                if let Some(pair) = self.queues.get_mut(&(entry.cdw10 as u16)) {
                    (pair.sq, pair.sq_entries) = (entry.prp1(), (entry.cdw10 >> 16) + 1);
                }
            }
            AdminOpcode::DELETE_IO_CQ => drop(self.queues.remove(&(entry.cdw10 as u16))),
            AdminOpcode::ABORT => result = self.abort(entry.cdw10 as u16, (entry.cdw10 >> 16) as u16),
            AdminOpcode::CONTROLLER_DATA_QUEUE => result = self.data_queue(entry),
            AdminOpcode::MIGRATION_RECEIVE => {
                let at = (entry.offset() as usize).min(self.state.len());
                self.give(entry, 0, &self.state[at..].to_vec());
                result = 1;
            }
            _ => {}
        }
        self.complete(0, cid, result, status);
    }

    fn abort(&mut self, sqid: u16, cid: u16) -> u64 {
        let Some(at) = self.held.iter().position(|(qid, held)| *qid == sqid && held.cdw0.cid() == cid) else { return 1 };
        self.held.remove(at);
        self.complete(sqid, cid, 0, Status::ABORTED_BY_REQUEST);
        0
    }

    fn data_queue(&mut self, entry: &SubmissionEntry) -> u64 {
        if CdqCdw10::from_bits(entry.cdw10).sel().0 == 1 {
            self.rings.retain(|ring| ring.id != entry.cdw11 as u16);
            return 0;
        }
        let id = (0..).find(|id| !self.rings.iter().any(|ring| ring.id == *id)).unwrap_or(0);
        let (contiguous, bytes) = (entry.cdw11 & 1 == 1, u64::from(entry.cdw12) * 4);
        self.rings.push(Ring { id, base: entry.prp1(), contiguous, bytes, tail: 0 });
        id.into()
    }

    /// Data of an admin command: the pages that its PRPs name, from `skip` bytes on.
    fn give(&self, entry: &SubmissionEntry, skip: usize, bytes: &[u8]) {
        for (i, page) in bytes.chunks(PAGE).enumerate() {
            let at = match i {
                0 => entry.prp1(),
                1 if bytes.len() <= 2 * PAGE => entry.prp2(),
                _ => {
                    let mut pointer = [0; 8];
                    self.read(entry.prp2().wrapping_add((i as u64 - 1) * 8), &mut pointer);
                    u64::from_le_bytes(pointer)
                }
            };
            self.write(at.wrapping_add(skip as u64), page);
        }
    }

    fn misbehave(&mut self, input: &mut Input<'_>) {
        self.reader.refresh();
        match input.below(16) {
            0 => self.lie(input),
            1 => self.gone = input.flag(),
            2 => self.never_ready = input.flag(),
            3 => {
                let csts = Csts::new().with_cfs(input.flag()).with_rdy(input.flag()).into_bits();
                self.registers.insert(offset::CSTS, csts);
            }
            4 => self.edit_page(input),
            5 | 6 => self.answer_wrongly(input),
            7 => {
                // Any completion, in the right place or in any.
                let qid = input.number16() % 5;
                let mut bytes = [0; 16];
                let given = input.bytes(16);
                bytes[..given.len()].copy_from_slice(given);
                self.post(qid, CompletionEntry::read_from_bytes(&bytes).unwrap_or_default());
            }
            8 => {
                if let Some((qid, entry)) = self.last {
                    self.post(qid, entry);
                }
            }
            9 => {
                let (dw0, dw1) = (input.number32(), input.number32());
                if let Some(cid) = self.aers.pop_front() {
                    self.complete(0, cid, u64::from(dw0) | u64::from(dw1) << 32, Status::SUCCESS);
                }
            }
            10 | 11 => self.entries(input),
            12 => self.scribble(input),
            13 => {
                let at = input.below(256);
                let bytes = input.bytes(16);
                let len = bytes.len().min(self.state.len().saturating_sub(at));
                if let Some(place) = self.state.get_mut(at..at + len) {
                    place.copy_from_slice(&bytes[..len]);
                }
            }
            14 => drop(self.held.remove(input.below(8))),
            _ => {
                // Completion queue tails and submission queue heads go astray.
                let qid = input.number16() % 5;
                if let Some(pair) = self.queues.get_mut(&qid) {
                    pair.cq_tail = pair.cq_tail.wrapping_add(input.number32());
                    pair.sq_head = input.number32() % pair.sq_entries.max(1);
                }
            }
        }
    }

    fn lie(&mut self, input: &mut Input<'_>) {
        let at = [offset::CSTS, offset::CAP, offset::CAP + 4, offset::VS, offset::CC, offset::AQA][input.below(6)];
        let value = if input.flag() { u32::MAX } else { input.number32() };
        if input.flag() {
            self.registers.insert(at, value);
        } else if self.lies.len() < 64 {
            self.lies.push_back((at, value));
        }
    }

    fn edit_page(&mut self, input: &mut Input<'_>) {
        let at = match input.below(4) {
            0 => usize::from(input.u16()) % PAGE,
            1 => 72 + input.below(56),
            2 => 256 + input.below(40),
            _ => 512 + input.below(40),
        };
        let bytes = input.bytes(usize::from(input.clone().u8() & 7) + 2);
        let len = bytes.len().min(PAGE - at);
        self.page[at..at + len].copy_from_slice(&bytes[..len]);
    }

    /// A held command ends, with whatever in its completion and its data.
    fn answer_wrongly(&mut self, input: &mut Input<'_>) {
        let which = input.below(self.held.len().max(1));
        let Some((qid, entry)) = self.held.remove(which) else { return };
        let wrong = input.u8();
        if wrong & 1 == 0 {
            return self.answer(qid, &entry);
        }
        if qid == 0 && entry.admin_opcode() == AdminOpcode::ASYNC_EVENT_REQUEST && wrong & 2 == 0 {
            return self.aers.push_back(entry.cdw0.cid());
        }
        if wrong & 4 != 0 {
            let data = input.bytes(64);
            self.give(&entry, usize::from(input.u8()) * 8, data);
        }
        let pair = self.queues.get(&qid).copied().unwrap_or_default();
        let status = Status::from_bits(if wrong & 8 != 0 { input.u16() & 0x7fff } else { 0 });
        let completion = CompletionEntry {
            dw0: input.number32(),
            dw1: if wrong & 16 != 0 { input.u32() } else { 0 },
            sqhd: if wrong & 32 != 0 { input.number16() } else { pair.sq_head as u16 },
            sqid: if wrong & 64 != 0 { input.number16() } else { qid },
            cid: if wrong & 128 != 0 { input.number16() } else { entry.cdw0.cid() },
            status_phase: StatusPhase::new().with_status(status),
        };
        self.post(qid, completion);
    }

    /// Entries of a controller data queue: one after another, or anywhere.
    fn entries(&mut self, input: &mut Input<'_>) {
        let (which, count, wrong) = (input.below(4), input.below(40), input.u8());
        let Some(mut ring) = self.rings.get(which).copied() else { return };
        let slots = ring.bytes / 32;
        if slots == 0 {
            return;
        }
        for _ in 0..=count {
            let phase = (ring.tail / slots).is_multiple_of(2) != (wrong & 1 == 1);
            let mut entry = [0; 32];
            let given = input.bytes(usize::from(wrong >> 3));
            entry[..given.len()].copy_from_slice(given);
            entry[31] = entry[31] & !1 | u8::from(phase);
            let slot = if wrong & 2 != 0 { input.number() } else { ring.tail } % slots;
            let at = slot * 32;
            let base = if ring.contiguous {
                ring.base.wrapping_add(at)
            } else {
                let mut pointer = [0; 8];
                self.read(ring.base.wrapping_add(at / PAGE as u64 * 8), &mut pointer);
                u64::from_le_bytes(pointer).wrapping_add(at % PAGE as u64)
            };
            self.write(base, &entry);
            ring.tail += 1;
        }
        self.rings[which] = ring;
    }

    /// Writes anywhere that is mapped for the device: queues, lists, pages of data.
    fn scribble(&mut self, input: &mut Input<'_>) {
        self.scribbled = true;
        let mappings = self.reader.mappings();
        if mappings.is_empty() {
            return;
        }
        let mapping = &mappings[input.below(mappings.len())];
        let (iova, len) = (mapping.iova, mapping.memory.len());
        let at = usize::from(input.u16()) * if input.flag() { 16 } else { 4 } % len;
        let bytes = input.bytes(usize::from(input.clone().u8() & 31) + 1);
        let bytes = &bytes[..bytes.len().min(len - at)];
        self.write(iova + at as u64, bytes);
    }
}

impl Function for Device {
    fn read32(&self, at: u32) -> u32 {
        let mut inner = self.lock();
        if inner.gone {
            return u32::MAX;
        }
        if inner.lies.front().is_some_and(|(of, _)| *of == at)
            && let Some((_, value)) = inner.lies.pop_front()
        {
            return value;
        }
        inner.register(at)
    }

    fn write32(&self, at: u32, value: u32) {
        let mut inner = self.lock();
        inner.registers.insert(at, value);
        if at == offset::CC {
            inner.follow_cc();
        }
    }

    fn doorbell(&self, at: u32) -> Option<Doorbell> {
        let inside = at >= offset::DOORBELLS && at.is_multiple_of(4) && at as usize + 4 <= BAR_BYTES;
        inside.then(|| Doorbell::Mapped { arena: Arc::clone(&self.bar), offset: at as usize })
    }

    fn space(&self) -> &AddressSpace {
        &self.space
    }

    fn event_line(&self, vector: u16) -> Option<EventLine> {
        (vector < 2).then(|| self.line.clone())
    }

    fn reset(&self) -> std::io::Result<()> {
        let mut inner = self.lock();
        inner.registers.insert(offset::CC, 0);
        inner.follow_cc();
        Ok(())
    }
}
