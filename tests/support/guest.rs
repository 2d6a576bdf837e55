//! Virtual machines with a stock Linux, as clients of the appliance: booted headless under software emulation.
//!
//! `cargo xtask guests` made what they boot (`target/guests`); what runs inside is `tests/guests`. A [`Guest`] is one QEMU: the
//! first serial line has the kernel's messages and goes to a file, the second has the guest's own script, which takes a step per
//! line and answers with a marker. A machine that is busy boots a guest in a minute instead of in six seconds: deadlines are
//! long, a boot that did not come about is tried a second time, counted ([`retries`]) and shown. QEMU's exit status says nothing
//! (a guest that has crashed ends with 0): only markers count.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a boot may take.
pub const BOOT: Duration = Duration::from_secs(180);
/// How long a step may take unless it says so.
pub const STEP: Duration = Duration::from_secs(240);
/// Lines of each log that a failure shows.
const TAIL: usize = 60;
/// A guest's memory, in MiB: a RAM disk of 65 MB and room for files in memory.
const MEMORY_MIB: u32 = 512;

static RETRIES: AtomicU32 = AtomicU32::new(0);
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Boots of this process that needed a second attempt.
pub fn retries() -> u32 {
    RETRIES.load(Ordering::Relaxed)
}

/// One test with guests at a time: two cores emulate no more than two machines in useful time.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `cargo xtask guests` made.
///
/// # Panics
/// If it is not there.
pub fn folder() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the source tree");
    let folder = root.join("target/guests");
    assert!(folder.join("built").is_file(), "no guests to boot in {}: run `cargo xtask guests`", folder.display());
    folder
}

/// A disk for a guest.
#[derive(Clone, Debug)]
pub enum Disk {
    /// A vfio-user server behind this Unix socket.
    VfioUser(PathBuf),
    /// QEMU's own NVMe controller on this file: what the tools are tried with.
    Emulated(PathBuf),
}

/// A machine.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    name: String,
    disks: Vec<Disk>,
    modules: Vec<&'static str>,
    kernel: String,
    /// Behind an emulated IOMMU: its options.
    iommu: Option<&'static str>,
    initrd: Option<PathBuf>,
    options: Vec<String>,
}

impl Machine {
    /// Without disks and network; the name is for logs.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// With a disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// With a network in which the host's loopback is 10.0.2.2, and the modules for NVMe/TCP.
    pub fn network(self) -> Self {
        self.modules("net").modules("nvme-tcp")
    }

    /// With a set of `tests/guests/modules`.
    pub fn modules(mut self, set: &'static str) -> Self {
        self.modules.push(set);
        self
    }

    /// With more options on the kernel's command line.
    pub fn kernel(mut self, options: &str) -> Self {
        self.kernel = format!("{} {options}", self.kernel);
        self
    }

    /// With an IOMMU and the modules for VFIO.
    pub fn iommu(mut self) -> Self {
        self.iommu = Some("intremap=on");
        self.modules("vfio").kernel("intel_iommu=on")
    }

    /// The same, with a vfio-user server's function behind it, 0000:01:00.0: the IOMMU tells it of each mapping (caching mode).
    pub fn iommu_before(mut self, socket: &Path) -> Self {
        self = self.iommu();
        self.iommu = Some("intremap=on,caching-mode=on");
        let device = vfio_user(socket, "\"bus\":\"rp\",");
        self.qemu(&["-device", "pcie-root-port,id=rp,slot=1,chassis=1", "-device", &device])
    }

    /// With another initial RAM disk than the usual one.
    pub fn initrd(mut self, file: &Path) -> Self {
        self.initrd = Some(file.into());
        self
    }

