//! The coordinator task: drives the DP coordinator machine. It owns, per engine incarnation, one
//! XPUB (READY, START_DP_WAVE) and one PULL (stats, wave edges), and passes on to every attached
//! frontend's own DP coordinator what the engines report.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::frames::{COORDINATOR_READY, SUBSCRIBE_ALL};
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::coordinator::{
    Action, Config, Coordinator, CoordinatorRules, Event, Exclude, GroupKind as MachineKind,
    Report, Stamp,
};
use dp_sidecar_protocol::output::{
    OutputsView, start_wave_message, stats_message, wave_complete_message,
};
use dp_sidecar_protocol::stats::SchedulerStats;
use dp_sidecar_protocol::wave::StartDpWave;
use dp_sidecar_protocol::{EngineIndex, Frames, FrontendId, Incarnation, Time, Wave};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, trace, warn};

use super::handles::{
    CoordinatorCommand, CoordinatorHandle, CoordinatorSnapshot, ForFrontendCoordinator, GroupKind,
    HandleError, Load,
};
use crate::transport::{PrivateDir, PullEvent, PullListener, XpubListener, XpubPublisher};

/// Commands waiting for the task.
const COMMANDS: usize = 256;
/// Messages of engines waiting for the task. Readers wait when it is full, the engines buffer.
const INBOX: usize = 1024;
/// An engine that takes no message for this long has no input thread any more.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// What the coordinator task needs to know.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Set-up of the machine.
    pub machine: Config,
    /// Where its sockets are.
    pub dir: PrivateDir,
}

impl CoordinatorConfig {
    /// For hosted engines.
    pub fn new(kind: GroupKind, size: u16, dir: PrivateDir) -> Self {
        let kind = match kind {
            GroupKind::Independent => MachineKind::Independent,
            GroupKind::Lockstep => MachineKind::Lockstep,
        };
        Self {
            machine: Config::hosted(kind, size),
            dir,
        }
    }
}

/// From a reader task.
#[derive(Debug)]
enum Input {
    Subscribed,
    Report(Bytes),
}

/// Sockets of one engine incarnation. Dropping them ends their reader tasks.
struct Sockets {
    incarnation: Incarnation,
    publisher: XpubPublisher,
    _readers: DropGuard,
}

/// Starts the task.
pub fn spawn(config: CoordinatorConfig, tracker: &TaskTracker) -> CoordinatorHandle {
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let (inputs, inbox) = mpsc::channel(INBOX);
    let (publish, snapshot) = watch::channel(CoordinatorSnapshot::default());
    let task = Task {
        machine: Coordinator::new(config.machine),
        dir: config.dir,
        tracker: tracker.clone(),
        engines: BTreeMap::new(),
        layouts: BTreeMap::new(),
        frontends: BTreeMap::new(),
        inputs,
        publish,
        began: Instant::now(),
        handled: None,
    };
    tracker.spawn(task.run(receiver, inbox));
    CoordinatorHandle { commands, snapshot }
}

struct Task {
    machine: Coordinator,
    dir: PrivateDir,
    tracker: TaskTracker,
    engines: BTreeMap<EngineIndex, Sockets>,
    layouts: BTreeMap<EngineIndex, Layout>,
    frontends: BTreeMap<FrontendId, mpsc::Sender<ForFrontendCoordinator>>,
    inputs: mpsc::Sender<(EngineIndex, Incarnation, Input)>,
    publish: watch::Sender<CoordinatorSnapshot>,
    began: Instant,
    /// The report that is being handled, and whether it may be dropped for a slow frontend.
    handled: Option<(Bytes, bool)>,
}

impl Task {
    fn now(&self) -> Time {
        Time::from_start(self.began.elapsed())
    }

    async fn run(
        mut self,
        mut commands: mpsc::Receiver<CoordinatorCommand>,
        mut inbox: mpsc::Receiver<(EngineIndex, Incarnation, Input)>,
    ) {
        loop {
            let due = self.machine.poll_timeout();
            let due = due.map(|time| self.began + time.since_start());
            tokio::select! {
                command = commands.recv() => match command {
                    Some(CoordinatorCommand::Shutdown { reply }) => {
                        self.engines.clear();
                        answer(reply, Ok(()));
                        return;
                    }
                    Some(command) => self.command(command).await,
                    None => return,
                },
                Some((rank, incarnation, input)) = inbox.recv() => self.input(rank, incarnation, input),
                () = sleep_until(due) => {
                    let now = self.now();
                    self.machine.handle_timeout(now);
                }
            }
            self.perform();
            self.handled = None;
            self.report();
        }
    }

    fn event(&mut self, event: Event) {
        let now = self.now();
        trace!(?event, "dp coordinator");
        self.machine.handle_event(now, event);
    }

