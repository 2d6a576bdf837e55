//! Queues of a stand-in for the kernel, which behaves as the proposals say, or worse.

use super::*;
use crate::cdq::CdqFormat;
use dray_device::kernel_cdq::{EntryReader, ReadQueue};
use dray_device::memory::DmaBuffer;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

const SLOTS: u32 = 8;
const CONFIG: CdqConfig = CdqConfig { kind: 0, cntlid: 5, slots: SLOTS, format: CdqFormat::UDMQ, arm_trigger: true };
const KINDS: [KernelCdqKind; 2] = [KernelCdqKind::ReadDescriptor, KernelCdqKind::OwnMemory];

/// How the kernel answers a read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reads {
    #[default]
    AsProposed,
    /// The return value leaves out what was copied behind the ring's end.
    WithoutTheSecondPart,
    /// At most that many entries.
    Short(usize),
    /// A part of an entry more than there is.
    APart,
    /// More bytes than there was room for.
    TooMuch,
    /// Entries of the pass before.
    OldPhase,
    /// One entry more than was copied.
    OneMore,
    Fails(i32),
}

#[derive(Default)]
struct State {
    /// The controller: entries posted and not given back, the place of the next one.
    pending: VecDeque<u32>,
    tail: u64,
    reads: Reads,
    memory: Option<DmaBuffer>,
    line: Option<EventLine>,
    slots: Option<u32>,
    create: Option<i32>,
    delete: Option<i32>,
    deleted: u32,
    closed: u32,
    /// Set Features that came, their answers, and whether they are held back.
    told: Vec<SubmissionEntry>,
    answers: VecDeque<(Ticket, Completion)>,
    hold: bool,
    status: Status,
    unknown: bool,
    full: bool,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

fn entry(number: u32, place: u64) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[..4].copy_from_slice(&number.to_le_bytes());
    entry[31] = u8::from((place / u64::from(SLOTS)).is_multiple_of(2));
    entry
}

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("state")
    }

    /// Posts an entry if there is a slot.
    fn post(&self, number: u32) -> bool {
        let mut state = self.state();
        if state.pending.len() as u32 >= SLOTS - 1 {
            return false;
        }
        let place = state.tail;
        if let Some(memory) = &state.memory {
            let at = memory.offset() + (place % u64::from(SLOTS)) as usize * 32;
            let bytes = entry(number, place);
            memory.arena().write(at, &bytes[..31]);
            memory.arena().store8(at + 31, bytes[31], Ordering::Release);
        }
        state.pending.push_back(number);
        state.tail += 1;
        true
    }

    fn owner(&self, kind: KernelCdqKind) -> KernelCdqOwner {
        KernelCdqOwner::create(Box::new(self.clone()), kind, CONFIG, KernelCdqOptions::default()).expect("a queue")
    }
}

