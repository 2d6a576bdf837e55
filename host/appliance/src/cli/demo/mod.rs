//! `dray demo`: makes the input, or takes up that of the last run; runs the migration, looks at both disks, gives the verdict.

mod disk;
mod input;
mod progress;
mod verdict;

use super::{Attach, DemoArgs};
use crate::apart::{self, EndSpec};
use crate::assembly::{self, Machine};
use crate::backings;
use crate::config::Config;
use crate::config::units::Size;
use crate::core::clock::Clock;
use crate::core::status::Status;
use crate::live::{self, LiveSpec, Start};
use crate::policies;
use crate::recovery::{Records, StateLock};
use crate::store::keep::Keeper;
use crate::summary::Verdict;
use dray_migration::Owner;
use dray_workload::ledger::Ledger;
use disk::Disk;
use input::{Input, Kept};
use miette::{IntoDiagnostic, WrapErr, miette};
use progress::Screen;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use toml::Spanned;

/// Blocks that the guest of an image that is no ext4 filesystem writes: 128 MiB.
const GUEST_BLOCKS: u64 = 32_768;

/// Runs the demo.
pub(super) fn run(file: &Path, args: &DemoArgs) -> miette::Result<ExitCode> {
    let mut config = Config::read(file)?;
    let state = config.path(&config.file.core.state);
    let _state = StateLock::take(&state).into_diagnostic().wrap_err_with(|| state.display().to_string())?;
    if args.resume {
        Kept::find(&config)?.apply(&mut config);
        if backings::is_elsewhere(&config)? {
            return Err(miette!(help = "go on with `dray run`", "a media move of `dray run` has put the demo's disk elsewhere"));
        }
    }
    apply(&mut config, args);
    let cancel = cancelled_by_signals()?;
    let mut screen = Screen::new();
    // Records and components are looked at first: a bad one must not cost the time that the image takes.
    let mut records = Records::open(&config)?;
    let clock = Clock::new();
    let (seats, policy_host) = policies::seat(&config, clock)?;
    let input = if args.resume {
        screen.say(&records.line());
        Kept::find(&config)?.input(&config, &mut screen)?
    } else {
        screen.say(&intro(&config, args));
        anew(&config, args, &mut records, &mut screen)?
    };
    if cancel.load(Ordering::Relaxed) {
        return Err(miette!("cancelled; nothing was moved"));
    }
    let serving = records.serving()?;
    let ends = match args.attach {
        None => Some(machines(&config, &records)?),
        Some(Attach::VfioUser) => None,
    };
    let found = args.resume.then(|| records.line());
    if args.resume {
        let disk = if serving == Owner::Source { &input.source } else { &input.destination };
        carry_on(&config, disk, &input.ledger, &screen)?;
    }
    let mut status = Status::open(&state.join("status")).into_diagnostic().wrap_err("the page of the run's status")?;
    status.begin();
    let guest = &config.file.guest;
    let spec = LiveSpec {
        config: &config,
        guest: dray_workload::guest::GuestConfig {
            nsid: input.nsid,
            rate: guest.writes_per_second,
            read_percent: guest.read_percent,
            depth: guest.queue_depth,
            queues: 1,
            pages: assembly::pages(&config),
        },
        ledger: Arc::clone(&input.ledger),
        settle: Duration::from_millis(args.settle),
        reset: true,
        max_bytes_per_s: 0,
        seed: input.ledger.seed(),
        pin: None,
        cancel: Arc::clone(&cancel),
    };
    let fenced = fenced(&config, &records);
    let start = Start { records, status: Some(status) };
    let history = (serving == Owner::Source).then(|| Keeper::begin(&config, input.nsid));
    let report = match ends {
        Some([source, destination]) => {
            live::run_from(&spec, source, destination, seats, start, &mut |view| screen.show(view))?
        }
        None => {
            let begin = |serving| apart::ends(apart_specs(file, &config, &state, fenced), serving, &mut |line| eprintln!("{line}"));
            live::run_with(&spec, begin, seats, start, &mut |view| screen.show(view))?
        }
    };
    drop(policy_host);
    screen.finish();
    let summary = verdict::judge(&config, &input, &report, found).wrap_err("the verdict could not be given")?;
    if let Some(history) = history {
        history.end(&report.migration, &summary);
    }
    if args.json {
        eprintln!("{summary}");
        println!("{}", serde_json::to_string(&summary).into_diagnostic()?);
    } else {
        println!("\n{summary}");
    }
    Ok(if summary.verdict == Verdict::Ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Set by the first Ctrl-C; the second one ends the process at once.
fn cancelled_by_signals() -> miette::Result<Arc<AtomicBool>> {
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&cancel)).into_diagnostic()?;
        signal_hook::flag::register(signal, Arc::clone(&cancel)).into_diagnostic()?;
    }
    Ok(cancel)
}

