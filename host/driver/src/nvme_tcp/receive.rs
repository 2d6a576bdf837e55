//! PDUs from a stream of bytes: framing, digests, and the checks that need no command (TCP 1.1 §3.3, §3.6).
//!
//! Nothing is kept but the header of the PDU under way; data is handed on as it comes.

use super::error::TcpFault;
use dray_nvme::command::CompletionEntry;
use dray_nvme::tcp::pdu::{
    CapsuleResp, CommonHeader, DIGEST_BYTES, DataPdu, Digests, IcResp, PduType, R2t, TermReq, field, header_bytes,
};
use zerocopy::FromBytes;

const COMMON_BYTES: usize = size_of::<CommonHeader>();
/// The longest header and its digest.
const MOST_HEADER: usize = 128 + DIGEST_BYTES;

/// A PDU's header, checked by itself.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pdu {
    Opened(IcResp),
    Response(CompletionEntry),
    Data(DataPdu),
    Asked(R2t),
}

/// Who takes PDUs.
pub(super) trait PduSink {
    /// A header has come; if it is data, its bytes follow.
    fn pdu(&mut self, pdu: &Pdu) -> Result<(), TcpFault>;
    /// The next bytes of the data.
    fn data(&mut self, bytes: &[u8]) -> Result<(), TcpFault>;
    /// All data of the PDU has come, and its digest is right.
    fn end(&mut self) -> Result<(), TcpFault>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Header,
    /// Padding before the data.
    Padding,
    Data,
    Digest,
}

/// Takes bytes in pieces of any size.
#[derive(Debug)]
pub(super) struct Receiver {
    digests: Digests,
    opened: bool,
    stage: Stage,
    header: [u8; MOST_HEADER],
    /// Bytes of the header, or of the digest, that have come, and that there will be.
    have: usize,
    need: usize,
    /// Bytes of padding and of data that are still to come.
    padding: usize,
    left: usize,
    digest: u32,
}

impl Receiver {
    /// For a connection with these digests, which are in use behind ICResp.
    pub(super) fn new(digests: Digests) -> Self {
        Self {
            digests,
            opened: false,
            stage: Stage::Header,
            header: [0; MOST_HEADER],
            have: 0,
            need: COMMON_BYTES,
            padding: 0,
            left: 0,
            digest: 0,
        }
    }

    /// Takes the next bytes.
    pub(super) fn take(&mut self, mut bytes: &[u8], sink: &mut impl PduSink) -> Result<(), TcpFault> {
        while !bytes.is_empty() {
            let used = match self.stage {
                Stage::Header => self.take_header(bytes, sink)?,
                Stage::Padding => self.take_padding(bytes),
                Stage::Data => self.take_data(bytes, sink)?,
                Stage::Digest => self.take_digest(bytes, sink)?,
            };
            bytes = &bytes[used..];
        }
        Ok(())
    }

    /// Fills the header up to what is needed; returns the bytes used.
    fn gather(&mut self, bytes: &[u8]) -> usize {
        let used = bytes.len().min(self.need - self.have);
        self.header[self.have..self.have + used].copy_from_slice(&bytes[..used]);
        self.have += used;
        used
    }

    fn take_header(&mut self, bytes: &[u8], sink: &mut impl PduSink) -> Result<usize, TcpFault> {
        let used = self.gather(bytes);
        if self.have < self.need {
            return Ok(used);
        }
        let (common, _) = CommonHeader::read_from_prefix(&self.header).map_err(|_| TcpFault::Header { offset: 0 })?;
        if self.have == COMMON_BYTES {
            self.need = self.check_common(&common)?;
        } else {
            self.check_header_digest(&common)?;
            self.have = 0;
            self.need = COMMON_BYTES;
            self.begin(&common, sink)?;
        }
        Ok(used)
    }

    /// Bytes of the header and its digest.
    fn check_common(&self, common: &CommonHeader) -> Result<usize, TcpFault> {
        let hlen = match common.pdu_type {
            PduType::IC_RESP if !self.opened => 128,
            PduType::C2H_TERM_REQ => 24,
            PduType::CAPSULE_RESP | PduType::C2H_DATA | PduType::R2T if self.opened => 24,
            known if header_bytes(known).is_some() => return Err(TcpFault::Sequence),
            _ => return Err(TcpFault::Header { offset: field::PDU_TYPE }),
        };
        if common.hlen != hlen {
            return Err(TcpFault::Header { offset: field::HLEN });
        }
        let digest = self.header_digest(common.pdu_type);
        if common.flags.hdgst() != digest {
            return Err(TcpFault::Header { offset: field::FLAGS });
        }
        let header = usize::from(hlen) + if digest { DIGEST_BYTES } else { 0 };
        let plen = common.plen as usize;
        let fits = match common.pdu_type {
            PduType::C2H_TERM_REQ => (header..=header + TermReq::MAX_DATA).contains(&plen),
            PduType::C2H_DATA => plen > header,
            _ => plen == header,
        };
        if !fits {
            return Err(TcpFault::Header { offset: field::PLEN });
        }
        Ok(header)
    }

