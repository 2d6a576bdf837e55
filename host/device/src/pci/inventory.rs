//! What sysfs says of PCI functions.

use super::address::PciAddress;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Class code of an NVMe I/O controller (NVMe over PCIe Transport 1.3 §3.8.1.2: base class 01h, subclass 08h, interface 02h).
const NVME_CLASS: u32 = 0x01_08_02;
/// Class code of an NVMe administrative controller.
const NVME_ADMIN_CLASS: u32 = 0x01_08_03;
/// Most bytes of a file that are read.
const MAX_BYTES: u64 = 1 << 20;
/// Most entries of a folder that are looked at.
const MAX_ENTRIES: usize = 1 << 16;

/// Single-root I/O virtualization of a physical function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sriov {
    /// Virtual functions that it can have.
    pub total: u16,
    /// Those it has.
    pub enabled: u16,
}

/// A block device that the kernel's driver has made of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// `nvme0n1`; with native multipath the one device of all paths.
    pub name: String,
    /// The namespace's identifier; 0 where the kernel does not tell.
    pub nsid: u32,
}

/// The kernel's view of an NVMe controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NvmeOfKernel {
    /// `nvme0`.
    pub name: String,
    /// Model number.
    pub model: String,
    /// Serial number.
    pub serial: String,
    /// Firmware revision.
    pub firmware: String,
    /// The subsystem's name.
    pub subsystem_nqn: String,
    /// CNTLID.
    pub cntlid: Option<u16>,
    /// `live`, `connecting`, `dead` and others.
    pub state: String,
    /// Its namespaces' block devices.
    pub blocks: Vec<Block>,
}

/// One function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    /// Its address.
    pub address: PciAddress,
    /// Vendor and device identifier.
    pub vendor: u16,
    /// See there.
    pub device: u16,
    /// Class code, 24 bits.
    pub class: u32,
    /// The driver that has it.
    pub driver: Option<String>,
    /// The driver that may have it, if only one may.
    pub driver_override: Option<String>,
    /// Its IOMMU group; `None` where no IOMMU covers it.
    pub group: Option<u32>,
    /// The NUMA node that it is at, where that is known.
    pub numa_node: Option<u32>,
    /// Name of its own file under `/dev/vfio/devices`, while vfio-pci has it and the kernel makes such files.
    pub vfio_device: Option<String>,
    /// What virtual functions it can have; `None` where none.
    pub sriov: Option<Sriov>,
    /// The physical function of a virtual one.
    pub physical_function: Option<PciAddress>,
    /// The virtual functions there are, in their order (the first is number 1 to Virtualization Management).
    pub virtual_functions: Vec<PciAddress>,
    /// What the kernel's NVMe driver makes of it, while it has it.
    pub nvme: Option<NvmeOfKernel>,
}

impl PciFunction {
    /// Whether it is an NVMe controller by its class.
    #[must_use]
    pub fn is_nvme(&self) -> bool {
        self.class == NVME_CLASS || self.class == NVME_ADMIN_CLASS
    }
}

/// The machine's functions.
#[derive(Clone, Debug)]
pub struct Inventory {
    pub(super) root: PathBuf,
    /// What a made-up kernel does when a file is written.
    #[cfg(test)]
    pub(super) kernel: Option<fn(&Path, &Path, &str)>,
}

