//! Media moves of the running appliance: what one needs besides what every migration needs.

use super::Place;
use super::core::{Mailbox, Order};
use super::migrate::CORE_PATIENCE;
use crate::assembly;
use crate::backings::{BackingRecord, name_of, serve_from};
use crate::config::{BackingKind, Config, Namespace, Role, Subsystem, device};
use crate::control::{ControlError, ErrorCode};
use dray_controller::FileBacking;
use dray_device::backing::Backing;
use dray_device::slot::Fence;
use dray_migration::media_move::desk::desk;
use dray_migration::media_move::{Asker, Clerk, CopyOf};
use dray_migration::{BackingQueue, BackingShelf, EndId, FenceControl, Owner};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

/// Commands in the copy at a time.
const COPY_DEPTH: u32 = 128;

/// A namespace and the file that it is to be served from.
pub(super) struct Wish {
    pub(super) subsystem: String,
    pub(super) nsid: u32,
    pub(super) to: PathBuf,
}

fn refused(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorCode::Refused, message)
}

/// The namespace of the configuration, or that there is none.
fn find<'a>(config: &'a Config, wish: &Wish) -> Result<(usize, &'a Subsystem, &'a Namespace), ControlError> {
    let no_such = |message| ControlError::new(ErrorCode::NoSuch, message);
    let at = config.file.subsystems.iter().position(|subsystem| *subsystem.name.get_ref() == wish.subsystem);
    let at = at.ok_or_else(|| no_such(format!("there is no subsystem \"{}\"", wish.subsystem)))?;
    let subsystem = &config.file.subsystems[at];
    let namespace = subsystem.namespaces.iter().find(|namespace| *namespace.nsid.get_ref() == wish.nsid);
    let namespace = namespace.ok_or_else(|| no_such(format!("there is no namespace {} in \"{}\"", wish.nsid, wish.subsystem)))?;
    Ok((at, subsystem, namespace))
}

/// A move that is ready to begin, but for what every migration has.
pub(super) struct Prepared {
    pub(super) record: BackingRecord,
    /// Its number, and what records call its ends.
    pub(super) begun: (u64, [EndId; 2]),
    pub(super) queue: BackingQueue,
    pub(super) asker: Asker,
    pub(super) fences: Gate,
    /// CNTLIDs of the controllers that stay: all migratable ones that have the namespace.
    pub(super) controllers: Vec<u16>,
    /// What is kept until the end.
    pub(super) kept: Kept,
    /// Which subsystem's.
    pub(super) at: usize,
}

/// What the main thread keeps of a move that runs.
pub(super) struct Kept {
    pub(super) subsystem: String,
    pub(super) nsid: u32,
    /// Names of the backings: old, new.
    pub(super) names: [String; 2],
    at: usize,
    pub(super) clerk: Clerk,
    shelf: BackingShelf,
    file: Target,
}

/// Opens the copy and asks the subsystem whether it could have it.
pub(super) fn prepare(config: &Config, places: &[Place], mailbox: &Mailbox, wish: &Wish) -> Result<Prepared, ControlError> {
    let (at, subsystem, namespace) = find(config, wish)?;
    let place = places.get(at).ok_or_else(|| refused("the subsystem does not run"))?;
    let having = subsystem.controllers.iter().filter(|controller| controller.role == Role::Migratable);
    let having = having.filter(|controller| controller.namespaces.iter().any(|nsid| *nsid.get_ref() == wish.nsid));
    let controllers: Vec<u16> = having.map(|controller| *controller.cntlid.get_ref()).collect();
    if controllers.is_empty() {
        return Err(refused(format!("no migratable controller of \"{}\" has namespace {}", wish.subsystem, wish.nsid)));
    }
    let fences = place.migratable.iter().filter(|migratable| controllers.contains(&migratable.cntlid));
    let fences: Vec<_> = fences.map(|migratable| migratable.fence.clone()).collect();
    if fences.iter().any(Fence::is_up) {
        return Err(refused(format!("\"{}\" does not serve: its controllers are fenced", wish.subsystem)));
    }
    let failed = |error: &dyn std::fmt::Display| ControlError::new(ErrorCode::Failed, format!("the record of media moves: {error}"));
    let mut record = BackingRecord::open(config, subsystem, namespace).map_err(|error| failed(&error))?;
    let (target, copy) = match wish.to.to_str().and_then(device::parse_name) {
        Some((device, nsid)) => of_device(config, namespace, device, nsid)?,
        None => {
            let target = Target::new(config, namespace, &record, &wish.to)?;
            let copy = target.open(block_of(config, namespace)?)?;
            (target, copy)
        }
    };
    let copy = may_exchange(mailbox, at, wish.nsid, copy)?;
    let names = [name_of(namespace), target.name.clone()];
    // Durable before the first record that means it.
    let begun = record.begin(&names[0], &names[1]).map_err(|error| failed(&error))?;
    let (queue, shelf) = BackingQueue::new(vec![(wish.nsid, copy)], COPY_DEPTH);
    let (asker, clerk) = desk(shelf.clone(), vec![CopyOf { nsid: wish.nsid, on_shelf: wish.nsid, refused: None }]);
    let kept = Kept { subsystem: wish.subsystem.clone(), nsid: wish.nsid, names, at, clerk, shelf, file: target };
    Ok(Prepared { record, begun, queue, asker, fences: Gate(fences), controllers, kept, at })
}

