//! `dray history`: past migrations, and the namespaces seen last.

use crate::config::Config;
use crate::config::units::{Size, Span};
use crate::store::entry::{MigrationEntry, NamespaceEntry};
use crate::store::{Contents, Store, StoreError};
use miette::{IntoDiagnostic, WrapErr, miette};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How long the store may take over its answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Shows the store below the configuration's state folder.
pub(super) fn run(config: &Path, as_json: bool) -> miette::Result<ExitCode> {
    let config = Config::read(config)?;
    let state = config.path(&config.file.core.state);
    // Looking makes nothing.
    let contents = if state.join("store").exists() {
        let store = Store::start(&state).into_diagnostic()?;
        let contents = store.read(PATIENCE);
        let contents = contents.map_err(|error| match error {
            StoreError::InUse(_) => miette!(help = "a migration runs; `dray status` shows it", "{error}"),
            _ => miette!("{error}"),
        });
        let contents = contents.wrap_err("the history cannot be read")?;
        store.close(PATIENCE).map_err(|error| miette!("{error}"))?;
        contents
    } else {
        Contents::default()
    };
    let text = if as_json { format!("{:#}\n", to_json(&contents)) } else { text(&contents) };
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()) {
        // Whoever reads may have had enough.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).into_diagnostic(),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn to_json(contents: &Contents) -> Value {
    let migrations: Vec<_> = contents.migrations.iter().map(|(number, migration)| numbered(*number, migration)).collect();
    json!({ "migrations": migrations, "namespaces": contents.namespaces, "unreadable": contents.unreadable })
}

fn numbered(number: u64, migration: &MigrationEntry) -> Value {
    let mut value = json!(migration);
    value["number"] = number.into();
    if let Some(ending) = &migration.ended {
        let policies = ending.policies.iter();
        value["ended"]["policies"] =
            policies.map(|(role, component, sha256)| json!({ "role": role, "component": component, "sha256": sha256 })).collect();
    }
    value
}

fn text(contents: &Contents) -> String {
    let mut text = String::new();
    if contents.migrations.is_empty() {
        text.push_str("no migrations yet\n");
    } else {
        text.push_str("   #  BEGUN (UTC)          FROM -> TO                  NSID  ROUNDS      COPIED      TOOK  DOWNTIME  OUTCOME\n");
    }
    for (number, migration) in &contents.migrations {
        line(&mut text, *number, migration);
    }
    if !contents.namespaces.is_empty() {
        text.push_str("\nSUBSYSTEM        NSID  SIZE        NGUID                             LAST SEEN (UTC)      CONTROLLERS\n");
    }
    for namespace in &contents.namespaces {
        seen(&mut text, namespace);
    }
    if contents.unreadable > 0 {
        let _infallible = writeln!(text, "\n{} entries cannot be read", contents.unreadable);
    }
    text
}

fn line(text: &mut String, number: u64, migration: &MigrationEntry) {
    let (way, begun) = (way(migration), date(migration.begun_s));
    let nsids: Vec<_> = [migration.nsid].iter().chain(&migration.further).map(u32::to_string).collect();
    let nsid = nsids.join(",");
    let _infallible = match &migration.ended {
        Some(ending) => {
            let downtime = ending.downtime_us.map_or_else(|| "-".into(), micros);
            let verdict = if ending.verdict_ok == Some(false) { " (verdict FAILED)" } else { "" };
            let (copied, took) = (Size(ending.bytes).to_string(), micros(ending.duration_us));
            let (rounds, outcome) = (ending.rounds, &ending.outcome);
            writeln!(text, "{number:>4}  {begun}  {way:<26}  {nsid:>4}  {rounds:>6}  {copied:>10}  {took:>8}  {downtime:>8}  {outcome}{verdict}")
        }
        None => {
            let none = "-";
            writeln!(text, "{number:>4}  {begun}  {way:<26}  {nsid:>4}  {none:>6}  {none:>10}  {none:>8}  {none:>8}  not ended: the process was stopped")
        }
    };
}

/// From where to where, in few words.
fn way(migration: &MigrationEntry) -> String {
    let MigrationEntry { subsystem: Some(subsystem), .. } = migration else {
        return format!("{} -> {}", migration.from, migration.to);
    };
    // A path as a whole would take the line.
    let short = |name: &str| match Path::new(name).file_name() {
        Some(file) => file.to_string_lossy().into_owned(),
        None => "memory".into(),
    };
    format!("{subsystem}: {} -> {}", short(&migration.from), short(&migration.to))
}

fn seen(text: &mut String, namespace: &NamespaceEntry) {
    let NamespaceEntry { subsystem, nsid, nguid, bytes, controllers, seen_s, .. } = namespace;
    let controllers: Vec<_> = controllers.iter().map(u16::to_string).collect();
    let (size, date, controllers) = (Size(*bytes).to_string(), date(*seen_s), controllers.join(" "));
    let _infallible = writeln!(text, "{subsystem:<15}  {nsid:>4}  {size:<10}  {nguid}  {date}  {controllers}");
}

fn micros(us: u64) -> String {
    Span(Duration::from_micros(us)).to_string()
}

/// A moment as "2026-11-20 21:04:05", UTC.
fn date(unix_s: i64) -> String {
    let (day, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    // The proleptic Gregorian calendar in eras of 400 years that begin on the first of March, so that a leap day is the last.
    let shifted = day.saturating_add(719_468);
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::entry::{Ending, MoveKind};

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix_s, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (1_735_689_599, "2024-12-31 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (-1, "1969-12-31 23:59:59"),
        ] {
            assert_eq!(date(unix_s), text);
        }
        // Whatever the store says, it is shown.
        date(i64::MAX);
        date(i64::MIN);
    }

    #[test]
    fn what_has_ended_and_what_has_not_are_both_shown() {
        assert_eq!(text(&Contents::default()), "no migrations yet\n");
        let begun = MigrationEntry { from: "a".into(), to: "b".into(), nsid: 1, further: vec![7], ..MigrationEntry::default() };
        let policies = vec![("cdq".into(), "cdq.wasm".into(), "00".into())];
        let ending = Ending { outcome: "done".into(), verdict_ok: Some(true), downtime_us: Some(1500), policies, ..Ending::default() };
        let ended = MigrationEntry { ended: Some(ending), ..begun.clone() };
        let namespaces = vec![NamespaceEntry { subsystem: "a".into(), nsid: 1, controllers: vec![1, 2], ..NamespaceEntry::default() }];
        let (subsystem, from, to) = (Some("a".into()), String::new(), "/some/where/copy.img".into());
        let media = MigrationEntry { kind: MoveKind::MediaMove, subsystem, from, to, nsid: 2, ..MigrationEntry::default() };
        let contents = Contents { migrations: vec![(1, begun), (2, ended), (3, media)], namespaces, unreadable: 1 };
        let shown = text(&contents);
        assert!(shown.contains("a -> b") && shown.contains(" 1,7 ") && shown.contains("a: memory -> copy.img"), "{shown}");
        assert!(shown.contains("not ended") && shown.contains("done") && shown.contains(&micros(1500)) && shown.contains("1 entries"));
        let json = to_json(&contents);
        assert_eq!((&json["migrations"][0]["ended"], &json["migrations"][1]["number"]), (&Value::Null, &2.into()));
        assert_eq!(json["migrations"][1]["ended"]["policies"][0]["component"], "cdq.wasm");
        let kinds = [1, 2].map(|at| json["migrations"][at]["kind"].clone());
        assert_eq!(kinds, ["migration", "media-move"].map(Value::from));
        assert_eq!(json["namespaces"][0]["controllers"][1], 2);
    }
}
