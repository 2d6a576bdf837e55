use super::*;
use crate::ledger::LedgerSpec;
use crate::tag::SECTOR_BYTES;

const SEED: u64 = 11;
const GUEST: u32 = 4;
const BLOCKS: usize = 600;

/// Two disks of 600 blocks; the guest's are 3, 13, 23, …; indices 0 to 19 were written before the switch-over (19 twice),
/// indices 10 to 14 again afterwards.
struct World {
    source: Vec<u8>,
    destination: Vec<u8>,
    ledger: Ledger,
}

fn put(disk: &mut [u8], at: u64, tag: Tag) {
    let mut block = Block::default();
    block.write(SEED, tag);
    disk[at as usize * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(block.bytes());
}

fn target(index: usize) -> u64 {
    index as u64 * 10 + 3
}

impl World {
    fn new() -> Self {
        let blocks = (0..50).map(target).collect();
        let ledger = Ledger::in_memory(&LedgerSpec { seed: SEED, guest: GUEST, blocks }).expect("ledger");
        let source: Vec<u8> = (0..BLOCKS * BLOCK_BYTES).map(|i| (i / 100) as u8).collect();
        let mut world = Self { source, destination: Vec::new(), ledger };
        for index in (0..20).chain([19]) {
            let seq = world.ledger.issue(index, |_| {});
            put(&mut world.source, target(index), Tag { guest: GUEST, seq, block: target(index) });
            world.ledger.acknowledge(index, seq);
        }
        world.destination = world.source.clone();
        world.ledger.set_suspend_floor(Some(world.ledger.next_seq()));
        for index in 10..15 {
            world.write_after(index, true);
        }
        world
    }

    fn write_after(&mut self, index: usize, acknowledged: bool) -> u64 {
        let seq = self.ledger.issue(index, |_| {});
        put(&mut self.destination, target(index), Tag { guest: GUEST, seq, block: target(index) });
        if acknowledged {
            self.ledger.acknowledge(index, seq);
        }
        seq
    }

    fn compare(&mut self) -> Comparison {
        compare(&mut self.source, &mut self.destination, &self.ledger).expect("comparison")
    }

    fn restore(&mut self, block: u64) {
        let at = block as usize * BLOCK_BYTES;
        self.destination[at..at + BLOCK_BYTES].copy_from_slice(&self.source[at..at + BLOCK_BYTES]);
    }
}

#[test]
fn a_good_migration_is_good() {
    let mut world = World::new();
    let found = world.compare();
    assert!(found.is_ok(), "{found:?}");
    assert_eq!((found.blocks_compared, found.blocks_written_since, found.writes_acknowledged), (600, 5, 26));
    // Outstanding at the end: issued, not acknowledged, there or not.
    world.write_after(30, false);
    world.ledger.issue(31, |_| {});
    world.ledger.issue(12, |_| {});
    assert!(world.compare().is_ok());
    assert_eq!(check(&mut world.destination, &world.ledger).expect("check").blocks_compared, 50);
}

#[test]
fn a_lost_write_is_found() {
    let mut world = World::new();
    let at = target(5) as usize * BLOCK_BYTES;
    // Never copied: what was there before the first write, on both disks.
    world.source[at..at + BLOCK_BYTES].fill(7);
    world.destination[at..at + BLOCK_BYTES].fill(7);
    let found = world.compare();
    assert_eq!((found.writes_missing, found.blocks_different), (1, 0));
    assert_eq!(found.offenders, [Offender { block: target(5), fault: Fault::Lost { acked: 6 } }]);
    assert!(!found.is_ok());
    // A block of the destination that was never copied.
    world.destination[at..at + BLOCK_BYTES].fill(0xa5);
    assert_eq!(world.compare().blocks_different, 1);
}

#[test]
fn a_write_after_resume_that_is_lost_is_found() {
    let mut world = World::new();
    world.restore(target(12));
    let found = world.compare();
    assert_eq!((found.writes_missing, found.blocks_different), (1, 0));
    assert_eq!(found.offenders[0].fault, Fault::RolledBack { acked: 24, found: 13 });
}

#[test]
fn a_block_rolled_back_before_the_switch_over_is_found() {
    let mut world = World::new();
    put(&mut world.destination, target(19), Tag { guest: GUEST, seq: 20, block: target(19) });
    let found = world.compare();
    assert_eq!((found.writes_missing, found.blocks_different), (1, 1));
    assert_eq!(found.offenders[0].fault, Fault::RolledBack { acked: 21, found: 20 });
}

#[test]
fn an_old_unacknowledged_write_does_not_explain_a_difference() {
    let mut world = World::new();
    // Outstanding before the switch-over, with an unknown end: the source has the second, the destination the first.
    world.ledger.set_suspend_floor(None);
    let first = world.ledger.issue(40, |_| {});
    let second = world.ledger.issue(40, |_| {});
    put(&mut world.destination, target(40), Tag { guest: GUEST, seq: first, block: target(40) });
    put(&mut world.source, target(40), Tag { guest: GUEST, seq: second, block: target(40) });
    for index in 10..15 {
        world.restore(target(index));
    }
    world.ledger.set_suspend_floor(Some(world.ledger.next_seq()));
    for index in 10..15 {
        world.write_after(index, true);
    }
    let found = world.compare();
    assert_eq!((found.writes_missing, found.blocks_different), (0, 1));
    assert!(!found.is_ok());
    // Nor does a write that was issued after Suspend and has not arrived.
    world.ledger.issue(40, |_| {});
    let found = world.compare();
    assert_eq!(found.blocks_different, 1);
    assert!(matches!(found.offenders[0].fault, Fault::RolledBack { .. }));
}

#[test]
fn torn_and_damaged_blocks_are_found() {
    let mut world = World::new();
    let seq = world.ledger.next_seq();
    put(&mut world.destination, target(11), Tag { guest: GUEST, seq, block: target(11) });
    world.ledger.issue(11, |_| {});
    let at = target(11) as usize * BLOCK_BYTES + 3 * SECTOR_BYTES;
    let old = world.source[at..at + SECTOR_BYTES].to_vec();
    world.destination[at..at + SECTOR_BYTES].copy_from_slice(&old);
    let at = target(13) as usize * BLOCK_BYTES + 2 * SECTOR_BYTES + 100;
    world.destination[at] ^= 1;
    let found = world.compare();
    assert_eq!((found.torn, found.writes_missing, found.blocks_different), (2, 2, 2));
    assert_eq!(found.offenders[0].fault, Fault::Torn { sector: 3 });
    assert_eq!(found.offenders[1].fault, Fault::Damaged { sector: 2 });
}

#[test]
fn misplaced_writes_are_found() {
    let mut world = World::new();
    let tag = Tag { guest: GUEST, seq: 24, block: target(12) };
    put(&mut world.destination, 100, tag);
    put(&mut world.destination, target(14), tag);
    let found = world.compare();
    assert_eq!((found.misplaced, found.blocks_different, found.writes_missing), (2, 2, 1));
    assert!(found.offenders.iter().all(|offender| offender.fault == Fault::Misplaced(tag)));
}

#[test]
fn a_flipped_bit_elsewhere_is_found() {
    let mut world = World::new();
    let last = world.destination.len() - 1;
    world.destination[last] ^= 0x80;
    let found = world.compare();
    assert_eq!((found.blocks_different, found.writes_missing), (1, 0));
    assert_eq!(found.offenders, [Offender { block: BLOCKS as u64 - 1, fault: Fault::Unexplained }]);
}

#[test]
fn without_a_switch_over_nothing_may_differ() {
    let mut world = World::new();
    world.ledger.set_suspend_floor(None);
    assert_eq!(world.compare().blocks_different, 5);
}

#[test]
fn a_write_that_was_never_issued_is_found() {
    let mut world = World::new();
    put(&mut world.destination, target(10), Tag { guest: GUEST, seq: 9000, block: target(10) });
    assert!(matches!(world.compare().offenders[0].fault, Fault::NeverIssued { found: 9000, .. }));
}

#[test]
fn disks_that_do_not_fit_are_errors() {
    let mut world = World::new();
    world.destination.truncate(1000);
    let answer = compare(&mut world.source, &mut world.destination, &world.ledger);
    assert!(matches!(answer, Err(VerifyError::TooShort { destination: 0, .. })));
    world.source.truncate(100 * BLOCK_BYTES);
    let answer = check(&mut world.source, &world.ledger);
    assert!(matches!(answer, Err(VerifyError::OutOfRange { block: 493, blocks: 100 })));
}
