//! The control socket's thread: connections in, requests out to the appliance, answers back.

use super::protocol::{Lines, parse, reply_line};
use super::{Asker, ControlError, ErrorCode, Reply, Request};
use dray_device::socket::{Listener, Stream, UnixListener, UnixSocket};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections at a time.
const MAX_CLIENTS: usize = 16;
/// Unanswered requests of one connection.
const MAX_REQUESTS: usize = 4;
/// Lines that wait for a client to read before events are left out, and before it is disconnected.
const LINES_FOR_EVENTS: usize = 8;
const MAX_LINES: usize = 32;
/// Bytes read of one client before the others have their turn.
const READ_AT_ONCE: usize = 4 << 10;
/// How long the thread waits for clients to take their last answers.
const LAST_WORDS: Duration = Duration::from_millis(500);

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
const FIRST_CLIENT: u64 = 2;

/// What the appliance hears.
#[derive(Debug)]
pub struct Asked {
    /// By whom.
    pub asker: Asker,
    /// What for.
    pub request: Request,
}

/// How the appliance answers. Clones are the same.
#[derive(Clone)]
pub struct Outbox {
    replies: Sender<(Asker, Reply)>,
    waker: Arc<Waker>,
}

impl Outbox {
    /// Sends an answer; to a connection that has ended it goes nowhere.
    pub fn send(&self, asker: Asker, reply: Reply) {
        if self.replies.send((asker, reply)).is_ok() {
            // The thread has ended if it cannot be woken.
            let _ended = self.waker.wake();
        }
    }

    /// Ends a request.
    pub fn end(&self, asker: Asker, result: Result<serde_json::Value, ControlError>) {
        self.send(asker, match result {
            Ok(value) => Reply::Done(value, Vec::new()),
            Err(error) => Reply::Failed(error),
        });
    }
}

/// The thread. Dropping it ends it and removes the socket.
pub struct ControlServer {
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl ControlServer {
    /// Serves a bound socket of that path.
    ///
    /// # Errors
    /// The kernel's.
    pub fn start(listener: UnixListener, path: &Path) -> io::Result<(Self, Outbox, Receiver<Asked>)> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        if let Some(fd) = listener.waker() {
            poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), LISTENER, Interest::READABLE)?;
        }
        let (asked_in, asked) = channel();
        let (replies_in, replies) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let server = Server {
            poll,
            listener,
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
            asked: asked_in,
            replies,
            stop: Arc::clone(&stop),
            user: rustix::process::geteuid().as_raw(),
        };
        let thread = std::thread::Builder::new().name("dray-control".into()).spawn(move || server.run())?;
        let outbox = Outbox { replies: replies_in, waker: Arc::clone(&waker) };
        Ok((Self { stop, waker, thread: Some(thread), path: path.to_path_buf() }, outbox, asked))
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.path);
        self.stop.store(true, Ordering::Release);
        let _ended = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

struct Client {
    socket: UnixSocket,
    lines: Lines,
    /// Unanswered requests.
    open: Vec<u64>,
    out: VecDeque<Line>,
    /// There may be more to read.
    again: bool,
    /// It has sent all it will send.
    ended: bool,
    /// It gets what is in `out` and nothing more.
    closing: bool,
    gone: bool,
}

struct Line {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Client {
    fn new(socket: UnixSocket) -> Self {
        Self { socket, lines: Lines::default(), open: Vec::new(), out: VecDeque::new(), again: true, ended: false, closing: false, gone: false }
    }

    fn say(&mut self, id: Option<u64>, reply: Reply) {
        let is_event = matches!(reply, Reply::Event(_));
        if is_event && self.out.len() >= LINES_FOR_EVENTS {
            return;
        }
        if self.out.len() >= MAX_LINES {
            self.gone = true;
            return;
        }
        let bytes = reply_line(id, &reply);
        let fds = if let Reply::Done(_, fds) = reply { fds } else { Vec::new() };
        self.out.push_back(Line { bytes, sent: 0, fds });
        self.write();
    }

