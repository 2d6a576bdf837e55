//! The commands of the migration management controller: controller data queues, tracking, suspend and resume, state, the guest
//! limit (Base 2.3 §5.2.4, §5.2.16, §5.2.17, §5.2.27, §5.2.28, §8.1.13). They reach other controllers, so the subsystem
//! carries them out.

use crate::admin::Event;
use crate::controller::{Controller, Run};
use crate::deviations::Deviation;
use crate::limit::Limit;
use crate::memtrack::{MemoryTracker, TrackLimits, TrackRefusal};
use crate::queue::Ready;
use crate::state::{ControllerState, StateFormats, StatePart, StateSequence, encode};
use crate::subsystem::{MAX_TRACKED_IN_ALL, MAX_TRACKED_RANGES, Subsystem, TRACK_GRANULARITY};
use crate::udmq::{CdqMemory, MIN_SLOTS, Udmq};
use dray_device::poll::Time;
use dray_nvme::cdq::{QueueType, UDMQ_ENTRY_DWORDS};
use dray_nvme::command::{
    AdminOpcode, CdqCdw10, CdqCreateCdw11, CdqDeleteCdw11, CdqFeatureCdw11, CdqSelect, CntlidCdw11, FeatureSelect,
    FeaturesCdw10, GetControllerStateCdw10, GetControllerStateCdw11, GetControllerStateDw0, MigrationReceiveSelect,
    MigrationSendCdw10, MigrationSendSelect, SequenceIndicator, SetControllerStateCdw10, SetControllerStateCdw11, SubmissionEntry,
    SuspendCdw11, SuspendType, TrackReceiveCdw10, TrackReceiveSelect, TrackSendCdw10, TrackSendLogCdw11,
    TrackSendSelect,
};
use dray_nvme::event::AsyncEvent;
use dray_nvme::feature::{CdqFeatureData, FeatureCapabilities, FeatureId};
use dray_nvme::status::Status;
use zerocopy::IntoBytes;

/// Granules that one controller's memory tracking may have in all: a bit each (16 TiB of 4 KiB granules in 512 MiB would be too
/// much; this is 1 TiB in 32 MiB).
const MAX_GRANULES: u64 = 1 << 28;

/// Most memory ranges of all data queues (NMCMR).
pub(crate) const MAX_CDQ_RANGES: usize = 65_535;

/// Most memory ranges, and entries of a PRP list, of one data queue (MCMR, MCDQPC).
pub(crate) fn max_cdq_ranges(max_cdq_bytes: u64) -> usize {
    usize::try_from(max_cdq_bytes / 4096).map_or(MAX_CDQ_RANGES, |pages| pages.min(MAX_CDQ_RANGES))
}

/// A Suspend that waits for its controller to run dry.
#[derive(Clone, Copy, Debug)]
struct PendingSuspend {
    manager: usize,
    cid: u16,
    target: usize,
    delete_queue: bool,
}

/// A controller's state, kept while it is read in pieces. It is dropped whenever the controller's run state changes, so that
/// CSUP = 1 never comes with bytes from before (Base 2.3 §5.2.16).
#[derive(Debug)]
struct Snapshot {
    target: usize,
    formats: StateFormats,
    /// What the controller was doing when it was taken.
    run: Run,
    bytes: Vec<u8>,
}

/// What the management commands remember between them.
#[derive(Debug, Default)]
pub(crate) struct Management {
    suspends: Vec<PendingSuspend>,
    /// By controller index.
    sequences: Vec<(usize, StateSequence)>,
    /// The state being read in pieces.
    snapshot: Option<Snapshot>,
    /// Generation of the manager's address space that the data queues were looked up in.
    generation: u64,
}

impl Management {
    /// The controller's state is not what was read any more.
    fn drop_snapshot(&mut self, target: usize) {
        if self.snapshot.as_ref().is_some_and(|kept| kept.target == target) {
            self.snapshot = None;
        }
    }
}

/// `None` when the completion comes later.
pub(crate) type Answer = Result<Option<u64>, TrackRefusal>;

fn invalid() -> Status {
    Status::INVALID_FIELD.with_dnr()
}

