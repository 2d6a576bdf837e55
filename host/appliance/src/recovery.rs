//! What a start does with the durable records: read before anything is built, closed before anything is served.
//!
//! The decision is [`dray_migration::recovery`]'s; here are the files, the names of the ends, and the words for the operator.

use crate::config::{Config, Subsystem, nguid_bytes};
use crate::core::records::{FileMedium, RecordError, RecordStore, end_id};
use dray_migration::{Contradiction, EndId, Owner, Record, RecordPhase, Recovery, recover};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a process that was killed may take to let go of its files.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(2);

/// Why nothing can be served.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum RecoveryError {
    /// A record cannot be read.
    #[error("the record of namespace {nsid}: {source} ({})", path.display())]
    #[diagnostic(help("if you know which side has the data, remove the file: the source of the configuration serves then"))]
    Record {
        /// The namespace.
        nsid: u32,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: RecordError,
    },
    /// A record cannot be written.
    #[error("the closing record cannot be written in {}: {source}", folder.display())]
    Write {
        /// The folder.
        folder: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The records contradict each other.
    #[error("{source}: nobody knows who serves ({})", folder.display())]
    #[diagnostic(help("if you know which side has the data, remove the files: the source of the configuration serves then"))]
    Contradiction {
        /// The folder.
        folder: PathBuf,
        /// What is wrong.
        source: Contradiction,
    },
    /// The records name an end that the configuration does not have.
    #[error("the record of migration {migration} names a subsystem as the owner that is neither \"{from}\" nor \"{to}\"")]
    #[diagnostic(help("a record knows a subsystem by its name and its NQN: were they changed in the configuration?"))]
    Stranger {
        /// The migration.
        migration: u64,
        /// The configured source.
        from: String,
        /// The configured destination.
        to: String,
    },
    /// The configuration has no such end.
    #[error("there is no subsystem \"{0}\", or a namespace of it has no NGUID")]
    NoEnd(String),
}

/// The records of the migration set that the configuration names, and what follows from them.
pub struct Records {
    stores: Vec<RecordStore<FileMedium>>,
    folder: PathBuf,
    ends: [EndId; 2],
    names: [String; 2],
    recovery: Recovery,
}

impl Records {
    /// Reads the records of all namespaces of the configured source. Nothing is written.
    ///
    /// # Errors
    /// [`RecoveryError`]: what cannot be read is never taken for a namespace that was not moved.
    pub fn open(config: &Config) -> Result<Self, RecoveryError> {
        let folder = config.path(&config.file.core.state).join("records");
        let [from, to] = [&config.file.migration.from, &config.file.migration.to].map(toml::Spanned::get_ref);
        let end = |name: &String| config.subsystem(name).ok_or_else(|| RecoveryError::NoEnd(name.clone()));
        let (source, destination) = (end(from)?, end(to)?);
        let mut stores = Vec::new();
        for namespace in &source.namespaces {
            let nguid = nguid_bytes(namespace.nguid.get_ref()).ok_or_else(|| RecoveryError::NoEnd(from.clone()))?;
            let open = FileMedium::open(&folder, &nguid).and_then(|medium| RecordStore::open(medium, nguid));
            let (nsid, path) = (*namespace.nsid.get_ref(), FileMedium::path(&folder, &nguid));
            stores.push(open.map_err(|source| RecoveryError::Record { nsid, path, source })?);
        }
        let records: Vec<_> = stores.iter().map(|store| store.current().map(|stored| stored.record)).collect();
        let recovery = recover(&records).map_err(|source| RecoveryError::Contradiction { folder: folder.clone(), source })?;
        let ends = [id(source), id(destination)];
        Ok(Self { stores, folder, ends, names: [from.clone(), to.clone()], recovery })
    }

    /// Makes the configured source the owner, since its namespaces are about to be made anew: whatever was recorded of the old
    /// ones is over. Numbers go on rising.
    ///
    /// # Errors
    /// [`RecoveryError::Write`].
    pub fn renew(&mut self) -> Result<(), RecoveryError> {
        if self.recovery.phase.is_some() {
            let [from, to] = self.ends;
            let (migration, phase) = (self.recovery.next_migration, RecordPhase::Undone);
            self.write(Record { migration, from, to, epoch: 1, owner: Owner::Source, phase, fenced: false })?;
        }
        Ok(())
    }

