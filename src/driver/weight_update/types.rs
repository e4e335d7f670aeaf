//! What goes in and out of the update task.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use dp_sidecar_protocol::machine::weight_update::updates::Failure;
use dp_sidecar_protocol::machine::weight_update::{
    Checkpoint, Config, NodeId, Outcome, RankProgress, Record, Refusal,
};
use dp_sidecar_protocol::{EngineIndex, Incarnation, UpdateId, WeightVersion};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::super::handles::{GroupKind, StageHandle};
use super::stages::StageReports;
use crate::api::{ReportStatus, UNKNOWN, UpdateReport, UpdateRequest};

/// Settings of the update task.
#[derive(Clone, Debug)]
pub struct UpdateConfig {
    /// Where the last committed update is remembered.
    pub state_dir: PathBuf,
    /// Deadlines, and whether the engines step together.
    pub machine: Config,
    /// For `dp_sidecar_info` and other small calls.
    pub call_timeout: Duration,
    /// How long a pause may take before running requests are aborted, unless the request says.
    pub pause_deadline: Duration,
    /// How long to wait for another controller (a frontend's control call, the operator).
    pub patience: Duration,
    /// Until so long after the start, a node that does not find the directory of the committed weights is asked again.
    pub startup_timeout: Duration,
    /// Start with the checkpoint of the command line, whatever was committed before.
    pub forget_committed: bool,
    /// Names that requests to the model itself have: no adapter can have one of them.
    pub served_names: Vec<String>,
}

impl UpdateConfig {
    pub fn new(kind: GroupKind, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            machine: Config { kind, ..Config::default() },
            call_timeout: Duration::from_secs(30),
            pause_deadline: Duration::from_secs(30),
            patience: Duration::from_secs(5),
            startup_timeout: Duration::ZERO,
            forget_committed: false,
            served_names: Vec::new(),
        }
    }

    /// How long the pause of this update may take before running requests are aborted.
    pub(super) fn pause_deadline_of(&self, request: &UpdateRequest) -> Duration {
        request.pause_deadline_ms.map_or(self.pause_deadline, Duration::from_millis)
    }

    /// With this limit for a load on all ranks.
    #[must_use]
    pub fn with_load_timeout(mut self, limit: Duration) -> Self {
        self.machine.load_timeout = limit;
        self
    }
}

/// A node, as the update task sees it.
#[derive(Debug)]
pub struct UpdateNode {
    /// Its number in records.
    pub id: NodeId,
    /// For people.
    pub name: String,
    /// Its ranks. The node of the lowest rank is the leader's.
    pub ranks: Vec<EngineIndex>,
    /// Its staging area. None: engines load from directories only.
    pub stage: Option<StageHandle>,
    /// What the staging area reports.
    pub reports: StageReports,
}

/// The final word on an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateRecord {
    /// One line for people. Names the failing rank and worker.
    pub message: String,
    /// Version of the weights after it.
    pub version: WeightVersion,
    /// When it was asked for, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// Everything else.
    pub record: Record,
}

impl UpdateRecord {
    pub(super) fn ended(record: Record, version: WeightVersion, started_unix_ms: u64) -> Self {
        Self { message: message(&record, &version), version, started_unix_ms, record }
    }

    pub(super) fn refused(
        id: UpdateId,
        request: &UpdateRequest,
        refusal: &Refusal,
        version: WeightVersion,
        started_unix_ms: u64,
    ) -> Self {
        let record = Record {
            id,
            outcome: refusal.outcome(),
            from_version: Some(version.clone()),
            to_version: request.version.clone().unwrap_or_default(),
            source: request.source_name(),
            mode: request.mode,
            error: Some(refusal.to_string()),
            ..Record::default()
        };
        let message = format!("update {} refused: {refusal}", record.id);
        Self { message, version, started_unix_ms, record }
    }

    pub const fn outcome(&self) -> &Outcome {
        &self.record.outcome
    }
}

