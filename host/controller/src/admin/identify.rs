//! Identify (Base 2.3 §5.2.13; NVMCS §4.1.5).

use super::{AERL, AdminResult, ERROR_ENTRIES};
use crate::controller::{Controller, VERSION};
use crate::deviations::Deviation;
use crate::engine::NO_NAMESPACE;
use crate::io::{COPY_BLOCKS, COPY_RANGE_BLOCKS, COPY_RANGES};
use crate::namespace::Namespace;
use crate::state::VENDOR_UUID;
use crate::manage::{MAX_CDQ_RANGES, max_cdq_ranges};
use crate::subsystem::{MAX_TRACKED_IN_ALL, MAX_TRACKED_RANGES, Shared, TRACK_GRANULARITY, is_attached};
use dray_nvme::cdq::LBAMQF_TYPE_0;
use dray_nvme::command::{IdentifyCdw10, IdentifyCdw11, NSID_ALL, SubmissionEntry};
use dray_nvme::identify::{
    Cmic, Cns, CommandSetId, ControllerStateFormats, ControllerType, Ctratt, Dlfeat, Flbas, IDENTIFY_BYTES,
    IdentifyController, IdentifyControllerNvm, IdentifyNamespace, IdentifyNamespaceIndependent, LbaFormat, Lpa,
    NamespaceDescriptorWriter, Nmic, Nsattr, Nsfeat, Nstat, Oacs, Oaes, Oncs, TrAttr, Vwc, write_ascii,
    write_controller_list, write_nsid_list,
};
use dray_nvme::status::Status;
use zerocopy::{FromZeros, IntoBytes};

impl Controller {
    pub(super) fn identify(&mut self, entry: &SubmissionEntry, shared: &Shared) -> AdminResult {
        let mut page = [0u8; IDENTIFY_BYTES];
        self.identify_page(entry, shared, &mut page)?;
        self.put_data(entry, &page)?;
        Ok(0)
    }

    fn identify_page(&self, entry: &SubmissionEntry, shared: &Shared, page: &mut [u8]) -> Result<(), Status> {
        let cdw10 = IdentifyCdw10::from_bits(entry.cdw10);
        let nvm = IdentifyCdw11::from_bits(entry.cdw11).csi() == CommandSetId::NVM;
        let nsid = entry.nsid;
        match cdw10.cns() {
            Cns::CONTROLLER => page.copy_from_slice(self.identify_controller(shared).as_bytes()),
            Cns::CONTROLLER_NVM if nvm => page.copy_from_slice(identify_nvm().as_bytes()),
            Cns::NAMESPACE => {
                if let Some(namespace) = self.visible(nsid, shared)? {
                    page.copy_from_slice(identify_namespace(namespace).as_bytes());
                }
            }
            Cns::NAMESPACE_INDEPENDENT => {
                if let Some(namespace) = self.visible(nsid, shared)? {
                    page.copy_from_slice(identify_independent(namespace).as_bytes());
                }
            }
            Cns::NAMESPACE_DESCRIPTORS => {
                let namespace = self.visible(nsid, shared)?.ok_or(Status::INVALID_NAMESPACE.with_dnr())?;
                describe(namespace, page)?;
            }
            Cns::ACTIVE_NAMESPACES | Cns::ACTIVE_NAMESPACES_COMMAND_SET if nvm => {
                if nsid >= NSID_ALL - 1 {
                    return Err(Status::INVALID_NAMESPACE.with_dnr());
                }
                let active = self.active_nsids().filter(|&active| active > nsid);
                write_nsid_list(active, page);
            }
            Cns::ALLOCATED_NAMESPACES if self.attaches => {
                let mut all: Vec<u32> = shared.namespaces.iter().map(|namespace| namespace.config.nsid).filter(|&it| it > nsid).collect();
                all.sort_unstable();
                write_nsid_list(all, page);
            }
            Cns::CONTROLLERS => list_controllers(shared.controllers.iter().copied(), cdw10.cntid(), page),
            Cns::NAMESPACE_CONTROLLERS => {
                if !shared.namespaces.iter().any(|namespace| namespace.config.nsid == nsid) {
                    return Err(Status::INVALID_NAMESPACE.with_dnr());
                }
                let config = &shared.config;
                let attached = (0..config.controllers.len()).filter(|&index| is_attached(config, index, nsid));
                list_controllers(attached.map(|index| config.controllers[index].cntlid), cdw10.cntid(), page);
            }
            Cns::CONTROLLER_STATE_FORMATS if self.is_manager() => {
                ControllerStateFormats::build(&[0], &[VENDOR_UUID], page).map_err(|_| Status::INTERNAL_ERROR)?;
            }
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        }
        Ok(())
    }

