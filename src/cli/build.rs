//! From the command line to a checked [`Config`]. Every check says what is wrong and what would be
//! right; all of them end the program with exit code 2.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::args::RunArgs;
use super::values::ModelKind;
use crate::config::devices::{self, DeviceError, Visible};
use crate::config::model::{self, ModelError};
use crate::config::{Config, Engines, Http, Nodes, Serve, check_host_port};
use crate::driver::handles::GroupKind;
use crate::state_dir::StateDir;
use crate::supervisor::command::VllmLaunch;
use crate::supervisor::environment;
use crate::supervisor::flags::{FlagError, Managed, VllmFlags};
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

fn check(ok: bool, text: impl FnOnce() -> String) -> Result<(), UsageError> {
    if ok { Ok(()) } else { Err(UsageError::Check(text())) }
}

/// What is asked of the surroundings, so that tests need not have them.
#[derive(Debug)]
pub(super) struct Surroundings {
    /// The environment.
    pub variables: Vec<(String, String)>,
    /// Number of devices NVML sees.
    pub nvml_count: u32,
    /// The `sidecar` binary.
    pub exe: PathBuf,
    /// Working directory.
    pub cwd: Option<PathBuf>,
}

impl Surroundings {
    fn variable(&self, name: &str) -> Option<String> {
        self.variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }
}

/// A checked configuration and what people should know about it.
#[derive(Debug)]
pub(super) struct Built {
    /// The configuration.
    pub config: Config,
    /// Things that are allowed but probably not meant.
    pub notes: Vec<String>,
}

/// Checks the arguments and builds the configuration.
pub(super) fn build(args: &RunArgs, surroundings: &Surroundings) -> Result<Built, UsageError> {
    let mut notes = Vec::new();
    let (start_rank, size, size_local) = ranks(args)?;
    let nodes = nodes(args, start_rank, size, size_local, surroundings, &mut notes)?;
    let http = http(args, start_rank, nodes.as_ref(), surroundings, &mut notes)?;
    let address = resolve(&args.data_parallel_address)?;
    check(args.data_parallel_rpc_port != 0, || {
        "--data-parallel-rpc-port: expected a port above 0, because engines connect to it".to_owned()
    })?;
    for frontend in &args.frontend {
        check_host_port(frontend)
            .map_err(|error| UsageError::Check(format!("--frontend {frontend:?}: {error}")))?;
    }
    check((1..=1024).contains(&args.frontend_slots), || {
        format!("--frontend-slots {}: 1 to 1024 expected", args.frontend_slots)
    })?;
    let state_dir = state_dir(args.state_dir.as_deref(), start_rank, surroundings);
    let flags = if args.vllm.is_empty() { None } else { Some(VllmFlags::parse(&args.vllm)?) };
    if let Some(flags) = &flags {
        agree(flags, args, start_rank, size, size_local, address)?;
    }
    // One rank has nobody to step in lockstep with: vLLM starts an ordinary engine then.
    let kind = if size == 1 { GroupKind::Independent } else { kind(args, flags.as_ref(), surroundings)? };
    let serve = serve(args, flags.as_ref(), surroundings, &mut notes)?;
    let prefault = prefault(args, flags.as_ref(), surroundings)?;
    let engines = match flags {
        None => Engines::Attach,
        Some(flags) => {
            let clean = environment::clean(surroundings.variables.clone());
            if !clean.removed.is_empty() {
                notes.push(format!("not passed on to vLLM: {}", clean.removed.join(", ")));
            }
            let visible = visible_devices(args, surroundings);
            let devices =
                devices::slices(visible.as_ref(), usize::from(size_local), flags.world_size as usize)?;
            Engines::Spawn(VllmLaunch {
                bin: args.vllm_bin.clone(),
                model: flags.model,
                common_flags: flags.common,
                frontend_flags: flags.frontend,
                env: clean.variables,
                devices,
                cwd: surroundings.cwd.clone(),
            })
        }
    };
    Ok(Built {
        config: Config {
            start_rank,
            size,
            size_local,
            address,
            rpc_port: args.data_parallel_rpc_port,
            group_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            kind,
            frontends: args.frontend.clone(),
            frontend_slots: args.frontend_slots,
            serve,
            engines,
            state_dir,
            orphan_grace: args.orphan_grace,
            startup_timeout: args.startup_timeout,
            shutdown_timeout: args.shutdown_timeout,
            kill_grace: args.kill_grace,
            pause_deadline: args.pause_deadline,
            load_timeout: args.load_timeout,
            prefault,
            allow_untested_vllm: args.allow_untested_vllm,
            max_restarts: args.max_restarts,
            keep_engines: args.keep_engines,
            nodes,
            http,
            lifeline: args.lifeline,
            accel_file: args.accel_file.clone(),
            exe: surroundings.exe.clone(),
        },
        notes,
    })
}

