//! The messages as bytes (Base 2.3 §8.3.5.5.1 to §8.3.5.5.6).

use super::Reason;
use super::dh::DhGroup;
use super::secret::Hash;
use alloc::vec::Vec;

/// Bytes that hold every message: what a host asks Authentication Receive for.
pub const MAX_MESSAGE_BYTES: usize = 4096;

/// AUTH_TYPE of the messages that every protocol shares, and of DH-HMAC-CHAP's own.
const COMMON: u8 = 0;
const DHCHAP: u8 = 1;
/// AUTH_ID values.
const NEGOTIATE: u8 = 0x00;
const CHALLENGE: u8 = 0x01;
const REPLY: u8 = 0x02;
const SUCCESS1: u8 = 0x03;
const SUCCESS2: u8 = 0x04;
const FAILURE2: u8 = 0xF0;
const FAILURE1: u8 = 0xF1;
/// AuthID of DH-HMAC-CHAP in a protocol descriptor.
const PROTOCOL_DHCHAP: u8 = 1;
/// Bytes of a protocol descriptor, identifiers of each kind in it, and where they begin.
const DESCRIPTOR: usize = 64;
const IDENTIFIERS: usize = 30;
const FIRST_HASH: usize = 4;
const FIRST_GROUP: usize = FIRST_HASH + IDENTIFIERS;
/// Bytes of the fixed part of challenge, reply and the successes.
const FIXED: usize = 16;

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageError {
    /// They end before the message does.
    Short,
    /// AUTH_TYPE and AUTH_ID name no message.
    Unknown {
        /// AUTH_TYPE.
        auth_type: u8,
        /// AUTH_ID.
        auth_id: u8,
    },
    /// A field has a value that no honest peer sends.
    Payload(&'static str),
}

impl core::fmt::Display for MessageError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Short => f.write_str("the authentication message is too short"),
            Self::Unknown { auth_type, auth_id } => {
                write!(f, "no authentication message has type {auth_type:02X}h and identifier {auth_id:02X}h")
            }
            Self::Payload(field) => write!(f, "the authentication message has an invalid {field}"),
        }
    }
}

impl core::error::Error for MessageError {}

/// AUTH_Negotiate: what the host can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiate<'a> {
    /// SC_C, Secure Channel Concatenation; 0 = none.
    pub sc_c: u8,
    /// Hash identifiers, the host's favourite first; empty when DH-HMAC-CHAP is not offered.
    pub hashes: &'a [u8],
    /// DH group identifiers, the host's favourite first.
    pub groups: &'a [u8],
    /// DH-HMAC-CHAP is among the protocols offered.
    pub offers_dhchap: bool,
}

/// DH-HMAC-CHAP_Challenge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Challenge<'a> {
    /// HashID.
    pub hash_id: u8,
    /// DHgID.
    pub group_id: u8,
    /// S1, the sequence number.
    pub seqnum: u32,
    /// C1; its length is HL.
    pub challenge: &'a [u8],
    /// The controller's public value; empty for the null group.
    pub value: &'a [u8],
}

/// DH-HMAC-CHAP_Reply.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reply<'a> {
    /// S2, the sequence number; not 0 when the controller is to authenticate itself.
    pub seqnum: u32,
    /// R1, the host's response; its length is HL.
    pub response: &'a [u8],
    /// C2, the host's challenge, if CVALID.
    pub challenge: Option<&'a [u8]>,
    /// The host's public value; empty for the null group.
    pub value: &'a [u8],
}

impl core::fmt::Debug for Reply<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Reply").field("seqnum", &self.seqnum).finish_non_exhaustive()
    }
}

/// DH-HMAC-CHAP_Success1.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Success1<'a> {
    /// HL.
    pub hash_bytes: u8,
    /// R2, the controller's response, if RVALID.
    pub response: Option<&'a [u8]>,
}

impl core::fmt::Debug for Success1<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Success1").field("response", &self.response.is_some()).finish_non_exhaustive()
    }
}

