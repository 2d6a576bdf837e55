//! `[[export]]`: before whom a controller is put, and how it is reached.

use super::check::{Problem, problem};
use super::{Config, Role, Subsystem};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use toml::Spanned;

/// Most bytes of a Unix socket's path (`sun_path` less its terminating zero).
const SOCKET_PATH_BYTES: usize = 107;
/// Most bytes of an NVMe Qualified Name (Base 2.3 §4.7).
const NQN_BYTES: usize = 223;
/// Where an NVMe/TCP target listens unless the configuration says otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:4420";

/// A controller (or, by NVMe/TCP, several of one subsystem) before clients.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Export {
    /// The subsystem's name.
    pub subsystem: Spanned<String>,
    /// The CNTLID.
    pub controller: Option<Spanned<u16>>,
    /// CNTLIDs: with NVMe/TCP each host gets one of them.
    pub controllers: Option<Vec<Spanned<u16>>>,
    /// By which protocol.
    pub by: Spanned<ExportBy>,
    /// vfio-user: the Unix socket. Without it one in the state folder, `SUBSYSTEM-CNTLID.sock`.
    pub socket: Option<Spanned<PathBuf>>,
    /// vfio-user: what of BAR0 a client may map.
    pub bar0: Option<Spanned<Bar0>>,
    /// NVMe/TCP: address and port; [`DEFAULT_LISTEN`] without it. Port 0 takes any free one.
    pub listen: Option<Spanned<String>>,
    /// NVMe/TCP: which digests connections have.
    pub digests: Option<Spanned<DigestChoice>>,
    /// NVMe/TCP: who may connect.
    pub hosts: Option<Vec<Host>>,
}

/// By which protocol a controller is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportBy {
    /// A Unix socket, for VM managers.
    VfioUser,
    /// For any host.
    NvmeTcp,
}

impl ExportBy {
    /// As the configuration writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::VfioUser => "vfio-user",
            Self::NvmeTcp => "nvme-tcp",
        }
    }
}

/// What of BAR0 a vfio-user client may map; the rest, and all of it where nothing is mapped, is reached by messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bar0 {
    /// The pages of the doorbells.
    #[default]
    Doorbells,
    /// All of it, for clients that insist.
    Whole,
    /// Nothing: each doorbell is a message.
    Trapped,
}

/// Which digests (CRC-32C) the connections of an NVMe/TCP export have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DigestChoice {
    /// Those that a host asks for.
    #[default]
    AsAsked,
    /// Header and data digests: a host that does not ask for both is refused.
    Required,
}

/// A host that may connect.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Host {
    /// Its NVMe Qualified Name.
    pub nqn: Spanned<String>,
    /// The file with its secret for in-band authentication, as nvme-cli writes it ("DHHC-1:…"). With it the host must
    /// authenticate; without it the name is enough.
    pub secret_file: Option<Spanned<PathBuf>>,
    /// The file with the controllers' secret, for a host that wants them to authenticate as well.
    pub controller_secret_file: Option<Spanned<PathBuf>>,
}

impl Export {
    /// The CNTLIDs.
    #[must_use]
    pub fn cntlids(&self) -> Vec<u16> {
        let several = self.controllers.iter().flatten();
        self.controller.iter().chain(several).map(|cntlid| *cntlid.get_ref()).collect()
    }

    /// The Unix socket of a vfio-user export.
    #[must_use]
    pub fn socket_path(&self, config: &Config) -> PathBuf {
        match &self.socket {
            Some(path) => config.path(path.get_ref()),
            None => {
                let cntlid = self.cntlids().first().copied().unwrap_or(0);
                config.path(&config.file.core.state).join(format!("{}-{cntlid}.sock", self.subsystem.get_ref()))
            }
        }
    }

    /// Where an NVMe/TCP export listens; `None` if that is no address.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.as_ref().map_or(DEFAULT_LISTEN, |text| text.get_ref()).parse().ok()
    }
}

