//! What the leader does for its clients.

use std::sync::Arc;
use std::time::Duration;

use super::drain::{DrainError, Drained};
use super::runtime::Answers;
use super::status::Sources;
use super::updates;
use crate::api::{AdminError, Command, ErrorKind, Reply, Response, Status};
use crate::config::Config;
use crate::driver::control::{ControlError, ControlHandle};
use crate::driver::handles::{
    AttachmentCommand, AttachmentHandle, CoordinatorHandle, HandleError, Origin, RankHandle, ask,
};
use crate::driver::weight_update::UpdateHandle;

/// Limit for answers of our own tasks.
const LOCAL_ANSWER: Duration = Duration::from_secs(10);
/// How long pause and resume wait for another controller before they are refused.
const PATIENCE: Duration = Duration::from_secs(5);

/// Handles of all tasks that commands need.
#[derive(Clone, Debug)]
pub(crate) struct Handles {
    pub(super) config: Arc<Config>,
    pub(crate) ranks: Vec<RankHandle>,
    pub(crate) coordinator: CoordinatorHandle,
    pub(crate) attachments: AttachmentHandle,
    pub(crate) control: ControlHandle,
    pub(crate) updates: UpdateHandle,
    pub(super) drained: Drained,
    pub(super) sources: Sources,
}

impl Answers for Handles {
    async fn status(&self, stopping: bool) -> Status {
        self.sources.status(&self.config, stopping).await
    }

    async fn perform(&self, command: Command, reply: &Reply) -> Result<Response, AdminError> {
        match command {
            Command::Version => return Ok(Response::Version(self.sources.versions().await)),
            Command::FrontendList => return Ok(Response::Frontends(self.sources.frontends())),
            Command::Update(request) => return updates::run(&self.updates, request, reply).await,
            Command::UpdateFollow { id } => return updates::follow(&self.updates, id, reply).await,
            Command::UpdateHistory { limit } => return updates::history(&self.updates, limit).await,
            Command::UpdateAbort => updates::abort(&self.updates).await?,
            Command::Pause { mode, deadline_ms } => {
                let deadline = deadline_ms.map_or(self.config.pause_deadline, Duration::from_millis);
                self.control.pause(mode, deadline, PATIENCE).await.map_err(control_error)?;
            }
            Command::Drain => {
                self.drained.begin(&self.control, &self.ranks, PATIENCE).await.map_err(drain_error)?;
            }
            Command::Resume => {
                if !self.drained.end(&self.ranks).await.map_err(drain_error)? {
                    self.control.resume(PATIENCE).await.map_err(control_error)?;
                }
            }
            Command::FrontendAdd { address } => {
                let what = format!("attachment to {address}");
                let origin = Origin::Command;
                self.attachment(what, |reply| AttachmentCommand::Add { address, origin, reply }).await?;
            }
            Command::FrontendRemove { address } => {
                let what = format!("detachment from {address}");
                self.attachment(what, |reply| AttachmentCommand::Remove { address, reply }).await?;
            }
            // Answered by the runtime.
            Command::Status | Command::Stop => {}
        }
        Ok(Response::Done)
    }
}

impl Handles {
    async fn attachment(
        &self,
        what: String,
        command: impl FnOnce(crate::driver::handles::Reply<()>) -> AttachmentCommand,
    ) -> Result<(), AdminError> {
        let commands = &self.attachments.commands;
        let done = ask(commands, "attachment", what, LOCAL_ANSWER, command).await;
        done.map_err(|error| match error {
            HandleError::Gone { .. } => unavailable(),
            HandleError::Deadline { .. } => AdminError::new(ErrorKind::Timeout, error.to_string()),
            HandleError::Failed(text) => AdminError::new(ErrorKind::Failed, &*text),
        })
    }
}

fn unavailable() -> AdminError {
    AdminError::new(ErrorKind::Unavailable, "the sidecar is stopping")
}

fn drain_error(error: DrainError) -> AdminError {
    match error {
        DrainError::Control(error) => control_error(error),
        DrainError::Ranks(error) => AdminError::new(ErrorKind::Failed, error.to_string()),
    }
}

fn control_error(error: ControlError) -> AdminError {
    let kind = match &error {
        ControlError::Busy { .. } => ErrorKind::Busy,
        ControlError::Incomplete { .. } => ErrorKind::Unavailable,
        ControlError::Ranks { .. } => ErrorKind::Failed,
        ControlError::Gone => return unavailable(),
    };
    AdminError::new(kind, error.to_string())
}
