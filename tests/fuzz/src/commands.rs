//! Commands of the input's choice: whole ones with odd values, and any bytes.

use crate::guest::{ENTRIES, Party};
use crate::input::Input;
use dray_nvme::cdq::QueueType;
use dray_nvme::command::{Cdw0, FeatureSelect, SequenceIndicator, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{Cns, CommandSetId};
use dray_nvme::log::LogId;
use zerocopy::FromBytes;

fn nsid(input: &mut Input<'_>) -> u32 {
    match input.u8() {
        0..=159 => 1,
        160..=189 => 2,
        190..=219 => 3,
        220..=239 => u32::MAX,
        _ => input.number32(),
    }
}

fn cntlid(input: &mut Input<'_>) -> u16 {
    match input.u8() {
        small @ 0..=239 => u16::from(small % 4) + 1,
        _ => input.number16(),
    }
}

/// An I/O command that is whole: what it reads and writes is what it says. The second value is the range of blocks of
/// namespace 1 that it may change.
pub fn whole_io(party: &Party, input: &mut Input<'_>) -> (SubmissionEntry, Option<(u64, u64)>) {
    let (entry, range) = whole(input);
    (party.with_pointer(entry, input), range)
}

/// An I/O command over fabrics; the data pointer is the caller's.
pub fn fabric_io(input: &mut Input<'_>) -> SubmissionEntry {
    not_fabrics(match input.below(8) {
        0..=4 => whole(input).0,
        5 => SubmissionEntry::dsm(nsid(input), input.number16() & 0xff),
        6 => SubmissionEntry::copy(nsid(input), input.number(), input.number16() & 0xff),
        _ => odd(SubmissionEntry::default(), input),
    })
}

/// An admin command over fabrics; the data pointer is the caller's.
pub fn fabric_admin(input: &mut Input<'_>) -> SubmissionEntry {
    not_fabrics(match input.below(12) {
        0 | 1 => SubmissionEntry::identify(Cns(input.u8() & 0x3f), nsid(input), cntlid(input), CommandSetId(input.u8() & 3)),
        2 => SubmissionEntry::get_log_page(LogId(input.u8() & 31), nsid(input), input.number(), input.number32() & 0xfff, input.flag()),
        3 => SubmissionEntry { cdw12: input.number32(), ..SubmissionEntry::set_features(feature(input), input.number32(), input.flag()) },
        4 => SubmissionEntry::get_features(feature(input), FeatureSelect(input.u8() & 3), input.number32()),
        5 => SubmissionEntry::abort(input.number16(), input.number16()),
        6 => SubmissionEntry::async_event_request(),
        7 => SubmissionEntry::keep_alive(),
        // Room for the log of discovery, whole.
        8 => SubmissionEntry::get_log_page(LogId(0x70), 0, input.number(), input.number32() & 0xffff, input.flag()),
        9 => any(input),
        _ => odd(SubmissionEntry::default(), input),
    })
}

/// Fabrics commands are made by those who know what they do.
fn not_fabrics(mut entry: SubmissionEntry) -> SubmissionEntry {
    if entry.cdw0.opcode() == dray_nvme::tcp::fabrics::OPCODE {
        entry.cdw0.set_opcode(0x7e);
    }
    entry
}

fn whole(input: &mut Input<'_>) -> (SubmissionEntry, Option<(u64, u64)>) {
    let (which, nsid) = (input.below(8), nsid(input));
    let (slba, blocks) = (input.number(), input.number32() % 40 + 1);
    let range = Some((slba, slba.saturating_add(blocks.into()))).filter(|_| nsid == 1);
    match which {
        0 | 1 => (SubmissionEntry::write(nsid, slba, blocks), range),
        2 => (SubmissionEntry::read(nsid, slba, blocks), None),
        3 => (SubmissionEntry::compare(nsid, slba, blocks), None),
        4 => (SubmissionEntry::verify(nsid, slba, blocks), None),
        5 => (SubmissionEntry::write_zeroes(nsid, slba, blocks, input.flag()), range),
        6 => (SubmissionEntry::write_uncorrectable(nsid, slba, blocks), range),
        _ => (SubmissionEntry::flush(nsid), None),
    }
}

/// Any I/O command.
pub fn io(party: &Party, input: &mut Input<'_>) -> SubmissionEntry {
    let which = input.below(8);
    let entry = match which {
        0..=3 => return whole_io(party, input).0,
        4 => SubmissionEntry::dsm(nsid(input), input.number16()),
        5 => SubmissionEntry::copy(nsid(input), input.number(), input.number16()),
        6 => odd(SubmissionEntry::default(), input),
        _ => return any(input),
    };
    party.with_pointer(entry, input)
}

/// Any admin command.
pub fn admin(party: &Party, input: &mut Input<'_>) -> SubmissionEntry {
    let which = match input.below(18) {
        // Queues anywhere would hold commands that nobody knows of.
        11 | 12 if party.data_only => 0,
        which => which,
    };
    let entry = match which {
        0 => SubmissionEntry::identify(Cns(input.u8() & 0x3f), nsid(input), cntlid(input), CommandSetId(input.u8() & 3)),
        1 | 2 => return pair(party, input),
        3 => SubmissionEntry::delete_io_sq(input.number16()),
        4 => SubmissionEntry::delete_io_cq(input.number16()),
        5 => SubmissionEntry::get_log_page(LogId(input.u8() & 31), nsid(input), input.number(), input.number32(), input.flag()),
        6 => SubmissionEntry { cdw12: input.number32(), ..SubmissionEntry::set_features(feature(input), input.number32(), input.flag()) },
        7 => SubmissionEntry::get_features(feature(input), FeatureSelect(input.u8() & 3), input.number32()),
        8 => SubmissionEntry::abort(input.number16(), input.number16()),
        9 => SubmissionEntry::async_event_request(),
        10 => SubmissionEntry::keep_alive(),
        11 => odd(SubmissionEntry::default(), input),
        12 => return any(input),
        _ => migration(input),
    };
    party.with_pointer(entry, input)
}

fn feature(input: &mut Input<'_>) -> FeatureId {
    match input.u8() {
        fid @ 0..=0x23 => FeatureId(fid),
        0x24..=0x60 => FeatureId(0x84),
        0x61..=0xa0 => FeatureId::VENDOR_GUEST_LIMIT,
        0xa1..=0xd0 => FeatureId::CONTROLLER_DATA_QUEUE,
        fid => FeatureId(fid),
    }
}

/// Creates half a queue pair, most often where the party has room for it.
fn pair(party: &Party, input: &mut Input<'_>) -> SubmissionEntry {
    let (qid, half) = (input.u8(), input.below(2));
    if qid < 200 || party.data_only {
        return party.pair_commands(u16::from(qid % 4) + 1)[half];
    }
    let (qid, size, at) = (input.number16(), input.number16(), party.address(input));
    match half {
        0 => SubmissionEntry::create_io_cq(qid, size, Some(input.number16()), at),
        _ => SubmissionEntry::create_io_sq(qid, size, input.number16(), at),
    }
}

/// A command for the management controller.
fn migration(input: &mut Input<'_>) -> SubmissionEntry {
    let (which, target) = (input.below(14), cntlid(input));
    match which {
        0 | 1 => {
            let dwords = if input.flag() { input.number32() } else { u32::from(ENTRIES) * 8 };
            SubmissionEntry::create_cdq(QueueType(input.u8() & 1), target, input.flag(), dwords, 0)
        }
        2 => SubmissionEntry::delete_cdq(input.number16()),
        3 => SubmissionEntry::set_cdq_feature(input.number16(), input.number32(), input.flag().then(|| input.number32())),
        4 => SubmissionEntry::get_cdq_feature(input.number16()),
        5 | 6 => SubmissionEntry::track_send_log(input.flag(), input.number16()),
        7 => SubmissionEntry::track_send_memory(input.flag(), target),
        8 => SubmissionEntry::track_receive(target, input.number32()),
        9 => SubmissionEntry::suspend(target, input.flag(), input.flag()),
        10 => SubmissionEntry::resume(target),
        11 => {
            let seqind = SequenceIndicator(input.u8() & 3);
            SubmissionEntry::set_controller_state(seqind, input.u8() & 1, target, input.u8() & 1, input.number(), input.number32())
        }
        12 => SubmissionEntry::get_controller_state(input.u8() & 1, target, input.u8() & 1, input.number(), input.number32()),
        _ => {
            let limit = SubmissionEntry::set_features(FeatureId::VENDOR_GUEST_LIMIT, target.into(), false);
            SubmissionEntry { cdw12: input.number32(), ..limit }
        }
    }
}

/// Opcode and dwords as the input has them.
fn odd(mut entry: SubmissionEntry, input: &mut Input<'_>) -> SubmissionEntry {
    entry.cdw0 = Cdw0::from_bits(u32::from(input.u8()) | u32::from(input.u8() & 3) << 8);
    entry.nsid = nsid(input);
    entry.cdw10 = input.number32();
    entry.cdw11 = input.number32();
    entry.cdw12 = input.number32();
    entry.cdw13 = input.number32();
    entry.cdw14 = input.number32();
    entry.cdw15 = input.number32();
    entry
}

fn any(input: &mut Input<'_>) -> SubmissionEntry {
    let mut bytes = [0; 64];
    let given = input.bytes(64);
    bytes[..given.len()].copy_from_slice(given);
    SubmissionEntry::read_from_bytes(&bytes).unwrap_or_default()
}
