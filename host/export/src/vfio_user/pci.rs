//! PCI configuration space of the function (PCI Express 6.0 §7.5): what Linux, EDK2, SPDK and a hypervisor look for.
//!
//! Base addresses are remembered and mean nothing here: the client maps the BARs where it likes. Memory decode and bus
//! mastering are not looked at either: there are clients that never enable them.

use super::region::{BAR0_BYTES, PBA_BYTES, table_bytes};

/// Bytes of configuration space: extended, with no extended capability.
pub(crate) const CONFIG_BYTES: usize = 4096;
/// Bytes that hold anything.
const USED: usize = 256;

/// Where the registers and capabilities are.
mod at {
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const BAR4: usize = 0x20;
    pub(super) const BAR5: usize = 0x24;
    pub(super) const SUBSYSTEM: usize = 0x2c;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
    pub(super) const PM: usize = 0x40;
    pub(super) const PCIE: usize = 0x50;
    pub(super) const MSIX: usize = 0x90;
    /// Device Control of the PCI Express capability.
    pub(super) const DEVICE_CONTROL: usize = PCIE + 8;
}

/// Mass storage, non-volatile memory, NVMe I/O controller.
const CLASS: u32 = 0x01_08_02;
/// Initiate Function Level Reset, in the high byte of Device Control.
const INITIATE_FLR: u8 = 0x80;
/// Interrupt Disable, in the high byte of Command.
const INTERRUPT_DISABLE: u8 = 0x04;
/// Interrupt Status, in the low byte of Status.
const INTERRUPT_STATUS: u8 = 0x08;
/// MSI-X Enable, in the high byte of Message Control.
const MSIX_ENABLE: u8 = 0x80;

/// PCI identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
    /// Revision.
    pub revision: u8,
}

impl Default for PciIds {
    /// A vendor that nobody was given, so that no driver has a quirk for it; drivers bind by class.
    fn default() -> Self {
        Self { vendor: 0x4452, device: 0x0001, subsystem_vendor: 0x4452, subsystem: 0x0001, revision: 1 }
    }
}

/// What a write to configuration space asks for besides being remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// A function-level reset.
    Reset,
}

/// The configuration space.
pub(crate) struct ConfigSpace {
    bytes: [u8; USED],
    /// Bits that a client may write.
    writable: [u8; USED],
    initial: [u8; USED],
}

impl ConfigSpace {
    pub(crate) fn new(ids: PciIds, vectors: u16) -> Self {
        let mut space = Self { bytes: [0; USED], writable: [0; USED], initial: [0; USED] };
        space.put(0, &ids.vendor.to_le_bytes());
        space.put(2, &ids.device.to_le_bytes());
        // Memory space, bus master, parity error response, SERR#, interrupt disable.
        space.allow(at::COMMAND, &0x0546u16.to_le_bytes());
        space.put(at::STATUS, &0x0010u16.to_le_bytes());
        space.put(at::REVISION, &(CLASS << 8 | u32::from(ids.revision)).to_le_bytes());
        space.allow(at::CACHE_LINE, &[0xff, 0xff]);
        space.bar(at::BAR0, 0x4, BAR0_BYTES);
        space.allow(at::BAR0 + 4, &u32::MAX.to_le_bytes());
        if vectors > 0 {
            space.bar(at::BAR4, 0, table_bytes(vectors));
            space.bar(at::BAR5, 0, PBA_BYTES);
        }
        space.put(at::SUBSYSTEM, &ids.subsystem_vendor.to_le_bytes());
        space.put(at::SUBSYSTEM + 2, &ids.subsystem.to_le_bytes());
        space.put(at::CAPABILITIES, &[at::PM as u8]);
        space.allow(at::INTERRUPT_LINE, &[0xff]);
        // INTA#.
        space.put(at::INTERRUPT_PIN, &[1]);
        space.capabilities(vectors);
        space.initial = space.bytes;
        space
    }

