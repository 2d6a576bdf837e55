//! The hand-over: a VM manager pauses the guest, carries its states and has it go on, or takes it back, at any time.

use super::fake::Controller;
use super::*;
use crate::hand_over::Stage;
use crate::hooks::RecordPhase;
use crate::{HandOver, Limits, Reason};
use dray_nvme::status::Status;

/// Short enough that a test sees a limit pass.
fn hasty() -> MigrationConfig {
    MigrationConfig { limits: Limits { step_ms: 50, undo_ms: 200, ..Limits::default() }, ..config() }
}

fn world(config: MigrationConfig, prepare: impl FnOnce(&Drive, &Drive)) -> (World, HandOver) {
    let desk = HandOver::new();
    let of = desk.clone();
    let world = World::of(prepare, seat::<Cdq>(), seat::<Copy>(), |with| Migration::hand_over(config, with, of, Time(0)).expect("migration"));
    (world, desk)
}

fn until(world: &mut World, desk: &HandOver, stage: &Stage) {
    world.run_until(|_| desk.stage() == *stage);
}

/// So many steps, whatever happens.
fn steps(world: &mut World, steps: u32) {
    (0..steps).for_each(|_| world.step());
}

/// Everything up to the states in the VM manager's hands.
fn told(world: &mut World, desk: &HandOver) -> Vec<Vec<u8>> {
    until(world, desk, &Stage::Copying);
    steps(world, 200);
    desk.pause();
    until(world, desk, &Stage::Told);
    desk.states().expect("states")
}

fn with<T>(drive: &Drive, cntlid: u16, look: impl FnOnce(&mut Controller) -> T) -> T {
    look(drive.lock().controllers.get_mut(&cntlid).expect("a controller"))
}

fn serves_again(world: &mut World, reason: &Reason) {
    assert_eq!(world.run(), Outcome::Undone(reason.clone()));
    world.assert_source_serves();
    assert!(!said(world, "d resume 11") && !said(world, "destination admitted"));
}

#[test]
fn the_guest_goes_over_when_its_manager_says_so_and_in_this_order() {
    let (mut world, desk) = world(config(), |_, _| {});
    until(&mut world, &desk, &Stage::Copying);
    world.run_until(|world| world.migration.report().rounds.count() > 3);
    steps(&mut world, 500);
    assert_eq!((desk.stage(), desk.states()), (Stage::Copying, None), "rounds go on as long as the manager likes");
    assert!(!with(&world.source, SOURCE, |c| c.suspended));
    desk.pause();
    until(&mut world, &desk, &Stage::Paused);
    assert!(with(&world.source, SOURCE, |c| c.suspended) && desk.states().is_none());
    until(&mut world, &desk, &Stage::Told);
    let record = world.paper.durable.lock().expect("record").expect("a record");
    assert_eq!((record.owner, record.phase), (Owner::Destination, RecordPhase::Moved), "told behind the record");
    assert!(!desk.run(), "without its state nothing runs");
    let states = desk.states().expect("states");
    with(&world.destination, DESTINATION, |c| c.state = vec![9; 4]);
    assert!(desk.take(states));
    until(&mut world, &desk, &Stage::Taken);
    assert_eq!(with(&world.destination, DESTINATION, |c| c.state.clone()), vec![SOURCE as u8; 8]);
    assert!(!said(&world, "d resume 11"), "it waits for its manager");
    assert!(desk.run() && !desk.take_back(), "there may be no way back from here");
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!(desk.stage(), Stage::Ended(Outcome::Moved));
    world.assert_equal();
    let log = world.log.lock().expect("log").clone();
    let at = |what: &str| log.iter().rposition(|line| line == what).unwrap_or_else(|| panic!("{what}: {log:?}"));
    let order = [
        "s suspend 1",
        "d flush",
        "fence up",
        "record Destination Moved",
        "d set state 11",
        "destination admitted",
        "d resume 11",
    ];
    assert!(order.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "{log:?}");
    assert!(at("d resume 11") < at("record Destination Done"), "{log:?}");
    assert_eq!(count(&log, "point destination"), 0, "no slot is pointed");
}