/// What the exports before it have taken.
#[derive(Default)]
struct Taken<'a> {
    controllers: BTreeSet<(&'a str, u16)>,
    sockets: BTreeSet<PathBuf>,
    /// By address and NQN.
    subsystems: BTreeSet<(SocketAddr, &'a str)>,
}

pub(super) fn check(config: &Config) -> Result<(), Problem> {
    let mut taken = Taken::default();
    for export in &config.file.exports {
        let name = export.subsystem.get_ref();
        let Some(subsystem) = config.subsystem(name) else {
            let known: Vec<_> = config.file.subsystems.iter().map(|s| s.name.get_ref().as_str()).collect();
            let message = format!("there is no subsystem \"{name}\"");
            return Err(problem(&export.subsystem, message, format!("there are: {}", known.join(", "))));
        };
        check_controllers(config, export, subsystem, &mut taken)?;
        check_keys(export)?;
        match export.by.get_ref() {
            ExportBy::VfioUser => check_socket(config, export, &mut taken)?,
            ExportBy::NvmeTcp => check_listen(config, export, subsystem, &mut taken)?,
        }
    }
    Ok(())
}

fn check_controllers<'a>(
    config: &Config,
    export: &Export,
    subsystem: &'a Subsystem,
    taken: &mut Taken<'a>,
) -> Result<(), Problem> {
    let by = *export.by.get_ref();
    let name = subsystem.name.get_ref();
    match (&export.controller, &export.controllers) {
        (Some(_), None) => {}
        (None, Some(several)) if !several.is_empty() && by == ExportBy::NvmeTcp => {}
        (None, Some(_)) if by == ExportBy::VfioUser => {
            let help = "write controller = 2, and an [[export]] for each: a vfio-user socket is one function";
            return Err(problem(&export.by, "by vfio-user one controller is exported", help));
        }
        _ => {
            let help = "write controller = 2, or with NVMe/TCP controllers = [2, 3]";
            return Err(problem(&export.subsystem, "an export names its controller, once", help));
        }
    }
    for place in export.controller.iter().chain(export.controllers.iter().flatten()) {
        let cntlid = *place.get_ref();
        let Some(controller) = subsystem.controllers.iter().find(|c| *c.cntlid.get_ref() == cntlid) else {
            let known: Vec<_> = subsystem.controllers.iter().map(|c| c.cntlid.get_ref().to_string()).collect();
            let message = format!("there is no controller {cntlid} in \"{name}\"");
            return Err(problem(place, message, format!("there are: {}", known.join(", "))));
        };
        if !taken.controllers.insert((name, cntlid)) {
            let message = format!("controller {cntlid} of \"{name}\" is exported twice");
            return Err(problem(place, message, "a controller has one client: give the other export a controller of its own"));
        }
        if controller.role == Role::Management && by != ExportBy::VfioUser {
            let message = format!("controller {cntlid} of \"{name}\" is the management controller: it is not exported by NVMe/TCP");
            return Err(problem(&export.by, message, "write by = \"vfio-user\": its socket is for processes of the same user alone"));
        }
        if controller.role == Role::Migratable && name == config.file.migration.to.get_ref() {
            check_destination(config, export, subsystem)?;
        }
    }
    Ok(())
}

/// A controller of the subsystem that `[migration]` moves to has clients of its own only where VM managers move it.
fn check_destination(config: &Config, export: &Export, to: &Subsystem) -> Result<(), Problem> {
    let (name, from) = (to.name.get_ref(), config.file.migration.from.get_ref());
    let wrong = |message: String, help: String| Err(problem(&export.subsystem, message, help));
    let source = config.subsystem(from).into_iter().flat_map(|subsystem| &subsystem.controllers);
    let migratable: Vec<_> = source.filter(|c| c.role == Role::Migratable).map(|c| *c.cntlid.get_ref()).collect();
    let is_it = |other: &&Export| other.subsystem.get_ref() == from && other.cntlids().iter().any(|cntlid| migratable.contains(cntlid));
    let other = config.file.exports.iter().find(is_it);
    let both = [Some(export), other].iter().all(|export| export.is_some_and(|export| *export.by.get_ref() == ExportBy::VfioUser));
    if !both {
        let message = format!(
            "\"{name}\" is what [migration] moves to: its migratable controllers have clients of their own only where VM managers \
             move them, with both ends exported by vfio-user"
        );
        return wrong(message, format!("export those of \"{from}\" alone, whose clients go along, or both by vfio-user"));
    }
    for subsystem in [Some(to), config.subsystem(from)].into_iter().flatten() {
        let migratable = subsystem.controllers.iter().filter(|controller| controller.role == Role::Migratable).count();
        if migratable != 1 {
            let message = format!("\"{}\" has {migratable} migratable controllers, and VM managers move one", subsystem.name.get_ref());
            return wrong(message, format!("do not export \"{name}\", and move them by `dray migrate`"));
        }
    }
    Ok(())
}

