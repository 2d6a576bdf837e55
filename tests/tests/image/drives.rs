//! Drives of the machine: QEMU's own NVMe controllers, which nobody here wrote, behind an emulated IOMMU. They are looked at through the
//! kernel, taken from it, formatted, tried, served to a host outside, moved from one to another and to a machine outside, pulled out.

use crate::outside::{Host, Target};
use crate::room::{BEGINS, Room, SERVING, STATUS, count, free_port, page, shipped};
use dray_nvme::identify::IdentifyController;
use dray_tests::guest::turn;
use dray_tests::image::{Boot, COMMAND, Image, Machine, SOON};
use dray_tests::image_disk::Disk;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// Bytes of a drive.
const DRIVE: u64 = 32 << 20;
/// How long a migration and its comparison may take under emulation.
const MIGRATION: Duration = Duration::from_secs(180);
/// Where the image serves a drive.
const SERVED: u16 = 4421;

fn drive(room: &Room, name: &str) -> PathBuf {
    let path = room.folder().join(format!("{name}.img"));
    File::create(&path).and_then(|file| file.set_len(DRIVE)).expect("a drive");
    path
}

/// A configuration over two namespaces of devices.
fn config(state: &str, devices: &str, namespaces: [&str; 2], more: &str) -> String {
    let side = |name: &str, device: &str| {
        format!(
            "[[subsystem]]\nname = \"{name}\"\nnqn = \"nqn.2026-11.org.example:drives\"\nserial = \"DRIVES\"\n\
             [[subsystem.namespace]]\nnsid = 1\nnguid = \"000000000000000000000000000000e1\"\n{device}\n\
             [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
             [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
        )
    };
    let policies: String = ["cdq", "tracking", "copy"]
        .map(|role| format!("[policy.{role}]\ncomponent = \"plugins/{role}-default.wasm\"\nbudget = \"5s\"\n"))
        .concat();
    let [from, to] = [side("source", namespaces[0]), side("destination", namespaces[1])];
    format!(
        "[core]\nstate = \"/state/{state}\"\ncompiled = \"compiled\"\n{devices}{from}{to}{more}\
         [migration]\nfrom = \"source\"\nto = \"destination\"\ndowntime = \"20s\"\n\
         [guest]\nwrites-per-second = 100\nqueue-depth = 2\n{policies}"
    )
}

fn physical(name: &str, address: &str) -> String {
    format!("[[device]]\nname = \"{name}\"\npci = \"{address}\"\nbind = true\n")
}

fn of(device: &str) -> String {
    format!("backing = \"device\"\ndevice = \"{device}\"")
}

fn json(said: &str) -> Value {
    let from = said.find('{').unwrap_or(0);
    serde_json::from_str(&said[from..]).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// The function of the drive with that serial number.
#[track_caller]
fn function(image: &mut Image, serial: &str) -> Value {
    let said = json(&image.run("device list --json"));
    let found = said["pci"].as_array().and_then(|all| all.iter().find(|one| one["serial"] == serial).cloned());
    found.unwrap_or_else(|| panic!("{}", image.story(&format!("no drive {serial}: {said:#}"))))
}

fn address(function: &Value) -> String {
    function["address"].as_str().expect("an address").to_owned()
}

/// The bytes of a hexadecimal dump.
fn dumped(said: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in said.lines() {
        let Some((at, rest)) = line.trim_start().split_once(": ") else { continue };
        if at.len() < 4 || usize::from_str_radix(at, 16) != Ok(bytes.len()) {
            continue;
        }
        let words = rest.split_whitespace().take(16).map_while(|word| u8::from_str_radix(word, 16).ok().filter(|_| word.len() == 2));
        bytes.extend(words);
    }
    bytes
}

/// Blocks of 512 bytes of a drive's file that say where they belong.
fn blocks_in_place(file: &Path) -> u64 {
    let file = File::open(file).expect("the drive");
    let mut word = [0; 8];
    let in_place = |lba: &u64| file.read_exact_at(&mut word, lba * 512).is_ok() && u64::from_le_bytes(word) == *lba && *lba != 0;
    (0..DRIVE / 512).filter(in_place).count() as u64
}

/// A demo on a configuration of the configuration's partition: its verdict must be good; the summary.
#[track_caller]
fn demo(image: &mut Image, words: &str) -> Value {
    let (code, said) = image.command(words, MIGRATION);
    assert!(code == 0, "{}", image.story(&format!("`{words}` ended with {code}:\n{said}")));
    let line = said.lines().rfind(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no summary:\n{said}"));
    let summary: Value = serde_json::from_str(line).expect("a summary");
    assert_eq!((&summary["verdict"], &summary["blocks_different"]), (&"ok".into(), &0.into()), "{summary:#}");
    assert_eq!((&summary["outcome"], &summary["blocks_compared"]), (&"done".into(), &(DRIVE / 4096).into()), "{summary:#}");
    assert!(summary["writes_acknowledged"].as_u64() > Some(0), "{summary:#}");
    summary
}

/// Blocks of 4,096 bytes that two drives do not have in common.
fn different(one: &Path, other: &Path) -> u64 {
    let [one, other] = [one, other].map(|path| std::fs::read(path).expect("a drive"));
    one.chunks(4096).zip(other.chunks(4096)).filter(|(one, other)| one != other).count() as u64
}

/// Through the kernel: what it shows of the drive, a block there and back, a command that the drive does not know.
fn through_the_kernel(image: &mut Image, function: &Value, file: &Path) -> Vec<u8> {
    let block = function["block_devices"][0]["name"].as_str().expect("a block device");
    let (controller, _) = block.rsplit_once('n').expect("a namespace");
    let character = block.replacen("nvme", "ng", 1);
    let identify = dumped(&image.run(&format!("passthru /dev/{controller} --admin --opcode 6 --cdw10 1 --data-len 4KiB")));
    assert_eq!(identify.len(), 4096);
    // The block was put beside the configuration.
    image.run(&format!("passthru /dev/{character} --opcode 1 --cdw10 8 --cdw12 0 --data-len 512 --input /config/block.bin"));
    let read = dumped(&image.run(&format!("passthru /dev/{character} --opcode 2 --cdw10 8 --cdw12 0 --data-len 512")));
    let mut on_drive = vec![0; 512];
    File::open(file).and_then(|file| file.read_exact_at(&mut on_drive, 8 * 512)).expect("the drive's file");
    assert!(read == block_contents() && on_drive == read, "{read:02x?}\n{on_drive:02x?}");
    let (code, said) = image.command(&format!("passthru /dev/{character} --opcode 0xc3"), COMMAND);
    assert!(code == 1 && said.contains("Invalid Command Opcode"), "{code}: {said}");
    identify
}

fn block_contents() -> Vec<u8> {
    (0..512u32).map(|at| (at * 7 + at / 256) as u8).collect()
}

/// Through VFIO: the same controller says the same; formatted, written, verified. The address.
fn through_vfio(image: &mut Image, at: &str, file: &Path, identify: &[u8]) {
    image.run(&format!("device bind {at}"));
    let seen = json(&image.run(&format!("device identify pci:{at} --json")));
    let seen = &seen["identify_controller"];
    let by_kernel = IdentifyController::read_from_bytes(identify).expect("a structure");
    let text = |key: &str| seen[key].as_str().unwrap_or_default().to_owned();
    let theirs = [by_kernel.serial(), by_kernel.model(), by_kernel.firmware()].map(|text| text.unwrap_or_default().to_owned());
    assert_eq!([text("sn"), text("mn"), text("fr")], theirs, "{seen:#}");
    assert_eq!((&seen["mdts"], &seen["nn"]), (&by_kernel.mdts.into(), &by_kernel.nn.into()), "{seen:#}");
    image.run(&format!("device format pci:{at} --nsid 1 --destroys-data"));
    let (code, said) = image.command(
        &format!("device exercise pci:{at} --nsid 1 --bytes 8MiB --seed 7 --destroys-data --json"),
        MIGRATION,
    );
    let said = json(&said);
    assert!(code == 0 && said["verified"] == true && said["differing"] == 0, "{said:#}");
    let blocks = said["blocks"].as_u64().expect("blocks");
    assert!(blocks > 8192 && blocks_in_place(file) >= blocks - 1, "{} of {blocks} blocks are on the drive", blocks_in_place(file));
}

#[test]
fn drives_are_taken_tried_moved_served_and_pulled_out() {
    let _turn = turn();
    let room = Room::new("drives");
    let names = ["one", "two", "three"];
    let files = names.map(|name| drive(&room, name));
    let target = Target::start(room.folder(), DRIVE);
    let disk = room.disk(&shipped());
    // Where the firmware puts functions behind ports of their own is looked at below.
    let at = ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"];
    let [two, three] = [physical("two", at[1]), physical("three", at[2])];
    // Both functions see the same memory at the same addresses.
    let pair = [&two, &three].map(|device| format!("{device}space = \"pair\"\n"));
    let local = config("local", &pair.concat(), [&of("two"), &of("three")], "");
    let far = config("far", &[&three[..], &target.device("10.0.2.2")].concat(), [&of("three"), &of("far")], "");
    for (name, text) in [("local.toml", &local), ("far.toml", &far)] {
        disk.put("DRAY-CONFIG", name, text.as_bytes());
    }
    disk.put("DRAY-CONFIG", "block.bin", &block_contents());
    let (mut machine, _) = room.machine("drives", &disk);
    for (name, file) in names.iter().zip(&files) {
        machine = machine.drive(name, file);
    }
    let mut image = Image::boot(&machine, SERVING);
    let found = names.map(|name| function(&mut image, name));
    assert_eq!(found.each_ref().map(address), at, "{found:#?}");
    let identify = through_the_kernel(&mut image, &found[0], &files[0]);
    through_vfio(&mut image, at[0], &files[0], &identify);
    // From one drive to another.
    let summary = demo(&mut image, "demo --config /config/local.toml --destroys-data --settle 500 --json");
    let after = summary["blocks_written_after"].as_u64().expect("a number");
    assert!(different(&files[1], &files[2]) <= after, "{summary:#}");
    // From there to a machine outside, by NVMe/TCP.
    let summary = demo(&mut image, "demo --config /config/far.toml --destroys-data --settle 500 --json");
    let after = summary["blocks_written_after"].as_u64().expect("a number");
    assert!(different(&files[2], &target.file()) <= after, "{summary:#}");
    let log = image.press_power();
    assert_eq!((count(&log, BEGINS), count(&log, "power off")), (1, 1), "{log:#?}");
    check(&disk);
    served_to_a_host(&room, &disk, &files);
}

/// The appliance serves the drive to a host outside, which finds what was written inside; then the drive is pulled out.
fn served_to_a_host(room: &Room, disk: &Disk, files: &[PathBuf; 3]) {
    disk.put("DRAY-CONFIG", "appliance.toml", serving_drives().as_bytes());
    let (served, status) = (free_port(), free_port());
    let boot = Boot::Direct { words: String::new(), disk: Some(disk.path().into()) };
    let machine = Machine::new("served", room.folder(), boot).forward(status, STATUS).forward(served, SERVED);
    let image = Image::boot(&machine.drive("one", &files[0]).drive("two", &files[1]), SERVING);
    let mut host = Host::connect(served, SOON).unwrap_or_else(|why| panic!("{}", image.story(&why)));
    assert_eq!(host.bytes(), DRIVE);
    let (mut in_place, on_drive) = (0, std::fs::read(&files[0]).expect("the drive"));
    for first in (0..DRIVE).step_by(64 << 10) {
        let read = host.read(first / 512, 128).unwrap_or_else(|why| panic!("{}", image.story(&why)));
        assert!(read == on_drive[first as usize..][..64 << 10], "bytes from {first}");
        in_place += read.chunks(512).zip(first / 512..).filter(|(block, lba)| block[..8] == lba.to_le_bytes()).count();
    }
    assert!(in_place > 8192, "{in_place} blocks say where they belong");
    // Pulled out while the host reads: it gets an error, and the appliance goes on.
    image.unplug("one");
    let end = Instant::now() + SOON;
    let why = loop {
        match host.read(0, 8) {
            Ok(_) => assert!(Instant::now() < end, "{}", image.story("the drive is still read")),
            Err(why) => break why,
        }
    };
    assert!(why.contains("Internal Error") || why.contains("SC 06h"), "{why}");
    // The kernel gets it back, from a process that goes on.
    let end = Instant::now() + SOON;
    while image.qmp("{\"execute\":\"qom-list\",\"arguments\":{\"path\":\"/machine/peripheral\"}}").contains("\"one\"") {
        assert!(Instant::now() < end, "{}", image.story("the drive is not let go"));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(host.read(0, 8).is_err_and(|why| why.contains("unknown: false")));
    page(&image, status, "serving");
    let log = image.press_power();
    assert_eq!((count(&log, BEGINS), count(&log, "power off")), (1, 1), "{log:#?}");
    check(disk);
}

fn check(disk: &Disk) {
    if let Err(said) = disk.check_state() {
        panic!("the state was not unmounted:\n{said}");
    }
}

/// What a host wrote to a block: its number so many times.
fn written(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(64)
}

/// Blocks that a host writes again and again, all over the drive, and how far it is with each.
struct Ledger {
    /// LBA, number of the last write that was sent, number of the last that was acknowledged.
    blocks: Vec<(u64, u64, u64)>,
    next: u64,
}

impl Ledger {
    fn new() -> Self {
        Self { blocks: (0..64).map(|nth| (nth * (DRIVE / 512 / 64) + nth % 7, 0, 0)).collect(), next: 1 }
    }

    /// One more write; false when it was not acknowledged.
    fn write(&mut self, host: &mut Host) -> bool {
        let number = self.next;
        self.next += 1;
        let nth = (number % self.blocks.len() as u64) as usize;
        self.blocks[nth].1 = number;
        if host.write(self.blocks[nth].0, &written(number)).is_err() {
            return false;
        }
        self.blocks[nth].2 = number;
        true
    }

    /// Each block has a write that is no older than the last one that was acknowledged.
    #[track_caller]
    fn check(&self, host: &mut Host, image: &Image) {
        for &(lba, sent, acknowledged) in self.blocks.iter().filter(|(_, _, acknowledged)| *acknowledged > 0) {
            let found = host.read(lba, 1).unwrap_or_else(|why| panic!("{}", image.story(&why)));
            let number = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
            let range = acknowledged..=sent;
            assert!(range.contains(&number) && found == written(number), "block {lba}: {number}, and not one of {range:?}");
        }
    }
}

/// The configuration of an image that serves one drive and can move it to the other.
fn serving_drives() -> String {
    let image = shipped();
    let image = &image[..image.find("[core]").expect("the table behind [image]")];
    let devices = [physical("one", "0000:01:00.0"), physical("two", "0000:02:00.0")].concat();
    format!("{image}{}", config("dray", &devices, [&of("one"), &of("two")], &Host::export(SERVED)))
}

#[test]
fn a_power_cut_during_a_migration_is_resumed_or_undone_and_nothing_is_lost() {
    let _turn = turn();
    let room = Room::new("cut");
    let files = ["one", "two"].map(|name| drive(&room, name));
    let noise: Vec<u8> = (0..DRIVE).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1).collect();
    std::fs::write(&files[0], &noise).expect("the drive's contents");
    let disk = room.disk(&serving_drives());
    let (served, status) = (free_port(), free_port());
    let boot = Boot::Direct { words: String::new(), disk: Some(disk.path().into()) };
    let machine = Machine::new("cut", room.folder(), boot).forward(status, STATUS).forward(served, SERVED);
    let machine = machine.drive("one", &files[0]).drive("two", &files[1]);
    let mut image = Image::boot(&machine, SERVING);
    let mut host = Host::connect(served, SOON).unwrap_or_else(|why| panic!("{}", image.story(&why)));
    let mut ledger = Ledger::new();
    for _ in 0..200 {
        assert!(ledger.write(&mut host), "{}", image.story("a write fails"));
    }
    ledger.check(&mut host, &image);
    image.tell("migrate source --to destination");
    // It copies when something is on the other drive, which was empty. The host writes on, and does not know when the power goes.
    let (file, mut block) = (File::open(&files[1]).expect("the drive"), [0; 4096]);
    let end = Instant::now() + MIGRATION;
    while !(0..DRIVE / 4096).step_by(64).any(|at| file.read_exact_at(&mut block, at * 4096).is_ok() && block != [0; 4096]) {
        assert!(Instant::now() < end && ledger.write(&mut host), "{}", image.story("nothing is copied"));
    }
    image.kill();
    drop(host);
    let mut image = Image::boot(&machine, SERVING);
    let mut host = Host::connect(served, SOON).unwrap_or_else(|why| panic!("{}", image.story(&why)));
    ledger.check(&mut host, &image);
    let found = json(&image.run("status --json"));
    eprintln!("after the power cut: {}", found["records"]);
    if found["migration"]["serving"] == "source" {
        let (code, said) = image.command("migrate source --to destination", MIGRATION);
        assert!(code == 0, "{}", image.story(&format!("the migration ended with {code}: {said}")));
    }
    ledger.check(&mut host, &image);
    drop(host);
    let log = image.off();
    assert_eq!(count(&log, "power off"), 1, "{log:#?}");
    check(&disk);
    assert_eq!(different(&files[0], &files[1]), 0);
}
