//! Controller data queues between driver and controller: what is logged and when, markers, full, the trigger, lending.
#![allow(missing_docs)]

use dray_device::command::Completion;
use dray_device::poll::Poll;
use dray_device::space::MappedBuffer;
use dray_driver::{AdminData, CdqConfig, CdqFormat, CdqOptions, CdqOwner, CdqState, GoneReason, LentReader, QueuePair};
use dray_nvme::cdq::{Changed, Esa, QueueType, UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_nvme::command::{CopyRange0, DsmRange, SubmissionEntry};
use dray_nvme::status::Status;
use dray_tests::raw::{RawGuest, RawQueue};
use dray_tests::rig::{Front, HeldBacking, MANAGEMENT, MIGRATABLE, NSID, Side, World};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

const BLOCK: usize = 512;
const BYTES: u64 = 64 << 20;

/// A guest that writes, a manager that owns a queue of its changes.
struct Bench {
    world: World,
    manager: Front,
    guest: Front,
    pair: QueuePair,
    data: MappedBuffer,
    owner: CdqOwner,
}

fn config(slots: u32) -> CdqConfig {
    CdqConfig { kind: 0, cntlid: MIGRATABLE, slots, format: CdqFormat::UDMQ, arm_trigger: false }
}

impl Bench {
    fn new(seed: u64, slots: u32) -> Self {
        Self::over(seed, Side::memory(BYTES, BLOCK as u32), config(slots), CdqOptions::default())
    }

    /// With a queue that is live, and logs.
    fn over(seed: u64, side: Side, config: CdqConfig, options: CdqOptions) -> Self {
        let mut world = World::new(seed, vec![side]);
        let (mut manager, mut guest) = (world.front(0, MANAGEMENT), world.front(0, MIGRATABLE));
        let pair = guest.pair(&mut world, 256, None);
        let data = guest.memory(64 << 10);
        let owner = CdqOwner::create_with(&mut manager.driver, world.now, config, options).expect("a queue");
        let mut bench = Self { world, manager, guest, pair, data, owner };
        bench.wait("the queue", |bench| bench.owner.id());
        bench.log(true);
        bench
    }

    /// One round of everything.
    fn round(&mut self) {
        let Self { world, manager, guest, owner, .. } = self;
        world.round(|now| {
            let _progress = guest.driver.poll(now);
            let _progress = manager.driver.poll(now);
            while let Some(event) = manager.driver.next_event() {
                owner.on_event(&event);
            }
            let _progress = owner.poll(&mut manager.driver, now);
        });
    }

    #[track_caller]
    fn wait<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        // By the clock: one of the readers is another process.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while std::time::Instant::now() < end {
            self.round();
            if let Some(found) = done(self) {
                return found;
            }
        }
        panic!("{what}: nothing happened");
    }

    fn log(&mut self, start: bool) {
        let track = SubmissionEntry::track_send_log(start, self.owner.id().expect("live"));
        self.manager.ok(&mut self.world, &track);
    }

    /// New entries; they are given back.
    fn take(&mut self) -> Vec<UdmqEntry> {
        let entries = self.look();
        let Self { world, manager, owner, .. } = self;
        owner.give_back(&mut manager.driver, world.now, entries.len() as u32).expect("given back");
        self.wait("the head", |bench| bench.owner.head_is_told().then_some(()));
        entries
    }

    /// New entries; they are not given back.
    fn look(&mut self) -> Vec<UdmqEntry> {
        let mut bytes = Vec::new();
        self.owner.take(usize::MAX, &mut bytes);
        bytes.chunks(UDMQ_ENTRY_BYTES).map(|entry| UdmqEntry::read_from_bytes(entry).expect("an entry")).collect()
    }

    fn send(&mut self, entry: &SubmissionEntry, bytes: usize) {
        let piece = self.data.buffer().part(0, bytes.max(4)).expect("within the data");
        let pieces: &[_] = if bytes == 0 { &[] } else { &[piece] };
        self.pair.submit(self.world.now, entry, pieces, 0).expect("taken");
    }

    /// Runs a command and looks at the queue in the very moment at which its completion is there.
    #[track_caller]
    fn run(&mut self, entry: &SubmissionEntry, bytes: usize) -> (Completion, Vec<UdmqEntry>) {
        self.send(entry, bytes);
        self.pair.commit();
        let completion = self.wait("the command", |bench| bench.ended());
        (completion, self.look())
    }

    fn ended(&mut self) -> Option<Completion> {
        let mut ended = None;
        self.pair.poll_with(self.world.now, |completion| ended = Some(completion));
        ended
    }

    fn write(&mut self, slba: u64, blocks: u32) -> Vec<UdmqEntry> {
        let (completion, entries) = self.run(&SubmissionEntry::write(NSID, slba, blocks), blocks as usize * BLOCK);
        assert!(!completion.status.is_error(), "{completion:?}");
        entries
    }

    fn put(&self, bytes: &[u8]) {
        self.data.buffer().part(0, bytes.len()).expect("within the data").write(bytes);
    }
}

