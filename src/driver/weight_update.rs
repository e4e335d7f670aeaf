//! The update task: drives the update transaction over the node's ranks, brings started engines to the
//! committed weights, and remembers what is committed. See `protocol::machine::weight_update` for the
//! rules.

mod actions;
mod adapters;
mod handle;
mod jobs;
mod journal;
mod lora;
mod nodes;
mod shim;
mod stages;
mod staging;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dp_sidecar_protocol::machine::weight_update::updates::{
    Action, Ask, Conclusion, Engines, Event, Found, RunId, Seen, Staging, Ticket, Updates,
};
use dp_sidecar_protocol::machine::weight_update::{
    Action as Step, Checkpoint, Commit, Committed, Event as Answer, Fit, Ledger, NodeId, OddTensor, Pause,
    PauseMode, Phase, Refusal,
};
use dp_sidecar_protocol::{EngineIndex, Incarnation, UpdateId, WeightVersion};
use futures::future::join_all;
use futures::stream::{SelectAll, StreamExt as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::control::{ControlGuard, ControlHandle};
use super::handles::{Admission, EngineDown, HandleError, RankHandle};
use super::{Clock, engine_calls, replace_if_other};
use crate::api::{Retain, StageProgress, UpdateEvent, UpdateRequest, UpdateSource};
use crate::tasks;
use handle::{Command, Follower, RestoreReply};
pub use handle::{UpdateHandle, UpdateRun};
use journal::Journal;
use shim::EngineInfo;
pub use stages::StageReports;
use stages::Stages;
use staging::{Cancel, Known};
pub use types::{FenceRequest, UpdateConfig, UpdateError, UpdateNode, UpdateRecord, UpdateSnapshot};

/// Commands waiting for the task.
const COMMANDS: usize = 16;
/// Progress waiting for whoever started the update; more is dropped.
const EVENTS: usize = 64;
/// Added to limits of calls, so that the machine's deadline comes first.
const SLACK: Duration = Duration::from_secs(5);
/// Limit for telling a rank task or the node task something.
const TELL_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for a control round that is under way before a pause is handed on.
const PATIENCE: Duration = Duration::from_secs(30);

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
    if config.forget_committed {
        journal.forget()?;
    }
    let committed = journal.read()?;
    let ledger = journal.read_ledger()?;
    let last = journal.history(1)?.pop();
    if let Some(committed) = &committed {
        info!(
            version = %committed.commit.version, source = committed.commit.source,
            "engines will be brought to the weights that were committed before; with --forget-committed they would \
             start with the checkpoint of the command line"
        );
    }
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let (notes, noted) = mpsc::channel(EVENTS);
    let (publish, snapshot) = watch::channel(UpdateSnapshot::default());
    let node_of: BTreeMap<EngineIndex, NodeId> =
        nodes.iter().flat_map(|node| node.ranks.iter().map(|rank| (*rank, node.id))).collect();
    let all = ranks.iter().map(|rank| (rank.rank, node_of.get(&rank.rank).copied().unwrap_or_default()));
    let cancel = Cancel::default();
    let task = Task {
        machine: Updates::new(config.machine.clone(), all.collect(), committed, ledger),
        tools: Arc::new(Tools {
            ranks: ranks.into_iter().map(|rank| (rank.rank, rank)).collect(),
            node_of,
            stages: Stages::new(nodes),
            config,
            control,
            fences,
            journal,
            began: Instant::now(),
            known: Known::default(),
            cancel: cancel.flag(),
            notes,
        }),
        cancel,
        ledger_number: 0,
        seen: BTreeMap::new(),
        control_seen: (None, false),
        staging: BTreeMap::new(),
        clock: Clock::start(),
        jobs: JoinSet::new(),
        work: HashMap::new(),
        incoming: None,
        active: None,
        infos: Infos::new(),
        answers: BTreeMap::new(),
        tickets: 0,
        last,
        publish,
        #[cfg(test)]
        faults: tests::jobs::faults(),
    };
    tracker.spawn(tasks::named(tasks::Task::WeightUpdate, task.run(inbox, noted, stop)));
    Ok(UpdateHandle { commands, snapshot })
}

/// What engines say about themselves; `None`: the shim does not answer.
type Infos = BTreeMap<EngineIndex, Option<EngineInfo>>;

