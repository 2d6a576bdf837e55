//! A VM manager moves its guest over vfio-user: `dray run` with both ends exported, a guest that keeps its memory and its queues,
//! and everything that can go wrong on the way.
#![allow(missing_docs)]

use dray_device::command::CommandQueue;
use dray_device::event::EventLine;
use dray_device::function::{Doorbell, Function};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::socket::UnixSocket;
use dray_device::space::AddressSpace;
use dray_device::vfio_user::client::{ClientConfig, ClientError, VfioUserClient};
use dray_device::vfio_user::wire::{errno, migration, state};
use dray_driver::{AdminData, Driver, DriverConfig, QueuePair, QueuePairConfig};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::registers::{Csts, offset};
use dray_workload::guest::{Guest, GuestConfig, GuestHandle, GuestStage};
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::verify;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const BOTH: [&str; 2] = ["source", "destination"];

/// The binary beside this test's folder: `cargo test --workspace` builds both.
fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("this test");
    let folder = test.ancestors().find(|folder| folder.join("dray").is_file());
    folder.unwrap_or_else(|| panic!("no dray beside {}: cargo build --workspace", test.display())).join("dray")
}

/// A configuration in a folder that goes away with the test.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

impl Place {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dray-over-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let side = |name: &&str| {
            format!(
                "[[subsystem]]\nname = \"{name}\"\nnqn = \"nqn.2026-11.org.example:it\"\nserial = \"S-1\"\n\
                 [[subsystem.namespace]]\nnsid = 1\nbacking = \"file\"\npath = \"{name}.img\"\nsize = \"8MiB\"\n\
                 nguid = \"000000000000000000000000000000a1\"\n\
                 [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
                 [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n\
                 [[export]]\nsubsystem = \"{name}\"\ncontroller = 2\nby = \"vfio-user\"\n"
            )
        };
        let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
        let migration = "[migration]\nfrom = \"source\"\nto = \"destination\"\n";
        let sides = BOTH.iter().map(side).collect::<String>();
        let text = format!("[core]\nstate = \"state\"\n{sides}{migration}{policies}");
        std::fs::write(folder.join("appliance.toml"), text).expect("a file");
        Self(folder)
    }

    fn dray(&self, args: &[&str]) -> Output {
        let mut command = Command::new(binary());
        command.args(args).current_dir(&self.0).stdin(Stdio::null()).output().expect("dray runs")
    }

    /// Starts the appliance and waits until it says that it is ready.
    fn start(&self) -> Running {
        let mut command = Command::new(binary());
        command.arg("run").current_dir(&self.0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("dray runs");
        let mut lines = BufReader::new(child.stdout.take().expect("its output"));
        let mut said = String::new();
        while !said.ends_with("ready\n") {
            assert!(lines.read_line(&mut said).expect("a line") > 0, "it has ended: {said}");
        }
        Running { child, lines, said }
    }

    fn status(&self) -> Value {
        let output = self.dray(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn serving(&self) -> String {
        self.status()["migration"]["serving"].as_str().expect("a name").to_owned()
    }

    /// Waits until the main thread has seen the end of what runs.
    #[track_caller]
    fn settled(&self) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if status["migrations"]["running"].is_null() {
                return status;
            }
            assert!(Instant::now() < end, "{status}");
        }
    }

    fn image(&self, end: &str) -> Vec<u8> {
        std::fs::read(self.0.join(format!("{end}.img"))).expect("a file")
    }

    /// Everything that the guest was told is in an end's file.
    #[track_caller]
    fn verify(&self, end: &str) {
        let ledger = Ledger::open(&self.0.join("ledger")).expect("the ledger");
        let found = verify::check(&mut self.image(end), &ledger).expect("a comparison");
        assert!(found.is_ok() && found.writes_acknowledged > 0, "{end}: {found:?}");
    }
}

/// An appliance; killed with the test if it fails.
struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    said: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Running {
    fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal");
        let mut said = String::new();
        self.lines.read_to_string(&mut said).expect("its output");
        assert_eq!(self.child.wait().expect("wait").code(), Some(0), "{said}");
        said
    }

    fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("dead");
    }
}

/// A connection of the manager's to one end.
type End = Arc<VfioUserClient>;

