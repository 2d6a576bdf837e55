//! Fabrics commands: Connect, properties, Disconnect (Base 2.3 §6).

use super::association::{Env, Host, Place, State};
use super::authentication::Authentication;
use super::config::DigestPolicy;
use super::connection::{Claim, Connection, Link};
use super::discovery::{self, DiscoveryController};
use super::target::Core;
use dray_device::poll::Time;
use dray_nvme::auth::ControllerAuthConfig;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::registers::{Cc, offset};
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::{
    CNTLID_DYNAMIC, ConnectCommand, ConnectResponse, DisconnectCommand, FabricsType, PropertyCommand, invalid_parameter,
    status,
};
use dray_nvme::tcp::{ConnectData, DISCOVERY_NQN, nqn};
use zerocopy::FromBytes;

/// Why Connect is refused: the status, and DW0.
struct Refusal(Status, u32);

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self(status, 0)
    }
}

fn wrong_data(at: u16) -> Refusal {
    Refusal(status::INVALID_PARAMETERS.with_dnr(), invalid_parameter(true, at))
}

fn wrong_command(at: u16) -> Refusal {
    Refusal(status::INVALID_PARAMETERS.with_dnr(), invalid_parameter(false, at))
}

/// Offsets of Connect's parameters.
mod at {
    pub(super) const HOSTID: u16 = 0;
    pub(super) const CNTLID: u16 = 16;
    pub(super) const SUBNQN: u16 = 256;
    pub(super) const HOSTNQN: u16 = 512;
    pub(super) const QID: u16 = 42;
    pub(super) const SQSIZE: u16 = 44;
}

impl Connection {
    /// Connect has succeeded, or the I/O queue that was promised is there.
    pub(super) fn connect_succeeded(&mut self) {
        self.settling = false;
        let Some(cid) = self.connecting.take() else { return };
        self.connected = true;
        if self.authentication.is_open() {
            self.inbox.enlarge();
        }
        let response = ConnectResponse::new().with_authentication_required(!self.authentication.is_open());
        self.respond(cid, Status::SUCCESS, (response.into_bits() | u32::from(self.cntlid)).into());
    }

    /// Connect of an I/O queue has failed; one that was promised ends its connection.
    pub(super) fn connect_failed(&mut self) {
        self.link = Link::None;
        if std::mem::take(&mut self.settling) {
            self.finish();
        }
        if let Some(cid) = self.connecting.take() {
            self.respond_status(cid, Status::NOT_ENOUGH_RESOURCES);
        }
    }
}

impl Connection {
    /// Begins the association that was claimed.
    fn take_controller(&mut self, place: &mut Place, claim: Claim, env: &mut Env<'_>) -> Result<(), Status> {
        let Claim { subsystem, place: at, entries, host, kato_ms, .. } = claim;
        place.begin(self.id, host, kato_ms, env)?;
        self.link = Link::Queue { subsystem, place: at, qid: 0 };
        if let Some(front) = &place.front {
            self.out.attach(front.memory().clone(), usize::from(entries), front.pool_pages());
        }
        Ok(())
    }

    /// Begins to make the I/O queue that was claimed.
    fn take_queue(&mut self, place: &mut Place, claim: &Claim) -> Result<(), Status> {
        place.add_queue(self.id, claim.qid, claim.entries)?;
        self.link = Link::Queue { subsystem: claim.subsystem, place: claim.place, qid: claim.qid };
        if let Some(front) = &place.front {
            self.out.attach(front.memory().clone(), usize::from(claim.entries), front.pool_pages());
        }
        place.ring();
        Ok(())
    }
}

