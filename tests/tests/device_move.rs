//! `dray device move` from outside: a drive that tracks its controllers itself, one of which somebody else drives, while the
//! appliance has its management controller.
//!
//! The drive is a software subsystem of this process, its management controller behind a vfio-user socket: what has it sees a
//! function, as with a drive by VFIO; in one test it is a PCI function of a virtual machine, which the appliance in there has by VFIO.
//! The guest drives the migratable controller here, past the appliance.
#![allow(missing_docs)]

use dray::core::records::{FileMedium, RecordStore};
use dray_controller::{ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::memory::DmaBuffer;
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::socket::UnixSocket;
use dray_device::space::AddressSpace;
use dray_driver::{AdminData, Driver, DriverConfig};
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::{VfioUserConfig, VfioUserServer};
use dray_migration::{Owner, Record, RecordPhase};
use dray_nvme::command::{NamespaceAttachmentSelect, SubmissionEntry};
use dray_nvme::identify::write_controller_list;
use dray_nvme::state::ControllerState;
use dray_tests::dray_in_guest::Initrd;
use dray_tests::guest::{Guest as Virtual, Machine};
use dray_tests::serving::{Place, Running};
use dray_workload::guest::{Guest, GuestConfig, GuestHandle};
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::reader::{ArenaReader, FileReader};
use dray_workload::verify;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-00000000d002";
const FAR: &str = "nqn.2026-11.org.example:far";
const BYTES: u64 = 32 << 20;
const MOVE: [&str; 11] =
    ["device", "move", "drive", "--controller", "2", "--namespace", "1", "--to", "device:far/1", "--state", "vm.state"];
const PATIENCE: Duration = Duration::from_secs(60);
const MANAGEMENT: u16 = 1;
const MIGRATABLE: u16 = 2;

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

/// What the drive's thread and the test share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// The guest does nothing.
    paused: AtomicBool,
    /// The guest does nothing, and nothing that it had asked for is under way.
    quiet: AtomicBool,
    /// The migratable controller has its namespace.
    attached: AtomicBool,
}

/// The drive and the guest that has one of its controllers.
struct Drive {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    guest: GuestHandle,
    memory: DmaBuffer,
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

impl Drive {
    fn start(folder: &Path, model: &str) -> Self {
        let controller = |cntlid, role, namespaces| ControllerConfig {
            cntlid,
            role,
            namespaces,
            io_queues: 8,
            vectors: 9,
            fence: Fence::default(),
        };
        let config = SubsystemConfig {
            model: model.into(),
            serial: "DRIVE1".into(),
            nqn: "nqn.2026-11.org.example:drive".into(),
            controllers: vec![
                controller(MANAGEMENT, ControllerRole::Management, vec![]),
                controller(MIGRATABLE, ControllerRole::Migratable, vec![1]),
            ],
            attachment: true,
            ..SubsystemConfig::default()
        };
        let namespace =
            NamespaceConfig { nsid: 1, nguid: [7; 16], eui64: [7; 8], uuid: [7; 16], shared: true, write_protected: false };
        let backing = MemoryBacking::new(BYTES, 4096).expect("memory");
        let memory = backing.memory().clone();
        let subsystem = Subsystem::new(config, vec![(namespace, Box::new(backing))]).expect("a subsystem");
        let front = |cntlid| {
            let slot = Slot::without_lines(AddressSpace::default(), 9).expect("a slot");
            slot.point_at(&subsystem.plug(cntlid).expect("a controller"));
            slot
        };
        let (manager, slot) = (front(MANAGEMENT), front(MIGRATABLE));
        let driver = Driver::new(slot.function(), DriverConfig::default()).expect("a driver");
        let blocks = (0..256).map(|at| at * (BYTES / 4096 / 256)).collect();
        let ledger = Arc::new(Ledger::in_memory(&LedgerSpec { seed: 5, guest: 1, blocks }).expect("a ledger"));
        let (guest, handle) = Guest::new(driver, GuestConfig::default(), ledger).expect("a guest");
        let listener = UnixListener::bind(folder.join("drive.sock")).expect("a socket");
        listener.set_nonblocking(true).expect("a mode");
        let server = VfioUserServer::new(manager, VfioUserConfig::default(), Box::new(NoMigration));
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || serve(&of_thread, subsystem, (&listener, server), (slot, guest)));
        let drive = Self { shared, thread: Some(thread), guest: handle, memory };
        drive.goes_on();
        drive
    }

