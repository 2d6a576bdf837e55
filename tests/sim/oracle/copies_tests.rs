use super::super::super::event::{ENDS, Event};
use super::*;
use dray_migration::{Owner, Record, RecordPhase};

const WRITE: BackingOp = BackingOp::Write { fua: false };

fn migrating() -> (Copies, Serving) {
    let facts = Facts { seed: 1, namespaces: vec![(1, 16, 512)], cached: true };
    let (mut copies, mut serving) = (Copies::new(&facts), Serving::default());
    serving.see(&Event::Begins { from: 0, to: 1 }).expect("a migration");
    copies.tick();
    copies.begins();
    (copies, serving)
}

/// A whole operation at the destination.
fn put(copies: &mut Copies, serving: &Serving, serial: u64, op: BackingOp, slba: u64, blocks: u64) {
    begin(copies, serving, serial, op, slba, blocks).expect("it may begin");
    end(copies, serving, serial, true).expect("it may end");
}

fn begin(copies: &mut Copies, serving: &Serving, serial: u64, op: BackingOp, slba: u64, blocks: u64) -> Result<(), Violation> {
    copies.tick();
    copies.began(Operation::new(1, serial, op, 0, slba, blocks, false), serving)
}

fn end(copies: &mut Copies, serving: &Serving, serial: u64, good: bool) -> Result<(), Violation> {
    copies.tick();
    copies.ended(1, serial, good, serving)
}

#[test]
fn everything_is_copied_and_flushed_before_it_counts() {
    let (mut copies, serving) = migrating();
    put(&mut copies, &serving, 1, WRITE, 0, 16);
    assert_eq!(copies.moved(1).unwrap_err().rule, "clean means flushed");
    put(&mut copies, &serving, 2, BackingOp::Flush, 0, 0);
    copies.moved(1).expect("copied and flushed");
    // A flush that began before the last write had ended does not cover it.
    begin(&mut copies, &serving, 3, WRITE, 0, 1).expect("a write");
    begin(&mut copies, &serving, 4, BackingOp::Flush, 0, 0).expect("a flush");
    assert_eq!(copies.moved(1).unwrap_err().rule, "no copy in flight at the hand-over");
    end(&mut copies, &serving, 3, true).expect("ends");
    end(&mut copies, &serving, 4, true).expect("ends");
    assert_eq!(copies.moved(1).unwrap_err().rule, "clean means flushed");
}

#[test]
fn what_the_log_names_is_copied_again() {
    let (mut copies, serving) = migrating();
    put(&mut copies, &serving, 1, WRITE, 0, 15);
    put(&mut copies, &serving, 2, BackingOp::Flush, 0, 0);
    assert_eq!(copies.moved(1).unwrap_err().place.map(|place| place.lba), Some(15), "never copied");
    begin(&mut copies, &serving, 3, WRITE, 15, 1).expect("a write");
    copies.tick();
    copies.changed(0, Some((15, 1)));
    end(&mut copies, &serving, 3, true).expect("ends");
    put(&mut copies, &serving, 4, BackingOp::Flush, 0, 0);
    assert_eq!(copies.moved(1).unwrap_err().rule, "what changed is copied", "its copy began before");
    put(&mut copies, &serving, 5, WRITE, 15, 1);
    put(&mut copies, &serving, 6, BackingOp::Flush, 0, 0);
    copies.moved(1).expect("copied again");
    copies.tick();
    copies.log_begins();
    assert!(copies.moved(1).is_err(), "the log had a hole: everything again");
}

#[test]
fn two_copies_of_a_block_do_not_overlap() {
    let (mut copies, mut serving) = migrating();
    begin(&mut copies, &serving, 1, WRITE, 0, 4).expect("one");
    begin(&mut copies, &serving, 2, WRITE, 4, 4).expect("beside it");
    begin(&mut copies, &serving, 3, BackingOp::Read, 0, 4).expect("a read");
    let zeroes = BackingOp::WriteZeroes { deallocate: false, fua: false };
    assert_eq!(begin(&mut copies, &serving, 4, zeroes, 3, 1).unwrap_err().rule, "one copy of a block at a time");
    end(&mut copies, &serving, 1, false).expect("ends");
    begin(&mut copies, &serving, 5, zeroes, 3, 1).expect("after it");
    let record = Record {
        migration: 1, from: ENDS[0], to: ENDS[1], epoch: 1, owner: Owner::Destination, phase: RecordPhase::Moved, fenced: true,
    };
    serving.see(&Event::RecordDurable(record)).expect("moved");
    begin(&mut copies, &serving, 6, WRITE, 3, 1).expect("guests may");
}

