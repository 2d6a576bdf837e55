//! A PCI function that vfio-pci has, opened.

use super::error::VfioError;
use super::info::{self, Region};
use super::space::VfioSpace;
use super::{VfioConfig, sys};
use crate::event::EventLine;
use crate::function::{Doorbell, Function};
use crate::memory::Arena;
use crate::pci::{Inventory, PciAddress};
use crate::space::AddressSpace;
use crate::vfio_user::wire::{DeviceInfo, IrqInfo};
use dray_nvme::registers::offset;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use vfio_bindings::bindings::vfio as uapi;
use zerocopy::IntoBytes;

/// What a function is driven by when it can be opened.
const VFIO_PCI: &str = "vfio-pci";
/// Most bytes of a region's description.
const MAX_INFO_BYTES: u32 = 64 << 10;
/// Offset of the command register, and its bits: memory space, bus master, no INTx (PCI 3.0 §6.2.2).
const COMMAND: u64 = 4;
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const NO_INTX: u16 = 1 << 10;

/// A physical function, ours while this lives. Dropping it ends its DMA and gives it back to vfio-pci.
#[derive(Debug)]
pub struct VfioFunction {
    me: Weak<Self>,
    address: PciAddress,
    space: Arc<VfioSpace>,
    device: OwnedFd,
    can_reset: bool,
    bar: Region,
    config: Region,
    /// The parts of BAR0 that are mapped, with their offsets in it.
    areas: Vec<(u64, Arc<Arena>)>,
    lines: Vec<EventLine>,
    /// The kernel wants the device back.
    leave: Option<EventLine>,
    /// The device reported an error that it does not recover from (PCIe AER).
    error: Option<EventLine>,
    asked: AtomicBool,
    gone: AtomicBool,
}

impl VfioFunction {
    /// Opens a function that is bound to vfio-pci, in that I/O address space: registers and doorbells are mapped where the kernel
    /// allows it, the vectors are set up, and it may access memory.
    ///
    /// # Errors
    /// [`VfioError`].
    pub fn open(address: &PciAddress, space: &Arc<VfioSpace>, config: &VfioConfig) -> Result<Arc<Self>, VfioError> {
        let address = *address;
        let found = Inventory::of_this_machine().function(address).map_err(|_| VfioError::NoFunction(address))?;
        if found.driver.as_deref() != Some(VFIO_PCI) {
            let driver = found.driver.unwrap_or_else(|| "no driver".into());
            return Err(VfioError::NotBound { address, driver });
        }
        let device = space.join(&found, config.vf_token.as_ref())?;
        if let Some(token) = config.vf_token.filter(|_| found.physical_function.is_none()) {
            set_vf_token(device.as_fd(), address, token)?;
        }
        let mut info = DeviceInfo::default();
        sys::call(device.as_fd(), sys::DEVICE_GET_INFO, &mut info).map_err(VfioError::kernel(format!("{address}: what it is")))?;
        if info.flags & uapi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(VfioError::Unsupported { address, what: "VFIO says that it is no PCI function" });
        }
        let bar = region(device.as_fd(), address, uapi::VFIO_PCI_BAR0_REGION_INDEX)?;
        let configuration = region(device.as_fd(), address, uapi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        if bar.size < u64::from(offset::DOORBELLS) + 8 || !bar.allows(uapi::VFIO_REGION_INFO_FLAG_READ | uapi::VFIO_REGION_INFO_FLAG_WRITE) {
            return Err(VfioError::Unsupported { address, what: "it has no BAR0 with registers and doorbells" });
        }
        if configuration.size < 64 {
            return Err(VfioError::Unsupported { address, what: "it has no configuration space" });
        }
        let mut function = Self {
            me: Weak::new(),
            address,
            space: Arc::clone(space),
            can_reset: info.flags & uapi::VFIO_DEVICE_FLAGS_RESET != 0,
            areas: map(device.as_fd(), &bar)?,
            device,
            bar,
            config: configuration,
            lines: Vec::new(),
            leave: None,
            error: None,
            asked: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        };
        function.command(MEMORY_SPACE | BUS_MASTER | NO_INTX).map_err(VfioError::kernel(format!("{address}: its command register")))?;
        function.lines = function.set_vectors(config.vectors)?;
        function.leave = function.set_line(uapi::VFIO_PCI_REQ_IRQ_INDEX);
        function.error = function.set_line(uapi::VFIO_PCI_ERR_IRQ_INDEX);
        Ok(Arc::new_cyclic(|me| {
            function.me = me.clone();
            function
        }))
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// The I/O address space that it is in.
    #[must_use]
    pub fn vfio_space(&self) -> &Arc<VfioSpace> {
        &self.space
    }

    /// Whether it can be reset by itself.
    #[must_use]
    pub fn can_reset(&self) -> bool {
        self.can_reset
    }

    /// Whether doorbells are mapped: ringing one is a store, and no system call.
    #[must_use]
    pub fn has_mapped_doorbells(&self) -> bool {
        self.area_of(offset::DOORBELLS).is_some()
    }

    /// Interrupt vectors that are set up.
    #[must_use]
    pub fn vectors(&self) -> usize {
        self.lines.len()
    }

    /// Whether the function has been seen to be gone: an access to its mapped registers faulted, or all of them read ones. Costs
    /// a few loads; [`look`](Self::look) finds out.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed) || self.areas.iter().any(|(_, arena)| arena.is_broken())
    }

