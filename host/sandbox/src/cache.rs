//! Compiled code on disk.
//!
//! Compiled code is machine code that will run in this process: loading what someone else wrote is giving them the process. So
//! it is loaded only from a folder, and a file in it, that belong to this user and that nobody else can write, and only if its
//! SHA-256 is the one that was recorded when it was written. Everything else is compiled again, which costs time and nothing
//! more. The record stands in the same folder: it guards against damage, the folder's mode guards against others.
//!
//! Two files a component and engine: `KEY.cwasm`, and `KEY.json` with its record. The key is the SHA-256 of the component's own
//! SHA-256, wasmtime's version and whatever of the engine's configuration changes the code.
//!
//! Code that was compiled ahead of time for a stated CPU ([`Cpu`]) is kept in the same way, in a folder of its own that is only
//! read: `COMPONENT-CPU.cwasm`, by the component's SHA-256. Whether it fits this wasmtime, its settings and this machine's CPU
//! stands in the code itself and is checked by wasmtime.
//!
//! Not here: taking old entries away. A folder that has grown may be emptied at any time.
#![allow(unsafe_code)]

use crate::pin::Digest;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::hash::{Hash as _, Hasher};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use wasmtime::{Config, Engine};
use wasmtime::component::Component;

/// Most bytes of compiled code: the largest component compiles to a few times its size.
const MAX_CODE_BYTES: u64 = 1 << 30;
/// Most bytes of a record.
const MAX_RECORD_BYTES: u64 = 4096;
/// Bits that let the group or others write.
const WRITABLE_BY_OTHERS: RawMode = 0o022;

/// What code that is compiled ahead of time is compiled for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A CPU that code is compiled for, by the levels of the x86-64 psABI. Code for a level runs on every CPU of that level and
/// those above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// Any x86-64.
    V1,
    /// SSE4.2 and POPCNT: made since about 2009, and QEMU's `Nehalem`.
    V2,
    /// AVX2, BMI, FMA: made since about 2013, and QEMU's `Haswell`.
    V3,
}

impl Cpu {
    /// All of them, the newest first.
    pub const ALL: [Self; 3] = [Self::V3, Self::V2, Self::V1];

    /// Its name in the psABI, which is cranelift's preset as well.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "x86-64",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }
}

impl std::str::FromStr for Cpu {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|cpu| cpu.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("\"{text}\" is no CPU that code is compiled for; there are {names}")
        })
    }
}

/// Sets an engine up to compile for a CPU that need not be this machine's.
pub(crate) fn compile_for(config: &mut Config, cpu: Cpu) -> wasmtime::Result<()> {
    config.target(TARGET)?;
    // SAFETY: what a flag could break is that code uses instructions which the machine does not have, or keeps to other rules
    // than the host. These are presets of features of the CPU and nothing else; such an engine only compiles
    // (`Engine::precompile_component`), and an engine that loads the code compares its features with those of its machine.
    unsafe { config.cranelift_flag_enable(cpu.name()) };
    Ok(())
}

/// Why a cache folder cannot be used, or an entry was not written.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The folder or a file in it belongs to another user.
    #[error("it belongs to user {found}, not to user {expected} who runs this; nobody else may own compiled code")]
    Owner {
        /// Its owner's user ID.
        found: u32,
        /// The effective user ID.
        expected: u32,
    },
    /// Others can write it.
    #[error("its mode is {mode:04o}: others can write it; `chmod go-w` takes that away")]
    Mode {
        /// Its permission bits.
        mode: u32,
    },
    /// Not a folder, or not a plain file.
    #[error("it is not {0}")]
    Kind(&'static str),
    /// The code could not be serialised.
    #[error("the compiled code cannot be written: {0}")]
    Code(String),
}

