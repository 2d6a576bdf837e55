//! Which blocks differ: one bit per granule, with summaries above, so that an empty map of 16 TiB is passed over in a few loads.
//!
//! Level 0 has a bit per granule (4 KiB or the logical block, whichever is larger). A bit of level n + 1 says whether a word of
//! level n has any bit set; the last level is one word. For 16 TiB level 0 takes 512 MiB and all summaries together 1.6 % of
//! that.

/// Bytes of the smallest granule.
pub const GRANULE_BYTES: u32 = 4096;

/// A set of blocks of one namespace, kept by the granule. Marking rounds outwards, taking rounds inwards, so that no rounding
/// ever makes a block clean that is not.
#[derive(Debug)]
pub struct DirtyMap {
    blocks: u64,
    /// log2 of the logical blocks in a granule.
    shift: u32,
    granules: u64,
    /// `levels[0]` has a bit per granule, each further level a bit per word of the one below.
    bits: Vec<u64>,
    summaries: Vec<Vec<u64>>,
    set: u64,
}

/// The bits `from..=to` of one word, both below 64.
#[inline]
fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (63 - to))
}

impl DirtyMap {
    /// An empty map of `blocks` logical blocks of `block_bytes` (a power of two).
    #[must_use]
    pub fn new(blocks: u64, block_bytes: u32) -> Self {
        let shift = (GRANULE_BYTES / block_bytes.clamp(1, GRANULE_BYTES)).ilog2();
        let granules = blocks.div_ceil(1 << shift);
        let words = |bits: u64| bits.div_ceil(64).max(1) as usize;
        let bits = vec![0; words(granules)];
        let mut summaries = Vec::new();
        let mut below = bits.len();
        while below > 1 {
            let level = vec![0; words(below as u64)];
            below = level.len();
            summaries.push(level);
        }
        Self { blocks, shift, granules, bits, summaries, set: 0 }
    }

    /// Logical blocks of the namespace.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Logical blocks of a granule.
    #[must_use]
    pub fn granule_blocks(&self) -> u64 {
        1 << self.shift
    }

    /// Granules that are set.
    #[inline]
    #[must_use]
    pub fn set_granules(&self) -> u64 {
        self.set
    }