#[test]
fn a_pause_before_everything_was_copied_once_copies_the_rest_and_takes_its_time() {
    let (mut world, desk) = world(hasty(), |_, d| d.lock().delay = 3_000_000);
    desk.pause();
    until(&mut world, &desk, &Stage::Paused);
    let begun = world.now;
    until(&mut world, &desk, &Stage::Told);
    assert!(world.now - begun > 50_000_000, "longer than a step may take: it was getting on");
    assert_eq!(world.migration.report().rounds.count(), 0);
    world.assert_equal();
}

#[test]
fn a_last_round_that_does_not_get_on_is_given_up() {
    let (mut world, desk) = world(hasty(), |_, _| {});
    until(&mut world, &desk, &Stage::Copying);
    world.destination.hold();
    desk.pause();
    world.run_until(|world| !world.migration.report().undone_attempts.is_empty());
    world.destination.let_go();
    until(&mut world, &desk, &Stage::Told);
    world.assert_equal();
}

#[test]
fn neither_rounds_nor_time_end_what_a_manager_drives() {
    let mut tight = config();
    tight.limits = Limits { step_ms: 100, max_rounds: 2, max_time_ms: 20, downtime_budget_us: 1, ..Limits::default() };
    let (mut world, desk) = world(tight, |_, _| {});
    until(&mut world, &desk, &Stage::Copying);
    world.run_until(|world| world.now > 1_000_000_000);
    assert_eq!(desk.stage(), Stage::Copying);
    told(&mut world, &desk);
    let last = world.now + 300_000_000;
    world.run_until(|world| world.now > last);
    assert_eq!(desk.stage(), Stage::Told, "its manager takes its time");
    let records = count(&world.log.lock().expect("log"), "record Source Copying");
    assert_eq!(records, 1, "nothing is written while it waits");
}

#[test]
fn it_is_taken_back_at_every_point_before_the_resume() {
    for stage in [Stage::Opening, Stage::Copying, Stage::Paused, Stage::Told, Stage::Taken] {
        let (mut world, desk) = world(config(), |_, _| {});
        match stage {
            Stage::Opening => {}
            Stage::Copying => until(&mut world, &desk, &Stage::Copying),
            Stage::Paused => {
                desk.pause();
                until(&mut world, &desk, &Stage::Paused);
            }
            _ => {
                let states = told(&mut world, &desk);
                if stage == Stage::Taken {
                    assert!(desk.take(states));
                    until(&mut world, &desk, &Stage::Taken);
                }
            }
        }
        assert!(desk.take_back(), "{stage:?}");
        assert!(!desk.run() && !desk.take(vec![vec![0; 48]]), "too late for the destination: {stage:?}");
        serves_again(&mut world, &Reason::TakenBack);
        assert_eq!((desk.stage(), desk.states()), (Stage::Ended(Outcome::Undone(Reason::TakenBack)), None));
        assert!(!desk.take_back() && !desk.run(), "it is over");
    }
}

#[test]
fn an_operator_may_cancel_what_was_told() {
    let (mut world, desk) = world(config(), |_, _| {});
    let states = told(&mut world, &desk);
    assert!(desk.take(states));
    until(&mut world, &desk, &Stage::Taken);
    assert!(desk.run());
    world.migration.cancel();
    serves_again(&mut world, &Reason::Cancelled);
}

