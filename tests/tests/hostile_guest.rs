//! A guest that does what no driver does: each gets a status, an event or silence, and nobody else notices.
#![allow(missing_docs)]

use dray_nvme::command::{Cdw0, CompletionEntry, FeatureSelect, NvmOpcode, SglDescriptor, SubmissionEntry};
use dray_nvme::event::{AsyncEvent, EventType, error_info};
use dray_nvme::feature::FeatureId;
use dray_nvme::log::LogId;
use dray_nvme::registers::offset;
use dray_nvme::status::Status;
use dray_tests::raw::{ENABLE, MEMORY_BYTES, RawGuest, RawQueue};
use dray_tests::rig::{Front, MIGRATABLE, NSID, Side, World, pattern};
use zerocopy::IntoBytes;

const BLOCK: usize = 512;
const BYTES: u64 = 8 << 20;
const BLOCKS: u64 = BYTES / BLOCK as u64;
/// Registers and doorbells end here.
const BAR_BYTES: u32 = 0x2000;
/// The controller of the guest that behaves.
const NEIGHBOUR: u16 = 3;

/// A hostile guest, and a neighbour at another controller of the same subsystem over a namespace of its own.
struct Bench {
    world: World,
    guest: RawGuest,
    admin: RawQueue,
    queue: RawQueue,
    neighbour: Neighbour,
}

struct Neighbour {
    front: Front,
    pair: dray_driver::QueuePair,
    data: dray_device::space::MappedBuffer,
    rounds: u64,
}

impl Neighbour {
    fn new(world: &mut World) -> Self {
        let mut front = world.front(0, NEIGHBOUR);
        let pair = front.pair(world, 32, None);
        let data = front.memory(8192);
        Self { front, pair, data, rounds: 0 }
    }

    /// Writes and reads back, as if nothing were the matter.
    #[track_caller]
    fn is_well(&mut self, world: &mut World) {
        self.rounds += 1;
        let bytes = pattern(self.rounds, 4096);
        let slba = self.rounds * 8 % (BLOCKS - 8);
        let (out, back) = (self.data.buffer().part(0, 4096), self.data.buffer().part(4096, 4096));
        let (out, back) = (out.expect("a page"), back.expect("a page"));
        out.write(&bytes);
        for (entry, piece) in [(SubmissionEntry::write(2, slba, 8), out), (SubmissionEntry::read(2, slba, 8), back)] {
            let completion = world.run(&mut self.front, &mut self.pair, &entry, &[piece]);
            assert!(!completion.status.is_error() && !completion.unknown, "the neighbour's {entry:?}: {completion:?}");
        }
        let mut found = vec![0; 4096];
        back.read(&mut found);
        assert!(found == bytes, "the neighbour's data");
        assert_eq!(self.front.driver.last_failure(), None);
    }
}

fn world(seed: u64) -> World {
    let own = dray_controller::MemoryBacking::new(BYTES, BLOCK as u32).expect("a backing");
    let side = Side::memory(BYTES, BLOCK as u32).and_namespace(2, Box::new(own)).and_controller(NEIGHBOUR, vec![2]);
    World::new(seed, vec![side])
}

impl Bench {
    fn new(seed: u64) -> Self {
        let mut world = world(seed);
        let neighbour = Neighbour::new(&mut world);
        let mut guest = RawGuest::new(&world, 0, MIGRATABLE);
        let mut admin = guest.enable(&mut world);
        let queue = guest.create(&mut world, &mut admin, 1, 16);
        Self { world, guest, admin, queue, neighbour }
    }

    #[track_caller]
    fn run(&mut self, entry: &SubmissionEntry) -> CompletionEntry {
        self.guest.run(&mut self.world, &mut self.queue, entry)
    }

    #[track_caller]
    fn refused(&mut self, what: &str, entry: &SubmissionEntry, status: Status) {
        let done = self.run(entry);
        assert!(done.status().is(status), "{what}: {done:?}, not {status}");
        assert!(done.status().dnr() || status == Status::DATA_TRANSFER_ERROR, "{what}: a retry cannot cure it: {done:?}");
        self.neighbour.is_well(&mut self.world);
    }

