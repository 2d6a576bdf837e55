use super::*;
use RecordPhase::{Copying, Done, Moved, Undone};

const A: EndId = [0xa; 16];
const B: EndId = [0xb; 16];

/// Record of migration `n`, which goes from A to B if `n` is odd and back if it is even.
fn record(n: u64, phase: RecordPhase, epoch: u64) -> Record {
    let (from, to) = if n % 2 == 1 { (A, B) } else { (B, A) };
    let moved = matches!(phase, Moved | Done);
    let owner = if moved { Owner::Destination } else { Owner::Source };
    Record { migration: n, from, to, epoch, owner, phase, fenced: moved }
}

/// What follows: who serves, the phase of the set, the closing record.
type Verdict = Result<(EndId, RecordPhase, Option<RecordPhase>), Contradiction>;

fn verdict(records: &[Option<Record>]) -> Verdict {
    recover(records).map(|r| {
        (r.serving().expect("an end"), r.phase.expect("a phase"), r.then.map(|then| then.phase))
    })
}

#[test]
fn one_namespace_is_what_its_record_says() {
    for (phase, serving, then) in
        [(Copying, A, Some(Undone)), (Moved, B, Some(Done)), (Done, B, None), (Undone, A, None)]
    {
        let found = recover(&[Some(record(3, phase, 5))]).expect("no contradiction");
        assert_eq!((found.serving(), found.migration, found.next_migration), (Some(serving), 3, 4), "{phase:?}");
        assert_eq!(found.fenced(), (serving == B).then_some(A), "{phase:?}");
        let expected = then.map(|phase| record(3, phase, 6));
        assert_eq!(found.then, expected, "{phase:?}: the epoch goes on");
    }
}

#[test]
fn without_records_the_configuration_decides() {
    for count in 0..3 {
        let found = recover(&vec![None; count]).expect("nothing to contradict");
        assert_eq!((found.serving(), found.fenced(), found.then), (None, None, None));
        assert_eq!((found.phase, found.next_migration), (None, 1));
    }
}

#[test]
fn two_namespaces_are_read_together() {
    // Every pair of: no record; the migration before (3 went from A to B, so 4 starts at B); each phase of 4.
    let half = Err(Contradiction::HalfDone(4));
    let source = Ok((B, Copying, Some(Undone)));
    let table: [(Option<RecordPhase>, Option<RecordPhase>, Verdict); 14] = [
        (Some(Copying), None, source),
        (Some(Copying), Some(Copying), source),
        (Some(Copying), Some(Moved), source),
        (Some(Copying), Some(Done), half),
        (Some(Copying), Some(Undone), source),
        (Some(Moved), None, source),
        (Some(Moved), Some(Moved), Ok((A, Moved, Some(Done)))),
        (Some(Moved), Some(Done), Ok((A, Moved, Some(Done)))),
        (Some(Moved), Some(Undone), source),
        (Some(Done), None, half),
        (Some(Done), Some(Done), Ok((A, Done, None))),
        (Some(Done), Some(Undone), half),
        (Some(Undone), None, source),
        (Some(Undone), Some(Undone), Ok((B, Undone, None))),
    ];
    for (one, other, expected) in table {
        // A namespace that migration 4 has not reached has no record, or the last one of migration 3.
        let unreached = if other.is_none() { vec![None, Some(record(3, Done, 9))] } else { vec![None] };
        for before in unreached {
            let (one, other) = (one.map(|phase| record(4, phase, 2)), other.map(|phase| record(4, phase, 3)).or(before));
            for pair in [[one, other], [other, one]] {
                assert_eq!(verdict(&pair), expected, "{pair:?}");
                if let Ok(found) = recover(&pair) {
                    assert_eq!((found.migration, found.next_migration), (4, 5));
                    assert_eq!(found.fenced(), (found.owner == Owner::Destination).then_some(B));
                    assert!(found.then.is_none_or(|then| then.epoch > 2), "{pair:?}");
                }
            }
        }
    }
}

#[test]
fn an_unfinished_set_never_serves_at_both_ends_as_it_is_closed() {
    // The closing record itself is written to one namespace after the other: whoever serves goes on serving at every crash.
    for one in [Copying, Moved, Done, Undone] {
        for other in [Copying, Moved, Done, Undone] {
            let mut pair = [Some(record(1, one, 1)), Some(record(1, other, 1))];
            let Ok(found) = recover(&pair) else { continue };
            for place in 0..2 {
                pair[place] = found.then.or(pair[place]);
                let again = recover(&pair).expect("no contradiction");
                assert_eq!((again.serving(), again.next_migration), (found.serving(), 2), "{one:?} {other:?}");
            }
            assert_eq!(recover(&pair).expect("closed").then, None);
        }
    }
}

#[test]
fn there_and_back_is_served_where_it_came_from() {
    let found = recover(&[Some(record(2, Done, 3))]).expect("no contradiction");
    assert_eq!((found.serving(), found.fenced()), (Some(A), Some(B)));
    let found = recover(&[Some(record(2, Copying, 1)), Some(record(1, Done, 3))]).expect("no contradiction");
    assert_eq!((found.serving(), found.fenced()), (Some(B), None), "migration 2 starts where 1 has ended");
}

#[test]
fn what_no_crash_leaves_behind_is_refused() {
    let moved = record(4, Moved, 1);
    let swapped = Record { from: moved.to, to: moved.from, ..moved };
    assert_eq!(recover(&[Some(moved), Some(swapped)]), Err(Contradiction::Ends(4)));
    for wrong in [Record { owner: Owner::Source, ..moved }, Record { fenced: false, ..moved }] {
        assert_eq!(recover(&[Some(wrong)]), Err(Contradiction::Owner(4)));
    }
    // Migration 4 starts at B; the other namespace was left at A.
    let elsewhere = Err(Contradiction::Elsewhere { newest: 4, older: 3 });
    assert_eq!(recover(&[Some(record(4, Copying, 1)), Some(record(3, Undone, 1))]), elsewhere);
    // Ends without names cannot be told apart, and are not.
    let nameless = |n, phase| Some(Record { from: [0; 16], to: [0; 16], ..record(n, phase, 1) });
    assert!(recover(&[nameless(4, Copying), nameless(3, Undone)]).is_ok());
}

#[test]
fn a_media_move_names_the_backing_of_every_namespace() {
    // Namespaces that change their backing together, A for B: at each crash between two records one and the same backing is
    // opened for all of them, and the other end is the one that is retired.
    const STEPS: [[Option<RecordPhase>; 2]; 8] = [
        [Some(Copying), None],
        [Some(Copying), Some(Copying)],
        [Some(Moved), Some(Copying)],
        [Some(Moved), Some(Moved)],
        // Exchanged or not: both backings are equal until the gate opens, and the copy is flushed.
        [Some(Done), Some(Moved)],
        [Some(Done), Some(Done)],
        // Or undone from there: the record first, then the backing.
        [Some(Copying), Some(Moved)],
        [Some(Undone), Some(Copying)],
    ];
    let opened = [A, A, A, B, B, B, A, A];
    for (step, serving) in STEPS.iter().zip(opened) {
        let records = step.map(|phase| phase.map(|phase| record(1, phase, 1)));
        let found = recover(&records).expect("no contradiction");
        assert_eq!(found.serving(), Some(serving), "{step:?}");
        assert_eq!(found.fenced(), (serving == B).then_some(A), "{step:?}");
        // The next move of the same namespaces goes from the backing that serves.
        let closed = found.then.or(records[0]);
        assert_eq!(recover(&[closed, closed]).expect("closed").serving(), Some(serving));
    }
}
