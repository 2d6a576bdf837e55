//! Controller data queues, owned and lent.

use crate::cdq::{CdqConfig, CdqFormat, CdqOptions, CdqOwner, CdqState, GoneReason};
use crate::error::CdqError;
use crate::fake::Bench;
use crate::lend::{LendError, LentReader};
use dray_nvme::command::AdminOpcode;
use dray_nvme::status::Status;

const CONFIG: CdqConfig =
    CdqConfig { kind: 0, cntlid: 5, slots: 128, format: CdqFormat::UDMQ, arm_trigger: true };

/// Turns that another thread gets to do its part.
const TURNS: u32 = 20_000_000;

fn live(bench: &mut Bench, config: CdqConfig, options: CdqOptions) -> CdqOwner {
    let mut owner = CdqOwner::create_with(&mut bench.driver, bench.now, config, options).expect("queue");
    bench.until("live", |bench| {
        let _progress = owner.poll(&mut bench.driver, bench.now);
        matches!(owner.state(), CdqState::Live { .. })
    });
    owner
}

fn turn(bench: &mut Bench, owner: &mut CdqOwner) {
    bench.turn();
    while let Some(event) = bench.driver.next_event() {
        owner.on_event(&event);
    }
    let _progress = owner.poll(&mut bench.driver, bench.now);
}

fn numbers(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(32).map(|e| u32::from_le_bytes([e[0], e[1], e[2], e[3]])).collect()
}

#[test]
fn entries_come_once_and_heads_are_told() {
    for prp_list in [false, true] {
        let mut bench = Bench::ready();
        // Over 512 pages: the list is chained.
        let slots = if prp_list { 70_000 } else { 128 };
        let options = CdqOptions { prp_list, ..CdqOptions::default() };
        let mut owner = live(&mut bench, CdqConfig { slots, ..CONFIG }, options);
        let batch = slots - 1;
        let mut next = 0;
        for _ in 0..3 {
            for number in next..next + batch {
                bench.fake.post_entry(number);
            }
            let mut got = Vec::new();
            assert_eq!(owner.waiting(), batch);
            assert_eq!(owner.take(usize::MAX, &mut got), batch as usize);
            assert_eq!(numbers(&got), (next..next + batch).collect::<Vec<_>>());
            assert_eq!(owner.take(9, &mut got), 0);
            owner.give_back(&mut bench.driver, bench.now, batch).expect("taken");
            next += batch;
            while !owner.head_is_told() {
                turn(&mut bench, &mut owner);
            }
            let cdq = bench.fake.cdq.expect("queue");
            assert_eq!(u64::from(cdq.head), cdq.tail % u64::from(cdq.slots));
        }
    }
}

#[test]
fn what_is_rewound_comes_again_and_only_taken_entries_go_back() {
    let mut bench = Bench::ready();
    let mut owner = live(&mut bench, CONFIG, CdqOptions::default());
    (0..10).for_each(|n| bench.fake.post_entry(n));
    let mut got = Vec::new();
    owner.take(6, &mut got);
    owner.rewind(2);
    got.clear();
    owner.take(100, &mut got);
    assert_eq!(numbers(&got), (4..10).collect::<Vec<_>>());
    let too_many = owner.give_back(&mut bench.driver, bench.now, 11);
    assert!(matches!(too_many, Err(CdqError::NotTaken { asked: 11, taken: 10 })));
    owner.give_back(&mut bench.driver, bench.now, 10).expect("taken");
}

#[test]
fn heads_that_queue_up_become_one_command() {
    let mut bench = Bench::ready();
    let mut owner = live(&mut bench, CdqConfig { arm_trigger: false, ..CONFIG }, CdqOptions::default());
    bench.fake.hold_features = true;
    (0..20).for_each(|n| bench.fake.post_entry(n));
    owner.take(20, &mut Vec::new());
    for _ in 0..20 {
        owner.give_back(&mut bench.driver, bench.now, 1).expect("taken");
        turn(&mut bench, &mut owner);
    }
    bench.fake.hold_features = false;
    (0..20).for_each(|_| turn(&mut bench, &mut owner));
    let cdq = bench.fake.cdq.expect("queue");
    assert_eq!((cdq.updates, cdq.head), (2, 20));
}

