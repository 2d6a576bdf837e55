//! The update bundle, and the key that signs it.
//!
//! A bundle is a kernel and an initial RAM disk behind a signed header; `dray image update` writes them into the slot that is not
//! running. In order: the bytes `DRAYUPD1`; the header's length (u32, little-endian); the header, JSON; 64 bytes of ed25519
//! signature (RFC 8032) over everything before it; the kernel; the initial RAM disk. The header has the SHA-256 of both, so that
//! the one signature covers all.

use crate::Outcome;
use crate::tree::{digest, read_text};
use ed25519_dalek::{Signer, SigningKey};
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const MAGIC: &[u8] = b"DRAYUPD1";

/// What goes into a bundle.
pub struct Bundle<'a> {
    /// The higher one boots first.
    pub version: u64,
    pub kernel: &'a [u8],
    pub initrd: &'a [u8],
    /// The kernel's command line without what names the slot and the version.
    pub options: &'a str,
}

impl Bundle<'_> {
    /// The bundle's bytes. Signatures of ed25519 draw no random numbers: the same bundle has the same bytes.
    pub fn bytes(&self, key: &SigningKey) -> Vec<u8> {
        let part = |bytes: &[u8]| format!("{{\"bytes\":{},\"sha256\":\"{}\"}}", bytes.len(), digest(bytes));
        let header = format!(
            "{{\"version\":{},\"kernel\":{},\"initrd\":{},\"options\":\"{}\"}}",
            self.version,
            part(self.kernel),
            part(self.initrd),
            self.options.replace('\\', "\\\\").replace('"', "\\\"")
        );
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
        bytes.extend_from_slice(header.as_bytes());
        let signature = key.sign(&bytes);
        bytes.extend_from_slice(&signature.to_bytes());
        bytes.extend_from_slice(self.kernel);
        bytes.extend_from_slice(self.initrd);
        bytes
    }
}

/// Reads a key: 64 hexadecimal digits, the secret half.
pub fn read_key(path: &Path) -> Outcome<SigningKey> {
    let text = read_text(path)?;
    let digits = text.trim();
    let byte = |at: usize| digits.get(2 * at..2 * at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let mut secret = [0; 32];
    for (at, to) in secret.iter_mut().enumerate() {
        let found = byte(at).filter(|_| digits.len() == 64);
        *to = found.ok_or_else(|| format!("{}: not an ed25519 key of 64 hexadecimal digits", path.display()))?;
    }
    Ok(SigningKey::from_bytes(&secret))
}

/// The key at `path`, made if there is none (mode 0600); true if it was made.
pub fn key_at(path: &Path) -> Outcome<(SigningKey, bool)> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok((read_key(path)?, false)),
        Err(error) => Err(failed(error)),
        Ok(mut file) => {
            let mut secret = [0; 32];
            let drawn = fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut secret));
            drawn.map_err(|error| format!("/dev/urandom: {error}"))?;
            writeln!(file, "{}", hex(&secret)).and_then(|()| file.sync_all()).map_err(failed)?;
            Ok((SigningKey::from_bytes(&secret), true))
        }
    }
}

/// The public half, as the image has it at `/etc/dray/update.pub`.
pub fn public_text(key: &SigningKey) -> String {
    hex(key.verifying_key().as_bytes()) + "\n"
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::{Signature, Verifier};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_signature_covers_the_header_and_the_header_what_follows() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let bundle = Bundle { version: 12, kernel: b"kernel", initrd: b"initrd!", options: "console=ttyS0 a=\"b c\"" };
        let bytes = bundle.bytes(&key);
        assert_eq!((&bytes[..8], bytes == bundle.bytes(&key)), (MAGIC, true));
        let end = 12 + u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&bytes[12..end]).unwrap();
        assert!(header.starts_with("{\"version\":12,\"kernel\":{\"bytes\":6,\"sha256\":\""), "{header}");
        for part in [&digest(b"kernel"), &digest(b"initrd!"), "a=\\\"b c\\\""] {
            assert!(header.contains(part), "{header}");
        }
        let signature = Signature::from_bytes(bytes[end..end + 64].try_into().unwrap());
        key.verifying_key().verify(&bytes[..end], &signature).unwrap();
        assert_eq!(&bytes[end + 64..], b"kernelinitrd!");
    }

    #[test]
    fn a_key_is_made_once_and_for_its_owner_alone() {
        let folder = std::env::temp_dir().join(format!("xtask-key-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("update.key");
        let (first, made) = key_at(&path).unwrap();
        assert!(made);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (again, made) = key_at(&path).unwrap();
        assert!(!made && first.to_bytes() == again.to_bytes());
        assert_eq!(public_text(&again).trim().len(), 64);
        for odd in ["", "abc", &"zz".repeat(32), &"00".repeat(33)] {
            fs::write(&path, odd).unwrap();
            assert!(read_key(&path).unwrap_err().contains("64 hexadecimal digits"), "{odd}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
