//! Where a bundle comes from: a file, a TCP connection that sends it, or a web server.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

/// How long a connection may take to come about, and be silent.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most bytes of a web server's answer before the content.
const HEAD_BYTES: u64 = 16 << 10;

/// Opens `FILE`, `tcp:HOST:PORT` or `http://HOST[:PORT]/PATH`.
///
/// # Errors
/// The system's, or in words what the server said.
pub fn open(source: &str) -> io::Result<Box<dyn Read>> {
    if let Some(address) = source.strip_prefix("tcp:") {
        return Ok(Box::new(connect(address)?));
    }
    if let Some(rest) = source.strip_prefix("http://") {
        return http(rest);
    }
    if source.contains("://") {
        let words = "there are FILE, tcp:HOST:PORT and http://HOST/PATH; the signature protects the way, whatever it is";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
    }
    Ok(Box::new(BufReader::new(std::fs::File::open(Path::new(source))?)))
}

fn connect(address: &str) -> io::Result<BufReader<TcpStream>> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{address} is nowhere"));
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(BufReader::new(stream));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn http(rest: &str) -> io::Result<Box<dyn Read>> {
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    if host.is_empty() || !plain(host) || !plain(path) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "write http://HOST[:PORT]/PATH"));
    }
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let mut stream = connect(&if has_port { host.into() } else { format!("{host}:80") })?;
    // Version 1.0: the content comes in one piece, and ends with the connection.
    let request = format!("GET /{path} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: dray\r\nConnection: close\r\n\r\n");
    // In one piece: a server may answer before it has read all of it.
    stream.get_mut().write_all(request.as_bytes())?;
    skip_head(&mut stream)?;
    Ok(Box::new(stream))
}

/// Reads a web server's answer up to its content; anything but 200 is an error.
fn skip_head(stream: &mut impl BufRead) -> io::Result<()> {
    let (mut head, mut first) = (stream.take(HEAD_BYTES), None);
    loop {
        let mut line = Vec::new();
        head.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(io::Error::other("what answers is no web server"));
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        if line.to_ascii_lowercase().replace(' ', "").starts_with("transfer-encoding:chunked") {
            return Err(io::Error::other("the web server sends it in pieces, which is not HTTP/1.0"));
        }
        first.get_or_insert(line);
    }
    let status: String = first.unwrap_or_default();
    match status.split(' ').nth(1) {
        Some("200") if status.starts_with("HTTP/1.") => Ok(()),
        _ => Err(io::Error::other(format!("the web server says \"{status:.80}\""))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A server for one connection; returns its address.
    fn serve(answer: &'static [u8], reads: bool) -> (String, std::thread::JoinHandle<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = Vec::new();
            while reads && !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a request");
                request.extend_from_slice(&byte);
            }
            stream.write_all(answer).expect("send");
            request
        });
        (address, thread)
    }

    fn all(source: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        open(source)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn a_bundle_comes_by_connection_or_from_a_web_server() {
        let (address, server) = serve(b"bytes", false);
        assert_eq!(all(&format!("tcp:{address}")).expect("bytes"), b"bytes");
        server.join().expect("server");
        let (address, server) = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nbytes", true);
        assert_eq!(all(&format!("http://{address}/a/b")).expect("bytes"), b"bytes");
        assert!(server.join().expect("server").starts_with(b"GET /a/b HTTP/1.0\r\n"));
    }

    #[test]
    fn what_is_no_answer_is_said() {
        for (answer, words) in [
            (&b"HTTP/1.1 404 Not Found\r\n\r\n"[..], "404 Not Found"),
            (b"SSH-2.0-x\r\n\r\n", "SSH-2.0-x"),
            (b"HTTP/1.1 200 OK\r\n", "no web server"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "in pieces"),
        ] {
            let (address, server) = serve(answer, true);
            let error = all(&format!("http://{address}/")).expect_err("refused").to_string();
            server.join().expect("server");
            assert!(error.contains(words), "{error}");
        }
        assert!(open("https://x/y").is_err_and(|error| error.to_string().contains("tcp:HOST:PORT")));
    }
}
