//! The driver against the controller through the loopback: bring-up, every I/O command, queues, interrupts, resets, backings.
#![allow(missing_docs)]

use dray_controller::{FileBacking, MemoryBacking, SubsystemConfig};
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::Segment;
use dray_device::poll::Poll;
use dray_device::space::MappedBuffer;
use dray_driver::{AdminData, DriverConfig, DriverState, QueuePair, mmc};
use dray_nvme::command::{CopyRange0, DsmRange, FeatureSelect, SubmissionEntry};
use dray_nvme::event::EventType;
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{Cns, CommandSetId, descriptors};
use dray_nvme::log::LogId;
use dray_nvme::registers::offset;
use dray_nvme::status::Status;
use dray_tests::rig::{Front, HeldBacking, MANAGEMENT, MIGRATABLE, NSID, Side, World, pattern};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

const BLOCK: usize = 512;
const BYTES: u64 = 8 << 20;
const BLOCKS: u64 = BYTES / BLOCK as u64;

/// A world with a guest that has one queue pair, and memory for its data.
struct Bench {
    world: World,
    guest: Front,
    pair: QueuePair,
    data: MappedBuffer,
}

impl Bench {
    fn new(seed: u64) -> Self {
        Self::over(seed, Side::memory(BYTES, BLOCK as u32))
    }

    fn over(seed: u64, side: Side) -> Self {
        let mut world = World::new(seed, vec![side]);
        let mut guest = world.front(0, MIGRATABLE);
        let pair = guest.pair(&mut world, 64, None);
        let data = guest.memory(2 << 20);
        Self { world, guest, pair, data }
    }

    fn run(&mut self, entry: &SubmissionEntry, offset: usize, len: usize) -> Completion {
        let piece = self.data.buffer().part(offset, len);
        let pieces: &[Segment<'_>] = if len == 0 { &[] } else { &[piece.expect("within the data")] };
        self.world.run(&mut self.guest, &mut self.pair, entry, pieces)
    }

    #[track_caller]
    fn ok(&mut self, entry: &SubmissionEntry, offset: usize, len: usize) {
        let completion = self.run(entry, offset, len);
        assert!(!completion.status.is_error() && !completion.unknown, "{entry:?}: {completion:?}");
    }

    #[track_caller]
    fn refused(&mut self, entry: &SubmissionEntry, len: usize, status: Status) {
        let completion = self.run(entry, 0, len);
        assert!(completion.status.is(status), "{entry:?}: {completion:?}, not {status}");
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        self.data.buffer().part(offset, bytes.len()).expect("within the data").write(bytes);
    }

    fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.data.buffer().part(offset, len).expect("within the data").read(&mut bytes);
        bytes
    }

    #[track_caller]
    fn write(&mut self, slba: u64, bytes: &[u8]) {
        self.put(0, bytes);
        self.ok(&SubmissionEntry::write(NSID, slba, (bytes.len() / BLOCK) as u32), 0, bytes.len());
    }

    #[track_caller]
    fn read(&mut self, slba: u64, blocks: usize) -> Vec<u8> {
        self.put(0, &vec![0xee; blocks * BLOCK]);
        self.ok(&SubmissionEntry::read(NSID, slba, blocks as u32), 0, blocks * BLOCK);
        self.get(0, blocks * BLOCK)
    }
}

