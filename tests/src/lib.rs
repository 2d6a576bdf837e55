//! What the tests over several crates share: software subsystems and drivers on them, polled by one thread under a made-up clock.
//!
//! **What is here.** [`rig`] has the world (subsystems, the clock, the seeded order of polls), fronts (a slot with a driver on
//! it), and backings that do as they are told. [`raw`] is a guest without a driver: registers and queues by hand, so that it can
//! do everything wrong. [`moving`] has a migration with its guests, over a [`disk`] that takes its time and a journal on [`paper`].
//! [`serving`] is an appliance in a folder of its own; [`guest`] and [`guest_appliance`] are virtual machines with a stock Linux and the appliance before them, [`dray_in_guest`]
//! puts our binary into one, [`image`] boots the appliance's own image, from a disk that [`image_disk`] looks into (`support/`).
//! The tests themselves are in `tests/`, a file per area; the benchmark is in `benches/`. Faults of the whole system (power loss, a
//! side that goes away) are the business of the simulator, `sim`, behind the feature of that name.
//!
//! **Where to start reading.** `rig.rs`, then `tests/loopback.rs`.

/// The archives that kernels take as their initial RAM disk, as `cargo xtask guests` builds them.
#[path = "../../xtask/src/cpio.rs"]
pub mod cpio;
pub mod disk;
#[path = "../support/dray_in_guest.rs"]
pub mod dray_in_guest;
#[path = "../support/guest.rs"]
pub mod guest;
#[path = "../support/guest_appliance.rs"]
pub mod guest_appliance;
pub mod hand;
#[path = "../support/image.rs"]
pub mod image;
#[path = "../support/image_disk.rs"]
pub mod image_disk;
pub mod moving;
pub mod odd;
pub mod paper;
pub mod plan;
pub mod raw;
pub mod rig;
#[path = "../support/serving.rs"]
pub mod serving;

#[cfg(feature = "sim")]
#[path = "../sim/mod.rs"]
pub mod sim;
