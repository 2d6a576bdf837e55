use super::*;
use crate::guest::{GuestHandle, Phase};
use crate::ledger::LedgerSpec;
use crate::reader::BlockReader;
use crate::verify::check;
use dray_device::command::QueueLimits;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::space::AddressSpace;
use dray_nvme::command::NvmOpcode;
use dray_nvme::status::Status;
use std::collections::VecDeque;
use std::sync::Mutex;

const BLOCKS: u64 = 256;

/// What the device does wrong, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    LoseWrite,
    TearWrite,
    MisplaceWrite,
    FailWrite,
    Die,
}

/// A disk in memory whose commands take `delay_ns`.
struct Disk {
    bytes: Vec<u8>,
    waiting: VecDeque<(Time, Completion)>,
    wrong: Wrong,
    dead: bool,
    seen_busy: Vec<u64>,
    most: usize,
}

#[derive(Clone)]
struct Queue {
    disk: Arc<Mutex<Disk>>,
    delay_ns: u64,
}

impl CommandQueue for Queue {
    fn limits(&self) -> QueueLimits {
        QueueLimits { depth: 64, max_transfer: 4096, max_write_zeroes: 0 }
    }

    fn free(&self) -> usize {
        64 - self.disk.lock().expect("disk").waiting.len()
    }

    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        let disk = &mut *self.disk.lock().expect("disk");
        if disk.dead {
            return Err(SubmitError::Dead);
        }
        let mut at = entry.slba() as usize * 512;
        assert_eq!((entry.rw_cdw12().blocks(), entry.nsid), (8, 7));
        assert!(!disk.seen_busy.contains(&entry.slba()), "two commands to one block");
        let mut status = Status::SUCCESS;
        let mut bytes = [0; BLOCK_BYTES];
        if entry.nvm_opcode() == NvmOpcode::WRITE {
            data[0].read(&mut bytes);
            let mut len = BLOCK_BYTES;
            match std::mem::replace(&mut disk.wrong, Wrong::Nothing) {
                Wrong::LoseWrite => len = 0,
                Wrong::TearWrite => len = 1024,
                Wrong::MisplaceWrite => at = (at + BLOCK_BYTES) % disk.bytes.len(),
                Wrong::FailWrite => (len, status) = (0, Status::WRITE_FAULT),
                Wrong::Die => disk.dead = true,
                Wrong::Nothing => {}
            }
            disk.bytes[at..at + len].copy_from_slice(&bytes[..len]);
        } else {
            data[0].write(&disk.bytes[at..at + BLOCK_BYTES]);
        }
        disk.seen_busy.push(entry.slba());
        disk.waiting.push_back((now.after_ns(self.delay_ns), Completion { tag, status, result: 0, unknown: false }));
        disk.most = disk.most.max(disk.waiting.len());
        Ok(())
    }

    fn commit(&mut self) {}

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        let mut ended = Vec::new();
        {
            let disk = &mut *self.disk.lock().expect("disk");
            while disk.waiting.front().is_some_and(|(at, _)| *at <= now || disk.dead) {
                let Some((_, completion)) = disk.waiting.pop_front() else { break };
                disk.seen_busy.remove(0);
                ended.push(Completion { unknown: disk.dead, ..completion });
            }
        }
        let count = ended.len();
        ended.into_iter().for_each(done);
        count
    }
}

struct Rig {
    load: Load<Queue>,
    queue: Queue,
    handle: GuestHandle,
    now: Time,
}

