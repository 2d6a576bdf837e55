//! Controllers that leave a device of the running appliance: what a move of one needs besides what every migration needs.

use super::fronts::Unknown;
use super::migrate::{Kind, Migrations, failed, reclaim, seats};
use super::core::Mailbox;
use crate::config::{Config, device};
use crate::control::{Asker, ControlError, ErrorCode};
use crate::core::clock::Clock;
use crate::core::jobs::Worker;
use crate::core::records::RecordJournal;
use crate::departures::{self, Moving as MovingNamespace, Note, StateFiles, key_of};
use crate::devices::OpenDevice;
use crate::moving::{COPY_QUEUE, Plan, migration_config};
use crate::policies;
use dray_driver::Quirks;
use dray_driver::quirks::MigratableFunction;
use dray_migration::{DepartureIngredients, DriverMmc, Migration, Mmc};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is to leave, and where to.
pub(super) struct Wish {
    pub(super) device: String,
    pub(super) controllers: Vec<u16>,
    pub(super) namespaces: Vec<u32>,
    /// `device:NAME/NSID`, as many as namespaces.
    pub(super) to: Vec<String>,
    /// Where the state goes.
    pub(super) state: PathBuf,
}

/// What a departure is begun with.
pub(super) struct Surroundings<'a> {
    pub(super) config: &'a Config,
    pub(super) clock: Clock,
    pub(super) mailbox: &'a Mailbox,
    pub(super) seats: &'a mut Option<(policies::Seats, policies::PolicyHost)>,
}

/// What the main thread keeps of one that runs.
pub(super) struct Leaving {
    pub(super) note: Note,
    device: Arc<OpenDevice>,
}

impl Leaving {
    /// Where it is from, and where to.
    pub(super) fn names(&self) -> [String; 2] {
        let from = self.note.namespaces.iter().map(|one| device::name_of(&self.note.device, one.nsid));
        [from.collect::<Vec<_>>().join(", "), self.note.to()]
    }

    /// It has ended: the device has its driver back. A state that stands for nothing is removed.
    pub(super) fn over(self, source: Box<dyn Mmc>, stays: bool) {
        if stays {
            self.note.forget_states();
        }
        if let Some(driver) = source.into_driver() {
            self.device.take_back(driver);
        }
    }
}

fn refused(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorCode::Refused, message)
}

/// What a device can do for controllers that others drive, in plain words. `Err` = nothing, and why.
pub(super) fn ability(config: &Config, device: &OpenDevice, controllers: &[u16]) -> Result<(), String> {
    let identify = device.identify().ok_or("it is not identified")?;
    if !identify.oacs.hmlms() {
        return Err("it cannot do host-managed live migration (OACS, HMLMS)".into());
    }
    if !identify.trattr.tudcs() {
        return Err("it does host-managed live migration, but cannot log what is written (TRATTR, TUDCS)".into());
    }
    let Some(space) = device.space() else {
        return Err("it does host-managed live migration, but only one that is owned by `pci` takes its commands from here".into());
    };
    let quirks = Quirks::for_device(&identify);
    let may = |owner: Option<Arc<OpenDevice>>| match owner.as_ref().and_then(|owner| owner.space()) {
        Some(other) => quirks.may_track(space, MigratableFunction::Ours(other)),
        None => quirks.may_track(space, MigratableFunction::Another),
    };
    if controllers.is_empty() {
        return may(None).map_err(|error| error.to_string());
    }
    controllers.iter().try_for_each(|&cntlid| may(config.devices.owner_of(device, cntlid))).map_err(|error| error.to_string())
}

/// A line for the start: whether a device can track controllers that another process drives, or what is done instead.
pub(super) fn line(config: &Config, device: &OpenDevice) -> String {
    let (name, place) = (device.name(), device.place());
    match ability(config, device, &[]) {
        Ok(()) => format!(
            "{name}: {place}; host-managed live migration: it tracks controllers that others drive, \
             and `dray device move {name}` moves them"
        ),
        Err(why) => format!("{name}: {place}; {why}. What a controller of ours serves from it, that one tracks (in software)"),
    }
}

fn check_state(path: &Path) -> Result<(), ControlError> {
    if path.symlink_metadata().is_ok() {
        return Err(refused(format!("{} is there already: name another file for the state", path.display())));
    }
    if !path.parent().is_some_and(Path::is_dir) {
        return Err(refused(format!("{}: its folder is not there", path.display())));
    }
    Ok(())
}

/// One file for one controller; for several, the CNTLID is appended.
fn state_files(wish: &Wish) -> Vec<PathBuf> {
    match wish.controllers.as_slice() {
        [_] => vec![wish.state.clone()],
        all => all.iter().map(|cntlid| PathBuf::from(format!("{}.{cntlid}", wish.state.display()))).collect(),
    }
}

