//! What makes a connection a queue: Connect, then authentication (Base 2.3 §6.3, §8.3.5.5).

use super::TcpConfig;
use super::connection::Connection;
use super::error::TcpError;
use dray_device::command::Completion;
use dray_device::memory::{DmaBuffer, PAGE, Pages};
use dray_device::poll::Time;
use dray_device::random::SecureRandom;
use dray_nvme::auth::{AuthFailure, Entropy, HostAuth, HostAuthConfig, HostStep, MAX_MESSAGE_BYTES};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::tcp::ConnectData;
use dray_nvme::tcp::fabrics::{ConnectAttributes, ConnectResponse};
use zerocopy::IntoBytes;

/// Tag of the commands of a handshake.
const TAG: u64 = u64::MAX;
/// Where what comes lies in the memory; what goes is before it.
const INBOUND: usize = PAGE;

/// What follows an Authentication Send.
#[derive(Clone, Copy, Debug)]
enum Then {
    Receive,
    Ready,
    Fail(AuthFailure),
}

#[derive(Debug)]
enum Stage {
    Connect,
    Sending(Then),
    Receiving,
    Over,
}

/// The handshake of one connection.
#[derive(Debug)]
pub(super) struct Handshake {
    qid: u16,
    stage: Stage,
    memory: DmaBuffer,
    deadline: Time,
    auth: Option<HostAuth>,
    wanted: Option<HostAuthConfig>,
    entropy: Option<Entropy>,
    t_id: u16,
    cntlid: u16,
}

impl Handshake {
    /// Submits Connect for queue `qid` with `entries` entries on a new connection.
    pub(super) fn begin(
        now: Time,
        connection: &mut Connection,
        config: &TcpConfig,
        qid: u16,
        entries: u32,
        cntlid: u16,
        random: &mut dyn SecureRandom,
    ) -> Result<Self, TcpError> {
        let memory = DmaBuffer::allocate("dray-connect", INBOUND + MAX_MESSAGE_BYTES, Pages::Small)?;
        let mut data = ConnectData { hostid: config.host_id, cntlid, ..ConnectData::default() };
        dray_nvme::tcp::write_text(&mut data.subnqn, &config.subsystem_nqn);
        dray_nvme::tcp::write_text(&mut data.hostnqn, &config.host_nqn);
        memory.arena().write(memory.offset(), data.as_bytes());
        let kato = if qid == 0 { config.kato_ms } else { 0 };
        // Nobody looks at SQHD here: there are never more commands than entries. Without it a read's last data may be its
        // completion (TCP 1.1 §3.6.2.9). A controller that cannot do without goes on as if it had not been asked.
        let attributes = ConnectAttributes::new().with_no_sq_flow_control(true);
        let entry = SubmissionEntry::connect(qid, entries, attributes, kato);
        let deadline = now.after_ms(u64::from(config.connect_timeout_ms.max(1)));
        let wanted = config.secret.as_ref().map(|secret| HostAuthConfig {
            host_nqn: config.host_nqn.clone(),
            subsystem_nqn: config.subsystem_nqn.clone(),
            secret: secret.clone(),
            controller_secret: config.controller_secret.clone(),
            hashes: config.hashes.clone(),
            groups: if config.groups.is_empty() { super::DEFAULT_GROUPS.to_vec() } else { config.groups.clone() },
        });
        let mut t_id = [0; 2];
        random.fill(&mut t_id);
        let entropy = wanted.as_ref().map(|_| Entropy::draw(&mut |into| random.fill(into)));
        let t_id = u16::from_le_bytes(t_id);
        let this =
            Self { qid, stage: Stage::Connect, memory, deadline, auth: None, wanted, entropy, t_id, cntlid };
        this.submit(now, connection, &entry, 0, size_of::<ConnectData>())?;
        Ok(this)
    }

    /// The controller that the target chose.
    pub(super) fn cntlid(&self) -> u16 {
        self.cntlid
    }

    fn submit(
        &self,
        now: Time,
        connection: &mut Connection,
        entry: &SubmissionEntry,
        at: usize,
        len: usize,
    ) -> Result<(), TcpError> {
        let data = self.memory.part(at, len).ok_or(TcpError::BadConfig("authentication message too long"))?;
        // The deadline of the whole is looked at by every poll.
        let submitted = connection.submit(now, Some(Time::NEVER), entry, &[data], TAG, false);
        connection.commit();
        submitted.map_err(|_| match connection.fault() {
            Some(fault) => TcpError::Connection { qid: self.qid, fault },
            None => TcpError::BadConfig("a command of the connection's set-up is not possible"),
        })
    }

