//! Client side of the admin socket, for the subcommands.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use tokio_util::codec::{FramedRead, LinesCodec};

use super::server::HEARTBEAT;
use crate::api::{AdminError, Command, Request, Response, Status, UpdateProgress, UpdateReport};
use crate::state_dir::StateDir;

/// Longest answer line in bytes: the status of a large deployment.
const ANSWER_LIMIT: usize = 8 * 1024 * 1024;
/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How much longer an answer may take than the sidecar takes for it.
const MARGIN: Duration = Duration::from_secs(5);
/// Between two lines of an update; the sidecar repeats the last one every [`HEARTBEAT`].
const SILENCE_LIMIT: Duration = HEARTBEAT.saturating_mul(6);

/// A command could not be given, or was refused.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No process listens on the socket.
    #[error("no sidecar answers at {}: {error}", path.display())]
    NotRunning { path: PathBuf, error: std::io::Error },
    /// The connection broke.
    #[error("sidecar: {0}")]
    Broken(String),
    /// No answer in time.
    #[error("sidecar: no answer within {0:?}")]
    Deadline(Duration),
    /// The sidecar refused, or failed.
    #[error(transparent)]
    Refused(#[from] AdminError),
}

/// A connection to a running sidecar.
#[derive(Debug)]
pub struct AdminClient {
    answers: FramedRead<OwnedReadHalf, LinesCodec>,
    requests: OwnedWriteHalf,
}

impl AdminClient {
    /// Connects to the sidecar of a state directory.
    pub async fn connect(state_dir: &Path) -> Result<Self, ClientError> {
        let path = StateDir::admin_socket(state_dir);
        let connected = timeout(CONNECT_LIMIT, UnixStream::connect(&path)).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(ClientError::NotRunning { path, error }),
            Err(_) => return Err(ClientError::Deadline(CONNECT_LIMIT)),
        };
        let (read, requests) = stream.into_split();
        let codec = LinesCodec::new_with_max_length(ANSWER_LIMIT);
        Ok(Self { answers: FramedRead::new(read, codec), requests })
    }

    /// Gives a command and waits for its answer.
    pub async fn call(&mut self, command: Command) -> Result<Response, ClientError> {
        let limit = command.limit() + MARGIN;
        self.send(command).await?;
        self.receive(limit).await
    }

    pub async fn status(&mut self) -> Result<Status, ClientError> {
        match self.call(Command::Status).await? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// Starts an update ([`Command::Update`]) or follows one, tells each step, and returns its report.
    pub async fn update(
        &mut self,
        command: Command,
        mut on_progress: impl FnMut(UpdateProgress),
    ) -> Result<UpdateReport, ClientError> {
        self.send(command).await?;
        loop {
            match self.receive(SILENCE_LIMIT).await? {
                Response::Progress(step) => on_progress(step),
                Response::Update(report) => return Ok(report),
                other => return Err(unexpected(&other)),
            }
        }
    }

    async fn send(&mut self, command: Command) -> Result<(), ClientError> {
        let broken = |error: String| ClientError::Broken(format!("request: {error}"));
        let mut line =
            serde_json::to_vec(&Request::new(command)).map_err(|error| broken(error.to_string()))?;
        line.push(b'\n');
        match timeout(CONNECT_LIMIT, self.requests.write_all(&line)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(broken(error.to_string())),
            Err(_) => Err(ClientError::Deadline(CONNECT_LIMIT)),
        }
    }

    async fn receive(&mut self, limit: Duration) -> Result<Response, ClientError> {
        let line = match timeout(limit, self.answers.next()).await {
            Ok(Some(Ok(line))) => line,
            Ok(Some(Err(error))) => return Err(ClientError::Broken(format!("answer: {error}"))),
            Ok(None) => {
                let text = "the sidecar closed the connection before it answered";
                return Err(ClientError::Broken(text.to_owned()));
            }
            Err(_) => return Err(ClientError::Deadline(limit)),
        };
        match serde_json::from_str(&line) {
            Ok(Response::Error(error)) => Err(ClientError::Refused(error)),
            Ok(response) => Ok(response),
            Err(error) => Err(ClientError::Broken(format!("answer: {error}"))),
        }
    }
}

/// An answer of the wrong type.
pub fn unexpected(response: &Response) -> ClientError {
    ClientError::Broken(format!("unexpected answer {response:?}"))
}
