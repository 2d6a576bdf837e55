//! What can go wrong, as types.

use dray_device::command::SubmitError;
use dray_device::memory::MemoryError;
use dray_device::space::SpaceError;
use dray_nvme::status::Status;

/// What a device did that no controller may do, or failed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A completion names a command that is not outstanding: invented, or completed twice.
    #[error("completion of command {cid:#06x}, which is not outstanding")]
    UnknownCommand {
        /// The identifier.
        cid: u16,
    },
    /// SQHD lies outside the commands that the doorbell has announced.
    #[error("completion with submission queue head {sqhd}, which is outside the commands submitted")]
    QueueHead {
        /// The head.
        sqhd: u16,
    },
    /// A command ended that SQHD says was never fetched.
    #[error("completion of command {cid:#06x} before it was fetched")]
    NotFetched {
        /// The identifier.
        cid: u16,
    },
    /// SQID is another queue's.
    #[error("completion for submission queue {sqid} in another queue's completion queue")]
    WrongQueue {
        /// The queue named.
        sqid: u16,
    },
    /// A status code type that the specification reserves (Base 2.3 §4.2.3).
    #[error("completion with a reserved status code type (status {status:#06x})")]
    ReservedStatus {
        /// The 15-bit status field.
        status: u16,
    },
    /// A command did not end, and did not end after it was aborted either.
    #[error("command {cid:#06x} timed out and could not be aborted")]
    TimedOut {
        /// The identifier.
        cid: u16,
    },
}

/// Why a driver, or a queue of it, failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// Registers read all ones: the function has gone.
    #[error("the function has gone (its registers read all ones)")]
    Gone,
    /// CSTS.CFS is set.
    #[error("the controller reports a fatal status (CSTS.CFS)")]
    Fatal,
    /// The controller never showed its capabilities.
    #[error("no controller behind the function within {ms} ms (CAP reads 0)")]
    Absent {
        /// Milliseconds waited.
        ms: u32,
    },
    /// CSTS.RDY did not follow CC.EN.
    #[error("CSTS.RDY did not become {} within {ms} ms", u8::from(*to))]
    ReadyTimeout {
        /// The value waited for.
        to: bool,
        /// Milliseconds waited.
        ms: u32,
    },
    /// CSTS.SHST did not report the end of a shutdown.
    #[error("the shutdown did not end within {ms} ms")]
    ShutdownTimeout {
        /// Milliseconds waited.
        ms: u32,
    },
    /// A command of the set-up was not answered in time.
    #[error("{command} was not answered in time")]
    NoAnswer {
        /// Which command.
        command: &'static str,
    },
    /// The controller lacks something that this driver needs.
    #[error("the controller is not supported: {0}")]
    Unsupported(&'static str),
    /// The device broke the rules of a queue.
    #[error("queue {qid}: {fault}")]
    Protocol {
        /// 0 = the admin queue.
        qid: u16,
        /// What it did.
        fault: Fault,
    },
    /// The device reset itself, or someone else did, behind the driver's back.
    #[error("the controller is no longer enabled (CSTS.RDY fell)")]
    Disabled,
    /// A command of the driver's own was refused.
    #[error("{command}: {status}")]
    Refused {
        /// Which command.
        command: &'static str,
        /// The controller's answer.
        status: Status,
    },
    /// The driver was reset, or stopped, before the thing was done.
    #[error("the controller was reset")]
    Reset,
    /// No memory, or no room in the address space.
    #[error("{0}")]
    Memory(String),
    /// No such doorbell: more queues than BAR0 has doorbells for.
    #[error("queue {qid} has no doorbell in BAR0")]
    NoDoorbell {
        /// The queue.
        qid: u16,
    },
}

impl From<MemoryError> for DriverError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}

impl From<SpaceError> for DriverError {
    fn from(error: SpaceError) -> Self {
        Self::Memory(error.to_string())
    }
}

/// Why something could not be done with a controller data queue.
#[derive(Debug, thiserror::Error)]
pub enum CdqError {
    /// The set-up makes no sense.
    #[error("a controller data queue cannot be set up so: {0}")]
    BadConfig(&'static str),
    /// The controller cannot have such a queue.
    #[error("the controller has no such controller data queues: {0}")]
    Unsupported(&'static str),
    /// No memory, or no room in the address space.
    #[error("{0}")]
    Memory(String),
    /// The admin queue did not take the command.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// More entries were to be given back than had been taken.
    #[error("{asked} entries were to be given back, {taken} had been taken")]
    NotTaken {
        /// Entries to give back.
        asked: u32,
        /// Entries taken and not given back.
        taken: u32,
    },
    /// The queue is not (or no longer) there.
    #[error("the controller data queue is not live")]
    NotLive,
    /// The queue is lent: its reader gives entries back.
    #[error("the controller data queue is lent to another reader")]
    Lent,
    /// The kernel's refusal of a descriptor or a socket.
    #[error("cannot lend the queue: {0}")]
    Lend(#[from] std::io::Error),
}

impl From<MemoryError> for CdqError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}

impl From<SpaceError> for CdqError {
    fn from(error: SpaceError) -> Self {
        Self::Memory(error.to_string())
    }
}
