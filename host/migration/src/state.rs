//! The state machine: which state a migration is in, and what turns it takes.
//!
//! ```text
//! Checking -> Opening -> Copying <-> SwitchingOver -> Completing -> Ended(Moved)
//!     |          |          |    undo     |
//!     +----------+----------+-------------+-> Undoing -> Ended(Undone), or back to Copying
//! ```
//!
//! What has to be taken back is not the state's to know: [`Footing`](crate::parts::Footing) has it, so that there is one way
//! back from everywhere.

use crate::check::Checking;
use crate::open::Opening;
use crate::reason::Reason;
use crate::report::Outcome;
use crate::rounds::Rounds;
use crate::switch::Switch;
use crate::undo::{Completing, Undoing};

/// Where a migration stands.
#[derive(Debug)]
pub(crate) enum State {
    /// Whether the move can be made at all.
    Checking(Checking),
    /// Queues, logging, policies.
    Opening(Opening),
    /// Rounds.
    Copying(Box<Rounds>),
    /// The guest is handed over.
    SwitchingOver(Box<Switch>),
    /// The destination serves; the source is cleaned up.
    Completing(Completing),
    /// The way back.
    Undoing(Box<Undoing>),
    /// Nothing more happens.
    Ended(Outcome),
}

/// What a state's poll says.
pub(crate) enum Turn {
    /// Poll again.
    Stay,
    /// Another state.
    Next(State),
    /// Undo everything.
    Back(Reason),
    /// Undo the switch-over; try again if attempts are left.
    Retry(Reason),
    /// Nobody knows who serves.
    Doubt(Reason, String),
    /// It is over.
    End(Outcome),
}

/// The state's name, for whoever watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Whether the move can be made at all.
    Checking,
    /// Queues, logging, policies.
    Opening,
    /// Rounds.
    Copying,
    /// The guest is handed over.
    SwitchingOver,
    /// The destination serves; the source is cleaned up.
    Completing,
    /// The way back.
    Undoing,
    /// Over: see the report's outcome.
    Ended,
}