impl From<&UpdateRecord> for UpdateReport {
    fn from(record: &UpdateRecord) -> Self {
        let UpdateRecord { message, version, record, .. } = record;
        let seconds = |ms: u64| Duration::from_millis(ms).as_secs_f64();
        let status = ReportStatus::from(&record.outcome);
        Self {
            id: record.id.clone(),
            status,
            version: version.clone(),
            previous: record.from_version.clone().unwrap_or_else(|| WeightVersion(UNKNOWN.to_owned())),
            reason: (status != ReportStatus::Committed).then(|| message.clone()),
            fenced: match &record.outcome {
                Outcome::Degraded { fenced } => fenced.clone(),
                _ => Vec::new(),
            },
            total_s: seconds(record.total_ms),
            paused_s: seconds(record.paused_ms.unwrap_or_default()),
            bytes: record.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.bytes),
            asleep: record.left_asleep,
            engines: record.ranks.iter().map(|(rank, of)| (*rank, of.times.clone())).collect(),
            phases: record.phases.clone(),
            warnings: record.warnings.clone(),
        }
    }
}

fn message(record: &Record, version: &WeightVersion) -> String {
    let id = &record.id;
    if record.recovered {
        let what = if record.committed { "forward" } else { "back" };
        let error = record.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
        return format!("update {id} rolled {what} after a restart of the sidecar to {version}{error}");
    }
    let error = record.error.as_deref().unwrap_or("no reason given");
    let seconds = |ms: u64| format!("{}.{:03} s", ms / 1000, ms % 1000);
    match &record.outcome {
        Outcome::Committed => format!(
            "update {id} committed: {} ranks hold {version}, {} altogether, paused for {}{}",
            record
                .ranks
                .values()
                .filter(|rank| !matches!(rank.times.state, RankProgress::Lost | RankProgress::Fenced))
                .count(),
            seconds(record.total_ms),
            seconds(record.paused_ms.unwrap_or_default()),
            if record.left_asleep { "; they still sleep: wake up the rest (`sidecar wake`)" } else { "" },
        ),
        Outcome::RefusedInvalid | Outcome::RefusedBusy | Outcome::RefusedVersion => {
            format!("update {id} refused, no engine was touched: {error}")
        }
        Outcome::Aborted => {
            format!("update {id} ended before any engine was loaded, still {version}: {error}")
        }
        Outcome::RolledBack if *version == WeightVersion::unknown() => {
            format!("update {id} failed, and which weights the engines hold is as unknown as before: {error}")
        }
        Outcome::RolledBack => {
            format!("update {id} rolled back, all engines hold {version}: {error}")
        }
        Outcome::Degraded { fenced } => {
            let fenced: Vec<String> = fenced.iter().map(ToString::to_string).collect();
            let what = if record.committed { "committed" } else { "rolled back" };
            format!("update {id} {what} to {version}, rank {} fenced: {error}", fenced.join(", "))
        }
    }
}

/// What is known about weights, for status.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UpdateSnapshot {
    /// Label of the committed weights; `default` before the first update.
    pub version: WeightVersion,
    /// Whether they can be updated, and why not, for people.
    pub updates: String,
    /// Where they are; none before the first update (the command line's checkpoint then).
    pub committed: Option<Checkpoint>,
    /// Where they came from: a directory, or `upload:ID`.
    pub source: Option<String>,
    pub running: Option<UpdateId>,
    /// Ranks that may hold other weights than those of `version` at the moment.
    pub in_doubt: BTreeSet<EngineIndex>,
    /// A frontend has loaded weights since, under this sidecar or one before.
    pub external_weights: bool,
    /// How the last one of this process ended.
    pub last: Option<UpdateRecord>,
}

/// The update task wants this engine kept from serving, and started again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceRequest {
    pub rank: EngineIndex,
    /// Which life of it.
    pub incarnation: Incarnation,
    pub reason: String,
}

/// The update task did not do what it was asked to.
#[derive(Clone, Debug, Error)]
pub enum UpdateError {
    /// It has ended; the sidecar is stopping.
    #[error("the update task has ended")]
    Gone,
    /// There is nothing to follow.
    #[error("{} is not running", id.as_ref().map_or_else(|| "an update".to_owned(), |id| format!("update {id}")))]
    NotRunning {
        /// The one that was asked for; none: any.
        id: Option<UpdateId>,
    },
    /// Engines are to be started again.
    #[error(transparent)]
    Engines(#[from] Failure),
}
