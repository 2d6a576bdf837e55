//! Namespaces: identity, backing, write protection.

use crate::config::NamespaceConfig;
use dray_device::backing::{Backing, BackingInfo, BackingRequest, Submitted};

/// A namespace and its backing.
pub(crate) struct Namespace {
    pub(crate) config: NamespaceConfig,
    /// Of the backing that the namespace was made with; one that it is exchanged for keeps what this says.
    pub(crate) info: BackingInfo,
    pub(crate) block_shift: u32,
    pub(crate) backing: Box<dyn Backing>,
    pub(crate) write_protected: bool,
    /// Operations under way in the backing.
    pub(crate) pending: u32,
    /// Something was submitted since the last commit.
    pub(crate) uncommitted: bool,
}

impl Namespace {
    pub(crate) fn new(config: NamespaceConfig, backing: Box<dyn Backing>) -> Self {
        let info = backing.info();
        Self {
            write_protected: config.write_protected || backing.is_write_protected(),
            config,
            info,
            block_shift: info.block_bytes.trailing_zeros(),
            backing,
            pending: 0,
            uncommitted: false,
        }
    }

    /// Begins an operation of the backing.
    #[inline]
    pub(crate) fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        let submitted = self.backing.submit(request);
        if submitted == Submitted::Pending {
            self.pending += 1;
            self.uncommitted = true;
        }
        submitted
    }

    /// Whether `blocks` from `slba` are all inside.
    #[inline]
    pub(crate) fn holds(&self, slba: u64, blocks: u64) -> bool {
        slba.checked_add(blocks).is_some_and(|end| end <= self.info.blocks)
    }
}
