//! The seam itself: roles, policies, the factories that open them, and the seat a caller asks.

use crate::role::Role;

/// A namespace that moves, as a policy sees it (`types.namespace` of the WIT package).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Its NSID on the source.
    pub nsid: u32,
    /// Its size in logical blocks.
    pub blocks: u64,
    /// Bytes of one logical block.
    pub block_bytes: u32,
}

/// What stays the same while an instance lives (`types.setup` of the WIT package).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// The migration, a number that is never reused.
    pub migration: u64,
    /// The only randomness a policy has.
    pub seed: u64,
    /// Microseconds since the migration began.
    pub now_us: u64,
    /// At most [`MAX_NAMESPACES`], in ascending order of NSID.
    pub namespaces: Vec<NamespaceInfo>,
    /// Regions in all, at most [`MAX_REGIONS`].
    pub regions: u32,
    /// Stride of a region record in bytes, [`crate::packed::REGION_BYTES`] of this host.
    pub region_bytes: u32,
    /// The role's `settings` table.
    pub settings: Vec<(String, String)>,
}

/// Most namespaces in a migration set.
pub const MAX_NAMESPACES: usize = 1024;
/// Most regions over all namespaces of a migration set.
pub const MAX_REGIONS: usize = 4096;
/// Most bytes of saved state.
pub const MAX_STATE_BYTES: usize = 64 * 1024;

/// What a policy instance is opened with.
#[derive(Clone, Debug)]
pub struct Opening<R: Role> {
    /// The part every role gets.
    pub setup: Setup,
    /// The role's own part: the queue for [`crate::role::Cdq`], nothing for the others.
    pub extra: R::Extra,
}

/// Why a call, or the opening of an instance, did not give a usable answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The component trapped (unreachable, out of bounds, stack, division).
    #[error("trap: {0}")]
    Trap(String),
    /// The call ran past its budget.
    #[error("the call ran past its budget")]
    Deadline,
    /// The component asked for more memory than it may have.
    #[error("the component asked for more memory than its limit")]
    Memory,
    /// The answer breaks a bound or a format.
    #[error("malformed answer: {0}")]
    Malformed(String),
    /// `open` or `load` answered with an error of the policy's own.
    #[error("refused: {0}")]
    Refused(String),
}

/// Who answers: shown to operators and written into the summary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// File name of the component, or `native:NAME`.
    pub component: String,
    /// SHA-256 of the component's bytes in hex; empty for a native policy.
    pub sha256: String,
}

/// One live instance of a policy.
pub trait Policy<R: Role>: Send {
    /// Answers one request. `answer` comes in cleared ([`Role::clear`]); its buffers are reused from call to call.
    ///
    /// # Errors
    /// A [`Fault`]; after one the instance is dropped and never asked again.
    fn call(&mut self, request: &R::Request, answer: &mut R::Answer) -> Result<(), Fault>;

    /// The state a successor is given, if the policy keeps any (at most [`MAX_STATE_BYTES`]).
    ///
    /// # Errors
    /// A [`Fault`]; the successor then starts fresh.
    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault>;
}

/// Opens instances of one policy: at the start of a migration, and again after each fault.
pub trait Factory<R: Role>: Send {
    /// Who the instances are.
    fn identity(&self) -> &Identity;

    /// Opens an instance; `saved` is what [`Policy::save`] of an earlier one returned. A policy that refuses saved state
    /// starts fresh.
    ///
    /// # Errors
    /// A [`Fault`] of `open` itself.
    fn open(&mut self, opening: &Opening<R>, saved: Option<&[u8]>) -> Result<Box<dyn Policy<R>>, Fault>;
}

/// One request on its way to a policy and back. Boxed and recycled, so that asking allocates nothing.
#[derive(Debug)]
pub struct Exchange<R: Role> {
    /// What is asked; filled by the caller.
    pub request: R::Request,
    /// What was answered; always valid by [`Role::check`] when it comes back.
    pub answer: R::Answer,
    /// How the answer came about.
    pub outcome: Outcome,
}

impl<R: Role> Default for Exchange<R> {
    fn default() -> Self {
        Self { request: R::Request::default(), answer: R::Answer::default(), outcome: Outcome::default() }
    }
}

/// How an answer came about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The fault that the primary policy answered with, if it did.
    pub fault: Option<Fault>,
    /// The native policy gave the answer.
    pub by_fallback: bool,
    /// What the call took, in nanoseconds by the seat's meter.
    pub took_ns: u64,
}

/// What a seat counted since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeatStats {
    /// Calls answered, by whomever.
    pub calls: u64,
    /// Entries shown (cdq) or regions shown (the others), over all calls.
    pub items: u64,
    /// Time in calls of the primary policy, nanoseconds.
    pub busy_ns: u64,
    /// Calls of the primary policy that ended in a fault, and instances that would not open.
    pub faults: u64,
    /// Calls that the native policy answered instead.
    pub fallbacks: u64,
    /// The primary policy has been set aside for faulting too often.
    pub set_aside: bool,
    /// The last fault, in words.
    pub last_fault: Option<String>,
}

/// Where a caller asks a role: in place, or beside the polling core on a thread of the appliance.
pub trait Seat<R: Role>: Send {
    /// Who answers at present.
    fn identity(&self) -> Identity;

    /// Opens the policy for a migration. It never fails: where the component refuses, the native policy serves and the fault
    /// is counted.
    fn open(&mut self, opening: Opening<R>);

    /// Hands a request over. At most one is under way: the caller waits for [`poll`](Self::poll) before it asks again.
    fn ask(&mut self, exchange: Box<Exchange<R>>);

    /// The answered request, when there is one.
    fn poll(&mut self) -> Option<Box<Exchange<R>>>;

    /// What was counted so far.
    fn stats(&self) -> SeatStats;
}

/// The time base of [`Outcome::took_ns`]: a clock in the appliance, anything repeatable in the simulator.
pub trait Meter: Send {
    /// Nanoseconds since some fixed moment.
    fn now_ns(&self) -> u64;
}
