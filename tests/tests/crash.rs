//! `kill -9` of the real process during a migration, again and again: whatever it was doing, started again it resumes or undoes,
//! and the verdict holds by the ledger on disk.
//!
//! One pair of disks and one ledger go through all kills: a namespace that has moved is moved back by the next run, over a disk
//! that was filled with A5h meanwhile. The kills are aimed by the page that the process shows its phase in; which phase one has
//! hit is read from that page and from the durable record afterwards.
//!
//! What this cannot see: a record that is written and not flushed before the step that relies on it. The page cache survives the
//! process; only a power cut loses it, and that is the simulator's.
#![allow(missing_docs)]

use dray::assembly;
use dray::config::{Config, nguid_bytes};
use dray::core::clock::Clock;
use dray::core::records::{FileMedium, RecordStore};
use dray::core::status::{Seen, Status};
use dray::recovery::Records;
use dray_device::poll::Poll;
use dray_device::slot::Slot;
use dray_device::space::AddressSpace;
use dray_driver::{Driver, DriverConfig, DriverState};
use dray_migration::{Owner, Phase, Record, RecordPhase};
use dray_tests::dray_in_guest::binary;
use dray_workload::ledger::Ledger;
use fastrand::Rng;
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const BYTES: u64 = 64 << 20;
/// Kills in all; another number by `DRAY_KILLS`. A tenth of them in each class at least; a class that is still short when there
/// were nearly twice as many fails the test.
const KILLS: u32 = 100;
const PATIENCE: Duration = Duration::from_secs(60);
const NAMES: [&str; 2] = ["source", "destination"];

/// What the process was doing when it died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    FullRound,
    LaterRounds,
    SwitchOver,
    AfterCommit,
    /// Before the first round, or on the way back.
    Other,
}

const CLASSES: [(Class, &str); 5] = [
    (Class::FullRound, "full round"),
    (Class::LaterRounds, "later rounds"),
    (Class::SwitchOver, "switch-over"),
    (Class::AfterCommit, "after commit"),
    (Class::Other, "elsewhere"),
];

impl Class {
    /// Whether a look at the process says that it is there.
    fn is_on(self, seen: &Seen) -> bool {
        match (self, seen.phase) {
            (Self::FullRound, Some(Phase::Copying)) => seen.rounds == 0,
            (Self::LaterRounds, Some(Phase::Copying)) => seen.rounds > 0,
            (Self::SwitchOver, Some(Phase::SwitchingOver)) => true,
            (Self::AfterCommit, Some(Phase::Completing | Phase::Ended)) => true,
            _ => false,
        }
    }

    /// How long a process is left there at most.
    fn longest(self) -> Duration {
        match self {
            Self::FullRound => Duration::from_millis(60),
            Self::LaterRounds => Duration::from_millis(80),
            Self::SwitchOver => Duration::from_millis(4),
            Self::AfterCommit | Self::Other => Duration::from_millis(90),
        }
    }
}

/// The repository's configuration, with its files in a folder that goes away with the test.
struct Place {
    folder: PathBuf,
    text: String,
    status: Status,
}

impl Place {
    fn new(name: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
        let plugins = root.join("target/plugins");
        assert!(plugins.join("plugins.lock").is_file(), "no components: run `cargo xtask plugins`");
        let folder = std::env::temp_dir().join(format!("dray-crash-{name}-{}", std::process::id()));
        let text = std::fs::read_to_string(root.join("appliance.toml")).expect("appliance.toml");
        let text = text.replace("target/plugins", plugins.to_str().expect("UTF-8")).replace("target/dray/", "");
        // A busy machine may take long over a disk; rounds go on until they do not get shorter, so that there are later ones.
        let text = text.replace("downtime = \"10ms\"", "downtime = \"2s\"");
        let text = text.replace("settings = {}", "settings = { aim-percent = \"0\" }");
        let status = Status::open(&folder.join("state/status")).expect("the status page");
        let place = Self { folder, text, status };
        place.direct(0);
        place
    }

    /// Which way the next run moves: from `NAMES[from]` to the other.
    fn direct(&self, from: usize) {
        let ends = [("from", NAMES[from]), ("to", NAMES[1 - from])];
        let lines = self.text.lines().map(|line| {
            let end = ends.iter().find(|(key, _)| line.starts_with(&format!("{key} = ")));
            end.map_or(line.to_owned(), |(key, name)| format!("{key} = \"{name}\""))
        });
        let text = lines.collect::<Vec<_>>().join("\n");
        std::fs::write(self.folder.join("appliance.toml"), text).expect("a file");
    }

