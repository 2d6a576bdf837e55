//! Many seeds on all cores, and what to say of them.

use super::coverage::Coverage;
use super::planted;
use super::policies::Kit;
use super::trace;
use super::{Options, Run, run};
use dray_device::planted::Fault as Planted;
use std::cell::RefCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

/// Which seeds.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Seeds that come before the others.
    pub before: Vec<u64>,
    /// The first of the others.
    pub from: u64,
    /// How many at most.
    pub seeds: u64,
    /// For how long at most.
    pub time: Option<Duration>,
    /// Threads.
    pub threads: usize,
    /// Goes on after a failure.
    pub keep_going: bool,
    /// How each seed is run.
    pub options: Options,
}

/// A seed that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What is wrong.
    pub what: String,
    /// Deeds of its scenario that the failure does not need.
    pub needless: Vec<usize>,
    /// What the scenario still does.
    pub scenario: String,
    /// What happened.
    pub trace: Vec<String>,
}

/// What seeds have shown.
#[derive(Debug, Default)]
pub struct Findings {
    /// Seeds that ran to their end.
    pub seeds: u64,
    /// Guests' commands that ended.
    pub commands: u64,
    /// Migrations that ended.
    pub migrations: u64,
    /// Virtual time, µs.
    pub virtual_us: u64,
    /// Time of all threads.
    pub busy: Duration,
    /// Time on the clock.
    pub elapsed: Duration,
    /// What was reached.
    pub coverage: Coverage,
    /// The smallest figures of any seed: commands, migrations, faults.
    pub least: Option<(u64, u64, u64)>,
    /// Seeds that failed.
    pub failures: Vec<Failure>,
}

impl Findings {
    /// Seeds per second of one thread.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.seeds as f64 / self.busy.as_secs_f64().max(1e-9)
    }

    fn add(&mut self, run: &Run) {
        self.seeds += 1;
        self.commands += run.commands;
        self.migrations += run.migrations;
        self.virtual_us += run.virtual_us;
        self.coverage.add(&run.coverage);
        let now = (run.commands, run.migrations, run.coverage.faults());
        let least = self.least.get_or_insert(now);
        *least = (least.0.min(now.0), least.1.min(now.1), least.2.min(now.2));
    }

    fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.commands += other.commands;
        self.migrations += other.migrations;
        self.virtual_us += other.virtual_us;
        self.busy += other.busy;
        self.coverage.add(&other.coverage);
        self.least = match (self.least, other.least) {
            (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.min(b.1), a.2.min(b.2))),
            (a, b) => a.or(b),
        };
        self.failures.extend(other.failures);
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.coverage)?;
        let (commands, migrations, faults) = self.least.unwrap_or_default();
        writeln!(f, "a seed has at least {commands} guest commands, {migrations} migrations, {faults} faults")?;
        let Self { seeds, commands, migrations, .. } = self;
        let (minutes, elapsed) = (self.virtual_us as f64 / 6e7, self.elapsed.as_secs_f64());
        writeln!(f, "{seeds} seeds: {commands} commands, {migrations} migrations, {minutes:.1} minutes of virtual time")?;
        write!(f, "{elapsed:.1} s, {:.0} seeds/s per core", self.rate())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.what)?;
        writeln!(f, "{}", self.scenario)?;
        self.trace.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        write!(f, "replay: cargo xtask sim --replay {}", self.seed)?;
        if !self.needless.is_empty() {
            // What is told above is what happens without them.
            let needless: Vec<_> = self.needless.iter().map(ToString::to_string).collect();
            write!(f, "\n        cargo xtask sim --replay {} --without {}", self.seed, needless.join(","))?;
        }
        Ok(())
    }
}

