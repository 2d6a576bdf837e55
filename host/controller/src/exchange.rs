//! The exchange of a namespace's backing under controllers that stay before their guests: the last step of a media move.
//!
//! **The fetch gate.** A controller fetches nothing while it is suspended (Migration Send, Base 2.3 §8.1.13) or while its
//! [`Fence`](dray_device::slot::Fence) is up; one look before each batch asks both, so there is no gate besides. Suspend is what
//! shuts the gate in order: it waits for what was fetched, to the end of the operation on the backing, and marks the log. The
//! fence is what keeps it shut: a suspension ends by the guest's own controller reset, or by one of the management controller,
//! and behind the fence the guest may reset as it likes and is not ready, nor anything fetched, before the fence is down. It is
//! an atomic flag that any thread may set; the exchange is made by the subsystem's owner between two polls, so no fetch can be
//! half done.
//!
//! **What the guest has been told stays true.** Identity, size and write protection are the namespace's, not the backing's.
//! What Identify says of volatile write cache, Write Uncorrectable and deallocated blocks was fixed when the subsystem was made:
//! a backing that cannot keep it is refused, and one that can do more is not shown.

use crate::controller::{Controller, Run};
use crate::namespace::Namespace;
use crate::subsystem::{Shared, Subsystem};
use dray_device::backing::Backing;

/// Why a namespace's backing was not exchanged; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The subsystem has no such namespace.
    #[error("there is no namespace {0}")]
    NoNamespace(u32),
    /// The other backing has another number of blocks.
    #[error("the namespace has {now} blocks, the other backing {offered}")]
    Blocks {
        /// Blocks of the namespace (NSZE).
        now: u64,
        /// Blocks of the other backing.
        offered: u64,
    },
    /// The other backing has other blocks.
    #[error("the namespace has blocks of {now} bytes, the other backing of {offered}")]
    BlockBytes {
        /// Bytes of the namespace's blocks (LBADS).
        now: u32,
        /// Bytes of the other's.
        offered: u32,
    },
    /// Identify Controller has said that there is no volatile write cache (VWC): a guest that believes it never flushes.
    #[error("the other backing has a volatile write cache, and guests were told that there is none")]
    VolatileCache,
    /// Identify Controller has offered Write Uncorrectable (ONCS).
    #[error("the other backing cannot mark blocks as unreadable, and guests were told that Write Uncorrectable is supported")]
    WriteUncorrectable,
    /// Identify Namespace has said that deallocated blocks read as zeroes (DLFEAT).
    #[error("deallocated blocks of the other backing may read as anything, and guests were told that they read as zeroes")]
    Deallocated,
    /// A migratable controller that has the namespace is neither suspended nor behind its fence.
    #[error("controller {0} has the namespace and is not kept from fetching")]
    Fetching(u16),
    /// A controller has operations under way in the namespace, or not yet taken in: ask again after another poll.
    #[error("controller {0} has operations under way in the namespace")]
    Busy(u16),
    /// The other backing has operations of somebody else under way.
    #[error("the other backing has operations under way")]
    InUse,
}

impl ExchangeError {
    /// It passes by itself: the same exchange may succeed after more polls.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Busy(_) | Self::InUse)
    }
}

/// A backing that was not taken, and why.
pub struct Refused {
    /// Why.
    pub why: ExchangeError,
    /// The backing, as it was handed in.
    pub backing: Box<dyn Backing>,
}

impl std::fmt::Debug for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refused").field("why", &self.why).finish_non_exhaustive()
    }
}

impl Subsystem {
    /// Whether a backing could stand behind a namespace at all, whatever its controllers are doing: asked before a media move
    /// begins, so that it is not refused when the guest already waits.
    ///
    /// # Errors
    /// [`ExchangeError`], never a transient one.
    pub fn may_exchange(&self, nsid: u32, backing: &dyn Backing) -> Result<(), ExchangeError> {
        fits(&self.shared, find(&self.shared, nsid)?.1, backing)
    }

    /// Exchanges a namespace's backing and gives the one before back. Every migratable controller that has the namespace must
    /// be suspended or behind its fence, and nothing may be under way in the namespace, the management controller's commands
    /// included. The caller has made both backings equal and flushed the new one: from here on it alone has what guests were
    /// told is stable. Logging, limits and features of the controllers go on as they are.
    ///
    /// # Errors
    /// [`Refused`] with the backing inside; nothing has changed.
    pub fn exchange_backing(&mut self, nsid: u32, backing: Box<dyn Backing>) -> Result<Box<dyn Backing>, Refused> {
        let index = match self.check_exchange(nsid, backing.as_ref()) {
            Ok(index) => index,
            Err(why) => return Err(Refused { why, backing }),
        };
        let Some(namespace) = self.shared.namespaces.get_mut(index) else {
            return Err(Refused { why: ExchangeError::NoNamespace(nsid), backing });
        };
        Ok(std::mem::replace(&mut namespace.backing, backing))
    }

    /// The namespace's index, if its backing may be exchanged now.
    fn check_exchange(&self, nsid: u32, backing: &dyn Backing) -> Result<usize, ExchangeError> {
        let (index, namespace) = find(&self.shared, nsid)?;
        fits(&self.shared, namespace, backing)?;
        let place = u16::try_from(index).map_err(|_| ExchangeError::NoNamespace(nsid))?;
        let having = || self.controllers.iter().filter(|controller| controller.engine.active.contains(&place));
        if let Some(open) = having().find(|controller| !controller.is_manager() && !controller.is_gated()) {
            return Err(ExchangeError::Fetching(open.config.cntlid));
        }
        if let Some(busy) = having().find(|controller| controller.engine.contexts.any_in(place)) {
            return Err(ExchangeError::Busy(busy.config.cntlid));
        }
        // Operations that belong to no command any more end in the backing that they were begun in.
        if namespace.pending > 0 || namespace.uncommitted || namespace.backing.in_flight() > 0 {
            return Err(ExchangeError::Busy(having().next().map_or(0, |controller| controller.config.cntlid)));
        }
        if backing.in_flight() > 0 {
            return Err(ExchangeError::InUse);
        }
        Ok(index)
    }
}

impl Controller {
    /// The fetch gate is shut: nothing is fetched before Resume, or before the fence is down.
    fn is_gated(&self) -> bool {
        self.run == Run::Suspended || self.fence().is_up()
    }
}

fn find(shared: &Shared, nsid: u32) -> Result<(usize, &Namespace), ExchangeError> {
    let mut all = shared.namespaces.iter().enumerate();
    all.find(|(_, namespace)| namespace.config.nsid == nsid).ok_or(ExchangeError::NoNamespace(nsid))
}

/// Whether a backing keeps what guests have been told. `namespace.info` is that of the first backing, and stays.
fn fits(shared: &Shared, namespace: &Namespace, backing: &dyn Backing) -> Result<(), ExchangeError> {
    let (now, offered) = (namespace.info, backing.info());
    if offered.block_bytes != now.block_bytes {
        return Err(ExchangeError::BlockBytes { now: now.block_bytes, offered: offered.block_bytes });
    }
    if offered.blocks != now.blocks {
        return Err(ExchangeError::Blocks { now: now.blocks, offered: offered.blocks });
    }
    if offered.volatile_cache && !shared.has_cache() {
        return Err(ExchangeError::VolatileCache);
    }
    if shared.can_write_uncorrectable() && !backing.can_write_uncorrectable() {
        return Err(ExchangeError::WriteUncorrectable);
    }
    if now.deallocated_reads_zero && !offered.deallocated_reads_zero {
        return Err(ExchangeError::Deallocated);
    }
    Ok(())
}