/// An update that is asked for or runs, or engines that are taken over.
#[derive(Debug)]
struct Active {
    id: UpdateId,
    request: UpdateRequest,
    version: WeightVersion,
    /// It is no update, but engines are taken over.
    recovery: bool,
    followers: Vec<Follower>,
    guard: Option<ControlGuard>,
    started_unix_ms: u64,
    /// Nodes whose staging areas are in use for it.
    staged: Vec<NodeId>,
    stage_job: Option<AbortHandle>,
    /// What becomes of adapters on each node.
    adapters: BTreeMap<NodeId, adapters::Changes>,
    /// How it has ended.
    record: Option<UpdateRecord>,
}

impl Active {
    fn new(id: UpdateId, request: UpdateRequest, followers: Vec<Follower>) -> Self {
        Self {
            id,
            request,
            version: WeightVersion::default(),
            recovery: false,
            followers,
            guard: None,
            started_unix_ms: unix_ms(),
            staged: Vec::new(),
            stage_job: None,
            adapters: BTreeMap::new(),
            record: None,
        }
    }

    /// Tells everybody who follows. Whoever does not read loses steps, never the end.
    fn tell(&self, event: &UpdateEvent) {
        for follower in &self.followers {
            follower.events.try_send(event.clone()).ok();
        }
    }
}

/// What a piece of work leaves with the driver.
#[derive(Default)]
struct Extra {
    guard: Option<ControlGuard>,
    infos: Infos,
    /// With the directories that engines of each node load from.
    adapters: BTreeMap<NodeId, adapters::Changes>,
}

/// What work needs.
struct Tools {
    config: UpdateConfig,
    ranks: BTreeMap<EngineIndex, RankHandle>,
    /// Ranks that are not named belong to node 0.
    node_of: BTreeMap<EngineIndex, NodeId>,
    stages: Stages,
    control: ControlHandle,
    fences: mpsc::Sender<FenceRequest>,
    journal: Journal,
    began: Instant,
    known: Known,
    /// Ends blocking work when the task ends.
    cancel: Arc<AtomicBool>,
    /// Progress of staging.
    notes: mpsc::Sender<UpdateEvent>,
}

struct Task {
    tools: Arc<Tools>,
    machine: Updates,
    /// Sets the flag of the tools when it is dropped.
    cancel: Cancel,
    clock: Clock,
    jobs: JoinSet<(Option<Event>, Extra)>,
    /// What each job is for.
    work: HashMap<tokio::task::Id, Action>,
    /// What the machine was told of the two.
    seen: BTreeMap<EngineIndex, Seen>,
    control_seen: (Option<Pause>, bool),
    /// It is asked for, and the machine has not said yet what becomes of it.
    incoming: Option<Active>,
    active: Option<Active>,
    infos: Infos,
    answers: BTreeMap<Ticket, RestoreReply>,
    tickets: u64,
    /// Number of the last ledger written.
    ledger_number: u64,
    /// Of the running update.
    staging: BTreeMap<NodeId, StageProgress>,
    last: Option<UpdateRecord>,
    publish: watch::Sender<UpdateSnapshot>,
    #[cfg(test)]
    faults: tests::jobs::Faults,
}

