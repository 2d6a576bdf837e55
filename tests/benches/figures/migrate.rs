//! Whole migrations under a writing guest, by the appliance's own runner on two threads: what a switch-over costs, what the
//! guest feels of the copy, and whether a fast writer is caught up with.
//!
//! Each run is judged like a demo: the whole destination is compared with the source and the guest's ledger. A run that lost
//! anything, or did not end at the destination, is no figure but a failure (of `migrate.converge` and `migrate.unbounded`: a 0).

use crate::copy::disk;
use crate::machine::{pages_note, repository, target_folder, unpin};
use crate::report::Report;
use crate::rig::{MANAGEMENT, MIGRATABLE, NSID};
use crate::{Failure, Plan};
use dray::assembly::{self, Machine, Migratable};
use dray::config::{Config, PolicyPlace};
use dray::config::units::{Size, Span};
use dray::core::clock::Clock;
use dray::live::{self, Act, LiveSpec, LiveView};
use dray::policies;
use dray_controller::{ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::slot::{Fence, Slot};
use dray_device::space::AddressSpace;
use dray_workload::guest::{GuestConfig, Phase, PhaseStats};
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::pattern::{STALE, fill_file};
use dray_workload::reader::{ArenaReader, BlockReader, FileReader};
use dray_workload::verify;
use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use toml::Spanned;

/// Bytes of the namespace, and of what the guest writes.
const BYTES: u64 = 1 << 30;
const GUEST_BYTES: u64 = 128 << 20;
const BLOCK: u64 = 4096;
/// Pieces of the guest's blocks, evenly spread over the namespace.
const PIECES: u64 = 64;
const IO_QUEUES: u16 = 8;
/// A filesystem in memory.
const MEMORY: &str = "/dev/shm";
const MIB: f64 = (1 << 20) as f64;
/// The window in which a writer without a rate limit keeps a share of its rate.
const WINDOW: Duration = Duration::from_millis(100);
/// The share.
const KEPT: f64 = 0.1;
/// The time in which it must be caught up with.
const UNBOUNDED: Duration = Duration::from_secs(30);
/// The least share of 60,000 writes a second that a guest must have had for the row to mean anything.
const HELD: f64 = 0.95;

/// One kind of run.
#[derive(Clone, Copy)]
struct Case {
    /// The guest's writes per second; 0 = as many as it can.
    rate: u32,
    /// Files instead of memory.
    files: bool,
    /// The record of who owns the namespace is flushed to a disk, as in the demo; else it is in memory like the namespace.
    durable: bool,
    /// The guest may be slowed down.
    throttle: bool,
    /// Where the policies run.
    policies: PolicyPlace,
}

/// Namespaces in memory, everything else as in the demo.
const fn memory(rate: u32) -> Case {
    Case { rate, files: false, durable: true, throttle: false, policies: PolicyPlace::Beside }
}

/// All rows of this module, and those of `copy` that need a guest.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    if !plan.wants_any(&ROWS) {
        return Ok(());
    }
    plan.cores.second()?;
    let bench = Bench::new(plan)?;
    // What the runner starts (policies beside the cores, the job worker) is not to share this thread's core.
    unpin(&plan.cores)?;
    let done = bench.rows(plan, report);
    plan.cores.pin_first()?;
    done
}

const ROWS: [&str; 12] = [
    "migrate.downtime.2k",
    "migrate.downtime.20k",
    "migrate.downtime.2k.volatile",
    "migrate.downtime.20k.volatile",
    "migrate.downtime.2k.file",
    "migrate.downtime.20k.file",
    "copy.guest.p99",
    "copy.guest.p99.ratio",
    "copy.guest.p99.on",
    "copy.guest.rate",
    "migrate.converge.60k",
    "migrate.unbounded",
];

/// What a run gave.
struct Run {
    report: dray_migration::Report,
    before: PhaseStats,
    during: PhaseStats,
    /// Commands of the guest that had ended by then, from the start of the migration to its end.
    looks: Vec<(Duration, u64)>,
    /// The verdict; empty = nothing is wrong.
    wrong: String,
}

