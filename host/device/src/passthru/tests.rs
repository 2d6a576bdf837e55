//! Passthrough over a stand-in for the kernel that does what it must not, and over the kernel's own `/dev/null`, which takes
//! passthrough commands on newer kernels and answers each with 0.

use super::abi::{Channel, UringCommand};
use super::carrier::{Carrier, CarrierOptions, Ended, Entry};
use super::outcome::{HostFault, Outcome};
use super::ring::{Bounds, PassthruRing, Request, Ring};
use crate::command::SubmitError;
use crate::memory::{Arena, DmaBuffer, PAGE, Pages, Segment};
use crate::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zerocopy::FromBytes;

const BOUNDS: Bounds = Bounds { max_transfer: 64 << 10, max_pieces: 16 };
const OK: Outcome = Outcome::Answered { status: Status::SUCCESS, result: 0 };

#[derive(Default)]
struct State {
    queued: Vec<Entry>,
    taken: Vec<Entry>,
    ended: VecDeque<Ended>,
    /// Completions that come when somebody waits.
    late: VecDeque<Ended>,
    waits: u32,
    registers: bool,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.0.lock().expect("state"))
    }

    fn ring(&self, depth: u32) -> Ring<Self> {
        Ring::over(self.clone(), Channel::Io, depth, BOUNDS)
    }

    fn command(&self, at: usize) -> (Entry, UringCommand) {
        let entry = self.state(|state| state.taken[at]);
        (entry, UringCommand::read_from_bytes(&entry.command[..72]).expect("72 bytes"))
    }

    fn end(&self, at: usize, res: i32, result: u64) {
        self.state(|state| {
            let user_data = state.taken[at].user_data;
            state.ended.push_back(Ended { user_data, res, result });
        });
    }
}

impl Carrier for Fake {
    fn push(&mut self, entry: &Entry) -> bool {
        self.state(|state| state.queued.push(*entry));
        true
    }

    fn submit(&mut self) {
        self.state(|state| state.taken.append(&mut state.queued));
    }

    fn queued(&mut self) -> usize {
        self.state(|state| state.queued.len())
    }

    fn next(&mut self) -> Option<Ended> {
        self.state(|state| state.ended.pop_front())
    }

    fn wait(&mut self, _most: Option<Duration>) -> bool {
        self.state(|state| {
            state.waits += 1;
            let late = state.late.pop_front();
            state.ended.extend(late);
            late.is_some()
        })
    }

    fn options(&self) -> CarrierOptions {
        CarrierOptions { fixed: self.state(|state| state.registers), iopoll: false }
    }

    fn register(&mut self, _arena: &Arc<Arena>, _offset: usize, _len: usize) -> Option<u16> {
        self.state(|state| state.registers).then_some(3)
    }
}

fn memory(bytes: usize) -> DmaBuffer {
    DmaBuffer::allocate("passthru", bytes, Pages::Small).expect("memory")
}

fn read() -> UringCommand {
    UringCommand::of(&SubmissionEntry::read(1, 0, 1)).expect("a plain command")
}

fn send<C: Carrier>(ring: &mut Ring<C>, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
    ring.submit(Time(0), &Request { command: read(), data, metadata: None, tag })
}

fn polled<C: Carrier>(ring: &mut Ring<C>, now: Time) -> Vec<(u64, Outcome)> {
    let mut ended = Vec::new();
    let count = ring.poll(now, &mut |tag, outcome| ended.push((tag, outcome)));
    assert_eq!(count, ended.len());
    ended
}

