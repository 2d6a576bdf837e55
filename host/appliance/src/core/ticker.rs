//! The thread that lets time pass for sandboxed calls, and parks when none are made.

use dray_sandbox::{Sandbox, Ticking};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// One tick: a call that loops is stopped within two of them past its budget.
pub const TICK: Duration = Duration::from_micros(500);

/// Ticks a sandbox until it is dropped.
#[derive(Debug)]
pub struct TickerThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TickerThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(sandbox: &Sandbox) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let sandbox = sandbox.clone();
        let thread = std::thread::Builder::new().name("dray-ticker".into()).spawn(move || {
            let me = std::thread::current();
            let mut ticker = sandbox.ticker(Box::new(move || me.unpark()));
            while !asked.load(Ordering::Acquire) {
                match ticker.tick() {
                    Ticking::Busy => std::thread::sleep(TICK),
                    Ticking::Park => std::thread::park(),
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for TickerThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _panicked = thread.join();
        }
    }
}
