//! Kernel modules are loaded on threads of their own, as many at a time as there are processors.
//!
//! Most of what a module costs where the machine is emulated is the kernel's check of its signature, which takes one processor and
//! no lock: two processors check two at a time, and PID 1 does other things meanwhile. Chains of modules are put into a queue with
//! a [`Rank`], and whoever needs them waits for their [`Ticket`]. A module that stands in several chains is loaded once; a chain
//! that needs it waits until that is done. One whose driver hangs keeps its thread, and whoever waits for it no longer than his
//! patience.

use super::modules::Module;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long modules that something needs are waited for: a driver may hang.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Threads at most: beyond it the kernel's own locks are what they would wait for.
const THREADS: usize = 4;

/// What goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Somebody waits for it.
    Now,
    /// It has time: until [`Loader::release`], then whenever nobody waits for anything.
    Later,
}

/// Stands for chains that were put into the queue together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// The queue and its threads. Cheap to clone.
#[derive(Clone)]
pub struct Loader {
    shared: Arc<Shared>,
}

struct Shared {
    load: Box<dyn Fn(&Module) + Send + Sync>,
    queue: Mutex<Queue>,
    /// A module or a chain is done.
    changed: Condvar,
    threads: usize,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(Rank, Ticket, Vec<Module>)>,
    /// How many chains of a ticket are not done.
    open: BTreeMap<Ticket, usize>,
    /// Modules that were begun; true: and are done.
    modules: HashMap<PathBuf, bool>,
    workers: usize,
    tickets: u64,
    /// What has time may begin.
    released: bool,
}

impl Queue {
    /// The place of the chain that goes next.
    fn next(&self) -> Option<usize> {
        let may_begin = |rank: Rank| rank == Rank::Now || self.released;
        let waiting = self.waiting.iter().enumerate().filter(|(_, (rank, _, _))| may_begin(*rank));
        waiting.min_by_key(|(at, (rank, _, _))| (*rank, *at)).map(|(at, _)| at)
    }
}

impl Loader {
    /// One that loads a module by this; from several threads at a time.
    #[must_use]
    pub fn new(load: impl Fn(&Module) + Send + Sync + 'static) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        let shared = Shared { load: Box::new(load), queue: Mutex::default(), changed: Condvar::new(), threads };
        Self { shared: Arc::new(shared) }
    }

    /// Puts chains into the queue.
    pub fn put(&self, rank: Rank, chains: impl IntoIterator<Item = Vec<Module>>) -> Ticket {
        let mut queue = self.shared.lock();
        queue.tickets += 1;
        let ticket = Ticket(queue.tickets);
        for chain in chains {
            queue.waiting.push_back((rank, ticket, chain));
            *queue.open.entry(ticket).or_default() += 1;
        }
        self.start(queue);
        ticket
    }

    /// What has time may begin from now on.
    pub fn release(&self) {
        let mut queue = self.shared.lock();
        queue.released = true;
        self.start(queue);
    }

    /// Starts threads for what may begin; those that have nothing to do end at once.
    fn start(&self, mut queue: MutexGuard<'_, Queue>) {
        let wanted = if queue.next().is_some() { self.shared.threads.min(queue.waiting.len()) } else { 0 };
        while queue.workers < wanted {
            queue.workers += 1;
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new().name("dray-modules".into()).spawn(move || shared.work());
            if spawned.is_err() {
                // Without threads this one has to do.
                let alone = queue.workers == 1;
                queue.workers -= usize::from(!alone);
                drop(queue);
                if alone {
                    self.shared.work();
                }
                return;
            }
        }
    }

    /// Whether all chains of a ticket are done.
    #[must_use]
    pub fn is_done(&self, ticket: Ticket) -> bool {
        !self.shared.lock().open.contains_key(&ticket)
    }

    /// Chains of these tickets that have not begun have time, or have none any more.
    pub fn set_rank(&self, tickets: &[Ticket], rank: Rank) {
        let mut queue = self.shared.lock();
        queue.waiting.iter_mut().filter(|(_, of, _)| tickets.contains(of)).for_each(|waiting| waiting.0 = rank);
        self.start(queue);
    }

    /// Waits until the chains of these tickets are done, which have no time any more; false if that takes longer.
    #[must_use]
    pub fn wait(&self, tickets: &[Ticket], patience: Duration) -> bool {
        self.set_rank(tickets, Rank::Now);
        self.wait_until(patience, |queue| !tickets.iter().any(|ticket| queue.open.contains_key(ticket)))
    }

    /// Waits until all that was put into the queue is done; false if that takes longer.
    #[must_use]
    pub fn wait_for_all(&self, patience: Duration) -> bool {
        self.release();
        self.wait_until(patience, |queue| queue.open.is_empty())
    }

