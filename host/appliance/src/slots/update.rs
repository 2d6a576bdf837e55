//! Writing the slot that does not run.

use super::bundle::{self, BundleError, Header, Key, Part};
use super::entry::{self, Tries};
use super::files::Files;
use super::{ENTRIES, folder, look};
use crate::init::cmdline::Slot;
use std::io::{self, Read};

/// What a file is called until it is whole.
const NEW: &str = ".new";
/// Room beyond the files themselves: an entry, folders, what FAT rounds up.
const SLACK_BYTES: u64 = 1 << 20;

/// Why an update was not made. The running slot is as it was.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum UpdateError {
    /// The bundle.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Bundle(#[from] BundleError),
    /// It is no newer version.
    #[error("the update has version {offered}, and version {running} runs")]
    #[diagnostic(help("--allow-downgrade installs it all the same"))]
    NotNewer {
        /// The bundle's.
        offered: u64,
        /// The running slot's.
        running: u64,
    },
    /// The partition is too small.
    #[error("the update needs {needed} bytes, and the EFI system partition has {room}")]
    Room {
        /// What it needs.
        needed: u64,
        /// What there is, the other slot's own files counted.
        room: u64,
    },
    /// The partition.
    #[error("{what}: {source}")]
    Disk {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningSlot {
    /// The slot.
    pub slot: Slot,
    /// Its version.
    pub version: Option<u64>,
}

/// Writes a bundle to the slot that does not run. `tell` hears what is being done.
///
/// # Errors
/// [`UpdateError`]: the running slot is as it was, the other one has no entry or the one it had.
pub fn update(
    from: &mut dyn Read,
    key: &Key,
    running: RunningSlot,
    allow_downgrade: bool,
    files: &mut dyn Files,
    tell: &mut dyn FnMut(&str),
) -> Result<Header, UpdateError> {
    let header = bundle::read_header(from, key)?;
    if let Some(version) = running.version.filter(|version| header.version <= *version && !allow_downgrade) {
        return Err(UpdateError::NotNewer { offered: header.version, running: version });
    }
    let slot = running.slot.other();
    tell(&format!("version {} for slot {slot}, signed by {}", header.version, key.fingerprint()));
    let mut writer = Writer { files, slot };
    let stage_first = writer.has_room(&header)?;
    if !stage_first {
        writer.take_entry_away()?;
        writer.take_files_away()?;
    }
    for (name, part, what) in [(entry::KERNEL, &header.kernel, "kernel"), (entry::INITRD, &header.initrd, "initrd")] {
        tell(&format!("{what}: {} bytes", part.bytes));
        writer.write_part(from, name, part, what)?;
    }
    if stage_first {
        writer.take_entry_away()?;
        writer.take_files_away()?;
    }
    writer.name_files()?;
    writer.write_entry(&header)?;
    Ok(header)
}

struct Writer<'a> {
    files: &'a mut dyn Files,
    slot: Slot,
}

fn disk(what: impl Into<String>) -> impl FnOnce(io::Error) -> UpdateError {
    let what = what.into();
    move |source| UpdateError::Disk { what, source }
}

impl Writer<'_> {
    fn folder(&self) -> String {
        folder(self.slot)
    }

    /// Whether the new files have room beside the old ones.
    fn has_room(&self, header: &Header) -> Result<bool, UpdateError> {
        let needed = header.kernel.bytes + header.initrd.bytes + SLACK_BYTES;
        let room = self.files.room().map_err(disk("look for room"))?;
        let size = |name: String| self.files.size(&format!("{}/{name}", self.folder()));
        // What an update before this one left is written over.
        let left = size(format!("{}{NEW}", entry::KERNEL)) + size(format!("{}{NEW}", entry::INITRD));
        if room + left >= needed {
            return Ok(true);
        }
        let room = room + left + size(entry::KERNEL.into()) + size(entry::INITRD.into());
        if room >= needed { Ok(false) } else { Err(UpdateError::Room { needed, room }) }
    }

    /// From here on nothing boots the slot.
    fn take_entry_away(&mut self) -> Result<(), UpdateError> {
        let found = look(self.files, self.slot).map_err(disk("look at the slot's entry"))?;
        for (name, _, _) in &found.entries {
            self.files.remove(&format!("{ENTRIES}/{name}")).map_err(disk(format!("remove the entry {name}")))?;
        }
        self.files.make_folder(ENTRIES).map_err(disk("make the folder of entries"))?;
        self.files.flush_folder(ENTRIES).map_err(disk("flush the folder of entries"))
    }

    fn take_files_away(&mut self) -> Result<(), UpdateError> {
        let folder = self.folder();
        self.files.make_folder(&folder).map_err(disk("make the slot's folder"))?;
        for name in [entry::KERNEL, entry::INITRD] {
            self.files.remove(&format!("{folder}/{name}")).map_err(disk(format!("remove the old {name}")))?;
        }
        self.files.flush_folder(&folder).map_err(disk("flush the slot's folder"))
    }

    fn write_part(&mut self, from: &mut dyn Read, name: &str, part: &Part, what: &'static str) -> Result<(), UpdateError> {
        let folder = self.folder();
        let path = format!("{folder}/{name}{NEW}");
        self.files.make_folder(&folder).map_err(disk("make the slot's folder"))?;
        self.files.create(&path).map_err(disk(format!("make {path}")))?;
        let files = &mut *self.files;
        let copied = bundle::copy_part(from, part, what, |bytes| files.write(bytes).map_err(disk(format!("write {path}"))));
        if let Err(error) = copied {
            // It is never booted; the room is what matters, and the error that is returned.
            let _left = self.files.finish().and_then(|()| self.files.remove(&path));
            return Err(error);
        }
        self.files.finish().map_err(disk(format!("flush {path}")))
    }

    fn name_files(&mut self) -> Result<(), UpdateError> {
        let folder = self.folder();
        for name in [entry::KERNEL, entry::INITRD] {
            let to = format!("{folder}/{name}");
            self.files.rename(&format!("{to}{NEW}"), &to).map_err(disk(format!("name {to}")))?;
        }
        self.files.flush_folder(&folder).map_err(disk("flush the slot's folder"))
    }

    fn write_entry(&mut self, header: &Header) -> Result<(), UpdateError> {
        let name = entry::name(self.slot, Tries { left: Some(entry::TRIES), made: 0 });
        let (to, beside) = (format!("{ENTRIES}/{name}"), format!("{ENTRIES}/dray-{}{NEW}", self.slot));
        let text = entry::text(self.slot, header.version, &header.options);
        let write = |files: &mut dyn Files| {
            files.create(&beside)?;
            files.write(text.as_bytes())?;
            files.finish()?;
            files.rename(&beside, &to)?;
            files.flush_folder(ENTRIES)
        };
        write(self.files).map_err(disk(format!("write the entry {name}")))
    }
}