#[test]
fn a_state_that_the_destination_refuses_can_be_brought_again() {
    let (mut world, desk) = world(config(), |_, _| {});
    let states = told(&mut world, &desk);
    world.destination.lock().refuse.insert(0x41, Status::INVALID_FIELD);
    assert!(desk.take(states.clone()));
    until(&mut world, &desk, &Stage::Told);
    assert!(desk.trouble().is_some_and(|why| why.contains("Suspend at the destination")), "{:?}", desk.trouble());
    world.destination.lock().refuse.clear();
    // The function was reset meanwhile, which ends a suspension: it is suspended again before it takes a state.
    with(&world.destination, DESTINATION, |c| c.suspended = false);
    assert!(desk.take(states));
    until(&mut world, &desk, &Stage::Taken);
    assert!(with(&world.destination, DESTINATION, |c| c.suspended) && desk.trouble().is_none());
    assert!(desk.run());
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
}

#[test]
fn a_state_that_takes_too_long_is_no_more_than_a_refusal() {
    let (mut world, desk) = world(hasty(), |_, _| {});
    let states = told(&mut world, &desk);
    world.destination.lock().slow.insert(0x41);
    assert!(desk.take(states.clone()));
    until(&mut world, &desk, &Stage::Told);
    assert_eq!(desk.trouble().as_deref(), Some("it took too long"));
    // What is late must not come behind the new state.
    assert!(desk.take(states));
    steps(&mut world, 50);
    assert_eq!((desk.stage(), count(&world.log.lock().expect("log"), "d set state 11")), (Stage::Taking, 0));
    world.destination.catch_up();
    until(&mut world, &desk, &Stage::Taken);
}

#[test]
fn a_destination_that_is_reset_forgets_its_state_and_does_not_run() {
    let (mut world, desk) = world(config(), |_, _| {});
    let states = told(&mut world, &desk);
    assert!(desk.take(states.clone()));
    desk.forget();
    steps(&mut world, 20);
    assert_eq!(desk.stage(), Stage::Told, "in the midst of it");
    assert!(desk.take(states.clone()));
    until(&mut world, &desk, &Stage::Taken);
    desk.forget();
    assert!(!desk.run());
    // Another one while the first is still being set: that one counts.
    assert!(desk.take(states.clone()));
    world.step();
    desk.forget();
    assert!(desk.take(states));
    until(&mut world, &desk, &Stage::Taken);
    assert!(desk.run());
    assert_eq!(world.run(), Outcome::Moved);
}

#[test]
fn a_resume_that_did_not_happen_leaves_both_ways_open() {
    for again in [true, false] {
        let (mut world, desk) = world(config(), |_, _| {});
        let states = told(&mut world, &desk);
        assert!(desk.take(states));
        until(&mut world, &desk, &Stage::Taken);
        world.destination.lock().unknown_resume = Some(false);
        assert!(desk.run());
        until(&mut world, &desk, &Stage::Taken);
        assert!(desk.trouble().is_some_and(|why| why.contains("Resume at the destination")));
        assert!(with(&world.source, SOURCE, |c| c.suspended), "nothing was undone for it");
        if again {
            assert!(desk.run());
            assert_eq!(world.run(), Outcome::Moved);
            world.assert_equal();
        } else {
            assert!(desk.take_back());
            assert_eq!(world.run(), Outcome::Undone(Reason::TakenBack));
            world.assert_source_serves();
            assert!(with(&world.destination, DESTINATION, |c| c.suspended));
        }
    }
}

#[test]
fn a_source_that_fails_behind_the_record_takes_nothing_back() {
    let (mut world, desk) = world(config(), |_, _| {});
    let states = told(&mut world, &desk);
    world.source.lock().health = crate::mmc::Health::Failed("gone".into());
    steps(&mut world, 100);
    assert_eq!(desk.stage(), Stage::Told);
    assert!(desk.take(states));
    until(&mut world, &desk, &Stage::Taken);
    assert!(desk.run());
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
}

#[test]
fn a_source_that_woke_up_is_found_out_before_its_state_is_told() {
    let (mut world, desk) = world(config(), |s, _| s.lock().wakes_at_fence = 1);
    told(&mut world, &desk);
    let report = world.migration.report();
    assert_eq!((report.attempts, report.undone_attempts.len()), (2, 1));
    world.assert_equal();
}
