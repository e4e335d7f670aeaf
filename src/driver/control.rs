//! The control task: drives the control machine. See `protocol::machine::control` for the rules.

mod sleep;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use dp_sidecar_protocol::machine::control::{
    Action, Control, Event, Grant, OwnerId, ROUND_TIMEOUT, Severity, Snapshot,
};
use dp_sidecar_protocol::machine::policy::Effect;
use dp_sidecar_protocol::machine::weight_update::PauseMode;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, PausedBy};
use futures::future::join_all;
use futures::stream::{SelectAll, StreamExt as _};
use rmpv::Value;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::handles::{CallResult, GroupKind, HandleError, HeldCall, RankHandle, Release, Verdict};
use super::{Clock, engine_calls, replace_if_other};
use crate::tasks;

pub use sleep::Slept;

/// Commands waiting for the task.
const COMMANDS: usize = 64;
/// Limit for a rank task to take a decision that needs no engine.
const DECISION_LIMIT: Duration = Duration::from_secs(10);
/// Added to limits, so that the party that knows more gives up first.
const SLACK: Duration = Duration::from_secs(5);
/// Limit for a resume by the operator. A lockstep resume is a barrier.
const RESUME_LIMIT: Duration = Duration::from_secs(120);

/// The engines cannot be controlled now, or did not do what they were told.
#[derive(Clone, Debug, Error)]
pub enum ControlError {
    /// Somebody else controls the engines.
    #[error("engines are controlled by {holder}")]
    Busy {
        /// Who, and what they do.
        holder: String,
    },
    /// Not all engines of a lockstep group are there, or none of a dense deployment.
    #[error("engine of rank {ranks} is not serving")]
    Incomplete {
        /// Who is missing.
        ranks: String,
    },
    /// Some ranks failed; the others did it.
    #[error("{what} failed on {failures}")]
    Ranks {
        /// `pause` or `resume`.
        what: &'static str,
        /// `rank 1: reason, ..`.
        failures: String,
    },
    /// vLLM would compute in memory that is not there.
    #[error("the engines sleep: wake them up (`sidecar wake`), which resumes them")]
    Asleep,
    /// They would answer with garbage.
    #[error(
        "the weights were discarded by a sleep of level 2: `sidecar wake --tag weights`, then `sidecar update`, then \
         `sidecar wake`"
    )]
    NoWeights,
    /// The control task has ended.
    #[error("the control task has ended")]
    Gone,
}

#[derive(Debug)]
enum Command {
    Acquire {
        name: String,
        patience: Duration,
        reply: oneshot::Sender<GrantReply>,
        /// Dropped by the holder when it is done, or does not want the lock any more.
        held: oneshot::Receiver<()>,
    },
    /// Dropped or answered when it is in force and published.
    Tell(Event, Option<oneshot::Sender<()>>),
}

/// The lock, or who does not give it up.
type GrantReply = Result<(OwnerId, Grant), String>;

/// Handle of the control task.
#[derive(Clone, Debug)]
pub struct ControlHandle {
    commands: mpsc::Sender<Command>,
    pub snapshot: watch::Receiver<Snapshot>,
    ranks: Vec<RankHandle>,
    kind: GroupKind,
}

/// The lock. Dropping it gives it back.
#[derive(Debug)]
pub struct ControlGuard {
    owner: OwnerId,
    commands: mpsc::Sender<Command>,
    /// As the engines were when the lock was taken.
    pub grant: Grant,
    _held: oneshot::Sender<()>,
}

impl ControlGuard {
    /// Says what the holder is doing, for messages to those who are refused. Dropped when the task is
    /// busy.
    pub fn doing(&self, what: &str) {
        let event = Event::Doing { owner: self.owner, what: what.to_owned() };
        if self.commands.try_send(Command::Tell(event, None)).is_err() {
            debug!(what, "the control task was not told what is being done");
        }
    }

    /// Records that all engines are paused, or resumed.
    pub async fn set_paused(&self, paused_by: Option<PausedBy>) {
        let owner = self.owner;
        self.tell(Event::PausedSet { owner, paused_by }).await;
    }

    /// Records that these engines are about to be called.
    async fn calling(&self, ranks: Vec<EngineIndex>, effect: Effect) {
        self.tell(Event::Calling { owner: self.owner, ranks, effect }).await;
    }

