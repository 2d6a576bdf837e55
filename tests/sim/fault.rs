//! The fault model: everything that can go wrong in a run, by name.
//!
//! A scenario chooses some of these ([`Deed`](super::scenario)); whoever lets one happen counts it in the
//! [`Coverage`](super::coverage::Coverage) **when it takes effect**, not when it was asked for. A name that 2,000 seeds never
//! reach fails that run.

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// A controller data queue was full ("last, queue full").
    QueueFills,
    /// A one-shot event was never delivered.
    EventLost,
    /// A one-shot event was delivered late.
    EventLate,
    /// A one-shot event was delivered twice.
    EventDoubled,
    /// Entries of adjacent ranges were merged.
    EntriesMerged,
    /// One command was reported by several entries.
    EntriesSplit,
    /// An entry was in the queue before its command had ended.
    EntryEarly,
    /// An admin command of a management controller, or its completion, came late.
    AdminSlow,
    /// An admin command of a management controller failed.
    AdminFails,
    /// An admin command of a management controller was never answered.
    AdminNever,
    /// A device behaves as the reference's section 16 says of one that exists (each deviation is counted apart).
    Deviation,
    /// A read failed.
    ReadFails,
    /// A write failed, and may have touched the media.
    WriteFails,
    /// An operation took a thousand times as long.
    Slow,
    /// An operation never ended.
    NeverEnds,
    /// The backing had no space left.
    BackingFull,
    /// The source's management controller set CSTS.CFS.
    SourceFails,
    /// The destination's did.
    DestinationFails,
    /// The source's management controller was reset past its driver.
    SourceReset,
    /// The destination's was.
    DestinationReset,
    /// A guest's controller was reset by its guest.
    GuestReset,
    /// The source's management controller was gone: registers read all ones.
    SourceGone,
    /// The destination's was gone.
    DestinationGone,
    /// A policy trapped.
    PolicyTraps,
    /// A policy did not return within its budget.
    PolicyLoops,
    /// A policy left ranges out.
    PolicyOmits,
    /// A policy returned ranges outside the namespace.
    PolicyOutOfRange,
    /// A policy gave back more entries than it was shown.
    PolicyGivesMore,
    /// A policy gave back fewer entries than it could.
    PolicyGivesLess,
    /// A policy asked for the switch-over while all was dirty.
    PolicyAsksEarly,
    /// A policy was replaced in the middle.
    PolicySwapped,
    /// The migration was cancelled.
    Cancelled,
    /// A migration followed one that had failed.
    SecondAttempt,
    /// A migration went back to where the namespace came from.
    AndBack,
    /// A write at the destination whose outcome nobody knew landed late.
    LateWrite,
    /// The destination restarted and lost what it had not flushed.
    DestinationLoses,
    /// One block could never be read.
    Unreadable,
    /// The journal's disk failed a record.
    RecordFails,
    /// The journal's disk took long.
    RecordSlow,
    /// The power was cut, and the process started again.
    PowerCut,
    /// The cut dropped writes that were not flushed.
    PowerDrops,
    /// The cut kept a later write and dropped an earlier one.
    PowerReorders,
    /// The cut left part of a write.
    PowerTears,
    /// The cut tore a record.
    PowerTearsRecord,
    /// A guest reset its controller between Suspend and the end of the migration.
    ResetInHandover,
    /// A management controller was reset between Suspend and the end of the migration.
    ManagementResetInHandover,
    /// The power was cut between Suspend and the end of the migration.
    PowerCutInHandover,
    /// The power was cut again while the process was starting.
    PowerCutInRecovery,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 48] = [
        Self::QueueFills,
        Self::EventLost,
        Self::EventLate,
        Self::EventDoubled,
        Self::EntriesMerged,
        Self::EntriesSplit,
        Self::EntryEarly,
        Self::AdminSlow,
        Self::AdminFails,
        Self::AdminNever,
        Self::Deviation,
        Self::ReadFails,
        Self::WriteFails,
        Self::Slow,
        Self::NeverEnds,
        Self::BackingFull,
        Self::SourceFails,
        Self::DestinationFails,
        Self::SourceReset,
        Self::DestinationReset,
        Self::GuestReset,
        Self::SourceGone,
        Self::DestinationGone,
        Self::PolicyTraps,
        Self::PolicyLoops,
        Self::PolicyOmits,
        Self::PolicyOutOfRange,
        Self::PolicyGivesMore,
        Self::PolicyGivesLess,
        Self::PolicyAsksEarly,
        Self::PolicySwapped,
        Self::Cancelled,
        Self::SecondAttempt,
        Self::AndBack,
        Self::LateWrite,
        Self::DestinationLoses,
        Self::Unreadable,
        Self::RecordFails,
        Self::RecordSlow,
        Self::PowerCut,
        Self::PowerDrops,
        Self::PowerReorders,
        Self::PowerTears,
        Self::PowerTearsRecord,
        Self::ResetInHandover,
        Self::ManagementResetInHandover,
        Self::PowerCutInHandover,
        Self::PowerCutInRecovery,
    ];
}
