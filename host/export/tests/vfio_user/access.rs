//! Information, regions, interrupts, resets.

use crate::rig::{QEMU_JSON, Rig, VECTORS, errno, event, signals};
use dray_device::vfio_user::wire::{
    Capabilities, DeviceInfo, IrqInfo, IrqSet, MultiWrite, RegionAccess, RegionInfo, RegionIoFds, SparseArea, SparseMmap,
    WriteMulti, command, errno as code, irq, region,
};
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::{Bar0Map, VfioUserConfig};
use dray_nvme::registers::offset;
use std::os::fd::{AsFd, OwnedFd};
use zerocopy::IntoBytes;

fn info(rig: &mut Rig, index: u32, argsz: u32) -> (RegionInfo, Vec<u8>, Vec<OwnedFd>) {
    let request = RegionInfo { argsz, index, ..RegionInfo::default() };
    let (reply, fds) = rig.ask_with(command::GET_REGION_INFO, request.as_bytes(), &[]).expect("info");
    let (info, rest) = RegionInfo::take(&reply).expect("reply");
    (info, rest.to_vec(), fds)
}

#[test]
fn versions_are_agreed_with_and_without_capabilities() {
    let mut rig = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
    let reply = rig.hello().expect("version");
    assert_eq!(reply[..4], [0, 0, 0, 0]);
    assert!(reply.len() <= 4 + QEMU_JSON.len(), "longer than the request");
    let agreed = Capabilities::parse(&reply[4..]).expect("capabilities");
    assert_eq!((agreed.max_msg_fds, agreed.max_dma_maps, agreed.write_multiple), (16, 1024, true));
    assert_eq!(errno(rig.hello()), code::EINVAL, "said twice");

    let mut spdk = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
    let reply = spdk.ask(command::VERSION, &[0, 0, 9, 0]).expect("version");
    assert_eq!(reply[..4], [0, 0, 2, 0]);
    assert!(!Capabilities::parse(&reply[4..]).expect("capabilities").write_multiple);

    for text in [&b"{\"capabilities\":{\"max_msg_fds\":8}}\0"[..], b"{}\0"] {
        let mut short = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
        let request = [&[0, 0, 1, 0], text].concat();
        let reply = short.ask(command::VERSION, &request).expect("version");
        assert!(reply.len() <= request.len() && reply[2] == 1, "longer than the request");
        Capabilities::parse(&reply[4..]).expect("capabilities");
    }
}

#[test]
fn the_device_is_a_pci_function_that_can_be_reset() {
    let mut rig = Rig::new();
    let request = DeviceInfo { argsz: 16, ..DeviceInfo::default() };
    let reply = rig.ask(command::GET_INFO, request.as_bytes()).expect("info");
    let expected = DeviceInfo { argsz: 16, flags: 3, regions: 9, irqs: 5 };
    assert_eq!(reply, expected.as_bytes());
    assert_eq!(errno(rig.ask(command::GET_INFO, DeviceInfo::default().as_bytes())), code::EINVAL);
}

#[test]
fn doorbells_are_one_sparse_area_with_one_descriptor() {
    let mut rig = Rig::new();
    let (first, rest, fds) = info(&mut rig, region::BAR0, 32);
    let wanted = RegionInfo::READ | RegionInfo::WRITE | RegionInfo::MMAP | RegionInfo::CAPS;
    assert_eq!((first.argsz, first.flags, first.cap_offset, first.size), (64, wanted, 32, 0x4000));
    assert!(rest.is_empty() && fds.is_empty(), "too small a buffer gets no descriptor");
    let (second, rest, fds) = info(&mut rig, region::BAR0, 4064);
    assert_eq!((second.argsz, second.cap_offset, second.offset, fds.len()), (64, 32, 0, 1));
    let (sparse, areas) = SparseMmap::take(&rest).expect("capability");
    assert_eq!((sparse.id, sparse.version, sparse.next, sparse.areas), (1, 1, 0, 1));
    assert_eq!(areas, SparseArea { offset: 0x1000, size: 0x1000 }.as_bytes());
    // What is written there is what the controller polls.
    rustix::io::pwrite(&fds[0], &7u32.to_le_bytes(), 0x1008).expect("write");
    assert_eq!(rig.server.slot().bar().load32(offset::DOORBELLS + 8), 7);
    let seals = rustix::fs::fcntl_get_seals(&fds[0]).expect("seals");
    assert!(seals.contains(rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::SEAL));
}

