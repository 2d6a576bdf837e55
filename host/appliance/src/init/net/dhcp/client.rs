//! A DHCP client's states (RFC 2131 §4.4), without a clock or a socket: time comes in, messages go out.
//!
//! It does not ask for the address that it had before a restart, does not look by ARP whether an offered address is taken
//! (servers do), and gives nothing back at power-off: the lease ends by itself, and the machine finds the same address again.

use super::packet::{Answer, Ask, Kind};
use crate::config::image::Cidr;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// After the first message without an answer; doubled with each.
const FIRST_WAIT: Duration = Duration::from_secs(2);
/// At most.
const MOST_WAIT: Duration = Duration::from_secs(64);
/// Requests for an offered address that are not answered, before another is looked for.
const REQUESTS: u32 = 4;
/// Between two attempts to keep an address, at least (RFC 2131 §4.4.5).
const KEEP_WAIT: Duration = Duration::from_secs(60);
/// A lease is taken to last at least so long: shorter ones would keep client and server busy.
const LEAST_LEASE: u32 = 60;

/// An address for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address and its prefix length.
    pub cidr: Cidr,
    /// The default router.
    pub router: Option<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Time servers.
    pub time: Vec<IpAddr>,
    /// Bytes of the largest packet.
    pub mtu: Option<u32>,
    /// Who gave it.
    pub server: Ipv4Addr,
    /// For how long.
    pub lasts: Duration,
}

/// What a client wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message, to this address or to all.
    Send(Vec<u8>, Option<Ipv4Addr>),
    /// The lease is there, or has changed.
    Bound(Lease),
    /// The address is not this machine's any more.
    Lost,
}

#[derive(Clone, Debug)]
enum State {
    Selecting,
    Requesting { offered: Ipv4Addr, server: Ipv4Addr },
    Bound(Held),
    Renewing(Held),
    Rebinding(Held),
}

/// A lease and when it is to be renewed, rebound, and over.
#[derive(Clone, Debug)]
struct Held {
    lease: Lease,
    renew: Duration,
    rebind: Duration,
    over: Duration,
}

/// A client.
#[derive(Debug)]
pub struct Client {
    mac: [u8; 6],
    host_name: String,
    random: u64,
    xid: u32,
    state: State,
    began: Duration,
    /// When something is to be done next, and how many messages have had no answer.
    due: Duration,
    sent: u32,
}

impl Client {
    /// A client of a link, at a time since some start; `seed` makes its transactions and waits its own.
    #[must_use]
    pub fn new(mac: [u8; 6], host_name: &str, seed: u64, now: Duration) -> Self {
        let (host_name, state) = (host_name.into(), State::Selecting);
        let mut client = Self { mac, host_name, random: seed, xid: 0, state, began: now, due: now, sent: 0 };
        client.restart(now);
        client
    }

    /// When [`poll`](Self::poll) has something to do.
    #[must_use]
    pub fn due(&self) -> Duration {
        self.due
    }