    /// NSIDs attached to this controller, ascending.
    pub(super) fn active_nsids(&self) -> impl Iterator<Item = u32> + '_ {
        self.engine.active.iter().zip(1u32..).filter(|&(&index, _)| index != NO_NAMESPACE).map(|(_, nsid)| nsid)
    }

    /// A namespace as Identify sees it: `None` for an NSID that is valid and not attached.
    fn visible<'s>(&self, nsid: u32, shared: &'s Shared) -> Result<Option<&'s Namespace>, Status> {
        match self.engine.namespace(nsid) {
            Ok(index) => Ok(shared.namespaces.get(usize::from(index))),
            Err(status) if status.is(Status::INVALID_FIELD) => Ok(None),
            Err(status) => Err(status),
        }
    }

    fn identify_controller(&self, shared: &Shared) -> IdentifyController {
        let mut page = IdentifyController::new_zeroed();
        let config = &shared.config;
        write_ascii(&mut page.sn, &config.serial);
        write_ascii(&mut page.mn, &config.model);
        write_ascii(&mut page.fr, &config.firmware);
        (page.rab, page.mdts, page.cntlid, page.ver) = (6, config.mdts, self.config.cntlid, VERSION);
        page.cmic = Cmic::new().with_multi_controller(shared.controllers.len() > 1);
        (page.rtd3r, page.rtd3e) = (1_000_000, 5_000_000);
        page.oaes = Oaes::new().with_namespace_attribute(true);
        page.ctratt = Ctratt::new().with_hids(true);
        page.cntrltype = ControllerType::IO;
        page.oacs = Oacs::new().with_hmlms(self.is_manager()).with_dbcs(self.offers_shadow()).with_namespace_management(self.attaches);
        (page.acl, page.aerl, page.frmw, page.elpe) = (3, AERL, 0x03, (ERROR_ENTRIES - 1) as u8);
        page.lpa = Lpa::new().with_effects(true).with_extended(true);
        (page.wctemp, page.cctemp) = (343, 373);
        (page.sqes, page.cqes) = (0x66, 0x44);
        page.nn = self.engine.active.len() as u32;
        page.mnan = shared.namespaces.len() as u32;
        page.oncs = Oncs::new()
            .with_compare(true)
            .with_write_uncorrectable(shared.can_write_uncorrectable())
            .with_dsm(true)
            .with_write_zeroes(true)
            .with_timestamp(true)
            .with_verify(true)
            .with_copy(true);
        // Flush of all namespaces (NSID FFFFFFFFh) is refused: 10b.
        page.vwc = Vwc::new().with_present(shared.has_cache()).with_flush_all(2);
        page.ocfs = 1;
        page.nwpc = 1;
        page.sgls = 1;
        let nqn = config.nqn.as_bytes();
        page.subnqn[..nqn.len()].copy_from_slice(nqn);
        page.psd[0].mp = 2500;
        if self.is_manager() {
            live_migration(&mut page, shared);
        }
        page
    }
}

