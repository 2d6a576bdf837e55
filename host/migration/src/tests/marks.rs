//! Blocks that cannot be read at the source, and destinations that cannot keep a mark (rule 11): no block becomes readable by a move.

use super::*;
use crate::Reason;
use crate::copy::{CopyConfig, CopyError, OnMediaError};
use dray_nvme::status::Status;

const LBA: u64 = 70;

fn marking(prepare: impl FnOnce(&Drive)) -> World {
    let copy = CopyConfig { on_media_error: OnMediaError::Mark, ..CopyConfig::default() };
    let mut world = World::new(MigrationConfig { copy, ..config() }, |s, d| {
        s.lock().unreadable.insert(LBA);
        prepare(d);
    });
    world.writes = 0;
    world
}

/// It ended by itself, names the block and what could not be done, and claims no mark.
fn assert_says_so(mut world: World, what: &str) {
    match world.run() {
        Outcome::Undone(Reason::Copy(CopyError::Media { nsid: 1, lba: LBA, what: told, .. })) => assert_eq!(told, what),
        other => panic!("{other:?}"),
    }
    assert_eq!(world.migration.report().uncorrectable, []);
    assert!(world.destination.lock().unreadable.is_empty());
    world.assert_source_serves();
}

#[test]
fn a_block_that_the_destination_cannot_mark_ends_the_migration() {
    let world = marking(|d| {
        let mut destination = d.lock();
        destination.identify.oncs = destination.identify.oncs.with_write_uncorrectable(false);
    });
    assert_says_so(world, "read");
}

#[test]
fn a_mark_that_is_refused_ends_the_migration() {
    assert_says_so(marking(|d| d.lock().refuse_marks = Some(Status::INTERNAL_ERROR)), "written");
}

#[test]
fn marks_that_a_restart_loses_are_made_again() {
    // A whole granule of the map: neighbours that were copied do not stand in for the marks.
    let lbas: Vec<u64> = (64..72).collect();
    let mut world = marking(|_| {});
    world.source.lock().unreadable.extend(&lbas);
    // The whole transfer has ended, block by block: nothing but the map of what is not flushed knows of the marks.
    world.run_until(|world| {
        let destination = world.destination.lock();
        let done = |lba: u64| destination.media[lba as usize * BLOCK] != 0xa5 || destination.unreadable.contains(&lba);
        destination.unreadable.len() == lbas.len() && (0..512).all(done)
    });
    world.destination.lock().crash();
    assert!(world.destination.lock().unreadable.is_empty(), "they had not been flushed");
    assert_eq!(world.run(), Outcome::Moved);
    let is_marked = |lba| world.destination.lock().unreadable.contains(lba);
    assert!(lbas.iter().all(is_marked), "blocks have become readable");
    assert_eq!(world.migration.report().uncorrectable.iter().map(|block| block.lba).collect::<Vec<_>>(), lbas);
    world.assert_equal();
}
