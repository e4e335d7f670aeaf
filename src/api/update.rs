//! Weight updates: what can be asked for, what is told on the way, and the report at the end.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dp_sidecar_protocol::machine::weight_update::{NodeId, Outcome, PauseMode, Phase, RankProgress, Renames};
use dp_sidecar_protocol::{EngineIndex, UpdateId, WeightVersion};
use serde::{Deserialize, Serialize};

pub use dp_sidecar_protocol::machine::weight_update::EngineTimes;

/// A weight update, as it is asked for on the command line, the admin socket and over HTTP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpdateRequest {
    /// Name of the transaction, for logs; random if absent. The same one again after success gives the same record.
    pub id: Option<UpdateId>,
    /// Absolute directory of the new checkpoint. Only adapters change without it and without an upload.
    pub path: Option<PathBuf>,
    /// Instead of `path`: what a trainer has uploaded to the leader under this id.
    pub upload: Option<String>,
    /// LoRA adapters to add, replace or remove.
    pub adapters: Vec<AdapterChange>,
    /// Which nodes read `path`.
    pub source: UpdateSource,
    /// Where the version that is replaced is kept.
    pub retain: Retain,
    /// Version to stamp; made from the directory's name and the id if absent.
    pub version: Option<WeightVersion>,
    /// Refuse unless this version is loaded now.
    pub from_version: Option<WeightVersion>,
    /// How running requests are treated.
    pub mode: PauseMode,
    /// With `wait`: abort what still runs after this many milliseconds; as the sidecar was started if absent.
    pub pause_deadline_ms: Option<u64>,
    /// Update although the current weights cannot be loaded again after a failure.
    pub allow_no_rollback: bool,
    /// Update although a KV connector keeps blocks that were computed with the current weights.
    pub allow_stale_kv: bool,
    /// Prefixes of tensors' names, and what the model has there instead.
    pub rename: Renames,
    /// Refuse element types that vLLM would cast.
    pub strict_dtype: bool,
}

impl UpdateRequest {
    /// Of the checkpoint in this directory, with usual settings.
    #[cfg(any(test, feature = "test-support"))]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), ..Self::default() }
    }

    /// Whether it is clear what is wanted.
    ///
    /// # Errors
    /// What was expected, for people.
    pub fn check(&self) -> Result<(), &'static str> {
        match (&self.path, &self.upload) {
            (Some(_), Some(_)) => Err("expected either path or upload"),
            (None, None) if self.adapters.is_empty() => Err("expected either path or upload"),
            (None, None) if !self.rename.is_empty() => Err("rename is for weights, expected path or upload"),
            _ => self.version.as_ref().map_or(Ok(()), WeightVersion::check),
        }
    }

    /// Whether the weights of the model change, too, and not only adapters.
    pub const fn has_weights(&self) -> bool {
        self.path.is_some() || self.upload.is_some()
    }

    /// As in records: the directory, `upload:ID`, or the adapters where only these change.
    pub fn source_name(&self) -> String {
        match (&self.path, &self.upload) {
            (_, Some(id)) => format!("upload:{id}"),
            (Some(path), None) => path.to_string_lossy().into_owned(),
            (None, None) => {
                let named = self.adapters.iter().map(|change| match &change.path {
                    Some(path) => format!("{}={}", change.name, path.display()),
                    None => format!("{}=", change.name),
                });
                format!("adapters:{}", named.collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// Which nodes read a checkpoint's directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpdateSource {
    /// [`Self::Shared`] if every node sees the same files at `path`, else [`Self::Leader`].
    #[default]
    Auto,
    /// Every node reads `path` itself.
    Shared,
    /// The leader reads `path` and passes it on.
    Leader,
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

/// Where the version that is replaced is kept, for a rollback.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Retain {
    /// In the node's other shared memory segment.
    #[default]
    Memory,
    /// In the directory it came from (the start-up checkpoint, or `--path` of an earlier update); only one
    /// segment is used.
    Disk,
    /// Nowhere: an engine that fails gets the new version again, or is fenced.
    None,
}

/// One step of a running update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateProgress {
    /// `staging`, `prepared`, `pausing`, `loading`, `verifying`, `committing`, `rolling_back`.
    pub phase: String,
    /// What happens, for people.
    pub message: String,
    /// How much of the phase is done, in units of `total` (bytes while staging, else engines).
    pub done: u64,
    /// Size of the phase; 0 if unknown.
    pub total: u64,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<UpdateEvent>,
}

impl From<UpdateEvent> for UpdateProgress {
    fn from(event: UpdateEvent) -> Self {
        let (phase, message, done, total) = match &event {
            UpdateEvent::Hashing { done, total } => {
                (Phase::Staging, "checking and hashing the checkpoint".to_owned(), *done, *total)
            }
            UpdateEvent::Staging { name, progress, .. } => {
                let message = format!("{name} is copying the checkpoint into shared memory");
                (Phase::Staging, message, progress.done, progress.total)
            }
            UpdateEvent::Progress { phase, ranks } => {
                let done = ranks.values().filter(|state| has_passed(*phase, **state)).count();
                let states: Vec<String> =
                    ranks.iter().map(|(rank, state)| format!("rank {rank} {state}")).collect();
                (*phase, states.join(", "), done as u64, ranks.len() as u64)
            }
        };
        Self { phase: phase.to_string(), message, done, total, event: Some(event) }
    }
}

/// Whether a rank has done its part of a phase.
fn has_passed(phase: Phase, state: RankProgress) -> bool {
    match phase {
        Phase::Pausing => state == RankProgress::Paused,
        Phase::Loading | Phase::Verifying => state == RankProgress::Loaded,
        Phase::RollingBack => state == RankProgress::RolledBack,
        Phase::Committing => state == RankProgress::Stamped,
        Phase::Resuming => state == RankProgress::Resumed,
        Phase::Idle | Phase::Staging | Phase::Prepared => false,
    }
}

/// What a running update tells whoever started it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum UpdateEvent {
    /// The new checkpoint is being hashed, in bytes; generation goes on.
    Hashing { done: u64, total: u64 },
    /// A node is filling its shared memory; generation goes on. `rate`: verified bytes per second since the last such
    /// event.
    Staging { node: NodeId, name: String, progress: StageProgress, rate: u64 },
    /// Something moved on.
    Progress {
        /// Where the update is.
        phase: Phase,
        /// Where its ranks are.
        #[serde(deserialize_with = "ranks_by_name")]
        ranks: BTreeMap<EngineIndex, RankProgress>,
    },
}

/// Keys of a JSON object are text; inside of an enum with a tag serde does not read numbers out of them.
fn ranks_by_name<'de, D>(deserializer: D) -> Result<BTreeMap<EngineIndex, RankProgress>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let named: BTreeMap<String, RankProgress> = BTreeMap::deserialize(deserializer)?;
    let ranks = named.into_iter().map(|(rank, state)| Ok((EngineIndex(rank.parse()?), state)));
    ranks.collect::<Result<_, std::num::ParseIntError>>().map_err(serde::de::Error::custom)
}

