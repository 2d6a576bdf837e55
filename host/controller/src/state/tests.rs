use super::*;
use arrayvec::ArrayVec;
use proptest::prelude::*;

type Sq = (u64, u16, bool, u8, u16, u16, u16);
type Cq = (u64, u16, u16, u16, [bool; 3], u16);

fn sqs() -> impl Strategy<Value = Vec<SqSnapshot>> {
    let sq = (any::<u64>(), 1..=u16::MAX, any::<bool>(), 0..4u8, any::<u16>(), any::<u16>(), any::<u16>());
    prop::collection::vec(sq, 0..6).prop_map(|found| {
        let queue = |(i, sq): (usize, Sq)| {
            let (prp1, size, pc, qprio, cq, head, tail) = sq;
            let fit = |at: u16| (u32::from(at) % (u32::from(size) + 1)) as u16;
            let (qid, cqid) = (i as u16 * 3 + 1, cq % 4 + 1);
            SqSnapshot { prp1, entries_minus_1: size, qid, cqid, pc, qprio, head: fit(head), tail: fit(tail) }
        };
        found.into_iter().enumerate().map(queue).collect()
    })
}

fn cqs() -> impl Strategy<Value = Vec<CqSnapshot>> {
    let cq = (any::<u64>(), 1..=u16::MAX, 0..=1u16, 0..=1u16, any::<[bool; 3]>(), 0..u16::MAX);
    prop::collection::vec(cq, 4).prop_map(|found| {
        let queue = |(i, cq): (usize, Cq)| {
            let (qid, (prp1, size, head, tail, [pc, ien, phase], iv)) = (i as u16 + 1, cq);
            CqSnapshot { prp1, entries_minus_1: size, qid, head, tail, pc, ien, iv, phase }
        };
        found.into_iter().enumerate().map(queue).collect()
    })
}

fn vendor() -> impl Strategy<Value = VendorState> {
    let features = (any::<[u32; 6]>(), any::<[u16; 4]>(), any::<[u8; 3]>(), any::<[u64; 8]>(), any::<[u8; 16]>(), 0..1u64 << 48);
    let registers = (any::<[u32; 5]>(), any::<[u64; 2]>(), any::<[bool; 2]>(), any::<[u16; 4]>());
    let aers = prop::collection::btree_set(any::<u16>(), 0..=MAX_AERS);
    (features, registers, aers).prop_map(|(features, registers, aers)| {
        let ([a, b, c, d, e, f], [g, h, i, j], [k, l, m], coalescing_disabled, host_id, timestamp_ms) = features;
        let ([cc, csts, aqa, intms, bar_resets], [asq, acq], [admin_cq_phase, volatile_write_cache], at) = registers;
        let fit = |at: u16, size: u32| (u32::from(at) % ((size & 0xfff) + 1)) as u16;
        VendorState {
            cc,
            csts,
            aqa,
            asq,
            acq,
            intms,
            admin_sq_head: fit(at[0], aqa),
            admin_sq_tail: fit(at[1], aqa),
            admin_cq_head: fit(at[2], aqa >> 16),
            admin_cq_tail: fit(at[3], aqa >> 16),
            admin_cq_phase,
            bar_resets,
            aer_cids: aers.into_iter().collect(),
            masked_events: f,
            shadow_doorbells: (k & 1 == 1).then_some([acq, asq]),
            features: Features {
                arbitration: a,
                power_management: b,
                temperature_over: g,
                temperature_under: h,
                error_recovery: c,
                volatile_write_cache,
                coalescing_threshold: k,
                coalescing_time: l,
                coalescing_disabled,
                write_atomicity: d,
                async_event_config: e,
                timestamp_ms,
                timestamp_attributes: m,
                host_behavior: [m; 8],
                host_id,
                granted_sqs: i,
                granted_cqs: j,
                guest_limit: f,
            },
        }
    })
}

fn states() -> impl Strategy<Value = ControllerState> {
    (any::<bool>(), sqs(), cqs(), prop::option::of(vendor()))
        .prop_map(|(suspended, sqs, cqs, vendor)| ControllerState { suspended, sqs, cqs, vendor })
}

fn sample() -> ControllerState {
    let sq = SqSnapshot { prp1: 0x1000, entries_minus_1: 63, qid: 1, cqid: 1, pc: true, qprio: 2, head: 3, tail: 63 };
    let cq = CqSnapshot { prp1: 0x9000, entries_minus_1: 63, qid: 1, pc: true, ien: true, iv: 2, ..Default::default() };
    let vendor = VendorState {
        cc: 0x46_0001,
        aqa: 0x1f_001f,
        admin_sq_head: 4,
        aer_cids: ArrayVec::from_iter([7, 8]),
        ..Default::default()
    };
    ControllerState { suspended: true, sqs: vec![sq], cqs: vec![cq], vendor: Some(vendor) }
}

