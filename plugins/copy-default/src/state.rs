//! What a successor is told: where the round stands and what was learned. Version 1: the fields in order, little-endian, then a
//! bit per region that was ordered.

use crate::Policy;
use alloc::string::String;
use alloc::vec::Vec;

const VERSION: u32 = 0x4443_0001;
const FIXED_BYTES: usize = 48;
const NONE: u64 = u64::MAX;

impl Policy {
    /// The state, at most [`FIXED_BYTES`] and a bit per region.
    pub fn save(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_BYTES + self.order.ordered.len() / 8 + 1);
        out.extend(VERSION.to_le_bytes());
        out.extend(self.settle.limit.to_le_bytes());
        let settle = &self.settle;
        let learned = [self.round.map_or(NONE, u64::from), self.pace.limit, settle.left, settle.left_before.unwrap_or(NONE)];
        learned.into_iter().chain([settle.guest_peak]).for_each(|field| out.extend(field.to_le_bytes()));
        out.extend(self.order.ordered.chunks(8).map(|flags| {
            flags.iter().enumerate().fold(0, |byte, (bit, &flag)| byte | u8::from(flag) << bit)
        }));
        out
    }

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// Bytes that are not a state of this version; nothing has changed then.
    pub fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        let fixed = bytes.first_chunk::<FIXED_BYTES>().ok_or("the state is cut")?;
        let (words, _) = fixed.as_chunks::<8>();
        let [head, round, pace, left, left_before, guest_peak] = [0, 1, 2, 3, 4, 5].map(|at| u64::from_le_bytes(words[at]));
        let flags = &bytes[FIXED_BYTES..];
        if head as u32 != VERSION || flags.len() > 512 {
            return Err("the state is not of this version".into());
        }
        // Out of range only in bytes that nobody saved: a round that never comes is a round that begins anew.
        self.round = u32::try_from(round).ok();
        self.pace.limit = pace;
        self.settle.limit = (head >> 32) as u32;
        self.settle.left = left;
        self.settle.left_before = (left_before != NONE).then_some(left_before);
        self.settle.guest_peak = guest_peak.min(u32::MAX.into());
        self.order.ordered = flags.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 != 0)).collect();
        Ok(())
    }
}
