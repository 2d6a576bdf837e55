//! Secondary controllers: which resources a primary controller can hand out, and in which steps they get them (Base 2.3 §8.2.6).
//!
//! A plan is made out of what the controller says ([`plan`]) and is a list of commands; who sends them (this driver, or the
//! kernel's through its passthrough) is the caller's. Secondary controllers go offline when their primary one is reset or
//! disabled: whoever drives it must stay.

use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::SecondaryController;
use dray_nvme::virtualization::{FlexibleResources, PrimaryCapabilities, ResourceType, VirtualizationAction};
use std::fmt;

/// Queues that a controller needs: an admin queue pair and one for I/O.
const LEAST_QUEUES: u32 = 2;
/// Interrupts that it needs.
const LEAST_INTERRUPTS: u32 = 1;

/// Why so many secondary controllers cannot be given what they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// There are not as many.
    #[error("the controller has {have} secondary controllers, not {wanted}")]
    TooFew {
        /// Those it has.
        have: usize,
        /// Those asked for.
        wanted: u16,
    },
    /// Not enough flexible resources.
    #[error("{have} flexible {kind} are not enough for {wanted} secondary controllers: each needs {each}")]
    NotEnough {
        /// Of which kind.
        kind: ResourceType,
        /// How many there are.
        have: u32,
        /// Controllers.
        wanted: u16,
        /// How many each needs.
        each: u32,
    },
}

/// What each secondary controller gets, and the commands for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Flexible resources that the primary controller gives back first, which takes effect with its next reset: kind, how many it
    /// keeps.
    pub primary: Vec<(ResourceType, u16)>,
    /// The secondary controllers, by their virtual function's number.
    pub secondaries: Vec<Share>,
}

/// One secondary controller's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its CNTLID.
    pub cntlid: u16,
    /// Number of its virtual function, from 1.
    pub function: u16,
    /// Queues it gets (the admin queue pair counts); 0 = its number is not flexible.
    pub queues: u16,
    /// Interrupts it gets; 0 = see there.
    pub interrupts: u16,
    /// It is online now.
    pub online: bool,
}

/// One Virtualization Management command, in words and as it is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub act: VirtualizationAction,
    /// For whom.
    pub cntlid: u16,
    /// Which resources, for actions that have some.
    pub kind: ResourceType,
    /// How many.
    pub count: u16,
}

