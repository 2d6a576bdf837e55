//! One controller: port, registers, reset and shutdown, the fetch gate, suspend and resume.
//!
//! Everything that can stop a controller from fetching is looked at before every batch: disabled, shut down, suspended, fenced,
//! its port taken away, its limit used up. A fenced controller that is enabled is not ready before the fence is down. A suspended controller
//! that has no state yet, or one that was restored and not resumed, does not look at its registers at all: the guest's CC.EN
//! belongs to the controller it comes from.

use crate::admin::{AdminState, Event};
use crate::config::{ConfigError, ControllerConfig, ControllerRole, SubsystemConfig};
use crate::context::{Outcome, Work};
use crate::deviations::{Deviation, Oddities};
use crate::engine::Engine;
use crate::features::Features;
use crate::limit::Limit;
use crate::lost::Lost;
use crate::queue::{CQE_BYTES, Cq, Ready, Sq};
use crate::shadow::Shadow;
use crate::subsystem::Shared;
use crate::udmq::Udmq;
use dray_device::bar::Control;
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_device::slot::{Connector, Fence, Port};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::event::{EventType, error_info};
use dray_nvme::log::LogId;
use dray_nvme::registers::{Cap, Cc, Vs, offset};
use dray_nvme::status::Status;

/// The version that the controllers claim (VS): 1.4 keeps older drivers content; live migration is told by its own bits.
pub(crate) const VERSION: Vs = Vs::V1_4;
/// Commands that one poll of a controller fetches.
pub(crate) const BUDGET: u32 = 32;

/// Whether a controller fetches (live migration, Base 2.3 §8.1.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    Active,
    /// Suspend was asked for; what was fetched is being finished.
    Suspending,
    Suspended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shutdown {
    None,
    /// Flushing namespaces from `next` on; `waiting` flushes are under way.
    Flushing { next: u16, waiting: u32 },
    Complete,
}

/// One controller.
pub(crate) struct Controller {
    pub(crate) config: ControllerConfig,
    pub(crate) cap: Cap,
    pub(crate) connector: Connector,
    pub(crate) port: Option<Port>,
    pub(crate) engine: Engine,
    /// By QID; 0 is the admin queue.
    pub(crate) sqs: Vec<Option<Sq>>,
    pub(crate) cqs: Vec<Option<Cq>>,
    /// QIDs of the I/O submission queues there are.
    pub(crate) live: Vec<u16>,
    next_live: usize,
    pub(crate) ready: Vec<Ready>,
    /// Completion queues that have new entries.
    pub(crate) signal: Vec<u16>,
    pub(crate) enabled: bool,
    /// Was reset while backings had operations of it under way: until they have ended, CSTS.RDY stays and nothing is enabled. A
    /// host that finds RDY cleared may use its memory again, and an old write must not come after a new one (Base 2.3 §3.7.2).
    pub(crate) ending: bool,
    /// CSTS.CFS.
    pub(crate) fatal: bool,
    pub(crate) shutdown: Shutdown,
    pub(crate) cc_seen: u32,
    pub(crate) resets_seen: u32,
    pub(crate) run: Run,
    /// State was committed and not resumed yet.
    pub(crate) restored: bool,
    /// The slot was pointed elsewhere while the controller was suspended. What it has is of before: it looks at nothing until
    /// Resume (the move was undone) or Set Controller State (the function comes back from elsewhere).
    pub(crate) parted: bool,
    /// The slot's doorbells are trapped.
    pub(crate) traps: bool,
    /// The guest's shadow doorbells, if it has configured them.
    pub(crate) shadow: Option<Shadow>,
    pub(crate) admin: AdminState,
    pub(crate) features: Features,
    pub(crate) limit: Limit,
    /// A migration command that the subsystem must carry out.
    pub(crate) management: Option<SubmissionEntry>,
    /// The controller was reset since the subsystem last looked.
    pub(crate) was_reset: bool,
    pub(crate) coalescing: bool,
    /// It takes Namespace Attachment.
    pub(crate) attaches: bool,
    /// The address space changed under queues that have not been looked up again.
    remapped: bool,
    pub(crate) lost: Lost,
    released: u64,
    pub(crate) oddities: Oddities,
    pub(crate) now: Time,
}

