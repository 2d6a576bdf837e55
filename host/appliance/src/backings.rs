//! Which file a namespace is served from: the durable records of media moves, read before anything is built.
//!
//! A media move exchanges the backing of a namespace for a copy in another file, while its controllers stay
//! ([`dray_migration::media_move`]). Its record has the form of a controller move's ([`crate::core::records`]), with backings as
//! its ends, and is kept apart: in the state folder, `records/media/SUBSYSTEM/NGUID.record`, where SUBSYSTEM is the subsystem's
//! name in records. A record knows a backing by a hash of its name, so that the names stand beside it in `NGUID.names`, durable
//! before the first record that needs them. A name is the file's path as the configuration or the request has written it; memory
//! has the empty one, a namespace of a device `device:NAME/NSID`.
//!
//! The `path` of the configuration is where a namespace starts; once a media move has begun, the record decides.

use crate::config::{BackingKind, Config, Namespace, Subsystem, device, nguid_bytes};
use crate::core::records::{FileMedium, RecordError, RecordStore, end_id};
use dray_migration::{Contradiction, EndId, RecordPhase, Recovery, recover};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Why nobody knows where a namespace is.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum BackingsError {
    /// The record cannot be read.
    #[error("the record of the media moves of namespace {nsid} of \"{subsystem}\": {source} ({})", path.display())]
    #[diagnostic(help("if you know which file has the data, name it in the configuration and remove the record"))]
    Record {
        /// The subsystem.
        subsystem: String,
        /// The namespace.
        nsid: u32,
        /// The record.
        path: PathBuf,
        /// What is wrong.
        source: RecordError,
    },
    /// It contradicts itself.
    #[error("{source}: nobody knows which file serves ({})", path.display())]
    #[diagnostic(help("if you know which file has the data, name it in the configuration and remove the record"))]
    Contradiction {
        /// The record.
        path: PathBuf,
        /// What is wrong.
        source: Contradiction,
    },
    /// The backing that serves has no name.
    #[error("media move {migration} of namespace {nsid} of \"{subsystem}\" was to a file that {} does not name", path.display())]
    #[diagnostic(help("if you know which file has the data, name it in the configuration and remove the record beside it"))]
    Stranger {
        /// The subsystem.
        subsystem: String,
        /// The namespace.
        nsid: u32,
        /// The media move.
        migration: u64,
        /// The names.
        path: PathBuf,
    },
    /// Something about the files.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
}

/// The record of a namespace's media moves.
pub struct BackingRecord {
    store: RecordStore<FileMedium>,
    recovery: Recovery,
    names: Vec<String>,
    path: PathBuf,
}

impl std::fmt::Debug for BackingRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackingRecord").field("recovery", &self.recovery).field("names", &self.names).finish_non_exhaustive()
    }
}

/// The name of a namespace's backing, as records and the file of names have it.
#[must_use]
pub fn name_of(namespace: &Namespace) -> String {
    match (&namespace.path, namespace.backing) {
        (Some(path), BackingKind::File) => path.get_ref().to_string_lossy().into_owned(),
        (_, BackingKind::Device) => namespace.at_device().map_or_else(String::new, |(device, nsid)| device::name_of(device, nsid)),
        _ => String::new(),
    }
}

fn folder(config: &Config, subsystem: &Subsystem) -> PathBuf {
    let id = u128::from_be_bytes(end_id(subsystem.name.get_ref(), &subsystem.nqn));
    config.path(&config.file.core.state).join("records/media").join(format!("{id:032x}"))
}

fn id(name: &str) -> EndId {
    end_id("backing", name)
}