fn range(slba: u64, blocks: u64) -> Changed {
    Changed::Range { nsid: NSID, slba, blocks }
}

fn changes(entries: &[UdmqEntry]) -> Vec<Changed> {
    entries.iter().map(UdmqEntry::changed).collect()
}

fn marks(entries: &[UdmqEntry]) -> Vec<Esa> {
    entries.iter().map(UdmqEntry::esa).filter(|esa| *esa != Esa::ORDINARY).collect()
}

#[test]
fn each_change_is_there_when_its_completion_is() {
    let mut bench = Bench::new(1, 256);
    assert_eq!(marks(&bench.take()), [Esa::FIRST]);
    assert_eq!(changes(&bench.write(10, 8)), [range(10, 8)]);
    let (_, entries) = bench.run(&SubmissionEntry::write_zeroes(NSID, 1000, 3000, false), 0);
    assert_eq!(changes(&entries), [range(1000, 3000)]);
    let (_, entries) = bench.run(&SubmissionEntry::write_uncorrectable(NSID, 5000, 3), 0);
    assert_eq!(changes(&entries), [range(5000, 3)]);
    bench.put(CopyRange0 { slba: 10, nlb: 3, ..Default::default() }.as_bytes());
    let (completion, entries) = bench.run(&SubmissionEntry::copy(NSID, 6000, 1), 32);
    assert_eq!((completion.status, changes(&entries)), (Status::SUCCESS, vec![range(6000, 4)]), "the target, not the source");
    let ranges = [(8000u64, 7u32), (9000, 1)].map(|(slba, length)| DsmRange { slba, length, ..Default::default() });
    bench.put(ranges.as_bytes());
    let (_, entries) = bench.run(&SubmissionEntry::dsm(NSID, 2), 32);
    assert_eq!(changes(&entries), [range(8000, 7), range(9000, 1)]);
    assert!(entries.iter().all(|entry| entry.lbamqa.dlba()), "deallocated");
    // What changes nothing is not logged; nor is what the manager writes.
    for entry in [SubmissionEntry::read(NSID, 0, 8), SubmissionEntry::flush(NSID), SubmissionEntry::verify(NSID, 0, 64)] {
        let bytes = if entry.nvm_opcode() == dray_nvme::command::NvmOpcode::READ { 4096 } else { 0 };
        assert!(bench.run(&entry, bytes).1.is_empty(), "{entry:?}");
    }
    let mut pair = bench.manager.pair(&mut bench.world, 8, None);
    let own = bench.manager.memory(4096);
    let Bench { world, manager, .. } = &mut bench;
    world.run(manager, &mut pair, &SubmissionEntry::write(NSID, 0, 8), &[own.buffer().segment()]);
    assert!(bench.look().is_empty());
    // Neighbours of one batch are one entry, in whatever order; others are not.
    for slba in [100, 101, 102, 99, 200, 104] {
        bench.send(&SubmissionEntry::write(NSID, slba, 1), BLOCK);
    }
    bench.pair.commit();
    let mut count = 0;
    bench.wait("six writes", |bench| {
        bench.pair.poll_with(bench.world.now, |_| count += 1);
        (count == 6).then_some(())
    });
    assert_eq!(changes(&bench.look()), [range(99, 4), range(200, 1), range(104, 1)]);
    bench.log(false);
    assert_eq!(marks(&bench.look()), [Esa::STOPPED]);
    assert!(bench.write(0, 1).is_empty(), "not logged any more");
    bench.log(false);
    assert!(bench.look().is_empty(), "stopped already");
}

