//! Policies decide, and cannot do harm: the host's guarantees under components and under policies that do everything wrong.
#![allow(missing_docs)]

use dray_device::backing::BackingOp;
use dray_migration::{Outcome, Phase, Policies, Reason, Report};
use dray_policy::guard::Guard;
use dray_policy::native::{Native, NativeFactory};
use dray_policy::packed::{Compression, Extent, Range};
use dray_policy::role::{Cdq, Copy, Role, Tracking};
use dray_policy::seam::{Exchange, Factory, Fault, Identity, Opening, Seat, SeatStats};
use dray_sandbox::{Budget, Limits, Pin, Sandbox, SandboxConfig, SandboxRole};
use dray_tests::moving::Moving;
use dray_tests::odd::{Decide, Late, Odd, choice, forgetful, ordering, whole};
use dray_tests::plan::{Plan, guarded, native, natives};
use dray_tests::rig::NSID;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

#[path = "../../host/sandbox/tests/support/mod.rs"]
mod support;

const MIB: u64 = 1 << 20;
const FUEL: Budget = Budget::Fuel { call_units: 20_000_000, open_units: 20_000_000 };

fn sandbox(budget: Budget) -> Sandbox {
    let limits = Limits { instances: 8, ..Limits::default() };
    Sandbox::new(&SandboxConfig { budget, limits, cache: None, compiled: None }).expect("a sandbox")
}

/// A component that `cargo xtask` has built.
fn built(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/plugins").join(name);
    assert!(path.is_file(), "{} is missing: `cargo xtask test` builds it", path.display());
    path
}

fn component<R: SandboxRole>(sandbox: &Sandbox, name: &str) -> Box<dyn Factory<R>> {
    let path = built(name);
    let pin = Pin::find(None, &path).expect("the lock file");
    Box::new(sandbox.load::<R>(&path, &pin).expect("a component").factory())
}

fn stats(report: &Report, role: &str) -> (SeatStats, u64) {
    let found = report.policies.iter().find(|(name, _)| *name == role).expect("the role");
    (found.1.stats.clone(), found.1.omissions)
}

/// Runs a migration with these policies to its end, and compares.
#[track_caller]
fn moves(plan: &Plan, policies: Policies) -> Report {
    let mut moving = Moving::new(plan);
    moving.pass(1_000);
    moving.start_with(policies);
    assert_eq!(moving.run(), Outcome::Moved, "{:?}", moving.report);
    moving.goes_on();
    moving.judge();
    moving.report
}

/// Where the destination was written first, in order: by pieces of 1 MiB.
fn order_of_first_writes(copy: &str) -> Vec<u64> {
    let sandbox = sandbox(FUEL);
    let mut plan = Plan::sized(5, 64 * MIB, 4096);
    plan.load.rate = 2_000;
    let mut moving = Moving::new(&plan);
    moving.machines[1].disk.watch();
    let policies = Policies {
        cdq: vec![Box::new(guarded(component::<Cdq>(&sandbox, "cdq-default.wasm")))],
        tracking: Box::new(guarded(component::<Tracking>(&sandbox, "tracking-default.wasm"))),
        copy: Box::new(guarded(component::<Copy>(&sandbox, copy))),
    };
    moving.start_with(policies);
    assert_eq!(moving.run(), Outcome::Moved, "{:?}", moving.report);
    for (role, policy) in &moving.report.policies {
        let SeatStats { calls, faults, fallbacks, .. } = policy.stats;
        assert!(calls > 0 && faults + fallbacks + policy.omissions == 0, "{role}: {policy:?}");
        assert!(policy.identity.component.ends_with(".wasm") && policy.identity.sha256.len() == 64, "{policy:?}");
    }
    let seen = moving.machines[1].disk.take_seen();
    moving.goes_on();
    moving.judge();
    let mut pieces = Vec::new();
    for (_, slba, _) in seen.iter().filter(|seen| matches!(seen.0, BackingOp::Write { .. } | BackingOp::WriteZeroes { .. })) {
        let piece = slba * 4096 / MIB;
        if !pieces.contains(&piece) {
            pieces.push(piece);
        }
    }
    pieces
}

