//! What fuzzing has found, and what a hostile host may try against others.

use super::authenticate;
use super::support::*;

/// Everything behind the PDU in error is dropped: no command is executed, no other PDU follows the C2HTermReq.
#[test]
fn nothing_behind_a_protocol_error_is_handled() {
    let mut world = World::new();
    let (mut admin, mut io) = world.associated(BOTH);
    let before = world.target.counters().commands;
    let write = |io: &mut Client, fill: u8| {
        let sqe = io.next(SubmissionEntry::write(1, 3, 1).with_sgl(SglDescriptor::in_capsule(0, 512)));
        capsule(sqe, &[fill; 512], BOTH)
    };
    // In one piece, so that the target finds all of it in its buffer: a wrong header digest between two writes.
    let mut bytes = write(&mut io, 1);
    let at = bytes.len();
    bytes.extend(write(&mut io, 2));
    bytes[at + 72] ^= 1;
    bytes.extend(write(&mut io, 3));
    bytes.extend(capsule(SubmissionEntry::disconnect().with_cid(99), &[], BOTH));
    io.send(&bytes);
    // The first write may be answered before the error is seen, or is lost with the connection.
    let mut last = io.pdu(&mut world).expect("a PDU");
    if io.response(&last).is_some() {
        last = io.pdu(&mut world).expect("C2HTermReq");
    }
    let (term, _) = TermReq::read_from_prefix(&last).expect("C2HTermReq");
    assert_eq!((term.ch.pdu_type, term.fes), (PduType::C2H_TERM_REQ, FatalError::HEADER_DIGEST));
    let late = write(&mut io, 4);
    io.send(&late);
    assert!(io.pdu(&mut world).is_none(), "a PDU behind C2HTermReq");
    drop(io);
    world.poll(20);
    let counters = world.target.counters();
    assert_eq!((counters.commands - before, counters.terminations, counters.header_digest_errors), (1, 1, 1));
    let mut again = world.greeted(Digests::new());
    assert_ok(&again.connect(&mut world, 1, 11, NQN, HOST));
    assert_eq!(again.fetch(&mut world, SubmissionEntry::read(1, 3, 1), 512).1, [1; 512], "the first write alone");
    assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
}

/// After CC.SHN the controller takes nothing more, so the target answers; before, a command had no answer for two minutes.
#[test]
fn after_a_shutdown_commands_are_refused_until_the_controller_is_reset() {
    for abrupt in [1u32 << 14, 2 << 14] {
        let mut world = World::new();
        let (mut admin, mut io) = world.associated(Digests::new());
        assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, (CC | abrupt).into())));
        let identify = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
        for _ in 0..2 {
            assert!(admin.fetch(&mut world, identify, 4096).0.status().is(Status::COMMAND_SEQUENCE));
            assert!(io.run(&mut world, SubmissionEntry::flush(1)).status().is(Status::COMMAND_SEQUENCE));
            world.poll(50);
        }
        let csts = admin.run(&mut world, SubmissionEntry::property_get(offset::CSTS, false));
        assert_eq!(Csts::from_bits(csts.dw0).shst(), dray_nvme::registers::ShutdownStatus::COMPLETE);
        let mut late = world.greeted(Digests::new());
        assert!(late.connect(&mut world, 2, 11, NQN, HOST).status().is(Status::COMMAND_SEQUENCE), "a queue of a controller that stops");
        assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, 0)));
        world.poll(20);
        assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
        world.poll(20);
        assert_ok(&admin.fetch(&mut world, identify, 4096).0);
        let mut io = world.greeted(Digests::new());
        assert_ok(&io.connect(&mut world, 1, 11, NQN, HOST));
        assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    }
}

