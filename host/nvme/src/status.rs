//! Status codes of completion queue entries (Base 2.3 §4.2.3).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_value! {
    /// SCT, Status Code Type (Base 2.3 §4.2.3).
    StatusCodeType(u8) mask 0x7 {
        0 GENERIC "generic command status",
        1 COMMAND_SPECIFIC "command specific status",
        2 MEDIA "media and data integrity errors",
        3 PATH "path related status",
        7 VENDOR "vendor specific",
    }
}

/// The 15-bit status of a completion, as it stands above the phase tag (completion DW3 bits 31:17): SC 7:0, SCT 10:8,
/// CRD 12:11, More 13, DNR 14 (Base 2.3 §4.2.3). Constants carry SCT and SC only; compare with [`Status::is`], which
/// leaves the other bits out.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Status(u16);

impl Status {
    const CODE: u16 = 0x07FF;
    const MORE: u16 = 1 << 13;
    const DNR: u16 = 1 << 14;

    /// A status of the given type (3 bits) and code, with CRD, More and DNR clear.
    pub const fn new(sct: u8, sc: u8) -> Self {
        Self(((sct & 0x7) as u16) << 8 | sc as u16)
    }

    /// The status as it stands in its 15-bit field; a sixteenth bit is dropped.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & 0x7FFF)
    }

    /// The 15 bits.
    pub const fn into_bits(self) -> u16 {
        self.0 & 0x7FFF
    }

    /// SC, Status Code.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// SCT, Status Code Type.
    pub const fn sct(self) -> StatusCodeType {
        StatusCodeType((self.0 >> 8) as u8 & 0x7)
    }

    /// CRD, Command Retry Delay: 0 none, else the number of the CRDT field in Identify Controller.
    pub const fn crd(self) -> u8 {
        (self.0 >> 11) as u8 & 0x3
    }

    /// M: the error log has more on this command.
    pub const fn more(self) -> bool {
        self.0 & Self::MORE != 0
    }

    /// DNR, Do Not Retry: the same command would fail again.
    pub const fn dnr(self) -> bool {
        self.0 & Self::DNR != 0
    }

    /// The same status with DNR set.
    pub const fn with_dnr(self) -> Self {
        Self(self.0 | Self::DNR)
    }

    /// The same status with More set.
    pub const fn with_more(self) -> Self {
        Self(self.0 | Self::MORE)
    }

    /// Whether any of the 15 bits is set. Not only SC and SCT: devices exist that answer a refused command with
    /// DNR and status code 0.
    pub const fn is_error(self) -> bool {
        self.into_bits() != 0
    }

    /// SCT and SC alone, with CRD, More and DNR cleared.
    pub const fn code(self) -> Self {
        Self(self.0 & Self::CODE)
    }

    /// Whether SCT and SC are those of `other`, whatever the retry bits say.
    pub const fn is(self, other: Self) -> bool {
        self.0 & Self::CODE == other.0 & Self::CODE
    }
}

