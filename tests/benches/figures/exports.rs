//! Controllers behind exports: server and controller on one core, driver or initiator on the other.
//!
//! The bounds of some rows are figures of another day and another placement of the two cores: compare where `calib.rtt` is the
//! same, and on a machine that does nothing else.

use crate::far::{Far, OverTcp, OverVfioUser};
use crate::load::{BLOCK, Kind, Ran, block, disk};
use crate::machine::{Cores, pages_note, target_folder, unpin};
use crate::report::Report;
use crate::{Failure, Plan};
use dray_controller::{FileBacking, MemoryBacking, NullBacking};
use dray_device::backing::Backing;
use dray_device::memory::DmaBuffer;
use dray_device::poll::Poll;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Bytes of the namespace.
const BYTES: u64 = 1 << 30;
/// Bytes of the file under the file-backed rows.
const FILE_BYTES: u64 = 256 << 20;
/// Commands outstanding in the file-backed rows.
const FILE_DEPTH: usize = 32;

const VFIO_USER: [(&str, Kind, usize); 6] = [
    ("vfio_user.randread.qd1", Kind::Read, 1),
    ("vfio_user.randread.qd32", Kind::Read, 32),
    ("vfio_user.randwrite.qd1", Kind::Write, 1),
    ("vfio_user.randwrite.qd32", Kind::Write, 32),
    ("vfio_user.null.qd1", Kind::Null, 1),
    ("vfio_user.null.qd128", Kind::Null, 128),
];

const NVME_TCP: [(&str, Kind, usize); 3] = [
    ("nvme_tcp.randread.qd1", Kind::Read, 1),
    ("nvme_tcp.randread.qd128", Kind::Read, 128),
    ("nvme_tcp.randwrite.qd128", Kind::Write, 128),
];

/// Reads before writes: fio's writes carry no marks.
const ON_A_FILE: [(&str, By, Kind); 3] = [
    ("vfio_user.file.randread.qd32", By::VfioUser, Kind::Read),
    ("nvme_tcp.file.randread.qd32", By::NvmeTcp, Kind::Read),
    ("vfio_user.file.randwrite.qd32", By::VfioUser, Kind::Write),
];

#[derive(Clone, Copy, PartialEq)]
enum By {
    VfioUser,
    NvmeTcp,
}

/// Rows in which a vfio-user client drives.
pub fn vfio_user(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    measure(plan, report, By::VfioUser, &VFIO_USER)
}

/// Rows in which an NVMe/TCP initiator drives.
pub fn nvme_tcp(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    measure(plan, report, By::NvmeTcp, &NVME_TCP)
}

