//! What becomes of a host's command: checked against what fabrics allow and NVMe/TCP can carry, answered by the target itself,
//! or passed to the controller.

use super::association::{Env, Place};
use super::identify::{PAGE, ana_log};
use dray_nvme::command::{
    AbortCdw10, AdminOpcode, CopyCdw12, DsmCdw10, FeaturesCdw10, Fuse, GetLogCdw10, GetLogCdw11, NvmOpcode, Psdt, SubmissionEntry,
};
use dray_nvme::feature::{FeatureId, NumberOfQueues};
use dray_nvme::log::LogId;
use dray_nvme::status::Status;
use dray_nvme::tcp::discovery::ANA_LSP_RGO;
use dray_nvme::tcp::fabrics::{DataDirection, direction};

/// What becomes of a command of the host.
pub(super) enum Plan {
    /// The target answers by itself.
    Answer(Status, u64),
    /// With data, of which the host gets as much as it asked for.
    Data(Vec<u8>),
    /// The controller gets this entry with so many bytes of data.
    Pass(SubmissionEntry, u32),
}

fn refuse(status: Status) -> Plan {
    Plan::Answer(status.with_dnr(), 0)
}

impl Place {
    #[inline]
    pub(super) fn plan(&mut self, qid: u16, entry: &SubmissionEntry, in_capsule: u32, env: &mut Env<'_>) -> Plan {
        let Some(front) = &self.front else { return refuse(Status::INTERNAL_ERROR) };
        let sgl = entry.sgl();
        if self.stopping {
            // The controller would never take it.
            return refuse(Status::COMMAND_SEQUENCE);
        }
        if entry.cdw0.psdt() != Psdt::SGL_MPTR_BUFFER || entry.cdw0.fuse() != Fuse::NORMAL {
            return refuse(Status::INVALID_FIELD);
        }
        let towards = direction(entry);
        let len = match towards {
            DataDirection::None => 0,
            DataDirection::Both => return refuse(Status::INVALID_OPCODE),
            DataDirection::ToController if sgl.is_in_capsule() => {
                if sgl.address.saturating_add(sgl.length.into()) > in_capsule.into() || sgl.address != 0 {
                    return refuse(Status::SGL_OFFSET_INVALID);
                }
                if sgl.length != in_capsule {
                    return refuse(Status::SGL_DATA_LENGTH_INVALID);
                }
                sgl.length
            }
            _ if !sgl.is_transport() => return refuse(Status::SGL_TYPE_INVALID),
            _ if in_capsule > 0 => return refuse(Status::SGL_TYPE_INVALID),
            _ => sgl.length,
        };
        if !front.could_hold(len) || !len.is_multiple_of(4) {
            return refuse(Status::INVALID_FIELD);
        }
        if qid == 0 { self.plan_admin(entry, len, env) } else { self.plan_io(entry, len, env) }
    }

    #[inline]
    fn plan_io(&self, entry: &SubmissionEntry, len: u32, env: &Env<'_>) -> Plan {
        if let Some(status) = env.exported.refusal(entry.nsid) {
            return Plan::Answer(status, 0);
        }
        // Hosts send room for the most ranges; the controller checks for those that there are.
        let needed = match entry.nvm_opcode() {
            NvmOpcode::DATASET_MANAGEMENT => 16 * (u32::from(DsmCdw10::from_bits(entry.cdw10).nr()) + 1),
            NvmOpcode::COPY => 32 * (u32::from(CopyCdw12::from_bits(entry.cdw12).nr()) + 1),
            _ => len,
        };
        if needed > len { refuse(Status::SGL_DATA_LENGTH_INVALID) } else { Plan::Pass(*entry, len) }
    }

