//! Queues and admin requests over the kernel's `/dev/null`, which answers each passthrough command with success on newer kernels
//! and refuses it on older ones. A real device is in a virtual machine's tests.

use super::about::{NamespaceAbout, accepted};
use super::node::Node;
use super::*;
use crate::admin::AdminData;
use dray_device::command::{CommandQueue, SubmitError};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::passthru::{Bounds, CarrierOptions, Channel, HostFault, PassthruRing};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{IdentifyController, IdentifyNamespace};
use dray_nvme::status::Status;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

fn null() -> OwnedFd {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("null").into()
}

fn about() -> Arc<NamespaceAbout> {
    Arc::new(NamespaceAbout {
        nsid: 1,
        blocks: 1000,
        block_bytes: 512,
        metadata_bytes: 0,
        metadata_with_data: false,
        namespace: Box::new(IdentifyNamespace::default()),
        controller: Box::new(IdentifyController::default()),
        max_write_zeroes: 1 << 20,
    })
}

fn queue(config: &PassthruConfig) -> PassthruQueue {
    let bounds = Bounds { max_transfer: 8192, max_pieces: 16 };
    let wanted = CarrierOptions { iopoll: false, fixed: config.fixed };
    let ring = PassthruRing::open(null(), Channel::Io, config.depth, bounds, wanted).expect("a ring");
    PassthruQueue::over("null", ring, about(), config, Use::NotAsked)
}

#[test]
fn a_queue_keeps_the_command_seams_contract() {
    let config = PassthruConfig { depth: 3, ..PassthruConfig::default() };
    let mut queue = queue(&config);
    let limits = queue.limits();
    assert_eq!((limits.depth, limits.max_transfer, limits.max_write_zeroes), (3, 8192, 1 << 20));
    let buffer = DmaBuffer::allocate("data", 16_384, Pages::Small).expect("memory");
    assert_eq!(queue.register(buffer.arena()), queue.fixed() == Use::Used);
    let read = SubmissionEntry::read(1, 0, 1);
    let part = |offset, len| buffer.part(offset, len).expect("part");
    for bad in [vec![part(0, 8196)], vec![part(2, 512)], vec![part(0, 511)]] {
        assert_eq!(queue.submit(Time(0), &read, &bad, 0), Err(SubmitError::BadData));
    }
    for tag in 10..13 {
        queue.submit(Time(0), &read, &[part(0, 512)], tag).expect("room");
    }
    assert_eq!((queue.submit(Time(0), &read, &[], 0), queue.free(), queue.outstanding()), (Err(SubmitError::Full), 0, 3));
    queue.commit();
    let mut ended = Vec::new();
    while ended.len() < 3 {
        assert!(queue.wait(Duration::from_secs(5)));
        queue.poll(Time(1), &mut |completion| ended.push(completion));
    }
    ended.sort_by_key(|completion| completion.tag);
    assert!(ended.iter().map(|completion| completion.tag).eq(10..13));
    for completion in ended {
        assert!(!completion.unknown);
        let refused = matches!(queue.last_refusal(), Some(HostFault::Unsupported(_)));
        assert_eq!(completion.status.is_error(), refused, "{completion:?}");
    }
    assert_eq!((queue.free(), queue.is_dead()), (3, false));
}

fn admin() -> PassthruAdmin {
    let node = Node { path: "/dev/null".into(), name: "null".into(), file: null(), nsid: 0 };
    PassthruAdmin::over(node, &PassthruConfig::default()).expect("a ring")
}

#[test]
fn admin_requests_are_answered_by_ticket_or_waited_for() {
    let mut admin = admin();
    let identify = SubmissionEntry::identify(dray_nvme::identify::Cns::CONTROLLER, 0, 0, dray_nvme::identify::CommandSetId::NVM);
    let ticket = admin.request(Time(0), &identify, AdminData::In(4096)).expect("sent");
    let asked = admin.ask(Time(0), &identify, AdminData::In(512)).expect("an answer");
    while admin.outstanding() > 0 {
        admin.poll(Time(0));
    }
    let answer = admin.answer(ticket).expect("there");
    assert_eq!(answer.completion.status, asked.completion.status);
    match admin.last_fault() {
        None => assert_eq!((answer.data.len(), asked.data.len()), (4096, 512)),
        Some(fault) => assert!(matches!(fault, HostFault::Unsupported(_)) && answer.data.is_empty()),
    }
    assert!(admin.answer(ticket).is_some_and(|answer| answer.completion.unknown), "once");
}

#[test]
fn admin_commands_that_would_harm_are_refused() {
    let mut admin = admin();
    let identify = SubmissionEntry::identify(dray_nvme::identify::Cns::CONTROLLER, 0, 0, dray_nvme::identify::CommandSetId::NVM);
    let event = SubmissionEntry::async_event_request();
    for (entry, data) in [
        (event, AdminData::None),
        (SubmissionEntry::delete_io_sq(1), AdminData::None),
        (identify, AdminData::Out(&[0; 512])),
        (identify, AdminData::In(4097)),
        (identify, AdminData::In(0)),
    ] {
        assert_eq!(admin.request(Time(0), &entry, data), Err(SubmitError::BadData), "{entry:?}");
    }
    assert_eq!(admin.outstanding(), 0);
}

#[test]
fn outcomes_become_completions_and_errors_that_say_what_to_do() {
    let path = Path::new("/dev/ng0n1");
    let gone = HostFault::of(rustix::io::Errno::NODEV);
    let unknown = completion(3, Outcome::Unknown(gone));
    assert_eq!((unknown.unknown, unknown.status, unknown.tag), (true, Status::ABORTED_BY_HOST, 3));
    let refused = completion(3, Outcome::NotSent(HostFault::of(rustix::io::Errno::INVAL)));
    assert_eq!((refused.unknown, refused.status.code()), (false, Status::HOST_PATHING_ERROR));
    let said = |outcome| accepted(path, "Identify", outcome).expect_err("no success").to_string();
    let denied = said(Outcome::NotSent(HostFault::NotAllowed));
    assert!(denied.contains("root") && denied.contains("CAP_SYS_ADMIN"), "{denied}");
    assert!(said(Outcome::NotSent(HostFault::Unsupported(rustix::io::Errno::OPNOTSUPP))).contains("6.0"));
    assert!(said(Outcome::Unknown(gone)).contains("gone"));
    let block = PassthruError::BlockDevice { path: "/dev/nvme0n1".into(), right: "/dev/ng0n1".into() };
    assert!(block.to_string().ends_with("/dev/ng0n1"));
    let forbidden = PassthruError::Setup { path: PathBuf::from("/dev/ng0n1"), source: dray_device::passthru::SetupError::Forbidden };
    assert!(forbidden.to_string().contains("sysctl kernel.io_uring_disabled=0"), "{forbidden}");
}
