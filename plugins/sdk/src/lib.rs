//! What a policy needs besides its decision: the bindings of `wit/0.1`, typed views of the packed records, an allocator and
//! a panic handler.
//!
//! Start with [`policy!`], then read [`packed`]. A policy crate is `crate-type = ["cdylib"]` and nothing more (beside an `rlib`
//! cargo ignores `lto`, and the views of [`packed`] become calls), has `#![cfg_attr(target_arch = "wasm32", no_std)]` at its
//! top, and is built by `cargo xtask plugins`; its decision is plain Rust that `cargo test` runs on the host.
//!
//! What it does not do: no clock, no randomness, no files. Time and the seed come with each call (`setup.seed`, `now-us`).
#![no_std]

pub mod packed;
pub mod settings;
mod state;
pub use state::State;

#[doc(hidden)]
pub use wit_bindgen;

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod runtime;

/// Generates the bindings of one world of `wit/0.1` and everything a component needs to run. To be called once, at the
/// crate's root.
///
/// The first argument is the world (`"cdq-policy"`, `"tracking-policy"`, `"copy-policy"`, each also with `-with-state`), the
/// second the type that implements the generated `Guest` traits. Generated are `exports::dray::policy::cdq` (or `tracking`,
/// `copy`, and `state`) with the role's records and its `Guest` trait, and `dray::policy::host::log`. On the host only the
/// types are generated: nothing is exported, and `log` must not be called (use [`log!`], which then does nothing).
///
/// ```ignore
/// dray_policy_sdk::policy!("cdq-policy", Component);
/// use exports::dray::policy::cdq::{Drained, Guest, Queue, Setup};
///
/// /// What is generated calls functions without `self`: the instance's policy lies in a static.
/// static POLICY: State<Mine> = State::empty();
/// struct Component;
///
/// impl Guest for Component {
///     fn open(setup: Setup, queue: Queue) -> Result<(), String> {
///         POLICY.set(Mine::new(setup, queue));
///         Ok(())
///     }
///     fn drain(now_us: u64, entries: Vec<u8>, waiting: u32) -> Drained {
///         POLICY.with(|mine| mine.drain(now_us, &entries, waiting))
///     }
/// }
/// ```
#[macro_export]
macro_rules! policy {
    ($world:tt, $policy:ident) => {
        // Generated code without comments: kept in a module that nobody sees.
        #[allow(missing_docs, unsafe_code, unused)]
        mod bindings {
            $crate::wit_bindgen::generate!({
                path: "../../wit/0.1",
                world: $world,
                runtime_path: "::dray_policy_sdk::wit_bindgen::rt",
                bitflags_path: "::dray_policy_sdk::wit_bindgen::rt::bitflags",
            });
            #[cfg(target_arch = "wasm32")]
            use super::$policy;
            #[cfg(target_arch = "wasm32")]
            export!($policy);
        }
        #[allow(unused)]
        use bindings::{dray, exports};

        /// Says where the policy stopped, then traps: the host answers from its built-in policy and opens a new instance.
        #[cfg(target_arch = "wasm32")]
        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo) -> ! {
            let line = $crate::runtime::Line::of(info);
            dray::policy::host::log(dray::policy::host::Level::Warn, line.text());
            core::arch::wasm32::unreachable()
        }
    };
}

/// A line in the host's log (rate-limited, cut at 1 KiB): `log!(Info, "held {n} regions")`. On the host, where unit tests
/// run, its arguments are checked and nothing is written.
#[allow(clippy::crate_in_macro_def, reason = "the bindings lie in the policy's crate")]
#[macro_export]
macro_rules! log {
    ($level:ident, $($format:tt)+) => {{
        #[cfg(target_arch = "wasm32")]
        crate::dray::policy::host::log(crate::dray::policy::host::Level::$level, &$crate::runtime::format!($($format)+));
        #[cfg(not(target_arch = "wasm32"))]
        let _ = (crate::dray::policy::host::Level::$level, core::format_args!($($format)+));
    }};
}
