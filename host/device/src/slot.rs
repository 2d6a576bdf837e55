//! The guest's slot, and the in-process loopback: how a controller of ours is reached without a bus.
//!
//! A guest holds a [`Slot`], never a controller: BAR memory, address space and event lines belong to the slot. A controller has
//! a [`Connector`]; pointing the slot at it ([`Slot::point_at`]) hands it a [`Port`], and takes the port from whoever had it
//! before. Doorbells are words of the slot's BAR, so the controller that comes finds the guest's last values there, those rung
//! in between included. Source and destination share nothing but that.

use crate::bar::{Bar, DOORBELLS_END};
use crate::event::EventLine;
use crate::function::{Doorbell, Function};
use crate::line::Vector;
use crate::memory::MemoryError;
use crate::pin::Pin;
use crate::space::AddressSpace;
use crate::sync::{AtomicBool, AtomicU64, Mutex};
use dray_nvme::registers::{Cc, offset};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// Why a slot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// No memory for the BAR.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No descriptor for an event line.
    #[error("cannot make an event line: {0}")]
    Event(#[from] io::Error),
}

#[derive(Debug)]
struct SlotShared {
    bar: Bar,
    space: AddressSpace,
    vectors: Vec<Vector>,
    pin: Pin,
    /// Counts attachments: a port of an older epoch is no longer the slot's.
    epoch: AtomicU64,
    current: Mutex<Option<Plug>>,
    gone: AtomicBool,
    /// Doorbells are register writes.
    trapped: AtomicBool,
}

/// The place a guest's function sits in. Clones are the same slot.
#[derive(Clone, Debug)]
pub struct Slot {
    shared: Arc<SlotShared>,
}

impl Slot {
    /// An empty slot over `space` with `vectors` event lines.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn new(space: AddressSpace, vectors: u16) -> Result<Self, SlotError> {
        let vectors = (0..vectors).map(|_| EventLine::new().map(Some).map(Vector::new)).collect::<Result<_, _>>()?;
        Self::with(space, vectors)
    }

    /// An empty slot over `space` with `vectors` interrupt vectors that have no event lines yet: a client brings them.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn without_lines(space: AddressSpace, vectors: u16) -> Result<Self, SlotError> {
        Self::with(space, (0..vectors).map(|_| Vector::new(None)).collect())
    }

    fn with(space: AddressSpace, vectors: Vec<Vector>) -> Result<Self, SlotError> {
        let shared = SlotShared {
            bar: Bar::new()?,
            space,
            vectors,
            pin: Pin::new(),
            epoch: AtomicU64::new(0),
            current: Mutex::new(None),
            gone: AtomicBool::new(false),
            trapped: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Points the slot at a controller: it gets the port at its next poll, and the one before has lost it at once.
    pub fn point_at(&self, plug: &Plug) {
        let mut current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        let epoch = self.shared.epoch.fetch_add(1, Ordering::AcqRel) + 1;
        let mut running = false;
        if let Some(before) = current.replace(plug.clone()) {
            before.put(None);
            running = Cc::from_bits(self.shared.bar.load32(offset::CC)).en();
        }
        plug.put(Some(Port { slot: Arc::clone(&self.shared), epoch, running }));
    }

    /// Takes the function out of the slot: registers read all ones from now on (surprise removal).
    pub fn unplug(&self) {
        let mut current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.epoch.fetch_add(1, Ordering::AcqRel);
        self.shared.gone.store(true, Ordering::Release);
        if let Some(before) = current.take() {
            before.put(None);
        }
    }

    /// The function that a driver drives.
    #[must_use]
    pub fn function(&self) -> Arc<dyn Function> {
        Arc::new(SlotFunction { shared: Arc::clone(&self.shared) })
    }

    /// Says that doorbells are trapped from now on, or that they are mapped: where each costs a message, controllers offer shadow
    /// doorbells. To be said before the guest enables its controller.
    pub fn trap_doorbells(&self, trapped: bool) {
        self.shared.trapped.store(trapped, Ordering::Release);
    }

    /// The slot's address space.
    #[must_use]
    pub fn space(&self) -> &AddressSpace {
        &self.shared.space
    }

    /// Registers and doorbells, for whoever stands on the guest's side of the slot.
    #[must_use]
    pub fn bar(&self) -> &Bar {
        &self.shared.bar
    }

    /// Interrupt vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.shared.vectors()
    }

    /// Gives a vector another event line, or none: signals are then remembered, and go to the next line at once. Returns whether
    /// the vector exists.
    pub fn set_line(&self, vector: u16, line: Option<EventLine>) -> bool {
        let found = self.shared.vectors.get(usize::from(vector));
        found.map(|vector| vector.set(line)).is_some()
    }

    /// The function's interrupt pin.
    #[must_use]
    pub fn pin(&self) -> &Pin {
        &self.shared.pin
    }

    /// Signals a vector as a controller does.
    pub fn raise(&self, vector: u16) {
        self.shared.raise(vector);
    }

    /// Whether a vector was signalled while it had no line.
    #[must_use]
    pub fn is_pending(&self, vector: u16) -> bool {
        self.shared.vectors.get(usize::from(vector)).is_some_and(Vector::is_pending)
    }

    /// Forgets which vectors were signalled while they had no line, as a reset of the function does.
    pub fn forget_pending(&self) {
        self.shared.vectors.iter().for_each(Vector::forget);
    }

    /// Whether the function was taken out.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.shared.gone.load(Ordering::Acquire)
    }
}

