//! What a migration asks of its surroundings: the guest's slot, the durable record, the fence, the guest's figures.

/// Where the guest's functions are pointed (one slot per migratable controller).
pub trait GuestSlot: Send {
    /// The function that was behind source controller `cntlid` is the destination's from now on.
    fn point_at_destination(&mut self, cntlid: u16);
    /// The function is the source's again.
    fn point_at_source(&mut self, cntlid: u16);
}

/// Who serves the namespaces; in a media move, whose backing is that of the namespaces: the one before, or the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// How far a migration is, for whoever finds the record after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordPhase {
    /// Media is being copied; nothing has been handed over.
    Copying,
    /// The destination has everything and is about to be resumed; only an undo takes this back.
    Moved,
    /// The destination serves.
    Done,
    /// It was undone; the source serves.
    Undone,
}

/// The name of an end (a subsystem) that means the same in every migration: "source" and "destination" do not, once a namespace
/// goes from A to B and back to A. The appliance takes the first 16 bytes of a SHA-256; all zero = not named. The ends of a media
/// move are backings, not subsystems: its records are kept apart from those of controller moves.
pub type EndId = [u8; 16];

/// What correctness rests on: written and flushed before the step that relies on it (rule 9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The migration, a number that is never reused.
    pub migration: u64,
    /// The source of that migration.
    pub from: EndId,
    /// Its destination.
    pub to: EndId,
    /// Counts the records of a migration.
    pub epoch: u64,
    /// Who serves.
    pub owner: Owner,
    /// How far it is.
    pub phase: RecordPhase,
    /// The source is fenced. In a media move: the backing before never serves again, while the controllers go on.
    pub fenced: bool,
}

/// Why a record is not durable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record could not be written: {0}")]
pub struct JournalError(pub String);

/// Where records are kept.
pub trait Journal: Send {
    /// Begins to write a record; one at a time.
    fn write(&mut self, record: &Record);
    /// `Some` once, when the record is durable (flushed) or has failed.
    fn poll(&mut self) -> Option<Result<(), JournalError>>;
}

/// The fences before the controllers of each end: behind one nothing is fetched, whatever is reset. Suspension is none at either
/// end, since the reset of a management controller ends it. A restart raises them by the record.
///
/// The destination's is up from before its controllers are suspended until they have their state and "moved" is durable. The
/// source's is up before the "moved" record is begun, so that nothing happens between the last look at the source and the record.
pub trait FenceControl: Send {
    /// Raises the fence of an end; nothing changes where it is up.
    fn raise(&mut self, end: Owner);
    /// Lowers the fence of an end. The source's: where "moved" may be durable, the undo has been recorded before; in a media move
    /// also when the backings have been exchanged. The destination's: Resume is about to be sent.
    fn lower(&mut self, end: Owner);
}

/// What the guest sees of its controller. Microseconds; 0 = unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestSample {
    /// Median latency since the last sample.
    pub p50_us: u32,
    /// 99th percentile since the last sample.
    pub p99_us: u32,
    /// 99th percentile before the migration began.
    pub p99_before_us: u32,
    /// Commands per second since the last sample.
    pub iops: u32,
}

/// Where the guest's figures come from.
pub trait GuestView: Send {
    /// The figures since the last call.
    fn sample(&mut self) -> GuestSample;
}

/// All of them.
pub struct Hooks {
    /// The guest's slots.
    pub slot: Box<dyn GuestSlot>,
    /// The durable record.
    pub journal: Box<dyn Journal>,
    /// The source's fence.
    pub fence: Box<dyn FenceControl>,
    /// The guest's figures.
    pub guest: Box<dyn GuestView>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks").finish_non_exhaustive()
    }
}
