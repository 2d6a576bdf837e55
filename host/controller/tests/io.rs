//! I/O through registers and queues, by hand: what works, and what a hostile guest gets.
#![allow(missing_docs)]

mod support;

use dray_nvme::command::{Cdw0, NvmOpcode, SglDescriptor, SubmissionEntry};
use dray_nvme::identify::{Cns, CommandSetId, IdentifyController, IdentifyNamespace};
use dray_nvme::registers::{cq_head_doorbell, offset, sq_tail_doorbell};
use dray_nvme::status::Status;
use support::{BLOCKS, CC, Guest, MC, World, assert_ok};
use zerocopy::{FromBytes, IntoBytes};

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8).collect()
}

fn with_queue() -> (World, Guest) {
    let mut world = World::new();
    let mut guest = world.ready(MC);
    guest.create_pair(&mut world, 1, 16, Some(1));
    (world, guest)
}

#[test]
fn a_guest_identifies_writes_and_reads() {
    let (mut world, mut guest) = with_queue();
    let (done, page) = guest.admin_in(&mut world, SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM), 4096);
    assert_ok(done);
    let page = IdentifyController::read_from_bytes(&page).expect("page");
    assert_eq!((page.cntlid, page.serial(), page.oacs.hmlms()), (MC, Some("DRAY0001"), false));
    let (done, page) = guest.admin_in(&mut world, SubmissionEntry::identify(Cns::NAMESPACE, 1, 0, CommandSetId::NVM), 4096);
    assert_ok(done);
    let page = IdentifyNamespace::read_from_bytes(&page).expect("page");
    assert_eq!((page.nsze, page.block_bytes(), page.nguid), (BLOCKS, Some(512), [1; 16]));
    // Many times around the rings.
    for round in 0..50u8 {
        let data = pattern(round, 8192);
        assert_ok(guest.write(&mut world, 1, u64::from(round) * 16, &data));
        let (done, back) = guest.read(&mut world, 1, u64::from(round) * 16, 16);
        assert_ok(done);
        assert_eq!(back, data, "round {round}");
    }
    assert!(guest.function.event_line(1).expect("line").take() > 0, "interrupts were raised");
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::flush(1)));
}

#[test]
fn a_prp_list_may_begin_inside_a_page_and_chain() {
    let (mut world, mut guest) = with_queue();
    let len = 512 << 10;
    let data = guest.pages(len + 4096);
    let (first, second) = (guest.pages(4096), guest.pages(4096));
    let bytes = pattern(9, len);
    let skew = 2048;
    guest.put(data + skew, &bytes);
    // 128 pages behind the first, in a list that begins 100 slots before its page's end.
    let (slots, pages) = (100, 128);
    let begin = first + 4096 - slots * 8;
    for i in 0..pages {
        let entry = guest.address(data + (i + 1) * 4096).to_le_bytes();
        let at = if i < slots - 1 { begin + i * 8 } else { second + (i - (slots - 1)) * 8 };
        guest.put(at, &entry);
    }
    guest.put(begin + (slots - 1) * 8, &guest.address(second).to_le_bytes());
    let prps = (guest.address(data + skew), guest.address(begin));
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write(1, 8, 1024).with_prps(prps.0, prps.1)));
    guest.put(data + skew, &vec![0; len]);
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::read(1, 8, 1024).with_prps(prps.0, prps.1)));
    assert_eq!(guest.get(data + skew, len), bytes);
    let too_long = SubmissionEntry::read(1, 8, 1025).with_prps(prps.0, prps.1);
    assert!(guest.run(&mut world, 1, too_long).status().is(Status::INVALID_FIELD), "MDTS");
}

fn sgl(entry: SubmissionEntry, descriptor: SglDescriptor) -> SubmissionEntry {
    entry.with_sgl(descriptor)
}

