//! `cargo xtask bench`: the figures, measured alone on the machine.

use crate::process::{become_it, cargo, run as run_it};
use crate::tree::Tree;
use crate::{Outcome, debian, plugins, sim, take_flag};

/// Rows that have fio's figure beside them.
const BESIDE_FIO: [&str; 3] = ["vfio_user.file.randread.qd32", "nvme_tcp.file.randread.qd32", "vfio_user.file.randwrite.qd32"];

pub const HELP: &str = "\
Measures Dray and prints a table with the bound of each figure beside it; the same goes to
target/bench/summary.json. Run it alone: a build next to it ruins the figures.

Usage: cargo xtask bench [--yes] [OPTIONS OF THE BENCH]

Options:
  --filter TEXT  only figures whose name contains TEXT
  --quick        one short run of each: shows that they can be measured, not what they are
  --json PATH    where the figures go instead
  --yes          fetch a compiler for the policies, and Debian's fio for the rows beside it, without asking
  --help         this text

Example: cargo xtask bench --filter cdq.
";

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let yes = take_flag(&mut args, "--yes");
    if compares_with_fio(&args) {
        debian::need("fio", &["fio"], yes)?;
    }
    plugins::build(tree, yes)?;
    tree.target("bench")?;
    run_it(&mut cargo(tree, &sim::BUILD))?;
    // The profile and the package selection of `cargo xtask test`: another one would compile wasmtime again.
    let mut bench = cargo(tree, &["bench", "--profile", "release", "--workspace", "--bench", "figures", "--"]);
    become_it(bench.args(args))
}

/// Whether the bench will run fio: not where its help is asked for, and a quick run says without it that there is no ratio.
fn compares_with_fio(args: &[String]) -> bool {
    let has = |name: &str| args.iter().any(|arg| arg == name);
    let filter = args.iter().position(|arg| arg == "--filter").and_then(|at| args.get(at + 1));
    !has("--quick") && filter.is_none_or(|filter| BESIDE_FIO.iter().any(|row| row.contains(filter.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(args: &[&str]) -> bool {
        compares_with_fio(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn fio_is_asked_for_only_where_it_runs() {
        assert!(wants(&[]));
        assert!(wants(&["--json", "x", "--filter", "vfio_user."]));
        assert!(wants(&["--filter", ".file."]));
        assert!(!wants(&["--filter", "vfio_user.null"]));
        assert!(!wants(&["--quick"]));
    }
}
