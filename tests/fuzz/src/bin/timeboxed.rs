//! The time-boxed run on the stable compiler: the corpus, the seeds, then mutations of both for some seconds a target.
//!
//! `timeboxed [--target NAME] [--seconds N] [--seed S] [--corpus FOLDER] [--findings FOLDER] [--replay FILE] [--write-seeds]`

use dray_fuzz::mutate::Mutator;
use dray_fuzz::{TARGETS, Target};
use std::io::Write;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// An input that runs for so long does not end.
const ENDLESS: Duration = Duration::from_secs(20);
/// What the process may grow to, in bytes.
const MOST_MEMORY: u64 = 1 << 30;

struct Options {
    targets: Vec<Target>,
    time: Duration,
    seed: u64,
    corpus: PathBuf,
    findings: PathBuf,
    replay: Option<PathBuf>,
    write_seeds: bool,
}

impl Options {
    fn read() -> Result<Self, String> {
        let mut options = Self {
            targets: TARGETS.to_vec(),
            time: Duration::from_secs(5),
            seed: 1,
            corpus: concat!(env!("CARGO_MANIFEST_DIR"), "/corpus").into(),
            findings: "target/fuzz/findings".into(),
            replay: None,
            write_seeds: false,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            if arg == "--write-seeds" {
                options.write_seeds = true;
                continue;
            }
            let value = args.next().ok_or(format!("{arg} needs a value"))?;
            let number = || value.parse::<u64>().map_err(|error| format!("{arg} {value}: {error}"));
            match arg.as_str() {
                "--target" => options.targets.retain(|target| target.name == value),
                "--seconds" => options.time = Duration::from_secs(number()?),
                "--seed" => options.seed = number()?,
                "--corpus" => options.corpus = value.into(),
                "--findings" => options.findings = value.into(),
                "--replay" => options.replay = Some(value.into()),
                _ => return Err(format!("`{arg}` is not an option")),
            }
        }
        if options.targets.is_empty() {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            return Err(format!("there is no such target; there are {}", names.join(", ")));
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let outcome = Options::read().and_then(|options| {
        if options.write_seeds {
            return write_seeds(&options);
        }
        match &options.replay {
            Some(file) => replay(&options, file),
            None => options.targets.iter().try_for_each(|target| fuzz(target, &options)),
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("fuzz: {message}");
            ExitCode::FAILURE
        }
    }
}

fn write_seeds(options: &Options) -> Result<(), String> {
    for target in &options.targets {
        let folder = options.corpus.join(target.name);
        std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        for (i, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{i:02}")), seed).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

fn replay(options: &Options, file: &Path) -> Result<(), String> {
    let [target] = options.targets.as_slice() else { return Err("--replay needs --target".into()) };
    let input = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    (target.run)(&input);
    println!("{}: {} bytes, nothing wrong", target.name, input.len());
    Ok(())
}

/// The files of a target's corpus in order of their names, then its seeds.
fn corpus(target: &Target, options: &Options) -> Vec<Vec<u8>> {
    let files = std::fs::read_dir(options.corpus.join(target.name));
    let mut paths: Vec<_> = files.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let mut inputs: Vec<Vec<u8>> = paths.iter().filter_map(|path| std::fs::read(path).ok()).collect();
    inputs.extend((target.seeds)());
    inputs
}

/// The input that is running and since when, for whoever watches.
type Running = Arc<Mutex<Option<(Instant, Vec<u8>)>>>;

fn fuzz(target: &Target, options: &Options) -> Result<(), String> {
    let corpus = corpus(target, options);
    let running = Running::default();
    watch(target.name, options, &running);
    let started = Instant::now();
    for input in &corpus {
        execute(target, options, input, &running)?;
    }
    let mut mutator = Mutator::new(options.seed, target.words, target.most_bytes);
    let (mut input, mut executions, began) = (Vec::new(), corpus.len() as u64, Instant::now());
    while began.elapsed() < options.time {
        mutator.next(&corpus, &mut input);
        execute(target, options, &input, &running)?;
        executions += 1;
        if executions.is_multiple_of(256) && memory() > MOST_MEMORY {
            return Err(format!("{}: the process has grown to {} MiB", target.name, memory() >> 20));
        }
    }
    *running.lock().unwrap_or_else(PoisonError::into_inner) = None;
    let seconds = started.elapsed().as_secs_f64();
    let (files, rate) = (corpus.len(), executions as f64 / seconds);
    println!("{:<10} {executions:>8} executions  {rate:>7.0}/s  {files:>3} inputs to begin with  seed {}", target.name, options.seed);
    Ok(())
}

fn execute(target: &Target, options: &Options, input: &[u8], running: &Running) -> Result<(), String> {
    *running.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), input.to_vec()));
    match panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        Ok(()) => Ok(()),
        Err(_) => Err(finding(target.name, options, input, "a guarantee is broken")),
    }
}

/// Writes a failing input to a file; returns the message that says how to run it again.
fn finding(target: &str, options: &Options, input: &[u8], what: &str) -> String {
    // FNV-1a: the same input gets the same name.
    let hash = input.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    let file = options.findings.join(format!("{target}-{hash:016x}"));
    let written = std::fs::create_dir_all(&options.findings).and_then(|()| std::fs::write(&file, input));
    match written {
        Ok(()) => format!(
            "{target}: {what}\n  input: {}\n  again: cargo xtask fuzz --target {target} --replay {}",
            file.display(),
            file.display()
        ),
        Err(error) => format!("{target}: {what}, and its {} bytes cannot be written: {error}", input.len()),
    }
}

/// Ends the process, with the input, when one does not end.
fn watch(target: &'static str, options: &Options, running: &Running) {
    let running = Arc::downgrade(running);
    let findings = options.findings.clone();
    std::thread::spawn(move || {
        while let Some(running) = running.upgrade() {
            let late = running.lock().unwrap_or_else(PoisonError::into_inner).clone().filter(|(since, _)| since.elapsed() > ENDLESS);
            if let Some((_, input)) = late {
                let options = Options { findings, ..Options::read().expect("read once") };
                let message = finding(target, &options, &input, "an input does not end");
                let _ignored = writeln!(std::io::stderr(), "fuzz: {message}");
                std::process::exit(1);
            }
            drop(running);
            std::thread::sleep(Duration::from_secs(1));
        }
    });
}

/// Bytes of memory that the process has.
fn memory() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    pages.and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok()).map_or(0, |pages| pages * 4096)
}
