//! The update task: drives the update transaction over the node's ranks, brings started engines to the
//! committed weights, and remembers what is committed. See `protocol::machine::weight_update` for the
//! rules.

mod actions;
mod adapters;
mod adopt;
mod begin;
mod handle;
mod jobs;
mod journal;
mod lora;
mod nodes;
mod restore;
mod shim;
mod stages;
mod staging;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dp_sidecar_protocol::machine::weight_update::{
    Action, Begin, Begun, Checkpoint, Commit, Event, Ledger, NodeId, Participant, Pause, PauseMode, Phase,
    RankState, Record, Recover, Refusal, Target, WeightUpdate,
};
use dp_sidecar_protocol::{EngineIndex, Incarnation, Time, UpdateId, WeightVersion};
use futures::future::join_all;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::control::{ControlError, ControlGuard, ControlHandle};
use super::engine_calls;
use super::handles::{GroupKind, HandleError, RankCommand, RankHandle, Retain, StageProgress};
use adapters::Prepared;
use handle::{Command, Follower, RestoreReply};
pub use handle::{UpdateHandle, UpdateRun};
use jobs::RestoreJob;
use journal::{Committed, Journal};
pub use lora::{LoraAdapter, LoraOp, LoraReport, LoraRequest, LoraState, adapter_id};
use shim::EngineInfo;
use stages::Stages;
use staging::{Cancel, Checked, Job, Known};
pub use types::{
    AdapterChange, FenceRequest, UpdateConfig, UpdateError, UpdateEvent, UpdateNode, UpdateOutcome,
    UpdateRecord, UpdateRequest, UpdateSource, UpdateStatus, state_words,
};

/// Commands waiting for the task.
const COMMANDS: usize = 16;
/// Progress waiting for whoever started the update; more is dropped.
const EVENTS: usize = 64;
/// Added to limits of calls, so that the machine's deadline comes first.
const SLACK: Duration = Duration::from_secs(5);
/// Limit for telling a rank task or the node task something.
const TELL_LIMIT: Duration = Duration::from_secs(10);