    async fn command(&mut self, command: CoordinatorCommand) {
        match command {
            CoordinatorCommand::Prepare {
                rank,
                incarnation,
                reply,
            } => {
                let bound = self.bind(rank, incarnation).await;
                answer(reply, bound);
            }
            CoordinatorCommand::EngineVersion { rank, layout, .. } => {
                self.layouts.insert(rank, layout);
                let version = layout.version;
                self.event(Event::Rules(CoordinatorRules::of(
                    version.minor,
                    version.patch,
                )));
            }
            CoordinatorCommand::Admitted { rank } => self.event(Event::Admitted { rank }),
            CoordinatorCommand::EngineDown { rank, incarnation } => {
                self.event(Event::EngineDown { rank, incarnation });
                if self
                    .engines
                    .get(&rank)
                    .is_some_and(|s| s.incarnation == incarnation)
                {
                    self.engines.remove(&rank);
                }
            }
            CoordinatorCommand::AddFrontend { frontend, sink } => {
                self.frontends.insert(frontend, sink);
                self.event(Event::FrontendAttached { frontend });
            }
            CoordinatorCommand::RemoveFrontend { frontend } => self.remove(frontend),
            CoordinatorCommand::StartWave { frontend, wave, .. } => {
                self.event(Event::StartWave { frontend, wave });
            }
            CoordinatorCommand::Wake { rank } => self.event(Event::Wake { rank }),
            // Handled by the caller.
            CoordinatorCommand::Shutdown { .. } => {}
        }
    }

    fn remove(&mut self, frontend: FrontendId) {
        if self.frontends.remove(&frontend).is_some() {
            self.event(Event::FrontendDetached { frontend });
        }
    }

