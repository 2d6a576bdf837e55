//! Supported Controller State Formats (CNS 20h; Base 2.3 §5.2.13.2.21).

use crate::BufferTooSmall;
use core::fmt;

/// The versions and vendor UUIDs of controller state that a controller takes and gives. Indices are 1-based.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerStateFormats<'a> {
    versions: &'a [[u8; 2]],
    uuids: &'a [[u8; 16]],
}

/// Why the formats could not be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatsError {
    /// The lists reach beyond the bytes.
    Truncated,
    /// More than 255 versions or UUIDs.
    TooMany,
    /// The output buffer is too small.
    Buffer(BufferTooSmall),
}

impl fmt::Display for FormatsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => f.write_str("controller state formats reach beyond the buffer"),
            Self::TooMany => f.write_str("more than 255 controller state versions or UUIDs"),
            Self::Buffer(error) => fmt::Display::fmt(error, f),
        }
    }
}

impl core::error::Error for FormatsError {}

impl<'a> ControllerStateFormats<'a> {
    /// Reads the structure.
    ///
    /// # Errors
    /// [`FormatsError::Truncated`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatsError> {
        let (&[nv, nuuid], rest) = bytes
            .split_first_chunk::<2>()
            .ok_or(FormatsError::Truncated)?;
        let (versions, rest) = rest
            .split_at_checked(2 * usize::from(nv))
            .ok_or(FormatsError::Truncated)?;
        let uuids = rest
            .get(..16 * usize::from(nuuid))
            .ok_or(FormatsError::Truncated)?;
        Ok(Self {
            versions: versions.as_chunks().0,
            uuids: uuids.as_chunks().0,
        })
    }

    /// The versions of the NVMe controller state, in index order.
    pub fn versions(&self) -> impl ExactSizeIterator<Item = u16> + use<'a> {
        self.versions
            .iter()
            .map(|version| u16::from_le_bytes(*version))
    }

    /// The UUIDs of vendor specific state, in index order.
    pub fn uuids(&self) -> impl ExactSizeIterator<Item = [u8; 16]> + use<'a> {
        self.uuids.iter().copied()
    }

    /// The version that index `csvi` selects; `None` for 0 and beyond the list.
    pub fn version(&self, csvi: u8) -> Option<u16> {
        self.versions().nth(usize::from(csvi).checked_sub(1)?)
    }

    /// The UUID that index `csuuidi` selects; `None` for 0 and beyond the list.
    pub fn uuid(&self, csuuidi: u8) -> Option<[u8; 16]> {
        self.uuids().nth(usize::from(csuuidi).checked_sub(1)?)
    }

    /// CSVI of a version: where it first stands, from 1.
    pub fn csvi_of(&self, version: u16) -> Option<u8> {
        self.versions()
            .position(|other| other == version)
            .and_then(|at| u8::try_from(at + 1).ok())
    }

    /// CSUUIDI of a UUID: where it first stands, from 1.
    pub fn csuuidi_of(&self, uuid: &[u8; 16]) -> Option<u8> {
        self.uuids()
            .position(|other| other == *uuid)
            .and_then(|at| u8::try_from(at + 1).ok())
    }

    /// Writes the structure into `out`, zeroes the rest, and returns its bytes.
    ///
    /// # Errors
    /// [`FormatsError::TooMany`] or [`FormatsError::Buffer`]; nothing was written then.
    pub fn build(
        versions: &[u16],
        uuids: &[[u8; 16]],
        out: &mut [u8],
    ) -> Result<usize, FormatsError> {
        let nv = u8::try_from(versions.len()).map_err(|_| FormatsError::TooMany)?;
        let nuuid = u8::try_from(uuids.len()).map_err(|_| FormatsError::TooMany)?;
        let needed = 2 + 2 * versions.len() + 16 * uuids.len();
        let available = out.len();
        if needed > available {
            return Err(FormatsError::Buffer(BufferTooSmall { needed, available }));
        }
        out.fill(0);
        out[..2].copy_from_slice(&[nv, nuuid]);
        let (to_versions, to_uuids) = out[2..needed].split_at_mut(2 * versions.len());
        for (to, version) in to_versions.as_chunks_mut().0.iter_mut().zip(versions) {
            *to = version.to_le_bytes();
        }
        to_uuids.as_chunks_mut().0.copy_from_slice(uuids);
        Ok(needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_one_based() {
        let reference = ControllerStateFormats::parse(&[1, 0, 0, 0]).unwrap();
        assert_eq!(
            (
                reference.version(0),
                reference.version(1),
                reference.version(2)
            ),
            (None, Some(0), None)
        );
        assert_eq!(reference.csvi_of(0), Some(1));
        let mut out = [0xFF; 64];
        assert_eq!(
            ControllerStateFormats::build(&[0, 9], &[[3; 16]], &mut out),
            Ok(22)
        );
        let formats = ControllerStateFormats::parse(&out).unwrap();
        assert_eq!(
            (formats.csvi_of(9), formats.uuid(1), formats.uuid(2)),
            (Some(2), Some([3; 16]), None)
        );
        assert_eq!(formats.csuuidi_of(&[3; 16]), Some(1));
        for short in 0..22 {
            assert_eq!(
                ControllerStateFormats::parse(&out[..short]),
                Err(FormatsError::Truncated)
            );
        }
    }
}
