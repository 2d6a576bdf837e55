//! DMA windows.

use crate::rig::{Failure, Rig, errno, memfd};
use dray_device::vfio_user::wire::{DmaMap, DmaUnmap, command, dma, errno as code};
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::VfioUserConfig;
use std::os::fd::AsFd;
use zerocopy::IntoBytes;

const BOTH: u32 = dma::READ | dma::WRITE;

fn window(address: u64, size: u64) -> DmaMap {
    DmaMap { argsz: 32, flags: BOTH, offset: 0, address, size }
}

fn unmap(address: u64, size: u64, flags: u32) -> DmaUnmap {
    DmaUnmap { argsz: 24, flags, address, size }
}

fn map(rig: &mut Rig, map: DmaMap, fd: Option<&impl AsFd>) -> Result<(), Failure> {
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    let (reply, _) = rig.ask_with(command::DMA_MAP, map.as_bytes(), &fds)?;
    assert!(reply.is_empty());
    Ok(())
}

fn take(rig: &mut Rig, request: DmaUnmap) -> Result<(), Failure> {
    let reply = rig.ask(command::DMA_UNMAP, request.as_bytes())?;
    assert_eq!(reply, request.as_bytes());
    Ok(())
}

#[test]
fn memory_is_reached_in_place_and_as_far_as_it_was_given() {
    let mut rig = Rig::new();
    let memory = memfd(0x4000);
    map(&mut rig, DmaMap { offset: 0x1000, ..window(0x10_0000, 0x2000) }, Some(&memory)).expect("map");
    map(&mut rig, DmaMap { flags: dma::READ, ..window(0x20_0000, 0x1000) }, Some(&memory)).expect("map");
    rustix::io::pwrite(&memory, b"hello", 0x1ff0).expect("write");
    let reader = rig.server.slot().space().reader();
    let mut bytes = [0; 5];
    reader.lookup(0x10_0ff0, 5, false).expect("mapped").read(&mut bytes);
    assert_eq!(&bytes, b"hello");
    reader.lookup(0x10_1000, 2, true).expect("writable").write(b"ok");
    rustix::io::pread(&memory, &mut bytes[..2], 0x2000).expect("read");
    assert_eq!(&bytes[..2], b"ok");
    assert!(reader.lookup(0x10_1fff, 2, false).is_none() && reader.lookup(0x20_0000, 1, true).is_none());
    assert!(reader.lookup(0x20_0000, 1, false).is_some());
    assert_eq!(rig.server.counters().maps, 2);
}

#[test]
fn a_window_without_memory_is_kept_and_means_nothing() {
    let mut rig = Rig::new();
    map(&mut rig, window(0xf_0000, 0x1_0000), None::<&std::fs::File>).expect("kept");
    map(&mut rig, window(0xf_0000, 0x1_0000), None::<&std::fs::File>).expect("again");
    assert!(rig.server.slot().space().find(0xf_0000).is_none());
    assert_eq!(errno(map(&mut rig, window(0xf_0000, 0x1000), Some(&memfd(0x1000)))), code::EEXIST);
    take(&mut rig, unmap(0xf_0000, 0x1_0000, 0)).expect("unmap");
    let counters = rig.server.counters();
    assert_eq!((counters.unusable_maps, counters.unmaps), (1, 1));
}

#[test]
fn windows_do_not_overlap_unless_they_are_the_same() {
    let mut rig = Rig::new();
    let memory = memfd(0x8000);
    map(&mut rig, window(0x10_0000, 0x4000), Some(&memory)).expect("map");
    map(&mut rig, window(0x10_0000, 0x4000), Some(&memory)).expect("the same again");
    assert_eq!(rig.server.dma_windows(), 1);
    for (address, size) in [(0x10_0000, 0x1000), (0x10_3000, 0x2000), (0xf_f000, 0x2000), (0xf_f000, 0x8000)] {
        assert_eq!(errno(map(&mut rig, window(address, size), Some(&memory))), code::EEXIST, "{address:#x}");
    }
    let other = memfd(0x4000);
    assert_eq!(errno(map(&mut rig, window(0x10_0000, 0x4000), Some(&other))), code::EEXIST, "another file");
    map(&mut rig, window(0x10_4000, 0x1000), Some(&memory)).expect("a neighbour");
    map(&mut rig, window(0xf_f000, 0x1000), Some(&memory)).expect("a neighbour");
}

#[test]
fn windows_that_make_no_sense_are_refused() {
    let mut rig = Rig::new();
    let memory = memfd(0x4000);
    let (pipe, _write) = std::io::pipe().expect("pipe");
    for bad in [
        window(0x10_0000, 0),
        window(0x10_0800, 0x1000),
        window(0x10_0000, 0x1800),
        window(u64::MAX - 0xfff, 0x2000),
        window(1 << 60, 0x1000),
        window(0x10_0000, 0x5000),
        DmaMap { argsz: 31, ..window(0x10_0000, 0x1000) },
        DmaMap { flags: 0, ..window(0x10_0000, 0x1000) },
        DmaMap { flags: BOTH | 1 << 7, ..window(0x10_0000, 0x1000) },
        DmaMap { offset: 0x800, ..window(0x10_0000, 0x1000) },
        DmaMap { offset: 0x4000, ..window(0x10_0000, 0x1000) },
        DmaMap { offset: u64::MAX - 0xfff, ..window(0x10_0000, 0x1000) },
    ] {
        assert_eq!(errno(map(&mut rig, bad, Some(&memory))), code::EINVAL, "{bad:?}");
    }
    assert_eq!(errno(map(&mut rig, window(0x10_0000, 0x1000), Some(&pipe))), code::EINVAL, "not memory");
    let indirect = DmaMap { flags: BOTH | dma::FILE_IO, ..window(0x10_0000, 0x1000) };
    assert_eq!(errno(map(&mut rig, indirect, Some(&memory))), code::ENOTSUP);
    let two = rig.ask_with(command::DMA_MAP, window(0x10_0000, 0x1000).as_bytes(), &[memory.as_fd(), memory.as_fd()]);
    assert_eq!(errno(two), code::EINVAL);
    assert_eq!((rig.server.dma_windows(), rig.server.slot().space().generation()), (0, 0));
}

