//! The NVM Express specification as types: what crosses the wire between a host and a controller, byte for byte.
//!
//! **What it does.** Registers, submission and completion entries, the command dwords and builders of every command
//! that Dray sends or serves, status codes with their names, Identify pages, log pages, features, asynchronous events,
//! SGL descriptors, the doorbell buffer, NVMe/TCP PDUs and fabrics commands, DH-HMAC-CHAP authentication ([`auth`]), and
//! what live migration adds: the controller data queue and its user data migration queue (UDMQ) entries, Track
//! Send/Receive buffers and the controller state of Migration Send/Receive.
//! Sizes and the offsets that matter are asserted at compile time. Every value is *open*: a code that this crate does
//! not know, and every reserved bit, survives decoding and encoding. No function panics on any input.
//!
//! **Conventions.** Fields carry the specification's names in lower case. "0's based" fields hold the count minus one;
//! builders take plain counts. Bit ranges and hexadecimal numbers are written as in the specification (`7:0`, `3Eh`).
//! Sections are those of the NVM Express Base Specification 2.3 ("Base 2.3") and of the NVM Command Set Specification
//! ("NVMCS"). A builder's data pointer is zero unless it takes one; the command identifier is the queue's to set.
//!
//! **What it does not do yet.** Command sets other than NVM (opcodes and structures of ZNS and KV);
//! Identify Namespace NVM (CNS 05h, needed by extended LBA formats only); reservations but for their report, directives, security
//! and firmware commands; the contents of CMB, PMR and boot-partition registers. Checks that need a controller's limits
//! (MDTS, MQES, namespace size) belong to the driver and to the controller, not here.
//!
//! **Where to start reading.** [`command`] for the two queue entries, [`status`] for what comes back, then [`cdq`] and
//! [`state`] for what live migration is about.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(not(target_endian = "little"))]
compile_error!("dray-nvme lays structures out as the wire does, so it needs a little-endian host");

extern crate alloc;

#[macro_use]
mod macros;

pub mod auth;
pub mod cdq;
pub mod command;
pub mod doorbell_buffer;
pub mod event;
pub mod feature;
pub mod identify;
pub mod log;
pub mod registers;
pub mod reservation;
pub mod state;
pub mod status;
pub mod tcp;
pub mod track;
pub mod virtualization;

/// An output buffer is too small for what was to be written into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferTooSmall {
    /// Bytes that the structure takes.
    pub needed: usize,
    /// Bytes that the buffer has.
    pub available: usize,
}

impl core::fmt::Display for BufferTooSmall {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "the structure takes {} bytes and the buffer has {}",
            self.needed, self.available
        )
    }
}

impl core::error::Error for BufferTooSmall {}
