//! What devices a module is for: the image loads those alone that have one, since each costs a good part of a second where the
//! kernel is emulated, and megabytes.

use crate::kernel::{needs, says};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Sets that are loaded whatever is there: their devices come and go while the machine runs.
pub const ALWAYS: [&str; 2] = ["vfio", "nvme"];
/// Buses whose devices are all there when the first process starts.
const BUSES: [&str; 2] = ["pci:", "virtio:"];

/// For each module the patterns of the devices that it is wanted for; `None`: it is wanted in any case.
#[derive(Default)]
pub struct Wanted(BTreeMap<String, Option<BTreeSet<String>>>);

impl Wanted {
    /// Adds a word of a set, `MODULE` or `MODULE+OTHER+…` (the others are wanted where the first one is): these modules and those
    /// that they need, all of them in `order`. Returns their names, in that order.
    pub fn add<'a>(&mut self, set: &str, word: &str, order: &'a [(String, Vec<u8>)]) -> Vec<&'a str> {
        let mut names: Vec<String> = word.split('+').map(|name| name.replace('-', "_")).collect();
        let module = |name: &str| order.iter().find(|(known, _)| known == name).map(|(_, bytes)| bytes.as_slice());
        let patterns = module(&names[0]).and_then(patterns);
        let mut seen = BTreeSet::new();
        while let Some(name) = names.pop() {
            // What is not there is built into the kernel.
            let Some(bytes) = module(&name).filter(|_| !seen.contains(&name)) else { continue };
            names.extend(needs(bytes));
            seen.insert(name.clone());
            if ALWAYS.contains(&set) {
                continue;
            }
            let before = self.0.entry(name).or_insert_with(|| Some(BTreeSet::new()));
            match (before.as_mut(), &patterns) {
                (Some(known), Some(more)) => known.extend(more.iter().cloned()),
                _ => *before = None,
            }
        }
        order.iter().map(|(name, _)| name.as_str()).filter(|name| seen.contains(*name)).collect()
    }

    /// The list for the first process: a module's file, a colon, patterns, per line.
    pub fn list(&self) -> String {
        let mut text = "# Modules that are loaded for one of these devices alone.\n".to_owned();
        for (name, patterns) in self.0.iter().filter_map(|(name, patterns)| Some((name, patterns.as_ref()?))) {
            // Writing to a String cannot fail.
            let _ = write!(text, "{name}.ko:");
            for pattern in patterns {
                let _ = write!(text, " {pattern}");
            }
            text.push('\n');
        }
        text
    }
}

/// The devices that a module is for; `None` if it names none on these buses, or in a way that the image does not read.
fn patterns(module: &[u8]) -> Option<BTreeSet<String>> {
    let aliases = says(module, "alias").map(std::borrow::Cow::into_owned);
    let found: BTreeSet<_> = aliases.filter(|alias| BUSES.iter().any(|bus| alias.starts_with(bus))).collect();
    let plain = |pattern: &String| pattern.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'[');
    (!found.is_empty() && found.iter().all(plain)).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, text: &str) -> (String, Vec<u8>) {
        (name.into(), format!("\0{}\0", text.replace(' ', "\0")).into_bytes())
    }

    #[test]
    fn what_only_absent_devices_need_has_their_patterns_and_what_others_need_has_none() {
        let order = [
            module("lib", "depends="),
            module("a", "depends=lib alias=pci:v1* alias=auxiliary:a"),
            module("b", "depends=lib alias=virtio:d1v*"),
            module("usb_core", "depends="),
            module("host", "depends=usb-core alias=pci:v*bc0C*"),
            module("stick", "depends=usb-core alias=usb:v*"),
            module("disk", "depends= alias=pci:v9*"),
            module("odd", "depends= alias=pci:v[12]*"),
            module("ext4", "depends= alias=fs-ext4"),
        ];
        let mut wanted = Wanted::default();
        let words = ["a", "b", "host+stick", "disk", "odd", "ext4", "built-in"];
        let chains: Vec<_> = words.iter().map(|word| wanted.add("net", word, &order).join(" ")).collect();
        assert_eq!(chains, ["lib a", "lib b", "usb_core host stick", "disk", "odd", "ext4", ""]);
        let lines = |wanted: &Wanted| wanted.list().lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
        let found = lines(&wanted);
        let [a, b, disk] = ["a.ko: pci:v1*", "b.ko: virtio:d1v*", "disk.ko: pci:v9*"];
        let (usb, lib) = (["host", "stick", "usb_core"].map(|name| format!("{name}.ko: pci:v*bc0C*")), "lib.ko: pci:v1* virtio:d1v*");
        assert_eq!(found, [a, b, disk, &usb[0], lib, &usb[1], &usb[2]]);
        // A set that is loaded whatever is there says so itself, and nothing of others.
        assert_eq!(wanted.add("vfio", "a", &order), ["lib", "a"]);
        wanted.add("vfio", "lone", &[module("lone", "depends= alias=pci:v5*")]);
        assert_eq!(lines(&wanted), found);
        // Wanted in any case by a word: so is what it needs.
        let fixed = [module("lib", "depends="), module("plain", "depends=lib")];
        wanted.add("net", "plain", &fixed);
        assert_eq!(lines(&wanted), [a, b, disk, &usb[0], &usb[1], &usb[2]]);
        wanted.add("disk", "a", &order);
        assert_eq!(lines(&wanted), [a, b, disk, &usb[0], &usb[1], &usb[2]], "once in any case, always in any case");
    }
}