#[test]
fn an_idle_queue_arms_the_trigger_and_wakes_its_consumer_once() {
    let mut bench = Bench::ready();
    let options = CdqOptions { slow_poll_us: 1_000_000_000, ..CdqOptions::default() };
    let mut owner = live(&mut bench, CONFIG, options);
    let _early = owner.event_line().take();
    for round in 0..300u32 {
        (0..5).for_each(|_| turn(&mut bench, &mut owner));
        let armed = bench.fake.cdq.expect("queue").trigger;
        assert_eq!(armed, Some((round + 1) % 128), "armed at the slot after the head");
        assert_eq!(owner.event_line().take(), 0);
        bench.fake.post_entry(round);
        (0..3).for_each(|_| turn(&mut bench, &mut owner));
        assert_eq!(owner.event_line().take(), 1);
        assert_eq!(bench.fake.cdq.expect("queue").trigger, None, "not armed while an entry waits");
        owner.take(10, &mut Vec::new());
        owner.give_back(&mut bench.driver, bench.now, 1).expect("taken");
    }
}

#[test]
fn an_entry_that_comes_while_the_trigger_is_armed_wakes_all_the_same() {
    let mut bench = Bench::ready();
    let options = CdqOptions { slow_poll_us: 1_000_000_000, ..CdqOptions::default() };
    let mut owner = live(&mut bench, CONFIG, options);
    bench.fake.hold_features = true;
    (0..5).for_each(|_| turn(&mut bench, &mut owner));
    bench.fake.post_entry(1);
    let _early = owner.event_line().take();
    bench.fake.hold_features = false;
    (0..3).for_each(|_| turn(&mut bench, &mut owner));
    assert_eq!(bench.fake.cdq.expect("queue").trigger, Some(1), "armed too late: it will not fire");
    assert_eq!(owner.event_line().take(), 1);
}

#[test]
fn the_slow_timer_makes_up_for_events_that_never_come() {
    let mut bench = Bench::ready();
    let mut owner = live(&mut bench, CONFIG, CdqOptions::default());
    (0..5).for_each(|_| turn(&mut bench, &mut owner));
    let _early = owner.event_line().take();
    if let Some(cdq) = &mut bench.fake.cdq {
        cdq.trigger = None;
    }
    bench.fake.post_entry(1);
    (0..15).for_each(|_| turn(&mut bench, &mut owner));
    assert!(owner.event_line().take() > 0);
}

#[test]
fn a_full_queue_is_reported() {
    let mut bench = Bench::ready();
    let mut owner = live(&mut bench, CONFIG, CdqOptions::default());
    assert!(bench.fake.event(0x104, 3), "of another queue");
    (0..2).for_each(|_| turn(&mut bench, &mut owner));
    assert!(!owner.full_reported());
    assert!(bench.fake.event(0x104, 0));
    (0..2).for_each(|_| turn(&mut bench, &mut owner));
    assert!(owner.full_reported());
}

#[test]
fn a_dropped_owner_deletes_its_queue_and_a_reset_ends_it() {
    let mut bench = Bench::ready();
    let owner = live(&mut bench, CONFIG, CdqOptions::default());
    drop(owner);
    bench.until("deleted", |bench| bench.fake.cdq.is_none());
    // Dropped before the controller has answered.
    let owner = CdqOwner::create(&mut bench.driver, bench.now, CONFIG).expect("queue");
    drop(owner);
    bench.turns(5);
    assert!(bench.fake.cdq.is_none());
    let deletes = bench.fake.admin_seen.iter().filter(|e| e.admin_opcode() == AdminOpcode::CONTROLLER_DATA_QUEUE);
    assert_eq!(deletes.count(), 4);
    let mut owner = live(&mut bench, CONFIG, CdqOptions::default());
    bench.fake.post_entry(8);
    let generation = bench.driver.generation();
    bench.driver.reset(bench.now);
    bench.until("reset", |bench| bench.driver.is_ready() && bench.driver.generation() != generation);
    let _progress = owner.poll(&mut bench.driver, bench.now);
    assert_eq!(owner.state(), CdqState::Gone(GoneReason::Reset));
    assert_eq!(owner.take(9, &mut Vec::new()), 1, "what was posted can still be read");
    assert!(matches!(owner.give_back(&mut bench.driver, bench.now, 1), Err(CdqError::NotLive)));
}

