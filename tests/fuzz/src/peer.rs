//! One NVMe/TCP connection as a host has it: what was sent, what must come back for it, and the check of every PDU that comes.
//!
//! As long as a peer has sent nothing but whole, well-formed PDUs it is *sane*: then every command has exactly one answer, data
//! and R2Ts stay inside what the command named, and the target has no reason for a C2HTermReq. Of the others only the form of
//! what comes is checked.

use crate::pipe::Pipe;
use dray_device::socket::Stream;
use dray_nvme::auth::{DhGroup, Entropy, HostAuth, HostAuthConfig, HostStep, Secret};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::{self, ConnectAttributes, FabricsType};
use dray_nvme::tcp::pdu::{CapsuleCmd, CapsuleResp, Digests, FatalError, PduFlags, R2t, TermReq, header_bytes};
use dray_nvme::tcp::{CommonHeader, DataPdu, IcReq, IcResp, PduType};
use std::io::{ErrorKind, IoSlice};
use std::ops::Range;
use zerocopy::{FromBytes, IntoBytes};

/// Most bytes of one PDU of the target's: the longest log page of discovery, its header and digests.
const MOST_PDU: u32 = (128 << 10) + 256;
/// Commands that a sane peer has under way at most: fewer than the shortest queue has entries.
const MOST_COMMANDS: usize = 20;
/// Bytes that wait for the socket at most.
const MOST_WAITING: usize = 256 << 10;

/// What a command was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Connect of a queue; with the association's CNTLID where one was named.
    Connect(u16, u16),
    /// Authentication Send or Receive.
    Authentication,
    /// Any other command.
    Other,
    /// An event request: its answer may never come.
    Event,
}

/// A command that has no answer yet.
#[derive(Clone, Debug)]
pub struct Command {
    /// The entry, with its CID.
    pub entry: SubmissionEntry,
    /// What it is for.
    pub kind: Kind,
    /// Bytes that came or were asked for so far.
    pub moved: u32,
    /// The R2T that waits: TTAG and bytes.
    pub r2t: Option<(u16, Range<u32>)>,
    /// A reset has made its answer uncertain.
    pub may_vanish: bool,
}

/// A connection from its host's end.
pub struct Peer {
    stream: Pipe,
    inbound: Vec<u8>,
    outbound: Vec<u8>,
    /// Digests in use.
    pub digests: Digests,
    /// ICResp has come.
    pub initialized: bool,
    /// Nothing but whole, well-formed PDUs was sent.
    pub sane: bool,
    /// It takes what comes.
    pub reads: bool,
    /// The target has closed it.
    pub closed: bool,
    /// C2HTermReq has come.
    pub terminated: bool,
    /// Its end is its own doing.
    pub explained: bool,
    /// Commands without an answer.
    pub commands: Vec<Command>,
    /// CNTLID and queue, once Connect has succeeded.
    pub link: Option<(u16, u16)>,
    /// Its host has a secret, and has not proved it yet as far as its own messages go.
    pub unproved: bool,
    /// Its host is not on the list of the subsystem that it wants.
    pub stranger: bool,
    auth: Option<HostAuth>,
    message: Option<Vec<u8>>,
    proofs: u32,
    no_flow_control: bool,
    cid: u16,
    /// Connect commands that were answered with an error.
    pub connects_refused: u64,
}

/// The bytes of a PDU: header, digest, data, digest.
#[must_use]
pub fn pdu(header: &[u8], data: &[u8], digests: Digests) -> Vec<u8> {
    let mut bytes = header.to_vec();
    let hlen = bytes.len();
    let (hd, dd) = (usize::from(digests.header()) * 4, usize::from(digests.data() && !data.is_empty()) * 4);
    bytes[1] = PduFlags::from_bits(bytes[1]).with_hdgst(hd > 0).with_ddgst(dd > 0).into_bits();
    bytes[2] = hlen as u8;
    bytes[3] = if data.is_empty() { 0 } else { (hlen + hd) as u8 };
    let plen = (hlen + hd + data.len() + dd) as u32;
    bytes[4..8].copy_from_slice(&plen.to_le_bytes());
    if hd > 0 {
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    }
    bytes.extend(data);
    if dd > 0 {
        bytes.extend(crc32c::crc32c(data).to_le_bytes());
    }
    bytes
}

/// A command capsule.
#[must_use]
pub fn capsule(sqe: SubmissionEntry, data: &[u8], digests: Digests) -> Vec<u8> {
    let ch = CommonHeader { pdu_type: PduType::CAPSULE_CMD, ..Default::default() };
    pdu(CapsuleCmd { ch, sqe }.as_bytes(), data, digests)
}

