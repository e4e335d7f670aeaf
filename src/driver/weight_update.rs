//! The update task: drives the update transaction over the node's ranks, brings started engines to the
//! committed weights, and remembers what is committed. See `protocol::machine::weight_update` for the
//! rules.

mod journal;
mod shim;
mod staging;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dp_sidecar_protocol::machine::weight_update::{
    Action, Begin, Commit, Event, NodeId, Participant, PauseMode, Record, Refusal, Target,
    WeightUpdate,
};
use dp_sidecar_protocol::{EngineIndex, Incarnation, Time, UpdateId, WeightVersion};
use futures::future::{join_all, pending};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::control::{ControlError, ControlGuard, ControlHandle};
use super::engine_calls;
use super::handles::{GroupKind, HandleError, RankCommand, RankHandle};
use journal::{Committed, Journal};
use shim::EngineInfo;
use staging::{Cancel, Checked, Job, Known};
pub use types::{
    FenceRequest, UpdateConfig, UpdateError, UpdateEvent, UpdateOutcome, UpdateRecord,
    UpdateRequest, UpdateStatus,
};

/// Commands waiting for the task.
const COMMANDS: usize = 16;
/// Progress waiting for whoever started the update; more is dropped.
const EVENTS: usize = 64;
/// Added to limits of calls, so that the machine's deadline comes first.
const SLACK: Duration = Duration::from_secs(5);
/// Limit for telling a rank task or the node task something.
const TELL_LIMIT: Duration = Duration::from_secs(10);

type RestoreReply = oneshot::Sender<Result<(), UpdateError>>;

#[derive(Debug)]
enum Command {
    Start {
        request: UpdateRequest,
        events: mpsc::Sender<UpdateEvent>,
        record: oneshot::Sender<UpdateRecord>,
    },
    Abort,
    Restore {
        ranks: Vec<EngineIndex>,
        reply: RestoreReply,
    },
    Shutdown {
        forget: bool,
        reply: oneshot::Sender<()>,
    },
}

/// Handle of the update task.
#[derive(Clone, Debug)]
pub struct UpdateHandle {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<UpdateStatus>,
}

/// An update that runs. Dropping it does not stop the update.
#[derive(Debug)]
pub struct UpdateRun {
    /// Progress; closed when the update has ended. What is not read in time is dropped.
    pub events: mpsc::Receiver<UpdateEvent>,
    record: oneshot::Receiver<UpdateRecord>,
}

impl UpdateRun {
    /// Waits for the end.
    pub async fn record(self) -> Result<UpdateRecord, UpdateError> {
        self.record.await.map_err(|_| UpdateError::Gone)
    }
}

impl UpdateHandle {
    /// Starts an update. Also a refusal comes as a record.
    pub async fn start(&self, request: UpdateRequest) -> Result<UpdateRun, UpdateError> {
        let (events, progress) = mpsc::channel(EVENTS);
        let (record, end) = oneshot::channel();
        self.send(Command::Start {
            request,
            events,
            record,
        })
        .await?;
        Ok(UpdateRun {
            events: progress,
            record: end,
        })
    }

    /// Ends the running update without a commit, if it is not past its commit point.
    pub async fn abort(&self) -> Result<(), UpdateError> {
        self.send(Command::Abort).await
    }

    /// Brings engines that have just become ready to the committed weights. To be called before they are
    /// admitted; of a lockstep group with all ranks at once. Waits for a running update to end.
    pub async fn restore(&self, ranks: Vec<EngineIndex>) -> Result<(), UpdateError> {
        let (reply, done) = oneshot::channel();
        self.send(Command::Restore { ranks, reply }).await?;
        done.await.map_err(|_| UpdateError::Gone)?
    }

    /// Ends the task. `forget`: the engines end with it as planned, so the next start begins with the
    /// command line's checkpoint; without it, the next sidecar with this state directory brings its engines
    /// to the committed weights.
    pub async fn shutdown(&self, forget: bool) -> Result<(), UpdateError> {
        let (reply, done) = oneshot::channel();
        self.send(Command::Shutdown { forget, reply }).await?;
        done.await.map_err(|_| UpdateError::Gone)
    }

