//! What a server has done and refused.

/// Counters of one server since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VfioUserCounters {
    /// Clients that were served.
    pub clients: u64,
    /// Clients refused because another was being served.
    pub refused_busy: u64,
    /// Clients refused for who they are.
    pub refused_peers: u64,
    /// Clients that have gone by themselves.
    pub left: u64,
    /// Clients disconnected for a header that is malformed, a first message that is not VERSION, or too many descriptors.
    pub broken_protocol: u64,
    /// Clients disconnected because they did not get through VERSION in time.
    pub handshake_timeouts: u64,
    /// Clients disconnected because memory that they had sent was taken away again.
    pub broken_memory: u64,
    /// Requests executed.
    pub requests: u64,
    /// Requests answered with an error, those without a reply included.
    pub refused: u64,
    /// Descriptors that came with a message and were not for it.
    pub stray_fds: u64,
    /// DMA windows mapped.
    pub maps: u64,
    /// DMA windows without a descriptor: kept, and not usable.
    pub unusable_maps: u64,
    /// DMA windows unmapped, a client's end included.
    pub unmaps: u64,
    /// Resets of the function.
    pub resets: u64,
}
