//! How often each fault took effect and each state was reached, over all seeds of a run.

use super::fault::Fault;
use std::collections::BTreeMap;
use std::fmt;

/// Counts by name. What must be reached is there from the start, with a zero.
#[derive(Clone, Debug)]
pub struct Coverage {
    counts: BTreeMap<(Kind, String), u64>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A fault that took effect.
    Fault,
    /// A deviation of a device that was switched on and mattered.
    Deviation,
    /// A state of the migration, and the steps of its switch-over.
    State,
    /// A state that the migration was cancelled in, and how migrations ended.
    End,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::Deviation => "deviation",
            Self::State => "state",
            Self::End => "end",
        }
    }
}

impl Default for Coverage {
    fn default() -> Self {
        Self { counts: Fault::ALL.iter().map(|fault| ((Kind::Fault, format!("{fault:?}")), 0)).collect() }
    }
}

impl Coverage {
    /// Names that must be reached, beside the faults.
    pub fn expect(&mut self, kind: Kind, names: impl IntoIterator<Item = String>) {
        for name in names {
            self.counts.entry((kind, name)).or_insert(0);
        }
    }

    /// A fault took effect.
    pub fn fault(&mut self, fault: Fault) {
        self.hit(Kind::Fault, &format!("{fault:?}"));
    }

    /// Something was reached.
    pub fn hit(&mut self, kind: Kind, name: &str) {
        *self.counts.entry((kind, name.to_owned())).or_insert(0) += 1;
    }

    /// How many faults took effect in all.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.counts.iter().filter(|((kind, _), _)| matches!(kind, Kind::Fault)).map(|(_, count)| count).sum()
    }

    /// Adds what another seed has reached.
    pub fn add(&mut self, other: &Self) {
        for (key, count) in &other.counts {
            *self.counts.entry(key.clone()).or_insert(0) += count;
        }
    }

    /// What was never reached.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let zero = self.counts.iter().filter(|(_, count)| **count == 0);
        zero.map(|((kind, name), _)| format!("{} {name}", kind.name())).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = None;
        for ((kind, name), count) in &self.counts {
            if before != Some(*kind) {
                writeln!(f, "{}", kind.name())?;
                before = Some(*kind);
            }
            writeln!(f, "  {name:<44} {count:>9}")?;
        }
        Ok(())
    }
}
