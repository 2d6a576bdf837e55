//! Fabrics commands (Base 2.3 §6): what replaces registers, queue creation and PRPs when there is no bus.

use crate::command::{Cdw0, Psdt, SglDescriptor, SglIdentifier, SglType, SubmissionEntry};
use crate::status::Status;
use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Opcode of every fabrics command, on admin and I/O queues (Base 2.3 §6).
pub const OPCODE: u8 = 0x7F;

open_value! {
    /// FCTYPE, Fabrics Command Type (Base 2.3 §6).
    FabricsType(u8) mask 0xFF {
        0x00 PROPERTY_SET "Property Set",
        0x01 CONNECT "Connect",
        0x04 PROPERTY_GET "Property Get",
        0x05 AUTHENTICATION_SEND "Authentication Send",
        0x06 AUTHENTICATION_RECEIVE "Authentication Receive",
        0x08 DISCONNECT "Disconnect",
    }
}

/// Statuses of fabrics commands (Base 2.3 §4.2.3.2). Their codes overlap with those of I/O command sets, so they have no
/// name in [`Status::name`].
pub mod status {
    use super::Status;

    /// Connect Incompatible Format: RECFMT is not supported.
    pub const INCOMPATIBLE_FORMAT: Status = Status::new(1, 0x80);
    /// Connect Controller Busy: the controller asked for is in use, or none is free.
    pub const CONTROLLER_BUSY: Status = Status::new(1, 0x81);
    /// Connect Invalid Parameters: DW0 says which ([`super::invalid_parameter`]).
    pub const INVALID_PARAMETERS: Status = Status::new(1, 0x82);
    /// Connect Restart Discovery.
    pub const RESTART_DISCOVERY: Status = Status::new(1, 0x83);
    /// Connect Invalid Host: the host is not allowed.
    pub const INVALID_HOST: Status = Status::new(1, 0x84);
    /// Invalid Queue Type: the command is not for this kind of queue.
    pub const INVALID_QUEUE_TYPE: Status = Status::new(1, 0x85);
    /// Discover Restart: the log page changed while it was read.
    pub const DISCOVER_RESTART: Status = Status::new(1, 0x90);
    /// Authentication Required.
    pub const AUTHENTICATION_REQUIRED: Status = Status::new(1, 0x91);
}

/// DW0 of a Connect response with [`status::INVALID_PARAMETERS`]: the byte offset of the parameter, in the data (`in_data`)
/// or in the command (Base 2.3 §6.3).
pub const fn invalid_parameter(in_data: bool, offset: u16) -> u32 {
    offset as u32 | (in_data as u32) << 16
}

/// CATTR of Connect (Base 2.3 §6.3).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ConnectAttributes {
    /// Priority class of the queue.
    #[bits(2)]
    pub priority: u8,
    /// Disable SQ flow control: SQHD of the responses is reserved.
    pub no_sq_flow_control: bool,
    /// Individual I/O queue deletion.
    pub queue_deletion: bool,
    #[bits(4)]
    __: u8,
}

/// Connect (Base 2.3 §6.3), 64 bytes; its data is [`ConnectData`].
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ConnectCommand {
    /// Opcode 7Fh, PSDT and CID.
    pub cdw0: Cdw0,
    /// FCTYPE.
    pub fctype: FabricsType,
    /// Reserved, 0.
    pub rsvd5: [u8; 19],
    /// SGL1.
    pub sgl: [u64; 2],
    /// RECFMT, Record Format: 0.
    pub recfmt: u16,
    /// QID: 0 for the admin queue.
    pub qid: u16,
    /// SQSIZE in entries, 0's based.
    pub sqsize: u16,
    /// CATTR.
    pub cattr: ConnectAttributes,
    /// Reserved, 0.
    pub rsvd47: u8,
    /// KATO, Keep Alive Timeout in milliseconds; 0 for none. Admin queue only.
    pub kato: u32,
    /// Reserved, 0.
    pub rsvd52: [u8; 12],
}
layout!(ConnectCommand, 64, fctype @ 4, sgl @ 24, recfmt @ 40, qid @ 42, sqsize @ 44, cattr @ 46, kato @ 48);

/// Data of Connect, 1024 bytes (Base 2.3 §6.3).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConnectData {
    /// HOSTID, Host Identifier.
    pub hostid: [u8; 16],
    /// CNTLID: the controller asked for, [`CNTLID_DYNAMIC`] for any (admin queue), or the association's.
    pub cntlid: u16,
    /// Reserved, 0.
    pub rsvd18: [u8; 238],
    /// SUBNQN, zero-terminated ([`super::nqn`]).
    pub subnqn: [u8; 256],
    /// HOSTNQN, zero-terminated.
    pub hostnqn: [u8; 256],
    /// Reserved, 0.
    pub rsvd768: [u8; 256],
}
layout!(ConnectData, 1024, cntlid @ 16, subnqn @ 256, hostnqn @ 512);
zeroed_default!(ConnectData);

