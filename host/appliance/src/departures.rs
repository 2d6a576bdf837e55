//! What is written down of controllers that leave a device ([`dray_migration::departure`]): the durable records, and beside them
//! what a restart needs to act on them.
//!
//! In the state folder, `records/departures/KEY.record`, one for each namespace that moves, in the form of every other record
//! ([`crate::core::records`]); KEY is a hash of what the drive says of the namespace. Beside the first one's, `KEY.json` says
//! what moves and where to. It is durable before the first record.
//!
//! A move that was cut short is settled by [`settle`] when the appliance starts, or when the next one is asked for: where the
//! record says "source", the namespaces are attached to their controllers again, and those are resumed; where it says
//! "destination", they are detached, whatever was done in between. Only then the closing record is written.

use crate::config::Config;
use crate::core::records::{FileMedium, RecordError, RecordStore, end_id};
use crate::devices::{DeviceError, OpenDevice};
use dray_device::poll::{Jobs, Pending};
use dray_migration::{Contradiction, EndId, Owner, Recovery, StateKeeper, recover};
use dray_nvme::command::{NamespaceAttachmentSelect, SubmissionEntry};
use dray_nvme::identify::{IDENTIFY_BYTES, write_controller_list};
use dray_nvme::status::Status;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most bytes of a note.
const MOST_BYTES: u64 = 1 << 20;

/// Why nothing is known of a move, or nothing can be written of one.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum DepartureError {
    /// A record cannot be read.
    #[error("the record of a controller that has left: {source} ({})", path.display())]
    #[diagnostic(help("if you know which side has the data, remove the record and the note beside it"))]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong.
        source: RecordError,
    },
    /// The records contradict each other.
    #[error("{source}: nobody knows which side has the namespaces ({})", path.display())]
    #[diagnostic(help("if you know which side has the data, remove the records and the note beside them"))]
    Contradiction {
        /// The note.
        path: PathBuf,
        /// What is wrong.
        source: Contradiction,
    },
    /// Something about the files.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The namespaces have moved before.
    #[error("namespace {nsid} of device \"{device}\" has moved to {to} already ({})", path.display())]
    #[diagnostic(help("if that move does not count any more, remove the note and the record beside it"))]
    Moved {
        /// The device.
        device: String,
        /// The namespace.
        nsid: u32,
        /// Where to.
        to: String,
        /// The note.
        path: PathBuf,
    },
    /// The device does not do what it is asked for.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Device(#[from] DeviceError),
    /// It cannot be settled yet.
    #[error("a move from device \"{device}\" was cut short, and cannot be settled: {why}")]
    Unsettled {
        /// The device.
        device: String,
        /// Why.
        why: String,
    },
}

/// A namespace that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// NSID at the source.
    pub nsid: u32,
    /// The name of its record.
    pub key: String,
    /// Where to: `device:NAME/NSID`.
    pub to: String,
    /// The controllers that leave and have it.
    pub controllers: Vec<u16>,
}

/// What moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The device whose management controller it is.
    pub device: String,
    /// CNTLIDs of the controllers that leave.
    pub controllers: Vec<u16>,
    /// The namespaces.
    pub namespaces: Vec<Moving>,
    /// Where the states of the controllers are, in the order of those.
    pub states: Vec<PathBuf>,
}

impl Note {
    /// "controller 2 with namespace 1 of device x".
    #[must_use]
    pub fn words(&self) -> String {
        let list = |all: Vec<String>| all.join(", ");
        let controllers = list(self.controllers.iter().map(ToString::to_string).collect());
        let namespaces = list(self.namespaces.iter().map(|one| one.nsid.to_string()).collect());
        format!("controller {controllers} with namespace {namespaces} of device {}", self.device)
    }

    /// Removes states of controllers that have gone on since.
    pub fn forget_states(&self) {
        for path in &self.states {
            if let Err(error) = fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!("{}: {error}; it is the state of a controller that has gone on since", path.display());
            }
        }
    }

    /// Where to, in words.
    #[must_use]
    pub fn to(&self) -> String {
        self.namespaces.iter().map(|one| one.to.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// The records of one move, and what follows from them.
pub struct Departure {
    note: Note,
    path: PathBuf,
    stores: Vec<RecordStore<FileMedium>>,
    recovery: Recovery,
}

impl std::fmt::Debug for Departure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Departure").field("note", &self.note).field("recovery", &self.recovery).finish_non_exhaustive()
    }
}

