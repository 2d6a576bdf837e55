//! Log pages (Base 2.3 §5.2.12.1).

use crate::command::StatusPhase;
use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_value! {
    /// LID, Log Page Identifier (Base 2.3 §5.2.12.1).
    LogId(u8) mask 0xFF {
        0x00 SUPPORTED_LOG_PAGES "Supported Log Pages",
        0x01 ERROR "Error Information",
        0x02 SMART "SMART / Health Information",
        0x03 FIRMWARE_SLOT "Firmware Slot Information",
        0x04 CHANGED_NAMESPACES "Changed Attached Namespace List",
        0x05 EFFECTS "Commands Supported and Effects",
        0x06 SELF_TEST "Device Self-test",
        0x0C ANA "Asymmetric Namespace Access",
        0x12 FEATURE_EFFECTS "Feature Identifiers Supported and Effects",
    }
}

/// Error Information entry, 64 bytes (LID 01h).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ErrorLogEntry {
    /// Error Count, unique over the controller's life; 0 is an unused entry.
    pub error_count: u64,
    /// SQID of the command.
    pub sqid: u16,
    /// CID of the command.
    pub cid: u16,
    /// Status of the command, with its phase tag.
    pub status: StatusPhase,
    /// Parameter Error Location: byte 7:0, bit 10:8 in the command.
    pub parameter_error_location: u16,
    /// First LBA with the error.
    pub lba: u64,
    /// NSID.
    pub nsid: u32,
    /// Vendor specific log page with more, 0 for none.
    pub vendor_log: u8,
    /// TRTYPE, Transport Type.
    pub trtype: u8,
    /// CSI, Command Set Indicator.
    pub csi: u8,
    /// Opcode of the command.
    pub opcode: u8,
    /// Command specific information.
    pub command_specific: u64,
    /// Transport type specific information.
    pub transport_specific: u16,
    /// Reserved, 0.
    pub rsvd42: [u8; 21],
    /// Log page version.
    pub version: u8,
}
layout!(ErrorLogEntry, 64, status @ 12, lba @ 16, nsid @ 24, command_specific @ 32, version @ 63);

/// SMART / Health Information, 512 bytes (LID 02h).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartLog {
    /// Critical Warning bits.
    pub critical_warning: u8,
    /// Composite temperature in kelvins.
    pub temperature: U16,
    /// Available spare in percent.
    pub available_spare: u8,
    /// Available spare threshold in percent.
    pub spare_threshold: u8,
    /// Percentage of life used; may exceed 100.
    pub percentage_used: u8,
    /// Endurance group critical warning summary.
    pub endurance_warning: u8,
    /// Reserved, 0.
    pub rsvd7: [u8; 25],
    /// Data units read, thousands of 512-byte units.
    pub data_units_read: U128,
    /// Data units written, thousands of 512-byte units.
    pub data_units_written: U128,
    /// Host read commands.
    pub host_reads: U128,
    /// Host write commands.
    pub host_writes: U128,
    /// Controller busy time in minutes.
    pub busy_minutes: U128,
    /// Power cycles.
    pub power_cycles: U128,
    /// Power on hours.
    pub power_on_hours: U128,
    /// Unsafe shutdowns.
    pub unsafe_shutdowns: U128,
    /// Media and data integrity errors.
    pub media_errors: U128,
    /// Error information log entries over the controller's life.
    pub error_log_entries: U128,
    /// Minutes above the warning temperature.
    pub warning_temperature_minutes: u32,
    /// Minutes above the critical temperature.
    pub critical_temperature_minutes: u32,
    /// Temperature sensors 1..=8 in kelvins, 0 for none.
    pub temperature_sensors: [u16; 8],
    /// Reserved, 0, or thermal management counters.
    pub rsvd216: [u8; 296],
}
layout!(SmartLog, 512, temperature @ 1, data_units_read @ 32, warning_temperature_minutes @ 192, rsvd216 @ 216);
zeroed_default!(SmartLog);
debug_fields!(SmartLog {
    critical_warning,
    temperature,
    available_spare,
    percentage_used,
    data_units_read,
    data_units_written,
    host_reads,
    host_writes,
    power_cycles,
    power_on_hours,
    unsafe_shutdowns,
    media_errors,
    error_log_entries,
});

/// Firmware Slot Information, 512 bytes (LID 03h).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FirmwareSlotLog {
    /// AFI: active slot in 2:0, slot of the next reset in 6:4.
    pub afi: u8,
    /// Reserved, 0.
    pub rsvd1: [u8; 7],
    /// FRS1..FRS7, the revisions as ASCII; zero for an empty slot.
    pub frs: [[u8; 8]; 7],
    /// Reserved, 0.
    pub rsvd64: [u8; 448],
}
layout!(FirmwareSlotLog, 512, frs @ 8, rsvd64 @ 64);
zeroed_default!(FirmwareSlotLog);
debug_fields!(FirmwareSlotLog { afi, frs });

