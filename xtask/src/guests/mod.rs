//! `cargo xtask guests`: virtual machines with a stock Linux, for tests with clients that are not ours.
//!
//! Debian's kernel, QEMU and a few programs are fetched and unpacked under `target/guests`: nothing is installed, and nothing of
//! the machine's own is used. What runs inside the guests is in `tests/guests`: a list of programs, a list of kernel modules,
//! and the scripts. [`suite`] asks Debian for packages, [`tools`] makes what was unpacked usable, [`initrd`] builds the guest's
//! file system out of it. `tests/support/guest.rs` boots the result; `tests/support/image.rs` boots Dray's own image with the
//! same QEMU.

mod initrd;
mod tools;

use crate::debian::suite::{self, Suite};
use crate::process::{agreed, took};
use crate::tree::{Tree, digest, digest_of, read_text, replace};
use crate::{Outcome, kernel, refuse_rest, take_flag};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tools::Programs;

pub const HELP: &str = "\
Makes the virtual machines that tests with stock clients boot: Debian's kernel, QEMU with its libraries and UEFI, and an
initial RAM disk with nvme-cli, e2fsprogs, fio and busybox, under target/guests. Nothing is installed. The first run fetches about
130 MB and leaves about 400 MB; later ones do nothing, or build the RAM disk again when tests/guests has changed.

Usage: cargo xtask guests [OPTIONS]

Options:
  --renew  fetch the newest packages, whatever is there
  --yes    do not ask
  --help   this text

Example: cargo xtask guests
";

/// The release of Debian that guests run. Its kernel is 6.12, its backports have a QEMU that is a client of vfio-user.
const RELEASE: &str = "trixie";
/// Where a newer QEMU is.
const BACKPORTS: &str = "trixie-backports";
const QEMU: &str = "qemu-system-x86";
/// Names the newest kernel; has nothing in it.
const KERNEL: &str = "linux-image-cloud-amd64";
/// UEFI for QEMU, which Dray's own image boots with.
const FIRMWARE: &str = "ovmf";
/// What of it is used: its code, and what a machine that never ran has as its variables.
const FLASH: [&str; 2] = ["OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"];
/// What a program needs at run time starts so, among what its package depends on.
const LIBRARIES: [&str; 2] = ["lib", "zlib"];
/// The same for QEMU, with its data and firmware.
const OF_QEMU: [&str; 5] = ["lib", "zlib", "qemu-", "seabios", "ipxe-qemu"];
/// The oldest QEMU with vfio-user-pci.
const OLDEST_QEMU: u32 = 10;

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let (renew, yes) = (take_flag(&mut args, "--renew"), take_flag(&mut args, "--yes"));
    refuse_rest(&args)?;
    if renew {
        remove(&tree.target("guests")?.join("packages"))?;
    }
    let folder = ensure(tree, yes)?;
    println!("{}", read_text(&folder.join("contents"))?.trim_end());
    Ok(())
}

/// Makes what is missing or out of date; returns the folder.
pub fn ensure(tree: &Tree, yes: bool) -> Outcome<PathBuf> {
    let started = Instant::now();
    let folder = tree.target("guests")?;
    let wanted = tree.root.join("tests/guests");
    let programs = Programs::parse(&read_text(&wanted.join("programs"))?)?;
    // What is fetched depends on the list of packages alone; what is built on all of it, and on how it is built.
    let packages = format!("{RELEASE} {BACKPORTS} {KERNEL} {FIRMWARE} {} and {} {}", OF_QEMU.join(" "), programs.packages().join(" "), LIBRARIES.join(" "));
    let fetched = read_text(&folder.join("packages")).is_ok_and(|stamp| stamp.lines().next() == Some(packages.as_str()));
    if !fetched {
        fetch(&folder, &packages, &programs, yes)?;
        eprintln!("guests: fetched and unpacked after {}", took(started.elapsed()));
    }
    let (ours, shared) = ([include_str!("initrd.rs"), include_str!("tools.rs")], [include_str!("../cpio.rs"), include_str!("../kernel.rs")]);
    let how = [ours, shared].concat().concat();
    let built = format!("{} {} {}", digest_of(std::slice::from_ref(&wanted))?, digest(how.as_bytes()), read_text(&folder.join("packages"))?);
    if fetched && read_text(&folder.join("built")).is_ok_and(|stamp| stamp == built) {
        return Ok(folder);
    }
    remove(&folder.join("built"))?;
    let contents = build(&folder, &wanted, &programs)?;
    replace(&folder.join("contents"), contents.as_bytes())?;
    replace(&folder.join("built"), built.as_bytes())?;
    eprintln!("guests: ready after {}", took(started.elapsed()));
    Ok(folder)
}

