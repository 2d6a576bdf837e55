//! The other end of the control socket, for `dray status` and `dray migrate`.

use super::protocol::{parse_reply, request_line};
use super::{ControlError, Reply, Request, socket_path};
use crate::config::Config;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Most bytes of an answer's line.
const MAX_REPLY: u64 = 8 << 20;

/// Why the appliance could not be asked.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no appliance runs here: {}: {source}", path.display())]
    #[diagnostic(help("start one with `dray run`, or name its configuration with --config FILE"))]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection.
    #[error("the appliance does not answer: {0}")]
    Io(#[from] io::Error),
    /// It has ended.
    #[error("the appliance has closed the connection")]
    Closed,
    /// It said something else.
    #[error("the appliance's answer cannot be read: {0}")]
    Nonsense(String),
    /// It said no.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// A connection.
pub struct Client {
    socket: BufReader<UnixStream>,
    line: Vec<u8>,
    next_id: u64,
}

impl Client {
    /// Connects to the appliance that runs on a configuration.
    ///
    /// # Errors
    /// [`ClientError::NotRunning`].
    pub fn connect(config: &Config) -> Result<Self, ClientError> {
        let path = socket_path(config);
        let socket = UnixStream::connect(&path).map_err(|source| ClientError::NotRunning { path, source })?;
        Ok(Self { socket: BufReader::new(socket), line: Vec::new(), next_id: 1 })
    }

    /// Sends a request; returns its `id`.
    ///
    /// # Errors
    /// [`ClientError::Io`].
    pub fn send(&mut self, request: &Request) -> Result<u64, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        self.socket.get_mut().write_all(&request_line(id, request))?;
        Ok(id)
    }

    /// The next answer, or `None` when there is none in time.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn next(&mut self, patience: Duration) -> Result<Option<(Option<u64>, Reply)>, ClientError> {
        self.socket.get_ref().set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let left = MAX_REPLY.saturating_sub(self.line.len() as u64);
        match io::Read::take(&mut self.socket, left).read_until(b'\n', &mut self.line) {
            Ok(_) if self.line.ends_with(b"\n") => {
                let answer = parse_reply(&self.line).map_err(ClientError::Nonsense);
                self.line.clear();
                answer.map(Some)
            }
            Ok(_) if self.line.len() as u64 >= MAX_REPLY => Err(ClientError::Nonsense("a line without an end".into())),
            Ok(_) => Err(ClientError::Closed),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a request and waits for its end.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask(&mut self, request: &Request, patience: Duration) -> Result<serde_json::Value, ClientError> {
        let id = self.send(request)?;
        loop {
            match self.next(patience)? {
                None => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
                Some((Some(of), Reply::Done(value, _))) if of == id => return Ok(value),
                Some((of, Reply::Failed(error))) if of == Some(id) || of.is_none() => return Err(error.into()),
                Some(_) => {}
            }
        }
    }
}
