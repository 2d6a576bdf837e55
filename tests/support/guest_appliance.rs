//! The appliance before guests: `dray run` on a configuration of its own, started, asked, stopped, killed and started again.

use super::dray_in_guest::binary;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long it may take until it serves, and until it has stopped.
const PATIENCE: Duration = Duration::from_secs(120);
/// The subsystem's NQN.
pub const NQN: &str = "nqn.2026-11.org.example:clients";
/// The serial number of its controllers.
pub const SERIAL: &str = "DRAY-CLIENTS";
/// The host that `tests/guests/steps.sh` says it is.
pub const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:d7a10000-0000-4000-8000-000000000001";

/// A TCP port of the loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}

/// A source with two migratable controllers (2 on namespace 1, 3 on namespace 2, each a file of 96 MiB) and a destination.
fn subsystems() -> String {
    let side = |name: &str| {
        let mut text = format!(
            "[[subsystem]]\nname = \"{name}\"\nnqn = \"{NQN}\"\nserial = \"{SERIAL}\"\n\
             [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n"
        );
        for nsid in 1..=2 {
            text += &format!(
                "[[subsystem.namespace]]\nnsid = {nsid}\nbacking = \"file\"\npath = \"{name}-{nsid}.img\"\nsize = \"96MiB\"\n\
                 block = \"4KiB\"\nnguid = \"d7a100000000000000000000000000c{nsid}\"\n\
                 [[subsystem.controller]]\ncntlid = {}\nrole = \"migratable\"\nnamespaces = [{nsid}]\n",
                nsid + 1
            );
        }
        text
    };
    let policies: String = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
    format!("{}{}[migration]\nfrom = \"source\"\nto = \"destination\"\n{policies}", side("source"), side("destination"))
}

/// The table of an export by vfio-user; `bar0` is what of it a client may map.
pub fn by_vfio_user(controller: u16, bar0: &str) -> String {
    format!(
        "[[export]]\nsubsystem = \"source\"\ncontroller = {controller}\nby = \"vfio-user\"\nsocket = \"{}\"\nbar0 = \"{bar0}\"\n",
        socket_name(controller)
    )
}

fn socket_name(controller: u16) -> String {
    format!("c{controller}.sock")
}

/// The table of an export by NVMe/TCP to [`HOST`], which must authenticate if there is a file with a secret.
pub fn by_nvme_tcp(controller: u16, port: u16, secret_file: Option<&str>) -> String {
    let secret = secret_file.map(|file| format!(", secret-file = \"{file}\"")).unwrap_or_default();
    format!(
        "[[export]]\nsubsystem = \"source\"\ncontrollers = [{controller}]\nby = \"nvme-tcp\"\nlisten = \"127.0.0.1:{port}\"\n\
         hosts = [{{ nqn = \"{HOST}\"{secret} }}]\n"
    )
}

/// `dray run` in a folder of its own.
pub struct Appliance {
    folder: PathBuf,
    child: Child,
    lines: Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Appliance {
    /// A folder for a configuration with these exports; nothing runs yet. Files can be put there before [`start`](Self::start).
    pub fn folder(name: &str, exports: &[String]) -> PathBuf {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Paths of Unix sockets are short.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("dray-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let text = format!("[core]\nstate = \"state\"\n{}{}", subsystems(), exports.concat());
        std::fs::write(folder.join("appliance.toml"), text).expect("a configuration");
        folder
    }

    /// Starts on a folder's configuration and waits until it serves.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn start(folder: &Path) -> Self {
        let mut command = Command::new(binary());
        command.arg("--config").arg(folder.join("appliance.toml")).arg("run");
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.expect("dray runs");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (sender, lines) = channel();
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("its output")), Box::new(child.stderr.take().expect("its messages"))];
        for stream in streams {
            let (log, sender) = (Arc::clone(&log), sender.clone());
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    log.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
                    let _unheard = sender.send(line);
                }
            });
        }
        let appliance = Self { folder: folder.into(), child, lines, log };
        appliance.hear("ready");
        appliance
    }

    /// Waits for a line.
    #[track_caller]
    fn hear(&self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line == wanted => return,
                Ok(_) => {}
                Err(_) => panic!("the appliance never said \"{wanted}\":\n{}", self.story()),
            }
        }
    }

    /// Everything it has said.
    pub fn story(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// The Unix socket of [`by_vfio_user`].
    pub fn socket(&self, controller: u16) -> PathBuf {
        self.folder.join(socket_name(controller))
    }

    /// What `dray status --json` prints.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn status(&self) -> String {
        let config = self.folder.join("appliance.toml");
        let output = Command::new(binary()).args(["status", "--json", "--config"]).arg(config).output();
        let output = output.expect("dray status");
        assert!(output.status.success(), "{output:?}\n{}", self.story());
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Exchanges the backing of the source's namespace for a copy in another file; the end's line of the control protocol.
    ///
    /// # Panics
    /// If it does not end well.
    #[track_caller]
    pub fn media_move(&self, nsid: u32, to: &str) -> String {
        let mut socket = UnixStream::connect(self.folder.join("state/control.sock")).expect("the control socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let to = self.folder.join(to);
        let request = format!(
            "{{\"v\":1,\"id\":1,\"do\":\"media-move\",\"subsystem\":\"source\",\"nsid\":{nsid},\"to\":\"{}\"}}\n",
            to.display()
        );
        socket.write_all(request.as_bytes()).expect("a request");
        let lines = BufReader::new(socket).lines().map(|line| line.expect("an answer in time"));
        let end = lines.into_iter().find(|line| !line.contains("\"event\"")).expect("an end");
        assert!(end.contains("\"ok\""), "{end}\n{}", self.story());
        end
    }

    /// Ends it as `systemctl stop` would, and waits: exports are drained, the exit status is 0. The folder stays.
    ///
    /// # Panics
    /// If it does not end well.
    #[track_caller]
    pub fn stop(mut self) -> PathBuf {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal");
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("its end") {
                break status;
            }
            assert!(Instant::now() < deadline, "the appliance does not stop:\n{}", self.story());
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success(), "{status}:\n{}", self.story());
        self.folder.clone()
    }

    /// Kills it, as a crash would. The folder stays.
    pub fn kill(mut self) -> PathBuf {
        let _ended = self.child.kill().and_then(|()| self.child.wait());
        self.folder.clone()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        let _ended = self.child.kill().and_then(|()| self.child.wait());
        if std::thread::panicking() {
            eprintln!("-- the appliance in {}:\n{}", self.folder.display(), self.story());
        }
    }
}

/// Removes a folder that is of no more use.
pub fn remove(folder: &Path) {
    let _gone = std::fs::remove_dir_all(folder);
}
