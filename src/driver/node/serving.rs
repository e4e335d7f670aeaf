//! How an engine begins and ceases to serve.

use dp_sidecar_protocol::machine::lifecycle::Event;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tracing::{debug, info};

use super::{Facts, Node, Outcome};
use crate::driver::handles::{Admit, Ask, CoordinatorCommand, EngineDown, EngineReady, Forget, RankAsk};

impl Node {
    pub(super) async fn tell_rank<A: Ask>(&self, rank: EngineIndex, ask: A)
    where
        RankAsk: From<A>,
    {
        if let Some(handle) = self.peers.ranks.get(&rank)
            && let Err(error) = handle.commands.tell(ask).await
        {
            debug!(rank = rank.0, %error, "{}", A::NAME);
        }
    }

    pub(super) async fn down(&mut self, rank: EngineIndex, incarnation: Incarnation, reason: String) {
        if let Some((_, node)) = self.peers.node_of(rank)
            && node.handshake.tell(Forget { rank, incarnation }).await.is_err()
        {
            debug!("the handshake task has ended before the engine");
        }
        self.tell_coordinator(CoordinatorCommand::EngineDown { rank, incarnation }).await;
        self.tell_rank(rank, EngineDown { incarnation, reason }).await;
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
            self.tell_rank(rank, ready).await;
        }
        self.bring_to_committed(ranks, false);
    }

    /// Has the update task bring engines to the committed weights; `adopted`: make sure that those that serve already
    /// have them.
    pub(super) fn bring_to_committed(&mut self, ranks: Vec<(EngineIndex, Incarnation)>, adopted: bool) {
        let updates = self.peers.updates.clone();
        let in_step = self.in_step();
        self.work.spawn(async move {
            let brought = async {
                in_step.await?;
                let brought = match adopted {
                    true => updates.adopt(ranks.clone()).await,
                    false => updates.restore(ranks.clone()).await,
                };
                brought.map_err(|error| error.to_string())
            };
            Outcome::Event(match brought.await {
                Ok(()) => Event::Restored { ranks },
                Err(reason) => Event::RestoreFailed { ranks, reason },
            })
        });
    }

    pub(super) async fn admit(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        self.tell_rank(rank, Admit { incarnation }).await;
        self.tell_coordinator(CoordinatorCommand::Admitted { rank }).await;
        info!(rank = rank.0, incarnation = incarnation.0, "engine admitted");
    }
}