impl Rig {
    fn new(config: &GuestConfig, delay_ns: u64) -> Self {
        let spec = LedgerSpec { seed: 3, guest: 1, blocks: (0..BLOCKS).collect() };
        let ledger = Arc::new(Ledger::in_memory(&spec).expect("ledger"));
        let shared = Arc::new(Shared::new(ledger, config.slots()));
        let buffer = DmaBuffer::allocate("test", config.slots() * BLOCK_BYTES, Pages::Small).expect("memory");
        let memory = MappedBuffer::new(&AddressSpace::default(), buffer).expect("mapped");
        let disk = Disk {
            bytes: vec![0; BLOCKS as usize * BLOCK_BYTES],
            waiting: VecDeque::new(),
            wrong: Wrong::Nothing,
            dead: false,
            seen_busy: Vec::new(),
            most: 0,
        };
        let queue = Queue { disk: Arc::new(Mutex::new(disk)), delay_ns };
        let mut load = Load::new(config, Arc::clone(&shared), memory);
        load.begin(vec![queue.clone()], 8);
        Self { load, queue, handle: GuestHandle { shared }, now: Time(1) }
    }

    fn run(&mut self, ns: u64, step_ns: u64) {
        for _ in 0..ns / step_ns {
            self.load.poll(self.now, true);
            self.handle.shared.now_ns.store(self.now.0, Ordering::Relaxed);
            self.now = self.now.after_ns(step_ns);
        }
    }

    fn drain(&mut self) {
        while self.load.outstanding() > 0 {
            self.now = self.now.after_us(10);
            self.load.poll(self.now, false);
        }
    }

    fn wrong(&self, wrong: Wrong) {
        self.queue.disk.lock().expect("disk").wrong = wrong;
    }

    fn disk(&self) -> impl BlockReader {
        self.queue.disk.lock().expect("disk").bytes.clone()
    }

    /// Does one thing wrong after a while; returns the mismatches that reads found until the end.
    fn run_with(&mut self, wrong: Wrong) -> u64 {
        self.run(2_000_000, 1000);
        self.wrong(wrong);
        self.run(20_000_000, 1000);
        self.drain();
        self.handle.counters().mismatches
    }
}

fn closed(read_percent: u8) -> GuestConfig {
    GuestConfig { nsid: 7, rate: 0, read_percent, ..GuestConfig::default() }
}

#[test]
fn the_rate_holds_and_latency_counts_from_when_a_command_was_due() {
    let config = GuestConfig { nsid: 7, rate: 10_000, read_percent: 20, ..GuestConfig::default() };
    let mut rig = Rig::new(&config, 20_000);
    rig.run(1_000_000_000, 5_000);
    rig.drain();
    let counters = rig.handle.counters();
    assert!((9_600..10_400).contains(&counters.writes), "{counters:?}");
    assert!((2_200..2_800).contains(&counters.reads), "{counters:?}");
    let quiet = rig.handle.phase_stats(Phase::Before);
    assert!((20_000..30_000).contains(&quiet.p99_ns), "{quiet:?}");
    // The device stands still for 10 ms: the commands that were due meanwhile have waited, too.
    rig.handle.set_phase(Phase::During);
    rig.now = rig.now.after_ns(10_000_000);
    rig.run(50_000_000, 5_000);
    let stalled = rig.handle.phase_stats(Phase::During);
    assert!(stalled.max_ns > 9_500_000, "{stalled:?}");
    assert!(stalled.p99_ns > 8_000_000 && stalled.p50_ns < 10_000_000, "{stalled:?}");
}

#[test]
fn a_good_disk_is_found_good() {
    let mut rig = Rig::new(&closed(30), 3_000);
    assert_eq!(rig.run_with(Wrong::Nothing), 0);
    let counters = rig.handle.counters();
    assert!(counters.writes > 10_000 && counters.reads > 3_000, "{counters:?}");
    assert_eq!(rig.handle.ledger().acknowledged(), counters.writes);
    assert_eq!(rig.queue.disk.lock().expect("disk").most, 8, "the whole depth is used, and no more");
    assert!(check(&mut rig.disk(), rig.handle.ledger()).expect("check").is_ok());
    assert!(rig.handle.stats().is_ok());
}

