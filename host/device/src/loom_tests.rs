//! Hand-offs between threads, in every order that the memory model allows (`RUSTFLAGS="--cfg loom"`). What runs here is this
//! crate's own code over loom's atomics; a model's threads only play the parts around it.
//!
//! Not here: event lines, which are the kernel's, and the io_uring rings, whose indices are the `io-uring` crate's.

use crate::bar::{Bar, Control};
use crate::event::EventLine;
use crate::line::Vector;
use crate::memory::{DmaBuffer, PAGE, Pages};
use crate::poll::{Jobs, Pending};
use crate::slot::{Connector, Fence, Port, Slot};
use crate::space::AddressSpace;
use dray_nvme::registers::{Cc, offset};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const BELL: u32 = offset::DOORBELLS;

/// A slot whose port a source controller has, and that controller's end.
fn slot_at_source() -> (Slot, Connector, Port) {
    let slot = Slot::new(AddressSpace::default(), 0).expect("slot");
    let mut source = Connector::new();
    slot.point_at(&source.plug());
    let port = source.poll().flatten().expect("port");
    port.bar().arena().touch(0, 0x40);
    port.bar().arena().touch(BELL as usize, 16);
    (slot, source, port)
}

fn enable(value: bool) -> u32 {
    Cc::new().with_en(value).into_bits()
}

#[test]
fn the_controller_that_comes_finds_the_doorbells_rung_before_and_in_between() {
    loom::model(|| {
        let (slot, mut source, running) = slot_at_source();
        let mut destination = Connector::new();
        let (plug, bell) = (destination.plug(), slot.function().doorbell(BELL).expect("doorbell"));
        slot.function().write32(offset::CC, enable(true));
        running.bar().store32(offset::CSTS, 1);
        bell.ring(1);
        let guest = thread::spawn(move || bell.ring(2));
        let taker = thread::spawn(move || {
            // The destination polls while the slot is pointed at it: it has nothing or the whole port.
            let early = destination.poll().flatten();
            if let Some(port) = &early {
                assert!(port.is_current(), "it got a port that is not its own");
                assert!(port.was_running(), "it would begin anew");
                assert!(port.bar().load32(BELL) >= 1, "a doorbell from before the hand-over is lost");
            }
            (destination, early)
        });
        slot.point_at(&plug);
        guest.join().expect("guest");
        let (mut destination, early) = taker.join().expect("destination");
        let late = destination.poll().flatten();
        assert_ne!(early.is_some(), late.is_some(), "told once");
        let port = early.or(late).expect("port");
        assert_eq!(port.bar().load32(BELL), 2, "a doorbell rung in between is lost");
        assert!(source.poll().expect("told").is_none(), "the source has lost it");
    });
}

#[test]
fn whoever_sees_what_came_after_the_hand_over_sees_that_the_port_is_gone() {
    loom::model(|| {
        let (slot, _source, port) = slot_at_source();
        let destination = Connector::new();
        let bell = slot.function().doorbell(BELL).expect("doorbell");
        let old = thread::spawn(move || {
            let rung = port.bar().load32(BELL);
            assert!(rung == 0 || !port.is_current(), "the old controller would fetch what was rung for the new one");
        });
        slot.point_at(&destination.plug());
        bell.ring(7);
        old.join().expect("old controller");
    });
}

#[test]
fn a_controller_ends_with_the_port_that_the_slot_gave_last() {
    loom::model(|| {
        let (slot, mut source, _port) = slot_at_source();
        let destination = Connector::new();
        let (there, back) = (destination.plug(), source.plug());
        let polling = thread::spawn(move || {
            let mut last = None;
            for _ in 0..2 {
                last = source.poll().or(last);
            }
            (source, last)
        });
        // A move and its undo.
        slot.point_at(&there);
        slot.point_at(&back);
        let (mut source, last) = polling.join().expect("source");
        let port = source.poll().or(last).flatten().expect("the port came back");
        assert!(port.is_current(), "it kept a port of before");
    });
}

#[test]
fn a_fence_that_was_lowered_before_the_way_back_is_not_seen_up() {
    loom::model(|| {
        let (slot, mut source, _port) = slot_at_source();
        let (fence, away) = (Fence::new(true), Connector::new());
        slot.point_at(&away.plug());
        let _gone = source.poll();
        let (seen, back) = (fence.clone(), source.plug());
        let polling = thread::spawn(move || {
            if let Some(Some(_port)) = source.poll() {
                assert!(!seen.is_up(), "it would refuse the guest that was given back to it");
            }
        });
        fence.lower();
        slot.point_at(&back);
        polling.join().expect("source");
    });
}

