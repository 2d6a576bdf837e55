//! What a discovery controller knows (Base 2.3 §5.2.12.3.1).

use super::controller::TcpInitiator;
use super::error::TcpError;
use crate::admin::{AdminData, Ticket};
use dray_device::command::SubmitError;
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::tcp::discovery::DISCOVERY_LOG;
use dray_nvme::tcp::{DiscoveryEntry, DiscoveryLogHeader};
use zerocopy::FromBytes;

/// Most entries taken from one discovery controller.
pub const MAX_ENTRIES: usize = 1024;
/// Entries of one Get Log Page.
const AT_ONCE: usize = 16;
/// How often the page may change while it is read.
const ATTEMPTS: u32 = 5;
const HEADER_BYTES: usize = size_of::<DiscoveryLogHeader>();
const ENTRY_BYTES: usize = size_of::<DiscoveryEntry>();

#[derive(Clone, Copy, Debug)]
enum Stage {
    Header,
    Entries,
    /// The header once more: the page must not have changed.
    Again,
}

/// Reads the discovery log page over an initiator that is connected to a discovery controller.
#[derive(Debug)]
pub struct DiscoveryReader {
    stage: Stage,
    ticket: Option<Ticket>,
    header: DiscoveryLogHeader,
    entries: Vec<DiscoveryEntry>,
    attempts: u32,
}

impl Default for DiscoveryReader {
    fn default() -> Self {
        Self::new()
    }
}

impl DiscoveryReader {
    /// Nothing is read yet.
    #[must_use]
    pub fn new() -> Self {
        let header = DiscoveryLogHeader::default();
        Self { stage: Stage::Header, ticket: None, header, entries: Vec::new(), attempts: 0 }
    }

    /// Goes on; the entries once all have been read from an unchanged page.
    pub fn poll(&mut self, now: Time, initiator: &mut TcpInitiator) -> Option<Result<Vec<DiscoveryEntry>, TcpError>> {
        let Some(ticket) = self.ticket else { return self.ask(now, initiator).err().map(Err) };
        let answer = initiator.answer(ticket)?;
        self.ticket = None;
        if answer.completion.status.is_error() {
            let (command, status) = ("Get Log Page (Discovery)", answer.completion.status);
            return Some(Err(TcpError::Refused { command, status }));
        }
        match self.take(&answer.data) {
            Ok(true) => Some(Ok(std::mem::take(&mut self.entries))),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }

    fn wanted(&self) -> usize {
        self.header.numrec as usize
    }

    fn ask(&mut self, now: Time, initiator: &mut TcpInitiator) -> Result<(), TcpError> {
        let (offset, bytes) = match self.stage {
            Stage::Header | Stage::Again => (0, HEADER_BYTES),
            Stage::Entries => {
                let more = (self.wanted() - self.entries.len()).min(AT_ONCE);
                (HEADER_BYTES + self.entries.len() * ENTRY_BYTES, more * ENTRY_BYTES)
            }
        };
        let entry = SubmissionEntry::get_log_page(DISCOVERY_LOG, 0, offset as u64, (bytes / 4) as u32, false);
        match initiator.request(now, &entry, AdminData::In(bytes)) {
            Ok(ticket) => self.ticket = Some(ticket),
            Err(SubmitError::Full) => {}
            Err(_) => return Err(TcpError::NoQueue("the association is not ready")),
        }
        Ok(())
    }

    /// Whether everything has been read.
    fn take(&mut self, data: &[u8]) -> Result<bool, TcpError> {
        match self.stage {
            Stage::Header => {
                self.header = header(data)?;
                self.entries.clear();
                self.stage = if self.wanted() == 0 { Stage::Again } else { Stage::Entries };
            }
            Stage::Entries => {
                for bytes in data.chunks_exact(ENTRY_BYTES) {
                    self.entries.extend(DiscoveryEntry::read_from_bytes(bytes).ok());
                }
                if self.entries.len() >= self.wanted() {
                    self.stage = Stage::Again;
                }
            }
            Stage::Again => {
                if header(data)?.genctr == self.header.genctr {
                    return Ok(true);
                }
                self.attempts += 1;
                if self.attempts == ATTEMPTS {
                    return Err(TcpError::TimedOut("reading an unchanging discovery log page"));
                }
                self.stage = Stage::Header;
            }
        }
        Ok(false)
    }
}

fn header(data: &[u8]) -> Result<DiscoveryLogHeader, TcpError> {
    let (header, _) = DiscoveryLogHeader::read_from_prefix(data)
        .map_err(|_| TcpError::Unsupported("the discovery log page is too short"))?;
    if header.recfmt != 0 || header.numrec > MAX_ENTRIES as u64 {
        return Err(TcpError::Unsupported("the discovery log page has another format, or too many entries"));
    }
    Ok(header)
}
