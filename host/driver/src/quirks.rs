//! What is known of devices that deviate from the specification.
//!
//! The driver survives every deviation here by itself: it never relies on a second event, wraps its head pointer, treats any
//! non-zero status field as an error. A [`Quirks`] tells the migration what it must not rely on. Some deviations hide a change
//! ([`Quirks::hides_changes`]): a migration from such a device ends with a compare of everything while suspended.

use dray_device::space::AddressSpace;
use dray_nvme::identify::IdentifyController;

/// Deviations of one device model. All false: it does what the specification says, and has been tested.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// Not on the list of tested models: its log is a hint.
    pub untested: bool,
    /// Copy, Format, Write Uncorrectable and Sanitize leave no entry in the UDMQ.
    pub copy_not_logged: bool,
    /// Of a Dataset Management command the ranges after a gap leave no entry.
    pub dsm_gap_dropped: bool,
    /// NLB of an entry that a Dataset Management command left is a count, not 0's based: one block too many is named.
    pub dsm_count_not_zero_based: bool,
    /// After the queue was full, logging goes on without a FIRST entry when slots come back: stop, start and copy everything.
    pub resumes_silently_after_full: bool,
    /// Markers on a full queue overwrite unread entries: drain before Track Send stop and before Suspend.
    pub markers_overwrite_when_full: bool,
    /// The entry that says "full" replaces the mark of the entry it is put on (FIRST, STOPPED, SUSPENDED), whose range counts.
    pub full_replaces_marker: bool,
    /// Only the first one-shot event after a reset is ever reported: poll by timer.
    pub one_event_only: bool,
    /// A queue behind a PRP list (PC = 0) is taken and never filled.
    pub contiguous_queues_only: bool,
    /// Logging of a controller survives a reset of the management controller: Track Send stop before start.
    pub logging_survives_reset: bool,
    /// Suspension survives a reset of the management controller: send Resume.
    pub suspension_survives_reset: bool,
    /// A repeated Track Send start or stop posts no entry: wait for no marker then.
    pub repeated_start_unmarked: bool,
    /// Set Controller State takes one command alone (SEQIND 11b), CSVI in 16 bits, a controller that never had I/O queues.
    pub state_in_one_command: bool,
    /// CSUP of Get Controller State is never set: the header's CSATTR tells.
    pub csup_never_set: bool,
    /// S0PT of a completion queue's state is the tag written next, also when the tail is 0.
    pub s0pt_is_next_phase: bool,
    /// Commands in the admin submission queue are not fetched at Resume: ring its doorbell again.
    pub resume_skips_admin_queue: bool,
    /// Statuses differ from the specification's (an unknown CNTLID is Invalid Field or 37h).
    pub statuses_differ: bool,
    /// Track Send and Receive of memory changes fail.
    pub no_memory_tracking: bool,
    /// Entries of the UDMQ are written through the migratable controller's PCI function: the queue must be mapped for both.
    pub writes_queue_through_migratable: bool,
}

/// Who has the PCI function of a migratable controller.
#[derive(Clone, Copy, Debug)]
pub enum MigratableFunction<'a> {
    /// This process, in this I/O address space.
    Ours(&'a AddressSpace),
    /// Another process (a VM manager, the kernel): nothing of ours is mapped for it.
    Another,
}

/// Why a drive cannot track a migratable controller as it is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotTrack {
    /// Nobody here can map the queue for that function.
    #[error(
        "the drive writes its controller data queue through the migratable function, which another process owns: it cannot be tracked \
         (let a software controller serve the namespace, and track there)"
    )]
    OwnedByAnother,
    /// It is in another I/O address space than the queue.
    #[error(
        "the drive writes its controller data queue through the migratable function, which is in another I/O address space than the \
         management controller: give both devices the same `space` in the configuration"
    )]
    OtherSpace,
}

