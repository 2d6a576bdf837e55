//! Making the filesystem, and putting the guest's file where it should be.

use super::stage::{List, Stage};
use super::{BLOCK_BYTES, GUEST_FILE, ImageError, ImageSpec, tools};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The first hundredths of the image are left to the filesystem's tables.
const HEAD_PERCENT: u64 = 8;
/// Blocks of a block group (4 KiB blocks; Linux ext4, "Block Groups").
const GROUP_BLOCKS: u64 = 32_768;
/// Blocks at the start of a group that may hold a copy of superblock and group descriptors, reserved ones included.
const GROUP_HEAD_BLOCKS: u64 = 256;
/// Spare blocks in the last piece: the extent tree of the guest's file takes some.
const SPARE_BLOCKS: u64 = 16;
/// The guest's file must reach over that many hundredths of the image.
const SPREAD_PERCENT: u64 = 80;
/// What the filesystem itself may take: journal, inode tables, and slack.
const METADATA_PERCENT: u64 = 12;
const UUID: &str = "64726179-0000-4000-8000-000000000001";
const HASH_SEED: &str = "64726179-0000-4000-8000-000000000002";

/// Where the pieces of the guest's file go, in blocks.
#[derive(Debug)]
pub(super) struct Plan {
    blocks: u64,
    pieces: Vec<Range<u64>>,
}

impl Plan {
    pub(super) fn new(spec: &ImageSpec) -> Result<Self, ImageError> {
        let bad = |text: &str| Err(ImageError::BadSpec(text.to_owned()));
        if !spec.bytes.is_multiple_of(BLOCK_BYTES) || !spec.guest_bytes.is_multiple_of(BLOCK_BYTES) {
            return bad("sizes must be multiples of 4 KiB");
        }
        let (blocks, guest) = (spec.bytes / BLOCK_BYTES, spec.guest_bytes / BLOCK_BYTES);
        let pieces = u64::from(spec.pieces);
        if pieces == 0 || pieces > guest || blocks / pieces < 16 {
            return bad("the guest's file cannot be cut into that many pieces");
        }
        let metadata = spec.bytes / 100 * METADATA_PERCENT;
        if u128::from(spec.fill_limit) + u128::from(spec.guest_bytes) + u128::from(metadata) > u128::from(spec.bytes) {
            return bad("real files, the guest's file and the filesystem's own blocks do not fit");
        }
        let head = blocks * HEAD_PERCENT / 100;
        let stretch = (blocks - head) / pieces;
        let piece = guest.div_ceil(pieces);
        if piece + SPARE_BLOCKS >= stretch {
            return bad("the pieces of the guest's file leave nothing between them");
        }
        let mut ranges: Vec<Range<u64>> = (0..pieces).map(|i| head + i * stretch).map(|at| at..at + piece).collect();
        for range in &mut ranges {
            let group = range.end / GROUP_BLOCKS * GROUP_BLOCKS;
            let behind = range.start.max(group) + GROUP_HEAD_BLOCKS;
            if range.start < group + GROUP_HEAD_BLOCKS && behind - range.start + piece < stretch {
                *range = behind..behind + piece;
            }
        }
        if let Some(last) = ranges.last_mut() {
            last.end = (last.end + SPARE_BLOCKS).min(blocks);
        }
        Ok(Self { blocks, pieces: ranges })
    }

    fn contains(&self, block: u64) -> bool {
        let after = self.pieces.partition_point(|piece| piece.end <= block);
        self.pieces.get(after).is_some_and(|piece| piece.contains(&block))
    }
}

/// Makes the image at `spec.path`.
pub(super) fn build(spec: &ImageSpec, plan: &Plan, list: &List) -> Result<(), ImageError> {
    if let Some(parent) = spec.path.parent() {
        fs::create_dir_all(parent).map_err(ImageError::io(parent))?;
    }
    let image = File::create(&spec.path).map_err(ImageError::io(&spec.path))?;
    image.set_len(spec.bytes).map_err(ImageError::io(&spec.path))?;
    drop(image);
    let scratch = Scratch::new(&spec.path)?;
    format(spec, plan, list, &scratch)?;
    write_guest_file(spec, plan, &scratch)
}

/// A folder for lists and the like beside the image; gone when dropped.
struct Scratch {
    folder: PathBuf,
}

