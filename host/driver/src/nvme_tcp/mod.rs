//! The NVMe/TCP initiator: a remote subsystem's controller, reached over connected streams that its owner hands in.
//!
//! [`TcpInitiator`] owns the admin connection: it connects, authenticates, enables the controller, keeps it alive and takes
//! admin requests like [`Driver`](crate::Driver). [`TcpQueue`] is an I/O queue over a connection of its own and implements the
//! command seam, so that a remote namespace can be the source or the destination of a copy. [`DiscoveryReader`] reads what a
//! discovery controller knows.
//!
//! The target is not trusted: every PDU is checked against the command that it names, and one that breaks the rules ends the
//! connection with a [`TcpFault`]. With a connection the whole association ends: what is outstanding comes back as
//! [unknown](dray_device::command::Completion::unknown). The target may still be carrying such commands out until it has
//! noticed; [`TcpInitiator::quiet_at`] says when that is over. A command that is not answered in time ends the association too.
//!
//! **What it does not do yet.** TLS; more than one R2T at a time per command; metadata; Abort; reconnecting (the owner makes a
//! new initiator); data goes through one buffer of a connection's own on its way between socket and memory, because streams
//! take and give slices.
//!
//! **Where to start reading.** `receive.rs` (PDUs from bytes), `table.rs` (what is checked of each), `connection.rs`, then
//! [`controller`] and [`queue`].

mod connection;
pub mod controller;
pub mod discovery;
mod error;
mod handshake;
pub mod queue;
mod receive;
mod requests;
mod table;
#[cfg(test)]
mod tests;

pub use controller::{TcpInitiator, TcpQueueTicket, TcpState};
pub use discovery::DiscoveryReader;
pub use error::{TcpError, TcpFault};
pub use queue::TcpQueue;

use dray_nvme::auth::{DhGroup, Hash, Secret};
use dray_nvme::tcp::fabrics::CNTLID_DYNAMIC;
use dray_nvme::tcp::pdu::Digests;

/// The DH groups that are offered unless others are asked for.
const DEFAULT_GROUPS: [DhGroup; 3] = [DhGroup::Ffdhe3072, DhGroup::Ffdhe2048, DhGroup::Null];

/// What an initiator is set up with; fixed while it lives.
#[derive(Clone, Debug)]
pub struct TcpConfig {
    /// NQN of this host.
    pub host_nqn: String,
    /// HOSTID of this host, the same for all its associations.
    pub host_id: [u8; 16],
    /// NQN of the subsystem, or the discovery NQN.
    pub subsystem_nqn: String,
    /// CNTLID to ask for; FFFFh takes any.
    pub cntlid: u16,
    /// Entries of the admin queue, 32 to 1,024.
    pub admin_entries: u16,
    /// Asynchronous Event Requests kept outstanding; the controller's AERL and half the admin queue bound it.
    pub aers: u8,
    /// KATO, Keep Alive Timeout in milliseconds, 0 = none. A Keep Alive is sent each half of it.
    pub kato_ms: u32,
    /// Digests to use; a target that does not agree is refused.
    pub digests: Digests,
    /// The host's secret, for targets that want it to authenticate itself.
    pub secret: Option<Secret>,
    /// The controller's secret; with one, a target that does not authenticate itself is refused.
    pub controller_secret: Option<Secret>,
    /// Hashes for authentication, the favourite first; empty = all.
    pub hashes: Vec<Hash>,
    /// DH groups for authentication, the favourite first; empty = ffdhe3072, ffdhe2048, null. Larger ones compute for tens of
    /// milliseconds in a poll.
    pub groups: Vec<DhGroup>,
    /// Milliseconds for a connection to be made, authenticated and (of the admin queue) the controller be enabled.
    pub connect_timeout_ms: u32,
    /// Milliseconds that an admin command may take; 0 = any.
    pub admin_timeout_ms: u32,
    /// Milliseconds that an I/O command may take before the association is given up; 0 = any.
    pub io_timeout_ms: u32,
    /// I/O queues asked for (Number of Queues, feature 07h).
    pub io_queues: u16,
    /// Most bytes of data in one I/O command, whatever MDTS allows.
    pub max_transfer_bytes: usize,
    /// Most bytes of a write that go with the command, whatever IOCCSZ allows.
    pub in_capsule_bytes: usize,
}

impl TcpConfig {
    /// Defaults for a host and a subsystem, without authentication.
    #[must_use]
    pub fn new(host_nqn: &str, host_id: [u8; 16], subsystem_nqn: &str) -> Self {
        Self {
            host_nqn: host_nqn.to_owned(),
            host_id,
            subsystem_nqn: subsystem_nqn.to_owned(),
            cntlid: CNTLID_DYNAMIC,
            admin_entries: 32,
            aers: 4,
            kato_ms: 15_000,
            digests: Digests::new().with_header(true).with_data(true),
            secret: None,
            controller_secret: None,
            hashes: Vec::new(),
            groups: DEFAULT_GROUPS.to_vec(),
            connect_timeout_ms: 10_000,
            admin_timeout_ms: 60_000,
            io_timeout_ms: 30_000,
            io_queues: 8,
            max_transfer_bytes: 1 << 20,
            in_capsule_bytes: 16 << 10,
        }
    }
}
