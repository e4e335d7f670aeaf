//! Wires the tasks together, runs until something ends the run, and stops everything in order.
//! The only place that knows all tasks.

mod commands;
mod drain;
mod follower;
mod local;
mod nodes;
mod pauses;
mod stage;
mod start;
mod status;
mod updates;
mod waiting;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use self::local::Supervised;
use self::nodes::Gathered;
use crate::admin::AdminServer;
use crate::api::{AdminCommand, Command, Response, Status};
use crate::config::{Config, Nodes, Role};
use crate::driver::frontend::FrontendExit;
use crate::driver::handles::{AttachmentCommand, CoordinatorCommand, HandleError, ask};
use crate::driver::node::{NodeCommand, NodeExit};
use crate::exit_code::{self, RunEnd};
use crate::peer::facts;
use crate::peer::introduction::Introduction;
use crate::peer::leader::{Leader, RemoteNode};
use crate::shutdown::{self, Asked, Why};
use crate::state_dir::StateDir;
use crate::supervisor::client::KeeperClient;
use crate::tasks::{Task, named};
use crate::transport;

/// Limit for one of our own tasks to end.
const TASK_END: Duration = Duration::from_secs(5);

/// Runs the sidecar until it is told to stop, or cannot go on.
pub async fn run(config: Config, state: StateDir) -> RunEnd {
    let tracker = TaskTracker::new();
    let outside = match shutdown::watch_outside(config.lifeline, &tracker) {
        Ok(outside) => outside,
        Err(error) => {
            return RunEnd::new(exit_code::INTERNAL, format!("signal handlers: {error}"));
        }
    };
    let stop = CancellationToken::new();
    // The admin socket first: status answers while everything else starts.
    let admin = match AdminServer::bind(state.path()) {
        Ok(server) => {
            let (commands, admin) = mpsc::channel(local::QUEUE);
            tracker.spawn(named(Task::Admin, server.serve(commands.clone(), stop.clone())));
            (admin, commands)
        }
        Err(error) => return local::internal("admin socket", &error),
    };
    let mut begun = Begun {
        config,
        state: Arc::new(state),
        tracker,
        admin: admin.0,
        commands: admin.1.downgrade(),
        outside,
        stop,
        began: std::time::Instant::now(),
    };
    // With its lock, until nothing is left.
    let state = begun.state.clone();
    let end = match begun.config.role() {
        Role::Follower => follower::run(begun).await,
        Role::Alone | Role::Leader => match begun.lead().await {
            Ok(app) => app.run(begun.outside).await,
            Err(end) => {
                begun.stop.cancel();
                end
            }
        },
    };
    if !end.keeps_engines {
        // All engines have ended: nobody loads from them any more.
        stage::free(&state, end.code == exit_code::OK);
    }
    end
}

/// A run that has its admin socket, and nothing else.
struct Begun {
    config: Config,
    state: Arc<StateDir>,
    tracker: TaskTracker,
    admin: mpsc::Receiver<AdminCommand>,
    /// For whoever asks by other ways than the admin socket.
    commands: mpsc::WeakSender<AdminCommand>,
    outside: watch::Receiver<Asked>,
    stop: CancellationToken,
    began: std::time::Instant,
}

impl Begun {
    /// Starts everything, on the node of rank 0.
    async fn lead(&mut self) -> Result<App, RunEnd> {
        let keeper = local::keeper(&self.config, &self.state, &self.tracker).await?;
        let nodes = match self.config.nodes.clone() {
            None => None,
            Some(nodes) => match self.gather(&nodes).await {
                Ok(gathered) => Some(gathered),
                Err(end) => {
                    stop_keeper(&keeper.client, self.config.kill_grace).await;
                    return Err(end);
                }
            },
        };
        let leader = nodes.as_ref().map(|(_, leader, _)| leader.clone());
        let prepared = start::Prepared {
            admin: std::mem::replace(&mut self.admin, mpsc::channel(1).1),
            commands: self.commands.clone(),
            keeper,
            nodes,
            stop: self.stop.clone(),
            began: self.began,
        };
        let starting =
            start::start(Arc::new(self.config.clone()), &self.state, self.tracker.clone(), prepared);
        let started = tokio::select! {
            app = starting => app,
            why = asked(&mut self.outside) => Err(ended_by(why)),
        };
        if let (Err(end), Some(leader)) = (&started, leader) {
            leader.end(end.code, &format!("it cannot start: {}", end.reason)).await;
        }
        started
    }

