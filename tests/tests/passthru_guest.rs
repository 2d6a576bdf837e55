//! io_uring passthrough against QEMU's own NVMe controller in a guest with a stock kernel: `dray passthru` as an operator types it,
//! compared with nvme-cli, and the queues of the driver from inside (this very test, run in the guest).
#![allow(missing_docs)]

use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{Arena, DmaBuffer, Pages, Segment};
use dray_device::poll::Time;
use dray_driver::passthru::{PassthruConfig, PassthruDevice, PassthruError, PassthruQueue, Use, node};
use dray_nvme::command::{Fuse, SubmissionEntry};
use dray_nvme::status::Status;
use dray_tests::dray_in_guest::Initrd;
use dray_tests::guest::{Guest, Machine, STEP, Trouble, turn};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The driver's part in the guest.
const INSIDE: &str = "this-test --ignored --exact --nocapture inside";

struct Files(Vec<PathBuf>);

impl Files {
    fn disk(&mut self, name: &str, mib: u64) -> String {
        let path = std::env::temp_dir().join(format!("dray-passthru-{}-{name}.img", std::process::id()));
        std::fs::File::create(&path).and_then(|file| file.set_len(mib << 20)).expect("a file");
        let shown = path.display().to_string();
        self.0.push(path);
        shown
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in &self.0 {
            let _gone = std::fs::remove_file(file);
        }
    }
}

/// A controller with a namespace of 64 MiB, and one of 16 MiB whose blocks have 8 bytes of metadata in a buffer of their own.
#[test]
fn commands_pass_through_a_stock_kernel_to_a_drive_that_is_not_ours() {
    let _turn = turn();
    let initrd = Initrd::with_dray_and_this_test();
    let mut files = Files(Vec::new());
    let drive = |file: String, id: &str| format!("file={file},if=none,id={id},format=raw");
    let (plain, tagged) = (drive(files.disk("plain", 64), "plain"), drive(files.disk("tagged", 16), "tagged"));
    let machine = Machine::new("passthru").initrd(initrd.path()).kernel("nvme.poll_queues=1").qemu(&[
        "-drive", &plain, "-drive", &tagged, "-device", "nvme,id=ctrl,serial=passthru", "-device", "nvme-ns,bus=ctrl,drive=plain,nsid=1",
        "-device", "nvme-ns,bus=ctrl,drive=tagged,nsid=2,ms=8",
    ]);
    let mut guest = Drive::boot(&machine);
    identify_is_what_nvme_cli_reads(&mut guest);
    what_is_written_is_read(&mut guest);
    metadata_has_a_buffer_of_its_own(&mut guest);
    statuses_are_shown(&mut guest);
    wrong_devices_are_named(&mut guest);
    what_is_mounted_is_not_changed(&mut guest);
    eprint!("{}", guest.run(&format!("DRAY_INSIDE=queues {INSIDE}")));
    the_drive_goes_during_io(&mut guest);
    guest.guest.off();
}

/// The guest and the names that its kernel has given to the namespaces: in the order in which it found them, so that they say
/// nothing of their NSIDs. In steps and expectations PLAIN and TAGGED stand for the character devices, BLOCK for the block device.
struct Drive {
    guest: Guest,
    plain: String,
    tagged: String,
}

impl Drive {
    fn boot(machine: &Machine) -> Self {
        let mut guest = Guest::boot(machine);
        guest.run("await 60 test -c /dev/ng0n2");
        let first = guest.run("nvme get-ns-id /dev/ng0n1");
        let names = if first.contains("namespace-id:1") { ["ng0n1", "ng0n2"] } else { ["ng0n2", "ng0n1"] };
        let [plain, tagged] = names.map(ToOwned::to_owned);
        eprintln!("namespace 1 is {plain}, namespace 2 is {tagged}");
        Self { guest, plain, tagged }
    }

    fn named(&self, step: &str) -> String {
        let block = self.plain.replace("ng", "nvme");
        step.replace("PLAIN", &self.plain).replace("TAGGED", &self.tagged).replace("BLOCK", &block)
    }

    #[track_caller]
    fn run(&mut self, step: &str) -> String {
        let step = self.named(step);
        self.guest.run(&step)
    }
}

/// A step that ends with that exit code; what it printed.
#[track_caller]
fn fails(guest: &mut Drive, step: &str, code: i32) -> String {
    let step = guest.named(step);
    match guest.guest.step(&step, STEP) {
        Err(Trouble::Failed(ended, said)) if ended == code => said,
        other => panic!("`{step}`: {other:?}, and not exit code {code}"),
    }
}