    /// Goes on; true once the queue is ready for commands.
    pub(super) fn poll(&mut self, now: Time, connection: &mut Connection) -> Result<bool, TcpError> {
        let mut ended: Option<Completion> = None;
        connection.poll(now, &mut |completion| ended = Some(completion));
        if let Some(fault) = connection.fault() {
            return Err(TcpError::Connection { qid: self.qid, fault });
        }
        if now >= self.deadline {
            return Err(TcpError::TimedOut("the connection"));
        }
        let Some(completion) = ended.filter(|completion| completion.tag == TAG) else {
            return Ok(matches!(self.stage, Stage::Over));
        };
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Connect => self.connected(now, connection, &accepted(completion, "Connect")?),
            Stage::Sending(then) => {
                accepted(completion, "Authentication Send")?;
                self.sent(now, connection, then)
            }
            Stage::Receiving => {
                accepted(completion, "Authentication Receive")?;
                self.received(now, connection)
            }
            Stage::Over => Ok(true),
        }
    }

    fn connected(&mut self, now: Time, connection: &mut Connection, ended: &Completion) -> Result<bool, TcpError> {
        let response = ConnectResponse::from_bits(ended.result as u32);
        if self.qid > 0 && response.cntlid() != self.cntlid {
            return Err(TcpError::Unsupported("an I/O queue was connected to another controller"));
        }
        self.cntlid = response.cntlid();
        if response.secure_channel_required() {
            return Err(TcpError::SecureChannelNeeded);
        }
        let Some(wanted) = self.wanted.take() else {
            return if response.authentication_required() { Err(TcpError::SecretNeeded) } else { Ok(true) };
        };
        if !response.authentication_required() {
            return if wanted.controller_secret.is_some() { Err(TcpError::NotAuthenticated) } else { Ok(true) };
        }
        let Some(entropy) = self.entropy.take() else { return Err(TcpError::SecretNeeded) };
        let (auth, first) = HostAuth::start(wanted, self.t_id, entropy);
        self.auth = Some(auth);
        self.send(now, connection, &first, Then::Receive)
    }

    fn send(&mut self, now: Time, connection: &mut Connection, bytes: &[u8], then: Then) -> Result<bool, TcpError> {
        let at = self.memory.part(0, bytes.len()).filter(|_| bytes.len() <= INBOUND);
        at.ok_or(TcpError::BadConfig("authentication message too long"))?.write(bytes);
        let entry = SubmissionEntry::authentication(true, bytes.len() as u32);
        self.submit(now, connection, &entry, 0, bytes.len())?;
        self.stage = Stage::Sending(then);
        Ok(false)
    }

    fn sent(&mut self, now: Time, connection: &mut Connection, then: Then) -> Result<bool, TcpError> {
        match then {
            Then::Ready => {
                self.auth = None;
                Ok(true)
            }
            Then::Fail(failure) => Err(TcpError::Authentication(failure)),
            Then::Receive => {
                // What the target leaves out must not be what came before.
                self.memory.arena().fill(self.memory.offset() + INBOUND, MAX_MESSAGE_BYTES, 0);
                let entry = SubmissionEntry::authentication(false, MAX_MESSAGE_BYTES as u32);
                self.submit(now, connection, &entry, INBOUND, MAX_MESSAGE_BYTES)?;
                self.stage = Stage::Receiving;
                Ok(false)
            }
        }
    }

    fn received(&mut self, now: Time, connection: &mut Connection) -> Result<bool, TcpError> {
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        self.memory.arena().read(self.memory.offset() + INBOUND, &mut bytes);
        let Some(auth) = &mut self.auth else { return Err(TcpError::SecretNeeded) };
        match auth.take(&bytes) {
            HostStep::Send(message) => self.send(now, connection, &message, Then::Receive),
            HostStep::Finish(message) => self.send(now, connection, &message, Then::Ready),
            HostStep::Done => {
                self.auth = None;
                Ok(true)
            }
            HostStep::Failed(failure, Some(message)) => self.send(now, connection, &message, Then::Fail(failure)),
            HostStep::Failed(failure, None) => Err(TcpError::Authentication(failure)),
        }
    }
}

fn accepted(completion: Completion, command: &'static str) -> Result<Completion, TcpError> {
    if completion.status.is_error() {
        return Err(TcpError::Refused { command, status: completion.status });
    }
    Ok(completion)
}
