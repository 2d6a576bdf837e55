//! The demo's input: the source's image, the destination's A5h, the guest's ledger; made anew, or taken up again.

use super::GUEST_BLOCKS;
use super::disk::Disk;
use super::progress::Screen;
use crate::cli::DemoArgs;
use crate::config::{BackingKind, Config};
use crate::config::units::Size;
use crate::image::{self, BLOCK_BYTES, ImageSpec};
use crate::devices::disk::DeviceDisk;
use crate::live;
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::pattern;
use dray_workload::tag;
use dray_workload::verify::{self, Comparison};
use miette::{IntoDiagnostic, WrapErr, miette};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use toml::Spanned;

/// What the destination holds before anything is copied.
const PREFILL: u8 = 0xa5;

/// Checks that all acknowledged writes are on the disk that serves, before the guest goes on and writes over them.
pub(super) fn check(config: &Config, serving: &Disk, ledger: &Ledger) -> miette::Result<Comparison> {
    verify::check(&mut *serving.reader(config)?, ledger).into_diagnostic()
}

/// What a run starts from.
pub(super) struct Input {
    /// The namespace that moves.
    pub(super) nsid: u32,
    /// The source's disk.
    pub(super) source: Disk,
    /// The destination's disk.
    pub(super) destination: Disk,
    /// What the guest writes and keeps account of.
    pub(super) ledger: Arc<Ledger>,
}

/// Makes the source's image and the destination's A5h.
pub(super) fn make(config: &Config, args: &DemoArgs, screen: &mut Screen) -> miette::Result<Input> {
    let (nsid, source) = Disk::of_end(config, config.file.migration.from.get_ref())?;
    let (_, destination) = Disk::of_end(config, config.file.migration.to.get_ref())?;
    if let Some(device) = [&source, &destination].into_iter().find(|disk| disk.file().is_none())
        && !args.destroys_data
    {
        return Err(miette!(
            help = "say --destroys-data if nothing on it is needed any more",
            "the demo writes over everything on {device}"
        ));
    }
    for folder in [&source, &destination].into_iter().filter_map(|disk| disk.file()?.parent()) {
        std::fs::create_dir_all(folder).into_diagnostic().wrap_err_with(|| folder.display().to_string())?;
    }
    let (bytes, blocks) = make_source(config, args, &source, &destination, screen)?;
    make_destination(config, &destination, bytes, screen)?;
    for path in [&source, &destination].into_iter().filter_map(Disk::file) {
        settle(path).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
    }
    let path = live::ledger_path(config);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).into_diagnostic()?;
    }
    let spec = LedgerSpec { seed: args.seed, guest: 1, blocks };
    let ledger = Ledger::create(&path, &spec).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
    screen.say(&format!("ledger       {}", path.display()));
    Ok(Input { nsid, source, destination, ledger: Arc::new(ledger) })
}

/// The source's content; its bytes, and the blocks that the guest may write.
fn make_source(
    config: &Config,
    args: &DemoArgs,
    source: &Disk,
    destination: &Disk,
    screen: &mut Screen,
) -> miette::Result<(u64, Vec<u64>)> {
    if let Some(mut disk) = source.open_device(config)? {
        return noise(&mut disk, source, args.seed, screen);
    }
    // A device has the size that it has: what moves to it is as large.
    let size = match destination.open_device(config)? {
        Some(disk) => Size(disk.bytes()),
        None => args.size,
    };
    let path = source.file().ok_or_else(|| miette!("{source} is nowhere"))?;
    match &args.image {
        Some(image) => given(image, path, screen),
        None => made(path, size, screen),
    }
}

