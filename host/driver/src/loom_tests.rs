//! Rings and notes between threads, in every order that the memory model allows (`RUSTFLAGS="--cfg loom"`): this crate's rings
//! over loom's atomics, against a device that does no more than the specification asks of it: it writes an entry's other
//! words in any order, its phase tag last, and looks at a doorbell before it reads what was announced.
//!
//! The reader of a lent queue has the same [`Entries`]; its socket is the kernel's.

use crate::cdq::CdqFormat;
use crate::entries::Entries;
use crate::error::Fault;
use crate::link::{Link, PairShared};
use crate::queue::QueuePair;
use crate::ring::{Ring, RingShape};
use dray_device::command::Completion;
use dray_device::function::Doorbell;
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::poll::Time;
use dray_device::space::AddressSpace;
use dray_nvme::command::SubmissionEntry;
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Every order with at most `preemptions` points where a thread is stopped although it could go on: for the larger models.
fn bounded(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(check);
}

fn memory(bytes: usize) -> Arc<Arena> {
    let arena = Arena::new("model", PAGE, Pages::Small).expect("memory");
    arena.touch(0, bytes);
    arena
}

const QID: u16 = 1;
/// Bytes of both queues of two entries: the completion queue begins a page behind the submission queue.
const SHAPE: RingShape = RingShape { entries: 2, max_transfer: PAGE };

/// A queue pair of one command, its memory, its doorbells and memory for data.
struct Pair {
    pair: QueuePair,
    shared: Arc<PairShared>,
    device: Device,
    data: DmaBuffer,
}

/// What the device sees.
struct Device {
    queues: Arc<Arena>,
    bells: Arc<Arena>,
    data: Arc<Arena>,
}

fn pair() -> Pair {
    let space = AddressSpace::default();
    let queues = SHAPE.memory(&space, Pages::Small).expect("queues");
    queues.arena().touch(0, 128);
    queues.arena().touch(PAGE, 32);
    let data = DmaBuffer::new(memory(4), 0, PAGE).expect("data");
    space.map(&data, true).expect("map");
    let bells = memory(8);
    let bell = |offset| Doorbell::Mapped { arena: Arc::clone(&bells), offset };
    let device =
        Device { queues: Arc::clone(queues.arena()), bells: Arc::clone(&bells), data: Arc::clone(data.arena()) };
    let ring = Ring::new(QID, SHAPE, queues, [bell(0), bell(4)], &space);
    let shared = Arc::new(PairShared::new(QID, Arc::default()));
    let pair = QueuePair::new(ring, Arc::clone(&shared), 0, u64::MAX, None);
    Pair { pair, shared, device, data }
}

impl Device {
    /// Takes command number `n` if it was announced, moves its data and completes it.
    fn serve(&self, n: u32) -> bool {
        if self.bells.load32(0, Acquire) != (n + 1) % 2 {
            return false;
        }
        let at = (n % 2) as usize * 64;
        let (cdw0, slba) = (self.queues.load32(at, Relaxed), self.queues.load64(at + 40, Relaxed));
        assert_eq!((cdw0 & 0xff, slba), (2, 0x1_0000_0000 + u64::from(n)), "not the command that was announced");
        self.data.write(0, &(n + 100).to_le_bytes());
        self.complete(n, cdw0 >> 16);
        true
    }

    fn complete(&self, n: u32, cid: u32) {
        let at = PAGE + (n % 2) as usize * 16;
        let phase = u32::from(n / 2 % 2 == 0);
        self.queues.store32(at + 8, (n + 1) % 2 | u32::from(QID) << 16, Relaxed);
        self.queues.store64(at, u64::from(n) << 32 | 7, Relaxed);
        self.queues.store32(at + 12, cid | phase << 16, Release);
    }
}

