//! `[image]`: what the bootable image does with the machine that it is booted on. `dray run` outside the image passes over it.
//!
//! ```toml
//! [image]
//! hostname = "dray-1"            # "dray" without it
//! # One link has an address. `link` is a name ("eth0"), a MAC address, or "first" (the default): the first Ethernet link.
//! network = { dhcp = true }      # the default; or:
//! # network = { link = "52:54:00:12:34:56", address = "10.0.2.15/24", gateway = "10.0.2.2", dns = ["10.0.2.3"], mtu = 9000 }
//! hugepages = "512MiB"           # set aside at start, in pages of 2 MiB; none without it
//! ntp = "10.0.2.2"               # a time server, NAME or ADDRESS, with :PORT if it is not 123; else what DHCP names
//! watchdog = "30s"               # the machine is reset if PID 1 or the appliance does not answer for so long; off without it
//! console = "ttyS1"              # a serial line that takes dray commands, a line each; none without it
//! status = "0.0.0.0:4480"        # the status page (HTTP, read-only); "off" for none
//! log-size = "8MiB"              # what the log on the state partition takes at most
//! modules = ["net", "vfio"]      # sets of kernel modules, in this order (net first); all that the image has without it
//! ```

use super::check::{Problem, problem};
use super::units::{Size, Span};
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use toml::Spanned;

/// Bytes of a huge page.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Where the status page is unless the configuration says otherwise.
pub const DEFAULT_STATUS: &str = "0.0.0.0:4480";
/// What the log takes at most unless the configuration says otherwise.
pub const DEFAULT_LOG_BYTES: u64 = 8 << 20;
/// Most characters of a host name (`HOST_NAME_MAX`).
const HOST_NAME_CHARS: usize = 64;
/// Most name servers that the C library asks (`MAXNS`).
const NAME_SERVERS: usize = 3;
/// The port of NTP.
const NTP_PORT: u16 = 123;

/// What the image does with the machine.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Image {
    /// The host's name.
    pub hostname: Option<Spanned<String>>,
    /// The link that has an address, and which; DHCP on the first link without it.
    pub network: Option<Spanned<Network>>,
    /// Bytes set aside as huge pages.
    pub hugepages: Option<Spanned<Size>>,
    /// A time server.
    pub ntp: Option<Spanned<String>>,
    /// After how long without an answer the machine is reset.
    pub watchdog: Option<Spanned<Span>>,
    /// The serial line that takes commands.
    pub console: Option<Spanned<String>>,
    /// Where the status page is.
    pub status: Option<Spanned<String>>,
    /// What the log on the state partition takes at most.
    pub log_size: Option<Spanned<Size>>,
    /// Sets of kernel modules.
    pub modules: Option<Vec<Spanned<String>>>,
}

/// How the appliance is reached.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Network {
    /// The link: a name, a MAC address, or "first".
    pub link: Option<Spanned<String>>,
    /// Ask a DHCP server.
    pub dhcp: bool,
    /// An address with its prefix length.
    pub address: Option<Spanned<String>>,
    /// The default router.
    pub gateway: Option<Spanned<String>>,
    /// Name servers.
    pub dns: Vec<Spanned<String>>,
    /// Bytes of the largest packet; the driver's default without it.
    pub mtu: Option<Spanned<u32>>,
}

/// Which link is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkChoice {
    /// The Ethernet link with the lowest index.
    First,
    /// The one with this name.
    Name(String),
    /// The one with this MAC address.
    Mac([u8; 6]),
}

/// An address and how many of its bits are the network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// The prefix length in bits.
    pub prefix: u8,
}

/// A checked `network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPlan {
    /// The link.
    pub link: LinkChoice,
    /// Its address; `None` asks a DHCP server.
    pub address: Option<Cidr>,
    /// The default router.
    pub gateway: Option<IpAddr>,
    /// Name servers; in front of those that a DHCP server names.
    pub dns: Vec<IpAddr>,
    /// Bytes of the largest packet.
    pub mtu: Option<u32>,
}