fn connect(place: &Place, end: &str, space: &AddressSpace) -> End {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let socket = UnixSocket::connect(&place.0.join(format!("state/{end}-2.sock"))).expect("the export");
        let config = ClientConfig { timeout_ms: 60_000, ..ClientConfig::default() };
        match VfioUserClient::connect(Box::new(socket), space.clone(), &config) {
            Ok(client) => return client,
            // One that has just left may not have been seen to.
            Err(ClientError::Closed | ClientError::Gone) if Instant::now() < deadline => {}
            Err(error) => panic!("{end}: {error}"),
        }
    }
}

/// The function as the guest has it: at one end or the other, as the manager says.
#[derive(Debug)]
struct Bridge {
    me: Weak<Bridge>,
    now: Mutex<End>,
    space: AddressSpace,
}

impl Bridge {
    fn new(end: &End, space: &AddressSpace) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { me: me.clone(), now: Mutex::new(Arc::clone(end)), space: space.clone() })
    }

    fn end(&self) -> End {
        Arc::clone(&self.now.lock().expect("lock"))
    }
}

impl Function for Bridge {
    fn read32(&self, at: u32) -> u32 {
        self.end().read32(at)
    }

    fn write32(&self, at: u32, value: u32) {
        let end = self.end();
        match end.doorbell(at) {
            Some(bell) => bell.ring(value),
            None => end.write32(at, value),
        }
    }

    fn doorbell(&self, at: u32) -> Option<Doorbell> {
        self.end().doorbell(at)?;
        let function: Arc<dyn Function> = self.me.upgrade()?;
        Some(Doorbell::Trapped { function, offset: at })
    }

    fn space(&self) -> &AddressSpace {
        &self.space
    }

    fn event_line(&self, _vector: u16) -> Option<EventLine> {
        None
    }

    fn reset(&self) -> std::io::Result<()> {
        self.end().reset()
    }
}

