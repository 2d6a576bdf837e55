use super::*;
use crate::{Limits, Reason, Step};
use dray_nvme::status::Status;

/// Cancels, or breaks, at many moments: whatever the moment, the source serves with nothing lost, or the destination has it all.
#[test]
fn rule_10_cancelled_at_any_time_the_source_serves() {
    for moment in 0..140 {
        let mut world = World::new(config(), |s, d| (s.lock().delay, d.lock().delay) = (2_000, 4_000));
        for _ in 0..moment {
            world.step();
        }
        world.migration.cancel();
        match world.run() {
            Outcome::Undone(Reason::Cancelled) => world.assert_source_serves(),
            Outcome::Moved => world.assert_equal(),
            other => panic!("moment {moment}: {other:?}"),
        }
    }
}

fn fails_at(step: Step, outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Undone(Reason::SwitchOver { step: at, .. }) if *at == step)
}

#[test]
fn every_step_of_the_switch_over_has_its_way_back() {
    // Suspend at the source.
    let mut world = World::new(config(), |_, _| {});
    world.until(Phase::SwitchingOver);
    world.source.lock().refuse.insert(0x41, Status::INTERNAL_ERROR);
    world.run_until(|world| world.migration.report().attempts >= 1 && world.migration.phase() == Phase::Undoing);
    world.source.lock().refuse.clear();
    let outcome = world.run();
    assert!(outcome == Outcome::Moved || fails_at(Step::Suspend, &outcome), "{outcome:?}");

    // Get Controller State.
    let mut world = World::new(config(), |s, _| s.lock().refuse.extend([(0x42, Status::INTERNAL_ERROR)]));
    let outcome = world.run();
    assert!(fails_at(Step::ReadState, &outcome), "{outcome:?}");
    assert_eq!(world.migration.report().attempts, 3);
    world.assert_source_serves();

    // The record.
    let mut world = World::new(config(), |_, _| {});
    world.until(Phase::SwitchingOver);
    *world.paper.fails.lock().expect("fails") = 1;
    world.run_until(|world| world.migration.report().attempts == 2);
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
}

#[test]
fn rule_9_an_undo_after_the_fence_records_first_and_resumes_last() {
    let mut world = World::new(config(), |_, _| {});
    world.run_until(|world| world.log.lock().expect("log").iter().any(|line| line == "s suspend 1"));
    world.destination.lock().refuse.insert(0x41, Status::INTERNAL_ERROR);
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(_)), "{outcome:?}");
    world.assert_source_serves();
    let log = world.log.lock().expect("log").clone();
    let at = |what: &str| log.iter().rposition(|line| line == what).unwrap_or_else(|| panic!("{what}: {log:?}"));
    let order = ["fence up", "record Source Copying", "fence down", "point source", "s resume 1"];
    assert!(order.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "{log:?}");
}

#[test]
fn a_resume_of_unknown_outcome_is_found_out() {
    for applied in [true, false] {
        let mut world = World::new(config(), |_, _| {});
        world.until(Phase::SwitchingOver);
        world.destination.lock().unknown_resume = Some(applied);
        let outcome = world.run();
        assert_eq!(outcome, Outcome::Moved, "suspended still: undone and tried again; active: it has moved");
        assert_eq!(world.migration.report().attempts, if applied { 1 } else { 2 });
        world.assert_equal();
    }
}

#[test]
fn a_destination_that_cannot_be_reached_after_resume_leaves_it_in_doubt() {
    let mut hasty = config();
    hasty.limits = Limits { undo_ms: 50, ..Limits::default() };
    let mut world = World::new(hasty, |_, _| {});
    world.until(Phase::SwitchingOver);
    world.destination.lock().unknown_resume = Some(false);
    world.run_until(|world| world.log.lock().expect("log").iter().any(|line| line == "d resume 11"));
    world.destination.lock().refuse.insert(0x42, Status::INTERNAL_ERROR);
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::InDoubt { .. }), "{outcome:?}");
    assert!(world.source.lock().controllers[&SOURCE].suspended, "the guest stays paused");
}

