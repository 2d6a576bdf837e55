//! Migrations and media moves of the running appliance, as the main thread has them: begun, watched, ended.

use super::Place;
use super::core::{Mailbox, Order};
use super::departure::Leaving;
use super::fronts::{Pair, Unknown, Way};
use super::hand_over::{self, Session};
use super::media::{Kept, Prepared, Wish, prepare};
use crate::config::Config;
use crate::control::server::Outbox;
use crate::control::{Asker, ControlError, ErrorCode, Reply};
use crate::core::clock::{Clock, unix_seconds};
use crate::core::jobs::Worker;
use crate::core::records::RecordJournal;
use crate::moving::{Board, Plan, ingredients, migration_config, mmc_driver, reader};
use crate::policies;
use crate::recovery::Records;
use crate::store::entry::{MigrationEntry, MoveKind};
use crate::store::keep::{Keeper, nguid};
use dray_device::space::AddressSpace;
use dray_migration::{
    Hooks, LocalDestination, MediaIngredients, Migration, Outcome, Owner, Policies, ProgressView, Reason, Report,
};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the core may take over an answer.
pub(super) const CORE_PATIENCE: Duration = Duration::from_secs(2);
/// How often whoever asked for a migration hears of it.
const EVENT_EVERY: Duration = Duration::from_millis(200);
/// Migrations that have ended and are shown.
const KEPT: usize = 16;

/// What a migration is begun with.
pub(super) struct Surroundings<'a> {
    pub(super) config: &'a Config,
    pub(super) clock: Clock,
    pub(super) mailbox: &'a Mailbox,
    /// The two ends of `[migration]`.
    pub(super) ends: [&'a Place; 2],
    pub(super) pairs: &'a [Pair],
    /// Seats that the start made; the first migration takes them.
    pub(super) seats: &'a mut Option<(policies::Seats, policies::PolicyHost)>,
}

/// What a media move is begun with.
pub(super) struct MediaSurroundings<'a> {
    pub(super) config: &'a Config,
    pub(super) clock: Clock,
    pub(super) mailbox: &'a Mailbox,
    pub(super) places: &'a [Place],
    pub(super) seats: &'a mut Option<(policies::Seats, policies::PolicyHost)>,
}

/// What moves.
pub(super) enum Kind {
    /// Controllers and their media, between the ends of `[migration]`.
    Controllers { back: bool, names: [String; 2] },
    /// The media behind controllers that stay.
    Media(Box<Kept>),
    /// Controllers of a device that others drive, and their media.
    Departure(Box<Leaving>),
    /// As the first, driven by the client of the end that serves.
    HandOver { names: [String; 2], session: Arc<Session>, board: Arc<hand_over::Board> },
}

impl Kind {
    /// For programs.
    fn name(&self) -> &'static str {
        match self {
            Self::Controllers { .. } => "migration",
            Self::HandOver { .. } => "hand-over",
            Self::Media(_) => "media-move",
            Self::Departure(_) => "departure",
        }
    }

    /// Says in a value what moves.
    fn describe(&self, value: &mut Value) {
        let [from, to] = match self {
            Self::Controllers { names, .. } | Self::HandOver { names, .. } => names,
            Self::Media(kept) => {
                (value["subsystem"], value["nsid"]) = (json!(kept.subsystem), json!(kept.nsid));
                &kept.names
            }
            Self::Departure(leaving) => {
                let note = &leaving.note;
                (value["device"], value["controllers"]) = (json!(note.device), json!(note.controllers));
                value["namespaces"] = note.namespaces.iter().map(|one| one.nsid).collect();
                value["states"] = json!(note.states);
                &leaving.names()
            }
        };
        (value["kind"], value["from"], value["to"]) = (json!(self.name()), json!(from), json!(to));
    }

    /// What the history says of it.
    fn entry(&self, config: &Config) -> MigrationEntry {
        match self {
            Self::Controllers { names: [from, to], .. } | Self::HandOver { names: [from, to], .. } => {
                let mut nsids = namespaces(config, from).into_iter().map(|(nsid, _)| nsid);
                let nsid = nsids.next().unwrap_or_default();
                let nguid = nguid(config, from, nsid);
                let (from, to) = (from.clone(), to.clone());
                MigrationEntry { from, to, nsid, nguid, further: nsids.collect(), ..MigrationEntry::default() }
            }
            Self::Media(kept) => {
                let Kept { subsystem, nsid, names: [from, to], .. } = &**kept;
                let (kind, nguid) = (MoveKind::MediaMove, nguid(config, subsystem, *nsid));
                let (subsystem, from, to) = (Some(subsystem.clone()), from.clone(), to.clone());
                MigrationEntry { kind, subsystem, from, to, nsid: *nsid, nguid, ..MigrationEntry::default() }
            }
            Self::Departure(leaving) => {
                let [from, to] = leaving.names();
                let mut nsids = leaving.note.namespaces.iter().map(|one| one.nsid);
                let (kind, nsid) = (MoveKind::Departure, nsids.next().unwrap_or_default());
                MigrationEntry { kind, from, to, nsid, further: nsids.collect(), ..MigrationEntry::default() }
            }
        }
    }

    /// For people.
    pub(super) fn words(&self, number: u64) -> String {
        match self {
            Self::Departure(leaving) => format!("move {number} of {} to {}", leaving.note.words(), leaving.note.to()),
            Self::Controllers { names: [from, to], .. } => format!("migration {number} of {from} to {to}"),
            Self::HandOver { names: [from, to], .. } => format!("migration {number} of {from} to {to}, driven by a client,"),
            Self::Media(kept) => {
                let Kept { subsystem, nsid, names: [from, to], .. } = &**kept;
                let from = if from.is_empty() { "memory" } else { from };
                format!("media move {number} of {subsystem}:{nsid} from {from} to {to}")
            }
        }
    }

    /// Who serves when it is undone.
    fn old(&self) -> &'static str {
        match self {
            Self::Controllers { .. } | Self::HandOver { .. } => "the source serves",
            Self::Media(_) => "the old backing serves",
            Self::Departure(_) => "the controller goes on where it was",
        }
    }
}

