//! A thousand connections to `dray run` that never say what they want: bounded, counted, ended after their time, and no host or
//! VM manager that behaves notices.
#![allow(missing_docs)]

use dray_device::command::{CommandQueue, Completion};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::random::SecureRandom;
use dray_device::socket::{Stream, TcpSocket, UnixSocket};
use dray_device::vfio_user::wire::{Header, command};
use dray_driver::nvme_tcp::{TcpConfig, TcpInitiator, TcpQueue, TcpState};
use dray_nvme::command::SubmissionEntry;
use dray_tests::dray_in_guest::binary;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;
use std::io::{self, BufRead, BufReader, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// Connections that say nothing.
const MANY: usize = 1_000;
/// Those of them that the target keeps: its `half_open` limit.
const KEPT: u64 = 64;
const PATIENCE: Duration = Duration::from_secs(60);
const HOST: &str = "nqn.2014-08.org.example:host";
const NQN: &str = "nqn.2026-11.org.example:it";

/// An appliance that runs, in a folder that goes away with the test.
struct Appliance {
    folder: PathBuf,
    child: Child,
    _lines: BufReader<std::process::ChildStdout>,
}

impl Drop for Appliance {
    fn drop(&mut self) {
        let _dead = self.child.kill();
        let _reaped = self.child.wait();
        let _gone = std::fs::remove_dir_all(&self.folder);
    }
}

impl Appliance {
    fn start(name: &str, export: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dray-half-open-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let side = |name: &str| {
            format!(
                "[[subsystem]]\nname = \"{name}\"\nnqn = \"{NQN}\"\nserial = \"S-1\"\n[[subsystem.namespace]]\nnsid = 1\n\
                 backing = \"memory\"\nsize = \"1MiB\"\nnguid = \"000000000000000000000000000000a1\"\n\
                 [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
                 [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
            )
        };
        let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
        let both = format!("{}{}", side("source"), side("destination"));
        let export = format!("[[export]]\nsubsystem = \"source\"\ncontroller = 2\n{export}\n");
        let text = format!("[core]\nstate = \"state\"\n{both}{export}[migration]\nfrom = \"source\"\nto = \"destination\"\n{policies}");
        std::fs::write(folder.join("appliance.toml"), text).expect("a file");
        let mut command = Command::new(binary());
        command.arg("run").current_dir(&folder).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("dray runs");
        let mut lines = BufReader::new(child.stdout.take().expect("its output"));
        let mut said = String::new();
        while !said.ends_with("ready\n") {
            assert!(lines.read_line(&mut said).expect("a line") > 0, "it has ended: {said}");
        }
        Self { folder, child, _lines: lines }
    }

    /// The export, as `dray status --json` shows it.
    fn export(&self) -> Value {
        let output = Command::new(binary()).args(["status", "--json"]).current_dir(&self.folder).output().expect("dray runs");
        assert!(output.status.success(), "{output:?}");
        let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        status["exports"][0].clone()
    }

    /// Waits until the export is as wanted.
    fn until(&self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let export = self.export();
            if wanted(&export) {
                return export;
            }
            assert!(Instant::now() < end, "never: {what}: {export}");
            std::thread::yield_now();
        }
    }
}

fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {value}"))
}

/// Each of the connections is descriptors of this process.
fn room_for_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(8192, |maximum| maximum.min(8192));
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum }).expect("descriptors");
}

struct Seeded(fastrand::Rng);

impl SecureRandom for Seeded {
    fn fill(&mut self, into: &mut [u8]) {
        self.0.fill(into);
    }
}

/// A host that behaves: our own initiator with an I/O queue.
struct Near {
    began: Instant,
    initiator: TcpInitiator,
    queue: TcpQueue,
    memory: DmaBuffer,
    rounds: u64,
}