    /// Records what one of them has answered.
    async fn called(&self, rank: EngineIndex, effect: Effect, result: Result<Value, String>) {
        self.tell(Event::Called { owner: self.owner, rank, effect, result }).await;
    }

    /// Records that the engines hold weights that the sidecar has loaded.
    pub async fn weights_known(&self) {
        self.tell(Event::WeightsKnown { owner: self.owner }).await;
    }

    /// Gives the lock back and waits until that is in force; dropping it does not wait.
    pub async fn release(self) {
        self.tell(Event::Release { owner: self.owner }).await;
    }

    async fn tell(&self, event: Event) {
        let (done, in_force) = oneshot::channel();
        let sent = self.commands.send(Command::Tell(event, Some(done))).await;
        if sent.is_err() || in_force.await.is_err() {
            debug!("the control task has ended");
        }
    }
}

impl ControlHandle {
    /// Takes the lock, waiting at most `patience` for the present holder.
    pub async fn acquire(
        &self,
        owner: impl Into<String>,
        patience: Duration,
    ) -> Result<ControlGuard, ControlError> {
        let (reply, answer) = oneshot::channel();
        let (keep, held) = oneshot::channel();
        let command = Command::Acquire { name: owner.into(), patience, reply, held };
        let sent = self.commands.send(command).await;
        sent.map_err(|_| ControlError::Gone)?;
        let answer = tokio::time::timeout(patience + SLACK, answer).await;
        let (owner, grant) = answer
            .map_err(|_| ControlError::Busy { holder: "an owner that is not known".to_owned() })?
            .map_err(|_| ControlError::Gone)?
            .map_err(|holder| ControlError::Busy { holder })?;
        Ok(ControlGuard { owner, commands: self.commands.clone(), grant, _held: keep })
    }

    /// A frontend is gone: what it has asked for is dropped, its pause becomes a lease.
    pub async fn frontend_gone(&self, frontend: FrontendId) {
        let event = Event::FrontendGone { frontend };
        if self.commands.send(Command::Tell(event, None)).await.is_err() {
            debug!("the control task has ended");
        }
    }

    /// Pauses all engines for the operator. With `wait`, what still runs after `deadline` is aborted.
    pub async fn pause(
        &self,
        mode: PauseMode,
        deadline: Duration,
        patience: Duration,
    ) -> Result<(), ControlError> {
        let guard = self.acquire("operator pause", patience).await?;
        let result = self.pause_all(&guard, mode, deadline).await;
        guard.release().await;
        result
    }

    async fn pause_all(
        &self,
        guard: &ControlGuard,
        mode: PauseMode,
        deadline: Duration,
    ) -> Result<(), ControlError> {
        let ranks = self.serving()?;
        let pause = |mode, limit| {
            join_all(ranks.iter().map(move |rank| async move {
                (rank.rank, engine_calls::pause(rank, mode, false, limit).await)
            }))
        };
        let first = pause(mode, deadline + RESUME_LIMIT);
        tokio::pin!(first);
        let results = match tokio::time::timeout(deadline, &mut first).await {
            Ok(results) => results,
            Err(_) if mode != PauseMode::Abort => {
                guard.doing("aborting what still runs");
                // The first calls are answered together with the second ones.
                let (_, second) = futures::join!(first, pause(PauseMode::Abort, RESUME_LIMIT));
                second
            }
            Err(_) => first.await,
        };
        if results.iter().any(|(_, result)| result.is_ok()) {
            guard.set_paused(Some(PausedBy::Operator)).await;
        }
        all_ok("pause", results)
    }

    /// Resumes all engines for the operator, whoever has paused them. Without a pause nothing is sent.
    pub async fn resume(&self, patience: Duration) -> Result<(), ControlError> {
        let guard = self.acquire("operator resume", patience).await?;
        let result = self.resume_all(&guard).await;
        guard.release().await;
        result
    }

    async fn resume_all(&self, guard: &ControlGuard) -> Result<(), ControlError> {
        if guard.grant.asleep() {
            return Err(ControlError::Asleep);
        }
        if guard.grant.without_weights() {
            return Err(ControlError::NoWeights);
        }
        if guard.grant.paused_by.is_none() {
            return Ok(());
        }
        let ranks = self.serving()?;
        let resume = async |rank: &RankHandle| (rank.rank, engine_calls::resume(rank, RESUME_LIMIT).await);
        let results = join_all(ranks.iter().map(resume)).await;
        if results.iter().all(|(_, result)| result.is_ok()) {
            guard.set_paused(None).await;
        }
        all_ok("resume", results)
    }

