//! The demo's input: a raw disk image with an ext4 filesystem full of real files, and one file in it for the guest.
//!
//! The guest's file lies in many pieces over the whole image (initialised extents), so that a block that a migration misplaces
//! damages somebody's file. How it gets there: `mkfs.ext4 -d` fills the filesystem while the pieces are listed as bad blocks,
//! so that the files flow around them; `e2fsck -L` gives the pieces back; one `debugfs` session then writes the guest's file
//! while every other free block is marked as used, so that it can go nowhere else. No mounting, no root rights. What came out
//! is read back with `debugfs`, checked, and `e2fsck -fn` must find it clean.
//!
//! The finished image is kept ([`ImageSpec::cache`]) and copied when the next run wants the same one. Start reading at
//! [`make`]; [`fsck`] is the judge at the end of a demo.

mod cache;
mod ext4;
mod fsck;
mod stage;
mod tools;

pub use fsck::{FsckVerdict, fsck};
pub use stage::default_sources;

use std::io;
use std::path::{Path, PathBuf};

/// Bytes of a filesystem block, and of a block of the guest.
pub const BLOCK_BYTES: u64 = 4096;
/// Where the guest's file is in the filesystem.
pub const GUEST_FILE: &str = "/dray/guest.dat";

/// What image to make.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// Where the image goes; a file that is there is replaced.
    pub path: PathBuf,
    /// Bytes of the image, a multiple of [`BLOCK_BYTES`].
    pub bytes: u64,
    /// Most bytes of real files to put in.
    pub fill_limit: u64,
    /// Bytes of the guest's file, a multiple of [`BLOCK_BYTES`].
    pub guest_bytes: u64,
    /// Pieces that the guest's file is to lie in, at least.
    pub pieces: u32,
    /// Folders to take files from, in order; those that are not there are passed over. See [`default_sources`].
    pub sources: Vec<PathBuf>,
    /// A folder where the finished image is kept for the next run (one image; an older one is removed).
    pub cache: Option<PathBuf>,
}

impl ImageSpec {
    /// The demo's defaults: 1 GiB, up to 600 MiB of real files, a guest's file of 128 MiB in 128 pieces.
    #[must_use]
    pub fn new(path: PathBuf, cache: Option<PathBuf>) -> Self {
        Self {
            path,
            bytes: 1 << 30,
            fill_limit: 600 << 20,
            guest_bytes: 128 << 20,
            pieces: 128,
            sources: default_sources(),
            cache,
        }
    }
}

/// An image that is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// The blocks of the guest's file in the image, in units of [`BLOCK_BYTES`], in the order of the file.
    pub target_blocks: Vec<u64>,
    /// Real files in the filesystem.
    pub files: u64,
    /// Bytes of them.
    pub fill_bytes: u64,
    /// Pieces that the guest's file lies in.
    pub pieces: u32,
    /// Whether it was copied from the cache instead of made.
    pub cached: bool,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The wishes contradict each other.
    #[error("such an image cannot be made: {0}")]
    BadSpec(String),
    /// A tool is missing.
    #[error("`{0}` is not in PATH, /usr/sbin or /sbin: install the package e2fsprogs")]
    NoTool(&'static str),
    /// A tool failed.
    #[error("`{tool}` failed ({status}): {text}")]
    Tool {
        /// Its name.
        tool: &'static str,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        text: String,
    },
    /// A tool said something that makes no sense to us.
    #[error("cannot make sense of what `{tool}` says: {line}")]
    Nonsense {
        /// Its name.
        tool: &'static str,
        /// The line.
        line: String,
    },
    /// None of the sources has a readable file.
    #[error("none of the folders {0:?} has readable files to fill the image with")]
    NoFiles(Vec<PathBuf>),
    /// The guest's file is not where it should be.
    #[error("the guest's file came out wrong: {0}")]
    BadLayout(String),
    /// The filesystem is damaged before anybody has used it.
    #[error("the new filesystem has errors: {0}")]
    Dirty(String),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
}

impl ImageError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}

/// Makes the image, or copies it from the cache when the same one was made before.
///
/// # Errors
/// [`ImageError`]; an unfinished image may be left at `spec.path`.
pub fn make(spec: &ImageSpec) -> Result<Image, ImageError> {
    let plan = ext4::Plan::new(spec)?;
    let list = stage::list(&spec.sources, spec.fill_limit)?;
    let kept = spec.cache.as_deref().map(|folder| cache::Slot::new(folder, spec, &list));
    let cached = match &kept {
        Some(slot) => slot.take(&spec.path)?,
        None => false,
    };
    if !cached {
        ext4::build(spec, &plan, &list)?;
        match fsck(&spec.path)? {
            FsckVerdict::Clean => {}
            FsckVerdict::Errors(text) => return Err(ImageError::Dirty(text)),
            FsckVerdict::Skipped(why) => return Err(ImageError::BadLayout(why)),
        }
    }
    let extents = ext4::guest_extents(&spec.path)?;
    let target_blocks = ext4::check_layout(spec, &extents)?;
    if let Some(slot) = kept.filter(|_| !cached) {
        slot.keep(&spec.path)?;
    }
    Ok(Image {
        path: spec.path.clone(),
        target_blocks,
        files: list.files.len() as u64,
        fill_bytes: list.bytes,
        pieces: ext4::pieces(&extents),
        cached,
    })
}

