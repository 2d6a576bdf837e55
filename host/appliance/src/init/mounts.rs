//! File systems: the kernel's own, and the partitions of the image by their names in the GPT.
//!
//! | partition | where | how |
//! |---|---|---|
//! | `DRAY-CONFIG` (FAT) | `/config` | read-only |
//! | `DRAY-STATE` (ext4) | `/state` | its journal is replayed by the mount; never made anew by itself |
//! | `DRAY-ESP` (FAT32) | `/boot` | only while slots are looked at or written |

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The GPT name of the EFI system partition.
pub const ESP: &str = "DRAY-ESP";
/// The GPT name of the configuration's partition.
pub const CONFIG: &str = "DRAY-CONFIG";
/// The GPT name of the state's partition.
pub const STATE: &str = "DRAY-STATE";
/// Where the EFI system partition is mounted.
pub const BOOT_FOLDER: &str = "/boot";
/// Where the configuration's partition is mounted.
pub const CONFIG_FOLDER: &str = "/config";
/// Where the state's partition is mounted.
pub const STATE_FOLDER: &str = "/state";
/// How long the EFI system partition may be in use by another: PID 1 calls a slot good, `dray image` looks at both.
const BUSY: Duration = Duration::from_secs(5);
/// How often it is looked at then.
const LOOK: Duration = Duration::from_millis(50);
/// Most bytes of a partition's `uevent`.
const UEVENT_BYTES: u64 = 4096;

/// Something could not be mounted.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount {what} at {place}: {source}")]
pub struct MountError {
    /// The device or the kind of file system.
    pub what: String,
    /// Where.
    pub place: &'static str,
    /// Why.
    pub source: std::io::Error,
}

fn attach(what: &str, place: &'static str, kind: &str, flags: MountFlags, data: &CStr) -> Result<(), MountError> {
    let failed = |source: std::io::Error| MountError { what: what.into(), place, source };
    std::fs::create_dir_all(place).map_err(failed)?;
    match mount(what, place, kind, flags, data) {
        // The kernel mounts /dev by itself where it was built so.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

/// Mounts the kernel's own file systems; returns what could not be.
pub fn kernel_file_systems() -> Vec<MountError> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    [
        ("proc", "/proc", plain, c""),
        ("sysfs", "/sys", plain, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755"),
        ("tmpfs", "/run", plain, c"mode=0755,size=64m"),
        ("tmpfs", "/tmp", plain, c"mode=1777,size=256m"),
    ]
    .into_iter()
    .filter_map(|(kind, place, flags, data)| attach(kind, place, kind, flags, data).err())
    .collect()
}

/// A partition with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its name in the GPT.
    pub name: String,
    /// Its device.
    pub device: PathBuf,
}

/// The partitions that have a name, in the order of their devices. `block` is `/sys/class/block`.
#[must_use]
pub fn partitions(block: &Path) -> Vec<Partition> {
    let entries = std::fs::read_dir(block).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.filter_map(|entry| parse_uevent(&read_some(&entry.path().join("uevent"))?)).collect();
    found.sort_by(|a, b| a.device.cmp(&b.device));
    found
}

fn read_some(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, UEVENT_BYTES), &mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

fn parse_uevent(text: &str) -> Option<Partition> {
    let value = |key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.filter(|value| !value.is_empty())
    };
    let device = value("DEVNAME").filter(|name| !name.contains("..") && !name.starts_with('/'))?;
    Some(Partition { name: value("PARTNAME")?.into(), device: Path::new("/dev").join(device) })
}

/// The first partition of a name, and whether there are more of them.
#[must_use]
pub fn find(name: &str) -> Option<(Partition, bool)> {
    let mut all = partitions(Path::new("/sys/class/block")).into_iter().filter(|partition| partition.name == name);
    // Its node is made by the kernel a moment after the entry in sysfs.
    let first = all.next().filter(|partition| partition.device.exists())?;
    Some((first, all.next().is_some()))
}

/// Whether there are partitions of all these names.
#[must_use]
pub fn are_there(names: &[&str]) -> bool {
    let found = if names.is_empty() { Vec::new() } else { partitions(Path::new("/sys/class/block")) };
    let is_there = |name: &str| found.iter().any(|partition| partition.name == name && partition.device.exists());
    names.iter().all(|name| is_there(name))
}

/// Mounts the configuration's partition.
///
/// # Errors
/// [`MountError`].
pub fn mount_config(partition: &Partition) -> Result<(), MountError> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    attach(&partition.device.to_string_lossy(), CONFIG_FOLDER, "vfat", flags, c"fmask=0077,dmask=0077")
}

/// Mounts the state's partition.
///
/// # Errors
/// [`MountError`]: an unclean shutdown is none.
pub fn mount_state(partition: &Partition) -> Result<(), MountError> {
    let flags = MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    attach(&partition.device.to_string_lossy(), STATE_FOLDER, "ext4", flags, c"errors=remount-ro")
}

