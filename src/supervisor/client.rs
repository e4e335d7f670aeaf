//! The sidecar's side of the keeper socket: a handle for the tasks, and one task that owns the
//! connection and replaces a keeper that died.

mod launch;
mod leftovers;
mod takeover;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::keeper::wire::{
    self, Answer, ChildInfo, ExitReport, ExitStatus, FromKeeper, KeeperEvent, Request, SpawnSpec, ToKeeper,
};
use crate::duration::millis;
use crate::supervisor::procfs::Selector;
use crate::tasks::{Task, named};

/// Commands waiting for the client task.
const COMMANDS: usize = 64;
/// Events waiting for the node task.
const EVENTS: usize = 256;
/// Events waiting inside the client task; when there are more, the keeper is not read.
const BACKLOG: usize = 1024;
/// How long the keeper may take for a simple answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a keeper may take to introduce itself; one that hangs is killed then.
pub(super) const INTRODUCTION_LIMIT: Duration = Duration::from_secs(3);
/// How much longer than its grace a stop of everything may take, per stage.
pub(super) const SHUTDOWN_MARGIN: Duration = Duration::from_secs(15);
/// Stages of a shutdown at most: frontend, engines, and one to spare.
const SHUTDOWN_STAGES: u32 = 3;
/// How long writing a request may take.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// How to find or start the keeper.
#[derive(Clone, Debug)]
pub struct KeeperOptions {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The `sidecar` binary.
    pub exe: PathBuf,
    /// Marks all processes of this state directory.
    pub run_id: String,
    /// How long the keeper keeps everything running without an owner.
    pub orphan_grace: Duration,
    /// Grace between SIGTERM and SIGKILL when leftovers are removed, and when the keeper stops
    /// everything on its own.
    pub kill_grace: Duration,
    /// Names the deployment: a keeper that works for another one is told to stop everything.
    pub configuration: String,
    /// Children that are taken over from an earlier sidecar of the same deployment; others are stopped first.
    pub keep: BTreeSet<String>,
    /// Joins the client's task.
    pub tasks: TaskTracker,
}

impl KeeperOptions {
    fn failed(&self, detail: impl Into<String>) -> KeeperError {
        KeeperError::Start { state_dir: self.state_dir.clone(), detail: detail.into() }
    }

    /// Kills a keeper that lives but does not answer. Returns whether no keeper is left.
    async fn kill_unresponsive(&self) -> Result<bool, KeeperError> {
        let killed = launch::kill_unresponsive(&self.state_dir).await;
        killed.map_err(|error| self.failed(error.to_string()))
    }
}

/// Something is wrong with the keeper, or it refused.
#[derive(Clone, Debug, Error)]
pub enum KeeperError {
    /// It could not be started.
    #[error("keeper of {}: start: {detail}", state_dir.display())]
    Start { state_dir: PathBuf, detail: String },
    /// It refused or failed to do what it was asked for.
    #[error("keeper: {what}: {detail}")]
    Refused { what: String, detail: String },
    /// It did not answer in time.
    #[error("keeper: {what}: no answer within {limit:?}")]
    Deadline { what: String, limit: Duration },
    /// It died, or the client was shut down.
    #[error("keeper: {what}: the keeper is gone")]
    Gone { what: String },
}

#[derive(Debug)]
struct Ask {
    request: Request,
    reply: oneshot::Sender<Answer>,
}

/// Handle of the keeper client. Cheap to clone. When the last one is dropped the connection closes,
/// and the keeper waits out its orphan grace.
#[derive(Clone, Debug)]
pub struct KeeperClient {
    asks: mpsc::Sender<Ask>,
    pid: watch::Receiver<Option<u32>>,
    inherited: Arc<Inherited>,
}

/// What an earlier sidecar has left with the keeper.
#[derive(Clone, Debug, Default)]
pub struct Inherited {
    /// Children that go on.
    pub children: Vec<ChildInfo>,
    /// How those ended that are not there any more.
    pub exits: Vec<ExitReport>,
}

impl Inherited {
    /// The living child of that name.
    pub fn child(&self, name: &str) -> Option<&ChildInfo> {
        self.children.iter().find(|child| child.name == name)
    }

    /// How the last child of that name ended, if it is not there any more.
    pub fn exit(&self, name: &str) -> Option<&ExitReport> {
        self.exits.iter().find(|exit| exit.name == name)
    }

    /// The newest life of that name that anybody may still hear of: the next one must have a higher number, or the
    /// end of the old one, which may still be on its way, would be taken for its own. 0 if there was none.
    pub fn last_incarnation(&self, name: &str) -> u64 {
        let child = self.child(name).map_or(0, |child| child.incarnation);
        child.max(self.exit(name).map_or(0, |exit| exit.incarnation))
    }
}

