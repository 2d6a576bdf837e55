//! What a driver shares with the queues it made, which live on other threads: flags, and notes for rare things.

use crate::cdq::CdqMemory;
use crate::error::Fault;
use crate::sync::{AtomicBool, AtomicU8, AtomicU32, Mutex, MutexGuard};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// One per driver.
#[derive(Debug, Default)]
pub(crate) struct Link {
    /// Counts notes of any pair or queue: the driver looks at them when the number changes.
    attention: AtomicU32,
    orphans: Mutex<Vec<Orphan>>,
}

/// A controller data queue whose owner was dropped; the driver deletes it and keeps its memory until then.
#[derive(Debug)]
pub(crate) struct Orphan {
    pub(crate) stage: OrphanStage,
    /// Held, so that the memory stays mapped.
    pub(crate) _memory: Arc<CdqMemory>,
    /// The driver's generation that the queue belongs to.
    pub(crate) generation: u32,
}

/// What is still to be done with an orphan.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OrphanStage {
    /// Its creation is under way.
    Creating(crate::admin::Ticket),
    /// Its head is being told; it is deleted behind that.
    Telling(crate::admin::Ticket, u16),
    /// It is to be deleted; so many deletions were refused.
    Delete(u16, u8),
    /// Its deletion is under way; so many were refused before.
    Deleting(crate::admin::Ticket, u16, u8),
    /// The controller may still fill it: its memory is kept until a reset.
    Kept,
}

impl Link {
    /// Says that there is something to look at.
    pub(crate) fn call(&self) {
        self.attention.fetch_add(1, Ordering::Release);
    }

    /// The number of calls so far.
    #[inline]
    pub(crate) fn calls(&self) -> u32 {
        self.attention.load(Ordering::Acquire)
    }

    pub(crate) fn adopt(&self, orphan: Orphan) {
        lock(&self.orphans).push(orphan);
        self.call();
    }

    pub(crate) fn take_orphans(&self) -> Vec<Orphan> {
        std::mem::take(&mut *lock(&self.orphans))
    }
}

const LIVE: u8 = 0;
const FROZEN: u8 = 1;
const DEAD: u8 = 2;

/// One per queue pair.
#[derive(Debug)]
pub(crate) struct PairShared {
    pub(crate) qid: u16,
    life: AtomicU8,
    abandoned: AtomicBool,
    notes: Mutex<Notes>,
    link: Arc<Link>,
}

/// What a pair has to tell.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub(crate) fault: Option<Fault>,
    pub(crate) aborts: Vec<u16>,
}

impl PairShared {
    pub(crate) fn new(qid: u16, link: Arc<Link>) -> Self {
        Self { qid, life: AtomicU8::new(LIVE), abandoned: AtomicBool::new(false), notes: Mutex::default(), link }
    }

    /// Whether commands may be submitted.
    #[inline]
    pub(crate) fn is_live(&self) -> bool {
        self.life.load(Ordering::Acquire) == LIVE
    }

    /// Whether the device has let go of the queue, or nobody will ever know.
    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.life.load(Ordering::Acquire) == DEAD
    }

    /// No command is taken any more; what is outstanding is not given up yet.
    pub(crate) fn freeze(&self) {
        self.life.fetch_max(FROZEN, Ordering::AcqRel);
    }

    /// Everything outstanding comes back with an unknown outcome.
    pub(crate) fn kill(&self) {
        self.life.fetch_max(DEAD, Ordering::AcqRel);
    }

    pub(crate) fn note_fault(&self, fault: Fault) {
        self.freeze();
        lock(&self.notes).fault.get_or_insert(fault);
        self.link.call();
    }

    pub(crate) fn note_abort(&self, cid: u16) {
        // Once per command: bounded by the queue's depth.
        lock(&self.notes).aborts.push(cid);
        self.link.call();
    }

    /// Takes what was noted.
    pub(crate) fn take_notes(&self) -> Notes {
        let mut notes = lock(&self.notes);
        Notes { fault: notes.fault.take(), aborts: std::mem::take(&mut notes.aborts) }
    }

    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.link.call();
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