impl Inventory {
    /// What is in this tree.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            #[cfg(test)]
            kernel: None,
        }
    }

    /// What this machine has.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self::new(Path::new("/"))
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    pub(super) fn folder(&self, address: PciAddress) -> PathBuf {
        self.path("sys/bus/pci/devices").join(address.to_string())
    }

    /// Writes a file of sysfs.
    pub(super) fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        options.write(true);
        io::Write::write_all(&mut options.open(path)?, text.as_bytes())?;
        #[cfg(test)]
        if let Some(kernel) = self.kernel {
            kernel(&self.root, path, text);
        }
        Ok(())
    }

    /// All NVMe functions, by address.
    ///
    /// # Errors
    /// When the folder cannot be read. A machine without PCI has none.
    pub fn nvme_functions(&self) -> io::Result<Vec<PciFunction>> {
        let folder = self.path("sys/bus/pci/devices");
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let mut addresses: Vec<PciAddress> = names(&folder)?.iter().filter_map(|name| name.parse().ok()).collect();
        addresses.sort_unstable();
        // One that is unplugged meanwhile is not there.
        let found = addresses.into_iter().filter_map(|address| self.function(address).ok());
        Ok(found.filter(PciFunction::is_nvme).collect())
    }

    /// One function.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none.
    pub fn function(&self, address: PciAddress) -> io::Result<PciFunction> {
        let folder = self.folder(address);
        let id = |name: &str| hex(&read(&folder.join(name))?).ok_or_else(|| malformed(&folder.join(name)));
        let (vendor, device, class) = (id("vendor")? as u16, id("device")? as u16, id("class")? & 0xff_ffff);
        let number = |name: &str| read(&folder.join(name)).ok().and_then(|text| text.parse::<i64>().ok());
        let total = number("sriov_totalvfs").and_then(|total| u16::try_from(total).ok()).filter(|total| *total > 0);
        let enabled = number("sriov_numvfs").and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
        let only = read(&folder.join("driver_override")).ok().filter(|text| !text.is_empty() && text != "(null)");
        Ok(PciFunction {
            address,
            vendor,
            device,
            class,
            driver: link_name(&folder.join("driver")),
            driver_override: only,
            group: link_name(&folder.join("iommu_group")).and_then(|name| name.parse().ok()),
            numa_node: number("numa_node").and_then(|node| u32::try_from(node).ok()),
            vfio_device: names(&folder.join("vfio-dev")).ok().and_then(|names| names.into_iter().find(|n| n.starts_with("vfio"))),
            sriov: total.map(|total| Sriov { total, enabled }),
            physical_function: link_name(&folder.join("physfn")).and_then(|name| name.parse().ok()),
            virtual_functions: virtual_functions(&folder, enabled),
            nvme: kernel_controller(&folder),
        })
    }

    /// The functions of an IOMMU group.
    ///
    /// # Errors
    /// When there is no such group.
    pub fn group(&self, group: u32) -> io::Result<Vec<PciAddress>> {
        let folder = self.path("sys/kernel/iommu_groups").join(group.to_string()).join("devices");
        let mut members: Vec<PciAddress> = names(&folder)?.iter().filter_map(|name| name.parse().ok()).collect();
        members.sort_unstable();
        Ok(members)
    }

    /// Other functions of its group that keep it from VFIO, each with its driver: those with a driver of the kernel that uses
    /// DMA. Bridges (pcieport) and functions without driver do not.
    #[must_use]
    pub fn keep_group_from_vfio(&self, function: &PciFunction) -> Vec<String> {
        let members = function.group.and_then(|group| self.group(group).ok()).unwrap_or_default();
        let others = members.into_iter().filter(|address| *address != function.address);
        others
            .filter_map(|address| {
                let driver = link_name(&self.folder(address).join("driver"))?;
                let harmless = ["vfio-pci", "pcieport", "pci-stub"].contains(&driver.as_str());
                (!harmless).then(|| format!("{address} ({driver})"))
            })
            .collect()
    }
}

fn malformed(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{} makes no sense", path.display()))
}

/// A file's text, without space around it; what is no text is replaced.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// The names in a folder, sorted.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.take(MAX_ENTRIES);
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    Ok(names)
}

/// The last part of where a link leads.
pub(super) fn link_name(path: &Path) -> Option<String> {
    fs::read_link(path).ok()?.file_name()?.to_str().map(str::to_owned)
}

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

fn virtual_functions(folder: &Path, enabled: u16) -> Vec<PciAddress> {
    let numbered = (0..enabled).map(|n| link_name(&folder.join(format!("virtfn{n}"))).and_then(|name| name.parse().ok()));
    numbered.map_while(|address| address).collect()
}

fn kernel_controller(folder: &Path) -> Option<NvmeOfKernel> {
    let name = names(&folder.join("nvme")).ok()?.into_iter().find(|name| name.starts_with("nvme"))?;
    let folder = folder.join("nvme").join(&name);
    let text = |file: &str| read(&folder.join(file)).unwrap_or_default();
    let mut blocks: Vec<Block> = names(&folder).ok()?.iter().filter_map(|path| block(&folder, path)).collect();
    blocks.dedup();
    Some(NvmeOfKernel {
        model: text("model"),
        serial: text("serial"),
        firmware: text("firmware_rev"),
        subsystem_nqn: text("subsysnqn"),
        cntlid: text("cntlid").parse().ok(),
        state: text("state"),
        blocks,
        name,
    })
}

