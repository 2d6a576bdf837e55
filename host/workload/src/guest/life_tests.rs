//! The guest's life over the real driver, against a controller of a hundred lines that plays its part over a slot.

use super::*;
use crate::guest::{GuestStage, Phase};
use crate::ledger::LedgerSpec;
use crate::verify::check;
use dray_device::memory::Segment;
use dray_device::slot::{Connector, Port, Slot};
use dray_device::space::{AddressSpace, SpaceReader};
use dray_driver::DriverConfig;
use dray_nvme::command::{AdminOpcode, CompletionEntry, NvmOpcode, StatusPhase};
use dray_nvme::identify::{IdentifyController, LbaFormat};
use dray_nvme::registers::{Aqa, Cap, Cc, Csts, ShutdownNotification, ShutdownStatus, cq_head_doorbell, offset, sq_tail_doorbell};
use dray_nvme::status::Status;
use std::collections::BTreeMap;
use zerocopy::{FromZeros, IntoBytes};

const BLOCKS: u64 = 128;

#[derive(Default)]
struct Queue {
    sq: u64,
    cq: u64,
    entries: u32,
    head: u32,
    tail: u32,
    wrapped: bool,
}

struct Controller {
    connector: Connector,
    port: Option<Port>,
    reader: SpaceReader,
    queues: BTreeMap<u16, Queue>,
    resets: u32,
    disk: Vec<u8>,
    nguid: u8,
    nsze: u64,
    /// Stops answering I/O.
    mute: bool,
    enables: u32,
}

impl Controller {
    fn new(space: &AddressSpace) -> Self {
        Self {
            connector: Connector::new(),
            port: None,
            reader: space.reader(),
            queues: BTreeMap::new(),
            resets: 0,
            disk: vec![0; BLOCKS as usize * BLOCK_BYTES],
            nguid: 1,
            nsze: BLOCKS * 8,
            mute: false,
            enables: 0,
        }
    }

    fn poll(&mut self) {
        if let Some(port) = self.connector.poll() {
            self.port = port;
        }
        let Some(port) = self.port.clone() else { return };
        let _changed = self.reader.refresh();
        let bar = port.bar();
        let cap = Cap::new().with_mqes(63).with_to(1).with_css(Cap::CSS_NVM).with_cqr(true);
        bar.store64(offset::CAP, cap.into_bits());
        let cc = Cc::from_bits(bar.load32(offset::CC));
        if bar.resets() != self.resets || !cc.en() {
            self.resets = bar.resets();
            self.queues.clear();
            bar.store32(offset::CSTS, 0);
            (0..4).for_each(|qid| {
                bar.store32(sq_tail_doorbell(qid, 0), 0);
                bar.store32(cq_head_doorbell(qid, 0), 0);
            });
        }
        if !cc.en() {
            return;
        }
        if self.queues.is_empty() {
            let entries = u32::from(Aqa::from_bits(bar.load32(offset::AQA)).asqs()) + 1;
            let queue = Queue { sq: bar.load64(offset::ASQ), cq: bar.load64(offset::ACQ), entries, ..Queue::default() };
            self.queues.insert(0, queue);
            self.enables += 1;
            bar.store32(offset::CSTS, Csts::new().with_rdy(true).into_bits());
        }
        if cc.shn() != ShutdownNotification(0) {
            bar.store32(offset::CSTS, Csts::new().with_rdy(true).with_shst(ShutdownStatus::COMPLETE).into_bits());
        }
        let qids: Vec<u16> = self.queues.keys().copied().filter(|qid| *qid == 0 || !self.mute).collect();
        for qid in qids {
            self.fetch(&port, qid);
        }
    }

