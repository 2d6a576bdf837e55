//! The migration commands: data queue, suspend, state, resume at another subsystem, tracking, limits.
#![allow(missing_docs)]

mod support;

use dray_controller::{FileBacking, VENDOR_UUID};
use dray_device::backing::{Backing, BackingInfo, BackingRequest, Submitted};
use dray_device::poll::Time;
use dray_nvme::cdq::{Changed, Esa, QueueType, UdmqEntry};
use dray_nvme::command::{CompletionEntry, SequenceIndicator, SubmissionEntry};
use dray_nvme::event::{AsyncEvent, cdqid};
use dray_nvme::feature::{AsyncEventConfig, FeatureId};
use dray_nvme::identify::{Cns, CommandSetId, ControllerStateFormats, IdentifyController};
use dray_nvme::registers::offset;
use dray_nvme::status::Status;
use std::sync::{Arc, Mutex};
use support::{BLOCKS, Guest, MC, MMC, Shadow, World, assert_ok, config, memory, namespace};
use dray_nvme::track::{TrackMemoryDescriptor, TrackMemoryHeader, TrackReceiveDescriptor, TrackReceiveHeader};
use zerocopy::{FromBytes, IntoBytes};

/// A data queue as its reader sees it.
struct Log {
    at: usize,
    slots: u32,
    next: u32,
    phase: bool,
    id: u16,
}

impl Log {
    fn create(world: &mut World, manager: &mut Guest, slots: u32) -> Self {
        let at = manager.pages(slots as usize * 32);
        let create = SubmissionEntry::create_cdq(QueueType::UDMQ, MC, true, slots * 8, manager.address(at));
        let id = assert_ok(manager.admin(world, create)).dw0 as u16;
        Self { at, slots, next: 0, phase: true, id }
    }

    fn take(&mut self, manager: &Guest) -> Vec<UdmqEntry> {
        let mut entries = Vec::new();
        loop {
            let bytes = manager.get(self.at + self.next as usize * 32, 32);
            let entry = UdmqEntry::read_from_bytes(&bytes).expect("entry");
            if entry.phase() != self.phase {
                return entries;
            }
            entries.push(entry);
            self.next += 1;
            if self.next == self.slots {
                (self.next, self.phase) = (0, !self.phase);
            }
        }
    }
}

fn range(slba: u64, blocks: u64) -> Changed {
    Changed::Range { nsid: 1, slba, blocks }
}

fn changes(entries: &[UdmqEntry]) -> Vec<Changed> {
    entries.iter().map(UdmqEntry::changed).collect()
}

fn suspend(world: &mut World, manager: &mut Guest) {
    assert_ok(manager.admin(world, SubmissionEntry::suspend(MC, false, false)));
}

fn state(world: &mut World, manager: &mut Guest) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in 0..2u64 {
        let get = SubmissionEntry::get_controller_state(1, MC, 1, piece * 2048, 512);
        let (done, data) = manager.admin_in(world, get, 2048);
        if piece > 0 && done.status().is_error() {
            break;
        }
        assert_eq!(assert_ok(done).dw0 & 1, 1, "suspended");
        bytes.extend(data);
    }
    let sizes = [16, 32].map(|at| u128::read_from_bytes(&bytes[at..at + 16]).expect("size") as usize * 4);
    bytes.truncate(48 + sizes[0] + sizes[1]);
    bytes
}

fn set_state(world: &mut World, manager: &mut Guest, bytes: &[u8]) -> CompletionEntry {
    let first = bytes.len() / 8 * 4;
    let set = |seqind, offset, dwords| SubmissionEntry::set_controller_state(seqind, 1, MC, 1, offset, dwords);
    let done = manager.admin_out(world, set(SequenceIndicator::FIRST, 0, (first / 4) as u32), &bytes[..first]);
    assert_ok(done);
    let rest = &bytes[first..];
    manager.admin_out(world, set(SequenceIndicator::LAST, first as u64, (rest.len() / 4) as u32), rest)
}

