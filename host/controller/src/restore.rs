//! A controller's state, out and in (Base 2.3 §5.2.16, §5.2.17.1.3): the queues in the specification's format, the rest in the
//! vendor part.
//!
//! A state is taken whole or not at all: every queue is checked against this controller's limits and found in the guest's
//! memory before anything changes. The controller stays suspended and looks at nothing until Resume; then it takes the
//! doorbells as they stand, and a fall of CC.EN since the state was taken ([`VendorState::bar_resets`]) as a reset to be done.

use crate::admin::AdminState;
use crate::admin::queues::QueueRequest;
use crate::controller::{Controller, Run};
use crate::deviations::Deviation;
use crate::queue::{Cq, Sq};
use crate::shadow::ShadowPages;
use crate::state::{ControllerState, CqSnapshot, Features as StateFeatures, SqSnapshot, VendorState};
use crate::subsystem::Shared;
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_nvme::feature::{AsyncEventConfig, InterruptCoalescing, NumberOfQueues};
use dray_nvme::registers::{Aqa, Cc, offset};
use dray_nvme::state::QueueLimits;
use dray_nvme::status::Status;

fn invalid() -> Status {
    Status::INVALID_FIELD.with_dnr()
}

/// The queues of a state, found and checked, not yet the controller's.
struct Queues {
    admin: Option<(Sq, Cq)>,
    sqs: Vec<Sq>,
    cqs: Vec<Cq>,
    shadow: Option<ShadowPages>,
}

impl Controller {
    /// The state as it is now; consistent if the controller is suspended.
    pub(crate) fn snapshot(&self) -> ControllerState {
        ControllerState {
            suspended: self.run == Run::Suspended,
            sqs: self.sqs.iter().skip(1).flatten().map(sq_snapshot).collect(),
            cqs: self.cqs.iter().skip(1).flatten().map(cq_snapshot).collect(),
            vendor: Some(self.vendor_snapshot()),
        }
    }

    fn vendor_snapshot(&self) -> VendorState {
        let register = |at| self.port.as_ref().map_or(0, |port| port.bar().load32(at));
        let (sq, cq) = (self.sqs[0].as_ref(), self.cqs[0].as_ref());
        let aqa = sq.zip(cq).map_or(0, |(sq, cq)| {
            Aqa::new().with_asqs((sq.size - 1) as u16).with_acqs((cq.size - 1) as u16).into_bits()
        });
        VendorState {
            cc: self.cc_seen,
            csts: self.csts(),
            aqa,
            asq: sq.map_or(0, |sq| sq.memory.iova),
            acq: cq.map_or(0, |cq| cq.memory.iova),
            intms: register(offset::INTMS),
            admin_sq_head: sq.map_or(0, |sq| sq.head as u16),
            admin_sq_tail: sq.map_or(0, |sq| sq.tail as u16),
            admin_cq_head: cq.map_or(0, |cq| cq.head as u16),
            admin_cq_tail: cq.map_or(0, |cq| cq.tail as u16),
            admin_cq_phase: cq.is_some_and(|cq| cq.phase),
            bar_resets: self.resets_seen,
            aer_cids: self.admin.aers.clone(),
            masked_events: self.admin.masked.into(),
            shadow_doorbells: self.shadow.as_ref().map(|shadow| shadow.pages.addresses()),
            features: self.feature_snapshot(),
        }
    }

    fn feature_snapshot(&self) -> StateFeatures {
        let features = &self.features;
        let (timestamp_ms, origin) = features.timestamp(self.now);
        let mut coalescing_disabled = StateFeatures::default().coalescing_disabled;
        for (vector, _) in features.coalescing_disabled.iter().enumerate().filter(|(_, disabled)| **disabled) {
            if let Some(word) = coalescing_disabled.get_mut(vector / 64) {
                *word |= 1 << (vector % 64);
            }
        }
        let queues = features.queues.map(NumberOfQueues::from_bits);
        let mut host_behavior = [0; 8];
        host_behavior.copy_from_slice(&features.host_behavior[..8]);
        StateFeatures {
            arbitration: features.arbitration,
            power_management: features.power,
            temperature_over: features.temperature[0],
            temperature_under: features.temperature[1],
            error_recovery: features.error_recovery,
            volatile_write_cache: self.engine.wce,
            coalescing_threshold: features.coalescing.thr(),
            coalescing_time: features.coalescing.time(),
            coalescing_disabled,
            write_atomicity: features.write_atomicity,
            async_event_config: features.events.into_bits(),
            timestamp_ms,
            timestamp_attributes: origin << 1,
            host_behavior,
            host_id: features.host_id,
            granted_sqs: queues.map_or(0, |q| q.nsq().saturating_add(1)),
            granted_cqs: queues.map_or(0, |q| q.ncq().saturating_add(1)),
            guest_limit: self.limit.rate(),
        }
    }