/// The EFI system partition, mounted until this is dropped.
#[derive(Debug)]
pub struct Esp(());

impl Esp {
    /// Mounts it.
    ///
    /// # Errors
    /// [`MountError`]: it is not there, or cannot be mounted, or is mounted for somebody else.
    pub fn mount(writable: bool) -> Result<Self, MountError> {
        let failed = |source| MountError { what: ESP.into(), place: BOOT_FOLDER, source };
        let (partition, _) = find(ESP).ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        flags.set(MountFlags::RDONLY, !writable);
        std::fs::create_dir_all(BOOT_FOLDER).map_err(failed)?;
        let data = c"fmask=0077,dmask=0077,errors=remount-ro";
        mount(&partition.device, BOOT_FOLDER, "vfat", flags, data).map_err(|error| failed(error.into()))?;
        Ok(Self(()))
    }

    /// Mounts it; while it is mounted for somebody else, that is waited for, but not for long.
    ///
    /// # Errors
    /// As [`Esp::mount`].
    pub fn mount_soon(writable: bool) -> Result<Self, MountError> {
        soon(BUSY, || Self::mount(writable))
    }
}

/// Tries again what is busy, within a time.
fn soon<T>(patience: Duration, mut attempt: impl FnMut() -> Result<T, MountError>) -> Result<T, MountError> {
    let end = Instant::now() + patience;
    loop {
        match attempt() {
            Err(error) if error.source.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(LOOK);
            }
            other => return other,
        }
    }
}

impl Drop for Esp {
    fn drop(&mut self) {
        // What was written was flushed before; at worst it stays mounted until the power goes.
        let _busy = unmount(BOOT_FOLDER, UnmountFlags::NOFOLLOW);
    }
}

/// Unmounts the configuration's partition.
///
/// # Errors
/// The system's.
pub fn unmount_config() -> std::io::Result<()> {
    Ok(unmount(CONFIG_FOLDER, UnmountFlags::NOFOLLOW)?)
}

/// Unmounts all partitions for the power to go. One that is in use is made read-only, and said.
pub fn unmount_all(say: &dyn Fn(&str)) {
    rustix::fs::sync();
    for place in [BOOT_FOLDER, CONFIG_FOLDER, STATE_FOLDER] {
        match unmount(place, UnmountFlags::NOFOLLOW) {
            // Not mounted, or not there.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => {
                let read_only = match mount_remount(place, MountFlags::RDONLY, c"") {
                    Ok(()) => "it is read-only now".to_owned(),
                    Err(error) => format!("nor made read-only: {error}"),
                };
                say(&format!("{place} cannot be unmounted: {error}; {read_only}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_found_by_their_names() {
        let block = std::env::temp_dir().join(format!("dray-block-{}", std::process::id()));
        for (name, uevent) in [
            ("vda", "MAJOR=254\nDEVNAME=vda\nDEVTYPE=disk\n"),
            ("vda2", "MAJOR=254\nDEVNAME=vda2\nDEVTYPE=partition\nPARTN=2\nPARTNAME=DRAY-CONFIG\n"),
            ("vda1", "DEVNAME=vda1\nPARTNAME=DRAY-ESP\n"),
            ("evil", "DEVNAME=../etc/passwd\nPARTNAME=DRAY-STATE\n"),
            ("none", "DEVNAME=vda3\nPARTNAME=\n"),
        ] {
            std::fs::create_dir_all(block.join(name)).expect("folder");
            std::fs::write(block.join(name).join("uevent"), uevent).expect("file");
        }
        let found: Vec<_> = partitions(&block).into_iter().map(|p| (p.name, p.device)).collect();
        assert_eq!(found, [("DRAY-ESP".into(), "/dev/vda1".into()), ("DRAY-CONFIG".into(), "/dev/vda2".into())]);
        std::fs::remove_dir_all(block).expect("clean up");
    }

    #[test]
    fn what_is_busy_is_tried_again_and_what_fails_otherwise_is_not() {
        let error = |errno: Errno| MountError { what: ESP.into(), place: BOOT_FOLDER, source: errno.into() };
        let mut left = 3;
        let attempt = || {
            left -= 1;
            if left == 0 { Ok(7) } else { Err(error(Errno::BUSY)) }
        };
        assert_eq!(soon(Duration::from_secs(60), attempt).expect("free in the end"), 7);
        let mut tries = 0;
        let refused = soon::<()>(Duration::from_secs(60), || {
            tries += 1;
            Err(error(Errno::NODEV))
        });
        assert!(refused.is_err() && tries == 1);
        assert!(soon::<()>(Duration::ZERO, || Err(error(Errno::BUSY))).is_err(), "it is waited for without end");
    }
}