impl Subsystem {
    /// Does what a controller left for the subsystem: consequences of a reset, a management command.
    pub(crate) fn manage(&mut self, index: usize, now: Time) {
        if std::mem::take(&mut self.controllers[index].was_reset) {
            self.after_reset(index);
        }
        let Some(entry) = self.controllers[index].management.take() else { return };
        let cid = entry.cdw0.cid();
        let (status, result) = match self.carry_out(index, &entry, now) {
            Ok(Some(result)) => (Status::SUCCESS, result),
            Ok(None) => return,
            Err(refusal) => (refusal.status, refusal.result),
        };
        self.controllers[index].ready.push(Ready { sqid: 0, cid, status, result });
    }

    fn carry_out(&mut self, index: usize, entry: &SubmissionEntry, now: Time) -> Answer {
        match entry.admin_opcode() {
            AdminOpcode::CONTROLLER_DATA_QUEUE => self.controller_data_queue(index, entry),
            AdminOpcode::TRACK_SEND => self.track_send(index, entry),
            AdminOpcode::TRACK_RECEIVE => self.track_receive(index, entry),
            AdminOpcode::MIGRATION_SEND => self.migration_send(index, entry),
            AdminOpcode::MIGRATION_RECEIVE => self.migration_receive(index, entry),
            AdminOpcode::SET_FEATURES => self.set_feature(index, entry, now),
            AdminOpcode::NAMESPACE_ATTACHMENT | AdminOpcode::NAMESPACE_MANAGEMENT => self.namespace_attachment(index, entry),
            _ => self.get_feature(index, entry),
        }
    }

    /// The migratable controller with that CNTLID.
    fn target(&self, cntlid: u16) -> Result<usize, Status> {
        let found = self.controllers.iter().position(|c| c.config.cntlid == cntlid && !c.is_manager());
        found.ok_or_else(|| {
            let differs = self.shared.deviating.does(Deviation::StatusesDiffer);
            if differs { invalid() } else { Status::INVALID_CONTROLLER_ID.with_dnr() }
        })
    }

    /// The controller that a data queue watches.
    fn watched(&mut self, id: u16) -> Result<&mut Controller, Status> {
        let found = self.controllers.iter_mut().find(|c| c.engine.log.as_ref().is_some_and(|log| log.id == id));
        found.ok_or(Status::INVALID_CDQ.with_dnr())
    }

    /// A reset of the manager deletes its data queues, stops memory tracking, lifts the guests' limits and ends every suspension; a
    /// reset of another controller ends its own (Base 2.3 §8.1.13).
    fn after_reset(&mut self, index: usize) {
        if !self.controllers[index].is_manager() {
            self.management.sequences.retain(|(target, _)| *target != index);
            self.management.drop_snapshot(index);
            self.end_suspends(index);
            return;
        }
        self.management = Management::default();
        let deviating = self.shared.deviating.clone();
        for (at, controller) in self.controllers.iter_mut().enumerate().filter(|(_, c)| !c.is_manager()) {
            let logged = controller.engine.log.as_ref().is_some_and(Udmq::logging);
            if logged && deviating.is(Deviation::LoggingSurvivesReset) {
                deviating.leave_on(at);
            }
            controller.engine.log = None;
            controller.engine.tracker = None;
            controller.limit = Limit::none();
            if controller.run != Run::Active && deviating.does(Deviation::SuspensionSurvivesReset) {
                continue;
            }
            if controller.waits_for_resume() {
                controller.fail_restored(&mut self.shared);
            }
            controller.end_suspension(&mut self.shared);
        }
    }

    /// Suspends of a controller that was reset end without having suspended it.
    fn end_suspends(&mut self, target: usize) {
        let (gone, kept) = self.management.suspends.drain(..).partition(|s: &PendingSuspend| s.target == target);
        self.management.suspends = kept;
        let gone: Vec<PendingSuspend> = gone;
        for suspend in gone {
            let status = Status::CONTROLLER_NOT_SUSPENDED;
            let done = Ready { sqid: 0, cid: suspend.cid, status, result: 0 };
            self.controllers[suspend.manager].ready.push(done);
        }
    }

    /// Completes the Suspends whose controllers have run dry; returns how many.
    pub(crate) fn finish_suspends(&mut self) -> u32 {
        let mut count = 0;
        let mut i = 0;
        while let Some(&suspend) = self.management.suspends.get(i) {
            if self.controllers[suspend.target].run != Run::Suspended {
                i += 1;
                continue;
            }
            self.management.suspends.remove(i);
            if suspend.delete_queue {
                self.controllers[suspend.target].engine.log = None;
            }
            let done = Ready { sqid: 0, cid: suspend.cid, status: Status::SUCCESS, result: 0 };
            self.controllers[suspend.manager].ready.push(done);
            count += 1;
        }
        count
    }

