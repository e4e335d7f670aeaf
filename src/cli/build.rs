//! From the command line to a checked [`Config`]. Every check says what is wrong and what would be
//! right; all of them end the program with exit code 2.

use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};
use std::path::{Path, PathBuf};

use dp_sidecar_protocol::GroupKind;
use dp_sidecar_protocol::machine::virtual_engine::Limits;
use thiserror::Error;

use super::args::{DRAIN_LIMIT, RunArgs};
use crate::config::devices::{self, DeviceError};
use crate::config::model::{self, ModelError};
use crate::config::{Config, Engines, Http, Nodes, Serve, check_host_port};
use crate::memory;
use crate::state_dir::StateDir;
use crate::supervisor::command::VllmLaunch;
use crate::supervisor::environment;
use crate::supervisor::flags::{FlagError, VllmFlags};
use crate::supervisor::installed;
use crate::token::Token;

/// vLLM's default HTTP port.
const HTTP_PORT: u16 = 8000;

/// The command line makes no sense.
#[derive(Debug, Error)]
pub(super) enum UsageError {
    /// A check failed.
    #[error("{0}")]
    Check(String),
    /// The flags after `--` make no sense.
    #[error(transparent)]
    Flags(#[from] FlagError),
    /// The devices do not suffice.
    #[error("devices: {0}")]
    Devices(#[from] DeviceError),
    /// The kind of the model cannot be told.
    #[error(transparent)]
    Model(#[from] ModelError),
}

type Result<T> = std::result::Result<T, UsageError>;

fn check(ok: bool, text: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(UsageError::Check(text())) }
}

fn refuse<T>(text: impl Into<String>) -> Result<T> {
    Err(UsageError::Check(text.into()))
}

/// What the command line is checked against, besides itself: tests need not have it.
#[derive(Debug)]
pub(super) struct Environment {
    pub variables: Vec<(String, String)>,
    /// Number of devices NVML sees.
    pub nvml_count: u32,
    /// Bytes of memory that may be used here.
    pub memory: u64,
    /// The `sidecar` binary.
    pub exe: PathBuf,
    /// Working directory.
    pub cwd: Option<PathBuf>,
}

impl Environment {
    /// That of this process, on a machine with so many devices.
    pub(super) fn own(nvml_count: u32) -> Self {
        Self {
            variables: environment::own(),
            nvml_count,
            memory: memory::limit(),
            // The path stays right when the binary is replaced by a newer one while it runs.
            exe: std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe")),
            cwd: std::env::current_dir().ok(),
        }
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }

    fn absolute(&self, path: &Path) -> PathBuf {
        self.cwd.as_ref().map_or_else(|| path.to_owned(), |cwd| cwd.join(path))
    }

    /// Where the state of a sidecar is.
    pub(super) fn state_dir(&self, given: Option<&Path>, start_rank: u16) -> PathBuf {
        match given {
            Some(path) => self.absolute(path),
            None => StateDir::default_path(|name| self.variable(name), start_rank),
        }
    }
}

/// A checked configuration and what people should know about it.
#[derive(Debug)]
pub(super) struct Built {
    pub config: Config,
    /// Things that are allowed but probably not meant.
    pub notes: Vec<String>,
}

/// Checks the arguments and builds the configuration.
pub(super) fn build(args: &RunArgs, environment: &Environment) -> Result<Built> {
    let (start_rank, size, size_local) = ranks(args)?;
    let flags = if args.vllm.is_empty() { None } else { Some(VllmFlags::parse(&args.vllm)?) };
    let mut checks = Checks { args, environment, flags, start_rank, size, size_local, notes: Vec::new() };
    let nodes = checks.nodes()?;
    let http = checks.http(nodes.as_ref())?;
    let address = resolve(&args.deployment.data_parallel_address)?;
    check(args.deployment.data_parallel_rpc_port != 0, || {
        "--data-parallel-rpc-port: expected a port above 0, because engines connect to it".to_owned()
    })?;
    for frontend in &args.frontends.frontend {
        host_port("--frontend", frontend)?;
    }
    let frontend_slots = args.frontends.frontend_slots.unwrap_or_else(|| default_slots(size));
    check((1..=1024).contains(&frontend_slots), || {
        format!("--frontend-slots {frontend_slots}: 1 to 1024 expected")
    })?;
    checks.agree(address)?;
    let engines = checks.engines()?;
    let kind = checks.kind(&engines)?;
    let serve = checks.serve(frontend_slots)?;
    let prefault = checks.prefault()?;
    checks.own_addresses(address, http.as_ref(), serve.as_ref())?;
    let config = Config {
        start_rank,
        size,
        size_local,
        address,
        rpc_port: args.deployment.data_parallel_rpc_port,
        group_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        kind,
        frontends: args.frontends.frontend.clone(),
        frontend_slots,
        limits: checks.limits(),
        serve,
        engines,
        state_dir: environment.state_dir(args.processes.state_dir.as_deref(), start_rank),
        orphan_grace: args.processes.orphan_grace,
        startup_timeout: args.processes.startup_timeout,
        shutdown_timeout: args.processes.shutdown_timeout,
        kill_grace: args.processes.kill_grace,
        pause_deadline: args.weights.pause_deadline,
        load_timeout: args.weights.load_timeout,
        forget_committed: args.weights.forget_committed,
        prefault,
        max_shared_memory: args.weights.max_shared_memory,
        allow_untested_vllm: args.processes.allow_untested_vllm,
        max_restarts: args.processes.max_restarts,
        keep_engines: args.processes.keep_engines,
        nodes,
        http,
        lifeline: args.processes.lifeline,
        accel_file: args.processes.accel_file.clone(),
        exe: environment.exe.clone(),
    };
    Ok(Built { config, notes: checks.notes })
}

/// First rank, all ranks, ranks of this node. vLLM accepts most of what is refused here, and then
/// hangs or starts the wrong ranks.
fn ranks(args: &RunArgs) -> Result<(u16, u16, u16)> {
    let Some(start) = args.deployment.dp_rank else {
        return refuse("--dp-rank is required: the first DP rank of this node (0 on the first node)");
    };
    let size = args.deployment.data_parallel_size;
    check(size > 0, || "--data-parallel-size 0: at least 1 expected".to_owned())?;
    check(start < size, || {
        format!("--dp-rank {start}: ranks are 0 to {} with --data-parallel-size {size}", size - 1)
    })?;
    let local = match args.deployment.data_parallel_size_local {
        Some(local) => local,
        None if args.nodes.leader.is_some() => {
            return refuse(
                "--data-parallel-size-local is required with --leader: the number of ranks on this node",
            );
        }
        None if start == 0 => size,
        None => {
            return refuse(format!(
                "--data-parallel-size-local is required with --dp-rank {start} (vLLM itself would \
                 silently start rank 0 and all others on this node)"
            ));
        }
    };
    check(local > 0, || "--data-parallel-size-local 0: expected at least 1".to_owned())?;
    check(u32::from(start) + u32::from(local) <= u32::from(size), || {
        format!(
            "--dp-rank {start} with --data-parallel-size-local {local} means ranks {start} to {}, \
             but --data-parallel-size is {size}",
            u32::from(start) + u32::from(local) - 1
        )
    })?;
    Ok((start, size, local))
}

/// Two frontends with as many API servers as vLLM starts without `--api-server-count`: one for each rank
/// (`vllm/entrypoints/cli/serve.py`, 0.32.0). Each slot is two sockets at every engine, so not twice of many.
fn default_slots(size: u16) -> u32 {
    let size = u32::from(size);
    (2 * size).clamp(8, 64.max(size))
}

fn host_port(option: &str, address: &str) -> Result<()> {
    check_host_port(address).or_else(|error| refuse(format!("{option} {address:?}: {error}")))
}

fn resolve(address: &str) -> Result<IpAddr> {
    let failed = |detail: String| UsageError::Check(format!("--data-parallel-address {address:?}: {detail}"));
    if address.trim().is_empty() {
        return Err(failed("the address is empty".to_owned()));
    }
    let literal = address.trim_start_matches('[').trim_end_matches(']');
    let ip = match literal.parse::<IpAddr>() {
        Ok(ip) => ip,
        Err(_) => (address, 0)
            .to_socket_addrs()
            .map_err(|error| failed(format!("cannot be resolved: {error}")))?
            // ZMQ peers get an IP, and IPv4 needs no brackets anywhere.
            .min_by_key(|found| found.is_ipv6())
            .ok_or_else(|| failed("it resolves to no address".to_owned()))?
            .ip(),
    };
    Ok(if ip.is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { ip })
}

/// The command line while it is checked.
struct Checks<'a> {
    args: &'a RunArgs,
    environment: &'a Environment,
    /// What follows `--`, if anything does.
    flags: Option<VllmFlags>,
    start_rank: u16,
    size: u16,
    size_local: u16,
    notes: Vec<String>,
}

impl Checks<'_> {
    /// Where the other nodes are.
    fn nodes(&mut self) -> Result<Option<Nodes>> {
        let Self { args, start_rank: start, size, size_local: local, .. } = *self;
        if local == size {
            for (flag, given) in [
                ("--leader", args.nodes.leader.is_some()),
                ("--auth-token-file", args.nodes.auth_token_file.is_some()),
            ] {
                if given {
                    self.notes.push(format!("{flag} is not used: all {size} ranks are on this node"));
                }
            }
            return Ok(None);
        }
        let here = format!("ranks {start} to {} of {size} are on this node", start + local - 1);
        let Some(leader) = &args.nodes.leader else {
            return refuse(format!(
                "--leader is required: HOST:PORT of the sidecar of rank 0, because only {here}"
            ));
        };
        host_port("--leader", leader)?;
        let Some(file) = &args.nodes.auth_token_file else {
            return refuse(format!(
                "--auth-token-file is required with --leader: a file with the deployment's secret, because {here}"
            ));
        };
        if let Some(address) = args.nodes.peer_address {
            check(!address.is_unspecified() && !address.is_multicast(), || {
                format!("--peer-address {address}: expected an address of this node")
            })?;
        }
        if start > 0 {
            let leader_only = "only the sidecar of rank 0 has frontends";
            check(!args.frontends.serve, || format!("--serve: {leader_only}, {here}"))?;
            check(args.frontends.frontend.is_empty(), || format!("--frontend: {leader_only}, {here}"))?;
        }
        let nodes = Nodes {
            leader: leader.clone(),
            token: self.token("--auth-token-file", file)?,
            address: args.nodes.peer_address,
            leader_timeout: args.nodes.leader_timeout,
        };
        for frontend in &args.frontends.frontend {
            nodes.check_frontend(frontend).or_else(refuse)?;
        }
        Ok(Some(nodes))
    }

