//! What the ends of a vfio-user connection tell each other that they can do: the JSON behind the VERSION message's structure.

use super::wire::{DEFAULT_DATA_BYTES, DEFAULT_DMA_MAPS, DEFAULT_MSG_FDS};
use serde_json::{Map, Value};

/// What an end of a connection can do: the JSON of VERSION. A member that is missing has its default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Descriptors that the sender can receive in one message.
    pub max_msg_fds: u32,
    /// Largest `count` of a data message that the sender takes.
    pub max_data_xfer_size: u32,
    /// Simultaneous DMA windows.
    pub max_dma_maps: u32,
    /// Page sizes for DMA windows, as a bit each.
    pub pgsizes: u64,
    /// REGION_WRITE_MULTI may be used.
    pub write_multiple: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            max_msg_fds: DEFAULT_MSG_FDS,
            max_data_xfer_size: DEFAULT_DATA_BYTES,
            max_dma_maps: DEFAULT_DMA_MAPS,
            pgsizes: 4096,
            write_multiple: false,
        }
    }
}

/// The JSON of a VERSION message is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the capabilities of a VERSION message are malformed")]
pub struct BadCapabilities;

impl Capabilities {
    /// Reads what is behind [`Version`]: nothing, or a JSON text that ends with NUL. Unknown members are ignored; known ones
    /// of a wrong type are not.
    ///
    /// # Errors
    /// [`BadCapabilities`].
    pub fn parse(text: &[u8]) -> Result<Self, BadCapabilities> {
        let mut capabilities = Self::default();
        if text.is_empty() {
            return Ok(capabilities);
        }
        let end = text.iter().position(|&byte| byte == 0).ok_or(BadCapabilities)?;
        let value: Value = serde_json::from_slice(&text[..end]).map_err(|_| BadCapabilities)?;
        let Value::Object(top) = value else { return Err(BadCapabilities) };
        let members = match top.get("capabilities") {
            None => return Ok(capabilities),
            Some(Value::Object(members)) => members,
            Some(_) => return Err(BadCapabilities),
        };
        number(members, "max_msg_fds", &mut capabilities.max_msg_fds)?;
        number(members, "max_data_xfer_size", &mut capabilities.max_data_xfer_size)?;
        number(members, "max_dma_maps", &mut capabilities.max_dma_maps)?;
        if let Some(value) = members.get("pgsizes") {
            capabilities.pgsizes = value.as_u64().ok_or(BadCapabilities)?;
        }
        if let Some(value) = members.get("write_multiple") {
            capabilities.write_multiple = value.as_bool().ok_or(BadCapabilities)?;
        }
        Ok(capabilities)
    }

    /// The JSON text with its NUL. Members at their default are left out if `short`: some clients take no reply that is longer
    /// than their request.
    #[must_use]
    pub fn to_json(&self, short: bool) -> Vec<u8> {
        let default = Self::default();
        let mut members = Map::new();
        let mut put = |name: &str, value: u64, default: u64| {
            if !short || value != default {
                members.insert(name.into(), value.into());
            }
        };
        put("max_msg_fds", self.max_msg_fds.into(), default.max_msg_fds.into());
        put("max_data_xfer_size", self.max_data_xfer_size.into(), default.max_data_xfer_size.into());
        put("max_dma_maps", self.max_dma_maps.into(), default.max_dma_maps.into());
        put("pgsizes", self.pgsizes, default.pgsizes);
        if self.write_multiple {
            members.insert("write_multiple".into(), true.into());
        }
        let mut text = serde_json::json!({ "capabilities": members }).to_string().into_bytes();
        text.push(0);
        text
    }
}

fn number(members: &Map<String, Value>, name: &str, into: &mut u32) -> Result<(), BadCapabilities> {
    if let Some(value) = members.get(name) {
        *into = value.as_u64().and_then(|value| u32::try_from(value).ok()).ok_or(BadCapabilities)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_survive_the_wire_and_may_be_missing() {
        let capabilities =
            Capabilities { max_msg_fds: 8, max_dma_maps: 16, pgsizes: 0x201000, write_multiple: true, ..Capabilities::default() };
        for short in [true, false] {
            assert_eq!(Capabilities::parse(&capabilities.to_json(short)), Ok(capabilities));
        }
        for none in [&b""[..], b"{}\0", b"{\"capabilities\":{\"twin_socket\":{}}}\0rest"] {
            assert_eq!(Capabilities::parse(none), Ok(Capabilities::default()));
        }
        for bad in [&b"{}"[..], b"\0", b"[]\0", b"{\"capabilities\":1}\0", b"{\"capabilities\":{\"max_msg_fds\":-1}}\0"] {
            assert_eq!(Capabilities::parse(bad), Err(BadCapabilities));
        }
    }
}