/// The device and the namespaces there that the media goes to.
fn target<'a>(config: &Config, wish: &'a Wish) -> Result<(&'a str, Vec<u32>), ControlError> {
    if wish.to.len() != wish.namespaces.len() {
        let (namespaces, places) = (wish.namespaces.len(), wish.to.len());
        return Err(refused(format!("{namespaces} namespaces are to move to {places} places: name as many")));
    }
    let (mut name, mut nsids) = (None, Vec::new());
    for to in &wish.to {
        let place = device::parse_name(to);
        let place = place.ok_or_else(|| refused(format!("\"{to}\" is no namespace of a device: write device:NAME/NSID")))?;
        if name.is_some_and(|name| name != place.0) {
            return Err(refused("the namespaces are to go to one device"));
        }
        if place.0 == wish.device && wish.namespaces.contains(&place.1) || nsids.contains(&place.1) {
            return Err(refused(format!("{to} cannot be a place to move to: it moves itself, or is named twice")));
        }
        super::media::not_served(config, place.0, place.1)?;
        name = Some(place.0);
        nsids.push(place.1);
    }
    Ok((name.ok_or_else(|| refused("no namespaces are named"))?, nsids))
}

impl Migrations {
    /// Begins to move controllers that others drive; whoever asked hears of it by and by. What it is, in words.
    pub(super) fn start_departure(
        &mut self,
        asker: Asker,
        wish: &Wish,
        with: Surroundings<'_>,
    ) -> Result<String, ControlError> {
        self.is_free()?;
        reclaim(with.mailbox)?;
        let (config, clock) = (with.config, with.clock);
        if config.device(&wish.device).is_none() {
            return Err(ControlError::new(ErrorCode::NoSuch, format!("there is no device \"{}\"", wish.device)));
        }
        if wish.controllers.is_empty() || wish.namespaces.is_empty() {
            return Err(refused("no controllers or no namespaces are named"));
        }
        let unusable = |error: &dyn std::fmt::Display| refused(error.to_string());
        let device = config.devices.open(config, &wish.device).map_err(|error| unusable(&error))?;
        let name = &wish.device;
        ability(config, &device, &wish.controllers).map_err(|why| refused(format!("device \"{name}\": {why}")))?;
        let states = state_files(wish);
        states.iter().try_for_each(|path| check_state(path))?;
        let (to, nsids) = target(config, wish)?;
        let note = note(&device, wish, states.clone()).map_err(|error| unusable(&error))?;
        let (destination, targets) = config.devices.destination(config, to, &nsids).map_err(|error| unusable(&error))?;
        let first = wish.namespaces.first().copied().unwrap_or(1);
        let source_queue = device.queue(first).map_err(|error| unusable(&error))?;
        let source_space = device.space().cloned().unwrap_or_default();
        let (policies, hosts) = seats(config, clock, wish.controllers.len(), with.seats)?;
        let worker = Worker::start().map_err(|error| failed("the job worker", error))?;
        let jobs = || worker.jobs().ok_or_else(|| failed("the job worker", "it has ended"));
        let (files, journal) = (StateFiles::new(states, Box::new(jobs()?)), jobs()?);
        // Durable before the first record.
        let begun = departures::begin(config, note.clone()).map_err(|error| refused(error.to_string()))?;
        let id = begun.id;
        let plan = Plan {
            id,
            ends: begun.ends,
            controllers: wish.controllers.iter().map(|&cntlid| (cntlid, 0)).collect(),
            namespaces: wish.namespaces.iter().copied().zip(nsids).collect(),
            seed: clock.now().0 ^ id,
            max_bytes_per_s: 0,
        };
        let mut setup = migration_config(config, plan);
        // The limit on guests is a feature of our own controller: to another one its number may mean anything.
        setup.may_throttle &= device.identify().is_some_and(|identify| Quirks::for_device(&identify) == Quirks::default());
        let driver = device.lend().map_err(|error| unusable(&error))?;
        let with_all = DepartureIngredients {
            source: Box::new(DriverMmc::new(driver, COPY_QUEUE)),
            source_queue,
            source_space,
            media: Box::new(destination),
            targets,
            policies,
            keeper: Box::new(files),
            journal: Box::new(RecordJournal::new(begun.stores, Box::new(journal))),
            guest: Box::new(Unknown),
        };
        let leaving = Leaving { note, device };
        let migration = match Migration::departure(setup, with_all, clock.now()) {
            Ok(migration) => migration,
            Err((error, source)) => {
                leaving.over(source, true);
                return Err(failed("the move cannot be set up", error));
            }
        };
        let kind = Kind::Departure(Box::new(leaving));
        let words = kind.words(id);
        self.begin(id, Box::new(migration), kind, Some(asker), config, (hosts, worker));
        Ok(words)
    }
}

/// What is written down of it.
fn note(device: &OpenDevice, wish: &Wish, states: Vec<PathBuf>) -> Result<Note, crate::devices::DeviceError> {
    let mut namespaces = Vec::new();
    for (&nsid, to) in wish.namespaces.iter().zip(&wish.to) {
        let key = key_of(device.identity(nsid)?);
        let mut controllers = device.controllers_of(nsid)?;
        controllers.retain(|cntlid| wish.controllers.contains(cntlid));
        namespaces.push(MovingNamespace { nsid, key, to: to.clone(), controllers });
    }
    Ok(Note { device: wish.device.clone(), controllers: wish.controllers.clone(), namespaces, states })
}