#[test]
fn bar0_is_mapped_whole_or_not_at_all_where_that_is_wanted() {
    let mut whole = Rig::with(VfioUserConfig { bar0: Bar0Map::Whole, ..VfioUserConfig::default() }, Box::new(NoMigration));
    let (bar, rest, fds) = info(&mut whole, region::BAR0, 32);
    assert_eq!((bar.argsz, bar.flags, bar.cap_offset, bar.size, fds.len()), (32, 7, 0, 0x4000, 1));
    assert!(rest.is_empty());
    assert_eq!(rustix::fs::fstat(&fds[0]).expect("stat").st_size, 0x4000, "the whole BAR can be touched");
    let mut none = Rig::with(VfioUserConfig { bar0: Bar0Map::None, ..VfioUserConfig::default() }, Box::new(NoMigration));
    let (bar, _, fds) = info(&mut none, region::BAR0, 4064);
    assert_eq!((bar.flags, bar.size, fds.len()), (3, 0x4000, 0));
    none.region_write(region::BAR0, 0x1004, &9u32.to_le_bytes()).expect("doorbell");
    assert_eq!(none.server.slot().bar().load32(offset::DOORBELLS + 4), 9);
    assert_eq!(none.region_read(region::BAR0, 0x1004, 4).expect("read"), [0; 4], "doorbells are not read");
}

#[test]
fn regions_that_exist_have_a_size_and_others_none() {
    let mut rig = Rig::new();
    let sizes: Vec<u64> = (0..9).map(|index| info(&mut rig, index, 32).0.size).collect();
    assert_eq!(sizes, [0x4000, 0, 0, 0, 0x1000, 0x1000, 0, 0x1000, 0]);
    for (argsz, index) in [(31, 0), (32, 9), (32, u32::MAX)] {
        let request = RegionInfo { argsz, index, ..RegionInfo::default() };
        assert_eq!(errno(rig.ask(command::GET_REGION_INFO, request.as_bytes())), code::EINVAL);
    }
}

#[test]
fn no_region_has_descriptors_for_single_registers() {
    let mut rig = Rig::new();
    for index in 0..region::COUNT {
        // Room for entries brings none: doorbells are mapped.
        let request = RegionIoFds { argsz: 16 + 40 * 8, index, ..RegionIoFds::default() };
        let (reply, fds) = rig.ask_with(command::GET_REGION_IO_FDS, request.as_bytes(), &[]).expect("none");
        assert_eq!(reply, RegionIoFds { argsz: 16, ..request }.as_bytes(), "region {index}");
        assert!(fds.is_empty());
    }
    let good = RegionIoFds { argsz: 16, ..RegionIoFds::default() };
    for bad in [
        RegionIoFds { argsz: 15, ..good },
        RegionIoFds { index: region::COUNT, ..good },
        RegionIoFds { index: u32::MAX, ..good },
        RegionIoFds { flags: 1, ..good },
    ] {
        assert_eq!(errno(rig.ask(command::GET_REGION_IO_FDS, bad.as_bytes())), code::EINVAL, "{bad:?}");
    }
}

