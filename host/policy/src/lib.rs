//! The policy seam: what a policy is asked, what it may answer, and what the host makes of a bad answer.
//!
//! Three roles ([`role::Cdq`], [`role::Tracking`], [`role::Copy`]) share one shape: an [`Opening`](seam::Opening) once, then
//! requests and answers. A policy is native (here, [`native`]) or a sandboxed component (`dray-sandbox`); callers see neither,
//! they hold a [`Seat`](seam::Seat). The [`guard`] stands between: it checks every answer, falls back to the native policy when
//! one is wrong, late or missing, opens a new instance, and sets a component aside that faults too often.
//!
//! Start reading at [`seam`], then [`role`]; [`packed`] has the byte formats of `wit/0.1/policy.wit`.
#![forbid(unsafe_code)]

mod checks;
pub mod conformance;
pub mod guard;
pub mod native;
pub mod packed;
pub mod role;
pub mod seam;
pub mod udmq;

pub use checks::MAX_CHUNK_LOG2;