#[test]
fn what_a_disk_does_wrong_is_found_by_reads_or_at_the_end() {
    for wrong in [Wrong::LoseWrite, Wrong::TearWrite, Wrong::MisplaceWrite] {
        let found = (0..4).any(|_| Rig::new(&closed(50), 3_000).run_with(wrong) > 0);
        assert!(found, "{wrong:?} was not found by reads");
        let mut rig = Rig::new(&closed(0), 3_000);
        rig.run(2_000_000, 1000);
        rig.wrong(wrong);
        // One more command only, so that nothing covers it up.
        while rig.queue.disk.lock().expect("disk").wrong != Wrong::Nothing {
            rig.run(1000, 1000);
        }
        rig.drain();
        let comparison = check(&mut rig.disk(), rig.handle.ledger()).expect("check");
        assert!(!comparison.is_ok() && comparison.writes_missing > 0, "{wrong:?}: {comparison:?}");
    }
}

#[test]
fn a_failed_write_is_an_error_and_not_acknowledged() {
    let mut rig = Rig::new(&closed(0), 3_000);
    rig.run_with(Wrong::FailWrite);
    let counters = rig.handle.counters();
    assert_eq!((counters.errors, counters.unknown), (1, 0));
    assert_eq!(rig.handle.ledger().next_seq() - 1, counters.writes + 1);
    assert!(rig.handle.first_error().expect("text").contains("write of block"));
    assert!(!rig.handle.stats().is_ok());
}

#[test]
fn writes_of_unknown_end_hold_their_blocks_until_the_reset() {
    let mut rig = Rig::new(&closed(0), 3_000);
    rig.run_with(Wrong::Die);
    assert!(rig.load.is_dead());
    let unknown = rig.handle.counters().unknown;
    assert!((1..=8).contains(&unknown));
    let busy: u32 = rig.load.core.busy.iter().map(|word| word.count_ones()).sum();
    assert_eq!(u64::from(busy), unknown, "their blocks are held");
    let floor = rig.handle.mark_suspend();
    assert!(floor < rig.handle.ledger().next_seq(), "they count as outstanding");
    assert!(check(&mut rig.disk(), rig.handle.ledger()).expect("check").is_ok(), "done or not, both are good");
    rig.queue.disk.lock().expect("disk").dead = false;
    rig.load.begin(vec![rig.queue.clone()], 8);
    rig.run(20_000_000, 1000);
    rig.drain();
    assert!(check(&mut rig.disk(), rig.handle.ledger()).expect("check").is_ok());
    assert!(rig.handle.stats().is_ok(), "{:?}", rig.handle.stats());
}

#[test]
fn the_suspend_floor_is_the_lowest_write_outstanding() {
    let mut rig = Rig::new(&closed(0), 1_000_000);
    assert_eq!(rig.handle.mark_suspend(), 1);
    rig.load.poll(rig.now, true);
    assert_eq!((rig.load.outstanding(), rig.handle.ledger().next_seq()), (8, 9));
    assert_eq!(rig.handle.mark_suspend(), 1);
    rig.drain();
    assert_eq!(rig.handle.mark_suspend(), 9);
    rig.handle.clear_marks();
    assert_eq!(rig.handle.ledger().suspend_floor(), None);
}

#[test]
fn samples_are_about_the_time_since_the_last() {
    let config = GuestConfig { nsid: 7, rate: 10_000, read_percent: 0, ..GuestConfig::default() };
    let mut rig = Rig::new(&config, 20_000);
    let mut sampler = rig.handle.sampler();
    rig.run(100_000_000, 5_000);
    let sample = sampler.sample();
    assert!((9_900..10_100).contains(&sample.iops) && (20..30).contains(&sample.p50_us), "{sample:?}");
    rig.handle.set_phase(Phase::During);
    rig.drain();
    rig.queue.delay_ns = 200_000;
    rig.load.begin(vec![rig.queue.clone()], 8);
    rig.run(100_000_000, 5_000);
    let sample = sampler.sample();
    assert!((200..220).contains(&sample.p50_us) && (20..30).contains(&sample.p99_before_us), "{sample:?}");
}