    async fn bind(
        &mut self,
        rank: EngineIndex,
        incarnation: Incarnation,
    ) -> Result<(String, String), HandleError> {
        self.engines.remove(&rank);
        let failed = |error: &dyn std::fmt::Display| {
            HandleError::failed(format!("coordinator sockets of rank {rank}: {error}"))
        };
        let name = |kind: &str| format!("{kind}-{rank}-{incarnation}");
        let input = self.dir.ipc_address(&name("ci")).map_err(|e| failed(&e))?;
        let output = self.dir.ipc_address(&name("co")).map_err(|e| failed(&e))?;
        let mut xpub = XpubListener::bind(&input, SEND_TIMEOUT)
            .await
            .map_err(|e| failed(&e))?;
        let mut pull = PullListener::bind(&output).await.map_err(|e| failed(&e))?;
        let publisher = xpub.publisher();
        let end = CancellationToken::new();
        let inputs = self.inputs.clone();
        let ended = end.clone();
        self.tracker
            .spawn(ended.run_until_cancelled_owned(async move {
                while let Ok(frames) = xpub.recv().await {
                    let subscribed =
                        matches!(frames.as_slice(), [only] if **only == *SUBSCRIBE_ALL);
                    if !subscribed {
                        trace!(rank = rank.0, "upstream message that is no subscription");
                    } else if inputs
                        .send((rank, incarnation, Input::Subscribed))
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                warn!(
                    rank = rank.0,
                    "the engine does not read what its DP coordinator publishes"
                );
            }));
        let inputs = self.inputs.clone();
        let ended = end.clone();
        self.tracker
            .spawn(ended.run_until_cancelled_owned(async move {
                loop {
                    match pull.recv().await {
                        PullEvent::Message(mut frames) => {
                            // Stats and wave edges are single frames.
                            if frames.len() != 1 {
                                debug!(
                                    rank = rank.0,
                                    frames = frames.len(),
                                    "unexpected multipart report"
                                );
                            }
                            let Some(frame) = frames.drain(..).next() else {
                                continue;
                            };
                            let report = Input::Report(frame);
                            if inputs.send((rank, incarnation, report)).await.is_err() {
                                return;
                            }
                        }
                        // The rank task notices the loss of the engine, and more surely.
                        PullEvent::Disconnected => {}
                    }
                }
            }));
        let sockets = Sockets {
            incarnation,
            publisher,
            _readers: end.drop_guard(),
        };
        self.engines.insert(rank, sockets);
        Ok((input, output))
    }

    fn input(&mut self, rank: EngineIndex, incarnation: Incarnation, input: Input) {
        if self
            .engines
            .get(&rank)
            .is_none_or(|s| s.incarnation != incarnation)
        {
            return;
        }
        let frame = match input {
            Input::Subscribed => {
                debug!(
                    rank = rank.0,
                    incarnation = incarnation.0,
                    "engine subscribed"
                );
                return self.event(Event::Subscribed { rank, incarnation });
            }
            Input::Report(frame) => frame,
        };
        let report = match read_report(&frame) {
            Ok(report) => report,
            Err(error) => {
                warn!(rank = rank.0, %error, "report of the engine is not readable");
                return;
            }
        };
        let stats_only = report.wave_complete.is_none() && report.start_wave.is_none();
        self.handled = Some((frame, stats_only));
        self.event(Event::Report {
            rank,
            incarnation,
            report,
        });
    }

    fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::SendReady { to } => {
                    let ready = vec![Bytes::from_static(COORDINATOR_READY)];
                    for rank in to {
                        self.publish_to(rank, ready.clone());
                    }
                }
                Action::SendStartWave { wave, exclude } => {
                    debug!(wave = wave.0, ?exclude, "START_DP_WAVE");
                    let exclude = match exclude {
                        Some(Exclude::Index(index)) => Some(index),
                        Some(Exclude::Identity(_)) | None => None,
                    };
                    let frames = StartDpWave { wave, exclude }.encode();
                    let ranks: Vec<EngineIndex> = self.engines.keys().copied().collect();
                    for rank in ranks {
                        self.publish_to(rank, frames.clone());
                    }
                }
                // Nobody subscribes here directly: frontends have DP coordinators of their own.
                Action::Publish { .. } => {}
                Action::Forward { rank } => {
                    if let Some((frame, droppable)) = self.handled.clone() {
                        self.tell(None, rank, &frame, droppable);
                    }
                }
                Action::Tell {
                    frontend,
                    rank,
                    report,
                } => {
                    for (frame, droppable) in self.encode(rank, report) {
                        self.tell(frontend, rank, &frame, droppable);
                    }
                }
                Action::Note(note) => debug!(?note, "dp coordinator"),
            }
        }
    }

    fn publish_to(&self, rank: EngineIndex, frames: Frames) {
        if let Some(sockets) = self.engines.get(&rank)
            && let Err(error) = sockets.publisher.send(frames)
        {
            warn!(rank = rank.0, %error, "the engine cannot be reached by its DP coordinator");
        }
    }

    /// Messages of a rank, made here, in the layout of its version.
    fn encode(&self, rank: EngineIndex, report: Report) -> Vec<(Bytes, bool)> {
        let layout = self.layouts.get(&rank).copied();
        let layout = layout.unwrap_or_else(Layout::newest);
        let timestamp = self.began.elapsed().as_secs_f64();
        let mut frames = Vec::new();
        if let Some(wave) = report.wave_complete {
            frames.push((wave_complete_message(&layout, rank, wave, timestamp), false));
        }
        if let Some(wave) = report.start_wave {
            frames.push((start_wave_message(&layout, rank, wave, timestamp), false));
        }
        if let Some((load, stamp)) = report.stats {
            let stats = SchedulerStats {
                num_running_reqs: load.running,
                num_waiting_reqs: load.waiting,
                step_counter: stamp.step,
                current_wave: stamp.wave.0,
                kv_cache_usage: load.kv_cache_usage,
            };
            // Said once, unlike an engine's own stats: not to be lost.
            frames.push((
                stats_message(&layout, rank, stats.encode(), timestamp),
                false,
            ));
        }
        frames
    }

    /// Queues a message for one frontend's DP coordinator, or for all. Half of a queue is kept for
    /// what must not be lost; a frontend that lets even that fill is given up (its attachment sees
    /// the channel close).
    fn tell(&mut self, to: Option<FrontendId>, rank: EngineIndex, frame: &Bytes, droppable: bool) {
        let mut stuck = Vec::new();
        for (&frontend, sink) in &self.frontends {
            if to.is_some_and(|one| one != frontend) {
                continue;
            }
            if droppable && sink.capacity() < sink.max_capacity() / 2 {
                trace!(frontend = frontend.0, "stats dropped for a slow frontend");
                continue;
            }
            let message = ForFrontendCoordinator {
                rank,
                frame: frame.clone(),
            };
            if sink.try_send(message).is_err() {
                stuck.push(frontend);
            }
        }
        for frontend in stuck {
            debug!(
                frontend = frontend.0,
                "its DP coordinator is gone or does not read"
            );
            self.remove(frontend);
        }
    }

    fn report(&self) {
        let machine = self.machine.snapshot();
        let loads = machine.loads.iter().zip(0..).map(|(load, rank)| {
            let load = Load {
                waiting: load.waiting,
                running: load.running,
                kv_cache_usage: load.kv_cache_usage,
            };
            (rank, load)
        });
        let snapshot = CoordinatorSnapshot {
            wave: machine.wave,
            running: machine.running,
            loads: loads.collect(),
            subscribed: u32::from(machine.subscribed),
            in_step: machine.in_step,
        };
        self.publish.send_if_modified(|current| {
            let changed = *current != snapshot;
            if changed {
                *current = snapshot;
            }
            changed
        });
    }
}

/// What an engine reports in one message.
fn read_report(frame: &[u8]) -> Result<Report, dp_sidecar_protocol::DecodeError> {
    let view = OutputsView::parse(frame)?;
    let stats = view.stats().transpose()?.map(|stats| {
        let load = dp_sidecar_protocol::machine::coordinator::Load {
            waiting: stats.num_waiting_reqs,
            running: stats.num_running_reqs,
            kv_cache_usage: stats.kv_cache_usage,
        };
        let stamp = Stamp {
            wave: Wave(stats.current_wave),
            step: stats.step_counter,
        };
        (load, stamp)
    });
    Ok(Report {
        stats,
        wave_complete: view.wave_complete,
        start_wave: view.start_wave,
    })
}

fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    if reply.send(value).is_err() {
        debug!("nobody waits for the answer any more");
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
