//! A migration with its guests in one thread under a made-up clock: who is polled next and how far time goes is the seed's.
//!
//! A [`Moving`] owns two subsystems over [`Disk`]s, a guest per migratable controller, both management controllers, and the
//! migration while there is one. [`Moving::turn`] polls one of them. After each turn what must always hold is looked at: a
//! controller takes commands only while the durable record says that its side serves, and never behind its fence. At the end
//! [`Moving::judge`] compares both disks and the guests' ledgers.

use crate::disk::Disk;
use crate::paper::Paper;
use crate::hand::Hand;
use crate::plan::{Plan, natives};
use crate::rig::{MIGRATABLE, NSID, Side};
use dray_controller::Subsystem;
use dray_device::command::CommandQueue;
use dray_device::function::Function;
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Plug, Slot};
use dray_device::space::AddressSpace;
use dray_driver::Driver;
use dray_migration::mmc::Health;
use dray_migration::{
    DriverMmc, FenceControl, GuestSample, GuestSlot, GuestView, Hooks, Ingredients, LocalDestination, LocalFeatures,
    Migration, MigrationConfig, Mmc, Outcome, Owner, Phase, Policies, Report,
};
use dray_nvme::registers::offset;
use dray_workload::guest::{Guest, GuestHandle, GuestSampler, GuestStage};
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::verify::{self, Comparison};
use std::sync::Arc;

/// Entries of the I/O queues that the media is copied through.
const COPY_QUEUE: u16 = 64;
/// Virtual time that anything may take, µs.
const PATIENCE_US: u64 = 120_000_000;
/// Turns without any work after which time goes faster.
const QUIET_TURNS: u32 = 16;
/// Bytes of a guest's block.
const GUEST_BLOCK: u64 = 4096;

/// One side.
#[derive(Debug)]
pub struct Machine {
    /// The subsystem.
    pub subsystem: Subsystem,
    /// Its disk.
    pub disk: Disk,
    /// The function of its management controller, for who wants to do it harm.
    pub management: Arc<dyn Function>,
    /// The fences of its migratable controllers.
    pub fences: Vec<Fence>,
    /// Where slots of its migratable controllers are pointed.
    pub plugs: Vec<Plug>,
    /// Commands that each migratable controller had fetched at the last look.
    fetched: Vec<u64>,
}

impl Machine {
    fn new(side: Side, disk: Disk, plan: &Plan) -> (Self, Slot) {
        let guests = plan.controllers();
        let fences = (0..guests).map(|guest| side.fence(MIGRATABLE + guest)).collect();
        let subsystem = Subsystem::new(side.config, side.namespaces).expect("a subsystem");
        let plug = |cntlid| subsystem.plug(cntlid).expect("a controller of that CNTLID");
        let slot = Slot::new(AddressSpace::default(), 2).expect("a slot");
        slot.point_at(&plug(plan.management));
        let plugs = (0..guests).map(|guest| plug(MIGRATABLE + guest)).collect();
        let fetched = vec![0; usize::from(guests)];
        (Self { management: slot.function(), plugs, subsystem, disk, fences, fetched }, slot)
    }

    /// Resets the management controller past its driver, and takes the power from the disk at the same moment.
    pub fn crash(&self) {
        self.management.write32(offset::CC, 0);
        self.disk.power_loss();
    }

    /// Commands that a migratable controller has fetched.
    #[must_use]
    pub fn fetched(&self, guest: usize) -> u64 {
        let cntlid = MIGRATABLE + guest as u16;
        self.subsystem.counters().find(|(id, _)| *id == cntlid).map_or(0, |(_, counters)| counters.fetched)
    }
}

/// A guest and its slot.
pub struct Tenant {
    /// What is seen of it from outside.
    pub handle: GuestHandle,
    /// Its slot.
    pub slot: Slot,
    guest: Guest,
}

/// The guests' slots, pointed from side to side.
struct Slots {
    slots: Vec<(Slot, Plug, Plug, Option<GuestHandle>)>,
    paper: Paper,
}

