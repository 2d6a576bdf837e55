//! What is known of the machine, for the status page and whoever else asks.

use super::cmdline::Slot;
use super::net::NetworkView;
use serde::Serialize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How the appliance stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The machine comes up, or the appliance does.
    #[default]
    Starting,
    /// The appliance serves.
    Serving,
    /// The appliance ended by itself and is started again in a moment.
    Restarting,
    /// The appliance ended again and again: it is not started any more.
    GivenUp,
    /// The configuration is wrong: another one is waited for.
    WrongConfiguration,
    /// The state partition is not there or cannot be mounted.
    NoState,
    /// The machine stops.
    Stopping,
}

impl Phase {
    /// In words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Restarting => "the appliance ended and is started again",
            Self::GivenUp => "the appliance ended again and again, and is not started any more; `reload` on the console does",
            Self::WrongConfiguration => "the configuration is wrong: put another in place, then `reload` on the console or restart",
            Self::NoState => "not serving: the state partition cannot be used",
            Self::Stopping => "stopping",
        }
    }
}

/// What is known.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Known {
    /// How the appliance stands.
    pub phase: Phase,
    /// The host's name.
    pub host: String,
    /// The program's version.
    pub program: &'static str,
    /// The slot that was booted.
    #[serde(serialize_with = "letter")]
    pub slot: Option<Slot>,
    /// The version of the image.
    pub version: Option<u64>,
    /// Milliseconds from the kernel's start to PID 1's.
    pub kernel_ms: u64,
    /// Milliseconds from there until the appliance served first.
    pub serving_ms: Option<u64>,
    /// The configuration's file.
    pub configuration: String,
    /// What is wrong: with the configuration, the state partition, or the appliance.
    pub problem: Option<String>,
    /// How often the appliance ended by itself.
    pub restarts: u32,
    /// Where durable records are kept, in words.
    pub state: String,
}

fn letter<S: serde::Serializer>(slot: &Option<Slot>, serializer: S) -> Result<S::Ok, S::Error> {
    match slot {
        Some(slot) => serializer.serialize_char(slot.letter()),
        None => serializer.serialize_none(),
    }
}

/// What is known, shared. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Board {
    known: Arc<Mutex<Known>>,
    /// How the network stands.
    pub network: Arc<Mutex<NetworkView>>,
}

impl Board {
    /// Changes it.
    pub fn set(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.lock());
    }

    /// A copy.
    #[must_use]
    pub fn known(&self) -> Known {
        self.lock().clone()
    }

    /// A copy of the network's.
    #[must_use]
    pub fn network_view(&self) -> NetworkView {
        self.network.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
