//! Queue pairs: every command that is taken comes back exactly once, whatever the device does.

use crate::error::{DriverError, Fault};
use crate::fake::{Bench, Crime};
use crate::{DriverState, QueuePair};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::{DmaBuffer, PAGE, Pages, Segment};
use dray_nvme::command::{AdminOpcode, SubmissionEntry};
use dray_nvme::status::Status;

fn flush(pair: &mut QueuePair, bench: &Bench, tags: std::ops::Range<u64>) {
    for tag in tags {
        pair.submit(bench.now, &SubmissionEntry::flush(1), &[], tag).expect("room");
    }
    pair.commit();
}

/// Polls until that many commands are back.
fn collect(bench: &mut Bench, pair: &mut QueuePair, count: usize) -> Vec<Completion> {
    let mut back = Vec::new();
    bench.until("commands back", |bench| {
        pair.poll_with(bench.now, |c| back.push(c));
        back.len() >= count
    });
    back
}

#[test]
fn commands_go_round_and_round_in_any_order() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..100u64 {
        bench.fake.crime = if round % 2 == 0 { Crime::Silence } else { Crime::None };
        let first = round * 15;
        flush(&mut pair, &bench, first..first + 15);
        assert_eq!(pair.submit(bench.now, &SubmissionEntry::flush(1), &[], 0), Err(SubmitError::Full));
        bench.fake.poll();
        bench.fake.release();
        for c in collect(&mut bench, &mut pair, 15) {
            assert!(!c.unknown && !c.status.is_error() && seen.insert(c.tag), "{c:?}");
        }
    }
    assert_eq!((seen.len(), pair.outstanding()), (1_500, 0));
}

#[test]
fn results_and_data_pointers_arrive() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    let hostile = SubmissionEntry::read(1, 5, 8).with_prps(0xdead_0000, 0xbeef_0000);
    let whole = Segment::new(bench.arena(), 8, 3 * PAGE).expect("inside");
    pair.submit(bench.now, &hostile, &[whole], 1).expect("room");
    pair.submit(bench.now, &hostile, &[], 2).expect("room");
    pair.commit();
    let back = collect(&mut bench, &mut pair, 2);
    assert_eq!(back[0].result, 1 << 32 | 7);
    let seen = &bench.fake.io_seen;
    assert_eq!(seen[0].prp1(), bench.data.iova() + 8);
    let mut list = [0u8; 24];
    bench.fake.read(seen[0].prp2(), &mut list);
    let page = |i: usize| u64::from_le_bytes(list[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
    let base = bench.data.iova();
    assert_eq!([page(0), page(1), page(2)], [base + 4096, base + 8192, base + 12288]);
    assert_eq!(seen[1].dptr, [0, 0], "a data pointer that came with the entry is not used");
}

#[test]
fn data_that_cannot_be_described_is_refused_and_costs_nothing() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    let stranger = DmaBuffer::allocate("stranger", PAGE, Pages::Small).expect("memory");
    let odd = Segment::new(bench.arena(), 2, 512).expect("inside");
    let empty = Segment::new(bench.arena(), 0, 0).expect("inside");
    let long = Segment::new(bench.arena(), 0, 64 * PAGE).expect("inside");
    let entry = SubmissionEntry::read(1, 0, 1);
    for (data, error) in [
        (odd, SubmitError::BadData),
        (empty, SubmitError::BadData),
        (long, SubmitError::BadData),
        (stranger.segment(), SubmitError::NotMapped),
    ] {
        assert_eq!(pair.submit(bench.now, &entry, &[data], 1), Err(error));
    }
    assert_eq!(pair.outstanding(), 0);
    flush(&mut pair, &bench, 0..15);
    assert_eq!(collect(&mut bench, &mut pair, 15).len(), 15);
}

#[test]
fn a_lying_device_is_found_out_and_reset() {
    for (crime, expected) in [
        (Crime::InventCid, "not outstanding"),
        (Crime::Twice, "not outstanding"),
        (Crime::Head(99), "outside the commands submitted"),
        (Crime::Head(9), "outside the commands submitted"),
        (Crime::Head(0), "before it was fetched"),
        (Crime::Sqid, "another queue's"),
        (Crime::Status, "reserved status code type"),
    ] {
        let mut bench = Bench::ready();
        let mut pair = bench.pair(16);
        bench.fake.crime = crime;
        flush(&mut pair, &bench, 0..3);
        let back = collect(&mut bench, &mut pair, 3);
        let mut tags: Vec<_> = back.iter().map(|c| c.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2], "{crime:?}: each once");
        assert!(back.iter().any(|c| c.unknown), "{crime:?}");
        let cause = bench.driver.last_failure().expect("a cause").to_string();
        assert!(cause.contains(expected), "{crime:?}: {cause}");
        bench.until("ready again", |bench| bench.driver.is_ready());
        assert_eq!(bench.fake.enables, 2);
        assert_eq!(pair.poll_with(bench.now, |_| ()), 0);
    }
}

