//! The other end of a media move whose copy no controller stands before.

use crate::mmc::{Answer, Health, Mmc, Notice, QueueState, Trust};
use crate::queue::{EntryQueue, QueueError};
use dray_device::command::{CommandQueue, SubmitError};
use dray_device::poll::{Progress, Time};
use dray_driver::AdminData;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{IdentifyController, IdentifyControllerNvm};

/// No controller: nothing can be asked of it, and nothing of it ever fails.
#[derive(Debug)]
pub(crate) struct Nobody;

const NONE: &str = "there is no controller";

impl Mmc for Nobody {
    fn poll(&mut self, _now: Time) -> Progress {
        Progress::IDLE
    }
    fn health(&self) -> Health {
        Health::Ready
    }
    fn identify(&self) -> Option<&IdentifyController> {
        None
    }
    fn identify_nvm(&self) -> Option<&IdentifyControllerNvm> {
        None
    }
    fn trust(&self) -> Trust {
        Trust::Tested
    }
    fn admin_limit(&self) -> usize {
        4096
    }
    fn request(&mut self, _now: Time, _entry: &SubmissionEntry, _data: AdminData<'_>) -> Result<u64, SubmitError> {
        Err(SubmitError::Dead)
    }
    fn answer(&mut self, _ticket: u64) -> Option<Answer> {
        None
    }
    fn outstanding(&self) -> usize {
        0
    }
    fn next_notice(&mut self) -> Option<Notice> {
        None
    }
    fn forbid_reset(&mut self, _forbid: bool) {}
    fn reset(&mut self, _now: Time) {}
    fn generation(&self) -> u32 {
        0
    }
    fn create_queue(&mut self, _now: Time, _cntlid: u16, _slots: u32) -> Result<usize, QueueError> {
        Err(QueueError::Gone(NONE.to_owned()))
    }
    fn queue_state(&self, _key: usize) -> QueueState {
        QueueState::Gone(NONE.to_owned())
    }
    fn delete_queue(&mut self, _now: Time, _key: usize) {}
    fn with_queue(&mut self, _key: usize, _with: &mut dyn FnMut(&mut dyn EntryQueue)) {}
    fn create_io_queue(&mut self, _now: Time) -> Result<(), SubmitError> {
        Err(SubmitError::Dead)
    }
    fn io_queue(&mut self) -> Option<Result<Box<dyn CommandQueue>, String>> {
        None
    }
}
