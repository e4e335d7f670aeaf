//! `sidecar run`.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory};
use indicatif::HumanBytes;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::args::{Cli, DRY_RUN, RunArgs};
use super::build::{self, Built, Environment};
use super::table::table;
use crate::app;
use crate::config::{Config, Engines};
use crate::driver::attachment;
use crate::exit_code::{self, RunEnd};
use crate::state_dir::{StateDir, StateDirError};
use crate::supervisor::command::shell_line;
use crate::supervisor::keeper;
use crate::{tasks, telemetry};

/// How long tasks that hang may delay the end of the process.
const RUNTIME_LIMIT: Duration = Duration::from_secs(5);
/// Open files that a process may want; vLLM raises its own limit to as many.
const OPEN_FILES: u64 = 65_535;

/// An option of `run`, its value, and who gave it: `flag`, the variable, or `default`.
pub(super) type Origin = [String; 3];

/// Where the values of `run` come from.
pub(super) fn origins(matches: &ArgMatches) -> Vec<Origin> {
    let Some(("run", matches)) = matches.subcommand() else {
        return Vec::new();
    };
    let command = Cli::command();
    let Some(run) = command.find_subcommand("run") else {
        return Vec::new();
    };
    run.get_arguments()
        .filter_map(|argument| {
            let name = argument.get_long().filter(|name| *name != DRY_RUN)?;
            let id = argument.get_id().as_str();
            let origin = match matches.value_source(id)? {
                ValueSource::CommandLine => "flag".to_owned(),
                ValueSource::EnvVariable => argument.get_env()?.to_str()?.to_owned(),
                _ => "default".to_owned(),
            };
            let values = matches.try_get_raw(id).ok()??;
            let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
            Some([format!("--{name}"), values.join(","), origin])
        })
        .collect()
}

/// Runs the sidecar; returns the exit code.
/// `ignored`: variables that Kubernetes has set, not the operator.
pub(super) fn run(args: &RunArgs, origins: &[Origin], ignored: &[String]) -> u8 {
    telemetry::init(args.processes.log_format);
    for name in ignored {
        tracing::warn!("{name} is not used: its value is that of Kubernetes for a service of that name");
    }
    let node_rank = args.deployment.dp_rank.unwrap_or(0);
    tasks::exit_on_panic(move |reason| last_word(exit_code::INTERNAL, reason, node_rank));
    let devices = crate::gpu::count(args.processes.accel_file.as_deref());
    let end = match build::build(args, &Environment::own(devices)) {
        Err(error) => RunEnd::new(exit_code::USAGE, error.to_string()),
        Ok(built) if args.processes.dry_run => {
            print!("{}", describe(&built, origins));
            return exit_code::OK;
        }
        Ok(built) => host(built),
    };
    last_word(end.code, &end.reason, node_rank);
    end.code
}

/// The last line of a run on stderr, for programs; `node_rank` is the first DP rank of the node.
fn last_word(exit: u8, reason: &str, node_rank: u16) {
    if exit != exit_code::OK {
        eprintln!("error: {reason}");
    }
    // In one piece: other threads may be writing, too.
    let line = serde_json::json!({ "exit": exit, "reason": reason, "node_rank": node_rank }).to_string();
    eprintln!("{line}");
}

fn host(built: Built) -> RunEnd {
    for note in &built.notes {
        tracing::warn!("{note}");
    }
    if let Engines::Spawn(launch) = &built.config.engines
        && launch.find(&launch.bin).is_none()
    {
        let text = format!("{}: no such program; give --vllm-bin, or add vllm to PATH", launch.bin.display());
        return RunEnd::new(exit_code::PREFLIGHT, text);
    }
    let state = match StateDir::open(&built.config.state_dir) {
        Ok(state) => state,
        Err(error) => {
            let code = match error {
                StateDirError::InUse { .. } => exit_code::IN_USE,
                StateDirError::TooLong { .. }
                | StateDirError::Foreign { .. }
                | StateDirError::Exposed { .. }
                | StateDirError::Networked { .. } => exit_code::USAGE,
                StateDirError::Io { .. } => exit_code::PREFLIGHT,
            };
            return RunEnd::new(code, error.to_string());
        }
    };
    // The frontend of a sidecar before may still have it, and is taken over.
    if !keeper::is_alive(state.path())
        && let Err(end) = check_port(&built.config)
    {
        return end;
    }
    if let Some(http) = &built.config.http
        && let Err(error) = TcpListener::bind(http.address)
    {
        return port_taken(&format!("--http {}: cannot listen there", http.address), &error);
    }
    let mut config = built.config;
    config.state_dir = state.path().to_owned();
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("sidecar").build();
    match runtime {
        Ok(runtime) => {
            let end = runtime.block_on(app::run(config, state));
            runtime.shutdown_timeout(RUNTIME_LIMIT);
            end
        }
        Err(error) => RunEnd::new(exit_code::INTERNAL, format!("runtime: {error}")),
    }
}

