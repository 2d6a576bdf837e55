//! Hash functions, secrets and the response computation.

use super::dh::DhGroup;
use alloc::string::String;
use alloc::vec::Vec;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256, Sha384, Sha512};

/// Bytes of the longest hash.
pub const MAX_HASH_BYTES: usize = 64;

/// A hash function identifier (Base 2.3 §8.3.5.5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Hash {
    /// SHA-256 (`01h`).
    Sha256 = 1,
    /// SHA-384 (`02h`).
    Sha384 = 2,
    /// SHA-512 (`03h`).
    Sha512 = 3,
}

impl Hash {
    /// Every hash, strongest first.
    pub const ALL: [Self; 3] = [Self::Sha512, Self::Sha384, Self::Sha256];

    /// The hash of an identifier, `None` for a reserved one.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.id() == id)
    }

    /// The identifier.
    #[must_use]
    pub const fn id(self) -> u8 {
        self as u8
    }

    /// Bytes of a hash, of a challenge and of a response.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    pub(super) fn digest(self, data: &[u8]) -> Vec<u8> {
        match self {
            Self::Sha256 => Sha256::digest(data).to_vec(),
            Self::Sha384 => Sha384::digest(data).to_vec(),
            Self::Sha512 => Sha512::digest(data).to_vec(),
        }
    }

    /// HMAC over the parts in a row.
    pub(super) fn mac(self, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        match self {
            Self::Sha256 => keyed::<Hmac<Sha256>>(key, parts).map_or(Vec::new(), |mac| mac.finalize().into_bytes().to_vec()),
            Self::Sha384 => keyed::<Hmac<Sha384>>(key, parts).map_or(Vec::new(), |mac| mac.finalize().into_bytes().to_vec()),
            Self::Sha512 => keyed::<Hmac<Sha512>>(key, parts).map_or(Vec::new(), |mac| mac.finalize().into_bytes().to_vec()),
        }
    }

    /// Whether `given` is the HMAC over the parts, in a time that does not tell where they differ.
    pub(super) fn verify(self, key: &[u8], parts: &[&[u8]], given: &[u8]) -> bool {
        match self {
            Self::Sha256 => keyed::<Hmac<Sha256>>(key, parts).is_some_and(|mac| mac.verify_slice(given).is_ok()),
            Self::Sha384 => keyed::<Hmac<Sha384>>(key, parts).is_some_and(|mac| mac.verify_slice(given).is_ok()),
            Self::Sha512 => keyed::<Hmac<Sha512>>(key, parts).is_some_and(|mac| mac.verify_slice(given).is_ok()),
        }
    }
}

/// HMAC takes a key of any length, so there is always one.
fn keyed<M: Mac + KeyInit>(key: &[u8], parts: &[&[u8]]) -> Option<M> {
    let mut mac = <M as KeyInit>::new_from_slice(key).ok()?;
    for part in parts {
        mac.update(part);
    }
    Some(mac)
}

/// Why a text is no secret. Nothing of the text is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretError {
    /// It is not of the form `DHHC-1:hh:base64:`.
    Form,
    /// `hh` names no hash function (00 none, 01 SHA-256, 02 SHA-384, 03 SHA-512).
    Hash,
    /// The base64 text is malformed.
    Base64,
    /// The key is not 32, 48 or 64 bytes long.
    Length,
    /// The CRC-32 behind the key is not the key's.
    Crc,
}

impl core::fmt::Display for SecretError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Form => "not of the form DHHC-1:hh:base64:",
            Self::Hash => "the hash function is none of 00, 01, 02, 03",
            Self::Base64 => "the key is not valid base64",
            Self::Length => "the key is not 32, 48 or 64 bytes long",
            Self::Crc => "the key's checksum is wrong (mistyped or cut?)",
        })
    }
}

impl core::error::Error for SecretError {}

/// A DH-HMAC-CHAP secret: a key, and the hash function that transforms it (Base 2.3 §8.3.5.5.7).
#[derive(Clone)]
pub struct Secret {
    transform: Option<Hash>,
    key: Vec<u8>,
}

impl core::fmt::Debug for Secret {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

impl Secret {
    /// A secret of raw key bytes.
    ///
    /// # Errors
    /// [`SecretError::Length`].
    pub fn new(transform: Option<Hash>, key: &[u8]) -> Result<Self, SecretError> {
        if !matches!(key.len(), 32 | 48 | 64) {
            return Err(SecretError::Length);
        }
        Ok(Self { transform, key: key.to_vec() })
    }

