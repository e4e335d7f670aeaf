//! Server side of the admin socket: parses requests and hands them to the sidecar's tasks.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dp_sidecar_protocol::machine::weight_update::PauseMode;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, interval_at, timeout};
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::types::{
    ADMIN_PROTOCOL, AdminError, Command, ErrorKind, FrontendStatus, Request, Response, Status,
    UpdateProgress, UpdateReport, UpdateRequest, VersionReport,
};
use crate::state_dir::StateDir;
use crate::tasks::{Task, named};

/// Clients at the same time; more wait.
const CLIENTS: usize = 32;
/// Longest request line in bytes.
const REQUEST_LIMIT: usize = 64 * 1024;
/// How long a connected client may say nothing.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// How long a client may take to read an answer.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// How long the sidecar may take for an answer that needs no engine.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to pause or resume all engines, on top of the pause's own deadline.
const CONTROL_LIMIT: Duration = Duration::from_secs(180);
/// Pause deadline assumed when the client leaves it to the sidecar.
const PAUSE_LIMIT: Duration = Duration::from_secs(3600);
/// How long an update may take. The transaction has limits of its own for each phase; this only
/// keeps a connection from living for ever.
const UPDATE_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// The last progress is repeated when nothing happened for this long, so that a client can tell a
/// long phase from a dead sidecar.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// Progress waiting for a client.
const PROGRESS: usize = 64;

/// Answer to an admin command.
pub type AdminReply<T> = oneshot::Sender<Result<T, AdminError>>;

/// A request of a client, for the task that answers it (`app.rs`). A dropped reply is answered as
/// "the sidecar is stopping".
#[derive(Debug)]
pub enum AdminCommand {
    /// See [`super::types::Command::Status`].
    Status {
        /// The answer.
        reply: AdminReply<Box<Status>>,
    },
    /// See [`super::types::Command::Pause`].
    Pause {
        /// How.
        mode: PauseMode,
        /// With `wait`: abort what still runs after this long.
        deadline: Option<std::time::Duration>,
        /// Paused.
        reply: AdminReply<()>,
    },
    /// See [`super::types::Command::Resume`].
    Resume {
        /// Resumed.
        reply: AdminReply<()>,
    },
    /// See [`super::types::Command::Version`].
    Version {
        /// The answer.
        reply: AdminReply<VersionReport>,
    },
    /// See [`super::types::Command::FrontendAdd`].
    FrontendAdd {
        /// `host:port`, checked.
        address: String,
        /// Done.
        reply: AdminReply<()>,
    },
    /// See [`super::types::Command::FrontendRemove`].
    FrontendRemove {
        /// `host:port`.
        address: String,
        /// Done.
        reply: AdminReply<()>,
    },
    /// See [`super::types::Command::FrontendList`].
    FrontendList {
        /// The answer.
        reply: AdminReply<Vec<FrontendStatus>>,
    },
    /// See [`super::types::Command::Update`]. The update goes on when the client goes away: both
    /// channels are closed then.
    Update {
        /// What to do.
        request: UpdateRequest,
        /// Progress. Use `try_send`: when the client does not read, progress is dropped.
        progress: mpsc::Sender<UpdateProgress>,
        /// Final word.
        reply: AdminReply<UpdateReport>,
    },
    /// See [`super::types::Command::UpdateFollow`].
    UpdateFollow {
        /// Which.
        id: Option<String>,
        /// Progress, as of [`Self::Update`].
        progress: mpsc::Sender<UpdateProgress>,
        /// Final word.
        reply: AdminReply<UpdateReport>,
    },
    /// See [`super::types::Command::UpdateAbort`].
    UpdateAbort {
        /// Told; what comes of it is in the update's report.
        reply: AdminReply<()>,
    },
    /// See [`super::types::Command::UpdateHistory`].
    UpdateHistory {
        /// At most so many.
        limit: usize,
        /// Newest last.
        reply: AdminReply<Vec<UpdateReport>>,
    },
    /// See [`super::types::Command::Drain`].
    Drain {
        /// New requests are held from now on.
        reply: AdminReply<()>,
    },
    /// See [`super::types::Command::Stop`].
    Stop {
        /// Accepted; the sidecar stops now.
        reply: AdminReply<()>,
    },
}

impl AdminCommand {
    /// Answers whatever it is with an error.
    pub fn refuse(self, error: AdminError) {
        fn say<T>(reply: AdminReply<T>, error: AdminError) {
            if reply.send(Err(error)).is_err() {
                tracing::debug!("the client that asked has gone away");
            }
        }
        match self {
            Self::Status { reply } => say(reply, error),
            Self::Version { reply } => say(reply, error),
            Self::FrontendList { reply } => say(reply, error),
            Self::Update { reply, .. } | Self::UpdateFollow { reply, .. } => say(reply, error),
            Self::UpdateHistory { reply, .. } => say(reply, error),
            Self::Pause { reply, .. }
            | Self::Resume { reply }
            | Self::Drain { reply }
            | Self::UpdateAbort { reply }
            | Self::FrontendAdd { reply, .. }
            | Self::FrontendRemove { reply, .. }
            | Self::Stop { reply } => say(reply, error),
        }
    }
}

