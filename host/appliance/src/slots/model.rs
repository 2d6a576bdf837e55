//! A file system for tests in which the power can go: what was not flushed may be there afterwards, or not, or in part.
//!
//! Names change when a folder is flushed; before that, each change since the last flush may have reached the disk or not, in
//! any combination (FAT has no journal). A file's content is on the disk when it is flushed; before that any part of it is,
//! and what is not is other bytes. A rename that has reached the disk may have left both names.

use super::files::Files;
use std::collections::BTreeMap;
use std::io;

/// A change of a name that is not flushed.
#[derive(Clone, Debug)]
enum Change {
    Set(String, usize),
    Remove(String),
}

/// The file system.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Contents by their number: what was written, and how much of it was flushed.
    contents: Vec<(Vec<u8>, usize)>,
    names: BTreeMap<String, usize>,
    /// Names on the disk.
    flushed: BTreeMap<String, usize>,
    changes: Vec<Change>,
    open: Option<usize>,
    /// Operations that are still done; then the power goes.
    pub left: Option<usize>,
    /// Operations done.
    pub done: usize,
    /// Bytes of the partition.
    pub capacity: u64,
}

fn in_folder(path: &str, folder: &str) -> bool {
    path.rsplit_once('/').is_some_and(|(of, _)| of == folder)
}

impl Model {
    /// An empty one of so many bytes.
    pub fn new(capacity: u64) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// The same with a new power supply: the process died, the system lives.
    pub fn powered(&self) -> Self {
        Self { left: None, ..self.clone() }
    }

    /// A file that has been there for long.
    pub fn put(&mut self, path: &str, content: &[u8]) {
        self.contents.push((content.to_vec(), content.len()));
        self.names.insert(path.into(), self.contents.len() - 1);
        self.flushed.clone_from(&self.names);
    }

    fn step(&mut self) -> io::Result<()> {
        if self.left == Some(self.done) {
            return Err(io::Error::other("the power is gone"));
        }
        self.done += 1;
        Ok(())
    }

    fn change(&mut self, change: Change) {
        match &change {
            Change::Set(path, number) => drop(self.names.insert(path.clone(), *number)),
            Change::Remove(path) => drop(self.names.remove(path)),
        }
        self.changes.push(change);
    }

    /// What is there after the power has gone and come again; `chance` decides what was on the disk already.
    pub fn after_power_cut(&self, mut chance: impl FnMut() -> bool) -> Self {
        let mut names = self.flushed.clone();
        for change in self.changes.iter().filter(|_| chance()) {
            match change {
                Change::Set(path, number) => drop(names.insert(path.clone(), *number)),
                Change::Remove(path) => drop(names.remove(path)),
            }
        }
        let contents = self.contents.iter().map(|(content, flushed)| {
            let mut content = content.clone();
            if *flushed < content.len() {
                content[*flushed..].fill(0);
                if chance() {
                    content.truncate(*flushed);
                }
            }
            let length = content.len();
            (content, length)
        });
        Self { contents: contents.collect(), flushed: names.clone(), names, capacity: self.capacity, ..Self::default() }
    }
}

impl Files for Model {
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let names = self.names.keys().filter(|path| in_folder(path, folder));
        Ok(names.filter_map(|path| Some(path.rsplit_once('/')?.1.to_owned())).collect())
    }

    fn read(&self, path: &str, _: u64) -> io::Result<Vec<u8>> {
        let number = *self.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.contents[number].0.clone())
    }

    fn room(&self) -> io::Result<u64> {
        let used: usize = self.names.values().map(|number| self.contents[*number].0.len()).sum();
        Ok(self.capacity.saturating_sub(used as u64))
    }

    fn size(&self, path: &str) -> u64 {
        self.names.get(path).map_or(0, |number| self.contents[*number].0.len() as u64)
    }

    fn make_folder(&mut self, _: &str) -> io::Result<()> {
        self.step()
    }

    fn create(&mut self, path: &str) -> io::Result<()> {
        self.step()?;
        self.contents.push((Vec::new(), 0));
        let number = self.contents.len() - 1;
        self.open = Some(number);
        self.change(Change::Set(path.into(), number));
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.step()?;
        let number = self.open.ok_or(io::ErrorKind::NotFound)?;
        if self.room()? < bytes.len() as u64 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.contents[number].0.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.step()?;
        let number = self.open.take().ok_or(io::ErrorKind::NotFound)?;
        self.contents[number].1 = self.contents[number].0.len();
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.step()?;
        let number = *self.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        if self.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.change(Change::Set(to.into(), number));
        self.change(Change::Remove(from.into()));
        Ok(())
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        self.step()?;
        if self.names.contains_key(path) {
            self.change(Change::Remove(path.into()));
        }
        Ok(())
    }

    fn flush_folder(&mut self, path: &str) -> io::Result<()> {
        self.step()?;
        let (of_folder, others) = std::mem::take(&mut self.changes).into_iter().partition(|change| {
            let (Change::Set(name, _) | Change::Remove(name)) = change;
            in_folder(name, path)
        });
        self.changes = others;
        for change in Vec::<Change>::from(of_folder) {
            match change {
                Change::Set(path, number) => drop(self.flushed.insert(path, number)),
                Change::Remove(path) => drop(self.flushed.remove(&path)),
            }
        }
        Ok(())
    }
}
