//! A subsystem of a few lines, to drive the migration with: media, controllers that log, suspend and resume, faults on demand.

use crate::mmc::{Answer, Health, Mmc, Notice, QueueState, Trust};
use crate::queue::{EntryQueue, QueueError};
use dray_device::command::{CommandQueue, Completion, QueueLimits, SubmitError};
use dray_device::memory::{Arena, Segment};
use dray_device::poll::{Progress, Time};
use dray_driver::AdminData;
use dray_nvme::cdq::{Esa, UdmqEntry};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{
    IdentifyController, IdentifyControllerNvm, IdentifyNamespace, controller_list, write_controller_list, write_nsid_list,
};
use dray_nvme::status::Status;
use dray_policy::role::CdqQueue;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use zerocopy::{FromZeros, IntoBytes};

pub const BLOCK: usize = 512;

/// A delay that no test waits for, ns.
const HELD: u64 = 1 << 50;

#[derive(Default)]
pub struct Controller {
    pub suspended: bool,
    pub logging: bool,
    pub entries: VecDeque<UdmqEntry>,
    pub taken: usize,
    pub slots: usize,
    pub full: bool,
    pub live: bool,
    pub state: Vec<u8>,
}

pub struct Inner {
    pub name: &'static str,
    pub media: Vec<u8>,
    /// What was on stable storage at the last flush.
    pub stable: Vec<u8>,
    pub controllers: BTreeMap<u16, Controller>,
    /// Of namespace 1.
    pub attached: Vec<u16>,
    /// Namespaces besides, and who has them.
    pub others: Vec<(u32, Vec<u16>)>,
    /// Times that the guest resets its controller as the namespace is being detached, and whether it writes a block then.
    pub wakes_at_detach: (u32, bool),
    pub nsze: u64,
    pub log: Arc<Mutex<Vec<String>>>,
    pub unreadable: BTreeSet<u64>,
    /// The fence before its controllers is up.
    pub fenced: bool,
    /// What was unreadable at the last flush.
    stable_unreadable: BTreeSet<u64>,
    /// What Write Uncorrectable ends with, where the drive has it but does not carry it out.
    pub refuse_marks: Option<Status>,
    pub fail_reads: u32,
    pub fail_writes: u32,
    pub swallow_writes: u32,
    /// Times that suspension ends when the fence goes up.
    pub wakes_at_fence: u32,
    pub overlaps: u32,
    pub health: Health,
    pub trust: Trust,
    pub generation: u32,
    pub answers: BTreeMap<u64, Answer>,
    pub tickets: u64,
    pub notices: VecDeque<Notice>,
    pub refuse: BTreeMap<u8, Status>,
    pub unknown_resume: Option<bool>,
    /// Opcodes of admin commands that are taken but not executed yet.
    pub slow: BTreeSet<u8>,
    pub slow_now: Vec<(u64, SubmissionEntry, Vec<u8>)>,
    pub no_csup: bool,
    pub under_way: Vec<(u64, Command, bool)>,
    pub delay: u64,
    pub queue_epoch: u32,
    pub limit: u32,
    pub identify: IdentifyController,
    pub nvm: IdentifyControllerNvm,
}

#[derive(Clone)]
pub struct Command {
    op: u8,
    slba: u64,
    blocks: u64,
    data: Option<(Arc<Arena>, usize, usize)>,
    tag: u64,
    epoch: u32,
}

#[derive(Clone)]
pub struct Drive(pub Arc<Mutex<Inner>>);

