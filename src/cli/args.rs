//! The command line, as clap sees it.

mod sleep;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, Args, Parser, Subcommand};
use dp_sidecar_protocol::machine::weight_update::PauseMode;

use sleep::{SLEEP, WAKE};
pub(super) use sleep::{SleepArgs, WakeArgs};

use super::children::{KeeperArgs, RelayArgs};
use super::values::{ModelKind, Source, model_kind, parse_lora, parse_rename, parse_source, pause_mode};
use crate::api::{AdapterChange, Retain};
use crate::config::{Lifeline, LogFormat};
use crate::duration;
use crate::memory::parse_bytes;

const EXAMPLES: &str = "\
Examples:
  Two engines on this node and one frontend, in one command:
    sidecar --dp-rank 0 -dp 2 --serve --port 8000 -- Qwen/Qwen3-8B --max-model-len 8192

  The same engines, with frontends of your own (start them before or after):
    sidecar --dp-rank 0 -dp 2 --frontend 127.0.0.1:29551 -- Qwen/Qwen3-8B
    vllm serve Qwen/Qwen3-8B --data-parallel-size 2 --data-parallel-size-local 0 \\
        --data-parallel-address 127.0.0.1 --data-parallel-rpc-port 29551 --port 8000

  Two nodes with two ranks each; rank 0's node leads, and listens at the address of --leader (start them in
  any order, with the same flags after `--`; the token file holds the same secret on all nodes):
    sidecar --dp-rank 0 -dp 4 -dpl 2 --leader node0:29560 --auth-token-file token --serve -- MODEL
    sidecar --dp-rank 2 -dp 4 -dpl 2 --leader node0:29560 --auth-token-file token -- MODEL

  Engines that are started separately (`vllm serve ... --headless` with the same address and port):
    sidecar --dp-rank 0 -dp 2 -dpa 127.0.0.1 -dpp 29550 --model-kind dense

  While it runs:
    sidecar status --watch
    sidecar update --path /models/step-200 --version step-200
    sidecar frontend add 127.0.0.1:29552
    sidecar sleep --level 2 (and --help: the sequence of colocated training)
    sidecar stop

What would be started, and where each value comes from:
    sidecar --dp-rank 0 -dp 2 --dry-run -- Qwen/Qwen3-8B

Every option of `run` can also be given as SIDECAR_<NAME> (SIDECAR_DP_RANK=0); a flag wins.
vLLM's own short forms work: -dp -dpl -dpa -dpp -dpr -asc.
All options of `run`: sidecar run --help. Exit codes: sidecar --help.";

const USAGE: &str = "sidecar [run] --dp-rank R [OPTIONS] [-- MODEL [VLLM FLAGS]...]
       sidecar <COMMAND> [OPTIONS]";

/// Default of `sidecar drain --limit`.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(600);
/// The one option of `run` that is for a single command line.
pub(super) const DRY_RUN: &str = "dry-run";

/// The examples and the exit codes.
fn long_help() -> String {
    let mut text = format!("{EXAMPLES}\n\nExit codes:\n");
    for (code, meaning) in crate::exit_code::TABLE {
        text.push_str(&format!("  {code:>3}  {meaning}\n"));
    }
    text.push_str("  128+n  ended by signal n");
    text
}

/// Hosts vLLM data-parallel engines on this node: starts and supervises them, lets unmodified vLLM
/// frontends come and go, and updates the weights of all engines as one transaction.
#[derive(Debug, Parser)]
#[command(
    name = "sidecar",
    version,
    override_usage = USAGE,
    after_help = EXAMPLES,
    after_long_help = long_help(),
    disable_help_subcommand = true,
    max_term_width = 110
)]
pub(super) struct Cli {
    /// What to do; `run` if none is named.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Host engines (the default).
    Run(Box<RunArgs>),
    /// Put new weights into all engines, as one transaction.
    Update(UpdateArgs),
    /// Show engines, frontends, weights and devices of the running sidecar.
    Status(StatusArgs),
    /// Pause all engines until `resume`.
    Pause(PauseArgs),
    /// Resume all engines.
    Resume(Target),
    /// Free memory of the devices of all engines until `wake`.
    #[command(long_about = SLEEP)]
    Sleep(SleepArgs),
    /// Wake up all engines, or parts of their memory, after a sleep.
    #[command(long_about = WAKE)]
    Wake(WakeArgs),
    /// Versions of the sidecar, its relay processes, the engines and the weights.
    Version(VersionArgs),
    /// Frontends: attach, detach, list.
    Frontend(FrontendArgs),
    /// Hold new requests and wait until none is running.
    #[command(long_about = DRAIN)]
    Drain(DrainArgs),
    /// Drain, then stop the sidecar and everything it started.
    Stop(StopArgs),
    /// The process that owns the vLLM processes. Started by the sidecar.
    #[command(hide = true)]
    Keeper(KeeperArgs),
    /// The process that owns the data path of a node. Started by the keeper.
    #[command(hide = true)]
    Relay(RelayArgs),
}

