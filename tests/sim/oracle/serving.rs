//! Exactly one side takes a guest's commands: the one that the durable record names, never behind its fence, and nobody while it
//! is being written, or not known, who that is (rules 7 to 9).

use super::violation;
use super::super::event::{Event, Side, Violation, owner_of};
use dray_migration::Outcome;

/// Who may serve.
#[derive(Debug, Default)]
pub struct Serving {
    /// By the last durable record.
    owner: Side,
    /// The ends of the present migration.
    ends: Option<(Side, Side)>,
    /// A record is being written that names this side.
    pending: Option<Side>,
    /// A record that names this side was not written for certain.
    unsure: Option<Side>,
    fenced: [bool; 2],
    /// The power is off.
    off: bool,
}

impl Serving {
    /// The side that serves by the last durable record.
    #[must_use]
    pub fn owner(&self) -> Side {
        self.owner
    }

    /// That side's fence is up.
    #[must_use]
    pub fn is_fenced(&self, side: Side) -> bool {
        self.fenced[side]
    }

    /// Source and destination while a migration runs.
    #[must_use]
    pub fn ends(&self) -> Option<(Side, Side)> {
        self.ends
    }

    /// What the disk of the records may say.
    fn may_be(&self, side: Side) -> bool {
        side == self.owner || self.pending == Some(side) || self.unsure == Some(side)
    }

    /// It is certain that nobody else may.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        (0..2).all(|side| side == self.owner || !self.may_be(side))
    }

    /// Something happened.
    ///
    /// # Errors
    /// When a side serves that must not.
    pub fn see(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::Begins { from, to } => {
                if *from != self.owner {
                    return Err(violation("one side serves", format!("side {from} is moved from, and side {} serves", self.owner)));
                }
                self.ends = Some((*from, *to));
            }
            Event::Fence { side, up } => self.fenced[*side] = *up,
            Event::Fetched { side, guest } => return self.fetched(*side, *guest),
            Event::RecordBegun(record) => {
                let side = owner_of(record).ok_or_else(|| violation("records", format!("it names nobody: {record:?}")))?;
                if self.off && !self.may_be(side) {
                    return Err(violation("one side serves", format!("after the power cut side {side} is recorded, and side {} served", self.owner)));
                }
                self.pending = Some(side);
            }
            Event::RecordDurable(record) => {
                self.owner = owner_of(record).unwrap_or(self.owner);
                (self.pending, self.unsure) = (None, None);
            }
            Event::RecordFailed(record) => {
                self.pending = None;
                self.unsure = owner_of(record).filter(|side| *side != self.owner).or(self.unsure);
            }
            Event::Over { outcome } => return self.over(outcome),
            Event::PowerCut => self.off = true,
            Event::Restarted { serving } => {
                if !self.may_be(*serving) {
                    return Err(violation("one side serves", format!("side {serving} serves after the power cut, and side {} did before", self.owner)));
                }
                *self = Self { owner: *serving, ..Self::default() };
            }
            Event::Rest { side, .. } if *side != self.owner => {
                return Err(violation("one side serves", format!("side {side} serves at rest, and side {} does by the record", self.owner)));
            }
            _ => {}
        }
        Ok(())
    }

    fn fetched(&self, side: Side, guest: usize) -> Result<(), Violation> {
        let why = if self.fenced[side] {
            "behind its fence"
        } else if side != self.owner {
            "and the durable record names the other"
        } else if !self.is_settled() {
            "and a record that names the other may be durable"
        } else {
            return Ok(());
        };
        Err(violation("one side serves", format!("side {side} takes commands of guest {guest}, {why}")))
    }

    fn over(&mut self, outcome: &Outcome) -> Result<(), Violation> {
        let Some((from, to)) = self.ends.take() else { return Ok(()) };
        let wanted = match outcome {
            Outcome::Moved => to,
            Outcome::Undone(_) => from,
            Outcome::Running | Outcome::InDoubt { .. } => return Ok(()),
        };
        if wanted == self.owner && self.is_settled() {
            return Ok(());
        }
        Err(violation("one side serves", format!("the migration ended as {outcome:?}, and the record may name another side")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use super::super::super::event::ENDS;
    use dray_migration::{Owner, Record, RecordPhase};

    fn record(owner: Owner, phase: RecordPhase) -> Record {
        Record { migration: 1, from: ENDS[0], to: ENDS[1], epoch: 1, owner, phase, fenced: owner == Owner::Destination }
    }

    fn all(events: &[Event]) -> Result<(), Violation> {
        let mut serving = Serving::default();
        events.iter().try_for_each(|event| serving.see(event))
    }

    const BEGINS: Event = Event::Begins { from: 0, to: 1 };
    const AT: [Event; 2] = [Event::Fetched { side: 0, guest: 0 }, Event::Fetched { side: 1, guest: 0 }];

    #[test]
    fn the_record_decides_who_fetches() {
        let moved = record(Owner::Destination, RecordPhase::Moved);
        let [begun, durable, failed] = [Event::RecordBegun(moved), Event::RecordDurable(moved), Event::RecordFailed(moved)];
        let fence = |up| Event::Fence { side: 0, up };
        let [at_a, at_b] = AT;
        let over = Event::Over { outcome: Outcome::Moved };
        let ok = [BEGINS, at_a.clone(), fence(true), begun.clone(), durable.clone(), at_b.clone(), over.clone()];
        all(&ok).expect("a move");
        let bad: [&[Event]; 6] = [
            &[BEGINS, at_b.clone()],
            &[BEGINS, fence(true), at_a.clone()],
            &[BEGINS, begun.clone(), at_a.clone()],
            &[BEGINS, begun.clone(), durable, at_a.clone()],
            &[BEGINS, begun.clone(), failed.clone(), at_a.clone()],
            &[BEGINS, over],
        ];
        for events in bad {
            assert!(all(events).is_err(), "{events:?}");
        }
        let undo = record(Owner::Source, RecordPhase::Copying);
        let undone = [BEGINS, begun, failed, Event::RecordBegun(undo), Event::RecordDurable(undo), at_a];
        all(&undone).expect("an undo");
    }

    #[test]
    fn a_restart_goes_by_what_the_disk_may_say() {
        let moved = record(Owner::Destination, RecordPhase::Moved);
        let restarted = |serving| Event::Restarted { serving };
        let [at_a, at_b] = AT;
        for (serving, at) in [(0, at_a), (1, at_b)] {
            all(&[BEGINS, Event::RecordBegun(moved), Event::PowerCut, restarted(serving), at]).expect("either");
        }
        let durable = [BEGINS, Event::RecordBegun(moved), Event::RecordDurable(moved), Event::PowerCut, restarted(0)];
        assert!(all(&durable).is_err());
        assert!(all(&[BEGINS, Event::PowerCut, restarted(1)]).is_err());
        let done = record(Owner::Destination, RecordPhase::Done);
        assert!(all(&[BEGINS, Event::PowerCut, Event::RecordBegun(done)]).is_err());
    }
}
