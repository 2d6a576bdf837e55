//! A target with a real subsystem behind it, and a client that speaks PDUs by hand.

pub(super) use super::super::*;
pub(super) use dray_controller::{ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig};
pub(super) use dray_device::backing::Backing;
pub(super) use dray_device::poll::{Poll, Time};
pub(super) use dray_device::random::SecureRandom;
pub(super) use dray_device::slot::{Fence, Slot};
pub(super) use dray_device::socket::{Stream, UnixSocket};
pub(super) use dray_device::space::AddressSpace;
pub(super) use dray_nvme::auth::{HostAuth, HostAuthConfig, HostStep, Secret};
pub(super) use dray_nvme::command::{AdminOpcode, CompletionEntry, SglDescriptor, SubmissionEntry};
pub(super) use dray_nvme::identify::{Cns, CommandSetId, IdentifyController, IdentifyNamespace};
pub(super) use dray_nvme::log::LogId;
pub(super) use dray_nvme::registers::{Cap, Csts, offset};
pub(super) use dray_nvme::status::Status;
pub(super) use dray_nvme::tcp::discovery::{DISCOVERY_CHANGE, DISCOVERY_CHANGE_NOTICE, DISCOVERY_LOG};
pub(super) use dray_nvme::tcp::fabrics::{self, ConnectAttributes, ConnectResponse};
pub(super) use dray_nvme::tcp::pdu::{CapsuleCmd, CapsuleResp, Digests, FatalError, PduFlags, R2t, field};
pub(super) use dray_nvme::tcp::{
    AnaState, CommonHeader, ConnectData, DISCOVERY_NQN, DataPdu, DiscoveryEntry, IcReq, IcResp, PduType, TermReq,
    write_text,
};
pub(super) use std::io::IoSlice;
pub(super) use std::net::SocketAddr;
pub(super) use zerocopy::{FromBytes, IntoBytes};

pub(super) const NQN: &str = "nqn.2025-01.io.dray:tested";
pub(super) const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:host";
pub(super) const CC: u32 = 0x0046_0001;
pub(super) const BLOCKS: u64 = 8192;

pub(super) struct Seeded(pub(super) fastrand::Rng);

impl SecureRandom for Seeded {
    fn fill(&mut self, into: &mut [u8]) {
        self.0.fill(into);
    }
}

pub(super) struct World {
    pub(super) subsystem: Subsystem,
    pub(super) target: Target,
    pub(super) slots: Vec<Slot>,
    pub(super) fences: Vec<Fence>,
    pub(super) now: Time,
}