impl Controller {
    pub(crate) fn new(
        index: u16,
        config: ControllerConfig,
        subsystem: &SubsystemConfig,
        active: Vec<u16>,
    ) -> Result<Self, ConfigError> {
        let queues = usize::from(config.io_queues) + 1;
        let cap = Cap::new()
            .with_mqes(subsystem.max_queue_entries - 1)
            .with_cqr(true)
            .with_to(10)
            .with_css(Cap::CSS_NVM);
        Ok(Self {
            cap,
            connector: Connector::new(),
            port: None,
            engine: Engine::new(index, subsystem, active)?,
            sqs: (0..queues).map(|_| None).collect(),
            cqs: (0..queues).map(|_| None).collect(),
            live: Vec::with_capacity(queues),
            next_live: 0,
            ready: Vec::with_capacity(usize::from(subsystem.contexts) + BUDGET as usize + 32),
            signal: Vec::with_capacity(queues),
            enabled: false,
            ending: false,
            fatal: false,
            shutdown: Shutdown::None,
            cc_seen: 0,
            resets_seen: 0,
            run: Run::Active,
            restored: false,
            parted: false,
            traps: false,
            shadow: None,
            admin: AdminState::new(),
            features: Features::new(config.vectors),
            limit: Limit::none(),
            management: None,
            attaches: subsystem.attachment && config.role == ControllerRole::Management,
            was_reset: false,
            coalescing: false,
            remapped: false,
            lost: Lost::default(),
            released: 0,
            oddities: Oddities::default(),
            now: Time::default(),
            config,
        })
    }

    pub(crate) fn is_manager(&self) -> bool {
        self.config.role == ControllerRole::Management
    }

    pub(crate) fn fence(&self) -> &Fence {
        &self.config.fence
    }

    /// Does a bounded amount of work; returns how much it was.
    #[inline]
    pub(crate) fn poll(&mut self, now: Time, shared: &mut Shared) -> u32 {
        self.now = now;
        self.engine.moved = 0;
        self.take_port(shared);
        let Some(port) = self.port.take() else { return self.poll_alone(shared) };
        let work = self.poll_port(&port, shared);
        self.port = Some(port);
        work
    }

    /// Without a port only what was under way goes on.
    fn poll_alone(&mut self, shared: &mut Shared) -> u32 {
        // The slot that it had may be another's by now, whose guest unmaps memory.
        self.remapped |= self.engine.reader.refresh();
        self.release_unmapped();
        self.engine.run_jobs(shared, |_, _, _| {});
        self.ready.clear();
        self.wait_no_more();
        self.settle(None, shared);
        0
    }

    /// Lets unmaps complete that no operation under way is older than.
    #[inline]
    fn release_unmapped(&mut self) {
        let generation = self.engine.reader.generation();
        if self.released != generation {
            self.released = self.engine.contexts.oldest_generation(generation);
            self.engine.reader.release(self.released);
        }
    }