impl KeeperClient {
    /// Connects to the keeper of the state directory, or starts one after removing what an earlier
    /// one left behind. The children of a living keeper go on, see [`Self::inherited`], if it works for the same
    /// [`KeeperOptions::configuration`]; otherwise they are stopped first, within the kill grace. Events come on
    /// the returned channel; read it always.
    pub async fn connect_or_start(
        options: KeeperOptions,
    ) -> Result<(Self, mpsc::Receiver<KeeperEvent>), KeeperError> {
        let (ask_sender, asks) = mpsc::channel(COMMANDS);
        let (event_sender, events) = mpsc::channel(EVENTS);
        let (pid_sender, pid) = watch::channel(None);
        let mut task = ClientTask {
            options,
            process: None,
            children: BTreeMap::new(),
            backlog: VecDeque::new(),
            events: event_sender,
            pid: pid_sender,
            next_seq: 0,
        };
        launch::check_here(&task.options.state_dir)
            .map_err(|error| task.options.failed(error.to_string()))?;
        let (link, inherited) = match task.take_over().await {
            Some(taken) => taken,
            None => {
                task.retire_old_keeper().await?;
                (task.start_keeper(BTreeSet::new()).await?, Inherited::default())
            }
        };
        let tasks = task.options.tasks.clone();
        tasks.spawn(named(Task::KeeperClient, task.run(link, asks)));
        Ok((Self { asks: ask_sender, pid, inherited: Arc::new(inherited) }, events))
    }

    /// What goes on from before, as it was when this client connected. What happens to it comes as events.
    pub fn inherited(&self) -> &Inherited {
        &self.inherited
    }

    /// Pid of the keeper; `None` while there is none.
    pub fn pid(&self) -> Option<u32> {
        *self.pid.borrow()
    }

    /// Starts a child; returns the pid of its main process.
    pub async fn spawn(&self, spec: SpawnSpec) -> Result<u32, KeeperError> {
        let what = format!("start of {}", spec.name);
        match self.ask(&what, ANSWER_LIMIT, Request::Spawn { spec }).await? {
            Answer::Spawned { pid } => Ok(pid),
            other => Err(unexpected(&what, &other)),
        }
    }

    /// Asks for a child's end: SIGTERM, after `grace` SIGKILL to all of it. Returns when the keeper
    /// has accepted; the end comes as [`KeeperEvent::Exited`].
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<(), KeeperError> {
        let what = format!("stop of {name}");
        let request = Request::Stop { name: name.to_owned(), grace_ms: millis(grace) };
        match self.ask(&what, ANSWER_LIMIT, request).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&what, &other)),
        }
    }

    /// Living children.
    pub async fn list(&self) -> Result<Vec<ChildInfo>, KeeperError> {
        match self.ask("list", ANSWER_LIMIT, Request::List).await? {
            Answer::Children { children } => Ok(children),
            other => Err(unexpected("list", &other)),
        }
    }

    /// Stops all children in their order, each stage within `grace`, and ends the keeper. Returns
    /// when all are gone.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), KeeperError> {
        let limit = (grace + SHUTDOWN_MARGIN) * SHUTDOWN_STAGES;
        let request = Request::Shutdown { grace_ms: millis(grace) };
        match self.ask("shutdown", limit, request).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected("shutdown", &other)),
        }
    }

    async fn ask(&self, what: &str, limit: Duration, request: Request) -> Result<Answer, KeeperError> {
        let gone = || KeeperError::Gone { what: what.to_owned() };
        let exchange = async {
            let (reply, answer) = oneshot::channel();
            self.asks.send(Ask { request, reply }).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())
        };
        match timeout(limit, exchange).await {
            Ok(Ok(Answer::Failed { error })) => {
                Err(KeeperError::Refused { what: what.to_owned(), detail: error })
            }
            Ok(answer) => answer,
            Err(_) => Err(KeeperError::Deadline { what: what.to_owned(), limit }),
        }
    }
}

fn unexpected(what: &str, answer: &Answer) -> KeeperError {
    KeeperError::Refused { what: what.to_owned(), detail: format!("unexpected answer {answer:?}") }
}

/// A connection to a keeper, and what waits for its answers.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    inbox: Vec<u8>,
    pending: BTreeMap<u64, oneshot::Sender<Answer>>,
    /// A shutdown was asked for: its end is expected.
    ending: bool,
}