#[track_caller]
fn has(guest: &Drive, said: &str, wanted: &[&str]) {
    wanted.iter().for_each(|wanted| assert!(said.contains(&guest.named(wanted)), "{wanted:?} is not in\n{said}"));
}

fn identify_is_what_nvme_cli_reads(guest: &mut Drive) {
    guest.run("nvme id-ctrl /dev/nvme0 --raw-binary >/tmp/theirs; nvme id-ns /dev/PLAIN --raw-binary >/tmp/their-namespace");
    for device in ["nvme0", "PLAIN"] {
        guest.run(&format!("dray passthru /dev/{device} --admin --opcode 0x06 --cdw10 1 --data-len 4KiB --raw >/tmp/ours"));
        guest.run("test $(wc -c </tmp/ours) = 4096; cmp /tmp/ours /tmp/theirs");
    }
    guest.run("dray passthru /dev/nvme0 --admin --opcode 6 --nsid 1 --data-len 0x1000 --output /tmp/ours; cmp /tmp/ours /tmp/their-namespace");
    let said = guest.run("dray passthru /dev/nvme0 --admin --opcode 6 --cdw10 1 --data-len 4096");
    has(guest, &said, &["admin command 06h (Identify)", "status  0000h  Successful Completion", "data: 4096 bytes", "passthru"]);
    // The dump is nvme-cli's, line for line.
    guest.run("dray passthru /dev/nvme0 --admin --opcode 6 --cdw10 1 --data-len 4096 | grep '^[0-9a-f]*: ' >/tmp/ours");
    guest.run("nvme admin-passthru /dev/nvme0 --opcode=6 --cdw10=1 --data-len=4096 -r 2>&1 | grep '^[0-9a-f]*: ' >/tmp/theirs");
    guest.run("cmp /tmp/ours /tmp/theirs");
    // A result without data: Number of Queues.
    let said = guest.run("dray passthru /dev/nvme0 --admin --opcode 0x0a --cdw10 7 --json");
    let json: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let theirs = guest.run("nvme get-feature /dev/nvme0 -f 7");
    let value = format!("{:#010x}", json["result"].as_u64().expect("a result"));
    assert!(theirs.to_lowercase().contains(&value) && json["result"] != 0, "{value} is not in {theirs}");
    assert_eq!((&json["outcome"], &json["status"]["field"]), (&"answered".into(), &0.into()));
}

fn what_is_written_is_read(guest: &mut Drive) {
    guest.run("dd if=/dev/urandom of=/tmp/out bs=4k count=16 2>/dev/null");
    guest.run("dray passthru /dev/PLAIN --opcode 0x01 --cdw10 256 --cdw12 127 --input /tmp/out");
    guest.run("dray passthru /dev/PLAIN --opcode 0x02 --cdw10 256 --cdw12 127 --data-len 64KiB --output /tmp/in; cmp /tmp/in /tmp/out");
    guest.run("dd if=/dev/BLOCK of=/tmp/in bs=4k skip=32 count=16 iflag=direct 2>/dev/null; cmp /tmp/in /tmp/out");
    guest.run("nvme io-passthru /dev/PLAIN --opcode=2 --namespace-id=1 --cdw10=256 --cdw12=127 --data-len=65536 -r -b >/tmp/in");
    guest.run("cmp /tmp/in /tmp/out");
    guest.run("dray passthru /dev/PLAIN --opcode 0 --json | grep -q '\"command\": \"Flush\"'");
    guest.run("dray passthru /dev/PLAIN --opcode 1 --cdw10 256 --cdw12 127 --input - </tmp/out");
}

fn metadata_has_a_buffer_of_its_own(guest: &mut Drive) {
    guest.run("dd if=/dev/urandom of=/tmp/tags bs=32 count=1 2>/dev/null; dd if=/dev/urandom of=/tmp/out bs=2k count=1 2>/dev/null");
    guest.run("dray passthru /dev/TAGGED --opcode 1 --cdw10 8 --cdw12 3 --input /tmp/out --metadata-input /tmp/tags");
    guest.run(
        "dray passthru /dev/TAGGED --opcode 2 --cdw10 8 --cdw12 3 --data-len 2KiB --metadata-len 32 --output /tmp/in \
         --metadata-output /tmp/tags-in",
    );
    guest.run("cmp /tmp/in /tmp/out; cmp /tmp/tags-in /tmp/tags");
}