#[test]
fn what_was_agreed_bounds_both_ends() {
    let read = |rig: &mut Rig, count: u32| rig.region_read(region::CONFIG, 0, count);
    // The client takes less than the server gives.
    let mut small = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
    let text = b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":64,\"max_msg_fds\":0}}\0";
    small.ask(command::VERSION, text).expect("version");
    assert_eq!((read(&mut small, 64).expect("read").len(), errno(read(&mut small, 65))), (64, code::EINVAL));
    let (bar, rest, fds) = info(&mut small, region::BAR0, 4064);
    assert_eq!((bar.flags & RegionInfo::MMAP, rest.len(), fds.len()), (0, 0, 0), "it takes no descriptor");
    // And the other way round: what the server has said is what it takes.
    let config = VfioUserConfig { max_data_bytes: 4096, max_msg_fds: 2, ..VfioUserConfig::default() };
    let mut rig = Rig::raw(config, Box::new(NoMigration));
    let agreed = Capabilities::parse(&rig.hello().expect("version")[4..]).expect("capabilities");
    assert_eq!((agreed.max_data_xfer_size, agreed.max_msg_fds), (4096, 2));
    let whole = rig.region_read(region::BAR0, 0, 4096).expect("read");
    assert_eq!((whole.len(), errno(rig.region_read(region::BAR0, 0, 4097))), (4096, code::EINVAL));
    let lines = [event(), event(), event()];
    let fds = lines.each_ref().map(AsFd::as_fd);
    let set = |count| irqs(IrqSet::DATA_EVENTFD | IrqSet::TRIGGER, 0, count);
    assert!(rig.ask_with(command::SET_IRQS, set(2).as_bytes(), &fds[..2]).is_ok());
    assert_eq!(errno(rig.ask_with(command::SET_IRQS, set(3).as_bytes(), &fds)), code::EINVAL);
    // More minor versions than there are, another major one.
    for (major, minor, answer) in [(0u16, 9u16, Some(2u16)), (0, 1, Some(1)), (1, 0, None)] {
        let mut rig = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
        let reply = rig.ask(command::VERSION, &[major.to_le_bytes(), minor.to_le_bytes()].concat());
        assert_eq!(reply.ok().map(|reply| u16::from_le_bytes([reply[2], reply[3]])), answer, "{major}.{minor}");
    }
}

#[test]
fn commands_of_the_other_direction_and_those_that_are_gone_are_refused() {
    let mut rig = Rig::new();
    // The old dirty pages; what only a server sends; none at all.
    for command in [0, 14, command::DMA_READ, command::DMA_WRITE, 19, u16::MAX] {
        assert_eq!(errno(rig.ask(command, &[0; 64])), code::EINVAL, "command {command}");
    }
    assert_eq!(rig.register(offset::CSTS), 0, "and the client goes on");
}

#[test]
fn registers_are_read_and_written_by_four_and_eight_bytes() {
    let mut rig = Rig::new();
    rig.plug();
    let cap = rig.region_read(region::BAR0, 0, 8).expect("CAP");
    assert_eq!(cap, rig.server.slot().bar().load64(offset::CAP).to_le_bytes());
    assert_eq!(rig.region_read(region::BAR0, 2, 3).expect("a part"), cap[2..5]);
    let page = rig.region_read(region::BAR0, 0, 0x4000).expect("all of it");
    assert_eq!((page.len(), &page[..8], page[0x1000..].iter().any(|&byte| byte != 0)), (0x4000, &cap[..], false));
    rig.region_write(region::BAR0, offset::ASQ.into(), &0x12_3000u64.to_le_bytes()).expect("ASQ");
    assert_eq!(rig.region_read(region::BAR0, offset::ASQ.into(), 8).expect("ASQ"), 0x12_3000u64.to_le_bytes());
    rig.region_write(region::BAR0, 0x3ffc, &[1; 4]).expect("ignored");
    for (at, data) in [(offset::CC as u64, &[1][..]), (offset::CC as u64 + 1, &[1; 4]), (0x3ffe, &[1; 4]), (u64::MAX, &[1; 4])] {
        assert_eq!(errno(rig.region_write(region::BAR0, at, data)), code::EINVAL, "{at:#x}");
    }
    for (index, at, count) in [(region::BAR0, 0x4000, 1), (region::BAR0, 0, 0x4001), (1, 0, 4), (6, 0, 1), (9, 0, 1), (7, 0xfff, 2)] {
        assert_eq!(errno(rig.region_read(index, at, count)), code::EINVAL, "{index} {at:#x}");
    }
    let nothing = RegionAccess { offset: u64::MAX, region: 0, count: 0 };
    assert!(rig.ask(command::REGION_READ, nothing.as_bytes()).expect("nothing").is_empty());
    assert!(rig.ask(command::REGION_WRITE, nothing.as_bytes()).expect("nothing").is_empty());
    let lies = RegionAccess { offset: 0, region: 7, count: 5 };
    assert_eq!(errno(rig.ask(command::REGION_WRITE, &[lies.as_bytes(), &[0; 4]].concat())), code::EINVAL);
}