#[test]
fn the_management_controller_says_what_it_can_and_others_refuse() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    let identify = |cns| SubmissionEntry::identify(cns, 0, 0, CommandSetId::NVM);
    let page = manager.admin_in(&mut world, identify(Cns::CONTROLLER), 4096).1;
    let page = IdentifyController::read_from_bytes(&page).expect("page");
    assert!(page.oacs.hmlms() && page.trattr.thmcs() && page.trattr.tudcs() && page.mcudmq == 1);
    let page = manager.admin_in(&mut world, identify(Cns::CONTROLLER_STATE_FORMATS), 4096).1;
    let formats = ControllerStateFormats::parse(&page).expect("formats");
    assert_eq!((formats.csvi_of(0), formats.csuuidi_of(&VENDOR_UUID)), (Some(1), Some(1)));
    assert!(guest.admin_in(&mut world, identify(Cns::CONTROLLER_STATE_FORMATS), 4096).0.status().is(Status::INVALID_FIELD));
    let suspend = SubmissionEntry::suspend(MC, false, false);
    assert!(guest.admin(&mut world, suspend).status().is(Status::INVALID_OPCODE));
    for cntlid in [MMC, 77] {
        let done = manager.admin(&mut world, SubmissionEntry::suspend(cntlid, false, false));
        assert!(done.status().is(Status::INVALID_CONTROLLER_ID));
    }
    assert!(manager.admin(&mut world, SubmissionEntry::resume(MC)).status().is(Status::CONTROLLER_NOT_SUSPENDED));
    assert!(manager.admin(&mut world, SubmissionEntry::delete_cdq(0)).status().is(Status::INVALID_CDQ));
    assert!(manager.admin(&mut world, SubmissionEntry::track_send_log(true, 0)).status().is(Status::INVALID_CDQ));
}

#[test]
fn every_change_is_logged_before_its_completion() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 64, None);
    assert_ok(guest.write(&mut world, 1, 0, &[1; 512]));
    let mut log = Log::create(&mut world, &mut manager, 64);
    let again = SubmissionEntry::create_cdq(QueueType::UDMQ, MC, true, 512, manager.address(0));
    assert!(manager.admin(&mut world, again).status().is(Status::INVALID_FIELD), "one queue a controller");
    assert!(log.take(&manager).is_empty(), "not logging yet");
    assert_ok(manager.admin(&mut world, SubmissionEntry::track_send_log(true, log.id)));
    assert_eq!(log.take(&manager)[0].esa(), Esa::FIRST);
    assert_ok(guest.write(&mut world, 1, 10, &[1; 4096]));
    assert_eq!(changes(&log.take(&manager)), [range(10, 8)]);
    // Adjacent writes of one batch are one entry.
    let at = guest.pages(4096);
    for i in 0..8 {
        guest.push(1, SubmissionEntry::write(1, 100 + i, 1).with_prps(guest.address(at), 0));
    }
    guest.ring(1);
    while guest.pop(1).is_none() {
        world.poll();
    }
    assert_eq!(changes(&log.take(&manager)), [range(100, 8)]);
    while guest.pop(1).is_some() {}
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write_zeroes(1, 1000, 3000, false)));
    assert_eq!(changes(&log.take(&manager)), [range(1000, 3000)]);
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write_uncorrectable(1, 5000, 3)));
    assert_eq!(changes(&log.take(&manager)), [range(5000, 3)]);
    let list = guest.pages(4096);
    let mut bytes = [0u8; 32];
    bytes[8] = 10;
    bytes[16] = 3;
    guest.put(list, &bytes);
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::copy(1, 6000, 1).with_prps(guest.address(list), 0)));
    assert_eq!(changes(&log.take(&manager)), [range(6000, 4)]);
    guest.put(list, &[0, 0, 0, 0, 7, 0, 0, 0, 0x40, 0x1f, 0, 0, 0, 0, 0, 0]);
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::dsm(1, 1).with_prps(guest.address(list), 0)));
    let entries = log.take(&manager);
    assert_eq!((changes(&entries), entries[0].lbamqa.dlba()), (vec![range(8000, 7)], true));
    assert_ok(guest.read(&mut world, 1, 0, 8).0);
    assert!(log.take(&manager).is_empty(), "reads change nothing");
    // The manager's own writes are nobody's change.
    manager.create_pair(&mut world, 1, 8, None);
    assert_ok(manager.write(&mut world, 1, 0, &[1; 512]));
    assert!(log.take(&manager).is_empty());
    assert_ok(manager.admin(&mut world, SubmissionEntry::track_send_log(false, log.id)));
    assert_eq!(log.take(&manager)[0].esa(), Esa::STOPPED);
    assert_ok(guest.write(&mut world, 1, 10, &[1; 512]));
    assert!(log.take(&manager).is_empty());
    assert_ok(manager.admin(&mut world, SubmissionEntry::delete_cdq(log.id)));
}

