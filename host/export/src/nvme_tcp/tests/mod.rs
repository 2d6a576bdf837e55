//! The target over socket pairs, a real subsystem behind it.

mod hostile;
mod support;

use support::*;

#[test]
fn a_host_connects_identifies_writes_and_reads() {
    for digests in [Digests::new(), Digests::new().with_header(true), Digests::new().with_data(true), BOTH] {
        let mut world = World::new();
        let (mut admin, mut io) = world.associated(digests);
        let cap = admin.run(&mut world, SubmissionEntry::property_get(offset::CAP, true));
        assert_eq!(Cap::from_bits(cap.result64()).mqes(), 127);
        let (done, page) = admin.fetch(&mut world, SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM), 4096);
        assert_ok(&done);
        assert_eq!(&page[1792..1806], &[4, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0], "IOCCSZ to OFCS");
        assert_eq!((page[343], page[344], page[348]), (0xDF, 1, 1), "ANA");
        let page = IdentifyController::read_from_bytes(&page).expect("page");
        assert_eq!((page.cntlid, page.serial(), page.subnqn[..NQN.len()].as_bytes()), (11, Some("EXPORTED"), NQN.as_bytes()));
        assert!(page.kas > 0 && page.maxcmd == 128 && page.cmic.ana() && page.sgls == 0x30_0002);
        let (_, page) = admin.fetch(&mut world, SubmissionEntry::identify(Cns::NAMESPACE, 1, 0, CommandSetId::NVM), 4096);
        assert_eq!(IdentifyNamespace::read_from_bytes(&page).expect("page").anagrpid, 1);
        assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
        for (seed, len) in [(1u8, 512), (2, 4096), (3, 8192), (4, 12288), (5, 512 << 10)] {
            let data = pattern(seed, len);
            let slba = u64::from(seed) * 8;
            let blocks = (len / 512) as u32;
            if len <= 8192 {
                assert_ok(&io.run_with(&mut world, SubmissionEntry::write(1, slba, blocks), &data));
            } else {
                assert_ok(&io.write(&mut world, slba, &data, 40_000).0);
            }
            let (done, back) = io.fetch(&mut world, SubmissionEntry::read(1, slba, blocks), len as u32);
            assert_ok(&done);
            assert!(back == data, "{len} bytes");
        }
        assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
        // A host sends room for 256 ranges, whatever their number.
        let mut ranges = vec![0; 4096];
        ranges[4] = 8;
        assert_ok(&io.run_with(&mut world, SubmissionEntry::dsm(1, 1), &ranges));
        assert_eq!(world.target.counters().terminations, 0);
    }
}

#[test]
fn long_writes_are_asked_for_in_pieces() {
    let mut world = World::with(Limits { max_h2c_bytes: 16 << 10, ..Limits::default() }, vec![access(HOST, None)]);
    let (_admin, mut io) = world.associated(BOTH);
    let data = pattern(8, 100 << 10);
    let (done, asked) = io.write(&mut world, 16, &data, 4096);
    assert_ok(&done);
    assert_eq!(asked, 7);
    let (_, back) = io.fetch(&mut world, SubmissionEntry::read(1, 16, 200), 100 << 10);
    assert!(back == data);
}

#[test]
fn commands_wait_for_memory_and_none_is_lost() {
    let limits = Limits { max_transfer_bytes: 64 << 10, pool_bytes: 128 << 10, ..Limits::default() };
    let mut world = World::with(limits, vec![access(HOST, None)]);
    let (_admin, mut io) = world.associated(Digests::new());
    let data = pattern(3, 48 << 10);
    // Writes take the whole pool before their data can come; reads are sent behind them, data behind those.
    let mut commands = Vec::new();
    for i in 0..4u16 {
        let sqe = SubmissionEntry::write(1, u64::from(i) * 96, 96).with_sgl(SglDescriptor::transport(48 << 10));
        commands.extend(capsule(sqe.with_cid(i), &[], Digests::new()));
    }
    for i in 4..8u16 {
        let sqe = SubmissionEntry::read(1, 0, 96).with_sgl(SglDescriptor::transport(48 << 10));
        commands.extend(capsule(sqe.with_cid(i), &[], Digests::new()));
    }
    io.send(&commands);
    let mut ended = 0;
    while ended < 8 {
        let bytes = io.pdu(&mut world).expect("a PDU");
        match PduType(bytes[0]) {
            PduType::R2T => {
                let r2t = R2t::read_from_bytes(&bytes).expect("R2T");
                let bytes = h2c(r2t.cccid, r2t.ttag, 0, true, &data, Digests::new());
                io.send_all(&mut world, &bytes);
            }
            PduType::CAPSULE_RESP => {
                assert_ok(&io.response(&bytes).expect("response"));
                ended += 1;
            }
            kind => {
                assert_eq!(kind, PduType::C2H_DATA);
                ended += u16::from(PduFlags::from_bits(bytes[1]).success());
            }
        }
    }
}

