//! Driver and controller polled in turn by one thread, over the in-process loopback.
//!
//! Every block of the namespace carries its LBA in its first word and the complement in its last; every read is checked, and
//! of the writes the last ones are looked up in the backing's memory afterwards.

use crate::machine::pages_note;
use crate::report::Report;
use crate::rig::{Front, MIGRATABLE, NSID, Rig};
use crate::{Failure, Plan};
use dray_controller::{MemoryBacking, NullBacking};
use dray_device::backing::Backing;
use dray_device::memory::{Arena, DmaBuffer, Pages, Segment};
use dray_device::poll::{Poll, Time};
use dray_device::space::MappedBuffer;
use dray_driver::QueuePair;
use dray_nvme::command::SubmissionEntry;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// Bytes of the namespace.
const BYTES: u64 = 1 << 30;
/// Bytes of a block, and of a command's data.
const BLOCK: usize = 4096;
/// The last word of a block.
const LAST: usize = BLOCK - 8;
/// Commands between two looks at the clock, and between two polls of the driver's admin side.
const PER_LOOK: u64 = 32;
/// Writes that are looked up afterwards.
const REMEMBERED: usize = 4096;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write,
    /// Reads from a backing that copies nothing.
    Null,
}

const ROWS: [(&str, Kind, usize); 5] = [
    ("loopback.randread.qd1", Kind::Read, 1),
    ("loopback.randread.qd32", Kind::Read, 32),
    ("loopback.randwrite.qd1", Kind::Write, 1),
    ("loopback.randwrite.qd32", Kind::Write, 32),
    ("loopback.null.qd32", Kind::Null, 32),
];

/// All rows of this module.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let rows: Vec<_> = ROWS.into_iter().filter(|row| plan.wants(row.0)).collect();
    if rows.iter().any(|row| row.1 != Kind::Null) {
        let disk = disk(plan.bytes(BYTES))?;
        let note = pages_note(disk.arena().is_huge());
        let mut bench = Bench::new(Box::new(MemoryBacking::with_memory(disk.clone(), BLOCK as u32)?), Some(disk))?;
        for &(name, kind, depth) in rows.iter().filter(|row| row.1 != Kind::Null) {
            let iops = plan.median(|| bench.run(kind, depth, plan.run_time()))?;
            let checked = if kind == Kind::Read { "every read checked" } else { "the last 4096 writes looked up" };
            report.add(name, iops, "iops", format!("{note}, {checked}"));
        }
    }
    for &(name, kind, depth) in rows.iter().filter(|row| row.1 == Kind::Null) {
        let mut bench = Bench::new(Box::new(NullBacking::new(BYTES, BLOCK as u32)?), None)?;
        let iops = plan.median(|| bench.run(kind, depth, plan.run_time()))?;
        report.add(name, iops, "iops", "reads; nothing is copied");
    }
    Ok(())
}

/// Memory in which every block carries its LBA.
fn disk(bytes: u64) -> Result<DmaBuffer, Failure> {
    let disk = DmaBuffer::allocate("bench-disk", bytes as usize, Pages::PreferHuge)?;
    for lba in 0..bytes / BLOCK as u64 {
        let at = disk.offset() + lba as usize * BLOCK;
        disk.arena().fill(at, BLOCK, 0);
        sign(disk.arena(), at, lba);
    }
    Ok(disk)
}

fn sign(arena: &Arena, at: usize, lba: u64) {
    arena.store64(at, lba, Relaxed);
    arena.store64(at + LAST, !lba, Relaxed);
}

fn is_signed(arena: &Arena, at: usize, lba: u64) -> bool {
    arena.load64(at, Relaxed) == lba && arena.load64(at + LAST, Relaxed) == !lba
}

struct Bench {
    rig: Rig,
    front: Front,
    pair: QueuePair,
    /// A block for each command that may be outstanding.
    data: MappedBuffer,
    disk: Option<DmaBuffer>,
    blocks: u64,
    random: fastrand::Rng,
    /// Counts writes; each carries its number in the second word.
    sequence: u64,
    /// LBA and number of the last writes.
    written: Vec<(u64, u64)>,
}

