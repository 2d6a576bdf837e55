//! A software NVMe subsystem: what Dray puts before a virtual machine.
//!
//! **What it does.** One migration management controller and up to 64 migratable ones over shared or private namespaces, in
//! memory ([`MemoryBacking`]) or a file ([`FileBacking`]). Registers, CC.EN and doorbells are polled; PRPs and SGLs; the I/O
//! commands Read, Write, Flush, Write Zeroes, DSM deallocate, Compare, Verify, Copy, Write Uncorrectable; Identify, features,
//! log pages, asynchronous events, Abort; interrupts by event line with coalescing, or by the pin. For live migration: controller data queues
//! that log every change of the media, suspend with drain, controller state out and in, tracking of written host memory, and a
//! limit on a guest's commands (vendor feature C0h). For a media move: the backing of a namespace is exchanged while its
//! controllers are kept from fetching, and stay before their guests.
//!
//! **How it is driven.** A [`Subsystem`] has one owner, who polls it. Slots are pointed at its controllers
//! ([`Subsystem::plug`]); everything else goes through their admin queues, as with a drive.
//!
//! **What is fixed at start.** Queues, commands under way, jobs, segments, ranges: see [`SubsystemConfig`]. A command that
//! finds no room is not fetched. Commands never allocate, except a few admin commands.
//!
//! **What it does not do yet.** Fused operations, protection information, metadata, namespace management, Format, Sanitize,
//! reservations, weighted arbitration, bit buckets, queues that span mappings. Write Uncorrectable is offered
//! where every backing can keep marks (memory does, a file does not). Commands under way cannot be aborted, except those that work in steps. The
//! ranges of a Copy that overlap their target are copied chunk by chunk, so the outcome is what that gives.
//!
//! **For the simulator alone.** Behind the feature `deviations` a subsystem behaves, switch by switch, as devices that deviate
//! from the specification do, and uses the freedom that the specification leaves a data queue's producer.
//!
//! **Where to start reading.** [`subsystem`](Subsystem) polls controllers; `controller` is one of them; `io` is the hot path;
//! `udmq` is what a migration reads; `manage` and `restore` are the migration commands; `exchange` is the end of a media move.

mod admin;
mod attach;
mod backing;
mod config;
mod context;
mod controller;
mod deviations;
mod dptr;
mod engine;
mod exchange;
mod features;
mod interrupt;
mod io;
mod job;
mod limit;
mod lost;
mod manage;
mod memtrack;
mod namespace;
mod queue;
mod registers;
mod restore;
mod shadow;
mod state;
mod subsystem;
mod udmq;

pub use backing::{CommandBacking, CommandBackingConfig, CommandBackingError, UsesMemory};
pub use backing::{FileBacking, FileBackingError, MemoryBacking, MemoryBackingError, NullBacking, SizeError};
pub use config::{ConfigError, ControllerConfig, ControllerRole, MAX_NSID, NamespaceConfig, SubsystemConfig};
#[cfg(feature = "deviations")]
pub use deviations::{Deviation, Deviations, UdmqFreedom};
pub use engine::ControllerCounters;
pub use exchange::{ExchangeError, Refused};
pub use state::{
    ControllerState, CqSnapshot, Features, MAX_AERS, MAX_STATE_BYTES, MAX_STATE_QUEUES, MAX_VECTORS, SqSnapshot, StateFormats, VENDOR_UUID,
    VendorState, decode, encode,
};
pub use subsystem::Subsystem;

#[cfg(all(test, loom))]
mod loom_tests;
