//! What PID 1 keeps going beside the appliance, as the table `[image]` says: network, console, status page, watchdog, clock.
//!
//! Each has a thread of its own. When the configuration changes, those whose settings have changed are stopped and begun anew.

use super::appliance::set_environment;
use super::board::Board;
use super::bring_up::BringUp;
use super::console::{self, Host, Wire};
use super::journal::Journal;
use super::loader::{self, Loader};
use super::net::Network;
use super::reaper::Reaper;
use super::status::Page;
use super::status::http::{self, Answer, Pages};
use super::supervisor::Event;
use super::watchdog::{self, Pulse};
use super::{power, time};
use crate::config::Config;
use crate::config::image::Image;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a line of the console may be missing before it is looked for again.
const CONSOLE_LOOK: Duration = Duration::from_secs(1);

/// A thread that is told when to stop, and what it was started for.
struct Kept<K> {
    wanted: K,
    stop: Arc<AtomicBool>,
}

/// What is kept going.
pub struct Services {
    journal: Journal,
    board: Board,
    reaper: Reaper,
    events: Sender<Event>,
    program: PathBuf,
    loader: Loader,
    debug: bool,
    /// The configuration in force.
    config: Arc<Mutex<Option<Arc<Config>>>>,
    /// PID 1's own.
    pub pulse: Pulse,
    network: Option<Network>,
    console: Option<Kept<String>>,
    status: Option<Kept<SocketAddr>>,
    watchdog: Option<Kept<Duration>>,
    clock: Option<Kept<Option<(String, u16)>>>,
}

impl Services {
    /// None yet.
    #[must_use]
    pub fn new(journal: &Journal, board: &Board, reaper: &Reaper, events: &Sender<Event>, program: &Path, up: &BringUp) -> Self {
        Self {
            journal: journal.clone(),
            board: board.clone(),
            reaper: reaper.clone(),
            events: events.clone(),
            program: program.into(),
            loader: up.loader.clone(),
            debug: up.line.debug,
            config: Arc::default(),
            pulse: Pulse::default(),
            network: None,
            console: None,
            status: None,
            watchdog: None,
            clock: None,
        }
    }

    /// Another configuration is in force, or none.
    pub fn set_config(&self, config: Option<Arc<Config>>) {
        *self.config.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = config;
    }

    /// Does what `[image]` says.
    pub fn apply(&mut self, image: &Image) {
        self.set_network(image);
        self.set_console(image.console.as_ref().map(|line| line.get_ref().clone()));
        self.set_status(image.status_address());
        self.set_watchdog(image.watchdog_time());
        self.set_clock(image.time_server());
    }

    /// Waits until the network has its address, but not for ever.
    #[must_use]
    pub fn wait_for_network(&self, patience: Duration) -> bool {
        self.network.as_ref().is_some_and(|network| network.wait(patience))
    }

    /// Takes no more commands.
    pub fn stop_console(&mut self) {
        self.set_console(None);
    }

    /// Watches the power button.
    pub fn watch_button(&self) {
        let (events, journal) = (self.events.clone(), self.journal.clone());
        self.spawn("dray-button", move || {
            power::watch_button(&|| {
                journal.say("the power button was pressed");
                drop(events.send(Event::Stop { restart: false }));
            });
        });
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) {
        if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(run) {
            self.journal.say(&format!("no thread {name}: {error}"));
        }
    }

    fn set_network(&mut self, image: &Image) {
        let (plan, name) = (image.network_plan(), image.host_name());
        if self.network.as_ref().is_some_and(|network| network.is(&plan, name)) {
            return;
        }
        if let Some(network) = self.network.take() {
            network.stop();
        }
        match Network::start(plan, name, &self.journal, &self.board.network) {
            Ok(network) => self.network = Some(network),
            Err(error) => self.journal.say(&format!("no network: {error}")),
        }
    }

    fn set_console(&mut self, wanted: Option<String>) {
        let Some((line, stop)) = changed(&mut self.console, wanted) else { return };
        let host = ConsoleHost {
            events: self.events.clone(),
            journal: self.journal.clone(),
            program: self.program.clone(),
            board: self.board.clone(),
            loader: self.loader.clone(),
            debug: self.debug,
        };
        let reaper = self.reaper.clone();
        self.spawn("dray-commands", move || serve_console(&Path::new("/dev").join(line), &host, &reaper, &stop));
    }

