//! Controllers before clients: sockets of the configuration, and the servers of `dray-export` behind them. All that the
//! appliance knows of those servers is here.

use super::fronts::Front;
use super::sockets::{listen_tcp, listen_unix};
use crate::assembly::Machine;
use crate::config::Config;
use crate::config::export::{Bar0, DigestChoice, Export, ExportBy};
use crate::random::Urandom;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::slot::Slot;
use dray_device::socket::{Listener, TcpListener, UnixListener};
use dray_export::hooks::MigrationHooks;
use dray_export::nvme_tcp::{AnaGroupConfig, DigestPolicy, ExportedSubsystem, HostAccess, Limits, Target, TargetConfig};
use dray_export::vfio_user::{Bar0Map, PeerPolicy, VfioUserConfig, VfioUserCounters, VfioUserServer};
use dray_nvme::auth::Secret;
use dray_nvme::tcp::AnaState;
use serde_json::{Value, json};
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// Connections taken by one poll.
const ACCEPTS: usize = 4;
/// How often sockets are looked at while there is other work: a look is a system call.
const LOOK_NS: u64 = 1_000_000;

/// Why an export could not be brought up.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub(crate) enum ExportError {
    /// The socket.
    #[error("the export of \"{subsystem}\" cannot listen on {address}: {source}")]
    Listen {
        subsystem: String,
        address: String,
        source: std::io::Error,
    },
    /// The secret.
    #[error("the secret in {} is none: {why}", path.display())]
    #[diagnostic(help("make one with `nvme gen-dhchap-key --nqn HOST-NQN > FILE`"))]
    Secret {
        path: PathBuf,
        why: String,
    },
    /// The target.
    #[error("the NVMe/TCP target at {address}: {why}")]
    Target {
        address: SocketAddr,
        why: String,
    },
    /// The controller has no slot.
    #[error("controller {cntlid} of \"{subsystem}\" cannot be exported")]
    NoSlot {
        subsystem: String,
        cntlid: u16,
    },
    /// The kernel's random numbers.
    #[error("/dev/urandom: {0}")]
    Random(#[from] std::io::Error),
}

/// What an export is called.
#[derive(Clone, Debug)]
pub(super) struct ExportLabel {
    pub(super) subsystem: String,
    pub(super) controllers: Vec<u16>,
    pub(super) by: &'static str,
    pub(super) address: String,
    /// Which server has it, among the core's.
    server: usize,
    note: &'static str,
}

impl fmt::Display for ExportLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let controllers: Vec<_> = self.controllers.iter().map(u16::to_string).collect();
        write!(f, "{}:{} by {} at {}{}", self.subsystem, controllers.join(","), self.by, self.address, self.note)
    }
}

/// What an export counts.
#[derive(Clone, Debug, Default)]
pub(super) struct ExportView {
    pub(super) clients: u64,
    /// Clients among them that have not got through their handshake.
    pub(super) half_open: u64,
    pub(super) counters: Value,
}

/// What a migration means for the controller in a slot: subsystem, CNTLID, slot.
pub(super) type HooksOf<'a> = dyn Fn(&str, u16, &Slot) -> Box<dyn MigrationHooks> + 'a;

/// A socket and the server behind it.
enum Server {
    VfioUser { listener: Option<UnixListener>, path: PathBuf, server: Box<VfioUserServer> },
    NvmeTcp { listener: Option<TcpListener>, address: SocketAddr, target: Box<Target> },
}

/// All exports of a configuration, as the core polls them.
pub(super) struct Exports {
    servers: Vec<Server>,
    /// The server of each export.
    of: Vec<usize>,
    looked: Time,
    closing: bool,
    now: Time,
}