    /// Waits for the other nodes.
    async fn gather(&mut self, nodes: &Nodes) -> Result<(Introduction, Leader, Vec<RemoteNode>), RunEnd> {
        let config = &self.config;
        let own = facts::introduction(config, self.state.run_id()).await;
        let leader = nodes::listen(config, nodes, own.clone(), &self.tracker, self.stop.clone()).await?;
        let look = || Status {
            nodes: nodes::status(&own, &leader, &[]),
            missing: Some(leader.missing()),
            ..waiting::status(config, self.began, "waiting for nodes")
        };
        let gathering = leader.gather(config.startup_timeout);
        let why_not = "the sidecar waits for other nodes";
        let gathered =
            waiting::serve_while(gathering, &mut self.admin, &mut self.outside, look, why_not).await;
        let found = match gathered {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                let end = nodes::gather_end(&error);
                leader.end(end.code, &end.reason).await;
                return Err(end);
            }
            Err(end) => {
                leader.end(end.code, &format!("stopped: {}", end.reason)).await;
                return Err(end);
            }
        };
        if let Some(address) = leader.own_address() {
            nodes::set_address(&mut self.config, address);
        }
        Ok((own, leader, found))
    }
}

/// Ends the keeper and everything it has.
async fn stop_keeper(keeper: &KeeperClient, grace: Duration) {
    if let Err(error) = keeper.shutdown(grace).await {
        error!(%error, "the keeper did not end");
    }
}

/// The running sidecar.
pub(crate) struct App {
    config: Arc<Config>,
    tracker: TaskTracker,
    /// Ends the small tasks: admin server, GPU reader, distribution of keeper events.
    stop: CancellationToken,
    /// Ends the supervised frontend.
    stop_frontend: CancellationToken,
    admin: mpsc::Receiver<AdminCommand>,
    node: JoinHandle<NodeExit>,
    node_commands: mpsc::Sender<NodeCommand>,
    frontend: Option<JoinHandle<FrontendExit>>,
    handles: commands::Handles,
    stopping: watch::Sender<bool>,
    keeper: KeeperClient,
    relay: Supervised,
    nodes: Option<Gathered>,
}

/// What ended the run.
enum End {
    Outside(Why),
    Command,
    Node(NodeExit),
    Frontend(FrontendExit),
    Internal(String),
}

