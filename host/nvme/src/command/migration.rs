//! Controller Data Queue, Track Send/Receive and Migration Send/Receive (Base 2.3 §5.2.4, §5.2.28, §5.2.27,
//! §5.2.17, §5.2.16), and Set/Get Features of a controller data queue (§5.2.26.1.23): dwords and builders. All go to
//! the admin queue of the migration management controller.

use super::{AdminOpcode, FeatureSelect, SubmissionEntry, dwords, numd};
use crate::{cdq::QueueType, feature::FeatureId};
use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_value! {
    /// SEL of Controller Data Queue (Base 2.3 §5.2.4).
    CdqSelect(u8) mask 0xFF {
        0 CREATE "create",
        1 DELETE "delete",
    }
}

/// CDW10 of Controller Data Queue (Base 2.3 §5.2.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CdqCdw10 {
    /// SEL, Select.
    #[bits(8)]
    pub sel: CdqSelect,
    __: u8,
    /// MOS, Management Operation Specific; on create its low byte is the [`QueueType`].
    pub mos: u16,
}

impl CdqCdw10 {
    /// QT, Queue Type (MOS 7:0), of a create.
    pub const fn queue_type(self) -> QueueType {
        QueueType(self.mos() as u8)
    }
}

/// CDW11 of Controller Data Queue, create (Base 2.3 §5.2.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CdqCreateCdw11 {
    /// PC, Physically Contiguous: PRP1 is the queue's base, else it points to a PRP list.
    pub pc: bool,
    #[bits(15)]
    __: u16,
    /// CQS, Create Queue Specific; of a UDMQ the CNTLID of the migratable controller to watch.
    pub cqs: u16,
}

/// CDW11 of Controller Data Queue, delete (Base 2.3 §5.2.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CdqDeleteCdw11 {
    /// CDQID, Controller Data Queue Identifier.
    pub cdqid: u16,
    __: u16,
}

/// DW0 of a create's completion (Base 2.3 §5.2.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CdqCreateDw0 {
    /// CDQID of the new queue; 0 is valid.
    pub cdqid: u16,
    __: u16,
}

/// CDW11 of Set Features 21h, CDW11 and DW0 of Get Features 21h (Base 2.3 §5.2.26.1.23).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CdqFeatureCdw11 {
    /// CDQID, Controller Data Queue Identifier.
    pub cdqid: u16,
    #[bits(15)]
    __: u16,
    /// ETPT, Enable Tail Pointer Trigger: one event is armed.
    pub etpt: bool,
}

open_value! {
    /// SEL of Track Send (Base 2.3 §5.2.28).
    TrackSendSelect(u8) mask 0xFF {
        0 LOG_USER_DATA_CHANGES "log user data changes",
        1 TRACK_MEMORY_CHANGES "track memory changes",
    }
}

/// CDW10 of Track Send (Base 2.3 §5.2.28).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TrackSendCdw10 {
    /// SEL, Select.
    #[bits(8)]
    pub sel: TrackSendSelect,
    __: u8,
    /// MOS, Management Operation Specific.
    pub mos: u16,
}

impl TrackSendCdw10 {
    /// LACT, Logging Action (MOS 3:0) of "log user data changes": 0 stop, 1 start, others reserved.
    pub const fn lact(self) -> u8 {
        (self.mos() & 0xF) as u8
    }

    /// TACT, Tracking Action (MOS 0) of "track memory changes": start or stop.
    pub const fn tact(self) -> bool {
        self.mos() & 1 != 0
    }
}

/// CDW11 of Track Send, log user data changes (Base 2.3 §5.2.28.1.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TrackSendLogCdw11 {
    /// CDQID of the UDMQ to log into.
    pub cdqid: u16,
    __: u16,
}

/// CDW11 of Track Send, track memory changes, and of Track Receive and Resume: a controller (Base 2.3 §5.2.28.1.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CntlidCdw11 {
    /// CNTLID of the migratable controller.
    pub cntlid: u16,
    __: u16,
}

open_value! {
    /// SEL of Track Receive (Base 2.3 §5.2.27).
    TrackReceiveSelect(u8) mask 0xFF {
        0 TRACKED_MEMORY_CHANGES "tracked memory changes",
    }
}

/// CDW10 of Track Receive (Base 2.3 §5.2.27).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TrackReceiveCdw10 {
    /// SEL, Select.
    #[bits(8)]
    pub sel: TrackReceiveSelect,
    __: u8,
    /// MOS, Management Operation Specific.
    pub mos: u16,
}

