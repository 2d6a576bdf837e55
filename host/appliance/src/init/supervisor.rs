//! What PID 1 does once the machine is up: it waits for what comes, and keeps the appliance running.

use super::appliance::{self, News, Running};
use super::backoff::Backoff;
use super::board::{Board, Phase};
use super::bring_up::{BringUp, Read, StatePlace};
use super::console::within;
use super::journal::Journal;
use super::reaper::Reaper;
use super::services::Services;
use super::steps::Steps;
use super::trial::{self, Trial};
use super::{mounts, power, since_kernel_start_ms};
use crate::config::Config;
use crate::config::device::{Device, Way};
use crate::config::export::{Export, ExportBy};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// How long a turn waits for something to come.
const LOOK: Duration = Duration::from_secs(1);
/// How long the network may take before the appliance is started without it.
const NETWORK_PATIENCE: Duration = Duration::from_secs(10);
/// For how many milliseconds modules that have time wait for the appliance: a watchdog must bark at one that never serves.
const HELD_MS: u64 = 10_000;
/// How long lines may take to get out at the end.
const FLUSH_PATIENCE: Duration = Duration::from_secs(3);

/// What comes.
pub enum Event {
    /// From an appliance, by its generation.
    Appliance(u64, News),
    /// The machine is to stop.
    Stop {
        /// And to start again.
        restart: bool,
    },
    /// The configuration is to be read again.
    Reload(Sender<Result<String, String>>),
}

/// PID 1 as it runs.
struct Supervisor {
    up: BringUp,
    journal: Journal,
    board: Board,
    reaper: Reaper,
    events: (Sender<Event>, Receiver<Event>),
    program: PathBuf,
    entry_ms: u64,
    steps: Steps,
    state: StatePlace,
    config_path: PathBuf,
    config: Option<Arc<Config>>,
    services: Services,
    running: Option<Running>,
    generation: u64,
    backoff: Backoff,
    restart_at: Option<Instant>,
    trial: Trial,
    /// What came while an end of the appliance was waited for.
    later: VecDeque<Event>,
}

/// Runs PID 1 until the power goes; `entry_ms` is when it began, since the kernel's start.
pub fn main(entry_ms: u64) -> ! {
    let failed = mounts::kernel_file_systems();
    let console: Box<dyn Write + Send> = match File::options().write(true).open("/dev/console") {
        Ok(file) => Box::new(file),
        Err(_) => Box::new(std::io::stderr()),
    };
    let journal = match Journal::start(console) {
        Ok(journal) => journal,
        // Without a thread nothing else will work either.
        Err(_) => power::off(true, &|line| eprintln!("dray: {line}"), &|| {}),
    };
    say_panics(&journal);
    for error in failed {
        journal.say(&error.to_string());
    }
    let mut supervisor = Supervisor::new(journal, entry_ms);
    guarded(|| supervisor.begin());
    loop {
        if !guarded(|| supervisor.turn()) {
            // The same again at once would be a busy loop.
            std::thread::sleep(LOOK);
        }
    }
}

/// Runs something; a panic ends it and nothing else.
fn guarded(run: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(run)).is_ok()
}

fn say_panics(journal: &Journal) {
    let to = journal.clone();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        to.say(&format!("an error of the program in its thread {}: {info}", thread.name().unwrap_or("main")));
    }));
    // As on a terminal without colours. It is set once, and nobody else sets it.
    let _set = miette::set_hook(Box::new(|_| {
        Box::new(miette::MietteHandlerOpts::new().color(false).unicode(false).terminal_links(false).width(120).build())
    }));
}

