//! Which real files go into the image, and the folder they are gathered in for `mkfs.ext4 -d`.

use super::{BLOCK_BYTES, ImageError};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Most files taken: leaves inodes free in a filesystem of the smallest size with default settings.
const MAX_FILES: usize = 30_000;
/// After so many files that were too large for what is left, the search ends.
const MAX_MISFITS: u32 = 256;
/// Deepest folder looked into.
const MAX_DEPTH: u32 = 24;

/// The Rust toolchain's folder if there is one, then `/usr/share`.
#[must_use]
pub fn default_sources() -> Vec<PathBuf> {
    let asked = Command::new("rustc").args(["--print", "sysroot"]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let sysroot = asked.ok().filter(|output| output.status.success()).and_then(|output| {
        let text = String::from_utf8(output.stdout).ok()?;
        Some(PathBuf::from(text.trim()))
    });
    sysroot.into_iter().chain([PathBuf::from("/usr/share")]).collect()
}

/// One file to take.
#[derive(Debug)]
pub(super) struct Entry {
    pub path: PathBuf,
    pub relative: PathBuf,
    pub len: u64,
    pub modified_ns: i128,
}

/// The files to take, in an order that depends on their names alone.
#[derive(Debug)]
pub(super) struct List {
    pub files: Vec<Entry>,
    pub bytes: u64,
}

struct Walk {
    list: List,
    /// Bytes on disk, whole blocks.
    room: u64,
    misfits: u32,
}

impl Walk {
    fn full(&self) -> bool {
        self.misfits >= MAX_MISFITS || self.list.files.len() >= MAX_FILES
    }

    fn folder(&mut self, folder: &Path, relative: &Path, depth: u32) {
        // A folder that cannot be read is passed over: any readable files do.
        let Ok(entries) = fs::read_dir(folder) else { return };
        let mut names: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
        names.sort_unstable();
        for name in names {
            if self.full() {
                return;
            }
            let (path, relative) = (folder.join(&name), relative.join(&name));
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() && depth < MAX_DEPTH {
                self.folder(&path, &relative, depth + 1);
            } else if meta.is_file() && meta.len() > 0 {
                self.file(path, relative, &meta);
            }
        }
    }

    fn file(&mut self, path: PathBuf, relative: PathBuf, meta: &fs::Metadata) {
        let room = meta.len().next_multiple_of(BLOCK_BYTES);
        if room > self.room {
            self.misfits += 1;
        } else if File::open(&path).is_ok() {
            self.room -= room;
            self.list.bytes += meta.len();
            let modified_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
            self.list.files.push(Entry { path, relative, len: meta.len(), modified_ns });
        }
    }
}

/// Takes readable files from the first source that has some, up to `limit` bytes.
pub(super) fn list(sources: &[PathBuf], limit: u64) -> Result<List, ImageError> {
    for source in sources {
        let mut walk = Walk { list: List { files: Vec::new(), bytes: 0 }, room: limit, misfits: 0 };
        walk.folder(source, Path::new(""), 0);
        if !walk.list.files.is_empty() {
            return Ok(walk.list);
        }
    }
    Err(ImageError::NoFiles(sources.to_vec()))
}

/// The folder the files are gathered in; removed with everything in it when dropped.
pub(super) struct Stage {
    pub folder: PathBuf,
}

impl Stage {
    /// Gathers the files as hard links where that works, as copies otherwise.
    pub(super) fn gather(folder: PathBuf, list: &List) -> Result<Self, ImageError> {
        remove(&folder)?;
        let stage = Self { folder };
        fs::create_dir_all(&stage.folder).map_err(ImageError::io(&stage.folder))?;
        let mut made = PathBuf::new();
        for entry in &list.files {
            let to = stage.folder.join(&entry.relative);
            if let Some(parent) = to.parent().filter(|parent| *parent != made) {
                fs::create_dir_all(parent).map_err(ImageError::io(parent))?;
                made = parent.to_path_buf();
            }
            if fs::hard_link(&entry.path, &to).is_err() {
                fs::copy(&entry.path, &to).map_err(ImageError::io(&entry.path))?;
            }
        }
        Ok(stage)
    }
}

fn remove(folder: &Path) -> Result<(), ImageError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ImageError::io(folder)(error)),
        _ => Ok(()),
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Left behind it costs no more than names; the next run removes it.
        let _left = remove(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_and_the_order_is_by_name() {
        let folder = std::env::temp_dir().join(format!("dray-stage-{}", std::process::id()));
        remove(&folder).expect("old folder");
        fs::create_dir_all(folder.join("b")).expect("folder");
        for (name, len) in [("c", 5000), ("a", 4096), ("b/x", 1), ("big", 1 << 20), ("empty", 0)] {
            fs::write(folder.join(name), vec![1; len]).expect("file");
        }
        let list = list(std::slice::from_ref(&folder), 4 * BLOCK_BYTES).expect("files");
        let names: Vec<_> = list.files.iter().map(|entry| entry.relative.to_str().expect("name")).collect();
        assert_eq!(names, ["a", "b/x", "c"], "the large one does not fit, the empty one is of no use");
        assert_eq!(list.bytes, 4096 + 1 + 5000);
        let stage = Stage::gather(folder.join("stage"), &list).expect("stage");
        assert_eq!(fs::read(stage.folder.join("b/x")).expect("staged"), [1]);
        let gathered = stage.folder.clone();
        drop(stage);
        assert!(!gathered.exists());
        remove(&folder).expect("cleaning up");
    }
}
