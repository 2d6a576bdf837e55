//! One function over two: what a guest drives while its controller is in one process and, after the move, in another.
//!
//! Each process has a BAR of its own, so what the guest wrote before has to be in the other one before its controller goes on:
//! registers, doorbells, and how often CC.EN has fallen (the controller's state says how many falls it has seen; one more is a
//! reset that is still to be done). The guest's own writes are remembered here, and the other BAR is brought up to date by the
//! same writes. Until then its controller is suspended and behind a fence, and looks at none of them.
//!
//! Doorbells are trapped here, and stored in the BAR that is meant: that costs a lock and a store, which nobody contends but in
//! the moment of the switch.

use dray_device::event::EventLine;
use dray_device::function::{Doorbell, Function};
use dray_device::space::AddressSpace;
use dray_nvme::registers::{Cc, offset};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Bytes of doorbells: those of 512 queue pairs at stride 0.
const BELL_BYTES: u32 = 4096;
const CC_EN: u32 = 1;

/// One of the two functions.
#[derive(Debug)]
struct Side {
    /// `None` when nothing goes there any more.
    function: Option<Arc<dyn Function>>,
    bells: Vec<Option<Doorbell>>,
    /// Falls of CC.EN that its BAR has counted.
    falls: u32,
}

impl Side {
    fn new(function: Arc<dyn Function>) -> Self {
        let bells = (0..BELL_BYTES / 4).map(|at| function.doorbell(offset::DOORBELLS + 4 * at)).collect();
        Self { function: Some(function), bells, falls: 0 }
    }

    fn write(&self, at: u32, value: u32) {
        if let Some(function) = &self.function {
            function.write32(at, value);
        }
    }

    fn ring(&self, at: usize, value: u32) {
        if let (Some(Some(bell)), true) = (self.bells.get(at), self.function.is_some()) {
            bell.ring(value);
        }
    }
}

/// What the guest has written, and where it goes.
#[derive(Debug)]
struct Written {
    sides: [Side; 2],
    /// The side that is meant.
    at: usize,
    cc: u32,
    /// Falls of CC.EN.
    falls: u32,
    aqa: u32,
    /// ASQ and ACQ by halves.
    queues: [u32; 4],
    masks: u32,
    bells: Vec<u32>,
}

impl Written {
    fn side(&self) -> &Side {
        &self.sides[self.at]
    }

    fn write(&mut self, at: u32, value: u32) {
        match at {
            offset::CC => {
                if self.cc & CC_EN != 0 && value & CC_EN == 0 {
                    self.falls += 1;
                }
                if self.cc & CC_EN == 0 && value & CC_EN != 0 {
                    // The controller clears its doorbells before it becomes ready.
                    self.bells.fill(0);
                }
                self.cc = value;
                self.sides[self.at].falls = self.falls;
            }
            offset::AQA => self.aqa = value,
            offset::INTMS => self.masks |= value,
            offset::INTMC => self.masks &= !value,
            _ if (offset::ASQ..offset::ACQ + 8).contains(&at) && at.is_multiple_of(4) => {
                self.queues[((at - offset::ASQ) / 4) as usize] = value;
            }
            _ => {}
        }
        self.side().write(at, value);
    }

    fn ring(&mut self, at: u32, value: u32) {
        let at = ((at - offset::DOORBELLS) / 4) as usize;
        if let Some(bell) = self.bells.get_mut(at) {
            *bell = value;
            self.side().ring(at, value);
        }
    }

    /// Makes the BAR of the side that is meant what the guest has made of the other one.
    fn bring_up_to_date(&mut self) {
        let side = &mut self.sides[self.at];
        while side.falls < self.falls {
            side.write(offset::CC, self.cc | CC_EN);
            side.write(offset::CC, self.cc & !CC_EN);
            side.falls += 1;
        }
        side.write(offset::AQA, self.aqa);
        for (at, half) in (offset::ASQ..).step_by(4).zip(self.queues) {
            side.write(at, half);
        }
        side.write(offset::INTMS, self.masks);
        side.write(offset::INTMC, !self.masks);
        side.write(offset::CC, self.cc);
        for (at, value) in self.bells.iter().enumerate() {
            side.ring(at, *value);
        }
    }
}

/// The function.
#[derive(Debug)]
pub struct SwitchedFunction {
    me: Weak<Self>,
    space: AddressSpace,
    written: Mutex<Written>,
}

