//! The kernel's random numbers, for authentication.

use dray_device::random::SecureRandom;
use std::fs::File;
use std::io::Read;

/// `/dev/urandom`.
#[derive(Debug)]
pub struct Urandom(File);

impl Urandom {
    /// Opens it and reads it once.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open() -> std::io::Result<Self> {
        let mut file = File::open("/dev/urandom")?;
        file.read_exact(&mut [0; 16])?;
        Ok(Self(file))
    }
}

impl SecureRandom for Urandom {
    fn fill(&mut self, into: &mut [u8]) {
        if self.0.read_exact(into).is_err() {
            // It does not fail once it was read. A challenge that can be guessed must never go out.
            std::process::abort();
        }
    }
}
