//! The client against a server that spoils what it says.

use super::*;
use proptest::prelude::*;

/// What a hostile server does to one of its messages.
#[derive(Clone, Debug)]
enum Spoil {
    Byte(usize, u8),
    Word(usize, u64),
    Cut(usize),
    Grow(usize),
    Fds(usize),
    NoFds,
    Twice,
}

fn spoil() -> impl Strategy<Value = (usize, Spoil)> {
    let word = prop_oneof![Just(0), Just(u64::MAX), Just(1 << 40), Just(0x1001), Just(1 << 63), any::<u64>()];
    let what = prop_oneof![
        4 => (0..96usize, any::<u8>()).prop_map(|(at, byte)| Spoil::Byte(at, byte)),
        6 => (0..12usize, word).prop_map(|(at, word)| Spoil::Word(at * 8, word)),
        1 => (0..80usize).prop_map(Spoil::Cut),
        1 => (1..200usize).prop_map(Spoil::Grow),
        1 => (1..20usize).prop_map(Spoil::Fds),
        1 => Just(Spoil::NoFds),
        1 => Just(Spoil::Twice),
    ];
    (0..60usize, what)
}

fn spoiled(messages: &mut Vec<Message>, spoil: &Spoil) {
    let Some((bytes, fds)) = messages.first_mut() else { return };
    match *spoil {
        Spoil::Byte(at, byte) => drop(bytes.get_mut(at).map(|there| *there = byte)),
        Spoil::Word(at, word) => drop(bytes.get_mut(at..at + 8).map(|there| there.copy_from_slice(&word.to_le_bytes()))),
        Spoil::Cut(len) => bytes.truncate(len.max(1)),
        Spoil::Grow(by) => {
            bytes.resize(bytes.len() + by, 0xa5);
            let size = bytes.len() as u32;
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
        }
        Spoil::Fds(count) => {
            let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
            fds.extend((0..count).map(|_| fd.try_clone().expect("descriptor")));
        }
        Spoil::NoFds => fds.clear(),
        Spoil::Twice => {
            let again = bytes.clone();
            messages.push((again, Vec::new()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the server sends, the client ends with a typed error or a function whose doorbells are where they should be.
    #[test]
    fn a_hostile_server_gets_no_panic(
        bar0 in prop_oneof![3 => Just(Bar0::Doorbells), 1 => Just(Bar0::Whole), 1 => Just(Bar0::Trapped)],
        spoils in proptest::collection::vec(spoil(), 1..4),
    ) {
        let device = Device::shared(bar0);
        let mut count = 0;
        let mut left = spoils.clone();
        let inner = Arc::clone(&device);
        let stream = Script::new(Box::new(move |header: Header, payload: &[u8], fds| {
            let mut device = inner.lock().expect("lock");
            // What a proper device would take for a mistake of the client's cannot be told here.
            if header.is_reply() {
                return Some(Vec::new());
            }
            let mut messages = device.answer(header, payload, fds);
            left.retain(|(at, spoil)| {
                if *at == count {
                    spoiled(&mut messages, spoil);
                }
                *at != count
            });
            count += 1;
            Some(messages)
        }));
        let config = ClientConfig { timeout_ms: 1, vectors: 4, max_data: 1 << 20 };
        let Ok(client) = VfioUserClient::connect(stream, AddressSpace::default(), &config) else { return Ok(()) };
        for at in (0x1000..0x8000).step_by(0x7fc).chain([u32::MAX - 3]) {
            if let Some(bell) = client.doorbell(at) {
                prop_assert!(u64::from(at) + 4 <= client.region(region::BAR0).size);
                bell.ring(1);
            }
        }
        let _any = (client.read32(8), client.reset(), client.migration_state(), client.logging_start(4096, &[]));
        let _any = (client.mig_read(100, &mut Vec::new()), client.mig_write(&[1; 5000]), client.look());
        if let Ok(iova) = client.space().map(&buffer(1), true) {
            let _unmapping = client.space().unmap(iova);
        }
        prop_assert_eq!(client.is_gone(), client.why_gone().is_some());
    }
}