/// Makes new input. Killed on the way, it leaves nothing that could be taken for input.
fn anew(config: &Config, args: &DemoArgs, records: &mut Records, screen: &mut Screen) -> miette::Result<Input> {
    Kept::forget(config)?;
    let input = input::make(config, args, screen)?;
    records.renew()?;
    for subsystem in &config.file.subsystems {
        backings::forget(config, subsystem)?;
    }
    Kept::keep(config, &input)?;
    Ok(input)
}

/// Source and destination, fenced as the records say.
fn machines(config: &Config, records: &Records) -> miette::Result<[Machine; 2]> {
    let machine = |end: &Spanned<String>| {
        let subsystem = config.subsystem(end.get_ref()).ok_or_else(|| miette!("no subsystem \"{}\"", end.get_ref()))?;
        assembly::machine_behind(config, subsystem, records.is_fenced(subsystem)).into_diagnostic()
    };
    Ok([machine(&config.file.migration.from)?, machine(&config.file.migration.to)?])
}

/// Which of the two ends comes up behind a raised fence.
fn fenced(config: &Config, records: &Records) -> [bool; 2] {
    let ends = [&config.file.migration.from, &config.file.migration.to];
    ends.map(|end| config.subsystem(end.get_ref()).is_some_and(|subsystem| records.is_fenced(subsystem)))
}

/// Source and destination, in a process each.
fn apart_specs<'a>(file: &'a Path, config: &'a Config, folder: &'a Path, fenced: [bool; 2]) -> [EndSpec<'a>; 2] {
    let ends = [&config.file.migration.from, &config.file.migration.to];
    let [from, to] = ends.map(|end| end.get_ref().as_str());
    [(from, fenced[0]), (to, fenced[1])].map(|(name, fenced)| EndSpec { file, config, name, fenced, folder })
}

/// Says whether the disk that serves has everything, before anything goes on.
fn carry_on(config: &Config, disk: &Disk, ledger: &Ledger, screen: &Screen) -> miette::Result<()> {
    let found = input::check(config, disk, ledger)?;
    if !found.is_ok() {
        let first = found.offenders.first().map(ToString::to_string).unwrap_or_default();
        return Err(miette!("{} acknowledged writes are not in {}: {first}", found.writes_missing, disk));
    }
    screen.say(&format!("checked      every block that the guest ever wrote is as its ledger says in {disk}"));
    Ok(())
}

/// What is about to happen, how long it takes and how much disk.
fn intro(config: &Config, args: &DemoArgs) -> String {
    let guest = &config.file.guest;
    let rate = match guest.writes_per_second {
        0 => "as fast as it can".to_owned(),
        rate => format!("{rate} times a second"),
    };
    let source = Disk::of_end(config, config.file.migration.from.get_ref()).map(|(_, disk)| disk);
    let (what, disk) = match &args.image {
        _ if source.as_ref().is_ok_and(|source| source.file().is_none()) => ("a device's namespace".to_owned(), "none".to_owned()),
        Some(image) => (format!("a copy of {}", image.display()), "twice its size".to_owned()),
        None => (format!("{} of real files", args.size), format!("{}", Size(3 * args.size.0))),
    };
    format!(
        "Moves {what} from one NVMe subsystem to another while a guest writes {rate}, then compares every block.\n\
         Takes 10 to 25 seconds for a GiB and {disk} of disk. Ctrl-C cancels: the source keeps its data.\n"
    )
}

/// What the command line says instead of the configuration.
fn apply(config: &mut Config, args: &DemoArgs) {
    let here = std::env::current_dir().unwrap_or_default();
    let policy = &mut config.file.policy;
    for (from, to) in [(&args.cdq, &mut policy.cdq), (&args.tracking, &mut policy.tracking), (&args.copy, &mut policy.copy)] {
        if let Some(path) = from {
            let whole = if path == Path::new("native") { path.clone() } else { here.join(path) };
            to.component = Spanned::new(0..0, whole);
            to.sha256 = None;
        }
    }
    if let Some(path) = &args.destination {
        let to = config.file.migration.to.get_ref().clone();
        let ends = config.file.subsystems.iter_mut().filter(|s| *s.name.get_ref() == to);
        for namespace in ends.flat_map(|s| &mut s.namespaces) {
            namespace.path = Some(Spanned::new(0..0, here.join(path)));
        }
    }
    let guest = &mut config.file.guest;
    guest.writes_per_second = args.rate.unwrap_or(guest.writes_per_second);
    guest.queue_depth = args.queue_depth.unwrap_or(guest.queue_depth);
}