/// Every Connect that is refused counts, and an association that is ended for doing nothing.
#[test]
fn refused_connects_and_idle_associations_are_counted() {
    let mut world = World::new();
    let (mut admin, mut io) = world.associated(Digests::new());
    assert!(admin.connect(&mut world, 0, 0xFFFF, NQN, HOST).status().is(Status::COMMAND_SEQUENCE));
    assert!(io.connect(&mut world, 1, 11, NQN, HOST).status().is(Status::COMMAND_SEQUENCE));
    let mut idle = world.admin(Digests::new());
    assert_eq!(world.target.counters().connects_refused, 2);
    for _ in 0..31 {
        world.now = world.now.after_ms(4_000);
        assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
    }
    assert!(idle.pdu(&mut world).is_none() && idle.closed);
    assert_eq!(world.target.counters().idle_expired, 1);
}

/// Until it has authenticated a host holds nothing: impostors that connect in its name do not keep it out.
#[test]
fn an_impostor_holds_no_controller_and_no_queue() {
    let secret = Secret::new(None, &[7; 32]).expect("secret");
    let wrong = Secret::new(None, &[8; 32]).expect("secret");
    let mut world = World::with(Limits::default(), vec![access(HOST, Some(secret.clone()))]);
    let connect = |world: &mut World, cntlid: u16| {
        let mut client = world.greeted(Digests::new());
        let done = client.connect(world, 0, cntlid, NQN, HOST);
        assert_ok(&done);
        assert!(ConnectResponse::from_bits(done.dw0).authentication_required());
        client
    };
    let mut impostors: Vec<Client> = (0..10).map(|at| connect(&mut world, [0xffff, 11, 12][at % 3])).collect();
    assert_eq!(world.target.associations().count(), 0);
    let mut admins: Vec<Client> = [0xffff, 12].map(|cntlid| connect(&mut world, cntlid)).into();
    for admin in &mut admins {
        assert!(authenticate(admin, &mut world, &secret));
        assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
        world.poll(4);
    }
    assert_eq!(world.target.associations().map(|(_, cntlid, _)| cntlid).collect::<Vec<_>>(), [11, 12]);
    // Both are taken now, and it shows in Connect.
    let mut late = world.greeted(Digests::new());
    assert!(late.connect(&mut world, 0, 0xffff, NQN, HOST).status().is(fabrics::status::CONTROLLER_BUSY));
    // An impostor's I/O queue is none: the host's own is made beside it.
    let mut false_io = world.greeted(Digests::new());
    assert_ok(&false_io.connect(&mut world, 1, 11, NQN, HOST));
    let mut io = world.greeted(BOTH);
    assert_ok(&io.connect(&mut world, 1, 11, NQN, HOST));
    assert!(authenticate(&mut io, &mut world, &secret));
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    assert!(!authenticate(&mut false_io, &mut world, &wrong));
    // Whoever has the secret and comes second is told by the end of its connection.
    let slow = &mut impostors[0];
    assert!(authenticate(slow, &mut world, &secret));
    assert!(slow.pdu(&mut world).is_none());
    world.now = world.now.after_ms(1_100);
    world.poll(4);
    assert!(slow.pdu(&mut world).is_none() && slow.closed);
    assert_eq!((world.target.counters().late_refusals, world.target.counters().associations), (1, 2));
    drop(impostors);
    world.poll(20);
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    assert_ok(&admins[1].run(&mut world, SubmissionEntry::keep_alive()));
}

