//! Controller state from a peer: blobs that are a real state with some of its values changed, or bytes changed, sent through
//! the management controller in pieces, in order or not, to the controller that it came from or to another one that the
//! guest's slot has been pointed at.
//!
//! It asserts that an honest state is accepted; that a state that decodes is encoded to what decodes to the same; that what was accepted is read back, but for
//! what the destination decides by itself (see `comparable`); that what was refused left the controller as it was; that Resume
//! and what follows stay inside the guest's memory and namespaces; and that a reset then brings everybody back.

use crate::controller::{GUEST, HOST, MC, NEIGHBOUR, World};
use crate::guest::DATA_PAGE;
use crate::input::Input;
use dray_controller::{ControllerState, VendorState, decode, encode};
use dray_device::memory::PAGE;
use dray_nvme::command::{SequenceIndicator, SubmissionEntry};
use dray_nvme::registers::Cc;
use dray_nvme::state::ControllerStateHeader;
use zerocopy::FromBytes;

/// Bytes of state that fit the host's two pages.
const MOST_BYTES: usize = 2 * PAGE;
/// Interrupt vectors of the guest's slot.
const VECTORS: usize = 4;

/// Runs one session.
///
/// # Panics
/// When a guarantee is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let bits = input.u8();
    if bits & 0xc0 == 0xc0 {
        return only_bytes(&mut input);
    }
    let mut world = World::new(true);
    world.enable(HOST);
    world.enable(GUEST);
    (1..=2 + u16::from(bits & 1)).for_each(|qid| world.pair(GUEST, qid));
    late_commands(&mut world, &mut input);
    suspend(&mut world, MC);
    let from = get(&mut world, MC).expect("the state of a suspended controller");
    let target = if bits & 2 == 0 { NEIGHBOUR } else { MC };
    if target == NEIGHBOUR {
        suspend(&mut world, NEIGHBOUR);
        let plug = world.subsystem.plug(NEIGHBOUR).expect("a controller");
        world.parties[GUEST].slot.point_at(&plug);
        world.polls(5);
    }
    transfer(&mut world, target, from, bits, &mut input);
    world.polls(60);
    world.check();
    world.heal();
    world.serves(GUEST, 1);
    world.polls(10);
    world.check();
}

/// Commands that lie in the guest's queues when its controller is suspended: rung, or not yet.
fn late_commands(world: &mut World, input: &mut Input<'_>) {
    for _ in 0..input.below(4) {
        let (qid, slba) = (input.below(2) + 1, input.u8());
        let page = world.parties[GUEST].page(DATA_PAGE);
        world.parties[GUEST].push(qid, &SubmissionEntry::write(1, slba.into(), 1).with_prps(page, 0));
        if input.flag() {
            world.parties[GUEST].ring(qid, 0);
        }
        world.polls(input.below(4));
    }
}

fn suspend(world: &mut World, cntlid: u16) {
    world.good(HOST, 0, &SubmissionEntry::suspend(cntlid, false, false));
}

/// The state of a controller, both parts.
fn get(world: &mut World, cntlid: u16) -> Option<Vec<u8>> {
    let page = world.parties[HOST].page(DATA_PAGE);
    let entry = SubmissionEntry::get_controller_state(1, cntlid, 1, 0, (MOST_BYTES / 4) as u32);
    let done = world.command(HOST, 0, &entry.with_prps(page, page + PAGE as u64));
    let mut bytes = world.parties[HOST].get(DATA_PAGE * PAGE, MOST_BYTES);
    let (header, _) = ControllerStateHeader::read_from_prefix(&bytes).ok()?;
    bytes.truncate(dray_nvme::state::ControllerState::total_bytes(&header)?);
    (!done.status().is_error()).then_some(bytes)
}

fn transfer(world: &mut World, target: u16, from: Vec<u8>, bits: u8, input: &mut Input<'_>) {
    let mut bytes = match decode(&from, true, true) {
        Ok(mut state) if bits & 4 == 0 => {
            for _ in 0..input.below(6) {
                edit(&mut state, input);
            }
            encode(&state, input.u8() < 240, input.u8() < 240).unwrap_or_else(|_| from.clone())
        }
        _ => from.clone(),
    };
    if bits & 8 != 0 {
        for _ in 0..input.below(8) {
            let at = usize::from(input.u16()) % bytes.len();
            bytes[at] = input.u8();
        }
    }
    bytes.truncate(MOST_BYTES);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let noisy = bits & 16 != 0 && noise(world, target, &bytes, input);
    let before = get(world, target).expect("a suspended controller");
    let accepted = set(world, target, &bytes, input);
    let after = get(world, target).expect("a suspended controller");
    // Another controller like it has nothing that stands in the way.
    assert!(accepted || noisy || target != NEIGHBOUR || bytes != from, "an honest state was refused");
    let read = |bytes: &[u8]| decode(bytes, true, true).expect("a state of ours");
    if accepted {
        let sent = decode(&bytes, true, true).expect("accepted, so it decodes");
        compare(&sent, &read(&after));
    } else if !noisy {
        assert_eq!(fixed(read(&before)), fixed(read(&after)), "refused, but the controller has changed");
    }
    if input.u8() < 200 {
        world.command(HOST, 0, &SubmissionEntry::resume(target));
        traffic(world);
    }
}

