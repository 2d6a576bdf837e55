//! The finished image of an earlier run, and a copy that leaves holes as holes.

use super::stage::List;
use super::{ImageError, ImageSpec};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

/// Raised when the way an image is made changes, so that older ones are not taken.
const RECIPE: u32 = 1;
const PREFIX: &str = "ext4-";

/// The place of one image in the cache, named by everything that goes into it.
pub(super) struct Slot {
    folder: PathBuf,
    file: PathBuf,
}

impl Slot {
    pub(super) fn new(folder: &Path, spec: &ImageSpec, list: &List) -> Self {
        let mut key = DefaultHasher::new();
        (RECIPE, spec.bytes, spec.fill_limit, spec.guest_bytes, spec.pieces).hash(&mut key);
        for entry in &list.files {
            (&entry.relative, entry.len, entry.modified_ns).hash(&mut key);
        }
        let file = folder.join(format!("{PREFIX}{:016x}.img", key.finish()));
        Self { folder: folder.to_path_buf(), file }
    }

    /// Copies the kept image to `path`; `false` when there is none.
    pub(super) fn take(&self, path: &Path) -> Result<bool, ImageError> {
        if !self.file.is_file() {
            return Ok(false);
        }
        copy(&self.file, path)?;
        Ok(true)
    }

    /// Keeps a copy of the image at `path`, instead of any older one. It appears under its name only when it is whole.
    pub(super) fn keep(&self, path: &Path) -> Result<(), ImageError> {
        fs::create_dir_all(&self.folder).map_err(ImageError::io(&self.folder))?;
        for entry in fs::read_dir(&self.folder).map_err(ImageError::io(&self.folder))?.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with(PREFIX)) {
                // One that stays costs disk only.
                let _old = fs::remove_file(entry.path());
            }
        }
        let unfinished = self.file.with_extension(OsStr::new("part"));
        copy(path, &unfinished)?;
        fs::rename(&unfinished, &self.file).map_err(ImageError::io(&self.file))
    }
}

/// Copies a file, its data only: by shared extents where the filesystem can, within the kernel otherwise.
fn copy(from: &Path, to: &Path) -> Result<(), ImageError> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(ImageError::io(parent))?;
    }
    let source = File::open(from).map_err(ImageError::io(from))?;
    // A file of an earlier run may still be on its way to the disk: truncating it would wait for that, removing it does not.
    let _old = fs::remove_file(to);
    let target = File::create(to).map_err(ImageError::io(to))?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    copy_data(&source, &target).map_err(ImageError::io(to))
}

fn copy_data(mut source: &File, mut target: &File) -> io::Result<()> {
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        let begin = match seek(source, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(source, SeekFrom::Hole(begin))?;
        source.seek(io::SeekFrom::Start(begin))?;
        target.seek(io::SeekFrom::Start(begin))?;
        let copied = io::copy(&mut source.take(end - begin), &mut target)?;
        if copied != end - begin {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_copy_is_the_same_with_the_same_holes() {
        let folder = std::env::temp_dir().join(format!("dray-copy-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("folder");
        let (from, to) = (folder.join("from"), folder.join("to"));
        let file = File::create(&from).expect("file");
        file.set_len(8 << 20).expect("length");
        file.write_all_at(&[7; 5000], 1 << 20).expect("data");
        copy(&from, &to).expect("copy");
        assert_eq!(fs::read(&from).expect("from"), fs::read(&to).expect("to"));
        assert!(fs::metadata(&to).expect("to").blocks() < 2048, "the hole was filled");
        fs::remove_dir_all(&folder).expect("cleaning up");
    }
}
