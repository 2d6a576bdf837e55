//! A namespace's backing is exchanged for its copy while the guest before the same controller writes, reads and resets: software
//! controller, polled driver and migration together, in one thread under a made-up clock.
#![allow(missing_docs)]

use dray_controller::{Refused, Subsystem};
use dray_device::backing::Backing;
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::space::AddressSpace;
use dray_driver::Driver;
use dray_migration::media_move::desk::desk;
use dray_migration::media_move::{Clerk, CopyOf, Declined};
use dray_migration::mmc::Health;
use dray_migration::{
    BackingQueue, BackingShelf, DriverMmc, FenceControl, GuestSample, GuestView, LocalDestination, MediaIngredients, Migration,
    Mmc, Outcome, Owner, Phase, Reason, Record, RecordPhase, Refusal, Report, Step, recover,
};
use dray_nvme::registers::offset;
use dray_tests::disk::Disk;
use dray_tests::paper::Paper;
use dray_tests::plan::{Plan, natives};
use dray_tests::rig::{IO_QUEUES, MANAGEMENT, MIGRATABLE, NSID, Side};
use dray_workload::guest::{Guest, GuestHandle, GuestStage};
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::verify;
use std::sync::Arc;

const PATIENCE_US: u64 = 120_000_000;
/// NSID of the copy on its shelf.
const COPY: u32 = 40;
const ENDS: [[u8; 16]; 2] = [[0xa; 16], [0xb; 16]];

struct Gate(Vec<Fence>);

impl FenceControl for Gate {
    fn raise(&mut self, end: Owner) {
        assert_eq!(end, Owner::Source);
        self.0.iter().for_each(Fence::raise);
    }
    fn lower(&mut self, end: Owner) {
        assert_eq!(end, Owner::Source);
        self.0.iter().for_each(Fence::lower);
    }
}

struct NoFigures;

impl GuestView for NoFigures {
    fn sample(&mut self) -> GuestSample {
        GuestSample::default()
    }
}

/// One subsystem, its guest, and two disks that its namespace may be on.
struct House {
    now: Time,
    subsystem: Subsystem,
    /// Of each migratable controller: the first is the guest's, nobody has the others.
    fences: Vec<Fence>,
    slot: Slot,
    guest: Guest,
    handle: GuestHandle,
    disks: [Disk; 2],
    /// Which of them the namespace is on.
    on: usize,
    manager: Option<Box<dyn Mmc>>,
    space: AddressSpace,
    migration: Option<Migration>,
    clerk: Option<Clerk>,
    shelf: Option<BackingShelf>,
    /// The other disk's backing, between moves.
    spare: Option<Box<dyn Backing>>,
    paper: Paper,
    plan: Plan,
    report: Report,
    /// Polls of the subsystem for which it declines exchanges.
    declines: u32,
    fetched: u64,
    random: fastrand::Rng,
}

impl House {
    fn new(plan: Plan) -> Self {
        let disk = |salt| Disk::new(plan.seed ^ salt, plan.bytes, plan.block_bytes, plan.latency_ns);
        let disks = [disk(0x51), disk(0xd2)];
        disks[0].fill_noise(plan.seed);
        disks[1].fill(0xa5);
        let mut side = Side::over(disks[0].backing());
        for other in 1..plan.guests {
            side = side.and_controller(MIGRATABLE + other, vec![NSID]);
        }
        let fences = (0..plan.guests).map(|guest| side.fence(MIGRATABLE + guest)).collect();
        let subsystem = Subsystem::new(side.config, side.namespaces).expect("a subsystem");
        let front = |cntlid, vectors| {
            let slot = Slot::new(AddressSpace::default(), vectors).expect("a slot");
            slot.point_at(&subsystem.plug(cntlid).expect("a controller"));
            slot
        };
        let (managers, slot) = (front(MANAGEMENT, 2), front(MIGRATABLE, IO_QUEUES + 1));
        let manager = DriverMmc::new(Driver::new(managers.function(), plan.driver.clone()).expect("a driver"), 64);
        let driver = Driver::new(slot.function(), plan.guest_driver.clone()).expect("a driver");
        let stride = (plan.bytes / 4096 / plan.targets).max(1);
        let blocks = (0..plan.targets).map(|i| i * stride).collect();
        let ledger = Ledger::in_memory(&LedgerSpec { seed: plan.seed, guest: 1, blocks }).expect("a ledger");
        let (guest, handle) = Guest::new(driver, plan.load.clone(), Arc::new(ledger)).expect("a guest");
        let spare = Some(disks[1].backing());
        let mut house = Self {
            now: Time::from_us(1),
            subsystem,
            fences,
            slot,
            guest,
            handle,
            disks,
            on: 0,
            manager: Some(Box::new(manager)),
            space: managers.space().clone(),
            migration: None,
            clerk: None,
            shelf: None,
            spare,
            paper: Paper::default(),
            random: fastrand::Rng::with_seed(plan.seed),
            plan,
            report: Report::default(),
            declines: 0,
            fetched: 0,
        };
        house.until("the guest comes up", |house| house.handle.stage() == GuestStage::Running);
        house
    }

