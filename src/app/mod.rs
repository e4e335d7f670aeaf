//! Wires the tasks together, runs until something ends the run, and stops everything in order.
//! The only place that knows all tasks.

mod commands;
mod drain;
mod follower;
mod local;
mod nodes;
mod pauses;
mod runtime;
mod stage;
mod start;
mod status;
mod updates;
mod waiting;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, warn};

use self::runtime::{Runtime, TASK_END, asked, ended_by, stop_keeper};
use crate::admin::AdminServer;
use crate::api::{AdminCommand, Status};
use crate::config::{Config, Engines, Nodes};
use crate::driver::handles::{AttachmentCommand, CoordinatorCommand, HandleError, ask};
use crate::driver::node::NodeExit;
use crate::exit_code::{self, RunEnd};
use crate::peer::facts;
use crate::shutdown::{self, Asked};
use crate::state_dir::StateDir;
use crate::tasks::{Task, named};

/// Runs the sidecar until it is told to stop, or cannot go on.
pub async fn run(config: Config, state: StateDir) -> RunEnd {
    let run = Run {
        config: Arc::new(config),
        // With its lock, until nothing is left.
        state: Arc::new(state),
        tracker: TaskTracker::new(),
        stop: CancellationToken::new(),
        began: std::time::Instant::now(),
    };
    let outside = match shutdown::watch_outside(run.config.lifeline, &run.tracker) {
        Ok(outside) => outside,
        Err(error) => return local::internal("signal handlers", &error),
    };
    // The admin socket first: status answers while everything else starts.
    let server = match AdminServer::bind(run.state.path()) {
        Ok(server) => server,
        Err(error) => return local::internal("admin socket", &error),
    };
    let (commands, admin) = mpsc::channel(local::QUEUE);
    let weak = commands.downgrade();
    run.tracker.spawn(named(Task::Admin, server.serve(commands, run.stop.clone())));
    let state = run.state.clone();
    if let Err(error) = tokio::task::spawn_blocking(move || stage::free_lost(&state)).await {
        return local::internal("shared memory", &error);
    }
    let mut begun = Begun { run: run.clone(), admin, commands: weak, outside };
    let end = match run.config.follows().cloned() {
        Some(nodes) => {
            let started = begun.follow(nodes).await;
            begun.go_on(started).await
        }
        None => {
            let started = begun.lead().await;
            begun.go_on(started).await
        }
    };
    if !end.keeps_engines {
        // All engines have ended: nobody loads from them any more.
        stage::free(&run.state);
    }
    end
}

/// What every part of a run is started with.
#[derive(Clone, Debug)]
struct Run {
    config: Arc<Config>,
    state: Arc<StateDir>,
    /// Joins the tasks.
    tracker: TaskTracker,
    /// Ends the small tasks: admin server, GPU reader, distribution of keeper events.
    stop: CancellationToken,
    began: std::time::Instant,
}

impl Run {
    /// Notes the address of this node that other nodes reach: what all its engines' processes need to know, unless
    /// the user has said otherwise. vLLM asks for it in `get_ip` (`vllm/utils/network_utils.py`, 0.32.0).
    fn set_address(&mut self, address: IpAddr) {
        let config = Arc::make_mut(&mut self.config);
        if let Some(nodes) = &mut config.nodes {
            nodes.address = Some(address);
        }
        // Told to the engines of all nodes by the leader, on whose node rank 0 is.
        config.group_address = address;
        if let Engines::Spawn(launch) = &mut config.engines {
            launch.env.entry("VLLM_HOST_IP".to_owned()).or_insert_with(|| address.to_string());
        }
    }
}

/// A run that has its admin socket, and nothing else.
struct Begun {
    run: Run,
    admin: mpsc::Receiver<AdminCommand>,
    /// The way in for commands that come by other ways than the admin socket.
    commands: mpsc::WeakSender<AdminCommand>,
    outside: watch::Receiver<Asked>,
}

impl Begun {
    /// Runs until the end what was started.
    async fn go_on<R: runtime::Role>(self, started: Result<Runtime<R>, RunEnd>) -> RunEnd {
        match started {
            Ok(runtime) => runtime.run(self.admin, self.outside).await,
            Err(end) => {
                self.run.stop.cancel();
                end
            }
        }
    }

    /// Starts everything, on the node of rank 0.
    async fn lead(&mut self) -> Result<Runtime<Leading>, RunEnd> {
        let keeper = local::keeper(&self.run).await?;
        let nodes = match self.run.config.nodes.clone() {
            None => None,
            Some(nodes) => match self.gather(&nodes).await {
                Ok(gathered) => Some(gathered),
                Err(end) => {
                    stop_keeper(&keeper.client, self.run.config.kill_grace).await;
                    return Err(end);
                }
            },
        };
        let leader = nodes.as_ref().map(|(_, leader, _)| leader.clone());
        let started = tokio::select! {
            started = start::start(&self.run, keeper, nodes, self.commands.clone()) => started,
            why = asked(&mut self.outside) => Err(ended_by(why)),
        };
        if let (Err(end), Some(leader)) = (&started, leader) {
            leader.end(end.code, &format!("it cannot start: {}", end.reason)).await;
        }
        started
    }

