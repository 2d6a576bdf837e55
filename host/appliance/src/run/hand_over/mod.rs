//! Migrations that VM managers drive through the vfio-user sockets of both ends.
//!
//! Both controllers of `[migration]` are exported, each in a slot of its own, and behind each export is a [`Driven`]: what the
//! states of VFIO mean here. The end that does not serve is behind its fence, whatever its client does.
//!
//! | state | at the end that serves | at the other |
//! |---|---|---|
//! | PRE_COPY | a migration begins; the reply comes when every change is tracked | refused |
//! | STOP | the client's hold on the fence, Suspend | nothing: it does not run |
//! | STOP_COPY | the hold; Suspend and the last round by the migration. The reply comes when the controller is drained, the stream when "moved" is durable | refused |
//! | RESUMING | refused | its controller waits for a stream |
//! | RESUMING → STOP | | the blob is checked, and set as the controller's state |
//! | → RUNNING | the migration is undone, or Resume, and the hold is let go | Resume by the migration: this end serves from now on |
//!
//! Who does what: the hooks ([`hooks`]) live with their server on the polling core, and so does the migration; they meet in
//! [`dray_migration::hand_over`]. What blocks (records, policies, bringing up a management controller) is the main thread's
//! ([`desk`]): hooks ask it by [`Ask`] and look for the answer when they are polled. The management controller of an end is one
//! driver for all of them ([`manager`]), since a second one would reset it, and with it every suspension and every log. The log
//! of written pages is in [`log`] and [`pages`], the blob in [`blob`], the two holds on a fence in [`gate`].
//!
//! **What ties the ends together.** The blob names the migration and a random token, and has the state that was told: what is
//! brought back must be all that, of the migration that runs. "Moved" is durable before the blob is told, so that a process that
//! is killed anywhere finds in its records which end serves, and builds the other one behind its fence.
//!
//! Not here: sets of several controllers (the configuration refuses them), ends in two processes.

mod blob;
pub(super) mod desk;
mod gate;
mod hooks;
mod log;
mod manager;
mod pages;

pub(super) use gate::{Gate, Gates};
pub(super) use hooks::Driven;
pub(super) use manager::SharedMmc;

use dray_export::hooks::HookError;
use dray_migration::{HandOver, Owner};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// One migration that is driven so.
#[derive(Debug)]
pub(super) struct Session {
    /// Its number in the records.
    pub(super) number: u64,
    /// What no blob of another one has.
    pub(super) token: [u8; 16],
    /// The end of `[migration]` that it goes from.
    pub(super) from: Owner,
    pub(super) hand_over: HandOver,
}

/// What hooks ask of the main thread.
pub(super) enum Ask {
    /// The driver of an end's management controller.
    Manager(Owner, Sender<Result<SharedMmc, HookError>>),
    /// A migration away from an end.
    Begin(Owner, Sender<Result<Arc<Session>, HookError>>),
}

/// What the hooks of both ends and the main thread share.
pub(super) struct Board {
    asks: Mutex<Sender<Ask>>,
    serving: Mutex<Owner>,
    session: Mutex<Option<Arc<Session>>>,
    stopping: AtomicBool,
}

impl Board {
    /// `serving` is by the records.
    pub(super) fn new(serving: Owner) -> (Arc<Self>, Receiver<Ask>) {
        let (asks, asked) = channel();
        let board = Self {
            asks: Mutex::new(asks),
            serving: Mutex::new(serving),
            session: Mutex::new(None),
            stopping: AtomicBool::new(false),
        };
        (Arc::new(board), asked)
    }

    fn ask(&self, ask: Ask) {
        // Nobody listens any more: then the sender in it goes, which is an answer too.
        let _unheard = self.asks.lock().unwrap_or_else(PoisonError::into_inner).send(ask);
    }

    /// The end of `[migration]` that serves.
    pub(super) fn serving(&self) -> Owner {
        *self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_serving(&self, end: Owner) {
        *self.serving.lock().unwrap_or_else(PoisonError::into_inner) = end;
    }

    /// The migration that runs.
    fn session(&self) -> Option<Arc<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_session(&self, session: Option<Arc<Session>>) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session;
    }

    /// From now on no client makes a controller run.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// The other end.
pub(super) fn other(end: Owner) -> Owner {
    match end {
        Owner::Source => Owner::Destination,
        Owner::Destination => Owner::Source,
    }
}
