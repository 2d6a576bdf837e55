//! Opcodes (Base 2.3 §5, §7; NVMCS §3).

open_value! {
    /// Opcode of an admin command (Base 2.3 §5).
    AdminOpcode(u8) mask 0xFF {
        0x00 DELETE_IO_SQ "Delete I/O Submission Queue",
        0x01 CREATE_IO_SQ "Create I/O Submission Queue",
        0x02 GET_LOG_PAGE "Get Log Page",
        0x04 DELETE_IO_CQ "Delete I/O Completion Queue",
        0x05 CREATE_IO_CQ "Create I/O Completion Queue",
        0x06 IDENTIFY "Identify",
        0x08 ABORT "Abort",
        0x09 SET_FEATURES "Set Features",
        0x0A GET_FEATURES "Get Features",
        0x0C ASYNC_EVENT_REQUEST "Asynchronous Event Request",
        0x0D NAMESPACE_MANAGEMENT "Namespace Management",
        0x10 FIRMWARE_COMMIT "Firmware Commit",
        0x11 FIRMWARE_IMAGE_DOWNLOAD "Firmware Image Download",
        0x14 DEVICE_SELF_TEST "Device Self-test",
        0x15 NAMESPACE_ATTACHMENT "Namespace Attachment",
        0x18 KEEP_ALIVE "Keep Alive",
        0x19 DIRECTIVE_SEND "Directive Send",
        0x1A DIRECTIVE_RECEIVE "Directive Receive",
        0x1C VIRTUALIZATION_MANAGEMENT "Virtualization Management",
        0x3D TRACK_SEND "Track Send",
        0x3E TRACK_RECEIVE "Track Receive",
        0x41 MIGRATION_SEND "Migration Send",
        0x42 MIGRATION_RECEIVE "Migration Receive",
        0x45 CONTROLLER_DATA_QUEUE "Controller Data Queue",
        0x7C DOORBELL_BUFFER_CONFIG "Doorbell Buffer Config",
        0x80 FORMAT_NVM "Format NVM",
        0x81 SECURITY_SEND "Security Send",
        0x82 SECURITY_RECEIVE "Security Receive",
        0x84 SANITIZE "Sanitize",
        0x86 GET_LBA_STATUS "Get LBA Status",
    }
}

open_value! {
    /// Opcode of an I/O command of the NVM command set (NVMCS §3).
    NvmOpcode(u8) mask 0xFF {
        0x00 FLUSH "Flush",
        0x01 WRITE "Write",
        0x02 READ "Read",
        0x04 WRITE_UNCORRECTABLE "Write Uncorrectable",
        0x05 COMPARE "Compare",
        0x08 WRITE_ZEROES "Write Zeroes",
        0x09 DATASET_MANAGEMENT "Dataset Management",
        0x0C VERIFY "Verify",
        0x0D RESERVATION_REGISTER "Reservation Register",
        0x0E RESERVATION_REPORT "Reservation Report",
        0x11 RESERVATION_ACQUIRE "Reservation Acquire",
        0x15 RESERVATION_RELEASE "Reservation Release",
        0x19 COPY "Copy",
    }
}
