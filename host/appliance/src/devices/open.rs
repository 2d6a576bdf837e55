//! One device while it is open.

use super::admin::{Admin, Driven};
use super::memory::GuestMemory;
use super::requeue::{Promise, Requeue, Seat};
use super::virtual_functions::{Online, VirtualFunction};
use crate::config::Config;
use crate::config::device::{Device, Iommu, Way, uuid};
use crate::core::clock::Clock;
use dray_controller::{CommandBackingConfig, UsesMemory};
use dray_device::command::CommandQueue;
use dray_device::memory::Pages;
use dray_device::pci::{Inventory, PciAddress};
use dray_device::space::AddressSpace;
use dray_device::vfio::{IommuChoice, VfioConfig, VfioFunction, VfioSpace};
use dray_driver::Driver;
use dray_driver::passthru::node::{block_devices, namespace_device};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController, IdentifyNamespace, controller_list};
use dray_nvme::status::Status;
use rustix::fs::{Mode, OFlags};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;
use zerocopy::FromBytes;

/// How often the admin side is polled.
const PACE: Duration = Duration::from_millis(2);

/// Why a device, or a namespace of one, cannot be had.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum DeviceError {
    /// The configuration names no such device.
    #[error("there is no device \"{0}\"")]
    Unknown(String),
    /// It cannot be opened, or does not work.
    #[error("device \"{name}\": {why}")]
    Failed {
        /// The device.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// It refused a command.
    #[error("device \"{name}\": {what} was refused: {status}")]
    Refused {
        /// The device.
        name: String,
        /// The command.
        what: String,
        /// The status.
        status: Status,
    },
    /// The namespace cannot be served.
    #[error("namespace {nsid} of device \"{name}\" {why}")]
    Namespace {
        /// The device.
        name: String,
        /// The namespace.
        nsid: u32,
        /// What is wrong.
        why: String,
    },
}

impl DeviceError {
    pub(super) fn failed(name: &str, error: &dyn std::fmt::Display) -> Self {
        Self::Failed { name: name.to_owned(), why: error.to_string() }
    }
}

/// What the thread and everybody else share.
struct Shared {
    name: String,
    clock: Clock,
    admin: Mutex<Admin>,
    memory: GuestMemory,
    space: Option<AddressSpace>,
    stop: AtomicBool,
    /// The device is gone, or has to be given away: nothing of it may be held.
    lost: AtomicBool,
    virtual_functions: Mutex<Option<Online>>,
    requeue: Requeue,
}

impl Shared {
    fn admin(&self) -> MutexGuard<'_, Admin> {
        self.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn online(&self) -> MutexGuard<'_, Option<Online>> {
        self.virtual_functions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device that is open.
pub struct OpenDevice {
    shared: Arc<Shared>,
    /// Namespaces that are backings, with what keeps others of this machine from them meanwhile.
    taken: Mutex<BTreeMap<u32, Vec<File>>>,
    /// What is known of namespaces, as of the last time that somebody asked the device.
    known: Mutex<BTreeMap<u32, CommandBackingConfig>>,
    /// Namespaces that hosts can reserve (RESCAP).
    reservable: Mutex<BTreeSet<u32>>,
    queues: AtomicU16,
    place: String,
    thread: Option<JoinHandle<()>>,
    waker: Thread,
    /// Given back to the kernel's driver at the end.
    bound: Option<PciAddress>,
}

impl std::fmt::Debug for OpenDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenDevice").field("name", &self.shared.name).field("place", &self.place).finish_non_exhaustive()
    }
}

/// Takes a function from the kernel's driver if that is asked for; whether it was taken.
fn bind(file: &Device, address: PciAddress) -> Result<bool, DeviceError> {
    if !file.bind.as_ref().is_some_and(|bind| *bind.get_ref()) {
        return Ok(false);
    }
    let bound = Inventory::of_this_machine().bind(address);
    let bound = bound.map_err(|error| DeviceError::failed(file.name.get_ref(), &error))?;
    if !bound.in_the_way.is_empty() {
        tracing::warn!("{address}: its IOMMU group has others too, which vfio-pci does not have: {}", bound.in_the_way.join(", "));
    }
    Ok(!bound.already)
}

