//! What threads share state by: the standard library's, or loom's where its models run (`--cfg loom`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::fence;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::fence;

/// A value that one thread exchanges while others use it, without a lock.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct Cell<T>(arc_swap::ArcSwapOption<T>);

#[cfg(not(loom))]
impl<T: Clone> Cell<T> {
    pub(crate) fn new(value: Option<T>) -> Self {
        Self(arc_swap::ArcSwapOption::from_pointee(value))
    }

    #[inline]
    pub(crate) fn with<R>(&self, see: impl FnOnce(Option<&T>) -> R) -> R {
        see(self.0.load().as_deref())
    }

    pub(crate) fn get(&self) -> Option<T> {
        self.with(|value| value.cloned())
    }

    pub(crate) fn set(&self, value: Option<T>) {
        self.0.store(value.map(std::sync::Arc::new));
    }
}

/// The same for loom, which does not know `arc-swap`: whether there is a value is an atomic of its own, so that the order in
/// which it is seen is modelled, and the value stands behind a lock.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Cell<T> {
    there: AtomicBool,
    value: std::sync::Mutex<Option<T>>,
}

#[cfg(loom)]
impl<T: Clone> Cell<T> {
    pub(crate) fn new(value: Option<T>) -> Self {
        Self { there: AtomicBool::new(value.is_some()), value: std::sync::Mutex::new(value) }
    }

    pub(crate) fn with<R>(&self, see: impl FnOnce(Option<&T>) -> R) -> R {
        let there = self.there.load(std::sync::atomic::Ordering::Acquire);
        // Loom's threads take turns on one thread and none of them waits here: the lock is free.
        let value = self.value.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        see(value.filter(|_| there).as_ref())
    }

    pub(crate) fn get(&self) -> Option<T> {
        self.with(|value| value.cloned())
    }

    pub(crate) fn set(&self, value: Option<T>) {
        let there = value.is_some();
        *self.value.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = value;
        self.there.store(there, std::sync::atomic::Ordering::Release);
    }
}
