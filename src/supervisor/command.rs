//! Command lines of the vLLM processes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::keeper::wire::SpawnSpec;
use crate::config::{Config, Engines};

/// Name of the supervised frontend among the keeper's children.
pub const FRONTEND: &str = "frontend";
/// Name of the relay process among the keeper's children.
pub const RELAY: &str = "relay";
/// The frontend is stopped before the engines, so that it can drain.
const FRONTEND_STOP_ORDER: u32 = 0;
const ENGINE_STOP_ORDER: u32 = 1;
/// The relay process is stopped after the engines, which are connected to it.
pub const RELAY_STOP_ORDER: u32 = 2;

/// How vLLM is started: everything that does not depend on the rank.
#[derive(Clone, Debug)]
pub struct VllmLaunch {
    /// The `vllm` program.
    pub bin: PathBuf,
    /// Model as given.
    pub model: Option<String>,
    /// Flags of all processes, as the user gave them.
    pub common_flags: Vec<String>,
    /// Flags of the frontend alone.
    pub frontend_flags: Vec<String>,
    /// Environment of all vLLM processes, cleaned.
    pub env: BTreeMap<String, String>,
    /// Devices of each local rank. Empty when there are no accelerators.
    pub devices: Vec<DeviceSlice>,
    /// Directory in which relative paths of the flags mean something.
    pub cwd: Option<PathBuf>,
}

/// Devices of one local rank.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeviceSlice {
    /// `CUDA_VISIBLE_DEVICES`, `HIP_VISIBLE_DEVICES` or `ROCR_VISIBLE_DEVICES`.
    pub variable: String,
    /// Its value for the rank.
    pub value: String,
}

/// Name of a rank's engine among the keeper's children.
pub fn engine_name(rank: u16) -> String {
    format!("engine-{rank}")
}

/// The rank behind a child's name.
pub fn engine_rank(name: &str) -> Option<u16> {
    name.strip_prefix("engine-")?.parse().ok()
}

impl Config {
    /// Children of the keeper that a new sidecar of the same deployment goes on with.
    pub(crate) fn children_to_keep(&self) -> BTreeSet<String> {
        let spawned = matches!(self.engines, Engines::Spawn(_));
        let engines = self.local_ranks().filter(|_| spawned).map(engine_name);
        let frontend = self.serve.iter().map(|_| FRONTEND.to_owned());
        engines.chain(frontend).chain([RELAY.to_owned()]).collect()
    }

    /// Names what runs here: engines that were started under another digest are not those that this
    /// configuration asks for.
    pub(crate) fn digest(&self) -> String {
        let launch = match &self.engines {
            Engines::Spawn(launch) => serde_json::json!({
                "bin": launch.bin,
                "model": launch.model,
                "flags": launch.common_flags,
                "frontend_flags": launch.frontend_flags,
                "env": launch.env.iter().filter(|(name, _)| matters(name)).collect::<Vec<_>>(),
                "devices": launch.devices,
                "cwd": launch.cwd,
            }),
            Engines::Attach => serde_json::json!({ "address": self.address, "port": self.rpc_port }),
        };
        let all = serde_json::json!({
            "launch": launch,
            "ranks": [self.start_rank, self.size_local, self.size],
            "kind": self.kind,
            "slots": self.frontend_slots,
            "serve": self.serve.as_ref().map(|s| (&s.host, s.port, s.api_server_count)),
        });
        blake3::hash(all.to_string().as_bytes()).to_hex().to_string()
    }

    /// The engine of `rank` (global), doing its handshake at `handshake`: a launcher of its own for
    /// each rank, because `vllm serve --headless` ends with the first of its engines that dies.
    /// `None` in attach mode, or if the rank is not of this node.
    pub fn engine_spawn(&self, rank: u16, incarnation: u64, handshake: SocketAddr) -> Option<SpawnSpec> {
        let Engines::Spawn(launch) = &self.engines else {
            return None;
        };
        let local = self.local_ranks().position(|own| own == rank)?;
        let mut argv = launch.serve();
        argv.push("--headless".to_owned());
        push_flags(
            &mut argv,
            &[
                ("--data-parallel-size", self.size.to_string()),
                ("--data-parallel-size-local", "1".to_owned()),
                ("--data-parallel-start-rank", rank.to_string()),
                ("--data-parallel-address", handshake.ip().to_string()),
                ("--data-parallel-rpc-port", handshake.port().to_string()),
            ],
        );
        // No --shutdown-timeout: the sidecar has drained when it stops an engine. With one, vLLM waits
        // that long for workers that hang in their teardown (seen on 0.32.0: 25 s instead of 5).
        argv.extend_from_slice(&launch.common_flags);
        let mut env = launch.env.clone();
        if let Some(slice) = launch.devices.get(local) {
            env.insert(slice.variable.clone(), slice.value.clone());
        }
        Some(SpawnSpec {
            name: engine_name(rank),
            incarnation,
            argv,
            env,
            cwd: launch.cwd.clone(),
            stop_order: ENGINE_STOP_ORDER,
        })
    }

