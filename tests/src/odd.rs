//! Policies that do as a test wants, and seats that answer late or never.

use dray_policy::packed::{Choice, Compression, Extent, Range, Region, regions};
use dray_policy::role::{Cdq, Copy, Role};
use dray_policy::seam::{Exchange, Factory, Fault, Identity, Opening, Policy, Seat, SeatStats};
use dray_policy::udmq;

/// What an instance does when it is asked.
pub type Decide<R> = Box<dyn FnMut(&<R as Role>::Request, &mut <R as Role>::Answer) -> Result<(), Fault> + Send>;
/// What makes the instances.
pub type Make<R> = Box<dyn FnMut(&Opening<R>) -> Decide<R> + Send>;

/// A policy made of a closure.
pub struct Odd<R: Role> {
    identity: Identity,
    make: Make<R>,
}

impl<R: Role> Odd<R> {
    /// The factory of instances that `make` makes.
    #[must_use]
    pub fn boxed(name: &str, make: impl FnMut(&Opening<R>) -> Decide<R> + Send + 'static) -> Box<dyn Factory<R>> {
        let identity = Identity { component: format!("test:{name}"), sha256: String::new() };
        Box::new(Self { identity, make: Box::new(make) })
    }
}

struct Instance<R: Role>(Decide<R>);

impl<R: Role> Policy<R> for Instance<R> {
    fn call(&mut self, request: &R::Request, answer: &mut R::Answer) -> Result<(), Fault> {
        (self.0)(request, answer)
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        Ok(None)
    }
}

impl<R: Role> Factory<R> for Odd<R> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&mut self, opening: &Opening<R>, _saved: Option<&[u8]>) -> Result<Box<dyn Policy<R>>, Fault> {
        Ok(Box::new(Instance::<R>((self.make)(opening))))
    }
}

/// A `cdq` policy that gives every entry back and returns only the ranges that `keep` keeps.
#[must_use]
pub fn forgetful(keep: impl FnMut(&Range) -> bool + Clone + Send + 'static) -> Box<dyn Factory<Cdq>> {
    Odd::boxed("forgetful", move |opening: &Opening<Cdq>| {
        let stride = opening.extra.entry_bytes;
        let mut keep = keep.clone();
        Box::new(move |request, answer| {
            let entries = udmq::entries(&request.entries, stride);
            for entry in entries {
                if let dray_nvme::cdq::Changed::Range { nsid, slba, blocks } = entry.changed() {
                    let range = Range { slba, blocks: blocks as u32, deallocated: false, nsid };
                    if keep(&range) {
                        range.push(&mut answer.ranges);
                    }
                }
            }
            answer.consumed = (request.entries.len() / stride as usize) as u32;
            Ok(())
        })
    })
}

/// A `copy` policy that orders what `pick` makes of the dirty regions, and wishes to switch over when the budget allows it.
#[must_use]
pub fn ordering(pick: impl FnMut(Vec<Region>) -> Vec<Extent> + Clone + Send + 'static) -> Box<dyn Factory<Copy>> {
    Odd::boxed("ordering", move |_: &Opening<Copy>| {
        let mut pick = pick.clone();
        Box::new(move |request, answer| {
            if request.queued_blocks == 0 {
                let dirty = regions(&request.regions).filter(|region| region.dirty > 0).collect();
                pick(dirty).into_iter().for_each(|extent| extent.push(&mut answer.extents));
            }
            if request.downtime_estimate_us <= request.downtime_budget_us {
                answer.then = dray_policy::role::Then::SwitchOver;
            }
            answer.wait_us = 200;
            Ok(())
        })
    })
}

/// The whole of a region.
#[must_use]
pub fn whole(region: &Region) -> Extent {
    let blocks = u32::try_from(region.blocks).unwrap_or(u32::MAX >> 2);
    Extent { slba: region.slba, blocks, compression: Compression::PLAIN, nsid: region.nsid }
}

/// A plan byte.
#[must_use]
pub fn choice(chunk_log2: u8, hold: bool) -> u8 {
    Choice { chunk_log2, hold }.pack()
}

/// A seat that hands over each answer only at the given poll after the question; at none of them if that is `u32::MAX`.
pub struct Late<R: Role> {
    inner: Box<dyn Seat<R>>,
    polls: u32,
    left: u32,
}

impl<R: Role> Late<R> {
    /// A late seat over another one.
    #[must_use]
    pub fn boxed(inner: Box<dyn Seat<R>>, polls: u32) -> Box<dyn Seat<R>> {
        Box::new(Self { inner, polls, left: 0 })
    }
}

impl<R: Role> Seat<R> for Late<R> {
    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn open(&mut self, opening: Opening<R>) {
        self.inner.open(opening);
    }

    fn ask(&mut self, exchange: Box<Exchange<R>>) {
        self.left = self.polls;
        self.inner.ask(exchange);
    }

    fn poll(&mut self) -> Option<Box<Exchange<R>>> {
        if self.left == u32::MAX {
            return None;
        }
        self.left = self.left.saturating_sub(1);
        if self.left > 0 { None } else { self.inner.poll() }
    }

    fn stats(&self) -> SeatStats {
        self.inner.stats()
    }
}
