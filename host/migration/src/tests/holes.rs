use super::*;
use crate::{Limits, Reason};
use dray_nvme::status::Status;
use dray_policy::seam::{Exchange, Identity, Opening, SeatStats};

/// Answers some polls later, so that entries are always out with it while a guest writes.
struct Late {
    inner: Box<dyn Seat<Cdq>>,
    held: Option<(u32, Box<Exchange<Cdq>>)>,
}

impl Seat<Cdq> for Late {
    fn identity(&self) -> Identity {
        self.inner.identity()
    }
    fn open(&mut self, opening: Opening<Cdq>) {
        self.inner.open(opening);
    }
    fn ask(&mut self, exchange: Box<Exchange<Cdq>>) {
        self.inner.ask(exchange);
        self.held = self.inner.poll().map(|exchange| (5, exchange));
    }
    fn poll(&mut self) -> Option<Box<Exchange<Cdq>>> {
        let (polls, exchange) = self.held.take()?;
        if polls == 0 {
            return Some(exchange);
        }
        self.held = Some((polls - 1, exchange));
        None
    }
    fn stats(&self) -> SeatStats {
        self.inner.stats()
    }
}

fn late() -> Box<dyn Seat<Cdq>> {
    Box::new(Late { inner: seat::<Cdq>(), held: None })
}

#[test]
fn tracking_starts_anew_although_the_queue_is_never_seen_empty() {
    let mut world = World::with(config(), |s, _| s.lock().wakes_at_fence = 1, late());
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!(world.migration.report().attempts, 2);
    assert!(said(&world, "s log false 1"), "tracking was started anew");
    world.assert_equal();
}

#[test]
fn tracking_that_cannot_be_stopped_ends_the_migration() {
    let mut hasty = config();
    hasty.limits = Limits { step_ms: 20, ..Limits::default() };
    let mut world = World::with(hasty, |s, _| s.lock().wakes_at_fence = 1, late());
    world.run_until(|world| said(world, "fence up"));
    world.source.lock().refuse.insert(0x3d, Status::INTERNAL_ERROR);
    let outcome = world.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::Source(_))), "{outcome:?}");
    world.assert_source_serves();
}

/// A migration that was cancelled while its Track Send (stop) was under way.
fn cancelled_while_it_stops(limits: Limits) -> World {
    let mut small = config();
    (small.cdq_slots, small.limits) = (64, limits);
    let mut world = World::new(small, |_, d| d.lock().delay = 50_000);
    world.until(Phase::Copying);
    world.source.lock().slow.insert(0x3d);
    world.burst(100);
    world.run_until(|world| !world.source.lock().slow_now.is_empty());
    world.migration.cancel();
    for _ in 0..500 {
        world.step();
    }
    world
}

#[test]
fn an_undo_waits_for_a_stop_under_way() {
    let mut world = cancelled_while_it_stops(Limits::default());
    assert_eq!(world.migration.phase(), Phase::Undoing, "a stop that comes later would end the log of the next attempt");
    world.source.catch_up();
    assert_eq!(world.run(), Outcome::Undone(Reason::Cancelled));
    world.assert_source_serves();
    assert!(!said(&world, "s reset"));
}

#[test]
fn a_stop_that_is_never_answered_ends_by_a_reset() {
    let mut world = cancelled_while_it_stops(Limits { undo_ms: 20, ..Limits::default() });
    assert_eq!(world.run(), Outcome::Undone(Reason::Cancelled));
    assert!(said(&world, "s reset") && world.source.lock().slow_now.is_empty());
    world.assert_source_serves();
}

#[test]
fn logging_that_was_stopped_while_copying_is_a_hole() {
    let mut world = World::new(config(), |_, d| d.lock().delay = 50_000);
    world.until(Phase::Copying);
    world.run_until(|world| world.migration.report().rounds.count() > 0 || world.migration.media().dirty_bytes() < 1 << 20);
    world.source.stop_logging(SOURCE);
    assert_eq!(world.run(), Outcome::Moved);
    let report = world.migration.report();
    assert_eq!((report.attempts, report.fills), (1, 0), "no queue was too small");
    world.assert_equal();
}

#[test]
fn logging_that_was_stopped_during_the_switch_over_undoes_it() {
    let mut world = World::new(config(), |_, d| d.lock().delay = 50_000);
    world.until(Phase::SwitchingOver);
    world.source.stop_logging(SOURCE);
    world.source.guest_write(SOURCE, 7, 1, 0x77);
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!((world.migration.report().attempts, world.migration.report().fills), (2, 0));
    world.assert_equal();
}

#[test]
fn logging_that_was_stopped_during_an_undo_is_not_forgotten() {
    let mut world = World::new(config(), |_, _| {});
    world.until(Phase::SwitchingOver);
    *world.paper.fails.lock().expect("fails") = 1;
    world.until(Phase::Undoing);
    world.source.stop_logging(SOURCE);
    assert_eq!(world.run(), Outcome::Moved);
    assert_eq!((world.migration.report().attempts, world.migration.report().fills), (2, 0));
    world.assert_equal();
}

#[test]
fn logging_that_is_stopped_again_and_again_ends_the_migration() {
    let mut world = World::new(config(), |_, d| d.lock().delay = 50_000);
    world.run_until(|world| {
        if world.migration.phase() == Phase::Copying && world.source.lock().controllers[&SOURCE].logging {
            world.source.stop_logging(SOURCE);
        }
        world.migration.phase() == Phase::Ended
    });
    let outcome = world.migration.outcome();
    assert!(matches!(outcome, Outcome::Undone(Reason::Source(_))), "{outcome:?}");
    world.assert_source_serves();
}
