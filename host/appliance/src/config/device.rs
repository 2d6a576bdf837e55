//! `[[device]]`: controllers that are not ours, whose namespaces are backings of our own: drives of this machine, by VFIO or by its
//! kernel's driver, controllers of other machines, by NVMe/TCP, and of other processes, by vfio-user.

use super::check::{Problem, problem};
use super::{BackingKind, Config, Namespace};
use dray_device::pci::PciAddress;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use toml::Spanned;

/// A controller, reached in one of four ways.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Device {
    /// What the rest of the file calls it.
    pub name: Spanned<String>,
    /// A PCI function, owned through VFIO: its address, as in "0000:01:00.0".
    pub pci: Option<Spanned<String>>,
    /// A controller that the kernel owns, by io_uring passthrough: its character device, as in "/dev/nvme0".
    pub passthru: Option<Spanned<PathBuf>>,
    /// A controller of another machine: address and port.
    pub nvme_tcp: Option<Spanned<String>>,
    /// A controller that another process has behind a vfio-user socket.
    pub vfio_user: Option<Spanned<PathBuf>>,
    /// VFIO and vfio-user: opened at start and kept until the end, also where no namespace of it is served: others drive
    /// controllers that this one manages.
    pub hold: Option<Spanned<bool>>,
    /// VFIO: the secret that a physical function shares with whoever has its virtual functions: a UUID.
    pub vf_token: Option<Spanned<String>>,
    /// VFIO: virtual functions that are made at start, given queues and interrupts, brought online, and given to vfio-pci, and that
    /// go at the end. The device is held then.
    pub virtual_functions: Option<Spanned<NonZeroU16>>,
    /// VFIO: take the function from the kernel's driver at start, if nothing on it is in use, and give it back at the end.
    pub bind: Option<Spanned<bool>>,
    /// VFIO: which interface of the kernel maps memory for the function.
    pub iommu: Option<Spanned<Iommu>>,
    /// VFIO: functions that say the same share one I/O address space.
    pub space: Option<Spanned<String>>,
    /// NVMe/TCP: the subsystem's NQN.
    pub nqn: Option<Spanned<String>>,
    /// NVMe/TCP: the name of this host.
    pub host_nqn: Option<Spanned<String>>,
    /// NVMe/TCP: digests (CRC-32C) on all connections; true without it.
    pub digests: Option<Spanned<bool>>,
    /// NVMe/TCP: the file with this host's secret, where the subsystem wants hosts to authenticate themselves.
    pub secret_file: Option<Spanned<PathBuf>>,
    /// NVMe/TCP: the file with the controller's secret; the subsystem must authenticate itself then.
    pub controller_secret_file: Option<Spanned<PathBuf>>,
}

/// Which interface of the kernel maps memory for a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Iommu {
    /// iommufd where the kernel has it, else a type 1 container.
    #[default]
    Auto,
    /// iommufd.
    Iommufd,
    /// A container with the type 1 IOMMU.
    Type1,
    /// None: the function reaches all of the machine's memory.
    UnsafeNone,
}

/// How a device is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through VFIO.
    Pci(PciAddress),
    /// By io_uring passthrough.
    Passthru(PathBuf),
    /// By NVMe/TCP.
    NvmeTcp(SocketAddr),
    /// By vfio-user.
    VfioUser(PathBuf),
}

impl Device {
    /// How it is reached; `None` unless exactly one way is named and makes sense.
    #[must_use]
    pub fn way(&self) -> Option<Way> {
        match (&self.pci, &self.passthru, &self.nvme_tcp, &self.vfio_user) {
            (Some(address), None, None, None) => address.get_ref().parse().ok().map(Way::Pci),
            (None, Some(path), None, None) => Some(Way::Passthru(path.get_ref().clone())),
            (None, None, Some(address), None) => address.get_ref().parse().ok().map(Way::NvmeTcp),
            (None, None, None, Some(path)) => Some(Way::VfioUser(path.get_ref().clone())),
            _ => None,
        }
    }

    /// Whether it is opened at start and kept until the end, whoever uses it.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.virtual_functions.is_some() || self.hold.as_ref().is_some_and(|hold| *hold.get_ref())
    }

    /// The way's key and value, for people.
    #[must_use]
    pub fn place(&self) -> String {
        match self.way() {
            Some(Way::Pci(address)) => format!("pci {address}"),
            Some(Way::Passthru(path)) => format!("passthru {}", path.display()),
            Some(Way::NvmeTcp(address)) => format!("nvme-tcp {address}"),
            Some(Way::VfioUser(path)) => format!("vfio-user {}", path.display()),
            None => "nowhere".into(),
        }
    }
}

