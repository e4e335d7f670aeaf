//! How an engine begins and ceases to serve.

use std::time::Duration;

use dp_sidecar_protocol::machine::lifecycle::Event;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tracing::{debug, info};

use super::{Node, Outcome};
use crate::driver::handles::{CoordinatorCommand, EngineFacts, GroupKind, HandshakeCommand, RankCommand};

/// Limit for a restarted lockstep group to run the wave that brings it to the current number.
const IN_STEP: Duration = Duration::from_secs(120);

impl Node {
    pub(super) async fn down(&mut self, rank: EngineIndex, incarnation: Incarnation, reason: String) {
        let forget = HandshakeCommand::Forget { rank, incarnation };
        let lost = match self.peers.node_of(rank) {
            Some((_, node)) => node.handshake.commands.send(forget).await.is_err(),
            None => false,
        };
        let down = CoordinatorCommand::EngineDown { rank, incarnation };
        let lost = self.peers.coordinator.commands.send(down).await.is_err() || lost;
        if lost {
            debug!("a task has ended before the engine");
        }
        if let Some(handle) = self.peers.ranks.get(&rank)
            && let Err(error) = handle.tell(RankCommand::EngineDown { incarnation, reason }).await
        {
            debug!(rank = rank.0, %error, "engine down");
        }
    }

    pub(super) async fn restore(&mut self, ranks: Vec<(EngineIndex, Incarnation)>) {
        for &(rank, incarnation) in &ranks {
            let Some(facts) = self.facts.get(&rank) else {
                continue;
            };
            let (Some((registration, layout)), Some((hash, blocks))) = (&facts.registration, &facts.ready)
            else {
                continue;
            };
            let engine = EngineFacts {
                registration: registration.clone(),
                parallel_config_hash: hash.clone(),
                num_gpu_blocks: *blocks,
                layout: *layout,
            };
            let ready = RankCommand::EngineReady { incarnation, facts: Box::new(engine.clone()) };
            self.outputs.deployment.send_modify(|d| {
                d.engines.insert(rank, engine);
            });
            if let Some(handle) = self.peers.ranks.get(&rank)
                && let Err(error) = handle.tell(ready).await
            {
                debug!(rank = rank.0, %error, "engine ready");
            }
        }
        let updates = self.peers.updates.clone();
        let lockstep = self.config.kind == GroupKind::Lockstep;
        let mut coordinator = self.peers.coordinator.snapshot.clone();
        self.work.spawn(async move {
            if lockstep {
                // Engines of a restarted group count waves from zero, the frontends do not. Until the
                // DP coordinator has brought them together a call could meet a group that runs on one
                // rank only.
                let in_step = coordinator.wait_for(|snapshot| snapshot.in_step);
                if tokio::time::timeout(IN_STEP, in_step).await.is_err() {
                    let reason = format!("the group did not reach the current wave within {IN_STEP:?}");
                    return Outcome::Event(Event::RestoreFailed { ranks, reason });
                }
            }
            let event = match updates.restore(ranks.clone()).await {
                Ok(()) => Event::Restored { ranks },
                Err(error) => Event::RestoreFailed { ranks, reason: error.to_string() },
            };
            Outcome::Event(event)
        });
    }

    pub(super) async fn admit(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        if let Some(handle) = self.peers.ranks.get(&rank)
            && let Err(error) = handle.tell(RankCommand::Admit { incarnation }).await
        {
            debug!(rank = rank.0, %error, "admit");
        }
        let admitted = CoordinatorCommand::Admitted { rank };
        if self.peers.coordinator.commands.send(admitted).await.is_err() {
            debug!("the coordinator task has ended");
        }
        info!(rank = rank.0, incarnation = incarnation.0, "engine admitted");
    }
}
