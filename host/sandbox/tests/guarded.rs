//! Components behind the guard: whatever one does, every call is answered, and the next instance carries on.

mod support;

use dray_policy::guard::{Guard, Limits};
use dray_policy::native::NativeFactory;
use dray_policy::role::{Cdq, Role};
use dray_policy::seam::{Exchange, Factory, Fault, Meter, Seat};
use support::{FUEL, HONEST, ask, cdq, load, opening, request, sandbox, with_state};

struct Still;

impl Meter for Still {
    fn now_ns(&self) -> u64 {
        0
    }
}

fn guard(bytes: &[u8]) -> Guard<Cdq> {
    let component = load(&sandbox(FUEL), bytes).unwrap();
    let native = Box::new(NativeFactory::<Cdq>::new());
    let mut opening = opening();
    opening.setup.settings.clear();
    let mut guard = Guard::new(Box::new(component.factory()), native, Box::new(Still), Limits::default());
    guard.open(opening);
    guard
}

fn asked(guard: &mut Guard<Cdq>, entries: usize) -> Box<Exchange<Cdq>> {
    guard.ask(Box::new(Exchange { request: request(entries), ..Exchange::default() }));
    let exchange = guard.poll().expect("the guard answers in place");
    let opening = opening();
    Cdq::check(&opening.setup, &opening.extra, &exchange.request, &exchange.answer).expect("a valid answer");
    exchange
}

#[test]
fn each_fault_falls_back_and_too_many_set_it_aside() {
    let outside = "(i64.store (i32.const 512) (i64.const 1099511627776)) (i32.store (i32.const 520) (i32.const 8))
        (i32.store (i32.const 524) (i32.const 1)) (call $answer (i32.const 512) (i32.const 16) (i32.const 1))";
    for (body, expected) in [
        ("(unreachable)", "trap"),
        ("(loop $again (br $again)) (unreachable)", "budget"),
        (outside, "malformed"),
        ("(call $answer (i32.const 0) (i32.const 0) (i32.const -1))", "malformed"),
    ] {
        let mut guard = guard(&cdq(body, ""));
        for call in 1..=20_u64 {
            let exchange = asked(&mut guard, 4);
            assert!(exchange.outcome.by_fallback, "{body}");
            if call == 1 {
                let fault = exchange.outcome.fault.as_ref().expect("a fault").to_string();
                assert!(fault.contains(expected), "{fault}");
            }
        }
        let stats = guard.stats();
        assert!(stats.set_aside, "{body}");
        assert_eq!((stats.calls, stats.fallbacks), (20, 20));
    }
}

#[test]
fn one_fault_costs_one_call() {
    // Traps on a batch of three entries, and on nothing else.
    let body = format!("(if (i32.eq (local.get $length) (i32.const 96)) (then (unreachable))) {HONEST}");
    let mut guard = guard(&cdq(&body, ""));
    let fallbacks: Vec<bool> = [1, 3, 2, 4].map(|entries| asked(&mut guard, entries).outcome.by_fallback).into();
    assert_eq!(fallbacks, [false, true, false, false]);
}

#[test]
fn state_goes_to_the_next_instance() {
    let take = "(global.set $count (i32.load8_u (local.get $bytes))) (i32.store8 (i32.const 32) (i32.const 0)) (i32.const 32)";
    let refuse = "(i32.store8 (i32.const 32) (i32.const 1)) (i32.store (i32.const 36) (i32.const 256))
        (i32.store (i32.const 40) (i32.const 6)) (global.set $count (i32.const 77)) (i32.const 32)";
    let sandbox = sandbox(FUEL);
    for (body, next) in [(take, 4), (refuse, 1), ("(unreachable)", 1), ("(i32.const -8)", 1)] {
        let component = load(&sandbox, &with_state(body)).unwrap();
        assert!(component.has_state());
        let mut factory = component.factory();
        let mut first = factory.open(&opening(), None).unwrap();
        for calls in 1..=3 {
            assert_eq!(ask(&mut *first, 8).unwrap().consumed, calls);
        }
        let saved = first.save().unwrap().expect("it keeps state");
        assert_eq!(saved, [3]);
        let mut second = factory.open(&opening(), Some(&saved)).unwrap();
        assert_eq!(ask(&mut *second, 8).unwrap().consumed, next, "{body}");
    }
}

#[test]
fn a_refusal_to_open_carries_its_reason() {
    let core = support::cdq_core(HONEST, "").replace(
        "(i32.store8 (i32.const 16) (i32.const 0))",
        "(i32.store8 (i32.const 16) (i32.const 1)) (i32.store (i32.const 20) (i32.const 256)) (i32.store (i32.const 24) (i32.const 6))",
    );
    let component = load(&sandbox(FUEL), &support::encode(support::WIT, "cdq-policy", &core)).unwrap();
    let Err(fault) = component.factory().open(&opening(), None) else { panic!("it opened") };
    assert_eq!(fault, Fault::Refused("a line".into()));
}
