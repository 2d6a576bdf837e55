//! Driver and controller polled in turn by one thread, over the in-process loopback.

use crate::load::{BLOCK, Kind, Load, MOST, disk};
use crate::machine::pages_note;
use crate::report::Report;
use crate::rig::{Front, MIGRATABLE, NSID, Rig};
use crate::{Failure, Plan};
use dray_controller::{MemoryBacking, NullBacking};
use dray_device::backing::Backing;
use dray_device::memory::DmaBuffer;
use dray_device::poll::Poll;
use dray_device::space::MappedBuffer;
use dray_driver::QueuePair;
use std::time::Duration;

/// Bytes of the namespace.
const BYTES: u64 = 1 << 30;

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
            report.add(name, iops, "iops", format!("{note}, {}", kind.checked()));
        }
    }
    for &(name, kind, depth) in rows.iter().filter(|row| row.1 == Kind::Null) {
        let mut bench = Bench::new(Box::new(NullBacking::new(BYTES, BLOCK as u32)?), None)?;
        let iops = plan.median(|| bench.run(kind, depth, plan.run_time()))?;
        report.add(name, iops, "iops", kind.checked());
    }
    Ok(())
}

struct Bench {
    rig: Rig,
    front: Front,
    pair: QueuePair,
    load: Load,
    _data: MappedBuffer,
}

impl Bench {
    fn new(backing: Box<dyn Backing>, disk: Option<DmaBuffer>) -> Result<Self, Failure> {
        let blocks = backing.info().blocks;
        let mut rig = Rig::new(backing)?;
        let mut front = rig.front(MIGRATABLE)?;
        let pair = rig.queue(&mut front, 64)?;
        let data = front.memory(MOST * BLOCK)?;
        let load = Load::new(rig.clock, data.buffer().clone(), disk, (NSID, blocks));
        Ok(Self { rig, front, pair, load, _data: data })
    }

    /// Commands per second with `depth` outstanding.
    fn run(&mut self, kind: Kind, depth: usize, time: Duration) -> Result<f64, Failure> {
        let executed = self.executed(kind);
        let (subsystem, driver) = (&mut self.rig.subsystem, &mut self.front.driver);
        let ran = self.load.run(&mut self.pair, (kind, depth), time, |now, look| {
            let _progress = if look { driver.poll(now) } else { subsystem.poll(now) };
        })?;
        let executed = self.executed(kind) - executed;
        if executed != ran.ended {
            return Err(format!("the driver saw {} commands end, the controller executed {executed}", ran.ended).into());
        }
        Ok(ran.iops())
    }

    /// Commands of a kind that the controller has executed.
    fn executed(&self, kind: Kind) -> u64 {
        let counters = self.rig.subsystem.counters().find(|(cntlid, _)| *cntlid == MIGRATABLE);
        counters.map_or(0, |(_, counters)| if kind == Kind::Write { counters.writes } else { counters.reads })
    }
}