struct Bench {
    config: Config,
    bytes: u64,
    settle: Duration,
    /// Source and destination in memory.
    disks: [DmaBuffer; 2],
    /// And in files.
    files: [PathBuf; 2],
    /// A folder in memory for records that are not durable.
    volatile: PathBuf,
    /// Runs so far: each has tags of its own, since the source keeps those of the runs before.
    count: Cell<u64>,
}

impl Bench {
    fn new(plan: &Plan) -> Result<Self, Failure> {
        let bytes = plan.bytes(BYTES);
        let folder = target_folder()?.join("bench");
        std::fs::create_dir_all(&folder)?;
        let mut config = Config::read(&repository().join("appliance.toml"))?;
        config.file.core.state = folder.join("state");
        let files = ["source.img", "destination.img"].map(|name| folder.join(name));
        for (subsystem, path) in config.file.subsystems.iter_mut().zip(&files) {
            for namespace in &mut subsystem.namespaces {
                namespace.path = Some(Spanned::new(0..0, path.clone()));
                namespace.size = Some(Spanned::new(0..0, Size(bytes)));
            }
        }
        let policy = &mut config.file.policy;
        for policy in [&mut policy.cdq, &mut policy.tracking, &mut policy.copy] {
            if let Ok(path) = policy.component.get_ref().strip_prefix("target") {
                policy.component = Spanned::new(0..0, target_folder()?.join(path));
            }
        }
        let volatile = Path::new(MEMORY).join(format!("dray-bench-{}", std::process::id()));
        let settle = Duration::from_millis(if plan.quick { 200 } else { 700 });
        let empty = DmaBuffer::allocate("bench-disk", bytes as usize, Pages::PreferHuge)?;
        Ok(Self { config, bytes, settle, disks: [disk(bytes, 8)?, empty], files, volatile, count: Cell::new(0) })
    }

    /// Measures all rows; one that fails does not keep the others from being measured.
    fn rows(&self, plan: &Plan, report: &mut Report) -> Result<(), Failure> {
        let huge = pages_note(self.disks.iter().all(|disk| disk.arena().is_huge()));
        let mut failed = Vec::new();
        let mut tell = |row: &str, done: Result<(), Failure>| {
            if let Err(failure) = done {
                failed.push(format!("{row}: {failure}"));
            }
        };
        for (rate, name) in [(2_000, "migrate.downtime.2k"), (20_000, "migrate.downtime.20k")] {
            let durable = memory(rate);
            for (name, case, note) in [
                (name.to_owned(), durable, format!("{huge}, the record flushed to disk")),
                (format!("{name}.volatile"), Case { durable: false, ..durable }, format!("{huge}, the record in memory too")),
                (format!("{name}.file"), Case { files: true, ..durable }, "all in files, as in the demo".to_owned()),
            ] {
                tell(&name, self.downtime(plan, report, &name, case, &note));
            }
        }
        tell("copy.guest", self.guest(plan, report));
        tell("copy.guest.p99.on", self.guest_with_policies_on(plan, report));
        tell("migrate.converge.60k", self.converge(plan, report));
        tell("migrate.unbounded", self.unbounded(plan, report));
        if failed.is_empty() { Ok(()) } else { Err(failed.join("\n  ").into()) }
    }

    /// Runs a case as often as the plan says; a run with anything wrong is a failure.
    fn runs(&self, plan: &Plan, case: Case) -> Result<Vec<Run>, Failure> {
        let sound = |run: Run| if run.wrong.is_empty() { Ok(run) } else { Err(run.wrong.into()) };
        (0..plan.runs()).map(|_| self.run(plan, case).and_then(sound)).collect()
    }