/// Many systems allow a process 1,024 open files unless it asks for more, which the sockets of some ranks and frontends
/// exceed. The processes that this one starts inherit it, engines too: those that vLLM starts beside an API server have
/// the same limit, which that has raised before (`setup_server` in `vllm/entrypoints/launchers/launcher.py` 0.32.0).
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let wanted = hard.min(OPEN_FILES);
        if soft < wanted { setrlimit(Resource::RLIMIT_NOFILE, wanted, hard) } else { Ok(()) }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files (ulimit -n) stays as it is");
    }
}

/// Whether the supervised frontend can have its port: better told now than after the engines have
/// loaded.
fn check_port(config: &Config) -> Result<(), RunEnd> {
    let Some(serve) = &config.serve else {
        return Ok(());
    };
    let host = serve.host.as_deref().unwrap_or("0.0.0.0");
    match TcpListener::bind((host, serve.port)) {
        Ok(_) => Ok(()),
        // The frontend of a sidecar that was killed: this one goes on with it, or stops it first.
        Err(error)
            if error.kind() == ErrorKind::AddrInUse
                && attachment::supervised(&config.state_dir).is_some() =>
        {
            Ok(())
        }
        Err(error) => {
            Err(port_taken(&format!("--port {}: not available to the frontend", serve.port), &error))
        }
    }
}

fn port_taken(what: &str, error: &std::io::Error) -> RunEnd {
    let code = match error.kind() {
        ErrorKind::AddrInUse => exit_code::IN_USE,
        _ => exit_code::PREFLIGHT,
    };
    RunEnd::new(code, format!("{what}: {error}"))
}

/// The effective values and what would be started, for `--dry-run`.
fn describe(built: &Built, origins: &[Origin]) -> String {
    let Config { start_rank, size, size_local, .. } = built.config;
    let config = &built.config;
    let kind = format!("{} ({} ranks)", config.kind.model(), config.kind);
    let last = start_rank + size_local - 1;
    let mut text = format!(
        "ranks {start_rank} to {last} of {size}, {kind}\nstate directory {}\n",
        config.state_dir.display()
    );
    if let Some(nodes) = &config.nodes {
        text.push_str(&match config.follows() {
            Some(_) => format!("follower of the sidecar at {}\n", nodes.leader),
            None => format!(
                "leader, waits at {} for the nodes of ranks {} to {}\n",
                nodes.leader,
                size_local,
                size - 1
            ),
        });
    }
    let handshake = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    match &config.engines {
        Engines::Attach => {
            text.push_str(&format!("waits for engines at {}:{}\n", config.address, config.rpc_port))
        }
        Engines::Spawn(launch) => {
            for (local, rank) in config.local_ranks().enumerate() {
                let Some(spec) = config.engine_spawn(rank, 1, handshake) else {
                    continue;
                };
                let devices = launch
                    .devices
                    .get(local)
                    .map_or_else(String::new, |slice| format!("{}={} ", slice.variable, slice.value));
                text.push_str(&format!("{}: {devices}{}\n", spec.name, shell_line(&spec.argv)));
            }
        }
    }
    if let Some(spec) = config.frontend_spawn(1, handshake) {
        text.push_str(&format!("{}: {}\n", spec.name, shell_line(&spec.argv)));
    }
    let bytes = |bytes: usize| HumanBytes(bytes as u64);
    let limits = &config.limits;
    text.push_str(&format!(
        "bounds of each rank: hold {:?}, held {}, in flight {}, one request {}, unread answers {}\n",
        limits.hold,
        bytes(limits.held_bytes),
        bytes(limits.in_flight_bytes),
        bytes(limits.request_bytes),
        bytes(limits.unread_bytes)
    ));
    text.push_str("(port 0: a free loopback port, chosen at each start)\n\nvalues\n");
    text.push_str(&table(["option", "value", "from"], origins.iter().cloned()));
    for note in &built.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}