    fn wait_until(&self, patience: Duration, done: impl Fn(&Queue) -> bool) -> bool {
        let end = Instant::now() + patience;
        let mut queue = self.shared.lock();
        while !done(&queue) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = self.shared.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads what waits, until nothing does.
    fn work(&self) {
        loop {
            let mut queue = self.lock();
            let next = queue.next();
            let Some((_, ticket, chain)) = next.and_then(|at| queue.waiting.remove(at)) else {
                queue.workers -= 1;
                return;
            };
            drop(queue);
            chain.iter().for_each(|module| self.once(module));
            let mut queue = self.lock();
            if let Some(left) = queue.open.get_mut(&ticket) {
                *left -= 1;
                if *left == 0 {
                    queue.open.remove(&ticket);
                }
            }
            self.changed.notify_all();
        }
    }

    /// Loads a module, or waits until another thread has.
    fn once(&self, module: &Module) {
        let path: &Path = &module.path;
        let mut queue = self.lock();
        loop {
            match queue.modules.get(path) {
                Some(true) => return,
                // Modules need each other in no circle: that thread does not wait for this one.
                Some(false) => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                None => break,
            }
        }
        queue.modules.insert(path.into(), false);
        drop(queue);
        // Whatever became of it: those that wait for it must not wait for ever.
        let _said = catch_unwind(AssertUnwindSafe(|| (self.load)(module)));
        self.lock().modules.insert(path.into(), true);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    const SOON: Duration = Duration::from_secs(60);

    fn chain(names: &str) -> Vec<Module> {
        names.split('+').map(|name| Module { path: name.into(), parameters: String::new() }).collect()
    }

    /// A loader that says what it begins with, and waits for a word before it ends with it.
    fn loader(threads: usize) -> (Loader, Receiver<String>, Sender<()>) {
        let (begun, seen) = channel();
        let (go, gone) = channel();
        let gone = Mutex::new(gone);
        let mut loader = Loader::new(move |module| {
            begun.send(module.path.display().to_string()).expect("somebody looks");
            gone.lock().expect("whole").recv_timeout(SOON).expect("a word");
        });
        Arc::get_mut(&mut loader.shared).expect("alone").threads = threads;
        (loader, seen, go)
    }

    #[test]
    fn what_somebody_waits_for_goes_first_and_what_has_time_waits_for_a_word() {
        let (loader, seen, go) = loader(1);
        let first = loader.put(Rank::Now, [chain("lib+ext4"), chain("ahci"), chain("usb")]);
        let later = loader.put(Rank::Later, [chain("button")]);
        assert_eq!(seen.recv_timeout(SOON).expect("begun"), "lib");
        assert!(!loader.is_done(first) && !loader.wait_until(Duration::ZERO, |queue| queue.open.is_empty()));
        loader.set_rank(&[first], Rank::Later);
        let net = loader.put(Rank::Now, [chain("lib+net")]);
        (0..6).for_each(|_| go.send(()).expect("it listens"));
        assert!(loader.wait(&[net], SOON) && !loader.is_done(first) && !loader.is_done(later));
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), ["ext4", "net"]);
        loader.release();
        assert!(loader.wait(&[first, later], SOON) && loader.is_done(first));
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), ["ahci", "usb", "button"]);
        // Nothing is loaded twice, nor is a thread left that would have to be waited for.
        assert!(loader.wait(&[loader.put(Rank::Now, [chain("lib+net")]), loader.put(Rank::Later, [])], SOON));
        assert!(loader.wait_for_all(SOON) && seen.try_recv().is_err());
    }

    #[test]
    fn who_waits_for_what_has_time_waits_for_that_alone() {
        let (loader, seen, go) = loader(1);
        let [one, _other] = ["one", "other"].map(|name| loader.put(Rank::Later, [chain(name)]));
        go.send(()).expect("it listens");
        assert!(loader.wait(&[one], SOON));
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), ["one"]);
    }

    #[test]
    fn two_chains_are_loaded_at_a_time_and_what_both_need_is_waited_for() {
        let (loader, seen, go) = loader(2);
        let ticket = loader.put(Rank::Now, [chain("lib+a"), chain("lib+b"), chain("c")]);
        // One of the two loads it and the other one waits, instead of loading what needs it.
        assert_eq!(seen.recv_timeout(SOON).expect("begun"), "lib");
        go.send(()).expect("it listens");
        let mut both: Vec<_> = (0..2).map(|_| seen.recv_timeout(SOON).expect("begun")).collect();
        both.sort();
        assert_eq!(both, ["a", "b"]);
        (0..3).for_each(|_| go.send(()).expect("it listens"));
        assert!(loader.wait(&[ticket], SOON));
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn a_panic_costs_one_module() {
        let loader = Loader::new(|module| assert!(module.path != Path::new("bad"), "bad"));
        assert!(loader.wait(&[loader.put(Rank::Now, [chain("bad+good"), chain("bad+other")])], SOON));
    }
}