/// What one command does (LID 05h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CommandEffects {
    /// CSUPP, Command Supported.
    pub csupp: bool,
    /// LBCC, Logical Block Content Change.
    pub lbcc: bool,
    /// NCC, Namespace Capability Change.
    pub ncc: bool,
    /// NIC, Namespace Inventory Change.
    pub nic: bool,
    /// CCC, Controller Capability Change.
    pub ccc: bool,
    #[bits(11)]
    __: u16,
    /// CSE, Command Submission and Execution: 0 any, 1 alone in its namespace, 2 alone in the controller.
    #[bits(3)]
    pub cse: u8,
    /// UUID selection supported.
    pub uss: bool,
    /// CSP, Command Scope.
    #[bits(12)]
    pub csp: u16,
}

/// Commands Supported and Effects, 4096 bytes (LID 05h).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EffectsLog {
    /// ACS, by admin opcode.
    pub acs: [CommandEffects; 256],
    /// IOCS, by I/O opcode.
    pub iocs: [CommandEffects; 256],
    /// Reserved, 0.
    pub rsvd2048: [u8; 2048],
}
layout!(EffectsLog, 4096, iocs @ 1024, rsvd2048 @ 2048);
zeroed_default!(EffectsLog);

impl core::fmt::Debug for EffectsLog {
    /// Lists the supported opcodes only.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for (set, effects) in [("admin", &self.acs), ("io", &self.iocs)] {
            write!(f, "{set}:")?;
            for (opcode, _) in effects
                .iter()
                .enumerate()
                .filter(|(_, effects)| effects.csupp())
            {
                write!(f, " {opcode:02X}h")?;
            }
            f.write_str("; ")?;
        }
        Ok(())
    }
}

/// What one feature does (LID 12h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FeatureEffects {
    /// FSUPP, Feature Supported.
    pub fsupp: bool,
    /// UDCC, User Data Content Change.
    pub udcc: bool,
    /// NCC, Namespace Capability Change.
    pub ncc: bool,
    /// NIC, Namespace Inventory Change.
    pub nic: bool,
    /// CCC, Controller Capability Change.
    pub ccc: bool,
    #[bits(14)]
    __: u16,
    /// UUID selection supported.
    pub uss: bool,
    /// FSP, Feature Scope; bit 6 ([`FeatureEffects::FSP_CDQSCP`]) is a controller data queue.
    #[bits(12)]
    pub fsp: u16,
}

impl FeatureEffects {
    /// CDQSCP: the feature's scope is a controller data queue.
    pub const FSP_CDQSCP: u16 = 1 << 6;
}

/// Most namespaces in a [`ChangedNamespaceList`].
pub const MAX_CHANGED_NAMESPACES: usize = 1024;

/// Changed Attached Namespace List, 4096 bytes (LID 04h).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChangedNamespaceList {
    /// NSIDs ascending, zero terminated; the first is FFFFFFFFh when more than 1024 changed.
    pub nsids: [u32; MAX_CHANGED_NAMESPACES],
}
layout!(ChangedNamespaceList, 4096);
zeroed_default!(ChangedNamespaceList);

impl ChangedNamespaceList {
    /// Whether more namespaces changed than the list holds: every namespace must be looked at again.
    pub fn overflowed(&self) -> bool {
        self.nsids[0] == crate::command::NSID_ALL
    }

    /// The namespaces listed; none when the list overflowed.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.nsids
            .iter()
            .copied()
            .take_while(|nsid| *nsid != 0 && *nsid != crate::command::NSID_ALL)
    }
}

impl core::fmt::Debug for ChangedNamespaceList {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.overflowed() {
            f.write_str("more than 1024")
        } else {
            f.debug_list().entries(self.iter()).finish()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_effects() {
        let mut list = ChangedNamespaceList::default();
        list.nsids[..2].copy_from_slice(&[3, 9]);
        assert!(list.iter().eq([3, 9]));
        list.nsids[0] = u32::MAX;
        assert!(list.overflowed() && list.iter().next().is_none());
        assert_eq!(
            CommandEffects::new()
                .with_csupp(true)
                .with_lbcc(true)
                .with_cse(1)
                .into_bits(),
            0x0001_0003
        );
        assert_eq!(
            FeatureEffects::new()
                .with_fsp(FeatureEffects::FSP_CDQSCP)
                .into_bits(),
            1 << 26
        );
    }
}