impl Task {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Command>,
        mut noted: mpsc::Receiver<UpdateEvent>,
        stop: CancellationToken,
    ) {
        let mut ranks: SelectAll<_> = self.tools.ranks.values().map(RankHandle::changes).collect();
        let mut control = self.tools.control.snapshot.clone();
        self.look();
        let shutdown = loop {
            self.perform();
            self.publish();
            tokio::select! {
                () = stop.cancelled() => break None,
                command = inbox.recv() => match command {
                    None => break None,
                    Some(Command::Shutdown { engines_end, reply }) => break Some((engines_end, reply)),
                    Some(command) => self.command(command),
                },
                Some(event) = noted.recv() => self.note(event),
                Some(ended) = self.jobs.join_next_with_id() => self.ended(ended),
                Some(_) = ranks.next() => self.look(),
                Ok(()) = control.changed() => self.look(),
                () = self.clock.reach(self.machine.poll_timeout()) => {
                    self.machine.handle_timeout(self.clock.now());
                }
            }
        };
        self.cancel = Cancel::default();
        self.jobs.shutdown().await;
        if let Some((engines_end, reply)) = shutdown {
            if engines_end && let Err(error) = self.end_with_engines().await {
                warn!(%error, "the journal was not brought to its end");
            }
            ignore_gone(reply.send(()));
        }
    }

    /// The engines, and the memory of the nodes, have ended with the sidecar.
    async fn end_with_engines(&self) -> std::io::Result<()> {
        let commit = self.machine.committed().map(|committed| &committed.commit);
        let lost =
            commit.filter(|commit| !commit.checkpoint.extents.is_empty() && commit.directory().is_none());
        if let Some(commit) = lost {
            warn!(
                version = %commit.version,
                "the weights were uploaded, and end with the memory of the nodes: the next start begins with the \
                 checkpoint of the command line"
            );
        }
        let (journal, forget) = (self.tools.journal.clone(), lost.is_some());
        actions::blocking(move || {
            journal.clear_ledger()?;
            if forget { journal.forget() } else { Ok(()) }
        })
        .await
    }

    fn event(&mut self, event: Event) {
        self.look();
        self.machine.handle_event(self.clock.now(), event);
        self.perform();
    }

    fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.act(action);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Start { request, follower } => self.ask(request, follower),
            Command::Follow { id, reply } => ignore_gone(reply.send(self.follow(id))),
            Command::Abort => self.event(Event::Abort),
            Command::History { limit, reply } => {
                let journal = self.tools.journal.clone();
                self.jobs.spawn(async move {
                    let records = actions::blocking(move || journal.history(limit)).await;
                    let told = |error: std::io::Error| warn!(%error, "the history cannot be read");
                    ignore_gone(reply.send(records.map_err(told).unwrap_or_default()));
                    (None, Extra::default())
                });
            }
            Command::Restore { ranks, reply } => {
                let (ticket, engines) = (self.ticket(reply), ranks.into_iter().collect());
                self.event(Event::RestoreAsked { ticket, engines });
            }
            Command::Adopt { ranks, reply } => {
                let (ticket, engines) = (self.ticket(reply), ranks.into_iter().collect());
                self.event(Event::AdoptAsked { ticket, engines });
            }
            Command::Shutdown { .. } => {}
        }
    }

    fn ticket(&mut self, reply: RestoreReply) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.answers.insert(ticket, reply);
        ticket
    }

    fn ask(&mut self, request: UpdateRequest, follower: Follower) {
        let id = request.id.clone().unwrap_or_else(|| UpdateId(uuid::Uuid::new_v4().to_string()));
        let directory = |path: &PathBuf| path.to_string_lossy().into_owned();
        let config = &self.tools.config;
        let adapters = request.adapters.iter();
        let ask = Ask {
            version: request.version.clone(),
            made_up_version: made_up_version(&request, &id),
            from_version: request.from_version.clone(),
            source: request.source_name(),
            weights: request.has_weights(),
            adapters: adapters.map(|c| (c.name.clone(), c.path.as_ref().map(directory))).collect(),
            mode: request.mode,
            pause_deadline: config.pause_deadline_of(&request),
            forward_only: request.retain == Retain::None,
            patience: config.patience,
            id: id.clone(),
        };
        self.incoming = Some(Active::new(id, request, vec![follower]));
        self.event(Event::Asked(ask));
    }

    fn follow(&mut self, id: Option<UpdateId>) -> Result<UpdateRun, UpdateError> {
        match &self.active {
            Some(active) if id.as_ref().is_none_or(|id| *id == active.id) => {
                let (follower, run) = UpdateRun::new();
                self.join(follower);
                Ok(run)
            }
            _ => Err(UpdateError::NotRunning { id }),
        }
    }

    /// Somebody follows the update that runs, and is told at once where it is: the next step may be far.
    fn join(&mut self, follower: Follower) {
        let snapshot = self.machine.snapshot();
        if snapshot.phase != Phase::Idle {
            let phase = snapshot.phase;
            follower.events.try_send(UpdateEvent::Progress { phase, ranks: snapshot.ranks }).ok();
            let staging = self.staging.iter().filter(|_| phase == Phase::Staging);
            for (&node, &progress) in staging {
                let name = self.tools.stages.name(node);
                follower.events.try_send(UpdateEvent::Staging { node, name, progress, rate: 0 }).ok();
            }
        }
        if let Some(active) = &mut self.active {
            active.followers.push(follower);
        }
    }

    // --- work ---

    /// Does work in the background. Should it be lost, the machine hears what it was for.
    fn spawn<F>(&mut self, action: Action, work: F) -> AbortHandle
    where
        F: Future<Output = (Option<Event>, Extra)> + Send + 'static,
    {
        #[cfg(test)]
        let work = tests::jobs::faulty(&self.faults, &action, work);
        let job = self.jobs.spawn(work);
        self.work.insert(job.id(), action);
        job
    }

    fn spawn_plain(&mut self, action: Action, work: impl Future<Output = Option<Event>> + Send + 'static) {
        self.spawn(action, async move { (work.await, Extra::default()) });
    }

    fn ended(&mut self, ended: Result<(tokio::task::Id, (Option<Event>, Extra)), tokio::task::JoinError>) {
        match ended {
            Ok((id, (event, extra))) => {
                self.work.remove(&id);
                self.keep(event.as_ref(), extra);
                if let Some(event) = event {
                    self.event(event);
                }
            }
            Err(error) => {
                if error.is_panic() {
                    error!(%error, "work of the update task was lost");
                }
                if let Some(action) = self.work.remove(&error.id()) {
                    let (action, error) = (Box::new(action), error.to_string());
                    self.event(Event::JobLost { action, error });
                }
            }
        }
    }

    fn keep(&mut self, event: Option<&Event>, extra: Extra) {
        if let Some(Event::Acquired { run, .. } | Event::Staged { run, .. }) = event
            && self.machine.run() != Some(*run)
        {
            // Of an update that is over.
            return;
        }
        self.infos.extend(extra.infos);
        if let Some(active) = &mut self.active {
            active.guard = extra.guard.or_else(|| active.guard.take());
            active.adapters.extend(extra.adapters);
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

    /// Tells the machine what it has not seen yet.
    fn look(&mut self) {
        let now = self.clock.now();
        for (rank, handle) in &self.tools.ranks {
            let seen = {
                let snapshot = handle.snapshot.borrow();
                Seen {
                    incarnation: snapshot.incarnation,
                    admitted: snapshot.admitted,
                    memory: snapshot.memory,
                }
            };
            if self.seen.get(rank) != Some(&seen) {
                self.seen.insert(*rank, seen);
                self.machine.handle_event(now, Event::RankSeen { rank: *rank, seen });
            }
        }
        let seen = control_seen(&self.tools.control.snapshot.borrow());
        if self.control_seen != seen {
            self.control_seen = seen.clone();
            let (pause, external_weights) = seen;
            self.machine.handle_event(now, Event::ControlSeen { pause, external_weights });
        }
    }

    /// Whether the weights can be updated, for people.
    fn updates(&self) -> String {
        let mut only_with = None;
        for (rank, _) in self.machine.lives() {
            match self.infos.get(&rank) {
                None => return format!("not known yet: rank {rank} has not been asked"),
                Some(None) => return format!("no: the shim of rank {rank} does not answer, see the log"),
                Some(Some(info)) => {
                    if let Some(reason) = info.refuses() {
                        return format!("no: rank {rank}: {reason}");
                    }
                    let no_way_back = info.holds_other().filter(|_| self.machine.committed().is_none());
                    let no_way_back = no_way_back.map(|reason| ("--allow-no-rollback", rank, reason));
                    let stale_kv = info.keeps_kv().map(|reason| ("--allow-stale-kv", rank, reason));
                    only_with = only_with.or(no_way_back).or(stale_kv);
                }
            }
        }
        match only_with {
            Some((flag, rank, reason)) => format!("only with {flag}: rank {rank}: {reason}"),
            None => "possible".to_owned(),
        }
    }

    fn publish(&self) {
        let committed = self.machine.committed().map(|committed| &committed.commit);
        let now = self.machine.snapshot();
        let snapshot = UpdateSnapshot {
            version: now.version,
            in_doubt: now.in_doubt,
            external_weights: now.external_weights,
            updates: self.updates(),
            committed: committed.map(|commit| commit.checkpoint.clone()),
            source: committed.map(|commit| commit.source.clone()),
            running: self.active.as_ref().map(|active| active.id.clone()),
            last: self.last.clone(),
        };
        self.publish.send_if_modified(|published| replace_if_other(published, snapshot));
    }
}

/// The pause of the operator or of a frontend, and whether a frontend has loaded weights.
fn control_seen(now: &dp_sidecar_protocol::machine::control::Snapshot) -> (Option<Pause>, bool) {
    (now.paused_by.clone().map(|by| Pause { by }), now.external_weights)
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
    let cut = |text: &str, length| text.chars().filter(|c| !c.is_control()).take(length).collect::<String>();
    let short = cut(&id.0, 8);
    let directory = request.path.as_deref().and_then(Path::file_name).unwrap_or_default();
    let name = request.upload.clone().unwrap_or_else(|| directory.to_string_lossy().into_owned());
    WeightVersion(format!("{}@{short}", cut(&name, WeightVersion::LONGEST - 9)))
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
