//! Controller data queues whose owners were dropped: deleted here, their memory kept until the controller has let go of it.

use crate::admin::AdminData;
use crate::driver::Driver;
use crate::link::OrphanStage;
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;

impl Driver {
    /// Takes deletions a step further.
    pub(crate) fn poll_orphans(&mut self, now: Time) -> u32 {
        if self.orphans.is_empty() {
            return 0;
        }
        let mut orphans = std::mem::take(&mut self.orphans);
        let before = orphans.len();
        orphans.retain_mut(|orphan| {
            orphan.generation == self.generation
                && match self.orphan_step(now, orphan.stage) {
                    Some(stage) => {
                        orphan.stage = stage;
                        true
                    }
                    None => false,
                }
        });
        let gone = before - orphans.len();
        orphans.append(&mut self.orphans);
        self.orphans = orphans;
        gone as u32
    }

    /// The next stage; `None` when the queue is gone.
    fn orphan_step(&mut self, now: Time, stage: OrphanStage) -> Option<OrphanStage> {
        match stage {
            OrphanStage::Creating(ticket) => match self.answer(ticket) {
                None => Some(stage),
                Some(answer) if answer.completion.status.is_error() || answer.completion.unknown => None,
                Some(answer) => Some(OrphanStage::Delete(answer.completion.result as u16)),
            },
            OrphanStage::Delete(id) => {
                let sent = self.request(now, &SubmissionEntry::delete_cdq(id), AdminData::None);
                Some(sent.map_or(stage, OrphanStage::Deleting))
            }
            // Refused or not: there is no more to be done, and a queue that was refused is not there.
            OrphanStage::Deleting(ticket) => self.answer(ticket).is_none().then_some(stage),
        }
    }
}
