//! Structures of the specification, for two readers: aligned text (abbreviation, value, meaning) and JSON (raw numbers by
//! snake_case name, and what they mean under `decoded`).

use serde_json::{Map, Value};
use std::fmt::Write;

/// Columns of a field's abbreviation.
const LABEL: usize = 14;
/// Columns of a field's value; longer ones push the meaning to the right.
const SHOWN: usize = 17;
/// Columns of text before the list of what is not supported is wrapped.
const WRAP: usize = 110;

/// A structure: fields, and structures within it.
#[derive(Clone, Debug, Default)]
pub(super) struct Page {
    key: String,
    title: String,
    section: &'static str,
    refused: Option<String>,
    is_list: bool,
    fields: Vec<Field>,
    pages: Vec<Page>,
}

/// A field of a structure.
#[derive(Clone, Debug)]
pub(super) struct Field {
    label: String,
    raw: Value,
    shown: String,
    what: &'static str,
    says: Option<String>,
    parts: Vec<Part>,
}

/// A part of a field: a flag, or a number of a few bits.
#[derive(Clone, Debug)]
struct Part {
    name: &'static str,
    raw: Value,
    meaning: String,
}

/// The JSON name of an abbreviation: lower case, words joined by underscores.
fn key_of(label: &str) -> String {
    label.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect()
}

/// "1 block", "2 blocks", "2 entries".
pub(super) fn count(n: u64, one: &str) -> String {
    match one.strip_suffix('y') {
        _ if n == 1 => format!("1 {one}"),
        Some(stem) => format!("{n} {stem}ies"),
        None => format!("{n} {one}s"),
    }
}

/// Bytes as hexadecimal digits, in the order of the wire.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

/// A 128-bit number: JSON numbers of most readers end at 64 bits, so a larger one is a string.
pub(super) fn wide(value: u128) -> Value {
    u64::try_from(value).map_or_else(|_| Value::from(value.to_string()), Value::from)
}

impl Page {
    /// An empty structure; `key` is its name in JSON, `section` where the specification has it.
    pub(super) fn new(key: &str, title: impl Into<String>, section: &'static str) -> Self {
        Self { key: key.into(), title: title.into(), section, ..Self::default() }
    }

    /// Structures of one kind; an array in JSON.
    pub(super) fn list(key: &str, title: impl Into<String>, section: &'static str) -> Self {
        Self { is_list: true, ..Self::new(key, title, section) }
    }

    /// A structure that the controller does not give, with its answer.
    pub(super) fn refused(key: &str, title: impl Into<String>, section: &'static str, why: impl Into<String>) -> Self {
        Self { refused: Some(why.into()), ..Self::new(key, title, section) }
    }

    /// A structure within this one.
    pub(super) fn add(&mut self, page: Self) {
        self.pages.push(page);
    }

    fn push(&mut self, label: &str, raw: Value, shown: String, what: &'static str) -> &mut Field {
        let at = self.fields.len();
        self.fields.push(Field { label: label.into(), raw, shown, what, says: None, parts: Vec::new() });
        &mut self.fields[at]
    }

    /// A number, shown in decimal.
    pub(super) fn num(&mut self, label: &str, value: impl Into<u64>, what: &'static str) -> &mut Field {
        let value = value.into();
        self.push(label, value.into(), value.to_string(), what)
    }

    /// A 128-bit number, shown in decimal.
    pub(super) fn num128(&mut self, label: &str, value: u128, what: &'static str) -> &mut Field {
        self.push(label, wide(value), value.to_string(), what)
    }

    /// A number, shown in that many hexadecimal digits.
    pub(super) fn hex(&mut self, label: &str, value: impl Into<u64>, digits: usize, what: &'static str) -> &mut Field {
        let value = value.into();
        self.push(label, value.into(), format!("{value:0digits$X}h"), what)
    }

    /// Text of the controller; `None` where it is not the ASCII that it should be.
    pub(super) fn text(&mut self, label: &str, value: Option<&str>, what: &'static str) -> &mut Field {
        let shown = value.map_or_else(|| "(not ASCII)".into(), |text| format!("\"{}\"", text.escape_debug()));
        self.push(label, value.into(), shown, what)
    }

    /// Bytes, shown as hexadecimal digits.
    pub(super) fn bytes(&mut self, label: &str, value: &[u8], what: &'static str) -> &mut Field {
        let digits = hex(value);
        self.push(label, digits.clone().into(), digits, what)
    }

    /// Numbers in a row.
    pub(super) fn numbers(&mut self, label: &str, values: impl IntoIterator<Item = u64>, what: &'static str) -> &mut Field {
        let values: Vec<u64> = values.into_iter().collect();
        let shown: Vec<_> = values.iter().map(ToString::to_string).collect();
        let shown = if shown.is_empty() { "none".into() } else { shown.join(" ") };
        self.push(label, values.into(), shown, what)
    }

