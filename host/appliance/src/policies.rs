//! Policies of the configuration: found, pinned, loaded, guarded, and seated beside the polling core or on it.

use crate::config::{Config, Policy, PolicyPlace};
use crate::core::clock::Clock;
use crate::core::seat::BesideSeat;
use crate::core::ticker::{TICK, TickerThread};
use dray_policy::guard::{Guard, Limits as GuardLimits};
use dray_policy::native::{Native, NativeFactory};
use dray_policy::role::{Cdq, Copy, Tracking};
use dray_policy::seam::{Factory, Seat};
use dray_sandbox::{Budget, Limits, LoadError, Pin, Sandbox, SandboxConfig, SandboxRole};
use std::path::{Path, PathBuf};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

/// Opening an instance may take longer than a call.
const OPEN_TIME: Duration = Duration::from_secs(1);

/// Why policies could not be seated.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum PolicyError {
    /// A component was refused.
    #[error("the component of policy.{role} is refused: {}: {source}", path.display())]
    Refused {
        /// The role's name.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: LoadError,
    },
    /// No sandbox could be set up.
    #[error("cannot set up the sandbox: {0}")]
    Sandbox(#[from] LoadError),
    /// No thread could be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// The three seats, and what keeps their policies going.
pub struct Seats {
    /// Who drains the queue.
    pub cdq: Box<dyn Seat<Cdq>>,
    /// Who plans the rounds.
    pub tracking: Box<dyn Seat<Tracking>>,
    /// Who orders the copy.
    pub copy: Box<dyn Seat<Copy>>,
}

/// What sandboxed policies of one configuration share. Lives as long as the seats are asked.
#[derive(Debug)]
pub struct PolicyHost {
    _tickers: Vec<TickerThread>,
}

/// Sandbox with the budget and memory limit of one policy.
///
/// # Errors
/// [`LoadError`].
pub fn sandbox(policy: &Policy, cache: Option<PathBuf>, compiled: Option<PathBuf>) -> Result<Sandbox, LoadError> {
    let ticks = |time: Duration| u64::try_from(time.as_micros().div_ceil(TICK.as_micros())).unwrap_or(u64::MAX) + 1;
    Sandbox::new(&SandboxConfig {
        budget: Budget::Time { call_ticks: ticks(policy.budget.0), open_ticks: ticks(OPEN_TIME) },
        limits: Limits { memory_bytes: usize::try_from(policy.memory.0).unwrap_or(usize::MAX), instances: 4, ..Limits::default() },
        cache,
        compiled,
    })
}

/// Loads the configuration's policies and seats them.
///
/// # Errors
/// [`PolicyError`]: a component that is refused is never replaced in silence.
pub fn seat(config: &Config, clock: Clock) -> Result<(Seats, PolicyHost), PolicyError> {
    let policy = &config.file.policy;
    // They have nothing to do with each other, and take a good part of a start.
    let (cdq, tracking, copy) = std::thread::scope(|scope| {
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let cdq = thread("dray-load-cdq").spawn_scoped(scope, || one::<Cdq>(config, &policy.cdq, clock));
        let tracking = thread("dray-load-track").spawn_scoped(scope, || one::<Tracking>(config, &policy.tracking, clock));
        let copy = one::<Copy>(config, &policy.copy, clock);
        (joined(cdq), joined(tracking), copy)
    });
    let ((cdq, of_cdq), (tracking, of_tracking), (copy, of_copy)) = (cdq?, tracking?, copy?);
    let seats = Seats { cdq, tracking, copy };
    Ok((seats, PolicyHost { _tickers: [of_cdq, of_tracking, of_copy].into_iter().flatten().collect() }))
}

/// More seats for the queues' policy: each controller that moves has its own queue.
///
/// # Errors
/// [`PolicyError`].
pub fn more_cdq(config: &Config, clock: Clock, count: usize) -> Result<(Vec<Box<dyn Seat<Cdq>>>, PolicyHost), PolicyError> {
    let (mut seats, mut tickers) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let (seat, of_seat) = one::<Cdq>(config, &config.file.policy.cdq, clock)?;
        seats.push(seat);
        tickers.extend(of_seat);
    }
    Ok((seats, PolicyHost { _tickers: tickers }))
}

/// The factory of one policy: a component, checked and compiled, or the native one.
///
/// # Errors
/// [`PolicyError`].
pub fn factory<R: SandboxRole + Native>(
    config: &Config,
    policy: &Policy,
    tickers: &mut Vec<TickerThread>,
) -> Result<Box<dyn Factory<R>>, PolicyError> {
    let component = policy.component.get_ref();
    if component == Path::new("native") {
        return Ok(Box::new(NativeFactory::<R>::new()));
    }
    let path = config.path(component);
    let refused = |source| PolicyError::Refused { role: R::NAME, path: path.clone(), source };
    let pin = Pin::find(policy.sha256.as_ref().map(|s| s.get_ref().as_str()), &path).map_err(refused)?;
    let cache = config.path(&config.file.core.state).join("compiled");
    let compiled = config.file.core.compiled.as_ref().map(|folder| config.path(folder));
    let sandbox = sandbox(policy, Some(cache), compiled)?;
    let component = sandbox.load::<R>(&path, &pin).map_err(refused)?;
    tracing::info!(role = R::NAME, code = ?component.origin(), "policy component loaded");
    tickers.push(TickerThread::start(&sandbox)?);
    Ok(Box::new(component.factory()))
}

/// What a thread returned, if there is one; its panic is ours.
fn joined<T>(thread: std::io::Result<ScopedJoinHandle<'_, Result<T, PolicyError>>>) -> Result<T, PolicyError> {
    thread?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A seat, and what keeps its policy going.
type Seated<R> = (Box<dyn Seat<R>>, Vec<TickerThread>);

fn one<R: SandboxRole + Native>(config: &Config, policy: &Policy, clock: Clock) -> Result<Seated<R>, PolicyError> {
    let mut tickers = Vec::new();
    let factory = factory::<R>(config, policy, &mut tickers)?;
    let limits = GuardLimits { max_faults: policy.max_faults.into(), ..GuardLimits::default() };
    let guard = Box::new(Guard::new(factory, Box::new(NativeFactory::<R>::new()), Box::new(clock), limits));
    let seat: Box<dyn Seat<R>> = match config.file.core.policies {
        PolicyPlace::On => guard,
        PolicyPlace::Beside => Box::new(BesideSeat::start(guard)?),
    };
    Ok((seat, tickers))
}