/// The guest goes on where it was: commands in every queue that it had, whatever these are by now.
fn traffic(world: &mut World) {
    let page = world.parties[GUEST].page(DATA_PAGE);
    for qid in 0..3 {
        let entry = if qid == 0 { SubmissionEntry::keep_alive() } else { SubmissionEntry::read(1, 0, 1).with_prps(page, 0) };
        world.parties[GUEST].push(qid, &entry);
        world.parties[GUEST].ring(qid, 0);
    }
}

/// Pieces in any order, of any length: whether one of them may have been accepted as a whole.
fn noise(world: &mut World, target: u16, bytes: &[u8], input: &mut Input<'_>) -> bool {
    let mut whole = false;
    for _ in 0..input.below(5) {
        let page = world.parties[HOST].page(DATA_PAGE);
        let skip = input.below(64) * 4;
        world.parties[HOST].put(DATA_PAGE * PAGE, bytes.get(skip..).unwrap_or(&[]));
        let (seqind, offset, dwords) = (SequenceIndicator(input.u8() & 3), input.number(), input.number32());
        let entry = SubmissionEntry::set_controller_state(seqind, input.u8() & 3, target, input.u8() & 3, offset, dwords);
        let done = world.command(HOST, 0, &entry.with_prps(page, page + PAGE as u64));
        let ends = matches!(seqind, SequenceIndicator::LAST | SequenceIndicator::ONLY);
        whole |= ends && !done.status().is_error();
    }
    whole
}

/// Sends a state in up to three pieces; whether all of them were accepted.
fn set(world: &mut World, target: u16, bytes: &[u8], input: &mut Input<'_>) -> bool {
    let pieces = input.below(3) + 1;
    let mut cuts: Vec<usize> = (1..pieces).map(|_| usize::from(input.u16()) % (bytes.len() / 4) * 4).filter(|at| *at > 0).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.dedup();
    for (i, ends) in cuts.windows(2).enumerate() {
        let seqind = match (i == 0, ends[1] == bytes.len()) {
            (true, true) => SequenceIndicator::ONLY,
            (true, false) => SequenceIndicator::FIRST,
            (false, false) => SequenceIndicator::MIDDLE,
            (false, true) => SequenceIndicator::LAST,
        };
        let page = world.parties[HOST].page(DATA_PAGE);
        world.parties[HOST].put(DATA_PAGE * PAGE, &bytes[ends[0]..ends[1]]);
        let dwords = ((ends[1] - ends[0]) / 4) as u32;
        let entry = SubmissionEntry::set_controller_state(seqind, 1, target, 1, ends[0] as u64, dwords);
        if world.command(HOST, 0, &entry.with_prps(page, page + PAGE as u64)).status().is_error() {
            return false;
        }
    }
    true
}

/// Changes one value of a state.
fn edit(state: &mut ControllerState, input: &mut Input<'_>) {
    let (which, number) = (input.below(32), input.number());
    let (sqs, cqs) = (state.sqs.len().max(1), state.cqs.len().max(1));
    let (sq, cq) = (state.sqs.get_mut(number as usize % sqs), state.cqs.get_mut(number as usize % cqs));
    match (which, sq, cq, &mut state.vendor) {
        (0, Some(sq), ..) => sq.prp1 = odd_address(input),
        (1, Some(sq), ..) => sq.entries_minus_1 = input.number16(),
        (2, Some(sq), ..) => sq.qid = input.number16(),
        (3, Some(sq), ..) => sq.cqid = input.number16(),
        (4, Some(sq), ..) => (sq.head, sq.tail) = (input.number16(), input.number16()),
        (5, Some(sq), ..) => (sq.pc, sq.qprio) = (input.flag(), input.u8() & 3),
        (6, _, Some(cq), _) => cq.prp1 = odd_address(input),
        (7, _, Some(cq), _) => cq.entries_minus_1 = input.number16(),
        (8, _, Some(cq), _) => cq.qid = input.number16(),
        (9, _, Some(cq), _) => (cq.head, cq.tail, cq.phase) = (input.number16(), input.number16(), input.flag()),
        (10, _, Some(cq), _) => (cq.pc, cq.ien, cq.iv) = (input.flag(), input.flag(), input.number16()),
        (11, Some(sq), ..) => {
            let twin = *sq;
            state.sqs.push(twin);
        }
        (12, _, Some(cq), _) => {
            let twin = *cq;
            state.cqs.push(twin);
        }
        (13, ..) => drop(state.sqs.pop()),
        (14, ..) => drop(state.cqs.pop()),
        (15, ..) if input.flag() => state.vendor = None,
        (16, ..) => state.suspended = !state.suspended,
        (17.., .., Some(vendor)) => edit_vendor(vendor, which, input),
        _ => {}
    }
}

