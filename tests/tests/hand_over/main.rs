//! A VM manager moves its guest over vfio-user: `dray run` with both ends exported, a guest that keeps its memory and its queues,
//! and everything that can go wrong on the way.
#![allow(missing_docs)]

mod log;
mod moves;
mod rig;
