//! The address of a PCI function: domain, bus, device, function.

use std::fmt;
use std::str::FromStr;

/// A PCI function's address, written as `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Segment group; host bridges of volume managers have more than 16 bits.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device on the bus, at most 31.
    pub device: u8,
    /// Function of the device, at most 7. (With alternative routing IDs device and function are one number of 8 bits; it is
    /// written in the same two parts.)
    pub function: u8,
}

/// Text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no PCI address: DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal is, like 0000:01:00.0")]
pub struct BadAddress(pub String);

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function);
        f.pad(&text)
    }
}

impl FromStr for PciAddress {
    type Err = BadAddress;

    /// Takes what `lspci` prints: the domain may be left out where it is 0.
    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let bad = || BadAddress(text.chars().take(64).collect());
        let (rest, function) = text.rsplit_once('.').ok_or_else(bad)?;
        let mut parts = rest.rsplit(':');
        let (device, bus) = (parts.next().unwrap_or_default(), parts.next().ok_or_else(bad)?);
        let domain = parts.next().unwrap_or("0000");
        let hex = |text: &str, digits: std::ops::RangeInclusive<usize>, most: u32| {
            let good = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            good.then(|| u32::from_str_radix(text, 16).ok()).flatten().filter(|&value| value <= most)
        };
        let domain = hex(domain, 4..=8, u32::MAX).filter(|_| parts.next().is_none()).ok_or_else(bad)?;
        let bus = hex(bus, 2..=2, 0xff).ok_or_else(bad)?;
        let device = hex(device, 2..=2, 0x1f).ok_or_else(bad)?;
        let function = hex(function, 1..=1, 7).ok_or_else(bad)?;
        Ok(Self { domain, bus: bus as u8, device: device as u8, function: function as u8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_lspci_prints_is_taken() {
        let address: PciAddress = "0000:01:00.0".parse().expect("an address");
        assert_eq!(address, PciAddress { domain: 0, bus: 1, device: 0, function: 0 });
        assert_eq!("01:00.0".parse(), Ok(address));
        assert_eq!("10000:E1:1f.7".parse::<PciAddress>().expect("a volume manager's").to_string(), "10000:e1:1f.7");
        assert_eq!(format!("[{address:<14}]"), "[0000:01:00.0  ]");
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "", ".", ":", "01:00", "01:00.8", "01:20.0", "1:00.0", "000:01:00.0", "0:0000:01:00.0", "0000:01:00.0 ", "+1:00.0",
            "0000:01:0/.0", "../../etc.0", "nvme0", "123456789:01:00.0", "01:00.00", "0000:01:00.-1",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_address_is_read_back(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,20}") {
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert!(address.to_string().ends_with(&text.to_ascii_lowercase()));
            }
        }
    }
}
