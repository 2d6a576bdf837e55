//! Shadow doorbells: Doorbell Buffer Config and what follows from it.
#![allow(missing_docs)]

mod support;

use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Next, Poll};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::doorbell_buffer::EVENT_INDEX_POLLING;
use dray_nvme::identify::{Cns, CommandSetId, IdentifyController};
use dray_nvme::registers::{cq_head_doorbell, sq_tail_doorbell};
use dray_nvme::status::Status;
use std::sync::atomic::Ordering;
use support::{Guest, MC, MMC, Shadow, World, assert_ok};
use zerocopy::FromBytes;

fn trapped(world: &mut World, cntlid: u16) -> Guest {
    let mut guest = world.guest(cntlid);
    guest.slot.trap_doorbells(true);
    guest.enable(world);
    guest
}

/// A guest with shadow doorbells and an I/O queue pair.
fn shadowed(world: &mut World, entries: u32) -> (Guest, Shadow) {
    let mut guest = trapped(world, MC);
    let shadow = Shadow::configure(world, &mut guest);
    guest.create_pair(world, 1, entries, None);
    idle(world);
    (guest, shadow)
}

/// Polls until the controller has been idle for long.
fn idle(world: &mut World) {
    (0..100).for_each(|_| world.poll());
}

fn flush() -> SubmissionEntry {
    SubmissionEntry::flush(1)
}

fn is_offered(world: &mut World, guest: &mut Guest) -> bool {
    let identify = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
    let page = guest.admin_in(world, identify, 4096).1;
    let offered = IdentifyController::read_from_bytes(&page).expect("page").oacs.dbcs();
    let shadow = Shadow { bells: guest.pages(8192), events: 0 };
    let shadow = Shadow { events: shadow.bells + 4096, ..shadow };
    let done = guest.admin(world, shadow.command(guest));
    assert_eq!(done.status().is(Status::INVALID_OPCODE), !offered, "{done:?}");
    assert_eq!(!done.status().is_error(), offered, "{done:?}");
    offered
}

#[test]
fn it_is_offered_where_doorbells_are_trapped_and_never_by_a_management_controller() {
    let mut world = World::new();
    let (mut mapped, mut manager) = (world.ready(MC), trapped(&mut world, MMC));
    assert!(!is_offered(&mut world, &mut mapped));
    assert!(!is_offered(&mut world, &mut manager));
    let mut world = World::new();
    let mut guest = trapped(&mut world, MC);
    assert!(is_offered(&mut world, &mut guest));
}

#[test]
fn pages_that_cannot_be_are_refused() {
    let mut world = World::new();
    let mut guest = trapped(&mut world, MC);
    let at = guest.pages(16384);
    let page = guest.address(at);
    let sealed = DmaBuffer::allocate("sealed", 4096, Pages::Small).expect("memory");
    let sealed = guest.slot.space().map(&sealed, false).expect("map");
    let nowhere = 0x7fff_ffff_f000;
    for pages in [
        [page, page],
        [page + 4, page + 4096],
        [page, page + 4096 + 2048],
        [nowhere, page],
        [page, nowhere],
        [page, sealed],
        [sealed, page],
    ] {
        let done = guest.admin(&mut world, SubmissionEntry::doorbell_buffer_config(pages[0], pages[1]));
        assert!(done.status().is(Status::INVALID_FIELD), "{pages:x?}: {done:?}");
    }
    // Nothing has come of it.
    guest.create_pair(&mut world, 1, 16, None);
    assert_ok(guest.run(&mut world, 1, flush()));
    assert!(guest.memory.arena().is_zero(at, 16384));
}

#[test]
fn a_polled_controller_wants_no_register_writes_and_an_idle_one_wants_one() {
    let mut world = World::new();
    let (mut guest, shadow) = shadowed(&mut world, 16);
    assert_eq!(shadow.events(&guest, 1), [0, EVENT_INDEX_POLLING], "idle: a move from 0 wakes");
    let cid = guest.push(1, flush());
    assert!(shadow.tail(&guest, 1), "the register is to be written");
    // Here it is not: somebody polls, and the register is not what the doorbell is read from.
    assert_ok(guest.wait(&mut world, 1, cid));
    assert_eq!(shadow.events(&guest, 1)[0], EVENT_INDEX_POLLING);
    for _ in 0..20 {
        let cid = guest.push(1, flush());
        let wrapped = guest.queues[&1].tail == 0;
        assert_eq!(shadow.tail(&guest, 1), wrapped, "polled: only a wrap asks for the register");
        assert_ok(guest.wait(&mut world, 1, cid));
        shadow.head(&guest, 1);
    }
    assert_eq!(guest.slot.bar().load32(sq_tail_doorbell(1, 0)), 0);
    // While it says that it is polled, it wants to be.
    world.now = world.now.after_us(1);
    let progress = world.subsystem.poll(world.now);
    assert_eq!((progress.work, progress.next), (0, Next::Now));
    idle(&mut world);
    assert_eq!(world.subsystem.poll(world.now.after_us(1)).next, Next::OnWake);
    let tail = guest.queues[&1].tail;
    assert_eq!(shadow.events(&guest, 1), [tail, EVENT_INDEX_POLLING]);
    guest.push(1, flush());
    assert!(shadow.tail(&guest, 1));
    // The admin queue has registers, whatever its place in the page says.
    assert_eq!(guest.get(shadow.bells, 8), [0xee; 8]);
    assert_eq!(guest.get(shadow.events, 8), [0xee; 8]);
}