impl core::fmt::Debug for ConnectData {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ConnectData")
            .field("cntlid", &self.cntlid)
            .field("subnqn", &super::nqn(&self.subnqn))
            .field("hostnqn", &super::nqn(&self.hostnqn))
            .finish_non_exhaustive()
    }
}

/// CNTLID that leaves the choice to the target (Base 2.3 §6.3).
pub const CNTLID_DYNAMIC: u16 = 0xFFFF;
/// CNTLID that a discovery log entry carries when any controller may be asked for (static model).
pub const CNTLID_STATIC: u16 = 0xFFFE;

/// DW0 of a Connect response that succeeded (Base 2.3 §6.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ConnectResponse {
    /// CNTLID of the controller.
    pub cntlid: u16,
    __: bool,
    /// ATR: an authentication transaction is required on this queue before any other command.
    pub authentication_required: bool,
    /// ASCR: authentication and a secure channel are required.
    pub secure_channel_required: bool,
    #[bits(13)]
    __: u16,
}

/// Property Set or Property Get, 64 bytes (Base 2.3 §6.5, §6.6).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PropertyCommand {
    /// Opcode 7Fh, PSDT and CID.
    pub cdw0: Cdw0,
    /// FCTYPE.
    pub fctype: FabricsType,
    /// Reserved, 0.
    pub rsvd5: [u8; 32],
    /// Reserved, 0.
    pub rsvd37: [u8; 3],
    /// ATTRIB: bits 2:0 are 0 for 4 bytes, 1 for 8 bytes.
    pub attrib: u8,
    /// Reserved, 0.
    pub rsvd41: [u8; 3],
    /// OFST, offset of the property: a register's offset in BAR0.
    pub offset: u32,
    /// VALUE of Property Set, low and high half.
    pub value: u64,
    /// Reserved, 0.
    pub rsvd56: u64,
}
layout!(PropertyCommand, 64, fctype @ 4, attrib @ 40, offset @ 44, value @ 48);

/// Authentication Send or Receive, 64 bytes (Base 2.3 §6.1, §6.2).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AuthenticationCommand {
    /// Opcode 7Fh, PSDT and CID.
    pub cdw0: Cdw0,
    /// FCTYPE.
    pub fctype: FabricsType,
    /// Reserved, 0.
    pub rsvd5: [u8; 19],
    /// SGL1.
    pub sgl: [u64; 2],
    /// Reserved, 0.
    pub rsvd40: u8,
    /// SPSP0, Security Protocol Specific: 01h.
    pub spsp0: u8,
    /// SPSP1: 01h.
    pub spsp1: u8,
    /// SECP, Security Protocol: [`AuthenticationCommand::SECP_NVME`].
    pub secp: u8,
    /// TL, Transfer Length of Send, or AL, Allocation Length of Receive, in bytes.
    pub length: u32,
    /// Reserved, 0.
    pub rsvd48: [u8; 16],
}
layout!(AuthenticationCommand, 64, fctype @ 4, sgl @ 24, spsp0 @ 41, spsp1 @ 42, secp @ 43, length @ 44);

impl AuthenticationCommand {
    /// SECP of NVMe in-band authentication.
    pub const SECP_NVME: u8 = 0xE9;
}

/// Disconnect, 64 bytes (Base 2.3 §6.4).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DisconnectCommand {
    /// Opcode 7Fh, PSDT and CID.
    pub cdw0: Cdw0,
    /// FCTYPE.
    pub fctype: FabricsType,
    /// Reserved, 0.
    pub rsvd5: [u8; 32],
    /// Reserved, 0.
    pub rsvd37: [u8; 3],
    /// RECFMT, Record Format: 0.
    pub recfmt: u16,
    /// Reserved, 0.
    pub rsvd42: [u8; 22],
}
layout!(DisconnectCommand, 64, fctype @ 4, recfmt @ 40);

fn cdw0() -> Cdw0 {
    Cdw0::new()
        .with_opcode(OPCODE)
        .with_psdt(Psdt::SGL_MPTR_BUFFER)
}

impl SubmissionEntry {
    /// FCTYPE: which fabrics command this is, if the opcode is [`OPCODE`].
    pub const fn fabrics_type(&self) -> FabricsType {
        FabricsType(self.nsid as u8)
    }

