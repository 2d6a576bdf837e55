//! A guest that has all of BAR0 mapped: it clears CC.EN and sets it again without anybody being told, as quickly as CSTS lets it.
#![allow(missing_docs)]

mod support;

use dray_nvme::command::{FeatureSelect, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::registers::offset;
use std::sync::atomic::Ordering;
use support::{CC, Guest, MC, MMC, World, assert_ok};

/// CSTS.RDY and CSTS.CFS.
const FAILED: u32 = 3;

/// Stores a register as a client with the page mapped does: no fall of CC.EN is counted.
fn store(guest: &Guest, at: u32, value: u32) {
    guest.slot.bar().arena().store32(at as usize, value, Ordering::Release);
}

/// A command that every controller answers.
fn question() -> SubmissionEntry {
    SubmissionEntry::get_features(FeatureId::ARBITRATION, FeatureSelect::CURRENT, 0)
}

fn polls(world: &mut World) {
    (0..10).for_each(|_| world.poll());
}

/// Disables the controller and enables it again with new queues; the controller is polled only where the guest has to wait for
/// CSTS.RDY (Base 2.3 §3.7.2).
fn reset_at_once(guest: &mut Guest, world: &mut World) {
    store(guest, offset::CC, 0);
    let mut waited = 0;
    while guest.csts() & 1 != 0 {
        world.poll();
        waited += 1;
        assert!(waited < 100, "CSTS.RDY is never cleared");
    }
    begin(guest);
    polls(world);
    assert_eq!(guest.csts(), 1, "it serves again");
    assert_ok(guest.admin(world, question()));
}

/// New admin queues, and CC.EN: a rise is not counted, whoever makes it.
fn begin(guest: &mut Guest) {
    assert_eq!(guest.slot.bar().load32(offset::CC) & 1, 0);
    guest.start();
}

#[test]
fn an_enabled_controller_is_reset_and_comes_up() {
    let mut world = World::new();
    let mut guest = world.guest(MC);
    polls(&mut world);
    begin(&mut guest);
    polls(&mut world);
    assert_eq!(guest.csts(), 1);
    guest.create_pair(&mut world, 1, 16, Some(1));
    for _ in 0..3 {
        reset_at_once(&mut guest, &mut world);
        guest.create_pair(&mut world, 1, 16, Some(1));
        assert_ok(guest.write(&mut world, 1, 7, &[1; 512]));
    }
}

#[test]
fn one_that_a_managers_reset_left_without_its_state_is_not_missed() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    assert_ok(manager.admin(&mut world, SubmissionEntry::suspend(MC, false, false)));
    // Elsewhere and back: it may only go on by Resume.
    let away = World::new();
    guest.slot.point_at(&away.subsystem.plug(MC).expect("a controller"));
    guest.slot.point_at(&world.subsystem.plug(MC).expect("a controller"));
    polls(&mut world);
    manager.enable_after_reset(&mut world);
    polls(&mut world);
    assert_eq!(guest.csts(), FAILED, "CSTS.RDY stays until CC.EN is seen cleared");
    reset_at_once(&mut guest, &mut world);
}

#[test]
fn one_that_a_managers_reset_left_disabled_has_not_failed() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    assert_ok(manager.admin(&mut world, SubmissionEntry::suspend(MC, false, false)));
    let away = World::new();
    guest.slot.point_at(&away.subsystem.plug(MC).expect("a controller"));
    guest.slot.point_at(&world.subsystem.plug(MC).expect("a controller"));
    polls(&mut world);
    // The guest is done with its queues before the manager is reset.
    store(&guest, offset::CC, 0);
    manager.enable_after_reset(&mut world);
    polls(&mut world);
    assert_eq!(guest.csts(), 0, "nothing is left that could not go on");
    begin(&mut guest);
    polls(&mut world);
    assert_eq!(guest.csts(), 1);
    assert_ok(guest.admin(&mut world, question()));
}

#[test]
fn one_that_gets_a_function_whose_queues_another_had_is_not_missed() {
    let (mut source, mut target) = (World::new(), World::new());
    let mut guest = source.ready(MC);
    guest.slot.point_at(&target.subsystem.plug(MC).expect("a controller"));
    polls(&mut target);
    assert_eq!(guest.csts(), FAILED, "CSTS.RDY stays until CC.EN is seen cleared");
    reset_at_once(&mut guest, &mut target);
    // Cleared before the other one has looked: it begins anew.
    guest.slot.point_at(&source.subsystem.plug(MC).expect("a controller"));
    store(&guest, offset::CC, 0);
    polls(&mut source);
    assert_eq!(guest.csts(), 0);
    begin(&mut guest);
    polls(&mut source);
    assert_eq!(guest.csts(), 1);
}

#[test]
fn one_that_could_not_be_enabled_tries_the_next_queues() {
    let mut world = World::new();
    let mut guest = world.guest(MC);
    polls(&mut world);
    begin(&mut guest);
    store(&guest, offset::CC, 0);
    let asq = guest.slot.bar().load64(offset::ASQ);
    for (at, bad) in [(offset::ASQ, 0xffff_f000), (offset::ACQ, 1), (offset::AQA, 0)] {
        let good = guest.slot.bar().load32(at);
        store(&guest, at, bad);
        store(&guest, offset::CC, CC);
        polls(&mut world);
        assert_eq!(guest.csts(), 2, "never ready: {at:#x}");
        // It is not ready, so the guest waits for nothing.
        store(&guest, offset::CC, 0);
        store(&guest, at, good);
        store(&guest, offset::CC, CC);
        polls(&mut world);
        assert_eq!(guest.csts(), 1, "{at:#x}");
        store(&guest, offset::CC, 0);
        polls(&mut world);
        assert_eq!((guest.csts(), guest.slot.bar().load64(offset::ASQ)), (0, asq));
    }
}
