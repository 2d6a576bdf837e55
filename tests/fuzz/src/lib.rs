//! Hostile neighbours: what a guest, a device, a file, a peer's state and a policy may send, made up byte by byte.
//!
//! **What it does.** Each target is a module with one function, `run(data)`, that turns bytes into a session and panics when a
//! guarantee is broken. Besides not crashing:
//!
//! | target | who is hostile | asserts |
//! |---|---|---|
//! | [`controller`] | a guest at the software controller, or the host at its management controller | memory outside the mappings, read-only memory and unmapped memory stay as they were; no operation on the media outside the namespace, on a write-protected or another guest's namespace; with whole commands alone, no change outside the ranges that were written to; a bounded number of operations under way; no completion that is no command's; afterwards a reset brings a controller that identifies itself, writes and reads back and refuses what it must, and a neighbour never noticed |
//! | [`driver`] | a device under the driver | every command that was taken ends exactly once, with a status only if the device posted it; no more queues than asked for; answers and batches are no longer than asked for; what ends is a typed error; afterwards a reset brings the driver up on a device that behaves |
//! | [`config`] | the file | a refusal names a line and a place inside the file and can be shown; what is accepted is accepted again, means the same and keeps every bound; sizes and durations survive being printed |
//! | [`state`] | a peer that sends controller state | an honest state is accepted; what was accepted is read back; what was refused changed nothing; a resumed controller stays inside the guest's memory, and a reset brings it back |
//! | [`policy`] | a policy | whatever the answer, what was given back is dirty; no more is given back than was shown; the queue is drained although the policy will not; every answer that passes the guard keeps its bounds, by a check of the target's own; the copy hands out every dirty block once, and only dirty ones |
//! | [`vfio_user`] | a client of the vfio-user server | one reply for every request, in order, within the room the client offered, descriptors only where they belong; memory lent for reading, unmapped memory and memory of a client that has gone stay as they are; windows within their limit; hooks of a migration called in order; a neighbour on another server answered all the time; counters that say what happened; the next client finds a controller as good as new |
//! | [`nvme_tcp`] | hosts at the NVMe/TCP target | one answer for every command, or the connection's end; no more data and no R2T beyond what was asked for; digests right, nothing behind a C2HTermReq, and none for a host that keeps to the rules; nobody served who is not on the list or has not authenticated; what waits for a slow reader, connections and associations within their limits; a neighbour on another subsystem served all the time; every end of a connection has a cause that its host knows or a counter shows; the next host finds controllers as good as new |
//!
//! **How to run it.** `cargo xtask fuzz` replays the corpus in `corpus/` and then mutates it for some seconds a target, on the
//! stable compiler, without coverage. With a nightly compiler and a C++ compiler, `cargo fuzz run --fuzz-dir tests/fuzz
//! --features libfuzzer controller` goes on for as long as one likes and is guided by coverage. A failing input is written to a
//! file; `cargo xtask fuzz --target T --replay FILE` runs it again.
//!
//! **What it does not do yet.** The sandbox, the vfio-user client and the NVMe/TCP initiator have no target. The two runs share
//! inputs, but inputs found by the time-boxed run do not enter the corpus by themselves.
//!
//! **Where to start reading.** [`input`] (how bytes become values), then a target; [`guest`] and [`media`] are what the
//! controller's targets play with, [`device`] is the driver's opponent; [`pipe`] is what the exports' clients, [`peer`] and
//! [`vfio_client`], speak through.
#![forbid(unsafe_code)]

/// What the configuration keeps of devices while they are open. Its text is what is fuzzed: none is ever opened.
mod devices {
    /// Stands for the appliance's, which needs all of it.
    #[derive(Clone, Debug, Default)]
    pub struct Devices;
}

pub mod commands;
pub mod config;
pub mod controller;
pub mod device;
pub mod driver;
pub mod export_seeds;
pub mod guest;
pub mod input;
pub mod media;
pub mod mutate;
pub mod nvme_tcp;
pub mod peer;
pub mod pipe;
pub mod policy;
pub mod seeds;
pub mod state;
pub mod vfio_client;
pub mod vfio_hooks;
pub mod vfio_user;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// Runs one input; panics when a guarantee is broken.
    pub run: fn(&[u8]),
    /// Inputs that are whole sessions, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Pieces that mutation may put in.
    pub words: &'static [&'static [u8]],
    /// Longest input that mutation makes, in bytes.
    pub most_bytes: usize,
}

/// All targets.
pub const TARGETS: [Target; 7] = [
    Target { name: "controller", run: controller::run, seeds: seeds::controller, words: mutate::NUMBERS, most_bytes: 1024 },
    Target { name: "driver", run: driver::run, seeds: seeds::driver, words: mutate::NUMBERS, most_bytes: 1024 },
    Target { name: "config", run: config::run, seeds: seeds::config, words: config::WORDS, most_bytes: 4096 },
    Target { name: "state", run: state::run, seeds: seeds::state, words: mutate::NUMBERS, most_bytes: 1024 },
    Target { name: "policy", run: policy::run, seeds: seeds::policy, words: mutate::NUMBERS, most_bytes: 1024 },
    Target { name: "vfio_user", run: vfio_user::run, seeds: export_seeds::vfio_user, words: mutate::NUMBERS, most_bytes: 1024 },
    Target { name: "nvme_tcp", run: nvme_tcp::run, seeds: export_seeds::nvme_tcp, words: mutate::NUMBERS, most_bytes: 1024 },
];
