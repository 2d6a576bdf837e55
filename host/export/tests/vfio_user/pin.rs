//! INTx: a level that masks itself when it is told, until the client unmasks it.

use crate::rig::{Rig, event, memfd, signals};
use dray_device::vfio_user::wire::{DmaMap, IrqSet, command, irq, region};
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::{Bar0Map, VfioUserConfig};
use dray_nvme::command::{FeatureSelect, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::registers::{Cc, Csts, offset};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

const WINDOW: DmaMap = DmaMap { argsz: 32, flags: 3, offset: 0, address: 0x10_0000, size: 0x4000 };
const ENTRIES: u32 = 16;
/// Command and Status, Message Control of MSI-X.
const COMMAND: u64 = 0x04;
const STATUS: u64 = 0x06;
const MSIX_CONTROL: u64 = 0x92;

/// A guest without MSI-X: an enabled controller, and a line for its pin.
struct Guest {
    rig: Rig,
    memory: File,
    line: OwnedFd,
    tail: u32,
    head: u32,
}

fn set(rig: &mut Rig, index: u32, flags: u32, fds: &[BorrowedFd<'_>]) {
    let set = IrqSet { argsz: 20, flags, index, start: 0, count: 1 };
    let _none = rig.ask_with(command::SET_IRQS, set.as_bytes(), fds).expect("set");
}

impl Guest {
    fn new(bar0: Bar0Map) -> Self {
        let mut rig = Rig::with(VfioUserConfig { bar0, ..VfioUserConfig::default() }, Box::new(NoMigration));
        rig.plug();
        let (memory, line) = (memfd(WINDOW.size), event());
        let _none = rig.ask_with(command::DMA_MAP, WINDOW.as_bytes(), &[memory.as_fd()]).expect("map");
        set(&mut rig, irq::INTX, IrqSet::DATA_EVENTFD | IrqSet::TRIGGER, &[line.as_fd()]);
        let mut guest = Self { rig, memory: memory.into(), line, tail: 0, head: 0 };
        guest.enable();
        guest
    }

    fn put(&mut self, at: u32, bytes: &[u8]) {
        self.rig.region_write(region::BAR0, at.into(), bytes).expect("written");
    }

    fn enable(&mut self) {
        (self.tail, self.head) = (0, 0);
        self.put(offset::AQA, &((ENTRIES - 1) << 16 | (ENTRIES - 1)).to_le_bytes());
        self.put(offset::ASQ, &WINDOW.address.to_le_bytes());
        self.put(offset::ACQ, &(WINDOW.address + 0x1000).to_le_bytes());
        self.put(offset::CC, &Cc::new().with_en(true).with_iosqes(6).with_iocqes(4).into_bits().to_le_bytes());
        (0..10).for_each(|_| self.rig.poll());
        assert!(Csts::from_bits(self.rig.register(offset::CSTS)).rdy());
    }

    /// A command that is completed at once.
    fn command(&mut self) {
        let entry = SubmissionEntry::get_features(FeatureId::ARBITRATION, FeatureSelect::CURRENT, 0);
        self.memory.write_all_at(entry.as_bytes(), u64::from(self.tail) * 64).expect("submitted");
        self.tail = (self.tail + 1) % ENTRIES;
        self.put(offset::DOORBELLS, &self.tail.to_le_bytes());
        (0..10).for_each(|_| self.rig.poll());
    }

    /// Takes so many completions.
    fn take(&mut self, count: u32) {
        self.head = (self.head + count) % ENTRIES;
        self.put(offset::DOORBELLS + 4, &self.head.to_le_bytes());
        (0..10).for_each(|_| self.rig.poll());
    }

    fn set(&mut self, flags: u32) {
        set(&mut self.rig, irq::INTX, flags, &[]);
        (0..10).for_each(|_| self.rig.poll());
    }

    fn unmask(&mut self) {
        self.set(IrqSet::DATA_NONE | IrqSet::UNMASK);
    }

    fn configure(&mut self, at: u64, value: u16) {
        self.rig.region_write(region::CONFIG, at, &value.to_le_bytes()).expect("written");
        (0..10).for_each(|_| self.rig.poll());
    }

    /// Interrupt Status.
    fn status(&mut self) -> bool {
        self.rig.region_read(region::CONFIG, STATUS, 2).expect("status")[0] & 8 != 0
    }

    #[track_caller]
    fn assert_told(&self, times: u64, why: &str) {
        assert_eq!(signals(&self.line), times, "{why}");
    }
}

#[test]
fn the_pin_masks_itself_and_tells_again_what_is_still_there() {
    let mut guest = Guest::new(Bar0Map::Doorbells);
    guest.assert_told(0, "nothing has happened");
    guest.command();
    assert!(guest.status());
    guest.assert_told(1, "a completion");
    guest.command();
    guest.unmask();
    guest.assert_told(1, "two completions that nobody has taken");
    guest.take(1);
    guest.assert_told(0, "masked");
    guest.unmask();
    guest.assert_told(1, "one is left");
    guest.take(1);
    assert!(!guest.status());
    guest.unmask();
    guest.assert_told(0, "all are taken");
    guest.command();
    guest.assert_told(1, "the next one");
    // Served before it is unmasked, with another completion in between: that one is not lost.
    guest.take(1);
    guest.command();
    guest.assert_told(0, "masked still");
    guest.unmask();
    guest.assert_told(1, "what came meanwhile");
}

#[test]
fn the_pin_is_masked_and_unmasked_by_message_and_by_eventfd() {
    let mut guest = Guest::new(Bar0Map::Doorbells);
    guest.set(IrqSet::DATA_NONE | IrqSet::MASK);
    guest.command();
    guest.assert_told(0, "masked by its client");
    // A bool that is not set does nothing.
    let bools = |on: u8, action| {
        let set = IrqSet { argsz: 21, flags: IrqSet::DATA_BOOL | action, index: irq::INTX, start: 0, count: 1 };
        [set.as_bytes(), &[on]].concat()
    };
    for (on, told) in [(0, 0), (1, 1)] {
        guest.rig.ask(command::SET_IRQS, &bools(on, IrqSet::UNMASK)).expect("set");
        (0..10).for_each(|_| guest.rig.poll());
        guest.assert_told(told, "unmasked where the bool says so");
    }
    // As a hypervisor's irqfd does it: the resampling eventfd.
    let (resample, mask) = (event(), event());
    set(&mut guest.rig, irq::INTX, IrqSet::DATA_EVENTFD | IrqSet::UNMASK, &[resample.as_fd()]);
    set(&mut guest.rig, irq::INTX, IrqSet::DATA_EVENTFD | IrqSet::MASK, &[mask.as_fd()]);
    let mut wakers = 0;
    dray_device::poll::Poll::wakers(&guest.rig.server, &mut |_| wakers += 1);
    assert_eq!(wakers, 3, "an idle server sleeps on them too");
    guest.rig.poll();
    guest.assert_told(0, "nobody has signalled them");
    for _ in 0..3 {
        rustix::io::write(&resample, &1u64.to_ne_bytes()).expect("signalled");
        (0..10).for_each(|_| guest.rig.poll());
        guest.assert_told(1, "the level is still there");
    }
    guest.take(1);
    rustix::io::write(&resample, &1u64.to_ne_bytes()).expect("signalled");
    (0..10).for_each(|_| guest.rig.poll());
    rustix::io::write(&mask, &1u64.to_ne_bytes()).expect("signalled");
    (0..10).for_each(|_| guest.rig.poll());
    guest.command();
    guest.assert_told(0, "masked by eventfd");
    set(&mut guest.rig, irq::INTX, IrqSet::DATA_EVENTFD | IrqSet::UNMASK, &[]);
    rustix::io::write(&resample, &1u64.to_ne_bytes()).expect("signalled");
    (0..10).for_each(|_| guest.rig.poll());
    guest.assert_told(0, "the eventfd was taken away");
    guest.unmask();
    guest.assert_told(1, "by message all the same");
    guest.set(IrqSet::DATA_NONE | IrqSet::TRIGGER);
    guest.assert_told(1, "the client tries its wiring");
    let off = IrqSet { argsz: 20, flags: IrqSet::DATA_NONE | IrqSet::TRIGGER, index: irq::INTX, start: 0, count: 0 };
    guest.rig.ask(command::SET_IRQS, off.as_bytes()).expect("off");
    rustix::io::write(&mask, &1u64.to_ne_bytes()).expect("signalled");
    guest.command();
    guest.assert_told(0, "off");
    assert!(!guest.rig.server.slot().pin().is_masked(), "its eventfds went with it");
}

#[test]
fn the_pin_is_quiet_while_msix_is_on_or_interrupts_are_disabled() {
    let mut guest = Guest::new(Bar0Map::Doorbells);
    let vector = event();
    set(&mut guest.rig, irq::MSIX, IrqSet::DATA_EVENTFD | IrqSet::TRIGGER, &[vector.as_fd()]);
    for (at, value) in [(COMMAND, 0x0406), (MSIX_CONTROL, 0x8000)] {
        guest.configure(at, value);
        guest.command();
        guest.assert_told(0, "off");
        assert!(!guest.status());
        guest.configure(at, 0);
        guest.assert_told(1, "what waited is told");
        guest.take(1);
        guest.unmask();
    }
    assert!(signals(&vector) >= 2, "MSI-X does not ask the pin");
    // A reset of the function leaves neither set.
    guest.configure(COMMAND, 0x0400);
    guest.rig.ask(command::RESET, &[]).expect("reset");
    guest.enable();
    guest.command();
    guest.assert_told(1, "as after power-on");
}

#[test]
fn vectors_that_intms_masks_do_not_assert_the_pin() {
    let mut guest = Guest::new(Bar0Map::None);
    guest.put(offset::INTMS, &1u32.to_le_bytes());
    guest.command();
    guest.assert_told(0, "masked in the controller");
    guest.put(offset::INTMC, &1u32.to_le_bytes());
    (0..10).for_each(|_| guest.rig.poll());
    guest.assert_told(1, "unmasked");
    guest.take(1);
    guest.unmask();
    // A controller reset unmasks (Base 2.3 §3.7.2).
    guest.put(offset::INTMS, &u32::MAX.to_le_bytes());
    guest.put(offset::CC, &0u32.to_le_bytes());
    (0..10).for_each(|_| guest.rig.poll());
    assert_eq!(guest.rig.register(offset::INTMS), 0);
    guest.enable();
    guest.command();
    guest.assert_told(1, "nothing is masked any more");

    // Where the registers are mapped a store is not a set of bits: nothing is masked, and nothing stays masked for ever.
    let mut guest = Guest::new(Bar0Map::Whole);
    guest.rig.server.slot().bar().arena().store32(offset::INTMS as usize, 1, std::sync::atomic::Ordering::Release);
    guest.command();
    guest.assert_told(1, "told all the same");
}

#[test]
fn the_pin_goes_with_its_client() {
    let mut guest = Guest::new(Bar0Map::Doorbells);
    guest.command();
    guest.assert_told(1, "a completion");
    guest.rig.reconnect();
    guest.rig.hello().expect("the next client");
    assert!(!guest.rig.server.slot().pin().is_masked());
    guest.rig.ask(command::RESET, &[]).expect("reset");
    let _none = guest.rig.ask_with(command::DMA_MAP, WINDOW.as_bytes(), &[guest.memory.as_fd()]).expect("map");
    guest.enable();
    guest.command();
    guest.assert_told(0, "a line of the client before");
    let line = event();
    set(&mut guest.rig, irq::INTX, IrqSet::DATA_EVENTFD | IrqSet::TRIGGER, &[line.as_fd()]);
    guest.rig.poll();
    assert_eq!(signals(&line), 1, "a level is there before the line");
}
