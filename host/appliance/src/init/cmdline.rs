//! The kernel's command line: what it says to PID 1.
//!
//! | word | what it says |
//! |---|---|
//! | `dray.slot=a` or `b` | the system slot that was booted; without it the kernel was booted directly |
//! | `dray.version=N` | the version of that slot |
//! | `dray.config=PATH` | the configuration, in place of the one on the partition `DRAY-CONFIG` |
//! | `dray.state=memory` | durable records are kept in memory and lost at power-off: for tries |
//! | `dray.debug` | say more |
//!
//! Whatever else stands there is the kernel's. A word of ours that makes no sense is said on the console and passed over: a
//! machine that nobody is logged into must come up.

use std::path::PathBuf;

/// One of the two system slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// `dray.slot=a`.
    A,
    /// `dray.slot=b`.
    B,
}

impl Slot {
    /// The letter that it is called by.
    #[must_use]
    pub fn letter(self) -> char {
        match self {
            Self::A => 'a',
            Self::B => 'b',
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// The slot of a letter.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "a" => Some(Self::A),
            "b" => Some(Self::B),
            _ => None,
        }
    }
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.letter())
    }
}

/// What the command line says to PID 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// The slot that was booted.
    pub slot: Option<Slot>,
    /// Its version.
    pub version: Option<u64>,
    /// The configuration.
    pub config: Option<PathBuf>,
    /// Durable records are kept in memory.
    pub state_in_memory: bool,
    /// Say more.
    pub debug: bool,
    /// Words of ours that make no sense.
    pub odd: Vec<String>,
}

impl CommandLine {
    /// Reads `/proc/cmdline`'s text. Words are parted by white space; double quotes hold a word together, as the kernel has it.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut line = Self::default();
        for word in words(text) {
            let Some(ours) = word.strip_prefix("dray.") else { continue };
            if !line.take(ours) {
                line.odd.push(word);
            }
        }
        line
    }

    fn take(&mut self, word: &str) -> bool {
        match word.split_once('=') {
            Some(("slot", letter)) => {
                self.slot = Slot::parse(letter).or(self.slot);
                Slot::parse(letter).is_some()
            }
            Some(("version", number)) => {
                self.version = number.parse().ok().or(self.version);
                number.parse::<u64>().is_ok()
            }
            Some(("config", path)) if path.starts_with('/') => {
                self.config = Some(path.into());
                true
            }
            Some(("state", "memory")) => {
                self.state_in_memory = true;
                true
            }
            None if word == "debug" => {
                self.debug = true;
                true
            }
            _ => false,
        }
    }
}

fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn our_words_are_read_and_the_kernels_are_not() {
        let line = CommandLine::parse("console=ttyS0 dray.slot=b quiet dray.version=12 dray.config=\"/a b.toml\" dray.debug\n");
        let expected = CommandLine {
            slot: Some(Slot::B),
            version: Some(12),
            config: Some("/a b.toml".into()),
            debug: true,
            ..CommandLine::default()
        };
        assert_eq!(line, expected);
        assert!(CommandLine::parse("dray.state=memory").state_in_memory);
    }

    #[test]
    fn what_makes_no_sense_is_kept_to_be_said() {
        let text = "dray.slot=c dray.version=-1 dray.config=x dray.state=disk dray.debug=1 dray.nothing dray.slot=a";
        let line = CommandLine::parse(text);
        assert_eq!(line.slot, Some(Slot::A));
        assert_eq!(line.odd.len(), 6, "{:?}", line.odd);
    }

    proptest! {
        #[test]
        fn no_line_is_too_odd(text in "(dray\\.[a-z]{0,8}=?|\"| |[ab0-9/]){0,40}") {
            let line = CommandLine::parse(&text);
            prop_assert!(line.odd.iter().all(|word| word.starts_with("dray.")));
        }
    }
}
