//! Virtualization enhancements: primary controller capabilities, Virtualization Management (Base 2.3 §5.2.7 of PCIe, §8.2.6).
//!
//! A primary controller (a physical function) has flexible queue (VQ) and interrupt (VI) resources that it can hand to its
//! secondary controllers (virtual functions), which go online with them.

use crate::command::{AdminOpcode, SubmissionEntry};
use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Resources of one kind of a primary controller, as [`PrimaryCapabilities`] has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlexibleResources {
    /// VQFRT, VIFRT: flexible resources in all, of the primary controller and its secondary ones.
    pub total: u32,
    /// VQRFA, VIRFA: those assigned to secondary controllers.
    pub assigned: u32,
    /// VQRFAP, VIRFAP: those allocated to the primary controller.
    pub primary: u16,
    /// VQPRT, VIPRT: the primary controller's own, which stay its own.
    pub private: u16,
    /// VQFRSM, VIFRSM: most that one secondary controller may have.
    pub secondary_max: u16,
    /// VQGRAN, VIGRAN: what numbers should be multiples of.
    pub granularity: u16,
    /// Reserved, 0.
    pub rsvd: [u8; 16],
}
layout!(FlexibleResources, 32, assigned @ 4, primary @ 8, private @ 10, secondary_max @ 12, granularity @ 14);

/// Primary Controller Capabilities structure, 4,096 bytes (Identify CNS 14h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PrimaryCapabilities {
    /// CNTLID.
    pub cntlid: u16,
    /// PORTID, the port of the subsystem.
    pub portid: u16,
    /// CRT, Controller Resource Types: bit 0 VQ, bit 1 VI.
    pub crt: u8,
    /// Reserved, 0.
    pub rsvd5: [u8; 27],
    /// Queues (VQ).
    pub queues: FlexibleResources,
    /// Interrupts (VI).
    pub interrupts: FlexibleResources,
    /// Reserved, 0.
    pub rsvd96: [u8; 4000],
}
layout!(PrimaryCapabilities, 4096, portid @ 2, crt @ 4, queues @ 32, interrupts @ 64);

impl PrimaryCapabilities {
    /// The resources of one kind; `None` where the controller has no flexible ones.
    #[must_use]
    pub fn resources(&self, kind: ResourceType) -> Option<&FlexibleResources> {
        match kind {
            ResourceType::VQ => (self.crt & 1 != 0).then_some(&self.queues),
            ResourceType::VI => (self.crt & 2 != 0).then_some(&self.interrupts),
            _ => None,
        }
    }
}

open_value! {
    /// ACT of Virtualization Management.
    VirtualizationAction(u8) mask 0xF {
        0x1 PRIMARY_ALLOCATION "Primary Controller Flexible Allocation",
        0x7 SECONDARY_OFFLINE "Secondary Controller Offline",
        0x8 SECONDARY_ASSIGN "Secondary Controller Assign",
        0x9 SECONDARY_ONLINE "Secondary Controller Online",
    }
}

open_value! {
    /// RT of Virtualization Management.
    ResourceType(u8) mask 0x7 {
        0x0 VQ "VQ resources (queues)",
        0x1 VI "VI resources (interrupts)",
    }
}

/// CDW10 of Virtualization Management.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VirtualizationCdw10 {
    /// ACT, Action.
    #[bits(4)]
    pub act: VirtualizationAction,
    #[bits(4)]
    __: u8,
    /// RT, Resource Type.
    #[bits(3)]
    pub rt: ResourceType,
    #[bits(5)]
    __: u8,
    /// CNTLID, Controller Identifier.
    pub cntlid: u16,
}

impl SubmissionEntry {
    /// Virtualization Management (1Ch) with `count` resources (NR); the completion's DW0 15:0 (NRM) says how many it became.
    #[must_use]
    pub fn virtualization(act: VirtualizationAction, cntlid: u16, rt: ResourceType, count: u16) -> Self {
        Self {
            cdw10: VirtualizationCdw10::new().with_act(act).with_rt(rt).with_cntlid(cntlid).into(),
            cdw11: u32::from(count),
            ..Self::admin(AdminOpcode::VIRTUALIZATION_MANAGEMENT)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_they_belong() {
        let entry = SubmissionEntry::virtualization(VirtualizationAction::SECONDARY_ASSIGN, 3, ResourceType::VI, 2);
        assert_eq!((entry.cdw0.opcode(), entry.cdw10, entry.cdw11), (0x1c, 0x0003_0108, 2));
        let mut page = [0u8; 4096];
        page[4] = 1;
        page[46] = 2;
        page[32] = 9;
        let read = PrimaryCapabilities::read_from_bytes(&page).expect("a page");
        assert_eq!(read.resources(ResourceType::VQ).map(|vq| (vq.total, vq.granularity)), Some((9, 2)));
        assert_eq!(read.resources(ResourceType::VI), None);
    }
}
