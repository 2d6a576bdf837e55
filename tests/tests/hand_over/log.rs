//! The log of written pages, against a shadow copy of the memory.

use crate::rig::{End, PATIENCE, Place, Vm, bring, carry, connect, go, refusal, stream};
use dray_device::command::CommandQueue;
use dray_device::function::Function;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::space::AddressSpace;
use dray_device::vfio_user::wire::{LogRange, errno, state};
use dray_driver::{AdminData, Driver, DriverConfig, QueuePair, QueuePairConfig};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

/// A machine without a guest: a driver and an I/O queue by hand, so that every write to its memory is known.
struct Bare {
    end: End,
    driver: Driver,
    queue: QueuePair,
    memory: DmaBuffer,
    iova: u64,
    begun: Instant,
}

impl Bare {
    fn boot(place: &Place, space: &AddressSpace) -> Self {
        let memory = DmaBuffer::allocate("machine", 4 << 20, Pages::Small).expect("memory");
        let iova = space.map(&memory, true).expect("mapped");
        let end = connect(place, "source", space);
        let mut driver = Driver::new(Arc::clone(&end) as Arc<dyn Function>, DriverConfig::default()).expect("a driver");
        let begun = Instant::now();
        let now = || Time(begun.elapsed().as_nanos() as u64);
        let mut ticket = None;
        let queue = loop {
            let _progress = driver.poll(now());
            assert!(begun.elapsed() < PATIENCE, "no queue");
            match &ticket {
                None if driver.is_ready() => {
                    ticket = driver.create_queue_pair(now(), QueuePairConfig { entries: 64, vector: None }).ok();
                }
                None => {}
                Some(asked) => {
                    if let Some(pair) = driver.queue_pair(asked) {
                        break pair.expect("a queue");
                    }
                }
            }
        };
        Self { end, driver, queue, memory, iova, begun }
    }

    fn now(&self) -> Time {
        Time(self.begun.elapsed().as_nanos() as u64)
    }

    /// Reads a block of the namespace into a page of the memory.
    #[track_caller]
    fn read(&mut self, block: u64, page: usize) {
        let data = self.memory.part(page * 4096, 4096).expect("a page");
        self.queue.submit(self.now(), &SubmissionEntry::read(1, block, 1), &[data], 7).expect("submitted");
        self.queue.commit();
        let (mut over, end) = (false, Instant::now() + PATIENCE);
        while !over {
            let now = self.now();
            self.queue.poll(now, &mut |completion| {
                assert!(!completion.status.is_error(), "{completion:?}");
                over = true;
            });
            let _progress = self.driver.poll(now);
            assert!(Instant::now() < end, "it does not end");
            std::thread::yield_now();
        }
    }

    /// An admin command that returns data to the driver's own memory.
    fn identify(&mut self) {
        let entry = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
        let ticket = self.driver.request(self.now(), &entry, AdminData::In(4096)).expect("asked");
        let end = Instant::now() + PATIENCE;
        loop {
            let now = self.now();
            let _progress = self.driver.poll(now);
            if self.driver.answer(ticket).is_some() {
                return;
            }
            assert!(Instant::now() < end, "no answer");
        }
    }
}

/// Every page of a machine's memory, by address.
fn pages(space: &AddressSpace) -> Vec<(u64, Vec<u8>)> {
    let reader = space.reader();
    let mut pages = Vec::new();
    for mapping in reader.mappings() {
        for at in (0..mapping.memory.len()).step_by(4096) {
            let mut bytes = vec![0; 4096];
            mapping.memory.part(at, 4096).expect("a page").read(&mut bytes);
            pages.push((mapping.iova + at as u64, bytes));
        }
    }
    pages
}

/// What the log says was written, of the whole memory.
fn logged(end: &End, space: &AddressSpace) -> Vec<u64> {
    let ranges: Vec<_> = space.reader().mappings().iter().map(|mapping| (mapping.iova, mapping.memory.len() as u64)).collect();
    let mut pages = Vec::new();
    for (iova, len) in ranges {
        let bits = end.logging_report(iova, len, 4096).expect("a report");
        pages.extend((0..len / 4096).filter(|bit| bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1).map(|bit| iova + bit * 4096));
    }
    pages
}

