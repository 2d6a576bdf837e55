//! What must hold, whatever happens: judged from the events alone, by code that shares nothing with what makes them.
//!
//! [`model`] knows what every block may contain, and what a power cut may leave of it. [`serving`] knows which side may take
//! commands. [`protocol`] knows the order of the log's entries, copies, flushes, records and admin commands. [`queues`] knows
//! that what a controller posts is found. Each can be read by itself.

pub mod copies;
pub mod log;
pub mod model;
pub mod protocol;
pub mod queues;
pub mod serving;

use super::event::{Event, Place, Violation};
use dray_device::poll::Time;

/// What the oracles know of a scenario before it begins.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The seed, which decides what blocks contain before any command.
    pub seed: u64,
    /// The namespaces: NSID, blocks, bytes of a block.
    pub namespaces: Vec<(u32, u64, u32)>,
    /// The media has a volatile write cache.
    pub cached: bool,
}

/// All oracles.
#[derive(Debug)]
pub struct Oracles {
    serving: serving::Serving,
    model: model::Model,
    protocol: protocol::Protocol,
}

impl Oracles {
    /// Before anything has happened.
    #[must_use]
    pub fn new(facts: &Facts) -> Self {
        let (serving, model) = (serving::Serving::default(), model::Model::new(facts));
        Self { serving, model, protocol: protocol::Protocol::new(facts) }
    }

    /// Something happened.
    ///
    /// # Errors
    /// What must not be.
    pub fn see(&mut self, at: Time, event: &Event) -> Result<(), Violation> {
        queues::see(event)?;
        self.serving.see(event)?;
        self.model.see(event, self.serving.owner())?;
        self.protocol.see(at, event, &self.serving)
    }

    /// Nothing more will happen.
    ///
    /// # Errors
    /// What should have.
    pub fn finish(&mut self, _at: Time) -> Result<(), Violation> {
        self.protocol.finish()
    }
}

/// An objection. Only built when there is one.
#[cold]
fn violation(rule: &'static str, what: impl Into<String>) -> Violation {
    Violation { rule, what: what.into(), place: None }
}

/// An objection that a block shows.
#[cold]
fn violation_at(rule: &'static str, what: impl Into<String>, nsid: u32, lba: u64) -> Violation {
    Violation { rule, what: what.into(), place: Some(Place { nsid, lba }) }
}
