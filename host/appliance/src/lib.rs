//! The appliance: configuration, polling cores, clocks, jobs, durable records and the command line; it plugs the rooms together.
//!
//! Not here yet: more than one polling core.
//! Start reading at [`cli`] for what a user can do, at [`config`] for what `appliance.toml` may say, at [`run`] for the appliance
//! as it serves and [`control`] for how it is spoken to, and at [`core`] for the threads. As the first process of the bootable
//! image it is [`init`]; [`slots`] are that image's two systems.

pub mod apart;
pub mod assembly;
pub mod backings;
pub mod cli;
pub mod config;
pub mod control;
pub mod core;
pub mod departures;
pub mod devices;
pub mod image;
pub mod init;
pub mod live;
pub mod moving;
pub mod policies;
pub mod random;
pub mod recovery;
pub mod run;
pub mod slots;
pub mod store;
pub mod summary;
