//! Which commands of the specification change what is on the media, or take it away from who uses it.

use dray_nvme::command::{AdminOpcode, NvmOpcode};

/// Zone Management Send and Zone Append of zoned namespaces.
const ZONED: [(u8, &str); 2] = [(0x79, "Zone Management Send"), (0x7d, "Zone Append")];
/// Capacity Management and Lockdown, which nothing else here knows.
const OTHER_ADMIN: [(u8, &str); 2] = [(0x20, "Capacity Management"), (0x24, "Lockdown")];

/// The name of a command that changes data; `None` for all others, vendor-specific ones included, of which nobody knows.
pub(super) fn changes_data(is_admin: bool, opcode: u8) -> Option<String> {
    let (admin, io) = (AdminOpcode(opcode), NvmOpcode(opcode));
    let others = if is_admin { OTHER_ADMIN } else { ZONED };
    let listed = if is_admin {
        matches!(
            admin,
            AdminOpcode::NAMESPACE_MANAGEMENT
                | AdminOpcode::NAMESPACE_ATTACHMENT
                | AdminOpcode::FIRMWARE_COMMIT
                | AdminOpcode::VIRTUALIZATION_MANAGEMENT
                | AdminOpcode::MIGRATION_SEND
                | AdminOpcode::FORMAT_NVM
                | AdminOpcode::SECURITY_SEND
                | AdminOpcode::SANITIZE
        )
    } else {
        matches!(
            io,
            NvmOpcode::WRITE
                | NvmOpcode::WRITE_UNCORRECTABLE
                | NvmOpcode::WRITE_ZEROES
                | NvmOpcode::DATASET_MANAGEMENT
                | NvmOpcode::RESERVATION_REGISTER
                | NvmOpcode::RESERVATION_ACQUIRE
                | NvmOpcode::RESERVATION_RELEASE
                | NvmOpcode::COPY
        )
    };
    let other = others.iter().find(|(other, _)| *other == opcode).map(|(_, name)| (*name).to_owned());
    other.or_else(|| listed.then(|| name(is_admin, opcode)))
}

/// What the specification calls a command.
pub(super) fn name(is_admin: bool, opcode: u8) -> String {
    let is_vendors = if is_admin { opcode >= 0xc0 } else { opcode >= 0x80 };
    if is_vendors {
        return "vendor specific".into();
    }
    if is_admin { AdminOpcode(opcode).to_string() } else { NvmOpcode(opcode).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_writes_is_told_from_what_reads() {
        for opcode in [0x01, 0x04, 0x08, 0x09, 0x0d, 0x11, 0x15, 0x19, 0x79, 0x7d] {
            assert!(changes_data(false, opcode).is_some(), "I/O {opcode:#x}");
        }
        for opcode in [0x00, 0x02, 0x05, 0x0c, 0x0e, 0x81, 0xc1] {
            assert_eq!(changes_data(false, opcode), None, "I/O {opcode:#x}");
        }
        for opcode in [0x0d, 0x10, 0x15, 0x1c, 0x20, 0x24, 0x41, 0x80, 0x81, 0x84] {
            assert!(changes_data(true, opcode).is_some(), "admin {opcode:#x}");
        }
        for opcode in [0x02, 0x06, 0x09, 0x0a, 0x42, 0x82, 0xc1] {
            assert_eq!(changes_data(true, opcode), None, "admin {opcode:#x}");
        }
        assert_eq!(changes_data(true, 0x80).as_deref(), Some("Format NVM"));
        assert_eq!((name(false, 2), name(true, 0xc0)), ("Read".into(), "vendor specific".into()));
    }
}