fn statuses_are_shown(guest: &mut Drive) {
    let said = fails(guest, "dray passthru /dev/PLAIN --opcode 0xc0", 1);
    has(guest, &said, &["I/O command C0h (vendor specific), NSID 1", "status  4001h  Invalid Command Opcode (SCT 0h, SC 01h, DNR)"]);
    let said = fails(guest, "dray passthru /dev/nvme0 --admin --opcode 0xc2 --data-len 16 --json", 1);
    let json: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((&json["status"]["sc"], &json["status"]["dnr"], &json["data"]), (&1.into(), &true.into(), &serde_json::Value::Null));
    let said = fails(guest, "dray passthru /dev/PLAIN --opcode 2 --cdw11 1 --data-len 512", 1);
    has(guest, &said, &["LBA Out of Range (SCT 0h, SC 80h"]);
    // The kernel's refusals are not the drive's.
    let said = fails(guest, "dray passthru /dev/PLAIN --opcode 2 --nsid 2 --data-len 512", 2);
    has(guest, &said, &["not sent", "malformed"]);
}

fn wrong_devices_are_named(guest: &mut Drive) {
    for (device, wanted) in [
        ("/dev/BLOCK", ["block device", "/dev/PLAIN"]),
        ("/dev/nvme0", ["is a controller", "--admin"]),
        ("/dev/ng9n9", ["no such device", "/dev/ng0n1, /dev/ng0n2"]),
        ("/dev/ttyS0", ["no NVMe device", "/dev/nvme0"]),
    ] {
        // Messages are broken into lines where they like.
        let said = fails(guest, &format!("dray passthru {device} --opcode 2 --data-len 512 2>&1 | tr -s ' \\n│' ' '"), 2);
        has(guest, &said, &wanted);
    }
    guest.run("mkdir -p /etc; echo 'someone:x:1000:1000::/:/bin/sh' >/etc/passwd");
    let said = fails(guest, "su someone -c 'dray passthru /dev/PLAIN --opcode 2 --data-len 512' 2>&1 | tr -s ' \\n│' ' '", 2);
    has(guest, &said, &["no permission", "CAP_SYS_ADMIN"]);
    guest.run("echo 2 >/proc/sys/kernel/io_uring_disabled");
    let said = fails(guest, "dray passthru /dev/PLAIN --opcode 2 --data-len 512 2>&1 | tr -s ' \\n│' ' '", 2);
    has(guest, &said, &["sysctl kernel.io_uring_disabled=0"]);
    guest.run("echo 0 >/proc/sys/kernel/io_uring_disabled");
    fails(guest, "dray passthru /dev/PLAIN --opcode 0x100", 2);
    let said = fails(guest, "dray passthru /dev/nvme0 --admin --opcode 0x0c", 2);
    has(guest, &said, &["the kernel's alone"]);
}

fn what_is_mounted_is_not_changed(guest: &mut Drive) {
    for step in ["echo /dev/BLOCK >/tmp/disk", "mkfs", "mounted", "echo kept >/mnt/file", "sync"] {
        guest.run(step);
    }
    guest.run("dray passthru /dev/PLAIN --opcode 2 --cdw12 7 --data-len 4KiB --output /tmp/first");
    let said = fails(guest, "dray passthru /dev/PLAIN --opcode 1 --cdw12 7 --input /tmp/first", 2);
    has(guest, &said, &["Write would change what is in use: BLOCK is mounted at /mnt", "--force"]);
    let said = fails(guest, "dray passthru /dev/nvme0 --admin --opcode 0x80 --nsid 1", 2);
    has(guest, &said, &["Format NVM would change", "/mnt"]);
    guest.run("dray passthru /dev/PLAIN --opcode 1 --cdw12 7 --input /tmp/first --force");
    guest.run("unmounted");
    guest.run("fsck");
    guest.run("dray passthru /dev/PLAIN --opcode 1 --cdw12 7 --input /tmp/first");
}

fn the_drive_goes_during_io(guest: &mut Drive) {
    guest.run(&format!("start load 'DRAY_INSIDE=until-gone {INSIDE}'"));
    guest.run("await 60 grep -q DRAY-UNDER-WAY /tmp/load.log");
    guest.run("echo 1 >$(readlink -f /sys/class/nvme/nvme0/device)/remove");
    let said = guest.run("finish load");
    has(guest, &said, &["DRAY-GONE"]);
    eprint!("{said}");
    let said = fails(guest, "dray passthru /dev/PLAIN --opcode 2 --data-len 512", 2);
    has(guest, &said, &["no such device"]);
}