fn space(file: &Device, spaces: &mut BTreeMap<String, Weak<VfioSpace>>) -> Result<Arc<VfioSpace>, DeviceError> {
    let choice = match file.iommu.as_ref().map(|iommu| *iommu.get_ref()).unwrap_or_default() {
        Iommu::Auto => IommuChoice::Auto,
        Iommu::Iommufd => IommuChoice::Iommufd,
        Iommu::Type1 => IommuChoice::Type1,
        Iommu::UnsafeNone => IommuChoice::UnsafeNone,
    };
    let name = file.space.as_ref().map(|space| space.get_ref().clone());
    let known = name.as_ref().and_then(|name| spaces.get(name)).and_then(Weak::upgrade);
    if let Some(known) = known {
        if known.choice() != choice {
            let error = format!("another device of its space says iommu = \"{}\", and this one \"{choice}\"", known.choice());
            return Err(DeviceError::failed(file.name.get_ref(), &error));
        }
        return Ok(known);
    }
    let space = VfioSpace::open(choice).map_err(|error| DeviceError::failed(file.name.get_ref(), &error))?;
    if let Some(name) = name {
        spaces.insert(name, Arc::downgrade(&space));
    }
    Ok(space)
}

impl OpenDevice {
    /// Opens a device and waits until it is ready.
    pub(super) fn open(
        config: &Config,
        file: &Device,
        spaces: &mut BTreeMap<String, Weak<VfioSpace>>,
    ) -> Result<Arc<Self>, DeviceError> {
        let (name, clock) = (file.name.get_ref().clone(), Clock::new());
        let way = file.way().ok_or_else(|| DeviceError::failed(&name, &"it is nowhere"))?;
        let (mut bound, mut memory) = (None, None);
        let admin = match way {
            Way::Pci(address) => {
                bound = bind(file, address)?.then_some(address);
                let made = space(file, spaces).and_then(|space| {
                    let vf_token = file.vf_token.as_ref().and_then(|token| uuid(token.get_ref()));
                    let function = VfioFunction::open(&address, &space, &VfioConfig { vf_token, ..VfioConfig::default() });
                    let function = function.map_err(|error| DeviceError::failed(&name, &error))?;
                    memory = Some(space.space().clone());
                    // Without an IOMMU only huge pages lie as a device must see them.
                    let pages = if space.choice() == IommuChoice::UnsafeNone { Pages::PreferHuge } else { Pages::Small };
                    Admin::function(&name, Driven::Pci(function), pages, clock)
                });
                if made.is_err() {
                    unbind(&name, bound);
                }
                made?
            }
            Way::Passthru(path) => Admin::kernel(&name, path)?,
            Way::NvmeTcp(address) => Admin::tcp(config, file, address, clock)?,
            Way::VfioUser(path) => {
                let function = Driven::behind(&name, &config.path(&path))?;
                memory = Some(function.function().space().clone());
                Admin::function(&name, function, Pages::Small, clock)?
            }
        };
        let shared = Arc::new(Shared {
            admin: Mutex::new(admin),
            memory: GuestMemory::default(),
            space: memory,
            stop: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            virtual_functions: Mutex::default(),
            requeue: Requeue::default(),
            clock,
            name,
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(format!("dray-{}", shared.name).chars().take(15).collect());
        let thread = thread.spawn(move || tend(&of_thread)).map_err(|error| DeviceError::failed(&shared.name, &error))?;
        Ok(Arc::new(Self {
            waker: thread.thread().clone(),
            thread: Some(thread),
            taken: Mutex::default(),
            known: Mutex::default(),
            reservable: Mutex::default(),
            queues: AtomicU16::new(0),
            place: file.place(),
            shared,
            bound,
        }))
    }

    /// Its name in the configuration.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// How it is reached, for people.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Makes virtual functions in place of those there are, gives them to vfio-pci, and keeps them online until the device is closed.
    ///
    /// # Errors
    /// Nothing of them is left then.
    pub fn make_virtual_functions(&self, address: PciAddress, count: NonZeroU16) -> miette::Result<()> {
        let mut admin = self.shared.admin();
        let online = Online::make(self.name(), &mut admin, self.shared.clock, address, count)?;
        // From here on they go with the device.
        self.shared.online().insert(online).give_to_vfio()
    }

    /// Its virtual functions, each with what it has.
    #[must_use]
    pub fn virtual_functions(&self) -> Vec<VirtualFunction> {
        self.shared.online().as_ref().map(|online| online.made().each().collect()).unwrap_or_default()
    }

    /// Where memory is mapped for it; `None` where it needs none to be.
    #[must_use]
    pub fn space(&self) -> Option<&AddressSpace> {
        self.shared.space.as_ref()
    }

    /// Whether it is gone for good.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.shared.lost.load(Ordering::Acquire)
    }

    /// Why it does not work any more.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.shared.admin().failure()
    }