/// AUTH_Failure1 and AUTH_Failure2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Why.
    pub reason: Reason,
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Host to controller, first.
    Negotiate(Negotiate<'a>),
    /// Controller to host.
    Challenge(Challenge<'a>),
    /// Host to controller.
    Reply(Reply<'a>),
    /// Controller to host: the host is who it says.
    Success1(Success1<'a>),
    /// Host to controller: the controller is who it says.
    Success2,
    /// Controller to host: it is over.
    Failure1(Failure),
    /// Host to controller: it is over.
    Failure2(Failure),
}

impl<'a> Message<'a> {
    /// Reads a message and its T_ID; bytes behind it are ignored (Authentication Receive returns as many as were asked for).
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &'a [u8]) -> Result<(u16, Self), MessageError> {
        let [auth_type, auth_id, _, _, t0, t1, ..] = *bytes else { return Err(MessageError::Short) };
        let message = match (auth_type, auth_id) {
            (COMMON, NEGOTIATE) => Self::Negotiate(parse_negotiate(bytes)?),
            (DHCHAP, CHALLENGE) => Self::Challenge(parse_challenge(bytes)?),
            (DHCHAP, REPLY) => Self::Reply(parse_reply(bytes)?),
            (DHCHAP, SUCCESS1) => Self::Success1(parse_success1(bytes)?),
            (DHCHAP, SUCCESS2) if bytes.len() >= FIXED => Self::Success2,
            (COMMON, FAILURE1) => Self::Failure1(parse_failure(bytes)?),
            (COMMON, FAILURE2) => Self::Failure2(parse_failure(bytes)?),
            (DHCHAP, SUCCESS2) => return Err(MessageError::Short),
            _ => return Err(MessageError::Unknown { auth_type, auth_id }),
        };
        Ok((u16::from_le_bytes([t0, t1]), message))
    }
}

fn fixed(bytes: &[u8]) -> Result<(&[u8; FIXED], &[u8]), MessageError> {
    bytes.split_first_chunk().ok_or(MessageError::Short)
}

fn piece<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8], MessageError> {
    let (piece, after) = rest.split_at_checked(len).ok_or(MessageError::Short)?;
    *rest = after;
    Ok(piece)
}

fn hash_bytes(hl: u8) -> Result<usize, MessageError> {
    let len = usize::from(hl);
    if Hash::ALL.iter().any(|hash| hash.bytes() == len) { Ok(len) } else { Err(MessageError::Payload("hash length")) }
}

fn parse_negotiate(bytes: &[u8]) -> Result<Negotiate<'_>, MessageError> {
    let (head, mut rest) = bytes.split_first_chunk::<8>().ok_or(MessageError::Short)?;
    let (sc_c, protocols) = (head[6], head[7]);
    let mut found = Negotiate { sc_c, hashes: &[], groups: &[], offers_dhchap: false };
    for _ in 0..protocols {
        let descriptor = piece(&mut rest, DESCRIPTOR)?;
        if descriptor[0] != PROTOCOL_DHCHAP || found.offers_dhchap {
            continue;
        }
        let (hashes, groups) = (usize::from(descriptor[2]), usize::from(descriptor[3]));
        if hashes > IDENTIFIERS || groups > IDENTIFIERS {
            return Err(MessageError::Payload("number of identifiers"));
        }
        found.hashes = &descriptor[FIRST_HASH..FIRST_HASH + hashes];
        found.groups = &descriptor[FIRST_GROUP..FIRST_GROUP + groups];
        found.offers_dhchap = true;
    }
    Ok(found)
}

fn parse_challenge(bytes: &[u8]) -> Result<Challenge<'_>, MessageError> {
    let (head, mut rest) = fixed(bytes)?;
    let challenge = piece(&mut rest, hash_bytes(head[6])?)?;
    let value = piece(&mut rest, usize::from(u16::from_le_bytes([head[10], head[11]])))?;
    let seqnum = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
    Ok(Challenge { hash_id: head[8], group_id: head[9], seqnum, challenge, value })
}

fn parse_reply(bytes: &[u8]) -> Result<Reply<'_>, MessageError> {
    let (head, mut rest) = fixed(bytes)?;
    let len = hash_bytes(head[6])?;
    let response = piece(&mut rest, len)?;
    // The challenge has its place even when it is not valid.
    let challenge = piece(&mut rest, len)?;
    let value = piece(&mut rest, usize::from(u16::from_le_bytes([head[10], head[11]])))?;
    let seqnum = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
    Ok(Reply { seqnum, response, challenge: (head[8] & 1 == 1).then_some(challenge), value })
}

