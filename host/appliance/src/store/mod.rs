//! What may be lost: the history of migrations and the inventory, in sled, in the folder `store` below the state folder.
//!
//! Correctness never rests on anything in here (that is in the records, [`crate::core::records`]), so every trouble has one
//! answer: say so once, go on without it.
//!
//! | trouble | what happens |
//! |---|---|
//! | it cannot be opened, or what is in it is damaged | renamed to `store.damaged-N` with a warning, a new one is begun |
//! | the disk is full, read-only, not ours | the process goes on without a store, with a warning; nothing is renamed |
//! | a later version has written it | left alone, with a warning |
//! | another process has it open | left alone, with a warning |
//! | sled fails, panics or hangs while it is used | what is written from then on is dropped and counted; every wait is bounded |
//! | more is written than the thread keeps up with | the writer never waits: what does not fit the queue is dropped and counted |
//!
//! sled blocks, so it is used by a thread of its own (it starts a few for its own input and output beside). [`Store`] is the
//! handle: [`Store::write`] and [`Store::see`] never block and may be called from a polling core; what answers
//! ([`Store::flush`], [`Store::read`], [`Store::close`]) waits at most as long as it is told to.
//!
//! Not here yet, because nothing in the product would read it: the extents that a destination has (a later attempt starts from
//! a complete map, rule 10), and an index of compiled policies (the cache keeps its own record of each file; which component
//! decided stands in the history).
//!
//! Where to start reading: `entry.rs` says what is kept, `disk.rs` how it is opened and written, this file has the thread.

mod disk;
pub mod entry;
pub mod keep;

use disk::Disk;
use entry::{MigrationEntry, NamespaceEntry};
use std::any::Any;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Requests that wait for the thread at most.
const QUEUE: usize = 256;
/// How often a caller that may wait looks whether there is room in the queue.
const LOOK: Duration = Duration::from_millis(1);

/// Why there is no store, or none any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, miette::Diagnostic)]
pub enum StoreError {
    /// Another process has it open.
    #[error("{}: another process has it open", .0.display())]
    InUse(PathBuf),
    /// The system refused: no space, no permission, and so on.
    #[error("{}: {what}: {why}", path.display())]
    System {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        why: String,
    },
    /// It was written by a later version.
    #[error("{}: it has format {found}, and this version knows format {known}", path.display(), known = disk::FORMAT)]
    Format {
        /// The store's folder.
        path: PathBuf,
        /// The format that it says it has.
        found: u64,
    },
    /// There are many damaged stores already.
    #[error("{}: it is damaged like the {} that were set aside beside it; remove those", .0.display(), disk::MOST_DAMAGED)]
    Damaged(PathBuf),
    /// It failed while it was used.
    #[error("it has failed: {0}")]
    Failed(String),
    /// It did not answer in time.
    #[error("it has not answered within {0:?}")]
    Late(Duration),
}

/// What is in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The migrations with their numbers, oldest first.
    pub migrations: Vec<(u64, MigrationEntry)>,
    /// The namespaces, by subsystem and NSID.
    pub namespaces: Vec<NamespaceEntry>,
    /// Entries that cannot be read: cut, changed, gone, or of a later version.
    pub unreadable: u64,
}

/// Which entry of the history is meant: one ticket a migration, however often its entry is written.
#[derive(Clone, Debug, Default)]
pub struct Ticket(Arc<AtomicU64>);

impl Ticket {
    /// The entry's number, once the store has taken it.
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|number| *number != 0)
    }
}

enum Request {
    Write(Ticket, Box<MigrationEntry>),
    See(Box<NamespaceEntry>),
    Flush(SyncSender<()>),
    Read(SyncSender<Contents>),
    Close(SyncSender<()>),
}

/// What the thread tells all holders of a handle.
#[derive(Debug, Default)]
struct Board {
    /// Entries that were not written.
    dropped: AtomicU64,
    /// Why there is no store.
    gone: OnceLock<StoreError>,
    /// Where a damaged one was moved.
    set_aside: OnceLock<PathBuf>,
}

impl Board {
    /// Says once, here and in the log, that there is no store any more.
    fn give_up(&self, error: StoreError) {
        if self.gone.set(error.clone()).is_ok() {
            tracing::warn!(%error, "the history of migrations is not kept; migrations do not depend on it");
        }
    }

    fn drop_one(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn why(&self) -> StoreError {
        self.gone.get().cloned().unwrap_or_else(|| StoreError::Failed("its thread has ended".into()))
    }
}

/// The handle of the store. Clones share it; the thread ends with the last of them or at [`Store::close`].
#[derive(Clone, Debug)]
pub struct Store {
    queue: SyncSender<Request>,
    board: Arc<Board>,
}

impl Store {
    /// Starts the thread, which opens the store in `state`/store or begins one. Returns at once: whether there is a store is
    /// learnt from the first answer.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(state: &Path) -> std::io::Result<Self> {
        let (queue, requests) = sync_channel(QUEUE);
        let board = Arc::new(Board::default());
        let (state, shared) = (state.to_path_buf(), Arc::clone(&board));
        std::thread::Builder::new().name("dray-store".into()).spawn(move || {
            serve(|| Disk::open(&state), &requests, &shared);
        })?;
        Ok(Self { queue, board })
    }