fn system(what: &'static str) -> impl FnOnce(Errno) -> CacheError {
    move |error| CacheError::System { what, source: error.into() }
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> CacheError {
    move |source| CacheError::System { what, source }
}

/// What is recorded of a file of compiled code.
#[derive(Serialize, Deserialize)]
struct Record {
    /// Its SHA-256 in hex.
    sha256: String,
    /// Its size in bytes.
    bytes: u64,
}

/// A folder of compiled code.
#[derive(Debug)]
pub struct Cache {
    folder: OwnedFd,
}

impl Cache {
    /// Opens the folder, and makes it first if it is not there (mode 0700, parents as the umask says).
    ///
    /// # Errors
    /// [`CacheError`]: another's, writable by others, a symbolic link, not a folder.
    pub fn open(folder: &Path) -> Result<Self, CacheError> {
        if let Some(parent) = folder.parent() {
            std::fs::create_dir_all(parent).map_err(io("make the parent folder"))?;
        }
        match rustix::fs::mkdir(folder, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(system("make the folder")(error)),
        }
        Self::open_existing(folder)
    }

    /// As [`open`](Self::open), for a folder that is there.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_existing(folder: &Path) -> Result<Self, CacheError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(CWD, folder, flags, Mode::empty()).map_err(system("open the folder"))?;
        own(&folder, FileType::Directory)?;
        Ok(Self { folder })
    }

    /// The compiled code of the component with this SHA-256, if it is here, ours, whole, and made for this engine.
    #[must_use]
    pub fn get(&self, engine: &Engine, component: Digest) -> Option<Component> {
        self.load(engine, &key(engine, component))
    }

    /// Code that was compiled ahead of time, if there is some that this machine can run.
    #[must_use]
    pub fn ahead(&self, engine: &Engine, component: Digest) -> Option<Component> {
        Cpu::ALL.into_iter().find_map(|cpu| self.load(engine, &ahead_key(cpu, component)))
    }

    fn load(&self, engine: &Engine, key: &str) -> Option<Component> {
        let bytes = match self.read_verified(key) {
            Ok(bytes) => bytes?,
            Err(error) => {
                tracing::warn!(%error, key, "compiled component not used; it is compiled again");
                return None;
            }
        };
        // SAFETY: `deserialize` must be given only what this wasmtime's compiler wrote. These bytes were read from a file that
        // belongs to this user and that nobody else can write, in such a folder (checked on the open descriptors), and their
        // SHA-256 is the one recorded there by `put` or `put_ahead`; they are in our own memory, so that they cannot change after
        // the check. Code of another version, settings or CPU says so in its head, and is refused.
        let code = unsafe { Component::deserialize(engine, &bytes) };
        code.inspect_err(|error| tracing::warn!(%error, key, "compiled component does not fit; it is compiled again")).ok()
    }

    /// Keeps compiled code. Written beside and renamed, code before record, so that a crash leaves nothing half there.
    ///
    /// # Errors
    /// [`CacheError`]; nothing is kept then.
    pub fn put(&self, engine: &Engine, component: Digest, code: &Component) -> Result<(), CacheError> {
        // The folder may have been opened to others since it was checked.
        own(&self.folder, FileType::Directory)?;
        let key = key(engine, component);
        let bytes = code.serialize().map_err(|error| CacheError::Code(format!("{error:#}")))?;
        self.write_both(&key, &bytes)
    }

    /// Keeps what [`Engine::precompile_component`] made of a component for a CPU; returns its file, below the folder.
    ///
    /// # Errors
    /// [`CacheError`]; nothing is kept then.
    pub fn put_ahead(&self, cpu: Cpu, component: Digest, bytes: &[u8]) -> Result<PathBuf, CacheError> {
        own(&self.folder, FileType::Directory)?;
        let key = ahead_key(cpu, component);
        self.write_both(&key, bytes)?;
        Ok(code_name(&key).into())
    }

    fn write_both(&self, key: &str, bytes: &[u8]) -> Result<(), CacheError> {
        let record = Record { sha256: Digest::of(bytes).to_string(), bytes: bytes.len() as u64 };
        let record = serde_json::to_vec(&record).map_err(|error| CacheError::Code(error.to_string()))?;
        self.write(&code_name(key), bytes)?;
        self.write(&record_name(key), &record)
    }

    /// The file of compiled code for a component, below the folder.
    #[must_use]
    pub fn file_of(engine: &Engine, component: Digest) -> PathBuf {
        code_name(&key(engine, component)).into()
    }

    /// `None` if there is no such entry.
    fn read_verified(&self, key: &str) -> Result<Option<Vec<u8>>, CacheError> {
        own(&self.folder, FileType::Directory)?;
        let Some(record) = self.read(&record_name(key), MAX_RECORD_BYTES)? else { return Ok(None) };
        let record: Record = serde_json::from_slice(&record).map_err(|error| CacheError::Code(error.to_string()))?;
        let Some(bytes) = self.read(&code_name(key), MAX_CODE_BYTES)? else { return Ok(None) };
        if bytes.len() as u64 != record.bytes || Digest::of(&bytes).to_string() != record.sha256 {
            return Err(CacheError::Code("it is not what was written: its SHA-256 is not the recorded one".into()));
        }
        Ok(Some(bytes))
    }

    fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, CacheError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.folder, name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(system("open")(error)),
        };
        let size = own(&file, FileType::RegularFile)?;
        if size > limit {
            return Err(CacheError::Code(format!("{size} bytes are more than {limit}")));
        }
        let mut bytes = Vec::new();
        File::from(file).take(limit).read_to_end(&mut bytes).map_err(io("read"))?;
        Ok(Some(bytes))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), CacheError> {
        // Two threads may write the same component's code.
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let beside = format!("{name}.{}.{}", std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
        let written = self.write_beside(&beside, bytes).and_then(|()| {
            rustix::fs::renameat(&self.folder, beside.as_str(), &self.folder, name).map_err(system("rename"))
        });
        if written.is_err() {
            // Best effort: what matters is the error that is returned.
            let _ = rustix::fs::unlinkat(&self.folder, beside.as_str(), AtFlags::empty());
        }
        written
    }

    fn write_beside(&self, name: &str, bytes: &[u8]) -> Result<(), CacheError> {
        match rustix::fs::unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(system("remove a left-over")(error)),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.folder, name, flags, Mode::RUSR | Mode::WUSR).map_err(system("create"))?;
        File::from(file).write_all(bytes).map_err(io("write"))
    }
}

