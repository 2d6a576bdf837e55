//! What a namespace and its controller say of themselves, asked before the first command.

use super::PassthruConfig;
use super::error::PassthruError;
use super::node::Node;
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::passthru::abi::UringCommand;
use dray_device::passthru::{Bounds, HostFault, Outcome, ioctl, ring};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{
    Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController, IdentifyControllerNvm, IdentifyNamespace,
};
use std::path::Path;
use zerocopy::FromBytes;

/// Most bytes of one Write Zeroes where the controller names no limit: NLB has 16 bits.
const MOST_ZEROES: u64 = 1 << 30;
/// Bytes of one command where the kernel does not say what its queue takes.
const CAUTIOUS_BYTES: u64 = 256 << 10;

/// A namespace that the kernel owns.
#[derive(Clone, Debug)]
pub struct NamespaceAbout {
    /// NSID.
    pub nsid: u32,
    /// NSZE, logical blocks.
    pub blocks: u64,
    /// Bytes of data of a logical block.
    pub block_bytes: u32,
    /// MS, bytes of metadata of a logical block; 0 = none.
    pub metadata_bytes: u16,
    /// Metadata goes with the data (FLBAS bit 4) instead of in a buffer of its own.
    pub metadata_with_data: bool,
    /// Identify Namespace (CNS 00h).
    pub namespace: Box<IdentifyNamespace>,
    /// Identify Controller (CNS 01h).
    pub controller: Box<IdentifyController>,
    /// Most bytes of one Write Zeroes, 0 = the controller has none.
    pub max_write_zeroes: u64,
}

impl NamespaceAbout {
    /// Asks the controller through the namespace's device.
    pub(super) fn ask(node: &Node) -> Result<Self, PassthruError> {
        let buffer = DmaBuffer::allocate("dray-passthru-identify", IDENTIFY_BYTES, Pages::Small)?;
        let controller: IdentifyController = structure(node, &buffer, "Identify Controller", Cns::CONTROLLER, 0)?;
        let namespace: IdentifyNamespace = structure(node, &buffer, "Identify Namespace", Cns::NAMESPACE, node.nsid)?;
        // Older controllers have no such structure: its limits are 0 then, which is none.
        let nvm: Option<IdentifyControllerNvm> = structure(node, &buffer, "Identify Controller, NVM", Cns::CONTROLLER_NVM, 0).ok();
        let unusable = |what| PassthruError::Unusable { path: node.path.clone(), what };
        let block_bytes = namespace.block_bytes().ok_or_else(|| unusable("its logical blocks have no size that can be used"))?;
        let blocks = namespace.nsze;
        if blocks == 0 {
            return Err(unusable("it has no blocks: is it attached, and its NSID active?"));
        }
        let max_write_zeroes = if controller.oncs.write_zeroes() { zeroes(nvm.map_or(0, |nvm| nvm.wzsl)) } else { 0 };
        Ok(Self {
            nsid: node.nsid,
            blocks,
            block_bytes,
            metadata_bytes: namespace.format().ms(),
            metadata_with_data: namespace.flbas.metadata_inline(),
            namespace: Box::new(namespace),
            controller: Box::new(controller),
            max_write_zeroes,
        })
    }

    /// What commands are checked against: MDTS, and what the block layer's queue of the namespace takes.
    pub(super) fn bounds(&self, node: &Node, config: &PassthruConfig) -> Bounds {
        let mdts = self.controller.max_transfer_bytes(0);
        let kernel = node.queue_attribute("max_hw_sectors_kb").map(|kib| kib.saturating_mul(1024));
        bounds(config.max_transfer_bytes, mdts, kernel, node.queue_attribute("max_segments"))
    }
}

/// The least of all limits, in whole pages. CAP.MPSMIN is not known here: MDTS counts in 4 KiB, the least that it can be.
pub(super) fn bounds(wanted: usize, mdts: Option<u64>, kernel: Option<u64>, segments: Option<u64>) -> Bounds {
    // Data that does not begin at a page touches one page more than it fills.
    let by_segments = segments.map_or(u64::MAX, |segments| segments.saturating_sub(1).max(1).saturating_mul(PAGE as u64));
    let least = mdts.unwrap_or(u64::MAX).min(kernel.unwrap_or(CAUTIOUS_BYTES)).min(by_segments);
    let least = usize::try_from(least).unwrap_or(usize::MAX).min(wanted) & !(PAGE - 1);
    Bounds { max_transfer: least.max(PAGE), max_pieces: ring::MAX_PIECES }
}

fn zeroes(wzsl: u8) -> u64 {
    match u32::from(wzsl) {
        0 => MOST_ZEROES,
        wzsl => 1u64.checked_shl(12 + wzsl).map_or(MOST_ZEROES, |bytes| bytes.min(MOST_ZEROES)),
    }
}

fn structure<T: FromBytes>(
    node: &Node,
    buffer: &DmaBuffer,
    command: &'static str,
    cns: Cns,
    nsid: u32,
) -> Result<T, PassthruError> {
    let entry = SubmissionEntry::identify(cns, nsid, 0, CommandSetId::NVM);
    buffer.arena().fill(buffer.offset(), buffer.len(), 0);
    let outcome = ioctl::admin(&node.file, &UringCommand::of(&entry).unwrap_or_default(), Some(buffer.segment()));
    accepted(&node.path, command, outcome)?;
    read(buffer.arena(), buffer.offset()).ok_or(PassthruError::Unusable { path: node.path.clone(), what: "a structure of another size" })
}

fn read<T: FromBytes>(arena: &Arena, offset: usize) -> Option<T> {
    let mut bytes = [0; IDENTIFY_BYTES];
    arena.read(offset, &mut bytes);
    T::read_from_bytes(&bytes).ok()
}

/// The error that an outcome stands for.
pub(super) fn accepted(path: &Path, command: &'static str, outcome: Outcome) -> Result<(), PassthruError> {
    let path = || path.to_path_buf();
    match outcome {
        Outcome::Answered { status, .. } if status.is_error() => Err(PassthruError::Refused { path: path(), command, status }),
        Outcome::Answered { .. } => Ok(()),
        Outcome::NotSent(HostFault::NotAllowed) => Err(PassthruError::NoPermission { path: path() }),
        Outcome::NotSent(HostFault::Unsupported(_)) => Err(PassthruError::Unsupported { path: path() }),
        Outcome::NotSent(fault) | Outcome::Unknown(fault) => Err(PassthruError::Host { path: path(), command, fault }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_counts() {
        let max = |wanted, mdts, kernel, segments| bounds(wanted, mdts, kernel, segments).max_transfer;
        assert_eq!(max(1 << 20, Some(512 << 10), Some(2 << 20), Some(1024)), 512 << 10);
        assert_eq!(max(1 << 20, None, Some(128 << 10), Some(1024)), 128 << 10);
        assert_eq!(max(1 << 20, None, Some(1 << 20), Some(33)), 128 << 10);
        assert_eq!(max(1 << 20, None, None, None), 256 << 10);
        assert_eq!(max(10_000, None, Some(1 << 20), Some(0)), 4096);
        assert_eq!(max(100, Some(0), None, None), 4096, "never less than a page");
        assert_eq!((zeroes(0), zeroes(3), zeroes(200)), (1 << 30, 32 << 10, 1 << 30));
    }
}
