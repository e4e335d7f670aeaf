//! A node from the moment all its tasks run until the last of them has ended. What differs between the leader and a
//! follower is their [`Role`].

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::Run;
use super::drain;
use crate::api::{AdminCommand, AdminError, Command, Reply, Response, Status};
use crate::driver::handles::RankHandle;
use crate::exit_code::{self, RunEnd};
use crate::relay::host::Relay;
use crate::shutdown::{Asked, Why};
use crate::supervisor::client::KeeperClient;
use crate::tasks::{Task, named};
use crate::transport;

/// Limit for one of our own tasks to end.
pub(super) const TASK_END: Duration = Duration::from_secs(5);

/// What a node does besides what all nodes do.
pub(super) trait Role {
    type Answers: Answers;

    /// Waits for what ends the run from within. Cancel safe.
    async fn ended(&mut self) -> RunEnd;

    /// This process ends, and what runs goes on without it.
    async fn leave(&mut self, _hurry: &CancellationToken) {}

    /// Requests are about to be drained, because of `reason`.
    async fn announce(&self, _reason: &str) {}

    /// Ends what depends on the engines, and the engines.
    async fn stop_engines(&mut self, _hurry: &CancellationToken) {}

    /// The keeper has ended with all that it had; so does the role.
    async fn finish(self);
}

/// Answers clients, each in a task of its own, so that none waits for another.
pub(super) trait Answers: Clone + Send + Sync + 'static {
    /// What `sidecar status` shows, also while everything is being stopped.
    fn status(&self, stopping: bool) -> impl Future<Output = Status> + Send;

    /// Any command but status and stop.
    fn perform(
        &self,
        command: Command,
        reply: &Reply,
    ) -> impl Future<Output = Result<Response, AdminError>> + Send;
}

async fn answer(answers: impl Answers, AdminCommand { command, reply }: AdminCommand, stopping: bool) {
    let answer = match command {
        Command::Status => Ok(Response::Status(Box::new(answers.status(stopping).await))),
        command => answers.perform(command, &reply).await,
    };
    reply.send(answer);
}

/// The tasks of a node, and what can end them.
pub(super) struct Runtime<R: Role> {
    pub(super) run: Run,
    /// Ranks that are drained with this node.
    pub(super) ranks: Vec<RankHandle>,
    pub(super) keeper: KeeperClient,
    pub(super) relay: Relay,
    pub(super) answers: R::Answers,
    pub(super) role: R,
}

impl<R: Role> Runtime<R> {
    /// Serves clients until something ends the run, then stops everything.
    pub(super) async fn run(
        mut self,
        mut admin: mpsc::Receiver<AdminCommand>,
        mut outside: watch::Receiver<Asked>,
    ) -> RunEnd {
        let mut keep = false;
        let (mut end, drain) = loop {
            tokio::select! {
                biased;
                why = asked(&mut outside) => {
                    // `sidecar stop` and a launcher that has ended mean all of it.
                    keep = self.run.config.keep_engines && matches!(why, Why::Signal(_));
                    break (ended_by(why), true);
                }
                Some(error) = self.relay.failed.recv() => {
                    break (RunEnd::new(exit_code::INTERNAL, error.to_string()), false);
                }
                end = self.role.ended() => break (end, false),
                command = admin.recv() => match command {
                    Some(AdminCommand { command: Command::Stop, reply }) => {
                        reply.send(Ok(Response::Done));
                        break (RunEnd::new(exit_code::OK, "stop command"), true);
                    }
                    Some(command) => {
                        let answered = answer(self.answers.clone(), command, false);
                        self.run.tracker.spawn(named(Task::AdminCommand, answered));
                    }
                    None => break (RunEnd::new(exit_code::INTERNAL, "the admin server has ended"), false),
                },
            }
        };
        if keep {
            end.keeps_engines = true;
            end.reason = format!(
                "{}; requests in flight may finish for {:?}",
                end.reason, self.run.config.orphan_grace
            );
        }
        if drain || end.code == exit_code::OK {
            info!(reason = %end.reason, "stopping");
        } else {
            error!(reason = %end.reason, "unrecoverable error, stopping");
        }
        let hurry = CancellationToken::new();
        // Status is told until the end; for anything else it is too late.
        let mut late_answers = JoinSet::new();
        let answers = self.answers.clone();
        let stages = self.end(keep, drain, end.reason.clone(), hurry.clone());
        tokio::pin!(stages);
        let mut forced = None;
        loop {
            tokio::select! {
                () = &mut stages => break,
                Some(asked) = admin.recv() => match asked.command {
                    Command::Status => {
                        late_answers.spawn(named(Task::AdminCommand, answer(answers.clone(), asked, true)));
                    }
                    Command::Stop => asked.reply.send(Ok(Response::Done)),
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
                    if asked.times > 1 || !drain {
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

    /// Ends the run, or this process alone. `hurry` skips every wait for requests and processes: what is left is
    /// killed.
    async fn end(mut self, keep: bool, drain: bool, reason: String, hurry: CancellationToken) {
        if keep {
            self.role.leave(&hurry).await;
            // From here on it is as if the process was killed: no task may see another one end and tell frontends,
            // engines or the keeper of it. The runtime takes them all down at once.
            std::mem::forget(self);
            return;
        }
        // Before anything is told to stop: on SIGTERM a frontend ends its requests at once, because a frontend
        // without engines of its own has nothing to drain (`launcher.py`, 0.32.0).
        if drain {
            self.role.announce(&reason).await;
            let limit = self.run.config.shutdown_timeout;
            tokio::select! {
                () = drain::finish_requests(&self.ranks, limit, "aborting requests: the shutdown timeout is over") => {}
                () = hurry.cancelled() => {}
            }
        }
        self.role.stop_engines(&hurry).await;
        // The relay process ends with the keeper, after the engines, and is not to be started again.
        self.relay.retire.cancel();
        let grace = if hurry.is_cancelled() { Duration::ZERO } else { self.run.config.kill_grace };
        stop_keeper(&self.keeper, grace).await;
        let Self { run, ranks, keeper, relay, answers, role } = self;
        role.finish().await;
        let Run { tracker, stop, .. } = run;
        stop.cancel();
        drop((ranks, keeper, relay, answers));
        tracker.close();
        // The watcher of signals is in there, too: it ends when its last receiver is dropped.
        if timeout(TASK_END, until_few(&tracker, 1)).await.is_err() {
            error!(tasks = tracker.len() - 1, "tasks did not end in time");
        }
        transport::linger().await;
    }
}

/// Ends the keeper and everything it has.
pub(super) async fn stop_keeper(keeper: &KeeperClient, grace: Duration) {
    if let Err(error) = keeper.shutdown(grace).await {
        error!(%error, "the keeper did not end");
    }
}

/// Waits until no more than `few` tasks are left.
async fn until_few(tracker: &TaskTracker, few: usize) {
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    while tracker.len() > few {
        tick.tick().await;
    }
}

pub(super) fn ended_by(why: Why) -> RunEnd {
    let code = match why {
        Why::Signal(_) => exit_code::OK,
        Why::Lifeline => exit_code::PEER_OR_LIFELINE,
    };
    RunEnd::new(code, why.to_string())
}

pub(super) async fn asked(outside: &mut watch::Receiver<Asked>) -> Why {
    let asked = outside.wait_for(|asked| asked.why.is_some()).await.map(|asked| asked.why);
    match asked {
        Ok(Some(why)) => why,
        _ => std::future::pending().await,
    }
}