/// A virtual machine: its memory, its processor (a thread that polls the guest while it is not paused), its manager's connections.
struct Vm {
    space: AddressSpace,
    bridge: Arc<Bridge>,
    handle: GuestHandle,
    paused: Arc<AtomicBool>,
    parked: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Boots at an end, and goes on with the ledger in the place if there is one.
    fn boot(place: &Place, end: &str) -> Self {
        let space = AddressSpace::default();
        let bridge = Bridge::new(&connect(place, end, &space), &space);
        let path = place.0.join("ledger");
        let ledger = if path.exists() {
            Ledger::resume(&path)
        } else {
            Ledger::create(&path, &LedgerSpec { seed: 7, guest: 1, blocks: (0..512).map(|n| n * 4).collect() })
        };
        let function: Arc<dyn Function> = Arc::clone(&bridge) as Arc<dyn Function>;
        let driver = Driver::new(function, DriverConfig::default()).expect("a driver");
        let (mut guest, handle) = Guest::new(driver, GuestConfig::default(), Arc::new(ledger.expect("a ledger"))).expect("a guest");
        let (paused, parked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (of, wait, says) = (handle.clone(), Arc::clone(&paused), Arc::clone(&parked));
        let thread = std::thread::spawn(move || {
            let (begun, mut stood) = (Instant::now(), Duration::ZERO);
            while !of.is_over() && begun.elapsed() < 4 * PATIENCE {
                let stop = Instant::now();
                while wait.load(Ordering::Acquire) && !of.is_over() && stop.elapsed() < 3 * PATIENCE {
                    says.store(true, Ordering::Release);
                    std::thread::yield_now();
                }
                says.store(false, Ordering::Release);
                // A paused machine's clock stands still.
                stood += stop.elapsed();
                let _progress = guest.poll(Time((begun.elapsed() - stood).as_nanos() as u64));
                std::thread::yield_now();
            }
        });
        let vm = Self { space, bridge, handle, paused, parked, thread: Some(thread) };
        vm.until("the guest runs", |handle| handle.stage() == GuestStage::Running);
        vm
    }

    #[track_caller]
    fn until(&self, what: &str, mut done: impl FnMut(&GuestHandle) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(&self.handle) {
            assert!(Instant::now() < end && !self.handle.is_over(), "{what}: {:?}", self.handle.first_error());
            std::thread::yield_now();
        }
    }

    #[track_caller]
    fn goes_on(&self, writes: u64) {
        let before = self.handle.counters().writes;
        self.until("the guest goes on", |handle| handle.counters().writes >= before + writes);
    }

    fn pause(&self) {
        self.paused.store(true, Ordering::Release);
        let end = Instant::now() + PATIENCE;
        while !self.parked.load(Ordering::Acquire) {
            assert!(Instant::now() < end, "the processor does not stop");
            std::thread::yield_now();
        }
    }

    fn unpause(&self) {
        self.paused.store(false, Ordering::Release);
    }

    fn end(&self) -> End {
        self.bridge.end()
    }

    /// The guest's function is another end's from now on.
    fn goes_to(&self, end: &End) {
        *self.bridge.now.lock().expect("lock") = Arc::clone(end);
    }

    /// Resets its controller, stops, and finds nothing wrong.
    #[track_caller]
    fn stop(mut self) {
        let before = self.handle.counters().resets;
        self.handle.request_reset();
        self.until("the guest resets", |handle| handle.counters().resets > before && handle.stage() == GuestStage::Running);
        self.goes_on(20);
        self.handle.stop();
        self.thread.take().expect("a thread").join().expect("no panic");
        assert!(self.handle.is_over() && self.handle.stats().is_ok(), "{:?} {:?}", self.handle.first_error(), self.handle.stats());
        assert_eq!(self.handle.counters().surprises, 0, "it saw nothing but its own reset");
    }

    /// Pulled out: whatever the guest says.
    fn bury(mut self) {
        self.handle.stop();
        self.unpause();
        self.thread.take().expect("a thread").join().expect("no panic");
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.handle.stop();
        self.paused.store(false, Ordering::Release);
    }
}

#[track_caller]
fn go(end: &End, to: u32) {
    end.set_migration_state(to).unwrap_or_else(|error| panic!("state {to}: {error}"));
    assert_eq!(end.migration_state().expect("a state"), to);
}

/// The errno of a refusal, and the state that it has left the device in: on the way of several steps that is the last good one.
#[track_caller]
fn refused(end: &End, to: u32) -> (u32, u32) {
    let errno = refusal(end.set_migration_state(to));
    (errno, end.migration_state().expect("a state"))
}

#[track_caller]
fn refusal<T>(result: Result<T, ClientError>) -> u32 {
    match result {
        Err(ClientError::Refused { errno, .. }) => errno,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Reads the whole stream in pieces of this size.
#[track_caller]
fn stream(end: &End, piece: u32) -> Vec<u8> {
    let mut stream = Vec::new();
    while end.mig_read(piece, &mut stream).expect("a piece") == piece {}
    stream
}

/// Writes a stream in pieces of this size.
fn bring(end: &End, stream: &[u8], piece: usize) {
    stream.chunks(piece).for_each(|piece| end.mig_write(piece).expect("taken"));
}

/// Pauses the machine and takes its state from the end where it is.
fn carry(vm: &Vm, piece: u32) -> Vec<u8> {
    vm.handle.mark_suspend();
    vm.pause();
    go(&vm.end(), state::STOP_COPY);
    stream(&vm.end(), piece)
}

#[test]
fn a_guest_goes_there_and_back_with_its_memory_and_its_queues() {
    let place = Place::new("moves");
    let running = place.start();
    assert!(running.said.contains("fenced: the other end of [migration] serves"), "{}", running.said);
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    assert_eq!(source.migration_ways().expect("ways"), migration::STOP_COPY | migration::PRE_COPY);
    vm.goes_on(100);
    go(&source, state::PRE_COPY);
    let mut nothing = Vec::new();
    assert_eq!(source.mig_read(4096, &mut nothing).expect("nothing for now"), 0);
    let status = place.status();
    let running_now = &status["migrations"]["running"];
    assert_eq!((&running_now["kind"], &running_now["from"]), (&"hand-over".into(), &"source".into()), "{status}");
    vm.goes_on(300);
    let destination = connect(&place, "destination", &vm.space);
    go(&destination, state::RESUMING);
    let carried = carry(&vm, 777);
    assert!(place.image("source") == place.image("destination"), "all media were there before the end of the stream");
    assert_eq!(place.status()["migrations"]["running"]["phase"], "told");
    assert_eq!(refused(&destination, state::PRE_COPY), (errno::EBUSY, state::STOP), "it does not serve yet");
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 333);
    go(&destination, state::RUNNING);
    vm.goes_to(&destination);
    vm.handle.mark_resume();
    vm.unpause();
    vm.goes_on(300);
    let status = place.settled();
    assert_eq!((&status["migration"]["serving"], &status["migrations"]["ended"][0]["outcome"]), (&"destination".into(), &"moved".into()));
    assert_eq!(status["subsystems"][0]["controllers"][1]["fenced"], true);
    assert_eq!(status["subsystems"][1]["controllers"][1]["fenced"], false);
    // The source has nothing more to say.
    assert_eq!(refused(&source, state::RUNNING), (errno::EBUSY, state::STOP));
    let left = place.image("source");
    source.reset().expect("a reset is always taken");
    assert_eq!(source.migration_state().expect("a state"), state::RUNNING);
    source.write32(offset::CC, 0x46_0001);
    assert!((0..200).all(|_| !Csts::from_bits(source.read32(offset::CSTS)).rdy()), "nothing becomes ready behind its fence");
    assert_eq!(refused(&source, state::PRE_COPY), (errno::EBUSY, state::RUNNING));
    vm.goes_on(100);
    vm.pause();
    assert!(place.image("source") == left, "the source is written no more");
    place.verify("destination");
    vm.unpause();

    // And back, by the same manager.
    go(&destination, state::PRE_COPY);
    vm.goes_on(100);
    go(&source, state::RESUMING);
    let carried = carry(&vm, 100_000);
    bring(&source, &carried, 7);
    go(&source, state::STOP);
    go(&source, state::RUNNING);
    vm.goes_to(&source);
    vm.handle.mark_resume();
    vm.unpause();
    vm.goes_on(100);
    place.settled();
    assert_eq!(place.serving(), "source");
    vm.stop();
    running.stop();
    place.verify("source");
    let running = place.start();
    assert!(running.said.contains("the destination serves") && place.serving() == "source", "{}", running.said);
    running.stop();
}

#[test]
fn a_manager_that_changes_its_mind_has_its_guest_where_it_was() {
    let place = Place::new("back");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    let destination = connect(&place, "destination", &vm.space);
    vm.goes_on(50);
    // In PRE_COPY.
    go(&source, state::PRE_COPY);
    vm.goes_on(50);
    go(&source, state::RUNNING);
    vm.goes_on(50);
    // In STOP, which begins nothing.
    vm.pause();
    go(&source, state::STOP);
    let stopped = place.image("source");
    assert_eq!(place.status()["subsystems"][0]["controllers"][1]["fenced"], true);
    vm.unpause();
    std::thread::sleep(Duration::from_millis(50));
    assert!(place.image("source") == stopped, "a device that is stopped does nothing, whatever the guest rings");
    go(&source, state::RUNNING);
    vm.goes_on(50);
    // In STOP_COPY, by way of STOP and by way of PRE_COPY, with the state in its hands or even at the destination.
    for (way, taken) in [(None, false), (Some(state::PRE_COPY), false), (Some(state::PRE_COPY), true), (Some(state::STOP), true)] {
        if let Some(way) = way {
            go(&source, way);
        }
        go(&destination, state::RESUMING);
        let carried = carry(&vm, 5_000);
        if taken {
            bring(&destination, &carried, 5_000);
            go(&destination, state::STOP);
        }
        go(&source, state::RUNNING);
        vm.handle.clear_marks();
        vm.unpause();
        vm.goes_on(50);
        if taken {
            assert_eq!(refused(&destination, state::RUNNING), (errno::EIO, state::STOP), "it was taken back");
        } else {
            bring(&destination, &carried, 5_000);
            assert_eq!(refused(&destination, state::RUNNING), (errno::EINVAL, state::RESUMING), "the state is void");
            assert_eq!(refused(&destination, state::RUNNING), (errno::EBUSY, state::STOP), "and without one nothing runs");
        }
        destination.reset().expect("a reset");
        let ended = place.settled();
        assert_eq!((&ended["migration"]["serving"], ended["migrations"]["running"].is_null()), (&"source".into(), true));
    }
    // A reset in STOP_COPY before the destination runs: the guest has to begin anew, at the source.
    go(&source, state::PRE_COPY);
    let carried = carry(&vm, 5_000);
    source.reset().expect("a reset");
    assert_eq!(source.migration_state().expect("a state"), state::RUNNING);
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 5_000);
    assert_eq!(refused(&destination, state::STOP), (errno::EINVAL, state::RESUMING));
    assert_eq!(place.serving(), "source");
    vm.bury();
    drop((source, destination));
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    vm.stop();
    running.stop();
    place.verify("source");
}

#[test]
fn only_the_state_that_was_told_is_taken_and_only_with_it_the_destination_runs() {
    let place = Place::new("blobs");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    let destination = connect(&place, "destination", &vm.space);
    vm.goes_on(50);
    assert_eq!(refused(&source, state::RESUMING), (errno::EBUSY, state::STOP), "it serves");
    go(&source, state::RUNNING);
    // A state of a migration that was.
    go(&source, state::PRE_COPY);
    let old = carry(&vm, 5_000);
    go(&source, state::RUNNING);
    vm.handle.clear_marks();
    vm.unpause();
    go(&destination, state::RESUMING);
    assert_eq!(refused(&destination, state::RUNNING), (errno::EBUSY, state::STOP), "nothing was brought");
    go(&destination, state::RESUMING);
    vm.goes_on(50);
    go(&source, state::PRE_COPY);
    bring(&destination, &old, 5_000);
    assert_eq!(refused(&destination, state::STOP), (errno::EINVAL, state::RESUMING), "replayed while another one copies");
    let carried = carry(&vm, 5_000);
    assert_eq!(carried.len(), old.len());
    let whole = carried.len();
    let mut bad: Vec<(Vec<u8>, &str)> = vec![
        (old, "of another migration"),
        (carried[..whole - 1].to_vec(), "truncated"),
        (carried[..30].to_vec(), "truncated early"),
        ([&carried[..], &[0; 8]].concat(), "too long"),
    ];
    for at in [0, 9, 20, 45, 60, 75, 150, whole / 2, whole - 1] {
        let mut changed = carried.clone();
        changed[at] ^= 4;
        bad.push((changed, "changed"));
    }
    for (bytes, what) in bad {
        bring(&destination, &bytes, 1_000);
        assert_eq!(refused(&destination, state::RUNNING), (errno::EINVAL, state::RESUMING), "{what}");
    }
    // One that goes away with the state, and the next one brings it again.
    bring(&destination, &carried, 1_000);
    go(&destination, state::STOP);
    destination.reset().expect("a reset");
    assert_eq!(destination.migration_state().expect("a state"), state::RUNNING);
    destination.write32(offset::CC, 0x46_0001);
    assert!((0..200).all(|_| !Csts::from_bits(destination.read32(offset::CSTS)).rdy()), "a reset does not make it serve");
    assert_eq!(place.serving(), "source", "nobody runs yet");
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 1);
    go(&destination, state::RUNNING);
    vm.goes_to(&destination);
    vm.handle.mark_resume();
    vm.unpause();
    vm.goes_on(100);
    // Replayed at the end that serves, and at the one that does not any more.
    assert_eq!(refused(&destination, state::RESUMING), (errno::EBUSY, state::STOP));
    go(&destination, state::RUNNING);
    go(&source, state::RESUMING);
    bring(&source, &carried, 5_000);
    assert_eq!(refused(&source, state::STOP), (errno::EINVAL, state::RESUMING));
    vm.stop();
    running.stop();
    place.verify("destination");
}