impl Supervisor {
    fn new(journal: Journal, entry_ms: u64) -> Self {
        let up = BringUp::new(&journal);
        let board = Board::default();
        board.set(|known| {
            known.program = env!("CARGO_PKG_VERSION");
            known.kernel_ms = entry_ms;
            known.slot = up.line.slot;
            known.version = up.line.version;
        });
        let (reaper, events) = (Reaper::default(), channel());
        let program = std::env::current_exe().unwrap_or_else(|_| "/init".into());
        let services = Services::new(&journal, &board, &reaper, &events.0, &program, &up);
        Self {
            board,
            reaper,
            events,
            program,
            entry_ms,
            steps: Steps::since(entry_ms),
            state: StatePlace::Nowhere("the machine is not up".into()),
            config_path: PathBuf::new(),
            config: None,
            services,
            running: None,
            generation: 0,
            backoff: Backoff::default(),
            restart_at: None,
            trial: Trial::new(&up.line, &journal),
            later: VecDeque::new(),
            up,
            journal,
        }
    }

    /// Brings the machine up.
    fn begin(&mut self) {
        let what = match (self.up.line.slot, self.up.line.version) {
            (Some(slot), Some(version)) => format!("slot {slot}, version {version}"),
            (Some(slot), None) => format!("slot {slot}"),
            (None, _) => "booted directly".into(),
        };
        self.journal.say(&format!("dray {} is PID 1: {what}", env!("CARGO_PKG_VERSION")));
        self.take_signals();
        self.services.watch_button();
        self.up.set_up_kernel();
        self.up.begin();
        self.steps.done("start", since_kernel_start_ms());
        self.up.find_partitions();
        self.steps.done("partitions", since_kernel_start_ms());
        let read = self.read();
        self.apply(&read);
        self.steps.done("configuration", since_kernel_start_ms());
        // Its driver takes longest: what does not need it comes before.
        self.state = self.up.mount_state(&self.board);
        self.trial.set_state(&self.state);
        if self.state == StatePlace::Partition {
            self.journal.keep_in(&Path::new(mounts::STATE_FOLDER).join("log"), read.image.log_bytes());
        }
        self.steps.done("state", since_kernel_start_ms());
        self.take_configuration(read.config);
    }

    fn read(&mut self) -> Read {
        self.config_path = self.up.config_path();
        self.board.set(|known| known.configuration = self.config_path.display().to_string());
        self.up.read_config(&self.config_path)
    }

    /// Does what a configuration's `[image]` says.
    fn apply(&mut self, read: &Read) {
        self.up.load_modules(&read.image, read.config.as_deref().ok());
        self.up.apply(&read.image, &self.board);
        self.services.apply(&read.image);
    }

    /// Starts the appliance on a configuration.
    fn take_configuration(&mut self, config: Result<Arc<Config>, String>) {
        match config {
            Ok(config) => {
                self.say_odd_state(&config);
                self.set_config(Some(config));
                self.board.set(|known| known.problem = None);
                self.start();
            }
            Err(text) => {
                self.up.settle();
                self.journal.say(&format!("the configuration {} is wrong:", self.config_path.display()));
                text.lines().for_each(|line| self.journal.line(line));
                self.journal.say(Phase::WrongConfiguration.words());
                self.set_config(None);
                self.board.set(|known| {
                    known.phase = Phase::WrongConfiguration;
                    known.problem = Some(text);
                });
                if self.trial.refused_configuration(&self.config_path) {
                    self.stop(true);
                }
            }
        }
    }

    fn set_config(&mut self, config: Option<Arc<Config>>) {
        self.services.set_config(config.clone());
        self.config = config;
    }

    /// Records that nobody would find after a restart are said.
    fn say_odd_state(&self, config: &Config) {
        let folder = config.path(&config.file.core.state);
        if !folder.starts_with(mounts::STATE_FOLDER) {
            let what = format!("[core] state = {} is not below {}", folder.display(), mounts::STATE_FOLDER);
            self.journal.say(&format!("{what}: durable records are lost when the power goes"));
        }
    }