    fn downtime(&self, plan: &Plan, report: &mut Report, name: &str, case: Case, note: &str) -> Result<(), Failure> {
        if !plan.wants(name) {
            return Ok(());
        }
        let mut runs = self.runs(plan, case)?;
        runs.sort_by_key(|run| run.report.downtime_us);
        let run = &runs[runs.len() / 2];
        let us = run.report.downtime_us.ok_or("a migration without a downtime")?;
        let parts: Vec<_> = run.report.parts.iter().map(|(step, us)| format!("{} {us}", step.name())).collect();
        let rounds = run.report.rounds.count();
        report.add(name, us as f64, "µs", format!("{note}; {rounds} rounds; {}", parts.join(", ")));
        Ok(())
    }

    /// What a writer of 10,000 commands a second feels of a copy at full speed.
    fn guest(&self, plan: &Plan, report: &mut Report) -> Result<(), Failure> {
        if !plan.wants_any(&["copy.guest.p99", "copy.guest.p99.ratio", "copy.guest.rate"]) {
            return Ok(());
        }
        let mut runs = self.runs(plan, memory(10_000))?;
        let p99 = |run: &Run| (run.before.p99_ns as f64 / 1e3, run.during.p99_ns as f64 / 1e3);
        runs.sort_by_key(|run| run.during.p99_ns);
        let run = &runs[runs.len() / 2];
        let (before, during) = p99(run);
        let note = format!(
            "10,000 writes/s; before {before:.1} µs, during {during:.1} µs over {} commands, median {:.1} µs",
            run.during.commands,
            run.during.p50_ns as f64 / 1e3
        );
        let full = run.report.rounds.iter().next().ok_or("a migration without a round")?;
        let rate = full.bytes as f64 / MIB / (full.duration_us.max(1) as f64 / 1e6);
        report.add("copy.guest.p99.ratio", during / before.max(1e-3), "", note);
        report.add("copy.guest.p99", during, "µs", "the switch-over included");
        report.add("copy.guest.rate", rate, "MiB/s", "of the full round of that run");
        Ok(())
    }

    /// The same with the policies on the polling core: what their place costs the guest.
    fn guest_with_policies_on(&self, plan: &Plan, report: &mut Report) -> Result<(), Failure> {
        if !plan.wants("copy.guest.p99.on") {
            return Ok(());
        }
        let mut runs = self.runs(plan, Case { policies: PolicyPlace::On, ..memory(10_000) })?;
        runs.sort_by_key(|run| run.during.p99_ns);
        let run = &runs[runs.len() / 2];
        let (during, before) = (run.during.p99_ns as f64 / 1e3, run.before.p99_ns as f64 / 1e3);
        let note = format!("policies on the polling core instead of beside it; before {before:.1} µs");
        report.add("copy.guest.p99.on", during, "µs", note);
        Ok(())
    }

    fn converge(&self, plan: &Plan, report: &mut Report) -> Result<(), Failure> {
        if !plan.wants("migrate.converge.60k") {
            return Ok(());
        }
        let mut converged = true;
        let mut notes = Vec::new();
        for _ in 0..plan.runs() {
            let run = self.run(plan, memory(60_000))?;
            let (before, during) = (writes(&self.config, run.before.iops), writes(&self.config, run.during.iops));
            let rounds = run.report.rounds.count();
            converged &= run.wrong.is_empty() && during as f64 >= 60_000.0 * HELD;
            let wrong = if run.wrong.is_empty() { String::new() } else { format!(", {}", run.wrong) };
            notes.push(format!("{rounds} rounds, {before} and {during} writes/s before and during{wrong}"));
        }
        report.add("migrate.converge.60k", f64::from(u8::from(converged)), "", notes.join("; "));
        Ok(())
    }

