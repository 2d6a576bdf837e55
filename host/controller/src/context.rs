//! Commands whose operation on a backing is under way: a fixed table per controller.
//!
//! A context outlives its command when the controller is reset: it is *abandoned*, posts no completion, but stays until the
//! backing has ended, so that what it touched is logged (design rule 6) and its memory stays mapped.

use dray_nvme::status::Status;

/// What a context waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A read into guest memory.
    Read,
    /// Anything that changes the media.
    Change,
    /// A flush.
    Flush,
    /// A step of a job.
    Job(u16),
    /// The flush of a normal shutdown; no command.
    Shutdown,
}

/// One command under way.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) used: bool,
    pub(crate) abandoned: bool,
    pub(crate) sqid: u16,
    pub(crate) cid: u16,
    pub(crate) work: Work,
    /// Index of the namespace.
    pub(crate) namespace: u16,
    pub(crate) slba: u64,
    pub(crate) blocks: u64,
    /// Guest memory that a read writes: I/O virtual address and bytes.
    pub(crate) ranges: Vec<(u64, u32)>,
    /// Generation of the address space that its memory was translated with.
    pub(crate) generation: u64,
}

/// The table of one controller.
#[derive(Debug)]
pub(crate) struct Contexts {
    table: Vec<Context>,
    free: Vec<u16>,
}

impl Contexts {
    pub(crate) fn new(count: u16) -> Self {
        let idle = |_| Context {
            used: false,
            abandoned: false,
            sqid: 0,
            cid: 0,
            work: Work::Flush,
            namespace: 0,
            slba: 0,
            blocks: 0,
            ranges: Vec::with_capacity(32),
            generation: 0,
        };
        Self { table: (0..count).map(idle).collect(), free: (0..count).rev().collect() }
    }

    /// The index that [`take`](Self::take) will hand out next.
    #[inline]
    pub(crate) fn next(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Takes the next context.
    pub(crate) fn take(&mut self) -> Option<&mut Context> {
        let index = self.free.pop()?;
        let context = self.table.get_mut(usize::from(index))?;
        context.used = true;
        context.abandoned = false;
        context.ranges.clear();
        Some(context)
    }

    pub(crate) fn get(&mut self, index: u16) -> Option<&mut Context> {
        self.table.get_mut(usize::from(index)).filter(|context| context.used)
    }

    pub(crate) fn free(&mut self, index: u16) {
        if let Some(context) = self.get(index) {
            context.used = false;
            self.free.push(index);
        }
    }

    /// Contexts in use, abandoned ones too.
    #[inline]
    pub(crate) fn in_use(&self) -> usize {
        self.table.len() - self.free.len()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Context> {
        self.table.iter_mut().filter(|context| context.used)
    }

    /// Something is under way in a namespace, abandoned or not.
    pub(crate) fn any_in(&self, namespace: u16) -> bool {
        self.table.iter().any(|context| context.used && context.namespace == namespace)
    }

    /// Forgets every command: after a reset.
    pub(crate) fn abandon(&mut self) {
        for context in self.iter_mut() {
            context.abandoned = true;
        }
    }

    /// The oldest generation that operations under way were translated with.
    pub(crate) fn oldest_generation(&self, now: u64) -> u64 {
        if self.in_use() == 0 {
            return now;
        }
        self.table.iter().filter(|c| c.used).map(|c| c.generation).min().unwrap_or(now)
    }
}

/// What came of a fetched command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It has ended: status and the result of DW0 and DW1.
    Done(Status, u64),
    /// Its completion comes later.
    Pending,
    /// Nothing has happened; fetch it again later.
    Busy,
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Self::Done(status, 0)
    }
}
