//! Media moves: the same fake subsystem, whose media is exchanged for the copy.

use super::plain::Plain;
use super::*;
use crate::media_move::{BackingExchange, BackingQueue, BackingShelf, CopyGeometry, MediaIngredients};
use crate::mmc::Health;
use crate::recovery::recover;
use crate::{Limits, Reason, Refusal, Step};
use dray_device::backing::Backing;
use dray_nvme::status::Status;

/// NSID of the copy.
const COPY: u32 = 9;
const OLD: [u8; 16] = [0xa; 16];
const NEW: [u8; 16] = [0xb; 16];

/// What the test decides, and sees, of the exchange.
#[derive(Default)]
struct Swapping {
    /// Exchanges that fail.
    fails: u32,
    /// They fail half way: this namespace has the copy already.
    half: bool,
    /// Undos that fail.
    undo_fails: u32,
    /// Nothing that is asked ends.
    stuck: bool,
    /// The guest resets its controllers while the exchange is under way.
    guest_resets: bool,
    /// The management controller fails while the exchange is under way.
    manager_fails: bool,
    refuses: Option<String>,
    blocks: u64,
    /// Exchange (or undo) asked for, and polls until it is made.
    asked: Option<(bool, u32)>,
    /// The old media and the copy's backing, while the namespace has the latter.
    old: Option<(Vec<u8>, Option<Box<dyn Backing>>)>,
}

#[derive(Clone)]
struct Swap {
    source: Drive,
    copy: Plain,
    shelf: BackingShelf,
    /// The copy is behind another controller, which stays there.
    far: Option<Drive>,
    log: Log,
    inner: Arc<Mutex<Swapping>>,
}

impl Swap {
    /// What of the copy is on stable storage.
    fn stable(&self) -> Vec<u8> {
        self.far.as_ref().map_or_else(|| self.copy.stable(), |far| far.lock().stable.clone())
    }

    fn ask(&self, exchange: bool) {
        self.log.lock().expect("log").push(if exchange { "exchange" } else { "exchange back" }.to_owned());
        self.inner.lock().expect("swap").asked = Some((exchange, 3));
    }

    /// What must hold whenever backings are exchanged.
    fn look(&self) {
        let source = self.source.lock();
        assert!(source.fenced, "the gate is open");
    }

    fn make(&self, inner: &mut Swapping) -> Result<(), String> {
        self.look();
        let fails = inner.fails > 0;
        inner.fails -= u32::from(fails);
        if fails && !inner.half {
            return Err("it does not fit".to_owned());
        }
        let copy = match &self.far {
            None => Some(self.shelf.take(COPY).expect("nothing is under way in the copy")),
            Some(_) => None,
        };
        let stable = self.stable();
        let mut source = self.source.lock();
        assert!(source.under_way.is_empty(), "reads are under way");
        assert!(stable == source.media, "the copy is not equal, or not flushed");
        let old = std::mem::replace(&mut source.media, stable);
        inner.old = Some((old, copy));
        if inner.guest_resets {
            source.controllers.values_mut().for_each(|controller| controller.suspended = false);
        }
        if inner.manager_fails {
            source.health = Health::Failed("it is gone".to_owned());
            source.stable = source.media.clone();
        }
        if fails { Err("another one does not fit".to_owned()) } else { Ok(()) }
    }

    fn take_back(&self, inner: &mut Swapping) -> Result<(), String> {
        self.look();
        if inner.undo_fails > 0 {
            inner.undo_fails -= 1;
            return Err("it does not fit any more".to_owned());
        }
        if let Some((old, copy)) = inner.old.take() {
            let mut source = self.source.lock();
            assert!(source.media == old, "the guest has written to the copy");
            source.media = old;
            assert!(copy.is_none_or(|copy| self.shelf.put(COPY, copy).is_none()));
        }
        Ok(())
    }
}

