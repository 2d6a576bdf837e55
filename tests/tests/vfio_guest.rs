//! Physical functions through VFIO, in a stock guest: QEMU's own NVMe controllers behind an emulated IOMMU, which nobody here
//! wrote, and the `dray` binary inside. What VFIO needs of a kernel is not there where tests run, so this is where it is tried.
//!
//! Four boots: one machine with drives that are listed, taken, identified, formatted, exercised, given back and pulled out; one
//! with a drive that has virtual functions; one whose drive is reset while an appliance serves from it; one in which the README's
//! commands are run as they are written.

use dray_tests::dray_in_guest::Initrd;
use dray_tests::guest::{self, Guest, Machine, STEP, Trouble};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of a drive.
const DRIVE: u64 = 64 << 20;

/// A folder of a test's own; it goes with this.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dray-vfio-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }

    fn drive(&self, name: &str) -> PathBuf {
        self.drive_of(name, DRIVE)
    }

    fn drive_of(&self, name: &str, bytes: u64) -> PathBuf {
        let file = self.0.join(name);
        fs::File::create(&file).and_then(|file| file.set_len(bytes)).expect("a drive");
        file
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// With a drive of that serial number behind a port of its own, 0000:01:00.0, that can have two virtual functions.
fn with_virtual_functions(machine: Machine, serial: &str, file: &Path) -> Machine {
    machine.iommu().qemu(&[
        "-device",
        "nvme-subsys,id=subsys,nqn=shared",
        "-device",
        "pcie-root-port,id=rp,slot=1,chassis=1",
        "-device",
        &format!("nvme,id=nv,serial={serial},subsys=subsys,bus=rp,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2"),
        "-drive",
        &format!("file={},if=none,id=disk,format=raw", file.display()),
        "-device",
        "nvme-ns,drive=disk,bus=nv,nsid=1,shared=on",
    ])
}

/// A `dray` command in the guest. Its output goes through a pipe: messages are not for a terminal.
fn command(words: &str) -> String {
    format!("dray {words} 2>&1 | cat")
}

/// What was printed, without the lines and marks that messages are framed with.
fn words(said: &str) -> String {
    said.replace(['│', '×', '·', '╰', '─', '▶', '├'], " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

fn good(guest: &mut Guest, words: &str) -> String {
    guest.run(&command(words))
}

/// A command that must fail, with a message.
#[track_caller]
fn refused(guest: &mut Guest, command_words: &str) -> String {
    match guest.step(&command(command_words), STEP) {
        Err(Trouble::Failed(1, said)) => words(&said),
        other => panic!("`dray {command_words}` should have been refused: {other:?}"),
    }
}

fn json(said: &str) -> Value {
    let from = said.find('{').unwrap_or(0);
    serde_json::from_str(&said[from..]).unwrap_or_else(|error| panic!("{error}: {said}"))
}

fn functions(guest: &mut Guest) -> Vec<Value> {
    json(&good(guest, "device list --json"))["pci"].as_array().cloned().expect("a list")
}

/// The physical function of the drive of that serial number.
#[track_caller]
fn drive(guest: &mut Guest, serial: &str) -> Value {
    let all = functions(guest);
    let found = all.iter().find(|one| one["serial"] == serial && one["physical_function"].is_null()).cloned();
    found.unwrap_or_else(|| panic!("no drive {serial}: {all:#?}"))
}

fn address(function: &Value) -> String {
    function["address"].as_str().expect("an address").to_owned()
}

/// Blocks of 512 bytes of a drive's file that say where they belong, and are there.
fn blocks_in_place(file: &Path) -> u64 {
    let file = fs::File::open(file).expect("the drive");
    let mut word = [0; 8];
    let in_place = |lba: &u64| file.read_exact_at(&mut word, lba * 512).is_ok() && u64::from_le_bytes(word) == *lba && *lba != 0;
    (0..DRIVE / 512).filter(in_place).count() as u64
}

/// QEMU's monitor.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("QEMU's monitor");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
        let mut monitor = Self(BufReader::new(stream));
        monitor.ask("{\"execute\":\"qmp_capabilities\"}");
        monitor
    }

    /// Sends a command and waits for its answer; events are passed over.
    fn ask(&mut self, command: &str) {
        self.0.get_mut().write_all(command.as_bytes()).expect("to QEMU");
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("from QEMU");
            assert!(!line.is_empty() && !line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                return;
            }
        }
    }
}

