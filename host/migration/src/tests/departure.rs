//! Departures: one fake subsystem whose controller leaves, and a drive that its media goes to.

use super::*;
use crate::departure::{DepartureIngredients, StateKeeper};
use crate::media_move::CopyGeometry;
use crate::mmc::{Health, Trust};
use crate::recovery::recover;
use crate::{Limits, Reason, Refusal, Step};
use dray_nvme::status::Status;

const OLD: [u8; 16] = [0xa; 16];
const NEW: [u8; 16] = [0xb; 16];

/// A drawer with the states of those that have left.
#[derive(Clone, Default)]
struct Drawer {
    log: Log,
    kept: Arc<Mutex<Vec<(u16, Vec<u8>)>>>,
    fails: Arc<Mutex<u32>>,
    asked: Arc<Mutex<Option<u32>>>,
}

impl StateKeeper for Drawer {
    fn keep(&mut self, states: Vec<(u16, Vec<u8>)>) {
        *self.kept.lock().expect("kept") = states;
        *self.asked.lock().expect("asked") = Some(3);
    }
    fn poll(&mut self) -> Option<Result<(), String>> {
        let mut asked = self.asked.lock().expect("asked");
        let left = asked.as_mut()?;
        *left -= 1;
        if *left > 0 {
            return None;
        }
        *asked = None;
        let mut fails = self.fails.lock().expect("fails");
        if *fails > 0 {
            *fails -= 1;
            return Some(Err("no room".to_owned()));
        }
        self.log.lock().expect("log").push("kept".to_owned());
        Some(Ok(()))
    }
}

struct Leaving {
    source: Drive,
    destination: Drive,
    log: Log,
    paper: Paper,
    drawer: Drawer,
    migration: Migration,
    now: u64,
    random: u64,
    writes: u64,
    /// What guests were told is written.
    told: Vec<u8>,
    /// Lines of the log when it was last looked at what a crash would leave.
    looked: usize,
}

fn leaving() -> MigrationConfig {
    MigrationConfig { controllers: vec![(SOURCE, 0)], ends: [OLD, NEW], ..config() }
}

impl Leaving {
    fn new(config: MigrationConfig, prepare: impl FnOnce(&Drive, &Drive)) -> Self {
        let log = Log::default();
        let source = Drive::new("s", 0, &[SOURCE, 2], BLOCKS, &log);
        let destination = Drive::new("d", 10, &[DESTINATION], BLOCKS, &log);
        {
            let mut source = source.lock();
            source.attached = vec![0, SOURCE];
            source.identify.oacs = source.identify.oacs.with_namespace_management(true);
            for (index, chunk) in source.media.chunks_mut(BLOCK).enumerate() {
                chunk.fill(if index / 512 % 3 == 0 { 0 } else { index as u8 | 1 });
            }
            source.stable = source.media.clone();
            destination.lock().media.fill(0xa5);
        }
        prepare(&source, &destination);
        let compare = destination.lock().identify.oncs.compare();
        let features = LocalFeatures { compare, write_uncorrectable: true, reads_zero: false };
        let paper = Paper { log: Arc::clone(&log), ..Paper::default() };
        let drawer = Drawer { log: Arc::clone(&log), ..Drawer::default() };
        let blocks = destination.lock().nsze;
        let with = DepartureIngredients {
            source: Box::new(FakeMmc { drive: source.clone() }),
            source_queue: Box::new(FakeQueue::new(&source)),
            source_space: AddressSpace::default(),
            media: Box::new(LocalDestination::new(Box::new(FakeQueue::new(&destination)), AddressSpace::default(), features)),
            targets: vec![CopyGeometry { blocks, block_bytes: 512 }],
            policies: Policies { cdq: vec![seat::<Cdq>()], tracking: seat::<Tracking>(), copy: seat::<Copy>() },
            keeper: Box::new(drawer.clone()),
            journal: Box::new(paper.clone()),
            guest: Box::new(Hook(Arc::clone(&log))),
        };
        let migration = Migration::departure(config, with, Time(0)).map_err(|error| error.0).expect("a migration");
        let told = source.lock().media.clone();
        Self { source, destination, log, paper, drawer, migration, now: 0, random: 42, writes: 1, told, looked: 0 }
    }

