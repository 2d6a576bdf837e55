//! The hand-over: a controller move whose switch-over is a VM manager's. The guest is behind another connection at the
//! destination, so no slot is pointed; the manager says when the guest is paused, carries the controllers' states over in its own
//! time, and says at the destination that the guest goes on.
//!
//! It is the migration's own state machine with another hold on it:
//!
//! | controller move | hand-over |
//! |---|---|
//! | rounds until the policy wishes to switch over, or the limits say so | rounds until [`HandOver::pause`]; no limit on rounds or time |
//! | last round | the same; it may take as long as it gets on, since the guest stands still anyway |
//! | states read, fence up, "moved" recorded | the same |
//! | slots pointed at the destination | the states are told ([`Stage::Told`]), without a time limit |
//! | states set | states set when they are brought back ([`HandOver::take`]), as often as that takes |
//! | Resume at the destination | Resume when the destination's manager says so ([`HandOver::run`]) |
//!
//! Until Resume is sent the manager may take the guest back ([`HandOver::take_back`]): then all is undone, as by a cancellation.
//! Since the record says "moved" from before the states are told, a crash leaves the destination as the one that serves; that is
//! why they are told behind it and not before.
//!
//! What the manager stops must not run again before the manager says so, whatever the migration does meanwhile: an attempt at the
//! switch-over that is undone resumes the source's controllers. So whoever calls [`HandOver::pause`] keeps a fence of its own
//! before them until it takes them back. [`FenceControl`](crate::FenceControl) is the place to combine the two.

use crate::report::Outcome;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How far a hand-over is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Checks, queues, logging.
    #[default]
    Opening,
    /// Every change is tracked, and copied in rounds.
    Copying,
    /// The source's controllers are suspended and drained; the last round goes on.
    Paused,
    /// "Moved" is durable, the destination has all media flushed, and the states can be had.
    Told,
    /// The states are being set at the destination.
    Taking,
    /// The destination's controllers have them, and wait.
    Taken,
    /// Resume is on its way to the destination.
    Resuming,
    /// The destination's controllers run.
    Serving,
    /// It is over.
    Ended(Outcome),
}

/// What the VM manager at the destination wants next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// These states are set, in the order of the configuration's controllers.
    Take(Vec<Vec<u8>>),
    /// Resume.
    Run,
}

#[derive(Debug, Default)]
struct Talk {
    stage: Stage,
    states: Vec<Vec<u8>>,
    wish: Option<Wish>,
    trouble: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    pause: AtomicBool,
    back: AtomicBool,
    talk: Mutex<Talk>,
}

/// Where a migration and whoever speaks for the VM managers meet. Clones are the same place.
#[derive(Clone, Debug, Default)]
pub struct HandOver {
    shared: Arc<Shared>,
}

impl HandOver {
    /// For one migration.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.shared.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is paused: suspend the source's controllers and copy the rest. Before everything is copied once, too.
    pub fn pause(&self) {
        self.shared.pause.store(true, Ordering::Release);
    }

    /// How far it is. After an attempt at the switch-over that was undone it is [`Stage::Copying`] again.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.talk().stage.clone()
    }

    /// The states of the source's controllers, in the order of the configuration, from [`Stage::Told`] until the end.
    #[must_use]
    pub fn states(&self) -> Option<Vec<Vec<u8>>> {
        let talk = self.talk();
        (!talk.states.is_empty()).then(|| talk.states.clone())
    }

    /// The destination's controllers are to take these states: [`Stage::Taken`] follows, or [`Stage::Told`] with a
    /// [`trouble`](Self::trouble). Only then, and when states were taken before, is there something to be taken.
    pub fn take(&self, states: Vec<Vec<u8>>) -> bool {
        let mut talk = self.talk();
        let may = matches!(talk.stage, Stage::Told | Stage::Taken) && !self.is_taken_back();
        if may {
            (talk.stage, talk.wish, talk.trouble) = (Stage::Taking, Some(Wish::Take(states)), None);
        }
        may
    }

    /// The destination's controllers have lost what they took: [`Stage::Told`] again, if nothing runs yet.
    pub fn forget(&self) {
        let mut talk = self.talk();
        if matches!(talk.stage, Stage::Taking | Stage::Taken) {
            (talk.stage, talk.wish) = (Stage::Told, None);
        }
    }

    /// The destination's controllers are to run: [`Stage::Serving`] follows, or [`Stage::Taken`] with a
    /// [`trouble`](Self::trouble). Not before they have their states, and not when the source was taken back.
    pub fn run(&self) -> bool {
        let mut talk = self.talk();
        let may = talk.stage == Stage::Taken && !self.is_taken_back();
        if may {
            (talk.stage, talk.wish, talk.trouble) = (Stage::Resuming, Some(Wish::Run), None);
        }
        may
    }

    /// The source is to serve again: everything is undone, and [`Stage::Ended`] follows. False when the destination may be
    /// running.
    #[must_use]
    pub fn take_back(&self) -> bool {
        let talk = self.talk();
        let may = !matches!(talk.stage, Stage::Resuming | Stage::Serving | Stage::Ended(_));
        if may {
            self.shared.back.store(true, Ordering::Release);
        }
        may
    }

    /// Why what the destination asked for last did not happen.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.talk().trouble.clone()
    }

    pub(crate) fn wants_pause(&self) -> bool {
        self.shared.pause.load(Ordering::Acquire)
    }

    pub(crate) fn is_taken_back(&self) -> bool {
        self.shared.back.load(Ordering::Acquire)
    }

    pub(crate) fn says(&self, stage: Stage) {
        let mut talk = self.talk();
        if matches!(stage, Stage::Opening | Stage::Copying | Stage::Paused | Stage::Ended(_)) {
            (talk.states, talk.wish) = (Vec::new(), None);
        }
        talk.stage = stage;
    }

    pub(crate) fn tell(&self, states: &[Vec<u8>]) {
        let mut talk = self.talk();
        talk.states = states.to_vec();
        talk.stage = Stage::Told;
    }

    pub(crate) fn wish(&self) -> Option<Wish> {
        self.talk().wish.take()
    }

    /// States were set: the destination waits with them, unless it has forgotten them or brought others meanwhile.
    pub(crate) fn taken(&self) {
        let mut talk = self.talk();
        if talk.stage == Stage::Taking && talk.wish.is_none() {
            talk.stage = Stage::Taken;
        }
    }

    /// What was asked for did not happen, and it is as it was before.
    pub(crate) fn refuse(&self, stage: Stage, why: String) {
        let mut talk = self.talk();
        // Something else may have been asked for meanwhile, but for what is under way: then that is what counts.
        if talk.wish.is_none() {
            (talk.stage, talk.trouble) = (stage, Some(why));
        }
    }
}
