//! `cargo xtask sim`: builds the simulator and runs seeds.

use crate::process::{become_it, cargo, command, run as run_it};
use crate::tree::Tree;
use crate::{Outcome, plugins, take_flag};
use std::process::Command;

pub const HELP: &str = "\
Runs the whole system (guests, controllers, driver, policies, migration, records) in one thread
under virtual time: a seed decides the schedule and the faults, two oracles watch. Prints seeds
per second and how often each fault and each state was reached; a seed that fails is told with
what happened and the command that replays it.

Usage: cargo xtask sim [--yes] [OPTIONS]

Options:
  --seeds N        seeds to run (2000); from 2000 on every fault and state must be reached
  --from S         the first seed (1)
  --minutes M      stop after so many minutes
  --threads T      threads (one per core)
  --keep-going     go on after a seed that fails, and tell all
  --replay SEED    run one seed and tell what happens
  --all-events     with --replay: every event, not only the last that matter
  --without N,..   with --replay: leave out these deeds of the scenario
  --planted FAULT  plant a fault (`all`, or one of `list`) and fail unless an oracle catches it
  --within N       seeds within which a planted fault must be caught (5000)
  --yes            fetch a compiler for the policies without asking
  --help           this text

Example: cargo xtask sim --seeds 20000
One seed again: cargo xtask sim --replay 77
";

/// The simulator has a build of its own: Dray's crates with the places that faults are planted at. The packages and the profile
/// are those of every other build, so wasmtime is not compiled again.
pub const BUILD: [&str; 7] = ["build", "--release", "--workspace", "--features", "dray-tests/sim", "--example", "sim"];

/// The tests of the simulator itself: guests, oracles, bus. The crates that are left out would be compiled once more for tests that
/// ran without the feature; dray-nvme stays, which asks of others what they ask: so nothing is compiled for this alone but
/// dray-tests.
pub const TESTS: [&str; 25] = [
    "test", "--release", "--workspace", "--exclude", "dray", "--exclude", "dray-controller", "--exclude", "dray-device", "--exclude",
    "dray-driver", "--exclude", "dray-export", "--exclude", "dray-migration", "--exclude", "dray-policy", "--exclude", "dray-sandbox",
    "--exclude", "dray-workload", "--features", "dray-tests/sim", "--lib", "sim::",
];

/// The simulator, as [`BUILD`] leaves it.
pub fn program(tree: &Tree) -> Command {
    let mut program = command(tree.cargo_target().join("release/examples/sim"));
    program.current_dir(&tree.root);
    program
}

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let yes = take_flag(&mut args, "--yes");
    plugins::build(tree, yes)?;
    run_it(&mut cargo(tree, &BUILD))?;
    become_it(program(tree).args(args))
}