    /// Writes the closing record of a migration that was cut short.
    ///
    /// # Errors
    /// [`RecoveryError::Write`]: then nothing may be served.
    pub fn close(&mut self) -> Result<(), RecoveryError> {
        self.recovery.then.map_or(Ok(()), |record| self.write(record))
    }

    fn write(&mut self, record: Record) -> Result<(), RecoveryError> {
        let folder = &self.folder;
        for store in &mut self.stores {
            store.write(record).map_err(|source| RecoveryError::Write { folder: folder.clone(), source })?;
        }
        let all = vec![Some(record); self.stores.len()];
        self.recovery = recover(&all).map_err(|source| RecoveryError::Contradiction { folder: folder.clone(), source })?;
        Ok(())
    }

    /// Which end of the configuration serves.
    ///
    /// # Errors
    /// [`RecoveryError::Stranger`].
    pub fn serving(&self) -> Result<Owner, RecoveryError> {
        match self.recovery.serving() {
            None => Ok(Owner::Source),
            Some(end) if end == self.ends[0] => Ok(Owner::Source),
            Some(end) if end == self.ends[1] => Ok(Owner::Destination),
            Some(_) => {
                let [from, to] = self.names.clone();
                Err(RecoveryError::Stranger { migration: self.recovery.migration, from, to })
            }
        }
    }

    /// Whether the controllers of a subsystem are to be built behind a raised fence (rule 9).
    #[must_use]
    pub fn is_fenced(&self, subsystem: &Subsystem) -> bool {
        self.recovery.fenced() == Some(id(subsystem))
    }

    /// What was found and what follows, in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let Recovery { migration, phase, why, .. } = self.recovery;
        let phase = match phase {
            None => return format!("found no record: {why}"),
            Some(RecordPhase::Copying) => "copying",
            Some(RecordPhase::Moved) => "moved",
            Some(RecordPhase::Done) => "done",
            Some(RecordPhase::Undone) => "undone",
        };
        format!("found the record of migration {migration}, phase {phase}: {why}")
    }

    /// The number of the next migration.
    #[must_use]
    pub fn next_migration(&self) -> u64 {
        self.recovery.next_migration
    }

    /// The names of source and destination in records.
    #[must_use]
    pub fn ends(&self) -> [EndId; 2] {
        self.ends
    }

    /// The stores, for the journal of the next migration.
    #[must_use]
    pub fn into_stores(self) -> Vec<RecordStore<FileMedium>> {
        self.stores
    }
}

fn id(subsystem: &Subsystem) -> EndId {
    end_id(subsystem.name.get_ref(), &subsystem.nqn)
}

