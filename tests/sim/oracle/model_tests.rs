use super::super::super::event::ENDS;
use super::*;
use dray_migration::{Owner, Record};

const W: Op = Op::Write { fua: false };

fn facts(cached: bool) -> Facts {
    Facts { seed: 7, namespaces: vec![(1, 64, 512)], cached }
}

/// Events in a row, written down shortly.
struct Tape(Model, Side);

impl Tape {
    fn new(cached: bool) -> Self {
        Self(Model::new(&facts(cached)), 0)
    }

    fn see(&mut self, event: &Event) -> Result<(), Violation> {
        self.0.see(event, self.1)
    }

    fn ok(&mut self, event: &Event) -> &mut Self {
        self.see(event).expect("nothing to object to");
        self
    }

    fn sent(&mut self, id: CommandId, op: Op, slba: u64, blocks: u64) -> &mut Self {
        self.ok(&Event::Submitted { guest: 0, id, op, nsid: 1, slba, blocks })
    }

    fn end(&mut self, id: CommandId, end: End) -> &mut Self {
        self.ok(&Event::Ended { guest: 0, id, end })
    }

    fn done(&mut self, id: CommandId) -> &mut Self {
        self.end(id, End::Done { values: Vec::new() })
    }

    fn write(&mut self, id: CommandId, slba: u64) -> &mut Self {
        self.sent(id, W, slba, 1).done(id)
    }

    fn reads(&mut self, slba: u64, value: CommandId) -> Result<(), Violation> {
        self.sent(1 << 40, Op::Read, slba, 1);
        self.see(&Event::Ended { guest: 0, id: 1 << 40, end: End::Done { values: vec![value] } })
    }

    fn rests(&mut self, side: Side, value: CommandId) -> Result<(), Violation> {
        let values = (0..64).map(|lba| if lba == 5 { value } else { content::initial(7, 1, lba) }).collect();
        self.see(&Event::Rest { nsid: 1, side, values })
    }

    fn cut(&mut self) -> &mut Self {
        let serving = self.1;
        self.ok(&Event::PowerCut).ok(&Event::Restarted { serving })
    }
}

fn record(owner: Owner, phase: RecordPhase) -> Record {
    Record { migration: 1, from: ENDS[0], to: ENDS[1], epoch: 1, owner, phase, fenced: false }
}

#[test]
fn an_acknowledged_write_is_read() {
    let mut tape = Tape::new(false);
    tape.write(101, 5);
    tape.reads(5, 101).expect("it was written");
    assert_eq!(tape.reads(5, content::initial(7, 1, 5)).unwrap_err().rule, "nothing acknowledged is lost");
    assert_eq!(Tape::new(false).reads(5, content::GARBAGE).unwrap_err().rule, "blocks are whole");
    assert!(Tape::new(false).reads(5, 9 << 32).is_err());
    Tape::new(false).reads(5, content::initial(7, 1, 5)).expect("as it began");
}

#[test]
fn writes_under_way_may_be_read_or_not_and_then_stay() {
    let mut tape = Tape::new(true);
    tape.write(101, 5).sent(102, W, 5, 1);
    tape.reads(5, 101).expect("before");
    tape.reads(5, 102).expect("after");
    assert_eq!(tape.reads(5, 101).unwrap_err().rule, "nothing is rolled back");
}

#[test]
fn overlapping_writes_end_in_any_order() {
    for last in [101, 102] {
        let mut tape = Tape::new(false);
        tape.sent(101, W, 5, 1).sent(102, W, 5, 1).done(102).done(101);
        tape.reads(5, last).expect("either");
        assert!(tape.reads(5, 203 - last).is_err(), "nothing was under way: it stays");
    }
    let mut tape = Tape::new(false);
    tape.sent(101, W, 5, 1).sent(102, W, 5, 1).done(101).done(102).write(103, 5);
    assert!(tape.reads(5, 102).is_err());
}

#[test]
fn a_read_may_return_what_was_replaced_while_it_ran() {
    let mut tape = Tape::new(false);
    tape.write(101, 5).sent(300, Op::Read, 5, 1).write(102, 5).write(103, 5);
    tape.end(300, End::Done { values: vec![101] });
    tape.sent(301, Op::Read, 5, 1).write(104, 5);
    assert!(tape.see(&Event::Ended { guest: 0, id: 301, end: End::Done { values: vec![102] } }).is_err());
}

#[test]
fn failed_and_lost_writes_may_be_there() {
    for end in [End::Failed(Status::WRITE_FAULT), End::Lost] {
        for value in [101, 102] {
            let mut tape = Tape::new(false);
            tape.write(101, 5).sent(102, W, 5, 1).end(102, end.clone());
            tape.ok(&Event::Disabled { guest: 0 });
            tape.reads(5, value).expect("either");
            assert!(tape.reads(5, 203 - value).is_err());
        }
    }
    let mut tape = Tape::new(false);
    tape.sent(101, W, 5, 1).end(101, End::Lost).write(102, 5);
    tape.reads(5, 102).expect("the later one");
    tape.reads(5, 101).expect("the lost one has landed late");
    let mut tape = Tape::new(false);
    tape.sent(101, W, 5, 1).end(101, End::Lost).ok(&Event::Disabled { guest: 0 }).write(102, 5);
    assert!(tape.reads(5, 101).is_err(), "nothing of before lands after the controller was disabled");
}

