//! Who uses a block device: mounted filesystems, swap, and devices made of it (partitions, LVM, md), with their users in turn.

use std::collections::BTreeSet;
use std::fs::{read_dir, read_to_string};
use std::path::Path;

/// Devices upon devices: deeper than anybody stacks them.
const DEEPEST: u32 = 8;

/// Each use of the block devices ("nvme0n1") in words: "nvme0n1p2 (mounted on /)".
pub(crate) fn uses(blocks: &[String], sys: &Path, proc: &Path) -> Vec<String> {
    let mounts = read_to_string(proc.join("self/mountinfo")).unwrap_or_default();
    let swaps = read_to_string(proc.join("swaps")).unwrap_or_default();
    let mut found = BTreeSet::new();
    for block in blocks {
        look(&sys.join("block").join(block), block, &mounts, &swaps, DEEPEST, &mut found);
    }
    found.into_iter().collect()
}

fn look(folder: &Path, name: &str, mounts: &str, swaps: &str, deeper: u32, found: &mut BTreeSet<String>) {
    let number = read_to_string(folder.join("dev")).unwrap_or_default();
    let node = format!("/dev/{name}");
    for line in mounts.lines() {
        // ID PARENT MAJOR:MINOR ROOT POINT OPTIONS … - TYPE SOURCE OPTIONS; a filesystem over several devices has a number of its own.
        let mut words = line.split(' ').skip(2);
        let (device, point) = (words.next().unwrap_or(""), words.nth(1).unwrap_or("?"));
        let source = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').nth(1)).unwrap_or("");
        if !number.is_empty() && device == number.trim() || source == node {
            found.insert(format!("{name} (mounted on {point})"));
        }
    }
    if swaps.lines().any(|line| line.split_whitespace().next() == Some(node.as_str())) {
        found.insert(format!("{name} (swap)"));
    }
    if deeper == 0 {
        return;
    }
    for (holder, what) in below(&folder.join("holders")).map(|holder| (holder, "part of")) {
        found.insert(format!("{name} ({what} {holder})"));
        let above = folder.join("holders").join(&holder);
        look(&above, &holder, mounts, swaps, deeper - 1, found);
    }
    // Partitions stand below their device, and are called after it.
    for partition in below(folder).filter(|below| below.starts_with(name) && folder.join(below).join("partition").exists()) {
        look(&folder.join(&partition), &partition, mounts, swaps, deeper - 1, found);
    }
}

fn below(folder: &Path) -> impl Iterator<Item = String> + use<> {
    read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    #[test]
    fn mounts_swap_and_devices_above_are_found() {
        let root = std::env::temp_dir().join(format!("dray-passthru-use-{}", std::process::id()));
        let (sys, proc) = (root.join("sys"), root.join("proc"));
        let put = |path: String, text: &str| {
            let file = root.join(path);
            create_dir_all(file.parent().expect("a folder")).expect("folders");
            write(file, text).expect("a file");
        };
        for (device, number) in [("nvme0n1", "259:0"), ("nvme0n1/nvme0n1p1", "259:1"), ("nvme0n1/nvme0n1p2", "259:2")] {
            put(format!("sys/block/{device}/dev"), &format!("{number}\n"));
            if device.contains('/') {
                put(format!("sys/block/{device}/partition"), "1\n");
            }
        }
        put("sys/block/nvme0n1/nvme0n1p2/holders/dm-0/dev".into(), "253:0\n");
        put("sys/block/nvme1n1/dev".into(), "259:5\n");
        put("sys/block/nvme2n1/dev".into(), "259:7\n");
        put("sys/block/nvme3n1/dev".into(), "259:8\n");
        let mounts = "22 1 253:0 / / rw,noatime shared:1 - ext4 /dev/mapper/root rw\n\
                      23 1 259:1 / /boot rw - vfat /dev/nvme0n1p1 rw\n\
                      24 1 0:33 / /data rw - btrfs /dev/nvme2n1 rw\n";
        put("proc/self/mountinfo".into(), mounts);
        put("proc/swaps".into(), "Filename Type Size Used Priority\n/dev/nvme1n1 partition 8 0 -2\n");
        let found = |name: &str| uses(&[name.to_owned()], &sys, &proc);
        let whole = ["dm-0 (mounted on /)", "nvme0n1p1 (mounted on /boot)", "nvme0n1p2 (part of dm-0)"];
        assert_eq!(found("nvme0n1"), whole);
        assert_eq!(found("nvme1n1"), ["nvme1n1 (swap)"]);
        assert_eq!(found("nvme2n1"), ["nvme2n1 (mounted on /data)"]);
        assert_eq!((found("nvme3n1").len(), found("nvme9n1").len()), (0, 0));
        std::fs::remove_dir_all(&root).expect("clean up");
    }
}
