//! What can go wrong with a remote controller, as types.

use dray_device::memory::MemoryError;
use dray_nvme::auth::AuthFailure;
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::status as fabrics;
use dray_nvme::tcp::pdu::FatalError;

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TcpFault {
    /// The target has closed it.
    #[error("the target has closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(std::io::ErrorKind),
    /// The target ended it with a C2HTermReq (TCP 1.1 §3.6.2.5).
    #[error("the target ended the connection: {fes} (information {fei:#x})")]
    Terminated {
        /// FES.
        fes: FatalError,
        /// FEI.
        fei: u32,
    },
    /// A PDU header has a value that its place does not allow.
    #[error("the target sent a PDU with an invalid header field at byte {offset}")]
    Header {
        /// Where in the header.
        offset: u32,
    },
    /// A PDU came where it may not come.
    #[error("the target sent a PDU out of sequence")]
    Sequence,
    /// The target and this host disagree on digests, or on the PDU format.
    #[error("the target does not agree to the connection's parameters (byte {offset} of ICResp)")]
    Parameters {
        /// Where in ICResp.
        offset: u32,
    },
    /// A header digest is wrong.
    #[error("a header digest is wrong")]
    HeaderDigest {
        /// The digest that came.
        came: u32,
    },
    /// A data digest is wrong.
    #[error("a data digest is wrong")]
    DataDigest,
    /// A PDU names a command that is not outstanding: invented, or ended before.
    #[error("a PDU for command {cid:#06x}, which is not outstanding")]
    UnknownCommand {
        /// CCCID or CID.
        cid: u16,
    },
    /// Data that was not asked for: the wrong way, behind the command's data, or twice.
    #[error("data of command {cid:#06x} is out of range, comes twice or goes the wrong way")]
    DataRange {
        /// CCCID.
        cid: u16,
    },
    /// A second R2T while the first is being served.
    #[error("more R2Ts for command {cid:#06x} at a time than were allowed")]
    TooManyR2ts {
        /// CCCID.
        cid: u16,
    },
    /// A command ended as a success without all of its data.
    #[error("command {cid:#06x} succeeded without all of its data")]
    ShortData {
        /// CID.
        cid: u16,
    },
    /// A status code type that the specification reserves (Base 2.3 §4.2.3).
    #[error("completion with a reserved status code type (status {status:#06x})")]
    ReservedStatus {
        /// The 15-bit status field.
        status: u16,
    },
    /// A command was not answered in time.
    #[error("command {cid:#06x} was not answered in time")]
    TimedOut {
        /// CID.
        cid: u16,
    },
    /// Another connection of the association has ended.
    #[error("another connection of the association has ended")]
    AssociationLost,
    /// This host has ended it.
    #[error("the connection was ended by this host")]
    Ended,
}

impl TcpFault {
    /// What a H2CTermReq says of it (FES and FEI); `None` where there is nothing to say or nobody to hear it.
    pub(super) fn report(self) -> Option<(FatalError, u32)> {
        Some(match self {
            Self::Header { offset } => (FatalError::INVALID_HEADER_FIELD, offset),
            Self::Parameters { offset } => (FatalError::UNSUPPORTED_PARAMETER, offset),
            Self::Sequence | Self::ShortData { .. } => (FatalError::SEQUENCE, 0),
            Self::HeaderDigest { came } => (FatalError::HEADER_DIGEST, came),
            Self::UnknownCommand { .. } | Self::ReservedStatus { .. } => (FatalError::INVALID_HEADER_FIELD, 8),
            Self::DataRange { .. } => (FatalError::DATA_OUT_OF_RANGE, 0),
            Self::TooManyR2ts { .. } => (FatalError::LIMIT_EXCEEDED, 0),
            _ => return None,
        })
    }
}

/// Why an initiator, or a queue of it, could not be set up or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TcpError {
    /// The set-up makes no sense.
    #[error("the initiator cannot be set up so: {0}")]
    BadConfig(&'static str),
    /// A connection ended.
    #[error("queue {qid}: {fault}")]
    Connection {
        /// 0 = the admin queue.
        qid: u16,
        /// Why.
        fault: TcpFault,
    },
    /// A command of the set-up was refused.
    #[error("{command}: {}", meaning(*status))]
    Refused {
        /// Which command.
        command: &'static str,
        /// The controller's answer.
        status: Status,
    },
    /// The target wants this host to authenticate itself, and there is no secret for it.
    #[error("the target requires authentication, and no secret is configured")]
    SecretNeeded,
    /// The target was to authenticate itself and did not offer to.
    #[error("the target was to authenticate itself and does not require authentication")]
    NotAuthenticated,
    /// The target wants a secure channel.
    #[error("the target requires a secure channel (TLS), which is not supported")]
    SecureChannelNeeded,
    /// Authentication failed.
    #[error("authentication: {0}")]
    Authentication(AuthFailure),
    /// It was not done in time.
    #[error("{0} was not done in time")]
    TimedOut(&'static str),
    /// The controller lacks something that this initiator needs.
    #[error("the controller is not supported: {0}")]
    Unsupported(&'static str),
    /// CSTS.CFS is set.
    #[error("the controller reports a fatal status (CSTS.CFS)")]
    Fatal,
    /// The initiator is not ready, or has no such queue left.
    #[error("no queue can be opened: {0}")]
    NoQueue(&'static str),
    /// The association was ended by its owner.
    #[error("the association was shut down")]
    Stopped,
    /// No memory.
    #[error("{0}")]
    Memory(String),
}

/// A status of the set-up: the codes of fabrics commands are those of I/O commands over again.
fn meaning(status: Status) -> String {
    let name = match status {
        _ if status.is(fabrics::INCOMPATIBLE_FORMAT) => "Connect Incompatible Format",
        _ if status.is(fabrics::CONTROLLER_BUSY) => "Connect Controller Busy",
        _ if status.is(fabrics::INVALID_PARAMETERS) => "Connect Invalid Parameters",
        _ if status.is(fabrics::RESTART_DISCOVERY) => "Connect Restart Discovery",
        _ if status.is(fabrics::INVALID_HOST) => "Connect Invalid Host",
        _ if status.is(fabrics::INVALID_QUEUE_TYPE) => "Invalid Queue Type",
        _ if status.is(fabrics::DISCOVER_RESTART) => "Discover Restart",
        _ if status.is(fabrics::AUTHENTICATION_REQUIRED) => "Authentication Required",
        _ => return status.to_string(),
    };
    format!("{name} (SCT {:X}h, SC {:02X}h)", status.sct().0, status.sc())
}

impl From<MemoryError> for TcpError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}