    fn take_signals(&self) {
        use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
        let (reaper, events, journal) = (self.reaper.clone(), self.events.0.clone(), self.journal.clone());
        let taken = signal_hook::iterator::Signals::new([SIGCHLD, SIGINT, SIGTERM]).and_then(|mut signals| {
            std::thread::Builder::new().name("dray-signals".into()).spawn(move || {
                for signal in signals.forever() {
                    match signal {
                        SIGCHLD => reaper.collect(),
                        // Ctrl-Alt-Del.
                        SIGINT => drop(events.send(Event::Stop { restart: true })),
                        _ => drop(events.send(Event::Stop { restart: false })),
                    }
                }
                journal.say("signals are not taken any more");
            })
        });
        if let Err(error) = taken {
            self.journal.say(&format!("signals are not taken: {error}"));
        }
    }

    /// Starts the appliance, if everything is there for it.
    fn start(&mut self) {
        self.restart_at = None;
        let Some(config) = self.config.clone() else { return };
        if let StatePlace::Nowhere(why) = &self.state {
            self.up.settle();
            self.board.set(|known| {
                known.phase = Phase::NoState;
                known.problem = Some(why.clone());
            });
            if self.trial.bad("the state partition cannot be used") {
                self.stop(true);
            }
            return;
        }
        self.up.wait_for_modules(&config);
        self.steps.done("modules", since_kernel_start_ms());
        if needs_addresses(&config) {
            self.wait_for_network("the appliance starts without it");
        }
        self.generation += 1;
        let (generation, events) = (self.generation, self.events.0.clone());
        let tell = move |news| drop(events.send(Event::Appliance(generation, news)));
        self.board.set(|known| known.phase = Phase::Starting);
        let debug = self.up.line.debug;
        match appliance::start(&self.program, &self.config_path, debug, generation, &self.reaper, &self.journal, tell) {
            Ok(running) => self.running = Some(running),
            Err(error) => {
                self.journal.say(&format!("the appliance cannot be started: {error}"));
                self.failed(Duration::ZERO, &format!("it cannot be started: {error}"));
            }
        }
    }

    fn wait_for_network(&mut self, otherwise: &str) {
        if !self.services.wait_for_network(NETWORK_PATIENCE) {
            self.journal.say(&format!("the network is not up yet; {otherwise}"));
        }
        self.steps.done("network", since_kernel_start_ms());
    }

    /// The appliance ended by itself after so long.
    fn failed(&mut self, ran: Duration, how: &str) {
        self.up.loader.release();
        let wait = self.backoff.ended(ran);
        let failures = self.backoff.failures();
        self.restart_at = wait.map(|wait| Instant::now() + wait);
        let phase = if wait.is_some() { Phase::Restarting } else { Phase::GivenUp };
        self.journal.say(&match wait {
            Some(wait) => format!("the appliance {how}; it is started again in {:.1} s", wait.as_secs_f64()),
            None => format!("the appliance {how}, {failures} times in a row; it is not started any more"),
        });
        self.board.set(|known| {
            known.phase = phase;
            known.problem = Some(format!("the appliance {how}; what it said is in the log"));
            known.restarts = known.restarts.saturating_add(1);
        });
        if wait.is_none() && self.trial.bad("the appliance ends again and again") {
            self.stop(true);
        }
    }

    fn turn(&mut self) {
        self.services.pulse.beat();
        self.trial.tend();
        if since_kernel_start_ms() > self.entry_ms + HELD_MS {
            self.up.loader.release();
        }
        let now = Instant::now();
        if self.trial.is_late() && self.trial.bad(&format!("it does not serve in {} s", trial::PATIENCE.as_secs())) {
            self.stop(true);
        }
        if self.restart_at.is_some_and(|at| at <= now) {
            self.start();
        }
        let wait = self.restart_at.map_or(LOOK, |at| at.saturating_duration_since(now).min(LOOK));
        match self.later.pop_front().or_else(|| self.events.1.recv_timeout(wait).ok()) {
            Some(Event::Appliance(generation, news)) => self.hear(generation, &news),
            Some(Event::Stop { restart }) => self.stop(restart),
            Some(Event::Reload(answer)) => {
                // Whoever asked may have gone.
                let _gone = answer.send(self.reload());
            }
            None => {}
        }
    }

