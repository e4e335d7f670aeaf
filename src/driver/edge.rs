//! The edge task: owns the sockets through which this node's engines talk to their DP coordinator, one XPUB and
//! one PULL per engine incarnation. What goes out and what the reports mean decides the coordinator task, which may
//! run on another node, and in a process that comes and goes. So the edge outlives its reader: reports that
//! nobody takes are kept, bounded (see `edge/backlog.rs`), and delivered later.
//!
//! The reports of wave edges are noted on their way ([`EdgeState::wave`]): whoever takes over as DP coordinator must
//! not fall behind the engines, whatever of its predecessor's queues was lost.

mod backlog;
mod sockets;

use std::collections::BTreeMap;

use dp_sidecar_protocol::{EngineIndex, Incarnation, Wave};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use super::handles::{
    EdgeAsk, EdgeClose, EdgeHandle, EdgeNote, EdgePrepare, EdgePublish, EdgeVersion, Envelope, HandleError,
    NodeEvent, queue,
};
use crate::tasks;
use crate::transport::{Encoded, PrivateDir};
use sockets::EngineSockets;

/// What a successor of the DP coordinator has to know about the engines behind an edge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EdgeState {
    /// Newest wave, and whether it runs: by [`EdgeNote`], or reported by an engine here.
    pub wave: Option<(Wave, bool)>,
    /// Engines that have subscribed in their current life.
    pub subscribed: BTreeMap<EngineIndex, Incarnation>,
}

impl EdgeState {
    /// Takes over a word on waves unless it is older than what is known. True if it was news.
    fn note(&mut self, wave: Wave, running: bool) -> bool {
        let older = self.wave.is_some_and(|(known, _)| wave < known);
        let news = !older && self.wave != Some((wave, running));
        if news {
            self.wave = Some((wave, running));
        }
        news
    }
}

/// A started edge task.
#[derive(Debug)]
pub struct Edge {
    /// Commands. The task ends when the last handle is dropped.
    pub handle: EdgeHandle,
    /// What a successor of the DP coordinator starts from.
    pub state: watch::Receiver<EdgeState>,
}

/// Starts the edge task of a node. `dir` is where its sockets are made, `events` is read by the DP coordinator's side;
/// nothing waits when it is full.
pub fn spawn(dir: PrivateDir, events: mpsc::Sender<NodeEvent>, tracker: &TaskTracker) -> Edge {
    let (handle, inbox) = queue("edge");
    let (publish, state) = watch::channel(EdgeState::default());
    let task = Task { dir, events, tracker: tracker.clone(), engines: BTreeMap::new(), state: publish };
    tracker.spawn(tasks::named(tasks::Task::Edge, task.run(inbox)));
    Edge { handle, state }
}

struct Task {
    dir: PrivateDir,
    events: mpsc::Sender<NodeEvent>,
    tracker: TaskTracker,
    engines: BTreeMap<EngineIndex, EngineSockets>,
    state: watch::Sender<EdgeState>,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Envelope<EdgeAsk>>) {
        // It never waits for an engine, only for binding a socket file: each gets what it takes at once.
        while let Some(Envelope { ask, reply, .. }) = inbox.recv().await {
            match ask {
                EdgeAsk::EdgePrepare(EdgePrepare { rank, incarnation }) => {
                    reply.send::<EdgePrepare>(self.prepare(rank, incarnation).await);
                }
                EdgeAsk::EdgePublish(EdgePublish { ranks, frames }) => {
                    let message = Encoded::from(frames);
                    for rank in ranks {
                        if let Some(sockets) = self.engines.get_mut(&rank) {
                            sockets.publish(rank, &message);
                        }
                    }
                    reply.send::<EdgePublish>(Ok(()));
                }
                EdgeAsk::EdgeNote(EdgeNote { wave, running }) => {
                    self.state.send_if_modified(|state| state.note(wave, running));
                    reply.send::<EdgeNote>(Ok(()));
                }
                EdgeAsk::EdgeClose(EdgeClose { rank, incarnation }) => {
                    let current = self.engines.get(&rank);
                    if current.is_some_and(|sockets| sockets.incarnation == incarnation) {
                        self.close(rank);
                    }
                    reply.send::<EdgeClose>(Ok(()));
                }
                EdgeAsk::EdgeVersion(EdgeVersion {}) => {
                    reply.send::<EdgeVersion>(Ok(env!("CARGO_PKG_VERSION").to_owned()));
                }
            }
        }
    }

    async fn prepare(
        &mut self,
        rank: EngineIndex,
        incarnation: Incarnation,
    ) -> Result<(String, String), HandleError> {
        match self.engines.get(&rank) {
            Some(sockets) if sockets.incarnation == incarnation => return Ok(sockets.addresses.clone()),
            // Nobody waits for the sockets of a life that has a successor, see `NodeState::apply_ask`.
            Some(sockets) if sockets.incarnation > incarnation => {
                let newer = sockets.incarnation;
                let late =
                    format!("coordinator sockets of rank {rank}, life {incarnation}: life {newer} has some");
                return Err(HandleError::failed(late));
            }
            _ => {}
        }
        // Those of the life before close first.
        self.close(rank);
        let (events, state) = (self.events.clone(), self.state.clone());
        let sockets = EngineSockets::bind(&self.dir, rank, incarnation, events, state, &self.tracker).await;
        let sockets = sockets
            .map_err(|error| HandleError::failed(format!("coordinator sockets of rank {rank}: {error}")))?;
        let addresses = sockets.addresses.clone();
        self.engines.insert(rank, sockets);
        Ok(addresses)
    }

    fn close(&mut self, rank: EngineIndex) {
        self.engines.remove(&rank);
        self.state.send_if_modified(|state| state.subscribed.remove(&rank).is_some());
    }
}
