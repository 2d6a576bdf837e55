//! Admin commands other than the migration ones (Base 2.3 §5): dwords and builders.

use super::{AdminOpcode, SubmissionEntry, dwords, numd};
use crate::{
    feature::FeatureId,
    identify::{Cns, CommandSetId},
    log::LogId,
};
use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// CDW10 of Identify (Base 2.3 §5.2.13).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IdentifyCdw10 {
    /// CNS, Controller or Namespace Structure.
    #[bits(8)]
    pub cns: Cns,
    __: u8,
    /// CNTID, Controller Identifier, for the CNS values that use it.
    pub cntid: u16,
}

/// CDW11 of Identify (Base 2.3 §5.2.13).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IdentifyCdw11 {
    /// CNSSID, CNS specific identifier.
    pub cnssid: u16,
    __: u8,
    /// CSI, Command Set Identifier.
    #[bits(8)]
    pub csi: CommandSetId,
}

/// CDW10 of Create I/O Completion Queue (Base 2.3 §5.3.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CreateIoCqCdw10 {
    /// QID, Queue Identifier, from 1.
    pub qid: u16,
    /// QSIZE in entries, 0's based.
    pub qsize: u16,
}

/// CDW11 of Create I/O Completion Queue (Base 2.3 §5.3.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CreateIoCqCdw11 {
    /// PC, Physically Contiguous: PRP1 is the queue's base.
    pub pc: bool,
    /// IEN, Interrupts Enabled.
    pub ien: bool,
    #[bits(14)]
    __: u16,
    /// IV, Interrupt Vector.
    pub iv: u16,
}

/// CDW10 of Create I/O Submission Queue (Base 2.3 §5.3.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CreateIoSqCdw10 {
    /// QID, Queue Identifier, from 1.
    pub qid: u16,
    /// QSIZE in entries, 0's based.
    pub qsize: u16,
}

/// CDW11 of Create I/O Submission Queue (Base 2.3 §5.3.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CreateIoSqCdw11 {
    /// PC, Physically Contiguous: PRP1 is the queue's base.
    pub pc: bool,
    /// QPRIO, Queue Priority, for weighted round robin.
    #[bits(2)]
    pub qprio: u8,
    #[bits(13)]
    __: u16,
    /// CQID, the completion queue to post to.
    pub cqid: u16,
}

/// CDW12 of Create I/O Submission Queue (Base 2.3 §5.3.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CreateIoSqCdw12 {
    /// NVMSETID, NVM Set Identifier; 0 for none.
    pub nvmsetid: u16,
    __: u16,
}

/// CDW10 of Delete I/O Submission Queue and Delete I/O Completion Queue (Base 2.3 §5.3.3, §5.3.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DeleteIoQueueCdw10 {
    /// QID of the queue to delete.
    pub qid: u16,
    __: u16,
}

/// CDW10 of Get Log Page (Base 2.3 §5.2.12).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetLogCdw10 {
    /// LID, Log Page Identifier.
    #[bits(8)]
    pub lid: LogId,
    /// LSP, Log Specific Parameter.
    #[bits(7)]
    pub lsp: u8,
    /// RAE, Retain Asynchronous Event: reading does not clear the event.
    pub rae: bool,
    /// NUMDL, low half of the number of dwords, 0's based.
    pub numdl: u16,
}

/// CDW11 of Get Log Page (Base 2.3 §5.2.12).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetLogCdw11 {
    /// NUMDU, high half of the number of dwords.
    pub numdu: u16,
    /// LSI, Log Specific Identifier.
    pub lsi: u16,
}

open_value! {
    /// SEL of Get Features (Base 2.3 §5.2.11).
    FeatureSelect(u8) mask 0x7 {
        0 CURRENT "current",
        1 DEFAULT "default",
        2 SAVED "saved",
        3 CAPABILITIES "supported capabilities",
    }
}

