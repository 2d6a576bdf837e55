//! The default `cdq` policy: merges neighbouring changes, gives every entry back, looks again soon.
//!
//! Start reading at [`drain`]; here is only what ties it to the interface. Settings: `batch-wait-us` and `batch-entries`, when to
//! look again: whichever comes first. It keeps no state: every batch is answered from its entries alone.
#![cfg_attr(target_arch = "wasm32", no_std)]
extern crate alloc;

pub mod drain;

use alloc::{string::String, vec::Vec};
use drain::Drain;
use dray_policy_sdk::State;
use exports::dray::policy::cdq::{Drained, Guest, Queue, Setup};

dray_policy_sdk::policy!("cdq-policy", Component);

static POLICY: State<Drain> = State::empty();
struct Component;

impl Guest for Component {
    fn open(setup: Setup, queue: Queue) -> Result<(), String> {
        POLICY.set(Drain::new(&setup, &queue)?);
        Ok(())
    }

    fn drain(_now_us: u64, entries: Vec<u8>, waiting: u32) -> Drained {
        POLICY.with(|drain| drain.answer(&entries, waiting))
    }
}
