//! The comparison at the end: nothing lost, nothing torn, nothing in the wrong place, nothing else changed.
//!
//! [`compare`] reads the frozen source, the destination and the ledger, after all controllers are gone. A block in which the two
//! disks differ is explained only if the ledger says that a write from the suspend floor on was issued to it, and the
//! destination holds a whole write of that block, from the suspend floor on, in `[acked, issued]`. Every block with an
//! acknowledged write must hold that write or a later issued one. [`check`] makes the second test alone, on one disk: after a
//! migration that was cancelled, on the source.

use crate::ledger::Ledger;
use crate::reader::BlockReader;
use crate::tag::{BLOCK_BYTES, Block, Reading, Tag};
use std::io;

/// Offenders that are kept with their reasons.
pub const MAX_OFFENDERS: usize = 16;
/// Blocks read at once.
const CHUNK_BLOCKS: usize = 256;

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The disks differ and the guest cannot have written here after the source was suspended.
    #[error("differs from the source, and no write after Suspend went there")]
    Unexplained,
    /// An acknowledged write is gone, and nothing of the guest's is there.
    #[error("write {acked} was acknowledged and is lost: the block has no tag")]
    Lost {
        /// The acknowledged write.
        acked: u64,
    },
    /// An older write is there.
    #[error("write {acked} was acknowledged, and {found} is there: rolled back")]
    RolledBack {
        /// The acknowledged write, or the suspend floor where the disks differ.
        acked: u64,
        /// The one found.
        found: u64,
    },
    /// A write is there that was never issued to this block.
    #[error("write {found} is there, and the last one issued was {issued}")]
    NeverIssued {
        /// The last one issued.
        issued: u64,
        /// The one found.
        found: u64,
    },
    /// Sectors of several writes, or sectors that are no whole writes.
    #[error("torn at sector {sector}")]
    Torn {
        /// The first sector that does not fit.
        sector: u8,
    },
    /// A sector whose bits are not those of its tag.
    #[error("sector {sector} is damaged")]
    Damaged {
        /// The sector.
        sector: u8,
    },
    /// A write of another block, or of another guest.
    #[error("misplaced: it is {0}")]
    Misplaced(Tag),
}

/// A block and what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offender {
    /// The block, in units of [`BLOCK_BYTES`].
    pub block: u64,
    /// What is wrong.
    pub fault: Fault,
}

impl std::fmt::Display for Offender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "block {} (byte {}): {}", self.block, u128::from(self.block) * BLOCK_BYTES as u128, self.fault)
    }
}

/// What the comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Blocks of the source that were compared (all of them), or blocks that were checked.
    pub blocks_compared: u64,
    /// Blocks that differ without an explanation by the ledger.
    pub blocks_different: u64,
    /// Blocks that differ because the guest wrote them after Suspend.
    pub blocks_written_since: u64,
    /// Writes that were acknowledged to the guest.
    pub writes_acknowledged: u64,
    /// Blocks whose last acknowledged write is not there: lost, rolled back, torn or damaged.
    pub writes_missing: u64,
    /// Torn or damaged blocks.
    pub torn: u64,
    /// Blocks that hold a write of another block.
    pub misplaced: u64,
    /// The first of them.
    pub offenders: Vec<Offender>,
}

impl Comparison {
    /// Nothing is wrong, and something was compared.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.blocks_compared > 0
            && self.offenders.is_empty()
            && self.blocks_different + self.writes_missing + self.torn + self.misplaced == 0
    }

    fn offend(&mut self, block: u64, fault: Fault) {
        match fault {
            Fault::Torn { .. } | Fault::Damaged { .. } => self.torn += 1,
            Fault::Misplaced(_) => self.misplaced += 1,
            _ => {}
        }
        if self.offenders.len() < MAX_OFFENDERS {
            self.offenders.push(Offender { block, fault });
        }
    }
}

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The destination is shorter than the source.
    #[error("the destination has {destination} blocks of 4 KiB, the source {source_blocks}")]
    TooShort {
        /// The source's blocks.
        source_blocks: u64,
        /// The destination's.
        destination: u64,
    },
    /// The ledger names a block that the disk does not have.
    #[error("the ledger names block {block}, the disk has {blocks}")]
    OutOfRange {
        /// The block.
        block: u64,
        /// Blocks of the disk.
        blocks: u64,
    },
    /// A disk cannot be read.
    #[error("reading the {disk} at block {block}: {error}")]
    Read {
        /// "source" or "destination".
        disk: &'static str,
        /// First block of the piece.
        block: u64,
        /// What happened.
        error: io::Error,
    },
}

/// Compares the whole source with the destination; see the module's text for the rule.
///
/// # Errors
/// [`VerifyError`] when it cannot be done; differences are in the [`Comparison`].
pub fn compare(
    source: &mut dyn BlockReader,
    destination: &mut dyn BlockReader,
    ledger: &Ledger,
) -> Result<Comparison, VerifyError> {
    let blocks = source.blocks();
    if destination.blocks() < blocks {
        return Err(VerifyError::TooShort { source_blocks: blocks, destination: destination.blocks() });
    }
    let mut walk = Walk::new(ledger, blocks)?;
    let (mut left, mut right) = (vec![0; CHUNK_BLOCKS * BLOCK_BYTES], vec![0; CHUNK_BLOCKS * BLOCK_BYTES]);
    for first in (0..blocks).step_by(CHUNK_BLOCKS) {
        let len = (blocks - first).min(CHUNK_BLOCKS as u64) as usize * BLOCK_BYTES;
        read(source, "source", first, &mut left[..len])?;
        read(destination, "destination", first, &mut right[..len])?;
        for (block, (left, right)) in
            (first..).zip(left[..len].chunks_exact(BLOCK_BYTES).zip(right[..len].chunks_exact(BLOCK_BYTES)))
        {
            walk.block(block, left == right, right);
        }
    }
    Ok(walk.found)
}