    /// A read of a page at a fresh place: the queue works.
    #[track_caller]
    fn works(&mut self) {
        let at = self.guest.pages(4096);
        let done = self.run(&SubmissionEntry::read(NSID, 0, 8).with_prps(self.guest.address(at), 0));
        assert!(!done.status().is_error(), "{done:?}");
    }
}

#[test]
fn bad_commands_get_their_status() {
    let mut bench = Bench::new(1);
    let at = bench.guest.pages(8192);
    let good = bench.guest.address(at);
    let end = bench.guest.iova + MEMORY_BYTES as u64;
    let read = |slba, blocks| SubmissionEntry::read(NSID, slba, blocks);
    let fused = |mut entry: SubmissionEntry, bits: u32| {
        entry.cdw0 = Cdw0::from_bits(entry.cdw0.into_bits() | bits);
        entry
    };
    for (what, entry, status) in [
        ("an unknown opcode", SubmissionEntry::nvm(NvmOpcode(0x7f), NSID), Status::INVALID_OPCODE),
        ("a vendor's opcode", SubmissionEntry::nvm(NvmOpcode(0xc1), NSID), Status::INVALID_OPCODE),
        ("NSID 0", SubmissionEntry::read(0, 0, 1).with_prps(good, 0), Status::INVALID_NAMESPACE),
        ("a neighbour's namespace", SubmissionEntry::read(2, 0, 1).with_prps(good, 0), Status::INVALID_FIELD),
        ("NSID above NN", SubmissionEntry::read(999, 0, 1).with_prps(good, 0), Status::INVALID_NAMESPACE),
        ("NSID FFFFFFFFh", SubmissionEntry::flush(u32::MAX), Status::INVALID_NAMESPACE),
        ("an LBA past the end", read(BLOCKS, 1).with_prps(good, 0), Status::LBA_OUT_OF_RANGE),
        ("a range past the end", read(BLOCKS - 1, 2).with_prps(good, 0), Status::LBA_OUT_OF_RANGE),
        ("a range that wraps", read(u64::MAX, 2).with_prps(good, 0), Status::LBA_OUT_OF_RANGE),
        ("zeroes past the end", SubmissionEntry::write_zeroes(NSID, 1, 65_536, true), Status::LBA_OUT_OF_RANGE),
        ("verify past the end", SubmissionEntry::verify(NSID, BLOCKS, 1), Status::LBA_OUT_OF_RANGE),
        ("PRP1 below memory", read(0, 1).with_prps(0x10, 0), Status::DATA_TRANSFER_ERROR),
        ("PRP1 behind memory", read(0, 1).with_prps(end, 0), Status::DATA_TRANSFER_ERROR),
        ("PRP1 at the top", read(0, 1).with_prps(!3, 0), Status::DATA_TRANSFER_ERROR),
        ("data that leaves memory", read(0, 16).with_prps(end - 4096, end), Status::DATA_TRANSFER_ERROR),
        ("PRP1 between dwords", read(0, 1).with_prps(good + 1, 0), Status::PRP_OFFSET_INVALID),
        ("PRP2 inside a page", read(0, 16).with_prps(good, good + 512), Status::PRP_OFFSET_INVALID),
        ("a list behind memory", read(0, 64).with_prps(good, end), Status::DATA_TRANSFER_ERROR),
        ("a list between entries", read(0, 64).with_prps(good, good + 4), Status::PRP_OFFSET_INVALID),
        ("more than MDTS", read(0, 1025).with_prps(good, good), Status::INVALID_FIELD),
        ("PSDT 11b", fused(read(0, 1).with_prps(good, 0), 3 << 14), Status::INVALID_FIELD),
        ("half a fused pair", fused(read(0, 1).with_prps(good, 0), 1 << 8), Status::INVALID_FIELD),
    ] {
        bench.refused(what, &entry, status);
    }
    bench.works();
    // The admin queue's own.
    let identify = SubmissionEntry { cdw10: 1, ..SubmissionEntry::default() };
    let identify = SubmissionEntry { cdw0: Cdw0::from_bits(0x06), ..identify };
    for (what, entry, status) in [
        ("an unknown admin opcode", SubmissionEntry { cdw0: Cdw0::from_bits(0x7d), ..identify }, Status::INVALID_OPCODE),
        ("Identify to nowhere", identify.with_prps(end, 0), Status::DATA_TRANSFER_ERROR),
        ("Identify by SGL", SubmissionEntry { cdw0: Cdw0::from_bits(0x4006), ..identify }, Status::INVALID_FIELD),
        ("queue 0", SubmissionEntry::create_io_cq(0, 3, None, good), Status::INVALID_QID),
        ("a queue twice", SubmissionEntry::create_io_cq(1, 3, None, good), Status::INVALID_QID),
        ("a queue too many", SubmissionEntry::create_io_cq(9, 3, None, good), Status::INVALID_QID),
        ("a queue of one entry", SubmissionEntry::create_io_cq(2, 0, None, good), Status::INVALID_QUEUE_SIZE),
        ("a queue above MQES", SubmissionEntry::create_io_cq(2, 1024, None, good), Status::INVALID_QUEUE_SIZE),
        ("a queue inside a page", SubmissionEntry::create_io_cq(2, 3, None, good + 64), Status::PRP_OFFSET_INVALID),
        ("a vector too many", SubmissionEntry::create_io_cq(2, 3, Some(99), good), Status::INVALID_INTERRUPT_VECTOR),
        ("a queue on no other", SubmissionEntry::create_io_sq(2, 3, 5, good), Status::CQ_INVALID),
        ("a CQ that is in use", SubmissionEntry::delete_io_cq(1), Status::INVALID_QUEUE_DELETION),
        ("a queue that is not", SubmissionEntry::delete_io_sq(7), Status::INVALID_QID),
        ("a feature that is not", SubmissionEntry::set_features(FeatureId(0x7f), 0, false), Status::INVALID_FIELD),
        ("a log that is not", SubmissionEntry::get_log_page(LogId(0x7f), 0, 0, 1, false), Status::INVALID_LOG_PAGE),
        ("a log past its end", SubmissionEntry::get_log_page(LogId::SMART, 0, 512, 1, false), Status::INVALID_FIELD),
        ("the limit of others", SubmissionEntry::get_features(FeatureId::VENDOR_GUEST_LIMIT, FeatureSelect::CURRENT, 2), Status::INVALID_FIELD),
    ] {
        let done = bench.guest.run(&mut bench.world, &mut bench.admin, &entry);
        assert!(done.status().is(status), "{what}: {done:?}, not {status}");
    }
    bench.works();
    bench.neighbour.is_well(&mut bench.world);
}

