//! One connection: what state it is in, and how it answers.

use super::association::Host;
use super::authentication::Authentication;
use super::discovery::DiscoveryController;
use super::receive::{Fatal, Inbox, Rules};
use super::send::Outbox;
use super::config::Limits;
use dray_device::poll::Time;
use dray_device::socket::Stream;
use dray_nvme::command::{CompletionEntry, StatusPhase, SubmissionEntry};
use dray_nvme::status::Status;
use dray_nvme::tcp::pdu::{CapsuleResp, Digests, FatalError, PduFlags, R2t, data_offset, field};
use dray_nvme::tcp::{CommonHeader, DataPdu, IcReq, IcResp, PduType, TermReq};
use std::net::SocketAddr;

/// What a connection has been connected to.
pub(super) enum Link {
    None,
    Discovery(Box<DiscoveryController>),
    /// A queue of an exported controller.
    Queue { subsystem: usize, place: usize, qid: u16 },
}

/// What a connection that has to authenticate gets when it has: until then it holds nothing that another could want.
pub(super) struct Claim {
    pub(super) subsystem: usize,
    pub(super) place: usize,
    pub(super) qid: u16,
    /// Entries of the queue.
    pub(super) entries: u16,
    pub(super) host: Host,
    pub(super) kato_ms: u32,
}

/// Where the data of the PDU under way goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sink {
    Discard,
    /// A fabrics command's, collected until it is whole.
    Small,
    /// A command's memory, from this byte on; `r2t` tells H2CData from data in the capsule.
    Memory { index: u16, at: u32, r2t: bool },
}

/// How far the end of a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Not ending.
    No,
    /// What waits is sent; then what comes is read and dropped until the client closes, so that it gets to read the last PDU.
    Lingering(Time),
    /// Asked for; the time is set at the next poll.
    Finishing,
    /// Over.
    Now,
}

pub(super) struct Connection {
    pub(super) id: usize,
    pub(super) stream: Box<dyn Stream>,
    /// The address by which the client reached the target.
    pub(super) local: SocketAddr,
    pub(super) inbox: Inbox,
    pub(super) out: Outbox,
    pub(super) rules: Rules,
    hpda: u8,
    pub(super) link: Link,
    /// Connect has succeeded.
    pub(super) connected: bool,
    /// Connect waits for the controller: the CID.
    pub(super) connecting: Option<u16>,
    /// The controller that it is for.
    pub(super) cntlid: u16,
    /// What it was promised by Connect, and gets once it has authenticated.
    pub(super) claim: Option<Claim>,
    /// The I/O queue that it was promised is being made: commands wait.
    pub(super) settling: bool,
    pub(super) authentication: Authentication,
    pub(super) sink: Sink,
    /// The fabrics command whose data is coming.
    pub(super) pending: SubmissionEntry,
    pub(super) small: Vec<u8>,
    sq_entries: u16,
    sq_head: u16,
    pub(super) no_flow_control: bool,
    pub(super) accepted: Time,
    /// When Connect, or the last message of authentication, came.
    pub(super) step: Time,
    /// When bytes last went out, or nothing waited.
    pub(super) progress: Time,
    /// Polls without anything to receive.
    pub(super) quiet: u32,
    pub(super) end: End,
    /// C2HTermReq was the last PDU.
    pub(super) terminated: bool,
}

impl Connection {
    pub(super) fn new(id: usize, stream: Box<dyn Stream>, local: SocketAddr, limits: &Limits, now: Time) -> Self {
        let rules = Rules {
            initialized: false,
            digests: Digests::new(),
            max_capsule_data: limits.in_capsule_bytes.max(8192),
            max_h2c_data: limits.max_h2c_bytes,
        };
        Self {
            id,
            stream,
            local,
            inbox: Inbox::new(),
            out: Outbox::new(),
            rules,
            hpda: 0,
            link: Link::None,
            connected: false,
            connecting: None,
            cntlid: 0,
            claim: None,
            settling: false,
            authentication: Authentication::NotNeeded,
            sink: Sink::Discard,
            pending: SubmissionEntry::default(),
            small: Vec::new(),
            sq_entries: u16::MAX,
            sq_head: 0,
            no_flow_control: false,
            accepted: now,
            step: now,
            progress: now,
            quiet: 0,
            end: End::No,
            terminated: false,
        }
    }

    /// Whether the client has not proved yet that it may be here.
    pub(super) fn is_half_open(&self) -> bool {
        !self.connected || !self.authentication.is_open()
    }

    /// When a half-open connection ends unless it has come further.
    pub(super) fn proof_deadline(&self, limits: &Limits) -> Time {
        if self.connected {
            self.step.after_ms(limits.authentication_ms)
        } else {
            self.accepted.after_ms(limits.handshake_ms)
        }
    }

    /// Whether PDUs are taken from the client.
    #[inline]
    pub(super) fn is_listening(&self) -> bool {
        self.end == End::No && !self.settling && !self.out.is_full()
    }

    /// The connection ends at once.
    pub(super) fn abandon(&mut self) {
        self.end = End::Now;
    }

    /// The connection ends when what waits has been sent.
    pub(super) fn finish(&mut self) {
        if self.end == End::No {
            self.end = End::Finishing;
        }
    }

