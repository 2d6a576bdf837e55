//! The discovery controller: what subsystems a host may connect to, and where (Base 2.3 §3.1.3.3, §5.2.12.3.1).

use super::connection::Connection;
use super::config::Limits;
use super::target::Exported;
use dray_device::poll::Time;
use dray_nvme::command::{AdminOpcode, FeaturesCdw10, GetLogCdw10, GetLogCdw11, IdentifyCdw10, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{Cns, ControllerType, IdentifyController, write_ascii};
use dray_nvme::registers::{Cap, Cc, Csts, ShutdownNotification, ShutdownStatus, Vs, offset};
use dray_nvme::status::Status;
use dray_nvme::tcp::discovery::{
    AddressFamily, DISCOVERY_CHANGE, DISCOVERY_CHANGE_NOTICE, DISCOVERY_LOG, TransportType,
};
use dray_nvme::tcp::fabrics::{CNTLID_DYNAMIC, SGLS_TCP};
use dray_nvme::tcp::{DISCOVERY_NQN, DiscoveryEntry, DiscoveryLogHeader, SubsystemType, write_text};
use std::net::SocketAddr;
use zerocopy::{FromZeros, IntoBytes};

/// Entries of a discovery controller's admin queue.
pub(super) const ENTRIES: u16 = 32;
/// Event requests that wait.
const AERS: usize = 4;
/// Most bytes of one Get Log Page: MDTS of 2^5 pages.
const MDTS: u8 = 5;
/// Keep alive timeout of a discovery controller whose host gave none: two minutes.
const DEFAULT_KATO_MS: u32 = 120_000;

/// One host's discovery controller; it lives and dies with its connection.
pub(super) struct DiscoveryController {
    pub(super) cntlid: u16,
    pub(super) host: String,
    cc: Cc,
    pub(super) kato_ms: u32,
    /// The last sign of life.
    pub(super) alive: Time,
    aers: Vec<u16>,
    events: u32,
    /// The log's generation that the host has been told of.
    told: u64,
}

/// What the discovery log is made of.
pub(super) struct Catalogue<'a> {
    pub(super) exported: &'a [Exported],
    pub(super) generation: u64,
    pub(super) limits: &'a Limits,
}

impl DiscoveryController {
    pub(super) fn new(cntlid: u16, host: String, kato_ms: u32, now: Time, generation: u64) -> Self {
        let kato_ms = if kato_ms == 0 { DEFAULT_KATO_MS } else { kato_ms };
        Self { cntlid, host, cc: Cc::new(), kato_ms, alive: now, aers: Vec::new(), events: 0, told: generation }
    }

    fn csts(&self) -> Csts {
        let done = self.cc.shn() != ShutdownNotification::NONE;
        let shst = if done { ShutdownStatus::COMPLETE } else { ShutdownStatus::NORMAL };
        Csts::new().with_rdy(self.cc.en()).with_shst(shst)
    }

    pub(super) fn property(&self, at: u32, wide: bool) -> Option<u64> {
        let cap = Cap::new().with_mqes(ENTRIES - 1).with_cqr(true).with_to(10).with_css(Cap::CSS_NVM);
        match (at, wide) {
            (offset::CAP, true) => Some(cap.into_bits()),
            (offset::VS, false) => Some(Vs::V1_4.into_bits().into()),
            (offset::CC, false) => Some(self.cc.into_bits().into()),
            (offset::CSTS, false) => Some(self.csts().into_bits().into()),
            _ => None,
        }
    }

    pub(super) fn set_cc(&mut self, cc: Cc) {
        if !cc.en() {
            self.aers.clear();
        }
        self.cc = cc;
    }