/// An H2CData.
#[must_use]
pub fn h2c(cccid: u16, ttag: u16, datao: u32, last: bool, data: &[u8], digests: Digests) -> Vec<u8> {
    let flags = PduFlags::new().with_last(last);
    let ch = CommonHeader { pdu_type: PduType::H2C_DATA, flags, ..Default::default() };
    let header = DataPdu { ch, cccid, ttag, datao, datal: data.len() as u32, rsvd20: 0 };
    pdu(header.as_bytes(), data, digests)
}

/// ICReq.
#[must_use]
pub fn icreq(digests: Digests, hpda: u8) -> Vec<u8> {
    let ch = CommonHeader { pdu_type: PduType::IC_REQ, hlen: 128, plen: 128, ..Default::default() };
    IcReq { ch, dgst: digests, hpda, ..Default::default() }.as_bytes().to_vec()
}

impl Peer {
    /// A host's end of a connection.
    #[must_use]
    pub fn new(stream: Pipe) -> Self {
        Self {
            stream,
            inbound: Vec::new(),
            outbound: Vec::new(),
            digests: Digests::new(),
            initialized: false,
            sane: true,
            reads: true,
            closed: false,
            terminated: false,
            explained: false,
            commands: Vec::new(),
            link: None,
            unproved: false,
            stranger: false,
            auth: None,
            message: None,
            proofs: 0,
            no_flow_control: false,
            cid: 0,
            connects_refused: 0,
        }
    }

    /// Sends bytes, as far and as soon as the socket takes them.
    pub fn send(&mut self, bytes: &[u8]) {
        if self.outbound.len() < MOST_WAITING {
            self.outbound.extend_from_slice(bytes);
        } else {
            // What follows would be out of step.
            self.sane = false;
        }
        self.flush();
    }

    fn flush(&mut self) {
        while !self.outbound.is_empty() {
            match self.stream.send(&[IoSlice::new(&self.outbound)], &[]) {
                Ok(sent) => drop(self.outbound.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.outbound.clear(),
            }
        }
    }

    /// Whether a sane peer may send one more command.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.commands.len() < MOST_COMMANDS
    }

    /// A CID that no command of its has.
    pub fn next_cid(&mut self) -> u16 {
        self.cid = self.cid.wrapping_add(1);
        self.cid
    }

    /// Sends a command with a CID of its own and `data` in its capsule; returns the CID.
    pub fn command(&mut self, entry: SubmissionEntry, data: &[u8], kind: Kind) -> u16 {
        let entry = entry.with_cid(self.next_cid());
        self.commands.push(Command { entry, kind, moved: 0, r2t: None, may_vanish: false });
        let bytes = capsule(entry, data, self.digests);
        self.send(&bytes);
        entry.cdw0.cid()
    }

    /// Answers one R2T that waits, honestly, in pieces of `piece` bytes; returns whether there was one. Data of a command that a
    /// reset has ended is not sent: the target has forgotten its tag.
    pub fn give(&mut self, piece: u32) -> bool {
        let Some(command) = self.commands.iter_mut().find(|command| command.r2t.is_some() && !command.may_vanish) else { return false };
        let Some((ttag, range)) = command.r2t.take() else { return false };
        let cid = command.entry.cdw0.cid();
        for at in range.clone().step_by(piece.max(4) as usize & !3) {
            let upto = range.end.min(at + (piece.max(4) & !3));
            let data = vec![at as u8; (upto - at) as usize];
            let bytes = h2c(cid, ttag, at, upto == range.end, &data, self.digests);
            self.send(&bytes);
        }
        true
    }

    /// Begins anew with in-band authentication: a Connect is about to be sent for a host with a secret, or without.
    pub fn connects_as(&mut self, has_secret: bool) {
        (self.unproved, self.proofs, self.auth, self.message) = (has_secret, 0, None, None);
    }

