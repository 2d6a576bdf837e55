//! Guest, source and destination in three processes (`dray demo --attach vfio-user`), and what happens when one of them is
//! killed; a controller behind a socket that is looked at (`dray device identify vfio-user:PATH`).
#![allow(missing_docs)]

use dray_device::memory::{DmaBuffer, Pages};
use dray_device::space::AddressSpace;
use dray_nvme::registers::{Csts, offset};
use dray_tests::dray_in_guest::binary;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
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
        let folder = std::env::temp_dir().join(format!("dray-attach-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
        let text = std::fs::read_to_string(root.join("appliance.toml")).expect("appliance.toml").replace("target/dray/", "");
        let text: String = text
            .lines()
            .map(|line| if line.starts_with("component = ") { "component = \"native\"\n".into() } else { format!("{line}\n") })
            .collect();
        // A machine that is busy with other tests may take longer over a switch-over than the demo's budget allows.
        let text = text.replace("downtime = \"10ms\"", "downtime = \"2s\"");
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

    fn demo(&self, args: &[&str]) -> Run {
        let all = [["demo", "--attach", "vfio-user", "--json"].as_slice(), args].concat();
        let mut child = self.command(&all).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("dray runs");
        let lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        Run { child, lines, seen: Vec::new(), ends: Vec::new() }
    }
}

/// A demo that runs, and the processes that it has started.
struct Run {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStderr>>,
    seen: Vec<String>,
    ends: Vec<Pid>,
}

impl Run {
    /// Reads on to the line that begins so.
    fn until(&mut self, start: &str) {
        for line in self.lines.by_ref().map_while(Result::ok) {
            let found = line.starts_with(start);
            // "process      source: 4711, before state/source.sock"
            if let Some(pid) = line.strip_prefix("process ").and_then(|rest| rest.split([':', ',']).nth(1)) {
                self.ends.extend(pid.trim().parse().ok().and_then(Pid::from_raw));
            }
            self.seen.push(line);
            if found {
                return;
            }
        }
        panic!("no line \"{start}\": {:#?}", self.seen);
    }

    fn end(mut self) -> (ExitStatus, Option<Value>, String) {
        self.seen.extend(self.lines.by_ref().map_while(Result::ok));
        let mut output = String::new();
        self.child.stdout.take().expect("a pipe").read_to_string(&mut output).expect("output");
        let status = self.child.wait().expect("exit");
        assert_eq!(self.ends.len(), 2, "{:#?}", self.seen);
        for end in &self.ends {
            wait_for_end(*end);
        }
        (status, output.lines().last().and_then(|line| serde_json::from_str(line).ok()), self.seen.join("\n"))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // The ends of a demo that is killed end by themselves.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn wait_for_end(pid: Pid) {
    let late = Instant::now() + PATIENCE;
    while test_kill_process(pid).is_ok() {
        assert!(Instant::now() < late, "process {pid:?} still runs");
        std::thread::yield_now();
    }
}

fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {value}"))
}

fn whole(status: ExitStatus, summary: Option<Value>, said: &str) -> Value {
    let summary = summary.unwrap_or_else(|| panic!("no summary: {said}"));
    assert!(status.success(), "{said}\n{summary}");
    assert_eq!((summary["verdict"].as_str(), summary["fsck"].as_str()), (Some("ok"), Some("clean")));
    assert_eq!(number(&summary, "/blocks_different") + number(&summary, "/writes_missing"), 0);
    assert!(number(&summary, "/writes_acknowledged") > 0);
    summary
}

const SMALL: [&str; 6] = ["--size", "128MiB", "--rate", "2000", "--settle", "400"];

#[test]
fn guest_source_and_destination_are_three_processes_and_nothing_is_lost() {
    let place = Place::new("moves");
    let mut run = place.demo(&SMALL);
    run.until("migration ");
    let mut pids = run.ends.clone();
    pids.push(Pid::from_child(&run.child));
    pids.sort_by_key(|pid| pid.as_raw_nonzero());
    pids.dedup();
    assert_eq!(pids.len(), 3);
    assert!(pids.iter().all(|pid| test_kill_process(*pid).is_ok()));
    let (status, summary, said) = run.end();
    let summary = whole(status, summary, &said);
    assert_eq!(summary["outcome"], "done");
    assert_eq!(number(&summary, "/blocks_compared"), (128 << 20) / 4096);
    assert!(number(&summary, "/blocks_written_after") > 0, "the guest went on at the destination, and found the same disk");
    for socket in ["source", "source-management", "destination", "destination-management"] {
        assert!(!place.0.join(format!("state/{socket}.sock")).exists(), "{socket}.sock is left");
    }
}

#[test]
fn ctrl_c_gives_the_source_back_to_its_guest_across_processes() {
    let place = Place::new("cancel");
    let mut run = place.demo(&SMALL);
    run.until("migration ");
    kill_process(Pid::from_child(&run.child), Signal::INT).expect("signal");
    let (status, summary, said) = run.end();
    let summary = summary.unwrap_or_else(|| panic!("no summary: {said}"));
    // The signal may come after the point of no return; then the move is whole.
    if summary["outcome"] == "done" {
        assert!(status.success(), "{said}");
    } else {
        assert_eq!((status.code(), summary["outcome"].as_str()), (Some(1), Some("undone: it was cancelled")), "{said}");
        assert_eq!((summary["fsck"].as_str(), number(&summary, "/writes_missing")), (Some("clean"), 0));
    }
}

/// Kills what `victim` names in the middle of the migration, then carries on from the records.
fn killed(name: &str, victim: impl FnOnce(&Run) -> Pid) {
    let place = Place::new(name);
    let mut run = place.demo(&SMALL);
    run.until("migration ");
    kill_process(victim(&run), Signal::KILL).expect("signal");
    // What it says of itself is not asked: the disks and the ledger are.
    let (status, _, said) = run.end();
    assert!(!status.success(), "{said}");
    let mut run = place.demo(&["--resume", "--settle", "400"]);
    run.until("process ");
    run.until("process ");
    let (status, summary, said) = run.end();
    whole(status, summary, &said);
}

#[test]
fn a_source_that_is_killed_has_lost_nothing_that_was_acknowledged() {
    killed("source", |run| run.ends[0]);
}

#[test]
fn a_destination_that_is_killed_has_lost_nothing_that_was_acknowledged() {
    killed("destination", |run| run.ends[1]);
}

#[test]
fn both_ends_end_with_a_guest_that_is_killed() {
    killed("guest", |run| Pid::from_child(&run.child));
}

#[test]
fn the_fence_of_an_end_is_up_when_the_order_is_answered() {
    let place = Place::new("fence");
    let config = std::fs::read_to_string(place.0.join("appliance.toml")).expect("a file");
    // The demo makes the disks; here is only an end.
    for name in ["source.img", "destination.img"] {
        assert!(config.contains(name), "{config}");
        std::fs::File::create(place.0.join(name)).and_then(|file| file.set_len(1 << 20)).expect("a file");
    }
    let mut command = place.command(&["serve-end", "source", "--sockets", "."]);
    let mut end = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("dray runs");
    let mut orders = end.stdin.take().expect("a pipe");
    let mut said = BufReader::new(end.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    assert_eq!(said.next().as_deref(), Some("ready"));
    let mut order = |word: &str| {
        writeln!(orders, "{word}").expect("a pipe");
        assert_eq!(said.next().as_deref(), Some("done"), "{word}");
    };
    let function = dray::apart::connect(&place.0.join("source.sock"), AddressSpace::default()).expect("connects");
    let queues = DmaBuffer::allocate("queues", 8192, Pages::Small).expect("memory");
    let iova = function.space().map(&queues, true).expect("maps");
    let is_ready = || Csts::from_bits(function.read32(offset::CSTS)).rdy();
    order("raise");
    function.write32(offset::AQA, 0x001f_001f);
    function.write64(offset::ASQ, iova);
    function.write64(offset::ACQ, iova + 4096);
    function.write32(offset::CC, 0x46_0001);
    assert!((0..1000).all(|_| !is_ready()), "ready behind a raised fence");
    order("lower");
    let late = Instant::now() + PATIENCE;
    while !is_ready() {
        assert!(Instant::now() < late, "not ready with the fence down");
    }
    drop(orders);
    assert!(end.wait().expect("exit").success());
    assert!(!place.0.join("source.sock").exists());
}

#[test]
fn a_controller_behind_a_socket_says_what_it_is() {
    let place = Place::new("identify");
    let path = place.0.join("appliance.toml");
    let text = std::fs::read_to_string(&path).expect("a file");
    let at = text.find("[migration]").expect("[migration]");
    let export = "[[export]]\nsubsystem = \"source\"\ncontroller = 2\nby = \"vfio-user\"\nsocket = \"here.sock\"\n\n";
    std::fs::write(&path, format!("{}{export}{}", &text[..at], &text[at..])).expect("a file");
    let refused = place.dray(&["device", "identify", "vfio-user:here.sock"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("here.sock"));
    let mut run = place.command(&["run"]).stdout(Stdio::piped()).spawn().expect("dray runs");
    let ready = BufReader::new(run.stdout.take().expect("a pipe")).lines().map_while(Result::ok).any(|line| line == "ready");
    let outputs = [0, 1].map(|_| place.dray(&["device", "identify", "vfio-user:here.sock", "--json"]));
    kill_process(Pid::from_child(&run), Signal::TERM).expect("signal");
    run.wait().expect("exit");
    assert!(ready);
    for output in outputs {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!((found["device"].as_str(), found["role"].as_str()), (Some("vfio-user:here.sock"), Some("I/O")));
        assert!(found.to_string().contains("nqn."), "{found}");
    }
}