impl Near {
    fn connect(address: SocketAddr) -> Self {
        let began = Instant::now();
        let now = || Time::from_us(began.elapsed().as_micros() as u64 + 1);
        let stream = || Box::new(TcpSocket::new(TcpStream::connect(address).expect("connect")).expect("a socket"));
        let random = Box::new(Seeded(fastrand::Rng::with_seed(9)));
        let config = TcpConfig::new(HOST, [3; 16], NQN);
        let mut initiator = TcpInitiator::connect(now(), config, stream(), random).expect("a configuration");
        let late = Instant::now() + PATIENCE;
        while *initiator.state() == TcpState::Connecting {
            assert!(Instant::now() < late, "it does not connect");
            let _progress = initiator.poll(now());
        }
        let ticket = initiator.open_queue(now(), stream(), 32).expect("a queue");
        let queue = loop {
            assert!(Instant::now() < late, "no queue opens: {:?}", initiator.state());
            let _progress = initiator.poll(now());
            if let Some(queue) = initiator.take_queue(ticket) {
                break queue.expect("the queue opens");
            }
        };
        let memory = DmaBuffer::allocate("half-open", 8192, Pages::Small).expect("memory");
        Self { began, initiator, queue, memory, rounds: 0 }
    }

    fn run(&mut self, entry: &SubmissionEntry, at: usize) {
        let data = self.memory.part(at, 4096).expect("a part");
        let now = |near: &Self| Time::from_us(near.began.elapsed().as_micros() as u64 + 1);
        self.queue.submit(now(self), entry, &[data], self.rounds).expect("room");
        self.queue.commit();
        let (mut ended, late) = (None::<Completion>, Instant::now() + PATIENCE);
        while ended.is_none() {
            assert!(Instant::now() < late, "{entry:?} does not end");
            let now = now(self);
            let _progress = self.initiator.poll(now);
            self.queue.poll(now, &mut |completion| ended = Some(completion));
        }
        let ended = ended.expect("one");
        assert!(!ended.status.is_error() && !ended.unknown, "{ended:?}");
    }

    /// Writes and reads back.
    fn work(&mut self) {
        self.rounds += 1;
        let bytes = [self.rounds as u8; 4096];
        self.memory.part(0, 4096).expect("a part").write(&bytes);
        self.run(&SubmissionEntry::write(1, self.rounds % 200, 1), 0);
        self.run(&SubmissionEntry::read(1, self.rounds % 200, 1), 4096);
        let mut found = [0; 4096];
        self.memory.part(4096, 4096).expect("a part").read(&mut found);
        assert!(found == bytes, "round {}", self.rounds);
    }
}