#[test]
fn bring_up_finds_what_was_configured() {
    let mut side = Side::memory(BYTES, 4096).and_controller(9, vec![NSID]);
    side.config = SubsystemConfig {
        nqn: "nqn.2026-11.org.dray:test:loopback".into(),
        serial: "SERIAL-7".into(),
        model: "Dray model".into(),
        mdts: 5,
        max_queue_entries: 256,
        ..side.config
    };
    let mut world = World::new(1, vec![side]);
    for (cntlid, manages) in [(MANAGEMENT, true), (MIGRATABLE, false), (9, false)] {
        let mut front = world.front(0, cntlid);
        let page = front.driver.identify().expect("identified");
        assert_eq!((page.serial(), page.model(), page.cntlid), (Some("SERIAL-7"), Some("Dray model"), cntlid));
        assert_eq!(page.subsystem_nqn(), Some("nqn.2026-11.org.dray:test:loopback"));
        assert_eq!((page.oacs.hmlms(), page.mdts), (manages, 5));
        assert_eq!(front.driver.capabilities().max_queue_entries(), 256);
        let page_version = page.ver;
        let pair = front.pair(&mut world, 512, None);
        assert_eq!(pair.limits().depth, 255, "as many entries as CAP.MQES allows, one of which stays empty");
        assert_eq!(pair.limits().max_transfer, 128 << 10, "MDTS");
        assert_eq!(front.driver.version(), page_version, "VER is VS");
        let query = mmc::active_namespaces(&mut front.driver, world.now, 0).expect("sent");
        let list = world.wait("the list of namespaces", |now| {
            let _progress = front.driver.poll(now);
            query.poll(&mut front.driver)
        });
        assert_eq!(list, Ok(vec![NSID]));
    }
    let mut manager = world.front(0, MANAGEMENT);
    let query = mmc::identify_namespace(&mut manager.driver, world.now, NSID).expect("sent");
    let page = world.wait("Identify Namespace", |now| {
        let _progress = manager.driver.poll(now);
        query.poll(&mut manager.driver)
    });
    let page = page.expect("a namespace");
    let config = Side::namespace(NSID);
    assert_eq!((page.nsze, page.block_bytes(), page.nguid), (BYTES / 4096, Some(4096), config.nguid));
    assert!(page.nmic.shared());
    let identify = SubmissionEntry::identify(Cns::NAMESPACE_DESCRIPTORS, NSID, 0, CommandSetId::NVM);
    let list = manager.page(&mut world, &identify, 4096);
    assert_eq!(descriptors(&list).count(), 4, "EUI64, NGUID, UUID, CSI");
    let identify = SubmissionEntry::identify(Cns::CONTROLLERS, 0, 0, CommandSetId::NVM);
    let list = manager.page(&mut world, &identify, 4096);
    assert_eq!(&list[..8], &[3, 0, 1, 0, 2, 0, 9, 0]);
    assert!(manager.status(&mut world, &SubmissionEntry::identify(Cns(0x77), 0, 0, CommandSetId::NVM)).is(Status::INVALID_FIELD));
}

#[test]
fn transfers_of_every_shape_come_back_as_they_went() {
    let mut bench = Bench::new(2);
    let most = bench.pair.limits().max_transfer;
    assert_eq!(most, 512 << 10, "MDTS 7");
    // Length, and where the data begins in its first page.
    let shapes = [(512, 0), (512, 4), (1024, 3584), (4096, 0), (4096, 512), (8192, 4), (12_288, 2048), (65_536, 4092)];
    for (round, (len, skew)) in shapes.into_iter().chain([(most, 0), (most, 8), (most - 512, 4088)]).enumerate() {
        let bytes = pattern(round as u64, len);
        let slba = 97 * round as u64;
        bench.put(skew, &bytes);
        bench.ok(&SubmissionEntry::write(NSID, slba, (len / BLOCK) as u32), skew, len);
        bench.put(skew, &vec![0; len]);
        bench.ok(&SubmissionEntry::read(NSID, slba, (len / BLOCK) as u32), skew, len);
        assert_eq!(bench.get(skew, len), bytes, "{len} bytes from {skew}");
        assert_eq!(bench.read(slba, len / BLOCK), bytes);
    }
    // Pages in any order, the first and the last in part.
    let pieces = [(4096 * 7 + 512, 3584), (4096 * 2, 8192), (4096 * 12, 4096), (4096 * 5, 512)];
    let len: usize = pieces.iter().map(|(_, len)| len).sum();
    let bytes = pattern(99, len);
    bench.write(1000, &bytes);
    bench.put(0, &vec![0; 64 << 10]);
    let Bench { world, guest, pair, data } = &mut bench;
    let segments: Vec<_> = pieces.iter().map(|&(at, len)| data.buffer().part(at, len).expect("a piece")).collect();
    let read = SubmissionEntry::read(NSID, 1000, (len / BLOCK) as u32);
    assert_eq!(world.run(guest, pair, &read, &segments).status, Status::SUCCESS);
    let back: Vec<u8> = pieces.iter().flat_map(|&(at, len)| bench.get(at, len)).collect();
    assert_eq!(back, bytes);
    // What cannot be described is refused before the device sees it.
    let Bench { world, pair, data, .. } = &mut bench;
    let odd = data.buffer().part(2, 512).expect("a piece");
    assert_eq!(pair.submit(world.now, &SubmissionEntry::read(NSID, 0, 1), &[odd], 0), Err(SubmitError::BadData));
    let long = data.buffer().part(0, most + 512).expect("a piece");
    assert_eq!(pair.submit(world.now, &SubmissionEntry::read(NSID, 0, 1025), &[long], 0), Err(SubmitError::BadData));
}

