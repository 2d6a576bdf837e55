//! Whatever a client sends, it gets a reply or is disconnected, and the server lives on.

use crate::rig::{Failure, Rig, errno, event};
use dray_device::vfio_user::wire::{Header, command, errno as code, flags};
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::VfioUserConfig;
use proptest::prelude::*;
use std::os::fd::AsFd;
use zerocopy::IntoBytes;

fn lives_on(rig: &mut Rig) {
    rig.reconnect();
    rig.hello().expect("the next client is served");
}

#[test]
fn headers_that_make_no_sense_disconnect() {
    let good = Header::command(1, command::GET_INFO, 16);
    let limit = 16 + 32 + (1 << 20);
    for bad in [
        Header { size: 0, ..good },
        Header { size: 15, ..good },
        Header { size: limit + 1, ..good },
        Header { size: u32::MAX, ..good },
        Header { flags: flags::REPLY, ..good },
        Header { flags: 7, ..good },
    ] {
        let mut rig = Rig::new();
        rig.send(bad, &[0; 16], &[]);
        assert_eq!(rig.reply(10).map(|_| ()), Err(Failure::Closed), "{bad:?}");
        assert_eq!(rig.server.counters().broken_protocol, 1);
        lives_on(&mut rig);
    }
}

#[test]
fn every_command_checks_its_size_before_it_reads() {
    let mut rig = Rig::new();
    for command in 0..32 {
        if command == command::RESET {
            continue;
        }
        let least = [0, 0, 32, 24, 16, 32, 16, 16, 20, 16, 16, 0, 0, 0, 0, 8, 8, 8, 8];
        let least: usize = least.get(usize::from(command)).copied().unwrap_or(0);
        for len in 0..least.max(1) {
            let payload = vec![0xff; len];
            assert_eq!(errno(rig.ask(command, &payload)), code::EINVAL, "command {command} with {len} bytes");
        }
    }
    assert_eq!(errno(rig.ask(99, &[0; 64])), code::EINVAL);
    assert_eq!(rig.server.counters().requests, rig.server.counters().refused + 1);
}

#[test]
fn a_first_message_that_is_not_a_good_version_ends_the_connection() {
    for (command, payload) in [
        (command::GET_INFO, &[16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..]),
        (command::VERSION, &[0, 0][..]),
        (command::VERSION, &[1, 0, 0, 0]),
        (command::VERSION, b"\0\0\0\0{}"),
        (command::VERSION, b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":\"x\"}}\0"),
    ] {
        let mut rig = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
        assert_eq!(errno(rig.ask(command, payload)), code::EINVAL);
        assert_eq!(rig.reply(10).map(|_| ()), Err(Failure::Closed));
        lives_on(&mut rig);
    }
    let mut rig = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
    let result = rig.ask_with(command::VERSION, &[0; 4], &[event().as_fd()]);
    assert_eq!(errno(result), code::EINVAL, "descriptors have no place there");
    assert_eq!(rig.server.counters().stray_fds, 1);
}

#[test]
fn a_message_may_come_byte_by_byte_and_its_end_never() {
    let mut rig = Rig::new();
    let header = Header::command(9, command::GET_INFO, 16);
    let bytes = [header.as_bytes(), &16u128.to_le_bytes()].concat();
    for byte in &bytes {
        use dray_device::socket::Stream;
        rig.client.send(&[std::io::IoSlice::new(&[*byte])], &[]).expect("send");
        rig.poll();
    }
    assert_eq!(rig.reply(10).expect("reply").0.id, 9);
    rig.send(Header { size: 1 << 20, ..header }, &[1; 100], &[]);
    assert_eq!(rig.reply(10).map(|_| ()), Err(Failure::Nothing));
    lives_on(&mut rig);
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
}

#[test]
fn descriptors_that_nobody_takes_are_closed() {
    // Other tests run beside this one: what counts is that the client's own eventfd has no other owner left.
    let owners = |id: u64| {
        let list = std::fs::read_dir("/proc/self/fdinfo").expect("descriptors");
        let texts = list.flatten().filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
        texts.filter(|text| text.lines().any(|line| line == format!("eventfd-count: {id:16x}"))).count()
    };
    assert!(open_descriptors() > 0);
    let mut rig = Rig::new();
    let marked = event();
    let id = 0x1234_5678_9abc;
    rustix::io::write(&marked, &u64::to_ne_bytes(id)).expect("mark");
    let fds = [marked.as_fd(); 16];
    for command in 0..20 {
        let _any = rig.ask_with(command, &[0; 64], &fds[..usize::from(command) % 16 + 1]);
    }
    assert_eq!(owners(id), 1, "after requests");
    rig.send(Header { size: 1 << 20, ..Header::command(1, command::SET_IRQS, 0) }, &[0; 64], &fds);
    rig.poll();
    assert_eq!(owners(id), 17, "a request that is not whole");
    lives_on(&mut rig);
    assert_eq!(owners(id), 1, "after the client's end");
    assert!(rig.server.counters().stray_fds >= 20);
}

#[derive(Clone, Debug)]
struct Message {
    command: u16,
    flags: u32,
    payload: Vec<u8>,
    fds: usize,
}

/// Words that are near to something that means something.
fn word() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..40,
        2 => Just(4096u32),
        1 => Just(0x10_0000u32),
        1 => prop::sample::select(vec![1u32 << 16, 1 << 17, 1 << 18, 0x1_0001, 0x2_0002, 0x2_0006, 0x1_0008]),
        1 => any::<u32>(),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    let payload = prop::collection::vec(word(), 0..24).prop_flat_map(|words| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let len = bytes.len();
        (Just(bytes), 0..=3usize.min(len)).prop_map(|(mut bytes, cut)| {
            bytes.truncate(bytes.len() - cut);
            bytes
        })
    });
    let flags = prop_oneof![9 => Just(0u32), 1 => Just(flags::NO_REPLY)];
    (0u16..20, flags, payload, 0usize..4).prop_map(|(command, flags, payload, fds)| Message { command, flags, payload, fds })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_request_gets_one_reply(messages in prop::collection::vec(message(), 1..40)) {
        let mut rig = Rig::new();
        rig.plug();
        let memory = crate::rig::memfd(1 << 20);
        let event = event();
        let fds = [memory.as_fd(), event.as_fd(), memory.as_fd(), event.as_fd()];
        for (i, message) in messages.iter().enumerate() {
            let mut header = Header::command(i as u16, message.command, message.payload.len());
            header.flags = message.flags;
            let skip = i % 2;
            rig.send(header, &message.payload, &fds[skip..(skip + message.fds).min(4)]);
            if message.flags & flags::NO_REPLY == 0 {
                let (reply, payload, _) = rig.reply(400_000).expect("a reply");
                prop_assert_eq!((reply.id, reply.command), (i as u16, message.command));
                prop_assert!(reply.failure().is_none() || payload.is_empty());
            }
        }
        lives_on(&mut rig);
    }

    #[test]
    fn any_bytes_end_in_replies_or_a_disconnect(bytes in prop::collection::vec(any::<u8>(), 0..400), version in any::<bool>()) {
        let mut rig = Rig::raw(VfioUserConfig::default(), Box::new(NoMigration));
        if version {
            rig.hello().expect("version");
        }
        use dray_device::socket::Stream;
        let _sent = rig.client.send(&[std::io::IoSlice::new(&bytes)], &[]);
        for _ in 0..20 {
            rig.poll();
        }
        lives_on(&mut rig);
    }
}