/// Holds an open file or folder against the rule: this user's, writable by nobody else, of the right kind. Returns its size.
fn own(file: impl AsFd, kind: FileType) -> Result<u64, CacheError> {
    let stat = rustix::fs::fstat(file).map_err(system("look at"))?;
    verdict(stat.st_uid, rustix::process::geteuid().as_raw(), stat.st_mode, kind)?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

fn verdict(owner: u32, user: u32, mode: RawMode, kind: FileType) -> Result<(), CacheError> {
    if FileType::from_raw_mode(mode) != kind {
        return Err(CacheError::Kind(if kind == FileType::Directory { "a folder" } else { "a plain file" }));
    }
    if owner != user {
        return Err(CacheError::Owner { found: owner, expected: user });
    }
    if mode & WRITABLE_BY_OTHERS != 0 {
        return Err(CacheError::Mode { mode: mode & 0o7777 });
    }
    Ok(())
}

fn code_name(key: &str) -> String {
    format!("{key}.cwasm")
}

fn record_name(key: &str) -> String {
    format!("{key}.json")
}

fn ahead_key(cpu: Cpu, component: Digest) -> String {
    format!("{component}-{}", cpu.name())
}

/// What the compiled code depends on.
fn key(engine: &Engine, component: Digest) -> String {
    let mut hasher = Sha(Sha256::new());
    hasher.write(component.as_bytes());
    // wasmtime's version is part of what it hashes here, beside target, features and tunables.
    engine.precompile_compatibility_hash().hash(&mut hasher);
    Digest::from_bytes(hasher.0.finalize().into()).to_string()
}

/// SHA-256 where the standard library asks for a hasher.
struct Sha(Sha256);

impl Hasher for Sha {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest: [u8; 32] = self.0.clone().finalize().into();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        u64::from_le_bytes(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_unshared_files_pass() {
        let file = FileType::RegularFile;
        assert!(verdict(7, 7, 0o100_600, file).is_ok());
        assert!(verdict(7, 7, 0o100_644, file).is_ok());
        assert!(matches!(verdict(0, 7, 0o100_600, file), Err(CacheError::Owner { found: 0, expected: 7 })));
        assert!(matches!(verdict(7, 7, 0o100_620, file), Err(CacheError::Mode { mode: 0o620 })));
        assert!(matches!(verdict(7, 7, 0o100_602, file), Err(CacheError::Mode { .. })));
        assert!(matches!(verdict(7, 7, 0o040_700, file), Err(CacheError::Kind(_))));
        assert!(matches!(verdict(7, 7, 0o120_777, FileType::Directory), Err(CacheError::Kind(_))));
    }
}
