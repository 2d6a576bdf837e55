//! The control socket of `dray run`: how a VM manager, or `dray status` and `dray migrate`, speak to the running appliance.
//!
//! The socket is `control.sock` in the state folder (`[core] state`), a Unix stream socket of mode 0600; whoever connects must
//! be the appliance's user or root. A client sends JSON objects, one a line (UTF-8, at most 4096 bytes with the line feed), and
//! gets JSON objects, one a line. Numbers are integers, times are in the unit of the key's end (`_us`, `_ms`), sizes in bytes.
//!
//! # Requests
//! Every request has `v` (the version of this protocol, 1), `id` (a number of the client's choice, 0 to 2⁵³ − 1, not in use by an
//! unanswered request of the same connection) and `do`. Keys that are not named here are refused, as are those of another
//! request.
//!
//! ```text
//! {"v":1, "id":1, "do":"status"}
//! {"v":1, "id":2, "do":"migrate", "from":"source", "to":"destination"}
//! {"v":1, "id":3, "do":"cancel"}
//! {"v":1, "id":4, "do":"lend-cdq", "subsystem":"source", "controller":2, "slots":1024}
//! {"v":1, "id":5, "do":"media-move", "subsystem":"source", "nsid":1, "to":"new.img"}
//! {"v":1, "id":6, "do":"device-move", "device":"drive", "controllers":[2], "namespaces":[1], "to":["device:far/1"], "state":"/srv/vm.state"}
//! ```
//!
//! # Answers
//! A request gets any number of events and then exactly one end, each with the request's `v` and `id`:
//!
//! ```text
//! {"v":1, "id":2, "event":{"kind":"migration", "migration":7, "phase":"copying", "round":0, "round_bytes":…, "round_total":…, …}}
//! {"v":1, "id":2, "ok":{"migration":7, "outcome":"moved", "downtime_us":…, …}}
//! {"v":1, "id":2, "error":{"code":"undone", "message":"…"}}
//! ```
//!
//! `id` is null in an error about a line that is no request. Ends of several requests come in any order. A client that does not
//! read loses events, never an end; one that lets ends pile up, or sends a longer line, is disconnected.
//!
//! | `code` | what it means |
//! |---|---|
//! | `bad-request` | the line is no request: not JSON, a key that is missing, unknown or of the wrong type, an `id` in use |
//! | `version` | `v` is another version of this protocol |
//! | `too-long` | the line is longer than 4096 bytes; the connection ends |
//! | `too-many` | too many connections (16; the connection ends) or unanswered requests on this one (4) |
//! | `forbidden` | another user; the connection ends |
//! | `no-such` | there is no such subsystem, namespace, controller, or nothing to cancel |
//! | `busy` | what is asked for is in use: a migration runs, a queue is lent, a management controller is exported |
//! | `refused` | it makes no sense now; the message says why |
//! | `failed` | it was tried and did not work; nothing has changed |
//! | `cancelled` | the migration was cancelled: the source serves, nothing is lost |
//! | `undone` | the migration was undone: the source serves, nothing is lost |
//! | `in-doubt` | nobody knows who serves: the guest is paused, an operator must look |
//! | `unsupported` | this build cannot do it |
//! | `stopping` | the appliance is stopping |
//!
//! # What each does
//! - **`status`**: `ok` is what runs: process, subsystems with their namespaces (and who serves them by the durable record) and
//!   controllers, exports with clients and counters, policies, the migration that runs and those that have ended (`kind`:
//!   "migration", "media-move", "departure", or "hand-over" for one that a client drives over vfio-user).
//! - **`migrate`**: moves all namespaces and migratable controllers of `from` to `to`, the two ends of `[migration]` in either
//!   direction; clients of the controllers stay connected. Events every 200 ms tell how far it is. It goes on when the
//!   connection ends: `status` tells of it then. Where both ends have clients of their own it is refused: their VM managers move them.
//! - **`cancel`**: cancels the migration that runs, whoever drives it; its own request ends with `cancelled`, or with `ok` if it was too late.
//! - **`lend-cdq`**: creates a user data migration queue for a migratable controller with the subsystem's management
//!   controller, starts logging into it, and lends it. The line with `ok` carries one descriptor (SCM_RIGHTS, with its first
//!   byte): a socket whose first message has the queue's memory (sealed, for reading) and event line; `LentReader` in
//!   `host/driver/src/lend.rs` is the other end. Closing that socket gives the queue back: logging stops, the queue is deleted.
//!   Until then no migration can begin there.
//! - **`media-move`**: exchanges the backing of a namespace for a copy in the file `to` while its controllers stay before their
//!   clients. `to` starts from the configuration's folder unless it is absolute. It must not be there (it is made, and removed
//!   again if the move is undone), or it has been this namespace's before, or it is a block device of the same size. Events, the
//!   end and `cancel` are as for `migrate`, with `kind` "media-move", `subsystem` and `nsid`; `from` and `to` are files. Afterwards
//!   and over restarts the copy serves, whatever `path` the configuration says. The old file is left as it is.
//! - **`device-move`**: moves `controllers` of the subsystem whose management controller is the [[device]] `device`, which other
//!   processes drive, and `namespaces`, all that they have, to `to` (namespaces of one device). The drive tracks them itself. At the
//!   end they are suspended, their state is in `state` (absolute; with several controllers `state.CNTLID`) and their namespaces are
//!   detached. Events, the end and `cancel` are as for `migrate`, with `kind` "departure", `device`, `controllers`, `namespaces` and
//!   `states`. Refused for a drive that cannot (HMLMS, TUDCS, Namespace Management), or that is known not to while another process
//!   has the controller's function.
//!
//! # Threads
//! The socket is served by mio on a thread of its own. Requests go from there to the appliance's main thread by a channel, and
//! answers come back by another; what concerns the polling core is handed to it by an atomic flag and a list that it looks at
//! only when the flag is up, so that its hot path has one load of all this.

