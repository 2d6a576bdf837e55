//! Calling the slot that was booted good: its entry loses the count of its tries.

use super::entry::{self, Tries};
use super::files::Files;
use super::{ENTRIES, look};
use crate::init::cmdline::Slot;
use std::io;

/// Where a machine can go whose slot is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The slot was good already, or has no entry of ours: it stays.
    NotOnTrial,
    /// A restart: the loader goes to the other slot, now or when this one's tries are used up.
    Back,
    /// The other slot has nothing that would be booted.
    Alone,
}

/// Where a machine can go whose slot is not good. It ends: each restart takes one try from a slot, and without tries in the other
/// slot, or one that is good, there is none.
///
/// # Errors
/// The system's.
pub fn way(files: &dyn Files, slot: Slot, version: Option<u64>) -> io::Result<Way> {
    if trial(files, slot, version)?.is_none() {
        return Ok(Way::NotOnTrial);
    }
    let other = look(files, slot.other())?;
    let boots = other.complete && other.entry().is_some_and(|(_, tries, _)| tries.left != Some(0));
    Ok(if boots { Way::Back } else { Way::Alone })
}

/// Tries that are left of a slot that is on trial; `None` if it was good already, or has no entry of ours. An entry of another
/// version is not the one that was booted.
///
/// # Errors
/// The system's.
pub fn trial(files: &dyn Files, slot: Slot, version: Option<u64>) -> io::Result<Option<u32>> {
    let found = look(files, slot)?;
    let booted = found.entry().filter(|(_, _, entry)| version.is_none() || entry.told_version() == version);
    Ok(booted.and_then(|(_, tries, _)| tries.left))
}

/// Calls the slot good; returns whether there was anything to do.
///
/// # Errors
/// The system's; the entry is as it was then, or has lost its count.
pub fn bless(files: &mut dyn Files, slot: Slot, version: Option<u64>) -> io::Result<bool> {
    let found = look(files, slot)?;
    let good = entry::name(slot, Tries::default());
    let mut done = false;
    for (name, tries, entry) in &found.entries {
        if tries.left.is_none() || (version.is_some() && entry.told_version() != version) {
            continue;
        }
        let from = format!("{ENTRIES}/{name}");
        if done || found.entries.iter().any(|(name, _, _)| *name == good) {
            // A power cut in the middle of a rename can leave two names on FAT.
            files.remove(&from)?;
        } else {
            files.rename(&from, &format!("{ENTRIES}/{good}"))?;
        }
        done = true;
    }
    if done {
        files.flush_folder(ENTRIES)?;
    }
    Ok(done)
}