#[test]
fn a_queue_is_deleted_behind_the_head_that_is_being_told() {
    for drops in [false, true] {
        let mut bench = Bench::ready();
        let mut owner = live(&mut bench, CdqConfig { arm_trigger: false, ..CONFIG }, CdqOptions::default());
        bench.fake.hold_features = true;
        (0..5).for_each(|n| bench.fake.post_entry(n));
        owner.take(5, &mut Vec::new());
        owner.give_back(&mut bench.driver, bench.now, 5).expect("taken");
        turn(&mut bench, &mut owner);
        let mut kept = Some(owner).filter(|_| !drops);
        if let Some(owner) = &mut kept {
            owner.delete(&mut bench.driver, bench.now);
        }
        for held in [true, false] {
            bench.fake.hold_features = held;
            for _ in 0..20 {
                bench.turn();
                if let Some(owner) = &mut kept {
                    let _progress = owner.poll(&mut bench.driver, bench.now);
                }
            }
            assert_eq!(bench.fake.cdq.is_some(), held, "drops {drops}");
        }
        let deleted = kept.is_none_or(|owner| owner.state() == CdqState::Gone(GoneReason::Deleted));
        assert!(deleted, "drops {drops}");
        let _next = live(&mut bench, CONFIG, CdqOptions::default());
        assert_eq!(bench.fake.cdq.map(|cdq| cdq.head), Some(0), "the next queue begins at slot 0");
    }
}

#[test]
fn a_deletion_that_is_refused_is_tried_again_and_the_memory_is_kept() {
    let mut bench = Bench::ready();
    let mappings = |bench: &Bench| {
        let mut reader = bench.driver.space().reader();
        reader.refresh();
        reader.mappings().len()
    };
    let before = mappings(&bench);
    let mut deletes = 0;
    for lasts in [false, true] {
        let owner = live(&mut bench, CONFIG, CdqOptions::default());
        let there = mappings(&bench);
        bench.fake.refuse = Some((AdminOpcode::CONTROLLER_DATA_QUEUE, Status::INTERNAL_ERROR));
        drop(owner);
        bench.turns(if lasts { 40 } else { 2 });
        bench.fake.refuse = None;
        assert_eq!(mappings(&bench), there, "the controller may still fill it");
        bench.turns(10);
        let seen = bench.fake.admin_seen.iter().filter(|e| e.admin_opcode() == AdminOpcode::CONTROLLER_DATA_QUEUE).count();
        assert!((2..=5).contains(&(seen - deletes - 1)), "{seen}");
        deletes = seen;
        assert_eq!(mappings(&bench), if lasts { there } else { before }, "lasts {lasts}");
    }
    let generation = bench.driver.generation();
    bench.driver.reset(bench.now);
    bench.until("reset", |bench| bench.driver.is_ready() && bench.driver.generation() != generation);
    assert_eq!(mappings(&bench), before, "a reset ends every queue");
}