    fn write(&mut self) -> bool {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = self.random >> 33;
        let (slba, blocks, byte) = (random % (BLOCKS - 8), 1 + random / 8192 % 8, (random >> 16) as u8);
        let written = self.source.guest_write(SOURCE, slba, blocks, byte);
        if written {
            self.told[slba as usize * BLOCK..(slba + blocks) as usize * BLOCK].fill(byte);
        }
        written
    }

    fn step(&mut self) {
        self.now += 10_000;
        for _ in 0..self.writes {
            self.write();
        }
        let _progress = self.migration.poll(Time(self.now));
    }

    fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..400_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("it does not end: {:?} {:?}", self.migration.phase(), self.log.lock().expect("log"));
    }

    fn run(&mut self) -> Outcome {
        self.run_until(|world| {
            world.look();
            world.migration.phase() == Phase::Ended
        });
        self.migration.outcome().clone()
    }

    fn has(&self, line: &str) -> bool {
        self.log.lock().expect("log").iter().any(|found| found == line)
    }

    fn order(&self, wanted: &[&str]) {
        let lines = self.log.lock().expect("log").clone();
        let at = |what: &str| lines.iter().rposition(|line| line == what).unwrap_or_else(|| panic!("{what}: {lines:?}"));
        assert!(wanted.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "{lines:?}");
    }

    /// What a crash would leave, whenever something has happened.
    fn look(&mut self) {
        let lines = self.log.lock().expect("log").len();
        let pending = self.paper.pending.lock().expect("pending").is_some();
        if std::mem::replace(&mut self.looked, lines) != lines || pending {
            self.assert_recoverable();
        }
    }

    /// Whoever finds the records after a crash now, when every suspension has ended, loses nothing: where the source serves it has
    /// all; where it does not, the copy and the state are durable and the source's controller can write nothing.
    fn assert_recoverable(&self) {
        let durable = *self.paper.durable.lock().expect("durable");
        let written = self.paper.records.lock().expect("records").last().copied();
        for record in [durable, written] {
            let found = recover(&[record]).expect("no contradiction");
            let source = self.source.lock();
            if found.owner == Owner::Source {
                assert!(source.media == self.told, "the source lacks writes: {record:?}");
                continue;
            }
            assert!(self.destination.lock().stable == self.told, "the copy lacks writes: {record:?}");
            assert!(!source.attached.contains(&SOURCE), "the controller would go on: {record:?}");
            let kept = self.drawer.kept.lock().expect("kept");
            assert!(kept.iter().any(|(cntlid, state)| *cntlid == SOURCE && state.len() > 48), "the state is lost");
        }
    }

    /// It has left, for good.
    fn assert_left(&mut self) {
        assert!(self.source.lock().controllers[&SOURCE].suspended, "it runs");
        assert!(!self.source.lock().controllers[&SOURCE].live, "the queue is left");
        assert!(!self.has("s resume 1") || self.migration.report().attempts > 1);
        // Whoever resets what ends the suspension, and that is all.
        self.source.lock().controllers.get_mut(&SOURCE).expect("controller").suspended = false;
        assert!(!self.write(), "the controller that has left writes after a reset");
        self.assert_recoverable();
        let last = self.paper.durable.lock().expect("durable").expect("a record");
        assert_eq!((last.owner, last.phase, last.fenced), (Owner::Destination, crate::RecordPhase::Done, true));
    }

    /// The guest goes on as before.
    fn assert_stays(&mut self) {
        assert!(!self.source.lock().controllers[&SOURCE].live, "the queue is left");
        let last = self.paper.records.lock().expect("records").last().copied();
        assert!(last.is_none_or(|record| record.owner == Owner::Source), "{last:?}");
        assert!(self.write() && self.source.lock().media == self.told, "the guest does not go on");
    }
}

