//! `cargo xtask bench`: the figures, measured alone on the machine.

use crate::process::{become_it, cargo, run as run_it};
use crate::tree::Tree;
use crate::{Outcome, plugins, sim, take_flag};

pub const HELP: &str = "\
Measures Dray and prints a table with the bound of each figure beside it; the same goes to
target/bench/summary.json. Run it alone: a build next to it ruins the figures.

Usage: cargo xtask bench [--yes] [OPTIONS OF THE BENCH]

Options:
  --filter TEXT  only figures whose name contains TEXT
  --quick        one short run of each: shows that they can be measured, not what they are
  --json PATH    where the figures go instead
  --yes          fetch a compiler for the policies without asking
  --help         this text

Example: cargo xtask bench --filter cdq.
";

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let yes = take_flag(&mut args, "--yes");
    plugins::build(tree, yes)?;
    tree.target("bench")?;
    run_it(&mut cargo(tree, &sim::BUILD))?;
    // The profile and the package selection of `cargo xtask test`: another one would compile wasmtime again.
    let mut bench = cargo(tree, &["bench", "--profile", "release", "--workspace", "--bench", "figures", "--"]);
    become_it(bench.args(args))
}