/// `sidecar run`.
#[derive(Debug, Args)]
#[command(override_usage = USAGE, after_help = EXAMPLES, after_long_help = long_help(), mut_args = with_variable)]
pub(super) struct RunArgs {
    #[command(flatten, next_help_heading = "Deployment")]
    pub deployment: DeploymentArgs,
    #[command(flatten, next_help_heading = "Nodes")]
    pub nodes: NodesArgs,
    #[command(flatten, next_help_heading = "Frontends")]
    pub frontends: FrontendsArgs,
    #[command(flatten, next_help_heading = "Processes")]
    pub processes: ProcessArgs,
    #[command(flatten, next_help_heading = "Weights")]
    pub weights: WeightArgs,
    #[command(flatten, next_help_heading = "Bounds")]
    pub bounds: BoundArgs,
    /// The model and vLLM's flags, unchanged. Without them the sidecar waits for engines that are started separately.
    #[arg(last = true, value_name = "MODEL [VLLM FLAGS]")]
    pub vllm: Vec<String>,
}

/// Every option of `run` can also be given as a variable: `SIDECAR_DP_RANK` for `--dp-rank`.
fn with_variable(option: Arg) -> Arg {
    match option.get_long() {
        Some(name) if name != DRY_RUN => {
            let variable = format!("SIDECAR_{}", name.to_uppercase().replace('-', "_"));
            option.env(variable)
        }
        _ => option,
    }
}

#[derive(Debug, Args)]
pub(super) struct DeploymentArgs {
    /// First DP rank of this node (vLLM: --data-parallel-start-rank, -dpr).
    #[arg(long, visible_alias = "data-parallel-start-rank", value_name = "R")]
    pub dp_rank: Option<u16>,

    /// DP ranks of the whole deployment (-dp).
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub data_parallel_size: u16,

    /// DP ranks of this node (-dpl); all, if this is the node of rank 0 and there is no --leader.
    #[arg(long, value_name = "L")]
    pub data_parallel_size_local: Option<u16>,

    /// Handshake address for engines that are started separately (-dpa).
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDR")]
    pub data_parallel_address: String,

    /// Port of that address (-dpp).
    #[arg(long, default_value_t = 29550, value_name = "P")]
    pub data_parallel_rpc_port: u16,

    /// Whether the ranks are independent (dense) or step in lockstep (MoE). `auto` counts the
    /// experts in the model's configuration, as vLLM does, and has vLLM's Python fetch that if it is
    /// not in the Hugging Face cache.
    #[arg(long, value_parser = model_kind(), default_value = "auto")]
    pub model_kind: ModelKind,

    /// Model whose configuration gives the kind, when the sidecar does not start the engines.
    #[arg(long, value_name = "PATH")]
    pub model: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct NodesArgs {
    /// With several nodes: address at which the sidecar of rank 0 listens for the others.
    #[arg(long, value_name = "HOST:PORT")]
    pub leader: Option<String>,

    /// File with the secret that all nodes of the deployment share, at least 16 bytes. Used for mutual
    /// authentication of nodes only; never sent over the network.
    #[arg(long, value_name = "FILE")]
    pub auth_token_file: Option<PathBuf>,

    /// Accept uploads and updates over HTTP at this address, on the node of rank 0. [default: off]
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Option<String>,

    /// File with the bearer token of HTTP clients, at least 16 bytes: not the secret of the nodes, since clients send
    /// it in clear. Required for other addresses than loopback. [default: a token that is made for it, in the file
    /// http-token of the state directory]
    #[arg(long, value_name = "FILE", requires = "http")]
    pub http_token_file: Option<PathBuf>,

    /// Name by which HTTP clients call this host, as in the URL, without a port. Repeatable. IP addresses, localhost, the
    /// name of this host and that of --http are always accepted; requests to any other name are refused.
    #[arg(long, value_name = "NAME", requires = "http", value_delimiter = ',')]
    pub http_name: Vec<String>,

    /// Address at which other nodes reach this one. [default: that of its connection to the leader; on
    /// the leader's node the host of --leader]
    #[arg(long, value_name = "IP")]
    pub peer_address: Option<IpAddr>,

    /// How long engines keep running without a leader before their sidecar stops them and exits (exit code 7).
    #[arg(long, default_value = "600s", value_parser = duration::parse, value_name = "TIME")]
    pub leader_timeout: Duration,
}

#[derive(Debug, Args)]
pub(super) struct FrontendsArgs {
    /// Attach to the frontend with this handshake address as soon as it is reachable, and again whenever it
    /// comes back. Repeatable; at runtime: `sidecar frontend add`.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub frontend: Vec<String>,

