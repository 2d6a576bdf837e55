//! A scripted controller for this crate's tests: it plays the device's side over a slot, and misbehaves on request.

use crate::driver::Driver;
use crate::{DriverConfig, QueuePair, QueuePairConfig};
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Connector, Port, Slot};
use dray_device::space::{AddressSpace, MappedBuffer, SpaceReader};
use dray_nvme::command::{AdminOpcode, CdqCdw10, CompletionEntry, StatusPhase, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{Cns, IdentifyController, write_ascii};
use dray_nvme::registers::{Aqa, Cap, Cc, Csts, ShutdownNotification, ShutdownStatus, offset};
use dray_nvme::status::Status;
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// One queue pair as the device keeps it.
#[derive(Clone, Copy, Debug, Default)]
struct Pair {
    sq: u64,
    cq: u64,
    entries: u32,
    sq_head: u32,
    cq_tail: u32,
}

/// A controller data queue as the device keeps it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FakeCdq {
    pub(crate) base: u64,
    pub(crate) contiguous: bool,
    pub(crate) slots: u32,
    pub(crate) tail: u64,
    pub(crate) head: u32,
    pub(crate) trigger: Option<u32>,
    /// Set Features 21h received.
    pub(crate) updates: u32,
}

/// What the device does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Crime {
    #[default]
    None,
    /// Completes I/O with an identifier that nobody used.
    InventCid,
    /// Completes each I/O command twice.
    Twice,
    /// Reports a head outside the queue, or past the tail.
    Head(u16),
    /// Names another queue.
    Sqid,
    /// A reserved status code type.
    Status,
    /// Never completes I/O, nor honours aborts.
    Silence,
    /// Never completes I/O until it is aborted.
    Abortable,
}

pub(crate) struct Fake {
    connector: Connector,
    port: Option<Port>,
    reader: Option<SpaceReader>,
    enabled: bool,
    pairs: Vec<Option<Pair>>,
    pub(crate) aers: Vec<u16>,
    pub(crate) crime: Crime,
    pub(crate) cdq: Option<FakeCdq>,
    /// I/O commands received and held back: queue, command.
    pub(crate) held: Vec<(u16, SubmissionEntry)>,
    pub(crate) io_seen: Vec<SubmissionEntry>,
    pub(crate) admin_seen: Vec<SubmissionEntry>,
    pub(crate) enables: u32,
    /// Never lets RDY follow.
    pub(crate) never_ready: bool,
    /// Answers these admin opcodes with this status.
    pub(crate) refuse: Option<(AdminOpcode, Status)>,
    /// Leaves Set Features 21h unanswered until cleared.
    pub(crate) hold_features: bool,
    held_features: Vec<SubmissionEntry>,
    /// The state that Get Controller State gives and Set Controller State takes.
    pub(crate) state: Vec<u8>,
    pub(crate) sequences: Vec<u8>,
}

impl Fake {
    pub(crate) fn new() -> (Self, Slot) {
        let slot = Slot::new(AddressSpace::default(), 2).expect("slot");
        let connector = Connector::new();
        slot.point_at(&connector.plug());
        let fake = Self {
            connector,
            port: None,
            reader: None,
            enabled: false,
            pairs: vec![None; 8],
            aers: Vec::new(),
            crime: Crime::None,
            cdq: None,
            held: Vec::new(),
            io_seen: Vec::new(),
            admin_seen: Vec::new(),
            enables: 0,
            never_ready: false,
            refuse: None,
            hold_features: false,
            held_features: Vec::new(),
            state: Vec::new(),
            sequences: Vec::new(),
        };
        (fake, slot)
    }

    fn port(&self) -> &Port {
        self.port.as_ref().expect("polled once")
    }

    pub(crate) fn set_csts(&self, csts: Csts) {
        self.port().bar().store32(offset::CSTS, csts.into_bits());
    }

    pub(crate) fn poll(&mut self) {
        if let Some(port) = self.connector.poll() {
            self.reader = port.as_ref().map(|p| p.space().reader());
            if let Some(port) = &port {
                let cap = Cap::new().with_mqes(255).with_cqr(true).with_to(1).with_css(Cap::CSS_NVM);
                port.bar().store64(offset::CAP, cap.into_bits());
            }
            self.port = port;
        }
        let Some(port) = self.port.clone() else { return };
        if let Some(reader) = &mut self.reader {
            reader.refresh();
        }
        let cc = Cc::from_bits(port.bar().load32(offset::CC));
        if cc.en() != self.enabled && !self.never_ready {
            self.switch(cc.en(), &port);
        }
        if cc.en() && cc.shn() == ShutdownNotification::NORMAL {
            self.set_csts(Csts::new().with_rdy(true).with_shst(ShutdownStatus::COMPLETE));
        }
        if !self.enabled {
            return;
        }
        if !self.hold_features {
            for entry in std::mem::take(&mut self.held_features) {
                self.cdq_feature(&entry);
            }
        }
        for qid in 0..self.pairs.len() as u16 {
            while let Some(entry) = self.fetch(qid) {
                if qid == 0 { self.admin(entry) } else { self.io(qid, entry) }
            }
        }
    }

