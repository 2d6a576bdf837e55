use super::*;
use crate::role::Role;
use crate::seam::{NamespaceInfo, Setup};

fn setup() -> Setup {
    Setup {
        migration: 1,
        seed: 1,
        now_us: 0,
        namespaces: vec![NamespaceInfo { nsid: 1, blocks: 1 << 33, block_bytes: 4096 }],
        regions: 4,
        region_bytes: packed::REGION_BYTES as u32,
        settings: Vec::new(),
    }
}

fn policy() -> NativeCopy {
    NativeCopy::open(&Opening { setup: setup(), extra: () }).unwrap()
}

fn ask(policy: &mut NativeCopy, request: &CopyRequest) -> CopyAnswer {
    let mut answer = CopyAnswer::default();
    policy.call(request, &mut answer).unwrap();
    assert_eq!(Copy::check(&setup(), &(), request, &answer), Ok(()));
    answer
}

/// Regions of 1,024 blocks in a row, by how long they have been idle.
fn view(idle: &[u32]) -> CopyRequest {
    let mut request = CopyRequest { left_blocks: 1024 * idle.len() as u64, ..busy() };
    for (index, &idle_ms) in idle.iter().enumerate() {
        let slba = index as u64 * 1024;
        Region { slba, nsid: 1, blocks: 1024, dirty: 1024, idle_ms, ..Region::default() }.push(&mut request.regions);
    }
    request
}

fn busy() -> CopyRequest {
    CopyRequest { downtime_estimate_us: 100_000, downtime_budget_us: 10_000, ..CopyRequest::default() }
}

fn order(answer: &CopyAnswer) -> Vec<(u64, u32)> {
    packed::extents(&answer.extents).map(|extent| (extent.slba, extent.blocks)).collect()
}

#[test]
fn cold_first_hot_last_each_in_order() {
    let answer = ask(&mut policy(), &view(&[5, NEVER, NEVER, 20_000, 0, NEVER]));
    assert_eq!(order(&answer), [(1024, 2048), (5120, 1024), (3072, 1024), (0, 1024), (4096, 1024)]);
}

#[test]
fn a_region_is_ordered_once_a_round() {
    let mut policy = policy();
    let mut request = view(&[NEVER; 4]);
    assert_eq!(order(&ask(&mut policy, &request)), [(0, 4096)]);
    request.queued_blocks = 100;
    assert_eq!(order(&ask(&mut policy, &request)), []);
    request.round = 1;
    assert_eq!(order(&ask(&mut policy, &request)), [(0, 4096)]);
    request.queued_blocks = 0;
    assert_eq!(order(&ask(&mut policy, &request)), [(0, 4096)], "left over with nothing queued");
}

#[test]
fn held_regions_wait_until_nothing_else_is_left() {
    let mut policy = policy();
    let mut request = view(&[NEVER; 2]);
    request.regions[28] = 2;
    assert_eq!(order(&ask(&mut policy, &request)), [(1024, 1024)]);
    request.regions.truncate(32);
    assert_eq!(order(&ask(&mut policy, &request)), [(0, 1024)]);
}

#[test]
fn a_batch_is_bounded() {
    let mut policy = policy();
    let request = view(&[NEVER; 200]);
    assert_eq!(order(&ask(&mut policy, &request)), [(0, 65_536)]);
    assert_eq!(order(&ask(&mut policy, &request)), [(65_536, 65_536)]);
    let mut hot = view(&[]);
    for index in 0..9000u64 {
        Region { slba: index * 2, nsid: 1, blocks: 1, dirty: 1, ..Region::default() }.push(&mut hot.regions);
    }
    hot.left_blocks = 9000;
    hot.round = 1;
    assert_eq!(order(&ask(&mut policy, &hot)).len(), MAX_EXTENTS);
    let mut huge = view(&[]);
    Region { slba: 0, nsid: 1, blocks: u32::MAX, dirty: 1, ..Region::default() }.push(&mut huge.regions);
    huge.left_blocks = 1;
    huge.round = 2;
    assert_eq!(order(&ask(&mut policy, &huge)).iter().map(|&(_, blocks)| u64::from(blocks)).sum::<u64>(), u64::from(u32::MAX));
}