#[test]
fn a_full_queue_says_so_in_its_last_entry_and_by_an_event() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 64, None);
    let mut log = Log::create(&mut world, &mut manager, 8);
    let aer = manager.push(0, SubmissionEntry::async_event_request());
    let second = manager.push(0, SubmissionEntry::async_event_request());
    manager.ring(0);
    assert_ok(manager.admin(&mut world, SubmissionEntry::set_cdq_feature(log.id, 0, Some(1))));
    assert_ok(manager.admin(&mut world, SubmissionEntry::track_send_log(true, log.id)));
    let event = manager.wait(&mut world, 0, aer);
    assert_eq!((event.dw0, cdqid(event.dw1)), (AsyncEvent::CDQ_TAIL_POINTER.into_bits(), log.id));
    for i in 0..20 {
        assert_ok(guest.write(&mut world, 1, i * 10, &[1; 512]));
    }
    let event = manager.wait(&mut world, 0, second);
    assert_eq!((event.dw0, cdqid(event.dw1)), (AsyncEvent::CDQ_FULL.into_bits(), log.id));
    let entries = log.take(&manager);
    assert_eq!(entries.len(), 7);
    assert_eq!(entries[6].esa(), Esa::FULL);
    assert_ok(manager.admin(&mut world, SubmissionEntry::set_cdq_feature(log.id, log.next, None)));
    let (done, data) = manager.admin_in(&mut world, SubmissionEntry::get_cdq_feature(log.id), 8);
    assert_eq!((assert_ok(done).dw0, data[0]), (u32::from(log.id), 7));
    assert_ok(guest.write(&mut world, 1, 0, &[1; 512]));
    assert!(log.take(&manager).is_empty(), "the log has a hole until it is started again");
    assert_ok(manager.admin(&mut world, SubmissionEntry::track_send_log(true, log.id)));
    assert_ok(guest.write(&mut world, 1, 0, &[1; 512]));
    let entries = log.take(&manager);
    assert_eq!((entries[0].esa(), changes(&entries[1..])), (Esa::FIRST, vec![range(0, 1)]));
    let bad = SubmissionEntry::set_cdq_feature(log.id, 8, None);
    assert!(manager.admin(&mut world, bad).status().is(Status::INVALID_FIELD));
}