#[test]
fn several_queues_and_hosts_do_not_mix() {
    let mut world = World::with(Limits::default(), vec![access(HOST, None)]);
    let (_first, mut one) = world.associated(Digests::new());
    let (_second, mut two) = world.associated(BOTH);
    let mut third = world.greeted(Digests::new());
    assert!(third.connect(&mut world, 0, 0xFFFF, NQN, HOST).status().is(fabrics::status::CONTROLLER_BUSY));
    for round in 0..20u8 {
        let (a, b) = (pattern(round, 4096), pattern(round ^ 0x80, 4096));
        let write = |slba| SubmissionEntry::write(1, slba, 8);
        let x = one.next(write(0).with_sgl(SglDescriptor::in_capsule(0, 4096)));
        let y = two.next(write(8).with_sgl(SglDescriptor::in_capsule(0, 4096)));
        // Halves of both, in turn.
        let (x_bytes, y_bytes) = (capsule(x, &a, one.digests), capsule(y, &b, two.digests));
        one.send(&x_bytes[..1000]);
        two.send(&y_bytes[..77]);
        world.poll(3);
        two.send(&y_bytes[77..]);
        one.send(&x_bytes[1000..]);
        assert_ok(&one.done(&mut world, x.cdw0.cid()));
        assert_ok(&two.done(&mut world, y.cdw0.cid()));
        assert!(two.fetch(&mut world, SubmissionEntry::read(1, 0, 8), 4096).1 == a);
        assert!(one.fetch(&mut world, SubmissionEntry::read(1, 8, 8), 4096).1 == b);
    }
}

#[test]
fn connect_is_refused_for_what_is_wrong_with_it() {
    let mut world = World::new();
    let invalid = fabrics::status::INVALID_PARAMETERS;
    let cases: [(&str, &str, u16, Status, u32); 4] = [
        ("nqn.2025-01.io.dray:other", HOST, 0xFFFF, invalid, 1 << 16 | 256),
        (NQN, "nqn.2014-08.org:unlisted", 0xFFFF, fabrics::status::INVALID_HOST, 0),
        (NQN, "no name", 0xFFFF, invalid, 1 << 16 | 512),
        (NQN, HOST, 99, invalid, 1 << 16 | 16),
    ];
    for (nqn, host, cntlid, status, dw0) in cases {
        let mut client = world.greeted(Digests::new());
        let done = client.connect(&mut world, 0, cntlid, nqn, host);
        assert!(done.status().is(status) && done.dw0 == dw0, "{nqn} {host}: {done:?}");
    }
    assert_eq!(world.target.counters().hosts_refused, 1);
    let mut client = world.greeted(Digests::new());
    let large = SubmissionEntry::connect(0, 4096, ConnectAttributes::new(), 0);
    assert_eq!(client.connect_with(&mut world, large, 0xFFFF, NQN, HOST).dw0, 44);
    let mut sqe = SubmissionEntry::connect(0, 32, ConnectAttributes::new(), 0);
    sqe.cdw10 |= 7;
    assert!(client.connect_with(&mut world, sqe, 0xFFFF, NQN, HOST).status().is(fabrics::status::INCOMPATIBLE_FORMAT));
    assert!(client.run(&mut world, SubmissionEntry::keep_alive()).status().is(Status::COMMAND_SEQUENCE));
    assert!(client.connect(&mut world, 1, 11, NQN, HOST).status().is(invalid), "no association");
    // The one asked for.
    let done = client.connect(&mut world, 0, 12, NQN, HOST);
    assert_eq!(ConnectResponse::from_bits(done.dw0).cntlid(), 12);
    let mut io = world.greeted(Digests::new());
    assert!(io.connect(&mut world, 1, 12, NQN, HOST).status().is(Status::COMMAND_SEQUENCE), "not enabled");
}