/// CDW10 of Set Features and Get Features (Base 2.3 §5.2.26, §5.2.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FeaturesCdw10 {
    /// FID, Feature Identifier.
    #[bits(8)]
    pub fid: FeatureId,
    /// SEL, Select; Get Features only.
    #[bits(3)]
    pub sel: FeatureSelect,
    #[bits(20)]
    __: u32,
    /// SV, Save; Set Features only.
    pub sv: bool,
}

/// CDW10 of Abort (Base 2.3 §5.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AbortCdw10 {
    /// SQID of the command to abort.
    pub sqid: u16,
    /// CID of the command to abort.
    pub cid: u16,
}

/// DW0 of Abort's completion (Base 2.3 §5.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AbortDw0 {
    /// The command was **not** aborted.
    pub not_aborted: bool,
    #[bits(31)]
    __: u32,
}

/// CDW10 of Format NVM (Base 2.3 §5.2.10).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FormatCdw10 {
    /// LBAFL, bits 3:0 of the LBA format index.
    #[bits(4)]
    pub lbafl: u8,
    /// MSET, metadata at the end of the data.
    pub mset: bool,
    /// PI, protection information type.
    #[bits(3)]
    pub pi: u8,
    /// PIL, protection information location.
    pub pil: bool,
    /// SES, Secure Erase Settings: 0 none, 1 user data, 2 cryptographic.
    #[bits(3)]
    pub ses: u8,
    /// LBAFU, bits 5:4 of the LBA format index.
    #[bits(2)]
    pub lbafu: u8,
    #[bits(18)]
    __: u32,
}

open_value! {
    /// SEL of Namespace Management (Base 2.3 §5.2.21).
    NamespaceManagementSelect(u8) mask 0xF {
        0 CREATE "create",
        1 DELETE "delete",
    }
}

/// CDW10 of Namespace Management (Base 2.3 §5.2.21).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NamespaceManagementCdw10 {
    /// SEL, Select.
    #[bits(4)]
    pub sel: NamespaceManagementSelect,
    #[bits(28)]
    __: u32,
}

open_value! {
    /// SEL of Namespace Attachment (Base 2.3 §5.2.20).
    NamespaceAttachmentSelect(u8) mask 0xF {
        0 ATTACH "attach",
        1 DETACH "detach",
    }
}

/// CDW10 of Namespace Attachment (Base 2.3 §5.2.20).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NamespaceAttachmentCdw10 {
    /// SEL, Select.
    #[bits(4)]
    pub sel: NamespaceAttachmentSelect,
    #[bits(28)]
    __: u32,
}

/// CDW13 of Get LBA Status (NVMCS §4, Get LBA Status).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetLbaStatusCdw13 {
    /// RL, Range Length in logical blocks; 0 means to the end of the namespace.
    pub rl: u16,
    __: u8,
    /// ATYPE, Action Type.
    pub atype: u8,
}

impl SubmissionEntry {
    /// Identify (06h): 4096 bytes of the structure that `cns` names.
    pub fn identify(cns: Cns, nsid: u32, cntid: u16, csi: CommandSetId) -> Self {
        Self {
            nsid,
            cdw10: IdentifyCdw10::new().with_cns(cns).with_cntid(cntid).into(),
            cdw11: IdentifyCdw11::new().with_csi(csi).into(),
            ..Self::admin(AdminOpcode::IDENTIFY)
        }
    }

    /// Create I/O Completion Queue (05h), physically contiguous at `prp1`; interrupts are enabled when a vector is
    /// given.
    pub fn create_io_cq(qid: u16, entries_minus_1: u16, iv: Option<u16>, prp1: u64) -> Self {
        let cdw11 = CreateIoCqCdw11::new()
            .with_pc(true)
            .with_ien(iv.is_some())
            .with_iv(iv.unwrap_or(0));
        Self {
            dptr: [prp1, 0],
            cdw10: CreateIoCqCdw10::new()
                .with_qid(qid)
                .with_qsize(entries_minus_1)
                .into(),
            cdw11: cdw11.into(),
            ..Self::admin(AdminOpcode::CREATE_IO_CQ)
        }
    }

