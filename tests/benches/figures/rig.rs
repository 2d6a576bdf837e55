//! A software subsystem and drivers on it, polled in turn by one thread.

use crate::Failure;
use dray::core::clock::Clock;
use dray_controller::{ControllerConfig, ControllerRole, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::backing::Backing;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_driver::{Driver, DriverConfig, DriverState, QueuePair, QueuePairConfig};

/// The management controller of every rig.
pub const MANAGEMENT: u16 = 1;
/// Its migratable controller.
pub const MIGRATABLE: u16 = 2;
/// Its namespace.
pub const NSID: u32 = 1;
/// Longest time that anything but a measured run may take.
const PATIENCE_MS: u64 = 20_000;

/// A subsystem with a management and a migratable controller over one namespace.
pub struct Rig {
    pub clock: Clock,
    pub subsystem: Subsystem,
}

/// A driver on a slot of its own, before one of a rig's controllers.
pub struct Front {
    pub driver: Driver,
    _slot: Slot,
}

impl Rig {
    pub fn new(backing: Box<dyn Backing>) -> Result<Self, Failure> {
        let controller = |cntlid, role, namespaces| ControllerConfig {
            cntlid,
            role,
            namespaces,
            io_queues: 4,
            vectors: 5,
            fence: Fence::new(false),
        };
        let management = controller(MANAGEMENT, ControllerRole::Management, Vec::new());
        let migratable = controller(MIGRATABLE, ControllerRole::Migratable, vec![NSID]);
        let config = SubsystemConfig { controllers: vec![management, migratable], ..SubsystemConfig::default() };
        let namespace = NamespaceConfig {
            nsid: NSID,
            nguid: [7; 16],
            eui64: [0; 8],
            uuid: [0; 16],
            shared: false,
            write_protected: false,
        };
        Ok(Self { clock: Clock::new(), subsystem: Subsystem::new(config, vec![(namespace, backing)])? })
    }

    /// Polls the subsystem and `step` in turn until that gives something.
    pub fn wait<T>(&mut self, what: &str, mut step: impl FnMut(Time) -> Result<Option<T>, Failure>) -> Result<T, Failure> {
        let deadline = self.clock.now().after_ms(PATIENCE_MS);
        loop {
            let now = self.clock.now();
            let _progress = self.subsystem.poll(now);
            if let Some(found) = step(now)? {
                return Ok(found);
            }
            if now > deadline {
                return Err(format!("{what}: nothing within {PATIENCE_MS} ms").into());
            }
        }
    }

    /// A driver that is ready.
    pub fn front(&mut self, cntlid: u16) -> Result<Front, Failure> {
        let slot = Slot::new(AddressSpace::default(), 5)?;
        slot.point_at(&self.subsystem.plug(cntlid).ok_or("the rig has no such controller")?);
        let config = DriverConfig { pages: Pages::PreferHuge, ..DriverConfig::default() };
        let mut driver = Driver::new(slot.function(), config)?;
        self.wait("enabling a controller", |now| {
            let _progress = driver.poll(now);
            match driver.state() {
                DriverState::Failed(error) => Err(error.clone().into()),
                _ => Ok(driver.is_ready().then_some(())),
            }
        })?;
        Ok(Front { driver, _slot: slot })
    }

    /// A queue pair of a front's driver.
    pub fn queue(&mut self, front: &mut Front, entries: u16) -> Result<QueuePair, Failure> {
        let config = QueuePairConfig { entries, vector: None };
        let ticket = front.driver.create_queue_pair(self.clock.now(), config)?;
        self.wait("creating a queue pair", |now| {
            let _progress = front.driver.poll(now);
            Ok(front.driver.queue_pair(&ticket).transpose()?)
        })
    }
}

impl Front {
    /// Memory that the controller reaches.
    pub fn memory(&self, len: usize) -> Result<MappedBuffer, Failure> {
        let buffer = DmaBuffer::allocate("bench-data", len, Pages::PreferHuge)?;
        Ok(MappedBuffer::new(self.driver.space(), buffer)?)
    }
}
