//! What the driver and its queues share state by: the standard library's, or loom's where its models run (`--cfg loom`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, fence};
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};
