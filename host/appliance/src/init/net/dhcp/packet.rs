//! DHCP messages (RFC 2131, options of RFC 2132), as far as a client needs them. Whatever comes from the network is checked
//! against bounds; what makes no sense is no message.

use crate::config::image::Cidr;
use std::net::{IpAddr, Ipv4Addr};

/// Bytes before the options, the magic cookie included.
const FIXED_BYTES: usize = 240;
/// A message is padded to at least this (RFC 1542 §2.1).
const LEAST_BYTES: usize = 300;
/// In front of the options.
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Most servers of a kind that are taken from a message.
const SERVERS: usize = 3;
/// Where `sname` and `file` are, which may hold options too (option 52).
const SNAME: std::ops::Range<usize> = 44..108;
const FILE: std::ops::Range<usize> = 108..236;

/// What kind of message it is (option 53).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A client looks for servers.
    Discover,
    /// A server offers an address.
    Offer,
    /// A client asks for an address, or to keep one.
    Request,
    /// A server gives it.
    Ack,
    /// A server refuses it.
    Nak,
    /// A client gives an address back.
    Release,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Discover,
            2 => Self::Offer,
            3 => Self::Request,
            5 => Self::Ack,
            6 => Self::Nak,
            7 => Self::Release,
            _ => return None,
        })
    }

    fn byte(self) -> u8 {
        match self {
            Self::Discover => 1,
            Self::Offer => 2,
            Self::Request => 3,
            Self::Ack => 5,
            Self::Nak => 6,
            Self::Release => 7,
        }
    }
}

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Which kind.
    pub kind: Kind,
    /// The transaction.
    pub xid: u32,
    /// Seconds since the client began.
    pub secs: u16,
    /// The client's MAC address.
    pub mac: [u8; 6],
    /// The address that the client has.
    pub have: Option<Ipv4Addr>,
    /// The address that the client asks for (option 50).
    pub want: Option<Ipv4Addr>,
    /// The server that is meant (option 54).
    pub server: Option<Ipv4Addr>,
    /// The client's name (option 12).
    pub host_name: String,
}

impl Ask {
    /// The message. Answers are asked for by broadcast while the client has no address: the kernel takes no others then.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; FIXED_BYTES];
        bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
        bytes[4..8].copy_from_slice(&self.xid.to_be_bytes());
        bytes[8..10].copy_from_slice(&self.secs.to_be_bytes());
        if self.have.is_none() {
            bytes[10] = 0x80;
        }
        bytes[12..16].copy_from_slice(&self.have.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
        bytes[28..34].copy_from_slice(&self.mac);
        bytes[236..240].copy_from_slice(&MAGIC);
        let mut option = |code: u8, value: &[u8]| {
            bytes.extend_from_slice(&[code, u8::try_from(value.len()).unwrap_or(0)]);
            bytes.extend_from_slice(value);
        };
        option(53, &[self.kind.byte()]);
        option(61, &[&[1], self.mac.as_slice()].concat());
        if let Some(want) = self.want {
            option(50, &want.octets());
        }
        if let Some(server) = self.server {
            option(54, &server.octets());
        }
        if self.kind != Kind::Release {
            let name = self.host_name.as_bytes();
            option(12, &name[..name.len().min(63)]);
            // What is asked for: mask, router, name servers, packet size, lease, T1, T2, time servers.
            option(55, &[1, 3, 6, 26, 51, 58, 59, 42]);
            // The largest message that is taken.
            option(57, &1500u16.to_be_bytes());
        }
        bytes.push(255);
        bytes.resize(bytes.len().max(LEAST_BYTES), 0);
        bytes
    }
}

/// What a server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Which kind: an offer, an acknowledgement or a refusal.
    pub kind: Kind,
    /// The transaction.
    pub xid: u32,
    /// The client's MAC address.
    pub mac: [u8; 6],
    /// The client's address.
    pub address: Ipv4Addr,
    /// The server (option 54).
    pub server: Ipv4Addr,
    /// The network's prefix length (option 1), or that of the address's class.
    pub prefix: u8,
    /// The first router (option 3).
    pub router: Option<Ipv4Addr>,
    /// Name servers (option 6).
    pub dns: Vec<Ipv4Addr>,
    /// Time servers (option 42).
    pub time: Vec<Ipv4Addr>,
    /// Bytes of the largest packet (option 26).
    pub mtu: Option<u16>,
    /// Seconds of the lease, and after which it is renewed (T1) and rebound (T2): options 51, 58, 59.
    pub lease: (u32, Option<u32>, Option<u32>),
}