    /// Goes on with in-band authentication: sends the message that is due, or asks for the target's.
    pub fn authenticate(&mut self, host: &str, subsystem: &str, secret: &Secret, garbage: Option<&[u8]>) {
        if self.auth.is_none() {
            let config = HostAuthConfig {
                host_nqn: host.into(),
                subsystem_nqn: subsystem.into(),
                secret: secret.clone(),
                controller_secret: None,
                hashes: Vec::new(),
                groups: vec![DhGroup::Null],
            };
            let (auth, message) = HostAuth::start(config, 1, Entropy::draw(&mut |bytes| bytes.fill(0x3b)));
            (self.auth, self.message) = (Some(auth), Some(message));
        }
        match (garbage, self.message.take()) {
            (Some(garbage), message) => {
                self.message = message;
                let sgl = dray_nvme::command::SglDescriptor::in_capsule(0, garbage.len() as u32);
                let entry = SubmissionEntry::authentication(true, garbage.len() as u32).with_sgl(sgl);
                self.command(entry, garbage, Kind::Authentication);
            }
            (None, Some(message)) => {
                self.proofs += 1;
                // The reply to the challenge is the second message.
                self.unproved &= self.proofs < 2;
                let sgl = dray_nvme::command::SglDescriptor::in_capsule(0, message.len() as u32);
                let entry = SubmissionEntry::authentication(true, message.len() as u32).with_sgl(sgl);
                self.command(entry, &message, Kind::Authentication);
            }
            (None, None) => {
                let sgl = dray_nvme::command::SglDescriptor::transport(4096);
                self.command(SubmissionEntry::authentication(false, 4096).with_sgl(sgl), &[], Kind::Authentication);
            }
        }
    }

