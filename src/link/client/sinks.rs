//! Queues between a link's client and those who read its events, so that the client never waits for them: a
//! reader may itself be waiting for an answer of the client.

use dp_sidecar_protocol::EngineIndex;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::task::TaskTracker;

use super::NodeSinks;
use crate::driver::handles::NodeState;
use crate::driver::handles::{
    EdgeEvent, HandshakeEvent, HeldCall, ProcessEvent, RankEvent, RouteLost, StageEvent,
};

/// Events waiting for one reader.
const QUEUE: usize = 1024;

/// See the [module](self).
pub(super) struct Sinks {
    ranks: mpsc::Sender<RankEvent>,
    held: mpsc::Sender<HeldCall>,
    wakes: mpsc::Sender<EngineIndex>,
    edge: mpsc::Sender<EdgeEvent>,
    handshake: mpsc::Sender<HandshakeEvent>,
    processes: mpsc::Sender<ProcessEvent>,
    stage: mpsc::Sender<StageEvent>,
    routes: mpsc::Sender<RouteLost>,
    states: mpsc::Sender<NodeState>,
}

/// A reader does not take its events: the connection has to be given up, the state of the next one makes up for
/// what is lost.
#[derive(Debug)]
pub(super) struct Full(pub(super) &'static str);

impl Sinks {
    pub(super) fn start(sinks: NodeSinks, tracker: &TaskTracker) -> Self {
        Self {
            ranks: queue(sinks.ranks, tracker),
            held: queue(sinks.held, tracker),
            wakes: sinks.wakes,
            edge: queue(sinks.edge, tracker),
            handshake: queue(sinks.handshake, tracker),
            processes: queue(sinks.processes, tracker),
            stage: queue(sinks.stage, tracker),
            routes: queue(sinks.routes, tracker),
            states: queue(sinks.states, tracker),
        }
    }

    pub(super) fn rank(&self, event: RankEvent) -> Result<(), Full> {
        send(&self.ranks, event, "events of ranks")
    }

    pub(super) fn held(&self, call: HeldCall) -> Result<(), Full> {
        send(&self.held, call, "control calls")
    }

    /// When full, the wakes in the queue come later than the request: that is enough.
    pub(super) fn wake(&self, rank: EngineIndex) {
        let _ = self.wakes.try_send(rank);
    }

    pub(super) fn edge(&self, event: EdgeEvent) -> Result<(), Full> {
        send(&self.edge, event, "reports of engines")
    }

    pub(super) fn handshake(&self, event: HandshakeEvent) -> Result<(), Full> {
        send(&self.handshake, event, "events of handshakes")
    }

    pub(super) fn process(&self, event: ProcessEvent) -> Result<(), Full> {
        send(&self.processes, event, "events of processes")
    }

    pub(super) fn stage(&self, event: StageEvent) -> Result<(), Full> {
        let progress = matches!(event, StageEvent::Progress { .. });
        match send(&self.stage, event, "events of staging") {
            Err(_) if progress => Ok(()),
            sent => sent,
        }
    }

    pub(super) fn route_lost(&self, loss: RouteLost) -> Result<(), Full> {
        send(&self.routes, loss, "losses of routes")
    }

    pub(super) fn state(&self, state: NodeState) -> Result<(), Full> {
        send(&self.states, state, "states")
    }
}

fn send<T>(sink: &mpsc::Sender<T>, event: T, what: &'static str) -> Result<(), Full> {
    match sink.try_send(event) {
        // Nobody wants to know.
        Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
        Err(TrySendError::Full(_)) => Err(Full(what)),
    }
}

/// Ends with the client, or with the reader.
fn queue<T: Send + 'static>(sink: mpsc::Sender<T>, tracker: &TaskTracker) -> mpsc::Sender<T> {
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    tracker.spawn(async move {
        while let Some(event) = receiver.recv().await {
            if sink.send(event).await.is_err() {
                return;
            }
        }
    });
    sender
}
