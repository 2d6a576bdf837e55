//! Migration over vfio-user: the states, the stream, the log of written pages. What a step means for the device is in
//! [`MigrationHooks`]; here is the order of steps, and the stream around the controller's state.
//!
//! The stream: a [`Head`], then sections, each a [`Section`] and its bytes. Everything is checked before anything is changed.

use super::region::Regions;
use crate::hooks::{HookError, HookState, MigrationHooks};
use dray_device::poll::Time;
use dray_device::vfio_user::wire::{
    DeviceFeature, LogRange, LoggingReport, LoggingStart, MigDeviceState, errno, feature, state,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most bytes of a stream that are taken.
const MAX_STREAM: usize = 16 << 20;
const MAGIC: [u8; 8] = *b"DRAYVFIO";
const VERSION: u32 = 1;
/// The controller's state, as the hooks have it.
const CONTROLLER: u32 = 1;
/// What the server has besides: configuration space, registers, doorbells, MSI-X table.
const FUNCTION: u32 = 2;

/// The start of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: u32,
    /// CRC-32C of everything behind the head.
    crc: u32,
    /// Bytes behind the head.
    length: u64,
}

/// The start of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Section {
    kind: u32,
    reserved: u32,
    length: u64,
}

const _: () = assert!(size_of::<Head>() == 24 && size_of::<Section>() == 16);

/// The states and what belongs to them.
pub(crate) struct Migration {
    state: u32,
    /// The arc that hooks work on: its end, and the state that is wanted at last.
    arc: Option<(u32, u32)>,
    /// The function's part of a stream whose controller's part is being taken over.
    function: Option<Vec<u8>>,
    outgoing: Option<Vec<u8>>,
    /// Bytes of `outgoing` that were read.
    read: usize,
    incoming: Vec<u8>,
    logging: bool,
    log: Option<LogStep>,
    /// The log of a client that has left is being ended.
    log_ends: bool,
}

/// What hooks do about the log.
enum LogStep {
    /// Start or stop, with the reply.
    Switch(Vec<u8>),
    /// Ask the controller, for this request and so many bytes of bitmap.
    Collect(DeviceFeature, LoggingReport, usize),
}

/// What DEVICE_FEATURE comes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The reply.
    Reply(Vec<u8>),
    /// The reply, when the arcs that have begun are through.
    Later(Vec<u8>),
    /// What [`Migration::poll_log`] says.
    Log,
}

/// The next state on the way from one to another; `None` if there is no way. Never more than four steps.
fn next_step(from: u32, to: u32) -> Option<u32> {
    use state::{PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY};
    Some(match (from, to) {
        (STOP, RUNNING | PRE_COPY) => RUNNING,
        (STOP, STOP_COPY | RESUMING) | (RUNNING, PRE_COPY) | (PRE_COPY, STOP_COPY) => to,
        (RUNNING, STOP | STOP_COPY | RESUMING) => STOP,
        (STOP_COPY, STOP | RUNNING | RESUMING) => STOP,
        (RESUMING, STOP | RUNNING | STOP_COPY | PRE_COPY) => STOP,
        (PRE_COPY, STOP | RUNNING | RESUMING) => RUNNING,
        _ => return None,
    })
}

impl Migration {
    pub(crate) fn new() -> Self {
        Self {
            state: state::RUNNING,
            arc: None,
            function: None,
            outgoing: None,
            read: 0,
            incoming: Vec::new(),
            logging: false,
            log: None,
            log_ends: false,
        }
    }

    pub(crate) fn state(&self) -> u32 {
        self.state
    }

