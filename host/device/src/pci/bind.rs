//! Giving a function to vfio-pci, giving it back, and its virtual functions.

use super::address::PciAddress;
use super::inventory::{Inventory, PciFunction, read};
use super::usage::Use;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::path::Path;

/// The driver that hands functions to programs.
pub const VFIO_PCI: &str = "vfio-pci";

/// Why a function was not given, or not given back.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// There is none.
    #[error("{0}: there is no such PCI function")]
    NoFunction(PciAddress),
    /// It is something else.
    #[error("{address} is no NVMe controller (class {class:06x})")]
    NotNvme {
        /// The function.
        address: PciAddress,
        /// Its class code.
        class: u32,
    },
    /// The machine needs it.
    #[error("{address} is in use: {}", list(.uses))]
    InUse {
        /// The function.
        address: PciAddress,
        /// By what.
        uses: Vec<Use>,
    },
    /// A program has it.
    #[error("{0} is in use by a program through VFIO: end that first")]
    Driven(PciAddress),
    /// The kernel has no such driver.
    #[error("the kernel has no driver vfio-pci: load the module (modprobe vfio-pci)")]
    NoDriver,
    /// It was taken from its driver, and the other did not take it. It is where it was, as far as that worked.
    #[error("{address}: {wanted} did not take it, {now} has it{}", hint(*.no_group))]
    NotTaken {
        /// The function.
        address: PciAddress,
        /// Who should have it.
        wanted: &'static str,
        /// Who has it.
        now: String,
        /// It is in no IOMMU group.
        no_group: bool,
    },
    /// It cannot have as many.
    #[error("{address} can have {total} virtual functions, not {asked}")]
    TooManyVirtual {
        /// The function.
        address: PciAddress,
        /// What was asked for.
        asked: u16,
        /// What it can have.
        total: u16,
    },
    /// The kernel did not do it.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: String,
        /// Its answer.
        source: io::Error,
    },
}

fn list(uses: &[Use]) -> String {
    uses.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn hint(no_group: bool) -> &'static str {
    if no_group { " (it is in no IOMMU group: the IOMMU is off; intel_iommu=on or amd_iommu=on for the kernel)" } else { "" }
}

/// What has come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The function as it is now.
    pub function: PciFunction,
    /// It was there already.
    pub already: bool,
    /// Other devices that keep its IOMMU group from being used, with their drivers.
    pub in_the_way: Vec<String>,
}

impl Inventory {
    fn existing(&self, address: PciAddress) -> Result<PciFunction, BindError> {
        self.function(address).map_err(|_| BindError::NoFunction(address))
    }

    fn put(&self, path: &Path, text: &str) -> Result<(), BindError> {
        self.write(path, text).map_err(|source| BindError::Kernel { what: format!("writing {}", path.display()), source })
    }

    /// Gives a function to vfio-pci, unless the machine needs it.
    ///
    /// # Errors
    /// [`BindError`]; where vfio-pci does not take it, its driver gets it back.
    pub fn bind(&self, address: PciAddress) -> Result<Bound, BindError> {
        let function = self.existing(address)?;
        let in_the_way = self.keep_group_from_vfio(&function);
        if !function.is_nvme() {
            return Err(BindError::NotNvme { address, class: function.class });
        }
        if function.driver.as_deref() == Some(VFIO_PCI) {
            return Ok(Bound { function, already: true, in_the_way });
        }
        let uses = self.uses(&function);
        if !uses.is_empty() {
            return Err(BindError::InUse { address, uses });
        }
        if !self.path("sys/bus/pci/drivers").join(VFIO_PCI).exists() {
            return Err(BindError::NoDriver);
        }
        let moved = self.hand_over(&function, VFIO_PCI);
        let now = self.existing(address)?;
        if now.driver.as_deref() == Some(VFIO_PCI) {
            return Ok(Bound { function: now, already: false, in_the_way });
        }
        // Whatever went wrong, the kernel's driver should have it again.
        let restored = self.hand_over(&now, "");
        moved?;
        restored?;
        Err(self.not_taken(address, VFIO_PCI))
    }

