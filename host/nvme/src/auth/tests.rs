//! Both ends against each other, against values that another implementation computed, and against the dishonest.

extern crate std;
use super::secret::{ResponseInput, crc32};
use super::*;
use alloc::vec::Vec;
use proptest::prelude::*;
use std::format;
use std::string::ToString;

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:host";
const SUBSYSTEM: &str = "nqn.2026-01.example:subsystem";
/// The example of the specification (Base 2.3 §8.3.5.5.7).
const SPEC_SECRET: &str = "DHHC-1:00:ia6zGodOr4SEG0Zzaw398rpY0wqipUWj4jWjUh4HWUz6aQ2n:";
const HOST_SECRET: &str = "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
const CONTROLLER_SECRET: &str = "DHHC-1:02:QEFCQ0RFRkdISUpLTE1OT1BRUlNUVVZXWFlaW1xdXl9gYWJjZGVmZ2hpamtsbW5voBXMjQ==:";

fn entropy(exponent: u8, challenge: u8, seqnum: u8) -> Entropy {
    let mut values = [exponent, challenge, seqnum].into_iter();
    Entropy::draw(&mut |into| into.fill(values.next().unwrap_or(0)))
}

fn host_config(secret: &str, both: bool) -> HostAuthConfig {
    HostAuthConfig {
        host_nqn: HOST.to_string(),
        subsystem_nqn: SUBSYSTEM.to_string(),
        secret: Secret::parse(secret).expect("a secret"),
        controller_secret: both.then(|| Secret::parse(CONTROLLER_SECRET).expect("a secret")),
        hashes: Vec::new(),
        groups: alloc::vec![DhGroup::Null, DhGroup::Ffdhe2048],
    }
}

fn controller_config(both: bool) -> ControllerAuthConfig {
    let host = host_config(HOST_SECRET, both);
    ControllerAuthConfig {
        host_nqn: host.host_nqn,
        subsystem_nqn: host.subsystem_nqn,
        secret: host.secret,
        controller_secret: host.controller_secret,
        hashes: Vec::new(),
        groups: alloc::vec![DhGroup::Null],
    }
}

fn padded(mut message: Vec<u8>) -> Vec<u8> {
    message.resize(MAX_MESSAGE_BYTES, 0);
    message
}

/// Runs a transaction to its end; what comes from the controller passes through `spoil`.
fn run(
    host: HostAuthConfig,
    controller: &mut ControllerAuth,
    mut spoil: impl FnMut(&mut Vec<u8>),
) -> Result<(), AuthFailure> {
    let (mut host, mut message) = HostAuth::start(host, 0x1234, entropy(0x22, 0x44, 0x66));
    loop {
        controller.take(&message);
        let mut answer = padded(controller.give(MAX_MESSAGE_BYTES).expect("an answer"));
        spoil(&mut answer);
        match host.take(&answer) {
            HostStep::Send(next) => message = next,
            HostStep::Finish(last) => {
                controller.take(&last);
                return Ok(());
            }
            HostStep::Done => return Ok(()),
            HostStep::Failed(failure, last) => {
                if let Some(last) = last {
                    controller.take(&last);
                }
                return Err(failure);
            }
        }
    }
}

#[test]
fn secrets_are_read_and_written() {
    let secret = Secret::parse(SPEC_SECRET).expect("the specification's example");
    assert_eq!(secret.to_text(), SPEC_SECRET);
    for text in [HOST_SECRET, CONTROLLER_SECRET] {
        assert_eq!(Secret::parse(text).expect("a secret").to_text(), text);
    }
    let long = Secret::new(Some(Hash::Sha512), &[0xA5; 64]).expect("a secret");
    assert_eq!(Secret::parse(&long.to_text()).expect("a secret").to_text(), long.to_text());
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    assert_eq!(format!("{long:?}"), "Secret(redacted)");
}

#[test]
fn malformed_secrets_are_refused() {
    let error = |text: &str| Secret::parse(text).expect_err("no secret");
    assert_eq!(error(""), SecretError::Form);
    assert_eq!(error("DHHC-1:00"), SecretError::Form);
    assert_eq!(error(SPEC_SECRET.trim_end_matches(':')), SecretError::Form);
    assert_eq!(error(&SPEC_SECRET.replace("DHHC-1:00", "DHHC-1:04")), SecretError::Hash);
    assert_eq!(error(&SPEC_SECRET.replace("ia6z", "ia7z")), SecretError::Crc);
    assert_eq!(error(&SPEC_SECRET.replace("ia6z", "ia6*")), SecretError::Base64);
    assert_eq!(error(&SPEC_SECRET.replace("ia6z", "ia6")), SecretError::Base64);
    assert_eq!(error("DHHC-1:00:AAAA:"), SecretError::Length);
    assert_eq!(error("DHHC-1:00::"), SecretError::Length);
    // Bits behind the last byte that are not zero: two texts would be one key.
    assert_eq!(error(&CONTROLLER_SECRET.replace("jQ==", "jR==")), SecretError::Base64);
    assert_eq!(error(&CONTROLLER_SECRET.replace("jQ==", "jQ=")), SecretError::Base64);
}