/// A device as the source: noise with some zeroes, and a guest that writes blocks all over it.
fn noise(disk: &mut DeviceDisk, source: &Disk, seed: u64, screen: &mut Screen) -> miette::Result<(u64, Vec<u64>)> {
    let bytes = disk.bytes();
    screen.say(&format!("source       {} of noise on {source}", Size(bytes)));
    let content = pattern::Disk { seed, zero_percent: 20 };
    let mut fill = |first: u64, chunk: &mut [u8]| {
        for (block, bytes) in (first..).zip(chunk.chunks_mut(tag::BLOCK_BYTES)) {
            content.block(block, bytes);
        }
    };
    disk.write_all(&mut fill).into_diagnostic().wrap_err_with(|| source.to_string())?;
    Ok((bytes, every_nth(bytes / BLOCK_BYTES)?))
}

fn make_destination(config: &Config, destination: &Disk, bytes: u64, screen: &mut Screen) -> miette::Result<()> {
    screen.say(&format!("destination  {} of A5h in {destination}", Size(bytes)));
    if let Some(mut disk) = destination.open_device(config)? {
        let has = disk.bytes();
        if has < bytes {
            return Err(miette!("{destination} has {}, and the source {}", Size(has), Size(bytes)));
        }
        let filled = disk.write_all(&mut |_, chunk| chunk.fill(PREFILL));
        return filled.into_diagnostic().wrap_err_with(|| destination.to_string());
    }
    let Some(path) = destination.file() else { return Ok(()) };
    let filled = File::create(path).and_then(|file| pattern::fill_file(&file, bytes, PREFILL));
    filled.into_diagnostic().wrap_err_with(|| path.display().to_string())
}

/// What a later `dray demo --resume` has to know besides the configuration. Written when all input is there.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    version: u32,
    /// The file of each subsystem, by its name.
    disks: BTreeMap<String, PathBuf>,
    writes_per_second: u32,
    queue_depth: u16,
}

impl Kept {
    const VERSION: u32 = 1;

    fn path(config: &Config) -> PathBuf {
        config.path(&config.file.core.state).join("demo.json")
    }

    /// From here on there is nothing to resume, until [`keep`](Self::keep).
    pub(super) fn forget(config: &Config) -> miette::Result<()> {
        let path = Self::path(config);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).into_diagnostic().wrap_err_with(|| path.display().to_string())
            }
            _ => Ok(()),
        }
    }

    /// A run that is killed from here on can be resumed.
    pub(super) fn keep(config: &Config, input: &Input) -> miette::Result<()> {
        let (guest, ends) = (&config.file.guest, &config.file.migration);
        let mut disks = BTreeMap::new();
        for (name, path) in [(&ends.from, &input.source), (&ends.to, &input.destination)] {
            disks.insert(name.get_ref().clone(), path.kept()?);
        }
        let kept = Self {
            version: Self::VERSION,
            disks,
            writes_per_second: guest.writes_per_second,
            queue_depth: guest.queue_depth,
        };
        let (path, text) = (Self::path(config), serde_json::to_vec(&kept).into_diagnostic()?);
        let unfinished = path.with_extension("part");
        let whole = durably(&unfinished, &path, &text);
        whole.into_diagnostic().wrap_err_with(|| path.display().to_string())
    }

    /// What the last run has kept.
    pub(super) fn find(config: &Config) -> miette::Result<Self> {
        let path = Self::path(config);
        let text = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => miette!(
                help = "run `dray demo` without --resume",
                "there is nothing to resume in {}: no demo was started, or it was stopped before its input was made",
                path.parent().unwrap_or(&path).display()
            ),
            _ => miette!("{}: {error}", path.display()),
        })?;
        let kept: Self = serde_json::from_slice(&text).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
        if kept.version != Self::VERSION {
            return Err(miette!("{}: version {}, and this dray reads {}", path.display(), kept.version, Self::VERSION));
        }
        Ok(kept)
    }

    /// Takes up the input of the last run.
    pub(super) fn input(&self, config: &Config, screen: &mut Screen) -> miette::Result<Input> {
        let (nsid, source) = Disk::of_end(config, config.file.migration.from.get_ref())?;
        let (_, destination) = Disk::of_end(config, config.file.migration.to.get_ref())?;
        let path = live::ledger_path(config);
        let ledger = Ledger::resume(&path).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
        screen.say(&format!("ledger       {}: {} writes acknowledged", path.display(), ledger.acknowledged()));
        Ok(Input { nsid, source, destination, ledger: Arc::new(ledger) })
    }

    /// Makes the configuration say what the last run was told: `--destination` and the like need not be said again.
    pub(super) fn apply(&self, config: &mut Config) {
        for subsystem in &mut config.file.subsystems {
            let Some(path) = self.disks.get(subsystem.name.get_ref()) else { continue };
            for namespace in subsystem.namespaces.iter_mut().filter(|n| n.backing == BackingKind::File) {
                namespace.path = Some(Spanned::new(0..0, path.clone()));
            }
        }
        config.file.guest.writes_per_second = self.writes_per_second;
        config.file.guest.queue_depth = self.queue_depth;
    }
}

