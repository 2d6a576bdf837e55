//! The demo's two disks: a file each, or a namespace of a device.

use crate::assembly::file_of;
use crate::config::{BackingKind, Config, Namespace, device};
use crate::devices::disk::DeviceDisk;
use dray_workload::reader::{BlockReader, FileReader};
use miette::{IntoDiagnostic, WrapErr, miette};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Where a namespace's blocks are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    /// In a file.
    File(PathBuf),
    /// In a namespace of a device.
    Device(String, u32),
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Device(name, nsid) => f.pad(&device::name_of(name, *nsid)),
        }
    }
}

impl Disk {
    fn of(config: &Config, namespace: &Namespace) -> Option<Self> {
        match namespace.backing {
            BackingKind::File => file_of(config, namespace).map(Self::File),
            BackingKind::Device => namespace.at_device().map(|(name, nsid)| Self::Device(name.to_owned(), nsid)),
            BackingKind::Memory => None,
        }
    }

    /// The namespace of one end that the demo moves.
    pub(super) fn of_end(config: &Config, name: &str) -> miette::Result<(u32, Self)> {
        let subsystem = config.subsystem(name).ok_or_else(|| miette!("there is no subsystem \"{name}\""))?;
        let first = subsystem.namespaces.iter().find_map(|n| Some((*n.nsid.get_ref(), Self::of(config, n)?)));
        first.ok_or_else(|| miette!("\"{name}\" has no namespace in a file or of a device, which the demo reads again at the end"))
    }

    /// The file, if it is one.
    pub(super) fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Device(..) => None,
        }
    }

    /// What the next run finds it by.
    pub(super) fn kept(&self) -> miette::Result<PathBuf> {
        match self {
            Self::File(path) => std::path::absolute(path).into_diagnostic(),
            Self::Device(..) => Ok(self.to_string().into()),
        }
    }

    /// A device's namespace, for whoever writes it over.
    pub(super) fn open_device(&self, config: &Config) -> miette::Result<Option<DeviceDisk>> {
        let Self::Device(name, nsid) = self else { return Ok(None) };
        let backing = config.devices.backing(config, name, *nsid)?;
        DeviceDisk::new(backing).map(Some).into_diagnostic().wrap_err_with(|| self.to_string())
    }

    /// A reader of all of it.
    pub(super) fn reader(&self, config: &Config) -> miette::Result<Box<dyn BlockReader>> {
        if let Some(disk) = self.open_device(config)? {
            return Ok(Box::new(disk));
        }
        let Self::File(path) = self else { return Err(miette!("{self} cannot be read")) };
        let reader = File::open(path).and_then(FileReader::new).into_diagnostic().wrap_err_with(|| self.to_string())?;
        Ok(Box::new(reader))
    }
}
