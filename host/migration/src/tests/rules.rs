use super::*;
use crate::copy::{CopyConfig, OnMediaError};
use crate::mmc::Trust;
use crate::{Limits, Reason, Refusal, Step};
use dray_policy::role::Then;
use dray_policy::seam::{Exchange, Identity, Opening, SeatStats};

#[test]
fn a_namespace_moves_while_its_guest_writes() {
    let mut world = World::new(config(), |s, d| (s.lock().delay, d.lock().delay) = (3_000, 7_000));
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
    let report = world.migration.report();
    assert!(report.rounds.count() >= 1 && report.zero_bytes > 0 && report.checksums > 0, "{report:?}");
    assert!(report.policies.iter().all(|(_, p)| p.stats.calls > 0 && p.stats.faults == 0 && p.omissions == 0), "{report:?}");
    let steps: Vec<_> = report.parts.iter().map(|part| part.0).collect();
    let want = [
        Step::Prepare,
        Step::Suspend,
        Step::Drain,
        Step::LastRound,
        Step::Flush,
        Step::ReadState,
        Step::Fence,
        Step::Record,
        Step::Point,
        Step::SetState,
        Step::Resume,
    ];
    assert_eq!(steps, want);
    let sum: u64 = report.parts[1..].iter().map(|part| part.1).sum();
    assert!(report.downtime_us.expect("downtime") >= sum);
    let destination = world.destination.lock();
    assert_eq!(destination.controllers[&DESTINATION].state, vec![SOURCE as u8; 8], "the state has moved");
    assert!(!destination.controllers[&DESTINATION].suspended && world.source.lock().controllers[&SOURCE].suspended);
}

#[test]
fn rule_1_a_write_during_the_copy_is_copied_again() {
    // Writes between the read and the end of the write at the destination, on one hot block.
    let mut world = World::new(config(), |s, d| (s.lock().delay, d.lock().delay) = (20_000, 20_000));
    world.writes = 0;
    let mut byte = 0u8;
    world.run_until(|world| {
        byte = byte.wrapping_add(1);
        world.source.guest_write(SOURCE, 100, 1, byte);
        world.migration.phase() == Phase::Ended
    });
    assert_eq!(*world.migration.outcome(), Outcome::Moved);
    world.assert_equal();
}

#[test]
fn rule_2_no_two_copies_of_a_block_are_under_way() {
    let mut world = World::new(config(), |s, d| (s.lock().delay, d.lock().delay) = (5_000, 200_000));
    world.writes = 5;
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!((world.source.lock().overlaps, world.destination.lock().overlaps), (0, 0));
    world.assert_equal();
}

#[test]
fn rule_2_a_write_of_unknown_outcome_holds_its_range_until_the_destination_is_reset() {
    let mut world = World::new(config(), |_, d| d.lock().delay = 5_000);
    world.until(Phase::Copying);
    for _ in 0..20 {
        world.step();
    }
    world.destination.lock().swallow_writes = 1;
    assert_eq!(world.run(), Outcome::Moved);
    let log = world.log.lock().expect("log").clone();
    let reset = log.iter().position(|line| line == "d reset").expect("the destination was reset");
    let resume = log.iter().position(|line| line == "d resume 11").expect("resumed");
    assert!(reset < resume);
    world.assert_equal();
}

#[test]
fn rule_3_a_destination_that_restarts_gets_what_it_had_not_flushed() {
    let mut world = World::new(config(), |_, d| d.lock().delay = 5_000);
    world.until(Phase::Copying);
    world.run_until(|world| world.migration.progress(Time(world.now)).round_bytes > 1 << 20);
    // What was written and not flushed is lost with the reset; the queue dies.
    world.destination.lock().crash();
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
    let log = world.log.lock().expect("log").clone();
    let last_flush = log.iter().rposition(|line| line == "d flush").expect("flush");
    assert!(last_flush < log.iter().position(|line| line == "record Destination Moved").expect("record"));
    let before_suspend = log.iter().position(|line| line == "s suspend 1").expect("suspend");
    assert!(log[..before_suspend].iter().any(|line| line == "d flush"), "flushed before Suspend");
}

#[test]
fn rule_4_zeroes_are_written_over_what_the_destination_had() {
    let mut world = World::new(config(), |s, _| s.lock().media.fill(0));
    world.writes = 0;
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
    let report = world.migration.report();
    assert_eq!((report.zero_bytes, report.checksums), (BLOCKS * BLOCK as u64, 0));
}

#[test]
fn rule_5_other_writers_and_changes_of_attachment_are_refused_or_undo_the_move() {
    let mut world = World::new(config(), |s, _| s.lock().attached.push(2));
    let other = Refusal::OtherWriter { cntlid: 2, nsid: 1 };
    assert_eq!(world.run(), Outcome::Undone(Reason::Refused(other)));
    world.assert_source_serves();

    let mut world = World::new(config(), |_, _| {});
    world.until(Phase::Copying);
    world.source.lock().notices.push_back(crate::mmc::Notice { dw0: 2, dw1: 0 });
    assert_eq!(world.run(), Outcome::Undone(Reason::NamespacesChanged("source")));
    world.assert_source_serves();
}

