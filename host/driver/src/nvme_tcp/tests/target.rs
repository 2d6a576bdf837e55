//! A scripted target: answers what an honest one would, as simply as it can.

use dray_device::socket::{Stream, UnixSocket};
use dray_nvme::auth::{ControllerAuth, ControllerAuthConfig, Entropy};
use dray_nvme::command::{AdminOpcode, CompletionEntry, NvmOpcode, StatusPhase, SubmissionEntry};
use dray_nvme::feature::{FeatureId, NumberOfQueues};
use dray_nvme::identify::IdentifyController;
use dray_nvme::registers::{Cap, offset};
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::{
    AuthenticationCommand, CAPABILITIES_OFFSET, ConnectCommand, ConnectResponse, FabricsType, OPCODE, PropertyCommand,
};
use dray_nvme::tcp::pdu::{
    CapsuleCmd, CapsuleResp, CommonHeader, DataPdu, Digests, IcReq, IcResp, PduFlags, PduType, R2t, data_offset,
};
use dray_nvme::tcp::{DiscoveryEntry, DiscoveryLogHeader};
use std::io::IoSlice;
use zerocopy::{FromBytes, IntoBytes};

pub(super) const BLOCK: usize = 512;

/// What a target is like.
#[derive(Clone)]
pub(super) struct Traits {
    pub(super) digests: Digests,
    pub(super) cpda: u8,
    pub(super) maxh2cdata: u32,
    /// Bytes of a write that may come with the command.
    pub(super) in_capsule: u32,
    /// Reads end by the flag in the data rather than by a response.
    pub(super) success_flag: bool,
    /// Most data of one C2HData PDU, and of one R2T.
    pub(super) piece: usize,
    pub(super) auth: Option<ControllerAuthConfig>,
    pub(super) discovery: usize,
}

impl Default for Traits {
    fn default() -> Self {
        Self {
            digests: Digests::new().with_header(true).with_data(true),
            cpda: 0,
            maxh2cdata: 8192,
            in_capsule: 4096,
            success_flag: true,
            piece: 12 << 10,
            auth: None,
            discovery: 0,
        }
    }
}

struct Writing {
    sqe: SubmissionEntry,
    data: Vec<u8>,
    asked: usize,
}

pub(super) struct Target {
    traits: Traits,
    stream: UnixSocket,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    pub(super) media: Vec<u8>,
    pub(super) keep_alives: u32,
    /// PDU types as they came.
    pub(super) seen: Vec<u8>,
    /// Commands are taken and not answered.
    pub(super) silent: bool,
    qid: u16,
    cc: u64,
    auth: Option<ControllerAuth>,
    writing: Vec<Writing>,
    pub(super) closed: bool,
    /// A byte of the next PDU that is changed behind its digests.
    pub(super) corrupt: Option<usize>,
}

impl Target {
    pub(super) fn new(traits: Traits) -> (Self, Box<dyn Stream>) {
        let (stream, host) = UnixSocket::pair().expect("a pair");
        let mut seed = 100;
        let mut fill = |into: &mut [u8]| {
            seed += 1;
            into.fill(seed);
        };
        let auth = traits.auth.clone().map(|config| ControllerAuth::new(config, Entropy::draw(&mut fill)));
        let target = Self {
            traits,
            stream,
            inbox: Vec::new(),
            outbox: Vec::new(),
            media: vec![0; 4 << 20],
            keep_alives: 0,
            seen: Vec::new(),
            silent: false,
            qid: 0,
            cc: 0,
            auth,
            writing: Vec::new(),
            closed: false,
            corrupt: None,
        };
        (target, Box::new(host))
    }

    pub(super) fn poll(&mut self) {
        let mut piece = [0; 5000];
        for _ in 0..64 {
            match self.stream.recv(&mut piece, &mut Vec::new()) {
                Ok(0) => self.closed = true,
                Ok(got) => {
                    self.inbox.extend_from_slice(&piece[..got]);
                    continue;
                }
                Err(_) => {}
            }
            break;
        }
        while self.inbox.len() >= 8 {
            let common = CommonHeader::read_from_prefix(&self.inbox).expect("a header").0;
            let plen = common.plen as usize;
            assert!(plen >= usize::from(common.hlen), "PLEN");
            if self.inbox.len() < plen {
                break;
            }
            let pdu: Vec<u8> = self.inbox.drain(..plen).collect();
            self.seen.push(common.pdu_type.0);
            self.take(&common, &pdu);
        }
        while !self.outbox.is_empty() {
            match self.stream.send(&[IoSlice::new(&self.outbox)], &[]) {
                Ok(went) => drop(self.outbox.drain(..went)),
                Err(_) => break,
            }
        }
    }