    /// An admin command.
    pub(super) fn execute(&mut self, entry: &SubmissionEntry, connection: &mut Connection, from: &Catalogue<'_>, now: Time) {
        self.alive = now;
        let cid = entry.cdw0.cid();
        if !self.cc.en() {
            return connection.respond_status(cid, Status::COMMAND_SEQUENCE.with_dnr());
        }
        let answer = match entry.admin_opcode() {
            AdminOpcode::IDENTIFY => self.identify(entry, from),
            AdminOpcode::GET_LOG_PAGE => self.log_page(entry, connection.local, from),
            AdminOpcode::KEEP_ALIVE => Ok(Answer::Result(0)),
            AdminOpcode::SET_FEATURES => self.set_features(entry),
            AdminOpcode::GET_FEATURES => self.get_features(entry),
            AdminOpcode::ASYNC_EVENT_REQUEST if self.aers.len() >= AERS => Err(Status::AER_LIMIT.with_dnr()),
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                self.aers.push(cid);
                return;
            }
            _ => Err(Status::INVALID_OPCODE.with_dnr()),
        };
        match answer {
            Ok(Answer::Result(result)) => connection.respond(cid, Status::SUCCESS, result),
            Ok(Answer::Data(bytes)) if entry.sgl().is_transport() && entry.sgl().length as usize >= bytes.len() => {
                connection.respond_data(cid, &bytes, 0);
            }
            Ok(Answer::Data(_)) => connection.respond_status(cid, Status::SGL_DATA_LENGTH_INVALID.with_dnr()),
            Err(status) => connection.respond_status(cid, status),
        }
    }

    fn identify(&self, entry: &SubmissionEntry, from: &Catalogue<'_>) -> Result<Answer, Status> {
        if IdentifyCdw10::from_bits(entry.cdw10).cns() != Cns::CONTROLLER {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let mut page = IdentifyController::new_zeroed();
        write_ascii(&mut page.sn, from.exported.first().map_or("DRAY", |exported| exported.config.serial.as_str()));
        write_ascii(&mut page.mn, "Dray discovery controller");
        write_ascii(&mut page.fr, env!("CARGO_PKG_VERSION"));
        (page.mdts, page.cntlid, page.ver, page.cntrltype) = (MDTS, self.cntlid, Vs::V1_4, ControllerType::DISCOVERY);
        page.oaes = dray_nvme::identify::Oaes::from_bits(DISCOVERY_CHANGE_NOTICE);
        page.lpa = dray_nvme::identify::Lpa::new().with_extended(true);
        (page.aerl, page.kas, page.maxcmd, page.sgls) = ((AERS - 1) as u8, 10, ENTRIES, SGLS_TCP);
        write_text(&mut page.subnqn, DISCOVERY_NQN);
        Ok(Answer::Data(page.as_bytes().to_vec()))
    }

    fn log_page(&mut self, entry: &SubmissionEntry, local: SocketAddr, from: &Catalogue<'_>) -> Result<Answer, Status> {
        let (cdw10, cdw11) = (GetLogCdw10::from_bits(entry.cdw10), GetLogCdw11::from_bits(entry.cdw11));
        let len = ((u64::from(cdw11.numdu()) << 16 | u64::from(cdw10.numdl())) + 1) * 4;
        if cdw10.lid() != DISCOVERY_LOG {
            return Err(Status::INVALID_LOG_PAGE.with_dnr());
        }
        if len > 4096 << MDTS || !entry.offset().is_multiple_of(4) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let log = self.log(local, from);
        let at = usize::try_from(entry.offset()).unwrap_or(usize::MAX);
        let rest = log.get(at..).ok_or(Status::INVALID_FIELD.with_dnr())?;
        let mut bytes = rest[..rest.len().min(len as usize)].to_vec();
        bytes.resize(len as usize, 0);
        if !cdw10.rae() {
            self.told = self.told.min(from.generation);
        }
        Ok(Answer::Data(bytes))
    }

    /// The whole log page, as this host may see it.
    fn log(&self, local: SocketAddr, from: &Catalogue<'_>) -> Vec<u8> {
        let mut header = DiscoveryLogHeader { genctr: from.generation, ..Default::default() };
        let mut entries = Vec::new();
        let own = (DISCOVERY_NQN, SubsystemType::CURRENT_DISCOVERY, ENTRIES);
        let visible = from.exported.iter().filter(|exported| exported.access(&self.host).is_some());
        let io = visible.map(|exported| (exported.config.nqn.as_str(), SubsystemType::NVM, from.limits.queue_entries));
        for (nqn, subtype, asqsz) in io.chain([own]) {
            let mut entry = DiscoveryEntry {
                trtype: TransportType::TCP,
                adrfam: if local.is_ipv6() { AddressFamily::IPV6 } else { AddressFamily::IPV4 },
                subtype,
                treq: 0b100,
                portid: 1,
                cntlid: CNTLID_DYNAMIC,
                asqsz,
                ..Default::default()
            };
            write_text(&mut entry.trsvcid, &local.port().to_string());
            write_text(&mut entry.traddr, &local.ip().to_string());
            write_text(&mut entry.subnqn, nqn);
            entries.extend_from_slice(entry.as_bytes());
            header.numrec += 1;
        }
        let mut log = header.as_bytes().to_vec();
        log.append(&mut entries);
        log
    }

    fn set_features(&mut self, entry: &SubmissionEntry) -> Result<Answer, Status> {
        match FeaturesCdw10::from_bits(entry.cdw10).fid() {
            FeatureId::KEEP_ALIVE => self.kato_ms = if entry.cdw11 == 0 { DEFAULT_KATO_MS } else { entry.cdw11 },
            FeatureId::ASYNC_EVENT_CONFIG => self.events = entry.cdw11,
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        }
        Ok(Answer::Result(0))
    }

    fn get_features(&self, entry: &SubmissionEntry) -> Result<Answer, Status> {
        match FeaturesCdw10::from_bits(entry.cdw10).fid() {
            FeatureId::KEEP_ALIVE => Ok(Answer::Result(self.kato_ms.into())),
            FeatureId::ASYNC_EVENT_CONFIG => Ok(Answer::Result(self.events.into())),
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        }
    }

    /// The event request to answer because the log page has changed: its CID and result.
    pub(super) fn event(&mut self, generation: u64) -> Option<(u16, u64)> {
        if self.told == generation || self.events & DISCOVERY_CHANGE_NOTICE == 0 || self.aers.is_empty() {
            return None;
        }
        self.told = generation;
        Some((self.aers.remove(0), DISCOVERY_CHANGE.into_bits().into()))
    }

    /// When the host must have shown life: its timeout, and the granularity of a second.
    pub(super) fn deadline(&self) -> Time {
        self.alive.after_ms(u64::from(self.kato_ms) + 1000)
    }
}

enum Answer {
    Result(u64),
    Data(Vec<u8>),
}