pub(super) fn access(nqn: &str, secret: Option<Secret>) -> HostAccess {
    HostAccess { nqn: nqn.into(), secret, controller_secret: None }
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(Limits::default(), vec![access(HOST, None)])
    }

    pub(super) fn with(limits: Limits, allowed_hosts: Vec<HostAccess>) -> Self {
        Self::made(limits, allowed_hosts, DigestPolicy::AsAsked)
    }

    pub(super) fn requiring_digests() -> Self {
        Self::made(Limits::default(), vec![access(HOST, None)], DigestPolicy::Required)
    }

    fn made(limits: Limits, allowed_hosts: Vec<HostAccess>, digests: DigestPolicy) -> Self {
        let fences = vec![Fence::default(), Fence::default()];
        let controller = |index: usize| ControllerConfig {
            cntlid: index as u16 + 1,
            role: ControllerRole::Migratable,
            namespaces: vec![1],
            io_queues: 4,
            vectors: 1,
            fence: fences[index].clone(),
        };
        let config = SubsystemConfig { controllers: vec![controller(0), controller(1)], ..SubsystemConfig::default() };
        let namespace = NamespaceConfig {
            nsid: 1,
            nguid: [1; 16],
            eui64: [0; 8],
            uuid: [7; 16],
            shared: true,
            write_protected: false,
        };
        let backing: Box<dyn Backing> = Box::new(MemoryBacking::new(BLOCKS * 512, 512).expect("backing"));
        let subsystem = Subsystem::new(config, vec![(namespace, backing)]).expect("subsystem");
        let slots: Vec<_> = (0..2).map(|_| Slot::new(AddressSpace::default(), 1).expect("slot")).collect();
        for (slot, cntlid) in slots.iter().zip(1..) {
            slot.point_at(&subsystem.plug(cntlid).expect("plug"));
        }
        let exported = ExportedSubsystem {
            nqn: NQN.into(),
            serial: "EXPORTED".into(),
            allowed_hosts,
            allow_any_host: false,
            digests,
            controllers: vec![(11, slots[0].clone()), (12, slots[1].clone())],
            ana_groups: vec![AnaGroupConfig { id: 1, nsids: vec![1], state: AnaState::OPTIMIZED }],
        };
        let config = TargetConfig {
            subsystems: vec![exported],
            discovery: true,
            limits,
            dh_groups: Vec::new(),
            random: Box::new(Seeded(fastrand::Rng::with_seed(5))),
        };
        let target = Target::new(config).expect("target");
        let mut world = Self { subsystem, target, slots, fences, now: Time::from_us(1) };
        world.poll(4);
        world
    }

    pub(super) fn poll(&mut self, times: u32) {
        for _ in 0..times {
            self.now = self.now.after_us(1);
            let _work = self.target.poll(self.now);
            let _work = self.subsystem.poll(self.now);
        }
    }

    pub(super) fn client(&mut self) -> Client {
        let (ours, theirs) = UnixSocket::pair().expect("pair");
        self.target.accept(Box::new(theirs), SocketAddr::from(([127, 0, 0, 1], 4420)));
        Client { stream: ours, bytes: Vec::new(), digests: Digests::new(), cid: 0, closed: false }
    }

    /// A client whose connection is initialised.
    pub(super) fn greeted(&mut self, digests: Digests) -> Client {
        let mut client = self.client();
        client.digests = digests;
        client.send(&client.icreq());
        let response = IcResp::read_from_bytes(&client.pdu(self).expect("ICResp")).expect("ICResp");
        assert_eq!((response.ch.pdu_type, response.dgst), (PduType::IC_RESP, digests));
        client
    }

    pub(super) fn admin(&mut self, digests: Digests) -> Client {
        let mut client = self.greeted(digests);
        let done = client.connect(self, 0, 0xFFFF, NQN, HOST);
        assert_ok(&done);
        client
    }

    /// An association with an enabled controller, and one I/O queue.
    pub(super) fn associated(&mut self, digests: Digests) -> (Client, Client) {
        let mut admin = self.admin(digests);
        assert_ok(&admin.run(self, SubmissionEntry::property_set(offset::CC, false, CC.into())));
        self.poll(4);
        let csts = admin.run(self, SubmissionEntry::property_get(offset::CSTS, false));
        assert!(Csts::from_bits(csts.dw0).rdy());
        let cntlid = self.cntlid();
        let mut io = self.greeted(digests);
        assert_ok(&io.connect(self, 1, cntlid, NQN, HOST));
        (admin, io)
    }

    /// The controller that was taken last.
    pub(super) fn cntlid(&self) -> u16 {
        self.target.associations().map(|(_, cntlid, _)| cntlid).max().expect("association")
    }
}

pub(super) fn assert_ok(done: &CompletionEntry) {
    assert!(!done.status().is_error(), "{done:?}");
}

pub(super) struct Client {
    pub(super) stream: UnixSocket,
    pub(super) bytes: Vec<u8>,
    pub(super) digests: Digests,
    pub(super) cid: u16,
    pub(super) closed: bool,
}

/// The bytes of a PDU: header, digest, data, digest.
pub(super) fn pdu(mut header: Vec<u8>, data: &[u8], digests: Digests) -> Vec<u8> {
    let hlen = header.len();
    let (hd, dd) = (usize::from(digests.header()) * 4, usize::from(digests.data() && !data.is_empty()) * 4);
    let flags = PduFlags::from_bits(header[1]).with_hdgst(hd > 0).with_ddgst(dd > 0);
    (header[1], header[2]) = (flags.into_bits(), hlen as u8);
    header[3] = if data.is_empty() { 0 } else { (hlen + hd) as u8 };
    let plen = (hlen + hd + data.len() + dd) as u32;
    header[4..8].copy_from_slice(&plen.to_le_bytes());
    if hd > 0 {
        header.extend(crc32c::crc32c(&header.clone()).to_le_bytes());
    }
    header.extend(data);
    if dd > 0 {
        header.extend(crc32c::crc32c(data).to_le_bytes());
    }
    header
}

