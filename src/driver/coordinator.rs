//! The coordinator task: drives the DP coordinator machine. The engines are reached through the edge tasks of
//! their nodes; what they report is passed on to every attached frontend's own DP coordinator. See
//! `protocol/docs/coordinator.md`.

mod adoption;
mod edges;
mod sinks;

use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::coordinator::{Action, Config, Coordinator, Event, Exclude, Report, Stamp};
use dp_sidecar_protocol::output::{OutputsView, start_wave_message, stats_message, wave_complete_message};
use dp_sidecar_protocol::stats::SchedulerStats;
use dp_sidecar_protocol::{DecodeError, EngineIndex, FrontendId, Incarnation, Wave};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, trace, warn};

use super::handles::{
    CoordinatorCommand, CoordinatorHandle, EdgeEvent, EdgeHandle, ForFrontendCoordinator, GroupKind,
    NodeEvent,
};
use super::{Clock, arm, replace_if_other};
use crate::api::CoordinatorSnapshot;
use crate::tasks::{Task as TaskName, named};

pub use adoption::adoption;
use edges::Edges;
use sinks::{Kind, Sinks};

/// Commands waiting for the task.
const COMMANDS: usize = 256;
/// Messages of engines that should find room in the channel given to [`spawn`]. When it is full, the edge keeps the
/// newest.
pub const EVENTS: usize = 1024;
/// Messages of engines handled before the task looks at something else.
const BATCH: usize = 64;
/// Loads in the snapshot are at most this old.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(100);
/// Until the next try to send what did not fit in the queue of a frontend or a node.
const FLUSH_INTERVAL: Duration = Duration::from_millis(10);

/// Starts the task for `size` hosted engines. `edges` are the edge tasks of all nodes and the ranks behind each, `events` is what they report
/// (a channel of [`EVENTS`]).
pub fn spawn(
    kind: GroupKind,
    size: u16,
    edges: Vec<(Vec<EngineIndex>, EdgeHandle)>,
    events: mpsc::Receiver<NodeEvent>,
    tracker: &TaskTracker,
) -> CoordinatorHandle {
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let (publish, snapshot) = watch::channel(CoordinatorSnapshot::default());
    let mut task = Task {
        machine: Coordinator::new(Config::hosted(kind, size)),
        edges: Edges::new(edges),
        noted: Some((Wave(0), false)),
        layout: Layout::newest(),
        sinks: Sinks::default(),
        publish,
        loads_due: None,
        flush_due: None,
        clock: Clock::start(),
        handled: None,
    };
    task.publish_snapshot();
    tracker.spawn(named(TaskName::Coordinator, task.run(receiver, events)));
    CoordinatorHandle { commands, snapshot }
}

struct Task {
    machine: Coordinator,
    edges: Edges,
    /// What the edges were last told about the wave.
    noted: Option<(Wave, bool)>,
    /// Of the engines, which are all of one version.
    layout: Layout,
    sinks: Sinks,
    publish: watch::Sender<CoordinatorSnapshot>,
    /// Loads have changed; the snapshot follows at this time.
    loads_due: Option<Instant>,
    /// Something waits for room in the queue of a frontend or a node; it is tried again at this time.
    flush_due: Option<Instant>,
    clock: Clock,
    /// The report that is being handled.
    handled: Option<(Bytes, Kind)>,
}

