//! Who is outside of the machine: a host that connects to what the image serves, and a machine that namespaces are moved to.

use dray_device::command::{CommandQueue, Completion};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::random::SecureRandom;
use dray_device::socket::TcpSocket;
use dray_driver::AdminData;
use dray_driver::nvme_tcp::{TcpConfig, TcpInitiator, TcpQueue, TcpState};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyNamespace};
use dray_tests::dray_in_guest::binary;
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-00000000d0e5";
const SERVED: &str = "nqn.2026-11.org.example:drives";
const FAR: &str = "nqn.2026-11.org.example:far";
/// Most bytes of one read.
const MOST: usize = 64 << 10;

/// A host, with one queue to one namespace.
pub struct Host {
    initiator: TcpInitiator,
    queue: TcpQueue,
    buffer: DmaBuffer,
    began: Instant,
    namespace: IdentifyNamespace,
}

/// No challenge is made without a secret.
struct NoSecrets;

impl SecureRandom for NoSecrets {
    fn fill(&mut self, into: &mut [u8]) {
        into.fill(1);
    }
}

impl Host {
    /// The table of the export that a host can connect to.
    pub fn export(port: u16) -> String {
        format!(
            "[[export]]\nsubsystem = \"source\"\ncontrollers = [2]\nby = \"nvme-tcp\"\nlisten = \"0.0.0.0:{port}\"\n\
             hosts = [{{ nqn = \"{HOST}\" }}]\n"
        )
    }

    /// Connects to namespace 1 as soon as somebody serves it.
    pub fn connect(port: u16, within: Duration) -> Result<Self, String> {
        let end = Instant::now() + within;
        loop {
            match Self::attempt(port, end) {
                Err(why) if Instant::now() > end => return Err(format!("no connection to the export: {why}")),
                // The forwarded port is there before the export is: connections are closed at once then.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
                done => return done,
            }
        }
    }