/// The block device of a namespace (`nvme0n1`), or of one path to it (`nvme0c1n1`, whose device is `nvme0n1`).
fn block(folder: &Path, entry: &str) -> Option<Block> {
    let name = block_name(entry)?;
    let nsid = read(&folder.join(entry).join("nsid")).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    Some(Block { name, nsid })
}

fn block_name(entry: &str) -> Option<String> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (instance, namespace) = entry.strip_prefix("nvme")?.split_once('n')?;
    let instance = match instance.split_once('c') {
        Some((instance, path)) if digits(path) => instance,
        Some(_) => return None,
        None => instance,
    };
    (digits(instance) && digits(namespace)).then(|| format!("nvme{instance}n{namespace}"))
}

#[cfg(test)]
mod tests {
    use super::super::made_up::Tree;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_drive_of_the_kernels_is_described() {
        let tree = Tree::new();
        tree.drive("0000:01:00.0", 7, Some("nvme"), "nvme0");
        let function = tree.inventory().function("0000:01:00.0".parse().expect("address")).expect("there");
        assert!(function.is_nvme());
        assert_eq!((function.vendor, function.device, function.group), (0x1b36, 0x0010, Some(7)));
        assert_eq!((function.driver.as_deref(), function.numa_node), (Some("nvme"), None));
        let nvme = function.nvme.expect("the kernel's");
        assert_eq!((nvme.name.as_str(), nvme.model.as_str(), nvme.cntlid), ("nvme0", "Made up", Some(1)));
        assert_eq!(nvme.blocks, [Block { name: "nvme0n1".into(), nsid: 1 }]);
    }

    #[test]
    fn paths_of_multipath_are_their_one_device() {
        assert_eq!(block_name("nvme0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(block_name("nvme12c3n45").as_deref(), Some("nvme12n45"));
        for other in ["ng0n1", "nvme0", "nvme0n1p1", "nvmexn1", "nvme0cn1", "nvme0c1", "hwmon1", "power", ""] {
            assert_eq!(block_name(other), None, "{other}");
        }
    }

    #[test]
    fn virtual_functions_and_the_rest_of_a_group_are_found() {
        let tree = Tree::new();
        tree.drive("0000:01:00.0", 7, Some("nvme"), "nvme0");
        tree.drive("0000:01:00.1", 7, None, "");
        tree.function("0000:00:1c.0", 7, 0x06_04_00, Some("pcieport"));
        tree.function("0000:02:00.0", 7, 0x02_00_00, Some("e1000e"));
        tree.virtual_function("0000:01:00.0", "0000:01:00.1", 4);
        let inventory = tree.inventory();
        let all = inventory.nvme_functions().expect("read");
        assert_eq!(all.iter().map(|f| f.address.to_string()).collect::<Vec<_>>(), ["0000:01:00.0", "0000:01:00.1"]);
        assert_eq!(all[0].sriov, Some(Sriov { total: 4, enabled: 1 }));
        assert_eq!((&all[0].virtual_functions[..], all[1].physical_function), (&[all[1].address][..], Some(all[0].address)));
        assert_eq!(inventory.group(7).expect("group").len(), 4);
        assert_eq!(inventory.keep_group_from_vfio(&all[1]), ["0000:01:00.0 (nvme)", "0000:02:00.0 (e1000e)"]);
    }

    #[test]
    fn nonsense_is_not_there() {
        let tree = Tree::new();
        tree.drive("0000:01:00.0", 7, Some("nvme"), "nvme0");
        for (file, text) in [("class", "0xzz"), ("vendor", ""), ("device", "12")] {
            let before = tree.read("0000:01:00.0", file);
            tree.put("0000:01:00.0", file, text);
            assert!(tree.inventory().nvme_functions().expect("read").is_empty(), "{file}");
            tree.put("0000:01:00.0", file, &before);
        }
        tree.put("0000:01:00.0", "numa_node", "-1");
        tree.put("0000:01:00.0", "sriov_totalvfs", "70000");
        let function = &tree.inventory().nvme_functions().expect("read")[0];
        assert_eq!((function.numa_node, function.sriov), (None, None));
        assert!(Inventory::new(Path::new("/nowhere")).nvme_functions().expect("none").is_empty());
    }

    proptest! {
        #[test]
        fn no_name_panics(name in "\\PC{0,16}") {
            if let Some(block) = block_name(&name) {
                prop_assert!(block.starts_with("nvme") && block.contains('n'));
            }
        }
    }
}
