//! Commands that take several operations on the backing: Compare, Copy, Verify, DSM deallocate, long Write Zeroes.
//!
//! A job works in chunks, one operation at a time, so that a poll stays short; it holds a context while it lives. What it
//! touched is logged when a range ends, and when it ends early.

use crate::config::ConfigError;
use crate::context::{Outcome, Work};
use crate::deviations::Deviation;
use crate::engine::Engine;
use crate::namespace::Namespace;
use crate::subsystem::Shared;
use dray_device::backing::{BackingOp, BackingRequest, Submitted};
use dray_device::memory::{Arena, DmaBuffer, Pages, Segment};
use dray_nvme::status::Status;

/// Bytes of a chunk, as of a poll's budget.
pub(crate) const CHUNK_BYTES: usize = 64 << 10;
/// Bytes zeroed at a time by a backing that works beside us.
const LONG_CHUNK_BYTES: u64 = 64 << 20;
/// Most ranges of a job (DSM).
const MAX_RANGES: usize = 256;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobKind {
    Zero { deallocate: bool, fua: bool },
    Deallocate,
    Verify,
    Compare,
    Copy { fua: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Read,
    Change,
}

#[derive(Debug)]
struct Job {
    used: bool,
    /// An operation is under way.
    waiting: bool,
    /// Abort was asked for.
    aborted: bool,
    context: u16,
    namespace: u16,
    kind: JobKind,
    phase: Phase,
    ranges: Vec<(u64, u64)>,
    next_range: usize,
    /// What is left of the current range.
    slba: u64,
    left: u64,
    /// Blocks of the operation at hand.
    blocks: u64,
    /// Where a copy writes next.
    target: u64,
    /// Bytes of a compare's data done.
    compared: usize,
    /// Blocks changed and not logged: first and count.
    touched: (u64, u64),
    /// The backing works beside us: long chunks cost nothing.
    beside: bool,
    /// A chunk, then the data of a compare.
    memory: DmaBuffer,
}

/// The jobs of one controller.
#[derive(Debug)]
pub(crate) struct Jobs {
    jobs: Vec<Job>,
    active: usize,
}

impl Jobs {
    pub(crate) fn new(count: u16, max_transfer: usize) -> Result<Self, ConfigError> {
        let each = CHUNK_BYTES + max_transfer;
        let memory = DmaBuffer::allocate("dray-jobs", each * usize::from(count), Pages::Small)?;
        let mut jobs = Vec::new();
        for i in 0..usize::from(count) {
            let Some(memory) = memory.slice(i * each, each) else { break };
            jobs.push(Job {
                used: false,
                waiting: false,
                aborted: false,
                context: 0,
                namespace: 0,
                kind: JobKind::Verify,
                phase: Phase::Read,
                ranges: Vec::with_capacity(MAX_RANGES),
                next_range: 0,
                slba: 0,
                left: 0,
                blocks: 0,
                target: 0,
                compared: 0,
                touched: (0, 0),
                beside: false,
                memory,
            });
        }
        Ok(Self { jobs, active: 0 })
    }

    /// A job that is free.
    pub(crate) fn next(&self) -> Option<u16> {
        self.jobs.iter().position(|job| !job.used).and_then(|i| u16::try_from(i).ok())
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.active == 0
    }

    /// Takes a copy of the data that a compare will look at: the guest may change its own.
    pub(crate) fn keep_data(&mut self, job: u16, pieces: &[Segment<'_>]) {
        let Some(job) = self.jobs.get(usize::from(job)) else { return };
        let mut at = job.memory.offset() + CHUNK_BYTES;
        for piece in pieces {
            Arena::copy(piece.arena(), piece.offset(), job.memory.arena(), at, piece.len());
            at += piece.len();
        }
    }

    /// Asks a job to end early.
    pub(crate) fn abort(&mut self, job: u16) -> bool {
        let job = self.jobs.get_mut(usize::from(job)).filter(|job| job.used);
        job.map(|job| job.aborted = true).is_some()
    }
}

impl Job {
    /// Moves on to the next chunk; `None` when everything is done.
    fn next_chunk(&mut self, shift: u32) -> Option<()> {
        while self.left == 0 {
            let &(slba, blocks) = self.ranges.get(self.next_range)?;
            self.next_range += 1;
            (self.slba, self.left) = (slba, blocks);
        }
        let zeroing = matches!(self.kind, JobKind::Zero { .. } | JobKind::Deallocate);
        let bytes = if zeroing && self.beside { LONG_CHUNK_BYTES } else { CHUNK_BYTES as u64 };
        self.blocks = self.left.min(bytes >> shift);
        self.phase = if zeroing { Phase::Change } else { Phase::Read };
        Some(())
    }

    fn submit(&mut self, namespace: &mut Namespace, tag: u64) -> Submitted {
        let (slba, blocks) = (self.slba, self.blocks);
        let len = (blocks << namespace.block_shift) as usize;
        let (op, slba) = match (self.phase, self.kind) {
            (Phase::Read, _) => (BackingOp::Read, slba),
            (Phase::Change, JobKind::Copy { fua }) => (BackingOp::Write { fua }, self.target),
            (Phase::Change, JobKind::Zero { deallocate, fua }) => (BackingOp::WriteZeroes { deallocate, fua }, slba),
            (Phase::Change, _) => (BackingOp::Deallocate, slba),
        };
        let data = match op {
            BackingOp::Read | BackingOp::Write { .. } => self.memory.part(0, len),
            _ => None,
        };
        namespace.submit(&BackingRequest { op, slba, blocks, data: data.as_slice(), tag })
    }

    /// Takes in the end of an operation; `Some` when the whole command has ended. A change is reported through `log`.
    fn ended(&mut self, status: Status, shift: u32, log: &mut impl FnMut(u64, u64)) -> Option<Status> {
        if self.phase == Phase::Change {
            let first = if matches!(self.kind, JobKind::Copy { .. }) { self.target } else { self.slba };
            self.touch(first, log);
            self.target += self.blocks;
        }
        if status.is_error() {
            return Some(status);
        }
        match (self.phase, self.kind) {
            (Phase::Read, JobKind::Compare) => {
                let (len, arena, at) = ((self.blocks << shift) as usize, self.memory.arena(), self.memory.offset());
                if !Arena::equal(arena, at, arena, at + CHUNK_BYTES + self.compared, len) {
                    return Some(Status::COMPARE_FAILURE);
                }
                self.compared += len;
            }
            (Phase::Read, JobKind::Copy { .. }) => {
                self.phase = Phase::Change;
                return None;
            }
            _ => {}
        }
        self.slba += self.blocks;
        self.left -= self.blocks;
        if self.aborted {
            return Some(Status::ABORTED_BY_REQUEST);
        }
        self.next_chunk(shift).is_none().then_some(Status::SUCCESS)
    }

    fn touch(&mut self, first: u64, log: &mut impl FnMut(u64, u64)) {
        let (start, count) = self.touched;
        if count > 0 && start + count == first {
            self.touched.1 += self.blocks;
        } else {
            self.report(log);
            self.touched = (first, self.blocks);
        }
    }

    fn report(&mut self, log: &mut impl FnMut(u64, u64)) {
        let (start, count) = std::mem::take(&mut self.touched);
        if count > 0 {
            log(start, count);
        }
    }
}

impl Engine {
    /// Begins a job; it ends at once where the backing does.
    #[expect(clippy::too_many_arguments, reason = "a command's identity and its ranges")]
    pub(crate) fn start_job(
        &mut self,
        kind: JobKind,
        namespace: u16,
        sqid: u16,
        cid: u16,
        ranges: &[(u64, u64)],
        target: u64,
        shared: &mut Shared,
    ) -> Result<Outcome, Status> {
        let (Some(index), Some(next)) = (self.jobs.next(), self.contexts.next()) else { return Ok(Outcome::Busy) };
        let generation = self.reader.generation();
        let Some(context) = self.contexts.take() else { return Ok(Outcome::Busy) };
        (context.sqid, context.cid, context.namespace) = (sqid, cid, namespace);
        (context.work, context.generation) = (Work::Job(index), generation);
        let shift = shared.namespaces.get(usize::from(namespace)).map_or(9, |n| n.block_shift);
        let Some(job) = self.jobs.jobs.get_mut(usize::from(index)) else { return Err(Status::INTERNAL_ERROR) };
        (job.used, job.waiting, job.aborted, job.beside) = (true, false, false, false);
        (job.context, job.namespace, job.kind, job.target) = (next, namespace, kind, target);
        job.ranges.clear();
        job.ranges.extend_from_slice(&ranges[..ranges.len().min(MAX_RANGES)]);
        (job.next_range, job.left, job.compared, job.touched) = (0, 0, 0, (0, 0));
        self.jobs.active += 1;
        if job.next_chunk(shift).is_none() {
            self.end_job(index, shared, Status::SUCCESS);
            return Ok(Status::SUCCESS.into());
        }
        match self.run_job(index, shared) {
            Some(status) => Ok(status.into()),
            None => Ok(Outcome::Pending),
        }
    }

    /// Goes on with a job until the poll's budget is used; its status when it has ended (it is gone then).
    fn run_job(&mut self, index: u16, shared: &mut Shared) -> Option<Status> {
        while self.moved < CHUNK_BYTES {
            let job = self.jobs.jobs.get_mut(usize::from(index)).filter(|job| job.used && !job.waiting)?;
            let namespace = shared.namespaces.get_mut(usize::from(job.namespace))?;
            let tag = u64::from(self.index) << 16 | u64::from(job.context);
            let len = (job.blocks << namespace.block_shift) as usize;
            match job.submit(namespace, tag) {
                Submitted::Busy => return None,
                Submitted::Pending => {
                    (job.waiting, job.beside) = (true, true);
                    return None;
                }
                Submitted::Done(status) => {
                    self.moved += len;
                    if let Some(status) = self.step_ended(index, shared, status) {
                        return Some(status);
                    }
                }
            }
        }
        None
    }

    /// An operation of a job has ended; the job's status when that was the last one (it is gone then).
    pub(crate) fn step_ended(&mut self, index: u16, shared: &mut Shared, status: Status) -> Option<Status> {
        let job = self.jobs.jobs.get_mut(usize::from(index)).filter(|job| job.used)?;
        job.waiting = false;
        let (namespace, context, kind) = (job.namespace, job.context, job.kind);
        let shift = shared.namespaces.get(usize::from(namespace)).map_or(9, |n| n.block_shift);
        let mut logged = [(0, 0); 2];
        let mut count = 0;
        let mut log = |slba, blocks| {
            if let Some(slot) = logged.get_mut(count) {
                *slot = (slba, blocks);
                count += 1;
            }
        };
        let mut ended = job.ended(status, shift, &mut log);
        let abandoned = self.contexts.get(context).is_none_or(|context| context.abandoned);
        if abandoned && ended.is_none() {
            ended = Some(Status::ABORTED_BY_REQUEST);
        }
        for &(slba, blocks) in &logged[..count] {
            let told = self.is_told(index, slba);
            let deallocated = kind == JobKind::Deallocate;
            self.changed_and(shared, namespace, (slba, blocks), deallocated, Status::SUCCESS, told);
        }
        if let Some(status) = ended {
            self.end_job(index, shared, status);
        }
        ended
    }

    /// Whether what a job touched from `slba` on is logged: always, but with devices that deviate.
    #[inline]
    fn is_told(&self, index: u16, slba: u64) -> bool {
        let Some(job) = self.jobs.jobs.get(usize::from(index)) else { return true };
        match job.kind {
            JobKind::Copy { .. } => !self.deviating.does(Deviation::CopyNotLogged),
            JobKind::Deallocate if self.deviating.is(Deviation::DsmGapDropped) => {
                let first = job.ranges.iter().find(|(_, blocks)| *blocks > 0);
                first.is_none_or(|(first, _)| *first == slba) || !self.deviating.does(Deviation::DsmGapDropped)
            }
            _ => true,
        }
    }

    fn end_job(&mut self, index: u16, shared: &mut Shared, status: Status) {
        let told = self.jobs.jobs.get(usize::from(index)).is_none_or(|job| job.touched.1 == 0 || self.is_told(index, job.touched.0));
        let Some(job) = self.jobs.jobs.get_mut(usize::from(index)) else { return };
        let (slba, blocks) = std::mem::take(&mut job.touched);
        let (namespace, context, kind) = (job.namespace, job.context, job.kind);
        job.used = false;
        self.jobs.active -= 1;
        self.contexts.free(context);
        if blocks > 0 {
            self.changed_and(shared, namespace, (slba, blocks), kind == JobKind::Deallocate, status, told);
        }
    }

    /// Goes on with every job that waits for its turn; `ended` gets those that end: queue, command, status, abandoned.
    pub(crate) fn run_jobs(&mut self, shared: &mut Shared, mut ended: impl FnMut(u16, u16, Status)) {
        if self.jobs.is_empty() {
            return;
        }
        for index in 0..self.jobs.jobs.len() {
            let Some(job) = self.jobs.jobs.get(index).filter(|job| job.used && !job.waiting) else { continue };
            let Some(context) = self.contexts.get(job.context) else { continue };
            let (sqid, cid, abandoned) = (context.sqid, context.cid, context.abandoned);
            let index = index as u16;
            if abandoned {
                self.end_job(index, shared, Status::ABORTED_BY_REQUEST);
                continue;
            }
            if let Some(status) = self.run_job(index, shared) {
                ended(sqid, cid, status);
            }
        }
    }

    /// Some job waits for its turn (not for a backing).
    pub(crate) fn has_runnable_job(&self) -> bool {
        !self.jobs.is_empty() && self.jobs.jobs.iter().any(|job| job.used && !job.waiting)
    }
}
