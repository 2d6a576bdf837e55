//! Randomness for secrets as a seam: challenges, keys and host-visible tokens. The appliance plugs in the kernel's source, the
//! simulator and tests a seeded one; nothing below the appliance draws it by itself.

/// A source of bytes that nobody can guess.
pub trait SecureRandom: Send {
    /// Fills `into`.
    fn fill(&mut self, into: &mut [u8]);
}

impl<R: SecureRandom + ?Sized> SecureRandom for Box<R> {
    fn fill(&mut self, into: &mut [u8]) {
        (**self).fill(into);
    }
}
