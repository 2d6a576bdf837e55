//! Where an instance keeps its policy between calls.

use spin::Mutex;

/// The policy of this instance: empty until `open`, then one value for as long as the instance lives.
pub struct State<T>(Mutex<Option<T>>);

impl<T> State<T> {
    /// Before `open`.
    pub const fn empty() -> Self {
        Self(Mutex::new(None))
    }

    /// What `open` made; replaces an earlier one.
    pub fn set(&self, policy: T) {
        *self.0.lock() = Some(policy);
    }

    /// Runs a call on the policy.
    ///
    /// # Panics
    /// When the host calls before `open` (it never does): a trap, answered by the host's built-in policy.
    pub fn with<R>(&self, call: impl FnOnce(&mut T) -> R) -> R {
        match self.0.lock().as_mut() {
            Some(policy) => call(policy),
            None => panic!("called before open"),
        }
    }
}
