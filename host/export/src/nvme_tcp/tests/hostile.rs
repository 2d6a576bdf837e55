//! What fuzzing has found, and what a hostile host may try against others.

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
