//! The admin side of a device, whichever way it is reached.

use super::open::DeviceError;
use crate::config::device::Device;
use crate::config::Config;
use crate::core::clock::Clock;
use crate::random::Urandom;
use crate::run::exports::secret;
use dray_device::command::{CommandQueue, SubmitError};
use dray_device::poll::{Poll, Time};
use dray_device::function::Function;
use dray_device::memory::Pages;
use dray_device::socket::{Stream, TcpSocket, UnixSocket};
use dray_device::space::AddressSpace;
use dray_device::vfio::VfioFunction;
use dray_device::vfio_user::client::{ClientConfig, VfioUserClient};
use dray_driver::nvme_tcp::{TcpConfig, TcpInitiator, TcpState};
use dray_driver::passthru::node::namespace_device;
use dray_driver::passthru::{PassthruAdmin, PassthruConfig, PassthruDevice};
use dray_driver::{AdminAnswer, AdminData, Driver, DriverConfig, DriverState, QueuePairConfig, Ticket};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::IdentifyController;
use dray_nvme::status::Status;
use dray_nvme::tcp::pdu::Digests;
use sha2::{Digest, Sha256};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a device may take to become ready, to answer, to shut down.
const PATIENCE_MS: u64 = 20_000;
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// I/O queues of a function without interrupts.
const POLLED_QUEUES: usize = 8;
/// Why nothing can be asked for now.
const LENT: &str = "a controller that it manages is being moved";
/// Commands under way in one namespace's queue at most.
const DEPTH: u16 = 256;

/// A function that is driven.
#[derive(Clone)]
pub(super) enum Driven {
    Pci(Arc<VfioFunction>),
    Socket(Arc<VfioUserClient>),
}

impl Driven {
    /// The function behind a socket. Nothing uses its interrupts: it is polled.
    pub(super) fn behind(name: &str, path: &Path) -> Result<Self, DeviceError> {
        let failed = |error: &dyn std::fmt::Display| DeviceError::failed(name, &format!("{}: {error}", path.display()));
        let socket = UnixSocket::connect(path).map_err(|error| failed(&error))?;
        let config = ClientConfig { vectors: 0, ..ClientConfig::default() };
        let client = VfioUserClient::connect(Box::new(socket), AddressSpace::default(), &config).map_err(|error| failed(&error))?;
        Ok(Self::Socket(client))
    }

    /// As the driver has it.
    pub(super) fn function(&self) -> Arc<dyn Function> {
        match self {
            Self::Pci(function) => Arc::clone(function) as _,
            Self::Socket(client) => Arc::clone(client) as _,
        }
    }

    fn vectors(&self) -> usize {
        match self {
            Self::Pci(function) => function.vectors(),
            Self::Socket(_) => 0,
        }
    }

    fn leaves(&self) -> Option<&'static str> {
        match self {
            Self::Pci(function) if function.is_gone() => Some("it was pulled out"),
            Self::Pci(function) if function.asked_to_leave() => Some("the kernel has asked for it back"),
            Self::Socket(client) if !client.look() => Some("the process that has it has closed the socket"),
            Self::Pci(_) | Self::Socket(_) => None,
        }
    }
}

/// Driver, initiator, or what the kernel lends of its own.
pub(super) enum Admin {
    Function(Box<Driver>, Driven),
    /// A move has the driver, and gives it back.
    Lent(Box<IdentifyController>, Driven),
    Tcp(Box<TcpInitiator>, SocketAddr),
    Kernel(Box<PassthruAdmin>, PathBuf),
    /// Closed, and why.
    Gone(String),
}

impl Admin {
    /// Drives a function until it is ready. `pages`: what its queues are made of.
    pub(super) fn function(name: &str, function: Driven, pages: Pages, clock: Clock) -> Result<Self, DeviceError> {
        let queues = if matches!(function, Driven::Socket(_)) { POLLED_QUEUES } else { function.vectors().clamp(1, 64) };
        let watch_ready = matches!(function, Driven::Pci(_));
        let config = DriverConfig { io_queues: u16::try_from(queues).unwrap_or(1), watch_ready, pages, ..DriverConfig::default() };
        let driver = Driver::new(function.function(), config).map_err(|error| DeviceError::failed(name, &error))?;
        let mut admin = Self::Function(Box::new(driver), function);
        admin.ready(name, clock)?;
        Ok(admin)
    }