    /// With more options of QEMU's own.
    pub fn qemu(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(ToString::to_string));
        self
    }

    fn command(&self, folder: &Path, kernel_log: &Path) -> Command {
        let mut qemu = Command::new(folder.join("qemu-system-x86_64"));
        let mib = if self.initrd.is_some() { 2 * MEMORY_MIB } else { MEMORY_MIB };
        let memory = format!("memory-backend-memfd,id=memory,share=on,size={mib}M");
        let size = format!("{mib}M");
        let kernel = format!("console=ttyS0 panic=-1 quiet no_timer_check dray.modules={} {}", self.modules.join(","), self.kernel);
        // A nested KVM may be there that cannot run stock kernels: emulation is asked for by name. Without rdrand a young guest
        // has no random numbers yet.
        let machine = if self.iommu.is_some() { "q35,kernel-irqchip=split,memory-backend=memory" } else { "q35,memory-backend=memory" };
        qemu.args(["-machine", machine, "-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand", "-smp", "2"]);
        qemu.args(["-object", &memory, "-m", &size, "-nodefaults", "-nographic", "-append", &kernel]);
        let initrd = self.initrd.clone().unwrap_or_else(|| folder.join("initrd.cpio"));
        qemu.arg("-kernel").arg(folder.join("vmlinuz")).arg("-initrd").arg(initrd);
        qemu.args(["-serial", &format!("file:{}", kernel_log.display()), "-serial", "stdio"]);
        if let Some(iommu) = self.iommu {
            qemu.args(["-device", &format!("intel-iommu,{iommu}")]);
        }
        qemu.args(&self.options);
        for (at, disk) in self.disks.iter().enumerate() {
            match disk {
                Disk::VfioUser(socket) => qemu.args(["-device", &vfio_user(socket, "")]),
                Disk::Emulated(file) => {
                    qemu.args(["-drive", &format!("file={},if=none,id=disk{at},format=raw", file.display())]);
                    qemu.args(["-device", &format!("nvme,serial=emulated-{at},drive=disk{at}")])
                }
            };
        }
        if self.modules.contains(&"net") {
            qemu.args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]);
        }
        qemu
    }
}

/// The function of a vfio-user server, with more keys.
fn vfio_user(socket: &Path, keys: &str) -> String {
    let socket = socket.display();
    format!("{{\"driver\":\"vfio-user-pci\",{keys}\"socket\":{{\"type\":\"unix\",\"path\":\"{socket}\"}}}}")
}

/// Why a step did not work.
#[derive(Debug)]
pub enum Trouble {
    /// It ended with this status, having printed this.
    Failed(i32, String),
    /// The guest has booted again by itself: a kernel panic, or a reset.
    Booted,
    /// QEMU has ended.
    Gone,
    /// The deadline.
    Late,
}

/// A machine that runs.
pub struct Guest {
    machine: Machine,
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    console: Arc<Mutex<Vec<String>>>,
    kernel_log: PathBuf,
    tag: u32,
    booted_in: Duration,
}

impl Guest {
    /// Boots until the guest listens.
    ///
    /// # Panics
    /// If it does not, twice: with the end of its logs.
    #[track_caller]
    pub fn boot(machine: &Machine) -> Self {
        match Self::attempt(machine) {
            Ok(guest) => guest,
            Err(first) => {
                RETRIES.fetch_add(1, Ordering::Relaxed);
                eprintln!("{first}\nguest {}: a second attempt (retries in this process: {})", machine.name, retries());
                Self::attempt(machine).unwrap_or_else(|second| panic!("{second}"))
            }
        }
    }