    /// Reads the representation `DHHC-1:hh:base64 of the key and its CRC-32:`.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn parse(text: &str) -> Result<Self, SecretError> {
        let rest = text.strip_prefix("DHHC-1:").ok_or(SecretError::Form)?;
        let (hash, rest) = rest.split_once(':').ok_or(SecretError::Form)?;
        let encoded = rest.strip_suffix(':').ok_or(SecretError::Form)?;
        let transform = match hash {
            "00" => None,
            "01" => Some(Hash::Sha256),
            "02" => Some(Hash::Sha384),
            "03" => Some(Hash::Sha512),
            _ => return Err(SecretError::Hash),
        };
        let bytes = decode(encoded).ok_or(SecretError::Base64)?;
        let (key, crc) = bytes.split_last_chunk::<4>().ok_or(SecretError::Length)?;
        let secret = Self::new(transform, key)?;
        if crc32(key) != u32::from_le_bytes(*crc) {
            return Err(SecretError::Crc);
        }
        Ok(secret)
    }

    /// The representation that [`Self::parse`] reads.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut bytes = self.key.clone();
        bytes.extend_from_slice(&crc32(&self.key).to_le_bytes());
        alloc::format!("DHHC-1:{:02x}:{}:", self.transform.map_or(0, Hash::id), encode(&bytes))
    }

    /// The key that responses are computed with: transformed by the NQN of whom it belongs to.
    pub(super) fn transformed(&self, nqn: &str) -> Vec<u8> {
        match self.transform {
            None => self.key.clone(),
            Some(hash) => hash.mac(&self.key, &[nqn.as_bytes(), b"NVMe-over-Fabrics"]),
        }
    }
}

/// What a response is computed over (Base 2.3 §8.3.5.5.4, §8.3.5.5.5).
pub(super) struct ResponseInput<'a> {
    pub hash: Hash,
    pub group: DhGroup,
    /// The Diffie-Hellman secret; empty for the null group.
    pub shared: &'a [u8],
    pub challenge: &'a [u8],
    pub seqnum: u32,
    pub t_id: u16,
    /// "HostHost" or "Controller".
    pub role: &'static str,
    pub own_nqn: &'a str,
    pub peer_nqn: &'a str,
}

impl ResponseInput<'_> {
    fn with<T>(&self, run: impl FnOnce(&[&[u8]]) -> T) -> T {
        let augmented = match self.group {
            DhGroup::Null => self.challenge.to_vec(),
            _ => self.hash.mac(&self.hash.digest(self.shared), &[self.challenge]),
        };
        let (seqnum, t_id) = (self.seqnum.to_le_bytes(), self.t_id.to_le_bytes());
        let nqns = [self.own_nqn.as_bytes(), &[0], self.peer_nqn.as_bytes()];
        // The byte after T_ID is SC_C, always 0 here.
        run(&[&augmented, &seqnum, &t_id, &[0], self.role.as_bytes(), nqns[0], nqns[1], nqns[2]])
    }

    /// The response of whom `secret` belongs to.
    pub fn response(&self, secret: &Secret) -> Vec<u8> {
        self.with(|parts| self.hash.mac(&secret.transformed(self.own_nqn), parts))
    }

    /// Whether that is the response, in constant time.
    pub fn verify(&self, secret: &Secret, given: &[u8]) -> bool {
        self.with(|parts| self.hash.verify(&secret.transformed(self.own_nqn), parts, given))
    }
}

/// CRC-32 as of IEEE 802.3, reflected.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 with padding (RFC 4648 §4).
fn encode(bytes: &[u8]) -> String {
    let mut text = String::new();
    for piece in bytes.chunks(3) {
        let word = piece.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - piece.len()));
        for place in 0..4 {
            let digit = word >> (18 - 6 * place) & 0x3F;
            text.push(if place <= piece.len() { char::from(ALPHABET[digit as usize]) } else { '=' });
        }
    }
    text
}

/// Strict: whole groups, padding at the end alone, no bits left over.
fn decode(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    let padding = text.len() - digits.len();
    if !text.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    let (mut word, mut bits) = (0u32, 0);
    for digit in digits.bytes() {
        let value = ALPHABET.iter().position(|known| *known == digit)? as u32;
        (word, bits) = (word << 6 | value, bits + 6);
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits) as u8);
            word &= (1 << bits) - 1;
        }
    }
    (word == 0 && digits.len() % 4 == (4 - padding) % 4).then_some(bytes)
}