/// Asks again and again until something is free or [`PATIENCE`] is over.
///
/// # Errors
/// Those of `free`, and [`io::ErrorKind::ResourceBusy`].
pub fn wait_for(mut free: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !free()? {
        if Instant::now() >= end {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process uses it"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The state folder, for one process alone: two would serve the same namespaces.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes the folder (made if it is missing); waits for a process that is just ending.
    ///
    /// # Errors
    /// The filesystem's; [`io::ErrorKind::ResourceBusy`] when another process keeps it.
    pub fn take(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(folder.join("lock"))?;
        wait_for(|| match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        })?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place(PathBuf);

    impl Drop for Place {
        fn drop(&mut self) {
            let _left = std::fs::remove_dir_all(&self.0);
        }
    }

    fn place(name: &str) -> (Place, Config) {
        let folder = std::env::temp_dir().join(format!("dray-recovery-{name}-{}", std::process::id()));
        (Place(folder.clone()), config(&folder, "source", "destination"))
    }

    fn config(folder: &Path, from: &str, to: &str) -> Config {
        let side = |name: &str| {
            let namespace = |nsid: u8| {
                format!(
                    "[[subsystem.namespace]]\nnsid = {nsid}\nbacking = \"memory\"\nsize = \"8MiB\"\nblock = \"4KiB\"\n\
                     nguid = \"{nsid:032x}\"\n"
                )
            };
            format!(
                "[[subsystem]]\nname = \"{name}\"\nnqn = \"nqn.2026-11.org.example:it\"\nserial = \"S\"\n{}{}\
                 [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
                 [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1, 2]\n",
                namespace(1),
                namespace(2)
            )
        };
        let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
        let migration = format!("[migration]\nfrom = \"{from}\"\nto = \"{to}\"\n");
        let text = format!("[core]\nstate = \"state\"\n{}{}{migration}{policies}", side("source"), side("destination"));
        Config::parse("appliance.toml", text, folder.to_path_buf()).expect("a configuration")
    }

    fn record(records: &Records, phase: RecordPhase) -> Record {
        let moved = matches!(phase, RecordPhase::Moved | RecordPhase::Done);
        let owner = if moved { Owner::Destination } else { Owner::Source };
        let [from, to] = records.ends();
        Record { migration: records.next_migration(), from, to, epoch: 1, owner, phase, fenced: moved }
    }

    fn fenced(records: &Records, config: &Config) -> [bool; 2] {
        ["source", "destination"].map(|name| records.is_fenced(config.subsystem(name).expect("a subsystem")))
    }

    #[test]
    fn a_move_that_was_cut_short_is_closed_and_its_source_stays_fenced() {
        let (_place, config) = place("moved");
        let mut records = Records::open(&config).expect("new");
        assert_eq!(records.line(), "found no record: nothing was ever moved: the source serves");
        records.close().expect("nothing to close");
        let moved = record(&records, RecordPhase::Moved);
        // One namespace after the other: after the first alone the source serves.
        records.stores[0].write(moved).expect("written");
        let half = Records::open(&config).expect("records");
        assert_eq!((half.serving().expect("an end"), fenced(&half, &config)), (Owner::Source, [false, false]));
        records.stores[1].write(moved).expect("written");
        let mut whole = Records::open(&config).expect("records");
        let line = "found the record of migration 1, phase moved: the destination serves, the source stays fenced";
        assert_eq!(whole.line(), line);
        assert_eq!((whole.serving().expect("an end"), fenced(&whole, &config)), (Owner::Destination, [true, false]));
        whole.close().expect("closed");
        let done = Records::open(&config).expect("records");
        assert_eq!((done.line(), done.next_migration()), (line.replace("moved", "done"), 2));
        assert_eq!(fenced(&done, &config), [true, false]);
    }

    #[test]
    fn an_owner_is_known_by_its_name_whichever_way_the_next_migration_goes() {
        let (place, there) = place("back");
        let mut records = Records::open(&there).expect("new");
        records.write(record(&records, RecordPhase::Done)).expect("written");
        let back = config(&place.0, "destination", "source");
        let records = Records::open(&back).expect("records");
        assert_eq!((records.serving().expect("an end"), fenced(&records, &back)), (Owner::Source, [true, false]));
        assert_eq!(records.next_migration(), 2);
    }

    #[test]
    fn new_disks_begin_at_the_source_and_numbers_go_on() {
        let (_place, config) = place("renewed");
        let mut records = Records::open(&config).expect("new");
        records.renew().expect("nothing to renew");
        assert_eq!(records.next_migration(), 1);
        records.write(record(&records, RecordPhase::Done)).expect("written");
        records.renew().expect("renewed");
        let records = Records::open(&config).expect("records");
        assert_eq!((records.serving().expect("an end"), records.next_migration()), (Owner::Source, 3));
        assert_eq!(fenced(&records, &config), [false, false]);
    }

    #[test]
    fn what_cannot_be_trusted_is_shown_and_not_served() {
        let (place, config) = place("refused");
        let mut records = Records::open(&config).expect("new");
        let stranger = Record { from: [1; 16], to: [2; 16], ..record(&records, RecordPhase::Done) };
        records.write(stranger).expect("written");
        let found = Records::open(&config).expect("records");
        assert!(matches!(found.serving(), Err(RecoveryError::Stranger { migration: 1, .. })));
        let path = FileMedium::path(&place.0.join("state/records"), &nguid_bytes(&format!("{:032x}", 2)).expect("NGUID"));
        std::fs::write(&path, vec![7; 8192]).expect("damage");
        let error = Records::open(&config).err().expect("refused").to_string();
        assert!(error.starts_with("the record of namespace 2: both slots are damaged"), "{error}");
    }

    #[test]
    fn a_state_folder_is_for_one_process() {
        let (place, _) = place("locked");
        let first = StateLock::take(&place.0).expect("free");
        let path = place.0.clone();
        let second = std::thread::spawn(move || StateLock::take(&path).is_ok());
        assert!(!second.is_finished());
        drop(first);
        assert!(second.join().expect("no panic"), "free again");
    }
}
