use super::entry::{Ending, MigrationEntry, NamespaceEntry, decode, encode};
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// A state folder that goes away with the test.
struct State(PathBuf);

impl State {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dray-store-{name}-{}", std::process::id()));
        let _none = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn start(&self) -> Store {
        Store::start(&self.0).expect("a thread")
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn migration(n: u64) -> MigrationEntry {
    let ending = Ending { at_s: n as i64 + 9, outcome: "done".into(), bytes: n << 20, downtime_us: Some(n), ..Ending::default() };
    MigrationEntry { from: format!("source-{n}"), to: "destination".into(), begun_s: n as i64, ended: Some(ending), ..Default::default() }
}

/// A closed store with `count` migrations.
fn filled(state: &State, count: u64) {
    let store = state.start();
    for n in 1..=count {
        store.write(&Ticket::default(), migration(n));
        store.flush(PATIENCE).expect("flushed");
    }
    store.close(PATIENCE).expect("closed");
}

#[test]
fn what_was_written_is_there_again_in_order() {
    let state = State::new("again");
    let store = state.start();
    let ticket = Ticket::default();
    store.write(&ticket, MigrationEntry { ended: None, ..migration(1) });
    store.write(&Ticket::default(), migration(2));
    store.write(&ticket, migration(1));
    for size in [1, 2] {
        store.see(NamespaceEntry { subsystem: "source".into(), nsid: 1, bytes: size, ..NamespaceEntry::default() });
    }
    store.flush(PATIENCE).expect("flushed");
    assert_eq!(ticket.number(), Some(1));
    store.close(PATIENCE).expect("closed");
    let store = state.start();
    store.write(&Ticket::default(), migration(3));
    let contents = store.read(PATIENCE).expect("contents");
    assert_eq!(contents.migrations, [1, 2, 3].map(|n| (n, migration(n))));
    assert_eq!(contents.namespaces.iter().map(|namespace| namespace.bytes).collect::<Vec<_>>(), [2], "seen last");
    assert_eq!((contents.unreadable, store.dropped(), store.set_aside()), (0, 0, None));
}

#[test]
fn a_changed_entry_is_noticed() {
    let value = encode(&migration(7)).expect("short");
    assert_eq!(decode::<MigrationEntry>(&value), Some(migration(7)));
    for at in 0..value.len() {
        let mut changed = value.clone();
        changed[at] ^= 4;
        assert_eq!(decode::<MigrationEntry>(&changed), None, "byte {at}");
        assert_eq!(decode::<MigrationEntry>(&value[..at]), None, "cut at {at}");
    }
    let long = MigrationEntry { from: "x".repeat(entry::MOST_BYTES), ..MigrationEntry::default() };
    assert_eq!(encode(&long), None);
}

#[test]
fn a_damaged_store_is_set_aside_and_a_new_one_begun() {
    let state = State::new("damaged");
    for (n, file) in ["conf", "db"].into_iter().enumerate() {
        filled(&state, 3);
        std::fs::write(state.0.join("store").join(file), [0x5a; 70_000]).expect("damage");
        let store = state.start();
        let contents = store.read(PATIENCE).unwrap_or_else(|error| panic!("{file}: {error}"));
        let aside = state.0.join(format!("store.damaged-{}", n + 1));
        assert_eq!((contents, store.set_aside()), (Contents::default(), Some(aside.as_path())), "{file}");
        assert!(aside.join("db").is_file());
        store.write(&Ticket::default(), migration(1));
        store.close(PATIENCE).expect("closed");
        std::fs::remove_dir_all(state.0.join("store")).expect("a store");
    }
    // A file where the folder should be.
    std::fs::write(state.0.join("store"), "no folder").expect("a file");
    let store = state.start();
    assert_eq!(store.read(PATIENCE), Ok(Contents::default()));
    assert!(store.set_aside().is_some_and(|path| path.ends_with("store.damaged-3")));
}

#[test]
fn damage_anywhere_never_shows_as_an_entry_that_nobody_wrote() {
    let state = State::new("anywhere");
    filled(&state, 20);
    let whole = std::fs::read(state.0.join("store/db")).expect("db");
    let used = whole.iter().rposition(|byte| *byte != 0).expect("something");
    for step in 0..24 {
        let mut bytes = whole.clone();
        let at = used * step / 24;
        bytes[at..(at + 5).min(used)].iter_mut().for_each(|byte| *byte ^= 0x33);
        let _none = std::fs::remove_dir_all(state.0.join("store.damaged-1"));
        for entry in std::fs::read_dir(state.0.join("store")).expect("store").flatten() {
            // The snapshot is rebuilt from the log.
            if entry.file_name().to_string_lossy().starts_with("snap") {
                std::fs::remove_file(entry.path()).expect("a snapshot");
            }
        }
        std::fs::write(state.0.join("store/db"), &bytes).expect("damage");
        let store = state.start();
        let contents = store.read(PATIENCE).unwrap_or_else(|error| panic!("at {at}: {error}"));
        assert!(contents.migrations.iter().all(|(n, entry)| *entry == migration(*n)), "at {at}: {contents:?}");
        store.close(PATIENCE).expect("closed");
    }
}

#[test]
fn a_later_version_and_another_user_of_it_are_left_alone() {
    let state = State::new("later");
    filled(&state, 1);
    let first = state.start();
    first.flush(PATIENCE).expect("open");
    let second = state.start();
    assert!(matches!(second.flush(PATIENCE), Err(StoreError::InUse(_))));
    second.write(&Ticket::default(), migration(2));
    assert_eq!(second.dropped(), 1);
    first.close(PATIENCE).expect("closed");
    let database = sled::open(state.0.join("store")).expect("sled");
    database.insert("format", &2u64.to_le_bytes()).expect("insert");
    database.flush().expect("flush");
    drop(database);
    let store = state.start();
    assert!(matches!(store.read(PATIENCE), Err(StoreError::Format { found: 2, .. })));
    assert!(state.0.join("store/db").is_file() && !state.0.join("store.damaged-1").exists());
}

#[test]
fn writers_never_wait_and_what_is_lost_is_counted() {
    let (queue, requests) = sync_channel(2);
    let store = Store { queue, board: Arc::new(Board::default()) };
    for n in 0..5 {
        store.write(&Ticket::default(), migration(n));
    }
    assert_eq!(store.dropped(), 3);
    let short = Duration::from_millis(5);
    assert_eq!(store.flush(short), Err(StoreError::Late(short)), "no room");
    give_up(&requests, &store.board, StoreError::Failed("planted".into()));
    assert_eq!(store.dropped(), 5, "those in the queue as well");
    assert_eq!(store.flush(short), Err(StoreError::Late(short)), "nobody answers");
    drop(requests);
    assert_eq!(store.flush(PATIENCE), Err(StoreError::Failed("planted".into())));
}

#[test]
fn a_panic_ends_the_store_and_nothing_else() {
    let (queue, requests) = sync_channel(2);
    let store = Store { queue, board: Arc::new(Board::default()) };
    store.write(&Ticket::default(), migration(1));
    let board = Arc::clone(&store.board);
    let thread = std::thread::spawn(move || serve(|| panic!("planted"), &requests, &board));
    assert_eq!(store.flush(PATIENCE), Err(StoreError::Failed("planted".into())));
    assert_eq!(store.dropped(), 1);
    thread.join().expect("it was caught");
    assert_eq!(words(&7), "it panicked");
}
