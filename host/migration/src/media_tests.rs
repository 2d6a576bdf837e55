use super::*;
use dray_policy::packed;

fn media(list: &[(u32, u64, u32)]) -> Media {
    let geometry = |&(nsid, blocks, block_bytes)| Geometry { source: nsid, destination: nsid, blocks, block_bytes };
    Media::new(&list.iter().map(geometry).collect::<Vec<_>>()).expect("media")
}

fn regions(media: &Media) -> Vec<Region> {
    let mut out = Vec::new();
    media.pack(50, &mut out);
    packed::regions(&out).collect()
}

#[test]
fn counters_follow_the_map_over_region_bounds() {
    let mut media = media(&[(2, 5000, 512), (1, 1000, 4096)]);
    assert_eq!(media.find(2), Some(1));
    let n = media.namespace(1).expect("namespace");
    assert_eq!(n.region_blocks(), 2048);
    n.mark(2040, 20);
    n.mark_reported(2040, 20, 7);
    let seen: Vec<_> = regions(&media)[4..].iter().map(|r| (r.slba, r.blocks, r.dirty, r.changed, r.idle_ms)).collect();
    assert_eq!(seen, [(0, 2048, 8, 8, 43), (2048, 2048, 16, 12, 43), (4096, 904, 0, 0, NEVER)]);
    let n = media.namespace(1).expect("namespace");
    assert_eq!(n.take(2040, 16), 2);
    assert_eq!((n.dirty_blocks(), n.dirty_within(0, 5000)), (8, 8));
}

#[test]
fn everything_is_marked_in_pieces_and_never_clean_before() {
    let mut media = media(&[(1, (4u64 << 40) / 4096, 4096)]);
    media.mark_everything();
    let mut calls = 0;
    while media.fill_some() {
        assert!(!media.is_clean());
        calls += 1;
    }
    assert!(calls > 100, "{calls} calls");
    assert_eq!(media.dirty_bytes(), 4 << 40);
    assert!(regions(&media).len() <= MAX_REGIONS);
}

#[test]
fn chunks_and_held_regions_are_the_plans() {
    let mut media = media(&[(1, 4096, 4096)]);
    media.mark_everything();
    media.fill_some();
    media.plan(&[0x83, 2, 0, 0x80 | 5]);
    let n = &media.namespaces()[0];
    assert_eq!(n.next_run(257, 4096, 100), Some((257, 3)), "to the end of an aligned chunk of four");
    assert_eq!(n.next_run(0, 4096, 3), Some((0, 3)));
    assert!(n.regions[0].held && !n.regions[1].held && n.regions.len() == 16);
    assert_eq!(media.held_blocks(), 512);
}

#[test]
fn what_was_not_flushed_comes_back() {
    let mut media = media(&[(1, 10_000, 512)]);
    let n = media.namespace(0).expect("namespace");
    n.mark(0, 64);
    n.take(0, 64);
    n.copied(0, 64);
    assert!(n.is_clean());
    n.merge_unflushed();
    assert_eq!(n.dirty_blocks(), 64);
    assert!(n.flushed_some(100));
    assert!(n.unflushed().is_empty());
}

#[test]
fn odd_namespaces_are_refused() {
    let g = Geometry { source: 1, destination: 1, blocks: 10, block_bytes: 512 };
    assert_eq!(Media::new(&[]).err(), Some(GeometryError::Count(0)));
    assert_eq!(Media::new(&[g, g]).err(), Some(GeometryError::Twice(1)));
    assert!(matches!(Media::new(&[Geometry { block_bytes: 520, ..g }]), Err(GeometryError::Odd { .. })));
    assert!(matches!(Media::new(&[Geometry { blocks: 0, ..g }]), Err(GeometryError::Odd { .. })));
}
