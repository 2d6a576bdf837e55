//! `dray device exercise`: a pattern through the polled driver onto a physical drive, flushed, read back, compared.

use super::pattern::{self, Extent};
use super::physical::{PCI, PciArgs};
use super::print;
use super::session::Session;
use crate::config::units::Size;
use clap::Args;
use dray_device::command::{CommandQueue, SubmitError};
use dray_device::memory::{DmaBuffer, PAGE, Segment};
use dray_device::space::MappedBuffer;
use dray_driver::namespace::StateProbe;
use dray_driver::{QueuePair, QueuePairConfig, mmc};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::IdentifyNamespace;
use dray_nvme::status::Status;
use miette::miette;
use serde_json::json;
use std::process::ExitCode;

/// Queue depths that are tried, one after the other.
const DEPTHS: [u16; 4] = [1, 4, 16, 64];
/// Most bytes of a command.
const MOST_BYTES: usize = 64 << 10;
/// How long the drive may take until something ends, in milliseconds.
const PATIENCE_MS: u64 = 60_000;
/// Differing blocks that are named.
const SHOWN: usize = 8;

/// What is exercised, and how.
#[derive(Clone, Debug, Args)]
pub(in super::super) struct ExerciseArgs {
    /// pci:ADDRESS of a drive that is bound to vfio-pci
    device: String,
    /// The namespace
    #[arg(long, value_name = "N")]
    nsid: u32,
    /// About how much is written: half of it in a row, the rest scattered over the namespace
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    bytes: Size,
    /// What is written, and where, depends on it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Yes: what is on the namespace may be lost
    #[arg(long)]
    destroys_data: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pci: PciArgs,
}

/// What one queue depth came to.
#[derive(Clone, Debug, Default)]
struct Run {
    depth: u16,
    commands: usize,
    blocks: u64,
    write_ns: u64,
    read_ns: u64,
    differing: Vec<u64>,
}

/// Refuses what was not said twice.
pub(super) fn agreed(said: bool, what: &str) -> miette::Result<()> {
    if said {
        return Ok(());
    }
    Err(miette!(help = "say --destroys-data if that is meant", "{what} destroys data; nothing was done"))
}

/// Writes, flushes, reads back and compares; fails on any difference.
pub(in super::super) fn run(args: &ExerciseArgs) -> miette::Result<ExitCode> {
    agreed(args.destroys_data, &format!("writing a pattern to namespace {} of {}", args.nsid, args.device))?;
    let mut session = args.pci.session(&args.device, args.pci.driver())?;
    let namespace = namespace(&mut session, args.nsid)?;
    let block = namespace.block_bytes().filter(|bytes| *bytes as usize <= MOST_BYTES);
    let block = block.ok_or_else(|| miette!("{}: namespace {} has blocks that are too large", session.name(), args.nsid))?;
    if namespace.lbaf[usize::from(namespace.flbas.format_index())].ms() != 0 {
        let help = "`dray device format` with another --lbaf gives it one without";
        return Err(miette!(help = help, "{}: namespace {} is formatted with metadata", session.name(), args.nsid));
    }
    let most = (MOST_BYTES.min(session.driver().admin_limit()) as u32 / block).max(1);
    let all = pattern::extents(args.seed, namespace.nsze, args.bytes.0 / u64::from(block), most);
    let mut runs = Vec::new();
    for (at, depth) in DEPTHS.into_iter().enumerate() {
        let part: Vec<Extent> = all.iter().copied().skip(at).step_by(DEPTHS.len()).collect();
        let mut lanes = Lanes::open(&mut session, (args.nsid, block, args.seed), depth)?;
        if at == 0 {
            lanes.check_writable(&mut session)?;
        }
        runs.push(lanes.run(&mut session, &part)?);
        lanes.close(&mut session)?;
    }
    session.close()?;
    report(args, block, &runs)
}

fn namespace(session: &mut Session<'_>, nsid: u32) -> miette::Result<Box<IdentifyNamespace>> {
    let now = session.now();
    let query = mmc::identify_namespace(session.driver_mut(), now, nsid).map_err(|error| miette!("{}: {error}", session.name()))?;
    let found = session.until("Identify Namespace", |driver, _| query.poll(driver))?;
    let namespace = found.map_err(|error| miette!("{}: namespace {nsid}: {error}", session.name()))?;
    if namespace.nsze == 0 {
        return Err(miette!(help = "`dray device identify` lists them", "{}: there is no namespace {nsid}", session.name()));
    }
    Ok(namespace)
}

/// What has ended.
#[derive(Clone, Copy, Debug)]
struct Ended {
    tag: u64,
    status: Status,
    unknown: bool,
}

/// A queue pair, and a buffer for each command that it can hold.
struct Lanes {
    queue: QueuePair,
    buffer: MappedBuffer,
    nsid: u32,
    block: u32,
    seed: u64,
    depth: u16,
}

