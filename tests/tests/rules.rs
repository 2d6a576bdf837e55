//! The rules of the way of the data, a test each, over the real driver and the real controllers.
#![allow(missing_docs)]

use dray_device::backing::BackingOp;
use dray_device::space::AddressSpace;
use dray_device::slot::Slot;
use dray_driver::{AdminData, Driver, DriverConfig, DriverState};
use dray_device::poll::Poll;
use dray_migration::copy::CopyError;
use dray_migration::{OnMediaError, Outcome, Owner, Phase, Policies, Reason, RecordPhase, Step};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::feature::FeatureId;
use dray_nvme::status::Status;
use dray_policy::role::Cdq;
use dray_tests::disk::Failing;
use dray_tests::moving::Moving;
use dray_tests::odd::{Late, forgetful, ordering, whole};
use dray_tests::plan::{Plan, guarded, native, natives};
use dray_tests::rig::NSID;

const MIB: u64 = 1 << 20;

/// A guest that writes as fast as it can to a few blocks.
fn hot(mut plan: Plan) -> Plan {
    (plan.load.rate, plan.targets) = (0, 24);
    plan
}

/// The queue is drained at every poll: a change is marked while older copies of its block are under way.
fn eager() -> Policies {
    Policies { cdq: vec![Box::new(guarded(forgetful(|_| true)))], ..natives(1) }
}

fn failing(blocks: std::ops::Range<u64>, reads: bool, times: u32) -> Failing {
    let status = if reads { Status::UNRECOVERED_READ } else { Status::WRITE_FAULT };
    Failing { blocks, reads, times, status, touches: false }
}

#[track_caller]
fn moved(moving: &mut Moving) {
    assert_eq!(moving.run(), Outcome::Moved, "{:?}", moving.report);
}

/// After a failed attempt: the source serves, nothing is lost, and the next attempt, from a complete map, succeeds.
#[track_caller]
fn serves_and_moves_again(moving: &mut Moving, bytes: u64) {
    assert_eq!(moving.owner, 0);
    assert!(!moving.machines[0].fences[0].is_up(), "the fence is down");
    assert!(moving.paper.records().last().is_none_or(|record| record.owner == Owner::Source));
    moving.goes_on();
    moving.start();
    moved(moving);
    let first = moving.report.rounds.iter().next().copied().expect("a round");
    assert!(first.full && first.bytes >= bytes, "the map was complete: {first:?}");
    moving.goes_on();
    moving.judge();
}

#[test]
fn rule_01_clear_then_read() {
    // Blocks are written all the time between the read of their copy and its write; the last write counts.
    for seed in 0..20 {
        let mut moving = Moving::new(&hot(Plan::sized(seed, MIB, 4096)));
        // Reads take long, writes of the guest are told at once.
        moving.machines[0].disk.set_latency_ns((2_000, 300_000));
        moving.machines[1].disk.set_latency_ns((20_000, 300_000));
        moving.start_with(eager());
        moved(&mut moving);
        moving.judge();
        assert!(moving.report.copied_bytes > MIB, "{:?}", moving.report);
    }
}

#[test]
fn rule_02_one_copy_of_a_block_at_a_time() {
    // A policy that orders everything over and over again, in pieces that overlap; a destination that ends out of order.
    for seed in 0..10 {
        let mut moving = Moving::new(&hot(Plan::sized(seed, 2 * MIB, 512)));
        moving.machines[1].disk.set_latency_ns((1_000, 400_000));
        let mut policies = eager();
        policies.copy = Box::new(guarded(ordering(|dirty| {
            let all: Vec<_> = dirty.iter().map(whole).collect();
            let mut halves = all.clone();
            halves.iter_mut().for_each(|extent| extent.blocks = (extent.blocks / 2).max(1));
            [halves.clone(), all.clone(), halves, all].concat()
        })));
        moving.start_with(policies);
        moved(&mut moving);
        moving.judge();
        assert_eq!(moving.machines[1].disk.overlaps(), 0);
    }
}

