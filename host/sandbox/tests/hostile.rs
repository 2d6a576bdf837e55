//! Components that loop, trap, swell and lie: each ends in the fault that names it, and the host goes on.

mod support;

use dray_policy::role::{Cdq, Role};
use dray_policy::seam::{Factory, Fault};
use dray_sandbox::{Budget, Limits, LoadError, Sandbox, SandboxConfig};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{FUEL, HONEST, TIME, Ticks, ask, cdq, load, open, opening, request, sandbox};

const LOOP: &str = "(loop $again (br $again)) (unreachable)";

#[test]
fn an_honest_component_answers() {
    for budget in [TIME, FUEL] {
        let sandbox = sandbox(budget);
        let mut policy = open(&sandbox, &cdq(HONEST, ""));
        for entries in [0, 1, 512, 1, 2048, 0] {
            assert_eq!(ask(&mut *policy, entries).unwrap().consumed as usize, entries);
        }
        assert_eq!(policy.save(), Ok(None), "it exports no state");
    }
}

#[test]
fn an_endless_loop_runs_out_of_time() {
    let sandbox = sandbox(TIME);
    let _ticks = Ticks::start(&sandbox);
    let mut policy = open(&sandbox, &cdq(LOOP, ""));
    let begun = Instant::now();
    assert_eq!(ask(&mut *policy, 1).unwrap_err(), Fault::Deadline);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // The ticker parks by now; the next call must wake it.
    for _ in 0..2 {
        let idle = Instant::now();
        while idle.elapsed() < Duration::from_millis(300) {
            std::hint::spin_loop();
        }
        let mut policy = open(&sandbox, &cdq(LOOP, ""));
        assert_eq!(ask(&mut *policy, 1).unwrap_err(), Fault::Deadline);
    }
}

#[test]
fn an_endless_loop_runs_out_of_fuel() {
    let sandbox = sandbox(FUEL);
    let mut policy = open(&sandbox, &cdq(LOOP, ""));
    assert_eq!(ask(&mut *policy, 1).unwrap_err(), Fault::Deadline);
}

