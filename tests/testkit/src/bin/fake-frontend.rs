//! A fake vLLM frontend: handshake, DP coordinator, API servers, and some load. Reports JSON lines.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, FrontendOptions, NewRequest};
use dp_sidecar_testkit::{Reporter, VllmVersion, launcher, msg};
use serde_json::json;

/// Plays `vllm serve MODEL --data-parallel-size N --data-parallel-size-local 0`.
#[derive(Debug, Parser)]
struct Arguments {
    /// Handshake address to bind.
    #[arg(long, default_value = "127.0.0.1")]
    data_parallel_address: String,
    /// Handshake port to bind.
    #[arg(long, default_value_t = 29550)]
    data_parallel_rpc_port: u16,
    /// How many engines must come.
    #[arg(long, default_value_t = 2)]
    data_parallel_size: u16,
    /// How many API servers.
    #[arg(long, default_value_t = 1)]
    api_server_count: usize,
    /// Mixture of experts.
    #[arg(long)]
    moe: bool,
    /// vLLM version to play.
    #[arg(long, default_value_t = VllmVersion::default())]
    vllm_version: VllmVersion,
    /// What this frontend computes for its parallel flags.
    #[arg(long, default_value = "fake-parallel-config")]
    hash: String,
    /// How many requests in all; they are spread over the API servers.
    #[arg(long, default_value_t = 8)]
    requests: u64,
    /// Requests in flight at once.
    #[arg(long, default_value_t = 4)]
    concurrency: u64,
    /// Tokens per request.
    #[arg(long, default_value_t = 16)]
    max_tokens: u32,
    /// Utility method without arguments to call on all engines first.
    #[arg(long)]
    utility: Option<String>,
    /// How long to wait for the engines, in seconds.
    #[arg(long, default_value_t = 600)]
    startup_timeout: u64,
    /// How long a request may take, in seconds.
    #[arg(long, default_value_t = 60)]
    request_timeout: u64,
    /// Keep reading after the load, until SIGTERM.
    #[arg(long)]
    hold: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let signals = launcher::signals();
    let reporter = Reporter::stdout();
    match play(&arguments, &reporter, &signals) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            reporter.report("died", json!({"error": error.to_string()}));
            ExitCode::FAILURE
        }
    }
}

fn play(
    arguments: &Arguments,
    reporter: &Reporter,
    signals: &std::sync::mpsc::Receiver<nix::sys::signal::Signal>,
) -> Result<(), FrontendError> {
    let mut frontend = FakeFrontend::bind(
        FrontendOptions {
            size: arguments.data_parallel_size,
            address: format!(
                "tcp://{}:{}",
                arguments.data_parallel_address, arguments.data_parallel_rpc_port
            ),
            api_servers: arguments.api_server_count,
            moe: arguments.moe,
            version: arguments.vllm_version,
            parallel_config_hash: arguments.hash.clone(),
            named_inputs: None,
        },
        reporter.clone(),
    )?;
    reporter.report("listening", json!({"address": frontend.address()}));
    frontend.startup(Duration::from_secs(arguments.startup_timeout))?;
    let limit = Duration::from_secs(arguments.request_timeout);
    if let Some(method) = &arguments.utility {
        let values = frontend.server().call_all(method, &[], limit)?;
        let values: Vec<_> = values.iter().map(msg::to_json).collect();
        reporter.report("utility", json!({"method": method, "results": values}));
    }
    let mut sent = 0;
    let mut stopped = false;
    let mut last_progress = Instant::now();
    let mut finished_before = 0;
    loop {
        stopped |= signals.try_recv().is_ok();
        let finished: u64 = frontend
            .servers
            .iter()
            .flat_map(|server| server.requests().values())
            .filter(|request| request.finish.is_some())
            .count() as u64;
        if finished != finished_before {
            (finished_before, last_progress) = (finished, Instant::now());
        }
        let all = finished >= arguments.requests;
        if stopped || (all && !arguments.hold) {
            reporter.report("done", json!({"finished": finished, "sent": sent}));
            return Ok(());
        }
        if !all && last_progress.elapsed() > limit {
            return Err(FrontendError::Timeout {
                what: format!("progress after {finished} of {} requests", arguments.requests),
                limit,
            });
        }
        let servers = frontend.servers.len() as u64;
        while sent < arguments.requests && sent - finished < arguments.concurrency {
            let request =
                NewRequest::new(format!("fake-{}-{sent}", std::process::id()), arguments.max_tokens);
            let server = usize::try_from(sent % servers).unwrap_or_default();
            frontend.servers[server].add(&request)?;
            sent += 1;
        }
        let slice = Duration::from_millis(if all { 20 } else { 1 });
        for server in &mut frontend.servers {
            server.pump_for(slice)?;
        }
    }
}
