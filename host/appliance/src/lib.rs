//! The appliance: configuration, polling cores, clocks, jobs, durable records and the command line; it plugs the rooms together.
//!
//! Not here yet: exports of controllers (vfio-user, NVMe/TCP), physical devices, `dray run` with its control socket.
//! Start reading at [`cli`] for what a user can do, at [`config`] for what `appliance.toml` may say, and at [`core`] for
//! the threads.

pub mod assembly;
pub mod cli;
pub mod config;
pub mod core;
pub mod image;
pub mod live;
pub mod policies;
pub mod recovery;
pub mod store;
pub mod summary;