/// Bytes 587:570 of a management controller (Base 2.3 §5.2.13.2.1).
fn live_migration(page: &mut IdentifyController, shared: &Shared) {
    let migratable = shared.controllers.len().saturating_sub(1) as u16;
    (page.cmmrtd, page.nmmrtd) = (MAX_TRACKED_RANGES as u16, MAX_TRACKED_IN_ALL as u16);
    (page.minmrtg, page.maxmrtg) = TRACK_GRANULARITY;
    page.trattr = TrAttr::new().with_thmcs(true).with_tudcs(true);
    (page.mcudmq, page.mnsudmq) = (migratable, migratable);
    let ranges = max_cdq_ranges(shared.config.max_cdq_bytes) as u16;
    (page.mcmr, page.nmcmr, page.mcdqpc) = (ranges, MAX_CDQ_RANGES as u16, ranges);
    if shared.deviating.does(Deviation::LimitsUntold) {
        (page.mcudmq, page.mnsudmq, page.nmcmr, page.mcdqpc, page.mcmr) = (0, 0, 0, 0, 1);
    }
}

fn identify_nvm() -> IdentifyControllerNvm {
    let mut page = IdentifyControllerNvm::new_zeroed();
    page.dmrl = 255;
    page.ver = dray_nvme::registers::Vs::from_bits(0x0001_0000);
    page.lbamqf = LBAMQF_TYPE_0;
    page
}

fn dlfeat(namespace: &Namespace) -> Dlfeat {
    let zero = namespace.info.deallocated_reads_zero;
    Dlfeat::new().with_read_value(u8::from(zero)).with_write_zeroes_deallocates(zero)
}

fn nmic(namespace: &Namespace) -> Nmic {
    Nmic::new().with_shared(namespace.config.shared)
}

fn nsattr(namespace: &Namespace) -> Nsattr {
    Nsattr::new().with_write_protected(namespace.write_protected)
}

fn identify_namespace(namespace: &Namespace) -> IdentifyNamespace {
    let mut page = IdentifyNamespace::new_zeroed();
    let blocks = namespace.info.blocks;
    (page.nsze, page.ncap, page.nuse) = (blocks, blocks, blocks);
    page.nsfeat = Nsfeat::new();
    page.flbas = Flbas::new();
    (page.nmic, page.dlfeat, page.nsattr) = (nmic(namespace), dlfeat(namespace), nsattr(namespace));
    page.nvmcap = (u128::from(blocks) << namespace.block_shift).into();
    (page.mssrl, page.mcl, page.msrc) = (COPY_RANGE_BLOCKS, COPY_BLOCKS, (COPY_RANGES - 1) as u8);
    (page.nguid, page.eui64) = (namespace.config.nguid, namespace.config.eui64);
    page.lbaf[0] = LbaFormat::new().with_lbads(namespace.block_shift as u8);
    page
}

fn identify_independent(namespace: &Namespace) -> IdentifyNamespaceIndependent {
    let mut page = IdentifyNamespaceIndependent::new_zeroed();
    (page.nmic, page.nsattr) = (nmic(namespace), nsattr(namespace));
    page.nstat = Nstat::new().with_nrdy(true);
    page
}

/// A controller list from `first` on, ascending.
fn list_controllers(ids: impl Iterator<Item = u16>, first: u16, page: &mut [u8]) {
    let mut ids: Vec<u16> = ids.filter(|&id| id >= first).collect();
    ids.sort_unstable();
    write_controller_list(ids, page);
}

fn describe(namespace: &Namespace, page: &mut [u8]) -> Result<(), Status> {
    let config = &namespace.config;
    let mut writer = NamespaceDescriptorWriter::new(page);
    let mut write = || {
        if config.eui64 != [0; 8] {
            writer.eui64(&config.eui64)?;
        }
        writer.nguid(&config.nguid)?;
        if config.uuid != [0; 16] {
            writer.uuid(&config.uuid)?;
        }
        writer.csi(CommandSetId::NVM)
    };
    write().map_err(|_| Status::INTERNAL_ERROR)
}
