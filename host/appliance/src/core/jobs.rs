//! The worker thread for what must block: journal flushes, compiling a component.

use dray_device::poll::Jobs;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

type Work = Box<dyn FnOnce() + Send>;

/// A thread that runs jobs in the order they were handed out. Dropping it ends the thread after the last job.
#[derive(Debug)]
pub struct Worker {
    queue: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

/// Hands jobs to a [`Worker`]. Clones share it.
#[derive(Clone, Debug)]
pub struct WorkerJobs {
    queue: Sender<Work>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> std::io::Result<Self> {
        let (queue, work) = channel::<Work>();
        let thread = std::thread::Builder::new().name("dray-jobs".into()).spawn(move || {
            for job in work {
                job();
            }
        })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Where parts hand their jobs.
    #[must_use]
    pub fn jobs(&self) -> Option<WorkerJobs> {
        self.queue.clone().map(|queue| WorkerJobs { queue })
    }
}

impl Jobs for WorkerJobs {
    fn run(&mut self, work: Work) {
        // A worker that has ended drops the job, which its owner sees as lost.
        let _ended = self.queue.send(work);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.queue.take();
        // Parts may still hold senders; the thread ends with the last of them, so it is not joined here.
        drop(self.thread.take());
    }
}
