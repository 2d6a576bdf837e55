//! What executes commands against namespaces: the parts of a controller that a command needs besides its queue.

use crate::config::{ConfigError, SubsystemConfig};
use crate::context::{Contexts, Outcome, Work};
use crate::deviations::{Deviating, Deviation};
use crate::job::Jobs;
use crate::memtrack::MemoryTracker;
use crate::namespace::Namespace;
use crate::subsystem::Shared;
use crate::udmq::Udmq;
use dray_device::backing::{BackingOp, BackingRequest, Submitted};
use dray_device::memory::Segment;
use dray_device::planted::{self, Fault};
use dray_device::space::{AddressSpace, SpaceReader};
use dray_nvme::status::Status;

/// What a controller has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControllerCounters {
    /// Commands fetched.
    pub fetched: u64,
    /// Completions posted.
    pub completed: u64,
    /// Of those, with an error status.
    pub errors: u64,
    /// Read commands.
    pub reads: u64,
    /// Bytes of them.
    pub read_bytes: u64,
    /// Write commands.
    pub writes: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Media and data integrity errors (SCT 2).
    pub media_errors: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Controller resets.
    pub resets: u64,
    /// Doorbell writes that could not be.
    pub bad_doorbells: u64,
}

pub(crate) const NO_NAMESPACE: u16 = u16::MAX;

/// The executing half of a controller.
pub(crate) struct Engine {
    /// Which controller, for the tags of backing operations.
    pub(crate) index: u16,
    pub(crate) reader: SpaceReader,
    pub(crate) tracker: Option<MemoryTracker>,
    /// The user data migration queue that watches this controller.
    pub(crate) log: Option<Udmq>,
    pub(crate) contexts: Contexts,
    pub(crate) jobs: Jobs,
    pub(crate) counters: ControllerCounters,
    /// Index of the namespace by NSID − 1.
    pub(crate) active: Vec<u16>,
    /// Volatile Write Cache Enable.
    pub(crate) wce: bool,
    /// Most bytes of one command.
    pub(crate) max_transfer: usize,
    /// Bytes of data moved in this poll.
    pub(crate) moved: usize,
    /// Guest memory of the command at hand.
    pub(crate) ranges: Vec<(u64, u32)>,
    pub(crate) deviating: Deviating,
}

/// An operation of a command, about to go to a backing.
pub(crate) struct Operation {
    pub(crate) op: BackingOp,
    pub(crate) work: Work,
    pub(crate) namespace: u16,
    pub(crate) slba: u64,
    pub(crate) blocks: u64,
    pub(crate) sqid: u16,
    pub(crate) cid: u16,
}

impl Engine {
    pub(crate) fn new(index: u16, config: &SubsystemConfig, active: Vec<u16>) -> Result<Self, ConfigError> {
        let max_transfer = crate::dptr::PAGE << config.mdts;
        Ok(Self {
            index,
            reader: AddressSpace::default().reader(),
            tracker: None,
            log: None,
            contexts: Contexts::new(config.contexts),
            jobs: Jobs::new(config.jobs, max_transfer)?,
            counters: ControllerCounters::default(),
            active,
            wce: true,
            max_transfer,
            moved: 0,
            ranges: Vec::with_capacity(crate::dptr::MAX_SEGMENTS),
            deviating: Deviating::default(),
        })
    }

    /// The index of an attached namespace, for I/O commands (NVMCS common checks).
    #[inline]
    pub(crate) fn namespace(&self, nsid: u32) -> Result<u16, Status> {
        let slot = (nsid as usize).checked_sub(1).and_then(|i| self.active.get(i));
        match slot {
            None => Err(Status::INVALID_NAMESPACE.with_dnr()),
            Some(&NO_NAMESPACE) => Err(Status::INVALID_FIELD.with_dnr()),
            Some(&index) => Ok(index),
        }
    }

    /// Tells the backing of what may be read next, most likely in the same namespace as the command at hand.
    #[inline]
    pub(crate) fn prefetch(&self, nsid: u32, slba: u64, shared: &Shared) {
        if let Ok(index) = self.namespace(nsid)
            && let Some(namespace) = shared.namespaces.get(usize::from(index))
        {
            namespace.backing.prefetch(slba, crate::dptr::PAGE);
        }
    }