impl Exports {
    /// Binds the sockets and sets the servers up. Exports at one NVMe/TCP address are one target.
    pub(super) fn start(
        config: &Config,
        fronts: &[Front],
        machines: &[Machine],
        hooks: &HooksOf<'_>,
    ) -> Result<(Self, Vec<ExportLabel>), ExportError> {
        let mut exports = Self { servers: Vec::new(), of: Vec::new(), looked: Time(0), closing: false, now: Time(0) };
        let slots = Slots { fronts, machines };
        let mut labels = Vec::new();
        for export in config.file.exports.iter().filter(|export| *export.by.get_ref() == ExportBy::VfioUser) {
            labels.push(exports.vfio_user(config, export, &slots, hooks)?);
        }
        let mut targets: Vec<(SocketAddr, Vec<&Export>)> = Vec::new();
        for export in config.file.exports.iter().filter(|export| *export.by.get_ref() == ExportBy::NvmeTcp) {
            let Some(address) = export.address() else { continue };
            match targets.iter_mut().find(|(of, _)| *of == address && address.port() != 0) {
                Some((_, those)) => those.push(export),
                None => targets.push((address, vec![export])),
            }
        }
        for (address, those) in targets {
            labels.extend(exports.nvme_tcp(config, address, &those, &slots)?);
        }
        exports.of = labels.iter().map(|label| label.server).collect();
        Ok((exports, labels))
    }

    fn vfio_user(
        &mut self,
        config: &Config,
        export: &Export,
        slots: &Slots<'_>,
        hooks: &HooksOf<'_>,
    ) -> Result<ExportLabel, ExportError> {
        let subsystem = export.subsystem.get_ref().clone();
        let cntlid = export.cntlids().first().copied().unwrap_or(0);
        let no_slot = || ExportError::NoSlot { subsystem: subsystem.clone(), cntlid };
        let (slot, vectors, is_management) = slots.of(&subsystem, cntlid).ok_or_else(no_slot)?;
        let path = export.socket_path(config);
        let address = path.display().to_string();
        let listener = listen_unix(&path);
        let listener = listener.map_err(|source| ExportError::Listen { subsystem: subsystem.clone(), address: address.clone(), source })?;
        let setup = VfioUserConfig {
            bar0: match export.bar0.as_ref().map(|bar0| *bar0.get_ref()).unwrap_or_default() {
                Bar0::Doorbells => Bar0Map::Doorbells,
                Bar0::Whole => Bar0Map::Whole,
                Bar0::Trapped => Bar0Map::None,
            },
            vectors,
            allow: if is_management { PeerPolicy::SameUser } else { PeerPolicy::Any },
            ..VfioUserConfig::default()
        };
        let hooks = hooks(&subsystem, cntlid, &slot);
        let moves = hooks.ways() != 0;
        let server = Box::new(VfioUserServer::new(slot, setup, hooks));
        self.servers.push(Server::VfioUser { listener: Some(listener), path, server });
        let note = match (is_management, moves) {
            (true, _) => " (the management controller: the appliance does not drive it itself)",
            (false, true) => " (its VM manager moves it)",
            (false, false) => "",
        };
        let by = ExportBy::VfioUser.name();
        Ok(ExportLabel { subsystem, controllers: vec![cntlid], by, address, server: self.servers.len() - 1, note })
    }

    fn nvme_tcp(
        &mut self,
        config: &Config,
        address: SocketAddr,
        exports: &[&Export],
        slots: &Slots<'_>,
    ) -> Result<Vec<ExportLabel>, ExportError> {
        let mut subsystems = Vec::new();
        for export in exports {
            subsystems.push(exported(config, export, slots)?);
        }
        let first = exports.first().map(|export| export.subsystem.get_ref().clone()).unwrap_or_default();
        let wanted = address.to_string();
        let bound = listen_tcp(address).map_err(|source| ExportError::Listen { subsystem: first, address: wanted, source });
        let (listener, address) = bound?;
        let random = Box::new(Urandom::open()?);
        let setup = TargetConfig { subsystems, discovery: true, limits: Limits::default(), dh_groups: Vec::new(), random };
        let target = Target::new(setup).map_err(|error| ExportError::Target { address, why: error.to_string() })?;
        self.servers.push(Server::NvmeTcp { listener: Some(listener), address, target: Box::new(target) });
        let server = self.servers.len() - 1;
        let label = |export: &&Export| {
            let open = export.hosts.iter().flatten().any(|host| host.secret_file.is_none());
            let note = if open && !address.ip().is_loopback() { " (hosts without a secret: whoever knows their name gets in)" } else { "" };
            let (subsystem, controllers) = (export.subsystem.get_ref().clone(), export.cntlids());
            ExportLabel { subsystem, controllers, by: ExportBy::NvmeTcp.name(), address: address.to_string(), server, note }
        };
        Ok(exports.iter().map(label).collect())
    }

