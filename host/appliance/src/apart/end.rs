//! One end of a migration as a process of its own: a subsystem of the configuration, its management controller and its
//! migratable one before a vfio-user socket each.
//!
//! Whoever started it says by lines on standard input what happens to the fence, and is answered by a line on standard output
//! when it is so: `raise` and `lower`, `done`. It ends when standard input does, so a starter that is killed leaves nothing
//! running.

use super::{DONE, LOWER, RAISE, READY, sockets};
use crate::assembly::{self, Machine};
use crate::config::{BackingKind, Config};
use crate::core::clock::Clock;
use crate::core::reactor::{Part, Reactor};
use crate::run::sockets::listen_unix;
use dray_controller::Subsystem;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::socket::{Listener, UnixListener};
use dray_device::space::AddressSpace;
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::{PeerPolicy, VfioUserConfig, VfioUserServer};
use miette::{IntoDiagnostic, WrapErr, miette};
use std::io::{BufRead, Write};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use toml::Spanned;

/// How often the main thread looks at the core.
const LOOK: Duration = Duration::from_millis(50);
/// How long what is under way may take to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often sockets are looked at for a client that comes.
const ACCEPT_NS: u64 = 1_000_000;

/// What the two threads of the process share.
#[derive(Default)]
struct Shared {
    ending: AtomicBool,
    /// Polls that have begun.
    polls: AtomicU64,
}

/// A socket and the function behind it.
struct Door {
    listener: UnixListener,
    server: VfioUserServer,
}

struct EndCore {
    subsystem: Subsystem,
    doors: Vec<Door>,
    looked: Time,
    shared: Arc<Shared>,
}

impl Poll for EndCore {
    fn poll(&mut self, now: Time) -> Progress {
        self.shared.polls.fetch_add(1, Ordering::SeqCst);
        let mut progress = Progress::IDLE;
        let look = now.ns_since(self.looked) >= ACCEPT_NS;
        for door in &mut self.doors {
            if look && let Ok(Some(stream)) = door.listener.accept() {
                progress = progress.and(Progress { work: 1, next: Next::Now });
                if let Err(error) = door.server.attach(Box::new(stream)) {
                    tracing::warn!(%error, "a client is not served");
                }
            }
            progress = progress.and(door.server.poll(now));
        }
        if look {
            self.looked = now;
        }
        progress.and(self.subsystem.poll(now))
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        for door in &self.doors {
            door.server.wakers(visit);
            door.listener.waker().into_iter().for_each(&mut *visit);
        }
        self.subsystem.wakers(visit);
    }
}

impl Part for EndCore {
    fn is_finished(&self) -> bool {
        self.shared.ending.load(Ordering::Acquire) && self.subsystem.is_quiet()
    }
}

/// Serves `name` of the configuration until standard input ends. `files` are the files of its namespaces by NSID, where they
/// are not the configuration's; sockets are made in `folder`.
///
/// # Errors
/// Whatever keeps it from serving.
pub fn serve(config: &Path, name: &str, fenced: bool, files: &[(u32, PathBuf)], folder: &Path) -> miette::Result<()> {
    let mut config = Config::read(config)?;
    let of_name = config.file.subsystems.iter_mut().filter(|subsystem| subsystem.name.get_ref() == name);
    for namespace in of_name.flat_map(|subsystem| &mut subsystem.namespaces) {
        let file = files.iter().find(|(nsid, _)| nsid == namespace.nsid.get_ref());
        if let (Some((_, path)), BackingKind::File) = (file, namespace.backing) {
            namespace.path = Some(Spanned::new(0..0, path.clone()));
        }
    }
    let subsystem = config.subsystem(name).ok_or_else(|| miette!("no subsystem \"{name}\""))?;
    let Machine { subsystem, management, migratable, .. } = assembly::machine_behind(&config, subsystem, fenced)?;
    let [moves] = migratable.as_slice() else { return Err(miette!("\"{name}\" has not one migratable controller")) };
    let slot = Slot::new(AddressSpace::default(), moves.io_queues.saturating_add(1)).into_diagnostic()?;
    slot.point_at(&moves.plug);
    let mut doors = Vec::new();
    for (path, slot) in sockets(folder, name).iter().zip([management.1, slot]) {
        let listener = listen_unix(path).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
        let setup = VfioUserConfig { allow: PeerPolicy::SameUser, ..VfioUserConfig::default() };
        doors.push(Door { listener, server: VfioUserServer::new(slot, setup, Box::new(NoMigration)) });
    }
    let shared = Arc::new(Shared::default());
    let core = EndCore { subsystem, doors, looked: Time(0), shared: Arc::clone(&shared) };
    let core = Reactor::start("dray-core", Clock::new(), config.file.core.idle, core).into_diagnostic()?;
    answer(READY)?;
    let result = obey(&core, &moves.fence, &shared);
    moves.fence.raise();
    shared.ending.store(true, Ordering::Release);
    let end = Instant::now() + PATIENCE;
    while !core.has_ended() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(core.stop().into_diagnostic()?);
    for path in sockets(folder, name) {
        let _gone = std::fs::remove_file(path);
    }
    result
}

fn answer(line: &str) -> miette::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).into_diagnostic()
}

/// Does what standard input says, to its end.
fn obey(core: &Reactor<EndCore>, fence: &Fence, shared: &Shared) -> miette::Result<()> {
    let (to, lines) = channel();
    let read = move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if to.send(line).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("dray-orders".into()).spawn(read).into_diagnostic()?;
    loop {
        match lines.recv_timeout(LOOK) {
            Ok(line) => {
                match line.as_str() {
                    RAISE => fence.raise(),
                    LOWER => fence.lower(),
                    other => return Err(miette!("\"{}\" is no order", other.escape_debug())),
                }
                seen_by_core(core, shared)?;
                answer(DONE)?;
            }
            Err(RecvTimeoutError::Timeout) if !core.has_ended() => {}
            Err(RecvTimeoutError::Timeout) => return Err(miette!("the polling core has died")),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Waits for a poll that began after this call to be over: nothing goes on by what was so before.
fn seen_by_core(core: &Reactor<EndCore>, shared: &Shared) -> miette::Result<()> {
    let before = shared.polls.load(Ordering::SeqCst);
    while shared.polls.load(Ordering::SeqCst) < before + 2 {
        if core.has_ended() {
            return Err(miette!("the polling core has died"));
        }
        std::thread::yield_now();
    }
    Ok(())
}
