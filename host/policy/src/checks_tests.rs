use super::*;
use crate::packed::{Choice, Compression, Region};
use proptest::prelude::*;

fn setup(namespaces: &[(u32, u64)]) -> Setup {
    Setup {
        migration: 1,
        seed: 1,
        now_us: 0,
        namespaces: namespaces.iter().map(|&(nsid, blocks)| NamespaceInfo { nsid, blocks, block_bytes: 512 }).collect(),
        regions: 1,
        region_bytes: REGION_BYTES as u32,
        settings: Vec::new(),
    }
}

const QUEUE: CdqQueue = CdqQueue { id: 0, kind: 0, cntlid: 1, slots: 64, entry_bytes: 32, phase_byte: 31, phase_mask: 1 };

fn cdq(setup: &Setup, entries: usize, consumed: u32, ranges: &[Range]) -> Result<(), Fault> {
    let request = CdqRequest { now_us: 0, entries: vec![0; entries * 32], waiting: 0 };
    let mut answer = CdqAnswer { consumed, ..CdqAnswer::default() };
    ranges.iter().for_each(|range| range.push(&mut answer.ranges));
    Cdq::check(setup, &QUEUE, &request, &answer)
}

fn range(nsid: u32, slba: u64, blocks: u32) -> Range {
    Range { slba, blocks, deallocated: false, nsid }
}

#[test]
fn cdq_bounds() {
    for set in [setup(&[(1, 100)]), setup(&[(1, 100), (5, 7)]), setup(&[(5, 7), (1, 100)])] {
        assert!(cdq(&set, 1, 1, &[range(1, 99, 1), range(1, 0, 0), range(1, 0, 100), range(1, 100, 0)]).is_ok());
        for bad in [range(1, 99, 2), range(1, u64::MAX, 1), range(2, 0, 1), range(0, 0, 1), range(1, 101, 0), range(1, 0, 101)] {
            assert!(matches!(cdq(&set, 1, 1, &[bad]), Err(Fault::Malformed(_))), "{bad:?}");
            assert!(cdq(&set, 2, 1, &[range(1, 0, 1), bad]).is_err());
        }
        assert!(cdq(&set, 1, 2, &[]).is_err());
        assert!(cdq(&set, 1, 0, &[range(1, 0, 1); 5]).is_err());
        assert!(cdq(&set, 0, 0, &[range(1, 0, 1)]).is_err());
    }
    assert!(cdq(&setup(&[]), 1, 1, &[range(0, 0, 0)]).is_err());
    let answer = CdqAnswer { ranges: vec![0; 17], ..CdqAnswer::default() };
    let request = CdqRequest { entries: vec![0; 64], ..CdqRequest::default() };
    assert!(Cdq::check(&setup(&[(1, 100)]), &QUEUE, &request, &answer).is_err());
}

#[test]
fn a_queue_of_no_stride_is_survived() {
    let queue = CdqQueue { entry_bytes: 0, ..QUEUE };
    let request = CdqRequest { entries: vec![0; 64], ..CdqRequest::default() };
    assert!(Cdq::check(&setup(&[(1, 1)]), &queue, &request, &CdqAnswer::default()).is_ok());
    assert_eq!(Cdq::omission(&setup(&[(1, 1)]), &queue, &request, &CdqAnswer { consumed: 2, ..CdqAnswer::default() }), None);
}

#[test]
fn an_omitted_range_is_named() {
    let set = setup(&[(1, 100)]);
    let mut request = CdqRequest { entries: vec![0; 64], ..CdqRequest::default() };
    for (at, slba) in [(0, 10), (32, 98)] {
        request.entries[at] = 1;
        request.entries[at + 4] = 7;
        request.entries[at + 8] = slba;
    }
    let omits = |consumed, ranges: &[Range]| {
        let mut answer = CdqAnswer { consumed, ..CdqAnswer::default() };
        ranges.iter().for_each(|range| range.push(&mut answer.ranges));
        Cdq::omission(&set, &QUEUE, &request, &answer).is_some()
    };
    assert!(!omits(2, &[range(1, 98, 2), range(1, 10, 4), range(1, 14, 4)]));
    assert!(!omits(2, &[range(1, 0, 0)]));
    assert!(!omits(1, &[range(1, 10, 8)]));
    assert!(omits(2, &[range(1, 10, 8)]));
    assert!(omits(2, &[range(1, 98, 2), range(1, 10, 7)]));
    assert!(omits(2, &[range(1, 98, 2), range(1, 10, 4), range(1, 15, 4)]));
    request.entries[31] = 0x86;
    assert!(Cdq::omission(&set, &QUEUE, &request, &CdqAnswer { consumed: 1, ..CdqAnswer::default() }).is_some());
}

