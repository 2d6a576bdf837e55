//! Entries of the boot loader (Boot Loader Specification, type 1) and their file names with counts of tries.

use crate::init::cmdline::{CommandLine, Slot};
use std::fmt::Write as _;

/// The kernel's file in a slot's folder.
pub const KERNEL: &str = "vmlinuz";
/// The initramfs's file in a slot's folder.
pub const INITRD: &str = "initrd";
/// Tries of a new slot.
pub const TRIES: u32 = 3;

/// What a file name says of tries; without a count the entry is good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tries {
    /// Tries that are left, `None` for an entry that is good.
    pub left: Option<u32>,
    /// Tries that were made.
    pub made: u32,
}

/// The file name of an entry.
#[must_use]
pub fn name(slot: Slot, tries: Tries) -> String {
    match tries {
        Tries { left: None, .. } => format!("dray-{slot}.conf"),
        Tries { left: Some(left), made: 0 } => format!("dray-{slot}+{left}.conf"),
        Tries { left: Some(left), made } => format!("dray-{slot}+{left}-{made}.conf"),
    }
}

/// The slot and the tries of a file name; `None` if it is no entry of ours.
#[must_use]
pub fn parse_name(name: &str) -> Option<(Slot, Tries)> {
    let rest = name.strip_prefix("dray-")?.strip_suffix(".conf")?;
    let (slot, counts) = rest.split_once('+').map_or((rest, None), |(slot, counts)| (slot, Some(counts)));
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    let tries = match counts.map(|counts| counts.split_once('-').unwrap_or((counts, "0"))) {
        None => Tries::default(),
        Some((left, made)) => Tries { left: Some(number(left)?), made: number(made)? },
    };
    Some((Slot::parse(slot)?, tries))
}

/// What an entry says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its version.
    pub version: Option<u64>,
    /// The kernel's command line.
    pub options: String,
}

impl Entry {
    /// Reads an entry; lines of others are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let lines = text.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
            lines.filter(|(word, _)| *word == key).map(|(_, value)| value.trim()).collect::<Vec<_>>()
        };
        Self { version: value("version").first().and_then(|text| text.parse().ok()), options: value("options").join(" ") }
    }

    /// The version that the kernel's command line tells PID 1.
    #[must_use]
    pub fn told_version(&self) -> Option<u64> {
        CommandLine::parse(&self.options).version
    }
}

/// A slot's entry.
#[must_use]
pub fn text(slot: Slot, version: u64, options: &str) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail. Entries with the same sort key are in the order of their versions, the highest first.
    let _infallible = writeln!(
        text,
        "title Dray (slot {slot}, version {version})\nsort-key dray\nversion {version}\nlinux /dray/{slot}/{KERNEL}\n\
         initrd /dray/{slot}/{INITRD}\noptions {}dray.slot={slot} dray.version={version}",
        if options.is_empty() { String::new() } else { format!("{options} ") }
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_how_many_tries_are_left() {
        for (text, slot, left, made) in
            [("dray-a.conf", Slot::A, None, 0), ("dray-b+3.conf", Slot::B, Some(3), 0), ("dray-a+2-1.conf", Slot::A, Some(2), 1)]
        {
            assert_eq!(parse_name(text), Some((slot, Tries { left, made })));
            assert_eq!(name(slot, Tries { left, made }), text);
        }
        for other in ["dray-c.conf", "dray-a+.conf", "dray-a+x.conf", "dray-a+1-.conf", "dray-a", "other.conf", "dray-a++1.conf"] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let entry = Entry::parse(&text(Slot::B, 12, "console=ttyS0 quiet"));
        assert_eq!(entry.version, Some(12));
        assert_eq!(entry.options, "console=ttyS0 quiet dray.slot=b dray.version=12");
        assert_eq!(entry.told_version(), Some(12));
        assert_eq!(Entry::parse(&text(Slot::A, 1, "")).options, "dray.slot=a dray.version=1");
        assert_eq!(Entry::parse("version\nnonsense"), Entry::default());
    }
}
