//! `dray run`: the appliance on its configuration, until a signal ends it.
//!
//! [`run`] brings everything up in an order that the durable records ask for: the state folder is taken (a second process is
//! refused), records are read and closed, subsystems are built behind the fences that the records want, slots are pointed at who
//! serves, sockets are bound, the polling core starts, and last the control socket. Whatever cannot be is said before anything
//! is served.
//!
//! Threads: the polling core ([`core`](self::core)) has the subsystems, the exports, the migration and lent queues; the control
//! socket has its own ([`crate::control`]); jobs and policies have theirs. The main thread, here, only decides: it hears what
//! the control socket is asked for, and what clients that migrate themselves need ([`hand_over`]), begins and ends migrations, and
//! stops it all. At a stop, a migration that runs is cancelled,
//! exports take nobody in any more, controllers fetch nothing more, what is under way ends and is answered, clients are
//! disconnected.

mod core;
mod departure;
pub(crate) mod exports;
mod fronts;
mod hand_over;
mod lend;
mod media;
mod migrate;
pub(crate) mod sockets;
mod status;

use self::core::{CoreView, Mailbox, Order, RunCore};
use crate::assembly::{self, Machine, Migratable};
use crate::backings;
use crate::departures;
use crate::devices::OpenDevice;
use crate::config::{Config, Role};
use crate::control::server::{Asked, ControlServer, Outbox};
use crate::control::{Asker, ControlError, ErrorCode, Reply, Request, socket_path};
use crate::core::clock::Clock;
use crate::core::reactor::Reactor;
use crate::core::status::Status;
use crate::moving::{Board, Moving, mmc_driver};
use crate::policies::{self, PolicyHost, Seats};
use crate::recovery::{Records, StateLock};
use dray_device::slot::Slot;
use dray_device::socket::UnixSocket;
use dray_export::hooks::{MigrationHooks, NoMigration};
use dray_migration::Owner;
use exports::Exports;
use fronts::{Fronts, Pair};
use hand_over::desk::Desk;
use hand_over::{Board as HandOverBoard, Driven, Gate};
use lend::{LendSpec, Lent};
use miette::{IntoDiagnostic, WrapErr, miette};
use media::Wish;
use migrate::{CORE_PATIENCE, MediaSurroundings, Migrations, Surroundings};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

/// How often the main thread looks at signals and at a migration.
const LOOK: Duration = Duration::from_millis(20);
/// How long commands and clients may take to end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
/// How long a migration may take to be undone.
const UNDO_PATIENCE: Duration = Duration::from_secs(40);
/// Signals so close to each other are one.
const SAME_SIGNAL: Duration = Duration::from_secs(1);
/// Most slots of a queue that is lent.
const MAX_LENT_SLOTS: u32 = 1 << 20;

/// A subsystem's parts that the main thread keeps.
pub(crate) struct Place {
    pub(crate) name: String,
    /// The management controller's CNTLID, and the slot that it is driven through.
    pub(crate) management: (u16, Slot),
    pub(crate) migratable: Vec<Migratable>,
    /// The management controller is exported: the appliance does not drive it.
    pub(crate) given_away: bool,
}

/// Runs the appliance until SIGTERM or SIGINT; one that comes more than a second later ends the process at once.
///
/// # Errors
/// Whatever keeps it from being served, before anything is.
pub fn run(file: &Path) -> miette::Result<()> {
    let config = Config::read(file)?;
    let signals = Signals::take()?;
    let state = config.path(&config.file.core.state);
    let _state = take(&config, &state)?;
    say(&format!("dray {} on {}, process {}", env!("CARGO_PKG_VERSION"), file.display(), std::process::id()));
    let appliance = Appliance::start(config, file)?;
    say("ready");
    appliance.serve(&signals)
}

/// A line on the terminal. Where nobody reads any more it is lost: that is no reason to stop.
fn say(line: &str) {
    let _unread = writeln!(std::io::stdout().lock(), "{line}");
}

/// What SIGTERM and SIGINT have asked for.
struct Signals {
    stop: Arc<AtomicBool>,
    /// The next one ends the process. Not so at first: supervisors and terminals send the same one twice.
    impatient: Arc<AtomicBool>,
}

