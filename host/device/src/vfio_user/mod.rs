//! vfio-user (protocol 0.9.2): a PCI function over a Unix socket. [`wire`] is what both ends say; the server is in
//! `dray-export`, the client beside this file.

mod capabilities;
pub mod client;
mod client_link;
mod client_migration;
mod client_region;
#[cfg(all(test, not(loom)))]
mod client_tests;
pub mod wire;
