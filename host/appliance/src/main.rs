//! `dray`: the appliance and its command line.

fn main() -> std::process::ExitCode {
    dray::cli::main()
}