impl Signals {
    fn take() -> miette::Result<Self> {
        let signals = Self { stop: Arc::default(), impatient: Arc::default() };
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&signals.impatient)).into_diagnostic()?;
            signal_hook::flag::register(signal, Arc::clone(&signals.stop)).into_diagnostic()?;
        }
        Ok(signals)
    }

    /// The stop has begun then.
    fn stopping(&self, since: Instant) {
        if since.elapsed() >= SAME_SIGNAL {
            self.impatient.store(true, Ordering::Relaxed);
        }
    }
}

/// The state folder, for this process alone.
fn take(config: &Config, state: &Path) -> miette::Result<StateLock> {
    // One that serves is refused at once; one that is just dying is waited for.
    if let Some(pid) = process_of(config) {
        return Err(miette!(
            help = "stop it, or give this one a state folder of its own ([core] state)",
            "the appliance runs already on {}: process {pid}",
            state.display()
        ));
    }
    StateLock::take(state).into_diagnostic().wrap_err_with(|| format!("the state folder {}", state.display()))
}

/// The process that runs on the configuration's state folder, if one does.
pub(crate) fn process_of(config: &Config) -> Option<i32> {
    let other = UnixSocket::connect(&socket_path(config)).ok()?;
    Some(other.peer_credentials().map(|peer| peer.pid).unwrap_or_default())
}

/// What runs, as the main thread has it.
struct Appliance {
    config: Config,
    file: String,
    clock: Clock,
    records: String,
    places: Vec<Place>,
    /// The two ends of `[migration]` among the places.
    ends: [usize; 2],
    pairs: Vec<Pair>,
    exports: Vec<exports::ExportLabel>,
    seats: Option<(Seats, PolicyHost)>,
    migrations: Migrations,
    /// Where VM managers move what is served.
    desk: Option<Desk>,
    mailbox: Arc<Mailbox>,
    core: Reactor<RunCore>,
    outbox: Outbox,
    asked: Receiver<Asked>,
    stopping: bool,
    /// Devices whose controllers others may drive.
    _held: Vec<Arc<OpenDevice>>,
    // Last, so that the socket goes when all else has ended.
    control: ControlServer,
}

impl Appliance {
    fn start(mut config: Config, file: &Path) -> miette::Result<Self> {
        let state = config.path(&config.file.core.state);
        // First of all: everything behind this opens what the configuration says.
        for line in backings::settle(&mut config)? {
            say(&format!("backing      {line}"));
        }
        let mut records = Records::open(&config)?;
        let found = records.line();
        say(&format!("records      {found}"));
        let serving = records.serving()?;
        let clock = Clock::new();
        let (seats, machines) = std::thread::scope(|scope| {
            // A component that is refused must not be found out by the first migration. To load them takes longest of all.
            let thread = std::thread::Builder::new().name("dray-load".into());
            let seats = thread.spawn_scoped(scope, || policies::seat(&config, clock));
            let machines = records.close().map_err(Into::into).and_then(|()| {
                let held = config.devices.hold(&config)?;
                Ok::<_, miette::Report>((held, machines(&config, &records, serving)?))
            });
            (seats.map(ScopedJoinHandle::join), machines)
        });
        let seats = seats.into_diagnostic()?.map_err(|_| miette!("the thread that loads policies has died"))?;
        let seats = Some(seats?);
        for (role, policy) in status::policies(&config) {
            say(&format!("policy       {role}: {}", policy.component.get_ref().display()));
        }
        let (held, machines) = machines?;
        drop(records);
        for line in departures::settle(&config)? {
            say(&format!("departure    {line}"));
        }
        for device in config.devices.all() {
            say(&format!("device       {}", departure::line(&config, &device)));
            for one in device.virtual_functions() {
                say(&format!("function     {}: {one}", device.name()));
            }
        }
        let place = |name: &String| machines.iter().position(|m| m.name == *name).ok_or_else(|| miette!("no subsystem \"{name}\""));
        let ends = [place(config.file.migration.from.get_ref())?, place(config.file.migration.to.get_ref())?];
        let fronts = if config.hands_over() { Fronts::apart(&machines, ends) } else { Fronts::new(&machines, ends, serving) };
        let Fronts { all, pairs } = fronts?;
        // Data of guests, and of copies, goes straight to and from devices that are backings.
        for slot in all.iter().map(|front| &front.slot).chain(machines.iter().map(|machine| &machine.management.1)) {
            config.devices.follow(slot.function().space())?;
        }
        let clients = Clients::new(&config, &machines, ends, serving);
        let (exports, labels) = Exports::start(&config, &all, &machines, &|name, cntlid, slot| clients.hooks(name, cntlid, slot))?;
        for label in &labels {
            say(&format!("export       {label}"));
        }
        let mut status = Status::open(&state.join("status")).into_diagnostic().wrap_err("the page of the run's status")?;
        status.begin();
        let (board, mailbox) = (Arc::new(Board::default()), Arc::new(Mailbox::default()));
        let fences = machines.iter().flat_map(|m| &m.migratable).map(|m| m.fence.clone()).collect();
        let (subsystems, places) = machines.into_iter().map(|machine| parted(machine, &config)).unzip();
        let moving = Moving::new(Arc::clone(&board), Some(status));
        let core = RunCore::new(subsystems, fences, exports, moving, Arc::clone(&mailbox));
        let core = Reactor::start("dray-core", clock, config.file.core.idle, core).into_diagnostic().wrap_err("the polling core")?;
        let path = socket_path(&config);
        let listener = sockets::listen_unix(&path).into_diagnostic().wrap_err_with(|| format!("the control socket {}", path.display()))?;
        let (control, outbox, asked) = ControlServer::start(listener, &path).into_diagnostic().wrap_err("the control socket")?;
        say(&format!("control      {}", path.display()));
        Ok(Self {
            migrations: Migrations::new(board, serving),
            file: file.display().to_string(),
            records: found,
            exports: labels,
            desk: clients.desk,
            stopping: false,
            _held: held,
            config,
            clock,
            places,
            ends,
            pairs,
            seats,
            mailbox,
            core,
            outbox,
            asked,
            control,
        })
    }

