//! Between the migration, which asks for an exchange, and the owner of the subsystem, who makes it between two polls: whole for
//! all namespaces of the move, or taken back.
//!
//! The [`Asker`] is the migration's ([`BackingExchange`]); the [`Clerk`] is with the subsystem. The clerk's
//! [`serve`](Clerk::serve) costs one load while nothing is asked, so it can be called with every poll.

use super::queue::{BackingShelf, TakeError};
use super::{BackingExchange, CopyGeometry};
use dray_device::backing::Backing;
use dray_device::poll::Time;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A namespace of the move and the backing that it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOf {
    /// NSID of the namespace.
    pub nsid: u32,
    /// NSID of the copy on the [`BackingShelf`].
    pub on_shelf: u32,
    /// Why it cannot have it, if that is known: found out before the move begins.
    pub refused: Option<String>,
}

/// Why the subsystem did not exchange a backing; it is handed back.
pub struct Declined {
    /// The backing that was handed in.
    pub backing: Box<dyn Backing>,
    /// It may be taken after another poll.
    pub transient: bool,
    /// Why, in words.
    pub why: String,
}

impl std::fmt::Debug for Declined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Declined").field("transient", &self.transient).field("why", &self.why).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Exchange,
    Undo,
}

struct Entry {
    of: CopyOf,
    /// The old backing, while the namespace has the copy.
    old: Option<Box<dyn Backing>>,
}

struct State {
    entries: Vec<Entry>,
    wish: Option<Wish>,
    ended: Option<Result<(), String>>,
}

struct Desk {
    asked: AtomicBool,
    shelf: BackingShelf,
    state: Mutex<State>,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The migration's side.
#[derive(Clone)]
pub struct Asker(Arc<Desk>);

/// The subsystem's side.
#[derive(Clone)]
pub struct Clerk(Arc<Desk>);

impl std::fmt::Debug for Asker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asker").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Clerk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clerk").finish_non_exhaustive()
    }
}

/// Both sides of an exchange of these namespaces for copies on a shelf.
#[must_use]
pub fn desk(shelf: BackingShelf, copies: Vec<CopyOf>) -> (Asker, Clerk) {
    let entries = copies.into_iter().map(|of| Entry { of, old: None }).collect();
    let state = Mutex::new(State { entries, wish: None, ended: None });
    let desk = Arc::new(Desk { asked: AtomicBool::new(false), shelf, state });
    (Asker(Arc::clone(&desk)), Clerk(desk))
}

impl Asker {
    fn ask(&self, wish: Wish) {
        let mut state = self.0.lock();
        (state.wish, state.ended) = (Some(wish), None);
        self.0.asked.store(true, Ordering::Release);
    }
}

impl BackingExchange for Asker {
    fn copy_of(&mut self, nsid: u32) -> Result<CopyGeometry, String> {
        let state = self.0.lock();
        let entry = state.entries.iter().find(|entry| entry.of.nsid == nsid);
        let of = &entry.ok_or("no copy is named for it")?.of;
        if let Some(why) = &of.refused {
            return Err(why.clone());
        }
        let info = self.0.shelf.info(of.on_shelf).ok_or("its copy is not there")?;
        Ok(CopyGeometry { blocks: info.blocks, block_bytes: info.block_bytes })
    }

    fn exchange(&mut self) {
        self.ask(Wish::Exchange);
    }

    fn undo(&mut self) {
        self.ask(Wish::Undo);
    }

    fn poll(&mut self, _now: Time) -> Option<Result<(), String>> {
        self.0.lock().ended.take()
    }
}

impl Clerk {
    /// Does what is asked, if anything is: `exchange` puts a backing behind a namespace and gives the one before back. To be
    /// called by the owner of the subsystem between two polls of it.
    pub fn serve(&self, mut exchange: impl FnMut(u32, Box<dyn Backing>) -> Result<Box<dyn Backing>, Declined>) {
        if !self.0.asked.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.0.lock();
        let Some(wish) = state.wish else { return };
        let shelf = &self.0.shelf;
        for entry in &mut state.entries {
            let step = match wish {
                Wish::Exchange if entry.old.is_none() => entry.exchange(shelf, &mut exchange),
                Wish::Undo if entry.old.is_some() => entry.undo(shelf, &mut exchange),
                Wish::Exchange | Wish::Undo => Ok(true),
            };
            match step {
                Ok(true) => {}
                Ok(false) => return,
                Err(why) => {
                    (state.wish, state.ended) = (None, Some(Err(why)));
                    self.0.asked.store(false, Ordering::Release);
                    return;
                }
            }
        }
        (state.wish, state.ended) = (None, Some(Ok(())));
        self.0.asked.store(false, Ordering::Release);
    }

    /// The backings that namespaces had before, by NSID: after the move has ended, to be closed or kept.
    #[must_use]
    pub fn take_old(&self) -> Vec<(u32, Box<dyn Backing>)> {
        let mut state = self.0.lock();
        state.entries.iter_mut().filter_map(|entry| entry.old.take().map(|old| (entry.of.nsid, old))).collect()
    }
}

