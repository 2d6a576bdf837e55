//! What of the machine lives on a function's namespaces.

use super::inventory::{Inventory, PciFunction, link_name, names, read};
use rustix::fs::{Mode, OFlags};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// Why a function cannot be taken from the kernel's driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// A filesystem on it is mounted.
    Mounted {
        /// The block device.
        block: String,
        /// Where.
        at: String,
    },
    /// The kernel was told to boot from it.
    Root {
        /// The block device.
        block: String,
    },
    /// It is swapped to.
    Swap {
        /// The block device.
        block: String,
    },
    /// A device-mapper or RAID device is made of it (LVM, encryption, md, bcache).
    Held {
        /// The block device.
        block: String,
        /// What is made of it.
        by: String,
    },
    /// A program has it open for itself alone.
    Open {
        /// The block device.
        block: String,
    },
    /// It has virtual functions.
    VirtualFunctions(usize),
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { block, at } if at == "/" => write!(f, "{block} holds the root filesystem: this is the boot disk"),
            Self::Mounted { block, at } => write!(f, "{block} is mounted at {at}"),
            Self::Root { block } => write!(f, "{block} is what the kernel was told to boot from (root=): this is the boot disk"),
            Self::Swap { block } => write!(f, "{block} is swap space"),
            Self::Held { block, by } => write!(f, "{block} is part of {by}"),
            Self::Open { block } => write!(f, "{block} is opened exclusively by a program"),
            Self::VirtualFunctions(count) => write!(f, "it has {count} virtual functions: take them away first"),
        }
    }
}

/// A mount as `/proc/self/mountinfo` has it: device numbers, mount point, source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    device: String,
    at: String,
    source: String,
}

/// Reads one line of mountinfo (proc_pid_mountinfo(5)).
fn mount(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ');
    let (device, at) = (front.nth(2)?, front.nth(1)?);
    let source = back.split(' ').nth(1)?;
    Some(Mount { device: device.into(), at: unescape(at), source: unescape(source) })
}

/// Spaces and the like are written as three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Inventory {
    /// What lives on a function: empty when it can be taken away.
    #[must_use]
    pub fn uses(&self, function: &PciFunction) -> Vec<Use> {
        let mut uses = Vec::new();
        if !function.virtual_functions.is_empty() {
            uses.push(Use::VirtualFunctions(function.virtual_functions.len()));
        }
        uses.extend(function.nvme.iter().flat_map(|nvme| &nvme.blocks).flat_map(|disk| self.uses_of_disk(&disk.name)));
        uses
    }

    /// What lives on a block device ("nvme0n1") and its partitions.
    #[must_use]
    pub fn uses_of_disk(&self, disk: &str) -> Vec<Use> {
        let (mounts, swaps, root) = (self.mounts(), self.swaps(), self.root_of_kernel());
        let blocks = self.with_partitions(disk).into_iter();
        blocks.flat_map(|block| self.uses_of(&block, &mounts, &swaps, root.as_deref())).collect()
    }

    fn uses_of(&self, block: &str, mounts: &[Mount], swaps: &HashSet<String>, root: Option<&str>) -> Vec<Use> {
        let folder = self.path("sys/class/block").join(block);
        let device = read(&folder.join("dev")).unwrap_or_default();
        let name = || block.to_owned();
        let mut uses: Vec<Use> = mounts
            .iter()
            .filter(|mount| mount.device == device || self.is_block(&mount.source, block))
            .map(|mount| Use::Mounted { block: name(), at: mount.at.clone() })
            .collect();
        uses.dedup();
        if root == Some(block) && uses.is_empty() {
            uses.push(Use::Root { block: name() });
        }
        if swaps.contains(block) {
            uses.push(Use::Swap { block: name() });
        }
        uses.extend(names(&folder.join("holders")).unwrap_or_default().iter().map(|by| {
            let mapper = read(&self.path("sys/class/block").join(by).join("dm/name"));
            Use::Held { block: name(), by: mapper.map_or_else(|_| by.clone(), |mapper| format!("{by} ({mapper})")) }
        }));
        if uses.is_empty() && self.is_open(block) {
            uses.push(Use::Open { block: name() });
        }
        uses
    }

    /// A disk and its partitions.
    fn with_partitions(&self, disk: &str) -> Vec<String> {
        let folder = self.path("sys/class/block").join(disk);
        let parts = names(&folder).unwrap_or_default().into_iter().filter(|name| folder.join(name).join("partition").exists());
        std::iter::once(disk.to_owned()).chain(parts).collect()
    }

    fn mounts(&self) -> Vec<Mount> {
        // Also those of the first process: we may be in a mount namespace of our own.
        let files = ["proc/self/mountinfo", "proc/1/mountinfo"].map(|file| read(&self.path(file)).unwrap_or_default());
        files.iter().flat_map(|text| text.lines()).filter_map(mount).collect()
    }

    fn swaps(&self) -> HashSet<String> {
        let text = read(&self.path("proc/swaps")).unwrap_or_default();
        let files = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        files.filter_map(|file| self.block_of(&unescape(file))).collect()
    }

    /// The block device that the kernel's command line has as `root=`, where it is named by its file.
    fn root_of_kernel(&self) -> Option<String> {
        let line = read(&self.path("proc/cmdline")).ok()?;
        let root = line.split_whitespace().filter_map(|word| word.strip_prefix("root=")).next_back()?;
        self.block_of(root)
    }

    fn is_block(&self, source: &str, block: &str) -> bool {
        self.block_of(source).as_deref() == Some(block)
    }

    /// The block device behind a file under `/dev`, through links.
    fn block_of(&self, file: &str) -> Option<String> {
        let inside = file.strip_prefix("/dev/")?;
        let target = link_name(&self.path("dev").join(inside));
        Some(target.unwrap_or_else(|| Path::new(inside).file_name().and_then(|n| n.to_str()).unwrap_or(inside).to_owned()))
    }

    /// Whether somebody has it open for himself alone: then nobody else can.
    fn is_open(&self, block: &str) -> bool {
        let file = self.path("dev").join(block);
        let opened = rustix::fs::open(&file, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty());
        opened.is_err_and(|error| error == rustix::io::Errno::BUSY)
    }
}

