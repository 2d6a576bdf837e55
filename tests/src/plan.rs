//! What a test sets up: sizes, load, latencies, the migration's configuration; and the native policies.

use crate::rig::{MANAGEMENT, NSID};
use dray_driver::DriverConfig;
use dray_migration::{Limits, MigrationConfig, Policies};
use dray_policy::guard::{Guard, Limits as GuardLimits};
use dray_policy::native::{Native, NativeFactory};
use dray_policy::seam::{Factory, Meter, Seat};
use dray_workload::guest::GuestConfig;

/// What is set up.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Of every choice.
    pub seed: u64,
    /// Bytes of the source's namespace.
    pub bytes: u64,
    /// Bytes of a block at the source.
    pub block_bytes: u32,
    /// Bytes of the destination's namespace, where they differ.
    pub destination_bytes: u64,
    /// Bytes of a block there, where they differ.
    pub destination_block: u32,
    /// CNTLID of the controller that is taken for the management controller.
    pub management: u16,
    /// Each side has one more migratable controller, without namespaces.
    pub spare: bool,
    /// One more migratable controller of the set, which the test drives by [`Hand`](crate::hand::Hand).
    pub hand: bool,
    /// Migratable controllers at each side, each with a guest, all on one namespace.
    pub guests: u16,
    /// Blocks of 4 KiB that each guest writes, at equal distances.
    pub targets: u64,
    /// What each guest does.
    pub load: GuestConfig,
    /// The guests' drivers.
    pub guest_driver: DriverConfig,
    /// The drivers of the management controllers.
    pub driver: DriverConfig,
    /// Least and longest time of an operation of the disks, ns.
    pub latency_ns: (u64, u64),
    /// The migration.
    pub config: MigrationConfig,
}

impl Plan {
    /// 8 MiB in blocks of 512 bytes; one guest that writes 20,000 blocks of 4 KiB a second.
    #[must_use]
    pub fn small(seed: u64) -> Self {
        Self::sized(seed, 8 << 20, 512)
    }

    /// As [`small`](Self::small), of another size.
    #[must_use]
    pub fn sized(seed: u64, bytes: u64, block_bytes: u32) -> Self {
        let config = MigrationConfig {
            id: seed + 1,
            seed,
            namespaces: vec![(NSID, NSID)],
            cdq_slots: 4096,
            limits: Limits { downtime_budget_us: 10_000, ..Limits::default() },
            ..MigrationConfig::default()
        };
        Self {
            seed,
            bytes,
            block_bytes,
            destination_bytes: bytes,
            destination_block: block_bytes,
            management: MANAGEMENT,
            spare: false,
            hand: false,
            guests: 1,
            targets: (bytes / 4096 / 6).min(256),
            load: GuestConfig { nsid: NSID, rate: 20_000, read_percent: 20, depth: 8, queues: 1, ..GuestConfig::default() },
            guest_driver: DriverConfig::default(),
            driver: DriverConfig { io_timeout_ms: 50, admin_timeout_ms: 500, ..DriverConfig::default() },
            latency_ns: (2_000, 60_000),
            config,
        }
    }

    /// Changes the migration's configuration.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut MigrationConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Controllers of the migration set.
    #[must_use]
    pub fn controllers(&self) -> u16 {
        self.guests + u16::from(self.hand)
    }

    /// With a controller in the test's own hand.
    #[must_use]
    pub fn by_hand(mut self) -> Self {
        self.hand = true;
        self
    }

    /// So many guests and controllers.
    #[must_use]
    pub fn guests(mut self, guests: u16) -> Self {
        self.guests = guests;
        self
    }
}

/// A meter that stands still.
#[derive(Debug)]
pub struct Still;

impl Meter for Still {
    fn now_ns(&self) -> u64 {
        0
    }
}

/// A policy of any kind with the native one behind it.
#[must_use]
pub fn guarded<R: Native>(factory: Box<dyn Factory<R>>) -> Guard<R> {
    Guard::new(factory, Box::new(NativeFactory::<R>::new()), Box::new(Still), GuardLimits::default())
}

/// The seat of the native policy.
#[must_use]
pub fn native<R: Native>() -> Box<dyn Seat<R>> {
    Box::new(guarded::<R>(Box::new(NativeFactory::<R>::new())))
}

/// Native policies for so many queues.
#[must_use]
pub fn natives(queues: usize) -> Policies {
    Policies { cdq: (0..queues).map(|_| native()).collect(), tracking: native(), copy: native() }
}