impl GuestSlot for Slots {
    fn point_at_destination(&mut self, cntlid: u16) {
        let Some((slot, _, to, guest)) = self.slots.get(usize::from(cntlid - MIGRATABLE)) else { return };
        if let Some(guest) = guest {
            guest.mark_suspend();
        }
        self.paper.expect("a slot is pointed at the destination", Owner::Destination);
        slot.point_at(to);
    }

    fn point_at_source(&mut self, cntlid: u16) {
        let Some((slot, from, _, guest)) = self.slots.get(usize::from(cntlid - MIGRATABLE)) else { return };
        self.paper.expect("a slot is pointed back at the source", Owner::Source);
        slot.point_at(from);
        if let Some(guest) = guest {
            guest.clear_marks();
        }
    }
}

/// The fences of the source's and of the destination's controllers.
struct Fences([Vec<Fence>; 2], Paper);

impl FenceControl for Fences {
    fn raise(&mut self, end: Owner) {
        if end == Owner::Source {
            self.1.expect("the source's fence is raised", Owner::Source);
        }
        self.0[end as usize].iter().for_each(Fence::raise);
    }

    fn lower(&mut self, end: Owner) {
        self.1.expect("a fence is lowered", end);
        self.0[end as usize].iter().for_each(Fence::lower);
    }
}

struct Figures(GuestSampler);

impl GuestView for Figures {
    fn sample(&mut self) -> GuestSample {
        let dray_workload::guest::GuestSample { p50_us, p99_us, p99_before_us, iops } = self.0.sample();
        GuestSample { p50_us, p99_us, p99_before_us, iops }
    }
}

/// What a turn's poll said: who it was, and what was done.
struct Done {
    who: usize,
    work: u32,
}

/// Two machines, guests and a migration.
pub struct Moving {
    /// The time of the next turn.
    pub now: Time,
    /// The two sides.
    pub machines: [Machine; 2],
    /// The guests.
    pub tenants: Vec<Tenant>,
    /// The controller in the test's own hand.
    pub hand: Option<Hand>,
    /// The test ends suspensions by resets: the source may serve until its record says otherwise.
    pub loose: bool,
    /// The migration is not polled.
    pub frozen: bool,
    /// The migration, from [`start`](Self::start) to its end.
    pub migration: Option<Migration>,
    /// The journal.
    pub paper: Paper,
    /// Which side serves.
    pub owner: usize,
    /// The last migration's report.
    pub report: Report,
    /// Changes with everything that happens.
    pub trace: u64,
    /// The migration's configuration, for the next start.
    pub config: MigrationConfig,
    /// The policies of the last migration.
    pub policies: Option<Policies>,
    random: fastrand::Rng,
    quiet: u32,
    managers: [Option<Box<dyn Mmc>>; 2],
    spaces: [AddressSpace; 2],
}

