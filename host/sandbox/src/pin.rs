//! Pinning: a component is loaded only if its SHA-256 is the one that was agreed on.

use crate::LoadError;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::{collections::BTreeMap, fmt, fs, path::Path, str::FromStr};

/// Name of the lock file that is written beside built plugins.
pub const LOCK_FILE: &str = "plugins.lock";

/// Most bytes of a lock file.
const MAX_LOCK_BYTES: u64 = 1 << 20;

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The SHA-256 of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = LoadError;

    /// Reads 64 hexadecimal digits of either case.
    fn from_str(text: &str) -> Result<Self, LoadError> {
        let bad = || LoadError::BadDigest(text.chars().take(80).collect());
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

/// What a component's bytes are held against before anything else is done with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// This SHA-256: from `appliance.toml`, or from the lock file.
    Sha256(Digest),
    /// Nothing: only for looking at a file that an operator names by hand (`dray plugin check`, `bench`), never for a migration.
    Unpinned,
}

impl Pin {
    /// The pin of the component at `path`: `configured` (64 hexadecimal digits, from `appliance.toml`) if there is one, else
    /// what the [lock file](LOCK_FILE) beside the component says.
    ///
    /// # Errors
    /// [`LoadError::BadDigest`], [`LoadError::NoPin`] if neither names the component, [`LoadError::BadLockFile`].
    pub fn find(configured: Option<&str>, path: &Path) -> Result<Self, LoadError> {
        if let Some(text) = configured {
            return Ok(Self::Sha256(text.parse()?));
        }
        let lock = path.with_file_name(LOCK_FILE);
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let no_pin = || LoadError::NoPin { component: path.to_owned(), lock: lock.clone() };
        if !lock.exists() {
            return Err(no_pin());
        }
        LockFile::read(&lock)?.digest(&name).map(Self::Sha256).ok_or_else(no_pin)
    }

    /// Holds `found` against the pin.
    ///
    /// # Errors
    /// [`LoadError::WrongHash`] with both.
    pub(crate) fn check(&self, found: Digest) -> Result<(), LoadError> {
        match *self {
            Self::Sha256(expected) if expected != found => Err(LoadError::WrongHash { expected, found }),
            _ => Ok(()),
        }
    }
}

/// The lock file beside built plugins: `[component."NAME.wasm"]` with `sha256 = "…"`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockFile {
    digests: BTreeMap<String, Digest>,
}

#[derive(Deserialize)]
struct LockText {
    #[serde(default)]
    component: BTreeMap<String, LockEntry>,
}

#[derive(Deserialize)]
struct LockEntry {
    sha256: String,
}

impl LockFile {
    /// Reads a lock file. Tables and keys it does not know are skipped: a later build may write more.
    ///
    /// # Errors
    /// [`LoadError::BadLockFile`] with the reason.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let bad = |why: String| LoadError::BadLockFile { path: path.to_owned(), why };
        let length = fs::metadata(path).map_err(|error| bad(error.to_string()))?.len();
        if length > MAX_LOCK_BYTES {
            return Err(bad(format!("{length} bytes are more than the {MAX_LOCK_BYTES} a lock file may have")));
        }
        let text = fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
        Self::parse(&text).map_err(bad)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let text: LockText = toml::from_str(text).map_err(|error| error.to_string())?;
        let digests = text.component.into_iter().map(|(name, entry)| match entry.sha256.parse() {
            Ok(digest) => Ok((name, digest)),
            Err(error) => Err(format!("component.\"{name}\".sha256: {error}")),
        });
        Ok(Self { digests: digests.collect::<Result<_, String>>()? })
    }

    /// The SHA-256 recorded for the component of this file name.
    #[must_use]
    pub fn digest(&self, name: &str) -> Option<Digest> {
        self.digests.get(name).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn digests_are_read_and_shown_as_hex() {
        let digest: Digest = EMPTY.parse().unwrap();
        assert_eq!(digest, Digest::of(b""));
        assert_eq!(digest.to_string(), EMPTY);
        assert_eq!(EMPTY.to_uppercase().parse::<Digest>().unwrap(), digest);
        for bad in ["", "e3b0", &EMPTY[1..], &format!("{EMPTY}0"), &EMPTY.replace('e', "g"), &"é".repeat(32)] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn lock_files_name_components() {
        let lock = LockFile::parse(&format!("[component.\"a.wasm\"]\nsha256 = \"{EMPTY}\"\nsize = 3\n")).unwrap();
        assert_eq!(lock.digest("a.wasm"), Some(Digest::of(b"")));
        assert_eq!(lock.digest("b.wasm"), None);
        let error = LockFile::parse("[component.\"a.wasm\"]\nsha256 = \"12\"\n").unwrap_err();
        assert!(error.contains("a.wasm"), "{error}");
        assert!(LockFile::parse("[component").is_err());
    }
}
