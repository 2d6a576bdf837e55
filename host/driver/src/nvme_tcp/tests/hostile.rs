//! PDUs that no target may send: each ends the connection with its fault, and nothing is lost or comes twice.

use super::super::connection::Connection;
use super::super::table::Shape;
use super::*;
use dray_device::memory::{PAGE, Segment};
use dray_device::socket::{Stream, UnixSocket};
use dray_nvme::command::{CompletionEntry, StatusPhase};
use dray_nvme::tcp::pdu::{CapsuleCmd, CapsuleResp, CommonHeader, DataPdu, FatalError, IcResp, PduFlags, PduType, R2t, TermReq};
use proptest::prelude::*;
use std::io::IoSlice;
use zerocopy::{FromBytes, IntoBytes};

const READ: u64 = 1;
const WRITE: u64 = 2;

fn opening() -> IcResp {
    let ch = CommonHeader { pdu_type: PduType::IC_RESP, hlen: 128, plen: 128, ..CommonHeader::default() };
    IcResp { ch, maxh2cdata: 4096, ..IcResp::default() }
}

fn response(cid: u16, status: Status) -> CapsuleResp {
    let ch = CommonHeader { pdu_type: PduType::CAPSULE_RESP, hlen: 24, plen: 24, ..CommonHeader::default() };
    let status_phase = StatusPhase::new().with_status(status);
    CapsuleResp { ch, cqe: CompletionEntry { cid, status_phase, ..CompletionEntry::default() } }
}

fn data(cccid: u16, datao: u32, datal: u32, flags: PduFlags) -> DataPdu {
    let ch = CommonHeader { pdu_type: PduType::C2H_DATA, flags, hlen: 24, pdo: 24, plen: datal.wrapping_add(24) };
    DataPdu { ch, cccid, ttag: 0, datao, datal, rsvd20: 0 }
}

fn r2t(cccid: u16, r2to: u32, r2tl: u32) -> R2t {
    let ch = CommonHeader { pdu_type: PduType::R2T, hlen: 24, plen: 24, ..CommonHeader::default() };
    R2t { ch, cccid, ttag: 3, r2to, r2tl, rsvd20: 0 }
}

fn flags() -> PduFlags {
    PduFlags::new()
}

/// A connection with a read and a write of 8 KiB outstanding, and the target's end of it.
struct Pair {
    connection: Connection,
    peer: UnixSocket,
    memory: DmaBuffer,
    read: u16,
    write: u16,
    ended: Vec<Completion>,
}

