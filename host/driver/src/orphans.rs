//! Controller data queues whose owners were dropped: deleted here, their memory kept until the controller has let go of it.

use crate::admin::AdminData;
use crate::driver::Driver;
use crate::link::OrphanStage;
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;

/// Deletions that are tried before the memory is kept until a reset.
const TRIES: u8 = 4;

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
                Some(answer) if answer.completion.unknown => Some(OrphanStage::Kept),
                Some(answer) if answer.completion.status.is_error() => None,
                Some(answer) => Some(OrphanStage::Delete(answer.completion.result as u16, 0)),
            },
            OrphanStage::Telling(ticket, id) => match self.answer(ticket) {
                None => Some(stage),
                Some(_) => Some(OrphanStage::Delete(id, 0)),
            },
            OrphanStage::Delete(id, refused) => {
                let sent = self.request(now, &SubmissionEntry::delete_cdq(id), AdminData::None);
                Some(sent.map_or(stage, |ticket| OrphanStage::Deleting(ticket, id, refused)))
            }
            OrphanStage::Deleting(ticket, id, refused) => match self.answer(ticket).map(|answer| answer.completion) {
                None => Some(stage),
                Some(answer) if answer.unknown => Some(OrphanStage::Kept),
                // A queue that the controller does not know is not there either.
                Some(answer) if !answer.status.is_error() || answer.status.is(Status::INVALID_CDQ) => None,
                Some(_) if refused + 1 < TRIES => Some(OrphanStage::Delete(id, refused + 1)),
                Some(_) => Some(OrphanStage::Kept),
            },
            OrphanStage::Kept => Some(stage),
        }
    }
}