#[test]
fn every_io_command_does_what_it_says() {
    let mut bench = Bench::new(3);
    let bytes = pattern(1, 16 * BLOCK);
    bench.write(100, &bytes);
    bench.ok(&SubmissionEntry::flush(NSID), 0, 0);
    bench.put(0, &bytes);
    bench.ok(&SubmissionEntry::compare(NSID, 100, 16), 0, 16 * BLOCK);
    bench.put(16 * BLOCK - 1, &[!bytes[16 * BLOCK - 1]]);
    bench.refused(&SubmissionEntry::compare(NSID, 100, 16), 16 * BLOCK, Status::COMPARE_FAILURE);
    bench.ok(&SubmissionEntry::verify(NSID, 0, BLOCKS as u32), 0, 0);
    // Copy: two ranges, in another order.
    let ranges = [(108u64, 8u16), (100, 8)].map(|(slba, blocks)| CopyRange0 { slba, nlb: blocks - 1, ..Default::default() });
    bench.put(0, ranges.as_bytes());
    bench.ok(&SubmissionEntry::copy(NSID, 500, 2), 0, 64);
    let (low, high) = bytes.split_at(8 * BLOCK);
    assert_eq!(bench.read(500, 16), [high, low].concat());
    // Write Zeroes, with and without deallocation.
    for (slba, deallocate) in [(500, false), (508, true)] {
        bench.ok(&SubmissionEntry::write_zeroes(NSID, slba, 4, deallocate), 0, 0);
        assert_eq!(bench.read(slba, 4), vec![0; 4 * BLOCK]);
    }
    assert_eq!(bench.read(504, 4), &high[4 * BLOCK..]);
    assert_eq!(bench.read(512, 4), &low[4 * BLOCK..]);
    // DSM: what is deallocated reads zero here, what is not stays.
    let ranges = [(100u64, 2u32), (114, 1)].map(|(slba, length)| DsmRange { slba, length, ..Default::default() });
    bench.put(0, ranges.as_bytes());
    bench.ok(&SubmissionEntry::dsm(NSID, 2), 0, 32);
    let back = bench.read(100, 16);
    for block in 0..16 {
        let part = block * BLOCK..(block + 1) * BLOCK;
        let gone = [0, 1, 14].contains(&block);
        assert_eq!(back[part.clone()] == vec![0; BLOCK], gone, "block {block}");
        assert!(gone || back[part.clone()] == bytes[part]);
    }
    // Write Uncorrectable: unreadable block by block until it is written again.
    bench.ok(&SubmissionEntry::write_uncorrectable(NSID, 104, 3), 0, 0);
    bench.refused(&SubmissionEntry::read(NSID, 100, 16), 16 * BLOCK, Status::UNRECOVERED_READ);
    bench.refused(&SubmissionEntry::verify(NSID, 106, 1), 0, Status::UNRECOVERED_READ);
    assert_eq!(bench.read(107, 1), &bytes[7 * BLOCK..8 * BLOCK]);
    bench.write(105, &bytes[..BLOCK]);
    assert_eq!(bench.read(105, 1), &bytes[..BLOCK]);
    bench.refused(&SubmissionEntry::read(NSID, 104, 1), BLOCK, Status::UNRECOVERED_READ);
    bench.write(104, &bytes[..3 * BLOCK]);
    assert_eq!(bench.read(104, 3), &bytes[..3 * BLOCK]);
    // The last block, and what lies behind it.
    bench.write(BLOCKS - 1, &bytes[..BLOCK]);
    bench.refused(&SubmissionEntry::read(NSID, BLOCKS, 1), BLOCK, Status::LBA_OUT_OF_RANGE);
    bench.refused(&SubmissionEntry::write(NSID, BLOCKS - 1, 2), 2 * BLOCK, Status::LBA_OUT_OF_RANGE);
    bench.refused(&SubmissionEntry::write(NSID + 1, 0, 1), BLOCK, Status::INVALID_NAMESPACE);
    assert_eq!(bench.read(BLOCKS - 1, 1), &bytes[..BLOCK]);
}

