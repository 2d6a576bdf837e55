//! The media move: the controllers stay before their guests, the backing of their namespaces is exchanged for the copy.
//!
//! It is the migration's own state machine with another end. Tracking, rounds, Suspend, last round and flush are those of a
//! controller move; then
//!
//! | controller move | media move |
//! |---|---|
//! | the source's controllers tell their state | nothing: they keep it |
//! | fence up, "moved" recorded | the same: the fence is what keeps the fetch gate shut |
//! | slots pointed at the destination, its controllers take the state | the backing is exchanged ([`BackingExchange`]) |
//! | Resume at the destination | fence down, Resume at the same controllers |
//!
//! **Why the gate is Suspend and fence, and nothing else.** Migration Send's Suspend (Base 2.3 §8.1.13) does what a fetch gate
//! has to: nothing more is fetched, what was fetched ends on the backing too, the log shows its last entry. The guest sees
//! nothing of it but the wait. What it does not do is last: the guest's own controller reset ends it. So the fence goes up
//! behind it, as in a controller move, and the controllers are asked whether they were suspended until then. From there on the
//! guest may reset as it likes: it is ready, and something fetched, when the fence is down. Downtime is from Suspend to the
//! completion of Resume, gate shut to gate open.
//!
//! **The record.** Its two ends are the backings: `from` the old one, `to` the copy; "fenced" means that the old one never
//! serves again. Everything in [`recovery`](crate::recovery) holds with that: only if every namespace of the set says "moved"
//! or "done" is the copy the namespace's backing after a restart, and else the old one is. The controllers are the same either
//! way, so after a restart none of them is built behind a raised fence. Until "moved" is durable the old backing has everything
//! that a guest was told is stable; from then on the copy has exactly the same until the gate opens, so that a crash at either
//! side of the exchange loses nothing. An undo between the two records that the old backing serves first, then exchanges back.
//! Records of media moves and those of controller moves name different things and are kept apart.
//!
//! **What is not copied.** Write protection, identity and features are the namespace's and the controllers', and stay.
//!
//! **Where to start reading.** [`MediaIngredients`], [`BackingExchange`]; [`desk`] for how the owner of the subsystem makes the
//! exchange; [`BackingQueue`] for a copy that is written without a controller before it.

pub mod desk;
mod nobody;
pub mod queue;

pub use desk::{Asker, Clerk, CopyOf, Declined};
pub use queue::{BackingQueue, BackingShelf, TakeError};

use crate::departure::Departure;
use crate::destination::Destination;
use crate::hand_over::HandOver;
use crate::hooks::{FenceControl, GuestSlot, GuestView, Hooks, Journal};
use crate::mmc::Mmc;
use crate::parts::Policies;
use dray_device::command::CommandQueue;
use dray_device::poll::Time;
use dray_device::space::AddressSpace;
pub(crate) use nobody::Nobody;

/// The size of the backing that a namespace's is exchanged for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyGeometry {
    /// Logical blocks.
    pub blocks: u64,
    /// Bytes of a logical block.
    pub block_bytes: u32,
}

/// How the namespaces' backings are exchanged: by whoever owns the subsystem, between two polls of it. One exchange is asked for
/// at a time, for all namespaces of the move.
pub trait BackingExchange: Send {
    /// The copy that the backing of a namespace (NSID at the source) is to be exchanged for. Asked before anything begins.
    ///
    /// # Errors
    /// In words, when there is none, or the namespace cannot have it: it would take away what guests were told.
    fn copy_of(&mut self, nsid: u32) -> Result<CopyGeometry, String>;

    /// Begins to exchange the backing of every namespace for its copy. All their controllers are kept from fetching, the copy
    /// is equal and flushed, and nothing is under way in it.
    fn exchange(&mut self);

    /// Begins to take it back: every namespace has its old backing afterwards, and the copy can be written again. It may come
    /// while an exchange is under way, after one that has failed, and where none was made; the end of the exchange is not told
    /// then.
    fn undo(&mut self);

    /// `Some` once, when what was begun last has ended. An exchange that fails may leave some backings exchanged: undo follows.
    fn poll(&mut self, now: Time) -> Option<Result<(), String>>;
}

/// What a media move is made of.
pub struct MediaIngredients {
    /// The management controller of the subsystem whose controllers stay.
    pub source: Box<dyn Mmc>,
    /// An I/O queue of it, to read the media.
    pub source_queue: Box<dyn CommandQueue>,
    /// The address space of that queue.
    pub source_space: AddressSpace,
    /// The controller that the copy is written through, if there is one that can be reset: it is when it fails. It needs not be
    /// a management controller. `None` for a [`BackingQueue`], or a destination that comes back by itself.
    pub destination: Option<Box<dyn Mmc>>,
    /// Where the media goes. The second NSID of [`MigrationConfig::namespaces`](crate::MigrationConfig::namespaces) is that of
    /// this destination; the second CNTLID of its controllers is not looked at.
    pub media: Box<dyn Destination>,
    /// The policies' seats.
    pub policies: Policies,
    /// The exchange.
    pub exchange: Box<dyn BackingExchange>,
    /// The durable record, of this kind of move alone.
    pub journal: Box<dyn Journal>,
    /// The fences of the controllers that stay: as [`Owner::Source`](crate::Owner::Source). The other end is never named. Here
    /// the source's is lowered behind "moved" as well, when the backing has been exchanged.
    pub fence: Box<dyn FenceControl>,
    /// The guest's figures.
    pub guest: Box<dyn GuestView>,
}

impl std::fmt::Debug for MediaIngredients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MediaIngredients").field("policies", &self.policies).finish_non_exhaustive()
    }
}

/// The slots of a media move: they stay where they are.
struct Still;

impl GuestSlot for Still {
    fn point_at_destination(&mut self, _cntlid: u16) {}
    fn point_at_source(&mut self, _cntlid: u16) {}
}

impl MediaIngredients {
    /// As those of any migration, and the exchange.
    pub(crate) fn split(self) -> (crate::Ingredients, Box<dyn BackingExchange>) {
        let hooks = Hooks { slot: Box::new(Still), journal: self.journal, fence: self.fence, guest: self.guest };
        let with = crate::Ingredients {
            source: self.source,
            source_queue: self.source_queue,
            source_space: self.source_space,
            destination: self.destination.unwrap_or_else(|| Box::new(Nobody)),
            media: self.media,
            policies: self.policies,
            hooks,
        };
        (with, self.exchange)
    }
}

/// Which kind of move it is.
pub(crate) enum Way {
    /// Media and controller state move.
    Controller,
    /// The controllers stay.
    Media(Box<dyn BackingExchange>),
    /// Media and controller state move, and a VM manager has both ends of the guest.
    HandOver(HandOver),
    /// Media moves, the controllers' state is kept, and nobody here takes them over.
    Departure(Departure),
}
