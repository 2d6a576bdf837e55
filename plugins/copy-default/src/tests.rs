use super::*;
use crate::dray::policy::types::Namespace;
use crate::exports::dray::policy::copy::Then;

const MIB: u64 = 1 << 20;

fn policy() -> Policy {
    let namespaces = vec![Namespace { nsid: 1, blocks: 1 << 33, block_bytes: 4096 }];
    let setup = Setup { migration: 1, seed: 1, now_us: 0, namespaces, regions: 4, region_bytes: 40, settings: Vec::new() };
    Policy::new(&setup).unwrap()
}

/// Far from the end, calm guest.
fn view() -> View {
    View {
        now_us: 0,
        unix_s: 0,
        utc_offset_min: 0,
        round: 0,
        left_blocks: 1 << 40,
        queued_blocks: 0,
        dirtied_per_s: 0,
        copied_per_s: 1_000_000,
        peer_us: 20,
        guest_p50_us: 0,
        guest_p99_us: 0,
        guest_p99_before_us: 0,
        guest_iops: 0,
        downtime_estimate_us: 100_000,
        downtime_budget_us: 10_000,
        may_throttle: false,
    }
}

const NEVER: u32 = u32::MAX;

/// Dirty regions in a row, with how long each has been idle and its flags.
fn regions(blocks: u32, idle: &[(u32, u32)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, &(idle_ms, flags)) in idle.iter().enumerate() {
        out.extend((index as u64 * u64::from(blocks)).to_le_bytes());
        [1, blocks, blocks, 0, idle_ms, flags, 0, 0].into_iter().for_each(|word: u32| out.extend(word.to_le_bytes()));
    }
    out
}

fn extents(bytes: &[u8]) -> Vec<(u64, u32)> {
    let of = |record: &[u8; 16]| {
        let record = u128::from_le_bytes(*record);
        (record as u64, (record >> 64) as u32)
    };
    bytes.as_chunks().0.iter().map(of).collect()
}

#[test]
fn cold_first_hot_last_each_in_ascending_lba() {
    let media = regions(1024, &[(5, 0), (NEVER, 0), (NEVER, 0), (20_000, 0), (0, 0), (NEVER, 0)]);
    let answer = policy().decide(&view(), &media);
    assert_eq!(extents(&answer.extents), [(1024, 2048), (5120, 1024), (3072, 1024), (0, 1024), (4096, 1024)]);
}

#[test]
fn a_round_orders_a_region_once_and_a_batch_at_a_time() {
    let mut policy = policy();
    let media = regions(1024, &[(NEVER, 0); 100]);
    let mut ask = |round, queued_blocks| {
        extents(&policy.decide(&View { round, queued_blocks, ..view() }, &media).extents)
    };
    assert_eq!(ask(0, 0), [(0, 65_536)]);
    assert_eq!(ask(0, 40_000), [], "enough is queued");
    assert_eq!(ask(0, 30_000), [(65_536, 36_864)]);
    assert_eq!(ask(0, 100), [], "all was ordered");
    assert_eq!(ask(0, 0), [(0, 65_536)], "and yet something is left");
    assert_eq!(ask(1, 0), [(0, 65_536)]);
}

#[test]
fn held_regions_come_when_nothing_else_is_left() {
    let mut policy = policy();
    assert_eq!(extents(&policy.decide(&view(), &regions(8, &[(0, 2), (0, 0)])).extents), [(8, 8)]);
    assert_eq!(extents(&policy.decide(&view(), &regions(8, &[(0, 2)])).extents), [(0, 8)]);
}

#[test]
fn an_answer_keeps_its_bound() {
    let odd: Vec<_> = (0..10_000).map(|index| (if index % 2 == 0 { NEVER } else { 5 }, 0)).collect();
    assert_eq!(policy().decide(&view(), &regions(1, &odd)).extents.len(), 4096 * 16);
    let huge = policy().decide(&view(), &regions(u32::MAX, &[(NEVER, 0)]));
    assert_eq!(extents(&huge.extents).iter().map(|&(_, blocks)| u64::from(blocks)).sum::<u64>(), u32::MAX.into());
}

