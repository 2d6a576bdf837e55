//! `dray device list`: controllers and namespaces at a glance.

use super::follow::Followed;
use super::identify::ask;
use super::page::hex;
use super::session::Session;
use super::{Device, devices, file_of, is_missing, machine, print, start};
use crate::config::units::Size;
use crate::config::{self, BackingKind, Config, Role, nguid_bytes};
use dray_nvme::identify::{Cns, IdentifyController, IdentifyNamespace, nsid_list};
use miette::{IntoDiagnostic, miette};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use zerocopy::FromBytes;

/// What a controller says of itself, as far as the list shows it.
#[derive(Debug)]
struct Listed<'a> {
    device: Device<'a>,
    id: Box<IdentifyController>,
    /// NSID and what it is, of each active namespace.
    namespaces: Vec<(u32, Box<IdentifyNamespace>)>,
    /// The management controller that moves it.
    mover: Option<String>,
    /// The subsystem that its namespaces were moved to, which serves them.
    moved_to: Option<String>,
}

/// The appliance that runs on a configuration: what it has open is not looked at by others.
fn appliance(config: &Path) -> miette::Result<Option<i32>> {
    if is_there(config) { Ok(crate::run::process_of(&Config::read(config)?)) } else { Ok(None) }
}

/// One that was named has to be there; without the usual one there is less to list.
fn is_there(config: &Path) -> bool {
    config.exists() || config != Path::new("appliance.toml")
}

