//! What happened, told to the lifecycle machine.

use bytes::Bytes;
use dp_sidecar_protocol::machine::lifecycle::Event;
use dp_sidecar_protocol::registration::EngineReadyResponse;
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tracing::{error, info, warn};

use super::{Node, Outcome};
use crate::driver::handles::{
    CoordinatorCommand, HandshakeEvent, NodeEvent, NodeId, ProcessEvent, RankEvent,
};
use crate::driver::init;

impl Node {
    pub(super) fn work_done(&mut self, done: Result<Outcome, tokio::task::JoinError>) {
        match done {
            Ok(Outcome::Event(event)) => self.event(event),
            Ok(Outcome::Prepared { rank, incarnation, address }) => {
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.handshake_at = Some(address);
                    self.event(Event::Prepared { rank, incarnation });
                }
            }
            Ok(Outcome::Spawned { rank, incarnation, pid }) => {
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.pid = Some(pid);
                }
                self.event(Event::Spawned { rank, incarnation });
            }
            Ok(Outcome::Done) => {}
            Err(error) => error!(%error, "a task of the node task failed"),
        }
    }

    pub(super) async fn node_event(&mut self, node: NodeId, event: NodeEvent) {
        match event {
            NodeEvent::Rank(event) => self.rank_event(event).await,
            NodeEvent::Handshake(event) => self.handshake_event(event),
            NodeEvent::Process(event) => self.process_event(node, event),
            NodeEvent::Connected(state) => {
                info!(%node, "node joined again");
                let ranks = self.peers.ranks_of(node);
                if !self.away.remove(&node) {
                    // Away too briefly to be noticed, but what was told meanwhile is lost all the same.
                    self.event(Event::NodeAway { ranks });
                }
                self.node_back(&state).await;
            }
            NodeEvent::Disconnected { reason } => {
                warn!(%node, %reason, "node left; its engines keep running");
                let ranks = self.peers.ranks_of(node);
                self.away.insert(node);
                self.event(Event::NodeAway { ranks });
            }
            // For others.
            NodeEvent::Snapshot(_)
            | NodeEvent::Held(_)
            | NodeEvent::Wake(_)
            | NodeEvent::RouteLost(_)
            | NodeEvent::Edge(_)
            | NodeEvent::Stage(_) => {}
        }
    }

    fn process_event(&mut self, node: NodeId, event: ProcessEvent) {
        match event {
            ProcessEvent::Exited { rank, incarnation, requested: _, reason } => {
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.pid = None;
                }
                self.event(Event::Exited { rank, incarnation, reason });
            }
            ProcessEvent::NodeStops { reason } => {
                warn!(%node, %reason, "node stops; its ranks are down until it is back");
                let ranks = self.peers.ranks_of(node);
                self.event(Event::NodeAway { ranks });
            }
            ProcessEvent::KeeperAway => {
                self.keeper_away.insert(node);
            }
            ProcessEvent::KeeperLost => {
                self.keeper_away.remove(&node);
                let ranks = self.peers.ranks_of(node);
                for rank in &ranks {
                    if let Some(facts) = self.facts.get_mut(rank) {
                        facts.pid = None;
                    }
                }
                self.event(Event::KeeperLost { ranks });
            }
        }
    }

    pub(super) fn handshake_event(&mut self, event: HandshakeEvent) {
        match event {
            HandshakeEvent::Connected { rank, incarnation } => {
                info!(rank = rank.0, incarnation = incarnation.0, "HELLO answered with INIT");
                self.event(Event::Connected { rank, incarnation });
            }
            HandshakeEvent::Ready { rank, incarnation, parallel_config_hash, num_gpu_blocks } => {
                info!(rank = rank.0, incarnation = incarnation.0, "engine is READY");
                if let Some(facts) = self.facts_of(rank, incarnation) {
                    facts.ready = Some((parallel_config_hash, num_gpu_blocks));
                    self.event(Event::HandshakeReady { rank, incarnation });
                }
            }
            HandshakeEvent::Refused { rank: None, error } => warn!(%error, "handshake refused"),
            HandshakeEvent::Refused { rank: Some(rank), error } => {
                error!(rank = rank.0, %error, "handshake refused");
                self.event(Event::Fence { rank, reason: error });
            }
        }
    }

    pub(super) async fn rank_event(&mut self, event: RankEvent) {
        match event {
            RankEvent::Lost { rank, incarnation, reason } => {
                warn!(rank = rank.0, incarnation = incarnation.0, %reason, "engine lost");
                self.event(Event::Lost { rank, incarnation, reason });
            }
            RankEvent::Registered { rank, incarnation, frame } => {
                self.registered(rank, incarnation, frame).await;
            }
        }
    }

    async fn registered(&mut self, rank: EngineIndex, incarnation: Incarnation, frame: Bytes) {
        let Some(facts) = self.facts.get_mut(&rank).filter(|f| f.incarnation == incarnation) else {
            return;
        };
        let layout = match init::layout_of(&frame, self.config.allow_untested_vllm) {
            Ok(layout) => layout,
            Err(reason) => {
                error!(rank = rank.0, %reason, "engine refused");
                self.event(Event::Fence { rank, reason });
                return;
            }
        };
        let response = EngineReadyResponse::decode(&frame);
        let version = response.as_ref().ok().and_then(|r| r.vllm_version.clone());
        info!(
            rank = rank.0,
            incarnation = incarnation.0,
            vllm = version.as_deref().unwrap_or("unknown"),
            "engine registered"
        );
        facts.vllm_version = version;
        facts.registration = Some((frame, layout));
        self.tell_coordinator(CoordinatorCommand::EngineVersion { layout }).await;
        if let Ok(response) = &response
            && let Err(reason) = init::check_kind(self.config.kind, self.config.size, rank, response)
        {
            error!(rank = rank.0, %reason, "engine refused");
            self.event(Event::Fence { rank, reason });
            return;
        }
        self.event(Event::Registered { rank, incarnation });
    }
}