#[test]
fn one_piece_goes_as_a_buffer_and_several_as_an_array() {
    let (fake, buffer) = (Fake::default(), memory(4 * PAGE));
    let mut ring = fake.ring(4);
    let part = |offset, len| buffer.part(offset, len).expect("part");
    let base = buffer.arena().address(0, 1) as u64;
    send(&mut ring, &[part(0, 512), part(512, 512)], 1).expect("behind each other");
    send(&mut ring, &[part(0, 512), part(PAGE, 1024)], 2).expect("apart");
    send(&mut ring, &[], 3).expect("no data");
    let metadata = Some(part(PAGE, 16));
    ring.submit(Time(0), &Request { command: read(), data: &[part(4, 8)], metadata, tag: 4 }).expect("metadata");
    assert_eq!((ring.free(), ring.in_flight(), fake.state(|state| state.taken.len())), (0, 4, 0), "not committed");
    ring.commit();
    let (entry, command) = fake.command(0);
    assert_eq!((entry.operation, command.addr, command.data_len), (Channel::Io.operation(false), base, 1024));
    let (entry, command) = fake.command(1);
    assert_eq!((entry.operation, command.data_len), (Channel::Io.operation(true), 2));
    let (_, command) = fake.command(2);
    assert_eq!((command.addr, command.data_len, command.opcode, command.nsid), (0, 0, 2, 1));
    let (_, command) = fake.command(3);
    assert_eq!((command.addr, command.metadata, command.metadata_len), (base + 4, base + PAGE as u64, 16));
    (0..4).for_each(|at| fake.end(at, 0, 0));
    assert_eq!(polled(&mut ring, Time(1)).len(), 4);
}

#[test]
fn what_cannot_be_described_is_refused_with_nothing_done() {
    let (fake, buffer) = (Fake::default(), memory(32 * PAGE));
    let mut ring = fake.ring(1);
    let part = |offset, len| buffer.part(offset, len).expect("part");
    for bad in [vec![part(2, 512)], vec![part(0, 510)], vec![part(0, 0)], vec![part(0, 65_540)], vec![part(0, 4); 17]] {
        assert_eq!(send(&mut ring, &bad, 1), Err(SubmitError::BadData));
    }
    let metadata = Some(part(1, 8));
    assert_eq!(ring.submit(Time(0), &Request { command: read(), data: &[], metadata, tag: 1 }), Err(SubmitError::BadData));
    send(&mut ring, &[part(0, 64 << 10)], 1).expect("as much as fits");
    assert_eq!(send(&mut ring, &[part(0, 4)], 2), Err(SubmitError::Full));
    ring.commit();
    fake.end(0, 0, 0);
    assert_eq!(polled(&mut ring, Time(1)), [(1, OK)]);
    assert_eq!(fake.state(|state| state.taken.len()), 1);
}

#[test]
fn statuses_and_results_come_through() {
    let fake = Fake::default();
    let mut ring = fake.ring(3);
    (1..=3).for_each(|tag| send(&mut ring, &[], tag).expect("room"));
    ring.commit();
    fake.end(2, 0, u64::MAX);
    fake.end(0, 0x4001, 0);
    fake.end(1, -22, 9);
    let ended = polled(&mut ring, Time(1));
    assert_eq!(ended[0], (3, Outcome::Answered { status: Status::SUCCESS, result: u64::MAX }));
    assert_eq!(ended[1], (1, Outcome::Answered { status: Status::INVALID_OPCODE.with_dnr(), result: 0 }));
    assert!(matches!(ended[2], (2, Outcome::NotSent(HostFault::Malformed(_)))));
    assert_eq!((ring.fault(), ring.free()), (None, 3), "a refusal is no end of the queue");
}