impl Default for NetworkPlan {
    fn default() -> Self {
        Self { link: LinkChoice::First, address: None, gateway: None, dns: Vec::new(), mtu: None }
    }
}

impl Cidr {
    /// Reads `ADDRESS/PREFIX`; `None` if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
        let most = if address.is_ipv4() { 32 } else { 128 };
        (1..=most).contains(&prefix).then_some(Self { address, prefix })
    }

    /// Whether another address is in the same network.
    #[must_use]
    pub fn holds(&self, other: IpAddr) -> bool {
        let prefix = u32::from(self.prefix);
        match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
            _ => false,
        }
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl LinkChoice {
    fn parse(text: &str) -> Option<Self> {
        if text == "first" {
            return Some(Self::First);
        }
        if text.contains(':') {
            let mut mac = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut mac {
                let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            return parts.next().is_none().then_some(Self::Mac(mac));
        }
        // IFNAMSIZ with its terminating zero, and what the kernel takes as a name.
        let plain = !text.is_empty() && text.len() < 16 && !matches!(text, "." | "..");
        let plain = plain && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        plain.then(|| Self::Name(text.into()))
    }
}

impl std::fmt::Display for LinkChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::First => f.write_str("the first Ethernet link"),
            Self::Name(name) => write!(f, "the link {name}"),
            Self::Mac(mac) => {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                write!(f, "the link with the MAC address {mac}")
            }
        }
    }
}

impl Image {
    /// What of a configuration that is wrong elsewhere can be relied on: `[image]`, if that is right by itself.
    #[must_use]
    pub fn salvage(text: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Part {
            image: Option<Image>,
        }
        let image = toml::from_str::<Part>(text).ok()?.image?;
        check(&image).is_ok().then_some(image)
    }

    /// How the appliance is reached.
    #[must_use]
    pub fn network_plan(&self) -> NetworkPlan {
        let Some(network) = self.network.as_ref().map(Spanned::get_ref) else { return NetworkPlan::default() };
        let ip = |text: &Spanned<String>| text.get_ref().parse().ok();
        NetworkPlan {
            link: network.link.as_ref().and_then(|link| LinkChoice::parse(link.get_ref())).unwrap_or(LinkChoice::First),
            address: network.address.as_ref().and_then(|address| Cidr::parse(address.get_ref())),
            gateway: network.gateway.as_ref().and_then(ip),
            dns: network.dns.iter().filter_map(ip).collect(),
            mtu: network.mtu.as_ref().map(|mtu| *mtu.get_ref()),
        }
    }

    /// The host's name.
    #[must_use]
    pub fn host_name(&self) -> &str {
        self.hostname.as_ref().map_or("dray", |name| name.get_ref())
    }

    /// Where the status page is; `None` for none.
    #[must_use]
    pub fn status_address(&self) -> Option<SocketAddr> {
        self.status.as_ref().map_or(DEFAULT_STATUS, |text| text.get_ref()).parse().ok()
    }

    /// What the log on the state partition takes at most, in bytes.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.log_size.as_ref().map_or(DEFAULT_LOG_BYTES, |size| size.get_ref().0)
    }

    /// The time server: name or address, and port.
    #[must_use]
    pub fn time_server(&self) -> Option<(String, u16)> {
        time_server(self.ntp.as_ref()?.get_ref())
    }

    /// After how long without an answer the machine is reset.
    #[must_use]
    pub fn watchdog_time(&self) -> Option<Duration> {
        self.watchdog.as_ref().map(|time| time.get_ref().0)
    }
}

/// Name or address, and port, of a time server.
fn time_server(text: &str) -> Option<(String, u16)> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some((address.to_string(), NTP_PORT));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some((address.ip().to_string(), address.port()));
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, port.parse().ok().filter(|port| *port != 0)?),
        None => (text, NTP_PORT),
    };
    is_host_name(name, 253).then(|| (name.into(), port))
}