/// Lists all controllers and namespaces of the configuration, and the machine's NVMe functions. Without the file, and while an
/// appliance runs on it, the machine's are listed alone.
pub(in super::super) fn run(config: &Path, as_json: bool) -> miette::Result<ExitCode> {
    let running = appliance(config)?;
    let followed = if is_there(config) && running.is_none() { Some(Followed::read(config)?) } else { None };
    let mut listed = Vec::new();
    if let Some(followed) = &followed {
        listed = gather(&followed.config)?;
        for one in &mut listed {
            one.moved_to = followed.elsewhere(&one.device).map(str::to_owned);
        }
    }
    let found = machine::gather().into_diagnostic()?;
    let config_of = followed.as_ref().map(|followed| &followed.config);
    if as_json {
        let all: Vec<_> = config_of.map_or_else(Vec::new, |config| listed.iter().map(|one| one.to_json(config)).collect());
        let pci: Vec<_> = found.iter().map(machine::Found::to_json).collect();
        print(&format!("{:#}\n", json!({ "devices": all, "pci": pci, "appliance": running })))?;
    } else {
        let ours = match (config_of, running) {
            (Some(config), _) => text(config, &listed),
            (None, Some(pid)) => {
                format!("The appliance runs on {}, process {pid}: `dray status` shows its controllers.\n", config.display())
            }
            (None, None) => format!("There is no {}: controllers of a configuration are not listed.\n", config.display()),
        };
        print(&format!("{ours}\n{}", machine::text(&found)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn gather(config: &Config) -> miette::Result<Vec<Listed<'_>>> {
    let mut all = Vec::new();
    for subsystem in &config.file.subsystems {
        let mut machine = start(config, subsystem)?;
        let mut group = Vec::new();
        for device in devices(config).filter(|d| std::ptr::eq(d.subsystem, subsystem)) {
            let slot = device.slot(&machine)?;
            let mut session = Session::open(&device.name(), &mut machine.subsystem, &slot)?;
            group.push(look(&mut session, device)?);
            session.close()?;
        }
        let mover = group.iter().find(|one| one.id.oacs.hmlms()).map(|one| one.device.name());
        for one in &mut group {
            one.mover = mover.clone().filter(|_| one.device.controller.role == Role::Migratable);
        }
        all.append(&mut group);
    }
    Ok(all)
}

fn look<'a>(session: &mut Session<'_>, device: Device<'a>) -> miette::Result<Listed<'a>> {
    let id = session.driver().identify().copied();
    let id = id.ok_or_else(|| miette!("{}: no Identify Controller", session.name()))?;
    let refused = |status| miette!("{}: {status}", device.name());
    let nsids = ask(session, Cns::ACTIVE_NAMESPACES, 0)?.map_err(refused)?;
    let mut namespaces = Vec::new();
    for nsid in nsid_list(&nsids.data) {
        let answer = ask(session, Cns::NAMESPACE, nsid)?.map_err(refused)?;
        let namespace = IdentifyNamespace::read_from_bytes(&answer.data).unwrap_or_default();
        namespaces.push((nsid, Box::new(namespace)));
    }
    Ok(Listed { device, id: Box::new(id), namespaces, mover: None, moved_to: None })
}

/// Bytes of a namespace; 0 when its format is unused.
fn bytes(id: &IdentifyNamespace) -> u64 {
    id.nsze.saturating_mul(u64::from(id.block_bytes().unwrap_or(0)))
}

fn kind(namespace: &config::Namespace) -> &'static str {
    match namespace.backing {
        BackingKind::Memory => "memory",
        BackingKind::File => "file",
        BackingKind::Device => "device",
    }
}

/// The namespace of the configuration.
fn configured(subsystem: &config::Subsystem, nsid: u32) -> Option<&config::Namespace> {
    subsystem.namespaces.iter().find(|namespace| *namespace.nsid.get_ref() == nsid)
}

impl Listed<'_> {
    /// Whether the controller takes part in host managed live migration, in words.
    fn migration(&self) -> String {
        if let Some(other) = &self.moved_to {
            return format!("moved: {other} serves");
        }
        match (&self.mover, self.id.oacs.hmlms()) {
            (Some(mover), _) => format!("can be moved by {mover}"),
            (None, false) => "no".into(),
            (None, true) => {
                let tracks = [(self.id.trattr.tudcs(), "user data"), (self.id.trattr.thmcs(), "host memory")];
                let tracks: Vec<_> = tracks.iter().filter(|(can, _)| *can).map(|(_, what)| *what).collect();
                let tracks = if tracks.is_empty() { "nothing".into() } else { tracks.join(", ") };
                format!("moves others (HMLMS); tracks {tracks}")
            }
        }
    }

    fn to_json(&self, config: &Config) -> Value {
        let namespaces: Vec<_> = self.namespaces.iter().map(|(nsid, id)| self.namespace_json(config, *nsid, id)).collect();
        json!({
            "device": self.device.name(),
            "subsystem": self.device.subsystem.name.get_ref(),
            "cntlid": self.id.cntlid,
            "role": self.device.role(),
            "nqn": self.id.subsystem_nqn(),
            "model": self.id.model(),
            "serial": self.id.serial(),
            "firmware": self.id.firmware(),
            "namespaces": namespaces,
            "live_migration": {
                "hmlms": self.id.oacs.hmlms(),
                "tracks_user_data": self.id.trattr.tudcs(),
                "tracks_host_memory": self.id.trattr.thmcs(),
                "moved_by": self.mover,
                "moved_to": self.moved_to,
            },
        })
    }

    fn namespace_json(&self, config: &Config, nsid: u32, id: &IdentifyNamespace) -> Value {
        let namespace = configured(self.device.subsystem, nsid);
        let at_device = namespace.and_then(config::Namespace::at_device);
        // What stands for a device's namespace here says nothing of it.
        let known = |value: u64| at_device.is_none().then_some(value);
        json!({
            "nsid": nsid,
            "blocks": known(id.nsze),
            "block_bytes": known(id.block_bytes().unwrap_or(0).into()),
            "bytes": known(bytes(id)),
            "at_device": at_device.map(|(device, nsid)| config::device::name_of(device, nsid)),
            "nguid": hex(&id.nguid),
            "backing": namespace.map(kind),
            "path": namespace.and_then(|n| file_of(config, n)),
            "missing": namespace.map(|n| is_missing(config, n)),
        })
    }
}

/// Aligns a table's columns; the last one is as long as it is.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

pub(super) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

fn text(config: &Config, listed: &[Listed<'_>]) -> String {
    let mut rows = vec![row(["DEVICE", "ROLE", "MODEL", "SERIAL", "NSIDS", "LIVE MIGRATION"])];
    for one in listed {
        let nsids: Vec<_> = one.namespaces.iter().map(|(nsid, _)| nsid.to_string()).collect();
        let nsids = if nsids.is_empty() { "none".into() } else { nsids.join(" ") };
        let (model, serial) = (one.id.model().unwrap_or("(not ASCII)"), one.id.serial().unwrap_or("(not ASCII)"));
        rows.push(row([&one.device.name(), one.device.role(), model, serial, &nsids, &one.migration()]));
    }
    let mut text = table(&rows);
    let mut rows = vec![row(["SUBSYSTEM", "NSID", "SIZE", "BLOCK", "NGUID", "BACKING"])];
    for subsystem in &config.file.subsystems {
        for namespace in &subsystem.namespaces {
            let seen = listed.iter().filter(|one| std::ptr::eq(one.device.subsystem, subsystem));
            let nsid = *namespace.nsid.get_ref();
            let id = seen.flat_map(|one| &one.namespaces).find(|(found, _)| *found == nsid).map(|(_, id)| id);
            rows.push(namespace_row(config, subsystem, namespace, id.map(Box::as_ref)));
        }
    }
    text.push('\n');
    text.push_str(&table(&rows));
    text
}

fn namespace_row(
    config: &Config,
    subsystem: &config::Subsystem,
    namespace: &config::Namespace,
    id: Option<&IdentifyNamespace>,
) -> Vec<String> {
    let nguid = id.map(|id| id.nguid).or_else(|| nguid_bytes(namespace.nguid.get_ref())).unwrap_or_default();
    let mut size = id.map_or_else(|| "not attached".into(), |id| Size(bytes(id)).to_string());
    let mut backing = kind(namespace).to_owned();
    if let Some((device, nsid)) = namespace.at_device() {
        (backing, size) = (config::device::name_of(device, nsid), "the device's".into());
    }
    if let Some(path) = file_of(config, namespace) {
        let missing = if is_missing(config, namespace) { " (missing)" } else { "" };
        backing = format!("{backing} {}{missing}", path.display());
    }
    let nsid = namespace.nsid.get_ref().to_string();
    let block = namespace.block.get_ref().to_string();
    row([subsystem.name.get_ref(), &nsid, &size, &block, &hex(&nguid), &backing])
}
