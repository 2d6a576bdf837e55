//! `dray device …`. `list` and `identify` bring the configuration's controllers up in this process and ask them by our own driver
//! what they are; physical functions are listed ([`machine`]), taken from the kernel and given back ([`bind`]), opened through
//! VFIO ([`physical`]), formatted, tried ([`exercise`]) and given virtual functions ([`vfs`]).
//!
//! Looking changes nothing: the file of a namespace that is not there yet is not made; such a namespace has its size and no
//! blocks ([`absent`]). What is opened is what the durable records say serves ([`follow`]), and never what a running appliance
//! has open.

mod absent;
mod bind;
mod controller;
mod exercise;
mod feature;
mod follow;
mod format;
mod identify;
mod list;
mod log;
mod machine;
mod namespace;
mod page;
mod pattern;
mod physical;
mod registers;
mod session;
mod vfs;

pub(super) use bind::{bind, unbind};
pub(super) use exercise::{ExerciseArgs, run as exercise};
pub(super) use format::{FormatArgs, run as format};
pub(super) use identify::run as identify;
pub(super) use list::run as list;
pub(super) use physical::PciArgs;
pub(super) use vfs::run as vfs;

use crate::assembly::{self, Machine};
use crate::config::{self, BackingKind, Config, Role};
use absent::AbsentBacking;
use dray_device::backing::Backing;
use dray_device::slot::Slot;
use dray_device::space::AddressSpace;
use miette::{IntoDiagnostic, miette};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A controller of the configuration.
#[derive(Clone, Copy, Debug)]
struct Device<'a> {
    subsystem: &'a config::Subsystem,
    controller: &'a config::Controller,
}

impl Device<'_> {
    /// SUBSYSTEM:CNTLID.
    fn name(&self) -> String {
        format!("{}:{}", self.subsystem.name.get_ref(), self.cntlid())
    }

    fn cntlid(&self) -> u16 {
        *self.controller.cntlid.get_ref()
    }

    fn role(&self) -> &'static str {
        match self.controller.role {
            Role::Management => "management",
            Role::Migratable => "migratable",
        }
    }

    /// The slot that the controller is reached through; one of its own for a migratable controller.
    fn slot(&self, machine: &Machine) -> miette::Result<Slot> {
        let (management, slot) = &machine.management;
        if *management == self.cntlid() {
            return Ok(slot.clone());
        }
        let migratable = machine.migratable.iter().find(|m| m.cntlid == self.cntlid());
        let migratable = migratable.ok_or_else(|| miette!("{}: the subsystem has no such controller", self.name()))?;
        let slot = Slot::new(AddressSpace::default(), migratable.io_queues.saturating_add(1)).into_diagnostic()?;
        slot.point_at(&migratable.plug);
        Ok(slot)
    }
}

/// All controllers, in the order of the configuration.
fn devices(config: &Config) -> impl Iterator<Item = Device<'_>> {
    config.file.subsystems.iter().flat_map(|subsystem| {
        subsystem.controllers.iter().map(move |controller| Device { subsystem, controller })
    })
}

/// The file of a file-backed namespace, as people write it.
fn file_of(config: &Config, namespace: &config::Namespace) -> Option<PathBuf> {
    let path = assembly::file_of(config, namespace)?;
    Some(path.strip_prefix(".").map(Path::to_path_buf).unwrap_or(path))
}

/// Whether the file of a file-backed namespace is not there.
fn is_missing(config: &Config, namespace: &config::Namespace) -> bool {
    namespace.backing == BackingKind::File && assembly::file_of(config, namespace).is_some_and(|path| !path.exists())
}

/// A namespace has one block at least: what stands for one of a device, whose size is the device's.
const ONE_BLOCK: u64 = 512;

/// Brings a subsystem up without making files.
fn start(config: &Config, subsystem: &config::Subsystem) -> miette::Result<Machine> {
    let machine = assembly::machine_with(subsystem, &mut |namespace| {
        if namespace.backing == BackingKind::Device {
            // Opening it could take it from the kernel's driver, and looking changes nothing.
            return Ok(Box::new(AbsentBacking::new(ONE_BLOCK, 512)) as Box<dyn Backing>);
        }
        if !is_missing(config, namespace) {
            return assembly::backing(config, namespace);
        }
        let bytes = namespace.size.as_ref().map_or(0, |size| size.get_ref().0);
        let block = u32::try_from(namespace.block.get_ref().0).map_err(|_| "a block that is too large".to_owned())?;
        Ok(Box::new(AbsentBacking::new(bytes, block)) as Box<dyn Backing>)
    })?;
    Ok(machine)
}

/// Prints text; a reader that has seen enough is no error.
fn print(text: &str) -> miette::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).into_diagnostic(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
