//! Queues whose memory is unmapped under an enabled controller.
//!
//! A hypervisor whose memory layout changes takes memory away and maps it again at the same addresses a moment later, and the
//! guest knows nothing of it. So the controller waits for a while, and uses nothing of its queues meanwhile: unmaps are not held
//! up, commands and completions stay where they are. Memory that does not come back, or whose owner has changed, is the end:
//! the controller has failed, and says so until CC.EN is cleared.

use crate::controller::{Controller, Run};
use dray_device::bar::Bar;
use dray_device::poll::Time;
use dray_device::slot::Port;
use dray_nvme::registers::offset;

/// Milliseconds in which the memory must be there again. Hypervisors need some for each mapping when the machine is busy;
/// drivers wait for tens of seconds before they give a command up.
pub(crate) const PATIENCE_MS: u64 = 5_000;

/// How far a controller has its queues' memory.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    /// Something of the queues is not mapped: until when it is waited for.
    until: Option<Time>,
    /// The controller has failed while it was enabled. CSTS.RDY stays: a guest that clears CC.EN and finds RDY cleared already
    /// sets it again before anyone has looked.
    pub(crate) failed: bool,
    /// The AQA, ASQ and ACQ that it could not be enabled with.
    refused: Option<AdminQueues>,
    /// Whose memory the queues are in.
    owner: u64,
}

/// AQA, ASQ and ACQ as the guest has them.
type AdminQueues = (u32, u64, u64);

fn admin_queues(bar: &Bar) -> AdminQueues {
    (bar.load32(offset::AQA), bar.load64(offset::ASQ), bar.load64(offset::ACQ))
}

impl Controller {
    /// Nothing of the queues may be used.
    #[inline]
    pub(crate) fn lacks_queues(&self) -> bool {
        self.lost.until.is_some()
    }

    /// When the controller fails if the memory is not there again.
    pub(crate) fn lost_deadline(&self) -> Time {
        self.lost.until.unwrap_or(Time::NEVER)
    }

    /// Without a slot there is no memory to come back: Resume looks the queues up.
    pub(crate) fn wait_no_more(&mut self) {
        self.lost.until = None;
    }

    /// Queues are found or given up: nothing is waited for.
    pub(crate) fn nothing_lost(&mut self) {
        self.lost = Lost { owner: self.engine.reader.owner(), ..Lost::default() };
    }

    /// It cannot be enabled with the admin queues that the registers name. It does not say ready, so a guest that has the registers
    /// mapped may clear CC.EN and set it again before anyone has looked.
    pub(crate) fn refuse_queues(&mut self, bar: &Bar) {
        self.fatal = true;
        self.lost.refused = Some(admin_queues(bar));
    }

    /// Whether the guest has meanwhile named other admin queues than those refused: it may only while CC.EN is cleared
    /// (Base 2.3 §3.1.4.8 to §3.1.4.10).
    pub(crate) fn names_other_queues(&self, bar: &Bar) -> bool {
        self.lost.refused.is_some_and(|refused| refused != admin_queues(bar))
    }

    /// The address space has changed.
    pub(crate) fn renew_queues(&mut self, port: &Port) {
        if !self.enabled {
            return;
        }
        if self.engine.reader.owner() != self.lost.owner {
            self.fail_queues(port);
        } else if !self.find_queues() && self.lost.until.is_none() {
            self.lost.until = Some(self.now.after_ms(PATIENCE_MS));
        }
    }

    /// Gives up what has been waited for too long. Suspend waits for nothing: what cannot be completed would never let it end.
    pub(crate) fn wait_for_queues(&mut self, port: &Port) {
        let over = self.run == Run::Active && self.now > self.lost_deadline();
        if self.run == Run::Suspending || over {
            self.fail_queues(port);
        }
    }

    fn fail_queues(&mut self, port: &Port) {
        tracing::warn!(cntlid = self.config.cntlid, "a queue's memory was unmapped under an enabled controller");
        self.drop_queues();
        self.engine.contexts.abandon();
        (self.enabled, self.fatal, self.lost.failed) = (false, true, true);
        self.publish_status(port);
    }

    /// Looks the memory of every queue up again.
    pub(crate) fn find_queues(&mut self) -> bool {
        if !self.renew_shadow() {
            return false;
        }
        let reader = &self.engine.reader;
        let found = self.sqs.iter_mut().flatten().all(|sq| sq.memory.renew(reader, false))
            && self.cqs.iter_mut().flatten().all(|cq| cq.memory.renew(reader, true));
        if found {
            self.nothing_lost();
        }
        found
    }
}
