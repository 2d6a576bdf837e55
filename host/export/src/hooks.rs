//! Where a migration plugs into an export: what the migration states of vfio-user mean for the device behind them.

use dray_device::poll::Time;
use dray_device::vfio_user::wire::{errno, migration};

/// Why a step of a migration did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookError {
    /// The device cannot do this at all.
    #[error("the device cannot be migrated")]
    Unsupported,
    /// Not now: the media are not complete, or another migration is under way. The device is as it was.
    #[error("not now: {0}")]
    Busy(String),
    /// The state blob is not one that fits this device, or an argument makes no sense. The device is as it was.
    #[error("refused: {0}")]
    Invalid(String),
    /// It failed, and the device is as it was before.
    #[error("failed: {0}")]
    Failed(String),
    /// It failed, and the device is in no state that can be named: only a reset helps.
    #[error("failed, and the device has to be reset: {0}")]
    Broken(String),
}

impl HookError {
    /// The errno of the reply that reports it.
    #[must_use]
    pub fn errno(&self) -> u32 {
        match self {
            Self::Unsupported => errno::ENOTSUP,
            Self::Busy(_) => errno::EBUSY,
            Self::Invalid(_) => errno::EINVAL,
            Self::Failed(_) | Self::Broken(_) => errno::EIO,
        }
    }
}

/// How far the step that was begun last has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookState {
    /// Not done yet.
    Working,
    /// Done, or nothing was begun.
    Done,
    /// It did not happen.
    Failed(HookError),
}

/// What a migration does at the arcs of the states of VFIO (linux/vfio.h, `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`). A step is
/// begun by its method, and is over when [`poll`](Self::poll) says so; one is under way at a time.
pub trait MigrationHooks: Send {
    /// The ways of migration that there are, as bits of [`migration`]; 0 = none, and every migration request is refused.
    fn ways(&self) -> u64 {
        migration::STOP_COPY | migration::PRE_COPY
    }

    /// RUNNING → PRE_COPY: begins tracking and the media copy.
    ///
    /// # Errors
    /// [`HookError`].
    fn start_precopy(&mut self, now: Time) -> Result<(), HookError>;

    /// PRE_COPY → RUNNING: ends them without a hand-over. STOP → RUNNING: the controller goes on; at the destination only when
    /// the media are complete. A reset comes through here as well, in whatever state the device is.
    ///
    /// # Errors
    /// [`HookError`].
    fn resume(&mut self, now: Time) -> Result<(), HookError>;

    /// → STOP: suspends and drains. With `hand_over`, → STOP_COPY: also the last round, the flush and the fence.
    ///
    /// # Errors
    /// [`HookError`].
    fn stop(&mut self, now: Time, hand_over: bool) -> Result<(), HookError>;

    /// The state of the controller, once STOP_COPY has been reached, the media are complete and the source is fenced; `None`
    /// before. The end of the migration stream is withheld as long.
    fn state(&mut self) -> Option<Vec<u8>>;

    /// RESUMING → STOP: checks the whole state, then takes it over.
    ///
    /// # Errors
    /// [`HookError::Invalid`] when it does not fit: the device is as it was.
    fn restore(&mut self, state: &[u8]) -> Result<(), HookError>;

    /// Goes on with what was begun; called again and again.
    fn poll(&mut self, now: Time) -> HookState;

    /// Whether pages that the controller writes can be logged.
    fn can_log(&self) -> bool {
        false
    }

    /// Begins to log writes to guest memory in `ranges` (I/O virtual address, bytes; none = everywhere) by pages of `page`
    /// bytes, if it can; returns the page size really used.
    ///
    /// # Errors
    /// [`HookError`].
    fn start_logging(&mut self, ranges: &[(u64, u64)], page: u64) -> Result<u64, HookError>;

    /// Sets the bit of every page of `page` bytes in `iova .. iova + len` that was written since the last report, and forgets
    /// it: bit n%8 of byte n/8 of `into` is page n. `into` comes zeroed and is long enough.
    ///
    /// # Errors
    /// [`HookError`].
    fn report_logged(&mut self, iova: u64, len: u64, page: u64, into: &mut [u8]) -> Result<(), HookError>;

    /// Ends the log.
    ///
    /// # Errors
    /// [`HookError`].
    fn stop_logging(&mut self) -> Result<(), HookError>;
}

/// A device that is never migrated.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMigration;

impl MigrationHooks for NoMigration {
    fn ways(&self) -> u64 {
        0
    }

    fn start_precopy(&mut self, _now: Time) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }

    fn resume(&mut self, _now: Time) -> Result<(), HookError> {
        Ok(())
    }

    fn stop(&mut self, _now: Time, _hand_over: bool) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }

    fn state(&mut self) -> Option<Vec<u8>> {
        None
    }

    fn restore(&mut self, _state: &[u8]) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }

    fn poll(&mut self, _now: Time) -> HookState {
        HookState::Done
    }

    fn start_logging(&mut self, _ranges: &[(u64, u64)], _page: u64) -> Result<u64, HookError> {
        Err(HookError::Unsupported)
    }

    fn report_logged(&mut self, _iova: u64, _len: u64, _page: u64, _into: &mut [u8]) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }

    fn stop_logging(&mut self) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }
}