/// Asks the subsystem on its core whether a backing could stand behind the namespace.
fn may_exchange(mailbox: &Mailbox, at: usize, nsid: u32, copy: Box<dyn Backing>) -> Result<Box<dyn Backing>, ControlError> {
    let (to, answer) = channel();
    mailbox.put(Order::MayExchange { at, nsid, copy, to });
    let lost = |_| ControlError::new(ErrorCode::Failed, "the polling core does not answer");
    answer.recv_timeout(CORE_PATIENCE).map_err(lost)?.map_err(refused)
}

impl Kept {
    /// The move begins. From here on the file may be the one that serves: it goes only when that is known not to be so.
    pub(super) fn begins(&mut self) {
        self.file.goes = false;
    }

    /// The move has ended, and the migration is taken apart. What is not used any more is closed; the configuration says what
    /// serves.
    pub(super) fn over(mut self, moved: bool, is_clear: bool, config: &mut Config) {
        drop(self.clerk.take_old());
        // Where there was no exchange, or it was taken back, it is still there.
        drop(self.shelf.take(self.nsid));
        self.file.goes = self.file.made && !moved && is_clear;
        let subsystem = config.file.subsystems.get_mut(self.at).filter(|_| moved);
        let namespaces = subsystem.into_iter().flat_map(|subsystem| &mut subsystem.namespaces);
        for namespace in namespaces.filter(|namespace| *namespace.nsid.get_ref() == self.nsid) {
            serve_from(namespace, &self.names[1]);
        }
    }
}

/// A namespace of a device as the copy. What is on it goes.
fn of_device(config: &Config, namespace: &Namespace, name: &str, nsid: u32) -> Result<(Target, Box<dyn Backing>), ControlError> {
    let whole = device::name_of(name, nsid);
    not_served(config, name, nsid)?;
    let block = block_of(config, namespace)?;
    let copy = crate::devices::backing(config, name, nsid, Some(block)).map_err(refused)?;
    Ok((Target { path: PathBuf::from(&whole), name: whole, made: false, goes: false }, copy))
}

/// A namespace of a device that is one of ours is nowhere to copy to.
pub(super) fn not_served(config: &Config, name: &str, nsid: u32) -> Result<(), ControlError> {
    for subsystem in &config.file.subsystems {
        if let Some(other) = subsystem.namespaces.iter().find(|other| other.at_device() == Some((name, nsid))) {
            let (whole, nsid, name) = (device::name_of(name, nsid), other.nsid.get_ref(), subsystem.name.get_ref());
            return Err(refused(format!("{whole} is namespace {nsid} of \"{name}\"")));
        }
    }
    Ok(())
}

