//! The clock: the kernel takes it from the machine's; this asks a time server (SNTP, RFC 4330 and RFC 5905 §14) and corrects it.
//!
//! Nothing that serves or migrates reads this clock, which dates the log and the history. So it is simply set:
//! - forward whenever it is behind by more than [`TOLERANCE`];
//! - back at the first answer after the start alone. Later a clock that is ahead is said and left as it is: what is dated then
//!   must not come before what was dated already. The next start corrects it.
//!
//! The machine's own clock is not written. A server is believed when its answer is to our question, it is itself synchronised,
//! its time is one that can be, and question and answer took no longer than [`ROUND_TRIP`].

use super::journal::Journal;
use super::net::NetworkView;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::{ToSocketAddrs, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A smaller difference is none.
pub const TOLERANCE: Duration = Duration::from_millis(100);
/// The longest way to a server and back.
pub const ROUND_TRIP: Duration = Duration::from_secs(2);
/// Bytes of a message.
const MESSAGE_BYTES: usize = 48;
/// Between the eras of NTP (1900) and Unix (1970), in seconds.
const NTP_TO_UNIX: i128 = 2_208_988_800;
/// When the first era of NTP ends (2036), in Unix seconds.
const ERA: i128 = 1 << 32;
/// No machine is older than this: 1 January 2026, in Unix seconds.
const EARLIEST: i128 = 1_767_225_600;
/// Between two questions: after an answer, and after none (doubled up to that).
const EVERY: (Duration, Duration) = (Duration::from_secs(1024), Duration::from_secs(4));
const NANOS: i128 = 1_000_000_000;

/// A question to a server.
#[must_use]
pub fn question(nonce: u64) -> [u8; MESSAGE_BYTES] {
    let mut message = [0; MESSAGE_BYTES];
    // Version 4, client.
    message[0] = 4 << 3 | 3;
    // Where the time of sending is: the server returns it, and a number that nobody can guess tells its answer from others.
    message[40..].copy_from_slice(&nonce.to_be_bytes());
    message
}

/// Why an answer is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimeError {
    /// It is too short, or none to a client, or not to this question.
    #[error("it is no answer to this question")]
    NotOurs,
    /// The server is not synchronised, or says to go away.
    #[error("the server has no time to give")]
    Unsynchronised,
    /// A time that cannot be.
    #[error("its time cannot be")]
    Impossible,
    /// It took too long.
    #[error("it took too long to be exact")]
    Slow,
}

/// How far ahead a server's clock is, in nanoseconds. `sent` and `received` are this machine's, in nanoseconds since 1970.
///
/// # Errors
/// [`TimeError`].
pub fn offset(answer: &[u8], nonce: u64, sent: i128, received: i128) -> Result<i128, TimeError> {
    let message = answer.get(..MESSAGE_BYTES).ok_or(TimeError::NotOurs)?;
    let word = |at: usize| message[at..at + 8].try_into().map(u64::from_be_bytes).unwrap_or(0);
    let (leap, version, mode, stratum) = (message[0] >> 6, message[0] >> 3 & 7, message[0] & 7, message[1]);
    if mode != 4 || !(3..=4).contains(&version) || word(24) != nonce {
        return Err(TimeError::NotOurs);
    }
    if leap == 3 || !(1..=15).contains(&stratum) {
        return Err(TimeError::Unsynchronised);
    }
    let (arrived, left) = (unix_nanos(word(32)), unix_nanos(word(40)));
    if arrived < EARLIEST * NANOS || left < arrived {
        return Err(TimeError::Impossible);
    }
    let round_trip = (received - sent) - (left - arrived);
    if !(0..=ROUND_TRIP.as_nanos().cast_signed()).contains(&round_trip) {
        return Err(TimeError::Slow);
    }
    Ok(((arrived - sent) + (left - received)) / 2)
}

/// A time of NTP: seconds and their fraction, of the era that began in 1900 or the one after it.
fn unix_nanos(time: u64) -> i128 {
    let (seconds, fraction) = (i128::from(time >> 32), i128::from(time & 0xffff_ffff));
    let era = if seconds >= ERA / 2 { 0 } else { ERA };
    (seconds + era - NTP_TO_UNIX) * NANOS + fraction * NANOS / ERA
}

/// What is done about an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: the clock is right.
    Right,
    /// The clock is set.
    Set,
    /// It is ahead and stays so.
    LeaveAhead,
}

