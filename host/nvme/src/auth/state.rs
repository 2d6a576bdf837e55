//! The two state machines.

use super::Reason;
use super::dh::{DhGroup, EXPONENT_BYTES};
use super::message::{self, Challenge, Message, MessageError, Reply, Success1};
use super::secret::{Hash, MAX_HASH_BYTES, ResponseInput, Secret};
use alloc::string::String;
use alloc::vec::Vec;

/// The randomness of one transaction; never use one twice.
#[derive(Clone)]
pub struct Entropy {
    exponent: [u8; EXPONENT_BYTES],
    challenge: [u8; MAX_HASH_BYTES],
    seqnum: u32,
}

impl core::fmt::Debug for Entropy {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Entropy(redacted)")
    }
}

impl Entropy {
    /// Draws it from a cryptographically secure source.
    #[must_use]
    pub fn draw(fill: &mut dyn FnMut(&mut [u8])) -> Self {
        let (mut exponent, mut challenge, mut seqnum) = ([0; EXPONENT_BYTES], [0; MAX_HASH_BYTES], [0; 4]);
        fill(&mut exponent);
        fill(&mut challenge);
        fill(&mut seqnum);
        // 0 says that there is no bidirectional authentication (Base 2.3 §8.3.5.5.4).
        Self { exponent, challenge, seqnum: u32::from_le_bytes(seqnum).max(1) }
    }
}

/// How an authentication failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthFailure {
    /// The peer says so.
    Peer(Reason),
    /// The peer is not who it should be, or sent what it must not.
    Own(Reason),
}

impl core::fmt::Display for AuthFailure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Peer(reason) => write!(f, "the peer refused the authentication: {reason}"),
            Self::Own(reason) => write!(f, "the peer's authentication was refused: {reason}"),
        }
    }
}

impl core::error::Error for AuthFailure {}

/// What a host authenticates with.
#[derive(Clone, Debug)]
pub struct HostAuthConfig {
    /// NQN of the host.
    pub host_nqn: String,
    /// NQN of the subsystem.
    pub subsystem_nqn: String,
    /// The host's secret.
    pub secret: Secret,
    /// The controller's secret; with one, the controller must prove that it has it.
    pub controller_secret: Option<Secret>,
    /// Hashes offered, the favourite first; empty offers all.
    pub hashes: Vec<Hash>,
    /// DH groups offered, the favourite first; empty offers all.
    pub groups: Vec<DhGroup>,
}

/// What the host does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostStep {
    /// Send this, then receive and call [`HostAuth::take`] again.
    Send(Vec<u8>),
    /// Both ends are authenticated; send this to let the controller know.
    Finish(Vec<u8>),
    /// The host is authenticated and nothing more is sent.
    Done,
    /// It failed. If there is a message, send it, then disconnect.
    Failed(AuthFailure, Option<Vec<u8>>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostStage {
    Challenge,
    Success1,
    Over,
}

/// The host's end of one transaction (Base 2.3 §8.3.5.5).
#[derive(Debug)]
pub struct HostAuth {
    config: HostAuthConfig,
    t_id: u16,
    entropy: Entropy,
    stage: HostStage,
    hash: Hash,
    group: DhGroup,
    shared: Redacted,
}

/// Bytes that are in no `Debug`.
#[derive(Default)]
struct Redacted(Vec<u8>);

impl core::fmt::Debug for Redacted {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("redacted")
    }
}

impl HostAuth {
    /// Begins transaction `t_id`: the state, and the message to send first.
    #[must_use]
    pub fn start(mut config: HostAuthConfig, t_id: u16, entropy: Entropy) -> (Self, Vec<u8>) {
        if config.hashes.is_empty() {
            config.hashes = Hash::ALL.to_vec();
        }
        if config.groups.is_empty() {
            config.groups = DhGroup::ALL.to_vec();
        }
        config.hashes.dedup();
        config.groups.dedup();
        config.hashes.truncate(Hash::ALL.len());
        config.groups.truncate(DhGroup::ALL.len());
        let first = message::negotiate(t_id, &config.hashes, &config.groups);
        let (stage, hash, group) = (HostStage::Challenge, Hash::Sha256, DhGroup::Null);
        (Self { config, t_id, entropy, stage, hash, group, shared: Redacted::default() }, first)
    }

