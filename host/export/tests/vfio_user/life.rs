//! Clients that come, go, wait and are refused; resets.

use crate::rig::{Failure, Rig, VECTORS, event, memfd, signals, slot};
use dray_device::poll::{Next, Poll, Time};
use dray_device::socket::{Stream, UnixSocket};
use dray_device::vfio_user::wire::{DmaMap, Header, IrqSet, RegionAccess, command, irq, region};
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::{AttachError, PeerPolicy, VfioUserConfig, VfioUserServer};
use dray_nvme::registers::{Cc, Csts, offset};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zerocopy::IntoBytes;

const WINDOW: DmaMap = DmaMap { argsz: 32, flags: 3, offset: 0, address: 0x10_0000, size: 0x4000 };

fn set_lines(rig: &mut Rig) -> OwnedFd {
    let event = event();
    let set = IrqSet { argsz: 20, flags: IrqSet::DATA_EVENTFD | IrqSet::TRIGGER, index: irq::MSIX, start: 0, count: 1 };
    let _none = rig.ask_with(command::SET_IRQS, set.as_bytes(), &[event.as_fd()]).expect("set");
    event
}

/// Enables the controller with admin queues in the client's memory.
fn enable(rig: &mut Rig) {
    let memory = memfd(WINDOW.size);
    let _none = rig.ask_with(command::DMA_MAP, WINDOW.as_bytes(), &[memory.as_fd()]).expect("map");
    rig.region_write(region::BAR0, offset::AQA.into(), &(3u32 << 16 | 3).to_le_bytes()).expect("AQA");
    rig.region_write(region::BAR0, offset::ASQ.into(), &WINDOW.address.to_le_bytes()).expect("ASQ");
    rig.region_write(region::BAR0, offset::ACQ.into(), &(WINDOW.address + 0x1000).to_le_bytes()).expect("ACQ");
    let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
    rig.region_write(region::BAR0, offset::CC.into(), &cc.into_bits().to_le_bytes()).expect("CC");
    for _ in 0..10 {
        rig.poll();
    }
    assert!(Csts::from_bits(rig.register(offset::CSTS)).rdy());
}

#[test]
fn a_client_that_dies_leaves_the_device_and_takes_its_memory_along() {
    let mut rig = Rig::new();
    rig.plug();
    enable(&mut rig);
    let event = set_lines(&mut rig);
    rig.region_write(region::CONFIG, 4, &[4, 4]).expect("command");
    rig.reconnect();
    rig.hello().expect("the next client");
    assert_eq!((rig.server.dma_windows(), rig.server.counters().left, rig.server.counters().clients), (0, 1, 2));
    assert!(rig.server.slot().space().find(WINDOW.address).is_none());
    rig.server.slot().raise(0);
    assert_eq!(signals(&event), 0, "a line of the client before");
    assert_eq!(rig.region_read(region::CONFIG, 4, 2).expect("kept"), [4, 4]);
    assert!(Cc::from_bits(rig.register(offset::CC)).en(), "kept");
    // Its queues have gone with the memory: it says so, and comes up again after a reset.
    assert!(Csts::from_bits(rig.register(offset::CSTS)).cfs());
    rig.ask(command::RESET, &[]).expect("reset");
    enable(&mut rig);
}

#[test]
fn the_next_client_waits_until_nothing_uses_the_memory_of_the_one_before() {
    let mut rig = Rig::new();
    let memory = memfd(WINDOW.size);
    let _none = rig.ask_with(command::DMA_MAP, WINDOW.as_bytes(), &[memory.as_fd()]).expect("map");
    let mut device = rig.server.slot().space().reader();
    rig.reconnect();
    assert_eq!(rig.hello(), Err(Failure::Nothing));
    assert!(!rig.server.is_idle() && !rig.server.is_attached());
    device.refresh();
    device.release(device.generation());
    assert_eq!(rig.reply(50).expect("served").0.command, command::VERSION);
}

