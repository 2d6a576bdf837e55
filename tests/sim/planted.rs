//! The planted faults: what each breaks, by the name that the command line knows.
//!
//! A fault is found only by a scenario in which the broken rule matters; [`Planted::needs`] says which that is, for whoever tunes
//! the scenarios, and for who wonders why one is found late.

use dray_device::planted::Fault;

/// A planted fault.
#[derive(Clone, Copy, Debug)]
pub struct Planted {
    /// Which.
    pub fault: Fault,
    /// Its name on the command line.
    pub name: &'static str,
    /// The rule that it breaks.
    pub breaks: &'static str,
    /// What a scenario needs for it to matter.
    pub needs: &'static str,
}

const fn row(fault: Fault, name: &'static str, breaks: &'static str, needs: &'static str) -> Planted {
    Planted { fault, name, breaks, needs }
}

/// All of them.
pub const ALL: [Planted; 23] = [
    row(Fault::ClearAfterRead, "clear-after-read", "1: clear, then read", "writes to blocks whose read is under way: hot spots, slow reads at the source"),
    row(Fault::TwoCopiesInFlight, "two-copies-in-flight", "2: one copy of a block at a time", "hot spots, a slow destination, several transfers at a time"),
    row(Fault::CleanBeforeFlushed, "clean-before-flushed", "3: clean means flushed", "a volatile cache at the destination, and its restart or a power cut after the move"),
    row(Fault::ZeroesSkipped, "zeroes-skipped", "4: zeroes are written", "zero blocks at the source over old data at the destination: Write Zeroes, deallocation, a second attempt"),
    row(Fault::SecondWriterUntracked, "second-writer-untracked", "5: the migration set is complete", "two guests on one namespace"),
    row(Fault::FailedWriteNotLogged, "failed-write-not-logged", "6: whatever touched the media is logged", "writes at the source that fail and touch the media all the same"),
    row(Fault::AbortedNotLogged, "aborted-not-logged", "6: reset-abandoned writes too", "resets of a guest's controller with writes under way, during the rounds"),
    row(Fault::SwitchWithEntryWaiting, "switch-with-entry-waiting", "7: every queue is drained", "writes up to Suspend, policies that give less back or answer late"),
    row(Fault::QueueFullIgnored, "queue-full-ignored", "8: a full queue is a state", "small queues, a fast guest, slow draining"),
    row(Fault::SourceNotFenced, "source-not-fenced", "9: suspension is not a fence", "a reset of guest or management controller in the hand-over"),
    row(Fault::UndoneWithoutRecord, "undone-without-record", "9: the fence is lifted by an undo that is recorded", "an undo after the \"moved\" record: cancelled, or the destination fails late"),
    row(Fault::DirtyNotRestored, "dirty-not-restored", "10: a failed copy dirties its range again", "reads or writes of the copy that fail and are tried again"),
    row(Fault::RetriedForEver, "retried-for-ever", "11: errors end", "a block that can never be read"),
    row(Fault::HeadBeforeCopied, "head-before-copied", "the head moves only over entries that were taken", "any traffic"),
    row(Fault::PhaseFlippedLate, "phase-flipped-late", "the phase tag changes with each pass of the queue", "more entries than the queue has slots"),
    row(Fault::CompletionBeforeEntry, "completion-before-entry", "6: the entry comes before the completion", "any traffic"),
    row(Fault::StateWithoutS0pt, "state-without-s0pt", "the phase of a restored completion queue (S0PT)", "a completion queue in an odd pass at Suspend"),
    row(Fault::LastBlockDropped, "last-block-dropped", "every block that an entry names becomes dirty", "writes of several blocks"),
    row(Fault::RecordNotFlushed, "record-not-flushed", "9: a record is flushed before the step that relies on it", "a power cut in the hand-over"),
    row(Fault::ResetKeepsOldWrites, "reset-keeps-old-writes", "a reset ends what was before (Base 2.3 §3.7.2)", "resets of a guest's controller with slow writes under way"),
    row(Fault::UnflushedNotMerged, "unflushed-not-merged", "3: merged back when the destination restarts", "a volatile cache at the destination, and its restart during the rounds"),
    row(Fault::DestinationNotFenced, "destination-not-fenced", "9: suspension is not a fence, at the destination either", "a reset of the destination's management controller before Resume, and an undo"),
    row(Fault::FoundRecordNotFlushed, "found-record-not-flushed", "9: what is relied on is durable", "a record whose flush failed, and a power cut"),
];

/// The one of that name.
#[must_use]
pub fn named(name: &str) -> Option<&'static Planted> {
    ALL.iter().find(|planted| planted.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::planted::{on, set};
    use std::collections::BTreeSet;

    #[test]
    fn every_fault_has_one_name_and_only_one_is_planted_in_a_thread() {
        let faults: BTreeSet<Fault> = ALL.iter().map(|planted| planted.fault).collect();
        let names: BTreeSet<&str> = ALL.iter().map(|planted| planted.name).collect();
        assert_eq!((faults.len(), names.len()), (ALL.len(), ALL.len()));
        for planted in &ALL {
            set(Some(planted.fault));
            let planted_now: Vec<Fault> = faults.iter().copied().filter(|fault| on(*fault)).collect();
            assert_eq!(planted_now, [planted.fault]);
            assert!(named(planted.name).is_some_and(|found| found.fault == planted.fault));
        }
        set(None);
        assert!(faults.iter().all(|fault| !on(*fault)));
    }
}