    /// Identify Controller.
    #[must_use]
    pub fn identify(&self) -> Option<IdentifyController> {
        self.shared.admin().identify().copied()
    }

    pub(super) fn used_by(&self, uses: UsesMemory) {
        self.shared.memory.used_by(uses);
    }

    pub(super) fn follow(&self, space: &AddressSpace) -> Result<(), DeviceError> {
        if self.shared.space.is_some() {
            self.shared.memory.follow(space).map_err(|error| DeviceError::failed(self.name(), &error))?;
            self.waker.unpark();
        }
        Ok(())
    }

    /// Keeps a namespace for one backing: of this process, and of this machine where the kernel owns it.
    pub(super) fn take(&self, nsid: u32) -> Result<(), DeviceError> {
        let kernels = if let Admin::Kernel(_, path) = &*self.shared.admin() { Some(path.clone()) } else { None };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.contains_key(&nsid) {
            return Err(self.namespace_error(nsid, "is in use already"));
        }
        let claims = kernels.map_or_else(|| Ok(Vec::new()), |controller| self.claim(nsid, &controller))?;
        taken.insert(nsid, claims);
        Ok(())
    }

    pub(super) fn give_back(&self, nsid: u32) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&nsid);
    }

    /// The clock of its thread.
    pub(super) fn clock(&self) -> Clock {
        self.shared.clock
    }

    /// Whether a host can have reserved a namespace.
    pub(super) fn is_reservable(&self, nsid: u32) -> bool {
        self.reservable.lock().unwrap_or_else(PoisonError::into_inner).contains(&nsid)
    }

    /// A queue of its own for a namespace.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn queue(&self, nsid: u32) -> Result<Box<dyn CommandQueue>, DeviceError> {
        Ok(self.seated_queue(nsid)?.0)
    }

    /// The same, and what is needed to ask for [another](Self::want_queue) when it has died.
    pub(super) fn seated_queue(&self, nsid: u32) -> Result<(Box<dyn CommandQueue>, Seat), DeviceError> {
        let nth = self.queues.fetch_add(1, Ordering::Relaxed);
        let mut admin = self.shared.admin();
        // Before the queue is made: one that dies while it is made is an old one.
        let seat = Seat { nth, generation: admin.generation() };
        Ok((admin.queue(self.name(), nsid, nth, self.shared.clock)?, seat))
    }

    /// Asks for a queue in place of one that has died; waits for nothing.
    pub(super) fn want_queue(&self, config: CommandBackingConfig, seat: Seat) -> Arc<Promise> {
        let promise = self.shared.requeue.want(config, seat);
        self.waker.unpark();
        promise
    }

    /// Sends an admin command, and waits for its status.
    ///
    /// # Errors
    /// [`DeviceError`] when it is not known.
    pub fn tell(&self, what: &str, entry: &SubmissionEntry, data: &[u8]) -> Result<Status, DeviceError> {
        self.shared.admin().tell(self.name(), what, self.shared.clock, entry, data)
    }

    /// The controllers of its subsystem that a namespace is attached to (Identify, CNS 12h).
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn controllers_of(&self, nsid: u32) -> Result<Vec<u16>, DeviceError> {
        let entry = SubmissionEntry::identify(Cns::NAMESPACE_CONTROLLERS, nsid, 0, CommandSetId::NVM);
        let what = "Identify (controllers attached to a namespace)";
        let page = self.shared.admin().ask(self.name(), what, self.shared.clock, &entry, IDENTIFY_BYTES)?;
        Ok(controller_list(&page).collect())
    }

    /// Each namespace has a queue of its own, which takes no other's commands.
    pub(super) fn has_queue_per_namespace(&self) -> bool {
        matches!(&*self.shared.admin(), Admin::Kernel(..))
    }

    /// Takes its driver out, for a move of a controller that it manages; until it is [back](Self::take_back) nothing can be asked
    /// of the device. Queues of namespaces go on.
    ///
    /// # Errors
    /// [`DeviceError`] where there is none, or a move has it already.
    pub fn lend(&self) -> Result<Driver, DeviceError> {
        self.shared.admin().lend(self.name())
    }

    /// The driver that was lent.
    pub fn take_back(&self, driver: Driver) {
        self.shared.admin().take_back(driver);
    }

    /// What tells a namespace from all others: a hash of what the drive says of itself and of it.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn identity(&self, nsid: u32) -> Result<[u8; 16], DeviceError> {
        let entry = SubmissionEntry::identify(Cns::NAMESPACE, nsid, 0, CommandSetId::NVM);
        let mut admin = self.shared.admin();
        let page = admin.ask(self.name(), "Identify Namespace", self.shared.clock, &entry, IDENTIFY_BYTES)?;
        let identify = IdentifyNamespace::read_from_bytes(&page[..]);
        let identify = identify.map_err(|_| self.namespace_error(nsid, "has no description"))?;
        let controller = admin.identify().copied();
        let controller = controller.ok_or_else(|| self.namespace_error(nsid, "is of a controller without Identify"))?;
        let of_drive = [&controller.sn[..], &controller.mn, &controller.subnqn].concat();
        let of_namespace = [&identify.nguid[..], &identify.eui64, &nsid.to_le_bytes()].concat();
        let hash = Sha256::digest([of_drive, of_namespace].concat());
        let mut short = [0; 16];
        short.copy_from_slice(&hash[..16]);
        Ok(short)
    }

    pub(super) fn namespace_error(&self, nsid: u32, why: &str) -> DeviceError {
        DeviceError::Namespace { name: self.name().to_owned(), nsid, why: why.to_owned() }
    }

    /// What a namespace is, and that it can be served.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn namespace(&self, nsid: u32) -> Result<CommandBackingConfig, DeviceError> {
        let (name, clock) = (self.name(), self.shared.clock);
        let mut admin = self.shared.admin();
        let entry = SubmissionEntry::identify(Cns::NAMESPACE, nsid, 0, CommandSetId::NVM);
        let page = admin.ask(name, "Identify Namespace", clock, &entry, IDENTIFY_BYTES)?;
        let identify = IdentifyNamespace::read_from_bytes(&page[..]).map_err(|_| self.namespace_error(nsid, "has no description"))?;
        let controller = admin.identify().copied().ok_or_else(|| self.namespace_error(nsid, "is of a controller without Identify"))?;
        drop(admin);
        let config = self.served(nsid, &identify, &controller)?;
        if controller.oncs.reservations() && identify.rescap != 0 {
            self.reservable.lock().unwrap_or_else(PoisonError::into_inner).insert(nsid);
        }
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(nsid, config);
        Ok(config)
    }

    /// What is known of a namespace already.
    #[must_use]
    pub fn known(&self, nsid: u32) -> Option<CommandBackingConfig> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&nsid).copied()
    }

    fn served(&self, nsid: u32, identify: &IdentifyNamespace, controller: &IdentifyController) -> Result<CommandBackingConfig, DeviceError> {
        let wrong = |why: &str| Err(self.namespace_error(nsid, why));
        if identify.nsze == 0 {
            return wrong("is not active");
        }
        if identify.format().ms() != 0 {
            return wrong("has metadata: format it without");
        }
        if identify.dps & 7 != 0 {
            return wrong("has protection information: format it without");
        }
        let Some(block_bytes) = identify.block_bytes().filter(|bytes| matches!(bytes, 512 | 4096)) else {
            return wrong("has blocks of neither 512 nor 4096 bytes");
        };
        Ok(CommandBackingConfig {
            nsid,
            block_bytes,
            blocks: identify.nsze,
            volatile_cache: controller.vwc.present(),
            deallocated_reads_zero: identify.dlfeat.read_value() == 1,
            write_uncorrectable: controller.oncs.write_uncorrectable(),
            deallocates: controller.oncs.dsm(),
            write_protected: identify.nsattr.write_protected(),
        })
    }

    /// Takes the kernel's block devices of a namespace for us alone: what is mounted there is not ours to write, and nothing can be
    /// mounted, nor taken by another appliance, as long as we have it.
    fn claim(&self, nsid: u32, controller: &Path) -> Result<Vec<File>, DeviceError> {
        let path = namespace_device(controller, nsid).map_err(|error| DeviceError::failed(self.name(), &error))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let blocks = block_devices(&name, Path::new("/sys"));
        let uses = crate::cli::passthru::uses(&blocks);
        if !uses.is_empty() {
            return Err(self.namespace_error(nsid, &format!("is in use: {}", uses.join(", "))));
        }
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        let open = |block: &String| rustix::fs::open(Path::new("/dev").join(block), flags, Mode::empty()).map(File::from);
        let claims: Result<Vec<_>, _> = blocks.iter().map(open).collect();
        claims.map_err(|error| self.namespace_error(nsid, &format!("cannot be had for us alone: {error}")))
    }
}

