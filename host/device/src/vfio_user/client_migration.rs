//! The device features of a vfio-user function as a client sees them: the states of a migration, its stream, the log of pages
//! that the function wrote.

use super::client::VfioUserClient;
use super::client_link::{ClientError, Request};
use super::wire::{DeviceFeature, LogRange, LoggingReport, LoggingStart, MigData, MigDeviceState, command, feature};
use zerocopy::IntoBytes;

const HEAD: usize = size_of::<DeviceFeature>();
const MIG_HEAD: usize = size_of::<MigData>();

impl VfioUserClient {
    /// Reads a feature (DEVICE_FEATURE with GET): sends `data`, and takes at most `room` bytes back.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the server does not have it; otherwise the connection's end.
    pub fn feature_get(&self, index: u32, data: &[u8], room: usize) -> Result<Vec<u8>, ClientError> {
        self.feature(index & DeviceFeature::INDEX | DeviceFeature::GET, data, room.max(data.len()))
    }

    /// Writes a feature (DEVICE_FEATURE with SET); what the server echoes comes back.
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn feature_set(&self, index: u32, data: &[u8]) -> Result<Vec<u8>, ClientError> {
        self.feature(index & DeviceFeature::INDEX | DeviceFeature::SET, data, data.len())
    }

    /// Whether the server has the methods (GET, SET) of a feature.
    ///
    /// # Errors
    /// The connection's end.
    pub fn feature_probe(&self, index: u32, methods: u32) -> Result<bool, ClientError> {
        let flags = index & DeviceFeature::INDEX | methods & (DeviceFeature::GET | DeviceFeature::SET) | DeviceFeature::PROBE;
        match self.feature(flags, &[], 0) {
            Ok(_) => Ok(true),
            Err(ClientError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn feature(&self, flags: u32, data: &[u8], room: usize) -> Result<Vec<u8>, ClientError> {
        let limit = self.max_data() as usize;
        if data.len() > limit || room > limit {
            return Err(ClientError::Limit("feature of that size"));
        }
        let head = DeviceFeature { argsz: (HEAD + room) as u32, flags };
        let payload = [head.as_bytes(), data];
        let request = Request { command: command::DEVICE_FEATURE, payload, fds: &[], reply: (HEAD, HEAD + room) };
        self.link().call(&request, |reply, _| {
            let (echo, data) = DeviceFeature::take(reply).ok_or(ClientError::Protocol("a feature without header"))?;
            if echo.flags != flags {
                return Err(ClientError::Protocol("another feature"));
            }
            Ok(data.to_vec())
        })
    }

    /// The connection's end, as after any other answer that makes no sense.
    fn broke(&self, what: &'static str) -> ClientError {
        self.link().close(&ClientError::Protocol(what));
        ClientError::Protocol(what)
    }

    /// The ways of migration there are, as bits of [`migration`](super::wire::migration).
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn migration_ways(&self) -> Result<u64, ClientError> {
        let data = self.feature_get(feature::MIGRATION, &[], 8)?;
        let word = data.first_chunk().ok_or_else(|| self.broke("a short feature"))?;
        Ok(u64::from_le_bytes(*word))
    }

    /// The state of the migration, see [`state`](super::wire::state).
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn migration_state(&self) -> Result<u32, ClientError> {
        let data = self.feature_get(feature::MIG_DEVICE_STATE, &[], size_of::<MigDeviceState>())?;
        let (state, _) = MigDeviceState::take(&data).ok_or_else(|| self.broke("a short feature"))?;
        Ok(state.state)
    }

    /// Asks for a state of the migration. The server answers when it has been reached, or refuses.
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn set_migration_state(&self, state: u32) -> Result<(), ClientError> {
        let wanted = MigDeviceState { state, data_fd: 0 };
        self.feature_set(feature::MIG_DEVICE_STATE, wanted.as_bytes()).map(drop)
    }

    /// Appends at most `most` bytes of the migration's stream to `into` (MIG_DATA_READ), and returns how many came. Fewer than
    /// asked for (that is `most`, or the largest count agreed) is the stream's end, or in PRE_COPY nothing more for now.
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn mig_read(&self, most: u32, into: &mut Vec<u8>) -> Result<u32, ClientError> {
        let size = most.min(self.max_data());
        let ask = MigData { argsz: MIG_HEAD as u32 + size, size };
        let reply = (MIG_HEAD, MIG_HEAD + size as usize);
        let request = Request { reply, ..Request::new(command::MIG_DATA_READ, ask.as_bytes(), 0) };
        self.link().call(&request, |reply, _| {
            let (head, data) = MigData::take(reply).ok_or(ClientError::Protocol("migration data without header"))?;
            if head.size as usize != data.len() {
                return Err(ClientError::Protocol("migration data of another size"));
            }
            into.extend_from_slice(data);
            Ok(head.size)
        })
    }

    /// Writes bytes of the migration's stream (MIG_DATA_WRITE), in pieces of the agreed size.
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn mig_write(&self, data: &[u8]) -> Result<(), ClientError> {
        for piece in data.chunks(self.max_data() as usize) {
            let head = MigData { argsz: (MIG_HEAD + piece.len()) as u32, size: piece.len() as u32 };
            let payload = [head.as_bytes(), piece];
            let request = Request { payload, ..Request::lax(command::MIG_DATA_WRITE, &[]) };
            self.link().call(&request, |_, _| Ok(()))?;
        }
        Ok(())
    }

    /// Starts the log of pages that the function writes, in these ranges of I/O virtual addresses (none = all). Returns the
    /// page size that the server uses, bytes.
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn logging_start(&self, page_size: u64, ranges: &[LogRange]) -> Result<u64, ClientError> {
        let count = u32::try_from(ranges.len()).map_err(|_| ClientError::Limit("log of so many ranges"))?;
        let start = LoggingStart { page_size, ranges: count, reserved: 0 };
        let echo = self.feature_set(feature::DMA_LOGGING_START, &[start.as_bytes(), ranges.as_bytes()].concat())?;
        let (echo, _) = LoggingStart::take(&echo).ok_or_else(|| self.broke("a short feature"))?;
        if !echo.page_size.is_power_of_two() {
            return Err(self.broke("a log of pages of no size"));
        }
        Ok(echo.page_size)
    }

    /// Stops the log.
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn logging_stop(&self) -> Result<(), ClientError> {
        self.feature_set(feature::DMA_LOGGING_STOP, &[]).map(drop)
    }

    /// Reads the log of `length` bytes from `iova` and clears it: bit n%8 of byte n/8 is the page at `iova + n * page_size`.
    ///
    /// # Errors
    /// As [`feature_get`](Self::feature_get).
    pub fn logging_report(&self, iova: u64, length: u64, page_size: u64) -> Result<Vec<u8>, ClientError> {
        let ask = LoggingReport { iova, length, page_size };
        let bytes = ask.bitmap_bytes().ok_or(ClientError::Limit("log of such a range"))?;
        let head = size_of::<LoggingReport>();
        let room = head.checked_add(bytes).ok_or(ClientError::Limit("log of such a range"))?;
        let mut report = self.feature_get(feature::DMA_LOGGING_REPORT, ask.as_bytes(), room)?;
        if report.len() != room {
            return Err(self.broke("a log of another size"));
        }
        report.drain(..head);
        Ok(report)
    }
}
