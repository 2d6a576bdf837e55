//! The figures of `cargo xtask bench`: what Dray costs, measured against what the machine can do in the same run.
//!
//! Each module measures the rows of one prefix; [`targets`] knows what they should be, [`report`] prints them. The measuring
//! loops are our own: most rows poll two or more parts in turn, or on two pinned cores, which is not the shape of a
//! micro-benchmark. A row is the median of three runs.
//!
//! Run it alone: a build next to it ruins every figure. `--quick` only shows that all rows can be measured.
//!
//! Start reading at `run` below, then `loopback.rs`.

mod calib;
mod cdq;
mod copy;
mod dirty;
mod exports;
mod far;
mod handover;
mod idle;
mod load;
mod loopback;
mod machine;
mod migrate;
mod policy;
mod report;
mod rig;
mod sim;
mod targets;

use machine::{Cores, HugePages};
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What measuring can fail with; the text names what was being done.
type Failure = Box<dyn std::error::Error>;

/// Measures the rows of one module.
type Measure = fn(&Plan, &mut Report) -> Result<(), Failure>;

const HELP: &str = "\
Measures Dray and prints a table with the bound of each figure beside it.

Options:
  --filter TEXT  only figures whose name contains TEXT (and the calib.* rows that their bounds need)
  --quick        one short run of each: shows that they can be measured, not what they are
  --json PATH    where the figures go as JSON; default bench/summary.json in the target folder
  --help         this text

Example: cargo xtask bench --filter loopback.
";

/// How long to measure, and on which cores.
struct Plan {
    filter: String,
    quick: bool,
    cores: Cores,
}

impl Plan {
    /// Whether a row is asked for.
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    fn wants_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.wants(name))
    }

    /// Whether rows that begin so may be asked for.
    fn wants_part_of(&self, prefix: &str) -> bool {
        prefix.contains(&self.filter) || self.filter.contains(prefix)
    }

    /// Runs of which the median is taken.
    fn runs(&self) -> usize {
        if self.quick { 1 } else { 3 }
    }

    /// The length of one run.
    fn run_time(&self) -> Duration {
        Duration::from_millis(if self.quick { 40 } else { 700 })
    }

    /// `bytes`, or a sixteenth of them where a quick run does.
    fn bytes(&self, bytes: u64) -> u64 {
        if self.quick { bytes / 16 } else { bytes }
    }

    /// The median of all runs of `measure`.
    fn median(&self, mut measure: impl FnMut() -> Result<f64, Failure>) -> Result<f64, Failure> {
        let mut values = (0..self.runs()).map(|_| measure()).collect::<Result<Vec<_>, _>>()?;
        values.sort_by(f64::total_cmp);
        Ok(values[values.len() / 2])
    }
}

struct Options {
    filter: String,
    quick: bool,
    json: PathBuf,
}

fn options() -> Result<Option<Options>, Failure> {
    let mut options = Options { filter: String::new(), quick: false, json: machine::target_folder()?.join("bench/summary.json") };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value; try --help"));
        match arg.as_str() {
            "--filter" => options.filter = value()?,
            "--json" => options.json = value()?.into(),
            "--quick" => options.quick = true,
            // What cargo says to every benchmark.
            "--bench" => {}
            "--help" => return Ok(None),
            _ => return Err(format!("unknown option {arg}; try --help").into()),
        }
    }
    Ok(Some(options))
}

fn run(options: &Options) -> Result<(), Failure> {
    let plan = Plan { filter: options.filter.clone(), quick: options.quick, cores: Cores::find()? };
    let mut report = Report::new(plan.quick);
    // Two namespaces of 1 GiB, and rings, guests and buffers beside them.
    let pages = HugePages::reserve(plan.bytes(2 << 30) + (256 << 20));
    println!("{}", plan.cores.describe());
    println!("{}", pages.describe());
    if plan.quick {
        println!("--quick: short runs; the figures say nothing about the machine or the code");
    }
    calib::before(&plan, &mut report)?;
    let groups: [(&str, Measure); 11] = [
        ("loopback", loopback::measure),
        ("cdq", cdq::measure),
        ("dirty", dirty::measure),
        ("copy", copy::measure),
        ("migrate", migrate::measure),
        ("policy", policy::measure),
        ("vfio_user", exports::vfio_user),
        ("nvme_tcp", exports::nvme_tcp),
        ("exports of a file", exports::on_a_file),
        ("idle", idle::measure),
        ("sim", sim::measure),
    ];
    let mut failed = Vec::new();
    for (name, measure) in groups {
        // One that fails says so at the end; the others are measured all the same.
        if let Err(failure) = measure(&plan, &mut report) {
            eprintln!("{name}: {failure}");
            failed.push(name);
        }
    }
    calib::after(&plan, &mut report)?;
    drop(pages);
    report.print();
    report.write(&options.json)?;
    println!("written to {}", options.json.display());
    if failed.is_empty() { Ok(()) } else { Err(format!("not measured: {}", failed.join(", ")).into()) }
}

fn main() -> ExitCode {
    let done = options().and_then(|options| match options {
        None => {
            print!("{HELP}");
            Ok(())
        }
        Some(options) => run(&options),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}