#[test]
fn rule_02_a_write_of_unknown_outcome_holds_its_blocks_until_its_queue_is_dead() {
    for seed in 0..6 {
        let mut moving = Moving::new(&hot(Plan::sized(seed, MIB, 4096)));
        moving.start();
        moving.phase(Phase::Copying);
        moving.machines[1].disk.swallow(1);
        moving.until("a write is swallowed", |moving| moving.machines[1].disk.swallowed() == 1);
        let resets = |moving: &Moving| moving.machines[1].subsystem.counters().map(|(_, c)| c.resets).max();
        let before = resets(&moving);
        moving.until("the destination is reset", |moving| resets(moving) > before);
        // The old write reaches the media only now, and must not be the last one there.
        moving.pass(20_000);
        moving.machines[1].disk.give_back();
        moved(&mut moving);
        moving.judge();
    }
}

#[test]
fn rule_03_clean_means_flushed() {
    let (mut lost, mut done) = (0, 0);
    for seed in 0..40 {
        let mut moving = Moving::new(&Plan::sized(seed, 2 * MIB, 512));
        moving.machines[1].disk.set_cached(true);
        moving.machines[1].disk.set_latency_ns((20_000, 400_000));
        moving.start();
        moving.phase(Phase::Copying);
        moving.pass(fastrand::Rng::with_seed(seed).u64(0..1_500));
        moving.machines[1].crash();
        // What the destination has flushed at the moment of the record is all there is.
        moving.until("the record or the end", |moving| {
            moving.is_at("record") || moving.migration.as_ref().is_none_or(|m| m.phase() == Phase::Ended)
        });
        if moving.is_at("record") {
            assert_eq!(moving.machines[1].disk.unflushed(), 0, "seed {seed}: the destination has not flushed everything");
        }
        let outcome = moving.run();
        lost += moving.machines[1].disk.lost();
        done += u32::from(outcome == Outcome::Moved);
        moving.goes_on();
        moving.judge();
    }
    assert!(lost > 100 && done == 40, "{lost} writes were lost, {done} migrations moved");
}

#[test]
fn rule_04_zeroes_are_written() {
    let mut moving = Moving::new(&Plan::sized(4, 4 * MIB, 512));
    moving.machines[0].disk.fill(0);
    moving.machines[1].disk.watch();
    moving.start();
    moved(&mut moving);
    let report = &moving.report;
    assert!(report.zero_bytes > 3 * MIB && report.zero_bytes <= report.copied_bytes, "{report:?}");
    let seen = moving.machines[1].disk.take_seen();
    let zeroed: u64 = seen.iter().filter(|seen| matches!(seen.0, BackingOp::WriteZeroes { .. })).map(|seen| seen.2).sum();
    assert!(zeroed * 512 >= report.zero_bytes, "zeroes are sent as Write Zeroes");
    moving.goes_on();
    moving.judge();
}