#[test]
fn what_fabrics_forbids_is_refused() {
    let mut world = World::new();
    let (mut admin, mut io) = world.associated(Digests::new());
    for opcode in [
        AdminOpcode::CREATE_IO_SQ,
        AdminOpcode::CREATE_IO_CQ,
        AdminOpcode::DELETE_IO_SQ,
        AdminOpcode::DELETE_IO_CQ,
        AdminOpcode::DOORBELL_BUFFER_CONFIG,
        AdminOpcode::CONTROLLER_DATA_QUEUE,
    ] {
        assert!(admin.run(&mut world, SubmissionEntry::admin(opcode)).status().is(Status::INVALID_OPCODE), "{opcode}");
    }
    let prp = io.next(SubmissionEntry::read(1, 0, 1).with_prps(4096, 0));
    io.send(&capsule(prp, &[], Digests::new()));
    assert!(io.done(&mut world, prp.cdw0.cid()).status().is(Status::INVALID_FIELD));
    let cases = [
        (SglDescriptor::data_block(0, 512), Status::SGL_TYPE_INVALID),
        (SglDescriptor::in_capsule(0, 512), Status::SGL_TYPE_INVALID),
        (SglDescriptor::transport(1024), Status::SGL_DATA_LENGTH_INVALID),
        (SglDescriptor::transport(0), Status::SGL_DATA_LENGTH_INVALID),
        (SglDescriptor::transport(1 << 30), Status::INVALID_FIELD),
    ];
    for (sgl, status) in cases {
        let sqe = io.next(SubmissionEntry::read(1, 0, 1).with_sgl(sgl));
        io.send(&capsule(sqe, &[], Digests::new()));
        let done = io.done(&mut world, sqe.cdw0.cid());
        assert!(done.status().is(status), "{sgl:?}: {done:?}");
    }
    let wide = io.next(SubmissionEntry::write(1, 0, 1).with_sgl(SglDescriptor::in_capsule(8, 512)));
    io.send(&capsule(wide, &[0; 512], Digests::new()));
    assert!(io.done(&mut world, wide.cdw0.cid()).status().is(Status::SGL_OFFSET_INVALID));
    // Long enough for one page list that was never written: a log page longer than its SGL.
    let log = SubmissionEntry::get_log_page(LogId::EFFECTS, 0, 0, 1024 * 16, false);
    assert!(admin.fetch(&mut world, log, 4096).0.status().is(Status::SGL_DATA_LENGTH_INVALID));
    let (done, page) = admin.fetch(&mut world, log, 65536);
    assert_ok(&done);
    assert_eq!(page.len(), 65536);
    assert!(io.run(&mut world, SubmissionEntry::property_get(0, true)).status().is(Status::INVALID_FIELD), "on an I/O queue");
    assert!(admin.run(&mut world, SubmissionEntry::property_get(0x100, true)).status().is(Status::INVALID_FIELD));
}

#[test]
fn every_protocol_error_ends_the_connection_with_its_code() {
    let header = FatalError::INVALID_HEADER_FIELD;
    let mut world = World::new();
    let (_admin, mut io) = world.associated(Digests::new());
    let before = world.target.counters().terminations;
    // Before ICReq is answered.
    let request = |change: &dyn Fn(&mut [u8])| {
        let ch = CommonHeader { pdu_type: PduType::IC_REQ, hlen: 128, plen: 128, ..Default::default() };
        let mut bytes = IcReq { ch, ..Default::default() }.as_bytes().to_vec();
        change(&mut bytes);
        bytes
    };
    let flush = |_: u8| capsule(SubmissionEntry::flush(1), &[], Digests::new());
    let first: Vec<(Vec<u8>, FatalError, u32)> = vec![
        (request(&|b| b[8] = 1), FatalError::UNSUPPORTED_PARAMETER, field::PFV),
        (request(&|b| b[10] = 32), header, field::PDA),
        (request(&|b| b[2] = 64), header, field::HLEN),
        (request(&|b| b[4] = 64), header, field::PLEN),
        (request(&|b| b[1] = 1), header, field::FLAGS),
        (flush(0), FatalError::SEQUENCE, 0),
        (vec![0x55; 128], header, field::PDU_TYPE),
    ];
    let mut count = first.len() as u64;
    for (bytes, fes, fei) in first {
        let mut client = world.client();
        client.send(&bytes);
        assert_eq!(client.terminated(&mut world), (fes, fei), "{bytes:?}");
        assert!(client.pdu(&mut world).is_none() , "nothing more");
    }
    // Afterwards.
    let change = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = flush(0);
        change(&mut bytes);
        bytes
    };
    let with_data = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = capsule(SubmissionEntry::write(1, 0, 1), &[0; 512], Digests::new());
        change(&mut bytes);
        bytes
    };
    let data = |cccid, ttag| h2c(cccid, ttag, 0, true, &[0; 512], Digests::new());
    let then: Vec<(Vec<u8>, FatalError, u32)> = vec![
        (request(&|_| {}), FatalError::SEQUENCE, 0),
        (change(&|b| b[0] = 9), header, field::PDU_TYPE),
        (change(&|b| b[0] = 7), header, field::PDU_TYPE),
        (change(&|b| b[2] = 80), header, field::HLEN),
        (change(&|b| b[1] = 1), header, field::FLAGS),
        (change(&|b| b[4] = 71), header, field::PLEN),
        (with_data(&|b| b[1] = 2), header, field::FLAGS),
        (with_data(&|b| b[3] = 70), header, field::PDO),
        (with_data(&|b| b[3] = 74), header, field::PDO),
        (with_data(&|b| b[6] = 1), header, field::PLEN),
        (data(1, 5), header, field::TTAG),
    ];
    count += then.len() as u64;
    for (bytes, fes, fei) in then {
        let mut client = world.greeted(Digests::new());
        client.send(&bytes);
        assert_eq!(client.terminated(&mut world), (fes, fei), "{bytes:?}");
    }
    assert_eq!(world.target.counters().terminations - before, count);
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
}

