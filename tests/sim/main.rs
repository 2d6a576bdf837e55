//! `sim`: runs seeds of the simulator. `cargo xtask sim` builds and starts it.

use clap::Parser;
use dray_tests::sim::found::FOUND;
use dray_tests::sim::runner::{self, Batch};
use dray_tests::sim::{Options, planted, policies, scenario, trace};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

/// Seeds after which every fault and every state must have been reached.
const ENOUGH: u64 = 2_000;
/// What each seed has at least: commands of the guests, migrations that ended, faults that took effect.
const LEAST: (u64, u64, u64) = (2_000, 1, 3);

/// Runs the whole system under seeded faults, in virtual time, with two oracles watching.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim", after_help = "Example: cargo xtask sim --seeds 2000\nOne seed again: cargo xtask sim --replay 77")]
struct Args {
    /// Seeds to run
    #[arg(long, value_name = "N", default_value_t = ENOUGH)]
    seeds: u64,
    /// The first seed
    #[arg(long, value_name = "S", default_value_t = 1)]
    from: u64,
    /// Stop after so many minutes
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
    /// Threads; 0 = one per core
    #[arg(long, value_name = "T", default_value_t = 0)]
    threads: usize,
    /// Go on after a seed that fails, and tell all
    #[arg(long)]
    keep_going: bool,
    /// Run one seed and tell what happens
    #[arg(long, value_name = "SEED", conflicts_with_all = ["minutes", "keep_going"])]
    replay: Option<u64>,
    /// With --replay: every event, not only the last that matter
    #[arg(long, requires = "replay")]
    all_events: bool,
    /// With --replay: leave out these deeds of the scenario (its list is numbered from 0)
    #[arg(long, value_delimiter = ',', requires = "replay")]
    without: Vec<usize>,
    /// Plant a fault ("all" = each in turn, on all cores) and fail unless an oracle catches it; "list" lists them
    #[arg(long, value_name = "FAULT")]
    planted: Option<String>,
    /// Seeds within which a planted fault must be caught
    #[arg(long, value_name = "N", default_value_t = 5_000)]
    within: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match (&args.planted, args.replay) {
        (Some(name), None) => plant(&args, name),
        (name, Some(seed)) => replay(&args, seed, name.as_deref()),
        (None, None) => seeds(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("sim: {error}");
            ExitCode::FAILURE
        }
    }
}

fn threads(args: &Args) -> usize {
    match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

fn seeds(args: &Args) -> Result<bool, String> {
    let enough = args.seeds >= ENOUGH;
    let batch = Batch {
        before: if enough { FOUND.iter().map(|found| found.seed).collect() } else { Vec::new() },
        from: args.from,
        seeds: args.seeds,
        time: args.minutes.map(|minutes| Duration::from_secs_f64(minutes * 60.0)),
        threads: threads(args),
        keep_going: args.keep_going,
        options: Options::default(),
    };
    let terminal = std::io::stderr().is_terminal();
    let step = if terminal { 100 } else { (args.seeds / 4).max(1_000) };
    let found = runner::many(&batch, &|done| {
        if done.is_multiple_of(step) {
            if terminal { eprint!("\r{done} seeds") } else { eprintln!("{done} seeds") }
        }
    })?;
    if terminal {
        eprintln!();
    }
    println!("{found}");
    for failure in &found.failures {
        println!("\n{failure}");
    }
    let missing = found.coverage.missing();
    let enough = found.seeds >= ENOUGH;
    if enough && !missing.is_empty() {
        println!("\nnever reached in {} seeds: {}", found.seeds, missing.join(", "));
    }
    // As cargo counts tests, for whoever adds them up.
    let bad = found.failures.len() as u64;
    let thin = bad == 0 && found.least.is_some_and(|(commands, migrations, faults)| {
        commands < LEAST.0 || migrations < LEAST.1 || faults < LEAST.2
    });
    if thin {
        println!("\na seed has too little in it: {LEAST:?} commands, migrations and faults are wanted");
    }
    let verdict = if bad == 0 && !thin && (missing.is_empty() || !enough) { "ok" } else { "FAILED" };
    println!("\nseeds: {verdict}. {} passed; {bad} failed", found.seeds.saturating_sub(bad));
    Ok(verdict == "ok")
}

fn replay(args: &Args, seed: u64, name: Option<&str>) -> Result<bool, String> {
    let kit = policies::Kit::new().map_err(|error| error.to_string())?;
    let options = Options { without: args.without.iter().copied().collect(), keep_events: true, ..Options::default() };
    if let Some(name) = name {
        dray_device::planted::set(Some(planted::named(name).ok_or_else(|| format!("no planted fault \"{name}\""))?.fault));
    }
    println!("{:#?}", scenario::of(seed, &options));
    let (run, what) = runner::one(seed, &options, &kit);
    if let Some(run) = &run {
        let place = run.violation.as_ref().and_then(|violation| violation.place);
        let lines = match args.all_events {
            true => run.events.iter().map(trace::line).collect(),
            false => trace::minimal(&run.events, place),
        };
        lines.iter().for_each(|line| println!("{line}"));
        println!("{} commands, {} migrations, {} us of virtual time", run.commands, run.migrations, run.virtual_us);
    }
    println!("seed {seed}: {}", what.as_deref().unwrap_or("nothing is wrong"));
    Ok(what.is_none())
}

fn plant(args: &Args, name: &str) -> Result<bool, String> {
    if name == "list" {
        planted::ALL.iter().for_each(|planted| println!("{:<24} {}", planted.name, planted.breaks));
        return Ok(true);
    }
    let options = Options::default();
    let caught = if name == "all" {
        runner::catch_all(args.within, args.from, threads(args), &options)?
    } else {
        let kit = policies::Kit::new().map_err(|error| error.to_string())?;
        let planted = planted::named(name).ok_or_else(|| format!("no planted fault \"{name}\"; see --planted list"))?;
        vec![runner::catch(planted.fault, args.within, args.from, &options, &kit)]
    };
    let mut missed = 0;
    for runner::Caught { fault, by, seeds } in &caught {
        let name = planted::ALL.iter().find(|planted| planted.fault == *fault).map_or("?", |planted| planted.name);
        match by {
            Some((seed, what)) => println!("{name:<24} caught after {seeds:>5} seeds (seed {seed}): {what:.120}"),
            None => {
                missed += 1;
                println!("{name:<24} NOT CAUGHT by {seeds} seeds");
            }
        }
    }
    println!("\nplanted faults: {}. {} passed; {missed} failed", if missed == 0 { "ok" } else { "FAILED" }, caught.len() - missed);
    Ok(missed == 0)
}
