//! The policies of a run: the native ones, the default components in the sandbox (by fuel), and ones that do everything wrong.
//!
//! A [`PolicyChoice`] is drawn from a seed, a [`Kit`] makes seats of it. The components are compiled once in a process. What a
//! policy did wrong is written into a [`Misdeeds`] when it does it, not when it was chosen.

use super::fault::Fault as Name;
use crate::odd::{Decide, Late, Odd, whole};
use crate::plan::guarded;
use dray_migration::Policies;
use dray_policy::guard::{Guard, SwapRefused};
use dray_policy::native::{Native, NativeFactory};
use dray_policy::packed::{Choice, Compression, EXTENT_BYTES, Extent, RANGE_BYTES, Range, regions};
use dray_policy::role::{Cdq, Copy, Role, Then, Tracking};
use dray_policy::seam::{Exchange, Factory, Fault, Identity, Opening, Policy, Seat, SeatStats};
use dray_sandbox::{Budget, Component, Limits, LoadError, Pin, Sandbox, SandboxConfig, SandboxRole};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Fuel of a call and of opening: far more than a default component needs for the batches of a run.
const FUEL: Budget = Budget::Fuel { call_units: 20_000_000, open_units: 20_000_000 };
/// Instances that live at a time in all threads.
const INSTANCES: u32 = 256;
/// Where the components are, if not beside the workspace's build.
const FOLDER: &str = "DRAY_PLUGINS";

/// What a policy is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// The built-in one.
    Native,
    /// The default component of the role, in the sandbox.
    Component,
    /// It traps, again and again, until it is set aside.
    Traps,
    /// A component that never returns: its fuel ends.
    Loops,
    /// It leaves ranges out (cdq), regions (copy), choices (tracking).
    Omits,
    /// It names blocks outside the namespace.
    OutOfRange,
    /// It gives more back than it was given.
    GivesMore,
    /// It gives back less than it could.
    GivesLess,
    /// It wishes to switch over while all is dirty (copy); the others hold everything, or look away for long.
    AsksEarly,
    /// A native one that answers only so many polls later.
    Late(u32),
}

impl PolicyKind {
    fn of(random: &mut fastrand::Rng) -> Self {
        match random.u8(0..24) {
            0..8 => Self::Native,
            8..10 => Self::Component,
            10 | 11 => Self::Traps,
            12 => Self::Loops,
            13..15 => Self::Omits,
            15..17 => Self::OutOfRange,
            17 | 18 => Self::GivesMore,
            19 | 20 => Self::GivesLess,
            21 | 22 => Self::AsksEarly,
            _ => Self::Late(1 << random.u32(2..9)),
        }
    }
}

/// The policies of one migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyChoice {
    /// Of what the odd ones choose.
    pub seed: u64,
    /// Every queue's.
    pub cdq: PolicyKind,
    /// Tracking.
    pub tracking: PolicyKind,
    /// Copy.
    pub copy: PolicyKind,
}

impl PolicyChoice {
    /// The native policies.
    pub const NATIVE: Self =
        Self { seed: 0, cdq: PolicyKind::Native, tracking: PolicyKind::Native, copy: PolicyKind::Native };

    /// What these numbers choose.
    #[must_use]
    pub fn of(random: &mut fastrand::Rng) -> Self {
        let (cdq, tracking, copy) = (PolicyKind::of(random), PolicyKind::of(random), PolicyKind::of(random));
        Self { seed: random.u64(..), cdq, tracking, copy }
    }
}

/// What policies did wrong, as it took effect. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct Misdeeds {
    list: Arc<Mutex<Vec<Name>>>,
}

