//! Properties of every type: bits survive decoding and encoding, reserved ones and unknown codes included, and no
//! decoder panics on any input.

use dray_nvme::{
    cdq::*, command::*, event::*, feature::*, identify::*, log::*, registers::*, state::*,
    status::*, track::*,
};
use proptest::prelude::*;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Reads a `T` from `bytes`, prints it, writes it, and expects the same bytes.
fn survives<T: FromBytes + IntoBytes + Immutable + std::fmt::Debug>(
    bytes: &[u8],
) -> Result<(), TestCaseError> {
    let (value, _) =
        T::read_from_prefix(bytes).map_err(|_| TestCaseError::fail("too few bytes"))?;
    let _ = format!("{value:?}");
    prop_assert_eq!(value.as_bytes(), &bytes[..size_of::<T>()]);
    Ok(())
}

macro_rules! each_survives {
    ($bytes:expr, $($name:ty),* $(,)?) => { $(survives::<$name>($bytes)?;)* };
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn structures_keep_every_bit(bytes in prop::collection::vec(any::<u8>(), 512)) {
        each_survives!(
            &bytes, Cap, Vs, Cc, Csts, Aqa, Crto, Cdw0, SubmissionEntry, StatusPhase, CompletionEntry, SglDescriptor,
            IdentifyCdw10, IdentifyCdw11, CreateIoCqCdw10, CreateIoCqCdw11, CreateIoSqCdw10, CreateIoSqCdw11,
            CreateIoSqCdw12, DeleteIoQueueCdw10, GetLogCdw10, GetLogCdw11, FeaturesCdw10, AbortCdw10, AbortDw0,
            FormatCdw10, NamespaceManagementCdw10, NamespaceAttachmentCdw10, GetLbaStatusCdw13, RwCdw12, RwCdw13,
            DsmCdw10, DsmCdw11, DsmRange, CopyCdw12, CopyRange0, CdqCdw10, CdqCreateCdw11, CdqDeleteCdw11,
            CdqCreateDw0, CdqFeatureCdw11, TrackSendCdw10, TrackSendLogCdw11, CntlidCdw11, TrackReceiveCdw10,
            MigrationSendCdw10, SuspendCdw11, SetControllerStateCdw10, SetControllerStateCdw11,
            GetControllerStateCdw10, GetControllerStateCdw11, GetControllerStateDw0, MigrationCdw14, AsyncEvent,
            LbaMqa, UdmqEntry, TrackMemoryHeader, TrackMemoryDescriptor, TrackReceiveHeader, TrackReceiveDescriptor,
            ControllerStateHeader, NvmeStateHeader, IoSqState, IoCqState, ErrorLogEntry, SmartLog, FirmwareSlotLog,
            CommandEffects, FeatureEffects, FeatureCapabilities, Arbitration, PowerManagement, TemperatureThreshold,
            ErrorRecovery, VolatileWriteCache, NumberOfQueues, InterruptCoalescing, InterruptVectorConfig,
            WriteAtomicity, AsyncEventConfig, HostIdentifierCdw11, CommandSetProfile, NamespaceWriteProtect,
            CdqFeatureData, Timestamp, HostBehavior, SecondaryController, PowerState,
        );
    }

    #[test]
    fn pages_keep_every_bit(bytes in prop::collection::vec(any::<u8>(), 4096)) {
        each_survives!(
            &bytes, IdentifyController, IdentifyNamespace, IdentifyControllerNvm, IdentifyNamespaceIndependent,
            EffectsLog, ChangedNamespaceList,
        );
        let id = IdentifyNamespace::read_from_bytes(&bytes).unwrap();
        let _ = (id.block_bytes(), IdentifyController::read_from_bytes(&bytes).unwrap().max_transfer_bytes(bytes[0]));
    }

    #[test]
    fn fields_written_back_give_the_same_word(bits in any::<u32>()) {
        let cdw0 = Cdw0::from_bits(bits);
        let again = cdw0.with_opcode(cdw0.opcode()).with_fuse(cdw0.fuse()).with_psdt(cdw0.psdt()).with_cid(cdw0.cid());
        prop_assert_eq!(again.into_bits(), bits);
        let lba = LbaMqa::from_bits(bits as u8);
        let again = lba.with_cdqp(lba.cdqp()).with_esa(lba.esa()).with_dlba(lba.dlba()).with_lbacir(lba.lbacir());
        prop_assert_eq!(again.into_bits(), bits as u8);
        let both = StatusPhase::from_bits(bits as u16);
        prop_assert_eq!(both.with_phase(both.phase()).with_status(both.status()).into_bits(), bits as u16);
        let status = Status::from_bits(bits as u16);
        let _ = format!("{status}");
        prop_assert_eq!(status.name().is_some(), Status::NAMED.contains(&status.code()));
        // A value wider than its field is cut, it does not panic and does not reach its neighbours.
        prop_assert_eq!(Cdw0::new().with_fuse(Fuse(bits as u8)).into_bits() & !0x300, 0);
        prop_assert_eq!(LbaMqa::new().with_esa(Esa(bits as u8)).into_bits() & !0x0E, 0);
    }

    #[test]
    fn decoders_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..600), plausible in any::<bool>()) {
        if plausible {
            // Small sizes and version 0, so that parsers get past their first checks.
            bytes.iter_mut().take(64).for_each(|byte| *byte &= 0x03);
            bytes.iter_mut().take(48).enumerate().filter(|(at, _)| at % 16 != 0 || *at == 0).for_each(|(_, b)| *b = 0);
        }
        if let Ok(state) = ControllerState::parse(&bytes)
            && let Some(nvme) = state.nvme
        {
            let _ = nvme.validate(&QueueLimits { max_qid: 4, mqes: 63, vectors: 2 });
        }
        let _ = parse_track_memory(&bytes);
        let _ = parse_track_receive(&bytes);
        let _ = ControllerStateFormats::parse(&bytes);
        prop_assert!(descriptors(&bytes).count() <= bytes.len());
        prop_assert!(nsid_list(&bytes).count() <= bytes.len() / 4);
        prop_assert!(controller_list(&bytes).count() <= bytes.len() / 2);
        let _ = secondary_controllers(&bytes).count();
    }

    #[test]
    fn valid_states_survive(tails in prop::collection::vec((0u16..64, any::<bool>()), 0..8), vendor in any::<[u8; 8]>()) {
        let cqs: Vec<_> = tails.iter().zip(1u16..).map(|(&(tail, phase), qid)| IoCqState {
            qid, qsize: 63, tail, attr: IoCqAttr::new().with_s0pt(s0pt_from_phase(tail, phase)), ..Default::default()
        }).collect();
        let sqs: Vec<_> = cqs.iter().map(|cq| IoSqState { qid: cq.qid, cqid: cq.qid, qsize: 63, ..Default::default() }).collect();
        let mut out = vec![0xA5; encoded_bytes(sqs.len(), cqs.len(), 8)];
        prop_assert_eq!(encode(true, &sqs, &cqs, &vendor, &mut out), Ok(out.len()));
        let state = ControllerState::parse(&out).unwrap();
        let nvme = state.nvme.unwrap();
        prop_assert_eq!(nvme.validate(&QueueLimits { max_qid: 8, mqes: 63, vectors: 1 }), Ok(()));
        prop_assert!(nvme.sqs().eq(sqs) && nvme.cqs().eq(cqs.iter().copied()) && state.vendor == vendor);
        for (cq, (tail, phase)) in cqs.iter().zip(tails) {
            prop_assert_eq!(phase_from_s0pt(tail, cq.attr.s0pt()), phase);
        }
    }
}
