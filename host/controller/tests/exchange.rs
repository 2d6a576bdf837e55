//! A namespace's backing is exchanged under a controller that stays before its guest.
#![allow(missing_docs)]

mod support;

use dray_controller::{ControllerRole, ExchangeError, FileBacking, MemoryBacking};
use dray_device::backing::{Backing, BackingInfo, BackingRequest, Submitted};
use dray_device::poll::Time;
use dray_device::slot::Fence;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId};
use dray_nvme::registers::offset;
use dray_nvme::status::Status;
use std::sync::{Arc, Mutex};
use support::{BLOCKS, CC, Guest, MC, MMC, World, assert_ok, config, controller, memory, namespace};

/// A backing that says what it is told to say, and keeps operations under way while it is held.
struct Odd {
    inner: MemoryBacking,
    info: BackingInfo,
    uncorrectable: bool,
    held: Arc<Mutex<bool>>,
    waiting: Vec<(u64, Status)>,
}

impl Odd {
    fn new() -> Self {
        let inner = MemoryBacking::new(BLOCKS * 512, 512).expect("backing");
        Self { info: inner.info(), inner, uncorrectable: true, held: Arc::default(), waiting: Vec::new() }
    }
}

impl Backing for Odd {
    fn info(&self) -> BackingInfo {
        self.info
    }
    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        match self.inner.submit(request) {
            Submitted::Done(status) => self.waiting.push((request.tag, status)),
            other => return other,
        }
        Submitted::Pending
    }
    fn can_write_uncorrectable(&self) -> bool {
        self.uncorrectable
    }
    fn commit(&mut self) {}
    fn poll(&mut self, _: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        if *self.held.lock().expect("held") {
            return 0;
        }
        let ended = std::mem::take(&mut self.waiting);
        ended.iter().for_each(|&(tag, status)| done(tag, status));
        ended.len()
    }
    fn in_flight(&self) -> usize {
        self.waiting.len()
    }
}

fn suspend(world: &mut World, manager: &mut Guest) {
    assert_ok(manager.admin(world, SubmissionEntry::suspend(MC, false, false)));
}

fn resume(world: &mut World, manager: &mut Guest) {
    assert_ok(manager.admin(world, SubmissionEntry::resume(MC)));
}

fn refusal(world: &mut World, backing: Box<dyn Backing>) -> ExchangeError {
    world.subsystem.exchange_backing(1, backing).err().expect("it is refused").why
}

/// A memory backing that holds `byte` everywhere.
fn filled(byte: u8) -> Box<dyn Backing> {
    let backing = MemoryBacking::new(BLOCKS * 512, 512).expect("backing");
    backing.memory().arena().fill(backing.memory().offset(), backing.memory().len(), byte);
    Box::new(backing)
}

#[test]
fn a_suspended_guest_finds_the_other_backing_and_the_same_namespace() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 16, None);
    assert_ok(guest.write(&mut world, 1, 5, &[0x11; 512]));
    let pages = [Cns::CONTROLLER, Cns::NAMESPACE, Cns::NAMESPACE_DESCRIPTORS];
    let identity = |world: &mut World, guest: &mut Guest| {
        pages.map(|cns| {
            let nsid = u32::from(cns != Cns::CONTROLLER);
            guest.admin_in(world, SubmissionEntry::identify(cns, nsid, 0, CommandSetId::NVM), 4096).1
        })
    };
    let before = identity(&mut world, &mut guest);
    assert_eq!(refusal(&mut world, filled(0x22)), ExchangeError::Fetching(MC), "the gate is open");
    suspend(&mut world, &mut manager);
    // Commands that come while the gate is shut wait.
    let at = guest.pages(512);
    let cid = guest.push(1, SubmissionEntry::read(1, 5, 1).with_prps(guest.address(at), 0));
    guest.ring(1);
    for _ in 0..50 {
        world.poll();
    }
    assert!(guest.pop(1).is_none(), "nothing is fetched");
    let old = world.subsystem.exchange_backing(1, filled(0x22)).expect("exchanged");
    resume(&mut world, &mut manager);
    assert_ok(guest.wait(&mut world, 1, cid));
    assert_eq!(guest.get(at, 512), [0x22; 512], "of the other backing");
    assert!(identity(&mut world, &mut guest) == before, "the guest sees the same controller and namespace");
    // The old one has what was written before, and nothing of after.
    assert_ok(guest.write(&mut world, 1, 6, &[0x33; 512]));
    suspend(&mut world, &mut manager);
    let new = world.subsystem.exchange_backing(1, old).expect("back");
    resume(&mut world, &mut manager);
    assert_eq!(guest.read(&mut world, 1, 5, 1).1, [0x11; 512]);
    assert_eq!(guest.read(&mut world, 1, 6, 1).1, [0; 512]);
    drop(new);
}

