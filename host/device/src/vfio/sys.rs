//! The system calls of VFIO and iommufd, each with the structure that the kernel expects.
//!
//! Structures are byte-for-byte those of `linux/vfio.h` and `linux/iommufd.h`; every one that goes through [`call`] begins with
//! its own size, which is written here, so that the kernel never reads or writes past it.
#![allow(unsafe_code)]

use crate::memory::DmaBuffer;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use std::ffi::{CStr, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vfio_bindings::bindings::vfio as uapi;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Number of a request: VFIO's and iommufd's have neither direction nor size in it.
const fn request(number: u8) -> Opcode {
    ((uapi::VFIO_TYPE as Opcode) << 8) | number as Opcode
}

const fn vfio(number: u32) -> Opcode {
    request((uapi::VFIO_BASE + number) as u8)
}

pub(super) const GET_API_VERSION: Opcode = vfio(0);
pub(super) const CHECK_EXTENSION: Opcode = vfio(1);
pub(super) const SET_IOMMU: Opcode = vfio(2);
pub(super) const GROUP_GET_STATUS: Opcode = vfio(3);
const GROUP_SET_CONTAINER: Opcode = vfio(4);
const GROUP_GET_DEVICE_FD: Opcode = vfio(6);
pub(super) const DEVICE_GET_INFO: Opcode = vfio(7);
pub(super) const DEVICE_GET_REGION_INFO: Opcode = vfio(8);
pub(super) const DEVICE_GET_IRQ_INFO: Opcode = vfio(9);
const DEVICE_SET_IRQS: Opcode = vfio(10);
pub(super) const DEVICE_RESET: Opcode = vfio(11);
pub(super) const IOMMU_GET_INFO: Opcode = vfio(12);
const IOMMU_MAP_DMA: Opcode = vfio(13);
const IOMMU_UNMAP_DMA: Opcode = vfio(14);
pub(super) const DEVICE_FEATURE: Opcode = vfio(17);
const DEVICE_BIND_IOMMUFD: Opcode = vfio(18);
pub(super) const DEVICE_ATTACH_IOMMUFD_PT: Opcode = vfio(19);
pub(super) const IOAS_ALLOC: Opcode = request(0x81);
const IOAS_IOVA_RANGES: Opcode = request(0x84);
const IOAS_MAP: Opcode = request(0x85);
const IOAS_UNMAP: Opcode = request(0x86);

/// IOMMU_IOAS_MAP: at the address given, readable, writable.
const IOAS_FIXED: u32 = 1;
const IOAS_WRITABLE: u32 = 2;
const IOAS_READABLE: u32 = 4;
/// Most ranges that are asked for.
const MAX_RANGES: usize = 4096;

macro_rules! structure {
    ($(#[$meta:meta])* $name:ident, $bytes:expr, { $($field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub(super) struct $name { $(pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    };
}

structure! {
    /// vfio_group_status.
    GroupStatus, size_of::<uapi::vfio_group_status>(), { argsz: u32, flags: u32, }
}
structure! {
    /// vfio_device_attach_iommufd_pt without its later fields.
    Attach, 12, { argsz: u32, flags: u32, pt: u32, }
}
structure! {
    /// vfio_device_feature with PCI_VF_TOKEN.
    VfToken, 24, { argsz: u32, flags: u32, uuid: [u8; 16], }
}
structure! {
    /// iommu_ioas_alloc.
    IoasAlloc, 12, { size: u32, flags: u32, ioas: u32, }
}
structure! {
    /// vfio_device_bind_iommufd.
    Bind, size_of::<uapi::vfio_device_bind_iommufd>(), { argsz: u32, flags: u32, iommufd: i32, device: u32, token: u64, }
}
structure! {
    /// vfio_iommu_type1_dma_map.
    MapDma, size_of::<uapi::vfio_iommu_type1_dma_map>(), { argsz: u32, flags: u32, vaddr: u64, iova: u64, len: u64, }
}
structure! {
    /// vfio_iommu_type1_dma_unmap.
    UnmapDma, 24, { argsz: u32, flags: u32, iova: u64, len: u64, }
}
structure! {
    /// iommu_ioas_map.
    IoasMap, 40, { size: u32, flags: u32, ioas: u32, reserved: u32, vaddr: u64, len: u64, iova: u64, }
}
structure! {
    /// iommu_ioas_unmap.
    IoasUnmap, 24, { size: u32, ioas: u32, iova: u64, len: u64, }
}
structure! {
    /// iommu_ioas_iova_ranges.
    IovaRanges, 32, { size: u32, ioas: u32, count: u32, reserved: u32, ranges: u64, alignment: u64, }
}
structure! {
    /// vfio_iova_range, iommu_iova_range: the last address belongs to it.
    Range, size_of::<uapi::vfio_iova_range>(), { first: u64, last: u64, }
}

/// A request with an argument of a pointer's size.
struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the argument is passed on as it is, and what the kernel returns is returned. Whether it is valid for the request is the
// promise of whoever makes a `Call`, all of whom are in this file.
unsafe impl Ioctl for Call {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

fn raw(fd: BorrowedFd<'_>, opcode: Opcode, argument: *mut c_void) -> io::Result<i32> {
    // SAFETY: callers pass a number, or a pointer to memory that the request may use for as long as the call lasts.
    Ok(unsafe { rustix::ioctl::ioctl(fd, Call { opcode, argument })? })
}

/// A request whose argument is a number.
pub(super) fn number(fd: BorrowedFd<'_>, opcode: Opcode, value: usize) -> io::Result<i32> {
    debug_assert!([GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, DEVICE_RESET].contains(&opcode), "a request with a pointer");
    raw(fd, opcode, std::ptr::without_provenance_mut(value))
}

/// A request whose argument is a structure without pointers in it. Its first word becomes its size.
pub(super) fn call<T: FromBytes + IntoBytes + Immutable>(fd: BorrowedFd<'_>, opcode: Opcode, value: &mut T) -> io::Result<i32> {
    call_bytes(fd, opcode, value.as_mut_bytes())
}

/// The same for a structure that is followed by more. The memory is aligned as the structure wants.
pub(super) fn call_bytes(fd: BorrowedFd<'_>, opcode: Opcode, bytes: &mut [u8]) -> io::Result<i32> {
    let size = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    bytes.get_mut(..4).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(&size.to_ne_bytes());
    raw(fd, opcode, bytes.as_mut_ptr().cast())
}

/// VFIO_GROUP_SET_CONTAINER.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let mut fd = container.as_raw_fd();
    raw(group, GROUP_SET_CONTAINER, (&raw mut fd).cast()).map(drop)
}

/// VFIO_GROUP_GET_DEVICE_FD, with the name of a device and its options.
pub(super) fn device_of_group(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let fd = raw(group, GROUP_GET_DEVICE_FD, name.as_ptr().cast_mut().cast())?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// VFIO_DEVICE_SET_IRQS with eventfds for the vectors from 0 on; none switch the index off. Returns how many vectors there could
/// be where the kernel has fewer (0 = done).
pub(super) fn set_irqs(device: BorrowedFd<'_>, index: u32, lines: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let data = if lines.is_empty() { uapi::VFIO_IRQ_SET_DATA_NONE } else { uapi::VFIO_IRQ_SET_DATA_EVENTFD };
    let flags = data | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut words = vec![0, flags, index, 0, lines.len() as u32];
    words.extend(lines.iter().map(|line| line.as_raw_fd() as u32));
    let fewer = call_bytes(device, DEVICE_SET_IRQS, words.as_mut_slice().as_mut_bytes())?;
    Ok(usize::try_from(fewer).unwrap_or(0))
}

/// VFIO_DEVICE_BIND_IOMMUFD, with a VF token where one is needed.
pub(super) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>, token: Option<&[u8; 16]>) -> io::Result<()> {
    let mut bind = Bind { iommufd: iommufd.as_raw_fd(), ..Bind::default() };
    if let Some(token) = token {
        bind.flags = uapi::VFIO_DEVICE_BIND_FLAG_TOKEN;
        bind.token = token.as_ptr() as u64;
    }
    // Kernels that do not know tokens take the structure as it was before.
    let len = if token.is_some() { size_of::<Bind>() } else { 16 };
    call_bytes(device, DEVICE_BIND_IOMMUFD, &mut bind.as_mut_bytes()[..len]).map(drop)
}

/// The address and the length that the kernel is told of a mapping: whole pages. The last page of an arena is mapped as a whole,
/// whatever the arena has of it.
fn pages(memory: &DmaBuffer) -> (u64, u64) {
    let address = memory.arena().address(memory.offset(), memory.len()) as u64;
    (address, whole_pages(memory.len() as u64))
}

/// Bytes of the pages that hold so many bytes.
pub(super) fn whole_pages(len: u64) -> u64 {
    len.next_multiple_of(crate::memory::PAGE as u64)
}

/// VFIO_IOMMU_MAP_DMA.
pub(super) fn map_dma(container: BorrowedFd<'_>, iova: u64, memory: &DmaBuffer, writable: bool) -> io::Result<()> {
    let (vaddr, len) = pages(memory);
    let write = if writable { uapi::VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
    let mut map = MapDma { argsz: 0, flags: uapi::VFIO_DMA_MAP_FLAG_READ | write, vaddr, iova, len };
    call(container, IOMMU_MAP_DMA, &mut map).map(drop)
}

/// VFIO_IOMMU_UNMAP_DMA.
pub(super) fn unmap_dma(container: BorrowedFd<'_>, iova: u64, memory: &DmaBuffer) -> io::Result<()> {
    let len = pages(memory).1;
    let mut unmap = UnmapDma { iova, len, ..UnmapDma::default() };
    call(container, IOMMU_UNMAP_DMA, &mut unmap)?;
    if unmap.len == len { Ok(()) } else { Err(io::Error::other(format!("{} of {len} bytes were unmapped", unmap.len))) }
}

/// IOMMU_IOAS_MAP.
pub(super) fn ioas_map(iommufd: BorrowedFd<'_>, ioas: u32, iova: u64, memory: &DmaBuffer, writable: bool) -> io::Result<()> {
    let (vaddr, len) = pages(memory);
    let write = if writable { IOAS_WRITABLE } else { 0 };
    let mut map = IoasMap { flags: IOAS_FIXED | IOAS_READABLE | write, ioas, vaddr, len, iova, ..IoasMap::default() };
    call(iommufd, IOAS_MAP, &mut map).map(drop)
}

/// IOMMU_IOAS_UNMAP.
pub(super) fn ioas_unmap(iommufd: BorrowedFd<'_>, ioas: u32, iova: u64, memory: &DmaBuffer) -> io::Result<()> {
    let mut unmap = IoasUnmap { ioas, iova, len: pages(memory).1, ..IoasUnmap::default() };
    call(iommufd, IOAS_UNMAP, &mut unmap).map(drop)
}

/// IOMMU_IOAS_IOVA_RANGES.
pub(super) fn ioas_ranges(iommufd: BorrowedFd<'_>, ioas: u32) -> io::Result<Vec<Range>> {
    let mut ranges = vec![Range::default(); 64];
    loop {
        let at = ranges.as_mut_ptr() as u64;
        let mut ask = IovaRanges { ioas, count: ranges.len() as u32, ranges: at, ..IovaRanges::default() };
        match call(iommufd, IOAS_IOVA_RANGES, &mut ask) {
            Ok(_) => {
                ranges.truncate(ask.count as usize);
                return Ok(ranges);
            }
            // It says how many there are.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                let count = ask.count as usize;
                if count <= ranges.len() || count > MAX_RANGES {
                    return Err(error);
                }
                ranges.resize(count, Range::default());
            }
            Err(error) => return Err(error),
        }
    }
}

/// Keeps memory where it is: for a device that sees physical addresses.
pub(super) fn lock_memory(memory: &DmaBuffer) -> io::Result<()> {
    let (address, len) = pages(memory);
    // SAFETY: a mapping of an arena that the caller holds; locking changes nothing of what it contains.
    unsafe { rustix::mm::mlock(address as *mut c_void, len as usize)? };
    Ok(())
}

/// The address of memory in this process, to look it up in the page map.
pub(super) fn address_of(memory: &DmaBuffer) -> (u64, u64) {
    pages(memory)
}

/// A descriptor of a file that is read and written.
pub(super) fn open(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
}

/// Reads bytes of a device's region; all of them, or an error.
pub(super) fn read_at(fd: impl AsFd, at: u64, into: &mut [u8]) -> io::Result<()> {
    match rustix::io::pread(fd, &mut *into, at)? {
        read if read == into.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Writes bytes of a device's region; all of them, or an error.
pub(super) fn write_at(fd: impl AsFd, at: u64, from: &[u8]) -> io::Result<()> {
    match rustix::io::pwrite(fd, from, at)? {
        written if written == from.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