impl CdqKernel for Fake {
    fn create_read(&mut self, request: &CdqRequest) -> io::Result<ReadQueue> {
        let state = self.state();
        if let Some(errno) = state.create {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let slots = state.slots.unwrap_or(request.slots);
        Ok(ReadQueue { id: 7, slots, entry_bytes: request.entry_bytes, reader: Box::new(Reader(self.clone())) })
    }

    fn create_mapped(&mut self, request: &CdqRequest, memory: &DmaBuffer, wake: &EventLine) -> io::Result<u16> {
        let mut state = self.state();
        if let Some(errno) = state.create {
            return Err(io::Error::from_raw_os_error(errno));
        }
        assert!(memory.len() >= request.slots as usize * request.entry_bytes as usize);
        (state.memory, state.line) = (Some(memory.clone()), Some(wake.clone()));
        Ok(7)
    }

    fn delete_mapped(&mut self, id: u16) -> io::Result<()> {
        assert_eq!(id, 7);
        let mut state = self.state();
        state.deleted += 1;
        state.delete.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

struct Reader(Fake);

impl EntryReader for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.state();
        let (reads, waiting) = (state.reads, state.pending.len());
        let first = state.tail - waiting as u64;
        let most = if let Reads::Short(most) = reads { most } else { usize::MAX };
        let count = waiting.min(into.len() / 32).min(most);
        assert!(into.len() >= 32 && into.len() <= SLOTS as usize * 32, "as the proposal wants it");
        if let Reads::Fails(errno) = reads {
            return Err(io::Error::from_raw_os_error(errno));
        }
        for at in 0..count {
            let number = state.pending.pop_front().expect("waiting");
            let place = first + at as u64 + if reads == Reads::OldPhase { u64::from(SLOTS) } else { 0 };
            into[at * 32..(at + 1) * 32].copy_from_slice(&entry(number, place));
        }
        let to_end = (u64::from(SLOTS) - first % u64::from(SLOTS)) as usize;
        Ok(match reads {
            Reads::WithoutTheSecondPart => count.min(to_end) * 32,
            Reads::APart => count * 32 + 1,
            Reads::TooMuch => into.len() + 32,
            Reads::OneMore => (count + 1) * 32,
            _ => count * 32,
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.state().closed += 1;
    }
}

/// The admin queue: heads free slots when they are answered.
impl HeadTeller for Fake {
    fn tell(&mut self, _now: Time, entry: &SubmissionEntry) -> Result<Ticket, SubmitError> {
        let mut state = self.state();
        if state.full {
            return Err(SubmitError::Full);
        }
        state.told.push(*entry);
        let ticket = Ticket { index: 0, serial: state.told.len() as u32 };
        let completion = Completion { tag: 0, status: state.status, result: 0, unknown: state.unknown };
        state.answers.push_back((ticket, completion));
        if !state.status.is_error() {
            let head = u64::from(entry.cdw12);
            let first = state.tail - state.pending.len() as u64;
            let slots = u64::from(SLOTS);
            let advance = (head + slots - first % slots) % slots;
            assert!(advance <= state.pending.len() as u64, "a head beyond the tail");
            state.pending.drain(..advance as usize);
        }
        Ok(ticket)
    }

    fn answered(&mut self, ticket: Ticket) -> Option<Completion> {
        let mut state = self.state();
        if state.hold {
            return None;
        }
        let at = state.answers.iter().position(|(given, _)| *given == ticket)?;
        state.answers.remove(at).map(|(_, completion)| completion)
    }
}

fn numbers(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(32).map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])).collect()
}

fn taken(owner: &mut KernelCdqOwner, max: usize) -> Vec<u32> {
    let mut bytes = Vec::new();
    let count = owner.take(max, &mut bytes);
    assert_eq!(bytes.len(), count * 32);
    numbers(&bytes)
}

#[test]
fn entries_come_in_order_and_once_over_many_passes() {
    for kind in KINDS {
        let mut fake = Fake::default();
        let mut owner = fake.owner(kind);
        assert_eq!((owner.state(), owner.id()), (KernelCdqState::Live { id: 7 }, Some(7)));
        let mut posted = 0;
        for round in 0..40u32 {
            let first = posted;
            while posted < first + 1 + round % 7 {
                assert!(fake.post(posted), "{kind:?}, round {round}");
                posted += 1;
            }
            assert_eq!(owner.waiting(), posted - first);
            let got = taken(&mut owner, usize::MAX);
            assert_eq!(got, (first..posted).collect::<Vec<_>>(), "{kind:?}");
            owner.rewind(1);
            assert_eq!(taken(&mut owner, 9), [posted - 1]);
            assert!(matches!(owner.give_back(&mut fake, Time(0), 99), Err(CdqError::NotTaken { asked: 99, .. })));
            owner.give_back(&mut fake, Time(0), posted - first).expect("taken");
            let _progress = owner.poll(&mut fake, Time(0));
            assert!(owner.head_is_told() && owner.taken() == 0);
        }
        owner.delete();
        assert_eq!(owner.state(), KernelCdqState::Gone(KernelGone::Deleted));
        assert!(matches!(owner.give_back(&mut fake, Time(0), 0), Err(CdqError::NotLive)));
        drop(owner);
        let state = fake.state();
        let expected = if kind == KernelCdqKind::OwnMemory { (1, 0) } else { (0, 1) };
        assert_eq!((state.deleted, state.closed), expected, "deleted once");
    }
}

