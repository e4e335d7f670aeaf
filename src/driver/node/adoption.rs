//! Taking over engines that live already: after a restart of the sidecar, and when a node comes back.

use std::collections::BTreeMap;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::lifecycle::{Event, Found, Phase, RankLife};
use dp_sidecar_protocol::registration::EngineReadyResponse;
use tracing::{debug, info};

use super::{Facts, Node};
use crate::driver::coordinator;
use crate::driver::handles::{CoordinatorCommand, EngineFacts};
use crate::driver::handles::{NodeState, RankReport};

/// What the lifecycle machine has to know of a node's report.
pub(super) fn found(state: &RankReport) -> Found {
    let lost = state.lost.as_ref().map(|(incarnation, _)| *incarnation);
    let ended = state.ended.as_ref().map(|(incarnation, _)| *incarnation);
    let seen = [Some(state.snapshot.incarnation), state.prepared, state.process, state.expected, lost, ended];
    Found {
        newest: seen.into_iter().flatten().max().unwrap_or_default(),
        sockets: state.prepared,
        ready: state.facts.is_some() && !state.stopping,
        admitted: state.snapshot.admitted,
        process: state.process,
        expected: state.expected,
        ended: state.ended.as_ref().map(|(_, reason)| reason.clone()),
    }
}

/// What the node task knows of an engine that it did not start.
pub(super) fn facts(state: &RankReport) -> Facts {
    let known = state.facts.as_ref();
    Facts {
        incarnation: state.process.or(state.prepared).unwrap_or_default(),
        registration: known.map(|facts| (facts.registration.clone(), facts.layout)),
        vllm_version: known.and_then(|facts| {
            EngineReadyResponse::decode(&facts.registration).ok().and_then(|response| response.vllm_version)
        }),
        ready: known.map(|facts| (facts.parallel_config_hash.clone(), facts.num_gpu_blocks)),
        handshake_at: None,
        pid: state.pid,
    }
}

impl Node {
    /// Tells everybody about the engines that go on.
    pub(super) async fn introduce_adopted(&mut self) {
        let going_on: BTreeMap<EngineIndex, RankLife> = self
            .machine
            .snapshot()
            .into_iter()
            .filter(|(_, life)| matches!(life.phase, Phase::Adopting | Phase::Restoring))
            .collect();
        for state in std::mem::take(&mut self.reported) {
            self.tell_coordinator(coordinator::adoption(&state, |rank| going_on.contains_key(&rank))).await;
        }
        for (rank, life) in going_on {
            let Some(facts) = self.facts.get(&rank) else {
                continue;
            };
            info!(rank = rank.0, incarnation = life.incarnation.0, pid = facts.pid, "engine goes on");
            let Some(known) = facts.known() else {
                continue;
            };
            let layout = known.layout;
            self.outputs.deployment.send_modify(|d| {
                d.engines.insert(rank, known);
            });
            self.tell_coordinator(CoordinatorCommand::EngineVersion { layout }).await;
        }
    }

    pub(super) async fn tell_coordinator(&self, command: CoordinatorCommand) {
        if self.peers.coordinator.commands.send(command).await.is_err() {
            debug!("the coordinator task has ended");
        }
    }

    /// A node that was away reports what it has.
    pub(super) async fn node_back(&mut self, state: &NodeState) {
        let known = |rank: EngineIndex| {
            let incarnation = self.facts.get(&rank).map(|facts| facts.incarnation);
            incarnation.is_some() && state.ranks.get(&rank).and_then(|of| of.prepared) == incarnation
        };
        self.tell_coordinator(coordinator::adoption(state, known)).await;
        for (&rank, state) in &state.ranks {
            if let Some(facts) = self.facts.get_mut(&rank) {
                facts.pid = state.pid.filter(|_| state.process == Some(facts.incarnation));
            }
        }
        let found = state.ranks.iter().map(|(&rank, state)| (rank, found(state))).collect();
        self.event(Event::NodeBack { found });
        for (&rank, state) in &state.ranks {
            // A handshake that went on while nobody listened. What was heard already changes nothing.
            if state.expected.is_some_and(|expected| self.facts_of(rank, expected).is_some()) {
                for event in &state.handshake {
                    self.handshake_event(event.clone());
                }
            }
        }
    }

    /// Waits until a lockstep group may be called. Engines of a restarted group count waves from zero, the
    /// frontends do not: until the DP coordinator has brought them together a call could meet a group that runs
    /// on one rank only.
    pub(super) fn in_step(&self) -> impl Future<Output = Result<(), String>> + Send + 'static {
        let lockstep = self.config.kind.is_lockstep();
        let mut coordinator = self.peers.coordinator.snapshot.clone();
        async move {
            if !lockstep {
                return Ok(());
            }
            let in_step = coordinator.wait_for(|snapshot| snapshot.in_step);
            match tokio::time::timeout(super::IN_STEP, in_step).await {
                Ok(_) => Ok(()),
                Err(_) => {
                    Err(format!("the group did not reach the current wave within {:?}", super::IN_STEP))
                }
            }
        }
    }
}

impl Facts {
    /// Complete facts, of an engine that has gone through its handshake.
    pub(super) fn known(&self) -> Option<EngineFacts> {
        let (registration, layout) = self.registration.clone()?;
        let (parallel_config_hash, num_gpu_blocks) = self.ready.clone()?;
        Some(EngineFacts { registration, parallel_config_hash, num_gpu_blocks, layout })
    }
}