fn parse_success1(bytes: &[u8]) -> Result<Success1<'_>, MessageError> {
    let (head, mut rest) = fixed(bytes)?;
    let len = hash_bytes(head[6])?;
    let response = if head[8] & 1 == 1 { Some(piece(&mut rest, len)?) } else { None };
    Ok(Success1 { hash_bytes: head[6], response })
}

fn parse_failure(bytes: &[u8]) -> Result<Failure, MessageError> {
    let [_, _, _, _, _, _, _, explanation, ..] = *bytes else { return Err(MessageError::Short) };
    Ok(Failure { reason: Reason(explanation) })
}

fn begin(auth_type: u8, auth_id: u8, t_id: u16) -> Vec<u8> {
    let [t0, t1] = t_id.to_le_bytes();
    alloc::vec![auth_type, auth_id, 0, 0, t0, t1]
}

pub(super) fn negotiate(t_id: u16, hashes: &[Hash], groups: &[DhGroup]) -> Vec<u8> {
    let mut bytes = begin(COMMON, NEGOTIATE, t_id);
    bytes.extend([0, 1]);
    let mut descriptor = [0; DESCRIPTOR];
    (descriptor[0], descriptor[2], descriptor[3]) = (PROTOCOL_DHCHAP, hashes.len() as u8, groups.len() as u8);
    for (place, hash) in descriptor[FIRST_HASH..FIRST_GROUP].iter_mut().zip(hashes) {
        *place = hash.id();
    }
    for (place, group) in descriptor[FIRST_GROUP..].iter_mut().zip(groups) {
        *place = group.id();
    }
    bytes.extend(descriptor);
    bytes
}

pub(super) fn challenge(t_id: u16, challenge: &Challenge<'_>) -> Vec<u8> {
    let mut bytes = begin(DHCHAP, CHALLENGE, t_id);
    bytes.extend([challenge.challenge.len() as u8, 0, challenge.hash_id, challenge.group_id]);
    bytes.extend((challenge.value.len() as u16).to_le_bytes());
    bytes.extend(challenge.seqnum.to_le_bytes());
    bytes.extend_from_slice(challenge.challenge);
    bytes.extend_from_slice(challenge.value);
    bytes
}

pub(super) fn reply(t_id: u16, reply: &Reply<'_>) -> Vec<u8> {
    let mut bytes = begin(DHCHAP, REPLY, t_id);
    bytes.extend([reply.response.len() as u8, 0, u8::from(reply.challenge.is_some()), 0]);
    bytes.extend((reply.value.len() as u16).to_le_bytes());
    bytes.extend(reply.seqnum.to_le_bytes());
    bytes.extend_from_slice(reply.response);
    match reply.challenge {
        Some(challenge) => bytes.extend_from_slice(challenge),
        None => bytes.resize(bytes.len() + reply.response.len(), 0),
    }
    bytes.extend_from_slice(reply.value);
    bytes
}

pub(super) fn success1(t_id: u16, success: &Success1<'_>) -> Vec<u8> {
    let mut bytes = begin(DHCHAP, SUCCESS1, t_id);
    bytes.extend([success.hash_bytes, 0, u8::from(success.response.is_some())]);
    bytes.resize(FIXED, 0);
    bytes.extend_from_slice(success.response.unwrap_or(&[]));
    bytes
}

pub(super) fn success2(t_id: u16) -> Vec<u8> {
    let mut bytes = begin(DHCHAP, SUCCESS2, t_id);
    bytes.resize(FIXED, 0);
    bytes
}

/// Reason code 1, "authentication failure", is the only one that there is.
pub(super) fn failure(t_id: u16, from_controller: bool, reason: Reason) -> Vec<u8> {
    let mut bytes = begin(COMMON, if from_controller { FAILURE1 } else { FAILURE2 }, t_id);
    bytes.extend([1, reason.0]);
    bytes
}
