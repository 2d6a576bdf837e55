//! Why a migration was refused or undone.

use crate::copy::CopyError;
use crate::media::GeometryError;
use crate::report::Step;
use dray_nvme::status::Status;

/// Why a migration is not begun (rule 5 and the sizes).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing to move.
    #[error("no controllers or no namespaces are named")]
    Empty,
    /// The management controller lacks something.
    #[error("the {side}'s management controller {what}")]
    Controller {
        /// Which side.
        side: &'static str,
        /// What it lacks.
        what: &'static str,
    },
    /// An admin command of the checks was refused.
    #[error("{command} at the {side} was refused: {status}")]
    Command {
        /// Which side.
        side: &'static str,
        /// Which command.
        command: &'static str,
        /// The status.
        status: Status,
    },
    /// A controller that is to be moved does not exist, or cannot reach a namespace that moves.
    #[error("controller {cntlid} of the {side} is not attached to namespace {nsid}")]
    NotAttached {
        /// Which side.
        side: &'static str,
        /// CNTLID.
        cntlid: u16,
        /// NSID.
        nsid: u32,
    },
    /// A controller outside the migration set can write a namespace that moves.
    #[error("controller {cntlid} can write namespace {nsid}, which moves, but is not in the migration set")]
    OtherWriter {
        /// CNTLID.
        cntlid: u16,
        /// NSID at the source.
        nsid: u32,
    },
    /// A departure: a controller that leaves has a namespace that does not, and would go on with it.
    #[error("controller {cntlid} has namespace {nsid} as well, which does not move: it would go on writing that")]
    OtherNamespace {
        /// CNTLID.
        cntlid: u16,
        /// NSID at the source.
        nsid: u32,
    },
    /// The destination's namespace is smaller.
    #[error("namespace {nsid} has {source_blocks} blocks, its destination only {destination_blocks}")]
    TooSmall {
        /// NSID at the source.
        nsid: u32,
        /// Blocks at the source.
        source_blocks: u64,
        /// Blocks at the destination.
        destination_blocks: u64,
    },
    /// The destination's namespace has other blocks.
    #[error("namespace {nsid} has blocks of {source_bytes} bytes, its destination of {destination_bytes}")]
    OtherBlocks {
        /// NSID at the source.
        nsid: u32,
        /// Bytes of a block at the source.
        source_bytes: u32,
        /// Bytes of a block at the destination.
        destination_bytes: u32,
    },
    /// Metadata is not moved.
    #[error("namespace {nsid} of the {side} has {bytes} bytes of metadata per block")]
    Metadata {
        /// Which side.
        side: &'static str,
        /// NSID.
        nsid: u32,
        /// Bytes.
        bytes: u16,
    },
    /// The namespace supports reservations, and one may be held.
    #[error("namespace {0} supports reservations, which cannot be moved")]
    Reservations(u32),
    /// A media move: the backing of the namespace cannot be exchanged for its copy.
    #[error("the backing of namespace {nsid} cannot be exchanged for its copy: {why}")]
    NotExchangeable {
        /// NSID.
        nsid: u32,
        /// In words.
        why: String,
    },
    /// The namespaces cannot be tracked.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The two sides have no format of the controller state in common.
    #[error("source and destination have no format of the controller state in common")]
    NoStateFormat,
    /// The drive's reports are a hint only, and the destination cannot compare.
    #[error("{0}, and the destination cannot compare: only trust = \"drive\" would allow this migration")]
    CannotCompare(String),
}

/// Why a migration was undone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The operator, or a signal, cancelled it.
    #[error("it was cancelled")]
    Cancelled,
    /// A hand-over: the VM manager took the guest back to the source.
    #[error("the guest was taken back")]
    TakenBack,
    /// It was not begun.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The copy cannot go on.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The source's management controller or its queues failed.
    #[error("the source: {0}")]
    Source(String),
    /// The destination's management controller failed and did not come back.
    #[error("the destination: {0}")]
    Destination(String),
    /// Namespaces were attached, detached or formatted meanwhile (rule 5).
    #[error("the {0}'s namespaces changed during the move")]
    NamespacesChanged(&'static str),
    /// The rounds do not come within the downtime budget.
    #[error("it does not converge: a switch-over would take {estimate_us} µs, the budget is {budget_us} µs")]
    NotConverging {
        /// The last estimate.
        estimate_us: u32,
        /// The budget.
        budget_us: u32,
    },
    /// The queue was full too often (rule 8).
    #[error("a controller data queue was full {0} times")]
    QueueFull(u32),
    /// The comparison of everything would take too long.
    #[error("{why}: comparing everything while suspended would take {estimate_us} µs, {allowed_us} µs are allowed")]
    CompareTooLong {
        /// Why it is needed.
        why: String,
        /// The estimate.
        estimate_us: u64,
        /// What is allowed.
        allowed_us: u64,
    },
    /// A step of the switch-over did not end as it must.
    #[error("switch-over, step {}: {what}", step.name())]
    SwitchOver {
        /// The step.
        step: Step,
        /// What happened.
        what: String,
    },
    /// A command of the set-up failed.
    #[error("{what}: {status}")]
    Command {
        /// Which command.
        what: &'static str,
        /// The status.
        status: Status,
    },
    /// The record could not be made durable.
    #[error("{0}")]
    Journal(String),
}
