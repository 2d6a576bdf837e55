//! The appliance's own image, booted headless under software emulation: from its disk by UEFI, or its kernel directly.
//!
//! `cargo xtask image` made what boots (`target/image`), `cargo xtask guests` the QEMU (`target/guests`). The first serial line
//! is the image's console and goes to a file; the second takes dray commands, a line each (`[image] console = "ttyS1"`). A boot
//! that did not come about is tried a second time, counted and shown. QEMU's exit status says nothing: only lines count.

use crate::guest::{self, BOOT};
use crate::image_disk::built;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a command may take unless it says so.
pub const COMMAND: Duration = Duration::from_secs(120);
/// How long it may take until a line comes that nothing but the emulation stands before.
pub const SOON: Duration = Duration::from_secs(180);
/// Lines of a log that a failure shows.
const TAIL: usize = 70;
/// How often something is looked at that gives no sign.
const LOOK: Duration = Duration::from_millis(20);
/// A processor with what compiled policies may use and nothing more.
const CPU: &str = "Nehalem,+rdrand";

static NUMBER: AtomicU32 = AtomicU32::new(0);
static RETRIES: AtomicU32 = AtomicU32::new(0);

/// What boots.
#[derive(Clone, Debug)]
pub enum Boot {
    /// A disk, by UEFI and its boot loader; the variables of the firmware stay in the machine's folder.
    Disk(PathBuf),
    /// The kernel and the initial RAM disk of `target/image`.
    Direct {
        /// Words behind the command line.
        words: String,
        /// A disk that is there besides.
        disk: Option<PathBuf>,
    },
}

/// A machine that the image runs on.
#[derive(Clone, Debug)]
pub struct Machine {
    name: String,
    folder: PathBuf,
    boot: Boot,
    drives: Vec<(String, PathBuf)>,
    forwards: Vec<(u16, u16)>,
    memory_mib: u32,
    more: Vec<String>,
}

impl Machine {
    /// A machine with 1 GiB, two processors behind an IOMMU, and a network in which the host's loopback is 10.0.2.2. `folder` is
    /// for its logs and sockets: a short path.
    #[must_use]
    pub fn new(name: &str, folder: &Path, boot: Boot) -> Self {
        let (drives, forwards, more) = (Vec::new(), Vec::new(), Vec::new());
        Self { name: name.into(), folder: folder.into(), boot, drives, forwards, memory_mib: 1024, more }
    }

    /// With QEMU's own NVMe controller, of this name, on a file: the name is its serial number, and what [`Image::unplug`] takes.
    #[must_use]
    pub fn drive(mut self, name: &str, file: &Path) -> Self {
        self.drives.push((name.into(), file.into()));
        self
    }

    /// With a port of the guest's reached by a port of the host's loopback.
    #[must_use]
    pub fn forward(mut self, host: u16, guest: u16) -> Self {
        self.forwards.push((host, guest));
        self
    }