impl BackingExchange for Swap {
    fn copy_of(&mut self, nsid: u32) -> Result<CopyGeometry, String> {
        assert_eq!(nsid, 1);
        let inner = self.inner.lock().expect("swap");
        match &inner.refuses {
            Some(why) => Err(why.clone()),
            None => Ok(CopyGeometry { blocks: inner.blocks, block_bytes: 512 }),
        }
    }
    fn exchange(&mut self) {
        self.ask(true);
    }
    fn undo(&mut self) {
        self.ask(false);
    }
    fn poll(&mut self, _: Time) -> Option<Result<(), String>> {
        let mut inner = self.inner.lock().expect("swap");
        let (exchange, left) = inner.asked?;
        if left > 0 || inner.stuck && exchange {
            inner.asked = Some((exchange, left.saturating_sub(1)));
            return None;
        }
        inner.asked = None;
        Some(if exchange { self.make(&mut inner) } else { self.take_back(&mut inner) })
    }
}

struct MediaWorld {
    source: Drive,
    swap: Swap,
    log: Log,
    paper: Paper,
    migration: Migration,
    now: u64,
    random: u64,
    writes: u64,
    /// What guests were told is written.
    told: Vec<u8>,
}

fn media_config() -> MigrationConfig {
    MigrationConfig { namespaces: vec![(1, COPY)], controllers: vec![(SOURCE, 0)], ends: [OLD, NEW], ..config() }
}

impl MediaWorld {
    fn new(config: MigrationConfig, prepare: impl FnOnce(&Drive, &mut Swapping)) -> Self {
        Self::with(config, false, prepare)
    }

    fn with(config: MigrationConfig, behind_controller: bool, prepare: impl FnOnce(&Drive, &mut Swapping)) -> Self {
        let log = Log::default();
        let source = Drive::new("s", 0, &[SOURCE, 2], BLOCKS, &log);
        source.lock().attached = vec![0, SOURCE];
        for (index, chunk) in source.lock().media.chunks_mut(BLOCK).enumerate() {
            chunk.fill(if index / 512 % 3 == 0 { 0 } else { index as u8 | 1 });
        }
        let copy = Plain::new(BLOCKS as usize, true);
        let (queue, shelf) = BackingQueue::new(vec![(COPY, copy.boxed())], 32);
        let mut swapping = Swapping { blocks: BLOCKS, ..Swapping::default() };
        prepare(&source, &mut swapping);
        let far = behind_controller.then(|| Drive::new("d", 10, &[DESTINATION], BLOCKS, &log));
        let inner = Arc::new(Mutex::new(swapping));
        let swap = Swap { source: source.clone(), copy, shelf, far: far.clone(), log: Arc::clone(&log), inner };
        let features = queue.features();
        let queue: Box<dyn dray_device::command::CommandQueue> =
            far.as_ref().map_or_else(|| Box::new(queue) as _, |far| Box::new(FakeQueue::new(far)) as _);
        let paper = Paper { log: Arc::clone(&log), ..Paper::default() };
        let with = MediaIngredients {
            source: Box::new(FakeMmc { drive: source.clone() }),
            source_queue: Box::new(FakeQueue::new(&source)),
            source_space: AddressSpace::default(),
            destination: far.map(|drive| Box::new(FakeMmc { drive }) as _),
            media: Box::new(LocalDestination::new(queue, AddressSpace::default(), features)),
            policies: Policies { cdq: vec![seat::<Cdq>()], tracking: seat::<Tracking>(), copy: seat::<Copy>() },
            exchange: Box::new(swap.clone()),
            journal: Box::new(paper.clone()),
            fence: Box::new(FenceHook(Arc::clone(&log), source.clone())),
            guest: Box::new(Hook(Arc::clone(&log))),
        };
        let migration = Migration::media_move(config, with, Time(0)).expect("migration");
        let told = source.lock().media.clone();
        Self { source, swap, log, paper, migration, now: 0, random: 42, writes: 1, told }
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    fn write(&mut self, cntlid: u16) {
        let (slba, blocks, byte) = (self.random() % (BLOCKS - 8), 1 + self.random() % 8, self.random() as u8);
        if self.source.guest_write(cntlid, slba, blocks, byte) {
            self.told[slba as usize * BLOCK..(slba + blocks) as usize * BLOCK].fill(byte);
        }
    }

    fn step(&mut self) {
        self.now += 10_000;
        for _ in 0..self.writes {
            self.write(SOURCE);
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
        self.run_until(|world| world.migration.phase() == Phase::Ended);
        self.migration.outcome().clone()
    }

    fn lines(&self) -> Vec<String> {
        self.log.lock().expect("log").clone()
    }

    fn has(&self, line: &str) -> bool {
        self.lines().iter().any(|found| found == line)
    }

    fn swapping(&self) -> std::sync::MutexGuard<'_, Swapping> {
        self.swap.inner.lock().expect("swap")
    }

    /// The guest runs, unthrottled, over the copy or the old backing, and finds what it was told.
    fn assert_serves(&mut self, moved: bool) {
        let lines = self.lines();
        assert!(!lines.iter().any(|line| line.starts_with("point") || line.starts_with("destination")), "{lines:?}");
        {
            let source = self.source.lock();
            assert!(source.controllers.values().all(|controller| !controller.suspended && !controller.live), "left behind");
            assert!(!source.fenced && source.limit == 0, "the gate is shut, or the guest throttled");
            assert!(source.media == self.told, "writes are lost");
        }
        assert_eq!(self.swapping().old.is_some(), moved);
        let last = self.paper.records.lock().expect("records").last().copied();
        assert_eq!(last.is_some_and(|record| record.owner == Owner::Destination), moved, "{last:?}");
        let before = self.told.clone();
        self.write(SOURCE);
        assert!(self.told != before && self.source.lock().media == self.told, "the guest goes on");
    }

    /// Whoever finds the records after a crash now opens a backing with everything that guests were told.
    fn assert_recoverable(&self) {
        let durable = *self.paper.durable.lock().expect("durable");
        let written = self.paper.records.lock().expect("records").last().copied();
        // A record that is being written, or has failed, may be there all the same.
        for record in [durable, written] {
            let found = recover(&[record]).expect("no contradiction");
            let inner = self.swapping();
            let source = self.source.lock();
            let backing = match (found.serving().unwrap_or(OLD), &inner.old) {
                (OLD, None) | (NEW, Some(_)) => source.media.clone(),
                (OLD, Some((old, _))) => old.clone(),
                (NEW, None) => self.swap.stable(),
                (other, _) => panic!("{other:?} serves"),
            };
            assert!(backing == self.told, "a crash loses writes: {record:?}");
        }
    }
}

fn order(lines: &[String], wanted: &[&str]) {
    let at = |what: &str| lines.iter().rposition(|line| line == what).unwrap_or_else(|| panic!("{what}: {lines:?}"));
    assert!(wanted.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "{lines:?}");
}

fn failed_at(step: Step, outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Undone(Reason::SwitchOver { step: at, .. }) if *at == step)
}

