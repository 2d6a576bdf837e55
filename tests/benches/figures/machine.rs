//! The machine under the figures: cores to pin to, huge pages, where the build's folder is.

use crate::Failure;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs;
use std::path::PathBuf;

/// The two cores that are used.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    first: usize,
    second: Option<usize>,
    /// All that this process may use.
    allowed: CpuSet,
}

impl Cores {
    /// The first two that this process may use. The calling thread is pinned to the first.
    pub fn find() -> Result<Self, Failure> {
        let allowed = sched_getaffinity(None)?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        let first = cores.next().ok_or("no core to run on")?;
        let found = Self { first, second: cores.next(), allowed };
        found.pin_first()?;
        Ok(found)
    }

    /// The core of the thread that measures.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Another one, for rows that need two threads.
    pub fn second(&self) -> Result<usize, Failure> {
        self.second.ok_or_else(|| "this row needs two cores, and there is one".into())
    }

    /// Pins the calling thread to the first.
    pub fn pin_first(&self) -> Result<(), Failure> {
        pin(self.first)
    }

    pub fn describe(&self) -> String {
        match self.second {
            Some(second) => format!("measured on core {}, the other thread of two-thread rows on core {second}", self.first),
            None => format!("measured on core {}, the only one", self.first),
        }
    }
}

/// Pins the calling thread.
pub fn pin(core: usize) -> Result<(), Failure> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).map_err(|error| format!("cannot pin a thread to core {core}: {error}").into())
}

/// Lets the calling thread, and those that it starts, run where the process may.
pub fn unpin(cores: &Cores) -> Result<(), Failure> {
    sched_setaffinity(None, &cores.allowed).map_err(|error| format!("cannot unpin a thread: {error}").into())
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const PAGE_BYTES: u64 = 2 << 20;

/// Huge pages taken for the run; given back at its end.
pub struct HugePages {
    /// What the pool's size was.
    restore: Option<u64>,
    free: u64,
    wanted: u64,
}

impl HugePages {
    /// Enlarges the pool until `bytes` are free in it, where that is allowed.
    pub fn reserve(bytes: u64) -> Self {
        let wanted = bytes.div_ceil(PAGE_BYTES);
        let (total, free) = (pool("nr_hugepages"), pool("free_hugepages"));
        if free >= wanted {
            return Self { restore: None, free, wanted };
        }
        let grown = fs::write(format!("{POOL}/nr_hugepages"), (total + wanted - free).to_string()).is_ok();
        Self { restore: grown.then_some(total), free: pool("free_hugepages"), wanted }
    }

    pub fn describe(&self) -> String {
        let Self { free, wanted, .. } = self;
        let from = if self.restore.is_some() { ", taken for this run and given back after it" } else { "" };
        if free >= wanted {
            format!("{free} huge pages of 2 MiB are free{from}")
        } else {
            format!("{free} of {wanted} huge pages of 2 MiB are free{from}: small pages where they do not suffice (rows say so)")
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(total) = self.restore {
            // Whoever runs this as root can set it back by hand; there is nobody to tell.
            let _still_large = fs::write(format!("{POOL}/nr_hugepages"), total.to_string());
        }
    }
}

fn pool(file: &str) -> u64 {
    fs::read_to_string(format!("{POOL}/{file}")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// What a row says of memory that did not come as huge pages.
pub fn pages_note(huge: bool) -> &'static str {
    if huge { "huge pages" } else { "SMALL PAGES" }
}

/// Cargo's target folder: this program lies in a profile's `deps` below it.
pub fn target_folder() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe()?;
    let tagged = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    tagged.map(PathBuf::from).ok_or_else(|| "the target folder is not above this program".into())
}

/// The folder of the repository.
pub fn repository() -> PathBuf {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    tests.parent().map_or(tests.clone(), PathBuf::from)
}
