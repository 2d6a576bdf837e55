//! Guest, source and destination in three processes: this one has the guest and the migration, each end is a process that was
//! started for it ([`end`]), and all that goes between them is vfio-user: the guest drives its controller through
//! [`SwitchedFunction`], the migration both management controllers, and data goes between the ends through memory of this
//! process that both have mapped.
//!
//! The fence before a controller is in the process that has the controller, so raising it is an order that is answered. An end
//! that does not answer in time is killed: what does not run fetches nothing.
//!
//! Not here: source and destination on different machines (the memory is shared), interrupts (the guest polls).

pub mod end;
mod function;

pub use function::SwitchedFunction;

use crate::assembly::{file_of, pages};
use crate::config::{BackingKind, Config, Role};
use crate::live::{Ends, LiveError};
use dray_device::function::Function;
use dray_device::socket::UnixSocket;
use dray_device::space::AddressSpace;
use dray_device::vfio_user::client::{ClientConfig, VfioUserClient};
use dray_driver::{Driver, DriverConfig};
use dray_migration::{FenceControl, GuestSlot, Owner};
use dray_workload::guest::GuestHandle;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(crate) const READY: &str = "ready";
pub(crate) const RAISE: &str = "raise";
pub(crate) const LOWER: &str = "lower";
pub(crate) const DONE: &str = "done";

/// How long an end may take to come up: it waits for a process that was killed to let go of its files.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long an end may take to answer an order. The guest waits meanwhile.
const ORDER_PATIENCE: Duration = Duration::from_secs(2);
/// How long an end may take to end.
const END_PATIENCE: Duration = Duration::from_secs(8);

/// The sockets of an end: its management controller's and its migratable one's.
pub(crate) fn sockets(folder: &Path, name: &str) -> [PathBuf; 2] {
    [folder.join(format!("{name}-management.sock")), folder.join(format!("{name}.sock"))]
}

/// What an end is started with.
pub struct EndSpec<'a> {
    /// The file that the configuration was read from.
    pub file: &'a Path,
    /// The configuration, with what the command line has changed of it.
    pub config: &'a Config,
    /// The subsystem.
    pub name: &'a str,
    /// Whether its controllers come up behind a raised fence (rule 9).
    pub fenced: bool,
    /// Where its sockets are made.
    pub folder: &'a Path,
}

/// An end that runs. Dropping it ends it.
struct End {
    name: String,
    child: Child,
    orders: Option<ChildStdin>,
    said: Receiver<String>,
}

impl End {
    fn start(spec: &EndSpec<'_>) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve-end").arg(spec.name).arg("--config").arg(spec.file).arg("--sockets").arg(spec.folder);
        if spec.fenced {
            command.arg("--fenced");
        }
        for namespace in spec.config.subsystem(spec.name).iter().flat_map(|subsystem| &subsystem.namespaces) {
            if let (BackingKind::File, Some(path)) = (namespace.backing, file_of(spec.config, namespace)) {
                let mut file = std::ffi::OsString::from(format!("{}=", namespace.nsid.get_ref()));
                file.push(std::path::absolute(path)?);
                command.arg("--file").arg(file);
            }
        }
        // A group of its own: Ctrl-C is for this process, which needs both ends to undo what it has begun.
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).spawn()?;
        let (orders, out) = (child.stdin.take(), child.stdout.take());
        let (to, said) = channel();
        let mut this = Self { name: spec.name.to_owned(), child, orders, said };
        let listen = move || {
            for line in out.into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
                if to.send(line).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("dray-answers".into()).spawn(listen)?;
        if this.hears(READY, START_PATIENCE) {
            return Ok(this);
        }
        let status = this.child.try_wait()?.map_or("it says nothing".to_owned(), |status| status.to_string());
        Err(io::Error::other(format!("the process of \"{}\" did not come up: {status}", spec.name)))
    }

    fn hears(&mut self, word: &str, patience: Duration) -> bool {
        self.said.recv_timeout(patience).is_ok_and(|line| line == word)
    }

    /// Gives an order, and kills who does not answer.
    fn order(&mut self, order: &str) {
        let sent = self.orders.as_mut().is_some_and(|to| writeln!(to, "{order}").and_then(|()| to.flush()).is_ok());
        if sent && self.hears(DONE, ORDER_PATIENCE) {
            return;
        }
        tracing::error!(end = self.name, order, "an end does not answer and is killed");
        self.kill();
    }

