//! Cuts the byte stream of a connection into PDUs and checks their headers (TCP 1.1 §3.6). Knows nothing of queues or commands.

use dray_nvme::tcp::pdu::{CapsuleCmd, DIGEST_BYTES, Digests, FatalError, field};
use dray_nvme::tcp::{CommonHeader, DataPdu, IcReq, PduType};
use std::ops::Range;
use zerocopy::FromBytes;

/// Bytes of the receive buffer before Connect, and after.
pub(super) const SMALL_BUFFER: usize = 4096;
pub(super) const LARGE_BUFFER: usize = 64 << 10;

/// What the checks depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// ICReq has been answered.
    pub(super) initialized: bool,
    pub(super) digests: Digests,
    /// Most data in a command capsule.
    pub(super) max_capsule_data: u32,
    /// MAXH2CDATA.
    pub(super) max_h2c_data: u32,
}

/// A protocol error that ends the connection (TCP 1.1 §3.6.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fatal {
    pub(super) fes: FatalError,
    pub(super) fei: u32,
}

impl Fatal {
    pub(super) const SEQUENCE: Self = Self { fes: FatalError::SEQUENCE, fei: 0 };

    pub(super) const fn header(offset: u32) -> Self {
        Self { fes: FatalError::INVALID_HEADER_FIELD, fei: offset }
    }
}

/// What comes next in the stream.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing whole: more bytes are needed.
    More,
    /// ICReq.
    IcReq(IcReq),
    /// A command capsule; `data` bytes in the capsule follow as [`Step::Bytes`], then [`Step::DataEnd`]. Without data
    /// nothing follows.
    Command { capsule: CapsuleCmd, data: u32 },
    /// An H2CData; its data follows likewise.
    Data(DataPdu),
    /// Data of the PDU under way: this range of [`Inbox::bytes`].
    Bytes(Range<usize>),
    /// The data of the PDU is complete; whether its digest is right.
    DataEnd { intact: bool },
    /// H2CTermReq.
    Term,
    /// The connection must end.
    Fatal(Fatal),
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Data { left: u32, crc: u32 },
}

/// A connection's receive buffer.
pub(super) struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
    /// The header last looked at, for a C2HTermReq.
    header: Range<usize>,
}

/// A header that passed the checks: bytes before the data, and of the data.
struct Shape {
    head: usize,
    data: u32,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; SMALL_BUFFER].into(), start: 0, end: 0, state: State::Header, header: 0..0 }
    }

    /// Makes room for whole batches, once the client has proved who it is.
    pub(super) fn enlarge(&mut self) {
        if self.buffer.len() < LARGE_BUFFER {
            let mut buffer = vec![0; LARGE_BUFFER];
            buffer[..self.end].copy_from_slice(&self.buffer[..self.end]);
            self.buffer = buffer.into();
        }
    }

    /// Room for what comes next.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < 512 {
            // What is left is part of a header.
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    /// So many bytes have come into [`Inbox::room`].
    pub(super) fn filled(&mut self, bytes: usize) {
        self.end += bytes;
    }

    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.buffer[range]
    }

    /// The header of the PDU in error, as far as it has come.
    pub(super) fn header(&self) -> &[u8] {
        &self.buffer[self.header.clone()]
    }

    /// Takes the next step out of what has come.
    #[inline]
    pub(super) fn next(&mut self, rules: &Rules) -> Step {
        match self.state {
            State::Header => self.next_header(rules).unwrap_or_else(Step::Fatal),
            State::Data { left, crc } => self.next_data(rules, left, crc),
        }
    }

    fn next_data(&mut self, rules: &Rules, left: u32, mut crc: u32) -> Step {
        let available = self.end - self.start;
        if left == 0 {
            if !rules.digests.data() {
                self.state = State::Header;
                return Step::DataEnd { intact: true };
            }
            let Some(digest) = self.buffer[self.start..self.end].first_chunk::<DIGEST_BYTES>() else { return Step::More };
            let intact = u32::from_le_bytes(*digest) == crc;
            self.start += DIGEST_BYTES;
            self.state = State::Header;
            return Step::DataEnd { intact };
        }
        let len = available.min(left as usize);
        if len == 0 {
            return Step::More;
        }
        let range = self.start..self.start + len;
        if rules.digests.data() {
            crc = crc32c::crc32c_append(crc, &self.buffer[range.clone()]);
        }
        self.start += len;
        self.state = State::Data { left: left - len as u32, crc };
        Step::Bytes(range)
    }

    fn next_header(&mut self, rules: &Rules) -> Result<Step, Fatal> {
        let available = self.end - self.start;
        let bytes = &self.buffer[self.start..self.end];
        let Ok((ch, _)) = CommonHeader::read_from_prefix(bytes) else { return Ok(Step::More) };
        self.header = self.start..self.start + available.min(usize::from(ch.hlen)).min(128);
        let hlen = expected_header(ch.pdu_type, rules.initialized)?;
        if ch.hlen != hlen {
            return Err(Fatal::header(field::HLEN));
        }
        let shape = shape(&ch, rules)?;
        if available < shape.head {
            return Ok(Step::More);
        }
        let header = &bytes[..usize::from(hlen)];
        if has_digest(ch.pdu_type) && rules.digests.header() {
            let digest = bytes[usize::from(hlen)..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            if digest != crc32c::crc32c(header) {
                return Err(Fatal { fes: FatalError::HEADER_DIGEST, fei: digest });
            }
        }
        let step = match ch.pdu_type {
            PduType::IC_REQ => IcReq::read_from_bytes(header).map(Step::IcReq).unwrap_or(Step::More),
            PduType::CAPSULE_CMD => {
                let capsule = CapsuleCmd::read_from_bytes(header).unwrap_or_default();
                Step::Command { capsule, data: shape.data }
            }
            PduType::H2C_DATA => {
                let pdu = DataPdu::read_from_bytes(header).unwrap_or_default();
                if pdu.datal != shape.data {
                    return Err(Fatal::header(field::PLEN));
                }
                Step::Data(pdu)
            }
            _ => Step::Term,
        };
        self.start += shape.head;
        if shape.data > 0 {
            self.state = State::Data { left: shape.data, crc: 0 };
        }
        Ok(step)
    }
}