    fn write(&mut self) {
        while let Some(line) = self.out.front_mut() {
            let fds: Vec<_> = line.fds.iter().map(AsFd::as_fd).collect();
            match self.socket.send(&[IoSlice::new(&line.bytes[line.sent..])], &fds) {
                Ok(sent) => {
                    line.fds.clear();
                    line.sent += sent;
                    if line.sent == line.bytes.len() {
                        self.out.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
        self.gone |= self.closing;
    }

    /// Reads a bounded amount. What was read is cut into requests before there is more: no more than a line and a buffer is kept.
    fn read(&mut self) {
        let (mut buffer, mut fds) = ([0; READ_AT_ONCE], Vec::new());
        // Descriptors that nobody asked for are closed with `fds`.
        match self.socket.recv(&mut buffer, &mut fds) {
            // It may still read: `… | nc -U` sends an end and waits for the answer.
            Ok(0) => (self.again, self.ended) = (false, true),
            Ok(read) => self.lines.feed(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.again = false,
            Err(_) => self.gone = true,
        }
    }

    fn is_gone(&self) -> bool {
        self.gone || self.ended && self.open.is_empty() && self.out.is_empty()
    }

    /// The requests in what was read.
    fn requests(&mut self, mut each: impl FnMut(u64, Request)) {
        while !self.closing && !self.gone {
            match self.lines.next_line() {
                Ok(None) => return,
                Ok(Some(line)) => self.request(&line, &mut each),
                Err(error) => {
                    self.closing = true;
                    self.say(None, Reply::Failed(error));
                }
            }
        }
    }

    fn request(&mut self, line: &[u8], each: &mut impl FnMut(u64, Request)) {
        match parse(line) {
            Err((id, error)) => self.say(id, Reply::Failed(error)),
            Ok((id, _)) if self.open.contains(&id) => {
                let error = ControlError::new(ErrorCode::BadRequest, format!("`id` {id} is in use"));
                self.say(None, Reply::Failed(error));
            }
            Ok((id, _)) if self.open.len() >= MAX_REQUESTS => {
                let message = format!("{MAX_REQUESTS} requests are unanswered on this connection");
                self.say(Some(id), Reply::Failed(ControlError::new(ErrorCode::TooMany, message)));
            }
            Ok((id, request)) => {
                self.open.push(id);
                each(id, request);
            }
        }
    }
}

struct Server {
    poll: Poll,
    listener: UnixListener,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    asked: Sender<Asked>,
    replies: Receiver<(Asker, Reply)>,
    stop: Arc<AtomicBool>,
    user: u32,
}

impl Server {
    fn run(mut self) {
        let mut events = Events::with_capacity(64);
        while !self.stop.load(Ordering::Acquire) {
            let more = self.clients.values().any(|client| client.again);
            let wait = more.then_some(Duration::ZERO);
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    tracing::error!(%error, "the control socket is not served any more");
                    return;
                }
                _ => {}
            }
            for event in &events {
                match event.token() {
                    LISTENER => self.accept(),
                    WAKER => {}
                    Token(token) => {
                        if let Some(client) = self.clients.get_mut(&(token as u64)) {
                            client.again |= event.is_readable() && !client.ended;
                            client.write();
                        }
                    }
                }
            }
            self.answer();
            self.serve();
        }
        self.last_words();
    }

    /// Takes all who wait: the next event comes only for a new one.
    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok(Some(socket)) => self.welcome(socket),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection to the control socket could not be taken");
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, socket: UnixSocket) {
        let mut client = Client::new(socket);
        let uid = client.socket.peer_uid();
        if uid != Some(self.user) && uid != Some(0) {
            let error = ControlError::new(ErrorCode::Forbidden, "the control socket is for the appliance's own user");
            return client.say(None, Reply::Failed(error));
        }
        if self.clients.len() >= MAX_CLIENTS {
            let error = ControlError::new(ErrorCode::TooMany, format!("{MAX_CLIENTS} connections are open"));
            return client.say(None, Reply::Failed(error));
        }
        let id = self.next_client;
        let (Some(fd), Ok(token)) = (client.socket.waker(), usize::try_from(id)) else { return };
        let both = Interest::READABLE | Interest::WRITABLE;
        if self.poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), Token(token), both).is_ok() {
            self.next_client += 1;
            self.clients.insert(id, client);
        }
    }

    fn answer(&mut self) {
        while let Ok((asker, reply)) = self.replies.try_recv() {
            let Some(client) = self.clients.get_mut(&asker.client) else { continue };
            if !matches!(reply, Reply::Event(_)) {
                client.open.retain(|id| *id != asker.id);
            }
            client.say(Some(asker.id), reply);
        }
    }

    fn serve(&mut self) {
        let asked = &self.asked;
        for (&number, client) in &mut self.clients {
            if client.closing {
                client.again = false;
            }
            if client.again && !client.is_gone() {
                client.read();
            }
            client.requests(|id, request| {
                // Nobody hears it any more when the appliance stops.
                let _stopping = asked.send(Asked { asker: Asker { client: number, id }, request });
            });
        }
        // Closing its descriptor takes a client off the poller.
        self.clients.retain(|_, client| !client.is_gone());
    }

