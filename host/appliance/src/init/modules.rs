//! Kernel modules: the lists of `/etc/dray/modules`, loaded in their order.
//!
//! A line is a set: its name, a colon, and modules as paths below `/lib/modules/VERSION/`; a set may have several lines, `#`
//! begins a comment. A module comes after those that it needs. After a blank, a path may be followed by parameters in
//! parentheses: `kernel/drivers/nvme/host/nvme.ko(poll_queues=2)`.
//!
//! Debian's kernels have much of this built in, and hardware is there or not: a module that is not there, is in the kernel
//! already or finds no device is no error. What is one is said, and the start goes on. Those that would find no device are not
//! loaded where that is known ([`super::modalias`]).

use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The list of sets.
pub const LIST: &str = "/etc/dray/modules";
/// Sets that are loaded before the configuration is read, since it may be on a disk.
pub const FIRST: [&str; 2] = ["base", "disk"];

/// A module of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its path below the kernel's folder of modules.
    pub path: PathBuf,
    /// Its parameters.
    pub parameters: String,
}

/// Sets of modules, in the order of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    sets: Vec<(String, Vec<Module>)>,
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
            let modules = line.split_once(':').and_then(|(name, paths)| {
                let modules: Option<Vec<_>> = paths.split_whitespace().map(module).collect();
                Some((name.trim(), modules?))
            });
            let Some((name, modules)) = modules.filter(|(name, _)| !name.is_empty()) else {
                all.odd.push(line.into());
                continue;
            };
            match all.sets.iter_mut().find(|(known, _)| known == name) {
                Some((_, known)) => known.extend(modules),
                None => all.sets.push((name.into(), modules)),
            }
        }
        all
    }

    /// The sets' names.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.sets.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The modules of a set.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<&[Module]> {
        self.sets.iter().find(|(known, _)| known == name).map(|(_, modules)| modules.as_slice())
    }
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
            "# sets\nbase: a/b.ko c.ko # first\n\nnvme: n.ko(poll_queues=2)\nbase: d.ko\nbad\n: x.ko\nup: ../x.ko\nabs: /x.ko\n",
        );
        assert_eq!(sets.names(), ["base", "nvme"]);
        let paths: Vec<_> = sets.of("base").expect("set").iter().map(|module| module.path.to_str().expect("path")).collect();
        assert_eq!(paths, ["a/b.ko", "c.ko", "d.ko"]);
        assert_eq!(sets.of("nvme").expect("set")[0].parameters, "poll_queues=2");
        assert_eq!(sets.odd, ["bad", ": x.ko", "up: ../x.ko", "abs: /x.ko"]);
        assert_eq!(sets.of("net"), None);
    }

    #[test]
    fn a_module_that_is_not_in_the_image_is_not_needed() {
        let module = Module { path: "none.ko".into(), parameters: String::new() };
        assert!(matches!(load(&std::env::temp_dir(), &module), Loaded::NotNeeded));
    }
}