    fn switch(&mut self, enable: bool, port: &Port) {
        self.enabled = enable;
        self.pairs.fill(None);
        self.aers.clear();
        self.held.clear();
        self.cdq = None;
        let bar = port.bar();
        (0..16).for_each(|i| bar.store32(offset::DOORBELLS + i * 4, 0));
        if enable {
            self.enables += 1;
            let aqa = Aqa::from_bits(bar.load32(offset::AQA));
            let entries = u32::from(aqa.asqs()) + 1;
            let (sq, cq) = (bar.load64(offset::ASQ), bar.load64(offset::ACQ));
            self.pairs[0] = Some(Pair { sq, cq, entries, ..Pair::default() });
        }
        self.set_csts(Csts::new().with_rdy(enable));
    }

    pub(crate) fn read(&self, iova: u64, into: &mut [u8]) {
        let reader = self.reader.as_ref().expect("reader");
        reader.lookup(iova, into.len(), false).expect("mapped for reading").read(into);
    }

    pub(crate) fn write(&self, iova: u64, from: &[u8]) {
        let reader = self.reader.as_ref().expect("reader");
        reader.lookup(iova, from.len(), true).expect("mapped for writing").write(from);
    }

    fn fetch(&mut self, qid: u16) -> Option<SubmissionEntry> {
        let tail = self.port().bar().load32(offset::DOORBELLS + u32::from(qid) * 8);
        let pair = self.pairs[usize::from(qid)].as_mut()?;
        if pair.sq_head == tail {
            return None;
        }
        let at = pair.sq + u64::from(pair.sq_head) * 64;
        pair.sq_head = (pair.sq_head + 1) % pair.entries;
        let mut bytes = [0u8; 64];
        self.read(at, &mut bytes);
        SubmissionEntry::read_from_bytes(&bytes).ok()
    }

    fn post(&mut self, qid: u16, mut entry: CompletionEntry) {
        let pair = self.pairs[usize::from(qid)].as_mut().expect("queue");
        let phase = (pair.cq_tail / pair.entries).is_multiple_of(2);
        let at = pair.cq + u64::from(pair.cq_tail % pair.entries) * 16;
        pair.cq_tail += 1;
        entry.status_phase = StatusPhase::new().with_phase(phase).with_status(entry.status());
        self.write(at, entry.as_bytes());
        self.port().raise(0);
    }

    pub(crate) fn complete(&mut self, qid: u16, cid: u16, result: u64, status: Status) {
        let sqhd = self.pairs[usize::from(qid)].expect("queue").sq_head as u16;
        let status_phase = StatusPhase::new().with_status(status);
        let (dw0, dw1) = (result as u32, (result >> 32) as u32);
        self.post(qid, CompletionEntry { dw0, dw1, sqhd, sqid: qid, cid, status_phase });
    }

    /// Reports an event if a request is outstanding.
    pub(crate) fn event(&mut self, dw0: u32, dw1: u32) -> bool {
        let Some(cid) = self.aers.pop() else { return false };
        self.complete(0, cid, u64::from(dw0) | u64::from(dw1) << 32, Status::SUCCESS);
        true
    }

    fn io(&mut self, qid: u16, entry: SubmissionEntry) {
        self.io_seen.push(entry);
        let sqhd = self.pairs[usize::from(qid)].expect("queue").sq_head as u16;
        let cid = entry.cdw0.cid();
        let good = CompletionEntry { dw0: 7, dw1: 1, sqhd, sqid: qid, cid, status_phase: StatusPhase::new() };
        match self.crime {
            Crime::None => self.post(qid, good),
            Crime::InventCid => self.post(qid, CompletionEntry { cid: cid ^ 0x4000, ..good }),
            Crime::Twice => {
                self.post(qid, good);
                self.post(qid, good);
            }
            Crime::Head(sqhd) => self.post(qid, CompletionEntry { sqhd, ..good }),
            Crime::Sqid => self.post(qid, CompletionEntry { sqid: qid + 1, ..good }),
            Crime::Status => {
                let status_phase = StatusPhase::new().with_status(Status::new(5, 1));
                self.post(qid, CompletionEntry { status_phase, ..good });
            }
            Crime::Silence | Crime::Abortable => self.held.push((qid, entry)),
        }
    }

