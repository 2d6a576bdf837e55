//! Sockets that the appliance listens on.

use dray_device::socket::{TcpListener, UnixListener};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// Listens on a Unix socket of mode 0600. What a process that was killed has left at the path is removed; a socket that somebody
/// listens on, or anything else, is not.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`], or the filesystem's.
pub(crate) fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "there is a file that is no socket"));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
        }
        Ok(_) => std::fs::remove_file(path)?,
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux makes the file with the mode of the socket: it is never open to others, not even for a moment.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::new(socket.into())
}

/// Listens on a TCP port; returns where, since port 0 takes any.
///
/// # Errors
/// The kernel's.
pub(crate) fn listen_tcp(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = std::net::TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    Ok((TcpListener::new(listener)?, address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_socket_is_its_owners_alone_and_what_a_dead_process_left_is_taken_over() {
        let path = std::env::temp_dir().join(format!("dray-listen-{}.sock", std::process::id()));
        let first = listen_unix(&path).expect("listens");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(listen_unix(&path).expect_err("in use").kind(), io::ErrorKind::AddrInUse);
        drop(first);
        assert!(path.exists());
        drop(listen_unix(&path).expect("listens again"));
        std::fs::remove_file(&path).expect("clean up");
        std::fs::write(&path, b"precious").expect("a file");
        assert_eq!(listen_unix(&path).expect_err("no socket").kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
        std::fs::remove_file(&path).expect("clean up");
    }
}