#[test]
fn the_return_value_may_leave_out_what_was_copied_and_reads_may_be_short() {
    for reads in [Reads::WithoutTheSecondPart, Reads::Short(1), Reads::Short(3)] {
        let mut fake = Fake::default();
        fake.state().reads = reads;
        let mut owner = fake.owner(KernelCdqKind::ReadDescriptor);
        let (mut posted, mut got) = (0, Vec::new());
        while posted < 100 {
            for _ in 0..5 {
                posted += u32::from(fake.post(posted));
            }
            let batch = taken(&mut owner, 6);
            owner.give_back(&mut fake, Time(0), batch.len() as u32).expect("taken");
            got.extend(batch);
        }
        while got.len() < posted as usize {
            let batch = taken(&mut owner, 6);
            assert!(!batch.is_empty(), "{reads:?}: {} of {posted}", got.len());
            owner.give_back(&mut fake, Time(0), batch.len() as u32).expect("taken");
            got.extend(batch);
        }
        assert!(got.into_iter().eq(0..posted), "{reads:?}");
    }
}

#[test]
fn what_cannot_be_entries_ends_the_queue_and_what_came_before_can_be_taken() {
    for (reads, is_nonsense) in [
        (Reads::APart, true),
        (Reads::TooMuch, true),
        (Reads::OldPhase, true),
        (Reads::OneMore, true),
        (Reads::Fails(19), false),
        (Reads::Fails(5), false),
    ] {
        let mut fake = Fake::default();
        let mut owner = fake.owner(KernelCdqKind::ReadDescriptor);
        assert!(fake.post(1) && fake.post(2));
        assert_eq!(owner.waiting(), 2);
        assert!(fake.post(3));
        fake.state().reads = reads;
        assert_eq!(taken(&mut owner, 9), [1, 2], "{reads:?}");
        let KernelCdqState::Gone(why) = owner.state() else { panic!("{reads:?}: {:?}", owner.state()) };
        assert_eq!(matches!(why, KernelGone::Nonsense(_)), is_nonsense, "{reads:?}: {why}");
        owner.rewind(2);
        assert_eq!((taken(&mut owner, 1), owner.waiting()), (vec![1], 1));
        let _progress = owner.poll(&mut fake, Time(0));
        owner.delete();
        assert_eq!(owner.state(), KernelCdqState::Gone(why), "the first reason stays");
    }
}

#[test]
fn an_interrupted_read_is_tried_again() {
    let fake = Fake::default();
    let mut owner = fake.owner(KernelCdqKind::ReadDescriptor);
    assert!(fake.post(4));
    for errno in [11, 4] {
        fake.state().reads = Reads::Fails(errno);
        assert_eq!((owner.waiting(), owner.id()), (0, Some(7)));
    }
    fake.state().reads = Reads::AsProposed;
    assert_eq!(taken(&mut owner, 9), [4]);
}

#[test]
fn a_slow_consumer_fills_the_queue_and_nothing_grows() {
    for kind in KINDS {
        let mut fake = Fake::default();
        let mut owner = fake.owner(kind);
        let mut posted = 0;
        for _ in 0..100 {
            posted += u32::from(fake.post(posted));
            let _some = owner.waiting();
        }
        // Of what the kernel has given back as many are kept as there are slots.
        let most = if kind == KernelCdqKind::ReadDescriptor { 2 * SLOTS - 1 } else { SLOTS - 1 };
        assert_eq!((posted, fake.state().pending.len() as u32), (most, SLOTS - 1), "{kind:?}");
        let mut got = Vec::new();
        while got.len() < posted as usize {
            let batch = taken(&mut owner, 3);
            owner.give_back(&mut fake, Time(0), batch.len() as u32).expect("taken");
            let _progress = owner.poll(&mut fake, Time(0));
            got.extend(batch);
        }
        assert!(got.into_iter().eq(0..posted), "{kind:?}");
    }
}