    fn demo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("demo").args(args).current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// Starts a run whose words go to a file.
    fn start(&self, args: &[&str]) -> Child {
        let log = File::create(self.folder.join("log")).expect("a file");
        self.demo(args).stdout(Stdio::null()).stderr(log).spawn().expect("dray runs")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Looks at the run until `there`, or until it has ended; says whether it was there.
    fn watch(&self, child: &mut Child, there: impl Fn(&Seen) -> bool) -> bool {
        let end = Instant::now() + PATIENCE;
        let mut looks = 0u32;
        loop {
            let seen = self.status.seen();
            if seen.process == u64::from(child.id()) && there(&seen) {
                return true;
            }
            looks += 1;
            if looks.is_multiple_of(64) && child.try_wait().expect("wait").is_some() {
                return false;
            }
            assert!(Instant::now() < end, "{:?} after {PATIENCE:?}: {}", seen, self.log());
            std::thread::sleep(Duration::from_micros(40));
        }
    }

    /// Starts a run again, kills it `delay` after it has come to `class`.
    fn kill(&self, class: Class, delay: Duration) -> Seen {
        let mut child = self.start(&["--resume", "--settle", "60"]);
        let there = self.watch(&mut child, |seen| class == Class::Other || class.is_on(seen));
        let at = Instant::now() + delay;
        while there && Instant::now() < at {
            std::hint::spin_loop();
        }
        child.kill().expect("SIGKILL");
        let status = child.wait().expect("wait");
        assert!(status.code().is_none() || status.success(), "it failed before it was killed: {}", self.log());
        let seen = self.status.seen();
        if seen.process == u64::from(child.id()) { seen } else { Seen { phase: None, ..seen } }
    }

    fn record(&self) -> Option<Record> {
        let nguid = nguid_bytes("d7a1000000000000000000000000d201").expect("NGUID");
        let medium = FileMedium::open(&self.folder.join("state/records"), &nguid).expect("the record's file");
        RecordStore::open(medium, nguid).expect("a record, or none").current().map(|stored| stored.record)
    }

    /// A run to its end.
    fn verdict(&self) -> Value {
        let output = self.demo(&["--resume", "--settle", "30", "--json"]).output().expect("dray runs");
        let said = String::from_utf8_lossy(&output.stderr);
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let summary: Value = text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_else(|| {
            panic!("no summary after a kill: {said}\n{text}");
        });
        // Where the machine is short of processors a policy may be late, and the host does its work: that is no loss.
        let reasons = summary["reasons"].as_array().expect("reasons").iter().filter_map(Value::as_str);
        let wrong: Vec<_> = reasons.filter(|reason| !reason.starts_with("policy.")).collect();
        assert!(wrong.is_empty(), "{wrong:?} after a kill: {said}\n{text}");
        let number = |key: &str| summary[key].as_u64().unwrap_or_else(|| panic!("{key} in {summary}"));
        assert_eq!(number("blocks_different") + number("writes_missing"), 0, "{summary}");
        assert_eq!((number("blocks_compared"), summary["fsck"].as_str()), (BYTES / 4096, Some("clean")), "{summary}");
        summary
    }

    /// Makes the input: a run that is killed while its guest settles.
    fn prepare(&self) {
        let size = format!("{}MiB", BYTES >> 20);
        let mut child = self.start(&["--size", &size, "--rate", "4000", "--settle", "60000"]);
        let settling = self.watch(&mut child, |seen| seen.act == Some(dray::live::Act::Settling));
        assert!(settling, "no run: {}", self.log());
        let (ledger, end) = (self.folder.join("state/guest.ledger"), Instant::now() + PATIENCE);
        while Ledger::open(&ledger).expect("the ledger").acknowledged() < 200 {
            assert!(Instant::now() < end, "the guest does not write: {}", self.log());
        }
        child.kill().expect("SIGKILL");
        child.wait().expect("wait");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _left = std::fs::remove_dir_all(&self.folder);
    }
}

/// What a campaign has hit.
#[derive(Default)]
struct Spread {
    wanted: u32,
    kills: [u32; 5],
    resumed: u32,
    undone: u32,
    restarts_killed: u32,
}

impl Spread {
    fn total(&self) -> u32 {
        self.kills.iter().sum()
    }

