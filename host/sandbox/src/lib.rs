//! The sandbox behind the policy seam: WebAssembly components that decide, kept where they can do no harm.
//!
//! A component exports one role of `wit/0.1` (`cdq`, `tracking` or `copy`, and `state` if it keeps any) and imports nothing but
//! `dray:policy/host`. [`Sandbox`] holds the engine and its limits, all of them fixed at start; [`Sandbox::load`] checks a
//! component (pin, role, version, imports) and compiles it, or takes the compiled code from the [cache](cache::Cache) or from a
//! folder of code that was compiled ahead of time ([`compile_ahead`]);
//! [`SandboxFactory`] opens instances of it from the pool, so that `dray_policy`'s guard can ask it like a native policy.
//!
//! Each call has a budget ([`Budget`]): time by epoch interruption where a clock exists, fuel where the same seed must end at
//! the same instruction. Whatever a component does, the host sees a [`Fault`](dray_policy::seam::Fault) and goes on.
//!
//! No thread, clock or randomness here: the appliance runs [`Ticker::tick`] on a thread of its own, and runs
//! [`Sandbox::load`], which blocks while it compiles, as a job.
//!
//! Not here: the fallback to the native policy, setting aside and swapping (`dray_policy::guard`); 64-bit memories, threads,
//! WASI and asynchronous calls, none of which a policy needs.
//!
//! Start reading at [`Sandbox`], then [`SandboxFactory`]; [`inspect()`] says what a file is without compiling it.

mod bindings;
pub mod cache;
mod engine;
mod error;
mod inspect;
mod instance;
mod log;
mod pin;
mod role;

pub use cache::Cpu;
pub use engine::{Budget, CodeOrigin, Component, Limits, Sandbox, SandboxConfig, Ticker, Ticking, compile_ahead};
pub use error::LoadError;
pub use inspect::{Import, Inspection, POLICY_VERSION, inspect};
pub use instance::SandboxFactory;
pub use pin::{Digest, LOCK_FILE, LockFile, Pin};
pub use role::SandboxRole;
