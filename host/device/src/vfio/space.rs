//! One I/O address space of the kernel, which functions join.

use super::dma::{DmaFollower, PhysicalPlacer, Target};
use super::error::VfioError;
use super::{IommuChoice, info, sys};
use crate::pci::{Inventory, PciAddress, PciFunction};
use crate::space::{AddressSpace, SpaceError};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_bindings::bindings::vfio as uapi;
use zerocopy::IntoBytes;

const CONTAINER: &str = "/dev/vfio/vfio";
const IOMMU: &str = "/dev/iommu";
const DEVICES: &str = "/dev/vfio/devices";
/// Bits of the addresses that [`AddressSpace`] takes; what devices can be given is told by the kernel.
const ADDRESS_BITS: u32 = 63;
/// Most bytes of a description of type1.
const MAX_INFO_BYTES: u32 = 64 << 10;

/// An I/O address space: the addresses that the functions in it use, and the memory behind them. Groups that have joined stay
/// until it is dropped, functions come and go.
#[derive(Debug)]
pub struct VfioSpace {
    choice: IommuChoice,
    space: AddressSpace,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    interface: Option<Interface>,
    groups: Vec<(u32, OwnedFd)>,
    /// The address space is followed: there is an IOMMU behind it.
    follows: bool,
}

/// How the kernel is spoken with.
#[derive(Clone, Debug)]
enum Interface {
    Container(Arc<OwnedFd>),
    Iommufd(Arc<OwnedFd>, u32),
    /// A container of groups without an IOMMU.
    None(Arc<OwnedFd>),
}

impl VfioSpace {
    /// An I/O address space of that kind. With [`IommuChoice::Auto`] the first function that joins decides.
    ///
    /// # Errors
    /// [`VfioError::NoInterface`], and the kernel's refusals.
    pub fn open(choice: IommuChoice) -> Result<Arc<Self>, VfioError> {
        let space = AddressSpace::new(ADDRESS_BITS);
        let interface = match choice {
            IommuChoice::Auto => {
                // It is found out now whether there is anything at all.
                if !Path::new(IOMMU).exists() {
                    open_container()?;
                }
                None
            }
            IommuChoice::Iommufd => Some(open_iommufd()?),
            IommuChoice::Type1 => Some(Interface::Container(open_container()?)),
            IommuChoice::UnsafeNone => {
                tracing::warn!(
                    "iommu = \"unsafe-none\": devices of this I/O address space can read and write ALL memory of the \
                     machine; a fault of a drive, of its firmware or of this program can destroy anything. Nothing tests this mode."
                );
                space.place_by(Box::new(PhysicalPlacer));
                Some(Interface::None(open_container()?))
            }
        };
        let state = Mutex::new(State { interface, ..State::default() });
        Ok(Arc::new(Self { choice, space, state }))
    }

    /// What was asked for.
    #[must_use]
    pub fn choice(&self) -> IommuChoice {
        self.choice
    }

    /// What is used; [`IommuChoice::Auto`] until the first function has joined.
    #[must_use]
    pub fn used(&self) -> IommuChoice {
        match self.lock().interface {
            None => IommuChoice::Auto,
            Some(Interface::Container(_)) => IommuChoice::Type1,
            Some(Interface::Iommufd(..)) => IommuChoice::Iommufd,
            Some(Interface::None(_)) => IommuChoice::UnsafeNone,
        }
    }

