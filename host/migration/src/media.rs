//! The namespaces that move, as the source sees them: what is dirty, what is not flushed yet, and counters by region.
//!
//! All changes of the dirty map go through [`Moving`], so that the counters that policies see are always those of the map.

use crate::dirty::DirtyMap;
use dray_device::poll::Time;
use dray_policy::packed::{NEVER, REGION_BYTES, Region};
use dray_policy::seam::{MAX_NAMESPACES, MAX_REGIONS, NamespaceInfo};

/// Regions are at least this large, so that small namespaces do not cost a policy thousands of them.
const MIN_REGION_BYTES: u64 = 1 << 20;
/// Regions that [`Media::fill_some`] marks in one call.
const FILL_GRANULES: u64 = 1 << 20;

/// A namespace that moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// NSID at the source.
    pub source: u32,
    /// NSID at the destination.
    pub destination: u32,
    /// Logical blocks.
    pub blocks: u64,
    /// Bytes of a logical block, a power of two.
    pub block_bytes: u32,
}

/// Why namespaces cannot be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// No namespace, or more than a migration set may have.
    #[error("{0} namespaces to move; a migration set has 1 to {MAX_NAMESPACES}")]
    Count(usize),
    /// A namespace of no blocks, or with blocks that are no power of two from 512 bytes to 64 KiB.
    #[error("namespace {nsid} has {blocks} blocks of {block_bytes} bytes, which cannot be moved")]
    Odd {
        /// NSID at the source.
        nsid: u32,
        /// Logical blocks.
        blocks: u64,
        /// Bytes of a block.
        block_bytes: u32,
    },
    /// The same namespace twice.
    #[error("namespace {0} is named twice")]
    Twice(u32),
    /// More blocks than the counters by region can hold.
    #[error("the namespaces are too large together to be counted in {MAX_REGIONS} regions")]
    TooLarge,
}

/// Counters of one region of a namespace. Blocks, unless it says otherwise.
#[derive(Clone, Copy, Debug)]
struct Counters {
    /// Granules that are dirty.
    dirty: u32,
    /// Blocks reported as changed this round, saturating.
    changed: u32,
    /// Milliseconds since the migration began at the last change; [`NEVER`] = none.
    changed_ms: u32,
    /// Blocks that extents of this round have passed, saturating.
    passed: u32,
    /// log2 of the chunk in blocks.
    chunk_log2: u8,
    first_copy_open: bool,
    held: bool,
    /// Something was written to the destination in this migration.
    written: bool,
}

/// One moving namespace with its maps and counters.
#[derive(Debug)]
pub struct Moving {
    /// What it is.
    pub geometry: Geometry,
    dirty: DirtyMap,
    unflushed: DirtyMap,
    region_log2: u32,
    regions: Vec<Counters>,
    /// The first region that is still to be marked whole ("everything may have changed").
    filling: Option<usize>,
    /// Blocks that reports of changes made dirty since the migration began, by the granule.
    dirtied: u64,
}

impl Moving {
    fn new(geometry: Geometry, region_log2: u32) -> Self {
        let map = || DirtyMap::new(geometry.blocks, geometry.block_bytes);
        let fresh = Counters {
            dirty: 0,
            changed: 0,
            changed_ms: NEVER,
            passed: 0,
            chunk_log2: 0,
            first_copy_open: true,
            held: false,
            written: false,
        };
        let regions = vec![fresh; geometry.blocks.div_ceil(1 << region_log2) as usize];
        Self { geometry, dirty: map(), unflushed: map(), region_log2, regions, filling: None, dirtied: 0 }
    }

    /// The map of what is to be copied.
    #[must_use]
    pub fn dirty(&self) -> &DirtyMap {
        &self.dirty
    }

    /// The map of what the destination has taken but not flushed (rule 3).
    #[must_use]
    pub fn unflushed(&self) -> &DirtyMap {
        &self.unflushed
    }

    /// Blocks of a region (the last may be shorter).
    #[must_use]
    pub fn region_blocks(&self) -> u64 {
        1 << self.region_log2
    }

    fn region_at(&self, region: usize) -> (u64, u64) {
        let slba = (region as u64) << self.region_log2;
        (slba, (self.geometry.blocks - slba).min(1 << self.region_log2))
    }

    /// Marks blocks that were reported as changed. Returns how many granules were clean.
    #[inline]
    pub fn mark(&mut self, slba: u64, blocks: u64) -> u64 {
        let newly = self.mark_again(slba, blocks);
        self.dirtied += newly << self.dirty.granule_blocks().trailing_zeros();
        newly
    }