#[test]
fn the_guests_queues_carry_on_at_the_destination() {
    let (mut source, mut target) = (World::new(), World::new());
    let (mut s_manager, mut d_manager) = (source.ready(MMC), target.ready(MMC));
    let mut guest = source.ready(MC);
    guest.create_pair(&mut source, 1, 16, Some(1));
    guest.create_pair(&mut source, 2, 8, None);
    let aer = guest.push(0, SubmissionEntry::async_event_request());
    guest.ring(0);
    for i in 0..37 {
        assert_ok(guest.write(&mut source, 1, i, &[1; 512]));
    }
    let coalescing = SubmissionEntry::set_features(FeatureId::INTERRUPT_COALESCING, 0x0105, false);
    assert_ok(guest.admin(&mut source, coalescing));
    let mut log = Log::create(&mut source, &mut s_manager, 64);
    assert_ok(s_manager.admin(&mut source, SubmissionEntry::track_send_log(true, log.id)));
    suspend(&mut source, &mut s_manager);
    assert_eq!(log.take(&s_manager).last().map(UdmqEntry::esa), Some(Esa::SUSPENDED));
    // Rung while suspended: nothing happens at the source.
    let at = guest.pages(4096);
    guest.put(at, &[0x77; 512]);
    let late = guest.push(1, SubmissionEntry::write(1, 50, 1).with_prps(guest.address(at), 0));
    guest.ring(1);
    for _ in 0..50 {
        source.poll();
    }
    assert!(guest.pop(1).is_none());
    let bytes = state(&mut source, &mut s_manager);

    suspend(&mut target, &mut d_manager);
    // Before the guest is there, and damaged: refused, and nothing stays.
    assert!(set_state(&mut target, &mut d_manager, &bytes).status().is(Status::INVALID_FIELD));
    guest.slot.point_at(&target.subsystem.plug(MC).expect("controller"));
    for _ in 0..5 {
        source.poll();
        target.poll();
    }
    assert_eq!(guest.csts(), 1, "the guest's registers are left alone");
    for at in [56, 56 + 8, bytes.len() - 20] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0xff;
        damaged[at + 1] ^= 0xff;
        assert!(set_state(&mut target, &mut d_manager, &damaged).status().is(Status::INVALID_FIELD), "byte {at}");
    }
    assert_ok(set_state(&mut target, &mut d_manager, &bytes));
    for _ in 0..20 {
        target.poll();
    }
    assert!(guest.pop(1).is_none(), "not before Resume");
    assert_ok(d_manager.admin(&mut target, SubmissionEntry::resume(MC)));
    assert_ok(guest.wait(&mut target, 1, late));
    let (done, back) = guest.read(&mut target, 1, 50, 1);
    assert_ok(done);
    assert_eq!(back, [0x77; 512]);
    assert_ok(guest.run(&mut target, 2, SubmissionEntry::flush(1)));
    let get = SubmissionEntry::get_features(FeatureId::INTERRUPT_COALESCING, Default::default(), 0);
    assert_eq!(assert_ok(guest.admin(&mut target, get)).dw0, 0x0105);
    let done = guest.admin(&mut target, SubmissionEntry::abort(0, aer));
    assert_eq!(done.dw0, 0, "the event request came along");
    // The source does nothing more, whatever its manager does.
    let before: Vec<_> = source.subsystem.counters().collect();
    for _ in 0..20 {
        source.poll();
    }
    assert_eq!(before, source.subsystem.counters().collect::<Vec<_>>());
    // And a reset by the guest is the destination's to handle.
    guest.function.write32(offset::CC, 0);
    target.poll();
    assert_eq!(guest.csts(), 0);
    guest.enable(&mut target);
    guest.create_pair(&mut target, 1, 16, Some(1));
    assert_eq!(guest.read(&mut target, 1, 50, 1).1, [0x77; 512]);
}

#[test]
fn a_state_that_grants_one_kind_of_queue_alone_is_refused() {
    let mut world = World::new();
    let (mut manager, _guest) = (world.ready(MMC), world.ready(MC));
    suspend(&mut world, &mut manager);
    let mut odd = dray_controller::decode(&state(&mut world, &mut manager), true, true).expect("a state");
    odd.vendor.as_mut().expect("our part").features.granted_cqs = 1;
    let bytes = dray_controller::encode(&odd, true, true).expect("bytes");
    assert!(set_state(&mut world, &mut manager, &bytes).status().is(Status::INVALID_FIELD));
    odd.vendor.as_mut().expect("our part").features.granted_sqs = 1;
    let bytes = dray_controller::encode(&odd, true, true).expect("bytes");
    assert_ok(set_state(&mut world, &mut manager, &bytes));
}

#[test]
fn a_controller_with_io_queues_of_its_own_takes_no_state() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    suspend(&mut world, &mut manager);
    let bare = state(&mut world, &mut manager);
    assert_ok(manager.admin(&mut world, SubmissionEntry::resume(MC)));
    guest.create_pair(&mut world, 1, 16, Some(1));
    suspend(&mut world, &mut manager);
    let full = state(&mut world, &mut manager);
    assert_ne!(bare, full);
    // One without queues as well: theirs would outlive it.
    for bytes in [&bare, &full] {
        assert!(set_state(&mut world, &mut manager, bytes).status().is(Status::INVALID_FIELD));
    }
    assert_eq!(state(&mut world, &mut manager), full, "as it was");
    assert_ok(manager.admin(&mut world, SubmissionEntry::resume(MC)));
    assert_ok(guest.read(&mut world, 1, 0, 1).0);
}

