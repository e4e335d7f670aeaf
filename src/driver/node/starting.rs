//! How an engine is started and stopped.

use std::net::SocketAddr;

use dp_sidecar_protocol::machine::lifecycle::Event;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tracing::debug;

use super::{ANSWER, Facts, Node, Outcome};
use crate::config::Engines;
use crate::driver::handles::{
    EdgePrepare, Expect, GroupKind, HandleError, Listen, Prepare, ProcessHandle, Spawn, StopEngine,
};
use crate::driver::init;

impl Node {
    pub(super) fn prepare(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        self.facts.insert(rank, Facts { incarnation, ..Facts::default() });
        let failed = move |reason: String| Outcome::Event(Event::StartFailed { rank, incarnation, reason });
        let ports = match self.ports(incarnation) {
            Ok(ports) => ports,
            Err(reason) => {
                self.work.spawn(async move { failed(reason) });
                return;
            }
        };
        let (Some(handle), Some((_, node))) =
            (self.peers.ranks.get(&rank).cloned(), self.peers.node_of(rank))
        else {
            return;
        };
        let (edge, handshake) = (node.edge.clone(), node.handshake.clone());
        let config = self.config.clone();
        self.work.spawn(async move {
            let prepared: Result<SocketAddr, HandleError> = async {
                let slots = handle.ask_within(ANSWER, Prepare { incarnation }).await?;
                let coordinator = edge.ask_within(ANSWER, EdgePrepare { rank, incarnation }).await?;
                let listen = match config.engines {
                    Engines::Spawn(_) => Listen::Own,
                    Engines::Attach => Listen::Shared,
                };
                let init = init::encode(&config, slots, coordinator, &ports);
                handshake.ask_within(ANSWER, Expect { rank, incarnation, listen, init }).await
            }
            .await;
            match prepared {
                Ok(address) => Outcome::Prepared { rank, incarnation, address },
                Err(error) => failed(error.to_string()),
            }
        });
    }

    /// Ports of the lockstep group's stores: the same for all ranks of one generation.
    fn ports(&mut self, generation: Incarnation) -> Result<Vec<u16>, String> {
        if self.config.kind == GroupKind::Independent {
            return Ok(Vec::new());
        }
        match &self.group_ports {
            Some((of, ports)) if *of == generation => Ok(ports.clone()),
            _ => {
                let ports = init::free_ports()?;
                self.group_ports = Some((generation, ports.clone()));
                Ok(ports)
            }
        }
    }

    pub(super) fn spawn(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        let address = self.facts.get(&rank).and_then(|f| f.handshake_at);
        let processes = self.peers.node_of(rank).and_then(|(_, node)| node.processes.clone());
        self.work.spawn(async move {
            let failed = |reason: &str| {
                Outcome::Event(Event::StartFailed { rank, incarnation, reason: reason.to_owned() })
            };
            let Some(handshake) = address else {
                return failed("its handshake address is not known");
            };
            let Some(processes) = processes else {
                return failed("no process can be started on its node");
            };
            let spawn = Spawn { rank, incarnation, handshake };
            match processes.ask_within(ANSWER + ANSWER, spawn).await {
                Ok(pid) => Outcome::Spawned { rank, incarnation, pid },
                // No answer does not mean no process: if there is one it must not stay.
                Err(error @ HandleError::Deadline { .. }) if stop_child(&processes, rank).await => {
                    Outcome::Event(Event::Fence { rank, reason: error.to_string() })
                }
                Err(error) => failed(&error.to_string()),
            }
        });
    }

    pub(super) fn stop_process(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        let Some((id, node)) = self.peers.node_of(rank) else {
            return;
        };
        if self.keeper_away.contains(&id) {
            return;
        }
        let Some(processes) = node.processes.clone() else {
            return;
        };
        debug!(rank = rank.0, incarnation = incarnation.0, "stopping the engine");
        self.work.spawn(async move {
            stop_child(&processes, rank).await;
            Outcome::Done
        });
    }
}

/// Has the process of a rank stopped. False if there is none, or if nobody answers.
async fn stop_child(processes: &ProcessHandle, rank: EngineIndex) -> bool {
    // It may have exited by itself a moment ago: then its exit is on the way.
    let stopped = processes.ask_within(ANSWER + ANSWER, StopEngine { rank }).await;
    if let Err(error) = &stopped {
        debug!(rank = rank.0, %error, "stop of the engine");
    }
    stopped.is_ok()
}
