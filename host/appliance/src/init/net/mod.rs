//! The network: one link with an address, from the configuration or a DHCP server, and the files that name resolution reads.
//!
//! It has a thread of its own, since links come when their drivers please and leases are renewed for as long as the machine
//! runs. What is applied stands in [`NetworkView`], for the status page; a new configuration takes it back and begins anew.

pub mod dhcp;
pub mod netlink;

use super::journal::Journal;
use crate::config::image::{Cidr, LinkChoice, NetworkPlan};
use netlink::Netlink;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where the kernel lists links.
const NET: &str = "/sys/class/net";
/// The index of the loopback link.
const LOOPBACK: u32 = 1;
/// A link's `type` for Ethernet (`ARPHRD_ETHER`).
const ETHERNET: &str = "1";
/// How often a link that is not there is looked for: at first, and when it has not come for this long.
const LOOK: (Duration, Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1), Duration::from_secs(10));

/// A link of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address.
    pub mac: [u8; 6],
}

/// What the network is, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct NetworkView {
    /// The link's name.
    pub link: Option<String>,
    /// The address and its prefix length.
    pub address: Option<String>,
    /// The default router.
    pub gateway: Option<String>,
    /// Name servers.
    pub dns: Vec<String>,
    /// Time servers that a DHCP server named.
    pub time_servers: Vec<String>,
    /// How it stands, in words.
    pub state: String,
}

/// What a link was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Applied {
    pub(super) link: Link,
    pub(super) cidr: Cidr,
    pub(super) gateway: Option<IpAddr>,
}

/// Ethernet links in the order of their indexes. `net` is `/sys/class/net`.
#[must_use]
pub fn links(net: &Path) -> Vec<Link> {
    let entries = std::fs::read_dir(net).into_iter().flatten().flatten();
    let mut links: Vec<_> = entries.filter_map(|entry| link(&entry.path())).collect();
    links.sort_by_key(|link| link.index);
    links
}

fn link(folder: &Path) -> Option<Link> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok().map(|text| text.trim().to_owned());
    if read("type")? != ETHERNET {
        return None;
    }
    let mut mac = [0; 6];
    let address = read("address")?;
    let mut parts = address.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    Some(Link { index: read("ifindex")?.parse().ok()?, name: folder.file_name()?.to_str()?.into(), mac })
}

/// The link that is meant, if it is there.
#[must_use]
pub fn choose<'a>(links: &'a [Link], choice: &LinkChoice) -> Option<&'a Link> {
    links.iter().find(|link| match choice {
        LinkChoice::First => true,
        LinkChoice::Name(name) => link.name == *name,
        LinkChoice::Mac(mac) => link.mac == *mac,
    })
}

/// What a network's thread shares.
pub(super) struct Shared {
    pub(super) plan: NetworkPlan,
    pub(super) host_name: String,
    pub(super) journal: Journal,
    view: Arc<Mutex<NetworkView>>,
    stop: AtomicBool,
}

impl Shared {
    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn view(&self, change: impl FnOnce(&mut NetworkView)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits, but not longer than until it is stopped; false then.
    fn pause(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        while !self.stopping() && Instant::now() < end {
            std::thread::park_timeout(end.saturating_duration_since(Instant::now()));
        }
        !self.stopping()
    }
}

/// The network as it is being set up, and kept.
pub struct Network {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Network {
    /// Begins to set a network up.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn start(plan: NetworkPlan, host_name: &str, journal: &Journal, view: &Arc<Mutex<NetworkView>>) -> std::io::Result<Self> {
        let shared = Shared {
            plan,
            host_name: host_name.into(),
            journal: journal.clone(),
            view: Arc::clone(view),
            stop: AtomicBool::new(false),
        };
        let shared = Arc::new(shared);
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("dray-net".into()).spawn(move || run(&of_thread))?;
        Ok(Self { shared, thread })
    }