impl Drive {
    pub fn new(name: &'static str, mmc: u16, controllers: &[u16], blocks: u64, log: &Arc<Mutex<Vec<String>>>) -> Self {
        let mut identify = IdentifyController::new_zeroed();
        identify.cntlid = mmc;
        identify.oacs = identify.oacs.with_hmlms(true);
        identify.trattr = identify.trattr.with_tudcs(true);
        identify.oncs = identify.oncs.with_compare(true).with_write_uncorrectable(true);
        let mut attached = vec![mmc];
        attached.extend(controllers);
        let controller = |&id: &u16| (id, Controller { state: vec![id as u8; 8], ..Controller::default() });
        Self(Arc::new(Mutex::new(Inner {
            name,
            media: vec![0; blocks as usize * BLOCK],
            stable: vec![0; blocks as usize * BLOCK],
            controllers: controllers.iter().map(controller).collect(),
            attached,
            others: Vec::new(),
            wakes_at_detach: (0, false),
            nsze: blocks,
            log: Arc::clone(log),
            unreadable: BTreeSet::new(),
            fenced: false,
            stable_unreadable: BTreeSet::new(),
            refuse_marks: None,
            fail_reads: 0,
            fail_writes: 0,
            swallow_writes: 0,
            wakes_at_fence: 0,
            overlaps: 0,
            health: Health::Ready,
            trust: Trust::Tested,
            generation: 0,
            answers: BTreeMap::new(),
            tickets: 0,
            notices: VecDeque::new(),
            refuse: BTreeMap::new(),
            unknown_resume: None,
            slow: BTreeSet::new(),
            slow_now: Vec::new(),
            no_csup: false,
            under_way: Vec::new(),
            delay: 0,
            queue_epoch: 0,
            limit: 0,
            identify,
            nvm: IdentifyControllerNvm::new_zeroed(),
        })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no test panics while it holds this")
    }

    /// A guest's write through a controller; false while that is suspended or fenced.
    pub fn guest_write(&self, cntlid: u16, slba: u64, blocks: u64, byte: u8) -> bool {
        let mut inner = self.lock();
        if inner.fenced || inner.controllers.get(&cntlid).is_none_or(|c| c.suspended) {
            return false;
        }
        // Where namespaces can be detached, it matters whether they are.
        if inner.identify.oacs.namespace_management() && !inner.attached.contains(&cntlid) {
            return false;
        }
        let (from, to) = (slba as usize * BLOCK, (slba + blocks) as usize * BLOCK);
        inner.media[from..to].fill(byte);
        inner.post(cntlid, UdmqEntry::range(1, slba, blocks as u32 - 1, false), false);
        true
    }
}

impl Drive {
    /// What was slow is executed at last.
    pub fn catch_up(&self) {
        let mut inner = self.lock();
        inner.slow.clear();
        for (ticket, entry, out) in std::mem::take(&mut inner.slow_now) {
            let data = if out.is_empty() { AdminData::None } else { AdminData::Out(&out) };
            let answer = inner.admin(&entry, data);
            inner.answers.insert(ticket, answer);
        }
    }

    /// From now on an I/O command ends only when it is [let go](Self::let_go).
    pub fn hold(&self) {
        self.lock().delay = HELD;
    }

    /// What was held ends at the next poll, and nothing is held any more.
    pub fn let_go(&self) {
        let mut inner = self.lock();
        inner.delay = 0;
        inner.under_way.iter_mut().for_each(|(due, ..)| *due = 0);
    }

    /// What is held ends at the next poll without anybody knowing how.
    pub fn lose(&self) {
        self.lock().under_way.iter_mut().for_each(|(.., swallowed)| *swallowed = true);
    }

    /// Writes that have not ended.
    pub fn writes_under_way(&self) -> usize {
        self.lock().under_way.iter().filter(|(_, command, _)| matches!(command.op, 0x01 | 0x08)).count()
    }

    /// Logging stops as by a Track Send that nobody of this migration has sent.
    pub fn stop_logging(&self, cntlid: u16) {
        let _answer = self.lock().admin(&SubmissionEntry::track_send_log(false, cntlid), AdminData::None);
    }
}

impl Inner {
    pub fn say(&self, what: String) {
        self.log.lock().expect("log").push(format!("{} {what}", self.name));
    }

    fn post(&mut self, cntlid: u16, entry: UdmqEntry, always: bool) {
        let Some(c) = self.controllers.get_mut(&cntlid) else { return };
        if !c.live || c.full || !(c.logging || always) {
            return;
        }
        // The last place but one says "full".
        let last = c.entries.len() + 2 >= c.slots;
        c.entries.push_back(if last && !always { entry.with_esa(Esa::FULL) } else { entry });
        c.full = last && !always;
    }

    fn admin(&mut self, entry: &SubmissionEntry, data: AdminData<'_>) -> Answer {
        let mut answer = Answer { status: Status::SUCCESS, result: 0, unknown: false, data: Vec::new() };
        let bytes = if let AdminData::In(bytes) = data { bytes } else { 0 };
        let opcode = entry.cdw0.opcode();
        let (select, id) = (entry.cdw10 & 0xff, entry.cdw11 as u16);
        if let Some(&status) = self.refuse.get(&opcode) {
            return Answer { status, ..answer };
        }
        match opcode {
            0x06 => answer.data = self.identify_page(select as u8, entry.nsid, bytes),
            0x15 => return self.attachment(entry, data, answer),
            0x09 => self.limit = entry.cdw12,
            0x3d => {
                // The fake's CDQID is the CNTLID it watches.
                let start = entry.cdw10 >> 16 & 0xf == 1;
                if self.controllers.get(&id).is_some_and(|c| c.suspended) {
                    return Answer { status: Status::CONTROLLER_SUSPENDED, ..answer };
                }
                self.say(format!("log {start} {id}"));
                if start {
                    let c = self.controllers.get_mut(&id).expect("controller");
                    (c.logging, c.full) = (true, false);
                    self.post(id, UdmqEntry::marker(Esa::FIRST), true);
                } else {
                    self.post(id, UdmqEntry::marker(Esa::STOPPED), true);
                    self.controllers.get_mut(&id).expect("controller").logging = false;
                }
            }
            0x41 if select == 0 => {
                self.say(format!("suspend {id}"));
                let logging = self.controllers.get(&id).is_some_and(|c| c.logging);
                if logging {
                    self.post(id, UdmqEntry::marker(Esa::SUSPENDED), true);
                }
                self.controllers.get_mut(&id).expect("controller").suspended = true;
            }
            0x41 if select == 1 => return self.resume(id, answer),
            0x41 => {
                if let AdminData::Out(bytes) = data {
                    self.controllers.get_mut(&id).expect("controller").state = bytes[48..].to_vec();
                }
                self.say(format!("set state {id}"));
            }
            0x42 => {
                let c = &self.controllers[&id];
                let mut state = vec![0; 48];
                state[2] = u8::from(c.suspended);
                state[16] = (c.state.len() / 4) as u8;
                state.extend(&c.state);
                state.resize(bytes.max(state.len()), 0);
                state.truncate(bytes);
                answer.data = state;
                answer.result = u64::from(c.suspended && !self.no_csup);
            }
            _ => answer.status = Status::INVALID_OPCODE,
        }
        answer
    }

    fn attachment(&mut self, entry: &SubmissionEntry, data: AdminData<'_>, answer: Answer) -> Answer {
        let AdminData::Out(list) = data else { return Answer { status: Status::INVALID_FIELD, ..answer } };
        assert_eq!(entry.nsid, 1);
        let id = controller_list(list).next().expect("a controller");
        if entry.cdw10 & 0xf == 0 {
            self.say(format!("attach {id}"));
            if self.attached.contains(&id) {
                return Answer { status: Status::NAMESPACE_ALREADY_ATTACHED, ..answer };
            }
            self.attached.push(id);
            return answer;
        }
        self.say(format!("detach {id}"));
        if !self.attached.contains(&id) {
            return Answer { status: Status::NAMESPACE_NOT_ATTACHED, ..answer };
        }
        let (wakes, writes) = self.wakes_at_detach;
        if wakes > 0 {
            self.wakes_at_detach.0 -= 1;
            self.controllers.get_mut(&id).expect("controller").suspended = false;
        }
        if wakes > 0 && writes {
            self.media[..BLOCK].fill(0x77);
            self.post(id, UdmqEntry::range(1, 0, 0, false), false);
        }
        self.attached.retain(|&attached| attached != id);
        answer
    }

    fn resume(&mut self, id: u16, answer: Answer) -> Answer {
        self.say(format!("resume {id}"));
        let applied = self.unknown_resume.unwrap_or(true);
        if !self.controllers[&id].suspended {
            return Answer { status: Status::CONTROLLER_NOT_SUSPENDED, ..answer };
        }
        if applied {
            self.controllers.get_mut(&id).expect("controller").suspended = false;
            self.post(id, UdmqEntry::marker(Esa::FIRST), false);
        }
        Answer { unknown: self.unknown_resume.take().is_some(), ..answer }
    }

    fn identify_page(&self, cns: u8, nsid: u32, bytes: usize) -> Vec<u8> {
        let mut page = vec![0; bytes];
        match cns {
            0x00 => {
                let mut namespace = IdentifyNamespace::new_zeroed();
                (namespace.nsze, namespace.ncap) = (self.nsze, self.nsze);
                namespace.lbaf[0] = namespace.lbaf[0].with_lbads(9);
                page[..4096].copy_from_slice(namespace.as_bytes());
            }
            0x10 => {
                let all = std::iter::once(1).chain(self.others.iter().map(|other| other.0));
                write_nsid_list(all, &mut page);
            }
            0x12 => {
                let other = self.others.iter().find(|other| other.0 == nsid).map(|other| &other.1);
                write_controller_list(other.unwrap_or(&self.attached).iter().copied(), &mut page);
            }
            0x20 => page[0] = 1,
            _ => {}
        }
        page
    }

    /// The controller is reset: queues and data queues are gone, suspension ends, what was not flushed is lost.
    pub fn crash(&mut self) {
        self.generation += 1;
        self.queue_epoch += 1;
        self.health = Health::Ready;
        for (ticket, ..) in std::mem::take(&mut self.slow_now) {
            let answer = Answer { status: Status::ABORTED_SQ_DELETION, result: 0, unknown: true, data: Vec::new() };
            self.answers.insert(ticket, answer);
        }
        self.media = self.stable.clone();
        self.unreadable = self.stable_unreadable.clone();
        self.say("reset".to_owned());
        for controller in self.controllers.values_mut() {
            controller.suspended = false;
        }
    }

    fn execute(&mut self, command: &Command) -> Status {
        let (from, to) = (command.slba as usize * BLOCK, (command.slba + command.blocks) as usize * BLOCK);
        let range = command.slba..command.slba + command.blocks;
        match (command.op, &command.data) {
            (0x02, Some((arena, offset, len))) => {
                if self.fail_reads > 0 {
                    self.fail_reads -= 1;
                    return Status::INTERNAL_ERROR;
                }
                if self.unreadable.range(range).next().is_some() {
                    return Status::UNRECOVERED_READ;
                }
                assert_eq!(*len, to - from);
                arena.write(*offset, &self.media[from..to]);
            }
            (0x01, Some((arena, offset, _))) => {
                if self.fail_writes > 0 {
                    self.fail_writes -= 1;
                    return Status::WRITE_FAULT;
                }
                arena.read(*offset, &mut self.media[from..to]);
                self.unreadable.retain(|lba| !range.contains(lba));
            }
            (0x05, Some((arena, offset, len))) => {
                let mut data = vec![0; *len];
                arena.read(*offset, &mut data);
                if data != self.media[from..to] {
                    return Status::COMPARE_FAILURE;
                }
            }
            (0x08, None) => {
                self.media[from..to].fill(0);
                self.unreadable.retain(|lba| !range.contains(lba));
            }
            (0x04, None) => {
                if !self.identify.oncs.write_uncorrectable() {
                    return Status::INVALID_OPCODE;
                }
                if let Some(status) = self.refuse_marks {
                    return status;
                }
                self.unreadable.extend(range);
            }
            (0x00, None) => {
                self.stable.copy_from_slice(&self.media);
                self.stable_unreadable = self.unreadable.clone();
                self.say("flush".to_owned());
            }
            _ => return Status::INVALID_OPCODE,
        }
        Status::SUCCESS
    }
}

/// An I/O queue of the management controller.
pub struct FakeQueue {
    drive: Drive,
    epoch: u32,
}

impl FakeQueue {
    pub fn new(drive: &Drive) -> Self {
        Self { drive: drive.clone(), epoch: drive.lock().queue_epoch }
    }
}

impl CommandQueue for FakeQueue {
    fn limits(&self) -> QueueLimits {
        QueueLimits { depth: 32, max_transfer: 64 << 10, max_write_zeroes: 1 << 20 }
    }

    fn free(&self) -> usize {
        let inner = self.drive.lock();
        if self.epoch == inner.queue_epoch { 32 - inner.under_way.len().min(32) } else { 0 }
    }

    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        let mut inner = self.drive.lock();
        if self.epoch != inner.queue_epoch {
            return Err(SubmitError::Dead);
        }
        if inner.under_way.len() >= 32 {
            return Err(SubmitError::Full);
        }
        let command = Command {
            op: entry.cdw0.opcode(),
            slba: u64::from(entry.cdw10) | u64::from(entry.cdw11) << 32,
            blocks: if entry.cdw0.opcode() == 0 { 0 } else { u64::from(entry.cdw12 & 0xffff) + 1 },
            data: data.first().map(|s| (Arc::clone(s.arena()), s.offset(), s.len())),
            tag,
            epoch: self.epoch,
        };
        let overlap = |other: &Command| other.slba < command.slba + command.blocks && command.slba < other.slba + other.blocks;
        if inner.under_way.iter().any(|(_, other, _)| other.blocks > 0 && overlap(other)) {
            inner.overlaps += 1;
        }
        let writes = matches!(command.op, 0x01 | 0x08);
        let swallowed = writes && inner.swallow_writes > 0;
        inner.swallow_writes -= u32::from(swallowed);
        // Later commands may end before earlier ones: nothing is ordered.
        let due = now.0 + inner.delay * (1 + tag % 7);
        inner.under_way.push((due, command, swallowed));
        Ok(())
    }

    fn commit(&mut self) {}

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        let mut inner = self.drive.lock();
        let (mut ended, mut index) = (0, 0);
        while index < inner.under_way.len() {
            let (due, command, swallowed) = inner.under_way[index].clone();
            if due > now.0 && command.epoch == inner.queue_epoch && !swallowed {
                index += 1;
                continue;
            }
            inner.under_way.remove(index);
            let unknown = swallowed || command.epoch != inner.queue_epoch;
            let status = if unknown { Status::ABORTED_SQ_DELETION } else { inner.execute(&command) };
            ended += 1;
            done(Completion { tag: command.tag, status, result: 0, unknown });
        }
        ended
    }
}