#[test]
fn what_failed_and_what_a_reset_abandoned_is_logged_when_the_backing_has_ended() {
    let (backing, hold) = HeldBacking::new(BYTES, BLOCK as u32);
    let mut bench = Bench::over(2, Side::over(Box::new(backing)), config(64), CdqOptions::default());
    bench.take();
    hold.fail_with(Some(Status::WRITE_FAULT));
    let (completion, entries) = bench.run(&SubmissionEntry::write(NSID, 40, 4), 4 * BLOCK);
    assert!(completion.status.is(Status::WRITE_FAULT));
    assert_eq!(changes(&entries), [range(40, 4)], "a failed write has touched the media");
    hold.fail_with(None);
    hold.shut();
    for slba in [300, 400, 500] {
        bench.send(&SubmissionEntry::write(NSID, slba, 2), 2 * BLOCK);
    }
    bench.pair.commit();
    bench.wait("three writes under way", |_| (hold.waiting() == 3).then_some(()));
    bench.guest.driver.reset(bench.world.now);
    for _ in 0..300 {
        bench.round();
        assert!(!bench.guest.driver.is_ready(), "a reset ends when nothing of before can touch media or memory any more");
    }
    assert!(bench.look().is_empty(), "they have not ended");
    // Suspend waits for them, and they come before its mark.
    let suspend = SubmissionEntry::suspend(MIGRATABLE, false, false);
    let ticket = bench.manager.driver.request(bench.world.now, &suspend, AdminData::None).expect("sent");
    for _ in 0..300 {
        bench.round();
        assert!(bench.manager.driver.answer(ticket).is_none(), "suspended while the backing is at work");
    }
    hold.open();
    bench.wait("Suspend", |bench| bench.manager.driver.answer(ticket));
    let entries = bench.look();
    assert_eq!(changes(&entries[..3]), [range(300, 2), range(400, 2), range(500, 2)]);
    assert_eq!(marks(&entries), [Esa::SUSPENDED]);
    bench.manager.ok(&mut bench.world, &SubmissionEntry::resume(MIGRATABLE));
    assert_eq!(marks(&bench.look()), [Esa::FIRST], "logging goes on with Resume");
    bench.wait("the reset", |bench| {
        bench.pair.poll_with(bench.world.now, |completion| assert!(completion.unknown));
        bench.guest.driver.is_ready().then_some(())
    });
}

#[test]
fn a_full_queue_ends_the_log_and_says_so_once() {
    for slots in [3, 8, 33] {
        let mut bench = Bench::new(u64::from(slots), slots);
        for i in 0..u64::from(slots) * 2 {
            bench.write_unseen(i * 10);
        }
        bench.wait("the event", |bench| bench.owner.full_reported().then_some(()));
        let entries = bench.take();
        assert_eq!(entries.len(), slots as usize - 1, "one slot stays free");
        assert_eq!(marks(&entries), [Esa::FIRST, Esa::FULL]);
        let told: Vec<_> = (0..u64::from(slots) - 2).map(|i| range(i * 10, 1)).collect();
        assert_eq!(changes(&entries[1..]), told, "every entry before the end is true, the last one included");
        bench.write_unseen(7);
        assert!(bench.look().is_empty(), "the log has a hole until it is started again");
        bench.log(true);
        bench.write_unseen(9);
        let entries = bench.take();
        assert_eq!(changes(&entries[1..]), [range(9, 1)]);
        // Of three slots one is FIRST's and one stays free: the first change is the last.
        let expected: &[Esa] = if slots == 3 { &[Esa::FIRST, Esa::FULL] } else { &[Esa::FIRST] };
        assert_eq!(marks(&entries), expected);
    }
}