    /// Looks the data queues' memory up again after the manager's address space has changed; a queue whose memory has gone is
    /// gone.
    pub(crate) fn renew_data_queues(&mut self, manager: usize) {
        let generation = self.controllers[manager].engine.reader.generation();
        if generation == self.management.generation {
            return;
        }
        self.management.generation = generation;
        for i in 0..self.controllers.len() {
            let Some(mut log) = self.controllers[i].engine.log.take() else { continue };
            if log.memory_mut().renew(&self.controllers[manager].engine.reader) {
                self.controllers[i].engine.log = Some(log);
            } else {
                tracing::warn!(cdqid = log.id, "the memory of a controller data queue was unmapped: the queue is gone");
            }
        }
    }

    fn controller_data_queue(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        let cdw10 = CdqCdw10::from_bits(entry.cdw10);
        match cdw10.sel() {
            CdqSelect::CREATE if cdw10.queue_type() == QueueType::UDMQ => self.create_cdq(index, entry),
            CdqSelect::DELETE => {
                let id = CdqDeleteCdw11::from_bits(entry.cdw11).cdqid();
                self.watched(id)?.engine.log = None;
                self.discard_events(index, id);
                Ok(Some(0))
            }
            CdqSelect::CREATE => Err(invalid().into()),
            _ if self.shared.deviating.does(Deviation::StatusesDiffer) => Err(Status::SUCCESS.with_dnr().into()),
            _ => Err(invalid().into()),
        }
    }

    fn create_cdq(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        let cdw11 = CdqCreateCdw11::from_bits(entry.cdw11);
        let dwords = entry.cdw12;
        if dwords < MIN_SLOTS * UDMQ_ENTRY_DWORDS || !dwords.is_multiple_of(UDMQ_ENTRY_DWORDS) {
            return Err(invalid().into());
        }
        let target = self.target(cdw11.cqs())?;
        if self.controllers[target].engine.log.is_some() {
            return Err(invalid().into());
        }
        let bytes = u64::from(dwords) * 4;
        let most = self.shared.config.max_cdq_bytes;
        if bytes > most {
            return Err(Status::NOT_ENOUGH_RESOURCES.with_dnr().into());
        }
        let reader = &self.controllers[index].engine.reader;
        let memory = if cdw11.pc() {
            CdqMemory::contiguous(reader, entry.prp1(), bytes)
        } else {
            CdqMemory::from_prp_list(reader, entry.prp1(), bytes, max_cdq_ranges(most) as u32)
        }?;
        self.management.generation = reader.generation();
        let logs = self.controllers.iter().filter_map(|c| c.engine.log.as_ref());
        let ranges: usize = logs.map(|log| log.memory().ranges()).sum();
        if memory.ranges() > max_cdq_ranges(most) || memory.ranges() + ranges > MAX_CDQ_RANGES {
            return Err(invalid().into());
        }
        let taken: Vec<u16> = self.controllers.iter().filter_map(|c| c.engine.log.as_ref().map(|log| log.id)).collect();
        let id = (0..=u16::MAX).find(|id| !taken.contains(id)).ok_or(Status::NOT_ENOUGH_RESOURCES)?;
        let mut log = Udmq::new(id, cdw11.cqs(), memory, dwords / UDMQ_ENTRY_DWORDS);
        log.deviating = self.shared.deviating.clone();
        if log.deviating.was_left_on(target) && log.deviating.does(Deviation::LoggingSurvivesReset) {
            log.was_left_on();
        }
        self.controllers[target].engine.log = Some(log);
        Ok(Some(id.into()))
    }

    fn discard_events(&mut self, manager: usize, id: u16) {
        let admin = &mut self.controllers[manager].admin;
        admin.discard(Event::one_shot(AsyncEvent::CDQ_TAIL_POINTER, id));
        admin.discard(Event::one_shot(AsyncEvent::CDQ_FULL, id));
    }

    fn track_send(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        let cdw10 = TrackSendCdw10::from_bits(entry.cdw10);
        match cdw10.sel() {
            TrackSendSelect::LOG_USER_DATA_CHANGES => self.log_changes(cdw10.lact(), entry),
            TrackSendSelect::TRACK_MEMORY_CHANGES if self.shared.deviating.does(Deviation::NoMemoryTracking) => {
                Err(Status::INTERNAL_ERROR.into())
            }
            TrackSendSelect::TRACK_MEMORY_CHANGES => self.track_memory(index, cdw10.tact(), entry),
            _ => Err(invalid().into()),
        }
    }

