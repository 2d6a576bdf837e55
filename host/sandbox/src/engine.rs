//! The engine and its limits, fixed at start; loading; the ticker.

use crate::bindings::state;
use crate::cache::{Cache, Cpu, compile_for};
use crate::instance::{Host, SandboxFactory, TABLE_ELEMENTS, probe};
use crate::{Inspection, LoadError, Pin, SandboxRole, inspect, log};
use dray_policy::seam::Identity;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use wasmtime::component::{InstancePre, Linker};
use wasmtime::{Config, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig};

/// Memory of an instance that is kept resident and cleared by hand when the instance goes, in bytes.
const KEEP_RESIDENT: usize = 128 << 10;
/// Core instances, memories and tables of one component: compilers of scripting languages link dozens.
const CORE_INSTANCES: u32 = 64;
const TABLES: u32 = 8;
/// Ticks without a call after which a ticker may park.
const IDLE_TICKS: u64 = 64;

/// What bounds a call, and the opening of an instance (instantiation, `open` and `load`, each).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// Ticks of [`Ticker::tick`]. A call gets between one tick less and all of them.
    Time {
        /// For a call.
        call_ticks: u64,
        /// For opening.
        open_ticks: u64,
    },
    /// Units of fuel, about one per instruction and per byte of a bulk operation: the same input ends at the same instruction.
    Fuel {
        /// For a call.
        call_units: u64,
        /// For opening.
        open_units: u64,
    },
}

/// Limits of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Linear memory of one instance in bytes; beyond it `memory.grow` answers −1.
    pub memory_bytes: usize,
    /// Instances alive at once, over all components. Each reserves address space, not memory.
    pub instances: u32,
    /// Size of a component's file in bytes.
    pub component_bytes: u64,
    /// Stack of a call in bytes; beyond it the component traps.
    pub stack_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory_bytes: 16 << 20, instances: 32, component_bytes: 64 << 20, stack_bytes: 512 << 10 }
    }
}

/// How a sandbox is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxConfig {
    /// The budget of each call.
    pub budget: Budget,
    /// Its limits.
    pub limits: Limits,
    /// Folder of compiled code; `None` compiles at every load.
    pub cache: Option<PathBuf>,
    /// Folder of code that [`compile_ahead`] made; it is looked into before the cache, and only read.
    pub compiled: Option<PathBuf>,
}

/// Where the compiled code of a component came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeOrigin {
    /// It was compiled now.
    Compiled,
    /// From the cache.
    Cache,
    /// It was compiled ahead of time.
    Ahead,
}

/// Compiles a component for a CPU, ahead of time and perhaps on another machine, into a folder that [`SandboxConfig::compiled`]
/// can name. The budget of `config` must be of the kind that it will run with (time or fuel). Returns the file of the code.
///
/// # Errors
/// What is wrong with the component, or the folder.
pub fn compile_ahead(config: &SandboxConfig, cpu: Cpu, bytes: &[u8], folder: &Path) -> Result<PathBuf, LoadError> {
    let (found, limit) = (bytes.len() as u64, config.limits.component_bytes);
    if found > limit {
        return Err(LoadError::TooLarge { found, limit });
    }
    let inspection = inspect(bytes)?;
    let mut engine = engine_config(config);
    // Nothing runs in it: nothing is to be reserved.
    engine.allocation_strategy(InstanceAllocationStrategy::OnDemand);
    let engine = compile_for(&mut engine, cpu).and_then(|()| Engine::new(&engine));
    let engine = engine.map_err(|error| LoadError::Engine(format!("{error:#}")))?;
    let code = engine.precompile_component(bytes).map_err(|error| LoadError::Compile(format!("{error:#}")))?;
    let kept = Cache::open(folder).and_then(|cache| cache.put_ahead(cpu, inspection.sha256, &code));
    kept.map(|file| folder.join(file)).map_err(|error| LoadError::NotKept { folder: folder.into(), why: error.to_string() })
}

/// The engine that all components of this process share. Cheap to clone.
#[derive(Clone)]
pub struct Sandbox {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    linker: Linker<Host>,
    budget: Budget,
    limits: Limits,
    cache: Option<Cache>,
    compiled: Option<Cache>,
    pulse: Arc<Pulse>,
}

