//! Coming up, going down, failing.

use crate::error::{DriverError, Fault};
use crate::fake::{Bench, Crime};
use crate::mmc::{StateReader, StateSelection, StateWriter};
use crate::{AdminData, DriverConfig, DriverState};
use dray_device::command::SubmitError;
use dray_nvme::command::{AdminOpcode, SubmissionEntry};
use dray_nvme::registers::Csts;
use dray_nvme::state::ControllerStateHeader;
use dray_nvme::status::Status;
use zerocopy::IntoBytes;

#[test]
fn it_comes_up_and_keeps_events_outstanding() {
    let mut bench = Bench::ready();
    assert_eq!(bench.driver.identify().and_then(|id| id.model()), Some("Fake"));
    assert_eq!((bench.driver.queues_granted(), bench.fake.aers.len()), (64, 4));
    assert!(bench.fake.event(0x0004_0002, 0));
    assert!(bench.fake.event(4, 7));
    bench.turns(2);
    let events: Vec<_> = std::iter::from_fn(|| bench.driver.next_event()).collect();
    assert_eq!((events.len(), events[1].dw1), (2, 7));
    assert_eq!(bench.fake.aers.len(), 4, "posted again");
}

#[test]
fn reset_brings_everything_down_and_up_again() {
    let mut bench = Bench::ready();
    bench.fake.crime = Crime::Silence;
    let mut pair = bench.pair(16);
    pair.submit(bench.now, &SubmissionEntry::flush(1), &[], 42).expect("room");
    pair.commit();
    bench.fake.refuse = None;
    let generation = bench.driver.generation();
    bench.driver.reset(bench.now);
    assert_eq!(pair.submit(bench.now, &SubmissionEntry::flush(1), &[], 43), Err(SubmitError::Dead));
    let mut back = Vec::new();
    assert_eq!(pair.poll_with(bench.now, |c| back.push(c)), 0, "the device may still have it");
    bench.until("ready again", |bench| bench.driver.is_ready() && bench.driver.generation() != generation);
    pair.poll_with(bench.now, |c| back.push(c));
    pair.poll_with(bench.now, |c| back.push(c));
    assert_eq!(back.iter().map(|c| (c.tag, c.unknown)).collect::<Vec<_>>(), [(42, true)]);
    drop(pair);
    bench.fake.crime = Crime::None;
    bench.turns(3);
    assert_eq!(bench.pair(16).qid(), 1);
}

#[test]
fn nonsense_in_the_admin_queue_does_not_end_a_reset() {
    let mut bench = Bench::ready();
    bench.fake.complete(0, 0x4321, 0, Status::SUCCESS);
    let generation = bench.driver.generation();
    bench.driver.reset(bench.now);
    bench.until("ready again", |bench| bench.driver.is_ready() || matches!(bench.driver.state(), DriverState::Failed(_)));
    assert!(bench.driver.is_ready() && bench.driver.generation() != generation, "{:?}", bench.driver.state());
}

#[test]
fn a_controller_that_never_gets_ready_is_given_up() {
    let mut bench = Bench::cold();
    bench.fake.never_ready = true;
    bench.until("failed", |bench| matches!(bench.driver.state(), DriverState::Failed(_)));
    assert!(matches!(bench.driver.state(), DriverState::Failed(DriverError::ReadyTimeout { to: true, .. })));
    bench.fake.never_ready = false;
    bench.driver.reset(bench.now);
    bench.until("ready", |bench| bench.driver.is_ready());
}

#[test]
fn a_function_that_goes_and_one_that_was_never_there_are_told() {
    let mut bench = Bench::ready();
    let mut pair = bench.pair(16);
    bench.fake.crime = Crime::Silence;
    pair.submit(bench.now, &SubmissionEntry::flush(1), &[], 1).expect("room");
    bench.slot.unplug();
    bench.until("gone", |bench| bench.driver.state() == &DriverState::Failed(DriverError::Gone));
    assert_eq!(pair.poll_with(bench.now, |c| assert!(c.unknown)), 1);
    assert_eq!(bench.driver.request(bench.now, &SubmissionEntry::keep_alive(), AdminData::None), Err(SubmitError::Dead));
    let mut empty = Bench::cold();
    for _ in 0..60_000 {
        empty.now = empty.now.after_us(100);
        let _progress = dray_device::poll::Poll::poll(&mut empty.driver, empty.now);
    }
    assert!(matches!(empty.driver.state(), DriverState::Failed(DriverError::Absent { .. })));
}