#[test]
fn a_reset_that_came_in_between_is_done_at_resume() {
    let (mut source, mut target) = (World::new(), World::new());
    let (mut s_manager, mut d_manager) = (source.ready(MMC), target.ready(MMC));
    let mut guest = source.ready(MC);
    guest.create_pair(&mut source, 1, 16, Some(1));
    suspend(&mut source, &mut s_manager);
    let bytes = state(&mut source, &mut s_manager);
    suspend(&mut target, &mut d_manager);
    guest.slot.point_at(&target.subsystem.plug(MC).expect("controller"));
    source.poll();
    guest.function.write32(offset::CC, 0);
    guest.start();
    assert_ok(set_state(&mut target, &mut d_manager, &bytes));
    assert_ok(d_manager.admin(&mut target, SubmissionEntry::resume(MC)));
    for _ in 0..5 {
        target.poll();
    }
    assert_eq!(guest.csts(), 1, "enabled anew");
    guest.create_pair(&mut target, 1, 16, Some(1));
    assert_ok(guest.read(&mut target, 1, 0, 1).0);
}

#[test]
fn suspension_ends_by_a_reset_and_the_fence_holds_all_the_same() {
    let config = config();
    let fenced = config.controllers[1].fence.clone();
    let mut world = World::with(config, vec![(namespace(1), memory())]);
    let mut manager = world.ready(MMC);
    let mut guest = world.ready(MC);
    guest.create_pair(&mut world, 1, 16, None);
    suspend(&mut world, &mut manager);
    guest.enable_after_reset(&mut world);
    guest.create_pair(&mut world, 1, 16, None);
    assert_ok(guest.read(&mut world, 1, 0, 1).0);
    suspend(&mut world, &mut manager);
    manager.enable_after_reset(&mut world);
    assert_ok(guest.read(&mut world, 1, 0, 1).0);
    fenced.raise();
    guest.push(1, SubmissionEntry::flush(1));
    guest.ring(1);
    for _ in 0..20 {
        world.poll();
    }
    assert!(guest.pop(1).is_none(), "fenced");
    guest.function.write32(offset::CC, 0);
    world.poll();
    guest.start();
    for _ in 0..5 {
        world.poll();
    }
    assert_eq!(guest.csts(), 0, "a fenced controller does not become ready");
    // An undo lowers the fence: the guest that waits is served.
    fenced.lower();
    for _ in 0..5 {
        world.poll();
    }
    assert_eq!(guest.csts(), 1, "CSTS.RDY");
}

#[test]
fn behind_the_fence_no_event_is_reported_either() {
    let config = config();
    let fenced = config.controllers[1].fence.clone();
    let mut world = World::with(config, vec![(namespace(1), memory())]);
    let mut manager = world.ready(MMC);
    let mut guest = world.ready(MC);
    let notices = AsyncEventConfig::new().with_nsan(true).into_bits();
    assert_ok(guest.admin(&mut world, SubmissionEntry::set_features(FeatureId::ASYNC_EVENT_CONFIG, notices, false)));
    let aer = guest.push(0, SubmissionEntry::async_event_request());
    guest.ring(0);
    world.poll();
    // The state that is read now has the request outstanding.
    suspend(&mut world, &mut manager);
    let protect = SubmissionEntry::set_features(FeatureId::NAMESPACE_WRITE_PROTECT, 1, false);
    assert_ok(manager.admin(&mut world, SubmissionEntry { nsid: 1, ..protect }));
    fenced.raise();
    manager.enable_after_reset(&mut world);
    for _ in 0..20 {
        world.poll();
    }
    assert!(guest.pop(0).is_none(), "the destination has the request by now, and posts to the same slot");
    fenced.lower();
    assert_ok(guest.wait(&mut world, 0, aer));
}

/// A backing that ends operations when it is told to.
#[derive(Clone, Default)]
struct Slow {
    waiting: Arc<Mutex<Vec<u64>>>,
    open: Arc<Mutex<bool>>,
}

impl Backing for Slow {
    fn info(&self) -> BackingInfo {
        BackingInfo { block_bytes: 512, blocks: BLOCKS, volatile_cache: true, deallocated_reads_zero: false }
    }
    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let mut waiting = self.waiting.lock().expect("lock");
        if waiting.len() >= 8 {
            return Submitted::Busy;
        }
        waiting.push(request.tag);
        Submitted::Pending
    }
    fn commit(&mut self) {}
    fn poll(&mut self, _now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        if !*self.open.lock().expect("lock") {
            return 0;
        }
        let ended = std::mem::take(&mut *self.waiting.lock().expect("lock"));
        ended.iter().for_each(|&tag| done(tag, Status::WRITE_FAULT));
        ended.len()
    }
    fn in_flight(&self) -> usize {
        self.waiting.lock().expect("lock").len()
    }
}