    /// Gives a function back to the kernel's driver.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn unbind(&self, address: PciAddress) -> Result<Bound, BindError> {
        let function = self.existing(address)?;
        if function.driver.as_deref().is_some_and(|driver| driver != VFIO_PCI) {
            return Ok(Bound { function, already: true, in_the_way: Vec::new() });
        }
        // The kernel would wait for whoever has it, however long.
        if self.is_driven(&function) {
            return Err(BindError::Driven(address));
        }
        if !function.virtual_functions.is_empty() {
            let uses = vec![Use::VirtualFunctions(function.virtual_functions.len())];
            return Err(BindError::InUse { address, uses });
        }
        self.hand_over(&function, "")?;
        let function = self.existing(address)?;
        match function.driver.as_deref() {
            Some(driver) if driver != VFIO_PCI => Ok(Bound { function, already: false, in_the_way: Vec::new() }),
            _ => Err(self.not_taken(address, "the kernel's NVMe driver")),
        }
    }

    fn not_taken(&self, address: PciAddress, wanted: &'static str) -> BindError {
        let found = self.function(address).ok();
        let no_group = found.as_ref().is_some_and(|function| function.group.is_none()) && wanted == VFIO_PCI;
        let now = found.and_then(|function| function.driver).unwrap_or_else(|| "no driver".into());
        BindError::NotTaken { address, wanted, now, no_group }
    }

    /// Lets only that driver have it (whoever wants it for ""), takes it from the one it has, and lets drivers look at it.
    fn hand_over(&self, function: &PciFunction, driver: &str) -> Result<(), BindError> {
        let (folder, name) = (self.folder(function.address), function.address.to_string());
        self.put(&folder.join("driver_override"), &format!("{driver}\n"))?;
        if function.driver.is_some() {
            self.put(&folder.join("driver/unbind"), &name)?;
        }
        self.put(&self.path("sys/bus/pci/drivers_probe"), &name)
    }

    /// Whether a program has the function's group open.
    fn is_driven(&self, function: &PciFunction) -> bool {
        let Some(group) = function.group else { return false };
        let file = self.path("dev/vfio").join(group.to_string());
        let opened = rustix::fs::open(&file, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        opened.is_err_and(|error| error == rustix::io::Errno::BUSY)
    }

    /// Lets drivers look at a function that nobody has.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn probe(&self, address: PciAddress) -> Result<PciFunction, BindError> {
        self.put(&self.path("sys/bus/pci/drivers_probe"), &address.to_string())?;
        self.existing(address)
    }

    /// A function that can have `count` virtual functions.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn with_room_for(&self, address: PciAddress, count: u16) -> Result<PciFunction, BindError> {
        let function = self.existing(address)?;
        let total = function.sriov.map_or(0, |sriov| sriov.total);
        if count > total { Err(BindError::TooManyVirtual { address, asked: count, total }) } else { Ok(function) }
    }

    /// Looks whether nobody uses a virtual function of a function.
    ///
    /// # Errors
    /// [`BindError`] with the first that is in use, by the machine or by a program.
    pub fn virtual_functions_are_free(&self, address: PciAddress) -> Result<(), BindError> {
        let physical = self.existing(address)?;
        for number in physical.virtual_functions {
            let function = self.existing(number)?;
            let uses = self.uses(&function);
            if !uses.is_empty() {
                return Err(BindError::InUse { address: number, uses });
            }
            // Where both are in one group, whoever has the physical function has that, and no other program gets in.
            if function.group != physical.group && self.is_driven(&function) {
                return Err(BindError::Driven(number));
            }
        }
        Ok(())
    }

    /// Makes `count` virtual functions, in place of those there are; no driver looks at them ([`probe`](Self::probe) lets one).
    /// None takes them away. While vfio-pci has the function, its leave to make some (`enable_sriov`) is taken.
    ///
    /// # Errors
    /// [`BindError`]; none are there then, unless one of them is in use.
    pub fn set_virtual_functions(&self, address: PciAddress, count: u16) -> Result<PciFunction, BindError> {
        let function = self.with_room_for(address, count)?;
        // The kernel would wait for whoever has one, however long.
        self.virtual_functions_are_free(address)?;
        let may = self.path("sys/module/vfio_pci/parameters/enable_sriov");
        if count != 0 && function.driver.as_deref() == Some(VFIO_PCI) && read(&may).is_ok_and(|may| may == "N") {
            self.put(&may, "Y")?;
        }
        let folder = self.folder(address);
        let enabled = function.sriov.map_or(0, |sriov| sriov.enabled);
        if enabled != 0 {
            self.put(&folder.join("sriov_numvfs"), "0")?;
        }
        if count != 0 {
            // Without queues, the kernel's driver would only fail with them. Later, when somebody gives them to it, it may look
            // at them.
            let autoprobe = folder.join("sriov_drivers_autoprobe");
            let before = read(&autoprobe).unwrap_or_else(|_| "1".into());
            self.put(&autoprobe, "0")?;
            let made = self.put(&folder.join("sriov_numvfs"), &count.to_string());
            self.put(&autoprobe, &before)?;
            made?;
        }
        let function = self.existing(address)?;
        if function.virtual_functions.len() != usize::from(count) {
            let found = function.virtual_functions.len();
            let source = io::Error::other(format!("{found} are there"));
            return Err(BindError::Kernel { what: format!("{address}: making {count} virtual functions"), source });
        }
        Ok(function)
    }

    /// A function-level reset by the kernel, while its driver goes on having it (the driver notices and sets it up again).
    ///
    /// # Errors
    /// [`BindError`].
    pub fn reset(&self, address: PciAddress) -> Result<(), BindError> {
        self.put(&self.folder(address).join("reset"), "1")
    }
}