#[test]
fn a_fatal_status_resets_unless_that_is_forbidden() {
    let mut bench = Bench::ready();
    bench.fake.set_csts(Csts::new().with_rdy(true).with_cfs(true));
    bench.until("up again", |bench| bench.fake.enables == 2 && bench.driver.is_ready());
    assert_eq!(bench.driver.last_failure(), Some(&DriverError::Fatal));
    bench.driver.forbid_reset(true);
    bench.fake.set_csts(Csts::new().with_rdy(true).with_cfs(true));
    bench.turns(300);
    assert_eq!(bench.driver.state(), &DriverState::Failed(DriverError::Fatal));
    assert_eq!(bench.fake.enables, 2, "nothing was reset");
}

#[test]
fn a_reset_by_somebody_else_is_noticed_where_ready_is_watched() {
    for watch_ready in [false, true] {
        let mut bench = Bench::ready_with(DriverConfig { watch_ready, ..DriverConfig::default() });
        let before = bench.driver.generation();
        bench.fake.set_csts(Csts::new());
        if watch_ready {
            bench.until("up again", |bench| bench.driver.is_ready() && bench.driver.generation() != before);
            assert_eq!(bench.driver.last_failure(), Some(&DriverError::Disabled));
        } else {
            bench.turns(300);
            assert_eq!((bench.driver.generation(), bench.driver.is_ready()), (before, true));
        }
    }
}

#[test]
fn a_dropped_driver_disables_its_controller_unless_resets_are_forbidden() {
    for forbid in [false, true] {
        let mut bench = Bench::ready();
        bench.driver.forbid_reset(forbid);
        drop(bench.driver);
        bench.fake.poll();
        let csts = Csts::from_bits(bench.slot.function().read32(dray_nvme::registers::offset::CSTS));
        assert_eq!(csts.rdy(), forbid);
    }
}

#[test]
fn requests_carry_data_both_ways_in_pieces() {
    let mut bench = Bench::ready();
    let selection = StateSelection { cntlid: 3, csvi: 1, csuuidi: 1 };
    let len = 300_000;
    let mut state: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    let header = ControllerStateHeader {
        vss: zerocopy::byteorder::little_endian::U128::new((len as u128 - 48) / 4),
        ..ControllerStateHeader::default()
    };
    state[..48].copy_from_slice(header.as_bytes());
    bench.fake.state = state.clone();
    let mut reader = StateReader::new(selection, 1 << 20);
    let mut read = None;
    bench.until("read", |bench| {
        read = reader.poll(&mut bench.driver, bench.now);
        read.is_some()
    });
    let read = read.expect("read").expect("state");
    assert!(read.bytes == state && !read.suspended_throughout);
    bench.fake.state.clear();
    let mut writer = StateWriter::new(selection, state.clone());
    assert!(!writer.fits_one_command(&bench.driver));
    let mut written = None;
    bench.until("written", |bench| {
        written = writer.poll(&mut bench.driver, bench.now);
        written.is_some()
    });
    assert_eq!(written, Some(Ok(())));
    assert!(bench.fake.state == state);
    assert_eq!(bench.fake.sequences, [1, 0, 2]);
    let mut small = StateReader::new(selection, 1 << 16);
    let mut refused = None;
    bench.until("refused", |bench| {
        refused = small.poll(&mut bench.driver, bench.now);
        refused.is_some()
    });
    assert!(matches!(refused, Some(Err(crate::mmc::MmcError::TooLarge { bytes: 300_000, .. }))));
}

