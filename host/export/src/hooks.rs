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
/// begun by its method, and is over when [`poll`](Self::poll) says so; one is under way at a time. The log of written pages is
/// apart from that: its steps are over when [`poll_log`](Self::poll_log) says so.
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
    /// the media are complete.
    ///
    /// # Errors
    /// [`HookError`].
    fn resume(&mut self, now: Time) -> Result<(), HookError>;

    /// The function is to be reset, in whatever state the device is: it ends in RUNNING. What was begun here and has not been
    /// handed over yet is given up; what was brought here and does not run yet is forgotten. The function is reset in any case,
    /// so whoever must not serve is kept from it by other means than these states.
    ///
    /// # Errors
    /// [`HookError`]: there is nothing to wait for.
    fn reset(&mut self, now: Time) -> Result<(), HookError> {
        self.resume(now)
    }

    /// → STOP: suspends and drains. With `hand_over`, → STOP_COPY: also the last round, the flush and the fence.
    ///
    /// # Errors
    /// [`HookError`].
    fn stop(&mut self, now: Time, hand_over: bool) -> Result<(), HookError>;

    /// The state of the controller, once STOP_COPY has been reached, the media are complete and the source is fenced; `None`
    /// before. The end of the migration stream is withheld as long.
    ///
    /// # Errors
    /// [`HookError`] when there will be none.
    fn state(&mut self) -> Result<Option<Vec<u8>>, HookError>;

    /// STOP → RESUMING: a state is going to be brought here, so the controller must not serve meanwhile.
    ///
    /// # Errors
    /// [`HookError`].
    fn prepare(&mut self, now: Time) -> Result<(), HookError>;

    /// RESUMING → STOP: checks the whole state, then begins to take it over. The registers that belong to it are there only when
    /// that is done.
    ///
    /// # Errors
    /// [`HookError::Invalid`] when it does not fit: the device is as it was, as it is when the step fails so later.
    fn restore(&mut self, state: &[u8]) -> Result<(), HookError>;

    /// Goes on with what was begun; called again and again.
    fn poll(&mut self, now: Time) -> HookState;

    /// Whether pages that the controller writes can be logged.
    fn can_log(&self) -> bool {
        false
    }

    /// Begins to log writes to guest memory in `ranges` (I/O virtual address, bytes; none = everywhere) by pages of `page`
    /// bytes, if it can; returns the page size really used. What is written before the step is over may be missing.
    ///
    /// # Errors
    /// [`HookError`].
    fn start_logging(&mut self, ranges: &[(u64, u64)], page: u64) -> Result<u64, HookError>;

    /// Begins to ask the controller what it has written. When the step is over, everything that was written before it was begun
    /// is in what [`report_logged`](Self::report_logged) says.
    ///
    /// # Errors
    /// [`HookError`].
    fn collect_logged(&mut self) -> Result<(), HookError>;

    /// Sets the bit of every page of `page` bytes in `iova .. iova + len` that was written since the last report, as far as it
    /// has been collected, and forgets it: bit n%8 of byte n/8 of `into` is page n. `into` comes zeroed and is long enough.
    ///
    /// # Errors
    /// [`HookError`].
    fn report_logged(&mut self, iova: u64, len: u64, page: u64, into: &mut [u8]) -> Result<(), HookError>;

    /// Begins to end the log.
    ///
    /// # Errors
    /// [`HookError`].
    fn stop_logging(&mut self) -> Result<(), HookError>;

    /// Goes on with what was begun of the log; called again and again.
    fn poll_log(&mut self, now: Time) -> HookState;
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

    fn state(&mut self) -> Result<Option<Vec<u8>>, HookError> {
        Err(HookError::Unsupported)
    }

    fn prepare(&mut self, _now: Time) -> Result<(), HookError> {
        Err(HookError::Unsupported)
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

    fn collect_logged(&mut self) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }

    fn report_logged(&mut self, _iova: u64, _len: u64, _page: u64, _into: &mut [u8]) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }

    fn stop_logging(&mut self) -> Result<(), HookError> {
        Err(HookError::Unsupported)
    }

    fn poll_log(&mut self, _now: Time) -> HookState {
        HookState::Done
    }
}