fn measure(plan: &Plan, report: &mut Report, by: By, rows: &[(&'static str, Kind, usize)]) -> Result<(), Failure> {
    let rows: Vec<_> = rows.iter().copied().filter(|row| plan.wants(row.0)).collect();
    let (null, copied): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.1 == Kind::Null);
    if !copied.is_empty() {
        let disk = disk(plan.bytes(BYTES))?;
        let note = pages_note(disk.arena().is_huge());
        let backing = Box::new(MemoryBacking::with_memory(disk.clone(), BLOCK as u32)?);
        let mut bench = Bench::new(plan.cores, by, backing, Some(disk))?;
        for (name, kind, depth) in copied {
            let iops = plan.median(|| bench.run(kind, depth, plan.run_time()))?;
            report.add(name, iops, "iops", format!("{note}, {}", kind.checked()));
        }
        bench.end()?;
    }
    if !null.is_empty() {
        let mut bench = Bench::new(plan.cores, by, Box::new(NullBacking::new(BYTES, BLOCK as u32)?), None)?;
        for (name, kind, depth) in null {
            let iops = plan.median(|| bench.run(kind, depth, plan.run_time()))?;
            report.add(name, iops, "iops", kind.checked());
        }
        bench.end()?;
    }
    Ok(())
}

/// Rows over a file, as a share of what fio's io_uring engine does with the same file.
pub fn on_a_file(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let rows: Vec<_> = ON_A_FILE.into_iter().filter(|row| plan.wants(row.0)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let file = BenchFile::make(plan.bytes(FILE_BYTES))?;
    let mut peers: [Option<Option<f64>>; 2] = [None; 2];
    for (at, &(name, by, kind)) in rows.iter().enumerate() {
        let backing = FileBacking::open(&file.0, BLOCK as u32, 128)?;
        let direct = if backing.is_direct() { "O_DIRECT" } else { "THROUGH THE PAGE CACHE" };
        let mut bench = Bench::new(plan.cores, by, Box::new(backing), None)?;
        let ours = plan.median(|| bench.run(kind, FILE_DEPTH, plan.run_time()))?;
        bench.end()?;
        let peer = &mut peers[usize::from(kind == Kind::Write)];
        let last_read = !rows[at + 1..].iter().any(|row| row.2 == Kind::Read);
        if peer.is_none() && (kind == Kind::Read || last_read) {
            *peer = Some(fio(plan, &file.0, kind)?);
        }
        match peer.flatten() {
            Some(theirs) => {
                report.add(name, ours, "iops", format!("{direct}; fio's io_uring engine on the same file: {theirs:.0}"));
                report.add(&format!("{name}.ratio"), ours / theirs, "of fio", direct);
            }
            None => report.add(name, ours, "iops", format!("{direct}; fio IS NOT HERE: no ratio")),
        }
    }
    Ok(())
}

/// Either side of an export.
enum Sides {
    VfioUser(OverVfioUser),
    NvmeTcp(OverTcp),
}

struct Bench {
    sides: Sides,
    ended: u64,
}

impl Bench {
    fn new(cores: Cores, by: By, backing: Box<dyn Backing>, disk: Option<DmaBuffer>) -> Result<Self, Failure> {
        let far = Far::spinning(cores);
        let sides = match by {
            By::VfioUser => Sides::VfioUser(OverVfioUser::new(&far, backing, disk)?),
            By::NvmeTcp => Sides::NvmeTcp(OverTcp::new(&far, backing, disk)?),
        };
        Ok(Self { sides, ended: 0 })
    }

    fn run(&mut self, kind: Kind, depth: usize, time: Duration) -> Result<f64, Failure> {
        let ran: Ran = match &mut self.sides {
            Sides::VfioUser(OverVfioUser { queue, load, admin, .. }) => load.run(queue, (kind, depth), time, |now, look| {
                if look {
                    let _progress = admin.poll(now);
                }
            }),
            // The initiator's socket is asked by a system call: seldom is enough.
            Sides::NvmeTcp(OverTcp { queue, load, admin, .. }) => {
                let mut turn = 0u32;
                load.run(queue, (kind, depth), time, |now, look| {
                    turn += u32::from(look);
                    if look && turn.is_multiple_of(64) {
                        let _progress = admin.poll(now);
                    }
                })
            }
        }?;
        self.ended += ran.ended;
        Ok(ran.iops())
    }

    fn end(self) -> Result<(), Failure> {
        match self.sides {
            Sides::VfioUser(sides) => sides.end(self.ended),
            Sides::NvmeTcp(sides) => sides.end(self.ended),
        }
    }
}

/// A file in which every block carries its LBA; gone when dropped.
struct BenchFile(PathBuf);

impl BenchFile {
    fn make(bytes: u64) -> Result<Self, Failure> {
        let folder = target_folder()?.join("bench");
        std::fs::create_dir_all(&folder)?;
        let file = Self(folder.join("exported.img"));
        let mut writer = BufWriter::with_capacity(1 << 20, File::create(&file.0)?);
        for lba in 0..bytes / BLOCK as u64 {
            writer.write_all(&block(lba))?;
        }
        writer.into_inner()?.sync_all()?;
        Ok(file)
    }
}

impl Drop for BenchFile {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

/// What fio does with the file; None where there is no fio.
fn fio(plan: &Plan, file: &Path, kind: Kind) -> Result<Option<f64>, Failure> {
    let (pattern, part) = if kind == Kind::Write { ("randwrite", "write") } else { ("randread", "read") };
    unpin(&plan.cores)?;
    let run = Command::new("fio")
        .args(["--name=peer", "--ioengine=io_uring", "--direct=1", "--bs=4k", "--time_based", "--output-format=json"])
        .arg(format!("--rw={pattern}"))
        .arg(format!("--iodepth={FILE_DEPTH}"))
        .arg(format!("--runtime={}", if plan.quick { 1 } else { 3 }))
        .arg(format!("--filename={}", file.display()))
        .output();
    plan.cores.pin_first()?;
    let output = match run {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        run => run?,
    };
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|error| format!("fio: {error}"))?;
    let iops = report["jobs"][0][part]["iops"].as_f64().filter(|iops| *iops > 0.0);
    Ok(Some(iops.ok_or("fio has measured nothing")?))
}