    fn attempt(machine: &Machine) -> Result<Self, String> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let kernel_log = std::env::temp_dir().join(format!("dray-guest-{}-{}-{number}.log", machine.name, std::process::id()));
        let started = Instant::now();
        let mut command = machine.command(&folder(), &kernel_log);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| format!("QEMU: {error}"))?;
        let console = Arc::new(Mutex::new(Vec::new()));
        let (sender, lines) = channel();
        let (Some(input), Some(out), Some(err)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
            return Err("QEMU without pipes".into());
        };
        listen(out, "", &console, Some(sender));
        listen(err, "qemu: ", &console, None);
        let machine = machine.clone();
        let mut guest = Self { machine, child, input, lines, console, kernel_log, tag: 0, booted_in: Duration::ZERO };
        match guest.until(started + BOOT, &mut |line| line == "DRAY-READY") {
            Ok(_) => {
                guest.booted_in = started.elapsed();
                eprintln!("guest {}: booted in {:.1} s", guest.machine.name, guest.booted_in.as_secs_f64());
                Ok(guest)
            }
            Err(trouble) => Err(guest.story(&format!("the boot: {trouble:?}"))),
        }
    }

    /// How long the boot took.
    pub fn booted_in(&self) -> Duration {
        self.booted_in
    }

    /// A step that must work; what it printed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn run(&mut self, step: &str) -> String {
        self.run_within(step, STEP)
    }

    /// As [`run`](Self::run), with a deadline.
    #[track_caller]
    pub fn run_within(&mut self, step: &str, within: Duration) -> String {
        match self.step(step, within) {
            Ok(said) => said,
            Err(trouble) => panic!("{}", self.story(&format!("`{step}`: {trouble:?}"))),
        }
    }

    /// A step; what it printed, or why it did not work.
    pub fn step(&mut self, step: &str, within: Duration) -> Result<String, Trouble> {
        let deadline = Instant::now() + within;
        self.tag += 1;
        let tag = self.tag;
        self.send(&format!("{tag} {step}"))?;
        let (good, bad) = (format!("DRAY-OK {tag}"), format!("DRAY-FAIL {tag} "));
        let mut said = String::new();
        let mut booted = false;
        let end = self.until(deadline, &mut |line| {
            booted = line == "DRAY-READY";
            let end = booted || line == good || line.starts_with(&bad);
            if !end && !line.is_empty() {
                let _infallible = writeln!(said, "{line}");
            }
            end
        })?;
        match end.strip_prefix(&bad) {
            _ if booted => Err(Trouble::Booted),
            None => Ok(said),
            Some(code) => Err(Trouble::Failed(code.parse().unwrap_or(-1), said)),
        }
    }

    /// Restarts the guest, not QEMU, and waits until it listens again.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn reboot(&mut self) {
        self.tag += 1;
        let line = format!("{} restart", self.tag);
        let sent = self.send(&line);
        let end = sent.and_then(|()| self.until(Instant::now() + BOOT, &mut |line| line == "DRAY-READY"));
        if let Err(trouble) = end {
            panic!("{}", self.story(&format!("the reboot: {trouble:?}")));
        }
    }

    /// Switches the guest off and waits for QEMU's end.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    pub fn off(mut self) {
        self.tag += 1;
        let line = format!("{} off", self.tag);
        let sent = self.send(&line);
        let end = sent.and_then(|()| self.until(Instant::now() + STEP, &mut |_| false));
        assert!(matches!(end, Err(Trouble::Gone)), "{}", self.story(&format!("switching off: {end:?}")));
    }

    /// Kills QEMU, as a crash would.
    pub fn kill(mut self) {
        let _ended = self.end();
    }

    fn end(&mut self) -> std::io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    fn send(&mut self, line: &str) -> Result<(), Trouble> {
        let written = self.input.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.input.flush());
        written.map_err(|_| Trouble::Gone)
    }

    /// Reads lines until one is the end.
    fn until(&mut self, deadline: Instant, is_end: &mut dyn FnMut(&str) -> bool) -> Result<String, Trouble> {
        loop {
            let left = deadline.checked_duration_since(Instant::now()).ok_or(Trouble::Late)?;
            match self.lines.recv_timeout(left) {
                Ok(line) if is_end(&line) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Err(Trouble::Late),
                Err(RecvTimeoutError::Disconnected) => return Err(Trouble::Gone),
            }
        }
    }

    /// What happened, with the end of both logs.
    fn story(&self, what: &str) -> String {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = std::fs::read(&self.kernel_log).unwrap_or_default();
        let kernel = String::from_utf8_lossy(&kernel);
        let kernel: Vec<_> = kernel.lines().map(ToOwned::to_owned).collect();
        let name = &self.machine.name;
        format!("guest {name}: {what}\n-- its console:\n{}\n-- its kernel:\n{}", tail(&console), tail(&kernel))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ended = self.end();
        if std::thread::panicking() {
            // The panic may be about another part: what this guest said helps then too.
            eprintln!("{}", self.story("was running"));
        }
        let _gone = std::fs::remove_file(&self.kernel_log);
    }
}

fn tail(lines: &[String]) -> String {
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

/// Reads a stream on a thread of its own until it ends: every line into the console's log, and to whoever listens.
fn listen(stream: impl Read + Send + 'static, mark: &'static str, console: &Arc<Mutex<Vec<String>>>, to: Option<Sender<String>>) {
    let console = Arc::clone(console);
    std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut bytes = Vec::new();
        while stream.read_until(b'\n', &mut bytes).is_ok_and(|read| read != 0) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            console.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{mark}{line}"));
            if let Some(to) = &to {
                // Nobody listens any more at the end.
                let _unheard = to.send(line);
            }
        }
    });
}
