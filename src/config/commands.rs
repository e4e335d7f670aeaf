//! Command lines of the vLLM processes that this configuration asks for.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::{Config, Engines};
use crate::supervisor::SpawnSpec;
use crate::supervisor::command::{ENGINE_STOP_ORDER, FRONTEND, FRONTEND_STOP_ORDER, RELAY, engine_name};

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
        let flags = [
            ("--data-parallel-size", self.size.to_string()),
            ("--data-parallel-size-local", "1".to_owned()),
            ("--data-parallel-start-rank", rank.to_string()),
            ("--data-parallel-address", handshake.ip().to_string()),
            ("--data-parallel-rpc-port", handshake.port().to_string()),
        ];
        push_flags(&mut argv, flags);
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
        let mut flags = vec![
            ("--data-parallel-size", self.size.to_string()),
            ("--data-parallel-size-local", "0".to_owned()),
            ("--data-parallel-address", handshake.ip().to_string()),
            ("--data-parallel-rpc-port", handshake.port().to_string()),
            ("--port", serve.port.to_string()),
        ];
        flags.extend(serve.host.clone().map(|host| ("--host", host)));
        // vLLM's default is one API server per rank; the sidecar must know how many slots it takes.
        flags.push(("--api-server-count", serve.api_server_count.to_string()));
        // API servers get as long to end as the sidecar waits, unless the user chose otherwise: a flag
        // that comes later on the command line wins.
        let seconds = self.shutdown_timeout.as_secs();
        flags.extend((seconds > 0).then(|| ("--shutdown-timeout", seconds.to_string())));
        let mut argv = launch.serve();
        push_flags(&mut argv, flags);
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
}

/// Whether a variable of vLLM's environment decides what vLLM does. Shells and launchers change others from one
/// start to the next.
fn matters(variable: &str) -> bool {
    // The address of this node is found out anew by each sidecar.
    variable != "VLLM_HOST_IP" && (variable.starts_with("VLLM_") || variable.ends_with("_VISIBLE_DEVICES"))
}

fn push_flags<'a>(argv: &mut Vec<String>, flags: impl IntoIterator<Item = (&'a str, String)>) {
    argv.extend(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
}