/// Starts an exercise in the guest that goes on while other steps run, and waits until it writes.
fn start_exercise(guest: &mut Guest, address: &str, file: &Path) {
    let before = blocks_in_place(file);
    guest.run(&format!("start exercise 'dray device exercise pci:{address} --nsid 1 --bytes 60MiB --seed 99 --destroys-data'"));
    let end = Instant::now() + STEP;
    while blocks_in_place(file) <= before {
        assert!(Instant::now() < end, "the exercise writes nothing");
        if let Err(trouble) = guest.step("running exercise", STEP) {
            panic!("the exercise has ended: {trouble:?}");
        }
    }
}

/// How the exercise that was started ended: it must have failed, and say why.
#[track_caller]
fn end_exercise(guest: &mut Guest) -> String {
    match guest.step("finish exercise 120", STEP) {
        Err(Trouble::Failed(1, said)) => words(&said),
        other => panic!("the exercise should have failed: {other:?}"),
    }
}

#[test]
fn a_drive_is_taken_tried_given_back_and_pulled_out() {
    let _turn = guest::turn();
    let folder = Folder::new("drive");
    let (file, socket) = (folder.drive("drive.img"), folder.0.join("qmp"));
    let initrd = Initrd::with_dray();
    let machine = Machine::new("vfio").iommu().initrd(initrd.path()).qemu(&[
        "-qmp",
        &format!("unix:{},server=on,wait=off", socket.display()),
        "-device",
        "pcie-root-port,id=rp,slot=1,chassis=1",
        "-drive",
        &format!("file={},if=none,id=disk,format=raw", file.display()),
        "-device",
        "nvme,id=nv,serial=plain,drive=disk,bus=rp",
    ]);
    let mut guest = Guest::boot(&machine);
    // The kernel has it.
    let function = drive(&mut guest, "plain");
    let at = address(&function);
    let group = &function["iommu_group"];
    assert_eq!((&function["owner"], &function["live_migration"]["hmlms"]), (&"nvme".into(), &false.into()), "{function:#}");
    assert!(group.is_u64(), "{function:#}");
    let block = function["block_devices"][0]["name"].as_str().expect("a block device").to_owned();
    assert!(refused(&mut guest, &format!("device identify pci:{at}")).contains("not bound to vfio-pci but to nvme"));
    // What lives on it keeps it.
    guest.run(&format!("mkfs.ext4 -q -F /dev/{block} && mount -t ext4 /dev/{block} /mnt"));
    let said = refused(&mut guest, &format!("device bind {at}"));
    assert!(said.contains(&format!("{block} is mounted at /mnt")), "{said}");
    assert_eq!(drive(&mut guest, "plain")["owner"], "nvme");
    guest.run("umount /mnt");
    // Ours.
    assert!(good(&mut guest, &format!("device bind {at}")).contains("is bound to vfio-pci now"));
    let function = drive(&mut guest, "plain");
    assert_eq!((&function["owner"], &function["live_migration"]["hmlms"]), (&"vfio-pci".into(), &false.into()), "{function:#}");
    let identified = json(&good(&mut guest, &format!("device identify pci:{at} --json")));
    let id = &identified["identify_controller"];
    assert_eq!((&id["sn"], &id["mn"]), (&"plain".into(), &"QEMU NVMe Ctrl".into()), "{id:#}");
    // Formatted: nothing of the filesystem is left where it began.
    let said = refused(&mut guest, &format!("device format pci:{at} --nsid 1"));
    assert!(said.contains("--destroys-data"), "{said}");
    assert!(refused(&mut guest, &format!("device format pci:{at} --nsid 1 --lbaf 60 --destroys-data")).contains("has no LBA format 60"));
    let said = good(&mut guest, &format!("device format pci:{at} --nsid 1 --destroys-data"));
    assert!(said.contains("131072 blocks of 512 bytes (64 MiB)"), "{said}");
    // Written, read back, compared; and where it should be by the file outside.
    let said = json(&good(&mut guest, &format!("device exercise pci:{at} --nsid 1 --bytes 8MiB --seed 7 --destroys-data --json")));
    assert_eq!((&said["verified"], &said["differing"]), (&true.into(), &0.into()), "{said:#}");
    let blocks = said["blocks"].as_u64().expect("blocks");
    assert!(blocks > 8192 && said["depths"].as_array().is_some_and(|depths| depths.len() == 4), "{said:#}");
    assert!(blocks_in_place(&file) >= blocks - 1, "{} of {blocks} blocks are on the drive", blocks_in_place(&file));
    // One program at a time.
    start_exercise(&mut guest, &at, &file);
    assert!(refused(&mut guest, &format!("device identify pci:{at}")).contains("in use by another process"));
    assert!(refused(&mut guest, &format!("device unbind {at}")).contains("in use by a program through VFIO"));
    // Pulled out: the kernel asks for it, the program leaves with an error, and the drive is gone.
    Monitor::connect(&socket).ask("{\"execute\":\"device_del\",\"arguments\":{\"id\":\"nv\"}}");
    let said = end_exercise(&mut guest);
    assert!(said.contains("the kernel wants the device back"), "{said}");
    guest.run(&format!("await 60 test ! -e /sys/bus/pci/devices/{at}"));
    assert!(functions(&mut guest).is_empty());
    guest.off();
}

