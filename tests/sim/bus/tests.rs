use super::*;
use crate::rig::{IO_QUEUES, MANAGEMENT, MIGRATABLE, NSID, Side as Parts, pattern};
use dray_controller::Subsystem;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::Poll;
use dray_device::slot::Slot;
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_driver::{
    AdminData, CdqConfig, CdqFormat, CdqOwner, CdqState, Driver, DriverConfig, DriverState, QueuePair, QueuePairConfig,
};
use dray_nvme::cdq::{Esa, UdmqEntry};
use dray_nvme::command::NvmOpcode;
use zerocopy::FromBytes;

/// A subsystem, a driver behind a bus before its management controller, and one before its migratable one.
struct Rig {
    now: Time,
    subsystem: Subsystem,
    bus: Bus,
    raw: Arc<dyn Function>,
    manager: Driver,
    guest: Driver,
    events: Vec<Event>,
}

impl Rig {
    fn new() -> Self {
        let parts = Parts::memory(1 << 20, 512);
        let subsystem = Subsystem::new(parts.config, parts.namespaces).expect("a subsystem");
        let slot = |cntlid| {
            let slot = Slot::new(AddressSpace::default(), IO_QUEUES + 1).expect("a slot");
            slot.point_at(&subsystem.plug(cntlid).expect("a controller"));
            slot.function()
        };
        let (raw, guest) = (slot(MANAGEMENT), slot(MIGRATABLE));
        let bus = Bus::new(0, Arc::clone(&raw), 7);
        let config = DriverConfig { admin_timeout_ms: 1, ..DriverConfig::default() };
        let manager = Driver::new(bus.function(), config).expect("a driver");
        let guest = Driver::new(guest, DriverConfig::default()).expect("a driver");
        let mut rig = Self { now: Time::from_us(1), subsystem, bus, raw, manager, guest, events: Vec::new() };
        rig.until(|rig| (rig.manager.is_ready() && rig.guest.is_ready()).then_some(()));
        rig
    }

    fn round(&mut self) {
        let _progress = self.subsystem.poll(self.now);
        self.bus.poll(self.now, &mut self.events);
        let _progress = self.manager.poll(self.now);
        self.bus.poll(self.now, &mut self.events);
        let _progress = self.guest.poll(self.now);
        self.now = self.now.after_us(1);
    }

    #[track_caller]
    fn until<T>(&mut self, mut step: impl FnMut(&mut Self) -> Option<T>) -> T {
        for _ in 0..100_000 {
            self.round();
            if let Some(found) = step(self) {
                return found;
            }
        }
        panic!("nothing happened: {:?}", self.manager.state());
    }

    #[track_caller]
    fn admin(&mut self, entry: &SubmissionEntry) -> dray_device::command::Completion {
        let ticket = self.manager.request(self.now, entry, AdminData::None).expect("it is taken");
        self.until(|rig| rig.manager.answer(ticket)).completion
    }

    /// A logged queue of that many slots, and a queue pair of the guest.
    fn tracked(&mut self, slots: u32) -> (CdqOwner, QueuePair) {
        let config =
            CdqConfig { kind: 0, cntlid: MIGRATABLE, slots, format: CdqFormat::UDMQ, arm_trigger: false };
        let mut owner = CdqOwner::create(&mut self.manager, self.now, config).expect("a queue");
        let id = self.until(|rig| {
            let _progress = owner.poll(&mut rig.manager, rig.now);
            match owner.state() {
                CdqState::Live { id } => Some(id),
                CdqState::Gone(why) => panic!("{why:?}"),
                _ => None,
            }
        });
        assert!(!self.admin(&SubmissionEntry::track_send_log(true, id)).status.is_error());
        let ticket = self.guest.create_queue_pair(self.now, QueuePairConfig { entries: 16, vector: None }).expect("taken");
        let pair = self.until(|rig| rig.guest.queue_pair(&ticket)).expect("a queue pair");
        (owner, pair)
    }