fn tracking(blocks: &[u32], choices: &[u8]) -> Result<(), Fault> {
    let mut request = TrackingRequest::default();
    blocks.iter().for_each(|&blocks| Region { blocks, ..Region::default() }.push(&mut request.regions));
    Tracking::check(&setup(&[(1, 100)]), &(), &request, &TrackingAnswer { choices: choices.to_vec() })
}

#[test]
fn tracking_bounds() {
    assert!(tracking(&[], &[]).is_ok());
    assert!(tracking(&[16, 5], &[Choice { chunk_log2: 4, hold: true }.pack(), 3]).is_ok());
    for (blocks, choices) in [
        (&[16][..], &[][..]),
        (&[16], &[0, 0]),
        (&[16], &[5]),
        (&[5], &[4]),
        (&[0], &[1]),
        (&[u32::MAX], &[25]),
        (&[16], &[0x20]),
        (&[16], &[0x40]),
    ] {
        assert!(tracking(blocks, choices).is_err(), "{blocks:?} {choices:?}");
    }
    let mut request = TrackingRequest::default();
    Region::default().push(&mut request.regions);
    let mut answer = TrackingAnswer::default();
    Tracking::safe(&request, &mut answer);
    assert!(Tracking::check(&setup(&[]), &(), &request, &answer).is_ok());
}

fn copy(left: u64, queued: u64, answer: &CopyAnswer) -> Result<(), Fault> {
    let request = CopyRequest { left_blocks: left, queued_blocks: queued, ..CopyRequest::default() };
    Copy::check(&setup(&[(1, 100), (2, 10)]), &(), &request, answer)
}

#[test]
fn copy_bounds() {
    let of = |extents: &[Extent]| {
        let mut answer = CopyAnswer::default();
        extents.iter().for_each(|extent| extent.push(&mut answer.extents));
        answer
    };
    let good = Extent { slba: 90, blocks: 10, compression: Compression::ZSTD, nsid: 1 };
    assert!(copy(5, 0, &of(&[good, Extent { slba: 0, nsid: 2, ..good }])).is_ok());
    assert!(copy(5, 0, &of(&vec![good; MAX_EXTENTS])).is_ok());
    assert!(copy(5, 0, &of(&vec![good; MAX_EXTENTS + 1])).is_err());
    for bad in [
        Extent { blocks: 0, ..good },
        Extent { blocks: 11, ..good },
        Extent { nsid: 3, ..good },
        Extent { slba: u64::MAX, ..good },
        Extent { compression: Compression(3), ..good },
    ] {
        assert!(copy(5, 0, &of(&[good, bad])).is_err(), "{bad:?}");
    }
    assert!(copy(0, 0, &CopyAnswer { extents: vec![0; 15], ..CopyAnswer::default() }).is_err());

    let idle = CopyAnswer::default();
    assert!(copy(5, 4, &idle).is_err());
    assert!(copy(5, 5, &idle).is_ok() && copy(0, 0, &idle).is_ok() && copy(4, 5, &idle).is_ok());
    assert!(copy(5, 4, &CopyAnswer { wait_us: 1, ..CopyAnswer::default() }).is_ok());
    assert!(copy(5, 4, &CopyAnswer { then: Then::SwitchOver, ..CopyAnswer::default() }).is_ok());
    let mut safe = CopyAnswer::default();
    Copy::safe(&CopyRequest::default(), &mut safe);
    assert!(copy(5, 0, &safe).is_ok());
}

proptest! {
    /// Both ways of checking ranges agree, on any bytes.
    #[test]
    fn fast_and_slow_check_agree(bytes: Vec<[u8; 16]>, near: Vec<(u64, u32)>, blocks in 0u64..200) {
        let near = near.into_iter().map(|(slba, blocks)| range(1, slba % 200, blocks % 200).pack());
        for record in bytes.into_iter().chain(near) {
            let one = setup(&[(1, blocks)]);
            let two = setup(&[(1, blocks), (u32::MAX, 0)]);
            let unpacked = Range::unpack(&record);
            let slow = cdq(&two, 1, 0, &[unpacked]);
            if unpacked.nsid != u32::MAX {
                prop_assert_eq!(cdq(&one, 1, 0, &[unpacked]), slow);
            }
        }
    }
}
