//! `dray plugin inspect`, `check`, `bench` and `compile`: for people who write policies, or ship them.

use crate::core::clock::Clock;
use crate::core::ticker::TickerThread;
use dray_policy::conformance::{self, Finding};
use dray_policy::packed::REGION_BYTES;
use dray_policy::role::{Cdq, CdqQueue, Copy, Role, Tracking};
use dray_policy::seam::{Factory, NamespaceInfo, Opening, Setup};
use dray_sandbox::{Budget, Cpu, Inspection, Limits, Pin, Sandbox, SandboxConfig, SandboxRole, compile_ahead, inspect as look};
use miette::{Context, IntoDiagnostic, miette};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Calls per measured batch size.
const BENCH_CALLS: u32 = 2_000;

fn read(file: &Path) -> miette::Result<(Vec<u8>, Inspection)> {
    let bytes = std::fs::read(file).into_diagnostic().wrap_err_with(|| format!("cannot read {}", file.display()))?;
    let inspection = look(&bytes).map_err(|error| miette!("{}: {error}", file.display()))?;
    Ok((bytes, inspection))
}

/// Shows what a component is.
pub(super) fn inspect(file: &Path, as_json: bool) -> miette::Result<ExitCode> {
    let (_, found) = read(file)?;
    let roles: Vec<_> = found.roles.iter().map(|(role, version)| format!("{role} (dray:policy@{version})")).collect();
    if as_json {
        let imports: Vec<_> = found.imports.iter().map(|i| json!({ "name": i.name, "functions": i.functions })).collect();
        println!(
            "{}",
            json!({
                "file": file, "bytes": found.size, "sha256": found.sha256.to_string(), "state": found.has_state,
                "roles": found.roles.iter().map(|(r, v)| json!({ "role": r, "version": v })).collect::<Vec<_>>(),
                "imports": imports, "exports": found.exports,
            })
        );
        return Ok(ExitCode::SUCCESS);
    }
    println!("file      {} ({} bytes)", file.display(), found.size);
    println!("sha256    {}", found.sha256);
    println!("role      {}", if roles.is_empty() { "none of cdq, tracking, copy".into() } else { roles.join(", ") });
    println!("state     {}", if found.has_state { "handed to a successor" } else { "none" });
    for import in &found.imports {
        let functions = if import.functions.is_empty() { "types only".into() } else { import.functions.join(", ") };
        println!("import    {} ({functions})", import.name);
    }
    for export in &found.exports {
        println!("export    {export}");
    }
    Ok(ExitCode::SUCCESS)
}

/// A sandbox of its own for one file that an operator names.
fn load<R: SandboxRole>(file: &Path, bytes: &[u8]) -> miette::Result<(Box<dyn Factory<R>>, TickerThread)> {
    let budget = Budget::Time { call_ticks: 200, open_ticks: 2_000 };
    let config = SandboxConfig { budget, limits: Limits::default(), cache: None, compiled: None };
    let refused = |error| miette!("{}: {error}", file.display());
    let sandbox = Sandbox::new(&config).map_err(refused)?;
    let component = sandbox.load_bytes::<R>(&file.display().to_string(), bytes, &Pin::Unpinned).map_err(refused)?;
    let ticker = TickerThread::start(&sandbox).into_diagnostic()?;
    Ok((Box::new(component.factory()), ticker))
}