impl Lanes {
    fn open(session: &mut Session<'_>, (nsid, block, seed): (u32, u32, u64), depth: u16) -> miette::Result<Self> {
        let now = session.now();
        let config = QueuePairConfig { entries: depth.saturating_mul(2).max(2), vector: None };
        let ticket = session.driver_mut().create_queue_pair(now, config);
        let ticket = ticket.map_err(|error| miette!("{}: a queue pair: {error}", session.name()))?;
        let queue = session.until("creating a queue pair", |driver, _| driver.queue_pair(&ticket))?;
        let queue = queue.map_err(|error| miette!("{}: a queue pair: {error}", session.name()))?;
        // A queue that is smaller than that is used as far as it goes.
        let depth = depth.min(u16::try_from(queue.limits().depth).unwrap_or(u16::MAX)).max(1);
        let pages = session.pages();
        let memory = DmaBuffer::allocate("dray-exercise", usize::from(depth) * MOST_BYTES, pages);
        let memory = memory.map_err(|error| miette!("{error}"))?;
        let buffer = MappedBuffer::new(session.driver().space(), memory).map_err(|error| miette!("{}: {error}", session.name()))?;
        Ok(Self { queue, buffer, nsid, block, seed, depth })
    }

    /// Whoever has reserved or protected it is respected.
    fn check_writable(&mut self, session: &mut Session<'_>) -> miette::Result<()> {
        let probe = StateProbe::new(session.driver(), self.nsid);
        let mut probe = probe.map_err(|error| miette!("{}: {error}", session.name()))?;
        let queue = &mut self.queue;
        let state = session.until("asking for reservations", |driver, now| probe.poll(driver, queue, now))?;
        let state = state.map_err(|error| miette!("{}: {error}", session.name()))?;
        match state.why_not_written() {
            Some(why) => Err(miette!("{}: namespace {}: {why}", session.name(), self.nsid)),
            None => Ok(()),
        }
    }

    fn lane(&self, lane: usize, bytes: usize) -> miette::Result<Segment<'_>> {
        self.buffer.buffer().part(lane * MOST_BYTES, bytes).ok_or_else(|| miette!("a buffer is too small"))
    }

    fn run(&mut self, session: &mut Session<'_>, extents: &[Extent]) -> miette::Result<Run> {
        let mut run = Run { depth: self.depth, commands: extents.len(), ..Run::default() };
        run.blocks = extents.iter().map(|extent| u64::from(extent.blocks)).sum();
        let start = session.now();
        self.pass(session, extents, true, &mut run)?;
        self.flush(session)?;
        run.write_ns = session.now().ns_since(start);
        let start = session.now();
        self.pass(session, extents, false, &mut run)?;
        run.read_ns = session.now().ns_since(start);
        Ok(run)
    }

    /// Every extent once, as many at a time as the depth allows.
    fn pass(&mut self, session: &mut Session<'_>, extents: &[Extent], writing: bool, run: &mut Run) -> miette::Result<()> {
        let what = if writing { "writing" } else { "reading" };
        let mut free: Vec<usize> = (0..usize::from(self.depth)).collect();
        let mut under_way: Vec<Option<Extent>> = vec![None; free.len()];
        let mut next = 0;
        while next < extents.len() || free.len() < under_way.len() {
            let now = session.now();
            while let (Some(extent), Some(&lane)) = (extents.get(next), free.last()) {
                match self.submit(now, *extent, lane, writing)? {
                    Err(SubmitError::Full) => break,
                    Err(error) => return Err(miette!("{}: {what} LBA {}: {error}", session.name(), extent.lba)),
                    Ok(()) => {}
                }
                free.pop();
                under_way[lane] = Some(*extent);
                next += 1;
            }
            self.queue.commit();
            for ended in self.wait(session, what)? {
                let lane = usize::try_from(ended.tag).unwrap_or(usize::MAX);
                let Some(extent) = under_way.get_mut(lane).and_then(Option::take) else { continue };
                free.push(lane);
                if ended.unknown {
                    return Err(self.lost(session, what));
                }
                if ended.status.is_error() {
                    let (name, lba) = (session.name(), extent.lba);
                    return Err(miette!("{name}: {what} {} blocks from LBA {lba}: {}", extent.blocks, ended.status));
                }
                if !writing {
                    self.compare(extent, lane, &mut run.differing)?;
                }
            }
        }
        Ok(())
    }

    fn submit(
        &mut self,
        now: dray_device::poll::Time,
        extent: Extent,
        lane: usize,
        writing: bool,
    ) -> miette::Result<Result<(), SubmitError>> {
        let bytes = extent.blocks as usize * self.block as usize;
        if writing {
            let mut content = vec![0; bytes];
            for (lba, block) in (extent.lba..).zip(content.chunks_mut(self.block as usize)) {
                pattern::fill(block, self.seed, lba);
            }
            self.lane(lane, bytes)?.write(&content);
        } else {
            // Nothing of what was written may be what is compared.
            self.lane(lane, bytes)?.write(&vec![0xa5; bytes]);
        }
        let entry = match writing {
            true => SubmissionEntry::write(self.nsid, extent.lba, extent.blocks),
            false => SubmissionEntry::read(self.nsid, extent.lba, extent.blocks),
        };
        let data = self.buffer.buffer().part(lane * MOST_BYTES, bytes).ok_or_else(|| miette!("a buffer is too small"))?;
        Ok(self.queue.submit(now, &entry, &[data], lane as u64))
    }

    /// Polls until something ends.
    fn wait(&mut self, session: &mut Session<'_>, what: &str) -> miette::Result<Vec<Ended>> {
        let queue = &mut self.queue;
        session.until_within(PATIENCE_MS, what, |_, now| {
            let mut ended = Vec::new();
            queue.poll(now, &mut |c| ended.push(Ended { tag: c.tag, status: c.status, unknown: c.unknown }));
            (!ended.is_empty()).then_some(ended)
        })
    }

    /// The drive took commands and nobody knows what became of them.
    fn lost(&self, session: &mut Session<'_>, what: &str) -> miette::Report {
        // The driver is polled until it knows why.
        match session.until("looking what happened", |driver, _| driver.last_failure().cloned()) {
            Ok(error) => miette!("{}: {what}: {error}", session.name()),
            Err(report) => report,
        }
    }

    fn flush(&mut self, session: &mut Session<'_>) -> miette::Result<()> {
        let (now, name) = (session.now(), session.name().to_owned());
        self.queue.submit(now, &SubmissionEntry::flush(self.nsid), &[], 0).map_err(|error| miette!("{name}: flush: {error}"))?;
        self.queue.commit();
        match self.wait(session, "flushing")?.first() {
            Some(ended) if ended.unknown => Err(self.lost(session, "flushing")),
            Some(ended) if ended.status.is_error() => Err(miette!("{name}: flush: {}", ended.status)),
            _ => Ok(()),
        }
    }

    fn compare(&self, extent: Extent, lane: usize, differing: &mut Vec<u64>) -> miette::Result<()> {
        let block = self.block as usize;
        let mut seen = vec![0; extent.blocks as usize * block];
        self.lane(lane, seen.len())?.read(&mut seen);
        differing.extend(pattern::differing(&seen, extent, block, self.seed));
        Ok(())
    }

    fn close(self, session: &mut Session<'_>) -> miette::Result<()> {
        let now = session.now();
        let name = session.name().to_owned();
        session.driver_mut().delete_queue_pair(now, self.queue).map_err(|_| miette!("{name}: commands are left in a queue"))?;
        session.until("deleting a queue pair", |driver, _| (driver.queue_pairs() == 0).then_some(()))
    }
}