impl Bench {
    /// A write whose entry nobody looks at yet.
    fn write_unseen(&mut self, slba: u64) {
        self.send(&SubmissionEntry::write(NSID, slba, 1), BLOCK);
        self.pair.commit();
        self.wait("a write", |bench| bench.ended());
    }
}

#[test]
fn a_long_queue_wraps_in_one_range_or_in_a_chained_prp_list() {
    // 70,000 slots are 547 pages: more than one page of a list names.
    for (prp_list, slots) in [(false, 100), (true, 100), (true, 70_000)] {
        let options = CdqOptions { prp_list, ..CdqOptions::default() };
        let mut bench = Bench::over(3, Side::memory(BYTES, BLOCK as u32), config(slots), options);
        bench.take();
        let count = u64::from(slots) * 5 / 4 + 300;
        let (mut sent, mut seen) = (0, Vec::new());
        let place = |i: u64| i * 3 % 120_000;
        while (seen.len() as u64) < count {
            for _ in 0..40 {
                if sent < count {
                    bench.send(&SubmissionEntry::write(NSID, place(sent), 1), BLOCK);
                    sent += 1;
                }
            }
            bench.pair.commit();
            let mut ended = 0;
            bench.wait("a batch", |bench| {
                bench.pair.poll_with(bench.world.now, |_| ended += 1);
                (bench.pair.outstanding() == 0).then_some(())
            });
            seen.extend(changes(&bench.take()));
        }
        let expected: Vec<_> = (0..count).map(|i| range(place(i), 1)).collect();
        assert!(seen == expected, "{slots} slots, list {prp_list}");
        assert!(!bench.owner.full_reported());
    }
}

#[test]
fn the_trigger_wakes_a_sleeper_once_and_is_armed_again() {
    let armed = CdqConfig { arm_trigger: true, ..config(16) };
    // The slow timer is far away: only the trigger can wake.
    let options = CdqOptions { slow_poll_us: 60_000_000, ..CdqOptions::default() };
    let mut bench = Bench::over(4, Side::memory(BYTES, BLOCK as u32), armed, options);
    let line = bench.owner.event_line().clone();
    for round in 0..40 {
        bench.take();
        let _before = line.take();
        let id = bench.owner.id().expect("live");
        let get = SubmissionEntry::get_cdq_feature(id);
        let trigger = bench.wait_for_trigger(&get);
        assert_eq!(trigger, (round + 2) % 16, "armed behind the head");
        assert_eq!(line.take(), 0, "nothing has come yet");
        bench.write_unseen(round as u64 * 10);
        bench.wait("the eventfd", |_| (line.take() > 0).then_some(()));
        let answer = page_and_result(&mut bench.manager, &mut bench.world, &get);
        assert_eq!(answer.1 >> 31, 0, "one-shot: it is disarmed");
        assert_eq!(bench.owner.waiting(), 1);
    }
    // Without a trigger the slow timer looks, for a reader that sleeps.
    let options = CdqOptions { slow_poll_us: 500, ..CdqOptions::default() };
    let mut bench = Bench::over(5, Side::memory(BYTES, BLOCK as u32), armed, options);
    bench.take();
    bench.write_unseen(3);
    let line = bench.owner.event_line().clone();
    bench.wait("the eventfd", |_| (line.take() > 0).then_some(()));
}

impl Bench {
    /// Waits until the trigger is armed; the slot.
    fn wait_for_trigger(&mut self, get: &SubmissionEntry) -> u32 {
        for _ in 0..1_000 {
            for _ in 0..20 {
                self.round();
            }
            let (data, result) = page_and_result(&mut self.manager, &mut self.world, get);
            if result >> 31 == 1 {
                return u32::from_le_bytes([data[4], data[5], data[6], data[7]]);
            }
        }
        panic!("the trigger is never armed");
    }
}

