//! The power is cut and the process starts again: disks lose by their models, the records decide who serves, new guests go on.

use super::fault::Fault;
use super::event::{Event, Side, Violation};
use super::machine::{ENDS, Machine, nguid};
use super::slots::RecordMedium;
use super::world::{Leg, World, violation};
use dray::core::records::{RecordError, RecordStore};
use dray_migration::recovery::{Recovery, recover};

/// How often the power goes again while the process starts, at most.
const CUTS: u32 = 2;

impl World<'_> {
    /// The records' stores, as they are opened at a start.
    ///
    /// # Errors
    /// A store that cannot be opened is a violation: nothing of the model makes records unreadable.
    pub fn stores(&self) -> Result<Vec<RecordStore<RecordMedium>>, Violation> {
        let open = |index: usize| {
            let nguid = nguid(1 + index as u32);
            RecordStore::open(self.records.medium(nguid), nguid)
        };
        let mut stores: Result<Vec<_>, _> = (0..self.scenario.namespaces.len()).map(open).collect();
        if matches!(stores, Err(RecordError::Io(_))) && self.records.has_power() {
            // The disk of the records fails: the operator mends it, and the process starts again.
            self.records.heal();
            stores = (0..self.scenario.namespaces.len()).map(open).collect();
        }
        stores.map_err(|error| violation("records are lost", error.to_string()))
    }

    /// Cuts the power of everything, and starts again; now and then the power goes once more, or twice, before that is done.
    ///
    /// # Errors
    /// When nobody may serve after it.
    pub fn power_cut(&mut self) -> Result<(), Violation> {
        for again in 0.. {
            self.lose_power()?;
            if again < CUTS && self.random.bool() {
                self.records.lasts_for(self.random.u32(0..=4 * self.scenario.namespaces.len() as u32));
            }
            let recovery = self.recover();
            if self.records.lasted() {
                return self.start_again(&recovery?);
            }
            self.took(Fault::PowerCutInRecovery);
        }
        Ok(())
    }

    fn lose_power(&mut self) -> Result<(), Violation> {
        self.say(Event::PowerCut);
        self.tell()?;
        self.count_faults();
        (self.migration, self.swaps) = (None, None);
        for disk in self.disks.iter().flatten() {
            disk.power_cut();
            disk.forget_flights();
        }
        self.records.power_cut();
        self.count_faults();
        self.life += 1;
        Ok(())
    }

    /// Finds out who serves, and writes the closing record of a migration that was cut short.
    fn recover(&mut self) -> Result<Recovery, Violation> {
        let mut stores = self.stores()?;
        let records: Vec<_> = stores.iter().map(|store| store.current().map(|stored| stored.record)).collect();
        let recovery = recover(&records).map_err(|error| violation("records contradict each other", format!("{error}: {records:?}")))?;
        if let Some(record) = recovery.then {
            self.say(Event::RecordBegun(record));
            for store in &mut stores {
                store.write(record).map_err(|error| violation("records are lost", error.to_string()))?;
            }
            self.say(Event::RecordDurable(record));
        }
        Ok(recovery)
    }

    fn start_again(&mut self, recovery: &Recovery) -> Result<(), Violation> {
        let side = |end| ENDS.iter().position(|name| *name == end);
        let serving = recovery.serving().map_or(Some(0), side);
        self.serving = serving.ok_or_else(|| violation("records name nobody", format!("{recovery:?}")))?;
        self.next_migration = recovery.next_migration;
        let fenced = recovery.fenced().and_then(side);
        self.machines = [0, 1].map(|side: Side| Machine::new(side, &self.scenario, &self.disks[side], fenced == Some(side)));
        self.leg = Leg::default();
        self.say(Event::Restarted { serving: self.serving });
        self.move_in();
        self.tell()
    }
}