impl Scratch {
    fn new(image: &Path) -> Result<Self, ImageError> {
        let mut name = image.as_os_str().to_owned();
        name.push(".making");
        let folder = PathBuf::from(name);
        fs::create_dir_all(&folder).map_err(ImageError::io(&folder))?;
        Ok(Self { folder })
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf, ImageError> {
        let path = self.folder.join(name);
        fs::write(&path, text).map_err(ImageError::io(&path))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _left = fs::remove_dir_all(&self.folder);
    }
}

/// `mkfs.ext4` with the pieces as bad blocks, so that the files flow around them; then gives the pieces back.
fn format(spec: &ImageSpec, plan: &Plan, list: &List, scratch: &Scratch) -> Result<(), ImageError> {
    let mut numbers = String::new();
    for block in plan.pieces.iter().cloned().flatten() {
        let _infallible = writeln!(numbers, "{block}");
    }
    let reserved = scratch.write("pieces", &numbers)?;
    let stage = Stage::gather(scratch.folder.join("files"), list)?;
    tools::run_ok("mkfs.ext4", &[0], |command| {
        command.args(["-q", "-F", "-b", "4096", "-m", "0", "-U", UUID]);
        command.args(["-E", &format!("hash_seed={HASH_SEED},lazy_itable_init=0,root_owner=0:0")]);
        command.arg("-l").arg(&reserved).arg("-d").arg(&stage.folder).arg(&spec.path).arg(plan.blocks.to_string());
    })?;
    drop(stage);
    // 1: "errors corrected", which is what an exchanged list of bad blocks counts as.
    tools::run_ok("e2fsck", &[0, 1], |command| {
        command.args(["-fy", "-L", "/dev/null"]).arg(&spec.path);
    })?;
    Ok(())
}

/// Writes the guest's file while everything free but its pieces is marked as used. One session: the marks are in the memory of
/// `debugfs` and taken back before it writes the bitmaps.
fn write_guest_file(spec: &ImageSpec, plan: &Plan, scratch: &Scratch) -> Result<(), ImageError> {
    let text = tools::run_ok("dumpe2fs", &[0], |command| {
        command.arg(&spec.path);
    })?;
    let free = parse_free(&text)?;
    let content = scratch.folder.join("guest.dat");
    write_content(&content, spec.guest_bytes).map_err(ImageError::io(&content))?;
    let others = outside(&free, plan);
    let mut script = String::new();
    for range in &others {
        let _infallible = writeln!(script, "setb {} {}", range.start, range.end - range.start);
    }
    let folder = GUEST_FILE.rsplit_once('/').map_or("/", |(folder, _)| folder);
    let _infallible = writeln!(script, "mkdir {folder}");
    let _infallible = writeln!(script, "write \"{}\" {GUEST_FILE}", content.display());
    for range in &others {
        let _infallible = writeln!(script, "freeb {} {}", range.start, range.end - range.start);
    }
    let script = scratch.write("script", &script)?;
    tools::run_ok("debugfs", &[0], |command| {
        command.arg("-w").arg("-f").arg(&script).arg(&spec.path);
    })?;
    Ok(())
}

/// Puts a file for the guest into a filesystem that somebody else made, into what is free there; returns its blocks in the
/// order of the file. At most 128 MiB, and never more than half of what is free.
pub(super) fn add_guest_file(image: &Path) -> Result<Vec<u64>, ImageError> {
    let text = tools::run_ok("dumpe2fs", &[0], |command| {
        command.arg(image);
    })?;
    let block = text.lines().find_map(|line| line.strip_prefix("Block size:")).map(str::trim);
    if block != Some("4096") {
        return Err(ImageError::BadLayout("its filesystem does not have blocks of 4 KiB".into()));
    }
    let free: u64 = parse_free(&text)?.iter().map(|range| range.end - range.start).sum();
    let blocks = (free / 2).min((128 << 20) / BLOCK_BYTES);
    if blocks < 64 {
        return Err(ImageError::BadLayout(format!("{free} free blocks leave no room for the guest's file")));
    }
    let scratch = Scratch::new(image)?;
    let content = scratch.folder.join("guest.dat");
    write_content(&content, blocks * BLOCK_BYTES).map_err(ImageError::io(&content))?;
    let folder = GUEST_FILE.rsplit_once('/').map_or("/", |(folder, _)| folder);
    let script = format!("mkdir {folder}\nwrite \"{}\" {GUEST_FILE}\n", content.display());
    let script = scratch.write("script", &script)?;
    tools::run_ok("debugfs", &[0], |command| {
        command.arg("-w").arg("-f").arg(&script).arg(image);
    })?;
    let extents = guest_extents(image)?;
    if extents.iter().any(|extent| !extent.initialised) {
        return Err(ImageError::BadLayout("it has extents that are not initialised".into()));
    }
    let targets: Vec<u64> =
        extents.iter().flat_map(|e| e.physical..e.physical + (e.logical.end - e.logical.start)).collect();
    if targets.len() as u64 != blocks {
        return Err(ImageError::BadLayout(format!("{} of {blocks} blocks are there", targets.len())));
    }
    Ok(targets)
}

/// The file's first content: text, no block of zeroes (`debugfs` would leave a hole) and no two blocks alike.
fn write_content(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut block = [b' '; BLOCK_BYTES as usize];
    for line in block.chunks_mut(64) {
        line[63] = b'\n';
        line[..32].copy_from_slice(b"not yet written by the guest     ".first_chunk::<32>().unwrap_or(&[b'.'; 32]));
    }
    for number in 0..bytes / BLOCK_BYTES {
        let text = format!("{number:012}");
        for line in block.chunks_mut(64) {
            line[48..60].copy_from_slice(text.as_bytes());
        }
        out.write_all(&block)?;
    }
    out.flush()
}

/// The free ranges that are no piece.
fn outside(free: &[Range<u64>], plan: &Plan) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for block in free.iter().cloned().flatten().filter(|block| !plan.contains(*block)) {
        match ranges.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => ranges.push(block..block + 1),
        }
    }
    ranges
}