/// Checks that every acknowledged write is on one disk. `blocks_compared` counts the blocks that were checked.
///
/// # Errors
/// [`VerifyError`] when it cannot be done.
pub fn check(disk: &mut dyn BlockReader, ledger: &Ledger) -> Result<Comparison, VerifyError> {
    let mut walk = Walk::new(ledger, disk.blocks())?;
    let mut bytes = [0; BLOCK_BYTES];
    for (block, _) in ledger.sorted() {
        read(disk, "disk", *block, &mut bytes)?;
        walk.block(*block, true, &bytes);
    }
    Ok(walk.found)
}

fn read(disk: &mut dyn BlockReader, name: &'static str, block: u64, into: &mut [u8]) -> Result<(), VerifyError> {
    disk.read(block, into).map_err(|error| VerifyError::Read { disk: name, block, error })
}

struct Walk<'a> {
    ledger: &'a Ledger,
    /// Targets not yet passed, ascending.
    targets: &'a [(u64, u32)],
    scratch: Block,
    found: Comparison,
}

impl<'a> Walk<'a> {
    fn new(ledger: &'a Ledger, blocks: u64) -> Result<Self, VerifyError> {
        let targets = ledger.sorted();
        if let Some((block, _)) = targets.last().filter(|(block, _)| *block >= blocks) {
            return Err(VerifyError::OutOfRange { block: *block, blocks });
        }
        let found = Comparison { writes_acknowledged: ledger.acknowledged(), ..Comparison::default() };
        Ok(Self { ledger, targets, scratch: Block::default(), found })
    }

    /// Judges the next block; blocks come in ascending order.
    fn block(&mut self, block: u64, same: bool, bytes: &[u8]) {
        self.found.blocks_compared += 1;
        let target = match self.targets {
            [(first, index), rest @ ..] if *first == block => {
                self.targets = rest;
                Some(*index as usize)
            }
            _ => None,
        };
        if same && target.is_none() {
            return;
        }
        self.scratch.bytes_mut().copy_from_slice(bytes);
        let reading = self.scratch.read(self.ledger.seed());
        match target {
            Some(index) => self.target(block, index, same, reading),
            None => self.stranger(block, reading),
        }
    }

    /// A block that the guest never writes, and that differs.
    fn stranger(&mut self, block: u64, reading: Reading) {
        self.found.blocks_different += 1;
        let fault = match reading {
            Reading::Whole(tag) => Fault::Misplaced(tag),
            _ => Fault::Unexplained,
        };
        self.found.offend(block, fault);
    }

    fn target(&mut self, block: u64, index: usize, same: bool, reading: Reading) {
        let (acked, issued) = (self.ledger.acked(index), self.ledger.issued(index));
        let held = window(self.ledger.guest(), block, acked, issued, reading);
        if acked > 0 && held.is_err() {
            self.found.writes_missing += 1;
        }
        let explained = same || self.is_explained(issued, reading);
        if !explained || (held.is_err() && !same) {
            self.found.blocks_different += 1;
        } else if !same {
            self.found.blocks_written_since += 1;
        }
        match held {
            Err(fault) => self.found.offend(block, fault),
            Ok(()) if !explained => self.found.offend(block, self.why_unexplained(reading)),
            Ok(()) => {}
        }
    }

    /// Whether a difference comes from a write after Suspend: issued from the floor on, and it is such a write that is there.
    fn is_explained(&self, issued: u64, reading: Reading) -> bool {
        let Some(floor) = self.ledger.suspend_floor() else { return false };
        issued >= floor && matches!(reading, Reading::Whole(tag) if tag.seq >= floor)
    }

    fn why_unexplained(&self, reading: Reading) -> Fault {
        match (reading, self.ledger.suspend_floor()) {
            (Reading::Whole(tag), Some(floor)) if tag.seq < floor => Fault::RolledBack { acked: floor, found: tag.seq },
            _ => Fault::Unexplained,
        }
    }
}

/// Whether what was read from a target block can be there when `acked` was acknowledged and `issued` issued last.
///
/// # Errors
/// The [`Fault`].
pub fn window(guest: u32, block: u64, acked: u64, issued: u64, reading: Reading) -> Result<(), Fault> {
    match reading {
        Reading::Untagged if acked == 0 => Ok(()),
        Reading::Untagged => Err(Fault::Lost { acked }),
        Reading::Torn { sector, .. } => Err(Fault::Torn { sector }),
        // Before the first write the block may hold a tag of an earlier guest, with another seed.
        Reading::Damaged { .. } if issued == 0 => Ok(()),
        Reading::Damaged { sector } => Err(Fault::Damaged { sector }),
        Reading::Whole(tag) if tag.block != block || tag.guest != guest => Err(Fault::Misplaced(tag)),
        Reading::Whole(tag) if tag.seq < acked => Err(Fault::RolledBack { acked, found: tag.seq }),
        Reading::Whole(tag) if tag.seq > issued => Err(Fault::NeverIssued { issued, found: tag.seq }),
        Reading::Whole(_) => Ok(()),
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
