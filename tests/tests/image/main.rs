//! The appliance's own image, booted in QEMU as it is built: from its disk by UEFI and directly, with everything wrong that
//! nobody is there to put right, and through updates.
//!
//! `cargo xtask image` and `cargo xtask guests` made what boots. Folders of tests that fail stay, with the logs in them.
#![allow(missing_docs)]

mod boots;
mod builds;
mod drives;
mod outside;
mod readme;
mod room;
mod trouble;
mod update;