    /// The guest writes a block at each place; returns when all have ended.
    fn write(&mut self, pair: &mut QueuePair, places: &[u64]) {
        let memory = DmaBuffer::allocate("test-data", 4096, Pages::Small).expect("memory");
        let memory = MappedBuffer::new(self.guest.space(), memory).expect("a mapping");
        memory.arena().write(memory.buffer().offset(), &pattern(3, 512));
        let data = [memory.buffer().part(0, 512).expect("a block")];
        for (tag, &slba) in places.iter().enumerate() {
            let mut entry = SubmissionEntry::nvm(NvmOpcode::WRITE, NSID);
            entry.cdw10 = slba as u32;
            pair.submit(self.now, &entry, &data, tag as u64).expect("taken");
        }
        pair.commit();
        let mut ended = 0;
        self.until(|rig| {
            pair.poll_with(rig.now, |completion| {
                assert!(!completion.status.is_error());
                ended += 1;
            });
            (ended == places.len()).then_some(())
        });
    }

    /// Entries seen so far: slot and entry.
    fn entries(&self) -> Vec<(u32, UdmqEntry)> {
        let entry = |event: &Event| match event {
            Event::CdqEntry { slot, bytes, .. } => Some((*slot, UdmqEntry::read_from_bytes(bytes).expect("an entry"))),
            _ => None,
        };
        self.events.iter().filter_map(entry).collect()
    }

    fn count(&self, of: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().filter(|event| of(event)).count()
    }

    /// Arms the trigger at the next slot and has the guest write until it fires.
    fn fire(&mut self, owner: &mut CdqOwner, pair: &mut QueuePair, slot: u32) {
        let id = owner.id().expect("a live queue");
        let head = SubmissionEntry::set_cdq_feature(id, 0, Some(slot + 1));
        assert!(!self.admin(&head).status.is_error());
        self.write(pair, &[u64::from(slot) * 3]);
    }
}

fn is_event(event: &Event) -> bool {
    matches!(event, Event::AsyncEvent { dword0: 4, .. })
}

#[test]
fn a_driver_and_its_queues_work_through_the_bus() {
    let mut rig = Rig::new();
    let (mut owner, mut pair) = rig.tracked(8);
    rig.write(&mut pair, &[0, 9, 4]);
    let seen = rig.entries();
    let marks: Vec<_> = seen.iter().map(|(slot, entry)| (*slot, entry.esa(), entry.slba)).collect();
    assert_eq!(marks, [(0, Esa::FIRST, 0), (1, Esa::ORDINARY, 0), (2, Esa::ORDINARY, 9), (3, Esa::ORDINARY, 4)]);
    // Each once and in order, however often the ring wraps.
    let mut bytes = Vec::new();
    for turn in 0..20u64 {
        let taken = owner.take(8, &mut bytes) as u32;
        owner.give_back(&mut rig.manager, rig.now, taken).expect("given back");
        rig.until(|rig| {
            let _progress = owner.poll(&mut rig.manager, rig.now);
            owner.head_is_told().then_some(())
        });
        rig.write(&mut pair, &[turn * 5 + 1, turn * 7 + 100]);
    }
    owner.take(8, &mut bytes);
    let shown: Vec<u8> = rig.entries().iter().flat_map(|(_, entry)| zerocopy::IntoBytes::as_bytes(entry).to_vec()).collect();
    assert_eq!(shown, bytes);
    assert_eq!(rig.count(|event| matches!(event, Event::ManagementReset { .. })), 0);
    // Event requests are shown as well; their ends are events.
    let request = |command: &SubmissionEntry| command.admin_opcode() == AdminOpcode::ASYNC_EVENT_REQUEST;
    let asked = rig.count(|event| matches!(event, Event::Admin { command, .. } if !request(command)));
    assert_eq!(asked, rig.count(|event| matches!(event, Event::AdminEnded { .. })));
    assert!(asked > 20);
    // The manager's own I/O queues go past the bus, their doorbells through it; one that comes again begins anew.
    for _ in 0..2 {
        let ticket = rig.manager.create_queue_pair(rig.now, QueuePairConfig { entries: 8, vector: None }).expect("taken");
        let mut own = rig.until(|rig| rig.manager.queue_pair(&ticket)).expect("a queue pair");
        own.submit(rig.now, &SubmissionEntry::nvm(NvmOpcode::FLUSH, NSID), &[], 5).expect("taken");
        own.commit();
        let ended = rig.until(|rig| {
            let mut ended = None;
            own.poll_with(rig.now, |completion| ended = Some(completion));
            ended
        });
        assert!(!ended.status.is_error() && !ended.unknown);
        drop(own);
        (0..100).for_each(|_| rig.round());
    }
}

