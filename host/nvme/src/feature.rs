//! Features: identifiers, values (CDW11 and DW0) and data structures (Base 2.3 §5.2.26.1).

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_value! {
    /// FID, Feature Identifier (Base 2.3 §5.2.26.1).
    FeatureId(u8) mask 0xFF {
        0x01 ARBITRATION "Arbitration",
        0x02 POWER_MANAGEMENT "Power Management",
        0x04 TEMPERATURE_THRESHOLD "Temperature Threshold",
        0x05 ERROR_RECOVERY "Error Recovery",
        0x06 VOLATILE_WRITE_CACHE "Volatile Write Cache",
        0x07 NUMBER_OF_QUEUES "Number of Queues",
        0x08 INTERRUPT_COALESCING "Interrupt Coalescing",
        0x09 INTERRUPT_VECTOR_CONFIG "Interrupt Vector Configuration",
        0x0A WRITE_ATOMICITY "Write Atomicity Normal",
        0x0B ASYNC_EVENT_CONFIG "Asynchronous Event Configuration",
        0x0C AUTONOMOUS_POWER "Autonomous Power State Transition",
        0x0D HOST_MEMORY_BUFFER "Host Memory Buffer",
        0x0E TIMESTAMP "Timestamp",
        0x0F KEEP_ALIVE "Keep Alive Timer",
        0x16 HOST_BEHAVIOR "Host Behavior Support",
        0x19 COMMAND_SET_PROFILE "I/O Command Set Profile",
        0x21 CONTROLLER_DATA_QUEUE "Controller Data Queue",
        0x81 HOST_IDENTIFIER "Host Identifier",
        0x84 NAMESPACE_WRITE_PROTECT "Namespace Write Protection Config",
        0xC0 VENDOR_GUEST_LIMIT "Guest limit (vendor specific)",
    }
}

/// DW0 of Get Features, SEL 3: what may be done with a feature (Base 2.3 §5.2.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FeatureCapabilities {
    /// Saveable.
    pub saveable: bool,
    /// Namespace specific.
    pub namespace_specific: bool,
    /// Changeable.
    pub changeable: bool,
    #[bits(29)]
    __: u32,
}

/// Arbitration (FID 01h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Arbitration {
    /// AB, Arbitration Burst: 2^n commands, 7 is no limit.
    #[bits(3)]
    pub ab: u8,
    #[bits(5)]
    __: u8,
    /// LPW, Low Priority Weight, 0's based.
    pub lpw: u8,
    /// MPW, Medium Priority Weight, 0's based.
    pub mpw: u8,
    /// HPW, High Priority Weight, 0's based.
    pub hpw: u8,
}

/// Power Management (FID 02h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PowerManagement {
    /// PS, Power State.
    #[bits(5)]
    pub ps: u8,
    /// WH, Workload Hint.
    #[bits(3)]
    pub wh: u8,
    #[bits(24)]
    __: u32,
}

/// Temperature Threshold (FID 04h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TemperatureThreshold {
    /// TMPTH in kelvins.
    pub tmpth: u16,
    /// TMPSEL, which sensor; 0 is the composite temperature.
    #[bits(4)]
    pub tmpsel: u8,
    /// THSEL: 0 over, 1 under temperature.
    #[bits(2)]
    pub thsel: u8,
    #[bits(10)]
    __: u16,
}

/// Error Recovery (FID 05h; NVMCS).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ErrorRecovery {
    /// TLER, Time Limited Error Recovery, in units of 100 ms.
    pub tler: u16,
    /// DULBE: reading a deallocated block is an error.
    pub dulbe: bool,
    #[bits(15)]
    __: u16,
}

/// Volatile Write Cache (FID 06h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VolatileWriteCache {
    /// WCE, Volatile Write Cache Enable.
    pub wce: bool,
    #[bits(31)]
    __: u32,
}

/// Number of Queues (FID 07h): asked for in CDW11 and granted in DW0, both 0's based.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NumberOfQueues {
    /// NSQR or NSQA, I/O submission queues, 0's based.
    pub nsq: u16,
    /// NCQR or NCQA, I/O completion queues, 0's based.
    pub ncq: u16,
}

/// Interrupt Coalescing (FID 08h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct InterruptCoalescing {
    /// THR, Aggregation Threshold in entries, 0's based.
    pub thr: u8,
    /// TIME, Aggregation Time in units of 100 µs.
    pub time: u8,
    __: u16,
}

/// Interrupt Vector Configuration (FID 09h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct InterruptVectorConfig {
    /// IV, Interrupt Vector.
    pub iv: u16,
    /// CD, Coalescing Disable.
    pub cd: bool,
    #[bits(15)]
    __: u16,
}