/// The management controller.
pub struct FakeMmc {
    pub drive: Drive,
}

struct FakeRing<'a>(&'a mut Controller);

impl EntryQueue for FakeRing<'_> {
    fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        let n = max.min(self.0.entries.len() - self.0.taken);
        self.0.entries.range(self.0.taken..self.0.taken + n).for_each(|entry| into.extend_from_slice(entry.as_bytes()));
        self.0.taken += n;
        n
    }
    fn waiting(&mut self) -> u32 {
        (self.0.entries.len() - self.0.taken) as u32
    }
    fn rewind(&mut self, entries: u32) {
        self.0.taken -= entries as usize;
    }
    fn give_back(&mut self, _: Time, entries: u32) -> Result<(), QueueError> {
        self.0.entries.drain(..entries as usize);
        self.0.taken -= entries as usize;
        Ok(())
    }
}

impl Mmc for FakeMmc {
    fn poll(&mut self, _: Time) -> Progress {
        Progress::IDLE
    }
    fn health(&self) -> Health {
        self.drive.lock().health.clone()
    }
    fn identify(&self) -> Option<&IdentifyController> {
        Some(Box::leak(Box::new(self.drive.lock().identify)))
    }
    fn identify_nvm(&self) -> Option<&IdentifyControllerNvm> {
        Some(Box::leak(Box::new(self.drive.lock().nvm)))
    }
    fn trust(&self) -> Trust {
        self.drive.lock().trust.clone()
    }
    fn admin_limit(&self) -> usize {
        4096
    }
    fn request(&mut self, _: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<u64, SubmitError> {
        let mut inner = self.drive.lock();
        inner.tickets += 1;
        let ticket = inner.tickets;
        if inner.slow.contains(&entry.cdw0.opcode()) {
            let out = if let AdminData::Out(bytes) = data { bytes.to_vec() } else { Vec::new() };
            inner.slow_now.push((ticket, *entry, out));
            return Ok(ticket);
        }
        let answer = inner.admin(entry, data);
        inner.answers.insert(ticket, answer);
        Ok(ticket)
    }
    fn answer(&mut self, ticket: u64) -> Option<Answer> {
        self.drive.lock().answers.remove(&ticket)
    }
    fn outstanding(&self) -> usize {
        self.drive.lock().slow_now.len()
    }
    fn next_notice(&mut self) -> Option<Notice> {
        self.drive.lock().notices.pop_front()
    }
    fn forbid_reset(&mut self, _: bool) {}
    fn reset(&mut self, _: Time) {
        self.drive.lock().crash();
    }
    fn generation(&self) -> u32 {
        self.drive.lock().generation
    }
    fn create_queue(&mut self, _: Time, cntlid: u16, slots: u32) -> Result<usize, QueueError> {
        let mut inner = self.drive.lock();
        inner.say(format!("create queue {cntlid} {slots}"));
        let c = inner.controllers.get_mut(&cntlid).expect("controller");
        (c.slots, c.live, c.taken, c.full, c.logging) = (slots as usize, true, 0, false, false);
        c.entries.clear();
        Ok(usize::from(cntlid))
    }
    fn queue_state(&self, key: usize) -> QueueState {
        let inner = self.drive.lock();
        let c = &inner.controllers[&(key as u16)];
        let queue = CdqQueue {
            id: key as u16,
            kind: 0,
            cntlid: key as u16,
            slots: c.slots as u32,
            entry_bytes: 32,
            phase_byte: 31,
            phase_mask: 1,
        };
        if c.live { QueueState::Live(queue) } else { QueueState::Gone("gone".into()) }
    }
    fn delete_queue(&mut self, _: Time, key: usize) {
        let mut inner = self.drive.lock();
        inner.say(format!("delete queue {key}"));
        inner.controllers.get_mut(&(key as u16)).expect("controller").live = false;
    }
    fn with_queue(&mut self, key: usize, with: &mut dyn FnMut(&mut dyn EntryQueue)) {
        if let Some(c) = self.drive.lock().controllers.get_mut(&(key as u16)) {
            with(&mut FakeRing(c));
        }
    }
    fn create_io_queue(&mut self, _: Time) -> Result<(), SubmitError> {
        Ok(())
    }
    fn io_queue(&mut self) -> Option<Result<Box<dyn CommandQueue>, String>> {
        Some(Ok(Box::new(FakeQueue::new(&self.drive))))
    }
}
