//! `dray run` from outside: it comes up, says what runs, moves what it serves, ends when it is told to, and comes up again after
//! a kill.
#![allow(missing_docs)]

use dray_device::poll::{Poll, Time};
use dray_device::socket::UnixSocket;
use dray_device::space::AddressSpace;
use dray_device::vfio_user::client::{ClientConfig, VfioUserClient};
use dray_driver::{Driver, DriverConfig};
use dray_tests::dray_in_guest::binary;
use dray_workload::guest::{Guest, GuestConfig, GuestHandle, GuestStage};
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::verify;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A configuration in a folder that goes away with the test.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

impl Place {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dray-run-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let side = |name: &str| {
            format!(
                "[[subsystem]]\nname = \"{name}\"\nnqn = \"nqn.2026-11.org.example:it\"\nserial = \"S-1\"\n\
                 [[subsystem.namespace]]\nnsid = 1\nbacking = \"file\"\npath = \"{name}.img\"\nsize = \"8MiB\"\n\
                 nguid = \"000000000000000000000000000000a1\"\n\
                 [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
                 [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
            )
        };
        let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
        let export = "[[export]]\nsubsystem = \"source\"\ncontroller = 2\nby = \"vfio-user\"\n";
        // A busy machine may take long over a switch-over.
        let migration = "[migration]\nfrom = \"source\"\nto = \"destination\"\ndowntime = \"5s\"\n";
        let text = format!("[core]\nstate = \"state\"\n{}{}{export}{migration}{policies}", side("source"), side("destination"));
        std::fs::write(folder.join("appliance.toml"), text).expect("a file");
        Self(folder)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(args).current_dir(&self.0).stdin(Stdio::null());
        command
    }

    fn dray(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("dray runs")
    }