    fn log_changes(&mut self, action: u8, entry: &SubmissionEntry) -> Answer {
        let id = TrackSendLogCdw11::from_bits(entry.cdw11).cdqid();
        let controller = self.watched(id)?;
        if controller.run != Run::Active {
            return Err(Status::CONTROLLER_SUSPENDED.into());
        }
        let log = controller.engine.log.as_mut().ok_or(Status::INVALID_CDQ)?;
        let posted = match action {
            0 => log.stop(),
            1 => log.start()?,
            _ => return Err(invalid().into()),
        };
        self.shared.cdq_posted(id, &posted);
        Ok(Some(0))
    }

    fn track_memory(&mut self, index: usize, start: bool, entry: &SubmissionEntry) -> Answer {
        let target = self.target(CntlidCdw11::from_bits(entry.cdw11).cntlid())?;
        if self.controllers[target].run != Run::Active {
            return Err(Status::CONTROLLER_SUSPENDED.into());
        }
        if self.controllers[target].engine.tracker.is_some() == start {
            return Err(Status::INVALID_CONTROLLER_ID.with_dnr().into());
        }
        if !start {
            self.controllers[target].engine.tracker = None;
            return Ok(Some(0));
        }
        let mut header = [0u8; 8];
        self.controllers[index].get_data(entry, &mut header)?;
        let [_, _, _, _, a, b, c, d] = header;
        let count = u32::from_le_bytes([a, b, c, d]) as usize;
        if count > MAX_TRACKED_RANGES {
            return Err(invalid().into());
        }
        let mut buffer = vec![0u8; 8 + 12 * count];
        self.controllers[index].get_data(entry, &mut buffer)?;
        let trackers = self.controllers.iter().filter_map(|c| c.engine.tracker.as_ref());
        let tracked = trackers.map(MemoryTracker::ranges).sum::<usize>().min(MAX_TRACKED_IN_ALL);
        let limits = TrackLimits {
            min_granule: TRACK_GRANULARITY.0,
            max_granule: TRACK_GRANULARITY.1,
            max_ranges: MAX_TRACKED_RANGES.min(MAX_TRACKED_IN_ALL - tracked) as u16,
            max_granules: MAX_GRANULES,
        };
        let tracker = MemoryTracker::parse(&buffer, &limits)?;
        let engine = &mut self.controllers[target].engine;
        engine.reader.refresh();
        if !tracker.is_memory(&engine.reader) {
            return Err(invalid().into());
        }
        engine.tracker = Some(tracker);
        Ok(Some(0))
    }

    fn track_receive(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        if self.shared.deviating.does(Deviation::NoMemoryTracking) {
            return Err(Status::INTERNAL_ERROR.into());
        }
        let cdw10 = TrackReceiveCdw10::from_bits(entry.cdw10);
        let len = (u64::from(entry.cdw12) + 1) * 4;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if cdw10.sel() != TrackReceiveSelect::TRACKED_MEMORY_CHANGES || len > self.controllers[index].engine.max_transfer {
            return Err(invalid().into());
        }
        let cntlid = CntlidCdw11::from_bits(entry.cdw11).cntlid();
        let target = self.target(cntlid)?;
        // Reading consumes, so the buffer is proved first.
        let mut report = vec![0u8; len];
        self.controllers[index].put_data(entry, &report)?;
        let controller = &mut self.controllers[target];
        let suspended = controller.run == Run::Suspended;
        let tracker = controller.engine.tracker.as_mut().ok_or(Status::INVALID_CONTROLLER_ID.with_dnr())?;
        tracker.receive(suspended, cntlid, len, &mut report)?;
        self.controllers[index].put_data(entry, &report)?;
        Ok(Some(0))
    }

    fn migration_send(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        match MigrationSendCdw10::from_bits(entry.cdw10).sel() {
            MigrationSendSelect::SUSPEND => self.suspend(index, entry),
            MigrationSendSelect::RESUME => self.resume(entry),
            MigrationSendSelect::SET_CONTROLLER_STATE => self.set_state(index, entry),
            _ => Err(invalid().into()),
        }
    }