#[test]
fn the_rate_falls_when_the_guest_suffers_and_recovers() {
    let mut policy = policy();
    let mut now_us = 0;
    let mut rate = |p99, before| {
        now_us += 20_000;
        let view = CopyRequest { now_us, guest_p99_us: p99, guest_p99_before_us: before, copied_per_s: 1_000_000, ..busy() };
        ask(&mut policy, &view).bytes_per_s
    };
    assert_eq!(rate(0, 10), 0, "unknown");
    assert_eq!(rate(1000, 0), 0, "unknown before");
    assert_eq!((rate(49, 10), rate(49, 10)), (0, 0), "calm below 50 us");
    assert_eq!((rate(399, 100), rate(399, 100)), (0, 0), "within the factor");
    assert_eq!(rate(60, 10), 0, "one bad view is one command");
    let cut = rate(60, 10);
    assert_eq!(cut / MIB, 4_096_000_000 * 7 / 10 / MIB);
    let mut low = cut;
    for _ in 0..20 {
        low = rate(60, 10);
    }
    assert_eq!(low, 200 * MIB, "the floor");
    assert!(rate(20, 10) > low);
    for _ in 0..60 {
        low = rate(20, 10);
    }
    assert_eq!(low, 0, "free again");
}

#[test]
fn the_rate_stays_above_what_the_guest_dirties() {
    let mut policy = policy();
    for step in 1..40 {
        let view = CopyRequest {
            now_us: step * 20_000,
            guest_p99_us: 900,
            guest_p99_before_us: 10,
            copied_per_s: 1_000_000,
            dirtied_per_s: 100_000,
            ..busy()
        };
        let rate = ask(&mut policy, &view).bytes_per_s;
        assert!(rate == 0 || rate >= 2 * 100_000 * 4096);
    }
}

fn round(policy: &mut NativeCopy, number: u32, left: u64, estimate: u32, may_throttle: bool) -> CopyAnswer {
    let view = CopyRequest {
        round: number,
        left_blocks: left,
        queued_blocks: left,
        downtime_estimate_us: estimate,
        downtime_budget_us: 10_000,
        may_throttle,
        guest_iops: 100_000,
        dirtied_per_s: 100_000,
        copied_per_s: 400_000,
        ..CopyRequest::default()
    };
    ask(policy, &view)
}

#[test]
fn switch_over_when_rounds_no_longer_help() {
    let mut policy = policy();
    assert_eq!(round(&mut policy, 0, 100_000, 9_000, false).then, Then::GoOn, "rounds may still help");
    assert_eq!(round(&mut policy, 1, 40_000, 9_000, false).then, Then::GoOn);
    assert_eq!(round(&mut policy, 2, 30_000, 10_001, false).then, Then::GoOn, "over the budget");
    assert_eq!(round(&mut policy, 3, 29_000, 10_000, false).then, Then::SwitchOver, "no longer shrinking");
    assert_eq!(round(&mut policy, 4, 1_000, 1_001, false).then, Then::GoOn);
    assert_eq!(round(&mut policy, 4, 1_000, 1_000, false).then, Then::SwitchOver, "cheap enough");
    assert_eq!(round(&mut policy, 4, 0, 5_000, false).then, Then::SwitchOver, "nothing left");
}

#[test]
fn the_guest_is_slowed_only_where_that_is_allowed_and_needed() {
    for may in [false, true] {
        let mut policy = policy();
        assert_eq!(round(&mut policy, 0, 100_000, 20_000, may).guest_iops_limit, 0);
        assert_eq!(round(&mut policy, 1, 90_000, 20_000, may).guest_iops_limit, 0);
        let limit = round(&mut policy, 2, 90_000, 20_000, may).guest_iops_limit;
        assert_eq!(limit, if may { 50_000 } else { 0 });
        let floor = round(&mut policy, 3, 90_000, 20_000, may).guest_iops_limit;
        assert_eq!(floor, if may { 50_000 } else { 0 });
    }
    let mut policy = policy();
    round(&mut policy, 1, 90_000, 20_000, true);
    assert_eq!(round(&mut policy, 2, 30_000, 20_000, true).guest_iops_limit, 0, "it converges");
}