    /// Starts the appliance and waits until it says that it is ready.
    fn start(&self) -> Running {
        let mut child = self.command(&["run"]).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().expect("dray runs");
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

    /// What `dray history` knows, once so many migrations have their end there: that is written beside the appliance's work.
    #[track_caller]
    fn history(&self, ended: usize) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let output = self.dray(&["history", "--json"]);
            let known: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let all = known["migrations"].as_array().map_or(&[][..], Vec::as_slice);
            if output.status.success() && all.iter().filter(|one| !one["ended"].is_null()).count() >= ended {
                return known;
            }
            assert!(Instant::now() < end, "{}", said(&output));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn control(&self) -> BufReader<UnixStream> {
        let socket = UnixStream::connect(self.0.join("state/control.sock")).expect("connect");
        socket.set_read_timeout(Some(PATIENCE)).expect("a deadline");
        BufReader::new(socket)
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
    /// Sends SIGTERM and waits for the end; what it said on the way.
    fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.child);
        // As `timeout` does: the same one twice is one.
        for _ in 0..2 {
            let sent = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            sent.or_else(|error| if error == rustix::io::Errno::SRCH { Ok(()) } else { Err(error) }).expect("a signal");
        }
        let end = Instant::now() + PATIENCE;
        let code = loop {
            match self.child.try_wait().expect("wait") {
                Some(status) => break status.code(),
                None if Instant::now() >= end => panic!("it does not end"),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut said = String::new();
        self.lines.read_to_string(&mut said).expect("its output");
        assert_eq!(code, Some(0), "{said}");
        said
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A message without the breaks that make it fit a terminal.
fn flat(output: &Output) -> String {
    said(output).replace(['\n', '│'], " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn it_comes_up_says_what_runs_and_ends_on_a_signal() {
    let place = Place::new("whole");
    let nobody = place.dray(&["status"]);
    assert!(!nobody.status.success() && said(&nobody).contains("no appliance runs here"), "{nobody:?}");
    let running = place.start();
    for words in ["subsystem    source", "export       source:2 by vfio-user", "policy       cdq: native", "control "] {
        assert!(running.said.contains(words), "{}", running.said);
    }
    let status = place.status();
    assert_eq!((&status["state"], &status["pid"]), (&"running".into(), &running.child.id().into()));
    assert_eq!(status["subsystems"][0]["namespaces"][0]["served_by"], "source");
    assert_eq!(status["exports"][0]["clients"], 0);
    assert!(String::from_utf8_lossy(&place.dray(&["status"]).stdout).contains("served by source"));
    for socket in ["state/control.sock", "state/source-2.sock"] {
        let mode = place.0.join(socket).metadata().expect("a socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{socket}");
    }
    let second = place.dray(&["run"]);
    let words = said(&second);
    assert!(!second.status.success() && words.contains("runs already") && words.contains(&running.child.id().to_string()), "{words}");
    assert_eq!(place.status()["state"], "running", "the first one goes on");
    assert!(running.stop().ends_with("stopped\n"));
    for socket in ["state/control.sock", "state/source-2.sock"] {
        assert!(!place.0.join(socket).exists(), "{socket}");
    }
}

#[test]
fn it_comes_up_again_after_a_kill() {
    let place = Place::new("killed");
    let mut running = place.start();
    running.child.kill().expect("kill");
    running.child.wait().expect("dead");
    assert!(place.0.join("state/control.sock").exists(), "nobody removed it");
    let running = place.start();
    assert_eq!(place.status()["pid"], running.child.id());
    running.stop();
}

#[test]
fn what_it_serves_moves_there_and_back_and_the_records_keep_it() {
    let place = Place::new("moved");
    let running = place.start();
    let backwards = place.dray(&["migrate", "destination", "--to", "source"]);
    assert!(!backwards.status.success() && said(&backwards).contains("does not serve"), "{backwards:?}");
    assert!(said(&place.dray(&["migrate", "moon", "--to", "source"])).contains("no subsystem"));
    let moved = place.dray(&["migrate", "source", "--to", "destination", "--json"]);
    assert_eq!(moved.status.code(), Some(0), "{}", said(&moved));
    let value: Value = serde_json::from_slice(&moved.stdout).expect("JSON");
    assert_eq!((&value["outcome"], &value["migration"]), (&"moved".into(), &1.into()));
    let status = place.status();
    assert_eq!(status["migration"]["serving"], "destination");
    assert_eq!(status["subsystems"][0]["controllers"][1]["fenced"], true);
    running.stop();
    let running = place.start();
    assert!(running.said.contains("the destination serves, the source stays fenced"), "{}", running.said);
    let back = place.dray(&["migrate", "destination", "--to", "source"]);
    assert_eq!(back.status.code(), Some(0), "{}", said(&back));
    assert_eq!(place.status()["subsystems"][0]["namespaces"][0]["served_by"], "source");
    running.stop();
}

#[test]
fn what_it_moved_is_in_the_history() {
    let place = Place::new("history");
    let running = place.start();
    assert_eq!(place.history(0)["migrations"], Value::Array(Vec::new()));
    let media = place.dray(&["media-move", "source", "1", "--to", "copy.img"]);
    assert_eq!(media.status.code(), Some(0), "{}", said(&media));
    let moved = place.dray(&["migrate", "source", "--to", "destination", "--json"]);
    assert_eq!(moved.status.code(), Some(0), "{}", said(&moved));
    let moved: Value = serde_json::from_slice(&moved.stdout).expect("JSON");
    // It can be asked while the appliance runs.
    let known = place.history(2);
    let [first, second] = known["migrations"].as_array().expect("migrations").as_slice() else { panic!("two: {known}") };
    assert_eq!((&first["kind"], &first["subsystem"]), (&"media-move".into(), &"source".into()));
    assert_eq!(first["from"], "source.img");
    assert!(first["to"].as_str().is_some_and(|to| to.ends_with("copy.img")), "{first}");
    assert_eq!((&second["kind"], &second["subsystem"]), (&"migration".into(), &Value::Null));
    assert_eq!((&second["from"], &second["to"]), (&"source".into(), &"destination".into()));
    for one in [first, second] {
        assert_eq!((&one["nsid"], &one["nguid"]), (&1.into(), &"000000000000000000000000000000a1".into()), "{one}");
        let ended = &one["ended"];
        assert_eq!((&ended["outcome"], &ended["verdict_ok"]), (&"done".into(), &Value::Null), "nobody has compared: {one}");
        assert!(ended["bytes"].as_u64() >= Some(8 << 20) && ended["at_s"].as_i64() >= one["begun_s"].as_i64(), "{one}");
        assert!(ended["policies"].as_array().is_some_and(|policies| policies.len() == 3), "{one}");
    }
    assert_eq!(second["ended"]["downtime_us"], moved["downtime_us"]);
    assert_eq!(second["ended"]["rounds"], moved["rounds"]);
    let seen = known["namespaces"].as_array().expect("namespaces");
    assert_eq!(seen.iter().filter(|namespace| namespace["bytes"] == 8 << 20).count(), 2, "{known}");
    let people = said(&place.dray(&["history"]));
    assert!(people.contains("source: source.img -> copy.img") && people.contains("source -> destination"), "{people}");

    // What does not begin is none, what is undone says so, and the last end is kept by a stop that follows at once.
    let refused = place.dray(&["migrate", "source", "--to", "destination"]);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    let mut control = place.control();
    let ask = b"{\"v\":1,\"id\":1,\"do\":\"migrate\",\"from\":\"destination\",\"to\":\"source\"}\n\
        {\"v\":1,\"id\":2,\"do\":\"cancel\"}\n";
    control.get_mut().write_all(ask).expect("sent");
    let end = loop {
        let mut line = String::new();
        assert!(control.read_line(&mut line).expect("an answer") > 0, "disconnected");
        let answer: Value = serde_json::from_str(&line).expect("JSON");
        if answer["id"] == 1 && answer.get("event").is_none() {
            break answer;
        }
    };
    assert_eq!(end["error"]["code"], "cancelled", "{end}");
    running.stop();
    let known = place.history(3);
    let all = known["migrations"].as_array().expect("migrations");
    let outcome = all[2]["ended"]["outcome"].as_str().expect("an outcome");
    assert!(all.len() == 3 && outcome.starts_with("cancelled") && known["unreadable"] == 0, "{known}");
}

#[test]
fn a_look_at_devices_follows_the_records_and_keeps_off_what_runs() {
    let place = Place::new("followed");
    let look = |args: &[&str]| {
        let output = place.dray(args);
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    let file = |list: &Value| {
        let found = list["devices"].as_array().expect("devices").iter().find(|one| one["device"] == "source:2");
        let namespace = &found.expect("the controller")["namespaces"][0];
        (namespace["path"].as_str().expect("a path").rsplit('/').next().expect("a name").to_owned(), namespace["missing"] == true)
    };
    assert_eq!(file(&look(&["device", "list", "--json"])), ("source.img".into(), true), "nothing was ever served");
    assert!(!place.0.join("state").exists() && !place.0.join("source.img").exists(), "looking makes nothing");

    let running = place.start();
    // The machine's functions are listed, and nothing that the appliance has is touched.
    let list = look(&["device", "list", "--json"]);
    assert!(list["appliance"].is_i64() && list["devices"] == serde_json::json!([]) && list["pci"].is_array(), "{list}");
    for args in [&["device", "identify", "source:2"][..], &["device", "identify", "destination:1"]] {
        let refused = place.dray(args);
        let words = flat(&refused);
        assert!(!refused.status.success() && words.contains("the appliance runs on") && words.contains("dray status"), "{words}");
    }
    let moved = place.dray(&["media-move", "source", "1", "--to", "copy.img"]);
    assert_eq!(moved.status.code(), Some(0), "{}", said(&moved));
    running.stop();
    std::fs::remove_file(place.0.join("source.img")).expect("the old file");
    assert_eq!(file(&look(&["device", "list", "--json"])), ("copy.img".into(), false), "the copy serves");
    assert_eq!(look(&["device", "identify", "source:2", "--json"])["identify_controller"]["sn"], "S-1");
    assert!(!place.0.join("source.img").exists(), "looking makes nothing");

    let running = place.start();
    let moved = place.dray(&["migrate", "source", "--to", "destination"]);
    assert_eq!(moved.status.code(), Some(0), "{}", said(&moved));
    running.stop();
    let words = flat(&place.dray(&["device", "identify", "source:2"]));
    assert!(words.contains("source:2 were moved: \"destination\" serves them"), "{words}");
    for name in ["source:1", "destination:1", "destination:2"] {
        assert_eq!(look(&["device", "identify", name, "--json"])["identify_controller"]["sn"], "S-1");
    }
    let list = look(&["device", "list", "--json"]);
    let devices = list["devices"].as_array().expect("devices");
    let moved: Vec<_> = devices.iter().map(|one| &one["live_migration"]["moved_to"]).collect();
    assert_eq!(moved, [&Value::Null, &"destination".into(), &Value::Null, &Value::Null]);
    assert!(said(&place.dray(&["device", "list"])).contains("moved: destination serves"));
    // And it changed nothing.
    let running = place.start();
    assert_eq!(place.status()["migration"]["serving"], "destination");
    running.stop();
}

#[test]
fn hostile_clients_of_the_control_socket_are_answered_or_sent_away() {
    let place = Place::new("hostile");
    let running = place.start();
    let mut client = place.control();
    let mut ask = |line: &str| -> Value {
        client.get_mut().write_all(line.as_bytes()).expect("sent");
        let mut answer = String::new();
        client.read_line(&mut answer).expect("an answer");
        serde_json::from_str(&answer).expect("JSON")
    };
    for (line, code) in [
        ("{\n", "bad-request"),
        ("{\"v\":1,\"id\":1,\"do\":\"status\",\"more\":1}\n", "bad-request"),
        ("{\"v\":9,\"id\":1,\"do\":\"status\"}\n", "version"),
        ("{\"v\":1,\"id\":1,\"do\":\"cancel\"}\n", "no-such"),
        ("{\"v\":1,\"id\":1,\"do\":\"migrate\",\"from\":\"source\",\"to\":\"source\"}\n", "refused"),
        ("{\"v\":1,\"id\":1,\"do\":\"lend-cdq\",\"subsystem\":\"source\",\"controller\":1}\n", "no-such"),
        ("{\"v\":1,\"id\":1,\"do\":\"lend-cdq\",\"subsystem\":\"source\",\"controller\":2,\"slots\":1}\n", "refused"),
    ] {
        assert_eq!(ask(line)["error"]["code"], code, "{line}");
    }
    let mut long = place.control();
    // It may be disconnected before all is sent.
    let _cut = long.get_mut().write_all(&vec![b'{'; 1 << 20]);
    let mut rest = Vec::new();
    let _reset = long.read_to_end(&mut rest);
    assert_eq!(ask("{\"v\":1,\"id\":2,\"do\":\"status\"}\n")["ok"]["state"], "running");
    running.stop();
}

#[test]
fn a_lent_queue_keeps_migrations_away_until_it_is_given_back() {
    use dray_device::socket::{Stream, UnixSocket};
    let place = Place::new("lent");
    let running = place.start();
    let mut client = UnixSocket::new(place.control().into_inner()).expect("a socket");
    let request = b"{\"v\":1,\"id\":1,\"do\":\"lend-cdq\",\"subsystem\":\"source\",\"controller\":2,\"slots\":64}\n";
    client.send(&[std::io::IoSlice::new(request)], &[]).expect("sent");
    let (mut line, mut fds, end) = (Vec::new(), Vec::new(), Instant::now() + PATIENCE);
    while !line.ends_with(b"\n") {
        let mut piece = [0; 512];
        match client.recv(&mut piece, &mut fds) {
            Ok(read) => line.extend_from_slice(&piece[..read]),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(Instant::now() < end, "no answer");
    }
    let answer: Value = serde_json::from_slice(&line).expect("JSON");
    assert_eq!((&answer["ok"]["slots"], fds.len()), (&64.into(), 1), "{answer}");
    let reader = dray_driver::LentReader::open(fds.remove(0)).expect("a queue");
    assert_eq!(place.status()["lent"][0]["controller"], 2);
    let busy = place.dray(&["migrate", "source", "--to", "destination"]);
    assert!(!busy.status.success() && said(&busy).contains("has lent a queue"), "{}", said(&busy));
    drop(reader);
    let end = Instant::now() + PATIENCE;
    while place.status()["lent"] != serde_json::json!([]) {
        assert!(Instant::now() < end, "never given back");
    }
    let moved = place.dray(&["migrate", "source", "--to", "destination"]);
    assert_eq!(moved.status.code(), Some(0), "{}", said(&moved));
    running.stop();
}

/// A client of the export with its guest, polled on a thread of its own until the guest is over.
struct Client {
    handle: GuestHandle,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Connects, and goes on with the ledger in the place if there is one.
    fn start(place: &Place) -> Self {
        let path = place.0.join("ledger");
        let ledger = if path.exists() {
            Ledger::resume(&path)
        } else {
            Ledger::create(&path, &LedgerSpec { seed: 7, guest: 1, blocks: (0..512).map(|n| n * 4).collect() })
        };
        let socket = UnixSocket::connect(&place.0.join("state/source-2.sock")).expect("the export");
        let config = ClientConfig { timeout_ms: 20_000, ..ClientConfig::default() };
        let client = VfioUserClient::connect(Box::new(socket), AddressSpace::default(), &config).expect("a function");
        let driver = Driver::new(client, DriverConfig::default()).expect("a driver");
        let (mut guest, handle) = Guest::new(driver, GuestConfig::default(), Arc::new(ledger.expect("a ledger"))).expect("a guest");
        let of = handle.clone();
        let thread = std::thread::spawn(move || {
            let begun = Instant::now();
            while !of.is_over() && begun.elapsed() < 3 * PATIENCE {
                let _progress = guest.poll(Time(begun.elapsed().as_nanos() as u64));
                // The appliance needs a processor too.
                std::thread::yield_now();
            }
        });
        let client = Self { handle, thread: Some(thread) };
        client.until("the guest runs", |handle| handle.stage() == GuestStage::Running);
        client
    }

    #[track_caller]
    fn until(&self, what: &str, mut done: impl FnMut(&GuestHandle) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(&self.handle) {
            assert!(Instant::now() < end && !self.handle.is_over(), "{what}: {:?}", self.handle.first_error());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn goes_on(&self, writes: u64) {
        let before = self.handle.counters().writes;
        self.until("the guest goes on", |handle| handle.counters().writes >= before + writes);
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
    }

    /// The appliance was killed: whatever the guest says.
    fn bury(mut self) {
        self.handle.stop();
        self.thread.take().expect("a thread").join().expect("no panic");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

impl Place {
    /// The file that the source's namespace is served from.
    fn serving(&self) -> PathBuf {
        let status = self.status();
        PathBuf::from(status["subsystems"][0]["namespaces"][0]["path"].as_str().expect("a path"))
    }

    /// Everything that the guest was told is in a file.
    #[track_caller]
    fn verify(&self, file: &PathBuf) {
        let ledger = Ledger::open(&self.0.join("ledger")).expect("the ledger");
        let found = verify::check(&mut std::fs::read(self.0.join(file)).expect("the file"), &ledger).expect("a comparison");
        assert!(found.is_ok() && found.writes_acknowledged > 0, "{}: {found:?}", file.display());
    }
}

#[test]
fn the_file_of_a_namespace_is_exchanged_while_its_client_writes() {
    let place = Place::new("media");
    let running = place.start();
    let client = Client::start(&place);
    client.goes_on(100);
    let copy = place.0.join("copy.img");
    for (args, words) in [
        (["media-move", "source", "2", "--to", "copy.img"], "there is no namespace 2"),
        (["media-move", "destination", "1", "--to", "copy.img"], "does not serve"),
        (["media-move", "source", "1", "--to", "destination.img"], "is namespace 1 of"),
        (["media-move", "source", "1", "--to", "appliance.toml"], "is there already"),
    ] {
        let output = place.dray(&args);
        let said = flat(&output);
        assert!(output.status.code() == Some(1) && said.contains(words) && !copy.exists(), "{said}");
    }
    let moved = place.dray(&["media-move", "source", "1", "--to", "copy.img", "--json"]);
    assert_eq!(moved.status.code(), Some(0), "{}", said(&moved));
    let value: Value = serde_json::from_slice(&moved.stdout).expect("JSON");
    assert_eq!((&value["outcome"], &value["kind"], &value["nsid"]), (&"moved".into(), &"media-move".into(), &1.into()));
    let old = std::fs::read(place.0.join("source.img")).expect("the old file");
    client.goes_on(100);
    assert_eq!(place.serving().canonicalize().expect("a path"), copy.canonicalize().expect("a file"));
    assert!(String::from_utf8_lossy(&place.dray(&["status"]).stdout).contains("copy.img, served by source"));
    client.stop();
    place.verify(&"copy.img".into());
    running.stop();

    // The copy serves after a restart, whatever the configuration says.
    let running = place.start();
    assert!(running.said.contains("namespace 1 of source is served from"), "{}", running.said);
    let client = Client::start(&place);
    client.goes_on(50);
    assert_eq!(std::fs::read(place.0.join("source.img")).expect("the old file"), old, "the old file is written no more");
    // Back to the file that it had first; and a controller move takes what is served now.
    let back = place.dray(&["media-move", "source", "1", "--to", "source.img"]);
    assert_eq!(back.status.code(), Some(0), "{}", said(&back));
    client.goes_on(50);
    let there = place.dray(&["migrate", "source", "--to", "destination"]);
    assert_eq!(there.status.code(), Some(0), "{}", said(&there));
    client.goes_on(50);
    client.stop();
    running.stop();
    place.verify(&"destination.img".into());
}

#[test]
fn a_stop_answers_what_is_under_way() {
    let place = Place::new("stopped");
    let running = place.start();
    let client = Client::start(&place);
    client.goes_on(200);
    let said = running.stop();
    assert!(said.ends_with("stopped\n") && !said.contains("cut off"), "{said}");
    // It was in the middle of its writes: what it was told is in the file, and the next one goes on there.
    client.bury();
    place.verify(&"source.img".into());
    let running = place.start();
    let client = Client::start(&place);
    client.goes_on(50);
    client.stop();
    running.stop();
    place.verify(&"source.img".into());
}

#[test]
fn how_far_a_migration_is_is_told_in_lines_and_on_a_terminal_by_a_bar() {
    let place = Place::new("bar");
    // So much takes a while, although nothing is in it.
    let file = place.0.join("appliance.toml");
    let text = std::fs::read_to_string(&file).expect("a configuration");
    std::fs::write(&file, text.replace("8MiB", "2GiB")).expect("a configuration");
    let running = place.start();
    let there = place.dray(&["migrate", "source", "--to", "destination"]);
    let (out, err) = (String::from_utf8_lossy(&there.stdout), String::from_utf8_lossy(&there.stderr));
    assert!(there.status.success() && out.starts_with("moved: ") && out.contains("downtime"), "{out}{err}");
    assert!(err.lines().any(|line| line.starts_with("round 0: ") && line.contains("of 2 GiB")), "{err}");
    assert!(!err.contains(['\r', '\u{1b}', '█', '░']), "no terminal, no bar: {err:?}");
    // `script` gives it one.
    let command = format!("{} migrate destination --to source", binary().display());
    let mut script = Command::new("script");
    let script = script.args(["-qec", &command, "/dev/null"]).current_dir(&place.0).stdin(Stdio::null()).env("TERM", "xterm");
    let back = script.output().expect("script");
    let shown = String::from_utf8_lossy(&back.stdout);
    assert!(back.status.success() && shown.contains("moved: "), "{shown}");
    assert!(shown.contains("round 0") && shown.contains('░') && shown.contains('\r'), "a bar: {shown:?}");
    running.stop();
}

#[test]
fn a_media_move_that_is_cancelled_leaves_the_old_file_and_no_other() {
    let place = Place::new("cancelled");
    let running = place.start();
    let client = Client::start(&place);
    client.goes_on(50);
    let mut control = place.control();
    let ask = b"{\"v\":1,\"id\":1,\"do\":\"media-move\",\"subsystem\":\"source\",\"nsid\":1,\"to\":\"copy.img\"}\n\
        {\"v\":1,\"id\":2,\"do\":\"cancel\"}\n";
    control.get_mut().write_all(ask).expect("sent");
    let end = loop {
        let mut line = String::new();
        assert!(control.read_line(&mut line).expect("an answer") > 0, "disconnected");
        let answer: Value = serde_json::from_str(&line).expect("JSON");
        if answer["id"] == 1 && answer.get("event").is_none() {
            break answer;
        }
    };
    assert_eq!(end["error"]["code"], "cancelled", "{end}");
    client.goes_on(50);
    client.stop();
    assert!(place.serving().ends_with("source.img") && !place.0.join("copy.img").exists());
    running.stop();
    place.verify(&"source.img".into());
}

#[test]
fn killed_in_a_media_move_it_loses_nothing() {
    let place = Place::new("killed-media");
    let (mut running, mut served) = (place.start(), PathBuf::new());
    for turn in 0..8u32 {
        let client = Client::start(&place);
        client.goes_on(60);
        let name = format!("copy-{turn}.img");
        let mut mover = place.command(&["media-move", "source", "1", "--to", &name]);
        let mut mover = mover.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("dray runs");
        let end = Instant::now() + PATIENCE;
        while !place.0.join(&name).exists() {
            assert!(Instant::now() < end, "it does not begin");
        }
        std::thread::sleep(Duration::from_millis(u64::from(turn * turn) * 4));
        running.child.kill().expect("kill");
        running.child.wait().expect("dead");
        client.bury();
        mover.wait().expect("its end");
        running = place.start();
        served = place.serving();
        place.verify(&served);
    }
    let client = Client::start(&place);
    client.goes_on(60);
    client.stop();
    running.stop();
    place.verify(&served);
    let known = place.history(0);
    let all = known["migrations"].as_array().expect("migrations");
    let good = all.iter().all(|one| one["kind"] == "media-move" && (one["ended"].is_null() || one["ended"]["outcome"] == "done"));
    // A kill takes along what the store had not written out yet, and damages nothing.
    assert!(all.len() <= 8 && good && known["unreadable"] == 0, "{known}");
}