#[test]
fn a_fence_that_was_raised_before_a_doorbell_stops_its_commands() {
    loom::model(|| {
        let (slot, _connector, port) = slot_at_source();
        let (fence, bell) = (Fence::new(false), slot.function().doorbell(BELL).expect("doorbell"));
        let seen = fence.clone();
        let polling = thread::spawn(move || {
            assert!(port.bar().load32(BELL) == 0 || seen.is_up(), "it would fetch behind the fence");
        });
        fence.raise();
        bell.ring(1);
        polling.join().expect("controller");
    });
}

#[test]
fn a_fall_of_enable_is_one_reset_and_never_undoes_the_next_enable() {
    loom::model(|| {
        let (slot, _connector, port) = slot_at_source();
        port.bar().guest_write32(offset::CC, enable(true));
        let mut seen = port.bar().control_if_changed(Control::default()).expect("enabled");
        port.bar().store32(offset::CSTS, 1);
        let function = slot.function();
        let guest = thread::spawn(move || {
            function.write32(offset::CC, enable(false));
            // The guest waits as the specification asks (Base 2.3 §3.7.2), but not for ever: loom tries every order anyway.
            if function.read32(offset::CSTS) & 1 == 0 {
                function.write64(offset::ASQ, 0x5000_6000);
                function.write32(offset::CC, enable(true));
                return true;
            }
            false
        });
        let mut resets = 0;
        let mut poll = |port: &Port| {
            let Some(now) = port.bar().control_if_changed(seen) else { return };
            let enabled = seen.cc & 1 == 1;
            if now.resets != seen.resets || enabled && now.cc & 1 == 0 {
                resets += 1;
                port.bar().store32(offset::CSTS, 0);
            }
            if now.cc & 1 == 1 {
                assert_eq!(port.bar().load64(offset::ASQ), 0x5000_6000, "enabled with the queue of before");
                port.bar().store32(offset::CSTS, 1);
            }
            seen = now;
        };
        poll(&port);
        poll(&port);
        let again = guest.join().expect("guest");
        poll(&port);
        poll(&port);
        assert_eq!((resets, seen.resets, seen.cc & 1 == 1), (1, 1, again));
    });
}

#[test]
fn a_fall_and_rise_between_two_polls_is_noticed() {
    loom::model(|| {
        let bar = Arc::new(Bar::new().expect("bar"));
        bar.arena().touch(0, 0x40);
        bar.guest_write32(offset::CC, enable(true));
        let mut seen = bar.control_if_changed(Control::default()).expect("enabled");
        let guest = {
            let bar = Arc::clone(&bar);
            thread::spawn(move || {
                bar.guest_write32(offset::CC, enable(false));
                bar.guest_write32(offset::CC, enable(true));
            })
        };
        let mut fell = 0;
        for last in [false, true] {
            if last {
                guest.join().expect("guest");
                let now = bar.control_if_changed(seen);
                fell += u32::from(now.is_some_and(|now| now.resets != seen.resets));
                break;
            }
            if let Some(now) = bar.control_if_changed(seen) {
                fell += now.resets - seen.resets;
                seen = now;
            }
        }
        assert_eq!(fell, 1);
    });
}

#[test]
fn what_was_mapped_before_the_doorbell_is_found_by_who_sees_the_doorbell() {
    loom::model(|| {
        let (slot, _connector, port) = slot_at_source();
        let mut reader = port.space().reader();
        let memory = DmaBuffer::allocate("data", PAGE, Pages::Small).expect("memory");
        memory.arena().touch(0, 4);
        let controller = thread::spawn(move || {
            if port.bar().load32(BELL) == 1 {
                assert!(reader.refresh());
                let segment = reader.translate(0x10_0000, 4, false).expect("mapped before it was rung");
                assert_eq!(segment.arena().load32(0, Ordering::Relaxed), 9, "written before it was rung");
            }
        });
        memory.arena().write(0, &9u32.to_le_bytes());
        slot.space().map_at(0x10_0000, &memory, true).expect("map");
        slot.function().doorbell(BELL).expect("doorbell").ring(1);
        controller.join().expect("controller");
    });
}