/// An admin command that returns eight bytes: those, and its result.
#[track_caller]
fn page_and_result(front: &mut Front, world: &mut World, entry: &SubmissionEntry) -> (Vec<u8>, u64) {
    let answer = front.admin(world, entry, AdminData::In(8));
    assert!(!answer.completion.status.is_error(), "{}", answer.completion.status);
    (answer.data, answer.completion.result)
}

#[test]
fn bad_commands_get_the_specified_status() {
    let side = Side::memory(BYTES, BLOCK as u32).and_controller(3, vec![NSID]);
    let most = side.config.max_cdq_bytes;
    let mut world = World::new(6, vec![side]);
    let mut manager = RawGuest::new(&world, 0, MANAGEMENT);
    let mut admin = manager.enable(&mut world);
    let mut guest = RawGuest::new(&world, 0, MIGRATABLE);
    let mut guest_admin = guest.enable(&mut world);
    let ring = manager.pages(8192);
    let (at, list) = (manager.address(ring), manager.pages(4096));
    let create = |kind, cntlid, pc, dwords, prp| SubmissionEntry::create_cdq(QueueType(kind), cntlid, pc, dwords, prp);
    let mut lact = SubmissionEntry::track_send_log(true, 0);
    lact.cdw10 |= 3 << 16;
    let feature = |id, head, trigger| SubmissionEntry::set_cdq_feature(id, head, trigger);
    let mut saved = feature(0, 0, None);
    saved.cdw10 |= 1 << 31;
    manager.memory.arena().write(list, &(at + 8).to_le_bytes());
    let list = manager.address(list);
    let before = [
        (create(0, 77, true, 64, at), Status::INVALID_CONTROLLER_ID),
        (create(0, MANAGEMENT, true, 64, at), Status::INVALID_CONTROLLER_ID),
        (create(1, MIGRATABLE, true, 64, at), Status::INVALID_FIELD),
        (create(0, MIGRATABLE, true, 0, at), Status::INVALID_FIELD),
        (create(0, MIGRATABLE, true, 4, at), Status::INVALID_FIELD),
        (create(0, MIGRATABLE, true, 68, at), Status::INVALID_FIELD),
        (create(0, MIGRATABLE, true, !7, at), Status::NOT_ENOUGH_RESOURCES),
        (create(0, MIGRATABLE, true, (most / 4 + 8) as u32, at), Status::NOT_ENOUGH_RESOURCES),
        (create(0, MIGRATABLE, true, 64, at + 32), Status::PRP_OFFSET_INVALID),
        (create(0, MIGRATABLE, true, 64, 0x7000), Status::DATA_TRANSFER_ERROR),
        (create(0, MIGRATABLE, true, 1 << 22, at), Status::DATA_TRANSFER_ERROR),
        (create(0, MIGRATABLE, false, 64, list), Status::PRP_OFFSET_INVALID),
        (create(0, MIGRATABLE, false, 64, list + 8), Status::PRP_OFFSET_INVALID),
        (SubmissionEntry::delete_cdq(0), Status::INVALID_CDQ),
        (SubmissionEntry::track_send_log(true, 0), Status::INVALID_CDQ),
        (feature(0, 0, None), Status::INVALID_CDQ),
        (SubmissionEntry::get_cdq_feature(0), Status::INVALID_CDQ),
        (SubmissionEntry { cdw10: 2, ..SubmissionEntry::delete_cdq(0) }, Status::INVALID_FIELD),
    ];
    let after = [
        (create(0, MIGRATABLE, true, 64, at), Status::INVALID_FIELD),
        (create(0, 3, true, 64, at + 4096), Status::SUCCESS),
        (lact, Status::INVALID_FIELD),
        (saved, Status::FEATURE_NOT_SAVEABLE),
        (feature(0, 1, None), Status::INVALID_FIELD),
        (feature(0, 0, Some(8)), Status::INVALID_FIELD),
        (feature(0, 0, Some(7)), Status::SUCCESS),
        (SubmissionEntry::track_send_log(false, 0), Status::SUCCESS),
        (SubmissionEntry::track_send_log(true, 0), Status::SUCCESS),
        (SubmissionEntry::track_send_log(true, 0), Status::INVALID_CDQ),
        // FIRST is in slot 0: the head may move behind it and no further, and not back.
        (feature(0, 2, None), Status::INVALID_FIELD),
        (feature(0, 8, None), Status::INVALID_FIELD),
        (feature(0, 1, None), Status::SUCCESS),
        (feature(0, 0, None), Status::INVALID_FIELD),
        (SubmissionEntry::suspend(MIGRATABLE, false, false), Status::SUCCESS),
        (SubmissionEntry::track_send_log(false, 0), Status::CONTROLLER_SUSPENDED),
        (SubmissionEntry::resume(MIGRATABLE), Status::SUCCESS),
        (SubmissionEntry::resume(MIGRATABLE), Status::CONTROLLER_NOT_SUSPENDED),
        (SubmissionEntry::suspend(MIGRATABLE, false, true), Status::SUCCESS),
        (feature(0, 1, None), Status::INVALID_CDQ),
        (SubmissionEntry::delete_cdq(1), Status::SUCCESS),
        (SubmissionEntry::delete_cdq(1), Status::INVALID_CDQ),
    ];
    let ok = (create(0, MIGRATABLE, true, 64, at), Status::SUCCESS);
    for (entry, status) in before.into_iter().chain([ok]).chain(after) {
        let done = manager.run(&mut world, &mut admin, &entry);
        assert!(done.status().is(status), "{entry:?}: {done:?}, not {status}");
        // None of it is a migratable controller's.
        if !matches!(entry.admin_opcode().0, 0x09 | 0x0a) {
            let done = run_unless_suspended(&guest, &mut world, &mut guest_admin, &entry);
            assert!(done.is_none_or(|done| done.is(Status::INVALID_OPCODE)), "{entry:?}: {done:?} at the guest's");
        }
    }
}