#[test]
fn a_restart_of_the_destination_takes_what_was_not_flushed() {
    let (mut copies, serving) = migrating();
    put(&mut copies, &serving, 1, WRITE, 0, 8);
    put(&mut copies, &serving, 2, BackingOp::Flush, 0, 0);
    put(&mut copies, &serving, 3, WRITE, 8, 8);
    copies.power_cut(1);
    put(&mut copies, &serving, 4, BackingOp::Flush, 0, 0);
    assert_eq!(copies.moved(1).unwrap_err().place.map(|place| place.lba), Some(8));
    put(&mut copies, &serving, 5, WRITE, 8, 8);
    put(&mut copies, &serving, 6, BackingOp::Flush, 0, 0);
    copies.moved(1).expect("copied again");
}

#[test]
fn a_block_that_is_marked_stays_so_until_it_is_written() {
    let (mut copies, mut serving) = migrating();
    put(&mut copies, &serving, 1, WRITE, 0, 15);
    put(&mut copies, &serving, 2, BackingOp::Flush, 0, 0);
    copies.began(Operation::new(0, 3, BackingOp::Read, 0, 15, 1, false), &serving).expect("a read");
    copies.ended(0, 3, false, &serving).expect("a failure");
    copies.moved(1).expect("all but what cannot be read");
    let moved = Record {
        migration: 1, from: ENDS[0], to: ENDS[1], epoch: 1, owner: Owner::Destination, phase: RecordPhase::Moved, fenced: true,
    };
    serving.see(&Event::RecordDurable(moved)).expect("moved");
    put(&mut copies, &serving, 4, WRITE, 15, 1);
    serving.see(&Event::Over { outcome: dray_migration::Outcome::Moved }).expect("over");
    serving.see(&Event::Begins { from: 1, to: 0 }).expect("and back");
    copies.begins();
    let missing = copies.moved(0).unwrap_err();
    assert_eq!((missing.rule, missing.place.map(|place| place.lba)), ("what changed is copied", Some(0)));
    copies.namespaces[0].blocks[..15].iter_mut().for_each(|block| block.began = u64::MAX);
    assert!(copies.moved(0).is_err(), "a guest has written it");
}

#[test]
fn errors_end() {
    let (mut copies, serving) = migrating();
    let fail = |copies: &mut Copies, serial| {
        begin(copies, &serving, serial, WRITE, 3, 1).and_then(|()| end(copies, &serving, serial, false))
    };
    for serial in 0..u64::from(MOST_FAILURES) {
        fail(&mut copies, serial).expect("bounded");
    }
    assert_eq!(fail(&mut copies, 1 << 20).unwrap_err().rule, "errors end");
}

#[test]
fn a_block_that_is_marked_is_tried_again_only_for_what_changes() {
    for changes in [true, false] {
        let (mut copies, serving) = migrating();
        let mut round = |serial: u64| {
            copies.tick();
            copies.began(Operation::new(0, serial, BackingOp::Read, 0, 3, 1, false), &serving)?;
            copies.ended(0, serial, false, &serving)?;
            begin(&mut copies, &serving, serial, BackingOp::WriteUncorrectable, 3, 1)?;
            end(&mut copies, &serving, serial, true)?;
            copies.tick();
            if changes {
                copies.changed(0, Some((0, 1)));
            }
            Ok::<(), Violation>(())
        };
        let failed = (0..u64::from(MOST_FAILURES) * 3).find_map(|serial| round(serial).err());
        assert_eq!(failed.map(|violation| violation.rule), (!changes).then_some("errors end"));
    }
}