#[test]
fn configuration_space_and_msix_table_are_the_servers() {
    let mut rig = Rig::new();
    assert_eq!(rig.region_read(region::CONFIG, 8, 4).expect("class")[1..], [0x02, 0x08, 0x01]);
    rig.region_write(region::CONFIG, 0x10, &[0xff; 4]).expect("sizing");
    assert_eq!(rig.region_read(region::CONFIG, 0x10, 4).expect("size"), 0xffff_c004u32.to_le_bytes());
    rig.region_write(region::CONFIG, 4, &0x0404u16.to_le_bytes()).expect("command");
    assert_eq!(rig.region_read(region::CONFIG, 4, 2).expect("command"), [4, 4]);
    assert_eq!(rig.region_read(region::BAR4, 12, 4).expect("control"), [1, 0, 0, 0], "masked at first");
    rig.region_write(region::BAR4, 0, &[0xaa; 16]).expect("entry");
    rig.region_write(region::BAR4, 0xffc, &[0xaa; 4]).expect("behind the table");
    assert_eq!(rig.region_read(region::BAR4, 0, 16).expect("entry"), [0xaa; 16]);
    assert_eq!(rig.region_read(region::BAR4, 0xffc, 4).expect("nothing"), [0; 4]);
    rig.ask(command::RESET, &[]).expect("reset");
    assert_eq!(rig.region_read(region::CONFIG, 4, 2).expect("command"), [0, 0]);
    assert_eq!(rig.region_read(region::BAR4, 0, 16).expect("entry")[12], 1);
}

fn irqs(flags: u32, start: u32, count: u32) -> IrqSet {
    IrqSet { argsz: 20, flags, index: irq::MSIX, start, count }
}

#[test]
fn eventfds_are_set_in_pieces_and_taken_away() {
    let mut rig = Rig::new();
    let set = IrqSet::DATA_EVENTFD | IrqSet::TRIGGER;
    let events: Vec<OwnedFd> = (0..VECTORS).map(|_| event()).collect();
    for (start, count) in [(0u32, 2u32), (2, 3)] {
        let fds: Vec<_> = events[start as usize..][..count as usize].iter().map(AsFd::as_fd).collect();
        let _none = rig.ask_with(command::SET_IRQS, irqs(set, start, count).as_bytes(), &fds).expect("set");
    }
    (0..VECTORS).for_each(|vector| rig.server.slot().raise(vector));
    assert!(events.iter().all(|event| signals(event) == 1));
    rig.ask(command::SET_IRQS, irqs(IrqSet::DATA_NONE | IrqSet::TRIGGER, 1, 2).as_bytes()).expect("fire");
    let bools = [irqs(IrqSet::DATA_BOOL | IrqSet::TRIGGER, 2, 3).as_bytes(), &[1, 0, 1]].concat();
    rig.ask(command::SET_IRQS, &bools).expect("fire");
    assert_eq!(events.iter().map(signals).collect::<Vec<_>>(), [0, 1, 2, 0, 1]);
    rig.ask(command::SET_IRQS, irqs(set, 1, 1).as_bytes()).expect("take one away");
    rig.server.slot().raise(1);
    assert_eq!((signals(&events[1]), rig.region_read(region::BAR5, 0, 8).expect("pending")), (0, vec![2, 0, 0, 0, 0, 0, 0, 0]));
    let _none = rig.ask_with(command::SET_IRQS, irqs(set, 1, 1).as_bytes(), &[events[1].as_fd()]).expect("again");
    assert_eq!((signals(&events[1]), rig.region_read(region::BAR5, 0, 1).expect("pending")), (1, vec![0]));
    rig.ask(command::SET_IRQS, irqs(IrqSet::DATA_NONE | IrqSet::TRIGGER, 0, 0).as_bytes()).expect("all off");
    (0..VECTORS).for_each(|vector| rig.server.slot().raise(vector));
    assert_eq!(events.iter().map(signals).sum::<u64>(), 0);
}

