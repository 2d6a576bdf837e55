//! `dray image status` and `update`: the system slots of the image that runs here.

use crate::init::cmdline::{CommandLine, Slot};
use crate::init::modules::{self, Sets};
use crate::init::mounts::{BOOT_FOLDER, Esp};
use crate::slots::bundle::Key;
use crate::slots::files::Folder;
use crate::slots::update::{RunningSlot, update as write_update};
use crate::slots::{KEY_FILE, SlotInfo, look, source};
use clap::Args;
use miette::{Context, IntoDiagnostic, miette};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where the image's parts are, when they are not where the image has them.
#[derive(Clone, Debug, Args)]
pub(super) struct Parts {
    /// The EFI system partition, mounted by somebody else
    #[arg(long, value_name = "FOLDER", hide = true)]
    esp: Option<PathBuf>,
    /// The public key
    #[arg(long, value_name = "FILE", hide = true, default_value = KEY_FILE)]
    key: PathBuf,
    /// The slot that runs, "a" or "b", with its version: "a:7"
    #[arg(long, value_name = "SLOT:VERSION", hide = true, value_parser = running_of)]
    running: Option<RunningSlot>,
}

fn running_of(text: &str) -> Result<RunningSlot, String> {
    let (slot, version) = text.split_once(':').ok_or("no `:`")?;
    let slot = Slot::parse(slot).ok_or("the slot is \"a\" or \"b\"")?;
    Ok(RunningSlot { slot, version: Some(version.parse().map_err(|error| format!("{version}: {error}"))?) })
}

impl Parts {
    fn running(&self) -> Option<RunningSlot> {
        self.running.or_else(|| {
            let line = CommandLine::parse(&std::fs::read_to_string("/proc/cmdline").ok()?);
            Some(RunningSlot { slot: line.slot?, version: line.version })
        })
    }

    /// The slots' files; what is returned besides keeps the partition mounted.
    fn files(&self, writable: bool) -> miette::Result<(Folder, Option<Esp>)> {
        if let Some(folder) = &self.esp {
            return Ok((Folder::new(folder), None));
        }
        if !Path::new(KEY_FILE).exists() {
            return Err(miette!(
                help = "these commands are for the image's console: `[image] console` in its configuration",
                "this is not Dray's image"
            ));
        }
        let esp = Esp::mount_soon(writable).into_diagnostic().wrap_err("the system slots are not to be had")?;
        Ok((Folder::new(Path::new(BOOT_FOLDER)), Some(esp)))
    }
}

/// Shows the slots.
pub(super) fn status(parts: &Parts, as_json: bool) -> miette::Result<ExitCode> {
    let running = parts.running();
    let key = Key::read(&parts.key).map(|key| key.fingerprint());
    let sets = Sets::parse(&std::fs::read_to_string(modules::LIST).unwrap_or_default());
    // A kernel that was booted directly may have no disk.
    let files = if running.is_some() || parts.esp.is_some() { Some(parts.files(false)?) } else { None };
    let mut slots = Vec::new();
    if let Some((folder, _mounted)) = &files {
        for slot in [Slot::A, Slot::B] {
            slots.push(look(folder, slot).into_diagnostic().wrap_err("the system slots cannot be read")?);
        }
    }
    if as_json {
        let value = json!({
            "running": running.map(|running| json!({ "slot": running.slot.letter(), "version": running.version })),
            "slots": slots.iter().map(slot_value).collect::<Vec<_>>(), "key": key.as_ref().ok(), "modules": sets.names(),
        });
        println!("{value:#}");
        return Ok(ExitCode::SUCCESS);
    }
    for info in &slots {
        println!("slot {}        {}", info.slot, slot_line(info, running));
    }
    if running.is_none() {
        println!("booted        directly, from no slot");
    }
    println!("updates       {}", key.map_or_else(|error| error.to_string(), |key| format!("signed by the key {key}")));
    println!("module sets   {}", sets.names().join(", "));
    Ok(ExitCode::SUCCESS)
}

fn slot_value(info: &SlotInfo) -> Value {
    let entry = info.entry();
    json!({
        "slot": info.slot.letter(),
        "version": entry.and_then(|(_, _, entry)| entry.version), "entry": entry.map(|(name, _, _)| name),
        "tries_left": entry.and_then(|(_, tries, _)| tries.left), "tries_made": entry.map(|(_, tries, _)| tries.made),
        "good": entry.is_some_and(|(_, tries, _)| tries.left.is_none()), "complete": info.complete,
        "options": entry.map(|(_, _, entry)| &entry.options),
    })
}

fn slot_line(info: &SlotInfo, running: Option<RunningSlot>) -> String {
    let Some((_, tries, entry)) = info.entry() else { return "empty".into() };
    let version = entry.version.map_or_else(|| "no version".into(), |version| format!("version {version}"));
    let state = match (tries.left, info.complete) {
        (_, false) => "its files are missing".into(),
        (None, _) => "good".into(),
        (Some(0), _) => "did not come up".into(),
        (Some(left), _) => format!("on trial, {left} tries left"),
    };
    let runs = if running.is_some_and(|running| running.slot == info.slot) { ", runs" } else { "" };
    format!("{version}, {state}{runs}")
}

/// Writes a bundle to the slot that does not run.
pub(super) fn update(parts: &Parts, from: &str, allow_downgrade: bool) -> miette::Result<ExitCode> {
    let running = parts.running().ok_or_else(|| {
        miette!(
            help = "a kernel that was booted directly is updated where it is booted from",
            "no slot runs here, so that there is no other one to write"
        )
    })?;
    let key = Key::read(&parts.key)?;
    let mut source = source::open(from).into_diagnostic().wrap_err_with(|| format!("the update {from} cannot be read"))?;
    let (mut files, mounted) = parts.files(true)?;
    let header = write_update(source.as_mut(), &key, running, allow_downgrade, &mut files, &mut |line| println!("{line}"))?;
    drop(mounted);
    let (version, slot, other) = (header.version, running.slot, running.slot.other());
    println!("version {version} is in slot {other}; the next start boots it, and comes back to slot {slot} if it does not come up");
    Ok(ExitCode::SUCCESS)
}