/// The listening admin socket. Its file goes when it is dropped.
#[derive(Debug)]
pub struct AdminServer {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        // Still under the state directory's lock, so it is ours.
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "admin socket not removed");
        }
    }
}

impl AdminServer {
    /// Listens in the state directory, whose lock the caller holds: a socket that is there already
    /// is stale.
    pub fn bind(state_dir: &Path) -> io::Result<Self> {
        let path = StateDir::admin_socket(state_dir);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    /// Serves clients until `stop`; then lets running answers end, and ends.
    pub async fn serve(self, commands: mpsc::Sender<AdminCommand>, stop: CancellationToken) {
        let clients = Arc::new(Semaphore::new(CLIENTS));
        let tasks = TaskTracker::new();
        loop {
            let next = async {
                // Never closed, so this only waits.
                let permit = Arc::clone(&clients).acquire_owned().await.ok();
                (permit, self.listener.accept().await)
            };
            tokio::select! {
                () = stop.cancelled() => break,
                (permit, accepted) = next => match accepted {
                    Ok((stream, _)) if is_allowed(&stream) => {
                        let commands = commands.clone();
                        let stop = stop.clone();
                        tasks.spawn(named(Task::AdminConnection, async move {
                            Client::new(stream, commands).serve(&stop).await;
                            drop(permit);
                        }));
                    }
                    Ok(_) => tracing::warn!("refused an admin client of another user"),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept an admin client");
                        // Out of descriptors, most likely: do not spin.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }
        tasks.close();
        if timeout(ANSWER_LIMIT, tasks.wait()).await.is_err() {
            tracing::warn!("disconnecting admin clients that still wait for an answer");
        }
    }
}

fn is_allowed(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

struct Client {
    requests: FramedRead<OwnedReadHalf, LinesCodec>,
    answers: OwnedWriteHalf,
    commands: mpsc::Sender<AdminCommand>,
}

impl Client {
    fn new(stream: UnixStream, commands: mpsc::Sender<AdminCommand>) -> Self {
        let (read, answers) = stream.into_split();
        let codec = LinesCodec::new_with_max_length(REQUEST_LIMIT);
        Self { requests: FramedRead::new(read, codec), answers, commands }
    }

    async fn serve(mut self, stop: &CancellationToken) {
        use futures::StreamExt;
        loop {
            let line = tokio::select! {
                () = stop.cancelled() => return,
                line = timeout(IDLE_LIMIT, self.requests.next()) => line,
            };
            let goes_on = match line {
                Ok(Some(Ok(line))) => match parse(&line) {
                    Ok(command) => self.answer(command).await,
                    Err(error) => self.send(&Response::Error(error)).await,
                },
                Ok(Some(Err(error))) => {
                    let text = format!("request: {error}");
                    let error = AdminError::new(ErrorKind::Invalid, text);
                    // What follows an overlong line is no request.
                    self.send(&Response::Error(error)).await;
                    return;
                }
                Ok(None) | Err(_) => return,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Answers a request; returns whether the client still listens.
    async fn answer(&mut self, command: Command) -> bool {
        let response = match command {
            Command::Status => {
                self.ask(ANSWER_LIMIT, |reply| AdminCommand::Status { reply }).await.map(Response::Status)
            }
            Command::Version => {
                self.ask(ANSWER_LIMIT, |reply| AdminCommand::Version { reply }).await.map(Response::Version)
            }
            Command::FrontendList => self
                .ask(ANSWER_LIMIT, |reply| AdminCommand::FrontendList { reply })
                .await
                .map(Response::Frontends),
            Command::FrontendAdd { address } => match check_address(&address) {
                Ok(()) => self
                    .ask(ANSWER_LIMIT, |reply| AdminCommand::FrontendAdd { address, reply })
                    .await
                    .map(|()| Response::Done),
                Err(error) => Err(error),
            },
            Command::FrontendRemove { address } => self
                .ask(CONTROL_LIMIT, |reply| AdminCommand::FrontendRemove { address, reply })
                .await
                .map(|()| Response::Done),
            Command::Pause { mode, deadline_ms } => {
                let deadline = deadline_ms.map(Duration::from_millis);
                let limit = deadline.unwrap_or(PAUSE_LIMIT).saturating_add(CONTROL_LIMIT);
                self.ask(limit, |reply| AdminCommand::Pause { mode, deadline, reply })
                    .await
                    .map(|()| Response::Done)
            }
            Command::Resume => {
                self.ask(CONTROL_LIMIT, |reply| AdminCommand::Resume { reply }).await.map(|()| Response::Done)
            }
            Command::Drain => {
                self.ask(CONTROL_LIMIT, |reply| AdminCommand::Drain { reply }).await.map(|()| Response::Done)
            }
            Command::Stop => {
                self.ask(ANSWER_LIMIT, |reply| AdminCommand::Stop { reply }).await.map(|()| Response::Done)
            }
            Command::UpdateAbort => self
                .ask(ANSWER_LIMIT, |reply| AdminCommand::UpdateAbort { reply })
                .await
                .map(|()| Response::Done),
            Command::UpdateHistory { limit } => self
                .ask(ANSWER_LIMIT, |reply| AdminCommand::UpdateHistory { limit, reply })
                .await
                .map(Response::Updates),
            Command::Update(request) => {
                return self
                    .update(|progress, reply| AdminCommand::Update { request, progress, reply })
                    .await;
            }
            Command::UpdateFollow { id } => {
                return self
                    .update(|progress, reply| AdminCommand::UpdateFollow { id, progress, reply })
                    .await;
            }
        };
        self.send(&response.unwrap_or_else(Response::Error)).await
    }

    async fn ask<T>(
        &self,
        limit: Duration,
        command: impl FnOnce(AdminReply<T>) -> AdminCommand,
    ) -> Result<T, AdminError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.commands.send(command(reply)).await.map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?
        };
        timeout(limit, exchange).await.unwrap_or_else(|_| {
            let text = format!("no answer within {limit:?}");
            Err(AdminError::new(ErrorKind::Timeout, text))
        })
    }

    /// Starts or follows an update and passes its progress on. The update goes on when the client is gone.
    async fn update(
        &mut self,
        command: impl FnOnce(mpsc::Sender<UpdateProgress>, AdminReply<UpdateReport>) -> AdminCommand,
    ) -> bool {
        let (progress, mut steps) = mpsc::channel(PROGRESS);
        let commands = self.commands.clone();
        let (reply, answer) = oneshot::channel();
        let command = command(progress, reply);
        let report = async move {
            commands.send(command).await.map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?
        };
        let limited = async {
            timeout(UPDATE_LIMIT, report).await.unwrap_or_else(|_| {
                let text = format!("update: did not end within {UPDATE_LIMIT:?}");
                Err(AdminError::new(ErrorKind::Timeout, text))
            })
        };
        tokio::pin!(limited);
        let mut heartbeat = interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        let mut last = UpdateProgress {
            phase: "waiting".to_owned(),
            message: "waiting for the engines' control lock".to_owned(),
            done: 0,
            total: 0,
            event: None,
        };
        let mut open = true;
        // Nothing is sent inside a branch's future: a line is never cut in half. Steps come first,
        // so that none is told after the report.
        let result = loop {
            tokio::select! {
                biased;
                step = steps.recv(), if open => match step {
                    Some(step) => {
                        last = step;
                        heartbeat.reset();
                    }
                    None => {
                        open = false;
                        continue;
                    }
                },
                result = &mut limited => break result,
                _ = heartbeat.tick() => {}
            }
            if !self.send(&Response::Progress(last.clone())).await {
                return false;
            }
        };
        let response = result.map_or_else(Response::Error, Response::Update);
        self.send(&response).await
    }

    /// Returns whether the client took it.
    async fn send(&mut self, response: &Response) -> bool {
        let mut line = match serde_json::to_vec(response) {
            Ok(line) => line,
            Err(error) => {
                tracing::error!(%error, "admin answer cannot be written as JSON");
                return false;
            }
        };
        line.push(b'\n');
        matches!(timeout(WRITE_LIMIT, self.answers.write_all(&line)).await, Ok(Ok(())))
    }
}

fn stopping() -> AdminError {
    AdminError::new(ErrorKind::Unavailable, "the sidecar is stopping")
}

fn check_address(address: &str) -> Result<(), AdminError> {
    crate::config::check_host_port(address)
        .map_err(|problem| AdminError::new(ErrorKind::Invalid, format!("frontend {address:?}: {problem}")))
}

fn parse(line: &str) -> Result<Command, AdminError> {
    let invalid = |text: String| AdminError::new(ErrorKind::Invalid, text);
    // The version first: a request of another version may not be readable at all.
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let versioned: Versioned =
        serde_json::from_str(line).map_err(|error| invalid(format!("request: {error}")))?;
    if versioned.version != ADMIN_PROTOCOL {
        return Err(invalid(format!(
            "request: protocol version {}, expected {ADMIN_PROTOCOL}: the command is of another \
             sidecar version than the running one",
            versioned.version
        )));
    }
    let request: Request =
        serde_json::from_str(line).map_err(|error| invalid(format!("request: {error}")))?;
    Ok(request.command)
}
