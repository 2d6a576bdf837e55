//! What the machine can do: copies of 4 KiB, a stream, and the way between two cores.

use crate::machine::{pages_note, pin};
use crate::report::Report;
use crate::{Failure, Plan, handover, targets};
use dray_device::memory::{Arena, Pages};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Bytes of the cold buffer.
const COLD: u64 = 1 << 30;
/// Bytes of a random copy.
const PAGE: usize = 4096;
/// Bytes of one copy of the stream.
const PIECE: usize = 1 << 20;
/// Round trips above this time go between cores that are far apart.
const FAR_NS: f64 = 250.0;

/// The rows that come first.
pub fn before(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let needed = targets::calibration(|name| plan.wants(name));
    let wants = |name: &str| plan.wants(name) || needed.contains(&name);
    // Two-thread rows can only be compared between runs of the same distance.
    let two = plan.cores.second().is_ok();
    let (by_memory, by_tcp) = (plan.wants_part_of("vfio_user."), plan.wants_part_of("nvme_tcp."));
    if two && (plan.wants_any(&["calib.rtt", "copy.guest", "migrate."]) || by_memory || by_tcp) {
        let ns = round_trip(plan)?;
        report.add("calib.rtt", ns, "ns", format!("cores {}", distance(ns)));
    }
    if two && (plan.wants("calib.handover") || by_memory) {
        let note = "queue depth 1: an entry, a doorbell, a completion between two threads, and nothing else";
        report.add("calib.handover", handover::by_memory(plan)?, "iops", note);
    }
    if two && (plan.wants("calib.tcp") || by_tcp) {
        let note = "queue depth 1: a read's bytes over loopback TCP between two threads, and nothing else";
        report.add("calib.tcp", handover::by_tcp(plan)?, "iops", note);
    }
    if !["calib.read4k", "calib.write4k", "calib.stream"].into_iter().any(wants) {
        return Ok(());
    }
    let cold = Arena::new("bench-cold", plan.bytes(COLD) as usize, Pages::PreferHuge)?;
    cold.fill(0, cold.len(), 1);
    let hot = Arena::new("bench-hot", PAGE, Pages::Small)?;
    hot.fill(0, PAGE, 2);
    let note = pages_note(cold.is_huge());
    if wants("calib.read4k") {
        let rate = random(plan, &cold, |at| Arena::copy(&cold, at, &hot, 0, PAGE))?;
        report.add("calib.read4k", rate, "copies/s", note);
    }
    if wants("calib.write4k") {
        let rate = random(plan, &cold, |at| Arena::copy(&hot, 0, &cold, at, PAGE))?;
        report.add("calib.write4k", rate, "copies/s", note);
    }
    if wants("calib.stream") {
        report.add("calib.stream", stream(plan, &cold)?, "MiB/s", note);
    }
    Ok(())
}

/// The round trip once more: a run in which it changed is not to be compared.
pub fn after(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let Some(before) = report.value("calib.rtt") else { return Ok(()) };
    let ns = round_trip(plan)?;
    report.remark("calib.rtt", &format!("after: {ns:.0} ns"));
    if distance(before) != distance(ns) {
        report.remark("calib.rtt", "THE CORES MOVED during the run: do not compare it");
    }
    Ok(())
}

fn distance(ns: f64) -> &'static str {
    if ns > FAR_NS { "far" } else { "near" }
}

/// Copies per second at random pages of `cold`.
fn random(plan: &Plan, cold: &Arc<Arena>, copy: impl Fn(usize)) -> Result<f64, Failure> {
    let pages = (cold.len() / PAGE) as u64;
    let mut random = fastrand::Rng::with_seed(1);
    plan.median(|| {
        let (begin, mut copies) = (Instant::now(), 0u32);
        while begin.elapsed() < plan.run_time() {
            for _ in 0..1024 {
                copy(random.u64(0..pages) as usize * PAGE);
            }
            copies += 1024;
        }
        Ok(f64::from(copies) / begin.elapsed().as_secs_f64())
    })
}

/// MiB copied per second from the lower half of `cold` to the upper one.
fn stream(plan: &Plan, cold: &Arc<Arena>) -> Result<f64, Failure> {
    let half = cold.len() / 2;
    let mut at = 0;
    plan.median(|| {
        let (begin, mut copied) = (Instant::now(), 0u32);
        while begin.elapsed() < plan.run_time() {
            Arena::copy(cold, at, cold, half + at, PIECE);
            at = (at + PIECE) % half;
            copied += 1;
        }
        Ok(f64::from(copied) / begin.elapsed().as_secs_f64())
    })
}

/// A line of its own for the word that goes to and fro.
#[repr(align(128))]
struct Line(AtomicU32);

/// ns for a word to the other core and back.
fn round_trip(plan: &Plan) -> Result<f64, Failure> {
    let other = plan.cores.second()?;
    let rounds: u32 = if plan.quick { 10_000 } else { 500_000 };
    let line = Line(AtomicU32::new(0));
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| {
            pin(other).map_err(|error| error.to_string())?;
            for round in 0..rounds {
                wait_for(&line, 2 * round + 1);
                line.0.store(2 * round + 2, Ordering::Release);
            }
            Ok::<(), String>(())
        });
        let begin = Instant::now();
        for round in 0..rounds {
            line.0.store(2 * round + 1, Ordering::Release);
            while line.0.load(Ordering::Acquire) != 2 * round + 2 {
                if echo.is_finished() {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        let ns = begin.elapsed().as_nanos() as f64 / f64::from(rounds);
        echo.join().map_err(|_| "the echoing thread died")??;
        Ok(ns)
    })
}

fn wait_for(line: &Line, value: u32) {
    while line.0.load(Ordering::Acquire) != value {
        std::hint::spin_loop();
    }
}