#[test]
fn a_device_that_goes_ends_the_queue_and_each_command_once() {
    let (fake, buffer) = (Fake::default(), memory(PAGE));
    let mut ring = fake.ring(4);
    (1..=3).for_each(|tag| send(&mut ring, &[buffer.segment()], tag).expect("room"));
    ring.commit();
    fake.end(1, -19, 0);
    assert!(matches!(polled(&mut ring, Time(1))[..], [(2, Outcome::Unknown(HostFault::Gone(_)))]));
    assert_eq!(send(&mut ring, &[], 4), Err(SubmitError::Dead));
    assert_eq!((ring.free(), ring.in_flight()), (0, 2));
    // One was answered before the device went.
    fake.end(0, 0, 0);
    fake.end(2, -4, 0);
    let ended = polled(&mut ring, Time(1));
    assert_eq!(ended[0], (1, OK));
    assert!(matches!(ended[1], (3, Outcome::Unknown(HostFault::Cancelled(_)))));
    assert!(matches!(ring.fault(), Some(HostFault::Gone(_))), "the first reason stays");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn completions_that_nobody_sent_for_end_the_queue_and_nothing_else() {
    for stray in [0u64, 7, 1 << 32, u64::MAX, 1 << 32 | 1] {
        let (fake, buffer) = (Fake::default(), memory(PAGE));
        let mut ring = fake.ring(2);
        if stray != 1 << 32 {
            send(&mut ring, &[buffer.segment()], 1).expect("room");
            ring.commit();
        }
        fake.state(|state| state.ended.push_back(Ended { user_data: stray, res: 0, result: 0 }));
        let ended = polled(&mut ring, Time(1));
        assert!(ended.is_empty(), "{stray:#x}");
        if stray != 1 << 32 {
            assert_eq!((ring.fault(), ring.in_flight()), (Some(HostFault::Nonsense), 1), "{stray:#x}");
            fake.end(0, 0, 0);
            fake.end(0, 0, 0);
            assert_eq!(polled(&mut ring, Time(1)), [(1, OK)], "twice is once");
        }
    }
}

#[test]
fn a_command_that_never_comes_back_is_reported_and_its_memory_held() {
    let (fake, buffer) = (Fake::default(), memory(PAGE));
    let mut ring = fake.ring(2);
    let command = UringCommand { timeout_ms: 1000, ..read() };
    ring.submit(Time(0), &Request { command, data: &[buffer.segment()], metadata: None, tag: 9 }).expect("room");
    ring.commit();
    assert!(polled(&mut ring, Time(0).after_ms(132_900)).is_empty());
    assert_eq!(polled(&mut ring, Time(0).after_ms(134_000)), [(9, Outcome::Unknown(HostFault::Overdue))]);
    assert_eq!((ring.fault(), ring.in_flight(), Arc::strong_count(buffer.arena())), (Some(HostFault::Overdue), 0, 2));
    fake.end(0, 0, 0);
    assert!(polled(&mut ring, Time(0).after_ms(135_000)).is_empty(), "its outcome was told");
    assert_eq!(Arc::strong_count(buffer.arena()), 1);
}

#[test]
fn registered_memory_is_used_where_the_kernel_takes_it() {
    let (fake, buffer) = (Fake::default(), memory(4 * PAGE));
    fake.state(|state| state.registers = true);
    let mut ring = fake.ring(4);
    assert!(ring.register(buffer.arena(), 0, 2 * PAGE) && ring.register(buffer.arena(), PAGE, PAGE), "the second lies in it");
    let part = |offset, len| buffer.part(offset, len).expect("part");
    send(&mut ring, &[part(PAGE, PAGE)], 1).expect("room");
    send(&mut ring, &[part(PAGE, 2 * PAGE)], 2).expect("partly outside");
    send(&mut ring, &[part(0, 512), part(PAGE, 512)], 3).expect("an array");
    ring.commit();
    assert_eq!([0, 1, 2].map(|at| fake.command(at).0.fixed), [Some(3), None, None]);
    fake.end(0, 0, 0);
    assert_eq!(polled(&mut ring, Time(1)), [(1, OK)]);
    assert!(ring.options().fixed);
    (1..3).for_each(|at| fake.end(at, 0, 0));
    polled(&mut ring, Time(1));
}

#[test]
fn registered_memory_that_the_kernel_refuses_is_sent_plainly() {
    let (fake, buffer) = (Fake::default(), memory(PAGE));
    fake.state(|state| state.registers = true);
    let mut ring = fake.ring(2);
    assert!(ring.register(buffer.arena(), 0, PAGE));
    // Refused with and without: it was not the registered buffer.
    send(&mut ring, &[buffer.segment()], 1).expect("room");
    ring.commit();
    fake.end(0, -22, 0);
    assert!(polled(&mut ring, Time(1)).is_empty());
    ring.commit();
    assert_eq!(fake.command(1).0.fixed, None);
    fake.end(1, -22, 0);
    assert!(matches!(polled(&mut ring, Time(1))[..], [(1, Outcome::NotSent(_))]));
    assert!(ring.options().fixed);
    // Refused with, taken without: it was.
    send(&mut ring, &[buffer.segment()], 2).expect("room");
    ring.commit();
    assert_eq!(fake.command(2).0.fixed, Some(3));
    fake.end(2, -22, 0);
    assert!(polled(&mut ring, Time(1)).is_empty());
    ring.commit();
    fake.end(3, 0, 0);
    assert_eq!(polled(&mut ring, Time(1)), [(2, OK)]);
    assert!(!ring.options().fixed);
    send(&mut ring, &[buffer.segment()], 3).expect("room");
    ring.commit();
    assert_eq!(fake.command(4).0.fixed, None);
    fake.end(4, 0, 0);
    polled(&mut ring, Time(1));
}

#[test]
fn dropping_waits_for_what_the_kernel_has_and_sends_nothing_more() {
    let (fake, buffer) = (Fake::default(), memory(PAGE));
    let mut ring = fake.ring(4);
    (1..=2).for_each(|tag| send(&mut ring, &[buffer.segment()], tag).expect("room"));
    ring.commit();
    send(&mut ring, &[buffer.segment()], 3).expect("room");
    fake.state(|state| {
        let late = [1, 0].map(|at| Ended { user_data: state.taken[at].user_data, res: 0, result: 0 });
        state.late.extend(late);
    });
    drop(ring);
    assert_eq!(fake.state(|state| (state.waits, state.taken.len(), state.late.len())), (2, 2, 0));
    assert_eq!(Arc::strong_count(buffer.arena()), 1);
}

#[test]
fn memory_is_leaked_rather_than_freed_under_the_device() {
    let (fake, buffer) = (Fake::default(), memory(PAGE));
    let mut ring = fake.ring(1);
    send(&mut ring, &[buffer.segment()], 1).expect("room");
    ring.commit();
    drop(ring);
    assert_eq!((fake.state(|state| state.waits), Arc::strong_count(buffer.arena())), (1, 2));
}

#[derive(Clone, Debug)]
enum Step {
    Send,
    Commit,
    End(usize, i32),
    Twice(usize),
    Stray(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Send),
        2 => Just(Step::Commit),
        4 => (any::<prop::sample::Index>(), prop_oneof![3 => Just(0), 1 => any::<i32>()]).prop_map(|(at, res)| Step::End(at.index(64), res)),
        1 => any::<prop::sample::Index>().prop_map(|at| Step::Twice(at.index(64))),
        1 => any::<u64>().prop_map(Step::Stray),
    ]
}