/// Puts a file for the guest into an image that somebody else made; returns its blocks in units of [`BLOCK_BYTES`], or `None`
/// when the image holds no ext4 filesystem.
///
/// # Errors
/// [`ImageError`]: the filesystem is damaged, full, or has blocks of another size.
pub fn add_guest_file(path: &Path) -> Result<Option<Vec<u64>>, ImageError> {
    match fsck(path)? {
        FsckVerdict::Skipped(_) => return Ok(None),
        FsckVerdict::Errors(text) => return Err(ImageError::Dirty(text)),
        FsckVerdict::Clean => {}
    }
    let blocks = ext4::add_guest_file(path)?;
    match fsck(path)? {
        FsckVerdict::Clean => Ok(Some(blocks)),
        FsckVerdict::Errors(text) | FsckVerdict::Skipped(text) => Err(ImageError::Dirty(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::FileExt;

    fn spec(folder: &Path) -> ImageSpec {
        let source = folder.join("source");
        for i in 0..40u8 {
            let sub = source.join(format!("d{}", i % 5));
            fs::create_dir_all(&sub).expect("folder");
            fs::write(sub.join(format!("f{i}")), vec![i; 100_000]).expect("file");
        }
        ImageSpec {
            path: folder.join("disk.img"),
            bytes: 64 << 20,
            fill_limit: 20 << 20,
            guest_bytes: 8 << 20,
            pieces: 64,
            sources: vec![folder.join("missing"), source],
            cache: Some(folder.join("cache")),
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("dray-image-{name}-{}", std::process::id()));
        let _old = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("scratch folder");
        folder
    }

    #[test]
    fn an_image_is_made_checked_and_kept() {
        let folder = scratch("made");
        let spec = spec(&folder);
        let first = make(&spec).expect("image");
        assert_eq!((first.cached, first.files), (false, 40));
        assert_eq!(first.target_blocks.len() as u64, spec.guest_bytes / BLOCK_BYTES);
        assert!(first.pieces >= 64, "{} pieces", first.pieces);
        assert_eq!(fs::metadata(&spec.path).expect("image").len(), spec.bytes);
        assert_eq!(fsck(&spec.path).expect("fsck"), FsckVerdict::Clean);
        let again = make(&spec).expect("image");
        assert!(again.cached);
        assert_eq!(again.target_blocks, first.target_blocks);
        fs::write(spec.sources[1].join("d0/new"), b"another file").expect("file");
        assert!(!make(&spec).expect("image").cached, "the input has changed");
        fs::remove_dir_all(&folder).expect("cleaning up");
    }

    #[test]
    fn a_guests_file_is_added_to_a_filesystem_and_to_nothing_else() {
        let folder = scratch("added");
        let path = folder.join("other.img");
        fs::write(&path, vec![0u8; 1 << 20]).expect("file");
        assert_eq!(add_guest_file(&path).expect("no filesystem"), None);
        fs::File::create(&path).and_then(|f| f.set_len(32 << 20)).expect("file");
        tools::run_ok("mkfs.ext4", &[0], |c| {
            c.args(["-q", "-F", "-b", "4096"]).arg(&path);
        })
        .expect("mkfs");
        let blocks = add_guest_file(&path).expect("added").expect("ext4");
        assert!(blocks.len() >= 64 && blocks.iter().all(|b| *b < (32 << 20) / BLOCK_BYTES));
        assert_eq!(fsck(&path).expect("fsck"), FsckVerdict::Clean);
        fs::remove_dir_all(&folder).expect("cleaning up");
    }

    #[test]
    fn damage_is_seen_by_the_judge() {
        let folder = scratch("damage");
        let spec = spec(&folder);
        make(&spec).expect("image");
        let file = fs::OpenOptions::new().write(true).open(&spec.path).expect("open");
        file.write_all_at(&[0xa5; 4096], 4096).expect("group descriptors");
        assert!(matches!(fsck(&spec.path).expect("fsck"), FsckVerdict::Errors(_)));
        file.write_all_at(&[0; 4096], 0).expect("superblock");
        assert!(matches!(fsck(&spec.path).expect("fsck"), FsckVerdict::Skipped(_)));
        fs::remove_dir_all(&folder).expect("cleaning up");
    }

    #[test]
    fn wishes_that_cannot_be_met_are_refused() {
        let folder = scratch("refused");
        let good = spec(&folder);
        for bad in [
            ImageSpec { bytes: good.bytes + 512, ..good.clone() },
            ImageSpec { guest_bytes: good.bytes, ..good.clone() },
            ImageSpec { fill_limit: good.bytes, ..good.clone() },
            ImageSpec { pieces: 0, ..good.clone() },
            ImageSpec { pieces: 1 << 20, ..good.clone() },
        ] {
            assert!(matches!(make(&bad), Err(ImageError::BadSpec(_))), "{bad:?}");
        }
        let empty = ImageSpec { sources: vec![folder.join("missing")], ..good };
        assert!(matches!(make(&empty), Err(ImageError::NoFiles(_))));
        fs::remove_dir_all(&folder).expect("cleaning up");
    }
}