    /// The entry read as another layout of the same 64 bytes (a fabrics command).
    pub fn read_as<T: FromBytes>(&self) -> Option<T> {
        T::read_from_bytes(self.as_bytes()).ok()
    }

    /// Connect (fabrics command 01h) of queue `qid` with `entries` entries (2..=65536), KATO in milliseconds; the 1024 bytes
    /// of [`ConnectData`] come in the capsule.
    pub fn connect(qid: u16, entries: u32, cattr: ConnectAttributes, kato: u32) -> Self {
        let command = ConnectCommand {
            cdw0: cdw0(),
            fctype: FabricsType::CONNECT,
            sgl: SglDescriptor::in_capsule(0, 1024).into_dptr(),
            qid,
            sqsize: entries.saturating_sub(1).min(0xFFFF) as u16,
            cattr,
            kato,
            ..Default::default()
        };
        zerocopy::transmute!(command)
    }

    /// Property Get (fabrics command 04h) of 4 or, with `wide`, 8 bytes.
    pub fn property_get(offset: u32, wide: bool) -> Self {
        let command = PropertyCommand {
            cdw0: cdw0(),
            fctype: FabricsType::PROPERTY_GET,
            attrib: u8::from(wide),
            offset,
            ..Default::default()
        };
        zerocopy::transmute!(command)
    }

    /// Property Set (fabrics command 00h) of 4 or, with `wide`, 8 bytes.
    pub fn property_set(offset: u32, wide: bool, value: u64) -> Self {
        let command = PropertyCommand {
            cdw0: cdw0(),
            fctype: FabricsType::PROPERTY_SET,
            attrib: u8::from(wide),
            offset,
            value,
            ..Default::default()
        };
        zerocopy::transmute!(command)
    }

    /// Authentication Send (`send`) or Receive of `length` bytes; the data pointer is the transport's to set.
    pub fn authentication(send: bool, length: u32) -> Self {
        let command = AuthenticationCommand {
            cdw0: cdw0(),
            fctype: if send {
                FabricsType::AUTHENTICATION_SEND
            } else {
                FabricsType::AUTHENTICATION_RECEIVE
            },
            spsp0: 1,
            spsp1: 1,
            secp: AuthenticationCommand::SECP_NVME,
            length,
            ..Default::default()
        };
        zerocopy::transmute!(command)
    }

    /// Disconnect (fabrics command 08h) of the I/O queue it is sent on.
    pub fn disconnect() -> Self {
        let command = DisconnectCommand {
            cdw0: cdw0(),
            fctype: FabricsType::DISCONNECT,
            ..Default::default()
        };
        zerocopy::transmute!(command)
    }
}

/// Sub type of [`SglType::DATA_BLOCK`] whose address is an offset into the capsule's data (Base 2.3 §4.3.2).
pub const SUBTYPE_OFFSET: u8 = 0x1;
/// Sub type of [`SglType::TRANSPORT_DATA_BLOCK`] that NVMe/TCP uses (TCP 1.1 §3.4.2).
pub const SUBTYPE_TRANSPORT: u8 = 0xA;

impl SglDescriptor {
    /// Data in the command capsule, `offset` bytes behind its start (TCP 1.1 §3.4.1).
    pub fn in_capsule(offset: u64, length: u32) -> Self {
        Self {
            address: offset,
            length,
            rsvd12: [0; 3],
            identifier: SglIdentifier::new()
                .with_kind(SglType::DATA_BLOCK)
                .with_subtype(SUBTYPE_OFFSET),
        }
    }

    /// Data that the transport moves by data PDUs (TCP 1.1 §3.4.2).
    pub fn transport(length: u32) -> Self {
        Self {
            address: 0,
            length,
            rsvd12: [0; 3],
            identifier: SglIdentifier::new()
                .with_kind(SglType::TRANSPORT_DATA_BLOCK)
                .with_subtype(SUBTYPE_TRANSPORT),
        }
    }

    /// Whether this is [`SglDescriptor::in_capsule`].
    pub const fn is_in_capsule(&self) -> bool {
        self.identifier.into_bits() == SUBTYPE_OFFSET
    }

    /// Whether this is [`SglDescriptor::transport`].
    pub const fn is_transport(&self) -> bool {
        self.identifier.into_bits() == 0x50 | SUBTYPE_TRANSPORT
    }
}

/// Which way a command moves data: bits 1:0 of the opcode, or of FCTYPE in a fabrics command (Base 2.3 §4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataDirection {
    /// No data (00b).
    None,
    /// Host to controller (01b).
    ToController,
    /// Controller to host (10b).
    ToHost,
    /// Both (11b): not used.
    Both,
}