    fn capabilities(&mut self, vectors: u16) {
        // Power management 3, no PME; a return from D3hot is no reset.
        self.put(at::PM, &[0x01, at::PCIE as u8, 0x03, 0x00, 0x08]);
        self.allow(at::PM + 4, &[0x03]);
        // PCI Express 2, an endpoint: FLR, role-based errors; a link of one lane at 2.5 GT/s.
        let next = if vectors > 0 { at::MSIX as u8 } else { 0 };
        self.put(at::PCIE, &[0x10, next, 0x02, 0x00]);
        self.put(at::PCIE + 0x04, &0x1000_8000u32.to_le_bytes());
        self.put(at::DEVICE_CONTROL, &0x2810u16.to_le_bytes());
        self.allow(at::DEVICE_CONTROL, &0x7fffu16.to_le_bytes());
        self.put(at::PCIE + 0x0c, &0x0011u32.to_le_bytes());
        self.allow(at::PCIE + 0x10, &0x0143u16.to_le_bytes());
        self.put(at::PCIE + 0x12, &0x0011u16.to_le_bytes());
        self.put(at::PCIE + 0x24, &0x0010u32.to_le_bytes());
        self.allow(at::PCIE + 0x28, &0x001fu16.to_le_bytes());
        self.put(at::PCIE + 0x2c, &0x0002u32.to_le_bytes());
        self.put(at::PCIE + 0x30, &0x0001u16.to_le_bytes());
        if vectors > 0 {
            self.put(at::MSIX, &[0x11, 0]);
            self.put(at::MSIX + 2, &(vectors - 1).to_le_bytes());
            self.allow(at::MSIX + 3, &[0xc0]);
            self.put(at::MSIX + 4, &4u32.to_le_bytes());
            self.put(at::MSIX + 8, &5u32.to_le_bytes());
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// A memory BAR: address bits above its size can be written, which is how its size is found (PCIe 6.0 §7.5.1.2.1).
    fn bar(&mut self, at: usize, kind: u32, bytes: u64) {
        self.put(at, &kind.to_le_bytes());
        self.allow(at, &(!(bytes - 1) as u32).to_le_bytes());
    }

    /// Copies a range out, which lies within [`CONFIG_BYTES`]; `asserted` is the level of the interrupt pin.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8], asserted: bool) {
        for (at, byte) in (offset..).zip(into) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
            if at == at::STATUS && asserted {
                *byte |= INTERRUPT_STATUS;
            }
        }
    }

    /// Whether the function may use its pin (PCIe 6.0 §7.5.1.1.3, §7.7.2.2).
    pub(crate) fn allows_pin(&self) -> bool {
        self.bytes[at::COMMAND + 1] & INTERRUPT_DISABLE == 0 && self.bytes[at::MSIX + 3] & MSIX_ENABLE == 0
    }