    /// The ranks that can be controlled: of a lockstep group all or none.
    fn serving(&self) -> Result<Vec<RankHandle>, ControlError> {
        let (up, down): (Vec<_>, Vec<_>) =
            self.ranks.iter().cloned().partition(|rank| rank.snapshot.borrow().admitted);
        if up.is_empty() || (self.kind.is_lockstep() && !down.is_empty()) {
            let ranks: Vec<String> = down.iter().map(|rank| rank.rank.to_string()).collect();
            return Err(ControlError::Incomplete { ranks: ranks.join(", ") });
        }
        Ok(up)
    }
}

fn all_ok(what: &'static str, results: Vec<(EngineIndex, CallResult)>) -> Result<(), ControlError> {
    let failures =
        results.into_iter().filter_map(|(rank, result)| Some(format!("rank {rank}: {}", result.err()?)));
    let failures: Vec<String> = failures.collect();
    if failures.is_empty() {
        return Ok(());
    }
    Err(ControlError::Ranks { what, failures: failures.join(", ") })
}

/// Starts the task. It ends when `stop` is cancelled, or nobody can send held calls and commands any
/// more.
pub fn spawn(
    kind: GroupKind,
    ranks: Vec<RankHandle>,
    held: mpsc::Receiver<HeldCall>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> ControlHandle {
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let machine = Control::new(ranks.iter().map(|rank| rank.rank), kind);
    let (publish, snapshot) = watch::channel(machine.snapshot());
    let handle = ControlHandle { commands, snapshot, ranks: ranks.clone(), kind };
    let task = Task {
        machine,
        ranks: ranks.into_iter().map(|rank| (rank.rank, rank)).collect(),
        clock: Clock::start(),
        jobs: JoinSet::new(),
        owners: BTreeMap::new(),
        next_owner: 0,
        lives: BTreeMap::new(),
        publish,
        told: None,
    };
    tracker.spawn(tasks::named(tasks::Task::Control, task.run(held, inbox, stop)));
    handle
}

struct Task {
    machine: Control,
    ranks: BTreeMap<EngineIndex, RankHandle>,
    clock: Clock,
    /// Work in the background, and what the machine is to know of it.
    jobs: JoinSet<Option<Event>>,
    /// Who waits for the lock.
    owners: BTreeMap<OwnerId, oneshot::Sender<GrantReply>>,
    next_owner: u64,
    /// Which life of each rank is up, as told to the machine.
    lives: BTreeMap<EngineIndex, Incarnation>,
    publish: watch::Sender<Snapshot>,
    /// Whoever waits for the last event to be in force.
    told: Option<oneshot::Sender<()>>,
}

impl Task {
    async fn run(
        mut self,
        mut held: mpsc::Receiver<HeldCall>,
        mut inbox: mpsc::Receiver<Command>,
        stop: CancellationToken,
    ) {
        let mut changes: SelectAll<_> = self.ranks.values().map(RankHandle::changes).collect();
        let ranks: Vec<EngineIndex> = self.ranks.keys().copied().collect();
        for rank in ranks {
            self.look(rank);
        }
        let (mut held_open, mut inbox_open) = (true, true);
        while held_open || inbox_open {
            self.perform();
            let event = tokio::select! {
                () = stop.cancelled() => break,
                call = held.recv(), if held_open => {
                    held_open = call.is_some();
                    call.map(Event::Held)
                }
                command = inbox.recv(), if inbox_open => {
                    inbox_open = command.is_some();
                    command.and_then(|command| self.command(command))
                }
                Some(done) = self.jobs.join_next() => match done {
                    Ok(event) => {
                        if let Some(Event::Release { owner }) = &event {
                            // It may have given up before it was answered.
                            self.owners.remove(owner);
                        }
                        event
                    }
                    Err(error) => { warn!(%error, "work of the control task failed"); None }
                },
                Some(rank) = changes.next() => { self.look(rank); None }
                () = self.clock.reach(self.machine.poll_timeout()) => {
                    self.machine.handle_timeout(self.clock.now());
                    None
                }
            };
            if let Some(event) = event {
                self.machine.handle_event(self.clock.now(), event);
            }
        }
        self.jobs.shutdown().await;
    }

    fn command(&mut self, command: Command) -> Option<Event> {
        match command {
            Command::Tell(event, done) => {
                self.told = done;
                Some(event)
            }
            Command::Acquire { name, patience, reply, held } => {
                self.next_owner += 1;
                let owner = OwnerId(self.next_owner);
                self.owners.insert(owner, reply);
                self.jobs.spawn(async move {
                    // Nothing is ever sent: it ends when the other half is dropped.
                    match held.await {
                        Ok(()) | Err(_) => Some(Event::Release { owner }),
                    }
                });
                Some(Event::Acquire { owner, name, patience })
            }
        }
    }

    /// Tells the machine whether a rank serves, and that it is another engine.
    fn look(&mut self, rank: EngineIndex) {
        let Some(RankHandle { snapshot, .. }) = self.ranks.get(&rank) else {
            return;
        };
        // Without its task it does not serve.
        let ended = snapshot.has_changed().is_err();
        let (life, memory) = {
            let of = snapshot.borrow();
            (Some(of.incarnation).filter(|_| of.admitted && !ended), of.memory)
        };
        let known = self.lives.get(&rank).copied();
        let now = self.clock.now();
        if known.is_some() && known != life {
            self.lives.remove(&rank);
            let reason = "the engine is not serving any more".to_owned();
            self.machine.handle_event(now, Event::EngineDown { rank, reason });
        }
        if let Some(incarnation) = life
            && known != life
        {
            self.lives.insert(rank, incarnation);
            self.machine.handle_event(now, Event::EngineUp { rank, memory });
        }
    }

    fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Decide { rank, ticket, verdict } => self.decide(rank, ticket, verdict),
                Action::Call { rank, operation, method, args } => self.call(rank, operation, method, args),
                Action::Granted { owner, grant } => self.answer(owner, Ok((owner, grant))),
                Action::Denied { owner, holder } => self.answer(owner, Err(holder)),
                Action::Note { severity, text } => match severity {
                    Severity::Info => info!("{text}"),
                    Severity::Warning => warn!("{text}"),
                },
            }
        }
        self.publish.send_if_modified(|published| replace_if_other(published, self.machine.snapshot()));
        if let Some(told) = self.told.take()
            && told.send(()).is_err()
        {
            debug!("nobody waits for the control task to be told");
        }
    }

    /// An owner that has given up is noticed by the end of its other channel.
    fn answer(&mut self, owner: OwnerId, answer: GrantReply) {
        if let Some(reply) = self.owners.remove(&owner)
            && reply.send(answer).is_err()
        {
            debug!(owner = owner.0, "nobody waits for the control lock any more");
        }
    }

    fn decide(&mut self, rank: EngineIndex, ticket: u64, verdict: Verdict) {
        let Some(handle) = self.ranks.get(&rank).cloned() else {
            return;
        };
        let forward = verdict == Verdict::Forward;
        if let Verdict::Refuse(text) = &verdict {
            info!(rank = rank.0, ticket, "{text}");
        }
        let limit = if forward { ROUND_TIMEOUT + SLACK } else { DECISION_LIMIT };
        self.jobs.spawn(async move {
            let answer = handle.ask_within(limit, Release { ticket, verdict }).await;
            if forward {
                let result = answer.map_err(|error| error.to_string());
                return Some(Event::Answered { rank, ticket, result });
            }
            if let Err(error) = answer {
                // The frontend may be gone, and its calls with it.
                debug!(rank = rank.0, ticket, %error, "decision on a control call");
            }
            None
        });
    }

    fn call(&mut self, rank: EngineIndex, operation: u64, method: &'static str, args: Vec<Value>) {
        let handle = self.ranks.get(&rank).cloned();
        let limit = ROUND_TIMEOUT;
        self.jobs.spawn(async move {
            let answer = match handle {
                None => Err(HandleError::failed("no such rank")),
                Some(handle) => match method {
                    "pause_scheduler" => engine_calls::pause(&handle, PauseMode::Keep, false, limit).await,
                    "resume_scheduler" => engine_calls::resume(&handle, limit).await,
                    method => handle.call(method, args, limit).await,
                },
            };
            let result = answer.map_err(|error| error.to_string());
            Some(Event::CallAnswered { rank, operation, result })
        });
    }
}