pub(super) fn capsule(sqe: SubmissionEntry, data: &[u8], digests: Digests) -> Vec<u8> {
    let ch = CommonHeader { pdu_type: PduType::CAPSULE_CMD, ..Default::default() };
    pdu(CapsuleCmd { ch, sqe }.as_bytes().to_vec(), data, digests)
}

pub(super) fn h2c(cccid: u16, ttag: u16, datao: u32, last: bool, data: &[u8], digests: Digests) -> Vec<u8> {
    let ch = CommonHeader {
        pdu_type: PduType::H2C_DATA,
        flags: PduFlags::new().with_last(last),
        ..Default::default()
    };
    let header = DataPdu { ch, cccid, ttag, datao, datal: data.len() as u32, rsvd20: 0 };
    pdu(header.as_bytes().to_vec(), data, digests)
}

impl Client {
    pub(super) fn icreq(&self) -> Vec<u8> {
        let ch = CommonHeader { pdu_type: PduType::IC_REQ, hlen: 128, plen: 128, ..Default::default() };
        IcReq { ch, dgst: self.digests, ..Default::default() }.as_bytes().to_vec()
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            match self.stream.send(&[IoSlice::new(&bytes[at..])], &[]) {
                Ok(sent) => at += sent,
                Err(_) => return,
            }
        }
    }

    /// Sends while the world goes on, for more than the socket holds.
    pub(super) fn send_all(&mut self, world: &mut World, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            at += self.stream.send(&[IoSlice::new(&bytes[at..])], &[]).unwrap_or(0);
            world.poll(1);
        }
    }

    /// The next PDU from the target; `None` when it has closed or sends nothing.
    pub(super) fn pdu(&mut self, world: &mut World) -> Option<Vec<u8>> {
        for _ in 0..2000 {
            if let Ok((ch, _)) = CommonHeader::read_from_prefix(&self.bytes)
                && self.bytes.len() >= ch.plen as usize
                && ch.plen >= 8
            {
                return Some(self.bytes.drain(..ch.plen as usize).collect());
            }
            if self.closed {
                return None;
            }
            world.poll(1);
            let mut piece = [0; 65536];
            match self.stream.recv(&mut piece, &mut Vec::new()) {
                Ok(0) => self.closed = true,
                Ok(len) => self.bytes.extend(&piece[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => self.closed = true,
            }
        }
        None
    }

    pub(super) fn next(&mut self, sqe: SubmissionEntry) -> SubmissionEntry {
        self.cid = self.cid.wrapping_add(3);
        sqe.with_cid(self.cid)
    }

    pub(super) fn response(&self, bytes: &[u8]) -> Option<CompletionEntry> {
        let (response, rest) = CapsuleResp::read_from_prefix(bytes).ok()?;
        if response.ch.pdu_type != PduType::CAPSULE_RESP {
            return None;
        }
        if self.digests.header() {
            assert_eq!(rest, crc32c::crc32c(&bytes[..24]).to_le_bytes());
        }
        Some(response.cqe)
    }

    /// A command without data.
    pub(super) fn run(&mut self, world: &mut World, sqe: SubmissionEntry) -> CompletionEntry {
        let sqe = self.next(sqe.with_sgl(SglDescriptor::transport(0)));
        self.send(&capsule(sqe, &[], self.digests));
        self.done(world, sqe.cdw0.cid())
    }

    pub(super) fn done(&mut self, world: &mut World, cid: u16) -> CompletionEntry {
        let bytes = self.pdu(world).expect("a PDU");
        let cqe = self.response(&bytes).unwrap_or_else(|| panic!("no response but {bytes:?}"));
        assert_eq!(cqe.cid, cid);
        cqe
    }

    /// A command with data in its capsule.
    pub(super) fn run_with(&mut self, world: &mut World, sqe: SubmissionEntry, data: &[u8]) -> CompletionEntry {
        let sqe = self.next(sqe.with_sgl(SglDescriptor::in_capsule(0, data.len() as u32)));
        self.send(&capsule(sqe, data, self.digests));
        self.done(world, sqe.cdw0.cid())
    }

    /// A command that brings data; `None` for a response without.
    pub(super) fn fetch(&mut self, world: &mut World, sqe: SubmissionEntry, len: u32) -> (CompletionEntry, Vec<u8>) {
        let sqe = self.next(sqe.with_sgl(SglDescriptor::transport(len)));
        self.send(&capsule(sqe, &[], self.digests));
        self.fetched(world, sqe.cdw0.cid())
    }

    pub(super) fn fetched(&mut self, world: &mut World, cid: u16) -> (CompletionEntry, Vec<u8>) {
        let mut data = Vec::new();
        loop {
            let bytes = self.pdu(world).expect("a PDU");
            if let Some(cqe) = self.response(&bytes) {
                assert_eq!(cqe.cid, cid);
                return (cqe, data);
            }
            let (header, _) = DataPdu::read_from_prefix(&bytes).expect("data");
            assert_eq!((header.ch.pdu_type, header.cccid, header.datao), (PduType::C2H_DATA, cid, 0));
            let end = usize::from(header.ch.pdo) + header.datal as usize;
            data = bytes[usize::from(header.ch.pdo)..end].to_vec();
            if self.digests.data() {
                assert_eq!(bytes[end..], crc32c::crc32c(&data).to_le_bytes());
            }
            if header.ch.flags.success() {
                return (CompletionEntry { cid, ..Default::default() }, data);
            }
        }
    }

    /// A write whose data is asked for by R2Ts; the number of R2Ts.
    pub(super) fn write(&mut self, world: &mut World, slba: u64, data: &[u8], piece: usize) -> (CompletionEntry, u32) {
        let sqe = SubmissionEntry::write(1, slba, (data.len() / 512) as u32);
        let sqe = self.next(sqe.with_sgl(SglDescriptor::transport(data.len() as u32)));
        self.send(&capsule(sqe, &[], self.digests));
        let mut asked = 0;
        loop {
            let bytes = self.pdu(world).expect("a PDU");
            if let Some(cqe) = self.response(&bytes) {
                return (cqe, asked);
            }
            let (r2t, _) = R2t::read_from_prefix(&bytes).expect("R2T");
            assert_eq!((r2t.ch.pdu_type, r2t.cccid), (PduType::R2T, sqe.cdw0.cid()));
            asked += 1;
            let range = r2t.r2to as usize..(r2t.r2to + r2t.r2tl) as usize;
            let end = range.end;
            for at in range.step_by(piece) {
                let upto = end.min(at + piece);
                let bytes = h2c(r2t.cccid, r2t.ttag, at as u32, upto == end, &data[at..upto], self.digests);
                self.send_all(world, &bytes);
            }
        }
    }

    pub(super) fn connect(&mut self, world: &mut World, qid: u16, cntlid: u16, nqn: &str, host: &str) -> CompletionEntry {
        let cattr = ConnectAttributes::new().with_no_sq_flow_control(true);
        let sqe = SubmissionEntry::connect(qid, 32, cattr, 5000);
        self.connect_with(world, sqe, cntlid, nqn, host)
    }

    pub(super) fn connect_with(&mut self, world: &mut World, sqe: SubmissionEntry, cntlid: u16, nqn: &str, host: &str) -> CompletionEntry {
        let mut data = ConnectData { hostid: [9; 16], cntlid, ..Default::default() };
        write_text(&mut data.subnqn, nqn);
        write_text(&mut data.hostnqn, host);
        let sqe = self.next(sqe);
        self.send(&capsule(sqe, data.as_bytes(), self.digests));
        self.done(world, sqe.cdw0.cid())
    }

    /// The target's C2HTermReq, and then nothing more.
    pub(super) fn terminated(&mut self, world: &mut World) -> (FatalError, u32) {
        let bytes = self.pdu(world).expect("C2HTermReq");
        let (term, rest) = TermReq::read_from_prefix(&bytes).expect("C2HTermReq");
        assert_eq!(term.ch.pdu_type, PduType::C2H_TERM_REQ);
        assert_eq!(term.ch.plen as usize, 24 + rest.len());
        (term.fes, term.fei())
    }
}

pub(super) fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8).collect()
}

pub(super) const BOTH: Digests = Digests::new().with_header(true).with_data(true);