fn refused(world: &mut Leaving) -> Refusal {
    match world.run() {
        Outcome::Undone(Reason::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_controller_leaves_with_its_media_while_its_guest_writes() {
    let mut world = Leaving::new(leaving(), |source, _| source.lock().delay = 3_000);
    assert_eq!(world.run(), Outcome::Moved);
    let report = world.migration.report();
    let steps: Vec<_> = report.parts.iter().map(|part| part.0).collect();
    use Step::{Detach, Drain, Fence, Flush, Keep, LastRound, Prepare, ReadState, Record, Suspend};
    assert_eq!(steps, [Prepare, Suspend, Drain, LastRound, Flush, ReadState, Keep, Detach, Fence, Record]);
    assert!(report.attempts == 1 && report.downtime_us.is_some() && report.zero_bytes > 0, "{report:?}");
    world.order(&["s suspend 1", "kept", "s detach 1", "record Destination Moved", "record Destination Done"]);
    world.assert_left();
}

#[test]
fn cancelled_at_any_time_the_guest_goes_on_or_has_left() {
    let (mut stayed, mut left, mut reattached) = (0, 0, 0);
    for moment in 0..160 {
        let mut world = Leaving::new(leaving(), |source, _| source.lock().delay = 2_000);
        for _ in 0..moment {
            world.step();
        }
        world.migration.cancel();
        match world.run() {
            Outcome::Undone(Reason::Cancelled) => {
                world.assert_stays();
                stayed += 1;
                reattached += u32::from(world.has("s attach 1"));
            }
            Outcome::Moved => {
                world.assert_left();
                left += 1;
            }
            other => panic!("moment {moment}: {other:?}"),
        }
    }
    assert!(stayed > 0 && left > 0, "{stayed} {left}");
    assert!(reattached > 0, "no moment was behind the detachment");
}

#[test]
fn what_fails_is_undone_and_tried_again() {
    for (keeper, papers) in [(1, 0), (2, 0), (0, 1), (0, 2), (1, 1)] {
        let mut world = Leaving::new(leaving(), |_, _| {});
        world.run_until(|world| world.has("s suspend 1"));
        *world.drawer.fails.lock().expect("fails") = keeper;
        *world.paper.fails.lock().expect("fails") = papers;
        assert_eq!(world.run(), Outcome::Moved, "{keeper} {papers}");
        assert!(world.migration.report().attempts > 1);
        world.assert_left();
    }
    let mut world = Leaving::new(leaving(), |source, _| _ = source.lock().refuse.insert(0x15, Status::INTERNAL_ERROR));
    let mut failed = false;
    world.run_until(|world| {
        world.look();
        failed |= world.migration.report().attempts == 1 && world.migration.phase() == Phase::Undoing;
        failed
    });
    world.source.lock().refuse.clear();
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_left();
}

#[test]
fn a_guest_that_resets_its_controller_before_it_is_detached_has_lost_nothing() {
    for writes in [false, true] {
        let mut world = Leaving::new(leaving(), |source, _| source.lock().wakes_at_detach = (1, writes));
        world.run_until(|world| world.has("s detach 1"));
        if writes {
            // The fake has written this block in its name.
            world.told[..BLOCK].fill(0x77);
        }
        assert_eq!(world.run(), Outcome::Moved);
        // Also where it has written nothing: the state that was kept is not that of the controller any more.
        assert_eq!(world.migration.report().attempts, 2, "{writes}");
        world.order(&["s attach 1", "s detach 1", "record Destination Moved"]);
        world.assert_left();
    }
}

#[test]
fn somebody_else_who_gets_the_namespace_meanwhile_undoes_it() {
    let mut world = Leaving::new(leaving(), |_, _| {});
    world.run_until(|world| world.has("s suspend 1"));
    world.source.lock().attached.push(2);
    let outcome = world.run();
    assert_eq!(world.migration.report().attempts, 3);
    let Outcome::Undone(Reason::SwitchOver { step: Step::Fence, what }) = &outcome else { panic!("{outcome:?}") };
    assert!(what.contains("controller 2"), "{what}");
    world.assert_stays();
}

#[test]
fn namespaces_that_cannot_be_attached_again_leave_it_in_doubt_by_a_record_that_says_source() {
    let hasty = MigrationConfig { limits: Limits { undo_ms: 20, ..Limits::default() }, ..leaving() };
    let mut world = Leaving::new(hasty, |_, _| {});
    world.run_until(|world| world.has("s detach 1"));
    world.source.lock().refuse.insert(0x15, Status::INTERNAL_ERROR);
    world.migration.cancel();
    let outcome = world.run();
    assert!(matches!(&outcome, Outcome::InDoubt { what, .. } if what.contains("attached")), "{outcome:?}");
    let durable = world.paper.durable.lock().expect("durable").expect("a record");
    assert_eq!(durable.owner, Owner::Source);
}

#[test]
fn a_manager_that_fails_behind_the_detachment_is_reset_and_attaches() {
    let mut world = Leaving::new(leaving(), |_, _| {});
    world.run_until(|world| world.has("s detach 1"));
    {
        let mut source = world.source.lock();
        (source.health, source.stable) = (Health::Failed("it is gone".to_owned()), source.media.clone());
    }
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::Source(_))), "{outcome:?}");
    world.order(&["s detach 1", "s reset", "s attach 1"]);
    world.assert_stays();
}