    fn suspend(&mut self, manager: usize, entry: &SubmissionEntry) -> Answer {
        let cdw11 = SuspendCdw11::from_bits(entry.cdw11);
        let target = self.target(cdw11.cntlid())?;
        match cdw11.stype() {
            SuspendType::NOTIFICATION => return Ok(Some(0)),
            SuspendType::SUSPEND => {}
            _ => return Err(invalid().into()),
        }
        self.management.drop_snapshot(target);
        if self.controllers[target].run == Run::Suspended && self.shared.deviating.is(Deviation::SuspendMarksAlways) {
            self.mark_suspended(target);
        }
        self.controllers[target].suspend();
        let cid = entry.cdw0.cid();
        self.management.suspends.push(PendingSuspend { manager, cid, target, delete_queue: cdw11.dudmq() });
        Ok(None)
    }

    /// A device that deviates marks the log again.
    fn mark_suspended(&mut self, target: usize) {
        if let Some(log) = &mut self.controllers[target].engine.log {
            let (id, posted) = (log.id, log.suspended());
            self.shared.cdq_posted(id, &posted);
        }
    }

    /// A device that deviates has the next phase tag where S0PT belongs: while the tail is 0 that is the other one.
    fn turn_phases(&self, state: &mut ControllerState) {
        for cq in state.cqs.iter_mut().filter(|cq| cq.tail == 0) {
            cq.phase ^= self.shared.deviating.does(Deviation::PhaseInsteadOfS0pt);
        }
    }

    fn resume(&mut self, entry: &SubmissionEntry) -> Answer {
        let target = self.target(CntlidCdw11::from_bits(entry.cdw11).cntlid())?;
        if self.controllers[target].run != Run::Suspended {
            return Err(Status::CONTROLLER_NOT_SUSPENDED.with_dnr().into());
        }
        if self.management.sequences.iter().any(|(of, sequence)| *of == target && sequence.is_open()) {
            return Err(Status::COMMAND_SEQUENCE.with_dnr().into());
        }
        self.management.drop_snapshot(target);
        self.controllers[target].resume(&mut self.shared)?;
        Ok(Some(0))
    }

    fn set_state(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        let cdw11 = SetControllerStateCdw11::from_bits(entry.cdw11);
        let target = self.target(cdw11.cntlid())?;
        if self.controllers[target].run != Run::Suspended {
            return Err(Status::INVALID_CONTROLLER_ID.with_dnr().into());
        }
        self.management.drop_snapshot(target);
        let taken = self.take_state(index, target, entry);
        if taken.is_err() {
            // A refused piece ends the sequence, whatever it was refused for: it starts again from offset 0.
            self.management.sequences.retain(|(of, _)| *of != target);
        }
        taken
    }

    /// A piece of a state; the last one restores the controller.
    fn take_state(&mut self, index: usize, target: usize, entry: &SubmissionEntry) -> Answer {
        let cdw11 = SetControllerStateCdw11::from_bits(entry.cdw11);
        let len = usize::try_from(u64::from(entry.cdw15) * 4).unwrap_or(usize::MAX);
        if len > self.controllers[index].engine.max_transfer {
            return Err(invalid().into());
        }
        let mut data = vec![0u8; len];
        self.controllers[index].get_data(entry, &mut data)?;
        if !self.management.sequences.iter().any(|(of, _)| *of == target) {
            self.management.sequences.push((target, StateSequence::default()));
        }
        let sequence = self.management.sequences.iter_mut().find(|(of, _)| *of == target);
        let (_, sequence) = sequence.ok_or(Status::INTERNAL_ERROR)?;
        let part = StatePart {
            seqind: SetControllerStateCdw10::from_bits(entry.cdw10).seqind(),
            csvi: cdw11.csvi(),
            csuuidi: cdw11.csuuidi(),
            offset: u64::from(entry.cdw12) | u64::from(entry.cdw13) << 32,
            data: &data,
        };
        let deviating = &self.shared.deviating;
        if part.seqind != SequenceIndicator::ONLY && deviating.does(Deviation::StateInOneCommand) {
            return Err(Status::INTERNAL_ERROR.into());
        }
        if part.csuuidi != 0 && deviating.does(Deviation::StateIndexWide) {
            return Err(invalid().into());
        }
        if let Some(mut state) = sequence.take(&part)? {
            sequence.clear();
            self.turn_phases(&mut state);
            self.controllers[target].restore(&state, &mut self.shared)?;
        }
        Ok(Some(0))
    }