impl Core {
    /// A fabrics command, whole.
    pub(super) fn fabrics(&mut self, connection: &mut Connection, entry: &SubmissionEntry, data: &[u8], now: Time) {
        let cid = entry.cdw0.cid();
        let kind = entry.fabrics_type();
        if kind != FabricsType::CONNECT && !connection.connected {
            return connection.respond_status(cid, Status::COMMAND_SEQUENCE.with_dnr());
        }
        match kind {
            FabricsType::CONNECT => self.connect(connection, entry, data, now),
            FabricsType::AUTHENTICATION_SEND => {
                connection.authentication_send(entry, data, &mut *self.random, &mut self.counters, now);
                self.honour(connection, now);
            }
            FabricsType::AUTHENTICATION_RECEIVE => {
                connection.authentication_receive(entry, &mut self.counters, now);
                self.honour(connection, now);
            }
            _ if !connection.authentication.is_open() => {
                connection.respond_status(cid, status::AUTHENTICATION_REQUIRED.with_dnr());
            }
            FabricsType::PROPERTY_GET => self.property_get(connection, entry),
            FabricsType::PROPERTY_SET => self.property_set(connection, entry),
            FabricsType::DISCONNECT => disconnect(connection, entry),
            _ => connection.respond_status(cid, Status::INVALID_FIELD.with_dnr()),
        }
    }

    fn connect(&mut self, connection: &mut Connection, entry: &SubmissionEntry, data: &[u8], now: Time) {
        let cid = entry.cdw0.cid();
        if connection.connected || connection.connecting.is_some() {
            self.counters.connects_refused += 1;
            return connection.respond_status(cid, Status::COMMAND_SEQUENCE.with_dnr());
        }
        if let Err(Refusal(status, dw0)) = self.try_connect(connection, entry, data, now) {
            self.counters.connects_refused += 1;
            self.counters.hosts_refused += u64::from(status.is(status::INVALID_HOST));
            connection.link = Link::None;
            connection.respond(cid, status, dw0.into());
        }
    }

    fn try_connect(
        &mut self,
        connection: &mut Connection,
        entry: &SubmissionEntry,
        data: &[u8],
        now: Time,
    ) -> Result<(), Refusal> {
        let command: ConnectCommand = entry.read_as().ok_or(Status::INVALID_FIELD)?;
        let sgl = entry.sgl();
        if !sgl.is_in_capsule() {
            return Err(Status::SGL_TYPE_INVALID.with_dnr().into());
        }
        let data = data.get(..sgl.length as usize).and_then(|data| ConnectData::read_from_bytes(data).ok());
        let data = data.filter(|_| sgl.address == 0).ok_or(Status::SGL_DATA_LENGTH_INVALID.with_dnr())?;
        if command.recfmt != 0 {
            return Err(status::INCOMPATIBLE_FORMAT.with_dnr().into());
        }
        let subsystem = nqn(&data.subnqn).ok_or(wrong_data(at::SUBNQN))?;
        let host = nqn(&data.hostnqn).ok_or(wrong_data(at::HOSTNQN))?;
        if command.sqsize == 0 {
            return Err(wrong_command(at::SQSIZE));
        }
        connection.set_queue(command.sqsize, command.cattr.no_sq_flow_control());
        connection.step = now;
        if subsystem == DISCOVERY_NQN && self.discovery {
            return self.connect_discovery(connection, entry, &command, &data, host, now);
        }
        let index = self.exported.iter().position(|exported| exported.config.nqn == subsystem);
        let index = index.ok_or(wrong_data(at::SUBNQN))?;
        let access = self.exported[index].access(host).ok_or(status::INVALID_HOST.with_dnr())?;
        let digests = connection.rules.digests;
        if self.exported[index].config.digests == DigestPolicy::Required && !(digests.header() && digests.data()) {
            tracing::info!(connection = connection.id, host, subsystem, "refused: the subsystem requires header and data digests");
            self.counters.digests_refused += 1;
            return Err(Status::OPERATION_DENIED.with_dnr().into());
        }
        connection.authentication = match access.and_then(|access| access.secret.as_ref().zip(Some(access))) {
            None => Authentication::NotNeeded,
            Some((secret, access)) => {
                let config = ControllerAuthConfig {
                    host_nqn: host.to_owned(),
                    subsystem_nqn: subsystem.to_owned(),
                    secret: secret.clone(),
                    controller_secret: access.controller_secret.clone(),
                    hashes: Vec::new(),
                    groups: self.groups.clone(),
                };
                Authentication::required(config, &mut *self.random)
            }
        };
        if command.qid == 0 {
            self.connect_admin(connection, entry, &command, &data, (index, host), now)
        } else {
            self.connect_io(connection, entry, &command, &data, (index, host))
        }
    }

