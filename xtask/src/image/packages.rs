//! What the image takes from Debian: the kernel with its modules, the boot loader, and busybox, which unpacks modules here and is
//! the shell of `--debug`. All of it is unpacked under `target/image/packages`; nothing is installed.

use super::inputs::Kernel;
use crate::debian::suite::Suite;
use crate::process::agreed;
use crate::tree::{Tree, read_text, replace};
use crate::{Outcome, kernel};
use std::fs;
use std::path::{Path, PathBuf};

/// The release whose kernel the appliance runs.
const RELEASE: &str = "trixie";
/// Names the newest kernel; has nothing in it.
const KERNEL: &str = "linux-image-amd64";
const LOADER: &str = "systemd-boot-efi";
const LOADER_FILE: &str = "usr/lib/systemd/boot/efi/systemd-bootx64.efi";
const BUSYBOX: &str = "busybox-static";

/// What was unpacked.
pub struct Packages {
    pub kernel: Kernel,
    /// The loader's program.
    pub loader: PathBuf,
    pub busybox: PathBuf,
    /// `NAME=VERSION` of each.
    pub names: Vec<String>,
}

/// Fetches and unpacks what is not there; `renew`: the newest, whatever is there.
pub fn ensure(tree: &Tree, renew: bool, yes: bool) -> Outcome<Packages> {
    let folder = tree.target("image")?.join("packages");
    let stamp = format!("{RELEASE} {KERNEL} {LOADER} {BUSYBOX}");
    let list = folder.join("list");
    if renew || !read_text(&list).is_ok_and(|text| text.lines().next() == Some(stamp.as_str())) {
        fetch(&folder, &stamp, yes)?;
    }
    let names = read_text(&list)?.lines().skip(1).map(str::to_owned).collect();
    let (version, image) = kernel::find(&folder.join("kernel"))?;
    let busybox = folder.join("tools/usr/bin/busybox");
    let loader = folder.join("loader").join(LOADER_FILE);
    let kernel = Kernel { version, image: read(&image)?, root: folder.join("kernel"), unpacker: busybox.clone() };
    Ok(Packages { kernel, loader, busybox, names })
}

fn fetch(folder: &Path, stamp: &str, yes: bool) -> Outcome {
    if !cfg!(target_arch = "x86_64") {
        return Err("the image is for x86-64, and so must be the machine that builds it".into());
    }
    eprintln!(
        "image: Debian {RELEASE}'s kernel, the boot loader of systemd and busybox: about 120 MB to fetch (10 MB of it lists), \
         250 MB on disk under target/image/packages; nothing is installed"
    );
    agreed("Fetch them?", yes)?;
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let suite = Suite::open(&folder.join("apt"), &[RELEASE])?;
    let alone = |name: &str| Ok::<_, String>(suite.plan(None, &[name])?.only(&[], &[name]));
    let (kernel, loader, tools) = (suite.kernel(KERNEL)?, alone(LOADER)?, alone(BUSYBOX)?);
    let names = suite.unpack_parts("image", &[("kernel", &kernel), ("loader", &loader), ("tools", &tools)], folder)?;
    // Lists are of no more use; what stays of them is disk space, no error.
    let _ = fs::remove_dir_all(folder.join("apt"));
    replace(&folder.join("list"), format!("{stamp}\n{}\n", names.join("\n")).as_bytes())
}

/// Reads a file.
pub fn read(path: &Path) -> Outcome<Vec<u8>> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}
