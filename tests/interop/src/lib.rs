//! Our servers before clients that others have written: what only reads our own words of a specification on both sides does
//! not find.
//!
//! [`Served`] is a software controller behind a Unix socket, on a thread of its own; `tests/` has a file for each client.

use dray_controller::{ControllerConfig, ControllerRole, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Fence, Slot};
use dray_device::socket::UnixSocket;
use dray_device::space::AddressSpace;
use dray_export::hooks::NoMigration;
use dray_export::vfio_user::{VfioUserConfig, VfioUserCounters, VfioUserServer};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// The controller's CNTLID.
const CONTROLLER: u16 = 2;
/// MSI-X vectors of the function.
pub const VECTORS: u16 = 5;
/// Bytes of namespace 1, in blocks of [`BLOCK`].
pub const BYTES: u64 = 4 << 20;
/// Bytes of a logical block.
pub const BLOCK: u32 = 512;
/// The controller's serial number.
pub const SERIAL: &str = "INTEROP";

/// One NVMe controller behind a Unix socket, for one client at a time.
pub struct Served {
    path: PathBuf,
    /// The slot that the controller is in.
    pub slot: Slot,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<VfioUserCounters>>,
}

impl Served {
    /// Binds a socket and serves.
    ///
    /// # Panics
    /// If the system has no socket, memory or thread for it.
    #[must_use]
    pub fn start(config: VfioUserConfig) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dray-interop-{}-{number}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("a mode");
        let slot = Slot::without_lines(AddressSpace::default(), VECTORS).expect("a slot");
        let subsystem = subsystem();
        slot.point_at(&subsystem.plug(CONTROLLER).expect("its plug"));
        let server = VfioUserServer::new(slot.clone(), config, Box::new(NoMigration));
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = Some(std::thread::spawn(move || serve(server, subsystem, &listener, &until)));
        Self { path, slot, stop, thread }
    }

    /// Where clients connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the server; what it has counted.
    ///
    /// # Panics
    /// If it has died.
    pub fn end(mut self) -> VfioUserCounters {
        self.stop.store(true, Ordering::Release);
        self.thread.take().expect("once").join().expect("the server lives")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ended = self.thread.take().map(JoinHandle::join);
        let _gone = std::fs::remove_file(&self.path);
    }
}

fn subsystem() -> Subsystem {
    let controller = ControllerConfig {
        cntlid: CONTROLLER,
        role: ControllerRole::Migratable,
        namespaces: vec![1],
        io_queues: VECTORS - 1,
        vectors: VECTORS,
        fence: Fence::default(),
    };
    let config = SubsystemConfig { controllers: vec![controller], serial: SERIAL.into(), ..SubsystemConfig::default() };
    let namespace =
        NamespaceConfig { nsid: 1, nguid: [1; 16], eui64: [1; 8], uuid: [1; 16], shared: true, write_protected: false };
    let backing = MemoryBacking::new(BYTES, BLOCK).expect("memory");
    Subsystem::new(config, vec![(namespace, Box::new(backing))]).expect("a subsystem")
}

fn serve(mut server: VfioUserServer, mut subsystem: Subsystem, listener: &UnixListener, until: &AtomicBool) -> VfioUserCounters {
    let start = Instant::now();
    while !until.load(Ordering::Acquire) {
        let now = Time(start.elapsed().as_nanos() as u64);
        if let Ok((stream, _)) = listener.accept() {
            // One that comes while another waits is refused, and sees its end.
            let _refused = UnixSocket::new(stream).map(|stream| server.attach(Box::new(stream)));
        }
        if server.poll(now).work + subsystem.poll(now).work == 0 {
            std::thread::yield_now();
        }
    }
    server.counters()
}