impl App {
    async fn run(mut self, mut outside: watch::Receiver<Asked>) -> RunEnd {
        let end = loop {
            tokio::select! {
                biased;
                why = asked(&mut outside) => break End::Outside(why),
                Some(error) = self.relay.failed.recv() => break End::Internal(error.to_string()),
                exit = &mut self.node => break match exit {
                    Ok(exit) => End::Node(exit),
                    Err(error) => End::Internal(format!("node task: {error}")),
                },
                exit = ended(&mut self.frontend) => break match exit {
                    Ok(exit) => End::Frontend(exit),
                    Err(error) => End::Internal(format!("frontend task: {error}")),
                },
                command = self.admin.recv() => match command {
                    Some(AdminCommand { command: Command::Stop, reply }) => {
                        reply.send(Ok(Response::Done));
                        break End::Command;
                    }
                    Some(command) => self.handles.handle(&self.config, &self.tracker, command),
                    None => break End::Internal("the admin server has ended".to_owned()),
                },
            }
        };
        let node_ended = matches!(end, End::Node(_));
        // `sidecar stop` and a launcher that has ended mean all of it.
        let keep = self.config.keep_engines && matches!(end, End::Outside(Why::Signal(_)));
        let graceful = matches!(end, End::Outside(_) | End::Command);
        let mut end = run_end(end);
        if keep {
            end.keeps_engines = true;
            end.reason =
                format!("{}; requests in flight may finish for {:?}", end.reason, self.config.orphan_grace);
        }
        if graceful {
            info!(reason = %end.reason, "stopping");
        } else {
            error!(reason = %end.reason, "unrecoverable error, stopping");
        }
        self.stopping.send_replace(true);
        let hurry = CancellationToken::new();
        // Status is told until the end; for anything else it is too late.
        let (_, nobody) = mpsc::channel(1);
        let mut admin = std::mem::replace(&mut self.admin, nobody);
        let (sources, config) = (self.handles.sources.clone(), self.config.clone());
        let stages = {
            let hurry = hurry.clone();
            async move {
                if keep {
                    self.leave(&hurry).await;
                } else {
                    self.stop_all(graceful, node_ended, hurry).await;
                }
            }
        };
        tokio::pin!(stages);
        let mut forced = None;
        let mut late_answers = JoinSet::new();
        loop {
            tokio::select! {
                () = &mut stages => break,
                Some(AdminCommand { command, reply }) = admin.recv() => match command {
                    Command::Status => {
                        let (sources, config) = (sources.clone(), config.clone());
                        late_answers.spawn(async move {
                            let status = sources.status(&config, true).await;
                            reply.send(Ok(Response::Status(Box::new(status))));
                        });
                    }
                    Command::Stop => reply.send(Ok(Response::Done)),
                    // A dropped reply is answered as "the sidecar is stopping".
                    _ => {}
                },
                Some(answered) = late_answers.join_next() => {
                    if let Err(error) = answered {
                        error!(%error, "status");
                    }
                }
                Ok(()) = outside.changed() => {
                    let asked = *outside.borrow();
                    if asked.times > 1 || !graceful {
                        warn!("second signal: skipping all waits");
                        forced = asked.why;
                        hurry.cancel();
                    }
                }
            }
        }
        match forced {
            Some(Why::Signal(number)) => {
                let number = u8::try_from(number).unwrap_or(15);
                let reason = format!("{}; then asked again", end.reason);
                RunEnd { keeps_engines: end.keeps_engines, ..RunEnd::new(exit_code::signal(number), reason) }
            }
            _ => end,
        }
    }

    /// Stops everything in the order in which it depends on each other. `hurry` skips every wait for
    /// requests and processes: what is left is killed.
    async fn stop_all(mut self, graceful: bool, node_ended: bool, hurry: CancellationToken) {
        // Before the frontend is told: on SIGTERM it ends its requests at once, because a frontend
        // without engines of its own has nothing to drain (`launcher.py`, 0.32.0).
        if graceful {
            tokio::select! {
                () = self.drain("aborting requests: the shutdown timeout is over") => {}
                () = hurry.cancelled() => {}
            }
        }
        self.stop_frontend.cancel();
        let processes = self.config.shutdown_timeout + self.config.kill_grace + TASK_END;
        if let Some(frontend) = self.frontend.take() {
            join("frontend", processes, frontend, &hurry).await;
        }
        let attachments = &self.handles.attachments.commands;
        let shutdown = |reply| AttachmentCommand::Shutdown { reply };
        gone(ask(attachments, "attachment", "shutdown".into(), TASK_END, shutdown).await);
        if !node_ended && self.node_commands.send(NodeCommand::Stop).await.is_ok() {
            join("node", processes, self.node, &hurry).await;
        }
        if let Some(nodes) = &self.nodes {
            nodes.shutdown().await;
        }
        // The relay process ends with the keeper, after the engines, and is not to be started again.
        self.relay.retire.cancel();
        let grace = if hurry.is_cancelled() { Duration::ZERO } else { self.config.kill_grace };
        stop_keeper(&self.keeper, grace).await;
        // The engines have ended with us: the next start begins with the command line's checkpoint.
        match timeout(TASK_END, self.handles.updates.shutdown(true)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "shutdown"),
            Err(_) => error!("the update task did not end in time"),
        }
        let coordinator = &self.handles.coordinator.commands;
        let shutdown = |reply| CoordinatorCommand::Shutdown { reply };
        gone(ask(coordinator, "coordinator", "shutdown".into(), TASK_END, shutdown).await);
        self.stop.cancel();
        drop((self.handles, self.admin, self.keeper, self.relay, self.node_commands, self.nodes));
        self.tracker.close();
        // The watcher of signals is in there, too: it ends when its last receiver is dropped.
        if timeout(TASK_END, until_few(&self.tracker, 1)).await.is_err() {
            error!(tasks = self.tracker.len() - 1, "tasks did not end in time");
        }
        transport::linger().await;
    }

    /// Ends this process and nothing else. Requests that run may end first, because clients that come back find
    /// a quiet moment; those that take longer go on without us.
    async fn leave(self, hurry: &CancellationToken) {
        let until = Instant::now() + self.config.shutdown_timeout;
        let quiet = async {
            // An update opens the gates at its end; one that takes too long is finished by the successor.
            let mut updates = self.handles.updates.watch();
            let ended = updates.wait_for(|status| status.running.is_none());
            if tokio::time::timeout_at(until, ended).await.is_err() {
                warn!("an update is running: the next sidecar will finish it or roll it back");
            }
            self.drain("requests are running: they continue without the sidecar").await;
        };
        tokio::select! {
            () = quiet => {}
            () = hurry.cancelled() => {}
        }
        // What engines hold is still true for the next sidecar.
        match timeout(TASK_END, self.handles.updates.shutdown(false)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "shutdown"),
            Err(_) => error!("the update task did not end in time"),
        }
        // From here on it is as if the process was killed: no task may see another one end and tell frontends,
        // engines or the keeper of it. The runtime takes them all down at once.
        std::mem::forget(self);
    }

    /// Lets requests in flight finish, at most for the shutdown timeout. New ones are held from now
    /// on.
    async fn drain(&self, too_late: &str) {
        let until = Instant::now() + self.config.shutdown_timeout;
        gone(drain::gates(&self.handles.ranks, false).await);
        let sources = &self.handles.sources;
        drain::settle().await;
        if sources.in_flight() > 0 && !self.config.shutdown_timeout.is_zero() {
            let limit = self.config.shutdown_timeout;
            info!(in_flight = sources.in_flight(), ?limit, "waiting for requests in flight");
        }
        while sources.in_flight() > 0 && Instant::now() < until {
            sources.changed(until).await;
        }
        if sources.in_flight() > 0 {
            warn!(in_flight = sources.in_flight(), "{too_late}");
        }
    }
}

