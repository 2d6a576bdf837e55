//! The `settings` table of `open`: whole numbers by name, the unit at the end of the name.

extern crate alloc;
use alloc::{format, string::String, vec::Vec};

/// Reads a policy's settings; one that is unknown, doubled or out of bounds makes `open` fail with what would be right.
#[derive(Debug)]
pub struct Settings<'a> {
    given: &'a [(String, String)],
    known: Vec<(&'static str, u64, u64)>,
    wrong: Option<String>,
}

impl<'a> Settings<'a> {
    /// `given`: `setup.settings`.
    pub fn of(given: &'a [(String, String)]) -> Self {
        Self { given, known: Vec::new(), wrong: None }
    }

    /// The number of that name from `low` to `high`, or its default.
    pub fn number(&mut self, name: &'static str, default: u64, low: u64, high: u64) -> u64 {
        self.known.push((name, low, high));
        let mut found = self.given.iter().filter(|(key, _)| key == name);
        let Some((_, text)) = found.next() else { return default };
        match text.trim().parse() {
            Ok(value) if (low..=high).contains(&value) && found.next().is_none() => value,
            _ => {
                self.wrong.get_or_insert_with(|| format!("setting `{name}` must be given once, {low} to {high}"));
                default
            }
        }
    }

    /// To be called when every setting has been read.
    ///
    /// # Errors
    /// The first setting that is wrong, or one that was never read, with those that exist.
    pub fn finish(self) -> Result<(), String> {
        if let Some(wrong) = self.wrong {
            return Err(wrong);
        }
        match self.given.iter().find(|(key, _)| self.known.iter().all(|(name, ..)| name != key)) {
            None => Ok(()),
            Some((key, _)) => {
                let known: Vec<_> = self.known.iter().map(|(name, low, high)| format!("{name} ({low} to {high})")).collect();
                Err(format!("unknown setting `{key}`; known: {}", known.join(", ")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[(&str, &str)]) -> Result<u64, String> {
        let given: Vec<_> = given.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        let mut settings = Settings::of(&given);
        let value = settings.number("wait-us", 7, 1, 100);
        settings.finish().map(|()| value)
    }

    #[test]
    fn settings_are_checked_by_name_and_bounds() {
        assert_eq!((read(&[]), read(&[("wait-us", " 100 ")])), (Ok(7), Ok(100)));
        for bad in [&[("wait-us", "101")][..], &[("wait-us", "")], &[("wait-us", "1"), ("wait-us", "2")], &[("wait", "1")]] {
            assert!(read(bad).unwrap_err().contains("wait-us"), "{bad:?}");
        }
    }
}
