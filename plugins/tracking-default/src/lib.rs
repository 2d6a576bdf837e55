//! The default `tracking` policy: small chunks where little is dirty, large ones where much is; and what changes again faster
//! than a round takes waits until the end.
//!
//! Start reading at [`plan`]; here is only what ties it to the interface. Settings: `chunk-min-kib`, `chunk-max-kib`, and `hold-us`,
//! how much downtime may be spent on regions that were held. It keeps no state: the counters of the regions say it all.
#![cfg_attr(target_arch = "wasm32", no_std)]
extern crate alloc;

pub mod plan;

use alloc::{string::String, vec::Vec};
use dray_policy_sdk::State;
use exports::dray::policy::tracking::{Guest, Round, Setup};
use plan::Plan;

dray_policy_sdk::policy!("tracking-policy", Component);

static POLICY: State<Plan> = State::empty();
struct Component;

impl Guest for Component {
    fn open(setup: Setup) -> Result<(), String> {
        POLICY.set(Plan::new(&setup)?);
        Ok(())
    }

    fn plan(_now_us: u64, last: Option<Round>, regions: Vec<u8>) -> Vec<u8> {
        POLICY.with(|plan| plan.round(last.as_ref(), &regions))
    }
}