#[test]
fn sgls_are_followed_and_checked() {
    let (mut world, mut guest) = with_queue();
    let (a, b, list) = (guest.pages(4096), guest.pages(4096), guest.pages(8192));
    guest.put(a, &pattern(1, 512));
    guest.put(b + 512, &pattern(2, 512));
    let blocks = [SglDescriptor::data_block(guest.address(a), 512), SglDescriptor::data_block(guest.address(b + 512), 512)];
    guest.put(list, blocks.as_bytes());
    let write = SubmissionEntry::write(1, 0, 2);
    assert_ok(guest.run(&mut world, 1, sgl(write, SglDescriptor::last_segment(guest.address(list), 32))));
    let (done, back) = guest.read(&mut world, 1, 0, 2);
    assert_ok(done);
    assert_eq!(back, [pattern(1, 512), pattern(2, 512)].concat());
    let address = guest.address(list);
    for (descriptor, status) in [
        (SglDescriptor::data_block(guest.address(a), 512), Status::SGL_DATA_LENGTH_INVALID),
        (SglDescriptor::data_block(guest.address(a), 2048), Status::SGL_DATA_LENGTH_INVALID),
        (SglDescriptor::data_block(0xdead_0000, 1024), Status::DATA_TRANSFER_ERROR),
        (SglDescriptor::bit_bucket(1024), Status::SGL_TYPE_INVALID),
        (SglDescriptor::last_segment(address, 0), Status::SGL_INVALID_SEGMENT),
        (SglDescriptor::last_segment(address, 24), Status::SGL_INVALID_SEGMENT),
        (SglDescriptor::last_segment(address, 1 << 20), Status::SGL_INVALID_COUNT),
        (SglDescriptor::segment(address, 32), Status::SGL_INVALID_SEGMENT),
        (SglDescriptor::last_segment(0xdead_0000, 32), Status::DATA_TRANSFER_ERROR),
    ] {
        let done = guest.run(&mut world, 1, sgl(write, descriptor));
        assert!(done.status().is(status), "{descriptor:?}: {done:?}");
    }
    // A list that points at itself ends.
    guest.put(list, SglDescriptor::segment(address, 16).as_bytes());
    let done = guest.run(&mut world, 1, sgl(write, SglDescriptor::segment(address, 16)));
    assert!(done.status().is(Status::SGL_INVALID_COUNT), "{done:?}");
}

#[test]
fn bad_commands_get_the_specifications_status() {
    let (mut world, mut guest) = with_queue();
    let at = guest.pages(8192);
    let good = guest.address(at);
    let read = |slba, blocks| SubmissionEntry::read(1, slba, blocks);
    let end = BLOCKS;
    let cases = [
        ("unknown opcode", SubmissionEntry::nvm(NvmOpcode(0x7f), 1), Status::INVALID_OPCODE),
        ("NSID 0", SubmissionEntry::read(0, 0, 1).with_prps(good, 0), Status::INVALID_NAMESPACE),
        ("NSID above NN", SubmissionEntry::read(9, 0, 1).with_prps(good, 0), Status::INVALID_NAMESPACE),
        ("flush of all", SubmissionEntry::flush(u32::MAX), Status::INVALID_NAMESPACE),
        ("past the end", read(end - 1, 2).with_prps(good, 0), Status::LBA_OUT_OF_RANGE),
        ("wrapping", read(u64::MAX, 2).with_prps(good, 0), Status::LBA_OUT_OF_RANGE),
        ("PRP1 outside memory", read(0, 1).with_prps(0x10, 0), Status::DATA_TRANSFER_ERROR),
        ("PRP1 behind memory", read(0, 1).with_prps(guest.iova + (16 << 20), 0), Status::DATA_TRANSFER_ERROR),
        ("PRP1 not on a dword", read(0, 1).with_prps(good + 2, 0), Status::PRP_OFFSET_INVALID),
        ("PRP2 with an offset", read(0, 16).with_prps(good, good + 8), Status::PRP_OFFSET_INVALID),
        ("PRP2 zero", read(0, 16).with_prps(good, 0), Status::INVALID_FIELD),
        ("PRP2 outside memory", read(0, 16).with_prps(good, 0x1000), Status::DATA_TRANSFER_ERROR),
        ("list outside memory", read(0, 64).with_prps(good, 0x1000), Status::DATA_TRANSFER_ERROR),
        ("list not on 8 bytes", read(0, 64).with_prps(good, good + 4), Status::PRP_OFFSET_INVALID),
        ("too long", read(0, 1025).with_prps(good, good), Status::INVALID_FIELD),
    ];
    for (what, entry, status) in cases {
        let done = guest.run(&mut world, 1, entry);
        assert!(done.status().is(status), "{what}: {done:?}");
        assert!(done.status().dnr() || status == Status::DATA_TRANSFER_ERROR, "{what}: a retry cannot cure it");
    }
    let mut psdt = read(0, 1).with_prps(good, 0);
    psdt.cdw0 = Cdw0::from_bits(psdt.cdw0.into_bits() | 3 << 14);
    assert!(guest.run(&mut world, 1, psdt).status().is(Status::INVALID_FIELD));
    let mut fused = read(0, 1).with_prps(good, 0);
    fused.cdw0 = Cdw0::from_bits(fused.cdw0.into_bits() | 1 << 8);
    assert!(guest.run(&mut world, 1, fused).status().is(Status::INVALID_FIELD));
    assert_ok(guest.read(&mut world, 1, 0, 1).0);
}