#[test]
fn refusals_and_bad_set_ups_are_told() {
    let mut bench = Bench::ready();
    for config in [
        CdqConfig { slots: 2, ..CONFIG },
        CdqConfig { slots: u32::MAX, ..CONFIG },
        CdqConfig { format: CdqFormat { entry_bytes: 30, ..CdqFormat::UDMQ }, ..CONFIG },
        CdqConfig { format: CdqFormat { phase_byte: 32, ..CdqFormat::UDMQ }, ..CONFIG },
        CdqConfig { format: CdqFormat { phase_mask: 0, ..CdqFormat::UDMQ }, ..CONFIG },
    ] {
        let refused = CdqOwner::create(&mut bench.driver, bench.now, config);
        assert!(matches!(refused, Err(CdqError::BadConfig(_))), "{config:?}");
    }
    bench.fake.refuse = Some((AdminOpcode::CONTROLLER_DATA_QUEUE, Status::NOT_ENOUGH_RESOURCES));
    let mut owner = CdqOwner::create(&mut bench.driver, bench.now, CONFIG).expect("sent");
    bench.until("refused", |bench| {
        let _progress = owner.poll(&mut bench.driver, bench.now);
        owner.state() == CdqState::Gone(GoneReason::NotCreated(Status::NOT_ENOUGH_RESOURCES))
    });
    bench.fake.refuse = None;
    let mut owner = live(&mut bench, CONFIG, CdqOptions::default());
    owner.delete(&mut bench.driver, bench.now);
    bench.until("deleted", |bench| {
        let _progress = owner.poll(&mut bench.driver, bench.now);
        owner.state() == CdqState::Gone(GoneReason::Deleted)
    });
    assert!(bench.fake.cdq.is_none());
}

#[test]
fn a_lent_queue_is_read_elsewhere_and_comes_back() {
    let mut bench = Bench::ready();
    let mut owner = live(&mut bench, CdqConfig { arm_trigger: false, ..CONFIG }, CdqOptions::default());
    (0..4).for_each(|n| bench.fake.post_entry(n));
    owner.take(2, &mut Vec::new());
    owner.give_back(&mut bench.driver, bench.now, 2).expect("taken");
    let lent = owner.lend().expect("lent");
    assert!(matches!(owner.lend(), Err(CdqError::Lent)));
    assert_eq!(owner.take(9, &mut Vec::new()), 0, "the reader's now");
    let (told, wait) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut reader = LentReader::open(lent.into_socket()).expect("open");
            let mut got = Vec::new();
            reader.take(1, &mut got);
            reader.give_back(1).expect("give back");
            reader.take(100, &mut got);
            // Until the owner has seen the head.
            let _told = wait.recv();
            assert!(matches!(reader.give_back(100), Err(LendError::NotTaken { .. })));
            numbers(&got)
        });
        let told_head = (0..TURNS).any(|_| {
            turn(&mut bench, &mut owner);
            bench.fake.cdq.expect("queue").head == 3
        });
        told.send(()).expect("reader");
        assert_eq!(reader.join().expect("reader"), [2, 3]);
        assert!(told_head, "the reader's head reaches the controller");
    });
    let returned = (0..TURNS).any(|_| {
        turn(&mut bench, &mut owner);
        !owner.is_lent()
    });
    assert!(returned, "the end of the socket gives the queue back");
    let mut got = Vec::new();
    owner.take(100, &mut got);
    assert_eq!(numbers(&got), [3], "what the reader did not give back");
}

#[test]
fn a_reader_that_sends_nonsense_loses_the_queue() {
    let mut bench = Bench::ready();
    let mut owner = live(&mut bench, CONFIG, CdqOptions::default());
    bench.fake.post_entry(1);
    for nonsense in [&5u32.to_le_bytes()[..], &u32::MAX.to_le_bytes(), &[1, 0, 0], &[1, 0, 0, 0, 0]] {
        let socket = owner.lend().expect("lent").into_socket();
        rustix::net::send(&socket, nonsense, rustix::net::SendFlags::NOSIGNAL).expect("send");
        turn(&mut bench, &mut owner);
        assert!(!owner.is_lent(), "{nonsense:?}");
        let mut got = Vec::new();
        assert_eq!(owner.take(9, &mut got), 1);
        owner.rewind(9);
    }
}

#[test]
fn a_reader_believes_no_layout_outside_the_memory() {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .expect("sockets");
    rustix::net::send(&ours, &[0u8; 48], rustix::net::SendFlags::empty()).expect("send");
    assert!(matches!(LentReader::open(theirs), Err(LendError::BadGreeting(_))));
}
