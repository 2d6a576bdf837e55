use super::*;
use dray_nvme::cdq::QueueType;
use dray_nvme::command::CompletionEntry;
use dray_nvme::event::AsyncEvent;
use dray_nvme::status::Status;
use zerocopy::IntoBytes;

const W: Op = Op::Write { fua: false };
const SLOTS: u32 = 8;

fn admin(command: SubmissionEntry) -> Event {
    Event::Admin { side: 0, command }
}

fn answered(command: SubmissionEntry) -> Event {
    Event::AdminEnded { side: 0, command, completion: CompletionEntry::default() }
}

fn entry(slot: u32, entry: UdmqEntry) -> Event {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(entry.as_bytes());
    Event::CdqEntry { side: 0, cdqid: 0, cntlid: FIRST_CNTLID, slot, bytes }
}

fn range(slot: u32, slba: u64, blocks: u32) -> Event {
    entry(slot, UdmqEntry::range(1, slba, blocks - 1, false))
}

fn sent(id: CommandId) -> Event {
    Event::Submitted { guest: 0, id, op: W, nsid: 1, slba: 8, blocks: 4 }
}

fn ended(id: CommandId, end: End) -> Event {
    Event::Ended { guest: 0, id, end }
}

fn done(id: CommandId) -> Event {
    ended(id, End::Done { values: Vec::new() })
}

/// A log that runs.
fn logging() -> Log {
    let mut log = Log::default();
    let start = SubmissionEntry::track_send_log(true, 0);
    for event in [answered(SubmissionEntry::create_cdq(QueueType::UDMQ, FIRST_CNTLID, true, SLOTS * 8, 0)), answered(start)] {
        log.see(Time(0), &event, 0).expect("a queue");
    }
    log
}

fn all(log: &mut Log, events: &[Event]) -> Result<(), Violation> {
    events.iter().try_for_each(|event| log.see(Time(0), event, 0).map(drop))
}

#[test]
fn the_entry_comes_before_the_completion() {
    all(&mut logging(), &[sent(1), range(0, 8, 4), done(1)]).expect("named");
    all(&mut logging(), &[sent(1), range(0, 11, 4), range(1, 4, 7), done(1)]).expect("named in pieces");
    all(&mut logging(), &[sent(1), entry(0, UdmqEntry::whole_namespace(1)), done(1)]).expect("all of it");
    let bad: [&[Event]; 4] = [
        &[sent(1), done(1)],
        &[sent(1), range(0, 8, 3), done(1)],
        &[sent(1), range(0, 9, 3), done(1)],
        &[range(0, 8, 4), sent(1), done(1)],
    ];
    for events in bad {
        assert_eq!(all(&mut logging(), events).unwrap_err().rule, "the entry comes before the completion", "{events:?}");
    }
}

#[test]
fn a_failed_write_that_touched_the_media_is_named() {
    let began = Event::MediaBegan { side: 0, serial: 1, op: BackingOp::Write { fua: false }, nsid: 1, slba: 8, blocks: 4 };
    let failed = || ended(1, End::Failed(Status::WRITE_FAULT));
    assert!(all(&mut logging(), &[sent(1), began.clone(), failed()]).is_err());
    all(&mut logging(), &[sent(1), failed()]).expect("it never got there");
    all(&mut logging(), &[sent(1), began.clone(), range(0, 8, 4), failed()]).expect("named");
    all(&mut logging(), &[sent(1), sent(2), began, failed()]).expect("whose it was nobody knows");
}

#[test]
fn where_nothing_is_logged_nothing_is_asked_for() {
    let stop = admin(SubmissionEntry::track_send_log(false, 0));
    let suspend = admin(SubmissionEntry::suspend(FIRST_CNTLID, false, false));
    let full = entry(0, UdmqEntry::marker(Esa::FULL));
    for interruption in [stop, suspend, full, admin(SubmissionEntry::delete_cdq(0)), Event::ManagementReset { side: 0 }] {
        all(&mut logging(), &[sent(1), interruption.clone(), done(1)]).expect("interrupted");
        all(&mut logging(), &[interruption, sent(1), done(1)]).expect("not logged");
    }
    let unmapped = Event::CdqUnmapped { side: 0, cdqid: 0 };
    all(&mut logging(), &[unmapped, sent(1), done(1)]).expect("entries go nowhere");
    let first = entry(0, UdmqEntry::marker(Esa::FIRST));
    let suspend = admin(SubmissionEntry::suspend(FIRST_CNTLID, false, false));
    assert!(all(&mut logging(), &[suspend, first, sent(1), done(1)]).is_err(), "resumed");
    all(&mut logging(), &[Event::Pointed { guest: 0, side: 1 }, sent(1), done(1)]).expect("another controller");
}