#[test]
fn the_components_decide() {
    let up = order_of_first_writes("copy-default.wasm");
    let down = order_of_first_writes("copy-backwards.wasm");
    let regions = up.len() as u64;
    assert_eq!((regions, down.len() as u64), (64, 64), "everything was copied");
    let rising = up.windows(2).filter(|pair| pair[0] < pair[1]).count();
    let falling = down.windows(2).filter(|pair| pair[0] > pair[1]).count();
    assert!(rising > 56, "the default goes up: {up:?}");
    assert!(falling > 56 && down[0] == 63, "the odd one goes down: {down:?}");
}

#[test]
fn guarantee_1_what_the_cdq_policy_leaves_out_is_marked_by_the_host() {
    for keep in [0u64, 2, 7] {
        let mut policies = natives(1);
        policies.cdq = vec![Box::new(guarded(forgetful(move |range: &Range| keep != 0 && range.slba / 8 % keep != 0)))];
        let mut plan = Plan::sized(keep, 2 * MIB, 512);
        plan.config.max_bytes_per_s = 100 << 20;
        let report = moves(&plan, policies);
        let (stats, omissions) = stats(&report, "cdq");
        assert!(omissions > 0 && stats.faults == 0, "{report:?}");
    }
}

#[test]
fn guarantee_1_what_the_copy_policy_leaves_out_is_added_by_the_host() {
    // It orders nothing at all; it orders the beginning of the first region over and over again.
    let none = || ordering(|_| Vec::new());
    let first = || ordering(|dirty| dirty.first().map(|region| Extent { blocks: 8, ..whole(region) }).into_iter().collect());
    for factory in [none(), first()] {
        let mut policies = natives(1);
        policies.copy = Box::new(guarded(factory));
        let report = moves(&Plan::sized(12, 2 * MIB, 512), policies);
        assert!(stats(&report, "copy").1 > 0, "{report:?}");
    }
}

/// A policy that answers wrongly.
fn wrong<R: Role>(answer: impl FnMut(&R::Request, &mut R::Answer) -> Result<(), Fault> + Clone + Send + 'static) -> Box<dyn Factory<R>> {
    Odd::boxed("wrong", move |_: &Opening<R>| {
        let mut answer = answer.clone();
        Box::new(move |request: &R::Request, into: &mut R::Answer| answer(request, into)) as Decide<R>
    })
}

#[test]
fn guarantees_2_and_4_malformed_answers_fall_back() {
    let outside = Range { slba: u64::MAX - 7, blocks: 8, deallocated: false, nsid: NSID };
    let cdq: [Box<dyn Factory<Cdq>>; 4] = [
        wrong::<Cdq>(move |_, answer| { outside.push(&mut answer.ranges); answer.consumed = 1; Ok(()) }),
        wrong::<Cdq>(|_, answer| { answer.consumed = u32::MAX; Ok(()) }),
        wrong::<Cdq>(|request, answer| { answer.ranges = vec![1; request.entries.len() * 1000]; Ok(()) }),
        wrong::<Cdq>(|_, _| Err(Fault::Trap("unreachable".into()))),
    ];
    for factory in cdq {
        let mut policies = natives(1);
        policies.cdq = vec![Box::new(guarded(factory))];
        let report = moves(&Plan::sized(21, MIB, 512), policies);
        let (stats, omissions) = stats(&report, "cdq");
        assert!(stats.faults > 0 && stats.fallbacks == stats.calls && omissions == 0, "{stats:?}");
    }
    let beyond = Extent { slba: 1 << 40, blocks: 8, compression: Compression::PLAIN, nsid: NSID };
    let copy: [Box<dyn Factory<Copy>>; 3] = [
        wrong::<Copy>(move |_, answer| { beyond.push(&mut answer.extents); Ok(()) }),
        wrong::<Copy>(|_, answer| { answer.extents = vec![7; 5]; Ok(()) }),
        wrong::<Copy>(|_, _| Err(Fault::Deadline)),
    ];
    for factory in copy {
        let mut policies = natives(1);
        policies.copy = Box::new(guarded(factory));
        let report = moves(&Plan::sized(22, MIB, 512), policies);
        assert!(stats(&report, "copy").0.faults > 0);
    }
    let tracking: [Box<dyn Factory<Tracking>>; 3] = [
        wrong::<Tracking>(|_, answer| { answer.choices = vec![0; 3]; Ok(()) }),
        wrong::<Tracking>(|request, answer| { answer.choices = vec![0x60; request.regions.len() / 32]; Ok(()) }),
        // Not wrong, but of no use: everything is hot and waits.
        wrong::<Tracking>(|request, answer| { answer.choices = vec![choice(3, true); request.regions.len() / 32]; Ok(()) }),
    ];
    for (index, factory) in tracking.into_iter().enumerate() {
        let mut policies = natives(1);
        policies.tracking = Box::new(guarded(factory));
        let report = moves(&Plan::sized(23, MIB, 512), policies);
        assert_eq!(stats(&report, "tracking").0.faults > 0, index < 2);
    }
}

