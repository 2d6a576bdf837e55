//! The store of what may be lost, from outside: killed while it is written, on a full disk, and what the demo leaves in it.
//!
//! A test that needs a process to kill or to starve runs this test binary again, with [`CHILD`] in its environment.
#![allow(missing_docs)]

use dray::store::entry::{Ending, MigrationEntry};
use dray::store::{Store, StoreError, Ticket};
use dray_tests::dray_in_guest::binary;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The state folder that the child writes in.
const CHILD: &str = "DRAY_TEST_STORE_CHILD";
/// Kills.
const KILLS: u64 = 50;
/// No answer of a store that works takes longer.
const PATIENCE: Duration = Duration::from_secs(8);

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dray-store-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

/// The entry with a number; every field follows from it.
fn entry(number: u64, ended: bool) -> MigrationEntry {
    let policies = (0..number % 7).map(|i| (format!("role-{i}"), "p".repeat((number * 37 % 400) as usize), "00".repeat(32)));
    let ending = Ending {
        at_s: number as i64 + 1,
        outcome: format!("undone: {}", "because ".repeat((number % 50) as usize)),
        bytes: number << 30,
        downtime_us: Some(number),
        policies: policies.collect(),
        ..Ending::default()
    };
    MigrationEntry { from: format!("source-{number}"), begun_s: number as i64, ended: ended.then_some(ending), ..Default::default() }
}

/// Writes entries, each twice as a migration does, and says on standard output which are flushed.
fn write_for_ever(state: &Path) {
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        out.write_all(line.as_bytes()).and_then(|()| out.flush()).expect("standard output");
    };
    let store = Store::start(state).expect("a thread");
    let contents = match store.read(PATIENCE) {
        Ok(contents) => contents,
        Err(error) => return say(format!("\ngone {error}\n")),
    };
    let first = contents.migrations.last().map_or(1, |(number, _)| number + 1);
    for number in first.. {
        let ticket = Ticket::default();
        store.write(&ticket, entry(number, false));
        store.write(&ticket, entry(number, true));
        match store.flush(PATIENCE) {
            Ok(()) => say(format!("\nflushed {number}\n")),
            Err(error) => {
                let late = if matches!(error, StoreError::Late(_)) { "late" } else { "gone" };
                let closed = store.clone().close(PATIENCE).is_err();
                return say(format!("\n{late} dropped={} closed={} {error}\n", store.dropped(), !closed));
            }
        }
    }
}

#[test]
fn the_child() {
    if let Some(state) = std::env::var_os(CHILD) {
        write_for_ever(Path::new(&state));
    }
}

/// This binary as the child, to be run by `shell` (empty: by itself).
fn child(shell: &[&str], state: &Path) -> Command {
    let this = std::env::current_exe().expect("this test");
    let mut words: Vec<_> = shell.iter().map(|word| std::ffi::OsString::from(*word)).collect();
    words.push(this.into());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(["--exact", "the_child", "--nocapture"]).env(CHILD, state);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn flushed(line: &str) -> Option<u64> {
    line.strip_prefix("flushed ")?.parse().ok()
}

/// Kills a writer after so many flushes and microseconds; the entries that it said were flushed.
fn kill_after(state: &Path, flushes: usize, micros: u64) -> Vec<u64> {
    let mut child = child(&[], state).spawn().expect("the child");
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    let mut numbers = lines.filter_map(|line| flushed(&line));
    let mut seen: Vec<_> = numbers.by_ref().take(flushes).collect();
    // The moment of the kill, not a wait for anything.
    std::thread::sleep(Duration::from_micros(micros));
    child.kill().expect("SIGKILL");
    child.wait().expect("it ends");
    // What it had said before it died.
    seen.extend(numbers);
    seen
}

#[test]
fn fifty_kills_lose_nothing_that_was_flushed() {
    let folder = Folder::new("kills");
    let state = folder.0.join("state");
    let mut chance = fastrand::Rng::with_seed(0x5_704e);
    let mut promised = BTreeSet::new();
    let (mut kept, mut set_aside, mut while_opening) = (0, 0, 0);
    for kill in 0..KILLS {
        // A third of them while the store is opened, perhaps for the first time.
        let (flushes, micros) = if kill % 3 == 0 { (0, chance.u64(500..25_000)) } else { (chance.usize(1..30), chance.u64(0..3000)) };
        let flushed = kill_after(&state, flushes, micros);
        while_opening += u64::from(flushed.is_empty());
        promised.extend(flushed);
        let store = Store::start(&state).expect("a thread");
        let contents = store.read(PATIENCE).unwrap_or_else(|error| panic!("kill {kill}: {error}"));
        if let Some(path) = store.set_aside() {
            eprintln!("kill {kill}: set aside as {}", path.display());
            set_aside += 1;
            promised.clear();
        }
        assert_eq!(contents.unreadable, 0, "kill {kill}: garbled entries");
        for (at, (number, found)) in contents.migrations.iter().enumerate() {
            assert_eq!(*number, at as u64 + 1, "kill {kill}: an entry is missing");
            let whole = *found == entry(*number, true);
            assert!(whole || *found == entry(*number, false), "kill {kill}: entry {number} is not what was written: {found:?}");
            assert!(whole || !promised.contains(number), "kill {kill}: entry {number} was flushed with its end");
        }
        kept = contents.migrations.len() as u64;
        let last = promised.last().copied().unwrap_or(0);
        assert!(kept >= last, "kill {kill}: entry {last} was flushed, {kept} are there");
        store.close(PATIENCE).unwrap_or_else(|error| panic!("kill {kill}: {error}"));
    }
    eprintln!("{KILLS} kills ({while_opening} before the first flush): {kept} entries, {set_aside} stores set aside");
    assert_eq!(set_aside, 0, "a kill is no damage");
    assert!(while_opening >= 5 && kept > 200, "the kills come at all kinds of moments");
}

/// How a process gets a small disk of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Starving {
    /// A tmpfs in a mount namespace, as root.
    Root,
    /// As above, as root of a user namespace.
    User,
    /// A limit on the size of files, with its signal ignored.
    Limit,
}