    fn poll_port(&mut self, port: &Port, shared: &mut Shared) -> u32 {
        let remapped = self.engine.reader.refresh() | std::mem::take(&mut self.remapped);
        self.release_unmapped();
        if self.ending && self.engine.is_quiet() {
            self.ending = false;
            self.publish_status(port);
        }
        // Registers first: a guest may disable its controller and unmap its queues between two polls.
        self.registers(port, shared);
        if remapped && self.run != Run::Suspended {
            self.renew_queues(port);
        }
        if self.lacks_queues() {
            self.wait_for_queues(port);
        }
        let ready = &mut self.ready;
        self.engine.run_jobs(shared, |sqid, cid, status| ready.push(Ready { sqid, cid, status, result: 0 }));
        let mut work = 0;
        if self.enabled && self.may_fetch(port) {
            work += self.fetch_admin(port, shared);
            if !self.live.is_empty() {
                work += self.fetch_io(port, shared);
            }
        }
        self.admin_progress(port);
        work += self.finish_batch(port, shared);
        if self.coalescing {
            self.coalesced(port);
        }
        if port.uses_pin() {
            self.drive_pin(port);
        }
        self.settle(Some(port), shared);
        if matches!(self.shutdown, Shutdown::Flushing { .. }) && self.run == Run::Active {
            self.go_on_shutting_down(port, shared);
        }
        if self.shadow.is_some() {
            work += self.tend_shadow(port, work);
        }
        work
    }

    /// Takes a change of the slot's pointing into account.
    pub(crate) fn take_port(&mut self, shared: &mut Shared) {
        let Some(change) = self.connector.poll() else { return };
        if self.run == Run::Active {
            // The function is in another slot, or in none: nothing of the old one goes on.
            self.reset(shared);
        } else if self.enabled {
            self.parted = true;
        }
        self.port = change;
        let Some(port) = &self.port else { return };
        self.engine.reader = port.space().reader();
        self.released = 0;
        self.traps = port.traps_doorbells();
        if self.run == Run::Active {
            (self.resets_seen, self.cc_seen) = (port.bar().resets(), 0);
            let port = port.clone();
            if port.was_running() {
                // Queues that another controller had cannot begin anew: the guest has to reset.
                self.fail_enabled(&port);
            }
            Self::publish_constants(port.bar(), self.cap);
            self.publish_status(&port);
        }
    }

    /// Fails, if the guest has CC.EN set, until it clears that; if it has not, there is nothing that could not go on.
    fn fail_enabled(&mut self, port: &Port) {
        self.cc_seen = port.bar().load32(offset::CC);
        self.fatal = Cc::from_bits(self.cc_seen).en();
        self.lost.failed = self.fatal;
    }

    /// It is suspended, and what it has is not what the function in its slot had last: it may only go on by Resume.
    pub(crate) fn waits_for_resume(&self) -> bool {
        let enabled = |port: &Port| Cc::from_bits(port.bar().load32(offset::CC)).en();
        let is_new = !self.enabled && self.port.as_ref().is_some_and(enabled);
        self.run != Run::Active && (self.restored || self.parted || is_new)
    }

    /// A controller that waited for Resume and whose manager was reset cannot go on: it waits, failed, for the guest's reset.
    pub(crate) fn fail_restored(&mut self, shared: &mut Shared) {
        self.reset(shared);
        if let Some(port) = self.port.clone() {
            self.resets_seen = port.bar().resets();
            self.fail_enabled(&port);
            Self::publish_constants(port.bar(), self.cap);
            self.publish_status(&port);
        }
    }

    /// A controller reset (Base 2.3 §3.7.2). What backings are doing goes on until it ends, and is logged; suspension ends.
    pub(crate) fn reset(&mut self, shared: &mut Shared) {
        self.engine.flush_log(shared);
        self.engine.contexts.abandon();
        self.drop_queues();
        self.admin = AdminState::new();
        self.features = Features::new(self.config.vectors);
        self.engine.wce = true;
        self.management = None;
        self.enabled = false;
        self.ending = !self.engine.is_quiet() && !planted::on(Fault::ResetKeepsOldWrites);
        self.fatal = false;
        self.shutdown = Shutdown::None;
        (self.restored, self.parted) = (false, false);
        self.oddities.reset();
        self.engine.counters.resets += 1;
        self.was_reset = true;
        self.end_suspension(shared);
    }

    /// No queue exists any more.
    pub(crate) fn drop_queues(&mut self) {
        self.sqs.iter_mut().for_each(|sq| *sq = None);
        self.cqs.iter_mut().for_each(|cq| *cq = None);
        self.shadow = None;
        self.live.clear();
        self.ready.clear();
        self.coalescing = false;
        self.nothing_lost();
    }

