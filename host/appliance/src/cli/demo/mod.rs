//! `dray demo`: makes the input, runs the migration, looks at both disks, gives the verdict.

mod input;
mod progress;
mod verdict;

use super::DemoArgs;
use crate::assembly;
use crate::config::Config;
use crate::config::units::Size;
use crate::core::clock::Clock;
use crate::live::{self, LiveSpec};
use crate::policies;
use crate::summary::Verdict;
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
    apply(&mut config, args);
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The second Ctrl-C ends the process at once.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&cancel)).into_diagnostic()?;
        signal_hook::flag::register(signal, Arc::clone(&cancel)).into_diagnostic()?;
    }
    let mut screen = Screen::new();
    // The components are looked at first: a wrong one must not cost the time that the image takes.
    let clock = Clock::new();
    let (seats, policy_host) = policies::seat(&config, clock)?;
    screen.say(&intro(&config, args));
    let input = input::make(&config, args, &mut screen)?;
    if cancel.load(Ordering::Relaxed) {
        return Err(miette!("cancelled; nothing was moved"));
    }
    let ends = [&config.file.migration.from, &config.file.migration.to];
    let [source, destination] = ends.map(|end| {
        let subsystem = config.subsystem(end.get_ref()).ok_or_else(|| miette!("no subsystem \"{}\"", end.get_ref()))?;
        assembly::machine(&config, subsystem).into_diagnostic()
    });
    let (source, destination) = (source?, destination?);
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
        seed: args.seed,
        pin: None,
        cancel: Arc::clone(&cancel),
    };
    let report = live::run(&spec, source, destination, seats, &mut |view| screen.show(view))?;
    drop(policy_host);
    screen.finish();
    let summary = verdict::judge(&config, &input, &report).wrap_err("the verdict could not be given")?;
    if args.json {
        eprintln!("{summary}");
        println!("{}", serde_json::to_string(&summary).into_diagnostic()?);
    } else {
        println!("\n{summary}");
    }
    Ok(if summary.verdict == Verdict::Ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is about to happen, how long it takes and how much disk.
fn intro(config: &Config, args: &DemoArgs) -> String {
    let guest = &config.file.guest;
    let rate = match guest.writes_per_second {
        0 => "as fast as it can".to_owned(),
        rate => format!("{rate} times a second"),
    };
    let (what, disk) = match &args.image {
        Some(image) => (format!("a copy of {}", image.display()), "twice its size".to_owned()),
        None => (format!("{} of real files", args.size), format!("{}", Size(3 * args.size.0))),
    };
    format!(
        "Moves {what} from one NVMe subsystem to another while a guest writes {rate}, then compares every block.\n\
         Takes 10 to 25 seconds and {disk} of disk. Ctrl-C cancels: the source keeps its data.\n"
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
