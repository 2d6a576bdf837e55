//! The kernel's network set-up, by rtnetlink: links up, addresses, routes.
//!
//! One request at a time, each acknowledged by the kernel; an answer that does not come in time is an error. The five messages
//! that are needed are written here by hand (linux/rtnetlink.h): the crates for it turn on features of what the sandbox's runtime
//! is built with.

use crate::config::image::Cidr;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the kernel may take over a request.
const PATIENCE: Duration = Duration::from_secs(5);

/// Kinds of messages (`RTM_*`, `NLMSG_ERROR`).
const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const ERROR: u16 = 2;
/// Flags of a request (`NLM_F_*`).
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const REPLACE: u16 = 0x100;
const CREATE: u16 = 0x400;
/// Families of addresses (`AF_*`).
const UNSPECIFIED: u8 = 0;
const INET: u8 = 2;
const INET6: u8 = 10;
/// `IFF_UP`.
const UP: u32 = 1;
/// The main routing table, a route set at boot, to anywhere, by a router (`RT_TABLE_MAIN`, `RTPROT_BOOT`, `RT_SCOPE_UNIVERSE`,
/// `RTN_UNICAST`).
const ROUTE: [u8; 4] = [254, 3, 0, 1];
/// Bytes of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// Attributes: `IFLA_MTU`; `IFA_ADDRESS`, `IFA_LOCAL`, `IFA_BROADCAST`; `RTA_OIF`, `RTA_GATEWAY`.
const LINK_MTU: u16 = 4;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const BROADCAST: u16 = 4;
const ROUTE_LINK: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;

/// A message: its kind, flags, and what follows the header.
struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        Self { kind, flags, body: fixed.to_vec() }
    }

    /// Adds an attribute, at a multiple of four bytes.
    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.body.extend_from_slice(&length.to_ne_bytes());
        self.body.extend_from_slice(&kind.to_ne_bytes());
        self.body.extend_from_slice(value);
        self
    }

    fn bytes(mut self, sequence: u32) -> Vec<u8> {
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        let length = u32::try_from(HEADER_BYTES + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | REQUEST | ACKNOWLEDGE).to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        // The port is the kernel's to fill in.
        bytes.extend_from_slice(&[0; 4]);
        bytes.append(&mut self.body);
        bytes
    }
}

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
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Brings a link up, with packets of at most `mtu` bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn link_up(&mut self, index: u32, mtu: Option<u32>) -> io::Result<()> {
        self.request(link_up(index, mtu))
    }

    /// Gives a link an address; one that it has already is taken as it is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_address(&mut self, index: u32, cidr: Cidr) -> io::Result<()> {
        self.request(address(NEW_ADDRESS, CREATE | REPLACE, index, cidr))
    }

    /// Takes an address from a link.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_address(&mut self, index: u32, cidr: Cidr) -> io::Result<()> {
        self.request(address(DELETE_ADDRESS, 0, index, cidr))
    }

    /// Sets the default route, over a router that is reached by the link. It takes the place of the one before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_default_route(&mut self, index: u32, router: IpAddr) -> io::Result<()> {
        self.request(default_route(NEW_ROUTE, CREATE | REPLACE, index, router))
    }

    /// Takes the default route away.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_default_route(&mut self, index: u32, router: IpAddr) -> io::Result<()> {
        self.request(default_route(DELETE_ROUTE, 0, index, router))
    }

    fn request(&mut self, message: Message) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        sendto(&self.socket, &message.bytes(self.sequence), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut buffer = vec![0; 16 << 10];
        loop {
            let bytes = match recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((bytes, _)) => &buffer[..bytes],
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if let Some(result) = acknowledged(bytes, self.sequence) {
                return result;
            }
        }
    }
}