#[test]
fn a_controller_that_lost_the_slot_holds_no_unmap_up() {
    let mut rig = Rig::new();
    rig.plug();
    enable(&mut rig);
    let mut before = rig.subsystem.take().expect("the first");
    rig.plug();
    for _ in 0..3 {
        let _progress = before.poll(rig.now);
    }
    let unmap = dray_device::vfio_user::wire::DmaUnmap { argsz: 24, flags: 2, address: 0, size: 0 };
    rig.post(command::DMA_UNMAP, unmap.as_bytes(), &[]);
    assert_eq!(rig.reply(50).map(|_| ()), Err(Failure::Nothing), "it may still use the memory");
    let _progress = before.poll(rig.now);
    assert!(rig.reply(50).expect("reply").0.failure().is_none());
}

#[test]
fn a_second_client_is_refused_and_the_first_goes_on() {
    let mut rig = Rig::new();
    let (mut second, stream) = UnixSocket::pair().expect("pair");
    rig.server.attach(Box::new(stream)).expect("waits");
    let (_third, stream) = UnixSocket::pair().expect("pair");
    assert_eq!(rig.server.attach(Box::new(stream)), Err(AttachError::Busy));
    rig.poll();
    assert_eq!(second.recv(&mut [0; 1], &mut Vec::new()).expect("closed"), 0);
    assert_eq!(rig.server.counters().refused_busy, 2);
    assert_eq!(rig.register(offset::CSTS), 0);
}

/// A stream whose peer is somebody else.
struct Foreign(UnixSocket, Option<u32>);

impl Stream for Foreign {
    fn recv(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.0.recv(into, fds)
    }

