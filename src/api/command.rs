//! What can be asked of a running sidecar, and its answers: on the admin socket one JSON object per line in both
//! directions.
//!
//! A client sends one [`Request`]; the sidecar answers with one [`Response`], or, for an update, with any number of
//! [`Response::Progress`] and then one last answer.

use std::time::Duration;

use dp_sidecar_protocol::UpdateId;
use dp_sidecar_protocol::machine::weight_update::PauseMode;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    FrontendStatus, SleepReport, Status, UpdateProgress, UpdateReport, UpdateRequest, VersionReport,
};

/// Version of this protocol. The server refuses a request of another version.
pub const ADMIN_PROTOCOL: u32 = 2;

/// An answer that needs no engine.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// To pause or resume all engines, on top of the pause's own deadline.
const CONTROL_LIMIT: Duration = Duration::from_secs(180);
/// To move the weights of an engine to the host's memory, or back.
pub const SLEEP_LIMIT: Duration = Duration::from_secs(600);
/// Pause deadline assumed when the client leaves it to the sidecar.
const PAUSE_LIMIT: Duration = Duration::from_secs(3600);
/// The transaction of an update has limits of its own for each phase; this only keeps a connection from living for
/// ever.
const UPDATE_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// [`ADMIN_PROTOCOL`].
    pub version: u32,
    /// What it wants.
    pub command: Command,
}

impl Request {
    /// A request of the current protocol version.
    pub fn new(command: Command) -> Self {
        Self { version: ADMIN_PROTOCOL, command }
    }
}

/// What a client can ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Command {
    /// Everything there is to know, see [`Status`].
    Status,
    /// Pause all engines, until [`Command::Resume`]. With `wait`, what still runs after `deadline_ms` is aborted.
    Pause { mode: PauseMode, deadline_ms: Option<u64> },
    /// Resume all engines, also after [`Command::Drain`].
    Resume,
    /// Pause all engines and free memory of their devices, until [`Command::Wake`]. Level 1 keeps the weights in the
    /// host's memory, level 2 discards them.
    Sleep { level: u8, mode: PauseMode, deadline_ms: Option<u64> },
    /// Bring parts of the engines' memory back: `weights`, `kv_cache`; none: all that sleeps. Engines that are fully
    /// awake are resumed.
    Wake { tags: Vec<String> },
    /// Versions of the sidecar, the engines and the weights.
    Version,
    /// Attach to one more frontend, with this handshake address (`host:port`).
    FrontendAdd { address: String },
    /// Detach from a frontend and forget it; by its handshake address, as it was given.
    FrontendRemove { address: String },
    /// All wanted frontends.
    FrontendList,
    /// New weights for all engines.
    Update(UpdateRequest),
    /// Progress and report of the update that runs; without an id, whichever it is.
    UpdateFollow { id: Option<UpdateId> },
    /// End the running update without a commit.
    UpdateAbort,
    /// Records of the last updates, at most so many, newest last.
    UpdateHistory { limit: usize },
    /// Hold new requests in front of the engines until [`Command::Resume`]; those that run go on.
    Drain,
    /// Stop the sidecar and everything it started.
    Stop,
}

impl Command {
    /// How long the sidecar may take for its answer.
    pub fn limit(&self) -> Duration {
        match self {
            Self::Pause { deadline_ms, .. } => {
                deadline_ms.map_or(PAUSE_LIMIT, Duration::from_millis).saturating_add(CONTROL_LIMIT)
            }
            Self::Sleep { deadline_ms, .. } => {
                let pause = deadline_ms.map_or(PAUSE_LIMIT, Duration::from_millis);
                pause.saturating_add(CONTROL_LIMIT + SLEEP_LIMIT)
            }
            Self::Wake { .. } => CONTROL_LIMIT + SLEEP_LIMIT,
            Self::Resume | Self::Drain | Self::FrontendRemove { .. } => CONTROL_LIMIT,
            Self::Update(_) | Self::UpdateFollow { .. } => UPDATE_LIMIT,
            Self::Status
            | Self::Version
            | Self::FrontendAdd { .. }
            | Self::FrontendList
            | Self::UpdateAbort
            | Self::UpdateHistory { .. }
            | Self::Stop => ANSWER_LIMIT,
        }
    }
}

/// What kind of refusal or failure an [`Response::Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense.
    Invalid,
    /// Another controller holds the engines; the message names it.
    Busy,
    /// The sidecar is in no state to do it (engines starting, stopping).
    Unavailable,
    /// It was tried and failed.
    Failed,
    /// It took too long.
    Timeout,
}

/// A refusal or failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    pub kind: ErrorKind,
    /// Who, which stage, expected, actual.
    pub message: String,
}

impl AdminError {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Nobody is there any more to do it.
    pub fn stopping() -> Self {
        Self::new(ErrorKind::Unavailable, "the sidecar is stopping")
    }
}

/// What the sidecar answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "body", rename_all = "snake_case")]
pub enum Response {
    /// To [`Command::Status`].
    Status(Box<Status>),
    /// To [`Command::Version`].
    Version(VersionReport),
    /// To [`Command::FrontendList`].
    Frontends(Vec<FrontendStatus>),
    /// A running [`Command::Update`], or one that is followed.
    Progress(UpdateProgress),
    /// Final answer to [`Command::Update`] and [`Command::UpdateFollow`].
    Update(UpdateReport),
    /// To [`Command::UpdateHistory`].
    Updates(Vec<UpdateReport>),
    /// To [`Command::Sleep`] and [`Command::Wake`], also when some ranks failed.
    Sleep(SleepReport),
    Done,
    /// It is refused, or failed.
    Error(AdminError),
}

/// Answers that wait for a client. A client that does not read misses progress, never the last answer.
const ANSWERS: usize = 256;

/// A [`Command`] on its way to the task that answers it, by whichever door it came.
#[derive(Debug)]
pub struct AdminCommand {
    /// What is wanted.
    pub command: Command,
    /// Where the answer goes.
    pub reply: Reply,
}

impl AdminCommand {
    /// With the queue that the answer comes to. It closes without a last answer when the sidecar is stopping. Nothing
    /// that has begun ends because the queue is dropped.
    pub fn new(command: Command) -> (Self, mpsc::Receiver<Response>) {
        let (reply, answers) = mpsc::channel(ANSWERS);
        (Self { command, reply: Reply(reply) }, answers)
    }
}

/// Way back to whoever gave a command.
#[derive(Debug)]
pub struct Reply(mpsc::Sender<Response>);

impl Reply {
    /// A step of the update that was asked for.
    pub fn progress(&self, step: UpdateProgress) {
        // The last place is kept for the answer.
        if self.0.capacity() > 1 && self.0.try_send(Response::Progress(step)).is_err() {
            tracing::trace!("progress dropped");
        }
    }

    /// Whether nobody waits for the answer any more.
    #[cfg(any(test, feature = "test-support"))]
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// The last answer.
    pub fn send(self, answer: Result<Response, AdminError>) {
        if self.0.try_send(answer.unwrap_or_else(Response::Error)).is_err() {
            tracing::debug!("the client that asked has gone away");
        }
    }
}