    /// The addresses.
    #[must_use]
    pub fn space(&self) -> &AddressSpace {
        &self.space
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a function join; its descriptor.
    pub(super) fn join(&self, function: &PciFunction, token: Option<&[u8; 16]>) -> Result<OwnedFd, VfioError> {
        let mut state = self.lock();
        let interface = match state.interface.clone() {
            Some(interface) => interface,
            None if Path::new(IOMMU).exists() && device_file(function).is_some() => open_iommufd()?,
            None => Interface::Container(open_container()?),
        };
        let device = match &interface {
            Interface::Container(container) | Interface::None(container) => {
                let bare = matches!(interface, Interface::None(_));
                self.join_group(&mut state, function, container, bare)?;
                let group = function.group.unwrap_or_default();
                let fd = state.groups.iter().find(|(number, _)| *number == group).map(|(_, fd)| fd.as_fd());
                let fd = fd.ok_or(VfioError::NoGroup(function.address))?;
                sys::device_of_group(fd, &device_name(function.address, token)).map_err(|e| refused(function.address, e))?
            }
            Interface::Iommufd(iommufd, ioas) => attach(function, iommufd, *ioas, token)?,
        };
        if let Err(source) = self.follow(&mut state, &interface) {
            return Err(VfioError::Join { address: function.address, source });
        }
        state.interface = Some(interface);
        Ok(device)
    }

    /// Puts the function's group into the container, unless it is there.
    fn join_group(&self, state: &mut State, function: &PciFunction, container: &OwnedFd, bare: bool) -> Result<(), VfioError> {
        let address = function.address;
        let number = function.group.ok_or(VfioError::NoGroup(address))?;
        if state.groups.iter().any(|(group, _)| *group == number) {
            return Ok(());
        }
        let path = if bare { format!("/dev/vfio/noiommu-{number}") } else { format!("/dev/vfio/{number}") };
        let group = sys::open(Path::new(&path)).map_err(|source| match source.kind() {
            io::ErrorKind::ResourceBusy => VfioError::InUse { address },
            io::ErrorKind::PermissionDenied => VfioError::NotPermitted { what: format!("opening {address}"), file: path.clone() },
            _ => VfioError::Kernel { what: format!("{address}: opening {path}"), source },
        })?;
        let mut status = sys::GroupStatus::default();
        sys::call(group.as_fd(), sys::GROUP_GET_STATUS, &mut status).map_err(VfioError::kernel(path.clone()))?;
        if status.flags & uapi::VFIO_GROUP_FLAGS_VIABLE == 0 {
            let others = Inventory::of_this_machine().keep_group_from_vfio(function).join(", ");
            return Err(VfioError::NotViable { address, group: number, others });
        }
        if status.flags & uapi::VFIO_GROUP_FLAGS_CONTAINER_SET != 0 {
            return Err(VfioError::InUse { address });
        }
        let what = format!("{address}: putting IOMMU group {number} into the I/O address space");
        sys::set_container(group.as_fd(), container.as_fd()).map_err(VfioError::kernel(what))?;
        let kind = if bare { uapi::VFIO_NOIOMMU_IOMMU } else { uapi::VFIO_TYPE1v2_IOMMU };
        if state.groups.is_empty() {
            let what = format!("{address}: setting the IOMMU's kind");
            sys::number(container.as_fd(), sys::SET_IOMMU, kind as usize).map_err(VfioError::kernel(what))?;
        }
        state.groups.push((number, group));
        Ok(())
    }

    /// Learns which addresses there are, now that there is one more function, and maps what is to be mapped.
    fn follow(&self, state: &mut State, interface: &Interface) -> Result<(), SpaceError> {
        let windows = match interface {
            Interface::Container(container) => type1(container)?.windows,
            Interface::Iommufd(fd, ioas) => {
                info::windows(sys::ioas_ranges(fd.as_fd(), *ioas)?.iter().map(|range| (range.first, range.last)))
            }
            Interface::None(_) => Vec::new(),
        };
        self.space.confine(&windows)?;
        if state.follows {
            return Ok(());
        }
        let target = match interface {
            Interface::Container(container) => Target::Container(Arc::clone(container)),
            Interface::Iommufd(fd, ioas) => Target::Ioas(Arc::clone(fd), *ioas),
            Interface::None(_) => Target::Physical,
        };
        self.space.follow(Box::new(DmaFollower(target)))?;
        state.follows = true;
        Ok(())
    }
}

fn open_container() -> Result<Arc<OwnedFd>, VfioError> {
    let fd = sys::open(Path::new(CONTAINER)).map_err(|source| VfioError::NoInterface { what: CONTAINER, source })?;
    let version = sys::number(fd.as_fd(), sys::GET_API_VERSION, 0).map_err(VfioError::kernel(CONTAINER))?;
    if version != uapi::VFIO_API_VERSION as i32 {
        return Err(VfioError::Space("this VFIO speaks another version of its interface"));
    }
    let has = |kind: u32| sys::number(fd.as_fd(), sys::CHECK_EXTENSION, kind as usize).is_ok_and(|has| has > 0);
    if !has(uapi::VFIO_TYPE1v2_IOMMU) && !has(uapi::VFIO_NOIOMMU_IOMMU) {
        return Err(VfioError::Space("VFIO has no type1v2 IOMMU: load the kernel module vfio_iommu_type1"));
    }
    Ok(Arc::new(fd))
}

fn open_iommufd() -> Result<Interface, VfioError> {
    let fd = sys::open(Path::new(IOMMU)).map_err(|source| VfioError::NoInterface { what: IOMMU, source })?;
    let mut alloc = sys::IoasAlloc::default();
    sys::call(fd.as_fd(), sys::IOAS_ALLOC, &mut alloc).map_err(VfioError::kernel("making an I/O address space (IOAS)"))?;
    Ok(Interface::Iommufd(Arc::new(fd), alloc.ioas))
}

/// The function's own file, where the kernel has one.
fn device_file(function: &PciFunction) -> Option<std::path::PathBuf> {
    function.vfio_device.as_ref().map(|name| Path::new(DEVICES).join(name)).filter(|path| path.exists())
}

/// Binds a function's own file to iommufd and attaches it to the IOAS.
fn attach(function: &PciFunction, iommufd: &OwnedFd, ioas: u32, token: Option<&[u8; 16]>) -> Result<OwnedFd, VfioError> {
    let address = function.address;
    let what = "the kernel has no file for it under /dev/vfio/devices, which iommufd needs";
    let path = device_file(function).ok_or(VfioError::Unsupported { address, what })?;
    let device = sys::open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => {
            VfioError::NotPermitted { what: format!("opening {address}"), file: path.display().to_string() }
        }
        _ => VfioError::Kernel { what: format!("{address}: opening {}", path.display()), source },
    })?;
    sys::bind_iommufd(device.as_fd(), iommufd.as_fd(), token).map_err(|e| refused(address, e))?;
    let mut attach = sys::Attach { pt: ioas, ..sys::Attach::default() };
    let what = format!("{address}: attaching it to the I/O address space");
    sys::call(device.as_fd(), sys::DEVICE_ATTACH_IOMMUFD_PT, &mut attach).map_err(VfioError::kernel(what))?;
    Ok(device)
}

