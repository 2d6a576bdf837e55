//! What a guest's operating system recognises its disk by.

use dray_nvme::identify::{IdentifyController, IdentifyNamespace};

/// Everything that must be the same after a controller reset at the destination. CNTLID is left out: it may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Serial number (Base 2.3 §5.2.13.2.1, SN).
    pub serial: String,
    /// Model number (MN).
    pub model: String,
    /// NVM subsystem qualified name (SUBNQN).
    pub subnqn: String,
    /// Namespace globally unique identifier.
    pub nguid: [u8; 16],
    /// IEEE extended unique identifier.
    pub eui64: [u8; 8],
    /// Namespace size in logical blocks.
    pub nsze: u64,
    /// Namespace capacity in logical blocks.
    pub ncap: u64,
    /// Formatted LBA size.
    pub flbas: u8,
    /// The LBA formats (NVMCS §4.1.5.1): metadata bytes, LBA data size as a power of two, relative performance.
    pub formats: Vec<(u16, u8, u8)>,
}

impl Identity {
    /// From what the controller returned.
    #[must_use]
    pub fn new(controller: &IdentifyController, namespace: &IdentifyNamespace) -> Self {
        let formats = usize::from(namespace.nlbaf).min(63) + 1;
        Self {
            serial: text(&controller.sn),
            model: text(&controller.mn),
            subnqn: text(&controller.subnqn),
            nguid: namespace.nguid,
            eui64: namespace.eui64,
            nsze: namespace.nsze,
            ncap: namespace.ncap,
            flbas: namespace.flbas.into_bits(),
            formats: namespace.lbaf[..formats].iter().map(|format| (format.ms(), format.lbads(), format.rp())).collect(),
        }
    }

    /// Names of the fields that differ.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let fields = [
            ("serial number", self.serial != other.serial),
            ("model", self.model != other.model),
            ("SUBNQN", self.subnqn != other.subnqn),
            ("NGUID", self.nguid != other.nguid),
            ("EUI64", self.eui64 != other.eui64),
            ("NSZE", self.nsze != other.nsze),
            ("NCAP", self.ncap != other.ncap),
            ("FLBAS", self.flbas != other.flbas),
            ("LBA formats", self.formats != other.formats),
        ];
        fields.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect()
    }
}

/// An ASCII field without its padding.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches(['\0', ' ']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn a_changed_field_is_named() {
        let (controller, namespace) = (IdentifyController::new_zeroed(), IdentifyNamespace::new_zeroed());
        let first = Identity::new(&controller, &namespace);
        assert!(first.differences(&first.clone()).is_empty());
        let mut other = namespace;
        other.nguid[3] = 1;
        other.nlbaf = 1;
        assert_eq!(first.differences(&Identity::new(&controller, &other)), ["NGUID", "LBA formats"]);
    }
}