    /// Marks blocks as dirty that are to be copied (again), without counting a change; what lies past the end is left out.
    /// Returns how many granules were clean.
    #[inline(always)]
    pub fn mark_again(&mut self, slba: u64, blocks: u64) -> u64 {
        let Some((region, last)) = self.one_region(slba, blocks) else { return self.mark_regions(slba, blocks) };
        let newly = self.dirty.mark_to(slba, last);
        self.regions[region].dirty += newly as u32;
        newly
    }

    /// The region that all the blocks lie in and the last of them; none for no blocks, for more than one region and for what
    /// leaves the namespace.
    #[inline(always)]
    fn one_region(&self, slba: u64, blocks: u64) -> Option<(usize, u64)> {
        let last = slba.wrapping_add(blocks).wrapping_sub(1);
        let region = slba >> self.region_log2;
        let one = (slba <= last) & (last < self.geometry.blocks) & (region == last >> self.region_log2);
        one.then_some((region as usize, last))
    }

    #[cold]
    fn mark_regions(&mut self, slba: u64, blocks: u64) -> u64 {
        let end = slba.saturating_add(blocks).min(self.geometry.blocks);
        let (mut at, mut newly) = (slba, 0);
        while at < end {
            let next = (((at >> self.region_log2) + 1) << self.region_log2).min(end);
            let part = self.dirty.mark(at, next - at);
            self.regions[(at >> self.region_log2) as usize].dirty += part as u32;
            newly += part;
            at = next;
        }
        newly
    }

    /// The second look at blocks that were reported as changed: marks what is not marked, and counts the change for policies.
    /// Returns how many granules were clean.
    #[inline(always)]
    pub fn mark_reported(&mut self, slba: u64, blocks: u64, now_ms: u32) -> u64 {
        let Some((region, last)) = self.one_region(slba, blocks) else { return self.mark_reported_regions(slba, blocks, now_ms) };
        let marked = self.dirty.marked_to(slba, last);
        let region = &mut self.regions[region];
        region.changed = region.changed.saturating_add(u32::try_from(blocks).unwrap_or(u32::MAX));
        region.changed_ms = now_ms;
        if marked { 0 } else { self.mark_omitted(slba, blocks) }
    }

    #[cold]
    fn mark_reported_regions(&mut self, slba: u64, blocks: u64, now_ms: u32) -> u64 {
        self.count_change(slba, blocks, now_ms);
        self.mark_omitted(slba, blocks)
    }

    #[cold]
    fn mark_omitted(&mut self, slba: u64, blocks: u64) -> u64 {
        if self.all_marked(slba, blocks) { 0 } else { self.mark(slba, blocks) }
    }

    /// Whether the blocks are marked, or lie in regions that are still to be marked whole.
    #[inline]
    #[must_use]
    pub fn all_marked(&self, slba: u64, blocks: u64) -> bool {
        self.dirty.all_marked(slba, blocks) || self.filling.is_some_and(|region| slba >> self.region_log2 >= region as u64)
    }

    /// Whether all of it is still to be marked.
    #[must_use]
    pub fn everything_marked(&self) -> bool {
        self.filling == Some(0) || self.dirty_blocks() == self.geometry.blocks
    }

    /// Counts a reported change of blocks within the namespace, for what policies see.
    fn count_change(&mut self, slba: u64, blocks: u64, now_ms: u32) {
        let (mut at, end) = (slba, slba.saturating_add(blocks).min(self.geometry.blocks));
        while at < end {
            let index = (at >> self.region_log2) as usize;
            let next = (((index as u64) + 1) << self.region_log2).min(end);
            let Some(region) = self.regions.get_mut(index) else { return };
            region.changed = region.changed.saturating_add((next - at).min(u64::from(u32::MAX)) as u32);
            region.changed_ms = now_ms;
            at = next;
        }
    }

    /// Clears the dirty bits of blocks that are about to be read (rule 1). Returns how many granules were set.
    pub fn take(&mut self, slba: u64, blocks: u64) -> u64 {
        let (mut at, end) = (slba, slba.saturating_add(blocks).min(self.geometry.blocks));
        let mut cleared = 0;
        while at < end {
            let index = (at >> self.region_log2) as usize;
            let next = (((index as u64) + 1) << self.region_log2).min(end);
            let part = self.dirty.take(at, next - at);
            self.regions[index].dirty -= part as u32;
            cleared += part;
            at = next;
        }
        cleared
    }

    /// The destination has taken the blocks; they count as moved only once it has flushed them (rule 3).
    pub fn copied(&mut self, slba: u64, blocks: u64) {
        self.unflushed.mark(slba, blocks);
    }

