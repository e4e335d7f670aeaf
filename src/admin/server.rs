//! Server side of the admin socket: parses requests and hands them to the sidecar's tasks.

use tokio::sync::{mpsc, oneshot};

use super::types::{
    AdminError, FrontendStatus, PauseMode, Status, UpdateProgress, UpdateReport, UpdateRequest,
    VersionReport,
};

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
    /// See [`super::types::Command::Stop`].
    Stop {
        /// Accepted; the sidecar stops now.
        reply: AdminReply<()>,
    },
}

/// The listening admin socket.
#[derive(Debug)]
pub struct AdminServer {}
