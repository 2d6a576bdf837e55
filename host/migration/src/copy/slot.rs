//! One transfer: its range, where it stands, and what was tried.

use crate::extents::Piece;
use crate::media::Media;
use dray_device::poll::Time;

/// The tag of flushes; transfers have their slot's number there.
pub(super) const FLUSH_TAG: u64 = u64::MAX;

pub(super) fn is_flush(tag: u64) -> bool {
    tag == FLUSH_TAG
}

/// A tag says the slot and how often the slot was used, so that an invented or repeated completion finds nothing.
pub(super) fn tag(index: usize, generation: u32) -> u64 {
    u64::from(generation) << 16 | index as u64
}

pub(super) fn index(tag: u64) -> usize {
    (tag & 0xffff) as usize
}

pub(super) fn generation(tag: u64) -> u32 {
    (tag >> 16) as u32
}

/// Where a transfer stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// No transfer.
    #[default]
    Free,
    /// The source reads.
    Reading,
    /// The data is there.
    Read,
    /// The destination writes, compares or marks.
    Writing,
    /// To be read (or marked) again.
    Again,
    /// Of unknown outcome: held until its queue is dead.
    Held,
}

/// One transfer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) generation: u32,
    pub(super) stage: Stage,
    pub(super) piece: Piece,
    /// The block under way, counted from the piece's first, where the transfer goes block by block.
    single: Option<u64>,
    /// Attempts of the part under way.
    pub(super) attempts: u8,
    /// The part under way is all zeroes.
    pub(super) zero: bool,
    /// The block under way is being marked as unreadable.
    pub(super) marking: bool,
    pub(super) submitted: Time,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            generation: 0,
            stage: Stage::Free,
            piece: Piece { namespace: 0, slba: 0, blocks: 0 },
            single: None,
            attempts: 0,
            zero: false,
            marking: false,
            submitted: Time(0),
        }
    }
}

impl Slot {
    pub(super) fn begin(&mut self, piece: Piece) {
        *self = Self { generation: self.generation, stage: Stage::Again, piece, ..Self::default() };
    }

    pub(super) fn free(&mut self) {
        *self = Self { generation: self.generation.wrapping_add(1), ..Self::default() };
    }

    /// The part under way: the whole piece, or one block of it.
    pub(super) fn part(&self) -> Piece {
        match self.single {
            Some(block) => Piece { slba: self.piece.slba + block, blocks: 1, ..self.piece },
            None => self.piece,
        }
    }

    pub(super) fn part_bytes(&self, media: &Media) -> u64 {
        let part = self.part();
        media.namespaces().get(part.namespace).map_or(0, |n| part.blocks * u64::from(n.geometry.block_bytes))
    }

    /// Some blocks of the piece have been copied one by one already.
    pub(super) fn is_past_first(&self) -> bool {
        self.single.is_some_and(|block| block > 0)
    }

    /// From now on block by block; false when it is one block already.
    pub(super) fn narrow(&mut self) -> bool {
        let narrowed = self.single.is_none() && self.piece.blocks > 1;
        if narrowed {
            (self.single, self.attempts) = (Some(0), 0);
        }
        narrowed
    }

    /// Goes on to the next block; false when the piece is done.
    pub(super) fn next_part(&mut self) -> bool {
        let next = self.single.map_or(self.piece.blocks, |block| block + 1);
        (self.attempts, self.marking, self.zero) = (0, false, false);
        self.single = Some(next);
        next < self.piece.blocks
    }
}
