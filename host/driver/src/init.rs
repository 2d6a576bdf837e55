//! Reset, enable, identify, shutdown: the state machine of a controller's life (Base 2.3 §3.5 to §3.7).

use crate::admin::{AdminData, RequestData, Ticket};
use crate::config::timeout_ns;
use crate::driver::{Driver, DriverState};
use crate::error::DriverError;
use crate::ring::Ring;
use dray_device::function::Doorbell;
use dray_device::poll::Time;
use dray_device::memory::{DmaBuffer, PAGE, Pages};
use dray_device::space::MappedBuffer;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::doorbell_buffer::{cq_head_offset, sq_tail_offset};
use dray_nvme::feature::{FeatureId, NumberOfQueues};
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController, IdentifyControllerNvm, Oaes};
use dray_nvme::registers::{
    Aqa, CQES, Cap, Cc, Csts, SQES, ShutdownNotification, ShutdownStatus, cq_head_doorbell, offset, sq_tail_doorbell,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::FromBytes;

/// Time that a controller gets to show its capabilities, and at least gets to become ready, in milliseconds.
const LEAST_READY_MS: u32 = 5_000;
/// Bounds of the time for a shutdown, in milliseconds; RTD3E says how long it takes.
const SHUTDOWN_MS: (u32, u32) = (5_000, 60_000);

/// The step that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// CAP is to be there: behind a slot the controller publishes it at its first poll.
    Appear,
    /// CC.EN is set and CSTS.RDY is not: EN may only be cleared when RDY has followed.
    Settle,
    /// CC.EN is cleared, RDY is to follow.
    Disable,
    /// CC.EN is set, RDY is to follow.
    Enable,
    /// Identify Controller (CNS 01h).
    Identify(Ticket),
    /// Identify Controller of the NVM command set (CNS 06h).
    IdentifyNvm(Ticket),
    /// Set Features 07h.
    QueueCount(Ticket),
    /// Set Features 0Bh.
    Events(Ticket),
    /// Doorbell Buffer Config.
    Shadow(Ticket),
    /// CC.SHN is set, CSTS.SHST is to follow.
    Shutdown,
    /// Nothing: ready, stopped or failed.
    Idle,
}

impl Driver {
    pub(crate) fn begin_reset(&mut self, _now: Time) {
        for record in &self.pairs {
            record.shared.freeze();
        }
        self.enter(DriverState::Resetting, Phase::Appear);
    }

    pub(crate) fn begin_shutdown(&mut self, now: Time) {
        if !self.admin.is_started() || !matches!(self.state, DriverState::Ready | DriverState::Failed(_)) {
            self.disable();
            self.bury();
            return self.enter(DriverState::Stopped, Phase::Idle);
        }
        for record in &self.pairs {
            record.shared.freeze();
        }
        let cc = Cc::from_bits(self.function.read32(offset::CC)).with_shn(ShutdownNotification::NORMAL);
        self.function.write32(offset::CC, cc.into_bits());
        self.enter(DriverState::ShuttingDown, Phase::Shutdown);
        self.deadline = Some(now.after_ms(u64::from(self.shutdown_ms())));
    }

    fn enter(&mut self, state: DriverState, phase: Phase) {
        (self.state, self.phase, self.deadline) = (state, phase, None);
    }

    /// Clears CC.EN without waiting.
    pub(crate) fn disable(&mut self) {
        let cc = Cc::from_bits(self.function.read32(offset::CC));
        if cc.en() {
            let cc = cc.with_en(false).with_shn(ShutdownNotification(0));
            self.function.write32(offset::CC, cc.into_bits());
        }
    }

    /// The controller has let go of every queue (or nobody will know): all commands come back, all queues are gone.
    pub(crate) fn bury(&mut self) {
        self.admin.stop();
        self.forget_aborts();
        self.bury_pairs();
        // Memory of controller data queues whose owners are gone.
        self.orphans.clear();
        self.shadow = None;
        drop(self.link.take_orphans());
        self.generation = self.generation.wrapping_add(1);
    }

    fn ready_ms(&self) -> u32 {
        match self.config.ready_timeout_ms {
            0 => self.cap.ready_timeout_ms().saturating_add(500).max(LEAST_READY_MS),
            ms => ms,
        }
    }