#[test]
fn a_backing_that_cannot_keep_a_promise_is_refused() {
    let mut world = World::new();
    let mut manager = world.ready(MMC);
    suspend(&mut world, &mut manager);
    let with = |change: &dyn Fn(&mut Odd)| {
        let mut odd = Odd::new();
        change(&mut odd);
        Box::new(odd) as Box<dyn Backing>
    };
    let cases: [(Box<dyn Backing>, ExchangeError); 5] = [
        (with(&|odd| odd.info.blocks += 8), ExchangeError::Blocks { now: BLOCKS, offered: BLOCKS + 8 }),
        (with(&|odd| odd.info.block_bytes = 4096), ExchangeError::BlockBytes { now: 512, offered: 4096 }),
        (with(&|odd| odd.info.volatile_cache = true), ExchangeError::VolatileCache),
        (with(&|odd| odd.uncorrectable = false), ExchangeError::WriteUncorrectable),
        (with(&|odd| odd.info.deallocated_reads_zero = false), ExchangeError::Deallocated),
    ];
    for (backing, expected) in cases {
        assert_eq!(world.subsystem.may_exchange(1, backing.as_ref()), Err(expected));
        let refused = world.subsystem.exchange_backing(1, backing).err().expect("refused");
        assert_eq!((refused.why, refused.why.is_transient()), (expected, false));
        assert_eq!(refused.backing.info().blocks, if matches!(expected, ExchangeError::Blocks { .. }) { BLOCKS + 8 } else { BLOCKS });
    }
    assert_eq!(world.subsystem.may_exchange(2, memory().as_ref()), Err(ExchangeError::NoNamespace(2)));
    world.subsystem.exchange_backing(1, memory()).expect("one that keeps them all");
}

#[test]
fn what_was_not_promised_is_not_shown_afterwards() {
    // A file has a volatile cache and no marks: the memory that it is exchanged for has marks and no cache.
    let path = std::env::temp_dir().join(format!("dray-exchange-{}", std::process::id()));
    let made = std::fs::File::create(&path).and_then(|file| file.set_len(BLOCKS * 512));
    made.expect("a file");
    let file = FileBacking::open(&path, 512, 16).expect("a backing");
    let _removed = std::fs::remove_file(&path);
    let mut world = World::with(config(), vec![(namespace(1), Box::new(file))]);
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    let identify = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
    let before = guest.admin_in(&mut world, identify, 4096).1;
    suspend(&mut world, &mut manager);
    let file = world.subsystem.exchange_backing(1, memory()).expect("exchanged");
    resume(&mut world, &mut manager);
    assert_eq!(guest.admin_in(&mut world, identify, 4096).1, before);
    suspend(&mut world, &mut manager);
    world.subsystem.exchange_backing(1, file).expect("and back: the cache was promised all along");
}