#[cfg(test)]
mod tests {
    use super::super::made_up::Tree;
    use super::*;
    use proptest::prelude::*;

    fn uses(tree: &Tree) -> Vec<String> {
        let inventory = tree.inventory();
        let function = inventory.function("0000:01:00.0".parse().expect("address")).expect("there");
        inventory.uses(&function).iter().map(ToString::to_string).collect()
    }

    fn tree() -> Tree {
        let tree = Tree::new();
        tree.drive("0000:01:00.0", 7, Some("nvme"), "nvme0");
        tree.partition("nvme0n1", "nvme0n1p1", "259:1");
        tree.partition("nvme0n1", "nvme0n1p2", "259:2");
        tree
    }

    #[test]
    fn an_idle_drive_has_no_uses() {
        assert!(uses(&tree()).is_empty());
    }

    #[test]
    fn mounts_are_found_by_number_and_by_name() {
        let tree = tree();
        let lines = "29 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
                     30 1 0:44 /@ /srv/a\\040b rw - btrfs /dev/nvme0n1p2 rw\n\
                     31 1 259:9 / /other rw - ext4 /dev/nvme1n1 rw\n\
                     nonsense\n";
        tree.file("proc/1/mountinfo", lines);
        let found = uses(&tree);
        assert_eq!(found, ["nvme0n1p1 holds the root filesystem: this is the boot disk", "nvme0n1p2 is mounted at /srv/a b"]);
    }

    #[test]
    fn swap_holders_and_the_kernels_root_are_found() {
        let tree = tree();
        tree.file("proc/swaps", "Filename\tType\n/dev/disk/swap  partition 1 0 -2\n");
        tree.file("dev/disk/.keep", "");
        std::os::unix::fs::symlink("../nvme0n1p1", tree.0.join("dev/disk/swap")).expect("link");
        tree.file("sys/class/block/nvme0n1p2/holders/dm-3", "");
        tree.file("sys/class/block/dm-3/dm/name", "vg-data\n");
        tree.file("sys/class/block/nvme0n1p2/holders/md0", "");
        tree.file("proc/cmdline", "quiet root=/dev/nvme0n1 ro\n");
        let found = uses(&tree);
        let wanted = [
            "nvme0n1 is what the kernel was told to boot from (root=): this is the boot disk",
            "nvme0n1p1 is swap space",
            "nvme0n1p2 is part of dm-3 (vg-data)",
            "nvme0n1p2 is part of md0",
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn virtual_functions_keep_it() {
        let tree = tree();
        tree.drive("0000:01:00.1", 8, None, "");
        tree.virtual_function("0000:01:00.0", "0000:01:00.1", 4);
        assert_eq!(uses(&tree), ["it has 1 virtual functions: take them away first"]);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "\\PC{0,60}") {
            let _any = mount(&line);
            let _any = unescape(&line);
        }

        #[test]
        fn what_is_escaped_is_read(text in "[a-z /\\\\\t]{0,20}") {
            let escaped: String = text.chars().map(|c| if c.is_ascii_lowercase() || c == '/' { c.to_string() } else { format!("\\{:03o}", c as u32) }).collect();
            prop_assert_eq!(unescape(&escaped), text);
        }
    }
}