    /// xorshift64*: nothing here needs to be hard to guess but for who is on the link anyway.
    fn draw(&mut self) -> u32 {
        self.random = (self.random | 1).wrapping_mul(0x2545_f491_4f6c_dd1d);
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random >> 32) as u32
    }

    fn restart(&mut self, now: Duration) {
        self.state = State::Selecting;
        self.xid = self.draw();
        (self.began, self.due, self.sent) = (now, now, 0);
    }

    /// The next wait for an answer, with up to a tenth more, so that machines that start together do not go on together.
    fn wait(&mut self) -> Duration {
        let wait = FIRST_WAIT.saturating_mul(1 << self.sent.min(6)).min(MOST_WAIT);
        self.sent += 1;
        wait + wait.mul_f64(f64::from(self.draw() % 100) / 1000.0)
    }

    fn ask(&self, kind: Kind, now: Duration) -> Ask {
        Ask {
            kind,
            xid: self.xid,
            secs: u16::try_from(now.saturating_sub(self.began).as_secs()).unwrap_or(u16::MAX),
            mac: self.mac,
            have: None,
            want: None,
            server: None,
            host_name: self.host_name.clone(),
        }
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Duration) -> Option<Action> {
        if now < self.due {
            return None;
        }
        match self.state.clone() {
            State::Selecting => {
                let message = self.ask(Kind::Discover, now).bytes();
                self.due = now + self.wait();
                Some(Action::Send(message, None))
            }
            State::Requesting { .. } if self.sent >= REQUESTS => {
                self.restart(now);
                self.poll(now)
            }
            State::Requesting { offered, server } => {
                let ask = Ask { want: Some(offered), server: Some(server), ..self.ask(Kind::Request, now) };
                self.due = now + self.wait();
                Some(Action::Send(ask.bytes(), None))
            }
            State::Bound(held) => {
                self.xid = self.draw();
                self.began = now;
                self.state = State::Renewing(held);
                self.poll(now)
            }
            State::Renewing(held) if now >= held.rebind => {
                self.state = State::Rebinding(held);
                self.poll(now)
            }
            State::Renewing(held) => Some(self.keep(&held, held.rebind, Some(held.lease.server), now)),
            State::Rebinding(held) if now >= held.over => {
                self.restart(now);
                Some(Action::Lost)
            }
            State::Rebinding(held) => Some(self.keep(&held, held.over, None, now)),
        }
    }

    /// Asks to keep the address, and again after half of the time that is left.
    fn keep(&mut self, held: &Held, until: Duration, to: Option<Ipv4Addr>, now: Duration) -> Action {
        let left = until.saturating_sub(now);
        self.due = (now + (left / 2).max(KEEP_WAIT)).min(until);
        let have = match held.lease.cidr.address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        };
        Action::Send(Ask { have, ..self.ask(Kind::Request, now) }.bytes(), to)
    }

    /// Takes a message that came in.
    pub fn take(&mut self, bytes: &[u8], now: Duration) -> Option<Action> {
        let answer = Answer::parse(bytes).filter(|answer| answer.xid == self.xid && answer.mac == self.mac)?;
        match (&self.state, answer.kind) {
            (State::Selecting, Kind::Offer) => {
                self.state = State::Requesting { offered: answer.address, server: answer.server };
                (self.due, self.sent) = (now, 0);
                self.poll(now)
            }
            (State::Requesting { server, .. }, Kind::Ack) if *server == answer.server => Some(self.bind(&answer, now)),
            (State::Requesting { server, .. }, Kind::Nak) if *server == answer.server => {
                self.restart(now);
                // Not at once: a server that refuses what it offers would be asked without end.
                self.due = now + self.wait();
                None
            }
            (State::Renewing(_) | State::Rebinding(_), Kind::Ack) => Some(self.bind(&answer, now)),
            (State::Renewing(_) | State::Rebinding(_), Kind::Nak) => {
                self.restart(now);
                Some(Action::Lost)
            }
            _ => None,
        }
    }

    fn bind(&mut self, answer: &Answer, now: Duration) -> Action {
        let (lasts, renew, rebind) = answer.lease;
        let lasts = lasts.max(LEAST_LEASE);
        let rebind = rebind.filter(|t2| (1..lasts).contains(t2)).unwrap_or(lasts - lasts / 8);
        let renew = renew.filter(|t1| (1..rebind).contains(t1)).unwrap_or((lasts / 2).min(rebind - 1));
        let after = |seconds: u32| now + Duration::from_secs(seconds.into());
        let all = |addresses: &[Ipv4Addr]| addresses.iter().copied().map(IpAddr::V4).collect();
        let lease = Lease {
            cidr: Cidr { address: IpAddr::V4(answer.address), prefix: answer.prefix },
            router: answer.router.map(IpAddr::V4),
            dns: all(&answer.dns),
            time: all(&answer.time),
            mtu: answer.mtu.map(u32::from),
            server: answer.server,
            lasts: Duration::from_secs(lasts.into()),
        };
        let held = Held { lease: lease.clone(), renew: after(renew), rebind: after(rebind), over: after(lasts) };
        (self.due, self.sent) = (held.renew, 0);
        self.state = State::Bound(held);
        Action::Bound(lease)
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::tests::answer;
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    const MASK: (u8, &[u8]) = (1, &[255, 255, 255, 0]);
    /// An hour.
    const HOUR: (u8, &[u8]) = (51, &[0, 0, 0x0e, 0x10]);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn client() -> Client {
        Client::new(MAC, "dray", 1, s(100))
    }

    fn sent(action: Option<Action>) -> (Vec<u8>, Option<Ipv4Addr>) {
        match action {
            Some(Action::Send(bytes, to)) => (bytes, to),
            other => panic!("{other:?}"),
        }
    }

    /// The kind of a client's message: its first option.
    fn kind(bytes: &[u8]) -> u8 {
        assert_eq!(bytes[240..242], [53, 1]);
        bytes[242]
    }

    /// A client with a lease of an hour, taken at 100 s.
    fn bound() -> Client {
        let mut client = client();
        let (discover, to) = sent(client.poll(s(100)));
        assert_eq!((kind(&discover), to), (1, None));
        let (request, to) = sent(client.take(&answer(&discover, Kind::Offer, &[MASK, HOUR]), s(100)));
        assert_eq!((kind(&request), to), (3, None));
        let taken = client.take(&answer(&request, Kind::Ack, &[MASK, HOUR]), s(100));
        let Some(Action::Bound(lease)) = taken else { panic!("{taken:?}") };
        assert_eq!((lease.cidr.to_string().as_str(), lease.lasts), ("10.0.2.15/24", s(3600)));
        client
    }

    #[test]
    fn an_address_is_asked_for_and_kept() {
        let mut client = bound();
        assert_eq!(client.due(), s(100 + 1800), "half of the lease");
        assert_eq!(client.poll(s(1000)), None);
        let (renew, to) = sent(client.poll(s(1900)));
        assert_eq!((kind(&renew), to), (3, Some(Ipv4Addr::new(10, 0, 2, 2))), "the server alone is asked");
        assert_eq!(renew[12..16], [10, 0, 2, 15]);
        assert!(matches!(client.take(&answer(&renew, Kind::Ack, &[MASK, HOUR]), s(1901)), Some(Action::Bound(_))));
        assert_eq!(client.due(), s(1901 + 1800));
    }

    #[test]
    fn a_server_that_is_silent_is_followed_by_any_and_the_address_is_lost_in_the_end() {
        let mut client = bound();
        let (mut now, mut to_server, mut to_all) = (s(0), 0, 0);
        let lost = loop {
            now = client.due().max(now);
            match client.poll(now) {
                Some(Action::Send(_, Some(_))) => to_server += 1,
                Some(Action::Send(_, None)) => {
                    assert!(now >= s(100 + 3150), "not before seven eighths of the lease");
                    to_all += 1;
                }
                Some(Action::Lost) => break now,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(lost, s(100 + 3600));
        assert!(to_server > 2 && to_all > 1 && to_server + to_all < 40, "{to_server} {to_all}");
        assert_eq!(kind(&sent(client.poll(lost)).0), 1, "it begins anew");
    }

    #[test]
    fn a_refusal_begins_anew() {
        let mut client = bound();
        let (renew, _) = sent(client.poll(s(1900)));
        assert_eq!(client.take(&answer(&renew, Kind::Nak, &[]), s(1900)), Some(Action::Lost));
        assert_eq!(kind(&sent(client.poll(s(1900))).0), 1);
    }

    #[test]
    fn an_offer_that_is_refused_is_not_asked_for_without_end() {
        let mut client = client();
        let (discover, _) = sent(client.poll(s(100)));
        let (request, _) = sent(client.take(&answer(&discover, Kind::Offer, &[MASK]), s(100)));
        assert_eq!(client.take(&answer(&request, Kind::Nak, &[]), s(100)), None);
        assert!(client.due() >= s(102) && client.poll(s(101)).is_none());
    }

    #[test]
    fn silence_makes_waits_longer_and_requests_end() {
        let mut client = client();
        let (discover, _) = sent(client.poll(s(100)));
        let (mut now, mut waits) = (s(100), Vec::new());
        for _ in 0..8 {
            waits.push(client.due() - now);
            now = client.due();
            assert_eq!(kind(&sent(client.poll(now)).0), 1);
        }
        assert!(waits.is_sorted() || waits[5..].iter().all(|wait| *wait >= s(64)), "{waits:?}");
        assert!(waits[0] < s(3) && *waits.last().expect("one") <= MOST_WAIT + MOST_WAIT / 10, "{waits:?}");
        let _request = sent(client.take(&answer(&discover, Kind::Offer, &[MASK]), now));
        let kinds: Vec<_> = (0..REQUESTS).map(|_| kind(&sent(client.poll(client.due())).0)).collect();
        assert_eq!(kinds, [3, 3, 3, 1], "then another is looked for");
    }

    #[test]
    fn what_is_not_for_this_client_is_passed_over() {
        let mut client = client();
        let (discover, _) = sent(client.poll(s(100)));
        let mut other = answer(&discover, Kind::Offer, &[MASK]);
        other[4] ^= 1;
        assert_eq!(client.take(&other, s(100)), None, "another transaction");
        let mut other = answer(&discover, Kind::Offer, &[MASK]);
        other[28] ^= 1;
        assert_eq!(client.take(&other, s(100)), None, "another machine");
        assert_eq!(client.take(&answer(&discover, Kind::Ack, &[MASK]), s(100)), None, "nothing was asked for");
        let (request, _) = sent(client.take(&answer(&discover, Kind::Offer, &[MASK]), s(100)));
        let mut stranger = answer(&request, Kind::Ack, &[MASK]);
        stranger[248] = 77;
        assert_eq!(client.take(&stranger, s(100)), None, "another server");
    }

    proptest! {
        /// Whatever a server says of its times, renewal comes before rebinding, rebinding before the end, and all of them later.
        #[test]
        fn times_are_in_order(lasts: u32, t1: u32, t2: u32) {
            let mut client = client();
            let (discover, _) = sent(client.poll(s(100)));
            let (request, _) = sent(client.take(&answer(&discover, Kind::Offer, &[MASK]), s(100)));
            let options: [(u8, &[u8]); 4] = [MASK, (51, &lasts.to_be_bytes()), (58, &t1.to_be_bytes()), (59, &t2.to_be_bytes())];
            prop_assert!(matches!(client.take(&answer(&request, Kind::Ack, &options), s(100)), Some(Action::Bound(_))));
            let State::Bound(held) = &client.state else { panic!("bound") };
            prop_assert!(s(100) < held.renew && held.renew < held.rebind && held.rebind < held.over);
        }

        #[test]
        fn no_sequence_of_packets_is_too_odd(
            steps in vec((any::<bool>(), 0u64..5000, 0usize..4, vec(any::<u8>(), 0..12)), 0..30)
        ) {
            let (mut client, mut now, mut last) = (client(), s(100), Vec::new());
            for (polls, later, what, noise) in steps {
                now += s(later);
                let action = if polls || last.is_empty() {
                    client.poll(now)
                } else {
                    let kind = [Kind::Offer, Kind::Ack, Kind::Nak, Kind::Discover][what];
                    let options = [(51, noise.get(..4).unwrap_or(&[])), (1, noise.get(4..8).unwrap_or(&[255, 0, 0, 0]))];
                    client.take(&answer(&last, kind, &options), now)
                };
                if let Some(Action::Send(bytes, _)) = action {
                    last = bytes;
                }
            }
        }
    }
}
