//! Each deviation from the specification shows, and is counted when it does.
#![cfg(feature = "deviations")]
#![allow(missing_docs)]

mod support;

use dray_controller::{Deviation, Deviations, UdmqFreedom};
use dray_nvme::cdq::{Changed, Esa, QueueType, UdmqEntry};
use dray_nvme::command::{
    AdminOpcode, CdqCdw10, CompletionEntry, DsmRange, NvmOpcode, SequenceIndicator, SubmissionEntry,
};
use dray_nvme::event::AsyncEvent;
use dray_nvme::identify::{Cns, CommandSetId, IdentifyController};
use dray_nvme::status::Status;
use support::{Guest, MC, MMC, World, assert_ok};
use zerocopy::{FromBytes, IntoBytes};

/// A deviating subsystem with a manager, a guest with a queue pair, and a data queue.
struct Bench {
    world: World,
    manager: Guest,
    guest: Guest,
    id: u16,
    at: usize,
    slots: u32,
    next: u32,
    phase: bool,
}

impl Bench {
    fn new(deviations: &[Deviation], slots: u32) -> Self {
        let mut world = World::new();
        world.subsystem.deviate(deviations.iter().fold(Deviations::NONE, |set, one| set.and(*one)));
        let (manager, mut guest) = (world.ready(MMC), world.ready(MC));
        guest.create_pair(&mut world, 1, 16, None);
        let mut bench = Self { world, manager, guest, id: 0, at: 0, slots, next: 0, phase: true };
        bench.create(true);
        bench
    }

    /// A bench whose queue logs.
    fn logging(deviations: &[Deviation], slots: u32) -> Self {
        let mut bench = Self::new(deviations, slots);
        assert_ok(bench.track(true));
        bench
    }

    fn create(&mut self, contiguous: bool) {
        self.at = self.manager.pages(self.slots as usize * 32);
        let mut address = self.manager.address(self.at);
        if !contiguous {
            let list = self.manager.pages(4096);
            self.manager.put(list, &address.to_le_bytes());
            address = self.manager.address(list);
        }
        let create = SubmissionEntry::create_cdq(QueueType::UDMQ, MC, contiguous, self.slots * 8, address);
        self.id = assert_ok(self.admin(create)).dw0 as u16;
        (self.next, self.phase) = (0, true);
    }

    fn admin(&mut self, entry: SubmissionEntry) -> CompletionEntry {
        self.manager.admin(&mut self.world, entry)
    }

    fn track(&mut self, start: bool) -> CompletionEntry {
        self.admin(SubmissionEntry::track_send_log(start, self.id))
    }

    fn suspend(&mut self) -> CompletionEntry {
        self.admin(SubmissionEntry::suspend(MC, false, false))
    }

    fn resume(&mut self) -> CompletionEntry {
        self.admin(SubmissionEntry::resume(MC))
    }

    fn head(&mut self, head: u32, trigger: Option<u32>) -> CompletionEntry {
        self.admin(SubmissionEntry::set_cdq_feature(self.id, head, trigger))
    }

    fn write(&mut self, slba: u64, blocks: usize) {
        assert_ok(self.guest.write(&mut self.world, 1, slba, &vec![1; blocks * 512]));
    }

    /// New entries: what they mark and what they name.
    fn take(&mut self) -> Vec<(Esa, Changed)> {
        let mut entries = Vec::new();
        loop {
            let bytes = self.manager.get(self.at + self.next as usize * 32, 32);
            let entry = UdmqEntry::read_from_bytes(&bytes).expect("entry");
            if entry.phase() != self.phase {
                return entries;
            }
            entries.push((entry.esa(), entry.changed()));
            self.next += 1;
            if self.next == self.slots {
                (self.next, self.phase) = (0, !self.phase);
            }
        }
    }

    fn marks(&mut self) -> Vec<Esa> {
        self.take().iter().map(|entry| entry.0).collect()
    }