    /// What each export counts, in the order of the labels.
    pub(super) fn view(&self) -> Vec<ExportView> {
        self.of.iter().filter_map(|server| self.servers.get(*server)).map(Server::view).collect()
    }

    /// Takes nobody in any more.
    pub(super) fn stop_accepting(&mut self) {
        self.servers.iter_mut().for_each(Server::stop_accepting);
    }

    /// Disconnects clients once they have what was answered.
    pub(super) fn close(&mut self) {
        self.closing = true;
        for server in &mut self.servers {
            match server {
                Server::VfioUser { server, .. } => server.detach(self.now),
                Server::NvmeTcp { target, .. } => target.drain(),
            }
        }
    }

    /// Whether all are gone.
    pub(super) fn is_drained(&self) -> bool {
        self.closing && self.servers.iter().all(Server::is_idle)
    }
}

impl Server {
    fn view(&self) -> ExportView {
        match self {
            Self::VfioUser { server, .. } => {
                let (clients, half_open) = (server.is_attached().into(), server.is_half_open().into());
                ExportView { clients, half_open, counters: counted(&server.counters()) }
            }
            Self::NvmeTcp { target, .. } => {
                let (clients, half_open) = (target.connections() as u64, target.half_open() as u64);
                ExportView { clients, half_open, counters: json!(target.counters()) }
            }
        }
    }

    fn stop_accepting(&mut self) {
        match self {
            Self::VfioUser { listener, path, .. } => {
                if listener.take().is_some() {
                    let _gone = std::fs::remove_file(path);
                }
            }
            Self::NvmeTcp { listener, .. } => *listener = None,
        }
    }

    fn is_idle(&self) -> bool {
        match self {
            Self::VfioUser { server, .. } => server.is_idle(),
            Self::NvmeTcp { target, .. } => target.is_idle(),
        }
    }

    /// Takes those in who wait.
    fn accept(&mut self) -> u32 {
        let mut taken = 0;
        let failed = |error: std::io::Error| tracing::warn!(%error, "a connection could not be taken");
        for _ in 0..ACCEPTS {
            match self {
                Self::VfioUser { listener: Some(listener), path, server } => match listener.accept() {
                    Ok(Some(stream)) => {
                        if let Err(error) = server.attach(Box::new(stream)) {
                            // Counted; whoever connects must not be able to fill the log.
                            tracing::debug!(%error, socket = %path.display(), "a client is not served");
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        failed(error);
                        break;
                    }
                },
                Self::NvmeTcp { listener: Some(listener), address, target } => match listener.accept() {
                    Ok(Some(stream)) => target.accept(Box::new(stream), *address),
                    Ok(None) => break,
                    Err(error) => {
                        failed(error);
                        break;
                    }
                },
                _ => break,
            }
            taken += 1;
        }
        taken
    }
}

impl Exports {
    /// Whether a client rings doorbells that wake nobody.
    pub(super) fn polls_memory(&self) -> bool {
        self.servers.iter().any(|server| matches!(server, Server::VfioUser { server, .. } if server.polls_doorbells()))
    }
}

impl Poll for Exports {
    fn poll(&mut self, now: Time) -> Progress {
        self.now = now;
        let mut progress = Progress::IDLE;
        if self.servers.is_empty() {
            return progress;
        }
        if now.ns_since(self.looked) >= LOOK_NS {
            self.looked = now;
            progress.work = self.servers.iter_mut().map(Server::accept).sum();
        }
        for server in &mut self.servers {
            progress = progress.and(match server {
                Server::VfioUser { server, .. } => server.poll(now),
                Server::NvmeTcp { target, .. } => target.poll(now),
            });
        }
        if progress.work > 0 { Progress { next: Next::Now, ..progress } } else { progress }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        for server in &self.servers {
            let listener = match server {
                Server::VfioUser { listener, server, .. } => {
                    server.wakers(visit);
                    listener.as_ref().and_then(Listener::waker)
                }
                Server::NvmeTcp { listener, target, .. } => {
                    target.wakers(visit);
                    listener.as_ref().and_then(Listener::waker)
                }
            };
            listener.into_iter().for_each(&mut *visit);
        }
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        self.stop_accepting();
    }
}

/// The slots that can be exported.
struct Slots<'a> {
    fronts: &'a [Front],
    machines: &'a [Machine],
}

