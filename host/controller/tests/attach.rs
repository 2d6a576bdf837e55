//! Namespace Attachment: what is detached stays so over resets of both controllers, until it is attached again.
#![allow(missing_docs)]

mod support;

use dray_controller::SubsystemConfig;
use dray_nvme::command::{NamespaceAttachmentSelect, SubmissionEntry};
use dray_nvme::identify::{Cns, CommandSetId, IdentifyController, controller_list, nsid_list, write_controller_list};
use dray_nvme::status::Status;
use support::{Guest, MC, MMC, World, assert_ok, config, memory, namespace};
use zerocopy::FromBytes;

const ATTACH: NamespaceAttachmentSelect = NamespaceAttachmentSelect::ATTACH;
const DETACH: NamespaceAttachmentSelect = NamespaceAttachmentSelect::DETACH;

fn world() -> World {
    let config = SubsystemConfig { attachment: true, ..config() };
    World::with(config, vec![(namespace(1), memory()), (namespace(2), memory())])
}

fn identify(world: &mut World, guest: &mut Guest, cns: Cns, nsid: u32) -> Vec<u8> {
    let entry = SubmissionEntry::identify(cns, nsid, 0, CommandSetId::NVM);
    let (done, page) = guest.admin_in(world, entry, 4096);
    assert_ok(done);
    page
}

fn attachment(world: &mut World, guest: &mut Guest, nsid: u32, select: NamespaceAttachmentSelect, ids: &[u16]) -> Status {
    let mut list = vec![0; 4096];
    write_controller_list(ids.iter().copied(), &mut list);
    guest.admin_out(world, SubmissionEntry::namespace_attachment(nsid, select), &list).status()
}

fn having(world: &mut World, manager: &mut Guest, nsid: u32) -> Vec<u16> {
    controller_list(&identify(world, manager, Cns::NAMESPACE_CONTROLLERS, nsid)).collect()
}

#[test]
fn a_detached_namespace_is_not_written_whoever_is_reset() {
    let mut world = world();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    manager.create_pair(&mut world, 1, 16, None);
    guest.create_pair(&mut world, 1, 16, None);
    assert_ok(guest.write(&mut world, 1, 0, &[7; 512]));
    assert_eq!(having(&mut world, &mut manager, 1), [MMC, MC]);
    assert_ok(manager.admin(&mut world, SubmissionEntry::suspend(MC, false, false)));
    assert!(!attachment(&mut world, &mut manager, 1, DETACH, &[MC]).is_error());
    assert_eq!(having(&mut world, &mut manager, 1), [MMC]);
    for reset in [false, true] {
        if reset {
            manager.enable_after_reset(&mut world);
            manager.create_pair(&mut world, 1, 16, None);
        }
        guest.enable_after_reset(&mut world);
        guest.create_pair(&mut world, 1, 16, None);
        assert!(guest.write(&mut world, 1, 0, &[9; 512]).status().is_error(), "written after a reset");
    }
    assert_eq!(manager.read(&mut world, 1, 0, 1).1, [7; 512], "the management controller has it still");
    let inactive = identify(&mut world, &mut guest, Cns::ACTIVE_NAMESPACES, 0);
    assert_eq!(nsid_list(&inactive).count(), 0);
    assert!(!attachment(&mut world, &mut manager, 1, ATTACH, &[MC]).is_error());
    assert_ok(guest.write(&mut world, 1, 0, &[9; 512]));
}

#[test]
fn what_cannot_be_attached_is_answered_and_only_where_it_is_offered() {
    let mut world = world();
    let (mut manager, mut guest) = (world.ready(MMC), world.ready(MC));
    let says = |world: &mut World, guest: &mut Guest| {
        IdentifyController::read_from_bytes(&identify(world, guest, Cns::CONTROLLER, 0)).expect("a page").oacs.namespace_management()
    };
    assert!(says(&mut world, &mut manager) && !says(&mut world, &mut guest));
    let all = identify(&mut world, &mut manager, Cns::ALLOCATED_NAMESPACES, 0);
    assert_eq!(nsid_list(&all).collect::<Vec<_>>(), [1, 2]);
    for (nsid, select, ids, status) in [
        (1, ATTACH, &[MC][..], Status::NAMESPACE_ALREADY_ATTACHED),
        (2, DETACH, &[MC], Status::NAMESPACE_NOT_ATTACHED),
        (3, ATTACH, &[MC], Status::INVALID_NAMESPACE),
        (u32::MAX, ATTACH, &[MC], Status::INVALID_NAMESPACE),
        (1, DETACH, &[77], Status::CONTROLLER_LIST_INVALID),
        (1, DETACH, &[], Status::CONTROLLER_LIST_INVALID),
        (2, ATTACH, &[MC, MC], Status::CONTROLLER_LIST_INVALID),
        (1, NamespaceAttachmentSelect(7), &[MC], Status::INVALID_FIELD),
    ] {
        let got = attachment(&mut world, &mut manager, nsid, select, ids);
        assert!(got.is(status), "{nsid} {select:?} {ids:?}: {got}");
    }
    // All or none.
    assert!(attachment(&mut world, &mut manager, 2, ATTACH, &[MC, MMC]).is(Status::NAMESPACE_ALREADY_ATTACHED));
    assert_eq!(having(&mut world, &mut manager, 2), [MMC]);
    assert!(attachment(&mut world, &mut guest, 1, DETACH, &[MC]).is(Status::INVALID_OPCODE), "a migratable controller");
    let mut plain = World::new();
    let mut manager = plain.ready(MMC);
    assert!(attachment(&mut plain, &mut manager, 1, DETACH, &[MC]).is(Status::INVALID_OPCODE), "not offered");
}