open_value! {
    /// SEL of Migration Send (Base 2.3 §5.2.17).
    MigrationSendSelect(u8) mask 0xFF {
        0 SUSPEND "Suspend",
        1 RESUME "Resume",
        2 SET_CONTROLLER_STATE "Set Controller State",
    }
}

/// CDW10 of Migration Send (Base 2.3 §5.2.17).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MigrationSendCdw10 {
    /// SEL, Select.
    #[bits(8)]
    pub sel: MigrationSendSelect,
    __: u8,
    /// MOS, Management Operation Specific.
    pub mos: u16,
}

open_value! {
    /// STYPE, Suspend Type (Base 2.3 §5.2.17.1.1).
    SuspendType(u8) mask 0xFF {
        0 NOTIFICATION "suspend notification",
        1 SUSPEND "suspend",
    }
}

/// CDW11 of Suspend (Base 2.3 §5.2.17.1.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SuspendCdw11 {
    /// CNTLID of the migratable controller.
    pub cntlid: u16,
    /// STYPE, Suspend Type.
    #[bits(8)]
    pub stype: SuspendType,
    #[bits(7)]
    __: u8,
    /// DUDMQ, Delete User Data Migration Queue.
    pub dudmq: bool,
}

open_value! {
    /// SEQIND, Sequence Indicator of Set Controller State (Base 2.3 §5.2.17.1.3).
    SequenceIndicator(u8) mask 0x3 {
        0b00 MIDDLE "middle",
        0b01 FIRST "first",
        0b10 LAST "last",
        0b11 ONLY "only one",
    }
}

/// CDW10 of Set Controller State (Base 2.3 §5.2.17.1.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetControllerStateCdw10 {
    /// SEL, Select.
    #[bits(8)]
    pub sel: MigrationSendSelect,
    __: u8,
    /// SEQIND, Sequence Indicator.
    #[bits(2)]
    pub seqind: SequenceIndicator,
    #[bits(14)]
    __: u16,
}

/// CDW11 of Set Controller State (Base 2.3 §5.2.17.1.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetControllerStateCdw11 {
    /// CNTLID of the migratable controller.
    pub cntlid: u16,
    /// CSVI, Controller State Version Index, 1-based; 0 for none.
    pub csvi: u8,
    /// CSUUIDI, Controller State UUID Index, 1-based; 0 for none.
    pub csuuidi: u8,
}

open_value! {
    /// SEL of Migration Receive (Base 2.3 §5.2.16).
    MigrationReceiveSelect(u8) mask 0xFF {
        0 GET_CONTROLLER_STATE "Get Controller State",
    }
}

/// CDW10 of Get Controller State (Base 2.3 §5.2.16).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetControllerStateCdw10 {
    /// SEL, Select.
    #[bits(8)]
    pub sel: MigrationReceiveSelect,
    __: u8,
    /// CSVI, Controller State Version Index, 1-based; 0 for none.
    pub csvi: u8,
    __: u8,
}

/// CDW11 of Get Controller State (Base 2.3 §5.2.16).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetControllerStateCdw11 {
    /// CNTLID of the migratable controller.
    pub cntlid: u16,
    /// CSUUIDI, Controller State UUID Index, 1-based; 0 for none.
    pub csuuidi: u8,
    /// CSUIDXP, Controller State UUID Index Parameter; vendor specific.
    pub csuidxp: u8,
}

/// DW0 of Get Controller State's completion (Base 2.3 §5.2.16).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetControllerStateDw0 {
    /// CSUP, Controller Suspended: it was so during the whole command, hence the state is consistent.
    pub csup: bool,
    #[bits(31)]
    __: u32,
}

/// CDW14 of Migration Send and Migration Receive (Base 2.3 §5.2.17).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MigrationCdw14 {
    /// UIDX, UUID Index.
    #[bits(7)]
    pub uidx: u8,
    #[bits(25)]
    __: u32,
}

impl SubmissionEntry {
    /// Controller Data Queue (45h), create: a queue of `dwords` dwords (CDQSIZE, a plain count, a multiple of the
    /// entry size) at `prp1`; `pc` says that it is contiguous there, else `prp1` points to a PRP list. For a UDMQ,
    /// `cqs` is the CNTLID to watch. The memory must be zeroed before.
    pub fn create_cdq(kind: QueueType, cqs: u16, pc: bool, dwords: u32, prp1: u64) -> Self {
        Self {
            dptr: [prp1, 0],
            cdw10: CdqCdw10::new()
                .with_sel(CdqSelect::CREATE)
                .with_mos(kind.0 as u16)
                .into(),
            cdw11: CdqCreateCdw11::new().with_pc(pc).with_cqs(cqs).into(),
            cdw12: dwords,
            ..Self::admin(AdminOpcode::CONTROLLER_DATA_QUEUE)
        }
    }