#[test]
fn a_signal_reaches_the_line_that_comes_meanwhile() {
    loom::model(|| {
        let (vector, line) = (Arc::new(Vector::new(None)), EventLine::new().expect("line"));
        let controller = {
            let vector = Arc::clone(&vector);
            thread::spawn(move || vector.signal())
        };
        vector.set(Some(line.clone()));
        controller.join().expect("controller");
        assert!(!vector.is_pending() && line.take() == 1, "an interrupt is lost");
    });
}

/// Memory is unmapped while a reader is in the midst of an operation on it; what the unmapper then writes stays.
fn unmapped_while_in_use(reader_goes: bool, another_strikes_it: bool) {
    loom::model(move || {
        let space = AddressSpace::default();
        let memory = DmaBuffer::allocate("data", PAGE, Pages::Small).expect("memory");
        memory.arena().touch(0, 4);
        space.map_at(0x10_0000, &memory, true).expect("map");
        let mut reader = space.reader();
        let device = thread::spawn(move || {
            if let Some(segment) = reader.translate(0x10_0000, 4, true) {
                segment.write(&1u32.to_le_bytes());
            }
            if reader_goes {
                drop(reader);
                return None;
            }
            reader.refresh();
            reader.release(reader.generation());
            Some(reader)
        });
        let other = another_strikes_it.then(|| {
            let space = space.clone();
            thread::spawn(move || drop(space.reader()))
        });
        let unmapping = space.unmap(0x10_0000).expect("unmap");
        // Asked twice with a turn for the others in between: loom does not stop a thread before every load by itself.
        let done = unmapping.is_done() || {
            thread::yield_now();
            unmapping.is_done()
        };
        if done {
            memory.arena().write(0, &2u32.to_le_bytes());
        }
        let left = device.join().expect("device");
        other.map(|other| other.join().expect("other"));
        let value = memory.arena().load32(0, Ordering::Relaxed);
        assert!(!done || value == 2, "the device wrote after the unmap was done");
        if let Some(mut reader) = left {
            assert_eq!(reader.refresh(), !unmapping.is_done());
            reader.release(reader.generation());
        }
        assert!(unmapping.is_done(), "an unmap that never ends");
    });
}

#[test]
fn an_unmap_is_done_when_the_reader_has_ended_its_operations() {
    unmapped_while_in_use(false, false);
}

#[test]
fn an_unmap_is_done_when_the_reader_has_gone() {
    unmapped_while_in_use(true, false);
}

#[test]
fn an_unmap_is_done_when_the_reader_has_gone_and_another_came() {
    unmapped_while_in_use(true, true);
}

/// Runs each job on a thread of its own.
#[derive(Default)]
struct ThreadJobs(Vec<thread::JoinHandle<()>>);

impl Jobs for ThreadJobs {
    fn run(&mut self, work: Box<dyn FnOnce() + Send>) {
        self.0.push(thread::spawn(work));
    }
}

#[test]
fn an_answer_comes_once_and_is_never_taken_for_lost() {
    loom::model(|| {
        let mut jobs = ThreadJobs::default();
        let mut pending = Pending::start(&mut jobs, || 7);
        let mut answer = None;
        for _ in 0..2 {
            assert!(answer.is_some() || !pending.is_lost(), "lost while the answer is on its way");
            answer = answer.or(pending.poll());
        }
        jobs.0.drain(..).for_each(|job| job.join().expect("job"));
        assert_eq!(answer.or(pending.poll()), Some(7));
        assert_eq!(pending.poll(), None);
    });
}

/// A worker that ends without running its jobs.
#[derive(Default)]
struct DeadJobs(Vec<thread::JoinHandle<()>>);

impl Jobs for DeadJobs {
    fn run(&mut self, work: Box<dyn FnOnce() + Send>) {
        self.0.push(thread::spawn(move || drop(work)));
    }
}

#[test]
fn a_job_that_was_dropped_is_seen_as_lost() {
    loom::model(|| {
        let mut jobs = DeadJobs::default();
        let mut pending = Pending::start(&mut jobs, || 7);
        assert_eq!(pending.poll(), None);
        jobs.0.drain(..).for_each(|job| job.join().expect("job"));
        assert!(pending.is_lost());
    });
}