    fn turn(&mut self) {
        let now = self.now;
        let work = match self.random.u32(0..3) {
            0 => self.poll_subsystem(),
            1 => match (&mut self.migration, &mut self.manager) {
                (Some(migration), _) => migration.poll(now).work,
                (None, Some(manager)) => manager.poll(now).work,
                (None, None) => 0,
            },
            _ => self.guest.poll(now).work,
        };
        let most_ns = if work > 0 { 400 } else { 3_000 };
        self.now = now.after_ns(self.random.u64(most_ns / 4..=most_ns));
    }

    fn poll_subsystem(&mut self) -> u32 {
        let work = self.subsystem.poll(self.now).work;
        let found = self.subsystem.counters().find(|(id, _)| *id == MIGRATABLE).map_or(0, |(_, counters)| counters.fetched);
        let fetched = std::mem::replace(&mut self.fetched, found);
        assert!(found == fetched || !self.fences[0].is_up(), "commands are fetched through the shut gate");
        if let Some(clerk) = self.clerk.clone() {
            clerk.serve(|nsid, backing| self.exchange(nsid, backing));
        }
        work
    }

    fn exchange(&mut self, nsid: u32, backing: Box<dyn Backing>) -> Result<Box<dyn Backing>, Declined> {
        if self.declines > 0 {
            self.declines -= 1;
            return Err(Declined { backing, transient: self.declines % 2 == 1, why: "the test declines".to_owned() });
        }
        assert!(self.fences.iter().all(Fence::is_up), "a gate is open");
        let other = &self.disks[1 - self.on];
        let done = self.subsystem.exchange_backing(nsid, backing);
        let done = done.map_err(|Refused { why, backing }| Declined { transient: why.is_transient(), why: why.to_string(), backing })?;
        assert!(self.disks[self.on].bytes() == other.bytes(), "the copy is not equal");
        assert_eq!(other.unflushed(), 0, "the copy is not flushed");
        self.on = 1 - self.on;
        Ok(done)
    }