#[test]
fn the_log_has_the_pages_that_the_controller_wrote_and_no_others() {
    let place = Place::new("log");
    let image: Vec<u8> = (0..8usize << 20).map(|at| (at / 4096 * 7 + at % 251 + 1) as u8).collect();
    std::fs::write(place.0.join("source.img"), image).expect("a disk");
    let running = place.start();
    let space = AddressSpace::default();
    let mut machine = Bare::boot(&place, &space);
    let end = Arc::clone(&machine.end);
    machine.read(3, 0);
    assert!(end.logging_report(machine.iova, 4096, 4096).is_err(), "it is not on");
    assert_eq!(end.logging_start(4096, &[]).expect("on"), 4096);
    assert_eq!(logged(&end, &space), [0; 0], "nothing since");
    let mut random = fastrand::Rng::with_seed(4);
    for turn in 0..6 {
        let before = pages(&space);
        let mut wanted = BTreeSet::new();
        for _ in 0..1 + turn * 20 {
            // Each page once: what is read twice alike would not show in the shadow.
            let page = random.usize(turn * 160..turn * 160 + 160);
            if wanted.insert(machine.iova + page as u64 * 4096) {
                machine.read(random.u64(0..2048), page);
            }
        }
        if turn % 2 == 1 {
            machine.identify();
        }
        if turn == 5 {
            // What is told after the stop is all there is.
            go(&end, state::STOP);
        }
        let told = logged(&end, &space);
        let changed: Vec<u64> =
            before.iter().zip(pages(&space)).filter(|(old, new)| old.1 != new.1).map(|(old, _)| old.0).collect();
        // The processor wrote some of what has changed: commands. The machine's own memory only the controller writes.
        let own = machine.iova..machine.iova + machine.memory.len() as u64;
        let (data, queues): (Vec<u64>, Vec<u64>) = told.iter().partition(|at| own.contains(at));
        let shadow: Vec<u64> = changed.iter().copied().filter(|at| own.contains(at)).collect();
        assert_eq!(data, shadow, "turn {turn}");
        assert_eq!(data, wanted.into_iter().collect::<Vec<_>>(), "turn {turn}");
        // Completion queues, and the page of an admin command's data: each has changed, and the submission queues are not told.
        assert!(
            !queues.is_empty() && queues.iter().all(|at| changed.contains(at) || turn % 2 == 1),
            "turn {turn}: {queues:x?} {changed:x?}"
        );
        assert!(changed.len() > shadow.len() + queues.len().min(1), "the shadow saw submission queues too");
        assert_eq!(logged(&end, &space), [0; 0], "told once");
    }
    assert_eq!(refusal(end.logging_start(4096, &[])), errno::EBUSY, "it is on");
    go(&end, state::RUNNING);
    // In more pieces than one report of the controller has room for.
    (0..300).for_each(|page| machine.read(5, 2 * page));
    let bits = end.logging_report(machine.iova, 4 << 20, 4096).expect("a report");
    assert!((0..1024).all(|page| (bits[page / 8] >> (page % 8) & 1 == 1) == (page % 2 == 0 && page < 600)));
    end.logging_stop().expect("off");
    // Ranges, larger pages, and memory that is mapped later.
    let ranges = [LogRange { iova: machine.iova, length: 2 << 20 }];
    assert_eq!(end.logging_start(1 << 16, &ranges).expect("on"), 1 << 16);
    machine.read(1, 17);
    machine.read(1, 600);
    let bits = end.logging_report(machine.iova, 4 << 20, 1 << 16).expect("a report");
    // Bit 1 is page 17; what is beyond the ranges is not logged.
    assert_eq!((bits[0], bits[1..].iter().any(|byte| *byte != 0)), (2, false), "{bits:?}");
    end.logging_stop().expect("off");
    assert_eq!(end.logging_start(4096, &[]).expect("on"), 4096);
    let more = DmaBuffer::allocate("more", 8192, Pages::Small).expect("memory");
    let at = space.map(&more, true).expect("mapped");
    for _ in 0..2 {
        assert_eq!(end.logging_report(at, 8192, 4096).expect("a report")[0], 3, "memory that is not tracked counts as written");
    }
    // A client that leaves takes its log along; a machine that is stopped cannot begin one.
    drop((machine, end));
    let machine = Bare::boot(&place, &AddressSpace::default());
    go(&machine.end, state::STOP);
    assert_eq!(refusal(machine.end.logging_start(4096, &[])), errno::EBUSY);
    go(&machine.end, state::RUNNING);
    machine.end.logging_start(4096, &[]).expect("on");
    drop(machine);
    running.stop();
}

#[test]
fn the_log_goes_on_through_a_migration() {
    let place = Place::new("log-moves");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    source.logging_start(4096, &[]).expect("on");
    vm.goes_on(50);
    go(&source, state::PRE_COPY);
    for _ in 0..5 {
        vm.goes_on(50);
        assert!(!logged(&source, &vm.space).is_empty());
    }
    vm.handle.mark_suspend();
    vm.pause();
    // The processor stands still: from here on what changes in memory is the controller's.
    let before = pages(&vm.space);
    go(&source, state::STOP_COPY);
    let last: BTreeSet<u64> = logged(&source, &vm.space).into_iter().collect();
    let changed = before.iter().zip(pages(&vm.space)).filter(|(old, new)| old.1 != new.1).map(|(old, _)| old.0);
    let missing: Vec<u64> = changed.filter(|at| !last.contains(at)).collect();
    assert!(missing.is_empty(), "written by the controller and not told: {missing:x?}");
    let carried = stream(&source, 4_096);
    assert_eq!(logged(&source, &vm.space), [0; 0], "a device that is stopped writes nothing");
    let destination = connect(&place, "destination", &vm.space);
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 4_096);
    go(&destination, state::RUNNING);
    vm.goes_to(&destination);
    vm.handle.mark_resume();
    vm.unpause();
    source.logging_stop().expect("off");
    vm.goes_on(50);
    // And back, to an end that has been stopped since, with a log at the other.
    destination.logging_start(4096, &[]).expect("on");
    go(&source, state::RESUMING);
    go(&destination, state::PRE_COPY);
    vm.goes_on(20);
    assert!(!logged(&destination, &vm.space).is_empty());
    let carried = carry(&vm, 4_096);
    bring(&source, &carried, 4_096);
    go(&source, state::RUNNING);
    vm.goes_to(&source);
    vm.handle.mark_resume();
    vm.unpause();
    vm.goes_on(50);
    vm.stop();
    running.stop();
    place.verify("source");
}