#[test]
fn a_looped_prp_list_and_nonsense_sgls_end() {
    let mut bench = Bench::new(2);
    let (page, list) = (bench.guest.pages(4096), bench.guest.pages(4096));
    let (page, list_at) = (bench.guest.address(page), bench.guest.address(list));
    // Every entry is the list itself: as data, and as its own next page.
    let looped = list_at.to_le_bytes().repeat(512);
    bench.guest.memory.arena().write(list, &looped);
    for offset in [0, 4096 - 16, 4096 - 8] {
        let write = SubmissionEntry::write(NSID, 0, 1024).with_prps(page, list_at + offset);
        let done = bench.run(&write);
        assert!(!done.status().is_error() || done.status().is(Status::PRP_OFFSET_INVALID), "from {offset}: {done:?}");
        bench.neighbour.is_well(&mut bench.world);
    }
    let descriptors = bench.guest.pages(4096);
    let at = bench.guest.address(descriptors);
    // A segment that leads to itself.
    let looped = [SglDescriptor::data_block(page, 512), SglDescriptor::segment(at, 32)];
    bench.guest.memory.arena().write(descriptors, looped.as_bytes());
    let read = SubmissionEntry::read(NSID, 0, 1024);
    let done = bench.run(&read.with_sgl(SglDescriptor::segment(at, 32)));
    assert!(done.status().is_error(), "an SGL without an end: {done:?}");
    let read = SubmissionEntry::read(NSID, 0, 2);
    for (what, descriptor, status) in [
        ("too short", SglDescriptor::data_block(page, 512), Status::SGL_DATA_LENGTH_INVALID),
        ("too long", SglDescriptor::data_block(page, 2048), Status::SGL_DATA_LENGTH_INVALID),
        ("no memory", SglDescriptor::data_block(0x8000_0000_0000, 1024), Status::DATA_TRANSFER_ERROR),
        ("a segment of nothing", SglDescriptor::last_segment(at, 0), Status::SGL_INVALID_SEGMENT),
        ("half a descriptor", SglDescriptor::last_segment(at, 24), Status::SGL_INVALID_SEGMENT),
        ("no segment there", SglDescriptor::last_segment(0x10_0000_0000, 32), Status::DATA_TRANSFER_ERROR),
        ("4 GiB of segments", SglDescriptor::last_segment(at, !15), Status::SGL_INVALID_COUNT),
    ] {
        bench.refused(what, &read.with_sgl(descriptor), status);
    }
    let mut unknown = SglDescriptor::data_block(page, 1024);
    for kind in [0x40u8, 0x50, 0x0f, 0xf0] {
        unknown.as_mut_bytes()[15] = kind;
        bench.refused("an unknown type", &read.with_sgl(unknown), Status::SGL_TYPE_INVALID);
    }
    bench.works();
}