impl Sandbox {
    /// Starts the engine: everything it will ever reserve is reserved here.
    ///
    /// # Errors
    /// [`LoadError::Engine`] if the limits do not fit the machine. A cache folder that cannot be used is no error: it is
    /// logged, and everything is compiled.
    pub fn new(config: &SandboxConfig) -> Result<Self, LoadError> {
        let failed = |error: wasmtime::Error| LoadError::Engine(format!("{error:#}"));
        let engine = Engine::new(&engine_config(config)).map_err(failed)?;
        let mut linker = Linker::new(&engine);
        log::add_to_linker(&mut linker).map_err(failed)?;
        let cache = config.cache.as_ref().and_then(|folder| match Cache::open(folder) {
            Ok(cache) => Some(cache),
            Err(error) => {
                tracing::warn!(%error, folder = %folder.display(), "no cache of compiled components");
                None
            }
        });
        let compiled = config.compiled.as_ref().and_then(|folder| match Cache::open_existing(folder) {
            Ok(cache) => Some(cache),
            Err(error) => {
                tracing::warn!(%error, folder = %folder.display(), "components compiled ahead of time are not used");
                None
            }
        });
        let (budget, limits) = (config.budget, config.limits);
        Ok(Self { inner: Arc::new(Inner { engine, linker, budget, limits, cache, compiled, pulse: Arc::default() }) })
    }

    /// Loads the component at `path` as a policy of role `R`. It blocks: milliseconds for a small component, seconds for one
    /// that brings an interpreter and is not in the cache.
    ///
    /// # Errors
    /// A [`LoadError`] that says what is wrong with the component and what would be right.
    pub fn load<R: SandboxRole>(&self, path: &Path, pin: &Pin) -> Result<Component<R>, LoadError> {
        let bytes = read_bounded(path, self.inner.limits.component_bytes)?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.load_bytes(&name, &bytes, pin)
    }

    /// Loads a component from its bytes; `name` is what it is called in logs and summaries.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_bytes<R: SandboxRole>(&self, name: &str, bytes: &[u8], pin: &Pin) -> Result<Component<R>, LoadError> {
        let (found, limit) = (bytes.len() as u64, self.inner.limits.component_bytes);
        if found > limit {
            return Err(LoadError::TooLarge { found, limit });
        }
        pin.check(crate::Digest::of(bytes))?;
        let inspection = inspect(bytes)?;
        inspection.check(R::NAME)?;
        let (code, origin) = self.compile(bytes, &inspection)?;
        let misfit = |error: wasmtime::Error| LoadError::Interface(format!("{error:#}"));
        let pre = self.inner.linker.instantiate_pre(&code).map_err(misfit)?;
        let indices = R::indices(&pre).map_err(misfit)?;
        let state = inspection.has_state.then(|| state::GuestIndices::new(&pre)).transpose().map_err(misfit)?;
        let identity = Identity { component: name.to_owned(), sha256: inspection.sha256.to_string() };
        let sandbox = self.clone();
        let loaded = Loaded { sandbox, identity, name: name.into(), pre, indices, state, inspection, origin };
        let component = Component { loaded: Arc::new(loaded) };
        probe(&component).map_err(LoadError::Start)?;
        Ok(component)
    }

    /// Compiled code, from where it is, or compiled now.
    fn compile(&self, bytes: &[u8], inspection: &Inspection) -> Result<(wasmtime::component::Component, CodeOrigin), LoadError> {
        let engine = &self.inner.engine;
        if let Some(code) = self.inner.compiled.as_ref().and_then(|compiled| compiled.ahead(engine, inspection.sha256)) {
            return Ok((code, CodeOrigin::Ahead));
        }
        let cache = self.inner.cache.as_ref();
        if let Some(code) = cache.and_then(|cache| cache.get(engine, inspection.sha256)) {
            return Ok((code, CodeOrigin::Cache));
        }
        let code = wasmtime::component::Component::from_binary(engine, bytes)
            .map_err(|error| LoadError::Compile(format!("{error:#}")))?;
        if let Some(cache) = cache
            && let Err(error) = cache.put(engine, inspection.sha256, &code)
        {
            tracing::warn!(%error, "compiled component not kept");
        }
        Ok((code, CodeOrigin::Compiled))
    }

    /// The ticker of [`Budget::Time`], for a thread of the appliance: it calls [`Ticker::tick`] every 100 µs to 1 ms while that
    /// answers [`Ticking::Busy`], and sleeps on [`Ticking::Park`] until `wake` is called, which must only wake it
    /// (`Thread::unpark`). Only the first ticker of a sandbox is woken.
    #[must_use]
    pub fn ticker(&self, wake: Box<dyn Fn() + Send + Sync>) -> Ticker {
        let first = self.inner.pulse.wake.set(wake).is_ok();
        if !first {
            tracing::warn!("a second ticker of a sandbox is never woken");
        }
        let idle_limit = match self.inner.budget {
            Budget::Time { call_ticks, open_ticks } => call_ticks.max(open_ticks).saturating_add(2).max(IDLE_TICKS),
            Budget::Fuel { .. } => 0,
        };
        Ticker { engine: self.inner.engine.clone(), pulse: Arc::clone(&self.inner.pulse), seen: 0, idle: 0, idle_limit }
    }

    /// The budget that calls have.
    #[must_use]
    pub fn budget(&self) -> Budget {
        self.inner.budget
    }

    /// The limits that were fixed at start.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    pub(crate) fn pulse(&self) -> &Pulse {
        &self.inner.pulse
    }
}