/// How far staging is on one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageProgress {
    /// Verified bytes.
    pub done: u64,
    /// Bytes of the checkpoint.
    pub total: u64,
    pub chunks: Chunks,
    /// Bytes that came over the network (payload).
    pub received: u64,
    /// Bytes taken from the current segment.
    pub reused: u64,
    /// Milliseconds since it began.
    pub ms: u64,
}

/// Chunks of a checkpoint. Written as a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Chunks {
    /// Verified ones.
    pub done: u64,
    pub total: u64,
}

impl From<(u64, u64)> for Chunks {
    fn from((done, total): (u64, u64)) -> Self {
        Self { done, total }
    }
}

impl From<Chunks> for (u64, u64) {
    fn from(chunks: Chunks) -> Self {
        (chunks.done, chunks.total)
    }
}

/// How an update ended, in the words of reports, answer codes of HTTP and exit codes; see [`Outcome`] for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportStatus {
    /// All engines hold the new weights and serve.
    Committed,
    /// Nothing was touched: directory invalid, or a precondition does not hold.
    Refused,
    /// A load failed; all engines are back at the previous weights and serve.
    RolledBack,
    /// At least one engine could be brought to neither version and is fenced.
    Degraded,
}

impl From<&Outcome> for ReportStatus {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Committed => Self::Committed,
            Outcome::RefusedInvalid | Outcome::RefusedBusy | Outcome::RefusedVersion | Outcome::Aborted => {
                Self::Refused
            }
            Outcome::RolledBack => Self::RolledBack,
            Outcome::Degraded { .. } => Self::Degraded,
        }
    }
}

/// Version of weights that a frontend has loaded by itself, or discarded.
pub const UNKNOWN: &str = WeightVersion::UNKNOWN;

/// Final word on an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateReport {
    /// Name of the transaction.
    pub id: UpdateId,
    /// How it ended.
    pub status: ReportStatus,
    /// Version that the admitted engines hold now; `unknown` if a frontend has loaded or discarded weights.
    pub version: WeightVersion,
    /// Version they held before.
    pub previous: WeightVersion,
    /// Why it was not committed: who, which stage, what was expected and found.
    pub reason: Option<String>,
    /// Ranks that are fenced.
    pub fenced: Vec<EngineIndex>,
    /// Seconds from the request to this report.
    pub total_s: f64,
    /// Seconds during which the engines were paused.
    pub paused_s: f64,
    /// Bytes of the checkpoint.
    pub bytes: u64,
    /// Parts of the engines' memory slept during the update and still do: they serve when they are woken up.
    #[serde(default)]
    pub asleep: bool,
    /// What it took on each engine.
    #[serde(default)]
    pub engines: BTreeMap<EngineIndex, EngineTimes>,
    /// Milliseconds in each phase.
    #[serde(default)]
    pub phases: BTreeMap<Phase, u64>,
    /// What one should know although nothing failed: responses that mix versions, engines that were
    /// lost on the way.
    #[serde(default)]
    pub warnings: Vec<String>,
}