impl SlotShared {
    fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    #[inline]
    fn raise(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            vector.signal();
        }
    }
}

/// The guest's view of its slot.
#[derive(Debug)]
struct SlotFunction {
    shared: Arc<SlotShared>,
}

impl Function for SlotFunction {
    fn read32(&self, offset: u32) -> u32 {
        if self.shared.gone.load(Ordering::Acquire) { u32::MAX } else { self.shared.bar.guest_read32(offset) }
    }

    fn write32(&self, offset: u32, value: u32) {
        self.shared.bar.guest_write32(offset, value);
    }

    fn doorbell(&self, at: u32) -> Option<Doorbell> {
        let arena = self.shared.bar.arena();
        let inside = (offset::DOORBELLS..DOORBELLS_END).contains(&at) && at.is_multiple_of(4);
        if inside && self.shared.trapped.load(Ordering::Acquire) {
            let function: Arc<dyn Function> = Arc::new(Self { shared: Arc::clone(&self.shared) });
            return Some(Doorbell::Trapped { function, offset: at });
        }
        inside.then(|| Doorbell::Mapped { arena: Arc::clone(arena), offset: at as usize })
    }

    fn space(&self) -> &AddressSpace {
        &self.shared.space
    }

    fn event_line(&self, vector: u16) -> Option<EventLine> {
        self.shared.vectors.get(usize::from(vector))?.line()
    }

    fn reset(&self) -> io::Result<()> {
        self.shared.bar.function_reset();
        Ok(())
    }
}

/// What a controller gets of the slot that points at it.
#[derive(Clone, Debug)]
pub struct Port {
    slot: Arc<SlotShared>,
    epoch: u64,
    running: bool,
}

impl Port {
    /// Whether another controller had the function before, enabled. Whoever gets it so has that one's state, or must not pretend
    /// that it begins anew.
    #[must_use]
    pub fn was_running(&self) -> bool {
        self.running
    }

    /// Whether the slot still points here. A controller looks before it fetches commands: the port is taken without asking.
    #[inline]
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.slot.epoch.load(Ordering::Acquire) == self.epoch
    }

    /// Whether each doorbell costs the guest a message ([`Slot::trap_doorbells`]).
    #[must_use]
    pub fn traps_doorbells(&self) -> bool {
        self.slot.trapped.load(Ordering::Acquire)
    }

    /// Registers and doorbells.
    #[inline]
    #[must_use]
    pub fn bar(&self) -> &Bar {
        &self.slot.bar
    }

    /// The guest's memory.
    #[must_use]
    pub fn space(&self) -> &AddressSpace {
        &self.slot.space
    }

    /// Interrupt vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.slot.vectors()
    }

    /// Raises an interrupt vector; one that does not exist is ignored.
    #[inline]
    pub fn raise(&self, vector: u16) {
        self.slot.raise(vector);
    }

    /// Whether the function's pin is used: then each poll says what its level is.
    #[inline]
    #[must_use]
    pub fn uses_pin(&self) -> bool {
        self.slot.pin.is_on()
    }

    /// Sets the level of the pin. `wanting` has the vectors of completion queues with entries; those that INTMS masks do not
    /// count (Base 2.3 §3.1.4.3), vectors beyond its 32 bits always do.
    pub fn drive_pin(&self, mut wanting: impl Iterator<Item = u16>) {
        let masks = if self.slot.pin.is_deaf() { 0 } else { self.slot.bar.load32(offset::INTMS) };
        let masked = |vector: u16| masks.checked_shr(vector.into()).is_some_and(|bits| bits & 1 == 1);
        if self.is_current() {
            self.slot.pin.drive(wanting.any(|vector| !masked(vector)));
        }
    }
}