    fn header_digest(&self, pdu_type: PduType) -> bool {
        self.digests.header() && !matches!(pdu_type, PduType::IC_RESP | PduType::C2H_TERM_REQ)
    }

    fn check_header_digest(&self, common: &CommonHeader) -> Result<(), TcpFault> {
        if !self.header_digest(common.pdu_type) {
            return Ok(());
        }
        let (header, digest) = self.header[..self.need].split_at(usize::from(common.hlen));
        let came = u32::from_le_bytes(digest.try_into().unwrap_or_default());
        if crc32c::crc32c(header) == came { Ok(()) } else { Err(TcpFault::HeaderDigest { came }) }
    }

    fn begin(&mut self, common: &CommonHeader, sink: &mut impl PduSink) -> Result<(), TcpFault> {
        match common.pdu_type {
            PduType::IC_RESP => {
                self.opened = true;
                sink.pdu(&Pdu::Opened(self.read()?))
            }
            PduType::CAPSULE_RESP => sink.pdu(&Pdu::Response(self.read::<CapsuleResp>()?.cqe)),
            PduType::R2T => sink.pdu(&Pdu::Asked(self.read()?)),
            PduType::C2H_DATA => self.begin_data(common, sink),
            _ => {
                let term: TermReq = self.read()?;
                Err(TcpFault::Terminated { fes: term.fes, fei: term.fei() })
            }
        }
    }

    fn read<T: FromBytes>(&self) -> Result<T, TcpFault> {
        T::read_from_prefix(&self.header).map(|(value, _)| value).map_err(|_| TcpFault::Header { offset: 0 })
    }

    fn begin_data(&mut self, common: &CommonHeader, sink: &mut impl PduSink) -> Result<(), TcpFault> {
        let data: DataPdu = self.read()?;
        if common.flags.ddgst() != self.digests.data() {
            return Err(TcpFault::Header { offset: field::FLAGS });
        }
        let header = usize::from(common.hlen) + if self.digests.header() { DIGEST_BYTES } else { 0 };
        let pdo = usize::from(common.pdo);
        if pdo < header || !pdo.is_multiple_of(4) {
            return Err(TcpFault::Header { offset: field::PDO });
        }
        let after = if self.digests.data() { DIGEST_BYTES as u64 } else { 0 };
        if pdo as u64 + u64::from(data.datal) + after != u64::from(common.plen) {
            return Err(TcpFault::Header { offset: field::PLEN });
        }
        if data.datal == 0 {
            return Err(TcpFault::Header { offset: field::DATAL });
        }
        sink.pdu(&Pdu::Data(data))?;
        (self.padding, self.left, self.digest) = (pdo - header, data.datal as usize, 0);
        self.stage = if self.padding > 0 { Stage::Padding } else { Stage::Data };
        Ok(())
    }

    fn take_padding(&mut self, bytes: &[u8]) -> usize {
        let used = bytes.len().min(self.padding);
        self.padding -= used;
        if self.padding == 0 {
            self.stage = Stage::Data;
        }
        used
    }

    fn take_data(&mut self, bytes: &[u8], sink: &mut impl PduSink) -> Result<usize, TcpFault> {
        let used = bytes.len().min(self.left);
        if self.digests.data() {
            self.digest = crc32c::crc32c_append(self.digest, &bytes[..used]);
        }
        sink.data(&bytes[..used])?;
        self.left -= used;
        if self.left == 0 {
            if self.digests.data() {
                (self.stage, self.need) = (Stage::Digest, DIGEST_BYTES);
            } else {
                self.stage = Stage::Header;
                sink.end()?;
            }
        }
        Ok(used)
    }

    fn take_digest(&mut self, bytes: &[u8], sink: &mut impl PduSink) -> Result<usize, TcpFault> {
        let used = self.gather(bytes);
        if self.have == DIGEST_BYTES {
            let came = u32::from_le_bytes(self.header[..DIGEST_BYTES].try_into().unwrap_or_default());
            if came != self.digest {
                return Err(TcpFault::DataDigest);
            }
            (self.stage, self.have, self.need) = (Stage::Header, 0, COMMON_BYTES);
            sink.end()?;
        }
        Ok(used)
    }
}