impl Pair {
    fn submit(&mut self, n: u32) {
        let read = SubmissionEntry::read(1, 0x1_0000_0000 + u64::from(n), 1);
        let data = self.data.part(0, 4).expect("part");
        self.pair.submit(Time(0), &read, &[data], u64::from(n)).expect("room");
        self.pair.commit();
    }

    fn poll(&mut self) -> Option<Completion> {
        let mut found = None;
        self.pair.poll_with(Time(0), |completion| assert!(found.replace(completion).is_none(), "completed twice"));
        found
    }

    /// The completion is whole, and so is the data that it stands for.
    fn check(&self, completion: Completion, n: u32) {
        assert_eq!((completion.tag, completion.result), (u64::from(n), u64::from(n) << 32 | 7));
        assert!(!completion.unknown && !completion.status.is_error());
        assert_eq!(self.data.arena().load32(0, Relaxed), n + 100, "completed before its data was there");
    }
}

#[test]
fn commands_and_completions_are_whole_through_two_passes_of_the_ring() {
    bounded(3, || {
        let mut host = pair();
        let Device { queues, bells, data } = &host.device;
        let device = Device { queues: Arc::clone(queues), bells: Arc::clone(bells), data: Arc::clone(data) };
        host.submit(0);
        let served = thread::spawn(move || {
            let mut n = 0;
            for _ in 0..3 {
                n += u32::from(device.serve(n));
            }
            (device, n)
        });
        let mut done = 0;
        for _ in 0..3 {
            if let Some(completion) = host.poll() {
                host.check(completion, done);
                done += 1;
                host.submit(done);
            }
        }
        let (device, n) = served.join().expect("device");
        // Whatever was not served or seen meanwhile ends now.
        let left = n == done && device.serve(n);
        let late = host.poll();
        assert_eq!(late.is_some(), left || n > done);
        if let Some(completion) = late {
            host.check(completion, done);
        }
    });
}

#[test]
fn a_completion_keeps_its_outcome_when_the_queue_dies_behind_it() {
    loom::model(|| {
        let mut host = pair();
        host.submit(0);
        let Device { queues, bells, data } = &host.device;
        let device = Device { queues: Arc::clone(queues), bells: Arc::clone(bells), data: Arc::clone(data) };
        let shared = Arc::clone(&host.shared);
        let driver = thread::spawn(move || {
            assert!(device.serve(0));
            // The controller was disabled: nothing more comes.
            shared.kill();
        });
        let early = host.poll();
        driver.join().expect("driver");
        let completion = early.or_else(|| host.poll()).expect("a command that never ends");
        assert!(!completion.unknown, "a command that had ended was given up");
        host.check(completion, 0);
        assert!(host.poll().is_none() && host.pair.outstanding() == 0);
    });
}

#[test]
fn a_dead_queue_stays_dead_whatever_is_found_meanwhile() {
    loom::model(|| {
        let shared = Arc::new(PairShared::new(QID, Arc::default()));
        let pair = Arc::clone(&shared);
        let finder = thread::spawn(move || pair.note_fault(Fault::UnknownCommand { cid: 1 }));
        shared.kill();
        finder.join().expect("pair");
        assert!(shared.is_dead() && !shared.is_live());
    });
}

/// A pair tells its driver something; what the driver has found after its last look, in the end.
fn told(tell: fn(&PairShared)) {
    loom::model(move || {
        let link = Arc::new(Link::default());
        let shared = Arc::new(PairShared::new(QID, Arc::clone(&link)));
        let pair = Arc::clone(&shared);
        let telling = thread::spawn(move || tell(&pair));
        // As the driver attends: it looks at the notes when there were calls it has not heard, and only then.
        let (mut heard, mut found) = (0, 0);
        let mut attend = || {
            let calls = link.calls();
            if calls != heard {
                heard = calls;
                let notes = shared.take_notes();
                let fault = notes.fault.is_some();
                assert!(!fault || !shared.is_live(), "a queue with a fault still takes commands");
                found += notes.aborts.len() + usize::from(fault) + usize::from(shared.is_abandoned());
            }
        };
        attend();
        attend();
        telling.join().expect("pair");
        attend();
        assert_eq!(found, 1, "called, and nothing was there");
    });
}