/// The generated-PSK values of the Linux kernel's own tests: HMAC over C1 and C2 with the session key.
#[test]
fn hashes_are_those_of_the_kernels_tests() {
    let series = |from: u8, step: i8, len: usize| -> Vec<u8> {
        (0..len).map(|n| (i32::from(from) + i32::from(step) * n as i32) as u8).collect()
    };
    let expected: [(Hash, [u8; 8]); 3] = [
        (Hash::Sha256, [0x17, 0x33, 0xC5, 0x9F, 0xA7, 0xF4, 0x8F, 0xCF]),
        (Hash::Sha384, [0xF1, 0x4B, 0x2D, 0xD3, 0x23, 0x4C, 0x45, 0x96]),
        (Hash::Sha512, [0x9C, 0x9F, 0x08, 0x9A, 0x61, 0x8B, 0x47, 0xD2]),
    ];
    for (hash, begins) in expected {
        let len = hash.bytes();
        let psk = hash.mac(&series(b'A', 1, len), &[&series(0, 1, len), &series(0xFF, -1, len)]);
        assert_eq!((psk.len(), &psk[..8]), (len, &begins[..]));
    }
}

fn hex(text: &str) -> Vec<u8> {
    let nibble = |byte: u8| (byte as char).to_digit(16).expect("a digit") as u8;
    text.as_bytes().chunks(2).map(|pair| nibble(pair[0]) << 4 | nibble(pair[1])).collect()
}

/// Computed by an independent implementation (Python's hmac, hashlib and pow).
#[test]
fn responses_are_those_of_another_implementation() {
    let group = DhGroup::Ffdhe2048;
    let (x, y) = ([0x11; EXPONENT_BYTES], [0x22; EXPONENT_BYTES]);
    let value = group.public_value(&y);
    let expected = "b8228a3947aeecae57c310f2f0621e1e59150db29b72462c10ac799748673555";
    assert_eq!(Hash::Sha256.digest(&value), hex(expected));
    let shared = group.shared_secret(&x, &value).expect("a secret");
    let host = ResponseInput {
        hash: Hash::Sha384,
        group,
        shared: &shared,
        challenge: &[0x33; 48],
        seqnum: 0x5555_5555,
        t_id: 0x1234,
        role: "HostHost",
        own_nqn: HOST,
        peer_nqn: SUBSYSTEM,
    };
    let expected = "2d56a8c0e7e883a4d0eda0d3e424b9e8de73aa957f6a5b5fba4322fbca40cc8ab72b3771941c4b5a002c84358064b864";
    assert_eq!(host.response(&Secret::parse(HOST_SECRET).expect("a secret")), hex(expected));
    let controller = ResponseInput {
        challenge: &[0x44; 48],
        seqnum: 0x6666_6666,
        role: "Controller",
        own_nqn: SUBSYSTEM,
        peer_nqn: HOST,
        ..host
    };
    let expected = "a0430c21838f40e3a3ea2ec09fb0fa3d36a7d314f3e9841edb2e900603de7c40f592f4328f4325e94834d2f225049748";
    assert_eq!(controller.response(&Secret::parse(CONTROLLER_SECRET).expect("a secret")), hex(expected));
}

#[test]
fn both_ends_agree() {
    for hash in Hash::ALL {
        for group in [DhGroup::Null, DhGroup::Ffdhe2048] {
            for both in [false, true] {
                let mut config = controller_config(both);
                (config.hashes, config.groups) = (alloc::vec![hash], alloc::vec![group]);
                let mut controller = ControllerAuth::new(config, entropy(0x11, 0x33, 0x55));
                run(host_config(HOST_SECRET, both), &mut controller, |_| ()).expect("both are honest");
                assert!(controller.is_authenticated() && controller.failure().is_none());
            }
        }
    }
}