impl Task {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<CoordinatorCommand>,
        mut events: mpsc::Receiver<NodeEvent>,
    ) {
        let mut batch = Vec::with_capacity(BATCH);
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        loop {
            let timed = arm(timer.as_mut(), self.due());
            tokio::select! {
                // The loss of an engine is told before the next one is prepared; so it is heard of before anything
                // that the next one reports.
                biased;
                command = commands.recv() => match command {
                    Some(CoordinatorCommand::Shutdown { reply }) => {
                        let _ = reply.send(Ok(()));
                        return;
                    }
                    Some(command) => self.command(command),
                    None => return,
                },
                () = timer.as_mut(), if timed => self.timeout(),
                received = events.recv_many(&mut batch, BATCH), if !events.is_closed() || !events.is_empty() => {
                    trace!(received, "reports");
                    for event in batch.drain(..) {
                        match event {
                            NodeEvent::Edge(event) => self.edge_event(event),
                            NodeEvent::Wake(rank) => self.event(Event::Wake { rank }),
                            other => debug!(?other, "an event that is not for the coordinator"),
                        }
                    }
                }
            }
        }
    }

    fn due(&self) -> Option<Instant> {
        let machine = self.machine.poll_timeout().map(|time| self.clock.at(time));
        [machine, self.loads_due, self.flush_due].into_iter().flatten().min()
    }

    fn timeout(&mut self) {
        self.machine.handle_timeout(self.clock.now());
        self.perform();
        let now = Instant::now();
        if self.flush_due.is_some_and(|due| due <= now) {
            self.flush_due = None;
            self.edges.flush();
            let gone = self.sinks.flush();
            self.detach(gone);
            self.flush_later();
        }
        if self.loads_due.is_some_and(|due| due <= now) {
            self.publish_snapshot();
        }
    }

    /// Hands an event to the machine and does what it says. Except for load, it shows at once.
    fn event(&mut self, event: Event) {
        trace!(?event, "dp coordinator");
        let only_load = matches!(
            event,
            Event::Report { report, .. }
                if report.wave_complete.is_none() && report.start_wave.is_none()
        );
        let wake = matches!(event, Event::Wake { .. });
        self.machine.handle_event(self.clock.now(), event);
        self.perform();
        if only_load {
            self.loads_due.get_or_insert_with(|| Instant::now() + SNAPSHOT_INTERVAL);
        } else if !wake {
            self.publish_snapshot();
        }
    }

    fn command(&mut self, command: CoordinatorCommand) {
        match command {
            CoordinatorCommand::EngineVersion { layout } => {
                self.layout = layout;
                self.event(Event::Version(Box::new(layout)));
            }
            CoordinatorCommand::Adopt { wave, engines } => {
                let wave = wave.map_or(Wave(0), |(wave, _)| wave);
                info!(wave = wave.0, engines = engines.len(), "dp coordinator adopts engines");
                self.event(Event::Adopted { wave, engines });
            }
            CoordinatorCommand::Admitted { rank } => self.event(Event::Admitted { rank }),
            CoordinatorCommand::EngineDown { rank, incarnation } => {
                self.event(Event::EngineDown { rank, incarnation });
                self.edges.close(rank, incarnation);
                self.flush_later();
            }
            CoordinatorCommand::AddFrontend { frontend, sink } => {
                self.sinks.insert(frontend, sink);
                self.event(Event::FrontendAttached { frontend });
            }
            CoordinatorCommand::RemoveFrontend { frontend } => self.detach(vec![frontend]),
            CoordinatorCommand::StartWave { frontend, wave } => {
                self.event(Event::StartWave { frontend, wave });
            }
            #[cfg(any(test, feature = "test-support"))]
            CoordinatorCommand::Wake { rank } => self.event(Event::Wake { rank }),
            // Handled by the caller.
            CoordinatorCommand::Shutdown { .. } => {}
        }
    }

    fn detach(&mut self, frontends: Vec<FrontendId>) {
        for frontend in frontends {
            if self.sinks.remove(frontend) {
                self.event(Event::FrontendDetached { frontend });
            }
        }
    }

    // --- in ---

    fn edge_event(&mut self, event: EdgeEvent) {
        match event {
            EdgeEvent::Subscribed { rank, incarnation } => {
                self.event(Event::Subscribed { rank, incarnation })
            }
            EdgeEvent::Report { rank, incarnation, frame } => self.engine_report(rank, incarnation, frame),
        }
    }

    fn engine_report(&mut self, rank: EngineIndex, incarnation: Incarnation, frame: Bytes) {
        let report = match read_report(&frame) {
            Ok(report) => report,
            Err(error) => {
                warn!(rank = rank.0, %error, "report of the engine is not readable");
                return;
            }
        };
        self.handled = Some((frame, kind(&report)));
        self.event(Event::Report { rank, incarnation, report });
        self.handled = None;
    }

    // --- out ---

    fn perform(&mut self) {
        // First: frontends must not know a wave that a successor of ours does not.
        let wave = (self.machine.wave(), self.machine.running());
        if self.noted != Some(wave) {
            self.noted = Some(wave);
            self.edges.note(wave.0, wave.1);
        }
        let mut gone = Vec::new();
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::SendReady { to } => self.edges.ready(&to),
                Action::SendStartWave { wave, exclude } => {
                    debug!(wave = wave.0, ?exclude, "START_DP_WAVE");
                    let exclude = match exclude {
                        Some(Exclude::Index(index)) => Some(index),
                        // No engine recognizes itself by its identity.
                        Some(Exclude::Identity(_)) | None => None,
                    };
                    self.edges.start(wave, exclude);
                }
                Action::Forward { rank } => {
                    if let Some((frame, kind)) = self.handled.clone() {
                        let message = ForFrontendCoordinator { rank, frame };
                        gone.extend(self.sinks.send(None, kind, &message));
                    }
                }
                Action::Tell { frontend, rank, report } => {
                    if let Some(frame) = self.encode(rank, &report) {
                        let message = ForFrontendCoordinator { rank, frame };
                        gone.extend(self.sinks.send(frontend, kind(&report), &message));
                    }
                }
                Action::Note(note) => debug!(?note, "dp coordinator"),
            }
        }
        self.flush_later();
        self.detach(gone);
    }

    fn flush_later(&mut self) {
        if self.flush_due.is_none() && (self.sinks.waiting() || self.edges.waiting()) {
            self.flush_due = Some(Instant::now() + FLUSH_INTERVAL);
        }
    }

    /// A report of a rank, made here.
    fn encode(&self, rank: EngineIndex, report: &Report) -> Option<Bytes> {
        let timestamp = self.clock.now().since_start().as_secs_f64();
        if let Some(wave) = report.wave_complete {
            return Some(wave_complete_message(&self.layout, rank, wave, timestamp));
        }
        if let Some(wave) = report.start_wave {
            return Some(start_wave_message(&self.layout, rank, wave, timestamp));
        }
        let (load, stamp) = report.stats?;
        let stats = SchedulerStats { load, step_counter: stamp.step, current_wave: stamp.wave.0 };
        Some(stats_message(&self.layout, rank, stats.encode(), timestamp))
    }

    fn publish_snapshot(&mut self) {
        self.loads_due = None;
        let machine = self.machine.snapshot();
        let snapshot = CoordinatorSnapshot {
            wave: machine.wave,
            running: machine.running,
            loads: (0..).zip(machine.loads).collect(),
            subscribed: u32::from(machine.subscribed),
            in_step: machine.in_step,
        };
        self.publish.send_if_modified(|current| replace_if_other(current, snapshot));
    }
}

/// What an engine reports in one message.
fn read_report(frame: &[u8]) -> Result<Report, DecodeError> {
    let view = OutputsView::parse(frame)?;
    let stats = view
        .stats()
        .transpose()?
        .map(|stats| (stats.load, Stamp { wave: Wave(stats.current_wave), step: stats.step_counter }));
    Ok(Report { stats, wave_complete: view.wave_complete, start_wave: view.start_wave })
}

fn kind(report: &Report) -> Kind {
    if report.wave_complete.is_some() || report.start_wave.is_some() { Kind::Wave } else { Kind::Load }
}