#[test]
fn a_manager_that_dies_leaves_a_guest_that_runs_or_waits() {
    let place = Place::new("dies");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    vm.goes_on(50);
    go(&vm.end(), state::PRE_COPY);
    vm.goes_on(20);
    vm.bury();
    // What it had begun is undone.
    let ended = place.settled();
    assert_eq!(ended["migrations"]["ended"][0]["outcome"], "undone", "{ended}");
    let vm = Vm::boot(&place, "source");
    vm.goes_on(50);
    // In STOP_COPY its device stays so: whoever comes next reads the stream, or takes the guest back.
    go(&vm.end(), state::PRE_COPY);
    let carried = carry(&vm, 5_000);
    vm.bury();
    assert_eq!(place.status()["migrations"]["running"]["phase"], "told");
    let space = AddressSpace::default();
    let next = connect(&place, "source", &space);
    assert_eq!(next.migration_state().expect("a state"), state::STOP_COPY);
    assert!(stream(&next, 999) == carried);
    // The destination's manager is the one that dies with the state in its hands: nobody's memory is there for the next one.
    let memory = DmaBuffer::allocate("machine", 1 << 20, Pages::Small).expect("memory");
    let other = AddressSpace::default();
    other.map(&memory, true).expect("mapped");
    let destination = connect(&place, "destination", &other);
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 5_000);
    assert_eq!(refused(&destination, state::STOP), (errno::EINVAL, state::RESUMING), "its queues are nowhere");
    drop(destination);
    go(&next, state::RUNNING);
    let ended = place.settled();
    assert_eq!((&ended["migration"]["serving"], &ended["migrations"]["ended"][1]["outcome"]), (&"source".into(), &"undone".into()));
    drop(next);
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    vm.stop();
    running.stop();
    place.verify("source");
}

