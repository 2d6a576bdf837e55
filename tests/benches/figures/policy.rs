//! Seats of policies for measuring, and what a trap costs.

use crate::report::Report;
use crate::{Failure, Plan, machine};
use dray::core::clock::Clock;
use dray::core::ticker::TickerThread;
use dray_policy::guard::{Guard, Limits as GuardLimits};
use dray_policy::native::NativeFactory;
use dray_policy::packed::REGION_BYTES;
use dray_policy::role::{Cdq, CdqQueue};
use dray_policy::seam::{Exchange, Meter, NamespaceInfo, Opening, Seat, Setup};
use dray_sandbox::{Budget, Limits, Pin, Sandbox, SandboxConfig};
use std::sync::{Arc, Mutex};

/// A trap costs this much memory to provoke: the component's list does not fit its limit.
const TOO_MUCH: usize = 4 << 20;
/// Memory of an instance here.
const MEMORY: usize = 2 << 20;
/// A vendor's queue type: the native policy answers it without a look at the entries.
const VENDOR: u8 = 0xc0;

/// What keeps a sandboxed seat going.
pub struct Kept {
    _ticker: TickerThread,
}

/// A guard around the default `cdq` component, as the appliance makes one, in place.
pub fn sandboxed(meter: Box<dyn Meter>, limits: Limits, guard: GuardLimits) -> Result<(Guard<Cdq>, Kept), Failure> {
    let path = machine::target_folder()?.join("plugins/cdq-default.wasm");
    let pin = Pin::find(None, &path).map_err(|error| format!("{error}; `cargo xtask bench` builds the policies"))?;
    // The clock of budgets runs as in the appliance; no call here comes near its end.
    let budget = Budget::Time { call_ticks: 200, open_ticks: 2_000 };
    let sandbox = Sandbox::new(&SandboxConfig { budget, limits, cache: None, compiled: None })?;
    let component = sandbox.load::<Cdq>(&path, &pin)?;
    let ticker = TickerThread::start(&sandbox)?;
    let guard = Guard::new(Box::new(component.factory()), native_factory(), meter, guard);
    Ok((guard, Kept { _ticker: ticker }))
}

/// A guard around the native policy.
pub fn native(meter: Box<dyn Meter>) -> Guard<Cdq> {
    Guard::new(native_factory(), native_factory(), meter, GuardLimits::default())
}

fn native_factory() -> Box<NativeFactory<Cdq>> {
    Box::new(NativeFactory::new())
}

/// What a seat is opened with.
pub fn opening(namespaces: Vec<NamespaceInfo>, regions: u32, queue: CdqQueue) -> Opening<Cdq> {
    let region_bytes = REGION_BYTES as u32;
    let setup = Setup { migration: 1, seed: 1, now_us: 0, namespaces, regions, region_bytes, settings: Vec::new() };
    Opening { setup, extra: queue }
}

/// All rows of this module.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    if plan.wants("policy.trap.recover") {
        let us = recover(plan)?;
        report.add("policy.trap.recover", us, "µs", "from the start of the call that traps, the native answer included");
    }
    Ok(())
}

/// A meter that remembers the moments at which the guard asked: before and after each sandboxed call.
#[derive(Clone)]
struct Moments {
    clock: Clock,
    asked: Arc<Mutex<Vec<u64>>>,
}

impl Meter for Moments {
    fn now_ns(&self) -> u64 {
        let now = self.clock.now().0;
        if let Ok(mut asked) = self.asked.lock() {
            asked.push(now);
        }
        now
    }
}

/// µs from a call that traps to the next that does not.
fn recover(plan: &Plan) -> Result<f64, Failure> {
    let moments = Moments { clock: Clock::new(), asked: Arc::default() };
    let limits = Limits { memory_bytes: MEMORY, instances: 4, ..Limits::default() };
    let patient = GuardLimits { max_faults: u64::MAX, ..GuardLimits::default() };
    let (mut guard, _kept) = sandboxed(Box::new(moments.clone()), limits, patient)?;
    let namespace = NamespaceInfo { nsid: 1, blocks: 1 << 18, block_bytes: 4096 };
    let queue = CdqQueue { id: 1, kind: VENDOR, cntlid: 2, slots: 1 << 20, entry_bytes: 32, phase_byte: 31, phase_mask: 1 };
    guard.open(opening(vec![namespace], 1, queue));
    let traps = if plan.quick { 20 } else { 500 };
    let mut exchange = Box::<Exchange<Cdq>>::default();
    exchange.request.entries.reserve(TOO_MUCH);
    let mut samples = Vec::with_capacity(traps);
    for _ in 0..traps {
        if let Ok(mut asked) = moments.asked.lock() {
            asked.clear();
        }
        for (bytes, traps) in [(TOO_MUCH, true), (32, false)] {
            exchange.request.entries.resize(bytes, 0);
            guard.ask(exchange);
            exchange = guard.poll().ok_or("a guard did not answer")?;
            if exchange.outcome.by_fallback != traps {
                return Err(format!("a call with {bytes} bytes of entries: {:?}", exchange.outcome).into());
            }
        }
        let asked = moments.asked.lock().map_err(|_| "the meter broke")?;
        // Begin and end of the call that traps, begin and end of the next.
        let &[begin, _, again, _] = asked.as_slice() else { return Err(format!("{} calls were metered", asked.len() / 2).into()) };
        samples.push((again - begin) as f64 / 1e3);
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[samples.len() / 2])
}