/// An I/O queue is promised by one association; it is not made for the next one's controller, which may be another host's.
#[test]
fn a_queue_that_was_promised_ends_with_its_association() {
    let secret = Secret::new(None, &[7; 32]).expect("secret");
    let other = "nqn.2014-08.org.nvmexpress:uuid:other";
    let mut world = World::with(Limits::default(), vec![access(HOST, Some(secret.clone())), access(other, None)]);
    let mut admin = world.greeted(Digests::new());
    assert_ok(&admin.connect(&mut world, 0, 11, NQN, HOST));
    assert!(authenticate(&mut admin, &mut world, &secret));
    assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
    world.poll(4);
    let mut io = world.greeted(Digests::new());
    assert_ok(&io.connect(&mut world, 1, 11, NQN, HOST));
    drop(admin);
    world.poll(20);
    let mut admin = world.greeted(Digests::new());
    assert_ok(&admin.connect(&mut world, 0, 11, NQN, other));
    assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
    world.poll(4);
    assert!(authenticate(&mut io, &mut world, &secret), "the host is who it says");
    io.send(&capsule(SubmissionEntry::flush(1).with_cid(77).with_sgl(SglDescriptor::transport(0)), &[], Digests::new()));
    assert!(io.pdu(&mut world).is_none(), "but has no queue");
    assert_eq!(world.target.counters().late_refusals, 1);
    let mut io = world.greeted(Digests::new());
    assert_ok(&io.connect(&mut world, 1, 11, NQN, other));
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
}

/// A command that follows the last message of authentication at once waits for the queue that is made then.
#[test]
fn commands_wait_for_a_queue_that_was_promised() {
    let secret = Secret::new(None, &[7; 32]).expect("secret");
    let mut world = World::with(Limits::default(), vec![access(HOST, Some(secret.clone()))]);
    let mut admin = world.greeted(Digests::new());
    assert_ok(&admin.connect(&mut world, 0, 11, NQN, HOST));
    assert!(authenticate(&mut admin, &mut world, &secret));
    assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
    world.poll(4);
    let mut io = world.greeted(Digests::new());
    assert_ok(&io.connect(&mut world, 1, 11, NQN, HOST));
    let config = HostAuthConfig {
        host_nqn: HOST.into(),
        subsystem_nqn: NQN.into(),
        secret,
        controller_secret: None,
        hashes: Vec::new(),
        groups: vec![dray_nvme::auth::DhGroup::Null],
    };
    let (mut host, first) = HostAuth::start(config, 1, dray_nvme::auth::Entropy::draw(&mut |bytes| bytes.fill(3)));
    let send = |message: &[u8]| SubmissionEntry::authentication(true, message.len() as u32);
    assert_ok(&io.run_with(&mut world, send(&first), &first));
    let receive = SubmissionEntry::authentication(false, 4096);
    let HostStep::Send(reply) = host.take(&io.fetch(&mut world, receive, 4096).1) else { panic!("no reply") };
    assert_ok(&io.run_with(&mut world, send(&reply), &reply));
    let receive = io.next(receive.with_sgl(SglDescriptor::transport(4096)));
    let flush = io.next(SubmissionEntry::flush(1).with_sgl(SglDescriptor::transport(0)));
    io.send(&[capsule(receive, &[], Digests::new()), capsule(flush, &[], Digests::new())].concat());
    assert_eq!(host.take(&io.fetched(&mut world, receive.cdw0.cid()).1), HostStep::Done);
    assert_ok(&io.done(&mut world, flush.cdw0.cid()));
}

/// Where digests are required, a host that did not ask for both is told so by Connect, and may come again with them.
#[test]
fn a_subsystem_may_require_digests() {
    let mut world = World::requiring_digests();
    for digests in [Digests::new(), Digests::new().with_header(true), Digests::new().with_data(true)] {
        let mut client = world.greeted(digests);
        let done = client.connect(&mut world, 0, 0xFFFF, NQN, HOST);
        assert!(done.status().is(Status::OPERATION_DENIED) && done.status().dnr(), "{digests:?}: {done:?}");
        assert_ok(&client.connect(&mut world, 0, 0xFFFF, DISCOVERY_NQN, HOST));
    }
    let (mut admin, mut io) = world.associated(BOTH);
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    // The same for an I/O queue.
    let mut bare = world.greeted(Digests::new());
    assert!(bare.connect(&mut world, 2, 11, NQN, HOST).status().is(Status::OPERATION_DENIED));
    assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
    let counters = world.target.counters();
    assert_eq!((counters.digests_refused, counters.connects_refused, counters.associations), (4, 4, 1));
}