    fn shutdown_ms(&self) -> u32 {
        let told = self.identify.as_ref().map_or(0, |id| id.rtd3e / 1_000);
        told.clamp(SHUTDOWN_MS.0, SHUTDOWN_MS.1)
    }

    /// One step of the machine; 1 if it went on.
    pub(crate) fn step(&mut self, now: Time) -> u32 {
        let ready_ms = self.ready_ms();
        let deadline = *self.deadline.get_or_insert(now.after_ms(u64::from(ready_ms)));
        let csts = Csts::from_bits(self.function.read32(offset::CSTS));
        if csts.is_gone() {
            self.fail(now, DriverError::Gone);
            return 1;
        }
        match self.advance(now, csts) {
            Ok(true) => 1,
            Ok(false) if now >= deadline => {
                self.fail(now, self.overdue());
                1
            }
            Ok(false) => 0,
            Err(error) => {
                self.fail(now, error);
                1
            }
        }
    }

    fn overdue(&self) -> DriverError {
        let ms = self.ready_ms();
        match self.phase {
            Phase::Appear => DriverError::Absent { ms },
            Phase::Disable => DriverError::ReadyTimeout { to: false, ms },
            Phase::Shutdown => DriverError::ShutdownTimeout { ms: self.shutdown_ms() },
            Phase::Identify(_) => DriverError::NoAnswer { command: "Identify Controller" },
            Phase::IdentifyNvm(_) => DriverError::NoAnswer { command: "Identify Controller, NVM command set" },
            Phase::QueueCount(_) => DriverError::NoAnswer { command: "Set Features, Number of Queues" },
            Phase::Events(_) => DriverError::NoAnswer { command: "Set Features, Asynchronous Event Configuration" },
            Phase::Shadow(_) => DriverError::NoAnswer { command: "Doorbell Buffer Config" },
            _ => DriverError::ReadyTimeout { to: true, ms },
        }
    }

    /// Whether the step under way ended; an error ends the attempt.
    fn advance(&mut self, now: Time, csts: Csts) -> Result<bool, DriverError> {
        match self.phase {
            Phase::Appear => self.appear(csts),
            Phase::Settle => self.settle(now, csts),
            // CSTS.CFS goes with the reset too: what is left of it would look like a failure of what is enabled next.
            Phase::Disable if !csts.rdy() && (!csts.cfs() || self.is_due(now)) => self.enable().map(|()| true),
            Phase::Enable if csts.cfs() => Err(DriverError::Fatal),
            Phase::Enable if csts.rdy() => self.ask_identify(now).map(|()| true),
            Phase::Shutdown if csts.shst() == ShutdownStatus::COMPLETE => {
                self.disable();
                self.bury();
                self.enter(DriverState::Stopped, Phase::Idle);
                Ok(true)
            }
            Phase::Identify(ticket) => self.identified(now, ticket),
            Phase::IdentifyNvm(ticket) => self.identified_nvm(now, ticket),
            Phase::QueueCount(ticket) => self.counted(now, ticket),
            Phase::Events(ticket) => self.configured(now, ticket),
            Phase::Shadow(ticket) => Ok(self.shadowed(ticket)),
            Phase::Disable | Phase::Enable | Phase::Shutdown | Phase::Idle => Ok(false),
        }
    }

