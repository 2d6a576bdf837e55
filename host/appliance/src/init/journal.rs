//! What is said: on the console, in a ring on the state partition, and the last lines in memory for the status page.
//!
//! Each of the two outputs has a thread and a bounded queue of its own, so that a serial line that stands still, a full state
//! partition or a slow disk hold up neither the appliance nor each other: what does not fit is dropped and counted, and the
//! count is said when there is room again. The queue of the ring also keeps what was said before the partition was mounted.
//!
//! The ring is two files, `dray.log` and the one before it, `dray.log.1`, of half its size each. Lines have the time since the
//! kernel's start in front. They are flushed a second after the last one, and every few seconds at the latest: a power cut
//! costs the last seconds. When the partition is full, the older file makes room once; after that lines are not kept, and tried
//! again with each.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes of a line; what is longer is cut.
const LINE_BYTES: usize = 4096;
/// Lines that wait for an output.
const WAITING: usize = 2048;
/// Lines that the status page can show.
const TAIL: usize = 200;
/// A ring is flushed when nothing was said for so long,
const QUIET: Duration = Duration::from_secs(1);
/// and at the latest after this.
const FLUSH: Duration = Duration::from_secs(5);

/// Where lines go. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    inner: Arc<Inner>,
}

struct Inner {
    console: Output,
    ring: Output,
    tail: Mutex<VecDeque<String>>,
}