    fn serve(mut self, signals: &Signals) -> miette::Result<()> {
        while !signals.stop.load(Ordering::Relaxed) {
            self.turn()?;
        }
        self.stop(signals)
    }

    /// One look at everything.
    fn turn(&mut self) -> miette::Result<()> {
        match self.asked.recv_timeout(LOOK) {
            Ok(Asked { asker, request }) => self.answer(asker, request),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(miette!("the control socket's thread has died")),
        }
        self.tend_clients();
        if let Some(line) = self.migrations.tend(&self.mailbox, &self.outbox, &mut self.config) {
            say(&line);
        }
        if self.core.has_ended() {
            return Err(miette!("the polling core has died"));
        }
        Ok(())
    }

    fn answer(&mut self, asker: Asker, request: Request) {
        if self.stopping && request != Request::Status {
            return self.outbox.end(asker, Err(ControlError::new(ErrorCode::Stopping, "the appliance is stopping")));
        }
        let result = match request {
            Request::Status => self.status(),
            Request::Cancel => self.migrations.cancel(),
            Request::Migrate { from, to } => match self.migrate(asker, [from, to]) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Request::LendCdq { subsystem, controller, slots } => match self.lend(subsystem, controller, slots) {
                Ok((value, socket)) => return self.outbox.send(asker, Reply::Done(value, vec![socket])),
                Err(error) => Err(error),
            },
            Request::DeviceMove { device, controllers, namespaces, to, state } => {
                match self.device_move(asker, &departure::Wish { device, controllers, namespaces, to, state }) {
                    Ok(()) => return,
                    Err(error) => Err(error),
                }
            }
            Request::MediaMove { subsystem, nsid, to } => match self.media_move(asker, &Wish { subsystem, nsid, to }) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
        };
        self.outbox.end(asker, result);
    }

    fn status(&self) -> Result<serde_json::Value, ControlError> {
        let view = look(&self.mailbox)?;
        Ok(status::value(self, &view))
    }

    /// Whether the appliance may drive a subsystem's management controller now.
    fn management_is_free(&self, place: &Place, view: &CoreView) -> Result<(), ControlError> {
        let busy = |what: &str| Err(ControlError::new(ErrorCode::Busy, format!("the management controller of \"{}\" {what}", place.name)));
        if place.given_away {
            return busy("is exported: whoever has it drives migrations");
        }
        if view.lent.iter().any(|(name, _)| *name == place.name) {
            return busy("has lent a queue");
        }
        Ok(())
    }