impl BackingRecord {
    /// Opens the record of a namespace, made if there is none. Nothing else may use the state folder.
    ///
    /// # Errors
    /// [`BackingsError`]: what cannot be read is never taken for a namespace that was not moved.
    pub fn open(config: &Config, subsystem: &Subsystem, namespace: &Namespace) -> Result<Self, BackingsError> {
        let folder = folder(config, subsystem);
        let nguid = nguid_bytes(namespace.nguid.get_ref()).unwrap_or_default();
        let path = FileMedium::path(&folder, &nguid);
        let opened = FileMedium::open(&folder, &nguid).and_then(|medium| RecordStore::open(medium, nguid));
        let (name, nsid) = (subsystem.name.get_ref(), *namespace.nsid.get_ref());
        let store =
            opened.map_err(|source| BackingsError::Record { subsystem: name.clone(), nsid, path: path.clone(), source })?;
        // Folders on the way to a new record have to be as durable as it is.
        for folder in folder.ancestors().take(3) {
            sync(folder)?;
        }
        let record = store.current().map(|stored| stored.record);
        let recovery = recover(&[record]).map_err(|source| BackingsError::Contradiction { path: path.clone(), source })?;
        let names = read_names(&path.with_extension("names"))?;
        Ok(Self { store, recovery, names, path })
    }

    /// The name of the backing that serves; `None` = the configuration's.
    fn serving(&self) -> Result<Option<&str>, ()> {
        let Some(end) = self.recovery.serving() else { return Ok(None) };
        self.names.iter().find(|name| id(name) == end).map(|name| Some(name.as_str())).ok_or(())
    }

    /// The name of a file (its path without links) that has been this namespace's before.
    #[must_use]
    pub fn name_at(&self, config: &Config, path: &Path) -> Option<&str> {
        let is_it = |name: &&String| !name.is_empty() && config.path(Path::new(name)).canonicalize().is_ok_and(|of| of == path);
        self.names.iter().find(is_it).map(String::as_str)
    }

    /// Closes a move that was cut short.
    fn close(&mut self) -> Result<(), BackingsError> {
        let Some(record) = self.recovery.then else { return Ok(()) };
        self.store.write(record).map(|_| ()).map_err(|source| BackingsError::Io { path: self.path.clone(), source })
    }

    /// Names both ends of a move that is about to begin, durably; what its records call them and its number.
    ///
    /// # Errors
    /// [`BackingsError::Io`].
    pub fn begin(&mut self, from: &str, to: &str) -> Result<(u64, [EndId; 2]), BackingsError> {
        for name in [from, to] {
            if !self.names.iter().any(|known| known == name) {
                self.names.push(name.to_owned());
            }
        }
        write_names(&self.path.with_extension("names"), &self.names)?;
        Ok((self.recovery.next_migration, [id(from), id(to)]))
    }

    /// The store, for the journal of the move.
    #[must_use]
    pub fn into_store(self) -> RecordStore<FileMedium> {
        self.store
    }

    fn line(&self, subsystem: &str, nsid: u32, serves: &str) -> String {
        let phase = match self.recovery.phase {
            Some(RecordPhase::Moved | RecordPhase::Done) => "moved",
            _ => "undone",
        };
        let serves = if serves.is_empty() { "memory" } else { serves };
        format!("namespace {nsid} of {subsystem} is served from {serves} (media move {}, {phase})", self.recovery.migration)
    }
}

/// Closes what was cut short and lets the configuration say which file each namespace is served from; a line about each that a
/// media move has begun of. To be called before anything is built; nothing else may use the state folder.
///
/// # Errors
/// [`BackingsError`]: then nothing may be served.
pub fn settle(config: &mut Config) -> Result<Vec<String>, BackingsError> {
    follow(config, true)
}

/// As [`settle`], for whoever only looks: what was cut short stays so.
///
/// # Errors
/// [`BackingsError`].
pub fn look(config: &mut Config) -> Result<(), BackingsError> {
    follow(config, false).map(drop)
}

fn follow(config: &mut Config, close: bool) -> Result<Vec<String>, BackingsError> {
    let (mut lines, mut serving) = (Vec::new(), Vec::new());
    for (at, subsystem) in config.file.subsystems.iter().enumerate() {
        for (nth, namespace) in subsystem.namespaces.iter().enumerate() {
            let Some(nguid) = nguid_bytes(namespace.nguid.get_ref()) else { continue };
            let path = FileMedium::path(&folder(config, subsystem), &nguid);
            match path.symlink_metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(BackingsError::Io { path, source }),
                Ok(_) => {}
            }
            let mut record = BackingRecord::open(config, subsystem, namespace)?;
            let (name, nsid) = (subsystem.name.get_ref().clone(), *namespace.nsid.get_ref());
            let Ok(serves) = record.serving().map(|serves| serves.map(str::to_owned)) else {
                let (migration, path) = (record.recovery.migration, path.with_extension("names"));
                return Err(BackingsError::Stranger { subsystem: name, nsid, migration, path });
            };
            if close {
                record.close()?;
            }
            if let Some(serves) = serves {
                lines.push(record.line(&name, nsid, &serves));
                if serves != name_of(namespace) {
                    serving.push((at, nth, serves));
                }
            }
        }
    }
    for (at, nth, name) in serving {
        if let Some(namespace) = config.file.subsystems.get_mut(at).and_then(|subsystem| subsystem.namespaces.get_mut(nth)) {
            serve_from(namespace, &name);
        }
    }
    Ok(lines)
}