    #[track_caller]
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = self.now.after_us(PATIENCE_US);
        while !done(self) {
            let state = (self.migration.as_ref().map(|m| (m.phase(), m.report().clone())), self.handle.first_error());
            assert!(self.now < end, "{what}: {state:?}");
            self.turn();
        }
    }

    /// An I/O queue of the management controller.
    fn queue(&mut self) -> Box<dyn dray_device::command::CommandQueue> {
        let (mut asked, mut queue) = (false, None);
        self.until("a queue of the management controller", |house| {
            let Some(manager) = &mut house.manager else { return false };
            if !asked {
                asked = manager.health() == Health::Ready && manager.create_io_queue(house.now).is_ok();
            } else if let Some(made) = manager.io_queue() {
                queue = Some(made.expect("an I/O queue"));
            }
            queue.is_some()
        });
        queue.expect("a queue")
    }

    /// Begins a move to the disk that the namespace is not on.
    fn start(&mut self) {
        let source_queue = self.queue();
        let copy = self.spare.take().expect("the other disk");
        let refused = self.subsystem.may_exchange(NSID, copy.as_ref()).err().map(|why| why.to_string());
        let (queue, shelf) = BackingQueue::new(vec![(COPY, copy)], 32);
        let (asker, clerk) = desk(shelf.clone(), vec![CopyOf { nsid: NSID, on_shelf: COPY, refused }]);
        let features = queue.features();
        let mut config = self.plan.config.clone();
        config.namespaces = vec![(NSID, COPY)];
        config.controllers = (0..self.plan.guests).map(|guest| (MIGRATABLE + guest, 0)).collect();
        (config.id, config.ends) = (self.plan.config.id, [ENDS[self.on], ENDS[1 - self.on]]);
        self.plan.config.id += 1;
        let with = MediaIngredients {
            source: self.manager.take().expect("a manager"),
            source_queue,
            source_space: self.space.clone(),
            destination: None,
            media: Box::new(LocalDestination::new(Box::new(queue), AddressSpace::default(), features)),
            policies: natives(usize::from(self.plan.guests)),
            exchange: Box::new(asker),
            journal: Box::new(self.paper.clone()),
            fence: Box::new(Gate(self.fences.clone())),
            guest: Box::new(NoFigures),
        };
        (self.clerk, self.shelf) = (Some(clerk), Some(shelf));
        self.migration = Some(Migration::media_move(config, with, self.now).expect("a migration"));
    }

    fn is_over(&self) -> bool {
        self.migration.as_ref().is_none_or(|migration| migration.phase() == Phase::Ended)
    }

    /// To the end of the move; the disk that is not used any more becomes the spare one.
    #[track_caller]
    fn finish(&mut self) -> Outcome {
        self.until("the move ends", |house| house.is_over());
        let migration = self.migration.take().expect("a migration");
        let outcome = migration.outcome().clone();
        let (manager, _, _, _, report) = migration.finish();
        (self.manager, self.report) = (Some(manager), report);
        let (clerk, shelf) = (self.clerk.take().expect("a clerk"), self.shelf.take().expect("a shelf"));
        self.spare = match clerk.take_old().pop() {
            Some((nsid, old)) => {
                assert_eq!((nsid, &outcome), (NSID, &Outcome::Moved));
                Some(old)
            }
            None => {
                // What the copy had under way has ended before.
                Some(shelf.take(COPY).expect("the copy is idle"))
            }
        };
        assert!(!self.fences.iter().any(Fence::is_up), "a gate is shut");
        outcome
    }

    #[track_caller]
    fn goes_on(&mut self, writes: u64) {
        let before = self.handle.counters().writes;
        self.until("the guest goes on", |house| house.handle.counters().writes >= before + writes || house.handle.is_over());
    }

    /// The guest resets its controller and finds what it knew.
    #[track_caller]
    fn resets(&mut self) {
        let before = (self.handle.counters().resets, self.handle.identity());
        self.handle.request_reset();
        self.until("the guest resets", |house| {
            house.handle.counters().resets > before.0 && house.handle.stage() == GuestStage::Running || house.handle.is_over()
        });
        assert_eq!(self.handle.identity(), before.1, "another namespace");
    }

    /// The guest stops; the disk that the namespace is on has all that it was told, and the other nothing of late.
    #[track_caller]
    fn judge(&mut self) {
        let other = self.disks[1 - self.on].bytes();
        self.goes_on(50);
        self.resets();
        self.goes_on(20);
        self.handle.stop();
        self.until("the guest stops", |house| house.handle.is_over());
        assert!(self.handle.stats().is_ok(), "{:?}", self.handle.stats());
        let found = verify::check(&mut self.disks[self.on].bytes(), self.handle.ledger()).expect("a comparison");
        assert!(found.is_ok() && found.writes_acknowledged > 0, "{found:?}");
        assert!(self.disks[1 - self.on].bytes() == other, "the other disk was written");
        let records: Vec<Option<Record>> = vec![self.paper.records().last().copied()];
        let serving = recover(&records).expect("no contradiction").serving();
        assert!(serving.is_none_or(|end| end == ENDS[self.on]), "the record names the other disk: {records:?}");
    }
}

#[test]
fn a_guest_keeps_its_controller_while_its_disk_is_exchanged() {
    for seed in 0..4 {
        let mut house = House::new(Plan::small(seed));
        house.goes_on(50);
        let identity = house.handle.identity();
        let resets = house.handle.counters().resets;
        house.start();
        assert_eq!(house.finish(), Outcome::Moved, "{:?}", house.report);
        assert_eq!(house.on, 1);
        assert!(house.report.downtime_us.is_some_and(|us| us > 0));
        let steps: Vec<Step> = house.report.parts.iter().map(|part| part.0).collect();
        assert!(steps.ends_with(&[Step::Fence, Step::Record, Step::Exchange, Step::Resume]), "{steps:?}");
        house.goes_on(100);
        assert_eq!((house.handle.identity(), house.handle.counters().resets), (identity, resets), "the guest has seen nothing of it");
        let phases: Vec<RecordPhase> = house.paper.records().iter().map(|record| record.phase).collect();
        assert_eq!(phases, [RecordPhase::Copying, RecordPhase::Moved, RecordPhase::Done]);
        house.judge();
    }
}