/// The free blocks of all groups, from `dumpe2fs`: indented lines `Free blocks: 1-5, 7`. (The one that is not indented is
/// the filesystem's count.)
fn parse_free(text: &str) -> Result<Vec<Range<u64>>, ImageError> {
    let mut ranges = Vec::new();
    for line in text.lines() {
        let Some(list) = line.strip_prefix("  Free blocks: ") else { continue };
        for item in list.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let range = first.parse::<u64>().ok().zip(last.parse::<u64>().ok());
            match range {
                Some((first, last)) if first <= last && last < u64::MAX => ranges.push(first..last + 1),
                _ => return Err(ImageError::Nonsense { tool: "dumpe2fs", line: line.to_owned() }),
            }
        }
    }
    Ok(ranges)
}

/// A piece of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    logical: Range<u64>,
    physical: u64,
    initialised: bool,
}

/// The extents of the guest's file as the image has them.
pub(super) fn guest_extents(image: &Path) -> Result<Vec<Extent>, ImageError> {
    let text = tools::run_ok("debugfs", &[0], |command| {
        command.arg("-R").arg(format!("dump_extents -l {GUEST_FILE}")).arg(image);
    })?;
    parse_extents(&text)
}

/// Lines of `dump_extents -l`: `1/ 1   2/129   255 -   510   3072 -   3327    256 Uninit`.
fn parse_extents(text: &str) -> Result<Vec<Extent>, ImageError> {
    let mut extents = Vec::new();
    for line in text.lines().filter(|line| line.trim_start().starts_with(|c: char| c.is_ascii_digit())) {
        let nonsense = || ImageError::Nonsense { tool: "debugfs", line: line.to_owned() };
        let spaced = line.replace(['/', '-'], " ");
        let numbers: Vec<u64> = spaced.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [level, depth, _entry, _entries, first, last, physical, physical_last, len] = numbers[..] else {
            return Err(nonsense());
        };
        let count = last.checked_sub(first).and_then(|count| count.checked_add(1));
        let physical_count = physical_last.checked_sub(physical).and_then(|count| count.checked_add(1));
        if level != depth || count != Some(len) || physical_count != Some(len) {
            return Err(nonsense());
        }
        extents.push(Extent { logical: first..last + 1, physical, initialised: !line.contains("Uninit") });
    }
    Ok(extents)
}