impl Pair {
    fn new() -> Self {
        let (peer, stream) = UnixSocket::pair().expect("a pair");
        let shape = Shape { depth: 4, max_transfer: 64 << 10, in_capsule: 4096 };
        let mut connection = Connection::new(Box::new(stream), Digests::new(), shape, 1 << 40);
        let memory = memory(4 * PAGE);
        memory.segment().write(&[0xEE; 4 * PAGE]);
        let [into, from]: [Segment<'_>; 2] = [0, 2].map(|page| memory.part(page * PAGE, 2 * PAGE).expect("a part"));
        connection.submit(Time(0), None, &SubmissionEntry::read(1, 0, 16), &[into], READ, true).expect("room");
        connection.submit(Time(0), None, &SubmissionEntry::write(1, 0, 16), &[from], WRITE, true).expect("room");
        Self { connection, peer, memory, read: 0, write: 0, ended: Vec::new() }
    }

    /// With the connection opened and both commands sent.
    fn opened() -> Self {
        let mut pair = Self::new();
        pair.send(opening().as_bytes());
        let mut sent = [0; 1024];
        let got = pair.peer.recv(&mut sent, &mut Vec::new()).expect("what was sent");
        assert_eq!(got, 128 + 2 * 72, "ICReq and two capsules");
        let cid = |at: usize| CapsuleCmd::read_from_prefix(&sent[at..]).expect("a capsule").0.sqe.cdw0.cid();
        (pair.read, pair.write) = (cid(128), cid(200));
        pair
    }

    fn send(&mut self, bytes: &[u8]) {
        self.connection.commit();
        let _went = self.peer.send(&[IoSlice::new(bytes)], &[]);
        let ended = &mut self.ended;
        for _ in 0..3 {
            self.connection.poll(Time(1), &mut |completion| ended.push(completion));
        }
    }

    fn send_data(&mut self, header: &DataPdu) {
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(header.ch.plen as usize, 0x11);
        self.send(&bytes);
    }

    /// The fault; every command has come back once, and those that had not ended as unknown.
    fn fault(mut self) -> TcpFault {
        let ended = &mut self.ended;
        self.connection.poll(Time(2), &mut |completion| ended.push(completion));
        let fault = self.connection.fault().expect("a fault");
        let mut tags: Vec<u64> = self.ended.iter().map(|completion| completion.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [READ, WRITE]);
        fault
    }
}

#[test]
fn honest_pdus_end_both_commands() {
    let mut pair = Pair::opened();
    let (read, write) = (pair.read, pair.write);
    pair.send_data(&data(read, 0, 4096, flags()));
    pair.send_data(&data(read, 4096, 4096, flags().with_last(true).with_success(true)));
    pair.send(r2t(write, 0, 8192).as_bytes());
    pair.send(response(write, Status::SUCCESS).as_bytes());
    assert_eq!(pair.ended.iter().map(|c| (c.tag, c.unknown)).collect::<Vec<_>>(), [(READ, false), (WRITE, false)]);
    let mut bytes = vec![0; 4 * PAGE];
    pair.memory.segment().read(&mut bytes);
    assert!(bytes[..2 * PAGE].iter().all(|byte| *byte == 0x11) && bytes[2 * PAGE..].iter().all(|byte| *byte == 0xEE));
    assert_eq!(pair.connection.fault(), None);
    // Whatever speaks of an ended command has a new identifier to use.
    pair.send(response(read, Status::SUCCESS).as_bytes());
    assert_eq!(pair.connection.fault(), Some(TcpFault::UnknownCommand { cid: read }));
}

#[test]
fn data_out_of_place_is_a_fault() {
    let faults = |run: &dyn Fn(&mut Pair)| {
        let mut pair = Pair::opened();
        run(&mut pair);
        let mut bytes = vec![0; 2 * PAGE];
        pair.memory.part(2 * PAGE, 2 * PAGE).expect("a part").read(&mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0xEE), "memory of another command");
        let cids = (pair.read, pair.write);
        (pair.fault(), cids)
    };
    let range = |run: &dyn Fn(&mut Pair)| {
        let (fault, (read, write)) = faults(run);
        let expected = [read, write].map(|cid| TcpFault::DataRange { cid });
        assert!(expected.contains(&fault), "{fault:?}");
    };
    range(&|pair| pair.send_data(&data(pair.read, 4096, 4096, flags())));
    range(&|pair| pair.send_data(&data(pair.read, 0, 8196, flags())));
    range(&|pair| pair.send_data(&data(pair.read, u32::MAX - 3, 8, flags())));
    range(&|pair| pair.send_data(&data(pair.write, 0, 4096, flags())));
    range(&|pair| {
        pair.send_data(&data(pair.read, 0, 4096, flags()));
        pair.send_data(&data(pair.read, 0, 4096, flags()));
    });
    range(&|pair| pair.send(r2t(pair.read, 0, 4096).as_bytes()));
    range(&|pair| pair.send(r2t(pair.write, 0, 8193).as_bytes()));
    range(&|pair| pair.send(r2t(pair.write, 4, 4096).as_bytes()));
    range(&|pair| pair.send(r2t(pair.write, 0, 0).as_bytes()));
    range(&|pair| {
        pair.send(r2t(pair.write, 0, 4096).as_bytes());
        pair.send(r2t(pair.write, 0, 4096).as_bytes());
    });
    // The second comes before the first can have been served.
    let (fault, (_, cid)) = faults(&|pair| {
        let both = [r2t(pair.write, 0, 4096), r2t(pair.write, 4096, 4096)];
        pair.send(both.as_bytes());
    });
    assert_eq!(fault, TcpFault::TooManyR2ts { cid });
    // A success that lies.
    let (fault, (cid, _)) = faults(&|pair| pair.send(response(pair.read, Status::SUCCESS).as_bytes()));
    assert_eq!(fault, TcpFault::ShortData { cid });
    let (fault, (_, cid)) = faults(&|pair| pair.send(response(pair.write, Status::SUCCESS).as_bytes()));
    assert_eq!(fault, TcpFault::ShortData { cid });
    let (fault, _) = faults(&|pair| {
        let mut bytes = r2t(pair.write, 0, 8192).as_bytes().to_vec();
        bytes.extend_from_slice(response(pair.write, Status::INVALID_FIELD).as_bytes());
        pair.send(&bytes);
    });
    assert_eq!(fault, TcpFault::Sequence, "it ends while its data is asked for");
    let last = flags().with_success(true);
    assert_eq!(faults(&|pair| pair.send_data(&data(pair.read, 0, 8192, last))).0, TcpFault::Header { offset: 1 });
    let early = last.with_last(true);
    assert_eq!(faults(&|pair| pair.send_data(&data(pair.read, 0, 4096, early))).0, TcpFault::Header { offset: 1 });
}

