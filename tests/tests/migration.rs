//! Whole migrations of the real parts in one thread, under a made-up clock and seeded choices.
#![allow(missing_docs)]

use dray_driver::DriverConfig;
use dray_migration::{Outcome, Owner, Phase, Reason, Refusal};
use dray_tests::moving::Moving;
use dray_tests::plan::Plan;
use dray_tests::rig::{MANAGEMENT, MIGRATABLE, NSID};
use dray_workload::guest::GuestStage;
use std::time::Instant;

/// The steps of a switch-over that take more than one poll.
const STEPS: [&str; 10] =
    ["prepare", "suspend", "drain", "last_round", "flush", "read_state", "fence", "record", "set_state", "resume"];

/// A guest whose driver gives up on a controller soon.
fn impatient(mut plan: Plan) -> Plan {
    plan.guest_driver = DriverConfig { io_timeout_ms: 5, admin_timeout_ms: 20, ..DriverConfig::default() };
    plan
}

fn blocks(mut plan: Plan, bytes: u32) -> Plan {
    (plan.block_bytes, plan.destination_block) = (bytes, bytes);
    plan
}

#[test]
fn many_seeds_move_with_nothing_lost() {
    for seed in 0..200 {
        let plan = Plan::sized(seed, 4 << 20, if seed % 2 == 0 { 512 } else { 4096 });
        let mut moving = Moving::new(&plan);
        moving.pass(2_000);
        moving.start();
        moving.run_and_judge();
        let slips = moving.report.policies.iter().map(|(_, p)| p.stats.faults + p.stats.fallbacks + p.omissions);
        assert_eq!(slips.sum::<u64>(), 0, "seed {seed}");
        let calls = moving.report.policies.iter().map(|(_, p)| p.stats.calls);
        assert!(calls.min() > Some(0), "seed {seed}: a policy was not asked");
    }
}

#[test]
fn a_namespace_of_64_mib_moves() {
    for (seed, block) in [(1, 512), (2, 4096)] {
        let mut plan = Plan::sized(seed, 64 << 20, block);
        plan.targets = 2048;
        let mut moving = Moving::new(&plan);
        moving.pass(5_000);
        moving.start();
        moving.run_and_judge();
        let report = &moving.report;
        assert!(report.rounds.count() >= 1 && report.zero_bytes > 0 && report.checksums > 0, "{report:?}");
        assert!(report.downtime_us.is_some_and(|us| us > 0 && us < 10_000), "{report:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut moving = Moving::new(&Plan::small(seed));
        moving.start();
        moving.run_and_judge();
        (moving.trace, moving.now, format!("{:?}", moving.report))
    };
    let first = run(7);
    assert_eq!(first, run(7));
    assert_ne!(first.0, run(8).0);
}

#[test]
fn virtual_time_is_much_faster_than_real_time() {
    let mut plan = Plan::sized(3, 4 << 20, 4096).with(|config| config.max_bytes_per_s = 1 << 20);
    plan.load.rate = 500;
    let begin = Instant::now();
    let mut moving = Moving::new(&plan);
    moving.start();
    moving.run_and_judge();
    let (made_up, real) = (moving.now.0, begin.elapsed());
    assert!(moving.report.duration_us > 2_500_000, "the rate limit holds: {:?}", moving.report);
    assert!(u128::from(made_up) > 2 * real.as_nanos(), "{made_up} ns of virtual time took {real:?}");
}

#[test]
fn resets_at_random_moments_lose_nothing() {
    let mut moved = 0;
    for seed in 0..120 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut moving = Moving::new(&impatient(Plan::sized(seed, 2 << 20, 4096)));
        moving.paper.set_delay_us(random.u64(0..2_000));
        moving.start();
        for _ in 0..random.u32(1..4) {
            moving.turns(random.u64(0..3_000));
            if random.bool() && moving.tenants[0].handle.stage() == GuestStage::Running {
                moving.reset_controller(0);
            } else {
                moving.tenants[0].handle.request_reset();
            }
        }
        moved += u32::from(moving.run() == Outcome::Moved);
        moving.goes_on();
        moving.judge();
    }
    assert!(moved > 100, "{moved} have moved");
}

