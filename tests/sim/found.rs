//! Seeds that have found something in the product. They run before any others.
//!
//! A seed is a run of one scenario only as long as the generators choose as they did: where they have come to choose otherwise, it
//! is one more seed. What was mended has a test of its own beside the code.

/// A seed, and what it showed.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The seed.
    pub seed: u64,
    /// What was wrong.
    pub what: &'static str,
}

const fn found(seed: u64, what: &'static str) -> Found {
    Found { seed, what }
}

/// All of them.
pub const FOUND: &[Found] = &[
    found(4, "a reset of the destination's management controller let it serve before Resume, and the move was undone"),
    found(220, "the same, around the record"),
    found(243, "the same: the guest ran on at the destination for long"),
    found(587, "the same, while the guest reset its controller"),
    found(51, "an undone attempt left a slow write behind, and the next one wrote the same blocks"),
    found(83, "a deletion of a data queue that was refused gave its memory up"),
    found(109, "the same"),
    found(3771, "the head of a deleted data queue took effect on the next queue of that identifier"),
    found(4205, "the same"),
    found(4056, "a source queue that died before its first command was never noticed"),
    found(4279, "a record that was read but not durable was relied on, and torn with the next"),
    found(53060, "a block marked as unreadable was readable after a restart"),
    found(53727, "the same"),
    found(50496, "a Set Controller State of an attempt before reached the destination late"),
    found(54031, "the same"),
    found(20114, "tracking could not be started anew while a guest wrote"),
    found(38818, "the same"),
    found(40357, "the same"),
    found(1007983, "a Suspend that outlived the reset of its manager left the guest suspended, and every later migration was refused"),
    found(1035087, "the same"),
    found(1008673, "the host's own throttle went on for seconds after all limits"),
    found(1040624, "the same"),
    found(1029230, "an I/O queue whose deletion failed once kept its identifier, and no other could be created"),
    found(1049097, "the same"),
];
