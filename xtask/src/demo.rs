//! `cargo xtask demo`: from a fresh clone to a namespace that moved.

use crate::process::{become_it, cargo, command, run as execute};
use crate::tree::Tree;
use crate::{Outcome, debian, plugins, take_flag};

pub const HELP: &str = "\
Builds the host and the policies, makes a real disk image, and moves it from one NVMe subsystem to
another while a guest keeps writing; then compares every block. Installs what is missing (Debian's
e2fsprogs; a compiler for the policies): asks first on a terminal.

Usage: cargo xtask demo [--yes] [OPTIONS OF `dray demo`]

Options:
  --yes   install what is missing without asking
  --help  this text; after a build, `target/release/dray demo --help` lists the options of the demo

Example: cargo xtask demo --json
";

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let yes = take_flag(&mut args, "--yes");
    let binary = tree.cargo_target().join("release/dray");
    let first = !binary.exists();
    if first {
        eprintln!(
            "This builds Dray and its policies, makes a 1 GiB disk image of real files and moves it while a guest writes.\n\
             The first time takes about ten minutes on two cores (most of it compiles the sandbox's runtime) and 4 GB of disk \
             under target/,\nwith up to 150 MB to fetch if there is no compiler for Wasm yet. Later runs start at once."
        );
    }
    debian::need("e2fsprogs", &["mkfs.ext4", "debugfs", "e2fsck"], yes)?;
    plugins::build(tree, yes)?;
    if first {
        eprintln!("building the host");
    }
    execute(&mut cargo(tree, &BUILD))?;
    become_it(command(&binary).arg("demo").args(args).current_dir(&tree.root))
}

/// What is built for the demo. `--examples` (there are none) makes cargo resolve features as it does for tests and benches:
/// without it the sandbox's runtime would be compiled again for them. With the lock file and every crate here, cargo touches
/// no network.
pub const BUILD: [&str; 5] = ["build", "--release", "--workspace", "--bins", "--examples"];