impl Starving {
    fn choose() -> Self {
        let works = |flags| {
            let tried = Command::new("unshare").args([flags, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]).output();
            tried.is_ok_and(|output| output.status.success())
        };
        match () {
            () if works("-m") => Self::Root,
            () if works("-rm") => Self::User,
            () => Self::Limit,
        }
    }

    /// A command line that runs what follows it with `size` of disk at `place`, with a copy of what was there, and a file of
    /// `taken` bytes, or of as many as there is room for.
    fn shell(self, place: &Path, size: &str, taken: &str) -> Vec<String> {
        let place = place.to_str().expect("UTF-8");
        let mounted = format!(
            "mkdir -p {place} && cp -a {place} {place}.before && mount -t tmpfs -o size={size} none {place} && \
             cp -a {place}.before/. {place}/ && {{ head -c {taken} /dev/zero > {place}/taken; exec \"$@\"; }}"
        );
        // In blocks of 512 bytes: 512 KiB.
        let limited = "trap '' XFSZ; ulimit -f 1024; exec \"$@\"".to_owned();
        let words = match self {
            Self::Root => vec!["unshare", "-m", "--", "sh", "-c", &mounted, "sh"],
            Self::User => vec!["unshare", "-rm", "--", "sh", "-c", &mounted, "sh"],
            Self::Limit => vec!["sh", "-c", &limited, "sh"],
        };
        words.into_iter().map(str::to_owned).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Root => "a tmpfs in a mount namespace",
            Self::User => "a tmpfs in a user namespace",
            Self::Limit => "a limit on the size of files",
        }
    }
}

#[test]
fn a_disk_that_fills_up_ends_the_store_and_not_its_process() {
    let how = Starving::choose();
    for (name, size, taken) in [("from-the-start", "64k", "64k"), ("early", "700k", "1"), ("later", "3m", "1")] {
        if how == Starving::Limit && name == "from-the-start" {
            continue;
        }
        let folder = Folder::new(name);
        let disk = folder.0.join("disk");
        let shell = how.shell(&disk, size, taken);
        let shell: Vec<_> = shell.iter().map(String::as_str).collect();
        let begun = Instant::now();
        let output = child(&shell, &disk.join("state")).output().expect("the child");
        let said = String::from_utf8_lossy(&output.stdout);
        let last = said.lines().find(|line| line.starts_with("gone ") || line.starts_with("late "));
        let count = said.lines().filter(|line| flushed(line).is_some()).count();
        eprintln!("{} ({name}): {count} entries flushed, then: {}", how.name(), last.unwrap_or("nothing"));
        assert!(output.status.success(), "{name}: {:?} {said}", output.status);
        let last = last.unwrap_or_else(|| panic!("{name}: it never filled up: {said}"));
        // sled may wait for ever for what another of its threads failed to write: then whoever asks has lost patience.
        assert!(last.starts_with("late ") || last.contains("No space") || how == Starving::Limit, "{name}: it says why: {last}");
        assert!(begun.elapsed() < 3 * PATIENCE, "{name}: it took {:?}", begun.elapsed());
        assert!((name == "from-the-start") == (count == 0), "{name}: {count}");
    }
}