#[cfg(test)]
mod tests {
    use super::super::made_up::Tree;
    use super::*;

    const DRIVE: &str = "0000:01:00.0";

    fn address() -> PciAddress {
        DRIVE.parse().expect("an address")
    }

    fn tree() -> Tree {
        let tree = Tree::new();
        tree.drive(DRIVE, 7, Some("nvme"), "nvme0");
        tree
    }

    #[test]
    fn a_function_goes_to_vfio_and_comes_back() {
        let tree = tree();
        tree.function("0000:02:00.0", 7, 0x02_00_00, Some("e1000e"));
        let inventory = tree.live();
        let bound = inventory.bind(address()).expect("bound");
        assert_eq!((bound.function.driver.as_deref(), bound.already), (Some(VFIO_PCI), false));
        assert_eq!(bound.in_the_way, ["0000:02:00.0 (e1000e)"]);
        assert!(inventory.bind(address()).expect("again").already);
        let back = inventory.unbind(address()).expect("unbound");
        assert_eq!((back.function.driver.as_deref(), back.function.driver_override), (Some("nvme"), None));
        assert!(inventory.unbind(address()).expect("again").already);
    }

    #[test]
    fn what_the_machine_needs_stays() {
        let tree = tree();
        tree.file("proc/self/mountinfo", "29 1 259:0 / /srv rw - ext4 /dev/nvme0n1 rw\n");
        let error = tree.live().bind(address()).expect_err("mounted");
        assert_eq!(error.to_string(), "0000:01:00.0 is in use: nvme0n1 is mounted at /srv");
        assert_eq!(tree.read(DRIVE, "driver_override"), "(null)\n", "nothing was touched");
        assert!(tree.0.join("sys/bus/pci/devices").join(DRIVE).join("driver").ends_with("driver"));
    }

