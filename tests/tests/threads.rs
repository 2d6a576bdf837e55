//! One migration with real threads, as the demo runs it: both subsystems and the migration on one core, the guest on another.
#![allow(missing_docs)]

use dray::assembly::{Machine, Migratable};
use dray::config::Config;
use dray::core::clock::Clock;
use dray::live::{self, Act, LiveSpec};
use dray::policies;
use dray_controller::{MemoryBacking, Subsystem};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::slot::Slot;
use dray_device::space::AddressSpace;
use dray_migration::Outcome;
use dray_tests::rig::{IO_QUEUES, MANAGEMENT, MIGRATABLE, NSID, Side, pattern};
use dray_workload::guest::GuestConfig;
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::reader::ArenaReader;
use dray_workload::verify;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

const BYTES: usize = 64 << 20;

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _missing = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _missing = std::fs::remove_dir_all(&self.0);
    }
}

fn machine(name: &str, disk: &DmaBuffer) -> Machine {
    let side = Side::over(Box::new(MemoryBacking::with_memory(disk.clone(), 4096).expect("a backing")));
    let fence = side.fence(MIGRATABLE);
    let subsystem = Subsystem::new(side.config, side.namespaces).expect("a subsystem");
    let slot = Slot::new(AddressSpace::default(), IO_QUEUES + 1).expect("a slot");
    slot.point_at(&subsystem.plug(MANAGEMENT).expect("a management controller"));
    let plug = subsystem.plug(MIGRATABLE).expect("a migratable controller");
    let migratable = vec![Migratable { cntlid: MIGRATABLE, plug, fence, io_queues: IO_QUEUES }];
    Machine { name: name.to_owned(), subsystem, management: (MANAGEMENT, slot), migratable }
}

/// `appliance.toml` as it stands, but for the folder of its state, and the policies where they are native.
fn config(folder: &Folder, native: bool) -> Config {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut text = std::fs::read_to_string(root.join("appliance.toml")).expect("appliance.toml");
    for role in ["cdq", "tracking", "copy"] {
        let file = format!("target/plugins/{role}-default.wasm");
        let there = if native { "native".to_owned() } else { root.join(&file).display().to_string() };
        text = text.replace(&file, &there);
    }
    text = text.replace("target/dray/", "");
    Config::parse("appliance.toml", text, folder.0.clone()).expect("a configuration")
}

fn run(name: &str, native: bool) {
    let folder = Folder::new(name);
    let config = config(&folder, native);
    let disks = ["source", "destination"].map(|name| DmaBuffer::allocate(name, BYTES, Pages::Small).expect("memory"));
    disks[0].segment().write(&pattern(1, BYTES));
    disks[1].arena().fill(disks[1].offset(), BYTES, 0xa5);
    let blocks = (0..2048).map(|block| block * (BYTES as u64 / 4096 / 2048)).collect();
    let ledger = Arc::new(Ledger::in_memory(&LedgerSpec { seed: 3, guest: 1, blocks }).expect("a ledger"));
    let (seats, _kept) = policies::seat(&config, Clock::new()).expect("policies");
    let spec = LiveSpec {
        config: &config,
        guest: GuestConfig { nsid: NSID, rate: 5_000, ..GuestConfig::default() },
        ledger: Arc::clone(&ledger),
        settle: Duration::from_millis(200),
        reset: true,
        max_bytes_per_s: 256 << 20,
        seed: 1,
        pin: None,
        cancel: Arc::new(AtomicBool::new(false)),
    };
    let mut acts = Vec::new();
    let report = live::run(&spec, machine("source", &disks[0]), machine("destination", &disks[1]), seats, &mut |view| {
        if acts.last() != Some(&view.act) {
            acts.push(view.act);
        }
    });
    let report = report.expect("a run");
    assert_eq!(report.migration.outcome, Outcome::Moved, "{:?}", report.migration);
    assert_eq!(report.guest_error, None);
    assert!(report.same_identity, "the guest found another identity after its reset");
    assert!(acts.starts_with(&[Act::Settling, Act::Migrating, Act::After]), "{acts:?}");
    let [mut source, mut destination] = disks.map(|disk| ArenaReader(Arc::clone(disk.arena())));
    let found = verify::compare(&mut source, &mut destination, &ledger).expect("a comparison");
    assert!(found.is_ok() && found.writes_acknowledged > 500, "{found:?}");
    for (role, policy) in &report.migration.policies {
        let stats = &policy.stats;
        assert!(stats.calls > 0 && stats.faults + stats.fallbacks + policy.omissions == 0, "{role}: {policy:?}");
        assert_eq!(policy.identity.component.starts_with("native"), native, "{policy:?}");
    }
}

#[test]
fn a_namespace_moves_with_native_policies() {
    run("threads-native", true);
}

#[test]
fn a_namespace_moves_with_the_built_components() {
    run("threads-components", false);
}