    /// Commits a state to this controller, which is suspended.
    ///
    /// # Errors
    /// Invalid Field when anything in it does not fit; the controller is as it was, without what an earlier state that was not
    /// resumed had left.
    pub(crate) fn restore(&mut self, state: &ControllerState, shared: &mut Shared) -> Result<(), Status> {
        self.take_port(shared);
        self.engine.reader.refresh();
        if std::mem::take(&mut self.restored) | std::mem::take(&mut self.parted) {
            self.drop_queues();
            self.admin = AdminState::new();
            self.enabled = false;
        }
        // I/O queues of its own would outlive a state that has none, or takes back what was granted for them.
        if self.cqs.iter().skip(1).any(Option::is_some) {
            return Err(invalid());
        }
        let deviating = &self.engine.deviating;
        if self.oddities.had_queues() && !state.cqs.is_empty() && deviating.does(Deviation::QueuesStick) {
            return Err(invalid());
        }
        let vectors = self.port.as_ref().map_or(0, |port| port.vectors()).min(self.config.vectors);
        let limits = QueueLimits { max_qid: self.config.io_queues, mqes: self.cap.mqes(), vectors };
        state.check(&limits)?;
        let mut queues = self.find_state_queues(state, vectors)?;
        match &state.vendor {
            Some(vendor) => self.check_vendor(vendor)?,
            // Without the vendor part the admin queue must be there already.
            None if !self.enabled => return Err(invalid()),
            None => {}
        }
        let shadow = queues.shadow.take();
        self.commit(queues);
        if let Some(vendor) = &state.vendor {
            self.commit_vendor(vendor);
            self.put_shadow(shadow);
        }
        self.share_shadow();
        self.restored = true;
        Ok(())
    }

    fn find_state_queues(&self, state: &ControllerState, vectors: u16) -> Result<Queues, Status> {
        let mut queues = Queues { admin: None, sqs: Vec::new(), cqs: Vec::new(), shadow: None };
        for from in &state.cqs {
            let request = request(from.qid, from.entries_minus_1, from.prp1, from.pc);
            let mut cq = self.new_cq(&request, from.ien.then_some(from.iv), vectors).map_err(|_| invalid())?;
            place_cq(&mut cq, from.head, from.tail, from.phase)?;
            queues.cqs.push(cq);
        }
        for from in &state.sqs {
            let request = request(from.qid, from.entries_minus_1, from.prp1, from.pc);
            let mut sq = self.new_sq(&request, from.cqid, from.qprio).map_err(|_| invalid())?;
            place_sq(&mut sq, from.head, from.tail)?;
            let cq = queues.cqs.iter_mut().find(|cq| cq.qid == from.cqid).ok_or(invalid())?;
            cq.users += 1;
            queues.sqs.push(sq);
        }
        let Some(vendor) = state.vendor.as_ref().filter(|vendor| Cc::from_bits(vendor.cc).en()) else {
            return if queues.cqs.is_empty() || state.vendor.is_none() { Ok(queues) } else { Err(invalid()) };
        };
        let aqa = Aqa::from_bits(vendor.aqa);
        if aqa.asqs() == 0 || aqa.acqs() == 0 {
            return Err(invalid());
        }
        let (mut sq, mut cq) = self.new_admin_queues(aqa, vendor.asq, vendor.acq).map_err(|_| invalid())?;
        place_sq(&mut sq, vendor.admin_sq_head, vendor.admin_sq_tail)?;
        place_cq(&mut cq, vendor.admin_cq_head, vendor.admin_cq_tail, vendor.admin_cq_phase)?;
        queues.admin = Some((sq, cq));
        // Where doorbells are not trapped it is not offered, but what the guest has configured it goes on using.
        let pages = vendor.shadow_doorbells.map(|pages| ShadowPages::find(&self.engine.reader, pages));
        queues.shadow = pages.transpose()?;
        Ok(queues)
    }