    fn send(&mut self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.0.send(bytes, fds)
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn peer_uid(&self) -> Option<u32> {
        self.1
    }
}

#[test]
fn a_management_controller_is_for_its_own_user() {
    let config = VfioUserConfig { allow: PeerPolicy::SameUser, ..VfioUserConfig::default() };
    let mut server = VfioUserServer::new(slot(), config, Box::new(NoMigration));
    let own = rustix::process::geteuid().as_raw();
    for uid in [None, Some(own + 1)] {
        let (mut client, stream) = UnixSocket::pair().expect("pair");
        assert_eq!(server.attach(Box::new(Foreign(stream, uid))), Err(AttachError::WrongUser));
        assert_eq!(client.recv(&mut [0; 1], &mut Vec::new()).expect("closed"), 0);
    }
    let (_client, stream) = UnixSocket::pair().expect("pair");
    server.attach(Box::new(stream)).expect("this very user");
    assert_eq!(server.counters().refused_peers, 2);
}

#[test]
fn a_reset_ends_the_controller_and_keeps_lines_and_memory() {
    for by_config in [false, true] {
        let mut rig = Rig::new();
        rig.plug();
        enable(&mut rig);
        let event = set_lines(&mut rig);
        while signals(&event) > 0 {}
        if by_config {
            let control = rig.region_read(region::CONFIG, 0x58, 2).expect("device control");
            rig.region_write(region::CONFIG, 0x58, &[control[0], control[1] | 0x80]).expect("FLR");
        } else {
            assert!(rig.ask(command::RESET, &[]).expect("reset").is_empty());
        }
        let registers = [offset::CC, offset::CSTS, offset::AQA, offset::ASQ].map(|at| rig.register(at));
        assert_eq!(registers, [0; 4]);
        assert_eq!((rig.server.dma_windows(), rig.server.counters().resets), (1, 1));
        rig.server.slot().raise(0);
        assert_eq!(signals(&event), 1);
    }
}

#[test]
fn a_reset_is_answered_when_the_controller_is_quiet_or_time_is_up() {
    let mut rig = Rig::new();
    // A controller that says ready and is never polled.
    rig.server.slot().bar().store32(offset::CSTS, 1);
    let asked = rig.post(command::RESET, &[], &[]);
    let access = RegionAccess { offset: 0, region: 0, count: 4 };
    rig.post(command::REGION_READ, access.as_bytes(), &[]);
    assert_eq!(rig.reply(50).map(|_| ()), Err(Failure::Nothing));
    rig.server.slot().bar().store32(offset::CSTS, 0);
    assert_eq!(rig.reply(50).expect("quiet").0.id, asked.id);
    let _read = rig.reply(50).expect("the next");
    rig.server.slot().bar().store32(offset::CSTS, 1);
    rig.post(command::RESET, &[], &[]);
    assert_eq!(rig.reply(50).map(|_| ()), Err(Failure::Nothing));
    rig.now = rig.now.after_ms(3_000);
    assert!(rig.reply(50).expect("time is up").0.failure().is_none());
}

#[test]
fn requests_in_a_row_are_answered_in_order() {
    let mut rig = Rig::new();
    let mut ids = Vec::new();
    for i in 0..100u64 {
        let access = RegionAccess { offset: 0x1000 + i * 4, region: 0, count: 4 };
        ids.push(rig.post(command::REGION_WRITE, &[access.as_bytes(), &(i as u32).to_le_bytes()].concat(), &[]).id);
    }
    for id in ids {
        assert_eq!(rig.reply(100).expect("reply").0.id, id);
    }
    assert_eq!(rig.server.slot().bar().load32(0x1000 + 99 * 4), 99);
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let mut rig = Rig::new();
    let access = RegionAccess { offset: 0, region: 0, count: 0x4000 };
    let header = dray_device::vfio_user::wire::Header::command(1, command::REGION_READ, 16);
    let request = [header.as_bytes(), access.as_bytes()].concat();
    let mut posted = 0;
    for _ in 0..10_000 {
        match rig.client.send(&[IoSlice::new(&request)], &[]) {
            Ok(n) => {
                assert_eq!(n, request.len());
                posted += 1;
            }
            Err(_) => break,
        }
        rig.poll();
    }
    assert!(posted < 10_000, "the server buffers without end");
    let done = rig.server.counters().requests;
    let progress = rig.server.poll(rig.now);
    assert_eq!((progress.work, rig.server.counters().requests), (0, done));
    assert!(matches!(progress.next, Next::At(_)), "{progress:?}");
    // Another may not take its place, and it goes on when it reads again.
    let (_other, stream) = UnixSocket::pair().expect("pair");
    rig.server.attach(Box::new(stream)).expect("waits");
    rig.poll();
    assert_eq!(rig.server.counters().refused_busy, 1);
    for _ in 0..posted {
        assert_eq!(rig.reply(1_000).expect("reply").1.len(), 16 + 0x4000);
    }
}

#[test]
fn two_servers_have_nothing_in_common() {
    let (mut good, mut bad) = (Rig::new(), Rig::new());
    bad.send(dray_device::vfio_user::wire::Header { size: 3, ..Default::default() }, &[], &[]);
    assert_eq!(bad.reply(10).map(|_| ()), Err(Failure::Closed));
    good.server.slot().raise(VECTORS - 1);
    assert_eq!(good.register(offset::CSTS), 0);
}

#[test]
fn an_idle_server_sleeps_on_its_client() {
    let mut rig = Rig::new();
    rig.poll();
    let progress = rig.server.poll(rig.now);
    assert_eq!((progress.work, progress.next), (0, Next::OnWake));
    let mut wakers = 0;
    rig.server.wakers(&mut |_| wakers += 1);
    assert_eq!(wakers, 1);
    rig.server.detach(Time(5));
    assert!(rig.server.is_idle() && !rig.server.is_attached());
}

#[test]
fn a_client_that_never_says_version_ends_and_another_is_served() {
    let mut rig = Rig::raw(VfioUserConfig { handshake_ms: 500, ..VfioUserConfig::default() }, Box::new(NoMigration));
    rig.poll();
    assert!(rig.server.is_attached() && rig.server.is_half_open());
    // Part of a message is no VERSION, and neither is time that passes with others waiting.
    rig.send(Header { size: 64, ..Header::command(1, command::VERSION, 0) }, &[0; 8], &[]);
    rig.now = rig.now.after_ms(499);
    rig.poll();
    assert!(rig.server.is_half_open());
    let progress = rig.server.poll(rig.now);
    assert!(matches!(progress.next, Next::At(at) if at <= rig.now.after_ms(2)), "{progress:?}");
    rig.now = rig.now.after_ms(2);
    assert_eq!(rig.reply(10).map(|_| ()), Err(Failure::Closed));
    let counters = rig.server.counters();
    assert_eq!((counters.handshake_timeouts, counters.left, counters.clients), (1, 0, 1));
    rig.reconnect();
    rig.hello().expect("the next client is served");
    rig.now = rig.now.after_ms(600_000);
    rig.poll();
    assert!(rig.server.is_attached() && !rig.server.is_half_open(), "who has said VERSION may be silent");
}