    #[track_caller]
    fn goes_on(&self) {
        let before = self.guest.counters().writes;
        until("the guest writes", || {
            assert!(!self.guest.is_over(), "{:?}", self.guest.first_error());
            self.guest.counters().writes >= before + 50
        });
    }

    fn is_attached(&self) -> bool {
        self.shared.attached.load(Ordering::Acquire)
    }

    /// All that the guest was told is written is in the drive.
    #[track_caller]
    fn judge(&self) {
        let mut reader = ArenaReader(Arc::clone(self.memory.arena()));
        let found = verify::check(&mut reader, self.guest.ledger()).expect("a comparison");
        assert!(found.is_ok() && found.writes_acknowledged > 0, "{found:?}");
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; BYTES as usize];
        self.memory.arena().read(self.memory.offset(), &mut bytes);
        bytes
    }
}

fn serve(
    shared: &Shared,
    mut subsystem: Subsystem,
    (listener, mut server): (&UnixListener, VfioUserServer),
    (_slot, mut guest): (Slot, Guest),
) {
    let start = Instant::now();
    while !shared.stop.load(Ordering::Acquire) {
        let now = Time(start.elapsed().as_nanos() as u64);
        if let Ok((stream, _)) = listener.accept() {
            let _refused = UnixSocket::new(stream).map(|stream| server.attach(Box::new(stream)));
        }
        let mut work = server.poll(now).work + subsystem.poll(now).work;
        let paused = shared.paused.load(Ordering::Acquire);
        if !paused {
            work += guest.poll(now).work;
        }
        shared.quiet.store(paused && work == 0 && subsystem.is_quiet(), Ordering::Release);
        shared.attached.store(subsystem.has_namespace(MIGRATABLE, 1), Ordering::Release);
        if work == 0 {
            std::thread::yield_now();
        }
    }
}