/// Reads a UUID; hyphens may be anywhere.
#[must_use]
pub fn uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let fits = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)).flatten()
}

/// What records and people call a namespace of a device: `device:NAME/NSID`.
#[must_use]
pub fn name_of(device: &str, nsid: u32) -> String {
    format!("device:{device}/{nsid}")
}

/// The device and the NSID of such a name.
#[must_use]
pub fn parse_name(name: &str) -> Option<(&str, u32)> {
    let (device, nsid) = name.strip_prefix("device:")?.rsplit_once('/')?;
    Some((device, nsid.parse().ok().filter(|&nsid| nsid > 0)?))
}

impl Namespace {
    /// The device and the NSID there of a namespace that is a device's.
    #[must_use]
    pub fn at_device(&self) -> Option<(&str, u32)> {
        let device = self.device.as_ref().filter(|_| self.backing == BackingKind::Device)?;
        Some((device.get_ref(), self.device_nsid.as_ref().map_or(1, |nsid| *nsid.get_ref())))
    }
}

impl Config {
    /// The device of that name.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.file.devices.iter().find(|device| device.name.get_ref() == name)
    }
}

pub(super) fn check(config: &Config) -> Result<(), Problem> {
    let (mut names, mut places) = (BTreeSet::new(), BTreeSet::new());
    for device in &config.file.devices {
        let name = device.name.get_ref();
        if name.is_empty() || name.contains('/') || !names.insert(name) {
            let message = format!("\"{name}\" is used twice, empty, or has a `/`");
            return Err(problem(&device.name, message, "give each device a name of its own"));
        }
        check_way(device)?;
        check_keys(device)?;
        check_functions(device)?;
        let way = [&device.nqn.as_ref().map(|nqn| nqn.get_ref().as_str()).unwrap_or_default(), device.place().as_str()].concat();
        if !places.insert(way) {
            let message = format!("another device is at {} as well", device.place());
            return Err(problem(&device.name, message, "name it once: several namespaces may be of one device"));
        }
    }
    Ok(())
}

fn check_way(device: &Device) -> Result<(), Problem> {
    const HELP: &str = "write one of pci = \"0000:01:00.0\", passthru = \"/dev/nvme0\", nvme-tcp = \"10.0.0.2:4420\" and \
                        vfio-user = \"drive.sock\"";
    let ways = [device.pci.is_some(), device.passthru.is_some(), device.nvme_tcp.is_some(), device.vfio_user.is_some()];
    let ways = ways.into_iter().filter(|named| *named).count();
    if ways != 1 {
        let message = format!("a device is reached in one way, and \"{}\" names {ways}", device.name.get_ref());
        return Err(problem(&device.name, message, HELP));
    }
    if let Some(address) = &device.pci
        && let Err(error) = address.get_ref().parse::<PciAddress>()
    {
        let message = format!("\"{}\": {error}", address.get_ref());
        return Err(problem(address, message, "write domain, bus, device and function, as `dray device list` shows them: \"0000:01:00.0\""));
    }
    if let Some(token) = &device.vf_token
        && uuid(token.get_ref()).is_none()
    {
        let message = format!("\"{}\" is no UUID", token.get_ref());
        return Err(problem(token, message, "write 32 hexadecimal digits, like 83f69257-0c9b-4b4f-a3e9-b4bb1d3c2a55"));
    }
    if let Some(path) = &device.passthru
        && !path.get_ref().is_absolute()
    {
        let message = format!("{} is no character device of a controller", path.get_ref().display());
        return Err(problem(path, message, "write it as \"/dev/nvme0\""));
    }
    if let Some(address) = &device.nvme_tcp {
        if address.get_ref().parse::<SocketAddr>().is_err() {
            let message = format!("\"{}\" is no address with a port", address.get_ref());
            return Err(problem(address, message, "write it as \"10.0.0.2:4420\" or \"[2001:db8::2]:4420\""));
        }
        for (key, nqn) in [("nqn", &device.nqn), ("host-nqn", &device.host_nqn)] {
            if !nqn.as_ref().is_some_and(|nqn| nqn.get_ref().starts_with("nqn.") && nqn.get_ref().len() <= 223) {
                let place = nqn.as_ref().map_or_else(|| device.name.span(), Spanned::span);
                let message = format!("a device by NVMe/TCP needs {key}, which begins with \"nqn.\" and has at most 223 bytes");
                let help = format!("add {key} = \"nqn.2014-08.org.nvmexpress:uuid:…\"");
                return Err(Problem { span: place, message, help });
            }
        }
        if device.controller_secret_file.is_some() && device.secret_file.is_none() {
            let message = "a controller's secret needs one of the host";
            return Err(problem(&device.name, message, "add secret-file = \"…\""));
        }
    }
    Ok(())
}