/// Lets the configuration say that a namespace is served from a file, or from a device's namespace. A file must be there: an empty one is never made in its place.
pub fn serve_from(namespace: &mut Namespace, name: &str) {
    if let Some((device, nsid)) = device::parse_name(name) {
        namespace.backing = BackingKind::Device;
        namespace.device = Some(Spanned::new(0..0, device.to_owned()));
        namespace.device_nsid = Some(Spanned::new(0..0, nsid));
        (namespace.path, namespace.size) = (None, None);
    } else if !name.is_empty() {
        namespace.backing = BackingKind::File;
        namespace.path = Some(Spanned::new(0..0, PathBuf::from(name)));
        namespace.size = None;
    }
}

/// Whether a media move has left a namespace with another file than the configuration's.
///
/// # Errors
/// [`BackingsError`].
pub fn is_elsewhere(config: &Config) -> Result<bool, BackingsError> {
    let mut settled = config.clone();
    settle(&mut settled)?;
    let names = |config: &Config| config.file.subsystems.iter().flat_map(|s| &s.namespaces).map(name_of).collect::<Vec<_>>();
    Ok(names(&settled) != names(config))
}

/// Forgets the media moves of a subsystem whose namespaces are about to be made anew.
///
/// # Errors
/// [`BackingsError::Io`].
pub fn forget(config: &Config, subsystem: &Subsystem) -> Result<(), BackingsError> {
    let path = folder(config, subsystem);
    match fs::remove_dir_all(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(BackingsError::Io { path, source }),
        _ => Ok(()),
    }
}

fn sync(folder: &Path) -> Result<(), BackingsError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|source| BackingsError::Io { path: folder.to_path_buf(), source })
}

