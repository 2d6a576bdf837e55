//! The dirty map alone.

use crate::report::Report;
use crate::{Failure, Plan};
use dray_migration::dirty::DirtyMap;
use std::hint::black_box;
use std::time::Instant;

const BLOCK: u32 = 512;
/// Blocks of a range: 4 KiB.
const RANGE: u64 = 8;

fn map(bytes: u64) -> DirtyMap {
    DirtyMap::new(bytes / u64::from(BLOCK), BLOCK)
}

/// All rows of this module.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    if plan.wants("dirty.mark.random") {
        report.add("dirty.mark.random", mark(plan)?, "ns", "64 GiB, ranges of 8 blocks, a clean map at first");
    }
    if plan.wants("dirty.scan.empty.16tib") {
        report.add("dirty.scan.empty.16tib", scan(plan)?, "ms", "the map was dirty in 10,000 places before");
    }
    if plan.wants("dirty.memory") {
        let bytes = 16u64 << 40;
        let share = map(bytes).memory_bytes() as f64 / (bytes / 32_768) as f64;
        report.add("dirty.memory", share, "of 1/32768", "16 TiB");
    }
    Ok(())
}

/// ns per mark of a random aligned range.
fn mark(plan: &Plan) -> Result<f64, Failure> {
    let mut map = map(64 << 30);
    let ranges = map.blocks() / RANGE;
    let mut random = fastrand::Rng::with_seed(2);
    plan.median(|| {
        let (begin, mut marks) = (Instant::now(), 0u32);
        let mut spent = begin.elapsed();
        while begin.elapsed() < plan.run_time() {
            let from = Instant::now();
            for _ in 0..65_536 {
                black_box(map.mark(random.u64(0..ranges) * RANGE, RANGE));
            }
            spent += from.elapsed();
            marks += 65_536;
            // A migration keeps its map nearly clean.
            while !map.clear_some(4096) {}
        }
        Ok(spent.as_nanos() as f64 / f64::from(marks))
    })
}

/// ms for a look over an empty map of 16 TiB.
fn scan(plan: &Plan) -> Result<f64, Failure> {
    let mut map = map(16 << 40);
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..10_000 {
        map.mark(random.u64(0..map.blocks()), 1);
    }
    while !map.clear_some(4096) {}
    plan.median(|| {
        let scans = 1000;
        let begin = Instant::now();
        for _ in 0..scans {
            if black_box(&map).next_run(0, map.blocks(), u64::MAX).is_some() {
                return Err("an empty map has a run".into());
            }
        }
        Ok(begin.elapsed().as_secs_f64() * 1e3 / f64::from(scans))
    })
}