/// The file of a copy.
struct Target {
    name: String,
    path: PathBuf,
    /// It was not there before.
    made: bool,
    /// It is removed with this: it was made for a move that came to nothing.
    goes: bool,
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.goes {
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

impl Target {
    /// A file that may be written, made if it is not there: nobody else's, and not one that is there for another purpose.
    fn new(config: &Config, namespace: &Namespace, record: &BackingRecord, to: &Path) -> Result<Self, ControlError> {
        let path = config.path(to);
        let name = to.to_str().filter(|name| !name.is_empty()).ok_or_else(|| refused("the file's name is not UTF-8"))?.to_owned();
        let failed = |what: &str, error: io::Error| {
            ControlError::new(ErrorCode::Failed, format!("{what} {}: {error}", path.display()))
        };
        let found = match path.metadata() {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let bytes = bytes_of(config, namespace).map_err(|error| failed("the size for", error))?;
                make(&path, bytes).map_err(|error| failed("cannot make", error))?;
                return Ok(Self { name, path, made: true, goes: true });
            }
            Err(error) => return Err(failed("cannot look at", error)),
        };
        let whole = path.canonicalize().map_err(|error| failed("cannot look at", error))?;
        for subsystem in &config.file.subsystems {
            for other in &subsystem.namespaces {
                let of = assembly::file_of(config, other).and_then(|of| of.canonicalize().ok());
                if of.is_some_and(|of| of == whole) {
                    let (nsid, name) = (other.nsid.get_ref(), subsystem.name.get_ref());
                    return Err(refused(format!("{} is namespace {nsid} of \"{name}\"", path.display())));
                }
            }
        }
        match record.name_at(config, &whole) {
            Some(known) => Ok(Self { name: known.to_owned(), path, made: false, goes: false }),
            None if found.file_type().is_block_device() => Ok(Self { name, path, made: false, goes: false }),
            None => {
                let message = format!("{} is there already, and it was never this namespace's: name another file", path.display());
                Err(refused(message))
            }
        }
    }

    fn open(&self, block: u32) -> Result<Box<dyn Backing>, ControlError> {
        let wrong = |error: &dyn std::fmt::Display| refused(format!("{}: {error}", self.path.display()));
        let backing = FileBacking::open(&self.path, block, COPY_DEPTH).map_err(|error| wrong(&error))?;
        match backing.try_lock() {
            Ok(true) => Ok(Box::new(backing)),
            Ok(false) => Err(wrong(&"another process uses it")),
            Err(error) => Err(wrong(&error)),
        }
    }
}

/// Makes a file that a power cut leaves in its folder.
fn make(path: &Path, bytes: u64) -> io::Result<()> {
    let file = File::create_new(path)?;
    let made = file.set_len(bytes).and_then(|()| file.sync_all());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = made.and_then(|()| File::open(folder)?.sync_all());
    if made.is_err() {
        let _gone = std::fs::remove_file(path);
    }
    made
}

/// Bytes of a logical block, as guests were told: a device's own, where the namespace is one's.
fn block_of(config: &Config, namespace: &Namespace) -> Result<u32, ControlError> {
    match namespace.at_device() {
        Some((name, nsid)) => {
            config.devices.look(config, name, nsid).map(|found| found.block_bytes).map_err(|error| refused(error.to_string()))
        }
        None => u32::try_from(namespace.block.get_ref().0).map_err(|error| refused(error.to_string())),
    }
}

fn bytes_of(config: &Config, namespace: &Namespace) -> io::Result<u64> {
    if let Some((name, nsid)) = namespace.at_device() {
        let found = config.devices.look(config, name, nsid).map_err(io::Error::other)?;
        return Ok(found.blocks.saturating_mul(u64::from(found.block_bytes)));
    }
    match assembly::file_of(config, namespace).filter(|_| namespace.backing == BackingKind::File) {
        // Also of a block device.
        Some(path) => File::open(path)?.seek(SeekFrom::End(0)),
        None => Ok(namespace.size.as_ref().map_or(0, |size| size.get_ref().0)),
    }
}

/// The fences of the controllers that stay.
pub(super) struct Gate(Vec<Fence>);

impl FenceControl for Gate {
    fn raise(&mut self, end: Owner) {
        if end == Owner::Source {
            self.0.iter().for_each(Fence::raise);
        }
    }

    fn lower(&mut self, end: Owner) {
        if end == Owner::Source {
            self.0.iter().for_each(Fence::lower);
        }
    }
}