proptest! {
    #[test]
    fn every_command_comes_back_once_whatever_the_kernel_says(steps in prop::collection::vec(step(), 1..120)) {
        let fake = Fake::default();
        let mut ring = fake.ring(8);
        // Tags that are under way, and entries that were answered.
        let (mut waiting, mut tags, mut open) = (BTreeMap::new(), 0u64, Vec::<usize>::new());
        let mut seen = 0;
        for step in steps {
            match step {
                Step::Send => {
                    let before = ring.free();
                    match send(&mut ring, &[], tags) {
                        Ok(()) => {
                            prop_assert!(before > 0);
                            waiting.insert(tags, ());
                            tags += 1;
                        }
                        Err(SubmitError::Dead) => prop_assert!(ring.fault().is_some()),
                        Err(error) => prop_assert_eq!((error, before), (SubmitError::Full, 0)),
                    }
                }
                Step::Commit => ring.commit(),
                Step::End(at, res) if !open.is_empty() => fake.end(open.swap_remove(at % open.len()), res, 0),
                Step::Twice(at) => {
                    let taken = fake.state(|state| state.taken.len());
                    if taken > 0 && !open.contains(&(at % taken)) {
                        fake.end(at % taken, 0, 0);
                    }
                }
                Step::Stray(user_data) => fake.state(|state| state.ended.push_back(Ended { user_data, res: 0, result: 0 })),
                Step::End(..) => {}
            }
            for (tag, _) in polled(&mut ring, Time(1)) {
                prop_assert!(waiting.remove(&tag).is_some(), "tag {} came twice or was never sent", tag);
            }
            let taken = fake.state(|state| state.taken.len());
            open.extend(seen..taken);
            seen = taken;
            prop_assert_eq!(ring.in_flight(), waiting.len());
        }
        // The kernel gives everything back.
        ring.commit();
        open.extend(seen..fake.state(|state| state.taken.len()));
        open.into_iter().for_each(|at| fake.end(at, 0, 0));
        for (tag, _) in polled(&mut ring, Time(1)) {
            prop_assert!(waiting.remove(&tag).is_some());
        }
        prop_assert!(waiting.is_empty());
    }
}

