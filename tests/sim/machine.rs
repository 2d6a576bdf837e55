//! The parts of the world: a side with its subsystem, disks and management controller; and what a migration is given of them.

use super::disk::SimDisk;
use super::event::{Event, GuestId, Side};
use super::scenario::Scenario;
use dray_controller::{ControllerConfig, ControllerRole, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::function::Function;
use dray_device::poll::Poll;
use dray_device::slot::{Fence, Plug, Slot};
use dray_device::space::AddressSpace;
use dray_driver::{Driver, DriverConfig};
use dray_migration::{DriverMmc, FenceControl, GuestSample, GuestSlot, GuestView, Journal, JournalError, Mmc, Owner, Record};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// CNTLID of the management controller of either side.
pub const MANAGEMENT: u16 = 1;
/// CNTLID of the first guest's controller; the others follow.
pub const MIGRATABLE: u16 = 2;
/// The names of the two sides in the records.
pub use super::event::ENDS;
/// Entries of the I/O queues that the media is copied through.
const COPY_QUEUE: u16 = 16;

/// NGUID of a namespace, the same at both sides.
#[must_use]
pub fn nguid(nsid: u32) -> [u8; 16] {
    [0xd0 + nsid as u8; 16]
}

/// What hooks say while the migration polls them.
#[derive(Clone, Debug, Default)]
pub struct Inbox {
    shared: Arc<Mutex<Vec<Event>>>,
}

impl Inbox {
    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, event: Event) {
        self.events().push(event);
    }

    /// Moves everything said to `events`.
    pub fn take(&self, events: &mut Vec<Event>) {
        events.append(&mut self.events());
    }
}

/// One side.
pub struct Machine {
    /// The subsystem.
    pub subsystem: Subsystem,
    /// The fences of its guests' controllers, raised and lowered together.
    pub fences: Vec<Fence>,
    /// Where slots of the guests' controllers are pointed.
    pub plugs: Vec<Plug>,
    /// The bus between the management controller and its driver.
    pub bus: super::bus::Bus,
    /// The management controller's function behind the bus, for who goes past its driver.
    pub raw: Arc<dyn Function>,
    /// Its driver, while no migration has it.
    pub manager: Option<Box<dyn Mmc>>,
    /// Where its queues' memory is mapped.
    pub space: AddressSpace,
    /// Commands that each guest's controller had fetched at the last look.
    pub fetched: Vec<u64>,
    /// Completions and resets of each controller at the last look, the management controller's first.
    seen: Vec<(u64, u64)>,
    /// Those for whom these have changed since they were taken: a bit for each.
    shown: u32,
    /// Deviations that took effect, as far as they are counted.
    pub deviated: dray_controller::Deviations,
    /// How often its freedom was used, as far as it is counted.
    pub freedom_used: (u32, u32),
}

impl Machine {
    /// A side over its disks; `fenced` as the records say.
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn new(side: Side, scenario: &Scenario, disks: &[SimDisk], fenced: bool) -> Self {
        let fences: Vec<_> = scenario.guests.iter().map(|_| Fence::new(fenced)).collect();
        let mut controllers = vec![controller(MANAGEMENT, ControllerRole::Management, Vec::new(), Fence::new(false))];
        for (guest, (load, fence)) in scenario.guests.iter().zip(&fences).enumerate() {
            let cntlid = MIGRATABLE + guest as u16;
            controllers.push(controller(cntlid, ControllerRole::Migratable, load.namespaces.clone(), fence.clone()));
        }
        let config = SubsystemConfig {
            controllers,
            model: if scenario.untested { "Somebody's drive".into() } else { SubsystemConfig::default().model },
            max_queue_entries: 64,
            mdts: 4,
            contexts: 64,
            max_cdq_bytes: 1 << 20,
            ..SubsystemConfig::default()
        };
        let namespaces = disks.iter().enumerate().map(|(index, disk)| (namespace(1 + index as u32), disk.backing()));
        let mut subsystem = Subsystem::new(config, namespaces.collect()).expect("a subsystem");
        super::deeds::deviate(&mut subsystem, scenario, side);
        let plug = |cntlid| subsystem.plug(cntlid).expect("a controller of that CNTLID");
        let slot = Slot::new(AddressSpace::default(), 1).expect("a slot");
        slot.point_at(&plug(MANAGEMENT));
        let plugs = (0..fences.len()).map(|guest| plug(MIGRATABLE + guest as u16)).collect();
        let raw = slot.function();
        let bus = super::bus::Bus::new(side, slot.function(), scenario.seed ^ side as u64);
        let config = DriverConfig {
            admin_entries: 32,
            aers: 4,
            ready_timeout_ms: 6,
            admin_timeout_ms: 3,
            io_timeout_ms: 2,
            io_queues: 2,
            max_transfer_bytes: scenario.copy.transfer_bytes,
            ..DriverConfig::default()
        };
        let driver = Driver::new(bus.function(), config).expect("a driver");
        let manager: Box<dyn Mmc> = Box::new(DriverMmc::new(driver, COPY_QUEUE));
        Self {
            fetched: vec![0; fences.len()],
            seen: vec![(0, 0); 1 + fences.len()],
            shown: 0,
            subsystem,
            fences,
            plugs,
            bus,
            raw,
            manager: Some(manager),
            space: slot.space().clone(),
            deviated: dray_controller::Deviations::NONE,
            freedom_used: (0, 0),
        }
    }