#[test]
fn the_controllers_favourites_are_taken() {
    let mut config = controller_config(false);
    config.hashes = alloc::vec![Hash::Sha256, Hash::Sha512];
    let mut controller = ControllerAuth::new(config, entropy(1, 2, 3));
    let (_, first) = HostAuth::start(host_config(HOST_SECRET, false), 7, entropy(4, 5, 6));
    controller.take(&first);
    assert_eq!(controller.give(47), Err(GiveError::TooLong { needed: 48 }));
    let bytes = controller.give(48).expect("a challenge");
    let (t_id, Message::Challenge(challenge)) = Message::parse(&bytes).expect("a message") else { panic!("a challenge") };
    assert_eq!((t_id, challenge.hash_id, challenge.group_id), (7, 1, 0));
    assert_eq!(controller.give(4096), Err(GiveError::OutOfSequence));
}

#[test]
fn a_wrong_secret_fails_at_both_ends() {
    let mut controller = ControllerAuth::new(controller_config(false), entropy(1, 2, 3));
    let failure = run(host_config(SPEC_SECRET, false), &mut controller, |_| ()).expect_err("another secret");
    assert_eq!(failure, AuthFailure::Peer(Reason::FAILED));
    assert_eq!(controller.failure(), Some(AuthFailure::Own(Reason::FAILED)));
    // The host knows the controller by another secret than the controller has.
    let mut config = controller_config(true);
    config.controller_secret = Some(Secret::parse(SPEC_SECRET).expect("a secret"));
    let mut controller = ControllerAuth::new(config, entropy(1, 2, 3));
    let failure = run(host_config(HOST_SECRET, true), &mut controller, |_| ()).expect_err("another secret");
    assert_eq!(failure, AuthFailure::Own(Reason::FAILED));
    assert_eq!(controller.failure(), Some(AuthFailure::Peer(Reason::FAILED)));
}

#[test]
fn nqns_are_part_of_the_response() {
    let mut host = host_config(SPEC_SECRET, false);
    host.subsystem_nqn.push('x');
    let mut config = controller_config(false);
    config.secret = Secret::parse(SPEC_SECRET).expect("a secret");
    let mut controller = ControllerAuth::new(config, entropy(1, 2, 3));
    assert_eq!(run(host, &mut controller, |_| ()), Err(AuthFailure::Peer(Reason::FAILED)));
}

#[test]
fn a_controller_that_proves_nothing_is_refused() {
    // It has no secret and says "success" without a response.
    let mut controller = ControllerAuth::new(controller_config(false), entropy(1, 2, 3));
    let failure = run(host_config(HOST_SECRET, true), &mut controller, |answer| {
        if answer[..2] == [0, 0xF1] {
            *answer = padded(alloc::vec![1, 3, 0, 0, 0x34, 0x12, 64, 0, 0]);
        }
    });
    assert_eq!(failure, Err(AuthFailure::Own(Reason::FAILED)));
    // With a response that is the host's own, sent back.
    let mut controller = ControllerAuth::new(controller_config(true), entropy(1, 2, 3));
    let failure = run(host_config(HOST_SECRET, true), &mut controller, |answer| {
        if answer[1] == 3 {
            answer[16] ^= 1;
        }
    });
    assert_eq!(failure, Err(AuthFailure::Own(Reason::FAILED)));
    assert!(!controller.is_authenticated());
}

#[test]
fn a_replayed_reply_is_refused() {
    let mut first = ControllerAuth::new(controller_config(false), entropy(1, 2, 3));
    let (mut host, negotiate) = HostAuth::start(host_config(HOST_SECRET, false), 9, entropy(4, 5, 6));
    first.take(&negotiate);
    let HostStep::Send(reply) = host.take(&first.give(4096).expect("a challenge")) else { panic!("a reply") };
    // Another connection has another challenge.
    let mut second = ControllerAuth::new(controller_config(false), entropy(1, 8, 3));
    second.take(&negotiate);
    second.give(4096).expect("a challenge");
    second.take(&reply);
    let answer = second.give(4096).expect("a failure");
    assert_eq!(Message::parse(&answer), Ok((9, Message::Failure1(Failure { reason: Reason::FAILED }))));
    // On the first it works once, and a second time ends it.
    first.take(&reply);
    first.give(4096).expect("success");
    assert!(first.is_authenticated());
    first.take(&reply);
    assert!(!first.is_authenticated());
}