    /// With more options of QEMU's.
    #[must_use]
    pub fn option(mut self, words: &[&str]) -> Self {
        self.more.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    fn command(&self, log: &Path, number: u32) -> Command {
        let tools = guest::folder();
        let mut qemu = Command::new(tools.join("qemu-system-x86_64"));
        // A nested KVM may be there that cannot run stock kernels: emulation is asked for by name.
        qemu.args(["-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2"]);
        qemu.args(["-m", &format!("{}M", self.memory_mib), "-nodefaults", "-nographic", "-device", "intel-iommu,intremap=on"]);
        qemu.args(["-serial", &format!("file:{}", log.display())]);
        for (id, device) in [("commands", "-serial"), ("qmp", "-qmp")] {
            let socket = self.socket(id, number);
            qemu.args(["-chardev", &format!("socket,id={id},path={},server=on,wait=off", socket.display())]);
            qemu.args([device, &format!("chardev:{id}")]);
        }
        match &self.boot {
            Boot::Disk(disk) => {
                let flash = |unit, file: &Path, mode| format!("if=pflash,format=raw,unit={unit},file={}{mode}", file.display());
                qemu.args(["-drive", &flash(0, &tools.join("OVMF_CODE_4M.fd"), ",readonly=on")]);
                qemu.args(["-drive", &flash(1, &self.variables(), "")]);
                boot_disk(&mut qemu, disk, ",bootindex=0");
            }
            Boot::Direct { words, disk } => {
                let image = built();
                let line = format!("{} {words}", manifest_value("options"));
                qemu.arg("-kernel").arg(image.join("vmlinuz")).arg("-initrd").arg(image.join("initrd")).args(["-append", &line]);
                if let Some(disk) = disk {
                    // A kernel that QEMU loads takes the first place itself.
                    boot_disk(&mut qemu, disk, "");
                }
            }
        }
        for (name, file) in &self.drives {
            qemu.args(["-drive", &format!("file={},if=none,id=d-{name},format=raw", file.display())]);
            // Behind a port of their own, drives can be pulled out.
            qemu.args(["-device", &format!("pcie-root-port,id=p-{name},chassis={}", self.chassis(name))]);
            qemu.args(["-device", &format!("nvme,id={name},bus=p-{name},serial={name},drive=d-{name}")]);
        }
        let forward = |(host, guest): &(u16, u16)| format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}");
        let forwards: String = self.forwards.iter().map(forward).collect();
        qemu.args(["-netdev", &format!("user,id=net{forwards}"), "-device", "virtio-net-pci,netdev=net,romfile="]);
        qemu.args(&self.more);
        qemu
    }

    fn chassis(&self, name: &str) -> usize {
        1 + self.drives.iter().position(|(known, _)| known == name).unwrap_or(0)
    }

    fn socket(&self, what: &str, number: u32) -> PathBuf {
        self.folder.join(format!("{what}-{number}.sock"))
    }

    /// The firmware's variables: made once, kept over boots.
    fn variables(&self) -> PathBuf {
        let path = self.folder.join("variables.fd");
        if !path.exists() {
            std::fs::copy(guest::folder().join("OVMF_VARS_4M.fd"), &path).expect("the firmware's variables");
        }
        path
    }
}

fn boot_disk(qemu: &mut Command, disk: &Path, order: &str) {
    qemu.args(["-drive", &format!("file={},if=none,id=boot,format=raw,cache.writeback=on,cache.direct=off,cache.no-flush=on", disk.display())]);
    qemu.args(["-device", &format!("virtio-blk-pci,drive=boot{order}")]);
}

/// A line of the built image's manifest: what is behind the word.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn manifest_value(word: &str) -> String {
    let text = std::fs::read_to_string(built().join("manifest")).expect("the manifest");
    let value = text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {word} in the manifest:\n{text}")).to_owned()
}

/// The image as it runs.
pub struct Image {
    machine: Machine,
    child: Child,
    number: u32,
    log: PathBuf,
    errors: PathBuf,
    commands: Option<BufReader<UnixStream>>,
    tag: u32,
    /// How many lines of the log are behind us.
    seen: usize,
}

impl Image {
    /// Boots until the log has `line`.
    ///
    /// # Panics
    /// If it does not come, twice: with the end of the logs.
    #[track_caller]
    #[must_use]
    pub fn boot(machine: &Machine, line: &str) -> Self {
        match Self::attempt(machine, line) {
            Ok(image) => image,
            Err(first) => {
                let retries = RETRIES.fetch_add(1, Ordering::Relaxed) + 1;
                eprintln!("{first}\nimage {}: a second attempt (retries in this process: {retries})", machine.name);
                Self::attempt(machine, line).unwrap_or_else(|second| panic!("{second}"))
            }
        }
    }

