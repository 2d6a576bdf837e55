//! `cargo xtask test`: everything that continuous integration checks, in stages with their times.

use crate::process::{cargo, listen, shown, took};
use crate::tree::{Tree, read_text};
use crate::{Outcome, asan, debian, demo, fuzz, guests, plugins, refuse_rest, sim, take_flag};
use std::process::Command;
use std::time::{Duration, Instant};

pub const HELP: &str = "\
Builds and runs all tests, in stages, and prints what each took: set-up (Debian's e2fsprogs), the
policies, the virtual machines (see `cargo xtask guests`), the host with tests and benches, the
bootable image, the host's tests, 2,000 seeds of the simulator and its planted faults, the policies'
own tests on the host, the loom tests of the crates that have some, the fenced memory and the queues
that no kernel has yet (feature kernel-cdq) under AddressSanitizer or, where that is installed, Miri,
the fuzz targets for a few seconds each, our servers before clients that others have written. Stops
at the first stage that fails.

The sandbox's runtime (wasmtime) takes minutes to compile: a run that compiles it twice fails.

Usage: cargo xtask test [OPTIONS]

Options:
  --dry-run  print the commands of the stages and run nothing
  --yes      install what is missing without asking
  --help     this text

Example: cargo xtask test
One test: cargo test --release --workspace NAME
";

/// Crates that compile wasmtime, which is never built with loom's flags.
const WITH_WASMTIME: [&str; 2] = ["sandbox", "appliance"];

/// What the output of the stages said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Heard {
    wasmtime_builds: u32,
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Heard {
    fn line(&mut self, line: &str) {
        let line = line.trim();
        if line.starts_with("Compiling wasmtime v") {
            self.wasmtime_builds += 1;
        }
        // `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
        if let Some(counts) = line.strip_prefix("test result: ") {
            for count in counts.split([';', '.']) {
                let mut words = count.split_whitespace();
                if let (Some(Ok(number)), Some(name)) = (words.next().map(str::parse::<u64>), words.next()) {
                    match name {
                        "passed" => self.passed += number,
                        "failed" => self.failed += number,
                        "ignored" => self.ignored += number,
                        _ => {}
                    }
                }
            }
        }
    }

    /// The sandbox's runtime may be compiled once: profile, features, target and packages are the same in all stages.
    fn verdict(&self) -> Outcome {
        match self.wasmtime_builds {
            0 | 1 => Ok(()),
            builds => Err(format!("wasmtime was compiled {builds} times, by another profile, feature set, target or package selection")),
        }
    }
}

/// A stage that is a command; those before it are functions.
struct Stage {
    name: &'static str,
    command: Command,
    /// It must run at least one test.
    tests: bool,
}

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let (dry_run, yes) = (take_flag(&mut args, "--dry-run"), take_flag(&mut args, "--yes"));
    refuse_rest(&args)?;
    let stages = stages(tree)?;
    if dry_run {
        println!("set-up: e2fsprogs\nplugins: cargo xtask plugins\nguests: cargo xtask guests");
        stages.iter().for_each(|stage| println!("{}: {}", stage.name, shown(&stage.command)));
        return Ok(());
    }
    let mut run = Run::default();
    let outcome = run.all(tree, stages, yes);
    run.table();
    outcome
}

fn stages(tree: &Tree) -> Outcome<Vec<Stage>> {
    let release = ["--release", "--workspace"];
    let mut stages = vec![
        Stage { name: "build", command: cargo(tree, &[&["build", "--all-targets"][..], &release].concat()), tests: false },
        // Before the tests that boot it, out of what was just built.
        Stage { name: "image", command: cargo(tree, &["xtask", "image", "--no-build", "--yes"]), tests: false },
        Stage { name: "tests", command: cargo(tree, &[&["test"][..], &release].concat()), tests: true },
    ];
    // Nothing to compile, unless the demo's selection of packages has come to differ: then wasmtime is counted again.
    stages.push(Stage { name: "demo's build", command: cargo(tree, &demo::BUILD), tests: false });
    // The simulator's build has the places that faults are planted at; wasmtime stays as it is.
    stages.push(Stage { name: "sim's build", command: cargo(tree, &sim::BUILD), tests: false });
    for (name, args) in [("sim", ["--seeds", "2000"]), ("planted faults", ["--planted", "all"])] {
        let mut command = sim::program(tree);
        command.args(args);
        stages.push(Stage { name, command, tests: false });
    }
    stages.push(Stage { name: "sim's own tests", command: cargo(tree, &sim::TESTS), tests: true });
    let mut policies = cargo(tree, &["test", "--workspace"]);
    policies.current_dir(tree.root.join("plugins")).env("CARGO_TARGET_DIR", tree.target("plugins-host")?);
    stages.push(Stage { name: "policies' tests", command: policies, tests: true });
    let with_loom = with_loom(tree)?;
    if !with_loom.is_empty() {
        // A target folder of its own: other flags would otherwise throw the workspace's build away.
        let mut loom = cargo(tree, &["test", "--release", "--lib"]);
        for name in &with_loom {
            loom.args(["-p", name]);
        }
        loom.arg("loom").env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", tree.target("loom")?);
        stages.push(Stage { name: "loom", command: loom, tests: true });
    }
    if asan::has_miri(tree) {
        stages.push(Stage { name: "kernel's queues", command: kernel_cdq(tree)?, tests: true });
    }
    let (name, checked) = asan::stage(tree)?;
    stages.push(Stage { name, command: checked, tests: true });
    let mut hostile = fuzz::command(tree, &["run"])?;
    hostile.args(["--bin", "timeboxed", "--", "--seconds", "5"]);
    stages.push(Stage { name: "fuzz", command: hostile, tests: false });
    let mut harness = fuzz::command(tree, &["test"])?;
    harness.arg("--lib");
    stages.push(Stage { name: "fuzz harness", command: harness, tests: true });
    // A workspace of its own: what others' clients are built with would compile wasmtime again.
    let mut interop = cargo(tree, &["test", "--release", "--manifest-path", "tests/interop/Cargo.toml"]);
    interop.env("CARGO_TARGET_DIR", tree.target("interop")?);
    stages.push(Stage { name: "others' clients", command: interop, tests: true });
    Ok(stages)
}

