use super::*;
use crate::media::Geometry;
use dray_policy::packed::Range;
use dray_policy::role::CdqAnswer;
use dray_policy::seam::{Identity, Opening, SeatStats};
use std::collections::VecDeque;

/// A ring as its reader sees it.
#[derive(Default)]
struct Ring {
    entries: VecDeque<[u8; 32]>,
    taken: usize,
    given: u32,
}

impl EntryQueue for Ring {
    fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        let n = max.min(self.entries.len() - self.taken);
        self.entries.range(self.taken..self.taken + n).for_each(|entry| into.extend_from_slice(entry));
        self.taken += n;
        n
    }
    fn waiting(&mut self) -> u32 {
        (self.entries.len() - self.taken) as u32
    }
    fn rewind(&mut self, entries: u32) {
        self.taken -= entries as usize;
    }
    fn give_back(&mut self, _: Time, entries: u32) -> Result<(), QueueError> {
        self.entries.drain(..entries as usize);
        self.taken -= entries as usize;
        self.given += entries;
        Ok(())
    }
}

/// A policy's seat whose answers a test writes.
struct Scripted<F: FnMut(&mut Exchange<Cdq>) -> bool + Send> {
    script: F,
    held: Option<Box<Exchange<Cdq>>>,
}

impl<F: FnMut(&mut Exchange<Cdq>) -> bool + Send> Seat<Cdq> for Scripted<F> {
    fn identity(&self) -> Identity {
        Identity { component: "test".into(), sha256: String::new() }
    }
    fn open(&mut self, _: Opening<Cdq>) {}
    fn ask(&mut self, exchange: Box<Exchange<Cdq>>) {
        assert!(self.held.is_none(), "asked twice");
        self.held = Some(exchange);
    }
    fn poll(&mut self) -> Option<Box<Exchange<Cdq>>> {
        let exchange = self.held.as_mut()?;
        exchange.answer = CdqAnswer::default();
        if (self.script)(exchange) { self.held.take() } else { None }
    }
    fn stats(&self) -> SeatStats {
        SeatStats::default()
    }
}

fn entry(nsid: u32, slba: u64, nlb: u32, attributes: u8) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[0..4].copy_from_slice(&nsid.to_le_bytes());
    bytes[4..8].copy_from_slice(&nlb.to_le_bytes());
    bytes[8..16].copy_from_slice(&slba.to_le_bytes());
    bytes[31] = attributes;
    bytes
}

fn media() -> Media {
    let geometry = |source| Geometry { source, destination: source, blocks: 10_000, block_bytes: 4096 };
    Media::new(&[geometry(1), geometry(3)]).expect("media")
}

fn pump(slots: u32) -> Pump {
    let queue = CdqQueue { id: 0, kind: 0, cntlid: 1, slots, entry_bytes: 32, phase_byte: 31, phase_mask: 1 };
    Pump::new(queue, PumpLimits::default(), Time(0))
}

fn consume_all(exchange: &mut Exchange<Cdq>) -> bool {
    exchange.answer.consumed = (exchange.request.entries.len() / 32) as u32;
    true
}

#[test]
fn what_the_policy_omits_is_marked_and_counted() {
    let (mut pump, mut media, mut ring) = (pump(64), media(), Ring::default());
    ring.entries.extend([entry(1, 5, 2, 1), entry(1, 8, 0, 1), entry(3, 100, 9, 1), entry(0, 0, 0, 0x83)]);
    let script = |exchange: &mut Exchange<Cdq>| {
        Range { slba: 5, blocks: 3, deallocated: false, nsid: 1 }.push(&mut exchange.answer.ranges);
        consume_all(exchange)
    };
    let mut seat = Scripted { script, held: None };
    pump.poll(Time(1), &mut ring, Some(&mut seat), &mut media).expect("poll");
    assert_eq!(pump.stats().omitted_blocks, 11);
    assert_eq!(media.namespaces()[0].next_run(0, 10_000, 1), Some((5, 1)));
    assert_eq!(media.dirty_blocks(), 14);
    assert!(pump.marks().first, "the host reads the marks itself");
    assert_eq!(ring.given, 4);
}

#[test]
fn entries_not_consumed_are_shown_again_and_at_last_drained() {
    let (mut pump, mut media, mut ring) = (pump(64), media(), Ring::default());
    ring.entries.extend([entry(1, 1, 0, 1), entry(1, 2, 0, 1)]);
    let mut shown = Vec::new();
    let script = |exchange: &mut Exchange<Cdq>| {
        shown.push(exchange.request.entries.len() / 32);
        exchange.answer.consumed = u32::from(shown.len() == 1);
        true
    };
    let mut seat = Scripted { script, held: None };
    for us in 0..3 {
        pump.poll(Time::from_us(us), &mut ring, Some(&mut seat), &mut media).expect("poll");
    }
    assert_eq!(ring.given, 1);
    pump.poll(Time::from_us(60_000), &mut ring, Some(&mut seat), &mut media).expect("poll");
    assert_eq!((ring.given, pump.stats().drained_by_host, media.dirty_blocks()), (2, 1, 2));
    assert_eq!(shown, [2, 1, 1]);
}

