//! The step between Connect and everything else, for hosts that have a secret: DH-HMAC-CHAP by Authentication Send and Receive
//! (Base 2.3 §8.3.5.5). Every queue of an association authenticates by itself.

use super::connection::Connection;
use super::counters::Counters;
use dray_device::poll::Time;
use dray_device::random::SecureRandom;
use dray_nvme::auth::{ControllerAuth, ControllerAuthConfig, Entropy, GiveError};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::AuthenticationCommand;

/// Most bytes of an authentication message.
const MAX_MESSAGE: u32 = 8192;

/// Where a connection stands.
pub(super) enum Authentication {
    /// The host needs none.
    NotNeeded,
    /// It has to come, or is under way: nothing else is served.
    Required(Box<ControllerAuthConfig>, Box<ControllerAuth>),
    /// Done; the host may do it again.
    Passed(Box<ControllerAuthConfig>, Box<ControllerAuth>),
}

fn draw(random: &mut dyn SecureRandom) -> Entropy {
    Entropy::draw(&mut |bytes| random.fill(bytes))
}

impl Authentication {
    pub(super) fn required(config: ControllerAuthConfig, random: &mut dyn SecureRandom) -> Self {
        let auth = ControllerAuth::new(config.clone(), draw(random));
        Self::Required(Box::new(config), Box::new(auth))
    }

    /// Whether commands other than authentication are served.
    pub(super) fn is_open(&self) -> bool {
        !matches!(self, Self::Required(..))
    }

    fn machine(&mut self) -> Option<&mut ControllerAuth> {
        match self {
            Self::NotNeeded => None,
            Self::Required(_, auth) | Self::Passed(_, auth) => Some(auth),
        }
    }
}

fn checked(entry: &SubmissionEntry) -> Result<u32, Status> {
    let command: AuthenticationCommand = entry.read_as().ok_or(Status::INVALID_FIELD)?;
    let known = command.secp == AuthenticationCommand::SECP_NVME && command.spsp0 == 1 && command.spsp1 == 1;
    let fits = (1..=MAX_MESSAGE).contains(&command.length);
    if known && fits { Ok(command.length) } else { Err(Status::INVALID_FIELD.with_dnr()) }
}

impl Connection {
    /// Authentication Send with its data.
    pub(super) fn authentication_send(
        &mut self,
        entry: &SubmissionEntry,
        data: &[u8],
        random: &mut dyn SecureRandom,
        counters: &mut Counters,
        now: Time,
    ) {
        let cid = entry.cdw0.cid();
        let message = match checked(entry).map(|len| data.get(..len as usize)) {
            Ok(Some(message)) => message,
            Ok(None) => return self.respond_status(cid, Status::SGL_DATA_LENGTH_INVALID.with_dnr()),
            Err(status) => return self.respond_status(cid, status),
        };
        if let Authentication::Passed(config, auth) = &mut self.authentication
            && auth.is_authenticated()
        {
            // Another round begins; the connection stays open until it fails.
            **auth = ControllerAuth::new((**config).clone(), draw(random));
        }
        let Some(auth) = self.authentication.machine() else {
            return self.respond_status(cid, Status::COMMAND_SEQUENCE.with_dnr());
        };
        auth.take(message);
        self.step = now;
        self.respond_status(cid, Status::SUCCESS);
        self.authentication_progress(counters);
    }

    /// Authentication Receive.
    pub(super) fn authentication_receive(&mut self, entry: &SubmissionEntry, counters: &mut Counters, now: Time) {
        let cid = entry.cdw0.cid();
        let len = match checked(entry) {
            Ok(len) if entry.sgl().is_transport() && entry.sgl().length >= len => len,
            Ok(_) => return self.respond_status(cid, Status::SGL_DATA_LENGTH_INVALID.with_dnr()),
            Err(status) => return self.respond_status(cid, status),
        };
        let Some(auth) = self.authentication.machine() else {
            return self.respond_status(cid, Status::COMMAND_SEQUENCE.with_dnr());
        };
        match auth.give(len as usize) {
            Ok(mut message) => {
                self.step = now;
                message.resize(len as usize, 0);
                self.respond_data(cid, &message, 0);
                self.authentication_progress(counters);
            }
            Err(GiveError::OutOfSequence) => self.respond_status(cid, Status::COMMAND_SEQUENCE.with_dnr()),
            Err(GiveError::TooLong { .. }) => self.respond_status(cid, Status::INVALID_FIELD.with_dnr()),
        }
    }

    fn authentication_progress(&mut self, counters: &mut Counters) {
        let Some(auth) = self.authentication.machine() else { return };
        if let Some(failure) = auth.failure() {
            tracing::info!(connection = self.id, %failure, "authentication failed");
            counters.authentication_failures += 1;
            self.finish();
        } else if auth.is_authenticated()
            && let Authentication::Required(config, auth) =
                std::mem::replace(&mut self.authentication, Authentication::NotNeeded)
        {
            self.authentication = Authentication::Passed(config, auth);
            self.inbox.enlarge();
        }
    }
}