#[test]
fn queues_wrap_and_every_command_ends_once() {
    let mut world = World::small(4);
    let mut guest = world.front(0, MIGRATABLE);
    let mut pairs: Vec<_> = [2, 8, 64, 1024].map(|entries| guest.pair(&mut world, entries, None)).into();
    let data = guest.memory(4096);
    let mut random = fastrand::Rng::with_seed(4);
    let mut ended: Vec<Vec<bool>> = pairs.iter().map(|_| vec![false; 5_000]).collect();
    let mut sent = vec![0usize; pairs.len()];
    world.wait("5,000 commands on each of four queues", |now| {
        let _progress = guest.driver.poll(now);
        for (queue, pair) in pairs.iter_mut().enumerate() {
            for _ in 0..random.usize(0..40) {
                if sent[queue] == 5_000 {
                    break;
                }
                let read = SubmissionEntry::read(NSID, random.u64(0..BLOCKS - 8), 8);
                match pair.submit(now, &read, &[data.buffer().segment()], sent[queue] as u64) {
                    Ok(()) => sent[queue] += 1,
                    Err(SubmitError::Full) => break,
                    Err(error) => panic!("queue {queue}: {error}"),
                }
            }
            pair.commit();
            pair.poll_with(now, |completion| {
                assert!(!completion.status.is_error() && !completion.unknown, "{completion:?}");
                let seen = std::mem::replace(&mut ended[queue][completion.tag as usize], true);
                assert!(!seen, "queue {queue}, command {} ends twice", completion.tag);
            });
        }
        ended.iter().flatten().all(|&ended| ended).then_some(())
    });
    // More pairs than were granted are refused; a pair that was dropped makes room.
    let granted = guest.driver.queues_granted();
    while pairs.len() < usize::from(granted) {
        pairs.push(guest.pair(&mut world, 4, None));
    }
    let config = dray_driver::QueuePairConfig { entries: 4, vector: None };
    assert_eq!(guest.driver.create_queue_pair(world.now, config), Err(SubmitError::Full));
    pairs.truncate(3);
    for _ in 0..200 {
        world.round(|now| guest.driver.poll(now).work);
    }
    assert_eq!(guest.pair(&mut world, 4, None).qid(), 4);
}

#[test]
fn interrupts_come_by_event_line_and_are_coalesced() {
    let mut world = World::small(5);
    let mut guest = world.front(0, MIGRATABLE);
    let mut pair = guest.pair(&mut world, 64, Some(3));
    let mut quiet = guest.pair(&mut world, 64, None);
    let line = pair.event_line().expect("a line").clone();
    assert!(quiet.event_line().is_none());
    let flush = |pair: &mut QueuePair, world: &World, count: u64| {
        for tag in 0..count {
            pair.submit(world.now, &SubmissionEntry::flush(NSID), &[], tag).expect("taken");
        }
        pair.commit();
    };
    flush(&mut quiet, &world, 3);
    world.rounds(20);
    assert_eq!(line.take(), 0, "another queue's completions");
    flush(&mut pair, &world, 1);
    world.rounds(20);
    assert!(line.take() > 0, "one completion, one interrupt");
    let mut count = 0;
    assert_eq!((pair.poll_with(world.now, |_| count += 1), count), (1, 1));
    // THR 3 (0's based: four), TIME 10 (1 ms).
    guest.ok(&mut world, &SubmissionEntry::set_features(FeatureId::INTERRUPT_COALESCING, 10 << 8 | 3, false));
    let get = SubmissionEntry::get_features(FeatureId::INTERRUPT_COALESCING, FeatureSelect::CURRENT, 0);
    assert_eq!(guest.ok(&mut world, &get), 10 << 8 | 3);
    let start = world.now;
    flush(&mut pair, &world, 1);
    world.rounds(100);
    assert_eq!(line.take(), 0, "held back");
    world.rounds(2_000);
    assert!(line.take() > 0 && world.now.us_since(start) > 1_000, "and raised when its time was over");
    flush(&mut pair, &world, 4);
    world.rounds(20);
    assert!(line.take() > 0, "four at once are enough");
    let get = SubmissionEntry::get_features(FeatureId::INTERRUPT_COALESCING, FeatureSelect::DEFAULT, 0);
    assert_eq!(guest.ok(&mut world, &get), 0);
}