#[test]
fn others_wait_while_a_client_migrates_and_the_operator_can_end_it() {
    let place = Place::new("others");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    let said = |args: &[&str]| {
        let output = place.dray(args);
        let text = String::from_utf8_lossy(&output.stderr).replace(['\n', '│'], " ");
        (output.status.code(), text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let (code, text) = said(&["migrate", "source", "--to", "destination"]);
    assert!(code == Some(1) && text.contains("their VM managers move them"), "{text}");
    // A client that has stopped its device needs the management controller as well.
    go(&vm.end(), state::STOP);
    let (code, text) = said(&["media-move", "source", "1", "--to", "copy.img"]);
    assert!(code == Some(1) && text.contains("over vfio-user"), "{text}");
    go(&vm.end(), state::RUNNING);
    go(&vm.end(), state::PRE_COPY);
    let (code, text) = said(&["media-move", "source", "1", "--to", "copy.img"]);
    assert!(code == Some(1) && !place.0.join("copy.img").exists(), "{text}");
    vm.goes_on(20);
    go(&vm.end(), state::RUNNING);
    place.settled();
    let (code, text) = said(&["media-move", "source", "1", "--to", "copy.img"]);
    assert_eq!(code, Some(0), "{text}");
    vm.goes_on(20);
    // A stop of the appliance undoes what was told.
    go(&vm.end(), state::PRE_COPY);
    let _carried = carry(&vm, 5_000);
    let said = running.stop();
    assert!(said.contains("cancelled") && said.ends_with("stopped\n"), "{said}");
    vm.bury();
    let running = place.start();
    assert_eq!(place.serving(), "source");
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    vm.stop();
    running.stop();
    std::fs::rename(place.0.join("copy.img"), place.0.join("served.img")).expect("a file");
    place.verify("served");
}

#[test]
fn killed_anywhere_it_serves_at_one_end_and_has_lost_nothing() {
    for (turn, (at, serving)) in
        [("copying", "source"), ("stopped", "source"), ("told", "destination"), ("taken", "destination"), ("running", "destination")]
            .into_iter()
            .enumerate()
    {
        let place = Place::new(&format!("killed-{turn}"));
        let running = place.start();
        let vm = Vm::boot(&place, "source");
        let source = vm.end();
        let destination = connect(&place, "destination", &vm.space);
        vm.goes_on(50);
        match at {
            "copying" => {
                go(&source, state::PRE_COPY);
                vm.goes_on(20);
            }
            "stopped" => {
                vm.pause();
                go(&source, state::STOP);
            }
            _ => {
                go(&source, state::PRE_COPY);
                vm.goes_on(20);
                go(&destination, state::RESUMING);
                let carried = carry(&vm, 5_000);
                if at != "told" {
                    bring(&destination, &carried, 5_000);
                    go(&destination, state::STOP);
                }
                if at == "running" {
                    go(&destination, state::RUNNING);
                    vm.goes_to(&destination);
                    vm.handle.mark_resume();
                    vm.unpause();
                    vm.goes_on(20);
                }
            }
        }
        running.kill();
        vm.bury();
        let running = place.start();
        let status = place.status();
        assert_eq!(status["migration"]["serving"], serving, "{at}: {}", running.said);
        let fenced: Vec<_> = (0..2).map(|end| status["subsystems"][end]["controllers"][1]["fenced"] == true).collect();
        assert_eq!(fenced, [serving != "source", serving != "destination"], "{at}: exactly one side serves");
        place.verify(serving);
        let vm = Vm::boot(&place, serving);
        vm.goes_on(20);
        vm.stop();
        running.stop();
        place.verify(serving);
    }
}

/// A machine without a guest: a driver and an I/O queue by hand, so that every write to its memory is known.
struct Bare {
    end: End,
    driver: Driver,
    queue: QueuePair,
    memory: DmaBuffer,
    iova: u64,
    begun: Instant,
}

impl Bare {
    fn boot(place: &Place, space: &AddressSpace) -> Self {
        let memory = DmaBuffer::allocate("machine", 4 << 20, Pages::Small).expect("memory");
        let iova = space.map(&memory, true).expect("mapped");
        let end = connect(place, "source", space);
        let mut driver = Driver::new(Arc::clone(&end) as Arc<dyn Function>, DriverConfig::default()).expect("a driver");
        let begun = Instant::now();
        let now = || Time(begun.elapsed().as_nanos() as u64);
        let mut ticket = None;
        let queue = loop {
            let _progress = driver.poll(now());
            assert!(begun.elapsed() < PATIENCE, "no queue");
            match &ticket {
                None if driver.is_ready() => {
                    ticket = driver.create_queue_pair(now(), QueuePairConfig { entries: 64, vector: None }).ok();
                }
                None => {}
                Some(asked) => {
                    if let Some(pair) = driver.queue_pair(asked) {
                        break pair.expect("a queue");
                    }
                }
            }
        };
        Self { end, driver, queue, memory, iova, begun }
    }

    fn now(&self) -> Time {
        Time(self.begun.elapsed().as_nanos() as u64)
    }

    /// Reads a block of the namespace into a page of the memory.
    #[track_caller]
    fn read(&mut self, block: u64, page: usize) {
        let data = self.memory.part(page * 4096, 4096).expect("a page");
        self.queue.submit(self.now(), &SubmissionEntry::read(1, block, 1), &[data], 7).expect("submitted");
        self.queue.commit();
        let (mut over, end) = (false, Instant::now() + PATIENCE);
        while !over {
            let now = self.now();
            self.queue.poll(now, &mut |completion| {
                assert!(!completion.status.is_error(), "{completion:?}");
                over = true;
            });
            let _progress = self.driver.poll(now);
            assert!(Instant::now() < end, "it does not end");
            std::thread::yield_now();
        }
    }

    /// An admin command that returns data to the driver's own memory.
    fn identify(&mut self) {
        use dray_nvme::identify::{Cns, CommandSetId};
        let entry = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
        let ticket = self.driver.request(self.now(), &entry, AdminData::In(4096)).expect("asked");
        let end = Instant::now() + PATIENCE;
        loop {
            let now = self.now();
            let _progress = self.driver.poll(now);
            if self.driver.answer(ticket).is_some() {
                return;
            }
            assert!(Instant::now() < end, "no answer");
        }
    }
}

/// Every page of a machine's memory, by address.
fn pages(space: &AddressSpace) -> Vec<(u64, Vec<u8>)> {
    let reader = space.reader();
    let mut pages = Vec::new();
    for mapping in reader.mappings() {
        for at in (0..mapping.memory.len()).step_by(4096) {
            let mut bytes = vec![0; 4096];
            mapping.memory.part(at, 4096).expect("a page").read(&mut bytes);
            pages.push((mapping.iova + at as u64, bytes));
        }
    }
    pages
}

/// What the log says was written, of the whole memory.
fn logged(end: &End, space: &AddressSpace) -> Vec<u64> {
    let ranges: Vec<_> = space.reader().mappings().iter().map(|mapping| (mapping.iova, mapping.memory.len() as u64)).collect();
    let mut pages = Vec::new();
    for (iova, len) in ranges {
        let bits = end.logging_report(iova, len, 4096).expect("a report");
        pages.extend((0..len / 4096).filter(|bit| bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1).map(|bit| iova + bit * 4096));
    }
    pages
}

#[test]
fn the_log_has_the_pages_that_the_controller_wrote_and_no_others() {
    let place = Place::new("log");
    let image: Vec<u8> = (0..8usize << 20).map(|at| (at / 4096 * 7 + at % 251 + 1) as u8).collect();
    std::fs::write(place.0.join("source.img"), image).expect("a disk");
    let running = place.start();
    let space = AddressSpace::default();
    let mut machine = Bare::boot(&place, &space);
    let end = Arc::clone(&machine.end);
    machine.read(3, 0);
    assert!(end.logging_report(machine.iova, 4096, 4096).is_err(), "it is not on");
    assert_eq!(end.logging_start(4096, &[]).expect("on"), 4096);
    assert_eq!(logged(&end, &space), [0; 0], "nothing since");
    let mut random = fastrand::Rng::with_seed(4);
    for turn in 0..6 {
        let before = pages(&space);
        let mut wanted = std::collections::BTreeSet::new();
        for _ in 0..1 + turn * 20 {
            // Each page once: what is read twice alike would not show in the shadow.
            let page = random.usize(turn * 160..turn * 160 + 160);
            if wanted.insert(machine.iova + page as u64 * 4096) {
                machine.read(random.u64(0..2048), page);
            }
        }
        if turn % 2 == 1 {
            machine.identify();
        }
        if turn == 5 {
            // What is told after the stop is all there is.
            go(&end, state::STOP);
        }
        let told = logged(&end, &space);
        let changed: Vec<u64> = before.iter().zip(pages(&space)).filter(|(old, new)| old.1 != new.1).map(|(old, _)| old.0).collect();
        // The processor wrote some of what has changed: commands. The machine's own memory only the controller writes.
        let own = machine.iova..machine.iova + machine.memory.len() as u64;
        let (data, queues): (Vec<u64>, Vec<u64>) = told.iter().partition(|at| own.contains(at));
        let shadow: Vec<u64> = changed.iter().copied().filter(|at| own.contains(at)).collect();
        assert_eq!(data, shadow, "turn {turn}");
        assert_eq!(data, wanted.into_iter().collect::<Vec<_>>(), "turn {turn}");
        // Completion queues, and the page of an admin command's data: each has changed, and the submission queues are not told.
        assert!(!queues.is_empty() && queues.iter().all(|at| changed.contains(at) || turn % 2 == 1), "turn {turn}: {queues:x?} {changed:x?}");
        assert!(changed.len() > shadow.len() + queues.len().min(1), "the shadow saw submission queues too");
        assert_eq!(logged(&end, &space), [0; 0], "told once");
    }
    assert_eq!(refusal(end.logging_start(4096, &[])), errno::EBUSY, "it is on");
    go(&end, state::RUNNING);
    end.logging_stop().expect("off");
    // Ranges, larger pages, and memory that is mapped later.
    let ranges = [dray_device::vfio_user::wire::LogRange { iova: machine.iova, length: 2 << 20 }];
    assert_eq!(end.logging_start(1 << 16, &ranges).expect("on"), 1 << 16);
    machine.read(1, 17);
    machine.read(1, 600);
    let bits = end.logging_report(machine.iova, 4 << 20, 1 << 16).expect("a report");
    // Bit 1 is page 17; what is beyond the ranges is not logged.
    assert_eq!((bits[0], bits[1..].iter().any(|byte| *byte != 0)), (2, false), "{bits:?}");
    end.logging_stop().expect("off");
    assert_eq!(end.logging_start(4096, &[]).expect("on"), 4096);
    let more = DmaBuffer::allocate("more", 8192, Pages::Small).expect("memory");
    let at = space.map(&more, true).expect("mapped");
    for _ in 0..2 {
        assert_eq!(end.logging_report(at, 8192, 4096).expect("a report")[0], 3, "memory that is not tracked counts as written");
    }
    // A client that leaves takes its log along; a machine that is stopped cannot begin one.
    drop((machine, end));
    let machine = Bare::boot(&place, &AddressSpace::default());
    go(&machine.end, state::STOP);
    assert_eq!(refusal(machine.end.logging_start(4096, &[])), errno::EBUSY);
    go(&machine.end, state::RUNNING);
    machine.end.logging_start(4096, &[]).expect("on");
    drop(machine);
    running.stop();
}

#[test]
fn the_log_goes_on_through_a_migration() {
    let place = Place::new("log-moves");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    source.logging_start(4096, &[]).expect("on");
    vm.goes_on(50);
    go(&source, state::PRE_COPY);
    for _ in 0..5 {
        vm.goes_on(50);
        assert!(!logged(&source, &vm.space).is_empty());
    }
    vm.handle.mark_suspend();
    vm.pause();
    // The processor stands still: from here on what changes in memory is the controller's.
    let before = pages(&vm.space);
    go(&source, state::STOP_COPY);
    let last: std::collections::BTreeSet<u64> = logged(&source, &vm.space).into_iter().collect();
    let changed = before.iter().zip(pages(&vm.space)).filter(|(old, new)| old.1 != new.1).map(|(old, _)| old.0);
    let missing: Vec<u64> = changed.filter(|at| !last.contains(at)).collect();
    assert!(missing.is_empty(), "written by the controller and not told: {missing:x?}");
    let carried = stream(&source, 4_096);
    assert_eq!(logged(&source, &vm.space), [0; 0], "a device that is stopped writes nothing");
    let destination = connect(&place, "destination", &vm.space);
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 4_096);
    go(&destination, state::RUNNING);
    vm.goes_to(&destination);
    vm.handle.mark_resume();
    vm.unpause();
    source.logging_stop().expect("off");
    vm.goes_on(50);
    vm.stop();
    running.stop();
    place.verify("destination");
}