/// Where the state of a sidecar is.
pub(super) fn state_dir(given: Option<&Path>, start_rank: u16, surroundings: &Surroundings) -> PathBuf {
    match given {
        Some(path) => match &surroundings.cwd {
            Some(cwd) => cwd.join(path),
            None => path.to_owned(),
        },
        None => {
            let runtime = surroundings.variable("XDG_RUNTIME_DIR");
            StateDir::default_path(runtime.as_deref(), start_rank)
        }
    }
}

/// The devices this node may use.
pub(super) fn visible_devices(args: &RunArgs, surroundings: &Surroundings) -> Option<Visible> {
    devices::visible(
        args.device_ids.as_deref(),
        |name| surroundings.variable(name),
        || surroundings.nvml_count,
    )
}

/// First rank, all ranks, ranks of this node. vLLM accepts most of what is refused here, and then
/// hangs or starts the wrong ranks.
fn ranks(args: &RunArgs) -> Result<(u16, u16, u16), UsageError> {
    let Some(start) = args.dp_rank else {
        return Err(UsageError::Check(
            "--dp-rank is required: the first DP rank of this node (0 on the first node)".to_owned(),
        ));
    };
    let size = args.data_parallel_size;
    check(size > 0, || "--data-parallel-size 0: at least 1 expected".to_owned())?;
    check(start < size, || {
        format!("--dp-rank {start}: ranks are 0 to {} with --data-parallel-size {size}", size - 1)
    })?;
    let local = match args.data_parallel_size_local {
        Some(local) => local,
        None if args.leader.is_some() => {
            return Err(UsageError::Check(
                "--data-parallel-size-local is required with --leader: the number of ranks on this node"
                    .to_owned(),
            ));
        }
        None if start == 0 => size,
        None => {
            return Err(UsageError::Check(format!(
                "--data-parallel-size-local is required with --dp-rank {start} (vLLM itself would \
                 silently start rank 0 and all others on this node)"
            )));
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

/// Where the other nodes are.
fn nodes(
    args: &RunArgs,
    start: u16,
    size: u16,
    local: u16,
    surroundings: &Surroundings,
    notes: &mut Vec<String>,
) -> Result<Option<Nodes>, UsageError> {
    if local == size {
        if args.leader.is_some() {
            notes.push(format!("--leader is not used: all {size} ranks are on this node"));
        }
        return Ok(None);
    }
    let here = format!("ranks {start} to {} of {size} are on this node", start + local - 1);
    let Some(leader) = &args.leader else {
        return Err(UsageError::Check(format!(
            "--leader is required: HOST:PORT of the sidecar of rank 0, because only {here}"
        )));
    };
    check_host_port(leader).map_err(|error| UsageError::Check(format!("--leader {leader:?}: {error}")))?;
    let Some(file) = &args.auth_token_file else {
        return Err(UsageError::Check(format!(
            "--auth-token-file is required with --leader: a file with the deployment's secret, because {here}"
        )));
    };
    if let Some(address) = args.peer_address {
        check(!address.is_unspecified() && !address.is_multicast(), || {
            format!("--peer-address {address}: expected an address of this node")
        })?;
    }
    if start > 0 {
        let leader_only = "only the sidecar of rank 0 has frontends";
        check(!args.serve, || format!("--serve: {leader_only}, {here}"))?;
        check(args.frontend.is_empty(), || format!("--frontend: {leader_only}, {here}"))?;
    }
    let token = token(file, surroundings, notes)?;
    Ok(Some(Nodes {
        leader: leader.clone(),
        token,
        address: args.peer_address,
        leader_timeout: args.leader_timeout,
    }))
}

/// The secret of the deployment.
fn token(file: &Path, surroundings: &Surroundings, notes: &mut Vec<String>) -> Result<Token, UsageError> {
    let file = match &surroundings.cwd {
        Some(cwd) => cwd.join(file),
        None => file.to_owned(),
    };
    let (token, loose) = Token::read(&file)
        .map_err(|error| UsageError::Check(format!("--auth-token-file {}: {error}", file.display())))?;
    if loose {
        notes.push(format!(
            "--auth-token-file {}: other users can read it; run chmod 600 on it",
            file.display()
        ));
    }
    Ok(token)
}

/// Where clients come over HTTP, and what they must know.
fn http(
    args: &RunArgs,
    start: u16,
    nodes: Option<&Nodes>,
    surroundings: &Surroundings,
    notes: &mut Vec<String>,
) -> Result<Option<Http>, UsageError> {
    let Some(text) = &args.http else { return Ok(None) };
    let fail = |reason: String| UsageError::Check(format!("--http {text:?}: {reason}"));
    if start > 0 {
        return Err(fail("only the sidecar of rank 0 accepts uploads".to_owned()));
    }
    let address = text.to_socket_addrs().map_err(|error| fail(format!("expected HOST:PORT: {error}")))?;
    let address = address.into_iter().next().ok_or_else(|| fail("the host has no address".to_owned()))?;
    let token = match (nodes, &args.auth_token_file) {
        (Some(nodes), _) => Some(nodes.token.clone()),
        (None, Some(file)) => Some(token(file, surroundings, notes)?),
        (None, None) => None,
    };
    if token.is_none() && !address.ip().is_loopback() {
        return Err(fail("without --auth-token-file only a loopback address is allowed".to_owned()));
    }
    Ok(Some(Http { address, token }))
}

fn resolve(address: &str) -> Result<IpAddr, UsageError> {
    let failed = |detail: String| UsageError::Check(format!("--data-parallel-address {address:?}: {detail}"));
    if address.trim().is_empty() {
        return Err(failed("the address is empty".to_owned()));
    }
    let literal = address.trim_start_matches('[').trim_end_matches(']');
    let ip = match literal.parse::<IpAddr>() {
        Ok(ip) => ip,
        Err(_) => {
            let found: Vec<SocketAddr> = (address, 0)
                .to_socket_addrs()
                .map_err(|error| failed(format!("cannot be resolved: {error}")))?
                .collect();
            // ZMQ peers get an IP, and IPv4 needs no brackets anywhere.
            let v4 = found.iter().find(|found| found.is_ipv4());
            v4.or_else(|| found.first())
                .map(SocketAddr::ip)
                .ok_or_else(|| failed("it resolves to no address".to_owned()))?
        }
    };
    if ip.is_unspecified() {
        return Ok(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    Ok(ip)
}

/// Managed flags that the user repeated after `--` must say the same.
fn agree(
    flags: &VllmFlags,
    args: &RunArgs,
    start_rank: u16,
    size: u16,
    size_local: u16,
    address: IpAddr,
) -> Result<(), UsageError> {
    for (managed, value) in &flags.managed {
        let (name, ours) = match managed {
            Managed::Size => ("--data-parallel-size", size.to_string()),
            Managed::SizeLocal => ("--data-parallel-size-local", size_local.to_string()),
            Managed::StartRank => ("--data-parallel-start-rank", start_rank.to_string()),
            Managed::Address => ("--data-parallel-address", address.to_string()),
            Managed::RpcPort => ("--data-parallel-rpc-port", args.data_parallel_rpc_port.to_string()),
        };
        let same = match managed {
            Managed::Address => *value == ours || *value == args.data_parallel_address,
            _ => *value == ours,
        };
        check(same, || {
            format!("{name}: {value} after `--`, but {ours} for the sidecar; give it before `--`")
        })?;
    }
    Ok(())
}

fn kind(
    args: &RunArgs,
    flags: Option<&VllmFlags>,
    surroundings: &Surroundings,
) -> Result<GroupKind, UsageError> {
    match args.model_kind {
        ModelKind::Dense => return Ok(GroupKind::Independent),
        ModelKind::Moe => return Ok(GroupKind::Lockstep),
        ModelKind::Auto => {}
    }
    if let Some(flag) = flags.and_then(|flags| flags.model_overrides.as_ref()) {
        return Err(UsageError::Check(format!(
            "--model-kind: dense or moe is required, because {flag} may change what the model's files \
             say"
        )));
    }
    let Some((model, revision)) = model(args, flags, surroundings) else {
        return Err(UsageError::Check(
            "--model-kind: dense or moe (or --model PATH) is required, because no model is named \
             after `--`"
                .to_owned(),
        ));
    };
    let cache = model::cache_path(|name| surroundings.variable(name));
    Ok(model::kind_of(&model, revision, &cache)?)
}

/// The model as it is found from here, a path or a name, and its revision.
fn model<'a>(
    args: &RunArgs,
    flags: Option<&'a VllmFlags>,
    surroundings: &Surroundings,
) -> Option<(String, Option<&'a str>)> {
    let model = flags.and_then(|flags| flags.model.as_deref()).or(args.model.as_deref())?;
    let path = match &surroundings.cwd {
        Some(cwd) if cwd.join(model).is_dir() => cwd.join(model).display().to_string(),
        _ => model.to_owned(),
    };
    Some((path, flags.and_then(|flags| flags.revision.as_deref())))
}

/// Where the model is whose size is taken in shared memory at the start.
fn prefault(
    args: &RunArgs,
    flags: Option<&VllmFlags>,
    surroundings: &Surroundings,
) -> Result<Option<PathBuf>, UsageError> {
    if !args.prefault {
        return Ok(None);
    }
    let cache = model::cache_path(|name| surroundings.variable(name));
    let found = model(args, flags, surroundings);
    let directory =
        found.as_ref().and_then(|(model, revision)| model::directory_of(model, *revision, &cache));
    match (directory, found) {
        (Some(directory), _) => Ok(Some(directory)),
        (None, Some((model, _))) => Err(UsageError::Check(format!(
            "--prefault: the size of the model's files must be known, but {model} is neither a directory on this \
             node nor in the Hugging Face cache {}",
            cache.display()
        ))),
        (None, None) => Err(UsageError::Check(
            "--prefault: name the model after `--` (or with --model PATH), because its size must be known"
                .to_owned(),
        )),
    }
}

fn serve(
    args: &RunArgs,
    flags: Option<&VllmFlags>,
    surroundings: &Surroundings,
    notes: &mut Vec<String>,
) -> Result<Option<Serve>, UsageError> {
    let Some(flags) = flags else {
        check(!args.serve, || "--serve: give the model and vLLM's flags after `--`".to_owned())?;
        return Ok(None);
    };
    if !args.serve {
        let mut unused = flags.frontend.clone();
        unused.extend(flags.host.iter().map(|_| "--host".to_owned()));
        unused.extend(flags.port.iter().map(|_| "--port".to_owned()));
        unused.retain(|token| token.starts_with('-'));
        if !unused.is_empty() {
            notes.push(format!(
                "without --serve {} have no effect: these are flags of the frontend",
                unused.join(" ")
            ));
        }
        return Ok(None);
    }
    fn one<T: PartialEq + ToString>(
        name: &str,
        ours: Option<T>,
        theirs: Option<T>,
    ) -> Result<Option<T>, UsageError> {
        match (ours, theirs) {
            (Some(ours), Some(theirs)) if ours != theirs => Err(UsageError::Check(format!(
                "{name}: {} before `--`, but {} after it",
                ours.to_string(),
                theirs.to_string()
            ))),
            (ours, theirs) => Ok(ours.or(theirs)),
        }
    }
    let port = one("--port", args.port, flags.port)?.unwrap_or(HTTP_PORT);
    let host = one("--host", args.host.clone(), flags.host.clone())?;
    let count = one("--api-server-count", args.api_server_count, flags.api_server_count)?;
    let mut api_server_count = count.unwrap_or(1);
    check(api_server_count > 0, || "--api-server-count 0: at least 1 expected with --serve".to_owned())?;
    check(api_server_count <= args.frontend_slots, || {
        format!(
            "--api-server-count {api_server_count}: each API server takes one of \
             --frontend-slots {}",
            args.frontend_slots
        )
    })?;
    let rust = surroundings
        .variable("VLLM_USE_RUST_FRONTEND")
        .is_some_and(|value| !matches!(value.as_str(), "" | "0"));
    if rust && api_server_count > 1 {
        notes.push(
            "VLLM_USE_RUST_FRONTEND is set: one API server is started, whatever --api-server-count says"
                .to_owned(),
        );
        api_server_count = 1;
    }
    Ok(Some(Serve { host, port, api_server_count: Some(api_server_count) }))
}
