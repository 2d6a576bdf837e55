//! One suite for whoever answers a role: native policies and components are held to the same.
//!
//! A suite opens many instances, asks them what a host may ask, and returns what it found wrong; an empty list is a pass. It is
//! ordinary code without a clock, for tests and for `dray plugin check`. What it looks at: every bound of the interface, the same
//! answer to the same question for the same seed, that nothing named is left out (cdq), that a migration ends (copy), that saved
//! state, and garbage in its place, does no harm.

mod cdq;
mod copy;
mod tracking;

pub use cdq::suite_cdq;
pub use copy::suite_copy;
pub use tracking::suite_tracking;

use crate::packed::REGION_BYTES;
use crate::role::Role;
use crate::seam::{Factory, MAX_NAMESPACES, MAX_REGIONS, NamespaceInfo, Opening, Policy, Setup};

/// Something that a policy does wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was tried.
    pub case: String,
    /// What went wrong.
    pub what: String,
}

impl core::fmt::Display for Finding {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}: {}", self.case, self.what)
    }
}

/// Most findings of one suite; more of the same helps nobody.
const MAX_FINDINGS: usize = 20;

/// Two instances that are asked the same, and what they did wrong.
struct Bench<'a, R: Role> {
    factory: &'a mut dyn Factory<R>,
    findings: Vec<Finding>,
    case: String,
    opening: Option<Opening<R>>,
    pair: Option<[Box<dyn Policy<R>>; 2]>,
}

impl<'a, R: Role> Bench<'a, R> {
    fn new(factory: &'a mut dyn Factory<R>) -> Self {
        Self { factory, findings: Vec::new(), case: String::new(), opening: None, pair: None }
    }

    fn found(&mut self, what: impl Into<String>) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { case: self.case.clone(), what: what.into() });
        }
    }

    /// Opens two instances for a case.
    fn begin(&mut self, case: String, opening: Opening<R>) {
        self.case = case;
        self.pair = None;
        let one = self.factory.open(&opening, None);
        let two = self.factory.open(&opening, None);
        match (one, two) {
            (Ok(one), Ok(two)) => self.pair = Some([one, two]),
            (Err(fault), _) | (_, Err(fault)) => self.found(format!("does not open: {fault}")),
        }
        self.opening = Some(opening);
    }

    /// Asks both; a valid answer that both gave, or nothing. After a fault the case is over.
    fn ask(&mut self, request: &R::Request) -> Option<R::Answer> {
        let opening = self.opening.as_ref()?;
        let pair = self.pair.as_mut()?;
        let mut answers = [R::Answer::default(), R::Answer::default()];
        for (policy, answer) in pair.iter_mut().zip(&mut answers) {
            R::clear(answer);
            let called = policy.call(request, answer);
            let valid = called.and_then(|()| R::check(&opening.setup, &opening.extra, request, answer));
            if let Err(fault) = valid {
                self.pair = None;
                self.found(fault.to_string());
                return None;
            }
        }
        let [one, two] = answers;
        if one != two {
            self.found("two instances with the same seed answer the same question differently");
        }
        Some(one)
    }

    /// Saves one instance, opens others with that and with garbage: each must open and answer.
    fn state(&mut self, request: &R::Request) {
        let (Some(opening), Some(mut pair)) = (self.opening.clone(), self.pair.take()) else { return };
        let saved = match pair[0].save() {
            Ok(saved) => saved,
            Err(fault) => return self.found(format!("save: {fault}")),
        };
        let Some(saved) = saved else { return };
        if saved.len() > crate::seam::MAX_STATE_BYTES {
            self.found(format!("{} bytes of state, at most {}", saved.len(), crate::seam::MAX_STATE_BYTES));
        }
        let mut torn = saved.clone();
        torn.truncate(saved.len() / 2);
        let flipped: Vec<u8> = saved.iter().map(|byte| !byte).collect();
        let case = self.case.clone();
        let states = [("its own state", saved), ("torn state", torn), ("flipped state", flipped), ("garbage", vec![0xa5; 4096])];
        for (name, bytes) in states.into_iter().chain([("empty state", Vec::new())]) {
            self.case = format!("{case}, opened with {name}");
            let (one, two) = (self.factory.open(&opening, Some(&bytes)), self.factory.open(&opening, Some(&bytes)));
            match (one, two) {
                (Ok(one), Ok(two)) => self.pair = Some([one, two]),
                (Err(fault), _) | (_, Err(fault)) => self.found(format!("does not open: {fault}")),
            }
            self.ask(request);
        }
        self.case = case;
    }
}

/// A small generator of numbers, so that a suite is the same everywhere (xorshift64*).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`; 0 for a bound of 0.
    fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }
}

/// The set-ups that every suite runs through, with a name each.
fn setups() -> Vec<(String, Setup)> {
    let of = |name: &str, seed, regions: usize, namespaces: Vec<(u32, u64, u32)>| {
        let setup = Setup {
            migration: 7,
            seed,
            now_us: 1000,
            namespaces: namespaces
                .into_iter()
                .map(|(nsid, blocks, block_bytes)| NamespaceInfo { nsid, blocks, block_bytes })
                .collect(),
            regions: regions as u32,
            region_bytes: REGION_BYTES as u32,
            settings: Vec::new(),
        };
        (name.to_owned(), setup)
    };
    let many = (0..MAX_NAMESPACES as u32).map(|index| (index * 3 + 1, 64 + u64::from(index % 7), 4096)).collect();
    vec![
        of("one region of 4096-byte blocks", 1, 1, vec![(1, 1024, 4096)]),
        of("512-byte blocks, last region cut", 2, 16, vec![(1, 16 * 256 - 5, 512)]),
        of("two namespaces of different blocks", 3, 24, vec![(3, 4096, 512), (0xffff_fff0, 2048, 4096)]),
        of("a namespace of one block", 4, 1, vec![(9, 1, 4096)]),
        of("1,024 namespaces", 5, MAX_NAMESPACES, many),
        of("4,096 regions", 6, MAX_REGIONS, vec![(1, 4096 * 16, 4096)]),
        of("16 TiB", u64::MAX, MAX_REGIONS, vec![(1, 1 << 32, 4096)]),
    ]
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
