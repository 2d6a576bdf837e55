//! Components made from WebAssembly text, and sandboxes to run them in.
#![allow(dead_code, unused_imports, reason = "each test binary uses its own part")]

mod text;

use dray_policy::role::{Cdq, CdqAnswer, CdqQueue, CdqRequest};
use dray_policy::seam::{Factory, Fault, NamespaceInfo, Opening, Policy, Setup};
use dray_sandbox::{Budget, Component, Digest, Limits, LoadError, Pin, Sandbox, SandboxConfig, Ticking};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use text::*;

/// Time as the appliance gives it, generous for a loaded machine.
pub const TIME: Budget = Budget::Time { call_ticks: 20, open_ticks: 200 };
/// Fuel as the simulator gives it.
pub const FUEL: Budget = Budget::Fuel { call_units: 20_000_000, open_units: 20_000_000 };

/// A sandbox for so many instances at once, without a cache.
pub fn pool(budget: Budget, instances: u32) -> Sandbox {
    let limits = Limits { instances, ..Limits::default() };
    Sandbox::new(&SandboxConfig { budget, limits, cache: None, compiled: None }).expect("an engine")
}

/// A sandbox for four instances at once.
pub fn sandbox(budget: Budget) -> Sandbox {
    pool(budget, 4)
}

/// A ticker's thread for as long as this lives.
pub struct Ticks {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ticks {
    /// Ticks every half millisecond.
    pub fn start(sandbox: &Sandbox) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, sandbox) = (Arc::clone(&stop), sandbox.clone());
        let thread = thread::spawn(move || {
            let me = thread::current();
            let mut ticker = sandbox.ticker(Box::new(move || me.unpark()));
            while !stopped.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(500));
                if ticker.tick() == Ticking::Park {
                    // The time-out is for the end of the test alone.
                    thread::park_timeout(Duration::from_millis(100));
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One namespace of 1 GiB in 4 KiB blocks, and the queue of the specification's own format.
pub fn opening() -> Opening<Cdq> {
    Opening {
        setup: Setup {
            migration: 1,
            seed: 42,
            now_us: 0,
            namespaces: vec![NamespaceInfo { nsid: 1, blocks: 1 << 18, block_bytes: 4096 }],
            regions: 16,
            region_bytes: 32,
            settings: vec![("a".into(), "b".into())],
        },
        extra: CdqQueue { id: 1, kind: 0, cntlid: 2, slots: 1024, entry_bytes: 32, phase_byte: 31, phase_mask: 1 },
    }
}

/// Loads a `cdq` component under its own hash.
pub fn load(sandbox: &Sandbox, bytes: &[u8]) -> Result<Component<Cdq>, LoadError> {
    sandbox.load_bytes("test.wasm", bytes, &Pin::Sha256(Digest::of(bytes)))
}

/// Loads and opens it.
pub fn open(sandbox: &Sandbox, bytes: &[u8]) -> Box<dyn Policy<Cdq>> {
    let component = load(sandbox, bytes).unwrap_or_else(|error| panic!("{error}"));
    component.factory().open(&opening(), None).unwrap_or_else(|fault| panic!("{fault}"))
}

/// A batch of entries full of zeroes.
pub fn request(entries: usize) -> CdqRequest {
    CdqRequest { now_us: 1000, entries: vec![0; entries * 32], waiting: 0 }
}

/// Asks once.
pub fn ask(policy: &mut dyn Policy<Cdq>, entries: usize) -> Result<CdqAnswer, Fault> {
    let mut answer = CdqAnswer::default();
    policy.call(&request(entries), &mut answer).map(|()| answer)
}

/// A folder for one test, below the build's own.
pub fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    folder
}