fn odd_address(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        page @ 0..=199 => crate::guest::MAIN + u64::from(page % 40) * PAGE as u64,
        200..=219 => crate::guest::READ_ONLY,
        220..=229 => crate::guest::ALIAS,
        _ => input.number(),
    }
}

fn edit_vendor(vendor: &mut VendorState, which: usize, input: &mut Input<'_>) {
    let features = &mut vendor.features;
    match which {
        17 => vendor.cc = if input.flag() { vendor.cc ^ 1 << (input.u8() & 31) } else { input.number32() },
        18 => vendor.csts = input.number32(),
        19 => vendor.aqa = if input.flag() { vendor.aqa ^ 1 << (input.u8() & 31) } else { input.number32() },
        20 => vendor.asq = odd_address(input),
        21 => vendor.acq = odd_address(input),
        22 => (vendor.admin_sq_head, vendor.admin_sq_tail) = (input.number16() & 15, input.number16() & 15),
        23 => (vendor.admin_cq_head, vendor.admin_cq_tail) = (input.number16() & 15, input.number16() & 15),
        24 => vendor.bar_resets = input.number32(),
        25 => drop(vendor.aer_cids.try_push(input.number16())),
        26 => (vendor.masked_events, vendor.intms) = (input.number32(), input.number32()),
        27 => (features.coalescing_threshold, features.coalescing_time) = (input.u8(), input.u8()),
        28 => features.coalescing_disabled[0] = input.number(),
        29 => (features.granted_sqs, features.granted_cqs) = (input.number16(), input.number16()),
        30 => (features.timestamp_ms, features.timestamp_attributes) = (input.number() & ((1 << 48) - 1), input.u8() & 15),
        _ => {
            (features.arbitration, features.async_event_config) = (input.number32(), input.number32());
            (features.guest_limit, features.volatile_write_cache) = (input.number32(), input.flag());
        }
    }
}

/// A state without what time alone changes.
fn fixed(mut state: ControllerState) -> ControllerState {
    if let Some(vendor) = &mut state.vendor {
        vendor.features.timestamp_ms = 0;
    }
    state
}

/// A state without what the destination decides by itself: whether it is suspended, time, the guest limit (lifted), interrupt
/// masks (the slot's register), CSTS, reserved bits of AQA, the vector of a queue without interrupts, an event type beyond the eight that can be masked, vectors that the slot has not, and an
/// admin queue that a disabled controller has not.
fn comparable(state: &ControllerState) -> ControllerState {
    let mut state = ControllerState { suspended: true, ..state.clone() };
    state.cqs.iter_mut().filter(|cq| !cq.ien).for_each(|cq| cq.iv = 0);
    if let Some(vendor) = &mut state.vendor {
        (vendor.intms, vendor.csts) = (0, 0);
        vendor.aqa &= 0x0fff_0fff;
        vendor.masked_events &= 0xff;
        let features = &mut vendor.features;
        (features.timestamp_ms, features.timestamp_attributes, features.guest_limit) = (0, 0, 0);
        features.coalescing_disabled = [features.coalescing_disabled[0] & ((1 << VECTORS) - 1), 0, 0, 0, 0, 0, 0, 0];
        if !Cc::from_bits(vendor.cc).en() {
            (vendor.aqa, vendor.asq, vendor.acq) = (0, 0, 0);
            (vendor.admin_sq_head, vendor.admin_sq_tail) = (0, 0);
            (vendor.admin_cq_head, vendor.admin_cq_tail, vendor.admin_cq_phase) = (0, 0, false);
        }
    }
    state
}

fn compare(sent: &ControllerState, found: &ControllerState) {
    let (sent, mut found) = (comparable(sent), comparable(found));
    if sent.vendor.is_none() {
        found.vendor = None;
    }
    assert_eq!(sent, found, "what was accepted is not what is read back");
}

/// Bytes that no controller sees: whatever decodes is encoded to what decodes to the same.
fn only_bytes(input: &mut Input<'_>) {
    let (nvme, vendor) = (input.flag(), input.flag());
    let bytes = input.bytes(usize::MAX);
    let Ok(state) = decode(bytes, nvme, vendor) else { return };
    let again = encode(&state, nvme, vendor).expect("not more queues than were read");
    assert_eq!(decode(&again, nvme, vendor).expect("encoded by ourselves"), state);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_sessions_are_well() {
        run(&[]);
        run(&[2, 0, 0, 0]);
        run(&[0xff; 100]);
    }
}
