//! The EFI system partition as an update sees it: a trait, so that power cuts can be tried on a model of it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Files below one folder; paths are relative to it, with `/`.
pub trait Files {
    /// The names in a folder; a folder that is not there is empty.
    ///
    /// # Errors
    /// The system's.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// A file's content, if it is not longer than `limit` bytes.
    ///
    /// # Errors
    /// The system's.
    fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>>;
    /// Bytes that can still be written.
    ///
    /// # Errors
    /// The system's.
    fn room(&self) -> io::Result<u64>;
    /// A file's size in bytes; 0 if it is not there.
    fn size(&self, path: &str) -> u64;
    /// Makes a folder and those above it, if they are not there.
    ///
    /// # Errors
    /// The system's.
    fn make_folder(&mut self, path: &str) -> io::Result<()>;
    /// Makes a file, empty, in place of one that is there.
    ///
    /// # Errors
    /// The system's.
    fn create(&mut self, path: &str) -> io::Result<()>;
    /// Appends to the file that was made last.
    ///
    /// # Errors
    /// The system's.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Flushes the file that was made last, and closes it.
    ///
    /// # Errors
    /// The system's.
    fn finish(&mut self) -> io::Result<()>;
    /// Gives a file another name in the same folder. There must be none of that name: on FAT taking its place is two steps.
    ///
    /// # Errors
    /// The system's.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file; none is no error.
    ///
    /// # Errors
    /// The system's.
    fn remove(&mut self, path: &str) -> io::Result<()>;
    /// Flushes a folder: names that were given and taken before stay so.
    ///
    /// # Errors
    /// The system's.
    fn flush_folder(&mut self, path: &str) -> io::Result<()>;
}

/// A folder of the system.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    open: Option<File>,
}

impl Folder {
    /// The files below `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.into(), open: None }
    }

    fn file(&mut self) -> io::Result<&mut File> {
        self.open.as_mut().ok_or_else(|| io::Error::other("no file was made"))
    }
}

fn none_is_fine<T: Default>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

impl Files for Folder {
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let name = |entry: io::Result<std::fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        let names = std::fs::read_dir(self.root.join(folder)).and_then(|entries| entries.map(name).collect());
        none_is_fine(names).map(|mut names: Vec<_>| {
            names.sort();
            names
        })
    }

    fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.root.join(path))?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
    }

    fn room(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn size(&self, path: &str) -> u64 {
        std::fs::metadata(self.root.join(path)).map_or(0, |file| file.len())
    }

    fn make_folder(&mut self, path: &str) -> io::Result<()> {
        std::fs::create_dir_all(self.root.join(path))
    }

    fn create(&mut self, path: &str) -> io::Result<()> {
        self.open = Some(File::create(self.root.join(path))?);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file()?.write_all(bytes)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file()?.sync_all()?;
        self.open = None;
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let to = self.root.join(to);
        if to.exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        std::fs::rename(self.root.join(from), to)
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        none_is_fine(std::fs::remove_file(self.root.join(path)))
    }

    fn flush_folder(&mut self, path: &str) -> io::Result<()> {
        File::open(self.root.join(path))?.sync_all()
    }
}