#[test]
fn suspend_waits_for_the_backing_and_what_a_reset_abandoned_is_logged() {
    let slow = Slow::default();
    let mut world = World::with(config(), vec![(namespace(1), Box::new(slow.clone()))]);
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 16, None);
    let mut log = Log::create(&mut world, &mut manager, 64);
    assert_ok(manager.admin(&mut world, SubmissionEntry::track_send_log(true, log.id)));
    log.take(&manager);
    let at = guest.pages(4096);
    for i in 0..12 {
        guest.push(1, SubmissionEntry::write(1, i * 4, 1).with_prps(guest.address(at), 0));
    }
    guest.ring(1);
    for _ in 0..10 {
        world.poll();
    }
    assert_eq!(slow.in_flight(), 8, "a busy backing stops fetching");
    guest.function.write32(offset::CC, 0);
    for _ in 0..10 {
        world.poll();
    }
    assert_eq!(guest.csts() & 1, 1, "a reset ends when nothing of before can touch media or memory any more");
    assert!(log.take(&manager).is_empty(), "not ended, not logged");
    let cid = manager.push(0, SubmissionEntry::suspend(MC, false, false));
    manager.ring(0);
    for _ in 0..50 {
        world.poll();
        assert!(manager.pop(0).is_none(), "suspended while a write is under way");
    }
    *slow.open.lock().expect("lock") = true;
    assert_ok(manager.wait(&mut world, 0, cid));
    let entries = log.take(&manager);
    let expected: Vec<_> = (0..8).map(|i| range(i * 4, 1)).collect();
    assert_eq!(changes(&entries[..8]), expected, "failed and abandoned, and logged");
    assert_eq!(entries[8].esa(), Esa::SUSPENDED);
    assert_eq!(guest.csts() & 1, 0, "the reset has ended");
}

#[test]
fn host_memory_that_the_controller_writes_is_tracked() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 16, None);
    let mut request = vec![0u8; 20];
    request[4] = 1;
    request[8..16].copy_from_slice(&guest.iova.to_le_bytes());
    request[16..20].copy_from_slice(&4096u32.to_le_bytes());
    assert_ok(manager.admin_out(&mut world, SubmissionEntry::track_send_memory(true, MC), &request));
    let target = guest.pages(4096);
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::read(1, 0, 8).with_prps(guest.address(target), 0)));
    let (done, report) = manager.admin_in(&mut world, SubmissionEntry::track_receive(MC, 1024), 4096);
    assert_ok(done);
    let count = report[4] as usize;
    let pages: Vec<u64> = (0..count)
        .flat_map(|i| {
            let at = 16 + 16 * i;
            let first = u64::read_from_bytes(&report[at..at + 8]).expect("address");
            let len = u32::read_from_bytes(&report[at + 8..at + 12]).expect("length");
            (0..u64::from(len)).map(move |page| first + page * 4096)
        })
        .collect();
    let cq = guest.address(guest.queues[&1].cq);
    assert_eq!(pages, [cq, guest.address(target)], "the completion's page and the data's");
    assert_ok(manager.admin_out(&mut world, SubmissionEntry::track_send_memory(false, MC), &[]));
}

#[test]
fn a_guest_limit_is_kept() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 16, None);
    let mut limit = SubmissionEntry::set_features(FeatureId::VENDOR_GUEST_LIMIT, MC.into(), false);
    limit.cdw12 = 10_000;
    assert_ok(manager.admin(&mut world, limit));
    let start = world.now;
    for _ in 0..100 {
        assert_ok(guest.run(&mut world, 1, SubmissionEntry::flush(1)));
    }
    let us = world.now.us_since(start);
    assert!((9_800..11_000).contains(&us), "100 commands took {us} us");
    // Whoever set it may not come back to lift it.
    manager.enable_after_reset(&mut world);
    let start = world.now;
    for _ in 0..100 {
        assert_ok(guest.run(&mut world, 1, SubmissionEntry::flush(1)));
    }
    assert!(world.now.us_since(start) < 5_000, "a reset of the manager lifts the limit");
}