#[test]
fn a_drive_that_is_not_tested_is_compared_while_its_controller_is_suspended() {
    let hint = |source: &Drive| source.lock().trust = Trust::Hint("drive Such is not on the tested list".to_owned());
    let mut world = Leaving::new(leaving(), |source, _| hint(source));
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::CompareTooLong { .. })), "{outcome:?}");
    world.assert_stays();
    let mut patient = leaving();
    patient.limits.compare_budget_us = 60_000_000;
    let mut world = Leaving::new(patient.clone(), |source, _| hint(source));
    assert_eq!(world.run(), Outcome::Moved);
    assert!(world.migration.report().parts.iter().any(|part| part.0 == Step::Compare));
    world.assert_left();
    let cannot = |_: &Drive, destination: &Drive| {
        let mut destination = destination.lock();
        destination.identify.oncs = destination.identify.oncs.with_compare(false);
    };
    let mut world = Leaving::new(patient, |source, destination| {
        hint(source);
        cannot(source, destination);
    });
    assert!(matches!(refused(&mut world), Refusal::CannotCompare(_)));
    let trusting = MigrationConfig { trust_drive: true, ..leaving() };
    let mut world = Leaving::new(trusting, |source, _| hint(source));
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_left();
}

#[test]
fn what_cannot_leave_is_refused_before_anything_begins() {
    let check = |prepare: &dyn Fn(&Drive, &Drive), said: &str| {
        let mut world = Leaving::new(leaving(), prepare);
        let refusal = refused(&mut world).to_string();
        assert!(refusal.contains(said), "{refusal}");
        assert!(!world.has("s create queue 1 4096") && !world.has("s suspend 1"));
        world.assert_stays();
    };
    let identify = |change: fn(&mut dray_nvme::identify::IdentifyController)| {
        move |source: &Drive, _: &Drive| change(&mut source.lock().identify)
    };
    check(&identify(|id| id.oacs = id.oacs.with_hmlms(false)), "HMLMS");
    check(&identify(|id| id.trattr = id.trattr.with_tudcs(false)), "TUDCS");
    check(&|source, _| source.lock().attached.push(2), "controller 2 can write namespace 1");
    check(&|source, _| source.lock().attached.retain(|&id| id != 0), "controller 0 of the source is not attached");
    check(&|source, _| source.lock().others = vec![(7, vec![2]), (8, vec![SOURCE])], "controller 1 has namespace 8 as well");
    check(&|_, destination| destination.lock().nsze = BLOCKS - 1, "its destination only");
    let mut world = Leaving::new(leaving(), |source, _| {
        let mut source = source.lock();
        source.identify.oacs = source.identify.oacs.with_namespace_management(false);
    });
    let refusal = refused(&mut world).to_string();
    assert!(refusal.contains("cannot detach namespaces"), "{refusal}");
}