    /// Something other than zeroes is about to be written to these blocks of the destination (rule 4).
    pub fn written(&mut self, slba: u64, blocks: u64) {
        let (from, to) = (slba >> self.region_log2, (slba + blocks.max(1) - 1) >> self.region_log2);
        for region in self.regions.iter_mut().take(to as usize + 1).skip(from as usize) {
            region.written = true;
        }
    }

    /// Whether nothing but zeroes was written to the regions of these blocks in this migration.
    #[must_use]
    pub fn untouched(&self, slba: u64, blocks: u64) -> bool {
        let (from, to) = (slba >> self.region_log2, (slba + blocks.max(1) - 1) >> self.region_log2);
        self.regions.iter().take(to as usize + 1).skip(from as usize).all(|region| !region.written)
    }

    /// The next dirty run from block `from`, before `to`, cut to the plan's chunk where it lies, and to `max_blocks`.
    #[must_use]
    pub fn next_run(&self, from: u64, to: u64, max_blocks: u64) -> Option<(u64, u64)> {
        let (slba, blocks) = self.dirty.next_run(from, to, max_blocks)?;
        let index = (slba >> self.region_log2) as usize;
        let chunk = (1u64 << self.regions[index].chunk_log2.min(30)).max(self.dirty.granule_blocks());
        let chunk_end = (slba / chunk + 1).saturating_mul(chunk);
        let region_end = ((index as u64) + 1) << self.region_log2;
        Some((slba, blocks.min(chunk_end - slba).min(region_end - slba)))
    }

    /// An extent of this round has passed these blocks, whether or not they were dirty.
    pub fn pass(&mut self, slba: u64, blocks: u64) {
        let (mut at, end) = (slba, slba.saturating_add(blocks).min(self.geometry.blocks));
        while at < end {
            let index = (at >> self.region_log2) as usize;
            let next = (((index as u64) + 1) << self.region_log2).min(end);
            let region = &mut self.regions[index];
            region.passed = region.passed.saturating_add((next - at) as u32);
            at = next;
        }
    }

    /// Dirty blocks within an extent, estimated from the counters: exact for whole regions.
    #[must_use]
    pub fn dirty_within(&self, slba: u64, blocks: u64) -> u64 {
        let (mut at, end) = (slba, slba.saturating_add(blocks).min(self.geometry.blocks));
        let mut sum = 0;
        while at < end {
            let index = (at >> self.region_log2) as usize;
            let next = (((index as u64) + 1) << self.region_log2).min(end);
            sum += (u64::from(self.regions[index].dirty) * self.dirty.granule_blocks()).min(next - at);
            at = next;
        }
        sum
    }

    /// Dirty blocks; the last granule counts whole.
    #[must_use]
    pub fn dirty_blocks(&self) -> u64 {
        let unfilled = self.filling.map_or(0, |region| self.geometry.blocks - self.region_at(region).0);
        (self.dirty.set_granules() * self.dirty.granule_blocks() + unfilled).min(self.geometry.blocks)
    }

    /// Dirty blocks in regions that the plan holds for later.
    #[must_use]
    pub fn held_blocks(&self) -> u64 {
        let held = self.regions.iter().filter(|region| region.held).map(|region| u64::from(region.dirty)).sum::<u64>();
        held * self.dirty.granule_blocks()
    }

    /// Everything may have changed: all is marked, a bounded piece per [`Media::fill_some`]; until then the namespace is not
    /// clean.
    pub fn mark_everything(&mut self) {
        self.filling = Some(0);
    }

    fn fill_some(&mut self, granules: &mut u64) {
        while let Some(region) = self.filling
            && *granules > 0
        {
            let (slba, blocks) = self.region_at(region);
            self.mark_again(slba, blocks);
            *granules = granules.saturating_sub((blocks >> self.dirty.granule_blocks().ilog2()).max(1));
            self.filling = (region + 1 < self.regions.len()).then_some(region + 1);
        }
    }

    /// Nothing is to be copied and nothing is still to be marked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.filling.is_none()
    }

    /// Merges what the destination has not flushed back into what is to be copied: the destination has restarted (rule 3).
    pub fn merge_unflushed(&mut self) {
        let mut at = 0;
        while let Some((slba, blocks)) = self.unflushed.next_run(at, self.geometry.blocks, u64::MAX) {
            self.mark_again(slba, blocks);
            at = slba + blocks;
        }
    }

    /// The destination has flushed all it had taken: a bounded piece of the second map is cleared. True when it is empty.
    pub fn flushed_some(&mut self, words: usize) -> bool {
        self.unflushed.clear_some(words)
    }
}

