//! What an attempt leaves under way must not reach a later one: an undo waits for it, and ends it by a reset at last.

use super::*;
use crate::{Limits, Reason, Step};

/// Where a line of the log is.
fn at(world: &World, what: &str) -> usize {
    let log = world.log.lock().expect("log");
    log.iter().rposition(|line| line == what).unwrap_or_else(|| panic!("{what}: {log:?}"))
}

fn steps(world: &mut World, steps: usize) {
    for _ in 0..steps {
        world.step();
    }
}

/// A migration that was cancelled while the destination writes, and does not end these writes.
fn cancelled_while_it_writes(undo_ms: u64) -> World {
    let mut world = World::new(MigrationConfig { limits: Limits { undo_ms, ..Limits::default() }, ..config() }, |_, d| d.hold());
    world.run_until(|world| world.destination.writes_under_way() > 0);
    world.migration.cancel();
    world
}

#[test]
fn an_undo_waits_for_writes_under_way() {
    let mut world = cancelled_while_it_writes(Limits::default().undo_ms);
    steps(&mut world, 500);
    assert!(world.destination.writes_under_way() > 0);
    assert_eq!(world.migration.phase(), Phase::Undoing, "a write that lands later would come behind those of the next attempt");
    world.destination.let_go();
    assert_eq!(world.run(), Outcome::Undone(Reason::Cancelled));
    assert_eq!(world.destination.writes_under_way(), 0);
    assert!(!said(&world, "d reset"));
    world.assert_source_serves();
}

#[test]
fn a_write_that_never_ends_is_ended_by_a_reset_of_the_destination() {
    let mut world = cancelled_while_it_writes(20);
    assert_eq!(world.run(), Outcome::Undone(Reason::Cancelled));
    assert!(said(&world, "d reset"), "the write may land at any time");
    assert!(at(&world, "d reset") < at(&world, "s delete queue 1"));
    assert_eq!(world.destination.writes_under_way(), 0);
    assert!(world.destination.lock().media.iter().all(|&byte| byte == 0xa5), "no write has landed");
    world.assert_source_serves();
}

#[test]
fn a_write_of_unknown_outcome_counts_as_under_way() {
    let mut world = cancelled_while_it_writes(20);
    steps(&mut world, 10);
    world.destination.lose();
    steps(&mut world, 500);
    assert_eq!(world.destination.writes_under_way(), 0);
    assert_eq!(world.migration.phase(), Phase::Undoing, "nobody knows that it will not land any more");
    assert_eq!(world.run(), Outcome::Undone(Reason::Cancelled));
    assert!(at(&world, "d reset") < at(&world, "s delete queue 1"));
    world.assert_source_serves();
}

/// A migration whose Set Controller State at the destination is under way, and does not end.
fn while_it_sets_the_state(limits: Limits) -> World {
    let mut world = World::new(MigrationConfig { limits, ..config() }, |_, _| {});
    world.run_until(|world| said(world, "s suspend 1"));
    world.destination.lock().slow.insert(0x41);
    world.run_until(|world| !world.destination.lock().slow_now.is_empty());
    assert!(!said(&world, "d set state 11"));
    world
}

#[test]
fn an_undo_waits_for_a_set_controller_state_under_way() {
    let mut world = while_it_sets_the_state(Limits::default());
    world.migration.cancel();
    steps(&mut world, 500);
    assert!(!world.source.lock().controllers[&SOURCE].suspended, "the guest does not wait for it");
    assert_eq!(world.migration.phase(), Phase::Undoing, "a state that is set later would replace that of the next attempt");
    world.destination.catch_up();
    assert_eq!(world.run(), Outcome::Undone(Reason::Cancelled));
    assert!(at(&world, "d set state 11") < at(&world, "record Source Undone"));
    assert!(!said(&world, "d reset"));
    world.assert_source_serves();
}

#[test]
fn a_set_controller_state_that_never_ends_is_ended_by_a_reset_of_the_destination() {
    let mut world = while_it_sets_the_state(Limits { undo_ms: 20, ..Limits::default() });
    world.migration.cancel();
    assert_eq!(world.run(), Outcome::Undone(Reason::Cancelled));
    assert!(said(&world, "d reset") && world.destination.lock().slow_now.is_empty(), "the state may be set at any time");
    assert!(at(&world, "d reset") < at(&world, "s delete queue 1"));
    world.assert_source_serves();
}

#[test]
fn the_next_attempt_waits_for_the_set_controller_state_of_the_one_before() {
    let mut world = while_it_sets_the_state(Limits { step_ms: 20, ..Limits::default() });
    world.run_until(|world| world.migration.report().attempts == 2);
    world.source.lock().controllers.get_mut(&SOURCE).expect("controller").state = vec![0x22; 8];
    steps(&mut world, 200);
    assert_eq!(world.migration.phase(), Phase::SwitchingOver);
    assert_eq!(world.destination.lock().slow_now.len(), 1, "nothing is sent behind it");
    world.destination.catch_up();
    assert_eq!(world.destination.lock().controllers[&DESTINATION].state, [SOURCE as u8; 8], "what came late");
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!(world.migration.report().attempts, 2);
    assert_eq!(world.destination.lock().controllers[&DESTINATION].state, [0x22; 8]);
    world.assert_equal();
}

#[test]
fn attempts_end_while_a_set_controller_state_does_not() {
    let mut world = while_it_sets_the_state(Limits { step_ms: 20, undo_ms: 100, ..Limits::default() });
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::SwitchOver { step: Step::Prepare, .. })), "{outcome:?}");
    assert_eq!(world.migration.report().attempts, 3);
    assert!(at(&world, "d reset") < at(&world, "s delete queue 1"));
    world.assert_source_serves();
}

/// What was logged before the reset says nothing about what comes behind it, even where the suspension has outlived the reset
/// and Resume succeeds.
#[test]
fn a_suspend_that_never_ends_ends_by_a_reset_and_tracking_starts_anew() {
    let limits = Limits { step_ms: 20, ..Limits::default() };
    let mut world = World::new(MigrationConfig { limits, ..config() }, |_, _| {});
    world.until(Phase::Copying);
    world.source.lock().slow.insert(0x41);
    world.run_until(|world| !world.source.lock().slow_now.is_empty());
    world.until(Phase::Undoing);
    assert!(!said(&world, "s reset") && world.source.lock().slow_now.len() == 1, "Resume does not overtake it");
    world.run_until(|world| said(world, "s reset"));
    {
        let mut source = world.source.lock();
        source.slow.clear();
        source.controllers.get_mut(&SOURCE).expect("controller").suspended = true;
    }
    world.until(Phase::Copying);
    let outcome = world.run();
    assert!(at(&world, "s reset") < at(&world, "s resume 1"));
    assert!(said(&world, "s log false 1"), "tracking was started anew: {:?}", world.log.lock().expect("log"));
    assert!(at(&world, "s resume 1") < at(&world, "s log false 1") && at(&world, "s log false 1") < at(&world, "s log true 1"));
    // The reset has taken the queue that the copy reads through.
    assert_eq!(outcome, Outcome::Undone(Reason::Copy(crate::copy::CopyError::SourceDead)));
    world.assert_source_serves();
}
