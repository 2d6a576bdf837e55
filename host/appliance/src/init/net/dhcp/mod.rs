//! DHCP: the client's states ([`client`]), its messages ([`packet`]), and here its socket.

pub mod client;
pub mod packet;

use super::{Applied, Link, Shared, apply, netlink::Netlink, take_back};
use client::{Action, Client, Lease};
use socket2::{Domain, Protocol, Socket, Type};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

/// The ports of servers and clients.
const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// How often the client looks up from its socket.
const LOOK: Duration = Duration::from_millis(500);
/// Most bytes of a message.
const MESSAGE_BYTES: usize = 2048;
/// How long a client that could not go on waits.
const TROUBLE: Duration = Duration::from_secs(5);

/// Keeps a link's lease until the network is stopped.
pub(super) fn run(shared: &Shared, link: &Link) {
    let mut said = String::new();
    while !shared.stopping() {
        match keep(shared, link) {
            Ok(()) => return,
            Err(error) => {
                let words = format!("DHCP on {}: {error}", link.name);
                if words != said {
                    shared.journal.say(&words);
                    shared.view(|view| view.state.clone_from(&words));
                    said = words;
                }
                shared.pause(TROUBLE);
            }
        }
    }
}

fn open(link: &Link) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_broadcast(true)?;
    // By the link and not by an address: there is none yet.
    socket.bind_device(Some(link.name.as_bytes()))?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, CLIENT_PORT).into())?;
    Ok(socket.into())
}

fn keep(shared: &Shared, link: &Link) -> io::Result<()> {
    let socket = open(link)?;
    let start = Instant::now();
    let seed = std::hash::RandomState::new().build_hasher().finish();
    let mut client = Client::new(link.mac, &shared.host_name, seed, start.elapsed());
    let mut held: Option<Applied> = None;
    let mut bytes = [0; MESSAGE_BYTES];
    shared.view(|view| view.state = "asking for an address (DHCP)".into());
    let result = loop {
        if shared.stopping() {
            break Ok(());
        }
        if let Some(action) = client.poll(start.elapsed()) {
            act(shared, link, &socket, action, &mut held);
            continue;
        }
        let wait = client.due().saturating_sub(start.elapsed()).clamp(Duration::from_millis(1), LOOK);
        socket.set_read_timeout(Some(wait))?;
        match socket.recv(&mut bytes) {
            Ok(count) => {
                if let Some(action) = client.take(&bytes[..count], start.elapsed()) {
                    act(shared, link, &socket, action, &mut held);
                }
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => {}
                _ => break Err(error),
            },
        }
    };
    if let Some(applied) = held {
        take_back(shared, &applied);
    }
    result
}

fn act(shared: &Shared, link: &Link, socket: &UdpSocket, action: Action, held: &mut Option<Applied>) {
    match action {
        Action::Send(message, to) => {
            let to = SocketAddrV4::new(to.unwrap_or(Ipv4Addr::BROADCAST), SERVER_PORT);
            // A link without a carrier drops it; it is sent again.
            let _dropped = socket.send_to(&message, to);
        }
        Action::Bound(lease) => bound(shared, link, &lease, held),
        Action::Lost => {
            shared.journal.say(&format!("network {}: the lease is over", link.name));
            if let Some(applied) = held.take() {
                take_back(shared, &applied);
            }
        }
    }
}

fn bound(shared: &Shared, link: &Link, lease: &Lease, held: &mut Option<Applied>) {
    let applied = Applied { link: link.clone(), cidr: lease.cidr, gateway: lease.router };
    if held.as_ref() == Some(&applied) {
        return;
    }
    if let Some(old) = held.take() {
        take_back(shared, &old);
    }
    // What the configuration says goes before what the server says.
    if let (None, Some(mtu)) = (shared.plan.mtu, lease.mtu)
        && let Err(error) = Netlink::open().and_then(|mut netlink| netlink.link_up(link.index, Some(mtu)))
    {
        shared.journal.say(&format!("network {}: packets of {mtu} bytes: {error}", link.name));
    }
    let dns: Vec<_> = shared.plan.dns.iter().chain(&lease.dns).copied().collect();
    let by = format!("DHCP from {}, for {} s", lease.server, lease.lasts.as_secs());
    if apply(shared, &applied, &dns, &by) {
        shared.view(|view| view.time_servers = lease.time.iter().map(ToString::to_string).collect());
        *held = Some(applied);
    }
}
