//! What a run of the sidecar was asked to do, checked.

mod commands;
pub mod devices;
pub mod model;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use crate::state_dir::StateDir;
use crate::supervisor::KeeperOptions;
use crate::supervisor::command::VllmLaunch;
use crate::token::Token;
use dp_sidecar_protocol::GroupKind;
use dp_sidecar_protocol::machine::virtual_engine::Limits;

/// Everything `sidecar run` needs to know. Built by the command line, checked, immutable.
#[derive(Clone, Debug)]
pub struct Config {
    /// First DP rank of this node (vLLM: `--data-parallel-start-rank`).
    pub start_rank: u16,
    /// DP ranks of the whole deployment (vLLM: `--data-parallel-size`).
    pub size: u16,
    /// DP ranks of this node (vLLM: `--data-parallel-size-local`).
    pub size_local: u16,
    /// Where engines that somebody else starts do their handshake.
    pub address: IpAddr,
    /// Port of that handshake (vLLM: `--data-parallel-rpc-port`).
    pub rpc_port: u16,
    /// Where the ranks of a lockstep group meet: rank 0's node as all nodes reach it, loopback if there is
    /// only one (INIT: `data_parallel_master_ip`).
    pub group_address: IpAddr,
    /// Dense or MoE.
    pub kind: GroupKind,
    /// Handshake addresses `host:port` of the frontends to attach to.
    pub frontends: Vec<String>,
    /// Frontend API servers that can be attached at the same time (slots 1..=K of every engine).
    pub frontend_slots: u32,
    /// Bounds of each rank of this node.
    pub limits: Limits,
    /// The frontend to start and supervise, if any.
    pub serve: Option<Serve>,
    /// Who starts the engines.
    pub engines: Engines,
    /// Private directory of this sidecar: sockets, logs, lock.
    pub state_dir: PathBuf,
    /// How long the keeper keeps vLLM running without a sidecar.
    pub orphan_grace: Duration,
    /// Limit for an engine's start, from spawn to registration.
    pub startup_timeout: Duration,
    /// How long vLLM may drain when it is stopped (vLLM: `--shutdown-timeout`).
    pub shutdown_timeout: Duration,
    /// From the end of the drain to SIGKILL.
    pub kill_grace: Duration,
    /// How long `wait` pauses may take before requests are aborted.
    pub pause_deadline: Duration,
    /// For the load of an update on all engines.
    pub load_timeout: Duration,
    /// Start with the checkpoint of the command line, whatever was committed before.
    pub forget_committed: bool,
    /// The model whose size is taken twice in shared memory at the start, if that is wanted: a directory.
    pub prefault: Option<PathBuf>,
    /// Bytes of shared memory that updates may take at the most.
    pub max_shared_memory: Option<u64>,
    /// Accept engines of a vLLM version that this sidecar was not tested with.
    pub allow_untested_vllm: bool,
    /// A signal ends the sidecar, but nothing that it started.
    pub keep_engines: bool,
    /// Restarts of a rank (or lockstep group) in a row before the sidecar gives up.
    pub max_restarts: u32,
    /// Pipe whose end means "stop".
    pub lifeline: Lifeline,
    /// Where the other nodes are; none if all ranks are on this node.
    pub nodes: Option<Nodes>,
    /// Uploads and updates over HTTP, if wanted.
    pub http: Option<Http>,
    /// Accelerators out of this file instead of NVML.
    pub accel_file: Option<PathBuf>,
    /// The `sidecar` binary, for starting the keeper.
    pub exe: PathBuf,
}

/// Uploads and updates over HTTP.
#[derive(Clone, Debug)]
pub struct Http {
    /// Where to listen.
    pub address: SocketAddr,
    /// What clients must know; none: [`StateDir::http_token`] has it, on a loopback address only.
    pub token: Option<Token>,
    /// How clients may call this server, besides by address.
    pub names: BTreeSet<String>,
}

impl Http {
    /// The host of `--http`, that of this machine, and those that were given; in lower case.
    pub fn names(address: &str, given: &[String]) -> BTreeSet<String> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let own = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let names = given.iter().cloned().chain([host.to_owned()]).chain(own);
        names.map(|name| name.trim_end_matches('.').to_ascii_lowercase()).collect()
    }
}