    /// Sends a command's operation to its backing and takes a context if it does not end at once.
    #[inline]
    pub(crate) fn submit(
        contexts: &mut Contexts,
        ranges: &[(u64, u32)],
        place: (u16, u64),
        namespace: &mut Namespace,
        operation: &Operation,
        data: &[Segment<'_>],
    ) -> Submitted {
        let (index, generation) = place;
        let Some(next) = contexts.next() else { return Submitted::Busy };
        let &Operation { op, slba, blocks, .. } = operation;
        let tag = u64::from(index) << 16 | u64::from(next);
        let submitted = namespace.submit(&BackingRequest { op, slba, blocks, data, tag });
        if submitted == Submitted::Pending
            && let Some(context) = contexts.take()
        {
            context.sqid = operation.sqid;
            context.cid = operation.cid;
            context.work = operation.work;
            context.namespace = operation.namespace;
            context.slba = slba;
            context.blocks = blocks;
            context.generation = generation;
            if operation.work == Work::Read {
                context.ranges.extend_from_slice(ranges);
            }
        }
        submitted
    }

    /// An operation without data: flush, zeroing.
    pub(crate) fn submit_plain(&mut self, shared: &mut Shared, operation: &Operation) -> Outcome {
        let Some(namespace) = shared.namespaces.get_mut(usize::from(operation.namespace)) else {
            return Status::INTERNAL_ERROR.into();
        };
        let place = (self.index, self.reader.generation());
        match Self::submit(&mut self.contexts, &[], place, namespace, operation, &[]) {
            Submitted::Busy => Outcome::Busy,
            Submitted::Pending => Outcome::Pending,
            Submitted::Done(status) => {
                if operation.work == Work::Change {
                    let told = operation.op != BackingOp::WriteUncorrectable || !self.deviating.does(Deviation::CopyNotLogged);
                    self.changed_and(shared, operation.namespace, (operation.slba, operation.blocks), false, status, told);
                }
                status.into()
            }
        }
    }

    /// The media has been touched (design rule 6): whatever the status, the change is logged.
    #[inline]
    pub(crate) fn changed(
        &mut self,
        shared: &mut Shared,
        namespace: u16,
        slba: u64,
        blocks: u64,
        deallocated: bool,
        status: Status,
    ) {
        self.changed_and(shared, namespace, (slba, blocks), deallocated, status, true);
    }

    /// As [`changed`](Self::changed), logged only if `told`.
    #[inline]
    pub(crate) fn changed_and(
        &mut self,
        shared: &mut Shared,
        namespace: u16,
        (slba, mut blocks): (u64, u64),
        mut deallocated: bool,
        status: Status,
        told: bool,
    ) {
        let Some(namespace) = shared.namespaces.get_mut(usize::from(namespace)) else { return };
        if let Some(log) = &mut self.log
            && log.logging()
            && told
            && !(status.is_error() && planted::on(Fault::FailedWriteNotLogged))
        {
            if deallocated && self.deviating.does(Deviation::DsmCountNotZeroBased) {
                (blocks, deallocated) = (blocks + 1, false);
            }
            let posted = log.changed(namespace.config.nsid, slba, blocks, deallocated);
            let id = log.id;
            shared.cdq_posted(id, &posted);
        }
    }

    /// Lets everything logged be seen: before the completions of the commands that caused it are.
    #[inline]
    pub(crate) fn flush_log(&mut self, shared: &mut Shared) {
        if let Some(log) = &mut self.log {
            let posted = log.flush();
            let id = log.id;
            shared.cdq_posted(id, &posted);
        }
    }

    /// Memory that the controller has written, for tracking.
    #[inline]
    pub(crate) fn wrote(&mut self, iova: u64, len: usize) {
        if let Some(tracker) = &mut self.tracker {
            tracker.written(iova, len);
        }
    }

    /// Nothing of this controller is under way in a backing, nor any job.
    pub(crate) fn is_quiet(&self) -> bool {
        self.contexts.in_use() == 0 && self.jobs.is_empty()
    }
}
