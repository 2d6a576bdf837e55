//! An update bundle: what it says of itself, and whether it is signed by who may sign.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `DRAYUPD1` |
//! | 4 | length of the header, little-endian |
//! | | the header: JSON with `version`, `kernel` and `initrd` (each `bytes` and `sha256`), `options` |
//! | 64 | ed25519 signature of everything before it |
//! | | the kernel, the initramfs |
//!
//! The signature covers the two files by their digests. Nothing of the header is looked at before it is verified.

use ed25519_dalek::{Signature, VerifyingKey};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// In front of a bundle.
pub const MAGIC: &[u8; 8] = b"DRAYUPD1";
/// Bytes of a signature.
const SIGNATURE_BYTES: usize = 64;
/// Most bytes of a header.
const HEADER_BYTES: usize = 64 << 10;
/// Most bytes of a kernel or an initramfs.
pub const FILE_BYTES: u64 = 1 << 30;
/// Most characters of a kernel's command line (`COMMAND_LINE_SIZE` on x86-64), less what is added to it.
const OPTION_CHARS: usize = 2048 - 64;

/// Why a bundle is refused.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum BundleError {
    /// It cannot be read, or ends too early.
    #[error("the update cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// It is something else.
    #[error("it is no update bundle: {0}")]
    #[diagnostic(help("`cargo xtask image` writes one, target/image/dray-update.bin"))]
    Format(String),
    /// Somebody else signed it, or it was changed.
    #[error("its signature is not by the key of this image ({fingerprint})")]
    #[diagnostic(help("it was signed with another key, or changed on its way"))]
    Signature {
        /// The key's fingerprint.
        fingerprint: String,
    },
    /// A file in it is not what the header says.
    #[error("its {what} is not the one that was signed: SHA-256 {found}, not {expected}")]
    #[diagnostic(help("it was damaged on its way: fetch it again"))]
    Digest {
        /// Kernel or initramfs.
        what: &'static str,
        /// What was found.
        found: String,
        /// What the header says.
        expected: String,
    },
    /// The image's key.
    #[error("the public key {} cannot be used: {why}", path.display())]
    Key {
        /// Its file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// The public key that updates are signed for.
#[derive(Clone, Debug)]
pub struct Key(VerifyingKey);

impl Key {
    /// Reads a file with 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`BundleError::Key`].
    pub fn read(path: &Path) -> Result<Self, BundleError> {
        let wrong = |why: String| BundleError::Key { path: path.into(), why };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
        file.take(1024).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
        let bytes = from_hex(text.trim()).ok_or_else(|| wrong("it must be 64 hexadecimal digits".into()))?;
        VerifyingKey::from_bytes(&bytes).map(Self).map_err(|error| wrong(error.to_string()))
    }

    /// A key from its bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Option<Self> {
        VerifyingKey::from_bytes(bytes).ok().map(Self)
    }

    /// The first half of its SHA-256 in hex.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        hex(&Sha256::digest(self.0.as_bytes())[..16])
    }
}

/// Bytes as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, nth) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[nth..nth + 2], 16).ok()?;
    }
    Some(bytes)
}

/// A file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Part {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, 64 hexadecimal digits.
    pub sha256: String,
}

/// What a bundle says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Header {
    /// The image's version.
    pub version: u64,
    /// The kernel.
    pub kernel: Part,
    /// The initramfs.
    pub initrd: Part,
    /// The kernel's command line, without the slot and the version.
    pub options: String,
}

/// Reads and verifies what is in front of the files.
///
/// # Errors
/// [`BundleError`].
pub fn read_header(from: &mut dyn Read, key: &Key) -> Result<Header, BundleError> {
    let mut signed = vec![0; MAGIC.len() + 4];
    from.read_exact(&mut signed)?;
    let (magic, length) = signed.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(BundleError::Format("it does not begin with DRAYUPD1".into()));
    }
    let length = length.try_into().map(u32::from_le_bytes).unwrap_or(u32::MAX) as usize;
    if length > HEADER_BYTES {
        return Err(BundleError::Format(format!("a header of {length} bytes is longer than {HEADER_BYTES}")));
    }
    let start = signed.len();
    signed.resize(start + length, 0);
    from.read_exact(&mut signed[start..])?;
    let mut signature = [0; SIGNATURE_BYTES];
    from.read_exact(&mut signature)?;
    let verified = key.0.verify_strict(&signed, &Signature::from_bytes(&signature));
    verified.map_err(|_| BundleError::Signature { fingerprint: key.fingerprint() })?;
    let header: Header = serde_json::from_slice(&signed[start..]).map_err(|error| BundleError::Format(error.to_string()))?;
    header.check()?;
    Ok(header)
}

impl Header {
    fn check(&self) -> Result<(), BundleError> {
        for (what, part) in [("kernel", &self.kernel), ("initrd", &self.initrd)] {
            if part.bytes == 0 || part.bytes > FILE_BYTES {
                return Err(BundleError::Format(format!("a {what} of {} bytes", part.bytes)));
            }
            if from_hex(&part.sha256).is_none() {
                return Err(BundleError::Format(format!("the SHA-256 of the {what} is \"{}\"", part.sha256)));
            }
        }
        let plain = self.options.len() <= OPTION_CHARS && self.options.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        // Whoever boots tells the slot; a second one would win.
        if !plain || ["dray.slot", "dray.version"].iter().any(|word| self.options.contains(word)) {
            return Err(BundleError::Format(format!("the command line \"{:.80}\"", self.options.escape_debug())));
        }
        Ok(())
    }
}

/// Copies a file of a bundle, and holds its digest against the header's.
///
/// # Errors
/// [`BundleError`], or the writer's as [`BundleError::Unreadable`]'s neighbour in `E`.
pub fn copy_part<E: From<BundleError>>(
    from: &mut dyn Read,
    part: &Part,
    what: &'static str,
    mut write: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let (mut hash, mut left, mut buffer) = (Sha256::new(), part.bytes, vec![0; 64 << 10]);
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let count = match from.read(&mut buffer[..most]) {
            Ok(0) => return Err(BundleError::Unreadable(io::ErrorKind::UnexpectedEof.into()).into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(BundleError::Unreadable(error).into()),
        };
        hash.update(&buffer[..count]);
        write(&buffer[..count])?;
        left -= count as u64;
    }
    let found = hex(&hash.finalize());
    if found.eq_ignore_ascii_case(&part.sha256) {
        return Ok(());
    }
    Err(BundleError::Digest { what, found, expected: part.sha256.clone() }.into())
}