/// What the kernel says to a request; `None` if it is about another one, such as one that was given up.
fn acknowledged(bytes: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let of = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let code = i32::from_ne_bytes(bytes.get(HEADER_BYTES..HEADER_BYTES + 4)?.try_into().ok()?);
    if kind != ERROR || of != sequence {
        return None;
    }
    Some(if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.saturating_neg())) })
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (INET, address.octets().to_vec()),
        IpAddr::V6(address) => (INET6, address.octets().to_vec()),
    }
}

/// `struct ifinfomsg`: family, type, index, flags and which of them change.
fn link_up(index: u32, mtu: Option<u32>) -> Message {
    let mut fixed = vec![UNSPECIFIED, 0, 0, 0];
    for word in [index, UP, UP] {
        fixed.extend_from_slice(&word.to_ne_bytes());
    }
    let message = Message::new(NEW_LINK, 0, &fixed);
    match mtu {
        Some(mtu) => message.with(LINK_MTU, &mtu.to_ne_bytes()),
        None => message,
    }
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index.
fn address(kind: u16, flags: u16, index: u32, cidr: Cidr) -> Message {
    let (family, bytes) = octets(cidr.address);
    let mut fixed = vec![family, cidr.prefix, 0, 0];
    fixed.extend_from_slice(&index.to_ne_bytes());
    let message = Message::new(kind, flags, &fixed).with(LOCAL, &bytes).with(ADDRESS, &bytes);
    match (cidr.address, cidr.prefix) {
        (IpAddr::V4(v4), 1..=30) => {
            let all_hosts = Ipv4Addr::from_bits(v4.to_bits() | u32::MAX >> cidr.prefix);
            message.with(BROADCAST, &all_hosts.octets())
        }
        _ => message,
    }
}

/// `struct rtmsg`: family, prefix lengths of destination and source, type of service, table, protocol, scope, type, flags.
fn default_route(kind: u16, flags: u16, index: u32, router: IpAddr) -> Message {
    let (family, bytes) = octets(router);
    let mut fixed = vec![family, 0, 0, 0];
    fixed.extend_from_slice(&ROUTE);
    fixed.extend_from_slice(&[0; 4]);
    Message::new(kind, flags, &fixed).with(ROUTE_GATEWAY, &bytes).with(ROUTE_LINK, &index.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_are_as_the_kernel_has_them() {
        let cidr = Cidr::parse("10.0.2.15/24").expect("an address");
        let bytes = address(NEW_ADDRESS, CREATE, 2, cidr).bytes(7);
        let expected: &[u8] = &[
            48, 0, 0, 0, 20, 0, 5, 4, 7, 0, 0, 0, 0, 0, 0, 0, // length, kind, flags, sequence, port
            2, 24, 0, 0, 2, 0, 0, 0, // family, prefix, flags, scope, index
            8, 0, 2, 0, 10, 0, 2, 15, 8, 0, 1, 0, 10, 0, 2, 15, 8, 0, 4, 0, 10, 0, 2, 255,
        ];
        assert_eq!(bytes, expected);
        assert_eq!(link_up(1, Some(9000)).bytes(1).len(), HEADER_BYTES + 16 + 8);
        let route = default_route(NEW_ROUTE, 0, 2, "fe80::1".parse().expect("an address"));
        assert_eq!(route.bytes(1).len(), HEADER_BYTES + 12 + 20 + 8);
    }

    /// The kernel itself: what it does not allow or know, it says; a link that is not there has no address.
    #[test]
    fn the_kernel_understands_and_refuses() {
        let mut netlink = Netlink::open().expect("a socket");
        let cidr = Cidr::parse("192.0.2.1/32").expect("an address");
        let none = 999_999;
        for result in [netlink.link_up(none, None), netlink.add_address(none, cidr), netlink.remove_address(none, cidr)] {
            use rustix::io::Errno;
            let code = result.expect_err("no such link").raw_os_error();
            let expected = [Errno::NODEV, Errno::PERM, Errno::ADDRNOTAVAIL].map(|errno| Some(errno.raw_os_error()));
            assert!(expected.contains(&code), "{code:?}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_is_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _none = acknowledged(&bytes, 7);
        }
    }
}