    /// Connects to a controller of another machine.
    pub(super) fn tcp(config: &Config, file: &Device, address: SocketAddr, clock: Clock) -> Result<Self, DeviceError> {
        let name = file.name.get_ref();
        let text = |key: &Option<toml::Spanned<String>>| key.as_ref().map(|text| text.get_ref().clone()).unwrap_or_default();
        let (host, subsystem) = (text(&file.host_nqn), text(&file.nqn));
        let hash = Sha256::digest(host.as_bytes());
        let mut host_id = [0; 16];
        host_id.copy_from_slice(&hash[..16]);
        let mut wanted = TcpConfig::new(&host, host_id, &subsystem);
        let digests = file.digests.as_ref().is_none_or(|digests| *digests.get_ref());
        wanted.digests = Digests::new().with_header(digests).with_data(digests);
        let read = |path: &Option<toml::Spanned<PathBuf>>| {
            path.as_ref().map(|path| secret(&config.path(path.get_ref()))).transpose().map_err(|error| DeviceError::failed(name, &error))
        };
        wanted.secret = read(&file.secret_file)?;
        wanted.controller_secret = read(&file.controller_secret_file)?;
        let random = Urandom::open().map_err(|error| DeviceError::failed(name, &error))?;
        let stream = connect(name, address)?;
        let initiator = TcpInitiator::connect(clock.now(), wanted, stream, Box::new(random));
        let mut admin = Self::Tcp(Box::new(initiator.map_err(|error| DeviceError::failed(name, &error))?), address);
        admin.ready(name, clock)?;
        Ok(admin)
    }

    /// Asks the kernel for its controller.
    pub(super) fn kernel(name: &str, path: PathBuf) -> Result<Self, DeviceError> {
        let admin = PassthruAdmin::open(&path, &PassthruConfig::default()).map_err(|error| DeviceError::failed(name, &error))?;
        Ok(Self::Kernel(Box::new(admin), path))
    }

    /// Polls the admin side.
    pub(super) fn poll(&mut self, now: Time) {
        match self {
            Self::Function(driver, _) => _ = driver.poll(now),
            Self::Tcp(initiator, _) => _ = initiator.poll(now),
            Self::Kernel(admin, _) => _ = admin.poll(now),
            Self::Lent(..) | Self::Gone(_) => {}
        }
        // Nobody asks for events yet: they are taken, so that others can come.
        match self {
            Self::Function(driver, _) => while driver.next_event().is_some() {},
            Self::Tcp(initiator, _) => while initiator.next_event().is_some() {},
            Self::Kernel(..) | Self::Lent(..) | Self::Gone(_) => {}
        }
    }

    fn is_ready(&self) -> bool {
        match self {
            Self::Function(driver, _) => driver.is_ready(),
            Self::Tcp(initiator, _) => initiator.is_ready(),
            Self::Kernel(..) => true,
            Self::Lent(..) | Self::Gone(_) => false,
        }
    }

    /// Why it does not work any more.
    pub(super) fn failure(&self) -> Option<String> {
        match self {
            Self::Function(driver, _) => match driver.state() {
                DriverState::Failed(error) => Some(error.to_string()),
                _ => None,
            },
            Self::Tcp(initiator, _) => match initiator.state() {
                TcpState::Failed(error) => Some(error.to_string()),
                _ => None,
            },
            Self::Kernel(admin, _) => admin.fault().map(|fault| fault.to_string()),
            Self::Lent(..) => None,
            Self::Gone(why) => Some(why.clone()),
        }
    }

    /// Polls until `step` has something.
    fn until<T>(&mut self, name: &str, what: &str, clock: Clock, mut step: impl FnMut(&mut Self, Time) -> Option<T>) -> Result<T, DeviceError> {
        if matches!(self, Self::Lent(..)) {
            return Err(DeviceError::failed(name, &format!("{what}: {LENT}")));
        }
        let deadline = clock.now().after_ms(PATIENCE_MS);
        loop {
            let now = clock.now();
            self.poll(now);
            if let Some(found) = step(self, now) {
                return Ok(found);
            }
            if let Some(why) = self.failure() {
                return Err(DeviceError::Failed { name: name.to_owned(), why });
            }
            if now >= deadline {
                let why = format!("{what} took longer than {} s", PATIENCE_MS / 1000);
                return Err(DeviceError::Failed { name: name.to_owned(), why });
            }
            std::thread::yield_now();
        }
    }

    fn ready(&mut self, name: &str, clock: Clock) -> Result<(), DeviceError> {
        self.until(name, "becoming ready", clock, |admin, _| admin.is_ready().then_some(()))
    }

