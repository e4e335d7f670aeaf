//! One lane per task behind the link: commands wait there in order, without keeping the link waiting.

use std::collections::BTreeMap;

use dp_sidecar_protocol::EngineIndex;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::Services;
use crate::driver::handles::{EdgeCommand, HandshakeCommand, ProcessCommand, RankCommand, StageCommand};

/// Commands waiting in one lane.
const LANE: usize = 1024;

/// See the [module](self).
pub(super) struct Lanes {
    ranks: BTreeMap<EngineIndex, mpsc::Sender<RankCommand>>,
    edge: Option<mpsc::Sender<EdgeCommand>>,
    handshake: Option<mpsc::Sender<HandshakeCommand>>,
    processes: Option<mpsc::Sender<ProcessCommand>>,
    stage: Option<mpsc::Sender<StageCommand>>,
}

impl Lanes {
    pub(super) fn start(services: &Services, tracker: &TaskTracker) -> Self {
        let ranks = services.ranks.iter();
        Self {
            ranks: ranks.map(|handle| (handle.rank, lane(handle.commands.clone(), tracker))).collect(),
            edge: services.edge.as_ref().map(|handle| lane(handle.commands.clone(), tracker)),
            handshake: services.handshake.as_ref().map(|handle| lane(handle.commands.clone(), tracker)),
            processes: services.processes.as_ref().map(|handle| lane(handle.commands.clone(), tracker)),
            stage: services.stage.as_ref().map(|handle| lane(handle.commands.clone(), tracker)),
        }
    }

    pub(super) fn rank(&self, rank: EngineIndex, command: RankCommand) -> Result<(), String> {
        match self.ranks.get(&rank) {
            Some(lane) => push(lane, command, "the rank task"),
            None => Err(format!("DP rank {rank} is not here")),
        }
    }

    pub(super) fn edge(&self, command: EdgeCommand) -> Result<(), String> {
        offer(self.edge.as_ref(), command, "coordinator sockets")
    }

    pub(super) fn handshake(&self, command: HandshakeCommand) -> Result<(), String> {
        offer(self.handshake.as_ref(), command, "handshake listeners")
    }

    pub(super) fn processes(&self, command: ProcessCommand) -> Result<(), String> {
        offer(self.processes.as_ref(), command, "processes of engines")
    }

    pub(super) fn stage(&self, command: StageCommand) -> Result<(), String> {
        offer(self.stage.as_ref(), command, "a staging area")
    }

    pub(super) const fn has_stage(&self) -> bool {
        self.stage.is_some()
    }
}

fn offer<T>(lane: Option<&mpsc::Sender<T>>, command: T, what: &str) -> Result<(), String> {
    match lane {
        Some(lane) => push(lane, command, what),
        None => Err(format!("{what} are not served here")),
    }
}

fn push<T>(lane: &mpsc::Sender<T>, command: T, what: &str) -> Result<(), String> {
    lane.try_send(command).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => format!("{what}: {LANE} commands wait already"),
        mpsc::error::TrySendError::Closed(_) => format!("{what} has ended"),
    })
}

/// Ends with the server, or with the task behind it.
fn lane<T: Send + 'static>(commands: mpsc::Sender<T>, tracker: &TaskTracker) -> mpsc::Sender<T> {
    let (sender, mut receiver) = mpsc::channel(LANE);
    tracker.spawn(async move {
        while let Some(command) = receiver.recv().await {
            if commands.send(command).await.is_err() {
                return;
            }
        }
    });
    sender
}