    fn attempt(machine: &Machine, line: &str) -> Result<Self, String> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = machine.folder.join(format!("console-{number}.log"));
        let errors = machine.folder.join(format!("qemu-{number}.log"));
        let started = Instant::now();
        let stderr = File::create(&errors).map_err(|error| format!("{}: {error}", errors.display()))?;
        let mut command = machine.command(&log, number);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn();
        let child = spawned.map_err(|error| format!("QEMU: {error}"))?;
        let mut image = Self { machine: machine.clone(), child, number, log, errors, commands: None, tag: 0, seen: 0 };
        match image.until(line, started + BOOT) {
            Ok(_) => {
                eprintln!("image {}: \"{line}\" after {:.1} s", machine.name, started.elapsed().as_secs_f64());
                Ok(image)
            }
            Err(why) => Err(image.story(&format!("the boot, waiting for \"{line}\": {why}"))),
        }
    }

    /// Every line of its console so far, the kernel's too.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).lines().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Waits for a line with this in it, later than the one that was waited for last; the whole line.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn hear(&mut self, wanted: &str, within: Duration) -> String {
        match self.until(wanted, Instant::now() + within) {
            Ok(line) => line,
            Err(why) => panic!("{}", self.story(&format!("waiting for \"{wanted}\": {why}"))),
        }
    }

    fn until(&mut self, wanted: &str, deadline: Instant) -> Result<String, &'static str> {
        loop {
            // Looked at before the log: what it wrote last is seen then.
            let gone = !matches!(self.child.try_wait(), Ok(None));
            let lines = self.log();
            if let Some(at) = lines.iter().skip(self.seen).position(|line| line.contains(wanted)) {
                let line = lines[self.seen + at].clone();
                self.seen += at + 1;
                return Ok(line);
            }
            if gone {
                return Err("QEMU has ended");
            }
            if Instant::now() >= deadline {
                return Err("it took too long");
            }
            std::thread::sleep(LOOK);
        }
    }

    /// A dray command on the image's second serial line: its exit code and what it printed.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    pub fn command(&mut self, words: &str, within: Duration) -> (i32, String) {
        self.tag += 1;
        let tag = format!("t{}", self.tag);
        match self.try_command(&tag, words, within) {
            Ok(answer) => answer,
            Err(error) => panic!("{}", self.story(&format!("the command `{words}`: {error}"))),
        }
    }

    /// A command that must succeed; what it printed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn run(&mut self, words: &str) -> String {
        let (code, said) = self.command(words, COMMAND);
        assert!(code == 0, "{}", self.story(&format!("`{words}` ended with {code}:\n{said}")));
        said
    }

    fn try_command(&mut self, tag: &str, words: &str, within: Duration) -> Result<(i32, String), String> {
        let deadline = Instant::now() + within;
        if self.commands.is_none() {
            let stream = self.connect("commands")?;
            self.commands = Some(BufReader::new(stream));
        }
        let stream = self.commands.as_mut().ok_or("no line")?;
        let line = format!("#{tag} {words}\n");
        stream.get_mut().write_all(line.as_bytes()).map_err(|error| error.to_string())?;
        let end = format!("dray: {tag} exit ");
        let mut said = String::new();
        loop {
            let left = deadline.checked_duration_since(Instant::now());
            let left = left.ok_or_else(|| format!("no answer; it said so far:\n{said}"))?;
            stream.get_ref().set_read_timeout(Some(left.max(LOOK))).map_err(|error| error.to_string())?;
            let mut line = String::new();
            match stream.read_line(&mut line) {
                Ok(0) => return Err(format!("the line was closed; it said so far:\n{said}")),
                Ok(_) => {}
                Err(error) => return Err(format!("{error}; it said so far:\n{said}{line}")),
            }
            let line = line.trim_end();
            if let Some(code) = line.strip_prefix(&end) {
                return Ok((code.parse().map_err(|_| format!("odd end: {line}"))?, said));
            }
            said.push_str(line);
            said.push('\n');
        }
    }

    /// Tells a command that is not waited for.
    ///
    /// # Panics
    /// If nobody listens.
    pub fn tell(&mut self, words: &str) {
        let mut stream = match self.commands.take() {
            Some(stream) => stream,
            None => BufReader::new(self.connect("commands").expect("the commands' line")),
        };
        stream.get_mut().write_all(format!("{words}\n").as_bytes()).expect("a command");
        self.commands = Some(stream);
    }

    fn connect(&self, what: &str) -> Result<UnixStream, String> {
        let path = self.machine.socket(what, self.number);
        UnixStream::connect(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// A command to QEMU itself, such as `{"execute":"system_powerdown"}`; its answer.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn qmp(&self, command: &str) -> String {
        let run = || -> Result<String, String> {
            let mut stream = BufReader::new(self.connect("qmp")?);
            stream.get_ref().set_read_timeout(Some(COMMAND)).map_err(|error| error.to_string())?;
            let mut said = String::new();
            for (at, words) in ["{\"execute\":\"qmp_capabilities\"}", command].into_iter().enumerate() {
                if at == 0 {
                    // The greeting.
                    stream.read_line(&mut said).map_err(|error| error.to_string())?;
                }
                stream.get_mut().write_all(format!("{words}\n").as_bytes()).map_err(|error| error.to_string())?;
                loop {
                    said.clear();
                    let read = stream.read_line(&mut said).map_err(|error| error.to_string())?;
                    if read == 0 || said.contains("\"error\"") {
                        return Err(said);
                    }
                    // Events come in between.
                    if said.starts_with("{\"return\"") {
                        break;
                    }
                }
            }
            Ok(said)
        };
        run().unwrap_or_else(|error| panic!("{}", self.story(&format!("QMP {command}: {error}"))))
    }

    /// Pulls a drive out (surprise removal, as far as the guest takes part).
    ///
    /// # Panics
    /// If QEMU refuses.
    #[track_caller]
    pub fn unplug(&self, drive: &str) {
        self.qmp(&format!("{{\"execute\":\"device_del\",\"arguments\":{{\"id\":\"{drive}\"}}}}"));
    }

    /// Presses the power button and waits for QEMU's end.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    pub fn press_power(self) -> Vec<String> {
        self.qmp("{\"execute\":\"system_powerdown\"}");
        self.ends()
    }

    /// Switches it off by its console and waits for QEMU's end; what the console said from the start.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    pub fn off(mut self) -> Vec<String> {
        self.tell("poweroff");
        self.ends()
    }

    #[track_caller]
    fn ends(mut self) -> Vec<String> {
        let deadline = Instant::now() + SOON;
        while matches!(self.child.try_wait(), Ok(None)) {
            assert!(Instant::now() < deadline, "{}", self.story("it does not switch off"));
            std::thread::sleep(LOOK);
        }
        self.log()
    }

    /// Kills QEMU: a power cut.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }

    /// What happened, with the end of its logs.
    #[must_use]
    pub fn story(&self, what: &str) -> String {
        let log = self.log();
        let errors = std::fs::read_to_string(&self.errors).unwrap_or_default();
        let tail = log[log.len().saturating_sub(TAIL)..].join("\n");
        format!("image {}: {what}\n-- its console ({}):\n{tail}\n-- QEMU:\n{errors}", self.machine.name, self.log.display())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprintln!("{}", self.story("was running"));
        }
    }
}

/// An HTTP GET by a port of the loopback; the body.
///
/// # Errors
/// What went wrong, or the status line if it is not 200.
pub fn get(port: u16, path: &str) -> Result<String, String> {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|error| error.to_string())?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: dray\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(|error| error.to_string())?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("no HTTP: {answer}"))?;
    if head.starts_with("HTTP/1.1 200") || head.starts_with("HTTP/1.0 200") { Ok(body.into()) } else { Err(answer) }
}