/// A command's status; `None` if it is not fetched.
fn run_unless_suspended(guest: &RawGuest, world: &mut World, admin: &mut RawQueue, entry: &SubmissionEntry) -> Option<Status> {
    guest.push(admin, entry);
    guest.ring(admin);
    world.rounds(20);
    let done = guest.pop(admin)?;
    guest.ring_head_with(0, admin.head);
    Some(done.status())
}

#[test]
fn dropping_the_owner_or_resetting_the_manager_deletes_the_queue() {
    let bench = Bench::new(7, 16);
    let id = bench.owner.id().expect("live");
    let Bench { mut world, mut manager, owner, .. } = bench;
    let get = SubmissionEntry::get_cdq_feature(id);
    assert!(!manager.admin(&mut world, &get, AdminData::In(8)).completion.status.is_error());
    drop(owner);
    for _ in 0..50 {
        world.round(|now| manager.driver.poll(now).work);
    }
    assert!(manager.status(&mut world, &get).is(Status::INVALID_CDQ), "deleted");
    // One that was still being created, too.
    drop(CdqOwner::create(&mut manager.driver, world.now, config(16)).expect("begun"));
    for _ in 0..50 {
        world.round(|now| manager.driver.poll(now).work);
    }
    assert!(manager.status(&mut world, &get).is(Status::INVALID_CDQ));
    let mut owner = CdqOwner::create(&mut manager.driver, world.now, config(16)).expect("begun");
    world.wait("the queue", |now| {
        let _progress = manager.driver.poll(now);
        let _progress = owner.poll(&mut manager.driver, now);
        owner.id()
    });
    manager.driver.reset(world.now);
    manager.ready(&mut world);
    let _progress = owner.poll(&mut manager.driver, world.now);
    assert_eq!(owner.state(), CdqState::Gone(GoneReason::Reset));
    assert!(manager.status(&mut world, &get).is(Status::INVALID_CDQ));
    // A second queue for one controller is refused, and the owner says so.
    let mut first = CdqOwner::create(&mut manager.driver, world.now, config(16)).expect("begun");
    let mut second = CdqOwner::create(&mut manager.driver, world.now, config(16)).expect("begun");
    let status = world.wait("the refusal", |now| {
        let _progress = manager.driver.poll(now);
        let _progress = first.poll(&mut manager.driver, now);
        let _progress = second.poll(&mut manager.driver, now);
        match second.state() {
            CdqState::Gone(GoneReason::NotCreated(status)) => Some(status),
            _ => None,
        }
    });
    assert!(status.is(Status::INVALID_FIELD) && first.id().is_some());
}