    /// Writes a range, which lies within [`CONFIG_BYTES`]; bits that cannot be written stay.
    pub(crate) fn write(&mut self, offset: usize, from: &[u8]) -> Effect {
        let mut effect = Effect::None;
        for (at, &byte) in (offset..).zip(from) {
            if at == at::DEVICE_CONTROL + 1 && byte & INITIATE_FLR != 0 {
                effect = Effect::Reset;
            }
            if let Some((old, mask)) = self.bytes.get_mut(at).zip(self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
        effect
    }

    /// Everything as after power-on.
    pub(crate) fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// What a destination takes over.
    pub(crate) fn save(&self) -> &[u8; USED] {
        &self.bytes
    }

    /// Takes over what may be written of a saved space; nothing else may differ.
    pub(crate) fn fits(&self, saved: &[u8]) -> bool {
        let same = |i: usize| (saved[i] ^ self.bytes[i]) & !self.writable[i] == 0;
        saved.len() == USED && (0..USED).all(same)
    }

    /// Takes a saved space over that [`fits`](Self::fits).
    pub(crate) fn restore(&mut self, saved: &[u8]) {
        let _no_reset = self.write(0, saved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(space: &ConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes, false);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_walk_finds_every_capability() {
        let space = ConfigSpace::new(PciIds::default(), 512);
        assert_eq!((word(&space, 0), word(&space, 8) >> 8), (0x0001_4452, CLASS));
        assert_eq!(word(&space, at::COMMAND) >> 16 & 0x10, 0x10, "it has capabilities");
        let (mut at, mut found) = (word(&space, at::CAPABILITIES) as usize & 0xff, Vec::new());
        while at != 0 {
            found.push(word(&space, at) & 0xff);
            at = word(&space, at) as usize >> 8 & 0xff;
        }
        assert_eq!(found, [0x01, 0x10, 0x11]);
        assert_eq!(word(&space, at::PCIE + 4) >> 28 & 1, 1, "FLR");
        assert_eq!(word(&space, at::PCIE) >> 20 & 0xf, 0, "an endpoint");
        assert_eq!(word(&space, at::MSIX) >> 16, 511);
        assert_eq!((word(&space, at::MSIX + 4), word(&space, at::MSIX + 8)), (4, 5));
        assert_eq!((word(&space, 0x100), word(&space, 0xffc)), (0, 0));
        let mut without = ConfigSpace::new(PciIds::default(), 0);
        assert_eq!((word(&without, at::PCIE) >> 8 & 0xff, word(&without, at::BAR4)), (0, 0));
        assert_eq!(without.write(at::BAR4, &[255; 8]), Effect::None);
        assert_eq!(word(&without, at::BAR4), 0);
    }

    #[test]
    fn sizing_finds_the_sizes() {
        let mut space = ConfigSpace::new(PciIds::default(), 512);
        for (at, expected) in [(0x10, 0xffff_c004), (0x14, u32::MAX), (0x18, 0), (0x1c, 0), (0x20, 0xffff_e000), (0x24, 0xffff_f000)] {
            let _none = space.write(at, &u32::MAX.to_le_bytes());
            assert_eq!(word(&space, at), expected, "{at:#x}");
            let _none = space.write(at, &0xfeb1_2345u32.to_le_bytes());
            // The upper half of a 64-bit BAR has no type bits.
            let kept = if at == 0x14 { 0xfeb1_2345 } else { 0xfeb1_2345 & expected & !0xf | expected & 0xf };
            assert_eq!(word(&space, at), kept, "{at:#x}");
        }
        assert_eq!(word(&space, 0x30), 0, "no expansion ROM");
    }

    #[test]
    fn the_pin_is_off_while_msix_is_on_or_interrupts_are_disabled() {
        let mut space = ConfigSpace::new(PciIds::default(), 5);
        assert!(space.allows_pin() && word(&space, at::INTERRUPT_LINE) >> 8 == 1, "INTA#");
        for (at, on) in [(at::COMMAND + 1, INTERRUPT_DISABLE), (at::MSIX + 3, MSIX_ENABLE)] {
            let _none = space.write(at, &[on]);
            assert!(!space.allows_pin(), "{at:#x}");
            let _none = space.write(at, &[0]);
            assert!(space.allows_pin());
        }
        let mut status = [0; 2];
        space.read(at::STATUS, &mut status, true);
        assert_eq!(status, [0x18, 0]);
    }

    #[test]
    fn identifiers_stay_and_a_reset_is_asked_for() {
        let mut space = ConfigSpace::new(PciIds::default(), 5);
        let before = word(&space, 0);
        assert_eq!(space.write(0, &[0xff; 4]), Effect::None);
        assert_eq!(word(&space, 0), before);
        let _none = space.write(at::COMMAND, &0x0404u16.to_le_bytes());
        assert_eq!(word(&space, at::COMMAND) & 0xffff, 0x0404);
        assert_eq!(space.write(at::DEVICE_CONTROL, &0x8000u16.to_le_bytes()), Effect::Reset);
        assert_eq!(word(&space, at::DEVICE_CONTROL) & 0x8000, 0, "the bit reads zero");
        assert_eq!(space.write(at::DEVICE_CONTROL + 1, &[0x80]), Effect::Reset);
        assert_eq!(space.write(CONFIG_BYTES - 2, &[1, 2]), Effect::None);
        let saved = *space.save();
        space.reset();
        assert_eq!(word(&space, at::COMMAND) & 0xffff, 0);
        assert!(space.fits(&saved) && !space.fits(&saved[1..]));
        space.restore(&saved);
        assert_eq!(word(&space, at::COMMAND) & 0xffff, 0x0404);
        assert!(!ConfigSpace::new(PciIds::default(), 6).fits(&saved), "another number of vectors");
    }
}