    /// Waits for the other nodes.
    async fn gather(&mut self, nodes: &Nodes) -> Result<start::Joined, RunEnd> {
        let config = &self.run.config;
        let mut own = facts::hello(config, self.run.state.run_id()).await;
        own.epoch = nodes::lead(&self.run).await?;
        let listening = nodes::listen(&self.run, nodes, own.clone());
        let look = || waiting::status(&self.run, "looking for the address of --leader");
        let why_not = "the sidecar does not know its own address yet";
        let leader =
            waiting::serve_while(listening, &mut self.admin, &mut self.outside, look, why_not).await??;
        let look = || Status {
            nodes: nodes::status(&own, &leader, &[]),
            missing: Some(leader.missing()),
            ..waiting::status(&self.run, "waiting for nodes")
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
            self.run.set_address(address);
        }
        Ok((own, leader, found))
    }
}

/// The leader: its tasks decide for all nodes.
pub(crate) struct Leading {
    handles: commands::Handles,
    node: Option<JoinHandle<NodeExit>>,
    stop_node: CancellationToken,
    frontend: Option<JoinHandle<Result<(), String>>>,
    stop_frontend: CancellationToken,
}

impl runtime::Role for Leading {
    type Answers = commands::Handles;

    async fn ended(&mut self) -> RunEnd {
        let unasked = || RunEnd::new(exit_code::INTERNAL, "a task ended unexpectedly");
        tokio::select! {
            biased;
            exit = ended(&mut self.node) => match exit {
                Ok(NodeExit::Failed { reason, timeout }) => {
                    let code = if timeout { exit_code::TIMEOUT } else { exit_code::ENGINE_FAILED };
                    RunEnd::new(code, reason)
                }
                Ok(NodeExit::Stopped) => unasked(),
                Err(error) => local::internal("node task", &error),
            },
            exit = ended(&mut self.frontend) => match exit {
                Ok(Err(reason)) => RunEnd::new(exit_code::ENGINE_FAILED, reason),
                Ok(Ok(())) => unasked(),
                Err(error) => local::internal("frontend task", &error),
            },
        }
    }

    /// Requests that run may end first, because clients that come back find a quiet moment; those that take longer go
    /// on without us.
    async fn leave(&mut self, hurry: &CancellationToken) {
        let limit = self.handles.run.config.shutdown_timeout;
        let quiet = async {
            let until = Instant::now() + limit;
            // An update opens the gates at its end; one that takes too long is finished by the successor.
            let mut updates = self.handles.updates.snapshot.clone();
            let ended = updates.wait_for(|status| status.running.is_none());
            if tokio::time::timeout_at(until, ended).await.is_err() {
                warn!("an update is running: the next sidecar will finish it or roll it back");
            }
            let ranks = &self.handles.ranks;
            drain::finish_requests(ranks, limit, "requests are running: they continue without the sidecar")
                .await;
        };
        tokio::select! {
            () = quiet => {}
            () = hurry.cancelled() => {}
        }
        // What engines hold is still true for the next sidecar.
        self.end_updates(false).await;
    }

    async fn stop_engines(&mut self, hurry: &CancellationToken) {
        self.stop_frontend.cancel();
        let config = &self.handles.run.config;
        let processes = config.shutdown_timeout + config.kill_grace + TASK_END;
        if let Some(frontend) = self.frontend.take() {
            join("frontend", processes, frontend, hurry).await;
        }
        let attachments = &self.handles.attachments.commands;
        let shutdown = |reply| AttachmentCommand::Shutdown { reply };
        gone(ask(attachments, "attachment", "shutdown".into(), TASK_END, shutdown).await);
        self.stop_node.cancel();
        if let Some(node) = self.node.take() {
            join("node", processes, node, hurry).await;
        }
        if let Some(nodes) = &self.handles.nodes {
            nodes.shutdown().await;
        }
    }

    async fn finish(self) {
        self.end_updates(true).await;
        let coordinator = &self.handles.coordinator.commands;
        let shutdown = |reply| CoordinatorCommand::Shutdown { reply };
        gone(ask(coordinator, "coordinator", "shutdown".into(), TASK_END, shutdown).await);
    }
}

impl Leading {
    async fn end_updates(&self, engines_end: bool) {
        match timeout(TASK_END, self.handles.updates.shutdown(engines_end)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "shutdown"),
            Err(_) => error!("the update task did not end in time"),
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