impl Bench {
    fn new(backing: Box<dyn Backing>, disk: Option<DmaBuffer>) -> Result<Self, Failure> {
        let blocks = backing.info().blocks;
        let mut rig = Rig::new(backing)?;
        let mut front = rig.front(MIGRATABLE)?;
        let pair = rig.queue(&mut front, 64)?;
        let data = front.memory(64 * BLOCK)?;
        Ok(Self {
            rig,
            front,
            pair,
            data,
            disk,
            blocks,
            random: fastrand::Rng::with_seed(4),
            sequence: 0,
            written: vec![(0, 0); REMEMBERED],
        })
    }

    /// Commands per second with `depth` outstanding.
    fn run(&mut self, kind: Kind, depth: usize, time: Duration) -> Result<f64, Failure> {
        let mut free: Vec<usize> = (0..depth).collect();
        let mut lbas = vec![0u64; depth];
        let (mut ended, mut wrong, mut next_look) = (0u64, 0u64, PER_LOOK);
        let executed = self.executed(kind);
        let begin = self.rig.clock.now();
        let (mut now, end) = (begin, begin.after_ns(time.as_nanos() as u64));
        while now < end || free.len() < depth {
            if now < end {
                while let Some(slot) = free.pop() {
                    lbas[slot] = self.submit(now, kind, slot)?;
                }
                self.pair.commit();
            }
            let _progress = self.rig.subsystem.poll(now);
            let arena = self.data.arena();
            let base = self.data.buffer().offset();
            ended += self.pair.poll_with(now, |completion| {
                let slot = completion.tag as usize;
                let failed = completion.unknown || completion.status.is_error();
                let lied = kind == Kind::Read && !is_signed(arena, base + slot * BLOCK, lbas[slot]);
                wrong += u64::from(failed | lied);
                free.push(slot);
            }) as u64;
            if ended >= next_look || now >= end {
                next_look = ended + PER_LOOK;
                let _progress = self.front.driver.poll(now);
                now = self.rig.clock.now();
            }
        }
        let spent = now.ns_since(begin) as f64 / 1e9;
        if wrong > 0 {
            return Err(format!("{wrong} of {ended} commands failed or brought other data than was stored").into());
        }
        let executed = self.executed(kind) - executed;
        if executed != ended {
            return Err(format!("the driver saw {ended} commands end, the controller executed {executed}").into());
        }
        if kind == Kind::Write {
            self.look_up()?;
        }
        Ok(ended as f64 / spent)
    }

    /// Commands of a kind that the controller has executed.
    fn executed(&self, kind: Kind) -> u64 {
        let counters = self.rig.subsystem.counters().find(|(cntlid, _)| *cntlid == MIGRATABLE);
        counters.map_or(0, |(_, counters)| if kind == Kind::Write { counters.writes } else { counters.reads })
    }

    #[inline]
    fn submit(&mut self, now: Time, kind: Kind, slot: usize) -> Result<u64, Failure> {
        let lba = self.random.u64(0..self.blocks);
        let data: Segment<'_> = self.data.buffer().part(slot * BLOCK, BLOCK).ok_or("no block for the command")?;
        let entry = if kind == Kind::Write {
            self.sequence += 1;
            let at = data.offset();
            sign(data.arena(), at, lba);
            data.arena().store64(at + 8, self.sequence, Relaxed);
            self.written[self.sequence as usize % REMEMBERED] = (lba, self.sequence);
            SubmissionEntry::write(NSID, lba, 1)
        } else {
            SubmissionEntry::read(NSID, lba, 1)
        };
        self.pair.submit(now, &entry, &[data], slot as u64)?;
        Ok(lba)
    }

    /// The last writes must be in the backing: theirs, or a later one's.
    fn look_up(&self) -> Result<(), Failure> {
        let Some(disk) = &self.disk else { return Ok(()) };
        for &(lba, sequence) in self.written.iter().filter(|(_, sequence)| *sequence > 0) {
            let at = disk.offset() + lba as usize * BLOCK;
            // Numbers of commands that were outstanding together may have come in either order.
            let found = disk.arena().load64(at + 8, Relaxed);
            if !is_signed(disk.arena(), at, lba) || found + 64 < sequence {
                return Err(format!("block {lba} has write {found}, not {sequence}").into());
            }
        }
        Ok(())
    }
}
