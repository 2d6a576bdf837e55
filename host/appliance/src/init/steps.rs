//! How the time of a start is made up.

use std::fmt::{self, Display, Formatter};

/// The steps of a start, each with its time in milliseconds; one that is done in parts counts once.
#[derive(Clone, Debug)]
pub struct Steps {
    last_ms: u64,
    steps: Vec<(&'static str, u64)>,
}

impl Steps {
    /// None yet; the first begins at this time.
    #[must_use]
    pub fn since(now_ms: u64) -> Self {
        Self { last_ms: now_ms, steps: Vec::new() }
    }

    /// A step, or a part of it, ends now.
    pub fn done(&mut self, what: &'static str, now_ms: u64) {
        let took = now_ms.saturating_sub(self.last_ms);
        self.last_ms = now_ms;
        match self.steps.iter_mut().find(|(known, _)| *known == what) {
            Some((_, total)) => *total += took,
            None => self.steps.push((what, took)),
        }
    }
}

impl Display for Steps {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (at, (what, took)) in self.steps.iter().enumerate() {
            write!(f, "{}{what} {took}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_step_are_added_up_and_all_steps_are_the_whole() {
        let mut steps = Steps::since(1000);
        for (what, at) in [("modules", 1300), ("network", 1310), ("modules", 1500), ("appliance", 1600)] {
            steps.done(what, at);
        }
        assert_eq!(steps.to_string(), "modules 490, network 10, appliance 100");
        assert_eq!(steps.steps.iter().map(|(_, took)| took).sum::<u64>(), 600);
    }
}