#[test]
fn a_power_cut_takes_what_was_not_flushed() {
    let mut tape = Tape::new(true);
    tape.write(101, 5).sent(200, Op::Flush, 0, 0).done(200).write(102, 5).write(103, 5);
    for value in [101, 102, 103] {
        let mut tape = Tape(Model { namespaces: vec![clone(&tape.0.namespaces[0])], ..Model::new(&facts(true)) }, 0);
        tape.0.clock = 100;
        tape.cut().reads(5, value).expect("any since the flush");
        assert!(tape.reads(5, if value == 101 { 102 } else { 101 }).is_err(), "then it stays");
    }
    assert!(tape.cut().reads(5, content::initial(7, 1, 5)).is_err(), "flushed");
    let mut tape = Tape::new(false);
    tape.write(101, 5).write(102, 5);
    assert!(tape.cut().reads(5, 101).is_err(), "no cache");
}

fn clone(namespace: &Namespace) -> Namespace {
    Namespace {
        blocks: namespace.blocks.clone(),
        failed: BTreeSet::new(),
        failed_alone: BTreeSet::new(),
        ..*namespace
    }
}

#[test]
fn a_flush_covers_what_had_ended_before_it_was_sent() {
    let mut tape = Tape::new(true);
    tape.write(101, 5).sent(200, Op::Flush, 0, 0).write(102, 5).done(200);
    tape.cut().reads(5, 101).expect("the later write was not covered");
    let mut tape = Tape::new(true);
    tape.write(101, 5).write(102, 5).sent(200, Op::Flush, 0, 0).end(200, End::Failed(Status::INTERNAL_ERROR));
    tape.cut().reads(5, 101).expect("the flush failed");
    let mut tape = Tape::new(true);
    tape.write(101, 5).sent(102, Op::Write { fua: true }, 5, 1).done(102);
    assert!(tape.cut().reads(5, 101).is_err(), "force unit access");
}

#[test]
fn what_was_read_at_rest_is_flushed_with_the_next_flush() {
    let mut tape = Tape::new(true);
    tape.write(101, 5).sent(102, W, 5, 1).end(102, End::Failed(Status::WRITE_FAULT));
    tape.reads(5, 102).expect("it has touched");
    tape.sent(200, Op::Flush, 0, 0).done(200);
    assert!(tape.cut().reads(5, 101).is_err());
}

#[test]
fn zeroes_count_like_any_value() {
    for op in [Op::WriteZeroes { fua: false, deallocate: true }, Op::Deallocate] {
        let mut tape = Tape::new(false);
        tape.write(101, 5).sent(102, op, 4, 3).done(102);
        tape.reads(5, content::ZERO).expect("zeroes");
        assert!(tape.reads(5, 101).is_err());
    }
}

#[test]
fn the_destination_has_everything_durable() {
    let mut tape = Tape::new(true);
    tape.write(101, 5).write(102, 5).ok(&Event::Begins { from: 0, to: 1 });
    let moved = record(Owner::Destination, RecordPhase::Moved);
    tape.ok(&Event::RecordBegun(moved)).ok(&Event::RecordDurable(moved));
    tape.1 = 1;
    assert!(tape.cut().reads(5, 101).is_err(), "rule 3");

    let mut tape = Tape::new(true);
    tape.write(101, 5).write(102, 5).ok(&Event::Begins { from: 0, to: 1 });
    tape.ok(&Event::RecordBegun(moved)).ok(&Event::RecordFailed(moved));
    tape.cut().reads(5, 101).expect("the source has flushed nothing");
}

#[test]
fn media_are_equal_at_the_hand_over_and_right_at_rest() {
    let mut tape = Tape::new(false);
    tape.write(101, 5);
    tape.ok(&Event::HandedOver { nsid: 1, different: vec![] });
    assert_eq!(tape.see(&Event::HandedOver { nsid: 1, different: vec![3] }).unwrap_err().rule, "equal media");
    tape.rests(0, 101).expect("as written");
    assert!(tape.rests(0, 77).is_err());
}

#[test]
fn nothing_becomes_unreadable_by_itself() {
    let failed = End::Failed(Status::UNRECOVERED_READ);
    let read = |tape: &mut Tape| tape.sent(101, Op::Read, 5, 2).see(&Event::Ended { guest: 0, id: 101, end: failed.clone() });
    assert_eq!(read(&mut Tape::new(false)).unwrap_err().rule, "nothing becomes unreadable");
    let mut tape = Tape::new(false);
    tape.ok(&Event::MediaBegan { side: 0, serial: 1, op: BackingOp::Read, nsid: 1, slba: 6, blocks: 1 });
    tape.ok(&Event::MediaEnded { side: 0, serial: 1, status: Status::UNRECOVERED_READ });
    read(&mut tape).expect("its media has failed");
    let refused = End::Failed(Status::INVALID_FIELD);
    assert!(tape.sent(102, W, 5, 1).see(&Event::Ended { guest: 0, id: 102, end: refused }).is_err());
}