#[derive(Debug, Default)]
struct Socket {
    changes: AtomicU64,
    port: Mutex<Option<Port>>,
}

/// The end of a [`Connector`] that slots are pointed at. Clones are the same end.
#[derive(Clone, Debug)]
pub struct Plug {
    socket: Arc<Socket>,
}

impl Plug {
    fn put(&self, port: Option<Port>) {
        *self.socket.port.lock().unwrap_or_else(PoisonError::into_inner) = port;
        self.socket.changes.fetch_add(1, Ordering::Release);
    }
}

/// A controller's end: where it finds the port of the slot that points at it.
#[derive(Debug, Default)]
pub struct Connector {
    socket: Arc<Socket>,
    seen: u64,
}

impl Connector {
    /// A connector that no slot points at.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The end to point slots at.
    #[must_use]
    pub fn plug(&self) -> Plug {
        Plug { socket: Arc::clone(&self.socket) }
    }

    /// `Some` when the port has changed since the last call: the new port, or `None` inside when it was taken away. Costs one
    /// load when nothing changed.
    #[inline]
    pub fn poll(&mut self) -> Option<Option<Port>> {
        let changes = self.socket.changes.load(Ordering::Acquire);
        if changes == self.seen {
            return None;
        }
        self.seen = changes;
        Some(self.socket.port.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

impl Drop for Connector {
    /// A port holds its slot, and the slot the plug that it was put through: neither would ever be freed.
    fn drop(&mut self) {
        let port = self.socket.port.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(port);
    }
}

/// A fence that survives resets: once it is up, a controller behind it fetches nothing, and one that is enabled does not become
/// ready before the fence is down. It lives in memory: whoever gives the function away raises it, writes the durable record
/// behind it, and points the slot away last; whoever builds the controller after a restart reads the record first.
#[derive(Clone, Debug, Default)]
pub struct Fence {
    up: Arc<AtomicBool>,
}

impl Fence {
    /// A fence, up or down as the durable record says.
    #[must_use]
    pub fn new(up: bool) -> Self {
        Self { up: Arc::new(AtomicBool::new(up)) }
    }

    /// Raises the fence.
    pub fn raise(&self) {
        self.up.store(true, Ordering::SeqCst);
    }

    /// Lowers the fence: only after an undo has been recorded, if the record may say that the function was given away.
    pub fn lower(&self) {
        self.up.store(false, Ordering::SeqCst);
    }

    /// Whether nothing may be fetched.
    #[inline]
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_moves_and_the_doorbells_stay() {
        let slot = Slot::new(AddressSpace::default(), 2).expect("slot");
        let (mut source, mut destination) = (Connector::new(), Connector::new());
        slot.point_at(&source.plug());
        let port = source.poll().flatten().expect("port");
        assert!(source.poll().is_none(), "told once");
        let bell = slot.function().doorbell(offset::DOORBELLS + 8).expect("doorbell");
        bell.ring(3);
        slot.point_at(&destination.plug());
        assert!(!port.is_current(), "the source has lost it at once");
        bell.ring(5);
        assert!(source.poll().expect("told").is_none());
        let port = destination.poll().flatten().expect("port");
        assert!(port.is_current());
        assert_eq!(port.bar().load32(offset::DOORBELLS + 8), 5);
    }

    #[test]
    fn slot_and_controller_are_freed_with_their_owners() {
        let slot = Slot::new(AddressSpace::default(), 1).expect("slot");
        let shared = Arc::downgrade(&slot.shared);
        for _ in 0..2 {
            let mut connector = Connector::new();
            slot.point_at(&connector.plug());
            assert!(connector.poll().flatten().is_some());
        }
        drop(slot);
        assert_eq!(shared.strong_count(), 0);
    }

    #[test]
    fn an_unplugged_function_reads_all_ones() {
        let slot = Slot::new(AddressSpace::default(), 0).expect("slot");
        let function = slot.function();
        assert_eq!(function.read32(offset::CSTS), 0);
        slot.unplug();
        assert_eq!((function.read32(offset::CSTS), function.read64(offset::CAP)), (u32::MAX, u64::MAX));
        assert!(function.doorbell(offset::DOORBELLS - 4).is_none());
    }
}
