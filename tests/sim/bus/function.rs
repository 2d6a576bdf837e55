//! The function that the driver is given: registers with substitutions, doorbells of its own.

use dray_device::event::EventLine;
use dray_device::function::{Doorbell, Function};
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_nvme::registers::{Aqa, Cc, Csts, offset};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

/// Entries of the rings that the controller gets as its admin queues.
pub(super) const ENTRIES: u32 = 64;
/// Queue pairs whose doorbells go through the bus, the admin queue's included (DSTRD 0).
pub(super) const PAIRS: u32 = 16;
/// Where the controller's admin submission queue, its completion queue and the driver's doorbells are in the bus's memory.
pub(super) const SQ_AT: usize = 0;
pub(super) const CQ_AT: usize = PAGE;
pub(super) const BELLS_AT: usize = 2 * PAGE;

/// What the function and the bus share.
#[derive(Debug)]
pub(super) struct Registers {
    pub(super) inner: Arc<dyn Function>,
    /// The controller's admin rings, then the doorbells that the driver rings.
    pub(super) arena: Arc<Arena>,
    rings: MappedBuffer,
    aqa: AtomicU32,
    asq: AtomicU64,
    acq: AtomicU64,
    /// How often CC.EN rose, and fell, through the bus.
    pub(super) enables: AtomicU32,
    pub(super) resets: AtomicU32,
    /// Registers read all ones, and writes go nowhere.
    pub(super) gone: AtomicBool,
    /// CSTS.CFS reads 1 until CC.EN falls.
    pub(super) fatal: AtomicBool,
    /// The driver has read what was made up.
    pub(super) gone_seen: AtomicBool,
    pub(super) fatal_seen: AtomicBool,
}

impl Registers {
    pub(super) fn new(inner: Arc<dyn Function>) -> Self {
        let arena = Arena::new("sim-bus", 3 * PAGE, Pages::Small).expect("memory for a bus");
        let rings = DmaBuffer::new(Arc::clone(&arena), 0, 2 * PAGE).expect("two pages of three");
        let rings = MappedBuffer::new(inner.space(), rings).expect("a mapping for a bus");
        Self {
            inner,
            arena,
            rings,
            aqa: AtomicU32::new(0),
            asq: AtomicU64::new(0),
            acq: AtomicU64::new(0),
            enables: AtomicU32::new(0),
            resets: AtomicU32::new(0),
            gone: AtomicBool::new(false),
            fatal: AtomicBool::new(false),
            gone_seen: AtomicBool::new(false),
            fatal_seen: AtomicBool::new(false),
        }
    }

    pub(super) fn is(flag: &AtomicBool) -> bool {
        flag.load(Ordering::Relaxed)
    }

    /// The driver's admin queues: sizes, ASQ and ACQ.
    pub(super) fn queues(&self) -> (Aqa, u64, u64) {
        let aqa = Aqa::from_bits(self.aqa.load(Ordering::Relaxed));
        (aqa, self.asq.load(Ordering::Relaxed), self.acq.load(Ordering::Relaxed))
    }

    /// CC.EN is about to rise: the controller gets the bus's rings, empty.
    fn substitute(&self) {
        self.arena.fill(0, 3 * PAGE, 0);
        let size = ENTRIES as u16 - 1;
        self.inner.write32(offset::AQA, Aqa::new().with_asqs(size).with_acqs(size).into_bits());
        self.inner.write64(offset::ASQ, self.rings.iova() + SQ_AT as u64);
        self.inner.write64(offset::ACQ, self.rings.iova() + CQ_AT as u64);
        self.enables.fetch_add(1, Ordering::Relaxed);
    }

    fn write_cc(&self, value: u32) {
        let (before, after) = (Cc::from_bits(self.inner.read32(offset::CC)), Cc::from_bits(value));
        if after.en() && !before.en() {
            self.substitute();
        }
        if before.en() && !after.en() {
            self.resets.fetch_add(1, Ordering::Relaxed);
            self.fatal.store(false, Ordering::Relaxed);
        }
        self.inner.write32(offset::CC, value);
    }
}

/// Half of a 64-bit register.
fn half(register: &AtomicU64, high: bool) -> u32 {
    let value = register.load(Ordering::Relaxed);
    if high { (value >> 32) as u32 } else { value as u32 }
}

fn set_half(register: &AtomicU64, high: bool, value: u32) {
    let old = register.load(Ordering::Relaxed);
    let new = if high {
        old & 0xffff_ffff | u64::from(value) << 32
    } else {
        old & !0xffff_ffff | u64::from(value)
    };
    register.store(new, Ordering::Relaxed);
}

/// The driver's view.
#[derive(Debug)]
pub(super) struct BusFunction {
    pub(super) registers: Arc<Registers>,
}

impl BusFunction {
    /// The place of a doorbell in the bus's memory, if it goes through the bus.
    fn bell(at: u32) -> Option<usize> {
        let place = at.checked_sub(offset::DOORBELLS)?;
        (place < PAIRS * 8 && place.is_multiple_of(4)).then_some(BELLS_AT + place as usize)
    }
}

impl Function for BusFunction {
    fn read32(&self, at: u32) -> u32 {
        let registers = &*self.registers;
        if Registers::is(&registers.gone) {
            registers.gone_seen.store(true, Ordering::Relaxed);
            return u32::MAX;
        }
        match at {
            offset::AQA => registers.aqa.load(Ordering::Relaxed),
            offset::ASQ => half(&registers.asq, false),
            at if at == offset::ASQ + 4 => half(&registers.asq, true),
            offset::ACQ => half(&registers.acq, false),
            at if at == offset::ACQ + 4 => half(&registers.acq, true),
            offset::CSTS if Registers::is(&registers.fatal) => {
                registers.fatal_seen.store(true, Ordering::Relaxed);
                Csts::from_bits(registers.inner.read32(at)).with_cfs(true).into_bits()
            }
            _ => registers.inner.read32(at),
        }
    }

    fn write32(&self, at: u32, value: u32) {
        let registers = &*self.registers;
        if Registers::is(&registers.gone) {
            return;
        }
        if let Some(place) = Self::bell(at) {
            return registers.arena.store32(place, value, Ordering::Relaxed);
        }
        match at {
            offset::AQA => registers.aqa.store(value, Ordering::Relaxed),
            offset::ASQ => set_half(&registers.asq, false, value),
            at if at == offset::ASQ + 4 => set_half(&registers.asq, true, value),
            offset::ACQ => set_half(&registers.acq, false, value),
            at if at == offset::ACQ + 4 => set_half(&registers.acq, true, value),
            offset::CC => registers.write_cc(value),
            _ => registers.inner.write32(at, value),
        }
    }

    fn doorbell(&self, at: u32) -> Option<Doorbell> {
        let inner = self.registers.inner.doorbell(at)?;
        let arena = || Arc::clone(&self.registers.arena);
        Some(Self::bell(at).map_or(inner, |offset| Doorbell::Mapped { arena: arena(), offset }))
    }

    fn space(&self) -> &AddressSpace {
        self.registers.inner.space()
    }

    fn event_line(&self, vector: u16) -> Option<EventLine> {
        self.registers.inner.event_line(vector)
    }

    fn reset(&self) -> io::Result<()> {
        self.registers.resets.fetch_add(1, Ordering::Relaxed);
        self.registers.fatal.store(false, Ordering::Relaxed);
        self.registers.inner.reset()
    }
}
