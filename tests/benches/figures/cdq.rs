//! What it costs to take in a change: from the look at the phase tags to the Set Features that moves the head, the policy's
//! answer and both markings included.
//!
//! The entries are real: a guest writes one command at a time through a controller that logs (so that neighbours are not merged
//! before they are posted), and only the reader's side is timed.

use crate::policy::{self, Kept};
use crate::report::Report;
use crate::rig::{Front, MANAGEMENT, MIGRATABLE, NSID, Rig};
use crate::{Failure, Plan};
use dray_controller::NullBacking;
use dray_device::poll::{Poll, Time};
use dray_device::space::MappedBuffer;
use dray_driver::{AdminData, QueuePair};
use dray_migration::media::{Geometry, Media};
use dray_migration::mmc::{DriverMmc, Mmc, QueueState};
use dray_migration::pump::{Pump, PumpLimits};
use dray_nvme::command::SubmissionEntry;
use dray_policy::guard::{Guard, Limits as GuardLimits};
use dray_policy::role::Cdq;
use dray_policy::seam::Seat;
use dray_sandbox::Limits;
use std::time::Instant;

/// Bytes of the namespace and of its blocks.
const BYTES: u64 = 64 << 30;
const BLOCK: u32 = 512;
/// Blocks of an entry.
const RANGE: u64 = 8;
const SLOTS: u32 = 8192;
/// Entries after which the map is cleaned, as a copy would do.
const CLEAN_EVERY: usize = 32_768;

struct Row {
    name: &'static str,
    sandboxed: bool,
    batch: usize,
    /// All entries at random, instead of one in four.
    random: bool,
}

const fn row(name: &'static str, sandboxed: bool, batch: usize, random: bool) -> Row {
    Row { name, sandboxed, batch, random }
}

const ROWS: [Row; 6] = [
    row("cdq.native.512", false, 512, false),
    row("cdq.policy.512", true, 512, false),
    row("cdq.policy.64", true, 64, false),
    row("cdq.native.512.random", false, 512, true),
    row("cdq.policy.512.random", true, 512, true),
    row("cdq.policy.64.random", true, 64, true),
];

/// All rows of this module.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    for row in ROWS.iter().filter(|row| plan.wants(row.name)) {
        let mut bench = Bench::new(row)?;
        let ns = plan.median(|| bench.run(plan, row))?;
        let order = if row.random { "random" } else { "three of four adjacent to the last" };
        report.add(row.name, ns, "ns", format!("64 GiB, 8-block entries, {order}; {}", bench.seat.identity().component));
    }
    Ok(())
}

struct Bench {
    rig: Rig,
    _guest: Front,
    pair: QueuePair,
    data: MappedBuffer,
    mmc: DriverMmc,
    queue: usize,
    pump: Pump,
    seat: Guard<Cdq>,
    _kept: Option<Kept>,
    media: Media,
    random: fastrand::Rng,
    slba: u64,
    since_clean: usize,
}

impl Bench {
    fn new(row: &Row) -> Result<Self, Failure> {
        let backing = NullBacking::new(BYTES, BLOCK)?;
        let blocks = BYTES / u64::from(BLOCK);
        let media = Media::new(&[Geometry { source: NSID, destination: NSID, blocks, block_bytes: BLOCK }])?;
        let mut rig = Rig::new(Box::new(backing))?;
        let mut guest = rig.front(MIGRATABLE)?;
        let pair = rig.queue(&mut guest, 64)?;
        let data = guest.memory(RANGE as usize * BLOCK as usize)?;
        let mut mmc = DriverMmc::new(rig.front(MANAGEMENT)?.driver, 64);
        let queue = mmc.create_queue(rig.clock.now(), MIGRATABLE, SLOTS)?;
        let live = rig.wait("creating a controller data queue", |now| {
            let _progress = mmc.poll(now);
            match mmc.queue_state(queue) {
                QueueState::Creating => Ok(None),
                QueueState::Live(queue) => Ok(Some(queue)),
                QueueState::Gone(why) => Err(why.into()),
            }
        })?;
        let start = mmc.request(rig.clock.now(), &SubmissionEntry::track_send_log(true, live.id), AdminData::None)?;
        let answer = rig.wait("starting to log", |now| {
            let _progress = mmc.poll(now);
            Ok(mmc.answer(start))
        })?;
        if answer.status.is_error() {
            return Err(format!("starting to log: {}", answer.status).into());
        }
        let meter = Box::new(rig.clock);
        let (mut seat, kept) = if row.sandboxed {
            let (seat, kept) = policy::sandboxed(meter, Limits::default(), GuardLimits::default())?;
            (seat, Some(kept))
        } else {
            (policy::native(meter), None)
        };
        seat.open(policy::opening(media.infos(), media.regions() as u32, live));
        let mut pump = Pump::new(live, PumpLimits::default(), rig.clock.now());
        // It looks whenever it is polled.
        pump.hurry(true);
        let random = fastrand::Rng::with_seed(7);
        let mut bench =
            Self { rig, _guest: guest, pair, data, mmc, queue, pump, seat, _kept: kept, media, random, slba: 0, since_clean: 0 };
        // The marker that says that logging has begun.
        bench.drain(bench.rig.clock.now())?;
        bench.settle();
        Ok(bench)
    }

