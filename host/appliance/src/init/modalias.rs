//! What devices a module is for, and whether one of them is there.
//!
//! A line of `/etc/dray/aliases` is a module's path, a colon, and patterns such as `pci:v00008086d000015B8sv*sd*bc*sc*i*`. The
//! kernel says what each device is in its `modalias`. A module of the list is left out while no device matches: a big driver costs
//! megabytes and a part of the start for nothing. One that is not in the list is loaded in any case, and all are where no bus can
//! be read.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The list.
pub const LIST: &str = "/etc/dray/aliases";
/// The kernel's buses.
pub const BUSES: &str = "/sys/bus";
/// Those that patterns are for: to read what stands on all others takes a good part of a second where the machine is emulated.
const LOOKED_AT: [&str; 2] = ["pci", "virtio"];
/// Whose disks come some time after the driver: SCSI, RAID, SAS, USB. Those of SATA, NVMe and virtio-blk are there when the
/// driver has been loaded, since the kernel waits for its probes then.
const LATE: [&str; 6] =
    ["pci:*bc01sc00*", "pci:*bc01sc04*", "pci:*bc01sc05*", "pci:*bc01sc07*", "pci:*bc0Csc03*", "virtio:d00000008*"];
/// Most bytes of a device's `modalias`: the kernel makes at most a page.
const MODALIAS_BYTES: u64 = 4096;
/// Most devices that are looked at.
const DEVICES: usize = 65_536;

/// The patterns of modules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aliases(HashMap<PathBuf, Vec<String>>);

impl Aliases {
    /// Reads a list; a line that makes no sense says nothing about any module.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(": "));
        let line = |(path, patterns): (&str, &str)| (path.into(), patterns.split_whitespace().map(str::to_owned).collect());
        Self(lines.map(line).collect())
    }

    /// Whether a module is of use: one of its devices is there, or it is not said which they are.
    #[must_use]
    pub fn wants(&self, module: &Path, devices: &[String]) -> bool {
        let Some(patterns) = self.0.get(module) else { return true };
        devices.is_empty() || devices.iter().any(|device| patterns.iter().any(|pattern| matches(pattern, device)))
    }
}

/// What the devices of the buses are that patterns are for; `buses` is `/sys/bus`.
#[must_use]
pub fn devices(buses: &Path) -> Vec<String> {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
    let devices = LOOKED_AT.iter().flat_map(|bus| entries(&buses.join(bus).join("devices")));
    let mut found: Vec<_> = devices.take(DEVICES).filter_map(|device| modalias(&device.path().join("modalias"))).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Whether disks may come some time after their drivers; so it is where no bus can be read.
#[must_use]
pub fn may_bring_disks_later(devices: &[String]) -> bool {
    devices.is_empty() || devices.iter().any(|device| LATE.iter().any(|pattern| matches(pattern, device)))
}

fn modalias(path: &Path) -> Option<String> {
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(MODALIAS_BYTES).read_to_string(&mut text).ok()?;
    Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
}

/// Whether a text is of a pattern's form: `*` is any bytes, `?` is one.
///
/// Only the last `*` is ever gone back to: the time is at most the product of both lengths.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut at, mut seen) = (0, 0);
    // Behind the last `*`, and where the text that follows it was taken to begin.
    let mut back = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                at += 1;
                back = Some((at, seen));
            }
            Some(byte) if *byte == b'?' || *byte == text[seen] => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((star, begin)) = back else { return false };
                back = Some((star, begin + 1));
                (at, seen) = (star, begin + 1);
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_a_shell_has_it() {
        for (pattern, text) in [
            ("", ""),
            ("*", ""),
            ("a*c", "abcbc"),
            ("a?c*", "abc"),
            ("a*bcd", "abcbcd"),
            ("virtio:d00000001v*", "virtio:d00000001v00001AF4"),
            ("pci:v*d*sv*sd*bc01sc06i01*", "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("a", ""),
            ("?", ""),
            ("a*c", "abcb"),
            ("a*b*c", "acb"),
            ("virtio:d00000001v*", "virtio:d00000002v00001AF4"),
            ("pci:v*d*sv*sd*bc01sc06i01*", "pci:v00008086d00002922sv00001AF4sd00001100bc01sc08i02"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
        // Nor does a pattern that would keep a naive one busy for ever.
        assert!(!matches(&"a*".repeat(100), &format!("{}b", "a".repeat(50))));
        assert!(!matches(&format!("{}b", "a*".repeat(50)), &"a".repeat(4000)));
    }

    #[test]
    fn buses_whose_disks_come_later_are_known() {
        let pci = |class: &str| format!("pci:v00008086d00002922sv00001AF4sd00001100bc{class}");
        let late = |devices: &[String]| may_bring_disks_later(devices);
        assert!(!late(&[pci("01sc06i01"), pci("01sc08i02"), pci("02sc00i00"), "virtio:d00000002v00001AF4".into()]));
        assert!(late(&[pci("02sc00i00"), pci("0Csc03i30")]) && late(&[pci("01sc07i00")]));
        assert!(late(&["virtio:d00000008v00001AF4".into()]));
        assert!(late(&[]), "nothing is known of any device");
    }

    #[test]
    fn a_module_is_left_out_only_if_it_says_what_it_is_for_and_none_of_that_is_there() {
        let buses = std::env::temp_dir().join(format!("dray-buses-{}", std::process::id()));
        let entries =
            [("pci/devices/0000:00:02.0", "pci:v1d2\n"), ("virtio/devices/virtio0", "virtio:d1v7\n"), ("acpi/devices/a", "acpi:A:\n")];
        for (device, text) in entries {
            std::fs::create_dir_all(buses.join(device)).expect("folder");
            std::fs::write(buses.join(device).join("modalias"), text).expect("file");
        }
        std::fs::create_dir_all(buses.join("cpu/devices/cpu0")).expect("folder");
        let found = devices(&buses);
        assert_eq!(found, ["pci:v1d2", "virtio:d1v7"]);
        let aliases = Aliases::parse("# for\nnet.ko: virtio:d1v*\nbig.ko: pci:v3d* pci:v1d3*\nnone.ko:\nodd\n");
        let wants = |name: &str| aliases.wants(Path::new(name), &found);
        assert!(wants("net.ko") && !wants("big.ko") && wants("other.ko") && wants("none.ko") && wants("odd"));
        assert!(aliases.wants(Path::new("big.ko"), &[]), "nothing is known of any device");
        std::fs::remove_dir_all(&buses).expect("clean up");
        assert!(devices(&buses).is_empty());
    }
}