    /// Only these have taken effect.
    #[track_caller]
    fn took(&self, deviations: &[Deviation]) {
        let set = deviations.iter().fold(Deviations::NONE, |set, one| set.and(*one));
        let names = |set: Deviations| set.iter().map(Deviation::name).collect::<Vec<_>>();
        assert_eq!(names(self.world.subsystem.deviated()), names(set));
    }

    /// Events reported within some polls.
    fn events(&mut self, requests: &[u16]) -> usize {
        (0..5).for_each(|_| self.world.poll());
        while let Some(entry) = self.manager.pop(0) {
            self.manager.strays.push((0, entry));
        }
        self.manager.strays.iter().filter(|(_, entry)| requests.contains(&entry.cid)).count()
    }

    fn request_events(&mut self, count: usize) -> Vec<u16> {
        let cids = (0..count).map(|_| self.manager.push(0, SubmissionEntry::async_event_request())).collect();
        self.manager.ring(0);
        (0..3).for_each(|_| self.world.poll());
        cids
    }

    fn state(&mut self) -> (bool, Vec<u8>) {
        let get = SubmissionEntry::get_controller_state(1, MC, 0, 0, 256);
        let (done, data) = self.manager.admin_in(&mut self.world, get, 1024);
        (assert_ok(done).dw0 & 1 == 1, data[..48 + 8 + 48].to_vec())
    }

    fn set_state(&mut self, seqind: SequenceIndicator, csuuidi: u8, bytes: &[u8]) -> Status {
        let set = SubmissionEntry::set_controller_state(seqind, 1, MC, csuuidi, 0, (bytes.len() / 4) as u32);
        self.manager.admin_out(&mut self.world, set, bytes).status()
    }
}

fn range(slba: u64, blocks: u64) -> Changed {
    Changed::Range { nsid: 1, slba, blocks }
}

#[test]
fn without_deviations_nothing_shows() {
    let mut bench = Bench::logging(&[], 4);
    (0..3).for_each(|i| bench.write(i * 10, 1));
    assert_eq!(bench.marks(), [Esa::FIRST, Esa::ORDINARY, Esa::FULL]);
    assert_ok(bench.head(3, None));
    bench.write(100, 1);
    assert_eq!(bench.marks(), []);
    assert!(bench.head(9, None).status().is_error());
    bench.took(&[]);
    let at = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
    let (_, page) = bench.manager.admin_in(&mut bench.world, at, 4096);
    assert_eq!(IdentifyController::read_from_bytes(&page).expect("page").model(), Some("Dray software controller"));
}

#[test]
fn a_full_queue_goes_on_without_a_word() {
    let mut bench = Bench::logging(&[Deviation::SilentAfterFull], 4);
    (0..4).for_each(|i| bench.write(i * 10, 1));
    let entries = bench.take();
    assert_eq!(entries[1..], [(Esa::ORDINARY, range(0, 1)), (Esa::FULL, range(10, 1))]);
    assert_ok(bench.head(3, None));
    bench.write(50, 1);
    assert_eq!(bench.take(), [(Esa::ORDINARY, range(50, 1))], "no FIRST, and what came between is lost");
    assert_ok(bench.track(false));
    assert_ok(bench.head(1, None));
    assert_ok(bench.track(true));
    assert_eq!(bench.marks().last(), Some(&Esa::FIRST));
    bench.took(&[Deviation::SilentAfterFull]);
}

#[test]
fn full_takes_the_place_of_a_marker() {
    let mut bench = Bench::logging(&[Deviation::FullReplacesMarker], 4);
    bench.write(0, 1);
    assert_ok(bench.suspend());
    assert_eq!(bench.take()[2], (Esa::FULL, Changed::Nothing));
    bench.took(&[Deviation::FullReplacesMarker]);
}

