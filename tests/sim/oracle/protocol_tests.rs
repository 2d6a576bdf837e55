use super::super::super::event::ENDS;
use super::super::Oracles;
use super::*;
use dray_migration::{Outcome, Owner, Record};
use dray_nvme::command::CompletionEntry;
use dray_nvme::status::Status;

const CNTLID: u16 = FIRST_CNTLID;

fn record(owner: Owner, phase: RecordPhase) -> Record {
    Record { migration: 1, from: ENDS[0], to: ENDS[1], epoch: 1, owner, phase, fenced: owner == Owner::Destination }
}

fn sent(side: Side, command: SubmissionEntry) -> Event {
    Event::Admin { side, command }
}

fn answered(side: Side, command: SubmissionEntry) -> [Event; 2] {
    [sent(side, command), Event::AdminEnded { side, command, completion: CompletionEntry::default() }]
}

fn media(serial: u64, op: BackingOp, blocks: u64) -> [Event; 2] {
    [
        Event::MediaBegan { side: 1, serial, op, nsid: 1, slba: 0, blocks },
        Event::MediaEnded { side: 1, serial, status: Status::SUCCESS },
    ]
}

fn set_state(offset: u64, seqind: SequenceIndicator) -> SubmissionEntry {
    SubmissionEntry::set_controller_state(seqind, 1, CNTLID, 0, offset, 16)
}

/// A whole move of one guest, in steps with names.
fn steps() -> Vec<(&'static str, Vec<Event>)> {
    let moved = record(Owner::Destination, RecordPhase::Moved);
    let suspend = SubmissionEntry::suspend(CNTLID, false, false);
    let get = SubmissionEntry::get_controller_state(1, CNTLID, 0, 0, 32);
    let submitted = Event::Submitted { guest: 0, id: 1, op: super::super::super::event::Op::Flush, nsid: 1, slba: 0, blocks: 0 };
    vec![
        ("guest", vec![submitted]),
        ("begin", vec![Event::Begins { from: 0, to: 1 }]),
        ("copy", media(1, BackingOp::Write { fua: false }, 16).into()),
        ("ready", answered(1, suspend).into()),
        ("suspend", answered(0, suspend).into()),
        ("flush", media(2, BackingOp::Flush, 0).into()),
        ("read", answered(0, get).into()),
        ("fence", vec![Event::Fence { side: 0, up: true }]),
        ("record", vec![Event::RecordBegun(moved)]),
        ("durable", vec![Event::RecordDurable(moved)]),
        ("point", vec![Event::Pointed { guest: 0, side: 1 }]),
        ("state", answered(1, set_state(0, SequenceIndicator::FIRST)).into()),
        ("rest of state", answered(1, set_state(64, SequenceIndicator::LAST)).into()),
        ("resume", answered(1, SubmissionEntry::resume(CNTLID)).into()),
        ("serve", vec![Event::Fetched { side: 1, guest: 0 }, Event::Over { outcome: Outcome::Moved }]),
    ]
}

