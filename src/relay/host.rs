//! The sidecar's side of its node's relay process: finds a living one or has the keeper start one, keeps the link
//! connected, and starts another when it died.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::{CHILD, Purpose, socket};
use crate::driver::handles::{NodeEvent, NodeState};
use crate::link::LinkStream;
use crate::link::client::{self, ClientOptions, Link, LinkStatus, NodeHandles};
use crate::supervisor::command::RELAY_STOP_ORDER;
use crate::supervisor::{ExitStatus, KeeperClient, KeeperEvent, SpawnSpec, environment};
use crate::tasks::{Task, named};

/// From the start of a relay process to its first answer.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Between two tries to connect.
const RETRY: Duration = Duration::from_millis(20);
/// After a connection was lost.
const RECONNECT: Duration = Duration::from_millis(100);
/// Connections without an answer after which a relay process is killed: it hangs, or is of another version.
const HOPELESS: u32 = 4;
/// A relay process that dies so often within [`DEATHS_WITHIN`] is not started again.
const DEATHS: usize = 5;
const DEATHS_WITHIN: Duration = Duration::from_secs(60);
/// Between two tries to have one started, and how long it is tried.
const SPAWN_RETRY: Duration = Duration::from_millis(100);
const SPAWN_LIMIT: Duration = Duration::from_secs(15);
/// Links waiting for the client.
const LINKS: usize = 4;

/// How to find or start a relay process.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The `sidecar` binary.
    pub exe: PathBuf,
    /// What it is for.
    pub purpose: Purpose,
    /// Who starts it.
    pub keeper: KeeperClient,
    /// From SIGTERM to SIGKILL, for one that is of no use.
    pub kill_grace: Duration,
    /// Joins the tasks.
    pub tracker: TaskTracker,
    /// Ends the client of its link.
    pub stop: CancellationToken,
}

/// There is no relay process, and none can be started.
#[derive(Clone, Debug, Error)]
#[error("relay process: {0}")]
pub struct HostError(String);

/// The relay process of this node, as the sidecar sees it.
#[derive(Debug)]
pub struct Relay {
    /// Its tasks.
    pub handles: NodeHandles,
    /// What it knew when it was found: of one that was just started, nothing.
    pub found: NodeState,
    /// Tells once that it died and cannot be replaced.
    pub failed: mpsc::Receiver<HostError>,
    /// Its pid; none while there is none.
    pub pid: watch::Receiver<Option<u32>>,
    /// Cancel it before the relay process is stopped for good.
    pub retire: CancellationToken,
}

/// Finds or starts the relay process, and waits until it has told its state. `keeper` are the keeper's events; what the
/// relay process reports goes to `events`.
///
/// # Errors
/// It cannot be started, or does not answer.
pub async fn start(
    options: HostOptions,
    keeper: mpsc::Receiver<KeeperEvent>,
    events: mpsc::Sender<NodeEvent>,
) -> Result<Relay, HostError> {
    let (links, links_out) = mpsc::channel(LINKS);
    let ranks = options.purpose.ranks.clone().map(EngineIndex).collect();
    let client_options = ClientOptions {
        about: Some(options.purpose.to_string()),
        ..ClientOptions::new("the relay process", ranks, options.stop.clone())
    };
    let (handles, mut status) = client::spawn(client_options, links_out, events, &options.tracker);
    let (failed_in, mut failed) = mpsc::channel(1);
    let (pid_in, pid) = watch::channel(None);
    let retire = CancellationToken::new();
    let host = Host {
        links,
        status: status.clone(),
        pid: pid_in,
        running: None,
        keeper_away: false,
        incarnation: 0,
        deaths: VecDeque::new(),
        linked: None,
        next_try: Instant::now(),
        since: Instant::now(),
        hopeless: 0,
        options: options.clone(),
    };
    let limit = START_LIMIT + SPAWN_LIMIT;
    let run = host.run(keeper, failed_in);
    options.tracker.spawn(named(Task::RelayHost, retire.clone().run_until_cancelled_owned(run)));
    let found = async {
        tokio::select! {
            status = status.wait_for(|status| status.connected) => match status {
                Ok(status) => Ok(status.state.as_deref().cloned().unwrap_or_default()),
                Err(_) => Err(HostError("its supervision has ended".to_owned())),
            },
            Some(error) = failed.recv() => Err(error),
        }
    };
    let found = match timeout(limit, found).await {
        Ok(found) => found?,
        Err(_) => return Err(HostError(format!("no answer within {limit:?}"))),
    };
    Ok(Relay { handles, found, failed, pid, retire })
}

