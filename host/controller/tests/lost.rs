//! Memory of queues that is unmapped under an enabled controller, and comes back or does not.
#![allow(missing_docs)]

mod support;

use dray_device::backing::{Backing, BackingInfo, BackingRequest, Submitted};
use dray_device::poll::{Next, Poll, Time};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::registers::offset;
use dray_nvme::status::Status;
use std::sync::{Arc, Mutex};
use support::{BLOCKS, Guest, MC, MMC, World, assert_ok, config, memory, namespace};

/// A backing that ends operations when it is told to.
#[derive(Clone, Default)]
struct Slow {
    waiting: Arc<Mutex<Vec<u64>>>,
    open: Arc<Mutex<bool>>,
}

impl Backing for Slow {
    fn info(&self) -> BackingInfo {
        BackingInfo { block_bytes: 512, blocks: BLOCKS, volatile_cache: true, deallocated_reads_zero: false }
    }
    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let mut waiting = self.waiting.lock().expect("lock");
        if waiting.len() >= 8 {
            return Submitted::Busy;
        }
        waiting.push(request.tag);
        Submitted::Pending
    }
    fn commit(&mut self) {}
    fn poll(&mut self, _now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        if !*self.open.lock().expect("lock") {
            return 0;
        }
        let ended = std::mem::take(&mut *self.waiting.lock().expect("lock"));
        ended.iter().for_each(|&tag| done(tag, Status::WRITE_FAULT));
        ended.len()
    }
    fn in_flight(&self) -> usize {
        self.waiting.lock().expect("lock").len()
    }
}

/// A world in whose backing operations wait, a guest with an I/O queue, and one flush under way.
fn waiting() -> (World, Guest, Slow, u16) {
    let slow = Slow::default();
    let mut world = World::with(config(), vec![(namespace(1), Box::new(slow.clone()))]);
    let mut guest = world.ready(MC);
    guest.create_pair(&mut world, 1, 16, Some(1));
    let cid = guest.push(1, SubmissionEntry::flush(1));
    guest.ring(1);
    polls(&mut world);
    assert_eq!(slow.in_flight(), 1);
    (world, guest, slow, cid)
}

fn polls(world: &mut World) {
    (0..20).for_each(|_| world.poll());
}

fn bytes(guest: &Guest) -> Vec<u8> {
    guest.get(0, 64 << 10)
}

#[test]
fn queues_that_come_back_at_their_address_go_on() {
    let (mut world, mut guest, slow, flushed) = waiting();
    let unmapping = guest.slot.space().unmap(guest.iova).expect("unmap");
    polls(&mut world);
    *slow.open.lock().expect("lock") = true;
    polls(&mut world);
    assert!(unmapping.is_done(), "nobody waits for queues");
    // Commands that arrive, and a completion that is ready: neither is seen while nothing is mapped.
    let (again, asked) = (guest.push(1, SubmissionEntry::flush(1)), guest.push(0, SubmissionEntry::keep_alive()));
    let before = bytes(&guest);
    guest.ring(1);
    guest.ring(0);
    for _ in 0..4 {
        world.now = world.now.after_ms(1_000);
        polls(&mut world);
        assert_eq!((guest.csts(), bytes(&guest) == before), (1, true));
    }
    guest.slot.space().map_at(guest.iova, &guest.memory, true).expect("map");
    // The backing ends everything badly; that it ends is what counts.
    assert!(guest.wait(&mut world, 1, flushed).status().is(Status::WRITE_FAULT));
    assert!(guest.wait(&mut world, 1, again).status().is(Status::WRITE_FAULT));
    guest.wait(&mut world, 0, asked);
    guest.create_pair(&mut world, 2, 16, None);
    assert_eq!(guest.csts(), 1);
}

#[test]
fn memory_that_does_not_come_back_is_fatal_until_enable_is_cleared() {
    let (mut world, mut guest, slow, _flushed) = waiting();
    let _unmapping = guest.slot.space().unmap(guest.iova).expect("unmap");
    polls(&mut world);
    let Next::At(wake) = world.subsystem.poll(world.now).next else { panic!("it sleeps for ever") };
    assert!(wake <= world.now.after_ms(6_000), "{wake:?}");
    world.now = world.now.after_ms(5_100);
    polls(&mut world);
    assert_eq!(guest.csts(), 3, "CFS; RDY until the guest clears CC.EN");
    // Too late.
    guest.slot.space().map_at(guest.iova, &guest.memory, true).expect("map");
    *slow.open.lock().expect("lock") = true;
    guest.push(0, SubmissionEntry::keep_alive());
    let before = bytes(&guest);
    guest.ring(0);
    polls(&mut world);
    assert_eq!((guest.csts(), bytes(&guest) == before), (3, true));
    guest.function.write32(offset::CC, 0);
    polls(&mut world);
    assert_eq!(guest.csts(), 0);
    guest.enable(&mut world);
    guest.create_pair(&mut world, 1, 16, Some(1));
}

#[test]
fn another_owner_of_the_addresses_does_not_get_the_queues() {
    let (mut world, guest, slow, _flushed) = waiting();
    let space = guest.slot.space().clone();
    let _unmapping = space.unmap(guest.iova).expect("unmap");
    space.change_owner();
    space.map_at(guest.iova, &guest.memory, true).expect("map");
    let before = bytes(&guest);
    *slow.open.lock().expect("lock") = true;
    polls(&mut world);
    assert_eq!((guest.csts(), bytes(&guest) == before), (3, true));
}

#[test]
fn suspend_does_not_wait_for_memory() {
    let mut world = World::with(config(), vec![(namespace(1), memory())]);
    let (mut manager, guest) = (world.ready(MMC), world.ready(MC));
    let _unmapping = guest.slot.space().unmap(guest.iova).expect("unmap");
    polls(&mut world);
    assert_eq!(guest.csts(), 1);
    assert_ok(manager.admin(&mut world, SubmissionEntry::suspend(MC, false, false)));
    assert_eq!(guest.csts(), 3);
}
