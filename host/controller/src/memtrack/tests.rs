use super::*;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::space::AddressSpace;
use dray_nvme::track::{TrackMemoryHeader, parse_track_receive};
use proptest::prelude::*;
use std::collections::BTreeSet;

const LIMITS: TrackLimits = TrackLimits { min_granule: 0, max_granule: 8, max_ranges: 4, max_granules: 1 << 16 };

fn request(granule: u8, ranges: &[(u64, u32)]) -> Vec<u8> {
    let header = TrackMemoryHeader { rmrtg: granule, rnmrtd: ranges.len() as u32, ..Default::default() };
    let mut bytes = header.as_bytes().to_vec();
    for &(saddr, len) in ranges {
        bytes.extend_from_slice(TrackMemoryDescriptor { saddr: saddr.into(), len: len.into() }.as_bytes());
    }
    bytes
}

fn tracker(granule: u8, ranges: &[(u64, u32)]) -> MemoryTracker {
    MemoryTracker::parse(&request(granule, ranges), &LIMITS).expect("tracker")
}

/// One report: more, suspended, ranges.
fn report(tracker: &mut MemoryTracker, suspended: bool, max_bytes: usize) -> (bool, bool, Vec<(u64, u32)>) {
    let mut out = vec![0xee; 4096];
    let bytes = tracker.receive(suspended, 5, max_bytes, &mut out).expect("report");
    let (header, found) = parse_track_receive(&out[..bytes]).expect("well formed");
    assert_eq!((header.cntlid, header.rpmpg), (5, u16::from(tracker.granule)));
    assert!(out[bytes..].iter().all(|byte| *byte == 0xee), "nothing behind the report");
    (header.flags.mtr(), header.flags.susp(), found.iter().map(|d| (d.saddr.get(), d.len.get())).collect())
}

#[test]
fn what_was_written_is_reported_once() {
    let mut tracker = tracker(0, &[(0x10_0000, 256), (0x40_0000, 3)]);
    tracker.written(0x10_0fff, 2);
    tracker.written(0x10_2000, 4096);
    tracker.written(0x10_2000, 0);
    tracker.written(0x40_2fff, 100);
    tracker.written(0x30_0000, 100);
    tracker.written(u64::MAX, 9);
    let all = vec![(0x10_0000, 3), (0x40_2000, 1)];
    assert_eq!(report(&mut tracker, true, 4096), (false, true, all));
    assert_eq!(report(&mut tracker, false, 4096), (false, false, vec![]));
}

#[test]
fn one_write_over_several_ranges_marks_them_all() {
    let mut tracker = tracker(1, &[(0x2_0000, 2), (0x1_0000, 2), (0x3_0000, 200)]);
    tracker.written(0x1_3fff, 0x2_2001);
    assert_eq!(report(&mut tracker, false, 4096).2, [(0x1_2000, 1), (0x2_0000, 2), (0x3_0000, 3)]);
    tracker.written(0, usize::MAX);
    assert_eq!(report(&mut tracker, false, 4096).2.iter().map(|(_, len)| len).sum::<u32>(), 204);
}

#[test]
fn a_small_buffer_gets_the_rest_next_time_and_nothing_hides_behind_a_hot_page() {
    let mut tracker = tracker(0, &[(0, 1000)]);
    for page in [0, 100, 200] {
        tracker.written(page << 12, 1);
    }
    assert_eq!(report(&mut tracker, false, 32), (true, false, vec![(0, 1)]));
    tracker.written(0, 1);
    assert_eq!(report(&mut tracker, false, 47), (true, false, vec![(100 << 12, 1)]));
    tracker.written(0, 1);
    assert_eq!(report(&mut tracker, true, 32), (true, true, vec![(200 << 12, 1)]));
    assert_eq!(tracker.receive(false, 5, 31, &mut [0; 64]), Err(Status::INVALID_FIELD.with_dnr()));
    assert_eq!(report(&mut tracker, true, 32), (false, true, vec![(0, 1)]));
    assert_eq!(tracker.receive(false, 5, 16, &mut [0; 64]), Ok(16));
    assert_eq!(tracker.receive(false, 5, 64, &mut [0; 15]), Err(Status::INVALID_FIELD.with_dnr()));
}