    /// ns per entry.
    fn run(&mut self, plan: &Plan, row: &Row) -> Result<f64, Failure> {
        let (mut spent_ns, mut entries) = (0u128, 0usize);
        let until = Instant::now() + plan.run_time() * 2;
        while Instant::now() < until {
            for i in 0..row.batch {
                self.write(row.random || i % 4 == 0)?;
            }
            // As in the appliance, the time of a poll is read once for all that is polled.
            let now = self.rig.clock.now();
            let begin = Instant::now();
            let given = self.drain(now)?;
            spent_ns += begin.elapsed().as_nanos();
            if given as usize != row.batch {
                return Err(format!("{given} entries of {} were drained", row.batch).into());
            }
            entries += row.batch;
            self.settle();
            self.clean(row.batch)?;
        }
        let stats = self.pump.stats();
        let seat = self.seat.stats();
        if stats.omitted_blocks + stats.outside + stats.drained_by_host + seat.faults + seat.fallbacks > 0 {
            return Err(format!("the policy did not do all of it: {stats:?} {seat:?}").into());
        }
        Ok(spent_ns as f64 / entries as f64)
    }

    /// One write of the guest: one entry.
    fn write(&mut self, jump: bool) -> Result<(), Failure> {
        let ranges = BYTES / u64::from(BLOCK) / RANGE;
        let next = self.slba + RANGE;
        self.slba = if jump || next >= ranges * RANGE { self.random.u64(0..ranges) * RANGE } else { next };
        let now = self.rig.clock.now();
        let entry = SubmissionEntry::write(NSID, self.slba, RANGE as u32);
        self.pair.submit(now, &entry, &[self.data.buffer().segment()], 0)?;
        self.pair.commit();
        let pair = &mut self.pair;
        self.rig.wait("a write", |now| {
            let mut ended = None;
            pair.poll_with(now, |completion| ended = Some(completion));
            match ended {
                Some(completion) if completion.unknown || completion.status.is_error() => {
                    Err(format!("a write: {}", completion.status).into())
                }
                ended => Ok(ended.map(drop)),
            }
        })
    }

    /// What is measured. Returns the entries that were given back.
    #[inline(never)]
    fn drain(&mut self, now: Time) -> Result<u32, Failure> {
        let Self { mmc, queue, pump, seat, media, .. } = self;
        let mut given = Ok(0);
        mmc.with_queue(*queue, &mut |queue| given = pump.poll(now, queue, Some(&mut *seat), media));
        Ok(given?)
    }

    /// The head's Set Features and whatever it leads to comes to rest.
    fn settle(&mut self) {
        for _ in 0..8 {
            let now = self.rig.clock.now();
            let _progress = self.rig.subsystem.poll(now);
            let _progress = self.mmc.poll(now);
        }
        while self.mmc.next_notice().is_some() {}
    }

    /// Looks that the last change was marked, and cleans the map from time to time.
    fn clean(&mut self, entries: usize) -> Result<(), Failure> {
        let namespace = self.media.namespace(0).ok_or("no namespace")?;
        if !namespace.all_marked(self.slba, RANGE) {
            return Err(format!("a write at LBA {} was not marked", self.slba).into());
        }
        self.since_clean += entries;
        if self.since_clean >= CLEAN_EVERY {
            self.since_clean = 0;
            namespace.take(0, namespace.geometry.blocks);
        }
        Ok(())
    }
}