    /// Frontend API servers that can be attached at the same time. vLLM starts one for each DP rank unless
    /// --api-server-count says otherwise. [default: those of two such frontends, at least 8; beyond 32 ranks 64, or
    /// those of one]
    #[arg(long, value_name = "K")]
    pub frontend_slots: Option<u32>,

    /// Also start and supervise one frontend.
    #[arg(long)]
    pub serve: bool,

    /// HTTP port of that frontend.
    #[arg(long, value_name = "PORT", requires = "serve")]
    pub port: Option<u16>,

    /// HTTP host of that frontend.
    #[arg(long, value_name = "HOST", requires = "serve")]
    pub host: Option<String>,

    /// API server processes of that frontend (-asc).
    #[arg(long, value_name = "N", requires = "serve")]
    pub api_server_count: Option<u32>,
}

#[derive(Debug, Args)]
pub(super) struct ProcessArgs {
    /// The vllm program.
    #[arg(long, default_value = "vllm", value_name = "PATH")]
    pub vllm_bin: PathBuf,

    /// Devices of this node, in order; by default those of CUDA_VISIBLE_DEVICES (HIP_, ROCR_), or
    /// all that NVML counts.
    #[arg(long, value_name = "IDS")]
    pub device_ids: Option<String>,

    /// Time limit for the start of an engine.
    #[arg(long, default_value = "1800s", value_parser = duration::parse, value_name = "TIME")]
    pub startup_timeout: Duration,

    /// How long running requests may take to finish when everything is stopped.
    #[arg(long, default_value = "20s", value_parser = duration::parse, value_name = "TIME")]
    pub shutdown_timeout: Duration,

    /// Additional grace period before SIGKILL.
    #[arg(long, default_value = "10s", value_parser = duration::parse, value_name = "TIME")]
    pub kill_grace: Duration,

    /// How long vLLM keeps running without a sidecar before it is stopped.
    #[arg(long, default_value = "60s", value_parser = duration::parse, value_name = "TIME")]
    pub orphan_grace: Duration,

    /// On SIGTERM or SIGINT exit without stopping anything else: engines, frontends and requests continue for
    /// --orphan-grace, and the next sidecar with this state directory takes them over.
    ///
    /// New requests are held meanwhile, and running requests may finish before the sidecar exits, within
    /// --shutdown-timeout; those that take longer continue without it. `sidecar stop` and the end of the lifeline
    /// stop everything all the same. The exit code is 0.
    #[arg(long)]
    pub keep_engines: bool,

    /// Restarts of a rank (of the group, for MoE) in a row before the sidecar gives up.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub max_restarts: u32,

    /// Stop as on SIGTERM when this pipe is closed (for ssh, Ray actors and other launchers).
    #[arg(long, value_enum, default_value_t)]
    pub lifeline: Lifeline,

    /// Accept engines of a vLLM version that this sidecar was not tested with.
    #[arg(long)]
    pub allow_untested_vllm: bool,

    /// Private directory for sockets, logs and the committed weights; subcommands find the sidecar by it.
    ///
    /// It outlives the sidecar, must be on a file system of this host, and no other user may be able to replace a
    /// directory of its path: one in /tmp of mode 1777 is accepted, one in a directory that others can write is not.
    /// [default: /var/lib/dp-sidecar/R for root, else $XDG_STATE_HOME/dp-sidecar/R or ~/.local/state/dp-sidecar/R; R is
    /// the first DP rank of the node]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// How logs are written to stderr; RUST_LOG chooses what.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,

    /// Take the accelerators from this JSON file instead of NVML, for trying things out.
    #[arg(long, hide = true, value_name = "FILE")]
    pub accel_file: Option<PathBuf>,

    /// Print what would be started and where each value comes from, and start nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub(super) struct WeightArgs {
    /// How long a `wait` pause may take before running requests are aborted.
    #[arg(long, default_value = "30s", value_parser = duration::parse, value_name = "TIME")]
    pub pause_deadline: Duration,