/// The device's thread.
fn tend(shared: &Shared) {
    while !shared.stop.load(Ordering::Acquire) {
        let mut admin = shared.admin();
        admin.poll(shared.clock.now());
        if let Some(why) = admin.leaves() {
            tracing::error!("device \"{}\" is lost: {why}", shared.name);
            // Its queues die with the driver; what was under way comes back as an error, and backings let go of them.
            admin.let_go(why);
            shared.lost.store(true, Ordering::Release);
        }
        if let Some(online) = shared.online().as_mut() {
            online.keep(&shared.name, &mut admin, shared.clock);
        }
        shared.requeue.serve(&shared.name, &mut admin, shared.clock);
        drop(admin);
        if let Some(space) = &shared.space {
            shared.memory.work(space);
        }
        std::thread::park_timeout(PACE);
    }
}

fn unbind(name: &str, bound: Option<PciAddress>) {
    if let Some(address) = bound
        && let Err(error) = Inventory::of_this_machine().unbind(address)
    {
        tracing::warn!("device \"{name}\": {address} could not be given back: {error}");
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.waker.unpark();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("device \"{}\": its thread has died", self.shared.name);
        }
        if let Some(online) = self.shared.online().take() {
            online.clear(self.name(), &mut self.shared.admin(), self.shared.clock);
        }
        self.shared.admin().close(&self.shared.name, self.shared.clock);
        if self.bound.is_some() {
            // The function has to be closed before its driver can have it again.
            if let Some(shared) = Arc::get_mut(&mut self.shared) {
                let admin = shared.admin.get_mut().unwrap_or_else(PoisonError::into_inner);
                admin.let_go("it is closed");
                shared.space = None;
            }
            unbind(&self.shared.name, self.bound);
        }
    }
}
