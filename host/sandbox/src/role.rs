//! The three roles as the sandbox calls them: requests into the typed functions of a component, answers back.

use crate::bindings::{Namespace, Setup, cdq, copy, tracking};
use crate::instance::Host;
use dray_policy::packed::{EXTENT_BYTES, RANGE_BYTES};
use dray_policy::role::{self, CopyRequest, MAX_EXTENTS, MAX_RANGES_PER_ENTRY, Marks, Role, RoundReport, Then};
use dray_policy::seam::{Fault, Opening};
use wasmtime::component::{Instance, InstancePre};
use wasmtime::{Result, Store};

/// A role that a component can have. Implemented for the three roles and for nothing else.
pub trait SandboxRole: Role {
    /// Where a component keeps the role's functions.
    #[doc(hidden)]
    type Indices: Clone + Send + Sync + 'static;
    /// The role's functions of one instance.
    #[doc(hidden)]
    type Guest: Send + 'static;

    #[doc(hidden)]
    fn indices(pre: &InstancePre<Host>) -> Result<Self::Indices>;
    #[doc(hidden)]
    fn guest(indices: &Self::Indices, store: &mut Store<Host>, instance: &Instance) -> Result<Self::Guest>;
    #[doc(hidden)]
    fn open(guest: &Self::Guest, store: &mut Store<Host>, opening: &Opening<Self>) -> Result<Result<(), String>>;
    /// Calls the component; the lists of the answer are taken as they come, not longer than the store's bound.
    #[doc(hidden)]
    fn call(guest: &Self::Guest, store: &mut Store<Host>, request: &Self::Request, answer: &mut Self::Answer) -> Result<()>;
    /// Most bytes that an answer to this request may bring.
    #[doc(hidden)]
    fn bound(items: u64) -> usize;
    /// Bytes that an answer brought.
    #[doc(hidden)]
    fn brought(answer: &Self::Answer) -> usize;
    /// The request's time, in microseconds since the migration began.
    #[doc(hidden)]
    fn now_us(request: &Self::Request) -> u64;
}

fn setup<R: Role>(opening: &Opening<R>) -> Setup {
    let setup = &opening.setup;
    let namespaces = setup.namespaces.iter();
    Setup {
        migration: setup.migration,
        seed: setup.seed,
        now_us: setup.now_us,
        namespaces: namespaces.map(|ns| Namespace { nsid: ns.nsid, blocks: ns.blocks, block_bytes: ns.block_bytes }).collect(),
        regions: setup.regions,
        region_bytes: setup.region_bytes,
        settings: setup.settings.clone(),
    }
}

/// Holds an answer against its bound, before anything reads it.
pub(crate) fn check_length<R: SandboxRole>(items: u64, answer: &R::Answer) -> Result<(), Fault> {
    let (brought, bound) = (R::brought(answer), R::bound(items));
    if brought > bound {
        return Err(Fault::Malformed(format!("an answer of {brought} bytes is longer than the {bound} allowed")));
    }
    Ok(())
}

impl SandboxRole for role::Cdq {
    type Indices = cdq::GuestIndices;
    type Guest = cdq::Guest;

    fn indices(pre: &InstancePre<Host>) -> Result<Self::Indices> {
        cdq::GuestIndices::new(pre)
    }

    fn guest(indices: &Self::Indices, store: &mut Store<Host>, instance: &Instance) -> Result<Self::Guest> {
        indices.load(store, instance)
    }

    fn open(guest: &Self::Guest, store: &mut Store<Host>, opening: &Opening<Self>) -> Result<Result<(), String>> {
        let queue = &opening.extra;
        let queue = cdq::Queue {
            id: queue.id,
            kind: queue.kind,
            cntlid: queue.cntlid,
            slots: queue.slots,
            entry_bytes: queue.entry_bytes,
            phase_byte: queue.phase_byte,
            phase_mask: queue.phase_mask,
        };
        guest.call_open(store, &setup(opening), queue)
    }

    fn call(guest: &Self::Guest, store: &mut Store<Host>, request: &Self::Request, answer: &mut Self::Answer) -> Result<()> {
        let drained = guest.call_drain(store, request.now_us, &request.entries, request.waiting)?;
        answer.ranges = drained.ranges;
        answer.consumed = drained.consumed;
        answer.wait_us = drained.wait_us;
        answer.wait_entries = drained.wait_entries;
        answer.marks = Marks {
            first: drained.marks.contains(cdq::Marks::FIRST),
            stopped: drained.marks.contains(cdq::Marks::STOPPED),
            suspended: drained.marks.contains(cdq::Marks::SUSPENDED),
            full: drained.marks.contains(cdq::Marks::FULL),
            everything: drained.marks.contains(cdq::Marks::EVERYTHING),
        };
        Ok(())
    }