#[test]
fn events_are_lost_late_and_doubled() {
    let mut rig = Rig::new();
    let (mut owner, mut pair) = rig.tracked(32);
    rig.fire(&mut owner, &mut pair, 1);
    (0..20).for_each(|_| rig.round());
    assert_eq!(rig.count(is_event), 1);
    rig.bus.apply(BusFault::EventLost, rig.now);
    rig.fire(&mut owner, &mut pair, 2);
    (0..200).for_each(|_| rig.round());
    assert_eq!(rig.count(is_event), 1);
    assert_eq!(rig.bus.took(), [Fault::EventLost]);
    rig.bus.apply(BusFault::EventLate(300), rig.now);
    rig.fire(&mut owner, &mut pair, 3);
    (0..200).for_each(|_| rig.round());
    assert_eq!(rig.count(is_event), 1);
    assert!(rig.bus.next_due().is_some_and(|due| due > rig.now));
    (0..200).for_each(|_| rig.round());
    assert_eq!((rig.count(is_event), rig.bus.took()), (2, vec![Fault::EventLate]));
    rig.bus.apply(BusFault::EventDoubled, rig.now);
    rig.fire(&mut owner, &mut pair, 4);
    (0..20).for_each(|_| rig.round());
    assert_eq!((rig.count(is_event), rig.bus.took()), (4, vec![Fault::EventDoubled]));
    // Requests are still outstanding on both sides.
    for slot in 5..12 {
        rig.fire(&mut owner, &mut pair, slot);
        (0..20).for_each(|_| rig.round());
    }
    assert_eq!(rig.count(is_event), 11);
}

#[test]
fn entries_are_merged_before_anybody_sees_them() {
    let mut rig = Rig::new();
    let (mut owner, mut pair) = rig.tracked(32);
    rig.bus.apply(BusFault::MergeEntries, rig.now);
    rig.write(&mut pair, &[10, 400, 12]);
    assert_eq!(rig.bus.took(), [], "ranges that lie far apart are left alone");
    rig.write(&mut pair, &[20, 22]);
    assert_eq!(rig.bus.took(), [Fault::EntriesMerged]);
    let mut bytes = Vec::new();
    owner.take(32, &mut bytes);
    let (chunks, _) = bytes.as_chunks::<32>();
    let taken: Vec<_> = chunks.iter().map(|bytes| UdmqEntry::read_from_bytes(bytes).expect("an entry")).collect();
    let ranges: Vec<_> = taken.iter().skip(4).map(|entry| (entry.slba, entry.nlb)).collect();
    assert_eq!(ranges, [(20, 2), (20, 2)]);
    assert_eq!(rig.entries().into_iter().map(|(_, entry)| entry).collect::<Vec<_>>(), taken);
}

