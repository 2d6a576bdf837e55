//! Faults planted on purpose: each breaks one rule of Dray at the place where the rule is kept.
//!
//! The simulator plants one at a time and fails unless an oracle notices: that is how it shows that it can fail. Without the
//! feature `planted`, which no shipped build has, [`on`] is `false` at compile time, and nothing is left of the places.

/// What can be planted. The rules are those of the way of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// Rule 1: a block's dirty bit is cleared when its read has ended, not before the read is submitted.
    ClearAfterRead,
    /// Rule 2: a block is copied again while a copy of it is under way.
    TwoCopiesInFlight,
    /// Rule 3: what was written at the destination counts as flushed.
    CleanBeforeFlushed,
    /// Rule 4: zeroes are left out, though the destination has old data there.
    ZeroesSkipped,
    /// Rule 5: logging is started on the first controller of the set only.
    SecondWriterUntracked,
    /// Rule 6: a write that failed is not logged.
    FailedWriteNotLogged,
    /// Rule 6: a write that was under way at a reset is not logged.
    AbortedNotLogged,
    /// Rule 7: the switch-over does not wait until the queues are drained.
    SwitchWithEntryWaiting,
    /// Rule 8: "last, queue full" is overlooked.
    QueueFullIgnored,
    /// Rule 9: the source is not fenced before Resume.
    SourceNotFenced,
    /// Rule 9: an undo takes the fence down and resumes the source without a record.
    UndoneWithoutRecord,
    /// Rule 10: a copy that failed does not dirty its range again.
    DirtyNotRestored,
    /// Rule 11: a transfer that fails is tried again for ever.
    RetriedForEver,
    /// The driver gives entries back before it has taken them out of the ring.
    HeadBeforeCopied,
    /// The controller flips the phase of its data queue an entry late.
    PhaseFlippedLate,
    /// The controller posts a completion before the entry that reports its change.
    CompletionBeforeEntry,
    /// A restored completion queue begins with the wrong phase.
    StateWithoutS0pt,
    /// The last block of a reported range is left out.
    LastBlockDropped,
    /// The journal answers before the record is flushed.
    RecordNotFlushed,
    /// A reset ends (CSTS.RDY = 0) while the backing still works on old commands.
    ResetKeepsOldWrites,
    /// What a destination had not flushed is not copied again after its restart.
    UnflushedNotMerged,
    /// The destination has no fence before Resume, only its suspension.
    DestinationNotFenced,
    /// A record that is found at the start is relied on, durable or not.
    FoundRecordNotFlushed,
}

#[cfg(feature = "planted")]
mod place {
    use super::Fault;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
    }

    /// Plants a fault for everything that this thread runs, or takes it out.
    pub fn set(fault: Option<Fault>) {
        PLANTED.set(fault);
    }

    /// Whether that fault is planted in this thread.
    #[inline]
    #[must_use]
    pub fn on(fault: Fault) -> bool {
        PLANTED.get() == Some(fault)
    }
}

#[cfg(feature = "planted")]
pub use place::{on, set};

/// Whether that fault is planted: never, without the feature `planted`.
#[cfg(not(feature = "planted"))]
#[inline(always)]
#[must_use]
pub const fn on(_: Fault) -> bool {
    false
}