#[test]
fn a_full_completion_queue_asks_for_its_head() {
    let mut world = World::new();
    let (mut guest, shadow) = shadowed(&mut world, 4);
    for _ in 0..3 {
        guest.push(1, flush());
    }
    shadow.tail(&guest, 1);
    idle(&mut world);
    // All slots are used: a fourth command waits for the head.
    for _ in 0..3 {
        guest.push(1, flush());
    }
    shadow.tail(&guest, 1);
    idle(&mut world);
    assert_eq!(shadow.events(&guest, 1)[1], 0, "head 0 is waited for");
    assert!(guest.pop(1).is_some());
    assert!(shadow.head(&guest, 1), "the register is to be written");
    idle(&mut world);
    let mut taken = 1;
    while guest.pop(1).is_some() {
        taken += 1;
    }
    assert_eq!(taken, 4, "one slot, one more command");
    shadow.head(&guest, 1);
    idle(&mut world);
    assert_eq!(shadow.events(&guest, 1)[1], EVENT_INDEX_POLLING);
}

#[test]
fn queues_that_there_are_keep_their_doorbells_and_bad_values_are_told_once() {
    let mut world = World::new();
    let mut guest = trapped(&mut world, MC);
    guest.create_pair(&mut world, 1, 16, None);
    for _ in 0..5 {
        assert_ok(guest.run(&mut world, 1, flush()));
    }
    let shadow = Shadow::configure(&mut world, &mut guest);
    assert_eq!(shadow.bells(&guest, 1), [5, 5], "as the registers stood");
    idle(&mut world);
    let cid = guest.push(1, flush());
    assert!(shadow.tail(&guest, 1));
    assert_ok(guest.wait(&mut world, 1, cid));
    // Registers are not looked at any more.
    guest.function.doorbell(sq_tail_doorbell(1, 0)).expect("doorbell").ring(9);
    guest.function.doorbell(cq_head_doorbell(1, 0)).expect("doorbell").ring(9);
    idle(&mut world);
    let bad = |world: &World| world.subsystem.counters().find(|(id, _)| *id == MC).expect("counters").1.bad_doorbells;
    assert_eq!(bad(&world), 0);
    guest.put(shadow.bells + 8, &77u32.to_le_bytes());
    idle(&mut world);
    assert_eq!(bad(&world), 1);
    let cid = guest.push(1, flush());
    shadow.tail(&guest, 1);
    assert_ok(guest.wait(&mut world, 1, cid));
}

#[test]
fn a_reset_drops_them() {
    let mut world = World::new();
    let (mut guest, shadow) = shadowed(&mut world, 16);
    guest.drain = true;
    guest.enable_after_reset(&mut world);
    guest.create_pair(&mut world, 1, 16, None);
    guest.put(shadow.bells, &[0xaa; 8192]);
    for _ in 0..20 {
        assert_ok(guest.run(&mut world, 1, flush()));
    }
    idle(&mut world);
    assert_eq!(guest.get(shadow.bells, 8192), [0xaa; 8192], "neither read nor written");
}

#[test]
fn pages_that_are_unmapped_are_waited_for_like_queues_and_then_fatal() {
    let mut world = World::new();
    let mut guest = trapped(&mut world, MC);
    let pages = DmaBuffer::allocate("pages", 8192, Pages::Small).expect("memory");
    let space = guest.slot.space().clone();
    let iova = space.map(&pages, true).expect("map");
    assert_ok(guest.admin(&mut world, SubmissionEntry::doorbell_buffer_config(iova, iova + 4096)));
    guest.create_pair(&mut world, 1, 16, None);
    idle(&mut world);
    let unmapping = space.unmap(iova).expect("unmap");
    pages.arena().store32(8, 1, Ordering::Release);
    guest.push(1, flush());
    idle(&mut world);
    assert!(unmapping.is_done(), "the unmap is not held up");
    assert_eq!((guest.csts(), guest.pop(1).is_none()), (1, true), "nothing is taken meanwhile");
    space.map_at(iova, &pages, true).expect("map");
    idle(&mut world);
    assert!(guest.pop(1).is_some(), "the doorbell that was stored meanwhile");
    let _unmapping = space.unmap(iova).expect("unmap");
    world.poll();
    world.now = world.now.after_ms(10_000);
    idle(&mut world);
    assert_eq!(guest.csts() & 2, 2, "CFS");
}