#[test]
fn rule_5_tracking_runs_before_the_first_read() {
    let mut world = World::new(config(), |_, _| {});
    world.run_until(|world| !world.source.lock().under_way.is_empty());
    assert!(world.source.lock().controllers[&SOURCE].logging);
}

#[test]
fn sizes_that_do_not_fit_are_refused_with_both_numbers() {
    let mut world = World::new(config(), |_, d| d.lock().nsze = BLOCKS - 1);
    let small = Refusal::TooSmall { nsid: 1, source_blocks: BLOCKS, destination_blocks: BLOCKS - 1 };
    assert_eq!(world.run(), Outcome::Undone(Reason::Refused(small)));
}

#[test]
fn rule_7_what_the_queue_says_after_suspend_is_copied_before_resume() {
    let mut world = World::new(config(), |s, d| (s.lock().delay, d.lock().delay) = (1_000, 1_000));
    world.run_until(|world| {
        // The guest writes up to the very moment of the Suspend command.
        world.source.guest_write(SOURCE, 3000, 3, 0x77);
        world.log.lock().expect("log").iter().any(|line| line == "s suspend 1")
    });
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
}

#[test]
fn rule_8_a_full_queue_starts_tracking_anew_and_a_full_round_follows() {
    let mut small = config();
    small.cdq_slots = 64;
    let mut world = World::new(small, |s, d| (s.lock().delay, d.lock().delay) = (1_000, 1_000));
    world.until(Phase::Copying);
    for _ in 0..30 {
        world.step();
    }
    for lba in 0..200 {
        world.source.guest_write(SOURCE, 2 * lba, 1, 0x99);
    }
    assert!(world.source.lock().controllers[&SOURCE].full);
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
    let report = world.migration.report();
    assert_eq!(report.fills, 1);
    assert!(report.copied_bytes > BLOCKS * BLOCK as u64, "copied again");
}

#[test]
fn rule_8_a_queue_that_fills_again_and_again_is_enlarged() {
    let mut small = config();
    small.cdq_slots = 64;
    small.limits = Limits { max_fills: 1, max_cdq_slots: 4096, ..Limits::default() };
    let mut world = World::new(small, |s, d| (s.lock().delay, d.lock().delay) = (1_000, 1_000));
    let mut bursts = 0;
    world.until(Phase::Copying);
    world.run_until(|world| {
        let fits = world.source.lock().controllers[&SOURCE].slots > 64;
        bursts += 1;
        if bursts % 10 == 0 && !fits {
            world.burst(100);
        }
        world.migration.phase() == Phase::Ended
    });
    assert_eq!(*world.migration.outcome(), Outcome::Moved);
    assert!(world.log.lock().expect("log").iter().any(|line| line == "s create queue 1 256"));
    world.assert_equal();
}

#[test]
fn rule_8_a_queue_that_cannot_be_large_enough_ends_the_migration() {
    let mut small = config();
    small.cdq_slots = 64;
    small.limits = Limits { max_fills: 2, max_cdq_slots: 64, ..Limits::default() };
    let mut world = World::new(small, |_, _| {});
    world.run_until(|world| {
        world.burst(100);
        world.migration.phase() == Phase::Ended
    });
    assert_eq!(*world.migration.outcome(), Outcome::Undone(Reason::QueueFull(3)));
    world.assert_source_serves();
}

#[test]
fn rule_9_the_fence_is_up_before_the_record_and_the_record_durable_before_slots_and_resume() {
    let mut world = World::new(config(), |_, _| {});
    assert_eq!(world.run(), Outcome::Moved);
    let log = world.log.lock().expect("log").clone();
    let at = |what: &str| log.iter().position(|line| line == what).unwrap_or_else(|| panic!("{what}: {log:?}"));
    let order = ["s suspend 1", "fence up", "record Destination Moved", "point destination", "d set state 11", "d resume 11"];
    assert!(order.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "{log:?}");
}

#[test]
fn rule_9_a_source_that_did_not_stay_suspended_up_to_its_fence_is_not_given_up() {
    let mut world = World::new(config(), |s, _| s.lock().wakes_at_fence = 1);
    assert_eq!(world.run(), Outcome::Moved);
    let report = world.migration.report();
    assert_eq!(report.attempts, 2);
    let at_the_fence = matches!(report.undone_attempts[0], Reason::SwitchOver { step: Step::Fence, .. });
    assert!(at_the_fence && report.rounds.iter().filter(|round| round.full).count() == 2, "{report:?}");
    let log = world.log.lock().expect("log").clone();
    let up = log.iter().position(|line| line == "fence up").expect("up");
    let down = log.iter().position(|line| line == "fence down").expect("down");
    assert!(up < down && !log[up..down].iter().any(|line| line.starts_with("record")), "nothing durable to take back: {log:?}");
    world.assert_equal();
}