    /// Takes what Authentication Receive returned.
    pub fn take(&mut self, bytes: &[u8]) -> HostStep {
        let stage = core::mem::replace(&mut self.stage, HostStage::Over);
        let (t_id, message) = match Message::parse(bytes) {
            Ok(parsed) => parsed,
            Err(MessageError::Unknown { .. }) => return self.refuse(Reason::INCORRECT_MESSAGE),
            Err(_) => return self.refuse(Reason::INCORRECT_PAYLOAD),
        };
        match (stage, message) {
            // The controller may not have understood the T_ID that it answers.
            (HostStage::Challenge | HostStage::Success1, Message::Failure1(failure)) => {
                HostStep::Failed(AuthFailure::Peer(failure.reason), None)
            }
            (HostStage::Over, _) => self.refuse(Reason::INCORRECT_MESSAGE),
            _ if t_id != self.t_id => self.refuse(Reason::INCORRECT_MESSAGE),
            (HostStage::Challenge, Message::Challenge(challenge)) => self.answer(&challenge),
            (HostStage::Success1, Message::Success1(success)) => self.conclude(&success),
            _ => self.refuse(Reason::INCORRECT_MESSAGE),
        }
    }

    fn refuse(&self, reason: Reason) -> HostStep {
        HostStep::Failed(AuthFailure::Own(reason), Some(message::failure(self.t_id, false, reason)))
    }

    fn answer(&mut self, challenge: &Challenge<'_>) -> HostStep {
        let offered_hash = Hash::from_id(challenge.hash_id).filter(|hash| self.config.hashes.contains(hash));
        let Some(hash) = offered_hash.filter(|hash| hash.bytes() == challenge.challenge.len()) else {
            return self.refuse(Reason::HASH_NOT_USABLE);
        };
        let offered_group = DhGroup::from_id(challenge.group_id).filter(|group| self.config.groups.contains(group));
        let Some(group) = offered_group else { return self.refuse(Reason::DH_GROUP_NOT_USABLE) };
        if challenge.value.len() != group.value_bytes() {
            return self.refuse(Reason::INCORRECT_PAYLOAD);
        }
        let value = group.public_value(&self.entropy.exponent);
        if group != DhGroup::Null {
            let shared = group.shared_secret(&self.entropy.exponent, challenge.value);
            let Some(shared) = shared.filter(|_| challenge.value != value) else {
                return self.refuse(Reason::INCORRECT_PAYLOAD);
            };
            self.shared = Redacted(shared);
        }
        (self.hash, self.group) = (hash, group);
        let response = ResponseInput {
            hash,
            group,
            shared: &self.shared.0,
            challenge: challenge.challenge,
            seqnum: challenge.seqnum,
            t_id: self.t_id,
            role: "HostHost",
            own_nqn: &self.config.host_nqn,
            peer_nqn: &self.config.subsystem_nqn,
        }
        .response(&self.config.secret);
        let both = self.config.controller_secret.is_some();
        let (seqnum, own) = if both { (self.entropy.seqnum, Some(self.own_challenge())) } else { (0, None) };
        let reply = Reply { seqnum, response: &response, challenge: own, value: &value };
        let bytes = message::reply(self.t_id, &reply);
        self.stage = HostStage::Success1;
        HostStep::Send(bytes)
    }

    fn own_challenge(&self) -> &[u8] {
        &self.entropy.challenge[..self.hash.bytes()]
    }

    fn conclude(&mut self, success: &Success1<'_>) -> HostStep {
        let Some(secret) = &self.config.controller_secret else { return HostStep::Done };
        let expected = ResponseInput {
            hash: self.hash,
            group: self.group,
            shared: &self.shared.0,
            challenge: self.own_challenge(),
            seqnum: self.entropy.seqnum,
            t_id: self.t_id,
            role: "Controller",
            own_nqn: &self.config.subsystem_nqn,
            peer_nqn: &self.config.host_nqn,
        };
        // A controller that does not answer the challenge has not authenticated itself.
        match success.response {
            Some(given) if expected.verify(secret, given) => HostStep::Finish(message::success2(self.t_id)),
            _ => self.refuse(Reason::FAILED),
        }
    }
}

/// What a controller authenticates a host with.
#[derive(Clone, Debug)]
pub struct ControllerAuthConfig {
    /// NQN of the host.
    pub host_nqn: String,
    /// NQN of the subsystem.
    pub subsystem_nqn: String,
    /// The host's secret.
    pub secret: Secret,
    /// The controller's secret, for hosts that want the controller to authenticate itself; without one that is refused.
    pub controller_secret: Option<Secret>,
    /// Hashes accepted, the favourite first; empty accepts all.
    pub hashes: Vec<Hash>,
    /// DH groups accepted, the favourite first; empty accepts all. To insist on an exchange leave [`DhGroup::Null`] out.
    pub groups: Vec<DhGroup>,
}