#[test]
fn resets_at_every_step_of_the_switch_over_lose_nothing() {
    for (index, step) in STEPS.iter().enumerate() {
        for seed in 0..6 {
            let mut moving = Moving::new(&impatient(Plan::sized(100 * index as u64 + seed, 2 << 20, 512)));
            moving.paper.set_delay_us(1_000);
            moving.start();
            moving.until(step, |moving| moving.is_at(step) || moving.migration.as_ref().is_none_or(|m| m.phase() == Phase::Ended));
            let most = if *step == "record" { 2_000 } else { 10 };
            moving.turns(fastrand::Rng::with_seed(seed).u64(0..most));
            moving.reset_controller(0);
            assert_eq!(moving.run(), Outcome::Moved, "{step}, seed {seed}: {:?}", moving.report);
            moving.goes_on();
            moving.judge();
        }
    }
}

#[test]
fn a_guest_that_resets_behind_the_fence_is_served_again_on_either_side() {
    let (mut moved, mut undone) = (0, 0);
    for seed in 0..24 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut moving = Moving::new(&Plan::sized(500 + seed, 2 << 20, 512));
        moving.paper.set_delay_us(2_000);
        moving.start();
        moving.until("record", |moving| moving.is_at("record"));
        assert!(moving.machines[0].fences[0].is_up(), "the record is written behind the fence");
        moving.turns(random.u64(0..50));
        let handle = moving.tenants[0].handle.clone();
        let before = handle.counters();
        handle.request_reset();
        moving.turns(random.u64(0..400));
        if seed % 2 == 0 {
            moving.migration.as_mut().expect("a migration").cancel();
        }
        match moving.run() {
            Outcome::Moved => moved += 1,
            Outcome::Undone(Reason::Cancelled) => undone += 1,
            other => panic!("seed {seed}: {other:?}"),
        }
        moving.goes_on();
        // The one behind the fence was enough; the other is that of `goes_on`.
        let after = handle.counters();
        assert_eq!((after.resets, after.surprises), (before.resets + 2, before.surprises), "seed {seed}");
        moving.judge();
    }
    assert!(moved >= 10 && undone >= 10, "{moved} moved, {undone} undone");
}

#[test]
fn cancelled_at_any_moment_the_source_serves_and_a_second_attempt_succeeds() {
    let (mut undone, mut phases) = (0, std::collections::BTreeSet::new());
    for seed in 0..100 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut moving = Moving::new(&Plan::sized(seed, 2 << 20, 512));
        moving.paper.set_delay_us(random.u64(0..500));
        moving.start();
        if seed % 3 == 0 {
            let step = STEPS[random.usize(0..STEPS.len())];
            moving.until(step, |m| m.is_at(step) || m.migration.as_ref().is_none_or(|m| m.phase() == Phase::Ended));
        } else {
            moving.turns(random.u64(0..5_000));
        }
        let migration = moving.migration.as_mut().expect("a migration");
        phases.insert(format!("{:?}", migration.phase()));
        migration.cancel();
        match moving.run() {
            Outcome::Moved => assert_eq!(moving.owner, 1),
            Outcome::Undone(Reason::Cancelled) => {
                undone += 1;
                assert_eq!(moving.owner, 0);
                assert!(!moving.machines[0].fences[0].is_up(), "the fence is down");
                assert!(moving.paper.records().last().is_none_or(|record| record.owner == Owner::Source && !record.fenced));
                let writes = moving.tenants[0].handle.counters().writes;
                moving.until("the source serves", |m| m.tenants[0].handle.counters().writes > writes + 50);
                moving.start();
                assert_eq!(moving.run(), Outcome::Moved, "seed {seed}: {:?}", moving.report);
                let first = moving.report.rounds.iter().next().copied().expect("a round");
                assert!(first.full && first.bytes >= 2 << 20, "the map was complete: {first:?}");
            }
            other => panic!("seed {seed}: {other:?}"),
        }
        moving.goes_on();
        moving.judge();
    }
    assert!(undone > 40, "{undone} were undone");
    assert!(phases.len() >= 4, "{phases:?}");
}