struct Host {
    options: HostOptions,
    links: mpsc::Sender<Link>,
    status: watch::Receiver<LinkStatus>,
    pid: watch::Sender<Option<u32>>,
    /// Life of the relay process that runs.
    running: Option<u64>,
    /// The keeper is dead and its successor is not there yet.
    keeper_away: bool,
    incarnation: u64,
    /// When relay processes died.
    deaths: VecDeque<Instant>,
    /// The client has a connection: lost ones before it.
    linked: Option<u64>,
    next_try: Instant,
    /// Since when there has been no working connection.
    since: Instant,
    hopeless: u32,
}

impl Host {
    async fn run(mut self, mut events: mpsc::Receiver<KeeperEvent>, failed: mpsc::Sender<HostError>) {
        if let Err(error) = self.supervise(&mut events).await {
            error!(%error, "cannot go on without a relay process");
            let _ = failed.send(error).await;
        }
    }

    async fn supervise(&mut self, events: &mut mpsc::Receiver<KeeperEvent>) -> Result<(), HostError> {
        self.find().await?;
        loop {
            if self.running.is_none() && !self.keeper_away {
                self.spawn().await?;
            }
            let trying = self.running.is_some() && self.linked.is_none();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.keeper_event(event).await?,
                    None => return Ok(()),
                },
                changed = self.status.changed() => match changed {
                    Ok(()) => self.status_changed().await,
                    Err(_) => return Ok(()),
                },
                () = sleep_until(self.next_try), if trying => self.connect().await,
            }
        }
    }

    /// Looks for a relay process that an earlier sidecar has left running.
    async fn find(&mut self) -> Result<(), HostError> {
        let children = self.options.keeper.list().await;
        let children = children.map_err(|error| HostError(error.to_string()))?;
        self.incarnation = self.options.keeper.inherited().last_incarnation(CHILD);
        let Some(child) = children.into_iter().find(|child| child.name == CHILD) else {
            return Ok(());
        };
        self.incarnation = self.incarnation.max(child.incarnation);
        if !child.stopping {
            info!(pid = child.pid, "relay process of an earlier sidecar found");
            self.started(child.incarnation, child.pid);
        }
        Ok(())
    }

    fn started(&mut self, incarnation: u64, pid: u32) {
        self.running = Some(incarnation);
        self.pid.send_replace(Some(pid));
        self.since = Instant::now();
        self.next_try = Instant::now();
        self.hopeless = 0;
    }

    async fn spawn(&mut self) -> Result<(), HostError> {
        self.incarnation += 1;
        let spec = self.spec();
        let until = Instant::now() + SPAWN_LIMIT;
        loop {
            match self.options.keeper.spawn(spec.clone()).await {
                Ok(pid) => {
                    info!(pid, "relay process started");
                    self.started(self.incarnation, pid);
                    return Ok(());
                }
                // Its predecessor may be on the way out, or the keeper is being replaced.
                Err(error) if Instant::now() < until => {
                    tracing::debug!(%error, "relay process not started yet");
                    sleep(SPAWN_RETRY).await;
                }
                Err(error) => return Err(HostError(error.to_string())),
            }
        }
    }

    fn spec(&self) -> SpawnSpec {
        let options = &self.options;
        let Purpose { ranks, frontend_slots, kind, limits } = &options.purpose;
        let limits = serde_json::to_string(limits).unwrap_or_default();
        let kind = kind.model();
        let argv = [
            options.exe.display().to_string(),
            CHILD.to_owned(),
            "--state-dir".to_owned(),
            options.state_dir.display().to_string(),
            "--start-rank".to_owned(),
            ranks.start.to_string(),
            "--ranks".to_owned(),
            ranks.len().to_string(),
            "--frontend-slots".to_owned(),
            frontend_slots.to_string(),
            "--kind".to_owned(),
            kind.to_owned(),
            "--limits".to_owned(),
            limits,
        ];
        SpawnSpec {
            name: CHILD.to_owned(),
            incarnation: self.incarnation,
            argv: argv.to_vec(),
            env: environment::clean(environment::own()).variables,
            cwd: None,
            stop_order: RELAY_STOP_ORDER,
        }
    }

    async fn keeper_event(&mut self, event: KeeperEvent) -> Result<(), HostError> {
        match event {
            KeeperEvent::Exited(report) if report.name == CHILD => {
                if self.running != Some(report.incarnation) {
                    return Ok(());
                }
                self.keeper_away |= report.status == ExitStatus::Unknown;
                error!(
                    pid = report.pid,
                    status = %report.status,
                    last_lines = ?report.last_lines,
                    "the relay process died: this node's engines are started again, its frontends attach again"
                );
                self.died(&format!("the relay process died ({})", report.status)).await
            }
            KeeperEvent::Replaced { .. } => {
                self.keeper_away = false;
                // One that the new keeper has started already is fine.
                let children = self.options.keeper.list().await.unwrap_or_default();
                let lives = children.iter().any(|child| child.name == CHILD && !child.stopping);
                match self.running {
                    Some(_) if !lives => self.died("the relay process ended with its keeper").await,
                    _ => Ok(()),
                }
            }
            KeeperEvent::Failed { error } => Err(HostError(error)),
            KeeperEvent::Spawned { .. } | KeeperEvent::Exited(_) => Ok(()),
        }
    }

    async fn died(&mut self, reason: &str) -> Result<(), HostError> {
        self.running = None;
        self.linked = None;
        self.pid.send_replace(None);
        let _ = self.links.send(Link::Gone(reason.to_owned())).await;
        let now = Instant::now();
        self.deaths.push_back(now);
        self.deaths.retain(|at| now - *at < DEATHS_WITHIN);
        if self.deaths.len() >= DEATHS {
            return Err(HostError(format!("it died {DEATHS} times within {DEATHS_WITHIN:?}: {reason}")));
        }
        Ok(())
    }

    // === link ===

    async fn connect(&mut self) {
        self.next_try = Instant::now() + RETRY;
        match UnixStream::connect(socket(&self.options.state_dir)).await {
            Ok(stream) => {
                self.linked = Some(self.status.borrow_and_update().lost);
                let stream = LinkStream::new(stream, "the relay process");
                let _ = self.links.send(Link::Stream(stream)).await;
            }
            Err(error) if self.since.elapsed() > START_LIMIT => {
                self.stop(&format!("no connection to it within {START_LIMIT:?}: {error}"), Duration::ZERO)
                    .await;
            }
            Err(_) => {}
        }
    }

    async fn status_changed(&mut self) {
        let status = self.status.borrow_and_update().clone();
        if status.connected {
            self.hopeless = 0;
            return;
        }
        let Some(before) = self.linked else {
            return;
        };
        if status.lost > before {
            self.linked = None;
            self.since = Instant::now();
            self.next_try = Instant::now() + RECONNECT;
            self.hopeless += 1;
            let detail = status.detail.unwrap_or_default();
            if status.stranger {
                self.stop(&detail, self.options.kill_grace).await;
            } else if self.hopeless >= HOPELESS {
                self.stop(&format!("it does not answer: {detail}"), Duration::ZERO).await;
            }
        }
    }

    /// Ends the relay process; its exit leads to a new one.
    async fn stop(&mut self, why: &str, grace: Duration) {
        warn!(why, "the relay process is stopped");
        self.next_try = Instant::now() + START_LIMIT;
        self.hopeless = 0;
        if let Err(error) = self.options.keeper.stop(CHILD, grace).await {
            warn!(%error, "stop of the relay process");
        }
    }
}