/// A migration that runs.
struct Running {
    number: u64,
    kind: Kind,
    begun_s: i64,
    asker: Option<Asker>,
    told: Instant,
    history: Keeper,
    _policies: Vec<policies::PolicyHost>,
    _worker: Worker,
}

/// The migrations of this process.
pub(super) struct Migrations {
    board: Arc<Board>,
    running: Option<Running>,
    ended: VecDeque<Value>,
    serving: Owner,
    in_doubt: bool,
    /// Waits until the last one's end is durable in the history.
    noted: Option<JoinHandle<()>>,
}

pub(super) fn failed(what: &str, error: impl std::fmt::Display) -> ControlError {
    ControlError::new(ErrorCode::Failed, format!("{what}: {error}"))
}

impl Migrations {
    /// None yet; `serving` is by the records.
    pub(super) fn new(board: Arc<Board>, serving: Owner) -> Self {
        Self { board, running: None, ended: VecDeque::new(), serving, in_doubt: false, noted: None }
    }

    /// The end of `[migration]` that serves.
    pub(super) fn serving(&self) -> Owner {
        self.serving
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Begins a migration; whoever asked hears of it by and by.
    pub(super) fn start(&mut self, asker: Asker, names: [String; 2], with: Surroundings<'_>) -> Result<(), ControlError> {
        self.is_free()?;
        let back = self.way(&names, with.config)?;
        reclaim(with.mailbox)?;
        let (mut config, clock) = (with.config.clone(), with.clock);
        let [from, to] = if back { [with.ends[1], with.ends[0]] } else { with.ends };
        if back {
            let migration = &mut config.file.migration;
            std::mem::swap(&mut migration.from, &mut migration.to);
        }
        if from.migratable.len() != to.migratable.len() || from.migratable.is_empty() {
            let (a, b) = (from.migratable.len(), to.migratable.len());
            let message = format!("\"{}\" has {a} migratable controllers and \"{}\" has {b}", from.name, to.name);
            return Err(ControlError::new(ErrorCode::Refused, message));
        }
        let records = Records::open(&config).map_err(|error| failed("the records", error))?;
        let (policies, hosts) = seats(&config, clock, from.migratable.len(), with.seats)?;
        let worker = Worker::start().map_err(|error| failed("the job worker", error))?;
        let jobs = worker.jobs().ok_or_else(|| failed("the job worker", "it has ended"))?;
        let way = || Way { pairs: with.pairs.to_vec(), back };
        let plan = Plan {
            id: records.next_migration(),
            ends: records.ends(),
            controllers: way().controllers(),
            namespaces: namespaces(&config, &from.name),
            seed: clock.now().0 ^ records.next_migration(),
            max_bytes_per_s: 0,
        };
        let setup = migration_config(&config, plan);
        let number = setup.id;
        let hooks = Hooks {
            slot: Box::new(way()),
            fence: Box::new(way().fences()),
            guest: Box::new(Unknown),
            journal: Box::new(RecordJournal::new(records.into_stores(), Box::new(jobs))),
        };
        let driver = |place: &Place| mmc_driver(&config, &place.management.1).map_err(|error| failed("a management controller", error));
        let with = ingredients([driver(from)?, driver(to)?], clock, policies, hooks);
        let with = with.map_err(|error| failed("the migration cannot be set up", error))?;
        let migration = Migration::new(setup, with, clock.now()).map_err(|error| failed("the migration cannot be set up", error))?;
        let kept = (hosts, worker);
        self.begin(number, Box::new(migration), Kind::Controllers { back, names }, Some(asker), &config, kept);
        Ok(())
    }

    /// Hands a migration to the core.
    pub(super) fn begin(
        &mut self,
        number: u64,
        migration: Box<Migration>,
        kind: Kind,
        asker: Option<Asker>,
        config: &Config,
        (hosts, worker): (Vec<policies::PolicyHost>, Worker),
    ) {
        self.board.start(migration);
        let (told, begun_s) = (Instant::now(), unix_seconds());
        let history = Keeper::start(config, kind.entry(config));
        self.running = Some(Running { number, kind, begun_s, asker, told, history, _policies: hosts, _worker: worker });
    }

    /// Waits until the history has the end of the last one, a few seconds at most.
    pub(super) fn close(mut self) {
        // One that has not ended stands in the history as that.
        drop(self.running.take());
        if let Some(noted) = self.noted.take() {
            let _panicked = noted.join();
        }
    }

    /// Begins a media move; whoever asked hears of it by and by. What it is, in words.
    pub(super) fn start_media(&mut self, asker: Asker, wish: &Wish, with: MediaSurroundings<'_>) -> Result<String, ControlError> {
        self.is_free()?;
        self.serves(&wish.subsystem, with.config)?;
        reclaim(with.mailbox)?;
        let (config, clock) = (with.config, with.clock);
        let Prepared { record, begun: (id, ends), queue, asker: exchange, fences, controllers, mut kept, at } =
            prepare(config, with.places, with.mailbox, wish)?;
        let (policies, hosts) = seats(config, clock, controllers.len(), with.seats)?;
        let worker = Worker::start().map_err(|error| failed("the job worker", error))?;
        let jobs = worker.jobs().ok_or_else(|| failed("the job worker", "it has ended"))?;
        let plan = Plan {
            id,
            ends,
            controllers: controllers.into_iter().map(|cntlid| (cntlid, 0)).collect(),
            namespaces: vec![(wish.nsid, wish.nsid)],
            seed: clock.now().0 ^ id,
            max_bytes_per_s: 0,
        };
        let setup = migration_config(config, plan);
        let driver = mmc_driver(config, &with.places[at].management.1);
        let driver = driver.map_err(|error| failed("the management controller", error))?;
        let (source, source_queue, source_space) = reader(driver, clock).map_err(|error| failed("the management controller", error))?;
        let features = queue.features();
        let with_all = MediaIngredients {
            source,
            source_queue,
            source_space,
            destination: None,
            media: Box::new(LocalDestination::new(Box::new(queue), AddressSpace::default(), features)),
            policies,
            exchange: Box::new(exchange),
            journal: Box::new(RecordJournal::new(vec![record.into_store()], Box::new(jobs))),
            fence: Box::new(fences),
            guest: Box::new(Unknown),
        };
        let migration = Migration::media_move(setup, with_all, clock.now());
        let migration = migration.map_err(|error| failed("the media move cannot be set up", error))?;
        kept.begins();
        with.mailbox.put(Order::Attend(at, kept.clerk.clone()));
        let kind = Kind::Media(Box::new(kept));
        let words = kind.words(id);
        self.begin(id, Box::new(migration), kind, Some(asker), config, (hosts, worker));
        Ok(words)
    }

    /// An end of `[migration]` that does not serve has nothing to exchange.
    fn serves(&self, name: &str, config: &Config) -> Result<(), ControlError> {
        let migration = &config.file.migration;
        let (serving, other) = match self.serving {
            Owner::Source => (migration.from.get_ref(), migration.to.get_ref()),
            Owner::Destination => (migration.to.get_ref(), migration.from.get_ref()),
        };
        if name == other {
            let message = format!("\"{name}\" does not serve: \"{serving}\" does");
            return Err(ControlError::new(ErrorCode::Refused, message));
        }
        Ok(())
    }

    /// Whether another one may begin.
    pub(super) fn is_free(&self) -> Result<(), ControlError> {
        if let Some(running) = &self.running {
            let message = format!("{} runs", running.kind.words(running.number));
            return Err(ControlError::new(ErrorCode::Busy, message));
        }
        if self.in_doubt {
            let message = "a migration has ended in doubt: start the appliance again, so that the records decide";
            return Err(ControlError::new(ErrorCode::Refused, message));
        }
        Ok(())
    }

    /// Whether it goes back, or why it does not go.
    fn way(&self, names: &[String; 2], config: &Config) -> Result<bool, ControlError> {
        let migration = &config.file.migration;
        let (from, to) = (migration.from.get_ref(), migration.to.get_ref());
        for name in names {
            if config.subsystem(name).is_none() {
                return Err(ControlError::new(ErrorCode::NoSuch, format!("there is no subsystem \"{name}\"")));
            }
        }
        let back = match [&names[0], &names[1]] {
            pair if pair == [from, to] => false,
            pair if pair == [to, from] => true,
            _ => {
                let message = format!("[migration] of the configuration is between \"{from}\" and \"{to}\"");
                return Err(ControlError::new(ErrorCode::Refused, message));
            }
        };
        if back != (self.serving == Owner::Destination) {
            let message = format!("\"{}\" does not serve: \"{}\" does", names[0], names[1]);
            return Err(ControlError::new(ErrorCode::Refused, message));
        }
        Ok(back)
    }

    /// Cancels what runs.
    pub(super) fn cancel(&self) -> Result<Value, ControlError> {
        let none = || ControlError::new(ErrorCode::NoSuch, "no migration runs");
        let running = self.running.as_ref().ok_or_else(none)?;
        self.board.cancel();
        Ok(json!({ "migration": running.number }))
    }

    /// Looks whether it has ended, and tells whoever asked for it. What it says about an end is for the terminal.
    /// The configuration says afterwards which file serves.
    pub(super) fn tend(&mut self, mailbox: &Mailbox, outbox: &Outbox, config: &mut Config) -> Option<String> {
        let running = self.running.as_mut()?;
        if !self.board.has_ended() {
            if running.told.elapsed() >= EVENT_EVERY {
                running.told = Instant::now();
                if let Some(asker) = running.asker {
                    outbox.send(asker, Reply::Event(running.view(&self.board.view())));
                }
            }
            return None;
        }
        let running = self.running.take()?;
        let (source, report) = match reclaim(mailbox) {
            Ok(Some(migration)) => {
                let (source, .., report) = migration.finish();
                (Some(source), report)
            }
            Ok(None) => (None, Report::default()),
            Err(error) => {
                self.in_doubt = true;
                if let Some(asker) = running.asker {
                    outbox.end(asker, Err(error.clone()));
                }
                return Some(format!("{}: {error}", running.kind.words(running.number)));
            }
        };
        let (value, end) = self.ended(&running, &report);
        if let Kind::HandOver { board, .. } = &running.kind {
            board.set_session(None);
            board.set_serving(self.serving);
        }
        if self.ended.len() == KEPT {
            self.ended.pop_front();
        }
        self.ended.push_back(value.clone());
        if let Some(asker) = running.asker {
            outbox.end(asker, end.map(|()| value));
        }
        let words = outcome(&report.outcome, running.kind.old()).1;
        let line = format!("{}: {words}", running.kind.words(running.number));
        self.noted = running.history.end_beside(&report, &words);
        match (running.kind, source) {
            (Kind::Media(kept), _) => {
                let is_clear = matches!(report.outcome, Outcome::Undone(_));
                kept.over(report.outcome == Outcome::Moved, is_clear, config);
            }
            (Kind::Departure(leaving), Some(source)) => leaving.over(source, matches!(report.outcome, Outcome::Undone(_))),
            _ => {}
        }
        Some(line)
    }

    fn ended(&mut self, running: &Running, report: &Report) -> (Value, Result<(), ControlError>) {
        let (word, text) = outcome(&report.outcome, running.kind.old());
        let end = match &report.outcome {
            Outcome::Moved => {
                match &running.kind {
                    Kind::Controllers { back: true, .. } => self.serving = Owner::Source,
                    Kind::Controllers { back: false, .. } => self.serving = Owner::Destination,
                    Kind::HandOver { session, .. } => self.serving = hand_over::other(session.from),
                    Kind::Media(_) | Kind::Departure(_) => {}
                }
                Ok(())
            }
            Outcome::Undone(Reason::Cancelled) => Err(ControlError::new(ErrorCode::Cancelled, text.clone())),
            Outcome::Undone(_) => Err(ControlError::new(ErrorCode::Undone, text.clone())),
            Outcome::InDoubt { .. } | Outcome::Running => {
                self.in_doubt = true;
                Err(ControlError::new(ErrorCode::InDoubt, text.clone()))
            }
        };
        let parts: Vec<_> = report.parts.iter().map(|(step, us)| json!({ "name": step.name(), "us": us })).collect();
        let mut value = json!({
            "migration": running.number, "begun_s": running.begun_s, "ended_s": unix_seconds(),
            "outcome": word, "message": text, "rounds": report.rounds.count(), "copied_bytes": report.copied_bytes,
            "zero_bytes": report.zero_bytes, "duration_us": report.duration_us, "downtime_us": report.downtime_us,
            "downtime_parts": parts,
        });
        running.kind.describe(&mut value);
        (value, end)
    }

    /// For `status`.
    pub(super) fn status(&self) -> Value {
        let running = self.running.as_ref().map(|running| running.view(&self.board.view()));
        json!({ "running": running, "ended": self.ended })
    }
}

/// The outcome in a word and in words; `old` is who serves when it is undone.
fn outcome(outcome: &Outcome, old: &str) -> (&'static str, String) {
    match outcome {
        Outcome::Running => ("unknown", "its report was lost".into()),
        Outcome::Moved => ("moved", "done".into()),
        Outcome::Undone(Reason::Cancelled) => ("cancelled", format!("cancelled: {old}, nothing is lost")),
        Outcome::Undone(reason) => ("undone", format!("undone ({reason}): {old}, nothing is lost")),
        Outcome::InDoubt { reason, what } => ("in-doubt", format!("in doubt ({reason}; {what}): the guest is paused")),
    }
}

/// Takes the migration that has ended off the core: its management controllers are free then.
pub(super) fn reclaim(mailbox: &Mailbox) -> Result<Option<Box<Migration>>, ControlError> {
    let (to, answer) = channel();
    mailbox.put(Order::Reclaim(to));
    answer.recv_timeout(CORE_PATIENCE).map_err(|_| ControlError::new(ErrorCode::Failed, "the polling core does not answer"))
}

pub(super) type Seated = (Policies, Vec<policies::PolicyHost>);

/// The policies' seats: a cdq seat for each controller, one for each other role.
pub(super) fn seats(
    config: &Config,
    clock: Clock,
    controllers: usize,
    made: &mut Option<(policies::Seats, policies::PolicyHost)>,
) -> Result<Seated, ControlError> {
    let refused = |error| failed("the policies", error);
    let (seats, host) = match made.take() {
        Some(made) => made,
        None => policies::seat(config, clock).map_err(refused)?,
    };
    let (mut cdq, mut hosts) = (vec![seats.cdq], vec![host]);
    if controllers > 1 {
        let (more, host) = policies::more_cdq(config, clock, controllers - 1).map_err(refused)?;
        cdq.extend(more);
        hosts.push(host);
    }
    Ok((Policies { cdq, tracking: seats.tracking, copy: seats.copy }, hosts))
}

/// The namespaces that migratable controllers of a subsystem reach, the same NSID at both ends.
pub(super) fn namespaces(config: &Config, from: &str) -> Vec<(u32, u32)> {
    let Some(subsystem) = config.subsystem(from) else { return Vec::new() };
    let nsids = subsystem.controllers.iter().filter(|c| c.role == crate::config::Role::Migratable).flat_map(|c| &c.namespaces);
    let nsids: std::collections::BTreeSet<_> = nsids.map(|nsid| *nsid.get_ref()).collect();
    nsids.into_iter().map(|nsid| (nsid, nsid)).collect()
}

impl Running {
    fn view(&self, view: &ProgressView) -> Value {
        let mut value = progress(self.number, view);
        self.kind.describe(&mut value);
        value
    }
}

fn progress(number: u64, view: &ProgressView) -> Value {
    json!({
        "migration": number, "phase": view.phase, "round": view.round, "round_bytes": view.round_bytes,
        "round_total": view.round_total, "left_bytes": view.left_bytes, "copied_per_s": view.copied_per_s,
        "dirtied_per_s": view.dirtied_per_s, "eta_us": view.eta_us, "downtime_estimate_us": view.downtime_estimate_us,
        "guest_limit": view.guest_limit, "elapsed_us": view.elapsed_us,
    })
}
