//! What can go wrong with passthrough, and what to do about it.

use dray_device::command::SubmitError;
use dray_device::memory::MemoryError;
use dray_device::passthru::{HostFault, SetupError};
use dray_nvme::status::Status;
use std::io;
use std::path::PathBuf;

/// Why a device cannot be used by passthrough.
#[derive(Debug, thiserror::Error)]
pub enum PassthruError {
    /// Nothing has that name.
    #[error("{path}: no such device; {there}")]
    NoSuchDevice {
        /// What was named.
        path: PathBuf,
        /// What there is instead, in words.
        there: String,
    },
    /// The process may not open it, or may not send the command that was needed.
    #[error("{path}: no permission: run as root, or let a udev rule give the device to this user and give the process CAP_SYS_ADMIN")]
    NoPermission {
        /// What was named.
        path: PathBuf,
    },
    /// The kernel has no such namespace of a controller.
    #[error("{path}: the kernel has no namespace {nsid} of this controller: is it attached, and active?")]
    NoNamespace {
        /// The controller.
        path: PathBuf,
        /// The namespace.
        nsid: u32,
    },
    /// A block device was named.
    #[error("{path} is a block device: passthrough goes by the namespace's character device, {right}")]
    BlockDevice {
        /// What was named.
        path: PathBuf,
        /// What is right.
        right: PathBuf,
    },
    /// A controller was named where a namespace is needed.
    #[error("{path} is a controller, which takes admin commands only: name a namespace; {there}")]
    IsController {
        /// What was named.
        path: PathBuf,
        /// Its namespaces, in words.
        there: String,
    },
    /// A namespace was named where a controller is needed.
    #[error("{path} is a namespace: admin commands go to its controller, {right}")]
    IsNamespace {
        /// What was named.
        path: PathBuf,
        /// What is right.
        right: PathBuf,
    },
    /// Something else was named.
    #[error("{path} is no NVMe device: name a namespace (/dev/ng0n1) or a controller (/dev/nvme0)")]
    NotNvme {
        /// What was named.
        path: PathBuf,
    },
    /// There is no ring to be had.
    #[error("{path}: {source}; {}", setup_help(.source))]
    Setup {
        /// What was named.
        path: PathBuf,
        /// Why.
        source: SetupError,
    },
    /// The kernel's driver does not take commands by io_uring.
    #[error("{path}: the kernel's driver takes no such commands by io_uring: namespaces need Linux 5.19, controllers 6.0")]
    Unsupported {
        /// What was named.
        path: PathBuf,
    },
    /// The kernel's error for anything else.
    #[error("{path}: {source}")]
    Kernel {
        /// What was named.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A command was refused by the device.
    #[error("{path}: {command}: {status}")]
    Refused {
        /// What was named.
        path: PathBuf,
        /// Which command.
        command: &'static str,
        /// The device's answer.
        status: Status,
    },
    /// A command did not reach the device, or nobody knows how it ended.
    #[error("{path}: {command}: {fault}")]
    Host {
        /// What was named.
        path: PathBuf,
        /// Which command.
        command: &'static str,
        /// Why.
        fault: HostFault,
    },
    /// What the device says of itself is not usable.
    #[error("{path}: {what}")]
    Unusable {
        /// What was named.
        path: PathBuf,
        /// Why not.
        what: &'static str,
    },
    /// A command cannot be sent.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn setup_help(error: &SetupError) -> &'static str {
    match error {
        SetupError::Missing => "it was built without CONFIG_IO_URING: use another kernel",
        SetupError::Forbidden => "`sysctl kernel.io_uring_disabled=0`, or 1 and a member of its group, lets it",
        SetupError::TooOld => "use a newer kernel",
        SetupError::Other(_) => "is the limit of locked memory (RLIMIT_MEMLOCK) too low?",
    }
}