/// Whether the other end has closed.
fn is_closed(stream: &mut dyn Stream) -> bool {
    match stream.recv(&mut [0; 256], &mut Vec::new()) {
        Ok(len) => len == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

#[test]
fn a_thousand_half_open_hosts_are_bounded_counted_and_ended() {
    room_for_descriptors();
    let appliance = Appliance::start("tcp", &format!("by = \"nvme-tcp\"\nlisten = \"127.0.0.1:0\"\nhosts = [{{ nqn = \"{HOST}\" }}]"));
    let address: SocketAddr = appliance.export()["address"].as_str().expect("an address").parse().expect("an address");
    let mut near = Near::connect(address);
    near.work();
    let mut silent = Vec::new();
    for nth in 0..MANY {
        let mut stream = TcpSocket::new(TcpStream::connect(address).expect("connect")).expect("a socket");
        if nth % 3 == 0 {
            // The start of an ICReq.
            let _gone = stream.send(&[IoSlice::new(&[0, 0, 128, 0, 128, 0, 0])], &[]);
        }
        silent.push(stream);
        if nth % 50 == 0 {
            near.work();
        }
    }
    let all = MANY as u64 + 2;
    let export = appliance.until("all are taken", |export| number(export, "/counters/accepted") == all);
    // As many as are kept, unless the first of them have had their time already.
    let half_open = number(&export, "/half_open");
    assert!(half_open <= KEPT && number(&export, "/clients") <= KEPT + 2, "{export}");
    assert!(number(&export, "/counters/evicted") >= MANY as u64 - 2 * KEPT, "{export}");
    near.work();
    // The host works on meanwhile: that is longer than its keep-alive time may be.
    let export = appliance.until("all are ended", |export| {
        near.work();
        number(export, "/half_open") == 0
    });
    let (evicted, late) = (number(&export, "/counters/evicted"), number(&export, "/counters/handshake_timeouts"));
    assert_eq!((evicted + late, number(&export, "/clients")), (MANY as u64, 2), "{export}");
    assert!(late > 0, "those that were kept have had their time: {export}");
    let end = Instant::now() + PATIENCE;
    for stream in &mut silent {
        while !is_closed(stream) {
            assert!(Instant::now() < end, "a connection stays open");
            near.work();
        }
    }
    // And the next host that comes is taken.
    drop(near);
    appliance.until("the first host is gone", |export| number(export, "/clients") == 0);
    Near::connect(address).work();
}

/// Says VERSION and waits for the reply.
fn greet(stream: &mut UnixSocket) -> bool {
    let payload = [0u8; 4];
    let header = Header::command(7, command::VERSION, payload.len());
    if stream.send(&[IoSlice::new(header.as_bytes()), IoSlice::new(&payload)], &[]).is_err() {
        return false;
    }
    let (mut bytes, mut got, end) = (vec![0; 4096], 0, Instant::now() + PATIENCE);
    while got < 16 {
        assert!(Instant::now() < end, "neither a reply nor an end");
        match stream.recv(&mut bytes[got..], &mut Vec::new()) {
            Ok(0) => return false,
            Ok(len) => got += len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(_) => return false,
        }
    }
    let (header, _) = Header::read_from_prefix(&bytes).expect("a header");
    header.is_reply() && header.failure().is_none()
}

#[test]
fn a_thousand_connects_to_a_vfio_user_socket_leave_its_client_alone_and_a_silent_one_ends() {
    room_for_descriptors();
    let appliance = Appliance::start("vfio", "by = \"vfio-user\"");
    let socket = appliance.folder.join("state/source-2.sock");
    let mut client = UnixSocket::connect(&socket).expect("connect");
    assert!(greet(&mut client));
    let mut others: Vec<UnixSocket> = (0..MANY).map(|_| UnixSocket::connect(&socket).expect("connect")).collect();
    let refused = |export: &Value| number(export, "/counters/refused_busy");
    let export = appliance.until("all are refused", |export| refused(export) == MANY as u64);
    assert_eq!((number(&export, "/counters/clients"), number(&export, "/clients"), number(&export, "/half_open")), (1, 1, 0));
    assert!(others.iter_mut().all(|stream| is_closed(stream)), "who is refused is disconnected");
    let info = Header::command(8, command::GET_INFO, 16);
    client.send(&[IoSlice::new(info.as_bytes()), IoSlice::new(16u128.to_le_bytes().as_slice())], &[]).expect("sent");
    let end = Instant::now() + PATIENCE;
    let mut bytes = [0; 64];
    while let Err(error) = client.recv(&mut bytes, &mut Vec::new()) {
        assert!(error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end, "no reply: {error}");
    }
    assert_eq!(Header::read_from_prefix(&bytes).expect("a header").0.id, 8, "the client is served");
    drop(client);
    // Now many that say nothing, and nobody else: one has the seat for its time, then it ends.
    appliance.until("the client is gone", |export| number(export, "/clients") == 0);
    let mut silent: Vec<UnixSocket> = (0..MANY).map(|_| UnixSocket::connect(&socket).expect("connect")).collect();
    let export = appliance.until("a silent one has had its time", |export| number(export, "/counters/handshake_timeouts") > 0);
    assert!(refused(&export) > MANY as u64, "{export}");
    let end = Instant::now() + PATIENCE;
    while !silent.iter_mut().all(|stream| is_closed(stream)) {
        assert!(Instant::now() < end, "a silent client stays");
        std::thread::yield_now();
    }
    let export = appliance.until("the seat is free", |export| number(export, "/clients") == 0);
    let ended = number(&export, "/counters/clients") + refused(&export);
    assert_eq!(ended, 2 * MANY as u64 + 1, "{export}");
    assert!(greet(&mut UnixSocket::connect(&socket).expect("connect")), "the next client is served");
}