#[test]
fn an_answer_that_is_late_does_not_say_that_logging_still_runs() {
    let start = SubmissionEntry::track_send_log(true, 0);
    let again = || [admin(start), entry(0, UdmqEntry::marker(Esa::FIRST))];
    let write = [sent(1), done(1)];
    for end in [entry(1, UdmqEntry::marker(Esa::FULL)), admin(SubmissionEntry::suspend(FIRST_CNTLID, false, false))] {
        let late = [&again()[..], &[end.clone(), answered(start)], &write].concat();
        all(&mut logging(), &late).expect("it ended before the answer came");
        let resumed = [&again()[..], &[end.clone(), answered(start)], &again()[1..], &write].concat();
        assert!(all(&mut logging(), &resumed).is_err(), "it goes on");
        let given_back = admin(SubmissionEntry::set_cdq_feature(0, 1, None));
        let restarted = [&[end, given_back][..], &[admin(start), answered(start)], &write].concat();
        assert!(all(&mut logging(), &restarted).is_err(), "it was started again");
    }
    let full = [&[entry(1, UdmqEntry::marker(Esa::FULL)), admin(start), answered(start)][..], &write].concat();
    all(&mut logging(), &full).expect("full still: the host has not seen it, and nothing is logged");
}

#[test]
fn the_head_goes_over_entries_that_were_there() {
    let head = |to| admin(SubmissionEntry::set_cdq_feature(0, to, None));
    let two = [range(0, 0, 1), range(1, 1, 1)];
    let with = |more: &[Event]| all(&mut logging(), &[&two, more].concat());
    with(&[head(0), head(1), head(2)]).expect("one after the other");
    with(&[head(2)]).expect("both");
    for bad in [&[head(3)][..], &[head(1), head(0)], &[head(2), head(3)], &[head(SLOTS)]] {
        assert_eq!(with(bad).unwrap_err().rule, "only entries that were there are given back");
    }
    let mut log = logging();
    for slot in (0..40).map(|n| n % SLOTS) {
        all(&mut log, &[range(slot, 0, 1), head((slot + 1) % SLOTS)]).expect("around");
    }
}

#[test]
fn events_are_asked_for_again_and_entries_taken() {
    let request = admin(SubmissionEntry::async_event_request());
    let event = Event::AsyncEvent { side: 0, dword0: AsyncEvent::CDQ_TAIL_POINTER.into_bits() };
    let other = admin(SubmissionEntry::resume(FIRST_CNTLID));
    let late = Time::from_us(PATIENCE_US + 1);
    let mut log = logging();
    all(&mut log, &[request.clone(), event.clone(), request.clone()]).expect("asked again");
    log.see(late, &other, 0).map(drop).expect("one is outstanding");
    let mut log = logging();
    all(&mut log, &[request, event]).expect("one event");
    assert!(log.see(late, &other, 0).is_err());

    let mut log = logging();
    all(&mut log, &[range(0, 0, 1)]).expect("an entry");
    assert_eq!(log.see(late, &other, 0).err().map(|v| v.rule), Some("entries are taken"));
}

#[test]
fn a_queue_whose_deletion_was_asked_for_owes_nothing() {
    let completion = CompletionEntry {
        status_phase: dray_nvme::command::StatusPhase::new().with_status(Status::INTERNAL_ERROR),
        ..CompletionEntry::default()
    };
    let refused = Event::AdminEnded { side: 0, command: SubmissionEntry::delete_cdq(0), completion };
    all(&mut logging(), &[sent(1), refused, done(1)]).expect("its memory is the driver's");
}

#[test]
fn every_command_ends() {
    let mut log = logging();
    all(&mut log, &[sent(1)]).expect("a command");
    assert!(log.finish().is_err());
    all(&mut log, &[ended(1, End::Lost)]).expect("its end");
    log.finish().expect("all have ended");
}

#[test]
fn ranges_are_subtracted() {
    let cases = [((0, 4), vec![(4, 10)]), ((4, 6), vec![(0, 4), (6, 10)]), ((8, 12), vec![(0, 8)]), ((0, 99), vec![]), ((10, 12), vec![(0, 10)])];
    for ((first, end), left) in cases {
        let mut ranges = vec![(0, 10)];
        subtract(&mut ranges, first, end);
        ranges.sort_unstable();
        assert_eq!(ranges, left);
    }
}