/// Pieces: extents that do not simply continue the one before.
pub(super) fn pieces(extents: &[Extent]) -> u32 {
    let breaks = extents.windows(2).filter(|pair| {
        pair[0].physical + (pair[0].logical.end - pair[0].logical.start) != pair[1].physical
    });
    u32::try_from(breaks.count() + usize::from(!extents.is_empty())).unwrap_or(u32::MAX)
}

/// Checks that the guest's file is as it was ordered; returns its blocks in the order of the file.
pub(super) fn check_layout(spec: &ImageSpec, extents: &[Extent]) -> Result<Vec<u64>, ImageError> {
    let wrong = |text: String| Err(ImageError::BadLayout(text));
    let blocks = spec.bytes / BLOCK_BYTES;
    let mut targets = Vec::new();
    for extent in extents {
        let len = extent.logical.end - extent.logical.start;
        let inside = extent.physical.checked_add(len).is_some_and(|end| end <= blocks);
        if extent.logical.start != targets.len() as u64 || !extent.initialised || !inside {
            return wrong(format!("{extent:?} is a hole, not initialised, or outside the image"));
        }
        targets.extend(extent.physical..extent.physical + len);
    }
    if targets.len() as u64 != spec.guest_bytes / BLOCK_BYTES {
        return wrong(format!("{} blocks instead of {}", targets.len(), spec.guest_bytes / BLOCK_BYTES));
    }
    let found = pieces(extents);
    if found < spec.pieces {
        return wrong(format!("{found} pieces instead of {}", spec.pieces));
    }
    let reach = targets.iter().max().zip(targets.iter().min()).map_or(0, |(max, min)| max - min + 1);
    if reach * 100 < blocks * SPREAD_PERCENT {
        return wrong(format!("it reaches over {reach} of {blocks} blocks"));
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ranges_are_read() {
        let text = "Free blocks:              121414\nGroup 0: (Blocks 0-32767)\n  Free blocks: 662-695, 1024\n  Free blocks: \n";
        assert_eq!(parse_free(text).expect("ranges"), [662..696, 1024..1025]);
        assert!(parse_free("  Free blocks: 7-x\n").is_err());
        assert!(parse_free("  Free blocks: 7-3\n").is_err());
    }

    #[test]
    fn extents_are_read_and_judged() {
        let text = "Level Entries       Logical        Physical Length Flags\n 1/ 1   1/  3     0 -     3   100 -   103      4 \n \
                    1/ 1   2/  3     4 -     5   104 -   105      2 \n 1/ 1   3/  3     6 -     7   900 -   901      2 Uninit\n";
        let mut extents = parse_extents(text).expect("extents");
        assert_eq!(extents[1], Extent { logical: 4..6, physical: 104, initialised: true });
        assert_eq!(pieces(&extents), 2, "the second goes on where the first ends");
        let spec = ImageSpec {
            path: PathBuf::new(),
            bytes: 1000 * BLOCK_BYTES,
            fill_limit: 0,
            guest_bytes: 8 * BLOCK_BYTES,
            pieces: 2,
            sources: Vec::new(),
            cache: None,
        };
        assert!(check_layout(&spec, &extents).is_err(), "one is not initialised");
        extents[2].initialised = true;
        assert_eq!(check_layout(&spec, &extents).expect("good"), [100, 101, 102, 103, 104, 105, 900, 901]);
        assert!(check_layout(&ImageSpec { pieces: 3, ..spec.clone() }, &extents).is_err(), "too few pieces");
        assert!(check_layout(&ImageSpec { bytes: 1100 * BLOCK_BYTES, ..spec.clone() }, &extents).is_err(), "too close");
        assert!(check_layout(&spec, &extents[..2]).is_err(), "too short");
        assert!(parse_extents(" 1/ 1   1/  3     0 -     3   100 -   105      4 \n").is_err());
        assert!(parse_extents(" 1/ 1   1/  3     0 -     3\n").is_err());
    }

    #[test]
    fn what_is_free_and_no_piece_is_marked() {
        let plan = Plan { blocks: 100, pieces: vec![10..20, 50..60] };
        assert_eq!(outside(&[5..12, 18..25, 55..58, 70..71], &plan), [5..10, 20..25, 70..71]);
    }
}