#[test]
fn interrupt_sets_that_make_no_sense_are_refused_and_change_nothing() {
    let mut rig = Rig::new();
    let (set, kept) = (IrqSet::DATA_EVENTFD | IrqSet::TRIGGER, event());
    let _none = rig.ask_with(command::SET_IRQS, irqs(set, 0, 1).as_bytes(), &[kept.as_fd()]).expect("set");
    let given = [kept.as_fd(), kept.as_fd()];
    for (request, count) in [
        (irqs(set, 5, 1), 1),
        (irqs(set, 4, 2), 2),
        (irqs(set, u32::MAX, 2), 2),
        (irqs(set, 1, u32::MAX), 0),
        (irqs(set, 0, 0), 0),
        (irqs(set, 0, 1), 2),
        (irqs(set, 0, 2), 1),
        (irqs(set | IrqSet::DATA_NONE, 0, 1), 0),
        (irqs(set | IrqSet::MASK, 0, 1), 0),
        (irqs(IrqSet::DATA_EVENTFD, 0, 1), 0),
        (irqs(IrqSet::TRIGGER, 0, 1), 0),
        (irqs(IrqSet::DATA_NONE | IrqSet::MASK, 0, 1), 0),
        (irqs(IrqSet::DATA_BOOL | IrqSet::TRIGGER, 0, 1), 0),
        (irqs(set | 1 << 9, 0, 1), 0),
        (IrqSet { index: 5, ..irqs(set, 0, 1) }, 1),
        (IrqSet { index: irq::MSI, ..irqs(set, 0, 1) }, 1),
        (IrqSet { index: irq::INTX, ..irqs(set, 1, 1) }, 1),
        (IrqSet { index: irq::INTX, ..irqs(IrqSet::DATA_NONE | IrqSet::MASK, 0, 2) }, 0),
        (IrqSet { index: irq::ERR, ..irqs(IrqSet::DATA_NONE | IrqSet::UNMASK, 0, 1) }, 0),
        (IrqSet { argsz: 19, ..irqs(set, 0, 1) }, 1),
    ] {
        let result = rig.ask_with(command::SET_IRQS, request.as_bytes(), &given[..count]);
        assert_eq!(errno(result), code::EINVAL, "{request:?}");
    }
    let (pipe, _write) = std::io::pipe().expect("pipe");
    let result = rig.ask_with(command::SET_IRQS, irqs(set, 1, 1).as_bytes(), &[pipe.as_fd()]);
    assert_eq!(errno(result), code::EINVAL, "not an eventfd");
    rig.server.slot().raise(0);
    assert_eq!(signals(&kept), 1);
}