    /// The controller may fetch again as far as suspension goes; logging goes on.
    pub(crate) fn end_suspension(&mut self, shared: &mut Shared) {
        if self.run == Run::Active {
            return;
        }
        self.run = Run::Active;
        if let Some(log) = &mut self.engine.log {
            let posted = log.resumed();
            let id = log.id;
            shared.cdq_posted(id, &posted);
        }
    }

    /// The fetch gate.
    #[inline]
    pub(crate) fn may_fetch(&self, port: &Port) -> bool {
        self.run == Run::Active
            && self.shutdown == Shutdown::None
            && !self.fence().is_up()
            && !self.lacks_queues()
            && port.is_current()
    }

    fn fetch_admin(&mut self, port: &Port, shared: &mut Shared) -> u32 {
        let mut fetched = 0;
        while fetched < BUDGET && self.management.is_none() {
            let Some((sq, cq)) = self.sqs[0].as_mut().zip(self.cqs[0].as_mut()) else { break };
            let looked = sq.look(port.bar());
            if self.oddities.skips_admin(sq.tail) {
                break;
            }
            // What the guest mapped before it rang must be seen: its map came before the doorbell.
            self.remapped |= self.engine.reader.refresh();
            let reserved = looked.and_then(|()| if sq.is_empty() { Ok(false) } else { cq.reserve(port.bar()) });
            match reserved {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => {
                    self.bad_doorbell();
                    break;
                }
            }
            let entry = sq.entry();
            sq.in_flight += 1;
            sq.advance();
            fetched += 1;
            self.engine.counters.fetched += 1;
            let outcome = self.execute_admin(&entry, port, shared);
            let Some((sq, cq)) = self.sqs[0].as_mut().zip(self.cqs[0].as_mut()) else { break };
            match outcome {
                Outcome::Done(status, result) => {
                    self.ready.push(Ready { sqid: 0, cid: entry.cdw0.cid(), status, result });
                }
                Outcome::Pending => {}
                // An event request that waits: its completion takes a slot when the event comes.
                Outcome::Busy => {
                    sq.in_flight -= 1;
                    cq.release();
                }
            }
        }
        fetched
    }

    #[inline]
    fn fetch_io(&mut self, port: &Port, shared: &mut Shared) -> u32 {
        let mut left = self.limit.allow(self.now, BUDGET);
        let burst = self.features.burst();
        let (queues, mut fetched) = (self.live.len(), 0);
        for _ in 0..queues {
            if left == 0 {
                break;
            }
            self.next_live = if self.next_live + 1 >= queues { 0 } else { self.next_live + 1 };
            let qid = self.live[self.next_live];
            let count = self.fetch_queue(qid, left.min(burst), port, shared);
            left -= count;
            fetched += count;
        }
        self.limit.used(fetched);
        self.engine.counters.fetched += u64::from(fetched);
        fetched
    }