#[test]
fn the_trigger_is_armed_when_the_queue_stands_empty_and_a_timer_looks_as_well() {
    let mut fake = Fake::default();
    let mut owner = fake.owner(KernelCdqKind::OwnMemory);
    let admin = fake.clone();
    let at = |owner: &mut KernelCdqOwner, us| owner.poll(&mut admin.clone(), Time::from_us(us));
    let _idle = at(&mut owner, 0);
    let _idle = at(&mut owner, 60);
    let armed = fake.state().told.last().copied().expect("armed");
    assert_eq!((armed.cdw12, armed.cdw13), (0, 1), "at the slot after the head");
    // An entry before the arming was answered: it would wake nobody.
    assert!(fake.post(1));
    let _work = at(&mut owner, 70);
    assert!(owner.event_line().take() > 0);
    assert_eq!(taken(&mut owner, 9), [1]);
    owner.give_back(&mut fake, Time::from_us(80), 1).expect("taken");
    let _work = at(&mut owner, 80);
    let _idle = at(&mut owner, 90);
    let _idle = at(&mut owner, 200);
    assert_eq!(fake.state().told.last().map(|entry| entry.cdw13), Some(2), "armed again");
    let _work = at(&mut owner, 210);
    // The kernel signals the line that it was given.
    fake.state().line.as_ref().expect("a line").signal();
    assert!(owner.event_line().take() > 0);
    // A device whose trigger never fires.
    assert!(fake.post(2));
    let _work = at(&mut owner, 5_000);
    assert!(owner.event_line().take() > 0);
    // One that has none.
    assert_eq!(taken(&mut owner, 9), [2]);
    owner.give_back(&mut fake, Time::from_us(5_000), 1).expect("taken");
    let _work = at(&mut owner, 5_001);
    let _idle = at(&mut owner, 5_002);
    fake.state().status = Status::INVALID_FIELD;
    let _idle = at(&mut owner, 5_100);
    let _work = at(&mut owner, 5_101);
    assert_eq!(owner.id(), Some(7), "that is no reason to end");
}

#[test]
fn heads_that_are_refused_or_lost_end_the_queue() {
    for (status, unknown) in [(Status::INVALID_CDQ, false), (Status::ABORTED_BY_HOST, true)] {
        let mut fake = Fake::default();
        let mut owner = fake.owner(KernelCdqKind::OwnMemory);
        assert!(fake.post(1));
        assert_eq!(taken(&mut owner, 1), [1]);
        (fake.state().status, fake.state().unknown) = (status, unknown);
        owner.give_back(&mut fake, Time(0), 1).expect("taken");
        let _progress = owner.poll(&mut fake, Time(0));
        let expected = if unknown { KernelGone::HeadUnknown } else { KernelGone::HeadRefused(status) };
        assert_eq!(owner.state(), KernelCdqState::Gone(expected));
    }
    // A full admin queue only means later.
    let mut fake = Fake::default();
    let mut owner = fake.owner(KernelCdqKind::OwnMemory);
    assert!(fake.post(1));
    assert_eq!(taken(&mut owner, 1), [1]);
    fake.state().full = true;
    owner.give_back(&mut fake, Time(0), 1).expect("taken");
    assert!(!owner.head_is_told());
    fake.state().full = false;
    let _progress = owner.poll(&mut fake, Time(0));
    let _progress = owner.poll(&mut fake, Time(0));
    assert!(owner.head_is_told());
}

#[test]
fn a_queue_is_deleted_behind_its_head_and_its_memory_kept_while_it_may_be_filled() {
    let mut fake = Fake::default();
    let mut owner = fake.owner(KernelCdqKind::OwnMemory);
    assert!(fake.post(1));
    assert_eq!(taken(&mut owner, 1), [1]);
    fake.state().hold = true;
    owner.give_back(&mut fake, Time(0), 1).expect("taken");
    owner.delete();
    assert_eq!((owner.state(), fake.state().deleted), (KernelCdqState::Deleting, 0));
    fake.state().hold = false;
    fake.state().delete = Some(5);
    let _progress = owner.poll(&mut fake, Time(0));
    assert!(matches!(owner.state(), KernelCdqState::Gone(KernelGone::Kernel(_))));
    drop(owner);
    let state = fake.state();
    let memory = state.memory.as_ref().expect("memory");
    assert_eq!((state.deleted, Arc::strong_count(memory.arena())), (1, 2), "the stand-in's and the one that is kept");
}