impl Step {
    /// The command.
    #[must_use]
    pub fn entry(&self) -> SubmissionEntry {
        SubmissionEntry::virtualization(self.act, self.cntlid, self.kind, self.count)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of controller {}", self.act, self.cntlid)?;
        match self.act {
            VirtualizationAction::PRIMARY_ALLOCATION | VirtualizationAction::SECONDARY_ASSIGN => write!(f, ": {} {}", self.count, self.kind),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Plan {
    /// The commands that make the primary controller give resources back. Behind them it must be reset.
    #[must_use]
    pub fn release(&self, primary: u16) -> Vec<Step> {
        let step = |&(kind, count): &(ResourceType, u16)| Step { act: VirtualizationAction::PRIMARY_ALLOCATION, cntlid: primary, kind, count };
        self.primary.iter().map(step).collect()
    }
}

impl Share {
    /// The commands that take the controller offline and give it its resources.
    #[must_use]
    pub fn assign(&self) -> Vec<Step> {
        let kinds = [(ResourceType::VQ, self.queues), (ResourceType::VI, self.interrupts)];
        let given = kinds.into_iter().filter(|(_, count)| *count > 0);
        let assign = given.map(|(kind, count)| Step { act: VirtualizationAction::SECONDARY_ASSIGN, cntlid: self.cntlid, kind, count });
        self.online.then(|| self.offline()).into_iter().chain(assign).collect()
    }

    /// The command that brings it online.
    #[must_use]
    pub fn online(&self) -> Step {
        self.simple(VirtualizationAction::SECONDARY_ONLINE)
    }

    /// The command that takes it offline.
    #[must_use]
    pub fn offline(&self) -> Step {
        self.simple(VirtualizationAction::SECONDARY_OFFLINE)
    }

    fn simple(&self, act: VirtualizationAction) -> Step {
        Step { act, cntlid: self.cntlid, kind: ResourceType::VQ, count: 0 }
    }
}

/// The commands that take all secondary controllers offline, and their resources from them.
#[must_use]
pub fn take_all(secondaries: &[SecondaryController]) -> Vec<Step> {
    let mut steps = Vec::new();
    for one in secondaries {
        let step = |act, kind| Step { act, cntlid: one.scid, kind, count: 0 };
        if one.is_online() {
            steps.push(step(VirtualizationAction::SECONDARY_OFFLINE, ResourceType::VQ));
        }
        let kinds = [(ResourceType::VQ, one.nvq), (ResourceType::VI, one.nvi)];
        let held = kinds.into_iter().filter(|(_, held)| *held > 0);
        steps.extend(held.map(|(kind, _)| step(VirtualizationAction::SECONDARY_ASSIGN, kind)));
    }
    steps
}

/// Shares the primary controller's flexible resources out to its first `count` secondary controllers, evenly. What other
/// secondary controllers hold stays theirs.
///
/// # Errors
/// [`PlanError`].
pub fn plan(capabilities: &PrimaryCapabilities, secondaries: &[SecondaryController], count: u16) -> Result<Plan, PlanError> {
    let mut chosen: Vec<&SecondaryController> = secondaries.iter().filter(|one| (1..=count).contains(&one.vfn)).collect();
    chosen.sort_by_key(|one| one.vfn);
    if chosen.len() != usize::from(count) {
        return Err(PlanError::TooFew { have: secondaries.len(), wanted: count });
    }
    let mut plan = Plan::default();
    let mut each = [0; 2];
    for (at, (kind, least)) in [(ResourceType::VQ, LEAST_QUEUES), (ResourceType::VI, LEAST_INTERRUPTS)].into_iter().enumerate() {
        let Some(resources) = capabilities.resources(kind) else { continue };
        let held = |one: &SecondaryController| u32::from(if kind == ResourceType::VQ { one.nvq } else { one.nvi });
        let others = secondaries.iter().filter(|one| !(1..=count).contains(&one.vfn)).map(held).sum();
        let share = share(resources, others, count).filter(|share| *share >= least);
        let share = share.ok_or(PlanError::NotEnough { kind, have: resources.total.saturating_sub(others), wanted: count, each: least })?;
        each[at] = share as u16;
        let left = resources.total.saturating_sub(others).saturating_sub(share * u32::from(count));
        let keeps = left.min(u32::from(resources.primary)) as u16;
        if u32::from(resources.primary) > left {
            plan.primary.push((kind, keeps - keeps % resources.granularity.max(1)));
        }
    }
    plan.secondaries = chosen
        .iter()
        .map(|one| Share { cntlid: one.scid, function: one.vfn, queues: each[0], interrupts: each[1], online: one.is_online() })
        .collect();
    Ok(plan)
}

/// How many of a kind each of `count` controllers gets; `None` when there is none.
fn share(resources: &FlexibleResources, others: u32, count: u16) -> Option<u32> {
    let most = if resources.secondary_max == 0 { u32::MAX } else { u32::from(resources.secondary_max) };
    let even = resources.total.saturating_sub(others).checked_div(u32::from(count))?.min(most).min(u32::from(u16::MAX));
    let granularity = u32::from(resources.granularity.max(1));
    // Numbers that are no multiples are allowed; one that rounding would bring to nothing stays.
    Some(if even >= granularity { even - even % granularity } else { even })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    fn capabilities(queues: FlexibleResources, interrupts: FlexibleResources) -> PrimaryCapabilities {
        let mut page = PrimaryCapabilities::new_zeroed();
        (page.crt, page.queues, page.interrupts) = (3, queues, interrupts);
        page
    }

    fn secondaries(count: u16) -> Vec<SecondaryController> {
        (1..=count).map(|n| SecondaryController { scid: 10 + n, vfn: n, ..Default::default() }).collect()
    }

    #[test]
    fn the_primary_gives_back_what_the_others_get() {
        // As QEMU's drive begins: all flexible resources are the primary controller's.
        let queues = FlexibleResources { total: 10, primary: 10, secondary_max: 4, granularity: 1, ..Default::default() };
        let interrupts = FlexibleResources { total: 5, primary: 5, secondary_max: 2, ..Default::default() };
        let plan = plan(&capabilities(queues, interrupts), &secondaries(4), 2).expect("enough");
        assert_eq!(plan.primary, [(ResourceType::VQ, 2), (ResourceType::VI, 1)]);
        let share = Share { cntlid: 11, function: 1, queues: 4, interrupts: 2, online: false };
        assert_eq!(plan.secondaries, [share, Share { cntlid: 12, function: 2, ..share }]);
        let words: Vec<_> = plan.release(1).iter().chain(&share.assign()).chain([&share.online()]).map(ToString::to_string).collect();
        let wanted = [
            "Primary Controller Flexible Allocation of controller 1: 2 VQ resources (queues)",
            "Primary Controller Flexible Allocation of controller 1: 1 VI resources (interrupts)",
            "Secondary Controller Assign of controller 11: 4 VQ resources (queues)",
            "Secondary Controller Assign of controller 11: 2 VI resources (interrupts)",
            "Secondary Controller Online of controller 11",
        ];
        assert_eq!(words, wanted);
        assert_eq!(Share { online: true, ..share }.assign()[0].act, VirtualizationAction::SECONDARY_OFFLINE);
    }

    #[test]
    fn what_is_free_is_used_without_a_reset() {
        let free = FlexibleResources { total: 8, primary: 2, ..Default::default() };
        let plan = plan(&capabilities(free, free), &secondaries(3), 3).expect("enough");
        assert!(plan.primary.is_empty(), "{plan:?}");
        assert_eq!((plan.secondaries[0].queues, plan.secondaries[0].interrupts), (2, 2));
    }

    #[test]
    fn too_little_is_said_and_not_tried() {
        let queues = FlexibleResources { total: 3, ..Default::default() };
        let plenty = FlexibleResources { total: 100, ..Default::default() };
        let error = plan(&capabilities(queues, plenty), &secondaries(2), 2).expect_err("three queues");
        assert_eq!(error.to_string(), "3 flexible VQ resources (queues) are not enough for 2 secondary controllers: each needs 2");
        let error = plan(&capabilities(plenty, plenty), &secondaries(2), 3).expect_err("two there");
        assert!(matches!(error, PlanError::TooFew { have: 2, wanted: 3 }));
        let mut others = secondaries(3);
        others[2].nvq = 2;
        let error = plan(&capabilities(queues, plenty), &others, 1).expect_err("another has two");
        assert!(matches!(error, PlanError::NotEnough { have: 1, .. }), "{error}");
    }

    #[test]
    fn all_of_them_are_taken_offline_first() {
        let mut list = secondaries(2);
        (list[0].scs, list[0].nvq) = (1, 4);
        let acts: Vec<_> = take_all(&list).iter().map(|step| (step.act, step.cntlid, step.count)).collect();
        assert_eq!(acts, [(VirtualizationAction::SECONDARY_OFFLINE, 11, 0), (VirtualizationAction::SECONDARY_ASSIGN, 11, 0)]);
    }

    proptest! {
        #[test]
        fn no_more_is_given_than_there_is(total in 0u32..300, primary: u16, max in 0u16..40, granularity in 0u16..9, count in 1u16..8, held in 0u16..20) {
            let kind = FlexibleResources { total, primary, secondary_max: max, granularity, ..Default::default() };
            let mut list = secondaries(9);
            list[8].nvq = held;
            list[8].nvi = held;
            if let Ok(plan) = plan(&capabilities(kind, kind), &list, count) {
                let given: u32 = plan.secondaries.iter().map(|share| u32::from(share.queues)).sum();
                prop_assert!(given + u32::from(held) <= total);
                prop_assert!(plan.secondaries.iter().all(|share| max == 0 || share.queues <= max));
                if let Some((_, keeps)) = plan.primary.first() {
                    prop_assert!(given + u32::from(held) + u32::from(*keeps) <= total);
                }
            }
        }
    }
}