    /// The supervised frontend, which listens for its engines' handshake at `handshake`. `None`
    /// without `--serve`.
    pub fn frontend_spawn(&self, incarnation: u64, handshake: SocketAddr) -> Option<SpawnSpec> {
        let Engines::Spawn(launch) = &self.engines else {
            return None;
        };
        let serve = self.serve.as_ref()?;
        let mut argv = launch.serve();
        push_flags(
            &mut argv,
            &[
                ("--data-parallel-size", self.size.to_string()),
                ("--data-parallel-size-local", "0".to_owned()),
                ("--data-parallel-address", handshake.ip().to_string()),
                ("--data-parallel-rpc-port", handshake.port().to_string()),
                ("--port", serve.port.to_string()),
            ],
        );
        if let Some(host) = &serve.host {
            push_flags(&mut argv, &[("--host", host.clone())]);
        }
        // vLLM's default is one API server per rank; the sidecar must know how many slots it takes.
        let count = serve.api_server_count.unwrap_or(1);
        push_flags(&mut argv, &[("--api-server-count", count.to_string())]);
        self.push_shutdown_timeout(&mut argv);
        argv.extend_from_slice(&launch.common_flags);
        argv.extend_from_slice(&launch.frontend_flags);
        Some(SpawnSpec {
            name: FRONTEND.to_owned(),
            incarnation,
            argv,
            env: launch.env.clone(),
            cwd: launch.cwd.clone(),
            stop_order: FRONTEND_STOP_ORDER,
        })
    }

    /// API servers get as long to end as the sidecar waits, unless the user chose otherwise: a flag
    /// that comes later on the command line wins.
    fn push_shutdown_timeout(&self, argv: &mut Vec<String>) {
        let seconds = self.shutdown_timeout.as_secs();
        if seconds > 0 {
            push_flags(argv, &[("--shutdown-timeout", seconds.to_string())]);
        }
    }
}

impl VllmLaunch {
    /// Whether the program is there, as the keeper will look for it.
    pub fn finds_bin(&self) -> bool {
        let in_directory = |directory: &Path| {
            let path = match &self.cwd {
                Some(cwd) => cwd.join(directory).join(&self.bin),
                None => directory.join(&self.bin),
            };
            path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
        };
        if self.bin.components().count() > 1 {
            return in_directory(Path::new(""));
        }
        let path = self.env.get("PATH").map_or("/bin:/usr/bin", String::as_str);
        path.split(':').any(|entry| in_directory(Path::new(entry)))
    }

    fn serve(&self) -> Vec<String> {
        let mut argv = vec![self.bin.display().to_string(), "serve".to_owned()];
        argv.extend(self.model.clone());
        argv
    }
}

/// Whether a variable of vLLM's environment decides what vLLM does. Shells and launchers change others from one
/// start to the next.
fn matters(variable: &str) -> bool {
    // The address of this node is found out anew by each sidecar.
    variable != "VLLM_HOST_IP" && (variable.starts_with("VLLM_") || variable.ends_with("_VISIBLE_DEVICES"))
}

fn push_flags(argv: &mut Vec<String>, flags: &[(&str, String)]) {
    for (flag, value) in flags {
        argv.push((*flag).to_owned());
        argv.push(value.clone());
    }
}

/// A command line as one would type it into a shell.
pub fn shell_line(argv: &[String]) -> String {
    let words: Vec<String> = argv.iter().map(|word| shell_word(word)).collect();
    words.join(" ")
}

fn shell_word(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=,@%+".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_a_shell_needs_it() {
        let argv = ["vllm", "--hf-overrides", r#"{"a": 1}"#, "", "it's"].map(str::to_owned);
        assert_eq!(shell_line(&argv), r#"vllm --hf-overrides '{"a": 1}' '' 'it'\''s'"#);
    }

    #[test]
    fn the_rank_is_read_off_a_childs_name() {
        assert_eq!(engine_rank(&engine_name(17)), Some(17));
        assert_eq!(engine_rank(FRONTEND), None);
    }
}