/// What runs in the guest.
#[test]
#[ignore = "runs in the guest of the test above"]
fn inside() {
    match std::env::var("DRAY_INSIDE").as_deref() {
        Ok("queues") => queues_of_each_kind(),
        Ok("until-gone") => {
            let path = namespace_one();
            writes_until_the_queue_is_dead();
            let gone = PassthruQueue::open(&path, &PassthruConfig::default());
            assert!(matches!(gone, Err(PassthruError::NoSuchDevice { .. })), "{gone:?}");
        }
        other => panic!("DRAY_INSIDE is {other:?}: this runs in a guest"),
    }
}

/// The device of namespace 1.
fn namespace_one() -> PathBuf {
    node::namespace_device(Path::new("/dev/nvme0"), 1).expect("a namespace")
}

fn now(start: Instant) -> Time {
    Time(start.elapsed().as_nanos() as u64)
}

/// Polls until `count` have ended.
fn ended(queue: &mut PassthruQueue, count: usize) -> Vec<Completion> {
    let (start, mut all) = (Instant::now(), Vec::new());
    queue.commit();
    while all.len() < count {
        queue.poll(now(start), &mut |completion| all.push(completion));
        assert!(start.elapsed() < Duration::from_secs(60), "{} of {count} have ended", all.len());
    }
    all
}

fn good(completion: &Completion) {
    assert!(!completion.unknown && !completion.status.is_error(), "{completion:?}");
}

fn queues_of_each_kind() {
    let controller = Path::new("/dev/nvme0");
    let other = node::namespace_device(controller, 2).expect("a namespace");
    assert_ne!(other, namespace_one());
    assert_eq!(PassthruDevice::open(&other, &PassthruConfig::default()).expect("a device").about().metadata_bytes, 8);
    assert!(matches!(node::namespace_device(controller, 3), Err(PassthruError::NoNamespace { nsid: 3, .. })));
    let plain = PassthruConfig { depth: 32, fixed: false, ..PassthruConfig::default() };
    let fixed = PassthruConfig { fixed: true, ..plain };
    for (name, config) in [("plain", plain), ("fixed", fixed), ("iopoll", PassthruConfig { iopoll: true, ..fixed })] {
        let device = PassthruDevice::open(&namespace_one(), &config).expect("a device");
        let about = device.about();
        assert_eq!((about.nsid, about.block_bytes, about.blocks), (1, 512, 131_072));
        let mut queues = device.queues(0).expect("queues");
        println!("{name}: {} queues, {:?}, fixed {:?}, iopoll {:?}", queues.len(), queues[0].limits(), queues[0].fixed(), queues[0].iopoll());
        assert_eq!(queues.len(), 2, "one for each processor");
        assert_eq!(queues[0].iopoll(), if config.iopoll { Use::Used } else { Use::NotAsked });
        for (at, queue) in queues.iter_mut().enumerate() {
            one_queue(queue, at as u64 * 16_384, config.fixed);
        }
    }
}

fn one_queue(queue: &mut PassthruQueue, first: u64, registered: bool) {
    let buffer = DmaBuffer::allocate("inside", 2 << 20, Pages::Small).expect("memory");
    assert_eq!(queue.register(buffer.arena()), registered);
    let part = |offset: usize, len| buffer.part(offset, len).expect("part");
    (0..1 << 20).step_by(8).for_each(|at| buffer.arena().store64(at, (at as u64) << 20 | first, std::sync::atomic::Ordering::Relaxed));
    // One piece, pieces behind each other, and pieces apart; whole pages or not.
    let shapes: [&dyn Fn(usize) -> Vec<(usize, usize)>; 3] = [
        &|at| vec![(at, 4096)],
        &|at| vec![(at, 512), (at + 512, 3584)],
        &|at| vec![(at, 1024), (at + 1024, 512), (at + 1536, 2560)],
    ];
    for (write, base) in [(true, 0), (false, 1 << 20)] {
        for round in 0..8u64 {
            for slot in 0..32u64 {
                let chunk = round * 32 + slot;
                let shape = shapes[(slot % 3) as usize](base + chunk as usize * 4096);
                let pieces: Vec<Segment<'_>> = shape.into_iter().map(|(offset, len)| part(offset, len)).collect();
                let (slba, nlb) = (first + chunk * 8, 8);
                let entry = if write { SubmissionEntry::write(1, slba, nlb) } else { SubmissionEntry::read(1, slba, nlb) };
                queue.submit(Time(0), &entry, &pieces, chunk).expect("room");
            }
            assert_eq!(queue.submit(Time(0), &SubmissionEntry::flush(1), &[], 0), Err(SubmitError::Full));
            let all = ended(queue, 32);
            all.iter().for_each(good);
            assert_eq!(all.iter().map(|c| c.tag).collect::<BTreeSet<_>>().len(), 32, "each once");
        }
    }
    assert!(Arena::equal(buffer.arena(), 0, buffer.arena(), 1 << 20, 1 << 20), "what was written is read");
    if registered {
        assert_eq!(queue.fixed(), Use::Used, "the kernel took registered memory");
    }
    scattered_and_large(queue, &buffer, first);
    let limits = queue.limits();
    let read = SubmissionEntry::read(1, 0, 1);
    let too_much = [part(0, limits.max_transfer), part(1 << 20, 512)];
    assert_eq!(queue.submit(Time(0), &read, &too_much, 1), Err(SubmitError::BadData));
    assert_eq!(queue.submit(Time(0), &read.with_fuse(Fuse::FIRST), &[part(0, 512)], 1), Err(SubmitError::BadData));
    // Refused by the drive; refused by the kernel; still alive.
    queue.submit(Time(0), &SubmissionEntry::read(1, 1 << 40, 1), &[part(0, 512)], 1).expect("room");
    assert!(ended(queue, 1)[0].status.is(Status::LBA_OUT_OF_RANGE));
    queue.submit(Time(0), &SubmissionEntry::read(9, 0, 1), &[part(0, 512)], 1).expect("room");
    assert_eq!((ended(queue, 1)[0].status.code(), queue.is_dead()), (Status::HOST_PATHING_ERROR, false));
}

