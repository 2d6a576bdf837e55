//! The driver against a scripted controller, good and bad.

mod cdq;
mod io;
mod life;