#[test]
fn virtual_functions_get_queues_and_interrupts_and_work() {
    let _turn = guest::turn();
    let folder = Folder::new("virtual");
    let file = folder.drive("drive.img");
    let initrd = Initrd::with_dray_and(&[("held.toml", an_appliance_that_holds().as_bytes())]);
    let machine = with_virtual_functions(Machine::new("vfio-vfs"), "parent", &file).initrd(initrd.path());
    let mut guest = Guest::boot(&machine);
    let physical = drive(&mut guest, "parent");
    let at = address(&physical);
    assert_eq!(physical["virtual_functions_total"], 2, "{physical:#}");
    assert!(refused(&mut guest, &format!("device vfs {at} 3")).contains("can have 2 virtual functions, not 3"));
    let said = good(&mut guest, &format!("device vfs {at} 2"));
    assert_eq!(said.matches("2 queues, 1 interrupts, online").count(), 2, "{said}");
    let physical = drive(&mut guest, "parent");
    let virtual_functions: Vec<String> =
        physical["virtual_functions"].as_array().expect("a list").iter().filter_map(|one| one.as_str().map(str::to_owned)).collect();
    assert_eq!(virtual_functions.len(), 2, "{physical:#}");
    assert!(refused(&mut guest, &format!("device bind {at}")).contains("it has 2 virtual functions"));
    // Both through VFIO, each in its own group, at work.
    for one in &virtual_functions {
        good(&mut guest, &format!("device bind {one}"));
        let identified = json(&good(&mut guest, &format!("device identify pci:{one} --json")));
        assert_eq!(identified["identify_controller"]["sn"], "parent");
    }
    let first = &virtual_functions[0];
    let said = json(&good(&mut guest, &format!("device exercise pci:{first} --nsid 1 --bytes 2MiB --seed 3 --destroys-data --json")));
    assert_eq!(said["verified"], true, "{said:#}");
    // One to the kernel, which makes a disk of it; then none.
    let second = &virtual_functions[1];
    assert!(good(&mut guest, &format!("device unbind {second}")).contains("the driver nvme has it now"));
    assert!(good(&mut guest, &format!("device vfs {at} 0")).contains("no virtual functions"));
    guest.run(&format!("await 60 test ! -e /sys/bus/pci/devices/{first}"));
    assert_eq!(drive(&mut guest, "parent")["virtual_functions"], Value::Array(Vec::new()));
    behind_a_physical_function_of_ours(&mut guest, &at);
    behind_an_appliance(&mut guest, &at);
    guest.off();
}