    fn migration_receive(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        let cdw10 = GetControllerStateCdw10::from_bits(entry.cdw10);
        let cdw11 = GetControllerStateCdw11::from_bits(entry.cdw11);
        if cdw10.sel() != MigrationReceiveSelect::GET_CONTROLLER_STATE {
            return Err(invalid().into());
        }
        let target = self.target(cdw11.cntlid()).map_err(|status| {
            if self.shared.deviating.is(Deviation::StatusesDiffer) { Status::INVALID_CDQ.with_dnr() } else { status }
        })?;
        let formats = StateFormats::of(cdw10.csvi(), cdw11.csuuidi())?;
        let offset = u64::from(entry.cdw12) | u64::from(entry.cdw13) << 32;
        let len = (u64::from(entry.cdw15) + 1).saturating_mul(4);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > self.controllers[index].engine.max_transfer || !offset.is_multiple_of(4) {
            return Err(invalid().into());
        }
        // Pieces after the first come from the state that the first came from.
        let run = self.controllers[target].run;
        let same = |kept: &Snapshot| kept.target == target && kept.formats == formats && kept.run == run;
        if offset == 0 || !self.management.snapshot.as_ref().is_some_and(same) {
            let mut state = self.controllers[target].snapshot();
            self.turn_phases(&mut state);
            let bytes = encode(&state, formats.nvme, formats.vendor)?;
            self.management.snapshot = Some(Snapshot { target, formats, run, bytes });
        }
        let state = self.management.snapshot.as_ref().map_or(&[][..], |kept| &kept.bytes);
        let from = usize::try_from(offset).ok().and_then(|offset| state.get(offset..)).ok_or(invalid())?;
        let mut data = vec![0u8; len];
        let count = from.len().min(len);
        data[..count].copy_from_slice(&from[..count]);
        self.controllers[index].put_data(entry, &data)?;
        let told = run == Run::Suspended && !self.shared.deviating.does(Deviation::CsupNeverSet);
        Ok(Some(GetControllerStateDw0::new().with_csup(told).into_bits().into()))
    }

    fn set_feature(&mut self, index: usize, entry: &SubmissionEntry, now: Time) -> Answer {
        let cdw10 = FeaturesCdw10::from_bits(entry.cdw10);
        if cdw10.sv() {
            return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr().into());
        }
        if cdw10.fid() == FeatureId::VENDOR_GUEST_LIMIT {
            let target = self.target(entry.cdw11 as u16)?;
            self.controllers[target].limit.set(now, entry.cdw12);
            return Ok(Some(0));
        }
        let cdw11 = CdqFeatureCdw11::from_bits(entry.cdw11);
        let id = cdw11.cdqid();
        let trigger = cdw11.etpt().then_some(entry.cdw13);
        let log = self.watched(id)?.engine.log.as_mut().ok_or(Status::INVALID_CDQ)?;
        let posted = log.set_head(entry.cdw12, trigger)?;
        let (event, admin) = (Event::one_shot(AsyncEvent::CDQ_TAIL_POINTER, id), &mut self.controllers[index].admin);
        if !(admin.has(&event) && self.shared.deviating.does(Deviation::EventStaysPending)) {
            admin.discard(event);
        }
        self.shared.cdq_posted(id, &posted);
        Ok(Some(0))
    }

    fn get_feature(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        let cdw10 = FeaturesCdw10::from_bits(entry.cdw10);
        match cdw10.sel() {
            FeatureSelect::CURRENT => {}
            FeatureSelect::CAPABILITIES => {
                return Ok(Some(FeatureCapabilities::new().with_changeable(true).into_bits().into()));
            }
            FeatureSelect::DEFAULT | FeatureSelect::SAVED => return Ok(Some(0)),
            _ => return Err(invalid().into()),
        }
        if cdw10.fid() == FeatureId::VENDOR_GUEST_LIMIT {
            let target = self.target(entry.cdw11 as u16)?;
            return Ok(Some(self.controllers[target].limit.rate().into()));
        }
        let id = CdqFeatureCdw11::from_bits(entry.cdw11).cdqid();
        let log = self.watched(id)?.engine.log.as_ref().ok_or(Status::INVALID_CDQ)?;
        let (armed, hp, tpt) = log.feature();
        self.controllers[index].put_data(entry, CdqFeatureData { hp, tpt }.as_bytes())?;
        Ok(Some(CdqFeatureCdw11::new().with_cdqid(id).with_etpt(armed).into_bits().into()))
    }
}