/// Compiles components ahead of time for a CPU.
pub(super) fn compile(files: &[PathBuf], cpu: Cpu, output: &Path) -> miette::Result<ExitCode> {
    // What calls may take is no part of the code; that it is time is.
    let budget = Budget::Time { call_ticks: 1, open_ticks: 1 };
    let config = SandboxConfig { budget, limits: Limits::default(), cache: None, compiled: None };
    for file in files {
        let (bytes, found) = read(file)?;
        role_of(file, &found)?;
        let code = compile_ahead(&config, cpu, &bytes, output).map_err(|error| miette!("{}: {error}", file.display()))?;
        let size = std::fs::metadata(&code).map_or(0, |code| code.len());
        println!("{} for {}: {} ({size} bytes)", file.display(), cpu.name(), code.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn role_of(file: &Path, found: &Inspection) -> miette::Result<String> {
    let role = found.roles.first().map(|(role, _)| role.clone());
    role.ok_or_else(|| miette!("{} exports none of the roles cdq, tracking, copy of dray:policy", file.display()))
}

/// Runs the conformance suite of the component's role.
pub(super) fn check(file: &Path) -> miette::Result<ExitCode> {
    let (bytes, found) = read(file)?;
    let role = role_of(file, &found)?;
    let findings: Vec<Finding> = match role.as_str() {
        "cdq" => conformance::suite_cdq(load::<Cdq>(file, &bytes)?.0.as_mut()),
        "tracking" => conformance::suite_tracking(load::<Tracking>(file, &bytes)?.0.as_mut()),
        _ => conformance::suite_copy(load::<Copy>(file, &bytes)?.0.as_mut()),
    };
    if findings.is_empty() {
        println!("{}: conforms to {role} of dray:policy", file.display());
        return Ok(ExitCode::SUCCESS);
    }
    for finding in &findings {
        println!("{finding}");
    }
    println!("{}: {} findings", file.display(), findings.len());
    Ok(ExitCode::FAILURE)
}

fn setup(regions: u32) -> Setup {
    let blocks = u64::from(regions) << 14;
    Setup {
        migration: 1,
        seed: 1,
        now_us: 0,
        namespaces: vec![NamespaceInfo { nsid: 1, blocks, block_bytes: 4096 }],
        regions,
        region_bytes: REGION_BYTES as u32,
        settings: Vec::new(),
    }
}

/// Measures what calls cost.
pub(super) fn bench(file: &Path) -> miette::Result<ExitCode> {
    let (bytes, found) = read(file)?;
    match role_of(file, &found)?.as_str() {
        "cdq" => bench_cdq(file, &bytes)?,
        "tracking" => bench_regions::<Tracking>(file, &bytes, |request, regions| request.regions = regions)?,
        _ => bench_regions::<Copy>(file, &bytes, |request, regions| {
            request.left_blocks = 1 << 20;
            request.downtime_budget_us = 10_000;
            request.downtime_estimate_us = 1_000_000;
            request.regions = regions;
        })?,
    }
    Ok(ExitCode::SUCCESS)
}

fn time<R: SandboxRole>(
    factory: &mut dyn Factory<R>,
    opening: &Opening<R>,
    request: &R::Request,
) -> miette::Result<f64> {
    let mut policy = factory.open(opening, None).map_err(|fault| miette!("does not open: {fault}"))?;
    let mut answer = R::Answer::default();
    let clock = Clock::new();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = clock.now();
        for _ in 0..BENCH_CALLS / 5 {
            R::clear(&mut answer);
            policy.call(request, &mut answer).map_err(|fault| miette!("faults: {fault}"))?;
        }
        best = best.min(clock.now().ns_since(start) as f64 / f64::from(BENCH_CALLS / 5));
    }
    Ok(best)
}

fn bench_cdq(file: &Path, bytes: &[u8]) -> miette::Result<()> {
    use dray_nvme::cdq::{UDMQ_ENTRY_BYTES, UDMQ_PHASE_BYTE, UDMQ_PHASE_MASK, UdmqEntry};
    use zerocopy::IntoBytes;
    let (mut factory, _ticker) = load::<Cdq>(file, bytes)?;
    let queue = CdqQueue {
        id: 1,
        kind: 0,
        cntlid: 2,
        slots: 8192,
        entry_bytes: UDMQ_ENTRY_BYTES as u32,
        phase_byte: UDMQ_PHASE_BYTE as u32,
        phase_mask: UDMQ_PHASE_MASK,
    };
    let opening = Opening { setup: setup(1024), extra: queue };
    println!("batch     ns/entry      ns/call   (three of four entries adjacent to the last)");
    for batch in [1u32, 8, 64, 512, 4096] {
        let mut request = <Cdq as Role>::Request::default();
        for i in 0..batch {
            let slba = u64::from(i / 4) * 1024 + u64::from(i % 4) * 8;
            request.entries.extend_from_slice(UdmqEntry::range(1, slba, 7, false).with_phase(true).as_bytes());
        }
        let ns = time(factory.as_mut(), &opening, &request)?;
        println!("{batch:>5} {:>12.1} {ns:>12.0}", ns / f64::from(batch));
    }
    Ok(())
}

fn bench_regions<R: SandboxRole<Extra = ()>>(
    file: &Path,
    bytes: &[u8],
    fill: impl Fn(&mut R::Request, Vec<u8>),
) -> miette::Result<()> {
    use dray_policy::packed::Region;
    let (mut factory, _ticker) = load::<R>(file, bytes)?;
    println!("regions      µs/call");
    for regions in [1u32, 64, 1024, 4096] {
        let mut packed = Vec::new();
        for i in 0..regions {
            let region = Region {
                slba: u64::from(i) << 14,
                nsid: 1,
                blocks: 1 << 14,
                dirty: if i % 3 == 0 { 4096 } else { 0 },
                changed: i % 7 * 100,
                idle_ms: i * 10,
                first_copy_open: false,
                held: false,
            };
            region.push(&mut packed);
        }
        let mut request = R::Request::default();
        fill(&mut request, packed);
        let ns = time(factory.as_mut(), &Opening { setup: setup(regions), extra: () }, &request)?;
        println!("{regions:>7} {:>12.1}", ns / 1e3);
    }
    Ok(())
}
