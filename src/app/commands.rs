//! Answers the admin socket: each command in a task of its own, so that none waits for another.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::answer;
use super::drain::{DrainError, Drained};
use super::status::Sources;
use super::updates;
use crate::admin::server::AdminCommand;
use crate::admin::types::{AdminError, ErrorKind};
use crate::config::Config;
use crate::driver::control::{ControlError, ControlHandle};
use crate::driver::handles::{
    AttachmentCommand, AttachmentHandle, CoordinatorHandle, HandleError, Origin, RankHandle, ask,
};
use crate::driver::weight_update::UpdateHandle;
use crate::tasks::{Task, named};

/// Limit for answers of our own tasks.
const LOCAL_ANSWER: Duration = Duration::from_secs(10);
/// How long pause and resume wait for another controller before they are refused.
const PATIENCE: Duration = Duration::from_secs(5);

/// Handles of all tasks that commands need.
#[derive(Clone, Debug)]
pub(crate) struct Handles {
    pub(crate) ranks: Vec<RankHandle>,
    pub(crate) coordinator: CoordinatorHandle,
    pub(crate) attachments: AttachmentHandle,
    pub(crate) control: ControlHandle,
    pub(crate) updates: UpdateHandle,
    pub(super) drained: Drained,
    pub(super) sources: Sources,
    pub(crate) stopping: watch::Receiver<bool>,
}

impl Handles {
    /// Answers one command, in the background where it takes time.
    pub(super) fn handle(&self, config: &Arc<Config>, tracker: &TaskTracker, command: AdminCommand) {
        let this = self.clone();
        let config = config.clone();
        tracker.spawn(named(Task::AdminCommand, async move { this.perform(&config, command).await }));
    }

    async fn perform(self, config: &Config, command: AdminCommand) {
        match command {
            AdminCommand::Status { reply } => {
                let stopping = *self.stopping.borrow();
                let status = self.sources.status(config, stopping).await;
                answer(reply, Ok(Box::new(status)));
            }
            AdminCommand::Version { reply } => answer(reply, Ok(self.sources.versions())),
            AdminCommand::FrontendList { reply } => answer(reply, Ok(self.sources.frontends())),
            AdminCommand::Pause { mode, deadline, reply } => {
                let deadline = deadline.unwrap_or(config.pause_deadline);
                let paused = self.control.pause(mode, deadline, PATIENCE).await;
                answer(reply, paused.map_err(control_error));
            }
            AdminCommand::Drain { reply } => {
                let begun = self.drained.begin(&self.control, &self.ranks, PATIENCE).await;
                answer(reply, begun.map_err(drain_error));
            }
            AdminCommand::Resume { reply } => {
                let resumed = match self.drained.end(&self.ranks).await {
                    Ok(true) => Ok(()),
                    Ok(false) => self.control.resume(PATIENCE).await.map_err(control_error),
                    Err(error) => Err(drain_error(error)),
                };
                answer(reply, resumed);
            }
            AdminCommand::FrontendAdd { address, reply } => {
                let what = format!("attachment to {address}");
                let added = self.attachment(what, |reply| AttachmentCommand::Add {
                    address,
                    origin: Origin::Command,
                    reply,
                });
                answer(reply, added.await);
            }
            AdminCommand::FrontendRemove { address, reply } => {
                let what = format!("detachment from {address}");
                let removed = self.attachment(what, |reply| AttachmentCommand::Remove { address, reply });
                answer(reply, removed.await);
            }
            AdminCommand::Update { request, progress, reply } => {
                let report = updates::run(&self.updates, config, request, progress).await;
                answer(reply, report);
            }
            AdminCommand::UpdateFollow { id, progress, reply } => {
                answer(reply, updates::attach(&self.updates, id, progress).await);
            }
            AdminCommand::UpdateAbort { reply } => answer(reply, updates::abort(&self.updates).await),
            AdminCommand::UpdateHistory { limit, reply } => {
                answer(reply, updates::history(&self.updates, limit).await);
            }
            // Taken by the run loop.
            AdminCommand::Stop { reply } => answer(reply, Ok(())),
        }
    }

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
