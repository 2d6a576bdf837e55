//! What an appliance's polling core costs that has nothing to do, and how soon it is at work again.
//!
//! Over NVMe/TCP a command wakes it. Doorbells in mapped memory wake nobody: it looks at them from time to time.

use crate::far::{Far, OverTcp, OverVfioUser};
use crate::load::{BLOCK, Commands, Load, disk};
use crate::machine::pin;
use crate::report::Report;
use crate::{Failure, Plan};
use dray::config::Idle;
use dray_controller::MemoryBacking;
use dray_device::backing::Backing;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of the namespace, which is not the matter here.
const BYTES: u64 = 16 << 20;
/// Idle before a command that must wake the core: many times what it takes to fall asleep.
const PAUSE: Duration = Duration::from_millis(25);

/// All rows of this module.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    if plan.wants_any(&["idle.cpu", "idle.wake"]) {
        report.add("calib.wake", bare_wake(plan)?, "us", "a byte over loopback TCP to a thread that blocks, and back");
        let (far, ran) = far(plan);
        let OverTcp { mut queue, mut load, admin, core } = OverTcp::new(&far, backing()?, None)?;
        let mut idle = Core { plan, ran, ended: 0 };
        let (cpu, wakes) = idle.measure(&mut queue, &mut load)?;
        report.add("idle.cpu", cpu, "%", "of a core, by its thread's clock; an NVMe/TCP target with a client");
        report.add("idle.wake", wakes.median, "us", format!("a whole read over loopback TCP; 90 % below {:.0}", wakes.most));
        OverTcp { queue, load, admin, core }.end(idle.ended)?;
    }
    if plan.wants_any(&["idle.cpu.mapped", "idle.wake.mapped"]) {
        let (far, ran) = far(plan);
        let mut near = OverVfioUser::new(&far, backing()?, None)?;
        let mut idle = Core { plan, ran, ended: 0 };
        let (cpu, wakes) = idle.measure(&mut near.queue, &mut near.load)?;
        report.add("idle.cpu.mapped", cpu, "%", "of a core, by its thread's clock; a vfio-user server with a client");
        let note = format!("a whole read; 90 % below {:.3}", wakes.most / 1e3);
        report.add("idle.wake.mapped", wakes.median / 1e3, "ms", note);
        near.end(idle.ended)?;
    }
    Ok(())
}

/// µs for a byte to a thread that sleeps on its socket, and back: what the kernel and the machine need for a wake-up.
fn bare_wake(plan: &Plan) -> Result<f64, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut sleeper, _) = listener.accept()?;
    near.set_nodelay(true)?;
    sleeper.set_nodelay(true)?;
    near.set_nonblocking(true)?;
    let core = plan.cores.second()?;
    // Ends when the other end is closed.
    let echo = std::thread::spawn(move || {
        let _anywhere = pin(core);
        let mut byte = [0];
        while sleeper.read_exact(&mut byte).is_ok() && sleeper.write_all(&byte).is_ok() {}
    });
    let mut wakes = Vec::new();
    for _ in 0..if plan.quick { 5 } else { 101 } {
        std::thread::sleep(PAUSE);
        let begin = Instant::now();
        near.write_all(&[1])?;
        loop {
            match near.read(&mut [0]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Ok(1) => break,
                other => return Err(format!("the echo is {other:?}").into()),
            }
        }
        wakes.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    drop(near);
    echo.join().map_err(|_| "the echoing thread died")?;
    wakes.sort_by(f64::total_cmp);
    Ok(wakes[wakes.len() / 2])
}

fn far(plan: &Plan) -> (Far, Arc<AtomicU64>) {
    let ran = Arc::new(AtomicU64::new(0));
    (Far { idle: Idle::Adaptive, ran: Some(Arc::clone(&ran)), ..Far::spinning(plan.cores) }, ran)
}

fn backing() -> Result<Box<dyn Backing>, Failure> {
    Ok(Box::new(MemoryBacking::with_memory(disk(BYTES)?, BLOCK as u32)?))
}

/// µs.
struct Wakes {
    median: f64,
    /// Nine of ten are below it.
    most: f64,
}

struct Core<'a> {
    plan: &'a Plan,
    ran: Arc<AtomicU64>,
    ended: u64,
}

impl Core<'_> {
    /// Percent of the core after a second of idleness, and what a read takes then.
    fn measure<Q: Commands>(&mut self, queue: &mut Q, load: &mut Load) -> Result<(f64, Wakes), Failure> {
        let second = Duration::from_millis(if self.plan.quick { 50 } else { 1_000 });
        self.read(queue, load)?;
        let cpu = self.plan.median(|| {
            std::thread::sleep(second);
            let (begin, ran) = (Instant::now(), self.ran.load(Ordering::Relaxed));
            std::thread::sleep(second);
            let ran = self.ran.load(Ordering::Relaxed) - ran;
            Ok(ran as f64 / begin.elapsed().as_nanos() as f64 * 100.0)
        })?;
        let mut wakes = Vec::new();
        for _ in 0..if self.plan.quick { 5 } else { 101 } {
            std::thread::sleep(PAUSE);
            wakes.push(self.read(queue, load)?);
        }
        wakes.sort_by(f64::total_cmp);
        Ok((cpu, Wakes { median: wakes[wakes.len() / 2], most: wakes[wakes.len() * 9 / 10] }))
    }

    /// µs that a read takes.
    fn read<Q: Commands>(&mut self, queue: &mut Q, load: &mut Load) -> Result<f64, Failure> {
        self.ended += 1;
        load.once(queue)
    }
}
