//! The floor under the rows at queue depth 1: two threads that poll, on the two cores, and do nothing but exchange what the
//! protocol exchanges. The machine's placement of the cores decides these as it decides those rows, so that their ratio tells
//! more than either.

use crate::machine::pin;
use crate::{Failure, Plan};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// 8-byte words of a submission queue entry, and of a completion queue entry.
const COMMAND: usize = 8;
const COMPLETION: usize = 2;
/// Bytes of a command capsule, of a C2HData's header, and of its data.
const CAPSULE: usize = 72;
const HEADER: usize = 24;
const DATA: usize = 4096;

#[repr(align(128))]
struct Line<const N: usize>([AtomicU64; N]);

impl<const N: usize> Line<N> {
    fn new() -> Self {
        Self([const { AtomicU64::new(0) }; N])
    }
}

/// Submission queue entry, doorbell, completion queue entry: a line each.
struct Rings {
    entry: Line<COMMAND>,
    bell: Line<1>,
    done: Line<COMPLETION>,
}

/// Commands per second at queue depth 1 whose entries are stored, rung, read and completed, and nothing else.
pub fn by_memory(plan: &Plan) -> Result<f64, Failure> {
    let other = plan.cores.second()?;
    let rings = Rings { entry: Line::new(), bell: Line::new(), done: Line::new() };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let far = scope.spawn(|| {
            let pinned = pin(other).map_err(|error| error.to_string());
            let mut last = 0;
            while !over.load(Ordering::Relaxed) {
                let bell = rings.bell.0[0].load(Ordering::Acquire);
                if bell == last {
                    std::hint::spin_loop();
                    continue;
                }
                last = bell;
                let sum = rings.entry.0.iter().fold(0, |sum: u64, word| sum.wrapping_add(word.load(Ordering::Relaxed)));
                rings.done.0[0].store(sum, Ordering::Relaxed);
                rings.done.0[1].store(bell, Ordering::Release);
            }
            pinned
        });
        let rate = plan.median(|| {
            let (begin, first) = (Instant::now(), rings.bell.0[0].load(Ordering::Relaxed));
            let mut number = first;
            while !far.is_finished() && (!number.is_multiple_of(64) || begin.elapsed() < plan.run_time()) {
                number += 1;
                rings.entry.0.iter().for_each(|word| word.store(number, Ordering::Relaxed));
                rings.bell.0[0].store(number, Ordering::Release);
                while rings.done.0[1].load(Ordering::Acquire) != number && !far.is_finished() {
                    std::hint::spin_loop();
                }
                if rings.done.0[0].load(Ordering::Relaxed) != number.wrapping_mul(COMMAND as u64) {
                    return Err("an entry came torn".into());
                }
            }
            Ok((number - first) as f64 / begin.elapsed().as_secs_f64())
        });
        over.store(true, Ordering::Relaxed);
        far.join().map_err(|_| "the far thread died")??;
        rate
    })
}

/// Reads per second at queue depth 1 over loopback TCP: a capsule's bytes one way, the data and its header the other.
pub fn by_tcp(plan: &Plan) -> Result<f64, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    for socket in [&near, &far] {
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
    }
    let other = plan.cores.second()?;
    std::thread::scope(|scope| {
        // Ends when the other end is closed.
        scope.spawn(move || {
            let (mut capsule, header, data) = ([0; CAPSULE], [1; HEADER], [2; DATA]);
            let _anywhere = pin(other);
            while fill(&mut far, &mut capsule).is_ok() {
                let answer = [IoSlice::new(&header), IoSlice::new(&data)];
                if !matches!(far.write_vectored(&answer), Ok(sent) if sent == HEADER + DATA) {
                    return;
                }
            }
        });
        let (capsule, mut answer) = ([3; CAPSULE], [0; HEADER + DATA]);
        let rate = plan.median(|| {
            let (begin, mut reads) = (Instant::now(), 0u32);
            while !reads.is_multiple_of(64) || begin.elapsed() < plan.run_time() {
                near.write_all(&capsule)?;
                fill(&mut near, &mut answer)?;
                reads += 1;
            }
            Ok(f64::from(reads) / begin.elapsed().as_secs_f64())
        });
        drop(near);
        rate
    })
}

/// Polls until the buffer is full.
fn fill(socket: &mut TcpStream, mut into: &mut [u8]) -> Result<(), Failure> {
    while !into.is_empty() {
        match socket.read(into) {
            Ok(0) => return Err("the other end has gone".into()),
            Ok(got) => into = &mut into[got..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
