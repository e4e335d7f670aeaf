//! Entry point: parses the command line and hands over.
fn main() -> std::process::ExitCode {
    dp_sidecar::cli::main()
}