#[test]
fn where_resets_are_forbidden_a_lying_device_is_only_reported() {
    let mut bench = Bench::ready();
    let (mut pair, mut other) = (bench.pair(16), bench.pair(16));
    bench.driver.forbid_reset(true);
    bench.fake.crime = Crime::InventCid;
    flush(&mut pair, &bench, 0..2);
    assert!(collect(&mut bench, &mut pair, 2).iter().all(|c| c.unknown));
    let failed = bench.driver.state().clone();
    let DriverState::Failed(DriverError::Protocol { qid: 1, fault: Fault::UnknownCommand { .. } }) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(bench.fake.enables, 1);
    // The rest goes on, so that there is a way back.
    bench.fake.crime = Crime::None;
    flush(&mut other, &bench, 5..6);
    assert!(!collect(&mut bench, &mut other, 1)[0].unknown);
    let query = crate::mmc::resume(&mut bench.driver, bench.now, 3).expect("sent");
    let mut answer = None;
    bench.until("an answer", |bench| {
        answer = query.poll(&mut bench.driver);
        answer.is_some()
    });
}

#[test]
fn a_command_that_hangs_is_aborted_and_comes_back() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    bench.fake.crime = Crime::Abortable;
    flush(&mut pair, &bench, 7..8);
    let back = collect(&mut bench, &mut pair, 1);
    assert_eq!((back[0].tag, back[0].status, back[0].unknown), (7, Status::ABORTED_BY_REQUEST, false));
    assert!(bench.driver.is_ready() && bench.fake.enables == 1);
}

#[test]
fn a_device_that_cannot_abort_either_is_reset() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    bench.fake.crime = Crime::Silence;
    flush(&mut pair, &bench, 0..15);
    let back = collect(&mut bench, &mut pair, 15);
    assert!(back.len() == 15 && back.iter().all(|c| c.unknown));
    assert!(bench.fake.admin_seen.iter().any(|e| e.admin_opcode() == AdminOpcode::ABORT));
    let cause = bench.driver.last_failure().cloned();
    assert!(matches!(cause, Some(DriverError::Protocol { qid: 1, fault: Fault::TimedOut { .. } })));
}

#[test]
fn a_device_that_lies_again_and_again_is_given_up() {
    let mut bench = Bench::ready();
    bench.fake.crime = Crime::InventCid;
    for _ in 0..10 {
        if matches!(bench.driver.state(), DriverState::Failed(_)) {
            assert_eq!(bench.fake.enables, 4, "three resets");
            return;
        }
        let mut pair = bench.pair(16);
        flush(&mut pair, &bench, 0..1);
        collect(&mut bench, &mut pair, 1);
        bench.until("settled", |b| b.driver.is_ready() || matches!(b.driver.state(), DriverState::Failed(_)));
    }
    panic!("never given up");
}

#[test]
fn an_outcome_posted_before_the_queue_died_is_kept() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    flush(&mut pair, &bench, 0..1);
    bench.fake.poll();
    bench.fake.crime = Crime::Silence;
    flush(&mut pair, &bench, 1..2);
    bench.fake.poll();
    bench.driver.reset(bench.now);
    bench.until("ready", |bench| bench.driver.is_ready());
    let mut back = collect(&mut bench, &mut pair, 2);
    back.sort_by_key(|c| c.tag);
    assert_eq!(back.iter().map(|c| c.unknown).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn memory_that_moves_is_found_at_its_new_address() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    let space = bench.slot.space().clone();
    let buffer = DmaBuffer::allocate("moving", PAGE, Pages::Small).expect("memory");
    for iova in [0x10_0000, 0x20_0000] {
        space.map_at(iova, &buffer, true).expect("map");
        pair.submit(bench.now, &SubmissionEntry::read(1, 0, 8), &[buffer.segment()], 0).expect("room");
        pair.commit();
        collect(&mut bench, &mut pair, 1);
        assert_eq!(bench.fake.io_seen.last().map(SubmissionEntry::prp1), Some(iova));
        let _gone = space.unmap(iova).expect("unmap");
    }
}