    fn unbounded(&self, plan: &Plan, report: &mut Report) -> Result<(), Failure> {
        if !plan.wants("migrate.unbounded") {
            return Ok(());
        }
        let run = self.run(plan, Case { throttle: true, ..memory(0) })?;
        let least = least_rate(&run.looks) / run.before.iops.max(1) as f64;
        let seconds = run.report.duration_us as f64 / 1e6;
        let good = run.wrong.is_empty() && seconds <= UNBOUNDED.as_secs_f64() && least >= KEPT;
        let share = format!("{:.0} % of its rate", least * 100.0);
        let kept = if least.is_finite() { share } else { "all, it was over so soon".to_owned() };
        let rounds = run.report.rounds.count();
        let note = format!("{seconds:.2} s, {rounds} rounds; {} commands/s before, kept in 100 ms: {kept}", run.before.iops);
        let wrong = if run.wrong.is_empty() { String::new() } else { format!("; {}", run.wrong) };
        report.add("migrate.unbounded", f64::from(u8::from(good)), "", note + &wrong);
        Ok(())
    }

    /// One migration, and its verdict.
    fn run(&self, plan: &Plan, case: Case) -> Result<Run, Failure> {
        let mut config = self.config.clone();
        config.file.migration.throttle_guest = case.throttle;
        config.file.core.policies = case.policies;
        if !case.durable {
            config.file.core.state.clone_from(&self.volatile);
        }
        if case.rate == 0 {
            config.file.migration.max_time = Span(UNBOUNDED);
        }
        let ledger = Arc::new(Ledger::in_memory(&self.ledger())?);
        let (seats, _kept) = policies::seat(&config, Clock::new())?;
        let [source, destination] = if case.files { self.file_machines(&config)? } else { self.memory_machines()? };
        let mut looks = Vec::new();
        let mut look = |view: &LiveView| {
            if view.act == Act::Migrating {
                looks.push((view.elapsed, view.guest.writes + view.guest.reads));
            }
        };
        let spec = LiveSpec {
            config: &config,
            guest: GuestConfig {
                nsid: NSID,
                rate: case.rate,
                read_percent: config.file.guest.read_percent,
                depth: config.file.guest.queue_depth,
                queues: 1,
                pages: Pages::PreferHuge,
            },
            ledger: Arc::clone(&ledger),
            settle: self.settle,
            reset: false,
            max_bytes_per_s: 0,
            seed: 1,
            pin: Some((plan.cores.first(), plan.cores.second()?)),
            cancel: Arc::new(AtomicBool::new(false)),
        };
        let live = live::run(&spec, source, destination, seats, &mut look)?;
        let wrong = self.judge(&live, case, &ledger)?;
        let stats = |phase| live.guest.phase_stats(phase);
        Ok(Run { before: stats(Phase::Before), during: stats(Phase::During), report: live.migration, looks, wrong })
    }

    fn ledger(&self) -> LedgerSpec {
        let (blocks, target) = (self.bytes / BLOCK, self.bytes / BYTES.div_ceil(GUEST_BYTES) / BLOCK);
        let piece = target / PIECES;
        let blocks = (0..PIECES).flat_map(|i| (0..piece).map(move |j| i * (blocks / PIECES) + j)).collect();
        self.count.set(self.count.get() + 1);
        LedgerSpec { seed: self.count.get(), guest: 1, blocks }
    }

    /// What is wrong with a run; empty = nothing.
    fn judge(&self, live: &live::LiveReport, case: Case, ledger: &Ledger) -> Result<String, Failure> {
        if let Some(error) = &live.guest_error {
            return Ok(format!("the guest: {error}"));
        }
        if !live::moved(&live.migration) {
            return Ok(format!("the migration did not end at the destination: {:?}", live.migration.outcome));
        }
        let [mut source, mut destination] = self.readers(case)?;
        let found = verify::compare(source.as_mut(), destination.as_mut(), ledger)?;
        if !found.is_ok() {
            return Ok(format!("the copy is no good: {found:?}"));
        }
        let policies = live.migration.policies.iter().map(|(_, policy)| policy);
        let slips: u64 = policies.map(|p| p.stats.faults + p.stats.fallbacks + p.omissions).sum();
        Ok(if slips > 0 { format!("{slips} faults, fallbacks and omissions of the policies") } else { String::new() })
    }