/// What is done about an offset in nanoseconds.
#[must_use]
pub fn decide(offset: i128, first: bool) -> Decision {
    if offset.unsigned_abs() <= TOLERANCE.as_nanos() {
        Decision::Right
    } else if offset > 0 || first {
        Decision::Set
    } else {
        Decision::LeaveAhead
    }
}

fn wall_nanos() -> i128 {
    let now = clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * NANOS + i128::from(now.tv_nsec)
}

/// Keeps the clock until `stop`. `server` is the configuration's; without it those are asked that a DHCP server has named.
pub fn run(server: Option<(String, u16)>, network: &Arc<Mutex<NetworkView>>, journal: &Journal, stop: &AtomicBool) {
    let (mut first, mut wait, mut said) = (true, EVERY.1, String::new());
    while !stop.load(Ordering::Relaxed) {
        let servers = server.clone().map_or_else(
            || {
                let view = network.lock().unwrap_or_else(PoisonError::into_inner);
                view.time_servers.iter().map(|server| (server.clone(), 123)).collect()
            },
            |server| vec![server],
        );
        let mut answered = false;
        for (name, port) in &servers {
            match ask(name, *port) {
                Ok(offset) => {
                    answered = true;
                    correct(offset, first, name, journal, &mut said);
                    first = false;
                    break;
                }
                Err(error) => say_once(journal, &mut said, format!("time server {name}: {error}")),
            }
        }
        wait = match (answered, servers.is_empty()) {
            (true, _) => EVERY.0,
            // A lease may name one at any time.
            (false, true) => EVERY.1,
            (false, false) => (wait * 2).min(EVERY.0),
        };
        pause(wait, stop);
    }
}

fn correct(offset: i128, first: bool, name: &str, journal: &Journal, said: &mut String) {
    let (ahead, seconds) = (offset < 0, offset.unsigned_abs() as f64 / 1e9);
    match decide(offset, first) {
        Decision::Right => said.clear(),
        Decision::LeaveAhead => {
            // In whole minutes, so that it is not said anew for each second.
            let minutes = offset.unsigned_abs() / (60 * NANOS.unsigned_abs());
            say_once(journal, said, format!("the clock is more than {minutes} min ahead of {name}; it is set at the next start"));
        }
        Decision::Set => {
            let new = wall_nanos() + offset;
            let seconds_of_new = i64::try_from(new.div_euclid(NANOS)).unwrap_or(0);
            let time = Timespec { tv_sec: seconds_of_new, tv_nsec: new.rem_euclid(NANOS) as i64 };
            let direction = if ahead { "back" } else { "forward" };
            match clock_settime(ClockId::Realtime, time) {
                Ok(()) => journal.say(&format!("the clock was set {direction} by {seconds:.3} s, by {name}")),
                Err(error) => say_once(journal, said, format!("the clock cannot be set: {error}")),
            }
        }
    }
}

fn say_once(journal: &Journal, said: &mut String, line: String) {
    if *said != line {
        journal.say(&line);
        *said = line;
    }
}

/// Asks a server; the offset in nanoseconds.
fn ask(name: &str, port: u16) -> io::Result<i128> {
    let address = (name, port).to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
    let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    // Answers of others are not even seen.
    socket.connect(address)?;
    let nonce = std::hash::RandomState::new().build_hasher().finish();
    let (sent, start) = (wall_nanos(), Instant::now());
    socket.send(&question(nonce))?;
    let mut bytes = [0; 512];
    loop {
        let left = ROUND_TRIP.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let count = match socket.recv(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        };
        // By the clock that nobody sets.
        let received = sent + start.elapsed().as_nanos().cast_signed();
        match offset(&bytes[..count], nonce, sent, received) {
            Err(TimeError::NotOurs) => {}
            other => return other.map_err(io::Error::other),
        }
    }
}

