//! Fake vLLM engines in one process, for scale, faults and speed.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use dp_sidecar_testkit::engine::{EngineOptions, Faults};
use dp_sidecar_testkit::{Reporter, VllmVersion, launcher};

/// Fake vLLM engine cores; they report JSON lines on stdout.
#[derive(Debug, Parser)]
struct Arguments {
    /// Handshake address, e.g. tcp://127.0.0.1:29550.
    #[arg(long)]
    handshake: String,
    /// First data parallel rank.
    #[arg(long, default_value_t = 0)]
    rank: u16,
    /// How many engines, with ranks from --rank on.
    #[arg(long, default_value_t = 1)]
    count: u16,
    /// --data-parallel-size; default: rank + count.
    #[arg(long)]
    size: Option<u16>,
    /// Mixture of experts: the ranks step in lockstep.
    #[arg(long)]
    moe: bool,
    /// vLLM version to play.
    #[arg(long, default_value_t = VllmVersion::default())]
    vllm_version: VllmVersion,
    /// Directory of the "weights".
    #[arg(long)]
    model: Option<PathBuf>,
    /// Tokens of a response that does not say how many.
    #[arg(long, default_value_t = 16)]
    tokens: u32,
    /// Tokens per step and request.
    #[arg(long, default_value_t = 1)]
    tokens_per_step: u32,
    /// Duration of a step.
    #[arg(long, default_value_t = 2)]
    step_ms: u64,
    /// Duration of a load.
    #[arg(long, default_value_t = 0)]
    load_ms: u64,
    /// Size of the buffer that loads copy to, in MiB.
    #[arg(long, default_value_t = 16)]
    load_buffer_mb: usize,
    /// What READY says about the parallel flags.
    #[arg(long, default_value = "fake-parallel-config")]
    hash: String,
    /// Faults, e.g. `1@die:mid-request,slow:20`.
    #[arg(long, default_value = "")]
    faults: String,
    /// Directory of control files named `rank-<rank>`.
    #[arg(long)]
    control: Option<PathBuf>,
    /// Report nothing but the end.
    #[arg(long)]
    quiet: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let signals = launcher::signals();
    let reporter = if arguments.quiet { Reporter::quiet() } else { Reporter::stdout() };
    let ranks = arguments.rank..arguments.rank.saturating_add(arguments.count);
    let mut all = Vec::new();
    for rank in ranks.clone() {
        let faults = match Faults::for_rank(&arguments.faults, rank) {
            Ok(faults) => faults,
            Err(error) => {
                eprintln!("--faults: {error}");
                return ExitCode::from(64);
            }
        };
        all.push(EngineOptions {
            rank,
            size: arguments.size.unwrap_or(ranks.end),
            moe: arguments.moe,
            version: arguments.vllm_version,
            handshake: arguments.handshake.clone(),
            model: arguments.model.clone(),
            tokens: arguments.tokens,
            tokens_per_step: arguments.tokens_per_step,
            step: Duration::from_millis(arguments.step_ms),
            load: Duration::from_millis(arguments.load_ms),
            load_buffer: arguments.load_buffer_mb << 20,
            parallel_config_hash: arguments.hash.clone(),
            faults,
            control: arguments.control.clone(),
            ..EngineOptions::default()
        });
    }
    launcher::run_engines(all, &reporter, &signals)
}
