//! How a migration comes into the history: its entry is written when it begins and again when it has ended.

use super::entry::{Ending, MigrationEntry, NamespaceEntry};
use super::{Store, Ticket};
use crate::config::{BackingKind, Config, Namespace};
use crate::core::clock::unix_seconds;
use crate::summary::{Summary, Verdict};
use dray_migration::Report;
use dray_migration::report::PolicyReport;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the process waits for the store at its end.
const PATIENCE: Duration = Duration::from_secs(3);

/// The entry of the migration that runs. Dropped without an end it stands in the history as not ended.
#[derive(Debug)]
pub struct Keeper {
    store: Option<Store>,
    ticket: Ticket,
    entry: MigrationEntry,
}

impl Keeper {
    /// Notes that a migration of the configuration begins, and what its namespaces are. Never fails: the migration does not
    /// depend on it.
    #[must_use]
    pub fn begin(config: &Config, nsid: u32) -> Self {
        let (from, to) = (config.file.migration.from.get_ref().clone(), config.file.migration.to.get_ref().clone());
        let nguid = nguid(config, &from, nsid);
        Self::start(config, MigrationEntry { from, to, nsid, nguid, ..MigrationEntry::default() })
    }

    /// Notes that a migration or a media move begins now, as [`Keeper::begin`].
    #[must_use]
    pub fn start(config: &Config, entry: MigrationEntry) -> Self {
        let state = config.path(&config.file.core.state);
        let store = Store::start(&state);
        let store = store.inspect_err(|error| tracing::warn!(%error, "the history of migrations is not kept")).ok();
        let now = unix_seconds();
        let keeper = Self { store, ticket: Ticket::default(), entry: MigrationEntry { begun_s: now, ended: None, ..entry } };
        if let Some(store) = &keeper.store {
            inventory(config, now).into_iter().for_each(|namespace| store.see(namespace));
            store.write(&keeper.ticket, keeper.entry.clone());
        }
        keeper
    }

    /// Notes how it ended, and waits a few seconds at most until that is durable.
    pub fn end(mut self, report: &Report, summary: &Summary) {
        self.ended(ending(report, &summary.outcome, Some(summary.verdict == Verdict::Ok)));
    }

    /// Notes how it ended, in words, without a verdict; another thread waits until that is durable, a few seconds at most.
    pub fn end_beside(mut self, report: &Report, outcome: &str) -> Option<JoinHandle<()>> {
        self.ended(ending(report, outcome, None));
        // Without a thread it is waited for here.
        std::thread::Builder::new().name("dray-history".into()).spawn(move || drop(self)).ok()
    }

    fn ended(&mut self, ending: Ending) {
        self.entry.ended = Some(ending);
        if let Some(store) = &self.store {
            store.write(&self.ticket, self.entry.clone());
        }
    }
}

/// The NGUID of a namespace of the configuration, as that writes it.
#[must_use]
pub fn nguid(config: &Config, subsystem: &str, nsid: u32) -> String {
    let namespaces = config.subsystem(subsystem).into_iter().flat_map(|subsystem| &subsystem.namespaces);
    let found = namespaces.into_iter().find(|n| *n.nsid.get_ref() == nsid);
    found.map(|n| n.nguid.get_ref().clone()).unwrap_or_default()
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let Some(store) = self.store.take() else { return };
        let board = std::sync::Arc::clone(&store.board);
        // What it says was said when it failed, except that it is late.
        if let Err(error @ super::StoreError::Late(_)) = store.close(PATIENCE) {
            board.give_up(error);
        }
        let dropped = board.dropped.load(std::sync::atomic::Ordering::Relaxed);
        if dropped > 0 {
            tracing::info!(dropped, "entries of the history and the inventory were not kept");
        }
    }
}

fn ending(report: &Report, outcome: &str, verdict_ok: Option<bool>) -> Ending {
    let named = |(role, policy): &(&'static str, PolicyReport)| {
        let identity = &policy.identity;
        ((*role).to_owned(), identity.component.clone(), identity.sha256.clone())
    };
    Ending {
        at_s: unix_seconds(),
        outcome: outcome.to_owned(),
        verdict_ok,
        rounds: u32::try_from(report.rounds.count()).unwrap_or(u32::MAX),
        bytes: report.copied_bytes,
        duration_us: report.duration_us,
        downtime_us: report.downtime_us,
        policies: report.policies.iter().map(named).collect(),
    }
}

/// The namespaces of the configuration, as they are now.
fn inventory(config: &Config, seen_s: i64) -> Vec<NamespaceEntry> {
    let mut all = Vec::new();
    for subsystem in &config.file.subsystems {
        for namespace in &subsystem.namespaces {
            let nsid = *namespace.nsid.get_ref();
            let reach = subsystem.controllers.iter().filter(|controller| {
                controller.namespaces.iter().any(|attached| *attached.get_ref() == nsid)
            });
            all.push(NamespaceEntry {
                subsystem: subsystem.name.get_ref().clone(),
                nqn: subsystem.nqn.clone(),
                nsid,
                nguid: namespace.nguid.get_ref().clone(),
                bytes: bytes(config, namespace),
                block_bytes: u32::try_from(namespace.block.get_ref().0).unwrap_or(0),
                controllers: reach.map(|controller| *controller.cntlid.get_ref()).collect(),
                seen_s,
            });
        }
    }
    all
}

/// A file's size counts, as when its backing is opened; without a file the configured one does.
fn bytes(config: &Config, namespace: &Namespace) -> u64 {
    if let Some((device, nsid)) = namespace.at_device() {
        return config.devices.known(device, nsid).map_or(0, |found| found.blocks.saturating_mul(u64::from(found.block_bytes)));
    }
    let file = crate::assembly::file_of(config, namespace).filter(|_| namespace.backing == BackingKind::File);
    let size = file.and_then(|path| std::fs::metadata(path).ok()).map(|file| file.len());
    size.or_else(|| namespace.size.as_ref().map(|size| size.get_ref().0)).unwrap_or(0)
}