#[test]
fn odd_requests_are_refused() {
    let refused = |bytes: &[u8]| MemoryTracker::parse(bytes, &LIMITS).err().map(Status::from);
    let invalid = Some(Status::INVALID_FIELD.with_dnr());
    assert_eq!(refused(&request(0, &[(0x1000, 1), (0x2000, 1)])), None);
    assert_eq!(refused(&request(0, &[])), invalid);
    assert_eq!(refused(&request(0, &[(0x1000, 1); 5])), invalid);
    assert_eq!(refused(&request(9, &[(0, 1)])), invalid);
    assert_eq!(refused(&request(1, &[(0x1000, 1)])), invalid, "not on its granule");
    assert_eq!(refused(&request(0, &[(0x1000, 0)])), invalid);
    assert_eq!(refused(&request(0, &[(u64::MAX - 0xfff, 2)])), invalid);
    assert_eq!(refused(&request(0, &[(u64::MAX - 0xfff, 1)])), None);
    assert_eq!(refused(&request(0, &[(0x1000, 2), (0x2000, 1)])), invalid, "overlap");
    let mut bytes = request(0, &[(0x1000, 1)]);
    assert_eq!(refused(&bytes[..19]), invalid);
    bytes[0] = 1;
    assert_eq!(refused(&bytes), invalid, "version");
}

#[test]
fn too_much_memory_is_refused_with_what_would_work() {
    let refusal = MemoryTracker::parse(&request(0, &[(0, 1 << 20)]), &LIMITS).expect_err("too large");
    assert_eq!(refusal, TrackRefusal { status: Status::NOT_ENOUGH_RESOURCES, result: 5 | 1 << 32 });
    let again = 1 << (20 - 5);
    assert!(MemoryTracker::parse(&request(5, &[(0, again)]), &LIMITS).is_ok());
    let hopeless = MemoryTracker::parse(&request(0, &[(0, u32::MAX)]), &LIMITS).expect_err("too large");
    assert_eq!(hopeless.result, 0);
}

#[test]
fn ranges_must_be_memory() {
    let space = AddressSpace::new(40);
    let page = DmaBuffer::allocate("ram", 4 * 4096, Pages::Small).expect("memory");
    space.map_at(0x10_0000, &page, true).expect("map");
    space.map_at(0x10_4000, &page, true).expect("map");
    space.map_at(0x10_8000, &page, false).expect("map");
    let reader = space.reader();
    for (range, fits) in [
        ((0x10_0000, 8), true),
        ((0x10_3000, 2), true),
        ((0x10_0000, 9), false),
        ((0x10_8000, 1), false),
        ((0xf_f000, 2), false),
    ] {
        assert_eq!(tracker(0, &[range]).is_memory(&reader), fits, "{range:x?}");
    }
}

proptest! {
    #[test]
    fn reports_are_what_was_written(
        writes in prop::collection::vec((0u64..0x40_0000, 0usize..0x9000), 0..60),
        room in 1usize..9,
        granule in 0u8..4,
    ) {
        let bytes = 4096u64 << granule;
        let ranges = [(0, 17), (bytes * 17, 100), (bytes * 130, 64)];
        let mut tracker = tracker(granule, &ranges);
        let mut expected = BTreeSet::new();
        for &(iova, len) in &writes {
            tracker.written(iova, len);
            if len > 0 {
                let pages = iova / bytes..=(iova + len as u64 - 1) / bytes;
                expected.extend(pages.filter(|page| *page < 117 || (130..194).contains(page)));
            }
        }
        let mut found = BTreeSet::new();
        loop {
            let (more, _, part) = report(&mut tracker, false, 16 + 16 * room);
            for (saddr, len) in part {
                for page in saddr / bytes..saddr / bytes + u64::from(len) {
                    prop_assert!(found.insert(page), "reported twice");
                }
            }
            if !more {
                break;
            }
        }
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn no_request_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        if let Ok(mut tracker) = MemoryTracker::parse(&bytes, &LIMITS) {
            tracker.written(0, 1 << 40);
            let _bytes = tracker.receive(true, 0, 4096, &mut [0; 4096]);
        }
    }
}