#[test]
fn parts_are_there_when_asked_for_and_refused_when_not_announced() {
    let state = sample();
    for (nvme, vendor) in [(false, false), (false, true), (true, false), (true, true)] {
        let bytes = encode(&state, nvme, vendor).expect("encode");
        let size = 48 + if nvme { 8 + 48 } else { 0 } + if vendor { VENDOR_BYTES } else { 0 };
        assert_eq!(bytes.len(), size);
        let back = decode(&bytes, nvme, vendor).expect("decode");
        assert_eq!((back.sqs.len(), back.vendor.is_some()), (usize::from(nvme), vendor));
        assert!(back.suspended);
        assert_eq!(decode(&bytes, false, vendor).is_err(), nvme);
        assert_eq!(decode(&bytes, nvme, false).is_err(), vendor);
    }
}

#[test]
fn queues_are_sorted_on_the_way_out_and_slot_0_holds_the_tag() {
    let mut state = sample();
    state.sqs.insert(0, SqSnapshot { qid: 9, ..state.sqs[0] });
    for (tail, phase, slot_0) in [(0, true, false), (0, false, true), (1, true, true), (1, false, false)] {
        state.cqs[0].tail = tail;
        state.cqs[0].phase = phase;
        let bytes = encode(&state, true, false).expect("encode");
        let cq = 48 + 8 + 2 * 24;
        assert_eq!(bytes[cq + 16] & 4 != 0, slot_0, "S0PT");
        let back = decode(&bytes, true, false).expect("decode");
        assert_eq!((back.sqs[0].qid, back.sqs[1].qid, back.cqs[0].phase), (1, 9, phase));
    }
}

#[test]
fn a_state_is_checked_against_a_controller() {
    let state = sample();
    let limits = QueueLimits { max_qid: 1, mqes: 63, vectors: 3 };
    assert_eq!(state.check(&limits), Ok(()));
    for narrow in [
        QueueLimits { max_qid: 0, ..limits },
        QueueLimits { mqes: 62, ..limits },
        QueueLimits { vectors: 2, ..limits },
    ] {
        assert_eq!(state.check(&narrow), Err(invalid()));
    }
    let mut orphan = state;
    orphan.cqs.clear();
    assert_eq!(orphan.check(&limits), Err(invalid()));
}

#[test]
fn a_vendor_part_that_contradicts_itself_is_refused() {
    let mut state = sample();
    let refused = |state: &ControllerState| decode(&encode(state, true, true).expect("encode"), true, true).is_err();
    assert!(!refused(&state));
    let vendor = state.vendor.clone().expect("vendor");
    state.vendor = Some(VendorState { admin_sq_head: 32, ..vendor.clone() });
    assert!(refused(&state));
    state.vendor = Some(VendorState { aer_cids: ArrayVec::from_iter([1, 2, 1]), ..vendor });
    assert!(refused(&state));
    let longer = MAX_STATE_QUEUES + 1;
    state.sqs = vec![SqSnapshot::default(); longer];
    assert_eq!(encode(&state, true, true), Err(Status::INTERNAL_ERROR));
}

fn part(seqind: SequenceIndicator, offset: u64, data: &[u8]) -> StatePart<'_> {
    StatePart { seqind, csvi: 1, csuuidi: 1, offset, data }
}

const FIRST: SequenceIndicator = SequenceIndicator::FIRST;
const MIDDLE: SequenceIndicator = SequenceIndicator::MIDDLE;
const LAST: SequenceIndicator = SequenceIndicator::LAST;
const ONLY: SequenceIndicator = SequenceIndicator::ONLY;

#[test]
fn a_sequence_yields_the_state() {
    let state = sample();
    let bytes = encode(&state, true, true).expect("encode");
    let mut sequence = StateSequence::default();
    assert_eq!(sequence.take(&part(ONLY, 0, &bytes)), Ok(Some(state.clone())));
    for piece in [4, 40, 48, 52, bytes.len() - 4] {
        assert_eq!(sequence.take(&part(FIRST, 0, b"drop")), Ok(None));
        assert_eq!(sequence.take(&part(FIRST, 0, &bytes[..piece])), Ok(None));
        assert!(sequence.is_open());
        let mut at = piece;
        while bytes.len() - at > piece {
            assert_eq!(sequence.take(&part(MIDDLE, at as u64, &bytes[at..at + piece])), Ok(None));
            at += piece;
        }
        assert_eq!(sequence.take(&part(LAST, at as u64, &bytes[at..])), Ok(Some(state.clone())));
        assert!(!sequence.is_open());
    }
    assert_eq!(sequence.take(&part(FIRST, 0, &bytes)), Ok(None));
    assert_eq!(sequence.take(&part(MIDDLE, 8, &bytes[8..16])), Ok(None), "a piece may come again");
    assert_eq!(sequence.take(&part(LAST, 0, &[])), Ok(Some(state)));
}

