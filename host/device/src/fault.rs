//! Faults in memory that another process may shorten.
//!
//! A client lends its memory by descriptor, and may truncate the file behind it while we read or write there. The kernel then
//! raises SIGBUS, which would end the process and with it every other client. Here is the handler that lets the access go on:
//! it looks whether the address lies in a range that was registered ([`Watched`]), puts private zeroed memory in the place of
//! everything from the missing page to the end of the range, marks the range as broken, and returns. Whoever serves the client
//! sees [`Arena::is_broken`](crate::memory::Arena::is_broken) and parts from it. Everything behind the page is replaced, not the
//! page alone, so that a range costs a mapping or two however it is used, and the process does not run out of mappings.
//!
//! A fault anywhere else, and every other cause of the signal, goes to the handler that was there before; by default the
//! process ends, as it should. Faults of the kernel itself, on behalf of io_uring, are no signals: the operation ends with
//! EFAULT.
//!
//! The table is a fixed array without locks: a handler may run in the middle of anything. An entry that is being changed is
//! never one that a fault may hit, for whoever makes an access holds the arena, and so its entry.
#![allow(unsafe_code)]

use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::c_int;
use std::ops::Range;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, compiler_fence, fence};

/// Most ranges that can be watched at a time in one process.
pub const MAX_RANGES: usize = 16_384;

/// One range. It is valid while `version` is odd; who reads it looks at the version before and after.
struct Entry {
    taken: AtomicBool,
    version: AtomicU64,
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    writable: AtomicBool,
    broken: AtomicBool,
}

impl Entry {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            version: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            writable: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        }
    }

    /// What is to be replaced after a fault at `address`: the range, and whether it may be written.
    fn hit(&self, address: usize) -> Option<(Range<usize>, bool)> {
        let version = self.version.load(Ordering::Acquire);
        if version.is_multiple_of(2) {
            return None;
        }
        let (start, end) = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        let (page, writable) = (self.page.load(Ordering::Relaxed), self.writable.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let inside = self.version.load(Ordering::Relaxed) == version && start <= address && address < end;
        inside.then(|| (address & !(page - 1)..end, writable))
    }
}

static TABLE: [Entry; MAX_RANGES] = [const { Entry::new() }; MAX_RANGES];
/// Entries from here on have never been used.
static USED: AtomicUsize = AtomicUsize::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);
/// What was there before our handler; never freed.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// How many faults were survived so far in this process. A server that sees the number grow looks which of its clients has
/// broken memory; otherwise one load is all it costs.
#[must_use]
pub fn faults() -> u64 {
    compiler_fence(Ordering::SeqCst);
    FAULTS.load(Ordering::Acquire)
}

/// Why a range is not watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotWatched(pub(crate) &'static str);

/// A range of addresses of this process whose faults are survived while this lives.
#[derive(Debug)]
pub(crate) struct Watched {
    entry: usize,
}

impl Watched {
    /// Watches a mapping of its owner's, made of pages of `page` bytes (a power of two). Its owner gives this back before it
    /// unmaps.
    pub(crate) fn new(range: Range<usize>, page: usize, writable: bool) -> Result<Self, NotWatched> {
        static INSTALLED: Once = Once::new();
        static WORKS: AtomicBool = AtomicBool::new(false);
        INSTALLED.call_once(|| WORKS.store(install(), Ordering::Release));
        if !WORKS.load(Ordering::Acquire) {
            return Err(NotWatched("the kernel takes no handler for its faults"));
        }
        let free = |entry: &Entry| entry.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let at = TABLE.iter().position(free).ok_or(NotWatched("too much memory of others is mapped already"))?;
        USED.fetch_max(at + 1, Ordering::AcqRel);
        let entry = &TABLE[at];
        entry.start.store(range.start, Ordering::Relaxed);
        entry.end.store(range.end, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.writable.store(writable, Ordering::Relaxed);
        entry.broken.store(false, Ordering::Relaxed);
        entry.version.fetch_add(1, Ordering::AcqRel);
        Ok(Self { entry: at })
    }

    /// Whether an access in the range has faulted.
    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        // The handler runs on the thread that made the access, and the compiler should not move it behind the question. A read
        // that nothing has looked at yet may still come later: then the next question tells.
        compiler_fence(Ordering::SeqCst);
        TABLE[self.entry].broken.load(Ordering::Acquire)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let entry = &TABLE[self.entry];
        entry.version.fetch_add(1, Ordering::AcqRel);
        // What the next owner writes comes after the version in every order.
        fence(Ordering::SeqCst);
        entry.taken.store(false, Ordering::Release);
    }
}

/// Puts the handler in place; says whether it is.
fn install() -> bool {
    // SAFETY: all zeroes is a valid value of this plain C structure.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks for the action there is.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut previous) } != 0 {
        return false;
    }
    PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::Release);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_fault as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and does only what a handler may.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) == 0 }
}

/// The handler: loads, stores and one system call that leaves errno alone.
extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut std::ffi::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid structure; the address is there for the code looked at.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code != libc::BUS_ADRERR || !mend(address) {
        pass_on(signal, info, context);
    }
}