#[test]
fn commands_that_are_not_outstanding_are_a_fault() {
    for cid in [0xFFFF, 3, 0x0FFF, 0x2001] {
        let unknown = TcpFault::UnknownCommand { cid };
        let mut pair = Pair::opened();
        pair.send(response(cid, Status::SUCCESS).as_bytes());
        assert_eq!(pair.fault(), unknown);
        let mut pair = Pair::opened();
        pair.send_data(&data(cid, 0, 4, flags()));
        assert_eq!(pair.fault(), unknown);
        let mut pair = Pair::opened();
        pair.send(r2t(cid, 0, 4).as_bytes());
        assert_eq!(pair.fault(), unknown);
    }
}

#[test]
fn a_command_that_was_not_sent_cannot_be_answered() {
    let mut pair = Pair::opened();
    pair.connection.submit(Time(0), None, &SubmissionEntry::flush(1), &[], 3, true).expect("room");
    // The next place, used for the first time; what comes is looked at before the flush goes.
    let cid = 0x1002;
    let sent = pair.peer.send(&[IoSlice::new(response(cid, Status::SUCCESS).as_bytes())], &[]);
    assert_eq!(sent.expect("room"), 24);
    let mut unknown = 0;
    pair.connection.poll(Time(1), &mut |completion| unknown += u32::from(completion.unknown));
    assert_eq!((pair.connection.fault(), unknown), (Some(TcpFault::UnknownCommand { cid }), 3));
}

#[test]
fn headers_that_do_not_fit_are_a_fault() {
    let fault = |pdu: &[u8]| {
        let mut pair = Pair::opened();
        pair.send(pdu);
        pair.fault()
    };
    let cid = Pair::opened().read;
    let changed = |at: usize, value: u8| {
        let mut bytes = response(cid, Status::INVALID_FIELD).as_bytes().to_vec();
        bytes[at] = value;
        bytes
    };
    assert_eq!(fault(&changed(0, 8)), TcpFault::Header { offset: 0 });
    assert_eq!(fault(&changed(0, 4)), TcpFault::Sequence, "a host's PDU");
    assert_eq!(fault(&changed(1, 1)), TcpFault::Header { offset: 1 }, "a digest that was not agreed");
    assert_eq!(fault(&changed(2, 23)), TcpFault::Header { offset: 2 });
    assert_eq!(fault(&changed(4, 25)), TcpFault::Header { offset: 4 });
    assert_eq!(fault(&changed(7, 0xFF)), TcpFault::Header { offset: 4 });
    assert!(matches!(fault(&changed(23, 0x0A)), TcpFault::ReservedStatus { .. }));
    assert_eq!(fault(opening().as_bytes()), TcpFault::Sequence, "opened twice");
    for (pdo, plen, at) in [(20, 28, 3), (25, 29, 3), (24, 27, 4), (24, 29, 4), (255, 259, 3)] {
        let mut header = data(cid, 0, 4, flags());
        (header.ch.pdo, header.ch.plen) = (pdo, plen);
        assert_eq!(fault(header.as_bytes()), TcpFault::Header { offset: at }, "PDO {pdo}, PLEN {plen}");
    }
    let mut header = data(cid, 0, u32::MAX, flags());
    header.ch.plen = 23;
    assert_eq!(fault(header.as_bytes()), TcpFault::Header { offset: 4 });
    let mut empty = data(cid, 0, 0, flags());
    empty.ch.plen = 28;
    empty.ch.pdo = 28;
    assert_eq!(fault(empty.as_bytes()), TcpFault::Header { offset: 16 });
    let term = TermReq::new(PduType::C2H_TERM_REQ, FatalError::SEQUENCE, 9, 0);
    assert_eq!(fault(term.as_bytes()), TcpFault::Terminated { fes: FatalError::SEQUENCE, fei: 9 });
}