#[test]
fn interrupts_are_msix_the_pin_and_the_error_line() {
    let mut rig = Rig::new();
    for index in 0..5 {
        let request = IrqInfo { argsz: 16, index, ..IrqInfo::default() };
        let reply = rig.ask(command::GET_IRQ_INFO, request.as_bytes()).expect("info");
        let (info, _) = IrqInfo::take(&reply).expect("reply");
        assert_eq!((info.index, info.count), (index, [1, 0, VECTORS.into(), 1, 0][index as usize]));
        assert_eq!(info.flags, [7, 1, 9, 9, 1][index as usize], "by eventfd; the pin is masked, by itself too");
    }
    let error = event();
    let set = IrqSet { argsz: 20, flags: IrqSet::DATA_EVENTFD | IrqSet::TRIGGER, index: irq::ERR, start: 0, count: 1 };
    let _none = rig.ask_with(command::SET_IRQS, set.as_bytes(), &[error.as_fd()]).expect("set");
    rig.ask(command::SET_IRQS, IrqSet { flags: IrqSet::DATA_NONE | IrqSet::TRIGGER, ..set }.as_bytes()).expect("test");
    assert_eq!(signals(&error), 1);
    rig.server.slot().unplug();
    rig.poll();
    rig.poll();
    assert_eq!((signals(&error), rig.register(offset::CSTS)), (1, u32::MAX), "surprise removal is told");
    let request = IrqInfo { argsz: 16, index: 5, ..IrqInfo::default() };
    assert_eq!(errno(rig.ask(command::GET_IRQ_INFO, request.as_bytes())), code::EINVAL);
}

#[test]
fn several_writes_in_one_message_stop_at_the_first_refused() {
    let mut rig = Rig::new();
    let write = |offset, count, value: u64| MultiWrite { offset, region: 0, count, data: value.to_le_bytes() };
    let ask = |rig: &mut Rig, writes: &[MultiWrite]| {
        let head = WriteMulti { count: writes.len() as u64 };
        rig.ask(command::REGION_WRITE_MULTI, &[head.as_bytes(), writes.as_bytes()].concat())
    };
    let writes = [write(0x1000, 4, 1), write(0x1008, 8, 0x2_0000_0003), write(0x14, 3, 1), write(0x1010, 4, 4)];
    assert_eq!(ask(&mut rig, &writes).expect("some"), 2u64.to_le_bytes());
    let bell = |rig: &Rig, at| rig.server.slot().bar().load32(at);
    assert_eq!([0x1000, 0x1008, 0x100c, 0x1010].map(|at| bell(&rig, at)), [1, 3, 2, 0]);
    assert_eq!(ask(&mut rig, &[write(0x1000, 9, 1)]).expect("none"), 0u64.to_le_bytes());
    let elsewhere = MultiWrite { region: region::COUNT, ..write(0, 4, 1) };
    assert_eq!(ask(&mut rig, &[write(0x1014, 4, 8), elsewhere]).expect("one"), 1u64.to_le_bytes());
    assert_eq!(ask(&mut rig, &[]).expect("none"), 0u64.to_le_bytes());
    // As many as a hypervisor packs, one of which resets the function: the reply waits for that, and counts all.
    let mut many: Vec<_> = (0..200).map(|at| write(0x1000 + at * 4, 4, at + 1)).collect();
    let control = MultiWrite { offset: 0x58, region: region::CONFIG, ..write(0, 2, 0xa810) };
    many.insert(100, control);
    assert_eq!(ask(&mut rig, &many).expect("all"), 201u64.to_le_bytes());
    assert_eq!((bell(&rig, 0x1000 + 199 * 4), rig.server.counters().resets), (200, 1));
    for count in [1u64, 3, u64::MAX] {
        let payload = [&count.to_le_bytes()[..], [write(0x1000, 4, 1); 2].as_bytes()].concat();
        assert_eq!(errno(rig.ask(command::REGION_WRITE_MULTI, &payload)), code::EINVAL);
    }
    let mut other = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
    other.ask(command::VERSION, &[0; 4]).expect("version");
    assert_eq!(errno(ask(&mut other, &[])), code::EINVAL, "not agreed");
}

#[test]
fn what_wants_no_reply_gets_none_and_is_done() {
    let mut rig = Rig::new();
    let access = RegionAccess { offset: 0x1000, region: 0, count: 4 };
    for value in 1..=200u32 {
        rig.tell(command::REGION_WRITE, &[access.as_bytes(), &value.to_le_bytes()].concat());
    }
    rig.tell(command::REGION_READ, &[0xff; 16]);
    assert_eq!(rig.register(offset::CSTS), 0, "the next reply is of the next request");
    assert_eq!((rig.server.slot().bar().load32(0x1000), rig.server.counters().refused), (200, 1));
}