/// Keys of the other protocol are a misunderstanding, not something to pass over.
fn check_keys(export: &Export) -> Result<(), Problem> {
    let by = *export.by.get_ref();
    let (place, key, other) = match (by, export) {
        (ExportBy::NvmeTcp, Export { socket: Some(place), .. }) => (place.span(), "socket", "vfio-user"),
        (ExportBy::NvmeTcp, Export { bar0: Some(place), .. }) => (place.span(), "bar0", "vfio-user"),
        (ExportBy::VfioUser, Export { listen: Some(place), .. }) => (place.span(), "listen", "nvme-tcp"),
        (ExportBy::VfioUser, Export { digests: Some(place), .. }) => (place.span(), "digests", "nvme-tcp"),
        (ExportBy::VfioUser, Export { hosts: Some(_), .. }) => (export.by.span(), "hosts", "nvme-tcp"),
        _ => return Ok(()),
    };
    let message = format!("`{key}` is a key of exports by {other}, and this one is by {}", by.name());
    Err(Problem { span: place, message, help: format!("remove it, or write by = \"{other}\"") })
}

fn check_socket(config: &Config, export: &Export, taken: &mut Taken<'_>) -> Result<(), Problem> {
    let place = export.socket.as_ref().map_or(export.subsystem.span(), Spanned::span);
    let wrong = |message: String, help: &str| Problem { span: place.clone(), message, help: help.into() };
    let name = export.subsystem.get_ref();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if export.socket.is_none() && (!name.chars().all(plain) || name.starts_with('.')) {
        return Err(wrong(format!("\"{name}\" makes no file name for a socket"), "add socket = \"…\""));
    }
    let path = export.socket_path(config);
    if path.as_os_str().len() > SOCKET_PATH_BYTES {
        let message = format!("the path {} is longer than the {SOCKET_PATH_BYTES} bytes of a Unix socket's", path.display());
        return Err(wrong(message, "add socket = \"…\" with a shorter one, such as below /run"));
    }
    if !taken.sockets.insert(path) {
        return Err(wrong("two exports have the same socket".into(), "give each export a socket of its own"));
    }
    Ok(())
}

fn check_listen<'a>(
    config: &Config,
    export: &Export,
    subsystem: &'a Subsystem,
    taken: &mut Taken<'a>,
) -> Result<(), Problem> {
    let place = export.listen.as_ref().map_or(export.subsystem.span(), Spanned::span);
    let wrong = |message: String, help: &str| Problem { span: place.clone(), message, help: help.into() };
    let Some(address) = export.address() else {
        let text = export.listen.as_ref().map_or("", |text| text.get_ref());
        let help = "write an IP address and a port, as in \"127.0.0.1:4420\" or \"[::1]:4420\"";
        return Err(wrong(format!("\"{text}\" is no address"), help));
    };
    if address.port() != 0 && !taken.subsystems.insert((address, &subsystem.nqn)) {
        let message = format!("{} is exported twice at {address}", subsystem.nqn);
        return Err(wrong(message, "name all its controllers in one export: controllers = [2, 3]; or listen elsewhere"));
    }
    let hosts = export.hosts.as_deref().unwrap_or_default();
    if hosts.is_empty() {
        let help = "add hosts = [{ nqn = \"nqn.2014-08.org.nvmexpress:uuid:…\" }]; a Linux host has its name in /etc/nvme/hostnqn";
        return Err(problem(&export.subsystem, "nobody may connect: there are no hosts", help));
    }
    check_hosts(config, hosts)
}

fn check_hosts(config: &Config, hosts: &[Host]) -> Result<(), Problem> {
    let mut names = BTreeSet::new();
    for host in hosts {
        let nqn = host.nqn.get_ref();
        if !nqn.starts_with("nqn.") || nqn.len() > NQN_BYTES || nqn.chars().any(|c| c.is_control() || c.is_whitespace()) {
            let help = format!("write \"nqn.\" and what follows, at most {NQN_BYTES} bytes (Base specification, NVMe Qualified Names)");
            return Err(problem(&host.nqn, format!("\"{nqn}\" is no NVMe Qualified Name"), help));
        }
        if !names.insert(nqn) {
            return Err(problem(&host.nqn, format!("the host {nqn} is named twice"), "name it once"));
        }
        if let (Some(path), None) = (&host.controller_secret_file, &host.secret_file) {
            let message = format!("the host {nqn} has a secret of the controllers and none of its own");
            return Err(problem(path, message, "add secret-file = \"…\": controllers authenticate after the host has"));
        }
        for path in [&host.secret_file, &host.controller_secret_file].into_iter().flatten() {
            if config.path(path.get_ref()).is_file() {
                continue;
            }
            let message = format!("the file {} is not there", config.path(path.get_ref()).display());
            return Err(problem(path, message, "make one with `nvme gen-dhchap-key --nqn HOST-NQN > FILE`, readable by its owner alone"));
        }
    }
    Ok(())
}
