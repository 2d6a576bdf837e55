//! What the target counts: every way a client's wrong or end shows here.

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Connections taken.
    pub accepted: u64,
    /// Connections refused because there were too many.
    pub refused: u64,
    /// Half-open connections ended to make room for newer ones.
    pub evicted: u64,
    /// Connections that did not get to Connect (and through authentication) in time.
    pub handshake_timeouts: u64,
    /// Connections that have ended, however.
    pub closed: u64,
    /// C2HTermReq sent: protocol errors.
    pub terminations: u64,
    /// H2CTermReq received.
    pub host_terminations: u64,
    /// Header digests that were wrong.
    pub header_digest_errors: u64,
    /// Data digests that were wrong.
    pub data_digest_errors: u64,
    /// Connections ended because the client did not read.
    pub stalled: u64,
    /// Connections ended by an error of the socket.
    pub socket_errors: u64,
    /// Associations and discovery controllers ended by their keep alive timer.
    pub keep_alive_expired: u64,
    /// Associations ended because their host kept a controller without enabling it.
    pub idle_expired: u64,
    /// Associations begun.
    pub associations: u64,
    /// Connect commands refused.
    pub connects_refused: u64,
    /// Connect commands refused because the host is not on the list.
    pub hosts_refused: u64,
    /// Connect commands refused because the subsystem requires digests that the host did not ask for.
    pub digests_refused: u64,
    /// Connections ended because another host was faster: what Connect had promised was gone when they had authenticated.
    pub late_refusals: u64,
    /// Authentications that failed.
    pub authentication_failures: u64,
    /// Commands passed to controllers.
    pub commands: u64,
    /// Commands answered with an error by the target itself.
    pub commands_refused: u64,
}
