//! Instances: opened from the pool, asked under a budget, dropped after a fault.

use crate::bindings::state;
use crate::engine::{Budget, Component, Sandbox};
use crate::log::Gate;
use crate::role::{SandboxRole, check_length};
use dray_policy::seam::{Factory, Fault, Identity, MAX_STATE_BYTES, Opening, Policy};
use std::sync::Arc;
use wasmtime::{ResourceLimiter, Store, Trap};

/// Least bytes that one crossing may bring to the host; a log line of that length is cut, a longer one is a fault.
const CROSSING_BYTES: usize = 1 << 20;
/// Most elements of a table.
pub(crate) const TABLE_ELEMENTS: usize = 20_000;
/// Longest reason of a fault in bytes: it comes from the component.
const MAX_REASON_BYTES: usize = 512;

/// What belongs to the host in an instance's store.
#[derive(Debug)]
pub struct Host {
    /// The component's file name, for the log.
    pub(crate) component: Arc<str>,
    pub(crate) log: Gate,
    memory_bytes: usize,
    /// Memory was asked for beyond the limit during the call that runs.
    denied: bool,
}

impl ResourceLimiter for Host {
    fn memory_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        self.denied |= desired > self.memory_bytes;
        Ok(desired <= self.memory_bytes)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS)
    }
}

/// One store of the pool with the component's functions in it.
struct Seatless<R: SandboxRole> {
    store: Store<Host>,
    guest: R::Guest,
    state: Option<state::Guest>,
}

/// Opens instances of one component: a [`Factory`] for `dray_policy`'s guard.
pub struct SandboxFactory<R: SandboxRole> {
    component: Component<R>,
}

impl<R: SandboxRole> SandboxFactory<R> {
    /// A factory of instances of `component`.
    #[must_use]
    pub fn new(component: Component<R>) -> Self {
        Self { component }
    }
}

impl<R: SandboxRole> Factory<R> for SandboxFactory<R> {
    fn identity(&self) -> &Identity {
        self.component.identity()
    }

    fn open(&mut self, opening: &Opening<R>, saved: Option<&[u8]>) -> Result<Box<dyn Policy<R>>, Fault> {
        let mut instance = Instance::open(&self.component, opening)?;
        let Some(saved) = saved.filter(|_| self.component.has_state()) else { return Ok(Box::new(instance)) };
        let why = match instance.load(saved) {
            Ok(Ok(())) => return Ok(Box::new(instance)),
            Ok(Err(reason)) => reason,
            // State that breaks every successor must not keep them from opening.
            Err(fault) => fault.to_string(),
        };
        tracing::warn!(target: "dray::policy", component = %self.identity().component, why, "saved state not taken; starts fresh");
        // Whatever the refused bytes left behind goes with the instance, and its place in the pool is free for the next.
        drop(instance);
        Ok(Box::new(Instance::open(&self.component, opening)?))
    }
}

/// Instantiates once, so that a component that cannot start is refused at load.
pub(crate) fn probe<R: SandboxRole>(component: &Component<R>) -> Result<(), String> {
    enter(component, 0).map(drop).map_err(|fault| fault.to_string())
}

fn enter<R: SandboxRole>(component: &Component<R>, now_us: u64) -> Result<Seatless<R>, Fault> {
    let sandbox = component.sandbox();
    let host = Host {
        component: component.name(),
        log: Gate::new(now_us),
        memory_bytes: sandbox.limits().memory_bytes,
        denied: false,
    };
    let mut store = Store::new(sandbox.engine(), host);
    store.limiter(|host| host);
    store.set_hostcall_fuel(CROSSING_BYTES);
    arm(sandbox, &mut store, Step::Open);
    let built = component.pre().instantiate(&mut store).and_then(|instance| {
        let guest = R::guest(component.indices(), &mut store, &instance)?;
        let state = component.state().map(|indices| indices.load(&mut store, &instance)).transpose()?;
        Ok((guest, state))
    });
    match built {
        Ok((guest, state)) => Ok(Seatless { store, guest, state }),
        Err(error) => Err(fault(&error, store.data())),
    }
}