    /// How long engines may take to load the weights of an update; what has not answered then is restarted.
    #[arg(long, default_value = "900s", value_parser = duration::parse, value_name = "TIME")]
    pub load_timeout: Duration,

    /// Start with the checkpoint of the command line, whatever was committed before.
    ///
    /// Without it, a sidecar that is started again with its state directory brings its engines to the version that
    /// was committed last, also after it was stopped; when those weights cannot be had, engines do not serve. Only
    /// that of the leader (DP rank 0) counts. It is not followed while engines of the sidecar before live on.
    #[arg(long)]
    pub forget_committed: bool,

    /// Allocate the shared memory for updates at the start: two segments as large as the model.
    ///
    /// Memory is several times slower the first time it is written. Without this flag the first two updates allocate
    /// it while they stage, and a node that never sees an update allocates none. With it, a lack of memory is
    /// reported at the start. The model's files must be on this node.
    #[arg(long)]
    pub prefault: bool,

    /// Bytes of shared memory that updates may take on this node; one that needs more is refused. Two copies of the
    /// model are what a rollback needs. [default: what the file system, the machine and its control groups have left]
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    pub max_shared_memory: Option<u64>,
}

/// All of them are listed in protocol/docs/bounds.md.
#[derive(Debug, Args)]
pub(super) struct BoundArgs {
    /// How long a request or a call of a frontend may wait while its engine takes none: during an update, a start, a
    /// drain. [default: the longest of these, by --load-timeout, --startup-timeout and --pause-deadline]
    #[arg(long, value_parser = duration::parse, value_name = "TIME")]
    pub hold_timeout: Option<Duration>,

    /// Bytes of requests that wait in front of one rank; more are answered with an error. One request always fits.
    /// [default: an eighth of the memory, divided by the ranks of this node]
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    pub max_held_bytes: Option<u64>,

    /// Bytes of requests that are on one engine; more wait in front of it. One request always fits.
    /// [default: as --max-held-bytes]
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    pub max_in_flight_bytes: Option<u64>,

    /// Bytes of one request; a larger one is answered with an error. [default: a quarter of the memory]
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    pub max_request_bytes: Option<u64>,

    /// Bytes of answers of one rank that wait for an API server to read them; one that lets more wait is detached.
    /// One answer always fits.
    #[arg(long, default_value = "32MiB", value_parser = parse_bytes, value_name = "BYTES")]
    pub max_unread_bytes: u64,
}

const DRAIN: &str = "\
Hold new requests and wait until none is running.

From now on new requests are held in front of the engines: clients wait, and get an error when the hold is full or takes \
too long. Running requests finish. The hold lasts until `sidecar resume`, or until a sidecar that was \
started with --keep-engines has ended and its successor has taken over. While it lasts updates and pauses are \
refused (exit code 13).

The command exits with 0 when no request is running, and with 5 when some are still running after --limit; the \
hold stays in both cases.";

/// `sidecar drain`.
#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    /// How long to wait for running requests.
    #[arg(long, default_value = "600s", value_parser = duration::parse, value_name = "TIME")]
    pub limit: Duration,
    #[command(flatten)]
    pub target: Target,
}

/// `sidecar stop`.
#[derive(Debug, Args)]
pub(super) struct StopArgs {
    /// Return at once, while everything is still being stopped.
    #[arg(long)]
    pub no_wait: bool,
    #[command(flatten)]
    pub target: Target,
}

/// Which running sidecar is meant.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// First DP rank of the sidecar's node; names the default state directory.
    #[arg(
        long,
        visible_alias = "data-parallel-start-rank",
        env = "SIDECAR_DP_RANK",
        default_value_t = 0,
        value_name = "R"
    )]
    pub dp_rank: u16,
    /// State directory of the sidecar.
    #[arg(long, env = "SIDECAR_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `sidecar update`.