#[test]
fn a_long_command_can_be_aborted_and_a_finished_one_cannot() {
    let mut bench = Bench::over(6, Side::memory(64 << 20, BLOCK as u32));
    let Bench { world, guest, pair, .. } = &mut bench;
    pair.submit(world.now, &SubmissionEntry::verify(NSID, 0, 65_536), &[], 7).expect("taken");
    pair.commit();
    world.rounds(2);
    let (tag, cid) = pair.identifiers().next().expect("outstanding");
    assert_eq!(tag, 7);
    let ticket = guest.driver.abort(world.now, pair.qid(), cid).expect("sent");
    let (mut answer, mut ended) = (None, None);
    world.wait("the abort and its command", |now| {
        let _progress = guest.driver.poll(now);
        answer = answer.take().or_else(|| guest.driver.answer(ticket));
        pair.poll_with(now, |completion| ended = Some(completion));
        (answer.is_some() && ended.is_some()).then_some(())
    });
    assert_eq!(answer.map(|answer| answer.completion.result & 1), Some(0), "aborted");
    assert!(ended.is_some_and(|completion| completion.status.is(Status::ABORTED_BY_REQUEST)));
    assert_eq!(guest.ok(world, &SubmissionEntry::abort(pair.qid(), cid)) & 1, 1, "not aborted: it has ended");
    bench.write(0, &[1; BLOCK]);
}

#[test]
fn a_command_that_hangs_is_aborted_and_then_the_controller_is_reset() {
    let (backing, hold) = HeldBacking::new(BYTES, BLOCK as u32);
    let mut world = World::new(7, vec![Side::over(Box::new(backing))]);
    let config = DriverConfig { io_timeout_ms: 20, ..DriverConfig::default() };
    let mut guest = world.front_with(0, MIGRATABLE, config);
    let mut pair = guest.pair(&mut world, 16, None);
    let data = guest.memory(4096);
    hold.shut();
    let write = SubmissionEntry::write(NSID, 0, 8);
    pair.submit(world.now, &write, &[data.buffer().segment()], 1).expect("taken");
    pair.commit();
    world.pace_ns = 100_000;
    let completion = world.wait("the hanging command", |now| {
        let _progress = guest.driver.poll(now);
        if *guest.driver.state() == DriverState::Resetting {
            // The reset waits for the operation: it must not touch media or memory afterwards.
            hold.open();
        }
        let mut ended = None;
        pair.poll_with(now, |completion| ended = Some(completion));
        ended
    });
    assert!(completion.unknown && pair.is_dead(), "nobody knows how it ended: {completion:?}");
    guest.ready(&mut world);
    let mut pair = guest.pair(&mut world, 16, None);
    assert!(!world.run(&mut guest, &mut pair, &write, &[data.buffer().segment()]).status.is_error());
}