fn folder(config: &Config) -> PathBuf {
    config.path(&config.file.core.state).join("records/departures")
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> DepartureError {
    let path = path.to_path_buf();
    move |source| DepartureError::Io { path, source }
}

/// A key as it is written.
#[must_use]
pub fn key_of(identity: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(identity))
}

/// All of it or, after a crash, what was there before.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

impl Departure {
    fn open(config: &Config, note: Note, path: PathBuf) -> Result<Self, DepartureError> {
        let folder = folder(config);
        let mut stores = Vec::new();
        for one in &note.namespaces {
            let key = u128::from_str_radix(&one.key, 16).map(u128::to_be_bytes);
            let key = key.map_err(|_| failed(&path)(io::Error::new(io::ErrorKind::InvalidData, "a key is no number")))?;
            let opened = FileMedium::open(&folder, &key).and_then(|medium| RecordStore::open(medium, key));
            stores.push(opened.map_err(|source| DepartureError::Record { path: FileMedium::path(&folder, &key), source })?);
        }
        let records: Vec<_> = stores.iter().map(|store| store.current().map(|stored| stored.record)).collect();
        let recovery = recover(&records).map_err(|source| DepartureError::Contradiction { path: path.clone(), source })?;
        Ok(Self { note, path, stores, recovery })
    }

    /// What is written down of every move, in no order.
    fn all(config: &Config) -> Result<Vec<Self>, DepartureError> {
        let folder = folder(config);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed(&folder))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed(&folder))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let length = path.metadata().map_err(failed(&path))?.len();
            if length > MOST_BYTES {
                return Err(failed(&path)(io::Error::new(io::ErrorKind::InvalidData, "it is no note of a move")));
            }
            let text = fs::read(&path).map_err(failed(&path))?;
            let note = serde_json::from_slice(&text);
            let note = note.map_err(|error| failed(&path)(io::Error::new(io::ErrorKind::InvalidData, error)))?;
            all.push(Self::open(config, note, path)?);
        }
        Ok(all)
    }

    /// Does what follows from the records of a move that was cut short; says what was found, if anything has moved.
    fn settle(
        &mut self,
        device: impl FnOnce(&str) -> Result<Arc<OpenDevice>, DeviceError>,
    ) -> Result<Option<String>, DepartureError> {
        let (what, migration, states) = (self.note.words(), self.recovery.migration, self.states());
        let left = format!("{what} has left for {} (move {migration}); its state is in {states}", self.note.to());
        let Some(record) = self.recovery.then else {
            return Ok((self.recovery.owner == Owner::Destination).then_some(left));
        };
        let unsettled = |why: String| DepartureError::Unsettled { device: self.note.device.clone(), why };
        let device = device(&self.note.device).map_err(|error| unsettled(error.to_string()))?;
        let stays = record.owner == Owner::Source;
        self.attach(&device, stays).map_err(|error| unsettled(error.to_string()))?;
        if stays {
            self.note.forget_states();
            for &cntlid in &self.note.controllers {
                let status = device.tell("Migration Send, Resume", &SubmissionEntry::resume(cntlid), &[])?;
                if status.is_error() && !status.is(Status::CONTROLLER_NOT_SUSPENDED) {
                    return Err(unsettled(format!("controller {cntlid} is not resumed: {status}")));
                }
            }
        }
        for store in &mut self.stores {
            store.write(record).map_err(failed(&self.path))?;
        }
        Ok(Some(if stays { format!("move {migration} of {what} was cut short: it stays, with all its data") } else { left }))
    }

    fn states(&self) -> String {
        self.note.states.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    /// Attaches the namespaces to the controllers, or detaches them; whichever is so already is fine.
    fn attach(&self, device: &OpenDevice, on: bool) -> Result<(), DeviceError> {
        let (select, what, already) = if on {
            (NamespaceAttachmentSelect::ATTACH, "Namespace Attachment, attach", Status::NAMESPACE_ALREADY_ATTACHED)
        } else {
            (NamespaceAttachmentSelect::DETACH, "Namespace Attachment, detach", Status::NAMESPACE_NOT_ATTACHED)
        };
        for one in &self.note.namespaces {
            for &cntlid in &one.controllers {
                let mut list = vec![0; IDENTIFY_BYTES];
                write_controller_list([cntlid], &mut list);
                let status = device.tell(what, &SubmissionEntry::namespace_attachment(one.nsid, select), &list)?;
                if status.is_error() && !status.is(already) {
                    return Err(DeviceError::Refused { name: device.name().to_owned(), what: what.to_owned(), status });
                }
            }
        }
        Ok(())
    }
}