    /// The secret in a file.
    fn token(&mut self, flag: &str, file: &Path) -> Result<Token> {
        let file = self.environment.absolute(file);
        let (token, loose) =
            Token::read(&file).or_else(|error| refuse(format!("{flag} {}: {error}", file.display())))?;
        if loose {
            self.notes
                .push(format!("{flag} {}: other users can read it; run chmod 600 on it", file.display()));
        }
        Ok(token)
    }

    /// Where clients come over HTTP, and what they must know.
    fn http(&mut self, nodes: Option<&Nodes>) -> Result<Option<Http>> {
        let Some(text) = &self.args.nodes.http else { return Ok(None) };
        let fail = |reason: String| UsageError::Check(format!("--http {text:?}: {reason}"));
        if self.start_rank > 0 {
            return Err(fail("only the sidecar of rank 0 accepts uploads".to_owned()));
        }
        let address = text
            .to_socket_addrs()
            .map_err(|error| fail(format!("expected HOST:PORT: {error}")))?
            .next()
            .ok_or_else(|| fail("the host has no address".to_owned()))?;
        let args = self.args;
        let file = args.nodes.http_token_file.as_ref();
        let token = file.map(|file| self.token("--http-token-file", file)).transpose()?;
        if token.is_none() && !address.ip().is_loopback() {
            return Err(fail("without --http-token-file only a loopback address is allowed".to_owned()));
        }
        check(token.is_none() || token.as_ref() != nodes.map(|nodes| &nodes.token), || {
            "--http-token-file: it holds the secret of --auth-token-file, which clients must not know: anybody who \
             has it can command every node; make another one"
                .to_owned()
        })?;
        Ok(Some(Http { address, token, names: Http::names(text, &args.nodes.http_name) }))
    }

