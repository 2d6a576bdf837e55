//! The built-in native policies: what serves where no component is configured, and what answers when one faults.
//!
//! They are the plain form of the components in `plugins/`. They keep no state over a swap: after a fault each finds its way
//! from the next request alone.

mod cdq;
mod copy;
mod settings;
mod tracking;

pub use cdq::NativeCdq;
pub use copy::NativeCopy;
pub use settings::Settings;
pub use tracking::NativeTracking;

use crate::role::{Cdq, Copy, Role, Tracking};
use crate::seam::{Factory, Fault, Identity, Opening, Policy};

/// A role that has a native policy.
pub trait Native: Role {
    /// Opens the native policy of this role.
    ///
    /// # Errors
    /// [`Fault::Refused`] for a setting that is unknown or out of bounds.
    fn native(opening: &Opening<Self>) -> Result<Box<dyn Policy<Self>>, Fault>;
}

impl Native for Cdq {
    fn native(opening: &Opening<Self>) -> Result<Box<dyn Policy<Self>>, Fault> {
        Ok(Box::new(NativeCdq::open(opening)?))
    }
}

impl Native for Tracking {
    fn native(opening: &Opening<Self>) -> Result<Box<dyn Policy<Self>>, Fault> {
        Ok(Box::new(NativeTracking::open(opening)?))
    }
}

impl Native for Copy {
    fn native(opening: &Opening<Self>) -> Result<Box<dyn Policy<Self>>, Fault> {
        Ok(Box::new(NativeCopy::open(opening)?))
    }
}

/// Opens native policies.
#[derive(Debug)]
pub struct NativeFactory<R: Native> {
    identity: Identity,
    role: core::marker::PhantomData<fn() -> R>,
}

impl<R: Native> NativeFactory<R> {
    /// The factory of this role's native policy.
    #[must_use]
    pub fn new() -> Self {
        let identity = Identity { component: format!("native:{}", R::NAME), sha256: String::new() };
        Self { identity, role: core::marker::PhantomData }
    }
}

impl<R: Native> Default for NativeFactory<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: Native> Factory<R> for NativeFactory<R> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&mut self, opening: &Opening<R>, _saved: Option<&[u8]>) -> Result<Box<dyn Policy<R>>, Fault> {
        R::native(opening)
    }
}
