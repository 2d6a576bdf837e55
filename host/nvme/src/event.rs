//! Asynchronous events: what the completion of an Asynchronous Event Request says (Base 2.3 §5.2.2).

use crate::log::LogId;
use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_value! {
    /// Asynchronous event type (Base 2.3 §5.2.2).
    EventType(u8) mask 0x7 {
        0 ERROR "error status",
        1 SMART "SMART / health status",
        2 NOTICE "notice",
        3 IMMEDIATE "immediate",
        4 ONE_SHOT "one-shot",
        6 IO_COMMAND_SET "I/O command set specific",
        7 VENDOR "vendor specific",
    }
}

/// DW0 of the completion of an Asynchronous Event Request (Base 2.3 §5.2.2). A one-shot event of a controller data
/// queue has the queue's identifier in DW1 ([`cdqid`]) and no log page.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AsyncEvent {
    /// Type of the event.
    #[bits(3)]
    pub event_type: EventType,
    #[bits(5)]
    __: u8,
    /// Information within the type: [`error_info`], [`smart_info`], [`notice_info`], [`one_shot_info`].
    pub info: u8,
    /// The log page to read; its reading with RAE = 0 lets the type report again.
    #[bits(8)]
    pub lid: LogId,
    __: u8,
}

/// Information of [`EventType::ERROR`].
pub mod error_info {
    /// Write to the doorbell of a queue that does not exist.
    pub const INVALID_DOORBELL_REGISTER: u8 = 0x00;
    /// Doorbell value outside the queue.
    pub const INVALID_DOORBELL_VALUE: u8 = 0x01;
    /// Diagnostic failure.
    pub const DIAGNOSTIC_FAILURE: u8 = 0x02;
    /// Persistent internal error.
    pub const PERSISTENT_INTERNAL: u8 = 0x03;
    /// Transient internal error.
    pub const TRANSIENT_INTERNAL: u8 = 0x04;
    /// Firmware image load error.
    pub const FIRMWARE_IMAGE_LOAD: u8 = 0x05;
}

/// Information of [`EventType::SMART`].
pub mod smart_info {
    /// NVM subsystem reliability.
    pub const RELIABILITY: u8 = 0x00;
    /// Temperature threshold.
    pub const TEMPERATURE: u8 = 0x01;
    /// Spare below threshold.
    pub const SPARE: u8 = 0x02;
}

/// Information of [`EventType::NOTICE`].
pub mod notice_info {
    /// Attached namespace attribute changed: read the changed namespace list (LID 04h).
    pub const NAMESPACE_ATTRIBUTE: u8 = 0x00;
    /// Firmware activation starting (LID 03h).
    pub const FIRMWARE_ACTIVATION: u8 = 0x01;
    /// Telemetry log changed.
    pub const TELEMETRY: u8 = 0x02;
    /// Asymmetric namespace access change (LID 0Ch).
    pub const ANA_CHANGE: u8 = 0x03;
}

/// Information of [`EventType::ONE_SHOT`].
pub mod one_shot_info {
    /// Controller data queue tail pointer: the armed trigger fired.
    pub const TAIL_POINTER: u8 = 0x00;
    /// Controller data queue full.
    pub const CDQ_FULL: u8 = 0x01;
    /// Power threshold.
    pub const POWER_THRESHOLD: u8 = 0x02;
}

impl AsyncEvent {
    /// The event that reports a controller data queue's tail pointer trigger.
    pub const CDQ_TAIL_POINTER: Self =
        Self::of(EventType::ONE_SHOT, one_shot_info::TAIL_POINTER, LogId(0));
    /// The event that reports a full controller data queue.
    pub const CDQ_FULL: Self = Self::of(EventType::ONE_SHOT, one_shot_info::CDQ_FULL, LogId(0));

    /// An event of this type, information and log page.
    pub const fn of(event_type: EventType, info: u8, lid: LogId) -> Self {
        Self::new()
            .with_event_type(event_type)
            .with_info(info)
            .with_lid(lid)
    }
}

impl core::fmt::Display for AsyncEvent {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "{} event, information {:02X}h",
            self.event_type(),
            self.info()
        )?;
        if self.event_type() == EventType::ONE_SHOT {
            Ok(())
        } else {
            write!(f, ", log page {:?}", self.lid())
        }
    }
}

/// CDQID that DW1 of a one-shot controller data queue event carries (bits 15:0).
pub const fn cdqid(dw1: u32) -> u16 {
    dw1 as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shot_events_of_the_reference() {
        assert_eq!(AsyncEvent::CDQ_TAIL_POINTER.into_bits(), 0x0000_0004);
        assert_eq!(AsyncEvent::CDQ_FULL.into_bits(), 0x0000_0104);
        let notice = AsyncEvent::of(
            EventType::NOTICE,
            notice_info::NAMESPACE_ATTRIBUTE,
            LogId::CHANGED_NAMESPACES,
        );
        assert_eq!(notice.into_bits(), 0x0004_0002);
        assert_eq!(cdqid(0xFFFF_0007), 7);
    }
}