impl Link {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, inbox: Vec::new(), pending: BTreeMap::new(), ending: false }
    }

    pub(super) async fn send(&mut self, message: &ToKeeper) -> Result<(), String> {
        let frame = wire::encode(message).map_err(|error| error.to_string())?;
        match timeout(WRITE_LIMIT, self.stream.write_all(&frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("write: {error}")),
            Err(_) => Err(format!("it has not read for {WRITE_LIMIT:?}")),
        }
    }

    /// The next message. Cancel safe: bytes that were read stay in the inbox.
    pub(super) async fn receive(&mut self) -> Result<FromKeeper, String> {
        loop {
            match wire::decode(&mut self.inbox) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => return Err(error.to_string()),
            }
            match self.stream.read_buf(&mut self.inbox).await {
                Ok(0) => return Err("connection closed".to_owned()),
                Ok(_) => {}
                Err(error) => return Err(format!("read: {error}")),
            }
        }
    }

    /// Sends a request and waits for its answer; events that come meanwhile are dropped. Only for
    /// the time before the link is in use.
    pub(super) async fn exchange(&mut self, request: Request, limit: Duration) -> Result<Answer, String> {
        let exchange = async {
            self.send(&ToKeeper { seq: 0, request }).await?;
            loop {
                if let FromKeeper::Answer { answer, .. } = self.receive().await? {
                    return Ok(answer);
                }
            }
        };
        timeout(limit, exchange).await.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
    }
}

/// A child the client knows of, for the time when its keeper is dead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) incarnation: u64,
    pub(super) pid: u32,
}

#[derive(Debug)]
pub(super) struct ClientTask {
    pub(super) options: KeeperOptions,
    /// The keeper, if we started it: it must be reaped.
    process: Option<Child>,
    pub(super) children: BTreeMap<String, Known>,
    pub(super) backlog: VecDeque<KeeperEvent>,
    events: mpsc::Sender<KeeperEvent>,
    pub(super) pid: watch::Sender<Option<u32>>,
    next_seq: u64,
}

impl ClientTask {
    /// Ends a keeper of an earlier sidecar together with its children.
    async fn retire_old_keeper(&self) -> Result<(), KeeperError> {
        let options = &self.options;
        if let Some(stream) = launch::connect(&options.state_dir).await {
            let mut link = Link::new(stream);
            let limit = (options.kill_grace + SHUTDOWN_MARGIN) * SHUTDOWN_STAGES;
            tracing::info!("telling the keeper of an earlier sidecar to stop everything");
            let ended = async {
                link.exchange(Request::Own, INTRODUCTION_LIMIT).await?;
                link.exchange(Request::Shutdown { grace_ms: millis(options.kill_grace) }, limit).await
            };
            match ended.await {
                // It closes the connection when it really ends; then its socket is free.
                Ok(_) => {
                    let end = async { while link.receive().await.is_ok() {} };
                    let _ = timeout(ANSWER_LIMIT, end).await;
                }
                Err(error) => tracing::warn!(error, "the old keeper does not stop"),
            }
        }
        let gone = options.kill_unresponsive().await?;
        if gone { Ok(()) } else { Err(options.failed("the old keeper cannot be killed")) }
    }

    /// Removes what a dead keeper left behind and starts a new one.
    async fn start_keeper(&mut self, sessions: BTreeSet<i32>) -> Result<Link, KeeperError> {
        let options = &self.options;
        let failed = |detail: String| options.failed(detail);
        let selector = Selector {
            run_id: options.run_id.clone(),
            child: None,
            sessions,
            orphans_of: Some(options.state_dir.clone()),
        };
        let removed = leftovers::remove(selector, options.kill_grace)
            .await
            .map_err(|error| failed(format!("search for leftovers: {error}")))?;
        if removed.found > 0 {
            tracing::warn!(
                found = removed.found,
                killed = removed.killed,
                left = ?removed.left,
                "leftovers of an earlier keeper removed"
            );
        }
        if !removed.left.is_empty() {
            return Err(failed(format!("processes {:?} of an earlier run cannot be ended", removed.left)));
        }
        let (process, stream) = launch::start(options, &options.run_id).await?;
        let mut link = Link::new(stream);
        match link.exchange(Request::Own, INTRODUCTION_LIMIT).await {
            Ok(Answer::Keeper { pid, run_id }) if run_id == options.run_id => {
                takeover::remember(options).map_err(failed)?;
                self.process = Some(process);
                self.pid.send_replace(Some(pid));
                Ok(link)
            }
            Ok(other) => Err(failed(format!("unexpected introduction {other:?}"))),
            Err(error) => Err(failed(format!("introduction: {error}"))),
        }
    }

