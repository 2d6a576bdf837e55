//! `cargo xtask image`: the bootable appliance.
//!
//! [`inputs`] gathers what it is made of ([`packages`] from Debian, the rest from the build and `images/`), [`initramfs`] packs
//! the appliance's file system, [`disk`] lays out the disk ([`gpt`], [`fat`]), [`bundle`] signs the same system as an update. The
//! same inputs give the same bytes: `manifest` has their hashes. `tests/support/image.rs` boots the result.

mod aliases;
mod bundle;
mod disk;
mod elf;
mod fat;
mod gpt;
mod initramfs;
mod inputs;
mod lz4;
mod packages;

use crate::process::{cargo, run as execute, took};
use crate::tree::{Tree, digest, replace};
use crate::{Outcome, debian, demo, plugins, refuse_rest, take_flag, take_value};
use inputs::Inputs;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub const HELP: &str = "\
Builds the appliance as an image that boots, into target/image:

  dray.img          a disk: EFI system partition, configuration, state. Write it to a disk, or boot it in a virtual machine
  vmlinuz, initrd   the same system for direct boot, by a network or a virtual machine's -kernel and -initrd
  dray-update.bin   the same system as an update, signed: `dray image update` takes it
  manifest          hashes, sizes, versions

The kernel is Debian's; the first run fetches it (120 MB; nothing is installed). Builds the host and the policies if something
changed. The same sources give the same bytes.

Usage: cargo xtask image [OPTIONS]

Options:
  --config FILE   the configuration [default: images/appliance.toml]; components beside it come along
  --key FILE      the key that signs updates, 64 hexadecimal digits [default: target/image/update.key, made if missing]
  --version N     what the boot loader goes by: the higher one boots first [default: the time of the commit]
  --state SIZE    MiB of the state partition [default: 512]
  --debug         with a shell (busybox) in it: for looking into, not for use
  --output DIR    where to write [default: target/image]
  --no-build      take the host and the policies as they were built last
  --renew         fetch the newest packages, whatever is there
  --yes           do not ask
  --help          this text

Example: cargo xtask image && qemu-img convert -O raw target/image/dray.img /dev/sdX
";

/// What the command line says.
#[derive(Debug)]
pub struct Options {
    pub config: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub version: Option<u64>,
    pub state_mib: u64,
    pub debug: bool,
    pub output: Option<PathBuf>,
    pub no_build: bool,
    pub renew: bool,
    pub yes: bool,
}

/// Bounds of `--state`, in MiB.
const STATE_MIB: std::ops::RangeInclusive<u64> = 16..=1 << 20;

impl Options {
    fn parse(mut args: Vec<String>) -> Outcome<Self> {
        let mut flag = |name| take_flag(&mut args, name);
        let (debug, no_build, renew, yes) = (flag("--debug"), flag("--no-build"), flag("--renew"), flag("--yes"));
        let mut path = |name| Ok::<_, String>(take_value(&mut args, name)?.map(PathBuf::from));
        let (config, key, output) = (path("--config")?, path("--key")?, path("--output")?);
        let parse = |name, text: String| text.parse().map_err(|_| format!("{name} {text}: not a number"));
        let mut number = |name| take_value(&mut args, name)?.map(|text| parse(name, text)).transpose();
        let (version, state_mib) = (number("--version")?, number("--state")?.unwrap_or(512));
        refuse_rest(&args)?;
        if !STATE_MIB.contains(&state_mib) {
            return Err(format!("--state {state_mib}: {} to {} MiB", STATE_MIB.start(), STATE_MIB.end()));
        }
        Ok(Self { config, key, version, state_mib, debug, output, no_build, renew, yes })
    }
}

pub fn run(tree: &Tree, args: Vec<String>) -> Outcome {
    build(tree, &Options::parse(args)?)
}

fn build(tree: &Tree, options: &Options) -> Outcome {
    let started = Instant::now();
    debian::need("e2fsprogs", &["mkfs.ext4"], options.yes)?;
    debian::need("binutils", &["strip"], options.yes)?;
    if !options.no_build {
        plugins::build(tree, options.yes)?;
        execute(&mut cargo(tree, &demo::BUILD))?;
    }
    let inputs = Inputs::gather(tree, &tree.cargo_target().join("release/dray"), options)?;
    let output = match &options.output {
        Some(folder) => folder.clone(),
        None => tree.target("image")?,
    };
    eprintln!("image: Linux {}, version {}, gathered after {}", inputs.kernel.version, inputs.version, took(started.elapsed()));
    let manifest = assemble(&inputs, &output)?;
    print!("{manifest}");
    eprintln!("image: ready in {} after {}", output.display(), took(started.elapsed()));
    Ok(())
}

/// Writes all files into `output`; the manifest, which is one of them.
fn assemble(inputs: &Inputs, output: &Path) -> Outcome<String> {
    let started = Instant::now();
    fs::create_dir_all(output).map_err(|error| format!("{}: {error}", output.display()))?;
    let (initrd, unpacked) = initramfs::build(inputs)?;
    let sizes = format!("{} MB, {} MB unpacked", initrd.len().div_ceil(1_000_000), unpacked.div_ceil(1_000_000));
    eprintln!("image: initrd: {sizes}, {}", took(started.elapsed()));
    replace(&output.join("vmlinuz"), &inputs.kernel.image)?;
    replace(&output.join("initrd"), &initrd)?;
    let Inputs { version, kernel, options, key, .. } = inputs;
    let bundle = bundle::Bundle { version: *version, kernel: &kernel.image, initrd: &initrd, options }.bytes(key);
    replace(&output.join("dray-update.bin"), &bundle)?;
    let bytes = disk::write(&output.join("dray.img"), inputs, &initrd)?;
    eprintln!("image: dray.img: {} MiB (what is written of it: less), {}", bytes >> 20, took(started.elapsed()));
    let manifest = manifest(inputs, output)?;
    replace(&output.join("manifest"), manifest.as_bytes())?;
    Ok(manifest)
}

/// What was built, and of what: the same text for the same inputs.
fn manifest(inputs: &Inputs, output: &Path) -> Outcome<String> {
    let Inputs { version, options, public_key, .. } = inputs;
    let mut text = format!("# SHA-256, bytes, name\nversion {version}\noptions {options}\nkey {public_key}");
    for name in ["dray.img", "vmlinuz", "initrd", "dray-update.bin"] {
        let bytes = packages::read(&output.join(name))?;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {:>11} {name}", digest(&bytes), bytes.len());
    }
    let parts = [("dray (stripped)", &inputs.binary), ("systemd-boot", &inputs.loader)];
    let config = inputs.config.iter().map(|(name, bytes)| (name.as_str(), bytes));
    for (name, bytes) in parts.into_iter().chain(config) {
        let _ = writeln!(text, "{} {:>11} in it: {name}", digest(bytes), bytes.len());
    }
    for (path, bytes) in elf::closure(&inputs.binary, Path::new("/"))? {
        let _ = writeln!(text, "{} {:>11} in it: /{path}", digest(&bytes), bytes.len());
    }
    for name in &inputs.packages {
        let _ = writeln!(text, "package {name}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
