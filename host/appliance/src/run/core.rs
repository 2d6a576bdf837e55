//! The polling core's part: all subsystems, the exports before them, the migration, queues that are lent.
//!
//! The main thread speaks to it by [`Mailbox`]: a flag that each poll looks at, and a list behind it.

use super::exports::{ExportView, Exports};
use super::lend::Lent;
use crate::core::reactor::Part;
use crate::moving::Moving;
use dray_controller::{ControllerCounters, Refused, Subsystem};
use dray_device::backing::Backing;
use dray_device::poll::{Poll, Progress, Time};
use dray_device::slot::Fence;
use dray_migration::Migration;
use dray_migration::media_move::{Clerk, Declined};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

/// What the main thread asks of the core. Answers go to a channel; one that nobody waits for any more goes nowhere.
pub enum Order {
    /// Counters, for `status`.
    Look(Sender<CoreView>),
    /// The migration that has ended: its management controllers are wanted.
    Reclaim(Sender<Option<Box<Migration>>>),
    /// Poll this too.
    Lend(Box<Lent>),
    /// Could a namespace of this subsystem have this backing? Answered with it, or with the reason why not.
    MayExchange {
        /// Which subsystem.
        at: usize,
        /// Which namespace.
        nsid: u32,
        /// The backing.
        copy: Box<dyn Backing>,
        /// Where the answer goes.
        to: Sender<Result<Box<dyn Backing>, String>>,
    },
    /// Exchange backings of this subsystem when the media move that begins next asks for it.
    Attend(usize, Clerk),
    /// Take nobody in any more, fetch no more commands, let what is under way end, say goodbye to clients.
    Drain(Sender<()>),
}

/// What the core counts.
#[derive(Debug, Default)]
pub struct CoreView {
    /// Of each subsystem, CNTLID and counters.
    pub subsystems: Vec<Vec<(u16, ControllerCounters)>>,
    /// Of each export.
    pub exports: Vec<ExportView>,
    /// The queues that are lent: subsystem, CNTLID.
    pub lent: Vec<(String, u16)>,
}

/// Where orders wait for the core.
#[derive(Default)]
pub struct Mailbox {
    waiting: AtomicBool,
    orders: Mutex<Vec<Order>>,
}

impl Mailbox {
    /// Leaves an order.
    pub fn put(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        self.waiting.store(true, Ordering::Release);
    }

    /// What waits; costs one load when nothing does.
    #[inline]
    fn take(&self) -> Vec<Order> {
        if !self.waiting.load(Ordering::Acquire) {
            return Vec::new();
        }
        self.waiting.store(false, Ordering::Relaxed);
        std::mem::take(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How far the end is.
enum Drain {
    No,
    /// Commands end.
    Commands(Sender<()>),
    /// Clients get what was answered, then they are disconnected.
    Clients(Sender<()>),
    Done,
}

/// The part.
pub struct RunCore {
    subsystems: Vec<Subsystem>,
    /// Of the migratable controllers.
    fences: Vec<Fence>,
    exports: Exports,
    moving: Moving,
    lent: Vec<Lent>,
    /// Of the media move that runs: which subsystem's backings it exchanges.
    clerk: Option<(usize, Clerk)>,
    mailbox: Arc<Mailbox>,
    drain: Drain,
}

impl RunCore {
    /// A core over its parts.
    #[must_use]
    pub fn new(subsystems: Vec<Subsystem>, fences: Vec<Fence>, exports: Exports, moving: Moving, mailbox: Arc<Mailbox>) -> Self {
        Self { subsystems, fences, exports, moving, lent: Vec::new(), clerk: None, mailbox, drain: Drain::No }
    }

    #[cold]
    fn order(&mut self, order: Order) {
        // Who asked may have given up.
        match order {
            Order::Look(to) => {
                let subsystems = self.subsystems.iter().map(|s| s.counters().collect()).collect();
                let lent = self.lent.iter().map(|lent| (lent.subsystem().to_owned(), lent.cntlid())).collect();
                let _gone = to.send(CoreView { subsystems, exports: self.exports.view(), lent });
            }
            Order::Reclaim(to) => {
                self.clerk = None;
                let _gone = to.send(self.moving.take());
            }
            Order::Lend(lent) => self.lent.push(*lent),
            Order::MayExchange { at, nsid, copy, to } => {
                let subsystem = self.subsystems.get(at).ok_or_else(|| "the subsystem does not run".to_owned());
                let fits = subsystem.and_then(|subsystem| subsystem.may_exchange(nsid, copy.as_ref()).map_err(|why| why.to_string()));
                let _gone = to.send(fits.map(|()| copy));
            }
            Order::Attend(at, clerk) => self.clerk = Some((at, clerk)),
            Order::Drain(to) => {
                self.exports.stop_accepting();
                self.fences.iter().for_each(Fence::raise);
                self.lent.clear();
                self.drain = Drain::Commands(to);
            }
        }
    }

    #[cold]
    fn drain(&mut self) {
        self.drain = match std::mem::replace(&mut self.drain, Drain::Done) {
            Drain::Commands(to) if self.subsystems.iter().all(Subsystem::is_quiet) => {
                self.exports.close();
                Drain::Clients(to)
            }
            Drain::Clients(to) if self.exports.is_drained() => {
                let _gone = to.send(());
                Drain::Done
            }
            same => same,
        };
    }
}

fn declined(Refused { why, backing }: Refused) -> Declined {
    Declined { backing, transient: why.is_transient(), why: why.to_string() }
}

impl Poll for RunCore {
    fn poll(&mut self, now: Time) -> Progress {
        for order in self.mailbox.take() {
            self.order(order);
        }
        let mut progress = self.exports.poll(now);
        for subsystem in &mut self.subsystems {
            progress = progress.and(subsystem.poll(now));
        }
        progress = progress.and(self.moving.poll(now));
        // Between two polls of the subsystem; one load while nothing is asked.
        if let Some((at, clerk)) = &self.clerk
            && let Some(subsystem) = self.subsystems.get_mut(*at)
        {
            clerk.serve(|nsid, backing| subsystem.exchange_backing(nsid, backing).map_err(declined));
        }
        if !self.lent.is_empty() {
            for lent in &mut self.lent {
                progress = progress.and(lent.poll(now));
            }
            self.lent.retain(|lent| !lent.is_over());
        }
        if !matches!(self.drain, Drain::No | Drain::Done) {
            self.drain();
        }
        progress
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        self.exports.wakers(visit);
        self.subsystems.iter().for_each(|subsystem| subsystem.wakers(visit));
        self.lent.iter().for_each(|lent| lent.wakers(visit));
    }
}

impl Part for RunCore {
    fn polls_memory(&self) -> bool {
        !self.lent.is_empty() || self.exports.polls_memory()
    }
}