/// All moving namespaces, in ascending order of the source's NSID.
#[derive(Debug)]
pub struct Media {
    namespaces: Vec<Moving>,
}

impl Media {
    /// No namespaces, before they are known.
    pub(crate) fn none() -> Self {
        Self { namespaces: Vec::new() }
    }

    /// Maps for namespaces, nothing dirty.
    ///
    /// # Errors
    /// [`GeometryError`].
    pub fn new(geometries: &[Geometry]) -> Result<Self, GeometryError> {
        if geometries.is_empty() || geometries.len() > MAX_NAMESPACES {
            return Err(GeometryError::Count(geometries.len()));
        }
        for g in geometries {
            let Geometry { source: nsid, blocks, block_bytes, .. } = *g;
            let usual = block_bytes.is_power_of_two() && (512..=65_536).contains(&block_bytes);
            if blocks == 0 || blocks > u64::MAX / 65_536 || !usual {
                return Err(GeometryError::Odd { nsid, blocks, block_bytes });
            }
        }
        let mut sorted = geometries.to_vec();
        sorted.sort_unstable_by_key(|g| g.source);
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].source == pair[1].source) {
            return Err(GeometryError::Twice(pair[0].source));
        }
        let bytes_log2 = region_bytes_log2(&sorted).ok_or(GeometryError::TooLarge)?;
        let namespaces = sorted.iter().map(|g| Moving::new(*g, bytes_log2 - g.block_bytes.ilog2())).collect();
        Ok(Self { namespaces })
    }

    /// The namespaces, by ascending NSID of the source.
    #[must_use]
    pub fn namespaces(&self) -> &[Moving] {
        &self.namespaces
    }

    /// One of them by its place in that order.
    #[must_use]
    pub fn namespace(&mut self, index: usize) -> Option<&mut Moving> {
        self.namespaces.get_mut(index)
    }

    /// The place of a source NSID.
    #[inline]
    #[must_use]
    pub fn find(&self, nsid: u32) -> Option<usize> {
        match self.namespaces.as_slice() {
            [only] => (only.geometry.source == nsid).then_some(0),
            all => all.binary_search_by_key(&nsid, |n| n.geometry.source).ok(),
        }
    }

    /// As policies see them.
    #[must_use]
    pub fn infos(&self) -> Vec<NamespaceInfo> {
        let info = |n: &Moving| NamespaceInfo {
            nsid: n.geometry.source,
            blocks: n.geometry.blocks,
            block_bytes: n.geometry.block_bytes,
        };
        self.namespaces.iter().map(info).collect()
    }

    /// Regions of all namespaces.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.namespaces.iter().map(|n| n.regions.len()).sum()
    }

    /// Nothing is to be copied.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.namespaces.iter().all(Moving::is_clean)
    }

    /// Dirty blocks of all namespaces.
    #[must_use]
    pub fn dirty_blocks(&self) -> u64 {
        self.namespaces.iter().map(Moving::dirty_blocks).sum()
    }

    /// Blocks dirtied by reported changes since the migration began.
    #[must_use]
    pub fn dirtied_blocks(&self) -> u64 {
        self.namespaces.iter().map(|n| n.dirtied).sum()
    }

    /// Bytes of a block, of the namespace with the largest ones.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.namespaces.iter().map(|n| u64::from(n.geometry.block_bytes)).max().unwrap_or(512)
    }

    /// Dirty bytes of all namespaces.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.namespaces.iter().map(|n| n.dirty_blocks() * u64::from(n.geometry.block_bytes)).sum()
    }

    /// Bytes of all namespaces.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.namespaces.iter().map(|n| n.geometry.blocks * u64::from(n.geometry.block_bytes)).sum()
    }

    /// Dirty blocks in held regions.
    #[must_use]
    pub fn held_blocks(&self) -> u64 {
        self.namespaces.iter().map(Moving::held_blocks).sum()
    }

    /// Everything may have changed, everywhere.
    pub fn mark_everything(&mut self) {
        self.namespaces.iter_mut().for_each(Moving::mark_everything);
    }

    /// Every region's first copy is to be made (again): the full round.
    pub fn open_first_copies(&mut self) {
        for region in self.namespaces.iter_mut().flat_map(|n| &mut n.regions) {
            region.first_copy_open = true;
        }
    }

    /// Something is still to be marked whole.
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.namespaces.iter().any(|n| n.filling.is_some())
    }

    /// Marks a bounded piece of what [`Moving::mark_everything`] asked for. True when there was something to do.
    pub fn fill_some(&mut self) -> bool {
        let mut granules = FILL_GRANULES;
        for namespace in &mut self.namespaces {
            namespace.fill_some(&mut granules);
        }
        granules < FILL_GRANULES
    }

    /// A round begins: what was passed and what changed is counted anew.
    pub fn begin_round(&mut self) {
        for region in self.namespaces.iter_mut().flat_map(|n| &mut n.regions) {
            (region.passed, region.changed) = (0, 0);
        }
    }

    /// The full round has ended: every region has been copied once.
    pub fn close_first_copies(&mut self) {
        for region in self.namespaces.iter_mut().flat_map(|n| &mut n.regions) {
            region.first_copy_open = false;
        }
    }

    /// Whether each region that is dirty and not held has been passed by extents of this round.
    #[must_use]
    pub fn all_passed(&self) -> bool {
        self.namespaces.iter().all(|n| {
            n.filling.is_none()
                && n.regions.iter().enumerate().all(|(index, region)| {
                    region.dirty == 0 || region.held || u64::from(region.passed) >= n.region_at(index).1
                })
        })
    }

    /// The first region at or after `cursor` (namespace, region) that is dirty, not held and not passed in this round: its
    /// namespace, first block and blocks; the cursor is moved behind it.
    pub fn next_unpassed(&self, cursor: &mut (usize, usize)) -> Option<(usize, u64, u64)> {
        while let Some(namespace) = self.namespaces.get(cursor.0) {
            for index in cursor.1..namespace.regions.len() {
                let region = &namespace.regions[index];
                let (slba, blocks) = namespace.region_at(index);
                if region.dirty > 0 && !region.held && u64::from(region.passed) < blocks {
                    cursor.1 = index + 1;
                    return Some((cursor.0, slba, blocks));
                }
            }
            *cursor = (cursor.0 + 1, 0);
        }
        None
    }

    /// Takes a tracking plan: a choice byte per region, in order. Missing ones hold nothing and use the largest chunk.
    pub fn plan(&mut self, choices: &[u8]) {
        let regions = self.namespaces.iter_mut().flat_map(|n| {
            let log2 = n.region_log2;
            n.regions.iter_mut().map(move |region| (region, log2))
        });
        let mut choices = dray_policy::packed::choices(choices);
        for (region, region_log2) in regions {
            let choice = choices.next();
            region.held = choice.is_some_and(|choice| choice.hold);
            region.chunk_log2 = choice.map_or(region_log2 as u8, |choice| choice.chunk_log2);
        }
    }

    /// Nothing is held any more.
    pub fn release_held(&mut self) {
        for region in self.namespaces.iter_mut().flat_map(|n| &mut n.regions) {
            region.held = false;
        }
    }

    /// Appends the regions as policies see them.
    pub fn pack(&self, now_ms: u32, out: &mut Vec<u8>) {
        out.reserve(self.regions() * REGION_BYTES);
        for namespace in &self.namespaces {
            let granule = namespace.dirty.granule_blocks();
            for (index, region) in namespace.regions.iter().enumerate() {
                let (slba, blocks) = namespace.region_at(index);
                let idle_ms = if region.changed_ms == NEVER { NEVER } else { now_ms.saturating_sub(region.changed_ms) };
                Region {
                    slba,
                    nsid: namespace.geometry.source,
                    blocks: blocks as u32,
                    dirty: (u64::from(region.dirty) * granule).min(blocks) as u32,
                    changed: region.changed,
                    idle_ms,
                    first_copy_open: region.first_copy_open,
                    held: region.held,
                }
                .push(out);
            }
        }
    }
}

/// Milliseconds since the migration began, for the regions.
#[must_use]
pub fn since_ms(began: Time, now: Time) -> u32 {
    (now.ns_since(began) / 1_000_000).min(u64::from(NEVER) - 1) as u32
}

/// Regions that are aimed at: their counters stay in the processor's first cache.
const USUAL_REGIONS: u64 = 1024;

/// The smallest size of regions with which all namespaces have at most [`USUAL_REGIONS`] together (at most [`MAX_REGIONS`] where
/// there are so many namespaces) and block counts fit 32 bits.
fn region_bytes_log2(geometries: &[Geometry]) -> Option<u32> {
    let most = geometries.iter().map(|g| g.block_bytes.ilog2()).min()? + 31;
    let regions = |log2: u32| geometries.iter().map(|g| (g.blocks * u64::from(g.block_bytes)).div_ceil(1 << log2)).sum::<u64>();
    let within = |bound: u64| (MIN_REGION_BYTES.ilog2()..=most).find(|&log2| regions(log2) <= bound);
    within(USUAL_REGIONS).or_else(|| within(MAX_REGIONS as u64))
}

#[cfg(test)]
#[path = "media_tests.rs"]
mod tests;