#[test]
fn data_that_was_not_asked_for_ends_the_connection() {
    let header = FatalError::INVALID_HEADER_FIELD;
    type Wrong = fn(u16, u16) -> Vec<u8>;
    const NONE: Digests = Digests::new();
    let cases: [(Wrong, FatalError, u32); 6] = [
        (|cid, tag| h2c(cid, tag ^ 1, 0, true, &[0; 16384], NONE), header, field::TTAG),
        (|cid, tag| h2c(cid ^ 1, tag, 0, true, &[0; 16384], NONE), header, field::CCCID),
        (|cid, tag| h2c(cid, tag, 4096, true, &[0; 12288], NONE), header, field::DATAO),
        (|cid, tag| h2c(cid, tag, 4096, true, &[0; 16384], NONE), FatalError::DATA_OUT_OF_RANGE, 0),
        (|cid, tag| h2c(cid, tag, 0, false, &[0; 16384], NONE), header, field::FLAGS),
        (|cid, tag| h2c(cid, tag, 0, true, &vec![0; 256 << 10], NONE), FatalError::LIMIT_EXCEEDED, 0),
    ];
    for (wrong, fes, fei) in cases {
        let mut world = World::new();
        let (_admin, mut io) = world.associated(NONE);
        let sqe = io.next(SubmissionEntry::write(1, 0, 32).with_sgl(SglDescriptor::transport(16384)));
        io.send(&capsule(sqe, &[], NONE));
        let r2t = R2t::read_from_bytes(&io.pdu(&mut world).expect("R2T")).expect("R2T");
        io.send(&wrong(r2t.cccid, r2t.ttag)[..1024]);
        assert_eq!(io.terminated(&mut world), (fes, fei));
    }
}

#[test]
fn wrong_digests_end_the_connection_or_the_command() {
    let mut world = World::new();
    let (_admin, mut io) = world.associated(BOTH);
    let write = |io: &mut Client| io.next(SubmissionEntry::write(1, 0, 1).with_sgl(SglDescriptor::in_capsule(0, 512)));
    let sqe = write(&mut io);
    let mut bytes = capsule(sqe, &pattern(1, 512), BOTH);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    io.send(&bytes);
    assert!(io.done(&mut world, sqe.cdw0.cid()).status().is(Status::TRANSIENT_TRANSPORT));
    assert!(io.fetch(&mut world, SubmissionEntry::read(1, 0, 1), 512).1 == [0; 512], "nothing was written");
    // The same in data that was asked for.
    let sqe = io.next(SubmissionEntry::write(1, 0, 32).with_sgl(SglDescriptor::transport(16384)));
    io.send(&capsule(sqe, &[], BOTH));
    let bytes = io.pdu(&mut world).expect("R2T");
    let (r2t, _) = R2t::read_from_prefix(&bytes).expect("R2T");
    let mut bytes = h2c(r2t.cccid, r2t.ttag, 0, true, &[1; 16384], BOTH);
    bytes[100] ^= 1;
    io.send(&bytes);
    assert!(io.done(&mut world, sqe.cdw0.cid()).status().is(Status::TRANSIENT_TRANSPORT));
    let sqe = write(&mut io);
    let mut bytes = capsule(sqe, &[0; 512], BOTH);
    bytes[20] ^= 1;
    let digest = u32::from_le_bytes(bytes[72..76].try_into().expect("digest"));
    io.send(&bytes);
    assert_eq!(io.terminated(&mut world), (FatalError::HEADER_DIGEST, digest));
    let counters = world.target.counters();
    assert_eq!((counters.data_digest_errors, counters.header_digest_errors, counters.terminations), (2, 1, 1));
}