#[derive(Debug, Args)]
pub(super) struct UpdateArgs {
    /// Directory of the new checkpoint (safetensors).
    #[arg(long, value_name = "DIR", required_unless_present_any = ["source", "lora", "remove_lora", "abort", "follow", "history"])]
    pub path: Option<PathBuf>,
    /// Where it is read: `shared` (each node reads the directory itself), `leader` (the leader reads it and passes it
    /// on), `auto` (shared if all nodes see the same files there), or `upload:ID`, what a trainer has uploaded.
    #[arg(long, value_parser = parse_source, default_value = "auto", value_name = "WHERE")]
    pub source: Source,
    /// Where the version that is replaced is kept, for a rollback.
    #[arg(long, value_enum, default_value_t)]
    pub retain: Retain,
    /// Add or replace a LoRA adapter: a directory that the leader can read. May be given several times.
    #[arg(long, value_parser = parse_lora, value_name = "NAME=DIR")]
    pub lora: Vec<AdapterChange>,
    /// Remove a LoRA adapter. May be given several times.
    #[arg(long, value_name = "NAME")]
    pub remove_lora: Vec<String>,
    /// Version to stamp on the responses, 1 to 128 characters; made from the directory's name and the id if absent.
    #[arg(long, value_name = "V")]
    pub version: Option<String>,
    /// What happens to running requests.
    #[arg(long, value_parser = pause_mode(), default_value_t)]
    pub mode: PauseMode,
    /// With `wait`: abort what still runs after this long. [default: as the sidecar was started]
    #[arg(long, value_parser = duration::parse, value_name = "TIME")]
    pub pause_deadline: Option<Duration>,
    /// Refuse unless the engines hold this version now.
    #[arg(long, value_name = "V")]
    pub from_version: Option<String>,
    /// Update although a rollback is impossible: neither memory nor a directory holds the current weights any more.
    #[arg(long)]
    pub allow_no_rollback: bool,
    /// Update although a KV connector (LMCache, NIXL) cannot drop the blocks that it keeps: requests may go on from blocks
    /// of the current weights.
    #[arg(long)]
    pub allow_stale_kv: bool,
    /// Load tensors whose names begin with FROM under names that begin with TO instead. May be given several times; the
    /// longest FROM that matches counts. A refusal because of names says what would fit.
    #[arg(long, value_parser = parse_rename, value_name = "FROM=TO")]
    pub rename: Vec<(String, String)>,
    /// Refuse a checkpoint whose element types are not those of the start. Without it floating point numbers are cast as
    /// vLLM casts them (F32 to BF16, say).
    #[arg(long)]
    pub strict_dtype: bool,
    /// Name of the transaction, for logs and repeats.
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// Abort the running update, if it is not past its commit point.
    #[arg(long, conflicts_with_all = ["path", "follow", "history"])]
    pub abort: bool,
    /// Follow the running update (of this id) to its end.
    #[arg(long, value_name = "ID", num_args = 0..=1, conflicts_with_all = ["path", "history"])]
    pub follow: Option<Option<String>>,
    /// List the last updates with the times of every engine.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "10", conflicts_with = "path")]
    pub history: Option<usize>,
    /// Print the final report as one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
    /// Print each event as a line of JSON on stdout, and the report as the last line.
    #[arg(long, conflicts_with = "json")]
    pub events: bool,
    /// Which sidecar.
    #[command(flatten)]
    pub target: Target,
}

/// `sidecar status`.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Refresh every second until interrupted.
    #[arg(long, conflicts_with = "json")]
    pub watch: bool,
    /// Everything, as one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Which sidecar.
    #[command(flatten)]
    pub target: Target,
}

/// `sidecar version`.
#[derive(Debug, Args)]
pub(super) struct VersionArgs {
    /// Everything, as one JSON object; without a running sidecar the version of this command alone (exit code 14).
    #[arg(long)]
    pub json: bool,
    /// Which sidecar.
    #[command(flatten)]
    pub target: Target,
}

/// `sidecar pause`.
#[derive(Debug, Args)]
pub(super) struct PauseArgs {
    /// What happens to running requests.
    #[arg(long, value_parser = pause_mode(), default_value_t)]
    pub mode: PauseMode,
    /// With `wait`: abort what still runs after this long. [default: as the sidecar was started]
    #[arg(long, value_parser = duration::parse, value_name = "TIME")]
    pub pause_deadline: Option<Duration>,
    /// Which sidecar.
    #[command(flatten)]
    pub target: Target,
}

/// `sidecar frontend`.
#[derive(Debug, Args)]
pub(super) struct FrontendArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: FrontendAction,
}

/// What to do with frontends.
#[derive(Debug, Subcommand)]
pub(super) enum FrontendAction {
    /// Attach to one more frontend, now or when it is reachable.
    Add {
        /// Handshake address of the frontend.
        #[arg(value_name = "HOST:PORT")]
        address: String,
        /// Which sidecar.
        #[command(flatten)]
        target: Target,
    },
    /// Detach from a frontend and forget it.
    Remove {
        /// Handshake address of the frontend, as it was given.
        #[arg(value_name = "HOST:PORT")]
        address: String,
        /// Which sidecar.
        #[command(flatten)]
        target: Target,
    },
    /// All registered frontends and their state.
    List {
        /// As a JSON array.
        #[arg(long)]
        json: bool,
        /// Which sidecar.
        #[command(flatten)]
        target: Target,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
