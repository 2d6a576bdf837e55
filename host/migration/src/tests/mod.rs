//! Whole migrations between two fakes, under a made-up clock: the rules of the way of the data, a test each.

mod departure;
pub(crate) mod fake;
mod hand_over;
mod holes;
mod left_behind;
mod marks;
mod media_move;
pub(crate) mod plain;
mod rules;
mod ways_back;

use crate::destination::{LocalDestination, LocalFeatures};
use crate::hooks::{Owner, FenceControl, GuestSample, GuestSlot, GuestView, Hooks, Journal, JournalError, Record};
use crate::parts::Policies;
use crate::{Ingredients, Migration, MigrationConfig, Outcome, Phase};
use dray_device::poll::{Poll, Time};
use dray_device::space::AddressSpace;
use dray_policy::guard::{Guard, Limits};
use dray_policy::native::{Native, NativeFactory};
use dray_policy::role::{Cdq, Copy, Tracking};
use dray_policy::seam::{Meter, Seat};
use fake::{BLOCK, Drive, FakeMmc, FakeQueue};
use std::sync::{Arc, Mutex};

const SOURCE: u16 = 1;
const DESTINATION: u16 = 11;

type Log = Arc<Mutex<Vec<String>>>;

struct NoMeter;
impl Meter for NoMeter {
    fn now_ns(&self) -> u64 {
        0
    }
}

fn seat<R: Native>() -> Box<dyn Seat<R>> {
    let factory = || Box::new(NativeFactory::<R>::new());
    Box::new(Guard::new(factory(), factory(), Box::new(NoMeter), Limits::default()))
}

#[derive(Clone, Default)]
struct Paper {
    log: Log,
    records: Arc<Mutex<Vec<Record>>>,
    pending: Arc<Mutex<Option<u32>>>,
    /// The last record that is durable.
    durable: Arc<Mutex<Option<Record>>>,
    /// Records that fail from now on.
    fails: Arc<Mutex<u32>>,
}

impl Journal for Paper {
    fn write(&mut self, record: &Record) {
        self.records.lock().expect("records").push(*record);
        *self.pending.lock().expect("pending") = Some(3);
    }
    fn poll(&mut self) -> Option<Result<(), JournalError>> {
        let mut pending = self.pending.lock().expect("pending");
        let left = pending.as_mut()?;
        *left -= 1;
        if *left > 0 {
            return None;
        }
        *pending = None;
        let mut fails = self.fails.lock().expect("fails");
        if *fails > 0 {
            *fails -= 1;
            return Some(Err(JournalError("disk".into())));
        }
        let record = *self.records.lock().expect("records").last()?;
        *self.durable.lock().expect("durable") = Some(record);
        self.log.lock().expect("log").push(format!("record {:?} {:?}", record.owner, record.phase));
        Some(Ok(()))
    }
}

struct Hook(Log);

impl GuestSlot for Hook {
    fn point_at_destination(&mut self, _: u16) {
        self.0.lock().expect("log").push("point destination".into());
    }
    fn point_at_source(&mut self, _: u16) {
        self.0.lock().expect("log").push("point source".into());
    }
}

struct FenceHook(Log, Drive);

impl FenceControl for FenceHook {
    fn raise(&mut self, end: Owner) {
        if end == Owner::Destination {
            return self.0.lock().expect("log").push("destination fenced".into());
        }
        self.0.lock().expect("log").push("fence up".into());
        let mut source = self.1.lock();
        source.fenced = true;
        if source.wakes_at_fence > 0 {
            source.wakes_at_fence -= 1;
            source.controllers.values_mut().for_each(|controller| controller.suspended = false);
        }
    }
    fn lower(&mut self, end: Owner) {
        let what = if end == Owner::Destination { "destination admitted" } else { "fence down" };
        if end == Owner::Source {
            self.1.lock().fenced = false;
        }
        self.0.lock().expect("log").push(what.into());
    }
}

impl GuestView for Hook {
    fn sample(&mut self) -> GuestSample {
        GuestSample { iops: 10_000, ..GuestSample::default() }
    }
}

/// Two drives, a guest and a migration between them.
struct World {
    source: Drive,
    destination: Drive,
    log: Log,
    paper: Paper,
    migration: Migration,
    now: u64,
    random: u64,
    /// Guest writes per step.
    writes: u64,
}

const BLOCKS: u64 = 4096;

fn config() -> MigrationConfig {
    MigrationConfig {
        namespaces: vec![(1, 1)],
        controllers: vec![(SOURCE, DESTINATION)],
        cdq_slots: 4096,
        ..MigrationConfig::default()
    }
}

impl World {
    fn new(config: MigrationConfig, prepare: impl FnOnce(&Drive, &Drive)) -> Self {
        Self::with(config, prepare, seat::<Cdq>())
    }