/// Replaces what is missing at `address`; false when it is not ours, or cannot be.
fn mend(address: usize) -> bool {
    let used = USED.load(Ordering::Acquire).min(MAX_RANGES);
    for entry in &TABLE[..used] {
        let Some((missing, writable)) = entry.hit(address) else { continue };
        entry.broken.store(true, Ordering::Release);
        FAULTS.fetch_add(1, Ordering::AcqRel);
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let place = missing.start as *mut std::ffi::c_void;
        // SAFETY: the range is part of a mapping whose owner is in the middle of an access to it, and so still has it; no
        // reference into it exists. rustix makes the system call itself: nothing here takes a lock or sets errno.
        return unsafe { rustix::mm::mmap_anonymous(place, missing.len(), prot, flags) }.is_ok();
    }
    false
}

/// What would have happened without us.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut std::ffi::c_void) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: set before the handler was, and never freed.
    let (handler, flags) = unsafe { ((*previous).sa_sigaction, (*previous).sa_flags) };
    // SAFETY: as in the handler.
    let sent = unsafe { (*info).si_code } <= 0;
    if handler == libc::SIG_DFL || (handler == libc::SIG_IGN && !sent) {
        // SAFETY: the previous action was valid, and zeroes are the default one. A fault comes again when the handler has
        // returned, and then ends the process; a signal that was sent is sent again.
        unsafe {
            let default: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            if sent {
                libc::raise(signal);
            }
        }
    } else if handler != libc::SIG_IGN && flags & libc::SA_SIGINFO != 0 {
        // SAFETY: whoever installed it with SA_SIGINFO gave a function of these arguments.
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut std::ffi::c_void) = unsafe { std::mem::transmute(handler) };
        handler(signal, info, context);
    } else if handler != libc::SIG_IGN {
        // SAFETY: whoever installed it without SA_SIGINFO gave a function of this argument.
        let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
        handler(signal);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use crate::memory::{Access, Arena, MemoryError, PAGE, Segment};
    use crate::uring::{FileOp, FileRing};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::OwnedFd;
    use std::os::unix::process::ExitStatusExt;
    use std::sync::Arc;

    /// Through the C library, so that the compiler takes nothing for granted about memory behind it.
    fn truncate(fd: &OwnedFd, len: u64) {
        let file = std::fs::File::from(fd.try_clone().expect("descriptor"));
        file.set_len(len).expect("truncate");
    }

    fn memory(pages: usize) -> OwnedFd {
        let fd = memfd_create("client", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, (pages * PAGE) as u64).expect("size");
        fd
    }

    fn arena(fd: &OwnedFd, pages: usize) -> Arc<Arena> {
        let fd = fd.try_clone().expect("descriptor");
        Arena::map_client(fd, 0, pages * PAGE, Access::ReadWrite).expect("map")
    }

    #[test]
    fn memory_that_goes_while_it_is_used_harms_nobody_else() {
        let (fd, other_fd) = (memory(8), memory(8));
        let (lent, other) = (arena(&fd, 8), arena(&other_fd, 8));
        let all = Segment::new(&lent, 0, 8 * PAGE).expect("inside");
        all.write(&[7; 8 * PAGE]);
        other.fill(0, 8 * PAGE, 9);
        let before = super::faults();
        truncate(&fd, 3 * PAGE as u64);
        assert!(!lent.is_broken());
        let mut seen = vec![1; 8 * PAGE];
        all.read(&mut seen);
        assert!(lent.is_broken() && super::faults() > before);
        assert!(seen[..3 * PAGE].iter().all(|&b| b == 7) && seen[3 * PAGE..].iter().all(|&b| b == 0));
        all.write(&[5; 8 * PAGE]);
        assert!(!other.is_broken());
        assert!(Arena::equal(&other, 0, &other, PAGE, PAGE));
        assert_eq!(other.load8(8 * PAGE - 1, std::sync::atomic::Ordering::Relaxed), 9);
    }

    #[test]
    fn writes_atomics_and_other_threads_live_on_too() {
        let fd = memory(64);
        let lent = arena(&fd, 64);
        truncate(&fd, 0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let lent = &lent;
                scope.spawn(move || {
                    for page in (0..64).rev() {
                        lent.store32(page * PAGE + thread * 4, 1, std::sync::atomic::Ordering::Release);
                        lent.write(page * PAGE + 100, b"gone");
                    }
                });
            }
        });
        assert!(lent.is_broken());
        drop(lent);
        let (fd, next) = (memory(1), memory(1));
        assert!(!arena(&fd, 1).is_broken(), "an entry that is used again begins anew");
        assert!(!arena(&next, 1).is_broken());
    }

    #[test]
    fn read_only_memory_goes_as_well() {
        let fd = memory(2);
        let lent = Arena::map_client(fd.try_clone().expect("fd"), PAGE as u64, PAGE, Access::Read).expect("map");
        assert_eq!((lent.file_offset(), lent.len(), lent.is_writable()), (PAGE as u64, PAGE, false));
        truncate(&fd, 0);
        let mut seen = [1; 4];
        lent.read(PAGE - 4, std::hint::black_box(&mut seen));
        // The compiler may put off a read that nothing has looked at, and then there has been no fault yet.
        assert_eq!((std::hint::black_box(seen), lent.is_broken()), ([0; 4], true));
        assert!(lent.is_zero(0, PAGE));
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let map = |fd: OwnedFd, offset, len| Arena::map_client(fd, offset, len, Access::ReadWrite);
        let page = PAGE as u64;
        assert!(matches!(map(memory(2), 0, 0), Err(MemoryError::BadLength(0))));
        assert!(matches!(map(memory(2), 0, usize::MAX), Err(MemoryError::BadLength(_))));
        for (offset, len) in [(1, PAGE), (page, 2 * PAGE), (2 * page, 1), (!4095, PAGE), (0, 1 << 46), (page, PAGE + 1)] {
            assert!(matches!(map(memory(2), offset, len), Err(MemoryError::Refused(_))), "{offset:#x} + {len:#x}");
        }
        assert_eq!(map(memory(2), page, PAGE - 1).expect("a part of a page").len(), PAGE - 1);
        for path in ["/dev/zero", "/proc/self/maps", "/"] {
            let file = std::fs::File::open(path).expect("open");
            let error = Arena::map_client(file.into(), 0, PAGE, Access::Read).expect_err(path);
            assert!(matches!(error, MemoryError::Refused(_)), "{path}: {error}");
        }
        let (pipe, _end) = rustix::pipe::pipe().expect("pipe");
        assert!(map(pipe, 0, PAGE).is_err());
        let read_only = std::fs::File::open(std::env::current_exe().expect("path")).expect("open");
        assert!(matches!(map(read_only.into(), 0, PAGE), Err(MemoryError::Kernel { .. } | MemoryError::Refused(_))));
    }

    #[test]
    fn huge_pages_are_rounded_to() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let Ok(fd) = memfd_create("huge", flags) else { return };
        let huge = crate::memory::HUGE_PAGE;
        if ftruncate(&fd, 2 * huge as u64).is_err() {
            return;
        }
        let part = Arena::map_client(fd.try_clone().expect("fd"), (huge - PAGE) as u64, 2 * PAGE, Access::ReadWrite);
        // Without huge pages in the machine there is nothing to map, which is the kernel's to say.
        let Ok(part) = part else { return };
        part.write(PAGE - 2, b"four");
        truncate(&fd, 0);
        let mut seen = [1; 4];
        part.read(PAGE - 2, &mut seen);
        assert_eq!((part.is_broken(), seen), (true, [0; 4]));
    }

    #[test]
    fn operations_of_the_kernel_end_with_an_error() {
        let path = std::env::temp_dir().join(format!("dray-fault-{}", std::process::id()));
        std::fs::write(&path, vec![3; 16 * PAGE]).expect("file");
        let mut ring = FileRing::open(&path, 4).expect("ring");
        std::fs::remove_file(&path).expect("remove");
        for op in [FileOp::Read, FileOp::Write { sync: false }] {
            let fd = memory(4);
            let lent = arena(&fd, 4);
            truncate(&fd, 0);
            let data = [Segment::new(&lent, 0, 4 * PAGE).expect("inside")];
            ring.submit(op, 0, 4 * PAGE as u64, &data, 1).expect("submit");
            let mut ended = None;
            for _ in 0..100 {
                ring.commit();
                ring.poll(&mut |_, result| ended = Some(result.is_err()));
                if ended.is_some() {
                    break;
                }
                let wait = rustix::time::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                let mut waker = [rustix::event::PollFd::from_borrowed_fd(ring.waker(), rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut waker, Some(&wait)).expect("poll");
            }
            assert_eq!(ended, Some(true), "{op:?}");
        }
    }

    /// Runs in a process of its own (see below): it does not come back.
    #[test]
    fn a_child_that_faults_elsewhere() {
        if std::env::var_os("DRAY_FAULT_CHILD").is_none() {
            return;
        }
        let watched = arena(&memory(1), 1);
        let file = std::fs::File::from(memory(1));
        let foreign = Arena::map_file(&file, PAGE).expect("map");
        file.set_len(0).expect("truncate");
        let _never = foreign.load32(0, std::sync::atomic::Ordering::Relaxed);
        drop(watched);
    }

    #[test]
    fn a_fault_elsewhere_is_fatal_as_before() {
        let status = std::process::Command::new(std::env::current_exe().expect("path"))
            .args(["--exact", "fault::tests::a_child_that_faults_elsewhere"])
            .env("DRAY_FAULT_CHILD", "1")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .expect("child");
        // The sanitizer has a handler of its own for it, which reports and exits: that is the one before ours.
        if cfg!(asan) {
            assert!(status.code().is_some_and(|code| code != 0), "{status}");
        } else {
            assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        }
    }
}
