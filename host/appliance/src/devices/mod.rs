//! The controllers that `[[device]]` names, opened when a namespace of theirs is wanted, closed when the last one goes.
//!
//! An [`OpenDevice`] has what is there once: the function or the association, its driver's admin side, the memory of guests that is
//! mapped for it, and a thread that polls all that. Admin work is rare and may take its time; I/O is not its business: each
//! namespace has a queue of its own ([`DeviceBacking`]), polled by the core whose subsystem it is in. The thread ends with the device.
//!
//! **Respect.** A namespace with metadata or protection information, one that another host has reserved, and a block device that this
//! machine uses are refused; a write-protected one is served write-protected.

mod admin;
mod backing;
mod destination;
pub mod disk;
mod memory;
mod open;
mod requeue;
mod reservation;
pub mod virtual_functions;

pub use backing::DeviceBacking;
pub use destination::DeviceDestination;
pub use open::{DeviceError, OpenDevice};

use crate::config::Config;
use crate::config::device::{Device, Way};
use dray_controller::CommandBackingConfig;
use dray_device::backing::Backing;
use dray_device::pci::BindError;
use dray_device::space::AddressSpace;
use dray_device::vfio::VfioSpace;
use dray_migration::CopyGeometry;
use dray_nvme::identify::IdentifyController;
use miette::miette;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

#[derive(Default)]
struct Opened {
    devices: BTreeMap<String, Weak<OpenDevice>>,
    /// I/O address spaces that several functions share.
    spaces: BTreeMap<String, Weak<VfioSpace>>,
    /// Spaces of guests, for devices that are opened later: a media move goes to one while guests are there.
    guests: Vec<AddressSpace>,
}

/// The devices that are open. Clones are the same.
#[derive(Clone, Default)]
pub struct Devices(Arc<Mutex<Opened>>);

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().devices.keys()).finish()
    }
}

impl Devices {
    fn lock(&self) -> MutexGuard<'_, Opened> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device of that name, opened if it is not.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn open(&self, config: &Config, name: &str) -> Result<Arc<OpenDevice>, DeviceError> {
        // Held while one is opened: nobody opens it a second time meanwhile.
        let mut opened = self.lock();
        if let Some(device) = opened.devices.get(name).and_then(Weak::upgrade) {
            return Ok(device);
        }
        let file = config.device(name).ok_or_else(|| DeviceError::Unknown(name.to_owned()))?;
        let device = OpenDevice::open(config, file, &mut opened.spaces)?;
        opened.guests.iter().try_for_each(|space| device.follow(space))?;
        opened.devices.insert(name.to_owned(), Arc::downgrade(&device));
        Ok(device)
    }

    /// A namespace of a device as a backing.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn backing(&self, config: &Config, name: &str, nsid: u32) -> Result<DeviceBacking, DeviceError> {
        DeviceBacking::open(self.open(config, name)?, nsid)
    }

    /// Namespaces of a device as where a copy goes, and what they hold.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn destination(
        &self,
        config: &Config,
        name: &str,
        nsids: &[u32],
    ) -> Result<(DeviceDestination, Vec<CopyGeometry>), DeviceError> {
        DeviceDestination::open(self.open(config, name)?, nsids)
    }

    /// Opens what the configuration says is held from start to end, and makes the virtual functions that it names.
    ///
    /// # Errors
    /// Of the device that cannot be had.
    pub fn hold(&self, config: &Config) -> miette::Result<Vec<Arc<OpenDevice>>> {
        let hold = |file: &Device| {
            let device = self.open(config, file.name.get_ref())?;
            if let (Some(Way::Pci(address)), Some(count)) = (file.way(), &file.virtual_functions) {
                device.make_virtual_functions(address, *count.get_ref())?;
            }
            Ok(device)
        };
        config.file.devices.iter().filter(|device| device.is_held()).map(hold).collect()
    }

    /// Who has the PCI function of a controller of a device's subsystem: this process, if that is a device of its own.
    #[must_use]
    pub fn owner_of(&self, device: &OpenDevice, cntlid: u16) -> Option<Arc<OpenDevice>> {
        let of = device.identify()?;
        let is_it = |id: IdentifyController| id.subnqn == of.subnqn && id.sn == of.sn && id.cntlid == cntlid;
        self.all().into_iter().find(|other| other.identify().is_some_and(is_it))
    }

    /// What a namespace of a device is, for whoever only looks.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn look(&self, config: &Config, name: &str, nsid: u32) -> Result<CommandBackingConfig, DeviceError> {
        self.open(config, name)?.namespace(nsid)
    }

    /// What is known of a namespace of a device that is open; asks nobody.
    #[must_use]
    pub fn known(&self, name: &str, nsid: u32) -> Option<CommandBackingConfig> {
        self.lock().devices.get(name).and_then(Weak::upgrade)?.known(nsid)
    }

    /// The devices that are open.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<OpenDevice>> {
        self.lock().devices.values().filter_map(Weak::upgrade).collect()
    }

    /// Lets devices follow the memory of a guest, those that are open and those to come, so that data goes straight between the two.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn follow(&self, space: &AddressSpace) -> Result<(), DeviceError> {
        let mut opened = self.lock();
        opened.guests.push(space.clone());
        opened.devices.values().filter_map(Weak::upgrade).try_for_each(|device| device.follow(space))
    }
}

/// Why a function was not bound, unbound or given virtual functions, with what helps against it.
pub fn refused(error: BindError) -> miette::Report {
    match &error {
        BindError::InUse { .. } => miette!(help = "unmount it, switch it off, or take it apart first; nothing was changed", "{error}"),
        BindError::Kernel { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            miette!(help = "it takes root", "{error}")
        }
        _ => miette!("{error}"),
    }
}

/// A namespace of the configuration that is a device's, as a backing.
///
/// # Errors
/// In words.
pub fn backing(config: &Config, name: &str, nsid: u32, block: Option<u32>) -> Result<Box<dyn Backing>, String> {
    let backing = config.devices.backing(config, name, nsid).map_err(|error| error.to_string())?;
    let has = backing.info().block_bytes;
    match block.filter(|&block| block != has) {
        Some(block) => Err(format!("namespace {nsid} of device \"{name}\" has blocks of {has} bytes, not {block}")),
        None => Ok(Box::new(backing)),
    }
}