/// Controller data queues by what was proposed for the kernel, where the checker of the fence does not run them anyway: a feature that
/// nothing else turns on, and a target folder of its own, since features of shared crates would otherwise throw the workspace's
/// build away.
fn kernel_cdq(tree: &Tree) -> Outcome<Command> {
    let mut command = cargo(tree, &["test", "--release", "--lib", "-p", "dray-device", "-p", "dray-driver"]);
    command.args(["--features", "dray-driver/kernel-cdq", "kernel_cdq"]).env("CARGO_TARGET_DIR", tree.target("kernel-cdq")?);
    Ok(command)
}

/// The crates whose manifest names loom.
fn with_loom(tree: &Tree) -> Outcome<Vec<String>> {
    let mut names = Vec::new();
    for member in tree.members("host")? {
        let manifest = read_text(&member.join("Cargo.toml"))?;
        let folder = member.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let loom = manifest.lines().any(|line| line.starts_with("loom") || line.contains("cfg(loom)"));
        if loom && !WITH_WASMTIME.contains(&folder.as_str()) {
            names.push(format!("dray-{folder}"));
        }
    }
    Ok(names)
}

/// What a run has seen so far.
#[derive(Default)]
struct Run {
    /// Name, time, tests passed, success.
    times: Vec<(&'static str, Duration, u64, bool)>,
    heard: Heard,
}

impl Run {
    fn all(&mut self, tree: &Tree, stages: Vec<Stage>, yes: bool) -> Outcome {
        self.stage("set-up", |_| debian::need("e2fsprogs", &["mkfs.ext4", "debugfs", "e2fsck"], yes))?;
        self.stage("plugins", |_| plugins::build(tree, yes))?;
        self.stage("guests", |_| guests::ensure(tree, yes).map(drop))?;
        for Stage { name, mut command, tests } in stages {
            self.stage(name, |heard| {
                let before = heard.passed;
                eprintln!("{}", shown(&command));
                listen(&mut command, &mut |line| heard.line(line))?;
                if tests && heard.passed == before {
                    return Err("no test ran".into());
                }
                Ok(())
            })?;
        }
        self.heard.verdict()
    }

    fn stage(&mut self, name: &'static str, work: impl FnOnce(&mut Heard) -> Outcome) -> Outcome {
        eprintln!("\n== {name}");
        let (started, before) = (Instant::now(), self.heard.passed);
        let outcome = work(&mut self.heard);
        let time = started.elapsed();
        eprintln!("== {name}: {} after {}", if outcome.is_ok() { "ok" } else { "failed" }, took(time));
        self.times.push((name, time, self.heard.passed - before, outcome.is_ok()));
        outcome.map_err(|error| format!("stage {name}: {error}"))
    }

    fn table(&self) {
        eprintln!();
        for (name, time, tests, ok) in &self.times {
            let tests = if *tests == 0 { String::new() } else { format!(", {tests} tests passed") };
            eprintln!("{name:<18} {:>14}  {}{tests}", took(*time), if *ok { "ok" } else { "failed" });
        }
        let Heard { wasmtime_builds, passed, failed, ignored } = self.heard;
        let total = took(self.times.iter().map(|(_, time, ..)| *time).sum());
        eprintln!("{:<18} {total:>14}  {passed} tests passed, {failed} failed, {ignored} ignored", "all");
        eprintln!("wasmtime was compiled {wasmtime_builds} times (at most once is fine)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_builds_of_wasmtime_itself_and_counts_of_tests() {
        let mut heard = Heard::default();
        for line in [
            "   Compiling wasmtime-internal-core v48.0.8",
            "   Compiling wasmtime v48.0.8",
            "   Compiling wasmtime-environ v48.0.8",
            "       Fresh wasmtime v48.0.8",
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s",
            "   Compiling wasmtime v48.0.8 (/somewhere)",
        ] {
            heard.line(line);
        }
        assert_eq!(heard, Heard { wasmtime_builds: 2, passed: 7, failed: 3, ignored: 1 });
    }

    #[test]
    fn a_second_build_of_wasmtime_fails_the_run() {
        let mut run = Run::default();
        let mut build = |verdict: bool| {
            // Under another name: what this test prints is heard by the `cargo xtask test` that runs it.
            let mut command = crate::process::command("/bin/sh");
            command.args(["-c", "echo '   Compiling runtime v48.0.8' >&2"]);
            let named = |line: &str| line.replace("runtime", "wasmtime");
            run.stage("build", |heard| listen(&mut command, &mut |line| heard.line(&named(line)))).unwrap();
            assert_eq!(run.heard.verdict().is_ok(), verdict);
        };
        build(true);
        build(false);
    }

    #[test]
    fn one_profile_and_one_package_selection_for_all_that_compiles_wasmtime() {
        let stages = stages(&Tree::find().unwrap()).unwrap();
        for stage in stages.iter().filter(|stage| matches!(stage.name, "build" | "tests" | "demo's build" | "sim's build" | "sim's own tests")) {
            let shown = shown(&stage.command);
            assert!(shown.contains("--release") && shown.contains("--workspace"), "{shown}");
        }
    }
}
