//! A made-up machine for tests: sysfs, proc and dev in a folder of their own.

use super::inventory::Inventory;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The tree; it goes with this.
pub(super) struct Tree(pub(super) PathBuf);

impl Tree {
    pub(super) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("dray-pci-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let tree = Self(std::env::temp_dir().join(name));
        for driver in ["nvme", "vfio-pci", "pcieport", "e1000e"] {
            tree.file(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        tree.file("sys/bus/pci/drivers_probe", "");
        tree.file("proc/self/mountinfo", "22 1 0:20 / / rw - overlay overlay rw\n");
        tree.file("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        tree.file("proc/cmdline", "console=ttyS0 quiet\n");
        tree
    }

    pub(super) fn inventory(&self) -> Inventory {
        Inventory::new(&self.0)
    }

    /// The inventory of a machine whose kernel moves functions between drivers.
    pub(super) fn live(&self) -> Inventory {
        Inventory { kernel: Some(kernel), ..Inventory::new(&self.0) }
    }

    pub(super) fn file(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("folder");
        fs::write(path, text).expect("file");
    }

    pub(super) fn put(&self, address: &str, file: &str, text: &str) {
        self.file(&format!("sys/bus/pci/devices/{address}/{file}"), text);
    }

    pub(super) fn read(&self, address: &str, file: &str) -> String {
        fs::read_to_string(self.0.join("sys/bus/pci/devices").join(address).join(file)).expect("there")
    }

    fn link(&self, to: &str, at: &Path) {
        fs::create_dir_all(at.parent().expect("a folder")).expect("folder");
        let _old = fs::remove_file(at);
        symlink(self.0.join(to), at).expect("link");
    }

    pub(super) fn function(&self, address: &str, group: u32, class: u32, driver: Option<&str>) {
        let folder = self.0.join("sys/bus/pci/devices").join(address);
        for (file, text) in [
            ("vendor", "0x1b36\n".to_owned()),
            ("device", "0x0010\n".to_owned()),
            ("class", format!("0x{class:06x}\n")),
            ("numa_node", "-1\n".to_owned()),
            ("driver_override", "(null)\n".to_owned()),
        ] {
            self.put(address, file, &text);
        }
        let devices = format!("sys/kernel/iommu_groups/{group}");
        self.link(&devices, &folder.join("iommu_group"));
        self.link(&format!("sys/bus/pci/devices/{address}"), &self.0.join(devices).join("devices").join(address));
        if let Some(driver) = driver {
            self.link(&format!("sys/bus/pci/drivers/{driver}"), &folder.join("driver"));
        }
    }

    /// An NVMe function; `name` is the kernel's for it, with one namespace.
    pub(super) fn drive(&self, address: &str, group: u32, driver: Option<&str>, name: &str) {
        self.function(address, group, 0x01_08_02, driver);
        if name.is_empty() {
            return;
        }
        let at = |file: &str| format!("sys/bus/pci/devices/{address}/nvme/{name}/{file}");
        for (file, text) in [("model", "Made up   "), ("serial", "S-1"), ("cntlid", "1"), ("state", "live"), ("ng0n1/dev", "1:1")] {
            self.file(&at(file), text);
        }
        self.file(&at(&format!("{name}n1/nsid")), "1\n");
        self.block(&format!("{name}n1"), "259:0");
    }

    pub(super) fn block(&self, name: &str, dev: &str) {
        self.file(&format!("sys/class/block/{name}/dev"), &format!("{dev}\n"));
        fs::create_dir_all(self.0.join("sys/class/block").join(name).join("holders")).expect("folder");
    }

    pub(super) fn partition(&self, disk: &str, name: &str, dev: &str) {
        self.block(name, dev);
        self.file(&format!("sys/class/block/{disk}/{name}/partition"), "1\n");
    }

    pub(super) fn virtual_function(&self, physical: &str, virtual_function: &str, total: u16) {
        self.put(physical, "sriov_totalvfs", &format!("{total}\n"));
        self.put(physical, "sriov_numvfs", "1\n");
        let folder = |address: &str| self.0.join("sys/bus/pci/devices").join(address);
        self.link(&format!("sys/bus/pci/devices/{virtual_function}"), &folder(physical).join("virtfn0"));
        self.link(&format!("sys/bus/pci/devices/{physical}"), &folder(virtual_function).join("physfn"));
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// What the kernel does: an unbind takes the driver away, a probe gives the one that may have it. vfio-pci refuses functions
/// without group.
fn kernel(root: &Path, path: &Path, text: &str) {
    // A file of sysfs has what was written last, however long the text before it was.
    fs::write(path, text).expect("file");
    let devices = root.join("sys/bus/pci/devices");
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match name {
        "unbind" => {
            let _none = fs::remove_file(devices.join(text.trim()).join("driver"));
        }
        "drivers_probe" => {
            let folder = devices.join(text.trim());
            let only = fs::read_to_string(folder.join("driver_override")).unwrap_or_default();
            let driver = match only.trim() {
                "" | "(null)" => "nvme",
                only => only,
            };
            let refused = driver == "vfio-pci" && fs::read_link(folder.join("iommu_group")).is_err();
            if !refused && !folder.join("driver").exists() {
                symlink(root.join("sys/bus/pci/drivers").join(driver), folder.join("driver")).expect("link");
            }
        }
        _ => {}
    }
}