/// Starts the task. It ends when told to, when `stop` is cancelled, or when all handles are gone.
///
/// # Errors
/// When the journal in the state directory cannot be read.
pub fn spawn(
    config: UpdateConfig,
    ranks: Vec<RankHandle>,
    nodes: Vec<UpdateNode>,
    control: ControlHandle,
    fences: mpsc::Sender<FenceRequest>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> std::io::Result<UpdateHandle> {
    let journal = Journal::new(&config.state_dir);
    let committed = journal.read()?;
    let ledger = journal.read_ledger()?;
    let last = journal.history(1)?.pop();
    if let Some(committed) = &committed {
        info!(
            version = %committed.commit.version, path = committed.commit.checkpoint.path,
            "engines will be brought to the weights committed before the restart"
        );
    }
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let (notes, noted) = mpsc::channel(EVENTS);
    let (publish, status) = watch::channel(UpdateStatus::default());
    let task = Task {
        machine: machine(&config, committed.as_ref()),
        ranks: ranks.into_iter().map(|rank| (rank.rank, rank)).collect(),
        places: places(&nodes),
        stages: Stages::new(nodes, tracker, &stop),
        to_stage: BTreeSet::new(),
        open_admission: false,
        ledger,
        ledger_number: 0,
        control_seen: (None, false),
        adopts: VecDeque::new(),
        staging: BTreeMap::new(),
        config,
        control,
        fences,
        journal,
        committed,
        started: Instant::now(),
        jobs: JoinSet::new(),
        active: None,
        run: 0,
        lives: BTreeMap::new(),
        any_restored: false,
        restoring: 0,
        restores: VecDeque::new(),
        known: Known::default(),
        cancel: Cancel::default(),
        last,
        notes,
        publish,
    };
    tracker.spawn(task.run(inbox, noted, stop));
    Ok(UpdateHandle { commands, status })
}

/// Which node each rank is on.
fn places(nodes: &[UpdateNode]) -> BTreeMap<EngineIndex, NodeId> {
    nodes.iter().flat_map(|node| node.ranks.iter().map(|rank| (*rank, node.id))).collect()
}

fn machine(config: &UpdateConfig, committed: Option<&Committed>) -> WeightUpdate {
    let version = committed.map(|committed| committed.commit.version.clone());
    let last = committed.map(|committed| {
        let record = committed.record.clone();
        record.unwrap_or_else(|| Record::of_commit(&committed.commit))
    });
    WeightUpdate::new(config.machine.clone(), version.unwrap_or_default(), last)
}

/// An engine that holds the committed weights.
#[derive(Clone, Debug)]
struct Life {
    incarnation: Incarnation,
    /// It was seen admitted; when it is not any more, it is lost.
    admitted: bool,
    info: Option<EngineInfo>,
}

/// The update that is asked for or runs.
#[derive(Debug)]
struct Active {
    id: UpdateId,
    request: UpdateRequest,
    version: WeightVersion,
    /// Which update of this task; answers of another one are ignored.
    run: u64,
    followers: Vec<Follower>,
    guard: Option<ControlGuard>,
    begun: bool,
    started_unix_ms: u64,
    infos: BTreeMap<EngineIndex, EngineInfo>,
    model_path: Option<String>,
    /// Nodes whose staging areas are in use for it.
    staged: Vec<NodeId>,
    stage_job: Option<tokio::task::AbortHandle>,
    /// What becomes of adapters.
    adapters: Prepared,
    /// The start-up checkpoint, where only adapters change and nothing was committed before.
    startup: Option<Checkpoint>,
    /// It is no update, but engines are taken over.
    recovery: Option<Recovery>,
}

/// Engines that are taken over, and whoever waits for that.
#[derive(Debug)]
struct Recovery {
    recover: Recover,
    /// What the engines were told to load on the way back.
    begun: Option<Begun>,
    ranks: Vec<(EngineIndex, Incarnation)>,
    reply: RestoreReply,
}

impl Active {
    /// Asked for again, in other words: it runs already.
    fn is_the_same(&self, request: &UpdateRequest) -> bool {
        let version = request.version.as_ref().is_none_or(|version| *version == self.version);
        version
            && request.source_name() == self.request.source_name()
            && request.adapters == self.request.adapters
    }

    /// Tells everybody who follows. Whoever does not read loses steps, never the end.
    fn tell(&self, event: &UpdateEvent) {
        for follower in &self.followers {
            follower.events.try_send(event.clone()).ok();
        }
    }
}

/// What a piece of work in the background came to.
enum Done {
    /// For the machine, if this update still runs.
    Event(u64, Event),
    Acquired(u64, Result<ControlGuard, ControlError>),
    Staged(u64, Result<Staged, (NodeId, String)>),
    Committed(u64, Box<Committed>, Result<(), String>),
    Restored {
        ranks: Vec<(EngineIndex, Incarnation)>,
        result: Result<Restored, UpdateError>,
        reply: RestoreReply,
    },
    Looked {
        ranks: Vec<(EngineIndex, Incarnation)>,
        found: adopt::Found,
        reply: RestoreReply,
    },
    Finished(Box<UpdateRecord>, Vec<Follower>, Option<Recovery>),
    Rank(EngineIndex),
    Control,
    Nothing,
}

struct Staged {
    nodes: BTreeMap<NodeId, Checked>,
    adapters: Prepared,
    startup: Option<Checkpoint>,
    infos: BTreeMap<EngineIndex, EngineInfo>,
    model_path: String,
}

struct Restored {
    infos: BTreeMap<EngineIndex, EngineInfo>,
    /// The journal is about another model, or about a directory that is gone: forgotten.
    forget: Option<String>,
}

struct Task {
    config: UpdateConfig,
    ranks: BTreeMap<EngineIndex, RankHandle>,
    /// Ranks that are not named belong to node 0.
    places: BTreeMap<EngineIndex, NodeId>,
    stages: Stages,
    /// Nodes that the machine wants staged; gathered, since they depend on each other.
    to_stage: BTreeSet<NodeId>,
    /// To be done at the end of the update.
    open_admission: bool,
    ledger: Ledger,
    /// Of the last write.
    ledger_number: u64,
    /// The operator's pause and weights of frontends, as the control task last said.
    control_seen: (Option<Pause>, bool),
    adopts: VecDeque<(Vec<(EngineIndex, Incarnation)>, RestoreReply)>,
    /// Of the running update.
    staging: BTreeMap<NodeId, StageProgress>,
    control: ControlHandle,
    fences: mpsc::Sender<FenceRequest>,
    machine: WeightUpdate,
    journal: Journal,
    committed: Option<Committed>,
    started: Instant,
    jobs: JoinSet<Done>,
    active: Option<Active>,
    run: u64,
    lives: BTreeMap<EngineIndex, Life>,
    /// Some engine was brought up by this process.
    any_restored: bool,
    restoring: usize,
    restores: VecDeque<(Vec<(EngineIndex, Incarnation)>, RestoreReply)>,
    known: Known,
    /// Ends blocking work when the task ends.
    cancel: Cancel,
    last: Option<UpdateRecord>,
    /// Progress of staging.
    notes: mpsc::Sender<UpdateEvent>,
    publish: watch::Sender<UpdateStatus>,
}

impl Task {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Command>,
        mut noted: mpsc::Receiver<UpdateEvent>,
        stop: CancellationToken,
    ) {
        self.watch_control();
        let ranks: Vec<EngineIndex> = self.ranks.keys().copied().collect();
        for rank in ranks {
            self.watch_rank(rank);
        }
        let farewell = loop {
            self.start_waiting();
            self.perform().await;
            self.publish();
            let due = self.machine.poll_timeout();
            let due = due.map(|due| self.started + due.since_start());
            tokio::select! {
                () = stop.cancelled() => break None,
                command = inbox.recv() => match command {
                    None => break None,
                    Some(Command::Shutdown { forget, reply }) => break Some((forget, reply)),
                    Some(command) => self.command(command),
                },
                Some(event) = noted.recv() => self.note(event),
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.done(done),
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => error!(%error, "work of the update task failed"),
                },
                () = super::sleep_until(due) => {
                    let now = self.now();
                    self.machine.handle_timeout(now);
                }
            }
        };
        drop(self.cancel);
        self.jobs.shutdown().await;
        if let Some((forget, reply)) = farewell {
            if forget {
                let journal = self.journal.clone();
                match tokio::task::spawn_blocking(move || journal.clear()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => warn!(%error, "the committed record was not forgotten"),
                    Err(error) => warn!(%error, "the committed record was not forgotten"),
                }
            }
            ignore_gone(reply.send(()));
        }
    }

    fn now(&self) -> Time {
        Time::from_start(self.started.elapsed())
    }

    fn event(&mut self, event: Event) {
        let now = self.now();
        self.machine.handle_event(now, event);
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Start { request, follower } => self.ask(request, follower),
            Command::Follow { id, reply } => ignore_gone(reply.send(self.follow(id))),
            Command::Abort => self.event(Event::Abort),
            Command::History { limit, reply } => {
                let journal = self.journal.clone();
                self.jobs.spawn(async move {
                    let read = tokio::task::spawn_blocking(move || journal.history(limit)).await;
                    let records = read.map_err(std::io::Error::other).and_then(|records| records);
                    let told = |error: std::io::Error| warn!(%error, "the history cannot be read");
                    ignore_gone(reply.send(records.map_err(told).unwrap_or_default()));
                    Done::Nothing
                });
            }
            Command::Restore { ranks, reply } => self.restores.push_back((ranks, reply)),
            Command::Adopt { ranks, reply } => self.adopts.push_back((ranks, reply)),
            Command::Shutdown { .. } => {}
        }
    }

    // --- what comes back ---

    fn done(&mut self, done: Done) {
        let current = self.active.as_ref().map(|active| active.run);
        match done {
            Done::Event(run, event) => {
                if current == Some(run) {
                    self.event(event);
                }
            }
            Done::Acquired(run, result) => {
                if current != Some(run) {
                    return;
                }
                match (result, self.active.take()) {
                    (guard, Some(active)) if active.recovery.is_some() => {
                        self.start_recovery(active, guard.ok());
                    }
                    // A load into discarded memory kills the worker.
                    (Ok(guard), Some(active)) if guard.asleep => {
                        let reason = "the engines are asleep: wake them up first".to_owned();
                        self.refuse(active, UpdateOutcome::RefusedInvalid, reason);
                    }
                    (Ok(guard), Some(mut active)) => {
                        active.guard = Some(guard);
                        self.active = Some(active);
                    }
                    (Err(error), Some(active)) => {
                        self.refuse(active, UpdateOutcome::RefusedBusy, error.to_string());
                    }
                    (_, None) => {}
                }
            }
            Done::Staged(run, result) => {
                if current == Some(run) {
                    self.staged(result);
                }
            }
            Done::Committed(run, committed, result) => {
                if result.is_ok() {
                    self.committed = Some(*committed);
                }
                if current == Some(run) {
                    self.event(Event::CommitWritten { result });
                }
            }
            Done::Restored { ranks, result, reply } => self.restored(ranks, result, reply),
            Done::Looked { ranks, found, reply } => self.looked(ranks, found, reply),
            Done::Control => self.control_changed(),
            Done::Finished(record, followers, recovery) => {
                self.active = None;
                self.staging.clear();
                if let Some(recovery) = recovery {
                    self.recovered(&record, recovery);
                }
                self.last = Some((*record).clone());
                self.publish();
                tell_end(followers, &record);
            }
            Done::Rank(rank) => self.rank_changed(rank),
            Done::Nothing => {}
        }
    }

    fn staged(&mut self, result: Result<Staged, (NodeId, String)>) {
        match result {
            Err((node, error)) => self.event(Event::StageFailed { node, error }),
            Ok(staged) => {
                if let Some(active) = &mut self.active {
                    active.infos = staged.infos;
                    active.model_path = Some(staged.model_path);
                    active.adapters = staged.adapters;
                    active.startup = staged.startup;
                }
                for (node, Checked { new, previous }) in staged.nodes {
                    self.event(Event::Staged { node, new, previous });
                }
            }
        }
    }

    fn note(&mut self, event: UpdateEvent) {
        if let UpdateEvent::Staging { node, progress, .. } = &event {
            self.staging.insert(*node, *progress);
        }
        if let Some(active) = &self.active {
            active.tell(&event);
        }
    }

    // --- engines come and go ---

    fn watch_rank(&mut self, rank: EngineIndex) {
        let Some(handle) = self.ranks.get(&rank) else {
            return;
        };
        let mut snapshot = handle.snapshot.clone();
        snapshot.borrow_and_update();
        self.jobs.spawn(async move {
            match snapshot.changed().await {
                Ok(()) => Done::Rank(rank),
                Err(_) => Done::Nothing,
            }
        });
    }

    fn rank_changed(&mut self, rank: EngineIndex) {
        self.watch_rank(rank);
        let Some(handle) = self.ranks.get(&rank) else {
            return;
        };
        let (incarnation, admitted) = {
            let snapshot = handle.snapshot.borrow();
            (snapshot.incarnation, snapshot.admitted)
        };
        let Some(life) = self.lives.get_mut(&rank) else {
            return;
        };
        if life.incarnation == incarnation && admitted {
            life.admitted = true;
        }
        // The snapshot lags behind: that it still shows the life before this one means nothing.
        if life.incarnation < incarnation || (life.incarnation == incarnation && life.admitted && !admitted) {
            let incarnation = life.incarnation;
            self.lives.remove(&rank);
            self.event(Event::EngineLost {
                rank,
                incarnation,
                reason: "its rank task reports it down".to_owned(),
            });
        }
    }

    fn publish(&self) {
        let snapshot = self.machine.snapshot();
        let between = |rank: &EngineIndex| {
            matches!(
                snapshot.ranks.get(rank),
                Some(RankState::Loading | RankState::LoadFailed | RankState::RollingBack)
            ) || (snapshot.ranks.get(rank) == Some(&RankState::Loaded) && !snapshot.past_commit_point)
        };
        let held = self.lives.keys().filter(|rank| !between(rank));
        let status = UpdateStatus {
            held: held.map(|rank| (*rank, snapshot.version.clone())).collect(),
            version: snapshot.version,
            committed: self.committed.as_ref().map(|c| c.commit.checkpoint.clone()),
            source: self.committed.as_ref().map(|c| c.commit.source.clone()),
            staging: self.staging.clone(),
            running: self.active.as_ref().map(|active| active.id.clone()),
            phase: snapshot.phase,
            ranks: snapshot.ranks,
            last: self.last.clone(),
        };
        self.publish.send_if_modified(|published| {
            let changed = *published != status;
            *published = status;
            changed
        });
    }
}

/// Gives everybody who follows an update its record.
fn tell_end(followers: Vec<Follower>, record: &UpdateRecord) {
    for follower in followers {
        ignore_gone(follower.record.send(record.clone()));
    }
}

/// Whoever asked may have gone away: then nobody wants to know.
fn ignore_gone<T>(sent: Result<(), T>) {
    if sent.is_err() {
        tracing::debug!("nobody waits for the answer of the update task");
    }
}

fn made_up_version(request: &UpdateRequest, id: &UpdateId) -> WeightVersion {
    let short: String = id.0.chars().take(8).collect();
    let name = match &request.source {
        UpdateSource::Upload(upload) => upload.clone(),
        _ => request.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    };
    WeightVersion(format!("{name}@{short}"))
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