#[test]
fn a_bad_doorbell_is_ignored_and_reported() {
    let mut bench = Bench::new(3);
    let Bench { world, guest, admin, .. } = &mut bench;
    let first = guest.push(admin, &SubmissionEntry::async_event_request());
    guest.ring(admin);
    for value in [16, 17, u32::MAX] {
        guest.ring_with(1, value);
        world.rounds(3);
    }
    let event = guest.pop(admin).expect("an event");
    guest.ring_head_with(0, admin.head);
    let dw0 = AsyncEvent::from_bits(event.dw0);
    assert_eq!((event.cid, dw0.event_type(), dw0.info()), (first, EventType::ERROR, error_info::INVALID_DOORBELL_VALUE));
    assert_eq!(dw0.lid(), LogId::ERROR);
    // Of queues that do not exist, and completion queue heads that were never posted.
    for qid in [2, 8, 9, 300, 511] {
        guest.ring_with(qid, 3);
        guest.ring_head_with(qid, 3);
    }
    guest.ring_head_with(1, 9);
    guest.ring_head_with(1, 16);
    world.rounds(20);
    assert!(bench.world.counters(0, MIGRATABLE).bad_doorbells >= 3, "counted");
    bench.guest.ring_with(1, bench.queue.tail);
    bench.guest.ring_head_with(1, bench.queue.head);
    bench.works();
    bench.neighbour.is_well(&mut bench.world);
}

#[test]
fn a_completion_queue_that_is_never_drained_stops_only_itself() {
    let mut bench = Bench::new(4);
    let mut second = bench.guest.create(&mut bench.world, &mut bench.admin, 2, 16);
    let mut posted = 0;
    for _ in 0..6 {
        for _ in 0..10 {
            bench.guest.push(&mut bench.queue, &SubmissionEntry::flush(NSID));
        }
        bench.guest.ring(&bench.queue);
        bench.world.rounds(50);
        while bench.guest.pop(&mut bench.queue).is_some() {
            posted += 1;
        }
        bench.neighbour.is_well(&mut bench.world);
    }
    assert_eq!(posted, 15, "one less than the queue has");
    let done = bench.guest.run(&mut bench.world, &mut second, &SubmissionEntry::flush(NSID));
    assert!(!done.status().is_error(), "the guest's other queue");
    // It can still be suspended: what cannot be completed is not fetched.
    let mut manager = bench.world.front(0, dray_tests::rig::MANAGEMENT);
    manager.ok(&mut bench.world, &SubmissionEntry::suspend(MIGRATABLE, false, false));
    manager.ok(&mut bench.world, &SubmissionEntry::resume(MIGRATABLE));
    bench.guest.ring_head_with(1, bench.queue.head);
    bench.world.rounds(50);
    assert!(bench.guest.pop(&mut bench.queue).is_some(), "it goes on when there is room");
}