fn run(steps: &[(&'static str, Vec<Event>)]) -> Result<(), Violation> {
    let facts = Facts { seed: 1, namespaces: vec![(1, 16, 512)], cached: true };
    let mut oracles = Oracles::new(&facts);
    steps.iter().flat_map(|(_, events)| events).try_for_each(|event| oracles.see(Time(0), event))
}

fn without(name: &str) -> Vec<(&'static str, Vec<Event>)> {
    steps().into_iter().filter(|step| step.0 != name).collect()
}

#[test]
fn a_move_in_order() {
    run(&steps()).expect("nothing to object to");
}

#[test]
fn a_step_that_is_left_out_is_missed() {
    let expected = [
        ("copy", "what changed is copied"),
        ("suspend", "the whole set is suspended"),
        ("flush", "clean means flushed"),
        ("read", "states are set as they were read"),
        ("fence", "fenced before the record"),
        ("durable", "durable before what relies on it"),
        ("state", "states are set as they were read"),
        ("rest of state", "the state comes before Resume"),
    ];
    for (name, rule) in expected {
        assert_eq!(run(&without(name)).unwrap_err().rule, rule, "without {name}");
    }
}

#[test]
fn steps_in_another_order_are_objected_to() {
    let swapped = |a: &str, b: &str| {
        let mut steps = steps();
        let at = |name: &str| steps.iter().position(|step| step.0 == name).expect("a step");
        let (a, b) = (at(a), at(b));
        steps.swap(a, b);
        run(&steps)
    };
    for (a, b) in [("durable", "point"), ("durable", "resume"), ("fence", "record"), ("flush", "copy"), ("suspend", "record"), ("state", "resume")] {
        assert!(swapped(a, b).is_err(), "{a} and {b}");
    }
}

#[test]
fn an_undo_is_recorded_before_the_fence_goes() {
    let undone = record(Owner::Source, RecordPhase::Copying);
    let before: Vec<_> = steps().into_iter().take(10).collect();
    let undo = |order: [usize; 4]| {
        let parts = [
            Event::RecordBegun(undone),
            Event::RecordDurable(undone),
            Event::Fence { side: 0, up: false },
            sent(0, SubmissionEntry::resume(CNTLID)),
        ];
        let mut steps = before.clone();
        steps.push(("undo", order.map(|index| parts[index].clone()).into()));
        run(&steps)
    };
    undo([0, 1, 2, 3]).expect("in order");
    for order in [[0, 2, 1, 3], [2, 0, 1, 3], [0, 3, 1, 2]] {
        assert_eq!(undo(order).unwrap_err().rule, "durable before what relies on it", "{order:?}");
    }
}

#[test]
fn a_suspension_may_end_only_behind_the_fence() {
    let get = SubmissionEntry::get_controller_state(1, CNTLID, 0, 0, 32);
    let (reset, asked) = (("reset", vec![Event::ManagementReset { side: 0 }]), ("asked", answered(0, get).into()));
    let up = |up| ("fence", vec![Event::Fence { side: 0, up }]);
    let behind = |more: &[(&'static str, Vec<Event>)]| {
        let mut steps = steps();
        let fence = steps.iter().position(|step| step.0 == "fence").expect("a step");
        steps.splice(fence..=fence, more.iter().cloned());
        run(&steps)
    };
    behind(&[up(true), asked.clone(), reset.clone()]).expect("it was suspended behind the fence, which stands");
    let late = [
        vec![reset.clone(), up(true), asked.clone()],
        vec![up(true), reset.clone(), asked.clone()],
        vec![up(true), reset.clone()],
        vec![asked.clone(), up(true), reset.clone()],
        vec![up(true), asked.clone(), up(false), up(true), reset],
    ];
    for steps in late {
        assert_eq!(behind(&steps).unwrap_err().rule, "the whole set is suspended", "{:?}", steps.iter().map(|step| step.0).collect::<Vec<_>>());
    }
}

#[test]
fn a_state_that_arrives_after_the_undo_is_none() {
    let [late, rest] = [(0, SequenceIndicator::FIRST), (64, SequenceIndicator::LAST)].map(|(offset, seqind)| set_state(offset, seqind));
    let undone = record(Owner::Source, RecordPhase::Copying);
    let mut steps: Vec<_> = steps().into_iter().take(11).collect();
    let read = answered(0, SubmissionEntry::get_controller_state(1, CNTLID, 0, 0, 32));
    steps.push(("undo", vec![Event::RecordBegun(undone), Event::RecordDurable(undone), Event::Fence { side: 0, up: false }]));
    steps.push(("resume", answered(0, SubmissionEntry::resume(CNTLID)).into()));
    steps.push(("late", [answered(1, late), answered(1, rest)].concat()));
    run(&steps).expect("it was sent before");
    // The next hand-over needs a state of its own.
    let moved = record(Owner::Destination, RecordPhase::Moved);
    let suspend = SubmissionEntry::suspend(CNTLID, false, false);
    steps.push(("again", [answered(0, suspend), read].concat()));
    steps.push(("fence", vec![Event::Fence { side: 0, up: true }, Event::RecordBegun(moved), Event::RecordDurable(moved)]));
    let with = |more: &[[Event; 2]]| run(&[&steps[..], &[("more", more.concat())]].concat());
    let resume = answered(1, SubmissionEntry::resume(CNTLID));
    with(&[answered(1, late), answered(1, rest), resume.clone()]).expect("a state of its own");
    assert_eq!(with(&[resume]).unwrap_err().rule, "the state comes before Resume");
}