    /// A protocol error: C2HTermReq, and the end.
    pub(super) fn terminate(&mut self, fatal: Fatal) {
        tracing::debug!(connection = self.id, error = %fatal.fes, information = fatal.fei, "protocol error of an NVMe/TCP client");
        let header = self.inbox.header();
        let term = TermReq::new(PduType::C2H_TERM_REQ, fatal.fes, fatal.fei, header.len());
        self.out.header(&term, false, 0);
        self.out.put(header);
        self.terminated = true;
        self.finish();
    }

    /// ICReq: the answer, or the error.
    pub(super) fn initialize(&mut self, request: &IcReq) -> Result<(), Fatal> {
        if request.pfv != 0 {
            return Err(Fatal { fes: FatalError::UNSUPPORTED_PARAMETER, fei: field::PFV });
        }
        if request.hpda > 31 {
            return Err(Fatal::header(field::PDA));
        }
        self.hpda = request.hpda;
        let digests = Digests::new().with_header(request.dgst.header()).with_data(request.dgst.data());
        let response = IcResp {
            ch: CommonHeader { pdu_type: PduType::IC_RESP, hlen: 128, plen: 128, ..Default::default() },
            dgst: digests,
            maxh2cdata: self.rules.max_h2c_data,
            ..Default::default()
        };
        self.out.header(&response, false, 0);
        (self.rules.initialized, self.rules.digests) = (true, digests);
        Ok(())
    }

    /// The queue's size, once Connect has said it: entries, 0's based.
    pub(super) fn set_queue(&mut self, entries_minus_1: u16, no_flow_control: bool) {
        self.sq_entries = entries_minus_1;
        self.no_flow_control = no_flow_control;
        self.sq_head = 0;
    }

    fn header_digest(&self) -> bool {
        self.rules.digests.header()
    }

    fn digest_bytes(on: bool) -> u32 {
        if on { 4 } else { 0 }
    }

    /// A response capsule; SQID and phase are not used by fabrics.
    #[inline]
    pub(super) fn respond(&mut self, cid: u16, status: Status, result: u64) {
        if self.terminated {
            return;
        }
        self.sq_head = if self.sq_head >= self.sq_entries { 0 } else { self.sq_head + 1 };
        let digest = self.header_digest();
        let response = CapsuleResp {
            ch: CommonHeader {
                pdu_type: PduType::CAPSULE_RESP,
                flags: PduFlags::new().with_hdgst(digest),
                hlen: 24,
                pdo: 0,
                plen: 24 + Self::digest_bytes(digest),
            },
            cqe: CompletionEntry {
                dw0: result as u32,
                dw1: (result >> 32) as u32,
                sqhd: if self.no_flow_control { u16::MAX } else { self.sq_head },
                sqid: 0,
                cid,
                status_phase: StatusPhase::new().with_status(status),
            },
        };
        self.out.header(&response, digest, 0);
    }

    pub(super) fn respond_status(&mut self, cid: u16, status: Status) {
        self.respond(cid, status, 0);
    }

    /// The header of a C2HData with `len` bytes; `success` completes the command with it.
    #[inline]
    pub(super) fn data_header(&mut self, cid: u16, len: u32, success: bool) {
        let (hdgst, ddgst) = (self.header_digest(), self.rules.digests.data());
        let pdo = data_offset(24, hdgst, self.hpda);
        let pdu = DataPdu {
            ch: CommonHeader {
                pdu_type: PduType::C2H_DATA,
                flags: PduFlags::new().with_hdgst(hdgst).with_ddgst(ddgst).with_last(true).with_success(success),
                hlen: 24,
                pdo: pdo as u8,
                plen: pdo + len + Self::digest_bytes(ddgst),
            },
            cccid: cid,
            datal: len,
            ..Default::default()
        };
        self.out.header(&pdu, hdgst, pdo as usize);
    }

    /// Whether a C2HData may complete its command (TCP 1.1 §3.6.2.9): nothing else is to be told.
    #[inline]
    pub(super) fn may_omit_response(&self, status: Status, result: u64) -> bool {
        self.no_flow_control && result == 0 && !status.is_error()
    }

    /// A successful command's data and response, where the target has the data itself.
    pub(super) fn respond_data(&mut self, cid: u16, bytes: &[u8], result: u64) {
        self.data_header(cid, bytes.len() as u32, false);
        self.out.put(bytes);
        if self.rules.digests.data() {
            self.out.put(&crc32c::crc32c(bytes).to_le_bytes());
        }
        self.respond(cid, Status::SUCCESS, result);
    }

    /// R2T.
    pub(super) fn ask(&mut self, cccid: u16, ttag: u16, from: u32, len: u32) {
        let digest = self.header_digest();
        let pdu = R2t {
            ch: CommonHeader {
                pdu_type: PduType::R2T,
                flags: PduFlags::new().with_hdgst(digest),
                hlen: 24,
                pdo: 0,
                plen: 24 + Self::digest_bytes(digest),
            },
            cccid,
            ttag,
            r2to: from,
            r2tl: len,
            rsvd20: 0,
        };
        self.out.header(&pdu, digest, 0);
    }
}
