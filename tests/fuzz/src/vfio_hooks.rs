//! Migration hooks that do as the input says, and judge how they are called.

use dray_device::poll::Time;
use dray_export::hooks::{HookError, HookState, MigrationHooks};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct State {
    /// How steps end: 0 at once, 1 later, 2 not, 3 not at all well.
    manner: u8,
    /// Polls until a step ends.
    delay: u8,
    left: Option<u8>,
    logging: bool,
    /// The same of a step of the log.
    log_left: Option<u8>,
    /// That step is its beginning.
    log_starts: bool,
    /// The state that was restored last, to be written again.
    stream: Vec<u8>,
    at: usize,
    most: usize,
}

/// The harness's handle on the hooks.
#[derive(Clone, Debug, Default)]
pub struct Control(Arc<Mutex<State>>);

/// The hooks.
#[derive(Debug)]
pub struct Hooks(Control);

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hooks that this controls.
    #[must_use]
    pub fn hooks(&self) -> Box<dyn MigrationHooks> {
        Box::new(Hooks(self.clone()))
    }

    /// Says how steps end from now on.
    pub fn set(&self, manner: u8, delay: u8) {
        let mut state = self.lock();
        (state.manner, state.delay) = (manner & 7, delay & 31);
    }

    /// Steps end well from now on.
    pub fn finish(&self) {
        self.set(0, 0);
    }

    /// Remembers a stream that was read.
    pub fn read(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.stream.len() < 64 << 10 {
            state.stream.extend_from_slice(bytes);
        }
    }

    /// The next bytes of the stream that was read, from its start again when it is through.
    #[must_use]
    pub fn piece(&self, len: usize) -> Vec<u8> {
        let mut state = self.lock();
        let from = state.at.min(state.stream.len());
        let to = (from + len).min(state.stream.len());
        state.at = if to == state.stream.len() { 0 } else { to };
        state.stream[from..to].to_vec()
    }

    /// Most bytes that were ever to be restored.
    #[must_use]
    pub fn most_incoming(&self) -> usize {
        self.lock().most
    }
}

impl State {
    /// A step with so much left goes on: what is left then, and how far it is.
    fn go_on(&self, left: Option<u8>) -> (Option<u8>, HookState) {
        match left {
            None => (None, HookState::Done),
            Some(0) if self.manner & 3 == 3 => (None, HookState::Failed(HookError::Failed("fuzz".into()))),
            Some(0) => (None, HookState::Done),
            // With a delay of 31 only the end of the session ends a step.
            Some(_) if self.delay == 31 => (left, HookState::Working),
            Some(more) => (Some(if self.delay == 0 { 0 } else { more - 1 }), HookState::Working),
        }
    }
}

impl Hooks {
    /// A step begins. A reset may begin one while another is under way.
    fn begin(&self, is_reset: bool) -> Result<(), HookError> {
        let mut state = self.0.lock();
        assert!(is_reset || state.left.is_none(), "a step while another is under way");
        match state.manner & 3 {
            2 => return Err(HookError::Busy("fuzz".into())),
            3 if state.manner & 4 != 0 => return Err(HookError::Broken("fuzz".into())),
            _ => {}
        }
        state.left = Some(state.delay);
        Ok(())
    }
}

impl MigrationHooks for Hooks {
    fn start_precopy(&mut self, _now: Time) -> Result<(), HookError> {
        self.begin(false)
    }

    fn resume(&mut self, _now: Time) -> Result<(), HookError> {
        self.begin(true)
    }

    fn stop(&mut self, _now: Time, _hand_over: bool) -> Result<(), HookError> {
        self.begin(false)
    }

    fn state(&mut self) -> Result<Option<Vec<u8>>, HookError> {
        let state = self.0.lock();
        assert!(state.left.is_none(), "the state is read while a step is under way");
        if state.manner == 7 {
            return Err(HookError::Failed("fuzz".into()));
        }
        Ok((state.manner & 4 == 0).then(|| vec![state.delay; 300]))
    }

    fn prepare(&mut self, _now: Time) -> Result<(), HookError> {
        self.begin(false)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), HookError> {
        let mut state = self.0.lock();
        assert!(state.left.is_none(), "a state is restored while a step is under way");
        state.most = state.most.max(bytes.len());
        if state.manner & 3 == 3 {
            return Err(HookError::Invalid("fuzz".into()));
        }
        state.left = Some(state.delay);
        Ok(())
    }

    fn poll(&mut self, _now: Time) -> HookState {
        let mut state = self.0.lock();
        let left = state.left;
        let (left, ended) = state.go_on(left);
        state.left = left;
        ended
    }

    fn can_log(&self) -> bool {
        true
    }

    fn start_logging(&mut self, ranges: &[(u64, u64)], page: u64) -> Result<u64, HookError> {
        let mut state = self.0.lock();
        assert!(!state.logging, "a log is begun twice");
        let sane = ranges.iter().all(|(iova, len)| *len > 0 && iova.checked_add(*len).is_some());
        assert!(sane && page.is_power_of_two(), "{ranges:?} by {page}");
        if state.manner & 3 == 2 {
            return Err(HookError::Failed("fuzz".into()));
        }
        (state.logging, state.log_left, state.log_starts) = (true, Some(state.delay), true);
        Ok(page)
    }

    fn collect_logged(&mut self) -> Result<(), HookError> {
        let mut state = self.0.lock();
        assert!(state.logging, "a log is collected that is not");
        assert!(state.log_left.is_none(), "a log is collected while a step of it is under way");
        if state.manner & 3 == 2 {
            return Err(HookError::Failed("fuzz".into()));
        }
        (state.log_left, state.log_starts) = (Some(state.delay), false);
        Ok(())
    }

    fn poll_log(&mut self, _now: Time) -> HookState {
        let mut state = self.0.lock();
        let left = state.log_left;
        let (left, ended) = state.go_on(left);
        state.log_left = left;
        if ended != HookState::Working {
            // A log that does not begin is none.
            let starts = std::mem::take(&mut state.log_starts);
            state.logging &= !(starts && matches!(ended, HookState::Failed(_)));
        }
        ended
    }

    fn report_logged(&mut self, iova: u64, len: u64, page: u64, into: &mut [u8]) -> Result<(), HookError> {
        let state = self.0.lock();
        assert!(state.logging, "a report without a log");
        assert!(state.log_left.is_none(), "a report of what is not collected yet");
        assert!(iova.checked_add(len).is_some() && into.len() as u64 * 8 >= len.div_ceil(page), "{len:#x} by {page:#x}");
        into.fill(0xff);
        Ok(())
    }

    fn stop_logging(&mut self) -> Result<(), HookError> {
        let mut state = self.0.lock();
        assert!(std::mem::take(&mut state.logging), "a log ends that is not");
        (state.log_left, state.log_starts) = (Some(state.delay), false);
        if state.manner & 3 == 2 { Err(HookError::Failed("fuzz".into())) } else { Ok(()) }
    }
}
