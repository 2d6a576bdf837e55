//! The status page: what is known of the machine and its appliance, for a browser (`/`) and for programs (`/status.json`).
//!
//! It is read-only and for anyone who reaches it, so it is bounded in every way ([`http`]), and it is served by PID 1, so that it
//! is there when the appliance is not.

pub mod http;

use super::board::{Board, Known};
use super::journal::Journal;
use super::net::NetworkView;
use super::since_kernel_start_ms;
use crate::config::Config;
use crate::control::Request;
use crate::control::client::Client;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the appliance may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// An answer is good for so long: whoever asks more often is no burden to the appliance.
const FRESH: Duration = Duration::from_millis(500);
/// Lines of the log that are shown.
const LINES: usize = 50;

/// Asks the appliance for its status.
///
/// # Errors
/// In words.
pub fn ask(config: &Config, patience: Duration) -> Result<Value, String> {
    let asked = Client::connect(config).and_then(|mut client| client.ask(&Request::Status, patience));
    asked.map_err(|error| error.to_string())
}

/// What the page is made of. Cheap to clone.
#[derive(Clone)]
pub struct Page {
    board: Board,
    journal: Journal,
    /// The configuration in force.
    config: Arc<Mutex<Option<Arc<Config>>>>,
    last: Arc<Mutex<Option<(Instant, Value)>>>,
}

impl Page {
    /// A page of what is on the board.
    #[must_use]
    pub fn new(board: &Board, journal: &Journal, config: &Arc<Mutex<Option<Arc<Config>>>>) -> Self {
        Self { board: board.clone(), journal: journal.clone(), config: Arc::clone(config), last: Arc::default() }
    }

    fn appliance(&self) -> Value {
        let Some(config) = self.config.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return Value::Null };
        // Who comes while it is asked waits for the same answer.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, value)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return value.clone();
        }
        let value = ask(&config, PATIENCE).unwrap_or_else(|error| json!({ "error": error }));
        *last = Some((Instant::now(), value.clone()));
        value
    }

    /// The page for programs.
    #[must_use]
    pub fn json(&self) -> String {
        let (known, network) = (self.board.known(), self.board.network_view());
        let value = json!({
            "image": known, "network": network, "up_ms": since_kernel_start_ms(), "appliance": self.appliance(),
            "log": self.journal.tail(LINES),
        });
        format!("{value:#}\n")
    }

    /// The page for people.
    #[must_use]
    pub fn text(&self) -> String {
        let (known, network) = (self.board.known(), self.board.network_view());
        text(&known, &network, since_kernel_start_ms(), &self.appliance(), &self.journal.tail(LINES))
    }
}

fn text(known: &Known, network: &NetworkView, up_ms: u64, appliance: &Value, log: &[String]) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        let _infallible = writeln!(text, "{name:<14}{value}");
    };
    row("host", &known.host);
    row("state", known.phase.words());
    let slot = known.slot.map_or_else(|| "booted directly".into(), |slot| format!("slot {slot}"));
    let version = known.version.map_or_else(String::new, |version| format!(", version {version}"));
    row("image", &format!("dray {}, {slot}{version}", known.program));
    let serving = known.serving_ms.map_or_else(|| "not yet serving".into(), |ms| format!("serving {ms} ms after that"));
    row("boot", &format!("kernel {} ms, {serving}; up {} s", known.kernel_ms, up_ms / 1000));
    let or_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".into());
    let (address, router) = (or_none(&network.address), or_none(&network.gateway));
    row("network", &format!("{}: {address}, router {router}; {}", or_none(&network.link), network.state));
    row("configuration", &known.configuration);
    row("records", &known.state);
    if known.restarts > 0 {
        row("restarts", &known.restarts.to_string());
    }
    if let Some(problem) = &known.problem {
        let _infallible = writeln!(text, "\n{}", problem.trim_end());
    }
    if appliance.is_object() {
        text.push('\n');
        match appliance["error"].as_str() {
            Some(error) => {
                let _infallible = writeln!(text, "{error}");
            }
            None => text.push_str(&crate::cli::status_text(appliance)),
        }
    }
    text.push_str("\nlast lines:\n");
    for line in log {
        let _infallible = writeln!(text, "{line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::board::Phase;
    use crate::init::cmdline::Slot;

    #[test]
    fn the_page_says_what_is_wrong() {
        let known = Known {
            phase: Phase::WrongConfiguration,
            slot: Some(Slot::B),
            version: Some(7),
            problem: Some("line 3: no such key".into()),
            ..Known::default()
        };
        let page = text(&known, &NetworkView::default(), 1500, &Value::Null, &["[    1.000] x".into()]);
        for words in ["slot b, version 7", "configuration is wrong", "line 3: no such key", "not yet serving", "1.000] x"] {
            assert!(page.contains(words), "{page}");
        }
        let page = text(&known, &NetworkView::default(), 1500, &json!({ "error": "no appliance runs here" }), &[]);
        assert!(page.contains("no appliance runs here"), "{page}");
    }
}