    async fn run(mut self, mut link: Link, mut asks: mpsc::Receiver<Ask>) {
        loop {
            let problem = self.serve(&mut link, &mut asks).await;
            link.pending.clear();
            self.pid.send_replace(None);
            self.reap().await;
            let Some(problem) = problem else {
                self.deliver_all().await;
                return;
            };
            tracing::error!(problem, "the keeper is lost; everything it had is stopped");
            drop(link);
            match self.replace().await {
                Ok(new) => link = new,
                Err(error) => {
                    tracing::error!(%error, "no new keeper");
                    let error = error.to_string();
                    self.backlog.push_back(KeeperEvent::Failed { error });
                    self.deliver_all().await;
                    return;
                }
            }
        }
    }

    /// Serves until the keeper is lost (with the problem), or not needed any more (`None`).
    async fn serve(&mut self, link: &mut Link, asks: &mut mpsc::Receiver<Ask>) -> Option<String> {
        loop {
            let room = self.backlog.len() < BACKLOG;
            let events = self.events.clone();
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => {
                        if let Err(problem) = self.forward(link, ask).await {
                            return Some(problem);
                        }
                    }
                    // Nobody holds a handle any more: the keeper goes on without an owner.
                    None => return None,
                },
                message = link.receive(), if room => match message {
                    Ok(message) => self.take(link, message),
                    Err(_) if link.ending => return None,
                    Err(problem) => return Some(problem),
                },
                permit = events.reserve(), if !self.backlog.is_empty() => {
                    match (permit, self.backlog.pop_front()) {
                        (Ok(permit), Some(event)) => permit.send(event),
                        // Nobody listens: events are dropped, commands still work.
                        _ => self.backlog.clear(),
                    }
                }
            }
        }
    }

    async fn forward(&mut self, link: &mut Link, ask: Ask) -> Result<(), String> {
        self.next_seq += 1;
        link.ending |= matches!(ask.request, Request::Shutdown { .. });
        link.pending.insert(self.next_seq, ask.reply);
        link.send(&ToKeeper { seq: self.next_seq, request: ask.request }).await
    }

    pub(super) fn take(&mut self, link: &mut Link, message: FromKeeper) {
        match message {
            FromKeeper::Answer { seq, answer } => {
                if let Some(reply) = link.pending.remove(&seq) {
                    // The asker may have given up.
                    let _ = reply.send(answer);
                }
            }
            FromKeeper::Event { event } => {
                match &event {
                    KeeperEvent::Spawned { name, incarnation, pid } => {
                        let known = Known { incarnation: *incarnation, pid: *pid };
                        self.children.insert(name.clone(), known);
                    }
                    KeeperEvent::Exited(report) => {
                        self.children.remove(&report.name);
                    }
                    KeeperEvent::Replaced { .. } | KeeperEvent::Failed { .. } => {}
                }
                self.backlog.push_back(event);
            }
        }
    }

    /// After the death of a keeper: everything it had is stopped, reported as ended, and a new one
    /// is started.
    async fn replace(&mut self) -> Result<Link, KeeperError> {
        // It may be alive but unreachable (it closed the connection, or does not read).
        self.options.kill_unresponsive().await?;
        let sessions = self.children.values().filter_map(|child| i32::try_from(child.pid).ok()).collect();
        let started = self.start_keeper(sessions).await;
        for (name, known) in std::mem::take(&mut self.children) {
            let log = self.options.state_dir.join(super::keeper::LOGS).join(format!("{name}.log"));
            self.backlog.push_back(KeeperEvent::Exited(ExitReport {
                name,
                incarnation: known.incarnation,
                pid: known.pid,
                status: ExitStatus::Unknown,
                requested: false,
                last_lines: vec![format!("(its keeper died; see {})", log.display())],
                strays_killed: 0,
                left: Vec::new(),
            }));
        }
        let link = started?;
        if let Some(pid) = *self.pid.borrow() {
            self.backlog.push_back(KeeperEvent::Replaced { pid });
        }
        Ok(link)
    }

    /// Takes the dead keeper's exit status, so that it is no zombie.
    async fn reap(&mut self) {
        if let Some(mut process) = self.process.take() {
            match timeout(Duration::from_secs(2), process.wait()).await {
                Ok(Ok(status)) => tracing::debug!(%status, "the keeper ended"),
                // It lives on without us; tokio reaps it if it ends while we still run.
                _ => drop(process),
            }
        }
    }

    async fn deliver_all(&mut self) {
        for event in self.backlog.drain(..) {
            let sent = self.events.send_timeout(event, ANSWER_LIMIT).await;
            if sent.is_err() {
                return;
            }
        }
    }
}
