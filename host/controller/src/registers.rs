//! Registers: what a controller publishes, CC.EN, reset detection, shutdown (Base 2.3 §3.1.4, §3.5–3.7).

use crate::context::{Outcome, Work};
use crate::controller::{Controller, Run, Shutdown, VERSION};
use crate::engine::Operation;
use crate::queue::{CQE_BYTES, Cq, QueueMemory, SQE_BYTES, Sq};
use crate::subsystem::Shared;
use dray_device::backing::BackingOp;
use dray_device::bar::{Bar, Control};
use dray_device::slot::Port;
use dray_nvme::registers::{
    Aqa, CQES, Cap, Cc, CommandSetSelected, Csts, SQES, ShutdownNotification, ShutdownStatus, cq_head_doorbell, offset,
    sq_tail_doorbell,
};
use dray_nvme::status::Status;

impl Controller {
    pub(crate) fn publish_constants(bar: &Bar, cap: Cap) {
        bar.store64(offset::CAP, cap.into_bits());
        bar.store32(offset::VS, VERSION.into_bits());
    }

    pub(crate) fn publish_status(&self, port: &Port) {
        port.bar().store32(offset::CSTS, self.csts());
    }

    /// CSTS as the guest sees it.
    pub(crate) fn csts(&self) -> u32 {
        let shst = match self.shutdown {
            Shutdown::None => ShutdownStatus::NORMAL,
            Shutdown::Flushing { .. } => ShutdownStatus::IN_PROGRESS,
            Shutdown::Complete => ShutdownStatus::COMPLETE,
        };
        Csts::new().with_rdy(self.enabled || self.ending || self.lost.failed).with_cfs(self.fatal).with_shst(shst).into_bits()
    }

    /// Takes failure and shutdown over from the CSTS of a restored state; a shutdown that was under way begins again.
    pub(crate) fn set_csts(&mut self, csts: u32) {
        let csts = Csts::from_bits(csts);
        self.fatal = csts.cfs();
        self.shutdown = match csts.shst() {
            ShutdownStatus::NORMAL => Shutdown::None,
            ShutdownStatus::IN_PROGRESS => Shutdown::Flushing { next: 0, waiting: 0 },
            _ => Shutdown::Complete,
        };
    }

    #[inline]
    pub(crate) fn registers(&mut self, port: &Port, shared: &mut Shared) {
        if self.run != Run::Active && (!self.enabled || self.restored || self.parted) {
            return;
        }
        let seen = Control { resets: self.resets_seen, cc: self.cc_seen };
        // Before CC: whoever names other queues has cleared CC.EN by then.
        let other_queues = self.fatal && self.names_other_queues(port.bar());
        let now = if other_queues { Some(port.bar().control_at_rest()) } else { port.bar().control_if_changed(seen) };
        let Some(Control { resets, cc }) = now else { return };
        let cc = Cc::from_bits(cc);
        if other_queues || resets != self.resets_seen || (self.enabled || self.fatal) && !cc.en() {
            self.resets_seen = resets;
            self.reset(shared);
            self.cc_seen = 0;
            port.bar().unmask_interrupts();
            self.publish_status(port);
        }
        if self.run == Run::Active {
            self.configure(port, cc);
        }
    }

    pub(crate) fn configure(&mut self, port: &Port, cc: Cc) {
        // Behind the fence it stays not ready, CC.EN or not, and looks again: the fence falls if the move is undone.
        let held = cc.en() && !self.enabled && !self.fatal && self.fence().is_up();
        if self.ending || held {
            return;
        }
        let before = Cc::from_bits(self.cc_seen);
        self.cc_seen = cc.into_bits();
        if cc.en() && !self.enabled && !self.fatal {
            self.shutdown = Shutdown::None;
            match self.enable(port, cc) {
                Ok(()) => self.enabled = true,
                Err(reason) => {
                    tracing::warn!(cntlid = self.config.cntlid, reason, "a controller cannot be enabled");
                    self.refuse_queues(port.bar());
                }
            }
            self.publish_status(port);
        }
        if cc.shn() != before.shn() {
            self.shutdown = match cc.shn() {
                ShutdownNotification::NONE => Shutdown::None,
                ShutdownNotification::NORMAL => Shutdown::Flushing { next: 0, waiting: 0 },
                _ => Shutdown::Complete,
            };
            self.publish_status(port);
        }
    }