/// The engine's configuration: what must not differ between two runs, and what is reserved.
fn engine_config(config: &SandboxConfig) -> Config {
    let limits = &config.limits;
    let mut pool = PoolingAllocationConfig::new();
    let all = limits.instances.max(1);
    pool.total_component_instances(all)
        .total_core_instances(all.saturating_mul(CORE_INSTANCES))
        .total_memories(all)
        .total_tables(all.saturating_mul(TABLES))
        .max_core_instances_per_component(CORE_INSTANCES)
        .max_memories_per_component(1)
        .max_tables_per_component(TABLES)
        .table_elements(TABLE_ELEMENTS)
        .max_memory_size(limits.memory_bytes)
        .max_unused_warm_slots(all)
        .linear_memory_keep_resident(KEEP_RESIDENT)
        .table_keep_resident(4096);
    let mut engine = Config::new();
    engine
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool))
        .cranelift_opt_level(OptLevel::Speed)
        .cranelift_nan_canonicalization(true)
        .wasm_relaxed_simd(false)
        .concurrency_support(false)
        .wasm_backtrace_max_frames(None)
        .max_wasm_stack(limits.stack_bytes);
    match config.budget {
        Budget::Time { .. } => engine.epoch_interruption(true),
        Budget::Fuel { .. } => engine.consume_fuel(true),
    };
    engine
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, LoadError> {
    let unreadable = |error: std::io::Error| LoadError::Unreadable { path: path.to_owned(), why: error.to_string() };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let found = file.metadata().map_err(unreadable)?.len();
    if found > limit {
        return Err(LoadError::TooLarge { found, limit });
    }
    let mut bytes = Vec::new();
    // One more than allowed, so that a file that grows meanwhile is found out.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

/// A component that was checked and compiled. Cheap to clone.
pub struct Component<R: SandboxRole> {
    loaded: Arc<Loaded<R>>,
}

struct Loaded<R: SandboxRole> {
    sandbox: Sandbox,
    identity: Identity,
    name: Arc<str>,
    pre: InstancePre<Host>,
    indices: R::Indices,
    state: Option<state::GuestIndices>,
    inspection: Inspection,
    origin: CodeOrigin,
}

impl<R: SandboxRole> Clone for Component<R> {
    fn clone(&self) -> Self {
        Self { loaded: Arc::clone(&self.loaded) }
    }
}

impl<R: SandboxRole> std::fmt::Debug for Component<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Component").field("role", &R::NAME).field("identity", &self.loaded.identity).finish_non_exhaustive()
    }
}

impl<R: SandboxRole> Component<R> {
    /// A factory of its instances.
    #[must_use]
    pub fn factory(&self) -> SandboxFactory<R> {
        SandboxFactory::new(self.clone())
    }

