//! What goes in and out of the update task.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use dp_sidecar_protocol::machine::weight_update::updates::Failure;
use dp_sidecar_protocol::machine::weight_update::{
    Checkpoint, Config, NodeId, Outcome, PauseMode, Phase, RankState, Record, Refusal,
};
use dp_sidecar_protocol::{EngineIndex, Incarnation, UpdateId, WeightVersion};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;

use super::super::handles::{GroupKind, Retain, StageEvent, StageHandle, StageProgress};

/// Settings of the update task.
#[derive(Clone, Debug)]
pub struct UpdateConfig {
    /// Dense or MoE.
    pub kind: GroupKind,
    /// Where the last committed update is remembered.
    pub state_dir: PathBuf,
    /// Deadlines. `lockstep` is set from `kind`.
    pub machine: Config,
    /// For `dp_sidecar_info` and other small calls.
    pub call_timeout: Duration,
}

impl UpdateConfig {
    /// Usual settings.
    pub fn new(kind: GroupKind, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            kind,
            state_dir: state_dir.into(),
            machine: Config { lockstep: kind == GroupKind::Lockstep, ..Config::default() },
            call_timeout: Duration::from_secs(30),
        }
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
    pub events: mpsc::Receiver<StageEvent>,
}

/// Where the new checkpoint comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpdateSource {
    /// [`Self::Shared`] if every node sees the same files at `path`, else [`Self::Leader`].
    #[default]
    Auto,
    /// Every node reads `path` itself.
    Shared,
    /// The leader reads `path` and passes it on.
    Leader,
    /// What a trainer has uploaded to the leader under this id.
    Upload(String),
}

/// What becomes of a LoRA adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterChange {
    /// Name that requests use as `model`.
    pub name: String,
    /// Absolute directory with `adapter_config.json` and `adapter_model.safetensors`, which the leader can read.
    /// None: the adapter is removed.
    pub path: Option<PathBuf>,
}

/// An update that somebody wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpdateRequest {
    /// Its name; made up when absent. The same name again after success gives the same record again.
    pub id: Option<UpdateId>,
    /// Absolute directory of the new checkpoint; empty for an upload, and when only adapters change.
    pub path: PathBuf,
    /// LoRA adapters to add, replace or remove.
    #[serde(default)]
    pub adapters: Vec<AdapterChange>,
    /// Where it is read.
    #[serde(default)]
    pub source: UpdateSource,
    /// Where the version that is replaced is kept.
    #[serde(default)]
    pub retain: Retain,
    /// Label of the new weights; made from the directory's name and the id when absent.
    pub version: Option<WeightVersion>,
    /// Refuse unless this version is current.
    pub from_version: Option<WeightVersion>,
    /// What happens to running requests.
    pub mode: PauseMode,
    /// How long the pause may take before running requests are aborted.
    pub pause_deadline: Duration,
    /// Go on although the directory of the current weights is gone or changed, so that a failed load cannot
    /// be taken back.
    #[serde(default)]
    pub allow_no_rollback: bool,
    /// How long to wait for another controller (a frontend's control call, the operator).
    pub patience: Duration,
}