fn read_names(path: &Path) -> Result<Vec<String>, BackingsError> {
    let failed = |source| BackingsError::Io { path: path.to_path_buf(), source };
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// All of them or, after a crash, those before.
fn write_names(path: &Path, names: &[String]) -> Result<(), BackingsError> {
    let failed = |source| BackingsError::Io { path: path.to_path_buf(), source };
    let beside = path.with_extension("names.new");
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(serde_json::json!(names).to_string().as_bytes())?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&beside, path)).map_err(failed)?;
    path.parent().map_or(Ok(()), sync)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_migration::{Owner, Record};

    struct Place(PathBuf);

    impl Drop for Place {
        fn drop(&mut self) {
            let _left = fs::remove_dir_all(&self.0);
        }
    }

    fn place(name: &str) -> (Place, Config) {
        let folder = std::env::temp_dir().join(format!("dray-backings-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let side = |name: &str| {
            format!(
                "[[subsystem]]\nname = \"{name}\"\nnqn = \"nqn.2026-11.org.example:it\"\nserial = \"S\"\n\
                 [[subsystem.namespace]]\nnsid = 1\nbacking = \"file\"\npath = \"{name}.img\"\nsize = \"8MiB\"\n\
                 nguid = \"000000000000000000000000000000a1\"\n\
                 [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
                 [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
            )
        };
        let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
        let migration = "[migration]\nfrom = \"a\"\nto = \"b\"\n";
        let text = format!("[core]\nstate = \"state\"\n{}{}{migration}{policies}", side("a"), side("b"));
        let config = Config::parse("appliance.toml", text, folder.clone()).expect("a configuration");
        (Place(folder), config)
    }

    fn open(config: &Config) -> BackingRecord {
        let subsystem = &config.file.subsystems[0];
        BackingRecord::open(config, subsystem, &subsystem.namespaces[0]).expect("a record")
    }

    fn write(record: BackingRecord, of: (u64, [EndId; 2]), phase: RecordPhase) {
        let moved = matches!(phase, RecordPhase::Moved | RecordPhase::Done);
        let owner = if moved { Owner::Destination } else { Owner::Source };
        let (migration, [from, to]) = of;
        let record_of = Record { migration, from, to, epoch: 1, owner, phase, fenced: moved };
        record.into_store().write(record_of).expect("written");
    }

    fn served(config: &Config) -> [String; 2] {
        [0, 1].map(|at| name_of(&config.file.subsystems[at].namespaces[0]))
    }

    #[test]
    fn the_record_says_which_file_serves_and_only_of_its_own_subsystem() {
        let (_place, fresh) = place("whole");
        let settled = || {
            let mut config = fresh.clone();
            let lines = settle(&mut config).expect("settled");
            (served(&config), lines)
        };
        assert_eq!(settled(), (["a.img".into(), "b.img".into()], vec![]), "nothing was ever moved");
        let mut record = open(&fresh);
        let begun = record.begin("a.img", "/elsewhere/copy.img").expect("names");
        assert_eq!(begun.0, 1);
        drop(record);
        assert_eq!(settled().0[0], "a.img", "named, but not begun");
        write(open(&fresh), begun, RecordPhase::Copying);
        look(&mut fresh.clone()).expect("looked at");
        assert_eq!(open(&fresh).recovery.phase, Some(RecordPhase::Copying), "looking closes nothing");
        assert_eq!(settled().0[0], "a.img", "cut short");
        let mut record = open(&fresh);
        assert_eq!(record.recovery.phase, Some(RecordPhase::Undone), "and closed");
        let file = fresh.path(Path::new("a.img"));
        fs::write(&file, "").expect("a file");
        let file = file.canonicalize().expect("there");
        assert_eq!((record.name_at(&fresh, &file), record.name_at(&fresh, &file.with_file_name("b.img"))), (Some("a.img"), None));
        let begun = record.begin("a.img", "/elsewhere/copy.img").expect("names");
        write(record, begun, RecordPhase::Moved);
        let (names, lines) = settled();
        assert_eq!(names, ["/elsewhere/copy.img", "b.img"]);
        assert_eq!(lines, ["namespace 1 of a is served from /elsewhere/copy.img (media move 2, moved)"]);
        assert_eq!(open(&fresh).recovery.phase, Some(RecordPhase::Done));
        // And back to where it began.
        let mut record = open(&fresh);
        let begun = record.begin("/elsewhere/copy.img", "a.img").expect("names");
        assert_eq!(begun.0, 3);
        write(record, begun, RecordPhase::Done);
        assert_eq!(settled().0[0], "a.img");
    }

    #[test]
    fn a_file_that_is_gone_is_not_made_anew() {
        let (_place, mut config) = place("gone");
        let mut record = open(&config);
        let begun = record.begin("a.img", "copy.img").expect("names");
        write(record, begun, RecordPhase::Done);
        settle(&mut config).expect("settled");
        let namespace = &config.file.subsystems[0].namespaces[0];
        assert!(crate::assembly::backing(&config, namespace).is_err() && !config.path(Path::new("copy.img")).exists());
    }

    #[test]
    fn what_is_not_known_is_not_served() {
        let (_place, fresh) = place("stranger");
        let mut record = open(&fresh);
        let begun = record.begin("a.img", "copy.img").expect("names");
        let path = record.path.clone();
        write(record, begun, RecordPhase::Done);
        fs::write(path.with_extension("names"), "[\"a.img\"]").expect("names");
        assert!(matches!(settle(&mut fresh.clone()), Err(BackingsError::Stranger { nsid: 1, migration: 1, .. })));
        fs::write(path.with_extension("names"), "nonsense").expect("names");
        assert!(matches!(settle(&mut fresh.clone()), Err(BackingsError::Io { .. })));
        fs::write(&path, vec![7; 8192]).expect("damage");
        assert!(matches!(settle(&mut fresh.clone()), Err(BackingsError::Record { .. })));
        forget(&fresh, &fresh.file.subsystems[0]).expect("forgotten");
        assert_eq!(settle(&mut fresh.clone()).expect("settled"), [""; 0]);
    }
}