#[test]
fn slots_given_back_are_written_over_and_no_others() {
    let mut rig = Rig::new();
    let (mut owner, mut pair) = rig.tracked(8);
    let id = owner.id().expect("a live queue");
    let create = rig.events.iter().find_map(|event| match event {
        Event::Admin { command, .. } if command.admin_opcode() == AdminOpcode::CONTROLLER_DATA_QUEUE => Some(*command),
        _ => None,
    });
    let mut behind = Watch::new(rig.manager.space(), &create.expect("its creation"), id).expect("a queue");
    let ring = |rig: &Rig| (0..8).map(|slot| rig.bus.watches[0].entry(slot)).collect::<Vec<_>>();
    rig.write(&mut pair, &[0, 9, 4]);
    behind.look(0, false, &mut Vec::new());
    let before = ring(&rig);
    let mut bytes = Vec::new();
    assert_eq!(owner.take(2, &mut bytes), 2);
    // Taken is not given back: nothing happens.
    (0..20).for_each(|_| rig.round());
    assert_eq!(ring(&rig), before);
    owner.give_back(&mut rig.manager, rig.now, 2).expect("given back");
    rig.until(|rig| {
        let _progress = owner.poll(&mut rig.manager, rig.now);
        owner.head_is_told().then_some(())
    });
    let after = ring(&rig);
    // The first is a marker without a range. The next one was LBA 0.
    assert_eq!((after[0], &after[2..]), (before[0], &before[2..]));
    assert_eq!((after[1].slba, after[1].nlb, after[1].phase()), (1, 0, before[1].phase()));
    // A head that passes entries which the host has not copied: it reads what was written over them.
    assert!(!rig.admin(&SubmissionEntry::set_cdq_feature(id, 4, None)).status.is_error());
    bytes.clear();
    assert_eq!(owner.take(8, &mut bytes), 2, "they are as old or new as they were");
    let (chunks, _) = bytes.as_chunks::<32>();
    let late: Vec<_> = chunks.iter().map(|bytes| UdmqEntry::read_from_bytes(bytes).expect("an entry").slba).collect();
    assert_eq!(late, [0, 0]);
    assert_eq!(rig.entries().iter().map(|(_, entry)| entry.slba).collect::<Vec<_>>(), [0, 0, 9, 4], "oracles saw the right ones");
    // A head out of the queue is nobody's, and one that does not move gives nothing back.
    rig.write(&mut pair, &[20, 40, 60, 80, 100, 120]);
    let before = ring(&rig);
    rig.bus.watches[0].given_back(8);
    rig.bus.watches[0].given_back(4);
    assert_eq!(ring(&rig), before);
    // Who learns of a head after the controller has used its slots again leaves those alone: 0 and 1 of the four.
    behind.look(0, false, &mut Vec::new());
    behind.given_back(4);
    let after = ring(&rig);
    assert_eq!((&after[..2], &after[4..]), (&before[..2], &before[4..]));
    assert_eq!([2, 3].map(|slot: usize| after[slot].slba), [1, 1], "written over once more");
    let before = after;
    rig.bus.watches[0].given_back(6);
    let after = ring(&rig);
    assert_eq!([4, 5].map(|slot: usize| after[slot].slba), [0, 0]);
    assert_eq!([0, 1, 2, 3, 6, 7].map(|slot: usize| after[slot]), [0, 1, 2, 3, 6, 7].map(|slot: usize| before[slot]));
}

#[test]
fn admin_commands_fail_wait_and_never_end() {
    let mut rig = Rig::new();
    let flush = SubmissionEntry::identify(
        dray_nvme::identify::Cns::CONTROLLER_STATE_FORMATS,
        0,
        0,
        dray_nvme::identify::CommandSetId::NVM,
    );
    let identify = |rig: &mut Rig| {
        let ticket = rig.manager.request(rig.now, &flush, AdminData::In(4096)).expect("it is taken");
        let (began, answer) = (rig.now, rig.until(|rig| rig.manager.answer(ticket)));
        (answer.completion, rig.now.us_since(began))
    };
    let (plain, quick) = identify(&mut rig);
    assert!(!plain.status.is_error() && quick < 20);
    rig.bus.apply(BusFault::AdminFails(Status::INTERNAL_ERROR), rig.now);
    assert!(identify(&mut rig).0.status.is(Status::INTERNAL_ERROR));
    for _ in 0..8 {
        rig.bus.apply(BusFault::AdminSlow(500), rig.now);
        let (late, us) = identify(&mut rig);
        assert!(!late.status.is_error() && us >= 500, "{us} us");
    }
    assert_eq!(rig.bus.took().len(), 9);
    // Never answered: the driver asks for an abort, which names a command that is not there, and resets in the end.
    let before = rig.manager.generation();
    rig.bus.apply(BusFault::AdminNever, rig.now);
    assert!(identify(&mut rig).0.unknown);
    rig.until(|rig| rig.manager.is_ready().then_some(()));
    assert!(rig.manager.generation() > before);
    assert_eq!(rig.bus.took(), [Fault::AdminNever]);
    assert_eq!(rig.count(|event| matches!(event, Event::ManagementReset { .. })), 1);
    assert!(!identify(&mut rig).0.status.is_error());
}