#[test]
fn events_logs_and_features() {
    let mut bench = Bench::new(8);
    let mut manager = bench.world.front(0, MANAGEMENT);
    // The guest write-protects the namespace: whoever else has it is told.
    let Bench { world, guest, .. } = &mut bench;
    let mut protect = SubmissionEntry::set_features(FeatureId::NAMESPACE_WRITE_PROTECT, 1, false);
    protect.nsid = NSID;
    guest.ok(world, &protect);
    let event = world.wait("the event", |now| {
        let _progress = manager.driver.poll(now);
        manager.driver.next_event()
    });
    assert_eq!((event.dw0.event_type(), event.dw0.lid()), (EventType::NOTICE, LogId::CHANGED_NAMESPACES));
    let log = |lid, bytes: usize| SubmissionEntry::get_log_page(lid, u32::MAX, 0, (bytes / 4) as u32, false);
    let page = manager.page(world, &log(LogId::CHANGED_NAMESPACES, 4096), 4096);
    assert_eq!(&page[..8], &[1, 0, 0, 0, 0, 0, 0, 0]);
    let page = manager.page(world, &log(LogId::CHANGED_NAMESPACES, 4096), 4096);
    assert_eq!(&page[..4], &[0; 4], "reading clears it");
    bench.put(0, &[7; BLOCK]);
    bench.refused(&SubmissionEntry::write(NSID, 0, 1), BLOCK, Status::NAMESPACE_WRITE_PROTECTED);
    let Bench { world, guest, .. } = &mut bench;
    protect.cdw11 = 0;
    guest.ok(world, &protect);
    world.wait("the second event", |now| {
        let _progress = manager.driver.poll(now);
        manager.driver.next_event()
    });
    bench.write(0, &[7; BLOCK]);
    let Bench { world, guest, .. } = &mut bench;
    let smart = guest.page(world, &log(LogId::SMART, 512), 512);
    assert_eq!((smart[48], smart[64]), (1, 0), "units of 1,000 x 512 bytes, rounded up; host reads");
    let effects = guest.page(world, &log(LogId::EFFECTS, 4096), 4096);
    let supported = |page: &[u8], opcode: usize| page[opcode * 4] & 1 == 1;
    let migration = [0x3d, 0x3e, 0x41, 0x42, 0x45];
    assert!(supported(&effects, 0x06) && migration.iter().all(|&opcode| !supported(&effects, opcode)));
    let effects = manager.page(world, &log(LogId::EFFECTS, 4096), 4096);
    assert!(migration.iter().all(|&opcode| supported(&effects, opcode)));
    assert!(guest.status(world, &log(LogId(0x70), 512)).is(Status::INVALID_LOG_PAGE));
    let get = |fid, sel| SubmissionEntry::get_features(fid, sel, 0);
    guest.ok(world, &SubmissionEntry::set_features(FeatureId::ARBITRATION, 3, false));
    assert_eq!(guest.ok(world, &get(FeatureId::ARBITRATION, FeatureSelect::CURRENT)), 3);
    let save = SubmissionEntry::set_features(FeatureId::ARBITRATION, 3, true);
    assert!(guest.status(world, &save).is(Status::FEATURE_NOT_SAVEABLE));
    let late = SubmissionEntry::set_features(FeatureId::NUMBER_OF_QUEUES, 0, false);
    assert!(guest.status(world, &late).is(Status::COMMAND_SEQUENCE), "queues are there already");
    // A reset puts everything back.
    guest.driver.reset(world.now);
    guest.ready(world);
    assert_ne!(guest.ok(world, &get(FeatureId::ARBITRATION, FeatureSelect::CURRENT)), 3);
}