    /// Writes the entry of a migration, or writes it anew. Never blocks; an entry that cannot be taken is dropped and counted.
    pub fn write(&self, ticket: &Ticket, entry: MigrationEntry) {
        self.hand_over(Request::Write(ticket.clone(), Box::new(entry)));
    }

    /// Keeps what a namespace was when it was seen last. Never blocks, as [`Store::write`].
    pub fn see(&self, entry: NamespaceEntry) {
        self.hand_over(Request::See(Box::new(entry)));
    }

    fn hand_over(&self, request: Request) {
        if self.board.gone.get().is_some() || self.queue.try_send(request).is_err() {
            self.board.drop_one();
        }
    }

    /// Waits until all that was written before is durable.
    ///
    /// # Errors
    /// [`StoreError`]: there is no store, or it has not answered within `patience`.
    pub fn flush(&self, patience: Duration) -> Result<(), StoreError> {
        self.ask(patience, Request::Flush)
    }

    /// Reads everything.
    ///
    /// # Errors
    /// [`StoreError`], as [`Store::flush`].
    pub fn read(&self, patience: Duration) -> Result<Contents, StoreError> {
        self.ask(patience, Request::Read)
    }

    /// Flushes and ends the thread. After an error the thread may live on, waiting for a disk; it keeps nobody.
    ///
    /// # Errors
    /// [`StoreError`], as [`Store::flush`].
    pub fn close(self, patience: Duration) -> Result<(), StoreError> {
        self.ask(patience, Request::Close)
    }

    /// Entries that were not written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.board.dropped.load(Ordering::Relaxed)
    }

    /// Where a damaged store was moved when this one was begun.
    #[must_use]
    pub fn set_aside(&self) -> Option<&Path> {
        self.board.set_aside.get().map(PathBuf::as_path)
    }

    /// Asks the thread and waits for its answer.
    fn ask<T>(&self, patience: Duration, question: impl FnOnce(SyncSender<T>) -> Request) -> Result<T, StoreError> {
        let end = Instant::now() + patience;
        let (answer, answered) = sync_channel(1);
        let mut request = question(answer);
        loop {
            match self.queue.try_send(request) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => return Err(self.board.why()),
                Err(TrySendError::Full(_)) if Instant::now() >= end => return Err(StoreError::Late(patience)),
                Err(TrySendError::Full(back)) => request = back,
            }
            std::thread::sleep(LOOK);
        }
        match answered.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => Err(StoreError::Late(patience)),
            Err(RecvTimeoutError::Disconnected) => Err(self.board.why()),
        }
    }
}

/// The thread: opens the store, serves requests until it is closed or fails. sled can panic where a disk is full or damaged;
/// that ends the store, not the process.
fn serve(open: impl FnOnce() -> Result<Disk, StoreError>, requests: &Receiver<Request>, board: &Board) {
    let disk = match caught(open) {
        Ok(disk) => disk,
        Err(error) => return give_up(requests, board, error),
    };
    if let Some(path) = disk.set_aside() {
        tracing::warn!(path = %path.display(), "the history of migrations was damaged; it is set aside, a new one is begun");
        let _first = board.set_aside.set(path.to_path_buf());
    }
    // Dropping sled writes and can panic in turn: only a store that has not failed is dropped. One that has keeps its files
    // locked until the process ends.
    let mut disk = ManuallyDrop::new(disk);
    // Kept here, so that whoever waits for its answer finds the reason on the board when there is none.
    let mut request = None;
    let served = caught(|| {
        work(&mut disk, requests, &mut request, board)?;
        disk.flush()
    });
    if let Err(error) = served {
        return give_up(requests, board, error);
    }
    drop(ManuallyDrop::into_inner(disk));
    if let Some(Request::Close(answer)) = request {
        // Whoever asked may have lost patience.
        let _late = answer.send(());
    }
}

/// A panic is an error like others.
fn caught<T>(what: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let done = catch_unwind(AssertUnwindSafe(what));
    done.unwrap_or_else(|panic| Err(StoreError::Failed(words(panic.as_ref()))))
}

/// Serves until somebody closes the store or the last handle is gone.
fn work(
    disk: &mut Disk,
    requests: &Receiver<Request>,
    current: &mut Option<Request>,
    board: &Board,
) -> Result<(), StoreError> {
    for request in requests {
        match &*current.insert(request) {
            Request::Write(ticket, entry) => {
                match disk.write(ticket.number(), entry)? {
                    Some(number) => ticket.0.store(number, Ordering::Relaxed),
                    None => board.drop_one(),
                }
            }
            Request::See(entry) => {
                if !disk.see(entry)? {
                    board.drop_one();
                }
            }
            Request::Flush(answer) => {
                disk.flush()?;
                // Whoever asked may have lost patience; so below.
                let _late = answer.send(());
            }
            Request::Read(answer) => {
                let _late = answer.send(disk.read()?);
            }
            Request::Close(_) => break,
        }
    }
    Ok(())
}

/// Says why there is no store; what was waiting is counted as dropped, and whoever waits for an answer learns the reason.
fn give_up(requests: &Receiver<Request>, board: &Board, error: StoreError) {
    board.give_up(error);
    for request in requests.try_iter() {
        if matches!(request, Request::Write(..) | Request::See(_)) {
            board.drop_one();
        }
    }
}

/// What a panic said.
fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("it panicked").chars().take(200).collect()
}

#[cfg(test)]
mod tests;
