//! What the figures should be: a bound is what must hold, a goal is where the work aims.

/// Which side of a number is the right one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Not less.
    Least(f64),
    /// Not more.
    Most(f64),
    /// Not less than a share of a calibration row of the same run.
    LeastOf(f64, &'static str),
}

/// The bound of one row and its goal.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    name: &'static str,
    /// What must hold.
    pub bound: Bound,
    /// Where the work aims, where that is more.
    pub goal: Option<f64>,
}

const fn least(name: &'static str, bound: f64, goal: Option<f64>) -> Target {
    Target { name, bound: Bound::Least(bound), goal }
}

const fn most(name: &'static str, bound: f64, goal: Option<f64>) -> Target {
    Target { name, bound: Bound::Most(bound), goal }
}

const fn share(name: &'static str, share: f64, of: &'static str, goal: f64) -> Target {
    Target { name, bound: Bound::LeastOf(share, of), goal: Some(goal) }
}

const TARGETS: &[Target] = &[
    share("loopback.randread.qd1", 0.3, "calib.read4k", 1.3e6),
    share("loopback.randread.qd32", 0.5, "calib.read4k", 2.0e6),
    share("loopback.randwrite.qd1", 0.25, "calib.write4k", 1.6e6),
    share("loopback.randwrite.qd32", 0.45, "calib.write4k", 3.0e6),
    least("loopback.null.qd32", 6e6, Some(10e6)),
    most("cdq.native.512", 6.0, Some(4.0)),
    most("cdq.policy.512", 9.0, Some(6.0)),
    most("cdq.policy.64", 14.0, Some(10.0)),
    most("dirty.mark.random", 20.0, None),
    most("dirty.scan.empty.16tib", 1.0, None),
    most("dirty.memory", 1.02, None),
    least("copy.memory", 5_000.0, Some(7_000.0)),
    most("copy.guest.p99.ratio", 5.0, Some(2.0)),
    most("copy.guest.p99", 50.0, Some(20.0)),
    least("copy.guest.rate", 3_500.0, None),
    most("migrate.downtime.2k", 3_000.0, Some(500.0)),
    most("migrate.downtime.20k", 10_000.0, Some(2_000.0)),
    most("migrate.downtime.2k.file", 10_000.0, None),
    most("migrate.downtime.20k.file", 10_000.0, None),
    least("migrate.converge.60k", 1.0, None),
    least("migrate.unbounded", 1.0, None),
    least("vfio_user.randread.qd1", 0.85e6, Some(0.95e6)),
    share("vfio_user.randread.qd32", 0.5, "calib.read4k", 2.2e6),
    least("vfio_user.randwrite.qd1", 1.25e6, Some(1.35e6)),
    least("vfio_user.randwrite.qd32", 3.0e6, Some(3.4e6)),
    least("vfio_user.null.qd1", 1.6e6, Some(1.8e6)),
    least("vfio_user.null.qd128", 10e6, Some(12e6)),
    least("nvme_tcp.randread.qd1", 95e3, Some(105e3)),
    least("nvme_tcp.randread.qd128", 0.85e6, Some(0.95e6)),
    least("nvme_tcp.randwrite.qd128", 1.05e6, Some(1.15e6)),
    most("idle.cpu", 2.0, None),
    most("idle.wake", 80.0, None),
    most("idle.cpu.mapped", 5.0, None),
    most("idle.wake.mapped", 1.0, None),
    most("policy.trap.recover", 50.0, Some(20.0)),
    least("sim.seeds", 100.0, Some(1_000.0)),
];

/// The target of a row, if it has one.
pub fn of(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// The calibration rows that bounds refer to.
pub fn calibration(wanted: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let of = |target: &Target| match target.bound {
        Bound::LeastOf(_, of) if wanted(target.name) => Some(of),
        _ => None,
    };
    TARGETS.iter().filter_map(of).collect()
}