    /// The data of a PDU, its digests checked.
    fn checked(&self, common: &CommonHeader, pdu: &[u8]) -> Vec<u8> {
        let hlen = usize::from(common.hlen);
        assert_eq!(common.flags.hdgst(), self.traits.digests.header());
        if common.flags.hdgst() {
            assert_eq!(crc32c::crc32c(&pdu[..hlen]).to_le_bytes(), pdu[hlen..hlen + 4], "header digest");
        }
        if common.pdo == 0 {
            return Vec::new();
        }
        let pdo = usize::from(common.pdo);
        assert_eq!(pdo as u32, data_offset(common.hlen, common.flags.hdgst(), self.traits.cpda));
        assert_eq!(common.flags.ddgst(), self.traits.digests.data());
        let end = pdu.len() - if common.flags.ddgst() { 4 } else { 0 };
        if common.flags.ddgst() {
            assert_eq!(crc32c::crc32c(&pdu[pdo..end]).to_le_bytes(), pdu[end..], "data digest");
        }
        pdu[pdo..end].to_vec()
    }

    fn take(&mut self, common: &CommonHeader, pdu: &[u8]) {
        match common.pdu_type {
            PduType::IC_REQ => {
                let request = IcReq::read_from_bytes(pdu).expect("ICReq");
                assert_eq!((request.pfv, request.hpda, request.maxr2t), (0, 0, 0));
                let ch = CommonHeader { pdu_type: PduType::IC_RESP, hlen: 128, plen: 128, ..CommonHeader::default() };
                let (cpda, dgst, maxh2cdata) = (self.traits.cpda, self.traits.digests, self.traits.maxh2cdata);
                let response = IcResp { ch, cpda, dgst, maxh2cdata, ..IcResp::default() };
                self.send(response.as_bytes().to_vec());
            }
            PduType::CAPSULE_CMD => {
                let data = self.checked(common, pdu);
                let sqe = CapsuleCmd::read_from_prefix(pdu).expect("a capsule").0.sqe;
                if !self.silent {
                    self.command(&sqe, data);
                }
            }
            PduType::H2C_DATA => {
                let data = self.checked(common, pdu);
                let header = DataPdu::read_from_prefix(pdu).expect("data").0;
                self.data(&header, common.flags.last(), &data);
            }
            _ => {}
        }
    }

    fn command(&mut self, sqe: &SubmissionEntry, data: Vec<u8>) {
        if sqe.sgl().is_in_capsule() {
            assert_eq!(sqe.sgl().length as usize, data.len());
        } else {
            assert!(sqe.sgl().is_transport());
        }
        if sqe.cdw0.opcode() == OPCODE {
            self.fabrics(sqe, &data);
        } else if self.qid == 0 {
            self.admin(sqe);
        } else {
            self.io(sqe, data);
        }
    }

    fn fabrics(&mut self, sqe: &SubmissionEntry, data: &[u8]) {
        match sqe.fabrics_type() {
            FabricsType::CONNECT => {
                assert_eq!(data.len(), 1024);
                self.qid = sqe.read_as::<ConnectCommand>().expect("Connect").qid;
                let response = ConnectResponse::new().with_cntlid(7).with_authentication_required(self.auth.is_some());
                self.respond(sqe, Status::SUCCESS, u64::from(response.into_bits()));
            }
            FabricsType::PROPERTY_GET => {
                let property = sqe.read_as::<PropertyCommand>().expect("Property Get").offset;
                let shutting = self.cc >> 14 & 3 != 0;
                let value = match property {
                    offset::CAP => Cap::new().with_mqes(127).with_to(10).with_css(1).into_bits(),
                    offset::VS => 0x0002_0000,
                    offset::CSTS => (self.cc & 1) | if shutting { 2 << 2 } else { 0 },
                    other => panic!("property {other:#x}"),
                };
                self.respond(sqe, Status::SUCCESS, value);
            }
            FabricsType::PROPERTY_SET => {
                self.cc = sqe.read_as::<PropertyCommand>().expect("Property Set").value;
                self.respond(sqe, Status::SUCCESS, 0);
            }
            FabricsType::AUTHENTICATION_SEND => {
                self.auth.as_mut().expect("authentication").take(data);
                self.respond(sqe, Status::SUCCESS, 0);
            }
            FabricsType::AUTHENTICATION_RECEIVE => {
                let capacity = sqe.read_as::<AuthenticationCommand>().expect("Receive").length as usize;
                match self.auth.as_mut().expect("authentication").give(capacity) {
                    Ok(message) => self.give(sqe, &message),
                    Err(_) => self.respond(sqe, Status::COMMAND_SEQUENCE, 0),
                }
            }
            other => panic!("{other}"),
        }
    }

