//! The places before which clients stand: a slot for each migratable controller, pointed at where it is served now.
//!
//! The slots belong to the source of `[migration]` and to subsystems that do not move; what moves goes from the source's
//! controllers to the destination's, in the order of the configuration, and back. Where VM managers move them, the destination's
//! have slots of their own, and none is ever pointed elsewhere.

use crate::assembly::{AssemblyError, Machine};
use crate::moving::Fences;
use dray_device::slot::{Plug, Slot};
use dray_device::space::AddressSpace;
use dray_migration::{GuestSample, GuestSlot, GuestView, Owner};

/// A slot and the controllers that it can be pointed at.
pub(super) struct Front {
    /// The subsystem that the configuration exports it of.
    pub(super) subsystem: String,
    /// Its CNTLID there.
    pub(super) cntlid: u16,
    /// The slot.
    pub(super) slot: Slot,
    /// Its event lines, and so the vectors of a function.
    pub(super) vectors: u16,
}

/// A migratable controller of the source of `[migration]` and the one of the destination that takes over from it.
#[derive(Clone)]
pub(super) struct Pair {
    /// CNTLIDs of the two ends of `[migration]`.
    pub(super) cntlids: [u16; 2],
    pub(super) slot: Slot,
    pub(super) plugs: [Plug; 2],
    pub(super) fences: [dray_device::slot::Fence; 2],
}

/// All slots of a configuration.
pub(super) struct Fronts {
    pub(super) all: Vec<Front>,
    pub(super) pairs: Vec<Pair>,
}

impl Fronts {
    /// A slot for each migratable controller, pointed at the end that serves. `ends` are the places of the source and the
    /// destination of `[migration]` among the machines.
    pub(super) fn new(machines: &[Machine], ends: [usize; 2], serving: Owner) -> Result<Self, AssemblyError> {
        let (mut all, mut pairs) = (Vec::new(), Vec::new());
        for (place, machine) in machines.iter().enumerate().filter(|(place, _)| *place != ends[1]) {
            for (nth, controller) in machine.migratable.iter().enumerate() {
                let other = machines.get(ends[1]).and_then(|to| to.migratable.get(nth)).filter(|_| place == ends[0]);
                let queues = other.map_or(0, |other| other.io_queues).max(controller.io_queues);
                let vectors = queues.saturating_add(1);
                let slot = Slot::new(AddressSpace::default(), vectors)?;
                slot.point_at(match other {
                    Some(other) if serving == Owner::Destination => &other.plug,
                    _ => &controller.plug,
                });
                if let Some(other) = other {
                    pairs.push(Pair {
                        cntlids: [controller.cntlid, other.cntlid],
                        slot: slot.clone(),
                        plugs: [controller.plug.clone(), other.plug.clone()],
                        fences: [controller.fence.clone(), other.fence.clone()],
                    });
                }
                all.push(Front { subsystem: machine.name.clone(), cntlid: controller.cntlid, slot, vectors });
            }
        }
        Ok(Self { all, pairs })
    }

    /// A slot for each migratable controller, pointed at that one. Both of a pair have as many vectors: a function goes from one
    /// to the other only if it is alike.
    pub(super) fn apart(machines: &[Machine], ends: [usize; 2]) -> Result<Self, AssemblyError> {
        let mut all = Vec::new();
        for (place, machine) in machines.iter().enumerate() {
            for (nth, controller) in machine.migratable.iter().enumerate() {
                let other = ends.iter().position(|end| *end == place).and_then(|end| machines.get(ends[1 - end]));
                let other = other.and_then(|other| other.migratable.get(nth));
                let vectors = other.map_or(0, |other| other.io_queues).max(controller.io_queues).saturating_add(1);
                let slot = Slot::new(AddressSpace::default(), vectors)?;
                slot.point_at(&controller.plug);
                all.push(Front { subsystem: machine.name.clone(), cntlid: controller.cntlid, slot, vectors });
            }
        }
        Ok(Self { all, pairs: Vec::new() })
    }
}

/// Which way a migration goes: `false` from the source of `[migration]` to its destination, `true` back.
pub(super) struct Way {
    pub(super) pairs: Vec<Pair>,
    pub(super) back: bool,
}

impl Way {
    fn turned<T>(&self, pair: [T; 2]) -> [T; 2] {
        let [a, b] = pair;
        if self.back { [b, a] } else { [a, b] }
    }

    /// CNTLIDs: source, destination of the migration.
    pub(super) fn controllers(&self) -> Vec<(u16, u16)> {
        self.pairs.iter().map(|pair| self.turned(pair.cntlids).into()).collect()
    }

    /// The fences, the migration's source first.
    pub(super) fn fences(&self) -> Fences {
        Fences(self.pairs.iter().map(|pair| self.turned(pair.fences.clone())).collect())
    }

    fn point(&self, cntlid: u16, end: usize) {
        for pair in self.pairs.iter().filter(|pair| self.turned(pair.cntlids)[0] == cntlid) {
            let plugs = self.turned(pair.plugs.each_ref());
            pair.slot.point_at(plugs[end]);
        }
    }
}

impl GuestSlot for Way {
    fn point_at_destination(&mut self, cntlid: u16) {
        self.point(cntlid, 1);
    }

    fn point_at_source(&mut self, cntlid: u16) {
        self.point(cntlid, 0);
    }
}

/// Clients do not tell their latencies.
pub(super) struct Unknown;

impl GuestView for Unknown {
    fn sample(&mut self) -> GuestSample {
        GuestSample::default()
    }
}