    #[test]
    fn who_does_not_take_it_is_named_and_it_goes_back() {
        let tree = tree();
        std::fs::remove_file(tree.0.join("sys/bus/pci/devices").join(DRIVE).join("iommu_group")).expect("remove");
        let inventory = tree.live();
        let error = inventory.bind(address()).expect_err("no IOMMU");
        assert!(matches!(error, BindError::NotTaken { no_group: true, .. }), "{error}");
        assert!(error.to_string().contains("nvme has it") && error.to_string().contains("intel_iommu=on"), "{error}");
        assert_eq!(inventory.function(address()).expect("there").driver.as_deref(), Some("nvme"));
    }

    #[test]
    fn other_devices_and_missing_drivers_are_refused() {
        let tree = tree();
        tree.function("0000:02:00.0", 8, 0x02_00_00, Some("e1000e"));
        let nic = "0000:02:00.0".parse().expect("address");
        assert!(matches!(tree.live().bind(nic), Err(BindError::NotNvme { class: 0x02_00_00, .. })));
        assert!(matches!(tree.live().bind("0000:09:00.0".parse().expect("address")), Err(BindError::NoFunction(_))));
        std::fs::remove_dir_all(tree.0.join("sys/bus/pci/drivers/vfio-pci")).expect("remove");
        assert!(matches!(tree.live().bind(address()), Err(BindError::NoDriver)));
    }

    #[test]
    fn virtual_functions_that_are_in_use_stay() {
        const VIRTUAL: &str = "0000:01:00.1";
        let tree = tree();
        tree.drive(VIRTUAL, 8, Some("nvme"), "nvme1");
        tree.virtual_function(DRIVE, VIRTUAL, 2);
        tree.file("proc/self/mountinfo", "29 1 259:0 / /srv rw - ext4 /dev/nvme1n1 rw\n");
        let inventory = tree.live();
        for count in [0, 2] {
            let error = inventory.set_virtual_functions(address(), count).expect_err("in use");
            assert_eq!(error.to_string(), "0000:01:00.1 is in use: nvme1n1 is mounted at /srv");
        }
        assert_eq!(tree.read(DRIVE, "sriov_numvfs"), "1\n", "nothing was touched");
        tree.file("proc/self/mountinfo", "");
        inventory.virtual_functions_are_free(address()).expect("free");
    }

    #[test]
    fn vfio_is_asked_to_make_virtual_functions_only_where_it_has_the_drive() {
        for (driver, leave) in [(VFIO_PCI, "Y"), ("nvme", "N\n")] {
            let tree = Tree::new();
            tree.drive(DRIVE, 7, Some(driver), "");
            tree.put(DRIVE, "sriov_totalvfs", "2\n");
            tree.put(DRIVE, "sriov_numvfs", "0\n");
            tree.put(DRIVE, "sriov_drivers_autoprobe", "1\n");
            tree.file("sys/module/vfio_pci/parameters/enable_sriov", "N\n");
            let _this_kernel_makes_none = tree.live().set_virtual_functions(address(), 2);
            let now = std::fs::read_to_string(tree.0.join("sys/module/vfio_pci/parameters/enable_sriov")).expect("a parameter");
            assert_eq!(now, leave, "{driver}");
        }
    }

    #[test]
    fn more_virtual_functions_than_there_can_be_are_refused() {
        let tree = tree();
        let error = tree.live().set_virtual_functions(address(), 1).expect_err("none");
        assert!(matches!(error, BindError::TooManyVirtual { total: 0, .. }), "{error}");
        tree.put(DRIVE, "sriov_totalvfs", "2\n");
        tree.put(DRIVE, "sriov_numvfs", "0\n");
        tree.put(DRIVE, "sriov_drivers_autoprobe", "1\n");
        let error = tree.live().set_virtual_functions(address(), 2).expect_err("this kernel makes none");
        assert!(error.to_string().contains("0 are there"), "{error}");
        assert_eq!(tree.read(DRIVE, "sriov_drivers_autoprobe"), "1", "as before they came");
    }
}