    fn short(&self) -> bool {
        self.kills[..4].iter().any(|count| *count < self.wanted / 10)
    }

    fn is_over(&self) -> bool {
        let total = self.total();
        total >= self.wanted && !self.short() || total >= self.wanted * 9 / 5
    }

    /// The class with the fewest kills.
    fn next(&self) -> Class {
        let fewest = (0..4).min_by_key(|class| self.kills[*class]).unwrap_or(0);
        CLASSES[fewest].0
    }

    fn count(&mut self, class: Class) {
        let place = CLASSES.iter().position(|(known, _)| *known == class).unwrap_or(4);
        self.kills[place] += 1;
    }

    fn table(&self) -> String {
        let parts: Vec<_> = CLASSES.iter().zip(self.kills).map(|((_, name), count)| format!("{name} {count}")).collect();
        format!(
            "kills: {}; of restarts {}; resumed {}, undone {}",
            parts.join(", "),
            self.restarts_killed,
            self.resumed,
            self.undone
        )
    }
}

/// One pair of disks through many kills.
struct Campaign {
    place: Place,
    rng: Rng,
    spread: Spread,
    /// The newest migration that was over before this turn.
    base: u64,
}

impl Campaign {
    /// Whether the destination of this turn owns the namespace.
    fn is_moved(&self) -> bool {
        let moved = |record: &Record| matches!(record.phase, RecordPhase::Moved | RecordPhase::Done);
        self.place.record().is_some_and(|record| record.migration > self.base && moved(&record))
    }

    fn kill(&mut self, target: Class) {
        let longest = u64::try_from(target.longest().as_micros()).unwrap_or(0);
        let delay = Duration::from_micros(self.rng.u64(0..longest));
        let seen = self.place.kill(target, delay);
        let moved = self.is_moved();
        let hit = CLASSES[..3].iter().find(|(class, _)| class.is_on(&seen)).map(|(class, _)| *class);
        self.spread.count(if moved { Class::AfterCommit } else { hit.unwrap_or(Class::Other) });
    }