    /// Create I/O Submission Queue (01h), physically contiguous at `prp1`, posting to `cqid`.
    pub fn create_io_sq(qid: u16, entries_minus_1: u16, cqid: u16, prp1: u64) -> Self {
        Self {
            dptr: [prp1, 0],
            cdw10: CreateIoSqCdw10::new()
                .with_qid(qid)
                .with_qsize(entries_minus_1)
                .into(),
            cdw11: CreateIoSqCdw11::new().with_pc(true).with_cqid(cqid).into(),
            ..Self::admin(AdminOpcode::CREATE_IO_SQ)
        }
    }

    /// Delete I/O Submission Queue (00h).
    pub fn delete_io_sq(qid: u16) -> Self {
        Self {
            cdw10: DeleteIoQueueCdw10::new().with_qid(qid).into(),
            ..Self::admin(AdminOpcode::DELETE_IO_SQ)
        }
    }

    /// Delete I/O Completion Queue (04h).
    pub fn delete_io_cq(qid: u16) -> Self {
        Self {
            cdw10: DeleteIoQueueCdw10::new().with_qid(qid).into(),
            ..Self::admin(AdminOpcode::DELETE_IO_CQ)
        }
    }

    /// Get Log Page (02h): `dwords` dwords from byte `offset` (dword aligned) of a log page. The field is 0's based,
    /// so 0 dwords is sent as 1. `rae` keeps the event that the page belongs to.
    pub fn get_log_page(lid: LogId, nsid: u32, offset: u64, dwords: u32, rae: bool) -> Self {
        let (numdl, numdu) = (numd(dwords) as u16, (numd(dwords) >> 16) as u16);
        let (cdw12, cdw13) = self::dwords(offset);
        Self {
            nsid,
            cdw10: GetLogCdw10::new()
                .with_lid(lid)
                .with_rae(rae)
                .with_numdl(numdl)
                .into(),
            cdw11: GetLogCdw11::new().with_numdu(numdu).into(),
            cdw12,
            cdw13,
            ..Self::admin(AdminOpcode::GET_LOG_PAGE)
        }
    }

    /// Set Features (09h) of a feature whose value is CDW11; `save` keeps it over power cycles.
    pub fn set_features(fid: FeatureId, cdw11: u32, save: bool) -> Self {
        Self {
            cdw10: FeaturesCdw10::new().with_fid(fid).with_sv(save).into(),
            cdw11,
            ..Self::admin(AdminOpcode::SET_FEATURES)
        }
    }

    /// Get Features (0Ah); `cdw11` is what some features take to say which of their values is meant.
    pub fn get_features(fid: FeatureId, sel: FeatureSelect, cdw11: u32) -> Self {
        Self {
            cdw10: FeaturesCdw10::new().with_fid(fid).with_sel(sel).into(),
            cdw11,
            ..Self::admin(AdminOpcode::GET_FEATURES)
        }
    }

    /// Abort (08h) of a command on submission queue `sqid`; see [`AbortDw0`].
    pub fn abort(sqid: u16, cid: u16) -> Self {
        Self {
            cdw10: AbortCdw10::new().with_sqid(sqid).with_cid(cid).into(),
            ..Self::admin(AdminOpcode::ABORT)
        }
    }

    /// Asynchronous Event Request (0Ch): completes when there is an event ([`crate::event::AsyncEvent`]).
    pub fn async_event_request() -> Self {
        Self::admin(AdminOpcode::ASYNC_EVENT_REQUEST)
    }

    /// Keep Alive (18h).
    pub fn keep_alive() -> Self {
        Self::admin(AdminOpcode::KEEP_ALIVE)
    }

    /// Doorbell Buffer Config (7Ch, Base 2.3 §5.3.5): two distinct page-aligned pages; see
    /// [`crate::doorbell_buffer`].
    pub fn doorbell_buffer_config(shadow: u64, event_index: u64) -> Self {
        Self {
            dptr: [shadow, event_index],
            ..Self::admin(AdminOpcode::DOORBELL_BUFFER_CONFIG)
        }
    }