#[test]
fn markers_go_into_a_full_queue() {
    let both = [Deviation::SilentAfterFull, Deviation::MarkersOverwrite];
    let mut bench = Bench::logging(&both, 4);
    (0..3).for_each(|i| bench.write(i * 10, 1));
    assert_ok(bench.track(false));
    assert_eq!(bench.marks(), [Esa::FIRST, Esa::ORDINARY, Esa::FULL, Esa::STOPPED]);
    bench.took(&both);
}

#[test]
fn events_come_by_the_tail_only_once_and_stay() {
    let mut bench = Bench::logging(&[Deviation::TriggerOnTailOnly], 16);
    let requests = bench.request_events(4);
    assert_ok(bench.head(0, Some(1)));
    bench.write(0, 1);
    assert_eq!(bench.events(&requests), 0, "slot 1 was posted, the tail is 2");
    assert_ok(bench.head(0, Some(3)));
    bench.write(10, 1);
    assert_eq!(bench.events(&requests), 1);
    bench.took(&[Deviation::TriggerOnTailOnly]);

    let mut bench = Bench::logging(&[Deviation::OneEventOnly], 16);
    let requests = bench.request_events(4);
    for slot in 1..4 {
        assert_ok(bench.head(0, Some(slot)));
        bench.write(u64::from(slot) * 10, 1);
    }
    assert_eq!(bench.events(&requests), 1);
    bench.took(&[Deviation::OneEventOnly]);

    let mut bench = Bench::logging(&[Deviation::EventStaysPending], 16);
    assert_ok(bench.head(0, Some(1)));
    bench.write(10, 1);
    assert_ok(bench.head(0, None));
    let requests = bench.request_events(1);
    assert_eq!(bench.events(&requests), 1);
    let (_, event) = bench.manager.strays.iter().find(|(_, entry)| requests.contains(&entry.cid)).expect("an event");
    assert_eq!((event.dw0, event.dw1), (AsyncEvent::CDQ_TAIL_POINTER.into_bits(), u32::from(bench.id)));
    bench.took(&[Deviation::EventStaysPending]);
}

#[test]
fn heads_and_repeated_starts_are_taken() {
    let mut bench = Bench::logging(&[Deviation::HeadUnchecked], 4);
    assert_ok(bench.head(1, None));
    assert_ok(bench.head(4, None));
    assert!(bench.head(5, None).status().is_error());
    bench.write(0, 1);
    bench.took(&[Deviation::HeadUnchecked]);
    let mut bench = Bench::logging(&[Deviation::RepeatedStartUnmarked], 8);
    assert_ok(bench.track(true));
    assert_eq!(bench.marks(), [Esa::FIRST]);
    bench.took(&[Deviation::RepeatedStartUnmarked]);
}

fn deallocate(bench: &mut Bench) {
    let at = bench.guest.pages(4096);
    for (i, (slba, length)) in [(100u64, 8u32), (300, 8)].into_iter().enumerate() {
        let range = DsmRange { slba, length, ..DsmRange::default() };
        bench.guest.put(at + i * 16, range.as_bytes());
    }
    let entry = SubmissionEntry { cdw10: 1, cdw11: 4, ..SubmissionEntry::nvm(NvmOpcode::DATASET_MANAGEMENT, 1) };
    let entry = entry.with_prps(bench.guest.address(at), 0);
    assert_ok(bench.guest.run(&mut bench.world, 1, entry));
}

