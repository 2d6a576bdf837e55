//! The copy engine between two subsystems, all polled by one thread. What a guest feels of it is measured with the migration.

use crate::machine::pages_note;
use crate::report::Report;
use crate::rig::{Front, MANAGEMENT, NSID, Rig};
use crate::{Failure, Plan};
use dray_controller::MemoryBacking;
use dray_device::memory::{Arena, DmaBuffer, Pages};
use dray_device::poll::Poll;
use dray_migration::copy::{CopyConfig, Engine};
use dray_migration::destination::{LocalDestination, LocalFeatures};
use dray_migration::extents::Extents;
use dray_migration::media::{Geometry, Media};

const BYTES: u64 = 1 << 30;
const BLOCK: u32 = 4096;
const MIB: f64 = (1 << 20) as f64;

/// All rows of this module.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    if plan.wants("copy.memory") {
        let mut bench = Bench::new(plan.bytes(BYTES))?;
        let rate = plan.median(|| bench.run())?;
        let huge = bench.disks.iter().all(|disk| disk.arena().is_huge());
        let note = format!("{}, both controllers and the engine on one core, compared afterwards", pages_note(huge));
        report.add("copy.memory", rate, "MiB/s", note);
    }
    Ok(())
}

struct Bench {
    rigs: [Rig; 2],
    fronts: [Front; 2],
    disks: [DmaBuffer; 2],
    engine: Engine,
}

impl Bench {
    fn new(bytes: u64) -> Result<Self, Failure> {
        let disks = [disk(bytes, 5)?, disk(bytes, 6)?];
        let rig = |disk: &DmaBuffer| Rig::new(Box::new(MemoryBacking::with_memory(disk.clone(), BLOCK)?));
        let mut rigs = [rig(&disks[0])?, rig(&disks[1])?];
        let mut fronts = [rigs[0].front(MANAGEMENT)?, rigs[1].front(MANAGEMENT)?];
        let source = Box::new(rigs[0].queue(&mut fronts[0], 64)?);
        let target = Box::new(rigs[1].queue(&mut fronts[1], 64)?);
        let features = LocalFeatures::default();
        let destination = LocalDestination::new(target, fronts[1].driver.space().clone(), features);
        let engine = Engine::new(source, fronts[0].driver.space(), Box::new(destination), CopyConfig::default())?;
        Ok(Self { rigs, fronts, disks, engine })
    }

    /// MiB per second of a full pass.
    fn run(&mut self) -> Result<f64, Failure> {
        let blocks = self.disks[0].len() as u64 / u64::from(BLOCK);
        let mut media = Media::new(&[Geometry { source: NSID, destination: NSID, blocks, block_bytes: BLOCK }])?;
        media.mark_everything();
        while !media.fill_some() {}
        let mut extents = Extents::default();
        extents.sweep();
        // A source that has changed altogether, so that a copy which did nothing is found.
        stir(&self.disks[0]);
        let clock = self.rigs[0].clock;
        let begin = clock.now();
        while !(media.is_clean() && self.engine.in_flight() == 0) {
            let now = clock.now();
            for (rig, front) in self.rigs.iter_mut().zip(&mut self.fronts) {
                let _progress = rig.subsystem.poll(now);
                let _progress = front.driver.poll(now);
            }
            self.engine.poll(now, &mut media, Some(&mut extents));
            if let Some(error) = self.engine.error() {
                return Err(error.into());
            }
            if now.ns_since(begin) > 60_000_000_000 {
                return Err("a copy did not end within a minute".into());
            }
        }
        let spent = clock.now().ns_since(begin) as f64 / 1e9;
        let [from, to] = &self.disks;
        if !Arena::equal(from.arena(), from.offset(), to.arena(), to.offset(), from.len()) {
            return Err("the copy differs from its source".into());
        }
        Ok(from.len() as f64 / MIB / spent)
    }
}

/// Memory of words that are hardly ever zero.
pub fn disk(bytes: u64, seed: u64) -> Result<DmaBuffer, Failure> {
    let disk = DmaBuffer::allocate("bench-disk", bytes as usize, Pages::PreferHuge)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut piece = vec![0u8; 1 << 20];
    for at in (0..disk.len()).step_by(piece.len()) {
        random.fill(&mut piece);
        disk.arena().write(disk.offset() + at, &piece);
    }
    Ok(disk)
}

/// Changes one word of every block.
fn stir(disk: &DmaBuffer) {
    use std::sync::atomic::Ordering::Relaxed;
    for at in (disk.offset()..disk.offset() + disk.len()).step_by(BLOCK as usize) {
        let word = disk.arena().load64(at, Relaxed);
        disk.arena().store64(at, word.wrapping_add(1), Relaxed);
    }
}