    /// Moves the namespace from one side to the other, through one kill or two.
    fn turn(&mut self, from: usize) {
        self.base = self.place.record().map_or(0, |record| record.migration);
        self.place.direct(from);
        let stale = self.place.folder.join(format!("{}.img", NAMES[1 - from]));
        let stale = File::options().write(true).open(stale).expect("the old side's disk");
        dray_workload::pattern::fill_file(&stale, BYTES, dray_workload::pattern::STALE).expect("filled");
        self.kill(self.spread.next());
        if self.rng.u8(0..4) == 0 {
            self.kill(if self.is_moved() { Class::Other } else { self.spread.next() });
            self.spread.restarts_killed += 1;
        }
        let (moved, epoch) = (self.is_moved(), self.place.record());
        let summary = self.place.verdict();
        let text = |key: &str| summary[key].as_str().unwrap_or_else(|| panic!("{key} in {summary}")).to_owned();
        assert_eq!(text("check"), "both disks");
        let before = if moved { "done before this start" } else { "done" };
        assert_eq!(text("outcome"), before, "{}", text("found"));
        assert!(!moved || text("found").contains("the destination serves, the source stays fenced"), "{}", text("found"));
        *(if moved { &mut self.spread.resumed } else { &mut self.spread.undone }) += 1;
        let (last, epoch) = (self.place.record().expect("a record"), epoch.map_or(0, |record| record.migration));
        assert_eq!((last.phase, last.owner), (RecordPhase::Done, Owner::Destination));
        assert!(last.migration >= epoch && last.migration > self.base, "numbers rise");
    }
}

#[test]
fn every_kill_is_resumed_or_undone() {
    let began = Instant::now();
    let place = Place::new("kills");
    place.prepare();
    let wanted = std::env::var("DRAY_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    let spread = Spread { wanted, ..Spread::default() };
    let mut campaign = Campaign { place, rng: Rng::with_seed(7), spread, base: 0 };
    let mut from = 0;
    while !campaign.spread.is_over() {
        campaign.turn(from);
        from = 1 - from;
    }
    let spread = &campaign.spread;
    // Straight to standard error: the spread is a result, whether or not the test passes.
    let _shown = writeln!(std::io::stderr(), "{} in {:.0?}", spread.table(), began.elapsed());
    assert!(!spread.short(), "too few kills in a class: {}", spread.table());
}

/// What a run that must not be says.
fn refused(place: &Place, args: &[&str]) -> String {
    let output = place.demo(args).output().expect("dray runs");
    let said = String::from_utf8_lossy(&output.stderr).replace(['│', '\n'], " ");
    assert!(!output.status.success() && !said.contains("panicked"), "{said}");
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn what_cannot_be_resumed_is_said_plainly() {
    let place = Place::new("refused");
    assert!(refused(&place, &["--resume"]).contains("there is nothing to resume"));
    assert!(refused(&place, &["--resume", "--size", "64MiB"]).contains("cannot be used with"));
    place.prepare();
    // A damaged record is not a new namespace, and nothing is made anew over it either.
    let nguid = nguid_bytes("d7a1000000000000000000000000d201").expect("NGUID");
    let path = FileMedium::path(&place.folder.join("state/records"), &nguid);
    std::fs::write(&path, vec![7; 8192]).expect("damage");
    for args in [&["--resume"][..], &["--size", "64MiB"]] {
        let said = refused(&place, args);
        assert!(said.contains("the record of namespace 1: both slots are damaged"), "{said}");
    }
    std::fs::remove_file(&path).expect("removed");
    // An acknowledged write that is gone stops everything before the guest could write over it.
    let image = place.folder.join("source.img");
    let bytes = std::fs::metadata(&image).expect("the disk").len();
    let file = File::options().write(true).open(&image).expect("the disk");
    dray_workload::pattern::fill_file(&file, bytes, 0).expect("filled");
    let said = refused(&place, &["--resume"]);
    assert!(said.contains("acknowledged writes are not in"), "{said}");
}

/// Two subsystems in memory under one state folder.
fn config(folder: &Path) -> Config {
    let side = |name: &str| {
        format!(
            "[[subsystem]]\nname = \"{name}\"\nnqn = \"nqn.2026-11.org.example:it\"\nserial = \"S-1\"\n\
             [[subsystem.namespace]]\nnsid = 1\nbacking = \"memory\"\nsize = \"8MiB\"\nblock = \"4KiB\"\n\
             nguid = \"000000000000000000000000000000a1\"\n\
             [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
             [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
        )
    };
    let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
    let migration = "[migration]\nfrom = \"source\"\nto = \"destination\"\n";
    let text = format!("[core]\nstate = \"state\"\n{}{}{migration}{policies}", side("source"), side("destination"));
    Config::parse("appliance.toml", text, folder.to_path_buf()).expect("a configuration")
}

/// Whether a guest gets the migratable controller of a side to work after a restart that found these records.
fn serves(config: &Config, records: &Records, name: &str) -> bool {
    let subsystem = config.subsystem(name).expect("a subsystem");
    let mut machine = assembly::machine_behind(config, subsystem, records.is_fenced(subsystem)).expect("a machine");
    let slot = Slot::new(AddressSpace::default(), 2).expect("a slot");
    slot.point_at(&machine.migratable[0].plug);
    let mut guest = Driver::new(slot.function(), DriverConfig::default()).expect("a driver");
    let (clock, end) = (Clock::new(), Instant::now() + PATIENCE);
    loop {
        let now = clock.now();
        let _progress = machine.subsystem.poll(now).and(guest.poll(now));
        match guest.state() {
            DriverState::Ready => return true,
            DriverState::Failed(_) => return false,
            _ => assert!(Instant::now() < end, "{name}: {:?}", guest.state()),
        }
    }
}

#[test]
fn after_a_restart_exactly_one_side_serves() {
    let folder = std::env::temp_dir().join(format!("dray-crash-fence-{}", std::process::id()));
    let config = config(&folder);
    for (phase, fenced) in
        [(RecordPhase::Copying, false), (RecordPhase::Moved, true), (RecordPhase::Done, true), (RecordPhase::Undone, false)]
    {
        let records = Records::open(&config).expect("records");
        let ([from, to], migration) = (records.ends(), records.next_migration());
        let owner = if fenced { Owner::Destination } else { Owner::Source };
        let record = Record { migration, from, to, epoch: 1, owner, phase, fenced };
        records.into_stores()[0].write(record).expect("written");
        let records = Records::open(&config).expect("records");
        assert_eq!(records.serving().expect("an end"), owner);
        assert_eq!(serves(&config, &records, "source"), !fenced, "{phase:?}");
        assert!(serves(&config, &records, "destination"), "{phase:?}: it is nobody's, or serves");
    }
    std::fs::remove_dir_all(&folder).expect("cleaning up");
}