fn subsystem(name: &str, nqn: &str, namespace: &str) -> String {
    format!(
        "[[subsystem]]\nname = \"{name}\"\nnqn = \"{nqn}\"\nserial = \"S-1\"\n\
         [[subsystem.namespace]]\nnsid = 1\nnguid = \"{:032x}\"\n{namespace}\
         [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
         [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n",
        0xd1
    )
}

const MEMORY: &str = "backing = \"memory\"\nsize = \"1MiB\"\nblock = \"4KiB\"\n";

fn tail(from: &str, to: &str, keys: &str) -> String {
    let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
    format!("[migration]\nfrom = \"{from}\"\nto = \"{to}\"\n{keys}{policies}")
}

/// A busy machine may take long over a switch-over.
const PATIENT: &str = "downtime = \"5s\"\n";
/// Never soon enough: it runs until it is cancelled.
const ENDLESS: &str = "downtime = \"1us\"\nmax-rounds = 1000000\nmax-time = \"60min\"\n";

/// The machine that the media goes to.
fn start_far(place: &Place) -> Running {
    let far = subsystem("far", FAR, "backing = \"file\"\npath = \"far.img\"\nsize = \"32MiB\"\nblock = \"4KiB\"\n");
    let export = format!(
        "[[export]]\nsubsystem = \"far\"\ncontrollers = [2]\nby = \"nvme-tcp\"\nlisten = \"127.0.0.1:0\"\n\
         hosts = [{{ nqn = \"{HOST}\" }}]\n"
    );
    let spare = subsystem("spare", "nqn.2026-11.org.example:spare", MEMORY);
    let text = format!("[core]\nstate = \"far\"\n{far}{spare}{export}{}", tail("far", "spare", PATIENT));
    place.write("far.toml", &text);
    place.start("far.toml")
}

/// The configuration of the appliance that has the drive's management controller, reached that way.
fn near(drive: &str, far: &str, keys: &str) -> String {
    let devices = format!(
        "[[device]]\nname = \"drive\"\n{drive}hold = true\n\
         [[device]]\nname = \"far\"\nnvme-tcp = \"{far}\"\nnqn = \"{FAR}\"\nhost-nqn = \"{HOST}\"\n"
    );
    let nqn = "nqn.2026-11.org.example:near";
    let ends = [subsystem("source", nqn, MEMORY), subsystem("destination", nqn, MEMORY)].concat();
    format!("[core]\nstate = \"near\"\n{devices}{ends}{}", tail("source", "destination", keys))
}

/// That appliance, here.
fn start_near(place: &Place, far: &Running, keys: &str) -> Running {
    place.write("near.toml", &near("vfio-user = \"drive.sock\"\n", &far.address(), keys));
    place.start("near.toml")
}

fn leave(place: &Place) -> Output {
    place.dray("near.toml", &[&MOVE[..], &["--json"]].concat())
}

/// What has left is at the other machine, whole, and the drive is not written any more.
#[track_caller]
fn judge(place: &Place, drive: &Drive) {
    let file = || std::fs::File::open(place.path("far.img")).expect("the file");
    let found = verify::check(&mut FileReader::new(file()).expect("a reader"), drive.guest.ledger()).expect("a comparison");
    assert!(found.is_ok() && found.writes_acknowledged > 0, "{found:?}");
    assert!(std::fs::read(place.path("far.img")).expect("the file") == drive.bytes(), "the two are not equal");
    assert!(!drive.is_attached(), "the controller has its namespace");
}

/// What it has written, in one line: errors are broken into several.
fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    text.split(|c: char| c.is_whitespace() || c == '│').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn summary(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{error}: {}", said(output)))
}

#[test]
fn a_controller_that_another_process_drives_leaves_with_its_namespace_and_stays_away() {
    let place = Place::new("device-move-leaves");
    let drive = Drive::start(place.folder(), "Dray software controller");
    let far = start_far(&place);
    let near = start_near(&place, &far, PATIENT);
    assert!(near.said.contains("it tracks controllers that others drive"), "{}", near.said);
    let moved = leave(&place);
    assert!(moved.status.success(), "{}", said(&moved));
    let summary = summary(&moved);
    let told = ["kind", "outcome", "device", "from", "to"].map(|key| summary[key].as_str().unwrap_or_default().to_owned());
    assert_eq!(told, ["departure", "moved", "drive", "device:drive/1", "device:far/1"]);
    assert!(summary["copied_bytes"].as_u64() >= Some(BYTES / 2), "{summary}");
    judge(&place, &drive);
    let state = std::fs::read(place.path("vm.state")).expect("a state");
    let parsed = ControllerState::parse(&state).expect("a state");
    assert!(state[2] & 1 == 1 && parsed.nvme.is_some_and(|nvme| nvme.sqs().len() == 1), "suspended, with the guest's queue");

    // The management controller is reset, more than once, and whoever asks for another move hears what became of it.
    let again = leave(&place);
    assert!(!again.status.success(), "{}", said(&again));
    std::fs::rename(place.path("vm.state"), place.path("kept.state")).expect("renamed");
    let again = leave(&place);
    assert!(!again.status.success() && said(&again).contains("has moved to device:far/1 already"), "{}", said(&again));
    let status = place.dray("near.toml", &["status"]);
    assert!(said(&status).contains("departure 1 of device:drive/1 to device:far/1: done"), "{}", said(&status));
    near.stop();
    let near = start_near(&place, &far, PATIENT);
    assert!(near.said.contains("controller 2 with namespace 1 of device drive has left for device:far/1"), "{}", near.said);
    judge(&place, &drive);
    let history = place.dray("near.toml", &["history", "--json"]);
    assert!(said(&history).contains("departure"), "{}", said(&history));
}

#[test]
fn cancelled_it_stays_and_its_guest_has_seen_nothing() {
    let place = Place::new("device-move-cancelled");
    let drive = Drive::start(place.folder(), "Dray software controller");
    let far = start_far(&place);
    let near = start_near(&place, &far, ENDLESS);
    let mut moving = place.command("near.toml", &MOVE).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("dray runs");
    let mut lines = BufReader::new(moving.stderr.take().expect("its errors")).lines();
    let line = lines.next().expect("progress").expect("a line");
    assert!(line.starts_with("round "), "{line}");
    kill_process(Pid::from_child(&moving), Signal::INT).expect("it runs");
    assert_eq!(moving.wait().expect("an end").code(), Some(130));
    drive.goes_on();
    assert!(drive.is_attached() && !place.path("vm.state").exists() && drive.guest.first_error().is_none());
    // The device can be asked again, and moved from again.
    near.stop();
    let near = start_near(&place, &far, PATIENT);
    drive.goes_on();
    let moved = leave(&place);
    assert!(moved.status.success(), "{}", said(&moved));
    judge(&place, &drive);
    drop(near);
}

#[test]
fn one_that_was_cut_short_between_detachment_and_record_is_attached_again_at_the_next_start() {
    let place = Place::new("device-move-cut");
    let drive = Drive::start(place.folder(), "Dray software controller");
    let far = start_far(&place);
    let near = start_near(&place, &far, ENDLESS);
    cut_short(&place, &drive, near);
    detach(&place.path("drive.sock"));
    assert!(!drive.is_attached());
    std::fs::write(place.path("vm.state"), "stale").expect("a file");
    let near = start_near(&place, &far, PATIENT);
    assert!(near.said.contains("was cut short: it stays, with all its data"), "{}", near.said);
    until("it is attached", || drive.is_attached());
    assert!(!place.path("vm.state").exists(), "the state of a controller that goes on");
    drive.shared.paused.store(false, Ordering::Release);
    drive.goes_on();
    drive.judge();
    let moved = leave(&place);
    assert!(moved.status.success(), "{}", said(&moved));
    judge(&place, &drive);
}

/// Kills the appliance once a move has begun, and lets the guest come to rest.
fn cut_short(place: &Place, drive: &Drive, mut near: Running) {
    let mut moving = place.command("near.toml", &MOVE).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("dray runs");
    let line = BufReader::new(moving.stderr.take().expect("its errors")).lines().next();
    assert!(line.is_some_and(|line| line.is_ok()), "it does not begin");
    near.child.kill().expect("it runs");
    near.child.wait().expect("an end");
    let _status = moving.wait().expect("an end");
    drive.shared.paused.store(true, Ordering::Release);
    until("the guest is quiet", || drive.shared.quiet.load(Ordering::Acquire));
}

#[test]
fn behind_a_record_that_says_moved_nothing_is_attached_whatever_a_crash_has_left() {
    let place = Place::new("device-move-moved");
    let drive = Drive::start(place.folder(), "Dray software controller");
    let far = start_far(&place);
    let near = start_near(&place, &far, ENDLESS);
    cut_short(&place, &drive, near);
    // The record, as it would have been written next.
    let folder = place.path("near/records/departures");
    let names = std::fs::read_dir(&folder).expect("records").map(|entry| entry.expect("an entry").path());
    let path = names.into_iter().find(|path| path.extension().is_some_and(|end| end == "record")).expect("a record");
    let key = path.file_stem().and_then(|stem| u128::from_str_radix(stem.to_str()?, 16).ok()).expect("a key").to_be_bytes();
    let mut store = RecordStore::open(FileMedium::open(&folder, &key).expect("the file"), key).expect("the record");
    let before = store.current().expect("a record").record;
    assert_eq!((before.owner, before.phase), (Owner::Source, RecordPhase::Copying));
    let moved = Record { owner: Owner::Destination, phase: RecordPhase::Moved, fenced: true, epoch: before.epoch + 1, ..before };
    store.write(moved).expect("written");
    drop(store);
    let near = start_near(&place, &far, PATIENT);
    assert!(near.said.contains("has left for device:far/1"), "{}", near.said);
    until("it is detached", || !drive.is_attached());
    let refused = leave(&place);
    assert!(!refused.status.success() && said(&refused).contains("has moved to device:far/1 already"), "{}", said(&refused));
}

#[test]
fn killed_as_it_detaches_a_controller_has_left_or_stays_and_has_all_its_data_either_way() {
    for round in 0..3 {
        let place = Place::new(&format!("device-move-killed-{round}"));
        let drive = Drive::start(place.folder(), "Dray software controller");
        let far = start_far(&place);
        let mut near = start_near(&place, &far, PATIENT);
        let mut moving = place.command("near.toml", &MOVE).stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("dray runs");
        until("it is detached", || !drive.is_attached());
        // What the guest has outstanding may end badly from here on: it has no disk.
        drive.shared.paused.store(true, Ordering::Release);
        let later = Instant::now() + Duration::from_micros(300 * round);
        until("the moment", || Instant::now() >= later);
        near.child.kill().expect("it runs");
        near.child.wait().expect("an end");
        drop(near);
        let _status = moving.wait().expect("an end");
        let near = start_near(&place, &far, PATIENT);
        if near.said.contains("has left for device:far/1") {
            judge(&place, &drive);
            assert!(is_state(&place.path("vm.state")), "the state is lost");
        } else {
            assert!(near.said.contains("was cut short: it stays"), "{}", near.said);
            until("it is attached", || drive.is_attached());
            assert!(!place.path("vm.state").exists());
            drive.judge();
        }
    }
}

/// Whether a file is a suspended controller's state.
fn is_state(path: &Path) -> bool {
    let state = std::fs::read(path).unwrap_or_default();
    ControllerState::parse(&state).is_ok() && state.get(2).is_some_and(|csattr| csattr & 1 == 1)
}

/// Detaches the namespace, as the appliance was about to.
fn detach(socket: &Path) {
    let function = dray::apart::connect(socket, AddressSpace::default()).expect("the drive");
    let mut driver = Driver::new(function, DriverConfig::default()).expect("a driver");
    let start = Instant::now();
    let mut list = vec![0; 4096];
    write_controller_list([MIGRATABLE], &mut list);
    let (mut ticket, entry) = (None, SubmissionEntry::namespace_attachment(1, NamespaceAttachmentSelect::DETACH));
    until("it is detached", || {
        let now = Time(start.elapsed().as_nanos() as u64);
        let _progress = driver.poll(now);
        match ticket {
            None if driver.is_ready() => ticket = driver.request(now, &entry, AdminData::Out(&list)).ok(),
            None => {}
            Some(ticket) => {
                let Some(answer) = driver.answer(ticket) else { return false };
                assert!(!answer.completion.status.is_error(), "{}", answer.completion.status);
                return true;
            }
        }
        false
    });
}

#[test]
fn what_a_drive_cannot_do_is_said_at_the_start_and_refused_in_the_same_words() {
    let place = Place::new("device-move-refused");
    let drive = Drive::start(place.folder(), "QEMU NVMe Ctrl");
    let far = start_far(&place);
    let near = start_near(&place, &far, PATIENT);
    let words = "writes its controller data queue through the migratable function, which another process owns";
    assert!(near.said.contains(words) && near.said.contains("tracks (in software)"), "{}", near.said);
    let refused = leave(&place);
    assert!(refused.status.code() == Some(1) && said(&refused).contains(words), "{}", said(&refused));
    for (args, why) in [
        (["none", "2", "1", "device:far/1"], "no device \"none\""),
        (["far", "2", "1", "device:drive/1"], "cannot do host-managed live migration (OACS, HMLMS)"),
    ] {
        let [device, controller, namespace, to] = args;
        let args = ["device", "move", device, "--controller", controller, "--namespace", namespace, "--to", to, "--state", "vm.state"];
        let refused = place.dray("near.toml", &args);
        assert!(refused.status.code() == Some(1) && said(&refused).contains(why), "{}", said(&refused));
    }
    drive.goes_on();
    assert!(drive.is_attached());
}

#[test]
fn a_drive_that_is_not_tested_is_compared_or_does_not_move() {
    let place = Place::new("device-move-untested");
    let drive = Drive::start(place.folder(), "Some drive");
    let far = start_far(&place);
    let near = start_near(&place, &far, PATIENT);
    for (args, why) in [
        (["9", "1", "device:far/1"], "controller 9 of the source is not attached"),
        (["2", "1", "device:far/7"], "far"),
        (["2", "1", "far.img"], "write device:NAME/NSID"),
        (["2", "1", "device:drive/1"], "it moves itself"),
    ] {
        let [controller, namespace, to] = args;
        let args = ["device", "move", "drive", "--controller", controller, "--namespace", namespace, "--to", to, "--state", "vm.state"];
        let refused = place.dray("near.toml", &args);
        assert!(!refused.status.success() && said(&refused).contains(why), "{}", said(&refused));
    }
    let refused = leave(&place);
    assert!(refused.status.code() == Some(3) && said(&refused).contains("comparing everything"), "{}", said(&refused));
    drive.goes_on();
    near.stop();
    let near = start_near(&place, &far, &format!("{PATIENT}compare = \"1min\"\n"));
    let moved = leave(&place);
    assert!(moved.status.success(), "{}", said(&moved));
    let parts = summary(&moved)["downtime_parts"].to_string();
    assert!(parts.contains("\"compare\""), "{parts}");
    judge(&place, &drive);
    drop(near);
}

/// The management controller is a PCI function of a virtual machine, behind an emulated IOMMU, and the appliance in there has it
/// through the kernel's VFIO: its queue, its data and its state cross that.
#[test]
fn by_vfio_a_controller_leaves_as_well() {
    let _turn = dray_tests::guest::turn();
    let place = Place::new("device-move-vfio");
    let drive = Drive::start(place.folder(), "Dray software controller");
    let far = start_far(&place);
    let port = far.address().rsplit_once(':').map(|(_, port)| port.to_owned()).expect("a port");
    let config = near("pci = \"0000:01:00.0\"\nbind = true\n", &format!("10.0.2.2:{port}"), "downtime = \"20s\"\n");
    let initrd = Initrd::with_dray_and(&[("near.toml", config.as_bytes())]);
    let machine = Machine::new("device-move").network().iommu_before(&place.path("drive.sock")).initrd(initrd.path());
    let mut guest = Virtual::boot(&machine);
    guest.run("net");
    guest.run("cp /near.toml /tmp/near.toml; start run 'dray --config /tmp/near.toml run'");
    guest.run("await 120 grep -q ^ready /tmp/run.log");
    let said = guest.run("cat /tmp/run.log");
    assert!(said.contains("drive: pci 0000:01:00.0; host-managed live migration: it tracks"), "{said}");
    drive.goes_on();
    let command = MOVE.join(" ").replace("vm.state", "/tmp/vm.state");
    let moved = guest.run_within(&format!("dray --config /tmp/near.toml {command} --json 2>&1 | cat"), Duration::from_secs(180));
    assert!(moved.contains("\"outcome\":\"moved\""), "{moved}");
    judge(&place, &drive);
    // What was written to the file is what the drive said.
    let bytes = guest.run("od -An -v -tx1 /tmp/vm.state");
    let bytes: Vec<u8> = bytes.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect();
    let state = ControllerState::parse(&bytes).expect("a state");
    assert!(bytes[2] & 1 == 1 && state.nvme.is_some_and(|nvme| nvme.sqs().len() == 1), "suspended, with the guest's queue");
    guest.run("stop --config /tmp/near.toml run");
    guest.run("finish run 60");
    guest.off();
}