    fn set_status(&mut self, wanted: Option<SocketAddr>) {
        let Some((address, stop)) = changed(&mut self.status, wanted) else { return };
        let page = Page::new(&self.board, &self.journal, &self.config);
        let pages: Pages = Arc::new(move |path| {
            let (kind, body) = match path {
                "/" => ("text/plain; charset=utf-8", page.text()),
                "/status.json" => ("application/json", page.json()),
                _ => return None,
            };
            Some(Answer { status: "200 OK", kind, body })
        });
        let journal = self.journal.clone();
        self.spawn("dray-status", move || http::listen(address, &pages, &stop, &|line| journal.say(line)));
    }

    fn set_watchdog(&mut self, wanted: Option<Duration>) {
        let Some((time, stop)) = changed(&mut self.watchdog, wanted) else { return };
        let (board, config) = (self.board.clone(), Arc::clone(&self.config));
        let (pulse, journal) = (self.pulse.clone(), self.journal.clone());
        self.spawn("dray-watchdog", move || watchdog::run(time, &board, &config, &pulse, &journal, &stop));
    }

    fn set_clock(&mut self, server: Option<(String, u16)>) {
        let Some((server, stop)) = changed(&mut self.clock, Some(server)) else { return };
        let (network, journal) = (Arc::clone(&self.board.network), self.journal.clone());
        self.spawn("dray-clock", move || time::run(server, &network, &journal, &stop));
    }
}

/// If something else is wanted than what is kept, that is told to stop; returns what is to be started then.
fn changed<K: PartialEq + Clone>(kept: &mut Option<Kept<K>>, wanted: Option<K>) -> Option<(K, Arc<AtomicBool>)> {
    if kept.as_ref().map(|kept| &kept.wanted) == wanted.as_ref() {
        return None;
    }
    if let Some(old) = kept.take() {
        old.stop.store(true, Ordering::Relaxed);
    }
    let (wanted, stop) = (wanted?, Arc::new(AtomicBool::new(false)));
    *kept = Some(Kept { wanted: wanted.clone(), stop: Arc::clone(&stop) });
    Some((wanted, stop))
}

/// What the console asks for, as events.
struct ConsoleHost {
    events: Sender<Event>,
    journal: Journal,
    program: PathBuf,
    board: Board,
    loader: Loader,
    debug: bool,
}

impl Host for ConsoleHost {
    fn stop(&self, restart: bool) {
        drop(self.events.send(Event::Stop { restart }));
    }

    fn reload(&self) -> Result<String, String> {
        let (answer, answered) = channel();
        drop(self.events.send(Event::Reload(answer)));
        answered.recv().unwrap_or_else(|_| Err("the machine is stopping".into()))
    }

    fn log(&self, lines: usize) -> Vec<String> {
        self.journal.tail(lines)
    }

    fn command(&self, words: &[String]) -> Command {
        // It may be about hardware, whose driver is loaded after the appliance was started.
        if !self.loader.wait_for_all(loader::PATIENCE) {
            self.journal.say("there are modules that are not loaded yet; the command does not wait for them any longer");
        }
        let mut command = Command::new(&self.program);
        set_environment(&mut command, self.debug);
        if !words.iter().any(|word| word == "--config" || word.starts_with("--config=")) {
            command.arg("--config").arg(self.board.known().configuration);
        }
        command.args(words);
        command
    }
}

/// Serves a line for as long as it is wanted; one that goes away is waited for.
fn serve_console(path: &Path, host: &ConsoleHost, reaper: &Reaper, until: &Arc<AtomicBool>) {
    let mut said = false;
    while !until.load(Ordering::Relaxed) {
        let served = console::open(path).and_then(|file| {
            said = false;
            console::serve(&Wire::new(file, Arc::clone(until)), host, reaper)
        });
        if let Err(error) = served
            && !std::mem::replace(&mut said, true)
        {
            host.journal.say(&format!("console {}: {error}; it is waited for", path.display()));
        }
        std::thread::sleep(CONSOLE_LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_changed_is_begun_anew() {
        let mut kept = None;
        let (_, first) = changed(&mut kept, Some(1)).expect("begun");
        assert!(changed(&mut kept, Some(1)).is_none() && !first.load(Ordering::Relaxed));
        let (_, second) = changed(&mut kept, Some(2)).expect("begun anew");
        assert!(first.load(Ordering::Relaxed) && !second.load(Ordering::Relaxed));
        assert!(changed(&mut kept, None).is_none() && second.load(Ordering::Relaxed));
    }
}