#[test]
fn any_bytes_as_commands_never_panic() {
    let (mut world, mut guest) = with_queue();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..20_000u32 {
        let mut words = [0u64; 8];
        words.iter_mut().for_each(|word| *word = next());
        // Half of them almost right, so that they get further.
        if round % 2 == 0 {
            words[0] = words[0] & 0xffff_0000_0000_0300 | [0, 1, 2, 4, 5, 8, 9, 12, 25][round as usize % 9] | 1 << 32;
            words[0] &= !0x300;
            words[3] = guest.iova + words[3] % (17 << 20);
            words[4] = guest.iova + words[4] % (17 << 20);
            words[5] %= BLOCKS + 10;
            words[6] &= 0xffff_ffff_0000_00ff;
        }
        let mut entry = SubmissionEntry::default();
        entry.as_mut_bytes().copy_from_slice(words.as_bytes());
        // The queues themselves must survive for the test to go on: what is read goes anywhere in memory but there.
        let opcode = entry.cdw0.opcode();
        if opcode == NvmOpcode::READ.0 {
            entry.cdw0.set_opcode(NvmOpcode::COMPARE.0);
        }
        guest.run(&mut world, 1, entry);
    }
    for _ in 0..2_000 {
        let mut words = [0u64; 8];
        words.iter_mut().for_each(|word| *word = next());
        words[0] &= !0xc3ff;
        words[0] |= [0x02, 0x06, 0x09, 0x0a, 0x08, 0x3d, 0x41, 0x45, 0x80, 0x01, 0x05, 0x04][(next() % 12) as usize];
        words[3] &= !0xfff;
        let mut entry = SubmissionEntry::default();
        entry.as_mut_bytes().copy_from_slice(words.as_bytes());
        guest.admin(&mut world, entry);
    }
}

#[test]
fn a_doorbell_beyond_the_queue_changes_nothing() {
    let (mut world, mut guest) = with_queue();
    for bell in [16, 17, u32::MAX] {
        guest.function.doorbell(sq_tail_doorbell(1, 0)).expect("bell").ring(bell);
        world.poll();
    }
    // Of a queue that does not exist.
    guest.function.doorbell(sq_tail_doorbell(3, 0)).expect("bell").ring(1);
    guest.function.doorbell(sq_tail_doorbell(400, 0)).expect("bell").ring(1);
    world.poll();
    guest.ring(1);
    assert_ok(guest.read(&mut world, 1, 0, 1).0);
    let bad: u64 = world.subsystem.counters().map(|(_, counters)| counters.bad_doorbells).sum();
    assert_eq!(bad, 3);
}

#[test]
fn a_completion_queue_that_is_never_drained_stops_its_queue_alone() {
    let (mut world, mut guest) = with_queue();
    guest.create_pair(&mut world, 2, 16, None);
    guest.drain = false;
    for _ in 0..3 {
        for _ in 0..15 {
            guest.push(1, SubmissionEntry::flush(1));
        }
        guest.ring(1);
        for _ in 0..20 {
            world.poll();
        }
    }
    let mut seen = 0;
    while guest.pop(1).is_some() {
        seen += 1;
    }
    assert_eq!(seen, 15, "one slot less than the queue has");
    // A head that skips what was never posted is not believed.
    guest.function.doorbell(cq_head_doorbell(1, 0)).expect("bell").ring(16);
    world.poll();
    assert!(guest.pop(1).is_none());
    guest.drain = true;
    assert_ok(guest.run(&mut world, 2, SubmissionEntry::flush(1)));
    guest.function.doorbell(cq_head_doorbell(1, 0)).expect("bell").ring(guest.queues[&1].head);
    for _ in 0..20 {
        world.poll();
    }
    assert!(guest.pop(1).is_some(), "it goes on when there is room");
}