    /// Completes everything held back, newest first.
    pub(crate) fn release(&mut self) {
        while let Some((qid, entry)) = self.held.pop() {
            self.complete(qid, entry.cdw0.cid(), 0, Status::SUCCESS);
        }
    }

    fn admin(&mut self, entry: SubmissionEntry) {
        self.admin_seen.push(entry);
        let opcode = entry.admin_opcode();
        let mut result = 0;
        let mut status = Status::SUCCESS;
        match opcode {
            _ if self.refuse.is_some_and(|(refused, _)| refused == opcode) => {
                status = self.refuse.map_or(status, |(_, status)| status);
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => return self.aers.push(entry.cdw0.cid()),
            AdminOpcode::IDENTIFY => status = self.identify(&entry),
            AdminOpcode::SET_FEATURES if entry.cdw10 as u8 == FeatureId::CONTROLLER_DATA_QUEUE.0 => {
                if self.hold_features {
                    return self.held_features.push(entry);
                }
                return self.cdq_feature(&entry);
            }
            AdminOpcode::SET_FEATURES => result = u64::from(entry.cdw11),
            AdminOpcode::CREATE_IO_CQ => {
                let pair = Pair { cq: entry.prp1(), entries: (entry.cdw10 >> 16) + 1, ..Pair::default() };
                self.pairs[entry.cdw10 as u16 as usize] = Some(pair);
            }
            AdminOpcode::CREATE_IO_SQ => {
                if let Some(pair) = &mut self.pairs[entry.cdw10 as u16 as usize] {
                    pair.sq = entry.prp1();
                }
            }
            AdminOpcode::DELETE_IO_CQ => self.pairs[entry.cdw10 as u16 as usize] = None,
            AdminOpcode::DELETE_IO_SQ => {}
            AdminOpcode::ABORT => result = self.abort(entry.cdw10 as u16, (entry.cdw10 >> 16) as u16),
            AdminOpcode::CONTROLLER_DATA_QUEUE => self.cdq_command(&entry),
            AdminOpcode::MIGRATION_RECEIVE => status = self.get_state(&entry),
            AdminOpcode::MIGRATION_SEND if entry.cdw10 as u8 == 2 => self.set_state(&entry),
            _ => status = Status::INVALID_OPCODE.with_dnr(),
        }
        self.complete(0, entry.cdw0.cid(), result, status);
    }

    fn identify(&self, entry: &SubmissionEntry) -> Status {
        if entry.cdw10 as u8 != Cns::CONTROLLER.0 {
            return Status::INVALID_FIELD.with_dnr();
        }
        let mut page = IdentifyController::default();
        write_ascii(&mut page.mn, "Fake");
        (page.mdts, page.acl, page.aerl) = (5, 1, 3);
        page.oncs.set_write_zeroes(true);
        self.write(entry.prp1(), page.as_bytes());
        Status::SUCCESS
    }

    fn abort(&mut self, sqid: u16, cid: u16) -> u64 {
        let at = self.held.iter().position(|(qid, held)| *qid == sqid && held.cdw0.cid() == cid);
        let Some(at) = at.filter(|_| self.crime == Crime::Abortable) else { return 1 };
        self.held.remove(at);
        self.complete(sqid, cid, 0, Status::ABORTED_BY_REQUEST);
        0
    }

    fn cdq_command(&mut self, entry: &SubmissionEntry) {
        if CdqCdw10::from_bits(entry.cdw10).sel().0 == 1 {
            self.cdq = None;
            return;
        }
        let (contiguous, slots) = (entry.cdw11 & 1 == 1, entry.cdw12 / 8);
        let base = entry.prp1();
        self.cdq = Some(FakeCdq { base, contiguous, slots, tail: 0, head: 0, trigger: None, updates: 0 });
    }

    fn cdq_feature(&mut self, entry: &SubmissionEntry) {
        let status = match &mut self.cdq {
            Some(cdq) => {
                cdq.updates += 1;
                cdq.head = entry.cdw12;
                cdq.trigger = (entry.cdw11 >> 31 == 1).then_some(entry.cdw13);
                Status::SUCCESS
            }
            None => Status::INVALID_CDQ,
        };
        self.complete(0, entry.cdw0.cid(), 0, status);
    }

    /// Where a byte of the queue is: the PRP list is followed page by page.
    fn cdq_address(&self, cdq: &FakeCdq, at: u64) -> u64 {
        if cdq.contiguous {
            return cdq.base + at;
        }
        let pages = (u64::from(cdq.slots) * 32).div_ceil(PAGE as u64);
        let (mut list, mut page) = (cdq.base, at / PAGE as u64);
        let mut left = pages;
        while left > 512 && page >= 511 {
            let mut pointer = [0u8; 8];
            self.read(list + 511 * 8, &mut pointer);
            (list, page, left) = (u64::from_le_bytes(pointer), page - 511, left - 511);
        }
        let mut pointer = [0u8; 8];
        self.read(list + page * 8, &mut pointer);
        u64::from_le_bytes(pointer) + at % PAGE as u64
    }

    /// Posts an entry into the queue (32 bytes, phase in byte 31) and fires the trigger as the tail reading has it.
    pub(crate) fn post_entry(&mut self, number: u32) {
        let mut cdq = self.cdq.expect("queue");
        let phase = (cdq.tail / u64::from(cdq.slots)).is_multiple_of(2);
        let mut entry = [0u8; 32];
        entry[..4].copy_from_slice(&number.to_le_bytes());
        entry[31] = u8::from(phase);
        let at = self.cdq_address(&cdq, cdq.tail % u64::from(cdq.slots) * 32);
        self.write(at, &entry);
        cdq.tail += 1;
        if cdq.trigger == Some((cdq.tail % u64::from(cdq.slots)) as u32) {
            cdq.trigger = None;
            self.event(4, 9 << 16);
        }
        self.cdq = Some(cdq);
    }

    fn get_state(&self, entry: &SubmissionEntry) -> Status {
        let (at, len) = (entry.offset() as usize, (entry.cdw15 as usize + 1) * 4);
        let Some(part) = self.state.get(at..) else { return Status::INVALID_FIELD };
        let part = &part[..len.min(part.len())];
        for (i, page) in part.chunks(PAGE).enumerate() {
            self.write(self.page_of(entry, i, len), page);
        }
        Status::SUCCESS
    }

    fn set_state(&mut self, entry: &SubmissionEntry) {
        self.sequences.push((entry.cdw10 >> 16) as u8 & 3);
        let len = entry.cdw15 as usize * 4;
        let mut bytes = vec![0u8; len];
        for (i, page) in bytes.chunks_mut(PAGE).enumerate() {
            self.read(self.page_of(entry, i, len), page);
        }
        self.state.truncate(entry.offset() as usize);
        self.state.extend_from_slice(&bytes);
    }

    /// The address of a page of page-aligned data.
    fn page_of(&self, entry: &SubmissionEntry, page: usize, len: usize) -> u64 {
        match (page, len.div_ceil(PAGE)) {
            (0, _) => entry.prp1(),
            (_, 2) => entry.prp2(),
            (page, _) => {
                let mut pointer = [0u8; 8];
                self.read(entry.prp2() + (page as u64 - 1) * 8, &mut pointer);
                u64::from_le_bytes(pointer)
            }
        }
    }
}

/// A driver and its device under a made-up clock.
pub(crate) struct Bench {
    pub(crate) fake: Fake,
    pub(crate) slot: Slot,
    pub(crate) driver: Driver,
    pub(crate) now: Time,
    pub(crate) data: MappedBuffer,
}

impl Bench {
    /// A driver that is not ready yet.
    pub(crate) fn cold() -> Self {
        Self::cold_with(DriverConfig::default())
    }

