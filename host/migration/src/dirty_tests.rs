use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn runs(map: &DirtyMap) -> Vec<(u64, u64)> {
    let (mut at, mut out) = (0, Vec::new());
    while let Some((slba, blocks)) = map.next_run(at, u64::MAX, u64::MAX) {
        out.push((slba, blocks));
        at = slba + blocks;
    }
    out
}

#[test]
fn marking_rounds_outwards_and_taking_inwards() {
    let mut map = DirtyMap::new(1000, 512);
    assert_eq!(map.mark(7, 2), 2, "two granules of eight blocks are touched");
    assert_eq!(runs(&map), [(0, 16)]);
    assert_eq!(map.take(1, 14), 0, "neither granule lies within");
    assert_eq!(map.take(1, 15), 1);
    assert_eq!(runs(&map), [(0, 8)]);
    map.mark(996, 100);
    assert_eq!(runs(&map), [(0, 8), (992, 8)], "a namespace may end within a word");
    let mut short = DirtyMap::new(1001, 512);
    short.mark(1000, 1);
    assert_eq!(runs(&short), [(1000, 1)], "the last granule is short");
    assert_eq!(short.take(1000, 1), 1);
}

#[test]
fn what_lies_outside_changes_nothing() {
    let mut map = DirtyMap::new(100, 4096);
    assert_eq!((map.mark(100, 1), map.mark(u64::MAX, 5), map.mark(3, 0)), (0, 0, 0));
    assert_eq!(map.mark(99, u64::MAX), 1);
    assert!(map.all_marked(99, u64::MAX) && !map.all_marked(98, 2));
    assert_eq!(map.take(u64::MAX, u64::MAX), 0);
}

#[test]
fn sixteen_tebibytes_fit_and_an_empty_map_is_passed_over() {
    let blocks = (16u64 << 40) / 4096;
    let mut map = DirtyMap::new(blocks, 4096);
    let share = (16u64 << 40) / 32_768;
    assert!(map.memory_bytes() <= share + share / 50, "{} bytes", map.memory_bytes());
    assert_eq!(map.next_run(0, blocks, 1), None);
    map.mark(blocks - 1, 1);
    assert_eq!(map.next_run(0, blocks, 1), Some((blocks - 1, 1)));
    map.mark(12345, 70);
    assert_eq!(map.next_run(3, blocks, 1 << 20), Some((12345, 70)));
    assert!(map.clear_some(8) && map.is_empty());
}

#[test]
fn memory_is_within_its_share_for_small_namespaces_too() {
    for gib in [1u64, 3, 64] {
        let map = DirtyMap::new((gib << 30) / 512, 512);
        let share = (gib << 30) / 32_768;
        assert!(map.memory_bytes() <= share + share / 50, "{gib} GiB: {}", map.memory_bytes());
    }
}

proptest! {
    #[test]
    fn equals_a_set_of_granules(
        blocks in 1u64..40_000,
        shift in 0u32..4,
        steps in prop::collection::vec((any::<bool>(), 0u64..41_000, 0u64..3000), 1..60),
    ) {
        let mut map = DirtyMap::new(blocks, 4096 >> shift);
        let mut model = BTreeSet::new();
        let granule = 1u64 << shift;
        for (mark, slba, count) in steps {
            let end = (slba + count).min(blocks);
            if mark {
                let mut newly = 0;
                for block in slba..end {
                    newly += u64::from(model.insert(block / granule));
                }
                prop_assert_eq!(map.mark(slba, count), newly);
                prop_assert!(map.all_marked(slba, count));
            } else {
                let whole = |g: &u64| g * granule >= slba && ((g + 1) * granule).min(blocks) <= end;
                let gone: Vec<u64> = model.iter().copied().filter(whole).collect();
                for g in &gone {
                    model.remove(g);
                }
                prop_assert_eq!(map.take(slba, count), gone.len() as u64);
            }
            prop_assert_eq!(map.set_granules(), model.len() as u64);
        }
        let mut found = BTreeSet::new();
        for (slba, count) in runs(&map) {
            prop_assert!(slba + count <= blocks);
            found.extend((slba..slba + count).map(|block| block / granule));
        }
        prop_assert_eq!(found, model);
        prop_assert!(map.clear_some(usize::MAX));
        prop_assert_eq!(map.next_run(0, blocks, 9), None);
    }
}