type Exchange<'a> = &'a mut dyn FnMut(u32, Box<dyn Backing>) -> Result<Box<dyn Backing>, Declined>;

impl Entry {
    /// True when it is done, false when it has to be tried again.
    fn exchange(&mut self, shelf: &BackingShelf, exchange: Exchange<'_>) -> Result<bool, String> {
        let copy = match shelf.take(self.of.on_shelf) {
            Ok(copy) => copy,
            Err(TakeError::UnderWay(_)) => return Ok(false),
            Err(error) => return Err(error.to_string()),
        };
        match exchange(self.of.nsid, copy) {
            Ok(old) => {
                self.old = Some(old);
                Ok(true)
            }
            Err(declined) => {
                let _none = shelf.put(self.of.on_shelf, declined.backing);
                if declined.transient { Ok(false) } else { Err(format!("namespace {}: {}", self.of.nsid, declined.why)) }
            }
        }
    }

    fn undo(&mut self, shelf: &BackingShelf, exchange: Exchange<'_>) -> Result<bool, String> {
        let Some(old) = self.old.take() else { return Ok(true) };
        match exchange(self.of.nsid, old) {
            Ok(copy) => {
                let _none = shelf.put(self.of.on_shelf, copy);
                Ok(true)
            }
            Err(declined) => {
                self.old = Some(declined.backing);
                if declined.transient { Ok(false) } else { Err(format!("namespace {}: {}", self.of.nsid, declined.why)) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media_move::BackingQueue;
    use crate::tests::plain::Plain;

    /// What a subsystem of two namespaces would do.
    struct Owner {
        backings: Vec<Option<Box<dyn Backing>>>,
        /// By NSID − 1: what it answers next.
        declines: Vec<Option<bool>>,
    }

    impl Owner {
        fn serve(&mut self, clerk: &Clerk) {
            clerk.serve(|nsid, backing| {
                let index = nsid as usize - 1;
                if let Some(transient) = self.declines[index].take() {
                    return Err(Declined { backing, transient, why: "not now".to_owned() });
                }
                Ok(self.backings[index].replace(backing).expect("a backing"))
            });
        }

        fn blocks(&self) -> Vec<u64> {
            self.backings.iter().map(|backing| backing.as_ref().expect("a backing").info().blocks).collect()
        }
    }

    fn parts() -> (Owner, Asker, Clerk, BackingShelf) {
        let copies = vec![(11, Plain::new(101, false).boxed()), (12, Plain::new(102, false).boxed())];
        let (_queue, shelf) = BackingQueue::new(copies, 4);
        let of = |nsid| CopyOf { nsid, on_shelf: nsid + 10, refused: None };
        let (asker, clerk) = desk(shelf.clone(), vec![of(1), of(2)]);
        let backings = vec![Some(Plain::new(1, false).boxed()), Some(Plain::new(2, false).boxed())];
        (Owner { backings, declines: vec![None, None] }, asker, clerk, shelf)
    }

    #[test]
    fn all_are_exchanged_and_the_old_ones_come_back() {
        let (mut owner, mut asker, clerk, _) = parts();
        owner.serve(&clerk);
        assert_eq!(owner.blocks(), [1, 2], "nothing was asked");
        asker.exchange();
        owner.declines[1] = Some(true);
        owner.serve(&clerk);
        assert!(asker.poll(Time(0)).is_none(), "the second was busy");
        owner.serve(&clerk);
        assert_eq!((asker.poll(Time(0)), asker.poll(Time(0))), (Some(Ok(())), None));
        assert_eq!(owner.blocks(), [101, 102]);
        assert_eq!(clerk.take_old().iter().map(|(nsid, old)| (*nsid, old.info().blocks)).collect::<Vec<_>>(), [(1, 1), (2, 2)]);
    }

    #[test]
    fn half_an_exchange_is_taken_back_whole() {
        let (mut owner, mut asker, clerk, shelf) = parts();
        asker.exchange();
        owner.declines[1] = Some(false);
        owner.serve(&clerk);
        assert!(matches!(asker.poll(Time(0)), Some(Err(_))));
        assert_eq!(owner.blocks(), [101, 2]);
        asker.undo();
        owner.declines[0] = Some(false);
        owner.serve(&clerk);
        assert!(matches!(asker.poll(Time(0)), Some(Err(_))), "not even that, the first time");
        asker.undo();
        owner.serve(&clerk);
        assert_eq!(asker.poll(Time(0)), Some(Ok(())));
        assert_eq!(owner.blocks(), [1, 2]);
        assert!(shelf.take(11).is_ok() && shelf.take(12).is_ok(), "the copies can be written again");
        assert!(clerk.take_old().is_empty());
    }

    #[test]
    fn an_undo_overtakes_an_exchange() {
        let (mut owner, mut asker, clerk, _) = parts();
        asker.exchange();
        owner.declines[0] = Some(true);
        owner.serve(&clerk);
        asker.undo();
        assert!(asker.poll(Time(0)).is_none());
        owner.serve(&clerk);
        assert_eq!(asker.poll(Time(0)), Some(Ok(())));
        assert_eq!(owner.blocks(), [1, 2]);
    }
}
