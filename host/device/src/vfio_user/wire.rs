//! The messages of vfio-user 0.9.2, as both ends write them. Integers are little-endian; structures are as on the wire, and
//! unknown values are representable.
//!
//! A message is a [`Header`] and a payload; descriptors come with the header's first byte. Whoever reads one checks
//! [`Header::size`] before anything else ([`Header::payload_len`]).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use super::capabilities::{BadCapabilities, Capabilities};

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = 16;
/// Protocol version that is spoken: major 0, and at most this minor.
pub const VERSION_MINOR: u16 = 2;
/// Largest `count` of a data message unless another was agreed.
pub const DEFAULT_DATA_BYTES: u32 = 1 << 20;
/// Descriptors that can be received in one message unless another number was agreed.
pub const DEFAULT_MSG_FDS: u32 = 1;
/// Simultaneous DMA windows unless another number was agreed.
pub const DEFAULT_DMA_MAPS: u32 = 65_535;

/// What a message asks for: `Header::command`.
pub mod command {
    /// VERSION: the first message of a connection.
    pub const VERSION: u16 = 1;
    /// DMA_MAP.
    pub const DMA_MAP: u16 = 2;
    /// DMA_UNMAP.
    pub const DMA_UNMAP: u16 = 3;
    /// DEVICE_GET_INFO.
    pub const GET_INFO: u16 = 4;
    /// DEVICE_GET_REGION_INFO.
    pub const GET_REGION_INFO: u16 = 5;
    /// DEVICE_GET_REGION_IO_FDS.
    pub const GET_REGION_IO_FDS: u16 = 6;
    /// DEVICE_GET_IRQ_INFO.
    pub const GET_IRQ_INFO: u16 = 7;
    /// DEVICE_SET_IRQS.
    pub const SET_IRQS: u16 = 8;
    /// REGION_READ.
    pub const REGION_READ: u16 = 9;
    /// REGION_WRITE.
    pub const REGION_WRITE: u16 = 10;
    /// DMA_READ, from the server.
    pub const DMA_READ: u16 = 11;
    /// DMA_WRITE, from the server.
    pub const DMA_WRITE: u16 = 12;
    /// DEVICE_RESET.
    pub const RESET: u16 = 13;
    /// REGION_WRITE_MULTI, where it was agreed.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// DEVICE_FEATURE.
    pub const DEVICE_FEATURE: u16 = 16;
    /// MIG_DATA_READ.
    pub const MIG_DATA_READ: u16 = 17;
    /// MIG_DATA_WRITE.
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// `errno` values of error replies.
pub mod errno {
    /// No such mapping.
    pub const ENOENT: u32 = 2;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// Not the client's to do.
    pub const EACCES: u32 = 13;
    /// The memory cannot be mapped.
    pub const EFAULT: u32 = 14;
    /// Not now.
    pub const EBUSY: u32 = 16;
    /// Mapped already.
    pub const EEXIST: u32 = 17;
    /// Malformed.
    pub const EINVAL: u32 = 22;
    /// No room.
    pub const ENOSPC: u32 = 28;
    /// The device cannot do it.
    pub const ENOTSUP: u32 = 95;
}

/// Bits of `Header::flags`.
pub mod flags {
    /// The type's bits.
    pub const TYPE: u32 = 0xf;
    /// A command.
    pub const COMMAND: u32 = 0;
    /// A reply.
    pub const REPLY: u32 = 1;
    /// No reply is wanted.
    pub const NO_REPLY: u32 = 1 << 4;
    /// The reply is an error, and `Header::error` says which.
    pub const ERROR: u32 = 1 << 5;
}

macro_rules! wire {
    ($(#[$meta:meta])* $name:ident, $bytes:literal { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $bytes);
        impl $name {
            /// The structure at the start of a payload, and what is behind it; `None` if the payload is shorter.
            #[must_use]
            pub fn take(payload: &[u8]) -> Option<(Self, &[u8])> {
                <Self as FromBytes>::read_from_prefix(payload).ok()
            }
        }
    };
}

wire! {
    /// Before every message.
    Header, 16 {
        /// Chosen by who asks, echoed in the reply.
        id: u16,
        /// See [`command`](mod@command).
        command: u16,
        /// Bytes of the whole message, this header included.
        size: u32,
        /// See [`flags`](mod@flags).
        flags: u32,
        /// errno of an error reply.
        error: u32,
    }
}

impl Header {
    /// A command with `payload` bytes behind it.
    #[must_use]
    pub fn command(id: u16, command: u16, payload: usize) -> Self {
        Self { id, command, size: message_size(payload), flags: flags::COMMAND, error: 0 }
    }

    /// The reply to this command, with `payload` bytes behind it.
    #[must_use]
    pub fn reply(&self, payload: usize) -> Self {
        Self { size: message_size(payload), flags: flags::REPLY, error: 0, ..*self }
    }

    /// The error reply to this command: nothing is behind it.
    #[must_use]
    pub fn error_reply(&self, errno: u32) -> Self {
        Self { size: HEADER_BYTES as u32, flags: flags::REPLY | flags::ERROR, error: errno, ..*self }
    }

    /// Whether it is a command.
    #[must_use]
    pub fn is_command(&self) -> bool {
        self.flags & flags::TYPE == flags::COMMAND
    }

    /// Whether it is a reply.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & flags::TYPE == flags::REPLY
    }

    /// Whether it wants no reply.
    #[must_use]
    pub fn no_reply(&self) -> bool {
        self.flags & flags::NO_REPLY != 0
    }

    /// The errno of an error reply; one that names none is EIO.
    #[must_use]
    pub fn failure(&self) -> Option<u32> {
        (self.flags & flags::ERROR != 0).then_some(if self.error == 0 { errno::EIO } else { self.error })
    }

    /// Bytes behind the header, if the message is neither shorter than a header nor has more than `limit` bytes behind it.
    #[must_use]
    pub fn payload_len(&self, limit: usize) -> Option<usize> {
        let len = (self.size as usize).checked_sub(HEADER_BYTES)?;
        (len <= limit).then_some(len)
    }
}

fn message_size(payload: usize) -> u32 {
    u32::try_from(payload.saturating_add(HEADER_BYTES)).unwrap_or(u32::MAX)
}

wire! {
    /// VERSION, before the JSON text.
    Version, 4 {
        /// Major version: 0, and both ends have the same.
        major: u16,
        /// Minor version: the reply's is not above the request's.
        minor: u16,
    }
}

wire! {
    /// DMA_MAP.
    DmaMap, 32 {
        /// 32.
        argsz: u32,
        /// See [`dma`].
        flags: u32,
        /// Where the window begins in the descriptor's file, bytes.
        offset: u64,
        /// First I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    }
}

wire! {
    /// DMA_UNMAP.
    DmaUnmap, 24 {
        /// 24.
        argsz: u32,
        /// See [`dma`].
        flags: u32,
        /// First I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    }
}

/// Flags of [`DmaMap`] and [`DmaUnmap`].
pub mod dma {
    /// Map: the device may read.
    pub const READ: u32 = 1 << 0;
    /// Map: the device may write.
    pub const WRITE: u32 = 1 << 1;
    /// Map: the descriptor is to be mapped (libvfio-user).
    pub const MMAP: u32 = 1 << 2;
    /// Map: the descriptor is to be read and written (libvfio-user).
    pub const FILE_IO: u32 = 1 << 3;
    /// Unmap: with a dirty bitmap (gone from the protocol).
    pub const GET_DIRTY: u32 = 1 << 0;
    /// Unmap: everything; address and size are 0.
    pub const ALL: u32 = 1 << 1;
}

wire! {
    /// DEVICE_GET_INFO.
    DeviceInfo, 16 {
        /// Bytes the client can take, or needed.
        argsz: u32,
        /// [`DeviceInfo::RESET`], [`DeviceInfo::PCI`].
        flags: u32,
        /// Regions there are.
        regions: u32,
        /// Interrupt indices there are.
        irqs: u32,
    }
}

impl DeviceInfo {
    /// The device takes RESET.
    pub const RESET: u32 = 1 << 0;
    /// It is a PCI function.
    pub const PCI: u32 = 1 << 1;
}

/// Indices of regions.
pub mod region {
    /// BAR0; the other BARs follow.
    pub const BAR0: u32 = 0;
    /// BAR4.
    pub const BAR4: u32 = 4;
    /// BAR5.
    pub const BAR5: u32 = 5;
    /// Expansion ROM.
    pub const ROM: u32 = 6;
    /// PCI configuration space.
    pub const CONFIG: u32 = 7;
    /// VGA.
    pub const VGA: u32 = 8;
    /// How many there are.
    pub const COUNT: u32 = 9;
}

wire! {
    /// DEVICE_GET_REGION_INFO, before the capabilities.
    RegionInfo, 32 {
        /// Bytes the client can take, or needed.
        argsz: u32,
        /// [`RegionInfo::READ`] and the others.
        flags: u32,
        /// See [`region`].
        index: u32,
        /// Offset of the first capability from the start of this structure; 0 = none.
        cap_offset: u32,
        /// Bytes; 0 = no such region.
        size: u64,
        /// Where the region begins in the descriptor's file.
        offset: u64,
    }
}

impl RegionInfo {
    /// May be read.
    pub const READ: u32 = 1 << 0;
    /// May be written.
    pub const WRITE: u32 = 1 << 1;
    /// May be mapped, wholly or by the areas of [`SparseMmap`].
    pub const MMAP: u32 = 1 << 2;
    /// Has capabilities.
    pub const CAPS: u32 = 1 << 3;
}

wire! {
    /// The capability that names the parts of a region that may be mapped; its [`SparseArea`]s follow.
    SparseMmap, 16 {
        /// [`SparseMmap::ID`].
        id: u16,
        /// 1.
        version: u16,
        /// Offset of the next capability; 0 = none.
        next: u32,
        /// Areas that follow.
        areas: u32,
        /// 0.
        reserved: u32,
    }
}

impl SparseMmap {
    /// Its capability identifier.
    pub const ID: u16 = 1;
}

wire! {
    /// One area that may be mapped.
    SparseArea, 16 {
        /// Offset in the region.
        offset: u64,
        /// Bytes.
        size: u64,
    }
}

wire! {
    /// DEVICE_GET_REGION_IO_FDS, before the entries.
    RegionIoFds, 16 {
        /// Bytes the client can take, or needed.
        argsz: u32,
        /// 0.
        flags: u32,
        /// See [`region`].
        index: u32,
        /// Entries.
        count: u32,
    }
}

/// Indices of interrupts.
pub mod irq {
    /// INTx.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Errors.
    pub const ERR: u32 = 3;
    /// Requests to let the device go.
    pub const REQ: u32 = 4;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

wire! {
    /// DEVICE_GET_IRQ_INFO.
    IrqInfo, 16 {
        /// Bytes the client can take, or needed.
        argsz: u32,
        /// [`IrqInfo::EVENTFD`] and the others.
        flags: u32,
        /// See [`irq`].
        index: u32,
        /// Vectors.
        count: u32,
    }
}

impl IrqInfo {
    /// Signalled by eventfd.
    pub const EVENTFD: u32 = 1 << 0;
    /// May be masked.
    pub const MASKABLE: u32 = 1 << 1;
    /// Masks itself when signalled.
    pub const AUTOMASKED: u32 = 1 << 2;
    /// Vectors cannot be added while some are on.
    pub const NORESIZE: u32 = 1 << 3;
}

wire! {
    /// DEVICE_SET_IRQS, before the bools.
    IrqSet, 20 {
        /// 20 and the bytes of bools.
        argsz: u32,
        /// One of the data bits and one of the action bits.
        flags: u32,
        /// See [`irq`].
        index: u32,
        /// First vector.
        start: u32,
        /// Vectors.
        count: u32,
    }
}

impl IrqSet {
    /// No data: all of the vectors.
    pub const DATA_NONE: u32 = 1 << 0;
    /// A byte for each vector: those that are not 0.
    pub const DATA_BOOL: u32 = 1 << 1;
    /// A descriptor for each vector, or none to take theirs away.
    pub const DATA_EVENTFD: u32 = 1 << 2;
    /// The data's bits.
    pub const DATA: u32 = 0x7;
    /// Mask.
    pub const MASK: u32 = 1 << 3;
    /// Unmask.
    pub const UNMASK: u32 = 1 << 4;
    /// Trigger, or set what is triggered.
    pub const TRIGGER: u32 = 1 << 5;
    /// The action's bits.
    pub const ACTION: u32 = 0x38;
}

wire! {
    /// REGION_READ and REGION_WRITE, before the data.
    RegionAccess, 16 {
        /// Offset in the region.
        offset: u64,
        /// See [`region`].
        region: u32,
        /// Bytes of data.
        count: u32,
    }
}

wire! {
    /// DMA_READ and DMA_WRITE, before the data.
    DmaAccess, 16 {
        /// I/O virtual address.
        address: u64,
        /// Bytes of data.
        count: u64,
    }
}

wire! {
    /// REGION_WRITE_MULTI, before its [`MultiWrite`]s; its reply, with the number that were done.
    WriteMulti, 8 {
        /// Writes.
        count: u64,
    }
}

wire! {
    /// One write of REGION_WRITE_MULTI.
    MultiWrite, 24 {
        /// Offset in the region.
        offset: u64,
        /// See [`region`].
        region: u32,
        /// Bytes of `data` that count, at most 8.
        count: u32,
        /// The bytes.
        data: [u8; 8],
    }
}

wire! {
    /// DEVICE_FEATURE, before its data.
    DeviceFeature, 8 {
        /// Bytes the client can take, or needed, this structure included.
        argsz: u32,
        /// The feature's index, and what to do with it.
        flags: u32,
    }
}

impl DeviceFeature {
    /// The index's bits.
    pub const INDEX: u32 = 0xffff;
    /// Read the feature.
    pub const GET: u32 = 1 << 16;
    /// Write it.
    pub const SET: u32 = 1 << 17;
    /// Ask whether the other bits would work.
    pub const PROBE: u32 = 1 << 18;

    /// The feature, see [`feature`].
    #[must_use]
    pub fn index(&self) -> u32 {
        self.flags & Self::INDEX
    }
}

/// Indices of features.
pub mod feature {
    /// Which ways of migration there are: a u64 of [`migration`](super::migration) bits.
    pub const MIGRATION: u32 = 1;
    /// The state of a migration.
    pub const MIG_DEVICE_STATE: u32 = 2;
    /// Starts the log of written pages.
    pub const DMA_LOGGING_START: u32 = 6;
    /// Stops it.
    pub const DMA_LOGGING_STOP: u32 = 7;
    /// Reads and clears it.
    pub const DMA_LOGGING_REPORT: u32 = 8;
}

/// Bits of feature MIGRATION.
pub mod migration {
    /// Stop, then copy.
    pub const STOP_COPY: u64 = 1 << 0;
    /// Devices that talk to each other.
    pub const P2P: u64 = 1 << 1;
    /// Copy before the stop.
    pub const PRE_COPY: u64 = 1 << 2;
}

wire! {
    /// Feature MIG_DEVICE_STATE.
    MigDeviceState, 8 {
        /// See [`state`].
        state: u32,
        /// Unused, 0.
        data_fd: u32,
    }
}

/// The states of a migration.
pub mod state {
    /// Only a reset leads out.
    pub const ERROR: u32 = 0;
    /// Stopped.
    pub const STOP: u32 = 1;
    /// Running.
    pub const RUNNING: u32 = 2;
    /// Stopped, its state can be read.
    pub const STOP_COPY: u32 = 3;
    /// Stopped, its state can be written.
    pub const RESUMING: u32 = 4;
    /// Not used.
    pub const RUNNING_P2P: u32 = 5;
    /// Running while its state can be read.
    pub const PRE_COPY: u32 = 6;
    /// Not used.
    pub const PRE_COPY_P2P: u32 = 7;
}

wire! {
    /// Feature DMA_LOGGING_START, before its [`LogRange`]s.
    LoggingStart, 16 {
        /// Bytes of a page, wanted; in the reply: used.
        page_size: u64,
        /// Ranges that follow; 0 = everything.
        ranges: u32,
        /// 0.
        reserved: u32,
    }
}

wire! {
    /// A range to log.
    LogRange, 16 {
        /// First I/O virtual address.
        iova: u64,
        /// Bytes.
        length: u64,
    }
}

wire! {
    /// Feature DMA_LOGGING_REPORT, before the reply's bitmap.
    LoggingReport, 24 {
        /// First I/O virtual address.
        iova: u64,
        /// Bytes.
        length: u64,
        /// Bytes of a page.
        page_size: u64,
    }
}

impl LoggingReport {
    /// Bytes of the bitmap: bit n%64 of word n/64 is the page at `iova + n * page_size`. `None` if the range makes no sense.
    #[must_use]
    pub fn bitmap_bytes(&self) -> Option<usize> {
        let aligned = self.page_size.is_power_of_two() && self.length > 0 && self.iova.checked_add(self.length).is_some();
        let pages = aligned.then(|| self.length.div_ceil(self.page_size))?;
        usize::try_from(pages.div_ceil(64).checked_mul(8)?).ok()
    }
}

wire! {
    /// MIG_DATA_READ and MIG_DATA_WRITE, before the data.
    MigData, 8 {
        /// Bytes of this structure and the data.
        argsz: u32,
        /// Bytes of data, wanted or there.
        size: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_how_much_follows_or_nothing() {
        let header = Header::command(7, command::GET_INFO, 16);
        assert_eq!((header.size, header.payload_len(16), header.payload_len(15)), (32, Some(16), None));
        assert_eq!(Header { size: 15, ..header }.payload_len(1 << 20), None);
        let reply = header.error_reply(errno::EINVAL);
        assert_eq!((reply.id, reply.command, reply.size, reply.failure()), (7, command::GET_INFO, 16, Some(22)));
        assert!(reply.is_reply() && !reply.is_command() && header.reply(4).failure().is_none());
        assert_eq!(Header { error: 0, ..reply }.failure(), Some(errno::EIO));
    }

    #[test]
    fn a_bitmap_is_whole_words() {
        let report = |length, page_size| LoggingReport { iova: 0x1000, length, page_size }.bitmap_bytes();
        assert_eq!((report(4096, 4096), report(64 * 4096, 4096), report(65 * 4096, 4096)), (Some(8), Some(8), Some(16)));
        assert_eq!((report(0, 4096), report(4096, 0), report(u64::MAX, 4096), report(4096, 3000)), (None, None, None, None));
    }
}
