//! Sizes and durations as people write them: "1GiB", "128KiB", "200us", "1.5s".

use serde::de::{self, Deserialize, Deserializer, Visitor};
use std::fmt;
use std::time::Duration;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A length of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

const SIZES: [(&str, u64); 7] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("GB", 1_000_000_000), ("MB", 1_000_000), ("B", 1)];
const SPANS: [(&str, u64); 6] = [("min", 60_000_000_000), ("ms", 1_000_000), ("us", 1_000), ("µs", 1_000), ("ns", 1), ("s", 1_000_000_000)];

fn scaled(text: &str, units: &[(&str, u64)], what: &str, example: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim());
    let known = || units.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let Some((_, scale)) = units.iter().find(|(name, _)| *name == unit) else {
        return Err(if unit.is_empty() {
            format!("{what} needs a unit ({}), as in \"{example}\"", known())
        } else {
            format!("\"{unit}\" is no unit of {what}; there are {}, as in \"{example}\"", known())
        });
    };
    let bad = || format!("\"{text}\" is no {what}; write one as \"{example}\"");
    if let Some((whole, part)) = number.split_once('.') {
        if part.is_empty() || part.len() > 9 || part.contains('.') {
            return Err(bad());
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let fraction: u64 = part.parse().map_err(|_| bad())?;
        let fraction = u128::from(fraction) * u128::from(*scale) / 10u128.pow(part.len() as u32);
        return whole.checked_mul(*scale).and_then(|w| w.checked_add(u64::try_from(fraction).ok()?)).ok_or_else(bad);
    }
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(*scale)).ok_or_else(bad)
}

impl std::str::FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        scaled(text, &SIZES, "size", "1GiB").map(Self)
    }
}

impl std::str::FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        scaled(text, &SPANS, "duration", "200us").map(|ns| Self(Duration::from_nanos(ns)))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, scale) in &SIZES[..4] {
            if self.0 >= *scale {
                return if self.0.is_multiple_of(*scale) {
                    write!(f, "{} {name}", self.0 / scale)
                } else {
                    write!(f, "{:.1} {name}", self.0 as f64 / *scale as f64)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0.as_micros();
        match us {
            0..10_000 => write!(f, "{us} µs"),
            10_000..10_000_000 => write!(f, "{:.1} ms", us as f64 / 1e3),
            _ => write!(f, "{:.1} s", us as f64 / 1e6),
        }
    }
}

struct Text<T>(std::marker::PhantomData<T>);

impl<T: std::str::FromStr<Err = String>> Visitor<'_> for Text<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number with its unit in quotes, as \"1GiB\" or \"200us\"")
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_str(Text(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_str(Text(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read_as_written() {
        assert_eq!("1GiB".parse(), Ok(Size(1 << 30)));
        assert_eq!("1.5 KiB".parse(), Ok(Size(1536)));
        assert_eq!("200us".parse(), Ok(Span(Duration::from_micros(200))));
        assert_eq!("0.25s".parse(), Ok(Span(Duration::from_millis(250))));
        assert_eq!(Size(1 << 30).to_string(), "1 GiB");
        assert_eq!(Span(Duration::from_micros(730)).to_string(), "730 µs");
    }

    #[test]
    fn wrong_units_say_what_would_be_right() {
        let error = "5GBit".parse::<Size>().expect_err("no unit");
        assert!(error.contains("GBit") && error.contains("GiB"), "{error}");
        assert!("7".parse::<Span>().expect_err("no unit").contains("needs a unit"));
        for bad in ["", "GiB", "1..5GiB", "1.GiB", "99999999999TiB", "-1s", "1.0000000001s"] {
            assert!(bad.parse::<Size>().is_err() && bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
