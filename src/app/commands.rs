//! What the leader does for its clients.

use std::collections::BTreeMap;
use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::machine::memory::Weights;
use tokio::sync::watch;

use super::Run;
use super::drain::Drained;
use super::nodes::Gathered;
use super::runtime::Answers;
use super::{status, updates};
use crate::api::{AdminError, Command, EngineMemory, ErrorKind, Reply, Response, SleepReport, Status};
use crate::driver::control::{ControlError, ControlHandle, Slept};
use crate::driver::handles::{
    AttachmentHandle, CoordinatorHandle, EdgeHandle, HandleError, Memory, Origin, RankHandle,
};
use crate::driver::node::NodeRank;
use crate::driver::weight_update::UpdateHandle;
use crate::gpu::GpuMonitor;
use crate::supervisor::KeeperClient;

/// How long pause and resume wait for another controller before they are refused.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the command that adds a frontend waits for it to say how many API servers it has.
const INTRODUCTION: Duration = Duration::from_secs(3);

/// Handles of all tasks that commands need, and the snapshots that status is made of.
#[derive(Clone, Debug)]
pub(super) struct Handles {
    pub(super) run: Run,
    pub(super) ranks: Vec<RankHandle>,
    pub(super) coordinator: CoordinatorHandle,
    pub(super) attachments: AttachmentHandle,
    pub(super) control: ControlHandle,
    pub(super) updates: UpdateHandle,
    pub(super) drained: Drained,
    pub(super) node: watch::Receiver<BTreeMap<EngineIndex, NodeRank>>,
    pub(super) gpus: GpuMonitor,
    pub(super) keeper: KeeperClient,
    pub(super) relay: watch::Receiver<Option<u32>>,
    /// Of all nodes, with the first rank of each.
    pub(super) edges: Vec<(EngineIndex, EdgeHandle)>,
    pub(super) nodes: Option<Gathered>,
}

impl Answers for Handles {
    async fn status(&self, stopping: bool) -> Status {
        self.whole_status(stopping).await
    }

    async fn perform(&self, command: Command, reply: &Reply) -> Result<Response, AdminError> {
        match command {
            Command::Version => return Ok(Response::Version(self.versions().await)),
            Command::FrontendList => return Ok(Response::Frontends(self.frontends())),
            Command::Update(request) => {
                return updates::follow(self.updates.start(request).await, reply).await;
            }
            Command::UpdateFollow { id } => {
                return updates::follow(self.updates.follow(id).await, reply).await;
            }
            Command::UpdateHistory { limit } => return updates::history(&self.updates, limit).await,
            Command::UpdateAbort => updates::abort(&self.updates).await?,
            Command::Pause { mode, deadline_ms } => {
                let deadline = deadline_ms.map_or(self.run.config.pause_deadline, Duration::from_millis);
                self.control.pause(mode, deadline, PATIENCE).await?;
            }
            Command::Drain => self.drained.begin(&self.control, &self.ranks, PATIENCE).await?,
            Command::Resume => {
                if !self.drained.end(&self.ranks).await? {
                    self.control.resume(PATIENCE).await?;
                }
            }
            Command::Sleep { level, mode, deadline_ms } => {
                let deadline = deadline_ms.map_or(self.run.config.pause_deadline, Duration::from_millis);
                return Ok(self.slept(self.control.sleep(level, mode, deadline, PATIENCE).await?));
            }
            Command::Wake { tags } => {
                return Ok(self.slept(self.control.wake(&tags, PATIENCE).await?));
            }
            Command::FrontendAdd { address } => {
                if let Some(nodes) = &self.run.config.nodes {
                    nodes
                        .check_frontend(&address)
                        .map_err(|error| AdminError::new(ErrorKind::Invalid, error))?;
                }
                self.attachments.add(address.clone(), Origin::Command).await.map_err(refused)?;
                self.check_slots(address).await?;
            }
            Command::FrontendRemove { address } => {
                self.attachments.remove(address).await.map_err(refused)?;
            }
            // Answered by the runtime.
            Command::Status | Command::Stop => {}
        }
        Ok(Response::Done)
    }
}

impl Handles {
    /// The report on a sleep or a wake-up.
    fn slept(&self, slept: Slept) -> Response {
        let engine = |(rank, (memory, error)): (EngineIndex, (Memory, Option<String>))| EngineMemory {
            rank,
            asleep: status::asleep(&memory),
            without_weights: memory.weights == Weights::Gone,
            error,
        };
        let external = self.control.snapshot.borrow().external_weights;
        Response::Sleep(SleepReport {
            engines: slept.engines.into_iter().map(engine).collect(),
            paused: slept.paused,
            version: updates::weights(&self.updates, external).version,
        })
    }

    /// Refuses a frontend that can never be attached, if it is there to say how many API servers it has.
    async fn check_slots(&self, address: String) -> Result<(), AdminError> {
        let slots = self.run.config.frontend_slots;
        let mut snapshot = self.attachments.snapshot.clone();
        let mut servers = 0;
        let answered = snapshot.wait_for(|all| {
            let Some(found) = all.iter().find(|found| found.address == address) else { return false };
            servers = found.api_servers;
            servers > 0 || found.detail.is_some()
        });
        // One that takes longer is refused in the list of frontends.
        if tokio::time::timeout(INTRODUCTION, answered).await.is_err() || servers <= slots {
            return Ok(());
        }
        self.attachments.remove(address.clone()).await.map_err(refused)?;
        let text = format!(
            "frontend {address} has {servers} API servers (vLLM's default is one for each DP rank), and the sidecar \
             was started with --frontend-slots {slots}: start the frontend with --api-server-count {slots} or fewer, \
             or the sidecar with --frontend-slots {servers} or more"
        );
        Err(AdminError::new(ErrorKind::Failed, text))
    }
}

/// Why a frontend was not added, or not removed.
fn refused(error: HandleError) -> AdminError {
    match error {
        HandleError::Gone { .. } => AdminError::stopping(),
        HandleError::Deadline { .. } => AdminError::new(ErrorKind::Timeout, error.to_string()),
        HandleError::Failed(text) => AdminError::new(ErrorKind::Failed, &*text),
    }
}

impl From<ControlError> for AdminError {
    fn from(error: ControlError) -> Self {
        let kind = match &error {
            ControlError::Busy { .. } => ErrorKind::Busy,
            ControlError::Incomplete { .. } => ErrorKind::Unavailable,
            ControlError::Ranks { .. } | ControlError::Asleep | ControlError::NoWeights => ErrorKind::Failed,
            ControlError::Gone => return Self::stopping(),
        };
        Self::new(kind, error.to_string())
    }
}
