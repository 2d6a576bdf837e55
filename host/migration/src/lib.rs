//! Live migration of namespaces: the dirty map, the pump, the copy, and the state machine around them.
//!
//! **What it does.** A [`Migration`] moves namespaces, and the controllers that a guest drives, from one subsystem to another
//! while the guest writes. It owns both management controllers ([`Mmc`]), drains the controller data queues through the `cdq`
//! policy into the dirty map ([`pump`], [`dirty`], [`media`]), copies what is dirty in rounds that the `tracking` and `copy`
//! policies shape ([`copy`], [`extents`]), and switches over: suspend, last round, controller state, resume. From every state
//! there is a way back that leaves the source serving. A media move ([`media_move`]) does the same for namespaces whose
//! controllers stay before their guests, and exchanges the backing. A hand-over ([`hand_over`]) leaves the guest's side of the
//! switch-over to a VM manager. A departure ([`departure`]) is that of controllers that somebody else drives, and that nobody here
//! takes over. What policies leave out, the host adds; what they let lie, it drains.
//!
//! **The order that correctness rests on.** A block's dirty bit is cleared before its read is submitted, and nothing reads a
//! range whose last copy has not ended. A change during the copy is reported by a later entry and dirties the block again, so
//! the last writer always wins. A block counts as moved when the destination has flushed it; until then a second map remembers
//! it, and a destination that restarts gets it again. At the end the map is empty, the queues have shown their last entry, and
//! a durable record says "moved" before the destination may run.
//!
//! **What it does not do yet.** The stream to a peer (the [`Destination`] trait is its place), compression, tracking of guest
//! memory, going on with a copy after a restart (the record says who serves, see
//! [`recovery`]; what the destination has is copied again), reservations (a namespace that supports them is refused).
//!
//! **Where to start reading.** `state.rs` for the states, [`dirty`], then `rounds.rs` and `switch.rs`; `undo.rs` for the way
//! back.
#![forbid(unsafe_code)]

mod calls;
mod check;
pub mod config;
pub mod copy;
pub mod departure;
pub mod destination;
pub mod dirty;
pub mod extents;
pub mod hand_over;
pub mod hooks;
pub mod media;
pub mod media_move;
mod migration;
pub mod mmc;
mod open;
mod parts;
pub mod pump;
pub mod queue;
pub mod rate;
pub mod reason;
pub mod recovery;
mod relog;
pub mod report;
mod rounds;
mod state;
mod states;
mod switch;
#[cfg(test)]
mod tests;
mod undo;

pub use config::{Limits, MigrationConfig, PolicySettings};
pub use copy::{CopyConfig, Engine, OnMediaError};
pub use destination::{Destination, LocalDestination, LocalFeatures};
pub use departure::{DepartureIngredients, StateKeeper};
pub use dirty::DirtyMap;
pub use hand_over::HandOver;
pub use hooks::{EndId, FenceControl, GuestSample, GuestSlot, GuestView, Hooks, Journal, JournalError, Owner, Record, RecordPhase};
pub use media::Media;
pub use media_move::{BackingExchange, BackingQueue, BackingShelf, CopyGeometry, MediaIngredients};
pub use migration::{Ingredients, Migration};
pub use mmc::{DriverMmc, DriverQueue, Mmc};
pub use parts::Policies;
pub use pump::{Pump, PumpLimits};
pub use queue::{EntryQueue, QueueError};
pub use reason::{Reason, Refusal};
pub use recovery::{Contradiction, Recovery, recover};
pub use report::{Outcome, ProgressView, Report, Round, Step};
pub use state::Phase;