/// The deployment spreads over several nodes.
#[derive(Clone, Debug)]
pub struct Nodes {
    /// `host:port` at which the leader listens and the followers connect.
    pub leader: String,
    /// The shared secret.
    pub token: Token,
    /// Address of this node that the other nodes reach, if the user named one.
    pub address: Option<IpAddr>,
    /// How long a follower waits for a leader that went away before it stops its engines.
    pub leader_timeout: Duration,
}

impl Nodes {
    /// Refuses a frontend that only this host reaches, while others are on other hosts.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn check_frontend(&self, address: &str) -> Result<(), String> {
        if !is_loopback(address) || is_loopback(&self.leader) {
            return Ok(());
        }
        Err(format!(
            "frontend {address}: a loopback address, but the sidecars of other nodes connect to it, too (--leader is {}): \
             give one that all nodes reach, here and as --data-parallel-address of the frontend",
            self.leader
        ))
    }
}

/// Whether `host:port` names the host itself to whoever reads it.
fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// Who starts the engines.
#[derive(Clone, Debug)]
pub enum Engines {
    /// The keeper does, with these command lines.
    Spawn(VllmLaunch),
    /// Somebody else does; they do their handshake at `address:rpc_port`.
    Attach,
}

/// The supervised frontend (`--serve`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// HTTP host, vLLM's default if absent.
    pub host: Option<String>,
    /// HTTP port.
    pub port: u16,
    /// API server processes.
    pub api_server_count: u32,
}

/// What ends a run besides signals and commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Lifeline {
    /// Nothing.
    #[default]
    None,
    /// End of file on stdin.
    Stdin,
}

/// How logs are written to stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl Serve {
    /// Where its HTTP server is reached from this node.
    pub fn http_address(&self) -> String {
        let host = match self.host.as_deref() {
            None | Some("" | "0.0.0.0" | "::") => "127.0.0.1",
            Some(host) => host,
        };
        if host.contains(':') { format!("[{host}]:{}", self.port) } else { format!("{host}:{}", self.port) }
    }
}

impl Config {
    /// How this run finds or starts its keeper.
    pub fn keeper_options(&self, state: &StateDir, tasks: &TaskTracker) -> KeeperOptions {
        KeeperOptions {
            state_dir: state.path().to_owned(),
            exe: self.exe.clone(),
            run_id: state.run_id().to_owned(),
            orphan_grace: self.orphan_grace,
            kill_grace: self.kill_grace,
            configuration: self.digest(),
            keep: self.children_to_keep(),
            tasks: tasks.clone(),
        }
    }

    /// Where the leader is, if this sidecar is a follower: the one with rank 0 decides for all nodes.
    pub fn follows(&self) -> Option<&Nodes> {
        self.nodes.as_ref().filter(|_| self.start_rank > 0)
    }

    /// As given, if this sidecar starts the engines.
    pub fn model(&self) -> Option<&str> {
        match &self.engines {
            Engines::Spawn(launch) => launch.model.as_deref(),
            Engines::Attach => None,
        }
    }

    /// Names under which frontends serve the model itself, as far as this sidecar's command line says.
    pub fn served_names(&self) -> Vec<String> {
        match &self.engines {
            Engines::Spawn(launch) => launch.served_names(),
            Engines::Attach => Vec::new(),
        }
    }

    /// The ranks of this node.
    pub fn local_ranks(&self) -> impl Iterator<Item = u16> + Clone + use<> {
        let (start, count) = (self.start_rank, self.size_local);
        (start..start.saturating_add(count)).take(usize::from(count))
    }
}

/// Checks `host:port` or `[v6]:port`.
pub fn check_host_port(address: &str) -> Result<(), String> {
    let Some((host, port)) = address.rsplit_once(':') else {
        return Err("HOST:PORT expected".to_owned());
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || host.contains(['/', ' ']) || (host.contains(':') && !bracketed) {
        return Err("a host is expected before the colon (IPv6 in brackets)".to_owned());
    }
    match port.parse::<u16>() {
        Ok(0) | Err(_) => Err(format!("port {port:?}: 1 to 65535 expected")),
        Ok(_) => Ok(()),
    }
}