/// A ring to `/dev/null`, and whether the kernel lets it take passthrough commands.
fn null(depth: u32, wanted: CarrierOptions) -> (PassthruRing, bool) {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("null");
    let mut ring = PassthruRing::open(device.into(), Channel::Io, depth, BOUNDS, wanted).expect("a ring");
    send(&mut ring, &[], 0).expect("room");
    let takes = match settled(&mut ring, 1)[..] {
        [(0, Outcome::Answered { status, .. })] => !status.is_error(),
        // Older kernels.
        [(0, Outcome::NotSent(HostFault::Unsupported(_)))] => false,
        ref other => panic!("{other:?}"),
    };
    (ring, takes)
}

fn settled(ring: &mut PassthruRing, count: usize) -> Vec<(u64, Outcome)> {
    let mut ended = Vec::new();
    while ended.len() < count {
        assert!(ring.wait(Duration::from_secs(5)), "waiting works");
        ended.extend(polled(ring, Time(1)));
    }
    ended
}

#[test]
fn the_kernel_takes_entries_of_128_bytes_and_gives_32() {
    let (mut ring, takes) = null(8, CarrierOptions::default());
    eprintln!("/dev/null takes passthrough commands: {takes}");
    let buffer = memory(4 * PAGE);
    let part = |offset, len| buffer.part(offset, len).expect("part");
    for round in 0..50 {
        for tag in 0..8 {
            let pieces = [part(0, 512), part(PAGE, 512)];
            send(&mut ring, &pieces[..(tag % 3) as usize], round * 8 + tag).expect("room");
        }
        assert_eq!(send(&mut ring, &[], 0), Err(SubmitError::Full));
        ring.commit();
        let mut tags: Vec<_> = settled(&mut ring, 8)
            .into_iter()
            .map(|(tag, outcome)| {
                assert_eq!(matches!(outcome, Outcome::Answered { .. }), takes, "{outcome:?}");
                tag
            })
            .collect();
        tags.sort_unstable();
        assert!(tags.into_iter().eq(round * 8..round * 8 + 8));
    }
    assert_eq!(Arc::strong_count(buffer.arena()), 1);
    assert!(ring.waker().is_some());
}

#[test]
fn memory_is_registered_with_the_kernel_and_held_until_the_ring_goes() {
    let (mut ring, takes) = null(4, CarrierOptions { fixed: true, iopoll: false });
    let buffer = memory(4 * PAGE);
    if ring.options().fixed {
        assert!(ring.register(buffer.arena(), 0, 4 * PAGE));
        assert!(!ring.register(buffer.arena(), PAGE, 4 * PAGE), "outside the arena");
        send(&mut ring, &[buffer.segment()], 5).expect("room");
        let ended = settled(&mut ring, 1);
        assert_eq!(ended[0].0, 5);
        assert_eq!(matches!(ended[0].1, Outcome::Answered { .. }), takes);
        assert!(Arc::strong_count(buffer.arena()) > 1);
    }
    drop(ring);
    assert_eq!(Arc::strong_count(buffer.arena()), 1);
}

#[test]
fn a_ring_dropped_with_commands_under_way_lets_memory_go_afterwards() {
    let buffer = memory(PAGE);
    for committed in [false, true] {
        let (mut ring, _) = null(4, CarrierOptions::default());
        (0..4).for_each(|tag| send(&mut ring, &[buffer.segment()], tag).expect("room"));
        if committed {
            ring.commit();
        }
        drop(ring);
        assert_eq!(Arc::strong_count(buffer.arena()), 1, "committed: {committed}");
    }
}