    fn admin(&mut self, sqe: &SubmissionEntry) {
        match sqe.admin_opcode() {
            AdminOpcode::IDENTIFY if sqe.cdw10 & 0xFF == 1 => {
                let mut page = IdentifyController { cntlid: 7, mdts: 8, aerl: 1, nn: 1, ..IdentifyController::default() };
                page.oncs.set_write_zeroes(true);
                let mut bytes = page.as_bytes().to_vec();
                let ioccsz = (64 + self.traits.in_capsule) / 16;
                bytes[CAPABILITIES_OFFSET..CAPABILITIES_OFFSET + 4].copy_from_slice(&ioccsz.to_le_bytes());
                self.give(sqe, &bytes);
            }
            AdminOpcode::IDENTIFY => self.respond(sqe, Status::INVALID_FIELD, 0),
            AdminOpcode::SET_FEATURES => {
                assert_eq!(sqe.cdw10 & 0xFF, u32::from(FeatureId::NUMBER_OF_QUEUES.0));
                let granted = NumberOfQueues::new().with_nsq(1).with_ncq(1);
                self.respond(sqe, Status::SUCCESS, u64::from(granted.into_bits()));
            }
            AdminOpcode::GET_LOG_PAGE => {
                let count = self.traits.discovery;
                let header = DiscoveryLogHeader { genctr: 5, numrec: count as u64, ..DiscoveryLogHeader::default() };
                let mut page = header.as_bytes().to_vec();
                for index in 0..count {
                    let entry = DiscoveryEntry { portid: index as u16, ..DiscoveryEntry::default() };
                    page.extend_from_slice(entry.as_bytes());
                }
                let from = sqe.offset() as usize;
                let bytes = page[from..from + sqe.sgl().length as usize].to_vec();
                self.give(sqe, &bytes);
            }
            AdminOpcode::KEEP_ALIVE => {
                self.keep_alives += 1;
                self.respond(sqe, Status::SUCCESS, 0);
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => {}
            _ => self.respond(sqe, Status::INVALID_OPCODE, 0),
        }
    }

    fn io(&mut self, sqe: &SubmissionEntry, data: Vec<u8>) {
        let at = sqe.slba() as usize * BLOCK;
        let len = ((sqe.cdw12 & 0xFFFF) as usize + 1) * BLOCK;
        match sqe.nvm_opcode() {
            NvmOpcode::READ if at + len <= self.media.len() => {
                let bytes = self.media[at..at + len].to_vec();
                self.give(sqe, &bytes);
            }
            NvmOpcode::WRITE if at + len <= self.media.len() && !data.is_empty() => {
                self.media[at..at + len].copy_from_slice(&data);
                self.respond(sqe, Status::SUCCESS, 0);
            }
            NvmOpcode::WRITE if at + len <= self.media.len() => {
                self.writing.push(Writing { sqe: *sqe, data: Vec::new(), asked: 0 });
                self.ask(self.writing.len() - 1);
            }
            NvmOpcode::FLUSH => self.respond(sqe, Status::SUCCESS, 0),
            _ => self.respond(sqe, Status::LBA_OUT_OF_RANGE.with_dnr(), 0),
        }
    }

    fn ask(&mut self, index: usize) {
        let writing = &mut self.writing[index];
        let total = writing.sqe.sgl().length as usize;
        let part = (total - writing.asked).min(self.traits.piece);
        let ch = CommonHeader { pdu_type: PduType::R2T, hlen: 24, plen: 24, ..CommonHeader::default() };
        let (cccid, ttag) = (writing.sqe.cdw0.cid(), 0xA000 + index as u16);
        let r2t = R2t { ch, cccid, ttag, r2to: writing.asked as u32, r2tl: part as u32, rsvd20: 0 };
        writing.asked += part;
        self.send(r2t.as_bytes().to_vec());
    }

    fn data(&mut self, header: &DataPdu, last: bool, data: &[u8]) {
        assert!(header.datal <= self.traits.maxh2cdata && header.datal as usize == data.len());
        let index = usize::from(header.ttag - 0xA000);
        let writing = &mut self.writing[index];
        assert_eq!((header.cccid, header.datao as usize), (writing.sqe.cdw0.cid(), writing.data.len()));
        writing.data.extend_from_slice(data);
        let (have, sqe) = (writing.data.len(), writing.sqe);
        assert_eq!(last, have == writing.asked);
        if have == sqe.sgl().length as usize {
            let at = sqe.slba() as usize * BLOCK;
            let data = std::mem::take(&mut self.writing[index].data);
            self.media[at..at + data.len()].copy_from_slice(&data);
            self.respond(&sqe, Status::SUCCESS, 0);
        } else if last {
            self.ask(index);
        }
    }

    /// Data to the host, then its end.
    fn give(&mut self, sqe: &SubmissionEntry, data: &[u8]) {
        let whole = data.len() == sqe.sgl().length as usize;
        let mut at = 0;
        while at < data.len() {
            let part = (data.len() - at).min(self.traits.piece);
            let last = at + part == data.len();
            let flags = PduFlags::new().with_last(last).with_success(last && whole && self.traits.success_flag);
            let pdo = data_offset(24, self.traits.digests.header(), 0);
            let ch = CommonHeader { pdu_type: PduType::C2H_DATA, flags, hlen: 24, pdo: pdo as u8, plen: pdo + part as u32 };
            let header = DataPdu { ch, cccid: sqe.cdw0.cid(), ttag: 0, datao: at as u32, datal: part as u32, rsvd20: 0 };
            let mut pdu = header.as_bytes().to_vec();
            pdu.extend_from_slice(&data[at..at + part]);
            self.send(pdu);
            at += part;
        }
        if !(whole && self.traits.success_flag) {
            self.respond(sqe, Status::SUCCESS, 0);
        }
    }

    fn respond(&mut self, sqe: &SubmissionEntry, status: Status, result: u64) {
        let ch = CommonHeader { pdu_type: PduType::CAPSULE_RESP, hlen: 24, plen: 24, ..CommonHeader::default() };
        let status_phase = StatusPhase::new().with_status(status);
        let (dw0, dw1) = (result as u32, (result >> 32) as u32);
        let cqe = CompletionEntry { dw0, dw1, cid: sqe.cdw0.cid(), status_phase, ..CompletionEntry::default() };
        self.send(CapsuleResp { ch, cqe }.as_bytes().to_vec());
    }

    /// Takes a PDU without digests (PLEN may be without them too), adds digests.
    fn send(&mut self, pdu: Vec<u8>) {
        if pdu.len() < 24 {
            self.outbox.extend(pdu);
            return;
        }
        let opening = pdu[0] == PduType::IC_RESP.0;
        let (header, data) = pdu.split_at(if opening { 128 } else { 24 });
        let mut header = header.to_vec();
        let has_data = header[0] == PduType::C2H_DATA.0;
        let (hdgst, ddgst) = (self.traits.digests.header() && !opening, self.traits.digests.data() && has_data);
        header[1] |= u8::from(hdgst) | u8::from(ddgst) << 1;
        let mut plen = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        plen += if hdgst && !has_data { 4 } else { 0 } + if ddgst { 4 } else { 0 };
        header[4..8].copy_from_slice(&plen.to_le_bytes());
        let digest = crc32c::crc32c(&header);
        let start = self.outbox.len();
        self.outbox.extend_from_slice(&header);
        if hdgst {
            self.outbox.extend_from_slice(&digest.to_le_bytes());
        }
        self.outbox.extend_from_slice(data);
        if ddgst {
            self.outbox.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
        }
        if let Some(place) = self.corrupt.take() {
            self.outbox[start + place] ^= 0x10;
        }
    }
}