/// HLEN of a PDU that a host may send now.
fn expected_header(kind: PduType, initialized: bool) -> Result<u8, Fatal> {
    match kind {
        PduType::IC_REQ if !initialized => Ok(128),
        PduType::H2C_TERM_REQ => Ok(24),
        PduType::CAPSULE_CMD if initialized => Ok(72),
        PduType::H2C_DATA if initialized => Ok(24),
        PduType::IC_REQ | PduType::CAPSULE_CMD | PduType::H2C_DATA => Err(Fatal::SEQUENCE),
        _ => Err(Fatal::header(field::PDU_TYPE)),
    }
}

fn has_digest(kind: PduType) -> bool {
    matches!(kind, PduType::CAPSULE_CMD | PduType::H2C_DATA)
}

/// Checks flags, PDO and PLEN.
fn shape(ch: &CommonHeader, rules: &Rules) -> Result<Shape, Fatal> {
    let digests = if has_digest(ch.pdu_type) { rules.digests } else { Digests::new() };
    if ch.flags.hdgst() != digests.header() {
        return Err(Fatal::header(field::FLAGS));
    }
    let bare = u32::from(ch.hlen) + if digests.header() { DIGEST_BYTES as u32 } else { 0 };
    let no_data = Shape { head: bare as usize, data: 0 };
    match ch.pdu_type {
        PduType::IC_REQ if ch.plen == bare => Ok(no_data),
        PduType::H2C_TERM_REQ if (24..=152).contains(&ch.plen) => Ok(no_data),
        PduType::CAPSULE_CMD if ch.plen == bare && !ch.flags.ddgst() => Ok(no_data),
        PduType::CAPSULE_CMD | PduType::H2C_DATA if ch.plen > bare => {
            if ch.flags.ddgst() != digests.data() {
                return Err(Fatal::header(field::FLAGS));
            }
            let pdo = u32::from(ch.pdo);
            if pdo < bare || !pdo.is_multiple_of(4) {
                return Err(Fatal::header(field::PDO));
            }
            let around = pdo + if digests.data() { DIGEST_BYTES as u32 } else { 0 };
            let data = ch.plen.checked_sub(around).filter(|&data| data > 0).ok_or(Fatal::header(field::PLEN))?;
            if ch.pdu_type == PduType::H2C_DATA && data > rules.max_h2c_data {
                return Err(Fatal { fes: FatalError::LIMIT_EXCEEDED, fei: 0 });
            }
            if ch.pdu_type == PduType::CAPSULE_CMD && data > rules.max_capsule_data {
                return Err(Fatal::header(field::PLEN));
            }
            Ok(Shape { head: pdo as usize, data })
        }
        _ => Err(Fatal::header(field::PLEN)),
    }
}