fn fetch(folder: &Path, stamp: &str, programs: &Programs, yes: bool) -> Outcome {
    if !cfg!(target_arch = "x86_64") {
        return Err("guests are x86-64, and so must be the machine".into());
    }
    eprintln!(
        "guests: Debian {RELEASE}'s kernel, QEMU from {BACKPORTS} and {}, for tests with stock clients: about 130 MB to fetch \
         (10 MB of it lists), 400 MB on disk under target/guests; nothing is installed",
        programs.packages().join(", ")
    );
    agreed("Fetch them?", yes)?;
    let suite = Suite::open(&folder.join("apt"), &[RELEASE, BACKPORTS])?;
    let qemu = suite.plan(Some(BACKPORTS), &[QEMU])?.only(&OF_QEMU, &[]);
    let version = qemu.version(QEMU).unwrap_or("none").to_owned();
    if suite::major(&version).is_none_or(|major| major < OLDEST_QEMU) {
        return Err(format!("{QEMU} in {BACKPORTS} is {version}: at least {OLDEST_QEMU} is needed, which knows vfio-user"));
    }
    let asked = programs.packages();
    let programs = suite.plan(None, &asked)?.only(&LIBRARIES, &asked);
    let kernel = suite.kernel(KERNEL)?;
    let firmware = suite.plan(None, &[FIRMWARE])?.only(&[], &[FIRMWARE]);
    let parts = [("kernel", &kernel), ("qemu", &qemu), ("programs", &programs), ("firmware", &firmware)];
    let names = suite.unpack_parts("guests", &parts, folder)?;
    // Lists are of no more use; what stays of them is disk space, no error.
    let _ = fs::remove_dir_all(folder.join("apt"));
    replace(&folder.join("packages"), format!("{stamp}\n{}\n", names.join("\n")).as_bytes())
}

/// Makes the files that tests use; what they are, for people.
fn build(folder: &Path, wanted: &Path, programs: &Programs) -> Outcome<String> {
    let (version, image) = kernel::find(&folder.join("kernel"))?;
    let bytes = fs::read(&image).map_err(|error| format!("{}: {error}", image.display()))?;
    replace(&folder.join("vmlinuz"), &bytes)?;
    tools::qemu_script(&folder.join("qemu"), &folder.join("qemu-system-x86_64"))?;
    for file in FLASH {
        let path = folder.join("firmware/usr/share/OVMF").join(file);
        replace(&folder.join(file), &fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?)?;
    }
    let archive = initrd::build(folder, wanted, &version, programs)?;
    replace(&folder.join("initrd.cpio"), &archive)?;
    let line = |name: &str, what: &str| format!("{:<42}{what}", folder.join(name).display());
    let packages = read_text(&folder.join("packages"))?;
    let qemu = packages.lines().find_map(|line| line.strip_prefix(QEMU)?.strip_prefix('=')).unwrap_or("");
    Ok([
        line("qemu-system-x86_64", &format!("QEMU {qemu}, with its own loader and libraries")),
        line("vmlinuz", &format!("Linux {version}")),
        line(FLASH[0], "UEFI, to boot Dray's own image with"),
        line("initrd.cpio", &format!("{} MB: {}, busybox", archive.len().div_ceil(1_000_000), programs.names().join(", "))),
    ]
    .join("\n"))
}

fn remove(path: &Path) -> Outcome {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {error}", path.display())),
        _ => Ok(()),
    }
}
