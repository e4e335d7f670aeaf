//! Server side of the admin socket: parses requests and hands them to the sidecar's tasks.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, interval_at, sleep_until, timeout, timeout_at};
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{
    ADMIN_PROTOCOL, AdminCommand, AdminError, Command, ErrorKind, Request, Response, UpdateProgress,
};
use crate::net;
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
/// How long answers may take when the sidecar ends.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// The last progress is repeated when nothing happened for this long, so that a client can tell a
/// long phase from a dead sidecar.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(5);
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
        let listener = UnixListener::from_std(net::bind(&path)?)?;
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
                (permit, net::accept_allowed(&self.listener).await)
            };
            tokio::select! {
                () = stop.cancelled() => break,
                (permit, stream) = next => {
                    let commands = commands.clone();
                    let stop = stop.clone();
                    tasks.spawn(named(Task::AdminConnection, async move {
                        Client::new(stream, commands).serve(&stop).await;
                        drop(permit);
                    }));
                }
            }
        }
        tasks.close();
        if timeout(ANSWER_LIMIT, tasks.wait()).await.is_err() {
            tracing::warn!("disconnecting admin clients that still wait for an answer");
        }
    }
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

    /// Answers a request; returns whether the client still listens. What was begun goes on when it is gone.
    async fn answer(&mut self, command: Command) -> bool {
        if let Err(error) = check(&command) {
            return self.send(&Response::Error(error)).await;
        }
        let limit = command.limit();
        let mut last = matches!(command, Command::Update(_) | Command::UpdateFollow { .. }).then(waiting);
        let until = Instant::now() + limit;
        let (command, mut answers) = AdminCommand::new(command);
        match timeout_at(until, self.commands.send(command)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return self.send(&Response::Error(AdminError::stopping())).await,
            Err(_) => return self.send(&Response::Error(late(limit))).await,
        }
        let mut heartbeat = interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        loop {
            // Nothing is sent inside a branch's future: a line is never cut in half.
            let answer = tokio::select! {
                biased;
                answer = answers.recv() => answer.unwrap_or_else(|| Response::Error(AdminError::stopping())),
                () = sleep_until(until) => Response::Error(late(limit)),
                _ = heartbeat.tick() => match &last {
                    Some(step) => Response::Progress(step.clone()),
                    None => continue,
                }
            };
            let goes_on = self.send(&answer).await;
            match answer {
                Response::Progress(step) if goes_on => {
                    heartbeat.reset();
                    last = Some(step);
                }
                _ => return goes_on,
            }
        }
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

fn late(limit: Duration) -> AdminError {
    AdminError::new(ErrorKind::Timeout, format!("no answer within {limit:?}"))
}

/// What a client hears of its update before the first step.
fn waiting() -> UpdateProgress {
    UpdateProgress {
        phase: "waiting".to_owned(),
        message: "waiting for the engines' control lock".to_owned(),
        done: 0,
        total: 0,
        event: None,
    }
}

fn check(command: &Command) -> Result<(), AdminError> {
    match command {
        Command::FrontendAdd { address } => crate::config::check_host_port(address).map_err(|problem| {
            AdminError::new(ErrorKind::Invalid, format!("frontend {address:?}: {problem}"))
        }),
        Command::Update(request) => {
            request.check().map_err(|problem| AdminError::new(ErrorKind::Invalid, problem))
        }
        Command::Sleep { level, .. } if !(1..=2).contains(level) => {
            let text = format!("there is no sleep of level {level}: 1 keeps the weights, 2 discards them");
            Err(AdminError::new(ErrorKind::Invalid, text))
        }
        Command::Wake { tags } => {
            match tags.iter().find(|tag| !matches!(tag.as_str(), "weights" | "kv_cache")) {
                Some(tag) => {
                    let text = format!("there is no tag {tag:?}: expected weights or kv_cache");
                    Err(AdminError::new(ErrorKind::Invalid, text))
                }
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
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
            "request: protocol version {}, expected {ADMIN_PROTOCOL}: this command and the running sidecar are of \
             different releases",
            versioned.version
        )));
    }
    let request: Request =
        serde_json::from_str(line).map_err(|error| invalid(format!("request: {error}")))?;
    Ok(request.command)
}