#[test]
fn zeroes_deallocate_compare_verify_copy_and_uncorrectable_do_what_they_say() {
    let (mut world, mut guest) = with_queue();
    let data = pattern(3, 8192);
    assert_ok(guest.write(&mut world, 1, 100, &data));
    let at = guest.pages(8192);
    guest.put(at, &data);
    let prps = (guest.address(at), guest.address(at + 4096));
    let compare = SubmissionEntry::compare(1, 100, 16).with_prps(prps.0, prps.1);
    assert_ok(guest.run(&mut world, 1, compare));
    guest.put(at + 8000, &[!data[8000]]);
    assert!(guest.run(&mut world, 1, compare).status().is(Status::COMPARE_FAILURE));
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::verify(1, 0, 8192)));
    // Copy 4 + 12 blocks to 500.
    let list = guest.pages(4096);
    let ranges = [(100u64, 4u16), (104, 12)].map(|(slba, blocks)| dray_nvme::command::CopyRange0 {
        slba,
        nlb: blocks - 1,
        ..Default::default()
    });
    guest.put(list, ranges.as_bytes());
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::copy(1, 500, 2).with_prps(guest.address(list), 0)));
    assert_eq!(guest.read(&mut world, 1, 500, 16).1, data);
    // Long Write Zeroes in many polls.
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write_zeroes(1, 400, 4000, false)));
    assert_eq!(guest.read(&mut world, 1, 500, 16).1, vec![0; 8192]);
    assert_eq!(guest.read(&mut world, 1, 100, 16).1, data);
    // DSM: two ranges and an empty one.
    let ranges = [(100u64, 1u32), (0, 0), (103, 2)].map(|(slba, length)| dray_nvme::command::DsmRange {
        slba,
        length,
        ..Default::default()
    });
    guest.put(list, ranges.as_bytes());
    let dsm = SubmissionEntry::dsm(1, 3).with_prps(guest.address(list), 0);
    assert_ok(guest.run(&mut world, 1, dsm));
    let back = guest.read(&mut world, 1, 100, 16).1;
    for block in 0..16 {
        let zero = [0, 3, 4].contains(&block);
        let part = block * 512..block * 512 + 512;
        assert_eq!(back[part.clone()] == [0; 512], zero, "block {block}");
        assert!(zero || back[part.clone()] == data[part]);
    }
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write_uncorrectable(1, 105, 2)));
    assert!(guest.read(&mut world, 1, 100, 16).0.status().is(Status::UNRECOVERED_READ));
    assert!(guest.run(&mut world, 1, SubmissionEntry::verify(1, 106, 1)).status().is(Status::UNRECOVERED_READ));
    assert_ok(guest.write(&mut world, 1, 105, &data[..1024]));
    assert_ok(guest.read(&mut world, 1, 100, 16).0);
}

#[test]
fn reset_at_any_time_and_enable_again() {
    let (mut world, mut guest) = with_queue();
    for round in 0..20 {
        for _ in 0..10 {
            guest.push(1, SubmissionEntry::write_zeroes(1, 0, 4000, false));
        }
        guest.ring(1);
        for _ in 0..round % 4 {
            world.poll();
        }
        // A fall that is over before anyone looks counts all the same.
        guest.function.write32(offset::CC, 0);
        if round % 2 == 0 {
            for _ in 0..3 {
                world.poll();
            }
            assert_eq!(guest.csts() & 1, 0);
        }
        guest = {
            let mut again = Guest::new();
            std::mem::swap(&mut again.slot, &mut guest.slot);
            again.function = again.slot.function();
            let space = again.slot.space().clone();
            again.iova = space.map(&again.memory, true).expect("map");
            again
        };
        guest.enable(&mut world);
        guest.create_pair(&mut world, 1, 16, Some(1));
        assert_ok(guest.read(&mut world, 1, 0, 1).0);
    }
    guest.function.write32(offset::CC, CC | 1 << 14);
    for _ in 0..5 {
        world.poll();
    }
    assert_eq!(guest.csts(), 1 | 2 << 2, "shut down");
}

#[test]
fn what_cannot_be_enabled_says_so() {
    let mut world = World::new();
    let mut guest = world.guest(MC);
    for (register, value) in [(offset::AQA, 0), (offset::ASQ, 0x123), (offset::ACQ, 0x5008), (offset::CC, CC | 2 << 7)] {
        guest.start();
        guest.function.write32(register, value);
        for _ in 0..3 {
            world.poll();
        }
        // The first start may have been seen before the bad value: again, from the bad value.
        guest.function.write32(offset::CC, 0);
        world.poll();
        guest.function.write32(offset::CC, if register == offset::CC { value } else { CC });
        world.poll();
        assert_eq!(guest.csts(), 2, "CFS for register {register:#x}");
        guest.function.write32(offset::CC, 0);
        world.poll();
        assert_eq!(guest.csts(), 0);
    }
    guest.enable(&mut world);
}
