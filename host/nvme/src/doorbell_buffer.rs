//! The doorbell buffer (shadow doorbells) of Doorbell Buffer Config (Base 2.3 §5.3.5, appendix on updating doorbells).
//!
//! Two pages, shadow and event index, laid out like the doorbell registers: the host stores a doorbell in the shadow
//! and writes the register only when the controller's event index asks for it.

use crate::registers::{cq_head_doorbell, offset, sq_tail_doorbell};

/// The event index of a controller that polls: by [`needs_doorbell_write`] a register write then happens only when
/// the ring wraps.
pub const EVENT_INDEX_POLLING: u32 = 0xFFFF_FFFF;

/// Byte offset of submission queue `qid`'s tail in either page. It may lie beyond the page: check against its size.
pub const fn sq_tail_offset(qid: u16, dstrd: u8) -> u32 {
    sq_tail_doorbell(qid, dstrd) - offset::DOORBELLS
}

/// Byte offset of completion queue `qid`'s head in either page. It may lie beyond the page: check against its size.
pub const fn cq_head_offset(qid: u16, dstrd: u8) -> u32 {
    cq_head_doorbell(qid, dstrd) - offset::DOORBELLS
}

/// Whether a host that moves a doorbell from `old` to `new` must write the register, given the controller's event
/// index: it does when the move steps over the index.
pub const fn needs_doorbell_write(event_index: u32, new: u16, old: u16) -> bool {
    new.wrapping_sub(event_index as u16).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_write_when_the_event_index_is_passed() {
        assert!(
            needs_doorbell_write(4, 5, 4),
            "the controller has seen 4 and sleeps"
        );
        assert!(needs_doorbell_write(4, 9, 3));
        assert!(!needs_doorbell_write(5, 5, 4), "not passed yet");
        assert!(!needs_doorbell_write(EVENT_INDEX_POLLING, 5, 4));
        assert!(
            needs_doorbell_write(EVENT_INDEX_POLLING, 0, 7),
            "the ring wrapped"
        );
        assert_eq!(cq_head_offset(1, 0), 12);
        assert_eq!(sq_tail_offset(1, 0), 8);
    }
}