    /// Controller Data Queue (45h), delete.
    pub fn delete_cdq(id: u16) -> Self {
        Self {
            cdw10: CdqCdw10::new().with_sel(CdqSelect::DELETE).into(),
            cdw11: CdqDeleteCdw11::new().with_cdqid(id).into(),
            ..Self::admin(AdminOpcode::CONTROLLER_DATA_QUEUE)
        }
    }

    /// Set Features 21h: gives back the slots before `head` (a slot index) and, with `trigger`, arms one tail
    /// pointer event at that slot.
    pub fn set_cdq_feature(id: u16, head: u32, trigger: Option<u32>) -> Self {
        let cdw11 = CdqFeatureCdw11::new()
            .with_cdqid(id)
            .with_etpt(trigger.is_some());
        Self {
            cdw12: head,
            cdw13: trigger.unwrap_or(0),
            ..Self::set_features(FeatureId::CONTROLLER_DATA_QUEUE, cdw11.into(), false)
        }
    }

    /// Get Features 21h: answers [`crate::feature::CdqFeatureData`]. Give it a zeroed page: devices differ in how
    /// many bytes they return.
    pub fn get_cdq_feature(id: u16) -> Self {
        let cdw11 = CdqFeatureCdw11::new().with_cdqid(id);
        Self::get_features(
            FeatureId::CONTROLLER_DATA_QUEUE,
            FeatureSelect::CURRENT,
            cdw11.into(),
        )
    }

    /// Track Send (3Dh), log user data changes: starts or stops logging into a UDMQ.
    pub fn track_send_log(start: bool, cdqid: u16) -> Self {
        let cdw10 = TrackSendCdw10::new()
            .with_sel(TrackSendSelect::LOG_USER_DATA_CHANGES)
            .with_mos(start as u16);
        Self {
            cdw10: cdw10.into(),
            cdw11: TrackSendLogCdw11::new().with_cdqid(cdqid).into(),
            ..Self::admin(AdminOpcode::TRACK_SEND)
        }
    }

    /// Track Send (3Dh), track memory changes: starts or stops tracking what a controller writes to host memory; the
    /// data of a start is a [`crate::track::TrackMemoryHeader`] and its descriptors.
    pub fn track_send_memory(start: bool, cntlid: u16) -> Self {
        let cdw10 = TrackSendCdw10::new()
            .with_sel(TrackSendSelect::TRACK_MEMORY_CHANGES)
            .with_mos(start as u16);
        Self {
            cdw10: cdw10.into(),
            cdw11: CntlidCdw11::new().with_cntlid(cntlid).into(),
            ..Self::admin(AdminOpcode::TRACK_SEND)
        }
    }

    /// Track Receive (3Eh) of `dwords` dwords (0's based on the wire; 0 is sent as 1): the memory that changed.
    pub fn track_receive(cntlid: u16, dwords: u32) -> Self {
        Self {
            cdw11: CntlidCdw11::new().with_cntlid(cntlid).into(),
            cdw12: numd(dwords),
            ..Self::admin(AdminOpcode::TRACK_RECEIVE)
        }
    }

    /// Migration Send (41h), Suspend. `notify_only` merely warns the controller; `delete_queue` deletes its UDMQ too.
    pub fn suspend(cntlid: u16, notify_only: bool, delete_queue: bool) -> Self {
        let stype = if notify_only {
            SuspendType::NOTIFICATION
        } else {
            SuspendType::SUSPEND
        };
        Self {
            cdw10: MigrationSendCdw10::new()
                .with_sel(MigrationSendSelect::SUSPEND)
                .into(),
            cdw11: SuspendCdw11::new()
                .with_cntlid(cntlid)
                .with_stype(stype)
                .with_dudmq(delete_queue)
                .into(),
            ..Self::admin(AdminOpcode::MIGRATION_SEND)
        }
    }

    /// Migration Send (41h), Resume.
    pub fn resume(cntlid: u16) -> Self {
        Self {
            cdw10: MigrationSendCdw10::new()
                .with_sel(MigrationSendSelect::RESUME)
                .into(),
            cdw11: CntlidCdw11::new().with_cntlid(cntlid).into(),
            ..Self::admin(AdminOpcode::MIGRATION_SEND)
        }
    }