#[test]
fn an_association_ends_with_its_keep_alive_timer_and_the_controller_is_free() {
    let mut world = World::new();
    let (mut admin, mut io) = world.associated(Digests::new());
    for _ in 0..3 {
        world.now = world.now.after_ms(4000);
        assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
    }
    world.now = world.now.after_ms(6100);
    assert!(admin.pdu(&mut world).is_none() && io.pdu(&mut world).is_none());
    assert!(admin.closed && io.closed);
    assert_eq!((world.target.counters().keep_alive_expired, world.target.connections()), (1, 0));
    assert!(world.target.is_idle());
    let (_admin, mut io) = world.associated(Digests::new());
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    assert_eq!(world.cntlid(), 11);
}

#[test]
fn a_lost_admin_connection_ends_the_association_and_a_lost_queue_only_itself() {
    let mut world = World::new();
    let (admin, io) = world.associated(Digests::new());
    let mut second = world.greeted(Digests::new());
    assert_ok(&second.connect(&mut world, 2, 11, NQN, HOST));
    drop(io);
    world.poll(20);
    assert_ok(&second.run(&mut world, SubmissionEntry::flush(1)));
    let mut again = world.greeted(Digests::new());
    assert_ok(&again.connect(&mut world, 1, 11, NQN, HOST));
    assert_ok(&again.run(&mut world, SubmissionEntry::flush(1)));
    // Disconnect is answered, and the queue can be made again.
    assert_ok(&again.run(&mut world, SubmissionEntry::disconnect()));
    drop(again);
    world.poll(20);
    let mut again = world.greeted(Digests::new());
    assert_ok(&again.connect(&mut world, 1, 11, NQN, HOST));
    drop(admin);
    assert!(again.pdu(&mut world).is_none() && second.pdu(&mut world).is_none());
    world.poll(20);
    assert!(world.target.is_idle());
    // A controller reset by the host ends the I/O queues, and the controller can be enabled again.
    let (mut admin, mut io) = world.associated(Digests::new());
    assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, 0)));
    assert!(io.pdu(&mut world).is_none() && io.closed);
    assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
    world.poll(4);
    let mut io = world.greeted(Digests::new());
    assert_ok(&io.connect(&mut world, 1, 11, NQN, HOST));
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
}

#[test]
fn half_open_connections_are_bounded_and_end() {
    let mut world = World::with(
        Limits { connections: 100, half_open: 10, ..Limits::default() },
        vec![access(HOST, None)],
    );
    let (mut admin, mut io) = world.associated(Digests::new());
    let clients: Vec<_> = (0..1000).map(|_| world.client()).collect();
    world.poll(2);
    assert_eq!((world.target.connections(), world.target.counters().evicted), (12, 990));
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    for _ in 0..3 {
        world.now = world.now.after_ms(3500);
        assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
    }
    assert_eq!((world.target.connections(), world.target.counters().handshake_timeouts), (2, 10));
    drop(clients);
}

#[test]
fn a_client_that_does_not_read_is_bounded_and_disconnected_alone() {
    let mut world = World::new();
    let (mut admin, mut io) = world.associated(Digests::new());
    let mut lazy = world.greeted(Digests::new());
    assert_ok(&lazy.connect(&mut world, 2, 11, NQN, HOST));
    let read = SubmissionEntry::read(1, 0, 256).with_sgl(SglDescriptor::transport(128 << 10));
    let flood: Vec<u8> = (0..32).flat_map(|cid| capsule(read.with_cid(cid), &[], Digests::new())).collect();
    for _ in 0..50 {
        let _full = lazy.stream.send(&[IoSlice::new(&flood)], &[]);
        world.poll(20);
    }
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    for _ in 0..8 {
        world.now = world.now.after_ms(4000);
        assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
    }
    world.poll(20);
    let counters = world.target.counters();
    assert_eq!(counters.stalled + counters.terminations, 1, "{counters:?}");
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
}

#[test]
fn behind_a_fence_commands_wait() {
    let mut world = World::new();
    let (_admin, mut io) = world.associated(Digests::new());
    world.fences[0].raise();
    let sqe = io.next(SubmissionEntry::flush(1).with_sgl(SglDescriptor::transport(0)));
    io.send(&capsule(sqe, &[], Digests::new()));
    assert!(io.pdu(&mut world).is_none() && !io.closed);
    world.fences[0].lower();
    assert_ok(&io.done(&mut world, sqe.cdw0.cid()));
}

