use super::*;
use crate::native::NativeFactory;
use crate::packed::Range;
use crate::role::{Cdq, CdqAnswer, CdqQueue, CdqRequest};
use crate::seam::{NamespaceInfo, Setup};
use std::sync::{Arc, Mutex};

/// What the scripted policy does in its next calls; then it behaves.
#[derive(Clone, Debug, PartialEq)]
enum Act {
    Trap,
    TooMany,
    Outside,
    Omit,
}

/// Shared between the test and all instances.
#[derive(Default)]
struct Script {
    acts: Vec<Act>,
    opens: u32,
    refuse_open: bool,
    loaded: Vec<Option<Vec<u8>>>,
    fault_on_state: bool,
    dropped: u32,
}

struct Scripted {
    script: Arc<Mutex<Script>>,
    state: u8,
    poisoned: bool,
}

struct ScriptedFactory(Identity, Arc<Mutex<Script>>);

impl Drop for Scripted {
    fn drop(&mut self) {
        self.script.lock().unwrap().dropped += 1;
    }
}

impl Policy<Cdq> for Scripted {
    fn call(&mut self, request: &CdqRequest, answer: &mut CdqAnswer) -> Result<(), Fault> {
        assert!(answer.ranges.is_empty() && answer.consumed == 0, "an answer comes in cleared");
        let mut script = self.script.lock().unwrap();
        if self.poisoned {
            return Err(Fault::Trap("bad state".into()));
        }
        self.state += 1;
        let shown = (request.entries.len() / 32) as u32;
        let act = if script.acts.is_empty() { None } else { Some(script.acts.remove(0)) };
        answer.consumed = shown;
        match act {
            Some(Act::Trap) => {
                answer.ranges.resize(160, 0xff);
                answer.marks.everything = true;
                return Err(Fault::Trap("unreachable".into()));
            }
            Some(Act::TooMany) => answer.consumed = shown + 1,
            Some(Act::Outside) => Range { slba: 1000, blocks: 1, deallocated: false, nsid: 1 }.push(&mut answer.ranges),
            Some(Act::Omit) => {}
            None => Range { slba: 0, blocks: 0, deallocated: false, nsid: 1 }.push(&mut answer.ranges),
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        Ok(Some(vec![self.state]))
    }
}

impl Factory<Cdq> for ScriptedFactory {
    fn identity(&self) -> &Identity {
        &self.0
    }