    fn with(config: MigrationConfig, prepare: impl FnOnce(&Drive, &Drive), cdq: Box<dyn Seat<Cdq>>) -> Self {
        Self::of(prepare, cdq, seat::<Copy>(), |with| Migration::new(config, with, Time(0)).expect("migration"))
    }

    fn over(config: MigrationConfig, prepare: impl FnOnce(&Drive, &Drive), copy: Box<dyn Seat<Copy>>) -> Self {
        Self::of(prepare, seat::<Cdq>(), copy, |with| Migration::new(config, with, Time(0)).expect("migration"))
    }

    fn of(
        prepare: impl FnOnce(&Drive, &Drive),
        cdq: Box<dyn Seat<Cdq>>,
        copy: Box<dyn Seat<Copy>>,
        migration: impl FnOnce(Ingredients) -> Migration,
    ) -> Self {
        let log = Log::default();
        let source = Drive::new("s", 0, &[SOURCE, 2], BLOCKS, &log);
        let destination = Drive::new("d", 10, &[DESTINATION, 12], BLOCKS, &log);
        source.lock().attached = vec![0, SOURCE];
        destination.lock().media.fill(0xa5);
        destination.lock().stable.fill(0xa5);
        for (index, chunk) in source.lock().media.chunks_mut(BLOCK).enumerate() {
            // A third of the namespace is zeroes.
            chunk.fill(if index / 512 % 3 == 0 { 0 } else { index as u8 | 1 });
        }
        prepare(&source, &destination);
        let space = AddressSpace::default();
        let oncs = destination.lock().identify.oncs;
        let features = LocalFeatures { compare: oncs.compare(), write_uncorrectable: oncs.write_uncorrectable(), reads_zero: false };
        let paper = Paper { log: Arc::clone(&log), ..Paper::default() };
        let with = Ingredients {
            source: Box::new(FakeMmc { drive: source.clone() }),
            source_queue: Box::new(FakeQueue::new(&source)),
            source_space: space,
            destination: Box::new(FakeMmc { drive: destination.clone() }),
            media: Box::new(LocalDestination::new(Box::new(FakeQueue::new(&destination)), AddressSpace::default(), features)),
            policies: Policies { cdq: vec![cdq], tracking: seat::<Tracking>(), copy },
            hooks: Hooks {
                slot: Box::new(Hook(Arc::clone(&log))),
                journal: Box::new(paper.clone()),
                fence: Box::new(FenceHook(Arc::clone(&log), source.clone())),
                guest: Box::new(Hook(Arc::clone(&log))),
            },
        };
        let migration = migration(with);
        Self { source, destination, log, paper, migration, now: 0, random: 42, writes: 1 }
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    fn step(&mut self) {
        self.now += 10_000;
        for _ in 0..self.writes {
            let (slba, blocks, byte) = (self.random() % (BLOCKS - 8), 1 + self.random() % 8, self.random() as u8);
            self.source.guest_write(SOURCE, slba, blocks, byte);
        }
        let _progress = self.migration.poll(Time(self.now));
    }

    /// More entries at once than a small queue holds.
    fn burst(&self, writes: u64) {
        for lba in 0..writes {
            self.source.guest_write(SOURCE, 2 * lba, 1, 0x99);
        }
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

    fn until(&mut self, phase: Phase) {
        self.run_until(|world| world.migration.phase() == phase);
    }

    /// The destination has what the source has, flushed.
    fn assert_equal(&self) {
        let (source, destination) = (self.source.lock(), self.destination.lock());
        for lba in 0..BLOCKS as usize {
            let range = lba * BLOCK..(lba + 1) * BLOCK;
            if !destination.unreadable.contains(&(lba as u64)) {
                assert!(source.media[range.clone()] == destination.stable[range], "block {lba} differs");
            }
        }
    }

    /// The guest runs at the source and nothing of the migration is left there.
    fn assert_source_serves(&self) {
        let source = self.source.lock();
        assert!(!source.controllers[&SOURCE].suspended, "the source is suspended");
        assert!(!source.controllers[&SOURCE].live, "the queue is left");
        assert_eq!(source.limit, 0, "the guest is throttled");
        let log = self.log.lock().expect("log");
        let (ups, downs) = (count(&log, "fence up"), count(&log, "fence down"));
        assert_eq!(ups, downs, "the fence is up");
        assert_eq!(count(&log, "point destination"), count(&log, "point source"));
        let last = self.paper.records.lock().expect("records").last().copied();
        assert!(last.is_none_or(|record| record.owner == crate::Owner::Source), "{last:?}");
    }
}

fn said(world: &World, what: &str) -> bool {
    world.log.lock().expect("log").iter().any(|line| line == what)
}

fn count(log: &[String], what: &str) -> usize {
    log.iter().filter(|line| *line == what).count()
}