    fn request(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<Ticket, SubmitError> {
        match self {
            Self::Function(driver, _) => driver.request(now, entry, data),
            Self::Tcp(initiator, _) => initiator.request(now, entry, data),
            Self::Kernel(admin, _) => admin.request(now, entry, data),
            Self::Lent(..) | Self::Gone(_) => Err(SubmitError::Dead),
        }
    }

    fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        match self {
            Self::Function(driver, _) => driver.answer(ticket),
            Self::Tcp(initiator, _) => initiator.answer(ticket),
            Self::Kernel(admin, _) => admin.answer(ticket),
            Self::Lent(..) | Self::Gone(_) => None,
        }
    }

    /// Sends an admin command, and waits for its answer.
    fn exchange(
        &mut self,
        name: &str,
        what: &str,
        clock: Clock,
        entry: &SubmissionEntry,
        data: AdminData<'_>,
    ) -> Result<AdminAnswer, DeviceError> {
        let failed = |why: &dyn std::fmt::Display| DeviceError::failed(name, &format!("{what}: {why}"));
        let ticket = self.until(name, what, clock, |admin, now| match admin.request(now, entry, data) {
            Err(SubmitError::Full) => None,
            other => Some(other),
        })?;
        let ticket = ticket.map_err(|error| failed(&error))?;
        let answer = self.until(name, what, clock, |admin, _| admin.answer(ticket))?;
        if answer.completion.unknown { Err(failed(&"nobody knows how it ended")) } else { Ok(answer) }
    }

    /// Sends an admin command that returns `bytes` bytes, and waits for its answer.
    pub(super) fn ask(&mut self, name: &str, what: &str, clock: Clock, entry: &SubmissionEntry, bytes: usize) -> Result<Vec<u8>, DeviceError> {
        let mut answer = self.exchange(name, what, clock, entry, AdminData::In(bytes))?;
        let status = answer.completion.status;
        if status.is_error() {
            return Err(DeviceError::Refused { name: name.to_owned(), what: what.to_owned(), status });
        }
        answer.data.resize(bytes, 0);
        Ok(answer.data)
    }

    /// Sends an admin command with or without data, and waits for its status.
    pub(super) fn tell(
        &mut self,
        name: &str,
        what: &str,
        clock: Clock,
        entry: &SubmissionEntry,
        data: &[u8],
    ) -> Result<Status, DeviceError> {
        let data = if data.is_empty() { AdminData::None } else { AdminData::Out(data) };
        Ok(self.exchange(name, what, clock, entry, data)?.completion.status)
    }

    /// Resets a function, and waits until its driver has it ready again.
    pub(super) fn reset(&mut self, name: &str, clock: Clock) -> Result<(), DeviceError> {
        const WHAT: &str = "coming back after a reset";
        let Self::Function(driver, function) = self else {
            return Err(DeviceError::failed(name, &"there is no function to reset"));
        };
        function.function().reset().map_err(|error| DeviceError::failed(name, &format!("function-level reset: {error}")))?;
        let before = driver.generation();
        driver.reset(clock.now());
        self.until(name, WHAT, clock, |admin, _| admin.generation().is_some_and(|now| now != before).then_some(()))
    }

    /// Counts a function's resets, while its driver has it ready.
    pub(super) fn generation(&self) -> Option<u32> {
        match self {
            Self::Function(driver, _) if driver.is_ready() => Some(driver.generation()),
            _ => None,
        }
    }

    /// Takes the driver out, for a move of a controller that it manages.
    pub(super) fn lend(&mut self, name: &str) -> Result<Driver, DeviceError> {
        let identify = self.identify().copied().ok_or_else(|| DeviceError::failed(name, &"it is not identified"))?;
        match std::mem::replace(self, Self::Gone(String::new())) {
            Self::Function(driver, function) => {
                *self = Self::Lent(Box::new(identify), function);
                Ok(*driver)
            }
            other => {
                *self = other;
                let why = match self {
                    Self::Lent(..) => LENT,
                    Self::Gone(why) => why.as_str(),
                    _ => "only a controller that is owned by `pci` (or reached by `vfio-user`) takes migration commands from here",
                };
                Err(DeviceError::failed(name, &why))
            }
        }
    }

    /// Takes the driver back.
    pub(super) fn take_back(&mut self, driver: Driver) {
        if let Self::Lent(_, function) = self {
            *self = Self::Function(Box::new(driver), function.clone());
        }
    }

    /// What it says of itself.
    pub(super) fn identify(&self) -> Option<&IdentifyController> {
        match self {
            Self::Function(driver, _) => driver.identify(),
            Self::Tcp(initiator, _) => initiator.identify(),
            Self::Kernel(admin, _) => Some(admin.identify()),
            Self::Lent(identify, _) => Some(identify),
            Self::Gone(_) => None,
        }
    }

