//! The vfio-user server from outside: what a client may do, and what none may get away with.
#![allow(clippy::unwrap_used)]

mod access;
mod driver;
mod life;
mod malformed;
mod memory;
mod migration;
mod rig;