/// Waits until no more than `few` tasks are left.
async fn until_few(tracker: &TaskTracker, few: usize) {
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    while tracker.len() > few {
        tick.tick().await;
    }
}

fn ended_by(why: Why) -> RunEnd {
    let code = match why {
        Why::Signal(_) => exit_code::OK,
        Why::Lifeline => exit_code::PEER_OR_LIFELINE,
    };
    RunEnd::new(code, why.to_string())
}

fn run_end(end: End) -> RunEnd {
    match end {
        End::Outside(why) => ended_by(why),
        End::Command => RunEnd::new(exit_code::OK, "stop command"),
        End::Node(NodeExit::Stopped) | End::Frontend(FrontendExit::Stopped) => {
            RunEnd::new(exit_code::INTERNAL, "a task ended unexpectedly")
        }
        End::Node(NodeExit::Failed { reason, timeout }) => {
            let code = if timeout { exit_code::TIMEOUT } else { exit_code::ENGINE_FAILED };
            RunEnd::new(code, reason)
        }
        End::Frontend(FrontendExit::Failed { reason }) => RunEnd::new(exit_code::ENGINE_FAILED, reason),
        End::Internal(reason) => RunEnd::new(exit_code::INTERNAL, reason),
    }
}

async fn asked(outside: &mut watch::Receiver<Asked>) -> Why {
    loop {
        if let Some(why) = outside.borrow_and_update().why {
            return why;
        }
        if outside.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

fn gone(ended: Result<(), HandleError>) {
    if let Err(error) = ended {
        debug!(%error, "shutdown");
    }
}

async fn join<T>(what: &str, limit: Duration, mut task: JoinHandle<T>, hurry: &CancellationToken) {
    tokio::select! {
        ended = timeout(limit, &mut task) => match ended {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => error!(what, %error, "task failed"),
            Err(_) => error!(what, ?limit, "did not end in time; the keeper kills what is left"),
        },
        () = hurry.cancelled() => {}
    }
    task.abort();
}

async fn ended<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match task {
        Some(handle) => {
            let result = handle.await;
            *task = None;
            result
        }
        None => std::future::pending().await,
    }
}
