//! Namespace Identification Descriptors (CNS 03h; Base 2.3 §5.2.13.2.3).

use super::CommandSetId;
use crate::BufferTooSmall;
use core::fmt;

const HEAD_BYTES: usize = 4;

open_value! {
    /// NIDT, Namespace Identifier Type.
    NamespaceIdType(u8) mask 0xFF {
        1 EUI64 "EUI64",
        2 NGUID "NGUID",
        3 UUID "UUID",
        4 CSI "CSI",
    }
}

/// One descriptor: a type and its identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceDescriptor<'a> {
    /// NIDT, Namespace Identifier Type.
    pub kind: NamespaceIdType,
    /// NID, the identifier: 8 bytes of EUI64, 16 of NGUID and UUID (all big-endian), 1 of CSI. A device may send other
    /// lengths.
    pub id: &'a [u8],
}

/// A descriptor list that cannot be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DescriptorError {
    /// The descriptor of this type has length 0.
    Empty(NamespaceIdType),
    /// The descriptor of this type reaches beyond the buffer.
    Truncated(NamespaceIdType),
}

impl fmt::Display for DescriptorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty(kind) => {
                write!(f, "namespace identification descriptor {kind} has length 0")
            }
            Self::Truncated(kind) => write!(
                f,
                "namespace identification descriptor {kind} ends beyond the buffer"
            ),
        }
    }
}

impl core::error::Error for DescriptorError {}

/// The descriptors of a list, up to the one of type 0 or the end of the bytes; the first that is malformed is
/// reported and ends the list.
pub fn descriptors(
    bytes: &[u8],
) -> impl Iterator<Item = Result<NamespaceDescriptor<'_>, DescriptorError>> {
    let mut rest = bytes;
    core::iter::from_fn(move || {
        let (&[kind, length, _, _], body) = rest.split_first_chunk::<HEAD_BYTES>()?;
        rest = &[];
        let kind = NamespaceIdType(kind);
        if kind.0 == 0 {
            return None;
        }
        if length == 0 {
            return Some(Err(DescriptorError::Empty(kind)));
        }
        let Some((id, after)) = body.split_at_checked(usize::from(length)) else {
            return Some(Err(DescriptorError::Truncated(kind)));
        };
        rest = after;
        Some(Ok(NamespaceDescriptor { kind, id }))
    })
}

/// Writes a descriptor list into a buffer, which it zeroes first (and so ends the list).
#[derive(Debug)]
pub struct NamespaceDescriptorWriter<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl<'a> NamespaceDescriptorWriter<'a> {
    /// An empty list in `out`, usually 4096 bytes.
    pub fn new(out: &'a mut [u8]) -> Self {
        out.fill(0);
        Self { out, at: 0 }
    }

    /// Adds an EUI64.
    ///
    /// # Errors
    /// [`BufferTooSmall`] if the descriptor does not fit; the list is as before then. So for the others.
    pub fn eui64(&mut self, id: &[u8; 8]) -> Result<(), BufferTooSmall> {
        self.push(NamespaceIdType::EUI64, 8, id)
    }

    /// Adds an NGUID.
    ///
    /// # Errors
    /// [`BufferTooSmall`].
    pub fn nguid(&mut self, id: &[u8; 16]) -> Result<(), BufferTooSmall> {
        self.push(NamespaceIdType::NGUID, 16, id)
    }

    /// Adds a UUID.
    ///
    /// # Errors
    /// [`BufferTooSmall`].
    pub fn uuid(&mut self, id: &[u8; 16]) -> Result<(), BufferTooSmall> {
        self.push(NamespaceIdType::UUID, 16, id)
    }

    /// Adds a command set identifier.
    ///
    /// # Errors
    /// [`BufferTooSmall`].
    pub fn csi(&mut self, csi: CommandSetId) -> Result<(), BufferTooSmall> {
        self.push(NamespaceIdType::CSI, 1, &[csi.0])
    }

    fn push(&mut self, kind: NamespaceIdType, length: u8, id: &[u8]) -> Result<(), BufferTooSmall> {
        let needed = self.at + HEAD_BYTES + id.len();
        let available = self.out.len();
        let to = self
            .out
            .get_mut(self.at..needed)
            .ok_or(BufferTooSmall { needed, available })?;
        to[0] = kind.0;
        to[1] = length;
        to[HEAD_BYTES..].copy_from_slice(id);
        self.at = needed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_lists_read_back_and_bad_ones_end() {
        let mut out = [0xFF; 40];
        let mut writer = NamespaceDescriptorWriter::new(&mut out);
        writer.nguid(&[7; 16]).unwrap();
        writer.csi(CommandSetId::NVM).unwrap();
        assert_eq!(
            writer.uuid(&[1; 16]),
            Err(BufferTooSmall {
                needed: 45,
                available: 40
            })
        );
        let nguid = NamespaceDescriptor {
            kind: NamespaceIdType::NGUID,
            id: &[7; 16],
        };
        let csi = NamespaceDescriptor {
            kind: NamespaceIdType::CSI,
            id: &[0],
        };
        assert!(descriptors(&out).eq([Ok(nguid), Ok(csi)]));
        assert!(
            descriptors(&[9, 5, 0, 0, 1]).eq([Err(DescriptorError::Truncated(NamespaceIdType(9)))])
        );
        assert!(
            descriptors(&[1, 0, 0, 0, 1, 0, 0, 0])
                .eq([Err(DescriptorError::Empty(NamespaceIdType::EUI64))])
        );
    }
}