#[test]
fn messages_out_of_place_are_refused() {
    let (_, negotiate) = HostAuth::start(host_config(HOST_SECRET, false), 9, entropy(4, 5, 6));
    let refused = |messages: &[&[u8]], reason: Reason| {
        let mut controller = ControllerAuth::new(controller_config(false), entropy(1, 2, 3));
        for message in messages {
            controller.take(message);
        }
        let answer = controller.give(4096).expect("a failure");
        let (_, message) = Message::parse(&answer).expect("a message");
        assert_eq!(message, Message::Failure1(Failure { reason }));
        assert_eq!(controller.failure(), Some(AuthFailure::Own(reason)));
        controller.take(&negotiate);
        assert_eq!(controller.give(4096), Err(GiveError::OutOfSequence), "there is no way back");
    };
    refused(&[&[]], Reason::INCORRECT_PAYLOAD);
    refused(&[&negotiate[..71]], Reason::INCORRECT_PAYLOAD);
    refused(&[&[1, 4, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], Reason::INCORRECT_MESSAGE);
    refused(&[&[9, 9, 0, 0, 9, 0, 0, 0]], Reason::INCORRECT_MESSAGE);
    refused(&[&negotiate, &negotiate], Reason::INCORRECT_MESSAGE);
    let changed = |at: usize, value: u8| {
        let mut message = negotiate.clone();
        message[at] = value;
        message
    };
    refused(&[&changed(6, 1)], Reason::CONCATENATION_MISMATCH);
    refused(&[&changed(8, 2)], Reason::PROTOCOL_NOT_USABLE);
    refused(&[&changed(7, 0)], Reason::PROTOCOL_NOT_USABLE);
    refused(&[&changed(10, 0)], Reason::HASH_NOT_USABLE);
    refused(&[&changed(10, 31)], Reason::INCORRECT_PAYLOAD);
    refused(&[&changed(11, 0)], Reason::DH_GROUP_NOT_USABLE);
    refused(&[&changed(42, 77)], Reason::DH_GROUP_NOT_USABLE);
    let mut controller = ControllerAuth::new(controller_config(false), entropy(1, 2, 3));
    assert_eq!(controller.give(4096), Err(GiveError::OutOfSequence));
    controller.take(&negotiate);
    controller.give(4096).expect("a challenge");
    controller.take(&[1, 2, 0, 0, 10, 0, 64, 0]);
    assert!(!controller.is_authenticated());
}

#[test]
fn challenges_that_do_not_fit_are_refused() {
    let refused = |change: &dyn Fn(&mut Vec<u8>), reason: Reason| {
        let mut controller = ControllerAuth::new(controller_config(false), entropy(1, 2, 3));
        let failure = run(host_config(HOST_SECRET, false), &mut controller, |answer| change(answer));
        assert_eq!(failure, Err(AuthFailure::Own(reason)));
        assert_eq!(controller.failure(), Some(AuthFailure::Peer(reason)), "the controller is told");
    };
    refused(&|answer| answer[4] ^= 1, Reason::INCORRECT_MESSAGE);
    refused(&|answer| answer[1] = 3, Reason::INCORRECT_MESSAGE);
    refused(&|answer| answer[6] = 33, Reason::INCORRECT_PAYLOAD);
    refused(&|answer| answer[6] = 32, Reason::HASH_NOT_USABLE);
    refused(&|answer| answer[8] = 4, Reason::HASH_NOT_USABLE);
    refused(&|answer| answer[9] = 3, Reason::DH_GROUP_NOT_USABLE);
    refused(&|answer| answer[9] = 1, Reason::INCORRECT_PAYLOAD);
    refused(&|answer| answer[11] = 1, Reason::INCORRECT_PAYLOAD);
    refused(&|answer| answer[11] = 0xFF, Reason::INCORRECT_PAYLOAD);
    refused(&|answer| answer.truncate(79), Reason::INCORRECT_PAYLOAD);
    // A group that was offered, and a public value of zeroes.
    refused(&|answer| (answer[9], answer[11]) = (1, 1), Reason::INCORRECT_PAYLOAD);
}

proptest! {
    #[test]
    fn no_bytes_panic_and_none_authenticate(
        messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 1..4),
        kind in 0usize..4,
    ) {
        let (mut host, negotiate) = HostAuth::start(host_config(HOST_SECRET, true), 9, entropy(4, 5, 6));
        let mut controller = ControllerAuth::new(controller_config(true), entropy(1, 2, 3));
        controller.take(&negotiate);
        controller.give(4096).expect("a challenge");
        for mut message in messages {
            // Often a message of the right kind, so that its fields are reached.
            let heads: [&[u8]; 4] = [&[1, 1, 0, 0, 9, 0, 64, 0, 3, 0, 0, 0], &[1, 2, 0, 0, 9, 0, 64], &[1, 3, 0, 0, 9, 0, 64, 0, 1], &[]];
            for (byte, head) in message.iter_mut().zip(heads[kind]) {
                *byte = *head;
            }
            let _parsed = Message::parse(&message);
            controller.take(&message);
            let _answer = controller.give(4096);
            prop_assert!(!controller.is_authenticated());
            let step = host.take(&message);
            prop_assert!(!matches!(step, HostStep::Done | HostStep::Finish(_)));
        }
    }
}