    fn connect_discovery(
        &mut self,
        connection: &mut Connection,
        entry: &SubmissionEntry,
        command: &ConnectCommand,
        data: &ConnectData,
        host: &str,
        now: Time,
    ) -> Result<(), Refusal> {
        if command.qid != 0 {
            return Err(wrong_command(at::QID));
        }
        if command.sqsize >= discovery::ENTRIES.max(self.limits.queue_entries) {
            return Err(wrong_command(at::SQSIZE));
        }
        if data.cntlid != CNTLID_DYNAMIC {
            return Err(wrong_data(at::CNTLID));
        }
        self.next_cntlid = if self.next_cntlid >= 0xffef { 1 } else { self.next_cntlid + 1 };
        let cntlid = self.next_cntlid;
        let controller = DiscoveryController::new(cntlid, host.to_owned(), command.kato, now, self.generation);
        connection.link = Link::Discovery(Box::new(controller));
        connection.connected = true;
        connection.respond(entry.cdw0.cid(), Status::SUCCESS, cntlid.into());
        Ok(())
    }

    fn connect_admin(
        &mut self,
        connection: &mut Connection,
        entry: &SubmissionEntry,
        command: &ConnectCommand,
        data: &ConnectData,
        (index, host): (usize, &str),
        now: Time,
    ) -> Result<(), Refusal> {
        if command.sqsize >= self.limits.queue_entries {
            return Err(wrong_command(at::SQSIZE));
        }
        let exported = &self.exported[index];
        let wanted = data.cntlid;
        let known = wanted == CNTLID_DYNAMIC || self.places[index].iter().any(|place| place.cntlid == wanted);
        if !known {
            return Err(wrong_data(at::CNTLID));
        }
        let open = connection.authentication.is_open();
        let mut env = Env { counters: &mut self.counters, limits: &self.limits, exported, now };
        for (at, place) in self.places[index].iter_mut().enumerate() {
            if wanted != CNTLID_DYNAMIC && place.cntlid != wanted {
                continue;
            }
            let host = Host { nqn: host.to_owned(), id: data.hostid };
            let claim = Claim { subsystem: index, place: at, qid: 0, entries: command.sqsize + 1, host, kato_ms: command.kato };
            if !open {
                // Whoever authenticates first gets it.
                if place.state != State::Free {
                    continue;
                }
                connection.claim = Some(claim);
            } else if connection.take_controller(place, claim, &mut env).is_err() {
                continue;
            }
            connection.cntlid = place.cntlid;
            connection.connecting = Some(entry.cdw0.cid());
            connection.connect_succeeded();
            return Ok(());
        }
        Err(status::CONTROLLER_BUSY.into())
    }

    /// Gives a connection that has authenticated what Connect has promised; if another was faster, it ends.
    fn honour(&mut self, connection: &mut Connection, now: Time) {
        let Some(claim) = connection.claim.take_if(|_| connection.authentication.is_open()) else { return };
        let exported = &self.exported[claim.subsystem];
        let place = &mut self.places[claim.subsystem][claim.place];
        let mut env = Env { counters: &mut self.counters, limits: &self.limits, exported, now };
        let taken = match claim.qid {
            0 => connection.take_controller(place, claim, &mut env),
            _ if !place.is_of(&claim.host) => Err(status::CONTROLLER_BUSY),
            _ => connection.take_queue(place, &claim),
        };
        if let Err(status) = taken {
            tracing::info!(connection = connection.id, %status, "a host has authenticated, and what it wanted is not to be had any more");
            self.counters.late_refusals += 1;
            connection.finish();
            return;
        }
        connection.settling = matches!(connection.link, Link::Queue { qid: 1.., .. });
    }