#[test]
fn a_reset_at_any_time_gives_every_command_back_once() {
    for seed in 0..40 {
        let (backing, hold) = HeldBacking::new(BYTES, BLOCK as u32);
        let mut bench = Bench::over(seed, Side::over(Box::new(backing)));
        let mut random = fastrand::Rng::with_seed(seed);
        let Bench { world, guest, pair, data } = &mut bench;
        if random.bool() {
            hold.shut();
        }
        let count = random.usize(1..60);
        for tag in 0..count as u64 {
            let entry = match random.u8(0..4) {
                0 => SubmissionEntry::write_zeroes(NSID, random.u64(0..4000), 12_000, false),
                1 => SubmissionEntry::verify(NSID, 0, 16_000),
                _ => SubmissionEntry::write(NSID, tag * 8, 8),
            };
            let has_data = entry.nvm_opcode() == dray_nvme::command::NvmOpcode::WRITE;
            let piece = data.buffer().part(0, 4096).expect("a page");
            let pieces: &[_] = if has_data { &[piece] } else { &[] };
            pair.submit(world.now, &entry, pieces, tag).expect("taken");
        }
        pair.commit();
        let mut ended = vec![None; count];
        let mut note = |completion: Completion| {
            let before = ended[completion.tag as usize].replace(completion);
            assert!(before.is_none(), "seed {seed}: command {} ends twice", completion.tag);
        };
        for _ in 0..random.usize(0..60) {
            world.round(|now| {
                let _progress = guest.driver.poll(now);
                pair.poll_with(now, &mut note)
            });
        }
        if random.bool() {
            guest.driver.reset(world.now);
        } else {
            // Behind the driver's back, as a function-level reset by someone else.
            guest.driver.function().reset().expect("a function-level reset");
            world.rounds(3);
            guest.driver.reset(world.now);
        }
        hold.open();
        world.wait("the reset", |now| {
            let _progress = guest.driver.poll(now);
            pair.poll_with(now, &mut note);
            (guest.driver.is_ready() && pair.outstanding() == 0).then_some(())
        });
        assert!(ended.iter().all(Option::is_some), "seed {seed}: some never came back");
        let flush = SubmissionEntry::flush(NSID);
        assert_eq!(pair.submit(world.now, &flush, &[], 0), Err(SubmitError::Dead));
        bench.pair = bench.guest.pair(&mut bench.world, 64, None);
        bench.write(3, &pattern(seed, BLOCK));
        assert_eq!(bench.read(3, 1), pattern(seed, BLOCK));
    }
}

#[test]
fn shutdown_flushes_and_a_reset_brings_the_controller_back() {
    let (backing, hold) = HeldBacking::new(BYTES, BLOCK as u32);
    let mut bench = Bench::over(9, Side::over(Box::new(backing)));
    bench.write(5, &[5; BLOCK]);
    let _written = hold.take_seen();
    let Bench { world, guest, .. } = &mut bench;
    guest.driver.shutdown(world.now);
    world.wait("the shutdown", |now| {
        let _progress = guest.driver.poll(now);
        (*guest.driver.state() == DriverState::Stopped).then_some(())
    });
    assert!(hold.take_seen().iter().any(|(op, ..)| *op == dray_device::backing::BackingOp::Flush), "flushed");
    assert_eq!(guest.driver.function().read32(offset::CSTS) >> 2 & 3, 2, "shutdown complete");
    guest.driver.reset(world.now);
    guest.ready(world);
    bench.pair = bench.guest.pair(&mut bench.world, 16, None);
    assert_eq!(bench.read(5, 1), [5; BLOCK]);
}

#[test]
fn a_function_that_is_pulled_out_gives_everything_back() {
    let (backing, hold) = HeldBacking::new(BYTES, BLOCK as u32);
    let Bench { mut world, mut guest, mut pair, data } = Bench::over(10, Side::over(Box::new(backing)));
    hold.shut();
    pair.submit(world.now, &SubmissionEntry::write(NSID, 0, 8), &[data.buffer().part(0, 4096).expect("a page")], 1).expect("taken");
    pair.commit();
    world.rounds(5);
    guest.slot.unplug();
    let completion = world.wait("the end of the command", |now| {
        let _progress = guest.driver.poll(now);
        let mut ended = None;
        pair.poll_with(now, |completion| ended = Some(completion));
        ended
    });
    assert!(completion.unknown);
    assert_eq!(*guest.driver.state(), DriverState::Failed(dray_driver::DriverError::Gone));
    assert_eq!(guest.driver.request(world.now, &SubmissionEntry::keep_alive(), AdminData::None), Err(SubmitError::Dead));
}

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dray-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn file(path: &Path, bytes: u64) -> FileBacking {
    std::fs::File::create(path).and_then(|file| file.set_len(bytes)).expect("a file");
    FileBacking::open(path, BLOCK as u32, 64).expect("a backing")
}