/// What VFIO_GROUP_GET_DEVICE_FD is asked for.
fn device_name(address: PciAddress, token: Option<&[u8; 16]>) -> CString {
    let token = token.map(|token| format!(" vf_token={}", uuid(token))).unwrap_or_default();
    CString::new(format!("{address}{token}")).unwrap_or_default()
}

/// Sixteen bytes as a UUID is written.
pub(super) fn uuid(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn refused(address: PciAddress, source: io::Error) -> VfioError {
    match source.kind() {
        io::ErrorKind::ResourceBusy => VfioError::InUse { address },
        io::ErrorKind::PermissionDenied => VfioError::Unsupported {
            address,
            what: "it is refused without the right VF token: its physical function is driven through VFIO, or has virtual functions in use",
        },
        _ => VfioError::Kernel { what: format!("{address}: opening it through VFIO"), source },
    }
}

/// What type1 says of the container's addresses.
fn type1(container: &OwnedFd) -> io::Result<info::Iommu> {
    let mut words = vec![0u64; info::IOMMU_BYTES.div_ceil(8)];
    loop {
        sys::call_bytes(container.as_fd(), sys::IOMMU_GET_INFO, words.as_mut_slice().as_mut_bytes())?;
        let needed = words.first().map_or(0, |word| *word as u32);
        if needed as usize <= words.len() * 8 {
            let broken = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's description of the IOMMU leads nowhere");
            return info::Iommu::parse(words.as_bytes()).map_err(|_| broken());
        }
        if needed > MAX_INFO_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's description of the IOMMU never ends"));
        }
        words = vec![0; (needed as usize).div_ceil(8)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_asked_for_with_its_token() {
        let address: PciAddress = "0000:01:00.1".parse().expect("an address");
        assert_eq!(device_name(address, None).to_bytes(), b"0000:01:00.1");
        let token = [0x83, 0xf6, 0x92, 0x57, 0x0c, 0x9b, 0x4b, 0x4f, 0xa3, 0xe9, 0, 1, 2, 3, 4, 5];
        assert_eq!(device_name(address, Some(&token)).to_bytes(), b"0000:01:00.1 vf_token=83f69257-0c9b-4b4f-a3e9-000102030405");
    }

    #[test]
    fn a_machine_without_vfio_says_what_is_missing() {
        if Path::new(CONTAINER).exists() || Path::new(IOMMU).exists() {
            return;
        }
        for choice in [IommuChoice::Auto, IommuChoice::Type1, IommuChoice::Iommufd, IommuChoice::UnsafeNone] {
            let error = VfioSpace::open(choice).expect_err("nothing to open");
            assert!(matches!(error, VfioError::NoInterface { .. }) && error.to_string().contains("modules"), "{error}");
        }
    }
}
