//! Which blocks of a memory backing are marked as unreadable.

/// Ranges marked by Write Uncorrectable: sorted, disjoint, never adjacent. They live as long as the memory that they
/// are about.
#[derive(Debug, Default)]
pub(crate) struct Uncorrectable {
    ranges: Vec<(u64, u64)>,
    max: usize,
}

impl Uncorrectable {
    pub(crate) fn new(max: usize) -> Self {
        // One more than allowed: clearing the middle of a range makes two of it.
        Self { ranges: Vec::with_capacity(max + 1), max }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether a block of the range is marked.
    pub(crate) fn touches(&self, slba: u64, blocks: u64) -> bool {
        let at = self.ranges.partition_point(|&(_, end)| end <= slba);
        self.ranges.get(at).is_some_and(|&(start, _)| start < slba + blocks)
    }

    /// Marks a range; `false` when there is no room for another.
    pub(crate) fn mark(&mut self, slba: u64, blocks: u64) -> bool {
        let (mut start, mut end) = (slba, slba + blocks);
        let first = self.ranges.partition_point(|&(_, e)| e < start);
        let last = self.ranges.partition_point(|&(s, _)| s <= end);
        if first == last && self.ranges.len() >= self.max {
            return false;
        }
        for &(s, e) in &self.ranges[first..last] {
            (start, end) = (start.min(s), end.max(e));
        }
        self.ranges.splice(first..last, [(start, end)]);
        true
    }

    /// Clears a range that was written. Where that splits the last range there is room for, the upper part stays marked whole
    /// (reads of it fail until it is written too), never the other way round.
    pub(crate) fn clear(&mut self, slba: u64, blocks: u64) {
        let (start, end) = (slba, slba + blocks);
        let mut i = self.ranges.partition_point(|&(_, e)| e <= start);
        while let Some(&(s, e)) = self.ranges.get(i).filter(|r| r.0 < end) {
            match (s < start, e > end) {
                (true, true) => {
                    if self.ranges.len() <= self.max {
                        self.ranges[i] = (s, start);
                        self.ranges.insert(i + 1, (end, e));
                    }
                    return;
                }
                (true, false) => {
                    self.ranges[i] = (s, start);
                    i += 1;
                }
                (false, true) => {
                    self.ranges[i] = (end, e);
                    return;
                }
                (false, false) => {
                    self.ranges.remove(i);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Uncorrectable;

    #[test]
    fn marks_join_and_writes_cut_them() {
        let mut marks = Uncorrectable::new(3);
        assert!(marks.mark(10, 10) && marks.mark(20, 5) && marks.mark(40, 5));
        assert_eq!(marks.ranges, [(10, 25), (40, 45)]);
        marks.clear(15, 2);
        assert_eq!(marks.ranges, [(10, 15), (17, 25), (40, 45)]);
        assert!(!marks.touches(15, 2) && marks.touches(14, 2) && marks.touches(16, 2));
        assert!(!marks.mark(100, 1), "no room");
        assert!(marks.mark(15, 2), "joining needs none");
        marks.clear(0, 1000);
        assert!(marks.is_empty());
    }

    #[test]
    fn a_cut_without_room_keeps_too_much_marked_never_too_little() {
        let mut marks = Uncorrectable::new(1);
        assert!(marks.mark(0, 100));
        marks.clear(10, 1);
        marks.clear(20, 1);
        assert!(marks.touches(0, 1) && marks.touches(50, 1) && !marks.touches(10, 1));
    }
}