#[test]
fn limits_hold() {
    let config = VfioUserConfig { max_dma_maps: 2, max_dma_bytes: 0x3000, ..VfioUserConfig::default() };
    let mut rig = Rig::with(config, Box::new(NoMigration));
    let memory = memfd(0x4000);
    assert_eq!(errno(map(&mut rig, window(0x10_0000, 0x4000), Some(&memory))), code::ENOSPC);
    map(&mut rig, window(0x10_0000, 0x3000), Some(&memory)).expect("map");
    assert_eq!(errno(map(&mut rig, window(0x20_0000, 0x1000), Some(&memory))), code::ENOSPC);
    map(&mut rig, window(0x20_0000, 0x1000), None::<&std::fs::File>).expect("no bytes");
    assert_eq!(errno(map(&mut rig, window(0x30_0000, 0x1000), None::<&std::fs::File>)), code::ENOSPC);
    take(&mut rig, unmap(0, 0, dma::ALL)).expect("all");
    map(&mut rig, window(0x10_0000, 0x3000), Some(&memory)).expect("room again");
}

#[test]
fn an_unmap_names_a_window_exactly_or_all() {
    let mut rig = Rig::new();
    let memory = memfd(0x4000);
    for address in [0x10_0000, 0x20_0000, 0x30_0000] {
        map(&mut rig, window(address, 0x2000), Some(&memory)).expect("map");
    }
    assert_eq!(errno(take(&mut rig, unmap(0x40_0000, 0x2000, 0))), code::ENOENT);
    assert_eq!(errno(take(&mut rig, unmap(0x10_1000, 0x1000, 0))), code::ENOENT);
    for bad in [unmap(0x10_0000, 0x1000, 0), unmap(0x10_0000, 0x4000, 0), unmap(0x10_0000, 0x2000, dma::GET_DIRTY)] {
        assert_eq!(errno(take(&mut rig, bad)), code::EINVAL);
    }
    assert_eq!(errno(take(&mut rig, unmap(0x10_0000, 0x2000, dma::ALL))), code::EINVAL);
    assert_eq!(errno(take(&mut rig, DmaUnmap { argsz: 23, ..unmap(0x10_0000, 0x2000, 0) })), code::EINVAL);
    // Some clients attach the descriptor here as well.
    let gone = unmap(0x10_0000, 0x2000, 0);
    let _reply = rig.ask_with(command::DMA_UNMAP, gone.as_bytes(), &[memory.as_fd()]).expect("unmap");
    assert_eq!((rig.server.dma_windows(), rig.server.counters().stray_fds), (2, 1));
    take(&mut rig, unmap(0, 0, dma::ALL)).expect("all");
    take(&mut rig, unmap(0, 0, dma::ALL)).expect("none");
    assert_eq!((rig.server.dma_windows(), rig.server.counters().unmaps), (0, 3));
    assert!(rig.server.slot().space().find(0x20_0000).is_none());
}

#[test]
fn the_reply_to_an_unmap_waits_for_operations_under_way_and_later_requests_for_the_reply() {
    let mut rig = Rig::new();
    let memory = memfd(0x1000);
    map(&mut rig, window(0x10_0000, 0x1000), Some(&memory)).expect("map");
    // A device that is in the midst of an operation.
    let mut device = rig.server.slot().space().reader();
    let started = device.generation();
    let first = rig.post(command::DMA_UNMAP, unmap(0x10_0000, 0x1000, 0).as_bytes(), &[]);
    let second = rig.post(command::DMA_MAP, window(0x10_0000, 0x1000).as_bytes(), &[memory.as_fd()]);
    assert_eq!(rig.reply(50).map(|_| ()), Err(Failure::Nothing));
    assert!(device.refresh());
    device.release(started);
    assert_eq!(rig.reply(50).map(|_| ()), Err(Failure::Nothing));
    assert_eq!(rig.server.dma_windows(), 0, "the second has to wait");
    device.release(device.generation());
    let ids = [rig.reply(50).expect("reply").0.id, rig.reply(50).expect("reply").0.id];
    assert_eq!((ids, rig.server.dma_windows()), ([first.id, second.id], 1));
}

#[test]
fn memory_that_is_cut_short_ends_its_client_alone() {
    let mut rig = Rig::new();
    let memory = memfd(0x2000);
    map(&mut rig, window(0x10_0000, 0x2000), Some(&memory)).expect("map");
    rustix::fs::ftruncate(&memory, 0x1000).expect("cut");
    let mut bytes = [1; 8];
    rig.server.slot().space().reader().lookup(0x10_1000, 8, false).expect("mapped").read(&mut bytes);
    assert_eq!(bytes, [0; 8], "a read that nobody looks at is none");
    rig.now = rig.now.after_ms(10);
    rig.poll();
    assert!(!rig.server.is_attached());
    assert_eq!((rig.server.counters().broken_memory, rig.server.dma_windows()), (1, 0));
    rig.reconnect();
    rig.hello().expect("the next client");
}
