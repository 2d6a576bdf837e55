//! Which device a path is: a namespace's character device (`ngXnY`), a controller's (`nvmeX`), or something that people name by
//! mistake.

use super::error::PassthruError;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::fs::{read_dir, read_link, read_to_string};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What a node is opened as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A namespace of a controller.
    Namespace,
    /// A controller.
    Controller,
}

/// An open device.
#[derive(Debug)]
pub struct Node {
    /// What it was opened by.
    pub path: PathBuf,
    /// Its name in the kernel, "ng0n1" or "nvme0".
    pub name: String,
    /// The descriptor.
    pub file: OwnedFd,
    /// The namespace's NSID; 0 for a controller.
    pub nsid: u32,
}

/// The parts of an NVMe device's name: subsystem or controller instance, and namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Name {
    instance: u32,
    namespace: Option<u32>,
    is_generic: bool,
}

/// Reads "nvme0", "nvme0n1", "nvme0n1p2", "nvme0c1n1", "ng0n1".
fn parse(name: &str) -> Option<Name> {
    let (rest, is_generic) = name.strip_prefix("nvme").map(|rest| (rest, false)).or_else(|| Some((name.strip_prefix("ng")?, true)))?;
    let (instance, rest) = number(rest)?;
    let rest = rest.strip_prefix('c').and_then(number).map_or(rest, |(_, rest)| rest);
    if rest.is_empty() {
        return (!is_generic).then_some(Name { instance, namespace: None, is_generic });
    }
    let (namespace, rest) = number(rest.strip_prefix('n')?)?;
    let is_whole = rest.is_empty() || rest.strip_prefix('p').and_then(number).is_some_and(|(_, rest)| rest.is_empty());
    is_whole.then_some(Name { instance, namespace: Some(namespace), is_generic })
}

fn number(text: &str) -> Option<(u32, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

/// The character device of the namespace that a block device, or a partition of it, belongs to: "ng0n1" for "nvme0n1p2".
#[must_use]
pub fn character_device(block: &str) -> Option<String> {
    let Name { instance, namespace, .. } = parse(block)?;
    Some(format!("ng{instance}n{}", namespace?))
}

/// The block device of a namespace: "nvme0n1" for "ng0n1".
#[must_use]
pub fn block_device(generic: &str) -> Option<String> {
    let Name { instance, namespace, .. } = parse(generic)?;
    Some(format!("nvme{instance}n{}", namespace?))
}

/// The controller of a namespace, in the kernel's terms; with several paths to it the first.
#[must_use]
pub fn controller_of(generic: &str, sys: &Path) -> Option<String> {
    // Without multipath the namespace stands below its controller; else its subsystem's folder has the controllers.
    let device = sys.join("class/nvme-generic").join(generic).join("device");
    let target = std::fs::canonicalize(&device).ok()?;
    let own = target.file_name()?.to_string_lossy().into_owned();
    if parse(&own).is_some_and(|name| name.namespace.is_none()) {
        return Some(own);
    }
    let mut names = controllers_in(&target);
    names.sort_by_key(|name| parse(name).map(|name| name.instance));
    names.into_iter().next()
}

fn controllers_in(folder: &Path) -> Vec<String> {
    let names = read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| parse(name).is_some_and(|name| name.namespace.is_none() && !name.is_generic)).collect()
}

/// The block devices of a controller's namespaces ("nvme0n1", …), or of the one that a namespace's device stands for.
#[must_use]
pub fn block_devices(name: &str, sys: &Path) -> Vec<String> {
    if parse(name).is_some_and(|name| name.namespace.is_some()) {
        return block_device(name).into_iter().collect();
    }
    let below = read_dir(sys.join("class/nvme").join(name)).into_iter().flatten().flatten();
    let mut names: Vec<_> = below.filter_map(|entry| block_device(&entry.file_name().to_string_lossy())).collect();
    names.sort();
    names.dedup();
    names
}

/// The device of a controller's namespace: "/dev/ng0n1" for "/dev/nvme0" and its NSID, whatever the kernel has called it.
///
/// # Errors
/// [`PassthruError`], also for a namespace that the kernel does not have (not attached, or of a command set that it does not know).
pub fn namespace_device(controller: &Path, nsid: u32) -> Result<PathBuf, PassthruError> {
    let node = Node::open(controller, Kind::Controller)?;
    let names = block_devices(&node.name, Path::new("/sys"));
    let mut paths = names.iter().filter_map(|name| character_device(name)).map(|name| Path::new("/dev").join(name));
    let is_it = |path: &PathBuf| Node::open(path, Kind::Namespace).is_ok_and(|node| node.nsid == nsid);
    paths.find(is_it).ok_or_else(|| PassthruError::NoNamespace { path: controller.to_path_buf(), nsid })
}

/// Which NVMe devices of a kind `/dev` has, in words.
fn there(kind: Kind) -> String {
    let names = read_dir("/dev").into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let wanted = |name: &String| {
        parse(name).is_some_and(|name| match kind {
            Kind::Namespace => name.is_generic,
            Kind::Controller => name.namespace.is_none(),
        })
    };
    let mut names: Vec<_> = names.filter(wanted).map(|name| format!("/dev/{name}")).collect();
    names.sort();
    let what = if kind == Kind::Namespace { "namespaces" } else { "controllers" };
    if names.is_empty() {
        return format!("the kernel's NVMe driver has no {what}");
    }
    names.truncate(16);
    format!("there are {}", names.join(", "))
}

