//! The table and the JSON file.

use crate::Failure;
use crate::targets::{self, Bound};
use serde_json::{Value, json};
use std::path::Path;

struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    note: String,
}

/// The figures of one run.
pub struct Report {
    rows: Vec<Row>,
    quick: bool,
}

impl Report {
    pub fn new(quick: bool) -> Self {
        Self { rows: Vec::new(), quick }
    }

    /// Adds a figure.
    pub fn add(&mut self, name: &str, value: f64, unit: &'static str, note: impl Into<String>) {
        eprintln!("  {name} {} {unit}", number(value));
        self.rows.push(Row { name: name.to_owned(), value, unit, note: note.into() });
    }

    /// A figure that is there already.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.rows.iter().find(|row| row.name == name).map(|row| row.value)
    }

    /// Appends to the note of a row that is there.
    pub fn remark(&mut self, name: &str, note: &str) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.name == name) {
            let gap = if row.note.is_empty() { "" } else { "; " };
            row.note = format!("{}{gap}{note}", row.note);
        }
    }

    /// The least or most that a row may be, as text, and whether it is.
    fn judge(&self, row: &Row) -> (String, &'static str) {
        let Some(target) = targets::of(&row.name) else { return (String::new(), "") };
        let (text, met) = match target.bound {
            Bound::Least(bound) => (format!("≥ {}", number(bound)), Some(row.value >= bound)),
            Bound::Most(bound) => (format!("≤ {}", number(bound)), Some(row.value <= bound)),
            Bound::LeastOf(share, of) => {
                let bound = self.value(of).map(|value| value * share);
                let text = bound.map_or_else(|| format!("≥ {share} × {of}"), |bound| format!("≥ {}", number(bound)));
                (text, bound.map(|bound| row.value >= bound))
            }
        };
        (text, met.map_or("", |met| if met { "met" } else { "missed" }))
    }

    /// Prints the table.
    pub fn print(&self) {
        let goal = |row: &Row| targets::of(&row.name).and_then(|target| target.goal).map_or(String::new(), number);
        let mut lines = vec![["name", "value", "unit", "bound", "goal", "", "note"].map(str::to_owned)];
        for row in &self.rows {
            let (bound, verdict) = self.judge(row);
            let unit = row.unit.to_owned();
            lines.push([row.name.clone(), number(row.value), unit, bound, goal(row), verdict.to_owned(), row.note.clone()]);
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 7] = std::array::from_fn(width);
        println!();
        for line in &lines {
            let pad = |column: usize| widths[column];
            let text = format!(
                "{:<w0$}  {:>w1$}  {:<w2$}  {:>w3$}  {:>w4$}  {:<w5$}  {}",
                line[0], line[1], line[2], line[3], line[4], line[5], line[6],
                w0 = pad(0), w1 = pad(1), w2 = pad(2), w3 = pad(3), w4 = pad(4), w5 = pad(5)
            );
            println!("{}", text.trim_end());
        }
        println!();
    }

    /// Writes `{"results":[{"name","value","unit","note"}]}`.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn write(&self, path: &Path) -> Result<(), Failure> {
        let note = |row: &Row| match (self.quick, row.note.is_empty()) {
            (false, _) => row.note.clone(),
            (true, true) => "quick run".to_owned(),
            (true, false) => format!("quick run; {}", row.note),
        };
        let result = |row: &Row| json!({ "name": row.name, "value": row.value, "unit": row.unit, "note": note(row) });
        let results: Vec<Value> = self.rows.iter().map(result).collect();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        let text = format!("{:#}\n", json!({ "results": results }));
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
    }
}

/// A number with as many digits as it is good for, thousands apart.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 1_000.0 || v == v.trunc() => 0,
        v if v >= 100.0 => 1,
        v if v >= 0.1 => 2,
        _ => 6,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut out = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) && !out.ends_with('-') {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}