#[test]
fn a_controller_that_goes_away_ends_its_association() {
    let mut world = World::new();
    let (mut admin, _io) = world.associated(Digests::new());
    world.slots[0].unplug();
    assert!(admin.pdu(&mut world).is_none() && admin.closed);
    let (_admin, mut io) = world.associated(Digests::new());
    assert_eq!(world.cntlid(), 12);
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
}

#[test]
fn discovery_tells_what_a_host_may_have_and_when_it_changes() {
    let mut world = World::new();
    for (host, count) in [(HOST, 2), ("nqn.2014-08.org:unlisted", 1)] {
        let mut client = world.greeted(Digests::new());
        assert_ok(&client.connect(&mut world, 0, 0xFFFF, DISCOVERY_NQN, host));
        assert_ok(&client.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
        let csts = client.run(&mut world, SubmissionEntry::property_get(offset::CSTS, false));
        assert!(Csts::from_bits(csts.dw0).rdy());
        let (done, page) = client.fetch(&mut world, SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM), 4096);
        assert_ok(&done);
        assert_eq!(page[111], 2, "CNTRLTYPE");
        let log = SubmissionEntry::get_log_page(DISCOVERY_LOG, 0, 0, 768, false);
        let (done, page) = client.fetch(&mut world, log, 3072);
        assert_ok(&done);
        assert_eq!(page[8], count);
        let entry = DiscoveryEntry::read_from_bytes(&page[1024..2048]).expect("entry");
        let nqn = if count == 2 { NQN } else { DISCOVERY_NQN };
        assert_eq!((&entry.subnqn[..nqn.len()], &entry.trsvcid[..4], &entry.traddr[..9]), (nqn.as_bytes(), &b"4420"[..], &b"127.0.0.1"[..]));
        let fid = dray_nvme::feature::FeatureId::ASYNC_EVENT_CONFIG;
        assert_ok(&client.run(&mut world, SubmissionEntry::set_features(fid, DISCOVERY_CHANGE_NOTICE, false)));
        let aer = client.next(SubmissionEntry::async_event_request().with_sgl(SglDescriptor::transport(0)));
        client.send(&capsule(aer, &[], Digests::new()));
        world.poll(5);
        assert!(world.target.set_hosts(NQN, vec![access(HOST, None)], false));
        assert_eq!(client.done(&mut world, aer.cdw0.cid()).dw0, DISCOVERY_CHANGE.into_bits());
    }
}

#[test]
fn ana_is_reported_and_its_changes_as_well() {
    let mut world = World::new();
    let (mut admin, mut io) = world.associated(Digests::new());
    let log = SubmissionEntry::get_log_page(LogId::ANA, 0, 0, 13, false);
    let (done, page) = admin.fetch(&mut world, log, 52);
    assert_ok(&done);
    assert_eq!((page[8], page[16], page[20], page[32], page[48]), (1, 1, 1, 1, 1));
    let fid = dray_nvme::feature::FeatureId::ASYNC_EVENT_CONFIG;
    assert_ok(&admin.run(&mut world, SubmissionEntry::set_features(fid, 1 << 11, false)));
    let aer = admin.next(SubmissionEntry::async_event_request().with_sgl(SglDescriptor::transport(0)));
    admin.send(&capsule(aer, &[], Digests::new()));
    world.poll(10);
    assert!(world.target.set_ana_state(NQN, None, AnaState::INACCESSIBLE));
    assert_eq!(admin.done(&mut world, aer.cdw0.cid()).dw0, 0x000C_0302);
    assert!(io.run(&mut world, SubmissionEntry::flush(1)).status().is(Status::ANA_INACCESSIBLE));
    let (_, page) = admin.fetch(&mut world, log, 52);
    assert_eq!((page[0], page[32]), (2, 3));
    assert!(world.target.set_ana_state(NQN, Some(1), AnaState::OPTIMIZED));
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
}

fn authenticate(client: &mut Client, world: &mut World, secret: &Secret) -> bool {
    authenticate_in(client, world, secret, 0)
}

