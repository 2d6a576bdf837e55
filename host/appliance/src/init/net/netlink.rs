//! The kernel's network set-up, by rtnetlink: links up, addresses, routes.
//!
//! One request at a time, each acknowledged by the kernel; an answer that does not come in time is an error.

use crate::config::image::Cidr;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily as Family, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the kernel may take over a request.
const PATIENCE: Duration = Duration::from_secs(5);
/// The main routing table (`RT_TABLE_MAIN`).
const MAIN_TABLE: u8 = 254;

/// A connection to the kernel.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// The system's.
    pub fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(Family::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Brings a link up, with packets of at most `mtu` bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn link_up(&mut self, index: u32, mtu: Option<u32>) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.extend(mtu.map(LinkAttribute::Mtu));
        self.request(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Gives a link an address; one that it has already is taken as it is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_address(&mut self, index: u32, cidr: Cidr) -> io::Result<()> {
        self.request(RouteNetlinkMessage::NewAddress(address(index, cidr)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes an address from a link.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_address(&mut self, index: u32, cidr: Cidr) -> io::Result<()> {
        self.request(RouteNetlinkMessage::DelAddress(address(index, cidr)), 0)
    }

    /// Sets the default route, over a router that is reached by the link. It takes the place of the one before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_default_route(&mut self, index: u32, router: IpAddr) -> io::Result<()> {
        self.request(RouteNetlinkMessage::NewRoute(default_route(index, router)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes the default route away.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_default_route(&mut self, index: u32, router: IpAddr) -> io::Result<()> {
        self.request(RouteNetlinkMessage::DelRoute(default_route(index, router)), 0)
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        sendto(&self.socket, &bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        self.acknowledged()
    }

    fn acknowledged(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let bytes = match recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((bytes, _)) => bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer[..bytes]).map_err(io::Error::other)?;
            // An answer to a request that was given up.
            if answer.header.sequence_number != self.sequence {
                continue;
            }
            if let NetlinkPayload::Error(error) = answer.payload {
                return error.code.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code.get().saturating_neg())));
            }
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address(index: u32, cidr: Cidr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(cidr.address);
    message.header.prefix_len = cidr.prefix;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Address(cidr.address), AddressAttribute::Local(cidr.address)];
    if let (IpAddr::V4(v4), 1..=30) = (cidr.address, cidr.prefix) {
        let all_hosts = u32::MAX >> cidr.prefix;
        message.attributes.push(AddressAttribute::Broadcast(Ipv4Addr::from_bits(v4.to_bits() | all_hosts)));
    }
    message
}

fn default_route(index: u32, router: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(router);
    message.header.table = MAIN_TABLE;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    let router = match router {
        IpAddr::V4(router) => RouteAddress::Inet(router),
        IpAddr::V6(router) => RouteAddress::Inet6(router),
    };
    message.attributes = vec![RouteAttribute::Gateway(router), RouteAttribute::Oif(index)];
    message
}