#[test]
fn changes_are_named_wrongly_or_not_at_all() {
    let mut bench = Bench::logging(&[Deviation::DsmCountNotZeroBased], 16);
    deallocate(&mut bench);
    assert_eq!(bench.take()[1..], [(Esa::ORDINARY, range(100, 9)), (Esa::ORDINARY, range(300, 9))]);
    bench.took(&[Deviation::DsmCountNotZeroBased]);
    let mut bench = Bench::logging(&[Deviation::DsmGapDropped], 16);
    deallocate(&mut bench);
    assert_eq!(bench.take()[1..], [(Esa::ORDINARY, range(100, 8))]);
    bench.took(&[Deviation::DsmGapDropped]);
    let mut bench = Bench::logging(&[Deviation::CopyNotLogged], 16);
    let entry = SubmissionEntry { cdw10: 5, ..SubmissionEntry::nvm(NvmOpcode::WRITE_UNCORRECTABLE, 1) };
    assert_ok(bench.guest.run(&mut bench.world, 1, entry));
    assert_eq!(bench.marks(), [Esa::FIRST]);
    bench.took(&[Deviation::CopyNotLogged]);
}

#[test]
fn suspending_marks_again_and_resuming_skips_the_admin_queue() {
    let mut bench = Bench::logging(&[Deviation::SuspendMarksAlways], 16);
    assert_ok(bench.suspend());
    assert_ok(bench.suspend());
    assert_eq!(bench.marks(), [Esa::FIRST, Esa::SUSPENDED, Esa::SUSPENDED]);
    bench.took(&[Deviation::SuspendMarksAlways]);
    let mut bench = Bench::logging(&[Deviation::ResumeSkipsAdmin], 16);
    assert_ok(bench.suspend());
    let entry = SubmissionEntry::set_features(dray_nvme::feature::FeatureId::ARBITRATION, 0, false);
    let waiting = bench.guest.push(0, entry);
    bench.guest.ring(0);
    (0..5).for_each(|_| bench.world.poll());
    assert_ok(bench.resume());
    (0..5).for_each(|_| bench.world.poll());
    assert_eq!(bench.guest.pop(0), None);
    assert_ok(bench.guest.admin(&mut bench.world, entry));
    assert!(bench.guest.strays.iter().any(|(_, entry)| entry.cid == waiting));
    bench.took(&[Deviation::ResumeSkipsAdmin]);
}

#[test]
fn states_differ() {
    let (csup, spec) = {
        let mut bench = Bench::logging(&[], 16);
        assert_ok(bench.suspend());
        bench.state()
    };
    assert!(csup);
    let mut bench = Bench::logging(&[Deviation::CsupNeverSet, Deviation::PhaseInsteadOfS0pt], 16);
    assert_ok(bench.suspend());
    let (csup, state) = bench.state();
    assert!(!csup && state[2] & 1 == 1, "CSATTR tells");
    // One queue of each kind: S0PT is bit 2 of byte 16 of the completion queue, whose tail is 0.
    let at = 48 + 8 + 24 + 16;
    assert_eq!(state[at], spec[at] ^ 4);
    bench.took(&[Deviation::CsupNeverSet, Deviation::PhaseInsteadOfS0pt]);
    let mut bench = Bench::new(&[Deviation::StateInOneCommand], 16);
    assert_ok(bench.suspend());
    assert!(bench.set_state(SequenceIndicator::FIRST, 0, &spec).is(Status::INTERNAL_ERROR));
    bench.took(&[Deviation::StateInOneCommand]);
    let mut bench = Bench::new(&[Deviation::StateIndexWide], 16);
    assert_ok(bench.suspend());
    assert!(bench.set_state(SequenceIndicator::ONLY, 1, &spec).is(Status::INVALID_FIELD));
    bench.took(&[Deviation::StateIndexWide]);
    for sticks in [false, true] {
        let mut bench = Bench::new(if sticks { &[Deviation::QueuesStick] } else { &[] }, 16);
        assert_ok(bench.guest.admin(&mut bench.world, SubmissionEntry::delete_io_sq(1)));
        assert_ok(bench.guest.admin(&mut bench.world, SubmissionEntry::delete_io_cq(1)));
        assert_ok(bench.suspend());
        assert_eq!(bench.set_state(SequenceIndicator::ONLY, 0, &spec).is_error(), sticks);
        bench.took(if sticks { &[Deviation::QueuesStick] } else { &[] });
    }
}

