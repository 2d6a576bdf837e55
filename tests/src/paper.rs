//! A journal in memory that takes its time, fails when it is told to, and remembers who serves.

use dray_device::poll::Time;
use dray_migration::{Journal, JournalError, Owner, Record};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Sheet {
    now: Time,
    delay_us: u64,
    /// Records that fail from now on, only those that name this owner if one is named.
    failing: (u32, Option<Owner>),
    pending: Option<(Record, Time)>,
    /// Durable records.
    records: Vec<Record>,
    /// Records that were not written in the end.
    failed: Vec<Record>,
    /// Who serves by the last durable record of this migration; the source before the first.
    durable: Option<Owner>,
    /// A record that failed may be there all the same.
    unsure: bool,
}

/// The journal as the test has it. Clones are the same journal.
#[derive(Clone, Debug, Default)]
pub struct Paper {
    sheet: Arc<Mutex<Sheet>>,
}

impl Paper {
    fn sheet(&self) -> MutexGuard<'_, Sheet> {
        self.sheet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A record takes so long from now on, µs.
    pub fn set_delay_us(&self, delay_us: u64) {
        self.sheet().delay_us = delay_us;
    }

    /// The next records fail; with `owner` only those that name it.
    pub fn fail(&self, records: u32, owner: Option<Owner>) {
        self.sheet().failing = (records, owner);
    }

    /// The durable records.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.sheet().records.clone()
    }

    /// A record that is being written.
    #[must_use]
    pub fn pending(&self) -> Option<Record> {
        self.sheet().pending.map(|(record, _)| record)
    }

    /// Records that failed.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.sheet().failed.len()
    }

    pub(crate) fn tick(&self, now: Time) {
        self.sheet().now = now;
    }

    /// A migration begins: the source serves.
    pub(crate) fn begin(&self) {
        let mut sheet = self.sheet();
        (sheet.durable, sheet.pending, sheet.unsure) = (None, None, false);
    }

    /// It has ended, and what is called the source is the side that serves.
    pub(crate) fn settle(&self, moved: bool) {
        let mut sheet = self.sheet();
        let durable = sheet.durable.unwrap_or(Owner::Source);
        assert_eq!(durable == Owner::Destination, moved, "the record contradicts the outcome: {:?}", sheet.records);
        (sheet.durable, sheet.pending, sheet.unsure) = (None, None, false);
    }

    /// Who may take commands: nobody while a record is being written that changes it, unless somebody ends suspensions
    /// (`loose`); then who did before.
    pub(crate) fn serving(&self, loose: bool) -> Option<Owner> {
        let sheet = self.sheet();
        let durable = sheet.durable.unwrap_or(Owner::Source);
        if loose {
            return Some(durable);
        }
        let changing = sheet.pending.is_some_and(|(record, _)| record.owner != durable);
        (!changing && !sheet.unsure).then_some(durable)
    }

    /// What relies on a record must find it durable.
    pub(crate) fn expect(&self, what: &str, owner: Owner) {
        let sheet = self.sheet();
        let durable = sheet.durable.unwrap_or(Owner::Source);
        assert!(durable == owner && !sheet.unsure && sheet.pending.is_none(), "{what} before the record is durable: {:?}", sheet.records);
    }
}

impl Journal for Paper {
    fn write(&mut self, record: &Record) {
        let mut sheet = self.sheet();
        assert!(sheet.pending.is_none(), "one record at a time");
        let due = sheet.now.after_us(sheet.delay_us);
        sheet.pending = Some((*record, due));
    }

    fn poll(&mut self) -> Option<Result<(), JournalError>> {
        let mut sheet = self.sheet();
        let (record, due) = sheet.pending?;
        if sheet.now < due {
            return None;
        }
        sheet.pending = None;
        let (left, owner) = sheet.failing;
        if left > 0 && owner.is_none_or(|owner| owner == record.owner) {
            sheet.failing.0 -= 1;
            sheet.failed.push(record);
            sheet.unsure |= record.owner != sheet.durable.unwrap_or(Owner::Source);
            return Some(Err(JournalError("no space left".to_owned())));
        }
        sheet.records.push(record);
        (sheet.durable, sheet.unsure) = (Some(record.owner), false);
        Some(Ok(()))
    }
}
