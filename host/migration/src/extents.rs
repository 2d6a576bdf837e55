//! What to copy next: the extents that the copy policy ordered, and the sweep of the host over what was left out.

use crate::media::Media;
use dray_policy::packed;
use std::collections::VecDeque;

/// Extents that wait at most; a policy that orders more is asked again, so nothing is lost.
pub const MAX_QUEUED: usize = 8192;

/// A piece of one namespace. Blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Place of the namespace in [`Media::namespaces`].
    pub namespace: usize,
    /// First LBA.
    pub slba: u64,
    /// Logical blocks.
    pub blocks: u64,
}

impl Piece {
    /// The block behind the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.slba + self.blocks
    }

    /// Whether both have a block in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.namespace == other.namespace && self.slba < other.end() && other.slba < self.end()
    }
}

/// What the engine is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The queued extents, in order.
    Ordered,
    /// Everything that is dirty, in order of LBA, again and again.
    Sweep,
    /// Every block, dirty or not, once.
    All,
}

/// The engine's source of work.
#[derive(Debug)]
pub struct Extents {
    queue: VecDeque<Piece>,
    mode: Mode,
    /// Where a sweep is.
    at: (usize, u64),
}

impl Default for Extents {
    fn default() -> Self {
        Self { queue: VecDeque::with_capacity(64), mode: Mode::Ordered, at: (0, 0) }
    }
}

impl Extents {
    /// Appends the extents of a policy; those that do not fit are left to be ordered again.
    pub fn order(&mut self, packed: &[u8], media: &Media) {
        for extent in packed::extents(packed) {
            if let Some(namespace) = media.find(extent.nsid) {
                self.push(Piece { namespace, slba: extent.slba, blocks: u64::from(extent.blocks) });
            }
        }
    }

    /// Appends one piece; false when there is no room.
    pub fn push(&mut self, piece: Piece) -> bool {
        let room = self.queue.len() < MAX_QUEUED;
        if room && piece.blocks > 0 {
            self.queue.push_back(piece);
        }
        room
    }

    /// Ordered extents that wait.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Dirty blocks in the extents that wait, estimated by region.
    #[must_use]
    pub fn queued_blocks(&self, media: &Media) -> u64 {
        let dirty = |piece: &Piece| media.namespaces().get(piece.namespace).map_or(0, |n| n.dirty_within(piece.slba, piece.blocks));
        self.queue.iter().map(dirty).sum()
    }

    /// Drops what was ordered and copies whatever is dirty, in order of LBA.
    pub fn sweep(&mut self) {
        self.queue.clear();
        (self.mode, self.at) = (Mode::Sweep, (0, 0));
    }

    /// Drops what was ordered and passes every block once.
    pub fn everything(&mut self) {
        self.queue.clear();
        (self.mode, self.at) = (Mode::All, (0, 0));
    }

    /// Back to what policies order.
    pub fn by_order(&mut self) {
        self.queue.clear();
        self.mode = Mode::Ordered;
    }

    /// Nothing is left to hand out: of an order, or of the pass over every block. (A sweep ends when the map is clean.)
    #[must_use]
    pub fn is_exhausted(&self, media: &Media) -> bool {
        match self.mode {
            Mode::Ordered => self.queue.is_empty(),
            Mode::Sweep => media.is_clean(),
            Mode::All => self.at.0 >= media.namespaces().len(),
        }
    }

    /// The next piece to copy, at most `max_bytes` long and free of `busy` ranges (what is busy stays dirty and is found by a
    /// later pass, rule 2). Looks at a bounded number of places.
    pub fn next(&mut self, media: &mut Media, max_bytes: usize, busy: &dyn Fn(&Piece) -> Option<Piece>) -> Option<Piece> {
        for _ in 0..32 {
            let piece = match self.mode {
                Mode::Ordered => self.next_ordered(media, max_bytes),
                Mode::Sweep => self.next_swept(media, max_bytes),
                Mode::All => self.next_of_all(media, max_bytes),
            };
            match piece {
                Found::Nothing => return None,
                Found::Look => {}
                Found::Piece(piece) => {
                    if let Some(piece) = self.avoid(piece, busy) {
                        self.move_to(piece.end());
                        return Some(piece);
                    }
                }
            }
        }
        None
    }

    /// Cuts a piece before the first busy range in it, or moves behind it.
    fn avoid(&mut self, piece: Piece, busy: &dyn Fn(&Piece) -> Option<Piece>) -> Option<Piece> {
        let Some(held) = busy(&piece) else { return Some(piece) };
        if self.mode != Mode::All && held.slba <= piece.slba {
            self.move_to(held.end());
            return None;
        }
        // What comes before the busy range can be copied; a pass over every block waits in front of it.
        (held.slba > piece.slba).then(|| Piece { blocks: held.slba - piece.slba, ..piece })
    }

    fn move_to(&mut self, block: u64) {
        if self.mode != Mode::Ordered {
            self.at.1 = block;
        } else if let Some(front) = self.queue.front_mut() {
            let end = front.end().max(block);
            (front.slba, front.blocks) = (block, end - block);
        }
    }

    fn next_ordered(&mut self, media: &mut Media, max_bytes: usize) -> Found {
        let Some(front) = self.queue.front().copied() else { return Found::Nothing };
        let Some(namespace) = media.namespace(front.namespace) else {
            self.queue.pop_front();
            return Found::Look;
        };
        let most = (max_bytes as u64 / u64::from(namespace.geometry.block_bytes)).max(1);
        let run = if front.blocks == 0 { None } else { namespace.next_run(front.slba, front.end(), most) };
        match run {
            Some((slba, blocks)) => {
                namespace.pass(front.slba, (slba + blocks).min(front.end()).saturating_sub(front.slba));
                Found::Piece(Piece { namespace: front.namespace, slba, blocks })
            }
            None => {
                namespace.pass(front.slba, front.blocks);
                self.queue.pop_front();
                Found::Look
            }
        }
    }

    fn next_swept(&mut self, media: &mut Media, max_bytes: usize) -> Found {
        let namespaces = media.namespaces();
        let Some(namespace) = namespaces.get(self.at.0) else {
            self.at = (0, 0);
            // Around once more, at the next call: what is dirty behind us came while we went, or was busy.
            return Found::Nothing;
        };
        let most = (max_bytes as u64 / u64::from(namespace.geometry.block_bytes)).max(1);
        match namespace.next_run(self.at.1, namespace.geometry.blocks, most) {
            Some((slba, blocks)) => Found::Piece(Piece { namespace: self.at.0, slba, blocks }),
            None => {
                self.at = (self.at.0 + 1, 0);
                Found::Look
            }
        }
    }

    fn next_of_all(&mut self, media: &mut Media, max_bytes: usize) -> Found {
        let Some(namespace) = media.namespaces().get(self.at.0) else { return Found::Nothing };
        let most = (max_bytes as u64 / u64::from(namespace.geometry.block_bytes)).max(1);
        let blocks = (namespace.geometry.blocks.saturating_sub(self.at.1)).min(most);
        if blocks == 0 {
            self.at = (self.at.0 + 1, 0);
            return Found::Look;
        }
        Found::Piece(Piece { namespace: self.at.0, slba: self.at.1, blocks })
    }
}

/// What one look found.
enum Found {
    Piece(Piece),
    /// Nothing here, look on.
    Look,
    Nothing,
}