impl Slots<'_> {
    /// The slot before a controller, its vectors, and whether that is the management controller.
    fn of(&self, subsystem: &str, cntlid: u16) -> Option<(Slot, u16, bool)> {
        let front = self.fronts.iter().find(|front| front.subsystem == subsystem && front.cntlid == cntlid);
        if let Some(front) = front {
            return Some((front.slot.clone(), front.vectors, false));
        }
        let machine = self.machines.iter().find(|machine| machine.name == subsystem)?;
        let (management, slot) = &machine.management;
        (*management == cntlid).then(|| (slot.clone(), 0, true))
    }
}

/// A subsystem as the target exports it.
fn exported(config: &Config, export: &Export, slots: &Slots<'_>) -> Result<ExportedSubsystem, ExportError> {
    let name = export.subsystem.get_ref();
    let mut controllers = Vec::new();
    for cntlid in export.cntlids() {
        let no_slot = || ExportError::NoSlot { subsystem: name.clone(), cntlid };
        controllers.push((cntlid, slots.of(name, cntlid).ok_or_else(no_slot)?.0));
    }
    let mut allowed_hosts = Vec::new();
    for host in export.hosts.iter().flatten() {
        let read = |path: &Option<toml::Spanned<PathBuf>>| {
            path.as_ref().map(|path| secret(&config.path(path.get_ref()))).transpose()
        };
        let controller_secret = read(&host.controller_secret_file)?;
        let secret = read(&host.secret_file)?;
        allowed_hosts.push(HostAccess { nqn: host.nqn.get_ref().clone(), secret, controller_secret });
    }
    let file = config.subsystem(name);
    let nqn = file.map(|file| file.nqn.clone()).unwrap_or_default();
    let mut nsids: Vec<_> = file.iter().flat_map(|file| &file.namespaces).map(|namespace| *namespace.nsid.get_ref()).collect();
    nsids.sort_unstable();
    // One group for all: another appliance says of its own that they are not reached there.
    let ana_groups = vec![AnaGroupConfig { id: 1, nsids, state: AnaState::OPTIMIZED }];
    let digests = match export.digests.as_ref().map(|digests| *digests.get_ref()).unwrap_or_default() {
        DigestChoice::AsAsked => DigestPolicy::AsAsked,
        DigestChoice::Required => DigestPolicy::Required,
    };
    // The controller's own serial number is the subsystem's.
    Ok(ExportedSubsystem { nqn, serial: String::new(), allowed_hosts, allow_any_host: false, digests, controllers, ana_groups })
}

pub(crate) fn secret(path: &Path) -> Result<Secret, ExportError> {
    let wrong = |why: String| ExportError::Secret { path: path.to_path_buf(), why };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    Secret::parse(text.trim()).map_err(|error| wrong(error.to_string()))
}

fn counted(c: &VfioUserCounters) -> Value {
    json!({
        "clients": c.clients, "refused_busy": c.refused_busy, "refused_peers": c.refused_peers, "left": c.left,
        "broken_protocol": c.broken_protocol, "handshake_timeouts": c.handshake_timeouts, "broken_memory": c.broken_memory,
        "requests": c.requests, "refused": c.refused, "stray_fds": c.stray_fds, "maps": c.maps, "unusable_maps": c.unusable_maps, "unmaps": c.unmaps, "resets": c.resets,
    })
}