pub mod client;
pub mod protocol;
pub mod server;

use crate::config::Config;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// The version of the protocol.
pub const VERSION: u64 = 1;
/// Most bytes of a request's line, its line feed included.
pub const MAX_LINE: usize = 4096;

/// Where the control socket of a configuration is.
#[must_use]
pub fn socket_path(config: &Config) -> PathBuf {
    config.path(&config.file.core.state).join("control.sock")
}

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// What runs.
    Status,
    /// Start a migration.
    Migrate {
        /// The subsystem that is left.
        from: String,
        /// The subsystem that is moved to.
        to: String,
    },
    /// Cancel the migration.
    Cancel,
    /// Lend a controller data queue.
    LendCdq {
        /// The subsystem.
        subsystem: String,
        /// The migratable controller that is logged.
        controller: u16,
        /// Slots of the queue; the configuration's `cdq-slots` without it.
        slots: Option<u32>,
    },
    /// Move controllers of a device that others drive, and their namespaces.
    DeviceMove {
        /// The device: the management controller.
        device: String,
        /// CNTLIDs of the controllers that leave.
        controllers: Vec<u16>,
        /// NSIDs of all their namespaces.
        namespaces: Vec<u32>,
        /// Where each goes: `device:NAME/NSID`.
        to: Vec<String>,
        /// The file that the controller's state is written to.
        state: PathBuf,
    },
    /// Exchange a namespace's backing.
    MediaMove {
        /// The subsystem.
        subsystem: String,
        /// The namespace.
        nsid: u32,
        /// The file of the copy.
        to: PathBuf,
    },
}

/// What an error is, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// No request.
    BadRequest,
    /// Another version.
    Version,
    /// A line that is too long.
    TooLong,
    /// Too many connections or requests.
    TooMany,
    /// Another user.
    Forbidden,
    /// It is not there.
    NoSuch,
    /// It is in use.
    Busy,
    /// It makes no sense now.
    Refused,
    /// It did not work.
    Failed,
    /// The migration was cancelled.
    Cancelled,
    /// The migration was undone.
    Undone,
    /// Nobody knows who serves.
    InDoubt,
    /// Not in this build.
    Unsupported,
    /// The appliance is stopping.
    Stopping,
}

impl ErrorCode {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::BadRequest,
        Self::Version,
        Self::TooLong,
        Self::TooMany,
        Self::Forbidden,
        Self::NoSuch,
        Self::Busy,
        Self::Refused,
        Self::Failed,
        Self::Cancelled,
        Self::Undone,
        Self::InDoubt,
        Self::Unsupported,
        Self::Stopping,
    ];

    /// As the protocol writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad-request",
            Self::Version => "version",
            Self::TooLong => "too-long",
            Self::TooMany => "too-many",
            Self::Forbidden => "forbidden",
            Self::NoSuch => "no-such",
            Self::Busy => "busy",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Undone => "undone",
            Self::InDoubt => "in-doubt",
            Self::Unsupported => "unsupported",
            Self::Stopping => "stopping",
        }
    }
}

/// An error as it goes over the socket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({})", code.name())]
pub struct ControlError {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl ControlError {
    /// An error in words.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// What a request is answered with.
#[derive(Debug)]
pub enum Reply {
    /// How far it is.
    Event(serde_json::Value),
    /// It is done; descriptors go along.
    Done(serde_json::Value, Vec<OwnedFd>),
    /// It is not.
    Failed(ControlError),
}

/// Whose request it is: the connection, and its `id` there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// The connection; never used again.
    pub client: u64,
    /// The request.
    pub id: u64,
}