#[test]
fn a_namespace_changes_its_backing_while_its_guest_writes() {
    let mut world = MediaWorld::new(media_config(), |source, _| source.lock().delay = 3_000);
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_serves(true);
    let report = world.migration.report();
    let steps: Vec<_> = report.parts.iter().map(|part| part.0).collect();
    use Step::{Drain, Exchange, Fence, Flush, LastRound, Prepare, Record, Resume, Suspend};
    assert_eq!(steps, [Prepare, Suspend, Drain, LastRound, Flush, Fence, Record, Exchange, Resume]);
    let sum: u64 = report.parts[1..].iter().map(|part| part.1).sum();
    assert_eq!((report.attempts, report.downtime_us), (1, Some(sum)), "gate shut to gate open");
    assert!(report.rounds.count() >= 1 && report.zero_bytes > 0, "{report:?}");
    let wanted =
        ["s suspend 1", "fence up", "record Destination Moved", "exchange", "fence down", "s resume 1", "record Destination Done"];
    order(&world.lines(), &wanted);
}

#[test]
fn cancelled_at_any_time_nothing_is_lost_and_neither_by_a_crash() {
    for moment in 0..160 {
        let mut world = MediaWorld::new(media_config(), |source, _| source.lock().delay = 2_000);
        for _ in 0..moment {
            world.step();
        }
        world.migration.cancel();
        world.run_until(|world| {
            world.assert_recoverable();
            world.migration.phase() == Phase::Ended
        });
        match world.migration.outcome().clone() {
            Outcome::Undone(Reason::Cancelled) => world.assert_serves(false),
            Outcome::Moved => world.assert_serves(true),
            other => panic!("moment {moment}: {other:?}"),
        }
    }
}