    fn attempt(port: u16, end: Instant) -> Result<Self, String> {
        let stream = || {
            let stream = TcpStream::connect(("127.0.0.1", port)).and_then(TcpSocket::new);
            stream.map(Box::new).map_err(|error| error.to_string())
        };
        let config = TcpConfig::new(HOST, [9; 16], SERVED);
        let began = Instant::now();
        let now = || Time::from_us(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
        let initiator = TcpInitiator::connect(now(), config, stream()?, Box::new(NoSecrets));
        let mut initiator = initiator.map_err(|error| error.to_string())?;
        let mut until = |step: &mut dyn FnMut(&mut TcpInitiator) -> bool| loop {
            let _again = initiator.poll(now());
            if let TcpState::Failed(error) = initiator.state() {
                return Err(error.to_string());
            }
            if step(&mut initiator) {
                return Ok(());
            }
            if Instant::now() > end {
                return Err("it takes too long".to_owned());
            }
            std::thread::yield_now();
        };
        until(&mut |initiator| initiator.is_ready())?;
        let entry = SubmissionEntry::identify(Cns::NAMESPACE, 1, 0, CommandSetId::NVM);
        let (mut ticket, mut page) = (None, None);
        until(&mut |initiator| {
            ticket = ticket.or_else(|| initiator.request(now(), &entry, AdminData::In(IDENTIFY_BYTES)).ok());
            page = ticket.and_then(|ticket| initiator.answer(ticket));
            page.is_some()
        })?;
        let page = page.ok_or("no answer")?.data;
        let namespace = IdentifyNamespace::read_from_bytes(&page[..]).map_err(|_| format!("{} bytes of Identify", page.len()))?;
        let mut io = Some(stream()?);
        let (mut ticket, mut queue) = (None, None);
        until(&mut |initiator| {
            if let Some(stream) = io.take() {
                ticket = initiator.open_queue(now(), stream, 32).ok();
            }
            queue = ticket.take().and_then(|wanted| {
                let taken = initiator.take_queue(wanted);
                if taken.is_none() {
                    ticket = Some(wanted);
                }
                taken
            });
            queue.is_some()
        })?;
        let queue = queue.ok_or("no queue")?.map_err(|error| error.to_string())?;
        let buffer = DmaBuffer::allocate("host", MOST, Pages::Small).map_err(|error| error.to_string())?;
        Ok(Self { initiator, queue, buffer, began, namespace })
    }

    /// Bytes of the namespace.
    pub fn bytes(&self) -> u64 {
        self.namespace.nsze * u64::from(self.namespace.block_bytes().unwrap_or(0))
    }

    /// Reads blocks of 512 bytes.
    pub fn read(&mut self, slba: u64, blocks: u32) -> Result<Vec<u8>, String> {
        let len = blocks as usize * 512;
        self.command(&SubmissionEntry::read(1, slba, blocks), len)?;
        let mut bytes = vec![0; len];
        self.buffer.part(0, len).ok_or("too much")?.read(&mut bytes);
        Ok(bytes)
    }

    /// Writes blocks of 512 bytes, onto stable storage.
    pub fn write(&mut self, slba: u64, bytes: &[u8]) -> Result<(), String> {
        self.buffer.part(0, bytes.len()).ok_or("too much")?.write(bytes);
        let blocks = u32::try_from(bytes.len() / 512).map_err(|error| error.to_string())?;
        self.command(&SubmissionEntry::write(1, slba, blocks).with_fua(), bytes.len())
    }

    fn command(&mut self, entry: &SubmissionEntry, len: usize) -> Result<(), String> {
        let now = |began: Instant| Time::from_us(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
        let data = self.buffer.part(0, len).ok_or("too much")?;
        self.queue.submit(now(self.began), entry, &[data], 0).map_err(|error| error.to_string())?;
        self.queue.commit();
        let (mut ended, end): (Option<Completion>, _) = (None, Instant::now() + Duration::from_secs(60));
        while ended.is_none() {
            let _again = self.initiator.poll(now(self.began));
            self.queue.poll(now(self.began), &mut |completion| ended = Some(completion));
            if Instant::now() > end {
                return Err("a command is not answered".into());
            }
            std::thread::yield_now();
        }
        match ended {
            Some(Completion { unknown: false, status, .. }) if !status.is_error() => Ok(()),
            Some(completion) => Err(format!("{} (unknown: {})", completion.status, completion.unknown)),
            None => Err("no completion".into()),
        }
    }
}

/// A machine outside, with a namespace in a file.
pub struct Target {
    child: Child,
    port: u16,
    file: PathBuf,
}

impl Drop for Target {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Target {
    /// Starts it.
    pub fn start(folder: &Path, bytes: u64) -> Self {
        let file = folder.join("far.img");
        let side = |name: &str, backing: &str| {
            format!(
                "[[subsystem]]\nname = \"{name}\"\nnqn = \"{FAR}\"\nserial = \"FAR\"\n\
                 [[subsystem.namespace]]\nnsid = 1\nnguid = \"000000000000000000000000000000f1\"\nblock = \"512B\"\n{backing}\n\
                 [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
                 [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
            )
        };
        let policies: String = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
        let text = format!(
            "[core]\nstate = \"far-state\"\n{}{}\
             [[export]]\nsubsystem = \"far\"\ncontrollers = [2]\nby = \"nvme-tcp\"\nlisten = \"127.0.0.1:0\"\n\
             hosts = [{{ nqn = \"{HOST}\" }}]\n[migration]\nfrom = \"far\"\nto = \"spare\"\n{policies}",
            side("far", &format!("backing = \"file\"\npath = \"far.img\"\nsize = \"{bytes}B\"")),
            side("spare", "backing = \"memory\"\nsize = \"1MiB\"")
        );
        std::fs::write(folder.join("far.toml"), text).expect("a configuration");
        let mut command = Command::new(binary());
        command.args(["--config", "far.toml", "run"]).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("dray runs");
        let mut lines = BufReader::new(child.stdout.take().expect("its output"));
        let mut said = String::new();
        while !said.ends_with("ready\n") {
            assert!(lines.read_line(&mut said).expect("a line") > 0, "it has ended: {said}");
        }
        let address = said.lines().find_map(|line| line.split_once("by nvme-tcp at 127.0.0.1:")).expect("an export").1;
        let port = address.split_whitespace().next().and_then(|port| port.parse().ok()).expect("a port");
        Self { child, port, file }
    }

    /// The file of its namespace.
    pub fn file(&self) -> PathBuf {
        self.file.clone()
    }

    /// The table of the device that it is for the image.
    pub fn device(&self, host: &str) -> String {
        format!("[[device]]\nname = \"far\"\nnvme-tcp = \"{host}:{}\"\nnqn = \"{FAR}\"\nhost-nqn = \"{HOST}\"\n", self.port)
    }
}
