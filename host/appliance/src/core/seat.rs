//! A policy beside the polling core: requests go to a thread of its own and come back when they are answered.

use dray_policy::role::Role;
use dray_policy::seam::{Exchange, Identity, Opening, Seat, SeatStats};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

enum Message<R: Role> {
    Open(Opening<R>),
    Ask(Box<Exchange<R>>),
}

/// A seat whose policy runs on a thread of its own. Dropping it ends the thread.
#[derive(Debug)]
pub struct BesideSeat<R: Role> {
    requests: Option<Sender<Message<R>>>,
    answers: Receiver<Box<Exchange<R>>>,
    shown: Arc<Mutex<(Identity, SeatStats)>>,
    thread: Option<JoinHandle<()>>,
}

impl<R: Role> BesideSeat<R> {
    /// Starts a thread that asks `seat`.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(mut seat: Box<dyn Seat<R>>) -> std::io::Result<Self> {
        let (requests, inbox) = channel();
        let (outbox, answers) = channel();
        let shown = Arc::new(Mutex::new((seat.identity(), seat.stats())));
        let show = Arc::clone(&shown);
        let thread = std::thread::Builder::new().name(format!("dray-{}", R::NAME)).spawn(move || {
            for message in inbox {
                match message {
                    Message::Open(opening) => seat.open(opening),
                    Message::Ask(exchange) => {
                        seat.ask(exchange);
                        if let Some(answered) = seat.poll() {
                            *show.lock().unwrap_or_else(PoisonError::into_inner) = (seat.identity(), seat.stats());
                            if outbox.send(answered).is_err() {
                                return;
                            }
                        }
                    }
                }
            }
        })?;
        Ok(Self { requests: Some(requests), answers, shown, thread: Some(thread) })
    }

    fn send(&self, message: Message<R>) {
        if let Some(requests) = &self.requests {
            // A thread that has died answers nothing more; the migration drains by itself then (guarantee 3).
            let _dead = requests.send(message);
        }
    }
}

impl<R: Role> Seat<R> for BesideSeat<R> {
    fn identity(&self) -> Identity {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn open(&mut self, opening: Opening<R>) {
        self.send(Message::Open(opening));
    }

    fn ask(&mut self, exchange: Box<Exchange<R>>) {
        self.send(Message::Ask(exchange));
    }

    fn poll(&mut self) -> Option<Box<Exchange<R>>> {
        self.answers.try_recv().ok()
    }

    fn stats(&self) -> SeatStats {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

impl<R: Role> Drop for BesideSeat<R> {
    fn drop(&mut self) {
        self.requests.take();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