#[test]
fn rule_05_the_migration_set_is_complete() {
    // Change is tracked on each controller of the set before the first read: what the other one writes at any time arrives.
    for seed in 0..20 {
        let mut moving = Moving::new(&Plan::sized(seed, MIB, 512).by_hand());
        moving.start();
        let (mut sent, mut random) = (0u8, fastrand::Rng::with_seed(seed));
        let hand_block = 8 * 5 + 1;
        moving.until("it switches over", |moving| {
            if random.u32(0..50) == 0 && moving.hand.as_ref().is_some_and(|hand| hand.ended.len() == usize::from(sent)) && sent < 200 {
                sent += 1;
                moving.hand.as_mut().expect("a hand").send(moving.now, &SubmissionEntry::write(NSID, hand_block, 1), 512, sent);
            }
            moving.is_at("suspend") || moving.migration.as_ref().is_none_or(|m| m.phase() == Phase::Ended)
        });
        moved(&mut moving);
        moving.until("the last write by hand", |moving| moving.hand.as_ref().is_some_and(|h| h.ended.len() == usize::from(sent)));
        assert!(moving.hand.as_ref().is_some_and(|hand| hand.ended.iter().all(|c| !c.status.is_error() && !c.unknown)));
        let at = (hand_block * 512) as usize;
        let (frozen, serving) = (moving.machines[0].disk.bytes(), moving.machines[1].disk.bytes());
        assert!(sent > 0 && serving[at] == sent, "seed {seed}: {} of {sent}", serving[at]);
        assert!(frozen[at] == sent || frozen[at] == sent - 1, "the last write may have ended at the destination");
        moving.machines[0].disk.put(at, &[sent; 512]);
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn rule_05_a_change_of_a_moving_namespace_undoes_the_move() {
    let mut moving = Moving::new(&Plan::small(5).by_hand());
    moving.start();
    moving.phase(Phase::Copying);
    // Write protection, there and back: an attribute of the namespace has changed.
    for value in [1, 0] {
        let mut entry = SubmissionEntry::set_features(FeatureId::NAMESPACE_WRITE_PROTECT, value, false);
        entry.nsid = NSID;
        let now = moving.now;
        let ticket = moving.hand.as_mut().expect("a hand").driver.request(now, &entry, AdminData::None).expect("sent");
        let mut answer = None;
        moving.until("write protection", |moving| {
            answer = moving.hand.as_mut().and_then(|hand| hand.driver.answer(ticket));
            answer.is_some()
        });
        assert!(!answer.expect("an answer").completion.status.is_error());
    }
    assert_eq!(moving.run(), Outcome::Undone(Reason::NamespacesChanged("source")));
}

#[test]
fn rule_06_a_failed_write_that_touched_the_media_is_copied() {
    for seed in 0..20 {
        let mut moving = Moving::new(&Plan::sized(seed, MIB, 512).by_hand());
        moving.start();
        let block = 8 * 3 + 1;
        moving.until("most is copied", |moving| {
            moving.migration.as_ref().is_none_or(|m| m.progress(moving.now).round_bytes >= MIB - 200_000)
        });
        moving.machines[0].disk.fail(Failing { touches: true, ..failing(block..block + 1, false, 1) });
        let now = moving.now;
        moving.hand.as_mut().expect("a hand").send(now, &SubmissionEntry::write(NSID, block, 1), 512, 0x6b);
        moved(&mut moving);
        moving.until("it has failed", |moving| moving.hand.as_ref().is_some_and(|hand| hand.ended.len() == 1));
        assert!(moving.hand.as_ref().is_some_and(|hand| hand.ended[0].status.is(Status::WRITE_FAULT)));
        let at = (block * 512) as usize;
        assert_eq!(moving.machines[1].disk.bytes()[at], 0x6b, "seed {seed}: it touched the media and was not copied");
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn rule_06_a_write_that_its_guest_no_longer_waits_for_is_copied() {
    let mut plan = Plan::sized(66, 4 * MIB, 4096);
    plan.guest_driver = DriverConfig { io_timeout_ms: 5, admin_timeout_ms: 20, ..DriverConfig::default() };
    for seed in 0..10 {
        plan.seed = seed;
        let mut moving = Moving::new(&plan);
        moving.machines[0].disk.swallow(3);
        moving.until("writes are swallowed", |moving| moving.machines[0].disk.swallowed() == 3);
        moving.start();
        moving.phase(Phase::Copying);
        moving.turns(500);
        // The guest gives the controller up; the writes reach the media later, and count as whatever the guest did not hear of.
        moving.reset_controller(0);
        moving.until("most is copied", |moving| {
            moving.migration.as_ref().is_none_or(|m| m.progress(moving.now).round_bytes >= 3 * MIB || m.phase() != Phase::Copying)
        });
        moving.machines[0].disk.give_back();
        moved(&mut moving);
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn rule_06_suspend_waits_for_the_backing() {
    for patience_us in [30_000, 100_000] {
        let mut moving = Moving::new(&Plan::sized(6, MIB, 4096).with(|config| config.limits.step_ms = 20));
        moving.machines[0].disk.swallow(1);
        moving.until("a write is swallowed", |moving| moving.machines[0].disk.swallowed() == 1);
        moving.start();
        moving.until("suspend", |moving| moving.is_at("suspend"));
        let mut further = false;
        let end = moving.now.after_us(patience_us);
        moving.until("some time", |moving| {
            further |= ["drain", "last_round", "read_state", "record"].iter().any(|step| moving.is_at(step));
            moving.now > end
        });
        assert!(!further, "suspended while a write was under way in the backing");
        moving.machines[0].disk.give_back();
        let outcome = moving.run();
        // The attempt was given up after 20 ms. While Suspend is not answered, that is undone by waiting, in the end by a reset.
        assert_eq!(outcome == Outcome::Moved, patience_us < 40_000, "{outcome:?}");
        assert_eq!(moving.report.undone_attempts.len(), 1);
        assert!(matches!(moving.report.undone_attempts[0], Reason::SwitchOver { step: Step::Suspend, .. }));
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn rule_07_switch_over_waits_for_what_lies_in_the_queue() {
    // A seat that is slow to answer: entries lie in the queue, and in the policy's hands, when the guest is suspended.
    for (seed, polls) in [(0, 40), (1, 200), (2, 1_000), (3, u32::MAX)].into_iter().cycle().take(12).enumerate().map(|(n, (s, p))| (n as u64 * 10 + s, p)) {
        let mut moving = Moving::new(&hot(Plan::sized(seed, MIB, 4096)));
        let mut policies = natives(1);
        policies.cdq = vec![Late::boxed(native::<Cdq>(), polls)];
        moving.start_with(policies);
        moved(&mut moving);
        moving.judge();
    }
}

#[test]
fn rule_08_after_a_full_queue_everything_is_copied_again() {
    for seed in 0..10 {
        let mut moving = Moving::new(&hot(Plan::sized(seed, MIB, 4096).with(|config| config.cdq_slots = 16)));
        moving.start();
        moving.until("most is copied", |moving| {
            moving.migration.as_ref().is_none_or(|m| m.progress(moving.now).round_bytes >= MIB / 2)
        });
        // Nobody drains for a while.
        moving.frozen = true;
        moving.pass(5_000);
        moving.frozen = false;
        moved(&mut moving);
        let report = &moving.report;
        assert!(report.fills >= 1, "{report:?}");
        assert!(report.copied_bytes >= MIB + MIB / 2, "a full round followed: {report:?}");
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn rule_08_a_queue_that_fills_again_and_again_is_enlarged_or_ends_the_migration() {
    let run = |slots: u32, max_cdq_slots: u32, may_throttle: bool| {
        let plan = hot(Plan::sized(8, MIB, 4096)).with(|config| {
            (config.cdq_slots, config.may_throttle) = (slots, may_throttle);
            (config.limits.max_fills, config.limits.max_cdq_slots) = (1, max_cdq_slots);
        });
        let mut moving = Moving::new(&plan);
        moving.start();
        let (mut next, mut limited) = (0, 0);
        moving.until("it ends", |moving| {
            // The migration is held up again and again for as long as the guest needs to fill 16 slots.
            next += 1;
            moving.frozen = next % 2_000 < 1_500;
            let migration = moving.migration.as_ref().expect("a migration");
            limited = limited.max(migration.progress(moving.now).guest_limit);
            migration.phase() == Phase::Ended
        });
        moving.frozen = false;
        let outcome = moving.run();
        moving.goes_on();
        moving.judge();
        (outcome, moving.report.fills, limited)
    };
    let (outcome, fills, _) = run(16, 4096, false);
    assert!(outcome == Outcome::Moved && fills >= 2, "{outcome:?} after {fills}");
    let (outcome, fills, _) = run(16, 16, false);
    assert_eq!((outcome, fills), (Outcome::Undone(Reason::QueueFull(2)), 2));
    let (_, fills, limited) = run(16, 16, true);
    assert!(limited > 0 && fills >= 2, "the guest is slowed down: {limited} after {fills}");
}

#[test]
fn rule_09_a_reset_of_the_guests_controller_while_the_record_is_written_serves_nobody_twice() {
    // The record takes so long that the guest could come up again at the source and write, after its state was read.
    for seed in 0..12 {
        let mut plan = Plan::sized(seed, MIB, 512);
        plan.guest_driver = DriverConfig { io_timeout_ms: 2, admin_timeout_ms: 5, ..DriverConfig::default() };
        let mut moving = Moving::new(&plan);
        moving.loose = true;
        moving.start();
        moving.phase(Phase::Copying);
        moving.paper.set_delay_us(30_000);
        moving.until("the record", |moving| moving.is_at("record"));
        moving.turns(fastrand::Rng::with_seed(seed).u64(0..200));
        moving.reset_controller(0);
        moving.until("the record is there", |moving| !moving.is_at("record"));
        moving.paper.set_delay_us(0);
        let _outcome = moving.run();
        moving.goes_on();
        moving.judge();
    }
}

#[test]
fn rule_09_a_reset_of_the_source_during_the_switch_over_serves_nobody_twice() {
    let mut undone = 0;
    for (index, step) in ["suspend", "drain", "last_round", "flush", "read_state", "record", "set_state", "resume"].iter().enumerate() {
        for seed in 0..4 {
            let mut moving = Moving::new(&Plan::sized(90 + 10 * index as u64 + seed, MIB, 512));
            moving.loose = true;
            moving.start();
            moving.phase(Phase::Copying);
            moving.paper.set_delay_us(3_000);
            moving.until(step, |moving| moving.is_at(step) || moving.migration.as_ref().is_none_or(|m| m.phase() == Phase::Ended));
            // The management controller is reset by somebody else: every suspension it had asked for ends.
            moving.machines[0].management.write32(dray_nvme::registers::offset::CC, 0);
            let outcome = moving.run();
            undone += u32::from(outcome != Outcome::Moved);
            assert!(!matches!(outcome, Outcome::InDoubt { .. }), "{step}: {outcome:?}");
            moving.goes_on();
            moving.judge();
        }
    }
    assert!(undone > 0);
}

#[test]
fn rule_09_a_destination_that_is_undone_has_served_nobody() {
    // A reset of its management controller ends the suspension of its controllers, the guest resets its own meanwhile, and the
    // slot points there already, or is about to: what it acknowledged then, the undo would take back.
    let mut undone = 0;
    for (index, step) in ["record", "set_state", "resume"].iter().enumerate() {
        for seed in 0..8 {
            let mut plan = Plan::sized(300 + 10 * index as u64 + seed, MIB, 512);
            plan.guest_driver = DriverConfig { io_timeout_ms: 2, admin_timeout_ms: 5, ..DriverConfig::default() };
            let mut moving = Moving::new(&plan.with(|config| config.limits.max_attempts = 1));
            moving.loose = true;
            let fetched = moving.machines[1].fetched(0);
            moving.start();
            moving.phase(Phase::Copying);
            moving.paper.set_delay_us(3_000);
            moving.until(step, |moving| moving.is_at(step) || moving.migration.as_ref().is_none_or(|m| m.phase() == Phase::Ended));
            moving.reset_controller(0);
            moving.turns(seed * 7);
            moving.machines[1].management.write32(dray_nvme::registers::offset::CC, 0);
            let outcome = moving.run();
            assert!(!matches!(outcome, Outcome::InDoubt { .. }), "{step}: {outcome:?}");
            if outcome != Outcome::Moved {
                undone += 1;
                assert_eq!(moving.machines[1].fetched(0), fetched, "{step}, seed {seed}: {outcome:?}");
            }
            moving.goes_on();
            moving.judge();
        }
    }
    assert!(undone > 0);
}

#[test]
fn rule_09_behind_its_fence_the_source_never_serves_again() {
    let mut moving = Moving::new(&Plan::small(9));
    moving.start();
    moved(&mut moving);
    let records = moving.paper.records();
    assert_eq!(records.last().map(|r| (r.owner, r.phase, r.fenced)), Some((Owner::Destination, RecordPhase::Done, true)));
    let fetched = moving.machines[0].fetched(0);
    // Its management controller is reset, and somebody else drives the controller that has moved.
    moving.machines[0].management.write32(dray_nvme::registers::offset::CC, 0);
    moving.pass(1_000);
    let slot = Slot::new(AddressSpace::default(), 2).expect("a slot");
    slot.point_at(&moving.machines[0].plugs[0]);
    let mut driver = Driver::new(slot.function(), DriverConfig { ready_timeout_ms: 20, ..DriverConfig::default() }).expect("a driver");
    moving.until("the driver gives up", |moving| {
        let _progress = driver.poll(moving.now);
        assert!(!driver.is_ready(), "a fenced controller was enabled");
        matches!(driver.state(), DriverState::Failed(_))
    });
    assert_eq!(moving.machines[0].fetched(0), fetched);
    moving.goes_on();
    moving.judge();
}

#[test]
fn rule_09_a_record_that_cannot_be_written_undoes_the_switch_over() {
    // Once: the next attempt succeeds. Always: the migration is undone.
    let mut moving = Moving::new(&Plan::sized(9, MIB, 512));
    moving.paper.fail(1, Some(Owner::Destination));
    moving.start();
    moved(&mut moving);
    assert_eq!((moving.paper.failed(), moving.report.attempts), (1, 2));
    moving.goes_on();
    moving.judge();

    let mut moving = Moving::new(&Plan::sized(9, MIB, 512));
    moving.paper.fail(u32::MAX, Some(Owner::Destination));
    moving.start();
    let outcome = moving.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::SwitchOver { step: Step::Record, .. })), "{outcome:?}");
    assert!(moving.paper.records().iter().all(|record| record.owner == Owner::Source && !record.fenced));
    moving.paper.fail(0, None);
    serves_and_moves_again(&mut moving, MIB);

    // Neither that one nor that of the undo: nobody knows who serves, so nobody does.
    let mut moving = Moving::new(&Plan::sized(10, MIB, 512).with(|config| config.limits.undo_ms = 50));
    moving.start();
    moving.phase(Phase::Copying);
    moving.paper.fail(u32::MAX, None);
    let outcome = moving.migration_ends();
    assert!(matches!(outcome, Outcome::InDoubt { .. }), "{outcome:?}");
    let fetched = [moving.machines[0].fetched(0), moving.machines[1].fetched(0)];
    moving.pass(20_000);
    assert_eq!(fetched, [moving.machines[0].fetched(0), moving.machines[1].fetched(0)]);
}

#[test]
fn rule_10_a_failed_migration_leaves_the_source_serving() {
    // The source cannot be read, the destination not written, the journal not written, the destination is gone.
    let bad_read = |moving: &Moving| moving.machines[0].disk.fail(failing(9..10, true, u32::MAX));
    let bad_write = |moving: &Moving| moving.machines[1].disk.fail(failing(9..10, false, u32::MAX));
    let bad_journal = |moving: &Moving| moving.paper.fail(u32::MAX, None);
    let gone = |moving: &Moving| moving.machines[1].disk.swallow(u32::MAX);
    let breaks: [&dyn Fn(&Moving); 4] = [&bad_read, &bad_write, &bad_journal, &gone];
    for (index, break_it) in breaks.iter().enumerate() {
        for seed in 0..3 {
            let plan = Plan::sized(100 + 10 * index as u64 + seed, MIB, 512).with(|config| config.limits.undo_ms = 100);
            let mut moving = Moving::new(&plan);
            break_it(&moving);
            moving.start();
            let outcome = moving.run();
            assert!(matches!(outcome, Outcome::Undone(_)), "{index}: {outcome:?}");
            moving.machines.iter().for_each(|machine| machine.disk.heal());
            moving.machines[1].disk.give_back();
            moving.paper.fail(0, None);
            serves_and_moves_again(&mut moving, MIB);
        }
    }
}

#[test]
fn rule_11_an_unreadable_block_fails_the_migration_or_is_marked() {
    // No guest's block.
    const LBA: u64 = 8 * 3 + 5;
    let mut moving = Moving::new(&Plan::sized(11, MIB, 512));
    let disk = moving.machines[0].disk.clone();
    disk.fail(failing(LBA..LBA + 1, true, u32::MAX));
    disk.watch();
    moving.start();
    let outcome = moving.run();
    assert!(matches!(outcome, Outcome::Undone(Reason::Copy(CopyError::Media { lba: LBA, .. }))), "{outcome:?}");
    let tries = disk.take_seen().iter().filter(|(op, slba, blocks)| {
        *op == BackingOp::Read && *slba <= LBA && LBA < slba + blocks
    }).count();
    assert!((2..=12).contains(&tries), "{tries} reads of the bad block");
    moving.goes_on();
    moving.judge();

    let mut moving = Moving::new(&Plan::sized(11, MIB, 512).with(|config| config.copy.on_media_error = OnMediaError::Mark));
    moving.machines[0].disk.fail(failing(LBA..LBA + 1, true, u32::MAX));
    moving.start();
    moved(&mut moving);
    assert_eq!(moving.report.uncorrectable.iter().map(|u| (u.nsid, u.lba)).collect::<Vec<_>>(), [(NSID, LBA)]);
    moving.goes_on();
    // Everything but that block is there.
    moving.machines[0].disk.put((LBA * 512) as usize, &[7; 512]);
    moving.machines[1].disk.put((LBA * 512) as usize, &[7; 512]);
    moving.judge();
}

#[test]
fn rule_11_errors_that_pass_are_survived() {
    for seed in 0..10 {
        let mut moving = Moving::new(&Plan::sized(seed, MIB, 512));
        moving.machines[0].disk.fail(failing(100..101, true, 2));
        moving.machines[1].disk.fail(failing(900..901, false, 2));
        moving.machines[1].disk.fail(failing(0..2048, false, 1));
        moving.start();
        moved(&mut moving);
        assert!(moving.report.retries >= 3, "{:?}", moving.report);
        moving.goes_on();
        moving.judge();
    }
}
