//! Rings between a controller's thread and its host's, in every order that the memory model allows
//! (`RUSTFLAGS="--cfg loom"`): this crate's queues over loom's atomics, against a host that does no more than the
//! specification asks of it: it reads a phase tag before the rest of an entry, and gives a slot back after it has copied it.
//! All else of a controller is its own thread's: a subsystem has one owner.

use crate::queue::{CQE_BYTES, Cq, QueueMemory, Ready, SQE_BYTES, Sq};
use crate::udmq::{CdqMemory, Udmq};
use dray_device::bar::Bar;
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::space::{AddressSpace, SpaceReader};
use dray_nvme::cdq::{UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::registers::{cq_head_doorbell, sq_tail_doorbell};
use dray_nvme::status::Status;
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use zerocopy::{FromBytes, IntoBytes};

const BASE: u64 = 0x10_0000;
const QID: u16 = 1;
/// Bytes of a completion from its first double word to the one with the phase tag.
const CQE_PHASE: usize = 12;
/// Bytes of a change's entry before the word with the phase bit.
const UDMQ_PHASE: usize = 28;

/// Every order with at most `preemptions` points where a thread is stopped although it could go on: for the larger models.
fn bounded(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(check);
}

/// Guest memory of two pages, of which `bytes` of each are used.
fn memory(bytes: usize) -> (Arc<Arena>, SpaceReader) {
    let space = AddressSpace::new(40);
    let memory = DmaBuffer::allocate("model", 2 * PAGE, Pages::Small).expect("memory");
    memory.arena().touch(0, bytes);
    memory.arena().touch(PAGE, bytes);
    space.map_at(BASE, &memory, true).expect("map");
    (Arc::clone(memory.arena()), space.reader())
}

fn bar() -> Arc<Bar> {
    let bar = Bar::new().expect("bar");
    bar.arena().touch(sq_tail_doorbell(QID, 0) as usize, 8);
    Arc::new(bar)
}

fn completion_queue(reader: &SpaceReader, iova: u64, size: u32) -> Cq {
    let memory = QueueMemory::find(reader, iova, size as usize * CQE_BYTES, true).expect("queue");
    Cq::new(memory, QID, size, None)
}

fn completion(n: u32) -> Ready {
    Ready { sqid: QID, cid: n as u16, status: Status::SUCCESS, result: u64::from(n) << 32 | 7 }
}

/// The completion that is the guest's number `n` in a queue of `size`, whole, if it is there.
fn completed(arena: &Arena, at: usize, size: u32, n: u32) -> bool {
    let at = at + (n % size) as usize * CQE_BYTES;
    let dw3 = arena.load32(at + CQE_PHASE, Acquire);
    if (dw3 >> 16 & 1 == 1) != (n / size % 2 == 0) {
        return false;
    }
    let got = (dw3 & 0xffff, arena.load32(at + 8, Relaxed) >> 16, arena.load64(at, Relaxed));
    assert_eq!(got, (n, u32::from(QID), u64::from(n) << 32 | 7), "a completion that is not whole");
    true
}

#[test]
fn a_change_is_in_the_queue_before_the_completion_that_caused_it() {
    loom::model(|| {
        let (arena, reader) = memory(3 * UDMQ_ENTRY_BYTES);
        let cdq = CdqMemory::contiguous(&reader, BASE, 3 * UDMQ_ENTRY_BYTES as u64).expect("queue");
        let mut queue = Udmq::new(7, 5, cdq, 3);
        let mut cq = completion_queue(&reader, BASE + PAGE as u64, 2);
        let bar = bar();
        let _first = queue.start().expect("start");
        let host = {
            let arena = Arc::clone(&arena);
            thread::spawn(move || {
                if completed(&arena, PAGE, 2, 0) {
                    let mut bytes = [0; UDMQ_ENTRY_BYTES];
                    arena.read(UDMQ_ENTRY_BYTES, &mut bytes);
                    let entry = UdmqEntry::read_from_bytes(&bytes).expect("entry");
                    assert!(entry.phase(), "completed before it was logged");
                    assert_eq!((entry.nsid, entry.slba, entry.nlb), (1, 0x2_0000_0003, 4));
                }
            })
        };
        assert_eq!(cq.reserve(&bar), Ok(true));
        let _held = queue.changed(1, 0x2_0000_0003, 5, false);
        let _posted = queue.flush();
        cq.post(&completion(0), 1);
        host.join().expect("host");
    });
}

#[test]
fn changes_are_whole_and_never_written_over_before_they_were_given_back() {
    bounded(3, || {
        const SLOTS: u32 = 4;
        let (arena, reader) = memory(SLOTS as usize * UDMQ_ENTRY_BYTES);
        let cdq = CdqMemory::contiguous(&reader, BASE, u64::from(SLOTS) * UDMQ_ENTRY_BYTES as u64).expect("queue");
        let mut queue = Udmq::new(7, 5, cdq, SLOTS);
        let _first = queue.start().expect("start");
        // The word that carries the head to the controller, as Set Features and its doorbell do.
        let head = Arc::new(Arena::new("head", PAGE, Pages::Small).expect("memory"));
        head.touch(0, 4);
        let host = {
            let (arena, head) = (Arc::clone(&arena), Arc::clone(&head));
            thread::spawn(move || {
                let mut next = 0;
                for _ in 0..5 {
                    let at = (next % SLOTS) as usize * UDMQ_ENTRY_BYTES;
                    let phase = arena.load32(at + UDMQ_PHASE, Acquire) >> 24 & 1 == 1;
                    if phase != (next / SLOTS % 2 == 0) {
                        continue;
                    }
                    let mut bytes = [0; UDMQ_ENTRY_BYTES];
                    arena.read(at, &mut bytes);
                    let entry = UdmqEntry::read_from_bytes(&bytes).expect("entry");
                    let number = u64::from(next);
                    let right = if next == 0 { (0, 0, 0) } else { (1, number << 32, next) };
                    assert_eq!((entry.nsid, entry.slba, entry.nlb), right, "an entry that is not whole");
                    next += 1;
                    head.store32(0, next % SLOTS, Release);
                }
            })
        };
        let mut number = 1u32;
        for _ in 0..5 {
            let _trigger = queue.set_head(head.load32(0, Acquire), None).expect("head");
            let (_, tail, _) = queue.place();
            // With a single free slot the log would end, and the model has no entry for that.
            let used = (tail + SLOTS - queue.feature().1) % SLOTS;
            if used + 3 > SLOTS {
                continue;
            }
            let _held = queue.changed(1, u64::from(number) << 32, u64::from(number) + 1, false);
            let _posted = queue.flush();
            number += 1;
        }
        host.join().expect("host");
    });
}

#[test]
fn a_command_is_whole_when_its_doorbell_is_seen() {
    loom::model(|| {
        let (arena, reader) = memory(2 * SQE_BYTES);
        let memory = QueueMemory::find(&reader, BASE, 2 * SQE_BYTES, false).expect("queue");
        let (mut sq, bar) = (Sq::new(memory, QID, QID, 2, 0), bar());
        let controller = {
            let bar = Arc::clone(&bar);
            thread::spawn(move || {
                sq.look(&bar).expect("doorbell");
                if !sq.is_empty() {
                    assert_eq!(sq.entry(), SubmissionEntry::read(1, 0x3_0000_0001, 8).with_prps(0x77_0000, 0x88_0000));
                }
            })
        };
        let entry = SubmissionEntry::read(1, 0x3_0000_0001, 8).with_prps(0x77_0000, 0x88_0000);
        arena.write(0, entry.as_bytes());
        bar.guest_write32(sq_tail_doorbell(QID, 0), 1);
        controller.join().expect("controller");
    });
}

#[test]
fn completions_are_whole_and_never_written_over_before_they_were_taken() {
    bounded(3, || {
        const SIZE: u32 = 2;
        let (arena, reader) = memory(SIZE as usize * CQE_BYTES);
        let mut cq = completion_queue(&reader, BASE, SIZE);
        let bar = bar();
        let guest = {
            let (arena, bar) = (Arc::clone(&arena), Arc::clone(&bar));
            thread::spawn(move || {
                let mut taken = 0;
                for _ in 0..4 {
                    if completed(&arena, 0, SIZE, taken) {
                        taken += 1;
                        bar.guest_write32(cq_head_doorbell(QID, 0), taken % SIZE);
                    }
                }
                taken
            })
        };
        let mut posted = 0;
        for _ in 0..3 {
            if cq.reserve(&bar).expect("head") {
                cq.post(&completion(posted), 0);
                posted += 1;
            }
        }
        let taken = guest.join().expect("guest");
        let left = completed(&arena, 0, SIZE, taken);
        assert_eq!(taken + u32::from(left), posted, "one is lost or made up");
    });
}
