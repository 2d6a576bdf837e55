//! The regions: what REGION_INFO says of them, and what reads and writes do.

use super::pci::{CONFIG_BYTES, ConfigSpace, Effect, PciIds};
use super::server::Bar0Map;
use dray_device::bar::{BAR_BYTES, SAVED_BYTES};
use dray_device::function::Function;
use dray_device::slot::Slot;
use dray_device::vfio_user::wire::{RegionInfo, SparseArea, SparseMmap, errno, region};
use dray_nvme::registers::offset;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Bytes of BAR0.
pub(crate) const BAR0_BYTES: u64 = BAR_BYTES as u64;
/// Bytes of BAR5, which has the pending bits.
pub(crate) const PBA_BYTES: u64 = 4096;
/// Bytes of an entry of the MSI-X table.
const ENTRY: usize = 16;
/// The doorbells' page.
const DOORBELLS: SparseArea = SparseArea { offset: offset::DOORBELLS as u64, size: 4096 };

/// Bytes of BAR4, which has the MSI-X table.
pub(crate) fn table_bytes(vectors: u16) -> u64 {
    (u64::from(vectors) * ENTRY as u64).next_power_of_two().max(4096)
}

/// The function as a client sees it through its regions.
pub(crate) struct Regions {
    slot: Slot,
    function: Arc<dyn Function>,
    config: ConfigSpace,
    /// The MSI-X table: the client masks by itself, and looks here for what it wrote.
    table: Vec<u8>,
    vectors: u16,
    bar0: Bar0Map,
}

impl Regions {
    pub(crate) fn new(slot: Slot, ids: PciIds, vectors: u16, bar0: Bar0Map) -> Self {
        let function = slot.function();
        let mut regions =
            Self { slot, function, config: ConfigSpace::new(ids, vectors), table: Vec::new(), vectors, bar0 };
        regions.clear_table();
        regions.slot.pin().ignore_vector_masks(bar0 == Bar0Map::Whole);
        regions.settle_pin();
        regions
    }

    /// Configuration space has changed: says whether the pin may be used.
    fn settle_pin(&self) {
        self.slot.pin().allow(self.config.allows_pin());
    }

    /// Every vector masked, as after a reset.
    fn clear_table(&mut self) {
        self.table = vec![0; usize::from(self.vectors) * ENTRY];
        for entry in self.table.chunks_exact_mut(ENTRY) {
            entry[12] = 1;
        }
    }

