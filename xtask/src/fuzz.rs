//! `cargo xtask fuzz`: hostile guests, devices, files, states, policies and clients, for some seconds each.

use crate::Outcome;
use crate::process::{become_it, cargo};
use crate::tree::Tree;
use std::process::Command;

pub const HELP: &str = "\
Replays the corpus of each fuzz target, then mutates it for some seconds. Needs nothing but the
stable compiler; `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer TARGET` goes on for as
long as you like, guided by coverage, with a nightly compiler. On failure the input is written to
target/fuzz/findings, and the command that runs it again is printed.

Usage: cargo xtask fuzz [OPTIONS]

Options:
  --target NAME  controller, driver, config, state, policy, vfio_user or nvme_tcp; all of them without it
  --seconds N    how long each target is mutated; 5 without it
  --seed N       what the mutations follow from; 1 without it
  --replay FILE  run one input of the target that --target names
  --help         this text

Example: cargo xtask fuzz --target driver --seconds 60
";

pub fn run(tree: &Tree, args: Vec<String>) -> Outcome {
    become_it(command(tree, &["run"])?.args(["--bin", "timeboxed", "--"]).args(args))
}

/// Cargo on the fuzz targets, which have a profile and a target folder of their own. `args` begin with its command.
pub fn command(tree: &Tree, args: &[&str]) -> Outcome<Command> {
    let mut command = cargo(tree, args);
    command.args(["--release", "--manifest-path", "tests/fuzz/Cargo.toml"]).env("CARGO_TARGET_DIR", tree.target("fuzz")?);
    Ok(command)
}
