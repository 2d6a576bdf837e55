//! Calling the slot that was booted good: its entry loses the count of its tries.

use super::entry::{self, Tries};
use super::files::Files;
use super::{ENTRIES, look};
use crate::init::cmdline::Slot;
use std::io;

/// How the slot that was booted stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trial {
    /// It was good already, or has no entry of ours.
    None,
    /// It is on trial, with so many tries left after this one.
    Left(u32),
}

/// Looks how the slot that was booted stands. An entry of another version is not the one that was booted.
///
/// # Errors
/// The system's.
pub fn trial(files: &dyn Files, slot: Slot, version: Option<u64>) -> io::Result<Trial> {
    let found = look(files, slot)?;
    let tries = found.entry().filter(|(_, _, entry)| version.is_none() || entry.told_version() == version).map(|(_, tries, _)| *tries);
    Ok(tries.and_then(|tries| tries.left).map_or(Trial::None, Trial::Left))
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