#[test]
fn an_abort_is_found_by_the_driver_that_hears_the_call() {
    told(|pair| pair.note_abort(3));
}

#[test]
fn a_fault_is_found_by_the_driver_that_hears_the_call() {
    told(|pair| pair.note_fault(Fault::UnknownCommand { cid: 9 }));
}

#[test]
fn an_abandoned_pair_is_found_by_the_driver_that_hears_the_call() {
    told(PairShared::abandon);
}

/// Entries of two words: a number, and one with the phase tag in its top byte.
const FORMAT: CdqFormat = CdqFormat { entry_bytes: 8, phase_byte: 7, phase_mask: 1 };

/// A controller data queue of two slots and the word that carries its head back (Set Features 21h).
struct Cdq {
    ring: Arc<Arena>,
    head: Arc<Arena>,
    posted: u32,
}

impl Cdq {
    const SLOTS: u32 = 2;

    /// Posts the next entry if a slot is free; one slot always stays so.
    fn post(&mut self) {
        let used = (self.posted % Self::SLOTS + Self::SLOTS - self.head.load32(0, Acquire)) % Self::SLOTS;
        if used + 1 < Self::SLOTS {
            let at = (self.posted % Self::SLOTS) as usize * 8;
            let phase = u32::from(self.posted / Self::SLOTS % 2 == 0);
            self.ring.store32(at, 100 + self.posted, Relaxed);
            self.ring.store32(at + 4, phase << 24, Release);
            self.posted += 1;
        }
    }
}

#[test]
fn entries_of_a_data_queue_are_whole_and_never_written_over_before_they_were_given_back() {
    bounded(3, || {
        let (ring, head) = (memory(16), memory(4));
        let mut entries = Entries::new(Arc::clone(&ring), 0, Cdq::SLOTS, FORMAT, 0);
        let mut cdq = Cdq { ring, head: Arc::clone(&head), posted: 0 };
        let device = thread::spawn(move || {
            (0..4).for_each(|_| cdq.post());
            cdq
        });
        let mut numbers = Vec::new();
        let mut take = |head: &Arena| {
            let mut bytes = Vec::new();
            let waiting = entries.any();
            let count = entries.take(2, &mut bytes) as u32;
            assert!(count > 0 || !waiting, "what waited is gone");
            numbers.extend(bytes.chunks(8).map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])));
            assert!(entries.give_back(count));
            head.store32(0, entries.head(), Release);
        };
        for _ in 0..3 {
            take(&head);
        }
        let cdq = device.join().expect("device");
        take(&head);
        assert_eq!(numbers, (100..100 + cdq.posted).collect::<Vec<_>>());
        assert!(entries.is_drained());
    });
}

#[test]
fn a_head_from_a_second_reader_is_believed_once_its_entries_are_seen() {
    loom::model(|| {
        let (ring, frames) = (memory(16), memory(4));
        let mut owner = Entries::new(Arc::clone(&ring), 0, Cdq::SLOTS, FORMAT, 0);
        let mut reader = Entries::new(Arc::clone(&ring), 0, Cdq::SLOTS, FORMAT, 0);
        let mut cdq = Cdq { ring, head: memory(4), posted: 0 };
        let sent = Arc::clone(&frames);
        let second = thread::spawn(move || {
            let count = reader.take(1, &mut Vec::new()) as u32;
            assert!(reader.give_back(count));
            // The socket orders as a release and an acquire do.
            sent.store32(0, reader.head(), Release);
        });
        let device = thread::spawn(move || cdq.post());
        let head = frames.load32(0, Acquire);
        assert!(owner.accept_head(head), "an honest reader was sent away");
        second.join().expect("reader");
        device.join().expect("device");
        assert!(owner.accept_head(frames.load32(0, Acquire)));
    });
}