    fn check_vendor(&self, vendor: &VendorState) -> Result<(), Status> {
        let cc = Cc::from_bits(vendor.cc);
        let aers = vendor.aer_cids.len() <= usize::from(crate::admin::AERL) + 1;
        let same_pages = !cc.en() || cc.mps() == 0 && cc.css() == dray_nvme::registers::CommandSetSelected::NVM;
        let most = self.config.io_queues;
        let (sqs, cqs) = (vendor.features.granted_sqs, vendor.features.granted_cqs);
        // Number of Queues grants both kinds or none.
        let granted = sqs <= most && cqs <= most && (sqs == 0) == (cqs == 0);
        if aers && same_pages && granted { Ok(()) } else { Err(invalid()) }
    }

    fn commit(&mut self, queues: Queues) {
        if let Some((sq, cq)) = queues.admin {
            (self.sqs[0], self.cqs[0]) = (Some(sq), Some(cq));
            self.enabled = true;
        }
        for cq in queues.cqs {
            self.oddities.created_queue();
            let at = usize::from(cq.qid);
            self.cqs[at] = Some(cq);
        }
        for sq in queues.sqs {
            self.live.push(sq.qid);
            let at = usize::from(sq.qid);
            self.sqs[at] = Some(sq);
        }
    }

    fn commit_vendor(&mut self, vendor: &VendorState) {
        (self.cc_seen, self.resets_seen) = (vendor.cc, vendor.bar_resets);
        self.set_csts(vendor.csts);
        self.admin.aers = vendor.aer_cids.clone();
        self.admin.masked = vendor.masked_events as u8;
        let from = &vendor.features;
        let features = &mut self.features;
        features.arbitration = from.arbitration;
        features.power = from.power_management;
        features.temperature = [from.temperature_over, from.temperature_under];
        features.error_recovery = from.error_recovery;
        features.coalescing =
            InterruptCoalescing::new().with_thr(from.coalescing_threshold).with_time(from.coalescing_time);
        for (vector, disabled) in features.coalescing_disabled.iter_mut().enumerate() {
            *disabled = from.coalescing_disabled.get(vector / 64).is_some_and(|word| word >> (vector % 64) & 1 == 1);
        }
        features.write_atomicity = from.write_atomicity;
        features.events = AsyncEventConfig::from_bits(from.async_event_config);
        let set_by_host = from.timestamp_attributes >> 1 & 7 == 1;
        features.timestamp = set_by_host.then_some((from.timestamp_ms, self.now));
        features.host_behavior[..8].copy_from_slice(&from.host_behavior);
        features.host_id = from.host_id;
        let granted = from.granted_sqs.checked_sub(1).zip(from.granted_cqs.checked_sub(1));
        features.queues = granted.map(|(nsq, ncq)| NumberOfQueues::new().with_nsq(nsq).with_ncq(ncq).into_bits());
        self.engine.wce = from.volatile_write_cache;
        // A limit belongs to the migration that set it at the source; the guest runs free here.
        self.limit.set(Time::default(), 0);
    }
}

fn request(qid: u16, entries_minus_1: u16, prp1: u64, contiguous: bool) -> QueueRequest {
    QueueRequest { qid, entries_minus_1, prp1, contiguous }
}

fn place_sq(sq: &mut Sq, head: u16, tail: u16) -> Result<(), Status> {
    let (head, tail) = (u32::from(head), u32::from(tail));
    if head >= sq.size || tail >= sq.size {
        return Err(invalid());
    }
    sq.set_position(head, tail);
    Ok(())
}

fn place_cq(cq: &mut Cq, head: u16, tail: u16, phase: bool) -> Result<(), Status> {
    let (head, tail) = (u32::from(head), u32::from(tail));
    if head >= cq.size || tail >= cq.size {
        return Err(invalid());
    }
    cq.set_position(head, tail, phase || planted::on(Fault::StateWithoutS0pt));
    Ok(())
}

fn sq_snapshot(sq: &Sq) -> SqSnapshot {
    SqSnapshot {
        prp1: sq.memory.iova,
        entries_minus_1: (sq.size - 1) as u16,
        qid: sq.qid,
        cqid: sq.cqid,
        pc: true,
        qprio: sq.qprio,
        head: sq.head as u16,
        tail: sq.tail as u16,
    }
}

fn cq_snapshot(cq: &Cq) -> CqSnapshot {
    CqSnapshot {
        prp1: cq.memory.iova,
        entries_minus_1: (cq.size - 1) as u16,
        qid: cq.qid,
        head: cq.head as u16,
        tail: cq.tail as u16,
        pc: true,
        ien: cq.ien,
        iv: cq.vector,
        phase: cq.phase,
    }
}