/// The VF token of those who drive the physical function.
const TOKEN: &str = "83f69257-0c9b-4b4f-a3e9-b4bb1d3c2a55";

/// Where the one drive behind a port is.
const ADDRESS: &str = "0000:01:00.0";
/// What appliances serve.
const NQN: &str = "nqn.2026-11.org.example:held";
/// A namespace of memory.
const MEMORY: &str = "backing = \"memory\"\nsize = \"1MiB\"";

/// The configuration of an appliance that serves these namespaces, and has a drive with these keys.
fn an_appliance(namespaces: [&str; 2], drive: &str, exports: &str) -> String {
    let side = |name: &str, namespace: &str| {
        format!(
            "[[subsystem]]\nname = \"{name}\"\nnqn = \"{NQN}\"\nserial = \"HELD\"\n\
             [[subsystem.namespace]]\nnsid = 1\nnguid = \"000000000000000000000000000000d1\"\n{namespace}\n\
             [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
             [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
        )
    };
    let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
    let ends = side("source", namespaces[0]) + &side("destination", namespaces[1]);
    let device = format!("[[device]]\nname = \"drive\"\npci = \"{ADDRESS}\"\nbind = true\n{drive}");
    format!("[core]\nstate = \"/tmp/held\"\n{ends}{device}{exports}[migration]\nfrom = \"source\"\nto = \"destination\"\n{policies}")
}

/// One that makes the drive two virtual functions, and serves from memory.
fn an_appliance_that_holds() -> String {
    an_appliance([MEMORY; 2], &format!("vf-token = \"{TOKEN}\"\nvirtual-functions = 2\n"), "")
}

/// Starts the appliance and waits until it serves.
fn start_appliance(guest: &mut Guest) {
    guest.run("start run 'dray --config /held.toml run'");
    guest.run("await 120 grep -q ^ready /tmp/run.log");
}

/// The same, and its virtual functions.
fn start_with_functions(guest: &mut Guest) -> Vec<String> {
    start_appliance(guest);
    let status = json(&good(guest, "--config /held.toml status --json"));
    let functions = status["devices"][0]["virtual_functions"].as_array().cloned().unwrap_or_default();
    let whole = |one: &Value| one["queues"] == 2 && one["interrupts"] == 1 && one["online"] == true;
    assert!(functions.len() == 2 && functions.iter().all(whole), "{status:#}");
    functions.iter().map(address).collect()
}

/// What tells two functions at one address from each other: sysfs numbers its folders anew.
fn folder_number(guest: &mut Guest, address: &str) -> String {
    guest.run(&format!("stat -c %i /sys/bus/pci/devices/{address}/"))
}

/// The appliance has the physical function: its virtual functions come and go with it, and nobody who has one is waited for.
fn behind_an_appliance(guest: &mut Guest, at: &str) {
    let functions = start_with_functions(guest);
    let one = &functions[0];
    let said = guest.run("cat /tmp/run.log");
    assert_eq!(said.matches("2 queues, 1 interrupts, online").count(), 2, "{said}");
    assert!(refused(guest, &format!("device identify pci:{one}")).contains("token"));
    let exercise = |seed| format!("device exercise pci:{one} --vf-token {TOKEN} --nsid 1 --bytes 1MiB --seed {seed} --destroys-data --json");
    let said = json(&good(guest, &exercise(5)));
    assert_eq!(said["verified"], true, "{said:#}");
    // Behind somebody's reset of the physical function they are online again.
    guest.run(&format!("echo 1 >/sys/bus/pci/devices/{at}/reset"));
    guest.run("await 60 grep -q 'was reset: its virtual functions are online again' /tmp/run.log");
    let said = json(&good(guest, &exercise(6)));
    assert_eq!(said["verified"], true, "{said:#}");
    // Somebody has one at the end: it stays, and the next appliance goes on with the same.
    guest.run(&format!("start holder \"exec sleep 600 <>/dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{one}/iommu_group))\""));
    let before = folder_number(guest, one);
    guest.run("running holder");
    guest.run("stop --config /held.toml run");
    let said = words(&guest.run("finish run 60"));
    assert!(said.contains("its virtual functions stay") && said.contains(&format!("{one} is in use by a program")), "{said}");
    assert_eq!(start_with_functions(guest), functions);
    assert_eq!(folder_number(guest, one), before, "made anew");
    guest.run("stop sleep 600");
    assert!(guest.step("finish holder", STEP).is_err(), "it was told to end");
    let said = json(&good(guest, &exercise(7)));
    assert_eq!(said["verified"], true, "{said:#}");
    // Nobody has one: they go. vfio-pci had the drive when this appliance came, and keeps it.
    guest.run("stop --config /held.toml run");
    let said = guest.run("finish run 60");
    assert!(said.contains("stopped"), "{said}");
    let physical = drive(guest, "parent");
    assert_eq!((&physical["virtual_functions"], &physical["owner"]), (&Value::Array(Vec::new()), &"vfio-pci".into()), "{physical:#}");
    good(guest, &format!("device unbind {at}"));
    // One that took it itself gives it back.
    start_with_functions(guest);
    guest.run("stop --config /held.toml run");
    guest.run("finish run 60");
    assert_eq!(drive(guest, "parent")["owner"], "nvme");
}

/// The physical function is ours as well, as long as the command runs: its virtual functions open for who knows the token.
fn behind_a_physical_function_of_ours(guest: &mut Guest, at: &str) {
    good(guest, &format!("device bind {at}"));
    assert_eq!(guest.run("cat /sys/module/vfio_pci/parameters/enable_sriov").trim(), "N", "nobody has allowed it yet");
    guest.run(&format!("start vfs 'dray device vfs {at} 2 --vf-token {TOKEN}'"));
    guest.run("await 120 grep -q 'VF token' /tmp/vfs.log");
    let functions: Vec<_> = functions(guest).iter().filter(|one| !one["physical_function"].is_null()).map(address).collect();
    assert_eq!(functions.len(), 2);
    let one = &functions[0];
    for wrong in [String::new(), format!(" --vf-token {}", TOKEN.replace('5', "6"))] {
        let said = refused(guest, &format!("device identify pci:{one}{wrong}"));
        assert!(said.contains("token"), "{said}");
    }
    let exercise = format!("device exercise pci:{one} --vf-token {TOKEN} --nsid 1 --bytes 2MiB --seed 4 --destroys-data --json");
    let said = json(&good(guest, &exercise));
    assert_eq!(said["verified"], true, "{said:#}");
    // They go with it.
    guest.run(&format!("stop device vfs {at}"));
    guest.run("finish vfs 120");
    assert_eq!(drive(guest, "parent")["virtual_functions"], Value::Array(Vec::new()));
    assert!(good(guest, &format!("device unbind {at}")).contains("the driver nvme has it now"));
}

#[test]
fn a_drive_that_somebody_resets_costs_its_guest_no_command() {
    /// Who connects, as `tests/guests/steps.sh` says it.
    const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:d7a10000-0000-4000-8000-000000000001";
    let _turn = guest::turn();
    let folder = Folder::new("reset");
    let file = folder.drive("drive.img");
    let export = format!(
        "[[export]]\nsubsystem = \"source\"\ncontrollers = [2]\nby = \"nvme-tcp\"\nlisten = \"127.0.0.1:4420\"\nhosts = [{{ nqn = \"{HOST}\" }}]\n"
    );
    let config = an_appliance(["backing = \"device\"\ndevice = \"drive\"", MEMORY], "", &export);
    let initrd = Initrd::with_dray_and(&[("held.toml", config.as_bytes())]);
    let machine = Machine::new("vfio-reset").iommu().modules("nvme-tcp").initrd(initrd.path()).qemu(&[
        "-device",
        "pcie-root-port,id=rp,slot=1,chassis=1",
        "-drive",
        &format!("file={},if=none,id=disk,format=raw", file.display()),
        "-device",
        "nvme,id=nv,serial=reset,drive=disk,bus=rp",
    ]);
    let mut guest = Guest::boot(&machine);
    assert_eq!(address(&drive(&mut guest, "reset")), ADDRESS);
    start_appliance(&mut guest);
    guest.run("ip link set lo up");
    guest.run(&format!("connect 127.0.0.1 4420 {NQN}"));
    guest.run(&format!("fabric_disk {NQN}"));
    guest.run("start load 'fio_verified $(disk) 16M 8'");
    // Each under writes, and once more when the one before is over.
    for resets in 1..=2 {
        guest.run("running load");
        guest.run(&format!("echo 1 >/sys/bus/pci/devices/{ADDRESS}/reset"));
        guest.run(&format!("await 60 sh -c \"test \\$(grep -c 'namespace 1 goes on' /tmp/run.log) -ge {resets}\""));
    }
    let said = guest.run("finish load 180");
    assert!(said.contains("fio error 0"), "{said}");
    // Without a guest's commands as well: the next one finds a queue.
    guest.run(&format!("echo 1 >/sys/bus/pci/devices/{ADDRESS}/reset"));
    let said = guest.run("fio_verified $(disk) 1M");
    assert!(said.contains("fio error 0"), "{said}");
    let status = json(&good(&mut guest, "--config /held.toml status --json"));
    let controllers = status["subsystems"][0]["controllers"].as_array().cloned().unwrap_or_default();
    let migratable = controllers.iter().find(|one| one["cntlid"] == 2).unwrap_or_else(|| panic!("{status:#}"));
    assert!(migratable["counters"]["writes"].as_u64().is_some_and(|writes| writes > 1000), "{status:#}");
    guest.run("! dmesg | grep 'I/O error'");
    guest.run(&format!("disconnect {NQN}"));
    guest.run("stop --config /held.toml run");
    guest.run("finish run 60");
    assert_eq!(drive(&mut guest, "reset")["owner"], "nvme");
    guest.off();
}

/// The commands of the block in README's section "On hardware", without their comments.
fn commands_of_the_readme() -> Vec<String> {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("the README");
    let section = readme.split("\n## ").find(|section| section.starts_with("On hardware\n")).expect("its section");
    let lines = section.lines().skip_while(|line| !line.starts_with("    dray ")).map_while(|line| line.strip_prefix("    dray "));
    lines.map(|line| line.split(" #").next().unwrap_or(line).trim().to_owned()).collect()
}

#[test]
fn the_readmes_commands_run_as_they_are_written() {
    let commands = commands_of_the_readme();
    assert!(commands.len() >= 8 && commands.iter().any(|line| line.starts_with("device bind ")), "{commands:?}");
    let _turn = guest::turn();
    let folder = Folder::new("readme");
    let file = folder.drive_of("drive.img", 128 << 20);
    let initrd = Initrd::with_dray();
    // What the README's reader has: a drive with virtual functions, 0000:01:00.0, which the kernel calls nvme0.
    let machine = with_virtual_functions(Machine::new("vfio-readme"), "readme", &file).initrd(initrd.path());
    let mut guest = Guest::boot(&machine);
    guest.run("await 60 test -c /dev/ng0n1");
    assert_eq!(address(&drive(&mut guest, "readme")), "0000:01:00.0");
    for line in &commands {
        let begun = Instant::now();
        let said = good(&mut guest, line);
        eprintln!("dray {line}: {:.1} s\n{said}", begun.elapsed().as_secs_f64());
        assert!(!said.trim().is_empty(), "`dray {line}` says nothing");
    }
    // As it was found, but for what was written.
    assert_eq!(drive(&mut guest, "readme")["owner"], "nvme");
    guest.off();
}
