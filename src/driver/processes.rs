//! The process task: what a [`ProcessHandle`] of this node asks for is done by its keeper. The command line of
//! an engine is built from this node's own configuration, whoever asks.

use std::sync::Arc;

use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use super::handles::{
    Envelope, HandleError, NodeEvent, ProcessAsk, ProcessEvent, ProcessHandle, Spawn, StopEngine, queue,
};
use super::init;
use crate::config::Config;
use crate::driver::handles::NodeState;
use crate::supervisor::client::{Inherited, KeeperClient, KeeperError};
use crate::supervisor::command::{engine_name, engine_rank, log_line};
use crate::supervisor::keeper::wire::{ExitReport, ExitStatus, KeeperEvent};
use crate::tasks;

/// Starts the task. `keeper_events` are those about engines and about the keeper itself; what becomes of them
/// goes to `events`. It ends with its last handle, or when `stop` is cancelled.
pub fn spawn(
    config: Arc<Config>,
    keeper: KeeperClient,
    keeper_events: mpsc::Receiver<KeeperEvent>,
    events: mpsc::Sender<NodeEvent>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> ProcessHandle {
    let (handle, inbox) = queue("process");
    let task = Task { config, keeper, events, work: JoinSet::new() };
    tracker.spawn(tasks::named(tasks::Task::Processes, task.run(inbox, keeper_events, stop)));
    handle
}

/// Adds what the keeper has left of earlier lives to what a node reports about its ranks.
pub fn report(inherited: &Inherited, ranks: impl IntoIterator<Item = EngineIndex>, state: &mut NodeState) {
    for rank in ranks {
        let name = engine_name(rank.0);
        let state = state.ranks.entry(rank).or_default();
        state.snapshot.rank = rank;
        if let Some(child) = inherited.child(&name) {
            state.pid = Some(child.pid);
            state.process = Some(Incarnation(child.incarnation));
            state.stopping = child.stopping;
        }
        state.ended = inherited
            .exit(&name)
            .map(|report| (Incarnation(report.incarnation), init::describe_exit(report)));
    }
}

struct Task {
    config: Arc<Config>,
    keeper: KeeperClient,
    events: mpsc::Sender<NodeEvent>,
    /// Exchanges with the keeper. Each of them has a deadline there.
    work: JoinSet<()>,
}

impl Task {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Envelope<ProcessAsk>>,
        mut keeper_events: mpsc::Receiver<KeeperEvent>,
        stop: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                command = inbox.recv() => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                Some(event) = keeper_events.recv() => {
                    if let Some(event) = translate(event)
                        && self.events.send(NodeEvent::Process(event)).await.is_err()
                    {
                        break;
                    }
                }
                Some(done) = self.work.join_next() => {
                    if let Err(error) = done {
                        error!(%error, "an exchange with the keeper failed");
                    }
                }
            }
        }
        self.work.shutdown().await;
    }

    fn command(&mut self, Envelope { ask, reply, .. }: Envelope<ProcessAsk>) {
        let keeper = self.keeper.clone();
        match ask {
            ProcessAsk::Spawn(Spawn { rank, incarnation, handshake }) => {
                let Some(spec) = self.config.engine_spawn(rank.0, incarnation.0, handshake) else {
                    let error =
                        format!("engine {rank} cannot be started here: another node's rank, or no MODEL");
                    reply.send::<Spawn>(Err(HandleError::failed(error)));
                    return;
                };
                info!(rank = rank.0, incarnation = incarnation.0, command = %log_line(&spec.argv), "starting engine");
                self.work.spawn(async move {
                    let spawned = keeper.spawn(spec).await;
                    // Whoever asked may have given up; the process is then told to stop by what follows.
                    reply.send::<Spawn>(spawned.map_err(failed));
                });
            }
            ProcessAsk::StopEngine(StopEngine { rank }) => {
                // Nothing is left to drain: the app has waited for requests, or the engine is lost.
                let grace = self.config.kill_grace;
                self.work.spawn(async move {
                    let stopped = keeper.stop(&engine_name(rank.0), grace).await;
                    reply.send::<StopEngine>(stopped.map_err(failed));
                });
            }
        }
    }
}

fn failed(error: KeeperError) -> HandleError {
    match error {
        // The difference matters: the process may be there.
        KeeperError::Deadline { what, limit } => HandleError::Deadline { what, limit },
        error => HandleError::failed(error.to_string()),
    }
}

/// What the lifecycle of engines has to know of an event of the keeper.
fn translate(event: KeeperEvent) -> Option<ProcessEvent> {
    match event {
        KeeperEvent::Spawned { .. } => None,
        // Its keeper is dead; the successor's event starts everything over.
        KeeperEvent::Exited(report) if report.status == ExitStatus::Unknown => Some(ProcessEvent::KeeperAway),
        KeeperEvent::Exited(report) => exited(&report),
        KeeperEvent::Replaced { pid } => {
            warn!(pid, "the keeper was killed and replaced; its engines were stopped");
            Some(ProcessEvent::KeeperLost)
        }
        KeeperEvent::Failed { error } => {
            error!(%error, "the keeper is gone and cannot be replaced");
            Some(ProcessEvent::KeeperLost)
        }
    }
}

/// The end of an engine; `None` if it is none of ours.
pub(super) fn exited(report: &ExitReport) -> Option<ProcessEvent> {
    let Some(rank) = engine_rank(&report.name).map(EngineIndex) else {
        debug!(name = report.name, "exit of a child that is no engine");
        return None;
    };
    if !report.left.is_empty() {
        error!(rank = rank.0, pids = ?report.left, "processes of the engine could not be ended");
    }
    let ExitReport { incarnation, status, requested, .. } = report;
    if *requested {
        info!(rank = rank.0, incarnation, %status, "engine stopped");
    } else {
        warn!(rank = rank.0, incarnation, %status, "engine exited");
    }
    let (incarnation, reason) = (Incarnation(*incarnation), init::describe_exit(report));
    Some(ProcessEvent::Exited { rank, incarnation, requested: *requested, reason })
}