    /// Whether the link has its address, or never will: the appliance may listen then. Waits for at most `patience`.
    #[must_use]
    pub fn wait(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        loop {
            let mut up = false;
            self.shared.view(|view| up = view.address.is_some());
            if up || self.thread.is_finished() || Instant::now() >= end {
                return up;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What was asked for.
    #[must_use]
    pub fn is(&self, plan: &NetworkPlan, host_name: &str) -> bool {
        self.shared.plan == *plan && self.shared.host_name == host_name
    }

    /// Takes everything back.
    pub fn stop(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        // It looks at least every second.
        let _panicked = self.thread.join();
    }
}

fn run(shared: &Shared) {
    write_hosts(shared);
    if let Err(error) = Netlink::open().and_then(|mut netlink| netlink.link_up(LOOPBACK, None)) {
        shared.journal.say(&format!("the loopback link does not come up: {error}"));
    }
    let Some(link) = wait_for_link(shared) else { return };
    shared.view(|view| {
        view.link = Some(link.name.clone());
        view.state = "coming up".into();
    });
    if let Err(error) = Netlink::open().and_then(|mut netlink| netlink.link_up(link.index, shared.plan.mtu)) {
        shared.journal.say(&format!("the link {} does not come up: {error}", link.name));
        shared.view(|view| view.state = format!("does not come up: {error}"));
        return;
    }
    let Some(cidr) = shared.plan.address else { return dhcp::run(shared, &link) };
    let applied = Applied { link, cidr, gateway: shared.plan.gateway };
    if apply(shared, &applied, &shared.plan.dns, "static") {
        while shared.pause(Duration::from_secs(3600)) {}
        take_back(shared, &applied);
    }
}

fn wait_for_link(shared: &Shared) -> Option<Link> {
    let (start, mut said) = (Instant::now(), false);
    loop {
        if let Some(link) = choose(&links(Path::new(NET)), &shared.plan.link) {
            return Some(link.clone());
        }
        let late = start.elapsed() > LOOK.2;
        if late && !said {
            said = true;
            shared.journal.say(&format!("{} is not there; it is waited for", shared.plan.link));
            shared.view(|view| view.state = format!("{} is not there", shared.plan.link));
        }
        if !shared.pause(if late { LOOK.1 } else { LOOK.0 }) {
            return None;
        }
    }
}

/// Gives a link its address; false if the kernel refuses, which is said.
pub(super) fn apply(shared: &Shared, applied: &Applied, dns: &[IpAddr], by: &str) -> bool {
    let (link, cidr) = (&applied.link, applied.cidr);
    let result = Netlink::open().and_then(|mut netlink| {
        netlink.add_address(link.index, cidr)?;
        applied.gateway.map_or(Ok(()), |router| netlink.set_default_route(link.index, router))
    });
    if let Err(error) = result {
        shared.journal.say(&format!("the link {} does not get the address {cidr}: {error}", link.name));
        shared.view(|view| view.state = format!("does not get the address {cidr}: {error}"));
        return false;
    }
    write_resolv_conf(shared, dns);
    let router = applied.gateway.map_or_else(|| "no router".into(), |router| format!("router {router}"));
    shared.journal.say(&format!("network {}: {cidr} ({by}), {router}", link.name));
    shared.view(|view| {
        view.address = Some(cidr.to_string());
        view.gateway = applied.gateway.map(|router| router.to_string());
        view.dns = dns.iter().map(ToString::to_string).collect();
        view.state = by.into();
    });
    true
}

/// Takes an address from its link again.
pub(super) fn take_back(shared: &Shared, applied: &Applied) {
    let gone = Netlink::open().and_then(|mut netlink| {
        if let Some(router) = applied.gateway {
            // The kernel may have taken it away with the address or the link.
            let _gone = netlink.remove_default_route(applied.link.index, router);
        }
        netlink.remove_address(applied.link.index, applied.cidr)
    });
    if let Err(error) = gone {
        shared.journal.say(&format!("the link {} keeps the address {}: {error}", applied.link.name, applied.cidr));
    }
    shared.view(|view| *view = NetworkView { link: view.link.take(), ..NetworkView::default() });
}

fn write_hosts(shared: &Shared) {
    let text = format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {}\n", shared.host_name);
    write_file(shared, "/etc/hosts", &text);
}

fn write_resolv_conf(shared: &Shared, dns: &[IpAddr]) {
    let mut text = String::new();
    for server in dns.iter().take(3) {
        let _infallible = writeln!(text, "nameserver {server}");
    }
    text.push_str("options timeout:2 attempts:2\n");
    write_file(shared, "/etc/resolv.conf", &text);
}

fn write_file(shared: &Shared, path: &str, text: &str) {
    // Beside and renamed: who reads it meanwhile finds the one or the other.
    let beside = format!("{path}.new");
    let write = || {
        std::fs::create_dir_all("/etc")?;
        std::fs::write(&beside, text)?;
        std::fs::rename(&beside, path)
    };
    if let Err(error) = write() {
        shared.journal.say(&format!("{path} cannot be written: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_chosen_by_order_name_or_mac() {
        let net = std::env::temp_dir().join(format!("dray-net-{}", std::process::id()));
        for (name, kind, index, mac) in [
            ("lo", "772", "1", "00:00:00:00:00:00"),
            ("eth1", "1", "3", "52:54:00:00:00:03"),
            ("eth0", "1", "10", "52:54:00:00:00:0a"),
            ("odd", "1", "x", "52:54"),
        ] {
            let folder = net.join(name);
            std::fs::create_dir_all(&folder).expect("folder");
            for (file, text) in [("type", kind), ("ifindex", index), ("address", mac)] {
                std::fs::write(folder.join(file), format!("{text}\n")).expect("file");
            }
        }
        let links = links(&net);
        assert_eq!(links.iter().map(|link| link.name.as_str()).collect::<Vec<_>>(), ["eth1", "eth0"]);
        let name = |choice| choose(&links, &choice).map(|link| link.name.as_str());
        assert_eq!(name(LinkChoice::First), Some("eth1"));
        assert_eq!(name(LinkChoice::Name("eth0".into())), Some("eth0"));
        assert_eq!(name(LinkChoice::Mac([0x52, 0x54, 0, 0, 0, 10])), Some("eth0"));
        assert_eq!(name(LinkChoice::Name("eth7".into())), None);
        std::fs::remove_dir_all(net).expect("clean up");
    }
}
