//! Suspend, controller state out and in, Resume: a guest's queues carry on at another subsystem. Fences and memory tracking.
#![allow(missing_docs)]

use dray_controller::VENDOR_UUID;
use dray_device::command::Completion;
use dray_device::poll::Poll;
use dray_device::slot::Fence;
use dray_driver::mmc::{self, MmcError, StateReader, StateSelection, StateWriter};
use dray_driver::{AdminData, CdqConfig, CdqFormat, CdqOwner, DriverConfig, DriverError, QueuePair};
use dray_nvme::cdq::{Esa, UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_nvme::command::{FeatureSelect, GetControllerStateDw0, SequenceIndicator, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::registers::offset;
use dray_nvme::status::Status;
use dray_nvme::track::{TrackReceiveHeader, parse_track_receive};
use dray_tests::rig::{Front, HeldBacking, MANAGEMENT, MIGRATABLE, NSID, Side, World, pattern};
use zerocopy::FromBytes;

const BLOCK: usize = 512;
const BYTES: u64 = 4 << 20;

/// A source and a destination with their managers, and a guest at the source.
struct Pair {
    world: World,
    source: Front,
    destination: Front,
    guest: Front,
    fence: Fence,
    select: StateSelection,
}

impl Pair {
    fn new(seed: u64) -> Self {
        Self::over(seed, Side::memory(BYTES, BLOCK as u32))
    }

    fn over(seed: u64, source: Side) -> Self {
        let sides = vec![source, Side::memory(BYTES, BLOCK as u32)];
        let fence = sides[0].fence(MIGRATABLE);
        let mut world = World::new(seed, sides);
        let (mut source, destination) = (world.front(0, MANAGEMENT), world.front(1, MANAGEMENT));
        let guest = world.front_with(0, MIGRATABLE, DriverConfig { admin_entries: 8, ..DriverConfig::default() });
        let query = mmc::state_formats(&mut source.driver, world.now).expect("sent");
        let formats = world.wait("the state formats", |now| {
            let _progress = source.driver.poll(now);
            query.poll(&mut source.driver)
        });
        let formats = formats.expect("formats");
        let (csvi, csuuidi) = (formats.csvi_of(0), formats.csuuidi_of(&VENDOR_UUID));
        assert!(csvi > 0 && csuuidi > 0, "the version and the vendor part are known");
        Self { world, source, destination, guest, fence, select: StateSelection { cntlid: MIGRATABLE, csvi, csuuidi } }
    }

    fn suspend(&mut self) {
        self.source.ok(&mut self.world, &SubmissionEntry::suspend(MIGRATABLE, false, false));
    }

    fn state(&mut self) -> mmc::StateBytes {
        let Self { world, source, select, .. } = self;
        let mut reader = StateReader::new(*select, 1 << 20);
        let state = world.wait("the state", |now| {
            let _progress = source.driver.poll(now);
            reader.poll(&mut source.driver, now)
        });
        state.expect("a state")
    }

    fn set_state(&mut self, bytes: Vec<u8>) -> Result<(), MmcError> {
        let Self { world, destination, select, .. } = self;
        let mut writer = StateWriter::new(*select, bytes);
        world.wait("the state's way in", |now| {
            let _progress = destination.driver.poll(now);
            writer.poll(&mut destination.driver, now)
        })
    }

    /// Points the guest's slot at the destination, which is suspended.
    fn move_slot(&mut self) {
        self.destination.ok(&mut self.world, &SubmissionEntry::suspend(MIGRATABLE, false, false));
        self.guest.slot.point_at(&self.world.subsystems[1].plug(MIGRATABLE).expect("a controller"));
        self.world.rounds(5);
    }

    fn resume(&mut self) {
        self.destination.ok(&mut self.world, &SubmissionEntry::resume(MIGRATABLE));
    }

    /// Everything from Suspend to Resume.
    fn switch(&mut self) {
        self.suspend();
        let state = self.state();
        assert!(state.suspended && state.suspended_throughout);
        self.fence.raise();
        self.move_slot();
        self.set_state(state.bytes).expect("the state is taken");
        self.resume();
    }
}

/// A guest's load: writes of known content, each ended once.
struct Load {
    pair: QueuePair,
    data: dray_device::space::MappedBuffer,
    sent: u64,
    ended: Vec<bool>,
}

impl Load {
    fn new(pair: QueuePair, guest: &Front) -> Self {
        let data = guest.memory(256 * BLOCK);
        Self { pair, data, sent: 0, ended: Vec::new() }
    }

    /// Sends writes, each to its own block.
    fn send(&mut self, world: &World, count: u64) {
        for _ in 0..count {
            let at = self.sent as usize % 256 * BLOCK;
            let piece = self.data.buffer().part(at, BLOCK).expect("a block");
            piece.write(&pattern(self.sent, BLOCK));
            self.pair.submit(world.now, &SubmissionEntry::write(NSID, self.sent, 1), &[piece], self.sent).expect("taken");
            self.sent += 1;
            self.ended.push(false);
        }
        self.pair.commit();
    }

    fn poll(&mut self, now: dray_device::poll::Time) {
        let ended = &mut self.ended;
        self.pair.poll_with(now, |completion: Completion| {
            assert!(!completion.status.is_error() && !completion.unknown, "{completion:?}");
            assert!(!std::mem::replace(&mut ended[completion.tag as usize], true), "{} ends twice", completion.tag);
        });
    }

    fn is_done(&self) -> bool {
        self.ended.iter().all(|&ended| ended)
    }
}

#[test]
fn queues_carry_on_wherever_they_stood() {
    // Admin and I/O queues of 8 entries are suspended at every place, in both phases.
    for before in 0..20u64 {
        let mut pair = Pair::new(before);
        let io = pair.guest.pair(&mut pair.world, 8, Some(1));
        let mut load = Load::new(io, &pair.guest);
        let get = SubmissionEntry::get_features(FeatureId::INTERRUPT_COALESCING, FeatureSelect::CURRENT, 0);
        pair.guest.ok(&mut pair.world, &SubmissionEntry::set_features(FeatureId::INTERRUPT_COALESCING, 0x0203, false));
        for _ in 0..before {
            pair.guest.ok(&mut pair.world, &get);
            load.send(&pair.world, 1);
            pair.world.wait("a write", |now| {
                load.poll(now);
                load.is_done().then_some(())
            });
        }
        // On the way when Suspend comes; some not fetched, completions unread.
        load.send(&pair.world, before % 8);
        pair.switch();
        pair.world.wait("what was under way", |now| {
            let _progress = pair.guest.driver.poll(now);
            load.poll(now);
            load.is_done().then_some(())
        });
        for _ in 0..40 {
            load.send(&pair.world, 1 + load.sent % 7);
            pair.world.wait("a write at the destination", |now| {
                let _progress = pair.guest.driver.poll(now);
                load.poll(now);
                load.is_done().then_some(())
            });
        }
        assert_eq!(pair.guest.ok(&mut pair.world, &get), 0x0203, "features come along");
        assert_eq!(pair.guest.driver.last_failure(), None);
        // New queues, and what the driver asks for, are the destination's.
        let mut second = pair.guest.pair(&mut pair.world, 16, None);
        let data = pair.guest.memory(BLOCK);
        let read = SubmissionEntry::read(NSID, load.sent - 1, 1);
        pair.world.run(&mut pair.guest, &mut second, &read, &[data.buffer().part(0, BLOCK).expect("a block")]);
        let mut back = vec![0; BLOCK];
        data.buffer().part(0, BLOCK).expect("a block").read(&mut back);
        assert_eq!(back, pattern(load.sent - 1, BLOCK));
    }
}

#[test]
fn doorbells_rung_in_between_and_events_that_wait_come_along() {
    let mut pair = Pair::new(50);
    let io = pair.guest.pair(&mut pair.world, 16, None);
    let mut load = Load::new(io, &pair.guest);
    load.send(&pair.world, 3);
    pair.world.rounds(5);
    pair.suspend();
    // Suspended: rung and not fetched. The admin queue's event requests stay where they are.
    load.send(&pair.world, 2);
    let fetched = pair.world.counters(0, MIGRATABLE).fetched;
    pair.world.rounds(50);
    assert_eq!(pair.world.counters(0, MIGRATABLE).fetched, fetched);
    let state = pair.state();
    load.send(&pair.world, 2);
    pair.move_slot();
    load.send(&pair.world, 1);
    pair.set_state(state.bytes).expect("the state is taken");
    pair.world.rounds(50);
    load.poll(pair.world.now);
    assert_eq!(load.ended.iter().filter(|&&ended| ended).count(), 3, "nothing before Resume");
    pair.resume();
    pair.world.wait("all of them", |now| {
        let _progress = pair.guest.driver.poll(now);
        load.poll(now);
        load.is_done().then_some(())
    });
    // An event at the destination completes a request that the guest made at the source.
    let mut protect = SubmissionEntry::set_features(FeatureId::NAMESPACE_WRITE_PROTECT, 1, false);
    protect.nsid = NSID;
    pair.destination.ok(&mut pair.world, &protect);
    pair.world.wait("the event", |now| {
        let _progress = pair.guest.driver.poll(now);
        pair.guest.driver.next_event()
    });
}

#[test]
fn a_reset_between_suspend_and_resume_is_the_destinations() {
    for whole_function in [false, true] {
        let mut pair = Pair::new(60);
        let io = pair.guest.pair(&mut pair.world, 16, None);
        let mut load = Load::new(io, &pair.guest);
        load.send(&pair.world, 3);
        pair.world.rounds(5);
        pair.suspend();
        let state = pair.state();
        pair.fence.raise();
        pair.move_slot();
        let before = pair.world.counters(0, MIGRATABLE);
        pair.set_state(state.bytes).expect("the state is taken");
        if whole_function {
            pair.guest.driver.function().reset().expect("a function-level reset");
        }
        pair.guest.driver.reset(pair.world.now);
        for _ in 0..20 {
            pair.world.round(|now| pair.guest.driver.poll(now).work);
        }
        pair.resume();
        pair.guest.ready(&mut pair.world);
        let mut io = pair.guest.pair(&mut pair.world, 16, None);
        assert!(!pair.world.run(&mut pair.guest, &mut io, &SubmissionEntry::flush(NSID), &[]).status.is_error());
        assert_eq!(pair.world.counters(0, MIGRATABLE), before, "the source has nothing to do with it");
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_leaves_nothing() {
    let mut pair = Pair::new(70);
    let io = pair.guest.pair(&mut pair.world, 16, Some(2));
    let mut load = Load::new(io, &pair.guest);
    load.send(&pair.world, 5);
    pair.world.rounds(5);
    assert!(matches!(pair.set_state(vec![0; 64]), Err(MmcError::Driver(DriverError::Refused { .. }))), "not suspended");
    pair.suspend();
    let state = pair.state().bytes;
    pair.move_slot();
    let mut random = fastrand::Rng::with_seed(70);
    let mut refused = 0;
    for round in 0..400 {
        let mut damaged = state.clone();
        match round % 4 {
            0 => damaged.truncate(random.usize(0..state.len()) & !3),
            1 => damaged.extend_from_slice(&[0; 8]),
            _ => (0..4).for_each(|_| damaged[random.usize(0..state.len())] = random.u8(..)),
        }
        refused += u32::from(pair.set_state(damaged).is_err());
    }
    assert!(refused >= 200, "{refused} of 400 were refused");
    pair.set_state(state).expect("the right one is taken");
    pair.resume();
    pair.world.wait("what was under way", |now| {
        load.poll(now);
        load.is_done().then_some(())
    });
}

#[test]
fn pieces_of_a_state_never_mix_and_a_refused_piece_ends_the_sequence() {
    let mut pair = Pair::new(80);
    let mut io = pair.guest.pair(&mut pair.world, 16, None);
    let StateSelection { cntlid, csvi, csuuidi } = pair.select;
    let get = |offset, dwords| SubmissionEntry::get_controller_state(csvi, cntlid, csuuidi, offset, dwords);
    let read = |pair: &mut Pair, offset: u64, len: usize| {
        let answer = pair.source.admin(&mut pair.world, &get(offset, (len / 4) as u32), AdminData::In(len));
        assert!(!answer.completion.status.is_error());
        (answer.data, GetControllerStateDw0::from_bits(answer.completion.result as u32).csup())
    };
    let (_, csup) = read(&mut pair, 0, 48);
    assert!(!csup, "active");
    // The queue moves on, then the controller is suspended: the rest is the suspended controller's.
    for _ in 0..3 {
        pair.world.run(&mut pair.guest, &mut io, &SubmissionEntry::flush(NSID), &[]);
    }
    pair.suspend();
    let (rest, csup) = read(&mut pair, 48, 64);
    let (whole, _) = read(&mut pair, 0, 112);
    assert!(csup);
    assert_eq!(rest, whole[48..], "bytes from before Suspend");
    // Resumed and suspended again between two pieces.
    pair.source.ok(&mut pair.world, &SubmissionEntry::resume(MIGRATABLE));
    for _ in 0..3 {
        pair.world.run(&mut pair.guest, &mut io, &SubmissionEntry::flush(NSID), &[]);
    }
    pair.suspend();
    let (rest, _) = read(&mut pair, 48, 64);
    let (whole, _) = read(&mut pair, 0, 112);
    assert_eq!(rest, whole[48..], "bytes from before Resume");

    refused_pieces(pair, io);
}

#[test]
fn a_state_read_while_a_controller_runs_dry_is_not_mixed_with_the_suspended_ones() {
    let (backing, hold) = HeldBacking::new(BYTES, BLOCK as u32);
    let mut pair = Pair::over(81, Side::over(Box::new(backing)));
    let io = pair.guest.pair(&mut pair.world, 16, None);
    let mut load = Load::new(io, &pair.guest);
    hold.shut();
    load.send(&pair.world, 3);
    pair.world.rounds(10);
    let suspend = SubmissionEntry::suspend(MIGRATABLE, false, false);
    let ticket = pair.source.driver.request(pair.world.now, &suspend, AdminData::None).expect("sent");
    pair.world.rounds(10);
    let StateSelection { cntlid, csvi, csuuidi } = pair.select;
    let get = |offset, len: usize| SubmissionEntry::get_controller_state(csvi, cntlid, csuuidi, offset, (len / 4) as u32);
    let Pair { world, source, .. } = &mut pair;
    let early = source.admin(world, &get(0, 112), AdminData::In(112));
    assert!(!GetControllerStateDw0::from_bits(early.completion.result as u32).csup(), "three writes are under way");
    hold.open();
    world.wait("Suspend", |now| {
        let _progress = source.driver.poll(now);
        source.driver.answer(ticket)
    });
    let rest = source.page(world, &get(48, 64), 64);
    let whole = source.page(world, &get(0, 112), 112);
    assert_ne!(early.data[48..], whole[48..], "completions were posted meanwhile");
    assert_eq!(rest, whole[48..]);
}

/// A piece that is refused ends the sequence: it starts again from offset 0.
fn refused_pieces(mut pair: Pair, mut io: QueuePair) {
    let StateSelection { cntlid, csvi, csuuidi } = pair.select;
    let state = pair.state().bytes;
    pair.move_slot();
    let set = |seqind, offset, dwords| SubmissionEntry::set_controller_state(seqind, csvi, cntlid, csuuidi, offset, dwords);
    let first = set(SequenceIndicator::FIRST, 0, 12);
    let resume = SubmissionEntry::resume(MIGRATABLE);
    let Pair { world, destination, .. } = &mut pair;
    let answer = destination.admin(world, &first, AdminData::Out(&state[..48]));
    assert_eq!(answer.completion.status, Status::SUCCESS);
    assert!(destination.status(world, &resume).is(Status::COMMAND_SEQUENCE), "received in part");
    // Longer than MDTS: refused, and the sequence is over.
    let long = set(SequenceIndicator::MIDDLE, 48, 1 << 20);
    assert!(destination.status(world, &long).is(Status::INVALID_FIELD));
    let last = set(SequenceIndicator::LAST, 48, (state.len() as u32 - 48) / 4);
    let answer = destination.admin(world, &last, AdminData::Out(&state[48..]));
    assert!(answer.completion.status.is(Status::COMMAND_SEQUENCE), "{}", answer.completion.status);
    pair.set_state(state).expect("from offset 0 again");
    pair.resume();
    assert!(!pair.world.run(&mut pair.guest, &mut io, &SubmissionEntry::flush(NSID), &[]).status.is_error());
}

#[test]
fn a_fence_holds_through_every_reset() {
    let mut pair = Pair::new(90);
    let mut io = pair.guest.pair(&mut pair.world, 16, None);
    pair.suspend();
    pair.fence.raise();
    // The manager is reset, and so suspension ends; the guest rings, resets, and tries to come up again.
    pair.source.driver.reset(pair.world.now);
    pair.source.ready(&mut pair.world);
    let before = pair.world.counters(0, MIGRATABLE);
    io.submit(pair.world.now, &SubmissionEntry::write_zeroes(NSID, 0, 8, false), &[], 1).expect("taken");
    io.commit();
    pair.world.rounds(100);
    assert!(pair.source.status(&mut pair.world, &SubmissionEntry::resume(MIGRATABLE)).is(Status::CONTROLLER_NOT_SUSPENDED));
    pair.guest.driver.reset(pair.world.now);
    pair.world.pace_ns = 100_000;
    for _ in 0..100_000 {
        pair.world.round(|now| pair.guest.driver.poll(now).work);
    }
    assert!(!pair.guest.driver.is_ready(), "a fenced controller does not come up");
    assert_eq!(pair.guest.driver.function().read32(offset::CSTS) & 1, 0, "CSTS.RDY");
    let after = pair.world.counters(0, MIGRATABLE);
    assert_eq!((after.fetched, after.writes), (before.fetched, before.writes), "nothing was fetched");
    pair.fence.lower();
    pair.guest.driver.reset(pair.world.now);
    pair.guest.ready(&mut pair.world);
}

#[test]
fn a_reset_of_the_manager_or_of_the_guest_ends_suspension_and_logging_goes_on() {
    let mut pair = Pair::new(100);
    let mut io = pair.guest.pair(&mut pair.world, 16, None);
    let config = CdqConfig { kind: 0, cntlid: MIGRATABLE, slots: 64, format: CdqFormat::UDMQ, arm_trigger: false };
    let Pair { world, source, .. } = &mut pair;
    let mut owner = CdqOwner::create(&mut source.driver, world.now, config).expect("begun");
    let id = world.wait("the queue", |now| {
        let _progress = source.driver.poll(now);
        let _progress = owner.poll(&mut source.driver, now);
        owner.id()
    });
    source.ok(world, &SubmissionEntry::track_send_log(true, id));
    pair.suspend();
    pair.guest.driver.reset(pair.world.now);
    pair.guest.ready(&mut pair.world);
    let mut marks = Vec::new();
    owner.take(64, &mut marks);
    let marks: Vec<_> = marks.chunks(UDMQ_ENTRY_BYTES).map(|entry| UdmqEntry::read_from_bytes(entry).expect("an entry").esa()).collect();
    assert_eq!(marks, [Esa::FIRST, Esa::SUSPENDED, Esa::FIRST], "the reset ended the suspension");
    io.submit(pair.world.now, &SubmissionEntry::flush(NSID), &[], 0).expect_err("the old queue is dead");
    pair.suspend();
    pair.source.driver.reset(pair.world.now);
    pair.source.ready(&mut pair.world);
    let mut io = pair.guest.pair(&mut pair.world, 16, None);
    assert!(!pair.world.run(&mut pair.guest, &mut io, &SubmissionEntry::flush(NSID), &[]).status.is_error());
}

#[test]
fn memory_that_a_controller_writes_is_reported_once() {
    let mut pair = Pair::new(110);
    let mut io = pair.guest.pair(&mut pair.world, 16, None);
    let data = pair.guest.memory(1 << 20);
    let mut request = vec![0u8; 8];
    request[4] = 1;
    request.extend_from_slice(&data.iova().to_le_bytes());
    request.extend_from_slice(&256u32.to_le_bytes());
    let start = SubmissionEntry::track_send_memory(true, MIGRATABLE);
    let Pair { world, source, guest, .. } = &mut pair;
    let answer = source.admin(world, &start, AdminData::Out(&request));
    assert_eq!(answer.completion.status, Status::SUCCESS);
    let again = source.admin(world, &start, AdminData::Out(&request));
    assert!(again.completion.status.is(Status::INVALID_CONTROLLER_ID), "tracked already");
    for page in [3usize, 4, 200] {
        let piece = data.buffer().part(page * 4096, 4096).expect("a page");
        assert!(!world.run(guest, &mut io, &SubmissionEntry::read(NSID, 0, 8), &[piece]).status.is_error());
        let piece = data.buffer().part((page + 10) * 4096, 4096).expect("a page");
        assert!(!world.run(guest, &mut io, &SubmissionEntry::write(NSID, 0, 8), &[piece]).status.is_error());
    }
    let receive = SubmissionEntry::track_receive(MIGRATABLE, 1024);
    let report = |pair: &mut Pair| {
        let page = pair.source.page(&mut pair.world, &receive, 4096);
        let (header, _) = TrackReceiveHeader::read_from_prefix(&page).expect("a header");
        let (_, descriptors) = parse_track_receive(&page).expect("a report");
        let pages: Vec<u64> = descriptors
            .iter()
            .flat_map(|found| (0..u64::from(found.len.get())).map(|page| found.saddr.get() + page * 4096))
            .map(|address| (address - data.iova()) / 4096)
            .collect();
        (pages, header.flags.susp())
    };
    assert_eq!(report(&mut pair), (vec![3, 4, 200], false), "read data; written data stays as it was");
    assert_eq!(report(&mut pair), (vec![], false), "reading consumes");
    pair.suspend();
    assert_eq!(report(&mut pair), (vec![], true));
    let stop = SubmissionEntry::track_send_memory(false, MIGRATABLE);
    assert!(pair.source.status(&mut pair.world, &stop).is(Status::CONTROLLER_SUSPENDED));
    pair.source.ok(&mut pair.world, &SubmissionEntry::resume(MIGRATABLE));
    pair.source.ok(&mut pair.world, &stop);
    let answer = pair.source.admin(&mut pair.world, &receive, AdminData::In(4096));
    assert!(answer.completion.status.is(Status::INVALID_CONTROLLER_ID), "not tracked any more");
}