#[test]
fn a_connection_that_is_not_opened_takes_no_answers() {
    let mut pair = Pair::new();
    pair.send(response(0x1000, Status::SUCCESS).as_bytes());
    assert_eq!(pair.fault(), TcpFault::Sequence);
    for (at, offset) in [(8, 8), (10, 10), (11, 11), (13, 12), (12, 12)] {
        let mut bytes = opening().as_bytes().to_vec();
        bytes[at] = if at == 10 { 32 } else { bytes[at] ^ if at == 13 { 0x18 } else { 1 } };
        let mut pair = Pair::new();
        pair.send(&bytes);
        assert_eq!(pair.fault(), TcpFault::Parameters { offset });
    }
}

#[test]
fn the_target_is_told_why() {
    let mut pair = Pair::opened();
    pair.send(response(0x1234, Status::SUCCESS).as_bytes());
    let mut told = [0; 64];
    let got = pair.peer.recv(&mut told, &mut Vec::new()).expect("a PDU");
    let term = TermReq::read_from_bytes(&told[..got]).expect("a termination");
    assert_eq!((term.ch.pdu_type, term.fes), (PduType::H2C_TERM_REQ, FatalError::INVALID_HEADER_FIELD));
    assert_eq!(pair.peer.recv(&mut told, &mut Vec::new()).expect("the end"), 0);
}

#[test]
fn wrong_digests_are_faults() {
    for (place, wrong) in [(25, true), (30, false)] {
        let traits = Traits::default();
        let mut bench = Bench::new(traits.clone(), config(&traits));
        assert_eq!(bench.settle(), TcpState::Ready);
        let mut queue = bench.open(8).expect("a queue");
        let buffer = memory(512);
        queue.submit(bench.now, &SubmissionEntry::read(1, 0, 1), &[buffer.segment()], 1).expect("room");
        queue.commit();
        // Behind the digests, on the wire.
        bench.targets[1].corrupt = Some(place);
        let ended = bench.run(&mut queue, 1);
        assert!(ended[0].unknown);
        let fault = queue.fault().expect("a fault");
        assert!(if wrong { matches!(fault, TcpFault::HeaderDigest { .. }) } else { fault == TcpFault::DataDigest }, "{fault:?}");
    }
}

proptest! {
    /// Whatever comes, in whatever pieces: no panic, every command once, no byte outside the read's memory.
    #[test]
    fn no_bytes_panic(
        pdus in proptest::collection::vec((0u8..6, any::<[u8; 20]>(), 0usize..24, any::<u8>()), 1..8),
        cut in 1usize..40,
    ) {
        let mut pair = Pair::opened();
        let (read, write) = (pair.read, pair.write);
        let mut bytes = Vec::new();
        for (kind, random, at, value) in pdus {
            let start = bytes.len();
            let number = u32::from_le_bytes([random[0], random[1], 0, 0]) & 0x3FFC;
            match kind {
                0 => bytes.extend_from_slice(response(read, Status::SUCCESS).as_bytes()),
                1 => bytes.extend_from_slice(response(write, Status::INVALID_FIELD).as_bytes()),
                2 | 3 => {
                    bytes.extend_from_slice(data(read, if kind == 2 { 0 } else { number }, 64, flags()).as_bytes());
                    bytes.resize(start + 24 + 64, random[2]);
                }
                4 => bytes.extend_from_slice(r2t(write, 0, number).as_bytes()),
                _ => bytes.extend_from_slice(&random),
            }
            if random[3] & 1 == 1 && start + at < bytes.len() {
                bytes[start + at] = value;
            }
        }
        for piece in bytes.chunks(cut) {
            pair.send(piece);
        }
        let mut memory = vec![0; 2 * PAGE];
        pair.memory.part(2 * PAGE, 2 * PAGE).expect("a part").read(&mut memory);
        prop_assert!(memory.iter().all(|byte| *byte == 0xEE));
        pair.connection.fail(TcpFault::Ended);
        let _fault = pair.fault();
    }
}