/// Why there is no message for an Authentication Receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveError {
    /// The host has to send first: Command Sequence Error.
    OutOfSequence,
    /// The message is longer than the host asked for: Invalid Field.
    TooLong {
        /// Bytes of the message.
        needed: usize,
    },
}

impl core::fmt::Display for GiveError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::OutOfSequence => f.write_str("the host has to send an authentication message first"),
            Self::TooLong { needed } => write!(f, "the authentication message takes {needed} bytes"),
        }
    }
}

impl core::error::Error for GiveError {}

#[derive(Debug, PartialEq, Eq)]
enum ControllerStage {
    AwaitNegotiate,
    GiveChallenge,
    AwaitReply,
    /// With R2 if the host challenged the controller.
    GiveSuccess1(Option<Vec<u8>>),
    AwaitSuccess2,
    Authenticated,
    GiveFailure1(Reason),
    Failed(AuthFailure),
}

/// The controller's end of one transaction (Base 2.3 §8.3.5.5). A host that authenticates anew gets a new one.
pub struct ControllerAuth {
    config: ControllerAuthConfig,
    entropy: Entropy,
    stage: ControllerStage,
    t_id: u16,
    hash: Hash,
    group: DhGroup,
    value: Vec<u8>,
}

impl core::fmt::Debug for ControllerAuth {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ControllerAuth").field("t_id", &self.t_id).field("hash", &self.hash).finish_non_exhaustive()
    }
}

impl ControllerAuth {
    /// Waits for a host's AUTH_Negotiate.
    #[must_use]
    pub fn new(mut config: ControllerAuthConfig, entropy: Entropy) -> Self {
        if config.hashes.is_empty() {
            config.hashes = Hash::ALL.to_vec();
        }
        if config.groups.is_empty() {
            config.groups = DhGroup::ALL.to_vec();
        }
        let (stage, hash, group) = (ControllerStage::AwaitNegotiate, Hash::Sha256, DhGroup::Null);
        Self { config, entropy, stage, t_id: 0, hash, group, value: Vec::new() }
    }

    /// Whether the host is who it says (and, if it asked, has accepted the controller).
    #[must_use]
    pub fn is_authenticated(&self) -> bool {
        self.stage == ControllerStage::Authenticated
    }

    /// How it failed, once the host has been told or has said so: the connection ends now.
    #[must_use]
    pub fn failure(&self) -> Option<AuthFailure> {
        match self.stage {
            ControllerStage::Failed(failure) => Some(failure),
            _ => None,
        }
    }

    /// Takes the data of an Authentication Send. The command itself succeeds: what is wrong with the message is told by the
    /// next [`Self::give`].
    pub fn take(&mut self, bytes: &[u8]) {
        if matches!(self.stage, ControllerStage::Failed(_)) {
            return;
        }
        // Whoever fails here has no way back to success.
        let stage = core::mem::replace(&mut self.stage, ControllerStage::GiveFailure1(Reason::INCORRECT_MESSAGE));
        let next = match Message::parse(bytes) {
            Err(MessageError::Unknown { .. }) => Err(Reason::INCORRECT_MESSAGE),
            Err(_) => Err(Reason::INCORRECT_PAYLOAD),
            Ok((t_id, message)) => self.next(&stage, t_id, &message),
        };
        self.stage = next.unwrap_or_else(ControllerStage::GiveFailure1);
    }

    fn next(&mut self, stage: &ControllerStage, t_id: u16, message: &Message<'_>) -> Result<ControllerStage, Reason> {
        match (stage, message) {
            (ControllerStage::AwaitNegotiate, Message::Negotiate(offer)) => {
                self.t_id = t_id;
                self.negotiate(offer)
            }
            (ControllerStage::AwaitNegotiate, _) => Err(Reason::INCORRECT_MESSAGE),
            _ if t_id != self.t_id => Err(Reason::INCORRECT_PAYLOAD),
            (ControllerStage::AwaitReply, Message::Reply(reply)) => self.check(reply),
            (ControllerStage::AwaitSuccess2, Message::Success2) => Ok(ControllerStage::Authenticated),
            // Linux sends one instead of whatever comes next.
            (_, Message::Failure2(failure)) => Ok(ControllerStage::Failed(AuthFailure::Peer(failure.reason))),
            _ => Err(Reason::INCORRECT_MESSAGE),
        }
    }