    fn fetch(&mut self, port: &Port, qid: u16) {
        let tail = port.bar().load32(sq_tail_doorbell(qid, 0));
        while let Some(queue) = self.queues.get_mut(&qid).filter(|queue| queue.sq != 0 && queue.head != tail) {
            let mut entry = SubmissionEntry::default();
            let at = queue.sq + u64::from(queue.head) * 64;
            queue.head = (queue.head + 1) % queue.entries;
            self.reader.translate(at, 64, false).expect("queue").read(entry.as_mut_bytes());
            let status = if qid == 0 { self.admin(&entry) } else { Some(self.io(&entry)) };
            if let (Some(status), Some(queue)) = (status, self.queues.get_mut(&qid)) {
                let granted = qid == 0 && entry.admin_opcode() == AdminOpcode::SET_FEATURES && entry.cdw10 == 7;
                let completion = CompletionEntry {
                    dw0: if granted { 0x0001_0001 } else { 0 },
                    sqhd: queue.head as u16,
                    sqid: qid,
                    cid: entry.cdw0.cid(),
                    status_phase: StatusPhase::new().with_phase(!queue.wrapped).with_status(status),
                    ..CompletionEntry::default()
                };
                let at = queue.cq + u64::from(queue.tail) * 16;
                queue.tail = (queue.tail + 1) % queue.entries;
                queue.wrapped ^= queue.tail == 0;
                let to = self.reader.translate(at, 16, true).expect("queue");
                to.write(completion.as_bytes());
            }
        }
    }

    fn data(&mut self, entry: &SubmissionEntry) -> Segment<'_> {
        self.reader.translate(entry.prp1(), 4096, true).expect("data")
    }

    fn admin(&mut self, entry: &SubmissionEntry) -> Option<Status> {
        let qid = entry.cdw10 as u16;
        match entry.admin_opcode() {
            AdminOpcode::ASYNC_EVENT_REQUEST => return None,
            AdminOpcode::IDENTIFY if entry.cdw10 as u8 == 1 => {
                let mut page = IdentifyController::new_zeroed();
                page.sn[..4].copy_from_slice(b"D123");
                page.nn = 1;
                self.data(entry).write(page.as_bytes());
            }
            AdminOpcode::IDENTIFY if entry.cdw10 as u8 == 0 => {
                let mut page = IdentifyNamespace::new_zeroed();
                (page.nsze, page.ncap, page.nguid[0]) = (self.nsze, self.nsze, self.nguid);
                page.lbaf[0] = LbaFormat::new().with_lbads(9);
                self.data(entry).write(page.as_bytes());
            }
            AdminOpcode::IDENTIFY => return Some(Status::INVALID_FIELD),
            AdminOpcode::CREATE_IO_CQ => {
                let entries = (entry.cdw10 >> 16) + 1;
                self.queues.insert(qid, Queue { cq: entry.prp1(), entries, ..Queue::default() });
            }
            AdminOpcode::CREATE_IO_SQ => self.queues.get_mut(&qid).expect("its CQ").sq = entry.prp1(),
            _ => {}
        }
        Some(Status::SUCCESS)
    }

    fn io(&mut self, entry: &SubmissionEntry) -> Status {
        let at = entry.slba() as usize * 512;
        let mut bytes = [0; BLOCK_BYTES];
        if entry.nvm_opcode() == NvmOpcode::WRITE {
            self.data(entry).read(&mut bytes);
            self.disk[at..at + BLOCK_BYTES].copy_from_slice(&bytes);
        } else {
            bytes.copy_from_slice(&self.disk[at..at + BLOCK_BYTES]);
            self.data(entry).write(&bytes);
        }
        Status::SUCCESS
    }
}

struct Rig {
    guest: Guest,
    handle: GuestHandle,
    controller: Controller,
    slot: Slot,
    now: Time,
}

impl Rig {
    fn new(queues: u16) -> Self {
        let slot = Slot::new(AddressSpace::default(), 0).expect("slot");
        let controller = Controller::new(slot.space());
        slot.point_at(&controller.connector.plug());
        let config = DriverConfig { io_timeout_ms: 100, ..DriverConfig::default() };
        let driver = Driver::new(slot.function(), config).expect("driver");
        let spec = LedgerSpec { seed: 1, guest: 1, blocks: (0..BLOCKS).rev().collect() };
        let ledger = Arc::new(Ledger::in_memory(&spec).expect("ledger"));
        let config = GuestConfig { rate: 0, queues, ..GuestConfig::default() };
        let (guest, handle) = Guest::new(driver, config, ledger).expect("guest");
        Self { guest, handle, controller, slot, now: Time(1) }
    }