#[test]
fn there_and_back_and_there_again() {
    let mut house = House::new(Plan::small(11));
    for turn in 1..=3 {
        house.goes_on(30);
        house.start();
        assert_eq!(house.finish(), Outcome::Moved, "{:?}", house.report);
        assert_eq!(house.on, turn % 2);
    }
    house.judge();
}

#[test]
fn a_guest_may_reset_its_controller_at_any_moment_of_the_move() {
    for seed in 0..24 {
        let mut house = House::new(Plan::small(100 + seed));
        house.start();
        // At a moment of the copy, or at each step of the switch-over.
        let steps = ["suspend", "drain", "last_round", "flush", "fence", "record", "exchange", "resume"];
        let at = steps[seed as usize % steps.len()];
        house.until("the moment", |house| {
            let phase = house.migration.as_ref().map_or("", |migration| migration.progress(house.now).phase);
            house.is_over() || phase == at || seed >= 16 && house.random.u32(0..2_000) == 0
        });
        if seed < 8 {
            // Nobody asks the guest: its driver finds the controller reset.
            house.slot.function().write32(offset::CC, 0);
        } else {
            house.handle.request_reset();
        }
        assert_eq!(house.finish(), Outcome::Moved, "{:?}", house.report);
        if seed >= 8 {
            house.judge();
            continue;
        }
        // Its driver may take that for a failure; what it was told is there.
        (0..2_000).for_each(|_| house.turn());
        let found = verify::check(&mut house.disks[house.on].bytes(), house.handle.ledger()).expect("a comparison");
        assert!(found.is_ok(), "{found:?}");
    }
}

#[test]
fn a_move_that_is_cancelled_at_any_moment_leaves_one_whole_disk() {
    let mut undone = 0;
    for seed in 0..24 {
        let mut house = House::new(Plan::small(200 + seed));
        house.start();
        let polls = house.random.u32(0..4_000);
        for _ in 0..polls {
            house.turn();
        }
        house.migration.as_mut().expect("a migration").cancel();
        match house.finish() {
            Outcome::Moved => assert_eq!(house.on, 1),
            Outcome::Undone(Reason::Cancelled) => {
                undone += 1;
                assert_eq!(house.on, 0);
                // And the same copy is good for another attempt.
                house.start();
                assert_eq!(house.finish(), Outcome::Moved, "{:?}", house.report);
            }
            other => panic!("{other:?}"),
        }
        house.judge();
    }
    assert!(undone > 4, "{undone}");
}

/// As with an NVMe/TCP target, where a host may connect at any moment.
#[test]
fn a_controller_that_nobody_had_is_taken_while_the_gate_is_shut() {
    for step in ["copying", "drain", "exchange"] {
        let mut house = House::new(Plan::small(400).guests(3));
        house.start();
        house.until("the moment", |house| {
            let phase = house.migration.as_ref().map_or("", |migration| migration.progress(house.now).phase);
            house.is_over() || phase == step || step == "copying" && phase != "checking"
        });
        let slot = Slot::new(AddressSpace::default(), 2).expect("a slot");
        slot.point_at(&house.subsystem.plug(MIGRATABLE + 1).expect("a controller"));
        let mut driver = Driver::new(slot.function(), house.plan.guest_driver.clone()).expect("a driver");
        house.until("the move ends", |house| {
            let _progress = driver.poll(house.now);
            house.is_over()
        });
        assert_eq!(house.finish(), Outcome::Moved, "{:?}", house.report);
        house.until("the host is connected", |house| {
            let _progress = driver.poll(house.now);
            driver.is_ready()
        });
        house.judge();
    }
}

#[test]
fn an_exchange_that_is_declined_is_undone_and_made_again() {
    let mut house = House::new(Plan::small(300));
    house.declines = 3;
    house.start();
    assert_eq!(house.finish(), Outcome::Moved, "{:?}", house.report);
    assert!(house.report.attempts > 1, "{:?}", house.report);
    house.judge();
}

#[test]
fn a_disk_of_another_size_is_refused_before_the_guest_waits() {
    let mut house = House::new(Plan::small(301));
    let smaller = Disk::new(1, house.plan.bytes / 2, house.plan.block_bytes, house.plan.latency_ns);
    house.spare = Some(smaller.backing());
    house.start();
    let outcome = house.finish();
    assert!(matches!(outcome, Outcome::Undone(Reason::Refused(Refusal::NotExchangeable { nsid: NSID, .. }))), "{outcome:?}");
    assert!(house.paper.records().is_empty());
}