    /// Managed flags that the user repeated after `--` must say the same.
    fn agree(&self, address: IpAddr) -> Result<()> {
        let deployment = &self.args.deployment;
        let expected = [
            ("--data-parallel-size", self.size.to_string()),
            ("--data-parallel-size-local", self.size_local.to_string()),
            ("--data-parallel-start-rank", self.start_rank.to_string()),
            ("--data-parallel-address", address.to_string()),
            ("--data-parallel-rpc-port", deployment.data_parallel_rpc_port.to_string()),
        ];
        for (flag, value) in self.flags.iter().flat_map(|flags| &flags.managed) {
            for (_, ours) in expected.iter().filter(|(name, _)| name == flag) {
                let as_given =
                    *flag == "--data-parallel-address" && *value == deployment.data_parallel_address;
                check(value == ours || as_given, || {
                    format!("{flag}: {value} after `--`, but {ours} for the sidecar; give it before `--`")
                })?;
            }
        }
        Ok(())
    }

    fn kind(&self, engines: &Engines) -> Result<GroupKind> {
        // One rank has nobody to step in lockstep with: vLLM starts an ordinary engine then.
        if self.size == 1 {
            return Ok(GroupKind::Independent);
        }
        if let Some(kind) = self.args.deployment.model_kind {
            return Ok(kind);
        }
        if let Some(flag) = self.flags.as_ref().and_then(|flags| flags.model_overrides.as_ref()) {
            return refuse(format!(
                "--model-kind: dense or moe is required, because {flag} may change what the model's files \
                 say"
            ));
        }
        let Some((model, revision)) = self.model() else {
            return refuse(
                "--model-kind: dense or moe (or --model PATH) is required, because no model is named \
                 after `--`",
            );
        };
        let cache = self.cache();
        match (model::kind_of(&model, revision, &cache), engines) {
            (Err(ModelError::NotFound { .. }), Engines::Spawn(launch)) => {
                let fetch = installed::fetch_config(launch, &model, revision);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let fetched = runtime.map_err(|error| error.to_string()).and_then(|it| it.block_on(fetch));
                let file = fetched.map_err(|reason| ModelError::NotFetched {
                    model: model.clone(),
                    cache: cache.clone(),
                    reason,
                })?;
                let directory = file.parent().unwrap_or(&file).to_string_lossy();
                Ok(model::kind_of(&directory, None, &cache)?)
            }
            (kind, _) => Ok(kind?),
        }
    }