    /// Migration Send (41h), Set Controller State: `dwords` dwords (NUMD, a plain count) at byte `offset` (dword
    /// aligned) of the state.
    pub fn set_controller_state(
        seqind: SequenceIndicator,
        csvi: u8,
        cntlid: u16,
        csuuidi: u8,
        offset: u64,
        dwords: u32,
    ) -> Self {
        let cdw10 =
            SetControllerStateCdw10::new().with_sel(MigrationSendSelect::SET_CONTROLLER_STATE);
        let (cdw12, cdw13) = self::dwords(offset);
        Self {
            cdw10: cdw10.with_seqind(seqind).into(),
            cdw11: SetControllerStateCdw11::new()
                .with_cntlid(cntlid)
                .with_csvi(csvi)
                .with_csuuidi(csuuidi)
                .into(),
            cdw12,
            cdw13,
            cdw15: dwords,
            ..Self::admin(AdminOpcode::MIGRATION_SEND)
        }
    }

    /// Migration Receive (42h), Get Controller State: `dwords` dwords (0's based on the wire; 0 is sent as 1) from
    /// byte `offset` (dword aligned) of the state.
    pub fn get_controller_state(
        csvi: u8,
        cntlid: u16,
        csuuidi: u8,
        offset: u64,
        dwords: u32,
    ) -> Self {
        let (cdw12, cdw13) = self::dwords(offset);
        Self {
            cdw10: GetControllerStateCdw10::new().with_csvi(csvi).into(),
            cdw11: GetControllerStateCdw11::new()
                .with_cntlid(cntlid)
                .with_csuuidi(csuuidi)
                .into(),
            cdw12,
            cdw13,
            cdw15: numd(dwords),
            ..Self::admin(AdminOpcode::MIGRATION_RECEIVE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opcode, CDW10, CDW11, CDW12, CDW13, CDW15 of an entry.
    fn words(sqe: SubmissionEntry) -> (u8, u32, u32, u32, u32, u32) {
        (
            sqe.cdw0.opcode(),
            sqe.cdw10,
            sqe.cdw11,
            sqe.cdw12,
            sqe.cdw13,
            sqe.cdw15,
        )
    }

    /// CNTLID 5, CDQID 7, a queue of 128 entries.
    #[test]
    fn reference_encodings() {
        use SubmissionEntry as S;
        assert_eq!(
            words(S::create_cdq(QueueType::UDMQ, 5, true, 1024, 0x1000)),
            (0x45, 0, 0x0005_0001, 0x400, 0, 0)
        );
        assert_eq!(words(S::delete_cdq(7)), (0x45, 1, 7, 0, 0, 0));
        assert_eq!(
            words(S::track_send_log(true, 7)),
            (0x3D, 0x0001_0000, 7, 0, 0, 0)
        );
        assert_eq!(words(S::track_send_log(false, 7)), (0x3D, 0, 7, 0, 0, 0));
        assert_eq!(
            words(S::track_send_memory(true, 5)),
            (0x3D, 0x0001_0001, 5, 0, 0, 0)
        );
        assert_eq!(words(S::track_send_memory(false, 5)), (0x3D, 1, 5, 0, 0, 0));
        assert_eq!(
            words(S::set_cdq_feature(7, 3, Some(4))),
            (0x09, 0x21, 0x8000_0007, 3, 4, 0)
        );
        assert_eq!(
            words(S::set_cdq_feature(7, 3, None)),
            (0x09, 0x21, 7, 3, 0, 0)
        );
        assert_eq!(words(S::get_cdq_feature(7)), (0x0A, 0x21, 7, 0, 0, 0));
        assert_eq!(
            words(S::suspend(5, false, true)),
            (0x41, 0, 0x8001_0005, 0, 0, 0)
        );
        assert_eq!(words(S::suspend(5, true, false)), (0x41, 0, 5, 0, 0, 0));
        assert_eq!(words(S::resume(5)), (0x41, 1, 5, 0, 0, 0));
        let set = S::set_controller_state(SequenceIndicator::ONLY, 1, 5, 0, 0, 14 + 12 * 3);
        assert_eq!(words(set), (0x41, 0x0003_0002, 0x0001_0005, 0, 0, 50));
        assert_eq!(
            words(S::get_controller_state(1, 5, 0, 0, 1024)),
            (0x42, 0x0001_0000, 5, 0, 0, 0x3FF)
        );
        assert_eq!(words(S::track_receive(5, 1024)), (0x3E, 0, 5, 0x3FF, 0, 0));
    }
}
