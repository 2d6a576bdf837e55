//! What a run does from its beginning to its end: migrations with faults, a restart where the power went, a last migration without
//! faults, and rest.

use super::coverage::Kind;
use super::event::{Event, Side, Violation};
use super::fault::Fault;
use super::machine::{ENDS, Fences, MIGRATABLE, Slots, Watched};
use super::policies::PolicyChoice;
use super::scenario::{Deed, Planned, Trigger};
use super::world::{Halt, Leg, World, violation};
use dray::core::records::RecordJournal;
use dray_device::command::CommandQueue;
use dray_migration::mmc::Health;
use dray_migration::{CopyConfig, 
    Hooks, Ingredients, Limits, LocalDestination, LocalFeatures, Migration, MigrationConfig, Outcome, Phase, Policies, PumpLimits,
};

/// Migrations with easy faults, at most, for a seed whose own did not come to enough.
const EASY: u32 = 4;
/// Virtual time that a migration may take, µs: more than all of its limits together.
const MIGRATION_US: u64 = 2_000_000;
/// Virtual time that anything else may take, µs.
const PATIENCE_US: u64 = 500_000;
/// Migrations without faults of which one must move, and the time between them, µs.
const CLEAN: u32 = 3;
/// See there.
const SETTLE_US: u64 = 10_000;
/// Faults that take effect at least.
const FAULTS: u64 = 3;

/// What a run knows of its migrations.
#[derive(Debug, Default)]
struct Past {
    /// The last one failed.
    failed: bool,
    /// One has moved.
    moved: bool,
}