/// Labels of letters, digits and hyphens, with dots between them (RFC 1123 §2.1).
fn is_host_name(text: &str, most: usize) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= most && text.split('.').all(label)
}

pub(super) fn check(image: &Image) -> Result<(), Problem> {
    if let Some(name) = image.hostname.as_ref().filter(|name| !is_host_name(name.get_ref(), HOST_NAME_CHARS)) {
        let help = format!("write letters, digits, hyphens and dots, at most {HOST_NAME_CHARS} characters");
        return Err(problem(name, format!("\"{}\" is no host name", name.get_ref()), help));
    }
    if let Some(network) = &image.network {
        check_network(network)?;
    }
    check_amounts(image)?;
    if let Some(server) = image.ntp.as_ref().filter(|text| time_server(text.get_ref()).is_none()) {
        let help = "write a name or an address, as in \"10.0.2.2\" or \"time.example.org:1123\"";
        return Err(problem(server, format!("\"{}\" is no time server", server.get_ref()), help));
    }
    let is_line = |text: &str| (1..32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric());
    if let Some(console) = image.console.as_ref().filter(|text| !is_line(text.get_ref())) {
        let message = format!("\"{}\" is no serial line", console.get_ref());
        return Err(problem(console, message, "write its name below /dev, as in \"ttyS1\" or \"hvc0\""));
    }
    let is_address = |text: &str| text == "off" || text.parse::<SocketAddr>().is_ok();
    if let Some(status) = image.status.as_ref().filter(|text| !is_address(text.get_ref())) {
        let help = "write an IP address and a port, as in \"0.0.0.0:4480\", or \"off\"";
        return Err(problem(status, format!("\"{}\" is no address", status.get_ref()), help));
    }
    let is_set = |text: &str| (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if let Some(set) = image.modules.iter().flatten().find(|text| !is_set(text.get_ref())) {
        let message = format!("\"{}\" is no set of kernel modules", set.get_ref());
        return Err(problem(set, message, "name sets of the image, as in [\"net\", \"vfio\"]; `dray image status` lists them"));
    }
    Ok(())
}

fn check_amounts(image: &Image) -> Result<(), Problem> {
    let odd = |size: &Spanned<Size>| size.get_ref().0 == 0 || !size.get_ref().0.is_multiple_of(HUGE_PAGE_BYTES);
    if let Some(size) = image.hugepages.as_ref().filter(|size| odd(size)) {
        let message = format!("{} is not a whole number of huge pages", size.get_ref());
        return Err(problem(size, message, "write a multiple of 2 MiB, as in \"512MiB\""));
    }
    let unfit = |time: &Spanned<Span>| !(Duration::from_secs(5)..=Duration::from_secs(600)).contains(&time.get_ref().0);
    if let Some(time) = image.watchdog.as_ref().filter(|time| unfit(time)) {
        let message = format!("a watchdog of {} is not offered", time.get_ref());
        return Err(problem(time, message, "write 5 s to 10 min, as in \"30s\""));
    }
    let unfit = |size: &Spanned<Size>| !(128 << 10..=1 << 30).contains(&size.get_ref().0);
    if let Some(size) = image.log_size.as_ref().filter(|size| unfit(size)) {
        let message = format!("a log of {} is not kept", size.get_ref());
        return Err(problem(size, message, "write 128 KiB to 1 GiB, as in \"8MiB\""));
    }
    Ok(())
}

fn check_network(place: &Spanned<Network>) -> Result<(), Problem> {
    let network = place.get_ref();
    if let Some(link) = network.link.as_ref().filter(|link| LinkChoice::parse(link.get_ref()).is_none()) {
        let help = "write a name (\"eth0\"), a MAC address (\"52:54:00:12:34:56\") or \"first\"";
        return Err(problem(link, format!("\"{}\" is no link", link.get_ref()), help));
    }
    let cidr = match (&network.address, network.dhcp) {
        (None, true) => None,
        (Some(address), false) => {
            let help = "write an address with its prefix length, as in \"10.0.2.15/24\"";
            let wrong = || problem(address, format!("\"{}\" is no address of a link", address.get_ref()), help);
            Some(Cidr::parse(address.get_ref()).ok_or_else(wrong)?)
        }
        (Some(address), true) => {
            return Err(problem(address, "a link has an address or asks a DHCP server", "remove address, or dhcp = true"));
        }
        (None, false) => {
            let help = "write dhcp = true, or address = \"10.0.2.15/24\"";
            return Err(problem(place, "the network has neither an address nor DHCP", help));
        }
    };
    if let Some(gateway) = &network.gateway {
        let text = gateway.get_ref();
        let Some(cidr) = cidr else {
            return Err(problem(gateway, "the DHCP server names the router", "remove gateway, or write an address of your own"));
        };
        let router = text.parse().ok().filter(|router| cidr.holds(*router) && *router != cidr.address);
        if router.is_none() {
            let message = format!("\"{text}\" is no router of {cidr}");
            return Err(problem(gateway, message, "write another address of the same network, as in \"10.0.2.2\""));
        }
    }
    if let Some(server) = network.dns.iter().find(|text| text.get_ref().parse::<IpAddr>().is_err()) {
        return Err(problem(server, format!("\"{}\" is no address of a name server", server.get_ref()), "write an IP address"));
    }
    if let Some(server) = network.dns.get(NAME_SERVERS) {
        return Err(problem(server, format!("more than {NAME_SERVERS} name servers are not asked"), "remove the last ones"));
    }
    if let Some(mtu) = network.mtu.as_ref().filter(|mtu| !(576..=65_535).contains(mtu.get_ref())) {
        let message = format!("packets of {} bytes are not sent", mtu.get_ref());
        return Err(problem(mtu, message, "write 576 to 65535, as in 1500 or 9000"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigError;
    use proptest::prelude::*;

    /// Reads `[image]` with these lines.
    fn image(lines: &str) -> Result<Image, String> {
        #[derive(Deserialize)]
        struct Part {
            image: Image,
        }
        let part: Part = toml::from_str(&format!("[image]\n{lines}\n")).map_err(|error| error.message().to_owned())?;
        check(&part.image).map_err(|problem| format!("{} / {}", problem.message, problem.help))?;
        Ok(part.image)
    }

    #[test]
    fn all_keys_are_read() {
        let all = image(
            "hostname = \"dray-1.example\"\n\
             network = { link = \"52:54:00:12:34:56\", address = \"10.0.2.15/24\", gateway = \"10.0.2.2\", dns = [\"10.0.2.3\"], mtu = 9000 }\nhugepages = \"512MiB\"\nntp = \"time.example:1123\"\nwatchdog = \"30s\"\n\
             console = \"ttyS1\"\nstatus = \"[::]:80\"\nlog-size = \"1MiB\"\nmodules = [\"net\", \"vfio\"]",
        )
        .expect("good");
        let plan = all.network_plan();
        assert_eq!(plan.link, LinkChoice::Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert_eq!(plan.address.map(|cidr| cidr.to_string()).as_deref(), Some("10.0.2.15/24"));
        assert_eq!((plan.gateway, plan.dns.len(), plan.mtu), ("10.0.2.2".parse().ok(), 1, Some(9000)));
        assert_eq!(all.time_server(), Some(("time.example".into(), 1123)));
        assert_eq!((all.watchdog_time(), all.log_bytes()), (Some(Duration::from_secs(30)), 1 << 20));
        assert_eq!(all.status_address(), "[::]:80".parse().ok());
    }

    #[test]
    fn without_keys_the_first_link_asks_by_dhcp_and_the_page_is_there() {
        let none = image("").expect("good");
        assert_eq!(none.network_plan(), NetworkPlan::default());
        assert_eq!((none.host_name(), none.log_bytes(), none.watchdog_time()), ("dray", DEFAULT_LOG_BYTES, None));
        assert_eq!(none.status_address(), DEFAULT_STATUS.parse().ok());
        assert_eq!(image("status = \"off\"").expect("good").status_address(), None);
        assert_eq!(image("network = { dhcp = true }").expect("good").network_plan(), NetworkPlan::default());
        assert_eq!(image("ntp = \"::1\"").expect("good").time_server(), Some(("::1".into(), 123)));
    }

    #[test]
    fn each_mistake_says_what_would_be_right() {
        for (lines, words) in [
            ("hostnane = \"x\"", &["hostnane"][..]),
            ("hostname = \"a b\"", &["no host name", "hyphens"]),
            ("hostname = \"-a\"", &["no host name"]),
            ("network = { }", &["neither an address nor DHCP", "dhcp = true"]),
            ("network = { dhcp = true, address = \"10.0.0.1/8\" }", &["remove address"]),
            ("network = { adress = \"10.0.0.1/8\" }", &["adress"]),
            ("network = { address = \"10.0.0.1\" }", &["10.0.2.15/24"]),
            ("network = { address = \"10.0.0.1/33\" }", &["no address of a link"]),
            ("network = { address = \"10.0.0.1/24\", gateway = \"10.0.1.1\" }", &["no router of 10.0.0.1/24"]),
            ("network = { address = \"10.0.0.1/24\", gateway = \"10.0.0.1\" }", &["no router"]),
            ("network = { dhcp = true, gateway = \"10.0.0.1\" }", &["remove gateway"]),
            ("network = { dhcp = true, dns = [\"x\"] }", &["name server"]),
            ("network = { dhcp = true, dns = [\"1.1.1.1\", \"1.1.1.2\", \"1.1.1.3\", \"1.1.1.4\"] }", &["more than 3"]),
            ("network = { dhcp = true, link = \"52:54:00:12:34\" }", &["no link", "52:54:00:12:34:56"]),
            ("network = { dhcp = true, link = \"a/b\" }", &["no link"]),
            ("network = { dhcp = true, mtu = 100 }", &["100 bytes"]),
            ("hugepages = \"3MiB\"", &["whole number of huge pages", "512MiB"]),
            ("hugepages = \"0B\"", &["huge pages"]),
            ("ntp = \"a b\"", &["time server"]),
            ("ntp = \"a:0\"", &["time server"]),
            ("watchdog = \"1s\"", &["5 s to 10 min"]),
            ("console = \"/dev/ttyS1\"", &["serial line", "ttyS1"]),
            ("status = \"4480\"", &["0.0.0.0:4480", "off"]),
            ("log-size = \"1KiB\"", &["128 KiB"]),
            ("modules = [\"net vfio\"]", &["set of kernel modules"]),
        ] {
            let error = image(lines).expect_err(lines);
            assert!(words.iter().all(|word| error.contains(word)), "{lines}: {error}");
        }
    }

    #[test]
    fn what_is_right_of_a_wrong_file_is_kept() {
        let text = "[image]\nhostname = \"x\"\n[[subsystem]]\nserail = 1\n";
        assert!(matches!(crate::config::Config::parse("a", text.into(), ".".into()), Err(ConfigError::Wrong { .. })));
        assert_eq!(Image::salvage(text).expect("right by itself").host_name(), "x");
        assert!(Image::salvage("[image]\nhostname = \"a b\"\n").is_none());
        assert!(Image::salvage("[image]\nhostname =").is_none() && Image::salvage("").is_none());
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text in "[0-9a-f:./]{0,24}") {
            let _any = (Cidr::parse(&text), LinkChoice::parse(&text), time_server(&text));
        }

        #[test]
        fn a_network_holds_its_own_addresses(address: u32, other: u32, prefix in 1u8..=32) {
            let cidr = Cidr { address: IpAddr::V4(address.into()), prefix };
            let same = address.checked_shr(32 - u32::from(prefix)) == other.checked_shr(32 - u32::from(prefix));
            prop_assert_eq!(cidr.holds(IpAddr::V4(other.into())), same);
        }
    }
}