#[test]
fn dropping_deletes_and_an_early_drop_keeps_the_memory() {
    for (hold, count, deleted) in [(false, 1, 1), (true, 2, 0)] {
        let mut fake = Fake::default();
        let mut owner = fake.owner(KernelCdqKind::OwnMemory);
        fake.state().hold = hold;
        assert!(fake.post(1));
        assert_eq!(taken(&mut owner, 1), [1]);
        owner.give_back(&mut fake, Time(0), 1).expect("taken");
        let _progress = owner.poll(&mut fake, Time(0));
        drop(owner);
        let state = fake.state();
        let memory = state.memory.as_ref().expect("memory");
        assert_eq!((state.deleted, Arc::strong_count(memory.arena())), (deleted, count));
    }
}

#[test]
fn a_kernel_without_the_interface_or_with_another_queue_is_refused() {
    for kind in KINDS {
        let create = |config| KernelCdqOwner::create(Box::new(Fake::default()), kind, config, KernelCdqOptions::default());
        assert!(matches!(create(CdqConfig { slots: 2, ..CONFIG }), Err(KernelCdqError::Cdq(CdqError::BadConfig(_)))));
        for (errno, missing) in [(25, true), (95, true), (22, false), (12, false)] {
            let fake = Fake::default();
            fake.state().create = Some(errno);
            let refused = KernelCdqOwner::create(Box::new(fake), kind, CONFIG, KernelCdqOptions::default()).map(drop);
            assert_eq!(matches!(refused, Err(KernelCdqError::NoInterface)), missing, "{errno}");
        }
    }
    let fake = Fake::default();
    fake.state().slots = Some(4);
    let other = KernelCdqOwner::create(Box::new(fake.clone()), KINDS[0], CONFIG, KernelCdqOptions::default()).map(drop);
    assert!(matches!(other, Err(KernelCdqError::OtherQueue { slots: 4, .. })));
    assert_eq!(fake.state().closed, 1, "which deletes it");
}

#[derive(Clone, Debug)]
enum Step {
    Post(u8),
    Take(u8),
    Back(u8),
    Rewind(u8),
    Poll,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<u8>().prop_map(|n| Step::Post(n % 9)),
        any::<u8>().prop_map(|n| Step::Take(n % 12)),
        any::<u8>().prop_map(|n| Step::Back(n % 12)),
        any::<u8>().prop_map(|n| Step::Rewind(n % 12)),
        Just(Step::Poll),
    ]
}

proptest! {
    #[test]
    fn a_consumer_sees_what_the_controller_posted(own in any::<bool>(), steps in prop::collection::vec(step(), 1..150)) {
        let mut fake = Fake::default();
        let mut owner = fake.owner(KINDS[usize::from(own)]);
        // Posted and not given back; of those read.
        let (mut model, mut read, mut next) = (VecDeque::new(), 0usize, 0u32);
        for (at, step) in steps.into_iter().enumerate() {
            match step {
                Step::Post(n) => {
                    for _ in 0..n {
                        if fake.post(next) {
                            model.push_back(next);
                            next += 1;
                        }
                    }
                }
                Step::Take(n) => {
                    let got = taken(&mut owner, usize::from(n));
                    let expected: Vec<_> = model.iter().skip(read).take(got.len()).copied().collect();
                    prop_assert_eq!(&got, &expected);
                    read += got.len();
                    let full = owner.taken() == SLOTS;
                    prop_assert!(full || got.len() == usize::from(n) || owner.waiting() == 0);
                }
                Step::Back(n) => {
                    let fits = usize::from(n) <= read;
                    prop_assert_eq!(owner.give_back(&mut fake, Time(0), u32::from(n)).is_ok(), fits);
                    if fits {
                        model.drain(..usize::from(n));
                        read -= usize::from(n);
                    }
                }
                Step::Rewind(n) => {
                    owner.rewind(u32::from(n));
                    read -= usize::from(n).min(read);
                }
                Step::Poll => _ = owner.poll(&mut fake, Time::from_us(at as u64 * 40)),
            }
            prop_assert_eq!(owner.taken() as usize, read);
            prop_assert_eq!(owner.id(), Some(7));
        }
    }
}