#[test]
fn bulk_operations_cost_fuel_by_the_byte() {
    let sandbox = sandbox(FUEL);
    let fill = "(loop $again (memory.fill (i32.const 4096) (i32.const 0) (i32.const 65536)) (br $again)) (unreachable)";
    let mut policy = open(&sandbox, &cdq(fill, ""));
    let begun = Instant::now();
    assert_eq!(ask(&mut *policy, 1).unwrap_err(), Fault::Deadline);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_loop_at_start_is_refused_at_load() {
    let sandbox = sandbox(FUEL);
    let bytes = cdq(HONEST, "(func $start (loop $again (br $again))) (start $start)");
    assert!(matches!(load(&sandbox, &bytes), Err(LoadError::Start(_))));
}

#[test]
fn traps_are_named_and_the_next_instance_serves() {
    let sandbox = sandbox(FUEL);
    let traps = [
        ("(unreachable)", "unreachable"),
        ("(i32.load (i32.const -4))", "out of bounds"),
        ("(i32.div_u (i32.const 1) (global.get $count))", "divide by zero"),
    ];
    for (body, words) in traps {
        let component = load(&sandbox, &cdq(body, "")).unwrap();
        let mut factory = component.factory();
        // More often than there are places in the pool: each must come back.
        for _ in 0..12 {
            let mut policy = factory.open(&opening(), None).unwrap();
            let Err(Fault::Trap(text)) = ask(&mut *policy, 1) else { panic!("{body} did not trap") };
            assert!(text.contains(words), "{text}");
        }
    }
}

#[test]
fn an_instance_that_trapped_is_not_entered_again() {
    let sandbox = sandbox(FUEL);
    let body = format!("(if (i32.eqz (local.get $length)) (then (unreachable))) {HONEST}");
    let mut policy = open(&sandbox, &cdq(&body, ""));
    assert_eq!(ask(&mut *policy, 1).unwrap().consumed, 1);
    assert!(matches!(ask(&mut *policy, 0), Err(Fault::Trap(_))));
    assert!(ask(&mut *policy, 1).is_err());
}

#[test]
fn memory_ends_at_its_limit() {
    let sandbox = sandbox(FUEL);
    // As an allocator does it: grow, and trap when that fails.
    let body = "(loop $again (br_if $again (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) (unreachable)";
    assert_eq!(ask(&mut *open(&sandbox, &cdq(body, "")), 1).unwrap_err(), Fault::Memory);
    // One that copes with it is not at fault, and has had 16 MiB of 64 KiB pages.
    let body = "(loop $again (br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
        (call $answer (i32.const 0) (i32.const 0) (memory.size))";
    let mut policy = open(&sandbox, &cdq(body, ""));
    assert_eq!(ask(&mut *policy, 1).unwrap().consumed, 256);
    assert_eq!(ask(&mut *policy, 1).unwrap().consumed, 256);
}

#[test]
fn a_component_that_begins_too_large_is_refused() {
    let limits = Limits { memory_bytes: 65536, instances: 1, ..Limits::default() };
    let sandbox = Sandbox::new(&SandboxConfig { budget: FUEL, limits, cache: None, compiled: None }).unwrap();
    let error = load(&sandbox, &cdq(HONEST, "")).unwrap_err();
    assert!(matches!(error, LoadError::Compile(_)), "{error}");
    assert!(error.to_string().contains("memory"), "{error}");
}

#[test]
fn deep_recursion_traps() {
    let sandbox = sandbox(Budget::Fuel { call_units: u64::MAX / 2, open_units: u64::MAX / 2 });
    let more = "(func $deep (param i32) (result i32)
        (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))";
    let mut policy = open(&sandbox, &cdq("(call $deep (i32.const 0))", more));
    let Err(Fault::Trap(text)) = ask(&mut *policy, 1) else { panic!("no trap") };
    assert!(text.contains("stack"), "{text}");
}

#[test]
fn ranges_outside_the_namespace_are_caught_by_the_check() {
    let sandbox = sandbox(FUEL);
    // One range: slba 2^40, 8 blocks, nsid 1.
    let body = "(i64.store (i32.const 512) (i64.const 1099511627776)) (i32.store (i32.const 520) (i32.const 8))
        (i32.store (i32.const 524) (i32.const 1)) (call $answer (i32.const 512) (i32.const 16) (i32.const 1))";
    let mut policy = open(&sandbox, &cdq(body, ""));
    let answer = ask(&mut *policy, 1).unwrap();
    assert_eq!(answer.ranges.len(), 16);
    let (opening, request) = (opening(), request(1));
    assert!(matches!(Cdq::check(&opening.setup, &opening.extra, &request, &answer), Err(Fault::Malformed(_))));
}

#[test]
fn lists_longer_than_their_bound_are_refused() {
    let sandbox = sandbox(FUEL);
    // For one entry four ranges are allowed: 64 bytes.
    let exact = "(call $answer (i32.const 4096) (i32.const 64) (i32.const 1))";
    assert_eq!(ask(&mut *open(&sandbox, &cdq(exact, "")), 1).unwrap().ranges.len(), 64);
    let longer = "(call $answer (i32.const 4096) (i32.const 65) (i32.const 1))";
    let Err(Fault::Malformed(text)) = ask(&mut *open(&sandbox, &cdq(longer, "")), 1) else { panic!("65 bytes passed") };
    assert!(text.contains("65"), "{text}");
    // Most of a memory of 15 MiB: refused before anything is allocated for it.
    let huge = "(drop (memory.grow (i32.const 230))) (call $answer (i32.const 4096) (i32.const 15000000) (i32.const 1))";
    let Err(Fault::Malformed(text)) = ask(&mut *open(&sandbox, &cdq(huge, "")), 1) else { panic!("15 MB passed") };
    assert!(text.contains("too much data"), "{text}");
}