    /// DEVICE_FEATURE.
    ///
    /// # Errors
    /// An errno: EINVAL for what makes no sense, ENOTSUP for what the device cannot do, or the hook's.
    pub(crate) fn feature(
        &mut self,
        payload: &[u8],
        max_bytes: usize,
        hooks: &mut dyn MigrationHooks,
        regions: &mut Regions,
        now: Time,
    ) -> Result<Answer, u32> {
        let (head, data) = DeviceFeature::take(payload).ok_or(errno::EINVAL)?;
        let methods = head.flags & (DeviceFeature::GET | DeviceFeature::SET);
        let known = DeviceFeature::INDEX | DeviceFeature::GET | DeviceFeature::SET | DeviceFeature::PROBE;
        // SET and PROBE are answered with what was sent: the client must have room for that.
        if head.flags & !known != 0 || (head.argsz as usize) < payload.len().max(size_of::<DeviceFeature>()) {
            return Err(errno::EINVAL);
        }
        let (offered, there) = match head.index() {
            feature::MIGRATION => (DeviceFeature::GET, hooks.ways() != 0),
            feature::MIG_DEVICE_STATE => (DeviceFeature::GET | DeviceFeature::SET, hooks.ways() != 0),
            feature::DMA_LOGGING_START | feature::DMA_LOGGING_STOP => (DeviceFeature::SET, hooks.can_log()),
            feature::DMA_LOGGING_REPORT => (DeviceFeature::GET, hooks.can_log()),
            _ => return Err(errno::EINVAL),
        };
        if !there {
            return Err(errno::ENOTSUP);
        }
        if methods & !offered != 0 {
            return Err(errno::EINVAL);
        }
        if head.flags & DeviceFeature::PROBE != 0 {
            return Ok(Answer::Reply(payload.to_vec()));
        }
        match (head.index(), methods) {
            (feature::MIGRATION, DeviceFeature::GET) => got(&head, &hooks.ways().to_le_bytes()),
            (feature::MIG_DEVICE_STATE, DeviceFeature::GET) => {
                got(&head, MigDeviceState { state: self.state, data_fd: 0 }.as_bytes())
            }
            (feature::MIG_DEVICE_STATE, DeviceFeature::SET) => {
                let (wanted, _) = MigDeviceState::take(data).ok_or(errno::EINVAL)?;
                let done = self.begin(wanted.state, hooks, regions, now)?;
                Ok(if done { Answer::Reply(payload.to_vec()) } else { Answer::Later(payload.to_vec()) })
            }
            (feature::DMA_LOGGING_START, DeviceFeature::SET) => self.start_logging(&head, data, hooks),
            (feature::DMA_LOGGING_STOP, DeviceFeature::SET) => {
                if !std::mem::take(&mut self.logging) {
                    return Err(errno::EINVAL);
                }
                hooks.stop_logging().map_err(|error| error.errno())?;
                self.log = Some(LogStep::Switch(payload.to_vec()));
                Ok(Answer::Log)
            }
            (feature::DMA_LOGGING_REPORT, DeviceFeature::GET) => self.report_logged(&head, data, max_bytes, hooks),
            _ => Err(errno::EINVAL),
        }
    }

    fn start_logging(&mut self, head: &DeviceFeature, data: &[u8], hooks: &mut dyn MigrationHooks) -> Result<Answer, u32> {
        let (start, mut rest) = LoggingStart::take(data).ok_or(errno::EINVAL)?;
        let bytes = (start.ranges as usize).checked_mul(size_of::<LogRange>()).filter(|&bytes| bytes <= rest.len());
        if bytes.is_none() || !start.page_size.is_power_of_two() {
            return Err(errno::EINVAL);
        }
        if self.logging {
            return Err(errno::EBUSY);
        }
        let mut ranges = Vec::with_capacity(start.ranges as usize);
        for _ in 0..start.ranges {
            let (range, more) = LogRange::take(rest).ok_or(errno::EINVAL)?;
            if range.length == 0 || range.iova.checked_add(range.length).is_none() {
                return Err(errno::EINVAL);
            }
            ranges.push((range.iova, range.length));
            rest = more;
        }
        let page_size = hooks.start_logging(&ranges, start.page_size).map_err(|error| error.errno())?;
        self.logging = true;
        let used = LoggingStart { page_size, ..start };
        let mut reply = head.as_bytes().to_vec();
        reply.extend_from_slice(used.as_bytes());
        reply.extend_from_slice(&data[size_of::<LoggingStart>()..]);
        self.log = Some(LogStep::Switch(reply));
        Ok(Answer::Log)
    }

