//! One queue out of all that happens behind a link.

use std::pin::Pin;

use dp_sidecar_protocol::EngineIndex;
use futures::stream::{self, SelectAll, Stream, StreamExt};
use tokio::sync::mpsc;

use super::Sources;
use crate::driver::handles::NodeState;
use crate::driver::handles::{
    EdgeEvent, HandshakeEvent, HeldCall, ProcessEvent, RankEvent, RankHandle, RouteLost, StageEvent,
};

/// Something that happened behind the link.
#[expect(clippy::large_enum_variant, reason = "the large ones are rare, and none is kept")]
pub(super) enum Happened {
    Rank(RankEvent),
    Held(HeldCall),
    Wake(EngineIndex),
    Edge(EdgeEvent),
    Handshake(HandshakeEvent),
    Process(ProcessEvent),
    Stage(StageEvent),
    /// From a link that is passed on: it was made again.
    State(NodeState),
    RouteLost(RouteLost),
    /// A rank's snapshot has changed.
    Snapshot(EngineIndex),
}

pub(super) type Happenings = SelectAll<Pin<Box<dyn Stream<Item = Happened> + Send>>>;

pub(super) fn merge(sources: Sources, losses: mpsc::Receiver<RouteLost>, ranks: &[RankHandle]) -> Happenings {
    let mut all: Happenings = SelectAll::new();
    all.push(events(sources.ranks, Happened::Rank));
    all.push(events(sources.held, Happened::Held));
    all.push(events(sources.wakes, Happened::Wake));
    all.push(events(sources.edge, Happened::Edge));
    all.push(events(sources.handshake, Happened::Handshake));
    all.push(events(sources.processes, Happened::Process));
    all.push(events(sources.stage, Happened::Stage));
    all.push(events(sources.states, Happened::State));
    all.push(events(sources.routes, Happened::RouteLost));
    all.push(events(losses, Happened::RouteLost));
    for handle in ranks {
        let changes = stream::unfold(handle.snapshot.clone(), {
            let rank = handle.rank;
            move |mut snapshot| async move {
                snapshot.changed().await.ok()?;
                Some((Happened::Snapshot(rank), snapshot))
            }
        });
        all.push(Box::pin(changes));
    }
    all
}

fn events<T: Send + 'static>(
    receiver: mpsc::Receiver<T>,
    happened: impl Fn(T) -> Happened + Send + 'static,
) -> Pin<Box<dyn Stream<Item = Happened> + Send>> {
    let received = stream::unfold(receiver, |mut receiver| async move {
        let event = receiver.recv().await?;
        Some((event, receiver))
    });
    Box::pin(received.map(happened))
}
