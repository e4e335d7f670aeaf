//! Command lines and environments of the vLLM processes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::keeper::wire::SpawnSpec;

/// How vLLM is started: everything that does not depend on the rank.
#[derive(Clone, Debug)]
pub struct VllmLaunch {
    /// The `vllm` program.
    pub bin: PathBuf,
    /// Model as given.
    pub model: Option<String>,
    /// Flags of the engines, as the user gave them, without the frontend's own.
    pub engine_flags: Vec<String>,
    /// Flags of the frontend, as the user gave them.
    pub frontend_flags: Vec<String>,
    /// Environment of all vLLM processes, cleaned.
    pub env: BTreeMap<String, String>,
    /// Devices of each local rank: variable and its value. Empty when there are no accelerators.
    pub devices: Vec<DeviceSlice>,
}

/// Devices of one local rank.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeviceSlice {
    /// `CUDA_VISIBLE_DEVICES`, `HIP_VISIBLE_DEVICES` or `ROCR_VISIBLE_DEVICES`.
    pub variable: String,
    /// Its value for the rank.
    pub value: String,
}

impl crate::config::Config {
    /// Command line of the engine of `rank` (global), doing its handshake at `handshake`. `None` in
    /// attach mode.
    pub fn engine_spawn(
        &self,
        rank: u16,
        incarnation: u64,
        handshake: SocketAddr,
    ) -> Option<SpawnSpec> {
        let _ = (rank, incarnation, handshake);
        None
    }

    /// Command line of the supervised frontend, whose handshake socket is to listen at `handshake`.
    /// `None` without `--serve`.
    pub fn frontend_spawn(&self, incarnation: u64, handshake: SocketAddr) -> Option<SpawnSpec> {
        let _ = (incarnation, handshake);
        None
    }
}