/// Write Atomicity Normal (FID 0Ah; NVMCS).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WriteAtomicity {
    /// DN, Disable Normal: only AWUPF holds.
    pub dn: bool,
    #[bits(31)]
    __: u32,
}

/// Asynchronous Event Configuration (FID 0Bh). Bits 8.. are those of OAES in Identify Controller.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AsyncEventConfig {
    /// SHCW, SMART / health critical warnings that report.
    pub shcw: u8,
    /// NSAN, attached namespace attribute notices.
    pub nsan: bool,
    /// FAN, firmware activation notices.
    pub fan: bool,
    /// TLN, telemetry log notices.
    pub tln: bool,
    /// ANACN, asymmetric namespace access change notices.
    pub anacn: bool,
    #[bits(20)]
    __: u32,
}

/// CDW11 of Host Identifier (FID 81h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HostIdentifierCdw11 {
    /// EXHID: the identifier has 16 bytes, otherwise 8.
    pub exhid: bool,
    #[bits(31)]
    __: u32,
}

/// I/O Command Set Profile (FID 19h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CommandSetProfile {
    /// IOCSCI, I/O Command Set Combination Index.
    #[bits(9)]
    pub iocsci: u16,
    #[bits(23)]
    __: u32,
}

/// Namespace Write Protection Config (FID 84h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NamespaceWriteProtect {
    /// WPS: 0 none, 1 protected, 2 until power cycle, 3 permanent.
    #[bits(3)]
    pub wps: u8,
    #[bits(29)]
    __: u32,
}

/// Data of Get Features 21h, Controller Data Queue (Base 2.3 §5.2.26.1.23): the first 8 bytes, all that is defined.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CdqFeatureData {
    /// HP, Head Pointer: a slot index.
    pub hp: u32,
    /// TPT, Tail Pointer Trigger: a slot index, 0 when none is armed.
    pub tpt: u32,
}
layout!(CdqFeatureData, 8, tpt @ 4);

/// Byte 6 of [`Timestamp`].
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TimestampAttributes {
    /// SYNCH: the controller may have stopped counting, so the value is no continuous time.
    pub synch: bool,
    /// TO, origin: 0 cleared at reset, 1 set by Set Features.
    #[bits(3)]
    pub origin: u8,
    #[bits(4)]
    __: u8,
}

/// Data of Timestamp (FID 0Eh), 8 bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Timestamp {
    /// Milliseconds since 1970-01-01 UTC, 48 bits, little-endian.
    pub milliseconds: [u8; 6],
    /// Where the value comes from.
    pub attributes: TimestampAttributes,
    /// Reserved, 0.
    pub rsvd7: u8,
}
layout!(Timestamp, 8, attributes @ 6);

impl Timestamp {
    /// A timestamp of this many milliseconds; bits above 47 are dropped.
    pub const fn from_millis(millis: u64) -> Self {
        let [a, b, c, d, e, f, _, _] = millis.to_le_bytes();
        Self {
            milliseconds: [a, b, c, d, e, f],
            attributes: TimestampAttributes::new(),
            rsvd7: 0,
        }
    }

    /// Milliseconds since 1970-01-01 UTC.
    pub const fn millis(&self) -> u64 {
        let [a, b, c, d, e, f] = self.milliseconds;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }
}

/// Data of Host Behavior Support (FID 16h), 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HostBehavior {
    /// ACRE, Advanced Command Retry Enable: 1 if the host honours CRD.
    pub acre: u8,
    /// ETDAS, Extended Telemetry Data Area 4 Supported.
    pub etdas: u8,
    /// LBAFEE, LBA Format Extension Enable.
    pub lbafee: u8,
    /// Reserved, 0, or newer fields.
    pub rsvd3: [u8; 509],
}
layout!(HostBehavior, 512, rsvd3 @ 3);
zeroed_default!(HostBehavior);
debug_fields!(HostBehavior {
    acre,
    etdas,
    lbafee
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_values() {
        assert_eq!(
            NumberOfQueues::new().with_nsq(3).with_ncq(7).into_bits(),
            0x0007_0003
        );
        assert_eq!(
            InterruptVectorConfig::new()
                .with_iv(2)
                .with_cd(true)
                .into_bits(),
            0x1_0002
        );
        assert_eq!(
            AsyncEventConfig::new()
                .with_nsan(true)
                .with_fan(true)
                .with_anacn(true)
                .into_bits(),
            0xB00
        );
        assert_eq!(
            FeatureCapabilities::new().with_changeable(true).into_bits(),
            4
        );
        assert_eq!(
            Timestamp::from_millis(0xFFFF_0123_4567_89AB).millis(),
            0x0123_4567_89AB
        );
    }
}