#[test]
fn a_file_backing_keeps_what_is_written() {
    let path = std::env::temp_dir().join(format!("dray-controller-{}", std::process::id()));
    std::fs::write(&path, vec![0xa5u8; 4 << 20]).expect("file");
    let backing = FileBacking::open(&path, 512, 64).expect("backing");
    let mut world = World::with(config(), vec![(namespace(1), Box::new(backing))]);
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 16, None);
    let mut log = Log::create(&mut world, &mut manager, 64);
    assert_ok(manager.admin(&mut world, SubmissionEntry::track_send_log(true, log.id)));
    let data: Vec<u8> = (0..8192u32).map(|i| (i % 253) as u8).collect();
    assert_ok(guest.write(&mut world, 1, 16, &data));
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::flush(1)));
    let (done, back) = guest.read(&mut world, 1, 16, 16);
    assert_ok(done);
    assert_eq!(back, data);
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write_zeroes(1, 1000, 2000, false)));
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write_zeroes(1, 3000, 8, true).with_fua()));
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::verify(1, 0, 8192)));
    let entries = log.take(&manager);
    assert_eq!(changes(&entries[1..]), [range(16, 16), range(1000, 2000), range(3000, 8)]);
    guest.function.write32(offset::CC, support::CC | 1 << 14);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while guest.csts() != 1 | 2 << 2 && std::time::Instant::now() < end {
        world.poll();
    }
    assert_eq!(guest.csts(), 1 | 2 << 2, "shut down");
    drop(world);
    let file = std::fs::read(&path).expect("file");
    assert_eq!(&file[16 * 512..32 * 512], &data[..]);
    assert!(file[1000 * 512..3000 * 512].iter().all(|&byte| byte == 0));
    assert!(file[3008 * 512..].iter().all(|&byte| byte == 0xa5));
    std::fs::remove_file(&path).expect("clean up");
}

/// A guest whose doorbells are trapped, and which has shadow doorbells and a queue pair.
fn shadowed(world: &mut World) -> (Guest, Shadow) {
    let mut guest = world.guest(MC);
    guest.slot.trap_doorbells(true);
    guest.enable(world);
    let shadow = Shadow::configure(world, &mut guest);
    guest.create_pair(world, 1, 16, None);
    (guest, shadow)
}

#[test]
fn shadow_doorbells_go_along_with_the_state() {
    let (mut source, mut target) = (World::new(), World::new());
    let (mut s_manager, mut d_manager) = (source.ready(MMC), target.ready(MMC));
    let (mut guest, shadow) = shadowed(&mut source);
    let cid = guest.push(1, SubmissionEntry::flush(1));
    shadow.tail(&guest, 1);
    assert_ok(guest.wait(&mut source, 1, cid));
    shadow.head(&guest, 1);
    suspend(&mut source, &mut s_manager);
    let bytes = state(&mut source, &mut s_manager);
    let told = dray_controller::decode(&bytes, true, true).expect("a state").vendor.expect("our part");
    assert_eq!(told.shadow_doorbells, Some([guest.address(shadow.bells), guest.address(shadow.events)]));
    // Rung after the state was taken, and in the page alone.
    let late = guest.push(1, SubmissionEntry::flush(1));
    shadow.tail(&guest, 1);
    suspend(&mut target, &mut d_manager);
    guest.slot.point_at(&target.subsystem.plug(MC).expect("controller"));
    source.poll();
    assert_ok(set_state(&mut target, &mut d_manager, &bytes));
    let before = guest.get(shadow.bells, 8192);
    (0..100).for_each(|_| source.poll());
    (0..100).for_each(|_| target.poll());
    assert!(guest.get(shadow.bells, 8192) == before, "nobody writes before Resume");
    assert_ok(d_manager.admin(&mut target, SubmissionEntry::resume(MC)));
    assert_ok(guest.wait(&mut target, 1, late));
    shadow.head(&guest, 1);
    (0..100).for_each(|_| target.poll());
    assert_eq!(shadow.events(&guest, 1)[0], guest.queues[&1].tail, "idle, and says so");
    guest.drain = true;
    assert_ok(guest.admin(&mut target, shadow.command(&guest)));
    guest.drain = false;
    let cid = guest.push(1, SubmissionEntry::flush(1));
    shadow.tail(&guest, 1);
    assert_ok(guest.wait(&mut target, 1, cid));
}