#[test]
fn pointers_out_of_memory_are_malformed() {
    let sandbox = sandbox(FUEL);
    for body in [
        "(call $answer (i32.const -16) (i32.const 64) (i32.const 1))",
        "(call $answer (i32.const 64) (i32.const -1) (i32.const 1))",
        "(i32.const -8)",
        "(i32.const 3)",
    ] {
        let fault = ask(&mut *open(&sandbox, &cdq(body, "")), 1).unwrap_err();
        assert!(matches!(fault, Fault::Malformed(_)), "{body}: {fault}");
    }
}

/// What the log received.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_flood_of_log_lines_is_held_back() {
    let lines = Lines::default();
    let sink = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || sink.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let sandbox = sandbox(FUEL);
        let body = format!(
            "(local $i i32) (loop $again (call $log (i32.const 1) (i32.const 256) (i32.const 7))
              (local.set $i (i32.add (local.get $i) (i32.const 1))) (br_if $again (i32.lt_u (local.get $i) (i32.const 10000)))) {HONEST}"
        );
        let mut policy = open(&sandbox, &cdq(&body, ""));
        for _ in 0..3 {
            ask(&mut *policy, 1).unwrap();
        }
    });
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let count = text.matches("a line\\n").count();
    assert_eq!((count, text.lines().count()), (16, 16), "{text}");
}

#[test]
fn broken_log_calls_are_faults() {
    let sandbox = sandbox(FUEL);
    for call in [
        "(call $log (i32.const 9) (i32.const 256) (i32.const 7))",
        "(call $log (i32.const 1) (i32.const -2) (i32.const 7))",
        "(i32.store8 (i32.const 256) (i32.const 255)) (call $log (i32.const 1) (i32.const 256) (i32.const 7))",
    ] {
        let fault = ask(&mut *open(&sandbox, &cdq(&format!("{call} {HONEST}"), "")), 1).unwrap_err();
        assert!(matches!(fault, Fault::Malformed(_)), "{call}: {fault}");
    }
    // A long line is cut, not refused.
    let long = format!("(call $log (i32.const 1) (i32.const 4096) (i32.const 100000)) {HONEST}");
    ask(&mut *open(&sandbox, &cdq(&long, "")), 1).unwrap();
}

#[test]
fn the_pool_has_an_end() {
    let sandbox = sandbox(FUEL);
    let component = load(&sandbox, &cdq(HONEST, "")).unwrap();
    let mut factory = component.factory();
    let alive: Vec<_> = (0..4).map(|_| factory.open(&opening(), None).unwrap()).collect();
    let Err(fault) = factory.open(&opening(), None) else { panic!("a fifth of four") };
    assert!(fault.to_string().contains("pool"), "{fault}");
    drop(alive);
    assert!(factory.open(&opening(), None).is_ok());
}

#[test]
fn fuel_ends_at_the_same_instruction() {
    // It counts in a global, which the next call returns: what an interrupted call got done is seen in the memory it leaves.
    let body = "(loop $again (global.set $count (i32.add (global.get $count) (i32.const 1)))
        (call $log (i32.const 1) (i32.const 256) (i32.const 7))
        (br_if $again (i32.lt_u (global.get $count) (i32.const 20000))))
        (call $answer (i32.const 0) (i32.const 0) (global.get $count))";
    let bytes = cdq(body, "");
    let ends = |call_units| {
        let sandbox = sandbox(Budget::Fuel { call_units, open_units: 1_000_000 });
        ask(&mut *open(&sandbox, &bytes), 1).map(|answer| answer.consumed)
    };
    // The least fuel that is enough: by bisection, twice, in engines of their own.
    let least = || {
        let (mut short, mut enough) = (1_u64, 10_000_000_u64);
        while enough - short > 1 {
            let middle = short + (enough - short) / 2;
            if ends(middle).is_ok() { enough = middle } else { short = middle }
        }
        assert_eq!(ends(short), Err(Fault::Deadline));
        assert_eq!(ends(enough), Ok(20_000));
        enough
    };
    assert_eq!(least(), least());
}
