//! What a completion entry says: the device's status, or that the kernel did not carry the command to the device, or that nobody
//! knows.

use dray_nvme::status::Status;
use rustix::io::Errno;

/// Why a command was not carried out by the device as far as the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostFault {
    /// EACCES, EPERM: the kernel keeps this command from whoever lacks the right.
    #[error("the kernel does not allow this command (it needs CAP_SYS_ADMIN, or the device opened for writing)")]
    NotAllowed,
    /// EINVAL, EFAULT, E2BIG, EMSGSIZE: another namespace, more data than the queue takes, memory that is not there.
    #[error("the kernel refuses the command as malformed ({0})")]
    Malformed(Errno),
    /// EOPNOTSUPP, ENOTTY, ENOSYS: the kernel or the device's driver has no such passthrough.
    #[error("the kernel has no such passthrough for this device ({0})")]
    Unsupported(Errno),
    /// ENOMEM, EAGAIN, EBUSY: try again.
    #[error("the kernel has no resources for the command now ({0})")]
    Busy(Errno),
    /// EINTR, ETIME, ETIMEDOUT, ECANCELED: it timed out, or the kernel reset the controller under it.
    #[error("the command timed out, or the kernel reset the controller under it ({0})")]
    Cancelled(Errno),
    /// ENODEV, ENXIO, EIO and all others: the device, or the way to it, has gone.
    #[error("the device has gone, or fails ({0})")]
    Gone(Errno),
    /// The kernel did not give the command back long after its time-out.
    #[error("the kernel has not given the command back long after its time-out")]
    Overdue,
    /// A completion that no command of ours belongs to, or a value that none can have.
    #[error("a completion that makes no sense came out of the ring")]
    Nonsense,
}

impl HostFault {
    /// What an errno of a completion means.
    #[must_use]
    pub const fn of(errno: Errno) -> Self {
        match errno {
            Errno::ACCESS | Errno::PERM => Self::NotAllowed,
            Errno::INVAL | Errno::FAULT | Errno::TOOBIG | Errno::MSGSIZE => Self::Malformed(errno),
            Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS => Self::Unsupported(errno),
            Errno::NOMEM | Errno::AGAIN | Errno::BUSY => Self::Busy(errno),
            Errno::INTR | Errno::TIME | Errno::TIMEDOUT | Errno::CANCELED => Self::Cancelled(errno),
            other => Self::Gone(other),
        }
    }

    /// Whether the device has never seen the command, for certain: the kernel says these before it sends anything.
    #[must_use]
    pub const fn is_refusal(self) -> bool {
        matches!(self, Self::NotAllowed | Self::Malformed(_) | Self::Unsupported(_) | Self::Busy(_))
    }

    /// The status that stands for it where only a status can be given: one of those that hosts make (Base 2.3 §4.2.3.4), never one
    /// that could be the device's.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            Self::Busy(_) => Status::HOST_PATHING_ERROR,
            Self::NotAllowed | Self::Malformed(_) | Self::Unsupported(_) => Status::HOST_PATHING_ERROR.with_dnr(),
            Self::Cancelled(_) | Self::Gone(_) | Self::Overdue | Self::Nonsense => Status::ABORTED_BY_HOST,
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The device has answered.
    Answered {
        /// Its status.
        status: Status,
        /// DW1:DW0 of its completion entry.
        result: u64,
    },
    /// The device has not seen it: nothing has happened.
    NotSent(HostFault),
    /// The device may have carried it out or not.
    Unknown(HostFault),
}

impl Outcome {
    /// Reads a completion entry. A positive `res` is the status field of the device (15 bits: SC, SCT, CRD, More, DNR), or one
    /// that the kernel made for a command that it took back from a controller that was reset or lost (SCT 3, SC 70h to 7Fh): what
    /// became of such a command nobody knows.
    #[must_use]
    pub fn of(res: i32, result: u64) -> Self {
        let Ok(field) = u32::try_from(res) else {
            let errno = Errno::from_raw_os_error(res.checked_neg().filter(|errno| *errno < 4096).unwrap_or(EIO));
            let fault = HostFault::of(errno);
            return if fault.is_refusal() { Self::NotSent(fault) } else { Self::Unknown(fault) };
        };
        match u16::try_from(field) {
            Ok(bits) if bits <= 0x7fff => {
                let status = Status::from_bits(bits);
                if status.sct().0 == 3 && status.sc() >= 0x70 {
                    Self::Unknown(HostFault::Cancelled(Errno::CANCELED))
                } else {
                    Self::Answered { status, result }
                }
            }
            _ => Self::Unknown(HostFault::Nonsense),
        }
    }

    /// Whether the queue is of no more use after it: the kernel has reset the controller, or it has gone.
    #[must_use]
    pub const fn is_fatal(&self) -> Option<HostFault> {
        match self {
            Self::Unknown(fault) => Some(*fault),
            Self::Answered { .. } | Self::NotSent(_) => None,
        }
    }
}

const EIO: i32 = 5;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_status_keeps_its_type_code_and_bits() {
        let outcome = Outcome::of(0x4002, 5);
        assert_eq!(outcome, Outcome::Answered { status: Status::INVALID_FIELD.with_dnr(), result: 5 });
        assert_eq!(Outcome::of(0, u64::MAX), Outcome::Answered { status: Status::SUCCESS, result: u64::MAX });
        let vendor = Outcome::of(0x7c1, 0);
        assert_eq!(vendor, Outcome::Answered { status: Status::new(7, 0xc1), result: 0 });
    }

    #[test]
    fn what_the_kernel_refused_has_not_happened_and_all_else_is_unknown() {
        for errno in [1, 7, 11, 12, 13, 14, 16, 22, 25, 38, 95] {
            assert!(matches!(Outcome::of(-errno, 0), Outcome::NotSent(fault) if fault.is_refusal()), "{errno}");
        }
        for errno in [4, 5, 6, 19, 28, 62, 84, 110, 121, 125, 4095] {
            assert!(matches!(Outcome::of(-errno, 0), Outcome::Unknown(fault) if !fault.is_refusal()), "{errno}");
        }
        // Made by the kernel for commands of a controller that it has reset.
        for bits in [0x370, 0x371, 0x4371] {
            assert!(matches!(Outcome::of(bits, 0), Outcome::Unknown(HostFault::Cancelled(_))), "{bits:#x}");
        }
        // ANA statuses are the device's.
        assert!(matches!(Outcome::of(0x302, 0), Outcome::Answered { .. }));
        assert_eq!(Outcome::of(0x8000, 0), Outcome::Unknown(HostFault::Nonsense));
        assert_eq!(Outcome::of(i32::MAX, 0), Outcome::Unknown(HostFault::Nonsense));
    }

    proptest! {
        #[test]
        fn nothing_but_zero_is_a_success(res: i32, result: u64) {
            match Outcome::of(res, result) {
                Outcome::Answered { status, result: kept } => {
                    prop_assert_eq!((i32::from(status.into_bits()), kept), (res, result));
                    prop_assert_eq!(status.is_error(), res != 0);
                }
                Outcome::NotSent(fault) => prop_assert!(res < 0 && fault.status().is_error()),
                Outcome::Unknown(fault) => prop_assert!(res != 0 && fault.status().is_error()),
            }
        }
    }
}
