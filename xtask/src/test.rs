//! `cargo xtask test`: everything that continuous integration checks, in stages with their times.

use crate::process::{cargo, listen, niced, shown, took};
use crate::tree::{Tree, read_text};
use crate::{Outcome, asan, debian, demo, fuzz, guests, plugins, refuse_rest, sim, take_flag};
use std::io::{self, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub const HELP: &str = "\
Builds and runs all tests, in stages, and prints what each took: set-up (Debian's e2fsprogs), the
policies, the virtual machines (see `cargo xtask guests`), the host with tests and benches, the
bootable image, the host's tests, the fuzz targets for a few seconds each. What has builds of its own
runs beside the host's tests, which leave the processors idle every now and then, and comes behind
them (nice): the policies' own tests on the host, the loom tests of the crates that have some, the
fenced memory and the queues that no kernel has yet (feature kernel-cdq) under AddressSanitizer or,
where that is installed, Miri, the tests of the fuzz targets, our servers before clients that others
have written, 2,000 seeds of the simulator, its planted faults and its own tests. Stops at the first
stage that fails.

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

    fn add(&mut self, other: &Self) {
        self.wasmtime_builds += other.wasmtime_builds;
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
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

impl Stage {
    fn builds(name: &'static str, command: Command) -> Self {
        Self { name, command, tests: false }
    }

    fn tests(name: &'static str, command: Command) -> Self {
        Self { name, command, tests: true }
    }
}

/// Stages that run one after the other, and stages, one after the other as well, that run beside them.
#[derive(Default)]
struct Part {
    stages: Vec<Stage>,
    beside: Vec<Stage>,
}

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let (dry_run, yes) = (take_flag(&mut args, "--dry-run"), take_flag(&mut args, "--yes"));
    refuse_rest(&args)?;
    let parts = parts(tree)?;
    if dry_run {
        println!("set-up: e2fsprogs\nplugins: cargo xtask plugins\nguests: cargo xtask guests");
        for Part { stages, beside } in parts {
            beside.iter().for_each(|stage| println!("{} (beside what follows): {}", stage.name, shown(&stage.command)));
            stages.iter().for_each(|stage| println!("{}: {}", stage.name, shown(&stage.command)));
        }
        return Ok(());
    }
    // In one piece each: a block of lines is not broken by others.
    let mut run = Run::new(|text| io::stderr().lock().write_all(text));
    let started = Instant::now();
    let outcome = run.all(tree, parts, yes);
    run.table(started.elapsed());
    outcome
}

fn parts(tree: &Tree) -> Outcome<Vec<Part>> {
    let release = ["--release", "--workspace"];
    let build = Stage::builds("build", cargo(tree, &[&["build", "--all-targets"][..], &release].concat()));
    // Before the tests that boot it, out of what was just built.
    let image = Stage::builds("image", cargo(tree, &["xtask", "image", "--no-build", "--yes"]));
    let tests = Stage::tests("tests", cargo(tree, &[&["test"][..], &release].concat()));
    let mut hostile = fuzz::command(tree, &["run"])?;
    hostile.args(["--bin", "timeboxed", "--", "--seconds", "5"]);
    let last = vec![
        Stage::builds("fuzz", hostile),
        // Nothing to compile, unless the demo's selection of packages has come to differ: then wasmtime is counted again.
        Stage::builds("demo's build", cargo(tree, &demo::BUILD)),
    ];
    Ok(vec![
        Part { stages: vec![build, image], ..Part::default() },
        Part { stages: vec![tests], beside: apart(tree)?.into_iter().chain(simulator(tree)).collect() },
        Part { stages: last, ..Part::default() },
    ])
}

/// The simulator's build has the places that faults are planted at. It is in the target folder of all else, so that wasmtime stays as
/// it is, and makes nothing that the host's tests look at.
fn simulator(tree: &Tree) -> Vec<Stage> {
    let mut stages = vec![Stage::builds("sim's build", cargo(tree, &sim::BUILD))];
    for (name, args) in [("sim", ["--seeds", "2000"]), ("planted faults", ["--planted", "all"])] {
        let mut command = sim::program(tree);
        command.args(args);
        stages.push(Stage::builds(name, command));
    }
    stages.push(Stage::tests("sim's own tests", cargo(tree, &sim::TESTS)));
    stages
}

/// What has a target folder of its own, so that it can be built and run while the host's tests run. These wait for guests and
/// time-outs a good part of the time.
fn apart(tree: &Tree) -> Outcome<Vec<Stage>> {
    let mut stages = Vec::new();
    let mut policies = cargo(tree, &["test", "--workspace"]);
    policies.current_dir(tree.root.join("plugins")).env("CARGO_TARGET_DIR", tree.target("plugins-host")?);
    stages.push(Stage::tests("policies' tests", policies));
    let with_loom = with_loom(tree)?;
    if !with_loom.is_empty() {
        // A target folder of its own: other flags would otherwise throw the workspace's build away.
        let mut loom = cargo(tree, &["test", "--release", "--lib"]);
        for name in &with_loom {
            loom.args(["-p", name]);
        }
        loom.arg("loom").env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", tree.target("loom")?);
        stages.push(Stage::tests("loom", loom));
    }
    if asan::has_miri(tree) {
        stages.push(Stage::tests("kernel's queues", kernel_cdq(tree)?));
    }
    let (name, checked) = asan::stage(tree)?;
    stages.push(Stage::tests(name, checked));
    let mut harness = fuzz::command(tree, &["test"])?;
    harness.arg("--lib");
    stages.push(Stage::tests("fuzz harness", harness));
    // A workspace of its own: what others' clients are built with would compile wasmtime again.
    let mut interop = cargo(tree, &["test", "--release", "--manifest-path", "tests/interop/Cargo.toml"]);
    interop.env("CARGO_TARGET_DIR", tree.target("interop")?);
    stages.push(Stage::tests("others' clients", interop));
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

/// What became of a stage.
struct Done {
    name: &'static str,
    took: Duration,
    passed: u64,
    beside: bool,
    outcome: Outcome,
}

/// Where what the stages say goes.
type Out = fn(&[u8]) -> io::Result<()>;

/// What a run has seen so far.
struct Run {
    done: Vec<Done>,
    heard: Heard,
    out: Out,
}

impl Run {
    fn new(out: Out) -> Self {
        Self { done: Vec::new(), heard: Heard::default(), out }
    }

    fn all(&mut self, tree: &Tree, parts: Vec<Part>, yes: bool) -> Outcome {
        self.stage("set-up", |_| debian::need("e2fsprogs", &["mkfs.ext4", "debugfs", "e2fsck"], yes))?;
        self.stage("plugins", |_| plugins::build(tree, yes))?;
        self.stage("guests", |_| guests::ensure(tree, yes).map(drop))?;
        parts.into_iter().try_for_each(|part| self.part(part))?;
        self.heard.verdict()
    }

    fn part(&mut self, Part { stages, beside }: Part) -> Outcome {
        let (failed, out) = (AtomicBool::new(false), self.out);
        let (outcome, aside) = std::thread::scope(|scope| {
            let aside = scope.spawn(|| run_beside(beside, &failed, out));
            let mut outcome = Ok(());
            for Stage { name, mut command, tests } in stages {
                outcome = self.stage(name, |heard| {
                    eprintln!("{}", shown(&command));
                    hear(&mut command, tests, heard, &mut |line| out(line))
                });
                if outcome.is_err() || failed.load(Ordering::Relaxed) {
                    break;
                }
            }
            failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
            (outcome, aside.join())
        });
        let (done, heard) = aside.map_err(|_| "the stages beside the others have panicked")?;
        self.heard.add(&heard);
        let wrong = done.iter().find_map(|done| Some(format!("stage {}: {}", done.name, done.outcome.as_ref().err()?)));
        self.done.extend(done);
        outcome?;
        wrong.map_or(Ok(()), Err)
    }

    fn stage(&mut self, name: &'static str, work: impl FnOnce(&mut Heard) -> Outcome) -> Outcome {
        eprintln!("\n== {name}");
        let (started, before) = (Instant::now(), self.heard.passed);
        let outcome = work(&mut self.heard);
        let time = started.elapsed();
        eprintln!("{}", end(name, time, &outcome));
        self.done.push(Done { name, took: time, passed: self.heard.passed - before, beside: false, outcome: outcome.clone() });
        outcome.map_err(|error| format!("stage {name}: {error}"))
    }

    fn table(&self, total: Duration) {
        eprintln!();
        for Done { name, took: time, passed, beside, outcome } in &self.done {
            let passed = if *passed == 0 { String::new() } else { format!(", {passed} tests passed") };
            let beside = if *beside { ", beside the tests" } else { "" };
            eprintln!("{name:<18} {:>14}  {}{passed}{beside}", took(*time), if outcome.is_ok() { "ok" } else { "failed" });
        }
        let Heard { wasmtime_builds, passed, failed, ignored } = self.heard;
        eprintln!("{:<18} {:>14}  {passed} tests passed, {failed} failed, {ignored} ignored", "all", took(total));
        eprintln!("wasmtime was compiled {wasmtime_builds} times (at most once is fine)");
    }
}

fn end(name: &str, time: Duration, outcome: &Outcome) -> String {
    format!("== {name}: {} after {}", if outcome.is_ok() { "ok" } else { "failed" }, took(time))
}

/// Runs stages until one fails, here or elsewhere. What one says is printed when it has ended: lines of two stages among each other
/// are for nobody.
fn run_beside(stages: Vec<Stage>, failed: &AtomicBool, out: Out) -> (Vec<Done>, Heard) {
    let (mut all, mut heard) = (Vec::new(), Heard::default());
    for Stage { name, command, tests } in stages {
        if failed.load(Ordering::Relaxed) {
            break;
        }
        eprintln!("== {name}: begins, beside the others");
        let (started, before) = (Instant::now(), heard.passed);
        let mut said = format!("\n== {name}, beside the others\n{}\n", shown(&command)).into_bytes();
        let outcome = hear(&mut niced(&command), tests, &mut heard, &mut |line| said.write_all(line));
        let time = started.elapsed();
        // A closed terminal must not end the run.
        let _ = out(&[&said[..], end(name, time, &outcome).as_bytes(), b"\n\n"].concat());
        failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
        all.push(Done { name, took: time, passed: heard.passed - before, beside: true, outcome });
    }
    (all, heard)
}

/// Runs a stage's command; `tee` gets each line as it is.
fn hear(command: &mut Command, tests: bool, heard: &mut Heard, tee: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send)) -> Outcome {
    let before = heard.passed;
    listen(command, tee, &mut |line| heard.line(line))?;
    if tests && heard.passed == before { Err("no test ran".into()) } else { Ok(()) }
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
        let mut run = Run::new(nowhere);
        let mut build = |verdict: bool| {
            // Under another name: what this test prints is heard by the `cargo xtask test` that runs it.
            let mut command = crate::process::command("/bin/sh");
            command.args(["-c", "echo '   Compiling runtime v48.0.8' >&2"]);
            let named = |line: &str| line.replace("runtime", "wasmtime");
            run.stage("build", |heard| listen(&mut command, &mut nowhere, &mut |line| heard.line(&named(line)))).unwrap();
            assert_eq!(run.heard.verdict().is_ok(), verdict);
        };
        build(true);
        build(false);
    }

    #[test]
    fn one_profile_and_one_package_selection_for_all_that_compiles_wasmtime() {
        let parts = parts(&Tree::find().unwrap()).unwrap();
        let whole = ["build", "tests", "demo's build", "sim's build", "sim's own tests"];
        let all = || parts.iter().flat_map(|part| part.stages.iter().chain(&part.beside));
        let found: Vec<_> = all().filter(|stage| whole.contains(&stage.name)).collect();
        assert_eq!(found.len(), whole.len());
        for stage in found {
            let shown = shown(&stage.command);
            assert!(shown.contains("--release") && shown.contains("--workspace"), "{shown}");
        }
        // Beside the tests nothing else may put another binary where they look for it.
        let apart = |stage: &Stage| stage.command.get_envs().any(|(name, value)| name == "CARGO_TARGET_DIR" && value.is_some());
        let harmless = |stage: &Stage| apart(stage) || stage.name.starts_with("sim") || stage.name == "planted faults";
        assert!(parts.iter().flat_map(|part| &part.beside).all(harmless));
        assert!(sim::BUILD.contains(&"--example") && sim::TESTS.contains(&"--lib"));
    }

    /// A stage that says so many tests passed, and ends with that status.
    fn stage(name: &'static str, script: &str) -> Stage {
        let mut command = crate::process::command("/bin/sh");
        command.args(["-c", script]);
        Stage::tests(name, command)
    }

    /// What these stages say would be heard by the `cargo xtask test` that runs the tests.
    fn nowhere(_: &[u8]) -> io::Result<()> {
        Ok(())
    }

    const PASSED: &str = "echo 'test result: ok. 2 passed; 0 failed'";

    #[test]
    fn stages_beside_others_are_counted_and_fail_the_run() {
        let part = |script: &str| Part { stages: vec![stage("a", PASSED)], beside: vec![stage("b", script), stage("c", PASSED)] };
        let mut run = Run::new(nowhere);
        assert_eq!(run.part(part(PASSED)), Ok(()));
        assert_eq!(run.heard.passed, 6);
        let names: Vec<_> = run.done.iter().map(|done| (done.name, done.beside, done.passed)).collect();
        assert_eq!(names, [("a", false, 2), ("b", true, 2), ("c", true, 2)]);
        let error = run.part(part("exit 3")).unwrap_err();
        assert!(error.contains("stage b") && error.contains('3'), "{error}");
        assert!(!run.done.iter().skip(3).any(|done| done.name == "c"), "nothing begins behind a failure");
        let error = run.part(part("echo nothing")).unwrap_err();
        assert!(error.contains("no test ran"), "{error}");
    }

    #[test]
    fn a_failure_stops_what_would_begin_beside_it() {
        let mut run = Run::new(nowhere);
        let part = Part { stages: vec![stage("a", "exit 1"), stage("b", PASSED)], beside: Vec::new() };
        assert!(run.part(part).unwrap_err().contains("stage a"));
        assert_eq!(run.done.len(), 1);
        let (done, heard) = run_beside(vec![stage("c", PASSED)], &AtomicBool::new(true), nowhere);
        assert!(done.is_empty() && heard == Heard::default());
    }
}
