//! PID 1 of the bootable image: brings the machine up to what the appliance needs, runs the appliance, and lets the power go.
//!
//! The binary is the image's `/init`. As PID 1 it does not read its arguments; it does, in this order:
//! 1. mounts the kernel's file systems ([`mounts`]) and reads the kernel's command line ([`cmdline`]),
//! 2. begins to load kernel modules, on threads of their own ([`loader`]): first of all the sets `ext4`, `disk`, `fat` and `scsi`
//!    ([`modules`]), as far as there are devices for them ([`modalias`]),
//! 3. waits for the partitions and mounts that of the configuration ([`mounts`]),
//! 4. reads the configuration, and does what its table `[image]` says ([`crate::config::image`]): modules, host name, huge pages,
//!    network ([`net`]), and what runs beside the appliance ([`services`]): [`console`], [`status`] page, [`watchdog`], clock
//!    ([`time`]),
//! 5. mounts the state,
//! 6. runs the appliance, `dray run --config …`, as a child ([`appliance`]), restarts it when it ends by itself ([`backoff`]),
//! 7. and waits for what comes ([`supervisor`]): its end, SIGTERM, the power button, `poweroff`, `reboot` and `reload`.
//!
//! Modules that serving on this configuration does not take are loaded while the appliance starts and serves; a command on the
//! console waits for them.
//!
//! What is said goes to the kernel's console and into a log on the state partition ([`journal`]).
//!
//! **When something is wrong** it stays up: nobody is logged in who could help, and a machine that restarts for ever cannot be
//! asked. A configuration that is wrong is said as `dray config check` says it, what of `[image]` is right by itself is done, and
//! the status page tells; so with a state partition that cannot be mounted (which is never made anew by itself), and with an
//! appliance that ends again and again.
//!
//! PID 1 must not panic, since the kernel would: each event is handled behind a guard that says what happened and goes on.

pub mod appliance;
pub mod backoff;
pub mod board;
pub mod bring_up;
pub mod cmdline;
pub mod console;
pub mod journal;
pub mod loader;
pub mod modalias;
pub mod modules;
pub mod mounts;
pub mod net;
pub mod power;
pub mod reaper;
pub mod services;
pub mod status;
pub mod steps;
pub mod supervisor;
pub mod time;
pub mod trial;
pub mod watchdog;

use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since the kernel's start.
#[must_use]
pub fn since_kernel_start_ms() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec).unwrap_or(0), u64::try_from(time.tv_nsec).unwrap_or(0));
    seconds * 1000 + nanos / 1_000_000
}

/// Whether this process is the machine's first, and was started as its `/init`: the first process of a container may be any
/// other command.
#[must_use]
pub fn is_first_process() -> bool {
    let named_init = || std::env::args_os().next().is_some_and(|name| std::path::Path::new(&name).ends_with("init"));
    rustix::process::getpid().is_init() && named_init()
}

/// Runs PID 1 until the power goes.
pub fn main() -> ! {
    supervisor::main(since_kernel_start_ms())
}