/// With so many milliseconds before each message.
fn authenticate_in(client: &mut Client, world: &mut World, secret: &Secret, each_ms: u64) -> bool {
    let config = HostAuthConfig {
        host_nqn: HOST.into(),
        subsystem_nqn: NQN.into(),
        secret: secret.clone(),
        controller_secret: None,
        hashes: Vec::new(),
        groups: vec![dray_nvme::auth::DhGroup::Null],
    };
    let mut random = Seeded(fastrand::Rng::with_seed(9));
    let entropy = dray_nvme::auth::Entropy::draw(&mut |bytes| random.fill(bytes));
    let (mut host, mut message) = HostAuth::start(config, 1, entropy);
    loop {
        world.now = world.now.after_ms(each_ms);
        world.poll(2);
        let send = SubmissionEntry::authentication(true, message.len() as u32);
        assert_ok(&client.run_with(world, send, &message));
        let (done, data) = client.fetch(world, SubmissionEntry::authentication(false, 4096), 4096);
        assert_ok(&done);
        match host.take(&data) {
            HostStep::Send(next) => message = next,
            HostStep::Done => return true,
            _ => return false,
        }
    }
}

#[test]
fn a_host_with_a_secret_has_to_authenticate_on_every_queue() {
    let secret = Secret::new(None, &[7; 32]).expect("secret");
    let wrong = Secret::new(None, &[8; 32]).expect("secret");
    let mut world = World::with(Limits::default(), vec![access(HOST, Some(secret.clone()))]);
    let mut client = world.greeted(Digests::new());
    let done = client.connect(&mut world, 0, 0xFFFF, NQN, HOST);
    assert!(ConnectResponse::from_bits(done.dw0).authentication_required());
    let required = fabrics::status::AUTHENTICATION_REQUIRED;
    assert!(client.run(&mut world, SubmissionEntry::keep_alive()).status().is(required));
    assert!(client.run(&mut world, SubmissionEntry::property_get(0, true)).status().is(required));
    assert!(!authenticate(&mut client, &mut world, &wrong));
    assert!(client.pdu(&mut world).is_none());
    drop(client);
    world.poll(20);
    assert_eq!(world.target.counters().authentication_failures, 1);
    let mut admin = world.greeted(BOTH);
    assert_ok(&admin.connect(&mut world, 0, 0xFFFF, NQN, HOST));
    assert!(authenticate(&mut admin, &mut world, &secret));
    assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
    world.poll(4);
    let mut io = world.greeted(BOTH);
    let cntlid = world.cntlid();
    assert_ok(&io.connect(&mut world, 1, cntlid, NQN, HOST));
    assert!(io.run(&mut world, SubmissionEntry::flush(1)).status().is(required));
    assert!(authenticate(&mut io, &mut world, &secret));
    assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
}

/// A host that computes for longer than its keep alive time, and than Connect may take, shows no other life meanwhile.
#[test]
fn a_host_may_take_its_time_to_authenticate_but_not_for_ever() {
    let secret = Secret::new(None, &[7; 32]).expect("secret");
    let mut world = World::with(Limits::default(), vec![access(HOST, Some(secret.clone()))]);
    let mut admin = world.greeted(Digests::new());
    assert_ok(&admin.connect(&mut world, 0, 0xFFFF, NQN, HOST));
    assert!(authenticate_in(&mut admin, &mut world, &secret, 30_000));
    // Enabling is the host's own affair as well; from then on it has to show life.
    world.now = world.now.after_ms(30_000);
    assert_ok(&admin.run(&mut world, SubmissionEntry::property_set(offset::CC, false, CC.into())));
    world.poll(4);
    world.now = world.now.after_ms(5_500);
    assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
    let cntlid = world.cntlid();
    let mut io = world.greeted(Digests::new());
    assert_ok(&io.connect(&mut world, 1, cntlid, NQN, HOST));
    assert!(authenticate_in(&mut io, &mut world, &secret, 1_000));
    world.now = world.now.after_ms(6_100);
    assert!(admin.pdu(&mut world).is_none() && io.pdu(&mut world).is_none());
    assert!(admin.closed && io.closed, "the sockets are closed");
    assert_eq!((world.target.counters().keep_alive_expired, world.target.connections()), (1, 0));

    // Who says nothing more after Connect, and who authenticates and enables nothing: their connections are closed.
    let mut silent = world.greeted(Digests::new());
    assert_ok(&silent.connect(&mut world, 0, 0xFFFF, NQN, HOST));
    world.now = world.now.after_ms(59_000);
    assert!(silent.pdu(&mut world).is_none() && !silent.closed);
    world.now = world.now.after_ms(1_100);
    assert!(silent.pdu(&mut world).is_none() && silent.closed);
    let mut idle = world.greeted(Digests::new());
    assert_ok(&idle.connect(&mut world, 0, 0xFFFF, NQN, HOST));
    assert!(authenticate_in(&mut idle, &mut world, &secret, 0));
    world.now = world.now.after_ms(119_000);
    assert!(idle.pdu(&mut world).is_none() && !idle.closed);
    world.now = world.now.after_ms(1_100);
    assert!(idle.pdu(&mut world).is_none() && idle.closed);
    let counters = world.target.counters();
    assert_eq!((counters.handshake_timeouts, counters.keep_alive_expired), (1, 1));
    world.poll(4);
    assert!(world.target.is_idle());
}