impl Node {
    /// Opens a device for reading and writing, and makes sure that it is what it is taken for.
    ///
    /// # Errors
    /// [`PassthruError`].
    pub fn open(path: &Path, kind: Kind) -> Result<Self, PassthruError> {
        let named = || path.to_path_buf();
        let last = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let failed = |errno: Errno| match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::NXIO | Errno::NODEV => {
                PassthruError::NoSuchDevice { path: named(), there: there(kind) }
            }
            Errno::ACCESS | Errno::PERM => PassthruError::NoPermission { path: named() },
            other => PassthruError::Kernel { path: named(), source: other.into() },
        };
        let stat = rustix::fs::stat(path).map_err(failed)?;
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if file_type == FileType::BlockDevice {
            // The kernel's name, whatever the path is called.
            let known = read_link(format!("/sys/dev/block/{major}:{minor}")).map(|target| last(&target));
            let right = character_device(&known.unwrap_or_else(|_| last(path)));
            return Err(match right {
                Some(right) => PassthruError::BlockDevice { path: named(), right: Path::new("/dev").join(right) },
                None => PassthruError::NotNvme { path: named() },
            });
        }
        if file_type != FileType::CharacterDevice {
            return Err(PassthruError::NotNvme { path: named() });
        }
        let name = read_link(format!("/sys/dev/char/{major}:{minor}")).map_or_else(|_| last(path), |target| last(&target));
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let nsid = dray_device::passthru::ioctl::namespace_id(&file);
        match (kind, nsid, parse(&name)) {
            (Kind::Namespace, Ok(nsid), Some(_)) => Ok(Self { path: named(), name, file, nsid }),
            (Kind::Controller, Err(Errno::NOTTY), Some(Name { namespace: None, .. })) => {
                Ok(Self { path: named(), name, file, nsid: 0 })
            }
            (Kind::Namespace, _, Some(Name { namespace: None, .. })) => {
                Err(PassthruError::IsController { path: named(), there: there(kind) })
            }
            (Kind::Controller, Ok(_), Some(Name { instance, .. })) => {
                let right = controller_of(&name, Path::new("/sys")).unwrap_or_else(|| format!("nvme{instance}"));
                Err(PassthruError::IsNamespace { path: named(), right: Path::new("/dev").join(right) })
            }
            (_, Err(errno), Some(_)) if errno != Errno::NOTTY => Err(failed(errno)),
            _ => Err(PassthruError::NotNvme { path: named() }),
        }
    }

    /// Another descriptor of the same open device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn again(&self) -> Result<OwnedFd, PassthruError> {
        let again = self.file.as_fd().try_clone_to_owned();
        again.map_err(|source| PassthruError::Kernel { path: self.path.clone(), source })
    }

    /// A number of the block device's queue in sysfs (`max_segments`), if the namespace has a block device.
    #[must_use]
    pub fn queue_attribute(&self, attribute: &str) -> Option<u64> {
        let path = format!("/sys/block/{}/queue/{attribute}", block_device(&self.name)?);
        read_to_string(path).ok()?.trim().parse().ok()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::fs::create_dir_all;
    use std::os::unix::fs::symlink;

    #[test]
    fn names_are_told_apart() {
        for (block, right) in [("nvme0n1", "ng0n1"), ("nvme12n34p5", "ng12n34"), ("nvme0c3n1", "ng0n1"), ("ng1n2", "ng1n2")] {
            assert_eq!(character_device(block).as_deref(), Some(right), "{block}");
        }
        for other in ["sda", "nvme", "nvme0", "nvme0n", "nvme0n1q2", "nvme0n1p", "ng0", "nvmexn1", "nvme99999999999n1", ""] {
            assert_eq!(character_device(other), None, "{other}");
        }
        assert_eq!(block_device("ng3n4").as_deref(), Some("nvme3n4"));
    }

    #[test]
    fn a_namespace_knows_its_controller_with_and_without_multipath() {
        let sys = std::env::temp_dir().join(format!("dray-passthru-sys-{}", std::process::id()));
        let folder = |path: &str| create_dir_all(sys.join(path)).expect("a folder");
        for path in ["class/nvme-generic/ng1n1", "class/nvme-generic/ng0n1", "devices/nvme1/nvme1n1", "devices/nvme-subsys0/nvme3"] {
            folder(path);
        }
        folder("class/nvme/nvme1/nvme1n1");
        folder("class/nvme/nvme3/nvme0c3n1");
        folder("class/nvme/nvme3/ng0n1");
        symlink(sys.join("devices/nvme1"), sys.join("class/nvme-generic/ng1n1/device")).expect("a link");
        symlink(sys.join("devices/nvme-subsys0"), sys.join("class/nvme-generic/ng0n1/device")).expect("a link");
        assert_eq!(controller_of("ng1n1", &sys).as_deref(), Some("nvme1"));
        assert_eq!(controller_of("ng0n1", &sys).as_deref(), Some("nvme3"));
        assert_eq!(controller_of("ng9n1", &sys), None);
        assert_eq!(block_devices("nvme3", &sys), ["nvme0n1"]);
        assert_eq!(block_devices("ng7n2", &sys), ["nvme7n2"]);
        std::fs::remove_dir_all(&sys).expect("clean up");
    }

    #[test]
    fn what_is_no_nvme_device_is_refused_by_name() {
        for kind in [Kind::Namespace, Kind::Controller] {
            let missing = Node::open(Path::new("/dev/ng77n99"), kind).expect_err("not there");
            assert!(matches!(&missing, PassthruError::NoSuchDevice { .. }), "{missing}");
            for other in ["/dev/null", "/dev", "/proc/self/exe"] {
                assert!(matches!(Node::open(Path::new(other), kind), Err(PassthruError::NotNvme { .. })), "{other}");
            }
        }
    }
}