#[test]
fn registers_fail_and_go_away_and_resets_are_seen() {
    let mut rig = Rig::new();
    let resets = |rig: &Rig| rig.count(|event| matches!(event, Event::ManagementReset { .. }));
    rig.bus.apply(BusFault::Fatal, rig.now);
    let before = rig.manager.generation();
    rig.until(|rig| (rig.manager.generation() != before && rig.manager.is_ready()).then_some(()));
    assert!(rig.bus.fatal_was_seen());
    assert_eq!(resets(&rig), 1);
    // Past the driver: its queues are gone, and it finds out by a command that does not end.
    rig.raw.write32(offset::CC, 0);
    rig.round();
    assert_eq!(resets(&rig), 2);
    let entry = SubmissionEntry::set_features(dray_nvme::feature::FeatureId::ARBITRATION, 0, false);
    let ticket = rig.manager.request(rig.now, &entry, AdminData::None).expect("it is taken");
    assert!(rig.until(|rig| rig.manager.answer(ticket)).completion.unknown);
    rig.until(|rig| rig.manager.is_ready().then_some(()));
    rig.bus.apply(BusFault::Gone(rig.now.after_us(30_000)), rig.now);
    rig.until(|rig| matches!(rig.manager.state(), DriverState::Failed(_)).then_some(()));
    assert!(rig.bus.gone_was_seen());
    assert_eq!(rig.bus.function().read64(offset::CAP), u64::MAX);
    (0..30_000).for_each(|_| rig.round());
    rig.manager.reset(rig.now);
    rig.until(|rig| rig.manager.is_ready().then_some(()));
}

#[test]
fn a_queue_whose_memory_is_given_up_is_told() {
    let unmapped = |event: &Event| matches!(event, Event::CdqUnmapped { cdqid: 0, .. });
    // The driver does not reach the controller any more: the queue cannot be deleted.
    let mut rig = Rig::new();
    let (mut owner, mut pair) = rig.tracked(8);
    rig.write(&mut pair, &[1]);
    rig.bus.apply(BusFault::Gone(rig.now.after_ms(1_000)), rig.now);
    rig.until(|rig| {
        // Looks at the registers only now and then.
        rig.now = rig.now.after_ms(1);
        matches!(rig.manager.state(), DriverState::Failed(_)).then_some(())
    });
    assert_eq!(rig.count(unmapped), 0, "its owner has the memory");
    let _progress = owner.poll(&mut rig.manager, rig.now);
    assert_eq!(owner.state(), CdqState::Gone(dray_driver::GoneReason::Reset), "for the owner there was a reset");
    drop(owner);
    rig.round();
    assert_eq!(rig.count(unmapped), 1);
    let before = rig.entries().len();
    rig.write(&mut pair, &[2]);
    assert_eq!(rig.entries().len(), before, "it goes nowhere");
    // One that is deleted goes by its deletion.
    let mut rig = Rig::new();
    let (owner, _pair) = rig.tracked(8);
    drop(owner);
    (0..50).for_each(|_| rig.round());
    assert_eq!(rig.count(unmapped), 0);
}