    #[inline]
    fn fetch_queue(&mut self, qid: u16, budget: u32, port: &Port, shared: &mut Shared) -> u32 {
        let Some(sq) = self.sqs[usize::from(qid)].as_mut() else { return 0 };
        let Some(cq) = self.cqs[usize::from(sq.cqid)].as_mut() else { return 0 };
        let mut fetched = 0;
        let mut bad = sq.look(port.bar()).is_err();
        if !sq.is_empty() {
            // What the guest mapped before it rang must be seen: its map came before the doorbell.
            self.remapped |= self.engine.reader.refresh();
        }
        while !bad && fetched < budget && !sq.is_empty() && !sq.deleting {
            if self.engine.moved >= crate::job::CHUNK_BYTES || self.engine.contexts.next().is_none() {
                break;
            }
            match cq.reserve(port.bar()) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => {
                    bad = true;
                    break;
                }
            }
            let entry = sq.entry();
            if let Some(slba) = sq.next_read() {
                self.engine.prefetch(entry.nsid, slba, shared);
            }
            match self.engine.execute(&entry, qid, shared) {
                Outcome::Busy => {
                    cq.release();
                    break;
                }
                Outcome::Pending => {}
                Outcome::Done(status, result) => {
                    self.ready.push(Ready { sqid: qid, cid: entry.cdw0.cid(), status, result });
                }
            }
            sq.in_flight += 1;
            sq.advance();
            fetched += 1;
        }
        if bad {
            self.bad_doorbell();
        }
        fetched
    }

    pub(crate) fn bad_doorbell(&mut self) {
        self.engine.counters.bad_doorbells += 1;
        let info = error_info::INVALID_DOORBELL_VALUE;
        self.admin.report(Event::new(EventType::ERROR, info, LogId::ERROR));
    }

    /// An operation on a backing has ended.
    pub(crate) fn ended(&mut self, index: u16, status: Status, shared: &mut Shared) {
        let Some(context) = self.engine.contexts.get(index) else { return };
        let (sqid, cid, abandoned, work) = (context.sqid, context.cid, context.abandoned, context.work);
        let (namespace, slba, blocks) = (context.namespace, context.slba, context.blocks);
        let finished = match work {
            Work::Job(job) => self.engine.step_ended(job, shared, status),
            Work::Read => {
                if let Some(tracker) = &mut self.engine.tracker {
                    context.ranges.iter().for_each(|&(iova, bytes)| tracker.written(iova, bytes as usize));
                }
                Some(status)
            }
            Work::Change => {
                let told = !(abandoned && planted::on(Fault::AbortedNotLogged));
                self.engine.changed_and(shared, namespace, (slba, blocks), false, status, told);
                Some(status)
            }
            Work::Flush => Some(status),
            Work::Shutdown => {
                if let (Shutdown::Flushing { waiting, .. }, false) = (&mut self.shutdown, abandoned) {
                    *waiting = waiting.saturating_sub(1);
                }
                None
            }
        };
        if !matches!(work, Work::Job(_)) {
            self.engine.contexts.free(index);
        }
        if let (Some(status), false) = (finished, abandoned) {
            self.ready.push(Ready { sqid, cid, status, result: 0 });
        }
    }

    /// Posts what is ready: first the log, so that no completion is seen before its change is reported.
    #[inline]
    fn finish_batch(&mut self, port: &Port, shared: &mut Shared) -> u32 {
        if self.ready.is_empty() || !planted::on(Fault::CompletionBeforeEntry) {
            self.engine.flush_log(shared);
        }
        let count = self.ready.len() as u32;
        if count == 0 || self.lacks_queues() {
            return 0;
        }
        let place = self.engine.log.as_ref().map(Udmq::place);
        if self.oddities.holds(&self.engine.deviating, place, self.ready.len()) {
            return 1;
        }
        let ready = std::mem::take(&mut self.ready);
        for ready in &ready {
            let Some(sq) = self.sqs.get_mut(usize::from(ready.sqid)).and_then(Option::as_mut) else { continue };
            sq.in_flight = sq.in_flight.saturating_sub(1);
            let (head, cqid) = (sq.head, sq.cqid);
            let Some(cq) = self.cqs.get_mut(usize::from(cqid)).and_then(Option::as_mut) else { continue };
            let iova = cq.post(ready, head);
            if !cq.listed {
                cq.listed = true;
                self.signal.push(cqid);
            }
            self.engine.wrote(iova, CQE_BYTES);
            if ready.status.is_error() {
                self.engine.counters.errors += 1;
                self.engine.counters.media_errors += u64::from(ready.status.sct().0 == 2);
                self.admin.record_error(ready);
            }
        }
        self.engine.counters.completed += u64::from(count);
        self.ready = ready;
        self.ready.clear();
        self.raise_interrupts(port);
        count
    }

    /// The next moment at which something happens by itself.
    pub(crate) fn next_deadline(&self) -> Time {
        let coalescing = if self.coalescing {
            self.cqs.iter().flatten().map(|cq| cq.deadline).min().unwrap_or(Time::NEVER)
        } else {
            Time::NEVER
        };
        coalescing.min(self.limit.next(self.now)).min(self.lost_deadline())
    }

    /// Suspend (STYPE 1): fetches nothing more from now on.
    pub(crate) fn suspend(&mut self) {
        if self.run == Run::Active {
            self.run = Run::Suspending;
        }
    }

    /// Completes a suspend when nothing is under way: not in the queues, and not in the backings either.
    fn settle(&mut self, port: Option<&Port>, shared: &mut Shared) {
        let quiet = self.engine.is_quiet() && self.ready.is_empty() && self.admin.deletes.is_empty();
        if self.run != Run::Suspending || !quiet {
            return;
        }
        self.engine.flush_log(shared);
        if let Some(log) = &mut self.engine.log {
            let posted = log.suspended();
            let id = log.id;
            shared.cdq_posted(id, &posted);
        }
        if let Some(port) = port {
            // The state shall say what the doorbells said last; a bad value stays for the next look after Resume.
            for sq in self.sqs.iter_mut().flatten() {
                let _refused = sq.look(port.bar());
            }
            for cq in self.cqs.iter_mut().flatten() {
                let _refused = cq.look(port.bar());
                if cq.deadline != Time::NEVER {
                    Self::interrupt(cq, port, &mut self.engine.counters.interrupts);
                }
            }
            self.coalescing = false;
        }
        self.run = Run::Suspended;
    }

    /// A device that deviates does not look at the admin queue after Resume, whatever the doorbell has said by then.
    #[inline]
    fn resume_oddly(&mut self) {
        if !self.engine.deviating.is(Deviation::ResumeSkipsAdmin) {
            return;
        }
        if let Some((sq, port)) = self.sqs[0].as_mut().zip(self.port.as_ref()) {
            let _refused = sq.look(port.bar());
            self.oddities.resumed(&self.engine.deviating, sq.head, sq.tail);
        }
    }

    /// The guest has reset the controller since its registers were last looked at.
    fn was_reset(&self, port: &Port) -> bool {
        let seen = Control { resets: self.resets_seen, cc: self.cc_seen };
        let now = port.bar().control_if_changed(seen);
        now.is_some_and(|now| now.resets != self.resets_seen || !Cc::from_bits(now.cc).en())
    }

    /// Resume: the queues' memory must be there, unless the guest has reset the controller meanwhile and is done with them. A restored controller publishes its registers, takes the doorbells as they
    /// stand, and wakes the guest where completions wait.
    pub(crate) fn resume(&mut self, shared: &mut Shared) -> Result<(), Status> {
        self.take_port(shared);
        self.engine.reader.refresh();
        let reset = self.port.as_ref().is_some_and(|port| self.was_reset(port));
        if self.enabled && self.port.is_some() && !reset && !self.find_queues() {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        if self.restored && self.port.is_none() {
            return Err(Status::COMMAND_SEQUENCE.with_dnr());
        }
        (self.restored, self.parted) = (false, false);
        self.resume_oddly();
        self.end_suspension(shared);
        let port = self.port.take();
        if let Some(port) = &port {
            if !self.enabled {
                (self.resets_seen, self.cc_seen) = (port.bar().resets(), 0);
            }
            Self::publish_constants(port.bar(), self.cap);
            // A reset since the state was taken is done before anything is shown: a guest that waits for the new CSTS.RDY must
            // not see the old one.
            self.registers(port, shared);
            self.publish_status(port);
            for cq in self.cqs.iter_mut().flatten() {
                let _refused = cq.look(port.bar());
                if cq.ien && cq.has_entries() {
                    Self::interrupt(cq, port, &mut self.engine.counters.interrupts);
                }
            }
        }
        self.port = port;
        Ok(())
    }
}
