//! Create and delete I/O queues (Base 2.3 §5.3.1–5.3.4).

use super::AdminResult;
use crate::context::Outcome;
use crate::controller::Controller;
use crate::queue::{CQE_BYTES, Cq, QueueMemory, Ready, SQE_BYTES, Sq};
use dray_device::slot::Port;
use dray_nvme::command::{
    CreateIoCqCdw10, CreateIoCqCdw11, CreateIoSqCdw10, CreateIoSqCdw11, DeleteIoQueueCdw10, SubmissionEntry,
};
use dray_nvme::registers::{CQES, Cc, SQES, cq_head_doorbell, sq_tail_doorbell};
use dray_nvme::status::Status;

/// What creates an I/O queue: a command, or a restored state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueRequest {
    pub(crate) qid: u16,
    /// QSIZE, 0's based.
    pub(crate) entries_minus_1: u16,
    pub(crate) prp1: u64,
    pub(crate) contiguous: bool,
}

impl Controller {
    fn check_queue(&self, request: &QueueRequest, exists: bool) -> Result<u32, Status> {
        if request.qid == 0 || request.qid > self.config.io_queues || exists {
            return Err(Status::INVALID_QID.with_dnr());
        }
        if request.entries_minus_1 == 0 || request.entries_minus_1 > self.cap.mqes() {
            return Err(Status::INVALID_QUEUE_SIZE.with_dnr());
        }
        if !request.contiguous {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        if !request.prp1.is_multiple_of(4096) {
            return Err(Status::PRP_OFFSET_INVALID.with_dnr());
        }
        Ok(u32::from(request.entries_minus_1) + 1)
    }

    /// An I/O completion queue, checked.
    pub(crate) fn new_cq(&self, request: &QueueRequest, vector: Option<u16>, vectors: u16) -> Result<Cq, Status> {
        let exists = self.cqs.get(usize::from(request.qid)).is_some_and(Option::is_some);
        let entries = self.check_queue(request, exists)?;
        if vector.is_some_and(|iv| iv >= vectors.min(self.config.vectors)) {
            return Err(Status::INVALID_INTERRUPT_VECTOR.with_dnr());
        }
        let memory = QueueMemory::find(&self.engine.reader, request.prp1, entries as usize * CQE_BYTES, true)?;
        Ok(Cq::new(memory, request.qid, entries, vector))
    }

    /// An I/O submission queue, checked but for its completion queue.
    pub(crate) fn new_sq(&self, request: &QueueRequest, cqid: u16, qprio: u8) -> Result<Sq, Status> {
        let exists = self.sqs.get(usize::from(request.qid)).is_some_and(Option::is_some);
        let entries = self.check_queue(request, exists)?;
        if cqid == 0 || cqid > self.config.io_queues {
            return Err(Status::INVALID_QID.with_dnr());
        }
        let memory = QueueMemory::find(&self.engine.reader, request.prp1, entries as usize * SQE_BYTES, false)?;
        Ok(Sq::new(memory, request.qid, cqid, entries, qprio))
    }

    pub(super) fn create_io_cq(&mut self, entry: &SubmissionEntry, port: &Port) -> AdminResult {
        let (cdw10, cdw11) = (CreateIoCqCdw10::from_bits(entry.cdw10), CreateIoCqCdw11::from_bits(entry.cdw11));
        if Cc::from_bits(self.cc_seen).iocqes() != CQES {
            return Err(Status::INVALID_QUEUE_SIZE.with_dnr());
        }
        let request = QueueRequest {
            qid: cdw10.qid(),
            entries_minus_1: cdw10.qsize(),
            prp1: entry.prp1(),
            contiguous: cdw11.pc(),
        };
        let mut cq = self.new_cq(&request, cdw11.ien().then_some(cdw11.iv()), port.vectors())?;
        port.bar().store32(cq_head_doorbell(request.qid, 0), 0);
        if let Some(shadow) = &self.shadow {
            shadow.pages.join_cq(&mut cq, 0);
            shadow.pages.wrote(&mut self.engine);
        }
        self.cqs[usize::from(request.qid)] = Some(cq);
        self.oddities.created_queue();
        Ok(0)
    }

    pub(super) fn create_io_sq(&mut self, entry: &SubmissionEntry, port: &Port) -> AdminResult {
        let (cdw10, cdw11) = (CreateIoSqCdw10::from_bits(entry.cdw10), CreateIoSqCdw11::from_bits(entry.cdw11));
        if Cc::from_bits(self.cc_seen).iosqes() != SQES {
            return Err(Status::INVALID_QUEUE_SIZE.with_dnr());
        }
        let request = QueueRequest {
            qid: cdw10.qid(),
            entries_minus_1: cdw10.qsize(),
            prp1: entry.prp1(),
            contiguous: cdw11.pc(),
        };
        let mut sq = self.new_sq(&request, cdw11.cqid(), cdw11.qprio())?;
        let cq = self.cqs.get_mut(usize::from(cdw11.cqid())).and_then(Option::as_mut);
        cq.ok_or(Status::CQ_INVALID.with_dnr())?.users += 1;
        port.bar().store32(sq_tail_doorbell(request.qid, 0), 0);
        if let Some(shadow) = &self.shadow {
            shadow.pages.join_sq(&mut sq, 0);
            shadow.pages.wrote(&mut self.engine);
        }
        self.sqs[usize::from(request.qid)] = Some(sq);
        self.live.push(request.qid);
        Ok(0)
    }

    pub(super) fn delete_io_cq(&mut self, entry: &SubmissionEntry) -> AdminResult {
        let qid = DeleteIoQueueCdw10::from_bits(entry.cdw10).qid();
        let slot = self.cqs.get_mut(usize::from(qid)).filter(|_| qid != 0);
        let slot = slot.filter(|cq| cq.is_some()).ok_or(Status::INVALID_QID.with_dnr())?;
        if slot.as_ref().is_some_and(|cq| cq.users > 0) {
            return Err(Status::INVALID_QUEUE_DELETION.with_dnr());
        }
        *slot = None;
        Ok(0)
    }

    /// Ends when everything that was fetched from the queue has been posted.
    pub(super) fn delete_io_sq(&mut self, entry: &SubmissionEntry) -> Outcome {
        let qid = DeleteIoQueueCdw10::from_bits(entry.cdw10).qid();
        let sq = self.sqs.get_mut(usize::from(qid)).and_then(Option::as_mut);
        let Some(sq) = sq.filter(|sq| qid != 0 && !sq.deleting) else {
            return Status::INVALID_QID.with_dnr().into();
        };
        sq.deleting = true;
        self.admin.deletes.push((qid, entry.cdw0.cid()));
        Outcome::Pending
    }

    pub(super) fn finish_deletes(&mut self) {
        let mut i = 0;
        while let Some(&(qid, cid)) = self.admin.deletes.get(i) {
            let slot = &mut self.sqs[usize::from(qid)];
            if slot.as_ref().is_some_and(|sq| sq.in_flight > 0) {
                i += 1;
                continue;
            }
            if let Some(sq) = slot.take()
                && let Some(cq) = &mut self.cqs[usize::from(sq.cqid)]
            {
                cq.users = cq.users.saturating_sub(1);
            }
            self.live.retain(|&live| live != qid);
            self.admin.deletes.remove(i);
            self.ready.push(Ready { sqid: 0, cid, status: Status::SUCCESS, result: 0 });
        }
    }
}