fn check_functions(device: &Device) -> Result<(), Problem> {
    if let Some(functions) = &device.virtual_functions {
        if device.vf_token.is_none() {
            let message = "virtual functions open only for who knows their physical function's VF token";
            return Err(problem(functions, message, "add vf-token = \"83f69257-…\", a UUID of your own (uuidgen makes one)"));
        }
        if let Some(hold) = device.hold.as_ref().filter(|hold| !hold.get_ref()) {
            return Err(problem(hold, "a device with virtual functions is held", "remove it, or `virtual-functions`"));
        }
    }
    Ok(())
}

/// Keys of another way are a misunderstanding, not something to pass over.
fn check_keys(device: &Device) -> Result<(), Problem> {
    let of_pci = [
        ("bind", device.bind.as_ref().map(Spanned::span)),
        ("iommu", device.iommu.as_ref().map(Spanned::span)),
        ("space", device.space.as_ref().map(Spanned::span)),
        ("vf-token", device.vf_token.as_ref().map(Spanned::span)),
        ("virtual-functions", device.virtual_functions.as_ref().map(Spanned::span)),
    ];
    let of_function = [("hold", device.hold.as_ref().map(Spanned::span))];
    let of_tcp = [
        ("nqn", device.nqn.as_ref().map(Spanned::span)),
        ("host-nqn", device.host_nqn.as_ref().map(Spanned::span)),
        ("digests", device.digests.as_ref().map(Spanned::span)),
        ("secret-file", device.secret_file.as_ref().map(Spanned::span)),
        ("controller-secret-file", device.controller_secret_file.as_ref().map(Spanned::span)),
    ];
    let has = [
        (&of_pci[..], "pci", device.pci.is_some()),
        (&of_function, "pci or vfio-user", device.pci.is_some() || device.vfio_user.is_some()),
        (&of_tcp, "nvme-tcp", device.nvme_tcp.is_some()),
    ];
    let foreign = has.into_iter().filter(|(.., has)| !has);
    let wrong = foreign.flat_map(|(keys, way, _)| keys.iter().filter_map(move |(key, span)| Some((*key, span.clone()?, way)))).next();
    let Some((key, span, way)) = wrong else { return Ok(()) };
    let message = format!("`{key}` is a key of devices by {way}, and \"{}\" is none", device.name.get_ref());
    Err(Problem { span, message, help: "remove it".into() })
}

/// What a namespace says of its device. `owner` is how it is called; `taken`: what other namespaces have.
pub(super) fn check_namespace(
    config: &Config,
    namespace: &Namespace,
    owner: &str,
    taken: &mut std::collections::BTreeMap<PathBuf, String>,
) -> Result<(), Problem> {
    let Some(device) = &namespace.device else {
        return Err(problem(&namespace.nsid, "a namespace of a device names it", "add device = \"…\", a [[device]]'s name"));
    };
    let Some((name, nsid)) = namespace.at_device() else { return Ok(()) };
    if config.device(name).is_none() {
        let known: Vec<_> = config.file.devices.iter().map(|d| d.name.get_ref().as_str()).collect();
        let help = if known.is_empty() { "add a [[device]]".to_owned() } else { format!("there are: {}", known.join(", ")) };
        return Err(problem(device, format!("there is no device \"{name}\""), help));
    }
    if nsid == 0 || nsid == u32::MAX {
        let place = namespace.device_nsid.as_ref().map_or_else(|| device.span(), Spanned::span);
        return Err(Problem { span: place, message: format!("{nsid} is no NSID"), help: "write the device's, from 1".into() });
    }
    let other = match (&namespace.path, &namespace.size) {
        (Some(path), _) => Some((path.span(), "path")),
        (_, Some(size)) => Some((size.span(), "size")),
        _ => None,
    };
    if let Some((span, key)) = other {
        let message = format!("a namespace of a device has no {key}: the device's counts");
        return Err(Problem { span, message, help: format!("remove {key}") });
    }
    if let Some(first) = taken.insert(PathBuf::from(name_of(name, nsid)), owner.to_owned()) {
        let message = format!("namespace {nsid} of device \"{name}\" lies over the same bytes as {first}");
        return Err(problem(device, message, "give each namespace blocks of its own"));
    }
    Ok(())
}