impl Misdeeds {
    fn add(&self, what: Name) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// What was done since the last call.
    pub fn take(&self, into: &mut Vec<Name>) {
        into.append(&mut self.list.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A role that has a default component, and ways to do it wrong.
trait Odds: Native + SandboxRole {
    /// The default component.
    fn component(library: &Library) -> &Component<Self>;
    /// A component that never returns, where there is one.
    fn looping(_: &Library) -> Option<&Component<Self>> {
        None
    }
    /// Turns a right answer into one of that kind; the misdeed, if it is one now.
    fn spoil(kind: PolicyKind, setup: &Opening<Self>, random: &mut fastrand::Rng, request: &Self::Request, answer: &mut Self::Answer)
    -> Option<Name>;
}

/// The compiled components of a process.
struct Library {
    cdq: Component<Cdq>,
    tracking: Component<Tracking>,
    copy: Component<Copy>,
    looping: Component<Cdq>,
}

impl Library {
    fn load() -> Result<Self, LoadError> {
        let limits = Limits { instances: INSTANCES, ..Limits::default() };
        let sandbox = |budget| Sandbox::new(&SandboxConfig { budget, limits, cache: None, compiled: None });
        let plain = sandbox(FUEL)?;
        let short = sandbox(Budget::Fuel { call_units: 20_000, open_units: 20_000_000 })?;
        let looping = short.load_bytes::<Cdq>("looping.wasm", &looping(), &Pin::Unpinned)?;
        Ok(Self {
            cdq: load(&plain, "cdq-default.wasm")?,
            tracking: load(&plain, "tracking-default.wasm")?,
            copy: load(&plain, "copy-default.wasm")?,
            looping,
        })
    }
}

/// The process's library. Compiling it takes a while; all threads share it.
fn library() -> Result<&'static Library, KitError> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let loaded = LIBRARY.get_or_init(|| Library::load().map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|why| KitError(why.clone()))
}

fn load<R: SandboxRole>(sandbox: &Sandbox, name: &str) -> Result<Component<R>, LoadError> {
    let folder = std::env::var_os(FOLDER).map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/plugins"), PathBuf::from);
    let path = folder.join(name);
    let pin = Pin::find(None, &path)?;
    sandbox.load::<R>(&path, &pin)
}

#[path = "../../host/sandbox/tests/support/text.rs"]
#[allow(dead_code, reason = "the sandbox's own tests use the rest")]
mod text;

fn looping() -> Vec<u8> {
    text::cdq("(loop $again (br $again)) (unreachable)", "")
}

/// Why there are no policies.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the default components cannot be loaded (`cargo xtask plugins` builds them): {0}")]
pub struct KitError(String);

/// Makes the policies of runs.
pub struct Kit {
    library: &'static Library,
}

/// The guards behind the seats of a migration, to swap what is in them.
pub struct Swaps {
    cdq: Vec<Arc<Mutex<Guard<Cdq>>>>,
    tracking: Arc<Mutex<Guard<Tracking>>>,
    copy: Arc<Mutex<Guard<Copy>>>,
    misdeeds: Misdeeds,
}

impl Kit {
    /// The kit of a thread.
    ///
    /// # Errors
    /// [`KitError`] when a component is not there or does not load.
    pub fn new() -> Result<Self, KitError> {
        Ok(Self { library: library()? })
    }

    /// Policies as chosen, for so many queues. What they do wrong is told to `misdeeds`.
    #[must_use]
    pub fn policies(&self, choice: &PolicyChoice, queues: usize, misdeeds: &Misdeeds) -> (Policies, Swaps) {
        let mut random = fastrand::Rng::with_seed(choice.seed);
        let (mut cdq, mut guards) = (Vec::new(), Vec::new());
        for _ in 0..queues {
            let (seat, guard) = self.seat::<Cdq>(choice.cdq, random.fork(), misdeeds);
            cdq.push(seat);
            guards.push(guard);
        }
        let (tracking, tracking_guard) = self.seat::<Tracking>(choice.tracking, random.fork(), misdeeds);
        let (copy, copy_guard) = self.seat::<Copy>(choice.copy, random.fork(), misdeeds);
        let swaps = Swaps { cdq: guards, tracking: tracking_guard, copy: copy_guard, misdeeds: misdeeds.clone() };
        (Policies { cdq, tracking, copy }, swaps)
    }

    fn seat<R: Odds>(&self, kind: PolicyKind, random: fastrand::Rng, misdeeds: &Misdeeds) -> (Box<dyn Seat<R>>, SharedGuard<R>) {
        let guard = Arc::new(Mutex::new(guarded::<R>(self.factory(kind, random, misdeeds))));
        let seat: Box<dyn Seat<R>> = Box::new(Shared(Arc::clone(&guard)));
        match kind {
            PolicyKind::Late(polls) => (Late::boxed(seat, polls), guard),
            _ => (seat, guard),
        }
    }

    fn factory<R: Odds>(&self, kind: PolicyKind, random: fastrand::Rng, misdeeds: &Misdeeds) -> Box<dyn Factory<R>> {
        match kind {
            PolicyKind::Native | PolicyKind::Late(_) => Box::new(NativeFactory::<R>::new()),
            PolicyKind::Component => Box::new(R::component(self.library).factory()),
            PolicyKind::Loops => match R::looping(self.library) {
                Some(component) => Watched::boxed(Box::new(component.factory()), misdeeds.clone()),
                None => odd::<R>(kind, random, misdeeds.clone()),
            },
            _ => odd::<R>(kind, random, misdeeds.clone()),
        }
    }

    /// Replaces the policy of a role by another, both as `random` chooses. True when it took over; one that faults on the last
    /// recorded request, or leaves out what that names, is refused.
    pub fn swap(&self, swaps: &Swaps, random: &mut fastrand::Rng) -> bool {
        let kind = PolicyKind::of(random);
        let swapped = match random.usize(0..swaps.cdq.len() + 2) {
            0 => self.exchange(&swaps.tracking, kind, random, &swaps.misdeeds),
            1 => self.exchange(&swaps.copy, kind, random, &swaps.misdeeds),
            queue => self.exchange(&swaps.cdq[queue - 2], kind, random, &swaps.misdeeds),
        };
        if swapped.is_ok() {
            swaps.misdeeds.add(Name::PolicySwapped);
        }
        swapped.is_ok()
    }

    fn exchange<R: Odds>(&self, guard: &Mutex<Guard<R>>, kind: PolicyKind, random: &mut fastrand::Rng, misdeeds: &Misdeeds) -> Result<(), SwapRefused> {
        // What it does on trial is no misdeed yet.
        let trial = guard.lock().unwrap_or_else(PoisonError::into_inner).trial()?;
        let _tried = trial.run(self.factory::<R>(kind, random.clone().fork(), &Misdeeds::default()))?;
        let fresh = self.factory::<R>(kind, random.fork(), misdeeds);
        let mut guard = guard.lock().unwrap_or_else(PoisonError::into_inner);
        let candidate = guard.trial()?.run(fresh)?;
        guard.take_over(candidate)
    }
}

/// A guard that its seat and whoever swaps its policy have together.
type SharedGuard<R> = Arc<Mutex<Guard<R>>>;

/// A guard that a migration and the world both reach.
struct Shared<R: Role>(Arc<Mutex<Guard<R>>>);

impl<R: Role> Shared<R> {
    fn guard(&self) -> std::sync::MutexGuard<'_, Guard<R>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R: Role> Seat<R> for Shared<R> {
    fn identity(&self) -> Identity {
        self.guard().identity()
    }
    fn open(&mut self, opening: Opening<R>) {
        self.guard().open(opening);
    }
    fn ask(&mut self, exchange: Box<Exchange<R>>) {
        self.guard().ask(exchange);
    }
    fn poll(&mut self) -> Option<Box<Exchange<R>>> {
        self.guard().poll()
    }
    fn stats(&self) -> SeatStats {
        self.guard().stats()
    }
}

/// A policy whose ended budgets are counted.
struct Watched<R: Role> {
    inner: Box<dyn Factory<R>>,
    misdeeds: Misdeeds,
}

struct WatchedPolicy<R: Role> {
    inner: Box<dyn Policy<R>>,
    misdeeds: Misdeeds,
}

impl<R: Role> Watched<R> {
    fn boxed(inner: Box<dyn Factory<R>>, misdeeds: Misdeeds) -> Box<dyn Factory<R>> {
        Box::new(Self { inner, misdeeds })
    }
}

impl<R: Role> Factory<R> for Watched<R> {
    fn identity(&self) -> &Identity {
        self.inner.identity()
    }

    fn open(&mut self, opening: &Opening<R>, saved: Option<&[u8]>) -> Result<Box<dyn Policy<R>>, Fault> {
        let inner = self.inner.open(opening, saved)?;
        Ok(Box::new(WatchedPolicy { inner, misdeeds: self.misdeeds.clone() }))
    }
}

impl<R: Role> Policy<R> for WatchedPolicy<R> {
    fn call(&mut self, request: &R::Request, answer: &mut R::Answer) -> Result<(), Fault> {
        let result = self.inner.call(request, answer);
        if result == Err(Fault::Deadline) {
            self.misdeeds.add(Name::PolicyLoops);
        }
        result
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        self.inner.save()
    }
}

/// A policy that begins like the native one and then does it wrong, half of the times; the impatient one always.
fn odd<R: Odds>(kind: PolicyKind, mut random: fastrand::Rng, misdeeds: Misdeeds) -> Box<dyn Factory<R>> {
    Odd::boxed("odd", move |opening: &Opening<R>| {
        let (mut random, misdeeds, opening) = (random.fork(), misdeeds.clone(), opening.clone());
        let mut native = R::native(&opening);
        Box::new(move |request: &R::Request, answer: &mut R::Answer| {
            native.as_mut().map_err(|fault| fault.clone())?.call(request, answer)?;
            if kind != PolicyKind::AsksEarly && random.bool() {
                return Ok(());
            }
            let (name, fault) = match kind {
                PolicyKind::Traps => (Name::PolicyTraps, Fault::Trap("unreachable".to_owned())),
                PolicyKind::Loops => (Name::PolicyLoops, Fault::Deadline),
                _ => {
                    if let Some(name) = R::spoil(kind, &opening, &mut random, request, answer) {
                        misdeeds.add(name);
                    }
                    return Ok(());
                }
            };
            misdeeds.add(name);
            Err(fault)
        }) as Decide<R>
    })
}

/// Drops records of `bytes` bytes, about half of them; true when one was dropped.
fn thin(list: &mut Vec<u8>, bytes: usize, random: &mut fastrand::Rng) -> bool {
    let before = list.len();
    let kept = list.chunks_exact(bytes).filter(|_| random.bool()).flatten().copied().collect();
    *list = kept;
    list.len() < before
}

impl Odds for Cdq {
    fn component(library: &Library) -> &Component<Self> {
        &library.cdq
    }

    fn looping(library: &Library) -> Option<&Component<Self>> {
        Some(&library.looping)
    }

    fn spoil(kind: PolicyKind, opening: &Opening<Self>, random: &mut fastrand::Rng, request: &Self::Request, answer: &mut Self::Answer)
    -> Option<Name> {
        let shown = Self::items(&opening.extra, request) as u32;
        match kind {
            PolicyKind::Omits => thin(&mut answer.ranges, RANGE_BYTES, random).then_some(Name::PolicyOmits),
            PolicyKind::OutOfRange => {
                let namespace = opening.setup.namespaces.first()?;
                let slba = if random.bool() { namespace.blocks } else { u64::MAX - 7 };
                Range { slba, blocks: 1 + random.u32(0..8), deallocated: false, nsid: namespace.nsid }.push(&mut answer.ranges);
                Some(Name::PolicyOutOfRange)
            }
            PolicyKind::GivesMore => {
                answer.consumed = if random.bool() { u32::MAX } else { shown + 1 };
                Some(Name::PolicyGivesMore)
            }
            PolicyKind::GivesLess => {
                let before = answer.consumed;
                answer.consumed = random.u32(0..=before);
                (answer.consumed < before).then_some(Name::PolicyGivesLess)
            }
            _ => {
                // It looks away.
                (answer.wait_us, answer.wait_entries) = (u32::MAX, u32::MAX);
                None
            }
        }
    }
}

impl Odds for Tracking {
    fn component(library: &Library) -> &Component<Self> {
        &library.tracking
    }

    fn spoil(kind: PolicyKind, _: &Opening<Self>, random: &mut fastrand::Rng, _: &Self::Request, answer: &mut Self::Answer)
    -> Option<Name> {
        match kind {
            PolicyKind::Omits => answer.choices.pop().map(|_| Name::PolicyOmits),
            PolicyKind::OutOfRange => {
                let choice = answer.choices.last_mut()?;
                *choice = Choice { chunk_log2: 24, hold: false }.pack();
                Some(Name::PolicyOutOfRange)
            }
            PolicyKind::GivesMore => {
                answer.choices.push(0);
                Some(Name::PolicyGivesMore)
            }
            _ => {
                // Everything is hot and waits.
                answer.choices.iter_mut().for_each(|choice| *choice = Choice { hold: random.bool(), ..Choice::unpack(*choice) }.pack());
                None
            }
        }
    }
}

impl Odds for Copy {
    fn component(library: &Library) -> &Component<Self> {
        &library.copy
    }

    fn spoil(kind: PolicyKind, opening: &Opening<Self>, random: &mut fastrand::Rng, request: &Self::Request, answer: &mut Self::Answer)
    -> Option<Name> {
        match kind {
            PolicyKind::Omits => thin(&mut answer.extents, EXTENT_BYTES, random).then_some(Name::PolicyOmits),
            PolicyKind::OutOfRange => {
                let namespace = opening.setup.namespaces.first()?;
                let slba = if random.bool() { namespace.blocks } else { 1 << 40 };
                Extent { slba, blocks: 8, compression: Compression::PLAIN, nsid: namespace.nsid }.push(&mut answer.extents);
                Some(Name::PolicyOutOfRange)
            }
            PolicyKind::GivesMore => {
                // The same once more: allowed, and of no use.
                let again = answer.extents.clone();
                answer.extents.extend(again);
                regions(&request.regions).take(4).for_each(|region| whole(&region).push(&mut answer.extents));
                None
            }
            PolicyKind::GivesLess => {
                let left_out = !answer.extents.is_empty();
                answer.extents.clear();
                answer.wait_us = random.u32(0..2_000);
                left_out.then_some(Name::PolicyOmits)
            }
            _ => {
                answer.then = Then::SwitchOver;
                (request.left_blocks > 0).then_some(Name::PolicyAsksEarly)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moving::Moving;
    use crate::plan::Plan;
    use dray_migration::Outcome;
    use std::collections::BTreeSet;

    #[test]
    fn whatever_the_policies_do_it_moves_and_what_they_did_is_told() {
        use PolicyKind::{AsksEarly, Component, GivesLess, GivesMore, Late, Loops, Native, Omits, OutOfRange, Traps};
        let kit = Kit::new().expect("the default components");
        let mut told = BTreeSet::new();
        for (seed, kind) in [Native, Component, Traps, Loops, Omits, OutOfRange, GivesMore, GivesLess, AsksEarly, Late(40)].into_iter().enumerate() {
            let seed = seed as u64;
            let mut moving = Moving::new(&Plan::sized(seed, 1 << 20, 512).with(|config| config.max_bytes_per_s = 50 << 20));
            let (misdeeds, choice) = (Misdeeds::default(), PolicyChoice { seed, cdq: kind, tracking: kind, copy: kind });
            let (policies, swaps) = kit.policies(&choice, 1, &misdeeds);
            moving.pass(1_000);
            moving.start_with(policies);
            if kind == Native {
                moving.phase(dray_migration::Phase::Copying);
                moving.turns(200);
                let mut random = fastrand::Rng::with_seed(5);
                let swapped = (0..40).filter(|_| kit.swap(&swaps, &mut random)).count();
                assert!(swapped > 0 && swapped < 40, "{swapped} took over: good ones do, bad ones do not");
            }
            assert_eq!(moving.run(), Outcome::Moved, "{kind:?}: {:?}", moving.report);
            let faults: u64 = moving.report.policies.iter().map(|(_, policy)| policy.stats.faults).sum();
            assert_eq!(faults > 0, matches!(kind, Traps | Loops | OutOfRange | GivesMore | Omits) || kind == Native && faults > 0, "{kind:?}: {faults}");
            let mut names = Vec::new();
            misdeeds.take(&mut names);
            told.extend(names);
            moving.goes_on();
            moving.judge();
        }
        let all = [
            Name::PolicyTraps,
            Name::PolicyLoops,
            Name::PolicyOmits,
            Name::PolicyOutOfRange,
            Name::PolicyGivesMore,
            Name::PolicyGivesLess,
            Name::PolicyAsksEarly,
            Name::PolicySwapped,
        ];
        assert!(all.iter().all(|name| told.contains(name)), "{told:?}");
    }

    #[test]
    fn the_same_seed_chooses_the_same_policies() {
        let of = |seed| {
            let mut random = fastrand::Rng::with_seed(seed);
            [PolicyChoice::of(&mut random), PolicyChoice::of(&mut random)]
        };
        assert_eq!(of(4), of(4));
        assert_ne!(of(4), of(5));
    }
}