#[test]
fn every_step_has_its_way_back_and_no_crash_loses_anything() {
    // Exchange, undo of it, the record: each fails for a while.
    let cases = [(1, 0, 0), (1, 3, 0), (2, 1, 0), (1, 1, 1), (0, 0, 1), (0, 0, 2), (0, 0, 3)];
    for (case, half) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let (fails, undo_fails, papers) = case;
        let mut world = MediaWorld::new(media_config(), |_, swap| {
            (swap.fails, swap.undo_fails, swap.half) = (fails, undo_fails, half);
        });
        world.run_until(|world| world.has("s suspend 1"));
        *world.paper.fails.lock().expect("fails") = papers;
        world.run_until(|world| {
            world.assert_recoverable();
            world.migration.phase() == Phase::Ended
        });
        assert_eq!(*world.migration.outcome(), Outcome::Moved, "{case:?} {half}");
        world.assert_serves(true);
        assert!(world.migration.report().attempts > 1);
    }
}

#[test]
fn an_exchange_that_never_succeeds_leaves_the_old_backing() {
    let mut world = MediaWorld::new(media_config(), |_, swap| swap.fails = u32::MAX);
    let outcome = world.run();
    assert!(failed_at(Step::Exchange, &outcome), "{outcome:?}");
    assert_eq!(world.migration.report().attempts, 3);
    world.assert_serves(false);
    order(&world.lines(), &["exchange", "record Source Copying", "exchange back", "fence down", "s resume 1", "record Source Undone"]);

    let hasty = MigrationConfig { limits: Limits { step_ms: 2, ..Limits::default() }, ..media_config() };
    let mut world = MediaWorld::new(hasty, |_, swap| swap.stuck = true);
    let outcome = world.run();
    assert!(failed_at(Step::Exchange, &outcome), "one that does not end: {outcome:?}");
    world.assert_serves(false);
}

#[test]
fn an_exchange_that_cannot_be_taken_back_leaves_the_guest_waiting() {
    let hasty = MigrationConfig { limits: Limits { undo_ms: 20, ..Limits::default() }, ..media_config() };
    let mut world = MediaWorld::new(hasty, |_, swap| (swap.fails, swap.half, swap.undo_fails) = (1, true, u32::MAX));
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::InDoubt { .. }), "{outcome:?}");
    assert!(world.source.lock().fenced && world.swapping().old.is_some(), "nothing is written to the copy");
    world.assert_recoverable();
    assert!(world.has("record Source Copying"));
}

#[test]
fn suspend_and_the_look_behind_the_fence_have_their_ways_back() {
    let mut world = MediaWorld::new(media_config(), |_, _| {});
    world.run_until(|world| world.migration.phase() == Phase::SwitchingOver);
    world.source.lock().refuse.insert(0x41, Status::INTERNAL_ERROR);
    world.run_until(|world| world.migration.report().attempts >= 1 && world.migration.phase() == Phase::Undoing);
    world.source.lock().refuse.clear();
    let outcome = world.run();
    assert!(outcome == Outcome::Moved || failed_at(Step::Suspend, &outcome), "{outcome:?}");

    // The guest resets its controller before the fence is up: it has written, so that attempt is undone.
    let mut world = MediaWorld::new(media_config(), |source, _| source.lock().wakes_at_fence = 1);
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!(world.migration.report().attempts, 2);
    world.assert_serves(true);
}

#[test]
fn a_guest_that_resets_behind_the_gate_goes_on_with_the_copy() {
    let mut world = MediaWorld::new(media_config(), |_, swap| swap.guest_resets = true);
    world.writes = 3;
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!(world.migration.report().attempts, 1);
    world.assert_serves(true);
}