fn per_second(count: u64, ns: u64) -> f64 {
    count as f64 / (ns.max(1) as f64 / 1e9)
}

fn report(args: &ExerciseArgs, block: u32, runs: &[Run]) -> miette::Result<ExitCode> {
    let bytes = |blocks: u64| blocks * u64::from(block);
    let differing: Vec<u64> = runs.iter().flat_map(|run| run.differing.iter().copied()).collect();
    let blocks: u64 = runs.iter().map(|run| run.blocks).sum();
    if args.json {
        let depths: Vec<_> = runs
            .iter()
            .map(|run| {
                json!({
                    "depth": run.depth, "commands": run.commands, "blocks": run.blocks,
                    "write_ns": run.write_ns, "read_ns": run.read_ns,
                    "write_bytes_per_s": per_second(bytes(run.blocks), run.write_ns) as u64,
                    "read_bytes_per_s": per_second(bytes(run.blocks), run.read_ns) as u64,
                    "differing": run.differing.len(),
                })
            })
            .collect();
        let first: Vec<_> = differing.iter().take(SHOWN).collect();
        let all = json!({
            "device": args.device, "nsid": args.nsid, "seed": args.seed, "block_bytes": block, "blocks": blocks, "depths": depths,
            "differing": differing.len(), "first_differing": first, "verified": differing.is_empty(),
        });
        print(&format!("{all:#}\n"))?;
    } else {
        let mut text = String::new();
        for run in runs {
            let mib = |ns| per_second(bytes(run.blocks), ns) / f64::from(1 << 20);
            let (write, read) = (per_second(run.commands as u64, run.write_ns), per_second(run.commands as u64, run.read_ns));
            text += &format!(
                "depth {:>3}: {} commands, {}: written {:.1} MiB/s ({write:.0}/s), read {:.1} MiB/s ({read:.0}/s), {} blocks differ\n",
                run.depth,
                run.commands,
                Size(bytes(run.blocks)),
                mib(run.write_ns),
                mib(run.read_ns),
                run.differing.len()
            );
        }
        let device = args.device.strip_prefix(PCI).unwrap_or(&args.device);
        let of = format!("{blocks} blocks of {block} bytes on namespace {} of {PCI}{device}, seed {}", args.nsid, args.seed);
        text += &match differing.is_empty() {
            true => format!("{of}: all that was read is what was written\n"),
            false => {
                let first: Vec<_> = differing.iter().take(SHOWN).map(ToString::to_string).collect();
                format!("{of}: {} DIFFER, the first at LBA {}\n", differing.len(), first.join(", "))
            }
        };
        print(&text)?;
    }
    Ok(if differing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A page is the least that a lane is made of.
const _: () = assert!(MOST_BYTES.is_multiple_of(PAGE));