    fn until(&mut self, what: impl Fn(&GuestHandle) -> bool) {
        for step in 0..1_000_000 {
            if what(&self.handle) {
                return;
            }
            self.now = self.now.after_us(2);
            let _progress = self.guest.poll(self.now);
            // Slower than the guest, so that commands are outstanding between its polls.
            if step % 4 == 3 {
                self.controller.poll();
            }
        }
        panic!("never: {:?}", self.handle.stats());
    }
}

#[test]
fn a_guest_runs_resets_finds_itself_again_and_ends() {
    let mut rig = Rig::new(2);
    rig.until(|guest| guest.counters().writes > 1000);
    assert_eq!(rig.handle.identity().expect("identity").serial, "D123");
    rig.handle.set_phase(Phase::After);
    let written = rig.handle.counters().writes;
    rig.handle.request_reset();
    rig.until(|guest| guest.counters().resets == 1 && guest.counters().writes > written + 1000);
    assert_eq!(rig.controller.enables, 2);
    assert!(rig.handle.phase_stats(Phase::After).commands >= 1000);
    rig.handle.stop();
    rig.until(GuestHandle::is_over);
    assert_eq!(rig.handle.stage(), GuestStage::Stopped);
    let stats = rig.handle.stats();
    assert!(stats.is_ok() && stats.counters.surprises == 0, "{stats:?}");
    assert_eq!(rig.guest.poll(rig.now), Progress::IDLE);
    assert_eq!(rig.handle.ledger().next_seq() - 1, stats.counters.writes, "the reset waited for what was outstanding");
    assert!(check(&mut rig.controller.disk, rig.handle.ledger()).expect("check").is_ok());
}

#[test]
fn another_disk_after_a_reset_is_noticed() {
    let mut rig = Rig::new(1);
    rig.until(|guest| guest.counters().writes > 100);
    rig.controller.nguid = 2;
    rig.handle.request_reset();
    rig.until(|guest| guest.counters().resets == 1);
    assert_eq!(rig.handle.counters().identity_changes, 1);
    assert!(rig.handle.first_error().expect("text").contains("NGUID"));
    assert!(!rig.handle.stats().is_ok());
}

#[test]
fn a_controller_that_falls_silent_is_reset_and_nothing_is_lost() {
    let mut rig = Rig::new(1);
    rig.until(|guest| guest.counters().writes > 100);
    rig.controller.mute = true;
    rig.until(|guest| guest.counters().unknown > 0);
    rig.controller.mute = false;
    let written = rig.handle.counters().writes;
    rig.until(|guest| guest.counters().writes > written + 1000);
    let counters = rig.handle.counters();
    assert!(counters.surprises >= 1 && counters.resets == 0, "{counters:?}");
    assert!(rig.handle.stats().is_ok(), "{:?}", rig.handle.stats());
    rig.handle.stop();
    rig.until(GuestHandle::is_over);
    assert!(check(&mut rig.controller.disk, rig.handle.ledger()).expect("check").is_ok());
}

#[test]
fn a_small_namespace_few_queues_or_a_function_that_goes_end_the_guest() {
    let mut rig = Rig::new(1);
    rig.controller.nsze -= 1;
    rig.until(GuestHandle::is_over);
    assert_eq!(rig.handle.stage(), GuestStage::Failed);
    assert!(rig.handle.first_error().expect("text").contains("block 127"));

    let mut rig = Rig::new(3);
    rig.until(GuestHandle::is_over);
    assert!(rig.handle.first_error().expect("text").contains("grants 2"));

    let mut rig = Rig::new(1);
    rig.until(|guest| guest.counters().writes > 100);
    rig.slot.unplug();
    rig.until(GuestHandle::is_over);
    assert_eq!(rig.handle.stage(), GuestStage::Failed);
    assert!(rig.handle.first_error().expect("text").contains("gone"));
}
