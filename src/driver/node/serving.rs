//! How an engine begins and ceases to serve.

use dp_sidecar_protocol::machine::lifecycle::Event;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tracing::{debug, info};

use super::{Facts, Node, Outcome};
use crate::driver::handles::{Admit, CoordinatorCommand, EngineDown, EngineReady, Forget};

impl Node {
    pub(super) async fn down(&mut self, rank: EngineIndex, incarnation: Incarnation, reason: String) {
        let forget = Forget { rank, incarnation };
        let lost = match self.peers.node_of(rank) {
            Some((_, node)) => node.handshake.tell(forget).await.is_err(),
            None => false,
        };
        let down = CoordinatorCommand::EngineDown { rank, incarnation };
        let lost = self.peers.coordinator.commands.send(down).await.is_err() || lost;
        if lost {
            debug!("a task has ended before the engine");
        }
        if let Some(handle) = self.peers.ranks.get(&rank)
            && let Err(error) = handle.tell(EngineDown { incarnation, reason }).await
        {
            debug!(rank = rank.0, %error, "engine down");
        }
    }

    pub(super) async fn restore(&mut self, ranks: Vec<(EngineIndex, Incarnation)>) {
        for &(rank, incarnation) in &ranks {
            let Some(engine) = self.facts.get(&rank).and_then(Facts::known) else {
                continue;
            };
            let ready = EngineReady { incarnation, facts: Box::new(engine.clone()) };
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
        let in_step = self.in_step();
        self.work.spawn(async move {
            let restored = async {
                in_step.await?;
                updates.restore(ranks.clone()).await.map_err(|error| error.to_string())
            };
            Outcome::Event(match restored.await {
                Ok(()) => Event::Restored { ranks },
                Err(reason) => Event::RestoreFailed { ranks, reason },
            })
        });
    }

    pub(super) async fn admit(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        if let Some(handle) = self.peers.ranks.get(&rank)
            && let Err(error) = handle.tell(Admit { incarnation }).await
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
