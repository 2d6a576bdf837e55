//! Virtual functions with queues and interrupts, online (SR-IOV; Base 2.3 §8.2.6).
//!
//! Secondary controllers go offline when their primary controller is reset, so whoever drives it must go on doing so: the kernel's
//! driver, a command for as long as it runs ([`crate::cli`]), or the appliance, whose [`OpenDevice`](super::OpenDevice) brings them
//! back online behind each reset of its own.

use super::admin::Admin;
use super::open::DeviceError;
use super::refused;
use crate::core::clock::Clock;
use dray_device::pci::{Inventory, PciAddress};
use dray_driver::virtualization::{self, Plan, Share, Step};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController, SecondaryController, secondary_controllers};
use dray_nvme::virtualization::PrimaryCapabilities;
use miette::miette;
use std::fmt;
use std::num::NonZeroU16;
use zerocopy::FromBytes;

/// The primary controller, by whoever drives it.
pub trait Primary {
    /// An Identify structure.
    ///
    /// # Errors
    /// In words.
    fn identify(&mut self, cns: Cns) -> miette::Result<Vec<u8>>;

    /// One Virtualization Management command.
    ///
    /// # Errors
    /// In words.
    fn take(&mut self, step: &Step) -> miette::Result<()>;

    /// A function-level reset, with which a changed allocation takes effect.
    ///
    /// # Errors
    /// In words.
    fn reset(&mut self) -> miette::Result<()>;
}

/// Virtual functions that were made.
#[derive(Clone, Debug)]
pub struct VirtualFunctions {
    /// What each has.
    pub plan: Plan,
    /// Their addresses, number 1 first.
    pub functions: Vec<PciAddress>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualFunction {
    /// Where it is; `None` where the kernel has made fewer than the drive has numbers for.
    pub address: Option<PciAddress>,
    /// Its controller and what that has.
    pub share: Share,
}

impl fmt::Display for VirtualFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Share { cntlid, queues, interrupts, online, .. } = self.share;
        let address = self.address.map_or_else(|| "?".into(), |address| address.to_string());
        write!(f, "{address}: controller {cntlid}, {queues} queues, {interrupts} interrupts, {}", if online { "online" } else { "offline" })
    }
}

impl VirtualFunctions {
    /// Each function with what it has.
    pub fn each(&self) -> impl Iterator<Item = VirtualFunction> {
        self.plan.secondaries.iter().map(|share| {
            let address = usize::from(share.function).checked_sub(1).and_then(|at| self.functions.get(at)).copied();
            VirtualFunction { address, share: *share }
        })
    }
}

/// Whether it manages secondary controllers at all.
///
/// # Errors
/// If not.
pub fn check(primary: &mut dyn Primary, address: PciAddress) -> miette::Result<()> {
    let id = IdentifyController::read_from_bytes(&primary.identify(Cns::CONTROLLER)?).map_err(|_| miette!("no Identify Controller"))?;
    if id.oacs.virtualization() { Ok(()) } else { Err(miette!("{address}: the drive has no Virtualization Management")) }
}

/// Takes all virtual functions away: offline first, then their resources, then themselves.
///
/// # Errors
/// Nothing was changed if one of them is in use.
pub fn clear(inventory: &Inventory, primary: &mut dyn Primary, address: PciAddress) -> miette::Result<()> {
    inventory.virtual_functions_are_free(address).map_err(refused)?;
    take_resources(primary)?;
    inventory.set_virtual_functions(address, 0).map_err(refused)?;
    Ok(())
}

/// Makes `count` virtual functions, in place of those there are. If there are as many and one is in use (a VM has it while its
/// appliance is started again), they stay, and their controllers get their resources anew: whoever has one sees it reset.
///
/// # Errors
/// None are left then, unless one is in use.
pub fn make(inventory: &Inventory, primary: &mut dyn Primary, address: PciAddress, count: u16) -> miette::Result<VirtualFunctions> {
    check(primary, address)?;
    let there = inventory.with_room_for(address, count).map_err(refused)?;
    let stay = there.virtual_functions.len() == usize::from(count) && inventory.virtual_functions_are_free(address).is_err();
    if stay { take_resources(primary)? } else { clear(inventory, primary, address)? }
    let made = make_anew(inventory, primary, address, count, stay);
    if made.is_err() && !stay {
        // Half of them help nobody.
        let _there_may_be_none = clear(inventory, primary, address);
    }
    made
}

fn make_anew(
    inventory: &Inventory,
    primary: &mut dyn Primary,
    address: PciAddress,
    count: u16,
    stay: bool,
) -> miette::Result<VirtualFunctions> {
    let page = primary.identify(Cns::PRIMARY_CAPABILITIES)?;
    let capabilities = PrimaryCapabilities::read_from_bytes(&page).map_err(|_| miette!("{address}: no Primary Controller Capabilities"))?;
    let plan = virtualization::plan(&capabilities, &secondaries(primary)?, count).map_err(|error| miette!("{address}: {error}"))?;
    let release = plan.release(capabilities.cntlid);
    for step in &release {
        primary.take(step)?;
    }
    if !release.is_empty() {
        primary.reset()?;
    }
    let made = if stay { inventory.with_room_for(address, count) } else { inventory.set_virtual_functions(address, count) };
    let mut made = VirtualFunctions { functions: made.map_err(refused)?.virtual_functions, plan };
    bring_online(primary, address, &mut made.plan)?;
    Ok(made)
}