#[test]
fn a_sequence_out_of_order_is_refused_and_forgotten() {
    let bytes = encode(&sample(), true, true).expect("encode");
    let error = Err(Status::COMMAND_SEQUENCE.with_dnr());
    let mut sequence = StateSequence::default();
    assert_eq!(sequence.take(&part(MIDDLE, 0, &bytes)), error);
    assert_eq!(sequence.take(&part(LAST, 0, &[])), error);
    let long = vec![0; MAX_STATE_BYTES + 4];
    let (misaligned, gap) = (part(MIDDLE, 2, &bytes[..4]), part(MIDDLE, 64, &bytes[..4]));
    let beyond = part(MIDDLE, bytes.len() as u64, &[0; 4]);
    let other = StatePart { csuuidi: 0, ..part(MIDDLE, 48, &bytes[..4]) };
    let unknown = StatePart { csvi: 2, ..part(ONLY, 0, &bytes) };
    let nothing = StatePart { csvi: 0, csuuidi: 0, ..part(ONLY, 0, &bytes) };
    let early = part(LAST, 48, &bytes[48..52]);
    for (name, bad) in [
        ("misaligned", misaligned),
        ("gap", gap),
        ("far", part(MIDDLE, u64::MAX - 3, &bytes[..4])),
        ("beyond", beyond),
        ("other formats", other),
        ("unknown format", unknown),
        ("no format", nothing),
        ("empty", part(MIDDLE, 48, &[])),
        ("empty first", part(FIRST, 0, &[])),
        ("too long", part(FIRST, 0, &long)),
        ("early", early),
    ] {
        let end = if name == "beyond" { bytes.len() } else { 48 };
        assert_eq!(sequence.take(&part(FIRST, 0, &bytes[..end])), Ok(None));
        assert_eq!(sequence.take(&bad), Err(invalid()), "{name}");
        assert!(!sequence.is_open(), "{name}");
    }
    assert_eq!(sequence.take(&part(FIRST, 0, &bytes)), Ok(None));
    sequence.clear();
    assert_eq!(sequence.take(&part(LAST, 0, &[])), error);
}

proptest! {
    #[test]
    fn states_come_back_as_they_were(state in states()) {
        let bytes = encode(&state, true, true).expect("encode");
        prop_assert_eq!(decode(&bytes, true, true).expect("decode"), state);
    }

    #[test]
    fn what_is_cut_or_longer_is_refused(state in states(), cut in any::<prop::sample::Index>()) {
        let mut bytes = encode(&state, true, true).expect("encode");
        prop_assert_eq!(decode(&bytes[..cut.index(bytes.len())], true, true), Err(invalid()));
        bytes.extend_from_slice(&[0; 4]);
        prop_assert_eq!(decode(&bytes, true, true), Err(invalid()));
    }

    #[test]
    fn a_damaged_vendor_part_is_refused(vendor in vendor(), at in any::<prop::sample::Index>(), flip in 1..=u8::MAX) {
        let state = ControllerState { vendor: Some(vendor), ..ControllerState::default() };
        let mut bytes = encode(&state, false, true).expect("encode");
        let at = 48 + at.index(VENDOR_BYTES);
        bytes[at] ^= flip;
        prop_assert_eq!(decode(&bytes, false, true), Err(invalid()));
    }

    #[test]
    fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), head in any::<bool>()) {
        if head && bytes.len() > 48 {
            let dwords = (bytes.len() - 48) / 4;
            bytes[..48].fill(0);
            bytes[16] = dwords as u8 / 2;
            bytes[32] = dwords as u8 - dwords as u8 / 2;
        }
        let _state = decode(&bytes, true, true);
        let data = &bytes[..bytes.len() & !3];
        let _state = StateSequence::default().take(&part(ONLY, 0, data));
    }

    #[test]
    fn no_change_of_a_byte_panics(state in states(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = encode(&state, true, true).expect("encode");
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(state) = decode(&bytes, true, true) {
            prop_assert!(state.sqs.iter().all(|sq| sq.head.max(sq.tail) <= sq.entries_minus_1));
            prop_assert!(state.cqs.iter().all(|cq| cq.head.max(cq.tail) <= cq.entries_minus_1));
        }
    }
}
