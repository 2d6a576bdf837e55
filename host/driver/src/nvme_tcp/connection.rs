//! One connection: bytes to and from a stream, polled.

use super::error::TcpFault;
use super::receive::Receiver;
use super::table::{Incoming, Peer, Shape, Table, Work};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::Segment;
use dray_device::poll::Time;
use dray_device::socket::Stream;
use dray_nvme::command::{SglDescriptor, SubmissionEntry};
use dray_nvme::tcp::pdu::{
    CapsuleCmd, CommonHeader, DIGEST_BYTES, DataPdu, Digests, IcReq, PduFlags, PduType, TermReq, data_offset,
};
use std::io::{ErrorKind, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use zerocopy::IntoBytes;

/// Bytes that are sent, and that are received, by one poll.
const POLL_BYTES: usize = 64 << 10;
/// Most that a PDU has around its data: the longest header with its digest, aligned (CPDA 31), and the data digest.
const AROUND: usize = 128 + 128 + DIGEST_BYTES;
/// Most data of one H2CData PDU, and room for one with all that is around it.
const CHUNK: usize = 32 << 10;
const OUT_BYTES: usize = POLL_BYTES + AROUND;
/// Kept for a last H2CTermReq.
const LAST_WORDS: usize = size_of::<TermReq>();
/// Most data that goes with a command.
pub(super) const MOST_IN_CAPSULE: usize = CHUNK;

/// A connection.
pub(super) struct Connection {
    stream: Option<Box<dyn Stream>>,
    fault: Option<TcpFault>,
    digests: Digests,
    /// Whole PDUs, of which the first `sent` bytes have gone.
    out: Vec<u8>,
    sent: usize,
    staging: Box<[u8]>,
    fds: Vec<OwnedFd>,
    receiver: Receiver,
    current: Option<DataPdu>,
    peer: Option<Peer>,
    table: Table,
    timeout_ns: u64,
    next_look_ns: u64,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("fault", &self.fault).field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Connection {
    /// Sends ICReq on a new stream with the first poll.
    pub(super) fn new(stream: Box<dyn Stream>, digests: Digests, shape: Shape, timeout_ns: u64) -> Self {
        let request = IcReq {
            ch: CommonHeader { pdu_type: PduType::IC_REQ, hlen: 128, plen: 128, ..CommonHeader::default() },
            dgst: digests,
            // One R2T at a time, no alignment.
            ..IcReq::default()
        };
        let mut out = Vec::with_capacity(OUT_BYTES + LAST_WORDS);
        out.extend_from_slice(request.as_bytes());
        Self {
            stream: Some(stream),
            fault: None,
            digests,
            out,
            sent: 0,
            staging: vec![0; POLL_BYTES].into_boxed_slice(),
            fds: Vec::new(),
            receiver: Receiver::new(digests),
            current: None,
            peer: None,
            table: Table::new(shape),
            timeout_ns,
            next_look_ns: 0,
        }
    }

    pub(super) fn fault(&self) -> Option<TcpFault> {
        self.fault
    }

    pub(super) fn free(&self) -> usize {
        if self.fault.is_some() { 0 } else { self.table.free() }
    }

    pub(super) fn outstanding(&self) -> usize {
        self.table.outstanding()
    }

    pub(super) fn shape(&self) -> Shape {
        self.table.shape()
    }

    /// Bytes wait that the stream does not take now.
    pub(super) fn is_blocked(&self) -> bool {
        self.fault.is_none() && self.sent < self.out.len()
    }

    pub(super) fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().and_then(|stream| stream.waker())
    }

    /// Takes a command with its own deadline, `None` for the connection's time-out.
    pub(super) fn submit(
        &mut self,
        now: Time,
        deadline: Option<Time>,
        entry: &SubmissionEntry,
        data: &[Segment<'_>],
        tag: u64,
        strict: bool,
    ) -> Result<(), SubmitError> {
        if self.fault.is_some() {
            return Err(SubmitError::Dead);
        }
        let deadline_ns = deadline.map_or(now.0.saturating_add(self.timeout_ns), |deadline| deadline.0);
        self.table.submit(deadline_ns, entry, data, tag, strict)
    }

    /// Sends what waits, as far as the stream takes it.
    pub(super) fn commit(&mut self) {
        if self.fault.is_none()
            && let Err(fault) = self.flush()
        {
            self.fail(fault);
        }
    }

    /// Ends the connection; what is outstanding comes back with the next poll.
    pub(super) fn fail(&mut self, fault: TcpFault) {
        if self.fault.is_some() {
            return;
        }
        self.fault = Some(fault);
        let Some(mut stream) = self.stream.take() else { return };
        if let Some((fes, fei)) = fault.report() {
            self.out.extend_from_slice(TermReq::new(PduType::H2C_TERM_REQ, fes, fei, 0).as_bytes());
            // Whether it gets through or not, the connection ends.
            let _told = stream.send(&[IoSlice::new(&self.out[self.sent..])], &[]);
        }
    }

    /// Moves bytes both ways and hands ended commands to `done`.
    pub(super) fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        let mut count = 0;
        if self.fault.is_none() {
            let outcome = self.receive(done, &mut count).and_then(|()| self.flush());
            match outcome {
                Err(fault) => self.fail(fault),
                Ok(()) if now.0 >= self.next_look_ns => self.look_at_deadlines(now),
                Ok(()) => {}
            }
        }
        if self.fault.is_some() {
            count += self.table.drain(done);
        }
        count
    }

    #[cold]
    fn look_at_deadlines(&mut self, now: Time) {
        self.next_look_ns = now.0.saturating_add((self.timeout_ns / 8).clamp(1, 1_000_000_000));
        if let Some(cid) = self.table.overdue(now.0) {
            self.fail(TcpFault::TimedOut { cid });
        }
    }

    fn receive(&mut self, done: &mut dyn FnMut(Completion), count: &mut usize) -> Result<(), TcpFault> {
        let Some(stream) = &mut self.stream else { return Err(TcpFault::Ended) };
        let (table, peer, current) = (&mut self.table, &mut self.peer, &mut self.current);
        let mut incoming = Incoming { table, peer, digests: self.digests, current, done, count: 0 };
        let mut budget = self.staging.len();
        let outcome = loop {
            if budget == 0 {
                break Ok(());
            }
            let asked = budget;
            let got = match stream.recv(&mut self.staging[..budget], &mut self.fds) {
                Ok(0) => break Err(TcpFault::Closed),
                Ok(got) => got.min(budget),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err(TcpFault::Io(error.kind())),
            };
            self.fds.clear();
            budget -= got;
            if let Err(fault) = self.receiver.take(&self.staging[..got], &mut incoming) {
                break Err(fault);
            }
            // That was all there is: another system call would only delay what has come.
            if got < asked {
                break Ok(());
            }
        };
        *count += incoming.count;
        outcome
    }

    fn flush(&mut self) -> Result<(), TcpFault> {
        let mut budget = POLL_BYTES;
        loop {
            self.encode()?;
            if self.sent == self.out.len() || budget == 0 {
                return Ok(());
            }
            let Some(stream) = &mut self.stream else { return Err(TcpFault::Ended) };
            let end = self.out.len().min(self.sent + budget);
            match stream.send(&[IoSlice::new(&self.out[self.sent..end])], &[]) {
                Ok(0) => return Err(TcpFault::Closed),
                Ok(went) => {
                    self.sent = (self.sent + went).min(end);
                    budget = budget.saturating_sub(went);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(TcpFault::Io(error.kind())),
            }
            if self.sent == self.out.len() {
                self.out.clear();
                self.sent = 0;
            }
        }
    }

    /// Turns what waits into bytes, as far as there is room.
    fn encode(&mut self) -> Result<(), TcpFault> {
        let Some(peer) = self.peer else { return Ok(()) };
        while let Some(work) = self.table.work.front().copied() {
            let room = OUT_BYTES.saturating_sub(self.out.len());
            let (over, place) = match work {
                Work::Capsule(place) => (self.encode_capsule(place, &peer, room), place),
                Work::Data(place) => (self.encode_data(place, &peer, room), place),
            };
            if !over {
                break;
            }
            self.table.work.pop_front();
            self.table.mark_encoded(place);
        }
        Ok(())
    }

    /// Whether it was put among the bytes.
    fn encode_capsule(&mut self, place: u16, peer: &Peer, room: usize) -> bool {
        let Some(command) = self.table.command(place) else { return true };
        let with_data = if command.inline { command.len } else { 0 };
        if room < AROUND + with_data as usize {
            return false;
        }
        let sgl = if command.inline { SglDescriptor::in_capsule(0, command.len) } else { SglDescriptor::transport(command.len) };
        let sqe = command.entry.with_cid(command.cid).with_sgl(sgl);
        let frame = Frame::new(PduType::CAPSULE_CMD, 72, self.digests, peer, with_data);
        let pdu = CapsuleCmd { ch: frame.header(PduFlags::new()), sqe };
        let data = (with_data > 0).then_some((&*command, 0, with_data as usize));
        frame.append(&mut self.out, pdu.as_bytes(), data);
        true
    }

    /// Whether all that the R2T asked for is among the bytes.
    fn encode_data(&mut self, place: u16, peer: &Peer, mut room: usize) -> bool {
        let Some(command) = self.table.command(place) else { return true };
        while let Some(transfer) = &mut command.transfer {
            let len = transfer.left.min(peer.maxh2cdata).min(CHUNK as u32);
            if room < AROUND + len as usize {
                return false;
            }
            let (at, ttag, last) = (transfer.at, transfer.ttag, transfer.left == len);
            transfer.at += len;
            transfer.left -= len;
            if last {
                command.transfer = None;
            }
            let frame = Frame::new(PduType::H2C_DATA, 24, self.digests, peer, len);
            let ch = frame.header(PduFlags::new().with_last(last));
            let pdu = DataPdu { ch, cccid: command.cid, ttag, datao: at, datal: len, rsvd20: 0 };
            frame.append(&mut self.out, pdu.as_bytes(), Some((&*command, at, len as usize)));
            room = OUT_BYTES.saturating_sub(self.out.len());
        }
        true
    }
}

/// Where the parts of a PDU lie.
struct Frame {
    pdu_type: PduType,
    hlen: u8,
    digests: Digests,
    pdo: u32,
    data: u32,
}

impl Frame {
    fn new(pdu_type: PduType, hlen: u8, digests: Digests, peer: &Peer, data: u32) -> Self {
        let pdo = if data > 0 { data_offset(hlen, digests.header(), peer.cpda) } else { 0 };
        Self { pdu_type, hlen, digests, pdo, data }
    }

    fn has_data_digest(&self) -> bool {
        self.digests.data() && self.data > 0
    }

    fn header(&self, flags: PduFlags) -> CommonHeader {
        let header = u32::from(self.hlen) + if self.digests.header() { DIGEST_BYTES as u32 } else { 0 };
        let after = if self.has_data_digest() { DIGEST_BYTES as u32 } else { 0 };
        CommonHeader {
            pdu_type: self.pdu_type,
            flags: flags.with_hdgst(self.digests.header()).with_ddgst(self.has_data_digest()),
            hlen: self.hlen,
            pdo: self.pdo as u8,
            plen: if self.data > 0 { self.pdo + self.data + after } else { header },
        }
    }

    /// Appends the PDU; there is room.
    fn append(&self, out: &mut Vec<u8>, header: &[u8], data: Option<(&super::table::Command, u32, usize)>) {
        let start = out.len();
        out.extend_from_slice(header);
        if self.digests.header() {
            out.extend_from_slice(&crc32c::crc32c(header).to_le_bytes());
        }
        let Some((command, at, len)) = data else { return };
        out.resize(start + self.pdo as usize, 0);
        let data_at = out.len();
        command.memory(at, len, |arena, offset, part| arena.read_append(offset, part, out));
        if self.has_data_digest() {
            let digest = crc32c::crc32c(&out[data_at..]);
            out.extend_from_slice(&digest.to_le_bytes());
        }
    }
}
