//! A new version takes over between two calls, once it has shown on the last recorded request that it can.
//!
//! [`Guard::trial`] hands out what a trial needs; [`Trial::run`] may take its time, on another thread; [`Guard::take_over`] opens
//! the instance that serves, with the state that the old one saves at that moment. Until then the old one serves.

use super::{Guard, Saved};
use crate::role::Role;
use crate::seam::{Factory, Fault, MAX_STATE_BYTES, Opening, Policy, Seat};

/// Why a new version may not take over. The old one goes on serving.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SwapRefused {
    /// There is no migration that the policy is open for.
    #[error("no migration is open")]
    NotOpen,
    /// A request is under way.
    #[error("a request is under way; take over between two calls")]
    Busy,
    /// The new version did not open, or answered the recorded request with a fault.
    #[error("the new version faulted: {0}")]
    Fault(Fault),
    /// The new version left out what the recorded request named.
    #[error("the new version left something out: {0}")]
    Omission(String),
    /// The trial was for another migration than the one that is open now.
    #[error("the trial was made for another migration")]
    Stale,
}

/// What a new version is tried on.
#[derive(Debug)]
pub struct Trial<R: Role> {
    opening: Opening<R>,
    request: Option<R::Request>,
    saved: Option<Vec<u8>>,
}

/// A new version that has passed its trial.
pub struct Candidate<R: Role> {
    factory: Box<dyn Factory<R>>,
    migration: u64,
}

impl<R: Role> core::fmt::Debug for Candidate<R> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Candidate").field("identity", self.factory.identity()).field("migration", &self.migration).finish()
    }
}

impl<R: Role> Trial<R> {
    /// Opens the new version with the present set-up and state and lets it answer the recorded request.
    ///
    /// # Errors
    /// [`SwapRefused::Fault`] or [`SwapRefused::Omission`].
    pub fn run(self, mut factory: Box<dyn Factory<R>>) -> Result<Candidate<R>, SwapRefused> {
        let Opening { setup, extra } = &self.opening;
        let mut instance = factory.open(&self.opening, self.saved.as_deref()).map_err(SwapRefused::Fault)?;
        if let Some(request) = &self.request {
            let mut answer = R::Answer::default();
            R::clear(&mut answer);
            let valid = instance.call(request, &mut answer).and_then(|()| R::check(setup, extra, request, &answer));
            valid.map_err(SwapRefused::Fault)?;
            if let Some(what) = R::omission(setup, extra, request, &answer) {
                return Err(SwapRefused::Omission(what));
            }
        }
        Ok(Candidate { factory, migration: setup.migration })
    }
}

impl<R: Role> Guard<R> {
    /// What a new version is to be tried on; a value that may leave the polling core.
    ///
    /// # Errors
    /// [`SwapRefused::NotOpen`] without a migration.
    pub fn trial(&self) -> Result<Trial<R>, SwapRefused> {
        let opening = self.opening.clone().ok_or(SwapRefused::NotOpen)?;
        let request = self.has_record.then(|| {
            let mut request = R::Request::default();
            R::record(&opening.extra, &self.recorded, &mut request);
            request
        });
        Ok(Trial { opening, request, saved: self.saved.bytes.clone() })
    }

    /// Lets a new version take over, with the state that the old one saves now. Its faults are counted from nought.
    ///
    /// # Errors
    /// A [`SwapRefused`]; the old version goes on serving as if nothing had been.
    pub fn take_over(&mut self, candidate: Candidate<R>) -> Result<(), SwapRefused> {
        let Candidate { mut factory, migration } = candidate;
        let opening = self.opening.as_ref().ok_or(SwapRefused::NotOpen)?;
        if opening.setup.migration != migration {
            return Err(SwapRefused::Stale);
        }
        if self.answered.is_some() {
            return Err(SwapRefused::Busy);
        }
        let bytes = state_now(self.instance.as_deref_mut(), self.saved.bytes.as_deref());
        let instance = factory.open(opening, bytes.as_deref()).map_err(SwapRefused::Fault)?;
        tracing::info!(role = R::NAME, old = self.identity().component, new = factory.identity().component, "policy swapped");
        self.saved = Saved { on_trial: bytes.is_some(), bytes, never: false };
        self.instance = Some(instance);
        self.primary = factory;
        self.faults = 0;
        self.stats.set_aside = false;
        Ok(())
    }

    /// Trial and take-over in one, where blocking for it does no harm.
    ///
    /// # Errors
    /// A [`SwapRefused`]; the old version goes on serving.
    pub fn swap(&mut self, factory: Box<dyn Factory<R>>) -> Result<(), SwapRefused> {
        let candidate = self.trial()?.run(factory)?;
        self.take_over(candidate)
    }
}

/// The old instance's state of this moment, else its last saved one. An instance that cannot say is on its way out anyway.
fn state_now<R: Role>(instance: Option<&mut (dyn Policy<R> + 'static)>, last: Option<&[u8]>) -> Option<Vec<u8>> {
    match instance.map(Policy::save) {
        Some(Ok(Some(bytes))) if bytes.len() <= MAX_STATE_BYTES => Some(bytes),
        _ => last.map(<[u8]>::to_vec),
    }
}