    /// Format NVM (80h).
    pub fn format_nvm(nsid: u32, cdw10: FormatCdw10) -> Self {
        Self {
            nsid,
            cdw10: cdw10.into(),
            ..Self::admin(AdminOpcode::FORMAT_NVM)
        }
    }

    /// Namespace Management (0Dh), create: the data is an Identify Namespace structure with the wanted sizes.
    pub fn create_namespace(csi: CommandSetId) -> Self {
        Self {
            cdw10: NamespaceManagementCdw10::new()
                .with_sel(NamespaceManagementSelect::CREATE)
                .into(),
            cdw11: IdentifyCdw11::new().with_csi(csi).into(),
            ..Self::admin(AdminOpcode::NAMESPACE_MANAGEMENT)
        }
    }

    /// Namespace Management (0Dh), delete; [`super::NSID_ALL`] deletes all.
    pub fn delete_namespace(nsid: u32) -> Self {
        Self {
            nsid,
            cdw10: NamespaceManagementCdw10::new()
                .with_sel(NamespaceManagementSelect::DELETE)
                .into(),
            ..Self::admin(AdminOpcode::NAMESPACE_MANAGEMENT)
        }
    }

    /// Namespace Attachment (15h): the data is a controller list ([`crate::identify::write_controller_list`]).
    pub fn namespace_attachment(nsid: u32, sel: NamespaceAttachmentSelect) -> Self {
        Self {
            nsid,
            cdw10: NamespaceAttachmentCdw10::new().with_sel(sel).into(),
            ..Self::admin(AdminOpcode::NAMESPACE_ATTACHMENT)
        }
    }

    /// Get LBA Status (86h): up to `dwords` dwords (0 is sent as 1) about `rl` blocks from `slba`.
    pub fn get_lba_status(nsid: u32, slba: u64, rl: u16, dwords: u32, atype: u8) -> Self {
        let (cdw10, cdw11) = self::dwords(slba);
        Self {
            nsid,
            cdw10,
            cdw11,
            cdw12: numd(dwords),
            cdw13: GetLbaStatusCdw13::new()
                .with_rl(rl)
                .with_atype(atype)
                .into(),
            ..Self::admin(AdminOpcode::GET_LBA_STATUS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_commands() {
        let cq = SubmissionEntry::create_io_cq(3, 255, Some(2), 0x1000);
        assert_eq!(
            (cq.cdw10, cq.cdw11, cq.prp1()),
            (0x00FF_0003, 0x0002_0003, 0x1000)
        );
        assert_eq!(SubmissionEntry::create_io_cq(3, 255, None, 0x1000).cdw11, 1);
        let sq = SubmissionEntry::create_io_sq(3, 255, 4, 0x2000);
        assert_eq!(
            (sq.cdw0.opcode(), sq.cdw10, sq.cdw11),
            (1, 0x00FF_0003, 0x0004_0001)
        );
        assert_eq!(SubmissionEntry::delete_io_sq(9).cdw10, 9);
        assert_eq!(SubmissionEntry::delete_io_cq(9).cdw0.opcode(), 4);
        assert_eq!(SubmissionEntry::abort(1, 0x22).cdw10, 0x0022_0001);
    }

    #[test]
    fn log_and_identify() {
        let log = SubmissionEntry::get_log_page(LogId::EFFECTS, 0, 0x1_0000_0004, 0x2_0001, true);
        assert_eq!(
            (log.cdw10, log.cdw11, log.cdw12, log.cdw13),
            (0x0000_8005, 2, 4, 1)
        );
        assert_eq!(log.offset(), 0x1_0000_0004);
        assert_eq!(
            SubmissionEntry::get_log_page(LogId::EFFECTS, 0, 0, 0, false).cdw10,
            5
        );
        let identify = SubmissionEntry::identify(Cns::CONTROLLER_NVM, 0, 7, CommandSetId(1));
        assert_eq!((identify.cdw10, identify.cdw11), (0x0007_0006, 0x0100_0000));
    }
}