#[test]
fn an_abort_finds_its_command_by_the_hosts_identifier() {
    let mut world = World::new();
    let (mut admin, _io) = world.associated(Digests::new());
    let aer = SubmissionEntry::async_event_request().with_sgl(SglDescriptor::transport(0)).with_cid(0xABCD);
    admin.send(&capsule(aer, &[], Digests::new()));
    world.poll(10);
    assert_eq!(admin.run(&mut world, SubmissionEntry::abort(0, 0xABCE)).dw0, 1, "none such");
    let sqe = admin.next(SubmissionEntry::abort(0, 0xABCD).with_sgl(SglDescriptor::transport(0)));
    admin.send(&capsule(sqe, &[], Digests::new()));
    let mut cids = [admin.pdu(&mut world), admin.pdu(&mut world)].map(|bytes| admin.response(&bytes.expect("PDU")).expect("response").cid);
    cids.sort_unstable();
    assert_eq!(cids, [sqe.cdw0.cid(), 0xABCD]);
}

#[test]
fn draining_ends_everything() {
    let mut world = World::new();
    let (_admin, _io) = world.associated(Digests::new());
    world.target.drain();
    for _ in 0..4 {
        world.now = world.now.after_ms(500);
        world.poll(4);
    }
    assert!(world.target.is_idle());
    let mut late = world.client();
    assert!(late.pdu(&mut world).is_none() && late.closed);
    assert_eq!(world.target.counters().refused, 1);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    /// Whatever comes in whatever pieces: no panic, and that client's connection alone ends or is answered.
    #[test]
    fn random_bytes_end_one_connection_at_most(seed: u64, greeted: bool, connected: bool) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut world = World::new();
        let (mut admin, mut io) = world.associated(Digests::new());
        let mut client = if greeted || connected { world.greeted(Digests::new()) } else { world.client() };
        if connected {
            assert_ok(&client.connect(&mut world, 2, 11, NQN, HOST));
        }
        let mut bytes = Vec::new();
        for _ in 0..rng.usize(1..12) {
            let mut piece = match rng.u8(0..5) {
                0 => capsule(SubmissionEntry::read(1, rng.u64(0..100), rng.u32(1..20)).with_sgl(SglDescriptor::transport(512 * rng.u32(1..20))), &[], Digests::new()),
                1 => {
                    let len = 512 * rng.usize(1..17);
                    let sgl = SglDescriptor::in_capsule(0, len as u32);
                    capsule(SubmissionEntry::write(1, rng.u64(0..100), (len / 512) as u32).with_sgl(sgl), &vec![1; len], Digests::new())
                }
                2 => h2c(rng.u16(..), rng.u16(0..40), rng.u32(0..5) * 4096, rng.bool(), &[3; 512], Digests::new()),
                3 => capsule(SubmissionEntry::write(1, 0, 64).with_sgl(SglDescriptor::transport(32768)), &[], Digests::new()),
                _ => (0..rng.usize(8..300)).map(|_| rng.u8(..)).collect(),
            };
            for _ in 0..rng.usize(0..3) {
                let at = rng.usize(0..piece.len().min(80));
                piece[at] = rng.u8(..);
            }
            bytes.extend(piece);
        }
        while !bytes.is_empty() {
            let len = rng.usize(1..=bytes.len());
            client.send(&bytes.drain(..len).collect::<Vec<_>>());
            world.poll(rng.u32(0..4));
        }
        world.poll(50);
        let counters = world.target.counters();
        proptest::prop_assert!(counters.closed <= 1 && counters.terminations <= 1);
        assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
        assert_ok(&admin.run(&mut world, SubmissionEntry::keep_alive()));
        drop(client);
        world.poll(50);
        assert_eq!(world.target.connections(), 2, "the connection has ended");
        assert_ok(&io.run(&mut world, SubmissionEntry::flush(1)));
    }
}

#[test]
fn a_queue_is_not_shorter_than_an_admin_queue_may_be() {
    for (queue_entries, good) in [(16, false), (31, false), (32, true), (1024, true), (1025, false)] {
        let checked = Limits { queue_entries, ..Limits::default() }.check();
        assert_eq!(checked.is_ok(), good, "{queue_entries}");
    }
}