/// A live instance.
struct Instance<R: SandboxRole> {
    sandbox: Sandbox,
    extra: R::Extra,
    seatless: Seatless<R>,
}

/// Which budget a call has.
#[derive(Clone, Copy)]
enum Step {
    Open,
    Call,
}

/// Sets the budget of the call that follows, and says to the ticker that one begins.
fn arm(sandbox: &Sandbox, store: &mut Store<Host>, step: Step) {
    store.data_mut().denied = false;
    match sandbox.budget() {
        Budget::Time { call_ticks, open_ticks } => {
            sandbox.pulse().begin();
            store.set_epoch_deadline(match step {
                Step::Open => open_ticks,
                Step::Call => call_ticks,
            });
        }
        Budget::Fuel { call_units, open_units } => {
            let units = match step {
                Step::Open => open_units,
                Step::Call => call_units,
            };
            // It fails only for an engine without fuel, which this budget is not.
            let _ = store.set_fuel(units);
        }
    }
}

/// What went wrong inside, as the policy seam names it.
fn fault(error: &wasmtime::Error, host: &Host) -> Fault {
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt | Trap::OutOfFuel) => Fault::Deadline,
        _ if host.denied => Fault::Memory,
        Some(trap) => Fault::Trap(trap.to_string()),
        None if error.is::<wasmtime::PoolConcurrencyLimitError>() => {
            Fault::Trap("no instance is left in the sandbox's pool".into())
        }
        // Everything else is the canonical ABI's: pointers out of bounds, text that is not UTF-8, unknown enum values, too much.
        None => Fault::Malformed(shorten(&format!("{error:#}"))),
    }
}

fn shorten(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_REASON_BYTES);
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl<R: SandboxRole> Instance<R> {
    fn open(component: &Component<R>, opening: &Opening<R>) -> Result<Self, Fault> {
        let mut seatless = enter(component, opening.setup.now_us)?;
        arm(component.sandbox(), &mut seatless.store, Step::Open);
        match R::open(&seatless.guest, &mut seatless.store, opening) {
            Ok(Ok(())) => Ok(Self { sandbox: component.sandbox().clone(), extra: opening.extra.clone(), seatless }),
            Ok(Err(reason)) => Err(Fault::Refused(shorten(&reason))),
            Err(error) => Err(fault(&error, seatless.store.data())),
        }
    }

    /// Hands the state of an earlier instance over.
    fn load(&mut self, saved: &[u8]) -> Result<Result<(), String>, Fault> {
        let Seatless { store, state, .. } = &mut self.seatless;
        let Some(state) = state else { return Ok(Ok(())) };
        arm(&self.sandbox, store, Step::Open);
        let loaded = state.call_load(&mut *store, saved).map_err(|error| fault(&error, store.data()))?;
        Ok(loaded.map_err(|reason| shorten(&reason)))
    }
}

impl<R: SandboxRole> Policy<R> for Instance<R> {
    fn call(&mut self, request: &R::Request, answer: &mut R::Answer) -> Result<(), Fault> {
        let Seatless { store, guest, .. } = &mut self.seatless;
        let items = R::items(&self.extra, request);
        arm(&self.sandbox, store, Step::Call);
        store.data_mut().log.advance(R::now_us(request));
        // wasmtime holds lists against this before it allocates for them.
        store.set_hostcall_fuel(R::bound(items).max(CROSSING_BYTES));
        R::call(guest, store, request, answer).map_err(|error| fault(&error, store.data()))?;
        check_length::<R>(items, answer)
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        let Seatless { store, state, .. } = &mut self.seatless;
        let Some(state) = state else { return Ok(None) };
        arm(&self.sandbox, store, Step::Call);
        store.set_hostcall_fuel(CROSSING_BYTES);
        let saved = state.call_save(&mut *store).map_err(|error| fault(&error, store.data()))?;
        if saved.len() > MAX_STATE_BYTES {
            return Err(Fault::Malformed(format!("saved state of {} bytes is more than {MAX_STATE_BYTES}", saved.len())));
        }
        Ok(Some(saved))
    }
}