    /// Bytes that this program knows no fields of: shown only if the controller has something there.
    pub(super) fn unknown(&mut self, label: &str, bytes: &[u8], what: &'static str) {
        if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
            self.bytes(label, &bytes[..=last], what);
        }
    }

    /// The structure as JSON.
    pub(super) fn to_json(&self) -> Value {
        if let Some(why) = &self.refused {
            return serde_json::json!({ "refused": why });
        }
        if self.is_list {
            return self.pages.iter().map(Self::to_json).collect();
        }
        let (mut object, mut decoded) = (Map::new(), Map::new());
        for field in &self.fields {
            let key = key_of(&field.label);
            if !field.parts.is_empty() {
                let parts = field.parts.iter().map(|part| (key_of(part.name), part.raw.clone()));
                decoded.insert(key.clone(), Value::Object(parts.collect()));
            } else if let Some(says) = &field.says {
                decoded.insert(key.clone(), says.clone().into());
            }
            object.insert(key, field.raw.clone());
        }
        if !decoded.is_empty() {
            object.insert("decoded".into(), decoded.into());
        }
        for page in &self.pages {
            object.insert(page.key.clone(), page.to_json());
        }
        object.into()
    }

    /// The structure as text, appended to `out`.
    pub(super) fn write(&self, out: &mut String) {
        // Writing to a string cannot fail.
        let _infallible = self.try_write(out);
    }

    fn try_write(&self, out: &mut String) -> std::fmt::Result {
        let section = if self.section.is_empty() { String::new() } else { format!("   [{}]", self.section) };
        if let Some(why) = &self.refused {
            return writeln!(out, "\n{}{section}\n  not given: {why}", self.title);
        }
        let bare = self.fields.is_empty();
        if !bare || self.pages.is_empty() {
            writeln!(out, "\n{}{section}", self.title)?;
            if bare {
                writeln!(out, "  none")?;
            }
        }
        for field in &self.fields {
            field.try_write(out)?;
        }
        self.pages.iter().try_for_each(|page| page.try_write(out))
    }
}

impl Field {
    /// What the value says, in words.
    pub(super) fn says(&mut self, text: impl Into<String>) -> &mut Self {
        self.says = Some(text.into());
        self
    }

    /// A bit of the value.
    pub(super) fn flag(&mut self, name: &'static str, set: bool, meaning: &'static str) -> &mut Self {
        self.parts.push(Part { name, raw: set.into(), meaning: meaning.into() });
        self
    }

    /// Bits of the value that are a number.
    pub(super) fn part(&mut self, name: &'static str, value: impl Into<u64>, meaning: impl Into<String>) -> &mut Self {
        self.parts.push(Part { name, raw: value.into().into(), meaning: meaning.into() });
        self
    }

    fn try_write(&self, out: &mut String) -> std::fmt::Result {
        let says = self.says.as_deref().unwrap_or("");
        let colon = if says.is_empty() || self.what.is_empty() { "" } else { ": " };
        let line = format!("  {:<LABEL$}{:<SHOWN$}  {}{colon}{says}", self.label, self.shown, self.what);
        writeln!(out, "{}", line.trim_end())?;
        let mut not = Vec::new();
        for part in &self.parts {
            match &part.raw {
                Value::Bool(false) => not.push(part.name),
                Value::Bool(true) => writeln!(out, "{:1$}+ {2:<9} {3}", "", LABEL, part.name, part.meaning)?,
                raw => writeln!(out, "{:1$}  {2:<10}{3:<6}  {4}", "", LABEL, part.name, raw.to_string(), part.meaning)?,
            }
        }
        let mut line = String::new();
        for name in not {
            if line.len() + name.len() > WRAP - LABEL {
                writeln!(out, "{:1$}- {line}", "", LABEL)?;
                line.clear();
            }
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(name);
        }
        if line.is_empty() { Ok(()) } else { writeln!(out, "{:1$}- {line}", "", LABEL) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        let mut page = Page::new("identify_controller", "Identify Controller (CNS 01h)", "Base 2.3 §5.2.13.2.1");
        page.num("MDTS", 7u8, "Maximum Data Transfer Size").says("512 KiB");
        page.hex("OACS", 0x800u16, 4, "Optional Admin Command Support")
            .flag("SSRS", false, "Security Send and Receive")
            .flag("HMLMS", true, "host managed live migration")
            .part("N", 3u8, "a number");
        page.text("SN", None, "Serial Number");
        page.unknown("RSVD", &[0, 0], "nothing");
        page.unknown("RSVD111", &[0, 7, 0], "newer fields");
        page
    }

    #[test]
    fn json_has_raw_numbers_and_what_they_mean_beside_them() {
        let mut whole = page();
        let mut list = Page::list("namespaces", "Namespaces", "");
        list.add(page());
        whole.add(list);
        whole.add(Page::refused("cns_20", "Formats", "", "Invalid Field"));
        let json = whole.to_json();
        assert_eq!(json["mdts"], 7);
        assert_eq!(json["decoded"]["mdts"], "512 KiB");
        assert_eq!(json["decoded"]["oacs"], serde_json::json!({ "ssrs": false, "hmlms": true, "n": 3 }));
        assert_eq!((&json["sn"], &json["rsvd111"]), (&Value::Null, &"0007".into()));
        assert!(json.get("rsvd").is_none());
        assert_eq!(json["namespaces"][0]["oacs"], 0x800);
        assert_eq!(json["cns_20"]["refused"], "Invalid Field");
        assert_eq!([count(1, "entry"), count(2, "entry"), count(0, "slot")], ["1 entry", "2 entries", "0 slots"]);
        assert_eq!(wide(u128::MAX), Value::from(u128::MAX.to_string()));
    }

    #[test]
    fn text_has_set_bits_in_words_and_the_others_by_name() {
        let mut text = String::new();
        page().write(&mut text);
        for line in [
            "Identify Controller (CNS 01h)   [Base 2.3 §5.2.13.2.1]",
            "  MDTS          7                  Maximum Data Transfer Size: 512 KiB",
            "              + HMLMS     host managed live migration",
            "                N         3       a number",
            "              - SSRS",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
        }
    }
}
