//! DH-HMAC-CHAP, the in-band authentication of NVMe over Fabrics (Base 2.3 §8.3.5.5), for both ends.
//!
//! [`HostAuth`] and [`ControllerAuth`] are state machines that take and give the bytes of Authentication Send and
//! Authentication Receive; they draw no randomness ([`Entropy`] is an argument) and do no I/O. [`Secret`] is a key in the
//! representation that configurations carry, `DHHC-1:hh:base64:`.
//!
//! Secrets, private exponents and responses are compared in constant time and never appear in `Debug`. What they leave in
//! freed memory is not wiped. Secure channel concatenation (SC_C, the generated pre-shared key for TLS) is refused.
//!
//! Large groups compute for tens of milliseconds (ffdhe8192 twice per end): run them as a job, or keep to ffdhe3072 or less.

mod dh;
mod message;
mod secret;
mod state;
#[cfg(test)]
mod tests;

pub use dh::{DhGroup, EXPONENT_BYTES};
pub use message::{Challenge, Failure, MAX_MESSAGE_BYTES, Message, MessageError, Negotiate, Reply, Success1};
pub use secret::{Hash, MAX_HASH_BYTES, Secret, SecretError};
pub use state::{AuthFailure, ControllerAuth, ControllerAuthConfig, Entropy, GiveError, HostAuth, HostAuthConfig, HostStep};

open_value! {
    /// Rejection Reason Explanation of the failure messages (Base 2.3 §8.3.5.5.2); the reason code itself is always 1.
    Reason(u8) mask 0xFF {
        0x01 FAILED "authentication failed",
        0x02 PROTOCOL_NOT_USABLE "authentication protocol not usable",
        0x03 CONCATENATION_MISMATCH "secure channel concatenation mismatch",
        0x04 HASH_NOT_USABLE "hash function not usable",
        0x05 DH_GROUP_NOT_USABLE "DH group not usable",
        0x06 INCORRECT_PAYLOAD "incorrect payload",
        0x07 INCORRECT_MESSAGE "incorrect protocol message",
    }
}
