//! Between a caller and a policy: every answer is checked, and there always is one.
//!
//! A fault (trap, deadline, malformed answer) is answered by the native policy for that call; a new instance is opened with the
//! same set-up and the last saved state; a policy that faults too often is set aside until the next migration. A new version is
//! tried on the last recorded request before it takes over ([`Trial`]).
//!
//! The guard answers in place: [`Seat::ask`] computes, [`Seat::poll`] hands over. Where policies run beside the polling core, the
//! appliance puts a thread and two queues around a guard.

mod swap;

pub use swap::{Candidate, SwapRefused, Trial};

use crate::role::Role;
use crate::seam::{Exchange, Factory, Fault, Identity, MAX_STATE_BYTES, Meter, Opening, Outcome, Policy, Seat, SeatStats};

/// When a guard gives up on a policy, and how often it asks for its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Faults within one migration after which the policy is set aside.
    pub max_faults: u64,
    /// Calls between two savings of state.
    pub save_every: u64,
    /// Calls between two recordings of a request.
    pub record_every: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_faults: 8, save_every: 16, record_every: 16 }
    }
}

/// A seat that answers in place and never without an answer.
pub struct Guard<R: Role> {
    primary: Box<dyn Factory<R>>,
    fallback: Box<dyn Factory<R>>,
    meter: Box<dyn Meter>,
    limits: Limits,
    opening: Option<Opening<R>>,
    instance: Option<Box<dyn Policy<R>>>,
    native: Option<Box<dyn Policy<R>>>,
    saved: Saved,
    recorded: R::Request,
    has_record: bool,
    answered: Option<Box<Exchange<R>>>,
    /// Faults of the present primary in this migration.
    faults: u64,
    /// Calls in this migration.
    calls: u64,
    stats: SeatStats,
}

/// The last saved state of the primary policy.
#[derive(Default)]
struct Saved {
    bytes: Option<Vec<u8>>,
    /// The policy said that it keeps none.
    never: bool,
    /// The present instance started from it and has not answered yet: if it faults, the state may be why.
    on_trial: bool,
}

impl<R: Role> Guard<R> {
    /// A guard around `primary`, with `fallback` for the calls that it does not answer.
    #[must_use]
    pub fn new(primary: Box<dyn Factory<R>>, fallback: Box<dyn Factory<R>>, meter: Box<dyn Meter>, limits: Limits) -> Self {
        Self {
            primary,
            fallback,
            meter,
            limits,
            opening: None,
            instance: None,
            native: None,
            saved: Saved::default(),
            recorded: R::Request::default(),
            has_record: false,
            answered: None,
            faults: 0,
            calls: 0,
            stats: SeatStats::default(),
        }
    }

    /// Answers a request by the primary policy, else by the native one, else by the plainest answer that is valid.
    fn answer(&mut self, exchange: &mut Exchange<R>) {
        self.calls += 1;
        self.stats.calls += 1;
        exchange.outcome = Outcome::default();
        R::clear(&mut exchange.answer);
        let Some(opening) = self.opening.take() else {
            exchange.outcome.fault = Some(Fault::Refused("asked before it was opened".to_owned()));
            exchange.outcome.by_fallback = true;
            return R::safe(&exchange.request, &mut exchange.answer);
        };
        self.stats.items += R::items(&opening.extra, &exchange.request);
        if self.calls % self.limits.record_every.max(1) == 1 || self.limits.record_every <= 1 {
            R::record(&opening.extra, &exchange.request, &mut self.recorded);
            self.has_record = true;
        }
        if self.instance.is_none() {
            self.reopen(&opening);
        }
        let served = self.ask_primary(&opening, exchange);
        if !served {
            self.ask_native(&opening, exchange);
            self.reopen(&opening);
        }
        self.opening = Some(opening);
    }

    /// True if the primary policy gave a valid answer.
    fn ask_primary(&mut self, opening: &Opening<R>, exchange: &mut Exchange<R>) -> bool {
        let Some(instance) = &mut self.instance else { return false };
        let begin = self.meter.now_ns();
        let result = instance.call(&exchange.request, &mut exchange.answer);
        exchange.outcome.took_ns = self.meter.now_ns().saturating_sub(begin);
        self.stats.busy_ns += exchange.outcome.took_ns;
        match result.and_then(|()| R::check(&opening.setup, &opening.extra, &exchange.request, &exchange.answer)) {
            Ok(()) => {
                self.saved.on_trial = false;
                if self.calls.is_multiple_of(self.limits.save_every.max(1)) {
                    self.save();
                }
                true
            }
            Err(fault) => {
                self.fault(&fault);
                exchange.outcome.fault = Some(fault);
                false
            }
        }
    }

