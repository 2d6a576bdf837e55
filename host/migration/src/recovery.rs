//! What a process does at its start with the records that it finds: who serves, who stays fenced, what is written next.
//!
//! Pure: the appliance and the simulator hand in what their stores hold. There is a record for each namespace of the migration
//! set, and a crash between two writes leaves them different, so they are read together:
//!
//! - the destination serves only if the record of **every** namespace, of one and the same migration, names it: Resume waits for
//!   all of them to be durable, so with one missing the destination has never run. Its source stays fenced;
//! - in every other case the source serves, as it did before and alone; what the destination holds is worthless, and the next
//!   attempt starts from a complete map (rule 10);
//! - an unfinished migration is closed by one more record ([`Recovery::then`]) before anything else begins: "done" where the
//!   destination serves, "undone" where the source does;
//! - in a media move the ends are backings: the one that serves is opened behind the namespace, the fenced one is not used, and
//!   the controllers, which are the same either way, are built with their fences down;
//! - what no order of writes can leave behind is a [`Contradiction`], for the operator to decide: nobody serves.

use crate::hooks::{EndId, Owner, Record, RecordPhase};

/// Records that no crash can have left so: a store was lost, copied back or mixed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// A record's owner is not that of its phase.
    #[error("the record of migration {0} names an owner that its phase cannot have")]
    Owner(u64),
    /// Two records of one migration name different ends.
    #[error("the records of migration {0} name different ends")]
    Ends(u64),
    /// One namespace is done, another is not where it must have been before.
    #[error("migration {0} is done for one namespace, and another has no record that it was moved")]
    HalfDone(u64),
    /// A namespace that the newest migration has not reached yet was served by another end than its source.
    #[error("migration {newest} started where migration {older} has left another namespace elsewhere")]
    Elsewhere {
        /// The newest migration.
        newest: u64,
        /// The other namespace's.
        older: u64,
    },
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The newest migration; 0 = there was none.
    pub migration: u64,
    /// How far the whole set is in it; `None` = there was none.
    pub phase: Option<RecordPhase>,
    /// Which of its ends serves.
    pub owner: Owner,
    /// Its source and its destination.
    pub ends: [EndId; 2],
    /// The record to write for every namespace, and to flush, before any controller may fetch.
    pub then: Option<Record>,
    /// The number of the next migration.
    pub next_migration: u64,
    /// What was found and what follows, in words that come after the phase.
    pub why: &'static str,
}

impl Recovery {
    /// The end that serves; `None` = the one that the configuration starts from, since nothing has ever moved.
    #[must_use]
    pub fn serving(&self) -> Option<EndId> {
        self.phase.map(|_| match self.owner {
            Owner::Source => self.ends[0],
            Owner::Destination => self.ends[1],
        })
    }

    /// The end whose controllers are to be built behind a raised fence (rule 9); in a media move the backing that is retired.
    #[must_use]
    pub fn fenced(&self) -> Option<EndId> {
        (self.owner == Owner::Destination).then_some(self.ends[0])
    }
}

/// Reads the records of a migration set together, one place for each of its namespaces; `None` = it has none.
///
/// # Errors
/// [`Contradiction`]: nothing may be served until an operator has decided.
pub fn recover(records: &[Option<Record>]) -> Result<Recovery, Contradiction> {
    let Some(newest) = records.iter().flatten().max_by_key(|record| record.migration) else {
        return Ok(Recovery {
            migration: 0,
            phase: None,
            owner: Owner::Source,
            ends: [[0; 16]; 2],
            then: None,
            next_migration: 1,
            why: "nothing was ever moved: the source serves",
        });
    };
    let migration = newest.migration;
    check(records, newest)?;
    let of_it: Vec<_> = records.iter().flatten().filter(|record| record.migration == migration).collect();
    let everywhere = of_it.len() == records.len();
    let all = |phase| everywhere && of_it.iter().all(|record| record.phase == phase);
    let any = |phase| of_it.iter().any(|record| record.phase == phase);
    let moved = everywhere && of_it.iter().all(|record| record.owner == Owner::Destination);
    if any(RecordPhase::Done) && !moved {
        return Err(Contradiction::HalfDone(migration));
    }
    let (phase, why) = if all(RecordPhase::Done) {
        (RecordPhase::Done, "the destination serves, the source stays fenced")
    } else if moved {
        (RecordPhase::Moved, "the destination serves, the source stays fenced")
    } else if all(RecordPhase::Undone) {
        (RecordPhase::Undone, "the source serves")
    } else if any(RecordPhase::Moved) {
        (RecordPhase::Copying, "moved for a part of the namespaces only: undone, the source serves; the next attempt copies everything")
    } else {
        (RecordPhase::Copying, "undone, the source serves; the next attempt copies everything")
    };
    let closing = if moved { RecordPhase::Done } else { RecordPhase::Undone };
    let owner = if moved { Owner::Destination } else { Owner::Source };
    let epoch = of_it.iter().map(|record| record.epoch).max().unwrap_or(0).saturating_add(1);
    let then = (phase != closing).then_some(Record { epoch, owner, phase: closing, fenced: moved, ..*newest });
    let next_migration = migration.saturating_add(1);
    Ok(Recovery { migration, phase: Some(phase), owner, ends: [newest.from, newest.to], then, next_migration, why })
}

/// What no crash can leave behind, but for "done" beside "not moved".
fn check(records: &[Option<Record>], newest: &Record) -> Result<(), Contradiction> {
    for record in records.iter().flatten() {
        let moved = matches!(record.phase, RecordPhase::Moved | RecordPhase::Done);
        if moved != (record.owner == Owner::Destination) || moved != record.fenced {
            return Err(Contradiction::Owner(record.migration));
        }
        if record.migration == newest.migration {
            if (record.from, record.to) != (newest.from, newest.to) {
                return Err(Contradiction::Ends(newest.migration));
            }
            continue;
        }
        // It was closed before the newest began, so it says by itself who served then.
        let (served, named) = (if moved { record.to } else { record.from }, record.from != record.to);
        if named && served != newest.from {
            return Err(Contradiction::Elsewhere { newest: newest.migration, older: record.migration });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