#[test]
fn suspension_and_resume_in_place_keep_the_shadow_doorbells() {
    let mut world = World::new();
    let mut manager = world.ready(MMC);
    let (mut guest, shadow) = shadowed(&mut world);
    suspend(&mut world, &mut manager);
    let late = guest.push(1, SubmissionEntry::flush(1));
    shadow.tail(&guest, 1);
    (0..100).for_each(|_| world.poll());
    assert!(guest.pop(1).is_none(), "suspended");
    assert_ok(manager.admin(&mut world, SubmissionEntry::resume(MC)));
    assert_ok(guest.wait(&mut world, 1, late));
}

#[test]
fn a_state_whose_shadow_pages_cannot_be_is_refused() {
    let mut world = World::new();
    let mut manager = world.ready(MMC);
    let mut guest = world.guest(MC);
    guest.slot.trap_doorbells(true);
    guest.enable(&mut world);
    let shadow = Shadow::configure(&mut world, &mut guest);
    suspend(&mut world, &mut manager);
    let good = dray_controller::decode(&state(&mut world, &mut manager), true, true).expect("a state");
    let page = guest.address(shadow.bells);
    for pages in [[page, page], [page, 0x7fff_ffff_f000], [page + 4, page + 4096]] {
        let mut odd = good.clone();
        odd.vendor.as_mut().expect("our part").shadow_doorbells = Some(pages);
        let bytes = dray_controller::encode(&odd, true, true).expect("bytes");
        assert!(set_state(&mut world, &mut manager, &bytes).status().is(Status::INVALID_FIELD), "{pages:x?}");
    }
    let bytes = dray_controller::encode(&good, true, true).expect("bytes");
    assert_ok(set_state(&mut world, &mut manager, &bytes));
    // Another version's record is not taken, however intact it is otherwise.
    let mut other = bytes.clone();
    let vendor = other.windows(8).position(|eight| eight == b"DRAYCTRL").expect("our part");
    let end = other.len() - 8;
    for version in [1, 3, 2] {
        other[vendor + 8] = version;
        let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        let checksum = other[vendor..end].iter().fold(0xcbf2_9ce4_8422_2325, fnv);
        other[end..].copy_from_slice(&checksum.to_le_bytes());
        let taken = dray_controller::decode(&other, true, true).is_ok();
        assert_eq!(taken, version == 2, "version {version}");
    }
    other[vendor + 8] = 1;
    assert!(set_state(&mut world, &mut manager, &other).status().is(Status::INVALID_FIELD));
}

#[test]
fn memory_tracking_sees_the_event_indices() {
    let mut world = World::new();
    let mut manager = world.ready(MMC);
    let (mut guest, shadow) = shadowed(&mut world);
    (0..100).for_each(|_| world.poll());
    let mut request = TrackMemoryHeader { rnmrtd: 1, ..Default::default() }.as_bytes().to_vec();
    let range = TrackMemoryDescriptor { saddr: guest.address(shadow.bells).into(), len: 2.into() };
    request.extend_from_slice(range.as_bytes());
    assert_ok(manager.admin_out(&mut world, SubmissionEntry::track_send_memory(true, MC), &request));
    let mut report = |world: &mut World| {
        let (done, bytes) = manager.admin_in(world, SubmissionEntry::track_receive(MC, 64), 256);
        assert_ok(done);
        let head = size_of::<TrackReceiveHeader>();
        let count = TrackReceiveHeader::read_from_prefix(&bytes).expect("header").0.ntmcd;
        let range = TrackReceiveDescriptor::read_from_prefix(&bytes[head..]).expect("range").0;
        (count > 0).then(|| (range.saddr.get(), range.len.get()))
    };
    assert_eq!(report(&mut world), None, "idle");
    let cid = guest.push(1, SubmissionEntry::flush(1));
    shadow.tail(&guest, 1);
    assert_ok(guest.wait(&mut world, 1, cid));
    assert!(report(&mut world).is_some(), "polled again");
    (0..100).for_each(|_| world.poll());
    assert!(report(&mut world).is_some(), "idle again");
    assert_eq!(report(&mut world), None);
}