fn pause(time: Duration, stop: &AtomicBool) {
    let end = Instant::now() + time;
    while !stop.load(Ordering::Relaxed) && Instant::now() < end {
        std::thread::sleep(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(200)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 1 June 2026 and some nanoseconds.
    const NOW: i128 = 1_780_272_000 * NANOS + 123_456_789;

    fn ntp(unix: i128) -> u64 {
        let seconds = unix.div_euclid(NANOS) + NTP_TO_UNIX;
        let fraction = unix.rem_euclid(NANOS) * ERA / NANOS;
        (seconds as u64) << 32 | fraction as u64
    }

    fn answer(nonce: u64, arrived: i128, left: i128) -> Vec<u8> {
        let mut bytes = vec![0; MESSAGE_BYTES];
        (bytes[0], bytes[1]) = (4 << 3 | 4, 2);
        bytes[24..32].copy_from_slice(&nonce.to_be_bytes());
        bytes[32..40].copy_from_slice(&ntp(arrived).to_be_bytes());
        bytes[40..48].copy_from_slice(&ntp(left).to_be_bytes());
        bytes
    }

    #[test]
    fn an_answer_tells_how_far_the_clock_is_off() {
        let ms = |ms: i128| ms * 1_000_000;
        // 5 s ahead; 10 ms there, 2 ms at the server, 20 ms back.
        let bytes = answer(9, NOW + ms(5010), NOW + ms(5012));
        let found = offset(&bytes, 9, NOW, NOW + ms(32)).expect("good");
        assert!((found - ms(4995)).abs() < 10, "half of the difference of the two ways is what cannot be known: {found}");
        // After the year 2036.
        let later = (ERA - NTP_TO_UNIX + 1000) * NANOS;
        assert_eq!(unix_nanos(ntp(later)), later);
    }

    #[test]
    fn what_is_not_to_be_believed_is_not() {
        let good = answer(9, NOW, NOW);
        assert!(offset(&good, 9, NOW, NOW).is_ok());
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            offset(&bytes, 9, NOW, NOW)
        };
        assert_eq!(offset(&good, 8, NOW, NOW), Err(TimeError::NotOurs));
        assert_eq!(offset(&good[..47], 9, NOW, NOW), Err(TimeError::NotOurs));
        assert_eq!(changed(0, 4 << 3 | 3), Err(TimeError::NotOurs), "a client");
        assert_eq!(changed(0, 3 << 6 | 4 << 3 | 4), Err(TimeError::Unsynchronised));
        assert_eq!(changed(1, 0), Err(TimeError::Unsynchronised), "a kiss of death");
        assert_eq!(changed(1, 16), Err(TimeError::Unsynchronised));
        assert_eq!(offset(&answer(9, EARLIEST * NANOS - 1, NOW), 9, NOW, NOW), Err(TimeError::Impossible));
        assert_eq!(offset(&answer(9, NOW + 1000, NOW), 9, NOW, NOW), Err(TimeError::Impossible));
        assert_eq!(offset(&good, 9, NOW, NOW + 3 * NANOS), Err(TimeError::Slow));
    }

    #[test]
    fn the_clock_never_goes_back_but_at_first() {
        assert_eq!(decide(NANOS, false), Decision::Set);
        assert_eq!(decide(-NANOS, true), Decision::Set);
        assert_eq!(decide(-NANOS, false), Decision::LeaveAhead);
        assert_eq!(decide(-1000, true), Decision::Right);
    }

    #[test]
    fn a_server_is_asked_over_a_socket() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let port = server.local_addr().expect("address").port();
        let serve = std::thread::spawn(move || {
            let mut bytes = [0; 512];
            let (count, from) = server.recv_from(&mut bytes).expect("question");
            assert_eq!(count, MESSAGE_BYTES);
            let nonce = u64::from_be_bytes(bytes[40..48].try_into().expect("eight"));
            let now = wall_nanos() + 1000 * NANOS;
            // Somebody else's first.
            server.send_to(&answer(nonce ^ 1, now, now), from).expect("send");
            server.send_to(&answer(nonce, now, now), from).expect("send");
        });
        let found = ask("127.0.0.1", port).expect("an answer");
        serve.join().expect("server");
        assert!((found - 1000 * NANOS).abs() < NANOS, "{found}");
    }

    proptest! {
        #[test]
        fn no_answer_is_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..80), head in 0u8..64, stratum in 0u8..17) {
            let mut bytes = bytes;
            if bytes.len() >= MESSAGE_BYTES {
                (bytes[0], bytes[1]) = (head, stratum);
                bytes[24..32].copy_from_slice(&9u64.to_be_bytes());
            }
            if let Ok(found) = offset(&bytes, 9, NOW, NOW + 1000) {
                prop_assert!(found > -(NOW - EARLIEST * NANOS) - NANOS);
            }
        }
    }
}
