//! The vfio-user server from outside: what a client may do, and what none may get away with.

mod access;
mod driver;
mod life;
mod malformed;
mod memory;
mod migration;
mod pin;
mod rig;
