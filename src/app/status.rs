//! Puts the snapshots of all tasks together for `sidecar status`.

use std::collections::BTreeMap;
use std::time::Duration;

use dp_sidecar_protocol::machine::lifecycle::Phase;
use dp_sidecar_protocol::machine::memory::Weights;

use super::commands::Handles;
use super::nodes;
use super::{updates, waiting};
use crate::api::{
    ControllerStatus, DeploymentStatus, EngineStatus, FrontendSnapshot, FrontendStatus, RelayVersion, Status,
    UNKNOWN, VersionReport, WeightsStatus,
};
use crate::config::{Config, Serve};
use crate::driver::handles::{EdgeVersion, Memory, RankSnapshot};

/// For the answer of a node's relay process.
const RELAY_LIMIT: Duration = Duration::from_secs(3);

impl Handles {
    /// What [`Answers::status`](super::runtime::Answers::status) says.
    pub(super) async fn whole_status(&self, stopping: bool) -> Status {
        let gpus = self.gpus.report().await;
        let engines = self.engines();
        let state = if stopping {
            "stopping"
        } else if engines.iter().all(|e| e.state == "admitted") {
            "serving"
        } else if engines.iter().any(|e| e.restarts > 0 || e.state == "failed") {
            "degraded"
        } else {
            "starting"
        };
        let mut status = Status {
            engines,
            frontends: self.frontends(),
            coordinator: self.coordinator.snapshot.borrow().clone(),
            weights: self.weights(),
            controller: self.controller(),
            gpus,
            nodes: self
                .nodes
                .as_ref()
                .map_or_else(Vec::new, |all| nodes::status(&all.own, &all.leader, &all.remotes)),
            ..waiting::status(&self.run, state)
        };
        status.sidecar.keeper_pid = self.keeper.pid();
        status.sidecar.relay_pid = *self.relay.borrow();
        status
    }

    fn controller(&self) -> ControllerStatus {
        let snapshot = self.control.snapshot.borrow();
        ControllerStatus { holder: snapshot.holder.clone(), paused: snapshot.paused_by.is_some() }
    }

    fn engines(&self) -> Vec<EngineStatus> {
        let node = self.node.borrow();
        let coordinator = self.coordinator.snapshot.borrow();
        let version = self.weights().version;
        let in_doubt = self.updates.snapshot.borrow().in_doubt.clone();
        let mut engines = Vec::with_capacity(self.ranks.len());
        for handle in &self.ranks {
            let snapshot = handle.snapshot.borrow();
            let load = coordinator.loads.get(&handle.rank.0).copied().unwrap_or_default();
            let mut status = EngineStatus {
                waiting: load.waiting,
                running: load.running,
                kv_cache_usage: load.kv_cache_usage,
                ..engine(&snapshot)
            };
            if let Some(rank) = node.get(&handle.rank) {
                status.pid = rank.pid;
                status.vllm_version = rank.vllm_version.clone();
                status.state = state_name(rank.life.phase).to_owned();
                status.incarnation = rank.life.incarnation.0;
                status.restarts = rank.life.restarts;
                status.last_error = rank.life.last_error.clone();
                // Not what its last output was stamped with: that label changes apart from the bytes.
                let held = if in_doubt.contains(&handle.rank) { UNKNOWN } else { &version };
                status.weight_version = (rank.life.phase == Phase::Serving).then(|| held.to_owned());
            }
            if snapshot.memory.weights != Weights::Known {
                // Its stamp is that of weights that it had.
                status.weight_version = Some(UNKNOWN.to_owned());
            }
            engines.push(status);
        }
        engines
    }

    fn weights(&self) -> WeightsStatus {
        updates::weights(&self.updates, self.control.snapshot.borrow().external_weights)
    }

    /// Wanted frontends with their requests in flight.
    pub(super) fn frontends(&self) -> Vec<FrontendStatus> {
        let mut in_flight: BTreeMap<u64, u64> = BTreeMap::new();
        for handle in &self.ranks {
            for (&frontend, &requests) in &handle.snapshot.borrow().in_flight {
                *in_flight.entry(frontend).or_default() += requests;
            }
        }
        let frontends = self.attachments.snapshot.borrow();
        let with_requests = |attachment: &FrontendSnapshot| FrontendStatus {
            attachment: attachment.clone(),
            in_flight: attachment.id.and_then(|id| in_flight.get(&id).copied()).unwrap_or(0),
        };
        frontends.iter().map(with_requests).collect()
    }

    /// Versions of everything that has one.
    pub(super) async fn versions(&self) -> VersionReport {
        let relays = self.edges.iter().map(async |(first, edge)| {
            let answer = edge.ask_within(RELAY_LIMIT, EdgeVersion {}).await;
            (
                first.0,
                answer.map_or_else(|error| RelayVersion::Unknown(error.to_string()), RelayVersion::Version),
            )
        });
        let relays = futures::future::join_all(relays).await.into_iter().collect();
        let node = self.node.borrow();
        let vllm =
            node.iter().filter_map(|(rank, entry)| Some((rank.0, entry.vllm_version.clone()?))).collect();
        VersionReport {
            sidecar: env!("CARGO_PKG_VERSION").to_owned(),
            relays,
            vllm,
            weights: self.weights().version,
        }
    }
}

/// What a rank task alone tells.
pub(super) fn engine(snapshot: &RankSnapshot) -> EngineStatus {
    EngineStatus {
        rank: snapshot.rank,
        incarnation: snapshot.incarnation.0,
        asleep: asleep(&snapshot.memory),
        without_weights: snapshot.memory.weights == Weights::Gone,
        in_flight: snapshot.in_flight.values().sum(),
        held: snapshot.held,
        held_bytes: snapshot.held_bytes,
        refused: snapshot.refused,
        last_refusal: snapshot.last_refusal.clone(),
        ..EngineStatus::default()
    }
}

/// Tags of the memory that sleeps, as `wake` takes them.
pub(super) fn asleep(memory: &Memory) -> Vec<String> {
    let tags = [("weights", memory.weights_sleep), ("kv_cache", memory.cache_sleeps)];
    tags.into_iter().filter(|(_, sleeps)| *sleeps).map(|(tag, _)| tag.to_owned()).collect()
}

/// The words of `sidecar status`.
fn state_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting | Phase::Stopped => "stopped",
        Phase::Preparing | Phase::Starting => "starting",
        Phase::Connected => "handshake",
        Phase::Ready => "registered",
        Phase::Restoring => "restoring",
        Phase::Adopting | Phase::Serving => "admitted",
        Phase::Stopping => "stopping",
        Phase::GivenUp => "failed",
    }
}

/// What the configuration alone tells.
pub(super) fn deployment(config: &Config) -> DeploymentStatus {
    DeploymentStatus {
        kind: config.kind,
        size: config.size,
        start_rank: config.start_rank,
        size_local: config.size_local,
        model: config.model().map(str::to_owned),
        http: config.serve.as_ref().map(Serve::http_address),
    }
}
