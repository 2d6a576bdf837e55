//! The NVMe/TCP target: a software controller before any host (NVMe/TCP Transport Specification 1.1, "TCP 1.1").
//!
//! A [`Target`] is polled; connections are given to it as byte streams ([`Target::accept`]). It is itself the guest of a slot:
//! queues and data buffers are its own memory in the slot's address space, a host's commands are written into its submission
//! queues, completions are read from its completion queues by phase tag. So whatever may happen to a slot's controller
//! (suspend, move, fence) happens under it unseen: commands wait.
//!
//! One host's association takes one of a subsystem's exported controllers, if it must authenticate: when it has, so that nobody
//! keeps another out by its name. The static parts ([`Limits`]) bound what it can hold.
//! What one client does wrong ends that client's connection, with a C2HTermReq where the transport asks for one, and counts
//! ([`Counters`]).
//!
//! `receive` cuts the byte stream into PDUs and checks them, `send` gathers what goes out, `front` is the guest side of the slot,
//! `association` the commands of a controller and `plan` what becomes of each, `fabrics` Connect and properties, `discovery` the discovery controller, `identify`
//! what is changed in the pages that the controller gives, `authentication` the step between Connect and everything else.
//!
//! Not here yet: TLS, Security Send and Receive, reservations, fused commands, metadata, more than one R2T per command at a time.
//! Start reading at `target`.

mod association;
mod authentication;
mod config;
mod connection;
mod counters;
mod discovery;
mod fabrics;
mod front;
mod identify;
mod plan;
mod receive;
mod send;
mod target;
#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use config::{AnaGroupConfig, DigestPolicy, ExportedSubsystem, HostAccess, Limits, TargetConfig, TargetError};
pub use target::Target;