    /// Its file name and SHA-256.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.loaded.identity
    }

    /// What was found in the file.
    #[must_use]
    pub fn inspection(&self) -> &Inspection {
        &self.loaded.inspection
    }

    /// Its compiled code came from the cache.
    #[must_use]
    pub fn from_cache(&self) -> bool {
        self.loaded.origin == CodeOrigin::Cache
    }

    /// Where its compiled code came from.
    #[must_use]
    pub fn origin(&self) -> CodeOrigin {
        self.loaded.origin
    }

    /// It hands its state to a successor.
    #[must_use]
    pub fn has_state(&self) -> bool {
        self.loaded.state.is_some()
    }

    pub(crate) fn sandbox(&self) -> &Sandbox {
        &self.loaded.sandbox
    }

    pub(crate) fn name(&self) -> Arc<str> {
        Arc::clone(&self.loaded.name)
    }

    pub(crate) fn pre(&self) -> &InstancePre<Host> {
        &self.loaded.pre
    }

    pub(crate) fn indices(&self) -> &R::Indices {
        &self.loaded.indices
    }

    pub(crate) fn state(&self) -> Option<&state::GuestIndices> {
        self.loaded.state.as_ref()
    }
}

/// What calls and the ticker know of each other.
#[derive(Default)]
pub(crate) struct Pulse {
    started: AtomicU64,
    parked: AtomicBool,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Pulse {
    /// A call begins. Sequentially consistent, against [`Ticker::tick`]: either the call sees that the ticker parked and wakes
    /// it, or the ticker sees the call and stays.
    pub(crate) fn begin(&self) {
        self.started.fetch_add(1, SeqCst);
        if self.parked.load(SeqCst)
            && self.parked.swap(false, SeqCst)
            && let Some(wake) = self.wake.get()
        {
            wake();
        }
    }
}

/// What a ticker's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ticking {
    /// Tick again after its period.
    Busy,
    /// No call has started for so long that none can be running: sleep until woken.
    Park,
}

/// Lets time pass for calls with [`Budget::Time`].
pub struct Ticker {
    engine: Engine,
    pulse: Arc<Pulse>,
    seen: u64,
    idle: u64,
    idle_limit: u64,
}

impl Ticker {
    /// One period has passed.
    pub fn tick(&mut self) -> Ticking {
        self.engine.increment_epoch();
        if self.progressed() {
            return Ticking::Busy;
        }
        self.idle += 1;
        if self.idle < self.idle_limit {
            return Ticking::Busy;
        }
        self.pulse.parked.store(true, SeqCst);
        // A call may have begun between the look and the store; then it did not wake anybody.
        if self.progressed() {
            self.pulse.parked.store(false, SeqCst);
            return Ticking::Busy;
        }
        Ticking::Park
    }

    /// Calls started so far, over all components.
    #[must_use]
    pub fn calls_started(&self) -> u64 {
        self.pulse.started.load(SeqCst)
    }

    fn progressed(&mut self) -> bool {
        let started = self.calls_started();
        let progressed = started != self.seen;
        if progressed {
            (self.seen, self.idle) = (started, 0);
        }
        progressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ticker_parks_after_the_longest_call_and_is_woken_by_the_next() {
        let budget = Budget::Time { call_ticks: 4, open_ticks: 100 };
        let limits = Limits { instances: 1, ..Limits::default() };
        let sandbox = Sandbox::new(&SandboxConfig { budget, limits, cache: None, compiled: None }).unwrap();
        let woken = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&woken);
        let mut ticker = sandbox.ticker(Box::new(move || {
            count.fetch_add(1, SeqCst);
        }));
        sandbox.pulse().begin();
        let busy = (0..1000).take_while(|_| ticker.tick() == Ticking::Busy).count();
        assert_eq!(busy, 102, "one tick that saw the call, then the longest budget and two");
        assert_eq!(woken.load(SeqCst), 0);
        sandbox.pulse().begin();
        sandbox.pulse().begin();
        assert_eq!(woken.load(SeqCst), 1, "only the first call wakes it");
        assert_eq!(ticker.tick(), Ticking::Busy);
        assert_eq!(ticker.calls_started(), 3);
    }
}