/// Runs a batch; `progress` hears how many seeds are done, now and then.
///
/// # Errors
/// When a thread cannot be set up.
pub fn many(batch: &Batch, progress: &(dyn Fn(u64) + Sync)) -> Result<Findings, String> {
    hear_panics();
    let (next, done, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let started = Instant::now();
    let all = Mutex::new(Findings::default());
    let work = || -> Result<(), String> {
        let kit = Kit::new().map_err(|error| error.to_string())?;
        let (mut mine, began) = (Findings::default(), Instant::now());
        while !stop.load(Ordering::Relaxed) && batch.time.is_none_or(|time| started.elapsed() < time) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let known = batch.before.len() as u64;
            let seed = match batch.before.get(index as usize) {
                Some(seed) => *seed,
                None if index - known < batch.seeds => batch.from + index - known,
                None => break,
            };
            let (ran, failure) = one(seed, &batch.options, &kit);
            if let Some(ran) = &ran {
                mine.add(ran);
            }
            if let Some(what) = failure {
                stop.store(!batch.keep_going, Ordering::Relaxed);
                mine.failures.push(explain(seed, what, &batch.options, &kit));
            }
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
        mine.busy = began.elapsed();
        all.lock().unwrap_or_else(PoisonError::into_inner).merge(mine);
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..batch.threads.max(1)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a thread has died".into())))
    })?;
    let mut all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.elapsed = started.elapsed();
    all.failures.sort_by_key(|failure| failure.seed);
    Ok(all)
}

/// Runs a seed; says what is wrong, a panic included.
pub fn one(seed: u64, options: &Options, kit: &Kit) -> (Option<Run>, Option<String>) {
    match catch_unwind(AssertUnwindSafe(|| run(seed, options, kit))) {
        Ok(run) => {
            let what = run.violation.as_ref().map(ToString::to_string);
            (Some(run), what)
        }
        Err(_) => (None, Some(format!("panic: {}", PANIC.take()))),
    }
}

/// Leaves out what the failure does not need, one deed after the other, and tells the rest.
fn explain(seed: u64, what: String, options: &Options, kit: &Kit) -> Failure {
    let mut options = options.clone();
    let rule = |what: &str| what.split(':').next().map(str::to_owned);
    let fails = |options: &Options| one(seed, options, kit).1.is_some_and(|now| rule(&now) == rule(&what));
    for deed in 0..super::scenario::of(seed, &options).deeds.len() {
        options.without.insert(deed);
        if !fails(&options) {
            options.without.remove(&deed);
        }
    }
    options.keep_events = true;
    let (ran, now) = one(seed, &options, kit);
    let trace = ran.as_ref().map_or_else(Vec::new, |run| {
        trace::minimal(&run.events, run.violation.as_ref().and_then(|violation| violation.place))
    });
    let scenario = format!("{:#?}", super::scenario::of(seed, &options));
    Failure { seed, what: now.unwrap_or(what), needless: options.without.iter().copied().collect(), scenario, trace }
}

/// What became of a planted fault.
#[derive(Debug)]
pub struct Caught {
    /// The fault.
    pub fault: Planted,
    /// The seed that showed it, and what an oracle said; `None` if none did.
    pub by: Option<(u64, String)>,
    /// Seeds that ran.
    pub seeds: u64,
}

/// Plants a fault and runs seeds until an oracle objects.
///
/// # Errors
/// When the policies cannot be loaded.
pub fn catch(fault: Planted, within: u64, from: u64, options: &Options, kit: &Kit) -> Caught {
    hear_panics();
    let mut caught = Caught { fault, by: None, seeds: 0 };
    for seed in from..from + within {
        caught.seeds += 1;
        dray_device::planted::set(Some(fault));
        let (_, what) = one(seed, options, kit);
        dray_device::planted::set(None);
        // A seed that fails by itself shows nothing of the planted fault.
        if let Some(what) = what
            && one(seed, options, kit).1.is_none()
        {
            caught.by = Some((seed, what));
            break;
        }
    }
    caught
}

/// Plants every fault, on so many threads.
///
/// # Errors
/// When a thread cannot be set up.
pub fn catch_all(within: u64, from: u64, threads: usize, options: &Options) -> Result<Vec<Caught>, String> {
    let next = AtomicU64::new(0);
    let all = Mutex::new(Vec::new());
    let work = || -> Result<(), String> {
        let kit = Kit::new().map_err(|error| error.to_string())?;
        while let Some(planted) = planted::ALL.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            let caught = catch(planted.fault, within, from, options, &kit);
            all.lock().unwrap_or_else(PoisonError::into_inner).push(caught);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a thread has died".into())))
    })?;
    let mut all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.sort_by_key(|caught| planted::ALL.iter().position(|planted| planted.fault == caught.fault));
    Ok(all)
}

thread_local! {
    /// What the last panic of this thread said.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics of the product are findings: they are kept for the report, not printed.
fn hear_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info| PANIC.set(info.to_string().replace('\n', " "))));
    });
}
