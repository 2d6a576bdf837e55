//! What is kept, and how it lies in the store.
//!
//! A value is a version byte, the first eight bytes of the SHA-256 of what follows, and the entry as JSON: an entry that was cut
//! or changed is noticed, whatever sled thinks of it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Digest;

/// The version of the entries below.
const VERSION: u8 = 1;
/// Bytes before the JSON.
const HEAD: usize = 1 + 8;
/// Most bytes of an entry. A longer one is not kept.
pub(super) const MOST_BYTES: usize = 64 << 10;

/// What moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveKind {
    /// Controllers and their media.
    #[default]
    Migration,
    /// The media behind controllers that stayed.
    MediaMove,
    /// Controllers of a device that others drive.
    Departure,
}

/// A migration or a media move, from its begin on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationEntry {
    /// What moved.
    #[serde(default)]
    pub kind: MoveKind,
    /// Of a media move: the name of the subsystem that the namespace is of.
    #[serde(default)]
    pub subsystem: Option<String>,
    /// The source subsystem's name in the configuration; of a media move the file, empty for memory.
    pub from: String,
    /// The destination's.
    pub to: String,
    /// The NSID of the namespace that moves.
    pub nsid: u32,
    /// NSIDs of those that move along.
    #[serde(default)]
    pub further: Vec<u32>,
    /// Its NGUID, 32 hexadecimal digits.
    pub nguid: String,
    /// When it began, seconds since 1970 UTC, by the caller's clock.
    pub begun_s: i64,
    /// How it ended; `None` while it runs, and for ever if the process was killed.
    pub ended: Option<Ending>,
}

/// The end of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// When, seconds since 1970 UTC, by the caller's clock.
    pub at_s: i64,
    /// "done", "undone: …", "in doubt: …".
    pub outcome: String,
    /// Every block and every write was accounted for; `None` where nobody has compared them.
    pub verdict_ok: Option<bool>,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// Bytes written to the destination.
    pub bytes: u64,
    /// From start to end, µs.
    pub duration_us: u64,
    /// From the Suspend command to the Resume completion, µs; `None` if it never came to that.
    pub downtime_us: Option<u64>,
    /// The role, the component and its SHA-256, of each policy.
    pub policies: Vec<(String, String, String)>,
}

/// A namespace as it was seen last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceEntry {
    /// The subsystem's name in the configuration.
    pub subsystem: String,
    /// Its NQN.
    pub nqn: String,
    /// NSID.
    pub nsid: u32,
    /// NGUID, 32 hexadecimal digits.
    pub nguid: String,
    /// Capacity.
    pub bytes: u64,
    /// Bytes of a logical block.
    pub block_bytes: u32,
    /// CNTLIDs of the controllers that reach it.
    pub controllers: Vec<u16>,
    /// When it was seen, seconds since 1970 UTC.
    pub seen_s: i64,
}

/// An entry as it lies in the store; `None` if it is longer than an entry may be.
pub(super) fn encode<T: Serialize>(entry: &T) -> Option<Vec<u8>> {
    let json = serde_json::to_vec(entry).ok().filter(|json| json.len() + HEAD <= MOST_BYTES)?;
    let mut value = Vec::with_capacity(HEAD + json.len());
    value.push(VERSION);
    value.extend_from_slice(&checksum(&json));
    value.extend_from_slice(&json);
    Some(value)
}

/// The entry in a value; `None` if it was cut or changed, or is of a later version.
pub(super) fn decode<T: DeserializeOwned>(value: &[u8]) -> Option<T> {
    let (head, json) = value.split_at_checked(HEAD)?;
    (head[0] == VERSION && head[1..] == checksum(json)).then(|| serde_json::from_slice(json).ok())?
}

fn checksum(json: &[u8]) -> [u8; 8] {
    let whole: [u8; 32] = sha2::Sha256::digest(json).into();
    let mut first = [0; 8];
    first.copy_from_slice(&whole[..8]);
    first
}