#[test]
fn rule_11_errors_are_retried_narrowed_and_at_last_listed() {
    let mut marking = config();
    marking.copy = CopyConfig { on_media_error: OnMediaError::Mark, ..CopyConfig::default() };
    let mut world = World::new(marking, |s, _| {
        let mut source = s.lock();
        source.unreadable.extend([70, 3099]);
        source.fail_reads = 3;
    });
    world.destination.lock().fail_writes = 2;
    world.writes = 0;
    assert_eq!(world.run(), Outcome::Moved);
    let lbas: Vec<_> = world.migration.report().uncorrectable.iter().map(|u| u.lba).collect();
    assert_eq!(lbas, [70, 3099]);
    assert_eq!(world.destination.lock().unreadable.iter().copied().collect::<Vec<_>>(), [70, 3099]);
    world.assert_equal();

    let mut world = World::new(config(), |s, _| s.lock().unreadable.extend([70]));
    let Outcome::Undone(Reason::Copy(crate::copy::CopyError::Media { lba: 70, .. })) = world.run() else {
        panic!("{:?}", world.migration.outcome())
    };
    world.assert_source_serves();
}

#[test]
fn a_drive_that_hides_changes_is_compared_and_what_differs_is_copied() {
    let hint = |s: &Drive, _: &Drive| s.lock().trust = Trust::Hint("drive X is not on the tested list".into());
    let mut world = World::new(config(), hint);
    let Outcome::Undone(Reason::CompareTooLong { .. }) = world.run() else { panic!("{:?}", world.migration.outcome()) };
    world.assert_source_serves();

    let mut patient = config();
    patient.limits.compare_budget_us = 10_000_000;
    let mut world = World::new(patient, hint);
    world.until(Phase::SwitchingOver);
    // A change that no entry tells of.
    world.source.lock().media[3500 * BLOCK] ^= 0xff;
    assert_eq!(world.run(), Outcome::Moved);
    world.assert_equal();
    let report = world.migration.report();
    assert!(report.different_blocks > 0 && report.compared_bytes == BLOCKS * BLOCK as u64, "{report:?}");
}

/// A copy policy beside the core: what it is asked while nothing is dirty it answers late, and then has time.
struct Slow {
    seat: Box<dyn Seat<Copy>>,
    answer: Option<Box<Exchange<Copy>>>,
    polls: u32,
    /// How often it was asked so.
    idle: Arc<Mutex<u32>>,
}

impl Seat<Copy> for Slow {
    fn identity(&self) -> Identity {
        self.seat.identity()
    }
    fn open(&mut self, opening: Opening<Copy>) {
        self.seat.open(opening);
    }
    fn ask(&mut self, exchange: Box<Exchange<Copy>>) {
        let idle = exchange.request.left_blocks == 0;
        self.polls = if idle { 1_000 } else { 0 };
        *self.idle.lock().expect("idle") += u32::from(idle);
        self.seat.ask(exchange);
    }
    fn poll(&mut self) -> Option<Box<Exchange<Copy>>> {
        self.answer = self.answer.take().or_else(|| self.seat.poll());
        if self.answer.is_some() && self.polls > 0 {
            self.polls -= 1;
            return None;
        }
        let mut answer = self.answer.take()?;
        if answer.answer.extents.is_empty() {
            answer.answer.wait_us = 100_000;
        }
        answer.answer.then = Then::GoOn;
        Some(answer)
    }
    fn stats(&self) -> SeatStats {
        self.seat.stats()
    }
}

#[test]
fn what_was_asked_before_a_round_is_asked_again_in_it() {
    let idle = Arc::new(Mutex::new(0));
    let slow = Slow { seat: seat::<Copy>(), answer: None, polls: 0, idle: Arc::clone(&idle) };
    let mut world = World::over(config(), |s, d| (s.lock().delay, d.lock().delay) = (1_000, 1_000), Box::new(slow));
    world.writes = 0;
    // Each write comes, and its round begins, while the policy still thinks about a time at which there was nothing to do.
    for byte in 0..5 {
        let before = *idle.lock().expect("idle");
        world.run_until(|_| *idle.lock().expect("idle") > before);
        world.source.guest_write(SOURCE, 700, 100, byte);
        world.run_until(|world| world.migration.progress(Time(world.now)).left_bytes > 0);
        world.run_until(|world| world.migration.progress(Time(world.now)).left_bytes == 0);
    }
    world.migration.cancel();
    let _outcome = world.run();
    let report = world.migration.report();
    assert!(report.rounds.count() >= 5, "{report:?}");
    assert!(report.policies.iter().all(|(_, p)| (p.omissions, p.late) == (0, 0)), "{report:?}");
}