impl SwitchedFunction {
    /// A function that is `functions[at]` at first. Both take the addresses of `space`, and nobody has driven them yet.
    #[must_use]
    pub fn new(space: AddressSpace, functions: [Arc<dyn Function>; 2], at: usize) -> Arc<Self> {
        let bells = vec![0; (BELL_BYTES / 4) as usize];
        let sides = functions.map(Side::new);
        let written =
            Written { sides, at: at.min(1), cc: 0, falls: 0, aqa: 0, queues: [0; 4], masks: 0, bells };
        Arc::new_cyclic(|me| Self { me: me.clone(), space, written: Mutex::new(written) })
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other function is meant from now on. The controller behind it is suspended.
    pub fn point_at(&self, side: usize) {
        let mut written = self.lock();
        if side < 2 && written.at != side {
            written.at = side;
            written.bring_up_to_date();
        }
    }

    /// Nothing goes to a side any more; it is let go of.
    pub fn forget(&self, side: usize) {
        let gone = self.lock().sides.get_mut(side).and_then(|side| {
            side.bells.clear();
            side.function.take()
        });
        // Not under the lock: the guest goes on meanwhile.
        drop(gone);
    }

    fn function(&self) -> Option<Arc<dyn Function>> {
        self.lock().side().function.clone()
    }
}

impl Function for SwitchedFunction {
    fn read32(&self, offset: u32) -> u32 {
        self.function().map_or(u32::MAX, |function| function.read32(offset))
    }

    fn write32(&self, at: u32, value: u32) {
        let mut written = self.lock();
        if (offset::DOORBELLS..offset::DOORBELLS + BELL_BYTES).contains(&at) {
            written.ring(at, value);
        } else {
            written.write(at, value);
        }
    }

    fn doorbell(&self, at: u32) -> Option<Doorbell> {
        let nth = at.checked_sub(offset::DOORBELLS).filter(|from| from.is_multiple_of(4))? / 4;
        self.lock().side().bells.get(nth as usize)?.as_ref()?;
        Some(Doorbell::Trapped { function: self.me.upgrade()?, offset: at })
    }

    fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// There are none: a guest that may be switched polls.
    fn event_line(&self, _vector: u16) -> Option<EventLine> {
        None
    }

    fn reset(&self) -> io::Result<()> {
        let mut written = self.lock();
        if let Some(function) = &written.side().function {
            function.reset()?;
        }
        // Counted as a fall, whether the controller was enabled or not.
        written.falls += 1;
        let (at, falls) = (written.at, written.falls);
        written.sides[at].falls = falls;
        (written.cc, written.aqa, written.queues, written.masks) = (Cc::new().into_bits(), 0, [0; 4], 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::slot::Slot;

    fn pair() -> (Arc<SwitchedFunction>, [Slot; 2]) {
        let space = AddressSpace::default();
        let slots = [0, 1].map(|_| Slot::new(space.clone(), 1).expect("a slot"));
        let functions = slots.each_ref().map(Slot::function);
        (SwitchedFunction::new(space, functions, 0), slots)
    }

    const TAIL: u32 = offset::DOORBELLS + 8;

    #[test]
    fn the_other_bar_is_what_the_guest_has_made_of_the_first() {
        let (function, slots) = pair();
        for value in [1, 0, 1, 0, 1] {
            function.write32(offset::CC, value | 0x46_0000);
        }
        function.write32(offset::AQA, 0x1f_001f);
        function.write64(offset::ASQ, 0x12_3456_7000);
        function.write64(offset::ACQ, 0x9_8765_4000);
        function.write32(offset::INTMS, 6);
        function.write32(offset::INTMC, 2);
        let bell = function.doorbell(TAIL).expect("a doorbell");
        bell.ring(3);
        assert_eq!(slots[0].bar().load32(TAIL), 3);
        assert_eq!(slots[1].bar().resets() + slots[1].bar().load32(offset::CC), 0, "untouched before the switch");
        function.point_at(1);
        assert_eq!(slots[1].bar().save(), slots[0].bar().save());
        bell.ring(4);
        assert_eq!((slots[0].bar().load32(TAIL), slots[1].bar().load32(TAIL)), (3, 4), "the first hears nothing more");
    }

    #[test]
    fn there_and_back_loses_no_doorbell_and_no_reset() {
        let (function, slots) = pair();
        function.write32(offset::CC, 1);
        let bell = function.doorbell(TAIL).expect("a doorbell");
        function.point_at(1);
        bell.ring(7);
        function.point_at(0);
        assert_eq!((slots[0].bar().load32(TAIL), slots[0].bar().resets()), (7, 0));
        function.point_at(1);
        assert_eq!(slots[1].bar().resets(), 0, "no fall that the guest has not made");
        function.write32(offset::CC, 0);
        function.write32(offset::CC, 1);
        function.point_at(0);
        assert_eq!((slots[0].bar().resets(), slots[0].bar().load32(offset::CC)), (1, 1));
        assert_eq!(slots[0].bar().load32(TAIL), 0, "doorbells begin anew with the controller");
        function.reset().expect("reset");
        function.point_at(1);
        assert_eq!((slots[1].bar().resets(), slots[1].bar().load32(offset::CC)), (2, 0));
    }

    #[test]
    fn a_side_that_was_forgotten_is_let_go_of() {
        let (function, slots) = pair();
        function.point_at(1);
        function.forget(0);
        function.point_at(0);
        function.write32(offset::CC, 1);
        assert_eq!((function.read32(offset::CSTS), slots[0].bar().load32(offset::CC)), (u32::MAX, 0));
        assert!(function.doorbell(TAIL).is_none());
    }
}
