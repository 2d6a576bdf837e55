//! A line of the console: its tag, its time limit, its words.

use crate::config::units::Span;
use std::time::Duration;

/// Most bytes of a line.
pub const LINE_BYTES: usize = 4096;
/// Most characters of a tag.
const TAG_CHARS: usize = 64;

/// What a line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What its last line of output is to carry.
    pub tag: Option<String>,
    /// After how long the command is stopped.
    pub limit: Option<Duration>,
    /// The command and its arguments; at least one.
    pub words: Vec<String>,
}

/// A line that asks for nothing that can be done: the tag, if it has one, and what is wrong.
pub type Refusal = (Option<String>, String);

/// Reads a line; `None` if there is nothing in it.
///
/// # Errors
/// [`Refusal`].
pub fn parse(line: &str) -> Result<Option<Line>, Refusal> {
    let line = line.trim();
    let (tag, rest) = match line.strip_prefix('#') {
        Some(tagged) => {
            let (tag, rest) = tagged.split_once(char::is_whitespace).unwrap_or((tagged, ""));
            if tag.is_empty() || tag.len() > TAG_CHARS || !tag.bytes().all(|b| b.is_ascii_graphic()) {
                return Err((None, format!("a tag is 1 to {TAG_CHARS} printable ASCII characters")));
            }
            (Some(tag.to_owned()), rest.trim_start())
        }
        None => (None, line),
    };
    let Some(mut words) = shlex::split(rest) else {
        return Err((tag, "a quotation has no end".into()));
    };
    let mut limit = None;
    if words.first().is_some_and(|word| word == "within") {
        let time = words.get(1).map_or("", String::as_str);
        match time.parse::<Span>() {
            Ok(span) => limit = Some(span.0),
            Err(error) => return Err((tag, error)),
        }
        words.drain(..2);
    }
    if words.is_empty() {
        return if tag.is_some() || limit.is_some() { Err((tag, "no command".into())) } else { Ok(None) };
    }
    if words.iter().any(|word| word.contains('\0')) {
        return Err((tag, "an argument has a zero byte".into()));
    }
    Ok(Some(Line { tag, limit, words }))
}

/// Bytes of a terminal as they come, made into lines.
#[derive(Debug, Default)]
pub struct Editor {
    bytes: Vec<u8>,
    too_long: bool,
    after_return: bool,
}

/// What an editor has made of a byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edited {
    /// A line is whole.
    Line(String),
    /// A line was longer than [`LINE_BYTES`].
    TooLong,
    /// Ctrl-C.
    Interrupt,
}

impl Editor {
    /// Takes a byte: carriage return and line feed end a line, backspace takes a byte back, Ctrl-U all of them.
    pub fn byte(&mut self, byte: u8) -> Option<Edited> {
        let after_return = std::mem::replace(&mut self.after_return, byte == b'\r');
        match byte {
            b'\n' if after_return => None,
            b'\r' | b'\n' => Some(self.end()),
            0x03 => {
                self.clear();
                Some(Edited::Interrupt)
            }
            0x08 | 0x7f => {
                self.bytes.pop();
                None
            }
            0x15 => {
                self.clear();
                None
            }
            byte => {
                if self.bytes.len() < LINE_BYTES {
                    self.bytes.push(byte);
                } else {
                    self.too_long = true;
                }
                None
            }
        }
    }

    fn end(&mut self) -> Edited {
        if self.too_long {
            self.clear();
            return Edited::TooLong;
        }
        let line = String::from_utf8_lossy(&self.bytes).into_owned();
        self.clear();
        Edited::Line(line)
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.too_long = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Line {
        parse(line).expect("good").expect("something")
    }

    #[test]
    fn lines_have_tags_limits_and_quoted_words() {
        assert_eq!(parse("  "), Ok(None));
        let line = words("#t1 within 1.5s device identify 'a b' \"c\\\"d\" e\\ f");
        assert_eq!((line.tag.as_deref(), line.limit), (Some("t1"), Some(Duration::from_millis(1500))));
        assert_eq!(line.words, ["device", "identify", "a b", "c\"d", "e f"]);
        assert_eq!(words("status").tag, None);
    }

    #[test]
    fn what_cannot_be_done_says_why_under_its_tag() {
        for (line, tag, why) in [
            ("# status", None, "tag"),
            ("#t", Some("t"), "no command"),
            ("#t within", Some("t"), "unit"),
            ("#t within 5 status", Some("t"), "unit"),
            ("within 5s", None, "no command"),
            ("#t 'open", Some("t"), "quotation"),
        ] {
            let (got, words) = parse(line).expect_err(line);
            assert_eq!(got.as_deref(), tag, "{line}");
            assert!(words.contains(why), "{line}: {words}");
        }
    }

    #[test]
    fn terminals_end_lines_in_three_ways_and_correct_themselves() {
        let mut editor = Editor::default();
        let edited: Vec<_> = b"ab\r\ncd\nxx\x15e\x7ff\r\n\nno\x03".iter().filter_map(|byte| editor.byte(*byte)).collect();
        let line = |text: &str| Edited::Line(text.into());
        assert_eq!(edited, [line("ab"), line("cd"), line("f"), line(""), Edited::Interrupt]);
    }

    #[test]
    fn a_line_that_is_too_long_is_not_cut_into_another_command() {
        let mut editor = Editor::default();
        let mut bytes = vec![b'x'; LINE_BYTES + 1];
        bytes.extend_from_slice(b"\nok\n");
        let edited: Vec<_> = bytes.iter().filter_map(|byte| editor.byte(*byte)).collect();
        assert_eq!(edited, [Edited::TooLong, Edited::Line("ok".into())]);
    }

    proptest! {
        #[test]
        fn no_line_is_too_odd(line in "\\PC{0,60}|#?[a-z ]{0,9}(within )?['\"\\\\a-z ]{0,20}") {
            if let Ok(Some(line)) = parse(&line) {
                prop_assert!(!line.words.is_empty());
            }
        }
    }
}
