//! NVMe over Fabrics, and its TCP transport: PDUs, fabrics commands, the discovery and ANA log pages.
//!
//! Sections are those of the NVMe/TCP Transport Specification 1.1 ("TCP 1.1") and of the Base Specification 2.3
//! ("Base 2.3", which took in NVMe over Fabrics). A connection is a queue pair: [`pdu`] is what crosses it, [`fabrics`]
//! are the commands that replace registers and queue creation, [`discovery`] says what a target has and how to reach it.
//! Nothing here computes digests or touches sockets.

pub mod discovery;
pub mod fabrics;
pub mod pdu;

pub use discovery::{
    AnaGroup, AnaLogHeader, AnaState, DiscoveryEntry, DiscoveryLogHeader, SubsystemType,
};
pub use fabrics::{ConnectData, FabricsType};
pub use pdu::{CommonHeader, DataPdu, IcReq, IcResp, PduType, TermReq};

/// NQN of the discovery subsystem, the same on every target (Base 2.3 §4.7).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// TCP port of an I/O controller (assigned to "nvme").
pub const PORT: u16 = 4420;

/// TCP port of a discovery controller (assigned to "nvme-disc").
pub const DISCOVERY_PORT: u16 = 8009;

/// Longest NQN in bytes, without the terminating zero (Base 2.3 §4.7).
pub const MAX_NQN: usize = 223;

/// The NQN of a 256-byte field: UTF-8 up to the first zero byte. `None` if there is no zero, if it is empty, longer
/// than [`MAX_NQN`], not UTF-8, or does not begin with `nqn.`.
pub fn nqn(field: &[u8; 256]) -> Option<&str> {
    let end = field.iter().position(|&byte| byte == 0)?;
    let text = core::str::from_utf8(&field[..end]).ok()?;
    (text.len() <= MAX_NQN && text.starts_with("nqn.")).then_some(text)
}

/// Writes an NQN or another text into a zero-padded field; what does not fit before the last zero is cut.
pub fn write_text(field: &mut [u8], text: &str) {
    field.fill(0);
    let len = text.len().min(field.len().saturating_sub(1));
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_with_a_zero() {
        let mut field = [0; 256];
        write_text(&mut field, DISCOVERY_NQN);
        assert_eq!(nqn(&field), Some(DISCOVERY_NQN));
        assert_eq!(nqn(&[b'n'; 256]), None, "no end");
        assert_eq!(nqn(&[0; 256]), None, "empty");
        let mut long = [0; 256];
        long[..224].fill(b'a');
        long[..4].copy_from_slice(b"nqn.");
        assert_eq!(nqn(&long), None, "224 bytes");
        long[223] = 0;
        assert!(nqn(&long).is_some());
        long[9] = 0xFF;
        assert_eq!(nqn(&long), None, "not UTF-8");
    }
}