    /// Takes what has come and checks it; returns the answers: CID, status and result of each command that has ended.
    pub fn take(&mut self) -> Vec<(Command, Status, u64)> {
        self.flush();
        let mut ended = Vec::new();
        if !self.reads || self.closed {
            return ended;
        }
        let mut piece = [0; 2048];
        loop {
            match self.stream.recv(&mut piece, &mut Vec::new()) {
                Ok(0) => self.closed = true,
                Ok(len) => {
                    self.inbound.extend_from_slice(&piece[..len]);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.closed = true,
            }
            break;
        }
        while let Some(bytes) = self.next_pdu() {
            self.judge(&bytes, &mut ended);
        }
        ended
    }

    fn next_pdu(&mut self) -> Option<Vec<u8>> {
        let (ch, _) = CommonHeader::read_from_prefix(&self.inbound).ok()?;
        assert!(!self.terminated, "{ch:?} behind a C2HTermReq");
        let hlen = header_bytes(ch.pdu_type);
        assert!(hlen == Some(ch.hlen), "{ch:?}: HLEN");
        assert!(ch.plen >= u32::from(ch.hlen) && ch.plen <= MOST_PDU, "{ch:?}: PLEN");
        (self.inbound.len() >= ch.plen as usize).then(|| self.inbound.drain(..ch.plen as usize).collect())
    }

    fn judge(&mut self, bytes: &[u8], ended: &mut Vec<(Command, Status, u64)>) {
        let (ch, _) = CommonHeader::read_from_prefix(bytes).expect("a header");
        let (hlen, plen) = (usize::from(ch.hlen), bytes.len());
        let digests = match ch.pdu_type {
            PduType::IC_RESP | PduType::C2H_TERM_REQ => Digests::new(),
            _ => self.digests,
        };
        assert_eq!(ch.flags.hdgst(), digests.header(), "{ch:?}: HDGSTF");
        let head = hlen + if digests.header() { 4 } else { 0 };
        if digests.header() {
            assert_eq!(bytes[hlen..head], crc32c::crc32c(&bytes[..hlen]).to_le_bytes(), "{ch:?}: header digest");
        }
        match ch.pdu_type {
            PduType::IC_RESP => {
                let response = IcResp::read_from_bytes(bytes).expect("ICResp");
                assert!(!self.initialized && response.pfv == 0 && response.maxh2cdata >= 4096, "{response:?}");
                (self.initialized, self.digests) = (true, response.dgst);
            }
            PduType::CAPSULE_RESP => {
                assert_eq!(plen, head, "{ch:?}: PLEN of a response");
                let (response, _) = CapsuleResp::read_from_prefix(bytes).expect("a response");
                self.end(response.cqe.cid, response.cqe.status(), response.cqe.result64(), ended);
            }
            PduType::C2H_DATA => self.data(bytes, head, ended),
            PduType::R2T => {
                assert_eq!(plen, head, "{ch:?}: PLEN of an R2T");
                let (r2t, _) = R2t::read_from_prefix(bytes).expect("R2T");
                self.asked(&r2t);
            }
            PduType::C2H_TERM_REQ => {
                let (term, _) = TermReq::read_from_prefix(bytes).expect("C2HTermReq");
                let known = (FatalError::INVALID_HEADER_FIELD.0..=FatalError::UNSUPPORTED_PARAMETER.0).contains(&term.fes.0);
                assert!(known && plen <= 24 + TermReq::MAX_DATA, "{term:?}");
                assert!(!self.sane, "{term:?} for a host that has done nothing wrong; {:?}", self.commands);
                self.terminated = true;
            }
            _ => panic!("{ch:?} is not the target's to send"),
        }
    }

    fn data(&mut self, bytes: &[u8], head: usize, ended: &mut Vec<(Command, Status, u64)>) {
        let (header, _) = DataPdu::read_from_prefix(bytes).expect("C2HData");
        let (from, len) = (usize::from(header.ch.pdo), header.datal as usize);
        let digest = if self.digests.data() { 4 } else { 0 };
        assert_eq!(header.ch.flags.ddgst(), self.digests.data(), "{header:?}: DDGSTF");
        assert!(from >= head && from.is_multiple_of(4) && from + len + digest == bytes.len() && len > 0, "{header:?}: lengths");
        let data = &bytes[from..from + len];
        if digest > 0 {
            assert_eq!(bytes[from + len..], crc32c::crc32c(data).to_le_bytes(), "{header:?}: data digest");
        }
        if !self.sane {
            return;
        }
        let cid = header.cccid;
        let command = self.commands.iter_mut().find(|command| command.entry.cdw0.cid() == cid);
        let command = command.unwrap_or_else(|| panic!("{header:?} for no command"));
        assert_eq!(header.datao, command.moved, "{header:?}: DATAO of {command:?}");
        command.moved += header.datal;
        let sgl = command.entry.sgl();
        assert!(sgl.is_transport() && command.moved <= sgl.length, "{header:?}: more than {command:?} asked for");
        if command.kind == Kind::Authentication
            && let Some(auth) = &mut self.auth
        {
            self.message = match auth.take(data) {
                HostStep::Send(message) | HostStep::Finish(message) | HostStep::Failed(_, Some(message)) => Some(message),
                HostStep::Done | HostStep::Failed(_, None) => None,
            };
        }
        if header.ch.flags.success() {
            assert!(header.ch.flags.last() && self.no_flow_control, "{header:?} ends {command:?}");
            self.end(cid, Status::SUCCESS, 0, ended);
        }
    }

    fn asked(&mut self, r2t: &R2t) {
        if !self.sane {
            return;
        }
        let command = self.commands.iter_mut().find(|command| command.entry.cdw0.cid() == r2t.cccid);
        let command = command.unwrap_or_else(|| panic!("{r2t:?} for no command"));
        let end = r2t.r2to.checked_add(r2t.r2tl).expect("a range");
        let sgl = command.entry.sgl();
        assert!(sgl.is_transport() && r2t.r2tl > 0 && end <= sgl.length, "{r2t:?}: more than {command:?} has");
        assert!(command.r2t.is_none() && r2t.r2to == command.moved, "{r2t:?} out of turn: {command:?}");
        (command.r2t, command.moved) = (Some((r2t.ttag, r2t.r2to..end)), end);
    }

    fn end(&mut self, cid: u16, status: Status, result: u64, ended: &mut Vec<(Command, Status, u64)>) {
        let at = self.commands.iter().position(|command| command.entry.cdw0.cid() == cid);
        let Some(at) = at else {
            assert!(!self.sane, "an answer to CID {cid}, which is no command's: {status:?}");
            return;
        };
        let command = self.commands.swap_remove(at);
        assert!(!self.sane || command.r2t.is_none() || status.is_error(), "{command:?} has succeeded without its data");
        let open = matches!(command.kind, Kind::Connect(..) | Kind::Authentication);
        assert!(!self.sane || !self.unproved || open || status.is_error(), "{command:?} of a host that has not proved itself");
        match command.kind {
            Kind::Connect(..) if status.is_error() => self.connects_refused += 1,
            Kind::Connect(qid, _) => {
                assert!(!self.sane || !self.stranger, "{command:?} of a host that may not connect");
                self.link = Some((result as u16, qid));
                self.no_flow_control = ConnectAttributes::from_bits((command.entry.cdw11 >> 16) as u8).no_sq_flow_control();
            }
            _ => {}
        }
        if command.entry.cdw0.opcode() == fabrics::OPCODE && command.entry.fabrics_type() == FabricsType::DISCONNECT {
            self.explained |= !status.is_error();
        }
        ended.push((command, status, result));
    }
}