/// A configuration with its files in `folder`, and native policies.
fn config(folder: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
    let text = std::fs::read_to_string(root.join("appliance.toml")).expect("appliance.toml").replace("target/dray/", "");
    let text = ["cdq", "tracking", "copy"].iter().fold(text, |text, role| {
        text.replace(&format!("\"target/plugins/{role}-default.wasm\""), "\"native\"")
    });
    // On a machine that is busy with other tests an answer from beside the core may be late, and what the host adds then counts.
    let text = text.replace("policies = \"beside\"", "policies = \"on\"");
    // For the same reason it may take longer over a disk than the demo's budget allows.
    let text = text.replace("downtime = \"10ms\"", "downtime = \"500ms\"");
    let config = folder.join("appliance.toml");
    std::fs::write(&config, text).expect("a file");
    config
}

/// Runs `dray` by way of `shell`.
fn dray(shell: &[String], config: &Path, args: &[&str]) -> Output {
    let mut words: Vec<_> = shell.iter().map(std::ffi::OsString::from).collect();
    words.push(binary().into());
    Command::new(&words[0]).args(&words[1..]).args(args).arg("--config").arg(config).stdin(Stdio::null()).output().expect("dray runs")
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default())).expect("JSON")
}

const DEMO: [&str; 6] = ["demo", "--size", "32MiB", "--settle", "100", "--json"];

#[test]
fn the_demo_is_in_the_history() {
    let folder = Folder::new("history");
    let config = config(&folder.0);
    assert_eq!(json(&dray(&[], &config, &["history", "--json"]))["migrations"], Value::Array(Vec::new()));
    assert!(!folder.0.join("state/store").exists(), "looking makes nothing");
    let summary = json(&dray(&[], &config, &DEMO));
    let history = json(&dray(&[], &config, &["history", "--json"]));
    let migrations = history["migrations"].as_array().expect("migrations");
    let [migration] = migrations.as_slice() else { panic!("one migration: {history}") };
    assert_eq!((&migration["number"], &migration["from"], &migration["to"]), (&1.into(), &"source".into(), &"destination".into()));
    let ended = &migration["ended"];
    assert_eq!((&ended["outcome"], &ended["verdict_ok"]), (&"done".into(), &true.into()));
    assert_eq!(ended["downtime_us"], summary["downtime_us"]);
    assert_eq!(ended["rounds"].as_u64(), summary["rounds"].as_array().map(|rounds| rounds.len() as u64));
    assert!(ended["bytes"].as_u64() >= Some(32 << 20) && ended["at_s"].as_i64() >= migration["begun_s"].as_i64());
    let seen: Vec<_> = history["namespaces"].as_array().expect("namespaces").iter().map(|n| (&n["subsystem"], &n["bytes"])).collect();
    assert_eq!(seen, [(&"destination".into(), &(32u64 << 20).into()), (&"source".into(), &(32u64 << 20).into())]);
    let people = dray(&[], &config, &["history"]);
    let people = String::from_utf8_lossy(&people.stdout);
    assert!(people.contains("source -> destination") && people.contains("done") && people.contains("32 MiB"), "{people}");
}

#[test]
fn a_full_disk_under_the_store_costs_the_history_and_nothing_else() {
    let how = Starving::choose();
    if how == Starving::Limit {
        eprintln!("SKIPPED: no mount namespace here, and a limit on the size of files would hit the images as well");
        return;
    }
    let folder = Folder::new("full");
    let config = config(&folder.0);
    // A history that was kept as long as there was room.
    json(&dray(&[], &config, &DEMO));
    let shell = how.shell(&folder.0.join("state/store"), "2m", "2m");
    let begun = Instant::now();
    let output = dray(&shell, &config, &DEMO);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let summary = json(&output);
    assert_eq!((&summary["verdict"], &summary["writes_missing"]), (&"ok".into(), &0.into()), "{said}");
    assert_eq!(said.matches("history of migrations").count(), 1, "one warning: {said}");
    assert!(!said.contains("panicked"), "{said}");
    eprintln!("{}: verdict ok after {:?}, store: {}", how.name(), begun.elapsed(), said.lines().find(|l| l.contains("history of")).unwrap_or(""));
}