#[test]
fn a_resume_of_unknown_outcome_is_made_again() {
    for applied in [true, false] {
        let mut world = MediaWorld::new(media_config(), |_, _| {});
        world.run_until(|world| world.has("exchange"));
        world.source.lock().unknown_resume = Some(applied);
        assert_eq!(world.run(), Outcome::Moved);
        assert_eq!(world.migration.report().attempts, 1, "nothing but forward");
        world.assert_serves(true);
    }
}

#[test]
fn a_manager_that_fails_behind_the_record_is_reset() {
    let mut world = MediaWorld::new(media_config(), |_, swap| swap.manager_fails = true);
    // Before Resume is sent there is still a way back, and it is the same: the reset ends the suspension.
    let outcome = world.run();
    world.assert_recoverable();
    match outcome {
        Outcome::Moved => world.assert_serves(true),
        Outcome::Undone(Reason::Source(_)) => world.assert_serves(false),
        other => panic!("{other:?}"),
    }
    // When Resume has been sent there is none.
    let mut world = MediaWorld::new(media_config(), |_, _| {});
    world.run_until(|world| world.has("exchange"));
    world.source.lock().slow.insert(0x41);
    world.run_until(|world| world.has("fence down"));
    {
        let mut source = world.source.lock();
        (source.health, source.stable) = (Health::Failed("it is gone".to_owned()), source.media.clone());
    }
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_serves(true);
}

#[test]
fn what_cannot_be_exchanged_is_refused_before_anything_begins() {
    let refused = |world: &mut MediaWorld| match world.run() {
        Outcome::Undone(Reason::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let mut world = MediaWorld::new(media_config(), |_, swap| swap.refuses = Some("it has a cache".to_owned()));
    assert!(matches!(refused(&mut world), Refusal::NotExchangeable { nsid: 1, .. }));
    for blocks in [BLOCKS - 1, BLOCKS + 1] {
        let mut world = MediaWorld::new(media_config(), |_, swap| swap.blocks = blocks);
        assert!(matches!(refused(&mut world), Refusal::NotExchangeable { nsid: 1, .. }), "its size is the guest's to see");
    }
    let mut world = MediaWorld::new(media_config(), |source, _| source.lock().attached.push(2));
    assert_eq!(refused(&mut world), Refusal::OtherWriter { cntlid: 2, nsid: 1 });
    assert_eq!(world.lines(), [""; 0]);
}

#[test]
fn all_controllers_of_the_namespace_wait() {
    let mut config = media_config();
    config.controllers.push((2, 0));
    let mut world = MediaWorld::new(config, |source, _| source.lock().attached = vec![0, SOURCE, 2]);
    world.run_until(|world| {
        world.write(2);
        world.migration.phase() == Phase::Ended
    });
    assert_eq!(*world.migration.outcome(), Outcome::Moved);
    world.assert_serves(true);
    order(&world.lines(), &["s suspend 2", "fence up", "exchange", "fence down", "s resume 2"]);
}

#[test]
fn a_copy_behind_another_controller_is_written_again_when_that_one_fails() {
    let mut world = MediaWorld::with(media_config(), true, |source, _| source.lock().delay = 3_000);
    world.run_until(|world| world.has("d flush"));
    let far = world.swap.far.clone().expect("a drive");
    far.lock().health = Health::Failed("it is gone".to_owned());
    world.run_until(|world| {
        world.assert_recoverable();
        world.migration.phase() == Phase::Ended
    });
    assert_eq!(*world.migration.outcome(), Outcome::Moved);
    assert!(world.has("d reset"));
    let lines = world.lines();
    assert!(!lines.iter().any(|line| line.starts_with("d suspend") || line.starts_with("d resume")), "{lines:?}");
    world.assert_serves(true);
}

#[test]
fn controllers_that_stay_are_not_left_throttled() {
    let mut tight = media_config();
    tight.may_throttle = true;
    tight.limits = Limits { downtime_budget_us: 500, max_rounds: 3, throttle_ms: 1, ..Limits::default() };
    let mut world = MediaWorld::new(tight, |source, _| source.lock().delay = 5_000);
    world.writes = 30;
    world.run_until(|world| world.source.lock().limit > 0);
    // The guest obeys, so it converges.
    world.writes = 1;
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_serves(true);
}