    fn connect_io(
        &mut self,
        connection: &mut Connection,
        entry: &SubmissionEntry,
        command: &ConnectCommand,
        data: &ConnectData,
        (index, host): (usize, &str),
    ) -> Result<(), Refusal> {
        let places = &mut self.places[index];
        let at = places.iter().position(|place| place.cntlid == data.cntlid).ok_or(wrong_data(at::CNTLID))?;
        let place = &mut places[at];
        let owner = place.host.as_ref().ok_or(wrong_data(at::CNTLID))?;
        if owner.nqn != host {
            return Err(wrong_data(at::HOSTNQN));
        }
        if owner.id != data.hostid {
            return Err(wrong_data(at::HOSTID));
        }
        if command.qid > self.limits.io_queues {
            return Err(wrong_command(at::QID));
        }
        if command.sqsize >= place.max_entries() {
            return Err(wrong_command(at::SQSIZE));
        }
        connection.cntlid = place.cntlid;
        let host = Host { nqn: host.to_owned(), id: data.hostid };
        let claim = Claim { subsystem: index, place: at, qid: command.qid, entries: command.sqsize + 1, host, kato_ms: 0 };
        if !connection.authentication.is_open() {
            place.may_add_queue(command.qid)?;
            connection.claim = Some(claim);
            connection.connecting = Some(entry.cdw0.cid());
            connection.connect_succeeded();
            return Ok(());
        }
        connection.take_queue(place, &claim)?;
        connection.connecting = Some(entry.cdw0.cid());
        Ok(())
    }

    fn property_get(&mut self, connection: &mut Connection, entry: &SubmissionEntry) {
        let command: Option<PropertyCommand> = entry.read_as();
        let value = command.and_then(|command| {
            let wide = command.attrib & 7 == 1;
            match &connection.link {
                Link::Discovery(controller) => controller.property(command.offset, wide),
                Link::Queue { subsystem, place, qid: 0 } => self.places[*subsystem][*place].property(command.offset, wide),
                _ => None,
            }
        });
        match value {
            Some(value) => connection.respond(entry.cdw0.cid(), Status::SUCCESS, value),
            None => connection.respond_status(entry.cdw0.cid(), Status::INVALID_FIELD.with_dnr()),
        }
    }

    fn property_set(&mut self, connection: &mut Connection, entry: &SubmissionEntry) {
        let command: Option<PropertyCommand> = entry.read_as();
        let command = command.filter(|command| command.offset == offset::CC && command.attrib & 7 == 0);
        let empty = connection.out.is_empty();
        let result = match (command, &mut connection.link) {
            (Some(command), Link::Discovery(controller)) => {
                controller.set_cc(Cc::from_bits(command.value as u32));
                Ok(())
            }
            (Some(command), Link::Queue { subsystem, place, qid: 0 }) => {
                self.places[*subsystem][*place].set_cc(Cc::from_bits(command.value as u32), empty)
            }
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        };
        connection.respond_status(entry.cdw0.cid(), result.err().unwrap_or(Status::SUCCESS));
    }
}

/// Disconnect of an I/O queue (Base 2.3 §6.4): answered, then the connection ends and the queue is deleted.
fn disconnect(connection: &mut Connection, entry: &SubmissionEntry) {
    let cid = entry.cdw0.cid();
    let command: Option<DisconnectCommand> = entry.read_as();
    if command.is_none_or(|command| command.recfmt != 0) {
        return connection.respond_status(cid, status::INCOMPATIBLE_FORMAT.with_dnr());
    }
    match connection.link {
        Link::Queue { qid: 1.., .. } => {
            connection.respond_status(cid, Status::SUCCESS);
            connection.finish();
        }
        _ => connection.respond_status(cid, status::INVALID_QUEUE_TYPE.with_dnr()),
    }
}