    /// CC.EN 0 → 1 (Base 2.3 §3.5).
    pub(crate) fn enable(&mut self, port: &Port, cc: Cc) -> Result<(), &'static str> {
        let bar = port.bar();
        let aqa = Aqa::from_bits(bar.load32(offset::AQA));
        let (asq, acq) = (bar.load64(offset::ASQ), bar.load64(offset::ACQ));
        if cc.css() != CommandSetSelected::NVM || cc.mps() != 0 || cc.ams() != 0 {
            return Err("CC asks for a command set, page size or arbitration that CAP does not offer");
        }
        let sized = |given: u8, right: u8| given == 0 || given == right;
        if !sized(cc.iosqes(), SQES) || !sized(cc.iocqes(), CQES) {
            return Err("CC.IOSQES or CC.IOCQES is wrong");
        }
        if aqa.asqs() == 0 || aqa.acqs() == 0 {
            return Err("AQA has a queue of one entry");
        }
        self.traps = port.traps_doorbells();
        self.engine.reader.refresh();
        for qid in 0..=self.config.io_queues {
            bar.store32(sq_tail_doorbell(qid, 0), 0);
            bar.store32(cq_head_doorbell(qid, 0), 0);
        }
        let queues = self.new_admin_queues(aqa, asq, acq);
        let (sq, cq) = queues.map_err(|_| "ASQ or ACQ is not aligned, or not in the guest's memory")?;
        (self.sqs[0], self.cqs[0]) = (Some(sq), Some(cq));
        self.nothing_lost();
        Ok(())
    }

    /// The admin queues of AQA, ASQ and ACQ, empty.
    pub(crate) fn new_admin_queues(&self, aqa: Aqa, asq: u64, acq: u64) -> Result<(Sq, Cq), Status> {
        if !asq.is_multiple_of(4096) || !acq.is_multiple_of(4096) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let (entries, slots) = (u32::from(aqa.asqs()) + 1, u32::from(aqa.acqs()) + 1);
        let reader = &self.engine.reader;
        let sq = QueueMemory::find(reader, asq, entries as usize * SQE_BYTES, false)?;
        let cq = QueueMemory::find(reader, acq, slots as usize * CQE_BYTES, true)?;
        let mut cq = Cq::new(cq, 0, slots, Some(0));
        cq.users = 1;
        Ok((Sq::new(sq, 0, 0, entries, 0), cq))
    }

    pub(crate) fn go_on_shutting_down(&mut self, port: &Port, shared: &mut Shared) {
        let Shutdown::Flushing { mut next, mut waiting } = self.shutdown else { return };
        while usize::from(next) < shared.namespaces.len() {
            let operation = Operation {
                op: BackingOp::Flush,
                work: Work::Shutdown,
                namespace: next,
                slba: 0,
                blocks: 0,
                sqid: 0,
                cid: 0,
            };
            let ours = self.engine.active.contains(&next);
            match if ours { self.engine.submit_plain(shared, &operation) } else { Outcome::Done(Status::SUCCESS, 0) } {
                Outcome::Busy => break,
                Outcome::Pending => waiting += 1,
                Outcome::Done(..) => {}
            }
            next += 1;
        }
        let done = usize::from(next) >= shared.namespaces.len() && waiting == 0 && self.engine.is_quiet();
        self.shutdown = if done { Shutdown::Complete } else { Shutdown::Flushing { next, waiting } };
        self.publish_status(port);
    }
}