#[test]
fn a_state_read_while_not_suspended_is_never_used() {
    let mut world = World::new(config(), |s, _| s.lock().no_csup = true);
    let outcome = world.run();
    assert!(fails_at(Step::ReadState, &outcome), "{outcome:?}");
    world.assert_source_serves();
    assert!(!world.log.lock().expect("log").iter().any(|line| line == "fence up"));
}

#[test]
fn a_full_queue_during_the_switch_over_undoes_it_and_everything_is_copied_again() {
    let mut small = config();
    small.cdq_slots = 64;
    let mut world = World::new(small, |_, d| d.lock().delay = 50_000);
    world.writes = 0;
    world.until(Phase::SwitchingOver);
    world.burst(100);
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!(world.migration.report().attempts, 2);
    world.assert_equal();
}

#[test]
fn limits_of_the_host_end_what_does_not_converge() {
    let mut tight = config();
    tight.limits = Limits { downtime_budget_us: 1, max_rounds: 5, ..Limits::default() };
    let mut world = World::new(tight, |s, d| (s.lock().delay, d.lock().delay) = (5_000, 5_000));
    world.writes = 30;
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::NotConverging { budget_us: 1, .. })), "{outcome:?}");
    world.assert_source_serves();
}

#[test]
fn a_throttle_is_lifted_by_the_undo() {
    let mut tight = config();
    tight.may_throttle = true;
    tight.limits = Limits { downtime_budget_us: 1, max_rounds: 3, guest_floor: 4000, ..Limits::default() };
    let mut world = World::new(tight, |s, d| (s.lock().delay, d.lock().delay) = (5_000, 5_000));
    world.writes = 30;
    world.run_until(|world| world.source.lock().limit > 0);
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::NotConverging { .. })), "{outcome:?}");
    world.assert_source_serves();
}

/// A Suspend that was under way when its attempt was undone may come to be afterwards.
#[test]
fn a_source_that_an_earlier_attempt_left_suspended_is_resumed() {
    let mut world = World::new(config(), |s, _| s.lock().controllers.get_mut(&SOURCE).expect("controller").suspended = true);
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
    let log = world.log.lock().expect("log").clone();
    let at = |what: &str| log.iter().position(|line| line == what).unwrap_or_else(|| panic!("{what}: {log:?}"));
    assert!(at("s resume 1") < at("s log true 1"), "{log:?}");

    // One that cannot be resumed ends the attempt.
    let mut world = World::new(config(), |s, _| {
        let mut inner = s.lock();
        inner.controllers.get_mut(&SOURCE).expect("controller").suspended = true;
        inner.refuse.insert(0x41, Status::INTERNAL_ERROR);
    });
    let outcome = world.run();
    assert!(matches!(&outcome, Outcome::Undone(Reason::Source(what)) if what.contains("Controller Suspended")), "{outcome:?}");
}

#[test]
fn a_throttle_that_does_not_help_ends_after_a_cut_for_each_halving() {
    let mut tight = config();
    tight.may_throttle = true;
    tight.limits = Limits { downtime_budget_us: 1, max_rounds: 3, guest_floor: 1, throttle_ms: 20, ..Limits::default() };
    let mut world = World::new(tight, |s, d| (s.lock().delay, d.lock().delay) = (5_000, 5_000));
    world.writes = 30;
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::NotConverging { .. })), "{outcome:?}");
    assert!(world.now / 1_000_000 < 34 * 20 + 200, "{} ms", world.now / 1_000_000);
    world.assert_source_serves();
}

/// A guest that writes nothing makes no rounds, and what was dear in the first one must not count for ever.
#[test]
fn costs_that_were_seen_at_a_bad_moment_are_looked_at_again() {
    let mut tight = config();
    tight.limits = Limits { downtime_budget_us: 2_000, max_time_ms: 2_000, ..Limits::default() };
    let mut world = World::new(tight, |_, d| d.lock().delay = 3_000_000);
    world.writes = 0;
    world.run_until(|world| world.migration.report().rounds.count() > 0);
    world.destination.lock().delay = 0;
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!(world.migration.report().rounds.count(), 1, "a look is no round");
    world.assert_equal();
}