    /// Whom its controllers have shown a completion or a reset since the last call: bit 0 the manager, bit 1 + n guest n.
    pub fn take_shown(&mut self) -> u32 {
        std::mem::take(&mut self.shown)
    }

    /// Raises or lowers all its fences; says so if that changed anything.
    pub fn fence(&self, side: Side, up: bool, say: &Inbox) {
        fence(&self.fences, side, up, say);
    }

    /// Polls the subsystem; says which guests' controllers have fetched.
    pub fn poll(&mut self, side: Side, now: dray_device::poll::Time, events: &mut Vec<Event>) -> dray_device::poll::Progress {
        let progress = self.subsystem.poll(now);
        if progress.work > 0 {
            for (cntlid, counters) in self.subsystem.counters() {
                let place = usize::from(cntlid - MANAGEMENT);
                let now = (counters.completed, counters.resets);
                if self.seen.get(place).is_some_and(|before| *before != now) {
                    self.seen[place] = now;
                    self.shown |= 1 << place;
                }
                let Some(guest) = cntlid.checked_sub(MIGRATABLE).map(GuestId::from) else { continue };
                if self.fetched.get(guest).is_some_and(|before| *before != counters.fetched) {
                    self.fetched[guest] = counters.fetched;
                    events.push(Event::Fetched { side, guest });
                }
            }
        }
        progress
    }
}

fn fence(fences: &[Fence], side: Side, up: bool, say: &Inbox) {
    if fences.iter().any(|fence| fence.is_up() != up) {
        say.say(Event::Fence { side, up });
    }
    for fence in fences {
        if up { fence.raise() } else { fence.lower() }
    }
}

fn controller(cntlid: u16, role: ControllerRole, namespaces: Vec<u32>, fence: Fence) -> ControllerConfig {
    ControllerConfig { cntlid, role, namespaces, io_queues: 4, vectors: 1, fence }
}

fn namespace(nsid: u32) -> NamespaceConfig {
    NamespaceConfig {
        nsid,
        nguid: nguid(nsid),
        eui64: [0xe0 + nsid as u8; 8],
        uuid: [0xf0 + nsid as u8; 16],
        shared: true,
        write_protected: false,
    }
}

/// The guests' slots in a migration.
pub struct Slots {
    /// Source and destination.
    pub sides: [Side; 2],
    /// Of each guest: its slot, and the controllers of those sides.
    pub slots: Vec<(Slot, [Plug; 2])>,
    /// Where it says so.
    pub say: Inbox,
}

impl Slots {
    fn point(&self, cntlid: u16, end: usize) {
        let guest = GuestId::from(cntlid - MIGRATABLE);
        if let Some((slot, plugs)) = self.slots.get(guest) {
            slot.point_at(&plugs[end]);
            self.say.say(Event::Pointed { guest, side: self.sides[end] });
        }
    }
}

impl GuestSlot for Slots {
    fn point_at_destination(&mut self, cntlid: u16) {
        self.point(cntlid, 1);
    }

    fn point_at_source(&mut self, cntlid: u16) {
        self.point(cntlid, 0);
    }
}

/// The fences of both ends of a migration.
pub struct Fences {
    /// Source and destination.
    pub sides: [Side; 2],
    /// Their fences.
    pub fences: [Vec<Fence>; 2],
    /// Where it says so.
    pub say: Inbox,
}

impl FenceControl for Fences {
    fn raise(&mut self, end: Owner) {
        fence(&self.fences[end as usize], self.sides[end as usize], true, &self.say);
    }

    fn lower(&mut self, end: Owner) {
        fence(&self.fences[end as usize], self.sides[end as usize], false, &self.say);
    }
}

/// A journal that says what it writes.
pub struct Watched {
    /// The real journal.
    pub inner: Box<dyn Journal>,
    /// The record being written.
    pub pending: Option<Record>,
    /// Where it says so.
    pub say: Inbox,
}

impl Journal for Watched {
    fn write(&mut self, record: &Record) {
        self.say.say(Event::RecordBegun(*record));
        self.pending = Some(*record);
        self.inner.write(record);
    }

    fn poll(&mut self) -> Option<Result<(), JournalError>> {
        let result = self.inner.poll()?;
        if let Some(record) = self.pending.take() {
            self.say.say(if result.is_ok() { Event::RecordDurable(record) } else { Event::RecordFailed(record) });
        }
        Some(result)
    }
}

/// The guest's figures, as they were last looked at.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// The last sample; taken = another is wanted.
    pub cell: Arc<Mutex<Option<GuestSample>>>,
}

impl Figures {
    /// The sample, to take or to renew.
    pub fn cell(&self) -> MutexGuard<'_, Option<GuestSample>> {
        self.cell.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestView for Figures {
    fn sample(&mut self) -> GuestSample {
        self.cell().take().unwrap_or_default()
    }
}