    fn migrate(&mut self, asker: Asker, names: [String; 2]) -> Result<(), ControlError> {
        if self.desk.is_some() {
            let message = "both ends of [migration] have clients of their own: their VM managers move them, over vfio-user";
            return Err(ControlError::new(ErrorCode::Refused, message));
        }
        let view = look(&self.mailbox)?;
        let ends = self.ends.map(|end| &self.places[end]);
        for place in ends {
            self.management_is_free(place, &view)?;
        }
        let with = Surroundings {
            config: &self.config,
            clock: self.clock,
            mailbox: &self.mailbox,
            ends,
            pairs: &self.pairs,
            seats: &mut self.seats,
        };
        let line = format!("migration of {} to {} begins", names[0], names[1]);
        self.migrations.start(asker, names, with)?;
        say(&line);
        Ok(())
    }

    fn media_move(&mut self, asker: Asker, wish: &Wish) -> Result<(), ControlError> {
        self.clients_let_go(&wish.subsystem)?;
        if let Some(place) = self.places.iter().find(|place| place.name == wish.subsystem) {
            self.management_is_free(place, &look(&self.mailbox)?)?;
        }
        let with = MediaSurroundings {
            config: &self.config,
            clock: self.clock,
            mailbox: &self.mailbox,
            places: &self.places,
            seats: &mut self.seats,
        };
        let words = self.migrations.start_media(asker, wish, with)?;
        say(&format!("{words} begins"));
        Ok(())
    }

    fn device_move(&mut self, asker: Asker, wish: &departure::Wish) -> Result<(), ControlError> {
        let with = departure::Surroundings {
            config: &self.config,
            clock: self.clock,
            mailbox: &self.mailbox,
            seats: &mut self.seats,
        };
        let words = self.migrations.start_departure(asker, wish, with)?;
        say(&format!("{words} begins"));
        Ok(())
    }

    fn lend(&mut self, name: String, cntlid: u16, slots: Option<u32>) -> Result<(serde_json::Value, std::os::fd::OwnedFd), ControlError> {
        let no_such = || ControlError::new(ErrorCode::NoSuch, format!("there is no migratable controller {cntlid} in \"{name}\""));
        let place = self.places.iter().find(|place| place.name == name).ok_or_else(no_such)?;
        place.migratable.iter().find(|m| m.cntlid == cntlid).ok_or_else(no_such)?;
        let slots = slots.unwrap_or(self.config.file.migration.cdq_slots);
        if !(2..=MAX_LENT_SLOTS).contains(&slots) {
            let message = format!("a queue of {slots} slots is not lent; ask for 2 to {MAX_LENT_SLOTS}");
            return Err(ControlError::new(ErrorCode::Refused, message));
        }
        self.management_is_free(place, &look(&self.mailbox)?)?;
        if self.migrations.is_running() {
            return Err(ControlError::new(ErrorCode::Busy, "a migration runs"));
        }
        self.clients_let_go(&name)?;
        let Some(place) = self.places.iter().find(|place| place.name == name) else { return Err(no_such()) };
        // A migration that has ended still holds its management controllers.
        drop(migrate::reclaim(&self.mailbox)?);
        let failed = |error: String| ControlError::new(ErrorCode::Failed, error);
        let driver = mmc_driver(&self.config, &place.management.1).map_err(|error| failed(error.to_string()))?;
        let spec = LendSpec { subsystem: name.clone(), cntlid, slots };
        let (lent, socket) = Lent::start(spec, driver, self.clock).map_err(|error| failed(error.to_string()))?;
        self.mailbox.put(Order::Lend(Box::new(lent)));
        let value = serde_json::json!({ "subsystem": name, "controller": cntlid, "slots": slots });
        Ok((value, socket))
    }