/// A queue and what did not fit.
struct Output {
    queue: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

enum Item {
    /// Time since the kernel's start in milliseconds, and what was said.
    Line(u64, Arc<str>),
    /// The ring's folder is there, and how many bytes it may take.
    Open(PathBuf, u64),
    /// Everything said so far is to be out, and the ring's files closed.
    Close(Sender<()>),
}

impl Output {
    fn line(&self, at: u64, line: &Arc<str>) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Item::Line(at, Arc::clone(line))) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until everything said so far is out, but not for ever.
    fn close(&self, patience: Duration) {
        let (done, closed) = channel();
        let end = Instant::now() + patience;
        let mut item = Item::Close(done);
        while Instant::now() < end {
            match self.queue.try_send(item) {
                Ok(()) => {
                    let _late = closed.recv_timeout(end.saturating_duration_since(Instant::now()));
                    return;
                }
                Err(TrySendError::Full(back)) => item = back,
                Err(TrySendError::Disconnected(_)) => return,
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Journal {
    /// Starts it with a console.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn start(console: Box<dyn Write + Send>) -> std::io::Result<Self> {
        let console = output("dray-console", move |queue, lost| print(console, &queue, &lost))?;
        let ring = output("dray-log", |queue, lost| keep(&queue, &lost))?;
        Ok(Self { inner: Arc::new(Inner { console, ring, tail: Mutex::default() }) })
    }

    /// Says a line of PID 1's own.
    pub fn say(&self, line: &str) {
        for line in line.lines() {
            self.line(&format!("dray: {line}"));
        }
    }

    /// A line as it is, such as one of the appliance. Control characters are taken out.
    pub fn line(&self, line: &str) {
        let line = printable(line);
        let at = super::since_kernel_start_ms();
        {
            let mut tail = self.inner.tail.lock().unwrap_or_else(PoisonError::into_inner);
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(stamped(at, &line));
        }
        self.inner.console.line(at, &line);
        self.inner.ring.line(at, &line);
    }

    /// The last lines, oldest first.
    #[must_use]
    pub fn tail(&self, most: usize) -> Vec<String> {
        let tail = self.inner.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.iter().skip(tail.len().saturating_sub(most)).cloned().collect()
    }

    /// Keeps lines in a folder from now on, those included that were said before.
    pub fn keep_in(&self, folder: &Path, bytes: u64) {
        // The queue is empty of anything but lines at this time; should it be full, the folder must get in all the same.
        let _ended = self.inner.ring.queue.send(Item::Open(folder.into(), bytes));
    }

    /// Lets go of the folder, with everything in it that was said.
    pub fn close_ring(&self, patience: Duration) {
        self.inner.ring.close(patience);
    }

    /// Waits until the console has printed everything.
    pub fn flush_console(&self, patience: Duration) {
        self.inner.console.close(patience);
    }
}

fn output(name: &str, run: impl FnOnce(Receiver<Item>, Arc<AtomicU64>) + Send + 'static) -> std::io::Result<Output> {
    let (queue, items) = sync_channel(WAITING);
    let lost = Arc::new(AtomicU64::new(0));
    let of_thread = Arc::clone(&lost);
    std::thread::Builder::new().name(name.into()).spawn(move || run(items, of_thread))?;
    Ok(Output { queue, lost })
}

/// A line without what would disturb a terminal, and not too long.
fn printable(line: &str) -> Arc<str> {
    let mut end = line.len().min(LINE_BYTES);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line[..end].chars().filter(|c| !c.is_control() || *c == '\t').collect::<String>().into()
}

fn stamped(at: u64, line: &str) -> String {
    format!("[{:>5}.{:03}] {line}", at / 1000, at % 1000)
}

fn lost_line(lost: &AtomicU64) -> Option<String> {
    let lost = lost.swap(0, Ordering::Relaxed);
    (lost > 0).then(|| format!("dray: {lost} lines are missing here: they came faster than they could be taken"))
}

fn print(mut console: Box<dyn Write + Send>, queue: &Receiver<Item>, lost: &AtomicU64) {
    while let Ok(item) = queue.recv() {
        // A console that takes nothing is no reason to do anything else.
        match item {
            Item::Line(_, line) => {
                let _unseen = lost_line(lost).map(|lost| writeln!(console, "{lost}"));
                let _unseen = console.write_all(format!("{line}\n").as_bytes());
            }
            Item::Close(done) => {
                let _unseen = console.flush();
                let _gone = done.send(());
            }
            Item::Open(..) => {}
        }
    }
}

fn keep(queue: &Receiver<Item>, lost: &AtomicU64) {
    let mut early = VecDeque::new();
    let mut ring: Option<Ring> = None;
    loop {
        let wait = ring.as_ref().and_then(Ring::until_flush).unwrap_or(Duration::from_secs(3600));
        let item = match queue.recv_timeout(wait) {
            Ok(item) => item,
            Err(RecvTimeoutError::Timeout) => {
                ring.iter_mut().for_each(Ring::flush);
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        match (item, &mut ring) {
            (Item::Line(at, line), None) => {
                if early.len() == WAITING {
                    early.pop_front();
                }
                early.push_back(stamped(at, &line));
            }
            (Item::Line(at, line), Some(ring)) => {
                if let Some(lost) = lost_line(lost) {
                    ring.line(&lost);
                }
                ring.line(&stamped(at, &line));
            }
            (Item::Open(folder, bytes), ring) => {
                let mut new = Ring::new(folder, bytes);
                early.drain(..).for_each(|line: String| new.line(&line));
                *ring = Some(new);
            }
            (Item::Close(done), open) => {
                open.iter_mut().for_each(Ring::flush);
                ring = None;
                let _gone = done.send(());
            }
        }
    }
}

/// Two files of which the older one makes way.
pub(crate) struct Ring {
    folder: PathBuf,
    /// Bytes of each file.
    half: u64,
    file: Option<(File, u64)>,
    /// Lines that could not be kept since the last one that was.
    missing: u64,
    /// Since when there is something to flush, and since when nothing was said.
    unflushed: Option<(Instant, Instant)>,
}

impl Ring {
    pub(crate) fn new(folder: PathBuf, bytes: u64) -> Self {
        Self { folder, half: bytes / 2, file: None, missing: 0, unflushed: None }
    }

    fn paths(&self) -> [PathBuf; 2] {
        ["dray.log", "dray.log.1"].map(|name| self.folder.join(name))
    }

    fn until_flush(&self) -> Option<Duration> {
        let (first, last) = self.unflushed?;
        let due = (first + FLUSH).min(last + QUIET);
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// Appends a line. Whatever goes wrong costs this line alone.
    pub(crate) fn line(&mut self, line: &str) {
        let mut text = String::new();
        if self.missing > 0 {
            text = format!("dray: {} lines were not kept: the state partition took no more\n", self.missing);
        }
        text.push_str(line);
        text.push('\n');
        let kept = self.append(text.as_bytes()).or_else(|error| {
            // The older file may be all the room there is.
            if error.raw_os_error() != Some(rustix::io::Errno::NOSPC.raw_os_error()) || self.missing > 0 {
                return Err(error);
            }
            self.turn().and_then(|()| self.append(text.as_bytes()))
        });
        match kept {
            Ok(()) => {
                self.missing = 0;
                let now = Instant::now();
                self.unflushed = Some((self.unflushed.map_or(now, |(first, _)| first), now));
            }
            Err(_) => {
                self.missing += 1;
                self.file = None;
            }
        }
    }

    fn append(&mut self, text: &[u8]) -> std::io::Result<()> {
        if self.file.as_ref().is_some_and(|(_, bytes)| bytes + text.len() as u64 > self.half) {
            self.turn()?;
        }
        if self.file.is_none() {
            std::fs::create_dir_all(&self.folder)?;
            let file = File::options().append(true).create(true).open(&self.paths()[0])?;
            let bytes = file.metadata()?.len();
            self.file = Some((file, bytes));
            if bytes + text.len() as u64 > self.half && bytes > 0 {
                return self.turn().and_then(|()| self.append(text));
            }
        }
        let Some((file, bytes)) = &mut self.file else { return Ok(()) };
        let end = *bytes;
        file.write_all(text).inspect_err(|_| {
            // Half a line is worse than none.
            let _kept = file.set_len(end);
        })?;
        *bytes += text.len() as u64;
        Ok(())
    }

    /// The file becomes the older one, whose place it takes.
    fn turn(&mut self) -> std::io::Result<()> {
        self.file = None;
        let [new, old] = self.paths();
        std::fs::rename(new, old)
    }

    pub(crate) fn flush(&mut self) {
        self.unflushed = None;
        if let Some((file, _)) = &self.file {
            // Nothing more can be done about a log that the disk refuses.
            let _refused = file.sync_data();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A console that a test can read.
    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("screen").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("dray-journal-{name}-{}", std::process::id()));
        let _none = std::fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn what_is_said_before_the_partition_is_there_is_kept_too() {
        let (screen, folder) = (Screen::default(), folder("early"));
        let journal = Journal::start(Box::new(screen.clone())).expect("threads");
        journal.say("first\nsecond");
        journal.keep_in(&folder, 1 << 20);
        journal.line("third \x1b[31mred\x07");
        journal.close_ring(Duration::from_secs(30));
        journal.flush_console(Duration::from_secs(30));
        let kept = std::fs::read_to_string(folder.join("dray.log")).expect("log");
        let lines: Vec<_> = kept.lines().map(|line| line.split_once("] ").expect("a time").1).collect();
        assert_eq!(lines, ["dray: first", "dray: second", "third [31mred"]);
        assert_eq!(screen.0.lock().expect("screen").as_slice(), b"dray: first\ndray: second\nthird [31mred\n");
        assert_eq!(journal.tail(1).len(), 1);
        std::fs::remove_dir_all(folder).expect("clean up");
    }

    #[test]
    fn the_ring_never_takes_more_than_its_size_and_keeps_the_newest() {
        let folder = folder("ring");
        for start in [0, 500] {
            // Opened twice: a new start goes on where the last one was.
            let mut ring = Ring::new(folder.clone(), 4096);
            for n in start..start + 500 {
                ring.line(&format!("line {n}"));
                let bytes: u64 = ring.paths().iter().filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.len()).sum();
                assert!(bytes <= 4096, "{bytes}");
            }
        }
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect("log");
        let all = read("dray.log.1") + &read("dray.log");
        let kept: Vec<_> = all.lines().collect();
        assert!(kept.len() > 100 && all.ends_with("line 999\n"));
        for (line, n) in kept.iter().rev().zip((0..1000).rev()) {
            assert_eq!(*line, format!("line {n}"));
        }
        std::fs::remove_dir_all(folder).expect("clean up");
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_lines_and_nothing_else() {
        let folder = folder("refused");
        std::fs::write(&folder, b"no folder").expect("file");
        let mut ring = Ring::new(folder.clone(), 4096);
        ring.line("lost");
        ring.line("lost");
        assert_eq!(ring.missing, 2);
        std::fs::remove_file(&folder).expect("clean up");
        ring.line("kept");
        let kept = std::fs::read_to_string(folder.join("dray.log")).expect("log");
        assert!(kept.starts_with("dray: 2 lines were not kept") && kept.ends_with("\nkept\n"), "{kept}");
        std::fs::remove_dir_all(folder).expect("clean up");
    }

    #[test]
    fn long_lines_are_cut_at_a_character() {
        let long = "é".repeat(LINE_BYTES);
        assert_eq!(printable(&long).len(), LINE_BYTES);
        assert_eq!(printable(&format!("x{long}")).len(), LINE_BYTES - 1);
    }
}