#[test]
fn a_cancelled_migration_leaves_every_acknowledged_write_at_the_source() {
    for seed in 0..20 {
        let mut moving = Moving::new(&Plan::sized(seed, 2 << 20, 4096));
        moving.start();
        moving.turns(fastrand::Rng::with_seed(seed).u64(0..6_000));
        moving.migration.as_mut().expect("a migration").cancel();
        let _outcome = moving.run();
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn two_controllers_of_one_namespace_move_together() {
    for seed in 0..30 {
        let mut moving = Moving::new(&Plan::sized(seed, 4 << 20, 512).guests(2));
        moving.pass(2_000);
        moving.start();
        moving.run_and_judge();
        let cdq = moving.report.policies.iter().filter(|(role, p)| *role == "cdq" && p.stats.items > 0).count();
        assert_eq!(cdq, 2, "both queues were drained");
    }
}

#[test]
fn there_and_back_again() {
    for seed in 0..20 {
        let mut moving = Moving::new(&Plan::sized(seed, 4 << 20, if seed % 2 == 0 { 512 } else { 4096 }));
        for leg in 0..4 {
            moving.start();
            assert_eq!(moving.run(), Outcome::Moved, "seed {seed}, leg {leg}: {:?}", moving.report);
            assert_eq!(moving.owner, (leg + 1) % 2);
            moving.goes_on();
        }
        moving.judge();
    }
}

/// It is refused for that reason, and the source serves as if nothing had been.
#[track_caller]
fn refused(moving: &mut Moving, refusal: &Refusal) {
    moving.start();
    assert_eq!(moving.run(), Outcome::Undone(Reason::Refused(refusal.clone())));
    assert!(moving.paper.records().is_empty(), "nothing was begun");
    moving.goes_on();
    moving.judge();
}

#[test]
fn what_cannot_be_moved_is_refused() {
    // A writer outside the set.
    let mut moving = Moving::new(&Plan::small(1).guests(2));
    moving.config.controllers.pop();
    refused(&mut moving, &Refusal::OtherWriter { cntlid: MIGRATABLE + 1, nsid: NSID });

    // Sizes.
    let mut plan = blocks(Plan::small(2), 4096);
    plan.destination_bytes -= 4096;
    let (source_blocks, destination_blocks) = (2048, 2047);
    refused(&mut Moving::new(&plan), &Refusal::TooSmall { nsid: NSID, source_blocks, destination_blocks });
    let mut plan = Plan::small(3);
    plan.destination_block = 4096;
    let (source_bytes, destination_bytes) = (512, 4096);
    refused(&mut Moving::new(&plan), &Refusal::OtherBlocks { nsid: NSID, source_bytes, destination_bytes });

    // A controller that is not there, and nothing to move.
    let mut moving = Moving::new(&Plan::small(4));
    moving.config.controllers = vec![(MIGRATABLE, 77)];
    refused(&mut moving, &Refusal::NotAttached { side: "destination", cntlid: 77, nsid: NSID });
    let mut moving = Moving::new(&Plan::small(5));
    moving.config.namespaces.clear();
    refused(&mut moving, &Refusal::Empty);
}

#[test]
fn a_controller_that_manages_no_migration_is_refused() {
    let mut plan = Plan::small(6);
    // The slot of the "management controller" has an ordinary one behind it.
    plan.management = MIGRATABLE + 1;
    plan.spare = true;
    let mut moving = Moving::new(&plan);
    assert_ne!(plan.management, MANAGEMENT);
    refused(&mut moving, &Refusal::Controller { side: "source", what: "does not support live migration (HMLMS)" });
}