    /// Whether the kernel has asked for the device back (it is unplugged, unbound, or its slot powered off). It waits until
    /// everything of this function is dropped, and asks again every now and then.
    #[must_use]
    pub fn asked_to_leave(&self) -> bool {
        if self.leave.as_ref().is_some_and(|line| line.take() > 0) {
            self.asked.store(true, Ordering::Relaxed);
        }
        self.asked.load(Ordering::Relaxed)
    }

    /// Readable when the kernel asks for the device back.
    #[must_use]
    pub fn leave_line(&self) -> Option<&EventLine> {
        self.leave.as_ref()
    }

    /// Whether the device has reported an error on its link since this was asked last (PCIe advanced error reporting): a reset of
    /// it may help.
    #[must_use]
    pub fn reported_error(&self) -> bool {
        self.error.as_ref().is_some_and(|line| line.take() > 0)
    }

    /// Looks whether the function is still there: asks its configuration space.
    #[must_use]
    pub fn look(&self) -> bool {
        let mut vendor = [0; 2];
        let there = sys::read_at(&self.device, self.config.offset, &mut vendor).is_ok() && vendor != [0xff; 2];
        if !there {
            self.gone.store(true, Ordering::Relaxed);
        }
        !self.is_gone()
    }

    /// Lets the function access memory, or keeps it from doing so.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.command(MEMORY_SPACE | NO_INTX | if on { BUS_MASTER } else { 0 })
    }

    /// Configuration space of the first 256 bytes, as VFIO shows it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn configuration(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.config.size.min(256) as usize];
        sys::read_at(&self.device, self.config.offset, &mut bytes)?;
        Ok(bytes)
    }

    fn command(&self, bits: u16) -> io::Result<()> {
        let at = self.config.offset + COMMAND;
        let mut old = [0; 2];
        sys::read_at(&self.device, at, &mut old)?;
        let kept = u16::from_le_bytes(old) & !(MEMORY_SPACE | BUS_MASTER | NO_INTX);
        sys::write_at(&self.device, at, &(kept | bits).to_le_bytes())
    }

    fn irq_count(&self, index: u32) -> u32 {
        let mut info = IrqInfo { index, ..IrqInfo::default() };
        let asked = sys::call(self.device.as_fd(), sys::DEVICE_GET_IRQ_INFO, &mut info);
        if asked.is_ok() && info.flags & uapi::VFIO_IRQ_INFO_EVENTFD != 0 { info.count } else { 0 }
    }

    /// Sets up as many MSI-X vectors as both have, or as the kernel has left.
    fn set_vectors(&self, most: u16) -> Result<Vec<EventLine>, VfioError> {
        let failed = || VfioError::kernel(format!("{}: its interrupt vectors", self.address));
        let in_table = self.configuration().map_or(0, |config| u32::from(info::msix_vectors(&config)));
        let mut count = self.irq_count(uapi::VFIO_PCI_MSIX_IRQ_INDEX).min(u32::from(most)).min(in_table) as usize;
        let mut lines = (0..count).map(|_| EventLine::new()).collect::<io::Result<Vec<_>>>().map_err(failed())?;
        while count > 0 {
            lines.truncate(count);
            let fds: Vec<BorrowedFd<'_>> = lines.iter().map(AsFd::as_fd).collect();
            match sys::set_irqs(self.device.as_fd(), uapi::VFIO_PCI_MSIX_IRQ_INDEX, &fds).map_err(failed())? {
                0 => break,
                // The machine has that many vectors left.
                fewer => count = fewer.min(count - 1),
            }
        }
        lines.truncate(count);
        Ok(lines)
    }

    /// One line for an interrupt that VFIO makes itself; functions without it go on without.
    fn set_line(&self, index: u32) -> Option<EventLine> {
        if self.irq_count(index) == 0 {
            return None;
        }
        let line = EventLine::new().ok()?;
        sys::set_irqs(self.device.as_fd(), index, &[line.as_fd()]).ok().filter(|left| *left == 0)?;
        Some(line)
    }

    /// The mapped part that has a word of BAR0.
    #[inline]
    fn area_of(&self, at: u32) -> Option<(&Arc<Arena>, usize)> {
        let (at, word) = (u64::from(at), 4);
        let inside = |(start, arena): &&(u64, Arc<Arena>)| *start <= at && at + word <= start + arena.len() as u64;
        self.areas.iter().find(inside).map(|(start, arena)| (arena, (at - start) as usize))
    }

    /// All ones: there may be nothing any more that could answer.
    #[cold]
    fn suspect(&self) -> u32 {
        let _gone = self.look();
        u32::MAX
    }
}