#[test]
fn a_file_holds_what_was_written() {
    let folder = Folder::new("file-backing");
    let path = folder.0.join("namespace");
    let mut bench = Bench::over(11, Side::over(Box::new(file(&path, BYTES))));
    bench.world.follow_the_clock();
    let mut expected = vec![0; BYTES as usize];
    let mut random = fastrand::Rng::with_seed(11);
    for round in 0..60u64 {
        let blocks = 1 << random.u32(0..10);
        let slba = random.u64(0..BLOCKS - blocks);
        let place = slba as usize * BLOCK..(slba + blocks) as usize * BLOCK;
        if round % 5 == 4 {
            bench.ok(&SubmissionEntry::write_zeroes(NSID, slba, blocks as u32, round % 2 == 0), 0, 0);
            expected[place].fill(0);
        } else {
            let bytes = pattern(round, blocks as usize * BLOCK);
            bench.write(slba, &bytes);
            expected[place].copy_from_slice(&bytes);
        }
    }
    bench.ok(&SubmissionEntry::flush(NSID), 0, 0);
    let at = random.u64(0..BLOCKS - 8);
    assert_eq!(bench.read(at, 8), &expected[at as usize * BLOCK..(at as usize + 8) * BLOCK]);
    drop(bench);
    assert!(std::fs::read(&path).expect("the file") == expected, "the file differs from what was written");
}

/// A small filesystem of its own that goes away with the test; `None` where it may not be made.
struct SmallDisk(Folder);

impl SmallDisk {
    fn new(name: &str) -> Option<Self> {
        let folder = Folder::new(name);
        let mount = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "dray-test"]).arg(&folder.0).output();
        mount.is_ok_and(|output| output.status.success()).then_some(Self(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _gone = std::process::Command::new("umount").arg("-l").arg(&self.0.0).output();
    }
}

#[test]
fn a_full_disk_is_a_status_and_loses_nothing() {
    let Some(disk) = SmallDisk::new("full-disk") else {
        eprintln!("SKIPPED: a full disk under the file backing needs the right to mount a tmpfs");
        return;
    };
    let backing = file(&disk.0.0.join("namespace"), BYTES);
    let mut bench = Bench::over(12, Side::over(Box::new(backing)));
    bench.world.follow_the_clock();
    let mut written = Vec::new();
    let mut full = None;
    for i in 0..BYTES / (64 << 10) {
        let bytes = pattern(i, 64 << 10);
        bench.put(0, &bytes);
        let completion = bench.run(&SubmissionEntry::write(NSID, i * 128, 128), 0, bytes.len());
        if completion.status.is_error() {
            full = Some(completion.status);
            break;
        }
        written.push(i);
    }
    let full = full.expect("8 MiB do not fit 4");
    assert!(full.is(Status::CAPACITY_EXCEEDED), "{full}");
    assert!(written.len() > 16, "{} pieces of 64 KiB", written.len());
    for &i in &written {
        assert!(bench.read(i * 128, 128) == pattern(i, 64 << 10), "piece {i}");
    }
    // The controller goes on, and what has its place can be written again.
    bench.write(0, &[1; BLOCK]);
    bench.ok(&SubmissionEntry::write_zeroes(NSID, 0, 2048, true), 0, 0);
    bench.write(BLOCKS - 1, &[2; BLOCK]);
}

#[test]
fn a_backing_that_cannot_be_is_refused() {
    assert!(MemoryBacking::new(1000, 512).is_err() && MemoryBacking::new(0, 512).is_err());
    assert!(MemoryBacking::new(4096, 768).is_err() && MemoryBacking::new(8192, 8192).is_err());
    let folder = Folder::new("no-backing");
    let path = folder.0.join("odd");
    std::fs::write(&path, [0; 1000]).expect("a file");
    let error = FileBacking::open(&path, 512, 8).expect_err("no whole blocks").to_string();
    assert!(error.contains("1000 bytes"), "{error}");
    assert!(FileBacking::open(&folder.0.join("missing"), 512, 8).is_err());
    assert!(FileBacking::open(&folder.0, 512, 8).is_err(), "a folder");
}
