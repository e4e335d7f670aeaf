//! `vllm` for those who start it: `fake-vllm serve MODEL --headless ...` is a fake engine core,
//! without `--headless` it is a fake frontend. See `launcher::options_from_environment`.

use std::process::ExitCode;

use dp_sidecar_testkit::argv::ServeCommand;
use dp_sidecar_testkit::{Reporter, VllmVersion, launcher};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("--version" | "-v") => {
            let version =
                std::env::var("FAKE_VLLM_VERSION").unwrap_or_else(|_| VllmVersion::default().to_string());
            println!("{version}");
            ExitCode::SUCCESS
        }
        Some("serve") => match ServeCommand::parse(&args[1..]) {
            Ok(command) => serve(&command),
            Err(error) => {
                eprintln!("fake-vllm: {error}");
                ExitCode::from(2)
            }
        },
        _ => {
            eprintln!("usage: fake-vllm serve MODEL [--headless] [vLLM flags]");
            ExitCode::from(2)
        }
    }
}

fn serve(command: &ServeCommand) -> ExitCode {
    let signals = launcher::signals();
    let reporter = Reporter::stdout();
    if !command.headless {
        return match launcher::run_frontend(command, &reporter, &signals) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                reporter.report("died", serde_json::json!({"error": error}));
                ExitCode::FAILURE
            }
        };
    }
    let engine_core = std::env::var("FAKE_VLLM_ROLE").as_deref() == Ok("engine-core");
    if !engine_core && std::env::var("FAKE_VLLM_FORK").as_deref() != Ok("0") {
        return launcher::run_as_launcher(&reporter, &signals);
    }
    let ranks = command.start_rank..command.start_rank.saturating_add(command.local());
    let all: Result<Vec<_>, String> =
        ranks.map(|rank| launcher::options_from_environment(command, rank)).collect();
    match all {
        Ok(all) => launcher::run_engines(all, &reporter, &signals),
        Err(error) => {
            eprintln!("fake-vllm: {error}");
            ExitCode::from(2)
        }
    }
}