/// Direction of a command's data.
pub const fn direction(sqe: &SubmissionEntry) -> DataDirection {
    let code = if sqe.cdw0.opcode() == OPCODE {
        sqe.fabrics_type().0
    } else {
        sqe.cdw0.opcode()
    };
    match code & 3 {
        0 => DataDirection::None,
        1 => DataDirection::ToController,
        2 => DataDirection::ToHost,
        _ => DataDirection::Both,
    }
}

/// What Identify Controller says of fabrics (bytes 1805:1792; Base 2.3 §5.2.13.2.1).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, packed(2))]
pub struct FabricsCapabilities {
    /// IOCCSZ: most bytes of a command capsule on an I/O queue, in units of 16 bytes.
    pub ioccsz: u32,
    /// IORCSZ: most bytes of a response capsule, in units of 16 bytes.
    pub iorcsz: u32,
    /// ICDOFF: where in-capsule data begins, in units of 16 bytes; 0 in NVMe/TCP.
    pub icdoff: u16,
    /// FCATT: bit 0 clear for the dynamic controller model.
    pub fcatt: u8,
    /// MSDBD: most SGL data block descriptors in a capsule.
    pub msdbd: u8,
    /// OFCS: bit 0 when Disconnect is supported.
    pub ofcs: u16,
}
/// Where [`FabricsCapabilities`] stands in Identify Controller.
pub const CAPABILITIES_OFFSET: usize = 1792;
layout!(FabricsCapabilities, 14, icdoff @ 8, msdbd @ 11, ofcs @ 12);

/// What Identify Controller says of asymmetric namespace access (bytes 351:342).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct AnaCapabilities {
    /// ANATT: longest transition in seconds.
    pub anatt: u8,
    /// ANACAP: bits 0..=4 the states that are reported, bit 6 that ANAGRPID does not change, bit 7 its support.
    pub anacap: u8,
    /// ANAGRPMAX: highest group identifier.
    pub anagrpmax: u32,
    /// NANAGRPID: number of groups.
    pub nanagrpid: u32,
}
/// Where [`AnaCapabilities`] stand in Identify Controller.
pub const ANA_OFFSET: usize = 342;

impl AnaCapabilities {
    /// The ten bytes as they stand in Identify Controller.
    pub fn bytes(&self) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes[0] = self.anatt;
        bytes[1] = self.anacap;
        bytes[2..6].copy_from_slice(&self.anagrpmax.to_le_bytes());
        bytes[6..].copy_from_slice(&self.nanagrpid.to_le_bytes());
        bytes
    }
}

/// SGLS of Identify Controller (bytes 539:536): SGLs supported with dword alignment (bits 1:0 = 10b), transport data block (bit
/// 21), offsets into the capsule (bit 20).
pub const SGLS_TCP: u32 = 0b10 | 1 << 20 | 1 << 21;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fabrics_commands_sit_where_the_specification_puts_them() {
        let connect = SubmissionEntry::connect(
            3,
            128,
            ConnectAttributes::new().with_no_sq_flow_control(true),
            5000,
        );
        let bytes = connect.as_bytes();
        assert_eq!((bytes[0], bytes[1], bytes[4]), (0x7F, 0x40, 1));
        assert_eq!(&bytes[32..36], &1024u32.to_le_bytes());
        assert_eq!(bytes[39], 0x01);
        assert_eq!(&bytes[40..52], &[0, 0, 3, 0, 127, 0, 4, 0, 0x88, 0x13, 0, 0]);
        let get = SubmissionEntry::property_get(8, true);
        assert_eq!((get.as_bytes()[40], get.as_bytes()[44]), (1, 8));
        assert_eq!(direction(&get), DataDirection::None);
        assert_eq!(direction(&connect), DataDirection::ToController);
        let auth = SubmissionEntry::authentication(false, 4096);
        assert_eq!(&auth.as_bytes()[41..48], &[1, 1, 0xE9, 0, 0x10, 0, 0]);
        assert_eq!(direction(&auth), DataDirection::ToHost);
        assert_eq!(SglDescriptor::transport(1).identifier.into_bits(), 0x5A);
        assert!(SglDescriptor::transport(1).is_transport());
        assert!(SglDescriptor::in_capsule(0, 1).is_in_capsule());
        assert_eq!(
            ConnectResponse::new()
                .with_cntlid(1)
                .with_authentication_required(true)
                .into_bits(),
            1 | 1 << 17
        );
    }
}