#[test]
fn a_policy_that_waits_cannot_fill_the_queue() {
    let (mut pump, mut media, mut ring) = (pump(64), media(), Ring::default());
    let script = |exchange: &mut Exchange<Cdq>| {
        (exchange.answer.wait_us, exchange.answer.wait_entries) = (u32::MAX, u32::MAX);
        consume_all(exchange)
    };
    let mut seat = Scripted { script, held: None };
    for i in 0..1000u64 {
        ring.entries.push_back(entry(1, i * 2, 0, 1));
        pump.poll(Time::from_us(i), &mut ring, Some(&mut seat), &mut media).expect("poll");
        assert!(ring.entries.len() <= 33);
    }
}

#[test]
fn a_policy_that_never_answers_is_not_waited_for_and_may_answer_late() {
    let (mut pump, mut media, mut ring) = (pump(64), media(), Ring::default());
    let mut calls = 0;
    let script = |exchange: &mut Exchange<Cdq>| {
        calls += 1;
        calls > 2000 && consume_all(exchange)
    };
    let mut seat = Scripted { script, held: None };
    for i in 0..1000u64 {
        ring.entries.push_back(entry(1, i, 0, 1));
        pump.poll(Time::from_us(i * 100), &mut ring, Some(&mut seat), &mut media).expect("poll");
        assert!(ring.entries.len() < 60, "{}", ring.entries.len());
    }
    assert_eq!(pump.stats().late, 1);
    while pump.asked.is_some() {
        pump.poll(Time::from_us(200_000), &mut ring, Some(&mut seat), &mut media).expect("poll");
    }
    let all = u64::from(ring.given) + ring.entries.len() as u64;
    assert_eq!((all, media.dirty_blocks()), (1000, u64::from(ring.given)), "a late answer gives nothing back twice");
}

#[test]
fn whole_namespaces_and_odd_values_mean_the_worst() {
    let mut ring = Ring::default();
    let run = |ring: &mut Ring, entries: &[[u8; 32]]| {
        let (mut pump, mut media) = (pump(64), media());
        ring.entries.extend(entries);
        pump.poll(Time(1), ring, None, &mut media).expect("poll");
        while media.fill_some() {}
        (media.namespaces()[0].dirty_blocks(), media.namespaces()[1].dirty_blocks(), pump.stats().outside)
    };
    assert_eq!(run(&mut ring, &[entry(3, 0, 0, 0x41)]), (0, 10_000, 0));
    assert_eq!(run(&mut ring, &[entry(u32::MAX, 0, 0, 0x41)]), (10_000, 10_000, 0));
    assert_eq!(run(&mut ring, &[entry(1, 0, 0, 0xc1)]), (10_000, 10_000, 0), "a reserved LBACIR");
    assert_eq!(run(&mut ring, &[entry(1, 0, 0, 0x09)]), (10_000, 10_000, 0), "a reserved ESA");
    assert_eq!(run(&mut ring, &[entry(1, 9_999, 5, 1), entry(7, 0, 1, 1), entry(1, u64::MAX - 5, u32::MAX, 1)]), (1, 0, 3));
}

#[test]
fn a_full_mark_with_a_range_marks_the_range_too() {
    let (mut pump, mut media, mut ring) = (pump(64), media(), Ring::default());
    ring.entries.push_back(entry(1, 77, 0, 0x0f));
    pump.poll(Time(1), &mut ring, None, &mut media).expect("poll");
    assert!(pump.marks().full && media.namespaces()[0].all_marked(77, 1));
}

#[test]
fn a_format_nobody_knows_dirties_everything_when_drained_without_its_policy() {
    let queue = CdqQueue { id: 0, kind: 0xc0, cntlid: 1, slots: 64, entry_bytes: 16, phase_byte: 15, phase_mask: 1 };
    let (mut pump, mut media, mut ring) = (Pump::new(queue, PumpLimits::default(), Time(0)), media(), Ring::default());
    ring.entries.push_back([0; 32]);
    pump.poll(Time(1), &mut ring, None, &mut media).expect("poll");
    while media.fill_some() {}
    assert_eq!(media.dirty_blocks(), 20_000);
}
