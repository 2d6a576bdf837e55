//! The console over a socket pair, with programs of the machine in place of dray's commands.

use super::*;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Default)]
struct Machine {
    stops: Arc<Mutex<Vec<bool>>>,
}

impl Host for Machine {
    fn stop(&self, restart: bool) {
        self.stops.lock().expect("stops").push(restart);
    }
    fn reload(&self) -> Result<String, String> {
        Err("line 3: wrong\n".into())
    }
    fn log(&self, lines: usize) -> Vec<String> {
        (0..lines.min(5)).map(|n| format!("line {n}")).collect()
    }
    fn command(&self, words: &[String]) -> Command {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }
}

/// A console that is served until this is dropped, and its other end.
struct Terminal {
    line: UnixStream,
    seen: Vec<u8>,
    machine: Machine,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Terminal {
    fn start() -> Self {
        let (line, other) = UnixStream::pair().expect("a pair");
        other.set_nonblocking(true).expect("nonblocking");
        line.set_read_timeout(Some(PATIENCE)).expect("time-out");
        let (stop, machine, reaper) = (Arc::new(AtomicBool::new(false)), Machine::default(), Reaper::default());
        let wire = Wire::new(File::from(OwnedFd::from(other)), Arc::clone(&stop));
        let (host, of_console) = (machine.clone(), reaper.clone());
        let console = std::thread::spawn(move || {
            let _gone = serve(&wire, &host, &of_console);
        });
        let until = Arc::clone(&stop);
        let collect = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                reaper.collect_known();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { line, seen: Vec::new(), machine, stop, threads: vec![console, collect] }
    }

    fn send(&mut self, text: &str) {
        self.line.write_all(text.as_bytes()).expect("send");
    }

    /// Everything up to a text, and that.
    fn until(&mut self, text: &str) -> String {
        loop {
            if let Some(at) = self.seen.windows(text.len()).position(|bytes| bytes == text.as_bytes()) {
                let rest = self.seen.split_off(at + text.len());
                return String::from_utf8(std::mem::replace(&mut self.seen, rest)).expect("text");
            }
            let mut bytes = [0; 4096];
            let count = self.line.read(&mut bytes);
            let count = count.unwrap_or_else(|error| panic!("{error}: no {text:?} in {:?}", String::from_utf8_lossy(&self.seen)));
            assert_ne!(count, 0, "the console has closed");
            self.seen.extend_from_slice(&bytes[..count]);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

#[test]
fn commands_run_and_tell_their_end() {
    let mut terminal = Terminal::start();
    terminal.send("#t1 sh -c 'echo out; echo err >&2; exit 3'\r\n");
    let text = terminal.until("dray: t1 exit 3\n");
    assert!(text.contains("out\n") && text.contains("err\n"), "{text}");
    terminal.send("true\n");
    terminal.until("dray: exit 0\n");
    terminal.send("#t2 no-such-program\n");
    assert!(terminal.until("dray: t2 exit 126\n").contains("cannot be started"));
    terminal.send("#t3 'open\n");
    assert!(terminal.until("dray: t3 exit 2\n").contains("quotation"));
    terminal.send("#t4 run --config x\n");
    assert!(terminal.until("dray: t4 exit 2\n").contains("by itself"));
}

/// Whether this process has SIGINT (2) ignored.
fn ignores_int() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("the status");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("the ignored signals");
    u64::from_str_radix(mask.trim(), 16).expect("a mask") & 1 << 1 != 0
}

#[test]
fn a_command_ends_at_its_limit_and_at_ctrl_c() {
    let mut terminal = Terminal::start();
    terminal.send("#a within 100ms sleep 1000\n");
    terminal.until("dray: a exit 124\n");
    terminal.send("#b sh -c 'echo running; exec sleep 1000'\n");
    terminal.until("running\n");
    terminal.send("\x03");
    // Tests that run in the background of a shell ignore SIGINT, and so do their children: then it is killed.
    terminal.until(if ignores_int() { "dray: b exit 137\n" } else { "dray: b exit 130\n" });
    // One that does not listen is killed.
    terminal.send("#c within 100ms sh -c 'trap \"\" TERM; while true; do sleep 1; done'\n");
    terminal.until("dray: c exit 124\n");
}

#[test]
fn what_is_typed_while_a_command_runs_is_done_after_it() {
    let mut terminal = Terminal::start();
    terminal.send("#a sh -c 'echo running; sleep 0.3'\n");
    terminal.until("running\n");
    terminal.send("#b echo second\n#c echo third\n");
    terminal.until("dray: a exit 0\n");
    terminal.until("second\ndray: b exit 0\n");
    terminal.until("third\ndray: c exit 0\n");
}

#[test]
fn the_machine_is_asked_for_what_is_its_own() {
    let mut terminal = Terminal::start();
    terminal.send("#r reload\n#l log 2\n#x log x\n#p reboot\n");
    terminal.until("line 3: wrong\ndray: r exit 1\n");
    terminal.until("line 0\nline 1\ndray: l exit 0\n");
    terminal.until("usage: log [LINES]\ndray: x exit 2\n");
    terminal.until("dray: p exit 0\n");
    terminal.send("true\n");
    terminal.until("dray: exit 0\n");
    assert_eq!(*terminal.machine.stops.lock().expect("stops"), [true]);
}

#[test]
fn a_console_that_nobody_reads_is_obeyed_all_the_same() {
    let mut terminal = Terminal::start();
    // More than a socket and a pipe hold; nothing of it is read.
    terminal.send("#a sh -c 'head -c 4000000 /dev/zero'\n#p poweroff\n");
    let end = Instant::now() + PATIENCE;
    while terminal.machine.stops.lock().expect("stops").is_empty() {
        assert!(Instant::now() < end, "the console waits for a reader");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Who comes to read later finds what the line held, and what is said from then on.
    terminal.line.set_nonblocking(true).expect("nonblocking");
    while terminal.line.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    terminal.line.set_nonblocking(false).expect("blocking");
    terminal.send("#b echo again\n");
    terminal.until("again\ndray: b exit 0\n");
}

#[test]
fn what_never_comes_back_is_waited_for_so_long_and_no_longer() {
    let (hold, held) = channel::<()>();
    let start = Instant::now();
    within(Duration::from_millis(20), move || _ = held.recv());
    assert!(start.elapsed() >= Duration::from_millis(20));
    drop(hold);
    let done = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&done);
    within(PATIENCE, move || set.store(true, Ordering::Relaxed));
    assert!(done.load(Ordering::Relaxed) && start.elapsed() < PATIENCE);
}