    /// The model as it is found from here, a path or a name, and its revision.
    fn model(&self) -> Option<(String, Option<&str>)> {
        let flags = self.flags.as_ref();
        let model = flags.and_then(|flags| flags.model.as_ref()).or(self.args.deployment.model.as_ref())?;
        let path = self.environment.absolute(Path::new(model));
        let path = if path.is_dir() { path.display().to_string() } else { model.clone() };
        Some((path, flags.and_then(|flags| flags.revision.as_deref())))
    }

    fn cache(&self) -> PathBuf {
        model::cache_path(|name| self.environment.variable(name))
    }

    /// Where the model is whose size is taken in shared memory at the start.
    fn prefault(&self) -> Result<Option<PathBuf>> {
        if !self.args.weights.prefault {
            return Ok(None);
        }
        let Some((model, revision)) = self.model() else {
            return refuse(
                "--prefault: name the model after `--` (or with --model PATH), because its size must be known",
            );
        };
        let cache = self.cache();
        let directory = model::directory_of(&model, revision, &cache);
        check(directory.is_some(), || {
            format!(
                "--prefault: the size of the model's files must be known, but {model} is neither a directory on \
                 this node nor in the Hugging Face cache {}",
                cache.display()
            )
        })?;
        Ok(directory)
    }

    fn serve(&mut self, frontend_slots: u32) -> Result<Option<Serve>> {
        let args = &self.args.frontends;
        let Some(flags) = &self.flags else {
            check(!args.serve, || "--serve: give the model and vLLM's flags after `--`".to_owned())?;
            return Ok(None);
        };
        if !args.serve {
            let host = flags.host.as_ref().map(|_| "--host");
            let port = flags.port.map(|_| "--port");
            let unused = flags.frontend.iter().map(String::as_str).chain(host).chain(port);
            let unused: Vec<&str> = unused.filter(|token| token.starts_with('-')).collect();
            if !unused.is_empty() {
                self.notes.push(format!(
                    "without --serve {} have no effect: these are flags of the frontend",
                    unused.join(" ")
                ));
            }
            return Ok(None);
        }
        let port = either("--port", args.port, flags.port)?.unwrap_or(HTTP_PORT);
        let host = either("--host", args.host.clone(), flags.host.clone())?;
        let count = either("--api-server-count", args.api_server_count, flags.api_server_count)?;
        let mut api_server_count = count.unwrap_or(1);
        check(api_server_count > 0, || "--api-server-count 0: at least 1 expected with --serve".to_owned())?;
        check(api_server_count <= frontend_slots, || {
            format!(
                "--api-server-count {api_server_count}: each API server takes one of \
                 --frontend-slots {frontend_slots}"
            )
        })?;
        let rust = self.environment.variable("VLLM_USE_RUST_FRONTEND");
        if rust.is_some_and(|value| !matches!(value.as_str(), "" | "0")) && api_server_count > 1 {
            self.notes.push(
                "VLLM_USE_RUST_FRONTEND is set: one API server is started, whatever --api-server-count says"
                    .to_owned(),
            );
            api_server_count = 1;
        }
        Ok(Some(Serve { host, port, api_server_count }))
    }

