//! Settings of a policy: whole numbers by name, the unit at the end of the name.

use crate::seam::{Fault, Setup};

/// Reads a policy's settings; what is unknown, doubled or out of bounds is a refusal that lists what would be right.
#[derive(Debug)]
pub struct Settings<'a> {
    given: &'a [(String, String)],
    known: Vec<String>,
    wrong: Option<String>,
}

impl<'a> Settings<'a> {
    /// The settings of a set-up.
    #[must_use]
    pub fn of(setup: &'a Setup) -> Self {
        Self { given: &setup.settings, known: Vec::new(), wrong: None }
    }

    /// A number within bounds, or its default.
    pub fn number(&mut self, name: &str, default: u64, low: u64, high: u64) -> u64 {
        self.known.push(format!("{name} ({low} to {high}, default {default})"));
        let mut found = self.given.iter().filter(|(key, _)| key == name);
        let value = match found.next() {
            None => return default,
            Some((_, text)) => text.trim().parse::<u64>().ok().filter(|value| (low..=high).contains(value)),
        };
        if value.is_none() || found.next().is_some() {
            self.wrong.get_or_insert_with(|| format!("setting `{name}` must be given once, {low} to {high}"));
        }
        value.unwrap_or(default)
    }

    /// To be called when every setting has been asked for.
    ///
    /// # Errors
    /// [`Fault::Refused`] naming the first setting that is wrong, or one that nobody asked for and those that exist.
    pub fn finish(self) -> Result<(), Fault> {
        if let Some(wrong) = self.wrong {
            return Err(Fault::Refused(wrong));
        }
        let is_known = |key: &str| self.known.iter().any(|known| known.split(' ').next() == Some(key));
        match self.given.iter().find(|(key, _)| !is_known(key)) {
            Some((key, _)) => Err(Fault::Refused(format!("unknown setting `{key}`; known: {}", self.known.join(", ")))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[(&str, &str)]) -> Result<u64, Fault> {
        let given: Vec<_> = given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut settings = Settings { given: &given, known: Vec::new(), wrong: None };
        let value = settings.number("wait-us", 7, 1, 100);
        settings.number("batch-mib", 7, 1, 100);
        settings.finish().map(|()| value)
    }

    #[test]
    fn settings_are_checked_by_name_and_bounds() {
        assert_eq!(read(&[]), Ok(7));
        assert_eq!(read(&[("wait-us", " 100 ")]), Ok(100));
        for bad in [&[("wait-us", "101")][..], &[("wait-us", "0")], &[("wait-us", "x")], &[("wait-us", "1"), ("wait-us", "2")]] {
            assert!(matches!(read(bad), Err(Fault::Refused(text)) if text.contains("wait-us") && text.contains("1 to 100")));
        }
        let unknown = read(&[("wait", "1")]).unwrap_err().to_string();
        assert!(unknown.contains("`wait`") && unknown.contains("wait-us") && unknown.contains("batch-mib"), "{unknown}");
    }
}