impl Moving {
    /// Sets everything up; the guests run.
    ///
    /// # Panics
    /// When something does not come up.
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let disks = [
            Disk::new(plan.seed ^ 0x51, plan.bytes, plan.block_bytes, plan.latency_ns),
            Disk::new(plan.seed ^ 0xd2, plan.destination_bytes, plan.destination_block, plan.latency_ns),
        ];
        disks[0].fill_noise(plan.seed);
        disks[1].fill(0xa5);
        let mut managers = [None, None];
        let mut spaces = [AddressSpace::default(), AddressSpace::default()];
        let mut index = 0;
        let machines = disks.map(|disk| {
            let mut side = Side::over(disk.backing());
            for guest in 1..plan.controllers() {
                side = side.and_controller(MIGRATABLE + guest, vec![NSID]);
            }
            if plan.spare {
                side = side.and_controller(MIGRATABLE + plan.controllers(), Vec::new());
            }
            let (machine, slot) = Machine::new(side, disk, plan);
            let driver = Driver::new(slot.function(), plan.driver.clone()).expect("a driver");
            spaces[index] = slot.space().clone();
            managers[index] = Some(Box::new(DriverMmc::new(driver, COPY_QUEUE)) as Box<dyn Mmc>);
            index += 1;
            machine
        });
        let hand = plan.hand.then(|| Hand::new(&machines[0].plugs[usize::from(plan.guests)]));
        let tenants: Vec<_> = (0..plan.guests).map(|guest| tenant(plan, &machines[0], guest)).collect();
        let mut config = plan.config.clone();
        config.controllers = (0..plan.controllers()).map(|guest| (MIGRATABLE + guest, MIGRATABLE + guest)).collect();
        let mut moving = Self {
            now: Time::from_us(1),
            machines,
            tenants,
            hand,
            loose: false,
            frozen: false,
            migration: None,
            paper: Paper::default(),
            owner: 0,
            report: Report::default(),
            trace: 0,
            config,
            policies: None,
            random: fastrand::Rng::with_seed(plan.seed),
            quiet: 0,
            managers,
            spaces,
        };
        moving.until("the guests come up", |moving| {
            let running = moving.tenants.iter().all(|tenant| tenant.handle.stage() == GuestStage::Running);
            running && moving.hand.as_ref().is_none_or(Hand::is_ready)
        });
        moving
    }

    /// Polls somebody; time passes.
    ///
    /// # Panics
    /// When what must always hold does not.
    pub fn turn(&mut self) {
        let now = self.now;
        let tenants = self.tenants.len();
        let who = self.random.usize(0..4 + tenants + usize::from(self.hand.is_some()));
        let work = match who {
            0 | 1 => self.machines[who].subsystem.poll(now).work,
            2 | 3 => match (&mut self.migration, who) {
                (Some(_), _) if self.frozen => 0,
                (Some(migration), _) => migration.poll(now).work,
                (None, _) => self.managers[who - 2].as_mut().map_or(0, |manager| manager.poll(now).work),
            },
            _ if who - 4 < tenants => self.tenants[who - 4].guest.poll(now).work,
            _ => self.hand.as_mut().map_or(0, |hand| hand.poll(now)),
        };
        self.note(&Done { who, work });
        self.look();
        self.quiet = if work > 0 { 0 } else { self.quiet + 1 };
        let most_ns = if self.quiet < QUIET_TURNS { 400 } else { 6_000 };
        self.now = now.after_ns(self.random.u64(most_ns / 4..=most_ns));
        self.paper.tick(self.now);
    }

    fn note(&mut self, done: &Done) {
        if done.work > 0 {
            let word = self.now.0 ^ (done.who as u64) << 56 ^ u64::from(done.work) << 40;
            self.trace = (self.trace ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
        }
    }

    /// A controller takes commands only while the durable record says that its side serves, and never behind its fence.
    fn look(&mut self) {
        let serving = self.paper.serving(self.loose).map(|owner| (owner == Owner::Destination) != (self.owner == 1));
        for side in 0..2 {
            for guest in 0..self.machines[side].fences.len() {
                let fetched = self.machines[side].fetched(guest);
                if fetched == self.machines[side].fetched[guest] {
                    continue;
                }
                self.machines[side].fetched[guest] = fetched;
                let may = match serving {
                    Some(destination) => destination == (side == 1),
                    None => false,
                };
                let fenced = self.machines[side].fences[guest].is_up();
                assert!(may && !fenced, "side {side} takes commands, fenced {fenced}: {:?}", self.paper.records());
            }
        }
    }

    /// Turns until `done`.
    ///
    /// # Panics
    /// When it takes two minutes of virtual time.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = self.now.after_us(PATIENCE_US);
        while !done(self) {
            let stages: Vec<_> = self.tenants.iter().map(|tenant| tenant.handle.stage()).collect();
            let why: Vec<_> = self.tenants.iter().filter_map(|tenant| tenant.handle.first_error()).collect();
            assert!(self.now < end, "{what}: {:?} {stages:?} {why:?}", self.migration.as_ref().map(|m| (m.phase(), m.report().clone())));
            self.turn();
        }
    }

    /// Turns for some time, µs.
    pub fn pass(&mut self, us: u64) {
        let end = self.now.after_us(us);
        while self.now < end {
            self.turn();
        }
    }

    /// So many turns.
    pub fn turns(&mut self, turns: u64) {
        for _ in 0..turns {
            self.turn();
        }
    }

    /// Turns until the migration is in that phase, or over.
    #[track_caller]
    pub fn phase(&mut self, phase: Phase) {
        self.until("the phase", |moving| moving.migration.as_ref().is_none_or(|m| m.phase() == phase || m.phase() == Phase::Ended));
    }

    /// Begins a migration from the side that serves to the other, with native policies.
    pub fn start(&mut self) {
        self.start_with(natives(self.config.controllers.len()));
    }

    /// Begins a migration with these policies.
    ///
    /// # Panics
    /// When a management controller does not come up.
    #[track_caller]
    pub fn start_with(&mut self, policies: Policies) {
        let (from, to) = (self.owner, 1 - self.owner);
        let (source_queue, queue) = (self.queue(from), self.queue(to));
        let slots = self.tenants.iter().enumerate().map(|(guest, tenant)| {
            let plug = |side: usize| self.machines[side].plugs[guest].clone();
            (tenant.slot.clone(), plug(from), plug(to), Some(tenant.handle.clone()))
        });
        let by_hand = self.hand.as_ref().map(|hand| {
            let plug = |side: usize| self.machines[side].plugs[self.tenants.len()].clone();
            (hand.slot.clone(), plug(from), plug(to), None)
        });
        let hooks = Hooks {
            slot: Box::new(Slots { slots: slots.chain(by_hand).collect(), paper: self.paper.clone() }),
            journal: Box::new(self.paper.clone()),
            fence: Box::new(Fences([from, to].map(|side| self.machines[side].fences.clone()), self.paper.clone())),
            guest: Box::new(Figures(self.tenants[0].handle.sampler())),
        };
        let features = LocalFeatures { compare: true, write_uncorrectable: true, reads_zero: false };
        let take = |manager: &mut Option<Box<dyn Mmc>>| manager.take().expect("a management controller");
        self.paper.begin();
        let with = Ingredients {
            source: take(&mut self.managers[from]),
            source_queue,
            source_space: self.spaces[from].clone(),
            destination: take(&mut self.managers[to]),
            media: Box::new(LocalDestination::new(queue, self.spaces[to].clone(), features)),
            policies,
            hooks,
        };
        self.migration = Some(Migration::new(self.config.clone(), with, self.now).expect("a migration"));
    }

    /// An I/O queue of a management controller.
    fn queue(&mut self, side: usize) -> Box<dyn CommandQueue> {
        let mut asked = false;
        let mut queue = None;
        self.until("a queue of a management controller", |moving| {
            let now = moving.now;
            let Some(manager) = &mut moving.managers[side] else { return false };
            if !asked {
                asked = manager.health() == Health::Ready && manager.create_io_queue(now).is_ok();
            } else if let Some(made) = manager.io_queue() {
                queue = Some(made.expect("an I/O queue"));
            }
            queue.is_some()
        });
        queue.expect("a queue")
    }

    /// Turns until the migration has ended; says how. It keeps what it was made of.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn migration_ends(&mut self) -> Outcome {
        self.until("the migration ends", |moving| moving.migration.as_ref().is_none_or(|m| m.phase() == Phase::Ended));
        self.migration.as_ref().expect("a migration").outcome().clone()
    }

    /// Turns until the migration has ended, and takes it apart for the next one; says how it ended.
    ///
    /// # Panics
    /// When it does not end, or the record contradicts it.
    #[track_caller]
    pub fn run(&mut self) -> Outcome {
        let outcome = self.migration_ends();
        let (source, destination, policies, _, report) = self.migration.take().expect("a migration").finish();
        (self.managers[self.owner], self.managers[1 - self.owner]) = (Some(source), Some(destination));
        self.config.id += 1;
        self.report = report;
        self.policies = Some(policies);
        if outcome == Outcome::Moved {
            self.owner = 1 - self.owner;
        }
        self.paper.settle(outcome == Outcome::Moved);
        outcome
    }

    /// Whether the migration is at that step of the switch-over.
    #[must_use]
    pub fn is_at(&self, step: &str) -> bool {
        self.migration.as_ref().is_some_and(|migration| migration.progress(self.now).phase == step)
    }

    /// Moves, goes on for a while, resets every guest's controller, stops, and compares.
    ///
    /// # Panics
    /// When anything is wrong.
    #[track_caller]
    pub fn run_and_judge(&mut self) {
        assert_eq!(self.run(), Outcome::Moved, "{:?}", self.report);
        self.goes_on();
        self.judge();
    }

    /// The guests write more, reset their controllers and find the same identity.
    ///
    /// # Panics
    /// When they do not.
    #[track_caller]
    pub fn goes_on(&mut self) {
        for index in 0..self.tenants.len() {
            let handle = self.tenants[index].handle.clone();
            let before = handle.counters();
            self.until(&format!("the guest goes on at {}", self.owner), |_| handle.counters().writes >= before.writes + 20);
            handle.request_reset();
            self.until("the guest resets its controller", |_| {
                handle.counters().resets > before.resets && handle.stage() == GuestStage::Running || handle.is_over()
            });
            let writes = handle.counters().writes;
            self.until("the guest goes on after its reset", |_| handle.counters().writes >= writes + 20 || handle.is_over());
        }
    }

    /// Stops the guests and compares: both disks if the namespace has moved, else the source with the ledgers.
    ///
    /// # Panics
    /// When anything is wrong.
    #[track_caller]
    pub fn judge(&mut self) {
        self.stop();
        for tenant in &self.tenants {
            let stats = tenant.handle.stats();
            assert!(stats.is_ok(), "{stats:?}");
        }
        for (guest, found) in self.compare().into_iter().enumerate() {
            assert!(found.is_ok(), "guest {guest}: {found:?}");
            assert!(found.writes_acknowledged > 0);
        }
        assert_eq!(self.machines[1 - self.owner].disk.overlaps(), 0, "writes under way to the same blocks");
    }

    /// The guests stop.
    #[track_caller]
    pub fn stop(&mut self) {
        self.tenants.iter().for_each(|tenant| tenant.handle.stop());
        self.until("the guests stop", |moving| moving.tenants.iter().all(|tenant| tenant.handle.is_over()));
    }

    /// What the comparison finds, guest by guest.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn compare(&self) -> Vec<Comparison> {
        let moved = self.tenants[0].handle.ledger().suspend_floor().is_some();
        let disks = [self.machines[1 - self.owner].disk.bytes(), self.machines[self.owner].disk.bytes()];
        let compare = |guest: usize| {
            let [mut frozen, mut serving] = disks.clone();
            for (other, tenant) in self.tenants.iter().enumerate().filter(|(other, _)| *other != guest) {
                let _masked = other;
                for &block in tenant.handle.ledger().blocks() {
                    let range = (block * GUEST_BLOCK) as usize..((block + 1) * GUEST_BLOCK) as usize;
                    frozen[range.clone()].fill(0);
                    serving[range].fill(0);
                }
            }
            let ledger = self.tenants[guest].handle.ledger();
            let found = if moved { verify::compare(&mut frozen, &mut serving, ledger) } else { verify::check(&mut serving, ledger) };
            found.expect("a comparison")
        };
        (0..self.tenants.len()).map(compare).collect()
    }

    /// Somebody resets a guest's controller without asking the guest.
    pub fn reset_controller(&self, guest: usize) {
        self.tenants[guest].slot.function().write32(offset::CC, 0);
    }
}

fn tenant(plan: &Plan, machine: &Machine, guest: u16) -> Tenant {
    let slot = Slot::new(AddressSpace::default(), crate::rig::IO_QUEUES + 1).expect("a slot");
    slot.point_at(&machine.plugs[usize::from(guest)]);
    let driver = Driver::new(slot.function(), plan.guest_driver.clone()).expect("a driver");
    // Every guest has blocks of its own, over the whole namespace.
    let (all, guests) = (plan.bytes / GUEST_BLOCK, u64::from(plan.guests));
    let stride = (all / plan.targets / guests * guests).max(guests);
    let blocks = (0..plan.targets).map(|i| i * stride + u64::from(guest)).filter(|block| *block < all).collect();
    let spec = LedgerSpec { seed: plan.seed.wrapping_mul(31) + u64::from(guest), guest: u32::from(guest) + 1, blocks };
    let ledger = Arc::new(Ledger::in_memory(&spec).expect("a ledger"));
    let (guest, handle) = Guest::new(driver, plan.load.clone(), ledger).expect("a guest");
    Tenant { handle, slot, guest }
}