    fn readers(&self, case: Case) -> Result<[Box<dyn BlockReader>; 2], Failure> {
        if case.files {
            let reader = |path| -> Result<Box<dyn BlockReader>, Failure> { Ok(Box::new(FileReader::new(File::open(path)?)?)) };
            return Ok([reader(&self.files[0])?, reader(&self.files[1])?]);
        }
        let reader = |disk: &DmaBuffer| -> Box<dyn BlockReader> { Box::new(ArenaReader(Arc::clone(disk.arena()))) };
        Ok([reader(&self.disks[0]), reader(&self.disks[1])])
    }

    fn memory_machines(&self) -> Result<[Machine; 2], Failure> {
        let [source, destination] = &self.disks;
        destination.arena().fill(destination.offset(), destination.len(), STALE);
        Ok([machine("source", source)?, machine("destination", destination)?])
    }

    fn file_machines(&self, config: &Config) -> Result<[Machine; 2], Failure> {
        for (path, byte) in self.files.iter().zip([0x11, STALE]) {
            let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
            fill_file(&file, self.bytes, byte)?;
            file.sync_all()?;
        }
        match config.file.subsystems.as_slice() {
            [source, destination] => {
                Ok([assembly::machine(config, source)?, assembly::machine(config, destination)?])
            }
            _ => Err("appliance.toml has other than two subsystems".into()),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Each is there only if a row needed it.
        let _missing = std::fs::remove_dir_all(&self.volatile);
        for file in &self.files {
            let _missing = std::fs::remove_file(file);
        }
    }
}

/// A subsystem as `appliance.toml` has it, over memory of ours.
fn machine(name: &str, disk: &DmaBuffer) -> Result<Machine, Failure> {
    let fence = Fence::new(false);
    let controller = |cntlid, role, namespaces| ControllerConfig {
        cntlid,
        role,
        namespaces,
        io_queues: IO_QUEUES,
        vectors: IO_QUEUES + 1,
        fence: if role == ControllerRole::Migratable { fence.clone() } else { Fence::new(false) },
    };
    let config = SubsystemConfig {
        controllers: vec![
            controller(MANAGEMENT, ControllerRole::Management, Vec::new()),
            controller(MIGRATABLE, ControllerRole::Migratable, vec![NSID]),
        ],
        ..SubsystemConfig::default()
    };
    let namespace = NamespaceConfig {
        nsid: NSID,
        nguid: [7; 16],
        eui64: [0; 8],
        uuid: [0; 16],
        shared: false,
        write_protected: false,
    };
    let backing = MemoryBacking::with_memory(disk.clone(), BLOCK as u32)?;
    let subsystem = Subsystem::new(config, vec![(namespace, Box::new(backing))])?;
    let slot = Slot::new(AddressSpace::default(), IO_QUEUES + 1)?;
    slot.point_at(&subsystem.plug(MANAGEMENT).ok_or("no management controller")?);
    let plug = subsystem.plug(MIGRATABLE).ok_or("no migratable controller")?;
    let migratable = vec![Migratable { cntlid: MIGRATABLE, plug, fence, io_queues: IO_QUEUES }];
    Ok(Machine { name: name.to_owned(), subsystem, management: (MANAGEMENT, slot), migratable })
}

/// The writes among commands per second.
fn writes(config: &Config, iops: u64) -> u64 {
    iops * (100 - u64::from(config.file.guest.read_percent)) / 100
}

/// The least commands per second in any window of [`WINDOW`] or a little more; infinite without such a window.
fn least_rate(looks: &[(Duration, u64)]) -> f64 {
    let mut least = f64::INFINITY;
    for (i, (begin, before)) in looks.iter().enumerate() {
        if let Some((end, after)) = looks[i..].iter().find(|(at, _)| *at - *begin >= WINDOW) {
            least = least.min((after - before) as f64 / (*end - *begin).as_secs_f64());
        }
    }
    least
}