#[test]
fn guarantees_2_and_4_components_that_trap_loop_or_devour_memory_are_set_aside() {
    let bodies = [
        ("trap", "(unreachable)"),
        ("budget", "(loop $again (br $again)) (unreachable)"),
        ("malformed", "(call $answer (i32.const 0) (i32.const 0) (i32.const -1))"),
        ("", "(loop $again (br_if $again (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) (unreachable)"),
    ];
    for (word, body) in bodies {
        let bytes = support::cdq(body, "");
        let sandbox = sandbox(Budget::Fuel { call_units: 1_000_000, open_units: 20_000_000 });
        let loaded = sandbox.load_bytes::<Cdq>("hostile.wasm", &bytes, &Pin::Unpinned).expect("it loads");
        let mut policies = natives(1);
        policies.cdq = vec![Box::new(guarded(Box::new(loaded.factory())))];
        let mut plan = Plan::sized(31, MIB, 512);
        plan.config.max_bytes_per_s = 50 << 20;
        let report = moves(&plan, policies);
        let (stats, omissions) = stats(&report, "cdq");
        assert!(stats.set_aside && stats.faults == 8 && stats.fallbacks == stats.calls && omissions == 0, "{stats:?}");
        assert!(stats.last_fault.as_deref().is_some_and(|fault| fault.contains(word)), "{stats:?}");
    }
}

#[test]
fn guarantee_3_seats_that_answer_late_or_never_do_not_hold_the_migration_up() {
    for polls in [50, 5_000, u32::MAX] {
        for role in 0..3 {
            let mut policies = natives(1);
            match role {
                0 => policies.cdq = vec![Late::boxed(native(), polls)],
                1 => policies.tracking = Late::boxed(native(), polls),
                _ => policies.copy = Late::boxed(native(), polls),
            }
            let mut plan = Plan::sized(u64::from(polls), 2 * MIB, 512);
            // Without a copy policy nobody wishes to switch over: the host decides at its own limit.
            plan.config.limits.max_time_ms = 300;
            let mut moving = Moving::new(&plan);
            moving.start_with(policies);
            assert_eq!(moving.run(), Outcome::Moved, "role {role}, {polls} polls: {:?}", moving.report);
            assert!(moving.report.duration_us < 2_000_000);
            moving.goes_on();
            moving.judge();
        }
    }
}

#[test]
fn guarantee_3_a_policy_that_gives_nothing_back_cannot_fill_the_queue() {
    let lazy = wrong::<Cdq>(|_, answer| {
        (answer.consumed, answer.wait_us, answer.wait_entries) = (0, u32::MAX, u32::MAX);
        Ok(())
    });
    let mut policies = natives(1);
    policies.cdq = vec![Box::new(guarded(lazy))];
    let mut plan = Plan::sized(41, 2 * MIB, 512).with(|config| (config.cdq_slots, config.max_bytes_per_s) = (64, 50 << 20));
    plan.load.rate = 100_000;
    let report = moves(&plan, policies);
    assert!(report.fills == 0 && report.pump.drained_by_host > 0, "{report:?}");
}