    /// Nothing is set.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set == 0
    }

    /// Bytes of memory that the map holds.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let words = self.bits.len() + self.summaries.iter().map(Vec::len).sum::<usize>();
        words as u64 * 8
    }

    /// First and last granule that hold any of the blocks; `None` for no blocks or a start past the end.
    #[inline]
    fn outwards(&self, slba: u64, blocks: u64) -> Option<(u64, u64)> {
        if blocks == 0 || slba >= self.blocks {
            return None;
        }
        let last = slba.saturating_add(blocks - 1).min(self.blocks - 1);
        Some((slba >> self.shift, last >> self.shift))
    }

    /// First and last granule that lie within the blocks altogether (the last granule of a namespace may be short).
    fn inwards(&self, slba: u64, blocks: u64) -> Option<(u64, u64)> {
        let end = slba.saturating_add(blocks).min(self.blocks);
        let first = slba.div_ceil(1 << self.shift);
        let end = if end == self.blocks { self.granules } else { end >> self.shift };
        (first < end).then(|| (first, end - 1))
    }

    /// Sets the granules that hold any of the blocks; what lies past the end is left out. Returns how many were not set.
    #[inline(always)]
    pub fn mark(&mut self, slba: u64, blocks: u64) -> u64 {
        let Some((first, last)) = self.outwards(slba, blocks) else { return 0 };
        self.mark_granules(first, last)
    }

    /// As [`mark`](Self::mark), from one block to another, both within the namespace and the last not before the first.
    #[inline(always)]
    pub(crate) fn mark_to(&mut self, slba: u64, last: u64) -> u64 {
        self.mark_granules(slba >> self.shift, last >> self.shift)
    }

    #[inline(always)]
    fn mark_granules(&mut self, first: u64, last: u64) -> u64 {
        let word = first >> 6;
        if word != last >> 6 {
            return self.mark_words(first, last);
        }
        self.mark_word(word as usize, mask(first & 63, last & 63))
    }

    #[inline(always)]
    fn mark_word(&mut self, word: usize, mask: u64) -> u64 {
        let old = self.bits[word];
        if old & mask == mask {
            return 0;
        }
        self.bits[word] = old | mask;
        // The bits of a mask are neighbours: where none was set they need not be counted one by one.
        let newly = if old & mask == 0 { 64 - mask.leading_zeros() - mask.trailing_zeros() } else { (mask & !old).count_ones() };
        if old == 0 {
            self.raise(word);
        }
        self.set += u64::from(newly);
        u64::from(newly)
    }

    #[cold]
    fn mark_words(&mut self, first: u64, last: u64) -> u64 {
        let (from, to) = (first >> 6, last >> 6);
        let mut newly = self.mark_word(from as usize, mask(first & 63, 63));
        for word in from + 1..to {
            newly += self.mark_word(word as usize, u64::MAX);
        }
        newly + self.mark_word(to as usize, mask(0, last & 63))
    }

    /// Says in the summaries that a word has bits. The lowest two are written without a look at what they said: in a map that is
    /// nearly clean that is anybody's guess, and a wrong guess costs more than the second write.
    #[inline]
    fn raise(&mut self, mut below: usize) {
        for (depth, level) in self.summaries.iter_mut().enumerate() {
            let (word, bit) = (below >> 6, 1 << (below & 63));
            let old = level[word];
            level[word] = old | bit;
            if depth > 0 && old != 0 {
                return;
            }
            below = word;
        }
    }

    /// Asks the processor for the word that holds a block's bit: marks of many places ask for all of them first, so that what
    /// misses the caches comes side by side, and while something else is done.
    #[inline]
    pub fn prefetch(&self, slba: u64) {
        let word = usize::try_from(slba >> self.shift >> 6).unwrap_or(usize::MAX);
        if let Some(word) = self.bits.get(word) {
            dray_device::memory::prefetch(word);
        }
    }

    /// Clears the granules that lie within the blocks altogether. Returns how many were set.
    pub fn take(&mut self, slba: u64, blocks: u64) -> u64 {
        let Some((first, last)) = self.inwards(slba, blocks) else { return 0 };
        let (from, to) = (first >> 6, last >> 6);
        let mut cleared = 0;
        for word in from..=to {
            let low = if word == from { first & 63 } else { 0 };
            let high = if word == to { last & 63 } else { 63 };
            cleared += self.clear_word(word as usize, mask(low, high));
        }
        cleared
    }

    fn clear_word(&mut self, word: usize, mask: u64) -> u64 {
        let old = self.bits[word];
        if old & mask == 0 {
            return 0;
        }
        self.bits[word] = old & !mask;
        if old & !mask == 0 {
            self.lower(word);
        }
        let cleared = u64::from((old & mask).count_ones());
        self.set -= cleared;
        cleared
    }

    fn lower(&mut self, mut below: usize) {
        for level in &mut self.summaries {
            let word = below >> 6;
            level[word] &= !(1 << (below & 63));
            if level[word] != 0 {
                return;
            }
            below = word;
        }
    }

    /// Whether each granule that holds any of the blocks is set; what lies past the end counts as set.
    #[inline]
    #[must_use]
    pub fn all_marked(&self, slba: u64, blocks: u64) -> bool {
        let Some((first, last)) = self.outwards(slba, blocks) else { return true };
        self.granules_marked(first, last)
    }

    /// As [`all_marked`](Self::all_marked), from one block to another, both within the namespace and the last not before the first.
    #[inline]
    pub(crate) fn marked_to(&self, slba: u64, last: u64) -> bool {
        self.granules_marked(slba >> self.shift, last >> self.shift)
    }

    #[inline]
    fn granules_marked(&self, first: u64, last: u64) -> bool {
        let (from, to) = ((first >> 6) as usize, (last >> 6) as usize);
        if from == to {
            let mask = mask(first & 63, last & 63);
            return self.bits[from] & mask == mask;
        }
        let (head, tail) = (mask(first & 63, 63), mask(0, last & 63));
        self.bits[from] & head == head
            && self.bits[to] & tail == tail
            && self.bits[from + 1..to].iter().all(|&word| word == u64::MAX)
    }

    /// The next run of set granules at or after block `from` and before block `to`, in blocks, at most `max_blocks` long (at
    /// least a granule).
    #[must_use]
    pub fn next_run(&self, from: u64, to: u64, max_blocks: u64) -> Option<(u64, u64)> {
        if from >= to.min(self.blocks) {
            return None;
        }
        let end_granule = (to.min(self.blocks)).div_ceil(1 << self.shift);
        let first = self.next_set(from >> self.shift)?;
        if first >= end_granule {
            return None;
        }
        let most = (max_blocks >> self.shift).max(1);
        let end = self.run_end(first, first.saturating_add(most).min(end_granule));
        let slba = first << self.shift;
        Some((slba, (end << self.shift).min(self.blocks) - slba))
    }

    /// The first set granule at or after `from`.
    fn next_set(&self, from: u64) -> Option<u64> {
        let mut at = from;
        let mut level = 0;
        loop {
            let words = if level == 0 { &self.bits } else { self.summaries.get(level - 1)? };
            let word = (at >> 6) as usize;
            let rest = words.get(word)? & (u64::MAX << (at & 63));
            if rest != 0 {
                return Some(self.descend(level, (word as u64) << 6 | u64::from(rest.trailing_zeros())));
            }
            // Nothing in the rest of this word: look one level up, behind it.
            at = word as u64 + 1;
            level += 1;
        }
    }

    /// From a set bit of a level down to the first granule below it.
    fn descend(&self, mut level: usize, mut at: u64) -> u64 {
        while level > 0 {
            level -= 1;
            let words = if level == 0 { &self.bits } else { &self.summaries[level - 1] };
            at = at << 6 | u64::from(words[at as usize].trailing_zeros());
        }
        at
    }

    /// The first granule after `first` that is not set, at most `limit`.
    fn run_end(&self, first: u64, limit: u64) -> u64 {
        let mut at = first;
        while at < limit {
            let ones = u64::from((self.bits[(at >> 6) as usize] >> (at & 63)).trailing_ones());
            at += ones;
            if ones == 0 || at & 63 != 0 {
                break;
            }
        }
        at.min(limit)
    }

    /// Clears everything, a bounded piece at a time: about `words` words of 64 granules. True when the map is empty.
    pub fn clear_some(&mut self, words: usize) -> bool {
        for _ in 0..words {
            if self.set == 0 {
                return true;
            }
            let Some(granule) = self.next_set(0) else { return true };
            self.clear_word((granule >> 6) as usize, u64::MAX);
        }
        self.set == 0
    }
}

#[cfg(test)]
#[path = "dirty_tests.rs"]
mod tests;