impl Answer {
    /// Reads a message; `None` if it is none that a client can use.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let fixed = bytes.get(..FIXED_BYTES)?;
        // A reply to an Ethernet address of six bytes.
        if fixed[..3] != [2, 1, 6] || fixed[236..240] != MAGIC {
            return None;
        }
        let options = Options::parse(bytes)?;
        let kind = options.get(53).filter(|value| value.len() == 1).and_then(|value| Kind::of(value[0]))?;
        let server = options.address(54).filter(is_host)?;
        let address = Ipv4Addr::from_octets(fixed[16..20].try_into().ok()?);
        if !matches!(kind, Kind::Offer | Kind::Ack | Kind::Nak) || (kind != Kind::Nak && !is_host(&address)) {
            return None;
        }
        let prefix = match options.get(1) {
            Some(mask) => prefix_of(u32::from_be_bytes(mask.try_into().ok()?))?,
            None => class_prefix(address),
        };
        let cidr = Cidr { address: IpAddr::V4(address), prefix };
        Some(Self {
            kind,
            xid: u32::from_be_bytes(fixed[4..8].try_into().ok()?),
            mac: fixed[28..34].try_into().ok()?,
            address,
            server,
            prefix,
            // A router that is not in the network cannot be reached.
            router: options.addresses(3).into_iter().find(|router| cidr.holds(IpAddr::V4(*router)) && *router != address),
            dns: options.addresses(6),
            time: options.addresses(42),
            mtu: options.get(26).and_then(|value| Some(u16::from_be_bytes(value.try_into().ok()?))).filter(|mtu| *mtu >= 576),
            lease: (options.number(51).unwrap_or(0), options.number(58), options.number(59)),
        })
    }
}

/// An address that a machine can have.
fn is_host(address: &Ipv4Addr) -> bool {
    !(address.octets()[0] == 0 || address.is_broadcast() || address.is_multicast() || address.is_loopback())
}

fn prefix_of(mask: u32) -> Option<u8> {
    let ones = mask.leading_ones();
    (ones > 0 && mask.checked_shl(ones).unwrap_or(0) == 0).then_some(ones as u8)
}

/// The prefix length before there were masks (RFC 791 §3.2).
fn class_prefix(address: Ipv4Addr) -> u8 {
    match address.octets()[0] {
        0..128 => 8,
        128..192 => 16,
        _ => 24,
    }
}

/// Options by their code; those that come in parts are put together (RFC 3396).
struct Options(Vec<(u8, Vec<u8>)>);