    /// A function-level reset, as far as registers go.
    ///
    /// # Errors
    /// The slot's.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        self.function.reset()?;
        self.config.reset();
        self.settle_pin();
        self.clear_table();
        self.slot.forget_pending();
        Ok(())
    }

    /// Whether the controller has finished what it did before a reset.
    pub(crate) fn is_quiet(&self) -> bool {
        self.slot.is_gone() || self.slot.bar().load32(offset::CSTS) & 1 == 0
    }

    /// Bytes of a region; 0 = it does not exist.
    fn size(&self, index: u32) -> u64 {
        match index {
            region::BAR0 => BAR0_BYTES,
            region::BAR4 if self.vectors > 0 => table_bytes(self.vectors),
            region::BAR5 if self.vectors > 0 => PBA_BYTES,
            region::CONFIG => CONFIG_BYTES as u64,
            _ => 0,
        }
    }

    /// The reply to REGION_INFO, and the descriptor that goes with it.
    ///
    /// # Errors
    /// An errno.
    pub(crate) fn info(&self, request: &RegionInfo, takes_fd: bool) -> Result<(Vec<u8>, Option<OwnedFd>), u32> {
        if (request.argsz as usize) < size_of::<RegionInfo>() || request.index >= region::COUNT {
            return Err(errno::EINVAL);
        }
        let size = self.size(request.index);
        let mut info = RegionInfo { argsz: 32, index: request.index, size, ..RegionInfo::default() };
        if size > 0 {
            info.flags = RegionInfo::READ | RegionInfo::WRITE;
        }
        let map = if request.index == region::BAR0 && takes_fd { self.bar0 } else { Bar0Map::None };
        let mut reply = Vec::with_capacity(64);
        let mut fd = None;
        let share = || self.slot.bar().arena().as_fd().try_clone_to_owned().map_err(|_| errno::EIO);
        match map {
            Bar0Map::None => reply.extend_from_slice(info.as_bytes()),
            Bar0Map::Whole => {
                info.flags |= RegionInfo::MMAP;
                reply.extend_from_slice(info.as_bytes());
                fd = Some(share()?);
            }
            Bar0Map::Doorbells => {
                info.flags |= RegionInfo::MMAP | RegionInfo::CAPS;
                info.argsz = 64;
                let fits = request.argsz >= info.argsz;
                // Where it will be, even in a reply that has no room for it: QEMU checks the offset before it asks again.
                info.cap_offset = 32;
                reply.extend_from_slice(info.as_bytes());
                if fits {
                    let sparse = SparseMmap { id: SparseMmap::ID, version: 1, next: 0, areas: 1, reserved: 0 };
                    reply.extend_from_slice(sparse.as_bytes());
                    reply.extend_from_slice(DOORBELLS.as_bytes());
                    fd = Some(share()?);
                }
            }
        }
        Ok((reply, fd))
    }

    /// Where a range of a region begins, if it lies within.
    fn range(&self, index: u32, offset: u64, count: usize) -> Result<usize, u32> {
        let end = offset.checked_add(count as u64).ok_or(errno::EINVAL)?;
        if count == 0 || end > self.size(index) {
            return Err(errno::EINVAL);
        }
        usize::try_from(offset).map_err(|_| errno::EINVAL)
    }

    /// Appends `count` bytes of a region.
    ///
    /// # Errors
    /// EINVAL outside a region.
    pub(crate) fn read(&self, index: u32, offset: u64, count: usize, into: &mut Vec<u8>) -> Result<(), u32> {
        let at = self.range(index, offset, count)?;
        let start = into.len();
        into.resize(start + count, 0);
        let into = &mut into[start..];
        match index {
            region::BAR0 => self.read_registers(at, into),
            region::BAR4 => (at..).zip(into).for_each(|(at, byte)| *byte = self.table.get(at).copied().unwrap_or(0)),
            region::BAR5 => (at..).zip(into).for_each(|(at, byte)| *byte = self.pending_bits(at)),
            _ => self.config.read(at, into, self.slot.pin().is_asserted()),
        }
        Ok(())
    }

    fn read_registers(&self, at: usize, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let (word, skip) = ((at + done) & !3, (at + done) & 3);
            let bytes = self.function.read32(word as u32).to_le_bytes();
            let n = (4 - skip).min(into.len() - done);
            into[done..done + n].copy_from_slice(&bytes[skip..skip + n]);
            done += n;
        }
    }

    fn pending_bits(&self, byte: usize) -> u8 {
        let bit = |bit: usize| {
            let vector = u16::try_from(byte * 8 + bit).ok().filter(|&vector| vector < self.vectors);
            u8::from(vector.is_some_and(|vector| self.slot.is_pending(vector))) << bit
        };
        (0..8).map(bit).sum()
    }

    /// Writes to a region. Registers take 4 or 8 aligned bytes (Base 2.3 §3.1); what cannot be written stays as it is.
    ///
    /// # Errors
    /// EINVAL outside a region, or where registers are accessed in parts.
    pub(crate) fn write(&mut self, index: u32, offset: u64, from: &[u8]) -> Result<Effect, u32> {
        let at = self.range(index, offset, from.len())?;
        match index {
            region::BAR0 => {
                if !matches!(from.len(), 4 | 8) || !at.is_multiple_of(4) {
                    return Err(errno::EINVAL);
                }
                self.slot.bar().guest_write(at as u32, from);
            }
            region::BAR4 => {
                for (at, &byte) in (at..).zip(from) {
                    if let Some(old) = self.table.get_mut(at) {
                        *old = byte;
                    }
                }
            }
            region::BAR5 => {}
            _ => {
                let effect = self.config.write(at, from);
                self.settle_pin();
                return Ok(effect);
            }
        }
        Ok(Effect::None)
    }

    /// What a destination takes over besides the controller: configuration space, MSI-X table, registers and doorbells.
    pub(crate) fn save(&self) -> Vec<u8> {
        let mut saved = self.config.save().to_vec();
        saved.extend_from_slice(&self.slot.bar().save());
        saved.extend_from_slice(&self.table);
        saved
    }

    /// Whether a saved function is like this one: nothing is changed yet.
    pub(crate) fn fits(&self, saved: &[u8]) -> bool {
        saved.len() == 256 + SAVED_BYTES + self.table.len() && self.config.fits(&saved[..256])
    }

    /// Takes a saved function over that [`fits`](Self::fits).
    pub(crate) fn restore(&mut self, saved: &[u8]) {
        let (config, rest) = saved.split_at(256);
        if let Some((bar, table)) = rest.split_first_chunk::<SAVED_BYTES>() {
            self.config.restore(config);
            self.settle_pin();
            self.slot.bar().restore(bar);
            self.table.copy_from_slice(table);
        }
    }
}