/// Gives the secondary controllers of a plan that are offline what it says, and brings them online.
///
/// # Errors
/// Of the command that was refused.
pub fn bring_online(primary: &mut dyn Primary, address: PciAddress, plan: &mut Plan) -> miette::Result<()> {
    let before = secondaries(primary)?;
    let is_online = |list: &[SecondaryController], cntlid| list.iter().any(|one| one.scid == cntlid && one.is_online());
    for share in &mut plan.secondaries {
        share.online = is_online(&before, share.cntlid);
    }
    for share in plan.secondaries.iter().filter(|share| !share.online) {
        for step in share.assign().iter().chain([&share.online()]) {
            primary.take(step)?;
        }
    }
    let online = secondaries(primary)?;
    for share in &mut plan.secondaries {
        share.online = is_online(&online, share.cntlid);
    }
    if let Some(share) = plan.secondaries.iter().find(|share| !share.online) {
        return Err(miette!("{address}: controller {} took everything and is not online", share.cntlid));
    }
    Ok(())
}

fn take_resources(primary: &mut dyn Primary) -> miette::Result<()> {
    for step in virtualization::take_all(&secondaries(primary)?) {
        primary.take(&step)?;
    }
    Ok(())
}

fn secondaries(primary: &mut dyn Primary) -> miette::Result<Vec<SecondaryController>> {
    Ok(secondary_controllers(&primary.identify(Cns::SECONDARY_CONTROLLERS)?).collect())
}

/// Virtual functions of an open device, which keeps them online.
pub(super) struct Online {
    address: PciAddress,
    made: VirtualFunctions,
    /// The device's resets when they were brought online.
    generation: u32,
}

impl Online {
    pub(super) fn make(name: &str, admin: &mut Admin, clock: Clock, address: PciAddress, count: NonZeroU16) -> miette::Result<Self> {
        let made = make(&Inventory::of_this_machine(), &mut OfDevice { name, admin, clock }, address, count.get())?;
        let generation = admin.generation().ok_or_else(|| DeviceError::failed(name, &"it was reset meanwhile"))?;
        Ok(Self { address, made, generation })
    }

    pub(super) fn made(&self) -> &VirtualFunctions {
        &self.made
    }

    pub(super) fn give_to_vfio(&self) -> miette::Result<()> {
        let inventory = Inventory::of_this_machine();
        self.made.functions.iter().try_for_each(|function| inventory.bind(*function).map(drop).map_err(refused))
    }

    /// Behind a reset of the device, whoever asked for it, they are offline: brings them back.
    pub(super) fn keep(&mut self, name: &str, admin: &mut Admin, clock: Clock) {
        let Some(generation) = admin.generation().filter(|generation| *generation != self.generation) else { return };
        // Once for each reset, however it ends: a controller that refuses is not asked for ever.
        self.generation = generation;
        match bring_online(&mut OfDevice { name, admin, clock }, self.address, &mut self.made.plan) {
            Ok(()) => tracing::warn!("device \"{name}\" was reset: its virtual functions are online again"),
            Err(error) => tracing::error!("device \"{name}\" was reset, and its virtual functions are offline: {error}"),
        }
    }

    /// Takes them away, unless someone has one: that one then sees its controller go offline, and is not waited for.
    pub(super) fn clear(self, name: &str, admin: &mut Admin, clock: Clock) {
        if let Err(error) = clear(&Inventory::of_this_machine(), &mut OfDevice { name, admin, clock }, self.address) {
            tracing::warn!("device \"{name}\": its virtual functions stay, without anybody to drive their drive: {error}");
        }
    }
}

/// An open device as the primary controller.
struct OfDevice<'a> {
    name: &'a str,
    admin: &'a mut Admin,
    clock: Clock,
}

impl Primary for OfDevice<'_> {
    fn identify(&mut self, cns: Cns) -> miette::Result<Vec<u8>> {
        let entry = SubmissionEntry::identify(cns, 0, 0, CommandSetId::NVM);
        Ok(self.admin.ask(self.name, &cns.to_string(), self.clock, &entry, IDENTIFY_BYTES)?)
    }

    fn take(&mut self, step: &Step) -> miette::Result<()> {
        let status = self.admin.tell(self.name, &step.to_string(), self.clock, &step.entry(), &[])?;
        if status.is_error() {
            return Err(DeviceError::Refused { name: self.name.to_owned(), what: step.to_string(), status }.into());
        }
        Ok(())
    }

    fn reset(&mut self) -> miette::Result<()> {
        Ok(self.admin.reset(self.name, self.clock)?)
    }
}