impl UpdateRequest {
    /// With usual settings: `wait`, 30 s, then `abort`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            id: None,
            path: path.into(),
            adapters: Vec::new(),
            source: UpdateSource::Auto,
            retain: Retain::Memory,
            version: None,
            from_version: None,
            mode: PauseMode::Wait,
            pause_deadline: Duration::from_secs(30),
            allow_no_rollback: false,
            patience: Duration::from_secs(5),
        }
    }

    /// Whether the weights of the model change, too, and not only adapters.
    pub fn has_weights(&self) -> bool {
        matches!(self.source, UpdateSource::Upload(_)) || !self.path.as_os_str().is_empty()
    }

    /// As in records: the directory, `upload:ID`, or the adapters where only these change.
    pub fn source_name(&self) -> String {
        match &self.source {
            UpdateSource::Upload(id) => format!("upload:{id}"),
            _ if self.has_weights() => self.path.to_string_lossy().into_owned(),
            _ => {
                let named = self.adapters.iter().map(|change| match &change.path {
                    Some(path) => format!("{}={}", change.name, path.display()),
                    None => format!("{}=", change.name),
                });
                format!("adapters:{}", named.collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// What a running update tells whoever started it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum UpdateEvent {
    /// The new checkpoint is being hashed; generation goes on.
    Hashing {
        /// Bytes hashed.
        done: u64,
        /// Bytes altogether.
        total: u64,
    },
    /// A node is filling its shared memory; generation goes on.
    Staging {
        /// Which.
        node: NodeId,
        /// Its name.
        name: String,
        /// How far.
        progress: StageProgress,
        /// Verified bytes per second since the last such event.
        rate: u64,
    },
    /// Something moved on.
    Progress {
        /// Where the update is.
        phase: Phase,
        /// Where its ranks are.
        #[serde(deserialize_with = "ranks_by_name")]
        ranks: BTreeMap<EngineIndex, RankState>,
    },
}

/// Keys of a JSON object are text; inside of an enum with a tag serde does not read numbers out of them.
fn ranks_by_name<'de, D>(deserializer: D) -> Result<BTreeMap<EngineIndex, RankState>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let named: BTreeMap<String, RankState> = BTreeMap::deserialize(deserializer)?;
    let ranks = named.into_iter().map(|(rank, state)| Ok((EngineIndex(rank.parse()?), state)));
    ranks.collect::<Result<_, std::num::ParseIntError>>().map_err(serde::de::Error::custom)
}

/// How an update ended, as far as an exit code is concerned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum UpdateOutcome {
    /// All engines that live hold the new weights.
    Committed,
    /// The directory, the request or the engines' environment is not fit for it. No engine was touched.
    RefusedInvalid,
    /// Another controller has the engines. No engine was touched.
    RefusedBusy,
    /// `from_version` is not the current version. No engine was touched.
    RefusedVersion,
    /// Ended before any engine was asked to load; all go on with the previous weights.
    Aborted,
    /// A load failed; all engines that live hold the previous weights.
    RolledBack,
    /// These engines had to be fenced; see `record.committed` for which weights the others hold.
    Degraded {
        /// Ranks.
        fenced: Vec<EngineIndex>,
    },
}

/// The final word on an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateRecord {
    /// Its name.
    pub id: UpdateId,
    /// How it ended.
    pub outcome: UpdateOutcome,
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
        let outcome = match &record.outcome {
            Outcome::Committed => UpdateOutcome::Committed,
            Outcome::RefusedInvalid => UpdateOutcome::RefusedInvalid,
            Outcome::Aborted => UpdateOutcome::Aborted,
            Outcome::RolledBack => UpdateOutcome::RolledBack,
            Outcome::Degraded { fenced } => UpdateOutcome::Degraded { fenced: fenced.clone() },
        };
        Self {
            id: record.id.clone(),
            message: message(&record, &version),
            outcome,
            version,
            started_unix_ms,
            record,
        }
    }

    pub(super) fn refused(
        id: UpdateId,
        request: &UpdateRequest,
        outcome: UpdateOutcome,
        reason: String,
        version: WeightVersion,
        started_unix_ms: u64,
    ) -> Self {
        let record = Record {
            id: id.clone(),
            outcome: Outcome::RefusedInvalid,
            from_version: Some(version.clone()),
            to_version: request.version.clone().unwrap_or_default(),
            source: request.source_name(),
            mode: request.mode,
            error: Some(reason.clone()),
            ..Record::default()
        };
        Self {
            message: format!("update {id} refused: {reason}"),
            id,
            outcome,
            version,
            started_unix_ms,
            record,
        }
    }
}

pub(super) fn outcome_of(refusal: &Refusal) -> UpdateOutcome {
    match refusal {
        Refusal::Busy { .. } | Refusal::Controlled { .. } | Refusal::TakenOver => UpdateOutcome::RefusedBusy,
        Refusal::WrongVersion { .. } => UpdateOutcome::RefusedVersion,
        Refusal::NoEngines
        | Refusal::IdUsed { .. }
        | Refusal::Asleep
        | Refusal::Unreached { .. }
        | Refusal::Incomplete { .. } => UpdateOutcome::RefusedInvalid,
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
            "update {id} committed: {} ranks hold {version}, {} altogether, paused for {}",
            record
                .ranks
                .values()
                .filter(|rank| !matches!(rank.state, RankState::Lost | RankState::Fenced))
                .count(),
            seconds(record.total_ms),
            seconds(record.paused_ms.unwrap_or_default()),
        ),
        Outcome::RefusedInvalid => format!("update {id} refused, no engine was touched: {error}"),
        Outcome::Aborted => {
            format!("update {id} ended before any engine was loaded, still {version}: {error}")
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UpdateStatus {
    /// Label of the committed weights; `default` before the first update.
    pub version: WeightVersion,
    /// Where they are; none before the first update (the command line's checkpoint then).
    pub committed: Option<Checkpoint>,
    /// Where they came from: a directory, or `upload:ID`.
    #[serde(default)]
    pub source: Option<String>,
    /// How far the nodes are that stage the running update.
    #[serde(default)]
    pub staging: BTreeMap<NodeId, StageProgress>,
    /// What each engine that can be updated holds. Not there: it is being started, or just loads.
    pub held: BTreeMap<EngineIndex, WeightVersion>,
    /// The running update.
    pub running: Option<UpdateId>,
    /// Where it is.
    pub phase: Phase,
    /// Where its ranks are.
    pub ranks: BTreeMap<EngineIndex, RankState>,
    /// How the last one of this process ended.
    pub last: Option<UpdateRecord>,
}

/// The update task wants this engine kept from serving, and started again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceRequest {
    /// Which rank.
    pub rank: EngineIndex,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Why.
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

/// A rank's state for people.
pub fn state_words(state: RankState) -> &'static str {
    match state {
        RankState::Serving => "serving",
        RankState::Pausing => "pausing",
        RankState::Paused => "paused",
        RankState::Loading => "loading",
        RankState::Loaded => "loaded",
        RankState::LoadFailed => "load failed",
        RankState::RollingBack => "rolling back",
        RankState::RolledBack => "rolled back",
        RankState::Stamped => "stamped",
        RankState::Resuming => "resuming",
        RankState::Resumed => "resumed",
        RankState::Fenced => "fenced",
        RankState::Lost => "lost",
    }
}