impl Quirks {
    /// What is known of a controller by its Identify page: our own model has none, QEMU's model of live migration has the ones
    /// that were read from its code, everything else is untested.
    #[must_use]
    pub fn for_device(identify: &IdentifyController) -> Self {
        match identify.model() {
            Some(model) if model == "Dray" || model.starts_with("Dray ") => Self::default(),
            Some("QEMU NVMe Ctrl") => Self::qemu(),
            _ => Self { untested: true, ..Self::default() },
        }
    }

    /// QEMU's model of host-managed live migration (branch nvme.tp4159).
    #[must_use]
    pub fn qemu() -> Self {
        Self {
            untested: false,
            copy_not_logged: true,
            dsm_gap_dropped: true,
            dsm_count_not_zero_based: true,
            resumes_silently_after_full: true,
            markers_overwrite_when_full: true,
            full_replaces_marker: true,
            one_event_only: true,
            contiguous_queues_only: true,
            logging_survives_reset: true,
            suspension_survives_reset: true,
            repeated_start_unmarked: true,
            state_in_one_command: true,
            csup_never_set: true,
            s0pt_is_next_phase: true,
            resume_skips_admin_queue: true,
            statuses_differ: true,
            no_memory_tracking: true,
            writes_queue_through_migratable: true,
        }
    }

    /// Whether the drive can track a migratable controller whose queue is in `management`, the I/O address space of the management
    /// controller. To be asked before anything is started: entries that an IOMMU stops are lost without a word.
    ///
    /// # Errors
    /// [`CannotTrack`].
    pub fn may_track(&self, management: &AddressSpace, migratable: MigratableFunction<'_>) -> Result<(), CannotTrack> {
        match migratable {
            _ if !self.writes_queue_through_migratable => Ok(()),
            MigratableFunction::Ours(space) if space.is(management) => Ok(()),
            MigratableFunction::Ours(_) => Err(CannotTrack::OtherSpace),
            MigratableFunction::Another => Err(CannotTrack::OwnedByAnother),
        }
    }

    /// Whether a change of the media may stay out of the log: the migration then ends with a compare of everything.
    #[must_use]
    pub fn hides_changes(&self) -> bool {
        self.untested
            || self.copy_not_logged
            || self.dsm_gap_dropped
            || self.resumes_silently_after_full
            || self.markers_overwrite_when_full
    }

    /// The names of those that hide changes, for reports.
    pub fn hiding(&self) -> impl Iterator<Item = &'static str> {
        [
            (self.untested, "untested"),
            (self.copy_not_logged, "copy-not-logged"),
            (self.dsm_gap_dropped, "dsm-gap-dropped"),
            (self.resumes_silently_after_full, "resumes-silently-after-full"),
            (self.markers_overwrite_when_full, "markers-overwrite-when-full"),
        ]
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_nvme::identify::write_ascii;

    #[test]
    fn only_tested_models_are_trusted() {
        let mut identify = IdentifyController::default();
        for (model, hides) in [("Dray", false), ("Dray software controller", false), ("Draylike", true), ("", true)] {
            write_ascii(&mut identify.mn, model);
            assert_eq!(Quirks::for_device(&identify).hides_changes(), hides, "{model}");
        }
        write_ascii(&mut identify.mn, "QEMU NVMe Ctrl");
        let qemu = Quirks::for_device(&identify);
        assert!(qemu.hides_changes() && !qemu.untested);
        assert!(qemu.hiding().any(|name| name == "copy-not-logged"));
    }

    #[test]
    fn a_queue_behind_another_functions_domain_is_refused() {
        let (ours, other) = (AddressSpace::default(), AddressSpace::default());
        let through = Quirks::qemu();
        assert_eq!(through.may_track(&ours, MigratableFunction::Ours(&ours.clone())), Ok(()));
        assert_eq!(through.may_track(&ours, MigratableFunction::Ours(&other)), Err(CannotTrack::OtherSpace));
        let refused = through.may_track(&ours, MigratableFunction::Another).expect_err("another's");
        assert!(refused.to_string().contains("another process owns"), "{refused}");
        assert_eq!(Quirks::default().may_track(&ours, MigratableFunction::Another), Ok(()), "as the specification says");
    }
}