impl World<'_> {
    /// Everything that a run does.
    ///
    /// # Errors
    /// What an oracle, or the world itself, objects to.
    pub fn play(&mut self) -> Result<(), Violation> {
        let mut past = Past::default();
        for leg in 0..self.scenario.legs.len() {
            let deeds = self.scenario.deeds.iter().filter(|deed| deed.leg == leg).copied().collect();
            self.attempt(Some(leg), deeds, &mut past)?;
        }
        for _ in 0..EASY {
            self.count_faults();
            if self.coverage.faults() >= FAULTS {
                break;
            }
            // Enough to be worth its time, whatever the seed's own came to.
            let easy = [Deed::GuestReset(0), Deed::Cancel, Deed::PowerCut];
            let easy = easy.into_iter().enumerate().map(|(place, what)| {
                Planned { leg: usize::MAX, when: Trigger::AfterCommands(8 * place as u64), what }
            });
            self.attempt(None, easy.collect(), &mut past)?;
        }
        self.heal();
        self.fair = true;
        if past.failed || !past.moved || self.scenario.and_again {
            for _ in 0..CLEAN {
                self.attempt(None, Vec::new(), &mut past)?;
                if !past.failed {
                    break;
                }
                // What is left of the faults: commands that were never answered come to their time-outs.
                self.pass(SETTLE_US)?;
            }
            if past.failed && self.scenario.deviations.iter().all(|set| set.is_empty()) {
                return Err(violation("the system gets somewhere", "a migration without faults did not move".to_owned()));
            }
        }
        self.rest()
    }

    /// Lets time pass.
    fn pass(&mut self, us: u64) -> Result<(), Violation> {
        let end = self.now.after_us(us);
        match self.until("time passes", us * 2, |world| world.now >= end) {
            Err(Halt::Violation(violation)) => Err(violation),
            Ok(()) | Err(Halt::Power) => Ok(()),
        }
    }

    /// A migration, whatever becomes of it; and a restart, if the power goes or nobody knows who serves.
    fn attempt(&mut self, leg: Option<usize>, deeds: Vec<Planned>, past: &mut Past) -> Result<(), Violation> {
        let clean = leg.is_none() && deeds.is_empty();
        if std::mem::take(&mut past.failed) {
            self.took(Fault::SecondAttempt);
        }
        let to = 1 - self.serving;
        let outcome = match self.migrate(leg, deeds, clean) {
            Ok(outcome) => outcome,
            Err(Halt::Violation(violation)) => return Err(violation),
            Err(Halt::Power) => {
                self.log.migrations += 1;
                self.coverage.hit(Kind::End, "power cut");
                self.power_cut()?;
                past.failed = self.serving != to;
                past.moved |= !past.failed;
                return Ok(());
            }
        };
        self.log.migrations += 1;
        match outcome {
            Outcome::Moved => {
                self.coverage.hit(Kind::End, "moved");
                if to == 0 {
                    self.took(Fault::AndBack);
                }
                past.moved = true;
            }
            Outcome::InDoubt { reason, what } => {
                self.coverage.hit(Kind::End, "in doubt");
                if self.leg.done == 0 {
                    return Err(violation("in doubt without a cause", format!("{reason}: {what}")));
                }
                // What an operator would do.
                self.heal();
                self.power_cut()?;
                past.failed = self.serving != to;
            }
            Outcome::Undone(_) | Outcome::Running => {
                self.coverage.hit(Kind::End, "undone");
                past.failed = true;
            }
        }
        Ok(())
    }

    /// A migration from the side that serves to the other, to its end.
    fn migrate(&mut self, leg: Option<usize>, deeds: Vec<Planned>, clean: bool) -> Result<Outcome, Halt> {
        let (from, to) = (self.serving, 1 - self.serving);
        self.leg = Leg::default();
        let source_queue = self.copy_queue(from)?;
        let queue = self.copy_queue(to)?;
        let policies = match leg {
            Some(leg) => self.scenario.legs[leg],
            None => PolicyChoice::NATIVE,
        };
        let (policies, swaps) = self.kit.policies(&policies, self.tenants.len(), &self.policy_log);
        self.swaps = Some(swaps);
        let config = self.config(clean, from, to);
        self.leg = Leg { from, to, began: self.now, ended: self.ended(), deeds, ..Leg::default() };
        self.say(Event::Begins { from, to });
        let migration = self.ingredients(config, policies, [from, to], source_queue, queue)?;
        self.migration = Some(migration);
        self.until("a migration", MIGRATION_US, |world| world.leg.phase == Some(Phase::Ended))?;
        let Some(migration) = self.migration.take() else { return Ok(Outcome::Running) };
        let (source, destination, _policies, _hooks, report) = migration.finish();
        self.swaps = None;
        (self.machines[from].manager, self.machines[to].manager) = (Some(source), Some(destination));
        self.wake_all();
        for _ in 0..report.fills {
            self.took(Fault::QueueFills);
        }
        if report.outcome == Outcome::Moved {
            self.serving = to;
        }
        self.say(Event::Over { outcome: report.outcome.clone() });
        self.tell()?;
        self.count_faults();
        self.next_migration += 1;
        Ok(report.outcome)
    }

    fn config(&self, clean: bool, from: Side, to: Side) -> MigrationConfig {
        let scenario = &self.scenario;
        let guests = 0..self.tenants.len() as u16;
        let limits = Limits {
            max_rounds: 1_000,
            max_time_ms: 1_000,
            downtime_budget_us: 1_000_000,
            compare_budget_us: 1_000_000,
            step_ms: 50,
            max_attempts: 5,
            max_fills: 20,
            patience_us: 2_000,
            ..scenario.limits
        };
        MigrationConfig {
            id: self.next_migration,
            ends: [ENDS[from], ENDS[to]],
            seed: scenario.seed,
            namespaces: (1..=scenario.namespaces.len() as u32).map(|nsid| (nsid, nsid)).collect(),
            controllers: guests.map(|guest| (MIGRATABLE + guest, MIGRATABLE + guest)).collect(),
            cdq_slots: if clean { scenario.cdq_slots.max(512) } else { scenario.cdq_slots },
            // With few transfers over slow media the last round takes longer than the guests wait for a command.
            copy: if clean { CopyConfig { transfers: 16, ..scenario.copy } } else { scenario.copy },
            pump: if clean { PumpLimits { drain_us: 200, hurry_us: 50 } } else { scenario.pump },
            limits: if clean { limits } else { scenario.limits },
            may_throttle: scenario.may_throttle,
            ..MigrationConfig::default()
        }
    }

    fn ingredients(
        &mut self,
        config: MigrationConfig,
        policies: Policies,
        sides: [Side; 2],
        source_queue: Box<dyn CommandQueue>,
        queue: Box<dyn CommandQueue>,
    ) -> Result<Migration, Halt> {
        let [from, to] = sides;
        let journal = RecordJournal::new(self.stores()?, self.records.jobs());
        let slots = self.tenants.iter().enumerate().map(|(guest, tenant)| {
            (tenant.slot.clone(), sides.map(|side| self.machines[side].plugs[guest].clone()))
        });
        let slots = slots.collect();
        let fences = sides.map(|side| self.machines[side].fences.clone());
        let hooks = Hooks {
            slot: Box::new(Slots { sides, slots, say: self.inbox.clone() }),
            journal: Box::new(Watched {
                inner: Box::new(journal),
                pending: None,
                say: self.inbox.clone(),
            }),
            fence: Box::new(Fences { sides, fences, say: self.inbox.clone() }),
            guest: Box::new(self.figures.clone()),
        };
        let features = LocalFeatures { compare: true, write_uncorrectable: true, reads_zero: false };
        let gone = || violation("the system gets somewhere", "a management controller has no driver".to_owned());
        let with = Ingredients {
            source: self.machines[from].manager.take().ok_or_else(gone)?,
            source_queue,
            source_space: self.machines[from].space.clone(),
            destination: self.machines[to].manager.take().ok_or_else(gone)?,
            media: Box::new(LocalDestination::new(queue, self.machines[to].space.clone(), features)),
            policies,
            hooks,
        };
        Migration::new(config, with, self.now).map_err(|error| violation("a migration can be set up", error.to_string()).into())
    }

    /// An I/O queue of a management controller, which is reset if it has failed.
    fn copy_queue(&mut self, side: Side) -> Result<Box<dyn CommandQueue>, Halt> {
        let mut asked = false;
        let mut queue = None;
        // Deletions that are under way get their time.
        let mut again = self.now.after_us(2_000);
        self.until("a management controller comes up", PATIENCE_US, |world| {
            let now = world.now;
            let Some(manager) = &mut world.machines[side].manager else { return false };
            match manager.health() {
                Health::Starting => asked = false,
                Health::Failed(_) if now >= again => {
                    manager.reset(now);
                    (asked, again) = (false, now.after_us(2_000));
                    world.wake_all();
                }
                Health::Failed(_) => asked = false,
                Health::Ready if !asked => match manager.create_io_queue(now) {
                    Ok(()) => {
                        asked = true;
                        world.wake_all();
                    }
                    // Every identifier is taken by a queue that could not be deleted: nothing is suspended here, so it is reset.
                    Err(_) if now >= again => {
                        manager.reset(now);
                        again = now.after_us(2_000);
                        world.wake_all();
                    }
                    Err(_) => {}
                },
                Health::Ready => match manager.io_queue() {
                    Some(Ok(made)) => queue = Some(made),
                    Some(Err(_)) => asked = false,
                    None => {}
                },
            }
            queue.is_some()
        })?;
        queue.ok_or_else(|| violation("the system gets somewhere", "no I/O queue".to_owned()).into())
    }

    /// Guests do what is left, stop, and everything is looked at.
    fn rest(&mut self) -> Result<(), Violation> {
        let rest = |world: &mut Self| -> Result<(), Halt> {
            let commands = world.scenario.commands;
            world.until("the guests' commands", PATIENCE_US * 4, |world| world.ended() >= commands)?;
            world.tenants.iter_mut().for_each(|tenant| tenant.guest.stop());
            world.wake_all();
            world.until("the guests stop", PATIENCE_US, |world| world.tenants.iter().all(|tenant| tenant.guest.is_done()))
        };
        match rest(self) {
            Ok(()) => {}
            Err(Halt::Violation(violation)) => return Err(violation),
            Err(Halt::Power) => self.power_cut()?,
        }
        for (index, disk) in self.disks[self.serving].clone().iter().enumerate() {
            self.say(Event::Rest { nsid: 1 + index as u32, side: self.serving, values: disk.decode_all() });
        }
        self.count_faults();
        self.finish()
    }
}