    /// Latest state.
    pub fn status(&self) -> UpdateStatus {
        self.status.borrow().clone()
    }

    /// To wait for changes.
    pub fn watch(&self) -> watch::Receiver<UpdateStatus> {
        self.status.clone()
    }

    async fn send(&self, command: Command) -> Result<(), UpdateError> {
        let sent = self.commands.send(command).await;
        sent.map_err(|_| UpdateError::Gone)
    }
}

/// Starts the task. It ends when told to, when `stop` is cancelled, or when all handles are gone.
///
/// # Errors
/// When the journal in the state directory cannot be read.
pub fn spawn(
    config: UpdateConfig,
    ranks: Vec<RankHandle>,
    control: ControlHandle,
    fences: mpsc::Sender<FenceRequest>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> std::io::Result<UpdateHandle> {
    let journal = Journal::new(&config.state_dir);
    let committed = journal.read()?;
    if let Some(committed) = &committed {
        info!(
            version = %committed.commit.version, path = committed.commit.checkpoint.path,
            "engines will be brought to the weights committed before the restart"
        );
    }
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let (publish, status) = watch::channel(UpdateStatus::default());
    let task = Task {
        machine: machine(&config, committed.as_ref()),
        ranks: ranks.into_iter().map(|rank| (rank.rank, rank)).collect(),
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
        last: None,
        publish,
    };
    tracker.spawn(task.run(inbox, stop));
    Ok(UpdateHandle { commands, status })
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
    events: mpsc::Sender<UpdateEvent>,
    record: oneshot::Sender<UpdateRecord>,
    guard: Option<ControlGuard>,
    begun: bool,
    started_unix_ms: u64,
    infos: BTreeMap<EngineIndex, EngineInfo>,
    model_path: Option<String>,
}

/// What a piece of work in the background came to.
enum Done {
    /// For the machine, if this update still runs.
    Event(u64, Event),
    Acquired(u64, Result<ControlGuard, ControlError>),
    Staged(u64, Result<Staged, String>),
    Committed(u64, Box<Committed>, Result<(), String>),
    Restored {
        ranks: Vec<(EngineIndex, Incarnation)>,
        result: Result<Restored, UpdateError>,
        reply: RestoreReply,
    },
    Finished(Box<UpdateRecord>, oneshot::Sender<UpdateRecord>),
    Rank(EngineIndex),
    Nothing,
}

struct Staged {
    checked: Checked,
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
    restores: VecDeque<(Vec<EngineIndex>, RestoreReply)>,
    known: Known,
    /// Ends blocking work when the task ends.
    cancel: Cancel,
    last: Option<UpdateRecord>,
    publish: watch::Sender<UpdateStatus>,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, stop: CancellationToken) {
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
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.done(done),
                    Err(error) => error!(%error, "work of the update task failed"),
                },
                () = sleep_until(due) => {
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
            Command::Start {
                request,
                events,
                record,
            } => self.ask(request, events, record),
            Command::Abort => self.event(Event::Abort),
            Command::Restore { ranks, reply } => self.restores.push_back((ranks, reply)),
            Command::Shutdown { .. } => {}
        }
    }

    // --- beginning ---

    fn ask(
        &mut self,
        request: UpdateRequest,
        events: mpsc::Sender<UpdateEvent>,
        record: oneshot::Sender<UpdateRecord>,
    ) {
        let id = request
            .id
            .clone()
            .unwrap_or_else(|| UpdateId(uuid::Uuid::new_v4().to_string()));
        let version = request
            .version
            .clone()
            .unwrap_or_else(|| made_up_version(&request, &id));
        let started_unix_ms = unix_ms();
        let current = self.machine.snapshot().version;
        let refuse = |outcome, reason: String| {
            UpdateRecord::refused(
                id.clone(),
                &request,
                outcome,
                reason,
                current.clone(),
                started_unix_ms,
            )
        };
        if let Some(active) = &self.active {
            let snapshot = self.machine.snapshot();
            let refusal = Refusal::Busy {
                running: active.id.clone(),
                phase: snapshot.phase,
            };
            let refused = refuse(types::outcome_of(&refusal), refusal.to_string());
            ignore_gone(record.send(refused));
            return;
        }
        let begin = self.begin_event(&id, &version, &request, None);
        match self.machine.check(&begin) {
            Ok(None) => {}
            Ok(Some(earlier)) => {
                let again = UpdateRecord::ended(earlier, current, started_unix_ms);
                ignore_gone(record.send(again));
                return;
            }
            Err(refusal) => {
                let refused = refuse(types::outcome_of(&refusal), refusal.to_string());
                ignore_gone(record.send(refused));
                return;
            }
        }
        self.run += 1;
        let run = self.run;
        let control = self.control.clone();
        let owner = format!("update {id}");
        let patience = request.patience;
        self.jobs
            .spawn(async move { Done::Acquired(run, control.acquire(owner, patience).await) });
        self.active = Some(Active {
            id,
            version,
            run,
            events,
            record,
            guard: None,
            begun: false,
            started_unix_ms,
            infos: BTreeMap::new(),
            model_path: None,
            request,
        });
    }

    fn begin_event(
        &self,
        id: &UpdateId,
        version: &WeightVersion,
        request: &UpdateRequest,
        guard: Option<&ControlGuard>,
    ) -> Begin {
        let participant = |life: &Life| Participant {
            incarnation: life.incarnation,
            node: NodeId(0),
        };
        let external = guard.map_or_else(
            || self.control.snapshot().external_weights,
            |guard| guard.external_weights,
        );
        Begin {
            id: id.clone(),
            from_version: request.from_version.clone(),
            to_version: version.clone(),
            source: request.path.to_string_lossy().into_owned(),
            mode: request.mode,
            pause_deadline: request.pause_deadline,
            participants: self
                .lives
                .iter()
                .map(|(rank, life)| (*rank, participant(life)))
                .collect(),
            paused_before: guard.is_some_and(|guard| guard.paused_by.is_some()),
            external_weights: external,
        }
    }

    /// Starts what had to wait: restores while no update runs, an update while no restore runs.
    fn start_waiting(&mut self) {
        let running = self.active.as_ref().is_some_and(|active| active.begun);
        if !running {
            while let Some((ranks, reply)) = self.restores.pop_front() {
                self.restore(ranks, reply);
            }
        }
        if self.restoring > 0 {
            return;
        }
        let Some(mut active) = self.active.take() else {
            return;
        };
        if active.begun || active.guard.is_none() {
            self.active = Some(active);
            return;
        }
        let missing: Vec<String> = self
            .ranks
            .keys()
            .filter(|rank| !self.lives.contains_key(rank))
            .map(ToString::to_string)
            .collect();
        if self.config.kind == GroupKind::Lockstep && !missing.is_empty() {
            let reason = format!(
                "the lockstep group is not complete: rank {} is not serving",
                missing.join(", ")
            );
            self.refuse(active, UpdateOutcome::RefusedInvalid, reason);
            return;
        }
        if !missing.is_empty() {
            info!(
                ranks = missing.join(", "),
                "not serving now; brought to the new weights when started again"
            );
        }
        active.begun = true;
        let begin = self.begin_event(
            &active.id,
            &active.version,
            &active.request,
            active.guard.as_ref(),
        );
        info!(
            id = %active.id, version = %active.version, path = %active.request.path.display(),
            mode = %active.request.mode, ranks = begin.participants.len(), "update begins"
        );
        self.active = Some(active);
        self.event(Event::Begin(begin));
    }

    fn refuse(&self, active: Active, outcome: UpdateOutcome, reason: String) {
        let current = self.machine.snapshot().version;
        let refused = UpdateRecord::refused(
            active.id,
            &active.request,
            outcome,
            reason,
            current,
            active.started_unix_ms,
        );
        info!("{}", refused.message);
        ignore_gone(active.record.send(refused));
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
            Done::Restored {
                ranks,
                result,
                reply,
            } => self.restored(ranks, result, reply),
            Done::Finished(record, reply) => {
                self.active = None;
                self.last = Some((*record).clone());
                self.publish();
                ignore_gone(reply.send(*record));
            }
            Done::Rank(rank) => self.rank_changed(rank),
            Done::Nothing => {}
        }
    }

    fn staged(&mut self, result: Result<Staged, String>) {
        let node = NodeId(0);
        match result {
            Err(error) => self.event(Event::StageFailed { node, error }),
            Ok(staged) => {
                if let Some(active) = &mut self.active {
                    active.infos = staged.infos;
                    active.model_path = Some(staged.model_path);
                }
                self.event(Event::Staged {
                    node,
                    new: staged.checked.new,
                    previous: staged.checked.previous,
                });
            }
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
        if life.incarnation != incarnation || (life.admitted && !admitted) {
            let incarnation = life.incarnation;
            self.lives.remove(&rank);
            self.event(Event::EngineLost {
                rank,
                incarnation,
                reason: "its rank task reports it down".to_owned(),
            });
        }
    }

    fn restore(&mut self, ranks: Vec<EngineIndex>, reply: RestoreReply) {
        let handles: Vec<RankHandle> = ranks
            .iter()
            .filter_map(|rank| self.ranks.get(rank).cloned())
            .collect();
        let ranks = handles
            .iter()
            .map(|handle| (handle.rank, handle.snapshot.borrow().incarnation))
            .collect();
        let job = RestoreJob {
            committed: self.committed.clone(),
            may_forget: !self.any_restored,
            call_timeout: self.config.call_timeout,
            load_timeout: self.config.machine.load_timeout,
            known: self.known.clone(),
            cancel: self.cancel.flag(),
        };
        self.restoring += 1;
        self.jobs.spawn(async move {
            let result = job.run(handles).await;
            Done::Restored {
                ranks,
                result,
                reply,
            }
        });
    }

    fn restored(
        &mut self,
        ranks: Vec<(EngineIndex, Incarnation)>,
        result: Result<Restored, UpdateError>,
        reply: RestoreReply,
    ) {
        self.restoring -= 1;
        let result = result.map(|restored| {
            if let Some(why) = restored.forget {
                warn!("{why}: engines stay at the command line's checkpoint");
                self.committed = None;
                if self.active.as_ref().is_none_or(|active| !active.begun) {
                    self.machine = machine(&self.config, None);
                }
            }
            self.any_restored = true;
            for (rank, incarnation) in ranks {
                let admitted = self
                    .ranks
                    .get(&rank)
                    .is_some_and(|handle| handle.snapshot.borrow().admitted);
                let life = Life {
                    incarnation,
                    admitted,
                    info: restored.infos.get(&rank).cloned(),
                };
                self.lives.insert(rank, life);
            }
        });
        if let Err(error) = &result {
            error!("{error}");
        }
        ignore_gone(reply.send(result));
    }

    // --- actions ---

    async fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.act(action).await;
        }
    }

    async fn act(&mut self, action: Action) {
        let run = self.run;
        let machine = &self.config.machine;
        match action {
            Action::Stage { .. } => self.stage(),
            Action::CloseAdmission => {
                let limit = machine.admission_timeout;
                let handles: Vec<RankHandle> = self.ranks.values().cloned().collect();
                self.jobs.spawn(async move {
                    let event = match admission(&handles, false, limit).await {
                        Ok(()) => Event::AdmissionClosed,
                        Err(error) => Event::AdmissionFailed { error },
                    };
                    Done::Event(run, event)
                });
            }
            Action::Pause {
                rank,
                incarnation,
                attempt,
                mode,
                clear_cache,
            } => {
                let deadline = self.active.as_ref().map(|a| a.request.pause_deadline);
                let wait = if mode == PauseMode::Abort {
                    Duration::ZERO
                } else {
                    deadline.unwrap_or_default()
                };
                let limit = wait + machine.abort_pause_timeout + SLACK;
                self.call(rank, async move |handle| Event::Paused {
                    rank,
                    incarnation,
                    attempt,
                    result: nothing(engine_calls::pause(&handle, mode, clear_cache, limit).await),
                });
            }
            Action::Load {
                rank,
                incarnation,
                target,
                checkpoint,
            } => {
                let limit = machine.load_timeout + SLACK;
                let id = self.active.as_ref().map(|active| active.id.clone());
                let id = id.unwrap_or_default();
                if target == Target::Previous {
                    warn!(
                        rank = rank.0,
                        path = checkpoint.path,
                        "loading the previous weights"
                    );
                }
                self.call(rank, async move |handle| Event::Loaded {
                    rank,
                    incarnation,
                    target,
                    result: shim::load(&handle, &id, &checkpoint, limit).await,
                });
            }
            Action::WriteCommit { commit } => self.write_commit(commit),
            Action::SetVersion {
                rank,
                incarnation,
                version,
            } => {
                let limit = machine.commit_timeout + SLACK;
                self.call(rank, async move |handle| {
                    let args = vec![version.0.as_str().into()];
                    let answer = handle.call("set_weight_version", args, limit).await;
                    Event::VersionSet {
                        rank,
                        incarnation,
                        result: nothing(answer),
                    }
                });
            }
            Action::ResetCaches {
                rank,
                incarnation,
                attempt,
                reset_running_requests,
            } => {
                let limit = machine.commit_timeout + SLACK;
                let connector_answers = self
                    .active
                    .as_ref()
                    .and_then(|active| active.infos.get(&rank))
                    .is_some_and(EngineInfo::connector_answers);
                self.call(rank, async move |handle| {
                    let answer = engine_calls::reset_caches(
                        &handle,
                        reset_running_requests,
                        connector_answers,
                        limit,
                    );
                    Event::CachesReset {
                        rank,
                        incarnation,
                        attempt,
                        result: answer.await.map_err(|error| error.to_string()),
                    }
                });
            }
            Action::Resume {
                rank,
                incarnation,
                attempt,
            } => {
                let limit = machine.resume_timeout + SLACK;
                self.call(rank, async move |handle| Event::Resumed {
                    rank,
                    incarnation,
                    attempt,
                    result: nothing(engine_calls::resume(&handle, limit).await),
                });
            }
            Action::OpenAdmission => {
                let handles: Vec<RankHandle> = self.ranks.values().cloned().collect();
                if let Err(error) = admission(&handles, true, TELL_LIMIT).await {
                    error!("admission could not be opened: {error}");
                }
            }
            Action::Fence {
                rank,
                incarnation,
                why,
            } => self.fence(rank, incarnation, why).await,
            Action::Progress => self.progress(),
            Action::Refuse { refusal, .. } => {
                if let Some(active) = self.active.take() {
                    let outcome = types::outcome_of(&refusal);
                    self.refuse(active, outcome, refusal.to_string());
                }
            }
            Action::Done(record) => self.finish(*record),
        }
    }

    /// Calls a rank in the background; all ranks of a step are called at the same time.
    fn call<F>(&mut self, rank: EngineIndex, call: impl FnOnce(RankHandle) -> F + Send + 'static)
    where
        F: Future<Output = Event> + Send + 'static,
    {
        let run = self.run;
        let Some(handle) = self.ranks.get(&rank).cloned() else {
            return;
        };
        let answer = call(handle);
        self.jobs
            .spawn(async move { Done::Event(run, answer.await) });
    }

    fn stage(&mut self) {
        let Some(active) = &self.active else {
            return;
        };
        let run = active.run;
        let events = active.events.clone();
        let job = StageJob {
            source: active.request.path.clone(),
            allow_no_rollback: active.request.allow_no_rollback,
            committed: self.committed.as_ref().map(|c| c.commit.clone()),
            engines: self
                .lives
                .iter()
                .filter_map(|(rank, life)| Some((self.ranks.get(rank)?.clone(), life.info.clone())))
                .collect(),
            call_timeout: self.config.call_timeout,
            known: self.known.clone(),
            cancel: self.cancel.flag(),
        };
        self.jobs
            .spawn(async move { Done::Staged(run, job.run(events).await) });
    }

    fn write_commit(&mut self, commit: Commit) {
        let run = self.run;
        let journal = self.journal.clone();
        let model_path = self.active.as_ref().and_then(|a| a.model_path.clone());
        let committed = Committed::new(model_path.unwrap_or_default(), commit, None);
        self.jobs.spawn(async move {
            let written = {
                let committed = committed.clone();
                tokio::task::spawn_blocking(move || journal.write(&committed)).await
            };
            let result = match written {
                Ok(result) => result.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            Done::Committed(run, Box::new(committed), result)
        });
    }

    async fn fence(&mut self, rank: EngineIndex, incarnation: Incarnation, why: String) {
        error!(rank = rank.0, "engine is fenced: {why}");
        self.lives.remove(&rank);
        let down = RankCommand::EngineDown {
            incarnation,
            reason: format!("fenced: {why}"),
        };
        let request = FenceRequest {
            rank,
            incarnation,
            reason: why,
        };
        let fences = self.fences.clone();
        let handle = self.ranks.get(&rank).cloned();
        let tell = async move {
            if let Some(handle) = handle
                && let Err(error) = handle.tell(down).await
            {
                error!(rank = rank.0, %error, "fenced engine");
            }
            if fences.send(request).await.is_err() {
                error!(rank = rank.0, "nobody starts the fenced engine again");
            }
        };
        if tokio::time::timeout(TELL_LIMIT, tell).await.is_err() {
            error!(rank = rank.0, limit = ?TELL_LIMIT, "fencing took too long");
        }
    }

    fn progress(&self) {
        let Some(active) = &self.active else {
            return;
        };
        let snapshot = self.machine.snapshot();
        if let Some(guard) = &active.guard {
            guard.doing(snapshot.phase.as_str());
        }
        let event = UpdateEvent::Progress {
            phase: snapshot.phase,
            ranks: snapshot.ranks,
        };
        // Whoever does not read loses steps, never the end.
        active.events.try_send(event).ok();
        self.publish();
    }

    fn finish(&mut self, record: Record) {
        let Some(active) = self.active.take() else {
            return;
        };
        let version = self.machine.snapshot().version;
        let known =
            record.committed || record.ranks.values().any(|rank| rank.rollback_ms.is_some());
        let ended = UpdateRecord::ended(record.clone(), version, active.started_unix_ms);
        match ended.outcome {
            UpdateOutcome::Committed => info!("{}", ended.message),
            _ => warn!("{}", ended.message),
        }
        for warning in &record.warnings {
            warn!(id = %record.id, "{warning}");
        }
        let mut write = None;
        if let Some(committed) = &mut self.committed
            && committed.commit.id == record.id
        {
            committed.record = Some(record);
            write = Some(committed.clone());
        }
        let journal = self.journal.clone();
        let (record_to, guard) = (active.record, active.guard);
        // Until this is done the update counts as running.
        let (keep, _) = oneshot::channel();
        let (events, _) = mpsc::channel(1);
        self.active = Some(Active {
            guard: None,
            record: keep,
            events,
            ..active
        });
        self.jobs.spawn(async move {
            if let Some(committed) = write {
                let written = tokio::task::spawn_blocking(move || journal.write(&committed)).await;
                if let Ok(Err(error)) = written {
                    // The commit record itself is there; only the details are lost after a restart.
                    warn!(%error, "the update's record was not written");
                }
            }
            if let Some(guard) = guard {
                if known {
                    guard.weights_known().await;
                }
                guard.release().await;
            }
            Done::Finished(Box::new(ended), record_to)
        });
    }

    fn publish(&self) {
        let snapshot = self.machine.snapshot();
        let status = UpdateStatus {
            version: snapshot.version,
            committed: self.committed.as_ref().map(|c| c.commit.checkpoint.clone()),
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

/// Opens or closes the gate of all ranks.
async fn admission(ranks: &[RankHandle], open: bool, limit: Duration) -> Result<(), String> {
    let answers = ranks.iter().map(|rank| {
        rank.ask("admission", limit, |reply| RankCommand::Admission {
            open,
            reply,
        })
    });
    let failures: Vec<String> = join_all(answers)
        .await
        .into_iter()
        .filter_map(|answer| Some(answer.err()?.to_string()))
        .collect();
    if failures.is_empty() {
        return Ok(());
    }
    Err(failures.join(", "))
}

/// Checks the engines' shims, then the directories.
struct StageJob {
    source: PathBuf,
    allow_no_rollback: bool,
    committed: Option<Commit>,
    engines: Vec<(RankHandle, Option<EngineInfo>)>,
    call_timeout: Duration,
    known: Known,
    cancel: Arc<std::sync::atomic::AtomicBool>,
}

impl StageJob {
    async fn run(self, events: mpsc::Sender<UpdateEvent>) -> Result<Staged, String> {
        let limit = self.call_timeout;
        let asked = self.engines.into_iter().map(async |(handle, info)| {
            let info = match info {
                Some(info) => Ok(info),
                None => shim::info(&handle, limit).await,
            };
            info.map(|info| (handle.rank, info))
                .map_err(|error| format!("rank {}: {error}", handle.rank))
        });
        let infos: BTreeMap<EngineIndex, EngineInfo> = join_all(asked)
            .await
            .into_iter()
            .collect::<Result<_, _>>()?;
        let mut paths = infos.values().map(|info| info.model_path.clone());
        let model_path = paths.next().unwrap_or_default();
        if let Some(other) = paths.find(|path| *path != model_path) {
            return Err(format!(
                "engines were started from different checkpoints: {model_path} and {other}"
            ));
        }
        let job = Job {
            source: self.source,
            model_path: PathBuf::from(&model_path),
            committed: self.committed,
            allow_no_rollback: self.allow_no_rollback,
        };
        let checked = tokio::task::spawn_blocking(move || {
            let shown = AtomicU64::new(0);
            let progress = |progress: crate::manifest::Progress| {
                // About a hundred steps, and the last one.
                let step = (progress.total / 100).max(1);
                let before = shown.load(Ordering::Relaxed);
                if progress.done >= before + step || progress.done == progress.total {
                    shown.fetch_max(progress.done, Ordering::Relaxed);
                    let event = UpdateEvent::Hashing {
                        done: progress.done,
                        total: progress.total,
                    };
                    events.try_send(event).ok();
                }
            };
            self.known.check(&job, &progress, &self.cancel)
        });
        let checked = checked.await.map_err(|error| error.to_string())??;
        Ok(Staged {
            checked,
            infos,
            model_path,
        })
    }
}

/// Brings engines to the committed weights.
struct RestoreJob {
    committed: Option<Committed>,
    /// No engine of this process holds the committed weights yet, so a journal that cannot be followed is
    /// better forgotten.
    may_forget: bool,
    call_timeout: Duration,
    load_timeout: Duration,
    known: Known,
    cancel: Arc<std::sync::atomic::AtomicBool>,
}

impl RestoreJob {
    async fn run(self, handles: Vec<RankHandle>) -> Result<Restored, UpdateError> {
        let asked = handles
            .iter()
            .map(async |handle| (handle.rank, shim::info(handle, self.call_timeout).await));
        let answers = join_all(asked).await;
        let mut infos = BTreeMap::new();
        for (rank, answer) in answers {
            match (answer, &self.committed) {
                (Ok(info), _) => {
                    info!(
                        rank = rank.0,
                        shim = info.shim_version,
                        vllm = info.vllm_version,
                        "the shim answers"
                    );
                    infos.insert(rank, info);
                }
                (Err(error), None) => {
                    warn!(
                        rank = rank.0,
                        "weights of this engine cannot be updated: {error}"
                    );
                }
                (Err(reason), Some(committed)) => {
                    return Err(failed(rank, &committed.commit, reason));
                }
            }
        }
        let Some(committed) = &self.committed else {
            return Ok(Restored {
                infos,
                forget: None,
            });
        };
        let commit = &committed.commit;
        if let Some(why) = self.not_to_be_followed(committed, &infos) {
            return Ok(Restored {
                infos,
                forget: Some(why),
            });
        }
        let loads = handles.iter().map(async |handle| {
            let model_path = infos.get(&handle.rank).map(|info| info.model_path.as_str());
            self.bring(handle, commit, model_path.unwrap_or_default())
                .await
                .map_err(|reason| failed(handle.rank, commit, reason))
        });
        for result in join_all(loads).await {
            result?;
        }
        Ok(Restored {
            infos,
            forget: None,
        })
    }

    fn not_to_be_followed(
        &self,
        committed: &Committed,
        infos: &BTreeMap<EngineIndex, EngineInfo>,
    ) -> Option<String> {
        if !self.may_forget {
            return None;
        }
        let other = infos
            .values()
            .find(|info| info.model_path != committed.model_path);
        if let Some(info) = other {
            return Some(format!(
                "the state directory has weights committed for {}, but the engines run {}",
                committed.model_path, info.model_path
            ));
        }
        let path = &committed.commit.checkpoint.path;
        (!std::path::Path::new(path).is_dir())
            .then(|| format!("the committed weights in {path} are gone"))
    }

    async fn bring(
        &self,
        handle: &RankHandle,
        commit: &Commit,
        model_path: &str,
    ) -> Result<(), String> {
        if commit.checkpoint.path == model_path {
            // The engine has read that directory itself; it must still be what was committed.
            let (known, cancel) = (self.known.clone(), self.cancel.clone());
            let checkpoint = commit.checkpoint.clone();
            let verified =
                tokio::task::spawn_blocking(move || known.verify(&checkpoint, &cancel)).await;
            verified.map_err(|error| error.to_string())??;
        } else {
            info!(
                rank = handle.rank.0, version = %commit.version, path = commit.checkpoint.path,
                "loading the committed weights"
            );
            let limit = self.load_timeout;
            let workers = shim::load(handle, &commit.id, &commit.checkpoint, limit).await?;
            if workers.is_empty() {
                return Err("no worker answered to the load".to_owned());
            }
            if let Some(fault) = workers.iter().find_map(|w| w.fault(&commit.checkpoint)) {
                return Err(fault);
            }
        }
        let version = vec![commit.version.0.as_str().into()];
        if let Err(error) = handle
            .call("set_weight_version", version, self.call_timeout)
            .await
        {
            // vLLM has the method since 0.27.1.
            warn!(rank = handle.rank.0, %error, "outputs do not carry the weight version");
        }
        Ok(())
    }
}

fn failed(rank: EngineIndex, commit: &Commit, reason: String) -> UpdateError {
    UpdateError::Restore {
        rank,
        version: commit.version.clone(),
        reason,
    }
}

fn nothing(answer: Result<rmpv::Value, HandleError>) -> Result<(), String> {
    answer.map(|_| ()).map_err(|error| error.to_string())
}

/// Whoever asked may have gone away: then nobody wants to know.
fn ignore_gone<T>(sent: Result<(), T>) {
    if sent.is_err() {
        tracing::debug!("nobody waits for the answer of the update task");
    }
}

fn made_up_version(request: &UpdateRequest, id: &UpdateId) -> WeightVersion {
    let name = request.path.file_name().unwrap_or_default();
    let id: String = id.0.chars().take(8).collect();
    WeightVersion(format!("{}@{id}", name.to_string_lossy()))
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => pending().await,
    }
}