/// Set in the process that reads a lent queue: how many entries it gives back.
const READER: &str = "DRAY_TEST_LENT_READER";

/// The second process: reads until logging has stopped, says what it saw, and goes.
fn read_lent_queue(give_back: usize) {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("the socket");
    let mut reader = LentReader::open(socket).expect("a lent queue");
    let (mut given, mut stopped) = (0, false);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !stopped {
        assert!(Instant::now() < deadline, "the log never ends");
        let mut bytes = Vec::new();
        if reader.take(64, &mut bytes) == 0 {
            let mut line = [rustix::event::PollFd::new(reader.event_line(), rustix::event::PollFlags::IN)];
            let wait = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            rustix::event::poll(&mut line, Some(&wait)).expect("poll");
            let _signals = reader.event_line().take();
        }
        for entry in bytes.chunks(UDMQ_ENTRY_BYTES) {
            let entry = UdmqEntry::read_from_bytes(entry).expect("an entry");
            println!("entry {} {} {}", entry.esa().0, entry.slba, u64::from(entry.nlb) + 1);
            stopped |= entry.esa() == Esa::STOPPED;
            if given < give_back {
                given += 1;
                reader.give_back(1).expect("given back");
            }
        }
    }
}

fn start_reader(bench: &mut Bench, test: &str, give_back: usize) -> Child {
    let socket = bench.owner.lend().expect("lent").into_socket();
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", test, "--nocapture"]).env(READER, give_back.to_string());
    command.stdin(Stdio::from(socket)).stdout(Stdio::piped()).spawn().expect("a second process")
}

#[test]
fn a_lent_queue_is_read_by_another_process() {
    if let Ok(count) = std::env::var(READER) {
        return read_lent_queue(count.parse().expect("a number"));
    }
    let mut bench = Bench::new(8, 64);
    let test = "a_lent_queue_is_read_by_another_process";
    let mut child = start_reader(&mut bench, test, 495);
    assert!(bench.owner.lend().is_err() && bench.look().is_empty(), "lent is lent");
    // More than the queue holds: slots come back through the reader.
    let mut written = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    let ended = loop {
        assert!(Instant::now() < deadline, "the reader never ends");
        if written < 500 && bench.owner.waiting() < 40 {
            bench.write_unseen(written * 7);
            written += 1;
            if written == 500 {
                bench.log(false);
            }
        }
        bench.round();
        if let Some(status) = child.try_wait().expect("the reader") {
            break status;
        }
    };
    let output = child.wait_with_output().expect("the reader's words");
    assert!(ended.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    let seen: Vec<&str> = text.lines().filter_map(|line| line.find("entry ").map(|at| &line[at..])).collect();
    let expected = (0..500).map(|i| format!("entry 0 {} 1", i * 7));
    let expected: Vec<_> = ["entry 1 0 1".into()].into_iter().chain(expected).chain(["entry 2 0 1".into()]).collect();
    assert_eq!(seen, expected);
    assert!(!bench.owner.full_reported());
    // The reader had seven that it did not give back: they are the owner's again.
    bench.wait("the end of the loan", |bench| (!bench.owner.is_lent()).then_some(()));
    let entries = bench.take();
    assert_eq!((entries.len(), entries[0].slba), (7, 494 * 7));
    assert_eq!(entries[6].esa(), Esa::STOPPED);
}
