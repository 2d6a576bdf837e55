//! What happens in a run, as everybody reports it and the oracles are shown it: one list, in the order of virtual time.
//!
//! Whoever does something says so when it does it; nobody but the oracles draws conclusions. The same events, in words, are the
//! trace of a seed that fails.

use dray_device::poll::Time;
use dray_migration::{EndId, Outcome, Owner, Record};
use dray_nvme::command::{CompletionEntry, SubmissionEntry};
use dray_nvme::status::Status;

/// Which of the two subsystems: 0 = A, where the namespaces begin, 1 = B.
pub type Side = usize;
/// What records call the two sides.
pub const ENDS: [EndId; 2] = [[0xa1; 16], [0xb2; 16]];

/// The side that a record names as the owner.
#[must_use]
pub fn owner_of(record: &Record) -> Option<Side> {
    let end = if record.owner == Owner::Source { record.from } else { record.to };
    ENDS.iter().position(|known| *known == end)
}

/// A guest: its number, and that of its migratable controller.
pub type GuestId = usize;
/// A guest's command, unique in a run; also what its blocks contain (see `content`).
pub type CommandId = u64;

/// What a guest's command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read.
    Read,
    /// Write; with `fua` durable when it ends.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Write Zeroes.
    WriteZeroes {
        /// Force unit access.
        fua: bool,
        /// The space may be given back.
        deallocate: bool,
    },
    /// Dataset Management, deallocate. The backings of the simulator read deallocated blocks as zeroes.
    Deallocate,
    /// Compare with what the guest believes is there. Changes nothing.
    Compare,
    /// Flush: what had ended before it was submitted is durable when it ends.
    Flush,
}

impl Op {
    /// It changes blocks.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::WriteZeroes { .. } | Self::Deallocate)
    }
}

/// How a guest's command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With success. For a read what each block contained, decoded; for a compare what each block was compared with.
    Done {
        /// One [`CommandId`] per block read or compared; empty for everything else.
        values: Vec<CommandId>,
    },
    /// With an error; what it would have written may be there or not.
    Failed(Status),
    /// It has no end: its controller was reset, or the power went. What it would have written may be there or not.
    Lost,
}

/// Everything that happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// A guest has rung the doorbell for a command.
    Submitted {
        /// Who.
        guest: GuestId,
        /// Its command.
        id: CommandId,
        /// What it does.
        op: Op,
        /// The namespace (NSID).
        nsid: u32,
        /// First block.
        slba: u64,
        /// Blocks.
        blocks: u64,
    },
    /// A guest has seen the completion, or knows that there will be none.
    Ended {
        /// Who.
        guest: GuestId,
        /// Its command.
        id: CommandId,
        /// How.
        end: End,
    },
    /// A completion of an outstanding command lies in a guest's completion queue, and the guest, which has just looked for
    /// completions, has not seen it: its phase tag is not the one of this pass, or entries before it are missing.
    Unseen {
        /// Who.
        guest: GuestId,
        /// Its command.
        id: CommandId,
    },
    /// A guest's controller was disabled (CSTS.RDY fell) and nothing of before can touch the media any more.
    Disabled {
        /// Who.
        guest: GuestId,
    },
    /// A controller has fetched commands since the last time.
    Fetched {
        /// Where.
        side: Side,
        /// The guest whose controller it is.
        guest: GuestId,
    },
    /// A guest's slot was pointed at the controller of that side.
    Pointed {
        /// Who.
        guest: GuestId,
        /// Where to.
        side: Side,
    },
    /// A side's fence was raised or lowered.
    Fence {
        /// Which side.
        side: Side,
        /// It is up.
        up: bool,
    },
    /// A management controller was sent an admin command.
    Admin {
        /// Its side.
        side: Side,
        /// The command as the controller gets it.
        command: SubmissionEntry,
    },
    /// A management controller has answered an admin command, as its driver sees it.
    AdminEnded {
        /// Its side.
        side: Side,
        /// The command.
        command: SubmissionEntry,
        /// The answer.
        completion: CompletionEntry,
    },
    /// A management controller reports an asynchronous event, as its driver sees it (DW0 of the completion).
    AsyncEvent {
        /// Its side.
        side: Side,
        /// Dword 0.
        dword0: u32,
    },
    /// A management controller was reset (CC.EN fell).
    ManagementReset {
        /// Its side.
        side: Side,
    },
    /// A new entry is in a controller data queue, as the host sees it.
    CdqEntry {
        /// The side of the management controller.
        side: Side,
        /// The queue (CDQID).
        cdqid: u16,
        /// The controller (CNTLID) whose changes it reports.
        cntlid: u16,
        /// Its place in the ring.
        slot: u32,
        /// The entry.
        bytes: [u8; 32],
    },
    /// The memory of a controller data queue that was not deleted is not mapped any more: its driver has given up the
    /// controller without reaching it, and what is posted from now on goes nowhere.
    CdqUnmapped {
        /// The side of the management controller.
        side: Side,
        /// The queue (CDQID).
        cdqid: u16,
    },
    /// An operation has begun on a side's media.
    MediaBegan {
        /// Where.
        side: Side,
        /// Counts the operations of a side.
        serial: u64,
        /// What.
        op: dray_device::backing::BackingOp,
        /// The namespace (NSID).
        nsid: u32,
        /// First block.
        slba: u64,
        /// Blocks.
        blocks: u64,
    },
    /// An operation on a side's media has ended.
    MediaEnded {
        /// Where.
        side: Side,
        /// Which.
        serial: u64,
        /// How.
        status: Status,
    },
    /// A migration begins.
    Begins {
        /// The side that serves.
        from: Side,
        /// The side that shall.
        to: Side,
    },
    /// A record is being written: nothing may rely on it yet.
    RecordBegun(Record),
    /// The journal says that the record is durable.
    RecordDurable(Record),
    /// The journal says that it is not, or not certainly.
    RecordFailed(Record),
    /// Behind the "moved" record, before the destination's controllers run: the two sides' media, compared block by block.
    HandedOver {
        /// The namespace (NSID).
        nsid: u32,
        /// Blocks that differ, marked uncorrectable ones left out.
        different: Vec<u64>,
    },
    /// A migration has ended.
    Over {
        /// How.
        outcome: Outcome,
    },
    /// The power of the whole machine went; guests, controllers and the process are gone.
    PowerCut,
    /// The power of one side's disks went, and its management controller was reset.
    SidePowerCut {
        /// Which.
        side: Side,
    },
    /// The process has started again and decided by the records who serves.
    Restarted {
        /// Who.
        serving: Side,
    },
    /// At rest: what a namespace's blocks contain at the side that serves.
    Rest {
        /// The namespace (NSID).
        nsid: u32,
        /// The side that serves.
        side: Side,
        /// One value per block, decoded.
        values: Vec<CommandId>,
    },
    /// A fault was injected or reached; for the trace.
    Fault(&'static str),
}

/// An event and when it happened.
#[derive(Clone, Debug)]
pub struct Stamped {
    /// When.
    pub at: Time,
    /// What.
    pub event: Event,
}

/// A block of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// NSID.
    pub nsid: u32,
    /// The block.
    pub lba: u64,
}

/// What an oracle objects to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {what}")]
pub struct Violation {
    /// The rule, in a few words.
    pub rule: &'static str,
    /// What happened, in the field's terms.
    pub what: String,
    /// The block that shows it, if one does.
    pub place: Option<Place>,
}
