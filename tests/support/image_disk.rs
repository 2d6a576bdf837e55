//! Disks of the appliance's image, from outside: a copy per test, its partitions by name, files put on the FAT ones and read
//! there.

use fatfs::{FileSystem, FsOptions};
use rustix::fs::SeekFrom as Seek64;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const SECTOR: u64 = 512;

/// What `cargo xtask image` wrote.
///
/// # Panics
/// If it has not run.
#[must_use]
pub fn built() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the source tree");
    let folder = root.join("target/image");
    assert!(folder.join("manifest").is_file(), "no image to boot in {}: run `cargo xtask image`", folder.display());
    folder
}

/// A part of a file.
struct Slice {
    file: File,
    start: u64,
    bytes: u64,
    at: u64,
}

impl Slice {
    fn left(&self, wanted: usize) -> usize {
        wanted.min(usize::try_from(self.bytes.saturating_sub(self.at)).unwrap_or(usize::MAX))
    }
}

impl Read for Slice {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = self.left(into.len());
        let count = self.file.read_at(&mut into[..wanted], self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Write for Slice {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let count = self.file.write_at(&from[..self.left(from.len())], self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Slice {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::End(by) => (self.bytes, by),
            SeekFrom::Current(by) => (self.at, by),
        };
        self.at = base.checked_add_signed(by).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// A disk of a test's own.
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// A copy of the built disk in `folder`; holes stay holes.
    ///
    /// # Panics
    /// If there is none, or no room.
    #[must_use]
    pub fn copy(folder: &Path) -> Self {
        let (from, path) = (built().join("dray.img"), folder.join("dray.img"));
        copy_sparse(&from, &path).unwrap_or_else(|error| panic!("{} to {}: {error}", from.display(), path.display()));
        Self { path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Start and size of a partition in bytes, as the table of the disk has it.
    ///
    /// # Panics
    /// If there is none of that name.
    #[must_use]
    pub fn partition(&self, name: &str) -> (u64, u64) {
        let file = File::open(&self.path).expect("the disk");
        let mut table = vec![0; 128 * 128];
        file.read_exact_at(&mut table, 2 * SECTOR).expect("the table of partitions");
        let number = |entry: &[u8], at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
        let named = |entry: &&[u8]| {
            let units: Vec<u16> = entry[56..].chunks(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
            String::from_utf16_lossy(&units).trim_end_matches('\0') == name
        };
        let entry = table.chunks(128).find(named).unwrap_or_else(|| panic!("no partition {name}"));
        let (first, last) = (number(entry, 32), number(entry, 40));
        (first * SECTOR, (last + 1 - first) * SECTOR)
    }

    fn volume(&self, name: &str) -> FileSystem<Slice> {
        let (start, bytes) = self.partition(name);
        let file = File::options().read(true).write(true).open(&self.path).expect("the disk");
        let options = FsOptions::new().update_accessed_date(false);
        FileSystem::new(Slice { file, start, bytes, at: 0 }, options).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Puts a file on a FAT partition, in place of one that is there.
    ///
    /// # Panics
    /// If that does not work.
    pub fn put(&self, partition: &str, path: &str, contents: &[u8]) {
        let volume = self.volume(partition);
        let mut file = volume.root_dir().create_file(path).expect("a file");
        file.truncate().and_then(|()| file.write_all(contents)).and_then(|()| file.flush()).expect("written");
        drop(file);
        volume.unmount().expect("a clean volume");
    }

    /// The names in a folder of a FAT partition.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn names(&self, partition: &str, folder: &str) -> Vec<String> {
        let volume = self.volume(partition);
        let folder = volume.root_dir().open_dir(folder).expect("a folder");
        let names = folder.iter().map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names.filter(|name| name != "." && name != "..").collect();
        names.sort();
        names
    }

    /// A file of a FAT partition.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn read(&self, partition: &str, path: &str) -> Vec<u8> {
        let volume = self.volume(partition);
        let mut bytes = Vec::new();
        let mut file = volume.root_dir().open_file(path).expect("a file");
        file.read_to_end(&mut bytes).expect("its contents");
        bytes
    }

    /// Takes all free blocks of the state partition away, by a file of its root folder.
    ///
    /// # Panics
    /// If debugfs cannot.
    pub fn fill_state(&self) {
        self.debugfs("write /dev/null fill");
        let said = self.e2fs("dumpe2fs", &["-h"]).1;
        let free = said.lines().find_map(|line| line.strip_prefix("Free blocks:")?.trim().parse::<u64>().ok());
        let mut left = free.unwrap_or_else(|| panic!("no number of free blocks:\n{said}"));
        let (mut at, mut piece) = (0, left);
        // All or nothing: what describes the blocks takes some as well.
        while left > 0 && piece > 0 {
            piece = piece.min(left);
            if self.debugfs(&format!("fallocate fill {at} {}", at + piece - 1)).contains("Could not allocate") {
                piece = piece * 255 / 256;
            } else {
                at += piece;
                left -= piece;
            }
        }
        // 4 KiB blocks.
        self.debugfs(&format!("set_inode_field fill size {}", at * 4096));
        self.check_state().unwrap_or_else(|said| panic!("filled, and not clean:\n{said}"));
    }

    /// Gives them back.
    ///
    /// # Panics
    /// If debugfs cannot.
    pub fn empty_state(&self) {
        self.debugfs("rm fill");
        self.check_state().unwrap_or_else(|said| panic!("emptied, and not clean:\n{said}"));
    }

    fn debugfs(&self, command: &str) -> String {
        self.e2fs("debugfs", &["-w", "-R", command]).1
    }

    /// A program of e2fsprogs on the state partition: whether it was content, and what it said.
    fn e2fs(&self, program: &str, options: &[&str]) -> (bool, String) {
        let (start, _) = self.partition("DRAY-STATE");
        let device = format!("{}?offset={start}", self.path.display());
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let output = Command::new(program).env("PATH", path).args(options).arg(&device).output();
        let output = output.unwrap_or_else(|error| panic!("{program} (of e2fsprogs): {error}"));
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    }

    /// What `e2fsck -fn` says of the state partition; `Err` if it is not clean. Nothing is changed.
    ///
    /// # Errors
    /// What it printed.
    ///
    /// # Panics
    /// If e2fsck is not there.
    pub fn check_state(&self) -> Result<String, String> {
        let (content, said) = self.e2fs("e2fsck", &["-fn"]);
        // A journal that is left to be replayed is said and skipped by -n, with exit status 0.
        let clean = content && !said.contains("skipping journal recovery") && !said.contains("not cleanly unmounted");
        if clean { Ok(said) } else { Err(said) }
    }
}

/// A file with the same contents and the same holes.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let (source, target) = (File::open(from)?, File::create(to)?);
    let bytes = source.metadata()?.len();
    target.set_len(bytes)?;
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    while at < bytes {
        // The end of the file is the end of the data.
        let Ok(start) = rustix::fs::seek(&source, Seek64::Data(at)) else { break };
        let end = rustix::fs::seek(&source, Seek64::Hole(start))?;
        at = start;
        while at < end {
            let count = piece.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            source.read_exact_at(&mut piece[..count], at)?;
            target.write_all_at(&piece[..count], at)?;
            at += count as u64;
        }
    }
    Ok(())
}
