//! The image's two system slots: which there are, which was booted, and how the other one is written.
//!
//! The EFI system partition has, for a slot `a` or `b`, a kernel and an initramfs in `/dray/SLOT/`, and an entry of the boot
//! loader in `/loader/entries/` that names them ([`entry`]). The loader (systemd-boot, by the Boot Loader Specification) takes the entry
//! with the highest `version` that has tries left; the count of tries is in the entry's file name, `dray-b+3.conf`, and the
//! loader takes one away at each boot. PID 1 takes the count off when the slot has proved good ([`bless`]); a slot that does not
//! come up runs out of tries, and the other one is booted.
//!
//! # An update
//! A bundle ([`bundle`]) is signed; it is written to the slot that does not run ([`update`]). Interrupted at any instant, the
//! running slot's entry and files are as they were, and the other slot has a complete entry or none:
//! 1. where there is room, kernel and initramfs are written under other names, hashed on their way, and flushed;
//! 2. the other slot's entry is taken away (and, where there was no room, its files, and then 1.);
//! 3. the files get their names, and last of all the new entry, with three tries.
//!
//! # When a slot is good
//! - When the appliance serves.
//! - When the configuration is wrong, and no other version has served with the same one: that is no fault of the image's, and
//!   going back to the old one would not help. But when a version before served with this very file (its SHA-256 is kept on
//!   the state partition), a new version that refuses it is at fault: it is not good, and the machine restarts while there is
//!   another slot to go to.
//! - Not when the state partition cannot be used, or the appliance ends again and again: the machine restarts while the slot is
//!   on trial. What was good already stays up, to be looked at.

pub mod bless;
pub mod bundle;
pub mod entry;
pub mod files;
pub mod source;
pub mod update;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use crate::init::cmdline::Slot;
use entry::{Entry, Tries};
use files::Files;
use std::io;

/// The folder of the boot loader's entries.
pub const ENTRIES: &str = "loader/entries";
/// The public key that updates are signed for.
pub const KEY_FILE: &str = "/etc/dray/update.pub";
/// Most bytes of an entry.
const ENTRY_BYTES: u64 = 16 << 10;

/// The folder of a slot's kernel and initramfs.
#[must_use]
pub fn folder(slot: Slot) -> String {
    format!("dray/{slot}")
}

/// What is in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// Which.
    pub slot: Slot,
    /// Its entries' file names, tries and contents; more than one only after a power cut.
    pub entries: Vec<(String, Tries, Entry)>,
    /// The files that its entry names are there.
    pub complete: bool,
}

impl SlotInfo {
    /// The entry that counts: one without tries to count down before others.
    #[must_use]
    pub fn entry(&self) -> Option<&(String, Tries, Entry)> {
        self.entries.iter().min_by_key(|(_, tries, _)| tries.left.is_some())
    }
}

/// Looks at a slot.
///
/// # Errors
/// The system's.
pub fn look(files: &dyn Files, slot: Slot) -> io::Result<SlotInfo> {
    let mut entries = Vec::new();
    for name in files.list(ENTRIES)? {
        let Some((of, tries)) = entry::parse_name(&name) else { continue };
        if of == slot {
            let text = files.read(&format!("{ENTRIES}/{name}"), ENTRY_BYTES)?;
            entries.push((name, tries, Entry::parse(&String::from_utf8_lossy(&text))));
        }
    }
    let names = files.list(&folder(slot))?;
    let complete = [entry::KERNEL, entry::INITRD].iter().all(|file| names.iter().any(|name| name == file));
    Ok(SlotInfo { slot, entries, complete })
}
