//! Components made from WebAssembly text, and sandboxes to run them in.
#![allow(dead_code, reason = "each test binary uses its own part")]

use dray_policy::role::{Cdq, CdqAnswer, CdqQueue, CdqRequest};
use dray_policy::seam::{Factory, Fault, NamespaceInfo, Opening, Policy, Setup};
use dray_sandbox::{Budget, Component, Digest, Limits, LoadError, Pin, Sandbox, SandboxConfig, Ticking};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// The interface as published.
pub const WIT: &str = include_str!("../../../../wit/0.1/policy.wit");

/// Encodes a core module in text form as a component of a world of `wit`.
pub fn encode(wit: &str, world: &str, core: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let package = resolve.push_str("policy.wit", wit).expect("WIT text");
    let world = resolve.select_world(&[package], Some(world)).expect("a world of it");
    let mut module = wat::parse_str(core).unwrap_or_else(|error| panic!("{error}\n{core}"));
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8, false).expect("metadata");
    let mut encoder = ComponentEncoder::default();
    encoder.validate(true).module(&module).expect("a module").encode().unwrap_or_else(|error| panic!("{error:?}"))
}

/// A drain that returns no ranges and gives everything back.
pub const HONEST: &str = "(call $answer (i32.const 0) (i32.const 0) (i32.div_u (local.get $length) (i32.const 32)))";

/// A core module of the `cdq` role: `drain` is the body of `drain` (parameters `$now $entries $length $waiting`), `more` stands
/// beside the functions.
pub fn cdq_core(drain: &str, more: &str) -> String {
    format!(
        r#"(module
  (import "dray:policy/host@0.1.0" "log" (func $log (param i32 i32 i32)))
  (memory (export "memory") 2)
  (global $top (mut i32) (i32.const 4096))
  (global $count (mut i32) (i32.const 0))
  (data (i32.const 256) "a line\n")
  (func (export "cabi_realloc") (param $old i32) (param $had i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $top) (i32.const 15)) (i32.const -16)))
    (global.set $top (i32.add (local.get $at) (local.get $size)))
    (local.get $at))
  ;; a `drained` at 64: list, consumed, no marks, no waits
  (func $answer (param $list i32) (param $length i32) (param $consumed i32) (result i32)
    (i32.store (i32.const 64) (local.get $list))
    (i32.store (i32.const 68) (local.get $length))
    (i32.store (i32.const 72) (local.get $consumed))
    (i64.store (i32.const 76) (i64.const 0))
    (i32.store (i32.const 84) (i32.const 0))
    (global.set $top (i32.const 4096))
    (i32.const 64))
  (func (export "dray:policy/cdq@0.1.0#open")
    (param i64 i64 i64 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
    (global.set $top (i32.const 4096))
    (i32.store8 (i32.const 16) (i32.const 0))
    (i32.const 16))
  (func $drain (export "dray:policy/cdq@0.1.0#drain")
    (param $now i64) (param $entries i32) (param $length i32) (param $waiting i32) (result i32)
    {drain})
  {more})"#
    )
}

/// The component of [`cdq_core`].
pub fn cdq(drain: &str, more: &str) -> Vec<u8> {
    encode(WIT, "cdq-policy", &cdq_core(drain, more))
}

/// A `cdq` component that keeps state: `save` hands over one byte, `load` has the body given (parameters `$bytes $length`).
pub fn with_state(load: &str) -> Vec<u8> {
    let more = format!(
        r#"(func (export "dray:policy/state@0.1.0#save") (result i32)
            (i32.store (i32.const 32) (i32.const 512)) (i32.store (i32.const 36) (i32.const 1))
            (i32.store8 (i32.const 512) (global.get $count)) (i32.const 32))
          (func (export "dray:policy/state@0.1.0#load") (param $bytes i32) (param $length i32) (result i32) {load})"#
    );
    // Each answer says how many calls there were: it gives that many entries back.
    let drain = "(global.set $count (i32.add (global.get $count) (i32.const 1)))
        (call $answer (i32.const 0) (i32.const 0) (global.get $count))";
    encode(WIT, "cdq-policy-with-state", &cdq_core(drain, &more))
}

/// Time as the appliance gives it, generous for a loaded machine.
pub const TIME: Budget = Budget::Time { call_ticks: 20, open_ticks: 200 };
/// Fuel as the simulator gives it.
pub const FUEL: Budget = Budget::Fuel { call_units: 20_000_000, open_units: 20_000_000 };

/// A sandbox for so many instances at once, without a cache.
pub fn pool(budget: Budget, instances: u32) -> Sandbox {
    Sandbox::new(&SandboxConfig { budget, limits: Limits { instances, ..Limits::default() }, cache: None }).expect("an engine")
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
