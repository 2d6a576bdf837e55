//! The polled NVMe driver: what owns a controller from the host's side, over any backing of the device seam.
//!
//! **What it does.** [`Driver`] brings one function up (reset, enable, identify, queue counts), keeps its admin queue and its
//! Asynchronous Event Requests, and creates queue pairs. [`QueuePair`] is the hot path: commands in, completions out, by
//! polling, without allocation or lock; it implements the command seam. [`CdqOwner`] owns a controller data queue: creates it,
//! hands out new entries by phase tag, gives slots back, arms the tail pointer trigger, and lends the queue to a second process
//! ([`LentReader`] is that process's end). [`nvme_tcp`] drives remote controllers, [`passthru`] those that the kernel's driver
//! owns, by io_uring (and, with the feature `kernel-cdq`, its controller data queues by what was proposed for the kernel).
//! [`mmc`] has the migration commands, [`quirks`] what is known of devices that deviate.
//!
//! Nothing here starts threads, sleeps or reads a clock: everything moves when it is polled, with the time as an argument. The
//! device is not trusted: a command identifier, queue head or status that it made up, a completion that comes twice, a fatal
//! status or registers of all ones end in a typed error ([`DriverError`]) and a controller reset, unless
//! [`Driver::forbid_reset`] says that suspended controllers depend on this one; then the failure is only reported.
//!
//! **What it does not do yet.** SGLs (data pointers are PRPs), metadata, namespaces with protection information, memory pages
//! other than 4 KiB, power states.
//!
//! **Where to start reading.** `ring.rs` (a submission and a completion queue in 200 lines), then [`queue`], then [`driver`]
//! and its state machine in `init.rs`, then [`cdq`].

pub mod admin;
pub mod cdq;
pub mod config;
mod drive;
pub mod driver;
mod entries;
pub mod error;
#[cfg(test)]
mod fake;
mod init;
mod iova;
#[cfg(feature = "kernel-cdq")]
pub mod kernel_cdq;
pub mod lend;
mod link;
pub mod mmc;
pub mod nvme_tcp;
mod orphans;
mod pairs;
pub mod passthru;
mod prp;
pub mod queue;
pub mod quirks;
mod requests;
mod ring;
mod sync;

pub use admin::{AdminAnswer, AdminData, Event, Ticket};
pub use cdq::{CdqConfig, CdqFormat, CdqOptions, CdqOwner, CdqState, GoneReason};
pub use config::{DriverConfig, QueuePairConfig};
pub use drive::drive;
pub use driver::{Driver, DriverState};
pub use error::{CdqError, DriverError, Fault};
pub use lend::{LendError, LentCdq, LentReader};
pub use pairs::PairTicket;
pub use queue::QueuePair;
pub use quirks::Quirks;

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(test)]
mod tests;