#[test]
fn registers_that_make_no_sense_end_in_a_fatal_status() {
    let mut world = world(5);
    let mut neighbour = Neighbour::new(&mut world);
    let guest = RawGuest::new(&world, 0, MIGRATABLE);
    world.rounds(3);
    let set = |aqa, asq, acq, cc| {
        guest.function.write32(offset::AQA, aqa);
        guest.function.write64(offset::ASQ, asq);
        guest.function.write64(offset::ACQ, acq);
        guest.function.write32(offset::CC, cc);
    };
    let (asq, acq, aqa) = (guest.iova, guest.iova + 4096, 0x1f_001f);
    for (what, aqa, asq, acq, cc) in [
        ("no admin queues", 0, asq, acq, ENABLE),
        ("queues nowhere", aqa, 0, 0, ENABLE),
        ("a queue inside a page", aqa, asq + 64, acq, ENABLE),
        ("a queue behind memory", aqa, guest.iova + MEMORY_BYTES as u64, acq, ENABLE),
        ("a queue at the top", aqa, asq, u64::MAX << 12, ENABLE),
        ("large pages", aqa, asq, acq, ENABLE | 3 << 7),
        ("another command set", aqa, asq, acq, ENABLE | 6 << 4),
        ("another arbitration", aqa, asq, acq, ENABLE | 7 << 11),
    ] {
        set(aqa, asq, acq, cc);
        world.rounds(10);
        assert_eq!(guest.csts() & 3, 2, "{what}: CSTS.CFS, and not ready");
        guest.function.write32(offset::CC, 0);
        world.rounds(10);
        assert_eq!(guest.csts(), 0, "{what}: a reset clears it");
        neighbour.is_well(&mut world);
    }
    set(aqa, asq, acq, ENABLE);
    world.rounds(10);
    assert_eq!(guest.csts(), 1);
}

/// Random garbage wherever the guest can write.
fn garbage(guest: &RawGuest, random: &mut fastrand::Rng) {
    match random.u8(0..12) {
        0 => guest.function.write32(random.u32(0..BAR_BYTES) & !3, random.u32(..)),
        1 => guest.function.write32(offset::CC, if random.bool() { ENABLE } else { random.u32(..) }),
        2 => guest.function.write64(offset::ASQ, guest.iova + (random.u64(0..3 * MEMORY_BYTES as u64) & !0xfff)),
        3 => guest.function.write32(offset::AQA, random.u32(0..64) | random.u32(0..64) << 16),
        4 | 5 => guest.ring_with(random.u16(0..10), random.u32(0..40)),
        6 => guest.ring_head_with(random.u16(0..10), random.u32(0..40)),
        _ => {
            let at = random.usize(0..MEMORY_BYTES / 64) * 64;
            let mut bytes = vec![0; 64 * random.usize(1..8)];
            random.fill(&mut bytes);
            // Half of them nearly right, so that they get further.
            if random.bool() {
                let opcode = [0u8, 1, 2, 4, 5, 6, 8, 9, 0x0a, 0x0c, 0x19, 0x41][random.usize(0..12)];
                bytes[..8].copy_from_slice(&[opcode, 0, random.u8(..), 0, 1, 0, 0, 0]);
                let prp = (guest.iova + (random.u64(0..MEMORY_BYTES as u64) & !0xfff)).to_le_bytes();
                bytes[24..32].copy_from_slice(&prp);
                bytes[32..40].copy_from_slice(&prp);
                bytes[40..48].copy_from_slice(&random.u64(0..BLOCKS + 8).to_le_bytes());
                bytes[48..50].copy_from_slice(&random.u16(0..2000).to_le_bytes());
                bytes[50..52].fill(0);
            }
            let len = bytes.len().min(MEMORY_BYTES - at);
            guest.memory.arena().write(at, &bytes[..len]);
        }
    }
}

#[test]
fn garbage_everywhere_hurts_nobody_else_and_a_reset_helps() {
    for seed in 0..30 {
        let mut bench = Bench::new(seed);
        let mut random = fastrand::Rng::with_seed(seed);
        for round in 0..3_000 {
            garbage(&bench.guest, &mut random);
            if random.u8(0..3) == 0 {
                bench.world.rounds(random.usize(0..4));
            }
            if round % 300 == 0 {
                bench.neighbour.is_well(&mut bench.world);
            }
            // Queues that are in use again from time to time.
            if random.u16(0..400) == 0 {
                bench.guest.reset(&mut bench.world);
                bench.admin = bench.guest.enable(&mut bench.world);
                bench.queue = bench.guest.create(&mut bench.world, &mut bench.admin, 1, 16);
            }
        }
        bench.guest.reset(&mut bench.world);
        bench.admin = bench.guest.enable(&mut bench.world);
        bench.queue = bench.guest.create(&mut bench.world, &mut bench.admin, 1, 16);
        bench.works();
        bench.neighbour.is_well(&mut bench.world);
    }
}