    /// Ends everything in order.
    fn stop(mut self, signals: &Signals) -> miette::Result<()> {
        say("stopping");
        let begun = Instant::now();
        self.stopping = true;
        if self.migrations.is_running() {
            // It may have ended meanwhile.
            let _over = self.migrations.cancel();
            let end = Instant::now() + UNDO_PATIENCE;
            while self.migrations.is_running() && Instant::now() < end {
                self.turn()?;
                signals.stopping(begun);
            }
        }
        if let Some(desk) = &self.desk {
            desk.board.stop();
        }
        let (to, drained) = channel();
        self.mailbox.put(Order::Drain(to));
        let end = Instant::now() + DRAIN_PATIENCE;
        let is_drained = loop {
            signals.stopping(begun);
            match drained.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                answer => break answer.is_ok(),
            }
        };
        if !is_drained {
            say(&format!("commands or clients did not end within {} s: they are cut off", DRAIN_PATIENCE.as_secs()));
        }
        signals.impatient.store(true, Ordering::Relaxed);
        // Sockets of exports are removed with their listeners.
        drop(self.core.stop().into_diagnostic()?);
        drop(self.control);
        self.migrations.close();
        say("stopped");
        Ok(())
    }
}

/// Why the controllers of a subsystem come up behind raised fences.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fenced {
    No,
    /// The records say that its namespaces were moved away.
    Moved,
    /// It has clients of its own, and the other end of `[migration]` serves.
    Idle,
}

/// What clients that migrate have to do with.
struct Clients {
    desk: Option<Desk>,
    /// Subsystem, CNTLID and gate of both ends.
    ends: Vec<(Owner, String, u16, Gate)>,
}

impl Clients {
    fn new(config: &Config, machines: &[Machine], ends: [usize; 2], serving: Owner) -> Self {
        let both = ends.map(|end| machines.get(end).and_then(|machine| Some((&machine.name, machine.migratable.first()?))));
        let [Some(from), Some(to)] = both else { return Self { desk: None, ends: Vec::new() } };
        if !config.hands_over() {
            return Self { desk: None, ends: Vec::new() };
        }
        let (board, asked) = HandOverBoard::new(serving);
        let gates = [from, to].map(|(_, migratable)| Gate::new(migratable.fence.clone(), &board));
        let end = |end: Owner, (name, migratable): (&String, &Migratable)| {
            (end, name.clone(), migratable.cntlid, gates[end as usize].clone())
        };
        let ends = vec![end(Owner::Source, from), end(Owner::Destination, to)];
        let desk = Desk::new(board, asked, gates.clone(), [from, to].map(|(_, migratable)| migratable.cntlid));
        Self { desk: Some(desk), ends }
    }

    /// What the migration states mean for the controller in a slot.
    fn hooks(&self, name: &str, cntlid: u16, slot: &Slot) -> Box<dyn MigrationHooks> {
        let found = self.ends.iter().find(|(_, subsystem, id, _)| subsystem == name && *id == cntlid);
        match (&self.desk, found) {
            (Some(desk), Some((end, _, _, gate))) => Box::new(Driven::new(*end, cntlid, &desk.board, gate.clone(), slot.clone())),
            _ => Box::new(NoMigration),
        }
    }
}

/// All subsystems, those that the records say so behind raised fences.
fn machines(config: &Config, records: &Records, serving: Owner) -> miette::Result<Vec<Machine>> {
    let migration = &config.file.migration;
    let idle = if serving == Owner::Source { &migration.to } else { &migration.from };
    let mut machines = Vec::new();
    for subsystem in &config.file.subsystems {
        let fenced = if records.is_fenced(subsystem) {
            Fenced::Moved
        } else if config.hands_over() && subsystem.name.get_ref() == idle.get_ref() {
            Fenced::Idle
        } else {
            Fenced::No
        };
        machines.push(assembly::machine_behind(config, subsystem, fenced != Fenced::No)?);
        say(&format!("subsystem    {}", status::line(subsystem, fenced)));
    }
    Ok(machines)
}

fn parted(machine: Machine, config: &Config) -> (dray_controller::Subsystem, Place) {
    let Machine { name, subsystem, management, migratable } = machine;
    let given_away = config.file.exports.iter().any(|e| *e.subsystem.get_ref() == name && e.cntlids().contains(&management.0));
    (subsystem, Place { name, management, migratable, given_away })
}

fn look(mailbox: &Mailbox) -> Result<CoreView, ControlError> {
    let (to, view) = channel();
    mailbox.put(Order::Look(to));
    view.recv_timeout(CORE_PATIENCE).map_err(|_| ControlError::new(ErrorCode::Failed, "the polling core does not answer"))
}

/// The role as the configuration writes it.
fn role(role: Role) -> &'static str {
    match role {
        Role::Management => "management",
        Role::Migratable => "migratable",
    }
}
