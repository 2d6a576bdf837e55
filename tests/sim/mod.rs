//! The simulator: the whole system in one thread under virtual time, from one seed.
//!
//! A seed becomes a [`Scenario`](scenario::Scenario): sizes, load, latencies, and what goes wrong when. The
//! [`World`](world::World) has two subsystems over simulated [`disk`]s, a [`bus`] before each management controller, [`guest`]s,
//! a migration with its [`policies`], and the real record store over a simulated disk ([`slots`]); it polls them in the seed's
//! order and lets the [`deeds`] happen. Everybody says what happens as [`event`]s, and the two [`oracle`]s judge them. The same
//! seed is the same run, to the last event.
//!
//! Start reading with [`event`], then [`oracle`], then [`world`].

pub mod bus;
pub mod content;
pub mod coverage;
pub mod deeds;
pub mod disk;
pub mod event;
pub mod fault;
pub mod found;
pub mod guest;
pub mod latencies;
pub mod machine;
pub mod oracle;
pub mod planted;
pub mod policies;
pub mod restart;
pub mod runner;
pub mod scenario;
pub mod script;
pub mod slots;
pub mod trace;
pub mod world;

use coverage::{Coverage, Kind};
use event::{Stamped, Violation};
use guest::GuestPlan;
use oracle::Facts;
use policies::Kit;
use scenario::Scenario;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hasher};
use world::World;

/// How seeds are run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Deeds of the scenario that are left out, by their places.
    pub without: BTreeSet<usize>,
    /// The events are kept, for who wants to tell what happened: the same seed can be run again for that.
    pub keep_events: bool,
    /// The events are hashed, for who wants to know whether two runs were the same.
    pub hash: bool,
}

/// What a run was.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its events, if the options asked for them.
    pub events: Vec<Stamped>,
    /// What was reached.
    pub coverage: Coverage,
    /// What is wrong, if something is.
    pub violation: Option<Violation>,
    /// Virtual time it took, µs.
    pub virtual_us: u64,
    /// Commands that guests ended.
    pub commands: u64,
    /// Migrations that ended.
    pub migrations: u64,
    /// Turns of the scheduler.
    pub turns: u64,
    /// Of all events, if the options asked for it.
    pub hash: u64,
}

/// Who reads the events: all of them and a hash, as far as the options ask for it.
#[derive(Debug)]
pub struct Log {
    /// The events.
    pub events: Vec<Stamped>,
    /// Migrations that ended.
    pub migrations: u64,
    keep: bool,
    hash: Option<DefaultHasher>,
}

impl Log {
    /// A log as the options want it.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self { events: Vec::new(), migrations: 0, keep: options.keep_events, hash: options.hash.then(DefaultHasher::new) }
    }

    /// One more event.
    pub fn keep(&mut self, stamped: Stamped) {
        if let Some(hash) = &mut self.hash {
            let mut text = String::new();
            let _infallible = write!(text, "{stamped:?}");
            hash.write(text.as_bytes());
        }
        if self.keep {
            self.events.push(stamped);
        }
    }
}

/// Runs a seed. A panic of the product goes through to the caller.
#[must_use]
pub fn run(seed: u64, options: &Options, kit: &Kit) -> Run {
    let mut world = World::new(scenario::of(seed, options), options, kit);
    world.coverage.expect(Kind::State, states());
    world.coverage.expect(Kind::End, ends());
    let violation = world.play().err();
    let (commands, log) = (world.ended(), &mut world.log);
    Run {
        events: std::mem::take(&mut log.events),
        violation,
        virtual_us: world.now.0 / 1_000,
        commands,
        migrations: log.migrations,
        turns: world.turns,
        hash: log.hash.as_ref().map_or(0, DefaultHasher::finish),
        coverage: world.coverage,
    }
}

fn steps() -> impl Iterator<Item = &'static str> {
    world::STEPS.iter().map(|step| step.name())
}

/// States that seeds must reach.
fn states() -> impl Iterator<Item = String> {
    let phases = ["checking", "opening", "copying", "switching over", "completing", "undoing", "ended"];
    phases.into_iter().map(str::to_owned).chain(steps().map(|step| format!("step {step}")))
}

/// Ways to end, and states to be cancelled in.
fn ends() -> impl Iterator<Item = String> {
    let states = ["checking", "opening", "copying", "completing", "undoing"].into_iter().chain(steps());
    // Pointing the slots is over within the poll that begins it.
    let states = states.filter(|state| *state != "point");
    states.map(|state| format!("cancelled in {state}")).chain(["moved", "undone", "in doubt", "power cut"].map(str::to_owned))
}

/// What the oracles know of a scenario before it begins.
fn facts(scenario: &Scenario) -> Facts {
    let namespaces = scenario.namespaces.iter().enumerate();
    Facts {
        seed: scenario.seed,
        namespaces: namespaces.map(|(index, blocks)| (1 + index as u32, *blocks, scenario.block_bytes)).collect(),
        cached: scenario.cached,
    }
}

/// The plan of a guest in one of its lives.
fn guest_plan(scenario: &Scenario, guest: usize, life: u32) -> GuestPlan {
    let load = &scenario.guests[guest];
    let region = |nsid: &u32| (*nsid, 0, scenario.namespaces[*nsid as usize - 1]);
    GuestPlan {
        seed: scenario.seed ^ (guest as u64 + 1) << 40 ^ u64::from(life) << 48,
        guest,
        life,
        namespaces: load.namespaces.iter().map(region).collect(),
        block_bytes: scenario.block_bytes,
        commands: u64::from(u32::MAX),
        depth: load.depth,
        queues: load.queues,
        max_blocks: load.max_blocks,
        gap_ns: load.gap_ns,
        hot: load.hot,
        mix: guest::Mix::default(),
        io_timeout_ms: 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_is_the_same_run() {
        let kit = Kit::new().expect("policies");
        let options = Options { hash: true, ..Options::default() };
        for seed in 1..20 {
            let (first, second) = (run(seed, &options, &kit), run(seed, &options, &kit));
            assert_eq!((first.hash, first.turns, first.commands), (second.hash, second.turns, second.commands), "seed {seed}");
            assert_ne!(first.hash, 0);
        }
    }
}