#[test]
fn refused_queues_leave_nothing_behind() {
    let mut bench = Bench::ready();
    for opcode in [AdminOpcode::CREATE_IO_CQ, AdminOpcode::CREATE_IO_SQ] {
        bench.fake.refuse = Some((opcode, Status::INVALID_QUEUE_SIZE.with_dnr()));
        let config = crate::QueuePairConfig { entries: 16, vector: Some(1) };
        let ticket = bench.driver.create_queue_pair(bench.now, config).expect("room");
        let mut answer = None;
        bench.until("refused", |bench| {
            answer = bench.driver.queue_pair(&ticket);
            answer.is_some()
        });
        assert!(matches!(answer, Some(Err(DriverError::Refused { .. }))), "{opcode}");
        assert_eq!(bench.driver.queue_pairs(), 0);
    }
    bench.fake.refuse = None;
    let pair = bench.pair(16);
    let before = bench.fake.admin_seen.len();
    bench.driver.delete_queue_pair(bench.now, pair).expect("nothing outstanding");
    bench.until("deleted", |bench| bench.driver.queue_pairs() == 0);
    let deletes: Vec<_> = bench.fake.admin_seen[before..].iter().map(SubmissionEntry::admin_opcode).collect();
    assert_eq!(deletes, [AdminOpcode::DELETE_IO_SQ, AdminOpcode::DELETE_IO_CQ]);
}

#[test]
fn a_queue_whose_deletion_is_refused_is_deleted_again_and_a_reset_frees_its_identifier() {
    for opcode in [AdminOpcode::DELETE_IO_SQ, AdminOpcode::DELETE_IO_CQ] {
        let mut bench = Bench::ready();
        let deletions = |bench: &Bench| bench.fake.admin_seen.iter().filter(|e| e.admin_opcode() == opcode).count();
        for lasts in [false, true] {
            let pair = bench.pair(16);
            let before = deletions(&bench);
            bench.fake.refuse = Some((opcode, Status::INTERNAL_ERROR));
            bench.driver.delete_queue_pair(bench.now, pair).expect("nothing outstanding");
            bench.until("refused", |bench| deletions(bench) > before);
            assert_eq!(bench.driver.queue_pairs(), 1, "the controller may still use its memory");
            if lasts {
                bench.turns(60);
                assert_eq!(deletions(&bench), before + 4, "tried so often, and no more");
            }
            bench.fake.refuse = None;
            bench.turns(20);
            assert_eq!(bench.driver.queue_pairs(), usize::from(lasts), "{opcode}, lasts {lasts}");
        }
        let generation = bench.driver.generation();
        bench.driver.reset(bench.now);
        bench.until("reset", |bench| bench.driver.is_ready() && bench.driver.generation() != generation);
        assert_eq!(bench.driver.queue_pairs(), 0);
        // A queue that the controller does not know is gone.
        let pair = bench.pair(16);
        bench.fake.refuse = Some((opcode, Status::INVALID_QID.with_dnr()));
        bench.driver.delete_queue_pair(bench.now, pair).expect("nothing outstanding");
        bench.until("deleted", |bench| bench.driver.queue_pairs() == 0);
    }
}

#[test]
fn an_admin_command_that_is_never_answered_ends_in_a_reset() {
    let mut bench = Bench::ready();
    bench.fake.hold_features = true;
    let entry = SubmissionEntry::set_cdq_feature(0, 0, None);
    let ticket = bench.driver.request(bench.now, &entry, AdminData::None).expect("room");
    bench.until("reset", |bench| bench.fake.enables == 2);
    assert!(bench.fake.admin_seen.iter().any(|e| e.admin_opcode() == AdminOpcode::ABORT), "aborted first");
    let cause = bench.driver.last_failure().cloned();
    assert!(matches!(cause, Some(DriverError::Protocol { qid: 0, fault: Fault::TimedOut { .. } })));
    assert!(bench.driver.answer(ticket).is_some_and(|answer| answer.completion.unknown));
    bench.until("ready", |bench| bench.driver.is_ready());
}

#[test]
fn answers_that_nobody_takes_do_not_block_the_queue() {
    let mut bench = Bench::ready();
    for _ in 0..1_000 {
        let entry = SubmissionEntry::identify(
            dray_nvme::identify::Cns::CONTROLLER,
            0,
            0,
            dray_nvme::identify::CommandSetId::NVM,
        );
        bench.driver.request(bench.now, &entry, AdminData::In(4096)).expect("room");
        bench.turn();
    }
}

#[test]
fn shutdown_ends_in_stopped() {
    let mut bench = Bench::ready();
    let pair = bench.pair(16);
    bench.driver.shutdown(bench.now);
    bench.until("stopped", |bench| bench.driver.state() == &DriverState::Stopped);
    assert!(pair.is_dead());
}