    fn plan_admin(&mut self, entry: &SubmissionEntry, len: u32, env: &mut Env<'_>) -> Plan {
        if self.timed {
            self.alive = env.now;
        }
        let Some(front) = &self.front else { return refuse(Status::INTERNAL_ERROR) };
        if !front.cc().en() || !front.csts().rdy() || self.resetting {
            return refuse(Status::COMMAND_SEQUENCE);
        }
        let mut entry = *entry;
        let fid = FeaturesCdw10::from_bits(entry.cdw10).fid();
        match entry.admin_opcode() {
            AdminOpcode::KEEP_ALIVE => return Plan::Answer(Status::SUCCESS, 0),
            AdminOpcode::SET_FEATURES if fid == FeatureId::KEEP_ALIVE => {
                self.kato_ms = entry.cdw11;
                return Plan::Answer(Status::SUCCESS, 0);
            }
            AdminOpcode::GET_FEATURES if fid == FeatureId::KEEP_ALIVE => {
                return Plan::Answer(Status::SUCCESS, self.kato_ms.into());
            }
            AdminOpcode::SET_FEATURES if fid == FeatureId::NUMBER_OF_QUEUES => {
                let asked = NumberOfQueues::from_bits(entry.cdw11);
                let most = env.limits.io_queues - 1;
                let cut = |queues: u16| if queues == u16::MAX { queues } else { queues.min(most) };
                entry.cdw11 = asked.with_nsq(cut(asked.nsq())).with_ncq(cut(asked.ncq())).into_bits();
            }
            AdminOpcode::SET_FEATURES if fid == FeatureId::ASYNC_EVENT_CONFIG => self.events = entry.cdw11,
            AdminOpcode::GET_LOG_PAGE => return self.plan_log(entry, len, env),
            AdminOpcode::ABORT => {
                let abort = AbortCdw10::from_bits(entry.cdw10);
                let Some(index) = front.find(abort.sqid(), abort.cid()) else { return Plan::Answer(Status::SUCCESS, 1) };
                entry.cdw10 = abort.with_cid(index).into_bits();
            }
            AdminOpcode::IDENTIFY if len < PAGE as u32 => return refuse(Status::SGL_DATA_LENGTH_INVALID),
            AdminOpcode::IDENTIFY => return Plan::Pass(entry, PAGE as u32),
            AdminOpcode::SET_FEATURES | AdminOpcode::GET_FEATURES => return Plan::Pass(entry, len.min(PAGE as u32)),
            AdminOpcode::ASYNC_EVENT_REQUEST => {}
            // Queue creation, doorbell buffers and what takes addresses do not exist over fabrics.
            _ => return refuse(Status::INVALID_OPCODE),
        }
        Plan::Pass(entry, 0)
    }

    fn plan_log(&mut self, entry: SubmissionEntry, len: u32, env: &Env<'_>) -> Plan {
        let (cdw10, cdw11) = (GetLogCdw10::from_bits(entry.cdw10), GetLogCdw11::from_bits(entry.cdw11));
        let needed = ((u64::from(cdw11.numdu()) << 16 | u64::from(cdw10.numdl())) + 1) * 4;
        let Some(needed) = u32::try_from(needed).ok().filter(|&needed| needed <= len) else {
            return refuse(Status::SGL_DATA_LENGTH_INVALID);
        };
        let groups = &env.exported.config.ana_groups;
        if cdw10.lid() != LogId::ANA || groups.is_empty() {
            return Plan::Pass(entry, needed);
        }
        let log = ana_log(groups, env.exported.ana_changes, cdw10.lsp() & ANA_LSP_RGO != 0);
        let rest = usize::try_from(entry.offset()).ok().filter(|at| at.is_multiple_of(4)).and_then(|at| log.get(at..));
        let Some(rest) = rest.filter(|_| needed as usize <= 32 * PAGE) else { return refuse(Status::INVALID_FIELD) };
        let mut bytes = rest[..rest.len().min(needed as usize)].to_vec();
        bytes.resize(needed as usize, 0);
        Plan::Data(bytes)
    }
}

/// Cuts a range list to the ranges that there are.
pub(super) fn fit_ranges(entry: &mut SubmissionEntry, len: &mut u32, qid: u16) {
    let needed = match entry.nvm_opcode() {
        NvmOpcode::DATASET_MANAGEMENT if qid != 0 => 16 * (u32::from(DsmCdw10::from_bits(entry.cdw10).nr()) + 1),
        NvmOpcode::COPY if qid != 0 => 32 * (u32::from(CopyCdw12::from_bits(entry.cdw12).nr()) + 1),
        _ => return,
    };
    *len = needed.min(*len);
}
