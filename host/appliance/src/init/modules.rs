//! Kernel modules: the lists of `/etc/dray/modules`.
//!
//! A line is a set: its name, a colon, and chains of modules; a set may have several lines, `#` begins a comment. A chain is one
//! or more modules joined by `+`, which are loaded in this order: a module comes after those that it needs; a `!` in front says
//! that they are wanted whatever devices are there. Chains may be loaded at the same time ([`super::loader`]). A module is a path
//! below `/lib/modules/VERSION/`, and may be followed by parameters in parentheses:
//! `kernel/drivers/nvme/host/nvme.ko(poll_queues=2)`.
//!
//! Debian's kernels have much of this built in, and hardware is there or not: a module that is not there, is in the kernel
//! already or finds no device is no error. What is one is said, and the start goes on. Those that would find no device are not
//! loaded where that is known ([`super::modalias`]).

use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The list of sets.
pub const LIST: &str = "/etc/dray/modules";
/// Sets that are loaded before the configuration is read, since it may be on a disk: what mounts the state, disks that are there
/// as soon as their driver is, what mounts the configuration, and the other disks.
pub const FIRST: [&str; 4] = ["ext4", "disk", "fat", "scsi"];
/// The power button: nobody is told that the machine serves who could not switch it off.
pub const POWER: &str = "power";
/// What is loaded last, whatever the configuration names: nothing of it is needed to serve.
pub const LAST: &str = "machine";

/// Whether a set is loaded whatever the configuration names.
#[must_use]
pub fn is_own(set: &str) -> bool {
    FIRST.contains(&set) || [POWER, LAST].contains(&set)
}

/// A module of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its path below the kernel's folder of modules.
    pub path: PathBuf,
    /// Its parameters.
    pub parameters: String,
}

/// Modules that are loaded one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Whatever devices are there.
    pub always: bool,
    /// The modules, those that others need first.
    pub modules: Vec<Module>,
}

/// Sets of modules, in the order of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    sets: Vec<(String, Vec<Chain>)>,
    /// Lines that make no sense.
    pub odd: Vec<String>,
}

impl Sets {
    /// Reads a list.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut all = Self::default();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let chains = line.split_once(':').and_then(|(name, words)| {
                let chains: Option<Vec<_>> = words.split_whitespace().map(chain).collect();
                Some((name.trim(), chains?))
            });
            let Some((name, chains)) = chains.filter(|(name, _)| !name.is_empty()) else {
                all.odd.push(line.into());
                continue;
            };
            match all.sets.iter_mut().find(|(known, _)| known == name) {
                Some((_, known)) => known.extend(chains),
                None => all.sets.push((name.into(), chains)),
            }
        }
        all
    }

    /// The sets' names.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.sets.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The chains of a set.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<&[Chain]> {
        self.sets.iter().find(|(known, _)| known == name).map(|(_, chains)| chains.as_slice())
    }
}

fn chain(text: &str) -> Option<Chain> {
    let (always, rest) = text.strip_prefix('!').map_or((false, text), |rest| (true, rest));
    Some(Chain { always, modules: rest.split('+').map(module).collect::<Option<_>>()? })
}

fn module(text: &str) -> Option<Module> {
    let (path, parameters) = match text.split_once('(') {
        Some((path, rest)) => (path, rest.strip_suffix(')')?),
        None => (text, ""),
    };
    let inside = !path.is_empty() && Path::new(path).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    inside.then(|| Module { path: path.into(), parameters: parameters.into() })
}

/// What became of a module.
#[derive(Debug)]
pub enum Loaded {
    /// It is in the kernel now.
    Now,
    /// It was before, or has no device here, or this kernel has it built in.
    NotNeeded,
    /// The kernel refused it.
    Refused(std::io::Error),
}

/// Loads a module from the kernel's folder.
#[must_use]
pub fn load(folder: &Path, module: &Module) -> Loaded {
    use rustix::io::Errno;
    let file = match File::open(folder.join(&module.path)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Loaded::NotNeeded,
        Err(error) => return Loaded::Refused(error),
    };
    let Ok(parameters) = CString::new(module.parameters.as_str()) else {
        return Loaded::Refused(std::io::ErrorKind::InvalidInput.into());
    };
    match rustix::system::finit_module(&file, &parameters, 0) {
        Ok(()) => Loaded::Now,
        Err(Errno::EXIST | Errno::NODEV | Errno::NXIO | Errno::BUSY) => Loaded::NotNeeded,
        Err(error) => Loaded::Refused(error.into()),
    }
}

/// The folder of the running kernel's modules.
#[must_use]
pub fn folder() -> PathBuf {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    Path::new("/lib/modules").join(release)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_in_their_order() {
        let sets = Sets::parse(
            "# sets\nbase: a/b.ko c.ko # first\n\nnvme: !m.ko+n.ko(poll_queues=2)\nbase: d.ko\nbad\n: x.ko\nup: ../x.ko\n\
             abs: /x.ko\nno: a.ko+\n",
        );
        assert_eq!(sets.names(), ["base", "nvme"]);
        let paths = |name: &str| -> Vec<Vec<_>> {
            let path = |module: &Module| module.path.to_str().expect("path").to_owned();
            sets.of(name).expect("set").iter().map(|chain| chain.modules.iter().map(path).collect()).collect()
        };
        assert_eq!(paths("base"), [["a/b.ko"], ["c.ko"], ["d.ko"]]);
        assert_eq!(paths("nvme"), [["m.ko", "n.ko"]]);
        let nvme = &sets.of("nvme").expect("set")[0];
        assert!(nvme.always && nvme.modules[1].parameters == "poll_queues=2" && !sets.of("base").expect("set")[0].always);
        assert_eq!(sets.odd, ["bad", ": x.ko", "up: ../x.ko", "abs: /x.ko", "no: a.ko+"]);
        assert_eq!(sets.of("net"), None);
    }

    #[test]
    fn a_module_that_is_not_in_the_image_is_not_needed() {
        let module = Module { path: "none.ko".into(), parameters: String::new() };
        assert!(matches!(load(&std::env::temp_dir(), &module), Loaded::NotNeeded));
    }
}