macro_rules! statuses {
    ($($sct:literal $sc:literal $konst:ident $text:literal,)*) => {
        impl Status {
            $(
                #[doc = concat!($text, " (SCT ", stringify!($sct), ", SC `", stringify!($sc), "`).")]
                pub const $konst: Self = Self::new($sct, $sc);
            )*

            /// Every status that has a name here, ascending by type and code.
            pub const NAMED: &'static [Self] = &[$(Self::$konst),*];

            /// The specification's name of SCT and SC, or `None` for a reserved, vendor or newer code.
            pub const fn name(self) -> Option<&'static str> {
                match (self.sct().0, self.sc()) {
                    $(($sct, $sc) => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    0 0x00 SUCCESS "Successful Completion",
    0 0x01 INVALID_OPCODE "Invalid Command Opcode",
    0 0x02 INVALID_FIELD "Invalid Field in Command",
    0 0x03 CID_CONFLICT "Command ID Conflict",
    0 0x04 DATA_TRANSFER_ERROR "Data Transfer Error",
    0 0x05 ABORTED_POWER_LOSS "Commands Aborted due to Power Loss Notification",
    0 0x06 INTERNAL_ERROR "Internal Error",
    0 0x07 ABORTED_BY_REQUEST "Command Abort Requested",
    0 0x08 ABORTED_SQ_DELETION "Command Aborted due to SQ Deletion",
    0 0x09 FUSED_FAILED "Command Aborted due to Failed Fused Command",
    0 0x0A FUSED_MISSING "Command Aborted due to Missing Fused Command",
    0 0x0B INVALID_NAMESPACE "Invalid Namespace or Format",
    0 0x0C COMMAND_SEQUENCE "Command Sequence Error",
    0 0x0D SGL_INVALID_SEGMENT "Invalid SGL Segment Descriptor",
    0 0x0E SGL_INVALID_COUNT "Invalid Number of SGL Descriptors",
    0 0x0F SGL_DATA_LENGTH_INVALID "Data SGL Length Invalid",
    0 0x10 SGL_METADATA_LENGTH_INVALID "Metadata SGL Length Invalid",
    0 0x11 SGL_TYPE_INVALID "SGL Descriptor Type Invalid",
    0 0x12 INVALID_USE_OF_CMB "Invalid Use of Controller Memory Buffer",
    0 0x13 PRP_OFFSET_INVALID "PRP Offset Invalid",
    0 0x14 ATOMIC_WRITE_UNIT_EXCEEDED "Atomic Write Unit Exceeded",
    0 0x15 OPERATION_DENIED "Operation Denied",
    0 0x16 SGL_OFFSET_INVALID "SGL Offset Invalid",
    0 0x18 HOST_ID_INCONSISTENT "Host Identifier Inconsistent Format",
    0 0x19 KEEP_ALIVE_EXPIRED "Keep Alive Timer Expired",
    0 0x1A KEEP_ALIVE_INVALID "Keep Alive Timeout Invalid",
    0 0x1B ABORTED_PREEMPT "Command Aborted due to Preempt and Abort",
    0 0x1C SANITIZE_FAILED "Sanitize Failed",
    0 0x1D SANITIZE_IN_PROGRESS "Sanitize In Progress",
    0 0x1E SGL_GRANULARITY_INVALID "SGL Data Block Granularity Invalid",
    0 0x20 NAMESPACE_WRITE_PROTECTED "Namespace is Write Protected",
    0 0x21 COMMAND_INTERRUPTED "Command Interrupted",
    0 0x22 TRANSIENT_TRANSPORT "Transient Transport Error",
    0 0x24 ADMIN_MEDIA_NOT_READY "Admin Command Media Not Ready",
    0 0x2B SANITIZE_NAMESPACE_FAILED "Sanitize Namespace Failed",
    0 0x2C SANITIZE_NAMESPACE_IN_PROGRESS "Sanitize Namespace In Progress",
    0 0x80 LBA_OUT_OF_RANGE "LBA Out of Range",
    0 0x81 CAPACITY_EXCEEDED "Capacity Exceeded",
    0 0x82 NAMESPACE_NOT_READY "Namespace Not Ready",
    0 0x83 RESERVATION_CONFLICT "Reservation Conflict",
    0 0x84 FORMAT_IN_PROGRESS "Format In Progress",
    1 0x00 CQ_INVALID "Completion Queue Invalid",
    1 0x01 INVALID_QID "Invalid Queue Identifier",
    1 0x02 INVALID_QUEUE_SIZE "Invalid Queue Size",
    1 0x03 ABORT_LIMIT "Abort Command Limit Exceeded",
    1 0x05 AER_LIMIT "Asynchronous Event Request Limit Exceeded",
    1 0x06 INVALID_FIRMWARE_SLOT "Invalid Firmware Slot",
    1 0x07 INVALID_FIRMWARE_IMAGE "Invalid Firmware Image",
    1 0x08 INVALID_INTERRUPT_VECTOR "Invalid Interrupt Vector",
    1 0x09 INVALID_LOG_PAGE "Invalid Log Page",
    1 0x0A INVALID_FORMAT "Invalid Format",
    1 0x0C INVALID_QUEUE_DELETION "Invalid Queue Deletion",
    1 0x0D FEATURE_NOT_SAVEABLE "Feature Identifier Not Saveable",
    1 0x0E FEATURE_NOT_CHANGEABLE "Feature Not Changeable",
    1 0x0F FEATURE_NOT_NAMESPACE_SPECIFIC "Feature Not Namespace Specific",
    1 0x14 OVERLAPPING_RANGE "Overlapping Range",
    1 0x15 NAMESPACE_INSUFFICIENT_CAPACITY "Namespace Insufficient Capacity",
    1 0x16 NSID_UNAVAILABLE "Namespace Identifier Unavailable",
    1 0x18 NAMESPACE_ALREADY_ATTACHED "Namespace Already Attached",
    1 0x19 NAMESPACE_PRIVATE "Namespace Is Private",
    1 0x1A NAMESPACE_NOT_ATTACHED "Namespace Not Attached",
    1 0x1B THIN_PROVISIONING_UNSUPPORTED "Thin Provisioning Not Supported",
    1 0x1C CONTROLLER_LIST_INVALID "Controller List Invalid",
    1 0x1F INVALID_CONTROLLER_ID "Invalid Controller Identifier",
    1 0x20 INVALID_SECONDARY_STATE "Invalid Secondary Controller State",
    1 0x27 NAMESPACE_ATTACHMENT_LIMIT "Namespace Attachment Limit Exceeded",
    1 0x29 COMMAND_SET_UNSUPPORTED "I/O Command Set Not Supported",
    1 0x2A COMMAND_SET_NOT_ENABLED "I/O Command Set Not Enabled",
    1 0x37 INVALID_CDQ "Invalid Controller Data Queue",
    1 0x38 NOT_ENOUGH_RESOURCES "Not Enough Resources",
    1 0x39 CONTROLLER_SUSPENDED "Controller Suspended",
    1 0x3A CONTROLLER_NOT_SUSPENDED "Controller Not Suspended",
    1 0x3B CDQ_FULL "Controller Data Queue Full",
    1 0x80 CONFLICTING_ATTRIBUTES "Conflicting Attributes",
    1 0x81 INVALID_PROTECTION_INFORMATION "Invalid Protection Information",
    1 0x82 WRITE_TO_READ_ONLY_RANGE "Attempted Write to Read Only Range",
    1 0x83 COPY_SIZE_LIMIT "Command Size Limit Exceeded",
    2 0x80 WRITE_FAULT "Write Fault",
    2 0x81 UNRECOVERED_READ "Unrecovered Read Error",
    2 0x82 GUARD_CHECK "End-to-end Guard Check Error",
    2 0x83 APPLICATION_TAG_CHECK "End-to-end Application Tag Check Error",
    2 0x84 REFERENCE_TAG_CHECK "End-to-end Reference Tag Check Error",
    2 0x85 COMPARE_FAILURE "Compare Failure",
    2 0x86 ACCESS_DENIED "Access Denied",
    2 0x87 DEALLOCATED_READ "Deallocated or Unwritten Logical Block",
    3 0x00 INTERNAL_PATH_ERROR "Internal Path Error",
    3 0x01 ANA_PERSISTENT_LOSS "Asymmetric Access Persistent Loss",
    3 0x02 ANA_INACCESSIBLE "Asymmetric Access Inaccessible",
    3 0x03 ANA_TRANSITION "Asymmetric Access Transition",
    3 0x60 CONTROLLER_PATHING_ERROR "Controller Pathing Error",
    3 0x70 HOST_PATHING_ERROR "Host Pathing Error",
    3 0x71 ABORTED_BY_HOST "Command Aborted By Host",
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        // A bare DNR is no success, and must not read like one.
        match self.name() {
            Some(name) if self.code().0 != 0 || !self.is_error() => f.write_str(name)?,
            Some(_) => f.write_str("failure without a status code")?,
            None => f.write_str("unknown status")?,
        }
        write!(f, " (SCT {:X}h, SC {:02X}h", self.sct().0, self.sc())?;
        if self.crd() != 0 {
            write!(f, ", CRD {}", self.crd())?;
        }
        if self.more() {
            f.write_str(", More")?;
        }
        if self.dnr() {
            f.write_str(", DNR")?;
        }
        f.write_str(")")
    }
}

impl core::fmt::Debug for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

layout!(Status, 2);

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn values_are_those_of_the_specification() {
        assert_eq!(Status::INVALID_CONTROLLER_ID.into_bits(), 0x11F);
        assert_eq!(Status::INVALID_CDQ.into_bits(), 0x137);
        assert_eq!(Status::NOT_ENOUGH_RESOURCES.into_bits(), 0x138);
        assert_eq!(Status::CONTROLLER_SUSPENDED.into_bits(), 0x139);
        assert_eq!(Status::CONTROLLER_NOT_SUSPENDED.into_bits(), 0x13A);
        assert_eq!(Status::CDQ_FULL.into_bits(), 0x13B);
        assert_eq!(Status::PRP_OFFSET_INVALID.into_bits(), 0x13);
        assert_eq!(Status::COMPARE_FAILURE.into_bits(), 0x285);
        assert_eq!(Status::INVALID_FIELD.with_dnr().into_bits(), 0x4002);
    }

    #[test]
    fn names_and_bits() {
        for status in Status::NAMED {
            assert!(status.name().is_some());
            assert!(status.with_dnr().is(*status) && status.with_dnr() != *status);
        }
        assert!(!Status::SUCCESS.is_error());
        assert!(
            Status::SUCCESS.with_dnr().is_error(),
            "a bare DNR is a failure"
        );
        assert!(
            Status::SUCCESS
                .with_dnr()
                .to_string()
                .starts_with("failure")
        );
        assert_eq!(
            Status::INVALID_FIELD.with_dnr().to_string(),
            "Invalid Field in Command (SCT 0h, SC 02h, DNR)"
        );
        assert_eq!(
            Status::new(7, 0xC1).to_string(),
            "unknown status (SCT 7h, SC C1h)"
        );
        assert_eq!(Status::from_bits(0xFFFF).into_bits(), 0x7FFF);
        assert_eq!(Status::from_bits(0x1800).crd(), 3);
    }
}