    /// What was answered before the end still goes out, to those who read.
    fn last_words(&mut self) {
        self.answer();
        let mut events = Events::with_capacity(64);
        for _ in 0..8 {
            self.clients.values_mut().for_each(Client::write);
            self.clients.retain(|_, client| !client.gone && !client.out.is_empty());
            if self.clients.is_empty() || self.poll.poll(&mut events, Some(LAST_WORDS / 8)).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::UnixStream;

    struct Place {
        path: PathBuf,
        server: Option<ControlServer>,
        outbox: Outbox,
        asked: Receiver<Asked>,
    }

    impl Place {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("dray-control-{name}-{}.sock", std::process::id()));
            let bound = std::os::unix::net::UnixListener::bind(&path).expect("bind");
            let (server, outbox, asked) = ControlServer::start(UnixListener::new(bound).expect("listener"), &path).expect("server");
            Self { path, server: Some(server), outbox, asked }
        }

        fn connect(&self) -> BufReader<UnixStream> {
            let socket = UnixStream::connect(&self.path).expect("connect");
            socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a deadline");
            BufReader::new(socket)
        }
    }

    fn line(socket: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        socket.read_line(&mut line).expect("a line");
        line
    }

    const STATUS: &[u8] = b"{\"v\":1,\"id\":1,\"do\":\"status\"}\n";

    #[test]
    fn a_request_is_heard_and_answered_and_the_socket_goes_with_the_server() {
        let mut place = Place::new("whole");
        let mut client = place.connect();
        client.get_mut().write_all(&STATUS[..9]).expect("half");
        client.get_mut().write_all(&STATUS[9..]).expect("the rest");
        let asked = place.asked.recv_timeout(Duration::from_secs(20)).expect("heard");
        assert_eq!(asked.request, Request::Status);
        place.outbox.send(asked.asker, Reply::Event(1.into()));
        place.outbox.end(asked.asker, Ok("fine".into()));
        assert!(line(&mut client).contains("\"event\":1"));
        assert!(line(&mut client).contains("\"ok\":\"fine\""));
        place.server.take();
        assert_eq!(line(&mut client), "");
        assert!(!place.path.exists());
    }

    #[test]
    fn nonsense_is_answered_and_too_much_of_it_ends_the_connection() {
        let place = Place::new("hostile");
        let mut client = place.connect();
        client.get_mut().write_all(b"nonsense\n\xff\n").expect("sent");
        assert!(line(&mut client).contains("bad-request") && line(&mut client).contains("bad-request"));
        // As many requests as may be unanswered, and one more; an id twice.
        for id in [1, 1, 2, 3, 4, 5] {
            let request = super::super::protocol::request_line(id, &Request::Cancel);
            client.get_mut().write_all(&request).expect("sent");
        }
        assert!(line(&mut client).contains("in use") && line(&mut client).contains("too-many"));
        let (mut other, long) = (place.connect(), vec![b'x'; 64 << 10]);
        // It may be disconnected before all is sent.
        let _cut = other.get_mut().write_all(&long);
        let mut said = Vec::new();
        let _reset = other.read_to_end(&mut said);
        assert!(said.is_empty() || String::from_utf8_lossy(&said).contains("too-long"));
        client.get_mut().write_all(b"\n").expect("the first one is still served");
        assert!(line(&mut client).contains("bad-request"));
    }

    #[test]
    fn connections_are_bounded_and_free_again_when_they_end() {
        let place = Place::new("many");
        let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| place.connect()).collect();
        for client in &mut clients {
            client.get_mut().write_all(b"x\n").expect("sent");
            assert!(line(client).contains("bad-request"));
        }
        assert!(line(&mut place.connect()).contains("too-many"));
        clients.pop();
        let end = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            let mut client = place.connect();
            // It may be refused before it is read.
            let _refused = client.get_mut().write_all(b"x\n");
            if line(&mut client).contains("bad-request") {
                break;
            }
            assert!(std::time::Instant::now() < end, "never free again");
        }
    }

    #[test]
    fn descriptors_go_with_their_answer() {
        let place = Place::new("fds");
        let client = UnixStream::connect(&place.path).expect("connect");
        (&client).write_all(STATUS).expect("sent");
        let asked = place.asked.recv_timeout(Duration::from_secs(20)).expect("heard");
        let (given, mut kept) = UnixStream::pair().expect("pair");
        place.outbox.send(asked.asker, Reply::Done(1.into(), vec![given.into()]));
        let mut socket = UnixSocket::new(client).expect("socket");
        let (mut bytes, mut fds, end) = ([0; 256], Vec::new(), std::time::Instant::now() + Duration::from_secs(20));
        while fds.is_empty() {
            assert!(std::time::Instant::now() < end, "no descriptor");
            let _nothing_yet = socket.recv(&mut bytes, &mut fds);
        }
        kept.write_all(b"z").expect("the other end is there");
        let mut got = [0];
        UnixStream::from(fds.remove(0)).read_exact(&mut got).expect("read");
        assert_eq!(got, *b"z");
    }
}