    fn bound(items: u64) -> usize {
        usize::try_from(items).unwrap_or(usize::MAX).saturating_mul(MAX_RANGES_PER_ENTRY * RANGE_BYTES)
    }

    fn brought(answer: &Self::Answer) -> usize {
        answer.ranges.len()
    }

    fn now_us(request: &Self::Request) -> u64 {
        request.now_us
    }
}

impl SandboxRole for role::Tracking {
    type Indices = tracking::GuestIndices;
    type Guest = tracking::Guest;

    fn indices(pre: &InstancePre<Host>) -> Result<Self::Indices> {
        tracking::GuestIndices::new(pre)
    }

    fn guest(indices: &Self::Indices, store: &mut Store<Host>, instance: &Instance) -> Result<Self::Guest> {
        indices.load(store, instance)
    }

    fn open(guest: &Self::Guest, store: &mut Store<Host>, opening: &Opening<Self>) -> Result<Result<(), String>> {
        guest.call_open(store, &setup(opening))
    }

    fn call(guest: &Self::Guest, store: &mut Store<Host>, request: &Self::Request, answer: &mut Self::Answer) -> Result<()> {
        answer.choices = guest.call_plan(store, request.now_us, request.last.map(round), &request.regions)?;
        Ok(())
    }

    fn bound(items: u64) -> usize {
        usize::try_from(items).unwrap_or(usize::MAX)
    }

    fn brought(answer: &Self::Answer) -> usize {
        answer.choices.len()
    }

    fn now_us(request: &Self::Request) -> u64 {
        request.now_us
    }
}

fn round(report: RoundReport) -> tracking::Round {
    tracking::Round {
        number: report.number,
        duration_us: report.duration_us,
        copied_blocks: report.copied_blocks,
        zero_blocks: report.zero_blocks,
        dirtied_blocks: report.dirtied_blocks,
    }
}

impl SandboxRole for role::Copy {
    type Indices = copy::GuestIndices;
    type Guest = copy::Guest;

    fn indices(pre: &InstancePre<Host>) -> Result<Self::Indices> {
        copy::GuestIndices::new(pre)
    }

    fn guest(indices: &Self::Indices, store: &mut Store<Host>, instance: &Instance) -> Result<Self::Guest> {
        indices.load(store, instance)
    }

    fn open(guest: &Self::Guest, store: &mut Store<Host>, opening: &Opening<Self>) -> Result<Result<(), String>> {
        guest.call_open(store, &setup(opening))
    }

    fn call(guest: &Self::Guest, store: &mut Store<Host>, request: &Self::Request, answer: &mut Self::Answer) -> Result<()> {
        let decision = guest.call_next(store, view(request), &request.regions)?;
        answer.extents = decision.extents;
        answer.bytes_per_s = decision.bytes_per_s;
        answer.guest_iops_limit = decision.guest_iops_limit;
        answer.wait_us = decision.wait_us;
        answer.then = match decision.then {
            copy::Then::GoOn => Then::GoOn,
            copy::Then::SwitchOver => Then::SwitchOver,
        };
        Ok(())
    }

    fn bound(_items: u64) -> usize {
        MAX_EXTENTS * EXTENT_BYTES
    }

    fn brought(answer: &Self::Answer) -> usize {
        answer.extents.len()
    }

    fn now_us(request: &Self::Request) -> u64 {
        request.now_us
    }
}

fn view(request: &CopyRequest) -> copy::View {
    copy::View {
        now_us: request.now_us,
        unix_s: request.unix_s,
        utc_offset_min: request.utc_offset_min,
        round: request.round,
        left_blocks: request.left_blocks,
        queued_blocks: request.queued_blocks,
        dirtied_per_s: request.dirtied_per_s,
        copied_per_s: request.copied_per_s,
        peer_us: request.peer_us,
        guest_p50_us: request.guest_p50_us,
        guest_p99_us: request.guest_p99_us,
        guest_p99_before_us: request.guest_p99_before_us,
        guest_iops: request.guest_iops,
        downtime_estimate_us: request.downtime_estimate_us,
        downtime_budget_us: request.downtime_budget_us,
        may_throttle: request.may_throttle,
    }
}