impl Function for VfioFunction {
    fn read32(&self, at: u32) -> u32 {
        if !at.is_multiple_of(4) || self.gone.load(Ordering::Relaxed) {
            return u32::MAX;
        }
        let value = match self.area_of(at) {
            Some((arena, offset)) => {
                let value = arena.load32(offset, Ordering::Acquire);
                if arena.is_broken() { u32::MAX } else { value }
            }
            None => {
                let mut word = [0; 4];
                let inside = u64::from(at) + 4 <= self.bar.size;
                let read = inside && sys::read_at(&self.device, self.bar.offset + u64::from(at), &mut word).is_ok();
                if read { u32::from_le_bytes(word) } else { u32::MAX }
            }
        };
        if value == u32::MAX { self.suspect() } else { value }
    }

    fn write32(&self, at: u32, value: u32) {
        if !at.is_multiple_of(4) {
            return;
        }
        match self.area_of(at) {
            Some((arena, offset)) if arena.is_writable() => arena.store32(offset, value, Ordering::Release),
            _ if u64::from(at) + 4 <= self.bar.size => {
                // As on a bus, nobody hears of a write that nobody took.
                let _lost = sys::write_at(&self.device, self.bar.offset + u64::from(at), &value.to_le_bytes());
            }
            _ => {}
        }
    }

    fn doorbell(&self, at: u32) -> Option<Doorbell> {
        if at < offset::DOORBELLS || !at.is_multiple_of(4) || u64::from(at) + 4 > self.bar.size {
            return None;
        }
        if let Some((arena, offset)) = self.area_of(at).filter(|(arena, _)| arena.is_writable()) {
            return Some(Doorbell::Mapped { arena: Arc::clone(arena), offset });
        }
        Some(Doorbell::Trapped { function: self.me.upgrade()?, offset: at })
    }

    fn space(&self) -> &AddressSpace {
        self.space.space()
    }

    fn event_line(&self, vector: u16) -> Option<EventLine> {
        self.lines.get(usize::from(vector)).cloned()
    }

    fn reset(&self) -> io::Result<()> {
        if !self.can_reset {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("{} has no function-level reset", self.address)));
        }
        sys::number(self.device.as_fd(), sys::DEVICE_RESET, 0)?;
        self.command(MEMORY_SPACE | BUS_MASTER | NO_INTX)
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        // No DMA any more, whatever the controller was doing: memory that is freed after this is written by nobody. Each may fail
        // with a device that has gone, which does none either; closing the device is the kernel's own end of the same.
        let _gone = self.set_bus_master(false);
        if self.can_reset && !self.is_gone() {
            let _gone = sys::number(self.device.as_fd(), sys::DEVICE_RESET, 0);
        }
    }
}

/// Asks for the description of a region, with as much room as it wants.
fn region(device: BorrowedFd<'_>, address: PciAddress, index: u32) -> Result<Region, VfioError> {
    let what = "the kernel's description of its regions leads nowhere";
    let mut words = vec![0u64; info::REGION_BYTES / 8];
    loop {
        // The second word of 32 bits is flags, the third the index.
        words[1] = u64::from(index);
        let asked = sys::call_bytes(device, sys::DEVICE_GET_REGION_INFO, words.as_mut_slice().as_mut_bytes());
        asked.map_err(VfioError::kernel(format!("{address}: region {index}")))?;
        let needed = words[0] as u32;
        if needed as usize <= words.len() * 8 {
            return Region::parse(words.as_bytes()).map_err(|_| VfioError::Unsupported { address, what });
        }
        if needed > MAX_INFO_BYTES {
            return Err(VfioError::Unsupported { address, what });
        }
        words = vec![0; (needed as usize).div_ceil(8)];
    }
}

/// Maps the parts of BAR0 that may be.
fn map(device: BorrowedFd<'_>, bar: &Region) -> Result<Vec<(u64, Arc<Arena>)>, VfioError> {
    let writable = bar.allows(uapi::VFIO_REGION_INFO_FLAG_WRITE);
    let one = |area: &std::ops::RangeInclusive<u64>| {
        let fd = device.try_clone_to_owned().map_err(VfioError::kernel("another descriptor of the device"))?;
        let len = (area.end() - area.start() + 1) as usize;
        Ok((*area.start(), Arena::map_bar(fd, bar.offset + area.start(), len, writable)?))
    };
    bar.areas.iter().map(one).collect()
}

/// Tells the kernel the secret that users of the function's virtual functions must know (VFIO_DEVICE_FEATURE_PCI_VF_TOKEN).
fn set_vf_token(device: BorrowedFd<'_>, address: PciAddress, uuid: [u8; 16]) -> Result<(), VfioError> {
    let flags = uapi::VFIO_DEVICE_FEATURE_SET | uapi::VFIO_DEVICE_FEATURE_PCI_VF_TOKEN;
    let mut token = sys::VfToken { argsz: 0, flags, uuid };
    sys::call(device, sys::DEVICE_FEATURE, &mut token).map_err(VfioError::kernel(format!("{address}: setting its VF token")))?;
    Ok(())
}
