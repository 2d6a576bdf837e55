//! Write Uncorrectable is offered, and carried out, only where a mark lives as long as the blocks: a block that was marked as
//! unreadable must not be readable after a restart.
#![allow(missing_docs)]

mod support;

use dray_controller::{FileBacking, MemoryBacking};
use dray_device::backing::{Backing, BackingOp, BackingRequest, Submitted};
use dray_nvme::command::{NvmOpcode, SubmissionEntry};
use dray_nvme::identify::{Cns, CommandSetId, IdentifyController};
use dray_nvme::log::{EffectsLog, LogId};
use dray_nvme::status::Status;
use std::path::PathBuf;
use support::{BLOCKS, Guest, MC, World, assert_ok, config, memory, namespace};
use zerocopy::FromBytes;

/// A file that goes with its test.
struct File(PathBuf);

impl File {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dray-marks-{name}-{}", std::process::id()));
        std::fs::write(&path, vec![0xa5u8; BLOCKS as usize * 512]).expect("file");
        Self(path)
    }

    fn backing(&self) -> FileBacking {
        FileBacking::open(&self.0, 512, 16).expect("backing")
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

/// What Identify Controller and the effects log say: Write Uncorrectable is there.
fn offered(world: &mut World, guest: &mut Guest) -> (bool, bool) {
    let (done, page) = guest.admin_in(world, SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM), 4096);
    assert_ok(done);
    let page = IdentifyController::read_from_bytes(&page).expect("page");
    let (done, log) = guest.admin_in(world, SubmissionEntry::get_log_page(LogId::EFFECTS, 0, 0, 1024, false), 4096);
    assert_ok(done);
    let log = EffectsLog::read_from_bytes(&log).expect("log");
    assert!(log.iocs[usize::from(NvmOpcode::WRITE.0)].csupp() && page.oncs.compare(), "others are");
    (page.oncs.write_uncorrectable(), log.iocs[usize::from(NvmOpcode::WRITE_UNCORRECTABLE.0)].csupp())
}

fn mark(backing: &mut dyn Backing) -> Submitted {
    backing.submit(&BackingRequest { op: BackingOp::WriteUncorrectable, slba: 8, blocks: 1, data: &[], tag: 1 })
}

#[test]
fn a_backing_marks_only_what_it_says_it_can() {
    let mut memory = MemoryBacking::new(BLOCKS * 512, 512).expect("backing");
    assert!(memory.can_write_uncorrectable());
    assert_eq!(mark(&mut memory), Submitted::Done(Status::SUCCESS));
    let file = File::new("backing");
    let mut backing = file.backing();
    assert!(!backing.can_write_uncorrectable(), "the marks would be gone after a restart");
    assert_eq!(mark(&mut backing), Submitted::Done(Status::INVALID_OPCODE));
    assert_eq!(backing.in_flight(), 0);
}

#[test]
fn a_namespace_in_memory_can_be_marked_and_says_so() {
    let mut world = World::new();
    let mut guest = world.ready(MC);
    guest.create_pair(&mut world, 1, 16, None);
    assert_eq!(offered(&mut world, &mut guest), (true, true));
    assert_ok(guest.run(&mut world, 1, SubmissionEntry::write_uncorrectable(1, 8, 1)));
    assert!(guest.read(&mut world, 1, 8, 1).0.status().is(Status::UNRECOVERED_READ));
}

#[test]
fn a_namespace_in_a_file_cannot_be_marked_and_says_so() {
    let file = File::new("namespace");
    let mut world = World::with(config(), vec![(namespace(1), Box::new(file.backing()))]);
    let mut guest = world.ready(MC);
    guest.create_pair(&mut world, 1, 16, None);
    assert_eq!(offered(&mut world, &mut guest), (false, false));
    let status = guest.run(&mut world, 1, SubmissionEntry::write_uncorrectable(1, 8, 1)).status();
    assert!(status.is(Status::INVALID_OPCODE), "{status}");
    assert!(status.dnr(), "nor will it be later");
    let (done, data) = guest.read(&mut world, 1, 8, 1);
    assert_ok(done);
    assert_eq!(data, [0xa5; 512], "nothing has happened");
}

/// One namespace that cannot keep marks takes the command away from its controllers: ONCS is not told by namespace.
#[test]
fn one_namespace_that_cannot_be_marked_is_enough() {
    let file = File::new("mixed");
    let mut world = World::with(config(), vec![(namespace(1), memory()), (namespace(2), Box::new(file.backing()))]);
    let mut guest = world.ready(MC);
    assert_eq!(offered(&mut world, &mut guest), (false, false));
}