    fn kill(&mut self) {
        self.orders = None;
        // It may have ended by itself; waited for, nothing of it runs any more.
        let _ended = self.child.kill().and_then(|()| self.child.wait().map(drop));
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.orders = None;
        let end = Instant::now() + END_PATIENCE;
        while Instant::now() < end {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        self.kill();
    }
}

type Both = Arc<Mutex<[End; 2]>>;

struct OrderedFences(Both);

impl OrderedFences {
    fn order(&self, end: Owner, order: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[end as usize].order(order);
    }
}

impl FenceControl for OrderedFences {
    fn raise(&mut self, end: Owner) {
        self.order(end, RAISE);
    }

    fn lower(&mut self, end: Owner) {
        self.order(end, LOWER);
    }
}

struct ApartSlot {
    function: Arc<SwitchedFunction>,
    guest: GuestHandle,
}

impl GuestSlot for ApartSlot {
    fn point_at_destination(&mut self, _cntlid: u16) {
        // The source is suspended: whatever the guest has outstanding now may end at the destination.
        self.guest.mark_suspend();
        self.function.point_at(Owner::Destination as usize);
    }

    fn point_at_source(&mut self, _cntlid: u16) {
        self.function.point_at(Owner::Source as usize);
        self.guest.clear_marks();
    }
}

/// Starts both ends and connects to them; `serving` is where the guest is at first. `say` hears which processes there are.
///
/// # Errors
/// [`LiveError`].
pub fn ends(specs: [EndSpec<'_>; 2], serving: Owner, say: &mut dyn FnMut(&str)) -> Result<Ends, LiveError> {
    let space = AddressSpace::default();
    let (mut running, mut functions, mut management, mut controllers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for spec in &specs {
        let failed = |source| LiveError::Io { what: format!("the process of \"{}\"", spec.name), source };
        let end = End::start(spec).map_err(failed)?;
        let [manager, moves] = sockets(spec.folder, spec.name);
        say(&format!("process      {}: {}, before {}", spec.name, end.child.id(), moves.display()));
        running.push(end);
        let config = DriverConfig { pages: pages(spec.config), ..DriverConfig::default() };
        management.push(Driver::new(connect(&manager, AddressSpace::default())?, config)?);
        functions.push(connect(&moves, space.clone())?);
        let subsystem = spec.config.subsystem(spec.name);
        let migratable = subsystem.iter().flat_map(|s| &s.controllers).find(|c| c.role == Role::Migratable);
        let cntlid = migratable.map(|controller| *controller.cntlid.get_ref());
        controllers.push(cntlid.ok_or_else(|| LiveError::Set(format!("\"{}\" has no migratable controller", spec.name)))?);
    }
    let lost = |_| LiveError::Set("two ends".into());
    let functions: [Arc<dyn Function>; 2] = functions.try_into().map_err(|_| LiveError::Set("two functions".into()))?;
    let both: Both = Arc::new(Mutex::new(running.try_into().map_err(lost)?));
    let function = SwitchedFunction::new(space, functions, serving as usize);
    let (slot, settled) = (Arc::clone(&function), Arc::clone(&function));
    Ok(Ends {
        function,
        slot: Box::new(move |guest| Box::new(ApartSlot { function: slot, guest })),
        fences: Box::new(OrderedFences(Arc::clone(&both))),
        management: management.try_into().map_err(|_| LiveError::Set("two management controllers".into()))?,
        controllers: (controllers[0], controllers[1]),
        subsystems: Vec::new(),
        // What has moved away keeps no memory of the guest's.
        moved: Box::new(move || settled.forget(Owner::Source as usize)),
        keep: Box::new(both),
    })
}

/// A function behind a socket, to be polled.
///
/// # Errors
/// In words.
pub fn connect(path: &Path, space: AddressSpace) -> Result<Arc<dyn Function>, LiveError> {
    let named = |error: String| LiveError::Set(format!("{}: {error}", path.display()));
    let socket = UnixSocket::connect(path).map_err(|error| named(error.to_string()))?;
    let config = ClientConfig { vectors: 0, ..ClientConfig::default() };
    let client = VfioUserClient::connect(Box::new(socket), space, &config).map_err(|error| named(error.to_string()))?;
    Ok(client)
}