#[test]
fn the_rate_falls_when_the_guest_suffers_and_recovers() {
    let mut policy = policy();
    let mut now_us = 0;
    let mut rate = |guest_p99_us, guest_p99_before_us| {
        now_us += 20_000;
        policy.decide(&View { now_us, guest_p99_us, guest_p99_before_us, ..view() }, &[]).bytes_per_s
    };
    assert_eq!((rate(1000, 0), rate(1000, 0), rate(0, 10)), (0, 0, 0), "unknown");
    assert_eq!((rate(49, 10), rate(49, 10)), (0, 0), "calm below 50 us");
    assert_eq!((rate(400, 100), rate(400, 100)), (0, 0), "within the factor");
    assert_eq!(rate(60, 10), 0, "one bad view is one command");
    assert_eq!(rate(60, 10), 4_096_000_000 / 10 * 7);
    assert_eq!((0..20).map(|_| rate(60, 10)).last(), Some(200 * MIB), "the floor");
    assert_eq!(rate(20, 10), 220 * MIB);
    assert_eq!((0..60).map(|_| rate(20, 10)).last(), Some(0), "free again");
}

#[test]
fn the_rate_stays_above_what_the_guest_dirties() {
    let mut policy = policy();
    for step in 1..40 {
        let bad = View { now_us: step * 20_000, guest_p99_us: 900, guest_p99_before_us: 10, dirtied_per_s: 100_000, ..view() };
        let rate = policy.decide(&bad, &[]).bytes_per_s;
        assert!(rate == 0 || rate >= 2 * 100_000 * 4096, "{rate}");
    }
}

fn round(policy: &mut Policy, round: u32, left_blocks: u64, downtime_estimate_us: u32, may_throttle: bool) -> Decision {
    let view = View {
        round,
        left_blocks,
        queued_blocks: left_blocks,
        downtime_estimate_us,
        may_throttle,
        guest_iops: 100_000,
        dirtied_per_s: 100_000,
        copied_per_s: 400_000,
        ..view()
    };
    policy.decide(&view, &[])
}

#[test]
fn switch_over_when_another_round_would_not_help() {
    let mut policy = policy();
    assert_eq!(round(&mut policy, 0, 100_000, 9_000, false).then, Then::GoOn);
    assert_eq!(round(&mut policy, 1, 40_000, 9_000, false).then, Then::GoOn);
    assert_eq!(round(&mut policy, 2, 30_000, 10_001, false).then, Then::GoOn, "over the budget");
    assert_eq!(round(&mut policy, 3, 29_000, 10_000, false).then, Then::SwitchOver, "no longer shrinking");
    assert_eq!(round(&mut policy, 4, 1_000, 1_001, false).then, Then::GoOn);
    assert_eq!(round(&mut policy, 4, 1_000, 1_000, false).then, Then::SwitchOver, "cheap");
    assert_eq!(round(&mut policy, 5, 0, 5_000, false).then, Then::SwitchOver, "nothing left");
}

#[test]
fn the_guest_is_slowed_only_where_allowed_and_needed() {
    for may in [false, true] {
        let mut policy = policy();
        assert_eq!(round(&mut policy, 0, 100_000, 20_000, may).guest_iops_limit, 0);
        assert_eq!(round(&mut policy, 1, 90_000, 20_000, may).guest_iops_limit, 0);
        assert_eq!(round(&mut policy, 2, 90_000, 20_000, may).guest_iops_limit, if may { 50_000 } else { 0 });
    }
    let mut policy = policy();
    round(&mut policy, 1, 90_000, 20_000, true);
    assert_eq!(round(&mut policy, 2, 30_000, 20_000, true).guest_iops_limit, 0, "it converges");
}

#[test]
fn a_successor_goes_on_where_the_old_one_stood() {
    let media = regions(8192, &[(NEVER, 0), (5, 0), (NEVER, 0), (500, 0), (5, 0), (NEVER, 0), (NEVER, 0), (5, 0), (5, 0), (1, 0)]);
    let mut old = policy();
    for step in 1..4 {
        old.decide(&View { now_us: step * 20_000, guest_p99_us: 999, guest_p99_before_us: 10, round: 3, ..view() }, &media);
    }
    let mut new = policy();
    new.load(&old.save()).unwrap();
    let next = View { round: 3, ..view() };
    let (old, new) = (old.decide(&next, &media), new.decide(&next, &media));
    assert_eq!((old.extents, old.bytes_per_s, old.then), (new.extents, new.bytes_per_s, new.then));
    assert!(old.bytes_per_s > 0);
}

#[test]
fn foreign_state_is_refused() {
    let good = policy().save();
    assert!(policy().load(&[]).is_err() && policy().load(&good[..47]).is_err() && policy().load(&[0xa5; 4096]).is_err());
    let mut other = good.clone();
    other[0] ^= 1;
    assert!(policy().load(&other).is_err() && policy().load(&good).is_ok());
}