    fn is_due(&self, now: Time) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }

    fn appear(&mut self, csts: Csts) -> Result<bool, DriverError> {
        self.cap = Cap::from_bits(self.function.read64(offset::CAP));
        if self.cap.into_bits() == 0 {
            return Ok(false);
        }
        if self.cap.css() & Cap::CSS_NVM == 0 {
            return Err(DriverError::Unsupported("it has no NVM command set (CAP.CSS)"));
        }
        if self.cap.mpsmin() != 0 {
            return Err(DriverError::Unsupported("its pages are larger than 4 KiB (CAP.MPSMIN)"));
        }
        let enabled = Cc::from_bits(self.function.read32(offset::CC)).en();
        if enabled && !csts.rdy() && !csts.cfs() {
            self.enter(DriverState::Resetting, Phase::Settle);
        } else {
            self.disable();
            self.enter(DriverState::Resetting, Phase::Disable);
        }
        Ok(true)
    }

    /// A controller that never settles is disabled all the same.
    fn settle(&mut self, now: Time, csts: Csts) -> Result<bool, DriverError> {
        let settled = csts.rdy() || csts.cfs() || self.is_due(now);
        if settled {
            self.disable();
            self.enter(DriverState::Resetting, Phase::Disable);
        }
        Ok(settled)
    }

    fn enable(&mut self) -> Result<(), DriverError> {
        self.bury();
        let bells = self.doorbells(0)?;
        let memory = Arc::clone(&self.admin_memory);
        memory.arena().fill(memory.buffer().offset(), self.admin_shape.bytes(), 0);
        let [sq, cq] = self.admin_shape.bases(&memory);
        let size = self.admin_shape.entries as u16 - 1;
        self.admin.set_limits(PAGE, 0);
        self.admin.start(Ring::new(0, self.admin_shape, memory, bells, self.function.space()));
        self.function.write32(offset::AQA, Aqa::new().with_asqs(size).with_acqs(size).into_bits());
        self.function.write64(offset::ASQ, sq);
        self.function.write64(offset::ACQ, cq);
        let cc = Cc::new().with_en(true).with_iosqes(SQES).with_iocqes(CQES);
        self.function.write32(offset::CC, cc.into_bits());
        self.enter(DriverState::Enabling, Phase::Enable);
        Ok(())
    }

    /// The doorbells of a queue pair.
    pub(crate) fn doorbells(&self, qid: u16) -> Result<[Doorbell; 2], DriverError> {
        let dstrd = self.cap.dstrd();
        let sq = self.function.doorbell(sq_tail_doorbell(qid, dstrd));
        let cq = self.function.doorbell(cq_head_doorbell(qid, dstrd));
        Ok([sq.ok_or(DriverError::NoDoorbell { qid })?, cq.ok_or(DriverError::NoDoorbell { qid })?])
    }

    /// Sends a command of the set-up and waits for it as long as admin commands may take.
    fn ask(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<Ticket, DriverError> {
        self.deadline = Some(now.after_ns(timeout_ns(self.config.admin_timeout_ms)));
        self.admin.request(now.0, entry, RequestData::Through(data)).map_err(|_| DriverError::Reset)
    }

    fn ask_identify(&mut self, now: Time) -> Result<(), DriverError> {
        let entry = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
        self.state = DriverState::Identifying;
        self.phase = Phase::Identify(self.ask(now, &entry, AdminData::In(IDENTIFY_BYTES))?);
        Ok(())
    }

    fn identified(&mut self, now: Time, ticket: Ticket) -> Result<bool, DriverError> {
        let Some(answer) = self.admin.answer(ticket) else { return Ok(false) };
        let answer = answer.accepted("Identify Controller")?;
        let page = IdentifyController::read_from_bytes(&answer.data)
            .map_err(|_| DriverError::Unsupported("Identify Controller has the wrong length"))?;
        self.admin.recycle(answer.data);
        let mdts = page.max_transfer_bytes(self.cap.mpsmin()).and_then(|bytes| usize::try_from(bytes).ok());
        self.max_transfer = self.config.max_transfer_bytes.max(PAGE).min(mdts.unwrap_or(usize::MAX));
        self.admin.set_limits(mdts.unwrap_or(usize::MAX), 0);
        self.identify = Some(Box::new(page));
        let entry = SubmissionEntry::identify(Cns::CONTROLLER_NVM, 0, 0, CommandSetId::NVM);
        self.phase = Phase::IdentifyNvm(self.ask(now, &entry, AdminData::In(IDENTIFY_BYTES))?);
        Ok(true)
    }

    /// Controllers before NVMe 2.0 refuse it.
    fn identified_nvm(&mut self, now: Time, ticket: Ticket) -> Result<bool, DriverError> {
        let Some(answer) = self.admin.answer(ticket) else { return Ok(false) };
        self.identify_nvm = IdentifyControllerNvm::read_from_bytes(&answer.data).ok().map(Box::new);
        self.admin.recycle(answer.data);
        // 0's based, and FFFFh is not a count (Base 2.3 §5.2.26.1.5).
        let wanted = self.config.io_queues.clamp(1, u16::MAX - 1) - 1;
        let counts = NumberOfQueues::new().with_nsq(wanted).with_ncq(wanted);
        let entry = SubmissionEntry::set_features(FeatureId::NUMBER_OF_QUEUES, counts.into_bits(), false);
        self.phase = Phase::QueueCount(self.ask(now, &entry, AdminData::None)?);
        Ok(true)
    }

    fn counted(&mut self, now: Time, ticket: Ticket) -> Result<bool, DriverError> {
        let Some(answer) = self.admin.answer(ticket) else { return Ok(false) };
        // A controller that refuses has its admin queue alone.
        self.queues_granted = answer.accepted("Set Features, Number of Queues").map_or(0, |answer| {
            let granted = NumberOfQueues::from_bits(answer.completion.result as u32);
            granted.nsq().min(granted.ncq()).min(self.config.io_queues.max(1) - 1).saturating_add(1)
        });
        // The notices that the controller offers and this driver can pass on; the layouts of OAES and feature 0Bh agree.
        let offered = self.identify.as_ref().map_or(Oaes::new(), |id| id.oaes);
        let events = Oaes::new()
            .with_namespace_attribute(offered.namespace_attribute())
            .with_firmware_activation(offered.firmware_activation())
            .with_ana_change(offered.ana_change());
        let entry = SubmissionEntry::set_features(FeatureId::ASYNC_EVENT_CONFIG, events.into_bits(), false);
        self.phase = Phase::Events(self.ask(now, &entry, AdminData::None)?);
        Ok(true)
    }

    /// A refusal is tolerated: one-shot events need no configuration.
    fn configured(&mut self, now: Time, ticket: Ticket) -> Result<bool, DriverError> {
        if self.admin.answer(ticket).is_none() {
            return Ok(false);
        }
        if !self.wants_shadow() {
            self.become_ready();
            return Ok(true);
        }
        let memory = Arc::new(MappedBuffer::new(self.function.space(), DmaBuffer::allocate("dray-shadow", 2 * PAGE, Pages::Small)?)?);
        let entry = SubmissionEntry::doorbell_buffer_config(memory.iova(), memory.iova() + PAGE as u64);
        self.shadow = Some(memory);
        self.deadline = Some(now.after_ns(timeout_ns(self.config.admin_timeout_ms)));
        let ticket = self.admin.request(now.0, &entry, RequestData::Described).map_err(|_| DriverError::Reset)?;
        self.phase = Phase::Shadow(ticket);
        Ok(true)
    }

    /// Shadow doorbells are used where they save messages, and where every queue has its place in the page.
    fn wants_shadow(&self) -> bool {
        let offered = self.identify.as_ref().is_some_and(|id| id.oacs.dbcs());
        let trapped = matches!(self.doorbells(1), Ok([Doorbell::Trapped { .. }, _]));
        let end = cq_head_offset(self.queues_granted, self.cap.dstrd()) as usize + 4;
        self.config.shadow_doorbells && offered && trapped && self.queues_granted > 0 && end <= PAGE
    }

    /// A refusal is tolerated: registers do as well.
    fn shadowed(&mut self, ticket: Ticket) -> bool {
        let Some(answer) = self.admin.answer(ticket) else { return false };
        if answer.accepted("Doorbell Buffer Config").is_err() {
            self.shadow = None;
        }
        self.become_ready();
        true
    }

    /// Both doorbells of a pair that is about to be created are 0.
    pub(crate) fn clear_shadow(&self, qid: u16) {
        let Some(shadow) = &self.shadow else { return };
        let dstrd = self.cap.dstrd();
        for at in [sq_tail_offset(qid, dstrd), cq_head_offset(qid, dstrd)] {
            shadow.arena().store32(shadow.buffer().offset() + at as usize, 0, Ordering::Release);
        }
    }

    fn become_ready(&mut self) {
        let aerl = self.identify.as_ref().map_or(0, |id| u16::from(id.aerl)) + 1;
        let half = u16::try_from(self.admin_shape.depth() / 2).unwrap_or(u16::MAX);
        let aers = u16::from(self.config.aers).min(aerl).min(half);
        self.admin.set_limits(self.admin.limit(), aers as u8);
        self.enter(DriverState::Ready, Phase::Idle);
    }
}
