//! As much of HTTP as a read-only page needs: GET and HEAD, one request a connection (RFC 9112).
//!
//! Bounds: [`CONNECTIONS`] at once, [`HEAD_BYTES`] of a request, [`PATIENCE`] for it to come and for the answer to go, whatever
//! the pace. What is over the first is closed at once.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Connections at once.
pub const CONNECTIONS: usize = 8;
/// Bytes of a request's head.
pub const HEAD_BYTES: usize = 4096;
/// For a request to come, and for its answer to go.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How often a listener looks whether it is to stop, and tries again for an address that is not there.
const LOOK: Duration = Duration::from_millis(100);

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code and its words.
    pub status: &'static str,
    /// The media type.
    pub kind: &'static str,
    /// The content.
    pub body: String,
}

impl Answer {
    fn plain(status: &'static str) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: format!("{status}\n") }
    }
}

/// What answers paths.
pub type Pages = Arc<dyn Fn(&str) -> Option<Answer> + Send + Sync>;

/// Listens until it is to stop; an address that cannot be bound is tried again, and said once.
pub fn listen(address: SocketAddr, pages: &Pages, stop: &AtomicBool, say: &dyn Fn(&str)) {
    let mut said = false;
    let listener = loop {
        match TcpListener::bind(address).and_then(|listener| listener.set_nonblocking(true).map(|()| listener)) {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    say(&format!("status page at {address}: {error}; it is tried again"));
                }
                std::thread::sleep(LOOK);
            }
        }
        if stop.load(Ordering::Relaxed) {
            return;
        }
    };
    serve(&listener, pages, stop);
}

/// Serves a listener that does not block, until it is to stop.
fn serve(listener: &TcpListener, pages: &Pages, stop: &AtomicBool) {
    let open = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(LOOK);
            continue;
        };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (pages, count) = (Arc::clone(pages), Arc::clone(&open));
        let answer = move || {
            // Whoever does not read the answer has had it.
            let _gone = connection(stream, &pages);
            count.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("dray-http".into()).spawn(answer).is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn connection(mut stream: TcpStream, pages: &Pages) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let (head, answer) = match read_head(&mut stream, PATIENCE)? {
        Some(head) => match request(&head) {
            Ok((path, head_only)) => (head_only, pages(path).unwrap_or_else(|| Answer::plain("404 Not Found"))),
            Err(status) => (false, Answer::plain(status)),
        },
        None => (false, Answer::plain("431 Request Header Fields Too Large")),
    };
    let mut text = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n",
        answer.status,
        answer.kind,
        answer.body.len()
    );
    if !head {
        text.push_str(&answer.body);
    }
    write_all(&mut stream, text.as_bytes(), PATIENCE)?;
    stream.shutdown(std::net::Shutdown::Write)
}

fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A request's head, up to its empty line; `None` if it is too long.
fn read_head(stream: &mut TcpStream, patience: Duration) -> io::Result<Option<Vec<u8>>> {
    let end = Instant::now() + patience;
    let (mut head, mut bytes) = (Vec::new(), [0; 1024]);
    loop {
        // Anew before each read: one byte every second is as slow as none.
        stream.set_read_timeout(Some(left(end)?))?;
        match stream.read(&mut bytes)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => head.extend_from_slice(&bytes[..count]),
        }
        if head.windows(4).any(|four| four == b"\r\n\r\n") || head.windows(2).any(|two| two == b"\n\n") {
            return Ok(Some(head));
        }
        if head.len() > HEAD_BYTES {
            return Ok(None);
        }
    }
}

fn write_all(stream: &mut TcpStream, mut bytes: &[u8], patience: Duration) -> io::Result<()> {
    let end = Instant::now() + patience;
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(left(end)?))?;
        match stream.write(bytes)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => bytes = &bytes[count..],
        }
    }
    Ok(())
}

/// The path of a request, and whether its head alone is asked for; otherwise the status that it is answered with.
fn request(head: &[u8]) -> Result<(&str, bool), &'static str> {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = std::str::from_utf8(line).map_err(|_| "400 Bad Request")?.trim_end();
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next()) else {
        return Err("400 Bad Request");
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return Err("400 Bad Request");
    }
    let path = target.split('?').next().unwrap_or(target);
    match method {
        "GET" => Ok((path, false)),
        "HEAD" => Ok((path, true)),
        _ => Err("405 Method Not Allowed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A page that runs for as long as the test.
    struct Served {
        address: SocketAddr,
        stop: Arc<AtomicBool>,
        thread: Option<std::thread::JoinHandle<()>>,
    }

    impl Served {
        fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
            listener.set_nonblocking(true).expect("nonblocking");
            let address = listener.local_addr().expect("address");
            let stop = Arc::new(AtomicBool::new(false));
            let until = Arc::clone(&stop);
            let pages: Pages = Arc::new(|path| {
                (path == "/status.json").then(|| Answer { status: "200 OK", kind: "application/json", body: "{}\n".into() })
            });
            let thread = std::thread::spawn(move || serve(&listener, &pages, &until));
            Self { address, stop, thread: Some(thread) }
        }

        fn ask(&self, request: &[u8]) -> String {
            let mut stream = TcpStream::connect(self.address).expect("connect");
            // A refused request may be answered before it is read to its end.
            let _reset = stream.write_all(request);
            let mut answer = String::new();
            let _reset = stream.read_to_string(&mut answer);
            answer
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            self.stop.store(true, Ordering::Relaxed);
            let _panicked = self.thread.take().map(std::thread::JoinHandle::join);
        }
    }

    #[test]
    fn pages_are_got_and_nothing_else() {
        let served = Served::start();
        let page = served.ask(b"GET /status.json?x=1 HTTP/1.1\r\nHost: a\r\n\r\n");
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.ends_with("\r\n\r\n{}\n"), "{page}");
        let head = served.ask(b"HEAD /status.json HTTP/1.0\r\n\r\n");
        assert!(head.contains("Content-Length: 3\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        for (request, status) in [
            (&b"GET /etc/shadow HTTP/1.1\r\n\r\n"[..], "404"),
            (b"POST / HTTP/1.1\r\n\r\n", "405"),
            (b"GET http://x/ HTTP/1.1\r\n\r\n", "400"),
            (b"\xff\xfe\r\n\r\n", "400"),
            (b"\n\n", "400"),
        ] {
            let answer = served.ask(request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        }
        assert!(served.ask(&[b'x'; HEAD_BYTES + 1]).starts_with("HTTP/1.1 431 "));
    }

    #[test]
    fn connections_beyond_the_bound_are_closed_and_the_page_goes_on() {
        let served = Served::start();
        // They say nothing.
        let mut silent: Vec<_> = (0..CONNECTIONS).map(|_| TcpStream::connect(served.address).expect("connect")).collect();
        let end = Instant::now() + PATIENCE * 10;
        // The silent ones are taken in by and by; then there is no room.
        while !served.ask(b"GET /status.json HTTP/1.1\r\n\r\n").is_empty() {
            assert!(Instant::now() < end, "all are taken in");
        }
        // They are cut off when their time is over.
        while served.ask(b"GET /status.json HTTP/1.1\r\n\r\n").is_empty() {
            assert!(Instant::now() < end, "there is room again");
            std::thread::sleep(LOOK);
        }
        for stream in &mut silent {
            stream.set_read_timeout(Some(PATIENCE * 10)).expect("time-out");
            assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
        }
    }

    proptest! {
        #[test]
        fn no_head_is_too_odd(head in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok((path, _)) = request(&head) {
                prop_assert!(path.starts_with('/'));
            }
        }
    }
}