    fn open(&mut self, _: &Opening<Cdq>, saved: Option<&[u8]>) -> Result<Box<dyn Policy<Cdq>>, Fault> {
        let mut script = self.1.lock().unwrap();
        script.opens += 1;
        script.loaded.push(saved.map(<[u8]>::to_vec));
        if script.refuse_open {
            return Err(Fault::Refused("no".into()));
        }
        let poisoned = script.fault_on_state && saved.is_some();
        Ok(Box::new(Scripted { script: self.1.clone(), state: saved.map_or(0, |bytes| bytes[0]), poisoned }))
    }
}

struct Counting(Mutex<u64>);

impl Meter for Counting {
    fn now_ns(&self) -> u64 {
        let mut now = self.0.lock().unwrap();
        *now += 10;
        *now
    }
}

fn scripted(name: &str) -> (Box<ScriptedFactory>, Arc<Mutex<Script>>) {
    let script = Arc::new(Mutex::new(Script::default()));
    let identity = Identity { component: name.into(), sha256: "00".into() };
    (Box::new(ScriptedFactory(identity, script.clone())), script)
}

fn opening(settings: &[(&str, &str)]) -> Opening<Cdq> {
    let setup = Setup {
        migration: 1,
        seed: 1,
        now_us: 0,
        namespaces: vec![NamespaceInfo { nsid: 1, blocks: 100, block_bytes: 512 }],
        regions: 1,
        region_bytes: 32,
        settings: settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    };
    Opening { setup, extra: CdqQueue { id: 0, kind: 0, cntlid: 1, slots: 64, entry_bytes: 32, phase_byte: 31, phase_mask: 1 } }
}

fn guard(limits: Limits) -> (Guard<Cdq>, Arc<Mutex<Script>>) {
    let (factory, script) = scripted("scripted.wasm");
    let fallback = Box::new(NativeFactory::<Cdq>::new());
    let mut guard = Guard::new(factory, fallback, Box::new(Counting(Mutex::new(0))), limits);
    guard.open(opening(&[("of-the-component", "1")]));
    (guard, script)
}

/// Asks about one entry, LBA 3 of namespace 1.
fn ask(guard: &mut Guard<Cdq>) -> Box<Exchange<Cdq>> {
    let mut exchange = Box::<Exchange<Cdq>>::default();
    exchange.request.entries = vec![0; 32];
    exchange.request.entries[0] = 1;
    exchange.request.entries[8] = 3;
    guard.ask(exchange);
    let exchange = guard.poll().expect("a guard answers in place");
    assert!(guard.poll().is_none());
    let opening = opening(&[]);
    assert_eq!(Cdq::check(&opening.setup, &opening.extra, &exchange.request, &exchange.answer), Ok(()));
    exchange
}

#[test]
fn a_good_answer_passes() {
    let (mut guard, _) = guard(Limits::default());
    let exchange = ask(&mut guard);
    assert_eq!(exchange.outcome, Outcome { fault: None, by_fallback: false, took_ns: 10 });
    let stats = guard.stats();
    assert_eq!((stats.calls, stats.items, stats.busy_ns, stats.faults, stats.fallbacks), (1, 1, 10, 0, 0));
}

#[test]
fn each_fault_is_answered_by_the_native_policy() {
    let (mut guard, script) = guard(Limits::default());
    for act in [Act::Trap, Act::TooMany, Act::Outside] {
        script.lock().unwrap().acts = vec![act.clone()];
        let opens = script.lock().unwrap().opens;
        let exchange = ask(&mut guard);
        assert!(exchange.outcome.by_fallback && exchange.outcome.fault.is_some(), "{act:?}");
        assert!(!exchange.answer.marks.everything, "nothing of the faulty answer is left");
        assert_eq!(crate::packed::ranges(&exchange.answer.ranges).next().map(|range| (range.slba, range.blocks)), Some((3, 1)));
        assert_eq!(script.lock().unwrap().opens, opens + 1, "a new instance after the fault");
        assert!(!ask(&mut guard).outcome.by_fallback);
    }
    let stats = guard.stats();
    assert_eq!((stats.calls, stats.faults, stats.fallbacks, stats.set_aside), (6, 3, 3, false));
    assert_eq!(script.lock().unwrap().dropped, 3);
    assert!(stats.last_fault.unwrap().contains("leaves namespace"));
}

#[test]
fn too_many_faults_set_it_aside_until_the_next_migration() {
    let (mut guard, script) = guard(Limits { max_faults: 3, ..Limits::default() });
    script.lock().unwrap().acts = vec![Act::Trap; 50];
    for _ in 0..10 {
        assert!(ask(&mut guard).outcome.by_fallback);
    }
    let stats = guard.stats();
    assert_eq!((stats.faults, stats.fallbacks, stats.set_aside), (3, 10, true));
    assert_eq!((script.lock().unwrap().opens, guard.identity().component.as_str()), (3, "native:cdq"));
    script.lock().unwrap().acts.clear();
    guard.open(opening(&[]));
    assert!(!ask(&mut guard).outcome.by_fallback);
}

#[test]
fn one_that_never_opens_is_set_aside_too() {
    let (factory, script) = scripted("shut.wasm");
    script.lock().unwrap().refuse_open = true;
    let fallback = Box::new(NativeFactory::<Cdq>::new());
    let limits = Limits { max_faults: 4, ..Limits::default() };
    let mut guard = Guard::new(factory, fallback, Box::new(Counting(Mutex::new(0))), limits);
    guard.open(opening(&[]));
    for _ in 0..10 {
        assert!(ask(&mut guard).outcome.by_fallback);
    }
    assert!(guard.stats().set_aside && script.lock().unwrap().opens == 4);
}

#[test]
fn a_new_instance_gets_the_last_saved_state() {
    let (mut guard, script) = guard(Limits { save_every: 2, ..Limits::default() });
    (0..5).for_each(|_| drop(ask(&mut guard)));
    script.lock().unwrap().acts = vec![Act::Trap];
    ask(&mut guard);
    assert_eq!(script.lock().unwrap().loaded, [None, Some(vec![4])]);
}

#[test]
fn state_that_faults_at_once_is_forgotten() {
    let (mut guard, script) = guard(Limits { save_every: 1, ..Limits::default() });
    ask(&mut guard);
    script.lock().unwrap().fault_on_state = true;
    script.lock().unwrap().acts = vec![Act::Trap];
    assert!(ask(&mut guard).outcome.by_fallback);
    assert!(ask(&mut guard).outcome.by_fallback, "the state is what faults");
    assert!(!ask(&mut guard).outcome.by_fallback, "without it all is well");
    assert_eq!(script.lock().unwrap().loaded, [None, Some(vec![1]), None]);
}

#[test]
fn asked_before_it_was_opened_it_answers_all_the_same() {
    let (factory, _) = scripted("early.wasm");
    let fallback = Box::new(NativeFactory::<Cdq>::new());
    let mut guard = Guard::new(factory, fallback, Box::new(Counting(Mutex::new(0))), Limits::default());
    let exchange = ask(&mut guard);
    assert!(exchange.outcome.fault.is_some() && exchange.answer.consumed == 0);
    assert_eq!(guard.trial().unwrap_err(), SwapRefused::NotOpen);
}

#[test]
fn a_new_version_takes_over_with_the_state_of_this_moment() {
    let (mut guard, _) = guard(Limits::default());
    (0..3).for_each(|_| drop(ask(&mut guard)));
    let (new, script) = scripted("new.wasm");
    guard.swap(new).unwrap();
    assert_eq!(script.lock().unwrap().loaded, [None, Some(vec![3])], "one on trial, one that serves");
    assert_eq!(guard.identity().component, "new.wasm");
    assert!(!ask(&mut guard).outcome.by_fallback);
}

#[test]
fn a_new_version_that_faults_or_omits_does_not_take_over() {
    let (mut guard, old) = guard(Limits::default());
    ask(&mut guard);
    for act in [Act::Trap, Act::TooMany, Act::Outside, Act::Omit] {
        let (new, script) = scripted("new.wasm");
        script.lock().unwrap().acts = vec![act.clone()];
        let refused = guard.swap(new).unwrap_err();
        assert_eq!(matches!(refused, SwapRefused::Omission(_)), act == Act::Omit, "{refused}");
        assert_eq!(guard.identity().component, "scripted.wasm");
    }
    let (new, script) = scripted("new.wasm");
    script.lock().unwrap().refuse_open = true;
    assert!(matches!(guard.swap(new), Err(SwapRefused::Fault(_))));
    assert!(!ask(&mut guard).outcome.by_fallback);
    assert_eq!((old.lock().unwrap().opens, guard.stats().faults), (1, 0), "the old one never noticed");
}

#[test]
fn a_swap_brings_back_a_seat_whose_policy_was_set_aside() {
    let (mut guard, script) = guard(Limits { max_faults: 1, ..Limits::default() });
    script.lock().unwrap().acts = vec![Act::Trap];
    ask(&mut guard);
    assert!(guard.stats().set_aside);
    guard.swap(scripted("fixed.wasm").0).unwrap();
    assert!(!ask(&mut guard).outcome.by_fallback && !guard.stats().set_aside);
}

#[test]
fn a_trial_does_not_outlive_its_migration_or_break_into_a_call() {
    let (mut guard, _) = guard(Limits::default());
    let trial = guard.trial().unwrap();
    let candidate = trial.run(scripted("new.wasm").0).unwrap();
    let mut other = opening(&[]);
    other.setup.migration = 2;
    guard.open(other);
    assert_eq!(guard.take_over(candidate), Err(SwapRefused::Stale));
    let candidate = guard.trial().unwrap().run(scripted("new.wasm").0).unwrap();
    guard.ask(Box::default());
    assert_eq!(guard.take_over(candidate), Err(SwapRefused::Busy));
}
