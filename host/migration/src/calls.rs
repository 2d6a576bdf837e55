//! Admin commands that belong together: sent as the queue takes them, over when all are answered.

use crate::mmc::{Answer, Health, Mmc};
use dray_device::command::SubmitError;
use dray_device::poll::Time;
use dray_driver::AdminData;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;

/// Data of a call, owned.
#[derive(Clone, Debug)]
pub(crate) enum Data {
    None,
    In(usize),
    Out(Vec<u8>),
}

#[derive(Debug)]
struct Call {
    entry: SubmissionEntry,
    data: Data,
    ticket: Option<u64>,
    answer: Option<Answer>,
}

/// A set of admin commands.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    calls: Vec<Call>,
}

impl Calls {
    /// One command without data each.
    pub(crate) fn plain(entries: impl IntoIterator<Item = SubmissionEntry>) -> Self {
        let mut calls = Self::default();
        entries.into_iter().for_each(|entry| calls.push(entry, Data::None));
        calls
    }

    pub(crate) fn push(&mut self, entry: SubmissionEntry, data: Data) {
        self.calls.push(Call { entry, data, ticket: None, answer: None });
    }

    /// Sends what can be sent, takes what is answered; true when all are.
    pub(crate) fn poll(&mut self, now: Time, mmc: &mut dyn Mmc) -> bool {
        let health = mmc.health();
        let mut open = 0;
        for call in &mut self.calls {
            if call.answer.is_some() {
                continue;
            }
            if call.ticket.is_none() && health == Health::Ready {
                call.send(now, mmc);
            }
            if let Some(ticket) = call.ticket {
                call.answer = mmc.answer(ticket);
            }
            // Whoever fails answers everything that was sent; what was not sent never will be.
            if call.answer.is_none() && matches!(health, Health::Failed(_)) {
                call.answer = Some(unanswered(call.ticket.is_some()));
            }
            open += usize::from(call.answer.is_none());
        }
        open == 0
    }

    /// The answers, in order, of calls that are over.
    pub(crate) fn answers(&self) -> impl Iterator<Item = &Answer> {
        self.calls.iter().filter_map(|call| call.answer.as_ref())
    }

    /// The first answer that is not a success.
    pub(crate) fn failure(&self) -> Option<&Answer> {
        self.answers().find(|answer| answer.unknown || answer.status.is_error())
    }
}

impl Call {
    fn send(&mut self, now: Time, mmc: &mut dyn Mmc) {
        let data = match &self.data {
            Data::None => AdminData::None,
            Data::In(bytes) => AdminData::In(*bytes),
            Data::Out(bytes) => AdminData::Out(bytes),
        };
        match mmc.request(now, &self.entry, data) {
            Ok(ticket) => self.ticket = Some(ticket),
            Err(SubmitError::Full) => {}
            Err(SubmitError::Dead) => self.answer = Some(unanswered(false)),
            Err(SubmitError::BadData | SubmitError::NotMapped) => {
                self.answer = Some(Answer { status: Status::DATA_TRANSFER_ERROR, ..unanswered(false) });
                if let Some(answer) = &mut self.answer {
                    answer.unknown = false;
                }
            }
        }
    }
}

/// The answer of a controller that does not answer: unknown if the command had been sent.
fn unanswered(sent: bool) -> Answer {
    Answer { status: Status::ABORTED_SQ_DELETION, result: 0, unknown: sent, data: Vec::new() }
}

/// An answer in words.
pub(crate) fn words(answer: &Answer) -> String {
    if answer.unknown { "its outcome is unknown".to_owned() } else { answer.status.to_string() }
}