    fn report_logged(
        &mut self,
        head: &DeviceFeature,
        data: &[u8],
        max_bytes: usize,
        hooks: &mut dyn MigrationHooks,
    ) -> Result<Answer, u32> {
        let (report, _) = LoggingReport::take(data).ok_or(errno::EINVAL)?;
        let bytes = report.bitmap_bytes().filter(|&bytes| bytes <= max_bytes).ok_or(errno::EINVAL)?;
        if !self.logging || bytes + size_of::<DeviceFeature>() + size_of::<LoggingReport>() > head.argsz as usize {
            return Err(errno::EINVAL);
        }
        hooks.collect_logged().map_err(|error| error.errno())?;
        self.log = Some(LogStep::Collect(*head, report, bytes));
        Ok(Answer::Log)
    }

    /// Goes on with the log; `Some` with the reply when that is through.
    pub(crate) fn poll_log(&mut self, hooks: &mut dyn MigrationHooks, now: Time) -> Option<Result<Vec<u8>, u32>> {
        // A client that has left waits for nothing.
        let step = self.log.take();
        match (hooks.poll_log(now), step) {
            (_, None) => Some(Ok(Vec::new())),
            (HookState::Working, step) => {
                self.log = step;
                None
            }
            (HookState::Failed(error), Some(step)) => {
                // A log that did not start is none, and one that does not stop reports nothing any more.
                self.logging &= matches!(step, LogStep::Collect(..));
                Some(Err(error.errno()))
            }
            (HookState::Done, Some(LogStep::Switch(reply))) => Some(Ok(reply)),
            (HookState::Done, Some(LogStep::Collect(head, report, bytes))) => Some(reported(&head, &report, bytes, hooks)),
        }
    }

    /// Sets out for a state; returns whether it has been reached.
    ///
    /// # Errors
    /// An errno: EINVAL where there is no way, or the hook's.
    fn begin(&mut self, to: u32, hooks: &mut dyn MigrationHooks, regions: &mut Regions, now: Time) -> Result<bool, u32> {
        use state::{PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY};
        if !matches!(to, STOP | RUNNING | STOP_COPY | RESUMING | PRE_COPY) || self.state == state::ERROR {
            return Err(errno::EINVAL);
        }
        while self.state != to {
            let next = next_step(self.state, to).ok_or(errno::EINVAL)?;
            let waits = self.step(next, hooks, regions, now).map_err(|error| self.failed(&error))?;
            if waits {
                self.arc = Some((next, to));
                match self.poll(hooks, regions, now) {
                    None => return Ok(false),
                    Some(result) => return result.map(|()| true),
                }
            }
            self.state = next;
        }
        Ok(true)
    }