    /// A queue of its own for a namespace. `nth`: queues that it has given before.
    pub(super) fn queue(&mut self, name: &str, nsid: u32, nth: u16, clock: Clock) -> Result<Box<dyn CommandQueue>, DeviceError> {
        match self {
            Self::Function(_, function) => {
                // Vector 0 is the admin queue's; where there are too few, the queue is polled without one.
                let vector = Some(nth + 1).filter(|&vector| usize::from(vector) < function.vectors());
                self.pair(name, vector, clock)
            }
            Self::Tcp(_, address) => {
                let address = *address;
                self.connection(name, address, clock)
            }
            Self::Kernel(_, path) => kernel_queue(name, path, nsid),
            Self::Lent(..) => Err(DeviceError::failed(name, &LENT)),
            Self::Gone(why) => Err(DeviceError::failed(name, why)),
        }
    }

    fn pair(&mut self, name: &str, vector: Option<u16>, clock: Clock) -> Result<Box<dyn CommandQueue>, DeviceError> {
        let config = QueuePairConfig { entries: DEPTH, vector };
        let ticket = self.until(name, "creating a queue pair", clock, |admin, now| match admin {
            Self::Function(driver, _) => match driver.create_queue_pair(now, config) {
                Err(SubmitError::Full) => None,
                other => Some(other),
            },
            _ => None,
        })?;
        let ticket = ticket.map_err(|error| DeviceError::failed(name, &error))?;
        let pair = self.until(name, "creating a queue pair", clock, |admin, _| match admin {
            Self::Function(driver, _) => driver.queue_pair(&ticket),
            _ => None,
        })?;
        Ok(Box::new(pair.map_err(|error| DeviceError::failed(name, &error))?))
    }

    fn connection(&mut self, name: &str, address: SocketAddr, clock: Clock) -> Result<Box<dyn CommandQueue>, DeviceError> {
        let mut stream = Some(connect(name, address)?);
        let ticket = self.until(name, "opening a queue", clock, |admin, now| match admin {
            Self::Tcp(initiator, _) => Some(initiator.open_queue(now, stream.take()?, DEPTH)),
            _ => None,
        })?;
        let ticket = ticket.map_err(|error| DeviceError::failed(name, &error))?;
        let queue = self.until(name, "opening a queue", clock, |admin, _| match admin {
            Self::Tcp(initiator, _) => initiator.take_queue(ticket),
            _ => None,
        })?;
        Ok(Box::new(queue.map_err(|error| DeviceError::failed(name, &error))?))
    }

    /// Closes whatever is open of it.
    pub(super) fn let_go(&mut self, why: &str) {
        *self = Self::Gone(why.to_owned());
    }

    /// Whether the device is gone, or wanted by the kernel: then everything of it has to be let go.
    pub(super) fn leaves(&self) -> Option<&'static str> {
        match self {
            Self::Function(_, function) | Self::Lent(_, function) => function.leaves(),
            Self::Tcp(..) | Self::Kernel(..) | Self::Gone(_) => None,
        }
    }

    /// Lets go of the controller: shut down where it is ours.
    pub(super) fn close(&mut self, name: &str, clock: Clock) {
        let now = clock.now();
        let ended = match self {
            Self::Function(driver, _) => {
                driver.shutdown(now);
                self.until(name, "shutting down", clock, |admin, _| match admin {
                    Self::Function(driver, _) => (*driver.state() == DriverState::Stopped).then_some(()),
                    _ => Some(()),
                })
            }
            Self::Tcp(initiator, _) => {
                initiator.shutdown(now);
                // The association ends with it, which is what it is told for.
                self.until(name, "shutting down", clock, |admin, _| admin.failure().map(drop))
            }
            Self::Kernel(..) | Self::Lent(..) | Self::Gone(_) => Ok(()),
        };
        if let Err(error) = ended {
            tracing::warn!("{error}");
        }
    }
}

fn connect(name: &str, address: SocketAddr) -> Result<Box<dyn Stream>, DeviceError> {
    let stream = TcpStream::connect_timeout(&address, CONNECT).and_then(TcpSocket::new);
    Ok(Box::new(stream.map_err(|error| DeviceError::failed(name, &format!("{address}: {error}")))?))
}

fn kernel_queue(name: &str, controller: &std::path::Path, nsid: u32) -> Result<Box<dyn CommandQueue>, DeviceError> {
    let path = namespace_device(controller, nsid).map_err(|error| DeviceError::failed(name, &error))?;
    let config = PassthruConfig { depth: u32::from(DEPTH), ..PassthruConfig::default() };
    let device = PassthruDevice::open(&path, &config).map_err(|error| DeviceError::failed(name, &error))?;
    Ok(Box::new(device.queue().map_err(|error| DeviceError::failed(name, &error))?))
}