    /// With time-outs for tests, and else as it says.
    pub(crate) fn cold_with(config: DriverConfig) -> Self {
        let (fake, slot) = Fake::new();
        let config = DriverConfig { admin_timeout_ms: 1_000, io_timeout_ms: 400, ..config };
        let driver = Driver::new(slot.function(), config).expect("driver");
        let buffer = DmaBuffer::allocate("data", 64 * PAGE, Pages::Small).expect("memory");
        let data = MappedBuffer::new(slot.space(), buffer).expect("map");
        Self { fake, slot, driver, now: Time(1), data }
    }

    pub(crate) fn ready() -> Self {
        Self::ready_with(DriverConfig::default())
    }

    pub(crate) fn ready_with(config: DriverConfig) -> Self {
        let mut bench = Self::cold_with(config);
        bench.until("ready", |bench| bench.driver.is_ready());
        bench.turns(2);
        bench
    }

    /// One turn of everything; 100 µs pass.
    pub(crate) fn turn(&mut self) {
        self.now = self.now.after_us(100);
        self.fake.poll();
        let _progress = self.driver.poll(self.now);
    }

    pub(crate) fn turns(&mut self, count: usize) {
        (0..count).for_each(|_| self.turn());
    }

    pub(crate) fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..200_000 {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("never: {what}; {:?}", self.driver.state());
    }

    pub(crate) fn pair(&mut self, entries: u16) -> QueuePair {
        let config = QueuePairConfig { entries, vector: None };
        let ticket = self.driver.create_queue_pair(self.now, config).expect("room");
        let mut pair = None;
        self.until("a queue pair", |bench| {
            pair = bench.driver.queue_pair(&ticket);
            pair.is_some()
        });
        pair.expect("pair").expect("created")
    }

    pub(crate) fn arena(&self) -> &Arc<Arena> {
        self.data.arena()
    }
}