impl Options {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut all = Self(Vec::new());
        all.take(bytes.get(FIXED_BYTES..)?)?;
        let overload = all.get(52).and_then(|value| value.first().copied()).unwrap_or(0);
        if overload & 1 != 0 {
            all.take(&bytes[FILE])?;
        }
        if overload & 2 != 0 {
            all.take(&bytes[SNAME])?;
        }
        Some(all)
    }

    /// `None` if an option goes beyond the end.
    fn take(&mut self, mut bytes: &[u8]) -> Option<()> {
        loop {
            match *bytes {
                [] | [255, ..] => return Some(()),
                [0, ref rest @ ..] => bytes = rest,
                [code, length, ref rest @ ..] => {
                    let (value, rest) = rest.split_at_checked(length.into())?;
                    match self.0.iter_mut().find(|(known, _)| *known == code) {
                        Some((_, known)) => known.extend_from_slice(value),
                        None => self.0.push((code, value.to_vec())),
                    }
                    bytes = rest;
                }
                [_] => return None,
            }
        }
    }

    fn get(&self, code: u8) -> Option<&[u8]> {
        self.0.iter().find(|(known, _)| *known == code).map(|(_, value)| value.as_slice())
    }

    fn number(&self, code: u8) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(code)?.try_into().ok()?))
    }

    fn address(&self, code: u8) -> Option<Ipv4Addr> {
        self.number(code).map(Ipv4Addr::from_bits)
    }

    fn addresses(&self, code: u8) -> Vec<Ipv4Addr> {
        let four = self.get(code).unwrap_or_default().chunks_exact(4);
        let addresses = four.map(|four| Ipv4Addr::new(four[0], four[1], four[2], four[3]));
        addresses.filter(is_host).take(SERVERS).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A server's answer to a client's message.
    pub(in crate::init::net::dhcp) fn answer(ask: &[u8], kind: Kind, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = ask[..FIXED_BYTES].to_vec();
        bytes[0] = 2;
        bytes[16..20].copy_from_slice(&[10, 0, 2, 15]);
        bytes.extend_from_slice(&[53, 1, kind.byte(), 54, 4, 10, 0, 2, 2]);
        for (code, value) in options {
            bytes.extend_from_slice(&[*code, value.len() as u8]);
            bytes.extend_from_slice(value);
        }
        bytes.push(255);
        bytes
    }

    pub(in crate::init::net::dhcp) fn discover() -> Ask {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        Ask { kind: Kind::Discover, xid: 7, secs: 1, mac, have: None, want: None, server: None, host_name: "dray".into() }
    }

    #[test]
    fn an_offer_is_read() {
        let ask = discover().bytes();
        assert!(ask.len() >= LEAST_BYTES);
        let options: [(u8, &[u8]); 8] = [
            (1, &[255, 255, 255, 0]),
            (3, &[192, 0, 2, 1, 10, 0, 2, 2]),
            (6, &[10, 0, 2, 3, 0, 0, 0, 0]),
            (42, &[10, 0, 2, 4]),
            (26, &[0x23, 0x28]),
            (51, &[0, 0]),
            (51, &[0x0e, 0x10]),
            (58, &[0, 0, 7, 8]),
        ];
        let found = Answer::parse(&answer(&ask, Kind::Offer, &options)).expect("an offer");
        assert_eq!((found.kind, found.xid, found.mac), (Kind::Offer, 7, discover().mac));
        assert_eq!((found.address, found.prefix), ("10.0.2.15".parse().expect("address"), 24));
        assert_eq!(found.router, Some("10.0.2.2".parse().expect("address")), "the first that can be reached");
        assert_eq!((found.dns.len(), found.time.len(), found.mtu), (1, 1, Some(9000)));
        assert_eq!(found.lease, (3600, Some(1800), None), "an option in two parts is one");
    }

    #[test]
    fn options_may_lie_in_the_boot_file_name() {
        let mut bytes = answer(&discover().bytes(), Kind::Ack, &[(52, &[1])]);
        bytes[FILE][..7].copy_from_slice(&[3, 4, 10, 0, 2, 9, 255]);
        // Without a mask the address is of class A.
        let found = Answer::parse(&bytes).expect("an acknowledgement");
        assert_eq!((found.prefix, found.router), (8, Some("10.0.2.9".parse().expect("address"))));
    }

    #[test]
    fn what_no_client_can_use_is_no_message() {
        let ask = discover().bytes();
        let good = answer(&ask, Kind::Offer, &[]);
        assert!(Answer::parse(&good).is_some());
        for (at, byte) in [(0, 1), (1, 6), (2, 16), (236, 0), (16, 0), (16, 127), (16, 224), (242, 1)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(Answer::parse(&bad), None, "byte {at} = {byte}");
        }
        for mask in [[255, 0, 255, 0], [0, 0, 0, 0], [127, 0, 0, 0]] {
            assert_eq!(Answer::parse(&answer(&ask, Kind::Offer, &[(1, &mask)])), None, "{mask:?}");
        }
        assert_eq!(prefix_of(u32::MAX), Some(32));
        let mut torn = good;
        torn.truncate(torn.len() - 3);
        assert_eq!(Answer::parse(&torn), None);
    }

    proptest! {
        #[test]
        fn no_packet_is_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 0usize..330, cut in 0usize..330) {
            let _noise = Answer::parse(&bytes);
            let options = [(1, bytes.get(..4).unwrap_or(&[])), (3, bytes.get(4..12).unwrap_or(&[]))];
            let mut message = answer(&discover().bytes(), Kind::Ack, &options);
            if let Some(byte) = message.get_mut(at) {
                *byte ^= bytes.first().copied().unwrap_or(1);
            }
            message.truncate(message.len().saturating_sub(cut));
            if let Some(found) = Answer::parse(&message) {
                prop_assert!((1..=32).contains(&found.prefix) && found.dns.len() <= SERVERS);
            }
        }
    }
}