/// Settles every move that was cut short; a line for each of these, and for each that is over and stands. One that cannot be
/// settled now is left as it is, and said so.
///
/// # Errors
/// [`DepartureError`] when the records cannot be read.
pub fn settle(config: &Config) -> Result<Vec<String>, DepartureError> {
    let mut lines = Vec::new();
    for mut departure in Departure::all(config)? {
        match departure.settle(|name| config.devices.open(config, name)) {
            Ok(line) => lines.extend(line),
            Err(error @ (DepartureError::Unsettled { .. } | DepartureError::Device(_))) => lines.push(error.to_string()),
            Err(error) => return Err(error),
        }
    }
    Ok(lines)
}

/// A move that may begin: its records' stores, its number, and what records call its ends.
pub struct Begun {
    /// One for each namespace.
    pub stores: Vec<RecordStore<FileMedium>>,
    /// The number.
    pub id: u64,
    /// Source and destination.
    pub ends: [EndId; 2],
}

/// Writes down what moves, after whatever was before is settled.
///
/// # Errors
/// [`DepartureError`].
pub fn begin(config: &Config, note: Note) -> Result<Begun, DepartureError> {
    let mine = |other: &Moving| note.namespaces.iter().any(|one| one.key == other.key);
    for mut other in Departure::all(config)? {
        let Some(at) = other.note.namespaces.iter().find(|one| mine(one)).cloned() else { continue };
        other.settle(|name| config.devices.open(config, name))?;
        if other.recovery.owner == Owner::Destination {
            let (device, path) = (other.note.device.clone(), other.path.clone());
            return Err(DepartureError::Moved { device, nsid: at.nsid, to: at.to, path });
        }
        // It is over, and its namespaces may go with others now.
        fs::remove_file(&other.path).map_err(failed(&other.path))?;
    }
    let folder = folder(config);
    fs::create_dir_all(&folder).map_err(failed(&folder))?;
    let first = note.namespaces.first().map_or("", |one| one.key.as_str());
    let path = folder.join(first).with_extension("json");
    let text = serde_json::to_vec(&note).map_err(|error| failed(&path)(io::Error::other(error)))?;
    write_whole(&path, &text).map_err(failed(&path))?;
    // The folders on the way to it have to be as durable as it is.
    for folder in folder.ancestors().skip(1).take(2) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed(folder))?;
    }
    let ends = [end_id(&note.device, "departure from a device"), end_id(&note.to(), "departure to a device")];
    let departure = Departure::open(config, note, path)?;
    Ok(Begun { stores: departure.stores, id: departure.recovery.next_migration, ends })
}

/// Keeps each state in a file of its own, by a job.
pub struct StateFiles {
    paths: Vec<PathBuf>,
    jobs: Box<dyn Jobs>,
    pending: Option<Pending<Result<(), String>>>,
}

impl StateFiles {
    /// In these files, in the order of the controllers.
    #[must_use]
    pub fn new(paths: Vec<PathBuf>, jobs: Box<dyn Jobs>) -> Self {
        Self { paths, jobs, pending: None }
    }
}

impl StateKeeper for StateFiles {
    fn keep(&mut self, states: Vec<(u16, Vec<u8>)>) {
        let paths = self.paths.clone();
        self.pending = Some(Pending::start(self.jobs.as_mut(), move || {
            if paths.len() != states.len() {
                return Err("there are more states than files".to_owned());
            }
            paths.iter().zip(states).try_for_each(|(path, (_, state))| {
                write_whole(path, &state).map_err(|error| format!("{}: {error}", path.display()))
            })
        }));
    }

    fn poll(&mut self) -> Option<Result<(), String>> {
        let pending = self.pending.as_mut()?;
        let ended = match pending.poll() {
            Some(ended) => ended,
            None if pending.is_lost() => Err("the worker that writes the state has died".to_owned()),
            None => return None,
        };
        self.pending = None;
        Some(ended)
    }
}