    /// No two of this sidecar and its frontend listen at the same address.
    fn own_addresses(&self, handshake: IpAddr, http: Option<&Http>, serve: Option<&Serve>) -> Result<()> {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let Self { args, .. } = self;
        let mut own: Vec<(&str, IpAddr, u16)> = Vec::new();
        own.extend(http.map(|http| ("--http", http.address.ip(), http.address.port())));
        own.extend(serve.map(|serve| {
            let host = serve.host.as_deref().and_then(|host| host.parse().ok());
            ("--port", host.unwrap_or(any), serve.port)
        }));
        if args.vllm.is_empty() {
            own.push(("--data-parallel-rpc-port", handshake, args.deployment.data_parallel_rpc_port));
        }
        if let (0, Some(leader), true) = (self.start_rank, &args.nodes.leader, self.size_local < self.size) {
            // The address may have another name for this node.
            let port = leader.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
            own.extend(port.map(|port| ("--leader", any, port)));
        }
        for (at, (name, ip, port)) in own.iter().enumerate() {
            for (other, other_ip, other_port) in &own[at + 1..] {
                let overlap = ip == other_ip || ip.is_unspecified() || other_ip.is_unspecified();
                check(*port == 0 || port != other_port || !overlap, || {
                    format!(
                        "{name} and {other}: both would listen at port {port}; give one of them another port"
                    )
                })?;
            }
        }
        Ok(())
    }

    /// Bounds of a rank; by default nothing waits for less than what it waits for, and memory is for engines first.
    fn limits(&mut self) -> Limits {
        let RunArgs { bounds, weights, processes, .. } = self.args;
        let bytes = |given: u64| usize::try_from(given).unwrap_or(usize::MAX);
        // An update that fails loads twice; an engine that starts loads the committed weights after that.
        let update = weights.pause_deadline + weights.load_timeout * 2;
        let start = processes.startup_timeout + weights.load_timeout;
        let longest = update.max(start).max(DRAIN_LIMIT);
        let hold = bounds.hold_timeout.unwrap_or(longest);
        if hold < longest {
            self.notes.push(format!(
                "--hold-timeout {hold:?}: requests may fail during a start, an update or a drain, which may take \
                 {longest:?} (--startup-timeout, --load-timeout, --pause-deadline)"
            ));
        }
        let memory = self.environment.memory;
        let held = bounds.max_held_bytes.unwrap_or_else(|| memory / 8 / u64::from(self.size_local));
        Limits {
            hold,
            held_bytes: bytes(held),
            in_flight_bytes: bytes(bounds.max_in_flight_bytes.unwrap_or(held)),
            request_bytes: bytes(bounds.max_request_bytes.unwrap_or(memory / 4)),
            unread_bytes: bytes(bounds.max_unread_bytes),
        }
    }

    fn engines(&mut self) -> Result<Engines> {
        let Some(flags) = self.flags.clone() else { return Ok(Engines::Attach) };
        let clean = environment::clean(self.environment.variables.clone());
        self.notes.extend(clean.notes());
        let (devices, hidden) = devices::of_ranks(
            self.args.processes.device_ids.as_deref(),
            |name| self.environment.variable(name),
            || self.environment.nvml_count,
            usize::from(self.size_local),
            flags.world_size as usize,
        )?;
        if let Some(name) = hidden {
            self.notes.push(format!(
                "{name} is empty: engines get no accelerators; unset it, or choose some with --device-ids"
            ));
        }
        Ok(Engines::Spawn(VllmLaunch {
            bin: self.args.processes.vllm_bin.clone(),
            model: flags.model,
            common_flags: flags.common,
            frontend_flags: flags.frontend,
            env: clean.variables,
            devices,
            cwd: self.environment.cwd.clone(),
        }))
    }
}

/// An option that may be given before `--` or after it, but not differently.
fn either<T: PartialEq + ToString>(name: &str, ours: Option<T>, theirs: Option<T>) -> Result<Option<T>> {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours != theirs => {
            refuse(format!("{name}: {} before `--`, but {} after it", ours.to_string(), theirs.to_string()))
        }
        (ours, theirs) => Ok(ours.or(theirs)),
    }
}

#[cfg(test)]
mod tests;
