//! `dray`: the appliance and its command line; and, as a machine's first process, the image's PID 1.

fn main() -> std::process::ExitCode {
    if dray::init::is_first_process() {
        dray::init::main();
    }
    dray::cli::main()
}
