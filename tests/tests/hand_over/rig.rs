//! A folder, an appliance on it, and a virtual machine with its manager.

use dray_device::event::EventLine;
use dray_device::function::{Doorbell, Function};
use dray_device::poll::{Poll, Time};
use dray_device::socket::UnixSocket;
use dray_device::space::AddressSpace;
use dray_device::vfio_user::client::{ClientConfig, ClientError, VfioUserClient};
use dray_device::vfio_user::wire::state;
use dray_driver::{Driver, DriverConfig};
pub use dray_tests::dray_in_guest::binary;
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

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const BOTH: [&str; 2] = ["source", "destination"];

/// A configuration in a folder that goes away with the test.
pub struct Place(pub PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

impl Place {
    pub fn new(name: &str) -> Self {
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

    pub fn dray(&self, args: &[&str]) -> Output {
        let mut command = Command::new(binary());
        command.args(args).current_dir(&self.0).stdin(Stdio::null()).output().expect("dray runs")
    }

    /// Starts the appliance and waits until it says that it is ready.
    pub fn start(&self) -> Running {
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

    pub fn status(&self) -> Value {
        let output = self.dray(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    pub fn serving(&self) -> String {
        self.status()["migration"]["serving"].as_str().expect("a name").to_owned()
    }

    /// Waits until the main thread has seen the end of what runs.
    #[track_caller]
    pub fn settled(&self) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if status["migrations"]["running"].is_null() {
                return status;
            }
            assert!(Instant::now() < end, "{status}");
        }
    }

    pub fn image(&self, end: &str) -> Vec<u8> {
        std::fs::read(self.0.join(format!("{end}.img"))).expect("a file")
    }

    /// Everything that the guest was told is in an end's file.
    #[track_caller]
    pub fn verify(&self, end: &str) {
        let ledger = Ledger::open(&self.0.join("ledger")).expect("the ledger");
        let found = verify::check(&mut self.image(end), &ledger).expect("a comparison");
        assert!(found.is_ok() && found.writes_acknowledged > 0, "{end}: {found:?}");
    }
}

/// An appliance; killed with the test if it fails.
pub struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    pub said: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Running {
    pub fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal");
        let mut said = String::new();
        self.lines.read_to_string(&mut said).expect("its output");
        assert_eq!(self.child.wait().expect("wait").code(), Some(0), "{said}");
        said
    }

    pub fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("dead");
    }
}

/// A connection of the manager's to one end.
pub type End = Arc<VfioUserClient>;

pub fn connect(place: &Place, end: &str, space: &AddressSpace) -> End {
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
pub struct Bridge {
    me: Weak<Bridge>,
    now: Mutex<End>,
    space: AddressSpace,
}

impl Bridge {
    pub fn new(end: &End, space: &AddressSpace) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { me: me.clone(), now: Mutex::new(Arc::clone(end)), space: space.clone() })
    }

    pub fn end(&self) -> End {
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
pub struct Vm {
    pub space: AddressSpace,
    bridge: Arc<Bridge>,
    pub handle: GuestHandle,
    paused: Arc<AtomicBool>,
    parked: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Boots at an end, and goes on with the ledger in the place if there is one.
    pub fn boot(place: &Place, end: &str) -> Self {
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
        let (mut guest, handle) =
            Guest::new(driver, GuestConfig::default(), Arc::new(ledger.expect("a ledger"))).expect("a guest");
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
    pub fn until(&self, what: &str, mut done: impl FnMut(&GuestHandle) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(&self.handle) {
            assert!(Instant::now() < end && !self.handle.is_over(), "{what}: {:?}", self.handle.first_error());
            std::thread::yield_now();
        }
    }

    #[track_caller]
    pub fn goes_on(&self, writes: u64) {
        let before = self.handle.counters().writes;
        self.until("the guest goes on", |handle| handle.counters().writes >= before + writes);
    }

    pub fn pause(&self) {
        self.paused.store(true, Ordering::Release);
        let end = Instant::now() + PATIENCE;
        while !self.parked.load(Ordering::Acquire) {
            assert!(Instant::now() < end, "the processor does not stop");
            std::thread::yield_now();
        }
    }

    pub fn unpause(&self) {
        self.paused.store(false, Ordering::Release);
    }

    pub fn end(&self) -> End {
        self.bridge.end()
    }

    /// The guest's function is another end's from now on.
    pub fn goes_to(&self, end: &End) {
        *self.bridge.now.lock().expect("lock") = Arc::clone(end);
    }

    /// Resets its controller, stops, and finds nothing wrong.
    #[track_caller]
    pub fn stop(mut self) {
        let before = self.handle.counters().resets;
        self.handle.request_reset();
        self.until("the guest resets", |handle| handle.counters().resets > before && handle.stage() == GuestStage::Running);
        self.goes_on(20);
        self.handle.stop();
        self.thread.take().expect("a thread").join().expect("no panic");
        assert!(
            self.handle.is_over() && self.handle.stats().is_ok(),
            "{:?} {:?}",
            self.handle.first_error(),
            self.handle.stats()
        );
        assert_eq!(self.handle.counters().surprises, 0, "it saw nothing but its own reset");
    }

    /// Pulled out: whatever the guest says.
    pub fn bury(mut self) {
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
pub fn go(end: &End, to: u32) {
    end.set_migration_state(to).unwrap_or_else(|error| panic!("state {to}: {error}"));
    assert_eq!(end.migration_state().expect("a state"), to);
}

/// The errno of a refusal, and the state that it has left the device in: on the way of several steps that is the last good one.
#[track_caller]
pub fn refused(end: &End, to: u32) -> (u32, u32) {
    let errno = refusal(end.set_migration_state(to));
    (errno, end.migration_state().expect("a state"))
}

#[track_caller]
pub fn refusal<T>(result: Result<T, ClientError>) -> u32 {
    match result {
        Err(ClientError::Refused { errno, .. }) => errno,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Reads the whole stream in pieces of this size.
#[track_caller]
pub fn stream(end: &End, piece: u32) -> Vec<u8> {
    let mut stream = Vec::new();
    while end.mig_read(piece, &mut stream).expect("a piece") == piece {}
    stream
}

/// Writes a stream in pieces of this size.
pub fn bring(end: &End, stream: &[u8], piece: usize) {
    stream.chunks(piece).for_each(|piece| end.mig_write(piece).expect("taken"));
}

/// Pauses the machine and takes its state from the end where it is.
pub fn carry(vm: &Vm, piece: u32) -> Vec<u8> {
    vm.handle.mark_suspend();
    vm.pause();
    go(&vm.end(), state::STOP_COPY);
    stream(&vm.end(), piece)
}