/// Writes a file that is there whole or not at all, after a power cut too.
fn durably(unfinished: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(unfinished, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Lets a file come to rest: what is still to be written back would compete with the guest, and cached pages would have to be
/// dropped one by one when the file is written past the cache.
fn settle(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Blocks all over a disk without a filesystem, for the guest.
fn every_nth(all: u64) -> miette::Result<Vec<u64>> {
    let step = (all / GUEST_BLOCKS.min(all.div_ceil(8)).max(1)).max(1);
    Ok((0..all).step_by(usize::try_from(step).into_diagnostic()?).collect())
}

fn made(path: &Path, size: Size, screen: &mut Screen) -> miette::Result<(u64, Vec<u64>)> {
    let cache = path.parent().map(|folder| folder.join("image-cache"));
    let mut spec = ImageSpec::new(path.to_path_buf(), cache);
    spec.fill_limit = (u128::from(spec.fill_limit) * u128::from(size.0) / u128::from(spec.bytes)) as u64;
    spec.guest_bytes = (spec.guest_bytes.min(size.0 / 8)) / BLOCK_BYTES * BLOCK_BYTES;
    spec.bytes = size.0;
    screen.say(&format!("source       preparing {size} of ext4 with real files in {}", path.display()));
    let image = image::make(&spec).into_diagnostic().wrap_err("the source's image could not be made")?;
    let cached = if image.cached { ", kept from the last run" } else { "" };
    screen.say(&format!(
        "             {} real files, {}{cached}",
        image.files,
        Size(image.fill_bytes)
    ));
    screen.say(&format!(
        "guest file   {} in {} pieces over the whole image",
        Size(image.target_blocks.len() as u64 * BLOCK_BYTES),
        image.pieces
    ));
    Ok((size.0, image.target_blocks))
}

/// A copy of an image that the user named, and the blocks of it that the guest may write.
fn given(image: &Path, source: &Path, screen: &mut Screen) -> miette::Result<(u64, Vec<u64>)> {
    let named = || image.display().to_string();
    let bytes = std::fs::metadata(image).into_diagnostic().wrap_err_with(named)?.len();
    if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(miette!(
            help = "pad it, for instance with `truncate -s %4096 FILE`",
            "{} has {bytes} bytes, which is not a whole number of blocks of {BLOCK_BYTES} bytes",
            image.display()
        ));
    }
    if std::fs::canonicalize(image).ok() == std::fs::canonicalize(source).ok() {
        return Err(miette!("{} is the demo's own source file; name another", image.display()));
    }
    std::fs::copy(image, source).into_diagnostic().wrap_err_with(named)?;
    let blocks = match image::add_guest_file(source).into_diagnostic().wrap_err_with(named)? {
        Some(blocks) => {
            let size = Size(blocks.len() as u64 * BLOCK_BYTES);
            screen.say(&format!("source       a copy of {}, with a file of {size} for the guest", image.display()));
            blocks
        }
        None => {
            let all = bytes / BLOCK_BYTES;
            let step = (all / GUEST_BLOCKS.min(all.div_ceil(8)).max(1)).max(1);
            screen.say(&format!("source       a copy of {} (no ext4): the guest writes every {step}th block", image.display()));
            every_nth(all)?
        }
    };
    Ok((bytes, blocks))
}