#[test]
fn logging_and_suspension_outlive_the_managers_reset() {
    let mut bench = Bench::logging(&[Deviation::LoggingSurvivesReset, Deviation::SuspensionSurvivesReset], 16);
    assert_ok(bench.suspend());
    bench.manager.enable_after_reset(&mut bench.world);
    bench.create(true);
    assert_ok(bench.resume());
    bench.write(7, 1);
    assert_ok(bench.track(true));
    assert_eq!(bench.take(), [(Esa::ORDINARY, range(7, 1))]);
    bench.took(&[Deviation::LoggingSurvivesReset, Deviation::SuspensionSurvivesReset]);
}

#[test]
fn statuses_limits_and_abilities_differ() {
    let mut bench = Bench::new(&[Deviation::StatusesDiffer], 16);
    assert!(bench.admin(SubmissionEntry::resume(77)).status().is(Status::INVALID_FIELD));
    let get = SubmissionEntry::get_controller_state(1, 77, 0, 0, 12);
    assert!(bench.admin(get).status().is(Status::INVALID_CDQ));
    let odd = CdqCdw10::new().with_sel(dray_nvme::command::CdqSelect(9)).into_bits();
    let odd = SubmissionEntry { cdw10: odd, ..SubmissionEntry::admin(AdminOpcode::CONTROLLER_DATA_QUEUE) };
    assert_eq!(bench.admin(odd).status(), Status::SUCCESS.with_dnr());
    bench.took(&[Deviation::StatusesDiffer]);
    let mut bench = Bench::new(&[Deviation::NoMemoryTracking], 16);
    assert!(bench.admin(SubmissionEntry::track_send_memory(true, MC)).status().is(Status::INTERNAL_ERROR));
    bench.took(&[Deviation::NoMemoryTracking]);
    let mut bench = Bench::new(&[Deviation::ContiguousOnly], 16);
    assert_ok(bench.admin(SubmissionEntry::delete_cdq(bench.id)));
    bench.create(false);
    assert_ok(bench.track(true));
    bench.write(0, 1);
    assert_eq!(bench.marks(), []);
    bench.took(&[Deviation::ContiguousOnly]);
    let mut bench = Bench::new(&[Deviation::LimitsUntold], 16);
    let at = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
    let (_, page) = bench.manager.admin_in(&mut bench.world, at, 4096);
    let page = IdentifyController::read_from_bytes(&page).expect("page");
    assert_eq!((page.mcudmq, page.mcmr, page.model()), (0, 1, Some("QEMU NVMe Ctrl")));
    bench.took(&[Deviation::LimitsUntold]);
}

#[test]
fn entries_are_split_and_early() {
    let mut bench = Bench::logging(&[], 16);
    bench.world.subsystem.use_freedom(UdmqFreedom { max_blocks: 2, early_polls: 4 });
    let at = bench.guest.pages(4096);
    let entry = SubmissionEntry::write(1, 10, 5).with_prps(bench.guest.address(at), 0);
    let cid = bench.guest.push(1, entry);
    bench.guest.ring(1);
    bench.world.poll();
    let ranges: Vec<_> = bench.take().into_iter().skip(1).map(|entry| entry.1).collect();
    assert_eq!(ranges, [range(10, 2), range(12, 2), range(14, 1)]);
    for _ in 0..3 {
        assert_eq!(bench.guest.pop(1), None, "the completion waits");
        bench.world.poll();
    }
    assert_eq!(bench.guest.wait(&mut bench.world, 1, cid).cid, cid);
    assert_eq!(bench.world.subsystem.freedom_used(), (1, 1));
    // A Suspend waits for completions that wait.
    bench.guest.push(1, entry);
    bench.guest.ring(1);
    bench.world.poll();
    assert_ok(bench.suspend());
    assert!(bench.guest.pop(1).is_some());
}
