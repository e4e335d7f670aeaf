//! What an update leaves behind.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{EngineIndex, Incarnation, UpdateId, WeightVersion};

use super::vocabulary::{Checkpoint, NodeId, PauseMode, Phase, RankProgress, WorkerReport};

/// What the journal keeps of a committed update.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Commit {
    pub id: UpdateId,
    /// Label of the weights.
    pub version: WeightVersion,
    /// Where they are on the leader's node.
    pub checkpoint: Checkpoint,
    /// Where they came from: a directory, or `upload:ID`.
    #[serde(default)]
    pub source: String,
    /// Where they are on each node that took part.
    #[serde(default)]
    pub nodes: BTreeMap<NodeId, Checkpoint>,
    /// The update that brought the weights of the model, if it was not this one: adapters came with this one.
    #[serde(default)]
    pub weights: Option<UpdateId>,
    /// LoRA adapters that the engines hold, by name.
    #[serde(default)]
    pub adapters: BTreeMap<String, Adapter>,
}

impl Commit {
    /// The directory that the weights came from, unless they were uploaded.
    pub fn directory(&self) -> Option<&str> {
        Some(self.source.as_str()).filter(|source| source.starts_with('/'))
    }

    /// The update that brought the weights of the model.
    pub fn weights_id(&self) -> &UpdateId {
        self.weights.as_ref().unwrap_or(&self.id)
    }
}

/// The commit record as it is on the disk.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Committed {
    /// [`Self::FORMAT`]; another one is not read.
    pub format: u32,
    /// Checkpoint directory of the command line. For another model the record means nothing.
    pub model_path: String,
    /// The commit record proper.
    pub commit: Commit,
    /// Written when the update has ended; missing if the sidecar ended in between.
    pub record: Option<Record>,
}

impl Committed {
    /// What this crate reads and writes.
    pub const FORMAT: u32 = 1;

    /// As it is at the commit point.
    pub const fn new(model_path: String, commit: Commit) -> Self {
        Self { format: Self::FORMAT, model_path, commit, record: None }
    }
}

/// A LoRA adapter.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Adapter {
    /// The update that brought it.
    pub update: UpdateId,
    /// Its one file.
    pub checkpoint: Checkpoint,
    /// Text of `adapter_config.json`.
    pub config: String,
}

/// How an update ended.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    /// All engines that live hold the new weights.
    Committed,
    /// The directory, the request or the engines' environment is not fit for it. No engine was touched.
    RefusedInvalid,
    /// Another controller has the engines. No engine was touched.
    RefusedBusy,
    /// The version that the caller expected is not the current one. No engine was touched.
    RefusedVersion,
    /// Ended before any engine was asked to load. Engines go on with the previous weights.
    #[default]
    Aborted,
    /// All engines that live hold the previous weights again.
    RolledBack,
    /// As `Committed` or `RolledBack` (see [`Record::committed`]), but these engines had to be fenced.
    Degraded {
        /// They do not serve until started again at the committed version.
        fenced: Vec<EngineIndex>,
    },
}

/// What an update did on one engine.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EngineTimes {
    /// Where it was at the end.
    pub state: RankProgress,
    /// Milliseconds from the first pause call to the answer that counted.
    pub pause_ms: Option<u64>,
    /// Milliseconds of the load of the new weights, as seen from here.
    pub load_ms: Option<u64>,
    /// Milliseconds of the load of the previous weights.
    pub rollback_ms: Option<u64>,
    /// What went wrong on it, first cause first.
    #[serde(default)]
    pub errors: Vec<String>,
}

/// What happened to one rank.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct RankRecord {
    /// Which life of it.
    pub incarnation: Incarnation,
    #[serde(flatten)]
    pub times: EngineTimes,
    /// Answers of its workers to the last load.
    pub workers: Vec<WorkerReport>,
}

/// What an update did.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Record {
    pub id: UpdateId,
    pub outcome: Outcome,
    /// The commit record is durable: the new version is the current one.
    pub committed: bool,
    /// Version before; `None`: weights did not come from an update of ours.
    pub from_version: Option<WeightVersion>,
    /// Label of the new weights.
    pub to_version: WeightVersion,
    /// Their directory.
    pub source: String,
    /// What was found there, once it was checked.
    pub checkpoint: Option<Checkpoint>,
    /// The mode asked for.
    pub mode: PauseMode,
    /// The pause deadline passed, and running requests were aborted.
    pub pause_escalated: bool,
    /// Responses that were running may contain tokens of both versions (mode `keep`, committed).
    pub may_mix_versions: bool,
    /// The sidecar ended on the way, and this is what its successor did.
    #[serde(default)]
    pub recovered: bool,
    /// Engines were left paused, since they were paused by somebody before the update.
    pub left_paused: bool,
    /// Parts of the engines' memory slept during the update, and still do.
    #[serde(default)]
    pub left_asleep: bool,
    /// First cause of a failure: names rank and worker.
    pub error: Option<String>,
    /// What the operator should know although nothing failed.
    pub warnings: Vec<String>,
    /// Per rank.
    pub ranks: BTreeMap<EngineIndex, RankRecord>,
    /// Milliseconds spent in each phase.
    pub phases: BTreeMap<Phase, u64>,
    /// Milliseconds from the first pause call to the last resume: how long nothing was generated.
    pub paused_ms: Option<u64>,
    /// Milliseconds altogether.
    pub total_ms: u64,
}

impl Record {
    /// What is known of an update of which only the commit record was kept, because the sidecar ended
    /// between the commit point and the end.
    pub fn of_commit(commit: &Commit) -> Self {
        Self {
            id: commit.id.clone(),
            outcome: Outcome::Committed,
            committed: true,
            to_version: commit.version.clone(),
            source: if commit.source.is_empty() {
                commit.checkpoint.path.clone()
            } else {
                commit.source.clone()
            },
            checkpoint: Some(commit.checkpoint.clone()),
            warnings: vec![
                "the sidecar ended between the commit point and the end of this update".to_owned(),
            ],
            ..Self::default()
        }
    }
}

/// Plain data about the machine.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    pub running: Option<UpdateId>,
    pub phase: Phase,
    /// Where its ranks are.
    pub ranks: BTreeMap<EngineIndex, RankProgress>,
    /// Version of the committed weights.
    pub version: WeightVersion,
    /// Last update that was committed.
    pub committed: Option<UpdateId>,
    /// The running update has passed its commit point.
    pub past_commit_point: bool,
    /// Ranks that may hold other weights than those of `version` at the moment.
    #[serde(default)]
    pub in_doubt: BTreeSet<EngineIndex>,
    /// A frontend has loaded weights since, under this sidecar or one before: all ranks are in doubt.
    #[serde(default)]
    pub external_weights: bool,
}