/// As much as one command takes, in one piece and in pieces far from each other.
fn scattered_and_large(queue: &mut PassthruQueue, buffer: &DmaBuffer, first: u64) {
    let most = queue.limits().max_transfer.min(1 << 20);
    let whole = buffer.part(0, most).expect("part");
    buffer.arena().fill(1 << 20, 1 << 20, 0);
    queue.submit(Time(0), &SubmissionEntry::write(1, first, (most / 512) as u32), &[whole], 7).expect("room");
    good(&ended(queue, 1)[0]);
    let pages: Vec<_> = (0..64).map(|at| buffer.part((1 << 20) + at * 8192, 4096).expect("part")).collect();
    queue.submit(Time(0), &SubmissionEntry::read(1, first, 512), &pages, 8).expect("room");
    good(&ended(queue, 1)[0]);
    for at in 0..64 {
        assert!(Arena::equal(buffer.arena(), at * 4096, buffer.arena(), (1 << 20) + at * 8192, 4096), "page {at}");
    }
    queue.submit(Time(0), &SubmissionEntry::flush(1), &[], 9).expect("room");
    good(&ended(queue, 1)[0]);
}

fn writes_until_the_queue_is_dead() {
    let config = PassthruConfig { depth: 32, ..PassthruConfig::default() };
    let mut queue = PassthruQueue::open(&namespace_one(), &config).expect("a queue");
    let buffer = DmaBuffer::allocate("inside", 64 << 10, Pages::Small).expect("memory");
    let (start, mut tag, mut under_way) = (Instant::now(), 0, BTreeSet::new());
    let (mut well, mut refused, mut unknown, mut told) = (0u64, 0u64, 0u64, false);
    while !(queue.is_dead() && under_way.is_empty()) {
        assert!(start.elapsed() < Duration::from_secs(150), "the queue lives on, or does not end: {under_way:?}");
        while queue.free() > 0 && queue.submit(now(start), &SubmissionEntry::write(1, tag % 1000 * 128, 128), &[buffer.segment()], tag).is_ok() {
            under_way.insert(tag);
            tag += 1;
        }
        queue.commit();
        queue.poll(now(start), &mut |completion| {
            assert!(under_way.remove(&completion.tag), "{completion:?} came twice, or for nothing");
            match (completion.unknown, completion.status.is_error()) {
                (true, _) => unknown += 1,
                (false, true) => refused += 1,
                (false, false) => well += 1,
            }
        });
        if well > 100 && !told {
            told = true;
            println!("DRAY-UNDER-WAY");
        }
    }
    assert_eq!(queue.submit(now(start), &SubmissionEntry::flush(1), &[], tag), Err(SubmitError::Dead));
    assert_eq!((queue.free(), queue.outstanding(), well + refused + unknown), (0, 0, tag));
    assert!(unknown > 0, "the end is told as unknown");
    println!("DRAY-GONE {:?}: {well} written, {refused} refused, {unknown} unknown", queue.fault());
    drop(queue);
    assert_eq!(Arc::strong_count(buffer.arena()), 1);
}