    fn hear(&mut self, generation: u64, news: &News) {
        let Some(running) = self.running.as_mut().filter(|running| running.generation == generation) else { return };
        match news {
            News::Ready => {
                running.ready = true;
                self.serving();
            }
            News::Ended(ended) => {
                let ran = running.since.elapsed();
                self.running = None;
                self.failed(ran, &ended.to_string());
            }
        }
    }

    fn serving(&mut self) {
        // Nobody is served by who cannot be reached.
        self.steps.done("appliance", since_kernel_start_ms());
        if self.board.known().serving_ms.is_none() {
            self.wait_for_network("the appliance serves whom it reaches");
        }
        self.up.settle();
        let now = since_kernel_start_ms();
        let after = now.saturating_sub(self.entry_ms);
        let mut first = false;
        self.board.set(|known| {
            known.phase = Phase::Serving;
            known.problem = None;
            first = known.serving_ms.is_none();
            known.serving_ms.get_or_insert(after);
        });
        if first {
            self.journal.say(&format!("serving after {after} ms (kernel {} ms): {}", self.entry_ms, self.steps));
        } else {
            self.journal.say("serving again");
        }
        self.trial.served(&self.config_path);
    }

    /// Stops the appliance and waits for its end.
    fn stop_appliance(&mut self) {
        self.restart_at = None;
        let Some(running) = self.running.take() else { return };
        let (events, later) = (&self.events.1, &mut self.later);
        running.stop(&self.reaper, &self.journal, &mut |patience| {
            let end = Instant::now() + patience;
            loop {
                match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    Ok(Event::Appliance(generation, News::Ended(_))) if generation == running.generation => return true,
                    Ok(other) => later.push_back(other),
                    Err(_) => return false,
                }
            }
        });
    }

    fn reload(&mut self) -> Result<String, String> {
        if self.up.line.config.is_none() {
            // What was written to the partition from outside is seen by a new mount alone.
            match mounts::unmount_config() {
                Ok(()) => self.up.mount_config(),
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => self.up.mount_config(),
                Err(error) => self.journal.say(&format!("the partition {} stays mounted: {error}", mounts::CONFIG)),
            }
        }
        let read = self.read();
        if let (Err(text), Some(_)) = (&read.config, &self.running) {
            let text = format!("{text}\nThe appliance goes on with the configuration that it has.");
            self.journal.say("the configuration was read again and is wrong; the appliance goes on with the one that it has");
            return Err(text);
        }
        self.stop_appliance();
        self.backoff = Backoff::default();
        self.apply(&read);
        self.take_configuration(read.config);
        let known = self.board.known();
        match known.problem {
            Some(problem) => Err(problem),
            None => Ok(format!("{} is in force", known.configuration)),
        }
    }

    fn stop(&mut self, restart: bool) {
        self.journal.say(if restart { "stopping, to restart" } else { "stopping" });
        self.board.set(|known| known.phase = Phase::Stopping);
        self.services.stop_console();
        self.stop_appliance();
        power::end_processes(&|| self.reaper.collect());
        self.journal.close_ring(FLUSH_PATIENCE);
        let journal = self.journal.clone();
        power::off(restart, &|line| journal.say(line), &|| flush(&journal))
    }
}

/// Whether an appliance needs the network to start: it listens at addresses of its own, or reaches for other machines.
fn needs_addresses(config: &Config) -> bool {
    let at_own = |export: &Export| export.address().is_none_or(|at| !at.ip().is_unspecified());
    let own = |export: &Export| *export.by.get_ref() == ExportBy::NvmeTcp && at_own(export);
    let away = |device: &Device| matches!(device.way(), Some(Way::NvmeTcp(_)));
    config.file.exports.iter().any(own) || config.file.devices.iter().any(away)
}

/// Everything that was said is on the console's line, or has had its time.
fn flush(journal: &Journal) {
    journal.flush_console(FLUSH_PATIENCE);
    within(FLUSH_PATIENCE, || {
        if let Ok(console) = File::options().write(true).open("/dev/console") {
            // Not every console is a serial line.
            let _none = rustix::termios::tcdrain(&console);
        }
    });
}