    /// Begins one arc; returns whether the hooks work on it now.
    fn step(
        &mut self,
        next: u32,
        hooks: &mut dyn MigrationHooks,
        regions: &mut Regions,
        now: Time,
    ) -> Result<bool, HookError> {
        use state::{PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY};
        if self.state == STOP_COPY {
            self.forget_stream();
        }
        match (self.state, next) {
            (RUNNING, PRE_COPY) => hooks.start_precopy(now)?,
            (RUNNING, STOP) => hooks.stop(now, false)?,
            (STOP | PRE_COPY, STOP_COPY) => hooks.stop(now, true)?,
            (STOP | PRE_COPY, RUNNING) => hooks.resume(now)?,
            (STOP, RESUMING) => {
                self.forget_stream();
                hooks.prepare(now)?;
            }
            (RESUMING, STOP) => {
                let stream = std::mem::take(&mut self.incoming);
                // Without a stream nothing has changed: the way back out of RESUMING.
                if stream.is_empty() {
                    return Ok(false);
                }
                self.function = Some(take_over(&stream, hooks, regions)?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn failed(&mut self, error: &HookError) -> u32 {
        if matches!(error, HookError::Broken(_)) {
            self.state = state::ERROR;
        }
        error.errno()
    }

    /// Goes on with arcs under way; `Some` when the state that was wanted is reached, or was not.
    pub(crate) fn poll(
        &mut self,
        hooks: &mut dyn MigrationHooks,
        regions: &mut Regions,
        now: Time,
    ) -> Option<Result<(), u32>> {
        let (next, to) = self.arc?;
        match hooks.poll(now) {
            HookState::Working => None,
            HookState::Done => {
                self.arc = None;
                self.state = next;
                if let Some(function) = self.function.take() {
                    regions.restore(&function);
                }
                match self.begin(to, hooks, regions, now) {
                    Ok(false) => None,
                    Ok(true) => Some(Ok(())),
                    Err(errno) => Some(Err(errno)),
                }
            }
            HookState::Failed(error) => {
                (self.arc, self.function) = (None, None);
                Some(Err(self.failed(&error)))
            }
        }
    }

    fn forget_stream(&mut self) {
        (self.outgoing, self.read) = (None, 0);
        self.incoming = Vec::new();
    }

    /// A part of the stream of at most `size` bytes; `None` while the state is withheld.
    ///
    /// # Errors
    /// EINVAL where nothing can be read, and the hook's where there will be nothing.
    pub(crate) fn read(
        &mut self,
        size: usize,
        hooks: &mut dyn MigrationHooks,
        regions: &Regions,
    ) -> Result<Option<Vec<u8>>, u32> {
        match self.state {
            // There is nothing to say before the stop.
            state::PRE_COPY => return Ok(Some(Vec::new())),
            state::STOP_COPY => {}
            _ => return Err(errno::EINVAL),
        }
        if self.outgoing.is_none() {
            let Some(controller) = hooks.state().map_err(|error| self.failed(&error))? else { return Ok(None) };
            self.outgoing = Some(stream_of(&controller, &regions.save()));
        }
        let stream = self.outgoing.as_deref().unwrap_or_default();
        let part = &stream[self.read..stream.len().min(self.read.saturating_add(size))];
        self.read += part.len();
        Ok(Some(part.to_vec()))
    }

    /// Takes a part of a stream.
    ///
    /// # Errors
    /// EINVAL outside RESUMING, ENOSPC when it is too long.
    pub(crate) fn write(&mut self, data: &[u8]) -> Result<(), u32> {
        if self.state != state::RESUMING {
            return Err(errno::EINVAL);
        }
        if self.incoming.len() + data.len() > MAX_STREAM {
            return Err(errno::ENOSPC);
        }
        self.incoming.extend_from_slice(data);
        Ok(())
    }

    /// Goes on with the end of a log that nobody waits for; whether it is not over.
    pub(crate) fn tend_log(&mut self, hooks: &mut dyn MigrationHooks, now: Time) -> bool {
        self.log_ends = self.log_ends && hooks.poll_log(now) == HookState::Working;
        self.log_ends
    }

    /// The function is to be reset: the device goes back to RUNNING from wherever it is. Returns whether hooks work on that.
    pub(crate) fn begin_reset(&mut self, hooks: &mut dyn MigrationHooks, now: Time) -> bool {
        self.forget_stream();
        (self.arc, self.function) = (None, None);
        // The controller's own fence holds whatever the hooks say.
        let was = std::mem::replace(&mut self.state, state::RUNNING);
        was != state::RUNNING && hooks.reset(now).is_ok()
    }

    /// The client has gone: what only it could go on with ends. Returns whether hooks work on that.
    pub(crate) fn client_left(&mut self, hooks: &mut dyn MigrationHooks, now: Time) -> bool {
        if std::mem::take(&mut self.logging) {
            self.log_ends = hooks.stop_logging().is_ok();
        }
        self.log = None;
        self.incoming = Vec::new();
        // Whoever comes next reads the whole stream.
        self.read = 0;
        if self.arc.is_some() || self.state != state::PRE_COPY {
            return self.arc.is_some();
        }
        match hooks.resume(now) {
            Ok(()) => self.arc = Some((state::RUNNING, state::RUNNING)),
            Err(error) => _ = self.failed(&error),
        }
        self.arc.is_some()
    }
}

/// The reply to GET, if the client can take it.
fn got(head: &DeviceFeature, data: &[u8]) -> Result<Answer, u32> {
    reply_to(head, data).map(Answer::Reply)
}

fn reply_to(head: &DeviceFeature, data: &[u8]) -> Result<Vec<u8>, u32> {
    let bytes = size_of::<DeviceFeature>() + data.len();
    if bytes > head.argsz as usize {
        return Err(errno::EINVAL);
    }
    let mut reply = DeviceFeature { argsz: bytes as u32, ..*head }.as_bytes().to_vec();
    reply.extend_from_slice(data);
    Ok(reply)
}

fn stream_of(controller: &[u8], function: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(controller.len() + function.len() + 2 * size_of::<Section>());
    for (kind, bytes) in [(CONTROLLER, controller), (FUNCTION, function)] {
        body.extend_from_slice(Section { kind, reserved: 0, length: bytes.len() as u64 }.as_bytes());
        body.extend_from_slice(bytes);
    }
    let head = Head { magic: MAGIC, version: VERSION, crc: crc32c::crc32c(&body), length: body.len() as u64 };
    let mut stream = head.as_bytes().to_vec();
    stream.append(&mut body);
    stream
}

/// The controller's and the function's part of a stream.
fn parts_of(stream: &[u8]) -> Result<(&[u8], &[u8]), HookError> {
    let bad = |why: &str| HookError::Invalid(why.into());
    let (head, body) = Head::read_from_prefix(stream).map_err(|_| bad("the stream has no head"))?;
    if head.magic != MAGIC || head.version != VERSION {
        return Err(bad("the stream is of another kind or version"));
    }
    if head.length != body.len() as u64 || head.crc != crc32c::crc32c(body) {
        return Err(bad("the stream is not whole"));
    }
    let (mut controller, mut function, mut rest) = (None, None, body);
    while !rest.is_empty() {
        let (section, more) = Section::read_from_prefix(rest).map_err(|_| bad("a section has no head"))?;
        let length = usize::try_from(section.length).ok().filter(|&length| length <= more.len());
        let (bytes, after) = more.split_at(length.ok_or_else(|| bad("a section is longer than the stream"))?);
        let place = match section.kind {
            CONTROLLER => &mut controller,
            FUNCTION => &mut function,
            _ => return Err(bad("a section is of an unknown kind")),
        };
        if place.replace(bytes).is_some() {
            return Err(bad("a section comes twice"));
        }
        rest = after;
    }
    controller.zip(function).ok_or_else(|| bad("a section is missing"))
}

/// The reply to a report whose pages were collected.
fn reported(head: &DeviceFeature, report: &LoggingReport, bytes: usize, hooks: &mut dyn MigrationHooks) -> Result<Vec<u8>, u32> {
    let mut data = report.as_bytes().to_vec();
    let at = data.len();
    data.resize(at + bytes, 0);
    let result = hooks.report_logged(report.iova, report.length, report.page_size, &mut data[at..]);
    result.map_err(|error| error.errno())?;
    reply_to(head, &data)
}

/// Checks a stream, and begins to take it over; returns the function's part, which is next.
fn take_over(stream: &[u8], hooks: &mut dyn MigrationHooks, regions: &Regions) -> Result<Vec<u8>, HookError> {
    let (controller, function) = parts_of(stream)?;
    if !regions.fits(function) {
        return Err(HookError::Invalid("the function is not like the one that the stream is of".into()));
    }
    hooks.restore(controller)?;
    Ok(function.to_vec())
}