#[test]
fn operations_under_way_must_end_first() {
    let odd = Odd::new();
    let held = Arc::clone(&odd.held);
    let mut config = config();
    config.controllers.push(controller(3, ControllerRole::Migratable));
    let fences: Vec<Fence> = config.controllers.iter().map(|c| c.fence.clone()).collect();
    let mut world = World::with(config, vec![(namespace(1), Box::new(odd))]);
    let (mut manager, mut guest, mut other) = (world.ready(MMC), world.ready(MC), world.ready(3));
    manager.create_pair(&mut world, 1, 16, None);
    guest.create_pair(&mut world, 1, 16, None);
    *held.lock().expect("held") = true;
    let at = guest.pages(512);
    let cid = guest.push(1, SubmissionEntry::write(1, 0, 1).with_prps(guest.address(at), 0));
    guest.ring(1);
    for _ in 0..5 {
        world.poll();
    }
    // Fenced without Suspend: the gate is shut, but the operation goes on.
    fences[1].raise();
    assert_eq!(refusal(&mut world, Box::new(Odd::new())), ExchangeError::Fetching(3), "of every controller");
    fences[2].raise();
    let why = refusal(&mut world, Box::new(Odd::new()));
    assert_eq!((why, why.is_transient()), (ExchangeError::Busy(MC), true));
    // A reset abandons the command, not the operation.
    guest.function.write32(offset::CC, 0);
    for _ in 0..5 {
        world.poll();
    }
    assert_eq!(refusal(&mut world, Box::new(Odd::new())), ExchangeError::Busy(MC));
    *held.lock().expect("held") = false;
    for _ in 0..5 {
        world.poll();
    }
    // The management controller reads the namespace too, and no gate stops it.
    *held.lock().expect("held") = true;
    let place = manager.pages(512);
    let read = manager.push(1, SubmissionEntry::read(1, 0, 1).with_prps(manager.address(place), 0));
    manager.ring(1);
    for _ in 0..5 {
        world.poll();
    }
    assert_eq!(refusal(&mut world, Box::new(Odd::new())), ExchangeError::Busy(MMC));
    *held.lock().expect("held") = false;
    assert_ok(manager.wait(&mut world, 1, read));
    world.subsystem.exchange_backing(1, Box::new(Odd::new())).expect("exchanged");
    fences[2].lower();
    assert_ok(other.admin(&mut world, SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM).with_prps(other.address(at), 0)));
    let _abandoned = cid;
}

#[test]
fn a_guest_that_resets_behind_the_gate_is_ready_when_it_opens() {
    let config = config();
    let fence = config.controllers[1].fence.clone();
    let mut world = World::with(config, vec![(namespace(1), memory())]);
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    suspend(&mut world, &mut manager);
    fence.raise();
    // The reset works, ends the suspension, and enabling waits.
    guest.function.write32(offset::CC, 0);
    for _ in 0..5 {
        world.poll();
    }
    assert_eq!(guest.csts() & 1, 0, "reset");
    guest.start();
    for _ in 0..20 {
        world.poll();
    }
    assert_eq!(guest.csts(), 0, "neither ready nor failed");
    let fetched = |world: &World| world.subsystem.counters().find(|(id, _)| *id == MC).map(|(_, c)| c.fetched);
    let before = fetched(&world);
    world.subsystem.exchange_backing(1, filled(0x44)).expect("behind the fence alone");
    // What Resume says then: the guest has ended the suspension itself.
    let done = manager.admin(&mut world, SubmissionEntry::resume(MC));
    assert!(done.status().is(Status::CONTROLLER_NOT_SUSPENDED));
    assert_eq!((fetched(&world), guest.csts()), (before, 0), "Resume does not open the fence");
    fence.lower();
    for _ in 0..5 {
        world.poll();
    }
    assert_eq!((guest.csts(), guest.function.read32(offset::CC)), (1, CC));
    guest.create_pair(&mut world, 1, 16, None);
    assert_eq!(guest.read(&mut world, 1, 0, 1).1, [0x44; 512]);
}

#[test]
fn logging_goes_on_across_the_exchange() {
    let mut world = World::new();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    guest.create_pair(&mut world, 1, 16, None);
    let at = manager.pages(64 * 32);
    let create = SubmissionEntry::create_cdq(dray_nvme::cdq::QueueType::UDMQ, MC, true, 64 * 8, manager.address(at));
    let id = assert_ok(manager.admin(&mut world, create)).dw0 as u16;
    assert_ok(manager.admin(&mut world, SubmissionEntry::track_send_log(true, id)));
    suspend(&mut world, &mut manager);
    world.subsystem.exchange_backing(1, memory()).expect("exchanged");
    resume(&mut world, &mut manager);
    assert_ok(guest.write(&mut world, 1, 77, &[1; 512]));
    // First, last (suspended), first again, the write.
    let entry = manager.get(at + 3 * 32, 32);
    let entry = <dray_nvme::cdq::UdmqEntry as zerocopy::FromBytes>::read_from_bytes(&entry).expect("entry");
    assert_eq!(entry.changed(), dray_nvme::cdq::Changed::Range { nsid: 1, slba: 77, blocks: 1 });
}