    fn ask_native(&mut self, opening: &Opening<R>, exchange: &mut Exchange<R>) {
        self.stats.fallbacks += 1;
        exchange.outcome.by_fallback = true;
        R::clear(&mut exchange.answer);
        let called = match &mut self.native {
            Some(native) => native.call(&exchange.request, &mut exchange.answer),
            None => Err(Fault::Refused("no native policy".to_owned())),
        };
        let valid = called.and_then(|()| R::check(&opening.setup, &opening.extra, &exchange.request, &exchange.answer));
        if let Err(fault) = valid {
            tracing::warn!(role = R::NAME, %fault, "the native policy failed; the plainest answer is taken");
            self.native = open_native(self.fallback.as_mut(), opening);
            R::safe(&exchange.request, &mut exchange.answer);
        }
    }

    /// Counts a fault and drops the instance; sets the policy aside when there were too many.
    fn fault(&mut self, fault: &Fault) {
        self.instance = None;
        if self.saved.on_trial {
            self.saved = Saved::default();
        }
        self.faults += 1;
        self.stats.faults += 1;
        self.stats.last_fault = Some(fault.to_string());
        let component = &self.primary.identity().component;
        tracing::warn!(role = R::NAME, component, %fault, faults = self.faults, "policy fault");
        if self.faults >= self.limits.max_faults.max(1) && !self.stats.set_aside {
            self.stats.set_aside = true;
            tracing::warn!(role = R::NAME, component, faults = self.faults, "policy set aside, the native one serves");
        }
    }

    /// Opens an instance of the primary policy, unless it has been set aside.
    fn reopen(&mut self, opening: &Opening<R>) {
        if self.instance.is_some() || self.stats.set_aside {
            return;
        }
        match self.primary.open(opening, self.saved.bytes.as_deref()) {
            Ok(instance) => {
                self.instance = Some(instance);
                self.saved.on_trial = self.saved.bytes.is_some();
            }
            Err(fault) => self.fault(&fault),
        }
    }

    /// Takes the state of the instance, if the policy keeps any.
    fn save(&mut self) {
        let Some(instance) = &mut self.instance else { return };
        if self.saved.never {
            return;
        }
        match instance.save() {
            Ok(Some(bytes)) if bytes.len() <= MAX_STATE_BYTES => self.saved.bytes = Some(bytes),
            Ok(Some(bytes)) => {
                let fault = Fault::Malformed(format!("{} bytes of state, at most {MAX_STATE_BYTES}", bytes.len()));
                self.fault(&fault);
            }
            Ok(None) => self.saved.never = true,
            Err(fault) => self.fault(&fault),
        }
    }
}

/// The native policy with the set-up's settings, or without where they are a component's own.
fn open_native<R: Role>(factory: &mut dyn Factory<R>, opening: &Opening<R>) -> Option<Box<dyn Policy<R>>> {
    factory.open(opening, None).ok().or_else(|| {
        let mut plain = opening.clone();
        plain.setup.settings.clear();
        factory.open(&plain, None).ok()
    })
}

impl<R: Role> Seat<R> for Guard<R> {
    fn identity(&self) -> Identity {
        if self.stats.set_aside { self.fallback.identity().clone() } else { self.primary.identity().clone() }
    }

    fn open(&mut self, mut opening: Opening<R>) {
        opening.setup.namespaces.sort_unstable_by_key(|namespace| namespace.nsid);
        self.saved = Saved::default();
        self.has_record = false;
        self.answered = None;
        self.faults = 0;
        self.calls = 0;
        self.stats.set_aside = false;
        self.instance = None;
        self.native = open_native(self.fallback.as_mut(), &opening);
        self.reopen(&opening);
        self.opening = Some(opening);
    }

    fn ask(&mut self, mut exchange: Box<Exchange<R>>) {
        self.answer(&mut exchange);
        self.answered = Some(exchange);
    }

    fn poll(&mut self) -> Option<Box<Exchange<R>>> {
        self.answered.take()
    }

    fn stats(&self) -> SeatStats {
        self.stats.clone()
    }
}

impl<R: Role> core::fmt::Debug for Guard<R> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Guard").field("role", &R::NAME).field("primary", self.primary.identity()).field("stats", &self.stats).finish()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
