//! Rule 13: no allocation per command. Reads and writes through driver and controller, each change logged, drained by the native
//! policy and given back, allocate nothing once everything has been used.
#![allow(missing_docs)]

use dray_device::command::SubmitError;
use dray_device::poll::Poll;
use dray_device::space::MappedBuffer;
use dray_driver::{AdminData, QueuePair};
use dray_migration::media::{Geometry, Media};
use dray_migration::mmc::{DriverMmc, Mmc, QueueState};
use dray_migration::pump::{Pump, PumpLimits};
use dray_nvme::command::SubmissionEntry;
use dray_policy::guard::{Guard, Limits};
use dray_policy::native::NativeFactory;
use dray_policy::packed::REGION_BYTES;
use dray_policy::role::Cdq;
use dray_policy::seam::{Meter, Opening, Seat, Setup};
use dray_tests::rig::{Front, MANAGEMENT, MIGRATABLE, NSID, Side, World};

const BLOCK: u32 = 512;
const BYTES: u64 = 64 << 20;
const SLOTS: u32 = 1024;
/// Commands that are counted, and commands before them that bring everything into use.
const COMMANDS: u64 = 100_000;
const WARM_UP: u64 = 20_000;

/// A meter that does not move: what calls cost does not matter here.
struct Still;

impl Meter for Still {
    fn now_ns(&self) -> u64 {
        0
    }
}

struct Bench {
    world: World,
    guest: Front,
    pair: QueuePair,
    data: MappedBuffer,
    mmc: DriverMmc,
    queue: usize,
    pump: Pump,
    seat: Guard<Cdq>,
    media: Media,
    random: fastrand::Rng,
    given_back: u64,
}

impl Bench {
    fn new() -> Self {
        let mut world = World::new(1, vec![Side::memory(BYTES, BLOCK)]);
        let (manager, mut guest) = (world.front(0, MANAGEMENT), world.front(0, MIGRATABLE));
        let pair = guest.pair(&mut world, 128, Some(1));
        let data = guest.memory(64 << 10);
        let mut mmc = DriverMmc::new(manager.driver, 64);
        let queue = mmc.create_queue(world.now, MIGRATABLE, SLOTS).expect("begun");
        let live = world.wait("the queue", |now| {
            let _progress = mmc.poll(now);
            match mmc.queue_state(queue) {
                QueueState::Live(live) => Some(live),
                QueueState::Creating => None,
                QueueState::Gone(why) => panic!("no queue: {why:?}"),
            }
        });
        let start = SubmissionEntry::track_send_log(true, live.id);
        let start = mmc.request(world.now, &start, AdminData::None).expect("sent");
        let answer = world.wait("logging", |now| {
            let _progress = mmc.poll(now);
            mmc.answer(start)
        });
        assert!(!answer.status.is_error());
        let blocks = BYTES / u64::from(BLOCK);
        let media = Media::new(&[Geometry { source: NSID, destination: NSID, blocks, block_bytes: BLOCK }]).expect("a map");
        let native = || Box::new(NativeFactory::<Cdq>::new());
        let mut seat = Guard::new(native(), native(), Box::new(Still), Limits::default());
        let (regions, region_bytes) = (media.regions() as u32, REGION_BYTES as u32);
        let setup = Setup { migration: 1, seed: 1, now_us: 0, namespaces: media.infos(), regions, region_bytes, settings: Vec::new() };
        seat.open(Opening { setup, extra: live });
        let mut pump = Pump::new(live, PumpLimits::default(), world.now);
        pump.hurry(true);
        let random = fastrand::Rng::with_seed(1);
        Self { world, guest, pair, data, mmc, queue, pump, seat, media, random, given_back: 0 }
    }

    /// Reads and writes of one to 16 blocks, as many at a time as come.
    fn run(&mut self, commands: u64) {
        let (mut sent, mut ended) = (0, 0);
        let until = self.world.now.after_ms(60_000);
        while ended < commands {
            assert!(self.world.now < until, "{ended} of {commands} commands ended");
            self.submit(&mut sent, commands);
            let Self { world, guest, pair, mmc, queue, pump, seat, media, given_back, .. } = self;
            ended += world.round(|now| {
                let _progress = guest.driver.poll(now);
                let _progress = mmc.poll(now);
                mmc.with_queue(*queue, &mut |queue| {
                    *given_back += u64::from(pump.poll(now, queue, Some(&mut *seat), media).expect("the queue is in order"));
                });
                let mut count = 0;
                pair.poll_with(now, |completion| {
                    assert!(!completion.status.is_error() && !completion.unknown);
                    count += 1;
                });
                count
            });
        }
    }

    fn submit(&mut self, sent: &mut u64, commands: u64) {
        for _ in 0..self.random.u32(0..24) {
            if *sent == commands {
                break;
            }
            let blocks = self.random.u32(1..=16);
            let slba = self.random.u64(0..BYTES / u64::from(BLOCK) - 16);
            let offset = self.random.usize(0..32) * 512;
            let piece = self.data.buffer().part(offset, (blocks * BLOCK) as usize).expect("within the data");
            let entry = if self.random.bool() {
                SubmissionEntry::write(NSID, slba, blocks)
            } else {
                SubmissionEntry::read(NSID, slba, blocks)
            };
            match self.pair.submit(self.world.now, &entry, &[piece], *sent) {
                Ok(()) => *sent += 1,
                Err(SubmitError::Full) => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.pair.commit();
    }
}

#[test]
fn commands_and_their_log_allocate_nothing() {
    let mut bench = Bench::new();
    bench.run(WARM_UP);
    let before = bench.given_back;
    let counted = allocation_counter::measure(|| bench.run(COMMANDS));
    assert!(bench.given_back - before > COMMANDS / 4, "{} entries were drained", bench.given_back - before);
    let stats = bench.seat.stats();
    assert_eq!((stats.faults, stats.fallbacks), (0, 0));
    assert_eq!(counted.count_total, 0, "{} bytes in {} allocations", counted.bytes_total, counted.count_total);
    // The counter counts.
    assert_eq!(allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1u64)))).count_total, 1);
}