    fn negotiate(&mut self, offer: &message::Negotiate<'_>) -> Result<ControllerStage, Reason> {
        if offer.sc_c != 0 {
            return Err(Reason::CONCATENATION_MISMATCH);
        }
        if !offer.offers_dhchap {
            return Err(Reason::PROTOCOL_NOT_USABLE);
        }
        let mut hashes = self.config.hashes.iter().copied();
        self.hash = hashes.find(|hash| offer.hashes.contains(&hash.id())).ok_or(Reason::HASH_NOT_USABLE)?;
        let mut groups = self.config.groups.iter().copied();
        self.group = groups.find(|group| offer.groups.contains(&group.id())).ok_or(Reason::DH_GROUP_NOT_USABLE)?;
        Ok(ControllerStage::GiveChallenge)
    }

    fn check(&self, reply: &Reply<'_>) -> Result<ControllerStage, Reason> {
        if reply.response.len() != self.hash.bytes() || reply.value.len() != self.group.value_bytes() {
            return Err(Reason::INCORRECT_PAYLOAD);
        }
        let shared = match self.group {
            DhGroup::Null => Vec::new(),
            _ if reply.value == self.value => return Err(Reason::INCORRECT_PAYLOAD),
            group => group.shared_secret(&self.entropy.exponent, reply.value).ok_or(Reason::INCORRECT_PAYLOAD)?,
        };
        let expected = ResponseInput {
            hash: self.hash,
            group: self.group,
            shared: &shared,
            challenge: self.own_challenge(),
            seqnum: self.entropy.seqnum,
            t_id: self.t_id,
            role: "HostHost",
            own_nqn: &self.config.host_nqn,
            peer_nqn: &self.config.subsystem_nqn,
        };
        if !expected.verify(&self.config.secret, reply.response) {
            return Err(Reason::FAILED);
        }
        // A challenge with S2 = 0 is for a pre-shared key alone, which is not made here.
        let Some(challenge) = reply.challenge.filter(|_| reply.seqnum != 0) else {
            return Ok(ControllerStage::GiveSuccess1(None));
        };
        let secret = self.config.controller_secret.as_ref().ok_or(Reason::FAILED)?;
        let own = ResponseInput {
            challenge,
            seqnum: reply.seqnum,
            role: "Controller",
            own_nqn: &self.config.subsystem_nqn,
            peer_nqn: &self.config.host_nqn,
            ..expected
        };
        Ok(ControllerStage::GiveSuccess1(Some(own.response(secret))))
    }

    fn own_challenge(&self) -> &[u8] {
        &self.entropy.challenge[..self.hash.bytes()]
    }

    /// The message for an Authentication Receive of `capacity` bytes; the rest of the data is zeroes.
    ///
    /// # Errors
    /// [`GiveError`]; the state has not changed then.
    pub fn give(&mut self, capacity: usize) -> Result<Vec<u8>, GiveError> {
        let (message, next) = match &self.stage {
            ControllerStage::GiveChallenge => {
                if self.value.is_empty() {
                    self.value = self.group.public_value(&self.entropy.exponent);
                }
                let challenge = Challenge {
                    hash_id: self.hash.id(),
                    group_id: self.group.id(),
                    seqnum: self.entropy.seqnum,
                    challenge: self.own_challenge(),
                    value: &self.value,
                };
                (message::challenge(self.t_id, &challenge), ControllerStage::AwaitReply)
            }
            ControllerStage::GiveSuccess1(response) => {
                let success = Success1 { hash_bytes: self.hash.bytes() as u8, response: response.as_deref() };
                let next =
                    if response.is_some() { ControllerStage::AwaitSuccess2 } else { ControllerStage::Authenticated };
                (message::success1(self.t_id, &success), next)
            }
            ControllerStage::GiveFailure1(reason) => {
                (message::failure(self.t_id, true, *reason), ControllerStage::Failed(AuthFailure::Own(*reason)))
            }
            _ => return Err(GiveError::OutOfSequence),
        };
        if message.len() > capacity {
            return Err(GiveError::TooLong { needed: message.len() });
        }
        self.stage = next;
        Ok(message)
    }
}
