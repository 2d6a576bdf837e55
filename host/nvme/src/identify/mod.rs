//! Identify structures (Base 2.3 §5.2.13; NVMCS §4.1.5), all of 4096 bytes: [`IdentifyController`],
//! [`IdentifyNamespace`] and their kin, the namespace identification descriptors, the controller state formats, lists.

mod controller;
mod descriptor;
mod formats;
mod list;
mod namespace;

pub use controller::*;
pub use descriptor::{
    DescriptorError, NamespaceDescriptor, NamespaceDescriptorWriter, NamespaceIdType, descriptors,
};
pub use formats::{ControllerStateFormats, FormatsError};
pub use list::*;
pub use namespace::*;

/// Bytes of every Identify structure.
pub const IDENTIFY_BYTES: usize = 4096;

open_value! {
    /// CNS, Controller or Namespace Structure (Base 2.3 §5.2.13.1).
    Cns(u8) mask 0xFF {
        0x00 NAMESPACE "Identify Namespace",
        0x01 CONTROLLER "Identify Controller",
        0x02 ACTIVE_NAMESPACES "Active Namespace ID list",
        0x03 NAMESPACE_DESCRIPTORS "Namespace Identification Descriptor list",
        0x05 NAMESPACE_COMMAND_SET "I/O Command Set specific Identify Namespace",
        0x06 CONTROLLER_NVM "I/O Command Set specific Identify Controller",
        0x07 ACTIVE_NAMESPACES_COMMAND_SET "I/O Command Set specific Active Namespace ID list",
        0x08 NAMESPACE_INDEPENDENT "I/O Command Set Independent Identify Namespace",
        0x10 ALLOCATED_NAMESPACES "Allocated Namespace ID list",
        0x11 ALLOCATED_NAMESPACE "Identify Namespace, allocated",
        0x12 NAMESPACE_CONTROLLERS "Controller list of a namespace",
        0x13 CONTROLLERS "Controller list of the subsystem",
        0x14 PRIMARY_CAPABILITIES "Primary Controller Capabilities",
        0x15 SECONDARY_CONTROLLERS "Secondary Controller list",
        0x1C COMMAND_SETS "I/O Command Set structure",
        0x20 CONTROLLER_STATE_FORMATS "Supported Controller State Formats",
    }
}

open_value! {
    /// CSI, Command Set Identifier (Base 2.3 §5.2.13).
    CommandSetId(u8) mask 0xFF {
        0x00 NVM "NVM",
        0x01 KEY_VALUE "Key Value",
        0x02 ZONED "Zoned Namespace",
    }
}