#[test]
fn guarantee_3_a_policy_that_never_switches_over_meets_the_hosts_limits() {
    let never = || wrong::<Copy>(|request, answer| {
        for region in dray_policy::packed::regions(&request.regions).filter(|region| region.dirty > 0) {
            whole(&region).push(&mut answer.extents);
        }
        answer.wait_us = 1_000;
        Ok(())
    });
    // The host switches over by itself where the budget allows it, and gives up where it does not.
    for budget_us in [10_000, 1] {
        let plan = Plan::sized(42, MIB, 512).with(|config| {
            (config.limits.max_time_ms, config.limits.downtime_budget_us) = (50, budget_us);
        });
        let mut moving = Moving::new(&plan);
        let mut policies = natives(1);
        policies.copy = Box::new(guarded(never()));
        moving.start_with(policies);
        let outcome = moving.run();
        if budget_us == 1 {
            assert!(matches!(outcome, Outcome::Undone(Reason::NotConverging { budget_us: 1, .. })), "{outcome:?}");
        } else {
            assert_eq!(outcome, Outcome::Moved);
        }
        assert!(moving.report.duration_us >= 50_000);
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn guarantee_5_a_component_of_another_hash_is_not_loaded() {
    let bytes = std::fs::read(built("copy-backwards.wasm")).expect("the component");
    let pin = Pin::find(None, &built("copy-default.wasm")).expect("the lock file");
    let refused = sandbox(FUEL).load_bytes::<Copy>("copy-default.wasm", &bytes, &pin).expect_err("another component");
    assert!(refused.to_string().contains("SHA-256"), "{refused}");
}

/// A guard that both the migration and the operator reach.
struct Shared<R: Role>(Arc<Mutex<Guard<R>>>);

impl<R: Role> Seat<R> for Shared<R> {
    fn identity(&self) -> Identity {
        self.0.lock().expect("guard").identity()
    }
    fn open(&mut self, opening: Opening<R>) {
        self.0.lock().expect("guard").open(opening);
    }
    fn ask(&mut self, exchange: Box<Exchange<R>>) {
        self.0.lock().expect("guard").ask(exchange);
    }
    fn poll(&mut self) -> Option<Box<Exchange<R>>> {
        self.0.lock().expect("guard").poll()
    }
    fn stats(&self) -> SeatStats {
        self.0.lock().expect("guard").stats()
    }
}

fn shared<R: Native>() -> (Arc<Mutex<Guard<R>>>, Box<dyn Seat<R>>) {
    let guard = Arc::new(Mutex::new(guarded::<R>(Box::new(NativeFactory::<R>::new()))));
    (Arc::clone(&guard), Box::new(Shared(guard)))
}

#[test]
fn guarantee_6_new_versions_take_over_in_the_middle_of_a_migration() {
    let sandbox = sandbox(FUEL);
    let mut plan = Plan::sized(61, 8 * MIB, 512);
    plan.config.max_bytes_per_s = 200 << 20;
    let mut moving = Moving::new(&plan);
    let ((cdq, cdq_seat), (copy, copy_seat)) = (shared::<Cdq>(), shared::<Copy>());
    moving.start_with(Policies { cdq: vec![cdq_seat], tracking: native(), copy: copy_seat });
    moving.phase(Phase::Copying);
    moving.until("the policies have been asked", |_| {
        let calls = cdq.lock().expect("guard").stats().calls.min(copy.lock().expect("guard").stats().calls);
        calls > 2
    });
    // One that would lose entries and one that traps are not let in; the components are.
    let omits = cdq.lock().expect("guard").swap(forgetful(|_| false));
    assert!(omits.is_err(), "{omits:?}");
    let traps = cdq.lock().expect("guard").swap(wrong::<Cdq>(|_, _| Err(Fault::Trap("no".into()))));
    assert!(traps.is_err(), "{traps:?}");
    cdq.lock().expect("guard").swap(component::<Cdq>(&sandbox, "cdq-default.wasm")).expect("taken over");
    copy.lock().expect("guard").swap(component::<Copy>(&sandbox, "copy-backwards.wasm")).expect("taken over");
    let asked = cdq.lock().expect("guard").stats().calls;
    assert_eq!(moving.run(), Outcome::Moved, "{:?}", moving.report);
    let (stats, omissions) = stats(&moving.report, "cdq");
    assert!(stats.calls > asked && stats.faults + stats.fallbacks + omissions == 0, "{stats:?}");
    let names: Vec<_> = moving.report.policies.iter().map(|(_, policy)| policy.identity.component.clone()).collect();
    assert_eq!(names, ["cdq-default.wasm", "native:tracking", "copy-backwards.wasm"]);
    moving.goes_on();
    moving.judge();
}
